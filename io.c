/* io.c - everything that enters or leaves the program: errors, files, and the formats JSON, safetensors, PPM, Y4M.
 *
 *     config.json, *.index.json --json_check--> spans --config_*--> numbers and words
 *     *.safetensors --mmap, safetensors_parse--> tensors --bind--> weights (+ low-rank updates)
 *     P3 P5 P6 --ppm_parse--> [h][w][3] bytes --image_resize--> [h'][w'][3] bytes
 *     [h][w][3] bytes --y4m_planes--> .y4m, "-"; or P6 files, one a frame
 *     tensors --dump--> DIR/NAME.safetensors --compare--> exit code
 *
 * Invariants:
 *   - Parsers (json_check, safetensors_parse, ppm_parse) are pure: bytes and a length in, a struct or a reason out.
 *     They read nothing past the length, do not recurse, and allocate at most a small multiple of the length.
 *   - Everybody else dies: "what: where: got, expected; what to do". The user's mistakes end with BAD_INPUT, the
 *     system's refusals (open for writing, write, mmap, memory) with SYSTEM_ERROR.
 *   - An output has a temporary name beside its target until it is whole. Those names are the only state that is not
 *     passed as an argument: die() and signal handlers must find them. Only the main thread opens outputs.
 *   - File contents are little-endian and unaligned: they are assembled from bytes, never cast.
 */
#define _POSIX_C_SOURCE 200809L

#include "ruyi.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---------------------------------------------------------------- errors, memory, words */

/* A file on its way out. */
typedef struct writer {
    char *path;                 /* the name it will have */
    char *temporary;            /* the name it has until then */
    int fd;                     /* -1 once everything is on disk */
    struct writer *volatile next;
} writer;

static writer *volatile unfinished;     /* every temporary that exists; volatile: signal handlers walk the list */

/* unlink is async-signal-safe and the list is whole between any two stores, so handlers may call this. */
void remove_temporaries(void)
{
    for (const writer *f = unfinished; f; f = f->next) unlink(f->temporary);
}

/* Names out of foreign files may hold anything; control characters are replaced so that the message stays one line.
 * No allocation: memory may be what has run out. A message too long for the buffer shows that by "...". */
_Noreturn void die(int code, const char *format, ...)
{
    char line[4096];
    va_list args;
    va_start(args, format);
    int length = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    for (unsigned char *c = (unsigned char *)line; length > 0 && *c; c++)
        if (*c < ' ' || *c == 0x7f) *c = *c == '\n' || *c == '\t' || *c == '\r' ? ' ' : '?';
    fprintf(stderr, "ruyi: %s%s\n", line, length >= (int)sizeof line ? "..." : "");
    remove_temporaries();
    exit(code);
}

/* Zeroed memory for count elements of size bytes; calloc checks their product. Never NULL, also for nothing, so that
 * an empty list needs no special case; SYSTEM_ERROR where memory has run out. */
void *allocate(size_t count, size_t size)
{
    void *block = calloc(count ? count : 1, size ? size : 1);
    if (!block) die(SYSTEM_ERROR, "memory: got none, expected %zu x %zu bytes; ask for a smaller video", count, size);
    return block;
}

/* vprintf into a new string: once to measure, once to write. Nothing is cut, whatever a file's names look like. */
static char *text_from(const char *format, va_list args) PRINTF(1, 0);
static char *text_from(const char *format, va_list args)
{
    va_list again;
    va_copy(again, args);
    int length = vsnprintf(NULL, 0, format, again);
    va_end(again);
    if (length < 0) die(SYSTEM_ERROR, "text: got more than 2 GB, expected less; shorten the names");
    char *text = allocate((size_t)length + 1, 1);
    vsnprintf(text, (size_t)length + 1, format, args);
    return text;
}

/* Declares `text`: the format and the arguments after it as a new string. */
#define FORMATTED(text, format)           \
    va_list args;                         \
    va_start(args, format);               \
    char *text = text_from(format, args); \
    va_end(args)

/* printf into a new string of the size that it needs, to be freed by the caller. */
char *text_of(const char *format, ...)
{
    FORMATTED(text, format);
    return text;
}

/* "[2, 3]": shapes and positions in messages. 22 characters hold any int64_t and its comma. */
static char *list_text(int count, const int64_t *list)
{
    char *text = allocate((size_t)count + 1, 22), *to = text;
    *to++ = '[';
    for (int i = 0; i < count; i++) to += sprintf(to, "%s%" PRId64, i ? ", " : "", list[i]);
    *to = ']';
    return text;
}

static int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

/* Edits that turn a into b: insertions, deletions, replacements, and exchanges of neighbours (optimal string
 * alignment). row: three rows of strlen(b) + 1 numbers, reused in turn. */
static int64_t edit_distance(const char *a, const char *b, int64_t *row)
{
    int64_t n = (int64_t)strlen(b), *before = row, *last = row + n + 1, *now = row + 2 * (n + 1);
    for (int64_t j = 0; j <= n; j++) now[j] = j;
    for (int64_t i = 1; a[i - 1]; i++) {
        int64_t *oldest = before;
        before = last, last = now, now = oldest;
        now[0] = i;
        for (int64_t j = 1; j <= n; j++) {
            now[j] = lesser(lesser(last[j], now[j - 1]) + 1, last[j - 1] + (a[i - 1] != b[j - 1]));
            bool exchanged = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
            if (exchanged) now[j] = lesser(now[j], before[j - 2] + 1);
        }
    }
    return now[n];
}

/* The nearest word, of equals one that goes on where the given one ends, then the first; NULL where there are none. */
const char *nearest_word(const char *word, const char *const *words, int count)
{
    const char *nearest = NULL;
    int64_t least = INT64_MAX;
    for (int i = 0; i < count; i++) {
        int64_t *row = allocate(3 * (strlen(words[i]) + 1), sizeof *row);
        int64_t distance = 2 * edit_distance(word, words[i], row) - (strncmp(word, words[i], strlen(word)) == 0);
        free(row);
        if (distance < least) least = distance, nearest = words[i];
    }
    return nearest;
}

/* A parser's answer: writes the reason and returns false. A reason that does not fit ends in "...". */
static bool refuse(char reason[REASON], const char *format, ...) PRINTF(2, 3);
static bool refuse(char reason[REASON], const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int length = vsnprintf(reason, REASON, format, args);
    va_end(args);
    if (length >= REASON) memcpy(reason + REASON - 4, "...", 4);
    return false;
}

/* product = a * b; false, and product as it was, where that does not fit 64 bits. Every product of numbers that a file
 * states goes through here before it is used. */
static bool multiply(uint64_t a, uint64_t b, uint64_t *product)
{
    if (b != 0 && a > UINT64_MAX / b) return false;
    *product = a * b;
    return true;
}

/* ---------------------------------------------------------------- files
 *
 * Inputs are read whole (small files, pipes) or mapped (safetensors). Outputs go through a writer:
 *
 *     writer_open     TARGET.tmp.PID.N beside the target (rename works within a file system only), new or not at all
 *     put             every byte, or death: short writes go on, interrupted ones start again
 *     writer_finish   fsync and close, since either may be the first to report that the disk is full
 *     writer_rename   the target appears, replacing an older file of that name
 *
 * A process that dies between the first and the last step leaves nothing: die() and the signal handlers unlink what is
 * on the list. SIGKILL alone leaves a temporary name, which no later run trips over. */

/* A file's name is the user's to mend; anything else that keeps a file from being read is the system's. */
static _Noreturn void die_reading(const char *path)
{
    bool name = errno == ENOENT || errno == ENOTDIR || errno == EISDIR || errno == EACCES || errno == ELOOP ||
                errno == ENAMETOOLONG;
    die(name ? BAD_INPUT : SYSTEM_ERROR, "%s: reading: got \"%s\", expected a readable file; check the name", path,
        strerror(errno));
}

/* An open file, and its size where it has one (pipes: 0). Folders are refused here: open() itself takes them. */
static int input_open(const char *path, struct stat *about)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, about) != 0) die_reading(path);
    if (S_ISDIR(about->st_mode)) errno = EISDIR, die_reading(path);
    return fd;
}

/* All bytes of a file, or of standard input for "-"; to be freed. */
static unsigned char *read_all(const char *path, size_t *size)
{
    struct stat about;
    bool standard = strcmp(path, "-") == 0;
    int fd = standard ? STDIN_FILENO : input_open(path, &about);
    size_t room = 1 << 16;
    unsigned char *bytes = allocate(room, 1);
    *size = 0;
    for (ssize_t got = 1; got != 0;) {
        if (*size == room) {
            unsigned char *grown = room <= SIZE_MAX / 2 ? realloc(bytes, room *= 2) : NULL;
            if (!grown) die(SYSTEM_ERROR, "memory: %s: got none, expected %zu bytes; free some", path, room);
            bytes = grown;
        }
        got = read(fd, bytes + *size, (size_t)lesser((int64_t)(room - *size), 1 << 30));
        if (got < 0 && errno != EINTR) die_reading(standard ? "standard input" : path);
        if (got > 0) *size += (size_t)got;
    }
    if (!standard) close(fd);
    return bytes;
}

/* Whatever keeps an output from being written is the system's doing: exit code 3. errno must still be the call's. */
static _Noreturn void die_writing(const char *path)
{
    die(SYSTEM_ERROR, "%s: writing: got \"%s\", expected to write it; check folder, rights and free space",
        strcmp(path, "-") ? path : "standard output", strerror(errno));
}

/* Between the two no signal handler runs: the list of temporaries and the disk are of one mind whenever it does. */
static sigset_t hold_signals(void)
{
    sigset_t all, before;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, &before);
    return before;
}

static void release_signals(sigset_t before)
{
    int kept = errno;
    sigprocmask(SIG_SETMASK, &before, NULL);
    errno = kept;
}

/* What stands at a target must be replaceable: a rename over a device would take it away. */
static void target_check(const char *path)
{
    struct stat there;
    if (stat(path, &there) == 0 && !S_ISREG(there.st_mode))
        die(SYSTEM_ERROR, "%s: writing: got a folder or device, expected a file; choose another name", path);
}

/* Starts an output. Its temporary name tells processes apart by their id, and outputs of one process (or of a process
 * in another namespace, or a dead one's leavings) by a number. */
