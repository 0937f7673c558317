/* faults.c - what the program does when the system refuses, anywhere.
 *
 *     faults [-a] [COMMAND...]        -a: every call of every kind; otherwise a sample of each; COMMAND: by number
 *
 * The sources are included with the system's calls under other names, which count, and fail the n-th of a kind. Each
 * command below runs once as it is, then with one fault after another, in a process of its own and a folder that holds
 * an older output. Every run must end, within a minute, in one of two ways:
 *
 *     done        code 0, and the same files and standard output as without the fault
 *     refused     code 3, one line on standard error, the older output untouched; a file that is there is whole; from a
 *                 checkpoint that is left the same command goes on to the same files
 *
 * Faults that a program must overcome (EINTR, short counts) leave only the first; those that lose data only the second.
 * Allocations inside the C library (stdio's, qsort's) are out of reach. Runs from the root of the repository.
 */
#define _DEFAULT_SOURCE     /* madvise */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* ---------------------------------------------------------------- faults */

enum kind { MEMORY, MAP, OPEN, LOOK, LIST, READ, WRITE, SYNC, CLOSE, RENAME, FLUSH, KINDS };
enum { SHORT = -1, CUT = -2 };  /* instead of an errno: one byte is moved; a mapped file is cut to nothing before */
enum ending { DONE_ONLY = 1, REFUSED_ONLY = 2, EITHER = 3 };

static const struct { enum kind kind; const char *name; int error; bool on; enum ending ending; } faults[] = {
    { MEMORY, "memory: ENOMEM", ENOMEM, false, REFUSED_ONLY },      /* on: this call and all after it fail */
    { MAP, "mmap: ENOMEM", ENOMEM, false, REFUSED_ONLY },
    { OPEN, "open: EMFILE", EMFILE, false, REFUSED_ONLY },
    { OPEN, "open: EIO", EIO, true, REFUSED_ONLY },
    { OPEN, "open: EINTR", EINTR, false, DONE_ONLY },
    { LOOK, "stat, access, mkdir: EIO", EIO, false, EITHER },
    { LOOK, "stat, access, mkdir: ENOMEM", ENOMEM, true, EITHER },
    { LIST, "opendir, readdir: EIO", EIO, false, REFUSED_ONLY },
    { READ, "read: EIO", EIO, false, REFUSED_ONLY },
    { READ, "read: EINTR", EINTR, false, DONE_ONLY },
    { READ, "read: a byte", SHORT, true, DONE_ONLY },
    { WRITE, "write: EIO", EIO, false, REFUSED_ONLY },
    { WRITE, "write: ENOSPC", ENOSPC, true, REFUSED_ONLY },
    { WRITE, "write: EPIPE", EPIPE, true, REFUSED_ONLY },
    { WRITE, "write: EINTR", EINTR, false, DONE_ONLY },
    { WRITE, "write: a byte", SHORT, false, DONE_ONLY },
    { SYNC, "fsync: EIO", EIO, false, REFUSED_ONLY },
    { SYNC, "fsync: ENOSPC", ENOSPC, true, REFUSED_ONLY },
    { SYNC, "fsync: EINTR", EINTR, false, DONE_ONLY },
    { CLOSE, "close: EIO", EIO, false, EITHER },
    { CLOSE, "close: EINTR", EINTR, false, DONE_ONLY },
    { RENAME, "rename: EIO", EIO, false, REFUSED_ONLY },
    { RENAME, "rename: ENOSPC", ENOSPC, true, REFUSED_ONLY },
    { FLUSH, "fflush: EIO", EIO, true, REFUSED_ONLY },
    { MEMORY, "a model file cut short", CUT, false, EITHER },
};
enum { FAULTS = sizeof faults / sizeof *faults };

/* Seen by parent and child. */
static struct { long calls[KINDS]; int opened; } *shared;
static int armed = -1;           /* the fault of this process; -1: none */
static long armed_n;             /* 1: the first call of its kind */
static char victim[4096];       /* the file that is cut */

