/* controls.c - what `ruyi compare` must refuse and must take, seen from outside.
 *
 *     build/controls RUYI         RUYI: the program
 *
 * A control is a pair of files made here and what the program has to say of it: exit code, the first tensor that differs
 * and the measure that found it. Each is run three times: as it is (at most ten lines, the last one the verdict), with
 * --json (the same verdict in one strict document) and with -v. Files are written by this program alone, so that a
 * mistake in the writer of the other cannot hide here. Prints every failure; the last line is `N passed, N failed`.
 */
#define _XOPEN_SOURCE 700
#include "../ruyi.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static int passed, failed;
static const char *ruyi;
static char folder[] = "/tmp/ruyi-controls-XXXXXX";

/* ---------------------------------------------------------------- files */

/* One side of a control: header and data as they will be in the file. */
typedef struct { char *header; unsigned char *data; size_t size; char metadata[4096]; } side;
static side golden, mine;

/* Little-endian bytes of a number. */
static void put_bytes(side *s, uint64_t bits, int bytes)
{
    for (int i = 0; i < bytes; i++) s->data[s->size++] = (unsigned char)(bits >> 8 * i);
}

/* The nearest float of `digits` bits (ties to even) whose smallest step is 2^least, as the value that it has. */
static double rounded(double x, int digits, int least)
{
    int exponent;
    if (x == 0 || !isfinite(x)) return x;
    frexp(x, &exponent);
    int step = exponent - digits > least ? exponent - digits : least;
    return ldexp(nearbyint(ldexp(x, -step)), step);
}

static uint64_t half_bits(double x)
{
    uint64_t sign = signbit(x) ? 0x8000 : 0;
    if (isnan(x)) return 0x7e00;
    x = fabs(rounded(x, 11, -24));
    if (x >= 65536) return sign | 0x7c00;
    if (x < 0x1p-14) return sign | (uint64_t)ldexp(x, 24);
    int exponent;
    double fraction = frexp(x, &exponent);
    return sign | (uint64_t)(exponent + 14) << 10 | ((uint64_t)ldexp(fraction, 11) & 0x3ff);
}

static void put_number(side *s, dtype type, double x)
{
    uint64_t bits;
    uint32_t single;
    float f = type == BF16 ? (float)rounded(x, 8, -133) : (float)x;
    memcpy(&bits, &x, sizeof bits);
    memcpy(&single, &f, sizeof single);
    switch (type) {
    case F64: put_bytes(s, bits, 8); break;
    case F32: case C64: put_bytes(s, single, type == C64 ? 8 : 4); break;
    case BF16: put_bytes(s, single >> 16, 2); break;
    case F16: put_bytes(s, half_bits(x), 2); break;
    default: put_bytes(s, x < 0 ? (uint64_t)(int64_t)x : (uint64_t)x, dtype_bits[type] / 8);
    }
}

/* Adds a tensor. name: as in JSON. shape: "2,3". */
static void put(side *s, const char *name, dtype type, const char *shape_list, const double *x)
{
    int64_t count = 1;
    size_t begin = s->size;
    for (const char *p = shape_list; *p; p += strcspn(p, ","), p += *p == ',') count *= strtol(p, NULL, 10);
    for (int64_t i = 0; i < count; i++) put_number(s, type, x[i]);
    sprintf(s->header + strlen(s->header), ",\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}", name,
            dtype_name[type], shape_list, begin, s->size);
}

/* Writes a side, without its last `cut` bytes, and starts it anew. */
static void save(side *s, const char *path, size_t cut)
{
    FILE *f = fopen(path, "wb");
    char *text = text_of("{\"__metadata__\":{%s}%s}", s->metadata, s->header);
    size_t length = strlen(text);
    for (int i = 0; i < 8; i++) fputc((int)(length >> 8 * i & 255), f);
    fwrite(text, 1, length, f);
    fwrite(s->data, 1, s->size - cut, f);
    fclose(f);
    free(text);
    s->size = 0, *s->header = 0, *s->metadata = 0;
}

/* ---------------------------------------------------------------- controls */

static char text[1 << 20];      /* what the program printed last */

/* All of a file in `text`; returns its lines. */
static int read_text(const char *name)
{
    char *path = text_of("%s/%s", folder, name);
    FILE *f = fopen(path, "r");
    size_t length = fread(text, 1, sizeof text - 1, f);
    int lines = 0;
    fclose(f);
    free(path);
    text[length] = 0;
    for (size_t i = 0; i < length; i++) lines += text[i] == '\n';
    return lines;
}

/* Runs the program in the folder with these arguments, words with one space between them; returns its exit code, and
 * standard output in `text`. */