static writer *writer_open(const char *path)
{
    target_check(path);
    writer *f = allocate(1, sizeof *f);
    f->path = text_of("%s", path);
    int number = 0;
    sigset_t before = hold_signals();
    do {
        free(f->temporary);
        f->temporary = text_of("%s.tmp.%ld.%d", path, (long)getpid(), number++);
        f->fd = open(f->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    } while (f->fd < 0 && (errno == EEXIST || errno == EINTR));
    if (f->fd >= 0) {
        f->next = unfinished;
        unfinished = f;
    }
    release_signals(before);
    if (f->fd < 0) die_writing(path);
    return f;
}

/* path: for the message only. A pipe whose reader has gone dies here, too: EPIPE, since main ignores SIGPIPE. */
static void put(int fd, const char *path, const void *data, size_t size)
{
    const unsigned char *at = data;
    while (size > 0) {
        ssize_t done = write(fd, at, size < 1 << 30 ? size : 1 << 30);  /* some systems refuse more than 2 GB */
        if (done < 0 && errno != EINTR) die_writing(path);
        if (done > 0) at += done, size -= (size_t)done;
    }
}

/* sync: on the disk, so that no crash can leave the final name on an empty file. EINVAL: a file system without it. */
static void writer_finish(writer *f, bool sync)
{
    if (sync && fsync(f->fd) != 0 && errno != EINVAL) die_writing(f->path);
    if (close(f->fd) != 0) die_writing(f->path);
    f->fd = -1;
}

/* The target appears, whole, in one step. Forgetting the temporary comes after it: a signal between the two unlinks a
 * name that is no longer there. */
static void writer_rename(writer *f)
{
    if (rename(f->temporary, f->path) != 0) die_writing(f->path);
    writer *volatile *link = &unfinished;
    while (*link != f) link = &(*link)->next;
    *link = f->next;
    free(f->path);
    free(f->temporary);
    free(f);
}

/* ---------------------------------------------------------------- JSON
 *
 * Text is checked once, by a scanner that keeps one byte per open bracket; afterwards values are spans of that text and
 * navigation trusts it. No tree is built: a header of 100 MB costs its own size and nothing more. Objects are searched
 * from the front, which is quadratic for who asks for every member by name: such callers walk with json_next. */

/* Depth and size that the formats allow. Sizes below 2^31 also make every span's length an int, as %.*s wants it. */
enum { JSON_DEPTH = 128, JSON_BYTES = 100000000 };

/* start: for positions in reasons; at: the next byte; end: one past the last. */
typedef struct { const char *start, *at, *end; bool minus_infinity; char *reason; } scan;

/* The next byte, 0 to 255, or -1 at the end, which therefore matches nothing and needs no test of its own. */
static int peek(const scan *s) { return s->at < s->end ? (unsigned char)*s->at : -1; }

/* Refuses at the current byte. */
static bool fault(const scan *s, const char *expected)
{
    return refuse(s->reason, "byte %zu: expected %s", (size_t)(s->at - s->start), expected);
}

/* The four kinds of white space and the digits of JSON and PPM; <ctype.h> would depend on the locale. */
static bool is_space(int c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }
static bool is_digit(int c) { return c >= '0' && c <= '9'; }

/* Called where the grammar allows white space, never inside values. */
static void skip_space(scan *s)
{
    while (is_space(peek(s))) s->at++;
}

/* Length of the well-formed UTF-8 sequence at p (RFC 3629), or 0. The range of the second byte is what excludes
 * overlong forms, surrogates and everything above U+10FFFF. */
static size_t utf8_length(const unsigned char *p, size_t left)
{
    unsigned first = p[0], least = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
    unsigned most = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
    if (first < 0x80) return 1;
    size_t length = first < 0xC2 || first > 0xF4 ? 0 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    if (length == 0 || length > left || p[1] < least || p[1] > most) return 0;
    for (size_t i = 2; i < length; i++)
        if ((p[i] & 0xC0) != 0x80) return 0;
    return length;
}

/* Whole texts are checked before they are scanned, so that the scanner may look at bytes. */
static bool utf8_check(const char *text, size_t size, char reason[REASON])
{
    for (size_t at = 0, length; at < size; at += length) {
        length = utf8_length((const unsigned char *)text + at, size - at);
        if (length == 0) return refuse(reason, "byte %zu: expected UTF-8", at);
    }
    return true;
}

/* Four hexadecimal digits; -1 where they are not. */
static int32_t hex4(const char *p, const char *end)
{
    int32_t code = 0;
    if (end - p < 4) return -1;
    for (int i = 0; i < 4; i++) {
        int c = p[i] | 0x20, digit = is_digit(p[i]) ? p[i] - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
        if (digit < 0) return -1;
        code = code * 16 + digit;
    }
    return code;
}

/* What follows a backslash. A surrogate stands only in a pair, high then low. */
static bool scan_escape(scan *s)
{
    int c = peek(s);
    if (c != 'u') {
        if (c <= 0 || !strchr("\"\\/bfnrt", c)) return fault(s, "one of \" \\ / b f n r t u after a backslash");
        s->at++;
        return true;
    }
    int32_t code = hex4(s->at + 1, s->end), low = -1;
    if (code < 0) return fault(s, "four hexadecimal digits after \\u");
    s->at += 5;
    if (code < 0xD800 || code > 0xDFFF) return true;    /* D800-DBFF high, DC00-DFFF low surrogates */
    if (s->end - s->at >= 6 && s->at[0] == '\\' && s->at[1] == 'u') low = hex4(s->at + 2, s->end);
    if (code > 0xDBFF || low < 0xDC00 || low > 0xDFFF) return fault(s, "surrogates in pairs");
    s->at += 6;
    return true;
}

/* From quote to quote. Bytes from 0x80 on are part of checked UTF-8 and pass; the end of the text counts as a control
 * character here and is refused with them. */
static bool scan_string(scan *s)
{
    if (peek(s) != '"') return fault(s, "a string");
    for (s->at++; peek(s) != '"';) {
        if (peek(s) < ' ') return fault(s, "a closing quote, and control characters escaped");
        if (*s->at++ == '\\' && !scan_escape(s)) return false;
    }
    s->at++;
    return true;
}

/* One digit or more. */
static bool scan_digits(scan *s)
{
    if (!is_digit(peek(s))) return fault(s, "a digit");
    while (is_digit(peek(s))) s->at++;
    return true;
}

/* [-] 0 | 1-9... [. digits] [e [+-] digits] */
static bool scan_number(scan *s)
{
    if (peek(s) == '-') s->at++;
    if (peek(s) == '0') s->at++;
    else if (!scan_digits(s)) return false;
    if (peek(s) == '.') {
        s->at++;
        if (!scan_digits(s)) return false;
    }
    if (peek(s) != 'e' && peek(s) != 'E') return true;
    s->at++;
    if (peek(s) == '+' || peek(s) == '-') s->at++;
    return scan_digits(s);
}

/* A string, a word or a number. Letters after a word are left over, and refused by whoever expects a delimiter. */
static bool scan_scalar(scan *s)
{
    static const char *const words[] = { "true", "false", "null", "-Infinity" };
    if (peek(s) == '"') return scan_string(s);
    for (int i = 0; i < (s->minus_infinity ? 4 : 3); i++) {
        size_t length = strlen(words[i]);
        if ((size_t)(s->end - s->at) >= length && memcmp(s->at, words[i], length) == 0) {
            s->at += length;
            return true;
        }
    }
    return peek(s) == '-' || is_digit(peek(s)) ? scan_number(s) : fault(s, "a value");
}

/* A member's name and its colon, with white space around both. */
static bool scan_key(scan *s)
{
    skip_space(s);
    if (!scan_string(s)) return false;
    skip_space(s);
    if (peek(s) != ':') return fault(s, "a colon");
    s->at++;
    return true;
}

/* One value with all that it contains. Each turn reads a member's beginning (with its key in an object), then closes
 * what ends after it. The brackets to come are the whole memory of the nesting. */
static bool scan_value(scan *s)
{
    char closing[JSON_DEPTH];
    int depth = 0;
    for (;;) {
        if (depth > 0 && closing[depth - 1] == '}' && !scan_key(s)) return false;
        skip_space(s);
        int open = peek(s);
        if (open == '{' || open == '[') {
            if (depth == JSON_DEPTH) return fault(s, "at most 128 levels");
            closing[depth++] = open == '{' ? '}' : ']';
            s->at++;
            skip_space(s);
            if (peek(s) != closing[depth - 1]) continue;    /* its first member; an empty one closes below */
        } else if (!scan_scalar(s)) {
            return false;
        }
        for (; depth > 0; s->at++) {
            skip_space(s);
            if (peek(s) == ',') break;
            if (peek(s) != closing[depth - 1]) return fault(s, closing[depth - 1] == '}' ? ", or }" : ", or ]");
            depth--;
        }
        if (depth == 0) return true;
        s->at++;
    }
}

/* json_check without the look at UTF-8, which safetensors makes a rule of its own. */
static bool json_scan(const char *text, size_t size, bool minus_infinity, json *root, char reason[REASON])
{
    scan s = { text, text, text + size, minus_infinity, reason };
    skip_space(&s);
    root->text = s.at;
    if (!scan_value(&s)) return false;
    root->end = s.at;
    skip_space(&s);
    return s.at == s.end || fault(&s, "nothing after the value");
}

/* Accepts exactly RFC 8259 in UTF-8 without a byte-order mark, at most 128 levels deep. minus_infinity: takes Python's
 * -Infinity for a number. root becomes the value's span; a reason gives the byte and what was expected there. */
bool json_check(const char *text, size_t size, bool minus_infinity, json *root, char reason[REASON])
{
    *root = (json){0};
    if (size > JSON_BYTES) return refuse(reason, "%zu bytes: expected at most %d", size, JSON_BYTES);
    bool valid = utf8_check(text, size, reason) && json_scan(text, size, minus_infinity, root, reason);
    if (!valid) *root = (json){0};      /* a span of refused text must not be walked */
    return valid;
}

/* The first byte tells the kind; all numbers (and -Infinity) are '0'. */
char json_kind(json value)
{
    if (!value.text) return 0;
    return *value.text == '-' || is_digit(*value.text) ? '0' : *value.text;
}

/* The end of a value inside a container of checked text, where some delimiter always follows. */
static const char *value_end(const char *p)
{
    int depth = 0;
    do {
        if (*p == '"') {
            for (p++; *p != '"'; p++) p += *p == '\\';     /* an escaped quote ends nothing */
            p++;
        } else if (*p == '{' || *p == '[' || *p == '}' || *p == ']') {
            depth += *p == '{' || *p == '[' ? 1 : -1;
            p++;
        } else {
            do p++;
            while (depth == 0 && !is_space(*p) && *p != ',' && *p != ']' && *p != '}');
        }
    } while (depth > 0);
    return p;
}

/* The next member; false after the last one, and for anything but containers. name is absent in lists, may be NULL. */
bool json_next(json container, json *cursor, json *name, json *value)
{
    if (json_kind(container) != '{' && json_kind(container) != '[') return false;
    const char *p = cursor->text ? cursor->text : container.text + 1;
    while (is_space(*p) || *p == ',') p++;
    if (p == container.end - 1) return false;       /* the closing bracket */
    json key = {0};
    if (*container.text == '{') {
        key = (json){ p, value_end(p) };
        for (p = key.end; is_space(*p) || *p == ':';) p++;
    }
    *value = (json){ p, value_end(p) };
    if (name) *name = key;
    *cursor = (json){ value->end, container.end };
    return true;
}

/* Appends a code point, 1 to 4 bytes; 0 as two (see json_string). Returns the place after it. */
static char *utf8_put(char *to, uint32_t code)
{
    static const uint32_t lead[] = { 0, 0xC0, 0xE0, 0xF0 };
    int more = code > 0 && code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    *to++ = (char)(lead[more] | code >> (6 * more));
    while (more-- > 0) *to++ = (char)(0x80 | (code >> (6 * more) & 0x3F));
    return to;
}

/* value must be a string. \u0000 becomes the bytes C0 80, which no checked text contains: the C string stays whole, and
 * names that differ stay different. Decoding never lengthens. */
char *json_string(json value)
{
    static const char escape[] = "\"\\/bfnrt", meaning[] = "\"\\/\b\f\n\r\t";
    char *text = allocate((size_t)(value.end - value.text), 1), *to = text;
    for (const char *p = value.text + 1; p < value.end - 1;) {
        if (*p != '\\') {
            *to++ = *p++;
        } else if (p[1] != 'u') {
            *to++ = meaning[strchr(escape, p[1]) - escape];
            p += 2;
        } else {
            uint32_t code = (uint32_t)hex4(p + 2, value.end);
            p += 6;
            if (code >= 0xD800 && code <= 0xDBFF) {
                code = 0x10000 + ((code - 0xD800) << 10) + ((uint32_t)hex4(p + 2, value.end) - 0xDC00);
                p += 6;
            }
            to = utf8_put(to, code);
        }
    }
    return text;
}

/* Whether a value is that string. Only texts with escapes, which are rare, need a decoded copy. */
static bool json_is(json value, const char *word)
{
    if (json_kind(value) != '"') return false;
    size_t size = (size_t)(value.end - value.text) - 2;
    if (!memchr(value.text, '\\', size + 1)) return size == strlen(word) && memcmp(value.text + 1, word, size) == 0;
    char *text = json_string(value);
    bool same = strcmp(text, word) == 0;
    free(text);
    return same;
}

/* Absent for anything but objects, so that lookups can be chained. */
json json_member(json object, const char *name)
{
    json cursor = {0}, key, value, found = {0};
    while (json_kind(object) == '{' && json_next(object, &cursor, &key, &value))
        if (json_is(key, name)) found = value;
    return found;
}

/* value must be a number; it is rounded once, as strtod does (the program stays in the "C" locale). */
double json_number(json value)
{
    char *text = text_of("%.*s", (int)(value.end - value.text), value.text);
    double number = strtod(text, NULL);
    free(text);
    return number;
}

/* Plain decimal digits that fit; the grammar has already refused leading zeros. */
static bool json_natural(json value, uint64_t *number)
{
    *number = 0;
    for (const char *p = value.text; p < value.end; p++) {
        uint64_t digit = (uint64_t)(*p - '0');
        if (!is_digit(*p) || !multiply(*number, 10, number) || *number > UINT64_MAX - digit) return false;
        *number += digit;
    }
    return value.text != NULL;
}

/* A natural number with an optional minus: 24.0 and 1e3 are not integers, as they are none in Python. */
static bool json_integer(json value, int64_t *number)
{
    uint64_t size = 0;
    bool minus = value.text && *value.text == '-';
    if (minus) value.text++;
    if (!json_natural(value, &size) || size > (uint64_t)INT64_MAX) return false;
    *number = minus ? -(int64_t)size : (int64_t)size;
    return true;
}

/* ---------------------------------------------------------------- configuration files
 *
 * One getter a type. All take the field's name, so that the line which reads a field is found by searching for it, and
 * the value for an absent field, which is the public class's default. A field that is there must be right: wrong types
 * and impossible values end with BAD_INPUT, naming file, field, value and what was expected. Fields that no getter asks
 * for are ignored: published files carry many. */

/* Names that were asked for, so that `info` can list the others. */
struct words { char **list; size_t count; };

/* The object that a JSON file holds; the text it points into is returned, to be freed or kept. */
static char *json_file(const char *path, json *root)
{
    size_t size;
    char reason[REASON], *text = (char *)read_all(path, &size);
    bool valid = json_check(text, size, true, root, reason);
    if (valid && json_kind(*root) != '{') valid = refuse(reason, "got another value, expected an object");
    if (!valid) die(BAD_INPUT, "%s: JSON: %s; mend the file or copy it again", path, reason);
    return text;
}

/* FOLDER/NAME, kept for the whole run: values point into its text. A missing or broken file is BAD_INPUT. */
config config_open(const char *folder, const char *name)
{
    config c = { .path = text_of("%s/%s", folder, name), .read = allocate(1, sizeof *c.read) };
    c.text = json_file(c.path, &c.root);
    return c;
}

/* The counterpart of config_open; values read before stay valid, spans of text do not. */
void config_close(config c)
{
    for (size_t i = 0; i < c.read->count; i++) free(c.read->list[i]);
    free(c.read->list);
    free(c.read);
    free(c.text);
    free(c.path);
}

/* "PATH: FIELD: got VALUE, " and then the caller's words: "expected ...; what to do". */
_Noreturn void config_refuse(config c, const char *field, const char *format, ...)
{
    FORMATTED(words, format);
    json v = json_member(c.root, field);
    if (!v.text) die(BAD_INPUT, "%s: %s: got nothing, %s", c.path, field, words);
    int length = (int)lesser(v.end - v.text, 80);
    die(BAD_INPUT, "%s: %s: got %.*s%s, %s", c.path, field, length, v.text, v.end - v.text > 80 ? "..." : "", words);
}

/* null is how Python writes a field that is not set. */
json config_member(config c, const char *field)
{
    json v = json_member(c.root, field);
    for (size_t i = 0; i < c.read->count; i++)
        if (!strcmp(c.read->list[i], field)) return json_kind(v) == 'n' ? (json){0} : v;
    char **list = realloc(c.read->list, (c.read->count + 1) * sizeof *list);
    if (!list) die(SYSTEM_ERROR, "memory: got none for the name of a field");
    c.read->list = list;
    list[c.read->count++] = text_of("%s", field);
    return json_kind(v) == 'n' ? (json){0} : v;
}

/* One line of stdout, or none. Fields that hold null are not worth a word. */
void config_print_unread(config c)
{
    json cursor = {0}, name, value;
    bool any = false;
    while (json_next(c.root, &cursor, &name, &value)) {
        bool known = json_kind(value) == 'n';
        for (size_t i = 0; i < c.read->count && !known; i++) known = json_is(name, c.read->list[i]);
        if (known) continue;
        printf("%s%.*s", any ? " " : "  not read: ", (int)(name.end - name.text - 2), name.text + 1);
        any = true;
    }
    if (any) printf(" (%s)\n", c.path);
}

/* The bounds hold for what the file says; the default is the caller's. */
int64_t config_int(config c, const char *field, int64_t otherwise, int64_t least, int64_t most)
{
    json v = config_member(c, field);
    int64_t number;
    if (!v.text && otherwise != REQUIRED) return otherwise;
    if (!json_integer(v, &number) || number < least || number > most)
        config_refuse(c, field, "expected an integer from %" PRId64 " to %" PRId64 "; mend the file", least, most);
    return number;
}

/* Integers are numbers, too; overflows (1e999) and -Infinity are not what any field means. */
double config_real(config c, const char *field, double otherwise)
{
    json v = config_member(c, field);
    if (!v.text && !isnan(otherwise)) return otherwise;
    double number = json_kind(v) == '0' ? json_number(v) : NAN;
    if (!isfinite(number)) config_refuse(c, field, "expected a finite number; mend the file");
    return number;
}

/* true and false only: 0 and 1 have another type. There is no required switch. */
bool config_bool(config c, const char *field, bool otherwise)
{
    json v = config_member(c, field);
    if (!v.text) return otherwise;
    if (json_kind(v) != 't' && json_kind(v) != 'f') config_refuse(c, field, "expected true or false; mend the file");
    return json_kind(v) == 't';
}

/* A new string. */
char *config_word(config c, const char *field, const char *otherwise)
{
    json v = config_member(c, field);
    if (!v.text && otherwise) return text_of("%s", otherwise);
    if (json_kind(v) != '"') config_refuse(c, field, "expected a string; mend the file");
    return json_string(v);
}

/* An empty list is 0 elements, which is not the same as an absent one. */
int config_ints(config c, const char *field, int64_t *list, int most)
{
    json v = config_member(c, field), cursor = {0}, item;
    int count = 0;
    if (!v.text) return -1;
    if (json_kind(v) != '[') config_refuse(c, field, "expected a list of integers; mend the file");
    for (; json_next(v, &cursor, NULL, &item); count++)
        if (count == most || !json_integer(item, &list[count]))
            config_refuse(c, field, "expected a list of integers, at most %d; mend the file", most);
    return count;
}

/* "('a', 'b')" or "['a', 'b']", as Python prints them; a comma may follow the last name. -1: something else, or more
 * than `most`. */
static int python_words(const char *text, char **list, int most)
{
    const char *p = text + strspn(text, " ");
    char close = *p == '(' ? ')' : ']';
    int count = 0;
    if (*p != '(' && *p != '[') return -1;
    for (p += 1 + strspn(p + 1, " "); *p != close; p += strspn(p, " ")) {
        const char *end = *p == '\'' || *p == '"' ? strchr(p + 1, *p) : NULL;
        if (!end || count == most) return -1;
        list[count++] = text_of("%.*s", (int)(end - p - 1), p + 1);
        p = end + 1 + strspn(end + 1, " ");
        if (*p == ',') p++;
        else if (*p != close) return -1;
    }
    return p[1 + strspn(p + 1, " ")] == 0 ? count : -1;
}

/* The public configurations hold lists of block types as JSON lists or, saved by hand, as the text of a tuple. The
 * strings in list are new. */
int config_words(config c, const char *field, char **list, int most)
{
    json v = config_member(c, field), cursor = {0}, item;
    int count = json_kind(v) == '[' ? 0 : -1;
    if (!v.text) return -1;
    if (json_kind(v) == '"') {
        char *text = json_string(v);
        count = python_words(text, list, most);
        free(text);
    }
    while (count >= 0 && json_kind(v) == '[' && json_next(v, &cursor, NULL, &item)) {
        bool fits = count < most && json_kind(item) == '"';
        if (fits) list[count] = json_string(item);
        count = fits ? count + 1 : -1;
    }
    if (count < 0) config_refuse(c, field, "expected a list of at most %d names; mend the file", most);
    return count;
}

/* ---------------------------------------------------------------- safetensors
 *
 * A file is a length N (8 bytes), N bytes of JSON, and data. It is taken if it keeps these rules, and otherwise refused
 * with the number of one that it breaks:
 *      1  at least 8 bytes
 *      2  N <= 100,000,000
 *      3  N <= size - 8
 *      4  the header is UTF-8
 *      5  and one strict JSON object, at most 128 levels deep, with nothing but white space around it
 *      6  __metadata__ at most once: an object of strings, or null
 *      7  every other member is an object with dtype, shape, data_offsets, each once (other fields are ignored)
 *      8  dtype is one of dtype_name[]
 *      9  numbers are plain digits that fit 64 bits
 *     10  shape is a list; the product of its numbers fits 64 bits, also times the bits of an element; whole bytes
 *     11  data_offsets is a list [begin, end] with begin <= end, counted from the header's end
 *     12  in the order of their offsets, each tensor begins where the one before ended, the first at 0
 *     13  end - begin is what shape and dtype need
 *     14  the last one ends with the file
 *     S1  no name twice     S2  a dimension is at most 2^48 - 1     (the official reader is not as strict)
 */

const char *const dtype_name[DTYPES] = {
    "BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "F16", "BF16", "F32", "F64", "C64",
    "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2",
};
const int dtype_bits[DTYPES] = { 8, 8, 8, 16, 16, 32, 32, 64, 64, 16, 16, 32, 64, 64, 8, 8, 8, 8, 8, 4, 6, 6 };

/* Two classes of types: integers, which are compared exactly, and floats that kernels can widen. What is in neither can
 * be listed, but not used. Both lean on the order of the enum. */
static bool is_integer(dtype t) { return t <= U64; }
static bool is_computable(dtype t) { return (t >= F16 && t <= F64) || t == F8_E5M2 || t == F8_E4M3; }

/* 1 to 8 bytes from any address, on any host. */
static uint64_t little_endian(const unsigned char *p, int bytes)
{
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++) value |= (uint64_t)p[i] << (8 * i);
    return value;
}

