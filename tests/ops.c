/* ops.c - one operator at a time: inputs that make every constant matter, and what the operator makes of them.
 *
 *     ops DIR [FLOORS]     writes DIR/OP.inputs.safetensors and DIR/OP.safetensors of every operator
 *
 * tests/ops_cases.tsv is the table of cases: operator, case, parameters (KEY=VALUE), note, between tabs.
 *
 * The float64 build makes the goldens (make goldens); either build's files are compared with those (tests/ops.sh), as a
 * port's would be. Inputs are CASE.x, CASE.weight, ..., parameters and a note for each case are in the metadata; outputs
 * are CASE.y. FLOORS (tests/ops_floors.tsv: operator, tensor, floors for fp64 fp32 fp16 bf16) goes into the metadata of
 * OP.safetensors. Inputs do not depend on the build: multiples of a power of two below 128, so that they are exact in
 * F32, F16 and BF16 alike, and a port in half precision is judged for its arithmetic alone. They are drawn by a hash of
 * their names: a new case changes no other. Shapes are PyTorch's, channels first.
 */
#include "../io.c"
#include "../tensor.c"
#include "../vae.c"
#include "../dit.c"
#define main ruyi_main
#include "../ruyi.c"
#undef main
#include "pack.h"

#define COUNT(list) (int)(sizeof(list) / sizeof *(list))

static arena memory;
static char op[32], name[64];                   /* the operator and the case under way */
static struct { char key[32], value[32]; } settings[32];
static int nsettings;
typedef struct { st_entry list[512]; int count; } side;
static side inputs, outputs;

/* ---------------------------------------------------------------- cases, inputs, outputs */

/* A parameter of the case: a word, a number, a whole number. */
static const char *word(const char *key)
{
    for (int i = 0; i < nsettings; i++)
        if (!strcmp(settings[i].key, key))
            return settings[i].value;
    die(BAD_INPUT, "tests/ops_cases.tsv: %s %s: got no %s, expected one; add it", op, name, key);
}
static double value(const char *key) { return strtod(word(key), NULL); }
static int64_t whole(const char *key) { return (int64_t)value(key); }
static bool is(const char *key, const char *text) { return !strcmp(word(key), text); }
static dtype type_of(void)
{
    int t = 0;
    while (t < DTYPES && !is("type", dtype_name[t]))
        t++;
    return (dtype)t;
}
static pad_mode mode_of(void)
{
    static const char *const modes[] = { "replicate", "single", "slice", "", "", "cache_first", "cache_next" };
    return (pad_mode)place_of(word("mode"), modes, COUNT(modes));
}

/* Wide types first, so that every tensor is aligned; then by name, since C leaves the order of arguments open. */
static void enter(side *s, const char *part, dtype type, shape dims, const void *data)
{
    int at = s->count++;
    st_entry e = { text_of("%s.%s", name, part), type, dims, data };
    if (s->count > COUNT(s->list))
        die(SYSTEM_ERROR, "ops: %s has more than %d tensors; raise the number", op, COUNT(s->list));
    for (; at > 0; at--) {
        int wider = dtype_bits[type] - dtype_bits[s->list[at - 1].type];
        if (wider < 0 || (wider == 0 && strcmp(e.name, s->list[at - 1].name) > 0))
            break;
        s->list[at] = s->list[at - 1];
    }
    s->list[at] = e;
}

