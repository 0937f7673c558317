/* dit.c - the two transformers: CLIP's image tower, which looks at the first picture once, and the DiT
 * (HunyuanTransformer3DModel), which removes a step's noise.
 *
 *     CLIP      [S][S][3]     patch embedding, class token, positions, pre_layrnorm
 *               [1 + patches][width]   num_hidden_layers x { attention, MLP }, each behind a LayerNorm, added
 *               [patches][width]       the last layer's tokens; post_layernorm and projection are not used
 *
 *     DiT       [F][h][w][3Z]  latents, mask latents, masked latents; patch embedding, no position table
 *               [N][D]         blocks 0 .. L-1, for every guidance row; outputs of the first half return in the second
 *               [N][D]         norm_out: LayerNorm, scaled and shifted by the timestep
 *               [F][h][w][2Z]  proj_out, unpatchify; the first Z channels are the prediction
 *
 *     a block   h = skip_linear(skip_norm([h, skip]))                       only i > L/2
 *               h += time table[frame]                                      only F > 1, and it stays
 *               h += attn1(norm1(h) + shift(t))                             all N tokens see each other, rotary positions
 *               h += attn2(norm2(h), text)                                  keys and values from the control embeddings
 *               h += norm_clip_out(gate(attn_clip(norm_clip(h), image)))    keys and values from the picture
 *               h += ff(norm3(h))
 *
 * Invariants: a row of the batch never looks at another, so rows are run one after the other unless something wants to
 * see them together (dumps, Enhance-A-Video); the numbers are the same. Nothing of size N x N exists. Per-token layers
 * that widen the stream run in pieces of TOKENS tokens.
 *
 * Mirrors: transformers CLIPVisionModelWithProjection; ruyi/models/transformer3d.py, attention.py (HunyuanDiTBlock),
 * attention_processor.py, embeddings.py, norm.py, resampler.py of the public code.
 */
#include "ruyi.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS = 1024 };         /* tokens in a piece of a widening layer */

static tensor like(arena *a, tensor x) { return tensor_new(a, x.ndim == 2 ? SHAPE(x.dim[0], x.dim[1]) : SHAPE(x.dim[0], x.dim[1], x.dim[2])); }

/* A parameter as a tensor of that shape. */
static tensor widened(arena *a, weight w, shape s)
{
    tensor x = tensor_new(a, s);
    size_t mark = arena_mark(a);
    const real *from = weight_vector(a, w);
    if (x.data)
        memcpy(x.data, from, (size_t)tensor_count(x) * sizeof(real));
    arena_reset(a, mark);
    return x;
}

static void copy_rows(tensor to, int64_t first, tensor from) { tensor_copy(tensor_part(to, first, from.dim[0]), from); }

/* ---------------------------------------------------------------- CLIP image tower */

typedef struct { layer layer_norm1, q_proj, k_proj, v_proj, out_proj, layer_norm2, fc1, fc2; } clip_layer;

struct clip {
    clip_config config;
    weights *weights;
    weight class_embedding, position_embedding;
    layer patch_embedding, pre_layrnorm;    /* that spelling is the checkpoint's */
    clip_layer *layers;
};

const clip_config *clip_settings(const clip *c) { return &c->config; }
const weights *clip_weights(const clip *c) { return c->weights; }

/* size and crop_size: {"shortest_edge": n}, {"height": n, "width": n}, or n. */
static int64_t read_side(config f, const char *field, const char *member, int64_t otherwise)
{
    json value = config_member(f, field);
    if (json_kind(value) != '{')
        return config_int(f, field, otherwise, 1, 65536);
    config inner = { f.path, NULL, value, f.read };
    if (!strcmp(member, "height") && config_int(inner, "height", REQUIRED, 1, 65536) != config_int(inner, "width", REQUIRED, 1, 65536))
        config_refuse(f, field, "expected the same height and width");
    return config_int(inner, member, REQUIRED, 1, 65536);
}

static void read_numbers(config f, const char *field, const double otherwise[3], double out[3])
{
    json list = config_member(f, field), cursor = { 0 }, value;
    int n = 0;
    memcpy(out, otherwise, 3 * sizeof *out);
    if (json_kind(list) == 0)
        return;
    while (json_kind(list) == '[' && json_next(list, &cursor, NULL, &value) && json_kind(value) == '0' && n < 4)
        out[n < 3 ? n : 2] = json_number(value), n++;
    if (n != 3)
        config_refuse(f, field, "expected a list of three numbers, one for each colour");
}

static void read_preprocessor(const char *folder, clip_config *c)
{
    static const double mean[3] = { 0.48145466, 0.4578275, 0.40821073 }, std[3] = { 0.26862954, 0.26130258, 0.27577711 };
    static const char *const steps[] = { "do_resize", "do_center_crop", "do_rescale", "do_normalize" };
    config f = c->preprocessor = config_open(folder, "preprocessor_config.json");
    for (int i = 0; i < 4; i++)
        if (!config_bool(f, steps[i], true))
            config_refuse(f, steps[i], "expected true: a picture is always resized, cropped, rescaled and normalised");
    if (config_int(f, "resample", 3, 0, 5) != 3)
        config_refuse(f, "resample", "expected 3, bicubic; nothing else is supported");
    c->shortest_edge = read_side(f, "size", "shortest_edge", 224);
    c->crop_size = read_side(f, "crop_size", "height", 224);
    c->rescale_factor = config_real(f, "rescale_factor", 1.0 / 255);
    read_numbers(f, "image_mean", mean, c->image_mean);
    read_numbers(f, "image_std", std, c->image_std);
    for (int i = 0; i < 3; i++)
        if (!(c->image_std[i] > 0))
            config_refuse(f, "image_std", "expected positive numbers");
    if (c->crop_size != c->image_size)
        config_refuse(f, "crop_size", "expected the tower's image_size %lld", (long long)c->image_size);
    if (c->shortest_edge < c->crop_size)
        config_refuse(f, "size", "expected a shortest edge of at least crop_size %lld", (long long)c->crop_size);
}

static clip_config read_clip_config(const char *folder)
{
    config f = config_open(folder, "config.json");
    if (json_kind(json_member(f.root, "vision_config")) == '{')     /* the configuration of a whole CLIP model */
        f.root = json_member(f.root, "vision_config");
    clip_config c = {
        .file = f, .hidden_size = config_int(f, "hidden_size", 768, 1, 1 << 20),
        .intermediate_size = config_int(f, "intermediate_size", 3072, 1, 1 << 22),
        .num_hidden_layers = config_int(f, "num_hidden_layers", 12, 1, 10000),
        .num_attention_heads = config_int(f, "num_attention_heads", 12, 1, 65536),
        .image_size = config_int(f, "image_size", 224, 1, 65536), .patch_size = config_int(f, "patch_size", 32, 1, 65536),
        .layer_norm_eps = config_real(f, "layer_norm_eps", 1e-5),
    };
    config_int(f, "num_channels", 3, 3, 3);
    char *act = config_word(f, "hidden_act", "quick_gelu");
    if (strcmp(act, "quick_gelu") && strcmp(act, "gelu"))
        config_refuse(f, "hidden_act", "expected quick_gelu or gelu");
    c.hidden_act = strcmp(act, "gelu") ? QUICK_GELU : GELU_ERF;
    free(act);
    if (c.hidden_size % c.num_attention_heads)
        config_refuse(f, "num_attention_heads", "expected a divisor of hidden_size %lld", (long long)c.hidden_size);
    if (c.patch_size > c.image_size)
        config_refuse(f, "patch_size", "expected at most image_size %lld", (long long)c.image_size);
    read_preprocessor(folder, &c);
    return c;
}

