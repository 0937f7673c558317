/* ruyi.h - the map of the program: every shared type, and every function that one file offers to the others.
 *
 * The pipeline, with the published 7B model's numbers for 120 frames of 384 x 672 pixels:
 *
 *     pictures --io, resize--> bytes --> pixels -1..1, mask 0 or 1  [T][H][W][3] each                 120 384 672 3
 *     pixels, mask --vae_encode--> mask_latents, masked_latents  [F][h][w][Z] each                    30 48 84 16
 *         (posterior noise: generator 2; frames that are not given are black, with 1 in the mask)
 *     first picture --clip_encode--> tokens  [patches][width]                                         256 1280
 *     embeddings.safetensors --control words--> text rows [negative, positive] --dit_conditions--> what stays the same
 *     noise (generator 1) --> latents  [F][h][w][Z]                                                   30 48 84 16
 *     for each timestep: dit_forward  [B][F][h][w][2 Z] --> guidance --> sched_step --> latents       2 30 48 84 32
 *     latents --vae_decode, smooth--> video  [T][H][W][3] --> bytes --io--> frames                    120 384 672 3
 *
 * Shape letters, used in every comment:
 *     B       guidance rows: 2 [negative, positive], or 1 [positive] where guidance is off
 *     F h w   latent frames, height, width            T H W   video frames, height, width in pixels
 *     C       channels                                Z       latent channels (16)
 *     D       hidden_size of the DiT (2816)           p       its patch side (2); N = F * h/p * w/p tokens (30240)
 *     X       cross_attention_dim (1024)              Q       n_query, the image tokens that a block sees (64)
 *
 * Layout: channels last everywhere, [T][H][W][C] in the VAE and [N][D] in the DiT. PyTorch's order appears only at the
 * border, in weights (read) and dumps (written).
 *
 * Numbers: `real` is float; the second build, -DREAL=double, is the oracle. Random draws, scheduler tables and the
 * 8-bit resize are the same bits in both. Every sum has one order (the textbook loops of tensor.c), so that compiler,
 * instruction set, thread count and tile size cannot change a bit.
 *
 * Errors: whatever cannot go on calls die() with one line (what: where: got, expected; what to do) and an exit code.
 * Only the parsers of foreign bytes return a reason instead, so that tests and fuzzers can call them.
 */
#ifndef RUYI_H
#define RUYI_H

#include <float.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __FAST_MATH__
#error "-ffast-math and -Ofast change the order of sums, which is the definition of this program's results"
#endif
#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0
#error "arithmetic must be evaluated in its own type (32-bit x86: -msse2 -mfpmath=sse; s390x: -fexcess-precision=fast)"
#endif

#define RUYI_VERSION "1.0"
#ifndef REAL
#define REAL float
#endif
typedef REAL real;

#ifdef __GNUC__
#define PRINTF(f, a) __attribute__((format(printf, f, a)))
#else
#define PRINTF(f, a)
#endif

/* ---------------------------------------------------------------- shapes, tensors, weights, memory */

enum { MAX_DIMS = 5 };
typedef struct { int ndim; int64_t dim[MAX_DIMS]; } shape;
#define SHAPE(...) ((shape){ (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), { __VA_ARGS__ } })

/* A view of activations: row-major, contiguous, owns nothing. data is NULL in the planning pass (see arena). */
typedef struct { real *data; int ndim; int64_t dim[MAX_DIMS]; } tensor;

/* Element types of safetensors files, in the order of dtype_name[] and dtype_bits[] (io.c). */
typedef enum {
    BOOL, U8, I8, I16, U16, I32, U32, I64, U64, F16, BF16, F32, F64, C64,
    F8_E5M2, F8_E4M3, F8_E8M0, F8_E4M3FNUZ, F8_E5M2FNUZ, F4, F6_E2M3, F6_E3M2, DTYPES
} dtype;

#define REAL_TYPE (sizeof(real) == 8 ? F64 : F32)     /* the build's own */

/* A parameter, in the type and byte order that the checkpoint stores. Kernels widen it while they read. */
typedef struct {
    const unsigned char *data;  /* first element, unaligned, little-endian; NULL: absent (a layer without bias) */
    dtype type;                 /* F64 F32 F16 BF16 F8_E4M3 F8_E5M2, or BOOL and integers for masks */
    int ndim;
    int64_t dim[MAX_DIMS];
    const char *key;            /* the checkpoint's name of it */
    dtype fp8;                  /* F8_E4M3, F8_E5M2: rounded to it while widening (--fp8); 0: not */
    const struct lora *lora;    /* low-rank updates of a matrix, added while widening; NULL: none */
} weight;

