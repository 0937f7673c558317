/* ruyi.c - the program: schedulers, the pipeline from pictures to frames, and the command line.
 *
 * Read from the bottom: main() finds the command, which fills a job and calls one of the flows. generate() is the whole
 * model, one line a stage. Each flow runs twice with the same code: first in a planning arena, without data, which
 * checks every shape and counts the memory; then for real, in one block of exactly that size.
 *
 *     schedulers   five rules, one sched_step; tables in float32, bit for bit torch's
 *     pipeline     pixels, mask -> latents -> steps -> video -> bytes
 *     info         what a folder or file holds, and what a run would need
 *     options      one table: parsing, --help and spelling advice come from it
 *
 * Mirrors: predict_i2v.py, ruyi/pipeline/pipeline_ruyi_inpaint.py, ruyi/utils/utils.py, ruyi/data/bucket_sampler.py of
 * the public code, and diffusers' schedulers.
 */
#define _POSIX_C_SOURCE 200809L     /* clock_gettime, isatty, sigaction */
#include "ruyi.h"

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* ---------------------------------------------------------------- schedulers: configuration */

static const char *const sched_names[SCHEDULERS] = { "ddim", "euler", "euler_a", "dpm++", "pndm" };

/* The place of a field's word in a list; dies naming the words. */
static int read_choice(config f, const char *field, const char *otherwise, const char *const *words, int count)
{
    char *word = config_word(f, field, otherwise);
    for (int i = 0; i < count; i++)
        if (!strcmp(word, words[i])) {
            free(word);
            return i;
        }
    config_refuse(f, field, "which is not supported; %s is near", nearest_word(word, words, count));
}

/* Fields of which only one value is supported, refused by name otherwise. */
static void refuse_true(config f, const char *field)
{
    if (config_bool(f, field, false))
        config_refuse(f, field, "expected false; it is not supported");
}

static void refuse_other(config f, const char *field, const char *only)
{
    read_choice(f, field, only, &only, 1);
}

static void refuse_unsupported(config f, sched_type type)
{
    static const char *const spacings[] = { "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
                                            "use_flow_sigmas" };
    if (type == EULER || type == DPMPP)
        for (int i = 0; i < 5; i++)
            refuse_true(f, spacings[i]);
    if (type == EULER || type == DPMPP)
        refuse_other(f, "final_sigmas_type", "zero");
    if (type == EULER) {
        refuse_other(f, "interpolation_type", "linear");
        refuse_other(f, "timestep_type", "discrete");
    }
    if (type == DPMPP) {
        refuse_other(f, "algorithm_type", "dpmsolver++");
        refuse_other(f, "solver_type", "midpoint");
        config_int(f, "solver_order", 2, 2, 2);
        json clipped = config_member(f, "lambda_min_clipped");
        if (json_kind(clipped) && !(json_number(clipped) < -1e300))
            config_refuse(f, "lambda_min_clipped", "expected -Infinity; clipping is not supported");
    }
    if (type == PNDM)
        refuse_true(f, "skip_prk_steps");
    if (type == DDIM || type == DPMPP)
        refuse_true(f, "thresholding");
}

static float *read_betas(config f, int64_t n)
{
    json list = config_member(f, "trained_betas"), cursor = { 0 }, value;
    if (json_kind(list) == 0)
        return NULL;
    float *betas = allocate((size_t)n, sizeof *betas);
    int64_t count = 0;
    while (json_kind(list) == '[' && json_next(list, &cursor, NULL, &value) && json_kind(value) == '0') {
        if (count < n)
            betas[count] = (float)json_number(value);
        count++;
    }
    if (count != n)
        config_refuse(f, "trained_betas", "expected a list of num_train_timesteps = %lld numbers", (long long)n);
    return betas;
}

/* Reads a model's scheduler/ as diffusers' class of that type would: fields that a class does not have are ignored, and
 * what a file leaves out has that class's default. */
sched_config sched_read(const char *folder, sched_type type)
{
    static const char *const schedules[] = { "linear", "scaled_linear", "squaredcos_cap_v2" };
    static const char *const predictions[] = { "epsilon", "sample", "v_prediction" };
    static const char *const spacings[] = { "leading", "trailing", "linspace" };
    config f = config_open(folder, "scheduler_config.json");
    bool ddim = type == DDIM, leading = ddim || type == PNDM;
    sched_config c = {
        .file = f, .type = type,
        .num_train_timesteps = config_int(f, "num_train_timesteps", 1000, 2, 1000000),
        .steps_offset = config_int(f, "steps_offset", 0, 0, 1000000),
        .beta_start = config_real(f, "beta_start", 0.0001), .beta_end = config_real(f, "beta_end", 0.02),
        .beta_schedule = schedules[read_choice(f, "beta_schedule", "linear", schedules, 3)],
        .prediction_type = (prediction)read_choice(f, "prediction_type", "epsilon", predictions, 3),
        .timestep_spacing = (spacing)read_choice(f, "timestep_spacing", leading ? "leading" : "linspace", spacings, 3),
        .set_alpha_to_one = config_bool(f, "set_alpha_to_one", ddim),
        .clip_sample = ddim && config_bool(f, "clip_sample", true),
        .clip_sample_range = config_real(f, "clip_sample_range", 1.0),
        .rescale_betas_zero_snr = type != PNDM && config_bool(f, "rescale_betas_zero_snr", false),
    };
    c.trained_betas = read_betas(f, c.num_train_timesteps);
    refuse_unsupported(f, type);
    if (c.prediction_type == SAMPLE && (type == EULER_A || type == PNDM))
        config_refuse(f, "prediction_type", "which %s does not take; choose another --scheduler", sched_names[type]);
    if (!(c.beta_start >= 0 && c.beta_end >= 0 && c.beta_start <= 1 && c.beta_end <= 1))
        config_refuse(f, "beta_start", "expected beta_start and beta_end from 0 to 1");
    return c;
}

/* ---------------------------------------------------------------- schedulers: tables */

/* torch.linspace(a, z, n) in float32, as its AVX2 code has it: fused, from the nearer end. */
static float linspace_f32(float a, float z, int64_t n, int64_t i)
{
    float step = (z - a) / (float)(n - 1);
    return i < n / 2 ? fmaf(step, (float)i, a) : fmaf(-step, (float)(n - 1 - i), z);
}

static double cosine_bar(double t)
{
    double sine, cosine;
    sincos_own((t + 0.008) / 1.008 * 3.14159265358979323846 / 2, &sine, &cosine);
    return cosine * cosine;
}

static void fill_betas(const sched_config *c, float *betas)
{
    int64_t n = c->num_train_timesteps;
    bool root = !strcmp(c->beta_schedule, "scaled_linear"), cosine = !strcmp(c->beta_schedule, "squaredcos_cap_v2");
    for (int64_t i = 0; i < n; i++) {
        float l = linspace_f32((float)(root ? sqrt(c->beta_start) : c->beta_start), (float)(root ? sqrt(c->beta_end) : c->beta_end), n, i);
        double capped = 1 - cosine_bar((double)(i + 1) / (double)n) / cosine_bar((double)i / (double)n);
        betas[i] = c->trained_betas ? c->trained_betas[i] : cosine ? (float)(capped < 0.999 ? capped : 0.999) : root ? l * l : l;
    }
}

/* out = running product of 1 - beta, in double, each rounded. torch.cumprod. */
static void running_product(const float *betas, float *out, int64_t n)
{
    double product = 1;
    for (int64_t i = 0; i < n; i++) {
        product *= (double)(1.0f - betas[i]);
        out[i] = (float)product;
    }
}

/* rescale_zero_terminal_snr: sqrt of the products shifted and scaled so that the last is 0 and the first stays. */
static void rescale_betas(float *betas, float *products, int64_t n)
{
    running_product(betas, products, n);
    float first = sqrtf(products[0]), last = sqrtf(products[n - 1]), previous = 1;
    for (int64_t i = 0; i < n; i++) {
        float root = (sqrtf(products[i]) - last) * (first / (first - last)), bar = root * root;
        betas[i] = 1 - (i ? bar / previous : bar);
        previous = bar;
    }
}

static bool has_sigmas(sched_type t) { return t == EULER || t == EULER_A || t == DPMPP; }

/* timesteps[k], k = 0 .. N-1, first (noisiest) to last. */
static void fill_timesteps(const sched_config *c, int64_t steps, double *timesteps)
{
    int64_t n = c->num_train_timesteps, points = c->type == DPMPP ? steps + 1 : steps;
    for (int64_t k = 0; k < steps; k++) {
        int64_t up = points - 1 - k;        /* counted from the cleanest */
        double t;
        if (c->timestep_spacing == LEADING)
            t = (double)(up * (n / points) + c->steps_offset);
        else if (c->timestep_spacing == TRAILING)
            t = rint((double)n - (double)k * ((double)n / (double)steps)) - 1;
        else if (up == points - 1 && points > 1)
            t = (double)(n - 1);
        else
            t = points > 1 ? (double)up * ((double)(n - 1) / (double)(points - 1)) : 0;
        if (c->timestep_spacing == LINSPACE)
            t = c->type == EULER || c->type == EULER_A ? (double)(float)t : rint(t);
        timesteps[k] = t;
    }
}

/* PNDM's calls: for the three highest steps b, with the next lower c: b, c+g, c+g, c; then the rest. */
static void fill_pndm(const sched_config *c, int64_t steps, double *calls)
{
    double *base = allocate((size_t)steps, sizeof *base), half = (double)(c->num_train_timesteps / steps / 2);
    fill_timesteps(c, steps, base);
    for (int i = 0; i < 12; i++)
        calls[i] = i % 4 == 0 ? base[i / 4] : base[i / 4 + 1] + (i % 4 < 3 ? half : 0);
    for (int64_t k = 3; k < steps; k++)
        calls[k + 9] = base[k];
    free(base);
}

/* s_t = sqrt((1-A)/A) in float32, interpolated at the timesteps, 0 at the end. */
static void fill_sigmas(scheduler *s)
{
    int64_t n = s->config.num_train_timesteps;
    const float *a = s->alphas_cumprod;
    for (int64_t k = 0; k < s->calls; k++) {
        double t = s->timesteps[k] < 0 ? 0 : s->timesteps[k] > (double)(n - 1) ? (double)(n - 1) : s->timesteps[k];
        int64_t low = (int64_t)t < n - 1 ? (int64_t)t : n - 2;
        float lower = sqrtf((1.0f - a[low]) / a[low]), upper = sqrtf((1.0f - a[low + 1]) / a[low + 1]);
        double slope = (double)upper - (double)lower;
        s->sigmas[k] = t == (double)(low + 1) ? upper : (float)(slope * (t - (double)low) + (double)lower);
    }
    s->sigmas[s->calls] = 0;
}