static int64_t clip_side(const clip_config *c) { return c->image_size / c->patch_size; }

/* NAME.weight [n][k] and .bias, where NAME is a layer's part: vision_model.encoder.layers.I.PART. */
static layer bind_clip_part(weights *w, int64_t i, const char *part, int64_t n, int64_t k)
{
    return bind_linear(w, n, k, "vision_model.encoder.layers.%lld.%s", (long long)i, part);
}

static void bind_clip_layer(weights *w, const clip_config *c, clip_layer *l, int64_t i)
{
    int64_t d = c->hidden_size, inner = c->intermediate_size;
    l->layer_norm1 = bind_norm(w, d, "vision_model.encoder.layers.%lld.layer_norm1", (long long)i);
    l->layer_norm2 = bind_norm(w, d, "vision_model.encoder.layers.%lld.layer_norm2", (long long)i);
    l->q_proj = bind_clip_part(w, i, "self_attn.q_proj", d, d);
    l->k_proj = bind_clip_part(w, i, "self_attn.k_proj", d, d);
    l->v_proj = bind_clip_part(w, i, "self_attn.v_proj", d, d);
    l->out_proj = bind_clip_part(w, i, "self_attn.out_proj", d, d);
    l->fc1 = bind_clip_part(w, i, "mlp.fc1", inner, d);
    l->fc2 = bind_clip_part(w, i, "mlp.fc2", d, inner);
}

/* Reads folder (a model's image_encoder/): two configurations and the weights. */
clip *clip_open(const char *folder, bool allow_unknown)
{
    clip *c = allocate(1, sizeof *c);
    c->config = read_clip_config(folder);
    weights *w = c->weights = weights_open(folder, "model");
    int64_t d = c->config.hidden_size, p = c->config.patch_size, patches = clip_side(&c->config) * clip_side(&c->config);
    c->class_embedding = bind(w, SHAPE(d), "vision_model.embeddings.class_embedding");
    c->position_embedding = bind(w, SHAPE(patches + 1, d), "vision_model.embeddings.position_embedding.weight");
    c->patch_embedding.weight = bind_conv(w, SHAPE(d, 3, p, p), "vision_model.embeddings.patch_embedding.weight");
    c->pre_layrnorm = bind_norm(w, d, "vision_model.pre_layrnorm");
    c->layers = allocate((size_t)c->config.num_hidden_layers, sizeof *c->layers);
    for (int64_t i = 0; i < c->config.num_hidden_layers; i++)
        bind_clip_layer(w, &c->config, &c->layers[i], i);
    weights_ignore(w, "vision_model.post_layernorm.*");
    weights_ignore(w, "visual_projection.weight");
    weights_ignore(w, "vision_model.embeddings.position_ids");
    weights_done(w, allow_unknown);
    return c;
}

/* Shortest edge to size, then the middle crop_size x crop_size; 8 bits. CLIPImageProcessor. Its caller frees rgb. */
image clip_preprocess(const clip_config *c, image picture)
{
    int64_t size = c->shortest_edge, crop = c->crop_size;
    bool wide = picture.w >= picture.h;
    image resized = wide ? image_resize(picture, size * picture.w / picture.h, size) : image_resize(picture, size, size * picture.h / picture.w);
    image out = { crop, crop, allocate((size_t)(3 * crop * crop), 1) };
    int64_t left = (resized.w - crop) / 2, top = (resized.h - crop) / 2;
    for (int64_t y = 0; y < crop; y++)
        memcpy(out.rgb + 3 * y * crop, resized.rgb + 3 * ((top + y) * resized.w + left), (size_t)(3 * crop));
    free(resized.rgb);
    return out;
}

/* [1 + patches][width]: class token, then patches row by row, with their positions; pre_layrnorm. */
static tensor clip_embed(const run *r, const clip *c, tensor pixels)
{
    arena *a = r->arena;
    int64_t side = clip_side(&c->config), p = c->config.patch_size, d = c->config.hidden_size, patches = side * side;
    tensor x = tensor_new(a, SHAPE(1 + patches, d));
    size_t mark = arena_mark(a);
    tensor grid = tensor_view(tensor_part(x, 1, patches), SHAPE(1, side, side, d));
    conv(a, grid, pixels, (conv_spec){ .kernel = { 1, p, p }, .stride = { 1, p, p }, .up = 1 }, c->patch_embedding);
    copy_rows(x, 0, widened(a, c->class_embedding, SHAPE(1, d)));
    add(x, widened(a, c->position_embedding, SHAPE(1 + patches, d)));
    arena_reset(a, mark);
    layer_norm(a, x, x, c->pre_layrnorm, c->config.layer_norm_eps);
    dump(r, x, AS_IS, "clip.embed");
    return x;
}

/* x += out_proj(attention(layer_norm1(x))); x += fc2(act(fc1(layer_norm2(x)))). */
static void clip_block(const run *r, const clip *c, tensor x, const clip_layer *l)
{
    arena *a = r->arena;
    size_t mark = arena_mark(a);
    tensor n = like(a, x);
    layer_norm(a, n, x, l->layer_norm1, c->config.layer_norm_eps);
    tensor q = linear(a, n, l->q_proj), k = linear(a, n, l->k_proj), v = linear(a, n, l->v_proj);
    attention(a, n, q, k, v, 1, c->config.num_attention_heads);
    linear_to(a, q, n, l->out_proj);
    add(x, q);
    layer_norm(a, n, x, l->layer_norm2, c->config.layer_norm_eps);
    tensor inner = linear(a, n, l->fc1);
    activate(inner, c->config.hidden_act);
    linear_to(a, q, inner, l->fc2);
    add(x, q);
    arena_reset(a, mark);
}

/* The picture as clip_preprocess leaves it -> [patches][hidden_size]: last_hidden_state[:, 1:]. */
tensor clip_encode(const run *r, const clip *c, image crop)
{
    arena *a = r->arena;
    const clip_config *s = &c->config;
    size_t mark = arena_mark(a);
    tensor pixels = tensor_new(a, SHAPE(1, s->image_size, s->image_size, 3));
    for (int64_t i = 0; i < tensor_count(pixels) && pixels.data; i++)
        pixels.data[i] = (real)((crop.rgb[i] * s->rescale_factor - s->image_mean[i % 3]) / s->image_std[i % 3]);
    dump(r, tensor_view(pixels, SHAPE(s->image_size, s->image_size, 3)), CHANNELS_FIRST, "clip.pixels");
    tensor x = clip_embed(r, c, pixels);
    for (int64_t i = 0; i < s->num_hidden_layers; i++) {
        clip_block(r, c, x, &c->layers[i]);
        dump(r, x, AS_IS, "clip.layer.%02d", (int)i);
        progress(r, "clip", i + 1, s->num_hidden_layers);
    }
    x = arena_return(a, mark, tensor_part(x, 1, x.dim[0] - 1));
    dump(r, x, AS_IS, "clip.hidden");
    return x;
}

/* ---------------------------------------------------------------- DiT: configuration and weights */

typedef struct { layer to_q, to_k, to_v, to_out, norm_q, norm_k; } attention_layer;

typedef struct {                /* blocks.N: HunyuanDiTBlock */
    layer skip_norm, skip_linear;           /* absent in the first half */
    weight t_embed;                         /* [1][512][D], absent: computed */
    layer norm1_norm, norm1_linear, norm2, norm_clip, norm3;
    attention_layer attn1, attn2, attn_clip;
    layer gate_norm, gate_proj, norm_clip_out;
    layer ff_proj, ff_out;
} block_weights;