/* How many elements a list or object has, so that memory for them is allocated once. */
static int64_t members(json container)
{
    int64_t count = 0;
    for (json cursor = {0}, value; json_next(container, &cursor, NULL, &value);) count++;
    return count;
}

/* Rules 9, 10 and S2. Factors are multiplied in their order, as the official reader does: [2^40, 2^40, 0] overflows. */
static bool shape_read(st_tensor *t, json list, char reason[REASON])
{
    json cursor = {0}, item;
    uint64_t bits, dim;
    if (json_kind(list) != '[') return refuse(reason, "rule 10: shape is no list");
    t->dim = allocate((size_t)members(list), sizeof *t->dim);
    t->count = 1;
    while (json_next(list, &cursor, NULL, &item)) {
        if (!json_natural(item, &dim)) return refuse(reason, "rule 9: a dimension is no plain number");
        if (dim >= (uint64_t)1 << 48) return refuse(reason, "rule S2: a dimension is above 2^48 - 1");
        if (!multiply(t->count, dim, &t->count)) return refuse(reason, "rule 10: the shape overflows");
        t->dim[t->ndim++] = (int64_t)dim;
    }
    if (!multiply(t->count, (uint64_t)dtype_bits[t->type], &bits) || bits % 8 != 0)
        return refuse(reason, "rule 10: the size overflows, or is no whole number of bytes");
    t->bytes = bits / 8;
    return true;
}

/* Rules 9, 11 and 13. Offsets stay numbers here, since nothing says yet that they are inside the file. */
static bool offsets_read(st_tensor *t, json list, char reason[REASON])
{
    json cursor = {0}, item;
    uint64_t offset[2];
    if (json_kind(list) != '[' || members(list) != 2)
        return refuse(reason, "rule 11: data_offsets is no list of two numbers");
    for (int i = 0; json_next(list, &cursor, NULL, &item); i++)
        if (!json_natural(item, &offset[i])) return refuse(reason, "rule 9: an offset is no plain number");
    if (offset[0] > offset[1]) return refuse(reason, "rule 11: data_offsets go backwards");
    t->begin = offset[0];
    if (offset[1] - offset[0] == t->bytes) return true;
    return refuse(reason, "rule 13: got %" PRIu64 " bytes, expected %" PRIu64, offset[1] - offset[0], t->bytes);
}