static int run_ruyi(const char *arguments, int *lines, int *error_lines)
{
    char *words = text_of("compare %s", arguments), *list[16] = { text_of("%s", ruyi) };
    int status, n = 1;
    for (char *word = strtok(words, " "); word; word = strtok(NULL, " ")) list[n++] = word;
    pid_t child = fork();
    if (child == 0) {
        bool ready = chdir(folder) == 0 && dup2(creat("out", 0666), 1) == 1 && dup2(creat("err", 0666), 2) == 2;
        if (ready) execv(list[0], list);
        _exit(127);
    }
    if (child < 0 || waitpid(child, &status, 0) != child) die(SYSTEM_ERROR, "controls: %s", strerror(errno));
    *error_lines = read_text("err");
    *lines = read_text("out");
    free(words), free(list[0]);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static bool wrong(const char *name, const char *format, ...) PRINTF(2, 3);
static bool wrong(const char *name, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    printf("FAILED %s: ", name);
    vprintf(format, args);
    printf("\n");
    va_end(args);
    return false;
}

/* The last line of text, without its end. */
static char *last_line(void)
{
    size_t length = strlen(text);
    if (length && text[length - 1] == '\n') text[length - 1] = 0;
    char *last = strrchr(text, '\n');
    return last ? last + 1 : text;
}

static bool control_holds(const char *name, const char *arguments, int code, const char *first)
{
    int lines, errors, got = run_ruyi(arguments, &lines, &errors);
    char *last = last_line(), reason[REASON];
    if (got != code) return wrong(name, "exit code %d, expected %d: %s", got, code, last);
    if (lines > 10) return wrong(name, "%d lines, expected at most 10", lines);
    if (code == BAD_INPUT && (lines != 0 || errors != 1)) return wrong(name, "%d lines and %d of errors, expected 0, 1", lines, errors);
    if (code == DONE && (lines != 1 || strncmp(last, "same: ", 6))) return wrong(name, "\"%s\", expected same", last);
    char *wanted = text_of("differs first: %s%s", first ? first : "", first && strchr(first, ':') ? "" : ":");
    bool found = code != DIFFERS || strncmp(last, wanted, strlen(wanted)) == 0;
    free(wanted);
    if (!found) return wrong(name, "\"%s\", expected %s", last, first);
    char *strict = text_of("--json %s", arguments), *all = text_of("-v %s", arguments);
    json root;
    got = run_ruyi(strict, &lines, &errors);
    bool valid = code == BAD_INPUT || json_check(text, strlen(text), false, &root, reason);
    if (got != code || !valid) return wrong(name, "--json: exit code %d, expected %d; %s", got, code, valid ? "" : reason);
    json same = code == BAD_INPUT ? (json){0} : json_member(root, "same"), its_first = code == DIFFERS ? json_member(root, "first") : (json){0};
    if (code != BAD_INPUT && json_kind(same) != (code == DONE ? 't' : 'f')) return wrong(name, "--json: another verdict");
    if (code == DIFFERS && strncmp(its_first.text + 1, first, strcspn(first, ":")) != 0) return wrong(name, "--json: another first");
    got = run_ruyi(all, &lines, &errors);
    free(strict), free(all);
    return got == code || wrong(name, "-v: exit code %d, expected %d", got, code);
}

/* Checks the arguments, which name the files that are there. first: the tensor, or "tensor: measure". */
static void check(const char *name, const char *arguments, int code, const char *first)
{
    if (control_holds(name, arguments, code, first)) passed++;
    else failed++;
}

/* Writes both sides and checks them in a class ("": the build's own). */
static void expect(const char *name, const char *class, int code, const char *first)
{
    char *g = text_of("%s/g", folder), *m = text_of("%s/m", folder);
    char *arguments = text_of("%s%s g m", *class ? "--class " : "", class);
    save(&golden, g, 0), save(&mine, m, 0);
    check(name, arguments, code, first);
    free(g), free(m), free(arguments);
}

/* Floors in golden's metadata. key: floor, floor.bf16, ... list: members of an object, with ' for ". */
static void floors(const char *key, const char *list)
{
    char *to = golden.metadata + strlen(golden.metadata);
    to += sprintf(to, "%s\"%s\":\"{", *golden.metadata ? "," : "", key);
    for (; *list; list++) to += sprintf(to, *list == '\'' ? "\\\"" : "%c", *list);
    sprintf(to, "}\"");
}

/* ---------------------------------------------------------------- numbers */

enum { MOST = 160000 };
static double g[MOST], m[MOST];     /* of GOLDEN and MINE */

/* Numbers like activations: a sum of four even draws, mean 0, variance 1; the same in both. */
static void fill(int64_t count)
{
    uint64_t state = 42;
    for (int64_t i = 0; i < count; i++) {
        double sum = 0;
        for (int k = 0; k < 4; k++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            sum += (double)(state >> 11) * 0x1p-53 - 0.5;
        }
        g[i] = m[i] = sum * sqrt(3);
    }
}

static void both(const char *name, dtype type, const char *shape_list, dtype own)
{
    put(&golden, name, type, shape_list, g);
    put(&mine, name, own, shape_list, m);
}

/* rel-L2 of x, a little more than 1e-9 of it aside, spread so that no other measure is near its limit. */
static void apart(double x)
{
    g[0] = m[0] = 1, g[1] = g[2] = 0;
    m[1] = x / sqrt(2), m[2] = -m[1];
}

/* ---------------------------------------------------------------- limits */

static void test_limits(void)
{
    static const struct { const char *class, *key, *floors, *name; double limit; } cases[] = {
        { "fp64", NULL, NULL, "video", 1e-12 },
        { "fp64", "floor", "'video': 1e-3", "video", 1e-12 },
        { "fp32", NULL, NULL, "video", 2e-6 },
        { "fp32", "floor", "'video': 0.0", "video", 2e-6 },
        { "fp32", "floor", "'video': 1e-6", "video", 8e-6 },
        { "fp32", "floor", "'video': 1e-5", "video", 6e-5 },
        { "fp32", "floor.bf16", "'video': 1e-2", "video", 2e-6 },
        { "fp32", "case\":\"tiny-x\",\"floor", "'video': 1e-5", "video", 8e-5 },
        { "fp16", NULL, NULL, "video", 0x1p-7 },
        { "fp16", "floor.fp16", "'video': 1e-4", "video", 0x1p-9 },
        { "fp16", "floor.fp16", "'video': 1e-3", "video", 8e-3 },
        { "fp16", "floor", "'video': 1e-3", "video", 0x1p-7 },
        { "bf16", NULL, NULL, "video", 0x1p-4 },
        { "bf16", "floor.bf16", "'video': 1e-4", "video", 0x1p-6 },
        { "bf16", "floor.bf16", "'video': 0.01", "video", 0.08 },
        { "bf16", "floor.bf16", "'other': 0.01", "video", 0x1p-4 },
        { "bf16", "floor.bf16", "'noise': 0.001", "noise", 0x1p-6 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int beyond = 0; beyond < 2; beyond++) {
            char *name = text_of("limit %s %s %s%s", cases[i].class, cases[i].key ? cases[i].key : "without floor",
                                 cases[i].floors ? cases[i].floors : "", beyond ? ", just beyond" : ", just within");
            char *first = text_of("%s: rel-L2", cases[i].name);
            apart(cases[i].limit * (beyond ? 1 + 1e-9 : 1 - 1e-9));
            if (cases[i].key) floors(cases[i].key, cases[i].floors);
            both(cases[i].name, F64, "3", F64);
            expect(name, cases[i].class, beyond ? DIFFERS : DONE, first);
            free(name), free(first);
        }
    apart(3);
    floors("floor.bf16", "'video': 0.07"), both("video", F64, "3", F64), expect("a floor that allows no limit", "bf16", DONE, NULL);
    m[1] = NAN;
    floors("floor.bf16", "'video': 0.07"), both("video", F64, "3", F64), expect("NaN without a limit", "bf16", DIFFERS, "video");
    apart(1e-9);
    both("video", F32, "3", F64), expect("fp64, a golden of F32, within 1e-7", "fp64", DONE, NULL);
    apart(1.1e-7);
    both("video", F32, "3", F64), expect("fp64, a golden of F32, beyond 1e-7", "fp64", DIFFERS, "video: rel-L2");
    for (int i = 0; i < 100; i++) g[i] = 1, m[i] = 1 + 0x1p-24;
    both("video", F32, "100", F64), expect("fp64, a constant golden of F32, half an ulp away", "fp64", DONE, NULL);
    apart(1e-7);
    both("video", F64, "3", F64), expect("the class is fp32 by default", "", DONE, NULL);
    floors("floor", "'video': "), both("video", F64, "3", F64), expect("floors that are no JSON", "fp32", BAD_INPUT, NULL);
    both("video", F64, "3", F64), expect("an unknown class", "fp8", BAD_INPUT, NULL);
}

/* One unit in the last place, where nothing may differ, and where it does not matter. */
static void test_exact(void)
{
    fill(100);
    m[7] = nextafter(g[7], 2);
    both("noise", F64, "100", F64), expect("noise: one ulp", "fp32", DIFFERS, "noise: difference");
    both("timesteps", F64, "100", F64), expect("timesteps: one ulp", "bf16", DIFFERS, "timesteps: difference");
    both("video", F64, "100", F64), expect("video: one ulp", "fp64", DONE, NULL);
    fill(100), both("noise", F64, "100", BF16), expect("noise of BF16 in fp32", "fp32", DIFFERS, "noise: difference");
    both("noise", F64, "100", BF16), expect("noise of BF16 in bf16", "bf16", DONE, NULL);
    for (int i = 0; i < 100; i++) m[i] = 1.1 * g[i];
    both("noise", F64, "100", BF16), expect("noise with another scale", "bf16", DIFFERS, "noise: rel-L2");
    for (int i = 0; i < 100; i++) g[i] = m[i] = 1000 - 10 * i;
    both("timesteps", I64, "100", I64), expect("timesteps", "fp64", DONE, NULL);
    both("timesteps", I64, "100", I32), expect("integers of another width", "fp32", DONE, NULL);
    both("timesteps", I64, "100", F64), expect("integers against floats", "fp32", DIFFERS, "timesteps: got F64");
    both("timesteps", F64, "100", I64), expect("floats against integers", "fp32", DIFFERS, "timesteps: got I64");
    m[99]++;
    both("timesteps", I64, "100", I64), expect("a timestep off by one", "fp32", DIFFERS, "timesteps: difference");
    both("x", I32, "100", I64), expect("an I32 off by one", "bf16", DIFFERS, "x: difference");
    both("x", I8, "100", I8), expect("an I8 off by one", "bf16", DIFFERS, "x: difference");
    for (int i = 0; i < 100; i++) g[i] = m[i] = -i;
    both("x", I8, "100", I64), expect("negative integers of another width", "fp32", DONE, NULL);
    for (int i = 0; i < 100; i++) g[i] = m[i] = i / 50;
    both("mask", U8, "100", BOOL), expect("a mask of BOOL", "fp64", DONE, NULL);
    m[50] = 0;
    both("mask", U8, "100", U8), expect("a mask with one hole", "bf16", DIFFERS, "mask: difference");
    both("mask", BOOL, "100", BOOL), expect("a mask of BOOL with one hole", "fp32", DIFFERS, "mask: difference");
    memcpy(m, g, sizeof m);
    for (int i = 0; i < 99; i++) m[i] = g[i + 1];
    both("mask", U8, "100", U8), expect("a mask off by one frame", "fp32", DIFFERS, "mask: difference");
    g[0] = 0x1p53, m[0] = 0x1p53;
    both("x", I64, "1", I64), mine.data[0]++, expect("beyond 2^53, off by one", "fp32", DIFFERS, "x: difference");
    both("x", U64, "1", I64), expect("beyond 2^53, the same", "fp32", DONE, NULL);
    g[0] = -1, m[0] = -1;
    both("x", I64, "1", U64), expect("-1 against 2^64 - 1", "fp32", DIFFERS, "x: difference");
    both("x", C64, "1", C64), expect("complex numbers", "fp32", BAD_INPUT, NULL);
    both("x", F32, "1", C64), expect("complex numbers in MINE", "fp32", BAD_INPUT, NULL);
}

static void test_frames(void)
{
    static const struct { const char *name, *class, *floors; int step, of_1000, code; } cases[] = {
        { "frames: equal", "fp64", NULL, 0, 0, DONE },
        { "frames: one step in one of 1000", "fp32", NULL, 1, 1, DONE },
        { "frames: one step in two of 1000", "fp32", NULL, 1, 2, DIFFERS },
        { "frames: two steps in one", "fp32", NULL, 2, 1, DIFFERS },
        { "frames: one step in fp64", "fp64", NULL, 1, 1, DIFFERS },
        { "frames: fp32 does not loosen", "fp32", "'frames': 3, 'frames.differing': 0.1", 2, 1, DIFFERS },
        { "frames: fp16 without floor", "fp16", NULL, 2, 1000, DONE },
        { "frames: fp16 without floor, one more", "fp16", NULL, 3, 1, DIFFERS },
        { "frames: bf16 without floor", "bf16", NULL, 16, 1000, DONE },
        { "frames: bf16 without floor, one more", "bf16", NULL, 17, 1, DIFFERS },
        { "frames: bf16, 4 floors", "bf16", "'frames': 2, 'frames.differing': 0.1", 8, 400, DONE },
        { "frames: bf16, 4 floors, one more", "bf16", "'frames': 2, 'frames.differing': 0.1", 9, 1, DIFFERS },
        { "frames: bf16, 4 floors, more of them", "bf16", "'frames': 2, 'frames.differing': 0.1", 1, 401, DIFFERS },
        { "frames: bf16, a floor that allows no limit", "bf16", "'frames': 33, 'frames.differing': 0.5", 150, 10, DONE },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        for (int k = 0; k < 3000; k++) g[k] = k % 100, m[k] = g[k] + (k % 1000 < cases[i].of_1000 ? cases[i].step : 0);
        if (cases[i].floors) floors(cases[i].class[0] == 'b' ? "floor.bf16" : "floor", cases[i].floors);
        both("frames", U8, "2,10,50,3", U8);
        expect(cases[i].name, cases[i].class, cases[i].code, "frames");
    }
}

/* ---------------------------------------------------------------- values */

/* One element that is no number, on either side, in every width. */
static void test_not_finite(void)
{
    static const double odd[] = { NAN, INFINITY, -INFINITY };
    static const char *const word[] = { "NaN", "infinity", "-infinity" };
    static const char *const place[] = { "MINE", "GOLDEN", "both" };
    for (int i = 0; i < 3; i++)
        for (int k = 0; k < 3; k++) {
            char *name = text_of("%s in %s", word[i], place[k]);
            fill(1000);
            if (k != 1) m[500] = odd[i];
            if (k != 0) g[500] = odd[i];
            both("video", F64, "10,100", F64), expect(name, "bf16", DIFFERS, "video: rel-L2 nan, limit 0.0625; at [5, 0] ");
            free(name);
        }
    fill(1000), m[3] = NAN;
    both("video", F64, "1000", BF16), expect("NaN in a MINE of BF16", "bf16", DIFFERS, "video");
    both("video", F64, "1000", F16), expect("NaN in a MINE of F16", "fp16", DIFFERS, "video");
    g[3] = NAN;
    both("noise", F32, "1000", F32), expect("NaN in both noises", "fp32", DIFFERS, "noise");
    both("timesteps", F64, "1000", F64), expect("NaN in both timesteps", "bf16", DIFFERS, "timesteps");
    fill(1000), g[3] = m[3] = 70000;
    both("video", F64, "1000", F16), expect("an overflow of F16", "fp16", DIFFERS, "video");
}

static void test_small_and_large(void)
{
    memset(g, 0, sizeof g), memset(m, 0, sizeof m);
    both("video", F64, "4,5", F32), expect("zero and zero", "fp64", DONE, NULL);
    for (int i = 0; i < 20; i++) m[i] = -0.0;
    both("video", F64, "4,5", F64), expect("zero and minus zero", "fp64", DONE, NULL);
    both("noise", F32, "4,5", F32), expect("zero and minus zero, exact", "fp32", DONE, NULL);
    m[3] = 1e-5;
    both("video", F64, "4,5", F64), expect("zero and almost zero", "fp32", DIFFERS, "video: rel-L2");
    m[3] = 1;
    both("video", F64, "4,5", F64), expect("zero and one", "bf16", DIFFERS, "video: rel-L2");
    fill(1000), memset(m, 0, sizeof m);
    both("video", F64, "1000", F64), expect("numbers and zero", "bf16", DIFFERS, "video: rel-L2");
    static const double scales[] = { 1e-310, 1e-200, 1e200, 1e300 };
    for (int i = 0; i < 4; i++) {
        char *honest = text_of("numbers of %g", scales[i]), *off = text_of("numbers of %g, 1 of 1000 off", scales[i]);
        fill(1000);
        for (int k = 0; k < 1000; k++) g[k] *= scales[i], m[k] = g[k] * (1 + 1e-13);
        both("video", F64, "10,100", F64), expect(honest, "fp64", DONE, NULL);
        for (int k = 0; k < 1000; k++) m[k] = g[k] * (1 + 1e-5);
        both("video", F64, "10,100", F64), expect(off, "fp32", DIFFERS, "video: rel-L2");
        free(honest), free(off);
    }
    fill(MOST), m[777] += 5e-4;
    for (int k = 0; k < MOST; k++) g[k] *= 1e-200, m[k] *= 1e-200;
    both("video", F64, "160000", F64), expect("one element of 1e-200", "fp32", DIFFERS, "video: element");
    g[0] = 1.7e308, m[0] = -1.7e308;
    both("video", F64, "1", F64), expect("a difference beyond double", "bf16", DIFFERS, "video");
    fill(1000);
    for (int k = 0; k < 1000; k++) g[k] *= 1e-40, m[k] = g[k] * 1.001;
    both("video", F32, "1000", F32), expect("subnormals of F32, 0.1 % off", "fp32", DIFFERS, "video: rel-L2");
    g[0] = m[0] = 3;
    both("video", F64, "", F64), expect("no dimensions", "fp64", DONE, NULL);
    m[0] = 3.05;
    both("video", F64, "", F64), expect("no dimensions, another number", "bf16", DONE, NULL);
    both("video", F64, "", F64), expect("no dimensions, another number in fp16", "fp16", DIFFERS, "video: rel-L2");
}

/* Honest results pass: golden, rounded to a type, in that type's class, whatever their range. */
static void test_roundings(void)
{
    static const struct { dtype type; const char *class; int code; } cases[] = {
        { F64, "fp64", DONE }, { F32, "fp64", DIFFERS }, { F16, "fp64", DIFFERS }, { BF16, "fp64", DIFFERS },
        { F64, "fp32", DONE }, { F32, "fp32", DONE }, { F16, "fp32", DIFFERS }, { BF16, "fp32", DIFFERS },
        { F64, "fp16", DONE }, { F32, "fp16", DONE }, { F16, "fp16", DONE },
        { F64, "bf16", DONE }, { F32, "bf16", DONE }, { F16, "bf16", DONE }, { BF16, "bf16", DONE },
    };
    for (int wide = 0; wide < 3; wide++)
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            char *name = text_of("%s rounded to %s in %s", wide == 1 ? "cubes" : wide ? "a constant" : "numbers",
                                 dtype_name[cases[i].type], cases[i].class);
            fill(4800);
            for (int k = 0; k < 4800; k++) g[k] = m[k] = wide == 1 ? g[k] * g[k] * g[k] : wide ? 1 + 0x1p-9 + 0x1p-12 + 0x1p-25 : g[k];
            if (cases[i].class[2] == '1') floors("floor.fp16", "'video': 2e-4"); /* what rounding alone costs */
            if (cases[i].class[0] == 'b') floors("floor.bf16", "'video': 1.7e-3");
            both("video", F64, "4,25,48", cases[i].type), expect(name, cases[i].class, cases[i].code, "video");
            free(name);
        }
    fill(4800);
    both("video", F32, "4,25,48", F64), expect("a golden of F32 against F64", "fp64", DONE, NULL);
}

/* ---------------------------------------------------------------- slices, places, orders */

/* x [frames][tokens][channels] of 4, 60, 40; one slice or an order is wrong. */
static void test_slices(void)
{
    enum { T = 4, N = 60, C = 40, ALL = T * N * C };
    static const char shape_list[] = "4,60,40";
    for (int dimension = 0; dimension < 3; dimension++) {
        static const char *const name[] = { "a dead frame", "a dead token", "a dead channel" };
        static const char *const stuck[] = { "a frame like the one before", "a token like the one before", "a channel like the one before" };
        int64_t stride = dimension == 0 ? N * C : dimension == 1 ? C : 1, count = dimension == 0 ? T : dimension == 1 ? N : C;
        for (int k = 0; k < 2; k++) {
            fill(ALL);
            for (int64_t i = 0; i < ALL; i++)
                if (i / stride % count == count - 1) m[i] = k ? g[i - stride] : 0;
            both("video", F64, shape_list, F64), expect(k ? stuck[dimension] : name[dimension], "fp32", DIFFERS, "video: rel-L2");
        }
    }
    /* 1 of 400 dead is 5 % of the length, which bf16 without floors would allow */
    static const char *const shapes[] = { "400,24", "24,400", "2,400,12", "1,400,4,6" };
    static const int64_t strides[] = { 24, 1, 12, 24 };
    for (int i = 0; i < 4; i++) {
        char *name = text_of("one of 400 dead in [%s]", shapes[i]);
        fill(9600);
        for (int64_t k = 0; k < 9600; k++)
            if (k / strides[i] % 400 == 123) m[k] = 0;
        both("video", F64, shapes[i], F64), expect(name, "bf16", DIFFERS, "video: slice");
        free(name);
    }
    int64_t stride = 13200;
    for (int d = 0; d < 4; d++) {
        static const int64_t dim[] = { 10, 12, 11, 10 };
        char *name = text_of("an offset of one index of dimension %d", d);
        stride /= dim[d];
        fill(13200);
        for (int64_t i = 0; i < 13200; i++)
            if (i / stride % dim[d] == 0) m[i] = g[i] + 6e-6;
        both("video", F64, "10,12,1,11,10", F64), expect(name, "fp32", DIFFERS, "video: slice 5.");
        free(name);
    }
    fill(1000), g[5] = 1e4, m[5] = g[5] * (1 + 1e-6);
    both("video", F64, "1000", F64), expect("an outlier has its error", "fp32", DONE, NULL);
    fill(ALL);
    for (int64_t i = 0; i < ALL; i += C) g[i] *= 1e-9, m[i] = 2 * g[i];
    both("video", F64, shape_list, F64), expect("a channel of almost nothing may be off", "fp32", DONE, NULL);
    fill(ALL);
    for (int64_t i = 0; i < ALL; i += C) g[i] *= 1e4, m[i] = g[i] * (1 + 1e-6);
    both("video", F64, shape_list, F64), expect("a channel of outliers has its errors", "fp32", DONE, NULL);
    fill(MOST), m[77777] += 5e-4;
    both("video", F64, "160000", F64), expect("one element of 160,000", "fp32", DIFFERS, "video: element");
    fill(MOST), m[77777] = -g[77777];
    both("video", F64, "400,400", F64), expect("one sign of 160,000", "fp16", DIFFERS, "video: element");
    fill(ALL);
    for (int64_t i = 0; i < ALL; i++) m[i] = g[i] + 1.5e-6;
    both("video", F64, shape_list, F64), expect("all with an offset", "fp32", DIFFERS, "video: bias");
    static const char *const names[] = { "a sign", "scaled by 1.001", "another order of channels", "two frames swapped", "a frame late", "reversed" };
    for (int k = 0; k < 6; k++) {
        fill(ALL);
        for (int64_t i = 0; i < ALL; i++)
            m[i] = k == 0 ? -g[i] : k == 1 ? g[i] * 1.001 : k == 2 ? g[i / C * C + (i + 1) % C] : k == 3 ? g[i < 2 * N * C ? (i + N * C) % (2 * N * C) : i]
                   : k == 4 ? g[i < N * C ? i : i - N * C] : g[ALL - 1 - i];
        both("video", F64, shape_list, F64), expect(names[k], k == 1 ? "fp32" : "bf16", DIFFERS, "video: rel-L2");
    }
    fill(1600);
    for (int i = 0; i < 1600; i++) m[i] = g[i % 40 * 40 + i / 40];
    both("video", F64, "40,40", F64), expect("equal axes swapped", "bf16", DIFFERS, "video: rel-L2");
    put(&golden, "video", F64, "20,80", g), put(&mine, "video", F64, "80,20", m), expect("axes swapped", "bf16", DIFFERS, "video: got F64 [80, 20]");
    put(&golden, "video", F64, "1600", g), put(&mine, "video", F64, "40,40", g), expect("another rank", "bf16", DIFFERS, "video: got F64 [40, 40]");
    put(&golden, "video", F64, "1600", g), put(&mine, "video", F64, "1600,1", g), expect("a dimension more", "bf16", DIFFERS, "video: got");
    put(&golden, "video", F64, "1600", g), put(&mine, "video", F64, "1,1600", g), expect("a dimension more in front", "bf16", DIFFERS, "video: got");
    put(&golden, "video", F64, "16,4", g), put(&mine, "video", F64, "15,4", g), expect("a frame less", "fp32", DIFFERS, "video: got");
}

/* The first that differs is first in the order of computing, whatever the file's order is. */
static void test_order(void)
{
    static const char *const pairs[][2] = {
        { "step.000.block.02", "step.000.block.10" }, { "step.002.pred", "step.010.pred" }, { "pixels", "frames" },
        { "step.000.block.02.ff", "step.000.block.02" }, { "step.000.block.02.attn1", "step.000.block.02.ff" },
        { "noise", "step.000.temb" }, { "vae.enc.out.s00", "vae.dec.conv_in.s00" }, { "step.999.out", "step.1000.out" },
        { "decoded", "video" }, { "clip.hidden", "mask_latents" }, { "step.000.out", "unheard.of" },
    };
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++)
        for (int k = 0; k < 2; k++) {
            char *name = text_of("%s before %s, %s", pairs[i][0], pairs[i][1], k ? "in the file, too" : "not in the file");
            fill(100);
            for (int j = 0; j < 100; j++) m[j] = 2 * g[j];
            both(pairs[i][k ? 0 : 1], F64, "100", F64), both(pairs[i][k ? 1 : 0], F64, "100", F64);
            expect(name, "fp32", DIFFERS, pairs[i][0]);
            free(name);
        }
    fill(100);
    both("step.000.pred", F64, "100", F64), put(&golden, "step.000.temb", F64, "100", g), m[0] += 1;
    both("frames.x", F64, "100", F64), expect("missing before different", "fp32", DIFFERS, "step.000.temb: got nothing");
}

