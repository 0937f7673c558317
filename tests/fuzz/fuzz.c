/* fuzz.c - every reader of foreign bytes, on any bytes: they are taken or refused, in one line, and nothing else.
 *
 * Built twice. With libFuzzer and sanitizers (make fuzz) a target, named by the environment's FUZZ, is fed with bytes
 * that grow out of corpus/TARGET. With -DEXHAUSTIVE (make test) main() feeds each target with every file of its corpus:
 * as it is, cut after every byte, and with every bit turned by itself.
 *
 * The sources are included after the names below have been given another meaning, which is none of the product's:
 *     exit            leaves the reader by longjmp, so that a process survives millions of refusals
 *     malloc, ...     keep account: parsers free what they took, and nobody takes much for few bytes
 *     open, mmap, ... know the files of the target only, whose bytes end where their memory ends
 *     fprintf, printf write nothing; a message of die() must be one line of printable characters
 */
#define _DEFAULT_SOURCE     /* madvise */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <inttypes.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* A finding: what libFuzzer and make test report. */
#define REQUIRE(condition, ...) \
    do {                        \
        if (!(condition)) finding(__LINE__, __VA_ARGS__); \
    } while (0)

static _Noreturn void finding(int line, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fprintf(stderr, "FAILED %s:%d: ", __FILE__, line);
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    abort();
}

/* ---------------------------------------------------------------- the system, as the readers see it here */

/* All memory in use, in the order of taking it; what was freed is a hole, until nothing above it is in use. Blocks are
 * freed in their order or against it, as a rule: the next one is a neighbour of the last. */
static struct { void *at; size_t size; } *blocks;
static size_t nblocks, end_block, last_freed, room, in_use, peak;

static void *keep(void *at, size_t size)
{
    if (end_block == room) blocks = realloc(blocks, (room = 2 * room + 64) * sizeof *blocks);
    REQUIRE(at && blocks, "memory: none left");
    blocks[end_block].at = at;
    blocks[end_block].size = size;
    last_freed = end_block++;
    nblocks++;
    in_use += size;
    if (in_use > peak) peak = in_use;
    return at;
}

static void forget(void *at)
{
    size_t distance = 0, i = 0;
    for (bool found = false; !found; distance++) {
        REQUIRE(distance <= end_block, "memory: freed what was not allocated");
        if (last_freed + distance < end_block && blocks[last_freed + distance].at == at) found = true, i = last_freed + distance;
        else if (last_freed >= distance && blocks[last_freed - distance].at == at) found = true, i = last_freed - distance;
    }
    in_use -= blocks[i].size;
    blocks[i].at = NULL;
    nblocks--;
    while (end_block > 0 && !blocks[end_block - 1].at) end_block--;
    last_freed = i < end_block ? i : end_block > 0 ? end_block - 1 : 0;
}

/* Requests beyond 64 MB fail, as they might anywhere. */
static const size_t most_memory = (size_t)1 << 26;

static void *fake_calloc(size_t count, size_t size)
{
    bool fits = count == 0 || size <= most_memory / count;
    return fits ? keep(calloc(count, size), count * size) : NULL;
}

static void fake_free(void *at)
{
    if (at) forget(at);
    free(at);
}

static void *fake_realloc(void *at, size_t size)
{
    if (size > most_memory) return NULL;
    if (at) forget(at);
    return keep(realloc(at, size), size);
}

static jmp_buf outside;
static char said[8192];         /* the last message */

static _Noreturn void fake_exit(int code)
{
    size_t length = strlen(said);
    REQUIRE(code == 2 || code == 3, "exit code %d", code);
    REQUIRE(length > 7 && said[length - 1] == '\n', "no line: %s", said);
    for (size_t i = 0; i + 1 < length; i++)
        REQUIRE((unsigned char)said[i] >= ' ' && said[i] != 0x7f, "byte %d in: %s", said[i], said);
    longjmp(outside, 1);
}

static char printed[1 << 20];   /* on standard output */
static size_t nprinted;

static void fake_print(FILE *stream, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    size_t left = sizeof printed - nprinted;
    if (stream == stderr) vsnprintf(said, sizeof said, format, args);
    else if (stream == stdout) nprinted += (size_t)vsnprintf(printed + nprinted, left, format, args);
    else vfprintf(stream, format, args);
    va_end(args);
    if (nprinted > sizeof printed) nprinted = sizeof printed;
}

