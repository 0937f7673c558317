/* io.c - everything that enters or leaves the program: errors, files, and the formats JSON, safetensors, PPM, Y4M.
 *
 *     config.json, *.index.json --json_check--> spans --config_*--> numbers and words
 *     *.safetensors --mmap, safetensors_parse--> tensors --bind--> weights (+ low-rank updates)
 *     P3 P5 P6 --ppm_parse--> [h][w][3] bytes --image_resize--> [h'][w'][3] bytes
 *     .y4m --y4m_header, y4m_parse--> [h][w][3] bytes a frame
 *     [h][w][3] bytes --y4m_planes--> .y4m, "-"; or P6 files, one a frame
 *     tensors --dump--> DIR/NAME.safetensors --compare--> exit code
 *
 * The sections, each beginning with its format:
 *     errors, memory, words       die, allocate, text_of; nearest_word
 *     files                       whole inputs, mapped inputs; outputs that appear whole or not at all
 *     JSON                        json_check, json_next, json_member, values
 *     configuration files         config_open, one getter a type
 *     safetensors                 safetensors_parse, open, find, write
 *     weights                     shards, bind, low-rank updates, what nothing asked for
 *     pictures in, resize         ppm_parse; y4m_header, y4m_parse; images_read; image_resize
 *     frames out                  output_open, output_frame, output_close; y4m_planes
 *     packs                       the tensors of files, in the order of computing
 *     compare                     limits; one pass over a pair; measures; the report; the judge
 *     stages                      given, dump: reading, writing and judging the tensors inside a run
 *
 * Invariants:
 *   - Parsers (json_check, safetensors_parse, ppm_parse, y4m_header, y4m_parse) are pure: bytes and a length in, a
 *     struct or a reason out. They read nothing past the length, do not recurse, and allocate at most a small multiple
 *     of the length.
 *   - Everybody else dies: "what: where: got, expected; what to do". The user's mistakes end with BAD_INPUT, the
 *     system's refusals (open for writing, write, mmap, memory) with SYSTEM_ERROR.
 *   - An output has a temporary name beside its target until it is whole. Those names, and
 *     the list of mapped files, are the only state that is not passed as an argument: die() and signal handlers must
 *     find them. Only the main thread opens files.
 *   - File contents are little-endian and unaligned: they are assembled from bytes, never cast.
 */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE     /* madvise */
#endif
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
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---------------------------------------------------------------- errors, memory, words
 *
 * A message is one line, in one form, whoever writes it:
 *
 *     ruyi: FILE: PLACE IN IT: got THIS, expected THAT; DO THIS
 *
 * Exit codes (ruyi.h): 0 done, 1 compare found a difference, 2 the input is at fault, 3 the system is. A script can
 * tell from the code alone whether another try can help. */

/* NEED (ruyi.h) for parsers, which have a `reason` to write to: refuses, returning false; who called the parser knows
 * the file's name and completes the message. */
#define EXPECT(condition, ...) \
    if (!(condition))          \
        return refuse(reason, __VA_ARGS__)

/* Runs CALL(format, args) with the arguments after a function's format; a macro, as va_start works only in the function
 * that has the three dots. */
#define WITH_ARGUMENTS(format, call) \
    va_list args;                    \
    va_start(args, format);          \
    call;                            \
    va_end(args)

/* A file on its way out. */
typedef struct writer {
    char *path;                 /* the name it will have */
    char *temporary;            /* the name it has until then */
    int fd;
    struct writer *volatile next;
} writer;

static writer *volatile unfinished;     /* every temporary that exists; volatile: signal handlers walk the list */

/* Takes away what is half written; targets are not touched. unlink is async-signal-safe and the list is whole between
 * any two stores, so handlers may call this. Nothing is freed and nothing is reported: the process ends anyway. */
void remove_temporaries(void)
{
    for (const writer *f = unfinished; f; f = f->next)
        unlink(f->temporary);
}

/* One line on standard error. Names out of foreign files may hold anything; control characters are replaced so that the
 * message stays one line. No allocation: memory may be what has run out. A message too long for the buffer shows that
 * by "...". */
PRINTF(1, 0) static void say(const char *format, va_list args)
{
    char line[4096];
    int length = vsnprintf(line, sizeof line, format, args);
    for (unsigned char *c = (unsigned char *)line; length > 0 && *c; c++)
        if (*c < ' ' || *c == 0x7f)
            *c = *c == '\n' || *c == '\t' || *c == '\r' ? ' ' : '?';
    fprintf(stderr, "ruyi: %s%s\n", line, length >= (int)sizeof line ? "..." : "");
}

/* Such a line, and going on: one of several findings. */
PRINTF(1, 2) static void complain(const char *format, ...) { WITH_ARGUMENTS(format, say(format, args)); }

/* Ends the process with that exit code and one line on standard error; does not return, and leaves no half-written
 * file. */
_Noreturn void die(int code, const char *format, ...)
{
    WITH_ARGUMENTS(format, say(format, args));
    remove_temporaries();
    exit(code);
}

/* A parser's answer, see EXPECT. A reason that does not fit ends in "...". */
PRINTF(2, 3) static bool refuse(char reason[REASON], const char *format, ...)
{
    WITH_ARGUMENTS(format, int length = vsnprintf(reason, REASON, format, args));
    if (length >= REASON)
        memcpy(reason + REASON - 4, "...", 4);
    return false;
}

/* Zeroed memory for count elements of size bytes; calloc checks their product. Never NULL, also for nothing, so that
 * an empty list needs no special case; SYSTEM_ERROR where memory has run out. */
void *allocate(size_t count, size_t size)
{
    void *block = calloc(count ? count : 1, size ? size : 1);
    MUST(block, "memory: got none, expected %zu x %zu bytes; ask for a smaller video", count, size);
    return block;
}

/* A block from allocate (or NULL) in a new size, count elements of size bytes; what is beyond the old one is not
 * zeroed. SYSTEM_ERROR where memory has run out or the product does not fit. */
static void *grow(void *block, size_t count, size_t size)
{
    void *grown = count <= SIZE_MAX / size ? realloc(block, count ? count * size : 1) : NULL;
    MUST(grown, "memory: got none, expected %zu x %zu bytes; free some", count, size);
    return grown;
}

/* vprintf at the end of a string: once to measure, once to write. Nothing is cut, whatever a file's names look like;
 * room doubles, so that many pieces cost no more than their length. */
PRINTF(2, 0) static void print_args(string *s, const char *format, va_list args)
{
    va_list again;
    va_copy(again, args);
    int length = vsnprintf(NULL, 0, format, again);
    va_end(again);
    MUST(length >= 0, "text: got more than 2 GB, expected less; shorten the names");
    if (s->length + (size_t)length >= s->room) {
        s->room = 2 * s->room + (size_t)length + 1;
        s->text = grow(s->text, s->room, 1);
    }
    s->length += (size_t)vsnprintf(s->text + s->length, (size_t)length + 1, format, args);
}

void print_to(string *s, const char *format, ...) { WITH_ARGUMENTS(format, print_args(s, format, args)); }

/* Declares `name`: the format and the arguments after it as a new string. */
#define FORMATTED(name, format) \
    string formatted = { 0 };     \
    WITH_ARGUMENTS(format, print_args(&formatted, format, args)); \
    char *name = formatted.text

/* printf into a new string of the size that it needs, to be freed by the caller. SYSTEM_ERROR where there is no
 * memory. */
char *text_of(const char *format, ...)
{
    FORMATTED(text, format);
    return text;
}

/* "[2, 3]", a new string: shapes and positions in messages, and in headers, where JSON has the same form. */
static char *list_text(int count, const int64_t *list)
{
    string s = { 0 };
    for (int i = 0; i < count; i++)
        print_to(&s, "%s%lld", i ? ", " : "[", ll(list[i]));
    print_to(&s, count ? "]" : "[]");
    return s.text;
}

/* product = a * b; false where that does not fit 64 bits, and product is of no use. Every product of numbers that a
 * file states goes through here before it is used. */
static bool multiply(uint64_t a, uint64_t b, uint64_t *product)
{
    *product = a * b;
    return b == 0 || a <= UINT64_MAX / b;
}

/* Edits that turn a into b: insertions, deletions, replacements, and exchanges of neighbours (the optimal string
 * alignment distance). A table has a cell for each pair of beginnings of a and b, the least of
 *
 *     above + 1, left + 1         a character of a or b has no partner
 *     above left (+ 1)            both have each other, equal or replaced
 *     two above, two left, + 1    the last two are exchanged
 */
static int64_t edit_distance(const char *a, const char *b)
{
    size_t m = strlen(a), row = strlen(b) + 1;
    int64_t *table = allocate(m + 1, row * sizeof *table), *cell = table;
    for (size_t i = 0; i <= m; i++)
        for (size_t j = 0; j < row; j++, cell++) {
            *cell = (int64_t)(i + j);
            if (i > 0 && j > 0)
                *cell = lesser(lesser(cell[-1], *(cell - row)) + 1, *(cell - row - 1) + (a[i - 1] != b[j - 1]));
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
                *cell = lesser(*cell, *(cell - 2 * row - 2) + 1);
        }
    int64_t distance = cell[-1];
    free(table);
    return distance;
}

/* The place of a word in a list, or -1. */
int place_of(const char *word, const char *const *words, int count)
{
    for (int i = 0; i < count; i++)
        if (!strcmp(word, words[i]))
            return i;
    return -1;
}

/* The word of least edit distance, for "did you mean"; NULL where the list is empty. Of equals one that goes on where
 * the given one ends, then the first, so that abbreviations find their word. The distance counts double so that the
 * bonus for a beginning decides among equals only. */
const char *nearest_word(const char *word, const char *const *words, int count)
{
    const char *nearest = NULL;
    int64_t least = INT64_MAX;
    for (int i = 0; i < count; i++) {
        int64_t distance = 2 * edit_distance(word, words[i]) - (strncmp(word, words[i], strlen(word)) == 0);
        nearest = distance < least ? words[i] : nearest;
        least = lesser(least, distance);
    }
    return nearest;
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
 * on the list. SIGKILL alone leaves a temporary name, which no later run trips over.
 *
 * What a call of the system may answer besides "done": EINTR, a signal came before anything was done, so it is made
 * again; fewer bytes than asked for, which is no error, so the rest is asked for next; anything else ends the run as a
 * rule, with the system's own words for it. */

/* After a call that reads a file. Its name and rights are the user's to mend: BAD_INPUT. Anything else that keeps a
 * file from being read (a broken disk, too many open files) is the system's: SYSTEM_ERROR. errno must still be the
 * call's. */
static void must_read(bool done, const char *path)
{
    bool name = errno == ENOENT || errno == ENOTDIR || errno == EISDIR || errno == EACCES || errno == ELOOP ||
                errno == ENAMETOOLONG;
    if (!done)
        die(name ? BAD_INPUT : SYSTEM_ERROR, "%s: reading: got \"%s\", expected a readable file; check the name",
            strcmp(path, "-") ? path : "standard input", strerror(errno));
}

/* After a call that writes. Whatever keeps an output from being written is the system's doing: exit code 3. */
static void must_write(bool done, const char *path)
{
    MUST(done, "%s: writing: got \"%s\", expected to write it; check folder, rights and free space",
         strcmp(path, "-") ? path : "standard output", strerror(errno));
}

/* Whether there is something of that name; dies where the system cannot say, which is not the same as no. */
bool file_exists(const char *path)
{
    bool there = access(path, F_OK) == 0;
    must_read(there || errno == ENOENT || errno == ENOTDIR, path);
    return there;
}

/* An open file, and what the system tells of it. Folders are refused here: open() itself takes them. */
static int input_open(const char *path, struct stat *about)
{
    int fd = -1;
    for (errno = EINTR; fd < 0 && errno == EINTR;)
        fd = open(path, O_RDONLY | O_CLOEXEC);
    must_read(fd >= 0 && fstat(fd, about) == 0, path);
    errno = EISDIR;
    must_read(!S_ISDIR(about->st_mode), path);
    return fd;
}

/* All bytes of a file, or of standard input for "-"; to be freed. More than `most` (JSON: 4 MB, streams of pictures:
 * 2 GB) are BAD_INPUT: a device may have no end. The size is not asked for in advance: pipes have none, and a file may
 * grow while it is read. Room doubles, so that every byte is copied less than twice on average. */
enum { CONFIG_BYTES = 1 << 22, STREAM_BYTES = INT32_MAX };
static unsigned char *read_all(const char *path, size_t most, size_t *size)
{
    struct stat about = { 0 };
    int fd = strcmp(path, "-") ? input_open(path, &about) : STDIN_FILENO;
    size_t room = 1 << 16;
    unsigned char *bytes = allocate(room, 1);
    *size = 0;
    for (ssize_t got = 1; got != 0;) {
        if (*size == room)
            bytes = grow(bytes, room *= 2, 1);
        got = read(fd, bytes + *size, (size_t)lesser((int64_t)(room - *size), 1 << 30));    /* some refuse 2 GB */
        must_read(got >= 0 || errno == EINTR, path);
        *size += (size_t)greater(got, 0);
        NEED(*size <= most, "%s: got more than %zu bytes, expected fewer; check the name", path, most);
    }
    if (fd != STDIN_FILENO)
        close(fd);
    return bytes;
}

/* A file that is mapped: its bytes have addresses as soon as it is open, and a page of them is read from the disk when
 * it is first used. So a checkpoint of 15 GB opens at once, takes memory that the system may take back at any time, and
 * is in memory once for all processes. The price: what goes wrong with the file later shows as a signal, not as a code
 * of a call (mapping_lost), and what is written to it meanwhile is seen (mappings_check). */
typedef struct mapping {
    char *path;
    void *bytes;
    struct stat about;          /* as it was when it was opened; st_size fits size_t */
    struct mapping *volatile next;
} mapping;

static mapping *volatile mappings;      /* all of them; volatile and global, as `unfinished`, for a signal handler */

/* Maps a regular file, for mapping_close to undo; an empty one is NULL. SYSTEM_ERROR where there are no addresses. The
 * map is private and read-only: a file that is removed, or replaced by rename, stays the old one here. */
static const unsigned char *mapping_open(const char *path, size_t *size)
{
    mapping *m = allocate(1, sizeof *m);
    int fd = input_open(path, &m->about);
    NEED(S_ISREG(m->about.st_mode), "%s: got a device or pipe, expected a file; save it first", path);
    *size = (size_t)m->about.st_size;
    m->bytes = *size ? mmap(NULL, *size, PROT_READ, MAP_PRIVATE, fd, 0) : NULL;     /* a length of 0 it refuses */
    MUST(m->bytes != MAP_FAILED && (intmax_t)*size == m->about.st_size, "%s: mapping: got no addresses, expected %jd "
         "bytes of them; lift the limit, or use 64 bits", path, (intmax_t)m->about.st_size);
    close(fd);
    m->path = text_of("%s", path), m->next = mappings;
    mappings = m;
    return m->bytes;
}

static void mapping_close(const unsigned char *bytes)
{
    mapping *volatile *link = &mappings, *m;
    while ((m = *link)->bytes != bytes)
        link = &m->next;
    *link = m->next;
    if (m->bytes)
        munmap(m->bytes, (size_t)m->about.st_size);
    free(m->path), free(m);
}

/* Dies where the file of a map has been written to since it was opened, as what was computed came from both:
 * SYSTEM_ERROR. One that has been removed or replaced is still there for who mapped it. */
void mappings_check(void)
{
    struct stat now;
    for (const mapping *m = mappings; m; m = m->next) {
        bool same = stat(m->path, &now) == 0 && now.st_dev == m->about.st_dev && now.st_ino == m->about.st_ino;
        MUST(!same || (now.st_size == m->about.st_size && now.st_mtime == m->about.st_mtime),
             "%s: got a file that was written to during the run, expected the same; run again", m->path);
    }
}

/* SIGBUS: a page that is not there any more, because its file was cut short or its disk failed. No library call is
 * interrupted by it but memcpy, so die() is safe; of several threads that meet it the first one speaks. */
_Noreturn void mapping_lost(const void *address)
{
    static atomic_flag said = ATOMIC_FLAG_INIT;
    const mapping *m = mappings;
    while (atomic_flag_test_and_set(&said))
        pause();
    while (m && (uintptr_t)address - (uintptr_t)m->bytes >= (size_t)m->about.st_size)
        m = m->next;
    die(SYSTEM_ERROR, "%s: reading: got a missing page, expected the file to stay whole; copy it again, and run again",
        m ? m->path : "memory");
}

/* Between the two no signal handler runs: the list of temporaries and the disk are of one mind whenever it does. A
 * signal that comes meanwhile is delivered at the release. Returns the mask to go back to. */
static sigset_t hold_signals(void)
{
    sigset_t all, before;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, &before);
    return before;
}

static void release_signals(sigset_t before) { sigprocmask(SIG_SETMASK, &before, NULL); }

/* The folder that a file is in, or will be: "clips/." of clips/a.y4m, "." of a.y4m, a new string. "FOLDER/." is only
 * there where FOLDER is a folder. */
char *folder_of(const char *path)
{
    const char *slash = strrchr(path, '/');
    return text_of("%.*s.", (int)(slash ? slash + 1 - path : 0), path);
}

/* Dies with SYSTEM_ERROR where the folder of a name is not there or takes no files, or something else than a file has
 * the name: a rename over a device would take it away. Creates nothing; what changes afterwards is found when the file
 * is opened. */
void output_check(const char *path)
{
    struct stat there;
    char *folder = folder_of(path);
    must_write(access(folder, W_OK | X_OK) == 0, path);
    MUST(stat(path, &there) != 0 || S_ISREG(there.st_mode),
         "%s: writing: got a folder or device, expected a file; choose another name", path);
    free(folder);
}

/* Starts an output, or dies with SYSTEM_ERROR. Its temporary name tells processes apart by their id, and outputs of one
 * process (or of a process in another namespace, or a dead one's leavings) by a number: O_EXCL takes no name that
 * exists, not even a link. Rights are 0666 less the umask, as for any program's files. A process that dies of the
 * failed open does so with signals held, which is no harm: its exit needs none. */
