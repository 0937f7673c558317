/* tensor.c - memory, arithmetic and random numbers: all the numeric work that knows nothing of the model.
 *
 * In reading order, each product from its definition (a textbook loop, ..._plain) to its tiles; right: what it mirrors.
 *
 *     arena, tensors  one block for all activations, planned by running the same code without data
 *     widening        F64 F32 F16 BF16 F8 weights to `real`; low-rank updates, FP8 rounding            Tensor.to
 *     functions       exp2, exp, log, erf, sin, cos
 *     products        linear_plain -> micro_tile: outputs in registers -> product_block: chunks x rows x tiles
 *                     -> product_run: panels x tasks -> linear                                         F.linear
 *     convolution     conv_line: padding -> conv_plain -> conv_copy: rows of the same product -> conv  F.conv3d
 *     attention       attention_plain -> scores, softmax, values -> attention      F.scaled_dot_product_attention
 *     norms           layer_norm, group_norm, head_norm_rotary                     F.layer_norm, F.group_norm
 *     elementwise     activate, add, gate_gelu                                     F.silu, F.gelu
 *     random          generator_seed, generator_randn                torch.Generator, torch.randn of CPU and GPU
 *
 * Interface (ruyi.h; all else is static): an operation takes the arena, its output y, its inputs and a layer; checks
 * their shapes; takes scratch; computes where there are data (none while planning); gives the scratch back (before it
 * computes, where nothing else can be taken meanwhile).
 *
 * Invariants. Every sum has one order:
 *     linear, conv   acc = bias; for each 256 consecutive k: s = 0; s = fma(x, w, s) in order; acc = acc + s
 *     attention      keys in chunks of 256, online softmax in base 2, one query at a time
 *     norms          8 interleaved sums in double, added as ((0+4)+(2+6))+((1+5)+(3+7))
 * Threads and vector lanes only ever split independent outputs. So the bytes do not depend on the compiler, the
 * instruction set, the number of threads or the size of a tile. -ffp-contract=off keeps a*b+c two roundings; where
 * one rounding is meant, the text says fma.
 */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE     /* madvise */
#endif
#include "ruyi.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* A parallel loop needs a `bool large` in scope: waking threads costs more than small work does. */
#ifdef _OPENMP
#include <omp.h>
#define PARALLEL_FOR _Pragma("omp parallel for schedule(dynamic) if(large)")
#define PARALLEL_FOR_EVEN _Pragma("omp parallel for schedule(static) if(large)")
/* Which of the threads runs this: chooses its scratch, never a number. */
static int thread_number(void) { return omp_get_thread_num(); }
int64_t ruyi_threads(void) { return omp_get_max_threads(); }
#else
#define PARALLEL_FOR (void)large;
#define PARALLEL_FOR_EVEN (void)large;
static int thread_number(void) { return 0; }
int64_t ruyi_threads(void) { return 1; }
#endif

/* Loops over a register tile must vanish, or it would live in memory. Compilers without a word for it are slow. */
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL
#endif
#ifdef __GNUC__
#define ALWAYS_INLINE inline __attribute__((always_inline))
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define ALWAYS_INLINE inline
#define PREFETCH(address) (void)(address)
#endif

enum {
    CHUNK = 256,                /* terms in one partial sum: part of the definition, not a tuning knob */
    SMALL = 1 << 15,            /* elements that one thread does alone */
};

/* fma_real is fmaf or fma, whichever rounds to `real`: C's generic name would need <tgmath.h>. */
static real fma_real(real a, real b, real c) { return _Generic(c, float: fmaf, double: fma)(a, b, c); }

/* ---------------------------------------------------------------- arena
 *
 *     base                low                               size - high        size
 *     |  temporaries  ->  |             free                |  <-  caches      |
 *
 * An operation marks, allocates what it needs, computes, and resets: memory is a stack, and its peak is known before a
 * run starts, because the planning pass makes the very same calls. Nothing is zeroed or given back to the system in
 * between: the first touch of fresh memory is slow (4 KB pages at 0.45 GB/s on a server), and an arena has it once.
 */

enum { ALIGNMENT = 64 };    /* one cache line, and the widest vector register */

/* An arena without memory: everything gets a shape, nothing gets data, the peak is recorded. */
arena arena_plan(void) { return (arena){ .size = SIZE_MAX / 2, .planning = true }; }

/* An arena of that many bytes. Dies with SYSTEM_ERROR when the system will not give them. */
arena arena_new(size_t bytes)
{
    arena a = { .size = (bytes + ALIGNMENT) / ALIGNMENT * ALIGNMENT };
    a.base = aligned_alloc(ALIGNMENT, a.size);      /* what is missing is missing now, before the first hour of work */
    MUST(a.base, "memory: arena: wanted %zu bytes, got none; use a smaller --size, fewer --frames, or a machine with "
         "more memory", a.size);
#ifdef MADV_HUGEPAGE
    uintptr_t page = 4096, first = ((uintptr_t)a.base + page - 1) / page * page, end = (uintptr_t)a.base + a.size;
    if (end > first + page)     /* a hint: 2 MB pages make the first touch many times faster */
        madvise((void *)first, end - first, MADV_HUGEPAGE);
#endif
    return a;
}

void arena_free(arena *a)
{
    free(a->base);
    *a = (arena){ 0 };
}

/* Marks and resets. A tensor made after a mark is gone after the reset to it: its memory will be used again. */
size_t arena_mark(const arena *a) { return a->low; }
void arena_reset(arena *a, size_t mark) { a->low = mark; }
size_t arena_mark_high(const arena *a) { return a->high; }
void arena_reset_high(arena *a, size_t mark) { a->high = mark; }

/* Bytes of count elements, rounded up to whole cache lines. A product beyond the address space is the input's fault:
 * some --size or --frames that no machine can hold. */