/* A scheduler for that many steps; history tensors of the latents' shape come from the arena's high end. */
scheduler sched_new(arena *a, sched_config c, int64_t steps, shape latents)
{
    size_t n = (size_t)c.num_train_timesteps;
    scheduler s = { .config = c, .steps = steps, .calls = c.type == PNDM ? steps + 9 : steps, .init_noise_sigma = 1 };
    s.betas = allocate(n, sizeof *s.betas);
    s.alphas_cumprod = allocate(n, sizeof *s.alphas_cumprod);
    s.timesteps = allocate((size_t)s.calls, sizeof *s.timesteps);
    s.sigmas = allocate((size_t)s.calls + 1, sizeof *s.sigmas);
    fill_betas(&c, s.betas);
    if (c.rescale_betas_zero_snr)
        rescale_betas(s.betas, s.alphas_cumprod, c.num_train_timesteps);
    running_product(s.betas, s.alphas_cumprod, c.num_train_timesteps);
    if (c.rescale_betas_zero_snr && has_sigmas(c.type))
        s.alphas_cumprod[n - 1] = 0x1p-24f;     /* so that the largest sigma is finite */
    (c.type == PNDM ? fill_pndm : fill_timesteps)(&c, steps, s.timesteps);
    if (has_sigmas(c.type))
        fill_sigmas(&s);
    if (c.type == EULER || c.type == EULER_A) {
        double first = (double)s.sigmas[0];
        s.init_noise_sigma = c.timestep_spacing == LEADING ? sqrt(first * first + 1) : first;
    }
    for (int i = 0; i < (c.type == PNDM ? 5 : c.type == DPMPP ? 1 : 0); i++)
        s.history[i] = tensor_new_high(a, latents);
    return s;
}

void sched_free(scheduler *s)
{
    free(s->betas);
    free(s->alphas_cumprod);
    free(s->timesteps);
    free(s->sigmas);
    *s = (scheduler){ 0 };
}

/* ---------------------------------------------------------------- schedulers: steps
 *
 * x is the sample, v the model's output. Factors are computed in double from the float32 tables, the element's sums in
 * `real`. Formulas: diffusers' classes of those names; DDIM eta 0.
 */

/* y = p x + q v, element by element; y may be x or v. */
static void blend_to(tensor y, tensor x, tensor v, double p, double q)
{
    real a = (real)p, b = (real)q;
    for (int64_t i = 0; i < tensor_count(y) && y.data; i++)
        y.data[i] = a * x.data[i] + b * v.data[i];
}

/* x = scale_model_input(sample) for the next call. */
void sched_input(const scheduler *s, tensor x, tensor sample)
{
    double sigma = (double)s->sigmas[s->index];
    bool scaled = s->config.type == EULER || s->config.type == EULER_A;
    blend_to(x, sample, sample, scaled ? 1 / sqrt(sigma * sigma + 1) : 1, 0);
}

/* The predicted clean sample is p x + q v, where alpha^2 + beta^2 = 1 are what is signal and what is noise in x. */
static void clean_factors(prediction type, double alpha, double beta, double *p, double *q)
{
    *p = type == V_PREDICTION ? alpha : type == EPSILON ? 1 / alpha : 0;
    *q = type == V_PREDICTION ? -beta : type == EPSILON ? -beta / alpha : 1;
}

static double alpha_at(const scheduler *s, double t)
{
    if (t < 0)
        return s->config.set_alpha_to_one ? 1 : (double)s->alphas_cumprod[0];
    int64_t last = s->config.num_train_timesteps - 1;
    return (double)s->alphas_cumprod[(int64_t)t < last ? (int64_t)t : last];
}

/* x' = sqrt(P) x0 + sqrt(1-P) e. */
static void step_ddim(const scheduler *s, tensor x, tensor v)
{
    double t = s->timesteps[s->index], now = alpha_at(s, t);
    double then = alpha_at(s, t - (double)(s->config.num_train_timesteps / s->steps));
    double alpha = sqrt(now), beta = sqrt(1 - now), p, q;
    clean_factors(s->config.prediction_type, alpha, beta, &p, &q);
    real clean_x = (real)p, clean_v = (real)q, bound = (real)s->config.clip_sample_range;
    real keep = (real)sqrt(then), noise = (real)sqrt(1 - then), a = (real)alpha, b = (real)beta;
    for (int64_t i = 0; i < tensor_count(x) && x.data; i++) {
        real xi = x.data[i], vi = v.data[i], x0 = clean_x * xi + clean_v * vi;
        real e = s->config.prediction_type == V_PREDICTION ? a * vi + b * xi : s->config.prediction_type == EPSILON ? vi : (xi - a * x0) / b;
        if (s->config.clip_sample)
            x0 = x0 < -bound ? -bound : x0 > bound ? bound : x0;
        x.data[i] = keep * x0 + noise * e;
    }
}

/* x' = x + (x - x0)/s (down - s) + up noise; plain Euler has up = 0 and down = s'. Here x = (clean + s noise). */
static void step_euler(const scheduler *s, tensor x, tensor v, tensor noise)
{
    double sigma = (double)s->sigmas[s->index], next = (double)s->sigmas[s->index + 1], size = sqrt(sigma * sigma + 1), p, q;
    double up = noise.data ? sqrt(next * next * (sigma * sigma - next * next) / (sigma * sigma)) : 0;
    double down = noise.data ? sqrt(next * next - up * up) : next;
    clean_factors(s->config.prediction_type, 1 / size, sigma / size, &p, &q);
    real clean_x = (real)(p / size), clean_v = (real)q, step = (real)(down - sigma), divisor = (real)sigma, amount = (real)up;
    for (int64_t i = 0; i < tensor_count(x) && x.data; i++) {
        real x0 = clean_x * x.data[i] + clean_v * v.data[i];
        x.data[i] = x.data[i] + (x.data[i] - x0) / divisor * step;
        if (noise.data)
            x.data[i] += amount * noise.data[i];
    }
}

/* Second order, midpoint; first order in the first and the last step. history[0]: the clean sample of the step before. */
static void step_dpmpp(const scheduler *s, tensor x, tensor v)
{
    double la[3] = { 0 }, al[3], be[3];     /* the step before, now, next */
    for (int64_t i = 0; i < 3; i++) {
        int64_t at = s->index - 1 + i;
        double sigma = at < 0 ? 0 : (double)s->sigmas[at];
        al[i] = 1 / sqrt(sigma * sigma + 1);
        be[i] = sigma * al[i];
        la[i] = sigma > 0 ? log_own(al[i]) - log_own(be[i]) : 0;
    }
    double p, q, h = la[2] - la[1], ratio = (la[1] - la[0]) / h;
    bool last = s->index + 1 == s->calls, second = s->index > 0 && !last;
    clean_factors(s->config.prediction_type, al[1], be[1], &p, &q);
    real clean_x = (real)p, clean_v = (real)q, keep = (real)(be[2] / be[1]);
    real gain = (real)(last ? 1 : -al[2] * (exp_own(-h) - 1)), bend = (real)(second ? 1 / (2 * ratio) : 0);
    for (int64_t i = 0; i < tensor_count(x) && x.data; i++) {
        real m = clean_x * x.data[i] + clean_v * v.data[i], m0 = s->history[0].data[i];
        s->history[0].data[i] = m;
        x.data[i] = keep * x.data[i] + gain * (second ? m + bend * (m - m0) : m);
    }
}

/* R(x, t, p, m): the transfer of x from t to p along the model's output m. */
static void pndm_transfer(const scheduler *s, tensor y, tensor x, double t, double p, tensor m)
{
    double a = alpha_at(s, t), b = alpha_at(s, p), root = sqrt(a), rest = sqrt(1 - a);
    double keep = sqrt(b / a), change = (b - a) / (a * sqrt(1 - b) + sqrt(a * (1 - a) * b));
    real e_m = (real)(s->config.prediction_type == V_PREDICTION ? root : 1), e_x = (real)(s->config.prediction_type == V_PREDICTION ? rest : 0);
    real k = (real)keep, c = (real)change;
    for (int64_t i = 0; i < tensor_count(x) && x.data; i++)
        y.data[i] = k * x.data[i] - c * (e_m * m.data[i] + e_x * x.data[i]);
}

static void add_part(tensor y, tensor v, double part) { blend_to(y, y, v, 1, part); }

/* Runge-Kutta warm-up: three steps of four calls, from b to the next lower c. Every call starts from the sample at b
 * (history[3]); the fourth takes v1/6 + v2/3 + v3/3 + v4/6 (history[4]). */
static void pndm_warm_up(scheduler *s, tensor x, tensor v)
{
    static const double share[4] = { 1.0 / 6, 1.0 / 3, 1.0 / 3, 1.0 / 6 };
    int64_t j = s->index % 4, first = s->index - j;
    tensor start = s->history[3], sum = s->history[4];
    double half = (double)(s->config.num_train_timesteps / s->steps / 2), b = s->timesteps[first], c = s->timesteps[first + 3];
    if (j == 0) {
        tensor_copy(start, x);
        tensor_fill(sum, 0);
    }
    add_part(sum, v, share[j]);
    pndm_transfer(s, x, start, b, j == 0 ? b - half : j == 1 ? c + half : c, j == 3 ? sum : v);
}

/* Moves history down and puts v in front. */
static void remember_output(scheduler *s, tensor v)
{
    tensor oldest = s->history[2];
    s->history[2] = s->history[1];
    s->history[1] = s->history[0];
    s->history[0] = oldest;
    tensor_copy(s->history[0], v);
}

/* Warm-up, then Adams-Bashforth of order four on the outputs. */
static void step_pndm(scheduler *s, tensor x, tensor v)
{
    if (s->index < 12) {
        if (s->index % 4 == 0)
            remember_output(s, v);
        pndm_warm_up(s, x, v);
        return;
    }
    tensor m = s->history[4];
    double t = s->timesteps[s->index];
    blend_to(m, v, s->history[0], 55.0 / 24, -59.0 / 24);
    add_part(m, s->history[1], 37.0 / 24);
    add_part(m, s->history[2], -9.0 / 24);
    remember_output(s, v);
    pndm_transfer(s, x, x, t, t - (double)(s->config.num_train_timesteps / s->steps), m);
}

/* The sample of the next call, in place. noise: of the sample's shape, for Euler A alone. */
void sched_step(scheduler *s, tensor sample, tensor v, tensor noise)
{
    switch (s->config.type) {
    case DDIM: step_ddim(s, sample, v); break;
    case EULER: step_euler(s, sample, v, (tensor){ 0 }); break;
    case EULER_A: step_euler(s, sample, v, noise); break;
    case DPMPP: step_dpmpp(s, sample, v); break;
    default: step_pndm(s, sample, v); break;
    }
    s->index++;
}

/* ---------------------------------------------------------------- progress */

struct progress {
    bool terminal;
    double start, stage_start, last_line;   /* seconds */
    const char *stage;
    int64_t step, steps;                    /* of the denoising loop, for its blocks */
};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void print_span(double seconds)
{
    if (seconds < 100)
        fprintf(stderr, "%.1f s", seconds);
    else
        fprintf(stderr, "%d:%02d:%02d", (int)(seconds / 3600), (int)(seconds / 60) % 60, (int)seconds % 60);
}

static void print_bar(double part)
{
    enum { WIDTH = 30 };
    int full = (int)(part * WIDTH + 0.5);
    fputs("[", stderr);
    for (int i = 0; i < WIDTH; i++)
        fputc(i < full ? '#' : '.', stderr);
    fputs("] ", stderr);
}

/* `part` of the stage is done: what is under way, how long one step takes, how long until the end of the stage. */
static void print_progress(struct progress *p, int64_t done, int64_t total, double part, double time)
{
    double spent = time - p->stage_start;
    bool steps = !strcmp(p->stage, "denoise");
    fprintf(stderr, p->terminal ? "\r\033[K%-8s" : "%-8s", p->stage);
    if (p->terminal)
        print_bar(part);
    fprintf(stderr, "%s%lld/%lld %3.0f %%  ", steps ? "step " : "", (long long)done, (long long)total, 100 * part);
    if (steps && part > 0) {
        print_span(spent / (part * (double)total));
        fputs(" a step  ", stderr);
    }
    if (done < total && part > 0) {
        print_span(spent / part * (1 - part));
        fputs(" left", stderr);
    } else {
        print_span(spent);
    }
    fputs(p->terminal && done < total ? "" : "\n", stderr);
    fflush(stderr);
}

