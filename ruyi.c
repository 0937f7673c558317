/* ruyi.c - the program: how a picture becomes a clip, and the command line around it.
 *
 * The way of the data, and its shapes: in the letters of ruyi.h, and in numbers for 24 frames of 128 x 128 from one
 * picture by the embedded model.
 *
 *     start and end pictures --fill_pixels, apply_mask--> pixels, masks   [T][H][W][3]           24 128 128 3
 *       --vae_encode, sample_posterior--> inpaint: mask, masked video     [F][h][w][2 Z]         6 16 16 32
 *     first picture --clip_encode--> tokens                               [patches][hidden_size] 16 64
 *     seed --fresh_noise--> latents                                       [F][h][w][Z]           6 16 16 16
 *     at every timestep:
 *       latents, inpaint, tokens, control words --dit_forward--> out      [B][F][h][w][2 Z]      2 6 16 16 32
 *       --guide--> pred --sched_step--> latents, a step cleaner           [F][h][w][Z]           6 16 16 16
 *     latents --vae_decode, smooth--> video --to_bytes--> frames          [T][H][W][3]           24 128 128 3
 *
 * The file goes from the parts to the whole: every function stands after those that it calls, the algorithm above is
 * the section `pipeline`, and main is the last.
 *
 *     job          what the command line says
 *     schedulers   tables in float32, bit for bit torch's; five rules behind one sched_step
 *     checkpoint   what a killed run has computed, for the run that goes on
 *     progress     a line or a moving bar on standard error
 *     pipeline     pixels, mask -> latents -> steps -> video -> bytes
 *     clips        frames looked at: motion, colours, which ones to go on from
 *     flows        what a command computes
 *     plan         what it will take; then it is run
 *     model        opening the parts of a model folder, and what must hold between them
 *     commands     generate, extend, measure, encode, decode, clip, tour, info, compare, check, bench
 *     options      two tables: parsing, --help and spelling advice come from them
 *
 * main reads the options into a job and calls its command_...(); a command opens what it needs of the model, checks it,
 * and hands a flow_...() to run_flow, which runs it twice with the same code: first in a planning arena, whose tensors
 * have shapes but no data, which checks every shape and counts the memory; then for real, in one block of exactly that
 * size. This is why loops here say `&& x.data`, and why a run that would not fit dies before it has computed anything.
 *
 * Mirrors: predict_i2v.py, ruyi/pipeline/pipeline_ruyi_inpaint.py, ruyi/utils/utils.py, ruyi/data/bucket_sampler.py of
 * the public code, and the schedulers of diffusers 0.31.
 */
#define _POSIX_C_SOURCE 200809L     /* clock_gettime, isatty, sigaction */
#include "ruyi.h"

#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* ---------------------------------------------------------------- the job */

typedef enum {
    GENERATE, EXTEND, MEASURE, ENCODE, DECODE, CLIP, TOUR, INFO, COMPARE, CHECK, BENCH, HELP, VERSION
} command;

/* The limits: 5 start and 5 end pictures are the product's promise (the public code manages one end picture); encode
 * takes a frame each. */
enum { MAX_GIVEN = 5, MAX_PICTURES = 4096, MAX_FILES = 64, CAMERAS = 6, MOTIONS = 5 };
static const char *const cameras[CAMERAS] = { "auto", "static", "left", "right", "up", "down" };
static const char *const motions[MOTIONS] = { "auto", "1", "2", "3", "4" };

/* A clip in memory: [frames][h][w][3], 8 bits. */
typedef struct { unsigned char *rgb; int64_t frames, w, h; } film;

/* What the command line says, and what was opened for it. Flows take it const, so that the second pass of a flow finds
 * what the first one found; between the passes pictures come to their size (fit_pictures), which the plan does not
 * look at. */
typedef struct {
    /* what is to be done, with which files */
    command command;
    const char *model, *out, *latents, *class;      /* class: compare's limits */
    char **words; int nwords;               /* the command line */
    const char **files; int nfiles;         /* what stands beside the options */
    bool stdin_read; int code;              /* code: the exit code, check's verdict */
    /* the clip: what is given of it, and what it shall be */
    image start[MAX_PICTURES], end[MAX_GIVEN];  /* after open_generate: resized to width x height */
    int starts, ends;
    int64_t width, height, resolution, frames;  /* width, height: 0 until they are known */
    const char *camera, *motion;
    bool long_clip, keep_colour;
    /* how it is sampled */
    sched_type scheduler; int64_t steps;
    double cfg;                             /* guidance; 1 and less: off */
    uint64_t seed; rng rng;
    double tea_threshold; int64_t tea_start, tea_end;   /* 0: off */
    bool enhance; double enhance_weight; int64_t enhance_start, enhance_end;
    /* what is made of the model's files */
    const safetensors *loras[MAX_FILES]; double lora_scales[MAX_FILES]; int nloras;
    fp8_mode fp8; dtype fp8_type;
    vae_tiling tiling; bool allow_unknown;
    /* the run: what is watched, kept and told */
    hooks *hooks, watch;                    /* hooks: watch, or NULL: nobody looks into the run */
    const char *filters[MAX_FILES * 16];    /* watch points here */
    const pack *injections[MAX_FILES];
    const char *checkpoint, *progress, *preview;
    uint64_t options;                       /* hash of those that decide the result */
    bool dry_run, quiet, verbose, json;
    /* other commands */
    int64_t times, key_first, key_last; bool key;   /* extend: key: the key frames were given */
    film earlier;                           /* extend: the clip to go on with */
    const char *log;                        /* measure: a run's standard error */
    const st_tensor *given;                 /* decode: the latents */
    bool check, blank;                      /* check: info's; blank: info's picture is a stand-in */
    /* the model, opened as far as the command needs it, and never closed */
    char *path;                             /* room of inside() */
    vae *vae; clip *clip; dit *dit; weights *embeddings; sched_config sched;
    control rows[2];                        /* negative, positive */
    image seen;                             /* the first picture as CLIP gets it */
} job;

/* ---------------------------------------------------------------- small parts */

/* Stops a run at the first stage that is not a finite number: a clip of black frames after an hour says nothing. Names
 * the weight that is to blame, if one of the two components (either may be NULL) holds one itself. */
static void check_finite(tensor x, const char *stage, const weights *first, const weights *second)
{
    const weights *suspects[] = { first, second };
    int64_t bad = 0, index, count = x.data ? tensor_count(x) : 0;
    while (bad < count && isfinite(x.data[bad]))
        bad++;
    for (int i = 0; i < 2 && bad < count; i++) {
        const st_tensor *t = suspects[i] ? weights_nonfinite(suspects[i], &index) : NULL;
        NEED(!t, "%s/%s: %s: element %lld is not a finite number, which shows at %s; the file is damaged, get it "
             "again%s", suspects[i]->folder, suspects[i]->stem, t->name, ll(index), stage,
             suspects[i]->fp8 ? ", or out of the range of --fp8, choose another type" : "");
    }
    NEED(bad == count, "%s: element %lld is %g, expected a finite number; an input is damaged, or a guidance or the "
         "weight of a low-rank update too large", stage, ll(bad), (double)x.data[bad]);
}

/* Ends a stage: x becomes what is given in its place, if anything is, is checked, and dumped in PyTorch's order. */
static void stage(const run *r, tensor x, const weights *first, const weights *second, const char *name)
{
    given(r, x, CHANNELS_FIRST, "%s", name);
    check_finite(x, name, first, second);
    dump(r, x, CHANNELS_FIRST, "%s", name);
}

/* y = p x + q v; y may be x or v. The factors are rounded to `real` once, the elements' products and sums each. */
static void blend_to(tensor y, tensor x, tensor v, double p, double q)
{
    real a = (real)p, b = (real)q;
    for (int64_t i = 0; i < tensor_count(y) && y.data; i++)
        y.data[i] = a * x.data[i] + b * v.data[i];
}

/* y = p x; y may be x. */
static void scale_to(tensor y, tensor x, double p) { blend_to(y, x, x, p, 0); }

/* As in torch's clamp a NaN stays; check_finite looks before and after. */
static void clamp(tensor x, real low, real high)
{
    for (int64_t i = 0; i < tensor_count(x) && x.data; i++)
        x.data[i] = x.data[i] < low ? low : x.data[i] > high ? high : x.data[i];
}

/* The first `count` channels of x [F][h][w][C] become those of y [F][h][w][C'] from `to` on. */
static void copy_channels(tensor y, int64_t to, tensor x, int64_t count)
{
    for (int64_t i = 0; y.data && i < tensor_count(y) / y.dim[3] * count; i++)
        y.data[i / count * y.dim[3] + to + i % count] = x.data[i / count * x.dim[3] + i % count];
}

/* The generator's next normal numbers as a tensor [F][h][w][Z]. torch fills its tensors in the order of memory, which
 * is (channel, frame, y, x) there. The numbers are float32 whatever `real` is, so both builds start from the same
 * noise; while planning none is drawn. */
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

/* ---------------------------------------------------------------- schedulers
 *
 * Training mixes a clean sample x0 (here: latents) with normal noise e of the same shape, at a random time t:
 *
 *     x = alpha x0 + beta e,    alpha = sqrt(A_t), beta = sqrt(1 - A_t), so that alpha^2 + beta^2 = 1
 *
 * alpha is how much signal is left, beta how much noise there is. A_t (alphas_cumprod[t]) falls from nearly 1 at t = 0
 * to nearly 0 at the last of the num_train_timesteps: it is the product of 1 - betas[s] for s <= t, where betas[s] is
 * the variance of the noise that one small step adds (the table betas[] is not the factor beta above).
 *
 * The model sees x and t and says what is what in x. Its output v means, by prediction_type:
 *
 *     epsilon         v = e                      x0 = (x - beta v) / alpha      e = v
 *     sample          v = x0                     x0 = v                         e = (x - alpha v) / beta
 *     v_prediction    v = alpha e - beta x0      x0 = alpha x - beta v          e = alpha v + beta x
 *
 * The last is Ruyi's (Salimans and Ho, 2022, arXiv 2202.00512, appendix D). With alpha = cos(phi), beta = sin(phi) it
 * is dx/dphi, the velocity, and neither formula divides: it is as good at pure noise, where epsilon says nothing of x0,
 * as at the clean end, where x0 says nothing of e.
 *
 * Sampling goes back from noise in a few large steps. All rules but the ancestral one follow the same curve, the
 * ordinary differential equation whose solutions have the distribution of x at every t; they differ in its coordinates
 * and in how much of it one call of the model tells them:
 *
 *     DDIM      first order, in (alpha, beta)           Euler A   as Euler, and fresh noise in every step
 *     Euler     first order, in sigma = beta / alpha    DPM++     second order, in lambda = ln(alpha / beta)
 *     PNDM      a classical formula of order four, in t
 *
 * Invariant: sched_new fills the tables and nothing changes them; sched_step moves `index` and history only.
 */

/* ---------------------------------------------------------------- schedulers: tables
 *
 *     betas [n] -> alphas_cumprod [n] -> sigmas [calls + 1]        n: num_train_timesteps
 *                       timesteps [calls] --^
 *
 * They are float32 in both builds and, operation by operation, torch's: the public classes hold them as float32 tensors
 * whatever the model computes in. A table in double would be another one from the eighth digit on, and so would every
 * step, while two float64 programs that share the table agree to twelve digits and more. Once rounded these numbers are
 * exact; what a step makes of them is computed in double.
 */

static bool is_euler(sched_type t) { return t == EULER || t == EULER_A; }

/* Whose tables are sigmas; the other two work on alphas_cumprod and timesteps. */
static bool has_sigmas(sched_type t) { return is_euler(t) || t == DPMPP; }

/* torch.linspace(a, z, n)[i] in float32, as its AVX2 code has it: fused, and from the nearer end, so that both ends are
 * exact. Without the fma 167 of 1000 betas differ in the last bit. */
static float linspace_f32(float a, float z, int64_t n, int64_t i)
{
    float step = (z - a) / (float)(n - 1);
    return i < n / 2 ? fmaf(step, (float)i, a) : fmaf(-step, (float)(n - 1 - i), z);
}

/* A at t of 0..1 in the cosine schedule, but for a constant factor (Nichol and Dhariwal, 2021, arXiv 2102.09672,
 * formula 17): the angle whose cosine is alpha grows evenly with time. */
static double cosine_bar(double t)
{
    double sine, cosine;
    sincos_own((t + 0.008) / 1.008 * 3.14159265358979323846 / 2, &sine, &cosine);
    return cosine * cosine;
}

/* betas[i]: the variance of the noise that training time i adds, by beta_schedule:
 *
 *     (trained_betas)     the file's own list
 *     squaredcos_cap_v2   from the cosine schedule's A, 1 - A(i+1)/A(i), at most 0.999 (betas_for_alpha_bar)
 *     linear              beta_start .. beta_end in even steps
 *     scaled_linear       their square roots in even steps, then squared: Ruyi's, as in latent diffusion
 */
static float beta_at(const sched_config *c, int64_t i)
{
    int64_t n = c->num_train_timesteps;
    if (c->trained_betas)
        return (float)c->trained_betas[i];
    if (!strcmp(c->beta_schedule, "squaredcos_cap_v2"))
        return (float)fmin(1 - cosine_bar((double)(i + 1) / (double)n) / cosine_bar((double)i / (double)n), 0.999);
    if (!strcmp(c->beta_schedule, "linear"))
        return linspace_f32((float)c->beta_start, (float)c->beta_end, n, i);
    float root = linspace_f32((float)sqrt(c->beta_start), (float)sqrt(c->beta_end), n, i);
    return root * root;
}

/* out[t] = A_t, the running product of 1 - betas. torch.cumprod of a float32 tensor: it runs in double, each value is
 * rounded. */
static void running_product(const float *betas, float *out, int64_t n)
{
    double product = 1;
    for (int64_t i = 0; i < n; i++)
        out[i] = (float)(product *= (double)(1.0f - betas[i]));
}

/* rescale_zero_terminal_snr (Lin et al., 2023, arXiv 2305.08891, algorithm 1): sqrt(A) shifted and scaled so that the
 * last is 0, pure noise, and the first stays. products [n] is room; the caller makes it anew from the new betas. */
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

/* The training time of step k of N, k = 0 .. N-1 from the noisiest to the cleanest: which N of the n are visited.
 * set_timesteps of each class; the names are those of table 2 of arXiv 2305.08891. round: half to even, as numpy's.
 *
 *     leading     (N-1-k) (n/N) + steps_offset, n/N an integer: begins below n-1, with some signal left
 *     trailing    round(n - k n/N) - 1: begins at n-1; n/N as numpy.arange has it, from its first two numbers
 *     linspace    N points from n-1 down to 0, rounded, but not for Euler and Euler A, whose sigmas are interpolated
 *
 * DPM++ takes leading and linspace with N+1 points and drops the cleanest, because its last step goes to sigma = 0
 * anyway.
 */
static double step_time(const scheduler *s, int64_t k)
{
    const sched_config *c = &s->config;
    int64_t n = c->num_train_timesteps, points = c->type == DPMPP ? s->steps + 1 : s->steps;
    int64_t up = points - 1 - k;            /* counted from the cleanest */
    if (c->timestep_spacing == LEADING)
        return (double)(up * (n / points) + c->steps_offset);
    double all = (double)n, last = all - 1, trail = all - all / (double)s->steps - all;
    if (c->timestep_spacing == TRAILING)
        return rint(all + (double)k * trail) - 1;
    double gap = points > 1 ? last / (double)(points - 1) : 0;
    double t = up && k == 0 ? last : (double)up * gap;      /* numpy sets the end, which up * gap may miss */
    return is_euler(c->type) ? (double)(float)t : rint(t);
}

/* Training times between one step and the next, in the integer division of the public classes. */
static int64_t stride(const scheduler *s) { return s->config.num_train_timesteps / s->steps; }

/* timesteps[i], the time of call i of the model: one a step, but for PNDM, which calls it more often. The three
 * noisiest steps b, with the next lower c and g half a stride, are four calls each, those of a Runge-Kutta step: b,
 * c+g, c+g, c. Without this warm-up (skip_prk_steps) the second step is called twice. PNDMScheduler.set_timesteps. */
enum { WARM_UP = 12 };
static double call_time(const scheduler *s, int64_t i)
{
    double half = (double)(stride(s) / 2);
    if (s->config.type != PNDM)
        return step_time(s, i);
    if (s->config.skip_prk_steps)
        return step_time(s, i > 1 ? i - 1 : i);
    if (i >= WARM_UP)
        return step_time(s, i - WARM_UP + 3);
    return i % 4 == 0 ? step_time(s, i / 4) : step_time(s, i / 4 + 1) + (i % 4 < 3 ? half : 0);
}

/* sigma = beta/alpha = sqrt((1-A)/A) at a time. The table over all times is float32, one rounding an operation; between
 * two of its entries numpy.interp's line in double, then rounded. */
static float sigma_at(const scheduler *s, double time)
{
    const float *a = s->alphas_cumprod;
    double last = (double)(s->config.num_train_timesteps - 1), t = fmin(fmax(time, 0), last);
    int64_t low = (int64_t)t, high = t < last ? low + 1 : low;
    float lower = sqrtf((1.0f - a[low]) / a[low]), upper = sqrtf((1.0f - a[high]) / a[high]);
    double slope = (double)upper - (double)lower;
    return (float)(slope * (t - (double)low) + (double)lower);
}

/* A scheduler for that many steps. What its rule remembers of earlier calls (history, of the latents' shape) comes from
 * the arena's high end, because it outlives the marks of the steps. sched_free gives the tables back.
 *
 * The first noise is scaled by init_noise_sigma. Euler's x is x0 + sigma e, so noise of size sigma (the largest) is
 * right where the first timestep is the last one of training; where `leading` leaves some signal, the classes take
 * sqrt(sigma^2 + 1). */
scheduler sched_new(arena *a, sched_config c, int64_t steps, shape latents)
{
    int64_t more = c.type != PNDM ? 0 : c.skip_prk_steps ? steps > 1 : WARM_UP - 3;      /* calls than steps */
    scheduler s = { .config = c, .steps = steps, .calls = steps + more, .init_noise_sigma = 1 };
    int64_t n = c.num_train_timesteps, remembered = c.type == PNDM ? 5 : c.type == DPMPP ? 1 : 0;
    double most = 0;            /* the largest sigma: the first, but for some tables that rescale_betas made */
    s.timesteps = allocate((size_t)s.calls, sizeof *s.timesteps);
    s.betas = allocate((size_t)(2 * n + s.calls + 1), sizeof *s.betas);     /* with the other float tables behind it */
    s.alphas_cumprod = s.betas + n;
    s.sigmas = s.alphas_cumprod + n;        /* the last stays 0: the clean end */
    for (int64_t i = 0; i < n; i++)
        s.betas[i] = beta_at(&c, i);
    if (c.rescale_betas_zero_snr)
        rescale_betas(s.betas, s.alphas_cumprod, n);
    running_product(s.betas, s.alphas_cumprod, n);
    if (c.rescale_betas_zero_snr && has_sigmas(c.type))
        s.alphas_cumprod[n - 1] = 0x1p-24f;     /* so that the largest sigma is finite */
    for (int64_t i = 0; i < s.calls; i++) {
        s.timesteps[i] = call_time(&s, i);
        s.sigmas[i] = has_sigmas(c.type) ? sigma_at(&s, s.timesteps[i]) : 0;
        most = fmax(most, (double)s.sigmas[i]);
    }
    if (is_euler(c.type))
        s.init_noise_sigma = c.timestep_spacing == LEADING ? sqrt(most * most + 1) : most;
    for (int64_t i = 0; i < remembered; i++)
        s.history[i] = tensor_new_high(a, latents);
    return s;
}

/* Gives back what sched_new allocated; history is the arena's. */
void sched_free(scheduler *s)
{
    free(s->timesteps);
    free(s->betas);
}

/* timesteps [calls]: whole numbers, as torch's int64, but for Euler and Euler A. */
static void dump_timesteps(const run *r, const scheduler *s)
{
    int64_t *whole = allocate((size_t)s->calls, sizeof *whole);
    for (int64_t i = 0; i < s->calls; i++)
        whole[i] = (int64_t)s->timesteps[i];
    bool fractions = is_euler(s->config.type);
    dump_data(r, fractions ? (const void *)s->timesteps : whole, fractions ? F64 : I64, SHAPE(s->calls), "timesteps");
    free(whole);
}

/* ---------------------------------------------------------------- schedulers: steps
 *
 * x is the sample, v the model's output, both of the latents' shape [F][h][w][Z], taken element by element; a prime
 * marks the next timestep. Each rule turns x into x' in place. Its factors are computed in double from the float32
 * tables and rounded to `real` once; the elements' sums are in `real`.
 *
 * Accuracy: against diffusers in float64, over up to 50 steps, rel-L2 within 2e-14 in the float64 build and 4e-5 in the
 * float32 build (tests/unit.c).
 */

/* x = scale_model_input(sample) for the next call. The model knows x = alpha x0 + beta e only; Euler's sample is
 * x0 + sigma e, that is x / alpha, and alpha = 1 / sqrt(sigma^2 + 1). */
void sched_input(const scheduler *s, tensor x, tensor sample)
{
    double sigma = (double)s->sigmas[s->index];
    scale_to(x, sample, is_euler(s->config.type) ? 1 / sqrt(sigma * sigma + 1) : 1);
}

/* The clean sample is x0 = (x_share x + v_share v) / divisor, by the table at the head of this section; then clamped to
 * +-bound and divided by unit. The division comes last because alpha is 0 where a schedule ends in pure noise. */
typedef struct { real x_share, v_share, divisor, bound, unit; } clean_rule;

/* size: by how much the sample is larger than the x that the model knows. */
static clean_rule clean_rule_of(prediction type, double alpha, double beta, double size)
{
    double x = type == V_PREDICTION ? alpha : type == EPSILON ? 1 : 0, v = type == SAMPLE ? 1 : -beta;
    return (clean_rule){ (real)(x / size), (real)v, (real)(type == EPSILON ? alpha : 1), (real)INFINITY, 1 };
}

static real clean(const clean_rule *c, real x, real v)
{
    real x0 = (c->x_share * x + c->v_share * v) / c->divisor;
    return (x0 < -c->bound ? -c->bound : x0 > c->bound ? c->bound : x0) / c->unit;
}

/* The magnitude of a clean sample that `rank` others are below. Without its sign a double's bits are in the order of
 * its value, so bisection finds them from the highest down; a copy to be sorted would cost memory. */
static double ranked(const clean_rule *c, tensor x, tensor v, int64_t rank)
{
    uint64_t found = 0;
    for (int bit = 62; bit >= 0; bit--) {
        uint64_t limit = found | (uint64_t)1 << bit;
        int64_t below = 0;
        for (int64_t i = 0; i < tensor_count(x) && x.data; i++)
            below += double_bits(fabs((double)clean(c, x.data[i], v.data[i]))) < limit;
        if (below <= rank)
            found = limit;
    }
    return bits_double(found);
}

/* Where the configuration bounds the clean samples.
 *
 * Formula   clip_sample: bound clip_sample_range.   thresholding: bound and unit s, the dynamic_thresholding_ratio's
 *           quantile of all |x0|, linear between two of them, and at least 1 and at most sample_max_value
 * Method    strong guidance drives x0 beyond the range of training; a bound cuts it off, a unit as large brings all of
 *           it back to -1..1
 * Source    Saharia et al., 2022, arXiv 2205.11487, section 2.3; _threshold_sample of the schedulers, torch.quantile
 */
static void bound_clean(const scheduler *s, clean_rule *c, tensor x, tensor v)
{
    const sched_config *f = &s->config;
    if (f->thresholding) {
        double place = f->dynamic_thresholding_ratio * (double)(tensor_count(x) - 1), part = place - floor(place);
        double low = ranked(c, x, v, (int64_t)place), high = part > 0 ? ranked(c, x, v, (int64_t)place + 1) : low;
        double value = part < 0.5 ? low + part * (high - low) : high - (high - low) * (1 - part);
        value = value < 1 ? 1 : value;
        c->bound = c->unit = (real)(value > f->sample_max_value ? f->sample_max_value : value);
    } else if (f->clip_sample) {
        c->bound = (real)f->clip_sample_range;
    }
}

/* A at a timestep. The last step goes below 0, to the clean sample (A = 1, set_alpha_to_one) or to the first entry of
 * the table; `leading` with a large steps_offset goes beyond the end, and gets its last entry. */
static double alpha_at(const scheduler *s, double t)
{
    double last = (double)(s->config.num_train_timesteps - 1);
    return t < 0 && s->config.set_alpha_to_one ? 1 : (double)s->alphas_cumprod[(int64_t)fmin(fmax(t, 0), last)];
}

/* DDIM, deterministic (eta 0).
 *
 * Formula   x' = alpha' x0 + beta' e
 * Method    splits x into signal and noise as the model sees them, and mixes them anew with the next step's shares:
 *           more signal, less noise. It is exact as long as x0 and e stay the same from one step to the next.
 *           bound_clean bounds x0; e stays that of the unbounded x0 (use_clipped_model_output is false).
 * Source    Song, Meng, Ermon, 2020, arXiv 2010.02502, formula 12; DDIMScheduler.step
 */
static void step_ddim(const scheduler *s, tensor x, tensor v)
{
    double t = s->timesteps[s->index], now = alpha_at(s, t), then = alpha_at(s, t - (double)stride(s));
    double alpha = sqrt(now), beta = sqrt(1 - now);
    prediction type = s->config.prediction_type;
    clean_rule c = clean_rule_of(type, alpha, beta, 1);
    bound_clean(s, &c, x, v);
    real keep = (real)sqrt(then), noise = (real)sqrt(1 - then), a = (real)alpha, b = (real)beta;
    for (int64_t i = 0; i < tensor_count(x) && x.data; i++) {
        real xi = x.data[i], vi = v.data[i];
        real e = type == V_PREDICTION ? a * vi + b * xi : type == EPSILON ? vi : (xi - a * vi) / b;
        x.data[i] = keep * clean(&c, xi, vi) + noise * e;
    }
}

/* Euler, and Euler ancestral where there is noise.
 *
 * Formula   x' = x + (x - x0)/s (down - s) + up noise
 *           up = sqrt(s'^2 (s^2 - s'^2) / s^2),  down = sqrt(s'^2 - up^2);   plain Euler: up = 0, down = s'
 * Method    with x = x0 + s e the curve's slope is dx/ds = (x - x0)/s = e, and one straight line goes to the next
 *           sigma. The ancestral step goes further down than s' and makes up for it with fresh noise, down^2 + up^2 =
 *           s'^2, so errors of early steps are washed out; in the last step s' = 0 and so is up, but its noise is drawn
 *           all the same. x here is 1/alpha = sqrt(s^2 + 1) times the x that the model knows, which is why x_share is
 *           divided by `size`.
 * Source    Karras et al., 2022, arXiv 2206.00364, algorithm 1 without its second-order correction; k-diffusion's
 *           sample_euler_ancestral; EulerDiscreteScheduler.step, EulerAncestralDiscreteScheduler.step
 */
static void step_euler(const scheduler *s, tensor x, tensor v, tensor noise)
{
    double sigma = (double)s->sigmas[s->index], next = (double)s->sigmas[s->index + 1], size = sqrt(sigma * sigma + 1);
    double up = noise.data ? sqrt(next * next * (sigma * sigma - next * next) / (sigma * sigma)) : 0;
    double down = noise.data ? sqrt(next * next - up * up) : next;
    clean_rule c = clean_rule_of(s->config.prediction_type, 1 / size, sigma / size, size);
    real step = (real)(down - sigma), divisor = (real)sigma, amount = (real)up;
    for (int64_t i = 0; i < tensor_count(x) && x.data; i++) {
        real x0 = clean(&c, x.data[i], v.data[i]);
        x.data[i] = x.data[i] + (x.data[i] - x0) / divisor * step;
        if (noise.data)
            x.data[i] += amount * noise.data[i];
    }
}

/* DPM-Solver++ 2M: second order, multistep, midpoint.
 *
 * Formula   x' = beta'/beta x - alpha' (exp(-h) - 1) M,      lambda = ln alpha - ln beta,  h = lambda' - lambda
 *           M = m + (m - m_before) h / (2 h_before),         m = x0, h_before of the step before
 * Method    in lambda the linear part of the equation is solved exactly, and only x0 is approximated: by its value
 *           (first order, which is DDIM), or by the line through this call's and the last one's, taken at the middle of
 *           the step. First order, M = m, in the first step, which has no call before it, and in the last
 *           (lower_order_final): there beta' = 0 and h is infinite, so x' = m. history[0]: m of the call before.
 * Source    Lu et al., 2022, arXiv 2211.01095, algorithm 2; DPMSolverMultistepScheduler.step
 */
static void step_dpmpp(const scheduler *s, tensor x, tensor v)
{
    double la[3], al[3], be[3];     /* the step before, now, next; infinite lambdas are 0 and not used */
    for (int64_t i = 0; i < 3; i++) {
        int64_t at = s->index - 1 + i;
        double sigma = at < 0 ? 0 : (double)s->sigmas[at];
        al[i] = 1 / sqrt(sigma * sigma + 1);
        be[i] = sigma * al[i];
        la[i] = sigma > 0 ? log_own(al[i]) - log_own(be[i]) : 0;
    }
    double h = la[2] - la[1], ratio = (la[1] - la[0]) / h;
    bool last = s->index + 1 == s->calls, second = s->index > 0 && !last;
    clean_rule c = clean_rule_of(s->config.prediction_type, al[1], be[1], 1);
    bound_clean(s, &c, x, v);
    real keep = (real)(be[2] / be[1]);
    real gain = (real)(last ? 1 : -al[2] * (exp_own(-h) - 1)), bend = (real)(second ? 1 / (2 * ratio) : 0);
    for (int64_t i = 0; i < tensor_count(x) && x.data; i++) {
        real m = clean(&c, x.data[i], v.data[i]), m0 = s->history[0].data[i];
        s->history[0].data[i] = m;
        x.data[i] = keep * x.data[i] + gain * (second ? m + bend * (m - m0) : m);
    }
}

/* PNDM's transfer R(x, t, p, m): takes x from time t to p along the model's output m, into y (may be x).
 *
 * Formula   y = sqrt(P/A) x - (P - A) e / (A sqrt(1-P) + sqrt(A (1-A) P)),    A = A_t, P = A_p, e from m
 * Method    DDIM's step, with x0 eliminated: exact for a constant e. Any combination of outputs can stand for m, which
 *           is what makes classical solvers usable ("pseudo" numerical methods).
 * Source    Liu et al., 2022, arXiv 2202.09778, formula 9; PNDMScheduler._get_prev_sample
 */
static void pndm_transfer(const scheduler *s, tensor y, tensor x, double t, double p, tensor m)
{
    double a = alpha_at(s, t), b = alpha_at(s, p), change = (b - a) / (a * sqrt(1 - b) + sqrt(a * (1 - a) * b));
    bool velocity = s->config.prediction_type == V_PREDICTION;
    real e_m = (real)(velocity ? sqrt(a) : 1), e_x = (real)(velocity ? sqrt(1 - a) : 0);
    real keep = (real)sqrt(b / a), c = (real)change;
    for (int64_t i = 0; i < tensor_count(x) && x.data; i++)
        y.data[i] = keep * x.data[i] - c * (e_m * m.data[i] + e_x * x.data[i]);
}

/* y += part v. */
static void add_part(tensor y, tensor v, double part) { blend_to(y, y, v, 1, part); }

/* PNDM: a Runge-Kutta warm-up, then linear multistep (PLMS).
 *
 * Formula   x' = R(x, t, t - n/N, (55 v - 59 v_1 + 37 v_2 - 9 v_3) / 24),    v_k the output k steps before
 *           warm-up, from b to the next lower c in four calls, all from the sample at b: along each call's own output
 *           to half way, half way, c; the last to c along v1/6 + v2/3 + v3/3 + v4/6
 * Method    Adams-Bashforth of order four needs three outputs before it. The first three steps make them, with the four
 *           calls of classical Runge-Kutta each; the first call's output is remembered. Hence N + 9 calls and N >= 4.
 *           Without the warm-up (skip_prk_steps) the order grows from one to four with the outputs there are, a row of
 *           adams[] a call; the second row makes the first step anew, from where it began, along the mean of the first
 *           two outputs, of which the second is not remembered. Hence N + 1 calls.
 * State     history[0..2]: the outputs remembered, the newest first; [3]: the sample that a step of several calls began
 *           with, which every fourth call keeps, whether it is needed or not; [4]: a sum of outputs
 * Source    Liu et al., 2022, arXiv 2202.09778, algorithm 2; PNDMScheduler.step_prk, step_plms
 */