static writer *writer_open(const char *path)
{
    output_check(path);
    writer *f = allocate(1, sizeof *f);
    *f = (writer){ .path = text_of("%s", path), .next = unfinished };
    sigset_t before = hold_signals();
    for (int number = 0; number == 0 || (f->fd < 0 && (errno == EEXIST || errno == EINTR)); number++) {
        free(f->temporary);
        f->temporary = text_of("%s.tmp.%ld.%d", path, (long)getpid(), number);
        f->fd = open(f->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    }
    must_write(f->fd >= 0, path);
    unfinished = f;
    release_signals(before);
    return f;
}

/* All bytes into an open file, or SYSTEM_ERROR. A short write is no error: the rest follows in the next turn, and a
 * full disk then says so. path: for the message only. A pipe whose reader has gone dies here, too: EPIPE, since main
 * ignores SIGPIPE. */
static void put(int fd, const char *path, const void *data, size_t size)
{
    for (const unsigned char *at = data; size > 0;) {
        ssize_t done = write(fd, at, size < 1 << 30 ? size : 1 << 30);  /* some systems refuse more than 2 GB */
        must_write(done >= 0 || errno == EINTR, path);
        at += greater(done, 0);
        size -= (size_t)greater(done, 0);
    }
}

/* Closes the file under its temporary name. sync: on the disk first, so that no crash can leave the final name on an
 * empty file. EINVAL: a file system without it. close() may be the first to tell of a full disk (NFS), so it is
 * asked; one that was interrupted has closed (and may not be repeated). */
static void writer_finish(writer *f, bool sync)
{
    int failed = sync ? fsync(f->fd) : 0;
    while (failed && errno == EINTR)
        failed = fsync(f->fd);
    must_write((!failed || errno == EINVAL) && (close(f->fd) == 0 || errno == EINTR), f->path);
}

/* The target appears, whole, in one step: POSIX has rename replace an older file atomically. Forgetting the temporary
 * comes after it: a signal between the two unlinks a name that is no longer there. Frees the writer. */
static void writer_rename(writer *f)
{
    must_write(rename(f->temporary, f->path) == 0, f->path);
    writer *volatile *link = &unfinished;
    while (*link != f)
        link = &(*link)->next;
    *link = f->next;
    free(f->path), free(f->temporary), free(f);
}

/* The name of that number in a series: of a name with one %d or %0Nd, N of one or two digits. A new string; NULL where
 * there is another % or none. The field is understood here and never reaches printf: a format from the command line
 * could read and write memory.
 *
 *     frame-%04d.ppm, 7    frame-0007.ppm                %d.ppm, 12    12.ppm
 *     none of it           %4d (blanks in a name)        %s, %ld, %%d, %d%d, %d%%
 */
static char *series_name(const char *path, int64_t number)
{
    const char *field = strchr(path, '%');
    size_t digits = field ? strspn(field + 1, "0123456789") : 0;
    bool width = digits > 0 && digits <= 3 && field[1] == '0' && strspn(field + 1, "0") < digits;
    if (!field || (digits > 0 && !width) || field[1 + digits] != 'd' || strchr(field + 1, '%'))
        return NULL;
    return text_of("%.*s%0*lld%s", (int)(field - path), path, atoi(field + 1), ll(number), field + digits + 2);
}

/* ---------------------------------------------------------------- JSON
 *
 * The grammar is RFC 8259's, all of it and nothing beyond it but one word on request:
 *
 *     text    space value space                       space   any of ' ' \t \n \r, or nothing
 *     value   object | list | string | number | true | false | null  (| -Infinity, as Python writes it)
 *     object  { space } | { member , member ... }     member  space string space : space value space
 *     list    [ space ] | [ item , item ... ]         item    space value space
 *     string  " UTF-8 from U+0020 on without " and \ , or escapes: \" \\ \/ \b \f \n \r \t \uXXXX "
 *     number  [-] 0 | [1-9] digits  [ . digits ]  [ e or E [+-] digits ]
 *
 * Refused, though other readers take some of it: a byte-order mark, comments, a comma after the last member, NaN,
 * Infinity, leading zeros and plus signs, half a surrogate pair, anything after the value.
 *
 * Text is checked once, by a scanner that keeps one byte per open bracket; afterwards values are spans of that text and
 * navigation trusts it. No tree is built: a header of 100 MB costs its own size and nothing more. Objects are searched
 * from the front, which is quadratic for who asks for every member by name: such callers walk with json_next. */

/* Depth of any text, and size of the largest, a safetensors header. Every span's length is an int, as %.*s wants it. */
enum { JSON_DEPTH = 128, JSON_BYTES = 100000000 };

/* A place in foreign text; pictures are scanned by it, too. */
typedef struct {
    const char *start, *at, *end;       /* for positions in reasons; the next byte; one past the last */
    bool minus_infinity;                /* -Infinity is a number */
    char *reason;                       /* [REASON] */
} scan;

/* The next byte, 0 to 255, or -1 at the end, which therefore matches nothing and needs no test of its own. */
static int peek(const scan *s) { return s->at < s->end ? (unsigned char)*s->at : -1; }

/* Refuses at the current byte, counted from 0. */
static bool fault(const scan *s, const char *expected)
{
    return refuse(s->reason, "byte %zu: expected %s", (size_t)(s->at - s->start), expected);
}

/* The four kinds of white space and the digits of JSON and PPM; <ctype.h> would depend on the locale. */
static bool is_space(int c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }
static bool is_digit(int c) { return c >= '0' && c <= '9'; }

/* Steps over the next byte where it is one of a set, and says whether it was. A NUL is in no set: strchr would find the
 * one that ends the string. */
static bool scan_one(scan *s, const char *set)
{
    bool found = peek(s) > 0 && strchr(set, peek(s));
    s->at += found;
    return found;
}

/* Steps over all bytes of a kind that are next, and says how many there were. */
static size_t skip(scan *s, bool (*kind)(int))
{
    const char *start = s->at;
    while (kind(peek(s)))
        s->at++;
    return (size_t)(s->at - start);
}

/* Length of the well-formed UTF-8 sequence at p (RFC 3629), or 0; left: bytes from p on, at least 1. The table is
 *
 *     00-7F                               1 byte
 *     C2-DF  80-BF                        2 bytes     (C0 and C1 could only be overlong)
 *     E0     A0-BF  80-BF                 3 bytes     (below A0: overlong)
 *     E1-EF  80-BF  80-BF                 3 bytes     (ED: second byte to 9F, beyond lie surrogates)
 *     F0     90-BF  80-BF  80-BF          4 bytes     (below 90: overlong)
 *     F1-F4  80-BF  80-BF  80-BF          4 bytes     (F4: second byte to 8F, beyond lies nothing: U+10FFFF)
 *
 * so the first byte tells the length and the range of the second, and the rest are plain continuations. */
static size_t utf8_length(const unsigned char *p, size_t left)
{
    size_t length = p[0] < 0x80 ? 1 : p[0] < 0xC2 || p[0] > 0xF4 ? 0 : p[0] < 0xE0 ? 2 : p[0] < 0xF0 ? 3 : 4;
    unsigned least = p[0] == 0xE0 ? 0xA0 : p[0] == 0xF0 ? 0x90 : 0x80;
    unsigned most = p[0] == 0xED ? 0x9F : p[0] == 0xF4 ? 0x8F : 0xBF;
    bool valid = length <= left && (length < 2 || (p[1] >= least && p[1] <= most));
    for (size_t i = 2; valid && i < length; i++)
        valid = (p[i] & 0xC0) == 0x80;
    return valid ? length : 0;
}

/* Whole texts are checked before they are scanned, so that the scanner may look at bytes: in valid UTF-8 the bytes
 * below 0x80 are characters, never parts of others. */
static bool utf8_check(const char *text, size_t size, char reason[REASON])
{
    for (size_t at = 0, length; at < size; at += length) {
        length = utf8_length((const unsigned char *)text + at, size - at);
        EXPECT(length > 0, "byte %zu: expected UTF-8", at);
    }
    return true;
}

/* The value of four hexadecimal digits, which are stepped over; -1 where they are not. */
static int32_t hex4(const char **p, const char *end)
{
    char four[5] = { 0 };
    memcpy(four, *p, (size_t)lesser(end - *p, 4));
    bool digits = strspn(four, "0123456789abcdefABCDEF") == 4;
    *p += digits ? 4 : 0;
    return digits ? (int32_t)strtol(four, NULL, 16) : -1;
}

/* The code point of \uXXXX, from the digits on, which are stepped over. Those from U+10000 on are written as a pair of
 * surrogates, high (D800-DBFF) then low (DC00-DFFF): 20 bits. -1: no digits. -2: half a pair, which is no character and
 * has no UTF-8. */
static int32_t escaped_code(const char **p, const char *end)
{
    int32_t high = hex4(p, end);
    if (high < 0xD800 || high > 0xDFFF)
        return high;
    const char *next = end - *p >= 6 && memcmp(*p, "\\u", 2) == 0 ? *p + 2 : end;
    int32_t low = hex4(&next, end);
    if (high > 0xDBFF || low < 0xDC00 || low > 0xDFFF)
        return -2;
    *p = next;
    return 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00);
}

/* What follows a backslash. */
static bool scan_escape(scan *s)
{
    bool known = scan_one(s, "\"\\/bfnrt");
    if (!known && !scan_one(s, "u"))
        return fault(s, "one of \" \\ / b f n r t u after a backslash");
    int32_t code = known ? 0 : escaped_code(&s->at, s->end);
    return code >= 0 || fault(s, code == -1 ? "four hexadecimal digits after \\u" : "surrogates in pairs");
}

/* From quote to quote. Bytes from 0x80 on are part of checked UTF-8 and pass; the end of the text counts as a control
 * character here and is refused with them. */
static bool scan_string(scan *s)
{
    bool valid = scan_one(s, "\"") || fault(s, "a string");
    while (valid && !scan_one(s, "\""))
        valid = (peek(s) >= ' ' || fault(s, "a closing quote, and control characters escaped")) &&
                (*s->at++ != '\\' || scan_escape(s));
    return valid;
}

/* One digit or more; their value is read later, where it is known what the number is for. */
static bool scan_digits(scan *s) { return skip(s, is_digit) > 0 || fault(s, "a digit"); }

/* [-] 0 | 1-9... [. digits] [e [+-] digits]. After a leading 0 comes no digit: "01" ends at the 0, and the 1 is refused
 * by whoever expects a delimiter. */
static bool scan_number(scan *s)
{
    scan_one(s, "-");
    bool valid = (scan_one(s, "0") || scan_digits(s)) && (!scan_one(s, ".") || scan_digits(s));
    bool exponent = valid && scan_one(s, "eE");
    scan_one(s, exponent ? "+-" : "");
    return exponent ? scan_digits(s) : valid;
}

/* A string, a word or a number. Letters after a word are left over, and refused by whoever expects a delimiter. Words
 * are tried before numbers: -Infinity begins like one. */
static bool scan_scalar(scan *s)
{
    static const char *const words[] = { "true", "false", "null", "-Infinity" };
    for (int i = 0; i < (s->minus_infinity ? 4 : 3); i++) {
        size_t length = strlen(words[i]);
        if ((size_t)(s->end - s->at) >= length && memcmp(s->at, words[i], length) == 0) {
            s->at += length;
            return true;
        }
    }
    if (peek(s) == '"')
        return scan_string(s);
    return peek(s) == '-' || is_digit(peek(s)) ? scan_number(s) : fault(s, "a value");
}

/* One value with all that it contains. Each turn reads a member's beginning (in an object its name and colon, too),
 * then closes what ends after it. The brackets to come are the whole memory of the nesting:
 *
 *     [ 1, { "a": [] } ]      closing: ]   ]   ]}   ]}]   ]}   ]   nothing: done
 *
 * A loop instead of recursion, so that a hostile file cannot choose how much stack is used. In ASCII each closing
 * bracket is its opening one + 2. */
static bool scan_value(scan *s)
{
    char closing[JSON_DEPTH];
    int depth = 0;
    do {
        skip(s, is_space);
        if (depth > 0 && closing[depth - 1] == '}') {
            bool named = scan_string(s);
            skip(s, is_space);
            if (!named || !(scan_one(s, ":") || fault(s, "a colon")))
                return false;
            skip(s, is_space);
        }
        if (peek(s) == '{' || peek(s) == '[') {
            if (depth == JSON_DEPTH)
                return fault(s, "at most 128 levels");
            closing[depth++] = (char)(*s->at++ + 2);
            skip(s, is_space);
            if (peek(s) != closing[depth - 1])
                continue;               /* its first member; an empty one closes below */
        } else if (!scan_scalar(s)) {
            return false;
        }
        for (; depth > 0; depth--, s->at++) {
            skip(s, is_space);
            if (peek(s) == ',')
                break;
            if (peek(s) != closing[depth - 1])
                return fault(s, closing[depth - 1] == '}' ? ", or }" : ", or ]");
        }
        s->at += depth > 0;             /* the comma */
    } while (depth > 0);
    return true;
}

/* Accepts exactly RFC 8259 in UTF-8 without a byte-order mark, at most 128 levels deep; size must be below 2^31, to
 * which every caller bounds it. minus_infinity: takes Python's -Infinity for a number. true: root is the value's span,
 * without the white space around it, and lives as long as the text. false: root is absent, and the reason gives the
 * byte and what was expected there. Allocates nothing. */
bool json_check(const char *text, size_t size, bool minus_infinity, json *root, char reason[REASON])
{
    scan s = { text, text, text + size, minus_infinity, reason };
    skip(&s, is_space);
    const char *begin = s.at;
    bool valid = utf8_check(text, size, reason) && scan_value(&s);
    json value = { begin, s.at };
    skip(&s, is_space);
    valid = valid && (s.at == s.end || fault(&s, "nothing after the value"));
    *root = valid ? value : (json){ 0 };  /* spans of refused text must not be walked */
    return valid;
}

/* One of { [ " 0 t f n, or 0 for an absent value. The first byte tells the kind; all numbers (and -Infinity) are
 * '0'. */
char json_kind(json value)
{
    char first = (char)(value.text ? *value.text : 0);
    return (char)(first == '-' || is_digit(first) ? '0' : first);
}

/* The span of the value that follows at p in checked text, of which the scanner refuses nothing; empty where the
 * bracket follows that ends at `end`. */
static json next_span(const char *p, const char *end)
{
    while (is_space(*p) || *p == ',' || *p == ':')
        p++;
    scan s = { p, p, end, true, NULL };
    if (p < end - 1)
        scan_value(&s);
    return (json){ p, s.at };
}

/* Steps through an object or list: the next member's name and value, in the text's order. false after the last one, and
 * for anything but containers. *cursor starts as { 0 } and remembers where the value before ended. name is the string
 * with its quotes, absent in lists; who does not want it gives NULL. Names may repeat: RFC 8259 leaves that open. */
bool json_next(json container, json *cursor, json *name, json *value)
{
    bool object = json_kind(container) == '{';
    if (!object && json_kind(container) != '[')
        return false;
    json next = next_span(cursor->text ? cursor->text : container.text + 1, container.end);
    if (name)
        *name = object ? next : (json){ 0 };
    *value = object ? next_span(next.end, container.end) : next;
    cursor->text = value->end;
    return value->text < value->end;
}

/* Appends a code point, 1 to 4 bytes; 0 as two (see json_string). Returns the place after it. The first byte's high
 * bits count the bytes, the others carry six bits each under the mark 10. */
static char *utf8_put(char *to, uint32_t code)
{
    static const uint32_t lead[] = { 0, 0xC0, 0xE0, 0xF0 };
    int more = code > 0 && code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    *to++ = (char)(lead[more] | code >> (6 * more));
    while (more-- > 0)
        *to++ = (char)(0x80 | (code >> (6 * more) & 0x3F));
    return to;
}

/* A string's value in UTF-8, escapes decoded, as a new C string; value must be a string of checked text. \u0000 becomes
 * the bytes C0 80, which no checked text contains: the C string stays whole, and names that differ stay different.
 * Decoding never lengthens: six characters \uXXXX give at most three bytes, a pair of them four. So the span's own
 * length, with the room of its two quotes, is enough. */
char *json_string(json value)
{
    static const char escape[] = "\"\\/bfnrt", meaning[] = "\"\\/\b\f\n\r\t";
    char *text = allocate((size_t)(value.end - value.text), 1), *to = text;
    for (const char *p = value.text + 1; p < value.end - 1;) {
        if (*p != '\\') {
            *to++ = *p++;
            continue;
        }
        const char *known = strchr(escape, p[1]);
        p += 2;
        to = utf8_put(to, (uint32_t)(known ? meaning[known - escape] : escaped_code(&p, value.end)));
    }
    return text;
}

/* Whether a value is that string, decoded; absent and other values are not. */
static bool json_is(json value, const char *word)
{
    char *text = json_kind(value) == '"' ? json_string(value) : NULL;
    bool same = text && strcmp(text, word) == 0;
    free(text);
    return same;
}

/* The value of the last member of that name, which is the one that Python's json keeps; absent where there is none, and
 * for anything but objects, so that lookups can be chained. Names are compared after decoding: "\u0061" is "a". */
json json_member(json object, const char *name)
{
    json found = { 0 };
    for (json at = { 0 }, key, value; json_next(object, &at, &key, &value);)
        if (json_is(key, name))
            found = value;
    return found;
}

/* value must be a number; it is rounded once, as strtod does (the program stays in the "C" locale, so the point is a
 * point). What is too large becomes infinite, and so does -Infinity: callers that want it finite must ask. */
double json_number(json value)
{
    char *text = text_of("%.*s", (int)(value.end - value.text), value.text);
    double number = strtod(text, NULL);
    free(text);
    return number;
}

/* Plain decimal digits that fit 64 bits: sizes and offsets, which a double would round from 2^53 on. false for anything
 * else; the grammar has already refused leading zeros. value must be a member: what ends a number for strtoull is the
 * delimiter after it. A minus is refused here: strtoull would take it, and give 2^64 less the number. */
static bool json_natural(json value, uint64_t *number)
{
    char *end;
    errno = 0;
    *number = strtoull(value.text, &end, 10);
    return is_digit(*value.text) && end == value.end && errno == 0;
}

/* The same with an optional minus, up to 2^63 - 1 either way: 24.0 and 1e3 are not integers, as they are none in
 * Python, whose json makes floats of them. */
static bool json_integer(json value, int64_t *number)
{
    char *end;
    errno = 0;
    *number = strtoll(value.text, &end, 10);
    return end == value.end && errno == 0 && *number > INT64_MIN;
}

/* ---------------------------------------------------------------- configuration files
 *
 * One getter a type. All take the field's name, so that the line which reads a field is found by searching for it, and
 * the value for an absent field, which is the public class's default. A field that is there must be right: wrong types
 * and impossible values end with BAD_INPUT, naming file, field, value and what was expected. Fields that no getter asks
 * for are ignored: published files carry many; `info` lists them, as a misspelt field is one of them.
 *
 *     { "n_query": 64, "eps": 1e-6, "center": true, "act_fn": null, "ch_mult": [1, 2], "types": "('A', 'B')" }
 *
 *     config_int(c, "n_query", REQUIRED, 1, 4096)     64      config_bool(c, "center", false)        true
 *     config_real(c, "eps", 1e-5)                     1e-6    config_ints(c, "ch_mult", list, 8)     2: 1, 2
 *     config_word(c, "act_fn", "silu")                "silu"  config_words(c, "types", names, 8)     2: A, B
 */

/* FOLDER/NAME, kept for the whole run: values point into its text. Files are those that diffusers' save_config and
 * transformers' save_pretrained write: config.json, scheduler_config.json, preprocessor_config.json, and the index of
 * shards. A missing file and anything but one object (a list, a bare string) are BAD_INPUT, as is what json_check
 * refuses. -Infinity is taken: diffusers' own scheduler configurations hold it (lambda_min_clipped). */
config config_open(const char *folder, const char *name)
{
    config c = { .path = text_of("%s/%s", folder, name), .read = allocate(1, sizeof *c.read) };
    char reason[REASON] = "got another value, expected an object";
    size_t size;
    c.text = (char *)read_all(c.path, CONFIG_BYTES, &size);
    NEED(json_check(c.text, size, true, &c.root, reason) && json_kind(c.root) == '{',
         "%s: JSON: %s; mend the file or copy it again", c.path, reason);
    return c;
}

/* The counterpart of config_open; values read before stay valid, spans of text do not. */
void config_close(config c)
{
    free(c.read->text), free(c.read), free(c.text), free(c.path);
}

/* Dies with BAD_INPUT and "PATH: FIELD: got VALUE, " and then the caller's words: "expected ...; what to do". The value
 * is shown as it stands in the file, its first 80 bytes. */
_Noreturn void config_refuse(config c, const char *field, const char *format, ...)
{
    FORMATTED(words, format);
    json v = json_member(c.root, field);
    NEED(v.text, "%s: %s: got nothing, %s", c.path, field, words);
    int length = (int)(v.end - v.text);
    die(BAD_INPUT, "%s: %s: got %.*s%s, %s", c.path, field, (int)lesser(length, 80), v.text, length > 80 ? "..." : "",
        words);
}

/* A field as JSON, for what the getters below do not cover; absent where the file has none, or null, which is how
 * Python writes a field that is not set. Asking marks the field as read. */
json config_member(config c, const char *field)
{
    json v = json_member(c.root, field);
    print_to(c.read, "%s%c", field, 0);
    return json_kind(v) != 'n' ? v : (json){ 0 };
}

/* "  not read: FIELD FIELD ... (PATH)" on standard output, or nothing. Whoever edits a field and sees no change finds
 * it here. Fields that hold null are not worth a word. */
void config_print_unread(config c)
{
    string line = { 0 };
    for (json at = { 0 }, name, value; json_next(c.root, &at, &name, &value);) {
        bool known = json_kind(value) == 'n';
        for (size_t i = 0; i < c.read->length && !known; i += strlen(c.read->text + i) + 1)
            known = json_is(name, c.read->text + i);
        if (!known)
            print_to(&line, " %.*s", (int)(name.end - name.text - 2), name.text + 1);
    }
    if (line.text)
        printf("  not read:%s (%s)\n", line.text, c.path);
    free(line.text);
}

/* An integer from least to most, or `otherwise` where the field is absent; REQUIRED: absence is BAD_INPUT, too. The
 * bounds hold for what the file says; the default is the caller's. */
int64_t config_int(config c, const char *field, int64_t otherwise, int64_t least, int64_t most)
{
    json v = config_member(c, field);
    int64_t number = otherwise;
    bool valid = v.text ? json_integer(v, &number) && number >= least && number <= most : otherwise != REQUIRED;
    CONFIG_NEED(valid, c, field, "expected an integer from %lld to %lld; mend the file", ll(least), ll(most));
    return number;
}

/* A finite number, or `otherwise` where the field is absent; NAN: it must be there. Integers are numbers, too;
 * overflows (1e999) and -Infinity are not what any field means, and BAD_INPUT. */
double config_real(config c, const char *field, double otherwise)
{
    json v = config_member(c, field);
    double number = !v.text ? otherwise : json_kind(v) == '0' ? json_number(v) : NAN;
    CONFIG_NEED(isfinite(number), c, field, "expected a finite number; mend the file");
    return number;
}

/* true or false, or `otherwise` where the field is absent. 0 and 1 have another type: BAD_INPUT. There is no required
 * switch. */
bool config_bool(config c, const char *field, bool otherwise)
{
    char kind = json_kind(config_member(c, field));
    CONFIG_NEED(!kind || kind == 't' || kind == 'f', c, field, "expected true or false; mend the file");
    return kind ? kind == 't' : otherwise;
}

