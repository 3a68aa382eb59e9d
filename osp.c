// ============================================================================================================
// osp.c: OSP-Next, a sparse video diffusion transformer, in one file (paper: arXiv 2605.28691)
// ============================================================================================================
// A text-to-video DiT (Wan2.1's architecture) in which most blocks attend sparsely, trained with 8-bit numbers, run on
// several ranks with a quarter of the usual communication in sparse blocks, and improved by reinforcement learning: all
// of the method is here, forward and backward by hand. test_osp.c proves it, osp_cuda.cu runs it on a GPU. Not here:
// the real model's text encoder and VAE (weights_export.py runs them), downloads, and speed at any price.
//
//   caption ─ words, table or UMT5 ─► text [text_len, text_dim] ─► Linear, GELU, Linear ─► context [text_len, dim] ──┐
//   timestep t = 1000σ ─► sin, cos ─► Linear, SiLU, Linear ─► e [dim] ─► SiLU, Linear ─► e0 [6, dim] ──────┐         │
//                                                                                                          ▼         ▼
//   latent [C, T, 2H, 2W] ─► 2x2 patches ─► x [N, dim] ─► block ─► block ─► block ─► ... ─► head ─► v [C, T, 2H, 2W]
//                                                         full     token    group
//   block:  x += gate1 · SelfAttention(LN(x)(1 + scale1) + shift1)      full, token-wise or group-wise (section 5)
//           x += CrossAttention(LN(x), context)
//           x += gate2 · FFN(LN(x)(1 + scale2) + shift2)                shift, scale, gate = modulation + e0
//   head:   v = Linear(LN(x)(1 + scale) + shift)                        shift, scale = head.modulation + e
//
// Letters, in every comment: B samples, C channels, T x H x W token grid (T frames, H x W patches), N = T·H·W tokens,
// dim, D = dim, P sparse ratio (P² subsequences), R ranks, n = tokens of a sample that this rank holds, L blocks,
// F full ones, σ noise level from 1 (noise) to 0 (data), v velocity from data to noise, S sampling steps, G group size.
// "spec §4" is a section of golden/spec.md, which states the same method as formulas.
//
//    1 tools    2 HiF8    3 files    4 operations: declared once, CPU bodies    5 Skiparse-2D    6 the model as data
//    7 ranks    8 the DiT, forward and backward    9 the small world and ShapesBench    10 flow matching and training
//   11 Mix-GRPO    12 pictures    13 checkpoints    14 commands
//
// Build: cc -O3 -march=native -fopenmp osp.c -o osp -lm (make says what else it finds). Valid C11 and C++17.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#else
#pragma GCC diagnostic ignored "-Wunknown-pragmas"
#endif
#ifdef OSP_MPI
#include <mpi.h>
#endif

static void wait_for_rank_0(void);       // section 7
static void abort_ranks(void);
// ============================================================================================================
// 1. Tools: errors, memory, random numbers, time
// ============================================================================================================