struct dit {
    dit_config config;
    weights *weights;
    layer patch;                            /* pos_embed.proj */
    layer timestep_1, timestep_2, extra_1, extra_2, text_1, text_2;
    layer pool_q, pool_k, pool_v, pool_c;
    weight pool_positions, style, text_padding, clip_padding;
    weight query, positions, kv_proj, in_proj_weight, in_proj_bias;
    layer ln_q, ln_kv, out_proj;            /* the Resampler, clip_projection */
    layer norm_out, proj_out;
    block_weights *blocks;
};

const dit_config *dit_settings(const dit *d) { return &d->config; }
const weights *dit_weights(const dit *d) { return d->weights; }

enum { TIME_ROWS = 512, SINUSOIDS = 256, POOL_HEADS = 8 };

static int64_t square_root(int64_t n)
{
    int64_t s = (int64_t)(sqrt((double)n) + 0.5);
    return s * s == n ? s : -1;
}

static void check_dit_config(config f, const dit_config *c, int64_t stated_size)
{
    if (c->hidden_size != stated_size)
        config_refuse(f, "hidden_size", "expected num_attention_heads * attention_head_dim = %lld * %lld",
                      (long long)c->num_attention_heads, (long long)c->attention_head_dim);
    if (c->attention_head_dim % 4)
        config_refuse(f, "attention_head_dim", "expected a multiple of 4: rotary pairs for x and for y");
    if (c->num_layers % 2)
        config_refuse(f, "num_layers", "expected an even number: every skip has one block to come from");
    if (square_root(c->n_query) < 0)
        config_refuse(f, "n_query", "expected a square");
    if (c->cross_attention_dim % c->num_attention_heads)
        config_refuse(f, "cross_attention_dim", "expected a multiple of num_attention_heads %lld, the Resampler's heads",
                      (long long)c->num_attention_heads);
    if (c->cross_attention_dim_t5 % POOL_HEADS)
        config_refuse(f, "cross_attention_dim_t5", "expected a multiple of %d, the pooler's heads", POOL_HEADS);
}

static dit_config read_dit_config(const char *folder)
{
    config f = config_open(folder, "config.json");
    dit_config c = {
        .file = f, .num_attention_heads = config_int(f, "num_attention_heads", 16, 1, 65536),
        .attention_head_dim = config_int(f, "attention_head_dim", 88, 1, 65536),
        .num_layers = config_int(f, "num_layers", 28, 2, 10000),
        .patch_size = config_int(f, "patch_size", REQUIRED, 1, 64),
        .in_channels = config_int(f, "in_channels", REQUIRED, 48, 48),      /* the pipeline insists: 16 + 16 + 16 */
        .out_channels = config_int(f, "out_channels", REQUIRED, 32, 32),    /* of which the first half is the prediction */
        .cross_attention_dim = config_int(f, "cross_attention_dim", 1024, 1, 1 << 20),
        .cross_attention_dim_t5 = config_int(f, "cross_attention_dim_t5", 2048, 1, 1 << 20),
        .pooled_projection_dim = config_int(f, "pooled_projection_dim", 1024, 1, 1 << 20),
        .text_len = config_int(f, "text_len", 77, 1, 1 << 20), .text_len_t5 = config_int(f, "text_len_t5", 256, 1, 1 << 20),
        .n_query = config_int(f, "n_query", 16, 1, 1 << 20), .projection_dim = config_int(f, "projection_dim", 768, 1, 1 << 20),
    };
    double ratio = config_real(f, "mlp_ratio", 4.0);
    c.hidden_size = c.num_attention_heads * c.attention_head_dim;
    if (!(ratio > 0 && ratio < 1000) || (double)c.hidden_size * ratio < 1)
        config_refuse(f, "mlp_ratio", "expected a positive ratio");
    c.inner = (int64_t)((double)c.hidden_size * ratio);
    char *act = config_word(f, "activation_fn", "gelu-approximate");
    if (strcmp(act, "gelu-approximate"))
        config_refuse(f, "activation_fn", "expected gelu-approximate; nothing else is supported");
    free(act);
    check_dit_config(f, &c, config_int(f, "hidden_size", 1152, 1, 1 << 20));
    return c;
}

/* blocks.I.NAME: queries from the stream, keys and values from `source` columns. */
static attention_layer bind_attention(weights *w, const dit_config *c, int64_t i, const char *name, int64_t source)
{
    int64_t d = c->hidden_size, head = c->attention_head_dim;
    long long n = (long long)i;
    return (attention_layer){
        .to_q = bind_linear(w, d, d, "blocks.%lld.%s.to_q", n, name),
        .to_k = bind_linear(w, d, source, "blocks.%lld.%s.to_k", n, name),
        .to_v = bind_linear(w, d, source, "blocks.%lld.%s.to_v", n, name),
        .to_out = bind_linear(w, d, d, "blocks.%lld.%s.to_out.0", n, name),
        .norm_q = bind_norm(w, head, "blocks.%lld.%s.norm_q", n, name),
        .norm_k = bind_norm(w, head, "blocks.%lld.%s.norm_k", n, name),
    };
}

static void bind_block(weights *w, const dit_config *c, block_weights *b, int64_t i)
{
    int64_t d = c->hidden_size, x = c->cross_attention_dim;
    long long n = (long long)i;
    if (i > c->num_layers / 2) {
        b->skip_norm = bind_norm(w, 2 * d, "blocks.%lld.skip_norm", n);
        b->skip_linear = bind_linear(w, d, 2 * d, "blocks.%lld.skip_linear", n);
    }
    char *table = text_of("blocks.%lld.t_embed.pe", n);
    if (weights_has(w, table))
        b->t_embed = bind(w, SHAPE(1, TIME_ROWS, d), "%s", table);
    free(table);
    b->norm1_norm = bind_norm(w, d, "blocks.%lld.norm1.norm", n);
    b->norm1_linear = bind_linear(w, d, d, "blocks.%lld.norm1.linear", n);
    b->attn1 = bind_attention(w, c, i, "attn1", d);
    b->norm2 = bind_norm(w, d, "blocks.%lld.norm2", n);
    b->attn2 = bind_attention(w, c, i, "attn2", x);
    b->norm_clip = bind_norm(w, d, "blocks.%lld.norm_clip", n);
    b->attn_clip = bind_attention(w, c, i, "attn_clip", x);
    b->gate_norm = bind_norm(w, d, "blocks.%lld.gate_clip.norm", n);
    b->gate_proj = bind_linear(w, 2 * d, d, "blocks.%lld.gate_clip.proj", n);
    b->norm_clip_out = bind_norm(w, d, "blocks.%lld.norm_clip_out", n);
    b->norm3 = bind_norm(w, d, "blocks.%lld.norm3", n);
    b->ff_proj = bind_linear(w, c->inner, d, "blocks.%lld.ff.net.0.proj", n);
    b->ff_out = bind_linear(w, d, c->inner, "blocks.%lld.ff.net.2", n);
}