/* Files of a target, by name. A descriptor is FIRST + its place. */
static struct { const char *name; const unsigned char *bytes; size_t size, at; } files[4];
enum { FILES = 4, FIRST = 1000 };

static int fake_open(const char *path)
{
    for (int i = 0; i < FILES; i++)
        if (files[i].name && strcmp(files[i].name, path) == 0) {
            files[i].at = 0;
            return FIRST + i;
        }
    errno = ENOENT;
    return -1;
}

static int fake_stat(int fd, struct stat *about)
{
    memset(about, 0, sizeof *about);
    about->st_mode = S_IFREG;
    if (fd >= FIRST) about->st_size = (off_t)files[fd - FIRST].size;
    return fd >= FIRST ? 0 : -1;
}

static ssize_t fake_read(int fd, void *to, size_t size)
{
    size_t i = (size_t)(fd - FIRST), left = files[i].size - files[i].at;
    if (size > left) size = left;
    memcpy(to, files[i].bytes + files[i].at, size);
    files[i].at += size;
    return (ssize_t)size;
}

static void fake_advice(const void *at, size_t size, int advice) { (void)at, (void)size, (void)advice; }
static int fake_close(int fd) { return fd < FIRST ? -1 : 0; }

/* The bytes in memory of exactly their size. */
static unsigned char *exact(const unsigned char *bytes, size_t size)
{
    unsigned char *copy = keep(malloc(size ? size : 1), size);
    if (size) memcpy(copy, bytes, size);
    return copy;
}

#define exit(code)                  fake_exit(code)
#define calloc(count, size)         fake_calloc(count, size)
#define realloc(at, size)           fake_realloc(at, size)
#define free(at)                    fake_free(at)
#define fprintf(stream, ...)        fake_print(stream, __VA_ARGS__)
#define printf(...)                 fake_print(stdout, __VA_ARGS__)
#define madvise(at, size, advice)   fake_advice(at, size, advice)
#define open(path, ...)             fake_open(path)
#define stat(path, about)           fake_stat(fake_open(path), about)
#define fstat(fd, about)            fake_stat(fd, about)
#define access(path, mode)          (fake_open(path) < 0 ? -1 : 0)
#define read(fd, to, size)          fake_read(fd, to, size)
#define close(fd)                   fake_close(fd)
#define mmap(at, size, p, f, fd, o) ((void *)exact(files[(fd) - FIRST].bytes, size))
#define munmap(at, size)            fake_free(at)
#define opendir(path)               (errno = ENOTDIR, (DIR *)NULL)

#include "../../io.c"
#include "../../tensor.c"
#include "../../vae.c"
#include "../../dit.c"
#define main ruyi_main
#include "../../ruyi.c"
#undef main

/* ---------------------------------------------------------------- what holds of everything that is taken */

static void check_reason(const char *reason)
{
    REQUIRE(memchr(reason, 0, REASON) && *reason, "a refusal without a reason");
}

/* A decoded string is UTF-8, with C0 80 for U+0000. */
static void check_text(const char *text)
{
    const unsigned char *p = (const unsigned char *)text;
    while (*p) {
        size_t length = p[0] == 0xC0 && p[1] == 0x80 ? 2 : utf8_length(p, strlen((const char *)p));
        REQUIRE(length > 0, "no UTF-8: %s", text);
        p += length;
    }
}

/* Every value can be walked, decoded, and found by its name. */
static void check_json(json value, int depth)
{
    json cursor = {0}, name, item;
    REQUIRE(depth <= JSON_DEPTH && value.text < value.end && json_kind(value), "a value that is none");
    if (json_kind(value) == '0') (void)json_number(value);
    if (json_kind(value) == '"') {
        char *text = json_string(value);
        check_text(text);
        free(text);
    }
    while (json_next(value, &cursor, &name, &item)) {
        REQUIRE(item.text > value.text && item.end < value.end, "a member outside");
        if (name.text) {
            char *text = json_string(name);
            REQUIRE(json_member(value, text).text >= item.text, "a member that is not found: %s", text);
            free(text);
            check_json(name, depth);
        }
        check_json(item, depth + 1);
    }
}