static size_t padded(size_t count, size_t size)
{
    NEED(!size || count <= SIZE_MAX / 4 / size, "memory: a tensor of %zu x %zu bytes cannot be addressed; use a "
         "smaller --size or fewer --frames", count, size);
    return (count * size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

/* Counts bytes in at one end; the caller computes the address. While planning a full arena means that the address space
 * is full, too; afterwards it means that the two passes took different ways, which is a bug. */
static void take(arena *a, size_t *end, size_t bytes)
{
    if (bytes > a->size - a->low - a->high)
        die(a->planning ? BAD_INPUT : SYSTEM_ERROR, "memory: arena of %zu bytes is full, %zu more wanted%s",
            a->size, bytes, a->planning ? "; use a smaller --size or fewer --frames"
                                        : " than the plan foresaw (a bug: please report it)");
    *end += bytes;
    if (a->low + a->high > a->peak)
        a->peak = a->low + a->high;
}

/* Scratch of count elements of that size, from the low end; uninitialised. NULL while planning. */
void *arena_alloc(arena *a, size_t count, size_t size)
{
    size_t at = a->low;
    take(a, &a->low, padded(count, size));
    return a->planning ? NULL : a->base + at;
}

/* ---------------------------------------------------------------- tensors
 *
 * A tensor is a view: a pointer and a shape, passed by value. It owns nothing; the arena owns all. Elements lie in C
 * order without gaps, the last dimension side by side: channels, in all of this program, so that a pixel or a token is
 * one run of memory and a layer's input is a matrix of rows. NCHW, PyTorch's order, exists only in files (stages in
 * io.c). While planning data is NULL; every loop over elements then has nothing to do.
 */

/* A parameter of that shape, without updates or rounding, on those bytes. */
weight weight_of(const unsigned char *data, dtype type, shape s, const char *key)
{
    weight w = { .data = data, .type = type, .ndim = s.ndim, .key = key };
    memcpy(w.dim, s.dim, sizeof w.dim);
    return w;
}

/* A view of that shape on those elements. */
tensor tensor_of(real *data, shape s)
{
    tensor x = { .data = data, .ndim = s.ndim };
    memcpy(x.dim, s.dim, sizeof x.dim);
    return x;
}

/* Elements of a shape; 1 for a scalar. Dies where the count leaves int64_t. */
size_t shape_count(shape s)
{
    size_t n = 1;
    for (int i = 0; i < s.ndim; i++) {
        NEED(s.dim[i] >= 0 && (!s.dim[i] || n <= (size_t)(INT64_MAX / s.dim[i])),
             "memory: a tensor with a side of %lld cannot be addressed", ll(s.dim[i]));
        n *= (size_t)s.dim[i];
    }
    return n;
}

/* An uninitialised tensor from the arena's low end. */
tensor tensor_new(arena *a, shape s) { return tensor_of(arena_alloc(a, shape_count(s), sizeof(real)), s); }

/* An uninitialised tensor from the arena's high end. */
tensor tensor_new_high(arena *a, shape s)
{
    take(a, &a->high, padded(shape_count(s), sizeof(real)));
    return tensor_of(a->planning ? NULL : (real *)(void *)(a->base + (a->size - a->high)), s);
}

/* Elements of a tensor, and of a parameter: their shapes were checked when they were made. */
static int64_t count_of(int ndim, const int64_t *dim)
{
    int64_t n = 1;
    for (int i = 0; i < ndim; i++)
        n *= dim[i];
    return n;
}
int64_t tensor_count(tensor x) { return count_of(x.ndim, x.dim); }
static int64_t weight_count(weight w) { return count_of(w.ndim, w.dim); }

/* A tensor's shape, to make another of it. */
shape tensor_shape(tensor x)
{
    shape s = { .ndim = x.ndim };
    memcpy(s.dim, x.dim, sizeof s.dim);
    return s;
}

/* The same elements in another shape of the same count: video as tokens [T][H][W][C] -> [T H W][C], and back. */
tensor tensor_view(tensor x, shape s)
{
    MUST((int64_t)shape_count(s) == tensor_count(x), "internal: view of %lld elements as %zu", ll(tensor_count(x)),
         shape_count(s));
    return tensor_of(x.data, s);
}

/* x[first : first + count] along the first dimension: frames of a video, rows of a batch. No copy. */
tensor tensor_part(tensor x, int64_t first, int64_t count)
{
    MUST(first >= 0 && count >= 0 && first + count <= x.dim[0], "internal: part %lld + %lld of %lld", ll(first),
         ll(count), ll(x.dim[0]));
    if (x.data && x.dim[0])
        x.data += first * (tensor_count(x) / x.dim[0]);
    x.dim[0] = count;
    return x;
}

/* Dies where a tensor does not have the shape that a stage needs: a bug of the program, never of an input. */
static void tensor_check(tensor x, shape expected, const char *what)
{
    bool same = x.ndim == expected.ndim;
    for (int i = 0; same && i < x.ndim; i++)
        same = x.dim[i] == expected.dim[i];
    MUST(same, "internal: %s: got [%lld, %lld, ...] of %d dimensions, expected [%lld, %lld, ...] of %d", what,
         ll(x.dim[0]), ll(x.dim[1]), x.ndim, ll(expected.dim[0]), ll(expected.dim[1]), expected.ndim);
}

/* Every element becomes value. */
void tensor_fill(tensor x, real value)
{
    for (int64_t i = 0, n = x.data ? tensor_count(x) : 0; i < n; i++)
        x.data[i] = value;
}

/* The elements of `from` in order, whatever the two shapes are; their counts must agree, their memory may overlap. */
void tensor_copy(tensor to, tensor from)
{
    MUST(tensor_count(to) == tensor_count(from), "internal: copy of %lld elements to %lld", ll(tensor_count(from)),
         ll(tensor_count(to)));
    if (to.data)
        memmove(to.data, from.data, (size_t)tensor_count(to) * sizeof(real));
}

/* Resets to the mark but keeps x, which moves down to the mark. The last line of every operation that makes one
 * tensor from others: its temporaries, and its inputs above the mark, are gone. */
tensor arena_return(arena *a, size_t mark, tensor x)
{
    arena_reset(a, mark);
    tensor kept = tensor_new(a, tensor_shape(x));
    tensor_copy(kept, x);
    return kept;
}

/* ---------------------------------------------------------------- widening
 *
 * A checkpoint's numbers, as safetensors stores them, little-endian:
 *
 *              bits  sign  exponent (bias)  mantissa   special
 *     F64        64     1      11 (1023)          52   inf, nan
 *     F32        32     1       8 (127)           23   inf, nan
 *     BF16       16     1       8 (127)            7   the upper half of an F32
 *     F16        16     1       5 (15)            10   inf, nan
 *     F8_E5M2     8     1       5 (15)             2   the upper half of an F16
 *     F8_E4M3     8     1       4 (7)              3   no inf; 0x7f and 0xff are nan
 *
 * All widen to float exactly, subnormals and signed zeros included (the golden data has every code of the small types),
 * and F64 is rounded where `real` is float. Nothing else in the program looks at a checkpoint's bytes.
 *
 * Example: 1.5 = 1.1 in binary x 2^0 is 0 01111111 1000000 in BF16 (0x3fc0; exponent 127 - bias 127), 0 01111
 * 1000000000 in F16 (0x3e00) and 0 0111 100 in F8_E4M3 (0x3c). BF16 has the range of F32 with two to three decimal
 * digits, F16 has three to four but ends at 65504; F8_E4M3 has one, and ends at 448.
 */

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
enum { SWAP = 1 };
#else
enum { SWAP = 0 };
#endif

/* Unaligned little-endian loads: memcpy becomes one instruction, and the swap vanishes where there is none. */
static inline uint32_t load16(const unsigned char *p)
{
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return SWAP ? (uint32_t)(v >> 8 | (v & 0xff) << 8) : v;
}

static inline uint32_t load32(const unsigned char *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return SWAP ? load16(p) | load16(p + 2) << 16 : v;
}

static inline uint64_t load64(const unsigned char *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return SWAP ? load32(p) | (uint64_t)load32(p + 4) << 32 : v;
}

typedef union { float f; uint32_t bits; } float_union;
static inline float bits_float(uint32_t bits) { return (float_union){ .bits = bits }.f; }
static inline uint32_t float_bits(float f) { return (float_union){ .f = f }.bits; }

/* IEEE half, sign 1 exponent 5 mantissa 10: moved into a float's fields, then multiplied by the difference of the
 * biases, which is exact and does subnormals too. An exponent of all ones stays all ones (inf, nan). */
static inline float f16_float(uint32_t h)
{
    uint32_t magnitude = float_bits(bits_float((h & 0x7fff) << 13) * 0x1p112f);
    return bits_float(magnitude | ((h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0) | (h & 0x8000) << 16);
}

/* OCP F8 E4M3 (the FN form: no infinities, all ones is nan), by the same move. */
static inline float e4m3_float(uint32_t b)
{
    uint32_t magnitude = float_bits(bits_float((b & 0x7f) << 20) * 0x1p120f);
    return bits_float(((b & 0x7f) == 0x7f ? 0x7fc00000u : magnitude) | (b & 0x80) << 24);
}

/* A row of a table of loops over i < count: a function pointer would be called once an element. */
#define CASE(value, statement) case value: for (int64_t i = 0; i < count; i++) statement; break

/* count elements of type t at p, widened to real. Integers and BOOL are for masks. */
static void widen(const unsigned char *p, dtype t, int64_t count, real *out)
{
    switch (t) {
    CASE(F64,  out[i] = (real)bits_double(load64(p + 8 * i)));
    CASE(F32,  out[i] = bits_float(load32(p + 4 * i)));
    CASE(F16,  out[i] = f16_float(load16(p + 2 * i)));
    CASE(BF16, out[i] = bits_float(load16(p + 2 * i) << 16));
    CASE(F8_E4M3, out[i] = e4m3_float(p[i]));
    CASE(F8_E5M2, out[i] = f16_float((uint32_t)p[i] << 8));
    case BOOL: case U8: CASE(I8, out[i] = (real)(p[i] != 0));
    case U16: CASE(I16, out[i] = (real)(load16(p + 2 * i) != 0));
    case U32: CASE(I32, out[i] = (real)(load32(p + 4 * i) != 0));
    case U64: CASE(I64, out[i] = (real)(load64(p + 8 * i) != 0));
    default: die(BAD_INPUT, "weights: dtype %s cannot be computed with; convert the file to BF16, F16 or F32",
                 dtype_name[t]);
    }
}

/* x [count] rounded to FP8 in place, to nearest even, as torch casts: beyond the largest number comes nan (E4M3) or
 * infinity (E5M2), not the largest number. Both ways to round use the bits that a float has left over: above the
 * smallest normal number by adding half of what is dropped, below by adding and taking off 2^23 of its last places. */
static void round_fp8(real *x, int64_t count, dtype t)
{
    bool e4m3 = t == F8_E4M3;
    uint32_t drop = e4m3 ? 20 : 21, half = (1u << (drop - 1)) - 1;
    float normal = e4m3 ? 0x1p-6f : 0x1p-14f, magic = e4m3 ? 0x1p14f : 0x1p7f;      /* 2^23 * 2^-9, 2^23 * 2^-16 */
    float largest = e4m3 ? 448.0f : 57344.0f, beyond = e4m3 ? NAN : INFINITY;
    for (int64_t i = 0; i < count; i++) {
        float f = (float)x[i], size = fabsf(f);
        uint32_t bits = float_bits(size);
        float large = bits_float((bits + half + (bits >> drop & 1)) & ~(2 * half + 1)), small = (size + magic) - magic;
        float rounded = size < normal ? small : large > largest ? beyond : large;
        x[i] = isnan(f) ? f : copysignf(rounded, f);
    }
}

/* Element `at` of a parameter, as it is stored. */
static const unsigned char *weight_at(weight w, int64_t at) { return w.data + at * (dtype_bits[w.type] / 8); }

/* out[0..count) = W[row][first .. first + count), W taken as a matrix of dim[0] rows, as it is stored or is to be
 * (--fp8). Low-rank updates are added here, in the order of the files: W += scale * up[row][r] * down[r], r in order;
 * down [rank][Cin] of a convolution [Cout][taps][Cin] is the same for all taps. The matrix on disk stays as it is. */
void weight_row(weight w, int64_t row, int64_t first, int64_t count, real *out)
{
    int64_t at_row = row ? row * (weight_count(w) / w.dim[0]) : 0;
    widen(weight_at(w, at_row + first), w.type, count, out);
    if (w.fp8)
        round_fp8(out, count, w.fp8);
    for (const lora *l = w.lora; l; l = l->next)
        for (int64_t r = 0; r < l->up.dim[1]; r++) {
            real up, down[CHUNK];
            weight_row(l->up, row, r, 1, &up);
            up *= l->scale;
            for (int64_t k = 0, n; k < count; k += n) {
                int64_t at = (first + k) % l->down.dim[1];
                n = lesser(lesser(CHUNK, count - k), l->down.dim[1] - at);
                weight_row(l->down, r, at, n, down);
                for (int64_t i = 0; i < n; i++)
                    out[k + i] = fma_real(up, down[i], out[k + i]);
            }
        }
}

/* A whole small parameter (bias, norm weight, table), widened into the arena. NULL if absent, and while planning. Large
 * ones are never widened as a whole: rows are, as they are packed, so that BF16 weights take half of F32's memory. */
real *weight_vector(arena *a, weight w)
{
    if (!w.data)
        return NULL;
    int64_t n = weight_count(w), rows = w.lora ? w.dim[0] : 1;
    real *out = arena_alloc(a, (size_t)n, sizeof(real));
    for (int64_t row = 0; row < rows && out; row++)
        weight_row(w, row, 0, n / rows, out + row * (n / rows));
    return out;
}

/* Rows [first, first + count) of a packed parameter: q, k, v of an in_proj. A view; the bytes are the file's. */
weight weight_rows(weight w, int64_t first, int64_t count)
{
    w.data = weight_at(w, first * (weight_count(w) / w.dim[0]));
    w.dim[0] = count;
    return w;
}

/* ---------------------------------------------------------------- functions
 *
 * Libraries differ in the last bit of exp, sin, log and erf, and so would our results from one machine to the next.
 * These are built from operations that IEEE 754 rounds in one way only: + - * / sqrt, fma, and moves of bits. exp2 is
 * in the inner loop of softmax and of every activation, so it exists in `real`; the others fill tables or gates and
 * compute in double for both builds, which then share one text. tests/unit.c sweeps each against libm.
 */

/* ln 2 as the nearest double and what that leaves out; log2 e. */
#define LN2_HI 0x1.62e42fefa39efp-1
#define LN2_LO 0x1.abc9e3b39803fp-56
#define LOG2_E 0x1.71547652b82fep+0

/* 2^x in `real`, for softmax and the activations: no branch, no conversion, so that loops over it become vectors.
 * Formula: 2^x = 2^n 2^f = 2^n sum_i (f ln 2)^i / i!
 * Method:  x = n + f with |f| <= 1/2; 2^f by its Taylor series (degree 7 in float, 13 in double), times 2^n. Adding
 *          1.5 * 2^23 (2^52) rounds x to n and leaves n in the low bits of the sum, from where it is shifted into an
 *          exponent: n + 127 (1023) there, so that -127 (-1023) gives the number 0 and 128 (1024) infinity.
 * Special: 0 from x < -126.5 (-1022.5) down, infinity from x >= 128 (1024) up, nan nan.
 * Accuracy: relative error below 1.5e-7 in float, 4e-16 in double, wherever 2^x is a normal number. */
static inline real exp2_real(real x)
{
    static const real c[] = { 1, (real)0x1.62e42fefa39efp-1, (real)0x1.ebfbdff82c58fp-3, (real)0x1.c6b08d704a0cp-5,
        (real)0x1.3b2ab6fba4e77p-7, (real)0x1.5d87fe78a6731p-10, (real)0x1.430912f86c787p-13,
        (real)0x1.ffcbfc588b0c7p-17, (real)0x1.62c0223a5c824p-20, (real)0x1.b5253d395e7c4p-24,
        (real)0x1.e4cf5158b8ecap-28, (real)0x1.e8cac7351bb25p-32, (real)0x1.c3bd650fc299p-36,
        (real)0x1.816193166d0f9p-40 };
    const bool single = sizeof(real) == sizeof(float);
    const real low = single ? -127 : -1023, high = single ? 128 : 1024;
    const real round = single ? (real)0x1.8p23 : (real)0x1.8p52;
    x = x < low ? low : x;
    x = x > high ? high : x;
    real sum = x + round, f = x - (sum - round), p = single ? c[7] : c[13];
    UNROLL for (int i = single ? 6 : 12; i >= 0; i--)
        p = fma_real(p, f, c[i]);
    return p * (single ? (real)bits_float((float_bits((float)sum) + 127) << 23)
                       : (real)bits_double((double_bits((double)sum) + 1023) << 52));
}

/* Formula: e^x = 2^n e^r, x = n ln 2 + r
 * Method:  |r| <= 0.35, ln 2 in two parts; Taylor series to r^14; times 2^n by the exponent's bits.
 * Special: none; |x| <= 700, so that n stays an exponent.
 * Accuracy: relative error below 3e-16. */
double exp_own(double x)
{
    double n = rint(x * LOG2_E);
    double r = fma(-n, LN2_LO, fma(-n, LN2_HI, x));
    double p = 1;
    for (int i = 14; i > 0; i--)
        p = fma(p, r / i, 1);
    return p * bits_double((uint64_t)((int64_t)n + 1023) << 52);
}

/* Formula: ln x = e ln 2 + ln m = e ln 2 + 2 (s + s^3/3 + s^5/5 + ...), x = 2^e m, s = (m - 1)/(m + 1)
 * Method:  sqrt(1/2) <= m < sqrt(2), so that |s| < 0.18; the series to s^25; ln 2 in two parts.
 * Special: -infinity for 0; other x must be positive and normal.
 * Accuracy: relative error below 3.5e-16. */
double log_own(double x)
{
    if (x == 0)
        return -INFINITY;
    uint64_t bits = double_bits(x);
    int64_t e = (int64_t)(bits >> 52) - 1022;
    double m = bits_double((bits & 0xfffffffffffffULL) | 0x3fe0000000000000ULL);    /* 0.5 <= m < 1 */
    if (m < 0.70710678118654752440) {
        m *= 2;
        e -= 1;
    }
    double s = (m - 1) / (m + 1), z = s * s, p = 0;
    for (int i = 25; i > 1; i -= 2)
        p = fma(p, z, 1.0 / i);
    double tail = fma(2 * s * z, p, (double)e * LN2_LO);
    return fma((double)e, LN2_HI, 2 * s + tail);
}

/* Formula: erf x = 2/sqrt(pi) e^(-x^2) x sum_n t^n / (3 * 5 * ... * (2n + 1)), t = 2 x^2,
 *                = 1 - e^(-x^2)/sqrt(pi) / (x + (1/2)/(x + (2/2)/(x + (3/2)/(x + ...))))
 * Method:  |x| < 2: the first; every term is positive, nothing cancels; terms until they no longer count. Beyond: the
 *          second, 60 levels.
 * Special: 1 and -1 from |x| = 6; nan nan.
 * Accuracy: relative error below 1.4e-15. */
static double erf_own(double x)
{
    double size = fabs(x), below = 0;
    if (!(size < 6))
        return x > 0 ? 1 : x < 0 ? -1 : x;
    if (size >= 2) {
        for (int n = 60; n > 0; n--)
            below = 0.5 * n / (size + below);
        double tail = 0.56418958354775628695 * exp_own(-x * x) / (size + below);
        return x > 0 ? 1 - tail : tail - 1;
    }
    double t = 2 * x * x, term = 1, sum = 1;
    for (int n = 1; term > sum * 0x1p-55; n++) {
        term *= t / (2 * n + 1);
        sum += term;
    }
    return 1.12837916709551257390 * exp_own(-x * x) * x * sum;
}

/* Formula: sin r = r - r^3/3! + ..., cos r = 1 - r^2/2! + ..., x = k pi/2 + r
 * Method:  |r| <= 0.79, pi/2 in two parts; both series to r^19 and r^18; swapped and signed by k mod 4.
 * Special: none; |x| < 1e5.
 * Accuracy: absolute error below 2e-16. */
void sincos_own(double x, double *sine, double *cosine)
{
    double k = rint(x * 0.63661977236758134308);
    double r = fma(-k, 0x1.1a62633145c07p-54, fma(-k, 0x1.921fb54442d18p+0, x));
    double z = r * r, s = 1, c = 1;
    for (int i = 18; i > 1; i -= 2) {
        s = fma(s, -z / (i * (i + 1)), 1);
        c = fma(c, -z / (i * (i - 1)), 1);
    }
    s *= r;
    int quarter = (int)((int64_t)k & 3);
    *sine = quarter == 0 ? s : quarter == 1 ? c : quarter == 2 ? -s : -c;
    *cosine = quarter == 0 ? c : quarter == 1 ? -s : quarter == 2 ? -c : s;
}

/* ---------------------------------------------------------------- products: y = x W^T + b, the definition
 *
 * The textbook loops (this, conv_plain, attention_plain) are short, slow, and the same bits as the kernels, which
 * tests/unit.c compares by memcmp. Whoever ports this program needs only these to get the same numbers.
 * Why chunks of 256: one chain of K additions has an error that grows with sqrt(K); a sum of partial sums grows with
 * sqrt(256) + sqrt(K / 256). At K = 2816 that was measured as three times less, at 12288 as six times. And 256 terms
 * are what a micro-kernel works off before its operands leave the first-level cache.
 */

/* y [m][n] = b [n] + x [m][k] w [n][k]^T. b may be NULL. */
void linear_plain(real *y, const real *x, const real *w, const real *b, int64_t m, int64_t n, int64_t k)
{
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            real acc = b ? b[j] : 0;
            for (int64_t first = 0; first < k; first += CHUNK) {
                real s = 0;
                for (int64_t c = first; c < lesser(first + CHUNK, k); c++)
                    s = fma_real(x[i * k + c], w[j * k + c], s);
                acc = acc + s;
            }
            y[i * n + j] = acc;
        }
}

/* ---------------------------------------------------------------- the micro-kernel
 *
 *                              NR outputs, packed b [k][NR]
 *                              b b b b b b b b
 *     MR rows of a    a   ->   . . . . . . . .      for each k: load one row of b (NV vectors),
 *     [MR][STRIDE]    a   ->   . . . . . . . .      broadcast MR numbers of a, MR x NV multiply-adds
 *                     a   ->   . . . . . . . .
 *
 * A tile of MR x NR outputs is held in registers while k runs over one chunk: NR = NV vectors of LANES outputs that
 * lie side by side, MR broadcast values of the other operand. Each lane is one output with its own sum, so the
 * vectors change nothing in the arithmetic. The wrappers differ only in how an instruction set spells a vector fma;
 * where there is none, a "vector" is one number and the same text is a plain register-blocked loop.
 */
#if defined(__AVX512F__)
#include <immintrin.h>
#define VECTOR_BYTES 64
#define VECTOR_FMA(a, b, c) _Generic((real)0, float: _mm512_fmadd_ps, double: _mm512_fmadd_pd)(a, b, c)
enum { MR = 14, NV = 2 };
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define VECTOR_BYTES 32
#define VECTOR_FMA(a, b, c) _Generic((real)0, float: _mm256_fmadd_ps, double: _mm256_fmadd_pd)(a, b, c)
enum { MR = 6, NV = 2 };
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#define VECTOR_BYTES 16
#define VECTOR_FMA(a, b, c) _Generic((real)0, float: vfmaq_f32, double: vfmaq_f64)(c, a, b)
enum { MR = 12, NV = 2 };
#else
enum { MR = 4, NV = 4 };
#endif

#ifdef VECTOR_BYTES
/* A GNU vector: + - * work lane by lane in any compiler that has the attribute; fma needs the instruction's name. */
typedef real vec __attribute__((vector_size(VECTOR_BYTES)));
static inline vec vec_fma(vec a, vec b, vec c) { return VECTOR_FMA(a, b, c); }
static inline vec vec_all(real x) { return x - (vec){ 0 }; }        /* x - 0 is x, also for x = -0 */
#else
typedef real vec;
static inline vec vec_fma(vec a, vec b, vec c) { return fma_real(a, b, c); }
static inline vec vec_all(real x) { return x; }
#endif

/* AVX-512: 14 x 2 accumulators, 2 vectors of W, 1 broadcast, of 32 registers. AVX2: 6 x 2 of 16. NEON: 12 x 2 of 32.
 * Fewer would leave multiply-adds waiting for each other (4 cycles, two a cycle), more would spill. */
enum {
    LANES = sizeof(vec) / sizeof(real),
    NR = NV * LANES,            /* outputs in a row of the tile, a power of two */
    LOW = 4,                    /* rows of the lowest tile */
    STRIDE = CHUNK + 16,        /* row stride of the copied operand: 272 avoids the 4 KB that caches alias on */
};

/* out[r][0 .. vectors * LANES) = before[r][...] + (sum over k < count of a[r][k] * b[k][...], from 0, in order).
 * a: [rows][STRIDE]; b: [count][vectors * LANES]; rows of before (NULL: the sum alone) lie `above` apart (0: one row
 * for all), those of out `below`.
 * rows and vectors are constants where it is inlined, so that all sums stay in registers. */
#define OPERANDS \
    int64_t count, const real *a, const real *b, const real *before, int64_t above, real *out, int64_t below
static ALWAYS_INLINE void micro_tile(OPERANDS, const int rows, const int vectors)
{
#define EACH_ROW UNROLL for (int r = 0; r < MR; r++) if (r < rows)
#define EACH_VECTOR UNROLL for (int v = 0; v < NV; v++) if (v < vectors)
    vec acc[MR][NV], w[NV];
    EACH_ROW EACH_VECTOR acc[r][v] = vec_all(0);
    for (int64_t k = 0; k < count; k++) {
        EACH_VECTOR memcpy(&w[v], b + (k * vectors + v) * LANES, sizeof(vec));
        EACH_ROW {
            vec x = vec_all(a[r * STRIDE + k]);
            EACH_VECTOR acc[r][v] = vec_fma(x, w[v], acc[r][v]);
        }
    }
    if (before)
        EACH_ROW EACH_VECTOR {
            memcpy(&w[v], before + r * above + v * LANES, sizeof(vec));
            acc[r][v] = w[v] + acc[r][v];
        }
    EACH_ROW EACH_VECTOR memcpy(out + r * below + v * LANES, &acc[r][v], sizeof(vec));
#undef EACH_ROW
#undef EACH_VECTOR
}

/* One function for each shape of a tile: whole, half and low ones for the last rows, narrow for the last outputs. */
typedef void micro_kernel(OPERANDS);
#define SHAPE_OF_TILE(rows, vectors) { micro_tile(count, a, b, before, above, out, below, rows, vectors); }
static void micro_full(OPERANDS) SHAPE_OF_TILE(MR, NV)
static void micro_half(OPERANDS) SHAPE_OF_TILE(MR / 2, NV)
static void micro_low(OPERANDS) SHAPE_OF_TILE(LOW, NV)
static void micro_narrow(OPERANDS) SHAPE_OF_TILE(MR, 1)

/* The smallest kernel for n rows: the last rows of a matrix would otherwise cost as much as whole tiles, and a head of
 * 88 channels, six whole tiles and four rows, a tenth more. */
static micro_kernel *micro_for(int64_t n) { return n <= LOW ? micro_low : n <= MR / 2 ? micro_half : micro_full; }

/* ---------------------------------------------------------------- products: the driver
 *
 * linear and conv are the same product; they differ in how rows of x are found.
 *
 * Formula: y[m][n] = b[n] + sum over chunks of (sum over the chunk's k of x[m][k] W[n][k])
 * Method:  W is taken in panels of as many outputs as the shared cache holds. All threads pack one, widened and turned;
 *          then each takes tasks of up to BLOCK_M rows and BLOCK_N outputs and walks the chunks: in each it copies MR
 *          rows of x beside each other and runs a tile for every NR outputs, which adds its sums to y. Every number is
 *          used as often as the memory that holds it is slow (sizes for AVX-512 and float):
 *
 *              registers   14 x 32 sums            for each k, 14 numbers of x meet 32 of W
 *              1st cache   14 x 256 of x, 14 KB    used for all columns of the task; W streams by
 *              2nd cache   512 x 256 of W, 512 KB  used for all rows of the task; and the task's outputs
 *              3rd cache   a panel of W, 16 MB     used by all tasks
 *              memory      W once; x and y once a panel and chunk
 *
 * Special: taps of a convolution on padding are computed like any: a weight that is not finite shows, wherever it is.
 *          Lanes and rows beyond n and m are computed and thrown away.
 * Accuracy: for finite weights linear_plain's and conv_plain's bits, whatever MR, NR and the blocks are (tests/unit.c,
 *          by memcmp).
 */
typedef struct product {
    int64_t m, n, k;
    weight w;                   /* [n][k] */
    const real *bias;           /* [n], or NULL */
    real *y;                    /* [m][n] */
    /* x[row + r][first .. first + count) to out[r * STRIDE], r < rows */
    void (*copy)(const struct product *p, int64_t row, int64_t rows, int64_t first, int64_t count, real *out);
    const real *x;
    const struct conv_rows *conv;
} product;

/* A task is up to BLOCK_M rows of BLOCK_N outputs: a chunk of its W, 512 x 256 floats, and its outputs stay in the
 * second-level cache (1 MB) while it walks the chunks. PANEL, in reals, is for the shared cache. */
enum { BLOCK_M = 160 / MR * MR, BLOCK_N = 512, PANEL = 1 << 22 };

/* Scratch of a thread, in reals: copied rows of x, one tile, widened rows of W. */
enum { ROWS = MR * STRIDE, TILE = MR * NR, WIDE = NR * STRIDE, PRODUCT_SCRATCH = ROWS + TILE + WIDE };

/* Columns [n0, n1) of W^T, widened and turned: [chunk][group of NR columns][k of the chunk][NR]. */
typedef struct { int64_t n0, n1; real *packed; } panel;

/* Where a group's chunk lies; n is the group's first column. */
static real *panel_at(const panel *w, int64_t n, int64_t first, int64_t count)
{
    return w->packed + first * (divide_up(w->n1 - w->n0, NR) * NR) + (n - w->n0) * count;
}

/* A group that has only LANES columns or fewer left is packed and run narrow. */
static int group_width(const panel *w, int64_t n) { return w->n1 - n <= LANES ? LANES : NR; }

/* Asks for a piece of a row of W while others are worked on: pieces are too short for the machine to guess the next. */
static void weight_prefetch(weight w, int64_t at, int64_t count)
{
    for (const unsigned char *p = weight_at(w, at), *end = weight_at(w, at + count); p < end; p += ALIGNMENT)
        PREFETCH(p);
}

/* One group and chunk: W[n + i][first + k] to its place [k][i], so that a tile reads it from end to end, NR numbers for
 * every k. wide: WIDE. */
static void pack_group(const product *p, const panel *w, int64_t n, int64_t first, real *wide)
{
    int width = group_width(w, n);
    int64_t count = lesser(CHUNK, p->k - first), next = lesser(CHUNK, p->k - first - count);
    real *out = panel_at(w, n, first, count);
    if (w->n1 - n < width)
        memset(wide, 0, WIDE * sizeof(real));   /* columns beyond n1 are zero */
    for (int i = 0; i < lesser(width, w->n1 - n); i++) {
        weight_prefetch(p->w, (n + i) * p->k + first + count, next);
        weight_row(p->w, n + i, first, count, wide + i * STRIDE);
    }
    for (int64_t k = 0; k < count; k++)
        for (int i = 0; i < width; i++)
            out[k * width + i] = wide[i * STRIDE + k];
}

/* Packs a panel, all threads together: each walks along the rows of W, as they lie in memory. */
static void panel_pack(const product *p, const panel *w, real *scratch)
{
    int64_t groups = divide_up(w->n1 - w->n0, NR), chunks = divide_up(p->k, CHUNK);
    bool large = (w->n1 - w->n0) * p->k > SMALL;
    PARALLEL_FOR_EVEN
    for (int64_t i = 0; i < groups * chunks; i++)
        pack_group(p, w, w->n0 + i / chunks * NR, i % chunks * CHUNK,
                   scratch + thread_number() * PRODUCT_SCRATCH + ROWS + TILE);
}

/* Asks the caches for what is needed soon: the tile's outputs [m, m + rows) from n on, and its share of the next rows
 * of x: row i, i + groups, ... of them. A convolution's are near already. */
static void prefetch(const product *p, int64_t m, int64_t rows, int64_t n, int64_t i, int64_t groups, int64_t first)
{
    for (int64_t r = 0; r < rows; r++)
        PREFETCH(p->y + (m + r) * p->n + n);
    for (int64_t r = m + MR + i; r < lesser(m + 2 * MR, p->m) && !p->conv; r += groups)
        for (int64_t k = first; k < lesser(first + CHUNK, p->k); k += ALIGNMENT / (int64_t)sizeof(real))
            PREFETCH(p->x + r * p->k + k);
}

/* y[m ..][n ..] += a chunk's sums of `rows` rows and a group of columns; the first chunk begins with the bias. A whole
 * tile goes straight to y; what overhangs goes by way of `tile`. x: the rows, copied. */
static void product_tile(const product *p, int64_t m, int64_t rows, const panel *w, int64_t n, int64_t first,
                         const real *x, real *tile)
{
    static const real zero[NR];
    int64_t count = lesser(CHUNK, p->k - first);
    const real *packed = panel_at(w, n, first, count);
    real *y = p->y + m * p->n + n;
    const real *before = first ? y : p->bias ? p->bias + n : zero;
    int64_t above = first ? p->n : 0, columns = lesser(NR, p->n - n);
    if (rows == MR && columns == NR) {
        micro_full(count, x, packed, before, above, y, p->n);
        return;
    }
    (group_width(w, n) == NR ? micro_for(rows) : micro_narrow)(count, x, packed, NULL, 0, tile, NR);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < columns; i++)
            y[r * p->n + i] = before[r * above + i] + tile[r * NR + i];
}

/* Outputs [m0, m1) x [n0, n1), one task. */
static void product_block(const product *p, int64_t m0, int64_t m1, const panel *w, int64_t n0, int64_t n1,
                          real *scratch)
{
    real *x = scratch, *tile = x + ROWS;
    memset(x, 0, ROWS * sizeof(real));          /* rows beyond m are computed and thrown away: let them be numbers */
    for (int64_t first = 0; first < p->k; first += CHUNK) {     /* outermost: y takes a partial sum a chunk, in order */
        int64_t count = lesser(CHUNK, p->k - first);
        for (int64_t m = m0; m < m1; m += MR) {                 /* the chunk of W stays in the second cache */
            int64_t rows = lesser(MR, m1 - m);
            p->copy(p, m, rows, first, count, x);
            for (int64_t n = n0; n < n1; n += NR) {             /* the rows stay in the first */
                prefetch(p, m, rows, n, (n - n0) / NR, divide_up(n1 - n0, NR), first);
                product_tile(p, m, rows, w, n, first, x, tile);
            }
        }
    }
}

/* Walks the outputs in panels; in each, all threads pack, then all multiply. Tasks are equally high, and there are as
 * many for every thread, at least three: nobody waits long for the last. */
static void product_run(arena *a, const product *p)
{
    size_t mark = arena_mark(a);
    a->work[p->conv ? CONV : LINEAR] += 2.0 * (double)p->m * (double)p->n * (double)p->k;
    int64_t threads = ruyi_threads(), tiles = divide_up(p->m, MR), panels = 1 + p->n * p->k / PANEL;
    int64_t columns = divide_up(divide_up(p->n, panels), NR) * NR, spans = divide_up(columns, BLOCK_N);
    int64_t blocks = divide_up(tiles, BLOCK_M / MR), least = divide_up(3 * threads, spans);
    blocks = lesser(divide_up(greater(blocks, least), threads) * threads, tiles);
    real *scratch = arena_alloc(a, (size_t)threads * PRODUCT_SCRATCH, sizeof(real));
    panel w = { .packed = arena_alloc(a, (size_t)(p->k * columns), sizeof(real)) };
    bool large = p->m * p->n * p->k > 1 << 20;
    int64_t width = divide_up(columns / NR, spans) * NR;
    for (w.n0 = 0; w.n0 < p->n && scratch; w.n0 = w.n1) {
        w.n1 = lesser(w.n0 + columns, p->n);
        panel_pack(p, &w, scratch);
        PARALLEL_FOR
        for (int64_t i = 0; i < blocks * spans; i++) {
            int64_t m = i / spans, n = w.n0 + i % spans * width;
            product_block(p, m * tiles / blocks * MR, lesser((m + 1) * tiles / blocks * MR, p->m), &w, n,
                          lesser(n + width, w.n1), scratch + thread_number() * PRODUCT_SCRATCH);
        }
    }
    arena_reset(a, mark);
}

/* Rows of a linear layer's input lie as they are needed. */
static void linear_copy(const product *p, int64_t row, int64_t rows, int64_t first, int64_t count, real *out)
{
    for (int64_t r = 0; r < rows; r++)
        memcpy(out + r * STRIDE, p->x + (row + r) * p->k + first, (size_t)count * sizeof(real));
}

/* y [..., N] = x [..., K] W^T + b; W [N][K] (a 1x1x1 convolution is one too). y must not overlap x. nn.Linear. */
void linear_to(arena *a, tensor y, tensor x, layer l)
{
    weight w = l.weight, b = l.bias;
    size_t mark = arena_mark(a);
    int64_t k = x.dim[x.ndim - 1], n = w.dim[0], m = k ? tensor_count(x) / k : 0;
    MUST(weight_count(w) == n * k && y.dim[y.ndim - 1] == n && tensor_count(y) == m * n &&
         (!b.data || weight_count(b) == n), "internal: linear %s: input has %lld columns, weight is %lld x %lld", w.key,
         ll(k), ll(n), ll(n ? weight_count(w) / n : 0));
    const real *bias = weight_vector(a, b);
    product_run(a, &(product){ .m = m, .n = n, .k = k, .w = w, .bias = bias, .y = y.data,
                               .copy = linear_copy, .x = x.data });
    arena_reset(a, mark);
}

/* The same into a new tensor of x's shape with N columns. */
tensor linear(arena *a, tensor x, layer l)
{
    shape s = tensor_shape(x);
    s.dim[s.ndim - 1] = l.weight.dim[0];
    tensor y = tensor_new(a, s);
    linear_to(a, y, x, l);
    return y;
}

/* ---------------------------------------------------------------- convolution
 *
 * Formula: y[t][y][x][o] = b[o] + sum over dt, dy, dx, c in order of
 *                          x[st t + dt - front][sy y + dy - pad][sx x + dx - pad][c] w[o][dt][dy][dx][c]
 * Method:  the product y = x W^T, k = (dt, dy, dx, c). No padded copy of the input is made and no matrix of
 *          neighbourhoods: a row of the left operand is found pixel by pixel (conv_line), with zeros or other frames
 *          where it leaves the video. Nearest-neighbour enlarging before a convolution (up = 2) is a division of the
 *          coordinates in the same place.
 * Accuracy: conv_plain's bits.
 *
 * The taps are W's order, too: at k = (dt, dy, dx, c), one row of the left operand for output (t, y, x) with kernel 3,
 * stride 1 and 2 channels reads, pixel (dt, dy, dx) by pixel,
 *
 *     k         0 1   2 3   4 5   6 7  ..  16 17   18 19  ..
 *     pixel     000   001   002   010  ..  022     100    ..      3 * 3 * 3 pixels of C numbers each
 *
 * so that what lies side by side in memory (the channels, and with stride 1 the pixels of a line) is side by side in k.
 * What stands in front of frame 0, by pad_mode, is drawn in vae.c (slices).
 */

/* What a convolution reads: x [T][H][W][C] and its output's size. */
typedef struct conv_rows {
    const real *x;
    int64_t in[4];              /* T H W C */
    int64_t out[3];             /* T' H' W' */
    conv_spec s;
} conv_rows;

/* Line y of the frame at time t, counted in the enlarged picture and possibly outside of it; NULL where the padding is
 * zero. The one place that knows what the padding modes mean. */
static const real *conv_line(const conv_rows *c, int64_t t, int64_t y)
{
    const real *frames = c->x;
    if (y < 0 || y >= c->in[1] * c->s.up)
        return NULL;
    if (c->s.time == PAD_SINGLE || c->s.time == PAD_SLICE) {
        if (t < 0 || t >= c->in[0])
            return NULL;
    } else if (t < 0 && c->s.time == PAD_CACHE_NEXT) {
        frames = c->s.cache->data;
        t += 2;
    } else if (t < 0) {
        t = 0;
    }
    return frames + (t * c->in[1] + y / c->s.up) * c->in[2] * c->in[3];
}

/* The C numbers of pixel x of such a line, likewise. */
static inline const real *conv_pixel(const conv_rows *c, const real *line, int64_t x)
{
    return !line || x < 0 || x >= c->in[2] * c->s.up ? NULL : line + (c->s.up == 1 ? x : x / c->s.up) * c->in[3];
}

/* Frames of padding in front: all in front where it is causal, half where a slice gets zeros on both sides. */
static int64_t conv_front(const conv_spec *s)
{
    bool both = s->time == PAD_SINGLE || s->time == PAD_SLICE;
    return both ? (s->kernel[0] - 1) / 2 : s->kernel[0] - 1;
}

/* The line under a tap's (dt, dy) of output line (t, y). */
static const real *conv_tap_line(const conv_rows *c, int64_t t, int64_t y, int64_t dt, int64_t dy)
{
    return conv_line(c, t * c->s.stride[0] + dt - conv_front(&c->s), y * c->s.stride[1] + dy - c->s.pad);
}

/* y [T'][H'][W'][Cout] from x [T][H][W][Cin] and w [Cout][taps][Cin]: k counts (tap, channel); taps on zero padding
 * contribute nothing, as they do for finite weights. in: T H W Cin; out: T' H' W' Cout. */
void conv_plain(real *y, const real *x, const real *w, const real *b, const int64_t in[4], const int64_t out[4],
                conv_spec s)
{
    conv_rows c = { .x = x, .in = { in[0], in[1], in[2], in[3] }, .out = { out[0], out[1], out[2] }, .s = s };
    int64_t k = s.kernel[0] * s.kernel[1] * s.kernel[2] * in[3];
    for (int64_t i = 0; i < out[0] * out[1] * out[2] * out[3]; i++) {
        int64_t row = i / out[3], o = i % out[3];
        real acc = b ? b[o] : 0;
        for (int64_t first = 0; first < k; first += CHUNK) {
            real sum = 0;
            for (int64_t j = first; j < lesser(first + CHUNK, k); j++) {
                int64_t tap = j / in[3], dx = tap % s.kernel[2];
                int64_t dy = tap / s.kernel[2] % s.kernel[1], dt = tap / s.kernel[2] / s.kernel[1];
                const real *line = conv_tap_line(&c, row / out[2] / out[1], row / out[2] % out[1], dt, dy);
                const real *pixel = conv_pixel(&c, line, row % out[2] * s.stride[2] + dx - s.pad);
                if (pixel)
                    sum = fma_real(pixel[j % in[3]], w[o * k + j], sum);
            }
            acc = acc + sum;
        }
        y[i] = acc;
    }
}

/* k = (tap, channel), tap = (dt, dy, dx): a piece of a row is whole pixels and parts of pixels. */
static void conv_copy(const product *p, int64_t row, int64_t rows, int64_t first, int64_t count, real *out)
{
    const conv_rows *c = p->conv;
    const int64_t *kernel = c->s.kernel, channels = c->in[3], step = c->s.stride[2];
    for (int64_t k = 0, n; k < count; k += n) {
        int64_t tap = (first + k) / channels, channel = (first + k) % channels;
        int64_t dx = tap % kernel[2] - c->s.pad, dy = tap / kernel[2] % kernel[1], dt = tap / kernel[2] / kernel[1];
        int64_t x = row % c->out[2], y = row / c->out[2] % c->out[1], t = row / c->out[2] / c->out[1];
        const real *line = conv_tap_line(c, t, y, dt, dy);
        n = lesser(channels - channel, count - k);
        for (int64_t r = 0; r < rows; r++) {
            const real *pixel = conv_pixel(c, line, x * step + dx);
            if (pixel)
                memcpy(out + r * STRIDE + k, pixel + channel, (size_t)n * sizeof(real));
            else
                memset(out + r * STRIDE + k, 0, (size_t)n * sizeof(real));
            if (++x == c->out[2]) {             /* the next row is the next pixel */
                x = 0;
                if (++y == c->out[1]) {
                    y = 0;
                    t++;
                }
                line = conv_tap_line(c, t, y, dt, dy);
            }
        }
    }
}

/* Keeps the last two frames of the padded input for the next slice: what a kernel of 3 looks back on. A slice of one
 * frame leaves itself and the one before it, which may be padding; memmove, since that may be the cache itself. */
static void conv_remember(const conv_rows *c)
{
    int64_t frame = c->in[1] * c->in[2] * c->in[3];
    conv_rows plain = *c;
    plain.s.up = 1;
    for (int64_t i = 0; i < 2; i++)
        memmove(c->s.cache->data + i * frame, conv_line(&plain, c->in[0] - 2 + i, 0), (size_t)frame * sizeof(real));
}

/* CausalConv3d of the public VAE, and with a kernel of 1 x p x p the patch embeddings. y must not overlap x. */
void conv(arena *a, tensor y, tensor x, conv_spec s, layer l)
{
    weight w = l.weight;
    int64_t taps = s.kernel[0] * s.kernel[1] * s.kernel[2], cin = x.dim[3];
    MUST(x.ndim == 4 && y.ndim == 4 && w.dim[1] == taps && w.dim[2] == cin && y.dim[3] == w.dim[0],
         "internal: conv %s: input has %lld channels, weight is %lld x %lld x %lld", w.key, ll(cin), ll(w.dim[0]),
         ll(w.dim[1]), ll(w.dim[2]));
    size_t mark = arena_mark(a);
    const real *bias = weight_vector(a, l.bias);
    conv_rows c = { .x = x.data, .in = { x.dim[0], x.dim[1], x.dim[2], cin },
                    .out = { y.dim[0], y.dim[1], y.dim[2] }, .s = s };
    product_run(a, &(product){ .m = y.dim[0] * y.dim[1] * y.dim[2], .n = w.dim[0], .k = taps * cin, .w = w,
                               .bias = bias, .y = y.data, .copy = conv_copy, .conv = &c });
    if (x.data && (s.time == PAD_CACHE_FIRST || s.time == PAD_CACHE_NEXT))
        conv_remember(&c);
    arena_reset(a, mark);
}

/* ---------------------------------------------------------------- attention
 *
 * Formula: y_i = sum_j p_ij v_j / sum_j p_ij, p_ij = e^(q_i k_j / sqrt(head)), every p relative to the row's maximum
 * Method:  online softmax over chunks of 256 keys (Milakov and Gimelshein; FlashAttention): nothing of the size tokens
 *          x tokens is ever stored. Lanes are queries. For a block of up to 512 queries of one head:
 *              pass 1   S^T [keys][queries] = K rows (broadcast) x packed Q^T         the micro-kernel
 *              pass 2   down the keys, in order: maximum, exp2, sum                   vertical loops
 *              pass 3   O^T [head][queries] = O^T a + V^T rows (broadcast) x P^T      the micro-kernel
 *          Why a chunk can be forgotten: softmax stays the same when all scores of a row lose the same number. It is
 *          taken to be the largest so far, m, so that 2^(s - m) never overflows. When a later chunk raises it to m',
 *          the sums so far were counted too high by the same factor for all: times a = 2^(m - m') makes them right.
 * Special: the first chunk's maximum before it is -infinity, so that what was before shrinks to 0. A score that is nan
 *          is passed over by the maximum and comes back through p.
 * Accuracy: attention_plain's bits.
 */

/* Softmax in base 2: e^(q k / sqrt(head)) = 2^(q k log2(e) / sqrt(head)), the factor rounded once and put into q. */
static real attention_scale(int64_t head) { return (real)(LOG2_E / sqrt((double)head)); }

/* One query row of `head` numbers against nk keys: scores s [nk], already in base 2. v, y: rows `stride` apart. The
 * maximum is carried from chunk to chunk; what was added under an older one shrinks by 2^(old - new). */
static void attention_plain_row(real *y, const real *s, const real *v, int64_t nk, int64_t head, int64_t stride)
{
    real max = -(real)INFINITY, sum = 0;
    for (int64_t d = 0; d < head; d++)
        y[d] = 0;
    for (int64_t first = 0; first < nk; first += CHUNK) {
        int64_t end = lesser(first + CHUNK, nk);
        real highest = max, total = 0;
        for (int64_t j = first; j < end; j++)
            highest = s[j] > highest ? s[j] : highest;
        real shrink = exp2_real(max - highest);
        for (int64_t j = first; j < end; j++)
            total += exp2_real(s[j] - highest);
        for (int64_t d = 0; d < head; d++) {
            real o = 0;
            for (int64_t j = first; j < end; j++)
                o = fma_real(v[j * stride + d], exp2_real(s[j] - highest), o);
            y[d] = fma_real(y[d], shrink, o);
        }
        sum = fma_real(sum, shrink, total);
        max = highest;
    }
    for (int64_t d = 0; d < head; d++)
        y[d] = y[d] / sum;
}

/* One sequence: q, y [nq][heads * head]; k, v [nk][heads * head]. Head by head, query by query. */
void attention_plain(real *y, const real *q, const real *k, const real *v, int64_t nq, int64_t nk, int64_t heads,
                     int64_t head)
{
    int64_t width = heads * head;
    real *scaled = allocate((size_t)head, sizeof(real)), *scores = allocate((size_t)nk, sizeof(real));
    for (int64_t i = 0; i < nq; i++)
        for (int64_t h = 0; h < heads; h++) {
            for (int64_t d = 0; d < head; d++)
                scaled[d] = q[i * width + h * head + d] * attention_scale(head);
            for (int64_t j = 0; j < nk; j++)
                linear_plain(scores + j, scaled, k + j * width + h * head, NULL, 1, 1, head);
            attention_plain_row(y + i * width + h * head, scores, v + h * head, nk, head, width);
        }
    free(scaled);
    free(scores);
}

enum {
    QUERIES = 512 / NR * NR,    /* in a block: K and V are copied once for each, its scores stay in the second cache */
    KEYS = CHUNK + MR,          /* rows of scores: the last tile may overhang */
};

typedef struct {
    const real *q, *k, *v;      /* of this sequence and head; rows `stride` apart */
    real *y;
    int64_t nq, nk, head, stride;
    real scale;                 /* log2(e) / sqrt(head) */
} attention_task;

/* Scratch of one thread, in reals; each part holds QUERIES columns in tiles of NR:
 *     q [tile][head][NR]   the block's queries, scaled and turned on their side
 *     o [tile][head][NR]   the result so far      s [tile][KEYS][NR]   scores, then probabilities, of one chunk
 *     max, sum, shrink [tile][NR]                 rows [MR][STRIDE], tile [MR][NR]: the micro-kernel's operands */
typedef struct { real *q, *s, *o, *max, *sum, *shrink, *rows, *tile; } attention_scratch;

/* What all of it takes; it does not depend on the number of tokens: for heads of 88, 0.9 MB a thread in float. */
static size_t attention_reals(int64_t head) { return (size_t)(QUERIES * (2 * head + KEYS + 3) + ROWS + TILE); }

static attention_scratch attention_parts(real *p, int64_t head)
{
    attention_scratch s = { .q = p, .o = p + QUERIES * head, .s = p + 2 * QUERIES * head };
    s.max = s.s + QUERIES * KEYS;
    s.sum = s.max + QUERIES;
    s.shrink = s.sum + QUERIES;
    s.rows = s.shrink + QUERIES;
    s.tile = s.rows + ROWS;
    return s;
}

/* Pass 1, one chunk of keys: s[tile][key][lane]. A score is a linear row without bias: chunks over the head, too; the
 * first chunk's tiles are scores already and are written in place. */
static void attention_scores(const attention_task *t, attention_scratch s, int64_t tiles, int64_t key0, int64_t keys)
{
    for (int64_t key = 0; key < keys; key += MR)
        for (int64_t d = 0; d < t->head; d += CHUNK) {
            int64_t rows = lesser(MR, keys - key), count = lesser(CHUNK, t->head - d);
            for (int64_t r = 0; r < rows; r++)
                memcpy(s.rows + r * STRIDE, t->k + (key0 + key + r) * t->stride + d, (size_t)count * sizeof(real));
            for (int64_t i = 0; i < tiles; i++) {
                real *out = s.s + (i * KEYS + key) * NR;
                micro_for(rows)(count, s.rows, s.q + (i * t->head + d) * NR, d ? out : NULL, NR, out, NR);
            }
        }
}

/* Pass 2: scores become probabilities relative to the new maximum; shrink is what earlier results are worth now.
 *     m' = max(m, s_j)    shrink = 2^(m - m')    p_j = 2^(s_j - m')    sum = sum * shrink + (p_0 + p_1 + ...) */
static void attention_softmax(attention_scratch s, int64_t tiles, int64_t keys)
{
    for (int64_t i = 0; i < tiles; i++) {
        real *scores = s.s + i * KEYS * NR, *max = s.max + i * NR, *sum = s.sum + i * NR, *shrink = s.shrink + i * NR;
        real highest[NR], total[NR];
        memcpy(highest, max, sizeof highest);
        for (int64_t j = 0; j < keys; j++)
            for (int l = 0; l < NR; l++)
                highest[l] = scores[j * NR + l] > highest[l] ? scores[j * NR + l] : highest[l];
        for (int l = 0; l < NR; l++) {
            shrink[l] = exp2_real(max[l] - highest[l]);
            max[l] = highest[l];
            total[l] = 0;
        }
        for (int64_t j = 0; j < keys; j++)
            for (int l = 0; l < NR; l++) {
                scores[j * NR + l] = exp2_real(scores[j * NR + l] - highest[l]);
                total[l] += scores[j * NR + l];
            }
        for (int l = 0; l < NR; l++)
            sum[l] = fma_real(sum[l], shrink[l], total[l]);
    }
}

/* Pass 3: o[tile][d][lane] = o * shrink + sum over the chunk's keys of v * p. */
static void attention_values(const attention_task *t, attention_scratch s, int64_t tiles, int64_t key0, int64_t keys)
{
    for (int64_t d = 0; d < t->head; d += MR) {
        int64_t rows = lesser(MR, t->head - d);
        for (int64_t j = 0; j < keys; j++)                          /* V on its side: MR channels, the chunk's keys */
            for (int64_t r = 0; r < rows; r++)
                s.rows[r * STRIDE + j] = t->v[(key0 + j) * t->stride + d + r];
        for (int64_t i = 0; i < tiles; i++) {
            micro_for(rows)(keys, s.rows, s.s + i * KEYS * NR, NULL, 0, s.tile, NR);
            real *out = s.o + (i * t->head + d) * NR, *shrink = s.shrink + i * NR;
            for (int64_t r = 0; r < rows; r++)
                for (int l = 0; l < NR; l++)
                    out[r * NR + l] = fma_real(out[r * NR + l], shrink[l], s.tile[r * NR + l]);
        }
    }
}

/* Queries [first, first + count) of one sequence and head; count <= QUERIES. Between the passes of one chunk everything
 * stays in the second cache; from chunk to chunk only o, max and sum are carried. The division by the sum comes last:
 * once for a result, not once for every key. */
static void attention_block(const attention_task *t, int64_t first, int64_t count, attention_scratch s)
{
    int64_t tiles = divide_up(count, NR), columns = tiles * NR;      /* columns beyond count are queries of zeros */
    memset(s.rows, 0, ROWS * sizeof(real));
    memset(s.o, 0, (size_t)(columns * t->head) * sizeof(real));
    for (int64_t i = 0; i < columns; i++) {
        s.max[i] = -(real)INFINITY;
        s.sum[i] = 0;
        for (int64_t d = 0; d < t->head; d++)
            s.q[(i / NR * t->head + d) * NR + i % NR] = i < count ? t->q[(first + i) * t->stride + d] * t->scale : 0;
    }
    for (int64_t key = 0; key < t->nk; key += CHUNK) {
        int64_t keys = lesser(CHUNK, t->nk - key);
        attention_scores(t, s, tiles, key, keys);
        attention_softmax(s, tiles, keys);
        attention_values(t, s, tiles, key, keys);
    }
    for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < t->head; d++)
            t->y[(first + i) * t->stride + d] = s.o[(i / NR * t->head + d) * NR + i % NR] / s.sum[i];
}