static void step_pndm(scheduler *s, tensor x, tensor v)
{
    static const double kutta[] = { 1.0 / 6, 1.0 / 3, 1.0 / 3, 1.0 / 6 };
    static const double adams[][4] = { { 1 }, { 0.5, 0.5 }, { 1.5, -0.5 }, { 23.0 / 12, -16.0 / 12, 5.0 / 12 },
                                       { 55.0 / 24, -59.0 / 24, 37.0 / 24, -9.0 / 24 } };
    int64_t i = s->index, j = i % 4;
    bool skip = s->config.skip_prk_steps, again = skip && i == 1, warm_up = !skip && i < WARM_UP;
    tensor *remembered = s->history, start = s->history[3], m = s->history[4];
    if (j == 0)
        tensor_copy(start, x);
    if (warm_up) {
        double half = (double)(stride(s) / 2), b = s->timesteps[i - j], c = s->timesteps[i - j + 3];
        if (j == 0)
            tensor_fill(m, 0);
        add_part(m, v, kutta[j]);
        pndm_transfer(s, x, start, b, j == 0 ? b - half : j == 1 ? c + half : c, j == 3 ? m : v);
    } else {
        const double *share = adams[skip && i < 4 ? i : 4], t = s->timesteps[i] + (again ? (double)stride(s) : 0);
        scale_to(m, v, share[0]);
        for (int k = 1; k < 4 && share[k] != 0; k++)
            add_part(m, remembered[k - 1], share[k]);
        pndm_transfer(s, x, again ? start : x, t, t - (double)stride(s), m);
    }
    for (int k = 2; k >= 0 && (warm_up ? j == 0 : !again); k--)
        tensor_copy(remembered[k], k > 0 ? remembered[k - 1] : v);
}

/* The sample of the next call, in place. noise: of the sample's shape, for Euler A alone; data NULL: none. */
void sched_step(scheduler *s, tensor sample, tensor v, tensor noise)
{
    sched_type type = s->config.type;
    if (type == DDIM)
        step_ddim(s, sample, v);
    else if (is_euler(type))
        step_euler(s, sample, v, noise);
    else if (type == DPMPP)
        step_dpmpp(s, sample, v);
    else
        step_pndm(s, sample, v);
    s->index++;
}

/* ---------------------------------------------------------------- schedulers: configuration */

static const char *const sched_names[SCHEDULERS] = { "ddim", "euler", "euler_a", "dpm++", "pndm" };

/* The words of scheduler_config.json; the last two in the order of ruyi.h's `prediction` and `spacing`. */
static const char *const beta_schedules[] = { "linear", "scaled_linear", "squaredcos_cap_v2" };
static const char *const predictions[] = { "epsilon", "sample", "v_prediction" };
static const char *const spacings[] = { "leading", "trailing", "linspace" };

/* Fields that choose between variants of a class, and the JSON values that mean the one that is here; so does null. The
 * other classes ignore the field, and so does this program: one file, made for one scheduler, has to serve all five, as
 * the public code's --scheduler does. Values that are foreign to a class, but that it takes: solver_type's last three
 * are those of DEIS and UniPC and count as midpoint; variance_type's are DDPM's, and only a learned variance would cut
 * the model's output to 3 channels. */
enum { OF_EULER = 1 << EULER, OF_DPMPP = 1 << DPMPP, OF_BOTH = OF_EULER | OF_DPMPP };
static const struct { const char *field, *values; unsigned classes; } variants[] = {
    { "use_karras_sigmas", "false", OF_BOTH }, { "use_exponential_sigmas", "false", OF_BOTH },
    { "use_beta_sigmas", "false", OF_BOTH }, { "final_sigmas_type", "\"zero\"", OF_BOTH },
    { "interpolation_type", "\"linear\"", OF_EULER }, { "timestep_type", "\"discrete\"", OF_EULER },
    { "use_lu_lambdas", "false", OF_DPMPP }, { "use_flow_sigmas", "false", OF_DPMPP },
    { "algorithm_type", "\"dpmsolver++\"", OF_DPMPP }, { "solver_order", "2", OF_DPMPP },
    { "lambda_min_clipped", "-Infinity", OF_DPMPP },
    { "solver_type", "\"midpoint\", \"logrho\", \"bh1\", \"bh2\"", OF_DPMPP },
    { "variance_type", "\"fixed_small\", \"fixed_small_log\", \"fixed_large\", \"fixed_large_log\"", OF_DPMPP },
};

/* Dies where a field asks for a variant that is not here. A value is found whole among `values`, or not at all: all but
 * numbers have quotes, or are words of JSON. */
static void refuse_unsupported(config f, sched_type type)
{
    for (size_t i = 0; i < sizeof variants / sizeof *variants; i++) {
        json v = variants[i].classes >> type & 1 ? config_member(f, variants[i].field) : (json){ 0 };
        if (!v.text)
            continue;
        char *value = text_of("%.*s", (int)(v.end - v.text), v.text);
        CONFIG_NEED(strstr(variants[i].values, value), f, variants[i].field,
                    "expected %s; nothing else is supported", variants[i].values);
        free(value);
    }
}

/* Reads a model's scheduler/ as diffusers' class of that type would (from_pretrained): fields that a class does not
 * have are ignored, and what a file leaves out has that class's default. So the same file gives DDIM the spacing
 * `leading` and Euler `linspace` where it names none. Not every class has every field: clip_sample is DDIM's (and on
 * where the file does not say), skip_prk_steps PNDM's, thresholding DDIM's and DPM++'s, rescale_betas_zero_snr all but
 * PNDM's. Dies where a value makes no schedule (betas are variances, in 0..1), and of Euler A and PNDM where the model
 * predicts x0: their public classes do not have that formula. */
sched_config sched_read(const char *folder, sched_type type)
{
    config f = config_open(folder, "scheduler_config.json");
    bool ddim = type == DDIM;
    const char *usual = ddim || type == PNDM ? "leading" : "linspace";
    bool bounds = (ddim || type == DPMPP) && config_bool(f, "thresholding", false);
    sched_config c = {
        .file = f, .type = type, .set_alpha_to_one = config_bool(f, "set_alpha_to_one", ddim), .thresholding = bounds,
        .num_train_timesteps = config_int(f, "num_train_timesteps", 1000, 2, 1000000),
        .beta_start = config_real(f, "beta_start", 0.0001), .beta_end = config_real(f, "beta_end", 0.02),
        .beta_schedule = beta_schedules[config_choice(f, "beta_schedule", "linear", beta_schedules, 3)],
        .rescale_betas_zero_snr = type != PNDM && config_bool(f, "rescale_betas_zero_snr", false),
        .timestep_spacing = (spacing)config_choice(f, "timestep_spacing", usual, spacings, 3),
        .steps_offset = config_int(f, "steps_offset", 0, 0, 1000000),
        .skip_prk_steps = type == PNDM && config_bool(f, "skip_prk_steps", false),
        .prediction_type = (prediction)config_choice(f, "prediction_type", "epsilon", predictions, 3),
        .clip_sample = ddim && config_bool(f, "clip_sample", true),
        .clip_sample_range = config_real(f, "clip_sample_range", 1.0),
        .dynamic_thresholding_ratio = bounds ? config_real(f, "dynamic_thresholding_ratio", 0.995) : 0,
        .sample_max_value = bounds ? config_real(f, "sample_max_value", 1.0) : 1,
    };
    c.trained_betas = config_reals(f, "trained_betas", c.num_train_timesteps, "num_train_timesteps");
    refuse_unsupported(f, type);
    CONFIG_NEED(c.prediction_type != SAMPLE || (type != EULER_A && type != PNDM), f, "prediction_type",
                "which %s does not take; choose another --scheduler", sched_names[type]);
    CONFIG_NEED(c.beta_start >= 0 && c.beta_end >= 0 && c.beta_start <= 1 && c.beta_end <= 1, f, "beta_start",
                "expected beta_start and beta_end from 0 to 1");
    CONFIG_NEED(c.dynamic_thresholding_ratio >= 0 && c.dynamic_thresholding_ratio <= 1, f, "dynamic_thresholding_ratio",
                "expected 0 to 1");
    CONFIG_NEED(c.sample_max_value > 0, f, "sample_max_value", "expected more than 0");
    return c;
}

/* ---------------------------------------------------------------- checkpoint
 *
 * --checkpoint FILE: what cannot be had again without computing it for minutes, in one safetensors file, which is
 * replaced by rename after every step and every slice of the VAE. The same command finds it and goes on.
 *
 *     identity                        hashes of what decides the bytes of the result: program, options, pictures, model
 *     slice.NNNN                      before the first step: what the VAE's encoder has made so far
 *     latents, inpaint, history, ...  from the first step on: what denoise carries from one call to the next
 *     slice.NNNN                      after the last step: the decoder's slices, and those of the smoothing pass
 *     work                            operations so far, for the percentage
 *     sum U64 [1]                     over every byte before it
 *
 * All but the sum are U8 [size]: memory as it is, which goes back to where it was. Shapes and types need no record,
 * since the identity stands for them: it decides everything that a run computes, precision and byte order included.
 *
 * Nothing in it depends on when it was written, so any process may go on from any file of the same identity, and two
 * that work on the same one do no harm. Not in it: CLIP's tokens, which take seconds; and, because they are larger than
 * everything else, TeaCache's two tensors (one call makes them again) and the frames that a cached VAE remembers (it
 * decodes from its first slice).
 */
enum { PROGRAM, COMMAND_LINE, PICTURES, MODEL_FILES, IDENTITY };

struct checkpoint {
    const char *path;
    uint64_t identity[IDENTITY];
    safetensors *file;          /* FILE as it is on the disk, mapped; NULL: there is none */
    int64_t slices;             /* of the VAE, asked for since the file had none */
    char slice[32];             /* the name of the last of them */
    double *work;               /* the arena's count: goes into the file, so that a percentage goes on, too */
};

static volatile sig_atomic_t stop_signal, may_stop;     /* the signal that came; whether a run looks for it */

/* Threads, compiler and names of folders decide nothing. Of the model every byte counts, which finds a file that was
 * exchanged under its name; reading all of it takes as long as reading it for one row of one call. */
static void identify(const job *j, uint64_t identity[IDENTITY])
{
    static const int64_t program[] = { 2, sizeof(real), sizeof(generator) };    /* 2: this form of checkpoint */
    const weights *parts[] = { vae_weights(j->vae), clip_weights(j->clip), dit_weights(j->dit), j->embeddings };
    const config files[] = { vae_settings(j->vae)->file, clip_settings(j->clip)->file, dit_settings(j->dit)->file,
                             clip_settings(j->clip)->preprocessor, j->sched.file };
    uint64_t model = 0, pictures = (uint64_t)j->starts;     /* which are start pictures, and which end */
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < parts[i]->nfiles; k++)
            model = hash_bytes(model, parts[i]->files[k]->map, parts[i]->files[k]->size);
    for (int i = 0; i < 5; i++)
        model = hash_bytes(model, files[i].root.text, (size_t)(files[i].root.end - files[i].root.text));
    for (int i = 0; i < j->nloras; i++)
        model = hash_bytes(model, j->loras[i]->map, j->loras[i]->size);
    model = hash_bytes(model, j->lora_scales, (size_t)j->nloras * sizeof *j->lora_scales);
    for (int i = 0; i < j->starts + j->ends; i++) {
        const image *p = i < j->starts ? &j->start[i] : &j->end[i - j->starts];
        pictures = hash_bytes(hash_bytes(pictures, p, offsetof(image, rgb)), p->rgb, (size_t)(3 * p->w * p->h));
    }
    identity[PROGRAM] = hash_bytes(hash_bytes(0, program, sizeof program), RUYI_VERSION, sizeof RUYI_VERSION);
    identity[COMMAND_LINE] = j->options;
    identity[PICTURES] = pictures;
    identity[MODEL_FILES] = model;
}

/* Memory as an entry of a checkpoint: `count` of what a pointer points at; a tensor. */
#define RAW(name, data, count) (st_entry){ name, U8, SHAPE((int64_t)((count) * sizeof *(data))), data }
static st_entry entry_of(const char *name, tensor x)
{
    return RAW(name, x.data, (size_t)tensor_count(x));
}

/* Fills the entry's data from FILE, where that has it. Of the same run, it has the same size. */
static bool restored(const struct checkpoint *k, st_entry e)
{
    const st_tensor *t = e.data && k && k->file ? safetensors_find(k->file, e.name) : NULL;
    if (!t || t->bytes != shape_count(e.shape))
        return false;
    memcpy((void *)(uintptr_t)e.data, t->data, (size_t)t->bytes);
    return true;
}

/* Is this valid file a checkpoint of that identity? false: the reason. Pure. */
bool checkpoint_check(const safetensors *file, const uint64_t identity[IDENTITY], char reason[REASON])
{
    static const char *const others[IDENTITY] = { "build of the program", "options", "pictures", "model" };
    const st_tensor *t = safetensors_find(file, "identity");
    uint64_t found[IDENTITY];
    if (!t || t->bytes != sizeof found)
        return snprintf(reason, REASON, "got another kind of file"), false;
    if (!safetensors_intact(file))
        return snprintf(reason, REASON, "got a damaged file"), false;
    memcpy(found, t->data, sizeof found);
    for (int i = 0; i < IDENTITY; i++)
        if (found[i] != identity[i])
            return snprintf(reason, REASON, "got that of a run with another %s", others[i]), false;
    return true;
}

/* Finds FILE, if it exists, and refuses any but this run's. After the pictures are at their size. */
static void checkpoint_open(const job *j, struct checkpoint *k, double *work)
{
    char reason[REASON];
    *k = (struct checkpoint){ .path = j->checkpoint, .work = work };
    identify(j, k->identity);
    if (!file_exists(k->path))
        return;
    k->file = safetensors_open(k->path);
    NEED(checkpoint_check(k->file, k->identity, reason), "%s: checkpoint: %s, expected this run's; give another "
         "--checkpoint, or remove the file", k->path, reason);
    restored(k, RAW("work", work, WORKS));
}

/* FILE anew: its identity; the tensors that it had, where they are kept; these entries, as far as they have data; the
 * work so far; and the sum. k NULL: nobody asked for it. */
static void checkpoint_write(struct checkpoint *k, const st_entry *entries, int count, bool keep)
{
    if (!k)
        return;
    int64_t kept = keep && k->file ? k->file->count - 2 : 0;        /* without work and sum */
    st_entry *list = allocate((size_t)(kept + count + 3), sizeof *list);
    int n = 0;
    list[n++] = RAW("identity", k->identity, IDENTITY);
    for (; n < kept; n++) {
        const st_tensor *t = &k->file->tensors[n];
        list[n] = RAW(t->name, t->data, (size_t)t->bytes);
    }
    for (int i = 0; i < count; i++)
        if (entries[i].data)
            list[n++] = entries[i];
    list[n++] = RAW("work", k->work, WORKS);
    list[n++] = (st_entry){ "sum", U64, SHAPE(1), NULL };
    safetensors_write(k->path, list, n, true);
    free(list);
    if (k->file)
        safetensors_close(k->file);
    k->file = safetensors_open(k->path);
    k->slices = keep ? k->slices : 0;
}

bool slice_restored(const run *r, tensor out)
{
    struct checkpoint *k = r->checkpoint;
    if (k && out.data)
        snprintf(k->slice, sizeof k->slice, "slice.%04lld", ll(k->slices++));
    return k && restored(k, entry_of(k->slice, out));
}

/* After slice_restored, which gave it its name. */
void slice_save(const run *r, tensor out)
{
    if (r->checkpoint && out.data)
        checkpoint_write(r->checkpoint, (st_entry[]){ entry_of(r->checkpoint->slice, out) }, 1, true);
}

/* ---------------------------------------------------------------- progress
 *
 * On standard error, so that standard output stays free for a clip, and for programs in a file of JSON lines. Stages
 * report pieces done of pieces in all; what is left of a stage is judged by the time that its done part took. What is
 * left of the run is judged by the operations counted in the plan, each at the rate that was measured before the run.
 */

/* encode, clip, denoise or decode; when it began (seconds), and the share of it that had been done then */
typedef struct { const char *name; double start, part; } stage_begin;

struct progress {
    bool quiet, terminal;                   /* terminal: may go back to the beginning of a line */
    double last, last_line, last_json;      /* seconds: the last report, the last that made a line, an object */
    stage_begin stage;                      /* under way */
    int64_t done, total;                    /* its pieces, at its last report */
    FILE *json; const char *json_path;      /* NULL: none */
    const double *rate, *planned;           /* seconds an operation of a kind takes; the operations of the run */
    double start, begun;                    /* when the run began, and what had been done then, in planned seconds */
};

/* How far a stage and the run are. */
typedef struct {
    int64_t done, total;        /* pieces of the stage */
    double part, spent, left, step;     /* of the stage: 0..1, and seconds; step: of one, 0 where there is none */
    double run_part, run_left;  /* of the run; left: negative where it cannot be told yet */
} report_line;

/* Seconds from some start; a clock that nobody sets. */
static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The most memory that the process ever had, mapped weights and all, in bytes: the system counts in kilobytes, and
 * Apple's in bytes. */
static double peak_memory(void)
{
    struct rusage used = { 0 };
#ifdef __APPLE__
    const double unit = 1;
#else
    const double unit = 1024;
#endif
    getrusage(RUSAGE_SELF, &used);
    return unit * (double)used.ru_maxrss;
}

/* The time that operations take at the measured rates. */
static double work_seconds(const double rate[WORKS], const double count[WORKS])
{
    double seconds = 0;
    for (int i = 0; i < WORKS; i++)
        seconds += rate[i] * count[i];
    return seconds;
}

/* Tenths below 100 seconds, hours:minutes:seconds above. */
static void print_span(FILE *to, double seconds, const char *after)
{
    if (seconds < 100)
        fprintf(to, "%.1f s%s", seconds, after);
    else
        fprintf(to, "%d:%02d:%02d%s", (int)(seconds / 3600), (int)(seconds / 60) % 60, (int)seconds % 60, after);
}

/* What is under way, how long one step takes, how long until the end of the stage (at its end, how long it took); then
 * the run's share and time left, and the memory. A terminal gets a bar of thirty characters before it. */
static void print_progress(const struct progress *p, report_line at)
{
    static const char full[] = "##############################", empty[] = "..............................";
    int width = (int)sizeof full - 1, bar = (int)(at.part * width + 0.5);
    bool ends = at.done == at.total;
    fprintf(stderr, "%s%-8s", p->terminal ? "\r\033[K" : "", p->stage.name);
    if (p->terminal)
        fprintf(stderr, "[%.*s%.*s] ", bar, full, width - bar, empty);
    fprintf(stderr, "%s%lld/%lld %3.0f %%  ", at.step > 0 ? "step " : "", ll(at.done), ll(at.total), 100 * at.part);
    if (at.step > 0)
        print_span(stderr, at.step, " a step  ");
    print_span(stderr, ends ? at.spent : at.left, ends ? "" : " left");
    fprintf(stderr, "  run %.0f %%%s", 100 * at.run_part, at.run_left >= 0 ? ", " : "");
    if (at.run_left >= 0)
        print_span(stderr, at.run_left, " left");
    fprintf(stderr, ", peak %.0f MB%s", peak_memory() / 1e6, !ends && p->terminal ? "" : "\n");
}

/* One object a line, flushed: percent and seconds_left are the run's. */
static void json_progress(struct progress *p, const char *stage, report_line at)
{
    fprintf(p->json, "{\"stage\":\"%s\",\"done\":%lld,\"total\":%lld,\"stage_percent\":%.2f,\"percent\":%.2f,"
            "\"seconds\":%.3f,\"seconds_a_step\":%.3f,\"seconds_left\":%.3f,\"peak_memory\":%.0f}\n", stage,
            ll(at.done), ll(at.total), 100 * at.part, 100 * at.run_part, now() - p->start, at.step, at.run_left,
            peak_memory());
    MUST(!fflush(p->json), "%s: progress: got \"%s\", expected to write it; check the disk", p->json_path,
         strerror(errno));
}

/* Where the run is after that much work; part: the stage's share, which may be finer than done / total.
 *
 * Formula   left of the stage: spent / share (1 - part), share what was done since it began
 *           left of the run:   (all - is) (time - start) / (is - begun), in planned seconds: the plan's rates give the
 *           proportions of the stages, and the clock how fast this machine is today. At most 99.9 % until it ends
 */
static report_line line_of(const struct progress *p, const double work[WORKS], double part, double time)
{
    double spent = time - p->stage.start, share = part - p->stage.part;
    double all = work_seconds(p->rate, p->planned), is = work_seconds(p->rate, work);
    bool steps = share > 0 && !strcmp(p->stage.name, "denoise");
    return (report_line){
        .done = p->done, .total = p->total, .part = part, .spent = spent,
        .left = share > 0 ? spent / share * (1 - part) : 0, .step = steps ? spent / (share * (double)p->total) : 0,
        .run_part = all > 0 ? fmin(is / all, 0.999) : 0,
        .run_left = is > p->begun ? fmax(all - is, 0) * (time - p->start) / (is - p->begun) : -1,
    };
}

/* `done` of `total` pieces of a stage, which began with the last report before its first; denoise reports its beginning
 * itself, since a checkpoint may have some of its steps. "block" refines the denoising step under way: at full size one
 * step takes minutes. It has no line of its own name, and a step's last block none at all, since the step reports the
 * same at once. A stage may begin again (the VAE encodes the mask, then the video): no more pieces done than before
 * say so. A terminal gets a bar that moves ten times a second at most; anything else a line at every step and end of a
 * stage, and every ten seconds; the JSON file all pieces, but blocks every ten seconds. */
void progress(const run *r, const char *stage, int64_t done, int64_t total)
{
    struct progress *p = r->progress;
    if (!p || r->arena->planning)
        return;
    if (stop_signal && r->checkpoint)       /* what has been computed is in FILE */
        die(SYSTEM_ERROR, "stopped by signal %d: %s; the same command goes on from there", (int)stop_signal,
            r->checkpoint->file ? r->checkpoint->path : "nothing had been computed yet");
    double time = now(), part = (double)done / (double)total;
    bool block = !strcmp(stage, "block"), denoise = !strcmp(stage, "denoise");
    bool begins = !block && (!p->stage.name || strcmp(p->stage.name, stage) != 0 || done <= p->done);
    if (begins)
        p->stage = (stage_begin){ stage, denoise ? time : p->last, denoise ? part : 0 };
    p->last = time;
    if (block) {
        part = ((double)p->done + part) / (double)p->total;
    } else {
        p->done = done;
        p->total = total;
    }
    if ((begins && denoise) || (block && done == total))    /* nothing done yet; a last block: the step will say so */
        return;
    report_line at = line_of(p, r->arena->work, part, time);
    bool milestone = !block && (denoise || done == total);
    if (!p->quiet && (milestone || time - p->last_line > (p->terminal ? 0.1 : 10))) {
        p->last_line = time;
        print_progress(p, at);
    }
    if (p->json && (!block || time - p->last_json > 10)) {
        p->last_json = time;
        json_progress(p, p->stage.name, at);
    }
}

/* ---------------------------------------------------------------- pipeline
 *
 *     x = noise                                              fresh_noise
 *     inpaint = what is given, as latents                    inpaint_latents
 *     for each timestep t, noisiest first:                   denoise
 *         v_neg, v_pos = model(x, t, inpaint; rows)              dit_forward
 *         v = v_neg + cfg (v_pos - v_neg)                        guide
 *         x = step(x, v, t)                                      sched_step
 *     clip = decode(x)                                       decode_frames
 *
 * A diffusion model has learned one thing: to say what in a noisy clip is clip and what is noise. So a clip is made by
 * starting from nothing but noise and taking away, step by step, what the model calls noise. All of it happens in the
 * latents of a VAE (in the published model 1/8 as large each way and 1/4 in time), which only the last stage turns into
 * pictures.
 *
 * Random numbers are drawn in a fixed order, and where stages are given in place of computing them all the same: the
 * first generator makes the noise and, for Euler A, one more tensor before every call; the second makes the posterior's
 * noise of the mask, then of the masked video. Both are torch's generator, of the CPU in float32, bit for bit, or of a
 * GPU (--rng cuda).
 */

/* What sampling carries from one call of the model to the next, and what every call is told. */
enum { STATE = 16 };
typedef struct {
    tensor latents;             /* [F][h][w][Z] x: noise at first, clean at last */
    tensor inpaint;             /* [F][h][w][2 Z] mask and masked video */
    dit_condition condition;    /* rows [negative, positive] of text and image tokens */
    generator g;                /* of the first noise; Euler A goes on drawing from it */
    scheduler s;
    enhance eav; tea_cache tea;
    tensor tea_input;           /* [F][h][w][Z] what the call that TeaCache has stored was given */
    int64_t tea_call;           /* that call; -1: none */
    int64_t *computed; double *delta;       /* [calls] TeaCache's report */
    double *fit;                /* [Z + 1][3] preview: latents to colours; NULL: none is asked for */
    int64_t first, end;         /* calls to be made: their latents are wanted, or a rule's memory is */
    bool asks_inpaint, asks_tokens;         /* some of these calls see inpaint, and tokens */
    st_entry state[STATE];      /* what of all this a checkpoint has */
} sampling;

/* ---------------------------------------------------------------- pipeline: what is given
 *
 * The DiT is an inpainting model: beside the noisy latents it sees which frames are given (the mask) and what
 * is in them (the masked video, black where nothing is given), both as latents of the same shape, 3 Z channels in all.
 * So start pictures, end pictures and a clip to go on with are all the same task.
 *
 *     frame       0       1 .. T-2        T-1
 *     pixels      start   start, unseen   end         -1..1
 *     mask        0       1               0           into the VAE as 0 and 1, in all three channels
 *     masked      start   black           end         -1..1
 */

/* F: prepare_latents' formula, or what the encoder makes of the frames where pictures are encoded. The two differ for
 * some ways of slicing; the public code then fails where it joins latents and condition. */
static int64_t latent_length(const job *j)
{
    const vae_config *c = vae_settings(j->vae);
    int64_t slices = j->frames / c->mini_batch_encoder;
    return j->starts ? vae_latent_frames(c, j->frames) : j->frames == 1 ? 1 : slices * c->mini_batch_decoder;
}

/* The picture given for frame t, or NULL where the model makes the frame. End pictures are written last in the public
 * code: where the two overlap they win. get_image_to_video_latent of utils.py. */
static const image *picture_at(const job *j, int64_t t)
{
    int64_t from_end = t - (j->frames - j->ends);
    return from_end >= 0 ? &j->end[from_end] : t < j->starts ? &j->start[t] : NULL;
}

/* The stage `pixels` [T][H][W][3] in -1..1. Frames that are not given hold the first start picture, as the public
 * code's tiling leaves them; they are seen in the dump only. */
static tensor fill_pixels(const run *r, const job *j)
{
    tensor x = tensor_new(r->arena, SHAPE(j->frames, j->height, j->width, 3));
    int64_t size = 3 * j->width * j->height;
    for (int64_t t = 0; t < j->frames; t++) {
        const image *picture = picture_at(j, t), *p = picture ? picture : &j->start[0];
        for (int64_t i = 0; i < size && x.data; i++)
            x.data[t * size + i] = (real)p->rgb[i] / 255 * 2 - 1;
    }
    stage(r, x, NULL, NULL, "pixels");
    return x;
}

/* mask [1][T][H][W], 8 bits: 0 on given frames, 1 on those to be made -> masks [T][H][W][3], 0 and 1 likewise; pixels
 * of the same shape become black where it is 1. */
static void apply_mask(const run *r, const job *j, tensor masks, tensor pixels)
{
    size_t mark = arena_mark(r->arena), size = (size_t)(j->width * j->height);
    shape s = SHAPE(1, j->frames, j->height, j->width);
    unsigned char *mask = arena_alloc(r->arena, (size_t)j->frames, size);
    for (int64_t t = 0; t < j->frames && mask; t++)
        memset(mask + (size_t)t * size, !picture_at(j, t), size);
    given_bytes(r, mask, s, "mask");
    dump_data(r, mask, U8, s, "mask");
    for (int64_t i = 0; i < tensor_count(masks) && mask; i++) {
        masks.data[i] = mask[i / 3];
        if (mask[i / 3])
            pixels.data[i] = -1;
    }
    arena_reset(r->arena, mark);
}

/* Draws a sample [F][h][w][Z] of the posterior, as the DiT takes latents.
 *
 * Formula   sample = (mean + exp(logvar / 2) noise) scaling_factor,    logvar clamped to -30..20
 * Method    the encoder does not give latents but a normal distribution for each, the posterior: moments [F][h][w][2 Z]
 *           are its mean and the logarithm of its variance. scaling_factor is meant to bring latents to a variance near
 *           1, that of the noise they are mixed with.
 * Source    Kingma and Welling, 2013, arXiv 1312.6114; DiagonalGaussianDistribution.sample, prepare_mask_latents
 */
static tensor sample_posterior(arena *a, tensor moments, generator *g, double scaling)
{
    int64_t z = moments.dim[3] / 2;
    tensor x = fresh_noise(a, g, SHAPE(moments.dim[0], moments.dim[1], moments.dim[2], z));
    for (int64_t i = 0; i < tensor_count(x) && x.data; i++) {
        const real *m = moments.data + i / z * 2 * z + i % z;      /* mean; logvar is Z further on */
        double logvar = (double)m[z];
        real std = (real)exp_own((logvar < -30 ? -30 : logvar > 20 ? 20 : logvar) / 2);
        x.data[i] = (*m + std * x.data[i]) * (real)scaling;
    }
    return x;
}

/* Mask and masked video through the VAE -> [F][h][w][2 Z]; zeros, with nothing encoded or drawn, without any picture.
 * latents: the shape [F][h][w][Z]. __call__ and prepare_mask_latents of the pipeline.
 *
 * The mask is encoded too, as a video of three equal channels, and so gets the latents' frames and size whatever the
 * VAE's slices are. Its values are 0 and 1 although pixels are in -1..1: the public mask_processor does not normalise.
 *
 * Two generators: the public code draws this noise from torch's global generator, which its seed does not set, so its
 * results differ from run to run. Here it is a second generator of the same seed, mask first. Were it the first one, a
 * picture more would change the noise that the clip starts from. */
static tensor inpaint_latents(const run *r, const job *j, shape latents)
{
    static const char *const names[2] = { "mask_latents", "masked_latents" };
    const vae_config *c = vae_settings(j->vae);
    arena *a = r->arena;
    int64_t z = latents.dim[3];
    tensor out = tensor_new(a, SHAPE(latents.dim[0], latents.dim[1], latents.dim[2], 2 * z));
    tensor_fill(out, 0);
    if (j->starts == 0 || restored(r->checkpoint, entry_of("inpaint", out)))
        return out;
    size_t mark = arena_mark(a);
    tensor pixels = fill_pixels(r, j), masks = tensor_new(a, tensor_shape(pixels)), videos[2] = { masks, pixels };
    apply_mask(r, j, masks, pixels);
    generator g;
    generator_seed(&g, j->rng, j->seed);
    run inner = *r;
    inner.hooks = NULL;         /* the encoder's own stages would have the same names twice */
    for (int i = 0; i < 2; i++) {
        size_t before = arena_mark(a);
        tensor x = is_given(r, "%s", names[i]) ? fresh_noise(a, &g, latents)    /* drawn all the same, for the second */
                   : sample_posterior(a, vae_encode(&inner, j->vae, videos[i]), &g, c->scaling_factor);
        stage(r, x, vae_weights(j->vae), NULL, names[i]);
        copy_channels(out, i * z, x, z);
        arena_reset(a, before);
    }
    arena_reset(a, mark);
    return out;
}

/* CLIP's tokens of the first picture [patches][hidden_size]. They tell the model what is shown, where the masked video
 * tells it where. */
static tensor clip_tokens(const run *r, const job *j)
{
    tensor tokens = clip_encode(r, j->clip, j->seen);
    check_finite(tokens, "clip.hidden", clip_weights(j->clip), NULL);
    return tokens;
}

/* ---------------------------------------------------------------- pipeline: what is asked for
 *
 * All of the sampling, unless --inject gives stages or --stop-after ends the run early. Then backwards from the end: a
 * call whose latents are asked for and not given asks for those before it. Rules with a memory (DPM++, PNDM, TeaCache)
 * need all earlier calls.
 */