/* A new string, decoded, or a copy of `otherwise` where the field is absent; NULL: it must be there. Whether the word
 * is one that the program knows is for the caller to say. */
char *config_word(config c, const char *field, const char *otherwise)
{
    json v = config_member(c, field);
    CONFIG_NEED(v.text ? json_kind(v) == '"' : otherwise != NULL, c, field, "expected a string; mend the file");
    return v.text ? json_string(v) : text_of("%s", otherwise);
}

/* The place of a field's word in a list; dies naming the nearest. */
int config_choice(config c, const char *field, const char *otherwise, const char *const *words, int count)
{
    char *word = config_word(c, field, otherwise);
    int place = place_of(word, words, count);
    CONFIG_NEED(place >= 0, c, field, "which is not supported; %s is near", nearest_word(word, words, count));
    free(word);
    return place;
}

/* Integers into list, which has room for `most`; returns their count, or -1 where the field is absent. An empty list is
 * 0 elements, which is not the same. A longer list or other elements are BAD_INPUT. */
int config_ints(config c, const char *field, int64_t *list, int most)
{
    json v = config_member(c, field);
    int count = v.text ? 0 : -1;
    CONFIG_NEED(!v.text || json_kind(v) == '[', c, field, "expected a list of integers; mend the file");
    for (json at = { 0 }, item; json_next(v, &at, NULL, &item); count++)
        CONFIG_NEED(count < most && json_integer(item, &list[count]), c, field,
                    "expected a list of integers, at most %d; mend the file", most);
    return count;
}

/* Exactly `count` numbers, to be freed; NULL: the field is absent. Anything else is BAD_INPUT, with what they are. */
double *config_reals(config c, const char *field, int64_t count, const char *what)
{
    json v = config_member(c, field), at = { 0 }, item;
    double *list = v.text ? allocate((size_t)count, sizeof *list) : NULL;
    bool good = json_kind(v) == '[';
    int64_t n = 0;
    for (; good && json_next(v, &at, NULL, &item); n++) {
        good = n < count && json_kind(item) == '0';
        if (good)
            list[n] = json_number(item);
    }
    CONFIG_NEED(!v.text || (good && n == count), c, field, "expected a list of %lld numbers, %s", ll(count), what);
    return list;
}

/* "('a', 'b')" or "['a', 'b']", as Python prints them; a comma may follow the last name, as in the tuple "('a',)".
 * Quotes of either kind, no escapes: the names are those of classes. Returns the count; -1: something else, or more
 * than `most` (names before the fault have been copied; the caller dies). */
static int python_words(const char *text, char **list, int most)
{
    const char *p = text + strspn(text, " ");
    char close = *p == '(' ? ')' : ']';
    int count = 0;
    if (*p != '(' && *p != '[')
        return -1;
    for (p++; p += strspn(p, " "), *p != close;) {
        const char *end = *p == '\'' || *p == '"' ? strchr(p + 1, *p) : NULL;
        const char *next = end ? end + 1 + strspn(end + 1, " ") : "";
        if (count == most || (*next != ',' && *next != close))
            return -1;
        list[count++] = text_of("%.*s", (int)(end - p - 1), p + 1);
        p = next + (*next == ',');
    }
    return p[1 + strspn(p + 1, " ")] == 0 ? count : -1;
}

/* Names into list, which has room for `most`; returns their count, or -1 where the field is absent. The public
 * configurations hold lists of block types as JSON lists or, saved by hand, as the text of a tuple. The strings in list
 * are new. Anything else, or more names, is BAD_INPUT. */
int config_words(config c, const char *field, char **list, int most)
{
    json v = config_member(c, field);
    char *text = json_kind(v) == '"' ? json_string(v) : NULL;
    int count = text ? python_words(text, list, most) : json_kind(v) == '[' ? 0 : -1;
    for (json at = { 0 }, item; count >= 0 && json_next(v, &at, NULL, &item);)        /* a string has no members */
        if (count < most && json_kind(item) == '"')
            list[count++] = json_string(item);
        else
            count = -1;
    CONFIG_NEED(!v.text || count >= 0, c, field, "expected a list of at most %d names; mend the file", most);
    free(text);
    return count;
}

/* ---------------------------------------------------------------- safetensors
 *
 *     byte 0      8                                                   8 + N                              end
 *     +-----------+---------------------------------------------------+--------+---------+------------------+
 *     | N, 64-bit | {"__metadata__":{"format":"pt"},                  | data   | data    | data             |
 *     | little-   |  "a":{"dtype":"F32","shape":[2,3],                | of a   | of b    | of c             |
 *     | endian    |       "data_offsets":[0,24]}, "b":{...}, ...}     |        |         |                  |
 *     +-----------+---------------------------------------------------+--------+---------+------------------+
 *                                                           offsets:  0        24        ...
 *
 * Data are row-major, little-endian, without gaps and without any promise of alignment. A file is taken if it keeps
 * these rules, and otherwise refused with the number of one that it breaks:
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
 *
 * Files come from strangers, hence so many rules. 2, 9 and 10 keep sizes from being believed before they are checked,
 * and products from wrapping to small ones; 12 and 14 leave no byte that no tensor owns, in which something else could
 * travel, and none that two own. S1: readers that keep the first and readers that keep the last of two would compute
 * with different numbers from one file. S2: int64_t holds a dimension, also times the size of an element. */

/* The format's own words, and bits an element (tensor.c, widening, has their meaning). Kernels do not read the last:
 * FNUZ, F8 with another bias, without -0 and infinities; E8M0, an exponent alone, for scales of blocks; F4 and F6, of
 * which several elements share bytes. */
const char *const dtype_name[DTYPES] = {
    "BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "F16", "BF16", "F32", "F64", "C64",
    "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2",
};
const int dtype_bits[DTYPES] = { 8, 8, 8, 16, 16, 32, 32, 64, 64, 16, 16, 32, 64, 64, 8, 8, 8, 8, 8, 4, 6, 6 };

/* Two classes of types: integers (BOOL among them), which are compared exactly, and floats that kernels can widen. What
 * is in neither, complex and the smallest floats, can be listed, but not used. Both lean on the order of the enum. */
static bool is_integer(dtype t) { return t <= U64; }
static bool is_computable(dtype t) { return (t >= F16 && t <= F64) || t == F8_E5M2 || t == F8_E4M3; }
static bool is_number(dtype t) { return is_integer(t) || is_computable(t); }

/* 1 to 8 bytes from any address, on any host: assembled, since a cast would need alignment and the file's byte
 * order. */
static uint64_t little_endian(const unsigned char *p, int bytes)
{
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++)
        value |= (uint64_t)p[i] << (8 * i);
    return value;
}

/* How many elements a list or object has, so that memory for them is allocated once; 0 for anything else. */
static int64_t members(json container)
{
    int64_t count = 0;
    for (json at = { 0 }, value; json_next(container, &at, NULL, &value);)
        count++;
    return count;
}

/* Rules 9, 10 and S2. A scalar has the shape [] and one element; a dimension of 0 makes the tensor empty. Factors are
 * multiplied in their order, as the official reader does: [2^40, 2^40, 0] overflows. */
static bool shape_read(st_tensor *t, json list, char reason[REASON])
{
    uint64_t dim;
    EXPECT(json_kind(list) == '[', "rule 10: shape is no list");
    t->dim = allocate((size_t)members(list), sizeof *t->dim);
    t->count = 1;
    for (json at = { 0 }, item; json_next(list, &at, NULL, &item);) {
        EXPECT(json_natural(item, &dim), "rule 9: a dimension is no plain number");
        EXPECT(dim < (uint64_t)1 << 48, "rule S2: a dimension is above 2^48 - 1");
        EXPECT(multiply(t->count, dim, &t->count), "rule 10: the shape overflows");
        t->dim[t->ndim++] = (int64_t)dim;
    }
    bool whole = multiply(t->count, (uint64_t)dtype_bits[t->type], &t->bytes) && t->bytes % 8 == 0;
    EXPECT(whole, "rule 10: the size overflows, or is no whole number of bytes");
    t->bytes /= 8;
    return true;
}

/* Rules 7 to 11 and 13 for one tensor. Fields are found first and read afterwards: the dtype may follow the shape,
 * whose bytes it decides. Offsets stay numbers here, since nothing says yet that they are inside the file; what they
 * enclose is checked against the shape, so that one number, begin, is enough from now on. */
static bool tensor_read(st_tensor *t, json object, char reason[REASON])
{
    static const char *const names[] = { "dtype", "shape", "data_offsets" };
    json field[3] = {{ 0 }};
    uint64_t offset[2] = { 0 }, *to = offset;
    EXPECT(json_kind(object) == '{', "rule 7: no object");
    for (json at = { 0 }, key, value; json_next(object, &at, &key, &value);)
        for (int i = 0; i < 3; i++) {
            bool same = json_is(key, names[i]);
            EXPECT(!same || !field[i].text, "rule 7: %s twice", names[i]);
            field[i] = same ? value : field[i];
        }
    for (int i = 0; i < 3; i++)
        EXPECT(field[i].text, "rule 7: no %s", names[i]);
    while (t->type < DTYPES && !json_is(field[0], dtype_name[t->type]))
        t->type++;
    int length = (int)lesser(field[0].end - field[0].text, 40);
    EXPECT(t->type < DTYPES, "rule 8: unknown dtype %.*s", length, field[0].text);
    if (!shape_read(t, field[1], reason))
        return false;
    EXPECT(json_kind(field[2]) == '[' && members(field[2]) == 2, "rule 11: data_offsets is no list of two numbers");
    for (json at = { 0 }, item; json_next(field[2], &at, NULL, &item); to++)
        EXPECT(json_natural(item, to), "rule 9: an offset is no plain number");
    EXPECT(offset[0] <= offset[1], "rule 11: data_offsets go backwards");
    t->begin = offset[0];
    EXPECT(offset[1] - offset[0] == t->bytes, "rule 13: got %" PRIu64 " bytes, expected %" PRIu64,
           offset[1] - offset[0], t->bytes);
    return true;
}

/* Rules 6 to 11 and 13: every member of the header by itself. Room for all is made at once: a struct for each member,
 * which has cost its bytes of header. Metadata are free text; only compare reads any of them. After false, the tensors
 * counted so far are to be freed. */
static bool header_read(safetensors *file, json root, char reason[REASON])
{
    char why[REASON];
    size_t room = (size_t)members(root);
    file->tensors = allocate(room, sizeof *file->tensors);
    file->by_name = allocate(room, sizeof *file->by_name);
    for (json at = { 0 }, key, value; json_next(root, &at, &key, &value);) {
        if (!json_is(key, "__metadata__")) {
            st_tensor *t = &file->tensors[file->count++];
            t->name = json_string(key);
            EXPECT(tensor_read(t, value, why), "%s: tensor \"%s\"", why, t->name);
            continue;
        }
        EXPECT(!file->metadata.text, "rule 6: __metadata__ twice");
        EXPECT(json_kind(value) == '{' || json_kind(value) == 'n', "rule 6: __metadata__ is no object");
        for (json inside = { 0 }, item; json_next(value, &inside, NULL, &item);)
            EXPECT(json_kind(item) == '"', "rule 6: __metadata__ holds more than strings");
        file->metadata = value;
    }
    return true;
}

/* The order of the data. Empty tensors share their begin with what follows them and come first; the name makes the
 * order one, as qsort may leave equals in any. Comparisons, not differences: those of 64 bits do not fit an int. */
static int by_offset(const void *a, const void *b)
{
    const st_tensor *s = a, *t = b;
    int begins = (s->begin > t->begin) - (s->begin < t->begin), sizes = (s->bytes > t->bytes) - (s->bytes < t->bytes);
    return begins ? begins : sizes ? sizes : strcmp(s->name, t->name);
}

/* For pointers to tensors; order of bytes, as no locale may decide what is found. */
static int by_name(const void *a, const void *b)
{
    return strcmp((*(const st_tensor *const *)a)->name, (*(const st_tensor *const *)b)->name);
}

/* Rules 12, 14 and S1. In the order of the data, with every begin where the one before ended, there is no hole to hide
 * anything in, and no byte that two tensors share. Only here do offsets become pointers: everything before `at` is
 * inside the file. In the order of names, which safetensors_find searches afterwards, equal ones are neighbours; they
 * are compared as decoded, so that "a" and "\u0061" are twice the same. */
static bool layout_check(safetensors *file, const unsigned char *data, uint64_t size, char reason[REASON])
{
    uint64_t at = 0;
    qsort(file->tensors, (size_t)file->count, sizeof *file->tensors, by_offset);
    for (int64_t i = 0; i < file->count; i++) {
        st_tensor *t = &file->tensors[i];
        EXPECT(t->begin == at, "rule 12: got %" PRIu64 ", expected %" PRIu64 ": tensor \"%s\"", t->begin, at, t->name);
        EXPECT(t->bytes <= size - at, "rule 14: ends after the file: tensor \"%s\"", t->name);
        t->data = data + at, t->file = file;
        file->by_name[i] = t;
        at += t->bytes;
    }
    EXPECT(at == size, "rule 14: got %" PRIu64 " bytes of data, expected %" PRIu64, size, at);
    qsort(file->by_name, (size_t)file->count, sizeof *file->by_name, by_name);
    for (int64_t i = 1; i < file->count; i++)
        EXPECT(by_name(&file->by_name[i - 1], &file->by_name[i]) != 0, "rule S1: twice in the file: tensor \"%s\"",
               file->by_name[i]->name);
    return true;
}

/* A whole file's bytes -> its tensors, or the reason with the rule that it breaks. Pure: no file is opened, nothing is
 * read past size. The bytes must outlive the result, which points into them; safetensors_free frees the rest. After
 * false, nothing is left to be freed. */
bool safetensors_parse(const unsigned char *bytes, size_t size, safetensors *out, char reason[REASON])
{
    char why[REASON];
    json root = { 0 };
    *out = (safetensors){ .map = bytes, .size = size };
    EXPECT(size >= 8, "rule 1: got %zu bytes, expected at least 8", size);
    uint64_t n = little_endian(bytes, 8);
    const char *header = (const char *)bytes + 8;
    EXPECT(n <= JSON_BYTES, "rule 2: got a header of %" PRIu64 " bytes", n);
    EXPECT(n <= size - 8, "rule 3: got %zu bytes, expected %" PRIu64, size - 8, n);
    EXPECT(utf8_check(header, (size_t)n, why), "rule 4: header: %s", why);
    EXPECT(json_check(header, (size_t)n, false, &root, why), "rule 5: header: %s", why);
    EXPECT(json_kind(root) == '{', "rule 5: header: expected an object");
    bool valid = header_read(out, root, reason) && layout_check(out, bytes + 8 + n, size - 8 - n, reason);
    if (!valid)
        safetensors_free(out);
    return valid;
}

/* Maps the file and parses it. BAD_INPUT with the rule where it is no valid file, or no file; SYSTEM_ERROR where it
 * cannot be mapped. */
safetensors *safetensors_open(const char *path)
{
    char reason[REASON];
    size_t size;
    const unsigned char *map = mapping_open(path, &size);
    safetensors *file = allocate(1, sizeof *file);
    NEED(safetensors_parse(map, size, file, reason),
         "%s: safetensors: %s; copy or convert the file again", path, reason);
    file->path = text_of("%s", path);
    return file;
}

/* What safetensors_parse allocated, also where it gave up half-way; the bytes are the caller's. file is empty then. */
void safetensors_free(safetensors *file)
{
    for (int64_t i = 0; i < file->count; i++)
        free(file->tensors[i].name), free(file->tensors[i].dim);
    free(file->tensors), free(file->by_name), free(file->path);
    *file = (safetensors){ 0 };
}

/* The counterpart of safetensors_open: unmaps, and ends every weight and span of text that points into the file. */
void safetensors_close(safetensors *file)
{
    mapping_close(file->map);
    safetensors_free(file);
    free(file);
}

/* The tensor of that name in a list of that order, or NULL. By binary search: a model binds a thousand names of a
 * thousand. */
static const st_tensor *tensor_find(const st_tensor **list, int64_t count, const char *name,
                                    int (*order)(const void *, const void *))
{
    const st_tensor *key = &(st_tensor){ .name = (char *)name };
    const st_tensor **found = count > 0 ? bsearch(&key, list, (size_t)count, sizeof key, order) : NULL;
    return found ? *found : NULL;
}

/* The tensor of that name, or NULL. */
const st_tensor *safetensors_find(const safetensors *file, const char *name)
{
    return tensor_find(file->by_name, file->count, name, by_name);
}

/* Whether a tensor has a shape. batches: ones in front of it do not count, because PyTorch's batches have them. */
static bool same_shape(const st_tensor *t, int ndim, const int64_t *dim, bool batches)
{
    int more = t->ndim - ndim;
    bool same = batches ? more >= 0 : more == 0;
    for (int i = 0; same && i < t->ndim; i++)
        same = t->dim[i] == (i < more ? 1 : dim[i - more]);
    return same;
}

/* A hash of 64 bits, going on from h: four lanes of words, so that a file is read as fast as memory gives it. Every
 * step is a bijection of the lane and of the word, so that no change of a single word goes unseen. The tail is a last
 * block, filled up with zeros; the size tells it from one that ends so. */
uint64_t hash_bytes(uint64_t h, const void *data, size_t size)
{
    const uint64_t odd = 0x9E3779B97F4A7C15u;       /* 2^64 / golden ratio */
    uint64_t lane[4] = { h, h + 1, h + 2, h + 3 };
    for (size_t at = 0; at < size; at += sizeof lane) {
        uint64_t word[4] = { 0 };
        memcpy(word, (const unsigned char *)data + at, size - at < sizeof word ? size - at : sizeof word);
        for (int i = 0; i < 4; i++)
            lane[i] = (lane[i] ^ word[i]) * odd, lane[i] ^= lane[i] >> 29;
    }
    h = (h ^ size) * odd;
    for (int i = 0; i < 4; i++)
        h = (h ^ h >> 32 ^ lane[i]) * odd;
    return h ^ h >> 32;
}

/* Elements of `bytes` bytes from host order to the file's or back, as a copy in which byte j has become byte n - 1 - j.
 * NULL on a little-endian host, whose memory is in order as it is. */
static unsigned char *file_order(const unsigned char *data, size_t count, size_t bytes)
{
    const uint16_t one = 1;
    unsigned char *turned = *(const unsigned char *)&one ? NULL : allocate(count, bytes);   /* its low byte is first */
    for (size_t i = 0; turned && i < count * bytes; i++)
        turned[i] = data[i - i % bytes + bytes - 1 - i % bytes];
    return turned;
}

/* Is the last tensor, U64 [1], the sum of the header and of every tensor before it? An entry without data is written
 * so. Finds any damage that still is a valid file. Pure. */
bool safetensors_intact(const safetensors *file)
{
    const st_tensor *last = file->count ? &file->tensors[file->count - 1] : NULL;
    if (!last || last->type != U64 || last->count != 1)
        return false;
    uint64_t sum = hash_bytes(0, file->map, (size_t)(file->tensors[0].data - file->map));
    for (const st_tensor *t = file->tensors; t < last; t++)
        sum = hash_bytes(sum, t->data, (size_t)t->bytes);
    return little_endian(last->data, 8) == sum;
}

/* Writes a file that every reader of the format takes: entries in the order given, one after the other, no metadata. It
 * appears at once, when all of it is there (sync: on the disk; a run may dump thousands of tensors, none of which is
 * worth waiting for it); otherwise SYSTEM_ERROR, and nothing has changed. Types must have whole bytes.
 *
 * First the header, with eight bytes to be filled with its length. Names are the program's own words, nothing in them
 * needs escaping. Spaces at the end, which rule 5 allows, align the data to 8 bytes, as the official writer does. */
void safetensors_write(const char *path, const st_entry *entries, int count, bool sync)
{
    string header = { 0 };
    uint64_t begin = 0, end;
    print_to(&header, "........{");
    for (const st_entry *e = entries; e < entries + count; e++, begin = end) {
        char *dims = list_text(e->shape.ndim, e->shape.dim);
        end = begin + shape_count(e->shape) * (uint64_t)dtype_bits[e->type] / 8;
        print_to(&header, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}",
                 e > entries ? "," : "", e->name, dtype_name[e->type], dims, begin, end);
        free(dims);
    }
    print_to(&header, "}       ");
    header.length &= ~(size_t)7;        /* the brace, and as many of the seven spaces as alignment wants */
    for (int i = 0; i < 8; i++)
        header.text[i] = (char)(unsigned char)((uint64_t)(header.length - 8) >> (8 * i));
    writer *f = writer_open(path);
    uint64_t sum = hash_bytes(0, header.text, header.length);
    put(f->fd, path, header.text, header.length);
    for (const st_entry *e = entries; e < entries + count; e++) {
        size_t n = shape_count(e->shape), bytes = (size_t)dtype_bits[e->type] / 8;
        const unsigned char *data = e->data ? e->data : (const unsigned char *)&sum;
        unsigned char *turned = file_order(data, n, bytes);
        data = turned ? turned : data;
        put(f->fd, path, data, n * bytes);
        sum = hash_bytes(sum, data, n * bytes);
        free(turned);
    }
    writer_finish(f, sync);
    writer_rename(f);
    free(header.text);
}