/* F.scaled_dot_product_attention of sequences that stand one behind the other, in each head. */
void attention(arena *a, tensor y, tensor q, tensor k, tensor v, int64_t sequences, int64_t heads)
{
    int64_t width = q.dim[1], head = width / heads, nq = q.dim[0] / sequences, nk = k.dim[0] / sequences;
    tensor_check(y, SHAPE(sequences * nq, heads * head), "attention: y");
    tensor_check(k, SHAPE(sequences * nk, width), "attention: k");
    tensor_check(v, SHAPE(sequences * nk, width), "attention: v");
    size_t mark = arena_mark(a), reals = attention_reals(head);
    a->work[ATTENTION] += 4.0 * (double)(sequences * nq) * (double)nk * (double)width;
    real *scratch = arena_alloc(a, (size_t)ruyi_threads() * reals, sizeof(real));
    int64_t blocks = divide_up(nq, QUERIES), size = divide_up(divide_up(nq, blocks), NR) * NR;
    int64_t tasks = scratch ? sequences * heads * blocks : 0;
    bool large = sequences * nq * nk * width > 1 << 19;
    PARALLEL_FOR
    for (int64_t i = 0; i < tasks; i++) {
        int64_t first = i % blocks * size, h = i / blocks % heads, s = i / blocks / heads;
        attention_task t = { .q = q.data + s * nq * width + h * head, .k = k.data + s * nk * width + h * head,
                             .v = v.data + s * nk * width + h * head, .y = y.data + s * nq * width + h * head,
                             .nq = nq, .nk = nk, .head = head, .stride = width, .scale = attention_scale(head) };
        attention_block(&t, first, lesser(size, nq - first),
                        attention_parts(scratch + (size_t)thread_number() * reals, head));
    }
    arena_reset(a, mark);
}