/* A linear layer, a convolution or an affine norm: NAME.weight and NAME.bias (absent where the layer has none). */
typedef struct { weight weight, bias; } layer;

/* W += scale * up @ down, one link per file that names the layer (public: utils/lora_utils.py merge_lora). */
typedef struct lora {
    weight up, down;            /* [N][rank], [rank][K], or [rank][Cin] of a convolution: for every tap the same */
    real scale;                 /* the file's weight * alpha / rank; alpha absent: the weight alone */
    const struct lora *next;
} lora;

/* Kernels that take nearly all of the time; a multiply and an add are two operations. */
typedef enum { LINEAR, CONV, ATTENTION, WORKS } work_kind;

/* All activations live in one block: temporaries grow from its low end, marked and reset like a stack; what must
 * outlive them (caches) grows from the high end. A planning arena has no memory: tensors get shapes but no data,
 * kernels check shapes and compute nothing, and the peak that it records is the memory of the real pass. */
typedef struct {
    unsigned char *base;
    size_t size;                /* bytes; unlimited while planning */
    size_t low, high, peak;     /* bytes in use at either end, and the largest low + high so far */
    double work[WORKS];         /* operations so far, of every kind; a plan counts them, too */
    bool planning;
} arena;

/* ---------------------------------------------------------------- io.c: files and formats */

enum { DONE = 0, DIFFERS = 1, BAD_INPUT = 2, SYSTEM_ERROR = 3 };   /* exit codes */

_Noreturn void die(int code, const char *format, ...) PRINTF(2, 3);
/* What must hold of an input, or of the system: otherwise this is its message, and the end. */
#define NEED(condition, ...) ((condition) ? (void)0 : die(BAD_INPUT, __VA_ARGS__))
#define MUST(condition, ...) ((condition) ? (void)0 : die(SYSTEM_ERROR, __VA_ARGS__))
void *allocate(size_t count, size_t size);          /* zeroed; dies with SYSTEM_ERROR when there is no memory */
/* A C string that grows at its end; starts as { 0 }, and `text` is to be freed. */
typedef struct { char *text; size_t length, room; } string;
void print_to(string *s, const char *format, ...) PRINTF(2, 3);
char *text_of(const char *format, ...) PRINTF(1, 2);/* a new string */
int place_of(const char *word, const char *const *words, int count);    /* -1: not there */
const char *nearest_word(const char *word, const char *const *words, int count);    /* smallest edit distance */
void remove_temporaries(void);                      /* half-written outputs; called by die() and signal handlers */
bool file_exists(const char *path);                 /* dies where the system cannot say */
void mappings_check(void);                          /* dies where a mapped file has been written to meanwhile */
_Noreturn void mapping_lost(const void *address);   /* for SIGBUS: a mapped file was cut short; dies with its name */

/* JSON (RFC 8259, strict). A json value is a span of text that json_check accepted; text == NULL: absent. */
typedef struct { const char *text, *end; } json;
enum { REASON = 512 };                              /* room for a parser's reason */
bool json_check(const char *text, size_t size, bool minus_infinity, json *root, char reason[REASON]);
json json_member(json object, const char *name);    /* the last member of that name, as Python's json keeps it */
bool json_next(json container, json *cursor, json *name, json *value);  /* *cursor starts as { 0 } */
char json_kind(json value);                         /* one of { [ " 0 t f n, or 0 when absent */
double json_number(json value);
char *json_string(json value);                      /* decoded to UTF-8, a new string */

/* A folder's configuration file. Getters die with file, field, got and expected; REQUIRED has no default. read: the
 * fields that were asked for, a NUL after each; behind a pointer, since configs are passed by value. */