/* `done` of `total` pieces of a stage. "block" refines the denoising step under way. A terminal gets a bar that moves,
 * anything else a line at every step and end of a stage, and every ten seconds. */
void progress(const run *r, const char *stage, int64_t done, int64_t total)
{
    struct progress *p = r->progress;
    if (!p || r->arena->planning)
        return;
    double time = now();
    bool block = !strcmp(stage, "block");
    if (!block && (!p->stage || strcmp(p->stage, stage))) {
        if (p->terminal && p->stage && strcmp(p->stage, "denoise"))
            fputs("\r\033[K", stderr);
        p->stage = stage;
        p->stage_start = time;
    }
    double part = block ? ((double)p->step + (double)done / (double)total) / (double)p->steps : (double)done / (double)total;
    if (block && (done == total || part == 0))
        return;                     /* the step itself will say so */
    bool line = !block && (done == total || !strcmp(stage, "denoise"));
    if (done == 0 || !(line || time - p->last_line > (p->terminal ? 0.1 : 10)))
        return;
    p->last_line = time;
    print_progress(p, block ? p->step : done, block ? p->steps : total, part, time);
}

/* ---------------------------------------------------------------- the job */

typedef enum { GENERATE, ENCODE, DECODE, CLIP, INFO, COMPARE, BENCH, HELP, VERSION } command;
enum { MAX_GIVEN = 5, MAX_PICTURES = 4096, MAX_FILES = 64, TIME_ROWS = 512 };

/* What the command line says, and what was opened for it. */
typedef struct {
    command command;
    const char *model, *out, *latents, *class;
    image start[MAX_PICTURES], end[MAX_GIVEN];
    int starts, ends;
    int64_t width, height, resolution, frames, steps;
    bool long_clip, allow_unknown, verbose, sized;
    const char *camera, *motion;
    double cfg;
    uint64_t seed;
    sched_type scheduler;
    const safetensors *loras[MAX_FILES]; double lora_scales[MAX_FILES]; int nloras;
    double tea_threshold; int64_t tea_start, tea_end;
    bool enhance; double enhance_weight; int64_t enhance_start, enhance_end;
    const char *filters[MAX_FILES * 16]; int nfilters;
    const char *dump_dir;
    const char *files[MAX_FILES]; int nfiles;   /* what stands beside the options */
    bool quiet, blank;                      /* blank: info's picture is a stand-in */

    vae *vae; clip *clip; dit *dit;
    sched_config sched;
    weights *embeddings;
    control rows[2];
    image seen;                             /* the first picture as CLIP gets it */
    const safetensors *given;               /* decode: the latents' file */
} job;

/* ---------------------------------------------------------------- pipeline: small parts */

/* Stops a run at the first stage that is not a finite number, naming the weight that is to blame if there is one. */
static void check_finite(tensor x, const char *stage, const weights *w)
{
    int64_t bad = -1;
    for (int64_t i = 0; i < tensor_count(x) && x.data && bad < 0; i++)
        if (!isfinite(x.data[i]))
            bad = i;
    if (bad < 0)
        return;
    int64_t index;
    const st_tensor *t = w ? weights_nonfinite(w, &index) : NULL;
    if (t)
        die(BAD_INPUT, "%s/%s: %s: element %lld is not a finite number, which shows at %s; the file is damaged, get it again",
            w->folder, w->stem, t->name, (long long)index, stage);
    die(BAD_INPUT, "%s: element %lld is %g, expected a finite number; the inputs or a guidance of this size overflow", stage,
        (long long)bad, (double)x.data[bad]);
}

/* Ends a stage: finite, and dumped under its name. */
static void stage(const run *r, tensor x, layout order, const char *name, const weights *w)
{
    check_finite(x, name, w);
    dump(r, x, order, "%s", name);
}

/* The same without dumps, for passes whose inner stages have no name of their own. */
static run silent(const run *r)
{
    run s = *r;
    s.dump_dir = NULL;
    return s;
}

/* [T][H][W][3] in -1..1 and which frames are given. Frames that are not given hold the first start picture. */
static tensor fill_pixels(arena *a, const job *j, int64_t frames, bool *given)
{
    tensor x = tensor_new(a, SHAPE(frames, j->height, j->width, 3));
    int64_t size = 3 * j->width * j->height;
    for (int64_t t = 0; t < frames; t++) {
        const image *p = t < j->starts ? &j->start[t] : &j->start[0];
        given[t] = t < j->starts;
        if (t >= frames - j->ends) {            /* written last: where the two overlap the end picture wins */
            p = &j->end[t - (frames - j->ends)];
            given[t] = true;
        }
        for (int64_t i = 0; i < size && x.data; i++)
            x.data[t * size + i] = (real)p->rgb[i] / 255 * 2 - 1;
    }
    return x;
}

/* The generator's next normal numbers as a tensor [F][h][w][Z]; torch's order is (channel, frame, y, x). */
static tensor fresh_noise(arena *a, generator *g, shape s)
{
    tensor x = tensor_new(a, s);
    size_t mark = arena_mark(a);
    int64_t count = tensor_count(x), z = s.dim[3], places = count / z;
    float *noise = arena_alloc(a, (size_t)count, sizeof *noise);
    if (noise)
        generator_randn(g, noise, count);
    for (int64_t i = 0; i < count && noise; i++)
        x.data[i] = (real)noise[i % z * places + i / z];
    arena_reset(a, mark);
    return x;
}

/* Samples a posterior into out[..., first .. first + Z): (mean + exp(logvar/2) noise) scaling_factor.
 * DiagonalGaussianDistribution.sample. */
static void sample_posterior(arena *a, tensor out, int64_t first, tensor moments, generator *g, double scaling)
{
    size_t mark = arena_mark(a);
    int64_t z = moments.dim[3] / 2, width = out.dim[3], places = tensor_count(moments) / (2 * z);
    tensor noise = fresh_noise(a, g, SHAPE(moments.dim[0], moments.dim[1], moments.dim[2], z));
    for (int64_t i = 0; i < places && noise.data; i++)
        for (int64_t c = 0; c < z; c++) {
            double logvar = (double)moments.data[i * 2 * z + z + c];
            real std = (real)exp_own((logvar < -30 ? -30 : logvar > 20 ? 20 : logvar) / 2);
            out.data[i * width + first + c] = (moments.data[i * 2 * z + c] + std * noise.data[i * z + c]) * (real)scaling;
        }
    arena_reset(a, mark);
}

/* A part of the channels as a tensor of its own, for a dump. */
static tensor channels(arena *a, tensor x, int64_t first, int64_t count)
{
    int64_t width = x.dim[3];
    tensor y = tensor_new(a, SHAPE(x.dim[0], x.dim[1], x.dim[2], count));
    for (int64_t i = 0; i < tensor_count(y) && y.data; i++)
        y.data[i] = x.data[i / count * width + first + i % count];
    return y;
}

/* mask and masked video through the VAE -> [F][h][w][2 Z]; zeros without any picture. prepare_mask_latents. */
static tensor inpaint_latents(const run *r, const job *j, int64_t frames, int64_t latent_frames)
{
    arena *a = r->arena;
    const vae_config *c = vae_settings(j->vae);
    int64_t z = c->latent_channels, scale = vae_scale(c), size = 3 * j->width * j->height;
    tensor out = tensor_new(a, SHAPE(latent_frames, j->height / scale, j->width / scale, 2 * z));
    size_t mark = arena_mark(a);
    if (j->starts == 0) {
        tensor_fill(out, 0);
        return out;
    }
    generator g;
    generator_seed(&g, j->seed);
    bool *given = allocate((size_t)frames, sizeof *given);
    unsigned char *mask = allocate((size_t)(frames * size / 3), 1);
    tensor pixels = fill_pixels(a, j, frames, given), masks = tensor_new(a, SHAPE(frames, j->height, j->width, 3));
    dump(r, pixels, CHANNELS_FIRST, "pixels");
    for (int64_t t = 0; t < frames; t++) {
        memset(mask + t * size / 3, !given[t], (size_t)(size / 3));
        tensor_fill(tensor_part(masks, t, 1), given[t] ? 0 : 1);
        if (!given[t])
            tensor_fill(tensor_part(pixels, t, 1), -1);     /* black */
    }
    dump_data(r, mask, U8, SHAPE(1, frames, j->height, j->width), "mask");
    run inner = silent(r);
    tensor videos[2] = { masks, pixels };
    static const char *const names[2] = { "mask_latents", "masked_latents" };
    for (int i = 0; i < 2; i++) {
        size_t before = arena_mark(a);
        sample_posterior(a, out, i * z, vae_encode(&inner, j->vae, videos[i]), &g, c->scaling_factor);
        stage(r, channels(a, out, i * z, z), CHANNELS_FIRST, names[i], vae_weights(j->vae));
        arena_reset(a, before);
    }
    free(given);
    free(mask);
    arena_reset(a, mark);
    return out;
}

/* Frames of latents: the formula, or what the encoder makes of the frames where pictures are encoded. */
static int64_t latent_length(const vae_config *c, int64_t frames, bool pictures)
{
    return pictures ? vae_latent_frames(c, frames) : frames == 1 ? 1 : frames / c->mini_batch_encoder * c->mini_batch_decoder;
}

/* pred [F][h][w][Z] = neg + cfg (pos - neg), of the first Z channels; without guidance the one row. */
static void guide(tensor pred, tensor out, double cfg)
{
    int64_t z = pred.dim[3], width = out.dim[4], places = pred.data ? tensor_count(pred) / z : 0;
    real scale = (real)cfg;
    for (int64_t i = 0; i < places; i++)
        for (int64_t c = 0; c < z; c++) {
            real first = out.data[i * width + c];
            pred.data[i * z + c] = out.dim[0] == 1 ? first : first + scale * (out.data[(places + i) * width + c] - first);
        }
}

/* ---------------------------------------------------------------- pipeline: decoding */

static void clamp(tensor x, real low, real high)
{
    for (int64_t i = 0; i < tensor_count(x) && x.data; i++)
        x.data[i] = x.data[i] < low ? low : x.data[i] > high ? high : x.data[i];
}

/* Encodes and decodes the video once more, half a slice later, and averages, so that no seam stays between slices.
 * smooth_output. */
static void smooth(const run *r, const vae *v, tensor video)
{
    arena *a = r->arena;
    const vae_config *c = vae_settings(v);
    int64_t m = c->mini_batch_encoder, before = m / 2, count = video.dim[0] - m;
    size_t mark = arena_mark(a);
    if (count <= 0)
        return;
    int64_t back = vae_video_frames(c, vae_latent_frames(c, count));
    if (back != count && back != 1)
        die(BAD_INPUT, "decode: smoothing codes %lld of %lld frames again and gets %lld back; choose another --frames",
            (long long)count, (long long)video.dim[0], (long long)back);
    run inner = silent(r);
    tensor part = tensor_part(video, before, count), moments = vae_encode(&inner, v, part);
    tensor again = vae_decode(&inner, v, channels(a, moments, 0, c->latent_channels));
    for (int64_t t = 0; t < count; t++)         /* torch broadcasts a single frame over all */
        blend_to(tensor_part(part, t, 1), tensor_part(part, t, 1), tensor_part(again, back == 1 ? 0 : t, 1), 0.5, 0.5);
    arena_reset(a, mark);
    clamp(video, -1, 1);
}