/* ---------------------------------------------------------------- activations
 *
 * Formula: x sigmoid(u) = x / (1 + e^-u): u = x SiLU, 1.702 x quick GELU, 2 sqrt(2/pi) (x + 0.044715 x^3) GELU (tanh)
 * Method:  one exp2 and one division an element, in `real`; GELU with erf, for the gate alone, in double.
 * Accuracy: SiLU in float: relative error below 6e-7 for |x| <= 8, 2e-6 at x = -20: far on the negative side, where the
 *          result vanishes, it grows with |u|.
 */

/* x sigmoid(u), where u comes in base 2: x / (1 + 2^-u). */
static inline real sigmoid_form(real x, real u) { return x / (1 + exp2_real(-u)); }
static inline real silu_one(real x) { return sigmoid_form(x, x * (real)LOG2_E); }
static inline real quick_gelu_one(real x) { return sigmoid_form(x, x * (real)(1.702 * LOG2_E)); }

/* x (1 + tanh v)/2 with v = sqrt(2/pi) (x + 0.044715 x^3), which is x sigmoid(2 v). */
static inline real gelu_tanh_one(real x)
{
    const double c = 1.59576912160573071176 * LOG2_E;       /* 2 sqrt(2/pi), in base 2 */
    return sigmoid_form(x, x * ((real)c + (real)(0.044715 * c) * (x * x)));
}