typedef struct { char *path, *text; json root; string *read; } config;
#define REQUIRED INT64_MIN
config config_open(const char *folder, const char *name);
void config_close(config c);
int64_t config_int(config c, const char *field, int64_t otherwise, int64_t least, int64_t most);
double config_real(config c, const char *field, double otherwise);      /* NAN: no default */
bool config_bool(config c, const char *field, bool otherwise);
char *config_word(config c, const char *field, const char *otherwise);  /* NULL: no default */
int config_choice(config c, const char *field, const char *otherwise, const char *const *words, int count);  /* place */
int config_ints(config c, const char *field, int64_t *list, int most);  /* count; -1: absent; dies beyond `most` */
double *config_reals(config c, const char *field, int64_t count, const char *what);    /* so many; NULL: absent */
int config_words(config c, const char *field, char **list, int most);   /* also a Python tuple or list in a string */
json config_member(config c, const char *field);    /* null counts as absent, as in every getter */
void config_print_unread(config c);                 /* the fields that nothing asked for, on one line of stdout */
_Noreturn void config_refuse(config c, const char *field, const char *format, ...) PRINTF(3, 4);
#define CONFIG_NEED(condition, ...) ((condition) ? (void)0 : config_refuse(__VA_ARGS__))

/* safetensors. Every rule is numbered in io.c; a refused file gives the number. */
extern const char *const dtype_name[DTYPES];
extern const int dtype_bits[DTYPES];
typedef struct {
    char *name;
    dtype type;
    int ndim;                   /* any rank */
    int64_t *dim;
    const unsigned char *data;
    uint64_t count, bytes, begin;   /* elements, bytes, and offset of the first byte in the file's data */
    const struct safetensors *file; /* that it is of; NULL: of none */
    bool used;                  /* the mark of who reads it (weights, check) */
} st_tensor;
typedef struct safetensors {
    char *path;
    const unsigned char *map;   /* the file's bytes, mapped or given */
    size_t size;
    json metadata;              /* an object of strings, null, or absent */
    st_tensor *tensors;         /* in the order of the file's data */
    const st_tensor **by_name;  /* the same, sorted by name */
    int64_t count;
} safetensors;
bool safetensors_parse(const unsigned char *bytes, size_t size, safetensors *out, char reason[REASON]);
safetensors *safetensors_open(const char *path);    /* mmapped; dies with the rule that the file breaks */
void safetensors_free(safetensors *file);            /* what safetensors_parse allocated */
void safetensors_close(safetensors *file);           /* the counterpart of safetensors_open */
const st_tensor *safetensors_find(const safetensors *file, const char *name);       /* NULL: none */
/* One file, whole or not at all. data: host byte order; names, types, shapes and data side by side; data NULL: see
 * safetensors_intact. sync: a crash may not lose it. */
typedef struct { const char *name; dtype type; shape shape; const void *data; } st_entry;
void safetensors_write(const char *path, const st_entry *entries, int count, bool sync);
bool safetensors_intact(const safetensors *file);    /* its last tensor is the sum of what is before it */
uint64_t hash_bytes(uint64_t h, const void *data, size_t size);     /* goes on from h; against accidents, not forgery */

/* The weights of one component: FOLDER/STEM.safetensors, or the shards of FOLDER/STEM.safetensors.index.json. */
typedef struct {
    char *folder, *stem;
    safetensors **files;
    int nfiles;
    /* Set by the owner before anything is bound: files of low-rank updates, and what each is worth; */
    const safetensors *const *loras; const double *lora_scales; int nloras;
    dtype fp8; uint64_t fp8_least;  /* --fp8: the type, and the elements from which on a matrix gets it; 0: off; */
    const char *const *fp8_kept;    /* least 1: norms, too; globs of layers that stay as they are, up to NULL */
    int64_t fp8_layers;         /* rounded so far */
    bool random;                /* measurements: every name exists, with random numbers in F32; no file */
    uint64_t copied;            /* bytes of convolution weights that bind_conv put in order */
} weights;
weights *weights_open(const char *folder, const char *stem);
const safetensors *weights_file(const weights *w, int f);   /* f < nfiles + nloras: its own, then those of updates */
bool weights_has(const weights *w, const char *key);
/* Bound by name, dying where it is missing, misshapen or of no float type. bind_conv: [Cout][Cin][taps] to a copy
 * [Cout][taps][Cin]. A layer: NAME.weight of a shape (three dimensions or more: as bind_conv's), and NAME.bias [n]. */