// One line that says what, where and what to do; exit code 2 (bad use or bad input).
__attribute__((noreturn, format(printf, 1, 2)))
static void die(const char *format, ...) {
    va_list args;
    wait_for_rank_0();                                       // on many ranks the first one says what all have to say
    va_start(args, format);
    fflush(stdout);
    fputs("osp: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    abort_ranks();
    exit(2);
}

// Host memory, zeroed.
static void *xalloc(size_t count, size_t size) {
    void *p = calloc(count ? count : 1, size ? size : 1);
    if (!p) die("out of memory: %zu x %zu bytes asked for; use a smaller size or batch", count, size);
    return p;
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Random numbers without state: a hash of (seed, stream, index). Any number of threads or ranks, and a run resumed
// in the middle, draw the same values, because a draw depends on nothing but its name.
static uint64_t rng_bits(uint64_t seed, uint64_t stream, uint64_t index) {
    uint64_t z = seed * 0x9E3779B97F4A7C15ull + stream * 0xD1B54A32D192ED03ull + 0x8CB92BA72F3D8DD7ull;
    for (int round = 0; round < 2; round++) {                    // splitmix64's finaliser, once for the names ...
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        z ^= z >> 31;
        if (round == 0) z += (index + 1) * 0x9E3779B97F4A7C15ull; // ... and once with the index
    }
    return z;
}

// Streams with many members begin here: one for each tensor.
enum { WEIGHT_STREAM = 1000, LORA_STREAM = 5000 };

static double rng_uniform(uint64_t seed, uint64_t stream, uint64_t index) {   // in (0, 1)
    return ((double)(rng_bits(seed, stream, index) >> 11) + 0.5) * 0x1p-53;
}

static float rng_normal(uint64_t seed, uint64_t stream, uint64_t index) {     // Box-Muller
    double u = rng_uniform(seed, stream, 2 * index), v = rng_uniform(seed, stream, 2 * index + 1);
    return (float)(sqrt(-2.0 * log(u)) * cos(2 * M_PI * v));
}
// ============================================================================================================
// 2. HiF8: an 8-bit float whose precision tapers (arXiv 2409.16626; spec §6)
// ============================================================================================================
// One byte: sign S, a prefix-coded "dot" that says how many exponent bits follow, exponent, mantissa.
//
//        7   6 5 4 3 2 1 0       |E|       mantissa bits    E's field: its sign, then |E| below its leading 1
//      +---+---------------+
//      | S | 1 1 s e e e m |   8 .. 15         1
//      | S | 1 0 s e e m m |   4 ..  7         2
//      | S | 0 1 s e m m m |   2 ..  3         3           value = ±2^E · 1.mmm
//      | S | 0 0 1 s m m m |      1            3
//      | S | 0 0 0 1 m m m |      0            3
//      | S | 0 0 0 0 M M M |  −22 .. −16       0           value = ±2^(M−23), M = 1..7
//      +---+---------------+
//      0x00 zero, 0x80 NaN, 0x6F +Inf, 0xEF −Inf.   Largest 2^15, smallest 2^−22: 38 binades in 8 bits.
//
// Values near 1 get 3 mantissa bits, far ones fewer: a network's numbers cluster, so the bits sit where they are used.
#ifdef __CUDACC__
#define EVERYWHERE static inline __host__ __device__
#else
#define EVERYWHERE static inline
#endif

EVERYWHERE uint32_t float_bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
EVERYWHERE float bits_float(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

// Round to the nearest HiF8 value, ties away from zero ("TA"), on the bits of a float: keep m of the 23 mantissa bits
// after adding half of the last one kept; a carry moves into the exponent by itself, which is just what rounding wants.
EVERYWHERE float hif8_round(float x) {
    uint32_t u = float_bits(x), a = u & 0x7FFFFFFFu;
    int E = (int)(a >> 23) - 127, size = E < 0 ? -E : E;
    uint32_t drop = 20u + (size > 3) + (size > 7) + (size > 15);       // 23 − m
    drop = drop > 23u ? 23u : drop;
    uint32_t r = (a + (1u << (drop - 1))) & (0u - (1u << drop));
    r = a < 0x34800000u ? (a < 0x34000000u ? 0u : 0x34800000u) : r;    // [2^-23, 2^-22) -> 2^-22, below -> 0
    r = a >= 0x47200000u ? 0x7F800000u : r;                            // >= 40960 = 1.25·2^15 -> Inf
    r = a > 0x7F800000u ? a : r;                                       // NaN stays
    return bits_float(r ? r | (u & 0x80000000u) : 0u);                 // there is one zero
}

// The code of the nearest value.
static uint8_t hif8_encode(float x) {
    uint32_t u = float_bits(hif8_round(x)), a = u & 0x7FFFFFFFu, sign = u >> 31 << 7;
    if (a > 0x7F800000u) return 0x80;
    if (a == 0x7F800000u) return (uint8_t)(sign | 0x6F);
    if (a == 0) return 0x00;
    int E = (int)(a >> 23) - 127, size = E < 0 ? -E : E;
    uint32_t s = E < 0, mantissa = a >> 20 & 7;
    if (E <= -16)  return (uint8_t)(sign | (uint32_t)(E + 23));
    if (size == 0) return (uint8_t)(sign | 0x08 | mantissa);
    if (size == 1) return (uint8_t)(sign | 0x10 | s << 3 | mantissa);
    if (size <= 3) return (uint8_t)(sign | 0x20 | s << 4 | (uint32_t)(size - 2) << 3 | mantissa);
    if (size <= 7) return (uint8_t)(sign | 0x40 | s << 4 | (uint32_t)(size - 4) << 2 | mantissa >> 1);
    return (uint8_t)(sign | 0x60 | s << 4 | (uint32_t)(size - 8) << 1 | mantissa >> 2);
}

static float hif8_decode(uint8_t code) {
    int c = code & 0x7F;
    float sign = code & 0x80 ? -1.0f : 1.0f;
    if (code == 0x80) return NAN;
    if (c == 0) return 0.0f;
    if (c == 0x6F) return sign * INFINITY;
    if (c < 0x08) return sign * ldexpf(1.0f, c - 23);
    int dot = c >= 0x60 ? 3 : c >= 0x40 ? 2 : c >= 0x20 ? 1 : 0;       // bits of |E| below its leading 1
    int bits = dot == 3 ? 1 : dot == 2 ? 2 : 3;                        // mantissa bits
    int size = c < 0x10 ? 0 : (1 << dot) + (c >> bits & ((1 << dot) - 1));
    int negative = c < 0x10 ? 0 : c >> (bits + dot) & 1;
    float mantissa = 1.0f + (float)(c & ((1 << bits) - 1)) / (float)(1 << bits);
    return sign * ldexpf(mantissa, negative ? -size : size);
}

// Q(x; s) = hif8(x·k)/k, k = s/max|x|: a tensor scaled so that its largest magnitude meets the format at s. Forward
// 15 = 1.875·2^3, the top of the binades with 3 mantissa bits; for gradients 224 = 1.75·2^7, the top of those with 2:
// a bit less for the largest values, four more binades below for the many small ones.
EVERYWHERE float hif8_scale(float s, float amax) { return s / (amax < 1e-8f ? 1e-8f : amax); }
// ============================================================================================================
// 3. Files: written whole or not at all; safetensors in and out
// ============================================================================================================
// An output file grows under a temporary name beside its target and takes the target's name when all of it is on the
// disk: whoever stops the program finds the old file or the new one. The path "-" is stdout.
typedef struct { char path[PATH_MAX], temp[PATH_MAX]; FILE *file; } Output;

static void output_drop(Output *o) {
    if (o->file == stdout) return;
    fclose(o->file);
    unlink(o->temp);
}

static void output_failed(Output *o) {
    int why = errno;
    output_drop(o);
    die("cannot write %s: %s; make room or choose another path", o->path, strerror(why));
}

static void output_open(Output *o, const char *path) {
    struct stat s;
    size_t length = strlen(path);
    if (!strcmp(path, "-")) { strcpy(o->path, "to stdout"), o->file = stdout; return; }
    if (!length || path[length - 1] == '/' || (!stat(path, &s) && !S_ISREG(s.st_mode)))
        die("cannot write '%s': not a regular file; give the name of a file", path);
    if (!realpath(path, o->path)) snprintf(o->path, PATH_MAX, "%s", path);   // a link stays, its target is replaced
    if (snprintf(o->temp, PATH_MAX, "%s.%ld.tmp", o->path, (long)getpid()) >= PATH_MAX)
        die("cannot write %.60s...: the name is too long; choose a shorter one", path);
    unlink(o->temp);                                                         // left by a killed process of our number
    o->file = fopen(o->temp, "wbx");
    if (!o->file) die("cannot write %s: %s; create its folder or choose another path", path, strerror(errno));
    signal(SIGXFSZ, SIG_IGN);                                                // a file size limit: a failed write
}

static void output_bytes(Output *o, const void *data, size_t size) {
    if (fwrite(data, 1, size, o->file) != size) output_failed(o);
}

static void output_close(Output *o) {
    if (fflush(o->file)) output_failed(o);
    if (o->file == stdout) return;
    if (fsync(fileno(o->file)) || rename(o->temp, o->path)) output_failed(o);
    fclose(o->file);
}

// Before work starts: can path be written at its end? What stands there is not touched.
static void check_writable(const char *path) {
    Output o;
    output_open(&o, path);
    output_drop(&o);
}

// ---- safetensors --------------------------------------------------------------------------------------------------
// Eight bytes hold n; then come n bytes of JSON, the header, and then the data:
//
//      {"__metadata__":{"dim":"64",..}, "NAME":{"dtype":"BF16","shape":[64,64],"data_offsets":[0,8192]}, ..}
//
// Whoever wrote the file, nothing outside it is read: numbers are checked for overflow, names are unique, the tensors
// tile the data without hole or overlap, and the file ends where they end. HiF8 is a U8 tensor of codes and NAME.scale
// = k, an F32; a value is hif8(code)/k, exactly Q(x; 15) of section 2. Data may start at any byte, so it is copied out,
// never cast. Little-endian machines only.
typedef struct {
    const char *name;
    char dtype[8];
    int rank;
    size_t shape[8], count, begin, bytes;  // count values in the data's bytes [begin, begin + bytes)
    const uint8_t *data;
} FileTensor;

typedef struct { const char *key; const void *value; } Entry;

typedef struct {
    const char *path;                      // the caller's string
    uint8_t *map;                          // the whole file
    size_t size;
    char error[256];                       // the first complaint; empty: none
    FileTensor *tensors;                   // in the order of their data
    int count, pairs;
    Entry *by_name, *by_key;               // the tensors and __metadata__, sorted
    char *header, *at;                     // a copy of the header, whose strings end in 0; where the parser stands
    const char *part;                      // and in which tensor
} File;

__attribute__((format(printf, 2, 3)))
static bool complain(char error[256], const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(error, 256, format, args);
    va_end(args);
    return false;
}

// ---- a strict reader of the JSON that a header can hold -----------------------------------------------------------
// No call looks at what another returned: after the first complaint json_each ends every loop, and the copy ends with a
// 0, which no rule accepts, so that no step can leave it. Nothing recurses.
static void expected(File *f, const char *what) {
    if (*f->error) return;                                                   // what follows is a consequence
    complain(f->error, "%.100s, byte %zu of the file: expected %s", f->part, (size_t)(f->at - f->header) + 8, what);
}

static char json_peek(File *f) {
    f->at += strspn(f->at, " \t\n\r");
    return *f->at;
}

static void json_take(File *f, char c) {
    char what[4] = {'\'', c, '\'', 0};
    if (json_peek(f) == c) f->at++; else expected(f, what);
}

// Is there an element i? Takes the opening bracket before the first, a comma before any other, or the closing bracket.
static bool json_each(File *f, const char *brackets, int i) {
    if (i == 0) json_take(f, brackets[0]);
    bool closed = json_peek(f) == brackets[1];
    if (closed || i > 0) json_take(f, closed ? brackets[1] : ',');
    return !closed && !*f->error;
}

static int json_numbers(File *f, size_t *out, int most) {                    // [a, b, ..]; returns how many
    int n = 0;
    for (; json_each(f, "[]", n); n++) {
        bool digit = isdigit((unsigned char)json_peek(f));
        errno = 0;
        if (n == most) expected(f, "fewer numbers");
        else if (!digit || (*f->at == '0' && isdigit((unsigned char)f->at[1]))) expected(f, "a whole number");
        else out[n] = strtoull(f->at, &f->at, 10);
        if (errno) expected(f, "a number below 2^64 before this");
    }
    return n;
}

// A string as it is written: an escape must not end it, and stays. Names have none, or two could look different and be
// the same; the values of __metadata__ may.
static const char *json_string(File *f, bool value) {
    json_take(f, '"');
    char *start = f->at;
    for (; !*f->error && *f->at != '"'; f->at++) {
        bool plain = (unsigned char)*f->at >= 0x20 && *f->at != '\\';
        if (*f->at == '\\' && value && f->at[1] > 0) f->at++;
        else if (!plain) { expected(f, "a plain character"); break; }       // and stay: this may be the final 0
    }
    if (*f->error) return "";
    *f->at++ = 0;
    return start;
}

// ---- the header ---------------------------------------------------------------------------------------------------
static size_t dtype_bytes(const char *dtype) {                               // 0: unknown
    if (!strcmp(dtype, "F32") || !strcmp(dtype, "I32")) return 4;
    return !strcmp(dtype, "BF16") || !strcmp(dtype, "F16") ? 2 : !strcmp(dtype, "U8");
}

static bool parse_tensor(File *f, const char *name) {
    FileTensor *t = &f->tensors[f->count++];
    const char *dtype = "";
    size_t offsets[2] = {0, 0};
    int fields = 0, seen = 0, ends = 0;
    for (t->name = name; json_each(f, "{}", fields); fields++) {
        const char *key = json_string(f, false);
        json_take(f, ':');
        if (!strcmp(key, "dtype")) seen |= 1, dtype = json_string(f, false);
        else if (!strcmp(key, "shape")) seen |= 2, t->rank = json_numbers(f, t->shape, 8);
        else if (!strcmp(key, "data_offsets")) seen |= 4, ends = json_numbers(f, offsets, 2);
        else expected(f, "dtype, shape or data_offsets before this");
    }
    if (fields != 3 || seen != 7 || ends != 2) expected(f, "dtype, shape and two data_offsets before this, each once");
    if (*f->error) return false;
    if (!dtype_bytes(dtype))
        return complain(f->error, "tensor %.100s: found dtype %.20s, expected F32, BF16, F16 or U8", name, dtype);
    strcpy(t->dtype, dtype);
    t->count = 1;
    for (int i = 0; i < t->rank; t->count *= t->shape[i++])
        if (t->shape[i] && t->count > SIZE_MAX / 8 / t->shape[i])
            return complain(f->error, "tensor %.100s: its shape overflows 64 bits", name);
    t->begin = offsets[0];
    t->bytes = t->count * dtype_bytes(dtype);
    if (offsets[0] <= offsets[1] && offsets[1] - offsets[0] == t->bytes) return true;
    return complain(f->error, "tensor %.100s: found data_offsets [%zu,%zu], expected %zu bytes of %s", name,
                    offsets[0], offsets[1], t->bytes, dtype);
}

static void parse_header(File *f, const uint8_t *data, size_t n) {
    const size_t tensors = n / 40 + 2, pairs = n / 5 + 2;                    // the fewest characters that each can take
    bool metadata = false;
    f->part = "header";
    f->header = f->at = (char *)xalloc(n + 1, 1);
    f->tensors = (FileTensor *)xalloc(tensors, sizeof(FileTensor));
    f->by_name = (Entry *)xalloc(tensors, sizeof(Entry));
    f->by_key = (Entry *)xalloc(pairs, sizeof(Entry));
    memcpy(f->header, data, n);
    for (int i = 0; json_each(f, "{}", i); i++, f->part = "header") {
        const char *name = f->part = json_string(f, false);
        json_take(f, ':');
        if (strcmp(name, "__metadata__")) { parse_tensor(f, name); continue; }
        if (metadata) expected(f, "__metadata__ once");
        metadata = true;
        for (int j = 0; json_each(f, "{}", j); j++) {
            Entry *e = &f->by_key[f->pairs++];
            e->key = json_string(f, false);
            json_take(f, ':');
            e->value = json_string(f, true);
        }
    }
    if (json_peek(f) || f->at != f->header + n) expected(f, "only spaces after the last '}'");
}

static int compare_entries(const void *a, const void *b) {
    return strcmp(((const Entry *)a)->key, ((const Entry *)b)->key);
}

static int compare_places(const void *a, const void *b) {                    // an empty tensor before its neighbour
    const FileTensor *s = (const FileTensor *)a, *t = (const FileTensor *)b;
    return s->begin != t->begin ? (s->begin < t->begin ? -1 : 1) : s->bytes < t->bytes ? -1 : s->bytes > t->bytes;
}

static bool sort_entries(char error[256], Entry *table, int count) {
    qsort(table, (size_t)count, sizeof *table, compare_entries);
    for (int i = 1; i < count; i++)
        if (!strcmp(table[i - 1].key, table[i].key)) return complain(error, "name %.100s stands twice", table[i].key);
    return true;
}

// The tensors must tile the data, data[size]; their names and those of the metadata must differ.
static bool check_layout(File *f, const uint8_t *data, size_t size) {
    size_t end = 0;
    qsort(f->tensors, (size_t)f->count, sizeof *f->tensors, compare_places);
    for (int i = 0; i < f->count; i++) {
        FileTensor *t = &f->tensors[i];
        if (t->begin != end)
            return complain(f->error, "tensor %.100s: found its data at %zu, expected %zu (%s)", t->name, t->begin, end,
                            t->begin < end ? "an overlap" : "a hole");
        end += t->bytes;
        if (end > size) break;
        t->data = data + t->begin;
        f->by_name[i].key = t->name;
        f->by_name[i].value = t;
    }
    if (end != size)
        return complain(f->error, "%s: found %zu bytes of data, but the tensors take %zu", end > size ? "cut short" :
                        "too long", size, end);
    return sort_entries(f->error, f->by_name, f->count) && sort_entries(f->error, f->by_key, f->pairs);
}

static void file_close(File *f) {
    free(f->header), free(f->tensors), free(f->by_name), free(f->by_key);
    if (f->map) munmap(f->map, f->size);
    f->header = NULL, f->tensors = NULL, f->by_name = f->by_key = NULL, f->map = NULL;
}

// f from the bytes of a file, which must outlive it. False: f->error says what and where, and nothing stays allocated.
static bool parse_safetensors(File *f, const uint8_t *data, size_t size) {
    uint64_t n = 0;
    memset(f, 0, sizeof *f);
    f->size = size;
    if (size >= 8) memcpy(&n, data, 8);
    if (n < 2 || n > 100000000 || (size > 8 && data[8] != '{'))
        return complain(f->error, "not safetensors: found no header { } of %llu bytes", (unsigned long long)n);
    if (n > size - 8) return complain(f->error, "cut short: found %zu bytes, expected > %zu", size, (size_t)n + 7);
    parse_header(f, data + 8, n);
    if (!*f->error && check_layout(f, data + 8 + n, size - 8 - n)) return true;
    file_close(f);
    return false;
}

// ---- reading ------------------------------------------------------------------------------------------------------
static bool file_load(File *f, const char *path) {
    struct stat s;
    memset(f, 0, sizeof *f);
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);                  // a pipe must not hang it
    if (fd < 0 || fstat(fd, &s)) return complain(f->error, "%s", strerror(errno));
    errno = EINVAL;
    void *map = S_ISREG(s.st_mode) ? mmap(NULL, (size_t)s.st_size, PROT_READ, MAP_PRIVATE, fd, 0) : MAP_FAILED;
    close(fd);
    if (map == MAP_FAILED) return complain(f->error, "empty or not a regular file (%s)", strerror(errno));
    bool ok = parse_safetensors(f, (const uint8_t *)map, (size_t)s.st_size);
    f->path = path;
    if (ok) f->map = (uint8_t *)map; else munmap(map, (size_t)s.st_size);
    return ok;
}

static void file_open(File *f, const char *path) {
    if (!file_load(f, path)) die("%s: %s; check the path, copy the file again or write it again", path, f->error);
}

static const void *lookup(const Entry *table, int count, const char *key) {
    const Entry wanted = {key, NULL}, *hit =
        (const Entry *)bsearch(&wanted, table, (size_t)count, sizeof *table, compare_entries);
    return hit ? hit->value : NULL;
}

static const char *file_meta(const File *f, const char *key) { return (const char *)lookup(f->by_key, f->pairs, key); }

static const FileTensor *file_find(const File *f, const char *name) {
    return (const FileTensor *)lookup(f->by_name, f->count, name);
}

// The tensor's bytes as they are, where it has this dtype and so many values.
static bool read_raw(char error[256], void *out, const FileTensor *t, const char *dtype, size_t count) {
    if (strcmp(t->dtype, dtype) || t->count != count)
        return complain(error, "tensor %.100s: found %zu x %s, expected %zu x %s; write the file again", t->name,
                        t->count, t->dtype, count, dtype);
    if (count) memcpy(out, t->data, t->bytes);
    return true;
}

// A half's exponent has bias 15, a float's 127: moved over, the number is 2^112 too small, subnormal or not.
static float half_to_float(uint32_t h) {
    uint32_t u = float_bits(bits_float((h & 0x7FFF) << 13) * 0x1p112f);
    return bits_float((u >= 0x47800000u ? u | 0x7F800000u : u) | (h & 0x8000) << 16);    // 2^16: Inf and NaN
}

// out[count] = the values of t, from F32, BF16, F16 or HiF8; false where error says why not. For other numbers, or NaN
// on purpose: read_raw.
static bool try_read(char error[256], float *out, const File *f, const FileTensor *t, size_t count) {
    char scale_name[300];
    float k = 1;
    bool u8 = !strcmp(t->dtype, "U8"), bf16 = !strcmp(t->dtype, "BF16"), f16 = !strcmp(t->dtype, "F16");
    if (t->count != count)
        return complain(error, "tensor %.100s: found %zu values, expected %zu; use a file of this model", t->name,
                        t->count, count);
    snprintf(scale_name, sizeof scale_name, "%.280s.scale", t->name);
    const FileTensor *scale = u8 ? file_find(f, scale_name) : NULL;
    if (u8 && !scale) return complain(error, "tensor %.100s: U8 without a .scale; write the file again", t->name);
    if (u8 ? !read_raw(error, &k, scale, "F32", 1) : !bf16 && !f16 && !read_raw(error, out, t, "F32", count))
        return false;
    if (!(k > 0 && isfinite(k)))
        return complain(error, "tensor %.100s: found %g, expected > 0; write the file again", scale_name, (double)k);
    float value[256];
    for (int code = 0; code < 256; code++) value[code] = hif8_decode((uint8_t)code) / k;
    for (size_t i = 0; i < count; i++) {
        uint16_t h = 0;
        if (bf16 || f16) memcpy(&h, t->data + 2 * i, 2);
        if (u8) out[i] = value[t->data[i]];
        else if (bf16) out[i] = bits_float((uint32_t)h << 16);
        else if (f16) out[i] = half_to_float(h);
        if (!isfinite(out[i]))
            return complain(error, "tensor %.100s: value %zu is %g; use an earlier file", t->name, i, (double)out[i]);
    }
    return true;
}

// The values of t on the host, or the end of the program. The caller frees them.
static float *file_read(const File *f, const FileTensor *t, size_t count) {
    char error[256];
    float *out = (float *)xalloc(count, sizeof(float));
    if (!try_read(error, out, f, t, count)) die("%s: %s", f->path, error);
    return out;
}

static float *file_numbers(const File *f, const char *name, size_t count, const char *remedy) {
    const FileTensor *t = file_find(f, name);
    if (!t || t->count != count)
        die("%s: tensor %s is missing or not of %zu numbers; %s", f->path, name, count, remedy);
    return file_read(f, t, count);
}

// ---- writing ------------------------------------------------------------------------------------------------------
// writer_open, writer_meta.., writer_add.., and writer_close, which writes all of it.
typedef struct { const char *name, *dtype; const float *values; size_t count; } Item;

typedef struct {
    Output out;
    FILE *header;                          // in memory: text[length]
    char *text;
    size_t length, bytes;                  // bytes: of all tensors
    Item *items;
    int pairs, lines, count;               // pairs, lines: of the header
} Writer;

static void download(void *host, const void *device, size_t bytes);          // section 4

static void writer_open(Writer *w, const char *path) {
    memset(w, 0, sizeof *w);
    output_open(&w->out, path);
    if (!(w->header = open_memstream(&w->text, &w->length))) output_failed(&w->out);
    fputs("{\"__metadata__\":{", w->header);
}

// What JSON would have to escape becomes '.
static void plain_text(char *s) {
    for (; *s; s++) if ((unsigned char)*s < 0x20 || *s == '"' || *s == '\\') *s = '\'';
}

// A string of __metadata__; before the first tensor.
__attribute__((format(printf, 3, 4)))
static void writer_meta(Writer *w, const char *key, const char *format, ...) {
    char text[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    plain_text(text);
    fprintf(w->header, "%s\"%s\":\"%s\"", w->pairs++ ? "," : "", key, text);
}

// The header's line of a tensor; returns how many values it has.
static size_t header_line(Writer *w, const char *name, const char *suffix, const char *dtype, int rank,
                          const size_t *shape) {
    size_t count = 1, begin = w->bytes;
    fprintf(w->header, "%s\"%s%s\":{\"dtype\":\"%s\",\"shape\":[", w->lines++ ? ",\n" : "},\n", name, suffix, dtype);
    for (int i = 0; i < rank; count *= shape[i++]) fprintf(w->header, i ? ",%zu" : "%zu", shape[i]);
    w->bytes += count * dtype_bytes(dtype);
    fprintf(w->header, "],\"data_offsets\":[%zu,%zu]}", begin, w->bytes);
    return count;
}

// The tensor values[shape] on the device. dtype F32, BF16 or U8, which means HiF8 and writes name.scale too. Name
// (plain ASCII) and values must stay until writer_close.
static void writer_add(Writer *w, const char *name, const char *dtype, int rank, const size_t *shape,
                       const float *values) {
    const size_t one = 1;
    w->items = (Item *)realloc(w->items, ((size_t)w->count + 1) * sizeof *w->items);
    if (!w->items) output_failed(&w->out);
    Item *item = &w->items[w->count++];
    item->name = name, item->dtype = dtype, item->values = values;
    item->count = header_line(w, name, "", dtype, rank, shape);
    if (!strcmp(dtype, "U8")) header_line(w, name, ".scale", "F32", 1, &one);
}

static uint32_t float_to_bf16(float x) {                                     // to the nearest, ties to even
    uint32_t u = float_bits(x);
    return isnan(x) ? 0x7FC0 : (u + 0x7FFF + (u >> 16 & 1)) >> 16;
}

// The bytes of one tensor. What file_read would refuse is refused here: NaN and Inf.
static void write_item(Output *o, const Item *item) {
    bool u8 = !strcmp(item->dtype, "U8"), bf16 = !strcmp(item->dtype, "BF16");
    size_t width = dtype_bytes(item->dtype), count = item->count;
    float *x = (float *)xalloc(count, sizeof(float)), amax = 0;
    uint8_t *bytes = (uint8_t *)xalloc(count * width + 4, 1);
    download(x, item->values, count * sizeof(float));
    for (size_t i = 0; u8 && i < count; i++) if (isfinite(x[i]) && fabsf(x[i]) > amax) amax = fabsf(x[i]);
    float k = hif8_scale(15.0f, amax);
    for (size_t i = 0; i < count; i++) {
        uint32_t bits = bf16 ? float_to_bf16(x[i]) : u8 ? hif8_encode(x[i] * k) : float_bits(x[i]);
        float y = bf16 ? bits_float(bits << 16) : u8 ? hif8_round(x[i] * k) / k : x[i];
        memcpy(bytes + width * i, &bits, 4);                                 // the next one overwrites what is too much
        if (isfinite(y)) continue;
        output_drop(o);
        die("%s: tensor %s: value %zu is %g, no number of %s; lower --lr or write f32", o->path, item->name, i,
            (double)x[i], item->dtype);
    }
    output_bytes(o, bytes, count * width);
    if (u8) output_bytes(o, &k, 4);
    free(x), free(bytes);
}

static void writer_close(Writer *w) {
    fputc('}', w->header);
    fflush(w->header);
    fprintf(w->header, "%*s", (int)((8 - w->length % 8) % 8), "");           // data start at a multiple of 8
    if (fclose(w->header)) output_failed(&w->out);
    uint64_t n = w->length;
    output_bytes(&w->out, &n, 8);
    output_bytes(&w->out, w->text, w->length);
    for (int i = 0; i < w->count; i++) write_item(&w->out, &w->items[i]);
    output_close(&w->out);
    free(w->items), free(w->text);
}
// ============================================================================================================
// 4. The operations: what a backend provides
// ============================================================================================================
// The model, the sampler and the trainers below call these (and device_all_to_all of section 7) and nothing else: they
// never look inside a tensor. The CPU bodies follow; osp_cuda.cu defines OSP_CUDA, includes this file and has its own.
//
// Two kinds of numbers: `float` for the residual stream, modulations, statistics, master weights and gradients of
// weights; `act` for what enters a matrix product or attention (float on the CPU; float or bfloat16 on a GPU).
// Rows: a batch of B samples with n tokens each is B·n rows; row r belongs to sample r / n.
// Backward: gradients of activations are written, gradients of weights and of the residual stream are added to,
// unless it says otherwise. Every sum has a fixed order: results do not depend on the number of threads.
#ifdef OSP_CUDA
typedef struct act act;                  // opaque: float or __nv_bfloat16, chosen by --device-dtype
#else
typedef float act;
#endif

// A vector of dim numbers for each sample: sample b reads p + b·stride. stride 0: all samples share it.
typedef struct { float *p; size_t stride; } PerSample;

// Ragged sequences that attend within themselves: sequence s has query rows [q[s], q[s+1]) and key rows [k[s], k[s+1]).
typedef struct {
    int count;
    int *q, *k;                          // host, [count + 1], rising from 0; a sequence may be empty
    int *q_device, *k_device;            // the same where the backend computes (on the CPU: the same pointers)
} Sequences;

// ---- memory -------------------------------------------------------------------------------------------------
static void   device_start(const char *dtype, int rank);  // first of all; f32, bf16, or NULL: the backend's choice
static void   wait_device(void);                        // until all that was asked for is done
static void  *device_alloc(size_t bytes);               // zeroed; dies with the number of bytes where there is no room
static void   device_free(void *p);
static size_t act_size(void);                           // bytes of one act
static act   *act_at(act *p, size_t elements);          // p + elements
static void   zero(void *p, size_t bytes);
static void   copy(void *dst, const void *src, size_t bytes);                   // device to device
static void   upload(void *dst, const void *src, size_t bytes);                 // host to device
static void   download(void *dst, const void *src, size_t bytes);               // device to host, waits
static void   to_act(act *y, const float *x, size_t n);                         // y = x, rounded to act
static void   to_float(float *y, const act *x, size_t n);                       // y = x

// ---- matrix products: y[rows, out] = x[rows, in] · w[out, in]^T + b[out] --------------------------------------
// b may be NULL.
static void linear_forward(act *y, const act *x, const act *w, const float *b, size_t rows, int out, int in);
// dx[rows, in] (=, or += where accumulate) dy[rows, out] · w;  dw[out, in] += dy^T · x;  db[out] += Σ_rows dy.
// Each of dx, dw, db may be NULL. dx, dy, x do not overlap.
static void linear_backward(act *dx, float *dw, float *db, const act *dy, const act *x, const act *w, size_t rows,
                            int out, int in, bool accumulate);
// y = gelu(pre), pre = x·w^T + b; gelu(u) = u/2·(1 + tanh(√(2/π)·(u + 0.044715·u³))). pre may be NULL (no backward).
static void linear_gelu_forward(act *y, act *pre, const act *x, const act *w, const float *b, size_t rows, int out,
                                int in);
static void gelu_backward(act *dx, const act *dy, const act *pre, size_t n);    // dx may be dy
static void silu_forward(act *y, const act *x, size_t n);                       // y = x·sigmoid(x)
static void silu_backward(act *dx, const act *dy, const act *x, size_t n);      // dx may be dy

// ---- norms, modulation, residual -------------------------------------------------------------------------------
// out[B, J, dim] = mod[J, dim] + e[B, Je, dim], Je = J or 1: the learned table plus what the timestep says.
static void modulation_forward(float *out, const float *mod, const float *e, int B, int J, int Je, int dim);
static void modulation_backward(float *dmod, float *de, const float *dout, int B, int J, int Je, int dim);   // both +=
// x_out = x + gate·y (y NULL: x_out is not written, and the norm reads x; gate.p NULL: gate 1), then
// h = (x_out − mean)·rstd·(one + scale) + shift, rstd = 1/√(var + eps). stat[rows, 2] keeps mean, rstd. x_out may be x.
// one = 1: modulated LayerNorm; one = 0 with stride 0: LayerNorm with weight `scale` and bias `shift` (norm3).
static void residual_norm_forward(float *x_out, act *h, float *stat, const float *x, const act *y, PerSample gate,
                                  PerSample shift, PerSample scale, float one, int B, size_t n, int dim, float eps);
// From dh: dx += through the norm; dshift += Σ dh, dscale += Σ dh·x̂ over the rows of a sample (over all, stride 0).
static void norm_backward(float *dx, PerSample dshift, PerSample dscale, const act *dh, const float *x,
                          const float *stat, PerSample scale, float one, int B, size_t n, int dim);
// The residual's branch, from dx: dy = gate·dx; dgate += Σ_rows dx·y of each sample (gate.p, dgate.p NULL: gate 1).
static void gate_backward(act *dy, PerSample dgate, const float *dx, const act *y, PerSample gate, int B, size_t n,
                          int dim);
// x_out[j] = x[i] + gate·y[i], i = map[j] (map NULL: i = j; y NULL: no branch); j = 0..count-1, i in B·n rows. The end
// of a block: its residual and the Skiparse rearrangement (or the packing for an exchange) in one pass.
static void residual_gather_forward(float *x_out, const float *x, const act *y, PerSample gate, const int *map,
                                    size_t count, int B, size_t n, int dim);
// dst[j] = src[map[j]], rows of row_bytes each.
static void gather_rows(void *dst, const void *src, const int *map, size_t count, size_t row_bytes);
// y = x·rstd·w over the whole dim (rstd = 1/√(mean x² + eps) kept in rstd[rows]), then, where rope is not NULL, pair
// (2p, 2p+1) of every head turns by rope[token, p] = (cos, sin); rope is [n, head_dim/2, 2].
static void rmsnorm_rope_forward(act *y, float *rstd, const act *x, const float *w, const float *rope, int B, size_t n,
                                 int dim, int heads, float eps);
// dx written (may be dy), dw +=.
static void rmsnorm_rope_backward(act *dx, float *dw, const act *dy, const act *x, const float *rstd, const float *w,
                                  const float *rope, int B, size_t n, int dim, int heads);

// ---- attention: o = softmax(q·k^T/√head_dim)·v inside each sequence, all heads ----------------------------------
// q, o [q rows, heads·head_dim]; k, v [k rows, heads·head_dim]; lse[q rows, heads] = log Σ exp(scores), for backward
// (NULL: not wanted). Blockwise softmax: no N x N matrix is ever stored. A query whose sequence has no keys gets 0.
static void attention_forward(act *o, float *lse, const act *q, const act *k, const act *v, const Sequences *s,
                              int heads, int head_dim);
static void attention_backward(act *dq, act *dk, act *dv, const act *dout, const act *q, const act *k, const act *v,
                               const act *o, const float *lse, const Sequences *s, int heads, int head_dim);

// ---- HiF8 (section 2) --------------------------------------------------------------------------------------------
// m[1] = max |x| (device; NaN counts as 0); y = Q(x; s) with max|x| = *m, y may be x.
static void absmax(float *m, const act *x, size_t n);
static void hif8_tensor(act *y, const act *x, size_t n, float s, const float *m);

// ---- pixels, words, time -----------------------------------------------------------------------------------------
// Rows of 2x2 patches. rows[B, n, 4·C] of tokens first..first+n-1 of the grid (T,H,W) <- x[B, C, T, 2H, 2W].
// channels_first: column (c·2 + ph)·2 + pw (patch_embedding); else column (ph·2 + pw)·C + c (head). And back.
static void latent_to_rows(act *rows, const float *x, int B, int C, int T, int H, int W, size_t first, size_t n,
                           bool channels_first);
static void rows_to_latent(float *x, const act *rows, int B, int C, int T, int H, int W, bool channels_first);
// y[r] = table[ids[r]] + pos[r mod L], ids[r] < 0: a zero row (padding). r < rows. ids on the device.
static void embed_forward(act *y, const float *table, const float *pos, const int *ids, size_t rows, int L, int dim);
static void embed_backward(float *dtable, const act *dy, const int *ids, size_t rows, int vocab, int dim);        // +=

// ---- elementwise on float, reductions to the host, optimizer ------------------------------------------------------
// y = a·x + b·z (z NULL: a·x);  Σ (x − z)² (z NULL: Σ x²);  mean (out − target)², with dout = 2(out − target)/n.
static void lincomb(float *y, float a, const float *x, float b, const float *z, size_t n);
static double sum_squares(const float *x, const float *z, size_t n);
static double mse(float *dout, const float *out, const float *target, size_t n);
// Decoupled AdamW at step t = 1, 2, ..; g is multiplied by gscale first; ema (may be NULL) = decay·ema + (1−decay)·w.
static void adamw(float *w, float *m, float *v, float *ema, const float *g, size_t n, float gscale, float lr,
                  double beta1, double beta2, float eps, float weight_decay, double ema_decay, int t);
#ifndef OSP_CUDA
// ============================================================================================================
// 4, continued: the operations on a CPU
// ============================================================================================================
// float32 throughout. OpenMP splits rows, tiles or heads; a sum is cut only at places that do not depend on the number
// of threads, so any number of them gives the same bytes.
// Matrix products and attention share one inner kernel, `tile`; all else is plain loops that the compiler vectorises.

// A vector of LANES floats in one register, and the tile of a product that fits the register file.
#if defined(__AVX512F__)
enum { LANES = 16, TILE_M = 8 };
#elif defined(__AVX__)
enum { LANES = 8, TILE_M = 6 };
#else
enum { LANES = 4, TILE_M = 6 };
#endif
enum {
    TILE_N = 2 * LANES,
    TILE_K = 256,             // depth of a packed panel: TILE_K·TILE_N floats live in the L1 cache
    FAR = 512,                // a matrix read by columns that lie further apart is copied first ...
    NEAR_M = 256,             // ... in blocks of this many rows of the product
    NEAR_ROW = NEAR_M + 8,    // no power of two: columns spread over the cache's sets
    CHUNKS = 16,              // a sum over rows is cut in this many parts, whatever the number of threads
    KEYS = 64,                // attention: keys taken at a time
    QUERY_BLOCKS = 16,        // attention forward: blocks of TILE_N queries that one task carries through all keys
    PARALLEL = 1 << 14        // less work than this is not worth waking threads
};
typedef float vec __attribute__((vector_size(4 * LANES)));

static inline vec load(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float *p, vec v) { memcpy(p, &v, sizeof v); }
static inline size_t least(size_t a, size_t b) { return a < b ? a : b; }
static inline size_t blocks_of(size_t n, size_t size) { return (n + size - 1) / size; }
static inline const float *of_sample(PerSample v, size_t b) { return v.p ? v.p + b * v.stride : NULL; }

// 2^x with a relative error of 1e-7: x = n + f, |f| <= 1/2; a polynomial for 2^f, n into the exponent. Below 2^-126
// it gives 0, above 2^126 that; NaN stays NaN. The ends are cut with bit masks, not branches: loops over it vectorise.
static inline float exp2_fast(float x) {
    uint32_t low = 0u - (uint32_t)(x < -126.0f), high = 0u - (uint32_t)(x > 126.0f);
    float shifted = x + 12582912.0f, f = x - (shifted - 12582912.0f);            // + 1.5·2^23 rounds to an integer
    float p = 1.54531634e-4f;
    p = p * f + 1.33908633e-3f;
    p = p * f + 9.61808302e-3f;
    p = p * f + 5.55035695e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147182e-1f;
    p = p * f + 1.0f;
    p *= bits_float((float_bits(shifted) + 127u) << 23);
    return bits_float((float_bits(p) & ~(low | high)) | (high & 0x7E800000u));
}
static inline float sigmoid(float x) { return 1.0f / (1.0f + exp2_fast(-1.44269504f * x)); }

// ---- memory -------------------------------------------------------------------------------------------------
static void device_start(const char *dtype, int rank) {
    (void)rank;
    if (dtype && strcmp(dtype, "f32"))
        die("--device-dtype %.40s: this program computes on the CPU, in f32; osp_cuda has bf16", dtype);
}
static void wait_device(void) {}
static void *device_alloc(size_t bytes) {
    size_t room = bytes < 64 ? 64 : (bytes + 63) & ~(size_t)63;
    void *p = room < bytes ? NULL : aligned_alloc(64, room);
    if (!p) die("out of memory: %zu bytes asked for; use a smaller size or batch", bytes);
    return memset(p, 0, room);
}
static void   device_free(void *p) { free(p); }
static size_t act_size(void) { return sizeof(act); }
static act   *act_at(act *p, size_t elements) { return p + elements; }
static void   zero(void *p, size_t bytes) { memset(p, 0, bytes); }
static void   copy(void *dst, const void *src, size_t bytes) { if (bytes) memmove(dst, src, bytes); }
static void   upload(void *dst, const void *src, size_t bytes) { copy(dst, src, bytes); }
static void   download(void *dst, const void *src, size_t bytes) { copy(dst, src, bytes); }
static void   to_act(act *y, const float *x, size_t n) { copy(y, x, 4 * n); }
static void   to_float(float *y, const act *x, size_t n) { copy(y, x, 4 * n); }

// Working memory inside an op: not zeroed, a cache line's alignment.
static float *scratch(size_t floats) {
    float *p = (float *)aligned_alloc(64, (4 * floats + 64) & ~(size_t)63);
    if (!p) die("out of memory: %zu floats of working memory; use a smaller size or batch", floats);
    return p;
}

// ---- matrix products ----------------------------------------------------------------------------------------
// One tile: c[i, j] = start[i, j] + Σ_k a[i, k]·b[k, j], i < rows, j < TILE_N, k < depth. b is a packed panel
// [depth, TILE_N]; a, c and start have strides (start_row 0: one row for all; start NULL: 0). All sums stay in
// registers. More than TILE_M rows are cut to TILE_M; fewer repeat the last one and are not stored.
static inline __attribute__((always_inline))
void tile(float *c, size_t c_row, const float *start, size_t start_row, const float *a, size_t a_row, size_t a_col,
          size_t rows, const float *b, size_t depth) {
    const float *p[TILE_M];
    vec t[TILE_M][2];
    for (size_t i = 0; i < TILE_M; i++) {
        size_t row = least(i, rows - 1);
        p[i] = a + row * a_row;
        for (int half = 0; half < 2; half++) {
            vec none = {0};
            t[i][half] = start ? load(start + row * start_row + half * LANES) : none;
        }
    }
    for (size_t k = 0, at = 0; k < depth; k++, at += a_col, b += TILE_N) {
        vec b0 = load(b), b1 = load(b + LANES);
        for (int i = 0; i < TILE_M; i++) {
            t[i][0] += p[i][at] * b0;
            t[i][1] += p[i][at] * b1;
        }
    }
    for (size_t i = 0; i < TILE_M; i++) {
        if (i >= rows) break;
        store(c + i * c_row, t[i][0]);
        store(c + i * c_row + LANES, t[i][1]);
    }
}

// panel[depth, TILE_N] = the first `columns` columns of b, where b[k, j] = b + k·b_row + j·b_col; zeros beside them.
static void pack(float *panel, const float *b, size_t b_row, size_t b_col, size_t depth, size_t columns) {
    if (columns < TILE_N) memset(panel, 0, 4 * depth * TILE_N);
    if (b_col == 1 && columns == TILE_N)
        for (size_t k = 0; k < depth; k++) memcpy(panel + k * TILE_N, b + k * b_row, 4 * TILE_N);
    else
        for (size_t k0 = 0; k0 < depth; k0 += 16)
            for (size_t j = 0; j < columns; j++)
                for (size_t k = k0, end = least(k0 + 16, depth); k < end; k++)
                    panel[k * TILE_N + j] = b[k * b_row + j * b_col];
}

// Rows first..last-1 and columns left..right-1 of matmul below, TILE_K steps of every sum at a time.
static void matmul_block(float *c, const float *bias, bool add, const float *a, size_t a_row, size_t a_col,
                         const float *b, size_t b_row, size_t b_col, size_t N, size_t K,
                         size_t first, size_t last, size_t left, size_t right) {
    float panel[TILE_K * TILE_N], head[TILE_N], edge[TILE_M * TILE_N], near[TILE_K * NEAR_ROW];
    for (size_t k = 0; k < K; k += TILE_K) {
        size_t depth = least(TILE_K, K - k), row = a_row, col = a_col;
        const float *block = a + first * a_row + k * a_col;
        if (a_col > FAR) {                                  // a column of a would fall into a few cache sets: move it
            for (size_t d = 0; d < depth; d++) memcpy(near + d * NEAR_ROW, block + d * a_col, 4 * (last - first));
            block = near;
            col = NEAR_ROW;
        }
        for (size_t j = left; j < right; j += TILE_N) {
            size_t columns = least(TILE_N, N - j);
            bool onto = add || k;
            memset(head, 0, sizeof head);
            if (bias) memcpy(head, bias + j, 4 * columns);
            pack(panel, b + k * b_row + j * b_col, b_row, b_col, depth, columns);
            for (size_t i = first; i < last; i += TILE_M) {
                const float *ai = block + (i - first) * row;
                float *cij = c + i * N + j;
                size_t rows = least(TILE_M, last - i);
                if (columns == TILE_N) {
                    tile(cij, N, onto ? cij : head, onto ? N : 0, ai, row, col, rows, panel, depth);
                    continue;
                }
                for (size_t r = 0; r < rows; r++) memcpy(edge + r * TILE_N, onto ? cij + r * N : head, 4 * columns);
                tile(edge, TILE_N, edge, TILE_N, ai, row, col, rows, panel, depth);
                for (size_t r = 0; r < rows; r++) memcpy(cij + r * N, edge + r * TILE_N, 4 * columns);
            }
        }
    }
}

// c[M, N] = start + a[M, K]·b[K, N]; start is bias[N] (may be NULL), or c itself where add. a[i, k] stands at
// a + i·a_row + k·a_col and b likewise: this is the forward product, dx and dw alike. How c is cut into tasks depends
// on the threads; the order of a sum does not: k from 0 to K−1, with a stop in c every TILE_K.
static void matmul(float *c, const float *bias, bool add, const float *a, size_t a_row, size_t a_col,
                   const float *b, size_t b_row, size_t b_col, size_t M, size_t N, size_t K) {
    size_t wanted = 4, panels = blocks_of(N, TILE_N), wide = 1, high = 1024;
#ifdef _OPENMP
    wanted *= (size_t)omp_get_max_threads();
#endif
    if (a_col > FAR) {                                      // moved blocks of a serve up to 8 panels of b each
        high = NEAR_M;
        wide = least(8, 1 + panels * blocks_of(M, high) / wanted);
    }
    size_t groups = blocks_of(panels, wide);
    size_t rows = blocks_of(blocks_of(M, blocks_of(wanted, groups)), TILE_M) * TILE_M;
    high = least(high, rows < 64 ? 64 : rows);
    size_t tasks = groups * blocks_of(M, high);
    #pragma omp parallel for schedule(dynamic) if (M * N * K > 8 * PARALLEL)
    for (size_t task = 0; task < tasks; task++) {
        size_t first = task / groups * high, left = task % groups * wide * TILE_N;
        matmul_block(c, bias, add, a, a_row, a_col, b, b_row, b_col, N, K, first, least(first + high, M), left,
                     least(left + wide * TILE_N, N));
    }
}

// dst_b[dim] += the CHUNKS partial sums of sample b, in order; partial[B, CHUNKS, width] starts at the wanted column.
static void add_partials(PerSample dst, const float *partial, size_t width, size_t B, size_t dim) {
    for (size_t part = 0; part < B * CHUNKS; part++) {
        float *d = dst.p + part / CHUNKS * dst.stride;
        const float *p = partial + part * width;
        #pragma omp simd
        for (size_t i = 0; i < dim; i++) d[i] += p[i];
    }
}
static inline size_t chunk_start(size_t n, size_t chunk) { return n * chunk / CHUNKS; }

// With few rows (the timestep's) the bias comes after the sum, which rounds less: e0 may nearly cancel `modulation`.
static void linear_forward(act *y, const act *x, const act *w, const float *b, size_t rows, int out, int in) {
    bool after = b && rows < 64;
    matmul(y, after ? NULL : b, false, x, (size_t)in, 1, w, 1, (size_t)in, rows, (size_t)out, (size_t)in);
    for (size_t i = 0; after && i < rows * (size_t)out; i++) y[i] += b[i % (size_t)out];
}

static void linear_backward(act *dx, float *dw, float *db, const act *dy, const act *x, const act *w, size_t rows,
                            int out, int in, bool accumulate) {
    size_t O = (size_t)out, I = (size_t)in;
    if (dx) matmul(dx, NULL, accumulate, dy, O, 1, w, I, 1, rows, I, O);
    if (dw) matmul(dw, NULL, true, dy, 1, O, x, I, 1, O, I, rows);
    if (!db) return;
    float *partial = scratch(CHUNKS * O);
    #pragma omp parallel for if (rows * O > PARALLEL)
    for (size_t chunk = 0; chunk < CHUNKS; chunk++) {
        float *p = partial + chunk * O;
        memset(p, 0, 4 * O);
        for (size_t r = chunk_start(rows, chunk); r < chunk_start(rows, chunk + 1); r++)
            for (size_t i = 0; i < O; i++) p[i] += dy[r * O + i];
    }
    PerSample all = {db, 0};
    add_partials(all, partial, O, 1, O);
    free(partial);
}

// gelu(u) = u·σ(2z) with z = √(2/π)·(u + 0.044715·u³), because (1 + tanh z)/2 = σ(2z): no cancellation anywhere.
static void linear_gelu_forward(act *y, act *pre, const act *x, const act *w, const float *b, size_t rows, int out,
                                int in) {
    const float *u = pre ? pre : y;
    size_t n = rows * (size_t)out;
    linear_forward(pre ? pre : y, x, w, b, rows, out, in);
    #pragma omp parallel for simd if (n > PARALLEL)
    for (size_t i = 0; i < n; i++) y[i] = u[i] * sigmoid(1.5957691f * (u[i] + 0.044715f * u[i] * u[i] * u[i]));
}

// With s = σ(2z), e = exp(−2z) = (1 − s)/s:  gelu' = s + u·(1 − s)·s·2z'.
static void gelu_backward(act *dx, const act *dy, const act *pre, size_t n) {
    #pragma omp parallel for simd if (n > PARALLEL)
    for (size_t i = 0; i < n; i++) {
        float u = pre[i], cube = 0.044715f * u * u, e = exp2_fast(-2.3022082f * (u + cube * u)), s = 1.0f / (1.0f + e);
        dx[i] = dy[i] * (s + u * (e * s) * s * (1.5957691f * (1.0f + 3.0f * cube)));
    }
}

static void silu_forward(act *y, const act *x, size_t n) {
    #pragma omp parallel for simd if (n > PARALLEL)
    for (size_t i = 0; i < n; i++) y[i] = x[i] / (1.0f + expf(-x[i]));       // few values, exact
}

static void silu_backward(act *dx, const act *dy, const act *x, size_t n) {
    #pragma omp parallel for simd if (n > PARALLEL)
    for (size_t i = 0; i < n; i++) {
        float e = exp2_fast(-1.44269504f * x[i]), s = 1.0f / (1.0f + e);
        dx[i] = dy[i] * (s + x[i] * (e * s) * s);
    }
}

// ---- norms, modulation, residual -------------------------------------------------------------------------------
static void modulation_forward(float *out, const float *mod, const float *e, int B, int J, int Je, int dim) {
    size_t D = (size_t)dim, rows = (size_t)B * (size_t)J;
    for (size_t r = 0; r < rows; r++) {
        size_t b = r / (size_t)J, j = r % (size_t)J;
        const float *m = mod + j * D, *t = e + (b * (size_t)Je + (Je == 1 ? 0 : j)) * D;
        for (size_t i = 0; i < D; i++) out[r * D + i] = m[i] + t[i];
    }
}

static void modulation_backward(float *dmod, float *de, const float *dout, int B, int J, int Je, int dim) {
    size_t D = (size_t)dim, rows = (size_t)B * (size_t)J;
    for (size_t r = 0; r < rows; r++) {
        size_t b = r / (size_t)J, j = r % (size_t)J;
        float *m = dmod + j * D, *t = de + (b * (size_t)Je + (Je == 1 ? 0 : j)) * D;
        #pragma omp simd
        for (size_t i = 0; i < D; i++) { m[i] += dout[r * D + i]; t[i] += dout[r * D + i]; }
    }
}

// x_out = x + gate·y over one row (gate NULL: 1).
static inline void add_branch(float *x_out, const float *x, const act *y, const float *gate, size_t dim) {
    if (gate) {
        #pragma omp simd
        for (size_t i = 0; i < dim; i++) x_out[i] = x[i] + gate[i] * y[i];
    } else {
        #pragma omp simd
        for (size_t i = 0; i < dim; i++) x_out[i] = x[i] + y[i];
    }
}

static void residual_norm_forward(float *x_out, act *h, float *stat, const float *x, const act *y, PerSample gate,
                                  PerSample shift, PerSample scale, float one, int B, size_t n, int dim, float eps) {
    size_t D = (size_t)dim, rows = (size_t)B * n;
    #pragma omp parallel for if (rows * D > PARALLEL)
    for (size_t r = 0; r < rows; r++) {
        const float *row = x + r * D, *s = of_sample(scale, r / n), *t = of_sample(shift, r / n);
        if (y) {
            add_branch(x_out + r * D, row, y + r * D, of_sample(gate, r / n), D);
            row = x_out + r * D;
        }
        float mean = 0.0f, var = 0.0f;
        #pragma omp simd reduction(+ : mean)
        for (size_t i = 0; i < D; i++) mean += row[i];
        mean /= (float)D;
        #pragma omp simd reduction(+ : var)
        for (size_t i = 0; i < D; i++) var += (row[i] - mean) * (row[i] - mean);
        float rstd = 1.0f / sqrtf(var / (float)D + eps);
        #pragma omp simd
        for (size_t i = 0; i < D; i++) h[r * D + i] = (row[i] - mean) * rstd * (one + s[i]) + t[i];
        stat[2 * r] = mean;
        stat[2 * r + 1] = rstd;
    }
}

// With g = dh·(one + scale) and x̂ = (x − mean)·rstd:  dx += rstd·(g − mean g − x̂·mean(g·x̂)).
static void norm_backward(float *dx, PerSample dshift, PerSample dscale, const act *dh, const float *x,
                          const float *stat, PerSample scale, float one, int B, size_t n, int dim) {
    size_t D = (size_t)dim, parts = (size_t)B * CHUNKS;
    float *partial = scratch(parts * 2 * D);                    // [B, CHUNKS, (shift, scale), dim]
    #pragma omp parallel for if (parts / CHUNKS * n * D > PARALLEL)
    for (size_t part = 0; part < parts; part++) {
        float *to_shift = partial + part * 2 * D, *to_scale = to_shift + D;
        const float *s = of_sample(scale, part / CHUNKS);
        size_t begin = part / CHUNKS * n;
        memset(to_shift, 0, 8 * D);
        for (size_t r = begin + chunk_start(n, part % CHUNKS); r < begin + chunk_start(n, part % CHUNKS + 1); r++) {
            const float *xr = x + r * D, *dr = dh + r * D;
            float *dxr = dx + r * D, mean = stat[2 * r], rstd = stat[2 * r + 1], sum_g = 0.0f, sum_gx = 0.0f;
            #pragma omp simd reduction(+ : sum_g, sum_gx)
            for (size_t i = 0; i < D; i++) {
                float xhat = (xr[i] - mean) * rstd, g = dr[i] * (one + s[i]);
                sum_g += g;
                sum_gx += g * xhat;
                to_shift[i] += dr[i];
                to_scale[i] += dr[i] * xhat;
            }
            sum_g /= (float)D;
            sum_gx /= (float)D;
            #pragma omp simd
            for (size_t i = 0; i < D; i++)
                dxr[i] += rstd * (dr[i] * (one + s[i]) - sum_g - (xr[i] - mean) * rstd * sum_gx);
        }
    }
    if (dshift.p) add_partials(dshift, partial, 2 * D, (size_t)B, D);
    if (dscale.p) add_partials(dscale, partial + D, 2 * D, (size_t)B, D);
    free(partial);
}

static void gate_backward(act *dy, PerSample dgate, const float *dx, const act *y, PerSample gate, int B, size_t n,
                          int dim) {
    size_t D = (size_t)dim, parts = (size_t)B * CHUNKS;
    float *partial = scratch(parts * D);
    #pragma omp parallel for if (parts / CHUNKS * n * D > PARALLEL)
    for (size_t part = 0; part < parts; part++) {
        float *sum = partial + part * D;
        const float *g = of_sample(gate, part / CHUNKS);
        size_t begin = part / CHUNKS * n;
        memset(sum, 0, 4 * D);
        for (size_t r = begin + chunk_start(n, part % CHUNKS); r < begin + chunk_start(n, part % CHUNKS + 1); r++) {
            const float *dxr = dx + r * D;
            if (dgate.p) {
                #pragma omp simd
                for (size_t i = 0; i < D; i++) sum[i] += dxr[i] * y[r * D + i];
            }
            #pragma omp simd
            for (size_t i = 0; i < D; i++) dy[r * D + i] = g ? g[i] * dxr[i] : dxr[i];
        }
    }
    if (dgate.p) add_partials(dgate, partial, D, (size_t)B, D);
    free(partial);
}

static void residual_gather_forward(float *x_out, const float *x, const act *y, PerSample gate, const int *map,
                                    size_t count, int B, size_t n, int dim) {
    size_t D = (size_t)dim;
    (void)B;
    #pragma omp parallel for if (count * D > PARALLEL)
    for (size_t j = 0; j < count; j++) {
        size_t i = map ? (size_t)map[j] : j;
        if (y) add_branch(x_out + j * D, x + i * D, y + i * D, of_sample(gate, i / n), D);
        else if (x_out + j * D != x + i * D) memcpy(x_out + j * D, x + i * D, 4 * D);
    }
}

static void gather_rows(void *dst, const void *src, const int *map, size_t count, size_t row_bytes) {
    #pragma omp parallel for if (count * row_bytes > 8 * PARALLEL)
    for (size_t j = 0; j < count; j++)
        memcpy((char *)dst + j * row_bytes, (const char *)src + (size_t)map[j] * row_bytes, row_bytes);
}

// Turn every pair (2p, 2p+1) of every head of a row by its angle; sign −1 turns back, which is the transpose.
static inline void rotate(float *x, const float *rope, float sign, size_t heads, size_t head_dim) {
    for (size_t h = 0; h < heads; h++, x += head_dim) {
        #pragma omp simd
        for (size_t p = 0; p < head_dim / 2; p++) {
            float a = x[2 * p], b = x[2 * p + 1], c = rope[2 * p], s = sign * rope[2 * p + 1];
            x[2 * p] = a * c - b * s;
            x[2 * p + 1] = a * s + b * c;
        }
    }
}

static void rmsnorm_rope_forward(act *y, float *rstd, const act *x, const float *w, const float *rope, int B, size_t n,
                                 int dim, int heads, float eps) {
    size_t D = (size_t)dim, H = (size_t)heads, rows = (size_t)B * n;
    #pragma omp parallel for if (rows * D > PARALLEL)
    for (size_t r = 0; r < rows; r++) {
        const float *xr = x + r * D;
        float *yr = y + r * D, squares = 0.0f;
        #pragma omp simd reduction(+ : squares)
        for (size_t i = 0; i < D; i++) squares += xr[i] * xr[i];
        float scale = 1.0f / sqrtf(squares / (float)D + eps);
        #pragma omp simd
        for (size_t i = 0; i < D; i++) yr[i] = xr[i] * scale * w[i];
        rstd[r] = scale;
        if (rope) rotate(yr, rope + r % n * (D / H), 1.0f, H, D / H);
    }
}

// With g = dy turned back and x̂ = x·rstd:  dw += Σ g·x̂,  dx = rstd·(g·w − x̂·mean(g·w·x̂)).
static void rmsnorm_rope_backward(act *dx, float *dw, const act *dy, const act *x, const float *rstd, const float *w,
                                  const float *rope, int B, size_t n, int dim, int heads) {
    size_t D = (size_t)dim, H = (size_t)heads, rows = (size_t)B * n;
    float *partial = scratch(CHUNKS * D);
    #pragma omp parallel for if (rows * D > PARALLEL)
    for (size_t chunk = 0; chunk < CHUNKS; chunk++) {
        float *to_w = partial + chunk * D;
        memset(to_w, 0, 4 * D);
        for (size_t r = chunk_start(rows, chunk); r < chunk_start(rows, chunk + 1); r++) {
            const float *xr = x + r * D;
            float *g = dx + r * D, scale = rstd[r], sum = 0.0f;
            if (dx != dy) memcpy(g, dy + r * D, 4 * D);
            if (rope) rotate(g, rope + r % n * (D / H), -1.0f, H, D / H);
            #pragma omp simd reduction(+ : sum)
            for (size_t i = 0; i < D; i++) {
                float gx = g[i] * xr[i] * scale;
                to_w[i] += gx;
                sum += gx * w[i];
            }
            sum *= scale / (float)D;
            #pragma omp simd
            for (size_t i = 0; i < D; i++) g[i] = scale * (g[i] * w[i] - xr[i] * sum);
        }
    }
    PerSample all = {dw, 0};
    add_partials(all, partial, D, 1, D);
    free(partial);
}

// ---- attention ------------------------------------------------------------------------------------------------
// Scores stand transposed, s[key, query], TILE_N queries side by side in the lanes: maximum, sum and exp run down the
// keys without crossing lanes, and exp(s) is already the packed panel that the product with v wants. Everything is
// kept in powers of two: p = 2^(c·s − m), c = log2(e)/√head_dim.
#define LOG2E 1.44269504088896341

// Head h of queries q0..q1-1 against keys k0..k1-1: what one task works on.
typedef struct { size_t q0, q1, k0, k1, h, heads, dim; } Head;

// block[n, dim] = the head's columns of rows first..first+n-1 of x[.., heads·dim].
static void take_rows(float *block, const float *x, size_t first, size_t n, Head t) {
    for (size_t i = 0; i < n; i++) memcpy(block + i * t.dim, x + ((first + i) * t.heads + t.h) * t.dim, 4 * t.dim);
}

// out[i, query] = Σ_d a[i, d]·panel[d, query]: the scores of n keys (or v·dout) against TILE_N queries.
static void scores(float *out, const float *a, const float *panel, size_t n, size_t head_dim) {
    for (size_t i = 0; i < n; i += TILE_M)
        tile(out + i * TILE_N, TILE_N, NULL, 0, a + i * head_dim, head_dim, 1, n - i, panel, head_dim);
}

// sum[d, query] += Σ_i a[i, d]·p[i, query] over n keys.
static void mix(float *sum, const float *a, const float *p, size_t n, size_t head_dim) {
    for (size_t d = 0; d < head_dim; d += TILE_M)
        tile(sum + d * TILE_N, TILE_N, sum + d * TILE_N, TILE_N, a + d, 1, head_dim, head_dim - d, p, n);
}

// sum[i, d] += Σ_query p[i, query]·r[query, d] over n keys; r in panels [TILE_N queries, TILE_N dims], sum [n, wide].
static void mix_back(float *sum, const float *p, const float *r, size_t n, size_t wide) {
    for (size_t d = 0; d < wide; d += TILE_N)
        for (size_t i = 0; i < n; i += TILE_M) {
            float *to = sum + i * wide + d;
            tile(to, wide, to, wide, p + i * TILE_N, TILE_N, 1, n - i, r + d * TILE_N, TILE_N);
        }
}

// One step of the running softmax: s[n, query] becomes 2^(c·s − m) under the new maximum m, sum[query] and o[head_dim,
// query] are scaled from the old maximum to the new one, and sum takes the new terms.
static void softmax_step(float *s, float *m, float *sum, float *o, float c, size_t n, size_t head_dim) {
    float top[TILE_N], shrink[TILE_N], part[TILE_N] = {0};
    for (int j = 0; j < TILE_N; j++) top[j] = s[j];
    for (size_t i = 1; i < n; i++)
        for (int j = 0; j < TILE_N; j++) top[j] = s[i * TILE_N + j] > top[j] ? s[i * TILE_N + j] : top[j];
    for (int j = 0; j < TILE_N; j++) {
        float now = c * top[j] > m[j] ? c * top[j] : m[j];
        shrink[j] = exp2_fast(m[j] - now);
        m[j] = now;
    }
    for (size_t i = 0; i < n; i++)
        for (int j = 0; j < TILE_N; j++) {
            float p = exp2_fast(c * s[i * TILE_N + j] - m[j]);
            s[i * TILE_N + j] = p;
            part[j] += p;
        }
    for (int j = 0; j < TILE_N; j++) sum[j] = sum[j] * shrink[j] + part[j];
    for (size_t d = 0; d < head_dim; d++)
        for (int j = 0; j < TILE_N; j++) o[d * TILE_N + j] *= shrink[j];
}

// At most QUERY_BLOCKS·TILE_N queries through all keys of their sequence; `room` is the working memory.
static void attend(act *o, float *lse, const act *q, const act *k, const act *v, Head t, float *room) {
    size_t count = t.q1 - t.q0, blocks = blocks_of(count, TILE_N), row = t.heads * t.dim, panel = t.dim * TILE_N;
    float *kb = room, *vb = kb + KEYS * t.dim, *s = vb + KEYS * t.dim, *m = s + KEYS * TILE_N;
    float *sum = m + QUERY_BLOCKS * TILE_N, *qt = sum + QUERY_BLOCKS * TILE_N, *ot = qt + QUERY_BLOCKS * panel;
    float c = (float)(LOG2E / sqrt((double)t.dim));
    for (size_t g = 0; g < blocks; g++)
        pack(qt + g * panel, q + (t.q0 + g * TILE_N) * row + t.h * t.dim, 1, row, t.dim,
             least(TILE_N, count - g * TILE_N));
    for (size_t j = 0; j < blocks * TILE_N; j++) { m[j] = -INFINITY; sum[j] = 0.0f; }
    memset(ot, 0, 4 * blocks * panel);
    for (size_t key = t.k0; key < t.k1; key += KEYS) {
        size_t n = least(KEYS, t.k1 - key);
        take_rows(kb, k, key, n, t);
        take_rows(vb, v, key, n, t);
        for (size_t g = 0; g < blocks; g++) {
            scores(s, kb, qt + g * panel, n, t.dim);
            softmax_step(s, m + g * TILE_N, sum + g * TILE_N, ot + g * panel, c, n, t.dim);
            mix(ot + g * panel, vb, s, n, t.dim);
        }
    }
    for (size_t i = 0; i < count; i++) {
        const float *column = ot + i / TILE_N * panel + i % TILE_N;
        float inverse = sum[i] == 0.0f ? 0.0f : 1.0f / sum[i];
        for (size_t d = 0; d < t.dim; d++) o[(t.q0 + i) * row + t.h * t.dim + d] = column[d * TILE_N] * inverse;
        if (lse) lse[(t.q0 + i) * t.heads + t.h] = (float)((m[i] + log2((double)sum[i])) / LOG2E);
    }
}

static void attention_forward(act *o, float *lse, const act *q, const act *k, const act *v, const Sequences *s,
                              int heads, int head_dim) {
    size_t H = (size_t)heads, hd = (size_t)head_dim, span = QUERY_BLOCKS * TILE_N, count = (size_t)s->count, tasks = 0;
    size_t *first = (size_t *)xalloc(count + 1, sizeof *first);         // first task of each sequence
    for (size_t i = 0; i < count; i++) first[i + 1] = tasks += H * blocks_of((size_t)(s->q[i + 1] - s->q[i]), span);
    #pragma omp parallel
    {
        float *room = scratch(2 * KEYS * hd + KEYS * TILE_N + 2 * span + 2 * span * hd);
        size_t i = 0;
        #pragma omp for schedule(dynamic)
        for (size_t task = 0; task < tasks; task++) {
            while (task < first[i]) i--;
            while (task >= first[i + 1]) i++;
            size_t q0 = (size_t)s->q[i] + (task - first[i]) / H * span;
            Head t = {q0, least(q0 + span, (size_t)s->q[i + 1]), (size_t)s->k[i], (size_t)s->k[i + 1],
                      (task - first[i]) % H, H, hd};
            attend(o, lse, q, k, v, t, room);
        }
        free(room);
    }
    free(first);
}

// s[n, query] becomes P, dp becomes dS up to the factor 1/√head_dim (names and equations below).
static void softmax_back(float *s, float *dp, const float *L, const float *D, float c, size_t n) {
    for (size_t i = 0; i < n; i++, s += TILE_N, dp += TILE_N)
        for (int j = 0; j < TILE_N; j++) {
            s[j] = exp2_fast(c * s[j] - L[j]);
            dp[j] = s[j] * (dp[j] - D[j]);
        }
}

// The backward pass of one head of one sequence. With P = exp(S − lse), D = Σ_d dout·o:
//   dv = P^T·dout,  dP = dout·v^T,  dS = P·(dP − D)/√head_dim,  dq = dS·k,  dk = dS^T·q.
// P is computed again, one tile at a time; dq is gathered over key blocks, dk and dv over query blocks, in order.
static void attend_backward(act *dq, act *dk, act *dv, const act *dout, const act *q, const act *k, const act *v,
                            const act *o, const float *lse, Head t) {
    size_t count = t.q1 - t.q0, blocks = blocks_of(count, TILE_N), row = t.heads * t.dim, first = t.h * t.dim;
    size_t panel = t.dim * TILE_N, wide = blocks_of(t.dim, TILE_N) * TILE_N, rows = wide * TILE_N;
    float scale = (float)(1.0 / sqrt((double)t.dim)), c = (float)(LOG2E / sqrt((double)t.dim));
    float *room = scratch(blocks * (3 * panel + 2 * rows + 2 * TILE_N) + 2 * KEYS * (t.dim + wide + TILE_N));
    float *qt = room, *dot = qt + blocks * panel, *dqt = dot + blocks * panel;          // transposed: [dim, query]
    float *qr = dqt + blocks * panel, *dor = qr + blocks * rows;                        // panels [query, TILE_N dims]
    float *L = dor + blocks * rows, *D = L + blocks * TILE_N, *kb = D + blocks * TILE_N, *vb = kb + KEYS * t.dim;
    float *dkb = vb + KEYS * t.dim, *dvb = dkb + KEYS * wide, *p = dvb + KEYS * wide, *ds = p + KEYS * TILE_N;
    memset(dqt, 0, 4 * blocks * panel);
    memset(L, 0, 4 * 2 * blocks * TILE_N);
    for (size_t g = 0; g < blocks; g++) {
        size_t at = (t.q0 + g * TILE_N) * row + first, n = least(TILE_N, count - g * TILE_N);
        pack(qt + g * panel, q + at, 1, row, t.dim, n);
        pack(dot + g * panel, dout + at, 1, row, t.dim, n);
        memset(qr + g * rows, 0, 4 * rows);
        memset(dor + g * rows, 0, 4 * rows);
        for (size_t d = 0; d < t.dim; d += TILE_N) {
            pack(qr + g * rows + d * TILE_N, q + at + d, row, 1, n, least(TILE_N, t.dim - d));
            pack(dor + g * rows + d * TILE_N, dout + at + d, row, 1, n, least(TILE_N, t.dim - d));
        }
        for (size_t j = 0; j < n; j++) {
            float sum = 0.0f;
            #pragma omp simd reduction(+ : sum)
            for (size_t d = 0; d < t.dim; d++) sum += dout[at + j * row + d] * o[at + j * row + d];
            D[g * TILE_N + j] = sum;
            L[g * TILE_N + j] = (float)(LOG2E * lse[(t.q0 + g * TILE_N + j) * t.heads + t.h]);
        }
    }
    for (size_t key = t.k0; key < t.k1; key += KEYS) {
        size_t n = least(KEYS, t.k1 - key);
        take_rows(kb, k, key, n, t);
        take_rows(vb, v, key, n, t);
        memset(dkb, 0, 4 * 2 * KEYS * wide);
        for (size_t g = 0; g < blocks; g++) {
            scores(p, kb, qt + g * panel, n, t.dim);
            scores(ds, vb, dot + g * panel, n, t.dim);
            softmax_back(p, ds, L + g * TILE_N, D + g * TILE_N, c, n);
            mix(dqt + g * panel, kb, ds, n, t.dim);
            mix_back(dkb, ds, qr + g * rows, n, wide);
            mix_back(dvb, p, dor + g * rows, n, wide);
        }
        for (size_t i = 0; i < n; i++)
            for (size_t d = 0; d < t.dim; d++) {
                dk[(key + i) * row + first + d] = scale * dkb[i * wide + d];
                dv[(key + i) * row + first + d] = dvb[i * wide + d];
            }
    }
    for (size_t i = 0; i < count; i++)
        for (size_t d = 0; d < t.dim; d++)
            dq[(t.q0 + i) * row + first + d] = scale * dqt[i / TILE_N * panel + d * TILE_N + i % TILE_N];
    free(room);
}

static void attention_backward(act *dq, act *dk, act *dv, const act *dout, const act *q, const act *k, const act *v,
                               const act *o, const float *lse, const Sequences *s, int heads, int head_dim) {
    size_t H = (size_t)heads, tasks = (size_t)s->count * H;
    #pragma omp parallel for schedule(dynamic)
    for (size_t task = 0; task < tasks; task++) {
        size_t i = task / H;
        Head t = {(size_t)s->q[i], (size_t)s->q[i + 1], (size_t)s->k[i], (size_t)s->k[i + 1],
                  task % H, H, (size_t)head_dim};
        attend_backward(dq, dk, dv, dout, q, k, v, o, lse, t);
    }
}

// ---- HiF8 --------------------------------------------------------------------------------------------------------
// Magnitudes of floats are ordered like their bits, so the maximum is one of integers.
static void absmax(float *m, const act *x, size_t n) {
    uint32_t top = 0;
    #pragma omp parallel for simd reduction(max : top) if (n > PARALLEL)
    for (size_t i = 0; i < n; i++) {
        uint32_t a = float_bits(x[i]) & 0x7FFFFFFFu;
        a = a > 0x7F800000u ? 0u : a;
        top = a > top ? a : top;
    }
    *m = bits_float(top);
}

static void hif8_tensor(act *y, const act *x, size_t n, float s, const float *m) {
    float k = hif8_scale(s, *m);
    #pragma omp parallel for simd if (n > PARALLEL)
    for (size_t i = 0; i < n; i++) y[i] = hif8_round(x[i] * k) / k;
}

// ---- pixels, words, time -----------------------------------------------------------------------------------------
// Where the 4·C numbers of a token lie: element (c, ph, pw) of token (t, h, w) in x[C, T, 2H, 2W] of a sample.
static inline size_t pixel(size_t token, size_t column, int C, int T, int H, int W, bool channels_first) {
    size_t Wt = (size_t)W, Ht = (size_t)H, w = token % Wt, h = token / Wt % Ht, t = token / Wt / Ht;
    size_t c = channels_first ? column / 4 : column % (size_t)C;
    size_t patch = channels_first ? column % 4 : column / (size_t)C;
    return ((c * (size_t)T + t) * 2 * Ht + 2 * h + patch / 2) * 2 * Wt + 2 * w + patch % 2;
}

static void latent_to_rows(act *rows, const float *x, int B, int C, int T, int H, int W, size_t first, size_t n,
                           bool channels_first) {
    size_t columns = 4 * (size_t)C, sample = columns * (size_t)T * (size_t)H * (size_t)W, count = (size_t)B * n;
    #pragma omp parallel for if (count * columns > PARALLEL)
    for (size_t r = 0; r < count; r++)
        for (size_t i = 0; i < columns; i++)
            rows[r * columns + i] = x[r / n * sample + pixel(first + r % n, i, C, T, H, W, channels_first)];
}

static void rows_to_latent(float *x, const act *rows, int B, int C, int T, int H, int W, bool channels_first) {
    size_t columns = 4 * (size_t)C, n = (size_t)T * (size_t)H * (size_t)W, count = (size_t)B * n;
    #pragma omp parallel for if (count * columns > PARALLEL)
    for (size_t r = 0; r < count; r++)
        for (size_t i = 0; i < columns; i++)
            x[r / n * columns * n + pixel(r % n, i, C, T, H, W, channels_first)] = rows[r * columns + i];
}

static void embed_forward(act *y, const float *table, const float *pos, const int *ids, size_t rows, int L, int dim) {
    size_t D = (size_t)dim;
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < D; i++)
            y[r * D + i] = ids[r] < 0 ? 0.0f : table[(size_t)ids[r] * D + i] + pos[r % (size_t)L * D + i];
}

static void embed_backward(float *dtable, const act *dy, const int *ids, size_t rows, int vocab, int dim) {
    size_t D = (size_t)dim;
    (void)vocab;
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < D && ids[r] >= 0; i++) dtable[(size_t)ids[r] * D + i] += dy[r * D + i];
}

// ---- elementwise on float, reductions to the host, optimizer ------------------------------------------------------
static void lincomb(float *y, float a, const float *x, float b, const float *z, size_t n) {
    #pragma omp parallel for simd if (n > PARALLEL)
    for (size_t i = 0; i < n; i++) y[i] = z ? a * x[i] + b * z[i] : a * x[i];
}

static double sum_squares(const float *x, const float *z, size_t n) {
    double parts[CHUNKS], total = 0.0;
    #pragma omp parallel for if (n > PARALLEL)
    for (size_t chunk = 0; chunk < CHUNKS; chunk++) {
        double sum = 0.0;
        #pragma omp simd reduction(+ : sum)
        for (size_t i = chunk_start(n, chunk); i < chunk_start(n, chunk + 1); i++) {
            double d = (double)x[i] - (z ? (double)z[i] : 0.0);
            sum += d * d;
        }
        parts[chunk] = sum;
    }
    for (int chunk = 0; chunk < CHUNKS; chunk++) total += parts[chunk];
    return total;
}

static double mse(float *dout, const float *out, const float *target, size_t n) {
    if (dout) lincomb(dout, 2.0f / (float)n, out, -2.0f / (float)n, target, n);
    return sum_squares(out, target, n) / (double)n;
}

// m = β1·m + (1−β1)·g, v = β2·v + (1−β2)·g², w −= lr·(weight_decay·w + m̂/(√v̂ + eps)), m̂ = m/(1−β1^t), v̂ alike.
// 1 − β is formed in double: of the float 0.999f it would be off by 1e-5 of itself.
static void adamw(float *w, float *m, float *v, float *ema, const float *g, size_t n, float gscale, float lr,
                  double beta1, double beta2, float eps, float weight_decay, double ema_decay, int t) {
    float old1 = (float)beta1, old2 = (float)beta2, stay = (float)ema_decay;
    float new1 = (float)(1.0 - beta1), new2 = (float)(1.0 - beta2), fresh = (float)(1.0 - ema_decay);
    float rate = (float)(lr / (1.0 - pow(beta1, t))), grow = (float)(1.0 / sqrt(1.0 - pow(beta2, t)));
    float keep = (float)(1.0 - (double)lr * weight_decay);
    #pragma omp parallel for simd if (n > PARALLEL)
    for (size_t i = 0; i < n; i++) {
        float gi = g[i] * gscale;
        m[i] = old1 * m[i] + new1 * gi;
        v[i] = old2 * v[i] + new2 * gi * gi;
        w[i] = keep * w[i] - rate * m[i] / (sqrtf(v[i]) * grow + eps);
        if (ema) ema[i] = stay * ema[i] + fresh * w[i];
    }
}
#endif
// ============================================================================================================
// 5. Skiparse-2D: which tokens attend together (spec §4)
// ============================================================================================================
// Sparse ratio P cuts the grid into P² subsequences by (h, w); time is never cut. With P = 2 on a 4 x 8 frame, the
// subsequence of each token:
//
//    token-wise (every P-th token)        group-wise (every P-th group of P x P tokens)
//       0 1 0 1 0 1 0 1                      0 0 1 1 0 0 1 1
//       2 3 2 3 2 3 2 3                      0 0 1 1 0 0 1 1
//       0 1 0 1 0 1 0 1                      2 2 3 3 2 2 3 3
//       2 3 2 3 2 3 2 3                      2 2 3 3 2 2 3 3
//
// Token-wise alone leaves each token blind to its neighbours, group-wise alone to the grid between the groups; two
// blocks in turn connect everything, at 1/P² of the attention's cost each.
enum { FULL, TOKEN_WISE, GROUP_WISE, PATTERNS };
static const char PATTERN_LETTER[] = "Ftg";

static int subsequence(int pattern, int h, int w, int P) {
    if (pattern == TOKEN_WISE) return h % P * P + w % P;
    if (pattern == GROUP_WISE) return h / P % P * P + w / P % P;
    return 0;
}

// order[N]: the original token at each place of the rearranged sequence; start[P²+1]: where each subsequence begins.
// Inside a subsequence tokens stay in (t, h, w) order, which is the order the paper's reshapes give. Grids that P²
// does not divide only make the subsequences' lengths differ: no padded token exists anywhere in this program.
static int skiparse_order(int *order, int *start, int pattern, int T, int H, int W, int P) {
    int count = pattern == FULL ? 1 : P * P, place = 0;
    for (int s = 0; s < count; s++) {
        start[s] = place;
        for (int t = 0; t < T; t++)
            for (int h = 0; h < H; h++)
                for (int w = 0; w < W; w++)
                    if (subsequence(pattern, h, w, P) == s) order[place++] = (t * H + h) * W + w;
    }
    start[count] = place;
    return count;
}

// The dual-end hybrid (spec §3): full attention in the first and last F/2 of L blocks; between them token-wise at even
// indices and group-wise at odd ones.
static int block_pattern(int i, int L, int F) {
    if (i < F / 2 || i >= L - (F + 1) / 2) return FULL;          // F is odd only where it is L
    return i % 2 == 0 ? TOKEN_WISE : GROUP_WISE;
}

// A pattern on a grid, and how R ranks share it (SSP, spec §5): rank r holds the places [first[r], first[r+1]), whole
// subsequences where the pattern is sparse, an even cut of the plain sequence where it is full.
typedef struct {
    int count, *order, *place, *start;       // order[N] as above; place[order[j]] = j; start[count + 1]
    int *first;                              // [R + 1]
} Pattern;

static void pattern_init(Pattern *p, int pattern, int T, int H, int W, int P, int R) {
    int N = T * H * W, most = pattern == FULL ? 1 : P * P;
    p->order = (int *)xalloc((size_t)N, sizeof(int));
    p->place = (int *)xalloc((size_t)N, sizeof(int));
    p->start = (int *)xalloc((size_t)most + 1, sizeof(int));
    p->first = (int *)xalloc((size_t)R + 1, sizeof(int));
    p->count = skiparse_order(p->order, p->start, pattern, T, H, W, P);
    for (int j = 0; j < N; j++) p->place[p->order[j]] = j;
    for (int r = 0; r <= R; r++)
        p->first[r] = pattern == FULL ? (int)((size_t)N * (size_t)r / (size_t)R) : p->start[p->count * r / R];
}

// How the tokens of B samples move from one pattern's order to another's: rank `rank` packs rows by `pack`, sends
// send[s] of them to each rank s, receives receive[s], puts them in order by `unpack`. With one rank nothing is sent:
// pack alone is the rearrangement. The backward pass is the exchange the other way.
typedef struct { int *pack, *unpack, *send, *receive; size_t sent, received; } Exchange;

static void exchange_init(Exchange *e, const Pattern *from, const Pattern *to, int B, int rank, int R) {
    int mine = from->first[rank + 1] - from->first[rank], next = to->first[rank + 1] - to->first[rank];
    e->sent = (size_t)mine * (size_t)B;
    e->received = (size_t)next * (size_t)B;
    e->pack = (int *)xalloc(e->sent, sizeof(int));
    e->unpack = (int *)xalloc(e->received, sizeof(int));
    e->send = (int *)xalloc((size_t)R, sizeof(int));
    e->receive = (int *)xalloc((size_t)R, sizeof(int));
    int packed = 0, arrived = 0;
    for (int s = 0; s < R; s++)
        for (int b = 0; b < B; b++) {
            for (int j = to->first[s]; j < to->first[s + 1]; j++) {           // what rank s will hold, in its order
                int i = from->place[to->order[j]] - from->first[rank];
                if (i >= 0 && i < mine) e->pack[packed++] = b * mine + i, e->send[s]++;
            }
            for (int j = to->first[rank]; j < to->first[rank + 1]; j++) {     // what this rank gets from rank s
                int i = from->place[to->order[j]];
                if (i >= from->first[s] && i < from->first[s + 1])
                    e->unpack[b * next + j - to->first[rank]] = arrived++, e->receive[s]++;
            }
        }
}
// ============================================================================================================
// 6. The model as data: configuration and parameters (spec §2)
// ============================================================================================================
typedef struct {
    int dim, ffn_dim, num_heads, num_layers, num_full_blocks, sparse_ratio, in_dim, out_dim, text_dim, text_len,
        freq_dim;
    int vocab;                               // > 0: captions are words of a learned table instead of UMT5's embeddings
    int quant, quant_attn;                   // HiF8 on linear layers; on q, k, v
    int T, H_l, W_l;                         // the latent's size: frames, height, width
    double eps;
} Config;

// The same names stand in a checkpoint's metadata.
typedef struct { const char *key; size_t field; int least, most; bool needed; } ConfigRow;
static const ConfigRow CONFIG[] = {
    {"dim", offsetof(Config, dim), 2, 65536, true},
    {"ffn_dim", offsetof(Config, ffn_dim), 1, 262144, true},
    {"num_heads", offsetof(Config, num_heads), 1, 1024, true},
    {"num_layers", offsetof(Config, num_layers), 1, 1024, true},
    {"num_full_blocks", offsetof(Config, num_full_blocks), 0, 1024, true},
    {"sparse_ratio", offsetof(Config, sparse_ratio), 1, 64, true},
    {"in_dim", offsetof(Config, in_dim), 1, 1024, true},
    {"out_dim", offsetof(Config, out_dim), 1, 1024, true},
    {"text_dim", offsetof(Config, text_dim), 1, 65536, true},
    {"text_len", offsetof(Config, text_len), 1, 65536, true},
    {"freq_dim", offsetof(Config, freq_dim), 2, 65536, true},
    {"vocab", offsetof(Config, vocab), 0, 65536, false},
    {"quant", offsetof(Config, quant), 0, 1, false},
    {"quant_attn", offsetof(Config, quant_attn), 0, 1, false},
    {"T", offsetof(Config, T), 1, 4096, false},
    {"H_l", offsetof(Config, H_l), 2, 16384, false},
    {"W_l", offsetof(Config, W_l), 2, 16384, false},
};
enum { CONFIG_ROWS = sizeof(CONFIG) / sizeof(CONFIG[0]) };

static int *config_field(Config *c, int row) { return (int *)(void *)((char *)c + CONFIG[row].field); }

// What a Config must satisfy beyond each number's range; `where` names the file or option it came from.
static void config_check(const Config *c, const char *where) {
    int L = c->num_layers, F = c->num_full_blocks;
    if (c->dim % c->num_heads || c->dim / c->num_heads % 2)
        die("%s: dim %d over %d heads must give an even head_dim", where, c->dim, c->num_heads);
    if (c->freq_dim % 2) die("%s: freq_dim %d must be even", where, c->freq_dim);
    if (F != L && (F % 4 || F > L / 2 || L % 2))
        die("%s: num_full_blocks %d of %d layers: want all of them, or a multiple of 4 up to half of an even number",
            where, F, L);
    if (c->T && (c->H_l % 2 || c->W_l % 2))
        die("%s: latent %dx%d: height and width must be even", where, c->H_l, c->W_l);
}

// One tensor of weights. `w` is the master copy; `c` (not Model's c, the config) is what products read: w as act,
// merged with a LoRA, rounded to HiF8, whatever the run asks for (weights_prepare); w itself where nothing is asked.
typedef struct {
    char name[64];
    int rank;
    size_t shape[5], count, offset;          // offset: floats into the arenas
    float *w, *dw;                           // w NULL: only c is kept (sampling with copies)
    act *c;
    bool product;                            // a matrix that products read, not a vector or a table
    bool block_matrix;                       // one of those that HiF8 covers
    bool codes;                              // w came from HiF8 codes: it is its own rounding, until training moves it
} Param;

typedef struct { Param *w, *b; } Linear;     // [out, in], [out]
typedef struct { Linear q, k, v, o; Param *norm_q, *norm_k; } Attention;
typedef struct { Param *modulation; Attention self, cross; Linear norm3, ffn0, ffn2; } Block;

typedef struct Lora Lora;                    // section 11
typedef struct {
    Config c;
    Linear patch, text0, text2, time0, time2, time_proj, head;
    Param *head_modulation, *words;
    Block *block;
    Param *param;                            // all tensors in file order ...
    int params;
    float *w, *dw;                           // ... and, in training, their two arenas of `count` floats
    size_t count;
    bool training;
    float *amax;                             // room for one maximum
    Lora *lora;                              // adapters on q, k, v, o; NULL: none
} Model;

// THE table of parameters: name, place in the structs above, shape. Negative sizes are the config's.
enum { DIM = -1, FFN = -2, SIX = -3, IN = -4, OUT = -5, TEXT = -6, FREQ = -7, WORDS_ = -8 };
typedef struct { const char *name; size_t field; int shape[5]; } ParamRow;
#define LINEAR(name, S, field, out, in) \
    {name ".weight", offsetof(S, field.w), {out, in}}, {name ".bias", offsetof(S, field.b), {out}}
#define ATTENTION(name, field) \
    LINEAR(name ".q", Block, field.q, DIM, DIM), LINEAR(name ".k", Block, field.k, DIM, DIM), \
    LINEAR(name ".v", Block, field.v, DIM, DIM), LINEAR(name ".o", Block, field.o, DIM, DIM), \
    {name ".norm_q.weight", offsetof(Block, field.norm_q), {DIM}}, \
    {name ".norm_k.weight", offsetof(Block, field.norm_k), {DIM}}
static const ParamRow MODEL_TABLE[] = {
    {"patch_embedding.weight", offsetof(Model, patch.w), {DIM, IN, 1, 2, 2}},
    {"patch_embedding.bias", offsetof(Model, patch.b), {DIM}},
    LINEAR("text_embedding.0", Model, text0, DIM, TEXT), LINEAR("text_embedding.2", Model, text2, DIM, DIM),
    LINEAR("time_embedding.0", Model, time0, DIM, FREQ), LINEAR("time_embedding.2", Model, time2, DIM, DIM),
    LINEAR("time_projection.1", Model, time_proj, SIX, DIM),
    {"head.modulation", offsetof(Model, head_modulation), {1, 2, DIM}}, LINEAR("head.head", Model, head, OUT, DIM),
    {"text_encoder.weight", offsetof(Model, words), {WORDS_, TEXT}},
};
static const ParamRow BLOCK_TABLE[] = {
    {"modulation", offsetof(Block, modulation), {1, 6, DIM}},
    ATTENTION("self_attn", self), LINEAR("norm3", Block, norm3, DIM, 0), ATTENTION("cross_attn", cross),
    LINEAR("ffn.0", Block, ffn0, FFN, DIM), LINEAR("ffn.2", Block, ffn2, DIM, FFN),
};
enum { MODEL_ROWS = sizeof(MODEL_TABLE) / sizeof(ParamRow), BLOCK_ROWS = sizeof(BLOCK_TABLE) / sizeof(ParamRow) };

static size_t config_size(const Config *c, int size) {
    switch (size) {
    case DIM:  return (size_t)c->dim;           case FFN:   return (size_t)c->ffn_dim;
    case SIX:  return 6 * (size_t)c->dim;       case IN:    return (size_t)c->in_dim;
    case OUT:  return 4 * (size_t)c->out_dim;   case TEXT:  return (size_t)c->text_dim;
    case FREQ: return (size_t)c->freq_dim;      case WORDS_: return (size_t)c->vocab;
    default:   return (size_t)size;
    }
}

// Appends one row of a table to m->param and points its struct field at it. block: index, or −1 outside the blocks.
static void param_add(Model *m, const ParamRow *row, void *owner, int block) {
    Param *p = &m->param[m->params++];
    if (block < 0) snprintf(p->name, sizeof(p->name), "%s", row->name);
    else snprintf(p->name, sizeof(p->name), "blocks.%d.%s", block, row->name);
    p->count = 1;
    for (int i = 0; i < 5 && row->shape[i]; i++) p->count *= p->shape[p->rank++] = config_size(&m->c, row->shape[i]);
    p->product = p->rank > 1 && row->shape[0] != 1 && row->shape[0] != WORDS_;    // modulations begin with 1
    p->block_matrix = block >= 0 && p->product;
    *(Param **)(void *)((char *)owner + row->field) = p;
    p->offset = m->count;
    m->count += (p->count + 15) & ~(size_t)15;               // every tensor starts at a multiple of 64 bytes
}

// The list of parameters; no memory for their numbers yet.
static Model *model_layout(const Config *c) {
    Model *m = (Model *)xalloc(1, sizeof(Model));
    m->c = *c;
    m->block = (Block *)xalloc((size_t)c->num_layers, sizeof(Block));
    m->param = (Param *)xalloc(MODEL_ROWS + (size_t)c->num_layers * BLOCK_ROWS, sizeof(Param));
    for (int i = 0; i < MODEL_ROWS; i++)
        if (MODEL_TABLE[i].field != offsetof(Model, words) || c->vocab) param_add(m, &MODEL_TABLE[i], m, -1);
    for (int l = 0; l < c->num_layers; l++)
        for (int i = 0; i < BLOCK_ROWS; i++) param_add(m, &BLOCK_TABLE[i], &m->block[l], l);
    return m;
}

// Products read a copy of a weight only where it differs from the master: bfloat16, HiF8 or a LoRA.
static bool needs_work(const Model *m) { return act_size() != sizeof(float) || m->c.quant || m->lora; }

// Bytes of weights on the device. Only training keeps masters (and gradients) of matrices that have a working copy.
static size_t model_bytes(const Model *m, bool training) {
    size_t matrices = 0;
    for (int i = 0; i < m->params; i++) matrices += m->param[i].product ? m->param[i].count : 0;
    size_t masters = training || !needs_work(m) ? m->count : m->count - matrices;
    return masters * sizeof(float) * (training ? 2 : 1) + (needs_work(m) ? matrices * act_size() : 0);
}

static void model_allocate(Model *m, bool training) {
    m->training = training;
    m->amax = (float *)device_alloc(sizeof(float));
    if (training) {
        m->w = (float *)device_alloc(m->count * sizeof(float));
        m->dw = (float *)device_alloc(m->count * sizeof(float));
    }
    for (int i = 0; i < m->params; i++) {
        Param *p = &m->param[i];
        bool copied = p->product && needs_work(m);
        if (training) p->w = m->w + p->offset, p->dw = m->dw + p->offset;
        else if (!copied) p->w = (float *)device_alloc(p->count * sizeof(float));
        p->c = copied ? (act *)device_alloc(p->count * act_size()) : (act *)p->w;
    }
}

static void lora_merge(Model *m, Param *p);  // section 11

// Master weight w[count] -> what products read: cast, LoRA merged, rounded to HiF8.
static void param_prepare(Model *m, Param *p, const float *w) {
    if (!p->product || !needs_work(m)) return;
    to_act(p->c, w, p->count);
    if (m->lora) lora_merge(m, p);
    if (!m->c.quant || !p->block_matrix || (p->codes && !m->lora)) return;
    absmax(m->amax, p->c, p->count);
    hif8_tensor(p->c, p->c, p->count, 15, m->amax);
}

// After every change of the weights.
static void weights_prepare(Model *m) {
    for (int i = 0; i < m->params; i++) param_prepare(m, &m->param[i], m->param[i].w);
}

// A tensor's values from the host.
static void param_set(Model *m, Param *p, const float *host) {
    float *w = p->w ? p->w : (float *)device_alloc(p->count * sizeof(float));
    upload(w, host, p->count * sizeof(float));
    param_prepare(m, p, w);
    if (!p->w) device_free(w);
}

// First weights: matrices normal with deviation 1/√in, biases 0, norms 1, modulation normal with 1/√dim. The head is
// zero: an untrained model answers v = 0, the best constant.
static void model_random(Model *m, uint64_t seed) {
    for (int i = 0; i < m->params; i++) {
        Param *p = &m->param[i];
        float *host = (float *)xalloc(p->count, sizeof(float));
        size_t in = p->rank > 1 ? p->count / p->shape[0] : 1;
        bool norm = strstr(p->name, "norm") && strstr(p->name, "weight"), head = !strncmp(p->name, "head.head", 9);
        double deviation = strstr(p->name, "modulation")     ? 1 / sqrt((double)m->c.dim)
                           : strstr(p->name, "text_encoder") ? 1
                           : p->rank < 2 || head             ? 0
                                                             : 1 / sqrt((double)in);
        for (size_t j = 0; j < p->count; j++)
            host[j] = norm ? 1.0f : (float)deviation * rng_normal(seed, WEIGHT_STREAM + (uint64_t)i, j);
        param_set(m, p, host);
        free(host);
    }
}
// ============================================================================================================
// 7. Ranks: one sample on many processes (spec §5)
// ============================================================================================================
// Sparse blocks under SSP need ONE all_to_all, of x, between two blocks: a rank holds whole subsequences, so attention
// needs no other rank. Full blocks (and sparse ones with --sp ulysses, to compare) run under Ulysses: q, k, v and the
// output each pass through an all_to_all that trades tokens for heads, FOUR a block, each as large as that one (half as
// many bytes where act is bfloat16: x stays float). With 2·R ranks the conditional
// and the unconditional half of guidance run side by side.
// Everything that crosses between ranks goes through all_to_all(), which counts calls, bytes and time by purpose.
enum { EXCHANGE, ULYSSES_FULL, ULYSSES_SPARSE, CONVERT, GRADIENTS, MAXIMA, OUTPUT, GUIDANCE, PURPOSES };
static const char *const PURPOSE_NAME[] = {
    "exchange (SSP)", "Ulysses, full blocks", "Ulysses, sparse blocks", "full<->sparse",
    "gradients", "HiF8 maxima", "output", "guidance"};

typedef struct {
    int rank, size;                          // of the R ranks that share one sample
    int half, halves;                        // 0 conditional, 1 unconditional, where halves = 2
    bool ulysses;                            // sparse blocks under Ulysses, too
    size_t calls[PURPOSES], bytes[PURPOSES]; // sent to OTHER ranks
    double time[PURPOSES];
} Ranks;

// One machine's ranks share its cores, unless OMP_NUM_THREADS says how.
#ifdef _OPENMP
static void share_cores(int ranks) {
    int cores = omp_get_num_procs() / ranks;
    if (!getenv("OMP_NUM_THREADS")) omp_set_num_threads(cores > 1 ? cores : 1);
}
#else
static void share_cores(int ranks) { (void)ranks; }
#endif

#ifdef OSP_MPI
static MPI_Comm sample_ranks = MPI_COMM_NULL, guidance_pair = MPI_COMM_NULL;

static void wait_for_rank_0(void) {          // rank 0's abort ends the others before they repeat its message
    int up = 0, rank = 0;
    MPI_Initialized(&up);
    if (up) MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    if (rank > 0) sleep(2);
}

static void abort_ranks(void) {
    int up = 0;
    MPI_Initialized(&up);
    if (up) MPI_Abort(MPI_COMM_WORLD, 2);
}

static MPI_Comm ranks_of(int purpose) {
    return purpose == GUIDANCE ? guidance_pair : sample_ranks == MPI_COMM_NULL ? MPI_COMM_WORLD : sample_ranks;
}

// How many ranks run on this machine.
static int ranks_here(void) {
    MPI_Comm here;
    int count;
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &here);
    MPI_Comm_size(here, &count);
    MPI_Comm_free(&here);
    return count;
}