/* x (1 + erf(x / sqrt 2)) / 2. */
static inline real gelu_erf_one(real x) { return (real)(0.5 * x * (1 + erf_own((double)x * 0.70710678118654752440))); }

/* ---------------------------------------------------------------- norms
 *
 * Formula: y = (x - mean) / sqrt(variance + eps) * weight + bias, variance = mean of (x - mean)^2
 * Method:  two passes, nothing cancels. LayerNorm: over the channels of one token. GroupNorm: over a group of channels
 *          at all positions of a slice (or of a frame), summed by image rows, then over the rows in order. Rows of the
 *          input are split among threads, a sum never is.
 * Special: weight and bias may be absent: 1 and 0.
 * Accuracy: all in double, one rounding to `real`: a slice has millions of terms, and the float sum of as many would
 *          lose more than the rest of the network.
 */

/* Eight sums over k mod 8, so that the order is fixed and eight additions are under way at once. */
typedef struct { double s[8]; } sum8;

static inline double sum8_total(sum8 a)
{
    return ((a.s[0] + a.s[4]) + (a.s[2] + a.s[6])) + ((a.s[1] + a.s[5]) + (a.s[3] + a.s[7]));
}

/* Mean of n numbers, and 1 / sqrt(mean centred square + eps). Not the mean of squares less the squared mean, which
 * would save a pass: where the mean is large against the spread, the two are nearly equal and their difference is
 * noise. */