/* time_extra_emb, text_embedder and what they need. */
static void bind_conditions(weights *w, const dit_config *c, dit *d)
{
    int64_t size = c->hidden_size, t5 = c->cross_attention_dim_t5, x = c->cross_attention_dim, pooled = c->pooled_projection_dim;
    d->timestep_1 = bind_linear(w, size, SINUSOIDS, "time_extra_emb.timestep_embedder.linear_1");
    d->timestep_2 = bind_linear(w, size, size, "time_extra_emb.timestep_embedder.linear_2");
    d->pool_positions = bind(w, SHAPE(c->text_len_t5 + 1, t5), "time_extra_emb.pooler.positional_embedding");
    d->pool_q = bind_linear(w, t5, t5, "time_extra_emb.pooler.q_proj");
    d->pool_k = bind_linear(w, t5, t5, "time_extra_emb.pooler.k_proj");
    d->pool_v = bind_linear(w, t5, t5, "time_extra_emb.pooler.v_proj");
    d->pool_c = bind_linear(w, pooled, t5, "time_extra_emb.pooler.c_proj");
    d->style = bind(w, SHAPE(1, size), "time_extra_emb.style_embedder.weight");
    d->extra_1 = bind_linear(w, 4 * size, 6 * SINUSOIDS + size + pooled, "time_extra_emb.extra_embedder.linear_1");
    d->extra_2 = bind_linear(w, size, 4 * size, "time_extra_emb.extra_embedder.linear_2");
    d->text_1 = bind_linear(w, 4 * t5, t5, "text_embedder.linear_1");
    d->text_2 = bind_linear(w, x, 4 * t5, "text_embedder.linear_2");
    d->text_padding = bind(w, SHAPE(c->text_len + c->text_len_t5, x), "text_embedding_padding");
}

static void bind_resampler(weights *w, const dit_config *c, dit *d)
{
    int64_t x = c->cross_attention_dim;
    d->clip_padding = bind(w, SHAPE(c->n_query, x), "clip_padding");
    d->query = bind(w, SHAPE(c->n_query, x), "clip_projection.query");
    d->positions = bind(w, SHAPE(c->n_query, x), "clip_projection.pos_embed");
    if (c->projection_dim != x)
        d->kv_proj = bind(w, SHAPE(x, c->projection_dim), "clip_projection.kv_proj.weight");
    d->ln_q = bind_norm(w, x, "clip_projection.ln_q");
    d->ln_kv = bind_norm(w, x, "clip_projection.ln_kv");
    d->in_proj_weight = bind(w, SHAPE(3 * x, x), "clip_projection.attn.in_proj_weight");
    d->in_proj_bias = bind(w, SHAPE(3 * x), "clip_projection.attn.in_proj_bias");
    d->out_proj = bind_linear(w, x, x, "clip_projection.attn.out_proj");
}

/* Reads folder (a model's transformer/), with low-rank updates. */
dit *dit_open(const char *folder, const safetensors *const *loras, const double *scales, int nloras, bool allow_unknown)
{
    dit *d = allocate(1, sizeof *d);
    const dit_config *c = &d->config;
    d->config = read_dit_config(folder);
    weights *w = d->weights = weights_open(folder, "diffusion_pytorch_model");
    weights_add_loras(w, loras, scales, nloras);
    int64_t p = c->patch_size, size = c->hidden_size;
    d->patch = bind_convolution(w, SHAPE(size, c->in_channels, p, p), "pos_embed.proj");
    bind_conditions(w, c, d);
    bind_resampler(w, c, d);
    d->blocks = allocate((size_t)c->num_layers, sizeof *d->blocks);
    for (int64_t i = 0; i < c->num_layers; i++)
        bind_block(w, c, &d->blocks[i], i);
    d->norm_out = bind_linear(w, 2 * size, size, "norm_out.linear");
    d->proj_out = bind_linear(w, p * p * c->out_channels, size, "proj_out");
    weights_done(w, allow_unknown);
    return d;
}

/* ---------------------------------------------------------------- DiT: conditions, the same at every step */

/* 256 numbers: cos(v f_i), then sin(v f_i), f_i = 10000^(-i/128). In double: the argument reaches 1000, whose rounding
 * to float alone would cost 3e-5. get_timestep_embedding(flip_sin_to_cos, shift 0). */
static void sinusoids(double v, real *out)
{
    enum { HALF = SINUSOIDS / 2 };
    for (int i = 0; i < HALF; i++) {
        double sine, cosine;
        sincos_own(v * exp_own(-log_own(10000) * i / HALF), &sine, &cosine);
        out[i] = (real)cosine;
        out[HALF + i] = (real)sine;
    }
}

/* linear_2(silu(linear_1(x))). */
static tensor two_layers(arena *a, tensor x, layer first, layer second)
{
    tensor y = tensor_new(a, SHAPE(x.dim[0], second.weight.dim[0]));
    size_t mark = arena_mark(a);
    tensor inner = linear(a, x, first);
    activate(inner, SILU);
    linear_to(a, y, inner, second);
    arena_reset(a, mark);
    return y;
}

/* HunyuanDiTAttentionPool: tokens [L][T5] -> [1][pooled]. The mean token is put in front, and it alone asks. */
static tensor pool(arena *a, const dit *d, tensor tokens)
{
    int64_t length = tokens.dim[0], width = tokens.dim[1];
    tensor y = tensor_new(a, SHAPE(1, d->config.pooled_projection_dim));
    size_t mark = arena_mark(a);
    tensor x = tensor_new(a, SHAPE(1 + length, width));
    copy_rows(x, 1, tokens);
    for (int64_t k = 0; k < width && x.data; k++) {
        double sum = 0;
        for (int64_t i = 0; i < length; i++)
            sum += (double)tokens.data[i * width + k];
        x.data[k] = (real)(sum / (double)length);
    }
    add(x, widened(a, d->pool_positions, SHAPE(1 + length, width)));
    tensor q = linear(a, tensor_part(x, 0, 1), d->pool_q), k = linear(a, x, d->pool_k), v = linear(a, x, d->pool_v);
    tensor o = like(a, q);
    attention(a, o, q, k, v, 1, POOL_HEADS);
    linear_to(a, y, o, d->pool_c);
    arena_reset(a, mark);
    return y;
}

/* extra_embedder([pooled, meta, style]) -> [1][D]. meta: original size 1024 x 1024, target H x W, crop 0, 0. */
static tensor extra_embedding(arena *a, const dit *d, tensor emb2, int64_t height, int64_t width)
{
    const double meta[6] = { 1024, 1024, (double)height, (double)width, 0, 0 };
    int64_t pooled = d->config.pooled_projection_dim, size = d->config.hidden_size;
    size_t mark = arena_mark(a);
    tensor x = tensor_new(a, SHAPE(1, pooled + 6 * SINUSOIDS + size));
    tensor p = pool(a, d, emb2), style = widened(a, d->style, SHAPE(1, size));
    if (x.data) {
        memcpy(x.data, p.data, (size_t)pooled * sizeof(real));
        for (int i = 0; i < 6; i++)
            sinusoids(meta[i], x.data + pooled + i * SINUSOIDS);
        memcpy(x.data + pooled + 6 * SINUSOIDS, style.data, (size_t)size * sizeof(real));
    }
    return arena_return(a, mark, two_layers(a, x, d->extra_1, d->extra_2));
}

/* Rows of x whose mask is 0 become the same rows of the padding. */
static void mask_rows(arena *a, tensor x, weight mask, weight padding, int64_t padding_row)
{
    size_t mark = arena_mark(a);
    const real *m = weight_vector(a, mask);
    for (int64_t i = 0; i < x.dim[0] && x.data; i++)
        if (m[i] == 0)
            weight_row(padding, padding_row + i, 0, x.dim[1], x.data + i * x.dim[1]);
    arena_reset(a, mark);
}

/* [text_len + text_len_t5][X]: emb1, then text_embedder(emb2), masked tokens replaced. emb2 [text_len_t5][T5]. */
static void text_tokens(arena *a, const dit *d, tensor out, const control *row, tensor emb2)
{
    int64_t first = d->config.text_len, second = d->config.text_len_t5;
    size_t mark = arena_mark(a);
    copy_rows(out, 0, widened(a, row->emb1, SHAPE(first, d->config.cross_attention_dim)));
    copy_rows(out, first, two_layers(a, emb2, d->text_1, d->text_2));
    mask_rows(a, tensor_part(out, 0, first), row->mask1, d->text_padding, 0);
    mask_rows(a, tensor_part(out, first, second), row->mask2, d->text_padding, first);
    arena_reset(a, mark);
}