/* 64 bits for element i of a part of the case. FNV-1a of the names, then splitmix64. */
static uint64_t bits_of(const char *part, int64_t i)
{
    uint64_t h = UINT64_C(14695981039346656037);
    for (const char *const *word = (const char *const[]){ op, name, part, NULL }; *word; word++)
        for (const char *p = *word; *p; p++)
            h = (h ^ (unsigned char)*p) * UINT64_C(1099511628211);
    h += (uint64_t)(i + 1) * UINT64_C(0x9E3779B97F4A7C15);
    h = (h ^ h >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    h = (h ^ h >> 27) * UINT64_C(0x94D049BB133111EB);
    return h ^ h >> 31;
}
static double draw(const char *part, int64_t i, double step) { return step * ((double)(bits_of(part, i) % 255) - 127); }

/* Place in memory of element i of a file's tensor: [C][rest] there may be [rest][C] here. */
static int64_t place(shape s, layout order, int64_t i)
{
    int64_t c = s.dim[0], rest = (int64_t)shape_count(s) / c;
    return order == AS_IS ? i : i % rest * c + i / rest;
}
static shape arranged(shape s, layout order)
{
    shape t = s;
    for (int i = 0; i < s.ndim && order == CHANNELS_FIRST; i++)
        t.dim[i] = s.dim[(i + 1) % s.ndim];
    return t;
}

/* An input: values in the order of the file, whose shape is s. order CHANNELS_FIRST: the kernels take it channels last. */
static tensor stored(const char *part, shape s, layout order, const double *values)
{
    int64_t n = (int64_t)shape_count(s);
    float *data = allocate((size_t)n, sizeof *data);
    tensor x = tensor_new(&memory, arranged(s, order));
    for (int64_t i = 0; i < n; i++)
        x.data[place(s, order, i)] = (real)(data[i] = (float)values[i]);
    enter(&inputs, part, F32, s, data);
    return x;
}
static tensor drawn(const char *part, shape s, layout order, double step)
{
    int64_t n = (int64_t)shape_count(s);
    double *values = allocate((size_t)n, sizeof *values);
    for (int64_t i = 0; i < n; i++)
        values[i] = draw(part, i, step);
    tensor x = stored(part, s, order, values);
    free(values);
    return x;
}
/* A parameter in its type. F8: any finite code below 2, subnormal ones too. */
static weight parameter(const char *part, shape s, dtype type, double step)
{
    int64_t n = (int64_t)shape_count(s);
    size_t size = (size_t)dtype_bits[type] / 8;
    unsigned char *data = allocate((size_t)n, size);
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = float_bits((float)draw(part, i, step)), sign = bits >> 31 << 15;
        uint16_t half = type == BF16 ? (uint16_t)(bits >> 16) : bits << 1 ? (uint16_t)(sign | ((bits >> 13 & 0x3ffff) - (112 << 10))) : 0;
        unsigned char small = (unsigned char)(bits_of(part, i) & 0xbf);
        memcpy(data + (size_t)i * size, type == F32 ? (void *)&bits : size == 2 ? (void *)&half : (void *)&small, size);
    }
    enter(&inputs, part, type, s, data);
    weight w = { .data = data, .type = type, .ndim = s.ndim, .key = part };
    memcpy(w.dim, s.dim, sizeof w.dim);
    return w;
}
static layer affine(const char *part, int64_t n, dtype type)
{
    char *weight_name = text_of("%sweight", part), *bias_name = text_of("%sbias", part);
    return (layer){ parameter(weight_name, SHAPE(n), type, 1.0 / 64), parameter(bias_name, SHAPE(n), type, 1.0 / 64) };
}
static layer dense(const char *part, int64_t n, int64_t k, dtype type)
{
    char *weight_name = text_of("%sweight", part), *bias_name = text_of("%sbias", part);
    return (layer){ parameter(weight_name, SHAPE(n, k), type, 1.0 / 512), parameter(bias_name, SHAPE(n), type, 1.0 / 64) };
}
/* [Cout][Cin][t][y][x] in the file, [Cout][taps][Cin] in the kernel, as bind_conv has it; a kernel of one frame is [Cout][Cin][y][x]. */
static layer kernel(const char *part, int64_t cout, int64_t cin, int64_t t, int64_t side, dtype type)
{
    char *weight_name = text_of("%sweight", part), *bias_name = text_of("%sbias", part);
    shape s = t == 1 ? SHAPE(cout, cin, side, side) : SHAPE(cout, cin, t, side, side);
    layer l = { parameter(weight_name, s, type, 1.0 / 512), parameter(bias_name, SHAPE(cout), type, 1.0 / 64) };
    int64_t taps = t * side * side;
    size_t size = (size_t)dtype_bits[type] / 8;
    unsigned char *data = allocate((size_t)(cout * cin * taps), size);
    for (int64_t i = 0; i < cout * cin * taps; i++)
        memcpy(data + (size_t)((i / taps / cin * taps + i % taps) * cin + i / taps % cin) * size, l.weight.data + (size_t)i * size, size);
    l.weight = (weight){ .data = data, .type = type, .ndim = 3, .dim = { cout, taps, cin }, .key = part };
    return l;
}

/* An output, in the build's own type. order: of the file's tensor, whose memory is x. */
static void result_as(const char *part, tensor x, layout order)
{
    shape s = tensor_shape(x);
    for (int i = 0; i < x.ndim && order == CHANNELS_FIRST; i++)
        s.dim[(i + 1) % x.ndim] = x.dim[i];
    real *data = allocate((size_t)tensor_count(x), sizeof *data);
    for (int64_t i = 0; i < tensor_count(x); i++)
        data[i] = x.data[place(s, order, i)];
    enter(&outputs, part, sizeof(real) == 8 ? F64 : F32, s, data);
}
static void check(tensor x) { result_as("y", x, AS_IS); }
static void check_video(tensor x) { result_as("y", x, CHANNELS_FIRST); }
static void check_number(double x)
{
    tensor y = tensor_new(&memory, SHAPE(1));
    tensor_fill(y, (real)x);
    check(y);
}
static tensor empty(int64_t m, int64_t n) { return tensor_new(&memory, SHAPE(m, n)); }

/* ---------------------------------------------------------------- products */

static void op_linear(void)
{
    tensor x = drawn("x", SHAPE(whole("m"), whole("k")), AS_IS, value("step"));
    layer l = { parameter("weight", SHAPE(whole("n"), whole("k")), type_of(), 1.0 / 512), { 0 } };
    if (whole("bias"))
        l.bias = parameter("bias", SHAPE(whole("n")), type_of(), 1.0 / 64);
    check(linear(&memory, x, l));
}