/* Rules 7 to 11 and 13 for one tensor. Fields are found first and read afterwards: the dtype may follow the shape. */
static bool tensor_read(st_tensor *t, json object, char reason[REASON])
{
    static const char *const names[] = { "dtype", "shape", "data_offsets" };
    json field[3] = {{0}}, cursor = {0}, key, value;
    if (json_kind(object) != '{') return refuse(reason, "rule 7: no object");
    while (json_next(object, &cursor, &key, &value))
        for (int i = 0; i < 3; i++) {
            if (!json_is(key, names[i])) continue;
            if (field[i].text) return refuse(reason, "rule 7: %s twice", names[i]);
            field[i] = value;
        }
    for (int i = 0; i < 3; i++)
        if (!field[i].text) return refuse(reason, "rule 7: no %s", names[i]);
    for (t->type = 0; t->type < DTYPES && !json_is(field[0], dtype_name[t->type]);) t->type++;
    int length = (int)lesser(field[0].end - field[0].text, 40);
    if (t->type == DTYPES) return refuse(reason, "rule 8: unknown dtype %.*s", length, field[0].text);
    return shape_read(t, field[1], reason) && offsets_read(t, field[2], reason);
}

/* Rule 6. again: the header has had one. */
static bool metadata_check(json value, bool again, char reason[REASON])
{
    json cursor = {0}, item;
    if (again) return refuse(reason, "rule 6: __metadata__ twice");
    if (json_kind(value) != '{' && json_kind(value) != 'n') return refuse(reason, "rule 6: __metadata__ is no object");
    while (json_next(value, &cursor, NULL, &item))
        if (json_kind(item) != '"') return refuse(reason, "rule 6: __metadata__ holds more than strings");
    return true;
}

/* Rules 6 to 11 and 13: every member of the header by itself. */
static bool header_read(safetensors *file, json root, char reason[REASON])
{
    json cursor = {0}, key, value;
    char why[REASON];
    bool seen = false;
    file->tensors = allocate((size_t)members(root), sizeof *file->tensors);
    while (json_next(root, &cursor, &key, &value)) {
        if (json_is(key, "__metadata__")) {
            if (!metadata_check(value, seen, reason)) return false;
            seen = true;
            file->metadata = json_kind(value) == '{' ? value : (json){0};
        } else {
            st_tensor *t = &file->tensors[file->count++];
            t->name = json_string(key);
            if (!tensor_read(t, value, why)) return refuse(reason, "%s: tensor \"%s\"", why, t->name);
        }
    }
    return true;
}

/* Empty tensors share their begin with what follows them and come first; the name makes the order one. */
static int by_offset(const void *a, const void *b)
{
    const st_tensor *s = a, *t = b;
    if (s->begin != t->begin) return s->begin < t->begin ? -1 : 1;
    if (s->bytes != t->bytes) return s->bytes < t->bytes ? -1 : 1;
    return strcmp(s->name, t->name);
}

/* For pointers to tensors; bytes, not locale. */
static int by_name(const void *a, const void *b)
{
    return strcmp((*(const st_tensor *const *)a)->name, (*(const st_tensor *const *)b)->name);
}

/* Rules 12 and 14. Only here do offsets become pointers: everything before `at` is inside the file. */
static bool layout_check(safetensors *file, const unsigned char *data, uint64_t size, char reason[REASON])
{
    uint64_t at = 0;
    qsort(file->tensors, (size_t)file->count, sizeof *file->tensors, by_offset);
    for (int64_t i = 0; i < file->count; i++) {
        st_tensor *t = &file->tensors[i];
        if (t->begin != at)
            return refuse(reason, "rule 12: got %" PRIu64 ", expected %" PRIu64 ": tensor \"%s\"", t->begin, at,
                          t->name);
        if (t->bytes > size - at) return refuse(reason, "rule 14: ends after the file: tensor \"%s\"", t->name);
        t->data = data + at;
        at += t->bytes;
    }
    return at == size || refuse(reason, "rule 14: got %" PRIu64 " bytes of data, expected %" PRIu64, size, at);
}

/* Rule S1, on the sorted list that safetensors_find searches afterwards. */
static bool names_check(safetensors *file, char reason[REASON])
{
    file->by_name = allocate((size_t)file->count, sizeof *file->by_name);
    for (int64_t i = 0; i < file->count; i++) file->by_name[i] = &file->tensors[i];
    qsort(file->by_name, (size_t)file->count, sizeof *file->by_name, by_name);
    for (int64_t i = 1; i < file->count; i++)
        if (strcmp(file->by_name[i - 1]->name, file->by_name[i]->name) == 0)
            return refuse(reason, "rule S1: twice in the file: tensor \"%s\"", file->by_name[i]->name);
    return true;
}

/* The bytes must outlive the result, which points into them. After false, nothing is left to be freed. */
bool safetensors_parse(const unsigned char *bytes, size_t size, safetensors *out, char reason[REASON])
{
    char why[REASON];
    json root = {0};
    *out = (safetensors){ .map = bytes, .size = size };
    if (size < 8) return refuse(reason, "rule 1: got %zu bytes, expected at least 8", size);
    uint64_t n = little_endian(bytes, 8);
    if (n > JSON_BYTES) return refuse(reason, "rule 2: got a header of %" PRIu64 " bytes", n);
    if (n > size - 8) return refuse(reason, "rule 3: got %zu bytes, expected %" PRIu64, size - 8, n);
    const char *header = (const char *)bytes + 8;
    if (!utf8_check(header, (size_t)n, why)) return refuse(reason, "rule 4: header: %s", why);
    if (!json_scan(header, (size_t)n, false, &root, why)) return refuse(reason, "rule 5: header: %s", why);
    if (json_kind(root) != '{') return refuse(reason, "rule 5: header: expected an object");
    bool valid = header_read(out, root, reason) && layout_check(out, bytes + 8 + n, size - 8 - n, reason) &&
                 names_check(out, reason);
    if (!valid) safetensors_free(out);
    return valid;
}

/* Maps the file; pages are read when they are used, and shared between processes. */
safetensors *safetensors_open(const char *path)
{
    static const unsigned char nothing[1];      /* mmap refuses a length of 0 */
    char reason[REASON];
    struct stat about;
    int fd = input_open(path, &about);
    if (!S_ISREG(about.st_mode)) die(BAD_INPUT, "%s: got a device or pipe, expected a file; save it first", path);
    size_t size = (size_t)about.st_size;
    void *map = size ? mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0) : NULL;
    if (map == MAP_FAILED || (intmax_t)size != about.st_size)
        die(SYSTEM_ERROR, "%s: mapping: got no addresses, expected %jd bytes of them; lift the limit, or use 64 bits",
            path, (intmax_t)about.st_size);
    close(fd);
    safetensors *file = allocate(1, sizeof *file);
    if (!safetensors_parse(map ? map : nothing, size, file, reason))
        die(BAD_INPUT, "%s: safetensors: %s; copy or convert the file again", path, reason);
    file->path = text_of("%s", path);
    return file;
}

/* What safetensors_parse allocated; the bytes are the caller's. */
void safetensors_free(safetensors *file)
{
    for (int64_t i = 0; i < file->count; i++) {
        free(file->tensors[i].name);
        free(file->tensors[i].dim);
    }
    free(file->tensors);
    free(file->by_name);
    *file = (safetensors){0};
}

/* The counterpart of safetensors_open. */
void safetensors_close(safetensors *file)
{
    if (file->size) munmap((void *)(uintptr_t)file->map, file->size);
    free(file->path);
    safetensors_free(file);
    free(file);
}

/* By binary search: a model binds a thousand names of a thousand. */
const st_tensor *safetensors_find(const safetensors *file, const char *name)
{
    st_tensor wanted = { .name = (char *)(uintptr_t)name };
    const st_tensor *key = &wanted, **found = bsearch(&key, file->by_name, (size_t)file->count, sizeof key, by_name);
    return found ? *found : NULL;
}

/* A file's shape of any rank in the program's fixed room; more than MAX_DIMS real dimensions are BAD_INPUT. */
shape shape_of(const st_tensor *t)
{
    shape s = { .ndim = (int)lesser(t->ndim, MAX_DIMS) };
    int extra = t->ndim - s.ndim;
    for (int i = 0; i < t->ndim; i++) {
        if (i >= extra) s.dim[i - extra] = t->dim[i];   /* beyond the leading ones */
        else if (t->dim[i] != 1)
            die(BAD_INPUT, "%s: shape: got %d dimensions, expected at most %d; reshape it", t->name, t->ndim, MAX_DIMS);
    }
    return s;
}

/* Elements of a shape that the program made itself: its memory exists, so the product fits. */
static uint64_t shape_elements(shape s)
{
    uint64_t count = 1;
    for (int i = 0; i < s.ndim; i++) count *= (uint64_t)s.dim[i];
    return count;
}

/* The length and the JSON; names are the program's own words, nothing in them needs escaping. Spaces at the end align
 * the data to 8 bytes, which readers like. */
static char *header_text(const st_entry *entries, int count, size_t *size)
{
    char *text;
    FILE *stream = open_memstream(&text, size);
    if (!stream) die(SYSTEM_ERROR, "memory: got none, expected some for a header; free some");
    uint64_t at = 0;
    fputs("........{", stream);
    for (int i = 0; i < count; i++) {
        const st_entry *e = &entries[i];
        char *dims = list_text(e->shape.ndim, e->shape.dim);
        uint64_t end = at + shape_elements(e->shape) * (uint64_t)dtype_bits[e->type] / 8;
        fprintf(stream, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":%s,", i ? "," : "", e->name, dtype_name[e->type], dims);
        fprintf(stream, "\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}", at, end);
        free(dims);
        at = end;
    }
    fputs("}       ", stream);
    if (fclose(stream) != 0) die(SYSTEM_ERROR, "memory: got none, expected some for a header; free some");
    *size &= ~(size_t)7;                /* keeps the brace and as many of the seven spaces as alignment wants */
    for (int i = 0; i < 8; i++) text[i] = (char)(unsigned char)((uint64_t)(*size - 8) >> (8 * i));
    return text;
}

/* Elements from host order to the file's. A little-endian host writes its memory as it is. */
static void put_elements(const writer *f, const unsigned char *data, uint64_t count, size_t bytes)
{
    const uint16_t probe = 1;
    unsigned char first, turned[4096];
    memcpy(&first, &probe, 1);
    if (first == 1 || bytes == 1) {
        put(f->fd, f->path, data, (size_t)count * bytes);
        return;
    }
    for (uint64_t at = 0, some; at < count; at += some) {
        some = count - at < sizeof turned / bytes ? count - at : sizeof turned / bytes;
        for (size_t i = 0; i < some * bytes; i++) turned[i] = data[at * bytes + i - i % bytes + bytes - 1 - i % bytes];
        put(f->fd, f->path, turned, (size_t)some * bytes);
    }
}

/* The file of safetensors_write and of dumps, which differ in sync alone. */
static void safetensors_put(const char *path, const st_entry *entries, int count, bool sync)
{
    size_t size;
    char *header = header_text(entries, count, &size);
    writer *f = writer_open(path);
    put(f->fd, path, header, size);
    for (int i = 0; i < count; i++)
        put_elements(f, entries[i].data, shape_elements(entries[i].shape), (size_t)dtype_bits[entries[i].type] / 8);
    writer_finish(f, sync);
    writer_rename(f);
    free(header);
}

/* Layout: entries in the order given, one after the other. The file appears at once, when all of it is on the disk. */
void safetensors_write(const char *path, const st_entry *entries, int count)
{
    safetensors_put(path, entries, count, true);
}

/* One element as a double: exact for every type but 64-bit integers beyond 2^53. Half types are widened where the
 * kernels widen them (weight_row), so that there is one definition of them. */
static double element(const st_tensor *t, uint64_t i)
{
    int bytes = dtype_bits[t->type] / 8;
    const unsigned char *p = t->data + i * (uint64_t)bytes;
    uint64_t bits = little_endian(p, bytes), sign = (uint64_t)1 << (8 * bytes - 1);
    double number;
    if (t->type == F64) {
        memcpy(&number, &bits, sizeof number);
        return number;
    }
    if (t->type == I8 || t->type == I16 || t->type == I32 || t->type == I64)
        return bits & sign ? -(double)(~bits & (sign - 1)) - 1 : (double)bits;
    if (is_integer(t->type)) return (double)bits;
    real widened;
    weight_row((weight){ .data = p, .type = t->type, .ndim = 2, .dim = { 1, 1 } }, 0, 0, 1, &widened);
    return (double)widened;
}