/* torch's bicubic along one axis (align_corners false, a = -0.75): the four taps and weights of output i of m from n. */
static void bicubic_taps(int64_t i, int64_t n, int64_t m, int64_t tap[4], double share[4])
{
    const double a = -0.75;
    double x = ((double)i + 0.5) * ((double)n / (double)m) - 0.5, b = floor(x), t = x - b;
    for (int j = 0; j < 4; j++) {
        double u = fabs(t - (j - 1));
        share[j] = u <= 1 ? ((a + 2) * u - (a + 3)) * u * u + 1 : ((a * u - 5 * a) * u + 8 * a) * u - 4 * a;
        int64_t at = (int64_t)b - 1 + j;
        tap[j] = at < 0 ? 0 : at >= n ? n - 1 : at;
    }
}

/* Positions of an n x n grid [n * n][X] resized to m x m: get_abs_pos of the public resampler.py. */
static void resize_positions(tensor out, tensor in, int64_t n, int64_t m)
{
    int64_t x = in.dim[1];
    for (int64_t i = 0; i < m * m && out.data; i++) {
        int64_t ty[4], tx[4];
        double wy[4], wx[4];
        bicubic_taps(i / m, n, m, ty, wy);
        bicubic_taps(i % m, n, m, tx, wx);
        for (int64_t c = 0; c < x; c++) {
            double sum = 0;
            for (int j = 0; j < 16; j++)
                sum += wy[j / 4] * wx[j % 4] * (double)in.data[(ty[j / 4] * n + tx[j % 4]) * x + c];
            out.data[i * x + c] = (real)sum;
        }
    }
}

/* The Resampler: CLIP tokens [patches][width] -> out [Q][X]. Learned queries look at the tokens; positions are added to
 * queries and keys, not to values. */
static void resample(arena *a, const dit *d, tensor out, tensor tokens)
{
    const dit_config *c = &d->config;
    int64_t x = c->cross_attention_dim, queries = c->n_query, patches = tokens.dim[0];
    int64_t n = square_root(queries), m = (int64_t)(sqrt((double)patches) + 0.5);
    size_t mark = arena_mark(a);
    tensor positions = widened(a, d->positions, SHAPE(queries, x)), q = widened(a, d->query, SHAPE(queries, x));
    tensor value = d->kv_proj.data ? linear(a, tokens, (layer){ .weight = d->kv_proj }) : tokens;
    tensor v = like(a, value), k = like(a, value), key_positions = positions;
    layer_norm(a, v, value, d->ln_kv, 1e-5);
    layer_norm(a, q, q, d->ln_q, 1e-5);
    add(q, positions);
    if (patches != queries) {
        key_positions = tensor_new(a, SHAPE(patches, x));
        resize_positions(key_positions, positions, n, m);
    }
    tensor_copy(k, v);
    add(k, key_positions);
    tensor in[3] = { q, k, v };
    for (int i = 0; i < 3; i++)
        in[i] = linear(a, in[i], (layer){ weight_rows(d->in_proj_weight, i * x, x), weight_rows(d->in_proj_bias, i * x, x) });
    attention(a, q, in[0], in[1], in[2], 1, c->num_attention_heads);
    linear_to(a, out, q, d->out_proj);
    arena_reset(a, mark);
}

/* Everything that a run's calls share. rows: [negative, positive], or [positive] where guidance is off. tokens: CLIP's of
 * the first picture, ndim 0 without one: the positive row then sees padding, as the negative row always does. */
dit_condition dit_conditions(const run *r, const dit *d, const control *rows, int64_t count, tensor tokens, int64_t height, int64_t width)
{
    arena *a = r->arena;
    const dit_config *c = &d->config;
    int64_t x = c->cross_attention_dim, length = c->text_len + c->text_len_t5;
    dit_condition out = {
        .rows = count, .extra = tensor_new(a, SHAPE(count, c->hidden_size)), .text = tensor_new(a, SHAPE(count, length, x)),
        .image = tensor_new(a, SHAPE(count, c->n_query, x)), .padding = tensor_new(a, SHAPE(count, c->n_query, x)),
    };
    size_t mark = arena_mark(a);
    for (int64_t i = 0; i < count; i++) {
        tensor emb2 = widened(a, rows[i].emb2, SHAPE(c->text_len_t5, c->cross_attention_dim_t5));
        tensor padding = widened(a, d->clip_padding, SHAPE(c->n_query, x));
        copy_rows(out.extra, i, extra_embedding(a, d, emb2, height, width));
        text_tokens(a, d, tensor_view(tensor_part(out.text, i, 1), SHAPE(length, x)), &rows[i], emb2);
        tensor_copy(tensor_part(out.padding, i, 1), padding);
        tensor_copy(tensor_part(out.image, i, 1), padding);
        if (i == count - 1 && tokens.ndim)
            resample(a, d, tensor_view(tensor_part(out.image, i, 1), SHAPE(c->n_query, x)), tokens);
        arena_reset(a, mark);
    }
    return out;
}

/* ---------------------------------------------------------------- DiT: positions */

/* Angles of the rotary positions, [h/p * w/p][head / 2][cos, sin]: the first half of the pairs turns with x, the second
 * with y. The grid is seen as the centre crop of a picture of 512 pixels, so its longer side always spans 512/8/p.
 * get_resize_crop_region_for_grid and get_2d_rotary_pos_embed. */
static double *rotary_table(arena *a, const dit_config *c, int64_t gh, int64_t gw)
{
    int64_t head = c->attention_head_dim, pairs = head / 4;
    double *table = arena_alloc(a, (size_t)(gh * gw * head), sizeof(double));
    double base = (double)(512 / 8 / c->patch_size);
    double high = gh > gw ? base : rint(base / (double)gw * (double)gh), wide = gh > gw ? rint(base / (double)gh * (double)gw) : base;
    double top = rint((base - high) / 2), left = rint((base - wide) / 2);
    for (int64_t i = 0; i < gh * gw && table; i++)
        for (int64_t k = 0; k < 2 * pairs; k++) {
            bool vertical = k >= pairs;
            double at = vertical ? top + (double)(i / gw) * (high / (double)gh) : left + (double)(i % gw) * (wide / (double)gw);
            double turn = exp_own(-log_own(10000) * 2 * (double)(k % pairs) / ((double)head / 2));
            sincos_own(at * turn, &table[i * head + 2 * k + 1], &table[i * head + 2 * k]);
        }
    return table;
}

/* Row f of the time table: sin and cos of f 10000^(-2i/D), interleaved. PositionalEncoding of motion_module.py. */
static void time_row(const block_weights *b, int64_t f, int64_t size, real *out)
{
    if (b->t_embed.data) {
        weight_row(b->t_embed, 0, f * size, size, out);
        return;
    }
    for (int64_t i = 0; i < size; i += 2) {
        double sine, cosine;
        sincos_own((double)f * exp_own(-log_own(10000) * (double)i / (double)size), &sine, &cosine);
        out[i] = (real)sine;
        if (i + 1 < size)
            out[i + 1] = (real)cosine;
    }
}