static void op_lora(void)
{
    tensor x = drawn("x", SHAPE(3, 20), AS_IS, 1.0 / 64);
    layer l = { .weight = parameter("weight", SHAPE(6, 20), BF16, 1.0 / 512) };
    lora second, first = { .scale = (real)value("scale"), .up = parameter("up", SHAPE(6, whole("rank")), F16, 1.0 / 256),
                           .down = parameter("down", SHAPE(whole("rank"), 20), F32, 1.0 / 256) };
    if (!strcmp(name, "two")) {
        second = (lora){ .scale = (real)value("scale2"), .up = parameter("up2", SHAPE(6, 2), F32, 1.0 / 256),
                         .down = parameter("down2", SHAPE(2, 20), F16, 1.0 / 256) };
        first.next = &second;
    }
    l.weight.lora = &first;
    check(linear(&memory, x, l));
}

static void op_conv3d(void)
{
    int64_t t = whole("frames"), h = whole("height"), w = whole("width"), cin = whole("in"), cout = whole("out"), up = whole("up"), stride_xy = whole("stride");
    pad_mode mode = mode_of();
    tensor x = drawn("x", SHAPE(cin, t, h, w), CHANNELS_FIRST, 1.0 / 64), cache = tensor_new(&memory, SHAPE(2, h, w, cin));
    if (mode == PAD_CACHE_NEXT)
        cache = drawn("cache", SHAPE(cin, 2, h, w), CHANNELS_FIRST, 1.0 / 64);
    layer l = kernel("", cout, cin, 3, 3, type_of());
    tensor y = tensor_new(&memory, SHAPE((t - 1) / whole("stride_t") + 1, h * up / stride_xy, w * up / stride_xy, cout));
    conv(&memory, y, x, (conv_spec){ .kernel = { 3, 3, 3 }, .stride = { whole("stride_t"), stride_xy, stride_xy }, .pad = stride_xy == 1, .up = up,
                                     .time = mode, .cache = &cache }, l);
    check_video(y);
    if (mode == PAD_CACHE_FIRST || mode == PAD_CACHE_NEXT)
        result_as("cache", cache, CHANNELS_FIRST);
}

static void op_patch(void)
{
    int64_t p = whole("patch"), f = whole("frames"), h = whole("height"), w = whole("width");
    tensor latents = drawn("latents", SHAPE(3, f, h, w), CHANNELS_FIRST, 1.0 / 64), inpaint = drawn("inpaint", SHAPE(4, f, h, w), CHANNELS_FIRST, 1.0 / 64);
    dit d = { .config = { .patch_size = p, .hidden_size = 5 }, .patch = kernel("", 5, 7, 1, p, F32) };
    check(patch_tokens(&memory, &d, latents, inpaint));
}

static void op_unpatchify(void)
{
    int64_t p = whole("patch"), f = whole("frames"), h = whole("height"), w = whole("width");
    dit d = { .config = { .patch_size = p, .out_channels = 4 }, .proj_out = dense("", p * p * 4, 8, BF16) };
    tensor x = drawn("x", SHAPE(f * (h / p) * (w / p), 8), AS_IS, 1.0 / 64), y = tensor_new(&memory, SHAPE(1, f, h, w, 4));
    project_out(&(call_state){ .a = &memory, .d = &d, .rows = 1 }, y, x);
    check_video(tensor_view(y, SHAPE(f, h, w, 4)));
}

/* ---------------------------------------------------------------- norms */

/* mean + step * (-spread .. spread), which every type holds exactly. */
static tensor near(shape s, layout order)
{
    int64_t n = (int64_t)shape_count(s), spread = whole("spread");
    double *values = allocate((size_t)n, sizeof *values);
    for (int64_t i = 0; i < n; i++)
        values[i] = value("mean") + value("step") * (double)((int64_t)(bits_of("x", i) % (uint64_t)(2 * spread + 1)) - spread);
    return stored("x", s, order, values);
}

static void op_layer_norm(void)
{
    tensor x = near(SHAPE(whole("rows"), whole("width")), AS_IS);
    layer_norm(&memory, x, x, whole("affine") ? affine("", whole("width"), type_of()) : (layer){ 0 }, value("eps"));
    check(x);
}

static void op_group_norm(void)
{
    tensor x = near(SHAPE(whole("channels"), whole("frames"), whole("height"), whole("width")), CHANNELS_FIRST);
    group_norm(&memory, x, x, whole("groups"), whole("per_frame") ? 1 : x.dim[0], affine("", x.dim[3], F32), whole("silu"));
    check_video(x);
}

static void op_head_norm_rotary(void)
{
    int64_t h = whole("height"), w = whole("width"), heads = whole("heads"), head_size = whole("head");
    tensor x = drawn("x", SHAPE(whole("frames") * h * w, heads * head_size), AS_IS, value("step"));
    layer l = affine("", head_size, F32);
    const dit_config c = { .attention_head_dim = head_size, .patch_size = 2 };
    double *table = whole("turn") ? rotary_table(&memory, &c, h, w) : NULL;
    if (table) {                                /* the kernel's table in the bits that the file has */
        tensor rounded = stored("table", SHAPE(h * w, head_size / 2, 2), AS_IS, table);
        for (int64_t i = 0; i < tensor_count(rounded); i++)
            table[i] = (double)rounded.data[i];
    }
    head_norm_rotary(&memory, x, heads, l, 1e-6, table, h * w);
    check(x);
}

