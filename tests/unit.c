/* unit.c - what has no command line: operations against float64 truth, kernels against the textbook loops, parsers.
 *
 * Includes the sources, so that static functions can be called. Runs from the root of the repository. Prints every
 * failure, and `N passed, N failed` as its last line.
 */
#include "../io.c"
#include "../tensor.c"
#include "../vae.c"
#include "../dit.c"
#define main ruyi_main
#include "../ruyi.c"
#undef main

static int passed, failed;

#define CHECK(condition, ...)                                  \
    do {                                                       \
        if (condition) {                                       \
            passed++;                                          \
        } else {                                               \
            failed++;                                          \
            printf("FAILED %s:%d: ", __FILE__, __LINE__);      \
            printf(__VA_ARGS__);                               \
            printf("\n");                                      \
        }                                                      \
    } while (0)

#include "io_test.h"

static const bool fp64 = sizeof(real) == sizeof(double);

/* ---------------------------------------------------------------- truth from files */

static arena memory;            /* for the tensors of one test */

static safetensors *ops(const char *name)
{
    char *path = text_of("tests/golden/ops/%s.safetensors", name);
    safetensors *f = safetensors_open(path);
    free(path);
    return f;
}

static const st_tensor *need_tensor(const safetensors *f, const char *format, ...) PRINTF(2, 3);
static const st_tensor *need_tensor(const safetensors *f, const char *format, ...)
{
    FORMATTED(name, format);
    const st_tensor *t = safetensors_find(f, name);
    if (!t)
        die(BAD_INPUT, "%s has no %s", f->path, name);
    free(name);
    return t;
}

static double number_of(const st_tensor *t, int64_t i) { return element(t, (uint64_t)i); }

/* A stored parameter as the kernels take it. */
static weight stored_weight(const st_tensor *t)
{
    shape s = { .ndim = t->ndim };
    memcpy(s.dim, t->dim, (size_t)t->ndim * sizeof *t->dim);
    return weight_of(t->data, t->type, s, t->name);
}

static layer layer_of(const safetensors *f, const char *name)
{
    return (layer){ stored_weight(need_tensor(f, "%s.weight", name)), stored_weight(need_tensor(f, "%s.bias", name)) };
}

/* A stored tensor as it is, or [C][T][H][W] as [T][H][W][C]. */
static tensor tensor_from(const st_tensor *t, bool channels_last)
{
    shape s = { .ndim = t->ndim };
    int64_t c = channels_last ? t->dim[0] : 1, rest = (int64_t)t->count / c;
    for (int i = 0; i < t->ndim; i++)
        s.dim[i] = channels_last ? t->dim[(i + 1) % t->ndim] : t->dim[i];
    tensor x = tensor_new(&memory, s);
    for (int64_t i = 0; i < (int64_t)t->count; i++)
        x.data[i % rest * c + i / rest] = (real)number_of(t, i);
    return x;
}

/* rel-L2 against the stored truth; limits for float64 and float32. */
static void check_close(tensor got, const st_tensor *t, bool channels_last, double limit64, double limit32)
{
    int64_t c = channels_last ? t->dim[0] : 1, rest = (int64_t)t->count / c;
    double error = 0, size = 0, limit = fp64 ? limit64 : limit32;
    CHECK(tensor_count(got) == (int64_t)t->count, "%s: %lld elements", t->name, (long long)tensor_count(got));
    for (int64_t i = 0; i < (int64_t)t->count && tensor_count(got) == (int64_t)t->count; i++) {
        double want = number_of(t, i), d = (double)got.data[i % rest * c + i / rest] - want;
        error += d * d;
        size += want * want;
    }
    error = size > 0 ? sqrt(error / size) : sqrt(error);
    CHECK(error <= limit, "%s: rel-L2 %.3g, limit %.3g", t->name, error, limit);
}

/* ---------------------------------------------------------------- random numbers */

static void test_randn(void)
{
    safetensors *f = ops("randn");
    generator g = { .next = 624 };
    for (int64_t i = 0; i < f->count; i++) {        /* by name, so that calls of one sequence come in order */
        const st_tensor *t = f->by_name[i];
        const char *seed = strstr(t->name, "seed");
        bool continues = !strncmp(t->name, "seq", 3) && !strstr(t->name, "call0");
        float *got = allocate(t->count, sizeof *got);
        int64_t different = 0;
        if (!continues)
            generator_seed(&g, (rng){ 0 }, strtoull(seed + 4, NULL, 10));
        generator_randn(&g, got, (int64_t)t->count);
        for (int64_t k = 0; k < (int64_t)t->count; k++)
            different += (double)got[k] != number_of(t, k);
        CHECK(!different, "randn %s: %lld of %llu differ", t->name, (long long)different, (unsigned long long)t->count);
        free(got);
    }
    safetensors_close(f);
}

/* A GPU's real draws. Its sine and cosine are fast ones, so ours differ in the last bits of float32; of BF16 a number on
 * the edge of rounding may come out one place away. */
static void test_cuda_randn(void)
{
    safetensors *f = ops("cuda_randn");
    int64_t total = 0, apart[2] = { 0 };
    double worst[2] = { 0 };
    for (int kind = 0; kind < 4; kind++) {
        bool bf16 = kind & 1;
        generator g;
        generator_seed(&g, (rng){ 132, 2048, bf16 }, kind & 2 ? 42 : 0);
        for (int draw = 0; draw < 12; draw++) {
            char *name = text_of("%s.seed%d.draw%02d", bf16 ? "bfloat16" : "float32", kind & 2 ? 42 : 0, draw);
            const st_tensor *sides = need_tensor(f, "%s.shape", name), *at = need_tensor(f, "%s.index", name);
            const st_tensor *value = need_tensor(f, "%s.value", name);
            int64_t count = 1;
            for (int64_t i = 0; i < (int64_t)sides->count; i++)
                count *= (int64_t)number_of(sides, i);
            float *got = allocate((size_t)count, sizeof *got);
            generator_randn(&g, got, count);
            for (int64_t i = 0; i < (int64_t)at->count; i++) {
                double want = number_of(value, i), d = fabs((double)got[(int64_t)number_of(at, i)] - want);
                double place = bf16 && want != 0 ? ldexp(1, ilogb(want) - 7) : 1;
                total++;
                apart[bf16] += d != 0;
                worst[bf16] = d / place > worst[bf16] ? d / place : worst[bf16];
            }
            free(name);
            free(got);
        }
    }
    CHECK(worst[0] <= 2.2e-6, "cuda_randn: float32 off by %.3g", worst[0]);
    CHECK(worst[1] <= 1 && apart[1] * 2000 <= total, "cuda_randn: BF16 off by %.3g places, %lld of %lld differ", worst[1],
          (long long)apart[1], (long long)total / 2);
    safetensors_close(f);
}