/* h [rows * F * area][D] += the time table's row of each token's frame. */
static void add_time(arena *a, tensor h, const block_weights *b, int64_t frames, int64_t rows)
{
    int64_t size = h.dim[1], area = h.dim[0] / frames / rows;
    size_t mark = arena_mark(a);
    real *table = arena_alloc(a, (size_t)(frames * size), sizeof(real));
    for (int64_t f = 0; f < frames && table; f++)
        time_row(b, f, size, table + f * size);
    for (int64_t n = 0; n < h.dim[0] && table; n++)
        for (int64_t k = 0; k < size; k++)
            h.data[n * size + k] += table[n / area % frames * size + k];
    arena_reset(a, mark);
}

/* ---------------------------------------------------------------- DiT: a block */

/* What the blocks of one call share. Tensors hold the rows that are run together. */
typedef struct {
    const run *r;
    const dit *d;
    arena *a;
    int64_t rows, frames, call;
    tensor silu_temb;           /* [rows][D] */
    tensor text, image;         /* [rows * tokens][X] */
    const double *rotary;       /* [area][head / 2][cos, sin] */
    int64_t area;               /* tokens of a frame */
    bool enhance; double enhance_weight;
} call_state;

static void dump_stage(const call_state *c, tensor x, int64_t block, const char *part)
{
    tensor rows = tensor_view(x, SHAPE(c->rows, x.dim[0] / c->rows, x.dim[1]));
    dump(c->r, rows, AS_IS, "step.%03d.block.%02d%s", (int)c->call, (int)block, part);
}

/* y rows += vector of their guidance row: x [rows * n][D], v [rows][D]. */
static void add_per_row(tensor x, tensor v)
{
    int64_t size = x.dim[1], n = x.dim[0] / v.dim[0];
    for (int64_t i = 0; i < x.dim[0] && x.data; i++)
        for (int64_t k = 0; k < size; k++)
            x.data[i * size + k] += v.data[i / n * size + k];
}

/* norm1: LayerNorm plus a shift from the timestep. AdaLayerNormShift. */
static void shifted_norm(arena *a, tensor n, tensor h, const block_weights *b, tensor silu_temb)
{
    size_t mark = arena_mark(a);
    layer_norm(a, n, h, b->norm1_norm, 1e-6);
    add_per_row(n, linear(a, silu_temb, b->norm1_linear));
    arena_reset(a, mark);
}

/* The sum over i != j of softmax_j(q_i k_j / sqrt(head)) for the F frames of one place and head. q, k: first frame. */
static double temporal_attention(const real *q, const real *k, int64_t frames, int64_t step, int64_t head)
{
    double off = 0;
    for (int64_t i = 0; i < frames; i++) {
        double score[TIME_ROWS], highest = -INFINITY, sum = 0;
        for (int64_t j = 0; j < frames; j++) {
            score[j] = 0;
            for (int64_t d = 0; d < head; d++)
                score[j] += (double)q[i * step + d] * (double)k[j * step + d];
            score[j] /= sqrt((double)head);
            highest = score[j] > highest ? score[j] : highest;
        }
        for (int64_t j = 0; j < frames; j++)
            sum += score[j] = exp_own(score[j] - highest < -700 ? -700 : score[j] - highest);
        for (int64_t j = 0; j < frames; j++)
            off += j == i ? 0 : score[j] / sum;
    }
    return off;
}

/* Enhance-A-Video: max(1, mean off-diagonal temporal attention * (F + weight)), over rows, heads and places. */
static real enhance_score(const call_state *c, tensor q, tensor k)
{
    int64_t heads = c->d->config.num_attention_heads, head = c->d->config.attention_head_dim, width = heads * head;
    int64_t step = c->area * width, places = c->rows * c->area;
    double sum = 0;
    for (int64_t i = 0; i < places * heads && q.data; i++) {
        int64_t place = i / heads, at = (place / c->area * c->frames * c->area + place % c->area) * width + i % heads * head;
        sum += temporal_attention(q.data + at, k.data + at, c->frames, step, head);
    }
    double mean = sum / (double)(c->frames * c->frames - c->frames) / (double)(places * heads);
    double score = mean * ((double)c->frames + c->enhance_weight);
    return (real)(score < 1 ? 1 : score);
}

/* n = to_out(attention(n, source)); source [rows * tokens][...], which is n itself in attn1. Rotary positions turn the
 * queries, and the keys where they are the same tokens. */
static void attend(const call_state *c, tensor n, tensor source, const attention_layer *l)
{
    arena *a = c->a;
    bool self = source.data == n.data && source.dim[0] == n.dim[0] && source.dim[1] == n.dim[1];
    int64_t heads = c->d->config.num_attention_heads;
    real score = 1;
    size_t mark = arena_mark(a);
    tensor q = linear(a, n, l->to_q), k = linear(a, source, l->to_k), v = linear(a, source, l->to_v);
    if (self && c->enhance) {
        tensor plain_q = like(a, q), plain_k = like(a, k);
        tensor_copy(plain_q, q);
        tensor_copy(plain_k, k);
        head_norm_rotary(a, plain_q, heads, l->norm_q, 1e-6, NULL, 1);
        head_norm_rotary(a, plain_k, heads, l->norm_k, 1e-6, NULL, 1);
        score = enhance_score(c, plain_q, plain_k);
    }
    head_norm_rotary(a, q, heads, l->norm_q, 1e-6, c->rotary, c->area);
    head_norm_rotary(a, k, heads, l->norm_k, 1e-6, self ? c->rotary : NULL, c->area);
    attention(a, q, q, k, v, c->rows, heads);
    linear_to(a, n, q, l->to_out);
    for (int64_t i = 0; score > 1 && i < tensor_count(n); i++)
        n.data[i] *= score;
    arena_reset(a, mark);
}

/* h = skip_linear(skip_norm([h, skip])). */
static void merge_skip(arena *a, tensor h, tensor skip, const block_weights *b)
{
    int64_t size = h.dim[1];
    size_t mark = arena_mark(a);
    for (int64_t first = 0; first < h.dim[0]; first += TOKENS) {
        int64_t n = h.dim[0] - first < TOKENS ? h.dim[0] - first : TOKENS;
        tensor part = tensor_part(h, first, n), old = tensor_part(skip, first, n), both = tensor_new(a, SHAPE(n, 2 * size));
        for (int64_t i = 0; i < n && h.data; i++) {
            memcpy(both.data + i * 2 * size, part.data + i * size, (size_t)size * sizeof(real));
            memcpy(both.data + i * 2 * size + size, old.data + i * size, (size_t)size * sizeof(real));
        }
        layer_norm(a, both, both, b->skip_norm, 1e-6);
        linear_to(a, part, both, b->skip_linear);
        arena_reset(a, mark);
    }
}

/* n = norm_clip_out(a * gelu(b)), [a, b] = proj(norm(n)). The gate's LayerNorm has the width for its eps: the public code
 * passes dim_in where eps is expected (GEGLU in attention.py), and the weights were trained with it. */
static void gate(arena *a, tensor n, const block_weights *b)
{
    size_t mark = arena_mark(a);
    layer_norm(a, n, n, b->gate_norm, (double)n.dim[1]);
    for (int64_t first = 0; first < n.dim[0]; first += TOKENS) {
        tensor part = tensor_part(n, first, n.dim[0] - first < TOKENS ? n.dim[0] - first : TOKENS);
        gate_gelu(part, linear(a, part, b->gate_proj));
        arena_reset(a, mark);
    }
    layer_norm(a, n, n, b->norm_clip_out, 1e-6);
}