/* The rules of the format, by another way than the reader's. */
static void check_safetensors(const safetensors *file, const unsigned char *bytes, size_t size)
{
    uint64_t header = 8;
    for (int i = 0; i < 8; i++) header += (uint64_t)bytes[i] << (8 * i);
    const unsigned char *next = bytes + header;
    for (int64_t i = 0; i < file->count; i++) {
        const st_tensor *t = &file->tensors[i];
        uint64_t elements = 1;
        for (int k = 0; k < t->ndim; k++) elements *= (uint64_t)t->dim[k];
        REQUIRE(t->type < DTYPES && t->count == elements && t->bytes * 8 == elements * (uint64_t)dtype_bits[t->type],
                "%s: bytes", t->name);
        REQUIRE(t->data == next && t->begin == (uint64_t)(next - bytes) - header, "%s: place", t->name);
        REQUIRE(safetensors_find(file, t->name) == t, "%s: not found", t->name);
        if (t->count > 0 && is_number(t->type)) (void)element(t, 0), (void)element(t, t->count - 1);
        next += t->bytes;
        check_text(t->name);
    }
    REQUIRE(next == bytes + size, "bytes after the last tensor");
    if (file->metadata.text) check_json(file->metadata, 0);
}

/* ---------------------------------------------------------------- targets */

static bool taken;              /* the last input was */

static void target_json(const unsigned char *bytes, size_t size)
{
    char reason[REASON] = "";
    json root, again;
    bool strict = json_check((const char *)bytes, size, false, &root, reason);
    bool lax = json_check((const char *)bytes, size, true, &again, reason);
    REQUIRE(lax || !strict, "taken without -Infinity only");
    if (!lax) {
        check_reason(reason);
        REQUIRE(!again.text, "a value of refused text");
        return;
    }
    taken = true;
    check_json(again, 0);
    REQUIRE(json_check(again.text, (size_t)(again.end - again.text), true, &root, reason), "the value by itself: %s", reason);
}

/* One field, asked for as each type. volatile: as setjmp wants it. */
static void ask(config c, const char *field, int type)
{
    int64_t integers[4];
    volatile int64_t number = 0;
    volatile int count = 0;
    char *words[2];
    if (setjmp(outside)) return;
    switch (type) {
    case 0: number = config_int(c, field, REQUIRED, -5, 5); break;
    case 1: REQUIRE(isfinite(config_real(c, field, NAN)), "%s is not finite", field); break;
    case 2: config_bool(c, field, false); break;
    case 3: check_text(config_word(c, field, NULL)); break;
    case 4: count = config_ints(c, field, integers, 4); break;
    default:
        count = config_words(c, field, words, 2);
        REQUIRE(count <= 2, "%s: %d words", field, count);
        for (int i = 0; i < count; i++) check_text(words[i]);
    }
    REQUIRE(number >= -5 && number <= 5 && count >= -1 && count <= 4, "%s: beyond its limits", field);
}

static bool open_config(config *c)
{
    if (setjmp(outside)) return false;
    *c = config_open("m", "config.json");
    return true;
}

/* The bytes are FOLDER/config.json. */
static void target_config(const unsigned char *bytes, size_t size)
{
    config c;
    json cursor = {0}, name, value;
    files[0].name = "m/config.json", files[0].bytes = bytes, files[0].size = size;
    if (!open_config(&c)) return;
    taken = true;
    config_print_unread(c);
    for (int field = 0; field < 8 && json_next(c.root, &cursor, &name, &value); field++) {
        char *text = json_string(name);
        for (int type = 0; type < 6; type++) ask(c, text, type);
        free(text);
    }
    config_print_unread(c);
    config_close(c);
}

static void target_safetensors(const unsigned char *bytes, size_t size)
{
    char reason[REASON] = "";
    safetensors file;
    if ((taken = safetensors_parse(bytes, size, &file, reason))) {
        check_safetensors(&file, bytes, size);
        safetensors_free(&file);
    } else {
        check_reason(reason);
        REQUIRE(strncmp(reason, "rule ", 5) == 0, "no rule: %s", reason);
    }
    REQUIRE(nblocks == 1, "%zu blocks are left", nblocks - 1);
}

/* A checkpoint of whatever run it says, with the sum made right: what passes the check can be copied into the next one.
 * There is no folder for that, so it ends there. */