/* The positive row sees the picture's tokens in the last 40 % of the calls only (clip_apply_ratio), the negative row
 * never: what is settled first, the large shapes and their motion, follows the control words. The picture itself is in
 * inpaint all the time, for both rows. */
static bool sees_image(const job *j, int64_t i, int64_t calls)
{
    return j->starts > 0 && !((double)i < (double)calls * (1 - 0.40));
}

/* The last stage of decoding that is given, from which it goes on. */
typedef enum { LATENTS, DECODED, VIDEO, FRAMES } decoding;
static decoding decoded_from(const run *r)
{
    return is_given(r, "frames") ? FRAMES : is_given(r, "video") ? VIDEO : is_given(r, "decoded") ? DECODED : LATENTS;
}

/* Fills m->first, end and asks_... A whole run makes CLIP's tokens, a stage that a dump has, even where none of its
 * calls looks at them (one or two calls have no last 40 %). */
static void mark_asked(const run *r, const job *j, sampling *m)
{
    int64_t calls = m->s.calls;
    int stop = INT_MAX;
    bool remembers = j->scheduler == DPMPP || j->scheduler == PNDM || j->tea_threshold != 0;
    bool to_inpaint = stops_at(r, "pixels") || stops_at(r, "mask*"), to_tokens = stops_at(r, "clip.*");
    bool wanted = !to_inpaint && !to_tokens && !stops_at(r, "noise") && decoded_from(r) == LATENTS;
    m->asks_inpaint = to_inpaint;
    m->asks_tokens = j->starts > 0 && (to_tokens || !r->hooks || (!r->hooks->ngiven && !r->hooks->stop_after));
    stop_numbers(r, "step.%d", &stop);
    m->end = m->first = !wanted ? 0 : stop < calls ? stop + 1 : calls;
    while (m->first > 0 && (remembers || !is_given(r, "step.%03d.latents", (int)m->first - 1))) {
        int i = (int)--m->first;
        if (is_given(r, "step.%03d.pred", i) || is_given(r, "step.%03d.out", i))
            continue;
        m->asks_inpaint |= dit_sees_latents(r, j->dit, i);
        m->asks_tokens |= sees_image(j, i, calls) && !is_given(r, "step.%03d.image", i);
    }
}

/* ---------------------------------------------------------------- pipeline: preview
 *
 * After each step the middle frame as the model expects it, in colours that a linear map makes of the latents: decoding
 * one slice would take a fifteenth of a step, this takes milliseconds. The map is fitted to the VAE itself, by least
 * squares over what its encoder makes of a picture of coloured squares: about two seconds of a 7B run.
 */

/* A picture that stands still for a slice [mini_batch_encoder][side][side][3] in -1..1: squares of one latent's size,
 * whose colours an own small generator draws. */
static tensor coloured_squares(arena *a, const vae_config *c)
{
    int64_t scale = vae_scale(c), side = lesser(64, c->tile_sample_min_size) / scale * scale;
    tensor x = tensor_new(a, SHAPE(c->mini_batch_encoder, side, side, 3));
    for (int64_t i = 0; i < tensor_count(x) && x.data; i++) {
        int64_t colour = i % 3, column = i / 3 % side / scale, row = i / 3 / side % side / scale;
        uint64_t place = (uint64_t)((row * side + column) * 3 + colour), one = hash_bytes(1, &place, sizeof place);
        x.data[i] = (real)(one >> 56) / (real)127.5 - 1;
    }
    return x;
}

/* Solves n equations of n unknowns with three right sides, a [n][3 + n], these first, by elimination; the solutions
 * [n][3] take the place of its first numbers. Gauss and Jordan's: of every other row so much of row i is taken that
 * column i is left in row i alone; at the end each unknown has a row. The matrix of least squares is symmetric and
 * positive, and needs no pivoting. */
static void solve(double *a, int64_t n)
{
    int64_t width = 3 + n;
    for (int64_t i = 0; i < n; i++)
        for (int64_t row = 0; row < n; row++) {
            double part = a[row * width + 3 + i] / a[i * width + 3 + i];
            for (int64_t k = 0; k < width && row != i; k++)
                a[row * width + k] -= k < 3 || k >= 3 + i ? part * a[i * width + k] : 0;
        }
    for (int64_t i = 0; i < 3 * n; i++)         /* never ahead of what is still to be read */
        a[i] = a[i / 3 * width + i % 3] / a[i / 3 * width + 3 + i / 3];
}

/* [Z + 1][3]: 0..255 of each colour, by latent and a constant; zeros while planning.
 *
 * Formula   the rows of `fit` minimise the sum over all places of |colours - (latents, 1) fit|^2:
 *           (sum own^T own) fit = sum own^T colours,    own = (latents, 1); 1e-3 on the diagonal keeps it solvable
 */
static double *preview_fit(const run *r, const job *j)
{
    const vae_config *c = vae_settings(j->vae);
    int64_t scale = vae_scale(c), z = c->latent_channels, n = z + 1, width = 3 + n;
    run inner = { .arena = r->arena };
    size_t mark = arena_mark(r->arena);
    tensor pixels = coloured_squares(r->arena, c), moments = vae_encode(&inner, j->vae, pixels);
    double *sums = allocate((size_t)(n * width), sizeof *sums), *both = allocate((size_t)width, sizeof *both);
    int64_t places = pixels.data ? tensor_count(moments) / (2 * z) : 0, across = pixels.dim[2] / scale;
    for (int64_t i = 0; i < n; i++)
        sums[i * width + 3 + i] = 1e-3;
    for (int64_t i = 0; i < places; i++) {
        const real *mean = moments.data + i * 2 * z;
        const real *seen = pixels.data + (i / across % across * pixels.dim[2] + i % across) * scale * 3;
        for (int64_t u = 0; u < width; u++)         /* colours, own */
            both[u] = u < 3 ? ((double)seen[u] + 1) * 127.5 : u == z + 3 ? 1 : (double)mean[u - 3] * c->scaling_factor;
        for (int64_t u = 0; u < n * width; u++)
            sums[u] += both[3 + u / width] * both[u % width];
    }
    solve(sums, n);
    free(both);
    arena_reset(r->arena, mark);
    return sums;
}

/* The clean frame [h][w][Z] that the model's output v means in x [h][w][Z] at timestep t, to be freed. x is what the
 * model sees (sched_input), so alpha_at serves Euler, too; its times between two entries take the lower one's. */
static real *clean_frame(const scheduler *s, const real *x, const real *v, int64_t count, double t)
{
    double at = alpha_at(s, t);
    clean_rule rule = clean_rule_of(s->config.prediction_type, sqrt(at), sqrt(1 - at), 1);
    real *out = allocate((size_t)count, sizeof *out);
    for (int64_t i = 0; i < count; i++)
        out[i] = clean(&rule, x[i], v[i]);
    return out;
}

/* A frame of latents [h][w][Z] in colours, one pixel a latent: fit's rows weigh the channels, its last is the
 * constant. */
static image latent_colours(const double *fit, const real *x, int64_t h, int64_t w, int64_t z)
{
    image out = { w, h, allocate((size_t)(h * w), 3) };
    for (int64_t i = 0; i < h * w * 3; i++) {
        double colour = fit[z * 3 + i % 3];
        for (int64_t k = 0; k < z; k++)
            colour += fit[k * 3 + i % 3] * (double)x[i / 3 * z + k];
        out.rgb[i] = (unsigned char)(colour > 0 ? colour < 255 ? colour : 255 : 0);
    }
    return out;
}

/* FILE.ppm: the middle frame of the clean sample that the call's prediction means, enlarged to the clip's size. Written
 * anew at each call, whole or not at all, so that a viewer that looks again never finds half a picture. */
static void preview_write(const job *j, const double *fit, const scheduler *s, tensor x, tensor pred, double t)
{
    int64_t h = x.dim[1], w = x.dim[2], z = x.dim[3], count = h * w * z, first = x.dim[0] / 2 * count;
    if (!j->preview || !x.data)
        return;
    real *frame = clean_frame(s, x.data + first, pred.data + first, count, t);
    image small = latent_colours(fit, frame, h, w, z), large = image_resize(small, j->width, j->height);
    ppm_write(j->preview, large);
    free(frame);
    free(small.rgb);
    free(large.rgb);
}

/* ---------------------------------------------------------------- pipeline: denoise
 *
 * One call of the model and one step of the scheduler, over and over. Early calls see hardly more than noise and settle
 * the large shapes, late ones the details.
 */

/* The model at call i of x [F][h][w][Z] -> out [B][F][h][w][out_channels]. It is told the training time, which need not
 * be whole, and not how many steps there are. */
static tensor call_model(const run *r, const job *j, const sampling *m, tensor x, int64_t i, tea_cache *tea)
{
    bool see_image = sees_image(j, i, m->s.calls);
    return dit_forward(r, j->dit, &m->condition, x, m->inpaint, m->s.timesteps[i], see_image, i, tea, &m->eav);
}

/* Guidance: pred [F][h][w][Z] = neg + cfg (pos - neg), of the first Z channels of out [B][F][h][w][out_channels];
 * without guidance (B = 1) the one row as it is.
 *
 * The two rows ask the model the same with and without the condition, here the control words and the picture's tokens.
 * The difference is what the condition adds; it is taken cfg times. cfg = 1 would be the positive row: not worth two
 * rows. Output channels beyond Z, from the model's learn_sigma, are a variance that no rule here uses.
 * Ho and Salimans, 2022, arXiv 2207.12598. */
static void guide(tensor pred, tensor out, double cfg)
{
    int64_t z = pred.dim[3], width = out.dim[4], row = tensor_count(out) / out.dim[0];
    for (int64_t i = 0; pred.data && i < tensor_count(pred); i++) {
        int64_t at = i / z * width + i % z;
        real first = out.data[at];
        pred.data[i] = out.dim[0] == 1 ? first : first + (real)cfg * (out.data[row + at] - first);
    }
}

/* Call i, guided: pred [F][h][w][Z], what the model says of the latents. The preview is made here, because it needs
 * the x that the model saw, beside its answer; the step writes over the latents. */
static tensor predict(const run *r, const job *j, sampling *m, int64_t i)
{
    shape size = tensor_shape(m->latents);
    tensor x = tensor_new(r->arena, size), pred = tensor_new(r->arena, size);   /* [F][h][w][Z] */
    char name[32];
    snprintf(name, sizeof name, "step.%03d.pred", (int)i);
    sched_input(&m->s, x, m->latents);
    if (!is_given(r, "%s", name))
        guide(pred, call_model(r, j, m, x, i, &m->tea), j->cfg);
    if (m->tea.stored) {
        m->tea_call = i;
        tensor_copy(m->tea_input, x);
    }
    m->computed[i] = m->tea.computed;
    m->delta[i] = m->tea.delta;
    stage(r, pred, dit_weights(j->dit), j->embeddings, name);
    preview_write(j, m->fit, &m->s, x, pred, m->s.timesteps[i]);
    return pred;
}

/* TeaCache's tensors of a restored state: the call that stored them, once more, with what it was given then. An
 * infinite sum is above every threshold, so that it computes and stores; its own change, which nobody asks for, is
 * taken against ones, because nothing (0/0) would be no number. The state's counts stay: this call works on a copy. */
static void rebuild_tea(const run *r, const job *j, const sampling *m)
{
    if (m->tea_call < 0 || m->s.index == m->s.calls)
        return;
    tea_cache tea = m->tea;
    tea.count = m->tea_call % tea.steps;
    tea.sum = INFINITY;
    size_t mark = arena_mark(r->arena);
    tensor_fill(tea.last, 1);
    call_model(r, j, m, m->tea_input, m->tea_call, &tea);
    arena_reset(r->arena, mark);
}

/* Makes ready what the loop carries besides latents, or takes up what a checkpoint has.
 *
 * TeaCache (Liu et al., 2024, arXiv 2411.19108; TeaCacheParameters of transformer3d.py): a call whose input has hardly
 * changed since the last computed one adds that one's residual again instead of running the blocks. The first and the
 * last call always compute: hence skips of at least 1. Enhance-A-Video (Luo et al., 2025, arXiv 2502.07508) makes
 * attn1's output larger where frames attend to each other. Both decide in dit_forward.
 *
 * A checkpoint has all of `state` (none before the first step, when it holds slices only), but for what this run does
 * not have: entries without data are neither written nor read. TeaCache's tensors are made again (rebuild_tea). */
#define TENSOR(x) entry_of(#x, m->x)
#define FIELD(x) RAW(#x, &m->x, 1)
static void begin_sampling(const run *r, const job *j, sampling *m)
{
    const dit_config *d = dit_settings(j->dit);
    const int64_t *dim = m->latents.dim, tokens = dim[0] * (dim[1] / d->patch_size) * (dim[2] / d->patch_size);
    m->eav = (enhance){ .enabled = j->enhance, .weight = j->enhance_weight, .skip_start = j->enhance_start,
                        .skip_end = j->enhance_end, .steps = j->steps };
    m->tea = (tea_cache){ .threshold = j->tea_threshold, .skip_start = greater(j->tea_start, 1),
                          .skip_end = greater(j->tea_end, 1), .steps = j->steps };
    m->tea_call = -1;
    if (j->tea_threshold != 0) {
        m->tea.last = tensor_new_high(r->arena, SHAPE(m->condition.rows * tokens, d->hidden_size));
        m->tea.residual = tensor_new_high(r->arena, SHAPE(m->condition.rows, tokens, d->hidden_size));
        m->tea_input = tensor_new(r->arena, tensor_shape(m->latents));
    }
    m->computed = allocate((size_t)m->s.calls, sizeof *m->computed);
    m->delta = allocate((size_t)m->s.calls, sizeof *m->delta);
    m->fit = j->preview ? preview_fit(r, j) : NULL;
    const st_entry state[STATE] = {
        TENSOR(latents), TENSOR(inpaint), TENSOR(tea_input), TENSOR(s.history[0]), TENSOR(s.history[1]),
        TENSOR(s.history[2]), TENSOR(s.history[3]), TENSOR(s.history[4]), FIELD(s.index), FIELD(g), FIELD(tea.count),
        FIELD(tea.cached), FIELD(tea.sum), FIELD(tea_call), RAW("computed", m->computed, (size_t)m->s.calls),
        RAW("delta", m->delta, (size_t)m->s.calls),
    };
    memcpy(m->state, state, sizeof state);
    for (int i = 0; i < STATE; i++)
        restored(r->checkpoint, m->state[i]);
    progress(r, "denoise", m->s.index, m->s.calls);
    rebuild_tea(r, j, m);
    if (m->s.index == 0)
        checkpoint_write(r->checkpoint, m->state, STATE, false);
}

/* The loop: m->latents from noise to a clean sample, in place. Of a call that nothing asks for, because what comes
 * after it is given, only the noise is drawn, so that later calls get the same noise as in a whole run. A step ends
 * with its temporaries dropped, then the checkpoint, then the report: whoever reads of a step may kill the run and has
 * it. After the loop TeaCache's report: whether each call computed, and the polynomial's value there [calls]. */
static void denoise(const run *r, const job *j, sampling *m)
{
    arena *a = r->arena;
    scheduler *s = &m->s;
    begin_sampling(r, j, m);
    while (s->index < s->calls) {
        char name[32];
        int64_t i = s->index;
        size_t mark = arena_mark(a);
        tensor noise = j->scheduler == EULER_A ? fresh_noise(a, &m->g, tensor_shape(m->latents)) : (tensor){ 0 };
        snprintf(name, sizeof name, "step.%03d.latents", (int)i);
        if (i >= m->first && i < m->end) {
            tensor v = predict(r, j, m, i);     /* [F][h][w][Z] */
            sched_step(s, m->latents, v, noise);
            stage(r, m->latents, dit_weights(j->dit), j->embeddings, name);
        } else {
            given(r, m->latents, CHANNELS_FIRST, "%s", name);
            s->index++;
        }
        arena_reset(a, mark);
        checkpoint_write(r->checkpoint, m->state, STATE, false);
        progress(r, "denoise", s->index, s->calls);
    }
    if (m->tea.threshold != 0 && !a->planning) {
        dump_data(r, m->computed, I64, SHAPE(s->calls), "teacache.computed");
        dump_data(r, m->delta, F64, SHAPE(s->calls), "teacache.delta");
        if (r->verbosity)
            fprintf(stderr, "teacache: %lld of %lld calls used the cache\n", ll(m->tea.cached), ll(s->calls));
    }
    free(m->computed);
    free(m->delta);
    free(m->fit);
}

/* ---------------------------------------------------------------- pipeline: decoding
 *
 * latents -> the VAE's decoder -> video in -1..1 -> smoothed -> 0..1 -> bytes. Every clamp of the public code is here,
 * even where it follows another, because a clamped value that is averaged is not the average that is clamped.
 */

/* Decodes without a seam every m = mini_batch_encoder frames: video [T][H][W][3] in -1..1, in place.
 *
 * Method    slices are decoded one by one and do not quite meet. The frames m/2 .. T - (m - m/2) - 1, half a slice off,
 *           are encoded (the posterior's mean) and decoded again, which puts this pass's seams in the middle of the
 *           first one's slices; the average of both has each at half its strength. A VAE that decodes with a cache
 *           (cache_compression_vae) knows the slice before, and is not smoothed.
 * Source    smooth_output of the pipeline
 */
static void smooth(const run *r, const vae *v, tensor video)
{
    arena *a = r->arena;
    const vae_config *c = vae_settings(v);
    int64_t m = c->mini_batch_encoder, before = m / 2, count = video.dim[0] - m;
    size_t mark = arena_mark(a);
    if (count <= 0)
        return;
    int64_t back = vae_video_frames(c, vae_latent_frames(c, count));
    NEED(back == count || back == 1, "decode: smoothing codes %lld of %lld frames again and gets %lld back; choose "
         "another --frames", ll(count), ll(video.dim[0]), ll(back));
    run inner = *r;
    inner.hooks = NULL;         /* the second pass's stages have no names */
    tensor part = tensor_part(video, before, count);            /* [T - m][H][W][3] */
    tensor moments = vae_encode(&inner, v, part);               /* [F'][h][w][2 Z] */
    tensor mean = tensor_new(a, SHAPE(moments.dim[0], moments.dim[1], moments.dim[2], c->latent_channels));
    copy_channels(mean, 0, moments, c->latent_channels);
    tensor again = vae_decode(&inner, v, mean);                 /* [T - m][H][W][3], or one frame */
    for (int64_t t = 0; t < count; t++)         /* torch broadcasts a single frame over all */
        blend_to(tensor_part(part, t, 1), tensor_part(part, t, 1), tensor_part(again, back == 1 ? 0 : t, 1), 0.5, 0.5);
    arena_reset(a, mark);
    clamp(video, -1, 1);
}

/* -1..1 -> 0..1, whatever lies beyond cut off; then to 8 bits, truncated, not rounded, as the public code's cast. */
static void to_unit(tensor video)
{
    for (int64_t i = 0; i < tensor_count(video) && video.data; i++)
        video.data[i] = video.data[i] / 2 + (real)0.5;
    clamp(video, 0, 1);
}
static void to_bytes(unsigned char *bytes, tensor video)
{
    for (int64_t i = 0; i < tensor_count(video) && bytes; i++)
        bytes[i] = (unsigned char)(255 * video.data[i]);
}

/* latents as the sampler leaves them [F][h][w][Z] -> 8-bit frames [T][H][W][3] in the arena, and T; NULL while
 * planning. The latents are changed. What comes before the last stage that is given is not computed. decode_latents of
 * the pipeline, save_videos_grid of utils.py. */
static unsigned char *decode_frames(const run *r, const job *j, tensor latents, int64_t *frames)
{
    arena *a = r->arena;
    const vae_config *c = vae_settings(j->vae);
    int64_t scale = vae_scale(c), h = latents.dim[1] * scale, w = latents.dim[2] * scale;
    shape size = SHAPE(vae_video_frames(c, latents.dim[0]), h, w, 3);
    decoding from = decoded_from(r);
    unsigned char *bytes = arena_alloc(a, (size_t)(size.dim[0] * h * w * 3), 1);
    size_t mark = arena_mark(a);
    scale_to(latents, latents, 1 / c->scaling_factor);
    tensor video = from == LATENTS ? vae_decode(r, j->vae, latents) : tensor_new(a, size);      /* [T][H][W][3] */
    given(r, video, CHANNELS_FIRST, "decoded");
    if (from < VIDEO) {         /* -1..1 -> 0..1 */
        check_finite(video, "decoded", vae_weights(j->vae), NULL);      /* clamping would hide an infinity */
        clamp(video, -1, 1);
        dump(r, video, CHANNELS_FIRST, "decoded");
        if (c->mode != SLICE_CACHE)
            smooth(r, j->vae, video);
        check_finite(video, "video", vae_weights(j->vae), NULL);
        to_unit(video);
    }
    given(r, video, CHANNELS_FIRST, "video");
    if (from < FRAMES) {        /* 0..1 -> 0..255 */
        dump(r, video, CHANNELS_FIRST, "video");
        to_bytes(bytes, video);
    }
    given_bytes(r, bytes, size, "frames");
    dump_data(r, bytes, U8, size, "frames");
    arena_reset(a, mark);
    *frames = size.dim[0];
    return bytes;
}

/* ---------------------------------------------------------------- pipeline: the whole */

/* The whole model: RuyiInpaintPipeline.__call__. Returns [T][H][W][3] bytes in the arena, and T; NULL while planning.
 * Guidance of 1 and less runs the positive row alone, in half the time. The negative row is the `n.default` control.
 *
 * Only the latents stand below the mark: conditions, and what the loop needs, give their memory back before decoding.
 * The noise is a stage before it is scaled, as the public code's randn_tensor gives it; sched_new says why it is. */
static unsigned char *generate(const run *r, const job *j, int64_t *frames)
{
    arena *a = r->arena;
    int64_t scale = vae_scale(vae_settings(j->vae)), rows = j->cfg > 1 ? 2 : 1;
    shape size = SHAPE(latent_length(j), j->height / scale, j->width / scale, vae_settings(j->vae)->latent_channels);
    sampling m = { .s = sched_new(a, j->sched, j->steps, size) };
    dump_timesteps(r, &m.s);
    generator_seed(&m.g, j->rng, j->seed);
    m.latents = fresh_noise(a, &m.g, size);     /* [F][h][w][Z] */
    size_t mark = arena_mark(a);
    stage(r, m.latents, NULL, NULL, "noise");
    scale_to(m.latents, m.latents, m.s.init_noise_sigma);

    mark_asked(r, j, &m);
    if (m.asks_inpaint)
        m.inpaint = inpaint_latents(r, j, size);        /* [F][h][w][2 Z] */
    tensor tokens = m.asks_tokens ? clip_tokens(r, j) : (tensor){ 0 };      /* [patches][hidden_size] */
    m.condition = dit_conditions(r, j->dit, j->rows + 2 - rows, rows, tokens, j->height, j->width);
    check_finite(m.condition.text, "text", j->embeddings, dit_weights(j->dit));
    denoise(r, j, &m);
    sched_free(&m.s);
    arena_reset(a, mark);
    return decode_frames(r, j, m.latents, frames);
}

/* ---------------------------------------------------------------- clips
 *
 * What measure, extend and --keep-colour look at: whole clips of 8-bit frames, in memory. Nothing here is learned, and
 * nothing depends on the model: these are the program's eyes, by which it judges what the model has made.
 *
 *     frames --look_at--> looks of each: mean colour, sharpness, motion from the frame before
 *     looks, reference --match_colours--> frames in the reference's colours; how far each was off
 *     looks --choose_keys--> the frame after which a clip is best continued
 */

/* A frame is [h][w][3] bytes. */
static size_t frame_bytes(const film *v) { return (size_t)(3 * v->w * v->h); }
static unsigned char *frame_of(const film *v, int64_t t) { return v->rgb + (size_t)t * frame_bytes(v); }

/* ---------------------------------------------------------------- clips: motion
 *
 * Global motion by hierarchical block matching: every block of 16 x 16 pixels looks for its place in the next frame,
 * first in reduced pictures, then finer; the median of all blocks is the camera's doing, what differs from it is the
 * things'. Everything is integers but the last fraction of a pixel.
 *
 * Formula   the shift (dx, dy) of a block is the one with the least
 *               E(dx, dy) = sum over the block of (luma(x, y) - luma of the next frame(x + dx, y + dy))^2
 *           and its fraction, along each axis, is where the parabola through E(-1), E(0), E(1) around it is least
 * Method    the coarsest picture tries all shifts up to 4 pixels; each finer one begins at twice the shift found and
 *           tries 2 pixels around it. Trying all in the full picture would cost thirty times as much
 *           at 672 x 384, and three hundred at 1920 x 1080.
 * Limits    the coarsest picture's shorter side is below 64, so that 4 of its pixels are a sixteenth of the frame at
 *           least. A block without texture fits everywhere: it has no shift along that axis. The median takes a camera
 *           that is followed by more than half of the blocks; where a thing fills the picture, it counts as the camera.
 */

enum { BLOCK = 16, REACH = 4, REDUCTIONS = 8, TEXTURE = 16 };  /* TEXTURE: steps of 4 levels, squared */
enum { SAME_COLOUR = 32, SECOND = 24 };         /* levels, frames */

/* Luma 0..255, [h][w]. */
typedef struct { int64_t w, h; unsigned char *y; } plane;

/* A frame's luma, and the same reduced by 2, 4, ... until its shorter side is below 64, one behind the other. */
typedef struct { int levels; plane at[REDUCTIONS]; } pyramid;

/* Of a picture, as a clip in Y4M has it: the first of its planes, in room for the two others, which come with it, and
 * then for a pyramid. To be freed. */
static plane luma_of(image p)
{
    plane luma = { p.w, p.h, allocate((size_t)(p.w * p.h), 3) };
    y4m_planes(p.rgb, p.w, p.h, luma.y);
    return luma;
}

/* Each level half as wide and high as the one before, rounded down: every pixel is the mean of four. */
static pyramid pyramid_of(const film *v, int64_t t)
{
    pyramid p = { .levels = 1, .at = { luma_of((image){ v->w, v->h, frame_of(v, t) }) } };
    for (const plane *last = p.at; p.levels < REDUCTIONS && last->w >= 64 && last->h >= 64; last++) {
        plane half = { last->w / 2, last->h / 2, last->y + last->w * last->h };
        for (int64_t i = 0, row = last->w; i < half.w * half.h; i++) {
            const unsigned char *q = last->y + i / half.w * 2 * row + i % half.w * 2;
            half.y[i] = (unsigned char)((q[0] + q[1] + q[row] + q[row + 1] + 2) / 4);
        }
        p.at[p.levels++] = half;
    }
    return p;
}

/* Euclidean. Not hypot, whose last digit differs from one libm to the next; sqrt is exact everywhere. */
static double length(double x, double y) { return sqrt(x * x + y * y); }

/* A shift right and down that was tried, and its E. */
typedef struct { int64_t by[2], error; } match;

/* The block of a whose middle is (x, y), held against b at + (dx, dy). Beyond the edges the outermost pixels repeat. */
static match match_block(const plane *a, const plane *b, int64_t x, int64_t y, int64_t dx, int64_t dy)
{
    int64_t w = a->w, h = a->h, sum = 0;
    for (int64_t i = y - BLOCK / 2; i < y + BLOCK / 2; i++) {
        const unsigned char *p = a->y + within(i, h) * w, *q = b->y + within(i + dy, h) * w;
        for (int64_t k = x - BLOCK / 2; k < x + BLOCK / 2; k++) {
            int64_t d = p[within(k, w)] - q[within(k + dx, w)];
            sum += d * d;
        }
    }
    return (match){ { dx, dy }, sum };
}

/* Where the least of a parabola through E(-1), E(0), E(1) lies, within half a pixel of 0; there, where E(0) is 0: two
 * equal pictures have moved by nothing, whatever is beside them. */
static double parabola(int64_t before, int64_t here, int64_t after)
{
    int64_t bend = before - 2 * here + after;
    double least = here && bend > 0 ? (double)(before - after) / (2 * (double)bend) : 0;
    return least < -0.5 ? -0.5 : least > 0.5 ? 0.5 : least;
}

/* Whether the block whose middle is (x, y) has texture along an axis: the mean squared difference of pixels that lie
 * `step` apart in memory, 1 for x and w for y. Sky and walls have none; what they say of the motion is noise, and there
 * may be more of them than of everything else. */
static bool has_texture(const plane *p, int64_t x, int64_t y, int64_t step)
{
    int64_t sum = 0;
    for (int64_t i = 0; i < BLOCK * BLOCK; i++) {
        int64_t cx = within(x - BLOCK / 2 + i % BLOCK, p->w - 1), cy = within(y - BLOCK / 2 + i / BLOCK, p->h - 1);
        const unsigned char *at = p->y + cy * p->w + cx;
        sum += (at[step] - at[0]) * (at[step] - at[0]);
    }
    return sum >= TEXTURE * BLOCK * BLOCK;
}

/* The shift (right, down) in pixels of the block of a whose middle is (x, y), as found in b; NAN along an axis without
 * texture. Of equals the one nearest to where the coarser level pointed: that is tried first, and only less wins. */