// The transfer itself, between buffers in host memory.
static void mpi_all_to_all(void *to, const void *from, const int *receive, const int *send, bool same, size_t row_bytes,
                           int purpose) {
    MPI_Comm comm = ranks_of(purpose);
    int R, at_send = 0, at_receive = 0;
    MPI_Comm_size(comm, &R);
    int *send_at = (int *)xalloc(2 * (size_t)R, sizeof(int)), *receive_at = send_at + R;
    for (int s = 0; s < R; s++) {
        send_at[s] = same ? 0 : at_send, receive_at[s] = at_receive;
        at_send += send[s], at_receive += receive[s];
    }
    MPI_Datatype row;
    MPI_Type_contiguous((int)row_bytes, MPI_BYTE, &row);
    MPI_Type_commit(&row);
    MPI_Alltoallv(from, send, send_at, row, to, receive, receive_at, row, comm);
    MPI_Type_free(&row);
    free(send_at);
}

static void ranks_start(Ranks *k, int *argc, char ***argv) {
    MPI_Init(argc, argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &k->rank);
    MPI_Comm_size(MPI_COMM_WORLD, &k->size);
    k->halves = 1;
    share_cores(ranks_here());
}

// All ranks of the world -> `halves` groups of size/halves ranks.
static void ranks_split(Ranks *k, int halves) {
    int R = k->size / halves, world = k->rank;
    MPI_Comm_split(MPI_COMM_WORLD, world / R, world, &sample_ranks);
    MPI_Comm_split(MPI_COMM_WORLD, world % R, world, &guidance_pair);
    k->size = R, k->rank = world % R, k->half = world / R, k->halves = halves;
}