/* ---------------------------------------------------------------- schedulers */

static void check_tables(const safetensors *f, const scheduler *s, const char *name)
{
    int different = 0;
    for (int64_t i = 0; i < s->config.num_train_timesteps; i++)
        different += number_of(need_tensor(f, "betas.f32"), i) != (double)s->betas[i] ||
                     number_of(need_tensor(f, "alphas_cumprod.f32"), i) != (double)s->alphas_cumprod[i];
    const st_tensor *t = need_tensor(f, "%s.timesteps", name);
    for (int64_t i = 0; i < (int64_t)t->count; i++)
        different += number_of(t, i) != s->timesteps[i];
    CHECK((int64_t)t->count == s->calls && !different, "%s: %d of betas, alphas_cumprod or timesteps differ", name, different);
    char *sigmas = text_of("%s.sigmas.f32", name);
    t = safetensors_find(f, sigmas);
    free(sigmas);
    different = 0;
    for (int64_t i = 0; t && has_sigmas(s->config.type) && i < (int64_t)t->count; i++)
        different += number_of(t, i) != (double)s->sigmas[i];
    CHECK(!different, "%s: %d sigmas differ", name, different);
    if ((t = safetensors_find(f, text_of("%s.init_noise_sigma", name))))
        CHECK(fabs(number_of(t, 0) - s->init_noise_sigma) <= 1e-14 * number_of(t, 0), "%s: init_noise_sigma", name);
}

static void check_steps(const safetensors *f, scheduler *s, const char *name)
{
    tensor sample = tensor_from(need_tensor(f, "%s.sample", name), false);
    tensor outputs = tensor_from(need_tensor(f, "%s.model_output", name), false);
    tensor input = tensor_from(need_tensor(f, "%s.model_input", name), false), noise = { 0 };
    if (s->config.type == EULER_A)
        noise = tensor_from(need_tensor(f, "%s.noise", name), false);
    tensor x = tensor_new(&memory, SHAPE(1, sample.dim[1])), in = tensor_new(&memory, SHAPE(1, sample.dim[1]));
    double worst = 0;
    for (int64_t i = 0; i < s->calls; i++) {        /* teacher-forced by nothing: errors may add up */
        if (i == 0)
            tensor_copy(x, tensor_part(sample, 0, 1));
        sched_input(s, in, x);
        sched_step(s, x, tensor_part(outputs, i, 1), noise.ndim ? tensor_part(noise, i, 1) : noise);
        double size = 0, error = 0;
        for (int64_t k = 0; k < x.dim[1]; k++) {
            double want = (double)sample.data[(i + 1) * x.dim[1] + k], d = (double)x.data[k] - want;
            double given = (double)(in.data[k] - input.data[i * x.dim[1] + k]);
            error += d * d + given * given;
            size += want * want;
        }
        worst = sqrt(error / size) > worst ? sqrt(error / size) : worst;
    }
    CHECK(worst <= (fp64 ? 2e-14 : 4e-5), "%s: worst step rel-L2 %.3g", name, worst);
}

static void test_schedulers(void)
{
    static const char *const spacings[] = { "", "-trailing", "-linspace" };
    static const int64_t counts[] = { 1, 2, 3, 5, 25, 50 };
    safetensors *f = ops("schedulers");
    for (int type = 0; type < SCHEDULERS; type++)
        for (int k = 0; k < 3; k++)
            for (int n = 0; n < 6; n++) {
                char *name = text_of("%s%s.%lld", sched_names[type], spacings[k], (long long)counts[n]);
                char *timesteps = text_of("%s.timesteps", name);
                if (safetensors_find(f, timesteps)) {
                    sched_config c = { .type = (sched_type)type, .num_train_timesteps = 1000, .steps_offset = 1, .beta_start = 0.00085,
                                       .beta_end = 0.03, .beta_schedule = "scaled_linear", .prediction_type = V_PREDICTION,
                                       .timestep_spacing = (spacing)k, .set_alpha_to_one = true };
                    memory = arena_new(1 << 20);
                    scheduler s = sched_new(&memory, c, counts[n], SHAPE(1, need_tensor(f, "%s.sample", name)->dim[1]));
                    check_tables(f, &s, name);
                    check_steps(f, &s, name);
                    sched_free(&s);
                    arena_free(&memory);
                }
                free(name);
                free(timesteps);
            }
    safetensors_close(f);
}