weight bind(weights *w, shape expected, const char *key, ...) PRINTF(3, 4);
weight bind_conv(weights *w, shape expected, const char *key, ...) PRINTF(3, 4);
layer bind_layer(weights *w, shape expected, const char *name, ...) PRINTF(3, 4);
#define bind_linear(w, n, k, ...) bind_layer(w, SHAPE(n, k), __VA_ARGS__)   /* torch.nn.Linear(k, n) */
#define bind_norm(w, n, ...) bind_layer(w, SHAPE(n), __VA_ARGS__)           /* LayerNorm(n), GroupNorm of n channels */
#define bind_convolution bind_layer                 /* Conv2d, Conv3d: kernel [Cout][Cin][taps...] */
const st_tensor *weights_nonfinite(const weights *w, int64_t *index);   /* the first with a nan or infinity, or NULL */
int64_t safetensors_nonfinite(const safetensors *file);     /* tells all of them, a line each; returns how many */
void weights_ignore(weights *w, const char *glob);  /* known and not read */
void weights_done(const weights *w, bool allow_unknown);    /* dies naming the first tensor that has no place */
uint64_t weights_bytes(const weights *w);           /* mapped bytes of all tensors */

/* Pictures. rgb: [h][w][3], 8 bits. */
typedef struct { int64_t w, h; unsigned char *rgb; } image;
bool ppm_parse(const unsigned char *bytes, size_t size, size_t *used, image *out, char reason[REASON]);
typedef struct { int64_t w, h; int step_x, step_y; bool full; } y4m;    /* step: pixels of a chroma sample, 0: grey */
bool y4m_header(const unsigned char *bytes, size_t size, size_t *used, y4m *out, char reason[REASON]);
bool y4m_parse(const y4m *head, const unsigned char *bytes, size_t size, size_t *used, image *out, char reason[REASON]);
int64_t images_read(const char *path, int64_t room, image **list, int64_t count);   /* NAME[:FRAMES]; the new count */
bool frames_parse(const char *text, int64_t *first, int64_t *last);     /* "7", "0..4", "-5.."; false: none of them */
void frames_resolve(const char *name, int64_t count, int64_t *first, int64_t *last);    /* -1: count - 1 */
image image_resize(image in, int64_t w, int64_t h);         /* Pillow's bicubic, bit for bit */
void ppm_write(const char *path, image picture);            /* P6, whole or not at all; a crash may lose it */

/* Frames out: NAME.y4m, NAME-%04d.ppm, or "-" (Y4M to standard output). They appear whole or not at all. */
typedef struct output output;
output *output_open(const char *path, int64_t w, int64_t h);     /* refuses early */
void output_frame(output *o, const unsigned char *rgb);
void output_close(output *o);
char *folder_of(const char *path);                  /* "FOLDER/." or ".", a new string */
void output_check(const char *path);                /* dies when no file can be made there */
void y4m_planes(const unsigned char *rgb, int64_t w, int64_t h, unsigned char *planes); /* 4:2:0, full range BT.601 */

/* Pages of HTML: a text that grows, with pictures as PNG inside it. */
void print_html(string *page, const char *text);    /* as it is: < & " are no HTML */
void print_picture(string *page, image picture);    /* its address, which holds it: data:image/png;base64,... */
void text_write(string *text, const char *path);    /* whole or not at all; "-": standard output; ends the text */

/* Comparing. A pack: the tensors of a file, of a folder of files, or of a golden case, in the order of computing. */
typedef struct { safetensors **files; int nfiles; const st_tensor **tensors; int64_t count; } pack;
pack *pack_open(const char *text);                  /* PATH[:GLOB]; dies: unreadable, or a name twice */
typedef struct judge judge;                         /* a running comparison */
judge *judge_new(const char *class, int verbosity, bool as_json);   /* class NULL: this build's; 1: prints all */
int compare(const char *golden, const char *mine, const char *class, bool all, bool as_json);  /* an exit code */

struct run;
/* Reaching into a run. Every stage has a name; under it its tensor can be replaced, written, judged and seen. */
typedef struct {
    const char *dump_dir;       /* stages are written there; NULL: no dumps */
    const char *const *filters; int nfilters;       /* globs of the names to write; none: all */
    const pack *const *given; int ngiven;           /* tensors that take the place of stages */
    int64_t replaced;           /* stages that the plan found among them */
    const char *stop_after;     /* the run ends when this stage is done; NULL: at its own end */
    bool stop_known;            /* the plan came by it */
    const pack *truth;          /* what stages should be (check); NULL: nothing is judged */
    judge *judge;
    void (*look)(const struct run *r, st_entry stage);  /* called when a stage is done, channels last; or NULL */
    void *looker;               /* what it keeps */
} hooks;