static void ranks_end(void) { MPI_Finalize(); }
#else
static void wait_for_rank_0(void) {}
static void abort_ranks(void) {}
static int ranks_here(void) { return 1; }
static void mpi_all_to_all(void *to, const void *from, const int *receive, const int *send, bool same, size_t row_bytes,
                           int purpose) {
    (void)to, (void)from, (void)receive, (void)send, (void)same, (void)row_bytes, (void)purpose;
}
static void ranks_start(Ranks *k, int *argc, char ***argv) {
    (void)argc, (void)argv, k->size = k->halves = 1;
    share_cores(ranks_here());
}
static void ranks_split(Ranks *k, int halves) { (void)k, (void)halves; }
static void ranks_end(void) {}
#endif

// From device memory to device memory: straight through MPI on the CPU; osp_cuda.cu stages or uses NCCL.
static void device_all_to_all(void *to, const void *from, const int *receive, const int *send, bool same,
                              size_t row_bytes, int rank, int R, int purpose);
#ifndef OSP_CUDA
static void device_all_to_all(void *to, const void *from, const int *receive, const int *send, bool same,
                              size_t row_bytes, int rank, int R, int purpose) {
    (void)rank, (void)R;
    mpi_all_to_all(to, from, receive, send, same, row_bytes, purpose);
}
#endif

// THE transfer. Rank s gets the next send[s] rows of `from` (`same`: everyone gets the same rows, an all_gather); the
// receive[s] rows of rank s follow those of rank s−1 in `to`. Rows are row_bytes long, pointers the device's.
static void all_to_all(Ranks *k, void *to, const void *from, const int *receive, const int *send, bool same,
                       size_t row_bytes, int purpose) {
    int R = purpose == GUIDANCE ? k->halves : k->size, me = purpose == GUIDANCE ? k->half : k->rank;
    wait_device();                                                      // so that the time is the transfer's alone
    double begin = seconds();
    device_all_to_all(to, from, receive, send, same, row_bytes, me, R, purpose);
    k->time[purpose] += seconds() - begin;
    k->calls[purpose]++;
    for (int s = 0; s < R; s++)
        if (s != me) k->bytes[purpose] += (size_t)send[s] * row_bytes;
}

// Everyone's `count` rows, in rank order.
static void all_gather(Ranks *k, void *to, const void *from, int count, size_t row_bytes, int purpose) {
    int R = purpose == GUIDANCE ? k->halves : k->size;
    int *counts = (int *)xalloc((size_t)R, sizeof(int));
    for (int s = 0; s < R; s++) counts[s] = count;
    all_to_all(k, to, from, counts, counts, true, row_bytes, purpose);
    free(counts);
}

// x[n] = Σ over ranks, in rank order, so that every run gives the same bytes: each rank adds up one slice, then all
// gather the slices. only_first: the other ranks end with zeros instead (see the text's gradients in section 8).
static void sum_over_ranks(Ranks *k, float *x, size_t n, bool only_first) {
    int R = k->size, slice = (int)((n + (size_t)R - 1) / (size_t)R);
    if (R == 1) return;
    if (n > INT_MAX) die("%zu gradients are more than MPI's counts hold: train fewer, or on one rank", n);
    int *send = (int *)xalloc(2 * (size_t)R, sizeof(int)), *receive = send + R;
    float *parts = (float *)device_alloc((size_t)R * (size_t)slice * sizeof(float));
    for (int s = 0; s < R; s++) {
        size_t begin = (size_t)s * (size_t)slice, end = begin + (size_t)slice;
        send[s] = (int)((end < n ? end : n) - (begin < n ? begin : n));
    }
    int mine = send[k->rank];
    for (int s = 0; s < R; s++) receive[s] = mine;
    all_to_all(k, parts, x, receive, send, false, sizeof(float), GRADIENTS);
    for (int s = 1; s < R; s++) lincomb(parts, 1, parts, 1, parts + (size_t)s * (size_t)mine, (size_t)mine);
    all_to_all(k, x, parts, send, receive, true, sizeof(float), GRADIENTS);             // now everyone gets my slice
    if (only_first && k->rank > 0) zero(x, n * sizeof(float));
    device_free(parts);
    free(send);
}

static void max_over_ranks(Ranks *k, float *m) {
    if (k->size == 1) return;
    size_t R = (size_t)k->size;
    float *all = (float *)device_alloc(R * sizeof(float)), *host = (float *)xalloc(R, sizeof(float));
    all_gather(k, all, m, 1, sizeof(float), MAXIMA);
    download(host, all, R * sizeof(float));
    for (size_t s = 1; s < R; s++) host[0] = fmaxf(host[0], host[s]);
    upload(m, host, sizeof(float));
    device_free(all);
    free(host);
}

// A line for each purpose that was used: what this rank sent to others.
static void ranks_report(const Ranks *k) {
    for (int p = 0; p < PURPOSES; p++)
        if (k->calls[p])
            fprintf(stderr, "rank %d, %s: %zu calls, %.3f MB sent, %.3f s\n", k->rank, PURPOSE_NAME[p], k->calls[p],
                    (double)k->bytes[p] / 1e6, k->time[p]);
}

// All ranks must read the same bytes (checkpoint, step to resume from): everyone compares hashes and stops as one.
static uint64_t hash_bytes(const void *data, size_t size) {
    uint64_t h = 0xCBF29CE484222325ull;                                 // FNV-1a
    for (size_t i = 0; i < size; i++) h = (h ^ ((const uint8_t *)data)[i]) * 0x100000001B3ull;
    return h;
}

static void ranks_agree(Ranks *k, const void *data, size_t size, const char *what) {
    if (k->size == 1) return;
    uint64_t mine = hash_bytes(data, size), *all = (uint64_t *)xalloc((size_t)k->size, sizeof(uint64_t));
    void *device = device_alloc(8), *gathered = device_alloc(8 * (size_t)k->size);
    upload(device, &mine, 8);
    all_gather(k, gathered, device, 1, 8, OUTPUT);
    download(all, gathered, 8 * (size_t)k->size);
    for (int s = 0; s < k->size; s++)
        if (all[s] != all[0])
            die("rank %d has a different %s from rank 0: start the same program on the same files everywhere", s, what);
    device_free(device), device_free(gathered);
    free(all);
}
// ============================================================================================================
// 8. The DiT, forward and backward (spec §2, §3, §5)
// ============================================================================================================
// What one attention layer keeps for its backward pass. Rows are the rank's own tokens; the four *_all are the same
// vectors where attention sees them: under Ulysses all tokens and 1/R of the heads, otherwise just q, k, v, o.
typedef struct {
    act *q_raw, *k_raw, *q, *k, *v, *o, *oq, *y;      // y: the layer's output; oq: what its o matrix read, Q(o) or o
    act *q_all, *k_all, *v_all, *o_all;
    float *q_rstd, *k_rstd, *lse;
} SavedAttention;

// What one block keeps. x0, x1, x2: the residual stream before self-attention, cross-attention, ffn.
typedef struct {
    int pattern, place;                               // who attends with whom; the order the tokens stand in
    float *x0, *x1, *x2, *stat1, *stat2, *stat3, *e;  // e[B, 6, dim]: shift, scale, gate; shift, scale, gate
    act *h1, *h2, *h3, *f_pre, *f, *y;
    SavedAttention self, cross;
} Saved;

// A batch on its way through the model: sizes, token orders, and every buffer. Built once, used for many steps.
typedef struct {
    Model *m;
    Ranks *ranks;
    int B, T, H, W;                                   // samples; the token grid
    bool training, show;                              // show: draw the blocks on stderr as they run
    size_t N, n[PATTERNS];                            // tokens of a sample; how many of them this rank holds
    Pattern pattern[PATTERNS];
    Exchange move[PATTERNS][PATTERNS];                // from one order to another
    float *rope[PATTERNS];                            // [n, head_dim/2, 2] in each order
    Sequences self[PATTERNS], cross[PATTERNS];
    int *heads_pack, *heads_unpack[PATTERNS], *tokens_pack[PATTERNS], *tokens_unpack;   // Ulysses, see trade()
    Saved *saved;                                     // [layers + 1]; the last: x0 alone, the head's input, place FULL
    act *sin, *t1, *t1s, *e_act, *es, *e0_act;        // the timestep's way
    float *e, *e0, *head_e;                           // [B, dim], [B, 6, dim], [B, 2, dim]
    act *text, *text_pre, *text_h, *context, *context_q;   // [B·text_len, ...]
    int *ids;                                         // [B·text_len] words, −1 padding
    float *word_pos;                                  // [text_len, text_dim]
    act *patches, *tokens, *h, *y_all, *y;            // h: the head's input after its norm
    float *head_stat, *out;                           // out[B, out_dim, T, 2H, 2W]
    float *dx, *dx2, *de, *de0, *de_e, *dhead_e, *small;   // gradients: residual stream (two to exchange), modulations
    act *d1, *d2, *d3, *d4, *d5, *dff, *dcontext, *dtext, *dpatches;
    float *packed;                                    // [rows, dim]: what is sent
    act *trade;                                       // the same for Ulysses
} Run;

static bool spread(const Run *r, int place) { return r->ranks->size > 1 && place == FULL; }   // attention under Ulysses

// ---- building a run -----------------------------------------------------------------------------------------------
static int *to_device(const int *host, size_t count) {
    int *p = (int *)device_alloc(count * sizeof(int));
    upload(p, host, count * sizeof(int));
    return p;
}

// out[2·half] = cos, then sin, of position·10000^(−j/half). The angles need double: float is off by 1e-5 near t = 1000.
static void sinusoids(float *out, double position, int half) {
    for (int j = 0; j < half; j++) {
        double angle = position * pow(10000.0, -(double)j / half);
        out[j] = (float)cos(angle), out[half + j] = (float)sin(angle);
    }
}

// (cos, sin) for every token this rank holds in a pattern's order: out[n, head_dim/2, 2]. A head's pairs are shared out
// over t, h, w; on an axis with m pairs, pair j turns by position · 10000^(−j/m). A token keeps its own (t, h, w).
static float *rope_table(const Pattern *p, int rank, int H, int W, int head_dim) {
    int pairs = head_dim / 2, m[3] = {pairs - 2 * (pairs / 3), pairs / 3, pairs / 3}, first = p->first[rank];
    size_t n = (size_t)(p->first[rank + 1] - first), count = n * (size_t)pairs * 2;
    float *host = (float *)xalloc(count, sizeof(float)), *out = host;
    for (size_t i = 0; i < n; i++) {
        int token = p->order[(size_t)first + i], position[3] = {token / (H * W), token / W % H, token % W};
        for (int axis = 0; axis < 3; axis++)
            for (int j = 0; j < m[axis]; j++) {
                double angle = position[axis] * pow(10000.0, -(double)j / m[axis]);
                *out++ = (float)cos(angle), *out++ = (float)sin(angle);
            }
    }
    float *table = (float *)device_alloc(count * sizeof(float));
    upload(table, host, count * sizeof(float));
    free(host);
    return table;
}

// Every sample's subsequences [low, high) of a pattern; rows of a sample follow each other.
static void sequences_init(Sequences *s, const Pattern *p, int low, int high, int B) {
    int n = p->start[high] - p->start[low];
    s->q = (int *)xalloc((size_t)B * (size_t)(high - low) + 1, sizeof(int));
    for (int b = 0; b < B; b++)
        for (int i = low; i < high; i++) s->q[s->count++] = b * n + p->start[i] - p->start[low];
    s->q[s->count] = B * n;
    s->k = s->q;
    s->q_device = s->k_device = to_device(s->q, (size_t)s->count + 1);
}

static void cross_sequences_init(Sequences *s, size_t n, int text_len, int B) {
    s->q = (int *)xalloc(2 * ((size_t)B + 1), sizeof(int));
    s->k = s->q + B + 1;
    for (int b = 0; b <= B; b++) s->q[b] = b * (int)n, s->k[b] = b * text_len;
    s->count = B;
    s->q_device = to_device(s->q, (size_t)B + 1), s->k_device = to_device(s->k, (size_t)B + 1);
}

// Ulysses' maps, see trade(). Tokens arrive by (source rank, sample, token); heads are dealt out in rank order.
static void ulysses_init(Run *r) {
    int R = r->ranks->size, B = r->B, *first = r->pattern[FULL].first;
    size_t rows = (size_t)B * r->n[FULL], all = (size_t)B * r->N;
    int *map = (int *)xalloc(rows * (size_t)R > all ? rows * (size_t)R : all, sizeof(int));
    int *inverse = (int *)xalloc(rows * (size_t)R > all ? rows * (size_t)R : all, sizeof(int));
    for (size_t i = 0; i < rows; i++)
        for (size_t s = 0; s < (size_t)R; s++) {
            map[s * rows + i] = (int)(i * (size_t)R + s);
            inverse[i * (size_t)R + s] = (int)(s * rows + i);
        }
    r->heads_pack = to_device(map, rows * (size_t)R), r->tokens_unpack = to_device(inverse, rows * (size_t)R);
    for (int p = 0; p < PATTERNS; p++) {
        for (int s = 0; s < R; s++)
            for (int b = 0; b < B; b++)
                for (int i = first[s]; i < first[s + 1]; i++) {
                    int arrival = B * first[s] + b * (first[s + 1] - first[s]) + i - first[s];
                    int there = b * (int)r->N + r->pattern[p].place[i];
                    map[there] = arrival, inverse[arrival] = there;
                }
        r->heads_unpack[p] = to_device(map, all), r->tokens_pack[p] = to_device(inverse, all);
    }
    free(map), free(inverse);
}

// One pass over every buffer: with base NULL it only adds up the bytes, so memory is known before any is asked for.
typedef struct { char *base; size_t used; } Arena;
static void *take(Arena *a, size_t count, size_t size) {
    size_t at = a->used;
    a->used += (count * size + 255) & ~(size_t)255;
    return a->base ? a->base + at : NULL;
}
static act *take_act(Arena *a, size_t count) { return (act *)take(a, count, act_size()); }
static float *take_float(Arena *a, size_t count) { return (float *)take(a, count, sizeof(float)); }

static void attention_buffers(Arena *a, Run *r, SavedAttention *s, size_t rows, size_t kv_rows, size_t all,
                              bool spread_out) {
    size_t D = (size_t)r->m->c.dim, heads = (size_t)r->m->c.num_heads, share = all * D / (size_t)r->ranks->size;
    s->q_raw = take_act(a, rows * D), s->q = take_act(a, rows * D), s->k_raw = take_act(a, kv_rows * D);
    s->k = take_act(a, kv_rows * D), s->v = take_act(a, kv_rows * D), s->o = take_act(a, rows * D);
    s->oq = r->m->c.quant ? take_act(a, rows * D) : s->o;
    s->y = take_act(a, rows * D);
    s->q_rstd = take_float(a, rows), s->k_rstd = take_float(a, kv_rows);
    s->q_all = spread_out ? take_act(a, share) : s->q, s->k_all = spread_out ? take_act(a, share) : s->k;
    s->v_all = spread_out ? take_act(a, share) : s->v, s->o_all = spread_out ? take_act(a, share) : s->o;
    s->lse = r->training ? take_float(a, spread_out ? all * heads / (size_t)r->ranks->size : rows * heads) : NULL;
}

// Training keeps every block's activations; otherwise all blocks share one set, and x0 alternates between two.
static void block_buffers(Arena *a, Run *r, int i, size_t most) {
    const Config *c = &r->m->c;
    Saved *s = &r->saved[i];
    int L = c->num_layers;
    size_t B = (size_t)r->B, D = (size_t)c->dim, rows = r->training ? B * r->n[s->place] : B * most;
    s->x0 = r->training || i < 2 ? take_float(a, rows * D) : r->saved[i - 2].x0;
    if (i == L) return;
    if (!r->training && i > 0) {
        Saved own = *s;
        *s = r->saved[0];
        s->pattern = own.pattern, s->place = own.place, s->x0 = s->x1 = s->x2 = own.x0;
        if (!spread(r, s->place))
            s->self.q_all = s->self.q, s->self.k_all = s->self.k, s->self.v_all = s->self.v, s->self.o_all = s->self.o;
        return;
    }
    s->x1 = r->training ? take_float(a, rows * D) : s->x0, s->x2 = r->training ? take_float(a, rows * D) : s->x0;
    s->stat1 = take_float(a, rows * 2), s->stat2 = take_float(a, rows * 2), s->stat3 = take_float(a, rows * 2);
    s->e = take_float(a, B * 6 * D);
    s->h1 = take_act(a, rows * D), s->h2 = take_act(a, rows * D), s->h3 = take_act(a, rows * D);
    s->f_pre = r->training ? take_act(a, rows * (size_t)c->ffn_dim) : NULL;
    s->f = take_act(a, rows * (size_t)c->ffn_dim), s->y = take_act(a, rows * D);
    attention_buffers(a, r, &s->self, rows, rows, B * r->N, spread(r, s->place));
    attention_buffers(a, r, &s->cross, rows, B * (size_t)c->text_len, 0, false);
}

static void run_buffers(Arena *a, Run *r, size_t most) {
    const Config *c = &r->m->c;
    size_t B = (size_t)r->B, D = (size_t)c->dim, rows = B * most, text = B * (size_t)c->text_len,
           R = (size_t)r->ranks->size;
    size_t pixels = B * (size_t)c->out_dim * r->N * 4,
           patch = 4 * (size_t)(c->in_dim > c->out_dim ? c->in_dim : c->out_dim);
    size_t wide = rows > text ? rows : text, share = B * r->N * D / R;
    for (int i = 0; i <= c->num_layers; i++) block_buffers(a, r, i, most);
    r->sin = take_act(a, B * (size_t)c->freq_dim), r->t1 = take_act(a, B * D), r->t1s = take_act(a, B * D);
    r->e_act = take_act(a, B * D), r->es = take_act(a, B * D), r->e0_act = take_act(a, B * 6 * D);
    r->e = take_float(a, B * D), r->e0 = take_float(a, B * 6 * D), r->head_e = take_float(a, B * 2 * D);
    r->small = take_float(a, B * (D > (size_t)c->freq_dim ? D : (size_t)c->freq_dim));
    r->text = take_act(a, text * (size_t)c->text_dim), r->text_pre = r->training ? take_act(a, text * D) : NULL,
    r->text_h = take_act(a, text * D);
    r->context = take_act(a, text * D), r->context_q = c->quant ? take_act(a, text * D) : r->context;
    r->ids = (int *)take(a, text, sizeof(int)), r->word_pos = take_float(a, (size_t)c->text_len * (size_t)c->text_dim);
    r->patches = take_act(a, rows * patch), r->tokens = take_act(a, rows * D), r->h = take_act(a, rows * D);
    r->y = take_act(a, rows * patch), r->y_all = R > 1 ? take_act(a, B * r->N * patch) : NULL;
    r->head_stat = take_float(a, rows * 2), r->out = take_float(a, pixels);
    r->dx2 = take_float(a, rows * D);
    r->packed = R > 1 ? take_float(a, 2 * wide * D) : NULL;
    size_t half = rows * D > share ? rows * D : share, all = B * r->N * patch;        // see trade(), gather_tokens()
    r->trade = R > 1 ? take_act(a, 2 * half > all ? 2 * half : all) : NULL;
    if (!r->training) return;
    r->dx = take_float(a, rows * D), r->de = take_float(a, B * 6 * D), r->de0 = take_float(a, B * 6 * D);
    r->de_e = take_float(a, B * D), r->dhead_e = take_float(a, B * 2 * D);
    size_t largest = wide > 6 * B ? wide : 6 * B; // the timestep's gradients pass through d1 and d2 too
    largest = largest * D > share ? largest * D : share;
    r->d1 = take_act(a, largest), r->d2 = take_act(a, largest), r->d3 = take_act(a, largest);
    r->d4 = take_act(a, largest), r->d5 = take_act(a, largest), r->dff = take_act(a, rows * (size_t)c->ffn_dim);
    r->dcontext = take_act(a, text * D), r->dtext = take_act(a, text * (size_t)c->text_dim);
    r->dpatches = take_act(a, rows * patch);
}

// The index maps on the device: orders, exchanges, rotary tables, sequences.
static void run_maps(Run *r) {
    const Config *c = &r->m->c;
    int rank = r->ranks->rank, R = r->ranks->size, L = c->num_layers;
    for (int i = 0; i < L; i++) {
        int p = r->saved[i].pattern, at = r->saved[i].place, count = r->pattern[p].count;
        int low = at == FULL ? 0 : count * rank / R, high = at == FULL ? count : count * (rank + 1) / R;
        if (!r->self[p].q) sequences_init(&r->self[p], &r->pattern[p], low, high, r->B);
        if (!r->cross[at].q) cross_sequences_init(&r->cross[at], r->n[at], c->text_len, r->B);
        if (!r->rope[at]) r->rope[at] = rope_table(&r->pattern[at], rank, r->H, r->W, c->dim / c->num_heads);
    }
    for (int from = 0; from < PATTERNS; from++)
        for (int to = 0; to < PATTERNS; to++) {
            Exchange *e = &r->move[from][to];
            if (from == to) continue;
            exchange_init(e, &r->pattern[from], &r->pattern[to], r->B, rank, R);
            int *pack = e->pack, *unpack = e->unpack;
            e->pack = to_device(pack, e->sent), e->unpack = to_device(unpack, e->received);
            free(pack), free(unpack);
        }
    if (R > 1) ulysses_init(r);
    if (!c->vocab) return;
    float *host = (float *)xalloc((size_t)c->text_len * (size_t)c->text_dim, sizeof(float));
    for (int l = 0; l < c->text_len; l++) sinusoids(host + l * c->text_dim, l, c->text_dim / 2);     // word positions
    upload(r->word_pos, host, (size_t)c->text_len * (size_t)c->text_dim * sizeof(float));
    free(host);
}

// Everything for batches of B samples on a grid of T x H x W tokens. *bytes, where wanted, gets the buffers' size and
// nothing is allocated: call it so first to tell the user.
static Run *run_new(Model *m, Ranks *ranks, int B, int T, int H, int W, bool training, size_t *bytes) {
    const Config *c = &m->c;
    Run *r = (Run *)xalloc(1, sizeof(Run));
    size_t most = 0;
    r->m = m, r->ranks = ranks, r->B = B, r->T = T, r->H = H, r->W = W, r->training = training;
    r->N = (size_t)T * (size_t)H * (size_t)W;
    if (r->N * (size_t)B > INT_MAX / 2)
        die("%d samples of %zu tokens are more than one run can index: use a smaller batch", B, r->N);
    if (ranks->size > 1 && c->num_heads % ranks->size)
        die("%d heads cannot be shared evenly by %d ranks, as full blocks under Ulysses need", c->num_heads,
            ranks->size);
    if (r->N < (size_t)ranks->size) die("%zu tokens on %d ranks: use fewer ranks", r->N, ranks->size);
    for (int p = 0; p < PATTERNS; p++) {
        pattern_init(&r->pattern[p], p, T, H, W, c->sparse_ratio, ranks->size);
        r->n[p] = (size_t)(r->pattern[p].first[ranks->rank + 1] - r->pattern[p].first[ranks->rank]);
        most = r->n[p] > most ? r->n[p] : most;
    }
    r->saved = (Saved *)xalloc((size_t)c->num_layers + 1, sizeof(Saved));
    for (int i = 0; i < c->num_layers; i++) {
        r->saved[i].pattern = block_pattern(i, c->num_layers, c->num_full_blocks);
        r->saved[i].place = ranks->ulysses && ranks->size > 1 ? FULL : r->saved[i].pattern;
    }
    Arena a = {NULL, 0};
    run_buffers(&a, r, most);
    if (bytes) { *bytes = a.used; return r; }
    a.base = (char *)device_alloc(a.used), a.used = 0;
    run_buffers(&a, r, most);
    run_maps(r);
    return r;
}

// ---- rows in, rows out ------------------------------------------------------------------------------------------
// Q(x; s) of a tensor that may be spread over ranks: its maximum is everyone's (spec §6).
static void quantize(Run *r, act *y, const act *x, size_t n, float s) {
    absmax(r->m->amax, x, n);
    max_over_ranks(r->ranks, r->m->amax);
    hif8_tensor(y, x, n, s, r->m->amax);
}