/* latents as the sampler leaves them [F][h][w][Z] -> frames [T][H][W][3], 8 bits; NULL while planning. decode_latents. */
static unsigned char *decode_frames(const run *r, const job *j, tensor latents, int64_t *frames)
{
    arena *a = r->arena;
    const vae_config *c = vae_settings(j->vae);
    *frames = vae_video_frames(c, latents.dim[0]);
    int64_t scale = vae_scale(c), h = latents.dim[1] * scale, w = latents.dim[2] * scale;
    unsigned char *bytes = arena_alloc(a, (size_t)(*frames * h * w * 3), 1);
    size_t mark = arena_mark(a);
    tensor z = tensor_new(a, SHAPE(latents.dim[0], latents.dim[1], latents.dim[2], latents.dim[3]));
    blend_to(z, latents, latents, 1 / c->scaling_factor, 0);
    tensor video = vae_decode(r, j->vae, z);
    check_finite(video, "decoded", vae_weights(j->vae));
    clamp(video, -1, 1);
    dump(r, video, CHANNELS_FIRST, "decoded");
    if (c->mode != SLICE_CACHE)
        smooth(r, j->vae, video);
    check_finite(video, "video", vae_weights(j->vae));
    for (int64_t i = 0; i < tensor_count(video) && video.data; i++)
        video.data[i] = video.data[i] / 2 + (real)0.5;
    clamp(video, 0, 1);
    dump(r, video, CHANNELS_FIRST, "video");
    for (int64_t i = 0; i < tensor_count(video) && bytes; i++)
        bytes[i] = (unsigned char)(255 * video.data[i]);
    dump_data(r, bytes, U8, SHAPE(*frames, h, w, 3), "frames");
    arena_reset(a, mark);
    return bytes;
}

/* ---------------------------------------------------------------- pipeline: generate */

static void dump_timesteps(const run *r, const scheduler *s)
{
    bool whole = s->config.type != EULER && s->config.type != EULER_A;
    int64_t *list = allocate((size_t)s->calls, sizeof *list);
    for (int64_t i = 0; i < s->calls; i++)
        list[i] = (int64_t)s->timesteps[i];
    if (!r->arena->planning)
        dump_data(r, whole ? (const void *)list : s->timesteps, whole ? I64 : F64, SHAPE(s->calls), "timesteps");
    free(list);
}

/* What TeaCache decided at every call. */
typedef struct { int64_t *computed; double *delta; } tea_log;

static void dump_tea(const run *r, const tea_log *log, int64_t calls)
{
    if (r->arena->planning)
        return;
    dump_data(r, log->computed, I64, SHAPE(calls), "teacache.computed");
    dump_data(r, log->delta, F64, SHAPE(calls), "teacache.delta");
}

static tea_cache new_tea(arena *a, const job *j, int64_t rows, int64_t tokens)
{
    tea_cache t = { .threshold = j->tea_threshold, .skip_start = j->tea_start < 1 ? 1 : j->tea_start,
                    .skip_end = j->tea_end < 1 ? 1 : j->tea_end, .steps = j->steps };
    if (t.threshold == 0)
        return t;
    t.last = tensor_new_high(a, SHAPE(rows * tokens, dit_settings(j->dit)->hidden_size));
    t.residual = tensor_new_high(a, SHAPE(rows, tokens, dit_settings(j->dit)->hidden_size));
    return t;
}

/* The sampling loop: latents [F][h][w][Z] from noise to a clean sample, in place. */
static void denoise(const run *r, const job *j, const dit_condition *c, tensor latents, tensor inpaint, generator *g, scheduler *s)
{
    arena *a = r->arena;
    int64_t p = dit_settings(j->dit)->patch_size;
    tea_cache tea = new_tea(a, j, c->rows, latents.dim[0] * (latents.dim[1] / p) * (latents.dim[2] / p));
    enhance eav = { .enabled = j->enhance, .weight = j->enhance_weight, .skip_start = j->enhance_start,
                    .skip_end = j->enhance_end, .steps = j->steps };
    tea_log log = { allocate((size_t)s->calls, sizeof *log.computed), allocate((size_t)s->calls, sizeof *log.delta) };
    shape size = SHAPE(latents.dim[0], latents.dim[1], latents.dim[2], latents.dim[3]);
    progress(r, "denoise", 0, s->calls);
    for (int64_t i = 0; i < (a->planning ? 1 : s->calls); i++) {
        size_t mark = arena_mark(a);
        tensor x = tensor_new(a, size), pred = tensor_new(a, size);
        char name[64];
        if (r->progress)
            r->progress->step = i, r->progress->steps = s->calls;
        sched_input(s, x, latents);
        bool see = j->starts > 0 && !((double)i < (double)s->calls * (1 - 0.40));   /* the picture: last 40 % of the calls */
        tensor out = dit_forward(r, j->dit, c, x, inpaint, s->timesteps[i], see, i, &tea, &eav);
        guide(pred, out, j->cfg);
        snprintf(name, sizeof name, "step.%03d.pred", (int)i);
        stage(r, pred, CHANNELS_FIRST, name, dit_weights(j->dit));
        sched_step(s, latents, pred, j->scheduler == EULER_A ? fresh_noise(a, g, size) : (tensor){ 0 });
        snprintf(name, sizeof name, "step.%03d.latents", (int)i);
        stage(r, latents, CHANNELS_FIRST, name, NULL);
        log.computed[i] = tea.computed;
        log.delta[i] = tea.delta;
        arena_reset(a, mark);
        progress(r, "denoise", i + 1, s->calls);
    }
    if (tea.threshold != 0) {
        dump_tea(r, &log, s->calls);
        if (r->verbosity && !a->planning)
            fprintf(stderr, "teacache: %lld of %lld calls used the cache\n", (long long)tea.cached, (long long)s->calls);
    }
    free(log.computed);
    free(log.delta);
}

/* The whole model: RuyiInpaintPipeline.__call__. Returns [T][H][W][3] bytes and T; NULL while planning. */
static unsigned char *generate(const run *r, const job *j, int64_t *frames)
{
    arena *a = r->arena;
    const vae_config *c = vae_settings(j->vae);
    int64_t z = c->latent_channels, scale = vae_scale(c), length = latent_length(c, j->frames, j->starts > 0);
    shape size = SHAPE(length, j->height / scale, j->width / scale, z);
    generator g;
    generator_seed(&g, j->seed);
    scheduler s = sched_new(a, j->sched, j->steps, size);
    dump_timesteps(r, &s);

    tensor latents = fresh_noise(a, &g, size);
    size_t mark = arena_mark(a);
    stage(r, latents, CHANNELS_FIRST, "noise", NULL);
    blend_to(latents, latents, latents, s.init_noise_sigma, 0);

    tensor inpaint = inpaint_latents(r, j, j->frames, length), tokens = { 0 };
    if (j->starts) {
        tokens = clip_encode(r, j->clip, j->seen);
        check_finite(tokens, "clip.hidden", clip_weights(j->clip));
    }
    int64_t rows = j->cfg > 1 ? 2 : 1;
    dit_condition condition = dit_conditions(r, j->dit, j->rows + 2 - rows, rows, tokens, j->height, j->width);
    check_finite(condition.text, "text", j->embeddings);
    denoise(r, j, &condition, latents, inpaint, &g, &s);
    arena_reset(a, mark);

    unsigned char *bytes = decode_frames(r, j, latents, frames);
    sched_free(&s);
    return bytes;
}

/* ---------------------------------------------------------------- the flows of the commands */

/* What a flow makes: frames, or one tensor for a file. */
typedef struct { unsigned char *bytes; int64_t frames, w, h; tensor saved; const char *name; } result;

static result flow_generate(const run *r, const job *j)
{
    result out = { .w = j->width, .h = j->height };
    out.bytes = generate(r, j, &out.frames);
    return out;
}

/* latents of a file [Z][F][h][w] in any floating type -> frames. */
static result flow_decode(const run *r, const job *j)
{
    const st_tensor *t = safetensors_find(j->given, "latents");
    int64_t scale = vae_scale(vae_settings(j->vae)), z = t->dim[0], places = t->dim[1] * t->dim[2] * t->dim[3];
    result out = { .w = t->dim[3] * scale, .h = t->dim[2] * scale };
    tensor latents = tensor_new(r->arena, SHAPE(t->dim[1], t->dim[2], t->dim[3], z));
    size_t mark = arena_mark(r->arena);
    weight w = { .data = t->data, .type = t->type, .ndim = 1, .dim = { z * places }, .key = t->name };
    const real *from = weight_vector(r->arena, w);
    for (int64_t i = 0; i < z * places && from; i++)
        latents.data[i % places * z + i / places] = from[i];
    arena_reset(r->arena, mark);
    check_finite(latents, "latents", NULL);
    out.bytes = decode_frames(r, j, latents, &out.frames);
    return out;
}

/* Pictures as they are, one a frame -> the posterior's mean times scaling_factor, [Z][F][h][w]. */
static result flow_encode(const run *r, const job *j)
{
    arena *a = r->arena;
    const vae_config *c = vae_settings(j->vae);
    bool *given = allocate((size_t)j->starts, sizeof *given);
    tensor pixels = fill_pixels(a, j, j->starts, given), moments;
    free(given);
    dump(r, pixels, CHANNELS_FIRST, "pixels");
    moments = vae_encode(r, j->vae, pixels);
    stage(r, moments, CHANNELS_FIRST, "vae.moments", vae_weights(j->vae));
    int64_t z = c->latent_channels, places = tensor_count(moments) / (2 * z);
    tensor latents = tensor_new(a, SHAPE(z, moments.dim[0], moments.dim[1], moments.dim[2]));
    for (int64_t i = 0; i < z * places && latents.data; i++)
        latents.data[i] = moments.data[i % places * 2 * z + i / places] * (real)c->scaling_factor;
    return (result){ .saved = latents, .name = "latents" };
}

static result flow_clip(const run *r, const job *j)
{
    tensor tokens = clip_encode(r, j->clip, j->seen);
    check_finite(tokens, "clip.hidden", clip_weights(j->clip));
    return (result){ .saved = tokens, .name = "clip.hidden" };
}

typedef result flow(const run *r, const job *j);

static run run_of(const job *j, arena *a)
{
    return (run){ .arena = a, .dump_dir = a->planning ? NULL : j->dump_dir, .keep_rows = j->dump_dir != NULL,
                  .filters = j->filters, .nfilters = j->nfilters, .verbosity = j->quiet ? 0 : j->verbose ? 2 : 1 };
}

/* One tensor as F32, whatever `real` is. */
static void save_tensor(arena *a, const char *path, const result *out)
{
    shape s = { .ndim = out->saved.ndim };
    memcpy(s.dim, out->saved.dim, sizeof s.dim);
    int64_t n = tensor_count(out->saved);
    float *data = arena_alloc(a, (size_t)n, sizeof *data);
    for (int64_t i = 0; i < n && data; i++)
        data[i] = (float)out->saved.data[i];
    if (data)
        safetensors_write(path, &(st_entry){ out->name, F32, s, data }, 1);
}

/* The bytes that a flow needs: everything but the mapped weights. */
static size_t plan(const job *j, flow *f, result *out)
{
    arena a = arena_plan();
    run r = run_of(j, &a);
    *out = f(&r, j);
    if (out->name)
        save_tensor(&a, NULL, out);
    return a.peak;
}

static bool ends_with(const char *text, const char *tail)
{
    size_t length = strlen(text), end = strlen(tail);
    return length > end && !strcmp(text + length - end, tail);
}