static void target_checkpoint(const unsigned char *bytes, size_t size)
{
    char reason[REASON] = "";
    static safetensors file;
    unsigned char *copy = exact(bytes, size);
    struct checkpoint k = { .path = "k", .file = &file, .work = (double[WORKS]){0} };
    if (!safetensors_parse(copy, size, &file, reason)) return;
    const st_tensor *t = safetensors_find(&file, "identity");
    if (file.count > 0 && file.tensors[file.count - 1].bytes == 8) {
        uint64_t sum = hash_bytes(0, copy, (size_t)(file.tensors[0].data - copy));
        for (int64_t i = 0; i + 1 < file.count; i++) sum = hash_bytes(sum, file.tensors[i].data, (size_t)file.tensors[i].bytes);
        for (int i = 0; i < 8; i++) copy[size - 8 + (size_t)i] = (unsigned char)(sum >> (8 * i));
    }
    if (t && t->bytes == 8 * IDENTITY) memcpy(k.identity, t->data, 8 * IDENTITY);
    if (!checkpoint_check(&file, k.identity, reason)) {
        check_reason(reason);
        return;
    }
    taken = true;
    if (setjmp(outside) == 0) checkpoint_write(&k, &(st_entry){0}, 0, true);
}

/* The bytes are an index beside two shards, which hold p and q, and r. */
static void target_index(const unsigned char *bytes, size_t size)
{
    static const char a[] = "\153\0\0\0\0\0\0\0{\"p\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
                            "\"q\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[4,8]}} 12345678",
                      b[] = "\67\0\0\0\0\0\0\0{\"r\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}  12";
    files[0].name = "m/x.safetensors.index.json", files[0].bytes = bytes, files[0].size = size;
    files[1].name = "m/a", files[1].bytes = (const unsigned char *)a, files[1].size = sizeof a - 1;
    files[2].name = "m/b", files[2].bytes = (const unsigned char *)b, files[2].size = sizeof b - 1;
    if (setjmp(outside)) return;
    weights *w = weights_open("m", "x");
    REQUIRE(w->nfiles <= 2, "%d files", w->nfiles);
    if (weights_has(w, "p")) bind(w, SHAPE(1), "%s", "p");
    if (weights_has(w, "q")) bind(w, (shape){0}, "%s", "q");
    if (weights_has(w, "r")) weights_ignore(w, "r*");
    weights_done(w, false);
    taken = true;
}

/* A stream of pictures. What is taken is taken again as the P6 that it stands for. */
static void target_ppm(const unsigned char *bytes, size_t size)
{
    char reason[REASON] = "", head[64];
    size_t used, n;
    image i, again;
    for (size_t at = 0; at < size; at += used) {
        if (!ppm_parse(bytes + at, size - at, &used, &i, reason)) {
            check_reason(reason);
            REQUIRE(!i.rgb, "a picture of refused bytes");
            break;
        }
        taken = true;
        REQUIRE(used > 0 && used <= size - at && i.w > 0 && i.h > 0 && (size_t)(i.w * i.h) <= size, "a picture of other bytes");
        n = (size_t)snprintf(head, sizeof head, "P6 %d %d 255\n", (int)i.w, (int)i.h);
        unsigned char *copy = allocate(n + (size_t)(i.w * i.h * 3), 1);
        memcpy(copy, head, n);
        memcpy(copy + n, i.rgb, (size_t)(i.w * i.h * 3));
        size_t taken;
        REQUIRE(ppm_parse(copy, n + (size_t)(i.w * i.h * 3), &taken, &again, reason), "as P6: %s", reason);
        REQUIRE(again.w == i.w && again.h == i.h && memcmp(again.rgb, i.rgb, (size_t)(i.w * i.h * 3)) == 0, "another picture");
        free(again.rgb);
        free(i.rgb);
        free(copy);
    }
    REQUIRE(nblocks == 1, "%zu blocks are left", nblocks - 1);
}

/* A clip: the header, and frames until one is refused. */
static void target_y4m(const unsigned char *bytes, size_t size)
{
    char reason[REASON] = "";
    size_t at = 0, used = 0;
    y4m head;
    image i;
    taken = y4m_header(bytes, size, &used, &head, reason);
    bool header = taken;
    if (header) REQUIRE(used > 0 && used <= size && head.w > 0 && head.h > 0, "a header of other bytes");
    for (at = used; header && at < size; at += used) {
        if (!(taken = y4m_parse(&head, bytes + at, size - at, &used, &i, reason))) {
            REQUIRE(!i.rgb, "a frame of refused bytes");
            check_reason(reason);
            break;
        }
        REQUIRE(used > 0 && used <= size - at && i.w == head.w && i.h == head.h && (size_t)(i.w * i.h) < size, "a frame of other bytes");
        unsigned sum = 0;
        for (int64_t k = 0; k < 3 * i.w * i.h; k++) sum += i.rgb[k];
        REQUIRE(sum <= 255u * 3 * (unsigned)(i.w * i.h), "more than white");
        free(i.rgb);
    }
    if (!taken) check_reason(reason);
    REQUIRE(nblocks == 1, "%zu blocks are left", nblocks - 1);
}