static void moments(const real *x, int64_t n, double eps, double *mean, double *scale)
{
    sum8 a = { { 0 } }, b = { { 0 } };
    for (int64_t k = 0; k < n; k++)
        a.s[k & 7] += (double)x[k];
    *mean = sum8_total(a) / (double)n;
    for (int64_t k = 0; k < n; k++) {
        double d = (double)x[k] - *mean;
        b.s[k & 7] += d * d;
    }
    *scale = 1 / sqrt(sum8_total(b) / (double)n + eps);
}

/* One rounding per element: everything before it is double. */
static inline real normed(real x, double mean, double scale, double w, double b)
{
    return (real)(((double)x - mean) * scale * w + b);
}

/* One row of n numbers; weight and bias may be NULL. y may be x. */
static void norm_row(real *y, const real *x, int64_t n, const real *w, const real *b, double eps)
{
    double mean, scale;
    moments(x, n, eps, &mean, &scale);
    for (int64_t k = 0; k < n; k++)
        y[k] = normed(x[k], mean, scale, w ? (double)w[k] : 1, b ? (double)b[k] : 0);
}

/* LayerNorm over the last dimension; weight and bias may be absent. y may be x. nn.LayerNorm, FP32LayerNorm. */
void layer_norm(arena *a, tensor y, tensor x, layer l, double eps)
{
    size_t mark = arena_mark(a);
    int64_t n = x.dim[x.ndim - 1], rows = n ? tensor_count(x) / n : 0;
    MUST(tensor_count(y) == rows * n && (!l.weight.data || weight_count(l.weight) == n),
         "internal: layer_norm %s: rows of %lld", l.weight.key ? l.weight.key : "", ll(n));
    const real *scale = weight_vector(a, l.weight), *shift = weight_vector(a, l.bias);
    arena_reset(a, mark);
    if (!x.data)
        return;
    bool large = rows * n > SMALL;
    PARALLEL_FOR_EVEN
    for (int64_t i = 0; i < rows; i++)
        norm_row(y.data + i * n, x.data + i * n, n, scale, shift, eps);
}