static void linear(act *y, const act *x, const Linear *l, size_t rows) {
    linear_forward(y, x, l->w->c, l->b->w, rows, (int)l->w->shape[0], (int)(l->w->count / l->w->shape[0]));
}

// dy is overwritten with Q(dy; 224) where the layer is quantized (spec §6): dx, dw and db all see the rounded gradient.
static void linear_back(Run *r, act *dx, act *dy, const act *x, const Linear *l, size_t rows, bool accumulate) {
    int out = (int)l->w->shape[0], in = (int)(l->w->count / l->w->shape[0]);
    if (r->m->c.quant && l->w->block_matrix) quantize(r, dy, dy, rows * (size_t)out, 224);
    linear_backward(dx, l->w->dw, l->b->dw, dy, x, l->w->c, rows, out, in, accumulate);
}

// What lies packed for the other ranks goes to them; what arrives is put in order.
static void deliver(Run *r, float *x_out, int from, int to) {
    const Exchange *e = &r->move[from][to];
    size_t D = (size_t)r->m->c.dim;
    float *arrived = r->packed + e->sent * D;
    all_to_all(r->ranks, arrived, r->packed, e->receive, e->send, false, D * sizeof(float),
               from == FULL || to == FULL ? CONVERT : EXCHANGE);
    gather_rows(x_out, arrived, e->unpack, e->received, D * sizeof(float));
}

// The residual stream from one order to another; also its gradient, the other way.
static void exchange_rows(Run *r, float *x_out, const float *x, int from, int to) {
    const Exchange *e = &r->move[from][to];
    float *packed = r->ranks->size == 1 ? x_out : r->packed;
    gather_rows(packed, x, e->pack, e->sent, (size_t)r->m->c.dim * sizeof(float));
    if (packed != x_out) deliver(r, x_out, from, to);
}

// r->dx from one order to another.
static void exchange_gradient(Run *r, int from, int to) {
    if (from == to) return;
    float *moved = r->dx2;
    exchange_rows(r, moved, r->dx, from, to);
    r->dx2 = r->dx, r->dx = moved;
}

// Ulysses: tokens for heads. Before: my tokens, all heads [B·n, dim]; after: all tokens in the pattern's order, my
// heads [B·N, dim/R]. backwards: the way back. y may be x. A "row" here is one token's share for one rank.
static void trade(Run *r, act *y, const act *x, int pattern, bool backwards) {
    int R = r->ranks->size, D = r->m->c.dim, *counts = (int *)xalloc(2 * (size_t)R, sizeof(int));
    const int *first = r->pattern[FULL].first;
    size_t mine = (size_t)r->B * r->n[FULL] * (size_t)R, all = (size_t)r->B * r->N, row = (size_t)(D / R) * act_size();
    act *arrived = act_at(r->trade, (mine > all ? mine : all) * (size_t)(D / R));
    for (int s = 0; s < R; s++) counts[s] = (int)(mine / (size_t)R), counts[R + s] = r->B * (first[s + 1] - first[s]);
    int purpose = pattern == FULL ? ULYSSES_FULL : ULYSSES_SPARSE;
    if (!backwards) {
        gather_rows(r->trade, x, r->heads_pack, mine, row);
        all_to_all(r->ranks, arrived, r->trade, counts + R, counts, false, row, purpose);
        gather_rows(y, arrived, r->heads_unpack[pattern], all, row);
    } else {
        gather_rows(r->trade, x, r->tokens_pack[pattern], all, row);
        all_to_all(r->ranks, arrived, r->trade, counts, counts + R, false, row, purpose);
        gather_rows(y, arrived, r->tokens_unpack, mine, row);
    }
    free(counts);
}

// ---- attention layer: self (context is h itself) and cross ---------------------------------------------------------
// h[rows, dim] queries, context[kv_rows, dim] keys and values, n and kv_n of them in each sample. rope NULL: none.
static void attention_layer(Run *r, const Attention *w, SavedAttention *s, const act *h, const act *context, size_t n,
                            size_t kv_n, const float *rope, const Sequences *sequences, int trade_pattern) {
    const Config *c = &r->m->c;
    int D = c->dim, B = r->B, heads = c->num_heads, R = trade_pattern < 0 ? 1 : r->ranks->size;
    size_t rows = (size_t)B * n, kv_rows = (size_t)B * kv_n, width = (size_t)D;
    linear(s->q_raw, h, &w->q, rows);
    linear(s->k_raw, context, &w->k, kv_rows);
    linear(s->v, context, &w->v, kv_rows);
    rmsnorm_rope_forward(s->q, s->q_rstd, s->q_raw, w->norm_q->w, rope, B, n, D, heads, (float)c->eps);
    rmsnorm_rope_forward(s->k, s->k_rstd, s->k_raw, w->norm_k->w, rope, B, kv_n, D, heads, (float)c->eps);
    if (c->quant_attn) {
        quantize(r, s->q, s->q, rows * width, 15);
        quantize(r, s->k, s->k, kv_rows * width, 15);
        quantize(r, s->v, s->v, kv_rows * width, 15);
    }
    if (R > 1) {
        trade(r, s->q_all, s->q, trade_pattern, false);
        trade(r, s->k_all, s->k, trade_pattern, false);
        trade(r, s->v_all, s->v, trade_pattern, false);
    }
    attention_forward(s->o_all, s->lse, s->q_all, s->k_all, s->v_all, sequences, heads / R, D / heads);
    if (R > 1) trade(r, s->o, s->o_all, trade_pattern, true);
    if (c->quant) quantize(r, s->oq, s->o, rows * width, 15);
    linear(s->y, s->oq, &w->o, rows);
}

// From r->d1 = d y: dh written; dcontext added to (dcontext == dh: self-attention). The text of cross-attention is one
// tensor that all ranks hold, so the gradients of its k and v are summed over ranks, and only rank 0 carries them on.
static void attention_layer_back(Run *r, const Attention *w, SavedAttention *s, act *dh, act *dcontext, const act *h,
                                 const act *context, size_t n, size_t kv_n, const float *rope,
                                 const Sequences *sequences, int trade_pattern) {
    const Config *c = &r->m->c;
    int D = c->dim, B = r->B, heads = c->num_heads, R = trade_pattern < 0 ? 1 : r->ranks->size;
    size_t rows = (size_t)B * n, kv_rows = (size_t)B * kv_n, width = (size_t)D;
    act *dout = r->d2, *dq = r->d3, *dk = r->d4, *dv = r->d5;
    linear_back(r, dout, r->d1, s->oq, &w->o, rows, false);
    if (R > 1) trade(r, dout, dout, trade_pattern, false);
    attention_backward(dq, dk, dv, dout, s->q_all, s->k_all, s->v_all, s->o_all, s->lse, sequences, heads / R,
                       D / heads);
    act *const gradients[] = {dq, dk, dv};
    for (int i = 0; i < 3 && R > 1; i++) trade(r, gradients[i], gradients[i], trade_pattern, true);
    if (dcontext != dh && r->ranks->size > 1) {
        float *sums[] = {r->packed, r->packed + kv_rows * width};
        to_float(sums[0], dk, kv_rows * width), to_float(sums[1], dv, kv_rows * width);
        sum_over_ranks(r->ranks, r->packed, 2 * kv_rows * width, true);
        to_act(dk, sums[0], kv_rows * width), to_act(dv, sums[1], kv_rows * width);
    }
    if (c->quant_attn) {
        quantize(r, dq, dq, rows * width, 224);
        quantize(r, dk, dk, kv_rows * width, 224);
        quantize(r, dv, dv, kv_rows * width, 224);
    }
    rmsnorm_rope_backward(dk, w->norm_k->dw, dk, s->k_raw, s->k_rstd, w->norm_k->w, rope, B, kv_n, D, heads);
    rmsnorm_rope_backward(dq, w->norm_q->dw, dq, s->q_raw, s->q_rstd, w->norm_q->w, rope, B, n, D, heads);
    linear_back(r, dh, dq, h, &w->q, rows, false);
    linear_back(r, dcontext, dk, context, &w->k, kv_rows, true);
    linear_back(r, dcontext, dv, context, &w->v, kv_rows, true);
}

// ---- a block ----------------------------------------------------------------------------------------------------
// Vectors of the modulation e[B, 6, dim], for each sample; NOTHING where there is none.
static const PerSample NOTHING = {NULL, 0};
static PerSample of_row(float *e, int row, int rows, int D) {
    PerSample v = {e + (size_t)row * (size_t)D, (size_t)rows * (size_t)D};
    return v;
}
static PerSample shared(float *p) { PerSample v = {p, 0}; return v; }

//   x += gate1 · SelfAttn(LN(x)·(1 + scale1) + shift1)
//   x += CrossAttn(LN(x)·w3 + b3, text)
//   x += gate2 · ffn(LN(x)·(1 + scale2) + shift2)              then, if the next block wants it, in another order
static void block_forward(Run *r, int i) {
    const Config *c = &r->m->c;
    const Block *w = &r->m->block[i];
    Saved *s = &r->saved[i], *next = &r->saved[i + 1];
    int B = r->B, D = c->dim, at = s->place;
    size_t n = r->n[at], rows = (size_t)B * n;
    float eps = (float)c->eps, *e = s->e;
    PerSample shift1 = of_row(e, 0, 6, D), scale1 = of_row(e, 1, 6, D), gate1 = of_row(e, 2, 6, D);
    PerSample shift2 = of_row(e, 3, 6, D), scale2 = of_row(e, 4, 6, D), gate2 = of_row(e, 5, 6, D);
    modulation_forward(e, w->modulation->w, r->e0, B, 6, 6, D);

    residual_norm_forward(NULL, s->h1, s->stat1, s->x0, NULL, NOTHING, shift1, scale1, 1, B, n, D, eps);
    if (c->quant) quantize(r, s->h1, s->h1, rows * (size_t)D, 15);
    attention_layer(r, &w->self, &s->self, s->h1, s->h1, n, n, r->rope[at], &r->self[s->pattern],
                    spread(r, at) ? s->pattern : -1);

    residual_norm_forward(s->x1, s->h2, s->stat2, s->x0, s->self.y, gate1, shared(w->norm3.b->w), shared(w->norm3.w->w),
                          0, B, n, D, eps);
    if (c->quant) quantize(r, s->h2, s->h2, rows * (size_t)D, 15);
    attention_layer(r, &w->cross, &s->cross, s->h2, r->context_q, n, (size_t)c->text_len, NULL, &r->cross[at], -1);

    residual_norm_forward(s->x2, s->h3, s->stat3, s->x1, s->cross.y, NOTHING, shift2, scale2, 1, B, n, D, eps);
    if (c->quant) quantize(r, s->h3, s->h3, rows * (size_t)D, 15);
    linear_gelu_forward(s->f, s->f_pre, s->h3, w->ffn0.w->c, w->ffn0.b->w, rows, c->ffn_dim, D);
    if (c->quant) quantize(r, s->f, s->f, rows * (size_t)c->ffn_dim, 15);
    linear(s->y, s->f, &w->ffn2, rows);

    const int *pack = at == next->place ? NULL : r->move[at][next->place].pack;
    float *x_out = pack && r->ranks->size > 1 ? r->packed : next->x0;
    residual_gather_forward(x_out, s->x2, s->y, gate2, pack, rows, B, n, D);
    if (x_out != next->x0) deliver(r, next->x0, at, next->place);
}

// From r->dx, the gradient of the block's output in the next block's order, to that of its input in its own.
static void block_backward(Run *r, int i) {
    const Config *c = &r->m->c;
    const Block *w = &r->m->block[i];
    Saved *s = &r->saved[i], *next = &r->saved[i + 1];
    int B = r->B, D = c->dim, at = s->place;
    size_t n = r->n[at], rows = (size_t)B * n;
    float *e = s->e, *de = r->de;
    PerSample scale1 = of_row(e, 1, 6, D), gate1 = of_row(e, 2, 6, D), scale2 = of_row(e, 4, 6, D),
              gate2 = of_row(e, 5, 6, D);
    zero(de, (size_t)B * 6 * (size_t)D * sizeof(float));
    exchange_gradient(r, next->place, at);
    // x += gate2 · ffn(LN(x)·(1 + scale2) + shift2)
    gate_backward(r->d1, of_row(de, 5, 6, D), r->dx, s->y, gate2, B, n, D);
    linear_back(r, r->dff, r->d1, s->f, &w->ffn2, rows, false);
    gelu_backward(r->dff, r->dff, s->f_pre, rows * (size_t)c->ffn_dim);
    linear_back(r, r->d1, r->dff, s->h3, &w->ffn0, rows, false);
    norm_backward(r->dx, of_row(de, 3, 6, D), of_row(de, 4, 6, D), r->d1, s->x2, s->stat3, scale2, 1, B, n, D);
    // x += CrossAttn(LN(x)·w3 + b3, text)
    gate_backward(r->d1, NOTHING, r->dx, s->cross.y, NOTHING, B, n, D);
    attention_layer_back(r, &w->cross, &s->cross, r->d1, r->dcontext, s->h2, r->context_q, n, (size_t)c->text_len, NULL,
                         &r->cross[at], -1);
    norm_backward(r->dx, shared(w->norm3.b->dw), shared(w->norm3.w->dw), r->d1, s->x1, s->stat2, shared(w->norm3.w->w),
                  0, B, n, D);
    // x += gate1 · SelfAttn(LN(x)·(1 + scale1) + shift1)
    gate_backward(r->d1, of_row(de, 2, 6, D), r->dx, s->self.y, gate1, B, n, D);
    attention_layer_back(r, &w->self, &s->self, r->d1, r->d1, s->h1, s->h1, n, n, r->rope[at], &r->self[s->pattern],
                         spread(r, at) ? s->pattern : -1);
    norm_backward(r->dx, of_row(de, 0, 6, D), of_row(de, 1, 6, D), r->d1, s->x0, s->stat1, scale1, 1, B, n, D);
    modulation_backward(w->modulation->dw, r->de0, de, B, 6, 6, D);
}

// ---- around the blocks ------------------------------------------------------------------------------------------
// t[B] = 1000σ. Sinusoids -> e[B, dim] -> e0[B, 6, dim].
static void time_forward(Run *r, const double *t) {
    const Model *m = r->m;
    int B = r->B, D = m->c.dim, half = m->c.freq_dim / 2;
    float *host = (float *)xalloc((size_t)B * (size_t)m->c.freq_dim, sizeof(float));
    for (int b = 0; b < B; b++) sinusoids(host + b * 2 * half, t[b], half);
    upload(r->small, host, (size_t)B * 2 * (size_t)half * sizeof(float));
    to_act(r->sin, r->small, (size_t)B * 2 * (size_t)half);
    free(host);
    linear(r->t1, r->sin, &m->time0, (size_t)B);
    silu_forward(r->t1s, r->t1, (size_t)B * (size_t)D);
    linear(r->e_act, r->t1s, &m->time2, (size_t)B);
    silu_forward(r->es, r->e_act, (size_t)B * (size_t)D);
    linear(r->e0_act, r->es, &m->time_proj, (size_t)B);
    to_float(r->e, r->e_act, (size_t)B * (size_t)D);
    to_float(r->e0, r->e0_act, (size_t)B * 6 * (size_t)D);
}

static void time_backward(Run *r) {
    const Model *m = r->m;
    size_t B = (size_t)r->B, D = (size_t)m->c.dim;
    to_act(r->d1, r->de0, B * 6 * D);
    linear_back(r, r->d2, r->d1, r->es, &m->time_proj, B, false);
    silu_backward(r->d2, r->d2, r->e_act, B * D);
    to_float(r->small, r->d2, B * D);
    lincomb(r->small, 1, r->small, 1, r->de_e, B * D);              // e also reaches the head's modulation
    to_act(r->d2, r->small, B * D);
    linear_back(r, r->d1, r->d2, r->t1s, &m->time2, B, false);
    silu_backward(r->d1, r->d1, r->t1, B * D);
    linear_back(r, NULL, r->d1, r->sin, &m->time0, B, false);
}

// r->text[B·text_len, text_dim] -> context[B·text_len, dim]. Padding rows are zeros, go through, and are attended.
static void text_forward(Run *r) {
    const Model *m = r->m;
    size_t rows = (size_t)r->B * (size_t)m->c.text_len;
    if (m->c.vocab) embed_forward(r->text, m->words->w, r->word_pos, r->ids, rows, m->c.text_len, m->c.text_dim);
    linear_gelu_forward(r->text_h, r->text_pre, r->text, m->text0.w->c, m->text0.b->w, rows, m->c.dim, m->c.text_dim);
    linear(r->context, r->text_h, &m->text2, rows);
    if (m->c.quant) quantize(r, r->context_q, r->context, rows * (size_t)m->c.dim, 15);
}

static void text_backward(Run *r) {
    const Model *m = r->m;
    size_t rows = (size_t)r->B * (size_t)m->c.text_len;
    linear_back(r, r->d1, r->dcontext, r->text_h, &m->text2, rows, false);
    gelu_backward(r->d1, r->d1, r->text_pre, rows * (size_t)m->c.dim);
    linear_back(r, r->dtext, r->d1, r->text, &m->text0, rows, false);
    if (m->c.vocab) embed_backward(m->words->dw, r->dtext, r->ids, rows, m->c.vocab, m->c.text_dim);
}

// Rows that the ranks hold in plain order -> all rows, of `width` numbers each, on every rank.
static act *gather_tokens(Run *r, act *mine, size_t width) {
    if (r->ranks->size == 1) return mine;
    int R = r->ranks->size, *counts = (int *)xalloc(2 * (size_t)R, sizeof(int));
    for (int s = 0; s < R; s++) {
        counts[s] = r->B * (int)r->n[FULL];
        counts[R + s] = r->B * (r->pattern[FULL].first[s + 1] - r->pattern[FULL].first[s]);
    }
    all_to_all(r->ranks, r->trade, mine, counts + R, counts, true, width * act_size(), OUTPUT);
    gather_rows(r->y_all, r->trade, r->heads_unpack[FULL], (size_t)r->B * r->N, width * act_size());
    free(counts);
    return r->y_all;
}

// ---- the whole model ----------------------------------------------------------------------------------------------
// x[B, in_dim, T, 2H, 2W], t[B] = 1000σ, and the text in r->text or r->ids -> velocity r->out[B, out_dim, T, 2H, 2W].
static void forward(Run *r, const float *x, const double *t) {
    const Config *c = &r->m->c;
    int B = r->B, D = c->dim, L = c->num_layers;
    size_t n = r->n[FULL], rows = (size_t)B * n;
    Saved *first = &r->saved[0], *last = &r->saved[L];
    time_forward(r, t);
    text_forward(r);
    latent_to_rows(r->patches, x, B, c->in_dim, r->T, r->H, r->W, (size_t)r->pattern[FULL].first[r->ranks->rank], n,
                   true);
    linear(r->tokens, r->patches, &r->m->patch, rows);
    if (first->place == FULL) to_float(first->x0, r->tokens, rows * (size_t)D);
    else {
        to_float(r->dx2, r->tokens, rows * (size_t)D);
        exchange_rows(r, first->x0, r->dx2, FULL, first->place);
    }
    for (int i = 0; i < L; i++) {
        block_forward(r, i);
        if (r->show) fputc(PATTERN_LETTER[r->saved[i].pattern], stderr);
    }
    modulation_forward(r->head_e, r->m->head_modulation->w, r->e, B, 2, 1, D);
    residual_norm_forward(NULL, r->h, r->head_stat, last->x0, NULL, NOTHING, of_row(r->head_e, 0, 2, D),
                          of_row(r->head_e, 1, 2, D), 1, B, n, D, (float)c->eps);
    linear(r->y, r->h, &r->m->head, rows);
    rows_to_latent(r->out, gather_tokens(r, r->y, 4 * (size_t)c->out_dim), B, c->out_dim, r->T, r->H, r->W, false);
}

// dout[B, out_dim, T, 2H, 2W] = d loss / d r->out. Adds to every parameter's gradient; writes dlatent, if not NULL.
static void backward(Run *r, float *dlatent, const float *dout) {
    const Config *c = &r->m->c;
    int B = r->B, D = c->dim, L = c->num_layers, first = r->pattern[FULL].first[r->ranks->rank];
    size_t n = r->n[FULL], rows = (size_t)B * n, text_rows = (size_t)B * (size_t)c->text_len;
    zero(r->de0, (size_t)B * 6 * (size_t)D * sizeof(float));
    zero(r->de_e, (size_t)B * (size_t)D * sizeof(float));
    zero(r->dhead_e, (size_t)B * 2 * (size_t)D * sizeof(float));
    zero(r->dcontext, text_rows * (size_t)D * act_size());
    zero(r->dx, rows * (size_t)D * sizeof(float));
    latent_to_rows(r->y, dout, B, c->out_dim, r->T, r->H, r->W, (size_t)first, n, false);
    linear_back(r, r->d1, r->y, r->h, &r->m->head, rows, false);
    norm_backward(r->dx, of_row(r->dhead_e, 0, 2, D), of_row(r->dhead_e, 1, 2, D), r->d1, r->saved[L].x0, r->head_stat,
                  of_row(r->head_e, 1, 2, D), 1, B, n, D);
    modulation_backward(r->m->head_modulation->dw, r->de_e, r->dhead_e, B, 2, 1, D);
    for (int i = L - 1; i >= 0; i--) block_backward(r, i);
    exchange_gradient(r, r->saved[0].place, FULL);
    to_act(r->d1, r->dx, rows * (size_t)D);
    linear_back(r, dlatent ? r->dpatches : NULL, r->d1, r->patches, &r->m->patch, rows, false);
    if (dlatent)
        rows_to_latent(dlatent, gather_tokens(r, r->dpatches, 4 * (size_t)c->in_dim), B, c->in_dim, r->T, r->H, r->W,
                       true);
    text_backward(r);
    time_backward(r);
}
// ============================================================================================================
// 9. The small world: captioned clips drawn on the fly, and ShapesBench, which scores what it sees
// ============================================================================================================
// A caption is `a SIZE COLOR SHAPE moving DIRECTION|standing still on a BACKGROUND background`: 2·8·4·5·3 = 960 of
// them. A clip is x[3, T, H, W] in [-1, 1], a function of (scene, seed, index) alone: nothing is stored.
enum { CAPTIONS = 960, CAPTION_WORDS = 10, VOCAB = 27 };
enum { WORD_SIZE = 1, WORD_COLOR = 3, WORD_SHAPE = 11, WORD_MOVING = 15, WORD_MOTION = 16, WORD_STANDING = 20,
       WORD_BACKGROUND = 23 };                                   // where each attribute's words start in the table
static const char *const WORDS[VOCAB] = {
    "a", "small", "large", "red", "green", "blue", "yellow", "magenta", "cyan", "white", "orange", "circle", "square",
    "triangle", "diamond", "moving", "left", "right", "up", "down", "standing", "still", "on", "black", "gray", "navy",
    "background" };
enum { SIZES = 2, COLORS = 8, SHAPES = 4, MOTIONS = 5, BACKGROUNDS = 3, STILL = 4 };
typedef struct { int size, color, shape, motion, background; } Scene;         // each from 0, in the table's order

static const float PAINT[COLORS][3] = { { 0.95f, 0.1f, 0.1f }, { 0.1f, 0.85f, 0.15f }, { 0.2f, 0.35f, 1 },
    { 1, 0.95f, 0.1f }, { 0.95f, 0.2f, 0.95f }, { 0.1f, 0.9f, 1 }, { 1, 1, 1 }, { 1, 0.55f, 0.05f } };
static const float GROUND[BACKGROUNDS][3] = { { 0, 0, 0 }, { 0.4f, 0.4f, 0.4f }, { 0.05f, 0.05f, 0.45f } };
static const float STEP[MOTIONS][2] = { { -1, 0 }, { 1, 0 }, { 0, -1 }, { 0, 1 }, { 0, 0 } };       // (x, y), y down

static Scene scene_of(int caption) {                              // caption in [0, CAPTIONS)
    Scene s = { caption / 480, caption / 60 % COLORS, caption / 15 % SHAPES, caption / 3 % MOTIONS, caption % 3 };
    return s;
}

// A tenth of the captions (96) is never trained on: new combinations of words that were each seen many times. The
// seed 19511 splits evenly: each color, shape, size, motion and background is on both sides.
static bool held_out(int caption) {
    enum { HELD_OUT = 0x48454c44 };                               // this random stream's name
    return rng_bits(19511, HELD_OUT, (uint64_t)caption) % 10 == 0;
}

static void caption_text(char *text, size_t room, Scene s) {
    bool still = s.motion == STILL;
    snprintf(text, room, "a %s %s %s %s %s on a %s background", WORDS[WORD_SIZE + s.size], WORDS[WORD_COLOR + s.color],
             WORDS[WORD_SHAPE + s.shape], WORDS[still ? WORD_STANDING : WORD_MOVING],
             WORDS[still ? WORD_STANDING + 1 : WORD_MOTION + s.motion], WORDS[WORD_BACKGROUND + s.background]);
}

// ids[<= max] of the words of text, case ignored; returns how many (0: the empty prompt).
static int words_of(int *ids, int max, const char *text) {
    static const char space[] = " \t\n\v\f\r";
    int n = 0;
    for (text += strspn(text, space); *text; n++) {
        size_t length = strcspn(text, space);
        char known[256] = "";
        int id = 0;
        if (n == max) die("the caption has more than %d words; shorten it", max);
        while (id < VOCAB && (strlen(WORDS[id]) != length || strncasecmp(WORDS[id], text, length))) id++;
        for (int i = 0; id == VOCAB && i < VOCAB; i++) strcat(strcat(known, " "), WORDS[i]);
        if (id == VOCAB)
            die("unknown word \"%.*s\" in the caption; the words are:%s", length < 40 ? (int)length : 40, text, known);
        ids[n] = id;
        text += length + strspn(text + length, space);
    }
    return n;
}

// Is text one of the 960 captions? Then *s is its scene. (Other known words may be sampled, but not scored.)
static bool parse_caption(Scene *s, const char *text) {
    int asked[64], ids[CAPTION_WORDS], n = words_of(asked, 64, text);
    for (int caption = 0; caption < CAPTIONS; caption++) {
        char known[128];
        *s = scene_of(caption);
        caption_text(known, sizeof known, *s);
        if (words_of(ids, CAPTION_WORDS, known) == n && !memcmp(ids, asked, (size_t)n * sizeof *ids)) return true;
    }
    return false;
}

// ---- drawing: lengths in pixels, the origin at the frame's upper left corner ------------------------------------
// A shape has the area πr², whichever it is, and lies with its centre of mass at its position.
static float shape_radius(int size, int H, int W) { return (size ? 0.205f : 0.13f) * (float)(H < W ? H : W); }

// Signed distance from the shape's edge to (dx, dy) off its centre: negative inside. Triangle: 3 half-planes, apex up.
static inline float shape_distance(int shape, float dx, float dy, float r) {
    float ax = fabsf(dx), ay = fabsf(dy);
    if (shape == 0) return sqrtf(dx * dx + dy * dy) - r;
    if (shape == 1) return (ax > ay ? ax : ay) - 0.88623f * r;                // half a side: √π/2·r
    if (shape == 3) return 0.70711f * (ax + ay) - 0.88623f * r;               // the square on its corner
    return fmaxf(dy, 0.86603f * ax - 0.5f * dy) - 0.77756f * r;               // inradius √(π/√27)·r
}

// How far a shape of r = 1 reaches from its centre: sideways, up, down.
static const float REACH[SHAPES][3] = { { 1, 1, 1 }, { 0.88623f, 0.88623f, 0.88623f },
                                        { 1.34677f, 1.55512f, 0.77756f }, { 1.25331f, 1.25331f, 1.25331f } };

// Pixels a frame: 1.25 at 16x16, 1.5 at 32x32; slower where the way would not fit with a pixel to spare.
static float scene_speed(Scene s, int T, int H, int W) {
    float speed = 1 + (float)(H < W ? H : W) / 64, r = shape_radius(s.size, H, W);
    const float *reach = REACH[s.shape];
    float way = s.motion < 2 ? (float)(W - 2) - 2 * r * reach[0] : (float)(H - 2) - r * (reach[1] + reach[2]);
    return T < 2 || speed * (float)(T - 1) <= way ? speed : fmaxf(way, 0) / (float)(T - 1);
}

static float clamp01(float v) { return v > 0 ? (v < 1 ? v : 1) : 0; }         // NaN becomes 0

// x[3, T, H, W] = the clip of scene s; (seed, index) name the draw of its place.
static void draw_clip(float *x, Scene s, uint64_t seed, uint64_t index, int T, int H, int W) {
    enum { PLACE = 0x504c41 };                                    // this random stream's name
    float r = shape_radius(s.size, H, W), speed = scene_speed(s, T, H, W), start[2], velocity[2];
    float reach[3] = { r * REACH[s.shape][0], r * REACH[s.shape][1], r * REACH[s.shape][2] };
    size_t frame = (size_t)H * W, plane = (size_t)T * frame;
    for (int i = 0; i < 2; i++) {                                 // x, then y: anywhere that keeps the way inside
        velocity[i] = speed * STEP[s.motion][i];
        float way = velocity[i] * (float)(T - 1);
        float low = 1 + reach[i] - fminf(way, 0), high = (float)(i ? H : W) - 1 - reach[i ? 2 : 0] - fmaxf(way, 0);
        float u = (float)rng_uniform(seed, PLACE, 2 * index + (uint64_t)i);
        start[i] = low < high ? low + u * (high - low) : (low + high) / 2;
    }
    for (int c = 0; c < 3; c++)
        for (size_t i = 0; i < plane; i++) x[c * plane + i] = 2 * GROUND[s.background][c] - 1;
    for (int t = 0; t < T; t++) {
        float cx = start[0] + velocity[0] * (float)t, cy = start[1] + velocity[1] * (float)t;
        int left = (int)fmaxf(cx - reach[0] - 1, 0), right = (int)fminf(cx + reach[0] + 2, (float)W);
        int top = (int)fmaxf(cy - reach[1] - 1, 0), bottom = (int)fminf(cy + reach[2] + 2, (float)H);
        for (int h = top; h < bottom; h++)
            for (int w = left; w < right; w++) {                  // coverage falls from 1 to 0 over the edge's pixel
                float cover = clamp01(0.5f - shape_distance(s.shape, (float)w + 0.5f - cx, (float)h + 0.5f - cy, r));
                float *p = x + t * frame + (size_t)h * W + w;
                for (int c = 0; c < 3; c++) p[c * plane] += cover * 2 * (PAINT[s.color][c] - GROUND[s.background][c]);
            }
    }
}

// ---- ShapesBench: pixels in, seven scores out ---------------------------------------------------------------------
enum { SCORE_COLOR, SCORE_SHAPE, SCORE_SIZE, SCORE_MOTION, SCORE_BACKGROUND, SCORE_CONSISTENCY, SCORE_SMOOTHNESS,
       N_SCORES };
static const char *const SCORE_NAMES[N_SCORES] = {
    "color", "shape", "size", "motion", "background", "consistency", "smoothness" };

typedef struct {                          // what one frame shows
    float back[3], ring;                  // the border's color; the share of border pixels that have it
    float color[3], area, at[2];          // the object's color, area in pixels, centre of mass
    float fit[SHAPES];                    // intersection over union with each shape of this area at this place
    float found;                          // 1: one clear object is there; 0: not, and its fields mean nothing
} Look;

typedef struct {                          // what a clip shows
    Look mean;                            // over the frames with an object (the background over all; no `at`) ...
    float velocity[2];                    // ... found: their share. Pixels a frame: the least-squares slope of `at`
    float consistency, smoothness;        // the two scores of quality
} Seen;

static float color_distance(const float a[3], const float b[3]) {
    return sqrtf((a[0] - b[0]) * (a[0] - b[0]) + (a[1] - b[1]) * (a[1] - b[1]) + (a[2] - b[2]) * (a[2] - b[2]));
}

// The border ring's mean color, then that of the pixels near it (an object may touch the border); ring: their share.
static void look_at_ring(Look *look, float (*rgb)[3], int H, int W) {
    float all = 0, near = 0;
    for (int pass = 0; pass < 2; pass++) {
        float sum[3] = { 0, 0, 0 };
        all = near = 0;
        for (int i = 0; i < H * W; i++) {
            if (i / W > 0 && i / W < H - 1 && i % W > 0 && i % W < W - 1) continue;
            all++;
            if (pass && color_distance(rgb[i], look->back) > 0.3f) continue;
            near++;
            for (int c = 0; c < 3; c++) sum[c] += rgb[i][c];
        }
        for (int c = 0; c < 3 && near > 0; c++) look->back[c] = sum[c] / near;
    }
    look->ring = near / all;
}