/* What a stage needs besides its inputs. */
typedef struct run {
    arena *arena;
    hooks *hooks;               /* NULL: nobody looks. Else guidance rows are run together, as stages show them */
    int verbosity;              /* 0 quiet, 1 progress, 2 more */
    struct progress *progress;
    struct checkpoint *checkpoint;                  /* NULL: none */
} run;
typedef enum { AS_IS, CHANNELS_FIRST, ROWS_CHANNELS_FIRST } layout; /* [...C] -> [C...]; [B][...C] -> [B][C...] */
/* Before a stage: may it be skipped? After it: what is to be done with what it made. */
bool is_given(const run *r, const char *name, ...) PRINTF(2, 3);
bool given(const run *r, tensor x, layout order, const char *name, ...) PRINTF(4, 5);
void copy_given(real *to, shape s, layout order, const st_tensor *t);   /* a file's numbers, of any type */
bool given_bytes(const run *r, unsigned char *bytes, shape s, const char *name);
bool stops_at(const run *r, const char *glob);
int stop_numbers(const run *r, const char *format, ...);
int hooks_end(const hooks *h);                      /* the verdict of check, if there is one: an exit code */
void dump(const run *r, tensor x, layout order, const char *name, ...) PRINTF(4, 5);
void dump_data(const run *r, const void *data, dtype type, shape s, const char *name, ...) PRINTF(5, 6);
/* What is no stage, only seen: a call's input, sinusoids, rotary, and a block's attn1.q, attn1.k (dit.c). */
void show(const run *r, const void *data, dtype type, shape s, const char *name);
void dump_check(const char *folder);                /* makes the folder, or dies early */

/* ---------------------------------------------------------------- tensor.c: memory, arithmetic, random numbers */

arena arena_plan(void);
arena arena_new(size_t bytes);                      /* dies with SYSTEM_ERROR when there is no memory */
void arena_free(arena *a);
size_t arena_mark(const arena *a);
void arena_reset(arena *a, size_t mark);
tensor arena_return(arena *a, size_t mark, tensor x);       /* reset to mark, keeping x: moved down to the mark */
size_t arena_mark_high(const arena *a);
void arena_reset_high(arena *a, size_t mark);
void *arena_alloc(arena *a, size_t count, size_t size);     /* 64-byte aligned; NULL while planning */

weight weight_of(const unsigned char *data, dtype type, shape s, const char *key);
tensor tensor_of(real *data, shape s);
tensor tensor_new(arena *a, shape s);
tensor tensor_new_high(arena *a, shape s);          /* from the high end: survives arena_reset */
tensor tensor_view(tensor x, shape s);              /* the same elements in another shape */
tensor tensor_part(tensor x, int64_t first, int64_t count);  /* x[first : first + count] of the first dimension */
size_t shape_count(shape s);                        /* elements; dies beyond int64_t */
int64_t tensor_count(tensor x);
shape tensor_shape(tensor x);                       /* to make another of it */
void tensor_fill(tensor x, real value);
void tensor_copy(tensor to, tensor from);
void weight_row(weight w, int64_t row, int64_t first, int64_t count, real *out);    /* widened, updated (lora) */
real *weight_vector(arena *a, weight w);            /* a whole small parameter, widened */

/* y[m][n] = bias[n] + sum_k x[m][k] weight[n][k]. weight: [N][K] or [N][1][K]. */
tensor linear(arena *a, tensor x, layer l);
void linear_to(arena *a, tensor y, tensor x, layer l);
weight weight_rows(weight w, int64_t first, int64_t count); /* rows of a packed matrix or vector (in_proj) */

/* Time padding of a convolution, by the public CausalConv3d's padding_flag. */
typedef enum {
    PAD_REPLICATE = 0,          /* plain: the first frame twice in front */
    PAD_SINGLE = 1,             /* one frame alone: a zero frame on each side */
    PAD_SLICE = 2,              /* a slice: a zero frame on each side */
    PAD_CACHE_FIRST = 5,        /* first cached slice: as 0, and remember the last two frames of the padded input */
    PAD_CACHE_NEXT = 6,         /* later ones: what was remembered in front, and remember anew: no cut is seen */
} pad_mode;
typedef struct {
    int64_t kernel[3], stride[3];   /* t, y, x */
    int64_t pad;                /* zeros above and left of the picture; below and right as much as the output needs */
    int64_t up;                 /* 1, or 2: the input is seen enlarged twice by nearest neighbours in space */
    pad_mode time;
    tensor *cache;              /* [2][H][W][C], for the two cached modes */
} conv_spec;
/* y [T'][H'][W'][Cout], whose size the caller knows, from x [T][H][W][Cin]; weight: [Cout][taps][Cin]. */
void conv(arena *a, tensor y, tensor x, conv_spec s, layer l);