/* One integer, sign-extended to 64 bits of two's complement, whatever the host has. */
static uint64_t integer(const st_tensor *t, uint64_t i)
{
    int bytes = dtype_bits[t->type] / 8;
    uint64_t bits = little_endian(t->data + i * (uint64_t)bytes, bytes), sign = (uint64_t)1 << (8 * bytes - 1);
    bool extends = t->type == I8 || t->type == I16 || t->type == I32 || t->type == I64;
    return extends && bits & sign ? bits | ~(sign - 1) : bits;
}

/* n elements, SPAN at most, from `first` on as doubles: exact for every type but 64-bit integers beyond 2^53. The type
 * must be an integer or a float that kernels widen. Narrow floats are widened where the kernels do it (weight_row), so
 * that there is one definition of them. A negative integer is -(all bits inverted) - 1. */
enum { SPAN = 510 };
static void load(const st_tensor *t, uint64_t first, int64_t n, double *out)
{
    real widened[SPAN];
    const unsigned char *p = t->data + first * (uint64_t)dtype_bits[t->type] / 8;
    if (t->type == F64) {
        for (int64_t i = 0; i < n; i++)
            out[i] = bits_double(little_endian(p + 8 * i, 8));
    } else if (is_integer(t->type)) {
        for (int64_t i = 0; i < n; i++) {
            uint64_t bits = integer(t, first + (uint64_t)i);
            out[i] = bits >> 63 && t->type != U64 ? -(double)~bits - 1 : (double)bits;
        }
    } else {
        weight_row(weight_of(p, t->type, SHAPE(1, n), NULL), 0, 0, n, widened);
        for (int64_t i = 0; i < n; i++)
            out[i] = (double)widened[i];
    }
}

static double element(const st_tensor *t, uint64_t i)
{
    double x;
    load(t, i, 1, &x);
    return x;
}

/* ---------------------------------------------------------------- weights
 *
 * A component's checkpoint, whether one file or many, is asked by tensor name:
 *
 *     weights_open --> bind, bind_conv for every layer; weights_ignore for what is known and not read --> weights_done
 *
 * Names are those of the public modules' state_dict, so that a key found in a comment is found in the checkpoint. Files
 * are named as diffusers (diffusion_pytorch_model) and transformers (model) name them:
 *
 *     STEM.safetensors                        all in one, or
 *     STEM.safetensors.index.json             {"metadata": {...}, "weight_map": {TENSOR: FILE, ...}}
 *     STEM-00001-of-00002.safetensors, ...    the files that it names
 *
 * Each tensor that is bound or ignored is marked (st_tensor.used). In the end nothing may be unmarked: a tensor
 * without a place means that the configuration describes another model, and the result would be silently wrong.
 *
 * Low-rank updates (kohya's names) hang on a matrix "blocks.0.attn1.to_q.weight" [N][K] as
 *     lora_unet__blocks_0_attn1_to_q.lora_up.weight [N][rank], .lora_down.weight [rank][K], .alpha (a scalar, optional)
 * and are linked to the weight, not merged: the mapped file cannot change, and kernels add them while they widen,
 *
 *     W'[n][k] = W[n][k] + scale * sum_r up[n][r] down[r][k],      scale = the user's weight * alpha / rank
 *
 * which costs rank multiplications an element, each time that a matrix is widened. Of a convolution [Cout][Cin][y][x]
 * they are [Cout][rank][1][1] and [rank][Cin][1][1], added at every tap. */

/* The mark of a tensor, also of one that is given for reading only. */
static bool *used(const st_tensor *t) { return &t->file->tensors[t - t->file->tensors].used; }

/* A file among w->files, which is opened where it is new. The list may move, the files stay where they are: weights
 * point to their names. */
static const safetensors *weights_add(weights *w, const char *path)
{
    for (int f = 0; f < w->nfiles; f++)
        if (strcmp(w->files[f]->path, path) == 0)
            return w->files[f];
    w->files = grow(w->files, (size_t)w->nfiles + 1, sizeof *w->files);
    return w->files[w->nfiles++] = safetensors_open(path);
}

/* Opens what the index names and checks it both ways: every line has its tensor, every tensor its line, once. Otherwise
 * index and shards are of different models: BAD_INPUT. `used` serves here for "named by the index" and is cleared
 * again. Files must be below the folder: a downloaded index must not make the program read others, hence no leading '/'
 * and no "..". */
static void shards_open(weights *w, const char *index)
{
    config c = config_open(w->folder, index);
    json map = json_member(c.root, "weight_map");
    NEED(json_kind(map) == '{', "%s: weight_map: got no object, expected one; copy it again", c.path);
    for (json at = { 0 }, key, value; json_next(map, &at, &key, &value);) {
        char *name = json_string(key), *shard = json_kind(value) == '"' ? json_string(value) : text_of("/");
        NEED(*shard && *shard != '/' && !strstr(shard, ".."),
             "%s: weight_map: %s: got the file \"%s\", expected one inside; mend it", c.path, name, shard);
        char *below = text_of("%s/%s", w->folder, shard);
        const st_tensor *t = safetensors_find(weights_add(w, below), name);
        NEED(t, "%s: weight_map: %s: got none in %s, expected it there; copy both again", c.path, name, below);
        NEED(!*used(t), "%s: weight_map: %s: got it twice, expected it once; copy the index again", c.path, name);
        *used(t) = true;
        free(name), free(shard), free(below);
    }
    for (int f = 0; f < w->nfiles; f++)
        for (const st_tensor *t = w->files[f]->tensors; t < w->files[f]->tensors + w->files[f]->count; t++) {
            NEED(*used(t), "%s: tensor %s: got it here, expected it where %s names it; copy both again",
                 t->file->path, t->name, c.path);
            *used(t) = false;
        }
    config_close(c);
}

/* Opens FOLDER/STEM.safetensors or its shards; nothing is bound yet. The single file is preferred, as by the public
 * loader; an index is looked at only where there is none, since a folder that held shards once may still have it.
 * BAD_INPUT where neither is there, or a file is broken. */
weights *weights_open(const char *folder, const char *stem)
{
    weights *w = allocate(1, sizeof *w);
    *w = (weights){ .folder = text_of("%s", folder), .stem = text_of("%s", stem) };
    char *single = text_of("%s/%s.safetensors", folder, stem), *index = text_of("%s.index.json", single);
    bool whole = file_exists(single);
    NEED(whole || file_exists(index), "%s: got neither it nor its .index.json, expected one of them; check the folder",
         single);
    if (whole)
        weights_add(w, single);
    else
        shards_open(w, index + strlen(folder) + 1);
    free(single), free(index);
    return w;
}

/* A tensor; NULL: in none of the files. Shards are few, so they are asked in turn. */
static const st_tensor *weights_find(const weights *w, const char *key)
{
    const st_tensor *t = NULL;
    for (int f = 0; f < w->nfiles && !t; f++)
        t = safetensors_find(w->files[f], key);
    return t;
}

/* Whether there is such a tensor: a few may be absent (blocks.N.t_embed.pe is computed then). Asking marks nothing. */
bool weights_has(const weights *w, const char *key) { return weights_find(w, key) != NULL; }

/* A stored tensor as a parameter, or BAD_INPUT: it must have the expected shape, and a type that kernels widen. Nothing
 * is converted or copied. Masks, which are only compared with 0, may be of integers too: those are the keys whose last
 * part begins with "mask". */
static weight weight_view(const st_tensor *t, shape expected)
{
    const char *dot = strrchr(t->name, '.'), *last = dot ? dot + 1 : t->name;
    NEED(same_shape(t, expected.ndim, expected.dim, false),
         "%s: tensor %s: got the shape %s, expected %s; check the configuration beside it", t->file->path, t->name,
         list_text(t->ndim, t->dim), list_text(expected.ndim, expected.dim));
    NEED(is_computable(t->type) || (is_integer(t->type) && strncmp(last, "mask", 4) == 0),
         "%s: tensor %s: got the type %s, expected F64, F32, F16, BF16, F8_E4M3 or F8_E5M2; convert it", t->file->path,
         t->name, dtype_name[t->type]);
    return weight_of(t->data, t->type, expected, t->name);
}

/* The update that file i has for the matrix [N][K] or convolution [N][K][y][x], put in front of `next`: up [N][rank],
 * down [rank][K], with two sides of 1 more for a convolution; of each part the first that is there under one of the
 * prefixes which merge_lora takes off. The rank is what the file says; the other sides must be the matrix's. Half an
 * update is BAD_INPUT; none leaves the list as it is. Its factor is the weight that the user gave, times alpha / rank
 * (merge_lora's multiplier * alpha); without alpha the weight alone, as there. */
static const lora *lora_link(const weights *w, int i, const char *stem, const weight *matrix, const lora *next)
{
    static const char *const prefixes[] = { "lora_unet__", "lora_unet_", "" };
    static const char *const names[] = { ".lora_up.weight", ".lora_down.weight", ".alpha" };
    const st_tensor *part[3] = { 0 };
    for (int k = 0; k < 9; k++) {
        char *name = text_of("%s%s%s", prefixes[k / 3], stem, names[k % 3]);
        part[k % 3] = part[k % 3] ? part[k % 3] : safetensors_find(w->loras[i], name);
        free(name);
    }
    const st_tensor *up = part[0], *down = part[1], *alpha = part[2], *either = up ? up : down;
    if (!either)
        return next;
    NEED(up && down, "%s: tensor %s: got it alone, expected up and down; export it again", either->file->path,
         either->name);
    int64_t rank = up->ndim == matrix->ndim ? greater(up->dim[1], 1) : 1;   /* 0 then fails the check of shapes */
    lora *link = allocate(1, sizeof *link);
    *link = (lora){ .up = weight_view(up, (shape){ matrix->ndim, { matrix->dim[0], rank, 1, 1 } }),
                    .down = weight_view(down, (shape){ matrix->ndim, { rank, matrix->dim[1], 1, 1 } }), .next = next };
    double value = alpha && alpha->count == 1 && is_number(alpha->type) ? element(alpha, 0) : NAN;
    NEED(!alpha || isfinite(value), "%s: tensor %s: got no finite number, expected one; export it again",
         alpha->file->path, alpha->name);
    link->scale = (real)(alpha ? w->lora_scales[i] * value / (double)rank : w->lora_scales[i]);
    for (int k = 0; k < (alpha ? 3 : 2); k++)
        *used(part[k]) = true;
    return link;
}

/* All updates of a matrix, in the order of the files, as sums of floats depend on it; NULL: none. Layers are named like
 * the key without ".weight", with '_' for '.'. Only matrices and two-dimensional convolutions take updates: one for
 * anything else finds no place and ends in weights_done. */
static const lora *lora_bind(const weights *w, const weight *matrix)
{
    const lora *list = NULL;
    const char *tail = strrchr(matrix->key, '.');
    if (w->nloras == 0 || (matrix->ndim != 2 && matrix->ndim != 4) || !tail || strcmp(tail, ".weight") != 0)
        return NULL;
    char *stem = text_of("%.*s", (int)(tail - matrix->key), matrix->key);
    for (char *c = stem; *c; c++)
        if (*c == '.')
            *c = '_';
    for (int i = w->nloras - 1; i >= 0; i--)        /* from the end, as each goes in front */
        list = lora_link(w, i, stem, matrix, list);
    free(stem);
    return list;
}

/* The type that --fp8 rounds a parameter to, or 0. A layer is NAME.weight with its NAME.bias: a matrix of fp8_least or
 * more elements, and where that is 1, any affine norm (the only vectors of that name). */
static dtype fp8_of(const weights *w, const char *key)
{
    const char *tail = strrchr(key, '.');
    if (!w->fp8 || !tail || (strcmp(tail, ".weight") != 0 && strcmp(tail, ".bias") != 0))
        return (dtype)0;
    char *name = text_of("%.*s", (int)(tail - key), key), *matrix = text_of("%s.weight", name);
    const st_tensor *t = weights_find(w, matrix);
    bool takes = t && (t->ndim == 2 ? t->count >= w->fp8_least : t->ndim == 1 && w->fp8_least == 1);
    for (const char *const *kept = w->fp8_kept; takes && *kept; kept++)
        takes = fnmatch(*kept, name, 0) != 0;
    free(name), free(matrix);
    return takes ? w->fp8 : (dtype)0;
}

/* A measurement's weight, so that one layer of the published model can be timed on any machine without a file: F32,
 * uniform in -s to s, s = 1 / sqrt(inputs + 1) for the inputs of one output: about a trained layer's size, so that no
 * measurement runs into infinities. Knuth's 64-bit linear congruence, its upper 24 bits, which are all that a float
 * holds. */
static weight random_weight(shape expected, const char *key)
{
    size_t count = shape_count(expected);
    uint64_t state = 1;
    float *x = allocate(count, sizeof *x), scale = 1.0f / sqrtf((float)(count / (size_t)expected.dim[0]) + 1);
    for (size_t i = 0; i < count; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        x[i] = scale * ((float)(state >> 40) * 0x1p-23f - 1);
    }
    unsigned char *data = (unsigned char *)x, *turned = file_order(data, count, sizeof *x);
    weight v = weight_of(NULL, F32, expected, key);
    v.data = turned ? turned : data;
    return v;
}

/* Looks up a parameter by its name in the checkpoint (key: a printf format), checks shape and type, and marks it as
 * used. The result points into the mapped file and is valid as long as w. A missing tensor, another shape, and a type
 * that kernels cannot read are BAD_INPUT, naming the tensor, got and expected. */
weight bind(weights *w, shape expected, const char *key, ...)
{
    if (w->random)
        return random_weight(expected, key);
    FORMATTED(name, key);
    const st_tensor *t = weights_find(w, name);
    NEED(t, "%s/%s: tensor %s: got none, expected %s; check the configuration, or copy the file again", w->folder,
         w->stem, name, list_text(expected.ndim, expected.dim));
    free(name);
    *used(t) = true;
    weight v = weight_view(t, expected);
    v.lora = lora_bind(w, &v);
    v.fp8 = fp8_of(w, v.key);
    w->fp8_layers += v.fp8 && v.ndim <= 2 && strcmp(strrchr(v.key, '.'), ".weight") == 0;
    return v;
}

/* As bind, for a convolution. expected: [Cout][Cin][t][y][x] or fewer kernel dimensions, as PyTorch stores them. The
 * copy [Cout][taps][Cin] keeps the stored type; it is the order in which a kernel over channels-last activations reads:
 *
 *     stored, a filter    c0: t0 t1 t2 ...   c1: t0 t1 t2 ...       a channel's taps together
 *     copied              t0: c0 c1 ...      t1: c0 c1 ...          a pixel's channels together
 *
 * Copies are memory that the mapped file does not share; `info` counts them (w->copied). */
weight bind_conv(weights *w, shape expected, const char *key, ...)
{
    FORMATTED(name, key);
    weight v = bind(w, expected, "%s", name);
    size_t cout = (size_t)v.dim[0], cin = (size_t)v.dim[1], taps = shape_count(expected) / cout / cin;
    size_t size = (size_t)dtype_bits[v.type] / 8;
    unsigned char *copy = allocate(cout * cin * taps, size), *to = copy;
    for (size_t n = 0; n < cout; n++)
        for (size_t k = 0; k < taps; k++)
            for (size_t c = 0; c < cin; c++, to += size)
                memcpy(to, v.data + ((n * cin + c) * taps + k) * size, size);
    w->copied += cout * cin * taps * size;
    v.data = copy;
    v.ndim = 3;
    v.dim[1] = (int64_t)taps, v.dim[2] = (int64_t)cin;
    free(name);
    return v;
}

/* Both parameters of a layer: NAME.weight of that shape (three dimensions or more: as bind_conv), NAME.bias of its
 * first dimension. A layer without bias is bound by bind alone. */
layer bind_layer(weights *w, shape expected, const char *name, ...)
{
    FORMATTED(key, name);
    layer l = { .weight = (expected.ndim > 2 ? bind_conv : bind)(w, expected, "%s.weight", key) };
    l.bias = bind(w, SHAPE(expected.dim[0]), "%s.bias", key);
    free(key);
    return l;
}

/* The place of the first nan or infinity of a tensor of floats, as `real` sees it (through fp8, if not 0); -1: none, or
 * other types. */
static int64_t nonfinite(const st_tensor *t, dtype fp8)
{
    real x[SPAN];
    int64_t count = is_computable(t->type) ? (int64_t)t->count : 0, bytes = dtype_bits[t->type] / 8;
    for (int64_t i = 0; i < count; i += SPAN) {
        int64_t n = lesser(SPAN, count - i);
        weight part = weight_of(t->data + i * bytes, t->type, SHAPE(1, n), NULL);
        part.fp8 = fp8;
        weight_row(part, 0, 0, n, x);
        for (int64_t k = 0; k < n; k++)
            if (!isfinite(x[k]))
                return i + k;
    }
    return -1;
}

/* The files that w reads, its own and then those of low-rank updates; f from 0 to nfiles + nloras - 1. */
const safetensors *weights_file(const weights *w, int f)
{
    return f < w->nfiles ? w->files[f] : w->loras[f - w->nfiles];
}

/* The first tensor that holds a nan or an infinity, and the place of it in *index; NULL: none. Looks at all of them,
 * bound or not: the search for the culprit after a stage has gone wrong. Reads every page of the files, which is why no
 * run begins with it. */
const st_tensor *weights_nonfinite(const weights *w, int64_t *index)
{
    for (int f = 0; f < w->nfiles + w->nloras; f++) {
        const safetensors *file = weights_file(w, f);
        for (const st_tensor *t = file->tensors; t < file->tensors + file->count; t++)
            if ((*index = nonfinite(t, f < w->nfiles ? fp8_of(w, t->name) : (dtype)0)) >= 0)
                return t;
    }
    return NULL;
}

/* The same for one file and all of its tensors: a line on standard error for each that has one; returns how many. */
int64_t safetensors_nonfinite(const safetensors *file)
{
    int64_t found = 0;
    for (const st_tensor *t = file->tensors; t < file->tensors + file->count; t++) {
        int64_t index = nonfinite(t, (dtype)0);
        if (index >= 0)
            complain("%s: tensor %s: got %g at element %lld of %" PRIu64 ", expected finite numbers; copy the "
                     "file again", file->path, t->name, fabs(element(t, (uint64_t)index)), ll(index), t->count);
        found += index >= 0;
    }
    return found;
}

/* Marks every tensor whose name matches glob (as in a shell, '*' also matching dots). For tensors that a valid file
 * holds and nothing reads; it is no error where there is none. */
void weights_ignore(weights *w, const char *glob)
{
    for (int f = 0; f < w->nfiles; f++)
        for (int64_t i = 0; i < w->files[f]->count; i++)
            w->files[f]->tensors[i].used |= fnmatch(glob, w->files[f]->tensors[i].name, 0) == 0;
}

/* After everything is bound: BAD_INPUT naming the first tensor, in the order of the file's data, that nothing has a
 * place for, unless allowed. A low-rank update that matched no layer would do nothing, and the user would take the
 * model's own picture for the update's: never waived. */
void weights_done(const weights *w, bool allow_unknown)
{
    for (int f = allow_unknown ? w->nfiles : 0; f < w->nfiles + w->nloras; f++)
        for (int64_t i = 0; i < weights_file(w, f)->count; i++) {
            const st_tensor *t = &weights_file(w, f)->tensors[i];
            NEED(*used(t), "%s: tensor %s: got %s %s, expected %s", t->file->path, t->name, dtype_name[t->type],
                 list_text(t->ndim, t->dim), f < w->nfiles ? "only tensors that the configuration has a place for; "
                 "check the configuration, or give --allow-unknown" : "only updates of layers of this model, "
                 "NAME.lora_up.weight, NAME.lora_down.weight, NAME.alpha; the file is for another model");
        }
}

/* Bytes of all tensors of all files: what follows the headers, by rules 12 and 14. For `info`: what the parameters take
 * on disk and, mapped, in memory. */
uint64_t weights_bytes(const weights *w)
{
    uint64_t bytes = 0;
    for (int f = 0; f < w->nfiles; f++)
        bytes += w->files[f]->size - 8 - little_endian(w->files[f]->map, 8);
    return bytes;
}