/* Plans, opens the output, runs, writes. */
static void run_flow(job *j, flow *f)
{
    result planned;
    size_t bytes = plan(j, f, &planned);
    output *o = NULL;
    if (j->out && planned.name) {
        if (!ends_with(j->out, ".safetensors"))
            die(BAD_INPUT, "--output: got %s, expected NAME.safetensors", j->out);
        output_check(j->out);
    }
    if (j->out && !planned.name)
        o = output_open(j->out, planned.w, planned.h, planned.frames);
    double time = now();
    struct progress p = { .terminal = isatty(2), .start = time, .last_line = time };
    arena a = arena_new(bytes);
    run r = run_of(j, &a);
    r.progress = j->quiet ? NULL : &p;
    result out = f(&r, j);
    for (int64_t t = 0; o && t < out.frames; t++)
        output_frame(o, out.bytes + t * out.w * out.h * 3);
    if (o)
        output_close(o);
    else if (j->out)
        save_tensor(&a, j->out, &out);
    if (j->verbose)
        fprintf(stderr, "memory: %.1f MB planned, %.1f MB used beside the mapped weights\n", (double)bytes / 1e6, (double)a.peak / 1e6);
    if (!j->quiet && o)
        fprintf(stderr, "%s: %lld frame%s of %lld x %lld, %.1f s\n", j->out, (long long)out.frames, out.frames == 1 ? "" : "s",
                (long long)out.w, (long long)out.h, now() - p.start);
    arena_free(&a);
}

/* ---------------------------------------------------------------- opening a model */

static void need(const char *value, const char *option, const char *what)
{
    if (!value || !*value)
        die(BAD_INPUT, "%s: got nothing, expected %s; see ruyi --help", option, what);
}

static char *inside(const job *j, const char *part)
{
    need(j->model, "--model", "a model folder; give it with -m FOLDER");
    return text_of("%s/%s", j->model, part);
}

static void open_vae(job *j, bool encoder, bool decoder)
{
    char *folder = inside(j, "vae");
    j->vae = vae_open(folder, encoder, decoder, j->allow_unknown);
    free(folder);
}

static void open_clip(job *j)
{
    char *folder = inside(j, "image_encoder");
    j->clip = clip_open(folder, j->allow_unknown);
    free(folder);
}

/* Is this a Ruyi at all? */
static void check_index(const job *j)
{
    config f = config_open(j->model, "model_index.json");
    char *class = config_word(f, "_class_name", "RuyiInpaintPipeline");
    if (strcmp(class, "RuyiInpaintPipeline"))
        config_refuse(f, "_class_name", "expected RuyiInpaintPipeline; this folder holds another model");
    free(class);
    config_close(f);
}

/* One tensor of a control row: PREFIX.PART, or the default's. */
static weight control_part(weights *w, const char *prefix, const char *otherwise, const char *part, shape s)
{
    char *key = text_of("%s.%s", prefix, part);
    weight found = bind(w, s, "%s.%s", weights_has(w, key) ? prefix : otherwise, part);
    free(key);
    return found;
}

/* The four tensors of a row fall back to the default one by one. get_control_embeddings of predict_i2v.py. */
static control control_row(weights *w, const dit_config *c, const char *prefix, const char *otherwise)
{
    return (control){
        .emb1 = control_part(w, prefix, otherwise, "emb1", SHAPE(1, c->text_len, c->cross_attention_dim)),
        .mask1 = control_part(w, prefix, otherwise, "mask1", SHAPE(1, c->text_len)),
        .emb2 = control_part(w, prefix, otherwise, "emb2", SHAPE(1, c->text_len_t5, c->cross_attention_dim_t5)),
        .mask2 = control_part(w, prefix, otherwise, "mask2", SHAPE(1, c->text_len_t5)),
    };
}

static void open_controls(job *j)
{
    const dit_config *c = dit_settings(j->dit);
    char *prefix = text_of("p.16x9movie%s%s", strcmp(j->motion, "auto") ? j->motion : "0", j->camera);
    j->embeddings = weights_open(j->model, "embeddings");
    j->rows[0] = control_row(j->embeddings, c, "n.default", "n.default");
    j->rows[1] = control_row(j->embeddings, c, prefix, "p.default");
    free(prefix);
}

/* What must hold between the components, and between them and the options. */
static void check_model(const job *j)
{
    const vae_config *v = vae_settings(j->vae);
    const dit_config *d = dit_settings(j->dit);
    const clip_config *c = clip_settings(j->clip);
    int64_t unit = 8 * d->patch_size > 16 ? 8 * d->patch_size : 16, length = latent_length(v, j->frames, j->starts > 0);
    if (!v->block_out_channels)
        config_refuse(v->file, "block_out_channels", "expected a list of numbers: its length gives the scale of the latents");
    if (vae_scale(v) != 8)
        config_refuse(v->file, "ch_mult", "expected 4 numbers: the rotary grid divides pixels by 8");
    if (3 * v->latent_channels != d->in_channels)
        config_refuse(v->file, "latent_channels", "expected 16, a third of the transformer's in_channels");
    if (c->hidden_size != d->projection_dim)
        config_refuse(d->file, "projection_dim", "expected the image encoder's hidden_size %lld", (long long)c->hidden_size);
    if (j->width % unit || j->height % unit)
        die(BAD_INPUT, "--size: got %lldx%lld, expected multiples of %lld for this model's patches", (long long)j->width,
            (long long)j->height, (long long)unit);
    if (length < 1 || length > TIME_ROWS)
        die(BAD_INPUT, "--frames: %lld frames make %lld latent frames, expected 1 to %d, the rows of the time table",
            (long long)j->frames, (long long)length, TIME_ROWS);
    if (j->enhance && length == 1)
        die(BAD_INPUT, "--enhance-a-video: one latent frame has no other to attend to; give more --frames or leave it out");
}

/* ---------------------------------------------------------------- size and length */

/* Height : width, height, width of the 512-pixel buckets. The number compared is the key, two decimals, not the
 * quotient. ASPECT_RATIO_512 of bucket_sampler.py. */
static const double buckets[][3] = {
    { 0.25, 256, 1024 }, { 0.26, 256, 992 }, { 0.27, 256, 960 }, { 0.28, 256, 928 }, { 0.32, 288, 896 }, { 0.33, 288, 864 },
    { 0.35, 288, 832 }, { 0.4, 320, 800 }, { 0.42, 320, 768 }, { 0.48, 352, 736 }, { 0.5, 352, 704 }, { 0.52, 352, 672 },
    { 0.57, 384, 672 }, { 0.6, 384, 640 }, { 0.68, 416, 608 }, { 0.72, 416, 576 }, { 0.78, 448, 576 }, { 0.82, 448, 544 },
    { 0.88, 480, 544 }, { 0.94, 480, 512 }, { 1.0, 512, 512 }, { 1.07, 512, 480 }, { 1.13, 544, 480 }, { 1.21, 544, 448 },
    { 1.29, 576, 448 }, { 1.38, 576, 416 }, { 1.46, 608, 416 }, { 1.67, 640, 384 }, { 1.75, 672, 384 }, { 2.0, 704, 352 },
    { 2.09, 736, 352 }, { 2.4, 768, 320 }, { 2.5, 800, 320 }, { 2.89, 832, 288 }, { 3.0, 864, 288 }, { 3.11, 896, 288 },
    { 3.62, 928, 256 }, { 3.75, 960, 256 }, { 3.88, 992, 256 }, { 4.0, 1024, 256 },
};

/* The size for a picture at a base resolution: the nearest bucket (the first of equals), scaled, sides floored to 16. */
static void bucket_size(int64_t w, int64_t h, int64_t resolution, int64_t *width, int64_t *height)
{
    double ratio = (double)h / (double)w;
    size_t best = 0;
    for (size_t i = 1; i < sizeof buckets / sizeof *buckets; i++)
        if (fabs(buckets[i][0] - ratio) < fabs(buckets[best][0] - ratio))
            best = i;
    *height = (int64_t)(buckets[best][1] / 512 * (double)resolution / 16) * 16;
    *width = (int64_t)(buckets[best][2] / 512 * (double)resolution / 16) * 16;
}

static void choose_size(job *j)
{
    if (!j->sized)
        bucket_size(j->starts ? j->start[0].w : 1, j->starts ? j->start[0].h : 1, j->resolution, &j->width, &j->height);
    if (j->width < 16 || j->height < 16)
        die(BAD_INPUT, "--resolution: %lld makes %lld x %lld, expected sides of at least 16; use a larger one", (long long)j->resolution,
            (long long)j->width, (long long)j->height);
}

/* Whole slices of the encoder, and says so. */
static void choose_frames(job *j)
{
    int64_t batch = vae_settings(j->vae)->mini_batch_encoder, frames = j->frames == 1 ? 1 : j->frames / batch * batch;
    if (frames == 0)
        die(BAD_INPUT, "--frames: got %lld, expected 1 or at least %lld, the encoder's mini_batch_encoder", (long long)j->frames, (long long)batch);
    if (frames != j->frames && !j->quiet)
        fprintf(stderr, "frames: %lld asked for, %lld will be made: whole slices of %lld\n", (long long)j->frames, (long long)frames, (long long)batch);
    j->frames = frames;
    if (j->ends && !j->starts)
        die(BAD_INPUT, "--end: end pictures need a start picture; give one with -i");
    if (j->starts > frames || j->ends > frames)
        die(BAD_INPUT, "%s: got %d pictures for %lld frames; give fewer pictures or more --frames", j->starts > frames ? "--image" : "--end",
            j->starts > frames ? j->starts : j->ends, (long long)frames);
}

static void resize_pictures(image *list, int count, int64_t w, int64_t h)
{
    for (int i = 0; i < count; i++) {
        image resized = image_resize(list[i], w, h);
        free(list[i].rgb);
        list[i] = resized;
    }
}

/* ---------------------------------------------------------------- commands */

static void open_generate(job *j)
{
    need(j->model, "--model", "a model folder; give it with -m FOLDER");
    check_index(j);
    open_vae(j, true, true);
    choose_size(j);
    choose_frames(j);
    open_clip(j);
    char *folder = inside(j, "transformer"), *scheduler_folder = inside(j, "scheduler");
    j->dit = dit_open(folder, j->loras, j->lora_scales, j->nloras, j->allow_unknown);
    j->sched = sched_read(scheduler_folder, j->scheduler);
    free(folder);
    free(scheduler_folder);
    open_controls(j);
    check_model(j);
    int64_t most = j->sched.num_train_timesteps / (j->scheduler == DPMPP ? 2 : 1);
    if (j->steps > most || (j->scheduler == PNDM && j->steps < 4))
        die(BAD_INPUT, "--steps: got %lld, expected %d to %lld for %s", (long long)j->steps, j->scheduler == PNDM ? 4 : 1,
            (long long)most, sched_names[j->scheduler]);
    resize_pictures(j->start, j->starts, j->width, j->height);
    resize_pictures(j->end, j->ends, j->width, j->height);
    if (j->starts)
        j->seen = clip_preprocess(clip_settings(j->clip), j->start[0]);
}

static void command_generate(job *j)
{
    if (!j->dump_dir)
        need(j->out, "--output", "-o NAME.y4m, -o NAME-%04d.ppm or -o - (Y4M to standard output)");
    open_generate(j);
    run_flow(j, flow_generate);
}