/* softmax(q k / sqrt(head)) v for `sequences` independent sequences. q, y: [sequences * nq][heads * head],
 * k, v: [sequences * nk][heads * head]. q is scaled here. y may be q. */
void attention(arena *a, tensor y, tensor q, tensor k, tensor v, int64_t sequences, int64_t heads);

void layer_norm(arena *a, tensor y, tensor x, layer l, double eps);  /* over the last dimension; y may be x */
/* x: [T][H][W][C]; statistics over `span` consecutive frames at a time; SiLU after it if asked. y may be x. */
void group_norm(arena *a, tensor y, tensor x, int64_t groups, int64_t span, layer l, bool silu);
/* LayerNorm of every head of x [N][heads * head], then rotary turning by table [period][head/2][cos, sin] (rows repeat
 * with that period; NULL: no turning). */
void head_norm_rotary(arena *a, tensor x, int64_t heads, layer l, double eps, const double *table, int64_t period);

typedef enum { SILU, GELU_TANH, GELU_ERF, QUICK_GELU } activation;
void activate(tensor x, activation f);
void add(tensor y, tensor x);                       /* y += x */
void gate_gelu(tensor y, tensor x);                 /* y [M][D] = a * gelu_erf(b), x [M][2 D] = [a, b] */

/* Of whole numbers: fmin, fmax, and the quotient rounded up; the nearest of 0 .. n - 1, as if an edge went on. */
static inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t within(int64_t i, int64_t n) { return i < 0 ? 0 : i < n ? i : n - 1; }

static inline double bits_double(uint64_t bits) { double d; memcpy(&d, &bits, sizeof d); return d; }
static inline uint64_t double_bits(double d) { uint64_t bits; memcpy(&bits, &d, sizeof bits); return bits; }
static inline long long ll(int64_t n) { return n; }         /* for printf's %lld, which int64_t need not be */

/* The project's own functions, built from + - * / sqrt fma and bit moves; double precision. */
double exp_own(double x);
double log_own(double x);
void sincos_own(double x, double *sine, double *cosine);

/* torch's generators: the CPU's (MT19937, float32 normals), bit for bit, and a CUDA GPU's (Philox), whose numbers
 * depend on its size. Plain data without padding: its bytes, read back, go on with the same numbers. */
typedef struct { int32_t sms, threads, bf16; } rng; /* multiprocessors, 0: the CPU; threads of each; rounded to BF16 */
typedef struct {
    rng device;
    int32_t has_second;         /* CPU: a number is left over from the last pair */
    uint64_t seed, offset;      /* GPU: the key, and the numbers drawn in each thread */
    uint32_t state[624];
    int32_t next; float second;
} generator;
void generator_seed(generator *g, rng device, uint64_t seed);
void generator_randn(generator *g, float *out, int64_t count);

int64_t ruyi_threads(void);
double burn_peak(arena *a);                         /* register-only multiply-adds; returns their operations */

/* The textbook loops: the definition of every sum. The kernels above must give the same bits (tests/unit.c). */
void linear_plain(real *y, const real *x, const real *w, const real *b, int64_t m, int64_t n, int64_t k);
void conv_plain(real *y, const real *x, const real *w, const real *b, const int64_t in[4], const int64_t out[4],
                conv_spec s);
void attention_plain(real *y, const real *q, const real *k, const real *v, int64_t nq, int64_t nk, int64_t heads,
                     int64_t head);

/* ---------------------------------------------------------------- vae.c: AutoencoderKLMagvit (the Casual VAE) */

enum { MAX_LEVELS = 8 };
typedef enum { SLICE_CACHE, SLICE_COMPRESSION, SLICE_MAG, SLICE_NONE } slice_mode;
typedef enum { ATTEND_3D, ATTEND_SPATIAL, ATTEND_TEMPORAL, ATTEND_SPATIAL_TEMPORAL } mid_attention;
extern const char *const attention_words[4];         /* the configuration's words for them */