/* ---------------------------------------------------------------- pictures in: PPM
 *
 *     P6                  the magic: colour, in bytes
 *     # made by hand      a comment
 *     3 2                 width and height
 *     255                 maxval, then one white space, here the end of the line
 *     RGBRGBRGBRGBRGBRGB  two rows of three pixels, no padding
 *
 *     "P6" w h maxval, one white space, then w h times R, G, B in 1 byte each, or 2 (big-endian) where maxval > 255
 *     "P5" the same with one grey sample a pixel      "P3" like P6, with samples as decimal numbers
 *
 * White space and comments (# to the end of the line) may stand between the numbers. A stream may hold several
 * pictures. Sizes and samples come from a stranger: bounds are checked before any of them is used, and the data must be
 * there before memory is allocated for it. */

/* The next number, after white space and comments, of which there must be some; otherwise a reason that calls it
 * `what`. A comment is skipped up to its line's end, which is white space itself. Digits are read while the value is
 * below 2^32, so the sum cannot overflow and a longer number is out of every range. */
static bool ppm_number(scan *s, uint32_t least, uint32_t most, const char *what, uint32_t *number)
{
    const char *start = s->at;
    char *reason = s->reason;
    uint64_t value = 0;
    while (is_space(peek(s)) || peek(s) == '#')
        if (!scan_one(s, " \t\r\n"))
            while (peek(s) >= 0 && peek(s) != '\n')
                s->at++;
    EXPECT(s->at > start && is_digit(peek(s)), "got no %s, expected one", what);
    for (; is_digit(peek(s)) && value <= UINT32_MAX; s->at++)
        value = value * 10 + (uint64_t)(*s->at - '0');
    EXPECT(value >= least && value <= most, "got the %s %" PRIu64 ", expected %" PRIu32 " to %" PRIu32, what, value,
           least, most);
    *number = (uint32_t)value;
    return true;
}

/* One sample, in digits (P3), or in one or two bytes, which ppm_parse has found to be there. Above maxval it is
 * refused: such a file was cut or glued together. */
static bool ppm_sample(scan *s, bool digits, uint32_t most, uint32_t *value)
{
    if (digits)
        return ppm_number(s, 0, most, "sample", value);
    *value = (unsigned char)*s->at++;
    if (most > 255)
        *value = *value << 8 | (unsigned char)*s->at++;
    return *value <= most || refuse(s->reason, "got the sample %" PRIu32 ", expected at most %" PRIu32, *value, most);
}

/* One picture from the front of the bytes -> [h][w][3], 8 bits, or a reason. P6, P3 (colour) and P5 (grey, given to all
 * three channels), maxval 1 to 65535; v becomes (255 v + maxval/2) / maxval in integers, the nearest of 256 levels.
 * used: the bytes of this picture, after which another may follow. out->rgb is to be freed; after false there is
 * none. */
bool ppm_parse(const unsigned char *bytes, size_t size, size_t *used, image *out, char reason[REASON])
{
    const char *text = (const char *)bytes;
    scan s = { text, text, text + size, false, reason };
    uint32_t w = 0, h = 0, most = 0, value = 0;
    *out = (image){ 0 };
    EXPECT(scan_one(&s, "P") && scan_one(&s, "356"), "got another kind of file, expected P6, P3 or P5");
    bool digits = bytes[1] == '3', grey = bytes[1] == '5', valid = true;
    if (!ppm_number(&s, 1, INT32_MAX, "width", &w) || !ppm_number(&s, 1, INT32_MAX, "height", &h) ||
        !ppm_number(&s, 1, 65535, "maxval", &most))
        return false;
    EXPECT(is_space(peek(&s)), "got no white space after maxval, expected one");
    s.at += !digits;                    /* in P3 it is the white space before the first sample */
    /* In digits, a sample takes a blank and a digit at least: no size allocates more than the data justifies. Three
     * samples of 2^31 x 2^31 pixels just fit 64 bits, and dividing what is left cannot overflow. */
    uint64_t left = (uint64_t)(s.end - s.at), samples = (uint64_t)w * h * (grey ? 1 : 3);
    EXPECT(samples <= left / (digits || most > 255 ? 2 : 1), "got %" PRIu64 " bytes of data, expected more for %"
           PRIu32 " x %" PRIu32, left, w, h);
    unsigned char *rgb = allocate((size_t)w * h, 3), *to = rgb;
    for (uint64_t i = 0; i < samples && (valid = ppm_sample(&s, digits, most, &value)); i++)
        for (int copies = grey ? 3 : 1; copies > 0; copies--)
            *to++ = (unsigned char)((255 * value + most / 2) / most);
    *used = (size_t)(s.at - text);
    *out = valid ? (image){ w, h, rgb } : (image){ 0 };
    free(valid ? NULL : rgb);
    return valid;
}

/* ---------------------------------------------------------------- pictures in: Y4M
 *
 *     YUV4MPEG2 W128 H96 F24:1 Ip A1:1 C420jpeg XCOLORRANGE=FULL\n      a letter and its value, in any order
 *     FRAME Ip\n  Y: 128 x 96 bytes   Cb: 64 x 48   Cr: 64 x 48         parameters of a frame are skipped
 *
 * W and H are needed. C says how many pixels share a chroma sample (absent: 420). X begins somebody's own parameter:
 * FFmpeg's XCOLORRANGE=FULL says that Y is 0..255; otherwise it is 16..235, but for mono, which FFmpeg writes as
 * 0..255 whatever it says there. Every pixel takes the chroma sample of its block as it is, wherever the letters after
 * 420 place it; so what y4m_planes wrote comes back, and writing it again gives the same bytes where no colour was cut
 * to 0..255 (tests/io_test.h). Rate and aspect are not used. */

/* The names after C, and the pixels that share a chroma sample, x and y; 0: grey. Names beyond these have more than 8
 * bits, or planes that are no picture (alpha). */
static const char *const chromas[] = { "420jpeg", "420mpeg2", "420paldv", "420", "422", "444", "mono" };
static const int chroma_steps[][2] = { { 2, 2 }, { 2, 2 }, { 2, 2 }, { 2, 2 }, { 2, 1 }, { 1, 1 }, { 0, 0 } };
enum { CHROMAS = sizeof chromas / sizeof *chromas };

/* One parameter of the header: its letter and its value. Letters that are not looked at (F, A, other X) may have any.
 * Interlaced frames hold two times each, on every other line: as one picture they would have combs. */
static bool y4m_parameter(char letter, const char *value, y4m *out, char reason[REASON])
{
    if (letter == 'W' || letter == 'H') {
        int64_t *side = letter == 'W' ? &out->w : &out->h;
        *side = strlen(value) < 10 && !value[strspn(value, "0123456789")] ? atoi(value) : 0;
        EXPECT(*side > 0, "got the side %c%.20s, expected 1 to 999999999", letter, value);
    } else if (letter == 'C') {
        int i = place_of(value, chromas, CHROMAS);
        EXPECT(i >= 0, "got the colours %.20s, expected 8 bits of 420, 422, 444 or mono", value);
        out->step_x = chroma_steps[i][0], out->step_y = chroma_steps[i][1];
    }
    bool interlaced = letter == 'I' && strlen(value) == 1 && strchr("tbm", *value);
    EXPECT(!interlaced, "got interlaced frames, expected whole ones; deinterlace it");
    out->full |= letter == 'X' && strcmp(value, "COLORRANGE=FULL") == 0;
    return true;
}

/* The first line of a stream, or a reason. used: its bytes, after which the frames follow. */
bool y4m_header(const unsigned char *bytes, size_t size, size_t *used, y4m *out, char reason[REASON])
{
    const char *text = (const char *)bytes, *end = size ? memchr(text, '\n', size) : NULL;
    *out = (y4m){ .step_x = 2, .step_y = 2 };
    EXPECT(size >= 9 && memcmp(text, "YUV4MPEG2", 9) == 0, "got another kind of file, expected Y4M");
    EXPECT(end && !memchr(text, 0, (size_t)(end - text)), "got no end of the header, expected a line");
    EXPECT(text[9] == ' ' || text[9] == '\n', "got no blank between two parameters, expected one");
    *used = (size_t)(end + 1 - text);
    char *line = allocate(*used, 1), *rest;             /* the header alone, whose end becomes a string's */
    memcpy(line, text, *used - 1);
    bool valid = true;
    for (char *p = strtok_r(line + 9, " ", &rest); p && valid; p = strtok_r(NULL, " ", &rest))
        valid = y4m_parameter(*p, p + 1, out, reason);
    free(line);
    EXPECT(!valid || (out->w && out->h), "got no width or no height, expected W and H");
    return valid;
}

/* a / b as one of 256 levels, halves up. */
static unsigned char to_byte(int64_t a, int64_t b)
{
    return (unsigned char)(a <= 0 ? 0 : lesser((2 * a + b) / (2 * b), 255));
}

/* BT.601 back to R, G, B, the inverse of y4m_planes, in exact integers: R = Y + 1.402 Cr, B = Y + 1.772 Cb, and G from
 * Y = 0.299 R + 0.587 G + 0.114 B. Limited range stretches Y by 255/219 and chroma by 255/224 first; all of it is
 * carried times 219 * 224, so that only to_byte rounds. */
static void y4m_pixel(unsigned char *rgb, int64_t luma, int64_t blue, int64_t red, bool full)
{
    int64_t unit = full ? 1 : 219 * 224, y = full ? luma : (luma - 16) * 255 * 224, scale = full ? 1 : 255 * 219;
    int64_t cb = (blue - 128) * scale, cr = (red - 128) * scale;
    rgb[0] = to_byte(1000 * y + 1402 * cr, 1000 * unit);
    rgb[1] = to_byte(587000 * y - 299 * (1402 * cr) - 114 * (1772 * cb), 587000 * unit);
    rgb[2] = to_byte(1000 * y + 1772 * cb, 1000 * unit);
}

/* One frame from the front of the bytes -> [h][w][3], or a reason; as ppm_parse. Odd sides have a chroma sample for
 * their last, lone pixel, so its grid is rounded up. Sides below 10^9 keep every product within 64 bits. */
bool y4m_parse(const y4m *head, const unsigned char *bytes, size_t size, size_t *used, image *out, char reason[REASON])
{
    const unsigned char *line = size ? memchr(bytes, '\n', size) : NULL;
    bool marked = line && line - bytes >= 5 && memcmp(bytes, "FRAME", 5) == 0 && (bytes[5] == ' ' || bytes[5] == '\n');
    *out = (image){ 0 };
    EXPECT(marked, "got no line with FRAME, expected one");
    int64_t x = head->step_x, y = head->step_y, w = head->w, h = head->h, row = x ? divide_up(w, x) : 0;
    size_t left = size - (size_t)(line + 1 - bytes);
    uint64_t luma = (uint64_t)(w * h), chroma = x ? (uint64_t)(row * divide_up(h, y)) : 0, all = luma + 2 * chroma;
    EXPECT(all <= left, "got %zu bytes of data, expected %" PRIu64 " for %lld x %lld", left, all, ll(w), ll(h));
    const unsigned char *cb = line + 1 + luma, *cr = cb + chroma;
    *out = (image){ w, h, allocate((size_t)luma, 3) };
    for (int64_t i = 0; i < w * h; i++) {
        int64_t sample = x ? i / w / y * row + i % w / x : 0;
        y4m_pixel(out->rgb + 3 * i, line[1 + i], x ? cb[sample] : 128, x ? cr[sample] : 128, head->full || !x);
    }
    *used = size - left + (size_t)all;
    return true;
}

/* ---------------------------------------------------------------- pictures in: files, series, choices
 *
 *     a.ppm, clip.y4m, -      all pictures of a file; which kind it is, its first bytes say
 *     frame-%04d.ppm          a file each: from number 0 on (or 1, where there is no 0) until one is missing
 *     ...:7   ...:0..4   ...:-5..     some of them: counted from 0, negative ones from the end, both ends included
 *
 * A file that has the whole name, colon and all, is read as it is. A choice is made after reading, since the end of a
 * stream is known only there; what is not chosen is freed. */

/* A choice of frames: "7", "0..4", "-5..", "..4". false: the text is none, and nothing is set. strtoll reads the
 * numbers, and would skip white space before them; 32 bits keep every later sum of places within 64. */
bool frames_parse(const char *text, int64_t *first, int64_t *last)
{
    const char *dots = strstr(text, ".."), *second = dots ? dots + 2 : text;
    char *end, *end2;
    int64_t a = strtoll(text, &end, 10), b = strtoll(second, &end2, 10);
    bool found = end > text || end2 > second, whole = (!dots || end == dots) && !*end2;
    if (!found || !whole || a != (int32_t)a || b != (int32_t)b || strpbrk(text, " \t\n\v\f\r"))
        return false;
    *first = a, *last = dots && end2 == second ? -1 : b;
    return true;
}

/* Places from the end become places from the start; dies where the clip, of `count` pictures, has no such frames. With
 * 24 of them, -5.. is 19..23. */
void frames_resolve(const char *name, int64_t count, int64_t *first, int64_t *last)
{
    int64_t a = *first + (*first < 0 ? count : 0), b = *last + (*last < 0 ? count : 0);
    NEED(a >= 0 && a <= b && b < count, "%s: frames: got %lld..%lld, expected some of 0..%lld (or -%lld..-1); choose "
         "others", name, ll(*first), ll(*last), ll(count - 1), ll(count));
    *first = a, *last = b;
}

/* Appends all pictures of a file, or of standard input for "-", to the list, which grows; returns the new count. White
 * space between pictures and at the end is skipped: P3 files have it. Files are mapped, as a clip may be larger than
 * memory; what cannot be (pipes, devices) is read whole. */
static int64_t file_read(const char *path, image **list, int64_t count)
{
    size_t size, used = 0, at = 0;
    char reason[REASON];
    struct stat about;
    bool standard = strcmp(path, "-") == 0, mapped = !standard && stat(path, &about) == 0 && S_ISREG(about.st_mode);
    const unsigned char *bytes = mapped ? mapping_open(path, &size) : read_all(path, STREAM_BYTES, &size);
    const char *name = standard ? "standard input" : path;
    int64_t before = count;
    y4m head;
    bool stream = size > 0 && *bytes == 'Y', valid = !stream || y4m_header(bytes, size, &at, &head, reason);
    NEED(valid, "%s: %s; write it anew", name, reason);
    for (; at < size || count == before; at += used) {
        *list = grow(*list, (size_t)count + 1, sizeof **list);
        valid = stream ? y4m_parse(&head, bytes + at, size - at, &used, *list + count, reason)
                     : ppm_parse(bytes + at, size - at, &used, *list + count, reason);
        count++;
        NEED(valid, "%s: picture %lld: %s; convert it to PPM or Y4M", name, ll(count - before), reason);
        while (!stream && at + used < size && is_space(bytes[at + used]))
            used++;
    }
    if (mapped)
        mapping_close(bytes);
    else
        free((void *)bytes);
    return count;
}

/* The pictures that a name stands for, appended to *list (NULL or allocated), of which `count` are there; returns the
 * new count. A broken picture, a file without one, a choice that is not there and more than `room` pictures are
 * BAD_INPUT. What follows the last colon is part of the name where it is no choice. Of a series, number 0 may be
 * missing; 1 may not, if nothing was before it: where there is no file at all, its absence is the message. Those chosen
 * move to the front; the end of the list is left as it is, beyond the count. */
int64_t images_read(const char *path, int64_t room, image **list, int64_t count)
{
    int64_t first = 0, last = -1;
    const char *colon = file_exists(path) ? NULL : strrchr(path, ':');
    if (colon && !frames_parse(colon + 1, &first, &last))
        colon = NULL;
    char *name = text_of("%.*s", (int)(colon ? colon - path : (ptrdiff_t)strlen(path)), path);
    char *series = file_exists(name) ? NULL : series_name(name, 0);
    int64_t end = series ? count : file_read(name, list, count);
    for (int64_t number = 0, there = 1; series && (there || number == 1); number++) {
        char *file = series_name(name, number);
        there = file_exists(file) || (number == 1 && end == count);
        if (there)
            end = file_read(file, list, end);
        free(file);
    }
    frames_resolve(strcmp(name, "-") ? name : "standard input", end - count, &first, &last);
    int64_t chosen = last - first + 1;
    NEED(chosen <= room, "%s: pictures: got %lld, expected at most %lld; give fewer, as in %s:%lld..", name,
         ll(chosen), ll(room), name, ll(-room));
    for (int64_t i = count; i < end; i++)
        if (i - count < first || i - count > last)
            free((*list)[i].rgb);
    memmove(*list + count, *list + count + first, (size_t)chosen * sizeof **list);
    free(name), free(series);
    return count + chosen;
}

/* ---------------------------------------------------------------- Pillow's resize
 *
 * Two passes, since the filter is a product of two: an axis at a time, 8 bits in between.
 *
 *     w x h  --one axis-->  w' x h, rounded and cut to 0..255  --the other-->  w' x h'
 *
 * Enlarging, every output sample sees about 4 input samples; reducing s times, the filter is stretched and sees about 4
 * s, which keeps fine patterns from turning into coarse ones. At the edges the filter is cut off, and the weights left
 * are scaled to sum 1. Why bit for bit: the public pipeline resizes with Pillow, and CLIP and the VAE would see other
 * pictures.
 *
 * Formula   One axis, `in` to `out` samples, s = in/out, f = max(s, 1): sample i lies at c = (i + 1/2) s and is the sum
 *           of p_j B((j - c + 1/2) / f), |j - c| within 2 f, over the sum of the weights. B is the cubic with a = -1/2.
 * Method    Weights in double, then rounded to 22 bits after the point; sums in integers; the result of the first axis
 *           is rounded to 8 bits. Pillow skips an axis that does not change; here it comes out as it went in, since B
 *           is exactly 1 at 0 and 0 at every other whole number.
 * Accuracy  Bit for bit Pillow 13's Image.resize of RGB, if no multiplication is fused with an addition. */

/* B, in exactly these operations: another factoring rounds otherwise. Keys' cubic convolution, nought beyond 2. */
static double bicubic(double x)
{
    const double a = -0.5;
    x = fabs(x);
    if (x < 1)
        return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/* The weights of output sample i, times 2^22 (weights22): returns their count; they belong to input samples from *first
 * on. Rounded away from 0 at halves. k: scratch of `in` doubles. */
static int64_t resize_weights(int64_t in, int64_t out, int64_t i, double *k, int64_t *weights22, int64_t *first)
{
    double s = (double)in / (double)out, f = s > 1 ? s : 1, c = ((double)i + 0.5) * s, sum = 0, inverse = 1 / f;
    int64_t low = greater(0, (int64_t)(c - 2 * f + 0.5)), count = lesser(in, (int64_t)(c + 2 * f + 0.5)) - low;
    for (int64_t j = 0; j < count; j++)
        sum += k[j] = bicubic(((double)(j + low) - c + 0.5) * inverse);
    for (int64_t j = 0; j < count; j++) {
        double scaled = k[j] / sum * (1 << 22);
        weights22[j] = (int64_t)(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    }
    *first = low;
    return count;
}

/* One axis of a picture, to `size` samples; a new picture. `along` is the distance of neighbours on the axis, in
 * pixels, the same in both pictures; `across` that of the lines. 2^21 is the half that makes the shift round, and
 * negative sums, which the filter's lobes give beside bright edges, are 0 before it. */
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
                for (int64_t j = 0; j < count; j++)
                    sum += weights22[j] * from[j * along * 3];
                out.rgb[(line * to_across + i * along) * 3 + c] = (unsigned char)lesser(greater(sum, 0) >> 22, 255);
            }
    }
    free(k), free(weights22);
    return out;
}

/* A new picture of w x h, both positive (Pillow: Image.resize((w, h), Image.BICUBIC)); `in` is left as it is. Pillow
 * takes the vertical axis first where that saves the most work, and the order shows in the rounding. */
image image_resize(image in, int64_t w, int64_t h)
{
    bool vertical = h < in.h && in.h - h > 2 * (in.w - w);
    image half = resize_axis(in, vertical ? h : w, vertical), out = resize_axis(half, vertical ? w : h, !vertical);
    free(half.rgb);
    return out;
}

/* ---------------------------------------------------------------- frames out
 *
 * Y4M: one header line, then for each frame "FRAME\n" and the planes Y, Cb, Cr, 8 bits, chroma at half size both ways,
 * as in the drawing above; the number of frames stands nowhere.
 * PPM: a P6 file a frame, the exact bytes. Both are opened early, so that a run of hours does not end at a wrong name.
 * All PPM files are renamed together at the end; they are closed before, as there may be more of them than a process
 * may hold open. Standard output is a pipe that cannot be taken back: there, frames appear as they come. */

/* One struct for both kinds: planes tells them apart. Frames come one at a time, so that no more than one is held. */
struct output {
    char *path;                 /* as given: the pattern, or "-" */
    int64_t w, h, done, nfiles; /* pixels; Y4M: frames */
    writer **files;             /* [nfiles] PPM: one a frame; Y4M: one, or none for standard output */
    unsigned char *planes;      /* Y4M: one frame, Y then Cb then Cr */
};

static size_t planes_size(int64_t w, int64_t h) { return (size_t)(w * h + 2 * divide_up(w, 2) * divide_up(h, 2)); }