/* Configurations that ops/schedulers does not have, by diffusers 0.31 in float64: the sample after the last step. */
static void test_scheduler_fields(void)
{
    static const struct { sched_config c; int64_t steps, calls; double init, want[6]; } cases[] = {
        { { .type = DDIM, .thresholding = true, .dynamic_thresholding_ratio = 0.9, .sample_max_value = 1.5, .prediction_type = V_PREDICTION }, 4, 4, 1,
          { -0.23709744853040077, 0.17929490214620791, -0.57509501740233315, 0.14749242474916027, 0.96745871348004064, -0.58594464767378995 } },
        { { .type = DPMPP, .thresholding = true, .dynamic_thresholding_ratio = 0.55, .sample_max_value = 3,
                        .prediction_type = EPSILON, .timestep_spacing = LINSPACE }, 5, 5, 1,
          { -0.94258892848636178, 1, -1, -0.24338871743229235, 1, -0.65069897583239866 } },
        { { .type = PNDM, .skip_prk_steps = true, .prediction_type = V_PREDICTION }, 6, 7, 1,
          { -0.40499222446756822, -0.40163542429654109, -0.26904332985984653, 0.40758689748032684, 2.3180943991902536, 0.27946613222463929 } },
        { { .type = PNDM, .skip_prk_steps = true, .timestep_spacing = TRAILING, .prediction_type = V_PREDICTION }, 2, 3, 1,
          { -0.12421726916326215, -0.80676600953080779, 1.1286106564539891, -0.70593227320988294, 2.3524708288000973, -0.74758317413321673 } },
        { { .type = PNDM, .skip_prk_steps = true, .prediction_type = V_PREDICTION }, 1, 1, 1,
          { -0.82259664476523198, 0.62446610550362724, -1.4254813350478261, 0.13522440168869468, 1.5822871519575539, -0.35401730212623789 } },    /* one call */
        { { .type = DDIM, .timestep_spacing = TRAILING, .prediction_type = V_PREDICTION }, 48, 48, 1,
          { -0.92677129136784442, 0.60207509973045126, -1.4209592260499326, 0.20184595210122586, 1.5111555720477206, -0.31436244033398264 } },    /* two timesteps on the edge of rounding */
        { { .type = DDIM, .timestep_spacing = TRAILING, .rescale_betas_zero_snr = true, .prediction_type = EPSILON,
                        .clip_sample = true, .clip_sample_range = 0.75 }, 3, 3, 1,
          { 0.57208586497069835, -0.75, 0.75, -0.75, 0.75, 0.57378456476752704 } },    /* no signal at the start: A = 0 */
        { { .type = EULER, .timestep_spacing = LINSPACE, .rescale_betas_zero_snr = true, .beta_schedule = "linear", .prediction_type = V_PREDICTION }, 48, 48, 6402.30078125,
          { 0.070104634407106597, -0.061983557905177636, 0.021041511255309148, 0.043988414963494954, 0.045116567797471654, -0.041978853071256511 } },    /* the largest sigma is not the first */
    };
    for (size_t n = 0; n < sizeof cases / sizeof *cases; n++) {
        sched_config c = cases[n].c;
        c.num_train_timesteps = 1000, c.steps_offset = 1, c.beta_start = 0.00085, c.beta_end = 0.03;
        c.beta_schedule = c.beta_schedule ? c.beta_schedule : "scaled_linear";
        c.set_alpha_to_one = n != 3;
        memory = arena_new(1 << 20);
        scheduler s = sched_new(&memory, c, cases[n].steps, SHAPE(1, 6));
        tensor x = tensor_new(&memory, SHAPE(1, 6)), v = tensor_new(&memory, SHAPE(1, 6));
        double error = 0, size = 0;
        for (int k = 0; k < 6; k++)
            x.data[k] = (real)(((3 * k + 1) % 7 - 3) / 2.0 + 0.125);
        for (int64_t i = 0; i < s.calls; i++) {
            for (int k = 0; k < 6; k++)
                v.data[k] = (real)((double)((7 * i + 5 * k) % 11 - 5) / 4);
            sched_step(&s, x, v, (tensor){ 0 });
        }
        for (int k = 0; k < 6; k++) {
            error += ((double)x.data[k] - cases[n].want[k]) * ((double)x.data[k] - cases[n].want[k]);
            size += cases[n].want[k] * cases[n].want[k];
        }
        CHECK(s.calls == cases[n].calls && fabs(s.init_noise_sigma - cases[n].init) <= 1e-12, "scheduler %zu: calls, init", n);
        CHECK(sqrt(error / size) <= (fp64 ? 2e-14 : 4e-5), "scheduler %zu: rel-L2 %.3g", n, sqrt(error / size));
        sched_free(&s);
        arena_free(&memory);
    }
}

static void test_buckets(void)
{
    safetensors *f = ops("buckets");
    const st_tensor *t = need_tensor(f, "table");
    for (int64_t i = 0; i < t->dim[0]; i++) {
        int64_t row[5], w, h;
        for (int64_t k = 0; k < 5; k++)
            row[k] = (int64_t)number_of(t, 5 * i + k);
        bucket_size(row[0], row[1], row[2], &w, &h);
        CHECK(w == row[3] && h == row[4], "bucket %lld x %lld at %lld: %lld x %lld", (long long)row[0], (long long)row[1],
              (long long)row[2], (long long)w, (long long)h);
    }
    safetensors_close(f);
}

/* ---------------------------------------------------------------- tables and embeddings */

static void test_embeddings(void)
{
    static const int sizes[][2] = { { 16, 18 }, { 16, 4 }, { 2, 7 }, { 3, 3 }, { 4, 16 }, { 4, 5 }, { 5, 4 }, { 9, 2 } };
    safetensors *f = ops("embeddings");
    memory = arena_new(1 << 24);
    const st_tensor *v = need_tensor(f, "v");
    tensor x = tensor_new(&memory, SHAPE((int64_t)v->count, SINUSOIDS));
    for (int64_t i = 0; i < (int64_t)v->count; i++)
        sinusoids(number_of(v, i), x.data + i * SINUSOIDS);
    check_close(x, need_tensor(f, "sin256"), false, 1e-13, 1e-7);
    for (int64_t width = 32; width <= 48; width += 16) {
        const block_weights none = { .t_embed = { 0 } };
        tensor rows = tensor_new(&memory, SHAPE(40, width));
        for (int64_t i = 0; i < 40; i++)
            time_row(&none, i, width, rows.data + i * width);
        check_close(rows, need_tensor(f, "time_pe.%lld", (long long)width), false, 1e-13, 1e-7);
    }
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        int n = sizes[i][0], m = sizes[i][1];
        tensor in = tensor_from(need_tensor(f, "resize_pos.%dto%d.in", n, m), false);
        tensor out = tensor_new(&memory, SHAPE(m * m, in.dim[1]));
        resize_positions(out, in, n, m);
        check_close(out, need_tensor(f, "resize_pos.%dto%d.out", n, m), false, 1e-13, 2e-7);
    }
    arena_free(&memory);
    safetensors_close(f);
}

static void test_rotary(void)
{
    safetensors *f = ops("rotary");
    for (int64_t i = 0; i < f->count; i++) {
        int head, h, w, base, end = 0;
        const st_tensor *t = &f->tensors[i];
        if (sscanf(t->name, "hd%d.h%d.w%d.base%d.cos%n", &head, &h, &w, &base, &end) != 4 || t->name[end])
            continue;
        memory = arena_new(1 << 22);
        dit_config c = { .attention_head_dim = head, .patch_size = 64 / base };
        double *table = rotary_table(&memory, &c, h, w);
        tensor got[2] = { tensor_new(&memory, SHAPE(h * w, head)), tensor_new(&memory, SHAPE(h * w, head)) };
        for (int64_t k = 0; k < (int64_t)h * w * head; k++)     /* the public tables give each angle twice */
            for (int part = 0; part < 2; part++)
                got[part].data[k] = (real)table[k / 2 * 2 + part];
        check_close(got[0], t, false, 1e-13, 1e-7);
        check_close(got[1], need_tensor(f, "hd%d.h%d.w%d.base%d.sin", head, h, w, base), false, 1e-13, 1e-7);
        arena_free(&memory);
    }
    safetensors_close(f);
}

/* ---------------------------------------------------------------- norms and activations */