typedef struct {                /* vae/config.json */
    config file;
    int64_t in_channels, out_channels, latent_channels, layers_per_block, norm_num_groups;
    int64_t levels, channels[MAX_LEVELS];   /* length of ch_mult; ch * ch_mult */
    bool time[2][MAX_LEVELS];   /* of down_blocks, of up_blocks: SpatialTemporal... rather than Spatial...Block3D */
    slice_mode mode;
    int64_t mini_batch_encoder, mini_batch_decoder;     /* a slice's length, in frames and in latent frames */
    bool mid_block_use_attention, spatial_group_norm, tile_encoder, tile_decoder;
    mid_attention mid_block_attention_type;
    int64_t mid_block_num_attention_heads, tile_sample_min_size, tile_latent_min_size;
    double scaling_factor, tile_overlap_factor;
    int64_t block_out_channels; /* its length, which the pipeline reads; 0: absent */
} vae_config;

/* --vae-tiling, in place of the configuration's tiles; size 0, overlap < 0: the configuration's. */
typedef struct { bool given, encoder, decoder; int64_t size; double overlap; } vae_tiling;  /* size in pixels */

typedef struct vae vae;
vae *vae_open(const char *folder, bool encoder, bool decoder, vae_tiling tiling, bool allow_unknown);
const vae_config *vae_settings(const vae *v);
const weights *vae_weights(const vae *v);
int64_t vae_scale(const vae_config *c);             /* pixels per latent, in space */
int64_t vae_tiles(const vae_config *c, bool decode, int64_t h, int64_t w);  /* of h x w pixels, or latents to decode */
int64_t vae_latent_frames(const vae_config *c, int64_t frames);     /* what the encoder makes of that many frames */
int64_t vae_video_frames(const vae_config *c, int64_t frames);      /* and the decoder of that many latent frames */
/* [T][H][W][in_channels] in -1..1 -> moments [F][h][w][2 Z]: mean, logvar (not clamped) */
tensor vae_encode(const run *r, const vae *v, tensor pixels);
/* latents (already divided by scaling_factor) [F][h][w][Z] -> [T][H][W][out_channels], not clamped */
tensor vae_decode(const run *r, const vae *v, tensor latents);

/* A measurement: one residual block of c channels; returns its state for bench_resblock. */
void *bench_resblock_new(arena *a, int64_t c, int64_t t, int64_t h, int64_t w);
void bench_resblock(void *state);

/* ---------------------------------------------------------------- dit.c: CLIP image tower and DiT */

typedef struct {                /* image_encoder/config.json and preprocessor_config.json */
    config file, preprocessor;
    int64_t hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, image_size, patch_size;
    activation hidden_act;
    int64_t shortest_edge, crop_size;
    double layer_norm_eps, rescale_factor, image_mean[3], image_std[3];
} clip_config;
typedef struct clip clip;
clip *clip_open(const char *folder, bool allow_unknown);
const clip_config *clip_settings(const clip *c);
const weights *clip_weights(const clip *c);
image clip_preprocess(const clip_config *c, image picture);         /* resized and cropped, 8 bits */
/* the picture as clip_preprocess leaves it -> the last layer's tokens but the class token [patches][hidden_size] */
tensor clip_encode(const run *r, const clip *c, image crop);

/* Frames in the time table: PositionalEncoding(max_len=512) in attention.py of the public code. */
enum { TIME_ROWS = 512 };
typedef struct {                /* transformer/config.json */
    config file;
    int64_t num_attention_heads, attention_head_dim, hidden_size, num_layers, inner;    /* inner: of the feed-forward */
    int64_t patch_size, in_channels, out_channels, n_query, projection_dim;     /* projection_dim: CLIP's width */
    int64_t cross_attention_dim, cross_attention_dim_t5, pooled_projection_dim, text_len, text_len_t5;
} dit_config;
typedef enum { FP8_OFF, FP8_LITE, FP8_STRONG, FP8_EXTREME } fp8_mode;
typedef struct {                /* what a run makes of the transformer's weights; the files on disk stay as they are */
    const safetensors *const *loras; const double *scales; int nloras;  /* low-rank updates; what each is worth */
    fp8_mode fp8; dtype fp8_type;   /* weights rounded to F8_E4M3 or F8_E5M2 */
} dit_changes;
typedef struct dit dit;
dit *dit_open(const char *folder, dit_changes changes, bool allow_unknown);
const dit_config *dit_settings(const dit *d);
const weights *dit_weights(const dit *d);

typedef struct { weight emb1, mask1, emb2, mask2; } control;        /* one row of embeddings.safetensors */