/* ---------------------------------------------------------------- attention */

/* Four queries of +-16, 21 keys from -10 to 10 (low: -10 to -9.5), heads of 4 of which one number counts: logit 16 k / 2. */
static void attend_extremes(void)
{
    double q[4 * 4] = { 0 }, k[21 * 4] = { 0 };
    bool low = whole("low");
    for (int n = 0; n < 4; n++)
        q[4 * n] = !low && n % 2 ? -16 : 16;
    for (int n = 0; n < 21; n++)
        k[4 * n] = low ? -10 + 0.0625 * (n % 9) : n - 10;
    tensor y = empty(4, 4), queries = stored("q", SHAPE(4, 4), AS_IS, q), keys = stored("k", SHAPE(21, 4), AS_IS, k);
    attention(&memory, y, queries, keys, drawn("v", SHAPE(21, 4), AS_IS, 1.0 / 64), 1, 1);
    check(y);
}

static void op_attention(void)
{
    if (!strcmp(name, "logits-80") || !strcmp(name, "all-low")) {
        attend_extremes();
        return;
    }
    int64_t s = whole("sequences"), heads = whole("heads"), width = heads * whole("head"), nq = s * whole("queries"), nk = s * whole("keys");
    tensor q = drawn("q", SHAPE(nq, width), AS_IS, value("q")), k = drawn("k", SHAPE(nk, width), AS_IS, value("k"));
    tensor v = drawn("v", SHAPE(nk, width), AS_IS, 1.0 / 64), y = empty(nq, width);
    attention(&memory, y, q, k, v, s, heads);
    check(y);
}

/* softmax alone, through attention: q k / sqrt(16) is x, and v the unit matrix. Rows are a ramp and its mirror image, or random. */
static void op_softmax(void)
{
    enum { N = 16, ROWS = 2 };
    double values[ROWS * N];
    for (int n = 0; n < ROWS * N; n++)
        values[n] = strcmp(name, "random") ? value("first") + value("step") * (n < N ? n : 2 * N - 1 - n) : draw("x", n, 1.0 / 32);
    tensor x = stored("x", SHAPE(ROWS, N), AS_IS, values), y = empty(ROWS, N), q = empty(1, N), k = empty(N, N), v = empty(N, N);
    tensor_fill(q, 0), tensor_fill(k, 0), tensor_fill(v, 0);
    q.data[0] = 4;
    for (int r = 0; r < ROWS; r++) {
        for (int n = 0; n < N; n++)
            k.data[n * N] = x.data[r * N + n], v.data[n * N + n] = 1;
        attention(&memory, tensor_part(y, r, 1), q, k, v, 1, 1);
    }
    check(y);
}

static void op_temporal(void)
{
    shape s = SHAPE(whole("frames"), whole("head"));
    tensor q = drawn("q", s, AS_IS, value("step")), k = drawn("k", s, AS_IS, value("step"));
    check_number(temporal_attention(q.data, k.data, s.dim[0], s.dim[1], s.dim[1]));
}

/* ---------------------------------------------------------------- activations */

static void activation_case(activation f)
{
    double values[129];
    for (int i = 0; i < COUNT(values); i++)
        values[i] = value("first") + value("step") * i;
    tensor x = stored("x", SHAPE(COUNT(values)), AS_IS, values);
    activate(x, f);
    check(x);
}
static void op_silu(void) { activation_case(SILU); }
static void op_gelu_tanh(void) { activation_case(GELU_TANH); }
static void op_gelu_erf(void) { activation_case(GELU_ERF); }
static void op_quick_gelu(void) { activation_case(QUICK_GELU); }

static void op_gate_gelu(void)
{
    tensor x = drawn("x", SHAPE(4, 2 * 12), AS_IS, value("step")), y = empty(4, 12);
    gate_gelu(y, x);
    check(y);
}

/* ---------------------------------------------------------------- tables and embeddings */

static void op_timestep(void)
{
    double t = value("value");
    stored("t", SHAPE(1), AS_IS, &t);
    tensor y = tensor_new(&memory, SHAPE(SINUSOIDS));
    sinusoids(t, y.data);
    check(y);
}

static void op_time_table(void)
{
    const block_weights none = { .t_embed = { 0 } };
    tensor y = empty(whole("frames"), whole("width"));
    for (int64_t f = 0; f < y.dim[0]; f++)
        time_row(&none, whole("first") + f, y.dim[1], y.data + f * y.dim[1]);
    check(y);
}