/* The bytes are the header of GOLDEN and of MINE; 32 bytes of data follow it: metadata, names, shapes and types as they
 * may come, compared with themselves. */
static void target_compare(const unsigned char *bytes, size_t size)
{
    static const float data[8] = { 1, -2, 0.5f, 1e30f, 0, 3, 1, 4 };
    unsigned char *file = allocate(8 + size + sizeof data, 1);
    for (int i = 0; i < 4; i++) file[i] = (unsigned char)(size >> (8 * i));
    memcpy(file + 8, bytes, size);
    memcpy(file + 8 + size, data, sizeof data);
    for (int i = 0; i < 2; i++) {
        files[i].name = i ? "mine" : "golden";
        files[i].bytes = file, files[i].size = 8 + size + sizeof data;
    }
    if (setjmp(outside)) return;
    for (volatile int as_json = 0; as_json < 2; as_json++) {
        char reason[REASON] = "";
        json root;
        nprinted = 0;
        int code = compare("golden", "mine", NULL, true, as_json);
        REQUIRE(code == DONE || code == DIFFERS, "exit code %d", code);
        if (as_json) REQUIRE(json_check(printed, nprinted, false, &root, reason), "no JSON: %s: %.*s", reason, (int)nprinted, printed);
    }
    taken = true;
}

static const struct { const char *name; void (*run)(const unsigned char *bytes, size_t size); } targets[] = {
    { "json", target_json }, { "config", target_config }, { "safetensors", target_safetensors },
    { "index", target_index }, { "ppm", target_ppm }, { "y4m", target_y4m }, { "checkpoint", target_checkpoint }, { "compare", target_compare },
};
enum { TARGETS = sizeof targets / sizeof *targets };

/* One input. A reader's memory is a small multiple of what it reads (a tensor is described in 50 bytes at least, and
 * takes 200), and 200 KB for buffers. */
static void feed(int target, const unsigned char *bytes, size_t size)
{
    in_use = peak = 0, taken = false;
    targets[target].run(exact(bytes, size), size);
    REQUIRE(peak <= 200000 + 100 * size, "%zu bytes of memory for %zu bytes", peak, size);
    while (nblocks > 0) fake_free(blocks[end_block - 1].at);
    memset(files, 0, sizeof files);
    unfinished = NULL;
}

#undef fprintf
#undef printf
#undef open
#undef stat
#undef close
#undef read
#undef free
#undef opendir

#ifndef EXHAUSTIVE

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    static int target = -1;
    const char *name = getenv("FUZZ");
    for (int i = 0; i < TARGETS && target < 0; i++)
        if (name && strcmp(name, targets[i].name) == 0) target = i;
    REQUIRE(target >= 0, "FUZZ: no such target");
    feed(target, bytes, size);
    return 0;
}

#else

static int passed;

/* Every form of one file. */
static void damage(int target, const char *path)
{
    FILE *f = fopen(path, "rb");
    static unsigned char bytes[1 << 16];
    REQUIRE(f, "%s: cannot be opened", path);
    size_t size = fread(bytes, 1, sizeof bytes, f);
    fclose(f);
    feed(target, bytes, size);
    for (size_t n = 0; n < size; n++) feed(target, bytes, n);
    for (size_t bit = 0; bit < 8 * size; bit++) {
        bytes[bit / 8] ^= (unsigned char)(1 << bit % 8);
        feed(target, bytes, size);
        bytes[bit / 8] ^= (unsigned char)(1 << bit % 8);
    }
    passed += 3;
}

/* Files made to be expensive: HEAD, then UNIT COUNT times, then TAIL. claim: the length that a safetensors file states;
 * -1: the true one. */