/* Everything a call of the DiT is told that does not change from step to step. */
typedef struct {
    int64_t rows;               /* B */
    tensor extra;               /* [B][D] extra_embedder([pooled, meta, style]) */
    tensor text;                /* [B][text_len + text_len_t5][X] */
    tensor image;               /* [B][Q][X]: the positive row sees CLIP, the negative clip_padding */
    tensor padding;             /* [B][Q][X]: clip_padding only */
} dit_condition;
/* rows: [negative, positive] or [positive]; tokens: CLIP's [patches][width], or ndim 0: no picture. */
dit_condition dit_conditions(const run *r, const dit *d, const control *rows, int64_t count, tensor tokens,
                             int64_t height, int64_t width);

/* TeaCache (public: HunyuanTransformer3DModel.TeaCacheParameters). threshold 0: off. */
typedef struct {
    double threshold; int64_t skip_start, skip_end, steps;
    int64_t count, cached;      /* calls since the count was last 0; calls that used the cache */
    double sum, delta;          /* accumulated change; the polynomial's value at this call, 0 where none */
    bool computed, stored;      /* this call computed (or used the cache); and its residual is kept */
    tensor last, residual;      /* [B][N][D] block 0's modulated input, and norm_out's output - patch tokens */
} tea_cache;
/* Enhance-A-Video scales attn1's output in calls skip_start .. steps - skip_end - 1 (EnhanceAVideoParameters). */
typedef struct { bool enabled; double weight; int64_t skip_start, skip_end, steps; } enhance;

/* latents [F][h][w][Z], inpaint [F][h][w][2 Z] at timestep t -> [B][F][h][w][out_channels]. see_image: the positive row
 * sees c.image, otherwise all rows c.padding. call: the index, for dump names. */
tensor dit_forward(const run *r, const dit *d, const dit_condition *c, tensor latents, tensor inpaint, double t,
                   bool see_image, int64_t call, tea_cache *tea, const enhance *eav);
/* Whether a call looks at latents and inpaint: no stage that is given comes between. */
bool dit_sees_latents(const run *r, const dit *d, int64_t call);

/* A measurement: one block of the published size on n random tokens, one guidance row. */
void *bench_block_new(arena *a, int64_t n);
void bench_block(void *state);

/* ---------------------------------------------------------------- ruyi.c: schedulers, pipeline, command line */

typedef enum { DDIM, EULER, EULER_A, DPMPP, PNDM, SCHEDULERS } sched_type;
typedef enum { EPSILON, SAMPLE, V_PREDICTION } prediction;
typedef enum { LEADING, TRAILING, LINSPACE } spacing;
typedef struct {                /* scheduler/scheduler_config.json, as the class of that type reads it */
    config file;
    sched_type type;
    int64_t num_train_timesteps, steps_offset;
    double beta_start, beta_end;
    const char *beta_schedule;  /* linear, scaled_linear, squaredcos_cap_v2 */
    double *trained_betas;
    prediction prediction_type;
    spacing timestep_spacing;
    bool set_alpha_to_one, clip_sample, rescale_betas_zero_snr, thresholding, skip_prk_steps;
    double clip_sample_range, dynamic_thresholding_ratio, sample_max_value;
} sched_config;
typedef struct {
    sched_config config;
    float *betas, *alphas_cumprod;  /* [num_train_timesteps] */
    int64_t steps, calls;       /* asked for; timesteps, and calls of the model (PNDM: more) */
    double *timesteps;          /* [calls] */
    float *sigmas;              /* [calls + 1], Euler, Euler A, DPM++ */
    double init_noise_sigma;
    int64_t index;              /* calls done */
    tensor history[5];          /* DPM++: the clean sample before; PNDM: three outputs, newest first, a sample, a sum */
} scheduler;
sched_config sched_read(const char *folder, sched_type type);
scheduler sched_new(arena *a, sched_config c, int64_t steps, shape latents);
void sched_free(scheduler *s);
void sched_input(const scheduler *s, tensor x, tensor sample);      /* x = scale_model_input(sample) at the next call */
void sched_step(scheduler *s, tensor sample, tensor v, tensor noise);   /* sample becomes the next; v: model's output */

void progress(const run *r, const char *stage, int64_t done, int64_t total);
/* The VAE's next slice, in the order of computing: taken from the checkpoint where that has it, or put into it. */
bool slice_restored(const run *r, tensor out);
void slice_save(const run *r, tensor out);

#endif