static void op_rotary_table(void)
{
    const dit_config c = { .attention_head_dim = whole("head"), .patch_size = whole("patch") };
    const double *table = rotary_table(&memory, &c, whole("height"), whole("width"));
    tensor y = tensor_new(&memory, SHAPE(whole("height") * whole("width"), whole("head") / 2, 2));
    for (int64_t k = 0; k < tensor_count(y); k++)
        y.data[k] = (real)table[k];
    check(y);
}

static void op_position_resize(void)
{
    int64_t n = whole("from"), m = whole("to");
    tensor y = empty(m * m, 4);
    resize_positions(y, drawn("x", SHAPE(n * n, 4), AS_IS, 1.0 / 64), n, m);
    check(y);
}

/* ---------------------------------------------------------------- parts of the DiT */

static void op_modulate(void)
{
    int64_t rows = whole("rows");
    dit d = { .norm_out = dense("", 24, 12, F32) };
    call_state c = { .a = &memory, .d = &d, .rows = rows, .silu_temb = drawn("s", SHAPE(rows, 12), AS_IS, 1.0 / 64) };
    tensor x = drawn("x", SHAPE(rows * 3, 12), AS_IS, value("step"));
    norm_out(&c, x);
    check(x);
}

static void op_shifted_norm(void)
{
    int64_t rows = whole("rows");
    tensor s = drawn("s", SHAPE(rows, 12), AS_IS, 1.0 / 64), x = drawn("x", SHAPE(rows * 3, 12), AS_IS, value("step")), y = empty(rows * 3, 12);
    const block_weights b = { .norm1_norm = affine("norm.", 12, F32), .norm1_linear = dense("linear.", 12, 12, BF16) };
    shifted_norm(&memory, y, x, &b, s);
    check(y);
}

static void op_skip(void)
{
    tensor x = drawn("x", SHAPE(3, 8), AS_IS, value("step")), skip = drawn("skip", SHAPE(3, 8), AS_IS, value("step"));
    const block_weights b = { .skip_norm = affine("norm.", 16, F32), .skip_linear = dense("linear.", 8, 16, F16) };
    merge_skip(&memory, x, skip, &b);
    check(x);
}

static void op_gate(void)
{
    tensor x = drawn("x", SHAPE(3, 20), AS_IS, value("step"));
    const block_weights b = { .gate_norm = affine("norm.", 20, F32), .gate_proj = dense("proj.", 40, 20, F32), .norm_clip_out = affine("norm_out.", 20, F32) };
    gate(&memory, x, &b);
    check(x);
}

static void op_feed_forward(void)
{
    tensor x = drawn("x", SHAPE(3, 12), AS_IS, 1.0 / 32);
    const block_weights b = { .ff_proj = dense("proj.", 53, 12, F32), .ff_out = dense("out.", 12, 53, F32) };
    feed_forward(&memory, x, &b);
    check(x);
}

static void op_embedder(void)
{
    tensor x = drawn("x", SHAPE(2, 16), AS_IS, 1.0 / 64);
    layer first = dense("linear_1.", 24, 16, F32);
    check(two_layers(&memory, x, first, SILU, dense("linear_2.", 8, 24, BF16)));
}

static void op_pool(void)
{
    dit d = { .config = { .pooled_projection_dim = 6 }, .pool_positions = parameter("positions", SHAPE(6, 16), F32, 1.0 / 256),
              .pool_q = dense("q.", 16, 16, F32), .pool_k = dense("k.", 16, 16, F32), .pool_v = dense("v.", 16, 16, F32), .pool_c = dense("c.", 6, 16, F32) };
    check(pool(&memory, &d, drawn("x", SHAPE(5, 16), AS_IS, 1.0 / 64)));
}

static void op_resampler(void)
{
    int64_t patches = whole("patches"), width = whole("width"), x = 8;
    tensor tokens = drawn("x", SHAPE(patches, width), AS_IS, 1.0 / 64), y = empty(4, x);
    dit d = { .config = { .cross_attention_dim = x, .n_query = 4, .num_attention_heads = whole("heads") },
              .query = parameter("query", SHAPE(4, x), F32, 1.0 / 64), .positions = parameter("positions", SHAPE(4, x), F32, 1.0 / 128),
              .ln_q = affine("ln_q.", x, F32), .ln_kv = affine("ln_kv.", x, F32), .in_proj_weight = parameter("in_proj.weight", SHAPE(3 * x, x), F32, 1.0 / 256),
              .in_proj_bias = parameter("in_proj.bias", SHAPE(3 * x), F32, 1.0 / 64), .out_proj = dense("out_proj.", x, x, F32) };
    if (width != x)
        d.kv_proj = parameter("kv_proj.weight", SHAPE(x, width), F32, 1.0 / 256);
    resample(&memory, &d, y, tokens);
    check(y);
}

static void op_tea(void)
{
    double values[48];
    tensor last = drawn("last", SHAPE(48), AS_IS, 1.0 / 64);
    for (int k = 0; k < 48; k++)
        values[k] = draw("last", k, 1.0 / 64) + draw("now", k, value("step"));
    check_number(tea_change(stored("now", SHAPE(48), AS_IS, values), last));
}

/* ---------------------------------------------------------------- parts of the VAE */