/* What GroupNorm of x [T][H][W][C] needs: the sums of one image row are added over x and then the group's channels. */
typedef struct {
    const real *x;
    int64_t rows, width, channels, groups;      /* rows: T * H */
    double *sums;                               /* [rows][groups] */
} group_sums;

/* sums[row][g] of x - mean[channel], squared where it is to be: of the values while the means are 0. Term k of a
 * group's sum is counted along the row, pixel by pixel, the group's channels in each: k = x size + channel. A group may
 * be a single channel, so the row is walked once for all groups, each with eight sums of its own, not once for each. */
static void group_row(const group_sums *g, int64_t row, const double *mean, bool square)
{
    enum { TOGETHER = 64 };                     /* groups: all of a pixel's numbers while they are in the cache */
    int64_t size = g->channels / g->groups;
    for (int64_t first = 0, count; first < g->groups; first += count) {
        sum8 a[TOGETHER] = { { { 0 } } };
        count = lesser(TOGETHER, g->groups - first);
        for (int64_t x = 0; x < g->width; x++) {
            const real *p = g->x + (row * g->width + x) * g->channels;
            for (int64_t i = 0, c = first * size; i < count; i++)
                for (int64_t k = x * size; k < (x + 1) * size; k++, c++) {
                    double d = (double)p[c] - mean[c];
                    a[i].s[k & 7] += square ? d * d : d;
                }
        }
        for (int64_t i = 0; i < count; i++)
            g->sums[row * g->groups + first + i] = sum8_total(a[i]);
    }
}

/* Adds the sums of every `span_rows` consecutive rows in order: means [spans][channels], each channel its group's. One
 * thread: the order of rows is part of the definition, and there are few of them. */
static void group_gather(const group_sums *g, int64_t span_rows, double *means)
{
    int64_t size = g->channels / g->groups;
    for (int64_t first = 0; first < g->rows; first += span_rows)
        for (int64_t i = 0; i < g->groups; i++) {
            double sum = 0;
            for (int64_t r = first; r < first + span_rows; r++)
                sum += g->sums[r * g->groups + i];
            for (int64_t c = i * size; c < (i + 1) * size; c++)
                means[first / span_rows * g->channels + c] = sum / (double)(span_rows * g->width * size);
        }
}

/* Normalises one image row, and puts SiLU on it while it is in the cache: a pass over memory less. SiLU takes what the
 * norm has rounded, so that the two give the same bits together or apart. */
static void group_apply(const group_sums *g, real *y, int64_t row, const double *mean, const double *scale,
                        const real *w, const real *b, bool silu)
{
    for (int64_t x = 0; x < g->width; x++) {
        const real *in = g->x + (row * g->width + x) * g->channels;
        real *out = y + (row * g->width + x) * g->channels;
        for (int64_t c = 0; c < g->channels; c++)
            out[c] = normed(in[c], mean[c], scale[c], (double)w[c], (double)b[c]);
        if (silu)
            for (int64_t c = 0; c < g->channels; c++)
                out[c] = silu_one(out[c]);
    }
}

/* GroupNorm (eps 1e-6) of x [T][H][W][C] with statistics over C/groups channels of `span` consecutive frames at a time
 * (T: the whole slice; 1: per frame), then SiLU if asked. y may be x. nn.GroupNorm of the public VAE's modules.
 * A trap for ports: statistics over the whole slice make its frames depend on each other, so that a slice of other
 * length, or a tile of other size, gives other pixels. It is why a clip's slices do not join without seams. */
void group_norm(arena *a, tensor y, tensor x, int64_t groups, int64_t span, layer l, bool silu)
{
    size_t mark = arena_mark(a);
    group_sums g = { .x = x.data, .rows = x.dim[0] * x.dim[1], .width = x.dim[2], .channels = x.dim[3],
                     .groups = groups };
    MUST(x.ndim == 4 && g.channels % groups == 0 && x.dim[0] % span == 0 && tensor_count(x) == tensor_count(y) &&
         weight_count(l.weight) == g.channels, "internal: group_norm %s: %lld channels in %lld groups", l.weight.key,
         ll(g.channels), ll(groups));
    const real *scale = weight_vector(a, l.weight), *shift = weight_vector(a, l.bias);
    int64_t span_rows = span * x.dim[1], n = x.dim[0] / span * g.channels;
    g.sums = arena_alloc(a, (size_t)(g.rows * groups), sizeof(double));
    double *mean = arena_alloc(a, (size_t)n, sizeof(double)), *inverse = arena_alloc(a, (size_t)n, sizeof(double));
    arena_reset(a, mark);
    if (!x.data)
        return;
    bool large = tensor_count(x) > SMALL;
    memset(mean, 0, (size_t)n * sizeof(double));
    PARALLEL_FOR_EVEN                           /* first pass: sums of the values, then means */
    for (int64_t row = 0; row < g.rows; row++)
        group_row(&g, row, mean + row / span_rows * g.channels, false);
    group_gather(&g, span_rows, mean);
    PARALLEL_FOR_EVEN                           /* second pass: sums of centred squares, then 1 / deviation */
    for (int64_t row = 0; row < g.rows; row++)
        group_row(&g, row, mean + row / span_rows * g.channels, true);
    group_gather(&g, span_rows, inverse);       /* the variance */
    for (int64_t i = 0; i < n; i++)
        inverse[i] = 1 / sqrt(inverse[i] + 1e-6);
    PARALLEL_FOR_EVEN
    for (int64_t row = 0; row < g.rows; row++) {
        int64_t at = row / span_rows * g.channels;
        group_apply(&g, y.data, row, mean + at, inverse + at, scale, shift, silu);
    }
}

/* Turns adjacent pairs (2i, 2i + 1) of one head, not halves (i, head / 2 + i) as many other models do, by the angles
 * whose cosine and sine table[i] holds: (p, q) becomes (p cos - q sin, q cos + p sin). In double; one rounding.
 * apply_rotary_emb of diffusers.
 * q times -sin is added, not q sin subtracted: from alternating - and + GCC 12 makes vfmaddsub, which rounds otherwise,
 * -ffp-contract=off or not. */
static void rotate(real *x, int64_t head, const double *table)
{
    for (int64_t i = 0; i < head / 2; i++) {
        double p = (double)x[2 * i], q = (double)x[2 * i + 1], cosine = table[2 * i], sine = table[2 * i + 1];
        x[2 * i] = (real)(p * cosine + q * -sine);
        x[2 * i + 1] = (real)(q * cosine + p * sine);
    }
}

/* In place. The norm bounds q k, whatever the weights are; the turning makes it depend on how far two places lie apart,
 * since turning both by the same angle leaves their product as it was. The period is one frame's tokens: time does not
 * turn. norm_q, norm_k, apply_rotary_emb of the public attention processors. */
void head_norm_rotary(arena *a, tensor x, int64_t heads, layer l, double eps, const double *table, int64_t period)
{
    size_t mark = arena_mark(a);
    int64_t width = x.dim[1], head = width / heads;
    const real *scale = weight_vector(a, l.weight), *shift = weight_vector(a, l.bias);
    arena_reset(a, mark);
    if (!x.data)
        return;
    bool large = tensor_count(x) > SMALL;
    PARALLEL_FOR_EVEN
    for (int64_t n = 0; n < x.dim[0]; n++)
        for (int64_t h = 0; h < heads; h++) {
            real *p = x.data + n * width + h * head;
            norm_row(p, p, head, scale, shift, eps);
            if (table)
                rotate(p, head, table + n % period * head);
        }
}

/* ---------------------------------------------------------------- elementwise
 *
 * What the networks do to one number at a time. SiLU: on time embeddings (and after the VAE's norms, where it is part
 * of group_norm). GELU, tanh form: the DiT's MLP; exact: its gate. CLIP: the one that its weights were trained with.
 */

/* In place. SiLU, GELU (tanh form or exact), and CLIP's quick GELU x sigmoid(1.702 x). */
void activate(tensor x, activation f)
{
    enum { RUN = 4096 };
    int64_t n = x.data ? tensor_count(x) : 0;
    bool large = n > SMALL;
    PARALLEL_FOR_EVEN
    for (int64_t piece = 0; piece < n; piece += RUN) {
        real *p = x.data + piece;
        int64_t count = lesser(RUN, n - piece);
        switch (f) {
        CASE(SILU, p[i] = silu_one(p[i]));
        CASE(GELU_TANH, p[i] = gelu_tanh_one(p[i]));
        CASE(GELU_ERF, p[i] = gelu_erf_one(p[i]));
        CASE(QUICK_GELU, p[i] = quick_gelu_one(p[i]));
        }
    }
}

/* y += x, element by element: what every residual branch ends in. Shapes may differ, counts may not. */
void add(tensor y, tensor x)
{
    MUST(tensor_count(y) == tensor_count(x), "internal: add %lld elements to %lld", ll(tensor_count(x)),
         ll(tensor_count(y)));
    int64_t n = y.data ? tensor_count(y) : 0;
    bool large = n > SMALL;
    PARALLEL_FOR_EVEN
    for (int64_t i = 0; i < n; i++)
        y.data[i] += x.data[i];
}

/* y [M][D] = a gelu(b) where x [M][2 D] = [a, b]. GEGLU of the public attention.py. */
void gate_gelu(tensor y, tensor x)
{
    int64_t d = y.dim[y.ndim - 1], rows = y.data ? tensor_count(y) / d : 0;
    bool large = rows * d > SMALL;
    PARALLEL_FOR_EVEN
    for (int64_t i = 0; i < rows; i++)
        for (int64_t k = 0; k < d; k++)
            y.data[i * d + k] = x.data[i * 2 * d + k] * gelu_erf_one(x.data[i * 2 * d + d + k]);
}

/* ---------------------------------------------------------------- the machine's peak
 *
 * Formula: operations a second <= threads x clock x multiply-adds a cycle x LANES x 2
 * Method:  measured, since a virtual machine hides its clock: as many independent chains as a tile has sums, so that no
 *          multiply-add waits for another, and not one number from memory. A kernel's share of it is how good it is.
 */

/* MR x NV independent chains of multiply-adds that never leave the registers. */
static void burn(int64_t rounds, real *out)
{
    vec acc[MR][NV], x = vec_all((real)0.999), w = vec_all((real)1e-3);
    UNROLL for (int r = 0; r < MR; r++)
        UNROLL for (int v = 0; v < NV; v++)
            acc[r][v] = vec_all((real)(r * NV + v));       /* all different, or the compiler would keep one of equals */
    for (int64_t k = 0; k < rounds; k++)
        UNROLL for (int r = 0; r < MR; r++)
            UNROLL for (int v = 0; v < NV; v++)
                acc[r][v] = vec_fma(acc[r][v], x, w);
    for (int r = 0; r < MR; r++)
        memcpy(out + r * NR, acc[r], sizeof acc[r]);
}