/* ---------------------------------------------------------------- weights
 *
 * A component's checkpoint, whether one file or many, is asked by tensor name:
 *
 *     weights_open --> bind, bind_conv for every layer; weights_ignore for what is known and not read --> weights_done
 *
 * Each tensor that is bound or ignored is marked. In the end nothing may be unmarked: a tensor without a place means
 * that the configuration describes another model, and the result would be silently wrong.
 *
 * Low-rank updates (kohya's names) hang on a matrix "blocks.0.attn1.to_q.weight" [N][K] as
 *     lora_unet__blocks_0_attn1_to_q.lora_up.weight [N][rank], .lora_down.weight [rank][K], .alpha (a scalar, optional)
 * and are linked to the weight, not merged: the mapped file cannot change, and kernels add them while they widen. */

/* The number of a file among w->files, which is opened where it is new. */
static int weights_add(weights *w, const char *path)
{
    for (int f = 0; f < w->nfiles; f++)
        if (strcmp(w->files[f]->path, path) == 0) return f;
    size_t n = (size_t)w->nfiles;
    safetensors **files = allocate(n + 1, sizeof(*files));
    bool **used = allocate(n + 1, sizeof(*used));
    if (n > 0) memcpy(files, w->files, n * sizeof(*files)), memcpy(used, w->used, n * sizeof(*used));
    free(w->files);
    free(w->used);
    w->files = files, w->used = used;   /* the files themselves stay where they are: weights point to their names */
    files[n] = safetensors_open(path);
    used[n] = allocate((size_t)files[n]->count, sizeof(bool));
    return w->nfiles++;
}

/* One line of an index: the tensor must be in that file, which must be below the folder, and named once. */
static void shard_entry(weights *w, const char *path, json key, json value)
{
    char *name = json_string(key), *shard = json_kind(value) == '"' ? json_string(value) : text_of("/");
    if (!*shard || *shard == '/' || strstr(shard, ".."))
        die(BAD_INPUT, "%s: weight_map: %s: got the file \"%s\", expected one inside; mend it", path, name, shard);
    char *file = text_of("%s/%s", w->folder, shard);
    int f = weights_add(w, file);
    const st_tensor *t = safetensors_find(w->files[f], name);
    bool *named = t ? &w->used[f][t - w->files[f]->tensors] : NULL;
    if (!t) die(BAD_INPUT, "%s: weight_map: %s: got none in %s, expected it there; copy both again", path, name, file);
    if (*named) die(BAD_INPUT, "%s: weight_map: %s: got it twice, expected it once; copy the index again", path, name);
    *named = true;
    free(name), free(shard), free(file);
}

/* Opens what the index names and checks it both ways. `used` serves here for "named by the index". */
static void shards_open(weights *w, const char *path)
{
    json root, cursor = {0}, key, value;
    char *text = json_file(path, &root);
    json map = json_member(root, "weight_map");
    if (json_kind(map) != '{') die(BAD_INPUT, "%s: weight_map: got no object, expected one; copy it again", path);
    while (json_next(map, &cursor, &key, &value)) shard_entry(w, path, key, value);
    for (int f = 0; f < w->nfiles; f++)
        for (int64_t i = 0; i < w->files[f]->count; i++) {
            if (!w->used[f][i])
                die(BAD_INPUT, "%s: tensor %s: got it here, expected it where %s names it; copy both again",
                    w->files[f]->path, w->files[f]->tensors[i].name, path);
            w->used[f][i] = false;
        }
    free(text);
}

/* The single file is preferred, as by the public loader; an index is looked at only where there is none. */
weights *weights_open(const char *folder, const char *stem)
{
    weights *w = allocate(1, sizeof *w);
    w->folder = text_of("%s", folder);
    w->stem = text_of("%s", stem);
    char *single = text_of("%s/%s.safetensors", folder, stem), *index = text_of("%s.index.json", single);
    if (access(single, F_OK) == 0) weights_add(w, single);
    else if (access(index, F_OK) == 0) shards_open(w, index);
    else die(BAD_INPUT, "%s: got neither it nor its .index.json, expected one of them; check the folder", single);
    free(single);
    free(index);
    return w;
}

/* A tensor and the number of its file; NULL: in none of them. Shards are few, so they are asked in turn. */
static const st_tensor *weights_find(const weights *w, const char *key, int *file)
{
    const st_tensor *t = NULL;
    for (*file = 0; *file < w->nfiles; ++*file)
        if ((t = safetensors_find(w->files[*file], key))) break;
    return t;
}

/* Asking marks nothing. */
bool weights_has(const weights *w, const char *key)
{
    int file;
    return weights_find(w, key, &file) != NULL;
}

/* A stored tensor as a parameter, or death: expected shape, and a type that kernels widen. Masks, which are only
 * compared with 0, may be of integers too: those are the keys whose last part begins with "mask". */
static weight weight_view(const char *path, const st_tensor *t, shape expected)
{
    const char *dot = strrchr(t->name, '.'), *last = dot ? dot + 1 : t->name;
    if (t->ndim != expected.ndim || memcmp(t->dim, expected.dim, (size_t)t->ndim * sizeof *t->dim) != 0)
        die(BAD_INPUT, "%s: tensor %s: got the shape %s, expected %s; check the configuration beside it", path, t->name,
            list_text(t->ndim, t->dim), list_text(expected.ndim, expected.dim));
    if (!is_computable(t->type) && !(is_integer(t->type) && strncmp(last, "mask", 4) == 0))
        die(BAD_INPUT, "%s: tensor %s: got the type %s, expected F64, F32, F16, BF16, F8_E4M3 or F8_E5M2; convert it",
            path, t->name, dtype_name[t->type]);
    weight v = { .data = t->data, .type = t->type, .ndim = t->ndim, .key = t->name };
    memcpy(v.dim, expected.dim, sizeof v.dim);
    return v;
}

/* One part of a layer's update, under either spelling of the prefix that trainers use. */
static const st_tensor *lora_find(const safetensors *file, const char *name, const char *part)
{
    static const char *const prefixes[] = { "lora_unet__", "lora_unet_" };
    const st_tensor *t = NULL;
    for (int i = 0; i < 2 && !t; i++) {
        char *full = text_of("%s%s%s", prefixes[i], name, part);
        t = safetensors_find(file, full);
        free(full);
    }
    return t;
}

/* The factor of one file's update: its weight * alpha / rank. */
static real lora_scale(const safetensors *file, const st_tensor *alpha, double scale, int64_t rank)
{
    if (!alpha) return (real)scale;
    bool known = alpha->count == 1 && (is_computable(alpha->type) || is_integer(alpha->type));
    double value = known ? element(alpha, 0) : NAN;
    if (!isfinite(value))
        die(BAD_INPUT, "%s: tensor %s: got no finite number, expected one; export it again", file->path, alpha->name);
    return (real)(scale * value / (double)rank);
}

/* The update that one file has for the matrix [N][K], put in front of `next`: up [N][rank], down [rank][K]. */
static const lora *lora_link(weights *w, int i, const char *stem, const weight *matrix, const lora *next)
{
    const safetensors *file = w->loras[i];
    const st_tensor *up = lora_find(file, stem, ".lora_up.weight"), *down = lora_find(file, stem, ".lora_down.weight");
    const st_tensor *alpha = lora_find(file, stem, ".alpha");
    if (!up && !down) return next;
    if (!up || !down)
        die(BAD_INPUT, "%s: tensor %s: got it alone, expected up and down; export it again", file->path,
            (up ? up : down)->name);
    int64_t rank = up->ndim == 2 ? greater(up->dim[1], 1) : 1;      /* a rank of 0 then fails the check of shapes */
    lora *link = allocate(1, sizeof *link);
    link->up = weight_view(file->path, up, SHAPE(matrix->dim[0], rank));
    link->down = weight_view(file->path, down, SHAPE(rank, matrix->dim[1]));
    link->scale = lora_scale(file, alpha, w->lora_scales[i], rank);
    link->next = next;
    w->lora_used[i][up - file->tensors] = w->lora_used[i][down - file->tensors] = true;
    if (alpha) w->lora_used[i][alpha - file->tensors] = true;
    return link;
}

/* All updates of a matrix, in the order of the files. Layers are named like the key, with '_' for '.'. */
static const lora *lora_bind(weights *w, const weight *matrix)
{
    const lora *list = NULL;
    const char *tail = strrchr(matrix->key, '.');
    if (w->nloras == 0 || matrix->ndim != 2 || !tail || strcmp(tail, ".weight") != 0) return NULL;
    char *stem = text_of("%.*s", (int)(tail - matrix->key), matrix->key);
    for (char *c = stem; *c; c++)
        if (*c == '.') *c = '_';
    for (int i = w->nloras - 1; i >= 0; i--)        /* from the end, as each goes in front */
        list = lora_link(w, i, stem, matrix, list);
    free(stem);
    return list;
}

/* Weights for measurements: every name is there, in that type (F32 or BF16), with numbers of a trained layer's size. */
weights *weights_random(dtype type)
{
    weights *w = allocate(1, sizeof *w);
    w->random = true;
    w->random_type = type;
    return w;
}

static weight random_weight(const weights *w, shape expected, char *key)
{
    uint64_t count = shape_elements(expected), state = 1;
    size_t size = (size_t)dtype_bits[w->random_type] / 8;
    unsigned char *bytes = allocate(count, size);
    float scale = 1.0f / sqrtf((float)(count / (uint64_t)expected.dim[0]) + 1);
    for (uint64_t i = 0; i < count; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        float x = scale * ((float)(state >> 40) * 0x1p-23f - 1);
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        if (w->random_type == BF16) bits >>= 16;
        for (size_t b = 0; b < size; b++) bytes[i * size + b] = (unsigned char)(bits >> 8 * b);
    }
    weight v = { .data = bytes, .type = w->random_type, .ndim = expected.ndim, .key = key };
    memcpy(v.dim, expected.dim, sizeof v.dim);
    return v;
}

/* What bind and bind_conv share. Takes over key. Updates hang on every matrix: no caller has to ask for them. */
static weight bind_key(weights *w, shape expected, char *key)
{
    int f;
    if (w->random) return random_weight(w, expected, key);
    const st_tensor *t = weights_find(w, key, &f);
    if (!t)
        die(BAD_INPUT, "%s/%s: tensor %s: got none, expected %s; check the configuration, or copy the file again",
            w->folder, w->stem, key, list_text(expected.ndim, expected.dim));
    free(key);
    w->used[f][t - w->files[f]->tensors] = true;
    weight v = weight_view(w->files[f]->path, t, expected);
    v.lora = lora_bind(w, &v);
    return v;
}

/* Looks up a parameter by its name in the checkpoint, checks shape and type, and marks it as used. */
weight bind(weights *w, shape expected, const char *key, ...)
{
    FORMATTED(name, key);
    return bind_key(w, expected, name);
}

/* expected: [Cout][Cin][t][y][x] or fewer kernel dimensions, as stored. The copy [Cout][taps][Cin] keeps the stored
 * type; it is the order in which a kernel over channels-last activations reads. */
weight bind_conv(weights *w, shape expected, const char *key, ...)
{
    FORMATTED(name, key);
    weight v = bind_key(w, expected, name);
    size_t size = (size_t)dtype_bits[v.type] / 8, cout = (size_t)v.dim[0], cin = (size_t)v.dim[1], taps = 1;
    for (int i = 2; i < v.ndim; i++) taps *= (size_t)v.dim[i];
    unsigned char *copy = allocate(cout * cin * taps, size), *to = copy;
    for (size_t n = 0; n < cout; n++)
        for (size_t k = 0; k < taps; k++)
            for (size_t c = 0; c < cin; c++, to += size) memcpy(to, v.data + ((n * cin + c) * taps + k) * size, size);
    int64_t cin_last[] = { v.dim[0], (int64_t)taps, v.dim[1] };
    w->copied += cout * cin * taps * size;
    v.data = copy, v.ndim = 3;
    memcpy(v.dim, cin_last, sizeof cin_last);
    return v;
}