static void op_resblock(void)
{
    int64_t cin = whole("in"), cout = whole("out");
    const vae_config c = { .norm_num_groups = whole("groups"), .spatial_group_norm = whole("per_frame") };
    tensor x = drawn("x", SHAPE(cin, 3, 3, 2), CHANNELS_FIRST, 1.0 / 64);
    pass p = { .a = &memory, .c = &c, .time = mode_of(), .floor = arena_mark(&memory) };
    resblock b = { .norm1 = affine("norm1.", cin, F32), .conv1 = kernel("conv1.", cout, cin, 3, 3, F32),
                   .norm2 = affine("norm2.", cout, F32), .conv2 = kernel("conv2.", cout, cout, 3, 3, F32) };
    if (cin != cout)
        b.shortcut = dense("shortcut.", cout, cin, F32);
    check_video(residual(&p, x, &b));
}

static void op_mid_attention(void)
{
    const vae_config c = { .norm_num_groups = whole("groups"), .mid_block_num_attention_heads = whole("heads") };
    pass p = { .a = &memory, .c = &c };
    tensor x = drawn("x", SHAPE(8, 3, 2, 2), CHANNELS_FIRST, 1.0 / 64);
    const attention_weights b = { affine("group_norm.", 8, F32), dense("to_q.", 8, 8, F32), dense("to_k.", 8, 8, F32), dense("to_v.", 8, 8, F32), dense("to_out.", 8, 8, F32) };
    if (!strcmp(name, "temporal"))
        mid_attend_temporal(&p, x, &b);
    else
        mid_attend(&p, x, &b, strcmp(name, "3d") ? 1 : x.dim[0]);
    check_video(x);
}

static void op_upsample(void)
{
    const vae_config c = { .spatial_group_norm = whole("nearest") };
    tensor x = drawn("x", SHAPE(3, whole("frames"), 2, 3), CHANNELS_FIRST, 1.0 / 64);
    layer l = kernel("", 3, 3, 3, 3, F32);
    pass p = { .a = &memory, .c = &c, .time = mode_of(), .floor = arena_mark(&memory) };
    check_video(upsample(&p, x, l, whole("time")));
}

static void op_tiles(void)
{
    int64_t h = whole("height"), w = whole("width");
    bool corner = is("axis", "corner"), rows = is("axis", "rows");
    tensor x = drawn("x", corner ? SHAPE(2, 2, 6, 7) : SHAPE(2, 2, h, w), CHANNELS_FIRST, 1.0 / 64);
    if (corner)
        overlay_corner(x, drawn("corner", SHAPE(2, 2, h, w), CHANNELS_FIRST, 1.0 / 64));
    else
        blend(x, drawn(rows ? "above" : "left", rows ? SHAPE(2, 2, 6, w) : SHAPE(2, 2, h, 6), CHANNELS_FIRST, 1.0 / 64), whole("extent"), rows);
    check_video(x);
}

/* ---------------------------------------------------------------- the pipeline's small parts */

static void op_posterior(void)
{
    enum { Z = 3, F = 2, H = 2, W = 3, COUNT_ = Z * F * H * W };
    double values[2 * COUNT_], noise[COUNT_];
    float draws[COUNT_];
    for (int k = 0; k < 2 * COUNT_; k++)
        values[k] = k < COUNT_ ? draw("x", k, value("mean_step")) : value("mean") + draw("x", k, value("step"));
    generator g = { .next = 624 };
    generator_seed(&g, (rng){ 0 }, (uint64_t)whole("seed"));
    generator_randn(&g, draws, COUNT_);
    for (int k = 0; k < COUNT_; k++)
        noise[k] = (double)draws[k];
    stored("noise", SHAPE(Z, F, H, W), AS_IS, noise);
    generator_seed(&g, (rng){ 0 }, (uint64_t)whole("seed"));
    check_video(sample_posterior(&memory, stored("x", SHAPE(2 * Z, F, H, W), CHANNELS_FIRST, values), &g, value("scaling_factor")));
}

static void op_guidance(void)
{
    int64_t rows = whole("rows"), z = whole("channels");
    tensor out = tensor_new(&memory, SHAPE(rows, 2, 2, 3, 2 * z)), pred = tensor_new(&memory, SHAPE(2, 2, 3, z));
    for (int64_t r = 0; r < rows; r++)
        tensor_copy(tensor_part(out, r, 1), drawn(r + 1 < rows ? "negative" : "positive", SHAPE(2 * z, 2, 2, 3), CHANNELS_FIRST, 1.0 / 64));
    guide(pred, out, value("cfg"));
    check_video(pred);
}