static void test_norms(void)
{
    static const int widths[] = { 48, 8, 88 };
    static const struct { const char *name; int groups; } cases[] = { { "12.1.2x2x3", 1 }, { "4.4.3x2x2", 4 }, { "6.3.1x2x2", 3 }, { "8.4.2x3x4", 4 } };
    safetensors *f = ops("norms");
    memory = arena_new(1 << 22);
    for (int i = 0; i < 3; i++) {
        char *name = text_of("ln.%d", widths[i]), *eps_names[3] = { text_of("1e-05"), text_of("1e-06"), text_of("%d", widths[i]) };
        double eps[3] = { 1e-5, 1e-6, widths[i] };
        for (int k = 0; k < 3; k++) {
            tensor x = tensor_from(need_tensor(f, "%s.in", name), false);
            layer_norm(&memory, x, x, layer_of(f, name), eps[k]);
            /* near-constant rows: rounding their input to float alone costs up to 9.3e-6 */
            check_close(x, need_tensor(f, "%s.eps%s", name, eps_names[k]), false, 1e-13, 2e-5);
            free(eps_names[k]);
        }
        free(name);
    }
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int frame = 0; frame < 2; frame++) {
            char *name = text_of("gn.%s", cases[i].name);
            tensor x = tensor_from(need_tensor(f, "%s.in", name), true);
            group_norm(&memory, x, x, cases[i].groups, frame ? 1 : x.dim[0], layer_of(f, name), false);
            check_close(x, need_tensor(f, "%s.%s", name, frame ? "frame" : "all"), true, 1e-13, 1e-6);
            free(name);
        }
    arena_free(&memory);
    safetensors_close(f);
}

static void test_activations(void)
{
    static const char *const names[] = { "silu", "gelu_tanh", "gelu_erf", "quick_gelu" };
    safetensors *f = ops("activations");
    memory = arena_new(1 << 22);
    for (int i = 0; i < 4; i++) {
        tensor x = tensor_from(need_tensor(f, "x"), false);
        activate(x, (activation)i);
        check_close(x, need_tensor(f, "%s", names[i]), false, 1e-14, 3e-7);
    }
    tensor x = tensor_from(need_tensor(f, "geglu.in"), false);
    layer_norm(&memory, x, x, layer_of(f, "geglu.norm"), number_of(need_tensor(f, "geglu.eps"), 0));
    tensor both = linear(&memory, x, layer_of(f, "geglu.proj")), y = tensor_new(&memory, SHAPE(x.dim[0], both.dim[1] / 2));
    gate_gelu(y, both);
    check_close(y, need_tensor(f, "geglu.out"), false, 1e-13, 1e-6);
    arena_free(&memory);
    safetensors_close(f);
}

/* The project's functions against libm in double over dense sweeps: the figures in their comments. */
static void test_functions(void)
{
    double worst[6] = { 0 };
    for (int i = -200000; i <= 200000; i++) {
        double x = i * 5e-4, s, c, e;               /* -100 .. 100 */
        real p = (real)(x * (fp64 ? 10 : 1.26));
        e = fabs((double)exp2_real(p) / exp2((double)p) - 1);
        worst[0] = e > worst[0] ? e : worst[0];
        e = fabs(exp_own(x * 7) / exp(x * 7) - 1);
        worst[1] = e > worst[1] ? e : worst[1];
        e = x > 0 ? fabs(log_own(x) - log(x)) / (fabs(log(x)) > 0.3 ? fabs(log(x)) : 0.3) : 0;
        worst[2] = e > worst[2] ? e : worst[2];
        e = x ? fabs(erf_own(x * 0.06) / erf(x * 0.06) - 1) : 0;
        worst[3] = e > worst[3] ? e : worst[3];
        sincos_own(x * 100, &s, &c);
        e = fabs(s - sin(x * 100)) + fabs(c - cos(x * 100));
        worst[4] = e > worst[4] ? e : worst[4];
    }
    CHECK(worst[0] <= (fp64 ? 4e-16 : 1.5e-7), "exp2_real: %.3g", worst[0]);
    CHECK(worst[1] <= 3e-16, "exp_own: %.3g", worst[1]);
    CHECK(worst[2] <= 3e-16, "log_own: %.3g", worst[2]);
    CHECK(worst[3] <= 1.2e-15, "erf_own: %.3g", worst[3]);
    CHECK(worst[4] <= 4e-16, "sincos_own: %.3g", worst[4]);
    worst[5] = fabs((double)silu_one(-20) * (1 + exp(20)) / -20 - 1);
    CHECK(worst[5] <= (fp64 ? 1e-14 : 2e-6), "silu far on the negative side: %.3g", worst[5]);
    CHECK(exp2_real(-(real)INFINITY) == 0 && exp2_real(-5000) == 0 && exp2_real(0) == 1, "exp2_real: small arguments");
    CHECK(isinf(exp2_real(5000)) && isnan(exp2_real((real)NAN)), "exp2_real: large arguments and nan");
    CHECK(log_own(1) == 0 && isinf(log_own(0)) && erf_own(7) == 1 && erf_own(-7) == -1 && erf_own(0) == 0 && isnan(erf_own(NAN)),
          "log_own, erf_own: special cases");
}

/* ---------------------------------------------------------------- weights in every type */

static void test_formats(void)
{
    static const char *const names[] = { "bf16", "f16", "f8_e4m3", "f8_e5m2" };
    safetensors *f = ops("formats");
    for (int i = 0; i < 4; i++) {
        const st_tensor *t = need_tensor(f, "%s", names[i]), *bits = need_tensor(f, "%s.bits32", names[i]);
        int different = 0;
        for (int64_t k = 0; k < (int64_t)t->count; k++) {
            real x;
            float want = bits_float(load32(bits->data + 4 * k));
            widen(t->data + k * dtype_bits[t->type] / 8, t->type, 1, &x);
            different += isnan(want) ? !isnan(x) : x != (real)want || (signbit(x) != 0) != (signbit(want) != 0);
        }
        CHECK(!different, "%s: %d of %llu codes widen to another value", names[i], different, (unsigned long long)t->count);
    }
    safetensors_close(f);
}

/* ---------------------------------------------------------------- the VAE's operations */

static weight taps_last(const st_tensor *t)
{
    weight w = stored_weight(t);
    int64_t taps = w.dim[2] * w.dim[3] * w.dim[4];
    double *copy = arena_alloc(&memory, (size_t)t->count, sizeof *copy);
    for (int64_t i = 0; i < (int64_t)t->count; i++)
        copy[(i / taps / w.dim[1] * taps + i % taps) * w.dim[1] + i / taps % w.dim[1]] = number_of(t, i);
    return (weight){ .data = (unsigned char *)copy, .type = F64, .ndim = 3, .dim = { w.dim[0], taps, w.dim[1] }, .key = t->name };
}