/* The error for this call, which is counted; 0: none. */
static int hit(enum kind kind)
{
    long n = ++shared->calls[kind];
    bool now = armed >= 0 && faults[armed].kind == kind && (n == armed_n || (faults[armed].on && n > armed_n));
    if (now && faults[armed].error == CUT) {
        if (truncate(victim, 0) != 0) abort();
        return 0;
    }
    if (now && faults[armed].error > 0) errno = faults[armed].error;
    return now ? faults[armed].error : 0;
}

static void *try_calloc(size_t count, size_t size) { return hit(MEMORY) ? NULL : calloc(count, size); }
static void *try_realloc(void *at, size_t size) { return hit(MEMORY) ? NULL : realloc(at, size); }
static void *try_aligned(size_t align, size_t size) { return hit(MEMORY) ? NULL : aligned_alloc(align, size); }
static void *try_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset)
{
    return hit(MAP) ? MAP_FAILED : mmap(at, size, protection, flags, fd, offset);
}
static int try_open(const char *path, int flags, int mode)
{
    int fd = hit(OPEN) ? -1 : open(path, flags, mode);
    shared->opened += fd >= 0;
    return fd;
}
static int try_close(int fd)
{
    shared->opened--;           /* an interrupted or failed close has closed, too */
    return close(fd) | (hit(CLOSE) ? -1 : 0);
}
static int try_stat(const char *path, struct stat *about) { return hit(LOOK) ? -1 : stat(path, about); }
static int try_fstat(int fd, struct stat *about) { return hit(LOOK) ? -1 : fstat(fd, about); }
static int try_access(const char *path, int mode) { return hit(LOOK) ? -1 : access(path, mode); }
static int try_mkdir(const char *path, mode_t mode) { return hit(LOOK) ? -1 : mkdir(path, mode); }
static DIR *try_opendir(const char *path) { return hit(LIST) ? NULL : opendir(path); }
static struct dirent *try_readdir(DIR *folder) { return hit(LIST) ? NULL : readdir(folder); }
static ssize_t try_read(int fd, void *to, size_t size)
{
    int error = hit(READ);
    return error > 0 ? -1 : read(fd, to, error == SHORT && size > 0 ? 1 : size);
}
static ssize_t try_write(int fd, const void *from, size_t size)
{
    int error = hit(WRITE);
    return error > 0 ? -1 : write(fd, from, error == SHORT && size > 0 ? 1 : size);
}
static int try_fsync(int fd) { return hit(SYNC) ? -1 : fsync(fd); }
static int try_rename(const char *from, const char *to) { return hit(RENAME) ? -1 : rename(from, to); }
static int try_fflush(FILE *stream) { return stream != stderr && hit(FLUSH) ? EOF : fflush(stream); }

#define calloc(count, size)         try_calloc(count, size)
#define realloc(at, size)           try_realloc(at, size)
#define aligned_alloc(align, size)  try_aligned(align, size)
#define mmap(a, b, c, d, e, f)      try_mmap(a, b, c, d, e, f)
#define OPEN_3(path, flags, mode, ...) try_open(path, flags, mode)
#define open(...)                   OPEN_3(__VA_ARGS__, 0, 0)
#define close(fd)                   try_close(fd)
#define stat(path, about)           try_stat(path, about)
#define fstat(fd, about)            try_fstat(fd, about)
#define access(path, mode)          try_access(path, mode)
#define mkdir(path, mode)           try_mkdir(path, mode)
#define opendir(path)               try_opendir(path)
#define readdir(folder)             try_readdir(folder)
#define read(fd, to, size)          try_read(fd, to, size)
#define write(fd, from, size)       try_write(fd, from, size)
#define fsync(fd)                   try_fsync(fd)
#define rename(from, to)            try_rename(from, to)
#define fflush(stream)              try_fflush(stream)

#include "../io.c"
#include "../tensor.c"
#include "../vae.c"
#include "../dit.c"
#define main ruyi_main
#include "../ruyi.c"
#undef main

#undef calloc
#undef realloc
#undef open
#undef close
#undef stat
#undef opendir
#undef readdir
#undef mkdir
#undef fflush