/* "-" or NAME.y4m: one stream; NAME%04d.ppm: one file a frame, from 0 on. w, h: pixels of every frame. Whatever cannot
 * work dies here, before the hours of computing: another ending or pattern is BAD_INPUT, a place that takes no files is
 * SYSTEM_ERROR. */
output *output_open(const char *path, int64_t w, int64_t h)
{
    bool standard = strcmp(path, "-") == 0, ppm = fnmatch("*.ppm", path, 0) == 0;
    NEED(standard || ppm || fnmatch("*.y4m", path, 0) == 0,
         "%s: output: got another ending, expected .y4m, -%%04d.ppm, or - alone; rename it", path);
    char *first = ppm ? series_name(path, 0) : NULL;
    NEED(!ppm || first, "%s: output: got no single number field, expected one, as in frame-%%04d.ppm; rename it", path);
    free(first);
    if (!standard)
        output_check(path);
    output *o = allocate(1, sizeof *o);
    *o = (output){ .path = text_of("%s", path), .w = w, .h = h, .files = allocate(1, sizeof *o->files) };
    o->planes = ppm ? NULL : allocate(planes_size(w, h), 1);
    if (!ppm && !standard)
        o->files[o->nfiles++] = writer_open(path);
    return o;
}

/* A picture as a P6 file, maxval 255, complete but for its name. */
static writer *ppm_put(const char *name, int64_t w, int64_t h, const unsigned char *rgb, bool sync)
{
    char *head = text_of("P6\n%lld %lld\n255\n", ll(w), ll(h));
    writer *f = writer_open(name);
    put(f->fd, name, head, strlen(head));
    put(f->fd, name, rgb, (size_t)(w * h * 3));
    writer_finish(f, sync);
    free(head);
    return f;
}

/* A picture as a file of its own; like a dump, it may be lost in a crash. */
void ppm_write(const char *path, image picture)
{
    writer_rename(ppm_put(path, picture.w, picture.h, picture.rgb, false));
}

/* rgb: [h][w][3] of the next frame, 8 bits. SYSTEM_ERROR where it cannot be written. Y4M announces 24 frames a
 * second, square pixels, and the chroma position and range of JPEG: samples in the middle of their 2 x 2 pixels, all of
 * 0 to 255 in use. X begins a parameter of somebody's own; FFmpeg reads this one. */
void output_frame(output *o, const unsigned char *rgb)
{
    if (!o->planes) {
        char *name = series_name(o->path, o->nfiles);
        o->files = grow(o->files, (size_t)o->nfiles + 1, sizeof *o->files);
        o->files[o->nfiles++] = ppm_put(name, o->w, o->h, rgb, true);
        free(name);
        return;
    }
    int fd = o->nfiles ? o->files[0]->fd : STDOUT_FILENO;
    if (o->done++ == 0) {
        char *head = text_of("YUV4MPEG2 W%lld H%lld F24:1 Ip A1:1 C420jpeg XCOLORRANGE=FULL\n", ll(o->w), ll(o->h));
        put(fd, o->path, head, strlen(head));
        free(head);
    }
    y4m_planes(rgb, o->w, o->h, o->planes);
    put(fd, o->path, "FRAME\n", 6);
    put(fd, o->path, o->planes, planes_size(o->w, o->h));
}

/* Gives the files their names, after all frames are written, and frees the output. Until here a failed run has changed
 * nothing that the user sees; no signal comes between two names, so that a series is there as a whole or not at all. */
void output_close(output *o)
{
    if (o->planes && o->nfiles)
        writer_finish(o->files[0], true);
    sigset_t before = hold_signals();
    for (int64_t i = 0; i < o->nfiles; i++)
        writer_rename(o->files[i]);
    release_signals(before);
    free(o->files), free(o->planes), free(o->path), free(o);
}

/* RGB [h][w][3] -> the planes of 4:2:0. JPEG's full-range BT.601, in integers that are exact (halves round up):
 *     Y = 0.299 R + 0.587 G + 0.114 B     Cb = 128 + (B - Y) / 1.772     Cr = 128 + (R - Y) / 1.402
 * Times 1000 all factors are whole: Cb = 128 + (886 B - 299 R - 587 G) / 1772, Cr = 128 + (701 R - 587 G - 114 B) /
 * 1402. R, G, B of the chroma are the mean of 2 x 2 pixels, edges replicated; it is not rounded by itself: the sum of
 * four is divided once. Pure blue and red give 255.5, which is cut to 255.
 * planes: Y [h][w], Cb and Cr [(h + 1)/2][(w + 1)/2]. */
void y4m_planes(const unsigned char *rgb, int64_t w, int64_t h, unsigned char *planes)
{
    int64_t half_w = divide_up(w, 2), half_h = divide_up(h, 2);
    unsigned char *cb = planes + w * h, *cr = cb + half_w * half_h;
    for (int64_t i = 0; i < w * h; i++)
        planes[i] = (unsigned char)((299 * rgb[3 * i] + 587 * rgb[3 * i + 1] + 114 * rgb[3 * i + 2] + 500) / 1000);
    for (int64_t y = 0; y < half_h; y++)
        for (int64_t x = 0; x < half_w; x++) {
            int sum[3] = { 0 };
            for (int64_t corner = 0; corner < 4; corner++) {
                int64_t row = lesser(2 * y + corner / 2, h - 1), column = lesser(2 * x + corner % 2, w - 1);
                for (int c = 0; c < 3; c++)
                    sum[c] += rgb[(row * w + column) * 3 + c];
            }
            int blue = 886 * sum[2] - 299 * sum[0] - 587 * sum[1], red = 701 * sum[0] - 587 * sum[1] - 114 * sum[2];
            *cb++ = (unsigned char)lesser((128 * 4 * 1772 + blue + 2 * 1772) / (4 * 1772), 255);
            *cr++ = (unsigned char)lesser((128 * 4 * 1402 + red + 2 * 1402) / (4 * 1402), 255);
        }
}

/* ---------------------------------------------------------------- pages
 *
 * A text that grows piece by piece, with pictures inside: each is a PNG in base64 in a data: address (RFC 2397), so
 * that the file needs no other. The PNG is the simplest there is: 8 bits of R, G, B, no filter, and "deflate" in stored
 * blocks, which compresses nothing, takes sixty lines and gives the same bytes everywhere.
 *
 *     file     signature, then the chunks IHDR (size, depth 8, colour type 2), IDAT (the pixels), IEND
 *     chunk    length, four letters, bytes, CRC-32 of letters and bytes; numbers have their highest byte first
 *     IDAT     zlib (RFC 1950): 78 01; stored blocks (RFC 1951): 1 in the last, else 0, n and ~n, lowest byte first,
 *              n <= 65535 bytes; Adler-32 of all their bytes
 *     pixels   a row is 0 (no filter), then R, G, B of each pixel */
enum { STORED = 65535, ADLER = 65521 };     /* the longest block; the largest prime below 2^16 */

/* Four bytes, the highest first; returns what is behind them. */
static unsigned char *png_word(unsigned char *to, uint32_t n)
{
    for (int shift = 24; shift >= 0; shift -= 8)
        *to++ = (unsigned char)(n >> shift);
    return to;
}

/* Completes the chunk whose bytes begin 8 after its start and end at `end`; returns its end. The CRC is taken bit by
 * bit: 0xedb88320 is its polynomial with the lowest power first. */
static unsigned char *png_chunk(unsigned char *start, const char *letters, unsigned char *end)
{
    uint32_t crc = UINT32_MAX;
    png_word(start, (uint32_t)(end - start - 8));
    memcpy(start + 4, letters, 4);
    for (const unsigned char *at = start + 4; at < end; at++) {
        crc ^= *at;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0xedb88320 : 0);
    }
    return png_word(end, ~crc);
}

/* The zlib stream of a picture's rows; returns its end. Byte i of the rows is a pixel's but where i is a multiple of a
 * row's length. Adler-32 is two sums modulo ADLER, of the bytes and of the first sum after each, the second in the high
 * half: unlike a plain sum it sees two bytes swapped. */
static unsigned char *png_rows(unsigned char *at, image picture)
{
    int64_t row = 3 * picture.w + 1, size = row * picture.h;
    uint32_t a = 1, b = 0;
    *at++ = 0x78, *at++ = 1;
    for (int64_t i = 0; i < size; i++) {
        if (i % STORED == 0) {
            int64_t n = lesser(size - i, STORED);
            const int64_t head[] = { i + n == size, n, n >> 8, ~n, ~n >> 8 };
            for (int k = 0; k < 5; k++)
                *at++ = (unsigned char)head[k];
        }
        *at = i % row ? picture.rgb[i - i / row - 1] : 0;
        a = (a + *at++) % ADLER;
        b = (b + a) % ADLER;
    }
    return png_word(at, b << 16 | a);
}

/* Names of files and control words come from the user: as text, and as an attribute's value. */
void print_html(string *page, const char *text)
{
    for (; *text; text++) {
        const char *safe = *text == '<' ? "&lt;" : *text == '&' ? "&amp;" : *text == '"' ? "&quot;" : NULL;
        print_to(page, safe ? "%s" : "%.1s", safe ? safe : text);
    }
}

/* Base64 writes 3 bytes as 4 digits of 6 bits; = stands for the bytes that the last 3 do not have, which are 0 here:
 * PNG's own words take 63 bytes, the rest of 72 stays as it was allocated. */
void print_picture(string *page, image picture)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    size_t rows = (3 * (size_t)picture.w + 1) * (size_t)picture.h;
    unsigned char *png = allocate(rows + 5 * (rows / STORED + 1) + 72, 1), *end;
    memcpy(png, "\x89PNG\r\n\x1a\n", 8);
    end = png_word(png_word(png + 16, (uint32_t)picture.w), (uint32_t)picture.h);
    memcpy(end, "\x08\x02\0\0", 5);
    end = png_chunk(png + 8, "IHDR", end + 5);
    end = png_chunk(end, "IDAT", png_rows(end + 8, picture));
    end = png_chunk(end, "IEND", end + 8);
    print_to(page, "data:image/png;base64,");
    for (const unsigned char *p = png; p < end; p += 3) {
        int three = p[0] << 16 | p[1] << 8 | p[2];
        print_to(page, "%c%c%c%c", digits[three >> 18], digits[three >> 12 & 63],
                 end - p > 1 ? digits[three >> 6 & 63] : '=', end - p > 2 ? digits[three & 63] : '=');
    }
    free(png);
}

/* Whole or not at all, but for a pipe, which takes nothing back. The text ends: it may begin anew. */
void text_write(string *text, const char *path)
{
    writer *f = strcmp(path, "-") ? writer_open(path) : NULL;
    put(f ? f->fd : STDOUT_FILENO, path, text->text, text->length);
    if (f)
        writer_finish(f, true), writer_rename(f);
    free(text->text);
    *text = (string){ 0 };
}

/* ---------------------------------------------------------------- packs
 *
 * A pack is the tensors of files, sorted in the order of computing. Compare walks through it, so that the first that
 * differs points at the cause and not at what follows from it; runs take stages from it by name.
 *
 * stage_order: the parts of names in the order in which a run makes them. One list serves every level: names are
 * compared part by part, and no two levels disagree. Numbers count, and a name comes after those that it begins
 * (block.03 ends with the stream after block.03.ff):
 *
 *     mask < step.000.temb < step.000.block.02.ff < step.000.block.02 < step.000.block.10 < step.001.temb < frames
 */
static const char *const stage_order[] = {
    "skip", "time", "norm1", "attn1", "attn2", "pixels", "mask", "clip", "ff", "embed", "layer", "hidden",
    "mask_latents", "masked_latents", "noise", "timesteps", "step", "temb", "text", "image", "patch", "block",
    "norm_out", "teacache", "vae", "enc", "moments", "dec", "conv_in", "down", "mid", "up", "out", "pred", "latents",
    "decoded", "video", "frames",
};

/* Rank of a name's part: numbers by value, then the list, then the rest, all alike. An end ranks last. Numbers are cut
 * at 2^40, below all words; stages count calls, blocks and slices. */
static int64_t part_rank(const char *part, size_t length)
{
    const int64_t words = INT64_C(1) << 40;
    int64_t count = sizeof stage_order / sizeof *stage_order, i = 0;
    if (length == 0)
        return INT64_MAX;
    if (is_digit(*part))
        return lesser(strtol(part, NULL, 10), words - 1);
    while (i < count && (strlen(stage_order[i]) != length || strncmp(stage_order[i], part, length) != 0))
        i++;
    return words + i;
}

/* The order of computing, part by part. Words that the list does not have go by their letters. Different names never
 * compare equal ("3" and "03" have one rank): the names themselves decide last, so that bsearch finds exactly one. */
static int stage_compare(const char *s, const char *t)
{
    for (const char *p = s, *q = t; *p || *q;) {
        size_t m = strcspn(p, "."), n = strcspn(q, ".");
        int64_t x = part_rank(p, m), y = part_rank(q, n);
        int64_t words = strncmp(p, q, m < n ? m : n), longer = (int64_t)m - (int64_t)n;
        int64_t order = x != y ? x - y : is_digit(*p) ? 0 : words ? words : longer;
        if (order != 0)
            return order < 0 ? -1 : 1;
        p += m + (p[m] == '.'), q += n + (q[n] == '.');
    }
    return strcmp(s, t);
}

static int by_stage(const void *a, const void *b)
{
    return stage_compare((*(const st_tensor *const *)a)->name, (*(const st_tensor *const *)b)->name);
}

/* Appends the tensors of a file whose names the glob matches. The file stays mapped as long as the pack is open: its
 * tensors are pointers into it. */
static void pack_add(pack *p, const char *path, const char *glob)
{
    safetensors *file = safetensors_open(path);
    p->files = grow(p->files, (size_t)p->nfiles + 1, sizeof *p->files);
    p->files[p->nfiles++] = file;
    p->tensors = grow(p->tensors, (size_t)(p->count + file->count), sizeof *p->tensors);
    for (const st_tensor *t = file->tensors; t < file->tensors + file->count; t++)
        if (fnmatch(glob, t->name, 0) == 0)
            p->tensors[p->count++] = t;
}

/* All tensors of a file, of a golden case (FOLDER/expected.safetensors), or of the .safetensors files of a folder, in
 * execution order; no name twice, since a name decides what is compared with what. readdir's order does not matter:
 * sorting has one result. BAD_INPUT for anything else. PATH:GLOB means only the tensors that the glob matches, where no
 * file has that name as a whole. */
pack *pack_open(const char *text)
{
    const char *colon = file_exists(text) ? NULL : strrchr(text, ':'), *glob = colon ? colon + 1 : "*";
    pack *p = allocate(1, sizeof *p);
    char *path = text_of("%.*s", (int)(colon ? (size_t)(colon - text) : strlen(text)), text);
    char *expected = text_of("%s/expected.safetensors", path);
    const char *file = file_exists(expected) ? expected : path;
    DIR *folder = opendir(file);
    must_read(folder || errno == ENOTDIR, file);
    if (!folder)
        pack_add(p, file, glob);
    for (const struct dirent *d; folder && (errno = 0, d = readdir(folder));) {
        char *name = text_of("%s/%s", path, d->d_name);
        if (fnmatch("*.safetensors", d->d_name, 0) == 0)
            pack_add(p, name, glob);
        free(name);
    }
    must_read(!folder || (errno == 0 && closedir(folder) == 0), path);  /* errno alone tells an error from the end */
    if (p->count > 0)
        qsort(p->tensors, (size_t)p->count, sizeof *p->tensors, by_stage);
    for (int64_t i = 1; i < p->count; i++)
        NEED(strcmp(p->tensors[i - 1]->name, p->tensors[i]->name) != 0,
             "%s: tensor %s: got it in two files, expected one; move one", path, p->tensors[i]->name);
    free(expected), free(path);
    return p;
}

/* Unmaps everything: tensors of this pack are of no use afterwards. */
static void pack_close(pack *p)
{
    for (int f = 0; f < p->nfiles; f++)
        safetensors_close(p->files[f]);
    free(p->files), free(p->tensors), free(p);
}

/* The tensor of that name, or NULL: the order of stages ends in that of the names, so it finds by name. */
static const st_tensor *pack_find(const pack *p, const char *name)
{
    return tensor_find(p->tensors, p->count, name, by_stage);
}

/* ---------------------------------------------------------------- compare
 *
 * GOLDEN and MINE are packs; their tensors meet by name, in the order of computing. A float tensor is held to four
 * limits, all of them multiples of one, L, which class and floor decide (limit_of). With d = mine - golden, all sums in
 * double, and RMS = |golden| / sqrt(count):
 *
 *     rel-L2      |d| / |golden|, Euclidean lengths: one measure for all stages, whatever their size and scale       L
 *     slice       |d_s| / max(|golden_s|, |golden| / sqrt(n)) of the worst of the n slices of a dimension          2 L
 *     element     |d_i| / max(|golden_i|, RMS) of the worst element, |golden_i| taken down to a power of 2        12 L
 *     bias        |sum d| / (count RMS)                                                                          L / 2
 *
 * A slice is what one index of a dimension selects: a channel, token, frame, row. With a dead one of 10,000, rel-L2 is
 * 1 %, and slice 100 %. Slices are measured by themselves or by the average one, whichever is larger: cancellation
 * leaves honest results large relative errors where almost nothing is left, and outliers have errors in proportion. So
 * with elements, to which slices of fewer than 16 are left. The factors keep every limit 4 honest errors away: over
 * all golden cases, those of float32, and of PyTorch in half types, are at most 0.44 L (slice) and 1.9 L (element),
 * and bias cannot be larger than rel-L2, whose floor is L / 8.
 *
 * What must be equal, and 8-bit frames, have two others: the largest difference, and the share of elements that have
 * one (changed).
 *
 * Printed and not judged: cosine, which forgives any scale, and ULPs, of which small elements have many. They are of
 * the class's type at golden's magnitude; their percentiles come from a histogram of 8 bins an octave.
 *
 *     compare: judge_new, pack_open --> for each name judge_pair: sweep (one pass), measure, note --> judge_end
 */

/* What separates the classes. u is half an ulp of 1, the largest relative error of one rounding: 2^-24, 2^-11, 2^-8. */
typedef struct {
    const char *name, *floors;          /* metadata's key for floors in this arithmetic */
    int digits, smallest;               /* of the type: bits of the significand, exponent of the smallest ulp */
    double least, unknown, most;        /* L at least, where there is no floor, and at most */
    double steps, share;                /* of frames without floors: the largest difference, and how many have one */
} judge_class;
static const judge_class classes[] = {
    { "fp64", "floor.fp64", 53, -1022, 0, 0, 0, 0, 0 },
    { "fp32", "floor", 24, -149, 2e-6, 2e-6, 6e-5, 1, 1e-3 },
    { "fp16", "floor.fp16", 11, -24, 0x1p-9, 0x1p-7, 0.5, 2, 1 },       /* 4 u, 16 u; 255 * 16 u */
    { "bf16", "floor.bf16", 8, -133, 0x1p-6, 0x1p-4, 0.5, 16, 1 },
};
enum { CLASSES = 4 };

static bool is_half(const judge_class *c) { return c->digits < 24; }

/* What must be equal but for frames: integers, and floats that are made without rounding; noise is drawn in float32,
 * which half types round. */
static bool is_exact(const st_tensor *t, const judge_class *c)
{
    return is_integer(t->type) || strcmp(t->name, "timesteps") == 0 || (!is_half(c) && strcmp(t->name, "noise") == 0);
}

/* L, with its reasons. Double: sums in another order move a result by less than 1e-12, and where the truth is stored
 * as F32 (MINE is then rounded likewise) an element that falls to the other side by 6e-8. Others: 8 floors, the
 * distance of PyTorch from the truth in that arithmetic, which a golden file carries along:
 *
 *     "__metadata__": {"case": "dec-a-01", "floor": "{\"decoded\": 7.908e-07, ...}", "floor.bf16": "...", ...}
 *
 * At least what another order of sums and one more rounding may cost. At most where real bugs begin, unless a trained
 * model (cases tiny-*) amplifies float32. In half types floors can be so high (guidance, late steps) that 8 of them
 * would let a lost slice pass, which has an error of 1: beyond 1/2 there is no limit, and the verdict says so. */
static double limit_of(const judge_class *c, const st_tensor *golden, json floor, bool tiny)
{
    if (c->most == 0)
        return golden->type == F64 ? 1e-12 : 1e-7;
    if (json_kind(floor) != '0')
        return c->unknown;
    double l = 8 * json_number(floor);
    if (is_half(c) && !(l <= c->most))
        return INFINITY;
    return fmax(tiny && !is_half(c) ? l : fmin(l, c->most), c->least);
}

/* Frames are truncated, so that the least difference may turn one over: one step of 255 in a thousandth of the
 * samples. In half types steps and share are 4 floors, steps without a limit beyond 127; without floors they are what
 * `unknown` is of 255, in any number. */