/* One stored convolution: conv.strideS.flagN.tT and, after a first cached slice, two that follow it. */
static void check_conv(const safetensors *f, int stride, pad_mode time, const char *name, tensor *cache)
{
    layer l = { taps_last(need_tensor(f, "conv.stride%d.weight", stride)), stored_weight(need_tensor(f, "conv.stride%d.bias", stride)) };
    const st_tensor *want = need_tensor(f, "%s.out", name);
    tensor x = tensor_from(need_tensor(f, "%s.in", name), true), y = tensor_new(&memory, SHAPE(want->dim[1], want->dim[2], want->dim[3], want->dim[0]));
    conv_spec s = { .kernel = { 3, 3, 3 }, .stride = { stride, stride, stride }, .pad = stride == 1, .up = 1, .time = time, .cache = cache };
    if (time == PAD_CACHE_FIRST)
        *cache = tensor_new(&memory, SHAPE(2, x.dim[1], x.dim[2], x.dim[3]));
    conv(&memory, y, x, s, l);
    check_close(y, want, true, 1e-13, 1e-6);
}

static void test_convolutions(void)
{
    static const int frames[] = { 1, 2, 3, 4, 5, 8 };
    static const pad_mode modes[] = { PAD_REPLICATE, PAD_SINGLE, PAD_SLICE, PAD_CACHE_FIRST };
    safetensors *f = ops("vae_ops");
    for (int stride = 1; stride <= 2; stride++)
        for (int m = 0; m < 4; m++)
            for (int t = 0; t < 6; t++) {
                char *name = text_of("conv.stride%d.flag%d.t%d", stride, (int)modes[m], frames[t]), *in = text_of("%s.in", name);
                char *next = text_of("%s.flag6", name), *last = text_of("%s.flag6b", name), *in6 = text_of("%s.flag6.in", name);
                tensor cache;
                memory = arena_new(1 << 22);
                if (safetensors_find(f, in))
                    check_conv(f, stride, modes[m], name, &cache);
                if (safetensors_find(f, in6) && stride == 1) {
                    check_conv(f, stride, PAD_CACHE_NEXT, next, &cache);
                    check_conv(f, stride, PAD_CACHE_NEXT, last, &cache);
                }
                arena_free(&memory);
                free(name), free(in), free(next), free(last), free(in6);
            }
    safetensors_close(f);
}

static void test_mid_attention(void)
{
    static const char *const names[] = { "3d", "spatial", "temporal" };
    safetensors *f = ops("vae_ops");
    for (int i = 0; i < 3; i++) {
        memory = arena_new(1 << 22);
        char *parts[5];
        static const char *const layers[] = { "group_norm", "to_q", "to_k", "to_v", "to_out" };
        layer l[5];
        for (int k = 0; k < 5; k++) {
            parts[k] = text_of("attn.%s.%s", names[i], layers[k]);
            l[k] = layer_of(f, parts[k]);
            free(parts[k]);
        }
        attention_weights b = { l[0], l[1], l[2], l[3], l[4] };
        vae_config c = { .norm_num_groups = 4, .mid_block_num_attention_heads = 2 };
        pass p = { .a = &memory, .c = &c };
        tensor x = tensor_from(need_tensor(f, "attn.%s.in", names[i]), true);
        if (i == 2)
            mid_attend_temporal(&p, x, &b);
        else
            mid_attend(&p, x, &b, i ? 1 : x.dim[0]);
        check_close(x, need_tensor(f, "attn.%s.out", names[i]), true, 1e-13, 1e-6);
        arena_free(&memory);
    }
    safetensors_close(f);
}

/* ---------------------------------------------------------------- kernels against the textbook loops: equal bytes */

static uint32_t noise_state = 1;
static real noise(void)
{
    noise_state = noise_state * 1664525u + 1013904223u;
    return (real)((int32_t)noise_state >> 8) / (real)(1 << 22);
}

static tensor noisy(shape s)
{
    tensor x = tensor_new(&memory, s);
    for (int64_t i = 0; i < tensor_count(x); i++)
        x.data[i] = noise();
    return x;
}

/* A weight of that type with random codes that are finite numbers, and its values widened. */
static weight noisy_weight(dtype t, shape s, real **widened_to)
{
    int64_t n = (int64_t)shape_count(s);
    size_t size = (size_t)dtype_bits[t] / 8;
    unsigned char *bytes = arena_alloc(&memory, (size_t)n, size);
    *widened_to = arena_alloc(&memory, (size_t)n, sizeof(real));
    for (int64_t i = 0; i < n; i++) {
        real x = noise() / 16;
        float as_float = (float)x;
        double as_double = (double)x;
        uint32_t bits = float_bits(as_float), sign = bits >> 31;
        uint16_t half = t == BF16 ? (uint16_t)(bits >> 16) : (uint16_t)(sign << 15 | (bits >> 13 & 0x3fff));
        unsigned char small = (unsigned char)(sign << 7 | (bits >> 16 & 0x3f));
        memcpy(bytes + (size_t)i * size, t == F64 ? (void *)&as_double : t == F32 ? (void *)&as_float : size == 2 ? (void *)&half : (void *)&small, size);
    }
    widen(bytes, t, n, *widened_to);
    weight w = { .data = bytes, .type = t, .ndim = s.ndim, .key = "random" };
    memcpy(w.dim, s.dim, sizeof w.dim);
    return w;
}