/* ---------------------------------------------------------------- commands
 *
 * $M is a model folder, which a fault may cut; $I a folder of pictures; $W what earlier commands made; the current
 * folder is empty but for the older outputs. A word "<" names the file for standard input. */

static const char *const commands[] = {
    "-m $M -i $I/a.ppm --size 16x16 --frames 1 --steps 1 -q -o x.y4m",
    "-m $M -i $I/a.ppm --size 16x16 --frames 1 --steps 1 -q -o f-%02d.ppm",
    "-m $M -i - --size 16x16 --frames 1 --steps 1 -q -o - < $I/a.ppm",
    "encode -m $M -i $I/a.ppm -i $I/b.ppm -q -o x.safetensors",
    "encode -m $M -i $I/s-%d.ppm -i $W/clip.y4m:0..1 -q -o x.safetensors",
    "decode -m $M -l $W/latents.safetensors -q -o f-%02d.ppm",
    "decode -m $M -l $W/latents.safetensors -q -o x.y4m",
    "clip -m $M -i $I/a.ppm -q -o x.safetensors",
    "info $M -v",
    "info $W/latents.safetensors",
    "compare $W/dump $W/dump -v",
    "compare $W/dump $W/dump --json",
    "-m $M -i $I/a.ppm --size 16x16 --frames 1 --steps 1 -q --dump d --dump-filter *pred --dump-filter frames",
    "--help",
    "-m $M -i $I/a.ppm --size 16x16 --frames 1 --steps 2 -q --checkpoint k -o x.y4m",
    "tour -m $M -i $I/a.ppm --size 16x16 --frames 1 --steps 1 -q -o x.html",
};
enum { COMMANDS_HERE = sizeof commands / sizeof *commands, WORDS = 40, MOST = 64 };

static const char *root;        /* of the repository */
static char *top;               /* a new folder: out/ model/ in/ work/ stdout stderr */
static long passed, failed;

/* All of a folder below top, or one file: names and bytes. */
typedef struct { char *name; unsigned char *bytes; size_t size; } content;
typedef struct { content list[MOST]; int count; } contents;

static char *spell(const char *format, ...) PRINTF(1, 2);
static char *spell(const char *format, ...)
{
    char text[8192];
    va_list args;
    va_start(args, format);
    int length = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    char *copy = malloc((size_t)length + 1);
    return copy ? memcpy(copy, text, (size_t)length + 1) : (abort(), NULL);
}

/* Without the measured times of a page, which are never the same. */
static void forget_times(content *c)
{
    size_t kept = 0;
    bool time = false;
    for (size_t i = 0; i < c->size; i++) {
        time = memcmp(c->bytes + i, "<time", 5) == 0 || (time && memcmp(c->bytes + i, "</time", 6) != 0);
        if (!time) c->bytes[kept++] = c->bytes[i];
    }
    c->size = kept;
}

static content content_of(const char *path, const char *name)
{
    FILE *f = fopen(path, "rb");
    content c = { spell("%s", name), malloc(1 << 20), 0 };
    if (!f || !c.bytes) abort();
    c.size = fread(c.bytes, 1, (1 << 20) - 8, f);
    fclose(f);
    if (strstr(name, ".html")) forget_times(&c);
    return c;
}

static void contents_read(contents *c, const char *folder, const char *prefix)
{
    DIR *d = opendir(folder);
    for (struct dirent *e; d && (e = readdir(d));) {
        struct stat about;
        char *path = spell("%s/%s", folder, e->d_name), *name = spell("%s%s", prefix, e->d_name);
        if (e->d_name[0] != '.' && stat(path, &about) == 0) {
            if (S_ISDIR(about.st_mode)) {
                char *below = spell("%s/", name);
                contents_read(c, path, below);
                (free)(below);
            } else if (c->count < MOST) c->list[c->count++] = content_of(path, name);
        }
        (free)(path), (free)(name);
    }
    if (d) closedir(d);
}

static void contents_free(contents *c)
{
    while (c->count > 0) c->count--, (free)(c->list[c->count].name), (free)(c->list[c->count].bytes);
}