/* n = net.2(gelu(net.0.proj(n))). */
static void feed_forward(arena *a, tensor n, const block_weights *b)
{
    size_t mark = arena_mark(a);
    for (int64_t first = 0; first < n.dim[0]; first += TOKENS) {
        tensor part = tensor_part(n, first, n.dim[0] - first < TOKENS ? n.dim[0] - first : TOKENS);
        tensor inner = linear(a, part, b->ff_proj);
        activate(inner, GELU_TANH);
        linear_to(a, part, inner, b->ff_out);
        arena_reset(a, mark);
    }
}

/* HunyuanDiTBlock.forward: h [rows * N][D], in place. One line a sublayer. */
static void block(const call_state *c, tensor h, int64_t i, tensor skip)
{
    arena *a = c->a;
    const block_weights *b = &c->d->blocks[i];
    if (b->skip_linear.weight.data) {
        merge_skip(a, h, skip, b);
        dump_stage(c, h, i, ".skip");
    }
    if (c->frames > 1) {
        add_time(a, h, b, c->frames, c->rows);
        dump_stage(c, h, i, ".time");
    }
    size_t mark = arena_mark(a);
    tensor n = like(a, h);

    shifted_norm(a, n, h, b, c->silu_temb);
    dump_stage(c, n, i, ".norm1");
    attend(c, n, n, &b->attn1);
    dump_stage(c, n, i, ".attn1");
    add(h, n);

    layer_norm(a, n, h, b->norm2, 1e-6);
    attend(c, n, c->text, &b->attn2);
    dump_stage(c, n, i, ".attn2");
    add(h, n);

    layer_norm(a, n, h, b->norm_clip, 1e-6);
    attend(c, n, c->image, &b->attn_clip);
    gate(a, n, b);
    dump_stage(c, n, i, ".clip");
    add(h, n);

    layer_norm(a, n, h, b->norm3, 1e-6);
    feed_forward(a, n, b);
    dump_stage(c, n, i, ".ff");
    add(h, n);

    arena_reset(a, mark);
    dump_stage(c, h, i, "");
}

/* ---------------------------------------------------------------- DiT: a call */

/* timestep_embedder(sinusoids(t)) + extra -> [B][D]. */
static tensor time_embedding(arena *a, const dit *d, const dit_condition *c, double t)
{
    tensor temb = tensor_new(a, SHAPE(c->rows, d->config.hidden_size));
    size_t mark = arena_mark(a);
    tensor v = tensor_new(a, SHAPE(1, SINUSOIDS));
    if (v.data)
        sinusoids(t, v.data);
    tensor e = two_layers(a, v, d->timestep_1, d->timestep_2);
    tensor_copy(temb, c->extra);
    for (int64_t i = 0; i < c->rows; i++)
        add(tensor_part(temb, i, 1), e);
    arena_reset(a, mark);
    return temb;
}

/* pos_embed: [latents, inpaint] of every frame in patches of p x p -> [N][D], tokens in the order frame, y, x. */
static tensor patch_tokens(arena *a, const dit *d, tensor latents, tensor inpaint)
{
    int64_t frames = latents.dim[0], h = latents.dim[1], w = latents.dim[2], p = d->config.patch_size, size = d->config.hidden_size;
    int64_t z = latents.dim[3], rest = inpaint.dim[3];
    tensor tokens = tensor_new(a, SHAPE(frames * (h / p) * (w / p), size));
    size_t mark = arena_mark(a);
    tensor x = tensor_new(a, SHAPE(frames, h, w, z + rest));
    for (int64_t i = 0; i < frames * h * w && x.data; i++) {
        memcpy(x.data + i * (z + rest), latents.data + i * z, (size_t)z * sizeof(real));
        memcpy(x.data + i * (z + rest) + z, inpaint.data + i * rest, (size_t)rest * sizeof(real));
    }
    conv(a, tensor_view(tokens, SHAPE(frames, h / p, w / p, size)), x,
         (conv_spec){ .kernel = { 1, p, p }, .stride = { 1, p, p }, .up = 1 }, d->patch);
    arena_reset(a, mark);
    return tokens;
}

/* h = LayerNorm(h) * (1 + scale) + shift, (scale, shift) = linear(silu(temb)). AdaLayerNormContinuous. */
static void norm_out(const call_state *c, tensor h)
{
    size_t mark = arena_mark(c->a);
    int64_t size = h.dim[1], n = h.dim[0] / c->rows;
    tensor v = linear(c->a, c->silu_temb, c->d->norm_out);
    layer_norm(c->a, h, h, (layer){ 0 }, 1e-6);
    for (int64_t i = 0; i < h.dim[0] && h.data; i++)
        for (int64_t k = 0; k < size; k++)
            h.data[i * size + k] = h.data[i * size + k] * (1 + v.data[i / n * 2 * size + k]) + v.data[(i / n * 2 + 1) * size + k];
    arena_reset(c->a, mark);
}

/* proj_out and unpatchify: h [rows * N][D] -> out [rows][F][h][w][out_channels], a token's numbers in the order py, px, c. */
static void project_out(const call_state *c, tensor out, tensor h)
{
    size_t mark = arena_mark(c->a);
    int64_t p = c->d->config.patch_size, channels = c->d->config.out_channels, gw = out.dim[3] / p, gh = out.dim[2] / p;
    tensor y = linear(c->a, h, c->d->proj_out);
    for (int64_t i = 0; i < h.dim[0] && h.data; i++)
        for (int64_t py = 0; py < p; py++)
            memcpy(out.data + ((i / gw / gh * out.dim[2] + i / gw % gh * p + py) * out.dim[3] + i % gw * p) * channels,
                   y.data + (i * p + py) * p * channels, (size_t)(p * channels) * sizeof(real));
    arena_reset(c->a, mark);
}

/* All blocks on h [rows * N][D]. The outputs of blocks 0 .. L/2-2 are kept and come back, last in first out, at L/2+1 .. L-1. */
static void run_blocks(const call_state *c, tensor h, int64_t done, int64_t total)
{
    int64_t layers = c->d->config.num_layers, kept = layers / 2 - 1;
    size_t mark = arena_mark(c->a);
    tensor skips = tensor_new(c->a, SHAPE(kept, h.dim[0], h.dim[1]));
    for (int64_t i = 0; i < layers; i++) {
        tensor skip = { 0 };
        if (i > layers / 2)
            skip = tensor_view(tensor_part(skips, layers - 1 - i, 1), SHAPE(h.dim[0], h.dim[1]));
        block(c, h, i, skip);
        if (i < kept)
            tensor_copy(tensor_part(skips, i, 1), h);
        progress(c->r, "block", done + i + 1, total);
    }
    arena_reset(c->a, mark);
}

/* ---------------------------------------------------------------- TeaCache */

/* Block 0's shifted norm of the patch tokens, as the first block would see it, for all rows: [B * N][D]. */
static tensor modulated_input(arena *a, const dit *d, tensor patch, tensor silu_temb, int64_t frames)
{
    int64_t rows = silu_temb.dim[0], n = patch.dim[0];
    tensor x = tensor_new(a, SHAPE(rows * n, patch.dim[1]));
    for (int64_t i = 0; i < rows; i++)
        copy_rows(x, i * n, patch);
    if (frames > 1)
        add_time(a, x, &d->blocks[0], frames, rows);
    shifted_norm(a, x, x, &d->blocks[0], silu_temb);
    return x;
}

/* The fitted polynomial of mean |now - last| / mean |last|. */
static double tea_change(tensor now, tensor last)
{
    static const double c[] = { -7.51185620e+03, 2.32931511e+03, -2.25610663e+02, 9.39902237e+00, -7.43067848e-02 };
    double difference = 0, size = 0, y = 0;
    for (int64_t i = 0; i < tensor_count(now) && now.data; i++) {
        difference += fabs((double)(now.data[i] - last.data[i]));
        size += fabs((double)last.data[i]);
    }
    for (int i = 0; i < 5; i++)
        y = y * (difference / size) + c[i];
    return y;
}