/* Both parameters of a layer. */
static layer bind_pair(weights *w, shape expected, bool convolution, char *name)
{
    layer l = { .weight = (convolution ? bind_conv : bind)(w, expected, "%s.weight", name) };
    l.bias = bind(w, (shape){ 1, { expected.dim[0] } }, "%s.bias", name);
    free(name);
    return l;
}

layer bind_linear(weights *w, int64_t n, int64_t k, const char *name, ...)
{
    FORMATTED(key, name);
    return bind_pair(w, SHAPE(n, k), false, key);
}

layer bind_norm(weights *w, int64_t n, const char *name, ...)
{
    FORMATTED(key, name);
    return bind_pair(w, SHAPE(n), false, key);
}

layer bind_convolution(weights *w, shape kernel, const char *name, ...)
{
    FORMATTED(key, name);
    return bind_pair(w, kernel, true, key);
}

/* Files of low-rank updates and what each is worth; what is bound from now on takes them along. */
void weights_add_loras(weights *w, const safetensors *const *files, const double *scales, int count)
{
    w->loras = files;
    w->lora_scales = scales;
    w->nloras = count;
    w->lora_used = allocate((size_t)count, sizeof *w->lora_used);
    for (int i = 0; i < count; i++) w->lora_used[i] = allocate((size_t)files[i]->count, sizeof(bool));
}

/* Looks at every floating tensor, bound or not: the search for the culprit after a stage has gone wrong. */
const st_tensor *weights_nonfinite(const weights *w, int64_t *index)
{
    for (int f = 0; f < w->nfiles; f++)
        for (int64_t i = 0; i < w->files[f]->count; i++) {
            const st_tensor *t = &w->files[f]->tensors[i];
            weight v = { .data = t->data, .type = t->type, .ndim = 1, .dim = { (int64_t)t->count }, .key = t->name };
            for (*index = 0; is_computable(t->type) && *index < (int64_t)t->count; ++*index) {
                real x;
                weight_row((weight){ v.data + *index * (dtype_bits[v.type] / 8), v.type, 1, { 1 }, v.key, NULL }, 0, 0, 1, &x);
                if (!isfinite(x)) return t;
            }
        }
    return NULL;
}

/* glob: as in a shell, '*' also matching dots. For tensors that a valid file holds and nothing reads. */
void weights_ignore(weights *w, const char *glob)
{
    for (int f = 0; f < w->nfiles; f++)
        for (int64_t i = 0; i < w->files[f]->count; i++)
            if (fnmatch(glob, w->files[f]->tensors[i].name, 0) == 0) w->used[f][i] = true;
}

/* Dies for the first tensor without a mark. */
static void file_done(const safetensors *file, const bool *used, const char *what)
{
    for (int64_t i = 0; i < file->count; i++) {
        const st_tensor *t = &file->tensors[i];
        if (!used[i])
            die(BAD_INPUT, "%s: tensor %s: got %s %s, expected %s; check the configuration, or give --allow-unknown",
                file->path, t->name, dtype_name[t->type], list_text(t->ndim, t->dim), what);
    }
}

/* After everything is bound. A low-rank update that matched no layer would do nothing: never waived. */
void weights_done(const weights *w, bool allow_unknown)
{
    for (int f = 0; f < w->nfiles && !allow_unknown; f++)
        file_done(w->files[f], w->used[f], "only tensors that the configuration has a place for");
    for (int i = 0; i < w->nloras; i++)
        file_done(w->loras[i], w->lora_used[i], "only updates of linear layers of this model");
}

/* For `info` and progress: what the parameters take on disk and, mapped, in memory. */
uint64_t weights_bytes(const weights *w)
{
    uint64_t bytes = 0;
    for (int f = 0; f < w->nfiles; f++)
        for (int64_t i = 0; i < w->files[f]->count; i++) bytes += w->files[f]->tensors[i].bytes;
    return bytes;
}

/* ---------------------------------------------------------------- pictures in: PPM
 *
 *     "P6" w h maxval, one white space, then w h times R, G, B in 1 byte each, or 2 (big-endian) where maxval > 255
 *     "P5" the same with one grey sample a pixel      "P3" like P6, with samples as decimal numbers
 *
 * White space and comments (# to the end of the line) may stand between the numbers. A stream may hold several
 * pictures. Sizes and samples come from a stranger: bounds are checked before any of them is used, and the data must be
 * there before memory is allocated for it. */

typedef struct { const unsigned char *at, *end; char *reason; } ppm_scan;

/* The next number, after white space and comments, of which there must be some. */
static bool ppm_number(ppm_scan *s, uint32_t least, uint32_t most, const char *what, uint32_t *number)
{
    const unsigned char *start = s->at;
    for (; s->at < s->end && (is_space(*s->at) || *s->at == '#'); s->at++)
        if (*s->at == '#')
            while (s->at + 1 < s->end && *s->at != '\n') s->at++;
    bool found = s->at > start && s->at < s->end && is_digit(*s->at);
    if (!found) return refuse(s->reason, "got no %s, expected one", what);
    uint64_t value = 0;
    for (; s->at < s->end && is_digit(*s->at) && value <= UINT32_MAX; s->at++)
        value = value * 10 + (uint64_t)(*s->at - '0');
    *number = (uint32_t)value;
    if (value >= least && value <= most) return true;
    return refuse(s->reason, "got the %s %" PRIu64 ", expected %" PRIu32 " to %" PRIu32, what, value, least, most);
}

/* One sample, in digits (P3), or in one or two bytes. */
static bool ppm_sample(ppm_scan *s, bool digits, uint32_t most, uint32_t *value)
{
    if (digits) return ppm_number(s, 0, most, "sample", value);
    *value = *s->at++;
    if (most > 255) *value = *value << 8 | *s->at++;
    return *value <= most || refuse(s->reason, "got the sample %" PRIu32 ", expected at most %" PRIu32, *value, most);
}

/* P6, P3 (colour) and P5 (grey), maxval 1 to 65535; v becomes (255 v + maxval/2) / maxval in integers. used: the bytes
 * of this picture, after which another may follow. out->rgb is to be freed; after false there is none. */
bool ppm_parse(const unsigned char *bytes, size_t size, size_t *used, image *out, char reason[REASON])
{
    ppm_scan s = { bytes + (size < 2 ? size : 2), bytes + size, reason };
    uint32_t w, h, most, value = 0;
    uint64_t samples, need;
    *out = (image){0};
    if (size < 2 || bytes[0] != 'P' || (bytes[1] != '3' && bytes[1] != '5' && bytes[1] != '6'))
        return refuse(reason, "got another kind of file, expected P6, P3 or P5");
    bool digits = bytes[1] == '3', grey = bytes[1] == '5';
    if (!ppm_number(&s, 1, INT32_MAX, "width", &w) || !ppm_number(&s, 1, INT32_MAX, "height", &h)) return false;
    if (!ppm_number(&s, 1, 65535, "maxval", &most)) return false;
    if (s.at == s.end || !is_space(*s.at)) return refuse(reason, "got no white space after maxval, expected one");
    s.at += !digits;                    /* in P3 it is the white space before the first sample */
    /* In digits, a sample takes a blank and a digit at least: no size allocates more than the data justifies. */
    size_t left = (size_t)(s.end - s.at);
    bool fits = multiply((uint64_t)w * h, grey ? 1 : 3, &samples) &&
                multiply(samples, digits || most > 255 ? 2 : 1, &need) && need <= left;
    if (!fits)
        return refuse(reason, "got %zu bytes of data, expected more for %" PRIu32 " x %" PRIu32, left, w, h);
    unsigned char *rgb = allocate((size_t)w * h, 3), *to = rgb;
    for (uint64_t i = 0; i < samples; i++) {
        if (!ppm_sample(&s, digits, most, &value)) {
            free(rgb);
            return false;
        }
        for (int copies = grey ? 3 : 1; copies > 0; copies--) *to++ = (unsigned char)((255 * value + most / 2) / most);
    }
    *used = (size_t)(s.at - bytes);
    *out = (image){ w, h, rgb };
    return true;
}

/* White space between pictures and at the end is skipped: P3 files have it. */
int images_read(const char *path, image *list, int room)
{
    size_t size, used = 0;
    char reason[REASON];
    unsigned char *bytes = read_all(path, &size);
    const char *name = strcmp(path, "-") ? path : "standard input";
    int count = 0;
    for (size_t at = 0; at < size || count == 0; at += used) {
        if (count == room) die(BAD_INPUT, "%s: pictures: got more, expected at most %d; give fewer", name, room);
        if (!ppm_parse(bytes + at, size - at, &used, &list[count], reason))
            die(BAD_INPUT, "%s: picture %d: %s; convert it to PPM", name, count + 1, reason);
        for (count++; at + used < size && is_space(bytes[at + used]);) used++;
    }
    free(bytes);
    return count;
}

/* ---------------------------------------------------------------- Pillow's resize
 *
 * Formula   One axis, `in` to `out` samples, s = in/out, f = max(s, 1): sample i lies at c = (i + 1/2) s and is the sum
 *           of p_j B((j - c + 1/2) / f), |j - c| within 2 f, over the sum of the weights. B is the cubic with a = -1/2.
 * Method    Weights in double, then rounded to 22 bits after the point; sums in integers; the result of the first axis
 *           is rounded to 8 bits. An axis that does not change is skipped.
 * Accuracy  Bit for bit Pillow 13's Image.resize of RGB, if no multiplication is fused with an addition. */