static void write_file(const char *path, const void *bytes, size_t size)
{
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(bytes, 1, size, f) != size || fclose(f) != 0) {
        perror(path);
        exit(SYSTEM_ERROR);
    }
}

/* The folder of every run: nothing but older outputs. */
static void renew(void)
{
    static const char *const older[] = { "x.y4m", "x.safetensors", "f-00.ppm" };
    contents left = {0};
    char *out = spell("%s/out", top), *dumps = spell("%s/out/d", top);
    contents_read(&left, out, "");
    for (int i = 0; i < left.count; i++) {
        char *path = spell("%s/%s", out, left.list[i].name);
        unlink(path);
        (free)(path);
    }
    contents_free(&left);
    rmdir(dumps);
    for (int i = 0; i < 3; i++) {
        char *path = spell("%s/%s", out, older[i]);
        write_file(path, "older", 5);
        (free)(path);
    }
    (free)(out), (free)(dumps);
}

/* The command's words, with its folders; "< FILE" becomes standard input. */
static int words_of(const char *command, char **words)
{
    int count = 0;
    words[count++] = spell("ruyi");
    for (const char *p = command; *p; p += strspn(p, " ")) {
        int length = (int)strcspn(p, " "), skip = *p == '$' ? 2 : 0;
        const char *folder = skip == 0 ? "" : p[1] == 'M' ? "model" : p[1] == 'I' ? "in" : "work";
        words[count++] = skip ? spell("%s/%s%.*s", top, folder, length - skip, p + skip) : spell("%.*s", length, p);
        p += length;
        if (count < 3 || strcmp(words[count - 2], "<") != 0) continue;
        int fd = (open)(words[count - 1], O_RDONLY);
        if (fd != STDIN_FILENO) dup2(fd, STDIN_FILENO), (close)(fd);
        count -= 2;
    }
    words[count] = NULL;
    return count;
}

static void redirect(const char *name, int to)
{
    char *path = spell("%s/%s", top, name);
    int fd = (open)(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (fd < 0 || dup2(fd, to) != to) abort();
    (close)(fd);
    (free)(path);
}

/* One run in a child; returns what waitpid says of its end. fresh: in a folder without a checkpoint. */
static int run_command(const char *command, int with, long n, bool fresh)
{
    if (fresh) renew();
    memset(shared, 0, sizeof *shared);
    fflush(NULL);               /* the child must not write it again */
    pid_t child = fork();
    if (child == 0) {
        char *words[WORDS], *out = spell("%s/out", top);
        redirect("stdout", STDOUT_FILENO);
        redirect("stderr", STDERR_FILENO);
        int count = words_of(command, words);
        if (chdir(out) != 0) abort();
        alarm(60);
        armed = with, armed_n = n;
        int code = ruyi_main(count, words);
        armed = -1;
        exit(code);
    }
    int status = -1;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR);
    return status;
}

/* What a run without faults leaves. */
typedef struct { contents files; content out, err; long calls[KINDS]; } reference;

static bool same_bytes(const content *a, const void *bytes, size_t size) { return a->size == size && memcmp(a->bytes, bytes, size) == 0; }

static const content *find(const contents *c, const char *name)
{
    for (int i = 0; i < c->count; i++)
        if (strcmp(c->list[i].name, name) == 0) return &c->list[i];
    return NULL;
}

/* Without the plan at the end, which tells the time and free memory of that moment. */
static content read_back(const char *name)
{
    static const char plan[] = "plan: ";
    char *path = spell("%s/%s", top, name);
    content c = content_of(path, name);
    for (size_t i = 0; i + sizeof plan <= c.size; i++)
        if (memcmp(c.bytes + i, plan, sizeof plan - 1) == 0) c.size = i;
    (free)(path);
    return c;
}