static void command_encode(job *j)
{
    if (!j->dump_dir)
        need(j->out, "--output", "-o LATENTS.safetensors");
    if (!j->starts)
        die(BAD_INPUT, "--image: expected at least one picture; give them with -i, one a frame");
    open_vae(j, true, false);
    int64_t scale = vae_scale(vae_settings(j->vae));
    j->width = j->start[0].w;
    j->height = j->start[0].h;
    for (int i = 0; i < j->starts; i++)
        if (j->start[i].w != j->width || j->start[i].h != j->height || j->width % scale || j->height % scale)
            die(BAD_INPUT, "--image: picture %d is %lld x %lld, expected pictures of one size whose sides are multiples of %lld",
                i + 1, (long long)j->start[i].w, (long long)j->start[i].h, (long long)scale);
    run_flow(j, flow_encode);
}

static void command_decode(job *j)
{
    if (!j->dump_dir)
        need(j->out, "--output", "-o NAME.y4m, -o NAME-%04d.ppm or -o - (Y4M to standard output)");
    need(j->latents, "--latents", "-l LATENTS.safetensors");
    open_vae(j, false, true);
    j->given = safetensors_open(j->latents);
    const st_tensor *t = safetensors_find(j->given, "latents");
    int64_t z = vae_settings(j->vae)->latent_channels;
    if (!t)
        die(BAD_INPUT, "%s: has no tensor of the name latents; `ruyi info %s` lists what it has", j->latents, j->latents);
    if (t->ndim != 4 || t->dim[0] != z || !t->count || !(t->type == F32 || t->type == F64 || t->type == F16 || t->type == BF16))
        die(BAD_INPUT, "%s: latents: got %s of %d dimensions, expected F32, F64, F16 or BF16 of [%lld, frames, height/%lld, width/%lld]",
            j->latents, dtype_name[t->type], t->ndim, (long long)z, (long long)vae_scale(vae_settings(j->vae)),
            (long long)vae_scale(vae_settings(j->vae)));
    run_flow(j, flow_decode);
}

static void command_clip(job *j)
{
    if (!j->dump_dir)
        need(j->out, "--output", "-o TOKENS.safetensors");
    if (j->starts != 1)
        die(BAD_INPUT, "--image: got %d pictures, expected one; give it with -i", j->starts);
    open_clip(j);
    j->seen = clip_preprocess(clip_settings(j->clip), j->start[0]);
    run_flow(j, flow_clip);
}

/* ---------------------------------------------------------------- info */

static void print_tensor(const st_tensor *t)
{
    printf("  %-8s [", dtype_name[t->type]);
    for (int i = 0; i < t->ndim; i++)
        printf("%s%" PRId64, i ? ", " : "", t->dim[i]);
    printf("]  %s\n", t->name);
}

static void print_file(const safetensors *f, bool list)
{
    uint64_t count = 0;
    for (int64_t i = 0; i < f->count; i++) {
        count += f->tensors[i].count;
        if (list)
            print_tensor(&f->tensors[i]);
    }
    printf("  %s: %lld tensors, %.3f M parameters, %.1f MB\n", f->path, (long long)f->count, (double)count / 1e6, (double)f->size / 1e6);
}

static void print_weights(const weights *w, bool list)
{
    for (int i = 0; i < w->nfiles; i++)
        print_file(w->files[i], list);
}

static void info_vae(const job *j)
{
    static const char *const modes[] = { "cache_compression", "slice_compression", "slice_mag", "none" };
    static const char *const attentions[] = { "3d", "spatial", "temporal", "spatial_temporal" };
    const vae_config *c = vae_settings(j->vae);
    printf("vae: channels");
    for (int64_t i = 0; i < c->levels; i++)
        printf(" %lld", (long long)c->channels[i]);
    printf(", %lld layers a block, %lld norm groups%s, %lld latent channels, 1/%lld in space, slices %s of %lld frames / %lld latent frames, "
           "mid attention %s, scaling_factor %g%s\n", (long long)c->layers_per_block, (long long)c->norm_num_groups,
           c->spatial_group_norm ? " per frame" : "", (long long)c->latent_channels, (long long)vae_scale(c), modes[c->mode],
           (long long)c->mini_batch_encoder, (long long)c->mini_batch_decoder,
           c->mid_block_use_attention && c->layers_per_block > 1 ? attentions[c->mid_block_attention_type] : "none",
           c->scaling_factor, c->tile_encoder || c->tile_decoder ? ", tiles" : "");
    config_print_unread(c->file);
    print_weights(vae_weights(j->vae), j->verbose);
}

static void info_clip(const job *j)
{
    const clip_config *c = clip_settings(j->clip);
    printf("image_encoder: %lld x %lld pixels in patches of %lld, width %lld, %lld layers, %lld heads, MLP %lld, %s\n",
           (long long)c->image_size, (long long)c->image_size, (long long)c->patch_size, (long long)c->hidden_size,
           (long long)c->num_hidden_layers, (long long)c->num_attention_heads, (long long)c->intermediate_size,
           c->hidden_act == QUICK_GELU ? "quick_gelu" : "gelu");
    config_print_unread(c->file);
    config_print_unread(c->preprocessor);
    print_weights(clip_weights(j->clip), j->verbose);
}

static void info_dit(const job *j)
{
    const dit_config *c = dit_settings(j->dit);
    printf("transformer: D %lld = %lld heads x %lld, %lld blocks, MLP %lld, patch %lld, %lld channels in, %lld out, text %lld + %lld tokens "
           "of %lld (T5 %lld), %lld image queries\n", (long long)c->hidden_size, (long long)c->num_attention_heads,
           (long long)c->attention_head_dim, (long long)c->num_layers, (long long)c->inner, (long long)c->patch_size, (long long)c->in_channels,
           (long long)c->out_channels, (long long)c->text_len, (long long)c->text_len_t5, (long long)c->cross_attention_dim,
           (long long)c->cross_attention_dim_t5, (long long)c->n_query);
    config_print_unread(c->file);
    print_weights(dit_weights(j->dit), j->verbose);
}

static void info_scheduler(const job *j)
{
    static const char *const predictions[] = { "epsilon", "sample", "v_prediction" }, *const spacings[] = { "leading", "trailing", "linspace" };
    const sched_config *c = &j->sched;
    printf("scheduler: %s, %lld timesteps, betas %s %g to %g, %s, %s spacing, offset %lld\n", sched_names[c->type],
           (long long)c->num_train_timesteps, c->trained_betas ? "trained" : c->beta_schedule, c->beta_start, c->beta_end,
           predictions[c->prediction_type], spacings[c->timestep_spacing], (long long)c->steps_offset);
    config_print_unread(c->file);
}

/* What a generation of this size and length would need. */
static void info_plan(const job *j)
{
    result out;
    size_t bytes = plan(j, flow_generate, &out);
    uint64_t copied = vae_weights(j->vae)->copied + clip_weights(j->clip)->copied + dit_weights(j->dit)->copied;
    uint64_t mapped = weights_bytes(vae_weights(j->vae)) + weights_bytes(clip_weights(j->clip)) + weights_bytes(dit_weights(j->dit)) +
                      weights_bytes(j->embeddings);
    printf("a run of %lld x %lld, %lld frames, with %s: %.1f MB of activations, %.1f MB of convolution weights put in order, "
           "%.1f MB of weights mapped from disk; %.1f MB of frames come out\n", (long long)out.w, (long long)out.h, (long long)out.frames,
           j->blank ? "one picture" : "the given pictures", (double)bytes / 1e6, (double)copied / 1e6, (double)mapped / 1e6,
           (double)(out.frames * out.w * out.h * 3) / 1e6);
}

static bool is_folder(const char *folder, const char *part)
{
    char *path = text_of("%s/%s", folder, part);
    bool there = access(path, R_OK) == 0;
    free(path);
    return there;
}

/* A blank picture stands for the one that a run would have. */
static void give_blank(job *j)
{
    if (j->starts)
        return;
    j->blank = true;
    j->starts = 1;
    j->start[0] = (image){ 512, 512, allocate(3 * 512 * 512, 1) };
}

static void command_info(job *j)
{
    const char *path = j->nfiles ? j->files[0] : j->model;
    need(path, "info", "a model folder or a .safetensors file");
    if (ends_with(path, ".safetensors")) {
        safetensors *f = safetensors_open(path);
        print_file(f, true);
        safetensors_close(f);
        return;
    }
    j->model = path;
    j->quiet = true;
    if (is_folder(path, "model_index.json")) {
        give_blank(j);
        open_generate(j);
        info_dit(j);
        info_vae(j);
        info_clip(j);
        info_scheduler(j);
        printf("embeddings:\n");
        print_weights(j->embeddings, j->verbose);
        info_plan(j);
    } else if (is_folder(path, "vae")) {
        open_vae(j, true, true);
        info_vae(j);
    } else {
        die(BAD_INPUT, "%s: got neither a .safetensors file nor a folder with model_index.json or vae/; give a model folder", path);
    }
}

/* ---------------------------------------------------------------- bench
 *
 * A case is its name: linear.MxNxK, linear_bf16.MxNxK, attention.HEADSxQUERIESxKEYSxWIDTH, conv3d.C.TxHxW (causal
 * 3 x 3 x 3, C to C channels), resblock.C.TxHxW, dit_block.N (the published size, N tokens, one guidance row), peak,
 * generate.tiny. One line each: name, median, minimum, maximum in seconds, nominal GFLOP.
 */
typedef struct {
    arena a;
    tensor x, k, v, y;
    layer l;
    void *state;
    int64_t n[4];
    double gflop;
    const job *job;
} bench;

static tensor uniform(arena *a, shape s)
{
    tensor x = tensor_new(a, s);
    for (int64_t i = 0; i < tensor_count(x); i++)
        x.data[i] = (real)((double)(i * 7919 % 10007) / 5003.5 - 1);
    return x;
}

static void bench_linear(bench *b) { linear_to(&b->a, b->y, b->x, b->l); }
static void bench_attention(bench *b) { attention(&b->a, b->y, b->x, b->k, b->v, 1, b->n[0]); }
static void bench_conv(bench *b)
{
    conv(&b->a, b->y, b->x, (conv_spec){ .kernel = { 3, 3, 3 }, .stride = { 1, 1, 1 }, .pad = 1, .up = 1 }, b->l);
}
static void bench_residual(bench *b) { bench_resblock(b->state); }
static void bench_whole_block(bench *b) { bench_block(b->state); }
static void bench_peak(bench *b) { b->gflop = burn_peak(&b->a) / 1e9; }
static void bench_generate(bench *b)
{
    job j = *b->job;
    result out;
    run r = run_of(&j, &b->a);
    out = flow_generate(&r, &j);
    arena_reset(&b->a, 0);
    arena_reset_high(&b->a, 0);
    (void)out;
}

typedef void bench_run(bench *b);