// The shape that fits best, of the area and at the place found: cover, the object's share of every pixel, against the
// share that the shape would have.
static float look_at_shape(Look *look, const float *cover, int H, int W) {
    float r = sqrtf(look->area / (float)M_PI), best = 0;
    for (int shape = 0; shape < SHAPES; shape++) {
        float both = 0, template_area = 0;
        for (int i = 0; i < H * W; i++) {
            float dx = (float)(i % W) + 0.5f - look->at[0], dy = (float)(i / W) + 0.5f - look->at[1];
            if (fabsf(dx) > 1.6f * r + 1 || fabsf(dy) > 1.6f * r + 1) continue;
            float model = clamp01(0.5f - 1.75f * shape_distance(shape, dx, dy, r));
            template_area += model;
            both += fminf(model, cover[i]);
        }
        look->fit[shape] = both / (look->area + template_area - both);
        best = fmaxf(best, look->fit[shape]);
    }
    return best;
}

// One frame x[3][plane]: the background from the border, the object as whatever differs from it. Edges are made 1.75
// times as steep, here and in look_at_shape, so that noise on the background counts for nothing.
static Look look_at(const float *x, size_t plane, int H, int W) {
    Look look;
    float (*rgb)[3] = (float (*)[3])xalloc((size_t)H * W, sizeof *rgb), sum[3] = { 0, 0, 0 }, weight = 0;
    float *cover = (float *)xalloc((size_t)H * W, sizeof(float));
    float least = shape_radius(0, H, W), most = shape_radius(1, H, W);
    memset(&look, 0, sizeof look);
    for (int i = 0; i < 3 * H * W; i++) rgb[i / 3][i % 3] = clamp01(0.5f + 0.5f * x[i % 3 * plane + (size_t)(i / 3)]);
    look_at_ring(&look, rgb, H, W);
    for (int i = 0; i < H * W; i++) {                             // its color: the pixels that differ most say most
        float d = color_distance(rgb[i], look.back), d4 = d * d * d * d;
        weight += d4;
        for (int c = 0; c < 3; c++) sum[c] += d4 * rgb[i][c];
    }
    for (int c = 0; c < 3; c++) look.color[c] = weight > 0 ? sum[c] / weight : look.back[c];
    float contrast = color_distance(look.color, look.back);
    for (int i = 0; i < H * W; i++) {                             // its area and centre
        cover[i] = clamp01(1.75f * color_distance(rgb[i], look.back) / contrast - 0.375f);
        look.area += cover[i];
        look.at[0] += cover[i] * ((float)(i % W) + 0.5f);
        look.at[1] += cover[i] * ((float)(i / W) + 0.5f);
    }
    for (int i = 0; i < 2; i++) look.at[i] /= look.area;
    if (contrast >= 0.2f && look.area >= 1.2f * least * least && look.area <= 8 * most * most)    // πr² is 3.1·r²
        look.found = look_at_shape(&look, cover, H, W) > 0.4f;
    free(rgb);
    free(cover);
    return look;
}

// Consistency: how little color, area and shape of each frame's object differ from the clip's mean. Smoothness: how
// small the second differences of its path are beside one step. Frames without an object count 0 in both.
static void judge_quality(Seen *seen, const Look *looks, int T, int H, int W) {
    float step = 1 + (float)(H < W ? H : W) / 64, smooth = 0;
    for (int t = 0; t < T; t++) {
        const Look *now = &looks[t], *mean = &seen->mean;
        if (!now->found) continue;
        float shape = 0, paint = color_distance(now->color, mean->color), area = fabsf(logf(now->area / mean->area));
        for (int k = 0; k < SHAPES; k++) shape = fmaxf(shape, fabsf(now->fit[k] - mean->fit[k]));
        seen->consistency += clamp01(1.2f - paint - area - 2 * shape) / (float)T;     // 0.2: what pixels may do
        if (t < 2 || !now[-1].found || !now[-2].found) continue;
        float bend[2];
        for (int i = 0; i < 2; i++) bend[i] = now[0].at[i] - 2 * now[-1].at[i] + now[-2].at[i];
        smooth += clamp01(1.2f - sqrtf(bend[0] * bend[0] + bend[1] * bend[1]) / step);
    }
    seen->smoothness = T > 2 ? smooth / (float)(T - 2) : seen->mean.found;
}

// The measurements of a clip x[3, T, H, W].
static Seen watch(const float *x, int T, int H, int W) {
    Seen seen;
    Look *looks = (Look *)xalloc((size_t)T, sizeof(Look)), *mean = &seen.mean;
    float n = 0, time = 0, spread = 0;
    memset(&seen, 0, sizeof seen);
    for (int t = 0; t < T; t++) {
        Look *look = &looks[t];
        *look = look_at(x + (size_t)t * H * W, (size_t)T * H * W, H, W);
        for (int c = 0; c < 3; c++) mean->back[c] += look->back[c] / (float)T;
        mean->ring += look->ring / (float)T;
        if (!look->found) continue;
        n++;
        time += (float)t;
        mean->area += look->area;
        for (int c = 0; c < 3; c++) mean->color[c] += look->color[c];
        for (int k = 0; k < SHAPES; k++) mean->fit[k] += look->fit[k];
    }
    mean->found = n / (float)T;
    n = fmaxf(n, 1);
    mean->area /= n;
    for (int c = 0; c < 3; c++) mean->color[c] /= n;
    for (int k = 0; k < SHAPES; k++) mean->fit[k] /= n;
    for (int t = 0; t < T; t++) {
        float dt = looks[t].found * ((float)t - time / n);
        spread += dt * dt;
        for (int i = 0; i < 2 && looks[t].found; i++) seen.velocity[i] += dt * looks[t].at[i];
    }
    for (int i = 0; i < 2 && spread > 0; i++) seen.velocity[i] /= spread;
    judge_quality(&seen, looks, T, H, W);
    free(looks);
    return seen;
}

// The palette entry nearest to a color; margin in 0..1: how much nearer `asked` is than any other, 1/2 at the tie.
static int nearest_color(float *margin, const float (*palette)[3], int count, const float rgb[3], int asked) {
    int nearest = 0;
    float own = 0, other = 1e9f;
    for (int i = 0; i < count; i++) {
        float d = color_distance(rgb, palette[i]);
        if (d < color_distance(rgb, palette[nearest])) nearest = i;
        if (i == asked) own = d; else other = fminf(other, d);
    }
    *margin = other / (own + other);
    return nearest;
}

// The scene that a clip shows, for tables of asked against seen. -1: nothing of the kind is there.
static Scene scene_seen(const Seen *seen, int T, int H, int W) {
    const Look *mean = &seen->mean;
    Scene s = { -1, -1, -1, -1, -1 };
    float margin, vx = seen->velocity[0], vy = seen->velocity[1];
    if (mean->ring > 0.5f) s.background = nearest_color(&margin, GROUND, BACKGROUNDS, mean->back, 0);
    if (mean->found < 0.5f) return s;
    s.color = nearest_color(&margin, PAINT, COLORS, mean->color, 0);
    s.size = mean->area > (float)M_PI * shape_radius(0, H, W) * shape_radius(1, H, W);    // the geometric mean
    s.shape = 0;
    for (int k = 1; k < SHAPES; k++) if (mean->fit[k] > mean->fit[s.shape]) s.shape = k;
    s.motion = fabsf(vx) > fabsf(vy) ? vx > 0 : 2 + (vy > 0);     // the main axis, then the sign ...
    if (fmaxf(fabsf(vx), fabsf(vy)) < 0.5f * scene_speed(s, T, H, W)) s.motion = STILL;   // ... or under half a step
    return s;
}

// score[7] in 0..1, pixels only. Hard (what `osp eval` reports): is the nearest of the words' values the asked one?
// Soft (the reward of GRPO): the same measurements as slopes, above 1/2 on the right side, so that better pays.
static void shapes_score(float score[N_SCORES], const float *x, Scene asked, int T, int H, int W, bool soft) {
    Seen seen = watch(x, T, H, W);
    Scene saw = scene_seen(&seen, T, H, W);
    const Look *mean = &seen.mean;
    float color, back, other = 0, fit = mean->fit[asked.shape], speed = scene_speed(asked, T, H, W);
    float nominal = shape_radius(asked.size, H, W), gap = 2 * logf(shape_radius(1, H, W) / shape_radius(0, H, W));
    float off = fabsf(logf(fmaxf(mean->area, 1e-3f) / ((float)M_PI * nominal * nominal)));    // in log area, of the gap
    float dx = seen.velocity[0] - speed * STEP[asked.motion][0], dy = seen.velocity[1] - speed * STEP[asked.motion][1];
    float miss = speed > 0 ? sqrtf(dx * dx + dy * dy) / (2 * speed) : 0;                      // 1: the opposite way
    nearest_color(&color, PAINT, COLORS, mean->color, asked.color);
    int ground = nearest_color(&back, GROUND, BACKGROUNDS, mean->back, asked.background);
    for (int k = 0; k < SHAPES; k++) if (k != asked.shape) other = fmaxf(other, mean->fit[k]);
    const float soft_score[] = { clamp01(1.2f * color), clamp01(0.5f + 6 * (fit - other)) * clamp01(1.5f * fit),
        clamp01(1.1f - off / gap), clamp01(1.05f - miss) * clamp01(1.05f - miss), clamp01(1.2f * back) };
    const bool hard_score[] = { saw.color == asked.color, saw.shape == asked.shape, saw.size == asked.size,
        saw.motion == asked.motion, ground == asked.background };
    for (int k = SCORE_COLOR; k <= SCORE_BACKGROUND; k++)         // as far as there is an object, or one background
        score[k] = (soft ? soft_score[k] : hard_score[k]) * (k == SCORE_BACKGROUND ? mean->ring : mean->found);
    score[SCORE_CONSISTENCY] = seen.consistency;
    score[SCORE_SMOOTHNESS] = seen.smoothness;
}
// ============================================================================================================
// 10. Flow matching: schedule, sampling, training (spec §7)
// ============================================================================================================
// Noise and data are joined by straight lines x_σ = σ·ε + (1 − σ)·x0. The model learns the line's direction
// v = ε − x0, which points from data to noise; sampling walks σ from 1 down to 0, so its steps are negative.
static double shift_sigma(double sigma, double s) { return s * sigma / (1 + (s - 1) * sigma); }

static void schedule(double *sigma, int steps, double shift) {          // sigma[steps + 1], from 1 to 0
    for (int i = 0; i <= steps; i++) sigma[i] = shift_sigma(1 - (double)i / steps, shift);
}

// The training shift e^μ grows with the tokens of a frame: more pixels need more noise to be hidden equally well.
static double train_shift(int tokens) { return exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)); }

// Numbers of one sample's latent or clip, x[C, T, 2H, 2W].
static size_t latent_size(const Run *r) { return (size_t)r->m->c.out_dim * r->N * 4; }

// A batch's text on the host: words of captions, or rows of UMT5 embeddings.
typedef struct { const int *ids; const float *rows; } Text;             // [B·text_len] or [B·text_len, text_dim]

static void text_set(Run *r, Text text) {
    size_t rows = (size_t)r->B * (size_t)r->m->c.text_len, count = rows * (size_t)r->m->c.text_dim;
    if (r->m->c.vocab) { upload(r->ids, text.ids, rows * sizeof(int)); return; }
    float *room = (float *)device_alloc(count * sizeof(float));
    upload(room, text.rows, count * sizeof(float));
    to_act(r->text, room, count);
    device_free(room);
}

static void caption_ids(int *ids, int text_len, const char *text) {     // words, then −1 for padding
    for (int i = words_of(ids, text_len, text); i < text_len; i++) ids[i] = -1;
}

static Text caption_batch(const Model *m, const char *const *captions, int count) {   // NULL: the empty caption
    int *ids = (int *)xalloc((size_t)count * (size_t)m->c.text_len, sizeof(int));
    for (int b = 0; b < count; b++) caption_ids(ids + b * m->c.text_len, m->c.text_len, captions ? captions[b] : "");
    Text t = {ids, NULL};
    return t;
}

static void noise_fill(float *x, size_t count, uint64_t seed, uint64_t stream, uint64_t first) {
    #pragma omp parallel for schedule(static)
    for (size_t i = 0; i < count; i++) x[i] = rng_normal(seed, stream, first + i);
}

// v = v_uncond + g·(v_cond − v_uncond), for all samples at one σ. With g = 1 one forward is enough; with
// halves of ranks each does one forward and they swap. `v` may not be r->out.
static void guided_velocity(Run *r, float *v, const float *x, double sigma, Text cond, Text uncond, double g) {
    size_t count = (size_t)r->B * latent_size(r);
    bool halves = r->ranks->halves == 2;
    double *t = (double *)xalloc((size_t)r->B, sizeof(double));
    for (int b = 0; b < r->B; b++) t[b] = 1000 * sigma;
    if (!halves && g != 1) {
        text_set(r, uncond);
        forward(r, x, t);
        copy(v, r->out, count * sizeof(float));
    }
    text_set(r, halves && r->ranks->half ? uncond : cond);
    forward(r, x, t);
    if (halves) {
        float *both = (float *)device_alloc(2 * count * sizeof(float));
        all_gather(r->ranks, both, r->out, (int)count, sizeof(float), GUIDANCE);
        lincomb(v, (float)(1 - g), both + count, (float)g, both, count);
        device_free(both);
    } else if (g != 1) lincomb(v, (float)(1 - g), v, (float)g, r->out, count);
    else copy(v, r->out, count * sizeof(float));
    free(t);
}

static void progress_line(const char *what, int step, int steps, double began) {
    double left = step ? (seconds() - began) / step * (steps - step) : 0;
    fprintf(stderr, "\r\033[K%s %d/%d, %d:%02d left ", what, step, steps, (int)left / 60, (int)left % 60);
}

// Noise x[B, C, T, 2H, 2W] becomes data, in place: Euler steps x += (σ_next − σ)·v.
static void sample(Run *r, float *x, Text cond, Text uncond, int steps, double shift, double guidance) {
    size_t count = (size_t)r->B * latent_size(r);
    double *sigma = (double *)xalloc((size_t)steps + 1, sizeof(double)), began = seconds();
    float *v = (float *)device_alloc(count * sizeof(float));
    schedule(sigma, steps, shift);
    for (int i = 0; i < steps; i++) {
        if (r->show) progress_line("step", i, steps, began);
        guided_velocity(r, v, x, sigma[i], cond, uncond, guidance);
        lincomb(x, 1, x, (float)(sigma[i + 1] - sigma[i]), v, count);
    }
    if (r->show) fprintf(stderr, "\r\033[K");
    device_free(v);
    free(sigma);
}

// The same from noise to data on the host.
static void sample_host(Run *r, float *host, Text cond, Text uncond, int steps, double shift, double guidance) {
    size_t count = (size_t)r->B * latent_size(r);
    float *x = (float *)device_alloc(count * sizeof(float));
    upload(x, host, count * sizeof(float));
    sample(r, x, cond, uncond, steps, shift, guidance);
    download(host, x, count * sizeof(float));
    device_free(x);
    for (size_t i = 0; i < count; i++)
        if (!isfinite(host[i]))
            die("the model made a number that is not finite; the weights may be broken, or try --device-dtype f32");
}

// ---- learning ---------------------------------------------------------------------------------------------------
typedef struct {
    int steps, batch, warmup;
    double lr, beta1, beta2, eps, weight_decay, clip, ema, drop;
    uint64_t seed;
} TrainOptions;

// AdamW on an arena of n weights: moments and the moving average of the weights live beside it.
typedef struct { float *w, *dw, *m, *v, *ema; size_t n; int step; } Optimizer;

static void optimizer_init(Optimizer *o, float *w, float *dw, size_t n) {
    o->w = w, o->dw = dw, o->n = n, o->step = 0;
    o->m = (float *)device_alloc(n * sizeof(float));
    o->v = (float *)device_alloc(n * sizeof(float));
    o->ema = (float *)device_alloc(n * sizeof(float));
    copy(o->ema, w, n * sizeof(float));
}

// Cosine from lr to a twentieth of it, after a linear warm-up. step counts from 0.
static double learning_rate(const TrainOptions *o, int step) {
    double warm = o->warmup > 0 && step < o->warmup ? (double)(step + 1) / o->warmup : 1;
    return o->lr * warm * (0.05 + 0.95 * 0.5 * (1 + cos(M_PI * step / o->steps)));
}

// One step on the gradients in dw (summed over ranks first); returns their norm, before clipping, and zeroes them.
static double optimizer_step(Optimizer *o, Ranks *ranks, const TrainOptions *options, double lr) {
    sum_over_ranks(ranks, o->dw, o->n, false);
    double norm = sqrt(sum_squares(o->dw, NULL, o->n)), scale = norm > options->clip ? options->clip / norm : 1;
    if (!isfinite(norm)) return norm;
    o->step++;
    double young = (1.0 + o->step) / (10.0 + o->step);                  // a short run must not average in its beginning
    adamw(o->w, o->m, o->v, o->ema, o->dw, o->n, (float)scale, (float)lr, options->beta1, options->beta2,
          (float)options->eps, (float)options->weight_decay, young < options->ema ? young : options->ema, o->step);
    zero(o->dw, o->n * sizeof(float));
    return norm;
}

// Random streams of training: sample k = step·batch + b draws from (seed, stream, k...) alone.
enum { CAPTION_STREAM = 1, DROP_STREAM, SIGMA_STREAM, NOISE_STREAM, SAMPLE_STREAM, POLICY_STREAM };

typedef struct { float *x, *target; int *ids; double *t; } Batch;       // host: x_σ, ε − x0, words, 1000σ

static void batch_new(Batch *a, const Run *r) {
    size_t count = (size_t)r->B * latent_size(r);
    a->x = (float *)xalloc(count, sizeof(float)), a->target = (float *)xalloc(count, sizeof(float));
    a->ids = (int *)xalloc((size_t)r->B * (size_t)r->m->c.text_len, sizeof(int));
    a->t = (double *)xalloc((size_t)r->B, sizeof(double));
}

static int training_caption(uint64_t seed, uint64_t k) {                // the first of draw k that is not held out
    int caption;
    k <<= 8;
    do caption = (int)(rng_bits(seed, CAPTION_STREAM, k++) % CAPTIONS); while (held_out(caption));
    return caption;
}

// The training samples of one step: a caption that is not held out, its clip, σ, noise; captions dropped at times, so
// that the model also learns the unconditional velocity that guidance needs.
static void batch_fill(Batch *a, const Run *r, const TrainOptions *o, int step) {
    const Config *c = &r->m->c;
    size_t size = latent_size(r);
    double s = train_shift(r->H * r->W);
    #pragma omp parallel for schedule(static)
    for (int b = 0; b < r->B; b++) {
        uint64_t k = (uint64_t)step * (uint64_t)r->B + (uint64_t)b;
        char text[128] = "";
        int caption = training_caption(o->seed, k);
        float *x = a->x + (size_t)b * size, *target = a->target + (size_t)b * size;
        draw_clip(x, scene_of(caption), o->seed, k, r->T, 2 * r->H, 2 * r->W);
        if (rng_uniform(o->seed, DROP_STREAM, k) >= o->drop) caption_text(text, sizeof(text), scene_of(caption));
        caption_ids(a->ids + (size_t)b * (size_t)c->text_len, c->text_len, text);
        double sigma = shift_sigma(1 / (1 + exp(-(double)rng_normal(o->seed, SIGMA_STREAM, k))), s);
        a->t[b] = 1000 * sigma;
        for (size_t i = 0; i < size; i++) {
            float noise = rng_normal(o->seed, NOISE_STREAM, k * size + i), x0 = x[i];
            x[i] = (float)sigma * noise + (float)(1 - sigma) * x0;
            target[i] = noise - x0;
        }
    }
}

// To the device: as soon as the last step's backward is asked for, so that a GPU never waits for it.
static void batch_upload(Run *r, const Batch *a, float *x, float *target) {
    size_t count = (size_t)r->B * latent_size(r);
    Text text = {a->ids, NULL};
    upload(x, a->x, count * sizeof(float));
    upload(target, a->target, count * sizeof(float));
    text_set(r, text);
}

// Forward and backward of an uploaded batch; returns the loss. x, target, dout are device buffers of the latent's size.
static double train_step(Run *r, const Batch *a, const float *x, const float *target, float *dout) {
    size_t count = (size_t)r->B * latent_size(r);
    weights_prepare(r->m);
    forward(r, x, a->t);
    double loss = mse(dout, r->out, target, count);
    backward(r, NULL, dout);
    return loss;
}
// ============================================================================================================
// 11. Mix-GRPO: reinforcement learning of a flow model (spec §8; arXiv 2507.21802)
// ============================================================================================================
// A sampler is deterministic, and a policy needs chance: inside a window of steps the Euler ODE is replaced by an SDE
// with the same marginals, whose every step is a Gaussian with a known density. A group of videos of one caption is
// scored; what made better ones than the group's mean becomes likelier, what made worse ones less likely.

// ---- LoRA: W + (alpha/rank)·B·A on q, k, v, o of both attentions --------------------------------------------------
struct Lora {
    int rank, count;
    float scale;                                 // alpha / rank; 0: the model without its adapter, the reference
    Param **target, *param;                      // target[count]; param[2·count]: A[rank, in], B[out, rank] of each
    float *w, *dw;                               // arenas of all A and B
    size_t n;
    act *a, *b, *d, *dw_act;                     // room for one adapter's products
};

static void lora_new(Model *m, int rank, double alpha, uint64_t seed) {
    Lora *l = m->lora = (Lora *)xalloc(1, sizeof(Lora));
    size_t most = 8 * (size_t)m->c.num_layers, D = (size_t)m->c.dim, size = (size_t)rank * D;
    size_t step = (size + 15) & ~(size_t)15;
    float *host = (float *)xalloc(size, sizeof(float));
    l->rank = rank, l->scale = (float)(alpha / rank), l->n = most * 2 * step;
    l->target = (Param **)xalloc(most, sizeof(Param *)), l->param = (Param *)xalloc(2 * most, sizeof(Param));
    l->w = (float *)device_alloc(l->n * sizeof(float)), l->dw = (float *)device_alloc(l->n * sizeof(float));
    l->a = (act *)device_alloc(size * act_size()), l->b = (act *)device_alloc(size * act_size());
    l->d = (act *)device_alloc(size * act_size()), l->dw_act = (act *)device_alloc(D * D * act_size());
    for (int i = 0; i < m->params; i++) {
        Param *p = &m->param[i];
        if (!p->block_matrix || !strstr(p->name, "attn")) continue;
        for (int k = 0; k < 2; k++) {
            Param *ab = &l->param[2 * l->count + k];
            snprintf(ab->name, sizeof(ab->name), "%.*s.lora_%c.weight", (int)(strlen(p->name) - strlen(".weight")),
                     p->name, "AB"[k]);
            ab->rank = 2, ab->count = size, ab->offset = (2 * (size_t)l->count + (size_t)k) * step;
            ab->shape[k] = (size_t)rank, ab->shape[1 - k] = D;
            ab->w = l->w + ab->offset, ab->dw = l->dw + ab->offset;
        }
        for (size_t j = 0; j < size; j++)        // A gaussian, B zero: training starts at the base model
            host[j] = rng_normal(seed, LORA_STREAM + (uint64_t)l->count, j) / sqrtf((float)rank);
        upload(l->param[2 * l->count].w, host, size * sizeof(float));
        l->target[l->count++] = p;
    }
    free(host);
}

// p->c += scale·B·A, on the working copy that weights_prepare has just made.
static void lora_merge(Model *m, Param *p) {
    Lora *l = m->lora;
    for (int i = 0; i < l->count; i++) {
        const Param *A = &l->param[2 * i], *B = A + 1;
        if (l->target[i] != p || l->scale == 0) continue;
        float *scaled = (float *)l->dw_act;                          // room for rank·dim floats (rank <= dim/2)
        lincomb(scaled, l->scale, B->w, 0, NULL, B->count);
        to_act(l->b, scaled, B->count), to_act(l->a, A->w, A->count);
        linear_backward(p->c, NULL, NULL, l->b, NULL, l->a, p->shape[0], l->rank, (int)p->shape[1], true);
    }
}

// d W -> dB = scale·dW·A^T, dA = scale·B^T·dW: the chain rule through W + scale·B·A.
static void lora_backward(Model *m) {
    Lora *l = m->lora;
    for (int i = 0; i < l->count; i++) {
        Param *p = l->target[i], *A = &l->param[2 * i], *B = A + 1;
        int in = (int)p->shape[1];
        size_t out = p->shape[0];
        lincomb(p->dw, l->scale, p->dw, 0, NULL, p->count);
        to_act(l->dw_act, p->dw, p->count), to_act(l->a, A->w, A->count), to_act(l->b, B->w, B->count);
        linear_forward(l->d, l->dw_act, l->a, NULL, out, l->rank, in);
        to_float(p->dw, l->d, B->count);
        lincomb(B->dw, 1, B->dw, 1, p->dw, B->count);
        linear_backward(NULL, A->dw, NULL, l->b, l->dw_act, NULL, out, l->rank, in, false);
    }
    zero(m->dw, m->count * sizeof(float));
}

// W becomes W + scale·B·A for good, with the adapter's average.
static void lora_into_weights(Model *m, const float *ema) {
    int quant = m->c.quant;
    copy(m->lora->w, ema, m->lora->n * sizeof(float));
    m->c.quant = 0;                                                  // merge first, round when written
    weights_prepare(m);
    m->c.quant = quant;
    for (int i = 0; i < m->lora->count; i++) {
        const Param *p = m->lora->target[i];
        to_float(p->w, p->c, p->count);
    }
}

// ---- the policy -----------------------------------------------------------------------------------------------
// One SDE step from σ to σ_next: mean = a·x + b·v, x_next = mean + std·z.
typedef struct { double a, b, std; } SdeStep;

static SdeStep sde_step(double sigma, double sigma_next) {
    double dt = sigma_next - sigma, eta = sigma;                       // η = σ_min + (σ_max − σ_min)·σ with 0 and 1
    SdeStep s = {1 + eta * eta / (2 * sigma) * dt, (1 + eta * eta * (1 - sigma) / (2 * sigma)) * dt, eta * sqrt(-dt)};
    return s;
}

// log N(x_next; mean, std²), averaged over the elements.
static double log_probability(const float *x_next, const float *mean, double std, size_t n) {
    return -sum_squares(x_next, mean, n) / ((double)n * 2 * std * std) - log(std) - log(sqrt(2 * M_PI));
}

// (r − mean)/(std + 1e-4) within a group, population std, clipped to ±5. All equal: zeros, exactly.
static void advantages(double *advantage, const double *reward, int G) {
    double mean = 0, var = 0;
    for (int i = 0; i < G; i++) mean += reward[i] / G;
    for (int i = 0; i < G; i++) var += (reward[i] - mean) * (reward[i] - mean) / G;
    for (int i = 0; i < G; i++) {
        double a = (reward[i] - mean) / (sqrt(var) + 1e-4);
        advantage[i] = var < 1e-24 ? 0 : a > 5 ? 5 : a < -5 ? -5 : a;
    }
}

typedef struct { double ratio, policy_loss, kl, weight; bool clipped; } Surrogate;   // weight = d policy_loss / d logp

// max(−A·ρ, −A·clip(ρ, 1 ± c)), ρ = exp(logp − logp_old): no gradient where the clipped term is the larger.
static Surrogate surrogate(double A, double logp, double logp_old, double c) {
    double ratio = exp(logp - logp_old), inside = ratio < 1 - c ? 1 - c : ratio > 1 + c ? 1 + c : ratio;
    bool clipped = -A * inside > -A * ratio;
    Surrogate s = {ratio, clipped ? -A * inside : -A * ratio, 0, clipped ? 0 : -A * ratio, clipped};
    return s;
}

typedef struct {
    int updates, prompts, group, epochs;             // captions an update; G videos of each; optimizer steps on them
    int steps, sde_first, sde_count, stride;         // S; the window of SDE steps, and how far it slides in an update
    double guidance, shift, clip, beta;
    double weight[N_SCORES + 1];                     // of ShapesBench's soft scores, and of plain redness
} PolicyOptions;

// The policy's mean at (x, σ) with the weights as prepared: mean = a·x + b·guided v. mean[G, ...] is written.
static void policy_mean(Run *r, float *mean, const float *x, double sigma, double sigma_next, Text cond, Text uncond,
                        double g) {
    size_t count = (size_t)r->B * latent_size(r);
    SdeStep s = sde_step(sigma, sigma_next);
    guided_velocity(r, mean, x, sigma, cond, uncond, g);
    lincomb(mean, (float)s.a, x, (float)s.b, mean, count);
}

// Loss and gradient of one SDE step for a group: loss = mean over the G videos of policy_loss + β·kl. The guided
// velocity is used, its unconditional half without gradient: guided_velocity ends on the conditional forward, so the
// activations kept are that one's, and d v_cond = g·d v. mean, dmean: room for one batch each; out[G] gets the figures.
static double policy_step(Run *r, Surrogate *out, float *mean, float *dmean, const float *x, const float *x_next,
                          const float *mean_ref, double sigma, double sigma_next, Text cond, Text uncond,
                          const double *advantage, const double *logp_old, const PolicyOptions *o) {
    size_t one = latent_size(r);
    SdeStep s = sde_step(sigma, sigma_next);
    double loss = 0;
    policy_mean(r, mean, x, sigma, sigma_next, cond, uncond, o->guidance);
    for (int i = 0; i < r->B; i++) {
        float *mean_i = mean + (size_t)i * one, *d = dmean + (size_t)i * one;
        const float *next = x_next + (size_t)i * one, *ref = mean_ref + (size_t)i * one;
        double logp = log_probability(next, mean_i, s.std, one), variance = s.std * s.std, n = (double)one;
        out[i] = surrogate(advantage[i], logp, logp_old[i], o->clip);
        out[i].kl = sum_squares(mean_i, ref, one) / n / (2 * variance);
        loss += (out[i].policy_loss + o->beta * out[i].kl) / r->B;
        // d logp/d mean = (x_next − mean)/(n·std²);  d kl/d mean = (mean − ref)/(n·std²);  d mean/d v_cond = b·g
        double chain = s.b * o->guidance / (n * variance * r->B), w = out[i].weight * chain, k = o->beta * chain;
        lincomb(d, (float)w, next, (float)(k - w), mean_i, one);
        lincomb(d, 1, d, (float)-k, ref, one);
    }
    backward(r, NULL, dmean);
    return loss;
}

// ---- rollouts and updates -----------------------------------------------------------------------------------------
// One group's trajectory: x[count + 1] before and after each SDE step, the reference's means, what was likely then.
typedef struct { float *x, *mean_ref; double *logp, *reward, *advantage; Text cond; } Rollout;

typedef struct {                                 // all that GRPO needs beside the model, built once
    const PolicyOptions *o;
    const TrainOptions *train;
    const char *out;                             // for messages
    Rollout *group;                              // [prompts]
    Text uncond;
    float *x, *mean;                             // room for one batch each
    double *sigma;                               // [S + 1]
    int first;                                   // the window's first step in this update
} Policy;

// What an update prints: sums over `count` (video, SDE step) pairs, and over videos.
typedef struct {
    int count;
    double reward, spread, advantage, ratio_min, ratio_mean, ratio_max, clipped, kl, norm, loss, rollout_time;
} PolicyFigures;

static Policy policy_new(Run *r, const PolicyOptions *o, const TrainOptions *train, const char *out) {
    size_t bytes = (size_t)r->B * latent_size(r) * sizeof(float), window = (size_t)o->sde_count, B = (size_t)r->B;
    Policy p;
    p.o = o, p.train = train, p.out = out, p.first = 0, p.uncond = caption_batch(r->m, NULL, r->B);
    p.group = (Rollout *)xalloc((size_t)o->prompts, sizeof(Rollout));
    p.x = (float *)device_alloc(bytes), p.mean = (float *)device_alloc(bytes);
    p.sigma = (double *)xalloc((size_t)o->steps + 1, sizeof(double));
    schedule(p.sigma, o->steps, o->shift);
    for (Rollout *a = p.group; a < p.group + o->prompts; a++) {
        a->x = (float *)device_alloc((window + 1) * bytes), a->mean_ref = (float *)device_alloc(window * bytes);
        a->logp = (double *)xalloc(window * B, sizeof(double));
        a->reward = (double *)xalloc(2 * B, sizeof(double)), a->advantage = a->reward + B;
    }
    return p;
}

