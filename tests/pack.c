/* pack.c - the golden pack as a whole: its list of contents, and the floors in its files.
 *
 *     pack manifest           prints tests/golden/MANIFEST anew (make goldens)
 *     pack check              compares MANIFEST with the files, every limit with its floor, and the size with 40 MB; limits that
 *                         are closer than 4 floors because the class has no larger one are told as skipped
 *     pack floors FOLDER      puts FOLDER/CASE.json, {"fp64": {tensor: floor, ...}, "fp16": ..., "bf16": ...}, into the
 *                             metadata of every case's expected.safetensors; tensors' bytes stay as they are
 *
 * Runs from the root of the repository. A line of MANIFEST is a file, a golden case or an operator's case; for each
 * class of arithmetic it has, of the tensor whose limit is nearest to its floor, the limit and the honest floor, and the
 * smallest margin (error / limit) by which the case catches a mutant (tests/mutants.tsv). tests/covers.txt says what a
 * file covers and where it comes from.
 */
#include "../io.c"
#include "../tensor.c"
#include "pack.h"

#define GOLDEN "tests/golden"
enum { LARGEST = 40000000 };

/* ---------------------------------------------------------------- SHA-256 (FIPS 180-4) */

static uint32_t ror32(uint32_t x, int n) { return x >> n | x << (32 - n); }