/* NULL, or what is wrong with how a run ended. */
static const char *judge_run(int status, const reference *want, const contents *files, const content *out, const content *err, int with)
{
    bool cut = faults[with].error == CUT;
    if (!WIFEXITED(status)) return WTERMSIG(status) == SIGALRM ? "hangs" : "ends with a signal";
    int code = WEXITSTATUS(status);
    if (code == DONE) {
        if (!(faults[with].ending & DONE_ONLY)) return "goes on";
        if (shared->opened != 0) return "leaves a file open";
        if (files->count != want->files.count || !same_bytes(&want->out, out->bytes, out->size)) return "makes something else";
        if (!same_bytes(&want->err, err->bytes, err->size)) return "says something else";
        for (int i = 0; i < files->count; i++) {
            const content *is = &files->list[i], *was = find(&want->files, is->name);
            if (!was || !same_bytes(was, is->bytes, is->size)) return "makes other bytes";
        }
        return NULL;
    }
    if (code != SYSTEM_ERROR && !(cut && code == BAD_INPUT)) return "has another exit code";
    if (!(faults[with].ending & REFUSED_ONLY)) return "gives up";
    if (err->size < 8 || memcmp(err->bytes, "ruyi: ", 6) != 0) return "says nothing";
    for (size_t i = 0; i < err->size; i++)
        if ((err->bytes[i] == '\n') != (i + 1 == err->size) || (err->bytes[i] < ' ' && err->bytes[i] != '\n')) return "says more than a line";
    if (out->size > want->out.size || memcmp(out->bytes, want->out.bytes, out->size) != 0) return "prints something else";
    for (int i = 0; i < files->count; i++) {
        const content *is = &files->list[i], *was = find(&want->files, is->name);
        if (strcmp(is->name, "k") == 0) continue;   /* a checkpoint: resumed is what follows */
        if (!was || (!same_bytes(was, is->bytes, is->size) && !same_bytes(is, "older", 5))) return "leaves something";
    }
    const char *const older[] = { "x.y4m", "x.safetensors", "f-00.ppm" };
    for (int i = 0; i < 3; i++)
        if (!find(files, older[i])) return "takes an older file away";
    return NULL;
}

static void try_fault(int number, const char *command, const reference *want, int with, long n)
{
    static const char *const parts[] = { "vae/diffusion_pytorch_model", "transformer/diffusion_pytorch_model", "image_encoder/model" };
    content whole = {0};
    if (faults[with].error == CUT) {
        snprintf(victim, sizeof victim, "%s/model/%s.safetensors", top, parts[n % 3]);
        whole = content_of(victim, victim);
    }
    int status = run_command(command, with, n, true);
    if (faults[with].error == CUT) write_file(victim, whole.bytes, whole.size), (free)(whole.name), (free)(whole.bytes);
    char *path = spell("%s/out", top);
    contents files = {0};
    contents_read(&files, path, "");
    content out = read_back("stdout"), err = read_back("stderr");
    const char *wrong = judge_run(status, want, &files, &out, &err, with);
    if (wrong) printf("FAILED faults %d (%s), %s, call %ld: %s (status %x): %.*s\n", number, command, faults[with].name, n, wrong,
                      (unsigned)status, err.size > 300 ? 300 : (int)err.size, (char *)err.bytes);
    wrong ? failed++ : passed++;
    if (find(&files, "k")) {    /* the same command goes on from it, to the same bytes */
        contents after = {0};
        status = run_command(command, -1, 0, false);
        contents_read(&after, path, "");
        bool resumed = WIFEXITED(status) && WEXITSTATUS(status) == DONE && after.count == want->files.count;
        for (int i = 0; resumed && i < after.count; i++) {
            const content *was = find(&want->files, after.list[i].name);
            resumed = was && same_bytes(was, after.list[i].bytes, after.list[i].size);
        }
        if (!resumed) printf("FAILED faults %d (%s), %s, call %ld: does not go on (status %x)\n", number, command, faults[with].name, n, (unsigned)status);
        resumed ? passed++ : failed++;
        contents_free(&after);
    }
    contents_free(&files);
    (free)(out.name), (free)(out.bytes), (free)(err.name), (free)(err.bytes), (free)(path);
}