/* Decides whether this call computes; returns whether its input and residual are to be stored. TeaCacheParameters.update. */
static bool tea_update(arena *a, tea_cache *t, const dit *d, tensor patch, tensor silu_temb, int64_t frames)
{
    int64_t call = t->count;
    bool first = call == t->skip_start - 1, between = call >= t->skip_start && call < t->steps - t->skip_end;
    t->count = call + 1 == t->steps ? 0 : call + 1;
    t->delta = 0;
    t->computed = true;
    if (!first && !between)
        return false;
    size_t mark = arena_mark(a);
    tensor now = modulated_input(a, d, patch, silu_temb, frames);
    if (between) {
        t->delta = tea_change(now, t->last);
        t->sum += t->delta;
        t->computed = patch.data == NULL || !(t->sum < t->threshold);   /* the plan foresees the larger work */
    }
    if (t->computed) {
        t->sum = 0;
        tensor_copy(t->last, now);
    } else {
        t->cached++;
    }
    arena_reset(a, mark);
    return t->computed;
}

/* residual = h - patch (store), or h = patch + residual; for the rows of one group. */
static void tea_residual(tensor h, tensor patch, tensor residual, bool store)
{
    int64_t n = tensor_count(patch);
    for (int64_t i = 0; i < tensor_count(h) && h.data; i++) {
        if (store)
            residual.data[i] = h.data[i] - patch.data[i % n];
        else
            h.data[i] = patch.data[i % n] + residual.data[i];
    }
}

/* Is Enhance-A-Video on in this call? Counts it. */
static bool enhance_update(enhance *e)
{
    if (!e->enabled)
        return false;
    int64_t call = e->count++;
    return call >= e->skip_start && call < e->steps - e->skip_end;
}

/* ---------------------------------------------------------------- DiT: forward */

/* The stream of rows [first, first + rows): patch tokens through the blocks and norm_out, or the cached result. */
static void forward_rows(call_state *c, const dit_condition *k, tensor out, tensor patch, tensor silu_temb, tensor seen,
                         int64_t first, tea_cache *tea, bool store)
{
    arena *a = c->a;
    int64_t rows = c->rows, n = patch.dim[0], x = c->d->config.cross_attention_dim, layers = c->d->config.num_layers;
    size_t mark = arena_mark(a);
    c->silu_temb = tensor_part(silu_temb, first, rows);
    c->text = tensor_view(tensor_part(k->text, first, rows), SHAPE(rows * k->text.dim[1], x));
    c->image = tensor_view(tensor_part(seen, first, rows), SHAPE(rows * seen.dim[1], x));
    tensor h = tensor_new(a, SHAPE(rows * n, patch.dim[1])), all = tensor_view(h, SHAPE(rows, n, patch.dim[1]));
    for (int64_t i = 0; i < rows; i++)
        copy_rows(h, i * n, patch);
    dump(c->r, all, AS_IS, "step.%03d.patch", (int)c->call);
    tensor residual = tea ? tensor_part(tea->residual, first, rows) : (tensor){ 0 };
    if (tea && !tea->computed) {
        tea_residual(h, patch, residual, false);
    } else {
        run_blocks(c, h, first * layers, k->rows * layers);
        norm_out(c, h);
    }
    if (store)
        tea_residual(h, patch, residual, true);
    dump(c->r, all, AS_IS, "step.%03d.norm_out", (int)c->call);
    project_out(c, tensor_part(out, first, rows), h);
    arena_reset(a, mark);
}

/* One call of the model: latents [F][h][w][Z], inpaint [F][h][w][2 Z] at timestep t -> [B][F][h][w][out_channels].
 * see_image: the positive row sees the picture's tokens. call numbers the dumps. HunyuanTransformer3DModel.forward. */
tensor dit_forward(const run *r, const dit *d, const dit_condition *k, tensor latents, tensor inpaint, double t, bool see_image,
                   int64_t call, tea_cache *tea, enhance *eav)
{
    arena *a = r->arena;
    int64_t frames = latents.dim[0], h = latents.dim[1], w = latents.dim[2], p = d->config.patch_size;
    tensor out = tensor_new(a, SHAPE(k->rows, frames, h, w, d->config.out_channels)), seen = see_image ? k->image : k->padding;
    size_t mark = arena_mark(a);
    call_state c = { .r = r, .d = d, .a = a, .frames = frames, .call = call, .area = (h / p) * (w / p) };
    tensor temb = time_embedding(a, d, k, t), silu_temb = like(a, temb);
    dump(r, temb, AS_IS, "step.%03d.temb", (int)call);
    dump(r, k->text, AS_IS, "step.%03d.text", (int)call);
    dump(r, seen, AS_IS, "step.%03d.image", (int)call);
    tensor_copy(silu_temb, temb);
    activate(silu_temb, SILU);
    tensor patch = patch_tokens(a, d, latents, inpaint);
    c.rotary = rotary_table(a, &d->config, h / p, w / p);
    c.enhance = eav && enhance_update(eav);
    c.enhance_weight = eav ? eav->weight : 0;
    tea_cache *cache = tea && tea->threshold != 0 ? tea : NULL;
    bool store = cache && tea_update(a, cache, d, patch, silu_temb, frames);
    c.rows = r->keep_rows || (eav && eav->enabled) ? k->rows : 1;
    for (int64_t first = 0; first < k->rows; first += c.rows)
        forward_rows(&c, k, out, patch, silu_temb, seen, first, cache, store);
    dump(r, out, ROWS_CHANNELS_FIRST, "step.%03d.out", (int)call);
    arena_reset(a, mark);
    return out;
}

/* ---------------------------------------------------------------- measurement */

typedef struct { run r; dit d; block_weights b; call_state c; tensor h, skip; } block_bench;

void *bench_block_new(arena *a, int64_t n)
{
    block_bench *s = allocate(1, sizeof *s);
    dit_config *c = &s->d.config;
    *c = (dit_config){ .num_attention_heads = 32, .attention_head_dim = 88, .hidden_size = 2816, .num_layers = 2, .inner = 12288,
                       .cross_attention_dim = 1024, .patch_size = 2 };
    bind_block(weights_random(F32), c, &s->b, 2);
    s->d.blocks = &s->b;
    s->r = (run){ .arena = a };
    s->h = tensor_new(a, SHAPE(n, c->hidden_size));
    s->skip = tensor_new(a, SHAPE(n, c->hidden_size));
    s->c = (call_state){ .r = &s->r, .d = &s->d, .a = a, .rows = 1, .frames = 1, .area = n };
    s->c.silu_temb = tensor_new(a, SHAPE(1, c->hidden_size));
    s->c.text = tensor_new(a, SHAPE(77 + 256, c->cross_attention_dim));
    s->c.image = tensor_new(a, SHAPE(64, c->cross_attention_dim));
    s->c.rotary = rotary_table(a, c, 1, n);
    tensor all[] = { s->h, s->skip, s->c.silu_temb, s->c.text, s->c.image };
    generator g;
    generator_seed(&g, 1);
    for (int i = 0; i < 5; i++)
        for (int64_t k = 0; k + 16 <= tensor_count(all[i]); k += 16) {
            float numbers[16];
            generator_randn(&g, numbers, 16);
            for (int64_t m = 0; m < 16; m++)
                all[i].data[k + m] = (real)numbers[m];
        }
    return s;
}

void bench_block(void *state)
{
    block_bench *s = state;
    block(&s->c, s->h, 0, s->skip);
}