/* ---------------------------------------------------------------- files and names */

static void test_files(void)
{
    fill(100);
    both("a", F64, "100", F64), put(&golden, "b", F64, "100", g), expect("one is missing", "fp32", DIFFERS, "b: got nothing");
    both("a", F64, "100", F64), put(&mine, "b", F64, "100", g), expect("one more", "fp32", DONE, NULL);
    put(&golden, "a", F64, "100", g), put(&mine, "b", F64, "100", g), expect("nothing in common", "fp32", BAD_INPUT, NULL);
    put(&mine, "b", F64, "100", g), expect("an empty GOLDEN", "fp32", BAD_INPUT, NULL);
    put(&golden, "b", F64, "100", g), expect("an empty MINE", "fp32", BAD_INPUT, NULL);
    expect("both empty", "fp32", BAD_INPUT, NULL);
    both("a", F64, "0", F64), expect("tensors without elements alone", "fp32", BAD_INPUT, NULL);
    both("a", F64, "0,4", F64), both("b", F64, "100", F64), expect("one without elements", "fp32", DONE, NULL);
    put(&golden, "a", F64, "0,4", g), put(&mine, "a", F64, "4,0", g), expect("none of another shape", "fp32", DIFFERS, "a: got");
    m[0] = 9;
    both("a\\\"b\\\\c\\n\\td\\u0001", F64, "100", F64), expect("a name of strange characters", "fp32", DIFFERS, "a\\\"b\\\\c\\u000a\\u0009d\\u0001");
    m[0] = NAN;
    both("\xc3\xa4.\xe6\xad\xa5", F64, "100", F64), expect("a name beyond ASCII", "fp32", DIFFERS, "\xc3\xa4.\xe6\xad\xa5");
    fill(100);
    char *paths[] = { text_of("%s/g", folder), text_of("%s/m", folder), text_of("%s/case", folder), text_of("%s/case/expected.safetensors", folder),
                      text_of("%s/case/latents.safetensors", folder), text_of("%s/two", folder), text_of("%s/two/1.safetensors", folder),
                      text_of("%s/two/2.safetensors", folder), text_of("%s/hollow", folder) };
    mkdir(paths[2], 0777), mkdir(paths[5], 0777), mkdir(paths[8], 0777);
    put(&golden, "a", F64, "100", g), save(&golden, paths[0], 0);
    put(&mine, "a", F64, "100", g), save(&mine, paths[1], 0);
    check("a file and itself", "g g", DONE, NULL);
    check("no file", "g missing", BAD_INPUT, NULL), check("no golden file", "missing g", BAD_INPUT, NULL);
    check("a folder of nothing", "g hollow", BAD_INPUT, NULL), check("one name", "g", BAD_INPUT, NULL), check("three names", "g m m", BAD_INPUT, NULL);
    put(&golden, "a", F64, "100", g), save(&golden, paths[3], 0);
    put(&golden, "latents", F64, "100", g), save(&golden, paths[4], 0);
    check("a golden case", "case m", DONE, NULL), check("a golden case as MINE", "m case", DONE, NULL);
    put(&mine, "a", F64, "100", g), save(&mine, paths[6], 0), put(&mine, "b", F64, "100", g), save(&mine, paths[7], 0);
    check("a folder of files", "g two", DONE, NULL), check("a folder as GOLDEN", "two g", DIFFERS, "b: got nothing");
    put(&mine, "a", F64, "100", g), save(&mine, paths[7], 0);
    check("a name twice in a folder", "g two", BAD_INPUT, NULL);
    static const size_t cuts[] = { 1, 8, 799 };
    for (int i = 0; i < 3; i++) {
        char *name = text_of("cut by %zu bytes", cuts[i]), *golden_name = text_of("GOLDEN cut by %zu bytes", cuts[i]);
        put(&mine, "a", F64, "100", g), save(&mine, paths[1], cuts[i]);
        check(name, "g m", BAD_INPUT, NULL), check(golden_name, "m g", BAD_INPUT, NULL);
        free(name), free(golden_name);
    }
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) free(paths[i]);
}