/* B, in exactly these operations: another factoring rounds otherwise. */
static double bicubic(double x)
{
    const double a = -0.5;
    x = fabs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/* The weights of output sample i: their count, from input sample *first on. k: scratch of `in` doubles. */
static int64_t resize_weights(int64_t in, int64_t out, int64_t i, double *k, int64_t *weights22, int64_t *first)
{
    double s = (double)in / (double)out, f = s > 1 ? s : 1, c = ((double)i + 0.5) * s, sum = 0, inverse = 1 / f;
    int64_t low = greater(0, (int64_t)(c - 2 * f + 0.5)), count = lesser(in, (int64_t)(c + 2 * f + 0.5)) - low;
    for (int64_t j = 0; j < count; j++) sum += k[j] = bicubic(((double)(j + low) - c + 0.5) * inverse);
    for (int64_t j = 0; j < count; j++) {
        double scaled = k[j] / sum * (1 << 22);
        weights22[j] = (int64_t)(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    }
    *first = low;
    return count;
}

/* One axis of a picture. `along` is the distance of neighbours on the axis, in pixels; `across` that of the lines. */
static image resize_axis(image in, int64_t size, bool vertical)
{
    image out = { vertical ? in.w : size, vertical ? size : in.h, NULL };
    int64_t length = vertical ? in.h : in.w, lines = vertical ? in.w : in.h, along = vertical ? in.w : 1, first;
    int64_t from_across = vertical ? 1 : in.w, to_across = vertical ? 1 : out.w;
    double *k = allocate((size_t)length, sizeof *k);
    int64_t *weights22 = allocate((size_t)length, sizeof *weights22);
    out.rgb = allocate((size_t)(out.w * out.h), 3);
    for (int64_t i = 0; i < size; i++) {
        int64_t count = resize_weights(length, size, i, k, weights22, &first);
        for (int64_t line = 0; line < lines; line++)
            for (int64_t c = 0; c < 3; c++) {
                const unsigned char *from = in.rgb + (line * from_across + first * along) * 3 + c;
                int64_t sum = 1 << 21;
                for (int64_t j = 0; j < count; j++) sum += weights22[j] * from[j * along * 3];
                out.rgb[(line * to_across + i * along) * 3 + c] = (unsigned char)lesser(greater(sum, 0) >> 22, 255);
            }
    }
    free(k);
    free(weights22);
    return out;
}

/* A new picture of w x h, both positive. Pillow takes the vertical axis first where that saves the most work. */
image image_resize(image in, int64_t w, int64_t h)
{
    bool vertical = h < in.h && in.h - h > 2 * (in.w - w);
    image out = { in.w, in.h, allocate((size_t)(in.w * in.h), 3) };
    memcpy(out.rgb, in.rgb, (size_t)(in.w * in.h * 3));
    for (int pass = 0; pass < 2; pass++, vertical = !vertical) {
        int64_t size = vertical ? h : w;
        if (size == (vertical ? out.h : out.w)) continue;
        image next = resize_axis(out, size, vertical);
        free(out.rgb);
        out = next;
    }
    return out;
}

/* ---------------------------------------------------------------- frames out
 *
 * Y4M: one header line, then for each frame "FRAME\n" and the planes Y, Cb, Cr, 8 bits, chroma at half size both ways.
 * PPM: a P6 file a frame, the exact bytes. Both are opened early, so that a run of hours does not end at a wrong name.
 * All PPM files are renamed together at the end; they are closed before, as there may be more of them than a process
 * may hold open. Standard output is a pipe that cannot be taken back: there, frames appear as they come. */

/* One struct for both kinds: planes tells them apart. */
struct output {
    char *path;                 /* as given: the pattern, or "-" */
    int64_t w, h, frames, done;
    int width;                  /* PPM: digits of the number, 0: as many as it has; Y4M: -1 */
    size_t before, after;       /* PPM: where the field begins and ends in path */
    writer **files;             /* PPM: one a frame; Y4M: one, NULL for standard output */
    unsigned char *planes;      /* Y4M: one frame, Y then Cb then Cr */
    size_t planes_size;
};

/* Finds the one %d or %0Nd of a name, N of one or two digits; false where there is another % or none. The field is
 * understood here and never reaches printf. */
static bool pattern_read(output *o)
{
    const char *field = strchr(o->path, '%');
    if (!field) return false;
    const char *p = field + 1;
    if (*p == '0')
        for (p++; is_digit(*p) && p - field < 4; p++) o->width = o->width * 10 + (*p - '0');
    o->before = (size_t)(field - o->path);
    o->after = (size_t)(p + 1 - o->path);
    return *p == 'd' && (p == field + 1 || o->width > 0) && !strchr(p, '%');
}

/* Dies where the folder of a name is not there or takes no files. */
void output_check(const char *path)
{
    const char *slash = strrchr(path, '/');
    char *folder = slash ? text_of("%.*s", (int)greater(slash - path, 1), path) : text_of(".");
    struct stat about;
    if (stat(folder, &about) == 0 && !S_ISDIR(about.st_mode)) errno = ENOTDIR, die_writing(path);
    if (access(folder, W_OK | X_OK) != 0) die_writing(path);
    target_check(path);
    free(folder);
}

/* "-" or NAME.y4m: one stream; NAME%04d.ppm: one file a frame, from 0 on. Whatever cannot work dies here, before the
 * hours of computing. */
output *output_open(const char *path, int64_t w, int64_t h, int64_t frames)
{
    const char *dot = strrchr(path, '.');
    bool standard = strcmp(path, "-") == 0, ppm = dot && strcmp(dot, ".ppm") == 0;
    if (!standard && !ppm && !(dot && strcmp(dot, ".y4m") == 0))
        die(BAD_INPUT, "%s: output: got another ending, expected .y4m, -%%04d.ppm, or - alone; rename it", path);
    output *o = allocate(1, sizeof *o);
    *o = (output){ .path = text_of("%s", path), .w = w, .h = h, .frames = frames };
    if (ppm && !pattern_read(o))
        die(BAD_INPUT, "%s: output: got no single number field, expected one, as in frame-%%04d.ppm; rename it", path);
    if (!standard) output_check(path);
    o->files = allocate(ppm ? (size_t)frames : 1, sizeof *o->files);
    if (ppm) return o;
    o->width = -1;
    o->planes_size = (size_t)(w * h + 2 * ((w + 1) / 2) * ((h + 1) / 2));
    o->planes = allocate(o->planes_size, 1);
    if (!standard) o->files[0] = writer_open(path);
    return o;
}

/* Y4M announces 24 frames a second, square pixels, and the chroma position and range of JPEG. */
static void y4m_frame(output *o, const unsigned char *rgb)
{
    int fd = o->files[0] ? o->files[0]->fd : STDOUT_FILENO;
    char *head = text_of("YUV4MPEG2 W%" PRId64 " H%" PRId64 " F24:1 Ip A1:1 C420jpeg XCOLORRANGE=FULL\n", o->w, o->h);
    y4m_planes(rgb, o->w, o->h, o->planes);
    if (o->done == 0) put(fd, o->path, head, strlen(head));
    put(fd, o->path, "FRAME\n", 6);
    put(fd, o->path, o->planes, o->planes_size);
    free(head);
}

/* Each file is complete on the disk, but for its name. */
static void ppm_frame(output *o, const unsigned char *rgb)
{
    char *name = text_of("%.*s%0*" PRId64 "%s", (int)o->before, o->path, o->width, o->done, o->path + o->after);
    char *head = text_of("P6\n%" PRId64 " %" PRId64 "\n255\n", o->w, o->h);
    writer *f = o->files[o->done] = writer_open(name);
    put(f->fd, name, head, strlen(head));
    put(f->fd, name, rgb, (size_t)(o->w * o->h * 3));
    writer_finish(f, true);
    free(name);
    free(head);
}

/* rgb: [h][w][3] of the next frame. */
void output_frame(output *o, const unsigned char *rgb)
{
    if (o->done == o->frames)
        die(SYSTEM_ERROR, "%s: output: got more frames, expected %" PRId64 "; report this bug", o->path, o->frames);
    if (o->planes) y4m_frame(o, rgb);
    else ppm_frame(o, rgb);
    o->done++;
}

/* Gives the files their names, after all frames are written. */
void output_close(output *o)
{
    if (o->done != o->frames)
        die(SYSTEM_ERROR, "%s: output: got %" PRId64 " frames, expected %" PRId64 "; report this bug", o->path, o->done,
            o->frames);
    if (o->planes && o->files[0]) writer_finish(o->files[0], true);
    sigset_t before = hold_signals();               /* all frames or none */
    for (int64_t i = 0; i < (o->planes ? 1 : o->frames); i++)
        if (o->files[i]) writer_rename(o->files[i]);
    release_signals(before);
    free(o->files);
    free(o->planes);
    free(o->path);
    free(o);
}

/* JPEG's full-range BT.601, in integers that are exact (halves round up):
 *     Y = 0.299 R + 0.587 G + 0.114 B     Cb = 128 + (B - Y) / 1.772     Cr = 128 + (R - Y) / 1.402
 * Times 1000 all factors are whole: Cb = 128 + (886 B - 299 R - 587 G) / 1772, Cr = 128 + (701 R - 587 G - 114 B) /
 * 1402. R, G, B of the chroma are the mean of 2 x 2 pixels, edges replicated; it is not rounded by itself: the sum of
 * four is divided once. Pure blue and red give 255.5, which is cut to 255.
 * planes: Y [h][w], Cb and Cr [(h + 1)/2][(w + 1)/2]. */
void y4m_planes(const unsigned char *rgb, int64_t w, int64_t h, unsigned char *planes)
{
    int64_t half_w = (w + 1) / 2, half_h = (h + 1) / 2;
    unsigned char *cb = planes + w * h, *cr = cb + half_w * half_h;
    for (int64_t i = 0; i < w * h; i++)
        planes[i] = (unsigned char)((299 * rgb[3 * i] + 587 * rgb[3 * i + 1] + 114 * rgb[3 * i + 2] + 500) / 1000);
    for (int64_t y = 0; y < half_h; y++)
        for (int64_t x = 0; x < half_w; x++) {
            int sum[3] = {0};
            for (int64_t corner = 0; corner < 4; corner++) {
                int64_t row = lesser(2 * y + corner / 2, h - 1), column = lesser(2 * x + corner % 2, w - 1);
                for (int c = 0; c < 3; c++) sum[c] += rgb[(row * w + column) * 3 + c];
            }
            int blue = 886 * sum[2] - 299 * sum[0] - 587 * sum[1], red = 701 * sum[0] - 587 * sum[1] - 114 * sum[2];
            *cb++ = (unsigned char)lesser((128 * 4 * 1772 + blue + 2 * 1772) / (4 * 1772), 255);
            *cr++ = (unsigned char)lesser((128 * 4 * 1402 + red + 2 * 1402) / (4 * 1402), 255);
        }
}

/* ---------------------------------------------------------------- dumps
 *
 * Inside, channels are last; files have the order of the public code, which the reference data has, too:
 *     AS_IS                   [N][D], [rows][N][D]: tokens have their width last on both sides
 *     CHANNELS_FIRST          [F][h][w][C] -> [C][F][h][w]
 *     ROWS_CHANNELS_FIRST     [B][F][h][w][C] -> [B][C][F][h][w] */

/* Whether some filter matches a name; without filters all are wanted. */
static bool dump_wanted(const run *r, const char *name)
{
    bool wanted = r->nfilters == 0;
    for (int i = 0; i < r->nfilters && !wanted; i++) wanted = fnmatch(r->filters[i], name, 0) == 0;
    return wanted;
}

/* The folder is made at need, one level; that it exists already is the usual case. */
static void dump_write(const run *r, const char *name, dtype type, shape s, const void *data)
{
    char *path = text_of("%s/%s.safetensors", r->dump_dir, name);
    if (mkdir(r->dump_dir, 0777) != 0 && errno != EEXIST) die_writing(r->dump_dir);
    safetensors_put(path, &(st_entry){ name, type, s, data }, 1, false);    /* a dump may be lost in a crash: no sync */
    free(path);
}

/* Moves the last dimension to place `to` (0 or 1), in the shape and in a copy, which is to be freed. */
static real *channels_first(const real *from, shape *s, int to)
{
    int64_t c = s->dim[s->ndim - 1], rows = to ? s->dim[0] : 1, n = (int64_t)shape_elements(*s) / greater(rows * c, 1);
    real *turned = allocate((size_t)(rows * n * c), sizeof *turned), *at = turned;
    for (int64_t row = 0; row < rows; row++, from += n * c)
        for (int64_t j = 0; j < c; j++)
            for (int64_t i = 0; i < n; i++) *at++ = from[i * c + j];
    for (int i = s->ndim - 1; i > to; i--) s->dim[i] = s->dim[i - 1];
    s->dim[to] = c;
    return turned;
}

/* Writes DIR/NAME.safetensors in PyTorch's order; nothing where there are no dumps, or no data yet (planning). */
void dump(const run *r, tensor x, layout order, const char *name, ...)
{
    if (!r->dump_dir || !x.data) return;
    FORMATTED(full, name);
    shape s = { .ndim = x.ndim };
    memcpy(s.dim, x.dim, sizeof s.dim);
    if (dump_wanted(r, full)) {
        real *turned = order == AS_IS ? NULL : channels_first(x.data, &s, order == ROWS_CHANNELS_FIRST);
        dump_write(r, full, sizeof(real) == 8 ? F64 : F32, s, turned ? turned : x.data);
        free(turned);
    }
    free(full);
}

/* The same for data of any type, in PyTorch's order already. */
void dump_data(const run *r, const void *data, dtype type, shape s, const char *name, ...)
{
    if (!r->dump_dir || !data) return;
    FORMATTED(full, name);
    if (dump_wanted(r, full)) dump_write(r, full, type, s, data);
    free(full);
}

/* ---------------------------------------------------------------- compare
 *
 * GOLDEN and MINE are files or folders of files; their tensors meet by name. Both are mapped and read once, so memory
 * does not grow with them. Standard output gets one line, a tensor per line before it if asked:
 *
 *     same: 35 tensors; worst step.000.temb: rel-L2 7.2e-06, limit 5.78e-05
 *     differs first: step.000.block.02.attn1: rel-L2 ..., limit ...; of [2, 72, 48], ... ; 12 of 35 tensors differ
 *
 * First is first in the order of computing, so that the name points at the cause and not at what follows from it. */

/* The parts of names in the order in which a run makes them. One list serves every level: names are compared part by
 * part, and no two levels disagree. Numbers count, and a name comes after those that it begins (block.03 ends with the
 * stream after block.03.ff). */
static const char *const stage_order[] = {
    "skip", "time", "norm1", "attn1", "attn2", "pixels", "mask", "clip", "ff", "embed", "layer", "hidden",
    "mask_latents", "masked_latents", "noise", "timesteps", "step", "temb", "text", "image", "patch", "block",
    "norm_out", "teacache", "vae", "enc", "moments", "dec", "conv_in", "down", "mid", "up", "out", "pred", "latents",
    "decoded", "video", "frames",
};

/* A file with what its metadata says: measured floors by tensor name (floor, a span of text), and whether its case is
 * one of the trained model's. A pack is all tensors of one side, in execution order. */
typedef struct { safetensors *file; char *text; json floor; bool tiny; } source;
typedef struct { const st_tensor *t; const source *from; } entry;
typedef struct { source *sources; int nsources; entry *entries; int64_t count; } pack;

/* Rank of a name's first part: numbers by value, then the list, then the rest. An end ranks last. */
static int64_t part_rank(const char *part, size_t length)
{
    const int64_t words = INT64_C(1) << 40;
    int64_t count = sizeof stage_order / sizeof *stage_order, i = 0;
    if (length == 0) return INT64_MAX;
    if (is_digit(*part)) return lesser(strtol(part, NULL, 10), words - 1);
    while (i < count && (strlen(stage_order[i]) != length || strncmp(stage_order[i], part, length) != 0)) i++;
    return words + i;
}

static int by_stage(const void *a, const void *b)
{
    const char *s = ((const entry *)a)->t->name, *t = ((const entry *)b)->t->name;
    for (const char *p = s, *q = t; *p || *q;) {
        size_t m = strcspn(p, "."), n = strcspn(q, ".");
        int64_t x = part_rank(p, m), y = part_rank(q, n);
        if (x != y) return x < y ? -1 : 1;
        int words = strncmp(p, q, m < n ? m : n);
        if (!is_digit(*p) && (words != 0 || m != n)) return words != 0 ? words : m < n ? -1 : 1;
        p += m + (p[m] == '.'), q += n + (q[n] == '.');
    }
    return strcmp(s, t);
}

/* A new string; empty where the metadata does not say. */
static char *metadata_word(const safetensors *file, const char *name)
{
    json v = json_member(file->metadata, name);
    return v.text ? json_string(v) : text_of("%s", "");
}

/* Opens a file and reads the two words of its metadata that set limits. A broken floor would loosen or tighten them
 * silently: BAD_INPUT. */
static void source_open(source *s, const char *path)
{
    char reason[REASON];
    s->file = safetensors_open(path);
    s->text = metadata_word(s->file, "floor");
    if (*s->text && !json_check(s->text, strlen(s->text), false, &s->floor, reason))
        die(BAD_INPUT, "%s: metadata floor: %s; make the file again", path, reason);
    char *name = metadata_word(s->file, "case");
    s->tiny = strncmp(name, "tiny-", 5) == 0;
    free(name);
}

/* Appends a file. The array may move: nothing points into it before all are added. */
static void pack_add(pack *p, const char *path)
{
    source *grown = realloc(p->sources, ((size_t)p->nsources + 1) * sizeof *grown);
    if (!grown) die(SYSTEM_ERROR, "memory: %s: got none, expected some for its name; free some", path);
    p->sources = grown;
    p->sources[p->nsources] = (source){0};
    source_open(&p->sources[p->nsources++], path);
}

/* All tensors of a file, or of the .safetensors files of a folder, in execution order; no name twice. */
static pack pack_open(const char *path)
{
    pack p = {0};
    DIR *folder = opendir(path);
    if (!folder) pack_add(&p, path);
    for (const struct dirent *d; folder && (d = readdir(folder));) {
        const char *dot = strrchr(d->d_name, '.');
        if (!dot || strcmp(dot, ".safetensors") != 0) continue;
        char *name = text_of("%s/%s", path, d->d_name);
        pack_add(&p, name);
        free(name);
    }
    if (folder) closedir(folder);
    for (int f = 0; f < p.nsources; f++) p.count += p.sources[f].file->count;
    p.entries = allocate((size_t)p.count, sizeof *p.entries);
    entry *to = p.entries;
    for (int f = 0; f < p.nsources; f++)
        for (int64_t i = 0; i < p.sources[f].file->count; i++)
            *to++ = (entry){ &p.sources[f].file->tensors[i], &p.sources[f] };
    qsort(p.entries, (size_t)p.count, sizeof *p.entries, by_stage);
    for (int64_t i = 1; i < p.count; i++)
        if (strcmp(p.entries[i - 1].t->name, p.entries[i].t->name) == 0)
            die(BAD_INPUT, "%s: tensor %s: got it in two files, expected one; move one", path, p.entries[i].t->name);
    return p;
}

static void pack_close(pack *p)
{
    for (int f = 0; f < p->nsources; f++) {
        safetensors_close(p->sources[f].file);
        free(p->sources[f].text);
    }
    free(p->sources);
    free(p->entries);
}

/* The tensor of the same name, or NULL: the order of stages ends in that of the names, so it finds by name. */
static const st_tensor *pack_find(const pack *p, const st_tensor *like)
{
    const entry key = { like, NULL }, *found = bsearch(&key, p->entries, (size_t)p->count, sizeof key, by_stage);
    return found ? found->t : NULL;
}

/* One tensor of GOLDEN against its namesake. */
typedef struct {
    const st_tensor *golden, *mine;     /* mine NULL: missing */
    bool alike, exact, passed;          /* same shape and kind of type; compared element by element; within limits */
    double error, limit;                /* rel-L2; exact: the largest difference */
    double share, allowed;              /* share of elements that differ, and of those that may (exact) */
    double most; uint64_t at;           /* largest difference, or the first that is not finite, and where */
    uint64_t differing, nonfinite;      /* elements; values of MINE */
} verdict;

/* One pass over both, in double. Differences that are not numbers count as largest. */
static void measure(verdict *v)
{
    double golden2 = 0, mine2 = 0, difference2 = 0;
    for (uint64_t i = 0; i < v->golden->count; i++) {
        double a = element(v->golden, i), b = element(v->mine, i), d = fabs(a - b);
        golden2 += a * a, mine2 += b * b, difference2 += d * d;
        v->differing += !(a == b);      /* NaN differs from NaN: the reference holds none */
        v->nonfinite += isfinite(b) ? 0 : 1;
        if (!(d <= v->most) && !isnan(v->most)) v->most = d, v->at = i;
    }
    v->share = (double)v->differing / (double)(v->golden->count ? v->golden->count : 1);
    /* Where all of GOLDEN is 0 there is nothing to be relative to: the error is MINE's own length. */
    v->error = v->exact ? v->most : golden2 == 0 ? sqrt(mine2) : sqrt(difference2) / sqrt(golden2);
}

/* Limits, with their reasons. Double: sums in another order move a result by less than 1e-12, storing it as F32 by
 * 6e-8. Float: 8 times what plain float32 PyTorch differs from the truth (metadata floor), at least 2e-6 (another order
 * of sums), at most 6e-5 (beyond lie real bugs) unless a trained model amplifies. Frames are truncated, so that the
 * least difference may turn one over. */
static void set_limits(verdict *v, const source *from, bool fp64)
{
    static const char *const exact[] = { "timesteps", "noise", "mask" };
    const char *name = v->golden->name;
    json floor = json_member(from->floor, name);
    v->exact = is_integer(v->golden->type);
    for (int i = 0; i < 3; i++) v->exact |= strcmp(name, exact[i]) == 0;
    if (v->exact) {
        bool frames = !fp64 && strcmp(name, "frames") == 0;
        v->limit = frames ? 1 : 0;
        v->allowed = frames ? 1e-3 : 0;
    } else if (fp64) {
        v->limit = v->golden->type == F64 ? 1e-12 : 1e-7;
    } else {
        v->limit = json_kind(floor) == '0' ? fmax(8 * json_number(floor), 2e-6) : 2e-6;
        if (!from->tiny) v->limit = fmin(v->limit, 6e-5);
    }
}

/* Missing, another shape, or integers against floats: not alike, and not passed, whatever the values. The widths of
 * floats may differ: a double build compares with F32 truths. */
static verdict judge(const entry *e, const pack *mine, bool fp64)
{
    verdict v = { .golden = e->t, .mine = pack_find(mine, e->t) };
    const st_tensor *both[] = { v.golden, v.mine };
    for (int i = 0; i < (v.mine ? 2 : 1); i++)
        if (!is_integer(both[i]->type) && !is_computable(both[i]->type))
            die(BAD_INPUT, "tensor %s: got the type %s, expected integers or floats; convert it", e->t->name,
                dtype_name[both[i]->type]);
    set_limits(&v, e->from, fp64);
    v.alike = v.mine && v.golden->ndim == v.mine->ndim && is_integer(v.golden->type) == is_integer(v.mine->type) &&
              memcmp(v.golden->dim, v.mine->dim, (size_t)v.golden->ndim * sizeof *v.golden->dim) == 0;
    if (v.alike) measure(&v);
    v.passed = v.alike && v.error <= v.limit && (!v.exact || v.share <= v.allowed);
    return v;
}

/* One line about a tensor, without its end. */
static void report(const verdict *v)
{
    const st_tensor *g = v->golden, *m = v->mine;
    char *expected = list_text(g->ndim, g->dim), *got = m ? list_text(m->ndim, m->dim) : text_of("nothing");
    int64_t *index = allocate((size_t)g->ndim, sizeof *index), rest = (int64_t)v->at;
    for (int i = g->ndim - 1; i >= 0 && g->count > 0; i--) {
        index[i] = rest % g->dim[i];
        rest /= g->dim[i];
    }
    char *place = list_text(g->ndim, index);
    printf("%s: ", g->name);
    if (!v->alike) {
        printf("got %s %s, expected %s %s", m ? dtype_name[m->type] : "", got, dtype_name[g->type], expected);
    } else if (g->count == 0) {
        printf("%s, no elements", expected);
    } else {
        printf("%s %.3g, limit %.3g; ", v->exact ? "difference" : "rel-L2", v->error, v->limit);
        printf("of %s, %" PRIu64 " differ, %" PRIu64 " not finite; ", expected, v->differing, v->nonfinite);
        printf("most at %s: expected %.17g, got %.17g", place, element(g, v->at), element(m, v->at));
    }
    free(expected), free(got), free(place), free(index);
}

/* How much of its limit an error takes; exact tensors that pass take none. */
static double part_of_limit(const verdict *v) { return v->exact ? 0 : v->error / v->limit; }

/* Whether the limits are those of double arithmetic; by default those of this build. */
static bool class_read(const char *class)
{
    if (class && strcmp(class, "fp32") != 0 && strcmp(class, "fp64") != 0)
        die(BAD_INPUT, "class: got \"%s\", expected fp32 or fp64; give one of them", class);
    return class ? strcmp(class, "fp64") == 0 : sizeof(real) == 8;
}

/* Every tensor of GOLDEN must be in MINE and within its limit. Prints the first that is not, in execution order, or
 * the worst that is. NaN never passes: conditions are written "error <= limit". */
int compare(const char *golden, const char *mine, const char *class, bool verbose)
{
    bool fp64 = class_read(class);
    pack theirs = pack_open(golden), ours = pack_open(mine);
    verdict first = {0}, worst = {0};
    int64_t compared = 0, failed = 0, extra = 0;
    for (int64_t i = 0; i < theirs.count; i++) {
        verdict v = judge(&theirs.entries[i], &ours, fp64);
        compared += v.mine != NULL;
        if (!v.passed && failed++ == 0) first = v;      /* entries are in execution order */
        if (v.passed && (!worst.golden || part_of_limit(&v) > part_of_limit(&worst))) worst = v;
        if (verbose) printf("%s  ", v.passed ? "same   " : "DIFFERS"), report(&v), printf("\n");
    }
    for (int64_t i = 0; i < ours.count; i++) extra += pack_find(&theirs, ours.entries[i].t) == NULL;
    if (compared == 0) die(BAD_INPUT, "%s: got no tensor of %s, expected some; check both names", mine, golden);
    if (failed > 0) {
        printf("differs first: ");
        report(&first);
        printf("; %" PRId64 " of %" PRId64 " tensors differ", failed, theirs.count);
    } else {
        printf("same: %" PRId64 " tensors; worst %s: %s %.3g, limit %.3g", compared, worst.golden->name,
               worst.exact ? "difference" : "rel-L2", worst.error, worst.limit);
    }
    if (extra > 0) printf("; %" PRId64 " only in MINE", extra);
    printf("\n");
    pack_close(&theirs);
    pack_close(&ours);
    return failed > 0 ? DIFFERS : DONE;
}