static void limits_of_frames(const judge_class *c, json floors, double *steps, double *share)
{
    json most = json_member(floors, "frames"), differing = json_member(floors, "frames.differing");
    *steps = c->steps, *share = c->share;
    if (is_half(c) && json_kind(most) == '0' && json_kind(differing) == '0') {
        *steps = 4 * json_number(most) > 127 ? INFINITY : fmax(1, 4 * json_number(most));
        *share = fmax(1e-3, 4 * json_number(differing));
    }
}

/* ---------------------------------------------------------------- compare: one pass over a pair
 *
 * Elements are taken SPAN at a time, as doubles; blocks of them, whose number depends on the shape alone, are tallied
 * in parallel and added up in order, so that the result does not depend on threads. Both are whole pixels of 3.
 *
 *     golden, mine --load--> a, b [SPAN] --tally_span--> sums, histogram, largest; d^2, a^2 --add_slices--> slices
 *                                                        of a block; --sweep--> of all, in the order of the blocks
 *
 * One pass is all: tensors may be larger than memory, and reading them takes longer than any arithmetic here. What
 * needs the length of GOLDEN first, as the element measure does, is therefore kept by exponents until it is known. */
enum { BLOCKS = 64, SLICE_LEAST = 16, SLICES_MOST = 1 << 20 };

/* The histogram of errors in ulps: none, or below 1/256, then 8 bins an octave from 2^-8 on, the last one open. The
 * first bits of a double, above the 49th, are its octave and the eighth within it: they are the bin. */
enum { OCTAVE = 8, BINS = 1 + 72 * OCTAVE, FIRST_BIN = (1023 - 8) * OCTAVE - 1 };

enum { EXPONENTS = 2048, NOT_FINITE = EXPONENTS - 1 };      /* of a double; the last is that of infinities and NaNs */

/* What a pass adds up, over all elements a of GOLDEN, b of MINE, d = b - a; counts, too, are doubles, exact up to 2^53.
 * What is not finite on either side is in no sum of numbers: it counts as the largest difference, at the exponent that
 * has nothing else. */
enum { GOLDEN2, MINE2, ERROR2, ERROR, PRODUCT, CHANGED, SUMS };     /* a^2, b^2, d^2, d, a b; elements that differ */
enum { PIXELS = SUMS, ODD_GOLDEN, ODD_MINE, BIN, SLICES = BIN + BINS };     /* the same; not finite; histogram */
typedef struct {
    double *sum;                /* [nsums]: those above, and from SLICES on d^2 and a^2 of every slice */
    double largest[EXPONENTS];  /* by the exponent of a: the largest |d|, and the first place that has it */
    uint64_t place[EXPONENTS];
} tally;

/* One thing that was measured, and what was allowed. */
typedef struct { const char *name; double error, limit; } measure;
enum { SLICE = 1 };                     /* its place among the measures of floats */
typedef struct { char text[32]; } number;           /* printed: returned as it is, and gone with the statement */

/* One tensor of GOLDEN and its namesake: how they are gone through, what was found, and what that is worth. */
typedef struct {
    const st_tensor *golden, *mine;     /* mine NULL: missing */
    const judge_class *class;
    bool alike, exact, mapped;          /* same shape and kind of type; is_exact; both are pages, to be let go of */
    double scale;                       /* a power of 2 that keeps squares within range; mostly 1 */
    double per_ulp[EXPONENTS];          /* 1 / ulp in the class's type, by the exponent bits of a double */
    int64_t *slices;                    /* of each dimension: where the sums of its slices begin; 0: it has none */
    int64_t nsums, block; int nblocks;  /* of a tally; elements of a block; blocks */
    tally seen;
    measure measures[4]; int count;
    bool passed;                        /* alike, and within all limits */
    double ulps[3];                     /* of errors: half of all, 99 % of all, and all have at most this */
    uint64_t at;                        /* the place to look at: the first that is not finite, or the worst */
    int dimension; int64_t index;       /* the worst slice; dimension -1: there are none */
    char *name, *place, *kind[2]; number value[2];  /* in words: of GOLDEN and of MINE, and what they have there */
} pair;

/* The p-th part of all elements has at most this error: the lower end of its bin, exact for whole ulps up to 16. */
static double percentile(const tally *t, double p)
{
    double count = 0, seen = 0;
    int64_t k = 0;
    for (int i = 0; i < BINS; i++)
        count += t->sum[BIN + i];
    while (k < BINS - 1 && (seen += t->sum[BIN + k]) < p * count)
        k++;
    return k == 0 ? 0 : bits_double((uint64_t)(k + FIRST_BIN) << 49);
}

/* Adds n elements a, b from `first` on; leaves d^2 (in b) and a^2 (in golden2) for the slices. Sums are local here, so
 * that they can be in registers. Doubles do not tell integers beyond 2^53 apart: those that seem equal are looked at
 * again, and count as 1 apart. d itself is not scaled: places and ulps are its own. */
static void tally_span(const pair *p, tally *t, uint64_t first, int64_t n, const double *a, double *b, double *golden2)
{
    bool whole = is_integer(p->golden->type);
    double scale = p->scale, sum[SUMS];
    memcpy(sum, t->sum, sizeof sum);
    for (int64_t i = 0; i < n; i++) {
        uint64_t at = first + (uint64_t)i, exponent = double_bits(a[i]) >> 52 & (EXPONENTS - 1);
        double d = b[i] - a[i], x = a[i] * scale, y = b[i] * scale, e = y - x;
        bool odd = exponent == NOT_FINITE, odd_too = !isfinite(b[i]);
        b[i] = golden2[i] = 0;
        if (p->exact && d == 0 && exponent < 1023 + 53)                     /* adds nothing that is asked for there */
            continue;
        if (whole && d == 0)
            d = e = integer(p->golden, at) == integer(p->mine, at) ? 0 : 1;
        double m = fabs(d), terms[CHANGED] = { [GOLDEN2] = x * x, [MINE2] = y * y, [ERROR2] = e * e, e, x * y };
        if (odd || odd_too) {
            t->sum[ODD_GOLDEN] += odd, t->sum[ODD_MINE] += odd_too;
            m = INFINITY, exponent = NOT_FINITE;
        } else {
            b[i] = terms[ERROR2], golden2[i] = terms[GOLDEN2];
            for (int s = 0; s < CHANGED; s++)
                sum[s] += terms[s];
            int64_t bin = (int64_t)(double_bits(m * p->per_ulp[exponent]) >> 49) - FIRST_BIN;
            t->sum[BIN + lesser(greater(bin, 0), BINS - 1)]++;
        }
        sum[CHANGED] += m != 0;
        if (m > t->largest[exponent])
            t->largest[exponent] = m, t->place[exponent] = at;
    }
    memcpy(t->sum, sum, sizeof sum);
}

/* Adds n elements from `first` on, e = d^2 and g = a^2, to the slices that they belong to: in [2][3], element 4 is of
 * row 1 and of column 1. Elements of equal index lie in runs of `stride`: a run is summed by itself, and `rest` of the
 * first one may have been in the span before. */
static void add_slices(const pair *p, double *sum, int64_t first, int64_t n, const double *e, const double *g)
{
    int64_t stride = 1;
    for (int d = p->golden->ndim - 1; d >= 0; stride *= p->golden->dim[d--]) {
        int64_t size = p->golden->dim[d], index = first / stride % size, rest = stride - first % stride;
        for (int64_t i = 0, end; p->slices[d] && i < n; rest = stride) {
            double error2 = 0, golden2 = 0, *slice = sum + p->slices[d] + 2 * index;
            for (end = lesser(n, i + rest); i < end; i++)
                error2 += e[i], golden2 += g[i];
            slice[0] += error2, slice[1] += golden2;
            index = index + 1 < size ? index + 1 : 0;
        }
    }
}

/* Takes pages of a file, which are not needed again, out of this process. What needs them all the same reads them
 * anew. */
static void let_go(const st_tensor *t, uint64_t first, uint64_t last)
{
#ifdef MADV_DONTNEED
    uint64_t width = (uint64_t)dtype_bits[t->type] / 8;
    const unsigned char *begin = t->data + first * width, *end = t->data + last * width;
    begin -= (uintptr_t)begin % (uintptr_t)sysconf(_SC_PAGESIZE);
    madvise((void *)begin, (size_t)(end - begin), MADV_DONTNEED);
#else
    (void)t, (void)first, (void)last;
#endif
}

/* Tallies block number k. Where the truth is F32, so is what it is compared with: its own rounding is nobody's error.
 * PIXELS counts three samples as one; only frames print it. */
static void tally_block(const pair *p, int k, tally *t)
{
    int64_t start = k * p->block, end = lesser(start + p->block, (int64_t)p->golden->count);
    double a[SPAN], b[SPAN], golden2[SPAN];
    for (int64_t at = start, n; at < end; at += n) {
        n = lesser(SPAN, end - at);
        load(p->golden, (uint64_t)at, n, a);
        load(p->mine, (uint64_t)at, n, b);
        for (int64_t i = 0; p->golden->type == F32 && i < n; i++)
            b[i] = (double)(float)b[i];
        for (int64_t i = 0; p->exact && i + 2 < n; i += 3)
            t->sum[PIXELS] += a[i] != b[i] || a[i + 1] != b[i + 1] || a[i + 2] != b[i + 2];
        tally_span(p, t, (uint64_t)at, n, a, b, golden2);
        add_slices(p, t->sum, at, n, b, golden2);
    }
    if (p->mapped && end > start)
        let_go(p->golden, (uint64_t)start, (uint64_t)end), let_go(p->mine, (uint64_t)start, (uint64_t)end);
}

/* All blocks: p->seen is what they found together, added up in their order. */
static void sweep(pair *p)
{
    size_t n = (size_t)p->nsums, blocks = (size_t)p->nblocks;
    tally *parts = allocate(blocks, sizeof *parts);
    double *sums = allocate(blocks * n, sizeof *sums);
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) if (p->nblocks > 1)
#endif
    for (int k = 0; k < p->nblocks; k++) {
        parts[k].sum = sums + (size_t)k * n;
        tally_block(p, k, &parts[k]);
    }
    for (const tally *t = parts + 1; t < parts + blocks; t++) {
        for (size_t i = 0; i < n; i++)
            sums[i] += t->sum[i];
        for (int e = 0; e < EXPONENTS; e++)
            if (t->largest[e] > parts->largest[e])
                parts->largest[e] = t->largest[e], parts->place[e] = t->place[e];
    }
    free(p->seen.sum);
    p->seen = *parts;
    free(parts);
}

/* Lays out a pass: which dimensions have slices worth a sum (not of one index, of too few elements, of too many indices
 * to keep), and blocks such that their sums take 32 MB at most (one block's as much as it needs). */
static void plan_sweep(pair *p)
{
    const st_tensor *g = p->golden;
    int64_t count = (int64_t)g->count;
    p->slices = allocate((size_t)g->ndim, sizeof *p->slices);
    p->nsums = SLICES;
    for (int d = 0; d < g->ndim && count > 0 && !p->exact; d++)
        if (g->dim[d] > 1 && g->dim[d] <= SLICES_MOST && count / g->dim[d] >= SLICE_LEAST) {
            p->slices[d] = p->nsums;
            p->nsums += 2 * g->dim[d];
        }
    for (int e = 0; e < EXPONENTS; e++)
        p->per_ulp[e] = ldexp(1, -(int)greater(e - 1023 - p->class->digits + 1, p->class->smallest));
    int64_t most = greater(1, (1 << 22) / (p->nsums - SLICES + 1));
    p->nblocks = (int)lesser(lesser(BLOCKS, most), (count >> 16) + 1);
    p->block = (count / p->nblocks / 3 + 1) * 3;
}

/* ---------------------------------------------------------------- compare: measures
 *
 * From a tally to what is judged. All formulas of "compare" above divide by GOLDEN's length; where that is 0 errors are
 * relative to 1, so that zeros may only be missed by what is nothing beside 1. The same division makes every measure
 * free of units, and of `scale` but where d or RMS stand alone. */

/* The error of the worst slice, |d_s| / max(|golden_s|, |golden| / sqrt(n)), and which it is: of equals that of the
 * first dimension. 0 where no dimension has slices. */
static double worst_slice(pair *p)
{
    double worst = -1, golden2 = p->seen.sum[GOLDEN2];
    for (int d = 0; d < p->golden->ndim; d++)
        for (int64_t i = 0, n = p->golden->dim[d]; p->slices[d] && i < n; i++) {
            const double *s = p->seen.sum + p->slices[d] + 2 * i;
            double error = sqrt(s[0] / (golden2 == 0 ? 1 : fmax(s[1], golden2 / (double)n)));
            if (error > worst)
                worst = error, p->dimension = d, p->index = i;
        }
    return fmax(worst, 0);
}

/* What the pass found, beside its limits. The worst element is sought among the largest differences of each exponent:
 * |golden_i| is taken down to a power of 2, so within an exponent all have the same divisor, and the largest difference
 * is the largest error. What must be equal is not divided: there the first of equal differences is the place to look
 * at. Where anything is not finite the measure is NaN, which no limit allows, not even infinity. limit_of's 1e-7 is
 * that of truths in F32, whose roundings all go one way where the tensor is constant: bias may then be as large. */
static void take_measures(pair *p, json floors, bool tiny)
{
    const tally *t = &p->seen;
    double n = fmax(1, (double)p->golden->count), length = t->sum[GOLDEN2] == 0 ? 1 : sqrt(t->sum[GOLDEN2]);
    double rms = t->sum[GOLDEN2] == 0 ? 1 : length / sqrt(n) / p->scale, worst = 0, steps = 0, share = 0;
    bool odd = t->largest[NOT_FINITE] > 0;
    for (int e = 0; e < NOT_FINITE; e++) {
        double error = t->largest[e] / (p->exact ? 1 : fmax(rms, ldexp(1, e - 1023)));
        if (error > worst || (p->exact && error == worst && t->place[e] < p->at))
            worst = error, p->at = t->place[e];
        p->ulps[2] = fmax(p->ulps[2], t->largest[e] * p->per_ulp[e]);
    }
    p->ulps[0] = percentile(t, 0.5), p->ulps[1] = percentile(t, 0.99);
    if (odd)
        worst = NAN, p->at = t->place[NOT_FINITE];
    if (strcmp(p->golden->name, "frames") == 0)
        limits_of_frames(p->class, floors, &steps, &share);
    if (p->exact) {
        p->measures[p->count++] = (measure){ "difference", worst, steps };
        p->measures[p->count++] = (measure){ "changed", t->sum[CHANGED] / n, share };
        return;
    }
    double l = limit_of(p->class, p->golden, json_member(floors, p->golden->name), tiny);
    p->measures[p->count++] = (measure){ "rel-L2", odd ? NAN : sqrt(t->sum[ERROR2]) / length, l };
    p->measures[p->count++] = (measure){ "slice", worst_slice(p), 2 * l };
    p->measures[p->count++] = (measure){ "element", worst, 12 * l };
    p->measures[p->count++] = (measure){ "bias", fabs(t->sum[ERROR]) / (sqrt(n) * length), l == 1e-7 ? l : l / 2 };
}

/* The floors that a golden file carries for a class, absent where it has none; they point into the text that is
 * returned, to be freed. What is no JSON is BAD_INPUT, since it would set other limits silently. */
static char *read_floors(const safetensors *file, const judge_class *c, json *floors)
{
    char reason[REASON];
    json member = json_member(file->metadata, c->floors);
    char *text = member.text ? json_string(member) : NULL;
    *floors = (json){ 0 };
    NEED(!text || json_check(text, strlen(text), false, floors, reason), "%s: metadata %s: %s; make the file again",
         file->path, c->floors, reason);
    return text;
}

/* The pass, and what it measured. Squares of doubles beyond 1e154 or below 1e-162 leave the range of doubles: then the
 * pass is made again, with all elements times the power of 2 that takes the largest to 1, or as far as 2^1000
 * does. */
static void measure_pair(pair *p)
{
    json floors, name = json_member(p->golden->file->metadata, "case");
    char *text = read_floors(p->golden->file, p->class, &floors);
    plan_sweep(p);
    sweep(p);
    double golden2 = p->seen.sum[GOLDEN2], most = 0;
    bool outside = !p->exact && p->seen.sum[CHANGED] > 0 && !(golden2 > 1e-250 && golden2 < 1e250);
    for (uint64_t i = 0; outside && i < p->golden->count; i++)
        most = fmax(most, fabs(element(p->golden, i)));
    if (most > 0 && isfinite(most)) {
        p->scale = ldexp(1, (int)fmin(1000, -logb(most)));
        sweep(p);
    }
    take_measures(p, floors, name.text && strncmp(name.text, "\"tiny-", 6) == 0);
    free(text);
}

/* The measure that decides: the first that is beyond its limit, or the one that is nearest to it (of error / limit the
 * largest, written as products: exact tensors have limits of 0). NaN is beyond any limit: conditions are written
 * "error <= limit", and negated as a whole. */
static const measure *deciding(const pair *p)
{
    const measure *nearest = p->measures;
    for (const measure *m = nearest; m < p->measures + p->count; m++) {
        if (!(m->error <= m->limit))
            return m;
        if (m->error * nearest->limit > nearest->error * m->limit)
            nearest = m;
    }
    return nearest;
}

/* ---------------------------------------------------------------- compare: the report
 *
 * A verdict has two forms. Lines for people: -v prints one for every tensor, and without it the first that differs is
 * told in up to ten, whose last is the verdict on all:
 *
 *     same     NAME: rel-L2 5.95e-07, limit 2e-06; slice ...; ulps of fp32 p50 ..., max ...; cosine 0.999999998
 *     DIFFERS  NAME: got F32 [2, 4], expected F32 [2, 3]
 *
 *     NAME: GOLDEN F64 [16, 2], MINE F32 [16, 2]
 *         rel-L2 6.04e-05, limit 2.56e-05
 *         ...                                             the other measures, a line each
 *     differs first: NAME: rel-L2 6.04e-05, limit 2.56e-05; at [13, 0] expected 0.8461, got 0.8463; 70 of 118 ...
 *
 * And an object of JSON (`strict`), which has no word for what is not finite but null:
 *
 *     {"name":NAME,"same":true,"golden":{"dtype":"F64","shape":[16, 2]},"mine":...,
 *      "measures":{"rel-L2":{"error":6.04e-05,"limit":2.56e-05},...},"at":[13, 0],"expected":0.8461,"got":0.8463,
 *      "differing":32,"not_finite":[0,0],"worst_slice":{"dimension":0,"index":7},"ulps":{...},"cosine":0.999999998}
 *
 * What both say in words is written down once, by describe_pair; the rest is numbers. */

/* A foreign string as JSON has it between the quotes, which also keeps it on one line of a terminal. A new string. */
static char *name_text(const char *s)
{
    string to = { .text = allocate(1, 1) };
    for (; *s; s++) {
        bool nul = (unsigned char)*s == 0xC0;           /* C0 80: see json_string */
        if (nul || (unsigned char)*s < ' ' || *s == 0x7f)
            print_to(&to, "\\u%04x", nul ? 0 : (unsigned)*s);
        else
            print_to(&to, *s == '"' || *s == '\\' ? "\\%c" : "%c", *s);
        s += nul;
    }
    return to.text;
}

/* A number with so many digits: 9 tell any two floats apart, 17 any two doubles. */
static number number_text(double x, int digits, bool strict)
{
    number n = { "null" };
    if (!strict || isfinite(x))
        snprintf(n.text, sizeof n.text, "%.*g", digits, x);
    return n;
}

/* An element, with as many digits as tell it from all others of its type. Integers are printed as such: 64 bits of them
 * do not fit a double. */
static number value_text(const st_tensor *t, uint64_t i, bool strict)
{
    bool minus = element(t, i) < 0;
    number n;
    if (!is_integer(t->type))
        return number_text(element(t, i), t->type == F64 ? 17 : 9, strict);
    snprintf(n.text, sizeof n.text, "%s%" PRIu64, minus ? "-" : "", minus ? -integer(t, i) : integer(t, i));
    return n;
}

/* The words of a pair: its name, what either side is ("F32 [2, 3]", or "nothing"), the place to look at, "[1, 2]", and
 * what is there. The index is worked out from the last dimension to the first, like digits: the last one changes
 * fastest. */
static void describe_pair(pair *p, bool strict)
{
    const st_tensor *g = p->golden;
    int64_t *index = allocate((size_t)g->ndim, sizeof *index);
    uint64_t at = p->at;
    for (int d = g->ndim - 1; d >= 0 && g->count > 0; at /= (uint64_t)g->dim[d--])
        index[d] = (int64_t)(at % (uint64_t)g->dim[d]);
    p->name = name_text(g->name);
    p->place = list_text(g->ndim, index);
    for (int i = 0; i < 2; i++) {
        const st_tensor *t = i ? p->mine : g;
        char *dims = t ? list_text(t->ndim, t->dim) : NULL;
        p->kind[i] = t ? text_of(strict ? "{\"dtype\":\"%s\",\"shape\":%s}" : "%s %s", dtype_name[t->type], dims)
                       : text_of(strict ? "null" : "nothing");
        if (p->alike && g->count > 0)
            p->value[i] = value_text(t, p->at, strict);
        free(dims);
    }
    free(index);
}