/* Sets a case up by its name; dies where no case has that form. */
static bench_run *bench_open(bench *b, const char *name)
{
    int64_t *n = b->n;
    double rows;
    bool bf16 = !strncmp(name, "linear_bf16.", 12);
    if (sscanf(name + (bf16 ? 5 : 0), bf16 ? "r_bf16.%" SCNd64 "x%" SCNd64 "x%" SCNd64 : "linear.%" SCNd64 "x%" SCNd64 "x%" SCNd64, n, n + 1, n + 2) == 3) {
        b->x = uniform(&b->a, SHAPE(n[0], n[2]));
        b->y = tensor_new(&b->a, SHAPE(n[0], n[1]));
        b->l = bind_linear(weights_random(bf16 ? BF16 : F32), n[1], n[2], "layer");
        b->gflop = 2e-9 * (double)n[0] * (double)n[1] * (double)n[2];
        return bench_linear;
    }
    if (sscanf(name, "attention.%" SCNd64 "x%" SCNd64 "x%" SCNd64 "x%" SCNd64, n, n + 1, n + 2, n + 3) == 4) {
        b->x = uniform(&b->a, SHAPE(n[1], n[0] * n[3]));
        b->k = uniform(&b->a, SHAPE(n[2], n[0] * n[3]));
        b->v = uniform(&b->a, SHAPE(n[2], n[0] * n[3]));
        b->y = tensor_new(&b->a, SHAPE(n[1], n[0] * n[3]));
        b->gflop = 4e-9 * (double)(n[0] * n[3]) * (double)n[1] * (double)n[2];
        return bench_attention;
    }
    if (sscanf(name, "conv3d.%" SCNd64 ".%" SCNd64 "x%" SCNd64 "x%" SCNd64, n, n + 1, n + 2, n + 3) == 4) {
        b->x = uniform(&b->a, SHAPE(n[1], n[2], n[3], n[0]));
        b->y = tensor_new(&b->a, SHAPE(n[1], n[2], n[3], n[0]));
        b->l = bind_convolution(weights_random(F32), SHAPE(n[0], n[0], 3, 3, 3), "layer");
        b->gflop = 54e-9 * (double)(n[0] * n[0]) * (double)(n[1] * n[2] * n[3]);
        return bench_conv;
    }
    if (sscanf(name, "resblock.%" SCNd64 ".%" SCNd64 "x%" SCNd64 "x%" SCNd64, n, n + 1, n + 2, n + 3) == 4 && n[0] % 32 == 0) {
        b->state = bench_resblock_new(&b->a, n[0], n[1], n[2], n[3]);
        b->gflop = 108e-9 * (double)(n[0] * n[0]) * (double)(n[1] * n[2] * n[3]);
        return bench_residual;
    }
    if (sscanf(name, "dit_block.%" SCNd64, n) == 1) {
        const double d = 2816, inner = 12288, text = 333, clip_tokens = 64, cross = 1024;
        rows = (double)n[0];
        b->state = bench_block_new(&b->a, n[0]);
        b->gflop = 1e-9 * (2 * (rows * (12 * d * d + 2 * d * inner) + 2 * (text + clip_tokens) * cross * d) + 4 * d * rows * (rows + text + clip_tokens));
        return bench_whole_block;
    }
    if (!strcmp(name, "peak"))
        return bench_peak;
    if (!strcmp(name, "generate.tiny"))
        return bench_generate;
    die(BAD_INPUT, "bench: got %s, expected a case like linear.1536x2816x2816; ruyi bench alone runs them all", name);
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void bench_case(const job *j, const char *name, size_t bytes)
{
    enum { ROUNDS = 5 };
    bench b = { .a = arena_new(bytes), .job = j };
    bench_run *one = bench_open(&b, name);
    double times[ROUNDS];
    one(&b);
    for (int i = 0; i < ROUNDS; i++) {
        double start = now();
        one(&b);
        times[i] = now() - start;
    }
    qsort(times, ROUNDS, sizeof *times, by_size);
    printf("%s\t%.4f\t%.4f\t%.4f\t%.1f\n", name, times[ROUNDS / 2], times[0], times[ROUNDS - 1], b.gflop);
    fflush(stdout);
    arena_free(&b.a);
}

static void command_bench(job *j)
{
    static const char *const all[] = { "peak", "linear.1536x2816x2816", "linear_bf16.1536x2816x2816", "linear.1536x12288x2816",
        "linear.1536x2816x12288", "linear.333x2816x1024", "attention.32x1536x1536x88", "attention.8x3456x3456x88", "conv3d.128.4x96x96",
        "conv3d.256.4x48x48", "conv3d.512.2x24x24", "resblock.128.8x128x128", "dit_block.1536", "generate.tiny" };
    int count = j->nfiles ? j->nfiles : (int)(sizeof all / sizeof *all);
    const char *const *names = j->nfiles ? j->files : all;
    for (int i = 0; i < count; i++) {
        size_t bytes = (size_t)1 << 30;
        if (!strcmp(names[i], "generate.tiny") && !j->dit) {
            result out;
            j->model = j->model ? j->model : "weights/ruyi-tiny";
            j->width = j->height = 128;
            j->sized = j->quiet = true;
            j->frames = 24;
            give_blank(j);
            open_generate(j);
            bytes = plan(j, flow_generate, &out);
        }
        bench_case(j, names[i], bytes);
    }
}

/* ---------------------------------------------------------------- options */

#define FOR(command) (1u << (command))
#define MODELS (FOR(GENERATE) | FOR(ENCODE) | FOR(DECODE) | FOR(CLIP) | FOR(INFO) | FOR(BENCH))
#define RUNS (FOR(GENERATE) | FOR(ENCODE) | FOR(DECODE) | FOR(CLIP))

static const char *const command_names[] = { "generate", "encode", "decode", "clip", "info", "compare", "bench" };
enum { COMMANDS = 7 };

typedef enum {
    O_MODEL, O_IMAGE, O_END, O_LATENTS, O_OUTPUT, O_SIZE, O_RESOLUTION, O_FRAMES, O_LONG, O_CAMERA, O_MOTION, O_STEPS, O_CFG, O_SEED,
    O_SCHEDULER, O_LORA, O_TEACACHE, O_ENHANCE, O_DUMP, O_FILTER, O_UNKNOWN, O_CLASS, O_QUIET, O_VERBOSE, O_HELP, O_VERSION, OPTIONS
} option_id;

static const struct { const char *name; char letter; const char *value; unsigned commands; const char *help; } options[OPTIONS] = {
    [O_MODEL] = { "model", 'm', "FOLDER", MODELS, "the model, a folder in the Hugging Face layout" },
    [O_IMAGE] = { "image", 'i', "FILE.ppm", MODELS, "a start picture (0 to 5), encode: a frame; - is standard input; repeatable" },
    [O_END] = { "end", 'e', "FILE.ppm", FOR(GENERATE) | FOR(INFO), "an end picture (0 to 5), in order; repeatable" },
    [O_LATENTS] = { "latents", 'l', "FILE", FOR(DECODE), "latents as encode writes them" },
    [O_OUTPUT] = { "output", 'o', "NAME", RUNS, "NAME.y4m, NAME-%04d.ppm, - for Y4M to standard output; or NAME.safetensors" },
    [O_SIZE] = { "size", 0, "WxH", FOR(GENERATE) | FOR(INFO), "size of the clip, multiples of 16" },
    [O_RESOLUTION] = { "resolution", 0, "R", FOR(GENERATE) | FOR(INFO), "or about R x R pixels in the first picture's aspect (512)" },
    [O_FRAMES] = { "frames", 0, "N", FOR(GENERATE) | FOR(INFO), "1 to 120, rounded down to whole slices (120); 24 make a second" },
    [O_LONG] = { "long", 0, NULL, FOR(GENERATE) | FOR(INFO), "allow more than 120 frames" },
    [O_CAMERA] = { "camera", 0, "WORD", FOR(GENERATE) | FOR(INFO), "auto static left right up down (auto)" },
    [O_MOTION] = { "motion", 0, "WORD", FOR(GENERATE) | FOR(INFO), "auto 1 2 3 4 (auto)" },
    [O_STEPS] = { "steps", 0, "N", FOR(GENERATE) | FOR(INFO), "denoising steps (25)" },
    [O_CFG] = { "cfg", 0, "X", FOR(GENERATE) | FOR(INFO), "guidance; 1 and less: off, half the time (7.0)" },
    [O_SEED] = { "seed", 0, "N", FOR(GENERATE) | FOR(INFO), "random seed (42)" },
    [O_SCHEDULER] = { "scheduler", 0, "WORD", FOR(GENERATE) | FOR(INFO), "ddim euler euler_a dpm++ pndm (ddim)" },
    [O_LORA] = { "lora", 0, "FILE[:WEIGHT]", FOR(GENERATE) | FOR(INFO), "low-rank updates of the transformer; repeatable" },
    [O_TEACACHE] = { "teacache", 0, "T[,START,END]", FOR(GENERATE) | FOR(INFO), "reuse calls that change less than T (0.1,3,1)" },
    [O_ENHANCE] = { "enhance-a-video", 0, "W[,START,END]", FOR(GENERATE) | FOR(INFO), "strengthen attention between frames (1,0,0)" },
    [O_DUMP] = { "dump", 0, "FOLDER", RUNS, "write every stage as FOLDER/NAME.safetensors" },
    [O_FILTER] = { "dump-filter", 0, "GLOB", RUNS, "only stages whose name matches; repeatable" },
    [O_UNKNOWN] = { "allow-unknown", 0, NULL, MODELS, "ignore tensors that the configuration has no place for" },
    [O_CLASS] = { "class", 0, "WORD", FOR(COMPARE), "limits of fp32 or fp64 (this build's)" },
    [O_QUIET] = { "quiet", 'q', NULL, RUNS, "no progress" },
    [O_VERBOSE] = { "verbose", 'v', NULL, RUNS | FOR(INFO) | FOR(COMPARE), "more: memory, every tensor" },
    [O_HELP] = { "help", 'h', NULL, ~0u, "this text" },
    [O_VERSION] = { "version", 0, NULL, ~0u, "the version" },
};

static void print_help(void)
{
    printf("ruyi %s - pictures to a 24 fps clip, in plain C (%s)\n\n"
           "  ruyi [generate] -m MODEL -i START.ppm [-e END.ppm] -o OUT      animate\n"
           "  ruyi encode  -m MODEL -i FRAME.ppm ... -o LATENTS.safetensors  pictures to latents\n"
           "  ruyi decode  -m MODEL -l LATENTS.safetensors -o OUT            latents to frames\n"
           "  ruyi clip    -m MODEL -i PICTURE.ppm -o TOKENS.safetensors     what the image tower sees\n"
           "  ruyi info    MODEL | FILE.safetensors                          what is in it, what a run needs\n"
           "  ruyi compare GOLDEN MINE                                       tensor by tensor: files or folders\n"
           "  ruyi bench   [CASE ...]                                        time of the kernels on this machine\n\nOptions\n",
           RUYI_VERSION, sizeof(real) == sizeof(float) ? "float32" : "float64");
    for (int i = 0; i < OPTIONS; i++) {
        char *left = text_of("%s%c%s--%s%s%s", options[i].letter ? "-" : "", options[i].letter ? options[i].letter : ' ',
                             options[i].letter ? ", " : "   ", options[i].name, options[i].value ? " " : "",
                             options[i].value ? options[i].value : "");
        printf("  %-40s %s\n", left, options[i].help);
        free(left);
    }
    printf("\nExamples\n"
           "  ruyi -m weights/ruyi-tiny -i weights/start/meadow.ppm --size 128x128 --frames 24 --camera left -o out.y4m\n"
           "  ruyi -m weights/ruyi-tiny -i weights/start/pan-start.ppm -e weights/start/pan-end.ppm --size 128x128 --frames 24 -o pan-%%04d.ppm\n"
           "  ruyi -m weights/ruyi-tiny -i weights/start/village.ppm --size 128x128 --frames 24 -o - | ffmpeg -i - village.mp4\n"
           "  ruyi info weights/ruyi-tiny --size 128x128 --frames 24\n\n"
           "Threads: OMP_NUM_THREADS. Exit codes: 0 done, 1 a comparison differs, 2 bad input or usage, 3 system error.\n");
}

/* ---------------------------------------------------------------- reading options */

static int64_t read_whole(const char *option, const char *text, int64_t least, int64_t most)
{
    char *end;
    errno = 0;
    long long n = strtoll(text, &end, 10);
    if (strspn(text, "-0123456789") != strlen(text) || end == text || *end || errno || n < least || n > most)
        die(BAD_INPUT, "--%s: got %s, expected a whole number from %lld to %lld", option, text, (long long)least, (long long)most);
    return n;
}

static double read_real(const char *option, const char *text)
{
    char *end;
    double x = strtod(text, &end);
    if (strspn(text, "+-.0123456789eE") != strlen(text) || end == text || *end || !isfinite(x) || fabs(x) > 1e6)
        die(BAD_INPUT, "--%s: got %s, expected a number", option, text);
    return x;
}

static const char *read_word(const char *option, const char *text, const char *const *words, int count)
{
    for (int i = 0; i < count; i++)
        if (!strcmp(text, words[i]))
            return words[i];
    die(BAD_INPUT, "--%s: got %s; did you mean %s?", option, text, nearest_word(text, words, count));
}

static uint64_t read_seed(const char *text)
{
    char *end;
    errno = 0;
    unsigned long long n = strtoull(text, &end, 10);
    if (strspn(text, "0123456789") != strlen(text) || end == text || errno)
        die(BAD_INPUT, "--seed: got %s, expected a whole number from 0 to 18446744073709551615", text);
    return n;
}

static void read_size(job *j, const char *text)
{
    const char *x = strchr(text, 'x');
    char *width = text_of("%.*s", (int)(x ? x - text : 0), text);
    if (!x)
        die(BAD_INPUT, "--size: got %s, expected WIDTHxHEIGHT", text);
    j->width = read_whole("size", width, 16, 65536);
    j->height = read_whole("size", x + 1, 16, 65536);
    if (j->width % 16 || j->height % 16)
        die(BAD_INPUT, "--size: got %s, expected multiples of 16", text);
    j->sized = true;
    free(width);
}

/* "A[,B,C]" */
static void read_triple(const char *option, const char *text, double *a, int64_t *b, int64_t *c)
{
    char *copy = text_of("%s", text), *second = strchr(copy, ','), *third = second ? strchr(second + 1, ',') : NULL;
    if (second && !third)
        die(BAD_INPUT, "--%s: got %s, expected one number or three: X,START,END", option, text);
    if (third) {
        *second = *third = 0;
        *b = read_whole(option, second + 1, INT_MIN, INT_MAX);
        *c = read_whole(option, third + 1, INT_MIN, INT_MAX);
    }
    *a = read_real(option, copy);
    free(copy);
}

static void read_lora(job *j, const char *text)
{
    const char *colon = strrchr(text, ':');
    char *end, *path;
    double scale = colon && colon[1] ? strtod(colon + 1, &end) : 1;
    bool weighted = colon && colon[1] && !*end && isfinite(scale);
    if (j->nloras == MAX_FILES)
        die(BAD_INPUT, "--lora: more than %d files", MAX_FILES);
    path = weighted ? text_of("%.*s", (int)(colon - text), text) : text_of("%s", text);
    j->loras[j->nloras] = safetensors_open(path);
    j->lora_scales[j->nloras++] = weighted ? scale : 1;
    free(path);
}

static void read_pictures(job *j, const char *path, bool end)
{
    int most = !end && j->command == ENCODE ? MAX_PICTURES : MAX_GIVEN, *count = end ? &j->ends : &j->starts;
    if (*count == most)
        die(BAD_INPUT, "--%s: got more pictures, expected at most %d; give fewer", end ? "end" : "image", most);
    *count += images_read(path, (end ? j->end : j->start) + *count, most - *count);
}

/* Applies one option; names were checked. */
static void apply(job *j, option_id id, const char *value)
{
    static const char *const cameras[] = { "auto", "static", "left", "right", "up", "down" }, *const motions[] = { "auto", "1", "2", "3", "4" };
    const char *name = options[id].name;
    switch (id) {
    case O_MODEL: j->model = value; break;
    case O_IMAGE: read_pictures(j, value, false); break;
    case O_END: read_pictures(j, value, true); break;
    case O_LATENTS: j->latents = value; break;
    case O_OUTPUT: j->out = value; break;
    case O_SIZE: read_size(j, value); break;
    case O_RESOLUTION: j->resolution = read_whole(name, value, 16, 8192); break;
    case O_FRAMES: j->frames = read_whole(name, value, 1, 1000000); break;
    case O_LONG: j->long_clip = true; break;
    case O_CAMERA: j->camera = read_word(name, value, cameras, 6); break;
    case O_MOTION: j->motion = read_word(name, value, motions, 5); break;
    case O_STEPS: j->steps = read_whole(name, value, 1, 1000000); break;
    case O_CFG: j->cfg = read_real(name, value); break;
    case O_SEED: j->seed = read_seed(value); break;
    case O_SCHEDULER:
        for (int i = 0; i < SCHEDULERS; i++)
            if (read_word(name, value, sched_names, SCHEDULERS) == sched_names[i])
                j->scheduler = (sched_type)i;
        break;
    case O_LORA: read_lora(j, value); break;
    case O_TEACACHE: read_triple(name, value, &j->tea_threshold, &j->tea_start, &j->tea_end); break;
    case O_ENHANCE: read_triple(name, value, &j->enhance_weight, &j->enhance_start, &j->enhance_end); j->enhance = true; break;
    case O_DUMP: j->dump_dir = value; break;
    case O_FILTER:
        if (j->nfilters == (int)(sizeof j->filters / sizeof *j->filters))
            die(BAD_INPUT, "--dump-filter: more than %d filters", j->nfilters);
        j->filters[j->nfilters++] = value;
        break;
    case O_UNKNOWN: j->allow_unknown = true; break;
    case O_CLASS: j->class = value; break;
    case O_QUIET: j->quiet = true; break;
    case O_VERBOSE: j->verbose = true; break;
    default: break;
    }
}

/* The option that a word like --name, --name=value or -x stands for; dies with the nearest. */
static option_id find_option(const char *word)
{
    const char *names[OPTIONS], *equals = strchr(word, '=');
    size_t length = equals ? (size_t)(equals - word) : strlen(word);
    for (int i = 0; i < OPTIONS; i++) {
        names[i] = options[i].name;
        bool same = word[1] == '-' ? strlen(names[i]) == length - 2 && !strncmp(names[i], word + 2, length - 2)
                                   : word[1] == options[i].letter && length == 2;
        if (same)
            return (option_id)i;
    }
    die(BAD_INPUT, "%s: no such option; did you mean --%s? (ruyi --help lists all)", word, nearest_word(word + 1 + (word[1] == '-'), names, OPTIONS));
}

typedef struct { option_id id; const char *value; } given_option;

/* Splits the command line: options in any order, then what is left. Returns the number of options. */
static int split(int argc, char **argv, given_option *list, const char **rest, int *nrest)
{
    int n = 0;
    for (int i = 1; i < argc; i++) {
        if (argv[i][0] != '-' || !argv[i][1]) {
            rest[(*nrest)++] = argv[i];
            continue;
        }
        given_option o = { find_option(argv[i]), strchr(argv[i], '=') };
        o.value = o.value && argv[i][1] == '-' ? o.value + 1 : NULL;
        if (options[o.id].value && !o.value) {
            if (i + 1 == argc)
                die(BAD_INPUT, "%s: expected %s after it", argv[i], options[o.id].value);
            o.value = argv[++i];
        } else if (!options[o.id].value && o.value) {
            die(BAD_INPUT, "%s: takes no value", argv[i]);
        }
        list[n++] = o;
    }
    return n;
}

static command find_command(const char **rest, int nrest)
{
    if (!nrest)
        return GENERATE;
    for (int i = 0; i < COMMANDS; i++)
        if (!strcmp(rest[0], command_names[i]))
            return (command)i;
    die(BAD_INPUT, "%s: no such command; did you mean %s? (pictures are given with -i; ruyi --help)", rest[0],
        nearest_word(rest[0], command_names, COMMANDS));
}

static void read_options(job *j, int argc, char **argv)
{
    given_option *list = allocate((size_t)argc, sizeof *list);
    const char **rest = allocate((size_t)argc, sizeof *rest);
    int nrest = 0, n = split(argc, argv, list, rest, &nrest), skip = nrest > 0, room;
    for (int i = 0; i < n; i++)
        if (list[i].id == O_HELP || list[i].id == O_VERSION) {
            j->command = list[i].id == O_HELP ? HELP : VERSION;
            return;
        }
    j->command = argc == 1 ? HELP : find_command(rest, nrest);
    room = j->command == COMPARE ? 2 : j->command == INFO ? 1 : j->command == BENCH ? MAX_FILES : 0;
    if (nrest - skip > room)
        die(BAD_INPUT, "%s: got one word too many for %s; pictures are given with -i, the output with -o", rest[skip + room],
            j->command == HELP ? "help" : command_names[j->command]);
    for (int i = skip; i < nrest; i++)
        j->files[j->nfiles++] = rest[i];
    for (int i = 0; i < n; i++) {
        if (!(options[list[i].id].commands & FOR(j->command)))
            die(BAD_INPUT, "--%s: not an option of %s; ruyi --help lists them", options[list[i].id].name, command_names[j->command]);
        apply(j, list[i].id, list[i].value);
    }
    if (j->frames > 120 && !j->long_clip)
        die(BAD_INPUT, "--frames: got %lld, expected 1 to 120; --long allows more", (long long)j->frames);
    if (j->nfilters && !j->dump_dir)
        die(BAD_INPUT, "--dump-filter: got no --dump, expected a folder to write to; give --dump FOLDER");
    free(list);
    free(rest);
}

/* ---------------------------------------------------------------- main */

static void on_signal(int signal_number)
{
    (void)signal_number;
    remove_temporaries();
    _exit(SYSTEM_ERROR);
}

/* Signals that end the program remove temporaries first, unless they were ignored from the start (nohup). A closed pipe
 * and a file beyond the limit are writes that fail. */
static void catch_signals(void)
{
    static const int stopping[] = { SIGINT, SIGTERM, SIGHUP };
    struct sigaction stop = { .sa_handler = on_signal }, ignore = { .sa_handler = SIG_IGN }, before;
    for (int i = 0; i < 3; i++)
        if (sigaction(stopping[i], NULL, &before) == 0 && before.sa_handler != SIG_IGN)
            sigaction(stopping[i], &stop, NULL);
    sigaction(SIGPIPE, &ignore, NULL);
    sigaction(SIGXFSZ, &ignore, NULL);
}

int main(int argc, char **argv)
{
    static job all;         /* static, so that what lives as long as the program stays reachable */
    job *j = &all;
    catch_signals();
    *j = (job){ .resolution = 512, .frames = 120, .steps = 25, .camera = "auto", .motion = "auto", .cfg = 7, .seed = 42,
                .scheduler = DDIM, .tea_start = 3, .tea_end = 1 };
    int code = DONE;
    read_options(j, argc, argv);
    switch (j->command) {
    case GENERATE: command_generate(j); break;
    case ENCODE: command_encode(j); break;
    case DECODE: command_decode(j); break;
    case CLIP: command_clip(j); break;
    case INFO: command_info(j); break;
    case COMPARE:
        if (j->nfiles != 2)
            die(BAD_INPUT, "compare: expected two files or folders: ruyi compare GOLDEN MINE");
        code = compare(j->files[0], j->files[1], j->class, j->verbose);
        break;
    case BENCH: command_bench(j); break;
    case HELP: print_help(); break;
    case VERSION: printf("ruyi %s\n", RUYI_VERSION); break;
    }
    if (fflush(stdout) || ferror(stdout))
        die(SYSTEM_ERROR, "standard output: %s", strerror(errno));
    return code;
}