static double reward_of(const float *x, Scene asked, const Run *r, const double *weight) {
    float score[N_SCORES];
    size_t plane = r->N * 4;
    double reward = 0, total = 0, red = 0;
    shapes_score(score, x, asked, r->T, 2 * r->H, 2 * r->W, true);
    for (int s = 0; s < N_SCORES; s++) reward += weight[s] * score[s], total += weight[s];
    for (size_t i = 0; i < plane; i++) red += (x[i] - 0.5 * (x[plane + i] + x[2 * plane + i])) / (2 * (double)plane);
    return (reward + weight[N_SCORES] * red) / (total + weight[N_SCORES]);
}

// G videos of one caption with the weights as they are: SDE steps in the window, whose states are kept, ODE outside.
static void rollout(Run *r, const Policy *p, Rollout *a, Scene asked, uint64_t id) {
    size_t one = latent_size(r), count = one * (size_t)r->B, bytes = count * sizeof(float);
    float *host = (float *)xalloc(count, sizeof(float)), *x = p->x, *mean = p->mean;
    noise_fill(host, count, p->train->seed, POLICY_STREAM, id << 40);       // 2^32 numbers a step, 2^8 steps
    upload(x, host, bytes);
    for (int i = 0; i < p->o->steps; i++) {
        double sigma = p->sigma[i], next = p->sigma[i + 1], std = sde_step(sigma, next).std;
        int kept = i - p->first;
        if (kept < 0 || kept >= p->o->sde_count) {
            guided_velocity(r, mean, x, sigma, a->cond, p->uncond, p->o->guidance);
            lincomb(x, 1, x, (float)(next - sigma), mean, count);
            continue;
        }
        copy(a->x + (size_t)kept * count, x, bytes);
        policy_mean(r, mean, x, sigma, next, a->cond, p->uncond, p->o->guidance);
        noise_fill(host, count, p->train->seed, POLICY_STREAM, id << 40 | (uint64_t)(i + 1) << 32);
        upload(x, host, bytes);
        lincomb(x, 1, mean, (float)std, x, count);
        copy(a->x + (size_t)(kept + 1) * count, x, bytes);
        for (int b = 0; b < r->B; b++)
            a->logp[kept * r->B + b] = log_probability(x + (size_t)b * one, mean + (size_t)b * one, std, one);
    }
    download(host, x, bytes);
    for (int b = 0; b < r->B; b++) {
        a->reward[b] = reward_of(host + (size_t)b * one, asked, r, p->o->weight);
        if (!isfinite(a->reward[b]))
            die("a reward is not finite: lower --lr; %s.resume, if there, holds the last good adapter", p->out);
    }
    advantages(a->advantage, a->reward, r->B);
    free(host);
}

// Groups of new captions, then the reference's means at the same states: those of the model without its adapter.
static void roll_out_groups(Run *r, Policy *p, PolicyFigures *f, int update) {
    const PolicyOptions *o = p->o;
    size_t count = (size_t)r->B * latent_size(r);
    const char **captions = (const char **)xalloc((size_t)r->B, sizeof(char *));
    double videos = (double)o->prompts * r->B, scale = r->m->lora->scale;
    for (int k = 0; k < o->prompts; k++) {
        Rollout *a = &p->group[k];
        uint64_t id = (uint64_t)update * (uint64_t)o->prompts + (uint64_t)k;
        Scene asked = scene_of(training_caption(p->train->seed, id));
        char text[128];
        caption_text(text, sizeof(text), asked);
        for (int b = 0; b < r->B; b++) captions[b] = text;
        free((void *)a->cond.ids);
        a->cond = caption_batch(r->m, captions, r->B);
        rollout(r, p, a, asked, id);
        for (int b = 0; b < r->B; b++) {
            f->reward += a->reward[b] / videos, f->spread += a->reward[b] * a->reward[b] / videos;
            f->advantage += a->advantage[b] * a->advantage[b] / videos;
        }
    }
    f->spread = sqrt(fmax(f->spread - f->reward * f->reward, 0)), f->advantage = sqrt(f->advantage);
    r->m->lora->scale = 0, weights_prepare(r->m);
    for (int k = 0; k < o->prompts; k++)
        for (int i = 0; i < o->sde_count; i++) {
            const Rollout *a = &p->group[k];
            policy_mean(r, a->mean_ref + (size_t)i * count, a->x + (size_t)i * count, p->sigma[p->first + i],
                        p->sigma[p->first + i + 1], a->cond, p->uncond, o->guidance);
        }
    r->m->lora->scale = (float)scale, weights_prepare(r->m);
    free(captions);
}

// One AdamW step on all SDE steps of all groups.
static void policy_learn(Run *r, const Policy *p, Optimizer *opt, PolicyFigures *f) {
    size_t count = (size_t)r->B * latent_size(r);
    Surrogate *out = (Surrogate *)xalloc((size_t)r->B, sizeof(Surrogate));
    for (Rollout *a = p->group; a < p->group + p->o->prompts; a++)
        for (int i = 0; i < p->o->sde_count; i++) {
            const float *x = a->x + (size_t)i * count, *ref = a->mean_ref + (size_t)i * count;
            const double *sigma = p->sigma + p->first + i;
            f->loss += policy_step(r, out, p->x, p->mean, x, x + count, ref, sigma[0], sigma[1], a->cond, p->uncond,
                                   a->advantage, a->logp + i * r->B, p->o);
            for (int b = 0; b < r->B; b++, f->count++) {
                f->ratio_min = fmin(f->ratio_min, out[b].ratio), f->ratio_max = fmax(f->ratio_max, out[b].ratio);
                f->ratio_mean += out[b].ratio, f->kl += out[b].kl, f->clipped += out[b].clipped;
            }
        }
    if (opt->step == 0 && !(f->ratio_min > 1 - 1e-5 && f->ratio_max < 1 + 1e-5))
        die("before the first update the ratio must be 1 within 1e-5, but lies in %.7f .. %.7f: rollout and training "
            "do not compute the same log-probability; report this", f->ratio_min, f->ratio_max);
    lora_backward(r->m);
    f->norm = optimizer_step(opt, r->ranks, p->train, p->train->lr);
    if (!isfinite(f->norm) || !isfinite(f->loss))
        die("update %d: loss or gradient is not finite: lower --lr; %s.resume, if there, holds the last good adapter",
            opt->step + 1, p->out);
    weights_prepare(r->m);
    free(out);
}

// Update number `update`: roll out, then learn from it `epochs` times.
static PolicyFigures policy_update(Run *r, Policy *p, Optimizer *opt, int update) {
    const PolicyOptions *o = p->o;
    PolicyFigures f;
    double began = seconds();
    int last = o->steps - 1 - o->sde_count;                          // the last step adds no noise: not in the window
    memset(&f, 0, sizeof(f));
    f.ratio_min = INFINITY, f.ratio_max = -INFINITY;
    p->first = (o->sde_first + update * o->stride) % (last + 1);
    roll_out_groups(r, p, &f, update);
    f.rollout_time = seconds() - began;
    for (int e = 0; e < o->epochs; e++) policy_learn(r, p, opt, &f);
    f.ratio_mean /= f.count, f.clipped /= f.count, f.kl /= f.count;
    return f;
}
// ============================================================================================================
// 12. Pictures and clips in files
// ============================================================================================================
#define STB_IMAGE_WRITE_IMPLEMENTATION                            // one function of it is used: stbi_zlib_compress
#define STBI_WRITE_NO_STDIO
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#if __has_include(<stb/stb_image_write.h>)
#include <stb/stb_image_write.h>                                  // Debian, Ubuntu: apt install libstb-dev
#else
#include <stb_image_write.h>
#endif
#pragma GCC diagnostic pop

// ---- drawing: colors are 0xRRGGBB, the origin is the upper left corner, what lies outside is cut off -------------
typedef struct { int width, height; uint8_t *rgb; } Picture;      // rgb[height][width][3]

static void fill_rect(Picture *p, int x, int y, int width, int height, uint32_t color) {
    for (int h = y < 0 ? 0 : y; h < y + height && h < p->height; h++)
        for (int w = x < 0 ? 0 : x; w < x + width && w < p->width; w++)
            for (int c = 0; c < 3; c++) p->rgb[((size_t)h * p->width + w) * 3 + c] = (uint8_t)(color >> (16 - 8 * c));
}

static Picture new_picture(int width, int height, uint32_t color) {
    Picture p = { width, height, (uint8_t *)xalloc((size_t)width * height, 3) };
    fill_rect(&p, 0, 0, width, height, color);
    return p;
}

// Printable ASCII from ' ' on, 5x7 pixels: 7 characters a glyph, one a row, whose pixels are the bits of (c - '0').
static const char FONT[] =
    "00000004444404:::0000::O:O::4?D>5N4HI248C3<BD8EB=44800002488842842224804E>E40044O4400000<48000O00000000<<"
    "01248@0>ACEIA>4<4444>>A1248OO2421A>26:BO22O@N11A>68@NAA>O124888>AA>AA>>AA?12<0<<0<<00<<0<48248@84200O0O00"
    "8421248>A12404>A1=EE>>AAOAAANAANAAN>A@@@A>LBAAABLO@@N@@OO@@N@@@>A@GAA?AAAOAAA>44444>72222B<ABDHDBA@@@@@@O"
    "AKEEAAAAAIECAA>AAAAA>NAAN@@@>AAAEB=NAANDBA?@@>11NO444444AAAAAA>AAAAA:4AAAEEE:AA:4:AAAAA:444O1248@O>88888>"
    "0@84210>22222>4:A0000000000O842000000>1?A?@@FIAAN00>@@A>11=CAA?00>AO@>698L88800?A?1>@@FIAAA40<444>20622B<"
    "@@BDHDB<44444>00JEEAA00FIAAA00>AAA>00NAN@@00=C?1100FI@@@00>@>1N88L889600AAAC=00AAA:400AAEE:00A:4:A00AA?1>"
    "00O248O244844244444448442448008E200";

static int text_width(const char *text, int scale) { return 6 * scale * (int)strlen(text); }

static void draw_text(Picture *p, int x, int y, const char *text, int scale, uint32_t color) {
    for (; *text; text++, x += 6 * scale) {
        int glyph = *text < ' ' || *text > '~' ? '?' - ' ' : *text - ' ';
        for (int row = 0; row < 7; row++)
            for (int column = 0; column < 5; column++)
                if ((FONT[7 * glyph + row] - '0') >> (4 - column) & 1)
                    fill_rect(p, x + column * scale, y + row * scale, scale, scale, color);
    }
}

// ---- PNG: a signature, then chunks of length, name, data, CRC ------------------------------------------------------
static void put_number(uint8_t *out, size_t v) {                  // 4 bytes, the most significant first
    for (int i = 0; i < 4; i++) out[i] = (uint8_t)(v >> (24 - 8 * i));
}

// A chunk whose data is head, then body.
static void png_chunk(Output *o, const char *name, const void *head, size_t head_size, const void *body, size_t size) {
    size_t count = 4 + head_size + size;
    uint32_t crc = 0xFFFFFFFFu;
    uint8_t *all = (uint8_t *)xalloc(count + 8, 1), *end = all + 4 + count;
    put_number(all, head_size + size);
    memcpy(all + 4, name, 4);
    if (head_size) memcpy(all + 8, head, head_size);
    if (size) memcpy(all + 8 + head_size, body, size);
    for (const uint8_t *p = all + 4; p < end; p++) {
        crc ^= *p;
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
    }
    put_number(end, ~crc);
    output_bytes(o, all, count + 8);
    free(all);
}

// A frame's pixels: rows, each after a 0 (no filter), compressed; the caller frees them.
static uint8_t *png_pixels(const Picture *p, int *packed_size) {
    size_t row = (size_t)p->width * 3, size = (row + 1) * p->height;
    if (size > INT_MAX / 2) die("a picture of %dx%d pixels is too large; use smaller ones", p->width, p->height);
    uint8_t *rows = (uint8_t *)xalloc(size, 1);
    for (int h = 0; h < p->height; h++) memcpy(rows + h * (row + 1) + 1, p->rgb + h * row, row);
    uint8_t *packed = stbi_zlib_compress(rows, (int)size, packed_size, 8);
    if (!packed) die("out of memory: compressing %zu bytes of a picture; use a smaller one", size);
    free(rows);
    return packed;
}

// A PNG of one frame, or an animated one (APNG) of several equally large ones that loops for ever; the comment is a
// tEXt chunk "osp" (exiftool shows it). IDAT is the picture that every viewer shows; fdAT, which begins with its place
// in the sequence of fcTL and fdAT, are the later frames.
static void save_frames(const char *path, const Picture *frames, int count, int fps, const char *comment) {
    Output o;
    int size;
    uint8_t header[13] = {0, 0, 0, 0, 0, 0, 0, 0, 8, 2, 0, 0, 0};                // 8 bits, RGB
    uint8_t animation[8] = {0}, control[26] = {0}, sequence[4];                  // played 0 times: for ever
    size_t next = 0;
    put_number(header, (size_t)frames->width), put_number(header + 4, (size_t)frames->height);
    put_number(animation, (size_t)count);
    memcpy(control + 4, header, 8);                                              // all of the picture, at (0, 0) ...
    put_number(control + 20, (size_t)1 << 16 | (size_t)fps);                     // ... for 1/fps seconds
    output_open(&o, path);
    output_bytes(&o, "\x89PNG\r\n\x1a\n", 8);
    png_chunk(&o, "IHDR", header, 13, NULL, 0);
    png_chunk(&o, "tEXt", "osp", 4, comment, strlen(comment));
    if (count > 1) png_chunk(&o, "acTL", animation, 8, NULL, 0);
    for (int i = 0; i < count; i++) {
        uint8_t *packed = png_pixels(&frames[i], &size);
        put_number(control, next++);
        if (count > 1) png_chunk(&o, "fcTL", control, 26, NULL, 0);
        if (i) put_number(sequence, next++);
        png_chunk(&o, i ? "fdAT" : "IDAT", sequence, i ? 4 : 0, packed, (size_t)size);
        free(packed);
    }
    png_chunk(&o, "IEND", NULL, 0, NULL, 0);
    output_close(&o);
}

static void save_png(const char *path, Picture p, const char *comment) { save_frames(path, &p, 1, 0, comment); }

// ---- clips x[C, T, H, W] in [-1, 1] --------------------------------------------------------------------------------
typedef struct { int C, T, H, W, count; float **x; const char *const *captions; } Clips;    // x[count]

// Frame t at (left, top) of a picture, each pixel a square of scale x scale. C = 1 is gray; of many, the first 3 count.
static void draw_frame(Picture *p, int left, int top, const Clips *k, int clip, int t, int scale) {
    for (int h = 0; h < k->H; h++)
        for (int w = 0; w < k->W; w++) {
            uint32_t color = 0;
            for (int c = 0; c < 3; c++) {
                float v = k->x[clip][(((size_t)(c < k->C ? c : k->C - 1) * k->T + t) * k->H + h) * k->W + w];
                color = color << 8 | (uint32_t)(255 * clamp01(0.5f + 0.5f * v) + 0.5f);
            }
            fill_rect(p, left + w * scale, top + h * scale, scale, scale, color);
        }
}

// One row a clip, its frames from left to right, its caption above.
static void write_sheet(const char *path, const Clips *k, int scale, const char *comment) {
    int gap = 4, title = 13, column = k->W * scale + gap, row = title + k->H * scale + gap, width = k->T * column + gap;
    for (int i = 0; i < k->count; i++)
        if (text_width(k->captions[i], 1) + 2 * gap > width) width = text_width(k->captions[i], 1) + 2 * gap;
    Picture p = new_picture(width, k->count * row + gap, 0x202024);
    for (int i = 0; i < k->count; i++) {
        draw_text(&p, gap, i * row + gap + 2, k->captions[i], 1, 0xE8E8E8);
        for (int t = 0; t < k->T; t++) draw_frame(&p, gap + t * column, i * row + gap + title, k, i, t, scale);
    }
    save_png(path, p, comment);
    free(p.rgb);
}

// YUV4MPEG2: a text line, then each frame as planes Y, Cb, Cr in BT.601's range (16..235, 16..240), 4:4:4.
static void write_y4m(const char *path, const Picture *frames, int count, int fps) {
    static const float TO_YUV[3][4] = { { 16, 65.481f, 128.553f, 24.966f }, { 128, -37.797f, -74.203f, 112 },
                                        { 128, 112, -93.786f, -18.214f } };
    Output o;
    size_t pixels = (size_t)frames->width * frames->height;
    output_open(&o, path);
    fprintf(o.file, "YUV4MPEG2 W%d H%d F%d:1 Ip A1:1 C444\n", frames->width, frames->height, fps);
    for (int t = 0; t < count; t++) {
        fputs("FRAME\n", o.file);
        for (size_t i = 0; i < 3 * pixels; i++) {
            const float *m = TO_YUV[i / pixels];
            const uint8_t *rgb = frames[t].rgb + 3 * (i % pixels);
            fputc((int)(m[0] + (m[1] * rgb[0] + m[2] * rgb[1] + m[3] * rgb[2]) / 255 + 0.5f), o.file);
        }
    }
    if (ferror(o.file)) output_failed(&o);
    output_close(&o);
    fprintf(stderr, "%sffmpeg -i %s -pix_fmt yuv420p clip.mp4   (makes a film)\n", strcmp(path, "-") ? "" : "| ", path);
}

static bool ends_with(const char *text, const char *end) {
    size_t n = strlen(text), m = strlen(end);
    return n > m && !strcasecmp(text + n - m, end);
}

static void sheet_name(char sheet[PATH_MAX], const char *path) {  // out.png -> out_sheet.png
    if (snprintf(sheet, PATH_MAX, "%.*s_sheet.png", (int)strlen(path) - 4, path) >= PATH_MAX)
        die("cannot write %.60s...: the name is too long; choose a shorter one", path);
}

// Before work starts: does path name a kind of file that `osp sample` knows, and can it be written?
static void check_clip_path(const char *path) {
    char sheet[PATH_MAX];
    if (strcmp(path, "-") && !ends_with(path, ".png") && !ends_with(path, ".y4m") && !ends_with(path, ".safetensors"))
        die("cannot write a clip to '%s': its name must end in .png, .y4m or .safetensors, or be - (stdout)", path);
    check_writable(path);
    if (ends_with(path, ".png")) sheet_name(sheet, path), check_writable(sheet);
}

// The clips side by side. NAME.png: an animated PNG, and NAME_sheet.png with the frames in rows. NAME.y4m or -: y4m.
static void write_clips(const char *path, const Clips *k, int scale, int fps, const char *comment) {
    char sheet[PATH_MAX];
    Picture *frames = (Picture *)xalloc((size_t)k->T, sizeof(Picture));
    for (int t = 0; t < k->T; t++) {
        frames[t] = new_picture(k->count * k->W * scale, k->H * scale, 0);
        for (int i = 0; i < k->count; i++) draw_frame(&frames[t], i * k->W * scale, 0, k, i, t, scale);
    }
    if (ends_with(path, ".png")) {
        sheet_name(sheet, path);
        save_frames(path, frames, k->T, fps, comment);
        write_sheet(sheet, k, scale, comment);
    } else write_y4m(path, frames, k->T, fps);
    for (int t = 0; t < k->T; t++) free(frames[t].rgb);
    free(frames);
}
// ============================================================================================================
// 13. Checkpoints: safetensors under the names of spec §2, the config as strings in the metadata
// ============================================================================================================
static double meta_number(const File *f, const char *key, double least, double most, const char *kind) {
    const char *text = file_meta(f, key);
    char *end;
    if (!text) die("%s: no \"%s\" in its metadata; give a file written by osp or weights_export.py", f->path, key);
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= least && value <= most) || (*kind == 'w' && value != floor(value)))
        die("%s: %s is \"%.40s\", expected a %s from %g to %g", f->path, key, text, kind, least, most);
    return value;
}

static Config config_read(const File *f) {
    Config c;
    memset(&c, 0, sizeof(c));
    for (int i = 0; i < CONFIG_ROWS; i++)
        if (CONFIG[i].needed || file_meta(f, CONFIG[i].key))
            *config_field(&c, i) = (int)meta_number(f, CONFIG[i].key, CONFIG[i].least, CONFIG[i].most, "whole number");
    c.eps = file_meta(f, "eps") ? meta_number(f, "eps", 1e-12, 0.1, "number") : 1e-6;
    config_check(&c, f->path);
    if (c.vocab && (c.vocab < VOCAB || c.in_dim != 3))
        die("%s: a model with a word table needs %d words and 3 channels; it has %d and %d", f->path, VOCAB,
            c.vocab, c.in_dim);
    if (c.in_dim != c.out_dim)
        die("%s: in_dim %d and out_dim %d differ: a velocity has as many channels as its latent", f->path, c.in_dim,
            c.out_dim);
    return c;
}

static void shape_text(char *text, size_t room, int rank, const size_t *shape) {
    int used = snprintf(text, room, "[");
    for (int i = 0; i < rank; i++) used += snprintf(text + used, room - (size_t)used, i ? ", %zu" : "%zu", shape[i]);
    snprintf(text + used, room - (size_t)used, "]");
}

// Finds p in the file and checks its shape.
static const FileTensor *param_find(const File *f, const Param *p) {
    const FileTensor *t = file_find(f, p->name);
    char want[128], have[256];
    if (!t) die("%s: tensor %s is missing; export the whole model again", f->path, p->name);
    shape_text(want, sizeof(want), p->rank, p->shape);
    shape_text(have, sizeof(have), t->rank, t->shape);
    if (strcmp(want, have))
        die("%s: tensor %s has shape %s, the metadata's sizes want %s", f->path, p->name, have, want);
    return t;
}

// Reads the weights of an open file into a model that is allocated; nothing missing, nothing left over.
static void weights_read(Model *m, const File *f) {
    int used = 0;
    for (int i = 0; i < m->params; i++) {
        Param *p = &m->param[i];
        const FileTensor *t = param_find(f, p);
        float *host = file_read(f, t, p->count);
        p->codes = !strcmp(t->dtype, "U8");
        used += p->codes ? 2 : 1;
        param_set(m, p, host);
        free(host);
    }
    for (int i = 0; used < f->count && i < f->count; i++) {
        const char *name = f->tensors[i].name;
        bool known = !strncmp(name, "_pad.", 5) || strstr(name, ".scale");
        for (int j = 0; j < m->params && !known; j++) known = !strcmp(m->param[j].name, name);
        if (!known) die("%s: tensor %.80s is not part of this model; export the file again", f->path, name);
    }
}

// Tensors out of a device arena laid out as the params are; dtype f32, bf16 or hif8. Vectors and tables are small and
// matter: they stay F32.
static void add_params(Writer *w, const Param *param, int count, const float *arena, const char *dtype) {
    for (const Param *p = param; p < param + count; p++) {
        bool f32 = !strcmp(dtype, "f32") || !p->product, hif8 = !strcmp(dtype, "hif8") && p->block_matrix;
        writer_add(w, p->name, hif8 ? "U8" : f32 ? "F32" : "BF16", p->rank, p->shape, arena + p->offset);
    }
}

// weights: m->w, or their moving average.
static void model_save(const char *path, const Model *m, const float *weights, const char *dtype) {
    Writer w;
    Config c = m->c;
    writer_open(&w, path);
    for (int i = 0; i < CONFIG_ROWS; i++) writer_meta(&w, CONFIG[i].key, "%d", *config_field(&c, i));
    writer_meta(&w, "eps", "%.9g", c.eps);
    add_params(&w, m->param, m->params, weights, dtype);
    writer_close(&w);
}

// A LoRA on its own: the names peft gives, rank and alpha in the metadata.
static void lora_save(const char *path, const Lora *l, const float *weights) {
    Writer w;
    writer_open(&w, path);
    writer_meta(&w, "lora_rank", "%d", l->rank);
    writer_meta(&w, "lora_alpha", "%.9g", (double)l->scale * l->rank);
    add_params(&w, l->param, 2 * l->count, weights, "f32");
    writer_close(&w);
}

static void lora_load(Model *m, const char *path) {
    File f;
    file_open(&f, path);
    int rank = (int)meta_number(&f, "lora_rank", 1, m->c.dim / 2, "whole number");
    lora_new(m, rank, meta_number(&f, "lora_alpha", 1e-6, 1e6, "number"), 0);
    for (int i = 0; i < 2 * m->lora->count; i++) {
        const Param *p = &m->lora->param[i];
        float *host = file_read(&f, param_find(&f, p), p->count);
        upload(p->w, host, p->count * sizeof(float));
        free(host);
    }
    file_close(&f);
}

// The state of a training run, beside its output: weights, moments, average, step, and the run's settings, so that only
// the same run continues from it. A resumed run continues bit for bit.
static const char *const STATE_NAMES[] = {"train.w", "train.m", "train.v", "train.ema"};

static void state_save(const char *path, const Optimizer *o, const char *run) {
    const float *const arenas[] = {o->w, o->m, o->v, o->ema};
    Writer w;
    writer_open(&w, path);
    writer_meta(&w, "run", "%s", run);
    writer_meta(&w, "step", "%d", o->step);
    for (int i = 0; i < 4; i++) writer_add(&w, STATE_NAMES[i], "F32", 1, &o->n, arenas[i]);
    writer_close(&w);
}

static bool state_load(const char *path, Optimizer *o, const char *run) {
    float *const arenas[] = {o->w, o->m, o->v, o->ema};
    File f;
    if (access(path, F_OK)) return false;
    file_open(&f, path);
    const char *of = file_meta(&f, "run");
    if (!of) die("%s: not the state of a training run; remove it to start anew", path);
    if (strcmp(of, run))
        die("%s: left by a run with other settings (%.300s); remove it or choose another -o", path, of);
    o->step = (int)meta_number(&f, "step", 0, INT_MAX, "whole number");
    for (int i = 0; i < 4; i++) {
        float *host = file_numbers(&f, STATE_NAMES[i], o->n, "remove the file to start anew");
        upload(arenas[i], host, o->n * sizeof(float));
        free(host);
    }
    file_close(&f);
    return true;
}
// ============================================================================================================
// 14. Commands
// ============================================================================================================
// ---- options: one table says which commands take what, where it is kept, its default, range and help ---------------
enum { MOST_PROMPTS = 16 };
typedef struct { const char *text[MOST_PROMPTS]; int count; } Prompts;

typedef struct {
    const char *commands, *name;             // the first letters of the commands that take it
    char kind;                               // i int, d double, u seed, s text, m text that may repeat, b switch
    size_t field;                            // in the struct that is filled
    double standard, least, most;
    const char *text, *help;                 // text: the default of an s
} Option;
#define INT(commands, name, S, field, standard, least, most, help) \
    {commands, name, 'i', offsetof(S, field), standard, least, most, NULL, help}
#define REAL(commands, name, S, field, standard, least, most, help) \
    {commands, name, 'd', offsetof(S, field), standard, least, most, NULL, help}
#define SWITCH(commands, name, S, field, help) {commands, name, 'b', offsetof(S, field), 0, 0, 1, NULL, help}
#define STRING(commands, name, S, field, text, help) {commands, name, 's', offsetof(S, field), 0, 0, 0, text, help}

// What all commands are told, in the order of the table.
typedef struct {
    const char *weights, *lora, *preset, *text, *noise, *dtype, *out, *device, *sp;
    Prompts prompts;
    int steps, clips, soft, frames, height, width, size, full, full_blocks, hif8, hif8_linear, hif8_attn, rank;
    int merge, scale, fps, json;
    double guidance, shift, alpha, save;
    uint64_t seed;
    TrainOptions train;
    PolicyOptions policy;
} Options;

#define O Options
static const Option OPTIONS[] = {
    STRING("se", "-w", O, weights, NULL, "checkpoint"),
    STRING("g", "--init", O, weights, NULL, "checkpoint to improve"),
    STRING("t", "--init", O, weights, NULL, "start from this checkpoint, not from random weights"),
    STRING("t", "--preset", O, preset, "tiny", "tiny (4 frames of 16x16) or toy (8 of 32x32)"),
    STRING("se", "--lora", O, lora, NULL, "adapter from osp grpo, merged while loading"),
    {"s", "-p", 'm', offsetof(O, prompts), 0, 0, 0, NULL, "caption; may repeat, for clips side by side"},
    STRING("s", "--text", O, text, NULL, "embeddings from weights_export.py text, for models without a word table"),
    STRING("s", "--noise", O, noise, NULL, "start from tensor `noise` of this file"),
    INT("s", "-n", O, steps, 20, 1, 1000, "Euler steps"),
    INT("e", "-n", O, clips, 96, 1, 100000, "clips"),
    INT("e", "--steps", O, steps, 20, 1, 1000, "Euler steps"),
    INT("t", "--steps", O, train.steps, 0, 0, 1e8, "steps; 0: only write the first weights"),
    INT("t", "--batch", O, train.batch, 0, 1, 65536, "clips a step"),
    INT("e", "--batch", O, train.batch, 8, 1, 4096, "clips at a time"),
    INT("g", "--steps", O, policy.updates, 40, 1, 1e6, "updates"),
    INT("g", "--prompts", O, policy.prompts, 4, 1, 1024, "captions an update"),
    INT("g", "--group", O, policy.group, 8, 2, 1024, "videos of a caption (paper: 4)"),
    INT("g", "--epochs", O, policy.epochs, 1, 1, 100, "AdamW steps on each rollout"),
    INT("g", "-n", O, policy.steps, 8, 3, 255, "sampling steps (paper: 25)"),
    INT("g", "--window", O, policy.sde_count, 4, 1, 253, "SDE steps (paper: 10)"),
    INT("g", "--first", O, policy.sde_first, 0, 0, 253, "first SDE step"),
    INT("g", "--stride", O, policy.stride, 0, 0, 253, "window slides so many steps an update (OSP-Next: 0)"),
    REAL("se", "-g", O, guidance, 4, 0, 100, "guidance; 1: none"),
    REAL("g", "-g", O, policy.guidance, 3, 0, 100, "guidance (paper: 5)"),
    REAL("se", "--shift", O, shift, 3, 0.01, 100, "shift of the schedule"),
    REAL("g", "--shift", O, policy.shift, 1, 0.01, 100, "shift of the schedule (paper: 1)"),
    REAL("g", "--clip", O, policy.clip, 1e-3, 1e-9, 1, "range of the ratio (paper: 1e-4)"),
    REAL("g", "--beta", O, policy.beta, 0.004, 0, 1e6, "weight of the KL to the base model"),
    INT("g", "--rank", O, rank, 8, 1, 1024, "LoRA (paper: 32)"),
    REAL("g", "--alpha", O, alpha, 16, 1e-6, 1e6, "LoRA (paper: 64)"),
    REAL("t", "--lr", O, train.lr, 0, 0, 10, "learning rate"),
    REAL("g", "--lr", O, train.lr, 5e-4, 0, 10, "learning rate (paper: 2e-5)"),
    INT("t", "--warmup", O, train.warmup, 0, 0, 1e8, "steps of rising learning rate"),
    REAL("t", "--ema", O, train.ema, 0, 0, 1, "decay of the weights' average, which is what is written"),
    REAL("g", "--ema", O, train.ema, 0.9, 0, 1, "decay of the adapter's average, which is what is written"),
    REAL("t", "--clip", O, train.clip, 1, 1e-6, 1e9, "largest norm of the gradient"),
    REAL("t", "--decay", O, train.weight_decay, 0, 0, 10, "weight decay"),
    REAL("t", "--drop", O, train.drop, 0, 0, 1, "captions dropped"),
    {"stge", "--seed", 'u', offsetof(O, seed), 1, 0, 9e15, NULL, "of weights, captions, clips, noise"},
    REAL("g", "--w-color", O, policy.weight[SCORE_COLOR], 1, 0, 1e6, "weight in the reward"),
    REAL("g", "--w-shape", O, policy.weight[SCORE_SHAPE], 1, 0, 1e6, "same"),
    REAL("g", "--w-size", O, policy.weight[SCORE_SIZE], 1, 0, 1e6, "same"),
    REAL("g", "--w-motion", O, policy.weight[SCORE_MOTION], 1, 0, 1e6, "same"),
    REAL("g", "--w-background", O, policy.weight[SCORE_BACKGROUND], 1, 0, 1e6, "same"),
    REAL("g", "--w-consistency", O, policy.weight[SCORE_CONSISTENCY], 1, 0, 1e6, "same"),
    REAL("g", "--w-smoothness", O, policy.weight[SCORE_SMOOTHNESS], 1, 0, 1e6, "same"),
    REAL("g", "--w-red", O, policy.weight[N_SCORES], 0, 0, 1e6, "how red the clip is: reward hacking in one option"),
    INT("st", "--frames", O, frames, 0, 1, 4096, "of a clip [as the model was trained]"),
    INT("s", "--height", O, height, 0, 2, 16384, "in pixels [as trained]"),
    INT("s", "--width", O, width, 0, 2, 16384, "in pixels [as trained]"),
    INT("t", "--size", O, size, 0, 8, 512, "height and width [as the model was trained]"),
    SWITCH("stge", "--full", O, full, "full attention in every block"),
    INT("stge", "--full-blocks", O, full_blocks, -1, 0, 1024, "so many full blocks at the two ends; -1: as trained"),
    SWITCH("stge", "--hif8", O, hif8, "8 bits: HiF8 linear layers and attention"),
    SWITCH("stge", "--hif8-linear", O, hif8_linear, "HiF8 linear layers only"),
    SWITCH("stge", "--hif8-attn", O, hif8_attn, "HiF8 q, k, v only"),
    SWITCH("e", "--soft", O, soft, "the continuous scores that GRPO is rewarded with"),
    // From here on nothing changes what a run learns: it may be resumed with other values.
    STRING("tg", "-o", O, out, NULL, "file to write: checkpoint, or adapter"),
    STRING("s", "-o", O, out, "out.png", "NAME.png (and NAME_sheet.png), .y4m, - (y4m to stdout), .safetensors"),
    SWITCH("g", "--merge", O, merge, "write the whole model with the adapter merged"),
    STRING("tg", "--dtype", O, dtype, "f32", "of the file: f32, bf16 or hif8"),
    REAL("tg", "--save", O, save, 15, 0, 1e9, "seconds between saved states, for resuming"),
    INT("s", "--scale", O, scale, 0, 1, 64, "pixels of the picture per pixel of the clip; 0: to fit"),
    INT("s", "--fps", O, fps, 8, 1, 60, "frames a second"),
    STRING("stge", "--device-dtype", O, device, NULL, "arithmetic on a GPU: f32 or its default, bf16 (the CPU: f32)"),
    STRING("stge", "--sp", O, sp, "ssp", "with ranks, sparse blocks under: ssp or ulysses"),
    SWITCH("stge", "--json", O, json, "figures as one JSON object on the last line"),
};
#undef O
enum { OPTION_ROWS = sizeof(OPTIONS) / sizeof(OPTIONS[0]) };