/* What is printed of floats beside the measures. */
static double cosine(const tally *t) { return t->sum[PRODUCT] / sqrt(t->sum[GOLDEN2]) / sqrt(t->sum[MINE2]); }

/* What was measured of a tensor, in parts with `between` between them; no end of line. The worst slice is written as
 * NumPy takes it: [:, 7, :]. PSNR is that of all frames together, of 255. */
static void print_measures(string *to, const pair *p, const char *between)
{
    const double *sum = p->seen.sum, n = fmax(1, (double)p->golden->count);
    for (int i = 0; i < p->count; i++) {
        print_to(to, "%s %.3g, limit %.3g", p->measures[i].name, p->measures[i].error, p->measures[i].limit);
        for (int d = 0, last = p->golden->ndim - 1; i == SLICE && p->dimension >= 0 && d <= last; d++)
            print_to(to, "%s%s%s", d ? ", " : ", [", d == p->dimension ? number_text((double)p->index, 9, 0).text : ":",
                     d == last ? "]" : "");
        print_to(to, "%s", between);
    }
    if (p->exact)
        print_to(to, "%.0f of %" PRIu64 " elements differ", sum[CHANGED], p->golden->count);
    else
        print_to(to, "ulps of %s p50 %.3g, p99 %.3g, max %.3g; cosine %.9g", p->class->name, p->ulps[0], p->ulps[1],
                 p->ulps[2], cosine(&p->seen));
    if (p->exact && strcmp(p->golden->name, "frames") == 0)
        print_to(to, ", %.3g %% of pixels; PSNR %.4g dB", 300 * sum[PIXELS] / n,
                 10 * log10(255 * 255 * n / sum[ERROR2]));
    if (sum[ODD_GOLDEN] + sum[ODD_MINE] > 0)
        print_to(to, "%snot finite: %.0f in GOLDEN, %.0f in MINE", between, sum[ODD_GOLDEN], sum[ODD_MINE]);
}

/* For people, without the last line's end. A line of -v: all that was measured. Or the first that differs, in lines:
 * that, and then what decides, and where. Of unlike tensors either tells what was got. */
static void print_report(string *to, const pair *p, bool first)
{
    const measure *m = deciding(p);
    if (first && p->alike) {
        print_to(to, "%s: GOLDEN %s, MINE %s\n    ", p->name, p->kind[0], p->kind[1]);
        print_measures(to, p, "\n    ");
        print_to(to, "\n");
    }
    print_to(to, "%s%s: ", first ? "differs first: " : p->passed ? "same     " : "DIFFERS  ", p->name);
    if (!p->alike)
        print_to(to, "got %s, expected %s", p->kind[1], p->kind[0]);
    else if (first)
        print_to(to, "%s %.3g, limit %.3g; at %s expected %s, got %s", m->name, m->error, m->limit, p->place,
                 p->value[0].text, p->value[1].text);
    else
        print_measures(to, p, "; ");
}

/* For programs: an object of JSON. */
static void print_object(string *to, const pair *p)
{
    const double *sum = p->seen.sum;
    print_to(to, "{\"name\":\"%s\",\"same\":%s,\"golden\":%s,\"mine\":%s", p->name, p->passed ? "true" : "false",
             p->kind[0], p->kind[1]);
    for (const measure *m = p->measures, *end = m + p->count; m < end; m++)
        print_to(to, "%s\"%s\":{\"error\":%s,\"limit\":%s%s", m == p->measures ? ",\"measures\":{" : ",", m->name,
                 number_text(m->error, 9, true).text, number_text(m->limit, 9, true).text, m + 1 < end ? "}" : "}}");
    if (p->alike && p->golden->count > 0)
        print_to(to, ",\"at\":%s,\"expected\":%s,\"got\":%s,\"differing\":%.0f,\"not_finite\":[%.0f,%.0f]", p->place,
                 p->value[0].text, p->value[1].text, sum[CHANGED], sum[ODD_GOLDEN], sum[ODD_MINE]);
    if (p->dimension >= 0)
        print_to(to, ",\"worst_slice\":{\"dimension\":%d,\"index\":%lld}", p->dimension, ll(p->index));
    if (p->alike && !p->exact)
        print_to(to, ",\"ulps\":{\"p50\":%.9g,\"p99\":%.9g,\"max\":%s},\"cosine\":%s", p->ulps[0], p->ulps[1],
                 number_text(p->ulps[2], 9, true).text, number_text(cosine(&p->seen), 9, true).text);
    print_to(to, "}");
}

/* ---------------------------------------------------------------- compare: the judge
 *
 * Takes pairs one by one, whoever has them: compare walks through two packs, a run with --check brings each stage as it
 * is made. It ends with one verdict, and the exit code that belongs to it:
 *
 *     same: 118 tensors, fp32; worst NAME: slice 1.91e-06, limit 1.12e-05; 14 only in MINE                     DONE
 *     (the report on the first that differs); 70 of 118 tensors differ, fp32; 14 only in MINE                  DIFFERS
 *     {"same":...,"class":...,"tensors":118,"differing":70,...,"first":NAME,"all":[one object a tensor]}       either
 */

/* A running comparison. What is printed at the end is kept as text, since the data may be gone by then. */
struct judge {
    const judge_class *class;
    bool all, json, mapped;             /* mapped: tensors are files' pages, on either side */
    string list, first, worst;          /* JSON of all; the first that differs; the nearest to its limit of the same */
    double part;                        /* of the limit that the worst has taken */
    int pairs, compared, differing, unlimited;
    uint64_t elements;
};

/* A comparison within the limits of a class: "fp64", "fp32", "fp16", "bf16", or NULL for this build's own. Another word
 * is BAD_INPUT. all: every tensor is printed as it is judged. json: nothing is printed but one document at the end. */
judge *judge_new(const char *class, int verbosity, bool as_json)
{
    judge *j = allocate(1, sizeof *j);
    *j = (judge){ .all = verbosity > 0, .json = as_json, .part = -1 };
    for (int i = 0; i < CLASSES; i++)
        if (strcmp(class ? class : sizeof(real) == 8 ? "fp64" : "fp32", classes[i].name) == 0)
            j->class = &classes[i];
    NEED(j->class, "class: got \"%s\", expected fp64, fp32, fp16 or bf16; give one of them", class);
    return j;
}

/* Counts a verdict, and keeps or prints what is to be said of it. The worst of those that are the same is the one that
 * has used up most of its limit: how near the next failure is. */
static void judge_note(judge *j, const pair *p)
{
    const measure *m = deciding(p);
    double part = p->alike && m->limit > 0 ? m->error / m->limit : 0;
    j->elements += p->alike ? p->golden->count : 0;
    j->compared += p->mine != NULL;
    j->unlimited += p->alike && p->measures[0].limit == INFINITY;
    if (j->json) {
        print_to(&j->list, j->pairs ? ",\n" : "\n");
        print_object(&j->list, p);
    } else if (j->all) {
        j->list.length = 0;
        print_report(&j->list, p, false);
        printf("%s\n", j->list.text);
    }
    j->pairs++;
    if (!p->passed && j->differing++ == 0) {
        if (j->json)
            print_to(&j->first, "\"%s\"", p->name);
        else
            print_report(&j->first, p, true);
    }
    if (p->passed && part > j->part) {
        j->worst.length = 0;
        print_to(&j->worst, "%s: %s %.3g, limit %.3g", p->name, m->name, m->error, m->limit);
        j->part = part;
    }
}

/* Judges the next tensor of a file, in the order of computing, by the floors of that file. mine NULL: missing.
 * Missing, another shape, or integers against floats are differences, whatever the values; the widths of floats may
 * differ: a double build compares with F32 truths. A type that has no numbers here is BAD_INPUT. Nothing is kept of
 * the arguments. */
static bool judge_pair(judge *j, const st_tensor *golden, const st_tensor *mine)
{
    const st_tensor *odd = !is_number(golden->type) ? golden : mine && !is_number(mine->type) ? mine : NULL;
    NEED(!odd, "tensor %s: got the type %s, expected integers or floats; convert it", odd->name, dtype_name[odd->type]);
    bool alike = mine && is_integer(golden->type) == is_integer(mine->type) &&
                 same_shape(mine, golden->ndim, golden->dim, false);
    pair p = { .golden = golden, .mine = mine, .class = j->class, .alike = alike, .exact = is_exact(golden, j->class),
               .mapped = j->mapped, .scale = 1, .dimension = -1 };
    if (alike)
        measure_pair(&p);
    p.passed = alike && deciding(&p)->error <= deciding(&p)->limit;
    describe_pair(&p, j->json);
    judge_note(j, &p);
    free(p.name), free(p.place), free(p.kind[0]), free(p.kind[1]), free(p.seen.sum), free(p.slices);
    return alike;
}

/* Prints the verdict on standard output: one line, or the first that differs in up to ten, or JSON. extra: tensors that
 * only MINE has, which do no harm. Returns DONE or DIFFERS, and frees; to have compared nothing is BAD_INPUT, which the
 * names are for. */
static int judge_end(judge *j, const char *golden, const char *mine, int extra)
{
    bool same = j->differing == 0;
    NEED(j->compared > 0 && (j->elements > 0 || !same),
         "%s: got no tensor of %s, expected some with elements; check both names", mine, golden);
    if (j->json)
        printf("{\"same\":%s,\"class\":\"%s\",\"tensors\":%d,\"differing\":%d,\"unlimited\":%d,\"only_in_mine\":%d,"
               "\"first\":%s,\"all\":[%s\n]}", same ? "true" : "false", j->class->name, j->pairs, j->differing,
               j->unlimited, extra, same ? "null" : j->first.text, j->list.text);
    else if (same)
        printf("same: %d tensors, %s; worst %s", j->compared, j->class->name, j->worst.text);
    else
        printf("%s; %d of %d tensors differ, %s", j->first.text, j->differing, j->pairs, j->class->name);
    if (!j->json && j->unlimited > 0)
        printf("; %d have floors too high for a limit", j->unlimited);
    if (!j->json && extra > 0)
        printf("; %d only in MINE", extra);
    printf("\n");
    free(j->list.text), free(j->first.text), free(j->worst.text), free(j);
    return same ? DONE : DIFFERS;
}

/* Every tensor of GOLDEN must be in MINE and within its limits; what only MINE has is counted, so that a pack may hold
 * a part of a run. Both are mapped, and let go of tensor by tensor: memory does not grow with them. Returns an exit
 * code. */
int compare(const char *golden, const char *mine, const char *class, bool all, bool as_json)
{
    judge *j = judge_new(class, all, as_json);
    pack *theirs = pack_open(golden), *ours = pack_open(mine);
    j->mapped = true;
    int extra = 0;
    for (int64_t i = 0; i < theirs->count; i++)
        judge_pair(j, theirs->tensors[i], pack_find(ours, theirs->tensors[i]->name));
    for (int64_t i = 0; i < ours->count; i++)
        extra += pack_find(theirs, ours->tensors[i]->name) == NULL;
    int code = judge_end(j, golden, mine, extra);
    pack_close(theirs), pack_close(ours);
    return code;
}

/* ---------------------------------------------------------------- stages
 *
 * A stage is a tensor with a name, step.000.block.02.attn1 say, and the name is all that joins a run to files:
 *
 *     --inject FILE  ->  given()       before the stage: its tensor is read instead of computed
 *     the stage      ->  dump()        after it: --dump DIR writes DIR/NAME.safetensors
 *                                      check judges it against the truth, then goes on with the truth
 *                                      --stop-after NAME ends the run
 *
 * Dumps are a file a tensor, so that a run that dies leaves what it had computed, and none is held in memory.
 * Inside, channels are last; files have the order of the public code, which the reference data has, too:
 *     AS_IS                   [N][D], [rows][N][D]: tokens have their width last on both sides
 *     CHANNELS_FIRST          [F][h][w][C] -> [C][F][h][w]
 *     ROWS_CHANNELS_FIRST     [B][F][h][w][C] -> [B][C][F][h][w]
 *
 * A run is planned before it is computed: every stage passes here twice, the first time without data. What is wrong
 * with a given tensor ends the plan; dumps, checks and looks wait for the data. */

/* The shape in the file of a tensor of shape s here: the last dimension moves to the front, or behind the rows. */
static shape file_shape(shape s, layout order)
{
    shape t = s;
    for (int to = order == ROWS_CHANNELS_FIRST, i = to; order != AS_IS && i < s.ndim; i++)
        t.dim[i] = s.dim[i == to ? s.ndim - 1 : i - 1];
    return t;
}

/* Where element i of a tensor here, of shape s and `count` elements, is in the file. For each row the data are a matrix
 * [n][c], n the elements between, and files have its transpose. */
static uint64_t file_index(shape s, uint64_t count, layout order, uint64_t i)
{
    uint64_t c = (uint64_t)s.dim[s.ndim - 1], rows = order == ROWS_CHANNELS_FIRST ? (uint64_t)s.dim[0] : 1;
    uint64_t n = count / rows / c;
    return order == AS_IS ? i : i / (n * c) * n * c + i % c * n + i / c % n;
}

/* The tensor that takes the place of a stage, or NULL. Of several the last given counts. What comes after the stage
 * that the run is to end with has no part in it: otherwise a file of a whole run would leave nothing to compute. */
static const st_tensor *find_given(const run *r, const char *name)
{
    const hooks *h = r->hooks;
    bool part = h && (!h->stop_after || stage_compare(name, h->stop_after) < 0);
    const st_tensor *found = NULL;
    for (int i = part ? h->ngiven - 1 : -1; i >= 0 && !found; i--)
        found = pack_find(h->given[i], name);
    return found;
}

/* Whether a stage is given, so that nothing which only leads to it need be computed. */
bool is_given(const run *r, const char *name, ...)
{
    FORMATTED(full, name);
    bool found = find_given(r, full) != NULL;
    free(full);
    return found;
}

/* Copies a tensor of a file into a stage's data, where there are both. */
void copy_given(real *to, shape s, layout order, const st_tensor *t)
{
    for (uint64_t i = 0, count = shape_count(s); t && to && i < count; i++)
        to[i] = (real)element(t, file_index(s, count, order, i));
}

/* The tensor that takes the place of a stage, counted, or NULL; BAD_INPUT where its shape is not the stage's, which is
 * s in files: in the plan already, as everything that is wrong with an input. */
static const st_tensor *take_given(const run *r, const char *name, shape s, bool integers)
{
    const st_tensor *t = find_given(r, name);
    if (!t)
        return NULL;
    NEED(same_shape(t, s.ndim, s.dim, true) && is_number(t->type) && is_integer(t->type) == integers,
         "--inject: %s: got %s %s, expected %s %s", t->name, dtype_name[t->type], list_text(t->ndim, t->dim),
         integers ? "U8" : "F64, F32, F16 or BF16", list_text(s.ndim, s.dim));
    r->hooks->replaced += r->arena->planning;
    return t;
}

/* Where the stage is given, x becomes it and the caller computes nothing: true. */
bool given(const run *r, tensor x, layout order, const char *name, ...)
{
    FORMATTED(full, name);
    const st_tensor *t = take_given(r, full, file_shape(tensor_shape(x), order), false);
    free(full);
    copy_given(x.data, tensor_shape(x), order, t);
    return t != NULL;
}

/* The same for bytes, which have the file's order. */
bool given_bytes(const run *r, unsigned char *bytes, shape s, const char *name)
{
    const st_tensor *t = take_given(r, name, s, true);
    for (uint64_t i = 0; t && bytes && i < t->count; i++)
        bytes[i] = (unsigned char)element(t, i);
    return t != NULL;
}

/* Whether the run ends with a stage that the glob matches. */
bool stops_at(const run *r, const char *glob)
{
    return r->hooks && r->hooks->stop_after && fnmatch(glob, r->hooks->stop_after, 0) == 0;
}

/* Reads numbers out of that stage's name, as sscanf, and returns how many: which step, block or slice is the last that
 * is wanted. 0 where the run goes to its own end. */
int stop_numbers(const run *r, const char *format, ...)
{
    if (!r->hooks || !r->hooks->stop_after)
        return 0;
    WITH_ARGUMENTS(format, int count = vsscanf(r->hooks->stop_after, format, args));
    return count;
}

/* Makes a dump's folder (one level) where it is missing, or dies: before the hours of computing, not in them. */
void dump_check(const char *folder)
{
    char *inside = text_of("%s/.", folder);
    must_write((mkdir(folder, 0777) == 0 || errno == EEXIST) && access(inside, W_OK | X_OK) == 0, folder);
    free(inside);
}

/* A stage against the truth's; whether the truth may take its place, which is so where it is exact for this build:
 * errors then do not add up, and every later stage is judged for itself. Truths that were rounded to float32 would
 * spoil double's digits. */
static bool check_stage(const hooks *h, const st_tensor *truth, st_entry e)
{
    uint64_t count = shape_count(e.shape);
    unsigned char *turned = file_order(e.data, count, (size_t)dtype_bits[e.type] / 8);
    st_tensor mine = { .type = e.type, .ndim = e.shape.ndim, .dim = e.shape.dim, .data = turned ? turned : e.data,
                       .count = count };
    *used(truth) = true;
    bool alike = judge_pair(h->judge, truth, &mine);
    free(turned);
    return alike && (sizeof(real) == 4 || truth->type == F64);
}

/* The verdict of check: DONE or DIFFERS; DONE where nothing was to be judged. What the truth has and the run did not
 * make is missing, unless it was not to be made. */
int hooks_end(const hooks *h)
{
    for (int64_t i = 0; h->truth && !h->ngiven && !h->stop_after && i < h->truth->count; i++)
        if (!*used(h->truth->tensors[i]))
            judge_pair(h->judge, h->truth->tensors[i], NULL);
    return h->truth ? judge_end(h->judge, h->truth->files[0]->path, "this run", 0) : DONE;
}

/* What is done with a finished stage: e, whose data are in this order, for reading; x (NULL: none), the same data, is
 * what the run goes on with. Only what is wanted is turned to the file's order. A dump may be lost in a crash: no
 * sync. */
static void stage_done(const run *r, st_entry e, layout order, real *x)
{
    hooks *h = r->hooks;
    if (!h)
        return;
    bool last = h->stop_after && strcmp(e.name, h->stop_after) == 0, there = !r->arena->planning && e.data;
    bool written = there && h->dump_dir && h->nfilters == 0;
    for (int i = 0; there && h->dump_dir && i < h->nfilters; i++)
        written |= fnmatch(h->filters[i], e.name, 0) == 0;
    const st_tensor *truth = there && h->truth ? pack_find(h->truth, e.name) : NULL;
    st_entry out = { e.name, e.type, file_shape(e.shape, order), e.data };
    real *turned = NULL;
    h->stop_known |= last;
    if (there && h->look)
        h->look(r, e);
    if ((written || truth) && order != AS_IS) {
        uint64_t count = shape_count(e.shape);
        out.data = turned = allocate(count, sizeof *turned);
        for (uint64_t i = 0; i < count; i++)
            turned[file_index(e.shape, count, order, i)] = x[i];
    }
    if (written) {
        char *path = text_of("%s/%s.safetensors", h->dump_dir, e.name);
        safetensors_write(path, &out, 1, false);
        free(path);
    }
    if (truth && check_stage(h, truth, out))
        copy_given(x, e.shape, order, truth);
    if (there && last) {                /* nothing more is wanted */
        remove_temporaries();
        exit(hooks_end(h));
    }
    free(turned);
}

/* Shows what is no stage: never written, given or judged. For the tour, which draws attention out of q and k. */
void show(const run *r, const void *data, dtype type, shape s, const char *name)
{
    if (r->hooks && r->hooks->look && data)
        r->hooks->look(r, (st_entry){ name, type, s, data });
}

/* Ends a stage: written to DIR/NAME.safetensors in PyTorch's order, one tensor NAME of the build's own precision;
 * judged and replaced by the truth; the run's end, whatever was asked for. SYSTEM_ERROR where it cannot be written.
 * Names are stages, as in stage_order above. */
void dump(const run *r, tensor x, layout order, const char *name, ...)
{
    FORMATTED(full, name);
    stage_done(r, (st_entry){ full, REAL_TYPE, tensor_shape(x), x.data }, order, x.data);
    free(full);
}

/* The same for data of any type, in PyTorch's order already, which the run does not go on with. */
void dump_data(const run *r, const void *data, dtype type, shape s, const char *name, ...)
{
    FORMATTED(full, name);
    stage_done(r, (st_entry){ full, type, s, data }, AS_IS, NULL);
    free(full);
}