static void block_shift(const pyramid *a, const pyramid *b, int64_t x, int64_t y, double shift[2])
{
    match best = { { 0 }, 0 };
    for (int l = a->levels - 1; l >= 0; l--) {
        const plane *p = &a->at[l], *q = &b->at[l];
        int64_t reach = l == a->levels - 1 ? REACH : 2, side = 2 * reach + 1, cx = 2 * best.by[0], cy = 2 * best.by[1];
        best = match_block(p, q, x >> l, y >> l, cx, cy);
        for (int64_t i = 0; i < side * side; i++) {
            match m = match_block(p, q, x >> l, y >> l, cx + i % side - reach, cy + i / side - reach);
            best = m.error < best.error ? m : best;
        }
    }
    for (int k = 0; k < 2; k++) {
        match before = match_block(a->at, b->at, x, y, best.by[0] - (k == 0), best.by[1] - (k == 1));
        match after = match_block(a->at, b->at, x, y, best.by[0] + (k == 0), best.by[1] + (k == 1));
        bool counts = has_texture(a->at, x, y, k ? a->at->w : 1);
        shift[k] = counts ? (double)best.by[k] + parabola(before.error, best.error, after.error) : NAN;
    }
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The middle one of the list, which is sorted here, or the mean of the middle two; 0 of none. */
static double median(double *list, int64_t count)
{
    qsort(list, (size_t)count, sizeof *list, by_size);
    return count ? (list[(count - 1) / 2] + list[count / 2]) / 2 : 0;
}

/* From frame a to frame b: move[2], the median shift of all blocks that have texture in that direction, and the mean
 * distance of the blocks' shifts from it, flat blocks counting as still. Pixels. Each axis has a median of its own: a
 * fence says much of one and nothing of the other. */
static double global_shift(const pyramid *a, const pyramid *b, double move[2])
{
    int64_t across = divide_up(a->at->w, BLOCK), blocks = across * divide_up(a->at->h, BLOCK);
    double (*shifts)[2] = allocate((size_t)blocks, sizeof *shifts), *list = allocate((size_t)blocks, sizeof *list);
    double beside[2], outside = 0;
    for (int64_t i = 0; i < blocks; i++)
        block_shift(a, b, i % across * BLOCK + BLOCK / 2, i / across * BLOCK + BLOCK / 2, shifts[i]);
    for (int k = 0; k < 2; k++) {
        int64_t count = 0;
        for (int64_t i = 0; i < blocks; i++)
            if (!isnan(shifts[i][k]))
                list[count++] = shifts[i][k];
        move[k] = median(list, count);
    }
    for (int64_t i = 0; i < blocks; i++) {
        for (int k = 0; k < 2; k++)
            beside[k] = isnan(shifts[i][k]) ? 0 : shifts[i][k] - move[k];
        outside += length(beside[0], beside[1]);
    }
    free(list);
    free(shifts);
    return outside / (double)blocks;
}

/* What is measured of every frame; move and outside, from the frame before it to it, are 0 for the first. */
typedef struct {
    double mean[3];             /* R, G, B, 0..255 */
    double luma;                /* their 0.299, 0.587, 0.114 */
    double jump;                /* flicker: distance of luma from its two neighbours' mean; 0 for the first and last */
    double sharp;               /* mean step of luma from pixel to pixel, of both axes */
    double along;               /* the same, the axes weighted by the motion along them; without motion as sharp */
    double move[2];             /* global shift of the content in pixels, to the right and down */
    double outside;             /* mean distance of the blocks' shifts from it */
    double drift;               /* how far the background's colours are off: match_colours */
} looks;

/* Every frame of v, [frames], to be freed: colours and sharpness by themselves, motion by the frame before. Sums are
 * whole numbers, so that no order of adding can change them. A frame's jump waits for the next frame.
 *
 *     sharp = (across + down) / 2                     across, down: mean step of luma from pixel to pixel
 *     along = (|x| across + |y| down) / (|x| + |y|)   (x, y) the move: motion blur smears this one and spares the rest
 */
static looks *look_at(const film *v)
{
    looks *list = allocate((size_t)v->frames, sizeof *list);
    int64_t w = v->w, h = v->h;
    pyramid before = { 0 };
    for (int64_t t = 0; t < v->frames; t++) {
        looks *l = &list[t];
        pyramid p = pyramid_of(v, t);
        const unsigned char *rgb = frame_of(v, t), *luma = p.at->y;
        int64_t sum[3] = { 0 }, steps[2] = { 0 };
        for (int64_t i = 0; i < w * h; i++) {
            for (int c = 0; c < 3; c++)
                sum[c] += rgb[3 * i + c];
            steps[0] += i % w ? abs(luma[i] - luma[i - 1]) : 0;
            steps[1] += i >= w ? abs(luma[i] - luma[i - w]) : 0;
        }
        for (int c = 0; c < 3; c++)
            l->mean[c] = (double)sum[c] / (double)(w * h);
        l->luma = 0.299 * l->mean[0] + 0.587 * l->mean[1] + 0.114 * l->mean[2];
        if (t > 1)
            l[-1].jump = fabs(l[-1].luma - (l[-2].luma + l->luma) / 2);
        if (t > 0)
            l->outside = global_shift(&before, &p, l->move);
        double across = (double)steps[0] / (double)((w - 1) * h), down = (double)steps[1] / (double)(w * (h - 1));
        double x = fabs(l->move[0]), y = fabs(l->move[1]);
        l->sharp = (across + down) / 2;
        l->along = x + y < 0.01 ? l->sharp : (x * across + y * down) / (x + y);     /* a hundredth of a pixel: still */
        free(before.at->y);
        before = p;
    }
    free(before.at->y);
    return list;
}

/* Euclidean distance of two mean colours, levels of 255: a pure grey shift by 1 is sqrt(3). */
static double colour_distance(const double a[3], const double b[3])
{
    double red = a[0] - b[0], green = a[1] - b[1], blue = a[2] - b[2];
    return sqrt(red * red + green * green + blue * blue);
}

/* ---------------------------------------------------------------- clips: colours
 *
 * Two pictures of one scene, one of them in colours that have drifted: the background, which both show, says by how
 * much. By it --keep-colour holds every generated frame to the start picture, and extend every new one to the last key
 * frame; measure reports it.
 *
 * Formula   background: pixels in both pictures, at places that differ by the camera's motion, whose channels differ by
 *           at most 32 levels. v' = gain v + offset for each channel, so that the background's mean and standard
 *           deviation become the reference's; gain within 0.8 .. 1.25.
 * Method    The mask is taken after the correction of the frame before: slow drift of any size is followed, while
 *           things that move, and what they uncover, drop out. Below a quarter of the picture the correction stays. The
 *           reference is the start picture until the camera has left half of it behind; from then on it is the frame
 *           where that was so, corrected.
 */

typedef struct { double gain[3], offset[3]; } colours;

/* v' of a byte, rounded and kept in its range. */
static unsigned char recolour(const colours *m, int c, unsigned char v)
{
    double x = m->gain[c] * v + m->offset[c] + 0.5;
    return (unsigned char)(x < 0 ? 0 : x > 255 ? 255 : x);
}

/* Fits m: the reference's pixel (x, y) is (x + dx, y + dy) of v's frame t. m is the correction before; it and *drift,
 * how far the background's mean colours are apart, stay where too little is alike. Over its n pixels, for each channel:
 *
 *     mean = S1 / n,    n^2 variance = n S2 - S1^2,    gain = sqrt(variance there / variance here)
 *
 * with S1 and S2 the sums of v and v^2: whole numbers, exact in double. A background of one colour has no variance: it
 * says nothing of the gain, which is then 1. */
static void fit_colours(const unsigned char *reference, const film *v, int64_t t, int64_t dx, int64_t dy, colours *m,
                        double *drift)
{
    const unsigned char *frame = frame_of(v, t);
    double n = 0, sums[3][4] = { { 0 } };       /* of reference, its squares, frame, its squares: whole numbers */
    for (int64_t y = dy < 0 ? -dy : 0; y < v->h && y + dy < v->h; y++)
        for (int64_t x = dx < 0 ? -dx : 0; x < v->w && x + dx < v->w; x++) {
            const unsigned char *p = reference + 3 * (y * v->w + x), *q = frame + 3 * ((y + dy) * v->w + x + dx);
            bool same = true;
            for (int c = 0; c < 3; c++)
                same &= abs(p[c] - recolour(m, c, q[c])) <= SAME_COLOUR;
            for (int c = 0; c < 3 && same; c++) {
                const double add[] = { p[c], p[c] * p[c], q[c], q[c] * q[c] };
                for (int k = 0; k < 4; k++)
                    sums[c][k] += add[k];
            }
            n += same;
        }
    if (4 * n < (double)(v->w * v->h))
        return;
    double means[2][3];
    for (int c = 0; c < 3; c++) {
        const double *s = sums[c], goal = n * s[1] - s[0] * s[0], got = n * s[3] - s[2] * s[2];
        double gain = got > 0 ? sqrt(goal / got) : 1;
        means[0][c] = s[0] / n;
        means[1][c] = s[2] / n;
        m->gain[c] = gain < 0.8 ? 0.8 : gain > 1.25 ? 1.25 : gain;
        m->offset[c] = means[0][c] - m->gain[c] * means[1][c];
    }
    *drift = colour_distance(means[0], means[1]);
}

/* Corrects the frames of v in place; reference is what the first should look like. list: what was measured of them,
 * whose drift is filled, or NULL. When half of the reference has gone out of sight, the corrected frame takes its
 * place: too little of the old one would be left to judge by. */
static void match_colours(const film *v, looks *list, const unsigned char *reference)
{
    looks *seen = list ? list : look_at(v);
    colours m = { { 1, 1, 1 }, { 0 } };
    double off = 0, at[2] = { 0 }, w = (double)v->w, h = (double)v->h;      /* at: where the reference's content is */
    for (int64_t t = 0; t < v->frames; t++) {
        unsigned char *frame = frame_of(v, t);
        for (int k = 0; k < 2; k++)
            at[k] += seen[t].move[k];
        fit_colours(reference, v, t, (int64_t)rint(at[0]), (int64_t)rint(at[1]), &m, &off);
        seen[t].drift = off;
        for (size_t i = 0; i < frame_bytes(v); i++)
            frame[i] = recolour(&m, (int)(i % 3), frame[i]);
        if (2 * fmax(w - fabs(at[0]), 0) * fmax(h - fabs(at[1]), 0) < w * h) {
            reference = frame;
            at[0] = at[1] = 0;
        }
    }
    if (!list)
        free(seen);
}

/* ---------------------------------------------------------------- clips: continuation key frames
 *
 * A clip goes on from a few frames that follow each other, its key frames. The last ones are not always the best: what
 * is blurred, flashes or jerks in them goes on, too. So all runs of frames that end in the last second are scored, and
 * the clip is cut after the best one:
 *
 *     score = sharp + along - colour - jerk - lost
 *
 *     sharp    sharpness over the last second's
 *     along    the same along the motion only, which motion blur takes away and defocus does not; at most 1
 *     colour   distance of the mean colour from the last second's course, a straight line, in units of 8 levels: a
 *              flash counts, what a moving camera brings does not
 *     jerk     distance of the global shift from the last second's, in pixels a frame, over 1 + the shift's size
 *     lost     0.5 times the seconds that are cut off
 *
 * Each is the mean over the run's frames. Of equal scores the later run wins.
 */

/* Of the run that ends with frame `last`. */
typedef struct { double sharp, along, colour, jerk, lost, score; int64_t last; } merit;

/* The mean of what is measured in frames `from` .. frames-1; the clip's first has no motion and counts not there: it
 * has no frame before it. Only what somebody asks for: mean, sharp, along, move, outside. */
static looks mean_looks(const looks *list, int64_t from, int64_t frames)
{
    looks mean = { 0 };
    double n = (double)(frames - from), pairs = from || n < 2 ? n : n - 1;
    for (int64_t t = from; t < frames; t++) {
        for (int c = 0; c < 3; c++)
            mean.mean[c] += list[t].mean[c] / n;
        for (int k = 0; k < 2; k++)
            mean.move[k] += list[t].move[k] / pairs;
        mean.sharp += list[t].sharp / n;
        mean.along += list[t].along / n;
        mean.outside += list[t].outside / pairs;
    }
    return mean;
}

/* Distance of frame t's mean colour from the straight line through those of frames `from` .. frames-1, whose mean is
 * `usual`. Least squares: with i counted from the middle, slope = sum i colour / sum i^2, and that sum over n frames is
 * n (n^2 - 1) / 12. A line, not the mean: while the camera moves, colours change steadily and nothing is wrong. */
static double off_course(const looks *list, int64_t t, int64_t from, int64_t frames, const looks *usual)
{
    double course[3], middle = (double)(from + frames - 1) / 2, n = (double)(frames - from);
    for (int c = 0; c < 3; c++) {
        double slope = 0;
        for (int64_t i = from; i < frames; i++)
            slope += ((double)i - middle) * list[i].mean[c] / (n > 1 ? n * (n * n - 1) / 12 : 1);
        course[c] = usual->mean[c] + slope * ((double)t - middle);
    }
    return colour_distance(list[t].mean, course);
}

/* The score of the run of `keys` frames that ends with frame `last`, held against the last second, which ends with the
 * clip: 24 frames, or all of a shorter one. */
static merit score_run(const looks *list, int64_t last, int64_t keys, int64_t frames)
{
    int64_t first = last - keys + 1, second = greater(frames - SECOND, 0);
    looks usual = mean_looks(list, second, frames), mean = mean_looks(list, first, last + 1);
    merit m = { .lost = 0.5 * (double)(frames - 1 - last) / SECOND, .last = last };
    double size = 1 + length(usual.move[0], usual.move[1]), n = (double)keys;
    m.sharp = usual.sharp > 0 ? mean.sharp / usual.sharp : 1;
    m.along = usual.along > 0 && mean.along < usual.along ? mean.along / usual.along : 1;
    for (int64_t t = first; t <= last; t++) {
        const double *move = list[t].move;
        m.colour += off_course(list, t, second, frames, &usual) / 8 / n;
        m.jerk += t ? length(move[0] - usual.move[0], move[1] - usual.move[1]) / size / n : 0;
    }
    m.score = m.sharp + m.along - m.colour - m.jerk - m.lost;
    return m;
}

/* The last frame of the best run of `keys` frames, among those that end in the last second; prints every candidate
 * where `tell`, so that a user who would choose otherwise can give --key. */
static int64_t choose_keys(const film *v, int64_t keys, bool tell)
{
    int64_t first = greater(v->frames - SECOND, keys - 1);
    looks *list = look_at(v);
    merit best = { .score = -INFINITY };
    if (tell)
        fprintf(stderr, "key frames     sharp  along colour   jerk   lost  score\n");
    for (int64_t last = first; last < v->frames; last++) {
        merit m = score_run(list, last, keys, v->frames);
        if (tell)
            fprintf(stderr, "%5lld..%-5lld  %6.3f %6.3f %6.3f %6.3f %6.3f %6.3f\n", ll(last - keys + 1), ll(last),
                    m.sharp, m.along, m.colour, m.jerk, m.lost, m.score);
        best = m.score >= best.score ? m : best;
    }
    free(list);
    return best.last;
}

/* ---------------------------------------------------------------- flows
 *
 * A flow is what a command computes: const in, a result out, the same in the plan and in the run. Stages dump
 * themselves; the result is what the command writes.
 *
 *     flow_generate   pictures, control words -> clip             flow_decode     latents -> clip
 *     flow_extend     clip, control words -> longer clip          flow_encode     pictures -> latents
 *     flow_tour       as flow_generate (commands: tour)           flow_clip       picture -> tokens
 */

/* What a flow makes: a clip, whose bytes are in the arena (planning: NULL, but frames and size are right), or one
 * tensor for a file, under its name there. */
typedef struct { film clip; tensor saved; const char *name; } result;

typedef result flow(const run *r, const job *j);

/* Pictures and control words -> frames: the whole model. Colours are held to the first picture, which is the clip's
 * first frame but for what the VAE makes of it. */
static result flow_generate(const run *r, const job *j)
{
    film v = { .w = j->width, .h = j->height };
    v.rgb = generate(r, j, &v.frames);
    if (j->keep_colour && v.rgb)
        match_colours(&v, NULL, j->start[0].rgb);
    return (result){ .clip = v };
}

/* The next part's key frames, as its start pictures: the choice of --key or of choose_keys. Cuts v after them. While
 * planning, when there is nothing to look at, nothing is cut: more frames than this cannot come. They are not copied:
 * the pictures point into v, which does not move. CLIP sees the first of them. */
static void take_keys(const run *r, job *part, film *v)
{
    int64_t keys = lesser(v->frames, MAX_GIVEN), first = part->key_first, last = part->key_last;
    if (part->key) {
        frames_resolve("--key", v->frames, &first, &last);
        keys = last - first + 1;
    } else {
        last = v->rgb ? choose_keys(v, keys, r->verbosity > 0) : v->frames - 1;
    }
    NEED(keys <= MAX_GIVEN && keys + part->ends < part->frames, "--frames: got %lld for %lld key frames and %d end "
         "pictures, expected at most %d key frames and more --frames than both", ll(part->frames), ll(keys), part->ends,
         MAX_GIVEN);
    part->starts = (int)keys;
    v->frames = last + 1;
    if (!v->rgb)
        return;
    if (r->verbosity > 0)
        fprintf(stderr, "extend: goes on from frames %lld..%lld\n", ll(last - keys + 1), ll(last));
    for (int64_t i = 0; i < keys; i++)
        part->start[i] = (image){ v->w, v->h, frame_of(v, last - keys + 1 + i) };
    free(part->seen.rgb);
    part->seen = clip_preprocess(clip_settings(part->clip), part->start[0]);
}

/* A clip and control words -> the clip, cut after its best key frames, and what the model makes of them, `times` over.
 * Every part has its own noise: the seed grows by one. A part begins with the key frames once more; they are dropped
 * after they have shown how its colours differ. End pictures end the last part.
 *
 *     v           0 ........ 38 [39 .. 43] 44 .. 47       key frames 39..43; what is behind them is cut off
 *     made                      [ 0 ..  4]  5 ........ 23
 *     v           0 ................... 43 44 ........ 62
 *
 * All parts are written into one room, which is as long as the clip can become. */
static result flow_extend(const run *r, const job *j)
{
    arena *a = r->arena;
    job part = *j;
    film v = j->earlier;
    size_t size = frame_bytes(&v);
    int64_t most = v.frames + j->times * vae_video_frames(vae_settings(j->vae), latent_length(j));
    v.rgb = arena_alloc(a, (size_t)most, size);
    if (v.rgb)
        memcpy(v.rgb, j->earlier.rgb, (size_t)v.frames * size);
    for (int64_t i = 0; i < j->times; i++, part.seed++) {
        size_t low = arena_mark(a), high = arena_mark_high(a);
        part.ends = i + 1 == j->times ? j->ends : 0;
        take_keys(r, &part, &v);
        film made = flow_generate(r, &part).clip;
        int64_t last = part.starts - 1, new = made.frames - part.starts;    /* last: the new ones are to look like it */
        if (made.rgb) {
            film tail = { frame_of(&made, last), new + 1, v.w, v.h };
            match_colours(&tail, NULL, part.start[last].rgb);
            memcpy(frame_of(&v, v.frames), frame_of(&tail, 1), (size_t)new * size);
        }
        v.frames += new;
        arena_reset(a, low);
        arena_reset_high(a, high);
    }
    free(part.seen.rgb);
    return (result){ .clip = v };
}

/* latents of a file [Z][F][h][w] in any floating type, as flow_encode writes them -> frames. They are checked like a
 * stage: what another program wrote may hold anything. */
static result flow_decode(const run *r, const job *j)
{
    const int64_t *n = j->given->dim;
    film v = { .w = j->width, .h = j->height };
    tensor latents = tensor_new(r->arena, SHAPE(n[1], n[2], n[3], n[0]));
    copy_given(latents.data, tensor_shape(latents), CHANNELS_FIRST, j->given);
    check_finite(latents, "latents", NULL, NULL);
    v.rgb = decode_frames(r, j, latents, &v.frames);
    return (result){ .clip = v };
}

/* Pictures as they are, one a frame -> the posterior's mean times scaling_factor, [Z][F][h][w]. Nothing is drawn, so
 * that the same pictures always give the same latents. The other half of the moments, the log variance, is only for
 * drawing. */
static result flow_encode(const run *r, const job *j)
{
    tensor moments = vae_encode(r, j->vae, fill_pixels(r, j));
    check_finite(moments, "vae.moments", vae_weights(j->vae), NULL);
    dump(r, moments, CHANNELS_FIRST, "vae.moments");
    int64_t z = moments.dim[3] / 2, places = tensor_count(moments) / (2 * z);
    tensor latents = tensor_new(r->arena, SHAPE(z, moments.dim[0], moments.dim[1], moments.dim[2]));
    for (int64_t i = 0; i < z * places && latents.data; i++)
        latents.data[i] = moments.data[i % places * 2 * z + i / places] * (real)vae_settings(j->vae)->scaling_factor;
    return (result){ .saved = latents, .name = "latents" };
}

/* One picture -> CLIP's tokens [patches][hidden_size]: what the DiT's image queries are made from. In the file they
 * have the name of the stage, so that --inject takes them in a generation. */
static result flow_clip(const run *r, const job *j)
{
    return (result){ .saved = clip_tokens(r, j), .name = "clip.hidden" };
}

/* How a job wants to be run: in a planning arena and in a real one alike. Progress and checkpoint are the real
 * run's. */
static run run_of(const job *j, arena *a)
{
    return (run){ .arena = a, .hooks = j->hooks, .verbosity = j->quiet ? 0 : j->verbose ? 2 : 1 };
}

/* `tail` alone, without a name before it, does not count. */
static bool ends_with(const char *text, const char *tail)
{
    size_t length = strlen(text), end = strlen(tail);
    return length > end && !strcmp(text + length - end, tail);
}

/* Dies where the result could not be written, before hours are spent on it: the name's form, the folder, its rights.
 * Returns where frames go, a temporary beside the name until they are complete; NULL where a tensor is saved, or
 * nothing is written but dumps. */
static output *open_output(const job *j, const result *planned)
{
    const char *const files[] = { planned->name ? j->out : NULL, j->checkpoint, j->preview };
    NEED(!files[0] || ends_with(j->out, ".safetensors"), "--output: got %s, expected NAME.safetensors", j->out);
    for (int i = 0; i < 3; i++)
        if (files[i])
            output_check(files[i]);
    return planned->name || !j->out ? NULL : output_open(j->out, planned->clip.w, planned->clip.h);
}

/* The result, to where it goes: frames, or the tensor as F32, whatever `real` is, since other programs read it. */
static void write_result(const job *j, output *o, const result *out)
{
    for (int64_t t = 0; o && t < out->clip.frames; t++)
        output_frame(o, frame_of(&out->clip, t));
    if (o)
        output_close(o);
    if (o || !j->out)
        return;
    int64_t n = tensor_count(out->saved);
    float *data = allocate((size_t)n, sizeof *data);
    for (int64_t i = 0; i < n; i++)
        data[i] = (float)out->saved.data[i];
    safetensors_write(j->out, &(st_entry){ out->name, F32, tensor_shape(out->saved), data }, 1, true);
    free(data);
}

/* ---------------------------------------------------------------- plan
 *
 * What a run will take, told before it begins: memory, from the flow in a planning arena; time, from the operations
 * that the same pass counts and from each kernel's rate, measured for a moment on slices of the run's shapes; disk.
 * What will not do ends here. Norms, activations and reading from disk are not counted, so that the time is a lower
 * bound: by about 10 % where kernels are large, by a third where all is tiny; and a busy machine seems slower.
 */
typedef struct {
    result out;                 /* its sizes; no data */
    size_t bytes;               /* of the arena */
    double work[WORKS], rate[WORKS];        /* operations, and seconds that one takes here */
    uint64_t copied, mapped;    /* bytes of weights that were put in order, and that are mapped */
    double disk;                /* bytes of output, and of the largest checkpoint beside the next */
    double memory_left, disk_left;          /* INFINITY: not known */
} run_plan;

/* ---------------------------------------------------------------- plan: time
 *
 * A kernel at one size, for a plan's rates and for bench. Its inputs are numbers of no meaning, on which its time does
 * not depend. n, and the shapes that it makes:
 *
 *     LINEAR       M, N, K                        x [M][K], weight [N][K], y [M][N]
 *     CONV         C, T, H, W                     x, y [T][H][W][C], weight [C][3 * 3 * 3][C], causal
 *     ATTENTION    heads, queries, keys, width    x, y [queries][heads * width], k, v [keys][heads * width]
 *
 * Operations, as the kernels count them (tensor.c): 2 M N K; 2 (T H W) C (27 C); 4 heads queries keys width, half of it
 * for q k and half for the sum over v. A run's time is the sum over kinds of its operations times that kind's rate.
 */
typedef struct { work_kind kind; int64_t heads; tensor x, y, k, v; layer l; } workload;

/* stored: the type of the weight, whose bytes are k's, 0.5 in `real`; read as BF16 they are 0 and 0.5 in turn. Which
 * numbers these are does not matter as long as none is subnormal: some processors are slow with such. */
static workload workload_new(arena *a, work_kind kind, dtype stored, const int64_t n[4])
{
    const shape x[] = { SHAPE(n[0], n[2]), SHAPE(n[1], n[2], n[3], n[0]), SHAPE(n[1], n[0] * n[3]) };
    const shape k[] = { SHAPE(n[1], n[2]), SHAPE(n[0], 27, n[0]), SHAPE(n[2], n[0] * n[3]) };
    workload e = { .kind = kind, .heads = n[0], .x = tensor_new(a, x[kind]), .k = tensor_new(a, k[kind]) };
    e.y = tensor_new(a, kind == LINEAR ? SHAPE(n[0], n[1]) : x[kind]);
    e.v = kind == ATTENTION ? tensor_new(a, k[kind]) : e.k;
    const tensor all[] = { e.x, e.k, e.v };
    for (int i = 0; i < 3; i++)
        tensor_fill(all[i], (real)0.5);
    e.l.weight = weight_of((unsigned char *)e.k.data, stored, k[kind], NULL);
    return e;
}

/* Once. The shapes decide everything else: the convolution is the VAE's usual one, with its causal padding in time. */
static void workload_run(arena *a, const workload *e)
{
    if (e->kind == LINEAR)
        linear_to(a, e->y, e->x, e->l);
    else if (e->kind == ATTENTION)
        attention(a, e->y, e->x, e->k, e->v, 1, e->heads);
    else
        conv(a, e->y, e->x, (conv_spec){ .kernel = { 3, 3, 3 }, .stride = { 1, 1, 1 }, .pad = 1, .up = 1 }, e->l);
}

/* Seconds that one operation of a kind takes, on slices of the job's shapes: a linear layer of the DiT (or of the VAE,
 * where there is none), some queries against all tokens, a convolution of the VAE's first level. 512 rows or queries
 * keep every thread busy; keys are as many as the run's, and fill the same caches. The faster of two rounds counts,
 * since nothing makes a kernel faster by chance. */
static double time_work(arena *a, const job *j, work_kind kind)
{
    enum { ROWS = 512, SIDE = 32 };
    const dit_config *d = j->dit ? dit_settings(j->dit) : NULL;
    const vae_config *v = j->vae ? vae_settings(j->vae) : NULL;
    int64_t width = d ? d->hidden_size : v ? v->channels[v->levels - 1] : clip_settings(j->clip)->hidden_size;
    int64_t unit = d && v ? vae_scale(v) * d->patch_size : 1;
    int64_t tokens = d && v ? latent_length(j) * (j->height / unit) * (j->width / unit) : 256;
    const int64_t n[][4] = { { ROWS, width, width }, { v ? v->channels[0] : 1, 2, SIDE, SIDE },
                             { ruyi_threads(), ROWS, tokens, d ? d->attention_head_dim : 64 } };
    workload e = workload_new(a, kind, REAL_TYPE, n[kind]);
    double best = INFINITY;
    for (int round = 0; round < 2; round++) {       /* the first touches the memory */
        double before = a->work[kind], start = now();
        workload_run(a, &e);
        best = fmin(best, (now() - start) / (a->work[kind] - before));
    }
    return best;
}

/* Fills p->rate, each kind in an arena of its own, planned first like any. What the run does not use costs nothing. It
 * takes some tenths of a second, which a quiet run saves. */
static void calibrate(const job *j, run_plan *p)
{
    for (int i = 0; i < WORKS; i++) {
        arena a = arena_plan();
        time_work(&a, j, (work_kind)i);
        a = arena_new(a.peak);
        p->rate[i] = p->work[i] > 0 ? time_work(&a, j, (work_kind)i) : 0;
        arena_free(&a);
    }
}

/* ---------------------------------------------------------------- plan: the machine
 *
 * A system that does not say what it has refuses nothing. Linux says it in files of words and numbers. What it does not
 * say is NAN, which fmin passes over: limits that are not known drop out by themselves.
 */

/* The first number after a word that begins a line of FOLDER/NAME (or after nothing, for ""); NAN: none. Such lines are
 * "MemAvailable:   25240136 kB", "anon 8192", or the word max alone, which is no number and so no limit. */
static double system_number(const char *folder, const char *name, const char *word)
{
    char line[256], *path = text_of("%s/%s", folder, name);
    double number = NAN;
    FILE *f = fopen(path, "r");
    while (f && isnan(number) && fgets(line, sizeof line, f))
        if (!strncmp(line, word, strlen(word)))
            sscanf(line + strlen(word), "%lf", &number);
    if (f)
        fclose(f);
    free(path);
    return number;
}

/* Bytes that the process can still have, by what is least of three. Mapped weights do not count: they give way.
 *
 *     machine             available memory and free swap, kilobytes in /proc/meminfo
 *     control groups      (version 2) this process's, and those above it: memory.max less what cannot give way, which
 *                         memory.stat calls anon. One that may swap is not asked: its memory limits its speed only
 *     address space       ulimit -v, less what is in use
 */
static double memory_left(void)
{
    char path[1024] = "/sys/fs/cgroup";
    size_t root = strlen(path);
    double available = system_number("/proc", "meminfo", "MemAvailable:");
    double swap = system_number("/proc", "meminfo", "SwapFree:"), pages = system_number("/proc/self", "statm", "");
    double left = fmin(INFINITY, 1024 * (available + fmax(swap, 0)));
    struct rlimit space;
    FILE *f = fopen("/proc/self/cgroup", "r");
    bool grouped = f && fscanf(f, "0::%1000s", path + root) == 1;
    if (f)
        fclose(f);
    for (; grouped && strlen(path) >= root; *strrchr(path, '/') = 0)
        if (system_number(path, "memory.swap.max", "") == 0)
            left = fmin(left, system_number(path, "memory.max", "") - system_number(path, "memory.stat", "anon "));
    if (getrlimit(RLIMIT_AS, &space) == 0 && space.rlim_cur != RLIM_INFINITY)
        left = fmin(left, (double)space.rlim_cur - pages * (double)sysconf(_SC_PAGESIZE));
    return left;
}

/* Bytes free in the folder of a file, for this user, who may have less than root; a system of files without blocks
 * (/proc) does not say. The folder is asked: the file itself is not there yet. */
static double disk_left(const char *path)
{
    char *folder = folder_of(path);
    struct statvfs about;
    bool said = statvfs(folder, &about) == 0 && about.f_blocks;
    free(folder);
    return said ? (double)about.f_bavail * (double)about.f_frsize : INFINITY;
}

/* The weights of all parts that are open, of at most four; returns how many. What a command does not need is not open:
 * encode has a VAE alone. */
static int opened(const job *j, const weights *list[4])
{
    const weights *all[] = { j->vae ? vae_weights(j->vae) : NULL, j->clip ? clip_weights(j->clip) : NULL,
                             j->dit ? dit_weights(j->dit) : NULL, j->embeddings };
    int n = 0;
    for (int i = 0; i < 4; i++)
        if (all[i])
            list[n++] = all[i];
    return n;
}

/* The flow without data: its memory, operations and result's sizes; and what the machine has. Only the rates are left
 * to calibrate. Bytes on disk:
 *
 *     clip            3 a pixel, in Y4M 1.5, where colours have half the resolution each way
 *     tensor          4 a number
 *     checkpoint      the largest holds the video decoded twice, 6 numbers a pixel; and the old file stands until the
 *                     new one is complete
 */
static run_plan plan(const job *j, flow *f)
{
    arena a = arena_plan();
    run r = run_of(j, &a);
    run_plan p = { .out = f(&r, j), .memory_left = memory_left(), .disk_left = INFINITY };
    const weights *all[4];
    p.bytes = a.peak;
    memcpy(p.work, a.work, sizeof p.work);
    for (int i = opened(j, all) - 1; i >= 0; i--) {
        p.copied += all[i]->copied;
        p.mapped += weights_bytes(all[i]);
    }
    double pixels = (double)(p.out.clip.frames * p.out.clip.w * p.out.clip.h);
    if (j->out && strcmp(j->out, "-")) {
        p.disk = p.out.name ? 4 * (double)tensor_count(p.out.saved) : pixels * (ends_with(j->out, ".y4m") ? 1.5 : 3);
        p.disk_left = disk_left(j->out);
    }
    if (j->checkpoint) {
        p.disk += 2 * (6 * pixels) * sizeof(real);
        p.disk_left = fmin(p.disk_left, disk_left(j->checkpoint));
    }
    return p;
}

/* One line, for `info` and at the beginning of a run; "-o -" and an unknown system leave out what they do not know. */
static void print_plan(FILE *to, const job *j, const run_plan *p)
{
    const film *v = &p->out.clip;
    fputs("plan: ", to);
    if (v->frames)
        fprintf(to, "a run of %lld x %lld, %lld frames, with %s: ", ll(v->w), ll(v->h), ll(v->frames),
                j->blank ? "one picture" : "the given pictures");
    fprintf(to, "%.1f MB of activations", (double)p->bytes / 1e6);
    if (isfinite(p->memory_left))
        fprintf(to, " (%.0f MB free)", p->memory_left / 1e6);
    fprintf(to, ", %.1f MB of convolution weights put in order, %.1f MB of weights mapped from disk; %.1f MB to write",
            (double)p->copied / 1e6, (double)p->mapped / 1e6, p->disk / 1e6);
    if (isfinite(p->disk_left))
        fprintf(to, " (%.0f MB free)", p->disk_left / 1e6);
    fputs("; about ", to);
    print_span(to, work_seconds(p->rate, p->work), "");
    fprintf(to, " on %lld thread%s\n", ll(ruyi_threads()), ruyi_threads() == 1 ? "" : "s");
    fflush(to);
}

/* Dies where the machine will not do: without this the kernel would kill the run, or the disk be full, hours later. */
static void check_plan(const job *j, const run_plan *p)
{
    MUST((double)p->bytes <= p->memory_left, "memory: the plan needs %.1f MB beside the mapped weights, got %.1f MB "
         "free; use a smaller --size, fewer --frames, or a machine with more memory", (double)p->bytes / 1e6,
         fmax(p->memory_left, 0) / 1e6);
    MUST(p->disk <= p->disk_left, "%s: the plan needs %.3f MB of disk, got %.3f MB free; make room, or write elsewhere",
         j->out ? j->out : j->checkpoint, p->disk / 1e6, p->disk_left / 1e6);
}

/* ---------------------------------------------------------------- run
 *
 * A command's flow, from the plan to the result on disk. The order is that of cost: what can be wrong with the command
 * line, the model and the machine is found in the first second; and nothing is there that is not whole.
 *
 *     plan            the flow without data: every shape checked, memory, operations, names of stages
 *     check_plan      memory and disk
 *     check_hooks     names of --inject and --stop-after, which the plan has come by
 *     open_output     the result's temporary
 *                     (--dry-run ends here; until here nothing has been computed or written)
 *     arena_new       all of the memory at once: later no allocation of a tensor can fail
 *     prepare         pictures at their size
 *     checkpoint      what an earlier run has computed
 *     flow            the same code once more
 *     write_result    the temporary gets its name when all of it is on the disk; then the checkpoint goes
 */

/* After the plan, which came by every stage: dies where a name of --inject or --stop-after is none of them. A mistyped
 * name would otherwise be noticed after the whole run, if at all. */
static void check_hooks(const job *j)
{
    hooks *h = j->hooks;
    if (!h)
        return;
    NEED(!h->ngiven || h->replaced || h->stop_after, "--inject: no tensor given there has the name of a stage of this "
         "run; --dump shows the names");
    NEED(!h->stop_after || h->stop_known, "--stop-after: got %s, which is no stage of this run; --dump shows the names",
         h->stop_after);
    if (h->ngiven && !j->quiet)
        fprintf(stderr, "inject: %lld stages are given\n", ll(h->replaced));
    if (h->truth)
        h->judge = judge_new(j->class, j->verbose, j->json);
}

/* The progress of a run that begins now, and its first line. The JSON file is added to: a run that goes on from a
 * checkpoint goes on with it, too. */
static struct progress progress_new(const job *j, const run_plan *p)
{
    struct progress new = { .quiet = j->quiet, .terminal = isatty(2), .rate = p->rate, .planned = p->work,
                            .json_path = j->progress, .json = j->progress ? fopen(j->progress, "a") : NULL };
    new.start = new.last_line = new.last_json = now();
    MUST(!j->progress || new.json, "%s: progress: got \"%s\", expected to write it; check folder and rights",
         j->progress, strerror(errno));
    if (new.json)
        json_progress(&new, "plan", (report_line){ .run_left = work_seconds(p->rate, p->work) });
    return new;
}

/* The last line of progress, and what the run took: with -v the plan's memory and what was used of it: the same
 * number, unless a checkpoint has saved some of the work. The line with the seconds is what `measure --log` reads
 * (read_cost). */
static void report_run(const job *j, struct progress *p, const arena *a, const film *v)
{
    if (p->json)
        json_progress(p, "done", (report_line){ .done = 1, .total = 1, .part = 1, .run_part = 1 });
    if (j->verbose)
        fprintf(stderr, "memory: %.1f MB planned, %.1f MB used beside the mapped weights\n",
                (double)a->size / 1e6, (double)a->peak / 1e6);
    if (!j->quiet && j->out && v->frames)
        fprintf(stderr, "%s: %lld frame%s of %lld x %lld, %.1f s\n", j->out, ll(v->frames), v->frames == 1 ? "" : "s",
                ll(v->w), ll(v->h), now() - p->start);
}

/* Plans, opens the output, runs, writes. prepare: what the run needs beside the plan; NULL: nothing. */
static void run_flow(job *j, flow *f, void (*prepare)(job *j))
{
    run_plan planned = plan(j, f);
    check_plan(j, &planned);
    if (!j->quiet || j->progress || j->dry_run)     /* the rates take a moment: for who sees them */
        calibrate(j, &planned);
    if (!j->quiet || j->dry_run)
        print_plan(stderr, j, &planned);
    check_hooks(j);
    output *o = open_output(j, &planned.out);
    if (j->dry_run) {
        remove_temporaries();
        exit(DONE);
    }
    struct progress p = progress_new(j, &planned);
    arena a = arena_new(planned.bytes);
    if (j->hooks && j->hooks->dump_dir)
        dump_check(j->hooks->dump_dir);
    if (prepare)
        prepare(j);
    run r = run_of(j, &a);
    r.progress = &p;
    struct checkpoint k;
    if (j->checkpoint) {
        checkpoint_open(j, &k, a.work);
        r.checkpoint = &k;
        may_stop = true;
        p.begun = work_seconds(p.rate, a.work);
    }
    p.last = now();             /* the first stage begins */
    result out = f(&r, j);
    mappings_check();
    write_result(j, o, &out);
    if (j->checkpoint) {        /* the result is there: the same command begins anew */
        safetensors_close(k.file);
        unlink(j->checkpoint);
    }
    report_run(j, &p, &a, &out.clip);
    j->code = j->hooks ? hooks_end(j->hooks) : DONE;
    arena_free(&a);
}

/* ---------------------------------------------------------------- model: size and length
 *
 * What the user asks for becomes what the model can make: width and height of whole patches, frames of whole slices.
 * The DiT's rotary grid is scaled to 512 x 512 pixels (dit.c), so it takes any size; predict_i2v.py advises base
 * resolutions from 384 to 896.
 */

/* Such sizes the model was trained on: clips were sorted into buckets of like aspect, so that a batch has one shape.
 * Height and width of the 512-pixel buckets, all of about 512 x 512 pixels, in units of 32. What is compared is their
 * quotient to two decimals, as the keys of ASPECT_RATIO_512 in bucket_sampler.py have it. */
static const signed char buckets[][2] = {
    { 8, 32 }, { 8, 31 }, { 8, 30 }, { 8, 29 }, { 9, 28 }, { 9, 27 }, { 9, 26 }, { 10, 25 },
    { 10, 24 }, { 11, 23 }, { 11, 22 }, { 11, 21 }, { 12, 21 }, { 12, 20 }, { 13, 19 }, { 13, 18 },
    { 14, 18 }, { 14, 17 }, { 15, 17 }, { 15, 16 }, { 16, 16 }, { 16, 15 }, { 17, 15 }, { 17, 14 },
    { 18, 14 }, { 18, 13 }, { 19, 13 }, { 20, 12 }, { 21, 12 }, { 22, 11 }, { 23, 11 }, { 24, 10 },
    { 25, 10 }, { 26, 9 }, { 27, 9 }, { 28, 9 }, { 29, 8 }, { 30, 8 }, { 31, 8 }, { 32, 8 },
};

/* The size for a picture of w x h pixels at a base resolution: the nearest bucket (the first of equals), scaled, its
 * sides floored to multiples of 16: 8 of the VAE, 2 of the patches. get_closest_ratio, and "Count most suitable height
 * and width" of predict_i2v.py. For 1920 x 1080 at 512: 0.5625 is nearest to 0.57 = 12 / 21, which makes 672 x 384; at
 * 768, 1008 x 576. */
static void bucket_size(int64_t w, int64_t h, int64_t resolution, int64_t *width, int64_t *height)
{
    double least = INFINITY;
    size_t best = 0;
    for (size_t i = 0; i < sizeof buckets / sizeof *buckets; i++) {
        double off = fabs(rint(100.0 * buckets[i][0] / buckets[i][1]) / 100 - (double)h / (double)w);
        if (off < least) {
            least = off;
            best = i;
        }
    }
    *height = buckets[best][0] * resolution / 256 * 16;
    *width = buckets[best][1] * resolution / 256 * 16;
}

/* What the command line leaves open, and what this model makes of the rest.
 *
 * Size      where --size did not say it, the first start picture's aspect, or a square without one
 * Frames    rounded down to whole slices of the encoder as predict_i2v.py does; with slices of 8 frames, 30 become 24.
 *           A single frame is a picture
 * Pictures  more of them than frames, and end pictures alone, fail or are lost in the public code: refused here
 */
static void choose_size(job *j)
{
    const image *p = j->starts ? &j->start[0] : &(image){ .w = 1, .h = 1 };
    int64_t batch = vae_settings(j->vae)->mini_batch_encoder, frames = j->frames == 1 ? 1 : j->frames / batch * batch;
    if (!j->width)
        bucket_size(p->w, p->h, j->resolution, &j->width, &j->height);
    NEED(j->width >= 16 && j->height >= 16, "--resolution: %lld makes %lld x %lld, expected sides of at least 16; use "
         "a larger one", ll(j->resolution), ll(j->width), ll(j->height));
    NEED(frames > 0, "--frames: got %lld, expected 1 or at least %lld, the encoder's mini_batch_encoder", ll(j->frames),
         ll(batch));
    if (frames != j->frames && !j->quiet)
        fprintf(stderr, "frames: %lld asked for, %lld will be made: whole slices of %lld\n", ll(j->frames), ll(frames),
                ll(batch));
    j->frames = frames;
    bool starts = j->starts > frames;
    NEED(!j->ends || j->starts, "--end: end pictures need a start picture; give one with -i");
    NEED(!starts && j->ends <= frames, "%s: got %d pictures for %lld frames; give fewer pictures or more --frames",
         starts ? "--image" : "--end", starts ? j->starts : j->ends, ll(frames));
}

/* All pictures to the clip's size, with Pillow's filter. Aspects are not kept; a bucket comes near: at most 7 % off
 * for anything between 1:1 and 16:9. */
static void resize_pictures(image *list, int count, int64_t w, int64_t h)
{
    for (int i = 0; i < count; i++) {
        image resized = image_resize(list[i], w, h);
        free(list[i].rgb);
        list[i] = resized;
    }
}

/* ---------------------------------------------------------------- model: opening
 *
 *     MODEL/model_index.json      says that this is a Ruyi
 *     MODEL/vae/                  config.json and weights: vae.c
 *     MODEL/image_encoder/        config.json, preprocessor_config.json and weights: dit.c
 *     MODEL/transformer/          config.json and weights: dit.c
 *     MODEL/scheduler/            scheduler_config.json, no weights
 *     MODEL/embeddings.safetensors    the control rows
 *
 * Weights are mapped, not read, so opening takes little time and what a run does not touch is never loaded; only the
 * convolutions' are copied, into the order that their kernel reads. What is opened stays open: the program does one
 * thing and ends.
 */

/* Dies where an option that the command needs is absent. */
static void require(const char *value, const char *option, const char *what)
{
    NEED(value && *value, "%s: got nothing, expected %s; see ruyi --help", option, what);
}

/* The path of a part of the model folder; it holds until the next call. Whoever asks needs a model, so that this is
 * also where a missing -m is found. */
static const char *inside(job *j, const char *part)
{
    require(j->model, "--model", "a model folder; give it with -m FOLDER");
    free(j->path);
    return j->path = text_of("%s/%s", j->model, part);
}

/* The halves that the command needs: the other's tensors are known and not bound. */
static void open_vae(job *j, bool encoder, bool decoder)
{
    j->vae = vae_open(inside(j, "vae"), encoder, decoder, j->tiling, j->allow_unknown);
}

/* A row of text, as the DiT takes it: what two text encoders made of a prompt.
 *
 *     emb1    [1][text_len][X]                    of CLIP's text encoder          mask1   [1][text_len]
 *     emb2    [1][text_len_t5][width of T5]       of T5                           mask2   [1][text_len_t5]
 *
 * Ruyi has no text encoder: the rows of embeddings.safetensors are all the text it knows. The four tensors, named
 * PREFIX.PART, fall back to the default row's one by one. get_control_embeddings of predict_i2v.py. */
static control control_row(weights *w, const dit_config *c, const char *prefix, const char *otherwise)
{
    static const char *const names[] = { "emb1", "mask1", "emb2", "mask2" };
    const shape shapes[] = { SHAPE(1, c->text_len, c->cross_attention_dim), SHAPE(1, c->text_len),
                             SHAPE(1, c->text_len_t5, c->cross_attention_dim_t5), SHAPE(1, c->text_len_t5) };
    weight part[4];
    for (int i = 0; i < 4; i++) {
        char *key = text_of("%s.%s", prefix, names[i]);
        part[i] = bind(w, shapes[i], "%s.%s", weights_has(w, key) ? prefix : otherwise, names[i]);
        free(key);
    }
    return (control){ part[0], part[1], part[2], part[3] };
}

/* The row of a camera and a motion, p.16x9movie2left for --motion 2 --camera left; 0 and auto leave it to the model.
 * The aspect in the key is always 16x9 ("Do not change", says predict_i2v.py), whatever the clip's is. */
static control positive_row(const job *j, const char *camera, const char *motion)
{
    char *prefix = text_of("p.16x9movie%s%s", strcmp(motion, "auto") ? motion : "0", camera);
    control row = control_row(j->embeddings, dit_settings(j->dit), prefix, "p.default");
    free(prefix);
    return row;
}

/* What must hold between the components, and between them and the options. Each dies here with the field or option to
 * change, rather than deep inside with two shapes.
 *
 * Components  the DiT's channels in are three times the latents' (noise, mask, masked video), its image queries come
 *             from tokens as wide as CLIP's, and its rotary grid takes latents of 8 x 8 pixels
 * Size        a whole number of patches, each of which is 8 * patch_size pixels wide
 * Steps       DPM++ takes one point more than steps (step_time); PNDM three for its warm-up and one to go to. For some
 *             counts numpy.arange has a number too many for `trailing`, and the public classes go on to a timestep of
 *             -1
 */
static void check_model(const job *j)
{
    const vae_config *v = vae_settings(j->vae);
    const dit_config *d = dit_settings(j->dit);
    long long clip_width = clip_settings(j->clip)->hidden_size, length = latent_length(j);
    long long unit = greater(8 * d->patch_size, 16), steps = j->steps;
    long long points = j->sched.num_train_timesteps, most = points - (j->scheduler == DPMPP);
    long long least = j->scheduler == PNDM && !j->sched.skip_prk_steps ? 4 : 1;
    double apart = (double)points / (double)steps;
    CONFIG_NEED(v->block_out_channels, v->file, "block_out_channels",
                "expected a list of numbers: its length gives the scale of the latents");
    CONFIG_NEED(vae_scale(v) == 8, v->file, "ch_mult", "expected 4 numbers: the rotary grid divides pixels by 8");
    CONFIG_NEED(3 * v->latent_channels == d->in_channels, v->file, "latent_channels",
                "expected 16, a third of the transformer's in_channels");
    CONFIG_NEED(clip_width == d->projection_dim, d->file, "projection_dim",
                "expected the image encoder's hidden_size %lld", clip_width);
    NEED(j->width % unit == 0 && j->height % unit == 0, "--size: got %lldx%lld, expected multiples of %lld for this "
         "model's patches", ll(j->width), ll(j->height), unit);
    NEED(length >= 1 && length <= TIME_ROWS, "--frames: %lld frames make %lld latent frames, expected 1 to %d, the "
         "rows of the time table", ll(j->frames), length, TIME_ROWS);
    NEED(!j->enhance || length > 1, "--enhance-a-video: one latent frame has no other to attend to; give more --frames "
         "or leave it out");
    NEED(steps >= least && steps <= most, "--steps: got %lld, expected %lld to %lld for %s", steps, least, most,
         sched_names[j->scheduler]);
    NEED(j->sched.timestep_spacing != TRAILING || (double)points / apart <= (double)steps, "--steps: got %lld, which "
         "trailing spacing makes %lld in the public code; choose another number", steps, steps + 1);
}

static const char *const fp8_words[] = { "lite", "strong", "extreme" };     /* from FP8_LITE on */

/* Says what the options that are off by default change, a line each: that they were understood, and how much they reach
 * (an update may fit no layer, a picture be smaller than a tile). (TeaCache: denoise.) */
static void report_changes(const job *j)
{
    int64_t calls = j->steps - j->enhance_start - j->enhance_end;
    if (j->quiet)
        return;
    for (int i = 0; i < j->nloras; i++) {
        long long layers = 0;
        for (int64_t k = 0; k < j->loras[i]->count; k++)
            layers += ends_with(j->loras[i]->tensors[k].name, ".lora_up.weight");
        fprintf(stderr, "lora: %s: %lld layer%s updated, weight %g\n", j->loras[i]->path, layers,
                layers == 1 ? "" : "s", j->lora_scales[i]);
    }
    if (j->fp8)
        fprintf(stderr, "fp8: %s: %lld layers of the transformer rounded to %s\n", fp8_words[j->fp8 - FP8_LITE],
                ll(dit_weights(j->dit)->fp8_layers), dtype_name[j->fp8_type]);
    if (j->rng.sms)
        fprintf(stderr, "rng: a GPU's of %d multiprocessors with %d threads each, in %s\n", j->rng.sms, j->rng.threads,
                j->rng.bf16 ? "bf16" : "f32");
    if (j->enhance)
        fprintf(stderr, "enhance-a-video: weight %g in %lld calls\n", j->enhance_weight, ll(greater(calls, 0)));
    if (j->tiling.given) {
        const vae_config *c = vae_settings(j->vae);
        int64_t h = j->height, w = j->width, scale = vae_scale(c);
        fprintf(stderr, "vae tiling: tiles of %lld pixels overlapping by %g, %lld to encode, %lld to decode\n",
                ll(c->tile_sample_min_size), c->tile_overlap_factor, ll(vae_tiles(c, false, h, w)),
                ll(vae_tiles(c, true, h / scale, w / scale)));
    }
}

/* Everything for flow_generate. First of all: is this a Ruyi? Another model's folder is called by its name, rather than
 * by the first tensor that it lacks. The VAE comes before the rest because its slices decide the frames, and what the
 * command line got wrong is told before the larger parts are opened. The negative row has no fallback but itself. */
static void open_generate(job *j)
{
    inside(j, "");                      /* is there a model at all? */
    config f = config_open(j->model, "model_index.json");
    char *class = config_word(f, "_class_name", "RuyiInpaintPipeline");
    CONFIG_NEED(!strcmp(class, "RuyiInpaintPipeline"), f, "_class_name",
                "expected RuyiInpaintPipeline; this folder holds another model");
    free(class);
    config_close(f);
    open_vae(j, true, true);
    choose_size(j);
    j->clip = clip_open(inside(j, "image_encoder"), j->allow_unknown);
    dit_changes changes = { j->loras, j->lora_scales, j->nloras, j->fp8, j->fp8_type };
    j->dit = dit_open(inside(j, "transformer"), changes, j->allow_unknown);
    j->sched = sched_read(inside(j, "scheduler"), j->scheduler);
    j->embeddings = weights_open(j->model, "embeddings");
    j->rows[0] = control_row(j->embeddings, dit_settings(j->dit), "n.default", "n.default");
    j->rows[1] = positive_row(j, j->camera, j->motion);
    check_model(j);
    report_changes(j);
}

/* The pictures at the clip's size, and the first as CLIP gets it. After the plan, which needs no picture: a size that
 * no machine can hold is refused before anything of that size exists. CLIP sees the picture after it was resized, as in
 * the public code, and crops its middle. */
static void fit_pictures(job *j)
{
    resize_pictures(j->start, j->starts, j->width, j->height);
    resize_pictures(j->end, j->ends, j->width, j->height);
    if (j->starts)
        j->seen = clip_preprocess(clip_settings(j->clip), j->start[0]);
}

/* ---------------------------------------------------------------- commands: generate, encode, decode, clip, extend
 *
 * Each opens what it needs of the model, checks that it fits, and runs its flow. encode, decode and clip open one part
 * of the model alone, so that a VAE can be studied without the DiT's gigabytes. Together they are a generation's ends:
 *
 *     ruyi encode -m MODEL -i a.ppm -i b.ppm ... -o l.safetensors     latents [Z][F][h][w], those that the DiT sees
 *     ruyi decode -m MODEL -l l.safetensors -o back.y4m               what the VAE alone loses shows in it
 *     ruyi clip -m MODEL -i a.ppm -o t.safetensors                    clip.hidden [patches][hidden_size]
 */

/* ruyi -m MODEL -i START.ppm [-e END.ppm] -o OUT: predict_i2v.py. A wrong option dies at once, a wrong tensor while the
 * model is opened, a shape that does not fit in the plan: all before the first step. */
static void command_generate(job *j)
{
    open_generate(j);
    run_flow(j, flow_generate, fit_pictures);
}

/* ruyi encode: every picture is one frame, [T][H][W][3] as it is. Nothing is resized here, because the pictures may be
 * frames of a clip that is to come back from `ruyi decode` at its own size. The sides must be whole latents. */
static void command_encode(job *j)
{
    open_vae(j, true, false);
    int64_t scale = vae_scale(vae_settings(j->vae)), w = j->start[0].w, h = j->start[0].h;
    for (int i = 0; i < j->starts; i++)
        NEED(j->start[i].w == w && j->start[i].h == h && w % scale == 0 && h % scale == 0, "--image: picture %d is "
             "%lld x %lld, expected pictures of one size whose sides are multiples of %lld", i + 1, ll(j->start[i].w),
             ll(j->start[i].h), ll(scale));
    j->width = w;
    j->height = h;
    j->frames = j->starts;
    report_changes(j);
    run_flow(j, flow_encode, NULL);
}

/* ruyi decode: latents [Z][F][h][w] under the name "latents", scaled as the DiT sees them, as `ruyi encode` or any
 * other program writes them. Their F, h and w say how long and large the clip is; the model says Z only. */
static void command_decode(job *j)
{
    require(j->latents, "--latents", "-l LATENTS.safetensors");
    open_vae(j, false, true);
    const st_tensor *t = j->given = safetensors_find(safetensors_open(j->latents), "latents");
    long long z = vae_settings(j->vae)->latent_channels, scale = vae_scale(vae_settings(j->vae));
    NEED(t, "%s: has no tensor of the name latents; `ruyi info %s` lists what it has", j->latents, j->latents);
    bool readable = t->type == F32 || t->type == F64 || t->type == F16 || t->type == BF16;
    NEED(readable && t->ndim == 4 && t->dim[0] == z && t->count, "%s: latents: got %s of %d dimensions, expected F32, "
         "F64, F16 or BF16 of [%lld, frames, height/%lld, width/%lld]", j->latents, dtype_name[t->type], t->ndim, z,
         scale, scale);
    j->width = t->dim[3] * scale;
    j->height = t->dim[2] * scale;
    report_changes(j);
    run_flow(j, flow_decode, NULL);
}

/* ruyi clip: what the image tower makes of one picture, in its own size. In a generation the picture is resized to the
 * clip's size first, as the public code does, so the tokens differ a little. */
static void command_clip(job *j)
{
    j->clip = clip_open(inside(j, "image_encoder"), j->allow_unknown);
    j->seen = clip_preprocess(clip_settings(j->clip), j->start[0]);
    run_flow(j, flow_clip, NULL);
}

/* The clip that the words of the command line name: a Y4M, a series NAME-%04d.ppm, several PPMs, or -. All frames are
 * in memory, 3 bytes a pixel. */
static film read_film(const job *j)
{
    image *list = NULL;
    int64_t count = 0;
    for (int i = 0; i < j->nfiles; i++)
        count = images_read(j->files[i], INT32_MAX, &list, count);
    film v = { .frames = count, .w = list->w, .h = list->h };
    v.rgb = allocate((size_t)count, frame_bytes(&v));
    for (int64_t t = 0; t < count; t++) {
        NEED(list[t].w == v.w && list[t].h == v.h, "%s: frame %lld is %lld x %lld, expected %lld x %lld as the first; "
             "give frames of one clip", j->files[0], ll(t), ll(list[t].w), ll(list[t].h), ll(v.w), ll(v.h));
        memcpy(frame_of(&v, t), list[t].rgb, frame_bytes(&v));
        free(list[t].rgb);
    }
    free(list);
    return v;
}

/* ruyi extend CLIP -m MODEL -o OUT. The size is the clip's; one that is not the model's unit is refused, since a
 * resized clip would not be the user's. --frames is a part's length, key frames included. */
static void command_extend(job *j)
{
    j->earlier = read_film(j);
    j->width = j->earlier.w;
    j->height = j->earlier.h;
    NEED(j->width % 16 == 0 && j->height % 16 == 0, "%s: got frames of %lld x %lld, expected sides that are multiples "
         "of 16; crop or resize the clip", j->files[0], ll(j->width), ll(j->height));
    j->starts = 1;                      /* at least; flow_extend says how many */
    open_generate(j);
    resize_pictures(j->end, j->ends, j->width, j->height);
    run_flow(j, flow_extend, NULL);
}

/* ---------------------------------------------------------------- commands: measure
 *
 * What one can say of a clip in numbers without another model. One row is one number: a key for scripts and a line for
 * people. Everything is exact integers, or doubles in one order: the same bytes on every machine.
 *
 *     camera...       does it do what was asked for? the median shift of the content, and its word
 *     motion          do things move? what differs from the camera's motion
 *     colour...       do the colours stay? the background's distance from frame 0's (clips: colours)
 *     flicker...      does the light stay? luma against the mean of the frames before and after
 *     sharpness...    does it stay sharp? steps from pixel to pixel, the last frame's over the first's
 *     start, end      is the given picture in it? 30 dB and more look alike
 *     seconds...      what did it cost? from the run's standard error
 */

/* Peak signal-to-noise ratio of two pictures in dB, over all R, G, B: 10 log10(255^2 / mean squared difference), at
 * most 100, which is also what equal ones have. By the program's own logarithm, since libm's differ. */
static double psnr(const unsigned char *a, const unsigned char *b, int64_t count)
{
    int64_t sum = 0;
    for (int64_t i = 0; i < count; i++)
        sum += (a[i] - b[i]) * (a[i] - b[i]);
    return sum ? fmin(10 / log_own(10) * log_own(255.0 * 255 * (double)count / (double)sum), 100) : 100;
}

/* Structural similarity of two frames' luma: the mean over windows of 8 x 8 pixels, 4 apart, of
 *
 *     (2 ma mb + C1)(2 cov + C2) / ((ma^2 + mb^2 + C1)(va + vb + C2)),    C1 = (0.01 255)^2, C2 = (0.03 255)^2
 *
 * with means m, variances v and the covariance. Here times 64^2 above and below, sums in place of means, so that all
 * but C1 and C2 are whole numbers. Wang et al., 2004; their windows are Gaussian. */
static double ssim(const plane *a, const plane *b)
{
    const double c1 = 64 * 64 * 0.01 * 0.01 * 255 * 255, c2 = 64 * 64 * 0.03 * 0.03 * 255 * 255;
    int64_t count = 0;
    double sum = 0;
    for (int64_t y = 0; y + 8 <= a->h; y += 4)
        for (int64_t x = 0; x + 8 <= a->w; x += 4, count++) {
            int64_t p = 0, q = 0, squares = 0, pq = 0;
            for (int64_t i = 0; i < 64; i++) {
                int64_t at = (y + i / 8) * a->w + x + i % 8, u = a->y[at], v = b->y[at];
                p += u;
                q += v;
                squares += u * u + v * v;
                pq += u * v;
            }
            double above = ((double)(2 * p * q) + c1) * ((double)(2 * (64 * pq - p * q)) + c2);
            sum += above / (((double)(p * p + q * q) + c1) * ((double)(64 * squares - p * p - q * q) + c2));
        }
    return sum / (double)count;
}

/* PSNR and SSIM of frame t to a picture, which is brought to the clip's size as a generation does it: what is measured
 * is the model's doing, not the resizing's. */
static void measure_likeness(const film *v, int64_t t, image picture, double like[2])
{
    image frame = { v->w, v->h, frame_of(v, t) }, given = image_resize(picture, v->w, v->h);
    plane a = luma_of(frame), b = luma_of(given);
    like[0] = psnr(frame.rgb, given.rgb, (int64_t)frame_bytes(v));
    like[1] = ssim(&a, &b);
    free(a.y);
    free(b.y);
    free(given.rgb);
}

/* Seconds a frame, from the line with which a run ends: "NAME: 24 frames of 128 x 128, 4.0 s". NAME may hold colons, so
 * every one is tried; of several runs in a file the last counts. */
static double read_cost(const char *path)
{
    char line[4096];
    double seconds, cost = NAN;
    long long frames;
    FILE *f = fopen(path, "r");
    while (f && fgets(line, sizeof line, f))
        for (const char *at = line; (at = strstr(at, ": ")) != NULL; at += 2)
            if (sscanf(at, ": %lld frame%*[s] of %*d x %*d, %lf s", &frames, &seconds) == 2 && frames > 0)
                cost = seconds / (double)frames;
    NEED(f && !ferror(f) && !isnan(cost), "--log: %s: got no line as \"x.y4m: 24 frames of 128 x 128, 4.0 s\", "
         "expected the standard error of a run", path);
    fclose(f);
    return cost;
}

/* The camera's word: it goes where the content does not, so that content moving right (x > 0) means left, and content
 * moving down (y > 0) up. Static below 1/640 of the shorter side a frame, 0.2 pixels of 128. */
static const char *camera_word(double x, double y, int64_t w, int64_t h)
{
    double still = (double)lesser(w, h) / 640;
    if (fabs(x) < still && fabs(y) < still)
        return "static";
    return fabs(x) >= fabs(y) ? x > 0 ? "left" : "right" : y > 0 ? "up" : "down";
}

/* ruyi measure CLIP: the table, or JSON with the same keys. What cannot be had without an option (a picture to compare
 * with, the log) is NAN: no row, and null in JSON, so that every document has the same keys. */
static void command_measure(job *j)
{
    film v = read_film(j);
    NEED(v.frames >= 2 && v.w >= BLOCK && v.h >= BLOCK, "%s: got %lld frames of %lld x %lld, expected at least 2 of "
         "16 x 16", j->files[0], ll(v.frames), ll(v.w), ll(v.h));
    looks *list = look_at(&v), mean = mean_looks(list, 0, v.frames), *first = list, *last = list + v.frames - 1;
    double start[2] = { NAN, NAN }, end[2] = { NAN, NAN }, drift = 0, flicker = 0, x = mean.move[0], y = mean.move[1];
    int64_t worst = 0;
    if (j->starts)
        measure_likeness(&v, 0, j->start[0], start);
    if (j->ends)
        measure_likeness(&v, v.frames - 1, j->end[0], end);
    match_colours(&v, list, v.rgb);     /* the last that is done with the frames: it changes them */
    for (int64_t t = 1; t < v.frames; t++) {
        drift = fmax(drift, list[t].drift);
        flicker += list[t].jump / (double)(v.frames > 2 ? v.frames - 2 : 1);
        worst = list[t].jump > list[worst].jump ? t : worst;
    }
    const struct { const char *key; double value; int digits; const char *text; } rows[] = {
        { "frames", (double)v.frames, 0, "frames" },
        { "width", (double)v.w, 0, "pixels" },
        { "height", (double)v.h, 0, "pixels" },
        { "camera_speed", length(x, y), 3, "pixels a frame: median shift of blocks" },
        { "content_right", x, 3, "pixels a frame: the content moves against the camera" },
        { "content_down", y, 3, "pixels a frame" },
        { "motion", mean.outside, 3, "pixels a frame beside the camera's: things, and layers of other depth" },
        { "colour_drift", drift, 3, "levels of 255: largest distance of the background's colour from frame 0's" },
        { "colour_end", last->drift, 3, "levels: that of the last frame" },
        { "flicker", flicker, 3, "levels: mean distance of a frame's luma from its neighbours' mean" },
        { "flicker_worst", list[worst].jump, 3, "levels: the largest" },
        { "flicker_frame", (double)worst, 0, "where that is" },
        { "sharpness", mean.sharp, 3, "levels from pixel to pixel" },
        { "sharpness_end", first->sharp > 0 ? last->sharp / first->sharp : 1, 3, "last frame, over the first" },
        { "start_psnr", start[0], 2, "dB: first frame and start picture" },
        { "start_ssim", start[1], 4, "1: the same" },
        { "end_psnr", end[0], 2, "dB: last frame and end picture" },
        { "end_ssim", end[1], 4, "1: the same" },
        { "seconds_a_frame", j->log ? read_cost(j->log) : NAN, 3, "cost" },
    };
    printf(j->json ? "{\n  \"camera\": \"%s\"" : "camera           %9s   where the camera goes\n",
           camera_word(x, y, v.w, v.h));
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (j->json && isnan(rows[i].value))
            printf(",\n  \"%s\": null", rows[i].key);
        else if (j->json)
            printf(",\n  \"%s\": %.*f", rows[i].key, rows[i].digits, rows[i].value);
        else if (!isnan(rows[i].value))
            printf("%-16s %9.*f   %s\n", rows[i].key, rows[i].digits, rows[i].value, rows[i].text);
    if (j->json)
        printf("\n}\n");
    free(list);
    free(v.rgb);
}

/* ---------------------------------------------------------------- commands: tour
 *
 * A generation that explains itself: one page of HTML with the run's own pictures and numbers. The flow is generate's;
 * a hook looks at every stage when it is done, and draws at once, so that nothing large is kept:
 *
 *     stage --tour_look--> its time and operations to a section;  watched[] --> draw_...: HTML to a figure
 *     sections[] --put_section--> words with their `names`, figures, formula, shapes, source, cost --> NAME.html
 *
 * Not everything is drawn: of the clip the middle latent frame, of a frame the patch in its middle, and one call, in
 * the middle of the run, is looked at closely. Measured times stand in <time> elements; nothing else on the page
 * depends on the machine, and nothing in the run on the page: its frames and stages are generate's, byte for byte.
 */

/* The page's sections, to which costs go, and at last the page's own cost, which it does not show; its figures. */
enum { S_PICTURE, S_CLIP, S_LATENTS, S_STEPS, S_POSITIONS, S_ATTENTION, S_GUIDANCE, S_BLOCKS, S_DECODING, S_FRAMES,
       SECTIONS, S_PAGE = SECTIONS };
enum { F_GIVEN, F_MASK, F_CLIP, F_PICTURE, F_MASK_LATENTS, F_STEPS, F_CALLS, F_WAVES, F_ROTARY, F_TIMES, F_PATCH,
       F_ATTENTION, F_ROWS, F_BLOCKS, F_SLICES, F_FRAMES, FIGURES };
enum { SHOWN = 8, CLIP_PIXELS = 1 << 21 };  /* steps that are drawn, about; pixels of all frames on the page, at most */

typedef struct {
    const job *j;               /* what is run */
    int64_t frames, h, w, z;    /* F h w Z */
    int64_t gh, gw;             /* patches of a latent frame: [gh][gw] */
    int64_t d, layers, rows;    /* D, blocks, B */
    int64_t length;             /* T */
    double *fit;                /* [Z + 1][3] colours of latents: preview_fit's */
    scheduler s;                /* the tables of the run's */
    int call, block;            /* under way */
    int close;                  /* the call that is looked at closely; -1: not come yet */
    double seconds[S_PAGE + 1], work[S_PAGE + 1];       /* of each section */
    double time, done;          /* clock and operations at the last lap */
    string drawn[FIGURES];      /* HTML; empty where the run has no such stage */
    const real *input;          /* [h][w][Z] the middle frame of what the call is given: in the run's own memory */
    const real *query;          /* [D] the patch's, of the block under way: there, too */
    real *times;                /* [F][D] what the first block adds to the tokens of a frame; before it the tokens */
    real *waves;                /* [calls][numbers] the timesteps of the calls so far, `waved` of them */
    int64_t numbers, waved;
    double adds, most;          /* rms of what guidance adds: at this call; at the one that is drawn */
    int64_t slices, made;       /* the decoder's, and their frames, so far */
    looks mean;                 /* what measure says of the clip */
} tour;

/* ---------------------------------------------------------------- commands: tour: figures
 *
 * A drawer gets a stage as it lies in memory, channels last, and appends to its figure. Of guidance rows the last is
 * the positive one. Two tools draw everything: a map shows numbers as colours, a figure a picture with its words.
 */

/* Root of the mean square: the usual size of a number. */
static double rms(const real *x, int64_t count)
{
    double sum = 0;
    for (int64_t i = 0; i < count; i++)
        sum += (double)x[i] * (double)x[i];
    return sqrt(sum / (double)count);
}

/* The largest magnitude of every step-th number, which a map takes as its scale. */
static double extent(const real *x, int64_t step, int64_t count)
{
    double most = 0;
    for (int64_t i = 0; i < count; i++)
        most = fmax(most, fabs((double)x[i * step]));
    return most;
}

/* Every step-th number of x as a pixel: from blue (-most) over white (0) to red (most), straight lines between five
 * colours. A step of Z takes one channel of a frame [h][w][Z]. Zeros alone, most 0, are white. */
static image map_of(const real *x, int64_t step, int64_t w, int64_t h, double most)
{
    static const unsigned char palette[] = { 30, 75, 165, 122, 168, 217, 246, 246, 244, 236, 152, 122, 172, 28, 42 };
    image out = { w, h, allocate((size_t)(w * h), 3) };
    for (int64_t i = 0; i < w * h; i++) {
        double at = 2 + 2 * (most > 0 ? fmin(fmax((double)x[i * step] / most, -1), 1) : 0);     /* 0..4 */
        int low = at < 3 ? (int)at : 3;     /* the colour below */
        const unsigned char *p = palette + 3 * low;
        for (int c = 0; c < 3; c++)
            out.rgb[3 * i + c] = (unsigned char)(p[c] + (at - low) * (p[c + 3] - p[c]) + 0.5);
    }
    return out;
}

/* A picture and its words, both of which are given back here. The words stand below it, and in its place for who does
 * not see it (alt). Where there is a tour, its patch is marked: in parts of the picture's sides, which a browser shows
 * at any size. */
static void put_figure(string *p, image picture, const tour *marked, char *words)
{
    print_to(p, "<figure><span class=\"pin\"><img src=\"");
    print_picture(p, picture);
    print_to(p, "\" width=\"%d\" height=\"%d\" alt=\"%s\">", (int)picture.w, (int)picture.h, words);
    if (marked) {
        double w = 100.0 / (double)marked->gw, h = 100.0 / (double)marked->gh;
        print_to(p, "<b style=\"left:%.3f%%;top:%.3f%%;width:%.3f%%;height:%.3f%%\"></b>",
                 (double)(marked->gw / 2) * w, (double)(marked->gh / 2) * h, w, h);
    }
    print_to(p, "</span><figcaption>%s</figcaption></figure>\n", words);
    free(words);
    free(picture.rgb);
}

/* The mask U8 [1][T][H][W] as a box a frame, full where it is given, and the pictures that are given: copies, because
 * the run needs its own to the end. */
static void draw_given(tour *t, string *p, st_entry e)
{
    const unsigned char *mask = e.data;
    for (int64_t i = 0; i < e.shape.dim[1]; i++) {
        const image *given = picture_at(t->j, i);
        print_to(p, mask[i * t->j->height * t->j->width] ? "&#9633;" : "&#9632;");
        if (given)
            put_figure(&t->drawn[F_GIVEN], image_resize(*given, given->w, given->h), i ? NULL : t,
                       text_of("frame %lld, given%s", ll(i), i ? "" : "; the box is section 6's patch"));
    }
}

/* CLIP's picture, and its tokens [patches][width]: the numbers as they are, since nobody knows what each of them means.
 * Rows that look alike are patches that CLIP takes for alike. */
static void draw_clip(tour *t, string *p, st_entry e)
{
    image seen = t->j->seen;
    int64_t patches = e.shape.dim[0], width = e.shape.dim[1];
    put_figure(p, image_resize(seen, seen.w, seen.h), NULL, text_of("the crop"));
    put_figure(p, map_of(e.data, 1, width, patches, extent(e.data, 1, patches * width)), NULL,
               text_of("a row a token"));
}

/* Latents [F][h][w][Z]: the channels of the first frame, each on its own scale, because some are ten times larger. The
 * frame is the first in memory, and its channels are apart by steps of Z. */
static void draw_channels(tour *t, string *p, st_entry e)
{
    const real *x = e.data;
    for (int64_t i = 0; i < t->z; i++) {
        double most = extent(x + i, t->z, t->h * t->w);
        put_figure(p, map_of(x + i, t->z, t->w, t->h, most), NULL, text_of("%lld: &plusmn;%.2f", ll(i), most));
    }
}

/* Called twice a call, both times with [F][h][w][Z]: with the model's input x, and with its answer v. Of that a row of
 * the table, and, at some calls, the middle frame as it was given and the clean one that the answer means.
 *
 * Formula   x0 of x and v, by the prediction type (schedulers, above); every scheduler's input is scaled so that
 *           x = alpha x0 + beta noise with alpha^2 + beta^2 = 1, whatever it works with itself
 * Method    colours are a linear fit, as a preview's: no decoding, which would take time and memory of the run
 */
static void draw_step(tour *t, string *p, st_entry e)
{
    int64_t count = t->h * t->w * t->z, every = divide_up(t->s.calls, SHOWN);
    const real *middle = (const real *)e.data + t->frames / 2 * count;
    if (!strcmp(e.name, "input")) {
        t->input = middle;
        return;
    }
    double time = t->s.timesteps[t->call], at = alpha_at(&t->s, time);      /* at: alpha^2 */
    real *frame = clean_frame(&t->s, t->input, middle, count, time);    /* [h][w][Z] */
    print_to(&t->drawn[F_CALLS], "%4d %9.5g %8.4f %8.4f %8.3f %8.3f\n", t->call, time, sqrt(at), sqrt(1 - at),
             rms(frame, count), t->adds);
    if (t->call % every == 0 || t->call + 1 == t->s.calls) {
        print_to(p, "<div>");
        put_figure(p, latent_colours(t->fit, t->input, t->h, t->w, t->z), NULL, text_of("call %d: given", t->call));
        put_figure(p, latent_colours(t->fit, frame, t->h, t->w, t->z), NULL, text_of("predicted"));
        print_to(p, "</div>\n");
    }
    free(frame);
}

/* A call's timestep t as waves [1][numbers]: cos(t f), then sin(t f), f from 1 down to 1/10000. Calls that are near in
 * time differ in the first of each half, early ones from late ones in the last. The last call draws all. */
static void draw_waves(tour *t, string *p, st_entry e)
{
    t->numbers = e.shape.dim[1];
    if (!t->waves)
        t->waves = allocate((size_t)(t->s.calls * t->numbers), sizeof *t->waves);
    memcpy(t->waves + t->waved * t->numbers, e.data, (size_t)t->numbers * sizeof *t->waves);
    if (++t->waved == t->s.calls)
        put_figure(p, map_of(t->waves, 1, t->numbers, t->waved, 1), NULL, text_of("a row a call, the first on top"));
}

/* The patch that is followed stands in the middle of its frame: its place there, row by row. */
static int64_t patch_place(const tour *t) { return t->gh / 2 * t->gw + t->gw / 2; }

/* The table F64 [gh][gw][head / 2][cos, sin]: cosines of some pairs, the first half of which turn with x and the others
 * with y; and what turning alone makes of q k for the patch.
 *
 * Formula   were all queries and keys the same, q k of places with angles a and b would be the mean over pairs of
 *           cos a cos b + sin a sin b = cos(a - b)
 *           which knows the distance of the two and not where they are: the point of this encoding
 * Source    Su et al., 2021, arXiv 2104.09864
 */
static void draw_rotary(tour *t, string *p, st_entry e)
{
    int64_t places = t->gh * t->gw, head = e.shape.dim[2], pairs = head / 4;    /* pairs: of one axis */
    const double *table = e.data, *here = table + patch_place(t) * head;
    real *turns = allocate((size_t)(places * head), sizeof *turns), *near = allocate((size_t)places, sizeof *near);
    for (int64_t i = 0; i < places * head; i++) {
        turns[i] = (real)table[i];
        near[i / head] += (real)(2 * table[i] * here[i % head] / (double)head);     /* the mean over pairs */
    }
    for (int64_t k = 0; k < 2 * pairs; k += (pairs + 2) / 3)        /* three of each axis, fast and slow */
        put_figure(p, map_of(turns + 2 * k, head, t->gw, t->gh, 1), NULL,
                   text_of("%c, pair %lld", "xy"[k / pairs], ll(k % pairs)));
    put_figure(p, map_of(near, 1, t->gw, t->gh, 1), t, text_of("near the patch"));
    free(turns);
    free(near);
}

/* What time adds. Called with the patch tokens [B][N][D] before the first block adds the table to them, then after it:
 * the difference is the table. All tokens of a frame get the same row, so that the frame's first one shows it. One
 * latent frame alone gets none: then there is no second call. */
static void draw_times(tour *t, string *p, st_entry e)
{
    const real *x = e.data;
    int64_t area = t->gh * t->gw, d = t->d;
    bool before = !t->times;
    if (before)
        t->times = allocate((size_t)(t->frames * d), sizeof *t->times);
    for (int64_t i = 0; i < t->frames * d; i++)
        t->times[i] = x[i / d * area * d + i % d] - t->times[i];    /* at first less nothing */
    if (!before)
        put_figure(p, map_of(t->times, 1, d, t->frames, 1), NULL, text_of("a row a latent frame"));
}

/* What the patch sees of n tokens with keys k [n][D]: [n], to be freed.
 *
 * Formula   mean over heads of softmax(q k / sqrt(head)); the shares of all tokens add up to 1
 * Method    the kernel (attention, tensor.c) never has such a row as a whole in memory, so that this one is computed
 *           once more. Queries and keys are normed and their products small: the largest is not taken off before exp,
 *           as the kernel does; the bounds only keep a strange model from an infinity.
 */
static real *shares_of(const tour *t, const real *k, int64_t n)
{
    int64_t d = t->d, head = dit_settings(t->j->dit)->attention_head_dim;
    real *out = allocate((size_t)n, sizeof *out);
    double *score = allocate((size_t)n, sizeof *score);
    for (int64_t from = 0; from < d; from += head) {
        double sum = 0;
        for (int64_t i = 0; i < n; i++) {
            double product = 0;
            for (int64_t c = from; c < from + head; c++)
                product += (double)t->query[c] * (double)k[i * d + c];
            sum += score[i] = exp_own(fmin(fmax(product / sqrt((double)head), -600), 600));
        }
        for (int64_t i = 0; i < n; i++)
            out[i] += (real)(score[i] / sum * (double)head / (double)d);    /* the mean over D / head heads */
    }
    free(score);
    return out;
}

/* Called twice a block, both times with [B][N][D]: with attn1.q, of which the patch's row is remembered, then with
 * attn1.k: a map for each latent frame. Colours go by the root of a share, since most shares are small. */
static void draw_attention(tour *t, string *p, st_entry e)
{
    int64_t area = t->gh * t->gw, n = e.shape.dim[1], patch = t->frames / 2 * area + patch_place(t);
    const real *row = (const real *)e.data + (t->rows - 1) * n * t->d;
    if (!strcmp(e.name, "attn1.q")) {
        t->query = row + patch * t->d;      /* the memory is attend's until its attn1.k was shown */
        return;
    }
    real *seen = shares_of(t, row, n);
    double most = extent(seen, 1, n);
    print_to(p, "<div><h3>Block %d <small>most: %.3g %%</small></h3>\n<div class=\"grid row\">\n", t->block,
             100 * most);
    for (int64_t f = 0; f < t->frames; f++) {
        double share = 0;
        for (int64_t i = f * area; i < (f + 1) * area; i++) {
            share += (double)seen[i];
            seen[i] = (real)sqrt((double)seen[i] / most);
        }
        put_figure(p, map_of(seen + f * area, 1, t->gw, t->gh, 1), f == t->frames / 2 ? t : NULL,
                   text_of("%.1f %%", 100 * share));
    }
    print_to(p, "</div></div>\n");
    free(seen);
}

/* The rows out [B][F][h][w][width] of the call where guidance adds most, so far: the middle frame as the negative and
 * the positive row mean it and as guidance makes it, and what it adds to the negative one.
 *
 * Formula   guided by g = neg + g (pos - neg): by 0 the negative row, by 1 the positive
 * Method    guide gives each as [F][h][w][Z]; row 3 becomes the guided one less the negative one, cfg (pos - neg). Its
 *           rms over all frames says which call is drawn: a later and stronger one takes the place of this.
 */
static void draw_rows(tour *t, string *p, st_entry e)
{
    static const char *const names[3] = { "negative", "positive", "guided" };
    const double by[4] = { 0, 1, t->j->cfg, t->j->cfg };
    int64_t area = t->h * t->w, z = t->z, count = t->frames * area * z, middle = t->frames / 2 * area * z;
    tensor out = tensor_of((real *)e.data, e.shape), row[4];
    real *all = allocate((size_t)(4 * count), sizeof *all), *added = all + 3 * count + middle;
    for (int k = 0; k < 4; k++) {
        row[k] = tensor_of(all + k * count, SHAPE(t->frames, t->h, t->w, z));
        guide(row[k], out, by[k]);
    }
    blend_to(row[3], row[3], row[0], 1, -1);    /* [F][h][w][Z] cfg (pos - neg) */
    t->adds = rms(row[3].data, count);
    if (t->adds > t->most) {    /* never where guidance is off: the rows are one */
        t->most = t->adds;
        p->length = 0;          /* forgets what was drawn */
        for (int k = 0; k < 3; k++) {
            real *frame = clean_frame(&t->s, t->input, row[k].data + middle, area * z, t->s.timesteps[t->call]);
            image seen = latent_colours(t->fit, frame, t->h, t->w, z);
            put_figure(p, seen, NULL, text_of("%s: by %.3g, call %d", names[k], by[k], t->call));
            free(frame);
        }
        for (int64_t i = 0; i < area; i++)      /* in place: a place's mean comes before its numbers */
            added[i] = (real)rms(added + i * z, z);
        double most = extent(added, 1, area);
        put_figure(p, map_of(added, 1, t->w, t->h, most), NULL, text_of("added, to %.3f", most));
    }
    free(all);
}

/* A sublayer's output [B][N][D], of which the size is told. A block's numbers stand in a row, in computing's order. */
static void draw_sublayer(tour *t, string *p, st_entry e)
{
    int64_t count = (int64_t)shape_count(e.shape) / t->rows;
    if (ends_with(e.name, ".attn1"))
        print_to(p, "%5d", t->block);       /* the first of the row */
    print_to(p, " %7.3f", rms((const real *)e.data + (t->rows - 1) * count, count));
}

/* The stream behind a block ends its row, with the skips as arcs, which lie in one another as brackets do: from each of
 * the first L/2 - 1 blocks to the one that is as far from the end, of 8 blocks 0 to 7, 1 to 6, 2 to 5. The two in the
 * middle have none: what block 3 leaves is what block 4 gets. */
static void draw_stream(tour *t, string *p, st_entry e)
{
    int64_t far = t->layers - 1 - t->block, arcs = t->layers / 2 - 1, depth = lesser(t->block, far);
    draw_sublayer(t, p, e);
    print_to(p, " ");
    for (int64_t i = 0; i < depth; i++)
        print_to(p, "&#9474;");     /* an arc on its way */
    print_to(p, "%s\n", depth == arcs ? "" : t->block < far ? "&#9582;" : "&#9583;");       /* its ends */
}

/* Called with what goes into a slice of the decoder (conv_in), then with what comes out (out), frames first. A slice
 * may see its neighbours' latent frames, too, which are cut off before frames grow: of 6 in three slices the middle one
 * sees all and makes the 8 frames of 2. All tiles make the same frames: the first one's slices are told. */
static void draw_slice(tour *t, string *p, st_entry e)
{
    int64_t count = e.shape.dim[0];
    if (t->made == t->length)
        return;
    if (strstr(e.name, "conv_in")) {
        print_to(p, "%5lld %20lld", ll(t->slices++), ll(count));
    } else {
        print_to(p, "   %lld to %lld\n", ll(t->made), ll(t->made + count - 1));
        t->made += count;
    }
}

/* The frames, made smaller by a whole number where the page would be too large, each with its place in the animation:
 * all play one round of T frames, of which frame i's begins i - T frames from now, so that each is seen in its turn. Of
 * each latent frame the one in its middle stands at section 6. This is no stage: --keep-colour comes after the last. */
static void draw_frames(tour *t, const film *v)
{
    string *p = &t->drawn[F_FRAMES];
    int64_t part = 1;
    while (v->w / part * (v->h / part) * v->frames > CLIP_PIXELS)
        part++;
    for (int64_t i = 0; i < v->frames; i++) {
        image small = image_resize((image){ v->w, v->h, frame_of(v, i) }, v->w / part, v->h / part);
        print_to(p, "<div style=\"animation-delay:%.4fs\">", (double)(i - v->frames) / 24);     /* < 0: begun */
        put_figure(p, small, NULL, text_of("frame %lld", ll(i)));
        print_to(p, "</div>\n");
    }
    for (int64_t f = 0; f < t->frames; f++) {
        image frame = { v->w, v->h, frame_of(v, (2 * f + 1) * v->frames / (2 * t->frames)) };       /* its middle */
        put_figure(&t->drawn[F_PATCH], image_resize(frame, v->w / part, v->h / part), f == t->frames / 2 ? t : NULL,
                   text_of("latent frame %lld", ll(f)));
    }
}

/* ---------------------------------------------------------------- commands: tour: what is looked at
 *
 * Stages, the first glob that matches: where their cost goes, who draws them into which figure, and in which calls. A
 * stage's cost is what came since the stage before it, so that every moment of the run is some section's. Most are
 * stages as --dump writes them; input, sinusoids, rotary and attn1's q and k are only shown (show, ruyi.h).
 */
typedef enum { EVERY_CALL, FIRST_CALL, CLOSE_CALL } tour_when;
static const struct {
    const char *glob; int section; tour_when when;              /* of names; S_...; for the drawer only */
    void (*draw)(tour *t, string *p, st_entry e); int figure;   /* NULL: the cost is all; F_... */
} watched[] = {
    { "pixels", S_PICTURE, EVERY_CALL, NULL, 0 },                       /* [T][H][W][3] resized and filled */
    { "mask", S_PICTURE, EVERY_CALL, draw_given, F_MASK },              /* [1][T][H][W] */
    { "mask_latents", S_LATENTS, EVERY_CALL, draw_channels, F_MASK_LATENTS },       /* [F][h][w][Z] */
    { "masked_latents", S_LATENTS, EVERY_CALL, draw_channels, F_PICTURE },          /* [F][h][w][Z] */
    { "clip.hidden", S_CLIP, EVERY_CALL, draw_clip, F_CLIP },           /* [patches][width] */
    { "clip.*", S_CLIP, EVERY_CALL, NULL, 0 },                          /* the tower's layers */
    { "input", S_GUIDANCE, EVERY_CALL, draw_step, F_STEPS },            /* before the first one: dit_conditions */
    { "sinusoids", S_POSITIONS, EVERY_CALL, draw_waves, F_WAVES },      /* [1][numbers] */
    { "*.temb", S_POSITIONS, EVERY_CALL, NULL, 0 },                     /* [B][D] two layers of them */
    { "rotary", S_POSITIONS, FIRST_CALL, draw_rotary, F_ROTARY },       /* [gh][gw][head] the same in every call */
    { "*.patch", S_POSITIONS, FIRST_CALL, draw_times, F_TIMES },        /* [B][N][D] tokens */
    { "*.block.00.time", S_POSITIONS, FIRST_CALL, draw_times, F_TIMES },/* [B][N][D] and the table's rows */
    { "*.time", S_POSITIONS, EVERY_CALL, NULL, 0 },
    { "*.norm1", S_ATTENTION, EVERY_CALL, NULL, 0 },
    { "attn1.[qk]", S_ATTENTION, CLOSE_CALL, draw_attention, F_ATTENTION },         /* [B][N][D] normed and turned */
    { "*.attn1", S_ATTENTION, CLOSE_CALL, draw_sublayer, F_BLOCKS },    /* [B][N][D] what attention adds */
    { "*.skip", S_BLOCKS, EVERY_CALL, NULL, 0 },                        /* [B][N][D] merged from [B][N][2 D] */
    { "*.block.*.*", S_BLOCKS, CLOSE_CALL, draw_sublayer, F_BLOCKS },   /* attn2, clip, ff */
    { "*.block.*", S_BLOCKS, CLOSE_CALL, draw_stream, F_BLOCKS },       /* [B][N][D] the stream behind the block */
    { "*.norm_out", S_GUIDANCE, EVERY_CALL, NULL, 0 },
    { "step.*.out", S_GUIDANCE, EVERY_CALL, draw_rows, F_ROWS },        /* [B][F][h][w][2 Z] */
    { "step.*.pred", S_GUIDANCE, EVERY_CALL, draw_step, F_STEPS },         /* [F][h][w][Z] guided */
    { "vae.dec.conv_in.*", S_DECODING, EVERY_CALL, draw_slice, F_SLICES },
    { "vae.dec.out.*", S_DECODING, EVERY_CALL, draw_slice, F_SLICES },
    { "[vdf]*", S_DECODING, EVERY_CALL, NULL, 0 },                      /* vae.*, decoded, video, frames */
    { "*", S_STEPS, EVERY_CALL, NULL, 0 },                              /* timesteps, noise, latents */
};

/* Time and operations since the last lap go to a section. What the page's own drawing takes is nobody's: a lap before
 * it and one behind it keep it apart. */
static void tour_lap(tour *t, const run *r, int section)
{
    double time = now(), done = 0;
    for (int k = 0; k < WORKS; k++)
        done += r->arena->work[k];
    t->seconds[section] += time - t->time;
    t->work[section] += done - t->done;
    t->time = time;
    t->done = done;
}

/* The hook. What is only shown has no call in its name: it is that of the stage before, for attn1.q its block's norm1.
 * The close call is the first from the middle of the run on whose blocks are computed: TeaCache may leave out some. The
 * last glob takes everything, so that the search ends. */
static void tour_look(const run *r, st_entry e)
{
    tour *t = r->hooks->looker;
    int i = 0;
    if (sscanf(e.name, "step.%d.block.%d", &t->call, &t->block) == 2 && t->close < 0 && t->call >= t->s.calls / 2)
        t->close = t->call;
    while (fnmatch(watched[i].glob, e.name, 0))
        i++;
    tour_lap(t, r, watched[i].section);
    if (watched[i].draw && (watched[i].when == EVERY_CALL || t->call == (watched[i].when == FIRST_CALL ? 0 : t->close)))
        watched[i].draw(t, &t->drawn[watched[i].figure], e);
    tour_lap(t, r, S_PAGE);
}

/* generate's flow, looked at. The colours of latents are fitted first, and in the plan, too: flows run twice, and what
 * the plan does not come by has no memory in the run. */
static result flow_tour(const run *r, const job *j)
{
    tour *t = j->hooks->looker;
    free(t->fit);
    t->fit = preview_fit(r, j);
    tour_lap(t, r, S_PAGE);
    result out = flow_generate(r, j);
    if (out.clip.rgb) {
        looks *list = look_at(&out.clip);
        t->mean = mean_looks(list, 0, out.clip.frames);
        draw_frames(t, &out.clip);
        free(list);
    }
    return out;
}

/* The tour of a job whose model is open: sizes, the scheduler's tables (the steps' memory, [1], is not used), and the
 * first lines of what is drawn as a table. */
static tour tour_of(const job *j)
{
    const vae_config *v = vae_settings(j->vae);
    const dit_config *c = dit_settings(j->dit);
    int64_t scale = vae_scale(v), unit = scale * c->patch_size, frames = latent_length(j);
    arena none = arena_plan();      /* sched_new wants one for what steps remember */
    tour t = {
        .j = j, .frames = frames, .h = j->height / scale, .w = j->width / scale, .z = v->latent_channels,
        .gh = j->height / unit, .gw = j->width / unit, .d = c->hidden_size, .layers = c->num_layers,
        .rows = 1 + (j->cfg > 1), .length = vae_video_frames(v, frames), .close = -1,
        .s = sched_new(&none, j->sched, j->steps, SHAPE(1)),
    };
    print_to(&t.drawn[F_CALLS], "call         t    alpha     beta    clean guidance\n");
    print_to(&t.drawn[F_BLOCKS], "block   attn1   attn2    clip      ff  stream skips\n");
    print_to(&t.drawn[F_SLICES], "slice   latent frames seen   frames made\n");
    return t;
}

/* ---------------------------------------------------------------- commands: tour: words
 *
 * All that the page says; a `name` in it stands for a number or a word of the run (put_named). Numbers in shapes are
 * this model's, in the letters of ruyi.h. Each section says two or three plain sentences that hold whatever the run: a
 * figure that it lacks, of a picture where none was given say, says so itself.
 *
 * No script and no address, so that the page is whole on any machine in ten years. Light and dark are the browser's own
 * colours (color-scheme), and greys and frames that suit both. Boxes flow into as many columns as a screen has room
 * for. The clip plays by style alone: every frame is visible for its share of a second's rounds, delayed by its place;
 * a browser that does not know :has() shows the frames side by side.
 */

/* Style, title, what was run; the sections' names follow it. Style is by tag where it can be: the classes are those of
 * boxes (grid, and how large its pictures are at least; table; wide) and the mark on a picture (pin). */
static const char page_head[] =
    "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<title>From a picture to a clip</title>\n"
    "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<style>\n"
    "html { color-scheme: light dark; -webkit-text-size-adjust: 100% } a { color: inherit } h2 { margin-top: 3rem }\n"
    "body { max-width: 46rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; font: 1.06rem/1.6 Charter, Georgia, serif }\n"
    "h1, h2, h3, nav, dl, label, figcaption { font-family: system-ui, sans-serif; line-height: 1.4 }\n"
    "h3, small, label, code { font-size: .82rem } dt, small, figcaption { font-weight: normal; opacity: .75 }\n"
    "pre, dl { padding: .9rem 1rem; border-radius: 6px; background: #8882; font-size: .86rem;\n"
    "  overflow-wrap: anywhere; white-space: pre-wrap } .table, .wide { font: min(.8rem, 2.7vw)/1.2 monospace }\n"
    "dl { display: grid; grid-template-columns: 4.5rem 1fr; gap: .3rem .8rem } dd, figure { margin: 0; min-width: 0 }\n"
    ".table { max-height: 22rem; overflow: auto; white-space: pre } img { display: block; width: 100%; height: auto }\n"
    "img { image-rendering: pixelated } .photo img { image-rendering: auto } figcaption { font-size: .72rem }\n"
    ".pin { position: relative; display: block } .pin b { position: absolute; outline: 1px solid #000;\n"
    "  box-shadow: 0 0 0 2px #fff } .large { --least: 10rem } .blocks { --least: 20rem } .row { --least: 2.9rem }\n"
    ".grid { display: grid; gap: .5rem;\n"                                  /* as many columns as there is room for */
    "  grid-template-columns: repeat(auto-fill, minmax(min(var(--least, 5rem), 100%), 1fr)) }\n"
    "section:has(:checked) .grid { display: block; position: relative; max-width: 24rem }\n"   /* one place, */
    "section:has(:checked) .grid div + div { position: absolute; top: 0; left: 0; right: 0 }\n"     /* for all */
    "section:has(:checked) .grid div { animation: play calc(`T`s / 24) infinite step-end }\n"       /* in turn */
    "@media (prefers-reduced-motion: reduce) { section:has(:checked) .grid div { animation: none } }\n"
    "@keyframes play { from { visibility: visible } `share`%, to { visibility: hidden } }\n"    /* of a round */
    "</style>\n</head>\n<body>\n<h1>From a picture to a clip</h1>\n"
    "<p>This page follows one run of Ruyi from the first pixel to the last of `T` frames of `W` &times; `H`, by a "
    "model of `L` blocks of width `D`, in `steps` steps of `scheduler`. Its pictures and numbers were taken while the "
    "run went on, and for each formula it names the functions, so that you can go on reading in the source. This was "
    "run:</p>\n<pre>`command`</pre>\n<nav><ol>\n";

/* In the order of the enum. A part is words and the figure that they speak of, in a box of that class. Formula, shapes
 * and functions stand below them: what one needs to find the place in the source, and to check it with compare. */
static const struct {
    const char *title, *source, *formula, *shapes;              /* formula, shapes NULL: none */
    struct { const char *text; int figure; const char *class; } parts[3];   /* up to text NULL; F_...; HTML's */
} sections[SECTIONS] = {
    { "The picture, and what is missing", "image_resize in io.c; fill_pixels, apply_mask in ruyi.c",
      "x = 2 byte/255 &minus; 1 where the mask is 0, &minus;1 where it is 1", "pixels and mask [`T`][`H`][`W`][3]", {
      { "The picture is brought to the clip's size. Beside it goes a mask: 0 in the frames that are given, 1 in those "
        "to be made, where the model is shown black. So to start from a picture, to end with one and to go on with a "
        "clip are one task: fill in what is missing.", F_GIVEN, "grid large photo" },
      { "The mask, a box a frame; those that are full are given.", F_MASK, "wide" } } },
    { "What CLIP sees", "clip_preprocess, clip_encode, resample in dit.c",
      "`clip layers` times: h &larr; h + attention(norm(h)), then h &larr; h + MLP(norm(h))",
      "[`side`][`side`][3] &rarr; tokens [`clip tokens`][`clip width`] &rarr; a resampler &rarr; [`Q`][`X`]", {
      { "A second network, of the kind that was trained to match pictures with captions, makes tokens of the middle of "
        "the first picture: numbers that say <em>what</em> is there. The model is shown them in the last 40 % of its "
        "calls only; large shapes and motion, which are settled before, follow the control words.",
        F_CLIP, "grid large" } } },
    { "From pixels to latents", "vae_encode in vae.c; sample_posterior, inpaint_latents in ruyi.c",
      "latent = (&mu; + exp(s/2) &epsilon;) &middot; scaling_factor; the encoder gives a mean &mu; and the logarithm s "
      "of a variance, &epsilon; is drawn",
      "mask, video: [`T`][`H`][`W`][3] &rarr; [`F`][`h`][`w`][2 &middot; `Z`] &rarr; [`F`][`h`][`w`][`Z`]", {
      { "The model never works on pixels: one half of the VAE, the encoder, makes of them `fewer` times fewer numbers, "
        "from which the other can still paint nearly the same video. These are the `Z` channels of the first latent "
        "frame, which holds the picture; they have no names. Red is above zero, blue below.", F_PICTURE, "grid" },
      { "The mask goes through the same encoder, as a video of zeros and ones.", F_MASK_LATENTS, "grid" } } },
    { "Noise, and how it goes", "denoise, sched_step, step_ddim and its like in ruyi.c; generator_randn in tensor.c",
      "x = &alpha; x0 + &beta; &epsilon; with &alpha;&sup2; + &beta;&sup2; = 1; the answer v means x0 = `clean`; the "
      "step of DDIM, the simplest: x&prime; = &alpha;&prime; x0 + &beta;&prime; &epsilon;",
      "noise, latents, prediction [`F`][`h`][`w`][`Z`]; `calls` calls in `steps` steps", {
      { "A clip begins as noise. The model has learned to tell clip from noise, so each call asks it what the clean "
        "clip would be, and the scheduler goes a small step towards the answer. Here is the middle latent frame as it "
        "was given, and the clean one that the answer means, in roughly its colours: large shapes are settled first, "
        "details last.", F_STEPS, "grid" },
      { "Every call: its timestep, the shares of signal &alpha; and noise &beta;, and as root mean squares the "
        "predicted clean frame (noise has 1) and what guidance adds to the answer (section 7).", F_CALLS, "table" } } },
    { "When and where: positions", "time_embedding, rotary_table, time_row, patch_tokens in dit.c",
      "cos(t f), sin(t f), f = 10000^(&minus;2i/`numbers`); a pair (a, b) becomes (a cos &minus; b sin, b cos + a sin)",
      "[`numbers`] &rarr; [`D`]; angles [`gh`][`gw`][`head`/2]; table [`F`][`D`]; tokens [`N`][`D`]", {
      { "To the blocks a clip is a heap of `N` tokens, so each is told where it is and when, and all are told how "
        "noisy the clip is, by one trick: a number becomes many waves, fast ones that tell neighbours apart and slow "
        "ones that tell far from near. Two layers make of the timestep's waves `D` numbers that shift what attention "
        "sees.", F_WAVES, "wide" },
      { "The place in a frame turns queries and keys, pair of numbers by pair, by angles that grow with x or with y: "
        "cosines of some pairs, of which slow ones hardly turn in a frame and stay red, and what turning alone "
        "would do for the marked patch if all tokens were alike.",
        F_ROTARY, "grid" },
      { "The latent frame: every block adds a row of this table to all tokens of a frame.", F_TIMES, "wide" } } },
    { "One patch looks around", "attend in dit.c; attention in tensor.c",
      "softmax(q &middot; k / &radic;`head`) v in each head; q and k are normed, and turned by their places",
      "q, k, v [`B` &middot; `N`][`heads` &middot; `head`]; `N` &middot; `N` products a head, never all in memory", {
      { "In attention every token asks all others a question, and gets a mixture of their answers, most from those "
        "that fit, from any place of any frame: that is how a thing keeps its looks while it moves. Take the patch in "
        "row `qy` and column `qx` of latent frame `middle`, all counted from 0; these are the frames that came of it "
        "and of the others.", F_PATCH, "grid photo" },
      { "Block by block, where it looks at call `close`: a map a latent frame, the mean of all heads, with the frame's "
        "share. Colours go by the root, so that faint looks show. Do the red places move as things do?",
        F_ATTENTION, "grid blocks" } } },
    { "What the negative row says", "dit_conditions, project_out in dit.c; guide in ruyi.c",
      "v = v_neg + cfg (v_pos &minus; v_neg)",
      "[`B`][`F`][`h`][`w`][`out`] &rarr; [`F`][`h`][`w`][`Z`]; a second row doubles sections 6 and 8 in cost", {
      { "The model knows no sentences: for every camera and motion it has a table of `text` tokens, here "
        "<code>`positive`</code>. With guidance above 1 each call is made for a second row, too, with "
        "<code>`negative`</code> and without the picture's tokens: what would come unasked. Guidance exaggerates the "
        "difference by cfg, where 0 is the negative row and 1 the positive. The middle frame at the call where it adds "
        "most, and where it does.", F_ROWS, "grid large" } } },
    { "The blocks, and what skips them", "block, merge_skip, run_blocks in dit.c",
      "h &larr; W norm([h, skip]) + b in blocks i &gt; `L/2`, with what block `L-1` &minus; i left",
      "stream [`B` &middot; `N`][`D`]; inside ff [`inner`]; `kept` skips", {
      { "Each block adds to the stream of tokens what a patch saw of the others (attn1), of the text (attn2) and of "
        "CLIP's tokens (clip), and what it makes of itself (ff); nothing is replaced, so that it need only learn what "
        "is missing. What leaves the first blocks skips to the last, along the arcs: those which settle details still "
        "see what the first ones saw. Root mean squares at call `close`:", F_BLOCKS, "table" } } },
    { "Back to pixels, slice by slice", "vae_decode in vae.c; smooth, decode_frames in ruyi.c",
      "byte = &lfloor;255 (x/2 + 1/2)&rfloor;", "[`F`][`h`][`w`][`Z`] / scaling_factor &rarr; [`T`][`H`][`W`][3]", {
      { "The VAE's other half, the decoder, paints a slice of a few latent frames at a time, since there a clip is at "
        "its largest. Slices that do not remember each other do not quite meet: their frames are coded once more, half "
        "a slice off, and averaged.", F_SLICES, "table" } } },
    { "The clip", "all sections", NULL, NULL, {
      { "These are the frames that <code>ruyi generate</code> makes with these options, smaller only if they are many; "
        "as <code>ruyi measure</code> sees them, camera: <strong>`camera`</strong> (asked for: `asked`). To go on, "
        "change one thing, the seed, the camera, <code>--cfg</code>, <code>--steps</code>, and lay the two pages side "
        "by side.<br><input type=\"checkbox\" id=\"play\" checked> <label for=\"play\">play</label>",
        F_FRAMES, "grid photo" } } },
};

/* ---------------------------------------------------------------- commands: tour: the page
 *
 * Figures are drawn by now; what is left is to put them between the words. The page grows in memory and is written in
 * one go, so that it is there as a whole or not at all.
 */

/* The command line, quoted as a shell wants it: a word with other letters than these stands between ', and a ' in it
 * as '\''. What is left means something to HTML, not to the shell. */
static void put_command(string *p, const job *j)
{
    static const char safe[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_=+./,:%@";
    for (int i = 0; i < j->nwords; i++) {
        const char *word = j->words[i], *quote = *word && !word[strspn(word, safe)] ? "" : "'";     /* '' is empty */
        print_to(p, "%s%s", i ? " " : "", quote);
        for (const char *c = word; *c; c++)
            print_html(p, *c == '\'' ? "'\\''" : (const char[]){ *c, 0 });
        print_to(p, "%s", quote);
    }
}

/* What stands for a name: here, and nowhere else, the words and the run meet. A name that is none stays, ` and all,
 * which tests/tour.sh finds. `share` is a frame's part of the animation in percent, rounded up: were it less, there
 * would be a gap between frames, and what is more is hidden by the next one. */
static void put_named(string *p, const tour *t, const char *name)
{
    const job *j = t->j;
    const clip_config *c = clip_settings(j->clip);
    const dit_config *d = dit_settings(j->dit);
    int64_t across = c->image_size / c->patch_size;     /* CLIP's patches */
    int64_t pixels = 3 * t->length * j->height * j->width, latents = t->frames * t->h * t->w * t->z;
    const struct { const char *name; int64_t value; } numbers[] = {
        /* the clip, its latents, its patches, and the one that is followed */
        { "T", t->length }, { "H", j->height }, { "W", j->width }, { "share", 100 / t->length + 1 }, { "F", t->frames },
        { "h", t->h }, { "w", t->w }, { "Z", t->z }, { "fewer", pixels / latents }, { "gh", t->gh }, { "gw", t->gw },
        { "N", t->frames * t->gh * t->gw }, { "middle", t->frames / 2 }, { "qy", t->gh / 2 }, { "qx", t->gw / 2 },
        /* the run */
        { "steps", j->steps }, { "calls", t->s.calls }, { "close", t->close }, { "B", t->rows },
        /* DiT and CLIP */
        { "L", t->layers }, { "L-1", t->layers - 1 }, { "L/2", t->layers / 2 }, { "kept", t->layers / 2 - 1 },
        { "D", t->d }, { "heads", d->num_attention_heads }, { "head", d->attention_head_dim }, { "inner", d->inner },
        { "numbers", t->numbers }, { "text", d->text_len + d->text_len_t5 }, { "X", d->cross_attention_dim },
        { "Q", d->n_query }, { "out", d->out_channels }, { "side", c->image_size }, { "clip width", c->hidden_size },
        { "clip tokens", across * across }, { "clip layers", c->num_hidden_layers },
    };
    const struct { const char *name, *word; } words[] = {
        { "scheduler", sched_names[j->scheduler] }, { "asked", j->camera },
        { "positive", j->rows[1].emb1.key }, { "negative", j->rows[0].emb1.key },   /* of embeddings.safetensors */
        { "camera", camera_word(t->mean.move[0], t->mean.move[1], j->width, j->height) },
        { "clean", (const char *const[]){ [EPSILON] = "(x &minus; &beta; v) / &alpha;", [SAMPLE] = "v",
            [V_PREDICTION] = "&alpha; x &minus; &beta; v" }[t->s.config.prediction_type] },
    };
    size_t before = p->length;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (!strcmp(numbers[i].name, name))
            print_to(p, "%lld", ll(numbers[i].value));
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (!strcmp(words[i].name, name))
            print_to(p, "%s", words[i].word);
    if (!strcmp(name, "command"))
        put_command(p, j);
    if (p->length == before)    /* no such name */
        print_to(p, "`%s`", name);
}

/* A text, of which every second part, between ` and `, is a name: "`T` frames of `W` &times; `H`" becomes "24 frames of
 * 128 &times; 128". The other parts are HTML, and stay as they are. */
static void put_words(string *p, const tour *t, const char *text)
{
    for (bool named = false; *text; named = !named) {
        size_t length = strcspn(text, "`");
        char *part = text_of("%.*s", (int)length, text);
        if (named)
            put_named(p, t, part);
        else
            print_to(p, "%s", part);
        free(part);
        text += length + (text[length] == '`');     /* not beyond the end */
    }
}

/* A section: words and figures, then what the reader may check. The cost is measured: what a <time> element holds is
 * all of a page that differs from run to run. */
static void put_section(string *p, const tour *t, int i)
{
    const char *const facts[][2] = {
        { "Formula", sections[i].formula }, { "Shapes", sections[i].shapes }, { "Source", sections[i].source },
    };
    print_to(p, "<section id=\"s%d\">\n<h2>%d. %s</h2>\n", i + 1, i + 1, sections[i].title);
    for (int k = 0; k < 3 && sections[i].parts[k].text; k++) {
        const string *drawn = &t->drawn[sections[i].parts[k].figure];       /* HTML already */
        print_to(p, "<p>");
        put_words(p, t, sections[i].parts[k].text);
        print_to(p, "</p>\n<div class=\"%s\">%s</div>\n", sections[i].parts[k].class,
                 drawn->length ? drawn->text : "<small>This run has none.</small>");
    }
    print_to(p, "<dl>");
    for (int k = 0; k < 3; k++)
        if (facts[k][1]) {
            print_to(p, "<dt>%s</dt><dd>", facts[k][0]);
            put_words(p, t, facts[k][1]);
            print_to(p, "</dd>");
        }
    print_to(p, "<dt>Cost</dt><dd>%.3g GFLOP, <time datetime=\"PT%.3fS\">%.3g s</time></dd></dl>\n</section>\n",
             t->work[i] / 1e9, t->seconds[i], t->seconds[i]);
}

/* ruyi tour: a generation, and its page instead of its frames. Whether the page can be written is asked before the
 * model is opened, like everything that can be asked early. The clip's cost is that of all sections. */
static void command_tour(job *j)
{
    const char *path = j->out;
    bool standard = strcmp(path, "-") == 0;
    NEED(standard || ends_with(path, ".html"), "--output: got %s, expected NAME.html, or - for standard output", path);
    if (!standard)
        output_check(path);
    j->hooks = &j->watch;
    tour *t = j->hooks->looker = allocate(1, sizeof *t);
    j->hooks->look = tour_look;
    j->out = NULL;              /* no frames are written */
    double start = now();
    open_generate(j);
    *t = tour_of(j);            /* sizes come from what is open */
    run_flow(j, flow_tour, fit_pictures);
    string p = { 0 };
    put_words(&p, t, page_head);
    for (int i = 0; i < SECTIONS; i++) {
        print_to(&p, "<li><a href=\"#s%d\">%s</a></li>\n", i + 1, sections[i].title);
        t->seconds[S_FRAMES] += i < S_FRAMES ? t->seconds[i] : 0;
        t->work[S_FRAMES] += i < S_FRAMES ? t->work[i] : 0;
    }
    print_to(&p, "</ol></nav>\n");
    for (int i = 0; i < SECTIONS; i++)
        put_section(&p, t, i);
    print_to(&p, "</body>\n</html>\n");
    double size = (double)p.length / 1e6;       /* text_write ends the text */
    text_write(&p, path);
    if (!j->quiet)
        fprintf(stderr, "%s: a page of %.1f MB, %.1f s\n", path, size, now() - start);
}

/* ---------------------------------------------------------------- commands: info
 *
 * Opens a model as a run would, so that whatever a run would refuse is refused here, and prints on standard output what
 * the configuration says, which of its fields nothing reads, the files, and the memory of a planned run. With -v every
 * tensor. What is printed is what was read, after defaults: a field that the JSON leaves out shows with its value, and
 * one that nothing here reads is named, since a model that depends on it would not be what it seems.
 */

/* Of every file its totals, after its tensors, where `list`. Megabytes are 10^6 bytes, as everywhere. */
static void print_weights(const weights *w, bool list)
{
    for (int i = 0; i < w->nfiles; i++) {
        const safetensors *f = w->files[i];
        uint64_t count = 0;
        for (const st_tensor *t = f->tensors; t < f->tensors + f->count; t++) {
            count += t->count;
            if (!list)
                continue;
            printf("  %-8s [", dtype_name[t->type]);
            for (int k = 0; k < t->ndim; k++)
                printf("%s%lld", k ? ", " : "", ll(t->dim[k]));
            printf("]  %s\n", t->name);
        }
        printf("  %s: %lld tensors, %.3f M parameters, %.1f MB\n", f->path, ll(f->count), (double)count / 1e6,
               (double)f->size / 1e6);
    }
}

/* What decides the VAE's results and its memory: the slices are those of the first of its modes that the configuration
 * switches on, and a mid block of one layer has no attention, whatever its type says.
 *
 *     channels    of the levels, ch * ch_mult: each but the last halves height and width
 *     slices      as many frames go through the encoder, and latent frames through the decoder, at a time
 */
static void info_vae(const job *j)
{
    static const char *const modes[] = { "cache_compression", "slice_compression", "slice_mag", "none" };
    const vae_config *c = vae_settings(j->vae);
    printf("vae: channels");
    for (int64_t i = 0; i < c->levels; i++)
        printf(" %lld", ll(c->channels[i]));
    bool attends = c->mid_block_use_attention && c->layers_per_block > 1;
    printf(", %lld layers a block, %lld norm groups%s, %lld latent channels, 1/%lld in space, slices %s of %lld frames "
           "/ %lld latent frames, mid attention %s, scaling_factor %g%s\n", ll(c->layers_per_block),
           ll(c->norm_num_groups), c->spatial_group_norm ? " per frame" : "", ll(c->latent_channels),
           ll(vae_scale(c)), modes[c->mode], ll(c->mini_batch_encoder), ll(c->mini_batch_decoder),
           attends ? attention_words[c->mid_block_attention_type] : "none", c->scaling_factor,
           c->tile_encoder || c->tile_decoder ? ", tiles" : "");
    config_print_unread(c->file);
    print_weights(vae_weights(j->vae), j->verbose);
}

/* All other parts of a model, in the order of a call. The transformer: learn_sigma doubles the channels out; a third of
 * the channels in are the latents, the rest is given (inpaint_latents). Two files configure the image tower:
 * config.json its layers, preprocessor_config.json what becomes of a picture before. The schedule is what the
 * --scheduler's class makes of its file: defaults differ between classes. At last, what a generation of this size and
 * length would need. Mapped weights are the file cache's: they are read from disk and may be dropped again, so a
 * machine with less memory is slow rather than unable. */
static void info_model(const job *j)
{
    const dit_config *d = dit_settings(j->dit);
    const clip_config *c = clip_settings(j->clip);
    const sched_config *s = &j->sched;
    printf("transformer: D %lld = %lld heads x %lld, %lld blocks, MLP %lld, patch %lld, %lld channels in, %lld out, "
           "text %lld + %lld tokens of %lld (T5 %lld), %lld image queries\n",
           ll(d->hidden_size), ll(d->num_attention_heads), ll(d->attention_head_dim), ll(d->num_layers), ll(d->inner),
           ll(d->patch_size), ll(d->in_channels), ll(d->out_channels), ll(d->text_len), ll(d->text_len_t5),
           ll(d->cross_attention_dim), ll(d->cross_attention_dim_t5), ll(d->n_query));
    config_print_unread(d->file);
    print_weights(dit_weights(j->dit), j->verbose);
    info_vae(j);
    printf("image_encoder: %lld x %lld pixels in patches of %lld, width %lld, %lld layers, %lld heads, MLP %lld, %s\n",
           ll(c->image_size), ll(c->image_size), ll(c->patch_size), ll(c->hidden_size), ll(c->num_hidden_layers),
           ll(c->num_attention_heads), ll(c->intermediate_size), c->hidden_act == QUICK_GELU ? "quick_gelu" : "gelu");
    config_print_unread(c->file);
    config_print_unread(c->preprocessor);
    print_weights(clip_weights(j->clip), j->verbose);
    printf("scheduler: %s, %lld timesteps, betas %s %g to %g, %s, %s spacing, offset %lld\n", sched_names[s->type],
           ll(s->num_train_timesteps), s->trained_betas ? "trained" : s->beta_schedule, s->beta_start, s->beta_end,
           predictions[s->prediction_type], spacings[s->timestep_spacing], ll(s->steps_offset));
    config_print_unread(s->file);
    printf("embeddings:\n");
    print_weights(j->embeddings, j->verbose);
    run_plan p = plan(j, flow_generate);
    calibrate(j, &p);
    p.disk = 1.5 * (double)(p.out.clip.frames * p.out.clip.w * p.out.clip.h);   /* as Y4M */
    print_plan(stdout, j, &p);
}

/* A black picture stands for the one that a run would have, where there is none: what a run costs depends on whether
 * there is a picture, not on what is in it. */
static void give_blank(job *j)
{
    if (j->starts)
        return;
    j->blank = true;
    j->starts = 1;
    j->start[0] = (image){ 512, 512, allocate(3 * 512 * 512, 1) };
}

/* --check: every number of every component that is open, and every row that --camera and --motion can ask for: those
 * are bound when they are asked for, so that asking for all of them finds the misshapen. Returns how many tensors are
 * at fault; each has told its line. */
static int64_t check_weights(const job *j)
{
    const weights *all[4];
    int64_t found = 0;
    for (int i = 0; j->embeddings && i < CAMERAS * MOTIONS; i++)
        positive_row(j, cameras[i / MOTIONS], motions[i % MOTIONS]);
    for (int i = 0, n = opened(j, all); i < n; i++)
        for (int f = 0; f < all[i]->nfiles + all[i]->nloras; f++)
            found += safetensors_nonfinite(weights_file(all[i], f));
    return found;
}

/* ruyi info: a file, a whole model, or a folder with a VAE alone, as it is studied by encode and decode. A whole model
 * is opened as for a run, without that one's lines on standard error. */
static void command_info(job *j)
{
    j->model = j->nfiles ? j->files[0] : j->model;
    require(j->model, "info", "a model folder or a .safetensors file");
    safetensors *file = ends_with(j->model, ".safetensors") ? safetensors_open(j->model) : NULL;
    bool whole = !file && file_exists(inside(j, "model_index.json"));
    NEED(file || whole || file_exists(inside(j, "vae")), "%s: got neither a .safetensors file nor a folder with "
         "model_index.json or vae/; give a model folder", j->model);
    j->quiet = true;
    if (file) {
        print_weights(&(weights){ .files = &file, .nfiles = 1 }, true);
    } else if (whole) {
        give_blank(j);
        open_generate(j);
        info_model(j);
    } else {
        open_vae(j, true, true);
        info_vae(j);
    }
    if (j->check && (file ? safetensors_nonfinite(file) : check_weights(j)) > 0)
        j->code = BAD_INPUT;
    else if (j->check)
        printf("every number is finite\n");
    if (file)
        safetensors_close(file);
}

/* ---------------------------------------------------------------- commands: compare, check
 *
 * compare judges two sets of tensors, wherever they come from (io.c). check makes one of them: a case is a folder with
 * a command line (args, its paths relative to the folder) and what the run's stages should be (expected.safetensors).
 * Running it with --check judges every stage for itself: it is computed from the case's own inputs, so that the first
 * stage that differs is the one at fault. Each case has a process of its own, since a run keeps what it has opened
 * until it ends.
 */

/* ruyi compare GOLDEN[:GLOB] MINE: all of it is io.c's. */
static void command_compare(job *j)
{
    j->code = compare(j->files[0], j->files[1], j->class, j->verbose, j->json);
}

static int run_program(job *j, int argc, char **argv);

/* Runs one case, in this process, from its folder. A golden case's args, in one line:
 *
 *     generate -m ../../models/tiny-a -i ../../pictures/100x75-01.ppm --frames 24 --size 64x48 --steps 5 --cfg 7 ...
 *
 * Words are separated by blanks, and none holds one. What check was given goes behind them: later options win. */
static int check_case(const job *j, const char *folder)
{
    static job one;         /* static like main's, which stays as it is */
    char line[4096] = "", *argv[128] = { (char *)"ruyi" };
    int argc = 1;
    FILE *f = chdir(folder) == 0 ? fopen("args", "r") : NULL;
    NEED(f && fgets(line, sizeof line - 256, f), "%s: got no case there, expected a folder with "
         "args and expected.safetensors; for another run give its command line with --check", folder);
    fclose(f);
    snprintf(line + strlen(line), 256, " -q --check expected.safetensors%s%s%s%s", j->verbose ? " -v" : "",
             j->json ? " --json" : "", j->class ? " --class " : "", j->class ? j->class : "");
    for (char *word = strtok(line, " \n"); word && argc < 128; word = strtok(NULL, " \n"))
        argv[argc++] = word;
    return run_program(&one, argc, argv);
}

/* ruyi check CASE ...: the worst exit code of all. What is printed is flushed before the fork, or both processes would
 * print it. A child that was killed has no exit code: that is the system's. */
static void command_check(job *j)
{
    int failed = 0;
    for (int i = 0; i < j->nfiles; i++) {
        if (!j->json)
            printf("%s: ", j->files[i]);
        fflush(stdout);
        pid_t child = fork();
        MUST(child >= 0, "check: a new process: %s", strerror(errno));
        if (child == 0)
            exit(check_case(j, j->files[i]));
        int status;
        int code = waitpid(child, &status, 0) == child && WIFEXITED(status) ? WEXITSTATUS(status) : SYSTEM_ERROR;
        failed += code != DONE;
        j->code = code > j->code ? code : j->code;
    }
    if (!j->json && j->nfiles > 1)
        printf("%d passed, %d failed\n", j->nfiles - failed, failed);
}

/* ---------------------------------------------------------------- commands: bench
 *
 * A case is its name: a kind below, and numbers after it. One line each on standard output: name, median, minimum,
 * maximum in seconds, and GFLOP as the kernels count them (a multiply and an add are 2):
 *
 *     generate.tiny   5.5080  5.4938  5.5646  317.7
 *
 * Fields are separated by tabs, for awk and cut. GFLOP over seconds is the rate, and that over the rate of `peak`,
 * which moves no data at all, is how much of the machine a kernel uses. The minimum is what the machine can do, the
 * median what it does; a maximum far from both says that somebody else was using it.
 */
typedef struct {
    arena a;
    int64_t n[4];               /* the numbers in the name */
    workload load;
    void *block;                /* what vae.c or dit.c set up */
    job *job;
} bench;

static void open_linear(bench *b) { b->load = workload_new(&b->a, LINEAR, F32, b->n); }
static void open_bf16(bench *b) { b->load = workload_new(&b->a, LINEAR, BF16, b->n); }
static void open_attention(bench *b) { b->load = workload_new(&b->a, ATTENTION, F32, b->n); }
static void open_conv(bench *b) { b->load = workload_new(&b->a, CONV, F32, b->n); }
static void open_resblock(bench *b) { b->block = bench_resblock_new(&b->a, b->n[0], b->n[1], b->n[2], b->n[3]); }
static void open_block(bench *b) { b->block = bench_block_new(&b->a, b->n[0]); }

static void run_kernel(bench *b) { workload_run(&b->a, &b->load); }
static void run_resblock(bench *b) { bench_resblock(b->block); }
static void run_block(bench *b) { bench_block(b->block); }
static void run_peak(bench *b) { b->a.work[LINEAR] += burn_peak(&b->a); }

/* The embedded model, one second of 128 x 128 from a black picture, in an arena of its own size. */
static void open_tiny(bench *b)
{
    job *j = b->job;
    j->model = j->model ? j->model : "weights/ruyi-tiny";
    j->width = j->height = 128;
    j->frames = 24;
    j->quiet = true;
    give_blank(j);
    open_generate(j);
    fit_pictures(j);
    arena_free(&b->a);
    b->a = arena_new(plan(j, flow_generate).bytes);
}

/* Kernels leave their arena as they found it; a generation is reset by hand, since caches grow from the high end, which
 * nobody resets who runs once. */
static void run_generate(bench *b)
{
    run r = run_of(b->job, &b->a);
    flow_generate(&r, b->job);
    arena_reset(&b->a, 0);
    arena_reset_high(&b->a, 0);
}

/* What there is to time: how many numbers a name has, separated by x or a point, what the first is a multiple of, what
 * is done once, and what is timed. */
static const struct { const char *name; int numbers, unit; void (*begin)(bench *), (*run)(bench *); } bench_kinds[] = {
    { "linear", 3, 1, open_linear, run_kernel },                /* MxNxK, weights of F32 */
    { "linear_bf16", 3, 1, open_bf16, run_kernel },
    { "attention", 4, 1, open_attention, run_kernel },          /* HEADSxQUERIESxKEYSxWIDTH */
    { "conv3d", 4, 1, open_conv, run_kernel },                  /* C.TxHxW: causal 3 x 3 x 3, C to C channels */
    { "resblock", 4, 32, open_resblock, run_resblock },         /* C.TxHxW, in 32 norm groups */
    { "dit_block", 1, 1, open_block, run_block },               /* N tokens, the published size, one guidance row */
    { "peak", 0, 1, NULL, run_peak },                   /* multiply-adds in registers: the machine */
    { "generate.tiny", 0, 1, open_tiny, run_generate },
};

/* The kind whose form a name has; reads its numbers into n. Dies where it has none. A kind's name may begin another's
 * (linear, linear_bf16); what follows then is no number. */
static int bench_kind(const char *name, int64_t n[4])
{
    for (int i = 0; i < (int)(sizeof bench_kinds / sizeof *bench_kinds); i++) {
        size_t length = strlen(bench_kinds[i].name);
        if (strncmp(name, bench_kinds[i].name, length))
            continue;
        int found = sscanf(name + length, ".%" SCNd64 "%*1[.x]%" SCNd64 "%*1[.x]%" SCNd64 "%*1[.x]%" SCNd64,
                           n, n + 1, n + 2, n + 3);
        if ((name[length] ? found : 0) == bench_kinds[i].numbers && n[0] % bench_kinds[i].unit == 0)
            return i;
    }
    die(BAD_INPUT, "bench: got %s, expected a case like linear.1536x2816x2816; ruyi bench alone runs them all", name);
}

/* The cases named, or all. The sizes are those of the published model: D 2816, inner 12288, 1536 tokens are one frame's
 * latents of 512 x 768 in patches of 2, 333 = 77 + 256 text tokens; the VAE's levels of 128, 256 and 512 channels.
 *
 * Each runs once to warm up, then five times: the first call touches memory that the system has not given yet. A
 * gigabyte holds the largest kernel. What a call has done is the difference of the arena's counts. */
static void command_bench(job *j)
{
    enum { ROUNDS = 5 };
    static const double one[WORKS] = { 1, 1, 1 };
    static const char *const all[] = {
        "peak", "linear.1536x2816x2816", "linear_bf16.1536x2816x2816", "linear.1536x12288x2816",
        "linear.1536x2816x12288", "linear.333x2816x1024", "attention.32x1536x1536x88", "attention.8x3456x3456x88",
        "conv3d.128.4x96x96", "conv3d.256.4x48x48", "conv3d.512.2x24x24", "resblock.128.8x128x128", "dit_block.1536",
        "generate.tiny",
    };
    int count = j->nfiles ? j->nfiles : (int)(sizeof all / sizeof *all);
    for (const char *const *name = j->nfiles ? j->files : all; count > 0; count--, name++) {
        bench b = { .a = arena_new((size_t)1 << 30), .job = j };
        int kind = bench_kind(*name, b.n);
        double times[ROUNDS], work = 0;
        if (bench_kinds[kind].begin)
            bench_kinds[kind].begin(&b);
        bench_kinds[kind].run(&b);
        for (int i = 0; i < ROUNDS; i++) {
            double start = now(), before = work_seconds(one, b.a.work);
            bench_kinds[kind].run(&b);
            times[i] = now() - start;
            work = work_seconds(one, b.a.work) - before;
        }
        qsort(times, ROUNDS, sizeof *times, by_size);
        printf("%s\t%.4f\t%.4f\t%.4f\t%.1f\n", *name, times[ROUNDS / 2], times[0], times[ROUNDS - 1], work / 1e9);
        fflush(stdout);
        arena_free(&b.a);
    }
}

/* ---------------------------------------------------------------- options: values
 *
 * An option's row in the table below says who reads its value, and into which field of the job. Every reader takes that
 * row and the text, and stores a value within its limits or dies with name, got and expected. strtoull and strtod alone
 * take more than is written here (white space, hexadecimal, inf), hence strspn.
 *
 *     --size              WIDTHxHEIGHT                            128x96
 *     --teacache          THRESHOLD[,START,END]                   0.1,3,1
 *     --enhance-a-video   WEIGHT[,START,END]                      1,0,0
 *     --fp8               lite|strong|extreme[:e4m3|e5m2]         lite:e5m2
 *     --rng               cpu|cuda:SMSxTHREADS[:f32|bf16]         cuda:128x1536:f32
 *     --vae-tiling        none|encoder|decoder|both[,SIZE[,OVERLAP]]      both,256,0.25
 *     --lora              FILE[:WEIGHT]                           style.safetensors:0.8
 *     --image, --end      FILE[:FRAMES]                           clip.y4m:-5..
 *     --key               FRAMES                                  8..12
 */

typedef struct option {
    const char *name;
    char letter;                /* of the short form; 0: none */
    const char *value;          /* what --help calls it; NULL: a flag */
    unsigned commands;          /* a bit for each that takes it */
    void (*take)(job *j, const struct option *o, const char *text);    /* the value into the job */
    size_t at;                  /* offset of what it sets in the job */
    const char *help;           /* %s: the words */
    const char *initial;        /* the value without the option; NULL: zero */
    double least, most;         /* limits of a whole number */
    const char *const *words; size_t count;     /* the value is one of these */
} option;

static void *field(job *j, const option *o) { return (char *)j + o->at; }
static void read_text(job *j, const option *o, const char *text) { *(const char **)field(j, o) = text; }
static void read_flag(job *j, const option *o, const char *text) { *(bool *)field(j, o) = text != NULL; }

#define DECIMAL "+-.0123456789eE"

/* The number that a text of these letters is; NAN: it is none. A point is the separator in every locale, since main
 * sets none. A double holds every whole number that an option may be but the seed. */
static double parse_number(const char *text, const char *letters)
{
    char *end;
    double x = strtod(text, &end);
    return strspn(text, letters) == strlen(text) && end > text && !*end ? x : NAN;
}

/* Digits with a sign, nothing else, from `least` to `most`, which no NAN is. */
static int64_t whole_of(const option *o, const char *text, double least, double most)
{
    double x = parse_number(text, "-0123456789");
    NEED(x >= least && x <= most, "--%s: got %s, expected a whole number from %.0f to %.0f", o->name, text, least,
         most);
    return (int64_t)x;
}

/* A million is far beyond what any option is for, and float32 overflows in the middle of a run when it is much more. */
static double decimal_of(const option *o, const char *text)
{
    double x = parse_number(text, DECIMAL);
    NEED(fabs(x) <= 1e6, "--%s: got %s, expected a number from -1e6 to 1e6", o->name, text);
    return x;
}

static void read_real(job *j, const option *o, const char *text) { *(double *)field(j, o) = decimal_of(o, text); }

static void read_whole(job *j, const option *o, const char *text)
{
    *(int64_t *)field(j, o) = whole_of(o, text, o->least, o->most);
}

/* The words with a blank between them, to be freed; NULL of none. For --help and for messages. */
static char *list_words(const char *const *words, size_t count)
{
    string list = { 0 };
    for (size_t i = 0; i < count; i++)
        print_to(&list, "%s%s", i ? " " : "", words[i]);
    return list.text;
}

/* The place of a word in a list; dies with the nearest one, and all of them. */
static int choice(const option *o, const char *text, const char *const *words, size_t count)
{
    int place = place_of(text, words, (int)count);
    NEED(place >= 0, "--%s: got %s; did you mean %s? (%s)", o->name, text, nearest_word(text, words, (int)count),
         list_words(words, count));
    return place;
}

/* The scheduler is kept as its place, a camera and a motion as words: the key of their control row is made of them. */
static int word_of(const option *o, const char *text) { return choice(o, text, o->words, o->count); }
static void read_scheduler(job *j, const option *o, const char *text) { j->scheduler = (sched_type)word_of(o, text); }

static void read_word(job *j, const option *o, const char *s) { *(const char **)field(j, o) = o->words[word_of(o, s)]; }

/* All 64 bits count, though the generator is seeded with the low 32, as torch's is: on a GPU they are the key. strtoull
 * takes a sign and turns it round; digits alone are let through. */
static void read_seed(job *j, const option *o, const char *text)
{
    char *end;
    errno = 0;
    j->seed = strtoull(text, &end, 10);
    NEED(strspn(text, "0123456789") == strlen(text) && end > text && !errno, "--%s: got %s, expected a whole number "
         "from 0 to 18446744073709551615", o->name, text);
}

static const char *const fp8_types[] = { "e4m3", "e5m2" }, *const rng_types[] = { "f32", "bf16" };
static const char *const tiling_words[] = { "none", "encoder", "decoder", "both" };

/* A value of several parts. 31 letters are more than any number or word that a part may be; what is longer is refused
 * with the form that the help shows. */
typedef struct { int count; char part[4][32]; } parts;

/* Each of `marks` that is found, in this order, ends a part: "cuda:128x1536" by ":x:" is cuda, 128 and 1536. A later
 * mark is not looked for where an earlier one is missing. */
static parts take_apart(const option *o, const char *text, const char *marks)
{
    parts p = { 0 };
    for (const char *found = text; found; text = found + 1) {
        found = *marks ? strchr(text, *marks++) : NULL;
        size_t length = found ? (size_t)(found - text) : strlen(text);
        NEED(length < sizeof *p.part, "--%s: got %s, expected %s", o->name, text, o->value);
        memcpy(p.part[p.count++], text, length);
    }
    return p;
}

/* WIDTHxHEIGHT in pixels, as pictures are called; the public code's video_size is [height, width]. Sides of 16 pixels
 * are one patch of the published model; check_model asks for more where a model's patches are larger. */
static void read_size(job *j, const option *o, const char *text)
{
    parts p = take_apart(o, text, "x");
    NEED(p.count == 2, "--%s: got %s, expected WIDTHxHEIGHT", o->name, text);
    j->width = whole_of(o, p.part[0], 16, 65536);
    j->height = whole_of(o, p.part[1], 16, 65536);
    NEED(j->width % 16 == 0 && j->height % 16 == 0, "--%s: got %s, expected multiples of 16", o->name, text);
}

/* X[,START,END] of --teacache or --enhance-a-video: a threshold or weight, and how many first and last calls are left
 * out; negative counts are 0, as the public code takes them. Without them the initial values of the job hold. */
static void read_calls(job *j, const option *o, const char *text)
{
    bool tea = o->at == offsetof(job, tea_threshold);
    int64_t *counts[] = { tea ? &j->tea_start : &j->enhance_start, tea ? &j->tea_end : &j->enhance_end };
    parts p = take_apart(o, text, ",,");
    NEED(p.count != 2, "--%s: got %s, expected one number or three: X,START,END", o->name, text);
    *(double *)field(j, o) = decimal_of(o, p.part[0]);
    for (int i = 0; i < p.count - 1; i++)
        *counts[i] = within(whole_of(o, p.part[i + 1], INT_MIN, INT_MAX), INT_MAX);
    j->enhance |= !tea;
}

/* MODE[:TYPE]: e4m3 has three bits of fraction and reaches 448, e5m2 two and reaches 57344. */
static void read_fp8(job *j, const option *o, const char *text)
{
    parts p = take_apart(o, text, ":");
    j->fp8 = (fp8_mode)(FP8_LITE + word_of(o, p.part[0]));
    j->fp8_type = p.count > 1 && choice(o, p.part[1], fp8_types, 2) ? F8_E5M2 : F8_E4M3;
}

/* cpu or cuda:SMSxTHREADS[:f32|bf16]. On a GPU torch hands every thread its own share of the numbers, so that they
 * depend on how many threads there are: multiprocessors times what one of them holds. In bf16, a pipeline's usual type,
 * every number is rounded. */
static void read_rng(job *j, const option *o, const char *text)
{
    parts p = take_apart(o, text, ":x:");
    j->rng = (rng){ 0 };
    if (!strcmp(text, "cpu"))
        return;
    NEED(!strcmp(p.part[0], "cuda") && p.count >= 3, "--%s: got %s, expected cpu or cuda:SMSxTHREADS[:f32|bf16], such "
         "as cuda:128x1536", o->name, text);
    j->rng.sms = (int32_t)whole_of(o, p.part[1], 1, 65535);
    j->rng.threads = (int32_t)whole_of(o, p.part[2], 256, 65535);
    j->rng.bf16 = p.count < 4 || choice(o, p.part[3], rng_types, 2);
}

/* WHERE[,SIZE[,OVERLAP]]: the words are bits, 1 for the encoder and 2 for the decoder. What is left out is the model's,
 * in vae_tiling's terms a size of 0 and an overlap below 0. */
static void read_tiling(job *j, const option *o, const char *text)
{
    parts p = take_apart(o, text, ",,");
    int where = word_of(o, p.part[0]);
    j->tiling = (vae_tiling){ .given = true, .encoder = where & 1, .decoder = where & 2, .overlap = -1 };
    if (p.count > 1)
        j->tiling.size = whole_of(o, p.part[1], 1, 1 << 20);
    if (p.count > 2)
        j->tiling.overlap = decimal_of(o, p.part[2]);
    NEED(p.count < 3 || (j->tiling.overlap >= 0 && j->tiling.overlap < 1), "--%s: got an overlap of %s, expected 0 to "
         "less than 1", o->name, p.part[2]);
}

/* FRAMES, as after the name of a clip. Which they are is known when the clip is: a place from the end is kept negative.
 */
static void read_key(job *j, const option *o, const char *text)
{
    j->key = frames_parse(text, &j->key_first, &j->key_last);
    NEED(j->key, "--%s: got %s, expected frames as in -5.., 8..12 or 7", o->name, text);
}

/* The next place in the list of a repeatable option, which holds `most`; dies where it is full. A list that cut off
 * silently would be a run with other options than those that were given. */
static int next_place(const option *o, int *count, int most)
{
    NEED(*count < most, "--%s: got more, expected at most %d; give fewer", o->name, most);
    return (*count)++;
}

/* FILE[:WEIGHT]. A colon with no number after it belongs to the file's name. Opened here, so that a wrong name is told
 * before the model is looked at; several are added in their order. */
static void read_lora(job *j, const option *o, const char *text)
{
    const char *colon = strrchr(text, ':');
    bool weighted = colon && !isnan(parse_number(colon + 1, DECIMAL));
    char *path = text_of("%.*s", weighted ? (int)(colon - text) : INT_MAX, text);
    int place = next_place(o, &j->nloras, MAX_FILES);
    j->lora_scales[place] = weighted ? decimal_of(o, colon + 1) : 1;
    j->loras[place] = safetensors_open(path);
    free(path);
}

/* All pictures that a name stands for, after those before them: a PPM may hold several, a pipe any number. encode takes
 * a picture a frame; clip and measure look at one. Standard input can be read once only. */
static void read_pictures(job *j, const option *o, const char *name)
{
    bool standard = name[0] == '-' && (!name[1] || name[1] == ':'), end = o->at == offsetof(job, end);
    int most = j->command == ENCODE ? MAX_PICTURES : j->command == CLIP || j->command == MEASURE ? 1 : MAX_GIVEN;
    int *count = end ? &j->ends : &j->starts;
    image *list = NULL;
    NEED(!standard || !j->stdin_read, "--%s: got - twice, expected once; put all pictures into one stream", o->name);
    int place = next_place(o, count, most);
    j->stdin_read |= standard;
    int64_t found = images_read(name, most - place, &list, 0);
    memcpy((end ? j->end : j->start) + place, list, (size_t)found * sizeof *list);
    *count = place + (int)found;
    free(list);
}

static void read_filter(job *j, const option *o, const char *text)
{
    j->filters[next_place(o, &j->watch.nfilters, (int)(sizeof j->filters / sizeof *j->filters))] = text;
}

/* Opened in the order of the command line: of several that have a stage the last counts. */
static void read_injection(job *j, const option *o, const char *text)
{
    j->injections[next_place(o, &j->watch.ngiven, MAX_FILES)] = pack_open(text);
}

/* info looks at all weights of a model, whose folder is the value; a run is judged by what its stages should be. */
static void read_check(job *j, const option *o, const char *text)
{
    j->check = j->command == INFO;
    if (j->check)
        read_text(j, o, text);
    else
        j->watch.truth = pack_open(text);
}

/* ---------------------------------------------------------------- options: the tables
 *
 * One row says all of a command, and one all of an option: parsing, limits, --help, spelling advice and a run's
 * identity come from them. An option's row reads:
 *
 *     name, letter (0: none), what --help calls the value (NULL: a flag), the commands that take it,
 *     SET(reader, field of the job), help, the value without the option, limits or words
 *
 * A new option is a field of the job and a row here, and whatever looks at the field.
 */

/* In the order of `command`; --help and --version, its last two, are options. least, most: words beside the options,
 * which the command gets as they are: clips, cases, a model's folder. */
static const struct {
    const char *name; void (*run)(job *); int least, most; const char *usage, *help;
} command_rows[] = {
    { "generate", command_generate, 0, 0, "-m MODEL -i START.ppm [-e END.ppm] -o OUT", "animate" },
    { "extend", command_extend, 1, INT_MAX, "CLIP -m MODEL -o OUT [--times N]", "go on with a clip" },
    { "measure", command_measure, 1, INT_MAX, "CLIP [--start A.ppm] [--end B.ppm] [--json]",
      "camera, motion, colours in numbers" },
    { "encode", command_encode, 0, 0, "-m MODEL -i FRAME.ppm ... -o LATENTS.safetensors", "pictures to latents" },
    { "decode", command_decode, 0, 0, "-m MODEL -l LATENTS.safetensors -o OUT", "latents to frames" },
    { "clip", command_clip, 0, 0, "-m MODEL -i PICTURE.ppm -o TOKENS.safetensors", "what the image tower sees" },
    { "tour", command_tour, 0, 0, "-m MODEL -i PICTURE.ppm -o PAGE.html", "a run explained, in pictures and numbers" },
    { "info", command_info, 0, 1, "MODEL | FILE.safetensors", "what is in it, what a run needs" },
    { "compare", command_compare, 2, 2, "GOLDEN[:GLOB] MINE", "tensor by tensor: files or folders" },
    { "check", command_check, 1, INT_MAX, "CASE ...", "stage by stage, each from the case's inputs" },
    { "bench", command_bench, 0, INT_MAX, "[CASE ...]", "time of the kernels on this machine" },
};
enum { COMMANDS = sizeof command_rows / sizeof *command_rows };

/* Sets of commands: an option of any other command is a mistake, and told, never ignored. extend takes a clip where
 * generate takes start pictures and a size. */
#define FOR(command) (1u << (command))
#define RUNS (FOR(GENERATE) | FOR(ENCODE) | FOR(DECODE) | FOR(CLIP))
#define PICTURES (RUNS | FOR(TOUR) | FOR(INFO) | FOR(BENCH))
#define MODELS (PICTURES | FOR(EXTEND))
#define WRITES (RUNS | FOR(EXTEND) | FOR(TOUR))
#define JUDGES (FOR(COMPARE) | FOR(CHECK))              /* check hands its options on to the run that it judges */
#define NEW (FOR(GENERATE) | FOR(INFO) | FOR(TOUR))     /* info plans the clip that generate would make */
#define CLIPS (NEW | FOR(EXTEND))
#define NEUTRAL (1u << 31)      /* not in a checkpoint's identity: no byte depends on it, or on its name alone */

/* How a row says where its value goes. A file is NEUTRAL because its contents are hashed instead (checkpoint:
 * identify); its name may change between two runs. */
#define SET(reader, field) .take = (reader), .at = offsetof(job, field)
#define TEXT(field) SET(read_text, field)           /* the word of the command line itself; NULL without it */
#define FLAG(field) SET(read_flag, field)           /* false without it */
#define WHOLE(field) SET(read_whole, field)         /* int64_t; least and most end the row */
#define WORDS(list) .words = (list), .count = sizeof (list) / sizeof *(list)
static const option options[] = {
    { "model", 'm', "FOLDER", MODELS | NEUTRAL, TEXT(model), "the model, a folder in the Hugging Face layout" },
    { "image", 'i', "FILE[:FRAMES]", PICTURES | NEUTRAL, SET(read_pictures, start),
      "start pictures (0 to 5), encode: frames; PPM or Y4M; clip.y4m:-5.. takes some; repeatable" },
    { "end", 'e', "FILE[:FRAMES]", CLIPS | FOR(MEASURE) | NEUTRAL, SET(read_pictures, end),
      "end pictures (0 to 5), in order; repeatable" },
    { "latents", 'l', "FILE", FOR(DECODE) | NEUTRAL, TEXT(latents), "latents as encode writes them" },
    { "output", 'o', "NAME", WRITES | NEUTRAL, TEXT(out),
      "NAME.y4m, NAME-%%04d.ppm, - for Y4M to standard output; or NAME.safetensors, NAME.html" },
    { "size", 0, "WxH", NEW, SET(read_size, width), "size of the clip, multiples of 16" },
    { "resolution", 0, "R", NEW, WHOLE(resolution),
      "or about R x R pixels in the first picture's aspect", "512", 16, 8192 },
    { "frames", 0, "N", CLIPS, WHOLE(frames),
      "1 to 120, rounded down to whole slices; 24 make a second", "120", 1, 1000000 },
    { "long", 0, NULL, CLIPS, FLAG(long_clip), "allow more than 120 frames" },
    { "camera", 0, "WORD", CLIPS, SET(read_word, camera), "%s", "auto", WORDS(cameras) },
    { "motion", 0, "WORD", CLIPS, SET(read_word, motion), "%s", "auto", WORDS(motions) },
    { "steps", 0, "N", CLIPS, WHOLE(steps), "denoising steps", "25", 1, 1000000 },
    { "cfg", 0, "X", CLIPS, SET(read_real, cfg), "guidance; 1 and less: off, half the time", "7.0" },
    { "seed", 0, "N", CLIPS, SET(read_seed, seed), "random seed", "42" },
    { "rng", 0, "DEVICE", CLIPS, SET(read_rng, rng),
      "torch's noise there: cpu, or a GPU, cuda:SMSxTHREADS[:f32|bf16] (cpu; bf16)" },
    { "scheduler", 0, "WORD", CLIPS, SET(read_scheduler, scheduler), "%s", "ddim", WORDS(sched_names) },
    { "lora", 0, "FILE[:WEIGHT]", CLIPS | NEUTRAL, SET(read_lora, loras),
      "low-rank updates of the transformer; repeatable" },
    { "fp8", 0, "MODE[:e4m3|e5m2]", CLIPS, SET(read_fp8, fp8),
      "weights of the transformer rounded to FP8: %s (e4m3)", WORDS(fp8_words) },
    { "teacache", 0, "T[,START,END]", CLIPS, SET(read_calls, tea_threshold),
      "reuse calls that change less than T (0.1,3,1)" },
    { "enhance-a-video", 0, "W[,START,END]", CLIPS, SET(read_calls, enhance_weight),
      "strengthen attention between frames (1,0,0)" },
    { "vae-tiling", 0, "WHERE[,SIZE[,OVERLAP]]", CLIPS | FOR(ENCODE) | FOR(DECODE), SET(read_tiling, tiling),
      "%s; tiles of SIZE pixels that share a part (the model's)", WORDS(tiling_words) },
    { "checkpoint", 0, "FILE", FOR(GENERATE) | NEUTRAL, TEXT(checkpoint),
      "keep what is computed there; the same command goes on" },
    { "progress", 0, "FILE", WRITES | NEUTRAL, TEXT(progress),
      "one JSON object a line there, added as the run goes on" },
    { "preview", 0, "FILE.ppm", FOR(GENERATE) | NEUTRAL, TEXT(preview), "after each step the middle frame, roughly" },
    { "dry-run", 0, NULL, WRITES | NEUTRAL, FLAG(dry_run), "memory, disk and time of the run, and no more" },
    { "keep-colour", 0, NULL, NEW, FLAG(keep_colour), "hold the background's colours to the start picture's" },
    { "key", 0, "FRAMES", FOR(EXTEND), SET(read_key, key),
      "go on from these frames, as in -5..; without it the best are chosen" },
    { "times", 0, "N", FOR(EXTEND), WHOLE(times), "go on so often", "1", 1, 1000 },
    { "start", 0, "FILE[:FRAME]", FOR(MEASURE), SET(read_pictures, start), "the start picture, for likeness" },
    { "log", 0, "FILE", FOR(MEASURE), TEXT(log), "the standard error of the run that made the clip, for its cost" },
    { "dump", 0, "FOLDER", RUNS | FOR(TOUR) | FOR(INFO), TEXT(watch.dump_dir),
      "write every stage as FOLDER/NAME.safetensors" },
    { "dump-filter", 0, "GLOB", RUNS | FOR(TOUR), SET(read_filter, filters),
      "only stages whose name matches; repeatable" },
    { "inject", 0, "PATH[:GLOB]", RUNS, SET(read_injection, injections),
      "stages are taken from a file or folder, not computed; repeatable" },
    { "stop-after", 0, "STAGE", RUNS, TEXT(watch.stop_after), "end there, and compute only what it needs" },
    { "check", 0, "PATH[:GLOB]", RUNS | FOR(INFO), SET(read_check, model),
      "compare every stage with one there, made from inputs there; info: look at every weight of PATH" },
    { "allow-unknown", 0, NULL, MODELS | NEUTRAL, FLAG(allow_unknown),
      "ignore tensors that the configuration has no place for" },
    { "class", 0, "WORD", RUNS | JUDGES, TEXT(class), "limits of fp64 fp32 fp16 bf16 (this build's)" },
    { "json", 0, NULL, RUNS | JUDGES | FOR(MEASURE), FLAG(json), "one JSON document instead of lines" },
    { "quiet", 'q', NULL, WRITES | NEUTRAL, FLAG(quiet), "no progress" },
    { "verbose", 'v', NULL, WRITES | FOR(INFO) | JUDGES | NEUTRAL, FLAG(verbose), "more: memory, every tensor" },
    { "help", 'h', NULL, FOR(HELP), .help = "this text" },
    { "version", 0, NULL, FOR(VERSION), .help = "the version" },
};
enum { OPTIONS = sizeof options / sizeof *options };

/* Usage on standard output: the tables, and examples that run in this repository as they stand (tests/readme.sh runs
 * those of README.md). The columns are 48 for a command's words, 34 for an option's name and value. */
static void print_help(void)
{
    printf("ruyi %s - pictures to a 24 fps clip, in plain C (%s)\n\n", RUYI_VERSION,
           sizeof(real) == sizeof(float) ? "float32" : "float64");
    printf("  ruyi [generate] %-45s  %s\n", command_rows[GENERATE].usage, command_rows[GENERATE].help);
    for (int i = GENERATE + 1; i < COMMANDS; i++)
        printf("  ruyi %-7s %-48s  %s\n", command_rows[i].name, command_rows[i].usage, command_rows[i].help);
    printf("\nOptions\n");
    for (const option *o = options; o < options + OPTIONS; o++) {
        const char letter[] = { '-', o->letter, ',', 0 };
        char *words = list_words(o->words, o->count);
        printf("  %-4s--%s %-*s ", o->letter ? letter : "", o->name, 33 - (int)strlen(o->name),
               o->value ? o->value : "");
        printf(o->help, words);
        printf(o->initial ? " (%s)%s" : "%s%s", o->initial ? o->initial : "", "\n");
        free(words);
    }
    printf("\nExamples\n"
           "  ruyi -m weights/ruyi-tiny -i weights/start/meadow.ppm --size 128x128 --frames 24 --camera left "
           "-o out.y4m\n"
           "  ruyi -m weights/ruyi-tiny -i weights/start/pan-start.ppm -e weights/start/pan-end.ppm --size 128x128 "
           "--frames 24 -o pan-%%04d.ppm\n"
           "  ruyi -m weights/ruyi-tiny -i weights/start/village.ppm --size 128x128 --frames 24 -o - "
           "| ffmpeg -i - village.mp4\n"
           "  ruyi extend out.y4m -m weights/ruyi-tiny --frames 24 --camera left --times 3 -o story.y4m\n"
           "  ruyi measure story.y4m --start weights/start/meadow.ppm\n"
           "  ruyi info weights/ruyi-tiny --size 128x128 --frames 24\n\n"
           "GPUs for --rng: RTX 4090 cuda:128x1536, RTX 3090 cuda:82x1536, A100 cuda:108x2048, H100 cuda:132x2048\n"
           "Threads: OMP_NUM_THREADS. Exit codes: 0 done, 1 a comparison differs, 2 bad input or usage, "
           "3 system error.\n");
}

/* ---------------------------------------------------------------- options: the command line
 *
 * Options and words may stand in any order; --name VALUE and --name=VALUE are the same, -x VALUE is the short form. A
 * word that begins with - is an option, but - alone is not: it is standard input or output. All are looked at twice:
 * for the words, the first of which is the command; then for the options' readers, which take one value after another.
 * Pictures are opened here, in their order. check_options() is the one place for what must not stand side by side.
 *
 *     ruyi extend a.y4m -m MODEL --times=2 -o b.y4m       is     ruyi -o b.y4m --times 2 extend -m MODEL a.y4m
 *     ruyi -m MODEL -i a.ppm -o - | ffmpeg -i - a.mp4     is     ruyi generate -m MODEL -i a.ppm -o - | ...
 *
 * Of an option that is given twice the last counts, unless it is repeatable. There is no bundling (-qv): a second
 * letter would be a mistyped option far more often.
 */

/* The option that argv[*i] names as --name, --name=value or -x, and its value, "" for a flag; NULL: a word. Goes on to
 * the last word that it takes, whatever that begins with: -5.. is a value of --key. Dies with the nearest name where
 * there is none such. */
static const option *next_option(int argc, char **argv, int *i, const char **value)
{
    const char *word = argv[*i], *names[OPTIONS], *equals = strncmp(word, "--", 2) ? NULL : strchr(word, '=');
    size_t length = equals ? (size_t)(equals - word) : strlen(word);
    const option *o = NULL;
    if (word[0] != '-' || !word[1])
        return NULL;
    for (int k = 0; k < OPTIONS; k++) {
        names[k] = options[k].name;
        bool same = word[1] == '-' ? strlen(names[k]) == length - 2 && !strncmp(names[k], word + 2, length - 2)
                                   : word[1] == options[k].letter && length == 2;
        o = same ? &options[k] : o;
    }
    NEED(o, "%s: no such option; did you mean --%s? (ruyi --help lists all)", word,
         nearest_word(word + 1 + (word[1] == '-'), names, OPTIONS));
    NEED(o->value || !equals, "%s: takes no value", word);
    NEED(!o->value || equals || *i + 1 < argc, "%s: expected %s after it", word, o->value);
    *value = equals ? equals + 1 : o->value ? argv[++*i] : "";
    return o;
}

/* The first word beside the options is the command; without one it is generate. The rest are the command's. A picture's
 * name that stands alone is a likely mistake: it is taken for a command, and the message says how pictures are
 * given. */
static void find_command(job *j, const char **rest, int nrest)
{
    const char *names[COMMANDS];
    for (int i = 0; i < COMMANDS; i++)
        names[i] = command_rows[i].name;
    int place = nrest ? place_of(rest[0], names, COMMANDS) : GENERATE;
    NEED(place >= 0, "%s: no such command; did you mean %s? (pictures are given with -i; ruyi --help)", rest[0],
         nearest_word(rest[0], names, COMMANDS));
    j->command = (command)place;
    j->files = rest + (nrest > 0);
    j->nfiles = nrest - (nrest > 0);
    NEED(j->nfiles <= command_rows[place].most, "%s: got one word too many for %s; pictures are given with -i, the "
         "output with -o", j->files[command_rows[place].most], names[place]);
    NEED(j->nfiles >= command_rows[place].least, "%s: got too few words, expected ruyi %s %s", names[place],
         names[place], command_rows[place].usage);
}

/* Whether the options go together, and are enough; what a model says to them comes later. A run without -o is fine
 * where somebody looks into it: for its dumps or its verdict alone. Each of the combinations that are refused would
 * work in some way, and not in the one that was meant. */
static void check_options(const job *j)
{
    const hooks *h = &j->watch;
    bool looked_at = h->dump_dir || h->truth, saves = j->command == ENCODE || j->command == CLIP;
    NEED(j->frames <= 120 || j->long_clip, "--frames: got %lld, expected 1 to 120; --long allows more", ll(j->frames));
    NEED(!h->nfilters || h->dump_dir, "--dump-filter: got no --dump, expected a folder to write to; give --dump "
         "FOLDER");
    NEED(!j->hooks || !j->checkpoint, "--checkpoint: got --dump, --inject, --stop-after or --check beside it, expected "
         "none: a run that goes on does not come by its first stages again");
    NEED(!h->stop_after || (looked_at && !j->out), "--stop-after: got %s, expected --dump or --check and no -o, since "
         "there will be no frames", j->out ? "-o" : "neither --dump nor --check");
    NEED(!h->ngiven || j->tea_threshold == 0, "--inject: not together with --teacache, which decides by every stage; "
         "leave one out");
    if (j->command == TOUR || (!looked_at && WRITES & FOR(j->command)))
        require(j->out, "--output", j->command == TOUR ? "-o NAME.html" : saves ? "-o NAME.safetensors" :
                "-o NAME.y4m, -o NAME-%04d.ppm or -o - (Y4M to standard output)");
    NEED(!saves || j->starts, "--image: got no picture, expected at least one; give it with -i");
    NEED(j->command == INFO || !j->keep_colour || j->starts, "--keep-colour: got no start picture, expected one to "
         "take the colours from; give it with -i");
    NEED(h->truth || !(RUNS & FOR(j->command)) || (!j->class && !j->json), "%s: got no --check, whose verdict it is "
         "for; give --check PATH", j->class ? "--class" : "--json");
    NEED(!j->key || j->times == 1 || (j->key_first < 0 && j->key_last < 0), "--key: got places from the start, "
         "expected some from the end with --times, as in -5..");
}

/* The whole command line into the job. --help and --version win over all mistakes beside them. Values are read after
 * the command is known, because it says how many pictures there may be. Options that decide the result enter the job's
 * hash, by which a checkpoint knows its run: name and value, in the order of the command line. One that is given twice
 * counts as two, although the last wins: a stricter identity costs a checkpoint, a looser one the result. */
static void read_options(job *j, int argc, char **argv)
{
    const char **rest = j->files = allocate((size_t)argc, sizeof *rest), *value;     /* for good: words of the job */
    const option *o;
    int nrest = 0;
    j->command = argc == 1 ? HELP : GENERATE;
    for (int i = 1; i < argc; i++)
        if (!(o = next_option(argc, argv, &i, &value)))
            rest[nrest++] = argv[i];
        else if (!o->take && j->command == GENERATE)
            j->command = o->commands == FOR(HELP) ? HELP : VERSION;
    if (j->command != GENERATE)
        return;
    find_command(j, rest, nrest);
    for (o = options; o < options + OPTIONS; o++)
        if (o->initial)
            o->take(j, o, o->initial);
    for (int i = 1; i < argc; i++) {
        if (!(o = next_option(argc, argv, &i, &value)))
            continue;
        NEED(o->commands & FOR(j->command), "--%s: not an option of %s; ruyi --help lists them", o->name,
             command_rows[j->command].name);
        o->take(j, o, value);
        if (!(o->commands & NEUTRAL))
            j->options = hash_bytes(hash_bytes(j->options, o->name, strlen(o->name)), value, strlen(value));
    }
    const hooks *h = &j->watch;
    if (h->dump_dir || h->nfilters || h->ngiven || h->stop_after || h->truth)
        j->hooks = &j->watch;
    check_options(j);
}

/* ---------------------------------------------------------------- main
 *
 * Nothing may leave half a file behind: die() and the signal handler remove what is unfinished.
 *
 *     SIGINT, SIGTERM, SIGHUP     temporaries go, exit code 3; with --checkpoint first the block under way is finished
 *     SIGPIPE, SIGXFSZ            ignored: a closed pipe, or a file beyond its limit, is a write that fails
 *     SIGBUS                      a mapped file was cut short: exit code 3, and a message with its name
 *     SIGKILL                     leaves a temporary under its own name, which no later run trips over
 */

/* A run with a checkpoint ends by itself after the block or slice under way, unless it is told twice.
 * remove_temporaries calls nothing that is unsafe in a signal handler. */
static void on_signal(int signal_number)
{
    bool first = stop_signal == 0;
    stop_signal = signal_number;
    if (may_stop && first)
        return;
    remove_temporaries();
    _exit(SYSTEM_ERROR);
}

/* A mapped file was cut short: there is nothing behind the address any more. io.c knows whose it was. */
static void on_bus(int signal_number, siginfo_t *about, void *context)
{
    (void)signal_number;
    (void)context;
    mapping_lost(about->si_addr);
}

/* One command line, from options to exit code; ruyi.h has the codes. Standard output is flushed here, so that a full
 * disk is an error and not a short listing. Called by main, and by check in a process of its own. */
static int run_program(job *j, int argc, char **argv)
{
    *j = (job){ .tea_start = 3, .tea_end = 1, .watch = { .filters = j->filters, .given = j->injections } };
    j->words = argv;
    j->nwords = argc;
    read_options(j, argc, argv);
    if (j->command == HELP)
        print_help();
    else if (j->command == VERSION)
        printf("ruyi %s\n", RUYI_VERSION);
    else
        command_rows[j->command].run(j);
    MUST(!fflush(stdout) && !ferror(stdout), "standard output: %s", strerror(errno));
    return j->code;
}

/* What a process needs before anything else. A standard descriptor that is closed would be given to the next file, and
 * messages would go into it: in its place comes /dev/null, opened the wrong way, so that what uses it fails. open
 * returns the lowest free number, and so in this order each gets its own. A signal that was ignored from the start
 * (nohup) stays so. */
int main(int argc, char **argv)
{
    static job all;         /* static, so that what lives as long as the program stays reachable */
    static const int stopping[] = { SIGINT, SIGTERM, SIGHUP };
    struct sigaction stop = { .sa_handler = on_signal }, ignore = { .sa_handler = SIG_IGN }, before;
    struct sigaction bus = { .sa_sigaction = on_bus, .sa_flags = SA_SIGINFO };
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd ? O_RDONLY : O_WRONLY) != fd)
            _exit(SYSTEM_ERROR);
    for (int i = 0; i < 3; i++)
        if (sigaction(stopping[i], NULL, &before) == 0 && before.sa_handler != SIG_IGN)
            sigaction(stopping[i], &stop, NULL);
    sigaction(SIGPIPE, &ignore, NULL);
    sigaction(SIGXFSZ, &ignore, NULL);
    sigaction(SIGBUS, &bus, NULL);
    return run_program(&all, argc, argv);
}