static void set_threads(int n)
{
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

static bool same_bytes(tensor a, tensor b) { return !memcmp(a.data, b.data, (size_t)tensor_count(a) * sizeof(real)); }

static void check_linear(int64_t m, int64_t n, int64_t k, dtype t, bool with_bias)
{
    memory = arena_new((size_t)1 << 27);
    real *w, *b;
    weight weights_ = noisy_weight(t, SHAPE(n, k), &w), bias = noisy_weight(F32, SHAPE(n), &b);
    tensor x = noisy(SHAPE(m, k)), want = tensor_new(&memory, SHAPE(m, n)), got = tensor_new(&memory, SHAPE(m, n));
    linear_plain(want.data, x.data, w, with_bias ? b : NULL, m, n, k);
    for (int threads = 1; threads <= 7; threads += threads < 3 ? 1 : 4) {
        set_threads(threads);
        tensor_fill(got, 7);
        linear_to(&memory, got, x, (layer){ weights_, with_bias ? bias : (weight){ 0 } });
        CHECK(same_bytes(got, want), "linear %lld x %lld x %lld, %s, %d threads", (long long)m, (long long)n, (long long)k,
              dtype_name[t], threads);
    }
    arena_free(&memory);
}

static void test_linear(void)
{
    static const dtype types[] = { F64, F32, F16, BF16, F8_E4M3, F8_E5M2 };
    static const int64_t edges[] = { 1, 2, 13, 14, 15, 16, 17, 31, 32, 33, 48, 63 };
    for (int i = 0; i < 12; i++)
        for (int k = 0; k < 12; k++)
            check_linear(edges[i], edges[k], 1 + 67 * (i + k), types[(i + k) % 6], (i ^ k) & 1);
    check_linear(901, 70, 255, BF16, true);         /* more than one block of rows */
    check_linear(20, 801, 513, F32, true);          /* more than one block of columns, three chunks */
    check_linear(130, 790, 256, F16, false);
}

/* Rounding to FP8: every BF16 number goes to the nearest code, of two as near to the even one. Above the last code of a
 * number comes infinity (E5M2) or nan, as if it were the next number. */
static void test_fp8(void)
{
    for (int e4m3 = 0; e4m3 < 2; e4m3++) {
        int64_t different = 0;
        for (uint32_t b = 0; b < 65536; b++) {
            unsigned char bytes[2] = { (unsigned char)b, (unsigned char)(b >> 8) };
            weight w = { .data = bytes, .type = BF16, .ndim = 2, .dim = { 1, 1 }, .fp8 = e4m3 ? F8_E4M3 : F8_E5M2 };
            double x = fabs((double)bits_float(b << 16)), low = 0, high = 0;
            uint32_t code = 0, last = e4m3 ? 0x7e : 0x7b;
            real got;
            weight_row(w, 0, 0, 1, &got);
            for (; code <= last; code++, low = high) {          /* low <= x < high, the codes code and code + 1 */
                high = code == last ? (e4m3 ? 480 : 65536) : (double)(e4m3 ? e4m3_float(code + 1) : f16_float((code + 1) << 8));
                if (x < high)
                    break;
            }
            bool up = code <= last && (x - low > high - x || (x - low == high - x && code & 1));
            double want = code > last || (up && code == last) ? (e4m3 ? NAN : INFINITY) : up ? high : low;
            want = isnan(x) ? NAN : b & 0x8000 ? -want : want;
            different += isnan(want) ? !isnan((double)got) : (double)got != want || signbit((double)got) != signbit(want);
        }
        CHECK(!different, "fp8 %s: %lld of 65536 numbers differ", e4m3 ? "e4m3" : "e5m2", (long long)different);
    }
}

/* Which layers --fp8 takes; sizes about the 2816^2 that no small model reaches. Sorted, as weights_find expects. */
static void test_fp8_rule(void)
{
    static const struct { const char *name; int ndim; uint64_t count; const char *modes; } layers[] = {
        { "blocks.0.attn1.norm_k", 1, 88, "" }, { "blocks.0.attn1.to_k", 2, 2816 * 2815, "x" }, { "blocks.0.attn1.to_q", 2, 2816 * 2816, "sx" },
        { "blocks.0.ff.net.2", 2, 2816 * 12288, "lsx" }, { "blocks.0.norm2", 1, 2816, "x" }, { "clip_projection.attn.out_proj", 2, 2816 * 2817, "" },
        { "clip_projection.kv_proj", 2, 48, "x" }, { "clip_projection.ln_kv", 1, 48, "" }, { "pos_embed.proj", 4, 2816 * 192, "" },
        { "time_extra_emb.style_embedder", 2, 2816, "" } };
    enum { COUNT = sizeof layers / sizeof *layers };
    st_tensor tensors[COUNT];
    const st_tensor *by_name[COUNT];
    for (int i = 0; i < COUNT; i++) {
        tensors[i] = (st_tensor){ .name = text_of("%s.weight", layers[i].name), .ndim = layers[i].ndim, .count = layers[i].count };
        by_name[i] = &tensors[i];
    }
    safetensors file = { .tensors = tensors, .by_name = by_name, .count = COUNT }, *files[] = { &file };
    weights w = { .files = files, .nfiles = 1 };
    CHECK(!fp8_of(&w, tensors[3].name), "fp8 is off");
    for (int mode = FP8_LITE; mode <= FP8_EXTREME; mode++)
        for (int i = 0; i < COUNT; i++) {
            char *bias = text_of("%s.bias", layers[i].name);
            choose_fp8(&w, (fp8_mode)mode, F8_E5M2);
            dtype want = strchr(layers[i].modes, "-lsx"[mode]) ? F8_E5M2 : (dtype)0;
            CHECK(fp8_of(&w, tensors[i].name) == want && fp8_of(&w, bias) == want, "fp8 mode %d of %s", mode, layers[i].name);
            free(bias);
        }
    CHECK(!fp8_of(&w, "blocks.0.t_embed.pe") && !fp8_of(&w, "clip_padding"), "fp8 of tables");
    for (int i = 0; i < COUNT; i++)
        free(tensors[i].name);
}

/* Low-rank updates: the widened matrix is what the product sees. */
static void test_lora(void)
{
    memory = arena_new((size_t)1 << 24);
    real *w, *up, *down;
    weight base = noisy_weight(BF16, SHAPE(33, 300), &w);
    lora second = { .up = noisy_weight(F32, SHAPE(33, 2), &up), .down = noisy_weight(F16, SHAPE(2, 300), &down), .scale = (real)0.5 };
    lora first = { .up = noisy_weight(F16, SHAPE(33, 3), &up), .down = noisy_weight(F32, SHAPE(3, 300), &down), .scale = (real)-1.5, .next = &second };
    base.lora = &first;
    tensor x = noisy(SHAPE(5, 300)), want = tensor_new(&memory, SHAPE(5, 33)), got = tensor_new(&memory, SHAPE(5, 33));
    tensor merged = tensor_new(&memory, SHAPE(33, 300));
    for (int64_t n = 0; n < 33; n++)
        weight_row(base, n, 0, 300, merged.data + n * 300);
    real expected = w[7 * 300 + 280], u;
    for (const lora *l = &first; l; l = l->next)
        for (int64_t r = 0; r < l->up.dim[1]; r++) {
            real d;
            weight_row(l->up, 7, r, 1, &u);
            weight_row(l->down, r, 280, 1, &d);
            expected = fma_real(u * l->scale, d, expected);
        }
    CHECK(merged.data[7 * 300 + 280] == expected, "lora: one element");
    linear_plain(want.data, x.data, merged.data, NULL, 5, 33, 300);
    linear_to(&memory, got, x, (layer){ .weight = base });
    CHECK(same_bytes(got, want), "lora: linear on the merged matrix");
    arena_free(&memory);
}

static void check_one_conv(int64_t frames, int64_t side, int64_t cin, int64_t cout, conv_spec s, dtype t)
{
    memory = arena_new((size_t)1 << 26);
    real *w, *b;
    int64_t taps = s.kernel[0] * s.kernel[1] * s.kernel[2];
    layer l = { noisy_weight(t, SHAPE(cout, taps, cin), &w), noisy_weight(F32, SHAPE(cout), &b) };
    tensor x = noisy(SHAPE(frames, side, side + 3, cin)), cache = noisy(SHAPE(2, side, side + 3, cin)), before = tensor_new(&memory, SHAPE(tensor_count(cache)));
    int64_t h = s.stride[1] == 1 ? side * s.up : side / s.stride[1], width = s.stride[2] == 1 ? (side + 3) * s.up : (side + 3) / s.stride[2];
    int64_t length = s.stride[0] == 1 ? frames : frames_down(frames);
    tensor want = tensor_new(&memory, SHAPE(length, h, width, cout)), got = tensor_new(&memory, SHAPE(length, h, width, cout));
    tensor_copy(before, cache);
    s.cache = &cache;
    conv_plain(want.data, x.data, w, b, x.dim, want.dim, s);
    for (int threads = 1; threads <= 7; threads += threads < 3 ? 1 : 4) {
        set_threads(threads);
        tensor_copy(cache, before);
        tensor_fill(got, 7);
        conv(&memory, got, x, s, l);
        CHECK(same_bytes(got, want), "conv %lld frames of %lld, %lld to %lld channels, time %d, %d threads", (long long)frames, (long long)side,
              (long long)cin, (long long)cout, (int)s.time, threads);
    }
    arena_free(&memory);
}

static void test_conv_bytes(void)
{
    static const pad_mode modes[] = { PAD_REPLICATE, PAD_SINGLE, PAD_SLICE, PAD_CACHE_FIRST, PAD_CACHE_NEXT };
    static const dtype types[] = { F32, BF16, F16, F8_E4M3 };
    for (int m = 0; m < 5; m++)
        for (int64_t frames = 1; frames <= 4; frames++) {
            conv_spec s = { .kernel = { 3, 3, 3 }, .stride = { 1, 1, 1 }, .pad = 1, .up = 1, .time = modes[m] };
            check_one_conv(frames, 5, 3 + 7 * m, 1 + 11 * frames, s, types[frames % 4]);
            s.up = 2;
            check_one_conv(frames, 3, 12, 17, s, types[m % 4]);
            s = (conv_spec){ .kernel = { 3, 3, 3 }, .stride = { 1, 2, 2 }, .up = 1, .time = modes[m] };
            check_one_conv(frames, 6, 31, 33, s, BF16);
            s.stride[0] = 2;
            if (m < 3)
                check_one_conv(frames, 6, 5, 9, s, F32);
        }
    check_one_conv(2, 8, 6, 20, (conv_spec){ .kernel = { 1, 2, 2 }, .stride = { 1, 2, 2 }, .up = 1 }, F16);
}

static void check_attention(int64_t sequences, int64_t nq, int64_t nk, int64_t heads, int64_t head, real size)
{
    memory = arena_new((size_t)1 << 27);
    tensor q = noisy(SHAPE(sequences * nq, heads * head)), k = noisy(SHAPE(sequences * nk, heads * head)), v = noisy(SHAPE(sequences * nk, heads * head));
    tensor want = tensor_new(&memory, SHAPE(sequences * nq, heads * head)), got = tensor_new(&memory, SHAPE(sequences * nq, heads * head));
    for (int64_t i = 0; i < tensor_count(q); i++)
        q.data[i] *= size;
    for (int64_t s = 0; s < sequences; s++)
        attention_plain(tensor_part(want, s * nq, nq).data, tensor_part(q, s * nq, nq).data, tensor_part(k, s * nk, nk).data,
                        tensor_part(v, s * nk, nk).data, nq, nk, heads, head);
    for (int threads = 1; threads <= 7; threads += threads < 3 ? 1 : 4) {
        set_threads(threads);
        tensor_fill(got, 7);
        attention(&memory, got, q, k, v, sequences, heads);
        CHECK(same_bytes(got, want), "attention %lld x (%lld, %lld), %lld heads of %lld, %d threads", (long long)sequences, (long long)nq,
              (long long)nk, (long long)heads, (long long)head, threads);
    }
    attention(&memory, q, q, k, v, sequences, heads);
    CHECK(same_bytes(q, want), "attention over its own queries");
    arena_free(&memory);
}

static void test_attention(void)
{
    static const int64_t queries[] = { 1, 15, 33, 256, 257 }, keys[] = { 1, 17, 255, 256, 257, 600 }, widths[] = { 1, 12, 28, 88, 300 };
    for (int i = 0; i < 5; i++)
        for (int k = 0; k < 6; k++)
            check_attention(1 + i % 2, queries[i], keys[k], 1 + k % 3, widths[(i + k) % 5], k % 2 ? 1 : 30);
}

/* ---------------------------------------------------------------- memory */

/* The plan is what the real pass takes: a whole generation, the embedded model. */
static void test_plan(void)
{
    static job j;
    j = (job){ .model = "weights/ruyi-tiny", .frames = 16, .steps = 1, .cfg = 7, .camera = "auto", .motion = "auto", .width = 64, .height = 48,
               .quiet = true, .start = { { 8, 8, allocate(192, 1) } }, .starts = 1 };
    open_generate(&j);
    fit_pictures(&j);
    set_threads(2);
    run_plan p = plan(&j, flow_generate);
    arena a = arena_new(p.bytes);
    run r = run_of(&j, &a);
    flow_generate(&r, &j);
    CHECK(a.peak == p.bytes, "the plan says %zu bytes, the run took %zu", p.bytes, a.peak);
    for (int i = 0; i < WORKS; i++)
        CHECK(a.work[i] == p.work[i] && p.work[i] > 0, "the plan says %g operations, the run took %g", p.work[i], a.work[i]);
    CHECK(p.out.clip.frames == 16 && p.out.clip.w == 64 && p.out.clip.h == 48, "planned size");
    arena_free(&a);
}

/* Slices with the same pixels are encoded once, unless somebody looks: to the same numbers. The first slice differs, the
 * others are grey, the last in one pixel. */
static void test_equal_slices(void)
{
    vae *v = vae_open("weights/ruyi-tiny/vae", true, false, (vae_tiling){ 0 }, false);
    int64_t batch = vae_settings(v)->mini_batch_encoder;
    arena memory = arena_new((size_t)1 << 26);
    tensor pixels = tensor_new(&memory, SHAPE(5 * batch, 24, 16, 3)), got[2];
    tensor_fill(pixels, 0.5f);
    tensor_fill(tensor_part(pixels, 0, 2), -1);
    pixels.data[tensor_count(pixels) - 1] = 0;
    for (int looks = 0; looks < 2; looks++)
        got[looks] = vae_encode(&(run){ .arena = &memory, .hooks = looks ? &(hooks){ 0 } : NULL }, v, pixels);
    CHECK(same_bytes(got[0], got[1]), "equal slices, encoded once and one by one");
    int64_t f = got[0].dim[0] / 5;
    CHECK(same_bytes(tensor_part(got[0], f, f), tensor_part(got[0], 2 * f, f)), "equal slices, equal moments");
    CHECK(!same_bytes(tensor_part(got[0], f, f), tensor_part(got[0], 4 * f, f)), "one pixel makes another slice");
    arena_free(&memory);
}

/* Bytes as a checkpoint of that identity. */
static bool is_checkpoint(const unsigned char *bytes, size_t size, const uint64_t identity[IDENTITY])
{
    char reason[REASON];
    safetensors file;
    bool taken = safetensors_parse(bytes, size, &file, reason);
    if (!taken)
        return false;
    taken = checkpoint_check(&file, identity, reason);
    safetensors_free(&file);
    return taken;
}

/* A checkpoint, kept twice, comes back; every prefix, every changed bit, and every other identity is refused. */
static void test_checkpoint(void)
{
    char folder[] = "/tmp/ruyi-unit-XXXXXX", *found = mkdtemp(folder), *path = text_of("%s/ck", folder);
    double operations[WORKS] = { 1, 2, 3 };
    const real numbers[] = { 1, -2, (real)0.1 };
    real back[3] = { 0 };
    struct checkpoint k = { .path = path, .identity = { 11, 12, 13, 14 }, .work = operations };
    run r = { .checkpoint = &k };
    CHECK(found != NULL, "no folder in /tmp");
    tensor x = { .data = (real *)(uintptr_t)numbers, .ndim = 1, .dim = { 3 } }, y = { .data = back, .ndim = 1, .dim = { 3 } };
    CHECK(!slice_restored(&r, y), "a slice of no file");
    slice_save(&r, x);
    checkpoint_write(&k, (st_entry[]){ entry_of("second", x) }, 1, true);
    k.slices = 0;
    CHECK(k.file->count == 5 && slice_restored(&r, y) && !memcmp(back, numbers, sizeof back), "a slice comes back");
    size_t size = k.file->size;
    unsigned char *bytes = allocate(size, 1);
    memcpy(bytes, k.file->map, size);
    CHECK(is_checkpoint(bytes, size, k.identity), "the right checkpoint");
    for (size_t n = 0; n < size; n++)
        CHECK(!is_checkpoint(bytes, n, k.identity), "took %zu of %zu bytes", n, size);
    for (size_t bit = 0; bit < 8 * size; bit++) {
        bytes[bit / 8] ^= (unsigned char)(1 << bit % 8);
        CHECK(!is_checkpoint(bytes, size, k.identity), "took it with bit %zu changed", bit);
        bytes[bit / 8] ^= (unsigned char)(1 << bit % 8);
    }
    for (int i = 0; i < IDENTITY; i++) {
        k.identity[i]++;
        CHECK(!is_checkpoint(bytes, size, k.identity), "took another's, %d", i);
        k.identity[i]--;
    }
    safetensors_close(k.file);
    free(bytes);
    CHECK(unlink(path) == 0 && rmdir(folder) == 0, "something is left in %s", folder);
    free(path);
}

/* Calls of the transformer with plug-ins that sleep in the first: the plan must foresee all. */
static size_t three_calls(arena *a, const dit *d, bool enhanced, bool cached, bool looked_at)
{
    enum { FRAMES = 4, SIDE = 32, TOKENS_ALL = FRAMES * SIDE / 2 * SIDE / 2 };
    int64_t size = d->config.hidden_size;
    run r = { .arena = a, .hooks = looked_at ? &(hooks){ 0 } : NULL };
    tea_cache tea = { .threshold = cached ? 0.1 : 0, .skip_start = 2, .skip_end = 1, .steps = 4 };
    enhance eav = { .enabled = enhanced, .weight = 1, .skip_start = 1, .steps = 4 };
    if (cached) {
        tea.last = tensor_new_high(a, SHAPE(2 * TOKENS_ALL, size));
        tea.residual = tensor_new_high(a, SHAPE(2, TOKENS_ALL, size));
    }
    dit_condition c = { .rows = 2, .extra = tensor_new(a, SHAPE(2, size)), .text = tensor_new(a, SHAPE(2, 16, d->config.cross_attention_dim)),
                        .image = tensor_new(a, SHAPE(2, 16, d->config.cross_attention_dim)) };
    c.padding = c.image;
    tensor latents = tensor_new(a, SHAPE(FRAMES, SIDE, SIDE, 16)), inpaint = tensor_new(a, SHAPE(FRAMES, SIDE, SIDE, 32));
    tensor all[] = { c.extra, c.text, c.image, latents, inpaint };
    for (int i = 0; i < 5; i++)
        for (int64_t k = 0; k < tensor_count(all[i]) && !a->planning; k++)
            all[i].data[k] = noise();
    for (int64_t i = 0; i < 3; i++) {
        size_t mark = arena_mark(a);
        dit_forward(&r, d, &c, latents, inpaint, 500, true, i, &tea, &eav);
        arena_reset(a, mark);
    }
    return a->peak;
}

static void test_forward_plan(void)
{
    dit *d = dit_open("weights/ruyi-tiny/transformer", (dit_changes){ 0 }, false);
    for (int i = 0; i < 8; i++) {
        arena planned = arena_plan();
        size_t bytes = three_calls(&planned, d, i & 1, i & 2, i & 4), used;
        memory = arena_new(bytes);
        used = three_calls(&memory, d, i & 1, i & 2, i & 4);
        CHECK(used == bytes, "plug-ins %d: the plan says %zu bytes, the calls took %zu", i, bytes, used);
        arena_free(&memory);
    }
}

int main(void)
{
    test_io();
    test_randn();
    test_cuda_randn();
    test_schedulers();
    test_scheduler_fields();
    test_buckets();
    test_embeddings();
    test_rotary();
    test_norms();
    test_activations();
    test_functions();
    test_formats();
    test_convolutions();
    test_mid_attention();
    test_linear();
    test_fp8();
    test_fp8_rule();
    test_lora();
    test_conv_bytes();
    test_attention();
    test_plan();
    test_equal_slices();
    test_checkpoint();
    test_forward_plan();
    printf("%d passed, %d failed\n", passed, failed);
    return failed ? DIFFERS : DONE;
}