/* Multiply-adds on registers alone, in every thread: what no kernel can beat. Returns the floating-point operations. */
double burn_peak(arena *a)
{
    const int64_t rounds = 2000000;
    size_t mark = arena_mark(a);
    int64_t threads = ruyi_threads();
    real *out = arena_alloc(a, (size_t)threads * TILE, sizeof(real));
    bool large = true;
    PARALLEL_FOR_EVEN
    for (int64_t t = 0; t < threads; t++)
        burn(rounds, out + t * TILE);
    arena_reset(a, mark);
    return 2.0 * MR * NR * (double)(rounds * threads);
}

/* ---------------------------------------------------------------- random numbers
 *
 * torch.randn on the CPU, float32, bit for bit: MT19937 (Matsumoto and Nishimura 1998), Box-Muller on blocks of 16
 * with the single-precision logarithm, sine and cosine of Cephes, as torch's AVX2 code evaluates them. Everything here
 * is float whatever `real` is, and every line is one rounding. torch.randn on a GPU is at the end.
 *
 *     seed -> 624 words of state -> words -> 24 bits each: u in [0, 1) -> pairs (radius, angle) -> normal numbers
 *
 * Why to the bit: sampling carries the noise through to the clip. Another generator of the same distribution gives
 * another clip of the same quality, and then no port could tell a mistake of its own from other noise.
 */

/* torch.Generator(device).manual_seed(seed): on the CPU its low 32 bits, on a GPU all 64. Half a pair is forgotten.
 * One word spreads over 624 by a multiplicative recurrence; `next` at the end of them asks for a first stirring. */
void generator_seed(generator *g, rng device, uint64_t seed)
{
    *g = (generator){ .device = device, .seed = seed, .next = 624 };
    g->state[0] = (uint32_t)seed;
    for (uint32_t i = 1; i < 624; i++)
        g->state[i] = 1812433253u * (g->state[i - 1] ^ g->state[i - 1] >> 30) + i;
}

/* The next 32 bits. Every 624 of them the state is stirred once: word i becomes word i + 397, combined with the highest
 * bit of word i and the others of word i + 1, in place. A word leaves tempered: four shifts spread its bits, since
 * those of the state follow each other too simply. */
static uint32_t generator_word(generator *g)
{
    if (g->next == 624) {
        for (int i = 0; i < 624; i++) {
            uint32_t y = (g->state[i] & 0x80000000u) | (g->state[(i + 1) % 624] & 0x7fffffffu);
            g->state[i] = g->state[(i + 397) % 624] ^ y >> 1 ^ (y & 1 ? 0x9908b0dfu : 0);
        }
        g->next = 0;
    }
    uint32_t y = g->state[g->next++];
    y ^= y >> 11;
    y ^= y << 7 & 0x9d2c5680u;
    y ^= y << 15 & 0xefc60000u;
    return y ^ y >> 18;
}

/* Cephes logf. Not our log: torch's draws are defined by it, to the last bit.
 * Formula: ln x = e ln 2 + u - u^2/2 + u^3 P(u), x = 2^e m, u = m - 1
 * Method:  sqrt(1/2) <= m < sqrt(2), ln 2 in two parts, P of degree 8.
 * Special: none; x > 0. */
static float cephes_log(float x)
{
    static const float c[] = { -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                               -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f };
    int exponent;
    float m = frexpf(x, &exponent), e = (float)exponent;
    if (m < 0.70710678f) {
        e -= 1;
        m *= 2;
    }
    m -= 1;
    float z = m * m, p = 7.0376836292e-2f;
    for (int i = 0; i < 8; i++)
        p = fmaf(p, m, c[i]);
    p *= m;
    float y = fmaf(p, z, e * -2.12194440e-4f);
    y = fmaf(z, -0.5f, y);
    return fmaf(e, 0.693359375f, m + y);
}

/* Cephes sincosf for 0 <= t <= 2 pi: j counts eighths of the circle, rounded up to even; x is what is left, pi/4 taken
 * off in three parts; a polynomial for the cosine and one for the sine, swapped and signed by j. */
static void cephes_sincos(float t, float *sine, float *cosine)
{
    int32_t j = ((int32_t)(t * 1.27323954473516f) + 1) & ~1;
    float k = (float)j, x = fmaf(k, -0.78515625f, t);
    x = fmaf(k, -2.4187564849853515625e-4f, x);
    x = fmaf(k, -3.77489497744594108e-8f, x);
    float z = x * x;
    float c = fmaf(fmaf(2.443315711809948e-5f, z, -1.388731625493765e-3f), z, 4.166664568298827e-2f) * z;
    c = fmaf(c, z, -(0.5f * z)) + 1;
    float s = fmaf(fmaf(-1.9515295891e-4f, z, 8.3321608736e-3f), z, -1.6666654611e-1f) * z;
    s = fmaf(s, x, x);
    *cosine = j & 2 ? s : c;
    *sine = j & 2 ? c : s;
    if (j % 8 == 4 || j % 8 == 6)
        *sine = -*sine;
    if (j % 8 == 2 || j % 8 == 4)
        *cosine = -*cosine;
}

/* 16 uniform numbers become 16 normal ones: element j gives the radius, element j + 8 the angle (Box and Muller 1958).
 * A point of the plane with two independent normal coordinates has every angle alike, and a radius above r with
 * probability e^(-r^2/2); so r = sqrt(-2 ln u) of a uniform u, and its coordinates r cos and r sin are normal.
 * 1 - u keeps the logarithm away from 0. Adding 0 turns -0 into 0, as torch's code does. */
static void box_muller_16(float *u)
{
    for (int j = 0; j < 8; j++) {
        float r = sqrtf(-2 * cephes_log(1 - u[j])), sine, cosine;
        cephes_sincos(6.2831855f * u[j + 8], &sine, &cosine);
        u[j] = r * cosine + 0;
        u[j + 8] = r * sine + 0;
    }
}

/* Uniform in [0, 1): 24 bits of one word as a float, 53 bits of two words as a double: as many as their fractions hold.
 * With one more, the largest would round to 1, and the logarithm of 1 - u would be infinite. */
static float uniform_24(generator *g) { return (float)(generator_word(g) & 0xffffff) * 0x1p-24f; }

static double uniform_53(generator *g)
{
    uint64_t high = generator_word(g), low = generator_word(g);
    return (double)((high << 32 | low) & ((1ULL << 53) - 1)) * 0x1p-53;
}

/* One normal number by pairs in double; the second of a pair waits for the next draw of this kind, but a draw of 16 or
 * more in between goes past it. The angle's two words are drawn before the radius's. */
static float normal_single(generator *g)
{
    if (g->has_second) {
        g->has_second = 0;
        return g->second;
    }
    double angle = 6.28318530717958647693 * uniform_53(g), sine, cosine;
    double r = sqrt(-2 * log_own(1 - uniform_53(g)));
    sincos_own(angle, &sine, &cosine);
    g->second = (float)(r * sine);
    g->has_second = 1;
    return (float)(r * cosine);
}

/* Philox4x32-10 (Salmon et al., 2011): four random words for a key and a counter of 128 bits, without any state: a
 * cipher of ten rounds, each two products of 32 x 32 bits whose halves change places. So thousands of threads can draw
 * at once, each from a counter of its own. */
static void philox(uint64_t key, uint64_t low, uint64_t high, uint32_t w[4])
{
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    uint32_t c[4] = { (uint32_t)low, (uint32_t)(low >> 32), (uint32_t)high, (uint32_t)(high >> 32) };
    for (int round = 0; round < 10; round++, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
        uint64_t p = (uint64_t)c[0] * 0xd2511f53u, q = (uint64_t)c[2] * 0xcd9e8d57u;
        c[0] = (uint32_t)(q >> 32) ^ c[1] ^ k0;
        c[1] = (uint32_t)q;
        c[2] = (uint32_t)(p >> 32) ^ c[3] ^ k1;
        c[3] = (uint32_t)p;
    }
    memcpy(w, c, sizeof c);
}

/* Two words become two normal numbers, the sine's first. u and v are in the middle of 2^32 steps of (0, 1) and
 * (0, 2 pi), so that the logarithm is finite. A GPU takes its fast sine and cosine here, by no published formula: ours
 * are rounded once, and at most 2.2e-6 away from an H100's draws. */
static void box_muller_words(const uint32_t w[2], bool bf16, float out[2])
{
    float u = (float)w[0] * 0x1p-32f + 0x1p-33f, v = fmaf((float)w[1], 6.2831855f * 0x1p-32f, 6.2831855f * 0x1p-33f);
    float r = sqrtf(-2 * (float)log_own((double)u));
    double wave[2];
    sincos_own((double)v, &wave[0], &wave[1]);
    for (int i = 0; i < 2; i++) {
        uint32_t bits = float_bits(r * (float)wave[i]);
        out[i] = bits_float(bf16 ? (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u : bits);
    }
}

/* torch.randn on a GPU: every thread t takes four numbers of its own counter at a time and puts them `threads` apart,
 * so that neighbours write side by side. How many threads there are depends on the GPU (its multiprocessors, and how
 * many threads each holds), and so the same seed gives other numbers on another GPU: --rng says which.
 * aten/src/ATen/native/cuda/DistributionTemplates.h. */
static void cuda_randn(generator *g, float *out, int64_t count)
{
    enum { BLOCK = 256 };       /* threads of a block */
    int64_t blocks = divide_up(count, BLOCK), most = (int64_t)g->device.sms * (g->device.threads / BLOCK);
    int64_t threads = BLOCK * lesser(blocks, most), calls = divide_up(count, 4 * threads);
    for (int64_t i = 0; i < calls * threads; i++) {
        int64_t call = i / threads, t = i % threads;
        uint32_t w[4];
        float four[4];
        philox(g->seed, g->offset / 4 + (uint64_t)call, (uint64_t)t, w);
        box_muller_words(w, g->device.bf16, four);
        box_muller_words(w + 2, g->device.bf16, four + 2);
        for (int64_t j = 0; j < 4 && (4 * call + j) * threads + t < count; j++)
            out[(4 * call + j) * threads + t] = four[j];
    }
    g->offset += 4 * (uint64_t)calls;
}

/* count normal numbers as torch.randn(count) draws them next from this generator. On the CPU two algorithms: fewer than
 * 16 numbers come one by one in double, 16 and more in blocks from 24-bit uniforms. So the count is part of the result:
 * drawing 8 and 8 is not drawing 16. */
void generator_randn(generator *g, float *out, int64_t count)
{
    if (g->device.sms) {
        cuda_randn(g, out, count);
        return;
    }
    if (count < 16) {
        for (int64_t i = 0; i < count; i++)
            out[i] = normal_single(g);
        return;
    }
    for (int64_t i = 0; i < count; i++)
        out[i] = uniform_24(g);
    for (int64_t i = 0; i + 16 <= count; i += 16)
        box_muller_16(out + i);
    if (count % 16) {           /* torch draws the last 16 anew, over numbers that are already there */
        for (int i = 0; i < 16; i++)
            out[count - 16 + i] = uniform_24(g);
        box_muller_16(out + count - 16);
    }
}