/* A whole run of a scheduler on given model outputs: y[i] is the sample after call i, input[i] what call i is given. */
static void op_schedule(void)
{
    enum { N = 8 };
    const sched_config c = {
        .type = (sched_type)place_of(word("scheduler"), sched_names, SCHEDULERS), .num_train_timesteps = whole("num_train_timesteps"),
        .steps_offset = whole("steps_offset"), .beta_start = value("beta_start"), .beta_end = value("beta_end"), .beta_schedule = word("beta_schedule"),
        .prediction_type = (prediction)place_of(word("prediction_type"), predictions, 3), .timestep_spacing = (spacing)place_of(word("timestep_spacing"), spacings, 3),
        .set_alpha_to_one = whole("set_alpha_to_one"), .clip_sample = whole("clip_sample"), .clip_sample_range = value("clip_sample_range") };
    scheduler s = sched_new(&memory, c, whole("steps"), SHAPE(1, N));
    tensor x = drawn("x", SHAPE(1, N), AS_IS, 1.0 / 64), v = drawn("v", SHAPE(s.calls, N), AS_IS, 1.0 / 64), noise = { 0 };
    tensor input = empty(s.calls, N), y = empty(s.calls, N), t = tensor_new(&memory, SHAPE(s.calls)), sigma = tensor_new(&memory, SHAPE(1));
    if (c.type == EULER_A)
        noise = drawn("noise", SHAPE(s.calls, N), AS_IS, 1.0 / 64);
    for (int64_t k = 0; k < s.calls; k++) {
        t.data[k] = (real)s.timesteps[k];
        sched_input(&s, tensor_part(input, k, 1), x);
        sched_step(&s, x, tensor_part(v, k, 1), c.type == EULER_A ? tensor_part(noise, k, 1) : noise);
        tensor_copy(tensor_part(y, k, 1), x);
    }
    tensor_fill(sigma, (real)s.init_noise_sigma);
    result_as("timesteps", t, AS_IS), result_as("input", input, AS_IS), result_as("init_noise_sigma", sigma, AS_IS), check(y);
    sched_free(&s);
}

static void op_noise(void)
{
    int64_t counts[] = { whole("draw1"), whole("draw2"), whole("draw3") }, n = 0;
    float *draws = allocate(128, sizeof *draws);
    uint32_t *bits = allocate(128, sizeof *bits);
    generator g = { .next = 624 };
    generator_seed(&g, (rng){ 0 }, (uint64_t)whole("seed"));
    for (int k = 0; k < 3 && counts[k]; n += counts[k++])
        generator_randn(&g, draws + n, counts[k]);
    for (int64_t k = 0; k < n; k++)
        bits[k] = float_bits(draws[k]);
    enter(&outputs, "y", F32, SHAPE(n), draws);
    enter(&outputs, "bits", U32, SHAPE(n), bits);
}

/* ---------------------------------------------------------------- pictures */

/* An input picture of random bytes on so many levels, or (levels 0) the numbers 0 .. 255, each `repeat` times. */
static image picture(int64_t w, int64_t h, int levels, int repeat)
{
    image p = { w, h, allocate((size_t)(3 * w * h), 1) };
    for (int64_t i = 0; i < 3 * w * h; i++)
        p.rgb[i] = (unsigned char)(levels ? bits_of("x", i) % (uint64_t)levels * (uint64_t)(255 / (levels - 1)) : (uint64_t)(i / repeat));
    enter(&inputs, "x", U8, SHAPE(h, w, 3), p.rgb);
    return p;
}

static void op_picture_resize(void)
{
    image y = image_resize(picture(whole("from_width"), whole("from_height"), (int)whole("levels"), 1), whole("width"), whole("height"));
    enter(&outputs, "y", U8, SHAPE(y.h, y.w, 3), y.rgb);
}

static void op_clip_crop(void)
{
    const clip_config c = { .shortest_edge = whole("shortest_edge"), .crop_size = whole("crop_size") };
    image y = clip_preprocess(&c, picture(whole("from_width"), whole("from_height"), 256, 1));
    enter(&outputs, "y", U8, SHAPE(y.h, y.w, 3), y.rgb);
}

static void op_clip_pixels(void)
{
    clip_config c = { .image_size = 16, .rescale_factor = value("rescale_factor"), .image_mean = { value("mean0"), value("mean1"), value("mean2") },
                      .image_std = { value("std0"), value("std1"), value("std2") } };
    check_video(tensor_view(clip_pixels(&memory, &c, picture(16, 16, 0, 3)), SHAPE(16, 16, 3)));
}

static void op_pixels(void)
{
    static job j;
    j = (job){ .start = { picture(16, 16, 0, 1) }, .starts = 1, .frames = 1, .width = 16, .height = 16 };
    check_video(fill_pixels(&(run){ .arena = &memory }, &j));
}

static void op_bytes(void)
{
    enum { N = 254 };
    double values[N];
    for (int n = 0; n < N; n++)
        values[n] = (n + value("first")) / value("divisor") + value("offset");
    tensor x = stored("x", SHAPE(N), AS_IS, values);
    unsigned char *bytes = allocate(N, 1);
    to_unit(x);
    to_bytes(bytes, x);
    enter(&outputs, "y", U8, SHAPE(N), bytes);
}

/* ---------------------------------------------------------------- all of them */