/* Fractional parts of the cube roots of the first 64 primes. */
static const uint32_t sha256_k[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static void sha256_block(uint32_t h[8], const unsigned char *p)
{
    uint32_t w[64], s[8];
    for (int i = 0; i < 64; i++)
        w[i] = i < 16 ? (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 | (uint32_t)p[4 * i + 2] << 8 | p[4 * i + 3]
                      : (ror32(w[i - 2], 17) ^ ror32(w[i - 2], 19) ^ w[i - 2] >> 10) + w[i - 7] +
                            (ror32(w[i - 15], 7) ^ ror32(w[i - 15], 18) ^ w[i - 15] >> 3) + w[i - 16];
    memcpy(s, h, sizeof s);
    for (int i = 0; i < 64; i++) {
        uint32_t a = s[0], e = s[4];
        uint32_t t = s[7] + (ror32(e, 6) ^ ror32(e, 11) ^ ror32(e, 25)) + ((e & s[5]) ^ (~e & s[6])) + sha256_k[i] + w[i];
        uint32_t u = (ror32(a, 2) ^ ror32(a, 13) ^ ror32(a, 22)) + ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
        memmove(s + 1, s, 7 * sizeof *s);
        s[4] += t;
        s[0] = t + u;
    }
    for (int i = 0; i < 8; i++)
        h[i] += s[i];
}

static void sha256(const unsigned char *data, size_t size, char text[65])
{
    uint32_t h[8] = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 };
    unsigned char tail[128] = { 0 };
    size_t whole = size / 64 * 64, rest = size - whole, padded_size = rest < 56 ? 64 : 128;
    memcpy(tail, data + whole, rest);
    tail[rest] = 0x80;
    for (size_t i = 0; i < 8; i++)
        tail[padded_size - 1 - i] = (unsigned char)((uint64_t)size * 8 >> (8 * i));
    for (size_t at = 0; at < whole; at += 64)
        sha256_block(h, data + at);
    for (size_t at = 0; at < padded_size; at += 64)
        sha256_block(h, tail + at);
    for (int i = 0; i < 8; i++)
        snprintf(text + 8 * i, 9, "%08" PRIx32, h[i]);
}

/* ---------------------------------------------------------------- limits and evidence */

static int64_t close_limits, capped_limits, far_limits;     /* below 4 floors; the same, at the class's largest limit; others */

/* The smallest margin by which the case caught a mutant in that class, or "-". */
static char *weakest_mutant(const char *id, const char *class)
{
    char line[1024], field[8][128];
    double weakest = INFINITY;
    FILE *f = fopen("tests/mutants.tsv", "r");
    while (f && fgets(line, sizeof line, f)) {
        int n = 0;
        for (char *p = line, *end; n < 8 && p; p = end ? end + 1 : NULL, n++) {
            end = strchr(p, '\t');
            snprintf(field[n], sizeof *field, "%.*s", (int)strcspn(p, "\t\n"), p);
        }
        if (n == 8 && !strcmp(field[1], class) && !strcmp(field[2], "caught") && !strcmp(field[3], id) && strtod(field[7], NULL) > 0)
            weakest = fmin(weakest, strtod(field[7], NULL));
    }
    if (f)
        fclose(f);
    return isinf(weakest) ? text_of("-") : text_of("%.3g", weakest);
}

/* Twelve columns, three a class, for the file's tensors whose names begin so. */
static char *evidence(const safetensors *f, const char *id, const char *prefix, bool tiny)
{
    char *columns = NULL;
    for (int c = 0; c < CLASSES; c++) {
        json floors;
        char *text = read_floors(f, &classes[c], &floors);
        double nearest = INFINITY, its_floor = -1, its_limit = -1;
        for (int64_t i = 0; i < f->count; i++) {
            const st_tensor *t = &f->tensors[i];
            if (is_exact(t, &classes[c]) || strncmp(t->name, prefix, strlen(prefix)) != 0)
                continue;
            json known = json_member(floors, t->name);
            double floor = json_kind(known) == '0' ? json_number(known) : -1, limit = limit_of(&classes[c], t, known, tiny);
            double ratio = isinf(limit) || floor <= 0 ? DBL_MAX : limit / floor;
            far_limits += floor > 0 && limit < DBL_MAX && ratio >= 4;
            if (ratio < 4) {
                bool capped = limit == classes[c].most;
                fprintf(stderr, "%s %s: %s: %s: limit %.3g is closer than 4 floors of %.3g%s\n", capped ? "skipped" : "FAILED", f->path,
                        t->name, classes[c].name, limit, floor, capped ? ", because it is the largest that the class has" : "");
                close_limits += !capped, capped_limits += capped;
            }
            if (ratio < nearest)
                nearest = ratio, its_floor = floor, its_limit = limit;
        }
        char *mutant = weakest_mutant(id, classes[c].name);
        char *limit_text = its_limit < 0 ? text_of("exact") : isinf(its_limit) ? text_of("none") : text_of("%.3g", its_limit);
        char *floor_text = its_floor < 0 ? text_of("-") : text_of("%.3g", its_floor);
        append(&columns, "", "\t%s\t%s\t%s", limit_text, floor_text, mutant);
        free(mutant), free(limit_text), free(floor_text), free(text);
    }
    return columns;
}

/* ---------------------------------------------------------------- the list */

static char **paths;                                /* below GOLDEN, sorted */
static size_t npaths;

static void collect(const char *folder)
{
    DIR *d = opendir(folder);
    if (!d)
        die(SYSTEM_ERROR, "%s: cannot be listed: %s; run this from the root of the repository", folder, strerror(errno));
    for (const struct dirent *e; (e = readdir(d));) {
        struct stat s;
        char *path = text_of("%s/%s", folder, e->d_name);
        if (*e->d_name == '.' || !strcmp(path, GOLDEN "/MANIFEST") || lstat(path, &s) != 0)
            continue;
        if (S_ISDIR(s.st_mode)) {
            collect(path);
        } else {
            paths = grow(paths, npaths + 1, sizeof *paths);
            paths[npaths++] = text_of("%s", path + strlen(GOLDEN) + 1);
        }
        free(path);
    }
    closedir(d);
}

static int by_path(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

/* covers.txt: lines GLOB, origin, what it covers, tabs between; the first that fits. */
static void describe(const char *path, char **origin, char **covers)
{
    char line[1024];
    FILE *f = fopen("tests/covers.txt", "r");
    while (f && fgets(line, sizeof line, f)) {
        char *first = strchr(line, '\t'), *second = first ? strchr(first + 1, '\t') : NULL;
        if (!second)
            continue;
        *first = *second = 0;
        if (fnmatch(line, path, 0) == 0) {
            *origin = text_of("%s", first + 1), *covers = text_of("%.*s", (int)strcspn(second + 1, "\n"), second + 1);
            fclose(f);
            return;
        }
    }
    die(BAD_INPUT, "tests/covers.txt: got no line for %s, expected one; say what it covers", path);
}

/* One line a case of an operator, after its inputs' metadata. */
static void operator_rows(char **rows, const char *path, const safetensors *f, const char *shared)
{
    char *with = text_of(GOLDEN "/%.*s.inputs.safetensors", (int)(strlen(path) - strlen(".safetensors")), path);
    safetensors *inputs = safetensors_open(with);
    char *op = json_string(json_member(inputs->metadata, "operator"));
    for (json at = { 0 }, key, value; json_next(inputs->metadata, &at, &key, &value);) {
        char reason[REASON], *name = json_string(key), *text = json_string(value);
        json about;
        if (strcmp(name, "operator") != 0 && json_check(text, strlen(text), false, &about, reason)) {
            char *note = json_string(json_member(about, "note")), *id = text_of("%s/%s", op, name), *prefix = text_of("%s.", name);
            char *columns = evidence(f, id, prefix, false);
            append(rows, "", "%s\t%s\t%s\tour float64 build%s\n", id, shared, note, columns);
            free(note), free(id), free(prefix), free(columns);
        }
        free(name), free(text);
    }
    safetensors_close(inputs);
    free(with), free(op);
}

static void file_rows(char **rows, const char *path, int64_t *bytes)
{
    char *full = text_of(GOLDEN "/%s", path), hash[65] = "-", *origin, *covers, *shared, target[256];
    struct stat s;
    if (lstat(full, &s) != 0)
        die(SYSTEM_ERROR, "%s: %s", full, strerror(errno));
    describe(path, &origin, &covers);
    if (S_ISLNK(s.st_mode)) {
        ssize_t n = readlink(full, target, sizeof target);
        append(rows, "", "%s\t%s\t0\t-\tlink to %.*s\t%s\t-\t-\t-\t-\t-\t-\t-\t-\t-\t-\t-\t-\n", path, path, (int)n, target, origin);
        free(full);
        return;
    }
    *bytes += (int64_t)s.st_size;
    unsigned char *data = allocate((size_t)s.st_size + 1, 1);
    FILE *f = fopen(full, "rb");
    if (!f || fread(data, 1, (size_t)s.st_size, f) != (size_t)s.st_size)
        die(SYSTEM_ERROR, "%s: cannot be read", full);
    fclose(f);
    sha256(data, (size_t)s.st_size, hash);
    free(data);
    shared = text_of("%s\t%lld\t%s", path, (long long)s.st_size, hash);
    char *inputs = text_of("%.*s.inputs.safetensors", (int)(strlen(full) > 12 ? strlen(full) - 12 : 0), full);
    if (fnmatch("ops/*.safetensors", path, 0) == 0 && access(inputs, F_OK) == 0) {
        safetensors *expected = safetensors_open(full);
        operator_rows(rows, path, expected, shared);
        safetensors_close(expected);
    } else if (fnmatch("*cases/*/expected.safetensors", path, 0) == 0) {
        safetensors *expected = safetensors_open(full);
        const char *end = strrchr(path, '/'), *start = end;
        while (start > path && start[-1] != '/')
            start--;
        char *id = text_of("%.*s", (int)(end - start), start), *columns = evidence(expected, id, "", !strncmp(id, "tiny-", 5));
        append(rows, "", "%s\t%s\t%s\t%s%s\n", id, shared, covers, origin, columns);
        safetensors_close(expected);
        free(id), free(columns);
    } else {
        append(rows, "", "%s\t%s\t%s\t%s\t-\t-\t-\t-\t-\t-\t-\t-\t-\t-\t-\t-\n", path, shared, covers, origin);
    }
    free(inputs), free(shared), free(origin), free(covers), free(full);
}

static char *manifest(int64_t *bytes)
{
    char *rows = text_of("id\tfile\tbytes\tsha256\tcovers\torigin");
    for (int c = 0; c < CLASSES; c++)
        append(&rows, "", "\tlimit.%s\tfloor.%s\tmutant.%s", classes[c].name, classes[c].name, classes[c].name);
    append(&rows, "", "\n");
    collect(GOLDEN);
    qsort(paths, npaths, sizeof *paths, by_path);
    *bytes = 0;
    for (size_t i = 0; i < npaths; i++)
        file_rows(&rows, paths[i], bytes);
    return rows;
}

/* ---------------------------------------------------------------- commands */

/* Line by line, so that a failure names its file. */
static int check_manifest(void)
{
    int64_t bytes, passed = 0, failed = 0;
    char *rows = manifest(&bytes), *at = rows, line[4096];
    FILE *f = fopen(GOLDEN "/MANIFEST", "r");
    while (f && fgets(line, sizeof line, f)) {
        size_t n = strlen(line);
        bool same = !strncmp(at, line, n);
        passed += same, failed += !same;
        if (!same && failed <= 3)               /* a line too many moves all that follow */
            printf("FAILED MANIFEST: got     %sexpected %.*s\n", line, (int)strcspn(at, "\n"), at);
        at += strcspn(at, "\n") + (*at != 0 && at[strcspn(at, "\n")] == '\n');
    }
    bool whole = f && *at == 0, small = bytes + (f ? (int64_t)ftell(f) : 0) <= LARGEST;
    if (!whole)
        printf("FAILED MANIFEST: it does not list %.*s; make goldens\n", (int)strcspn(at, "\t"), at);
    if (!small)
        printf("FAILED the pack has more than %d bytes: %lld\n", LARGEST, (long long)bytes);
    passed += whole + small + far_limits, failed += !whole + !small + close_limits;
    printf("%lld passed, %lld failed, %lld skipped\n", (long long)passed, (long long)failed, (long long)capped_limits);
    free(rows);
    return failed ? DIFFERS : DONE;
}

/* The members of the old metadata but floors of other classes and the arguments, which have a file of their own; then FOLDER's. */
static void add_floors(const char *path, const char *given)
{
    size_t size = 0;
    char reason[REASON], *text = NULL, *members = NULL;
    json root;
    FILE *f = fopen(given, "rb");
    if (!f) {
        printf("%s: no floors\n", given);
        return;
    }
    for (size_t n = 1; n > 0; size += n) {
        text = grow(text, size + 65537, 1);
        n = fread(text + size, 1, 65536, f);
    }
    fclose(f);
    if (!json_check(text, size, false, &root, reason))
        die(BAD_INPUT, "%s: %s; make the file again", given, reason);
    safetensors *expected = safetensors_open(path);
    for (json at = { 0 }, key, value; json_next(expected->metadata, &at, &key, &value);) {
        char *name = json_string(key);
        if (strncmp(name, "floor.", 6) != 0 && strcmp(name, "args") != 0)
            append(&members, ",", "%.*s:%.*s", (int)(key.end - key.text), key.text, (int)(value.end - value.text), value.text);
        free(name);
    }
    for (int c = 0; c < CLASSES; c++) {
        json floors = c == 1 ? (json){ 0 } : json_member(root, classes[c].name);
        char *map = NULL;
        for (json at = { 0 }, key, value; json_next(floors, &at, &key, &value);)
            append(&map, ",", "%.*s:%.4g", (int)(key.end - key.text), key.text, json_number(value));
        if (map) {
            char *object = text_of("{%s}", map), *string = quoted(object);
            append(&members, ",", "\"%s\":%s", classes[c].floors, string);
            free(object), free(string), free(map);
        }
    }
    safetensors_close(expected);
    set_metadata(path, members);
    free(members), free(text);
}

int main(int argc, char **argv)
{
    if (argc == 2 && !strcmp(argv[1], "check"))
        return check_manifest();
    if (argc == 2 && !strcmp(argv[1], "manifest")) {
        int64_t bytes;
        char *rows = manifest(&bytes);
        fputs(rows, stdout);
        free(rows);
        return DONE;
    }
    if (argc != 3 || strcmp(argv[1], "floors") != 0)
        die(BAD_INPUT, "pack: expected manifest, check, or floors FOLDER");
    collect(GOLDEN);
    for (size_t i = 0; i < npaths; i++)
        if (fnmatch("*cases/*/expected.safetensors", paths[i], 0) == 0) {
            char *path = text_of(GOLDEN "/%s", paths[i]), *end = strrchr(paths[i], '/'), *start = end;
            while (start > paths[i] && start[-1] != '/')
                start--;
            char *floors = text_of("%s/%.*s.json", argv[2], (int)(end - start), start);
            add_floors(path, floors);
            free(floors), free(path);
        }
    return DONE;
}