static const struct { const char *target; int64_t claim; const char *head, *unit; int count; const char *tail; } hostile[] = {
    { "safetensors", 100000000, "{}", "", 0, "" },
    { "safetensors", INT64_MAX, "{}", "", 0, "" },
    { "safetensors", -1, "{\"a\":", "[", 10000000, "" },
    { "safetensors", -1, "{", " ", 10000000, "" },
    { "safetensors", -1, "{\"__metadata__\":{\"a\":\"", "x", 10000000, "\",\"b\":1}}" },
    { "safetensors", -1, "{\"", "x", 10000000, "\":{}}" },
    { "safetensors", -1, "{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,2],\"shape\":[1", ",1", 1000000, "]}}" },
    { "safetensors", -1, "{\"a\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[1", ",1", 1000000, "]}}" },
    { "safetensors", -1, "{\"b\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}",
      ",\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}", 100000, "}" },
    { "safetensors", -1, "{\"b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}",
      ",\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[7,8]}", 100000, "}" },
    { "json", 0, "", "[", 10000000, "" },
    { "json", 0, "", "{\"a\":", 1000000, "" },
    { "json", 0, "\"", "\\u00e9", 1000000, "" },
    { "config", 0, "{\"a\":\"", "x", 10000000, "\"}" },
    { "config", 0, "{", "\"a\":[],", 500000, "}" },
    { "compare", 0, "{\"__metadata__\":{\"floor\":\"", "[", 1000000, "\"}}" },
    { "index", 0, "{\"weight_map\":{\"p\":\"a\"", ",\"p\":\"b\"", 300000, "}}" },
    { "ppm", 0, "P6 2147483647 2147483647 65535\n", "x", 1000000, "" },
    { "ppm", 0, "P3 1000000 1 255", " 0", 2999999, "" },
    { "y4m", 0, "YUV4MPEG2 W2147483647 H2147483647 Cmono\nFRAME\n", "x", 1000000, "" },
    { "y4m", 0, "YUV4MPEG2", " ", 10000000, "" },
    { "ppm", 0, "P6 #", "#", 10000000, "" },
    { "ppm", 0, "P6 1", "0", 10000000, " 1 255\n" },
};

/* Each is refused for less than 16 MB beside the file itself, and a second of computing (sanitizers: ten). */
static void cost(int number)
{
    const char *unit = hostile[number].unit;
    size_t head = strlen(hostile[number].head), tail = strlen(hostile[number].tail), n = strlen(unit), at = 0;
    size_t text = head + n * (size_t)hostile[number].count + tail;
    bool prefix = strcmp(hostile[number].target, "safetensors") == 0;
    uint64_t claim = hostile[number].claim < 0 ? text : (uint64_t)hostile[number].claim;
    unsigned char *bytes = malloc(8 + text);
    int target = 0;
    REQUIRE(bytes, "memory: none left");
    for (; prefix && at < 8; at++) bytes[at] = (unsigned char)(claim >> (8 * at));
    memcpy(bytes + at, hostile[number].head, head), at += head;
    for (int i = 0; i < hostile[number].count; i++, at += n) memcpy(bytes + at, unit, n);
    memcpy(bytes + at, hostile[number].tail, tail), at += tail;
    while (strcmp(targets[target].name, hostile[number].target) != 0) target++;
    double seconds = 1;
    for (int i = 0; i < 3 && seconds >= 1; i++) {       /* again where something else took the processor */
        clock_t start = clock();
        feed(target, bytes, at);
        seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
    }
#if defined __SANITIZE_ADDRESS__
    seconds /= 10;
#endif
    REQUIRE(!taken, "hostile file %d is taken", number);
    REQUIRE(peak - at < 16000000, "hostile file %d takes %zu bytes", number, peak - at);
    REQUIRE(seconds < 1, "hostile file %d takes %.1f s", number, seconds);
    (free)(bytes);
    passed++;
}

/* Runs from the root of the repository. */
int main(void)
{
    for (int t = 0; t < TARGETS; t++) {
        char path[512];
        snprintf(path, sizeof path, "tests/fuzz/corpus/%s", targets[t].name);
        DIR *folder = opendir(path);
        REQUIRE(folder, "%s: no corpus", path);
        for (const struct dirent *d; (d = readdir(folder));) {
            if (d->d_name[0] == '.') continue;
            snprintf(path, sizeof path, "tests/fuzz/corpus/%s/%s", targets[t].name, d->d_name);
            damage(t, path);
        }
        closedir(folder);
    }
    for (size_t i = 0; i < sizeof hostile / sizeof *hostile; i++) cost((int)i);
    printf("%d passed, 0 failed\n", passed);
    return 0;
}

#endif