#define OP(name) { #name, op_##name }
static const struct { const char *name; void (*run)(void); } operators[] = {
    OP(linear), OP(lora), OP(conv3d), OP(patch), OP(unpatchify), OP(layer_norm), OP(group_norm), OP(head_norm_rotary),
    OP(attention), OP(softmax), OP(temporal), OP(silu), OP(gelu_tanh), OP(gelu_erf), OP(quick_gelu), OP(gate_gelu),
    OP(timestep), OP(time_table), OP(rotary_table), OP(position_resize), OP(modulate), OP(shifted_norm), OP(skip), OP(gate),
    OP(feed_forward), OP(embedder), OP(pool), OP(resampler), OP(tea), OP(resblock), OP(mid_attention), OP(upsample),
    OP(tiles), OP(posterior), OP(guidance), { "ddim", op_schedule }, { "euler", op_schedule }, { "euler_a", op_schedule },
    { "dpmpp", op_schedule }, { "pndm", op_schedule }, OP(noise), OP(picture_resize), OP(clip_crop), OP(clip_pixels),
    OP(pixels), OP(bytes),
};

/* Reads KEY=VALUE words into settings; returns the case's JSON. */
static char *read_settings(char *parameters, const char *note)
{
    char *about = text_of("\"note\":\"%s\"", note);
    nsettings = 0;
    for (char *p = strtok(parameters, " "); p; p = strtok(NULL, " ")) {
        char *end, *text = strchr(p, '=');
        if (!text || nsettings == COUNT(settings))
            die(BAD_INPUT, "tests/ops_cases.tsv: %s %s: got %s, expected up to %d KEY=VALUE", op, name, p, COUNT(settings));
        *text++ = 0;
        snprintf(settings[nsettings].key, sizeof settings->key, "%s", p);
        snprintf(settings[nsettings++].value, sizeof settings->value, "%s", text);
        strtod(text, &end);
        append(&about, ",", *end ? "\"%s\":\"%s\"" : "\"%s\":%s", p, text);
    }
    return text_of("{%s}", about);
}

/* All cases of the operator under way; returns the inputs' metadata. */
static char *run_cases(void (*run)(void))
{
    char line[1024], *notes = text_of("\"operator\":\"%s\"", op);
    FILE *f = fopen("tests/ops_cases.tsv", "r");
    if (!f)
        die(BAD_INPUT, "tests/ops_cases.tsv: cannot be read; run this from the root of the repository");
    while (fgets(line, sizeof line, f)) {
        char *field[4] = { line, NULL, NULL, NULL };
        line[strcspn(line, "\n")] = 0;
        for (int i = 1; i < 4 && (field[i] = strchr(field[i - 1], '\t')); i++)
            *field[i]++ = 0;
        if (strcmp(field[0], op) != 0 || !field[3])
            continue;
        snprintf(name, sizeof name, "%s", field[1]);
        append(&notes, ",", "\"%s\":%s", name, quoted(read_settings(field[2], field[3])));
        run();
    }
    fclose(f);
    return notes;
}

/* The metadata of OP.safetensors: floors by class from the lines of FLOORS that begin with the operator. */
static char *floors_of(const char *path)
{
    static const char *const keys[] = { "floor.fp64", "floor", "floor.fp16", "floor.bf16" };
    char *maps[4] = { NULL }, *members = NULL, line[256], at[32], tensor_name[128], value[4][32];
    append(&members, ",", "\"operator\":\"%s\",\"origin\":\"float64 build\"", op);
    FILE *f = path ? fopen(path, "r") : NULL;
    if (path && !f)
        die(BAD_INPUT, "%s: cannot be read; give the file of floors", path);
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "%31s %127s %31s %31s %31s %31s", at, tensor_name, value[0], value[1], value[2], value[3]) == 6 && !strcmp(at, op))
            for (int i = 0; i < 4; i++)
                append(&maps[i], ",", "\"%s\":%s", tensor_name, value[i]);
    if (f)
        fclose(f);
    for (int i = 0; i < 4 && maps[i]; i++) {
        char *map = text_of("{%s}", maps[i]), *text = quoted(map);
        append(&members, ",", "\"%s\":%s", keys[i], text);
        free(map), free(text), free(maps[i]);
    }
    return members;
}

static void write_side(const char *folder, const char *ending, side *s, const char *members)
{
    char *path = text_of("%s/%s%s.safetensors", folder, op, ending);
    safetensors_write(path, s->list, s->count, true);
    set_metadata(path, members);
    free(path);
    *s = (side){ .count = 0 };
}

int main(int argc, char **argv)
{
    if (argc < 2)
        die(BAD_INPUT, "ops: got no folder, expected DIR [FLOORS]");
    for (int i = 0; i < COUNT(operators); i++) {
        snprintf(op, sizeof op, "%s", operators[i].name);
        memory = arena_new((size_t)1 << 22);
        char *notes = run_cases(operators[i].run);
        write_side(argv[1], ".inputs", &inputs, notes);
        write_side(argv[1], "", &outputs, floors_of(argc > 2 ? argv[2] : NULL));
        arena_free(&memory);
    }
    return DONE;
}