static bool takes(const Option *o, char command) { return !command || strchr(o->commands, command); }

static void option_text(char *text, size_t room, const Option *o, const void *values) {
    const void *value = (const char *)values + o->field;
    text[0] = 0;
    if (o->kind == 'i' || o->kind == 'b') snprintf(text, room, "%d", *(const int *)value);
    if (o->kind == 'd') snprintf(text, room, "%.9g", *(const double *)value);
    if (o->kind == 'u') snprintf(text, room, "%llu", (unsigned long long)*(const uint64_t *)value);
    if (o->kind == 's' && *(const char *const *)value) snprintf(text, room, "%s", *(const char *const *)value);
}

static void print_help(const char *example, const Option *options, int count, char command, const void *values) {
    printf("example: %s\n", example);
    for (const Option *o = options; o < options + count; o++) {
        char standard[64];
        option_text(standard, sizeof(standard), o, values);
        bool shown = takes(o, command) && *standard && o->kind != 'b';
        if (takes(o, command)) printf(shown ? "  %-15s %s [%s]\n" : "  %-15s %s\n", o->name, o->help, standard);
    }
}

static void option_store(const Option *o, void *values, double v, const char *text) {
    void *value = (char *)values + o->field;
    Prompts *p = (Prompts *)value;
    if (o->kind == 's') *(const char **)value = text;
    else if (o->kind == 'd') *(double *)value = v;
    else if (o->kind == 'u') *(uint64_t *)value = (uint64_t)v;
    else if (o->kind != 'm') *(int *)value = (int)v;
    else if (!text) p->count = 0;
    else if (p->count == MOST_PROMPTS) die("%s: at most %d of them", o->name, MOST_PROMPTS);
    else p->text[p->count++] = text;
}

static void option_defaults(const Option *options, int count, char command, void *values) {
    for (const Option *o = options; o < options + count; o++)
        if (takes(o, command)) option_store(o, values, o->standard, o->text);
}

static void option_set(const Option *o, void *values, const char *text) {
    char *end;
    errno = 0;
    double v = strtod(text, &end);
    bool number = end != text && !*end && !errno && v >= o->least && v <= o->most;
    if (!strchr("sm", o->kind) && (!number || (o->kind != 'd' && v != floor(v))))
        die("%s: \"%.40s\" is not a %snumber from %.16g to %.16g", o->name, text, o->kind == 'd' ? "" : "whole ",
            o->least, o->most);
    option_store(o, values, v, text);
}

// argv after the command's name. One argument without a dash goes to `plain`, where the command takes one.
static void parse_options(int argc, char **argv, const char *example, const Option *options, int count, char command,
                          void *values, const char **plain) {
    for (int i = 0; i < argc; i++) {
        const Option *o = options;
        if (!strcmp(argv[i], "-h") || !strcmp(argv[i], "--help")) {
            print_help(example, options, count, command, values);
            ranks_end();
            exit(0);
        }
        while (o < options + count && !(takes(o, command) && !strcmp(argv[i], o->name))) o++;
        if (o == options + count && plain && argv[i][0] != '-' && !*plain) { *plain = argv[i]; continue; }
        if (o == options + count) die("unknown option \"%.60s\"; -h lists the options", argv[i]);
        if (o->kind == 'b') option_store(o, values, 1, NULL);
        else if (i + 1 == argc) die("%s needs a value; -h lists the options", o->name);
        else option_set(o, values, argv[++i]);
    }
}

// What a resumed run must have in common with the one that was stopped: the command's options up to -o.
static void settings_text(char *text, size_t room, const Options *o, char command) {
    size_t used = 0;
    for (const Option *row = OPTIONS; used < room && strcmp(row->name, "-o"); row++) {
        char value[PATH_MAX];
        if (!takes(row, command)) continue;
        option_text(value, sizeof(value), row, o);
        used += (size_t)snprintf(text + used, room - used, "%s %s ", row->name, value);
    }
    plain_text(text);
}

static void one_of(const char *name, const char *value, const char *const *allowed) {
    char list[128] = "";
    for (int i = 0; allowed[i]; i++) {
        if (!strcmp(value, allowed[i])) return;
        snprintf(list + strlen(list), sizeof(list) - strlen(list), i ? ", %s" : "%s", allowed[i]);
    }
    die("%s: \"%.40s\" is none of %s", name, value, list);
}
static const char *const DTYPES[] = {"f32", "bf16", "hif8", NULL}, *const SP[] = {"ssp", "ulysses", NULL};

// ---- what the commands share ----------------------------------------------------------------------------------------
typedef struct { Config c; TrainOptions train; } Preset;
static const char *const PRESET_NAMES[] = {"tiny", "toy", NULL};
// dim ffn heads layers full_blocks ratio in out text_dim text_len freq vocab quant quant_attn T H_l W_l eps;
// steps batch warmup lr beta1 beta2 eps weight_decay clip ema drop seed
static const Preset PRESETS[] = {
    {{64, 256, 4, 8, 4, 2, 3, 3, 64, 12, 64, VOCAB, 0, 0, 4, 16, 16, 1e-6},
     {1300, 8, 100, 3e-3, 0.9, 0.99, 1e-8, 0.01, 1, 0.99, 0.1, 1}},
    {{128, 512, 4, 12, 4, 2, 3, 3, 64, 12, 128, VOCAB, 0, 0, 8, 32, 32, 1e-6},
     {5000, 64, 200, 2e-3, 0.9, 0.99, 1e-8, 0.01, 1, 0.999, 0.1, 1}},
};

// The latent's size: as asked or as trained. A model with words makes pixels; the others make Wan's VAE latents, a
// quarter of the frames (plus one) and an eighth of height and width.
static void config_size_asked(Config *c, const Options *o) {
    int per_frame = c->vocab ? 1 : 4, per_pixel = c->vocab ? 1 : 8, wan = !c->T;
    int frames = o->frames ? o->frames : wan ? 81 : (c->T - 1) * per_frame + 1;
    int height = o->size ? o->size : o->height ? o->height : wan ? 720 : c->H_l * per_pixel;
    int width = o->size ? o->size : o->width ? o->width : wan ? 1280 : c->W_l * per_pixel;
    if ((frames - 1) % per_frame) die("--frames %d: must be 1 more than a multiple of %d", frames, per_frame);
    if (height % (2 * per_pixel) || width % (2 * per_pixel))
        die("a clip %d high and %d wide: both must be multiples of %d", height, width, 2 * per_pixel);
    c->T = (frames - 1) / per_frame + 1, c->H_l = height / per_pixel, c->W_l = width / per_pixel;
}

static void config_override(Config *c, const Options *o) {
    if (o->full_blocks >= 0) c->num_full_blocks = o->full_blocks;
    if (o->full) c->num_full_blocks = c->num_layers;
    c->quant |= o->hif8 || o->hif8_linear;
    c->quant_attn |= o->hif8 || o->hif8_attn;
    config_size_asked(c, o);
    config_check(c, "--full-blocks");
}

// The ranks' groups: all on one sample, or (guidance) two halves.
static void ranks_arrange(Ranks *k, const Config *c, const char *sp, bool guided) {
    int P2 = c->sparse_ratio * c->sparse_ratio, world = k->size;
    one_of("--sp", sp, SP);
    k->ulysses = !strcmp(sp, "ulysses");
    bool halves = P2 % world != 0 && guided && world % 2 == 0 && P2 % (world / 2) == 0;
    if (P2 % world && !halves)
        die("%d ranks: their number must divide P^2 = %d%s", world, P2,
            guided ? ", or be twice such a number (guidance halves)" : "");
    ranks_split(k, halves ? 2 : 1);
}

// The model of a command: from its checkpoint or with a preset's random weights; with an adapter to use or to train.
static Model *model_open(const Options *o, Ranks *k, bool training, bool guided) {
    Config c;
    File f;
    if (!o->weights && !o->preset) die("no checkpoint given: -w FILE, or grpo --init FILE (make one with osp train)");
    if (o->weights) file_open(&f, o->weights);
    device_start(o->device, k->rank);
    if (o->weights) ranks_agree(k, f.map, f.size, "checkpoint"), c = config_read(&f);
    else c = PRESETS[!strcmp(o->preset, "toy")].c;
    if ((training || o->clips) && (!c.vocab || !c.T))
        die("%s: clips of captioned shapes need a model with a word table, made by osp train", o->weights);
    config_override(&c, o);
    if (o->rank > c.dim / 2) die("--rank %d: at most half of dim %d", o->rank, c.dim);
    ranks_arrange(k, &c, o->sp, guided);
    Model *m = model_layout(&c);
    if (o->lora) lora_load(m, o->lora);
    else if (o->rank) lora_new(m, o->rank, o->alpha, o->seed);
    model_allocate(m, training);
    if (o->weights) weights_read(m, &f), file_close(&f);
    else model_random(m, o->seed);
    return m;
}

static bool speaks(const Ranks *k) { return k->rank == 0 && k->half == 0; }
static double gib(double bytes) { return bytes / (1024.0 * 1024.0 * 1024.0); }

// Says what memory the weights take and the activations will.
static Run *run_planned(Model *m, Ranks *k, int B, bool training) {
    size_t bytes;
    int T = m->c.T, H = m->c.H_l / 2, W = m->c.W_l / 2;
    run_new(m, k, B, T, H, W, training, &bytes);
    size_t moments = !training ? 0 : 3 * sizeof(float) * (m->lora ? m->lora->n : m->count);
    if (speaks(k))
        fprintf(stderr, "memory: weights%s %.3f GiB + activations %.3f GiB; %d x %d tokens (%dx%dx%d)\n",
                training ? ", gradients, moments" : "", gib((double)(model_bytes(m, training) + moments)),
                gib((double)bytes), B, T * H * W, T, H, W);
    Run *r = run_new(m, k, B, T, H, W, training, NULL);
    r->show = !training && speaks(k) && isatty(2);
    return r;
}

// A run that learns, and may have been killed before: its state is kept beside its output.
typedef struct {
    Optimizer opt;
    char path[PATH_MAX], settings[PATH_MAX + 2048];
    double began, saved;
    int first;
} Learning;

static void learning_start(Learning *l, const Options *o, char command, Ranks *k, float *w, float *dw, size_t count) {
    optimizer_init(&l->opt, w, dw, count);
    if (snprintf(l->path, sizeof(l->path), "%s.resume", o->out) >= PATH_MAX) die("-o: choose a shorter name");
    settings_text(l->settings, sizeof(l->settings), o, command);
    if (state_load(l->path, &l->opt, l->settings) && speaks(k))
        fprintf(stderr, "resumed from %s at step %d\n", l->path, l->opt.step);
    ranks_agree(k, &l->opt.step, sizeof(l->opt.step), "step to resume from");
    l->began = l->saved = seconds(), l->first = l->opt.step;
}

static void learning_save(Learning *l, const Options *o, Ranks *k) {         // now and then
    if (!speaks(k) || seconds() - l->saved <= o->save) return;
    state_save(l->path, &l->opt, l->settings);
    l->saved = seconds();
}

// ---- osp sample ----------------------------------------------------------------------------------------------------
static float *numbers_of(const char *path, const char *name, size_t count, const char *remedy) {
    File f;
    file_open(&f, path);
    float *x = file_numbers(&f, name, count, remedy);
    file_close(&f);
    return x;
}

static void save_latent(const char *path, const float *x, const Config *c, const char *comment) {
    Writer w;
    size_t shape[4] = {(size_t)c->out_dim, (size_t)c->T, (size_t)c->H_l, (size_t)c->W_l};
    size_t bytes = shape[0] * shape[1] * shape[2] * shape[3] * sizeof(float);
    float *device = (float *)device_alloc(bytes);
    upload(device, x, bytes);
    writer_open(&w, path);
    writer_meta(&w, "comment", "%s", comment);
    writer_add(&w, "latent", "F32", 4, shape, device);
    writer_close(&w);
    device_free(device);
}

// One clip per prompt (or one from --text), each from its own noise, alone in its batch.
static float **sample_clips(Run *r, const Options *o, int count) {
    const Config *c = &r->m->c;
    size_t size = latent_size(r), rows = (size_t)c->text_len * (size_t)c->text_dim;
    float **clips = (float **)xalloc((size_t)count, sizeof(float *));
    Text cond = {NULL, NULL}, uncond = {NULL, NULL};
    if (c->vocab) uncond = caption_batch(r->m, NULL, 1);
    else {
        cond.rows = numbers_of(o->text, "text_cond", rows, "make it with weights_export.py text");
        uncond.rows = numbers_of(o->text, "text_uncond", rows, "make it with weights_export.py text");
    }
    for (int k = 0; k < count; k++) {
        clips[k] = o->noise ? numbers_of(o->noise, "noise", size, "it must have the latent's size")
                            : (float *)xalloc(size, sizeof(float));
        if (!o->noise) noise_fill(clips[k], size, o->seed, SAMPLE_STREAM, (uint64_t)k * size);
        if (c->vocab) cond = caption_batch(r->m, &o->prompts.text[k], 1);
        sample_host(r, clips[k], cond, uncond, o->steps, o->shift, o->guidance);
    }
    return clips;
}

// ShapesBench of one clip, where the caption is one of the world's.
static void print_score(FILE *out, const float *x, const char *caption, const Config *c) {
    Scene asked;
    float score[N_SCORES];
    if (!parse_caption(&asked, caption)) return;
    shapes_score(score, x, asked, c->T, c->H_l, c->W_l, false);
    fprintf(out, "%s:", caption);
    for (int s = 0; s < N_SCORES; s++) fprintf(out, " %s %.0f", SCORE_NAMES[s], 100 * (double)score[s]);
    fputc('\n', out);
}

static void cmd_sample(const Options *o, Ranks *k) {
    const Prompts *p = &o->prompts;
    bool latent = ends_with(o->out, ".safetensors");
    check_clip_path(o->out);
    Model *m = model_open(o, k, false, o->guidance != 1);
    const Config *c = &m->c;
    int count = c->vocab ? p->count : 1;
    if (c->vocab && !count) die("no caption given: -p \"a small green square moving up on a navy background\"");
    if (!c->vocab && !o->text) die("this model reads embeddings: give --text FILE, made by weights_export.py text");
    if (!c->vocab && !latent)
        die("-o %s: this model makes latents: give a name in .safetensors, then weights_export.py video", o->out);
    for (int i = 0; i < p->count; i++) if (!*p->text[i]) die("-p: the caption is empty; say what to draw");
    Run *r = run_planned(m, k, 1, false);
    double began = seconds();
    Clips clips = {c->out_dim, c->T, c->H_l, c->W_l, count, sample_clips(r, o, count), p->text};
    double took = seconds() - began;
    if (!speaks(k)) return;
    char comment[1024];
    snprintf(comment, sizeof(comment), "prompt: %s; seed %llu; steps %d; guidance %g; shift %g; weights %s",
             p->count ? p->text[0] : o->text, (unsigned long long)o->seed, o->steps, o->guidance, o->shift, o->weights);
    int scale = o->scale ? o->scale : c->W_l <= 16 ? 8 : c->W_l <= 64 ? 4 : 1;
    if (latent) save_latent(o->out, clips.x[0], c, comment);
    else write_clips(o->out, &clips, scale, o->fps, comment);
    FILE *say = strcmp(o->out, "-") ? stdout : stderr;
    for (int i = 0; c->vocab && i < count; i++) print_score(say, clips.x[i], p->text[i], c);
    fprintf(say, "wrote %s: seed %llu, %d steps, %.2f s\n", o->out, (unsigned long long)o->seed, o->steps, took);
    if (o->json) fprintf(say, "{\"seconds\": %.4f, \"steps\": %d, \"clips\": %d}\n", took, o->steps, count);
}

// ---- osp eval: ShapesBench on captions that training never saw ------------------------------------------------------
typedef struct {
    double mean[N_SCORES + 1], error[N_SCORES + 1];                      // percent; the last: all scores' mean
    int motion[MOTIONS][MOTIONS], shape[SHAPES][SHAPES];                 // [asked][seen]
} Bench;

static void bench_clip(Bench *sums, const float *x, Scene asked, const Run *r, bool soft) {
    float score[N_SCORES];
    double total = 0;
    Seen seen = watch(x, r->T, 2 * r->H, 2 * r->W);
    Scene is = scene_seen(&seen, r->T, 2 * r->H, 2 * r->W);
    shapes_score(score, x, asked, r->T, 2 * r->H, 2 * r->W, soft);
    for (int s = 0; s < N_SCORES; s++) total += score[s] / N_SCORES;
    for (int s = 0; s <= N_SCORES; s++) {
        double v = s < N_SCORES ? score[s] : total;
        sums->mean[s] += v, sums->error[s] += v * v;
    }
    if (is.motion >= 0) sums->motion[asked.motion][is.motion]++;
    if (is.shape >= 0) sums->shape[asked.shape][is.shape]++;
}

// `clips` samples in batches of r->B; captions drawn in turn from those held out.
static Bench evaluate(Run *r, int clips, int steps, double shift, double guidance, uint64_t seed, bool soft) {
    size_t size = latent_size(r), B = (size_t)r->B;
    float *host = (float *)xalloc(B * size, sizeof(float));
    char (*text)[128] = (char (*)[128])xalloc(B, 128);
    const char **captions = (const char **)xalloc(B, sizeof(char *));
    Scene *asked = (Scene *)xalloc(B, sizeof(Scene));
    int caption = (int)(rng_bits(seed, SAMPLE_STREAM, ~0ull) % CAPTIONS);
    Text uncond = caption_batch(r->m, NULL, r->B);
    Bench result;
    memset(&result, 0, sizeof(result));
    for (int done = 0; done < clips; done += r->B) {
        for (size_t b = 0; b < B; b++) {
            do caption = (caption + 7) % CAPTIONS; while (!held_out(caption));
            asked[b] = scene_of(caption);
            caption_text(text[b], 128, asked[b]);
            captions[b] = text[b];
        }
        noise_fill(host, B * size, seed, SAMPLE_STREAM, (uint64_t)done * size);
        Text cond = caption_batch(r->m, captions, r->B);
        sample_host(r, host, cond, uncond, steps, shift, guidance);
        free((void *)cond.ids);
        for (int b = 0; b < r->B && done + b < clips; b++)
            bench_clip(&result, host + (size_t)b * size, asked[b], r, soft);
    }
    for (int s = 0; s <= N_SCORES; s++) {
        double mean = result.mean[s] / clips, var = fmax(result.error[s] / clips - mean * mean, 0);
        result.mean[s] = 100 * mean, result.error[s] = clips > 1 ? 100 * sqrt(var / (clips - 1)) : 0;
    }
    free(host), free(text), free(captions), free(asked), free((void *)uncond.ids);
    return result;
}

static const char *score_name(int s) { return s < N_SCORES ? SCORE_NAMES[s] : "total"; }

static void cmd_eval(const Options *o, Ranks *k) {
    Model *m = model_open(o, k, false, o->guidance != 1);
    Run *r = run_planned(m, k, o->train.batch < o->clips ? o->train.batch : o->clips, false);
    Bench b = evaluate(r, o->clips, o->steps, o->shift, o->guidance, o->seed, o->soft);
    if (!speaks(k)) return;
    printf("ShapesBench, %d clips of captions never trained on (mean and standard error):\n", o->clips);
    for (int s = 0; s <= N_SCORES; s++) printf("  %-12s %6.2f ± %.2f\n", score_name(s), b.mean[s], b.error[s]);
    printf("asked \\ seen: motion (left right up down still) and shape (circle square triangle diamond)\n");
    for (int i = 0; i < MOTIONS; i++) {
        printf("  ");
        for (int j = 0; j < MOTIONS; j++) printf("%4d", b.motion[i][j]);
        for (int j = 0; j < SHAPES && i < SHAPES; j++) printf("%s%4d", j ? "" : "      ", b.shape[i][j]);
        printf("\n");
    }
    if (!o->json) return;
    printf("{");
    for (int s = 0; s <= N_SCORES; s++)
        printf("\"%s\": %.4f, \"%s_error\": %.4f, ", score_name(s), b.mean[s], score_name(s), b.error[s]);
    printf("\"clips\": %d}\n", o->clips);
}

// ---- osp train -----------------------------------------------------------------------------------------------------
// Lines on stdout (the log that `test_osp show loss` draws), a bar on stderr.
static void train_report(const Learning *l, int step, int S, double loss, double norm, double lr) {
    double per_step = (seconds() - l->began) / (step - l->first), left = per_step * (S - step);
    if (step % 10 == 0 || step == S)
        printf("step %d/%d loss %.5f grad %.4f lr %.2e ms %.1f\n", step, S, loss, norm, lr, 1e3 * per_step);
    fflush(stdout);
    if (!isatty(2)) return;
    fprintf(stderr, "\r\033[K[");
    for (int i = 0; i < 30; i++) fputc(i * S < 30 * step ? '#' : '.', stderr);
    fprintf(stderr, "] %d/%d loss %.4f %d:%02d left %s", step, S, loss, (int)left / 60, (int)left % 60,
            step == S ? "\r\033[K" : "");
}

static void cmd_train(const Options *o, Ranks *k) {
    Model *m = model_open(o, k, true, false);
    Run *r = run_planned(m, k, o->train.batch, true);
    Learning l;
    Batch batch;
    size_t bytes = (size_t)r->B * latent_size(r) * sizeof(float);
    float *x = (float *)device_alloc(bytes), *target = (float *)device_alloc(bytes);
    float *dout = (float *)device_alloc(bytes);
    int S = o->train.steps;
    learning_start(&l, o, 't', k, m->w, m->dw, m->count);
    batch_new(&batch, r);
    if (l.first < S) batch_fill(&batch, r, &o->train, l.first), batch_upload(r, &batch, x, target);
    for (int step = l.first; step < S; step++) {
        for (int i = 0; step > 0 && i < m->params; i++) m->param[i].codes = false;      // the weights have moved
        double lr = learning_rate(&o->train, step), loss = train_step(r, &batch, x, target, dout);
        if (step + 1 < S) batch_fill(&batch, r, &o->train, step + 1);       // while a GPU is still at work ...
        if (step + 1 < S) batch_upload(r, &batch, x, target);               // ... it has its next batch
        double norm = optimizer_step(&l.opt, r->ranks, &o->train, lr);
        if (!isfinite(loss) || !isfinite(norm))
            die("step %d: the loss is %g, the gradient's norm %g: lower --lr; %s, if there, holds the last good state",
                step + 1, loss, norm, l.path);
        if (speaks(k)) train_report(&l, step + 1, S, loss, norm, lr);
        if (step + 1 < S) learning_save(&l, o, k);
    }
    if (!speaks(k)) return;
    model_save(o->out, m, l.opt.ema, o->dtype);
    unlink(l.path);
    printf("wrote %s: %d steps, %.1f s\n", o->out, S, seconds() - l.began);
    if (o->json) printf("{\"steps\": %d, \"seconds\": %.3f}\n", S, seconds() - l.began);
}

// ---- osp grpo -------------------------------------------------------------------------------------------------------
static void cmd_grpo(const Options *o, Ranks *k) {
    const PolicyOptions *p = &o->policy;
    Learning l;
    double total = 0;
    for (int i = 0; i <= N_SCORES; i++) total += p->weight[i];
    if (!(total > 0)) die("all reward weights are zero; give at least one --w-... above zero");
    if (p->sde_first + p->sde_count > p->steps - 1)
        die("--first %d --window %d: the last of %d steps adds no noise, so the window must end before it",
            p->sde_first, p->sde_count, p->steps);
    Model *m = model_open(o, k, true, false);
    Run *r = run_planned(m, k, p->group, true);
    learning_start(&l, o, 'g', k, m->lora->w, m->lora->dw, m->lora->n);
    Policy policy = policy_new(r, p, &o->train, o->out);
    weights_prepare(m);
    for (int update = l.first / p->epochs; update < p->updates; update++) {
        double began = seconds();
        PolicyFigures f = policy_update(r, &policy, &l.opt, update);
        if (!speaks(k)) continue;
        printf("update %d/%d reward %.4f spread %.4f adv %.3f ratio %.6f %.6f %.6f clipped %.3f kl %.3e grad %.3e "
               "rollout %.2f s update %.2f s\n", update + 1, p->updates, f.reward, f.spread, f.advantage, f.ratio_min,
               f.ratio_mean, f.ratio_max, f.clipped, f.kl, f.norm, f.rollout_time, seconds() - began - f.rollout_time);
        fflush(stdout);
        if (update + 1 < p->updates) learning_save(&l, o, k);
    }
    if (!speaks(k)) return;
    if (o->merge) lora_into_weights(m, l.opt.ema), model_save(o->out, m, m->w, o->dtype);
    else lora_save(o->out, m->lora, l.opt.ema);
    unlink(l.path);
    printf("wrote %s\n", o->out);
}

// ---- osp info -----------------------------------------------------------------------------------------------------
static void cmd_info(const Options *o, Ranks *k) {
    File f;
    (void)k;
    if (!o->weights) die("no file given: osp info FILE");
    file_open(&f, o->weights);
    size_t codes = 0, all = 0, parameters = 0;
    for (const FileTensor *t = f.tensors; t < f.tensors + f.count; t++) {
        char shape[256];
        shape_text(shape, sizeof(shape), t->rank, t->shape);
        if (!strncmp(t->name, "_pad.", 5)) continue;
        printf("  %-44s %-5s %s\n", t->name, t->dtype, shape);
        all += t->bytes, codes += strcmp(t->dtype, "U8") ? 0 : t->bytes;
    }
    for (int i = 0; i < f.pairs; i++) printf("  %s = %.200s\n", f.by_key[i].key, (const char *)f.by_key[i].value);
    if (file_meta(&f, "dim")) {
        Config c = config_read(&f);
        Model *m = model_layout(&c);
        for (int i = 0; i < m->params; i++) parameters += m->param[i].count;
        printf("%zu parameters; blocks ", parameters);
        for (int i = 0; i < c.num_layers; i++)
            putchar(PATTERN_LETTER[block_pattern(i, c.num_layers, c.num_full_blocks)]);
        printf(" (F full, t token-wise, g group-wise)\n");
    }
    printf("%zu bytes of tensors, %.1f %% of them HiF8 codes; file %zu bytes\n", all,
           all ? 100.0 * (double)codes / (double)all : 0, f.size);
    file_close(&f);
}

// ---- main ---------------------------------------------------------------------------------------------------------
typedef struct { const char *name; void (*run)(const Options *, Ranks *); const char *help, *example; } Command;
static const Command COMMANDS[] = {
    {"sample", cmd_sample, "draw a clip from a caption",
     "-w toy.safetensors -p \"a large red circle moving left on a black background\" -o out.png"},
    {"train", cmd_train, "train on captioned shapes", "--preset tiny -o tiny.safetensors"},
    {"grpo", cmd_grpo, "reinforcement learning: Mix-GRPO with LoRA",
     "--init tiny.safetensors -o tiny_lora.safetensors --steps 40"},
    {"eval", cmd_eval, "ShapesBench on captions never trained on", "-w toy.safetensors -n 96"},
    {"info", cmd_info, "what a checkpoint holds", "toy.safetensors"},
};
enum { COMMAND_ROWS = sizeof(COMMANDS) / sizeof(COMMANDS[0]) };

// Defaults, the preset's where osp train starts from one, then what argv says.
static Options options_read(int argc, char **argv, const Command *command) {
    Options o;
    char example[160], letter = command->name[0];
    bool writes = letter == 't' || letter == 'g';
    memset(&o, 0, sizeof(o));
    option_defaults(OPTIONS, OPTION_ROWS, letter, &o);
    for (int i = 0; letter == 't' && i + 1 < argc; i++) if (!strcmp(argv[i], "--preset")) o.preset = argv[i + 1];
    if (o.preset) one_of("--preset", o.preset, PRESET_NAMES), o.train = PRESETS[!strcmp(o.preset, "toy")].train;
    if (letter == 'g') o.train.beta1 = 0.9, o.train.beta2 = 0.99, o.train.eps = 1e-8, o.train.clip = 1;
    snprintf(example, sizeof(example), "osp %s %s", command->name, command->example);
    parse_options(argc, argv, example, OPTIONS, OPTION_ROWS, letter, &o, letter == 'i' ? &o.weights : NULL);
    o.train.seed = o.seed;
    if (writes && !o.out) die("no output given: -o FILE.safetensors");
    if (writes) one_of("--dtype", o.dtype, DTYPES), check_writable(o.out);
    return o;
}

static int osp_main(int argc, char **argv) {
    Ranks ranks;
    memset(&ranks, 0, sizeof(ranks));
    ranks_start(&ranks, &argc, &argv);
    for (const Command *c = COMMANDS; c < COMMANDS + COMMAND_ROWS; c++)
        if (argc > 1 && !strcmp(argv[1], c->name)) {
            Options o = options_read(argc - 2, argv + 2, c);
            c->run(&o, &ranks);
            if (speaks(&ranks)) ranks_report(&ranks);
            ranks_end();
            return 0;
        }
    if (argc > 1 && strcmp(argv[1], "-h") && strcmp(argv[1], "--help"))
        die("\"%.40s\" is no command; the commands are sample, train, grpo, eval, info", argv[1]);
    printf("OSP-Next: a sparse video diffusion transformer in one file of C.\nexample: osp train --preset tiny -o "
           "tiny.safetensors\n");
    for (const Command *c = COMMANDS; c < COMMANDS + COMMAND_ROWS; c++) printf("  osp %-7s %s\n", c->name, c->help);
    printf("osp COMMAND -h lists a command's options\n");
    ranks_end();
    return argc > 1 ? 0 : 2;
}

#ifndef OSP_NO_MAIN
int main(int argc, char **argv) { return osp_main(argc, argv); }
#endif