/* All n, or the first two, the last, and some between. */
static void try_command(int number, bool all)
{
    const char *command = commands[number];
    reference want = {0};
    int status = run_command(command, -1, 0, true);
    char *path = spell("%s/out", top);
    contents_read(&want.files, path, "");
    want.out = read_back("stdout"), want.err = read_back("stderr");
    memcpy(want.calls, shared->calls, sizeof want.calls);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0 || shared->opened != 0) {
        printf("FAILED faults %d (%s): without a fault: status %x, %d files open: %.*s\n", number, command, (unsigned)status, shared->opened,
               (int)want.err.size, (char *)want.err.bytes);
        failed++;
        return;
    }
    if (all) {
        fprintf(stderr, "%d (%s):", number, command);
        for (int with = 0; with < FAULTS; with++) fprintf(stderr, " %s x %ld,", faults[with].name, want.calls[faults[with].kind]);
        fprintf(stderr, "\n");
    }
    for (int with = 0; with < FAULTS; with++) {
        long count = want.calls[faults[with].kind], stride = all || count < 6 ? 1 : count / 2;
        for (long n = 1; n <= count; n = n == 1 ? 1 + stride : n + stride) try_fault(number, command, &want, with, n);
        if (stride > 1) try_fault(number, command, &want, with, count), try_fault(number, command, &want, with, 2);
    }
    contents_free(&want.files);
}

int main(int argc, char **argv)
{
    char folder[] = "/tmp/ruyi-faults-XXXXXX", here[4096];
    bool all = argc > 1 && strcmp(argv[1], "-a") == 0;
    root = getcwd(here, sizeof here);
    top = mkdtemp(folder);
    char *page = top ? spell("%s/shared", top) : NULL;
    int fd = page ? (open)(page, O_RDWR | O_CREAT, 0600) : -1;
    bool sized = fd >= 0 && ftruncate(fd, sizeof *shared) == 0;
    shared = sized ? (mmap)(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : MAP_FAILED;
    if (!root || shared == MAP_FAILED) return perror("faults"), SYSTEM_ERROR;
    char *setup = spell("cd %s && mkdir out in work work/dump && cp -RL '%s/tests/golden/extra/models/s2' model && "
                        "cp '%s/tests/golden/pictures/24x16-68.ppm' in/a.ppm && "
                        "cp '%s/tests/golden/pictures/24x16-69.ppm' in/b.ppm && cp in/a.ppm in/s-0.ppm && cp in/b.ppm in/s-1.ppm", top, root, root, root);
    if (system(setup) != 0) return SYSTEM_ERROR;
    float numbers[16 * 2 * 2 * 2] = {0};
    char *latents = spell("%s/work/latents.safetensors", top), *one = spell("%s/work/dump/a.safetensors", top),
         *two = spell("%s/work/dump/b.safetensors", top);
    safetensors_write(latents, &(st_entry){ "latents", F32, SHAPE(16, 2, 2, 2), numbers }, 1, true);
    safetensors_write(one, &(st_entry){ "a", F32, SHAPE(3), numbers }, 1, true);
    safetensors_write(two, &(st_entry){ "b", F32, SHAPE(3), numbers }, 1, true);
    image a;
    size_t used, n;
    char reason[REASON], *picture = spell("%s/in/a.ppm", top), *clip_name = spell("%s/work/clip.y4m", top);
    unsigned char *bytes = read_all(picture, STREAM_BYTES, &n);
    if (!ppm_parse(bytes, n, &used, &a, reason)) return SYSTEM_ERROR;
    output *clip_out = output_open(clip_name, a.w, a.h);
    output_frame(clip_out, a.rgb), output_frame(clip_out, a.rgb), output_close(clip_out);
    for (int i = 0; i < COMMANDS_HERE; i++) {
        bool asked = argc - all < 2;
        for (int k = 1 + all; k < argc; k++) asked |= atoi(argv[k]) == i;
        if (asked) try_command(i, all);
        fflush(stdout);
    }
    char *removal = spell("rm -rf %s", top);
    if (system(removal) != 0) return SYSTEM_ERROR;
    printf("%ld passed, %ld failed\n", passed, failed);
    return failed ? DIFFERS : DONE;
}