/* What is wrong in the first third only, of tensors so large that they are taken in parts. */
static void test_parts(void)
{
    fill(MOST);
    for (int i = 0; i < MOST / 3; i++) m[i] += i % 2 ? 5e-6 : -5e-6;
    both("video", F64, "160000", F64), expect("a third of 160,000 off", "fp32", DIFFERS, "video: rel-L2");
    fill(MOST);
    for (int i = 3; i < MOST; i += 400) m[i] += 5e-6;
    both("video", F64, "400,400", F64), expect("a channel of 400 off", "fp32", DIFFERS, "video: slice");
    for (int i = 0; i < 150000; i++) g[i] = m[i] = i % 200;
    for (int i = 0; i < 300; i++) m[i]++;
    both("frames", U8, "5,100,100,3", U8), expect("300 samples of 150,000", "fp32", DIFFERS, "frames: changed");
}

/* The same bytes from any number of threads: large enough for several blocks, in three types. */
static void test_threads(void)
{
    static const char *const threads[] = { "1", "2", "3", "7" };
    static const dtype types[] = { F64, F32, BF16 };
    char *first = NULL, *paths[] = { text_of("%s/g", folder), text_of("%s/m", folder) };
    fill(MOST);
    for (int i = 0; i < 3; i++) {
        char name[] = { (char)('a' + i), 0 };
        both(name, types[i], "2,40,50,40", BF16);
    }
    save(&golden, paths[0], 0), save(&mine, paths[1], 0);
    for (int i = 0; i < 4; i++) {
        int lines, errors;
        setenv("OMP_NUM_THREADS", threads[i], 1);
        run_ruyi("--json g m", &lines, &errors);
        if (i == 0) first = text_of("%s", text);
        if (lines > 3 && strcmp(first, text) == 0) passed++;
        else failed++, wrong("threads", "%s threads print other numbers than one", threads[i]);
    }
    free(first), free(paths[0]), free(paths[1]);
}

int main(int argc, char **argv)
{
    if (argc != 2 || !mkdtemp(folder)) die(BAD_INPUT, "controls: expected the program and a place for files in /tmp");
    ruyi = realpath(argv[1], NULL);
    if (!ruyi) die(BAD_INPUT, "%s: %s", argv[1], strerror(errno));
    side *sides[] = { &golden, &mine };
    for (int i = 0; i < 2; i++) sides[i]->header = allocate(1 << 16, 1), sides[i]->data = allocate(1 << 24, 1);
    test_limits();
    test_exact();
    test_frames();
    test_not_finite();
    test_small_and_large();
    test_roundings();
    test_slices();
    test_order();
    test_files();
    test_parts();
    test_threads();
    char *clean = text_of("rm -rf %s", folder);
    if (system(clean) != 0) failed++;
    printf("%d passed, %d failed\n", passed, failed);
    return failed ? DIFFERS : DONE;
}
