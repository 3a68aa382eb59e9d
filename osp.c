// ==========================================================================================================
// osp.c: OSP-Next, a sparse video diffusion transformer, in one file (paper: arXiv 2605.28691)
// ==========================================================================================================
// A text-to-video DiT (Wan2.1's architecture) in which most blocks attend sparsely, trained with 8-bit
// numbers, run on several ranks that exchange little, and improved by reinforcement learning: all of the
// method, forward and backward by hand. test_osp.c proves it, osp_cuda.cu runs it on a GPU. Not here: the
// real model's text encoder and VAE (weights_export.py runs them), downloads, and speed at any price.
//
//   caption ─ words or UMT5 ─► text [text_len, text_dim] ─► Linear, GELU, Linear ─► context [text_len, dim] ┐
//   timestep t = 1000σ ─► sin, cos ─► Linear, SiLU, Linear ─► e [dim] ─► SiLU, Linear ─► e0 [6, dim] ┐      │
//                                                                                                    ▼      ▼
//   latent [C, T, 2H, 2W] ─► 2x2 patches ─► x [N, dim] ─► block ─► block ─► block ─► .. ─► head ─► v, like it
//                                                         full     token    group
//   block:  x += gate1 · SelfAttention(LN(x)(1 + scale1) + shift1)      full, token-wise or group-wise
//           x += CrossAttention(LN(x), context)
//           x += gate2 · FFN(LN(x)(1 + scale2) + shift2)                shift, scale, gate = modulation + e0
//   head:   v = Linear(LN(x)(1 + scale) + shift)                        shift, scale = head.modulation + e
//
// Why sparse: at 768P a video has N = 21·48·80 = 80,640 tokens. With dim 5120 (the 14B model), attention
// costs 4·N²·dim = 133 TFLOP a block, all other products 49: 73 % is attention. Attention within 4
// subsequences of N/4 tokens costs a quarter, 33: a sparse block takes 33 + 49 = 82 TFLOP, 2.2 times less.
// The model keeps 8 of its 40 blocks full: 40·182 / (8·182 + 32·82) = 1.78 times less in all. That is the
// most that sparsity can gain in time.
//
// Letters: B samples; C channels; T x H x W the token grid (T frames, H x W patches), N = T·H·W; n tokens of
// a sample that a rank holds; D = dim; P sparse ratio (P² subsequences); R ranks; L blocks, F full ones; σ
// noise level from 1 (noise) to 0 (data); v velocity from data to noise; S sampling steps; G videos of a
// group. "spec §4" is a section of golden/spec.md, which states the method as formulas.
//
// Part I is the method, an evening's reading, in this order:
//     HiF8 · Skiparse-2D and the exchange · the operations, declared · the model as data · ranks ·
//     the DiT · flow matching · Mix-GRPO
// In a hurry: block_forward and block_backward (the DiT), skiparse_order, sde_step. Skip Part II until you
// need it:
//     the operations on a CPU · building a run · the small world and its score · ranks' plumbing · tools ·
//     files and checkpoints · pictures · commands
//
// Build: cc -O3 -march=native -fopenmp osp.c -o osp -lm (make says what else it finds). Valid C11 and C++17.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
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
#include <sys/file.h>
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

// Part I calls these tools of Part II. A random number is a hash of (seed, stream, index): whoever asks, on
// any thread or rank, in a run resumed in the middle, draws the same.
__attribute__((noreturn, format(printf, 1, 2)))
static void die(const char *format, ...);                       // one line on stderr, exit code 2
static void *xalloc(size_t count, size_t size);                 // host memory, zeroed
static float *floats(size_t n);                                 // the same for n floats ...
static float *device_floats(size_t n);                          // ... and on the device
static double seconds(void);
static uint64_t rng_bits(uint64_t seed, uint64_t stream, uint64_t index);
static double rng_uniform(uint64_t seed, uint64_t stream, uint64_t index);          // in (0, 1)
static float rng_normal(uint64_t seed, uint64_t stream, uint64_t index);
// Training's sample k = step·batch + b draws from streams 1..; each weight tensor and adapter has a stream of
// its own.
enum { CAPTION_STREAM = 1, DROP_STREAM, SIGMA_STREAM, NOISE_STREAM, SAMPLE_STREAM, POLICY_STREAM,
       SHUFFLE_STREAM, WEIGHT_STREAM = 1000, LORA_STREAM = 5000 };
// ==========================================================================================================
// HiF8: an 8-bit float whose precision tapers (arXiv 2409.16626; spec §6)
// ==========================================================================================================
// One byte: sign S, a prefix-coded "dot" that says how many exponent bits follow, exponent, mantissa.
//
//        7   6 5 4 3 2 1 0       |E|       mantissa bits    exponent: sign s, then |E| without its leading 1
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
// Values near 1 get 3 mantissa bits, far ones fewer: a network's numbers cluster, so the bits sit where they
// are used. E4M3 has 3 in 15 binades and 2, 1, 0 in three more: what lies below them becomes zero.
#ifdef __CUDACC__
#define EVERYWHERE static inline __host__ __device__
#else
#define EVERYWHERE static inline
#endif

EVERYWHERE uint32_t float_bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
EVERYWHERE float bits_float(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

// Round to the nearest HiF8 value, ties away from zero ("TA"), on the bits of a float: keep m of the 23
// mantissa bits after adding half of the last one kept; a carry moves into the exponent by itself, which is
// just what rounding wants.
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

// The value of a code.
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

// The code of the nearest value. A HiF8 value has at most 3 mantissa bits, so the upper 12 bits of the float
// tell it.
static uint8_t hif8_encode(float x) {
    static uint8_t code_of[4096];
    if (!code_of[float_bits(INFINITY) >> 20])                          // the first time
        for (int c = 0; c < 256; c++) code_of[float_bits(hif8_decode((uint8_t)c)) >> 20] = (uint8_t)c;
    return isnan(x) ? 0x80 : code_of[float_bits(hif8_round(x)) >> 20];
}

// Q(x; s) = hif8(x·k)/k with k = s/max|x|: the tensor is scaled so that its largest magnitude meets the
// format at s. Forward s = 15 = 1.875·2^3, the top of the binades with 3 mantissa bits. Gradients: s = 224 =
// 1.75·2^7, the top of those with 2: less precision for the largest values, four more binades below for the
// many small ones. Example, max|x| = 2, s = 15: k = 7.5. 0.31·7.5 = 2.325 lies between the neighbours 2.25
// and 2.5 -> 2.25 -> 0.300; 0.001·7.5 = 1.92·2^-8, one mantissa bit -> 2^-7 -> 0.00104; 3e-8·7.5 = 1.89·2^-23
// -> 2^-22 -> 3.2e-8.
EVERYWHERE float hif8_scale(float s, float amax) { return s / (amax < 1e-8f ? 1e-8f : amax); }
// ==========================================================================================================
// Skiparse-2D: which tokens attend together, and how they move between ranks (spec §4, §5)
// ==========================================================================================================
// Sparse ratio P cuts the grid into P² subsequences by (h, w); time is never cut. With P = 2 on a 4 x 8
// frame, the subsequence of each token:
//
//    token-wise (every P-th token)        group-wise (every P-th group of P x P tokens)
//       0 1 0 1 0 1 0 1                      0 0 1 1 0 0 1 1
//       2 3 2 3 2 3 2 3                      0 0 1 1 0 0 1 1
//       0 1 0 1 0 1 0 1                      2 2 3 3 2 2 3 3
//       2 3 2 3 2 3 2 3                      2 2 3 3 2 2 3 3
//
// The token at (h, w) = (5, 2), which lies as (1, 2) does: token-wise (5 mod 2)·2 + 2 mod 2 = 2; group-wise
// (⌊5/2⌋ mod 2)·2 + ⌊2/2⌋ mod 2 = 1. Token-wise alone leaves each token blind to its neighbours, group-wise
// alone to the grid between the groups. Two blocks in turn, token-wise and group-wise, let every token hear
// every other, at 1/P² of the attention's cost each. (P = 2, axis of 3: row 2 hears row 1 one block later.)
enum { FULL, TOKEN_WISE, GROUP_WISE, PATTERNS };
static const char PATTERN_LETTER[] = "Ftg";

// The dual-end hybrid (spec §3): full attention in the first and last F/2 of L blocks; between them
// token-wise at even indices and group-wise at odd ones.
static int block_pattern(int i, int L, int F) {
    if (i < F / 2 || i >= L - (F + 1) / 2) return FULL;  // F is odd only where it is L
    return i % 2 == 0 ? TOKEN_WISE : GROUP_WISE;
}

// Which of the P parts of its axis a row h (or a column w) belongs to.
static int axis_part(int pattern, int h, int P) {
    return pattern == FULL ? 0 : pattern == TOKEN_WISE ? h % P : h / P % P;
}
static int subsequence(int pattern, int h, int w, int P) {
    return axis_part(pattern, h, P) * P + axis_part(pattern, w, P);
}

// A pattern on a grid, and the positions of its order that each of R ranks holds: whole subsequences where
// the pattern is sparse (SSP), an even cut of the plain sequence where it is full.
typedef struct {
    int count, *start;                  // subsequence s has positions [start[s], start[s + 1]); count of them
    int *first;                         // rank r holds positions [first[r], first[r + 1])
    int *order;                         // [N]: the original token at each position
} Pattern;

// The lengths of the subsequences: rows times columns of each part. Grids that P² does not divide only make
// them differ: no padded token exists anywhere in this program.
static void skiparse_lengths(Pattern *p, int pattern, int T, int H, int W, int P, int R) {
    int N = T * H * W, parts = pattern == FULL ? 1 : P;
    int *rows = (int *)xalloc(2 * parts, sizeof(int)), *columns = rows + parts;
    p->count = parts * parts;
    p->start = (int *)xalloc(p->count + 1, sizeof(int));
    p->first = (int *)xalloc(R + 1, sizeof(int));
    for (int h = 0; h < H; h++) rows[axis_part(pattern, h, P)]++;
    for (int w = 0; w < W; w++) columns[axis_part(pattern, w, P)]++;
    for (int s = 0; s < p->count; s++)
        p->start[s + 1] = p->start[s] + T * rows[s / parts] * columns[s % parts];
    for (int r = 0; r <= R; r++)
        p->first[r] = pattern == FULL ? (int)((size_t)N * r / R) : p->start[p->count * r / R];
    free(rows);
}

// The order itself. Inside a subsequence tokens stay in (t, h, w) order, as the paper's reshapes leave them.
static void skiparse_order(Pattern *p, int pattern, int T, int H, int W, int P) {
    int *next = (int *)xalloc(p->count, sizeof(int)), token = 0;
    p->order = (int *)xalloc((size_t)T * H * W, sizeof(int));
    memcpy(next, p->start, p->count * sizeof(int));
    for (int t = 0; t < T; t++)
        for (int h = 0; h < H; h++)
            for (int w = 0; w < W; w++) p->order[next[subsequence(pattern, h, w, P)]++] = token++;
    free(next);
}

// ---- one exchange for all that moves ---------------------------------------------------------------------
// A layout says which tokens and heads of B samples each rank holds, and in which order:
//
//      FULL, TOKEN_WISE, GROUP_WISE   the rank's positions of that pattern's order, all heads
//      HEADS + pattern                all tokens in the pattern's order, 1/R of the heads (Ulysses)
//      WHOLE                          all tokens in plain order, all heads, on every rank
//
// The entry into a sparse block, SSP's step from one sparse block to the next, Ulysses' four steps of a full
// block and the gathering of the output are each a move from one layout to another. With one rank a move is
// only the rearrangement, a gather by `pack`. The backward pass needs nothing more: a permutation's transpose
// is its inverse, which is the move with `have` and `want` swapped.
enum { HEADS = PATTERNS, WHOLE = 2 * PATTERNS, LAYOUTS };

static bool deals_heads(int layout) { return layout >= HEADS && layout < WHOLE; }

// What moves is cut into units: a token's row, or one of the R shares of it where heads are dealt out.
// unit[..] = the units that rank r holds, in its order: (b·N + token)·shares + share; returns how many.
static size_t layout_units(size_t *unit, const Pattern *pattern, int layout, int r, int B, int shares) {
    const Pattern *p = &pattern[layout % PATTERNS];
    bool all = layout >= HEADS;
    int N = p->start[p->count], begin = all ? 0 : p->first[r], end = all ? N : p->first[r + 1];
    int low = deals_heads(layout) ? r : 0, high = deals_heads(layout) ? r + 1 : shares;
    size_t count = 0;
    for (int b = 0; b < B; b++)
        for (int j = begin; j < end; j++)
            for (int s = low; s < high; s++)
                unit[count++] = ((size_t)b * N + p->order[j]) * shares + s;
    return count;
}

// One rank's part of a move: it packs `sent` units by pack, sends send[s] of them to each rank s, receives
// receive[s], and puts the `received` ones in order by unpack. The maps are the device's, send and receive
// the host's.
typedef struct {
    int *pack, *unpack, *send, *receive, shares;
    size_t sent, received;
} Exchange;

static void *to_device(const void *host, size_t count);       // `count` ints or floats

static void exchange_init(Exchange *e, const Pattern *pattern, int have, int want, int B, int rank, int R) {
    int shares = deals_heads(have) || deals_heads(want) ? R : 1;
    size_t n, all = (size_t)B * pattern->start[pattern->count] * shares;
    size_t *unit = (size_t *)xalloc(all, sizeof(size_t));
    int *holder = (int *)xalloc(2 * all, sizeof(int)), *position = holder + all;
    int *arrival = (int *)xalloc(R, sizeof(int));
    e->send = (int *)xalloc(2 * R, sizeof(int)), e->receive = e->send + R, e->shares = shares;
    for (int s = 0; s < R; s++) {  // who holds each unit now, and where
        n = layout_units(unit, pattern, have, s, B, shares);
        for (size_t i = 0; i < n; i++) holder[unit[i]] = s, position[unit[i]] = (int)i;
    }
    n = layout_units(unit, pattern, have, rank, B, shares);
    int *pack = (int *)xalloc(want == WHOLE ? n * R : n, sizeof(int));
    for (int s = 0; s < R; s++) {  // what rank s wants of this one, in its order
        n = layout_units(unit, pattern, want, s, B, shares);
        for (size_t i = 0; i < n; i++)
            if (holder[unit[i]] == rank) pack[e->sent++] = position[unit[i]], e->send[s]++;
    }
    e->received = n = layout_units(unit, pattern, want, rank, B, shares);
    int *unpack = (int *)xalloc(n, sizeof(int));
    for (size_t i = 0; i < n; i++) e->receive[holder[unit[i]]]++;
    for (int s = 1; s < R; s++) arrival[s] = arrival[s - 1] + e->receive[s - 1];
    for (size_t i = 0; i < n; i++) unpack[i] = arrival[holder[unit[i]]]++;
    e->pack = (int *)to_device(pack, e->sent), e->unpack = (int *)to_device(unpack, n);
    free(unit), free(holder), free(arrival), free(pack), free(unpack);
}
// ==========================================================================================================
// The operations: what a backend provides
// ==========================================================================================================
// The model, the sampler and the trainers below call these (and all_to_all) and nothing else: they never look
// inside a tensor. The CPU's bodies begin Part II; osp_cuda.cu defines OSP_CUDA, includes this file and has
// its own.
//
// Two kinds of numbers: `float` for the residual stream, modulations, statistics, master weights and
// gradients of weights; `act` for what enters a matrix product or attention (float on the CPU; float or
// bfloat16 on a GPU). Rows: a batch of B samples with n tokens each is B·n rows; row r belongs to sample r /
// n. Backward: gradients of activations are written, gradients of weights and of the residual stream are
// added to, unless it says otherwise. Every sum has a fixed order, whatever the number of threads.
#ifdef OSP_CUDA
typedef struct act act;  // opaque: float or __nv_bfloat16, chosen by --device-dtype
#else
typedef float act;
#endif

// A vector of dim numbers for each sample: sample b reads p + b·stride. stride 0: all samples share it.
typedef struct { float *p; size_t stride; } PerSample;

typedef struct { int B; size_t n; int dim; } Rows;  // B samples of n tokens: B·n rows of dim numbers
typedef struct { int B, C, T, H, W; } Grid;         // latents x[B, C, T, 2H, 2W] on a grid T x H x W

// What follows a norm: h = x̂·(one + scale) + shift. one = 1: modulated by the timestep, each sample on its
// own; one = 0: LayerNorm's own weight `scale` and bias `shift` (norm3). For gradients: where those of shift
// and scale go.
typedef struct { PerSample shift, scale; float one; } Affine;

// What a product or attention reads. code NULL: x[rows, columns], under HiF8 rounded in place. Else *unit
// times the codes, 8-bit numbers that the backend multiplies; x is only what they were made from. (q and k
// have codes only outside training: attention's backward reads x.)
typedef struct {
    act *x;
    uint8_t *code;                      // [rows, columns]
    uint8_t *turned;                    // [columns, rows up to a multiple of 16], for backward; or NULL
    float *unit;                        // on the device, at a multiple of 16 bytes
    bool exact;                         // x and all that the product reads and writes is float, not act
} Factor;
static Factor plain(const act *x) { Factor f = {(act *)x, NULL, NULL, NULL, false}; return f; }
static Factor exact(const float *x) { Factor f = {(act *)x, NULL, NULL, NULL, true}; return f; }

// Ragged sequences that attend within themselves: sequence s has query rows [q[s], q[s+1]) and key rows
// [k[s], k[s+1]).
typedef struct {
    int count;
    int *q, *k;                         // host, [count + 1], rising from 0; a sequence may be empty
    int *q_device, *k_device;           // the same where the backend computes (on the CPU: the same pointers)
} Sequences;

// ---- memory ----------------------------------------------------------------------------------------------
static void   device_start(const char *dtype, int rank);  // first; f32, bf16, or NULL: the backend's choice
static void   wait_device(void);                          // until all that was asked for is done
static void  *device_alloc(size_t bytes);      // zeroed; dies with the number of bytes where there is no room
static void   device_free(void *p);
static double device_memory(void);                      // bytes that all ranks of this machine share
static size_t act_size(void);  // bytes of one act
static void   zero(void *p, size_t bytes);
static void   copy(void *dst, const void *src, size_t bytes);      // device to device
static void   upload(void *dst, const void *src, size_t bytes);    // host to device
static void   download(void *dst, const void *src, size_t bytes);  // device to host, waits
static void   to_act(act *y, const float *x, size_t n);            // y = x, rounded to act
static void   to_float(float *y, const act *x, size_t n);          // y = x

// ---- matrix products: y[rows, out] = x[rows, in] · w[out, in]^T + b[out] ---------------------------------
// b may be NULL.
static void linear_forward(act *y, Factor x, Factor w, const act *b, size_t rows, int out, int in);
// dx[rows, in] (=, or += where accumulate) dy[rows, out] · w;  dw[out, in] += dy^T · x;  db[out] += Σ_rows
// dy. Each of dx, dw, db may be NULL. dx, dy, x do not overlap.
static void linear_backward(act *dx, float *dw, float *db, Factor dy, Factor x, Factor w, size_t rows,
                            int out, int in, bool accumulate);
// y = gelu(pre), pre = x·w^T + b (NULL: not kept); gelu(u) = u/2·(1 + tanh(√(2/π)·(u + 0.044715·u³))).
static void linear_gelu_forward(act *y, act *pre, Factor x, Factor w, const act *b, size_t rows, int out,
                                int in);
static void gelu_backward(act *dx, const act *dy, const act *pre, size_t n);  // dx may be dy
static void silu_forward(float *y, const float *x, size_t n);                   // y = x·sigmoid(x)
static void silu_backward(float *dx, const float *dy, const float *x, size_t n);              // dx may be dy

// ---- norms, modulation, residual -------------------------------------------------------------------------
// out[B, J, dim] = mod[J, dim] + e[B, Je, dim], Je = J or 1: the learned table plus what the timestep says.
static void modulation_forward(float *out, const float *mod, const float *e, int B, int J, int Je, int dim);
static void modulation_backward(float *dmod, float *de, const float *dout, int B, int J, int Je, int dim);
// x_out = x + gate·y (gate.p NULL: gate 1), the end of one branch, and the norm that begins the next: h =
// (x_out − mean)·rstd·(one + scale) + shift, rstd = 1/√(var + eps). stat[rows, 2] keeps mean, rstd; amax[1]
// (NULL: not wanted) becomes max |h|. x_out may be x. y NULL: no branch, x itself is normalised, x_out stays.
static void residual_norm_forward(float *x_out, act *h, float *stat, float *amax, const float *x,
                                  const act *y, PerSample gate, Affine a, Rows r, float eps);
// From dh: dx += through the norm; d.shift += Σ dh, d.scale += Σ dh·x̂ over the rows of a sample (over all,
// stride 0).
static void norm_backward(float *dx, Affine d, const act *dh, const float *x, const float *stat, Affine a,
                          Rows r);
// The residual's branch, from dx: dy = gate·dx; dgate += Σ_rows dx·y of each sample (gate.p, dgate.p NULL:
// gate 1).
static void gate_backward(act *dy, PerSample dgate, const float *dx, const act *y, PerSample gate, Rows r);
// x_out[j] = x[i] + gate·y[i], i = map[j] (map NULL: i = j; y NULL: no branch); j = 0..count-1, i in B·n
// rows. The end of a block: its residual and the Skiparse rearrangement (or the packing for an exchange) in
// one pass.
static void residual_gather_forward(float *x_out, const float *x, const act *y, PerSample gate,
                                    const int *map, size_t count, Rows r);
// dst[j] = src[map[j]], rows of row_bytes each.
static void gather_rows(void *dst, const void *src, const int *map, size_t count, size_t row_bytes);
// y = x·rstd·w over the whole dim, rstd[rows] = 1/√(mean x² + eps), amax as above. Then, where rope is given,
// pair (2p, 2p+1) of every head turns by rope[token, p] = (cos, sin); rope is [n, head_dim/2, 2], or NULL.
static void rmsnorm_rope_forward(act *y, float *rstd, float *amax, const act *x, const float *w,
                                 const float *rope, Rows r, int heads, float eps);
// dx written (may be dy), dw +=.
static void rmsnorm_rope_backward(act *dx, float *dw, const act *dy, const act *x, const float *rstd,
                                  const float *w, const float *rope, Rows r, int heads);

// ---- attention: o = softmax(q·k^T/√head_dim)·v inside each sequence, all heads ---------------------------
// q, o [q rows, heads·head_dim]; k, v [k rows, heads·head_dim]; lse[q rows, heads] = log Σ exp(scores), for
// backward, and amax[1] = max |o| (NULL: not wanted). Blockwise softmax: no N x N matrix is ever stored. A
// query whose sequence has no keys gets 0.
static void attention_forward(act *o, float *lse, float *amax, Factor q, Factor k, const act *v,
                              const Sequences *s, int heads, int head_dim);
static void attention_backward(act *dq, act *dk, act *dv, const act *dout, const act *q, const act *k,
                               const act *v, const act *o, const float *lse, const Sequences *s, int heads,
                               int head_dim);

// ---- HiF8 ------------------------------------------------------------------------------------------------
// m[1] = max |x| (device; NaN counts as 0); y = Q(x; s) with max|x| = *m, in y's codes where it has room for
// them, else in y.x, which may be x.
static void absmax(float *m, const act *x, size_t n);
static void hif8_tensor(Factor y, const act *x, size_t rows, int columns, float s, const float *m);
// Does this backend multiply codes: in linear layers of these sizes; q·k^T in heads of head_dim?
static bool codes_multiply(int dim, int ffn_dim);
static bool codes_attend(int head_dim);

// ---- pixels, words, time ---------------------------------------------------------------------------------
// Rows of 2x2 patches. rows[B, n, 4·C] of tokens first..first+n-1 <- x[B, C, T, 2H, 2W]. And back, all
// tokens. channels_first: column (c·2 + ph)·2 + pw (patch_embedding); else column (ph·2 + pw)·C + c (head).
static void latent_to_rows(act *rows, const float *x, Grid g, size_t first, size_t n, bool channels_first);
static void rows_to_latent(float *x, const act *rows, Grid g, bool channels_first);
// Where column `column` of token (t, h, w) lies in x[C, T, 2H, 2W] of its sample.
EVERYWHERE size_t pixel(size_t token, size_t column, Grid g, bool channels_first) {
    size_t W = (size_t)g.W, H = (size_t)g.H, C = (size_t)g.C;
    size_t w = token % W, h = token / W % H, t = token / W / H;
    size_t c = channels_first ? column / 4 : column % C, patch = channels_first ? column % 4 : column / C;
    return ((c * (size_t)g.T + t) * 2 * H + 2 * h + patch / 2) * 2 * W + 2 * w + patch % 2;
}
// y[r] = table[ids[r]] + pos[r mod L], ids[r] < 0: a zero row (padding). r < rows. ids on the device.
static void embed_forward(act *y, const float *table, const float *pos, const int *ids, size_t rows, int L,
                          int dim);
static void embed_backward(float *dtable, const act *dy, const int *ids, size_t rows, int vocab, int dim);

// ---- elementwise on float, reductions to the host, optimizer ---------------------------------------------
// y = a·x + b·z (z NULL: a·x);  Σ (x − z)² (z NULL: Σ x²);  mean (out − target)², dout = 2(out − target)/n.
static void lincomb(float *y, float a, const float *x, float b, const float *z, size_t n);
static double sum_squares(const float *x, const float *z, size_t n);
static double mse(float *dout, const float *out, const float *target, size_t n);
// Decoupled AdamW, step t = 1, 2, ..: g is multiplied by gscale, then m = β1·m + (1−β1)·g, v = β2·v +
// (1−β2)·g², w −= lr·(weight_decay·w + m̂/(√v̂ + eps)), m̂ = m/(1−β1^t), v̂ alike; ema (may be NULL) =
// decay·ema + (1−decay)·w.
typedef struct {
    float gscale, lr, eps, weight_decay;
    double beta1, beta2, ema_decay;
    int t;
} AdamW;
static void adamw(float *w, float *m, float *v, float *ema, const float *g, size_t n, AdamW o);
// ==========================================================================================================
// The model as data: configuration and parameters (spec §2)
// ==========================================================================================================
typedef struct {
    int dim, ffn_dim, num_heads, num_layers, num_full_blocks, sparse_ratio, in_dim, out_dim, text_dim,
        text_len, freq_dim;
    int vocab;                      // > 0: captions are words of a learned table instead of UMT5's embeddings
    int quant, quant_attn;          // HiF8 on linear layers; on q, k, v
    int T, H_l, W_l;                // the latent's size: frames, height, width
    int sparse;                     // TOKEN_WISE or GROUP_WISE: sparse blocks of one kind alone; 0: in turn
    double eps;
} Config;

// One tensor of weights. w is the master copy; `compute` is what products read: w as act, with a LoRA merged,
// rounded to HiF8, whatever the run asks for (weights_prepare); w itself where nothing is asked. For codes
// compute.x is only what they were made from.
typedef struct Param {
    char name[64];
    int rank;
    size_t shape[5], count, offset;          // offset: floats into the arenas
    float *w, *dw;                           // w NULL: only `compute` is kept (sampling with copies)
    Factor compute;
    bool product;                            // a matrix that products read, not a vector or a table
    bool exact;                              // the timestep's: float in all products
    bool block_matrix;               // one of those that HiF8 covers
    bool codes;                      // w was read from HiF8 codes: not rounded again, until training moves it
    struct Param *lora;              // its adapter: A, and B after it; NULL: none
} Param;

typedef struct { Param *w, *b; } Linear;  // [out, in], [out]
typedef struct { Linear q, k, v, o; Param *norm_q, *norm_k; } Attention;
typedef struct { Param *modulation; Attention self, cross; Linear norm3, ffn0, ffn2; } Block;

typedef struct Lora Lora;  // in Mix-GRPO
typedef struct {
    Config c;
    Linear patch, text0, text2, time0, time2, time_proj, head;
    Param *head_modulation, *words;
    Block *block;
    Param *param;  // all tensors in file order ...
    int params;
    float *w, *dw;  // ... and, in training, their two arenas of `count` floats
    act *copy;      // in training: w as act, where products read a copy
    size_t count;
    float *amax;                             // room for one maximum
    Lora *lora;                              // adapters on q, k, v, o; NULL: none
} Model;

// THE table of parameters: name, place in the structs above, shape. Negative sizes are the config's.
enum { DIM = -1, FFN = -2, SIX = -3, IN = -4, OUT = -5, TEXT = -6, FREQ = -7, VOCABULARY = -8 };
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
    LINEAR("text_embedding.0", Model, text0, DIM, TEXT),
    LINEAR("text_embedding.2", Model, text2, DIM, DIM),
    LINEAR("time_embedding.0", Model, time0, DIM, FREQ),
    LINEAR("time_embedding.2", Model, time2, DIM, DIM),
    LINEAR("time_projection.1", Model, time_proj, SIX, DIM),
    {"head.modulation", offsetof(Model, head_modulation), {1, 2, DIM}},
    LINEAR("head.head", Model, head, OUT, DIM),
    {"text_encoder.weight", offsetof(Model, words), {VOCABULARY, TEXT}},
};
static const ParamRow BLOCK_TABLE[] = {
    {"modulation", offsetof(Block, modulation), {1, 6, DIM}},
    ATTENTION("self_attn", self), LINEAR("norm3", Block, norm3, DIM, 0), ATTENTION("cross_attn", cross),
    LINEAR("ffn.0", Block, ffn0, FFN, DIM), LINEAR("ffn.2", Block, ffn2, DIM, FFN),
};
enum { ROW = sizeof(ParamRow), MODEL_ROWS = sizeof MODEL_TABLE / ROW, BLOCK_ROWS = sizeof BLOCK_TABLE / ROW };

static size_t config_size(const Config *c, int size) {
    const int named[] = {0, c->dim, c->ffn_dim, 6 * c->dim, c->in_dim, 4 * c->out_dim, c->text_dim,
                         c->freq_dim, c->vocab};
    return (size_t)(size < 0 ? named[-size] : size);
}

// Appends a row of a table to m->param and points its struct field at it. block: index, or −1 outside.
static void param_add(Model *m, const ParamRow *row, void *owner, int block) {
    Param *p = &m->param[m->params++];
    if (block < 0) snprintf(p->name, sizeof(p->name), "%s", row->name);
    else snprintf(p->name, sizeof(p->name), "blocks.%d.%s", block, row->name);
    p->count = 1;
    for (int i = 0; i < 5 && row->shape[i]; i++)
        p->count *= p->shape[p->rank++] = config_size(&m->c, row->shape[i]);
    p->product = p->rank > 1 && row->shape[0] != 1 && row->shape[0] != VOCABULARY; // modulations begin with 1
    p->exact = !strncmp(row->name, "time_", 5);
    p->block_matrix = block >= 0 && p->product;
    *(Param **)(void *)((char *)owner + row->field) = p;
    p->offset = m->count;
    m->count += (p->count + 15) & ~(size_t)15;  // every tensor starts at a multiple of 64 bytes
}

// The list of parameters; no memory for their numbers yet.
static Model *model_layout(const Config *c) {
    Model *m = (Model *)xalloc(1, sizeof(Model));
    m->c = *c;
    m->block = (Block *)xalloc(c->num_layers, sizeof(Block));
    m->param = (Param *)xalloc(MODEL_ROWS + (size_t)c->num_layers * BLOCK_ROWS, sizeof(Param));
    for (int i = 0; i < MODEL_ROWS; i++)
        if (MODEL_TABLE[i].field != offsetof(Model, words) || c->vocab) param_add(m, &MODEL_TABLE[i], m, -1);
    for (int l = 0; l < c->num_layers; l++)
        for (int i = 0; i < BLOCK_ROWS; i++) param_add(m, &BLOCK_TABLE[i], &m->block[l], l);
    return m;
}

// Do the products of this model's blocks read codes?
static bool coded(const Model *m) { return m->c.quant && codes_multiply(m->c.dim, m->c.ffn_dim); }

static void lora_merge(Model *m, Param *p);  // in Mix-GRPO

// What is left to do when p->compute.x holds the master weight as act: LoRA merged, rounded to HiF8.
static void param_finish(Model *m, Param *p) {
    if (m->lora) lora_merge(m, p);
    if (!m->c.quant || !p->block_matrix || (p->codes && !m->lora && !p->compute.code)) return;
    absmax(m->amax, p->compute.x, p->count);
    hif8_tensor(p->compute, p->compute.x, p->shape[0], (int)p->shape[1], 15, m->amax);
}

// In training, after every change of the weights.
static void weights_prepare(Model *m) {
    if (m->copy) to_act(m->copy, m->w, m->count);
    for (int i = 0; i < m->params && m->copy; i++) param_finish(m, &m->param[i]);
}
// ==========================================================================================================
// Ranks: one sample on many processes (spec §5)
// ==========================================================================================================
// Under SSP a rank holds whole subsequences and does the whole block on them: attention, ffn and
// cross-attention need no other rank. Going from a token-wise to a group-wise block is ONE all_to_all, of x.
// Full blocks run under Ulysses: q, k and v trade tokens for heads, the output trades back, FOUR all_to_alls
// of a tensor as large as x. Per sparse block that is a quarter of the numbers (a half of the bytes where act
// has 16 bits: x stays float32), in one step instead of four. What else crosses: two conversions between full
// and sparse layouts a forward, the gathered output; in training the gradients of the weights and of the
// text; under HiF8 every tensor's maximum, since a tensor is rounded by one scale on all ranks. With 2·R
// ranks the conditional and the unconditional half of guidance run side by side. All ranks hold all weights
// and draw the same noise.
enum { EXCHANGE, ULYSSES, CONVERT, GRADIENTS, MAXIMA, OUTPUT, GUIDANCE, PURPOSES };

typedef struct {
    int rank, size;                           // of the R ranks that share one sample
    int half, halves;                         // 0 conditional, 1 unconditional, where halves = 2
    bool ulysses;                             // sparse blocks under Ulysses too, to compare
    size_t calls[PURPOSES], bytes[PURPOSES];  // sent to OTHER ranks
    double time[PURPOSES];
} Ranks;

// Every transfer but that of a maximum. Rank s gets the next send[s] rows of `from` (`same`: all get the same
// rows); the receive[s] rows of rank s follow those of rank s−1 in `to`. Rows are row_bytes long, pointers
// the device's.
static void all_to_all(Ranks *k, void *to, const void *from, const int *receive, const int *send, bool same,
                       size_t row_bytes, int purpose);
// x[n] = Σ over ranks, in rank order. only_first: the other ranks end with zeros instead.
static void sum_over_ranks(Ranks *k, float *x, size_t n, bool only_first);
static void max_over_ranks(Ranks *k, float *m);
// ==========================================================================================================
// The DiT, forward and backward (spec §2, §3, §5)
// ==========================================================================================================
// What one attention layer keeps for its backward pass. q, k, v and o are as attention sees them: where heads
// are dealt out over ranks, all tokens and the rank's heads; else the rank's own tokens, as everywhere below.
typedef struct {
    act *q_raw, *k_raw, *v, *o, *y;              // y: the layer's output
    Factor q, k, oq;                             // oq: what the o matrix reads: o, moved back, rounded
    float *q_rstd, *k_rstd, *lse;
} SavedAttention;

// What one block keeps. x0, x1, x2: the residual stream before self-attention, cross-attention, ffn.
typedef struct {
    int pattern, layout;                          // who attends with whom; the layout of the block's tokens
    float *x0, *x1, *x2, *stat1, *stat2, *stat3;
    float *e;                                     // [B, 6, dim]: shift, scale, gate; shift, scale, gate
    Factor h1, h2, h3, f;                         // the inputs of self-attention, cross-attention, ffn, ffn.2
    act *f_pre, *y;                               // inside ffn, before GELU; its output
    SavedAttention self, cross;
} Saved;

// A batch on its way through the model: sizes, token orders, every buffer. Built once, used for many steps.
typedef struct {
    Model *m;
    Ranks *ranks;
    int B, T, H, W;                               // samples; the token grid
    bool training, show;                          // show: draw the blocks on stderr as they run
    size_t N, n[PATTERNS];                        // tokens of a sample; this rank's, in each layout
    Pattern pattern[PATTERNS];
    Exchange move[LAYOUTS][LAYOUTS];              // from one layout to another, built when first needed
    float *rope[PATTERNS];                        // [n, head_dim/2, 2] in each layout
    Sequences self[PATTERNS], cross[PATTERNS];
    Saved *saved;                                 // [layers + 1]; the last: the head's input x0 alone, FULL
    float *sin, *t1, *t1s, *e, *es;               // the timestep's embedding, step by step (time_forward)
    float *e0, *head_e;                           // [B, 6, dim], [B, 2, dim]
    act *text, *text_pre, *text_h, *context;      // [B·text_len, ...]
    Factor context_q;                             // what cross-attention reads: context, rounded
    int *ids;                                     // [B·text_len] words, −1 padding
    float *word_pos;                              // [text_len, text_dim]
    act *patches, *tokens, *h, *y, *y_all;        // h: the head's input; y: its output; y_all: of all ranks
    float *head_stat, *out;                       // out[B, out_dim, T, 2H, 2W]
    float *dx, *dx2;                              // gradient of the residual stream; in sampling, the stream
    float *de, *de0, *de_e, *dhead_e, *dt;        // gradients of the modulations; dt[B, dim]
    act *d1, *dout, *dq, *dk, *dv, *dff, *dcontext, *dtext;
    Factor g;                                     // room for codes: of a gradient, of a block's inputs
    void *packed;                                 // what is sent to other ranks, and what arrives
} Run;

static Rows rows_of(const Run *r, int layout) { Rows v = {r->B, r->n[layout], r->m->c.dim}; return v; }
static size_t count_of(Rows r) { return (size_t)r.B * r.n; }
static size_t numbers(Rows r) { return count_of(r) * r.dim; }

// One vector of dim numbers a sample out of e[B, rows, dim]; one for all samples; none.
static PerSample of_row(float *e, int row, int rows, int D) {
    PerSample v = {e + (size_t)row * D, (size_t)rows * D};
    return v;
}
static PerSample shared(float *p) { PerSample v = {p, 0}; return v; }
static const PerSample NONE = {NULL, 0};
// A norm modulated by the timestep: shift is row `row` of e[B, rows, dim], scale the next one.
static Affine modulated(float *e, int row, int rows, int D) {
    Affine a = {of_row(e, row, rows, D), of_row(e, row + 1, rows, D), 1};
    return a;
}
static Affine affine(float *bias, float *weight) { Affine a = {shared(bias), shared(weight), 0}; return a; }

// What a block is made of, explained below.
static void quantize(Run *r, Factor y, const act *x, size_t rows, int columns, float s);
static void quantize_measured(Run *r, Factor y, const act *x, size_t rows, int columns, float s);
static void linear(act *y, Factor x, const Linear *l, size_t rows);
static void linear_back(Run *r, act *dx, act *dy, Factor x, const Linear *l, size_t rows, bool add);
static void attention_layer(Run *r, int i, bool cross);
static void attention_layer_back(Run *r, int i, bool cross);
static Exchange *move_of(Run *r, int have, int want);
static void deliver(Run *r, void *dst, int have, int want, size_t row_bytes);
static void exchange(Run *r, void *dst, const void *src, int have, int want, size_t row_bytes);

// ---- a block ---------------------------------------------------------------------------------------------
// Each branch's end, x + gate·y, and the norm that begins the next branch are one operation; so are the last
// branch's end and the rearrangement for the next block.
static void block_forward(Run *r, int i) {
    const Config *c = &r->m->c;
    const Block *w = &r->m->block[i];
    Saved *s = &r->saved[i];
    Rows rows = rows_of(r, s->layout);
    size_t count = count_of(rows);
    int D = c->dim, next = r->saved[i + 1].layout;
    float *amax = c->quant ? r->m->amax : NULL;
    modulation_forward(s->e, w->modulation->w, r->e0, r->B, 6, 6, D);

    // x += gate1 · SelfAttention(LN(x)·(1 + scale1) + shift1)
    residual_norm_forward(NULL, s->h1.x, s->stat1, amax, s->x0, NULL, NONE, modulated(s->e, 0, 6, D), rows,
                          c->eps);
    if (c->quant) quantize_measured(r, s->h1, s->h1.x, count, D, 15);
    attention_layer(r, i, false);

    // x += CrossAttention(LN(x)·weight + bias, context)
    residual_norm_forward(s->x1, s->h2.x, s->stat2, amax, s->x0, s->self.y, of_row(s->e, 2, 6, D),
                          affine(w->norm3.b->w, w->norm3.w->w), rows, c->eps);
    if (c->quant) quantize_measured(r, s->h2, s->h2.x, count, D, 15);
    attention_layer(r, i, true);

    // x += gate2 · ffn(LN(x)·(1 + scale2) + shift2)
    residual_norm_forward(s->x2, s->h3.x, s->stat3, amax, s->x1, s->cross.y, NONE, modulated(s->e, 3, 6, D),
                          rows, c->eps);
    if (c->quant) quantize_measured(r, s->h3, s->h3.x, count, D, 15);
    linear_gelu_forward(s->f.x, s->f_pre, s->h3, w->ffn0.w->compute, w->ffn0.b->compute.x, count, c->ffn_dim,
                        D);
    if (c->quant) quantize(r, s->f, s->f.x, count, c->ffn_dim, 15);
    linear(s->y, s->f, &w->ffn2, count);

    float *x_out = r->saved[i + 1].x0;
    bool moves = s->layout != next, sends = moves && r->ranks->size > 1;
    residual_gather_forward(sends ? (float *)r->packed : x_out, s->x2, s->y, of_row(s->e, 5, 6, D),
                            moves ? move_of(r, s->layout, next)->pack : NULL, count, rows);
    if (sends) deliver(r, x_out, s->layout, next, D * sizeof(float));
}

// The gradient of the residual stream, r->dx, from one layout to another.
static void exchange_gradient(Run *r, int have, int want) {
    float *moved = r->dx2;
    if (have == want) return;
    exchange(r, moved, r->dx, have, want, r->m->c.dim * sizeof(float));
    r->dx2 = r->dx, r->dx = moved;
}

// The same backwards, from r->dx, the gradient of the block's output, to that of its input. x flows on beside
// each branch, so dx stays and each branch adds to it.
static void block_backward(Run *r, int i) {
    const Config *c = &r->m->c;
    const Block *w = &r->m->block[i];
    Saved *s = &r->saved[i];
    Rows rows = rows_of(r, s->layout);
    size_t count = count_of(rows);
    int D = c->dim;
    float *de = r->de;
    zero(de, (size_t)r->B * 6 * D * sizeof(float));
    exchange_gradient(r, r->saved[i + 1].layout, s->layout);

    gate_backward(r->d1, of_row(de, 5, 6, D), r->dx, s->y, of_row(s->e, 5, 6, D), rows);
    linear_back(r, r->dff, r->d1, s->f, &w->ffn2, count, false);
    gelu_backward(r->dff, r->dff, s->f_pre, count * c->ffn_dim);
    linear_back(r, r->d1, r->dff, s->h3, &w->ffn0, count, false);
    norm_backward(r->dx, modulated(de, 3, 6, D), r->d1, s->x2, s->stat3, modulated(s->e, 3, 6, D), rows);

    gate_backward(r->d1, NONE, r->dx, s->cross.y, NONE, rows);
    attention_layer_back(r, i, true);
    norm_backward(r->dx, affine(w->norm3.b->dw, w->norm3.w->dw), r->d1, s->x1, s->stat2,
                  affine(w->norm3.b->w, w->norm3.w->w), rows);

    gate_backward(r->d1, of_row(de, 2, 6, D), r->dx, s->self.y, of_row(s->e, 2, 6, D), rows);
    attention_layer_back(r, i, false);
    norm_backward(r->dx, modulated(de, 0, 6, D), r->d1, s->x0, s->stat1, modulated(s->e, 0, 6, D), rows);
    modulation_backward(w->modulation->dw, r->de0, de, r->B, 6, 6, D);
}

// ---- linear layers in 8 bits -----------------------------------------------------------------------------
// Joint training (spec §6) rounds all operands of the blocks' linear layers and keeps the weights exact:
//
//     forward    y  = Q(x; 15) · Q(W; 15)ᵀ + b
//     backward   g  = Q(dy; 224),   dx = g · Q(W; 15),   dW = gᵀ · Q(x; 15),   db = Σ g
//
// Straight through: Q is a staircase whose derivative is 0 almost everywhere, so its derivative is taken as
// 1. dx is then also the gradient of the unrounded x, and dW moves the unrounded W: steps smaller than one of
// Q's add up there.

// y = Q(x; s), x[rows, columns], which may be y.x. A tensor spread over ranks has one maximum; here the op
// that wrote x has left this rank's in m->amax.
static void quantize_measured(Run *r, Factor y, const act *x, size_t rows, int columns, float s) {
    max_over_ranks(r->ranks, r->m->amax);
    hif8_tensor(y, x, rows, columns, s, r->m->amax);
}

static void quantize(Run *r, Factor y, const act *x, size_t rows, int columns, float s) {
    absmax(r->m->amax, x, rows * columns);
    quantize_measured(r, y, x, rows, columns, s);
}

// y[rows, out] = x[rows, in]·Wᵀ + b, where x and W are rounded already.
static void linear(act *y, Factor x, const Linear *l, size_t rows) {
    size_t out = l->w->shape[0];
    linear_forward(y, x, l->w->compute, l->b->compute.x, rows, (int)out, (int)(l->w->count / out));
}

// dx[rows, in], dW and db from dy[rows, out], which a quantized layer may overwrite with Q(dy; 224).
static void linear_back(Run *r, act *dx, act *dy, Factor x, const Linear *l, size_t rows, bool add) {
    int out = (int)l->w->shape[0], in = (int)(l->w->count / l->w->shape[0]);
    bool quant = r->m->c.quant && l->w->block_matrix;
    Factor g = quant ? r->g : x;  // of x only `exact`
    g.x = dy;
    if (quant) quantize(r, g, dy, rows, out, 224);
    linear_backward(dx, l->w->dw, l->b->dw, g, x, l->w->compute, rows, out, in, add);
}

// ---- moving rows from one layout to another --------------------------------------------------------------
static Exchange *move_of(Run *r, int have, int want) {
    Exchange *e = &r->move[have][want];
    if (!e->send) exchange_init(e, r->pattern, have, want, r->B, r->ranks->rank, r->ranks->size);
    return e;
}

static int purpose_of(int have, int want) {
    if (want == WHOLE) return OUTPUT;
    if (deals_heads(have) || deals_heads(want)) return ULYSSES;
    return have == FULL || want == FULL ? CONVERT : EXCHANGE;
}

// What lies in r->packed goes to the other ranks; what arrives is put in order.
static void deliver(Run *r, void *dst, int have, int want, size_t row_bytes) {
    const Exchange *e = move_of(r, have, want);
    size_t unit = row_bytes / e->shares;
    char *arrived = (char *)r->packed + e->sent * unit;
    all_to_all(r->ranks, arrived, r->packed, e->receive, e->send, false, unit, purpose_of(have, want));
    gather_rows(dst, arrived, e->unpack, e->received, unit);
}

// dst <- src, rows of row_bytes for all heads; nothing where the layouts are one. Only with several ranks may
// dst be src.
static void exchange(Run *r, void *dst, const void *src, int have, int want, size_t row_bytes) {
    if (have == want) return;
    const Exchange *e = move_of(r, have, want);
    void *packed = r->ranks->size == 1 ? dst : r->packed;
    gather_rows(packed, src, e->pack, e->sent, row_bytes / e->shares);
    if (packed != dst) deliver(r, dst, have, want, row_bytes);
}

// ---- attention layers ------------------------------------------------------------------------------------
// Block i's self-attention (q, k and v from h1, with rotary positions, inside the pattern's subsequences) or
// its cross-attention (q from h2, k and v from the text, one sequence a sample).
typedef struct {
    const Attention *w;
    SavedAttention *s;
    Factor h, context;       // h[q rows, dim], context[kv rows, dim]
    Rows q, kv, q_in, kv_in; // rows of q and of k, v: in the block's layout, and as attention sees them
    const float *rope;  // NULL: none
    const Sequences *sequences;
    int have, want, heads;  // layouts outside and inside attention; heads inside
} AttentionLayer;

// Is the block's self-attention under Ulysses?
static bool spread(const Run *r, const Saved *s) { return r->ranks->size > 1 && s->layout == FULL; }

static AttentionLayer layer_of(const Run *r, int i, bool cross) {
    const Block *w = &r->m->block[i];
    Saved *s = &r->saved[i];
    int at = s->layout, heads = r->m->c.num_heads;
    Rows q = rows_of(r, at), kv = {r->B, (size_t)r->m->c.text_len, q.dim};
    AttentionLayer self = {&w->self, &s->self, s->h1, s->h1, q, q, q, q, r->rope[at], &r->self[s->pattern],
                           at, at, heads};
    AttentionLayer text = {&w->cross, &s->cross, s->h2, r->context_q, q, kv, q, kv, NULL, &r->cross[at],
                           at, at, heads};
    if (cross) return text;
    if (spread(r, s)) {
        Rows all = {r->B, r->N, q.dim / r->ranks->size};
        self.want = HEADS + s->pattern, self.heads = heads / r->ranks->size, self.q_in = self.kv_in = all;
    }
    return self;
}

// y = q, k or v to attention's layout, rows `in` there, and rounded. measured: m->amax has its maximum.
static void to_attention(Run *r, const AttentionLayer *a, Factor y, Rows in, bool measured) {
    exchange(r, y.x, y.x, a->have, a->want, r->m->c.dim * act_size());
    if (!r->m->c.quant_attn) return;
    if (measured) quantize_measured(r, y, y.x, count_of(in), in.dim, 15);
    else quantize(r, y, y.x, count_of(in), in.dim, 15);
}

static void attention_layer(Run *r, int i, bool cross) {
    const Config *c = &r->m->c;
    AttentionLayer a = layer_of(r, i, cross);
    SavedAttention *s = a.s;
    const float *norm_q = a.w->norm_q->w, *norm_k = a.w->norm_k->w;
    float *amax = c->quant_attn ? r->m->amax : NULL;
    linear(s->q_raw, a.h, &a.w->q, count_of(a.q));
    linear(s->k_raw, a.context, &a.w->k, count_of(a.kv));
    linear(s->v, a.context, &a.w->v, count_of(a.kv));
    rmsnorm_rope_forward(s->q.x, s->q_rstd, amax, s->q_raw, norm_q, a.rope, a.q, c->num_heads, c->eps);
    to_attention(r, &a, s->q, a.q_in, true);
    rmsnorm_rope_forward(s->k.x, s->k_rstd, amax, s->k_raw, norm_k, a.rope, a.kv, c->num_heads, c->eps);
    to_attention(r, &a, s->k, a.kv_in, true);
    to_attention(r, &a, plain(s->v), a.kv_in, false);
    attention_forward(s->o, s->lse, c->quant ? r->m->amax : NULL, s->q, s->k, s->v, a.sequences, a.heads,
                      c->dim / c->num_heads);
    exchange(r, s->oq.x, s->o, a.want, a.have, c->dim * act_size());
    if (c->quant) quantize_measured(r, s->oq, a.want != a.have ? s->oq.x : s->o, count_of(a.q), c->dim, 15);
    linear(s->y, s->oq, &a.w->o, count_of(a.q));
}

// In: dy in r->d1. Out: dh there; cross-attention also adds the text's gradient to r->dcontext. The text is
// one tensor that all ranks hold, so the gradients of its k and v are summed over ranks, and only rank 0
// carries them on.
static void attention_layer_back(Run *r, int i, bool cross) {
    const Config *c = &r->m->c;
    AttentionLayer a = layer_of(r, i, cross);
    SavedAttention *s = a.s;
    size_t n = numbers(a.kv), row = c->dim * act_size();
    act *dcontext = cross ? r->dcontext : r->d1, *const dqkv[] = {r->dq, r->dk, r->dv};
    linear_back(r, r->dout, r->d1, s->oq, &a.w->o, count_of(a.q), false);
    exchange(r, r->dout, r->dout, a.have, a.want, row);
    attention_backward(r->dq, r->dk, r->dv, r->dout, s->q.x, s->k.x, s->v, s->o, s->lse, a.sequences, a.heads,
                       c->dim / c->num_heads);
    for (int j = 0; j < 3; j++) exchange(r, dqkv[j], dqkv[j], a.want, a.have, row);
    if (cross && r->ranks->size > 1) {
        float *sums = (float *)r->packed;
        to_float(sums, r->dk, n), to_float(sums + n, r->dv, n);
        sum_over_ranks(r->ranks, sums, 2 * n, true);
        to_act(r->dk, sums, n), to_act(r->dv, sums + n, n);
    }
    for (int j = 0; j < 3 && c->quant_attn; j++)             // straight through Q(q; 15), Q(k; 15), Q(v; 15)
        quantize(r, plain(dqkv[j]), dqkv[j], count_of(j ? a.kv : a.q), c->dim, 224);
    const Param *nq = a.w->norm_q, *nk = a.w->norm_k;
    rmsnorm_rope_backward(r->dk, nk->dw, r->dk, s->k_raw, s->k_rstd, nk->w, a.rope, a.kv, c->num_heads);
    rmsnorm_rope_backward(r->dq, nq->dw, r->dq, s->q_raw, s->q_rstd, nq->w, a.rope, a.q, c->num_heads);
    linear_back(r, r->d1, r->dq, a.h, &a.w->q, count_of(a.q), false);
    linear_back(r, dcontext, r->dk, a.context, &a.w->k, count_of(a.kv), true);
    linear_back(r, dcontext, r->dv, a.context, &a.w->v, count_of(a.kv), true);
}

// ---- the timestep and the text ---------------------------------------------------------------------------
// out[rows, 2·half] = cos, then sin, of position·10000^(−j/half); position[rows], NULL: 0, 1, .. The angles
// need double: float is off by 1e-5 near t = 1000.
static void sinusoids(float *out, const double *position, size_t rows, size_t columns) {
    size_t half = columns / 2;
    float *host = floats(rows * columns);
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < half; j++) {
            double angle = (position ? position[i] : (double)i) * pow(10000.0, -(double)j / (double)half);
            host[i * columns + j] = (float)cos(angle), host[i * columns + half + j] = (float)sin(angle);
        }
    upload(out, host, rows * columns * sizeof(float));
    free(host);
}

// t[B] = 1000σ -> sinusoids -> e[B, dim] -> e0[B, 6, dim], the shifts, scales and gates of all blocks: in
// float32, as Wan has it, because what is lost here reaches every row.
static void time_forward(Run *r, const double *t) {
    const Model *m = r->m;
    size_t B = r->B, D = m->c.dim;
    sinusoids(r->sin, t, B, m->c.freq_dim);
    linear((act *)r->t1, exact(r->sin), &m->time0, B);
    silu_forward(r->t1s, r->t1, B * D);
    linear((act *)r->e, exact(r->t1s), &m->time2, B);
    silu_forward(r->es, r->e, B * D);
    linear((act *)r->e0, exact(r->es), &m->time_proj, B);
}

static void time_backward(Run *r) {
    const Model *m = r->m;
    size_t B = r->B, D = m->c.dim;
    linear_back(r, (act *)r->dt, (act *)r->de0, exact(r->es), &m->time_proj, B, false);
    silu_backward(r->dt, r->dt, r->e, B * D);
    lincomb(r->de_e, 1, r->de_e, 1, r->dt, B * D);  // e also reaches the head's modulation
    linear_back(r, (act *)r->dt, (act *)r->de_e, exact(r->t1s), &m->time2, B, false);
    silu_backward(r->dt, r->dt, r->t1, B * D);
    linear_back(r, NULL, (act *)r->dt, exact(r->sin), &m->time0, B, false);
}

// r->text[B·text_len, text_dim] -> context[B·text_len, dim]. Padding rows are zeros, and are attended.
static void text_forward(Run *r) {
    const Model *m = r->m;
    size_t rows = (size_t)r->B * m->c.text_len;
    if (m->c.vocab)
        embed_forward(r->text, m->words->w, r->word_pos, r->ids, rows, m->c.text_len, m->c.text_dim);
    linear_gelu_forward(r->text_h, r->text_pre, plain(r->text), m->text0.w->compute, m->text0.b->compute.x,
                        rows, m->c.dim, m->c.text_dim);
    linear(r->context, plain(r->text_h), &m->text2, rows);
    if (m->c.quant) quantize(r, r->context_q, r->context, rows, m->c.dim, 15);
}

static void text_backward(Run *r) {
    const Model *m = r->m;
    size_t rows = (size_t)r->B * m->c.text_len;
    linear_back(r, r->d1, r->dcontext, plain(r->text_h), &m->text2, rows, false);
    gelu_backward(r->d1, r->d1, r->text_pre, rows * m->c.dim);
    linear_back(r, r->dtext, r->d1, plain(r->text), &m->text0, rows, false);
    if (m->c.vocab) embed_backward(m->words->dw, r->dtext, r->ids, rows, m->c.vocab, m->c.text_dim);
}

// ---- the whole model -------------------------------------------------------------------------------------
static Grid grid_of(const Run *r, int C) { Grid g = {r->B, C, r->T, r->H, r->W}; return g; }

static size_t first_token(const Run *r) { return (size_t)r->pattern[FULL].first[r->ranks->rank]; }

// x[B, in_dim, T, 2H, 2W], t[B] = 1000σ, and the text in r->text or r->ids -> velocity r->out[B, out_dim, T,
// 2H, 2W]. A rank cuts its tokens out of x in the plain order; the output is gathered on every rank.
static void forward(Run *r, const float *x, const double *t) {
    const Config *c = &r->m->c;
    Rows rows = rows_of(r, FULL);
    size_t count = count_of(rows), row = c->dim * sizeof(float);
    Saved *first = &r->saved[0], *last = &r->saved[c->num_layers];
    time_forward(r, t);
    text_forward(r);
    latent_to_rows(r->patches, x, grid_of(r, c->in_dim), first_token(r), rows.n, true);
    linear(r->tokens, plain(r->patches), &r->m->patch, count);
    to_float(first->layout == FULL ? first->x0 : r->dx2, r->tokens, numbers(rows));
    if (first->layout != FULL) exchange(r, first->x0, r->dx2, FULL, first->layout, row);
    for (int i = 0; i < c->num_layers; i++) {
        block_forward(r, i);
        if (r->show) fputc(PATTERN_LETTER[r->saved[i].pattern], stderr);
    }
    modulation_forward(r->head_e, r->m->head_modulation->w, r->e, r->B, 2, 1, c->dim);
    residual_norm_forward(NULL, r->h, r->head_stat, NULL, last->x0, NULL, NONE,
                          modulated(r->head_e, 0, 2, c->dim), rows, c->eps);
    linear(r->y, plain(r->h), &r->m->head, count);
    exchange(r, r->y_all, r->y, FULL, WHOLE, 4 * c->out_dim * act_size());
    rows_to_latent(r->out, r->y_all, grid_of(r, c->out_dim), false);
}

// dout[B, out_dim, T, 2H, 2W] = d loss / d r->out -> gradients of the last block's output, r->dx, and of e.
static void head_backward(Run *r, const float *dout) {
    const Config *c = &r->m->c;
    Rows rows = rows_of(r, FULL);
    zero(r->dx, numbers(rows) * sizeof(float));
    latent_to_rows(r->y, dout, grid_of(r, c->out_dim), first_token(r), rows.n, false);
    linear_back(r, r->d1, r->y, plain(r->h), &r->m->head, count_of(rows), false);
    norm_backward(r->dx, modulated(r->dhead_e, 0, 2, c->dim), r->d1, r->saved[c->num_layers].x0, r->head_stat,
                  modulated(r->head_e, 0, 2, c->dim), rows);
    modulation_backward(r->m->head_modulation->dw, r->de_e, r->dhead_e, r->B, 2, 1, c->dim);
}

// Adds to every parameter's gradient.
static void backward(Run *r, const float *dout) {
    const Config *c = &r->m->c;
    size_t B = r->B, D = c->dim;
    zero(r->de0, B * 6 * D * sizeof(float));
    zero(r->de_e, B * D * sizeof(float));
    zero(r->dhead_e, B * 2 * D * sizeof(float));
    zero(r->dcontext, B * c->text_len * D * act_size());
    head_backward(r, dout);
    for (int i = c->num_layers - 1; i >= 0; i--) block_backward(r, i);
    exchange_gradient(r, r->saved[0].layout, FULL);
    to_act(r->d1, r->dx, numbers(rows_of(r, FULL)));
    linear_back(r, NULL, r->d1, plain(r->patches), &r->m->patch, count_of(rows_of(r, FULL)), false);
    text_backward(r);
    time_backward(r);
}
// ==========================================================================================================
// Flow matching: schedule, guidance, sampling, a training step, the optimizer (spec §7)
// ==========================================================================================================
// Noise and data are joined by straight lines x_σ = σ·ε + (1 − σ)·x0. The model learns the line's direction
// v = ε − x0, which points from data to noise; sampling walks σ from 1 down to 0, so its steps are negative.
static double shift_sigma(double sigma, double s) { return s * sigma / (1 + (s - 1) * sigma); }

static void schedule(double *sigma, int steps, double shift) {  // sigma[steps + 1], from 1 to 0
    for (int i = 0; i <= steps; i++) sigma[i] = shift_sigma(1 - (double)i / steps, shift);
}

// The training shift e^μ grows with the tokens of a frame: more pixels need more noise to hide as well.
static double train_shift(int tokens) { return exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)); }

// Numbers of one sample's latent or clip, x[C, T, 2H, 2W].
static size_t latent_size(const Run *r) { return (size_t)r->m->c.out_dim * r->N * 4; }

// A batch's text on the host: words of captions (NULL: empty ones), or rows of UMT5 embeddings.
typedef struct { const int *ids; const float *rows; } Text;  // [B·text_len] or [B·text_len, text_dim]
static const Text NO_TEXT = {NULL, NULL};
static void text_set(Run *r, Text text);  // to r->ids or r->text

// ---- sampling --------------------------------------------------------------------------------------------
static void noise_fill(float *x, size_t count, uint64_t seed, uint64_t stream, uint64_t first) {
    #pragma omp parallel for schedule(static)
    for (size_t i = 0; i < count; i++) x[i] = rng_normal(seed, stream, first + i);
}

// v = v_uncond + g·(v_cond − v_uncond) at one σ; v is not r->out. With g = 1 one forward is enough; two
// halves of ranks do one forward each and swap. The conditional forward is the last: its activations stay.
static void guided_velocity(Run *r, float *v, const float *x, double sigma, Text cond, Text uncond,
                            double g) {
    size_t count = r->B * latent_size(r);
    bool halves = r->ranks->halves == 2;
    double *t = (double *)xalloc(r->B, sizeof(double));
    for (int b = 0; b < r->B; b++) t[b] = 1000 * sigma;
    if (!halves && g != 1) {
        text_set(r, uncond);
        forward(r, x, t);
        copy(v, r->out, count * sizeof(float));
    }
    text_set(r, halves && r->ranks->half ? uncond : cond);
    forward(r, x, t);
    if (halves) {
        const int each[] = {(int)count, (int)count};
        float *both = device_floats(2 * count);
        all_to_all(r->ranks, both, r->out, each, each, true, sizeof(float), GUIDANCE);
        lincomb(v, (float)(1 - g), both + count, (float)g, both, count);
        device_free(both);
    } else if (g != 1) lincomb(v, (float)(1 - g), v, (float)g, r->out, count);
    else copy(v, r->out, count * sizeof(float));
    free(t);
}

static void show_progress(const char *what, int step, int steps, double began);

// On the host, noise x[B, C, T, 2H, 2W] becomes data, in place: Euler steps x += (σ_next − σ)·v.
static void sample(Run *r, float *host, Text cond, Text uncond, int steps, double shift, double guidance) {
    size_t count = r->B * latent_size(r);
    double *sigma = (double *)xalloc(steps + 1, sizeof(double)), began = seconds();
    float *x = (float *)to_device(host, count), *v = device_floats(count);
    schedule(sigma, steps, shift);
    for (int i = 0; i < steps; i++) {
        if (r->show) show_progress("step", i, steps, began);
        guided_velocity(r, v, x, sigma[i], cond, uncond, guidance);
        lincomb(x, 1, x, (float)(sigma[i + 1] - sigma[i]), v, count);
    }
    if (r->show) fputs("\r\033[K", stderr);
    download(host, x, count * sizeof(float));
    for (size_t i = 0; i < count; i++)
        if (!isfinite(host[i]))
            die("the model made a number that is not finite; broken weights? or try --device-dtype f32");
    device_free(x), device_free(v), free(sigma);
}

// ---- learning --------------------------------------------------------------------------------------------
typedef struct {
    int steps, batch, warmup;
    double lr, beta1, beta2, eps, weight_decay;
    double clip, ema, drop;                  // clip: of the gradient's norm; drop: share of captions left out
    int ema_warmup;                          // 1: a short run's average does not hold its beginning
    uint64_t seed;
} TrainOptions;

typedef struct {
    float *x, *target;                       // [B, C, T, 2H, 2W] on the host: x_σ and ε − x0
    float *x_device, *target_device, *dout;  // the same on the device, and d loss / d v
    int *ids;                                // [B, text_len]: words
    double *t;                               // [B]: 1000σ
} Batch;

// The samples of one step, on host and device: a caption, its clip x0, σ = sigmoid(normal), shifted, noise ε.
// A tenth of the captions is left out, so that the model also learns the unconditional velocity that guidance
// needs.
static void batch_fill(Batch *a, Run *r, const TrainOptions *o, int step);

// Forward and backward; returns the loss mean (v − (ε − x0))².
static double train_step(Run *r, const Batch *a) {
    weights_prepare(r->m);
    forward(r, a->x_device, a->t);
    double loss = mse(a->dout, r->out, a->target_device, r->B * latent_size(r));
    backward(r, a->dout);
    return loss;
}

// AdamW on an arena of n weights: moments and the moving average of the weights lie beside it.
typedef struct {
    float *w, *dw, *m, *v, *ema;
    size_t n;
    int step, update;                        // AdamW steps; GRPO takes several an update
} Optimizer;

// Cosine from lr to a twentieth of it, after a linear warm-up. step counts from 0.
static double learning_rate(const TrainOptions *o, int step) {
    double warm = o->warmup > 0 && step < o->warmup ? (double)(step + 1) / o->warmup : 1;
    return o->lr * warm * (0.05 + 0.95 * 0.5 * (1 + cos(M_PI * step / o->steps)));
}

// One step on the gradients in dw (summed over ranks first); returns their norm before clipping; zeroes them.
static double optimizer_step(Optimizer *o, Ranks *ranks, const TrainOptions *t, double lr) {
    sum_over_ranks(ranks, o->dw, o->n, false);
    double norm = sqrt(sum_squares(o->dw, NULL, o->n));
    if (!isfinite(norm)) return norm;
    o->step++;
    double young = t->ema_warmup ? (1.0 + o->step) / (10.0 + o->step) : 1;
    AdamW a = {(float)(norm > t->clip ? t->clip / norm : 1), (float)lr, (float)t->eps, (float)t->weight_decay,
               t->beta1, t->beta2, young < t->ema ? young : t->ema, o->step};
    adamw(o->w, o->m, o->v, o->ema, o->dw, o->n, a);
    zero(o->dw, o->n * sizeof(float));
    return norm;
}
// ==========================================================================================================
// Mix-GRPO: reinforcement learning of a flow model (spec §8; arXiv 2507.21802)
// ==========================================================================================================
// A sampler is deterministic, and a policy needs chance. Inside a window of steps the Euler ODE is replaced
// by an SDE with the same marginals, whose every step is a Gaussian: a policy with a known density, as PPO
// needs it. A group of videos of one caption is scored; what made better ones than the group's mean becomes
// likelier, the rest less likely. Only a window, because early steps decide layout and motion, and because
// ODE steps need no gradient: the window's length is what an update costs.

// ---- LoRA: W + (alpha/rank)·B·A on q, k, v, o of both attentions -----------------------------------------
// A begins normal with deviation 1/rank, B at 0: training starts at the base.
struct Lora {
    int rank, count;
    float scale;                           // alpha / rank; 0: the model without its adapter, the reference
    Param *param;                          // [2·count]: A[rank, D], B[D, rank] of each
    float *w, *dw;                         // arenas of all A and B, n floats
    size_t n;
    float *d, *sum;                        // room for a B, for a W
};

// p->compute.x += scale·B·A, after weights_prepare has cast W into it. Adapters are small: all in float.
static void lora_merge(Model *m, Param *p) {
    Lora *l = m->lora;
    int D = m->c.dim;
    if (!p->lora || l->scale == 0) return;
    const Param *A = p->lora, *B = A + 1;
    lincomb(l->d, l->scale, B->w, 0, NULL, B->count);
    to_float(l->sum, p->compute.x, p->count);
    linear_backward((act *)l->sum, NULL, NULL, exact(l->d), exact(NULL), exact(A->w), D, l->rank, D, true);
    to_act(p->compute.x, l->sum, p->count);
}

// dW -> dB = scale·dW·Aᵀ, dA = scale·Bᵀ·dW: the chain rule through W + scale·B·A. dW is used up.
static void lora_backward(Model *m) {
    Lora *l = m->lora;
    int D = m->c.dim;
    for (Param *p = m->param; p < m->param + m->params; p++) {
        if (!p->lora) continue;
        Param *A = p->lora, *B = A + 1;
        lincomb(p->dw, l->scale, p->dw, 0, NULL, p->count);
        linear_forward((act *)l->d, exact(p->dw), exact(A->w), NULL, D, l->rank, D);
        lincomb(B->dw, 1, B->dw, 1, l->d, B->count);
        linear_backward(NULL, A->dw, NULL, exact(B->w), exact(p->dw), exact(NULL), D, l->rank, D, false);
    }
    zero(m->dw, m->count * sizeof(float));
}

// ---- the policy ------------------------------------------------------------------------------------------
// Why the marginals stay: the density of x follows the Fokker-Planck equation. For the straight lines the
// score is ∇log p(x) = −(x + (1−σ)v)/σ. Subtracting ½η²·score·dt from the ODE's step pulls x together just as
// much as the noise η·√(−dt)·z spreads it: the terms cancel in the equation, for any η. Put in and collected,
//     mean = x + v·dt + ½η²·(x + (1−σ)v)/σ·dt = a·x + b·v; σ = 0.8 -> 0.7: a = 0.96, b = −0.108, std = 0.253.
typedef struct { double a, b, std; } SdeStep;  // x_next = a·x + b·v + std·z
static SdeStep sde_step(double sigma, double sigma_next) {
    double dt = sigma_next - sigma, eta = sigma;  // η = η_min + (η_max − η_min)·σ with 0 and 1
    SdeStep s = {1 + eta * eta / (2 * sigma) * dt, (1 + eta * eta * (1 - sigma) / (2 * sigma)) * dt,
                 eta * sqrt(-dt)};
    return s;
}

// log N(x_next; mean, std²) as a mean over the n elements: a sum over a latent's millions of elements would
// make the ratio below leave any clip range at the first rounding error.
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

typedef struct { double ratio, policy_loss, kl, slope; bool clipped; } Surrogate;  // slope: d loss / d logp

// max(−A·ρ, −A·clip(ρ, 1 ± c)), ρ = exp(logp − logp_old): how much likelier the video is than when it was
// made. Once ρ has moved by c to the good side the clipped term is the larger and has no gradient: one
// rollout can move the policy only so far. On the bad side the way back stays open.
static Surrogate surrogate(double A, double logp, double logp_old, double c) {
    double ratio = exp(logp - logp_old), inside = ratio < 1 - c ? 1 - c : ratio > 1 + c ? 1 + c : ratio;
    bool clipped = -A * inside > -A * ratio;
    Surrogate s = {ratio, clipped ? -A * inside : -A * ratio, 0, clipped ? 0 : -A * ratio, clipped};
    return s;
}

typedef struct {
    int updates, prompts, group, micro;      // captions an update; G videos of each; videos an AdamW step
    int steps, window;                       // S; the first of them are SDE steps
    double guidance, shift, clip, beta;
    const char *reward;  // which score
} PolicyOptions;

// One SDE step of a batch of B videos.
typedef struct {
    double sigma, sigma_next;
    Text cond, uncond;
    const float *x, *x_next, *mean_ref;      // [B, ...] on the device; mean_ref: without the adapter
    const double *advantage, *logp_old;      // [B]
} PolicyBatch;

// The policy's mean with the weights as prepared: mean[B, ...] = a·x + b·guided v.
static void policy_mean(Run *r, float *mean, const PolicyBatch *p, double guidance) {
    SdeStep s = sde_step(p->sigma, p->sigma_next);
    guided_velocity(r, mean, p->x, p->sigma, p->cond, p->uncond, guidance);
    lincomb(mean, (float)s.a, p->x, (float)s.b, mean, (size_t)r->B * latent_size(r));
}

// Loss = mean over the B videos of policy_loss + β·kl, and share times its gradient, added to that of the
// weights. The unconditional half of the guided velocity has no gradient: guided_velocity ends on the
// conditional forward, so the activations kept are that one's, and d v_cond = g·d v. mean, dmean: room for a
// batch; out[B] gets the figures.
static double policy_step(Run *r, Surrogate *out, float *mean, float *dmean, const PolicyBatch *p,
                          const PolicyOptions *o, double share) {
    size_t one = latent_size(r);
    SdeStep s = sde_step(p->sigma, p->sigma_next);
    double loss = 0, variance = s.std * s.std, n = (double)one;
    policy_mean(r, mean, p, o->guidance);
    for (int i = 0; i < r->B; i++) {
        float *mean_i = mean + i * one, *d = dmean + i * one;
        const float *next = p->x_next + i * one, *ref = p->mean_ref + i * one;
        double logp = log_probability(next, mean_i, s.std, one);
        out[i] = surrogate(p->advantage[i], logp, p->logp_old[i], o->clip);
        out[i].kl = sum_squares(mean_i, ref, one) / n / (2 * variance);
        loss += (out[i].policy_loss + o->beta * out[i].kl) / r->B;
        // d logp/d mean = (x_next − mean)/(n·std²), d kl/d mean = (mean − ref)/(n·std²), d mean/d v_cond = bg
        double chain = share * s.b * o->guidance / (n * variance * r->B);
        double w = out[i].slope * chain, k = o->beta * chain;
        lincomb(d, (float)w, next, (float)(k - w), mean_i, one);
        lincomb(d, 1, d, (float)-k, ref, one);
    }
    backward(r, dmean);
    return loss;
}

// ---- rollouts --------------------------------------------------------------------------------------------
// All that GRPO needs beside the model, built once. One run makes videos, many together; the other learns
// from them, a micro-batch of B together. V = prompts·G videos a rollout, W steps in the window.
typedef struct {
    const PolicyOptions *o;
    const TrainOptions *train;
    Run *make, *learn;
    int V;
    int *caption;                               // [V]
    int *ids, *batch_ids;                       // words of all videos, of a batch
    double *reward, *advantage, *logp, *sigma;  // [V], [V], [W, V], [S + 1]
    double *batch_advantage, *batch_logp;       // [B] each
    float *x, *mean_ref;                        // device: [W + 1, V, ...], [W, V, ...]
    float *batch[5];                            // device: [B, ...] each
    Surrogate *out;                             // [B]
} Policy;

// What an update prints: of its videos; of the `count` (video, SDE step) pairs that it learned from.
typedef struct {
    int count, steps;
    double reward, spread, ratio_min, ratio_mean, ratio_max, clipped, kl, norm, loss;
} PolicyFigures;

// The small world's: number of the k-th caption for training; its sentence; its words; how well x shows it.
static int training_caption(uint64_t seed, uint64_t k);
static const char *caption_text(int caption);
static void caption_ids(int *ids, int text_len, const char *text);
static double reward_of(const float *x, int caption, const Run *r, const char *reward);

// Of the states x or the reference's means: a video's at SDE step i.
static float *kept(const Policy *p, float *all, int i, int video) {
    return all + ((size_t)i * p->V + video) * latent_size(p->make);
}

// Makes one batch of videos, from `first` on: SDE steps in the window, whose states are kept, then ODE steps.
// A group begins at one noise: its videos differ by what chance did in the window.
static void rollout(Policy *p, int first, uint64_t update) {
    Run *r = p->make;
    size_t one = latent_size(r), count = r->B * one, bytes = count * sizeof(float);
    float *host = floats(count), *x = p->batch[0], *v = p->batch[3];
    Text cond = {p->ids + (size_t)first * r->m->c.text_len, NULL};
    for (int i = -1; i < p->o->steps; i++) {
        for (int b = 0; b < r->B && i < p->o->window; b++) { // the group's first noise, then each video's own
            uint64_t n = update * p->V + first + b, name = i < 0 ? n / p->o->group : n;
            name = (uint64_t)(i + 1) << 56 | name << 28;
            noise_fill(host + b * one, one, p->train->seed, POLICY_STREAM, name);
        }
        if (i < 0) { upload(x, host, bytes); continue; }
        double sigma = p->sigma[i], next = p->sigma[i + 1];
        SdeStep s = sde_step(sigma, next);
        guided_velocity(r, v, x, sigma, cond, NO_TEXT, p->o->guidance);
        if (i >= p->o->window) { lincomb(x, 1, x, (float)(next - sigma), v, count); continue; }
        copy(kept(p, p->x, i, first), x, bytes);
        lincomb(v, (float)s.a, x, (float)s.b, v, count);  // the mean
        upload(x, host, bytes);
        lincomb(x, 1, v, (float)s.std, x, count);
        copy(kept(p, p->x, i + 1, first), x, bytes);
        for (int b = 0; b < r->B; b++)
            p->logp[i * p->V + first + b] = log_probability(x + b * one, v + b * one, s.std, one);
    }
    download(host, x, bytes);
    for (int b = 0; b < r->B; b++)
        p->reward[first + b] = reward_of(host + b * one, p->caption[first + b], r, p->o->reward);
    free(host);
}

// The means of the reference, the model without its adapter, at the states that were kept.
static void reference(Policy *p) {
    Run *r = p->make;
    float scale = r->m->lora->scale;
    r->m->lora->scale = 0, weights_prepare(r->m);
    for (int first = 0; first < p->V; first += r->B)
        for (int i = 0; i < p->o->window; i++) {
            PolicyBatch a = {p->sigma[i], p->sigma[i + 1], {p->ids + (size_t)first * r->m->c.text_len, NULL},
                             NO_TEXT, kept(p, p->x, i, first), NULL, NULL, NULL, NULL};
            policy_mean(r, kept(p, p->mean_ref, i, first), &a, p->o->guidance);
        }
    r->m->lora->scale = scale, weights_prepare(r->m);
}

// ---- updates ---------------------------------------------------------------------------------------------
// The videos video[B], over all steps of the window: adds up the gradient of the steps' mean loss, or, before
// the first AdamW step, only keeps their log-probabilities as the old ones.
static void micro_batch(Policy *p, const int *video, bool learn, PolicyFigures *f) {
    Run *r = p->learn;
    int W = p->o->window, L = r->m->c.text_len;
    size_t one = latent_size(r), bytes = one * sizeof(float);
    PolicyBatch a = {0, 0, {p->batch_ids, NULL}, NO_TEXT, p->batch[0], p->batch[1], p->batch[2],
                     p->batch_advantage, p->batch_logp};
    for (int b = 0; b < r->B; b++)
        memcpy(p->batch_ids + b * L, p->ids + (size_t)video[b] * L, L * sizeof(int));
    for (int i = 0; i < W; i++) {
        a.sigma = p->sigma[i], a.sigma_next = p->sigma[i + 1];
        double std = sde_step(a.sigma, a.sigma_next).std;
        for (int b = 0; b < r->B; b++) {  // brought together
            copy(p->batch[0] + b * one, kept(p, p->x, i, video[b]), bytes);
            copy(p->batch[1] + b * one, kept(p, p->x, i + 1, video[b]), bytes);
            copy(p->batch[2] + b * one, kept(p, p->mean_ref, i, video[b]), bytes);
            p->batch_advantage[b] = p->advantage[video[b]], p->batch_logp[b] = p->logp[i * p->V + video[b]];
        }
        if (!learn) policy_mean(r, p->batch[3], &a, p->o->guidance);
        for (int b = 0; b < r->B && !learn; b++)
            p->logp[i * p->V + video[b]] =
                log_probability(p->batch[1] + b * one, p->batch[3] + b * one, std, one);
        if (learn) f->loss += policy_step(r, p->out, p->batch[3], p->batch[4], &a, p->o, 1.0 / W) / W;
        for (const Surrogate *s = p->out; s < p->out + r->B && learn; s++) {
            f->ratio_min = fmin(f->ratio_min, s->ratio), f->ratio_max = fmax(f->ratio_max, s->ratio);
            f->ratio_mean += s->ratio, f->kl += s->kl, f->clipped += s->clipped, f->count++;
        }
    }
}

// The videos to learn from, shuffled: those with an advantage, whatever their caption. Returns how many.
static int shuffled_videos(int *video, const Policy *p, uint64_t update) {
    int count = 0;
    for (int v = 0; v < p->V; v++)
        if (p->advantage[v] != 0) video[count++] = v;
    for (int i = count - 1; i > 0; i--) {
        uint64_t draw = rng_bits(p->train->seed, SHUFFLE_STREAM, update << 32 | (uint64_t)i);
        int j = (int)(draw % (uint64_t)(i + 1)), other = video[j];
        video[j] = video[i], video[i] = other;
    }
    return count;
}

// One AdamW step for each full micro-batch. Before the first the policy is still the one that made the
// videos, so every ratio must be 1: in float32 that proves that rollout and training compute the same. Where
// a number depends on what shares its batch (HiF8's maxima, 16-bit products) the micro-batches compute the
// old log-probabilities anew, and only a change in between can show.
static void policy_learn(Policy *p, Optimizer *opt, PolicyFigures *f) {
    Model *m = p->learn->m;
    int *video = (int *)xalloc(p->V, sizeof(int)), B = p->learn->B;
    int count = shuffled_videos(video, p, (uint64_t)opt->update) / B;
    bool anew = m->c.quant || m->c.quant_attn || act_size() < sizeof(float);
    for (int k = 0; k < count && anew; k++) micro_batch(p, video + k * B, false, f);
    for (int k = 0; k < count; k++) {
        micro_batch(p, video + k * B, true, f);
        if (k == 0 && !(f->ratio_min > 1 - 1e-5 && f->ratio_max < 1 + 1e-5))
            die("update %d: before its first step the ratio must be 1 within 1e-5, but is %.7f .. %.7f: "
                "rollout and training do not compute the same log-probability; report this",
                opt->update + 1, f->ratio_min, f->ratio_max);
        lora_backward(m);
        double lr = learning_rate(p->train, opt->update);
        f->norm += optimizer_step(opt, p->learn->ranks, p->train, lr) / count;
        if (!isfinite(f->norm) || !isfinite(f->loss))
            die("update %d: loss or gradient is not finite: lower --lr; a saved state is good",
                opt->update + 1);
        f->steps++;
        weights_prepare(m);
    }
    free(video);
}

// The next update: G videos of each of some new captions, and what there is to learn from them.
static PolicyFigures policy_update(Policy *p, Optimizer *opt) {
    PolicyFigures f;
    int G = p->o->group, L = p->make->m->c.text_len;
    uint64_t update = (uint64_t)opt->update;
    memset(&f, 0, sizeof f);
    f.ratio_min = INFINITY, f.ratio_max = -INFINITY;
    for (int v = 0; v < p->V; v++) {
        p->caption[v] = training_caption(p->train->seed, update * p->o->prompts + v / G);
        caption_ids(p->ids + (size_t)v * L, L, caption_text(p->caption[v]));
    }
    for (int v = 0; v < p->V; v += p->make->B) rollout(p, v, update);
    reference(p);
    for (int v = 0; v < p->V; v += G) advantages(p->advantage + v, p->reward + v, G);
    for (int v = 0; v < p->V; v++)
        f.reward += p->reward[v] / p->V, f.spread += p->reward[v] * p->reward[v] / p->V;
    f.spread = sqrt(fmax(f.spread - f.reward * f.reward, 0));
    if (!isfinite(f.reward)) die("a reward is not finite: lower --lr; a saved state is good");
    policy_learn(p, opt, &f);
    opt->update++;
    if (f.count) f.ratio_mean /= f.count, f.clipped /= f.count, f.kl /= f.count, f.loss /= f.steps;
    return f;
}

// End of Part I: the method. What follows is what it stands on.
// ==========================================================================================================
// PART II, what it stands on. The operations on a CPU
// ==========================================================================================================
// First what a GPU uses, too.

// 2^x with a relative error of 1e-7: x = n + f, |f| <= 1/2; a polynomial for 2^f, n into the exponent. Below
// 2^-126 it gives 0, above 2^126 that; NaN stays. No branches: loops vectorise.
EVERYWHERE float exp2_fast(float x) {
    float y = x > 126.0f ? 126.0f : x, shifted = y + 12582912.0f;  // + 1.5·2^23 rounds to an integer
    float f = y - (shifted - 12582912.0f);
    float p = ((1.54531634e-4f * f + 1.33908633e-3f) * f + 9.61808302e-3f) * f + 5.55035695e-2f;
    p = ((p * f + 2.40226507e-1f) * f + 6.93147182e-1f) * f + 1.0f;
    return x < -126.0f ? 0.0f : p * bits_float((float_bits(shifted) + 127u) << 23);
}

// gelu(u) = u·σ(2z) with z = √(2/π)·(u + 0.044715·u³), because (1 + tanh z)/2 = σ(2z): it never cancels.
EVERYWHERE float gelu_gate(float u) {
    return 1.0f / (1.0f + exp2_fast(-2.3022082f * (u + 0.044715f * u * u * u)));
}
EVERYWHERE float gelu(float u) { return u * gelu_gate(u); }
EVERYWHERE float gelu_slope(float u) {
    float s = gelu_gate(u);
    return s + u * s * (1.0f - s) * (1.5957691f * (1.0f + 3.0f * 0.044715f * u * u));
}
EVERYWHERE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }  // few values: exact
EVERYWHERE float silu(float x) { return x / (1.0f + expf(-x)); }
EVERYWHERE float silu_slope(float x) { float s = sigmoid(x); return s + x * s * (1.0f - s); }

// The longest of sequences s, [start[s], start[s + 1]).
static int longest(const int *start, int count) {
    int n = 0;
    for (int i = 0; i < count; i++) if (start[i + 1] - start[i] > n) n = start[i + 1] - start[i];
    return n;
}

#ifndef OSP_CUDA
// float32 throughout. OpenMP splits rows, tiles or heads, but never a sum: any number of threads gives the
// same bytes. Products and attention share one inner kernel, `tile`; the rest are loops that vectorise.

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
    TILE_K = 256,           // depth of a packed panel: TILE_K·TILE_N floats live in the L1 cache
    TASK_M = 528,           // rows of a product that one task computes with each panel, whole tiles
    SUM_ROWS = 64,          // rows that a sum over rows takes at a time
    QUERIES = 128,          // attention: queries that a task takes at a time
    PARALLEL = 1 << 14      // less work than this is not worth waking threads
};
typedef float vec __attribute__((vector_size(4 * LANES)));

static inline vec load(const float *p) { vec v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float *p, vec v) { memcpy(p, &v, sizeof v); }
static inline size_t least(size_t a, size_t b) { return a < b ? a : b; }
static inline float *of_sample(PerSample v, size_t b) { return v.p ? v.p + b * v.stride : NULL; }
static inline float inner(const float *a, const float *b, size_t n) {
    float sum = 0.0f;
    #pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// ---- memory ----------------------------------------------------------------------------------------------
static void device_start(const char *dtype, int rank) {
    (void)rank;
    if (dtype && strcmp(dtype, "f32")) die("--device-dtype %.40s: a CPU has f32; osp_cuda has bf16", dtype);
}
static void wait_device(void) {}
static void *scratch(size_t bytes) {  // working memory, not zeroed, a cache line's alignment
    void *p;
    if (posix_memalign(&p, 64, bytes)) die("no memory for %zu bytes: use a smaller size or batch", bytes);
    return p;
}
static void  *device_alloc(size_t bytes) { return memset(scratch(bytes), 0, bytes); }
static void   device_free(void *p) { free(p); }
static double device_memory(void) { return (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE); }
static size_t act_size(void) { return sizeof(act); }
static void   zero(void *p, size_t bytes) { memset(p, 0, bytes); }
static void   copy(void *dst, const void *src, size_t bytes) { if (bytes) memmove(dst, src, bytes); }
static void   upload(void *dst, const void *src, size_t bytes) { copy(dst, src, bytes); }
static void   download(void *dst, const void *src, size_t bytes) { copy(dst, src, bytes); }
static void   to_act(act *y, const float *x, size_t n) { copy(y, x, 4 * n); }
static void   to_float(float *y, const act *x, size_t n) { copy(y, x, 4 * n); }

// ---- matrix products -------------------------------------------------------------------------------------
// Element [i, j] stands at p[i·down + j·right]: a matrix, a turned one, a part of one.
typedef struct { float *p; size_t rows, columns, down, right; } Matrix;
static float ZEROS[TILE_N];
static const Matrix NOTHING = {ZEROS, 0, 0, 0, 0};  // zeros of any size
static Matrix matrix(const float *p, size_t rows, size_t columns) {
    Matrix m = {(float *)p, rows, columns, columns, 1};
    return m;
}
static Matrix turned(Matrix m) { Matrix t = {m.p, m.columns, m.rows, m.right, m.down}; return t; }
static Matrix slice(Matrix m, size_t i, size_t j, size_t rows, size_t columns) {  // from [i, j] on
    m.p += i * m.down + j * m.right;
    m.rows = least(rows, m.rows - i), m.columns = least(columns, m.columns - j);
    return m;
}

// One tile: c = start + a·b, at most TILE_M x TILE_N, whose sums stay in registers. b is a packed panel
// [depth, TILE_N]. Where rows are fewer than TILE_M, the last one is repeated and not stored.
static inline __attribute__((always_inline))
void tile(Matrix c, Matrix start, Matrix a, const float *b, size_t columns) {
    const float *row[TILE_M];
    vec t[TILE_M][2], none = {0};
    for (size_t i = 0; i < TILE_M; i++) {
        row[i] = a.p + least(i, c.rows - 1) * a.down;
        t[i][0] = t[i][1] = none;
    }
    for (size_t k = 0, step = 0; k < a.columns; k++, step += a.right, b += TILE_N)
        for (int i = 0; i < TILE_M; i++) {
            t[i][0] += row[i][step] * load(b);
            if (columns > LANES) t[i][1] += row[i][step] * load(b + LANES);
        }
    for (size_t i = 0; i < TILE_M; i++) {
        if (i >= c.rows) break;
        float *to = c.p + i * c.down, *from = start.p + i * start.down, sum[TILE_N];
        if (columns % LANES == 0)
            for (size_t j = 0; j < columns; j += LANES) store(to + j, load(from + j) + t[i][j / LANES]);
        else {
            store(sum, t[i][0]);
            store(sum + LANES, t[i][1]);
            for (size_t j = 0; j < columns; j++) to[j] = from[j] + sum[j];
        }
    }
}

// panel[rows, TILE_N] = b, at most TILE_N columns; zeros beside them.
static void pack(float *panel, Matrix b) {
    if (b.columns < TILE_N) memset(panel, 0, 4 * b.rows * TILE_N);
    if (b.right == 1)
        for (size_t k = 0; k < b.rows; k++)
            for (size_t j = 0; j < b.columns; j++) panel[k * TILE_N + j] = b.p[k * b.down + j];
    else
        for (size_t k0 = 0; k0 < b.rows; k0 += 16)
            for (size_t j = 0; j < b.columns; j++)
                for (size_t k = k0, end = least(k0 + 16, b.rows); k < end; k++)
                    panel[k * TILE_N + j] = b.p[k * b.down + j * b.right];
}

// c[M, N] = start + a[M, K]·b[K, N]: start is NOTHING, or a bias for all rows, or c itself. Turned matrices
// make this the forward product, dx and dw alike; slices make it attention. A sum runs over k from 0 to K−1,
// TILE_K terms at a time; start is added after the first. A task computes TILE_N columns of TASK_M rows.
static size_t matmul_tasks(Matrix c) {
    return (c.rows + TASK_M - 1) / TASK_M * ((c.columns + TILE_N - 1) / TILE_N);
}
static void matmul_task(Matrix c, Matrix start, Matrix a, Matrix b, size_t task) {
    float panel[TILE_K * TILE_N];
    size_t panels = (c.columns + TILE_N - 1) / TILE_N, j = task % panels * TILE_N;
    size_t top = task / panels * TASK_M, end = least(top + TASK_M, c.rows);
    for (size_t k = 0; k == 0 || k < a.columns; k += TILE_K) {
        pack(panel, slice(b, k, j, TILE_K, TILE_N));
        Matrix to = slice(c, top, j, end - top, TILE_N), from = slice(k ? c : start, top, j, 0, 0);
        Matrix left = slice(a, top, k, end - top, TILE_K);
        for (size_t i = top; i < end; i += TILE_M) {
            if (to.columns == TILE_N) tile(to, from, left, panel, TILE_N);
            else if (to.columns == LANES) tile(to, from, left, panel, LANES);
            else tile(to, from, left, panel, to.columns);
            to.p += TILE_M * to.down, from.p += TILE_M * from.down, left.p += TILE_M * left.down;
            to.rows -= TILE_M;
        }
    }
}

// On the thread that calls it, and on all.
static void multiply(Matrix c, Matrix start, Matrix a, Matrix b) {
    for (size_t task = 0; task < matmul_tasks(c); task++) matmul_task(c, start, a, b, task);
}
static void matmul(Matrix c, Matrix start, Matrix a, Matrix b) {
    #pragma omp parallel for schedule(dynamic) if (c.rows * c.columns * a.columns > 8 * PARALLEL)
    for (size_t task = 0; task < matmul_tasks(c); task++) matmul_task(c, start, a, b, task);
}

// sum_b[dim] += Σ a·x̂ over the rows of sample b, x̂ = (x − mean)·rstd; stat NULL: x̂ = x; x NULL: x̂ = 1.
// By SUM_ROWS rows at a time, which rounds less than one long sum.
static void column_sums(PerSample sum, const float *a, const float *x, const float *stat, Rows r) {
    size_t D = r.dim;
    if (!sum.p) return;
    #pragma omp parallel for if (numbers(r) > PARALLEL)
    for (size_t j = 0; j < D; j += TILE_N)
        for (size_t row = 0; row < count_of(r);) {
            float part[TILE_N] = {0}, *to = of_sample(sum, row / r.n) + j;
            size_t columns = least(TILE_N, D - j), end = least(row + SUM_ROWS, (row / r.n + 1) * r.n);
            for (; row < end; row++) {
                float mean = stat ? stat[2 * row] : 0.0f, rstd = stat ? stat[2 * row + 1] : 1.0f;
                for (size_t i = 0, at = row * D + j; i < columns; i++, at++)
                    part[i] += x ? a[at] * ((x[at] - mean) * rstd) : a[at];
            }
            for (size_t i = 0; i < columns; i++) to[i] += part[i];
        }
}

static void linear_forward(act *y, Factor x, Factor w, const act *b, size_t rows, int out, int in) {
    Matrix bias = {(float *)b, rows, (size_t)out, 0, 1};
    matmul(matrix(y, rows, out), b ? bias : NOTHING, matrix(x.x, rows, in), turned(matrix(w.x, out, in)));
}

static void linear_backward(act *dx, float *dw, float *db, Factor dy, Factor x, Factor w, size_t rows,
                            int out, int in, bool accumulate) {
    Matrix to_x = matrix(dx, rows, in), to_w = matrix(dw, out, in), from = matrix(dy.x, rows, out);
    Rows all = {1, rows, out};
    if (dx) matmul(to_x, accumulate ? to_x : NOTHING, from, matrix(w.x, out, in));
    if (dw) matmul(to_w, to_w, turned(from), matrix(x.x, rows, in));
    column_sums(shared(db), dy.x, NULL, NULL, all);
}

static void linear_gelu_forward(act *y, act *pre, Factor x, Factor w, const act *b, size_t rows, int out,
                                int in) {
    float *u = pre ? pre : y;
    size_t n = rows * out;
    linear_forward(u, x, w, b, rows, out, in);
    #pragma omp parallel for simd if (n > PARALLEL)
    for (size_t i = 0; i < n; i++) y[i] = gelu(u[i]);
}

static void gelu_backward(act *dx, const act *dy, const act *pre, size_t n) {
    #pragma omp parallel for simd if (n > PARALLEL)
    for (size_t i = 0; i < n; i++) dx[i] = dy[i] * gelu_slope(pre[i]);
}

static void silu_forward(float *y, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = silu(x[i]);
}
static void silu_backward(float *dx, const float *dy, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) dx[i] = dy[i] * silu_slope(x[i]);
}

// ---- norms, modulation, residual -------------------------------------------------------------------------
static void modulation_forward(float *out, const float *mod, const float *e, int B, int J, int Je, int dim) {
    size_t D = dim, sample = J * D;
    for (size_t i = 0; i < B * sample; i++)
        out[i] = mod[i % sample] + e[Je == 1 ? i / sample * D + i % D : i];
}

static void modulation_backward(float *dmod, float *de, const float *dout, int B, int J, int Je, int dim) {
    size_t D = dim, sample = J * D;
    for (size_t i = 0; i < B * sample; i++) {
        dmod[i % sample] += dout[i];
        de[Je == 1 ? i / sample * D + i % D : i] += dout[i];
    }
}

static void residual_gather_forward(float *x_out, const float *x, const act *y, PerSample gate,
                                    const int *map, size_t count, Rows r) {
    size_t D = r.dim;
    #pragma omp parallel for if (count * D > PARALLEL)
    for (size_t j = 0; j < count; j++) {
        size_t i = map ? (size_t)map[j] : j;
        float *to = x_out + j * D;
        const float *from = x + i * D, *g = of_sample(gate, i / r.n);
        for (size_t d = 0; d < D; d++) to[d] = from[d] + (!y ? 0.0f : g ? g[d] * y[i * D + d] : y[i * D + d]);
    }
}

static void residual_norm_forward(float *x_out, act *h, float *stat, float *amax, const float *x,
                                  const act *y, PerSample gate, Affine a, Rows r, float eps) {
    size_t D = r.dim, rows = count_of(r);
    if (y) residual_gather_forward(x_out, x, y, gate, NULL, rows, r), x = x_out;
    #pragma omp parallel for if (rows * D > PARALLEL)
    for (size_t i = 0; i < rows; i++) {
        const float *row = x + i * D, *scale = of_sample(a.scale, i / r.n);
        float *shift = of_sample(a.shift, i / r.n), *to = h + i * D, mean = 0.0f;
        #pragma omp simd reduction(+ : mean)
        for (size_t d = 0; d < D; d++) mean += row[d];
        mean /= (float)D;
        for (size_t d = 0; d < D; d++) to[d] = row[d] - mean;
        float rstd = 1.0f / sqrtf(inner(to, to, D) / (float)D + eps);
        for (size_t d = 0; d < D; d++) to[d] = to[d] * rstd * (a.one + scale[d]) + shift[d];
        stat[2 * i] = mean;
        stat[2 * i + 1] = rstd;
    }
    if (amax) absmax(amax, h, rows * D);
}

// With g = dh·(one + scale) and x̂ = (x − mean)·rstd:  dx += rstd·(g − mean g − x̂·mean(g·x̂)).
static void norm_backward(float *dx, Affine d, const act *dh, const float *x, const float *stat, Affine a,
                          Rows r) {
    size_t D = r.dim;
    #pragma omp parallel for if (numbers(r) > PARALLEL)
    for (size_t row = 0; row < count_of(r); row++) {
        const float *xr = x + row * D, *dr = dh + row * D, *scale = of_sample(a.scale, row / r.n);
        float *to = dx + row * D, mean = stat[2 * row], rstd = stat[2 * row + 1], sum_g = 0.0f, sum_gx = 0.0f;
        #pragma omp simd reduction(+ : sum_g, sum_gx)
        for (size_t i = 0; i < D; i++) {
            float g = dr[i] * (a.one + scale[i]);
            sum_g += g;
            sum_gx += g * ((xr[i] - mean) * rstd);
        }
        float mean_g = sum_g / (float)D, mean_gx = sum_gx / (float)D;
        for (size_t i = 0; i < D; i++)
            to[i] += rstd * (dr[i] * (a.one + scale[i]) - mean_g - (xr[i] - mean) * rstd * mean_gx);
    }
    column_sums(d.shift, dh, NULL, NULL, r);
    column_sums(d.scale, dh, x, stat, r);
}

static void gate_backward(act *dy, PerSample dgate, const float *dx, const act *y, PerSample gate, Rows r) {
    size_t D = r.dim;
    #pragma omp parallel for if (numbers(r) > PARALLEL)
    for (size_t row = 0; row < count_of(r); row++) {
        const float *g = of_sample(gate, row / r.n), *from = dx + row * D;
        for (size_t i = 0; i < D; i++) dy[row * D + i] = g ? g[i] * from[i] : from[i];
    }
    column_sums(dgate, dx, y, NULL, r);
}

static void gather_rows(void *dst, const void *src, const int *map, size_t count, size_t row_bytes) {
    #pragma omp parallel for if (count * row_bytes > 8 * PARALLEL)
    for (size_t j = 0; j < count; j++)
        memcpy((char *)dst + j * row_bytes, (const char *)src + map[j] * row_bytes, row_bytes);
}

// Turn every pair (2p, 2p+1) of every head of a row by its angle; sign −1 turns back: the transpose.
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

static void rmsnorm_rope_forward(act *y, float *rstd, float *amax, const act *x, const float *w,
                                 const float *rope, Rows r, int heads, float eps) {
    size_t D = r.dim, head_dim = D / heads, rows = count_of(r);
    #pragma omp parallel for if (rows * D > PARALLEL)
    for (size_t i = 0; i < rows; i++) {
        const float *xr = x + i * D;
        float scale = rstd[i] = 1.0f / sqrtf(inner(xr, xr, D) / (float)D + eps);
        for (size_t d = 0; d < D; d++) y[i * D + d] = xr[d] * scale * w[d];
        if (rope) rotate(y + i * D, rope + i % r.n * head_dim, 1.0f, heads, head_dim);
    }
    if (amax) absmax(amax, y, rows * D);
}

// With g = dy turned back, times rstd:  dw += Σ g·x,  dx = g·w − x·rstd²·mean(g·w·x).
static void rmsnorm_rope_backward(act *dx, float *dw, const act *dy, const act *x, const float *rstd,
                                  const float *w, const float *rope, Rows r, int heads) {
    size_t D = r.dim, head_dim = D / heads;
    #pragma omp parallel for if (numbers(r) > PARALLEL)
    for (size_t row = 0; row < count_of(r); row++) {
        float *g = dx + row * D;
        for (size_t i = 0; i < D; i++) g[i] = dy[row * D + i] * rstd[row];
        if (rope) rotate(g, rope + row % r.n * head_dim, -1.0f, heads, head_dim);
    }
    column_sums(shared(dw), dx, x, NULL, r);
    #pragma omp parallel for if (numbers(r) > PARALLEL)
    for (size_t row = 0; row < count_of(r); row++) {
        float *g = dx + row * D;
        for (size_t i = 0; i < D; i++) g[i] *= w[i];
        float mean = inner(g, x + row * D, D) * rstd[row] * rstd[row] / (float)D;
        for (size_t i = 0; i < D; i++) g[i] -= x[row * D + i] * mean;
    }
}

// ---- attention -------------------------------------------------------------------------------------------
// QUERIES queries of one head of a sequence ask all keys at once: a task forward; backward a task does all
// queries of its head in turn. Scores stand transposed, [keys, n]: maximum, sum and exp run down the keys,
// with the queries side by side in the lanes.

// One head of one sequence in each tensor: all its keys, and at most QUERIES queries after the first `skip`.
typedef struct { Matrix q, k, v, o; float *lse; } Head;

static Head head_of(const float *q, const float *k, const float *v, const float *o, const float *lse,
                    const Sequences *s, size_t task, size_t heads, size_t dim, size_t skip) {
    size_t h = task % heads, at = h * dim, D = heads * dim, end = (size_t)s->q[task / heads + 1];
    size_t first = least(s->q[task / heads] + skip, end), n = least(QUERIES, end - first);
    size_t k0 = (size_t)s->k[task / heads], k1 = (size_t)s->k[task / heads + 1], keys = k1 - k0;
    Head t = {slice(matrix(q, end, D), first, at, n, dim), slice(matrix(k, k1, D), k0, at, keys, dim),
              slice(matrix(v, k1, D), k0, at, keys, dim), slice(matrix(o, end, D), first, at, n, dim),
              lse ? (float *)lse + first * heads + h : NULL};
    return t;
}

// P = 2^(c·s − top), c = log2(e)/√head_dim, top the maximum over the keys; o = P·v / Σ P.
static void attention_forward(act *o, float *lse, float *amax, Factor q, Factor k, const act *v,
                              const Sequences *s, int heads, int head_dim) {
    int most = longest(s->q, s->count);
    float c = (float)(M_LOG2E / sqrt((double)head_dim));
    #pragma omp parallel for collapse(2) schedule(dynamic)
    for (int task = 0; task < s->count * heads; task++)
        for (int first = 0; first < most; first += QUERIES) {
            Head t = head_of(q.x, k.x, v, o, lse, s, task, heads, head_dim, first);
            size_t n = t.q.rows, keys = t.k.rows;
            float *p = (float *)scratch(4 * n * keys), top[QUERIES], sum[QUERIES] = {0};
            Matrix P = matrix(p, keys, n);
            multiply(P, NOTHING, t.k, turned(t.q));
            for (size_t j = 0; j < n; j++) top[j] = -INFINITY;
            for (size_t i = 0; i < keys * n; i += n)
                for (size_t j = 0; j < n; j++) top[j] = c * p[i + j] > top[j] ? c * p[i + j] : top[j];
            for (size_t i = 0; i < keys * n; i += n)
                for (size_t j = 0; j < n; j++) {
                    p[i + j] = exp2_fast(c * p[i + j] - top[j]);
                    sum[j] += p[i + j];
                }
            multiply(t.o, NOTHING, turned(P), t.v);
            for (size_t j = 0; j < n && keys; j++) {
                for (size_t d = 0; d < t.o.columns; d++) t.o.p[j * t.o.down + d] /= sum[j];
                if (lse) t.lse[j * heads] = (float)((top[j] + log2((double)sum[j])) / M_LOG2E);
            }
            free(p);
        }
    if (amax) absmax(amax, o, (size_t)s->q[s->count] * heads * head_dim);
}

// With P = exp(S − lse), delta = Σ_d dout·o:
//   dv = P^T·dout,  dP = dout·v^T,  dS = P·(dP − delta)/√head_dim,  dq = dS·k,  dk = dS^T·q.
// P is computed again for QUERIES queries at a time; dk and dv are sums over them. P, dS are [keys, n].
static void attention_backward(act *dq, act *dk, act *dv, const act *dout, const act *q, const act *k,
                               const act *v, const act *o, const float *lse, const Sequences *s, int heads,
                               int head_dim) {
    double root = sqrt(head_dim);
    float scale = (float)(1 / root), c = (float)(M_LOG2E / root);
    #pragma omp parallel for schedule(dynamic)
    for (int task = 0; task < s->count * heads; task++) {
        int queries = s->q[task / heads + 1] - s->q[task / heads];
        for (int first = 0; first == 0 || first < queries; first += QUERIES) {
            Head t = head_of(q, k, v, o, lse, s, task, heads, head_dim, first);
            Head d = head_of(dq, dk, dv, dout, NULL, s, task, heads, head_dim, first);
            size_t n = t.q.rows, keys = t.k.rows;
            float *p = (float *)scratch(8 * n * keys), *ds = p + n * keys, lse2[QUERIES], delta[QUERIES];
            Matrix P = matrix(p, keys, n), dS = matrix(ds, keys, n);
            for (size_t j = 0; j < n; j++) {
                lse2[j] = (float)(M_LOG2E * t.lse[j * heads]);
                delta[j] = inner(d.o.p + j * d.o.down, t.o.p + j * t.o.down, head_dim);
            }
            multiply(P, NOTHING, t.k, turned(t.q));
            multiply(dS, NOTHING, t.v, turned(d.o));
            for (size_t i = 0; i < keys * n; i += n)
                for (size_t j = 0; j < n; j++) {
                    p[i + j] = exp2_fast(c * p[i + j] - lse2[j]);
                    ds[i + j] = p[i + j] * (ds[i + j] - delta[j]) * scale;
                }
            multiply(d.q, NOTHING, turned(dS), t.k);
            multiply(d.k, first ? d.k : NOTHING, dS, t.q);
            multiply(d.v, first ? d.v : NOTHING, P, d.o);
            free(p);
        }
    }
}

// ---- HiF8 ------------------------------------------------------------------------------------------------
static void absmax(float *m, const act *x, size_t n) {
    float top = 0.0f;
    #pragma omp parallel for simd reduction(max : top) if (n > PARALLEL)
    for (size_t i = 0; i < n; i++) top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
    *m = top;
}

static void hif8_tensor(Factor y, const act *x, size_t rows, int columns, float s, const float *m) {
    float k = hif8_scale(s, *m);
    size_t n = rows * columns;
    #pragma omp parallel for simd if (n > PARALLEL)
    for (size_t i = 0; i < n; i++) y.x[i] = hif8_round(x[i] * k) / k;
}

static bool codes_multiply(int dim, int ffn_dim) { return (void)dim, (void)ffn_dim, false; }
static bool codes_attend(int head_dim) { return (void)head_dim, false; }

// ---- pixels, words, time ---------------------------------------------------------------------------------
static void latent_to_rows(act *rows, const float *x, Grid g, size_t first, size_t n, bool channels_first) {
    size_t columns = 4 * g.C, sample = columns * g.T * g.H * g.W, count = g.B * n;
    #pragma omp parallel for if (count * columns > PARALLEL)
    for (size_t r = 0; r < count; r++)
        for (size_t i = 0; i < columns; i++)
            rows[r * columns + i] = x[r / n * sample + pixel(first + r % n, i, g, channels_first)];
}

static void rows_to_latent(float *x, const act *rows, Grid g, bool channels_first) {
    size_t columns = 4 * g.C, n = (size_t)g.T * g.H * g.W, count = g.B * n;
    #pragma omp parallel for if (count * columns > PARALLEL)
    for (size_t r = 0; r < count; r++)
        for (size_t i = 0; i < columns; i++)
            x[r / n * columns * n + pixel(r % n, i, g, channels_first)] = rows[r * columns + i];
}

static void embed_forward(act *y, const float *table, const float *pos, const int *ids, size_t rows, int L,
                          int dim) {
    size_t D = dim;
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < D; i++)
            y[r * D + i] = ids[r] < 0 ? 0.0f : table[ids[r] * D + i] + pos[r % L * D + i];
}

static void embed_backward(float *dtable, const act *dy, const int *ids, size_t rows, int vocab, int dim) {
    size_t D = dim;
    (void)vocab;
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < D && ids[r] >= 0; i++) dtable[ids[r] * D + i] += dy[r * D + i];
}

// ---- elementwise on float, reductions to the host, optimizer ---------------------------------------------
static void lincomb(float *y, float a, const float *x, float b, const float *z, size_t n) {
    #pragma omp parallel for simd if (n > PARALLEL)
    for (size_t i = 0; i < n; i++) y[i] = z ? a * x[i] + b * z[i] : a * x[i];
}

static double sum_squares(const float *x, const float *z, size_t n) {
    double sum = 0.0;
    #pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < n; i++) {
        double d = (double)x[i] - (z ? (double)z[i] : 0.0);
        sum += d * d;
    }
    return sum;
}

static double mse(float *dout, const float *out, const float *target, size_t n) {
    if (dout) lincomb(dout, 2.0f / (float)n, out, -2.0f / (float)n, target, n);
    return sum_squares(out, target, n) / (double)n;
}

// 1 − β is formed in double: of the float 0.999f it would be off by 1e-5 of itself.
static void adamw(float *w, float *m, float *v, float *ema, const float *g, size_t n, AdamW o) {
    float old1 = (float)o.beta1, old2 = (float)o.beta2, stay = (float)o.ema_decay;
    float new1 = (float)(1.0 - o.beta1), new2 = (float)(1.0 - o.beta2), fresh = (float)(1.0 - o.ema_decay);
    float rate = (float)(o.lr / (1.0 - pow(o.beta1, o.t)));
    float grow = (float)(1.0 / sqrt(1.0 - pow(o.beta2, o.t)));
    float keep = (float)(1.0 - (double)o.lr * o.weight_decay);
    #pragma omp parallel for simd if (n > PARALLEL)
    for (size_t i = 0; i < n; i++) {
        float gi = g[i] * o.gscale;
        m[i] = old1 * m[i] + new1 * gi;
        v[i] = old2 * v[i] + new2 * gi * gi;
        w[i] = keep * w[i] - rate * m[i] / (sqrtf(v[i]) * grow + o.eps);
        if (ema) ema[i] = stay * ema[i] + fresh * w[i];
    }
}
#endif
// ==========================================================================================================
// Building a model and a run: ranges, weights, buffers, index maps
// ==========================================================================================================
// The numbers of a Config, in its order: name in a checkpoint, range. The first 11 must be there.
static const struct { const char *name; int least, most; } CONFIG[] = {
    {"dim", 1, 65536}, {"ffn_dim", 1, 65536}, {"num_heads", 1, 1024}, {"num_layers", 1, 1024},
    {"num_full_blocks", 0, 1024}, {"sparse_ratio", 1, 64}, {"in_dim", 1, 65536}, {"out_dim", 1, 65536},
    {"text_dim", 1, 65536}, {"text_len", 1, 65536}, {"freq_dim", 1, 65536}, {"vocab", 0, 65536},
    {"quant", 0, 1}, {"quant_attn", 0, 1}, {"T", 0, 65536}, {"H_l", 0, 65536}, {"W_l", 0, 65536},
    {"sparse", 0, GROUP_WISE}};
enum { CONFIG_ROWS = sizeof CONFIG / sizeof *CONFIG, CONFIG_NEEDED = 11 };

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }
static int *config_field(Config *c, int i) { return (int *)(void *)((char *)c + i * sizeof(int)); }

// What numbers in their ranges must satisfy together; `where` names the file or option they came from.
static void config_check(const Config *c, const char *where) {
    int L = c->num_layers, F = c->num_full_blocks;
    if (c->dim % (2 * c->num_heads) || c->freq_dim % 2 || c->H_l % 2 || c->W_l % 2)
        die("%s: dim %d, %d heads, freq_dim %d, latent %dx%d: dim / heads and the last three must be even",
            where, c->dim, c->num_heads, c->freq_dim, c->H_l, c->W_l);
    if (F != L && (F % 4 || F > L / 2 || L % 2))
        die("%s: num_full_blocks %d of %d layers: want all, or a multiple of 4 up to half of an even number",
            where, F, L);
}

// ---- memory ----------------------------------------------------------------------------------------------
// The weights of a model lie in one piece of memory, and so do the activations of a run. A pass (model_place,
// run_place) gives every pointer its place from `base` on and returns the bytes; base NULL: it only counts.

// Each pointer whose address is given, up to NULL, gets the next `bytes` from *at on.
static void take(uintptr_t *at, size_t bytes, ...) {
    va_list pointers;
    va_start(pointers, bytes);
    for (void *p; (p = va_arg(pointers, void *)) != NULL; *at += (bytes + 255) & ~(size_t)255)
        memcpy(p, at, sizeof *at);
    va_end(pointers);
}

static void *to_device(const void *host, size_t count) {
    void *p = device_floats(count);
    upload(p, host, count * sizeof(float));
    return p;
}

// ---- weights ---------------------------------------------------------------------------------------------
// Products read a copy of a weight where it differs from the master: bfloat16, HiF8 or a LoRA. Training has
// all masters, gradients and copies; sampling no master of a matrix that has a copy. Codes are made from
// m->copy; in sampling from one room, by one matrix after another.
static size_t model_place(Model *m, void *base, bool training) {
    size_t F = sizeof(float), A = act_size(), D = m->c.dim;
    uintptr_t at = (uintptr_t)base;
    bool copies = A != F || m->c.quant || m->lora;
    act *room = NULL;
    take(&at, F, &m->amax, NULL);
    if (training) take(&at, m->count * F, &m->w, &m->dw, NULL);
    if (training && copies) take(&at, m->count * A, &m->copy, NULL);
    if (!training && coded(m)) take(&at, D * larger(D, m->c.ffn_dim) * A, &room, NULL);
    for (Param *p = m->param; p < m->param + m->params; p++) {
        bool copied = copies && !p->exact, codes = coded(m) && p->block_matrix;
        if (training) p->w = m->w + p->offset, p->dw = m->dw + p->offset;
        else if (!copied || !p->product) take(&at, p->count * F, &p->w, NULL);
        p->compute = copied ? plain(room) : exact(p->w);
        if (copied && training) p->compute.x = (act *)((char *)m->copy + p->offset * A);
        else if (copied && !codes) take(&at, p->count * A, &p->compute.x, NULL);
        if (codes) take(&at, p->count, &p->compute.code, training ? &p->compute.turned : NULL, NULL);
        if (codes) take(&at, F, &p->compute.unit, NULL);
    }
    return at - (uintptr_t)base;
}

static void model_allocate(Model *m, bool training) {
    model_place(m, device_alloc(model_place(m, NULL, training)), training);
}

// A tensor's values from the host.
static void param_set(Model *m, Param *p, const float *host) {
    float *w = p->w ? p->w : device_floats(p->count);
    upload(w, host, p->count * sizeof(float));
    if (p->compute.x && !p->compute.exact) to_act(p->compute.x, w, p->count), param_finish(m, p);
    if (!p->w) device_free(w);
}

// First weights: matrices normal with deviation 1/√in, modulation with 1/√dim, words with 1; biases 0, norms
// 1. The head is zero: an untrained model answers v = 0, the best constant.
static void model_random(Model *m, uint64_t seed) {
    for (Param *p = m->param; p < m->param + m->params; p++) {
        bool norm = p->rank == 1 && strstr(p->name, "weight"), none = p->rank == 1 || p == m->head.w;
        size_t in = p == m->words ? 1 : p->product ? p->count / p->shape[0] : (size_t)m->c.dim;
        float *host = floats(p->count), deviation = none ? 0 : (float)(1 / sqrt((double)in));
        for (size_t j = 0; j < p->count; j++)
            host[j] = norm ? 1.0f : deviation * rng_normal(seed, WEIGHT_STREAM + (p - m->param), j);
        param_set(m, p, host);
        free(host);
    }
}

// Adapters for q, k, v and o of both attentions: the eight of each block.
static void lora_new(Model *m, int rank, double alpha, uint64_t seed) {
    Lora *l = m->lora = (Lora *)xalloc(1, sizeof(Lora));
    size_t D = m->c.dim, size = rank * D, step = (size + 15) & ~(size_t)15;
    float *host = floats(size);
    l->rank = rank, l->scale = (float)(alpha / rank), l->count = 8 * m->c.num_layers;
    Param *ab = l->param = (Param *)xalloc(2 * l->count, sizeof(Param));
    l->n = 2 * l->count * step, l->w = device_floats(l->n), l->dw = device_floats(l->n);
    l->d = device_floats(size), l->sum = device_floats(D * D);
    for (Param *p = m->param; p < m->param + m->params; p++) {
        if (!p->block_matrix || !strstr(p->name, "attn")) continue;
        p->lora = ab;
        for (size_t k = 0, i = ab - l->param; k < 2; k++, i++, ab++) {  // A, then B
            int length = (int)(strlen(p->name) - strlen("weight"));
            snprintf(ab->name, sizeof ab->name, "%.*slora_%c.weight", length, p->name, "AB"[k]);
            ab->rank = 2, ab->count = size, ab->shape[k] = (size_t)rank, ab->shape[1 - k] = D;
            ab->offset = i * step, ab->w = l->w + ab->offset, ab->dw = l->dw + ab->offset;
            for (size_t j = 0; j < size; j++)
                host[j] = k ? 0 : rng_normal(seed, LORA_STREAM + i / 2, j) / (float)rank;
            upload(ab->w, host, size * sizeof(float));
        }
    }
    free(host);
}

// ---- buffers ---------------------------------------------------------------------------------------------
// A factor x[rows, D]. Codes, and what they are made from, live no longer than a branch of a block:
// all share those of `room` (NULL: it has its own). Training keeps the turned ones.
static void take_factor(uintptr_t *at, const Run *r, Factor *f, const Factor *room, size_t rows, size_t D) {
    bool codes = coded(r->m), own = !room || !codes;
    if (!own) *f = *room;
    if (own) take(at, rows * D * act_size(), &f->x, NULL);
    if (own && codes) take(at, rows * D, &f->code, NULL);
    if (codes) take(at, sizeof(float), &f->unit, NULL);
    if (codes && r->training) take(at, D * (rows + 15), &f->turned, NULL);
}

// Small buffers of several sizes get the largest's.
static void block_place(uintptr_t *at, const Run *r, Saved *s, size_t rows, size_t text) {
    const Config *c = &r->m->c;
    SavedAttention *self = &s->self, *cross = &s->cross;
    size_t D = c->dim, F = sizeof(float), A = act_size(), heads = c->num_heads, both = larger(rows, text);
    take(at, rows * D * A, &s->y, &self->q_raw, &self->k_raw, &self->q.x, &self->k.x, &self->v, &self->o,
         &self->y, &cross->q_raw, &cross->q.x, &cross->o, &cross->y, NULL);
    take(at, text * D * A, &cross->k_raw, &cross->k.x, &cross->v, NULL);
    take(at, both * larger(2, heads) * F, &s->stat1, &s->stat2, &s->stat3, &self->q_rstd, &self->k_rstd,
         &self->lse, &cross->q_rstd, &cross->k_rstd, &cross->lse, NULL);
    take(at, r->B * 6 * D * F, &s->e, NULL);
    take_factor(at, r, &s->h1, &r->g, rows, D);
    take_factor(at, r, &s->h2, &r->g, rows, D);
    take_factor(at, r, &s->h3, &r->g, rows, D);
    take_factor(at, r, &s->f, &r->g, rows, c->ffn_dim);
    s->x1 = s->x2 = s->x0, self->oq.x = self->o, cross->oq.x = cross->o;
    if (r->training) take(at, rows * D * F, &s->x1, &s->x2, NULL);
    if (r->training) take(at, rows * c->ffn_dim * A, &s->f_pre, NULL);
    if (c->quant || (r->training && spread(r, s))) take_factor(at, r, &self->oq, &r->g, rows, D);
    if (c->quant) take_factor(at, r, &cross->oq, &r->g, rows, D);
    if (!c->quant_attn || r->training || !codes_attend((int)(D / heads))) return;
    take(at, both * D, &self->q.code, &self->k.code, &cross->q.code, &cross->k.code, NULL);
    take(at, F, &self->q.unit, &self->k.unit, &cross->q.unit, &cross->k.unit, NULL);
}

// Every layout gets the rows of the largest: a pattern's, or a share of all tokens where heads are dealt out.
// Training keeps every block's activations; in sampling all blocks have the same memory, and x goes to and
// fro between dx and dx2.
static size_t run_place(Run *r, void *base) {
    const Config *c = &r->m->c;
    uintptr_t here = (uintptr_t)base, *at = &here;
    size_t B = r->B, D = c->dim, R = r->ranks->size, F = sizeof(float), A = act_size();
    size_t rows = B * larger((r->N + R - 1) / R, larger(r->n[TOKEN_WISE], r->n[GROUP_WISE]));
    size_t text = B * c->text_len, words = text * larger(D, c->text_dim) * A, both = larger(rows, text);
    size_t modulation = B * larger(6 * D, c->freq_dim) * F, widest = larger(D, c->ffn_dim);
    size_t pixels = B * r->N * 4 * larger(c->in_dim, c->out_dim) * F;
    take(at, modulation, &r->sin, &r->t1, &r->t1s, &r->e, &r->es, &r->e0, &r->head_e, &r->de, &r->de0,
         &r->de_e, &r->dhead_e, &r->dt, NULL);
    take(at, words, &r->ids, &r->text, &r->text_h, &r->context, NULL);
    take(at, pixels, &r->patches, &r->y, &r->y_all, &r->out, &r->head_stat, NULL);
    take(at, rows * D * A, &r->tokens, &r->h, NULL);
    take(at, rows * D * F, &r->dx, &r->dx2, NULL);
    if (R > 1) take(at, larger(2 * both * D * F, (R + 1) * pixels), &r->packed, NULL);
    r->context_q = plain(r->context);
    if (c->quant) take_factor(at, r, &r->context_q, NULL, text, D);
    if (coded(r->m)) take_factor(at, r, &r->g, NULL, both, widest);
    if (r->training) take(at, words, &r->text_pre, &r->dcontext, &r->dtext, NULL);
    if (r->training) take(at, both * D * A, &r->d1, &r->dout, &r->dq, &r->dk, &r->dv, NULL);
    if (r->training) take(at, rows * c->ffn_dim * A, &r->dff, NULL);
    uintptr_t begin = here;
    for (int i = 0; i <= c->num_layers; i++) {
        Saved *s = &r->saved[i];
        s->x0 = i % 2 ? r->dx2 : r->dx;
        if (r->training) take(at, rows * D * F, &s->x0, NULL);
        if (i == c->num_layers) break;
        if (!r->training) here = begin;
        block_place(at, r, s, rows, text);
    }
    return here - (uintptr_t)base;
}

// ---- a run -----------------------------------------------------------------------------------------------
// (cos, sin) for every token this rank holds in a pattern's order: [n, head_dim/2, 2]. A head's pairs are
// shared out over t, h, w; on an axis with m pairs, pair j turns by position · 10000^(−j/m).
static float *rope_table(const Pattern *p, int rank, int H, int W, int head_dim) {
    int pairs = head_dim / 2, m[3] = {pairs - 2 * (pairs / 3), pairs / 3, pairs / 3};
    size_t count = (size_t)(p->first[rank + 1] - p->first[rank]) * head_dim;
    float *host = floats(count), *out = host;
    for (int i = p->first[rank]; i < p->first[rank + 1]; i++) {
        int token = p->order[i], position[3] = {token / (H * W), token / W % H, token % W};
        for (int axis = 0; axis < 3; axis++)
            for (int j = 0; j < m[axis]; j++) {
                double angle = position[axis] * pow(10000.0, -(double)j / m[axis]);
                *out++ = (float)cos(angle), *out++ = (float)sin(angle);
            }
    }
    float *table = (float *)to_device(host, count);
    free(host);
    return table;
}

// The same `count` sequences in every sample, one after another: as long as those that q and k bound.
static Sequences sequences_new(const int *q, const int *k, int count, int B) {
    int n = B * count, *qs = (int *)xalloc(n + 1, sizeof(int)), *ks = (int *)xalloc(n + 1, sizeof(int));
    for (int i = 0; i < n; i++) {
        qs[i + 1] = qs[i] + q[i % count + 1] - q[i % count];
        ks[i + 1] = ks[i] + k[i % count + 1] - k[i % count];
    }
    Sequences s = {n, qs, ks, (int *)to_device(qs, n + 1), (int *)to_device(ks, n + 1)};
    return s;
}

static int pattern_of(const Config *c, int i) {
    int pattern = block_pattern(i, c->num_layers, c->num_full_blocks);
    return pattern != FULL && c->sparse ? c->sparse : pattern;
}

// Sizes and patterns of a batch of B samples; no buffers and no maps yet.
static Run *run_plan(Model *m, Ranks *ranks, int B, bool training) {
    const Config *c = &m->c;
    Run *r = (Run *)xalloc(1, sizeof(Run));
    int R = ranks->size;
    r->m = m, r->ranks = ranks, r->training = training;
    r->B = B, r->T = c->T, r->H = c->H_l / 2, r->W = c->W_l / 2, r->N = (size_t)r->T * r->H * r->W;
    if (!r->N || larger(r->N, c->text_len) * B > INT_MAX / 2)
        die("%d samples of %zu tokens, %d words: want 1 to %d in all", B, r->N, c->text_len, INT_MAX / 2);
    if (c->num_heads % R || r->N < (size_t)R)
        die("%d ranks cannot share %d heads and %zu tokens: use fewer ranks", R, c->num_heads, r->N);
    for (int p = 0; p < PATTERNS; p++) {
        skiparse_lengths(&r->pattern[p], p, r->T, r->H, r->W, c->sparse_ratio, R);
        r->n[p] = (size_t)(r->pattern[p].first[ranks->rank + 1] - r->pattern[p].first[ranks->rank]);
    }
    r->saved = (Saved *)xalloc(c->num_layers + 1, sizeof(Saved));
    for (int i = 0; i < c->num_layers; i++) {
        r->saved[i].pattern = pattern_of(c, i);
        r->saved[i].layout = ranks->ulysses && R > 1 ? FULL : r->saved[i].pattern;
    }
    return r;
}

// Its buffers, orders, sequences, rotary tables, positions of words. (Exchanges are built when first needed.)
static Run *run_new(Model *m, Ranks *ranks, int B, bool training) {
    const Config *c = &m->c;
    Run *r = run_plan(m, ranks, B, training);
    run_place(r, device_alloc(run_place(r, NULL)));
    for (int i = 0; i < PATTERNS; i++) {
        Pattern *p = &r->pattern[i];
        bool all = i == FULL || ranks->ulysses;  // of the pattern's sequences, of some heads
        int R = all ? 1 : ranks->size, rank = all ? 0 : ranks->rank, first = p->count * rank / R;
        int *start = p->start + first, n[] = {0, (int)r->n[i]}, words[] = {0, c->text_len};
        skiparse_order(p, i, r->T, r->H, r->W, c->sparse_ratio);
        r->self[i] = sequences_new(start, start, p->count * (rank + 1) / R - first, B);
        r->cross[i] = sequences_new(n, words, 1, B);
        r->rope[i] = rope_table(p, ranks->rank, r->H, r->W, c->dim / c->num_heads);
    }
    r->word_pos = device_floats((size_t)c->text_len * c->text_dim);
    sinusoids(r->word_pos, NULL, c->text_len, c->text_dim);
    return r;
}

// ---- what learning and sampling need beside a run --------------------------------------------------------
static void text_set(Run *r, Text text) {
    size_t rows = (size_t)r->B * r->m->c.text_len, count = rows * r->m->c.text_dim;
    if (r->m->c.vocab) {
        int *none = (int *)memset(xalloc(rows, sizeof(int)), -1, rows * sizeof(int));  // padding alone
        upload(r->ids, text.ids ? text.ids : none, rows * sizeof(int));
        free(none);
        return;
    }
    float *room = (float *)to_device(text.rows, count);
    to_act(r->text, room, count);
    device_free(room);
}

static void optimizer_init(Optimizer *o, float *w, float *dw, size_t n) {
    Optimizer fresh = {w, dw, device_floats(n), device_floats(n), device_floats(n), n, 0, 0};
    *o = fresh;
    copy(o->ema, w, n * sizeof(float));
}

static Batch batch_new(const Run *r) {
    size_t B = r->B, n = B * latent_size(r);
    Batch a = {floats(n), floats(n), device_floats(n), device_floats(n), device_floats(n),
               (int *)xalloc(B * r->m->c.text_len, sizeof(int)), (double *)xalloc(B, sizeof(double))};
    return a;
}

static void batch_upload(Run *r, const Batch *a) {
    size_t bytes = r->B * latent_size(r) * sizeof(float);
    Text text = {a->ids, NULL};
    upload(a->x_device, a->x, bytes);
    upload(a->target_device, a->target, bytes);
    text_set(r, text);
}

static Policy *policy_new(Run *make, Run *learn, const PolicyOptions *o, const TrainOptions *train) {
    Policy *p = (Policy *)xalloc(1, sizeof(Policy));
    size_t B = larger(make->B, learn->B), L = make->m->c.text_len, W = o->window, one = latent_size(make);
    size_t V = (size_t)o->prompts * o->group;
    p->o = o, p->train = train, p->make = make, p->learn = learn, p->V = (int)V;
    p->caption = (int *)xalloc(V, sizeof(int)), p->out = (Surrogate *)xalloc(B, sizeof(Surrogate));
    p->ids = (int *)xalloc((V + B) * L, sizeof(int)), p->batch_ids = p->ids + V * L;
    p->reward = (double *)xalloc((2 + W) * V + 2 * B + o->steps + 1, sizeof(double));
    p->advantage = p->reward + V, p->logp = p->advantage + V, p->batch_advantage = p->logp + W * V;
    p->batch_logp = p->batch_advantage + B, p->sigma = p->batch_logp + B;
    schedule(p->sigma, o->steps, o->shift);
    p->x = device_floats((W + 1) * V * one), p->mean_ref = device_floats(W * V * one);
    for (int i = 0; i < 5; i++) p->batch[i] = device_floats(B * one);
    return p;
}
// ==========================================================================================================
// The small world: captioned clips drawn on the fly, and ShapesBench, which scores what it sees
// ==========================================================================================================
// Caption 0..959: `a SIZE COLOR SHAPE moving DIRECTION|standing still on a BACKGROUND background`. Its clip
// x[3, T, H, W] in [-1, 1], here with H and W in pixels, follows from (caption, seed, index) alone.
enum { COLORS = 8, SHAPES = 4, BACKGROUNDS = 3, STILL = 4, CAPTIONS = 960, VOCAB = 27 };
static const char *const WORDS[VOCAB] = {
    "a", "small", "large", "red", "green", "blue", "yellow", "magenta", "cyan", "white", "orange",
    "circle", "square", "triangle", "diamond", "moving", "left", "right", "up", "down", "standing", "still",
    "on", "black", "gray", "navy", "background" };
static const float PAINT[COLORS][3] = {{0.95, 0.1, 0.1}, {0.1, 0.85, 0.15}, {0.2, 0.35, 1}, {1, 0.95, 0.1},
                                       {0.95, 0.2, 0.95}, {0.1, 0.9, 1}, {1, 1, 1}, {1, 0.55, 0.05}};
static const float GROUND[BACKGROUNDS][3] = {{0, 0, 0}, {0.4, 0.4, 0.4}, {0.05, 0.05, 0.45}};
static const float STEP[][2] = {{-1, 0}, {1, 0}, {0, -1}, {0, 1}, {0, 0}};  // (x, y), y downwards

typedef struct { int size, color, shape, motion, background; } Scene;  // in the order of WORDS
static Scene scene_of(int caption) {
    Scene s = {caption / 480, caption / 60 % 8, caption / 15 % 4, caption / 3 % 5, caption % 3};
    return s;
}

static const char *caption_text(int caption) {  // until this thread asks for the next
    static __thread char text[128];
    Scene s = scene_of(caption);
    bool still = s.motion == STILL;
    snprintf(text, sizeof text, "a %s %s %s %s %s on a %s background", WORDS[1 + s.size],
             WORDS[3 + s.color], WORDS[11 + s.shape], WORDS[still ? 20 : 15],
             WORDS[16 + still + s.motion], WORDS[23 + s.background]);
    return text;
}

static int parse_caption(const char *text) {  // −1: may be sampled, but not scored
    int caption = CAPTIONS - 1;
    while (caption >= 0 && strcasecmp(caption_text(caption), text)) caption--;
    return caption;
}

// ids[text_len] = the words of text, case ignored, then −1 for padding.
static void caption_ids(int *ids, int text_len, const char *text) {
    char word[41];
    int n = 0, length;
    for (; sscanf(text, "%40s%n", word, &length) == 1; text += length) {
        int id = 0;
        while (id < VOCAB && strcasecmp(WORDS[id], word)) id++;
        if (id == VOCAB)
            die("unknown word \"%s\" in the caption; the words are: a small|large red|green|blue|yellow|"
                "magenta|cyan|white|orange circle|square|triangle|diamond moving left|right|up|down or "
                "standing still on a black|gray|navy background", word);
        if (n == text_len) die("the caption has more than %d words; shorten it", text_len);
        ids[n++] = id;
    }
    while (n < text_len) ids[n++] = -1;
}

// A tenth (96) is never trained on: new combinations of words, each of which is often seen in training.
static bool held_out(int caption) { return rng_bits(19511, 0x48454c44, caption) % 10 == 0; }

static int held_out_caption(int start, int n) {  // the n-th on a walk through all
    for (n %= CAPTIONS / 10; n >= 0; n--)
        do start = (start + 7) % CAPTIONS; while (!held_out(start));
    return start;
}

static int training_caption(uint64_t seed, uint64_t k) { // the first of draw k that is not held out
    int caption;
    k <<= 8;
    do caption = rng_bits(seed, CAPTION_STREAM, k++) % CAPTIONS; while (held_out(caption));
    return caption;
}

// ---- drawing: lengths in pixels; a shape has the area πr² and its centre of mass at its position ---------
static float clamp01(float v) { return v > 0 ? (v < 1 ? v : 1) : 0; }  // NaN becomes 0
static float length_of(float x, float y) { return sqrtf(x * x + y * y); }
static float shape_radius(int size, int H, int W) { return (size ? 0.205f : 0.13f) * (H < W ? H : W); }

// How far pixel i is outside a shape at (x, y).
static inline float shape_distance(int shape, float r, float x, float y, size_t i, int W) {
    float dx = i % W + 0.5f - x, dy = i / W + 0.5f - y, ax = fabsf(dx), ay = fabsf(dy);
    if (shape == 0) return length_of(dx, dy) - r;
    if (shape == 1) return (ax > ay ? ax : ay) - 0.88623f * r;                // half a side: √π/2·r
    if (shape == 3) return 0.70711f * (ax + ay) - 0.88623f * r;               // the square on its corner
    return fmaxf(dy, 0.86603f * ax - 0.5f * dy) - 0.77756f * r;               // apex up, inradius √(π/√27)·r
}

// How far a shape of r = 1 reaches from its centre: sideways, up, down.
static const float REACH[SHAPES][3] = {{1, 1, 1}, {0.88623, 0.88623, 0.88623},
    {1.34677, 1.55512, 0.77756}, {1.25331, 1.25331, 1.25331}};

// Pixels a frame; slower where the way would not fit with a pixel to spare.
static float full_speed(int H, int W) { return 1 + (H < W ? H : W) / 64.0f; }
static float scene_speed(Scene s, int T, int H, int W) {
    const float *reach = REACH[s.shape], speed = full_speed(H, W), r = shape_radius(s.size, H, W);
    float way = s.motion < 2 ? W - 2 - 2 * r * reach[0] : H - 2 - r * (reach[1] + reach[2]);
    return T < 2 || speed * (T - 1) <= way ? speed : fmaxf(way, 0) / (T - 1);
}

// x[3, T, H, W] = the caption's clip; (seed, index) name the draw of its place.
static void draw_clip(float *x, int caption, uint64_t seed, uint64_t index, int T, int H, int W) {
    Scene s = scene_of(caption);
    float r = shape_radius(s.size, H, W), speed = scene_speed(s, T, H, W), start[2], velocity[2];
    for (int i = 0; i < 2; i++) {  // x, then y: anywhere that keeps the way inside
        velocity[i] = speed * STEP[s.motion][i];
        float way = velocity[i] * (T - 1);
        float low = 1 + r * REACH[s.shape][i] - fminf(way, 0), u = rng_uniform(seed, 0x504c41, 2 * index + i);
        float high = (i ? H : W) - 1 - r * REACH[s.shape][2 * i] - fmaxf(way, 0);
        start[i] = low < high ? low + u * (high - low) : (low + high) / 2;
    }
    size_t frame = (size_t)H * W, plane = T * frame;
    for (size_t i = 0; i < plane; i++) {
        float t = i / frame, cx = start[0] + velocity[0] * t, cy = start[1] + velocity[1] * t;
        float cover = clamp01(0.5f - shape_distance(s.shape, r, cx, cy, i % frame, W));
        for (int c = 0; c < 3; c++) {
            float ground = GROUND[s.background][c], paint = PAINT[s.color][c];
            x[c * plane + i] = 2 * ground - 1 + cover * 2 * (paint - ground);
        }
    }
}

// ---- ShapesBench: pixels in, seven scores out ------------------------------------------------------------
enum { N_SCORES = 7 };
static const char *const SCORE_NAMES[] = {"color", "shape", "size", "motion", "background", "consistency",
                                          "smoothness", "total"};

// What a frame shows. BACK (the border), COLOR and PLACE (the object): weighted means of pixels' red, green,
// blue, x, y; then the sum of weights, RING (its share of the border) and AREA. AT: x and y of PLACE. FIT:
// intersection over union with each shape of this area, there. FOUND: 1 if one clear object is there; if not,
// all that follow are 0. VELOCITY and QUALITY: of a whole clip.
enum { BACK, RING = 5, FOUND, COLOR, PLACE = 13, AT = 16, AREA = 18, FIT, TIME = 23, VELOCITY, QUALITY = 26 };
typedef float Look[28];

static float color_distance(const float a[3], const float b[3]) {
    float red = a[0] - b[0], green = a[1] - b[1], blue = a[2] - b[2];
    return sqrtf(red * red + green * green + blue * blue);
}

// A frame, whose colors are a plane apart, in four passes: the border's color; again, without what differs
// from it; the object's color: the pixels that differ most say most; its place, by its share of each pixel.
// Here edges are 1.75 times as steep, so that noise on the background counts for nothing.
static void look_at(Look look, const float *x, size_t plane, int H, int W) {
    static const int INTO[] = {BACK, BACK, COLOR, PLACE};
    int n = H * W;
    float *weight = floats(n), contrast = 0, small = shape_radius(0, H, W), large = shape_radius(1, H, W);
    for (int pass = 0; pass < 4; pass++) {
        float sum[6] = {0, 0, 0, 0, 0, 0}, *mean = look + INTO[pass];
        for (int i = 0; i < n; i++) {
            float pixel[6] = {0, 0, 0, i % W + 0.5f, i / W + 0.5f, 1};
            for (int c = 0; c < 3; c++) pixel[c] = clamp01(0.5f + 0.5f * x[c * plane + i]);
            bool border = i % W % (W - 1) == 0 || i / W % (H - 1) == 0;
            float d = color_distance(pixel, look + BACK);
            weight[i] = pass == 3 ? clamp01(1.75f * d / contrast - 0.375f) : pass == 2 ? d * d * d * d
                      : border && (pass == 0 || d <= 0.3f);
            for (int k = 0; k < 6; k++) sum[k] += weight[i] * pixel[k];
        }
        for (int k = 0; k < 5 && sum[5] > 0; k++) mean[k] = sum[k] / sum[5];
        mean[5] = sum[5];
        contrast = color_distance(look + COLOR, look + BACK);
    }
    bool clear = contrast >= 0.2f && look[AREA] >= 1.2f * small * small && look[AREA] <= 8 * large * large;
    for (int shape = 0; shape < SHAPES; shape++) {
        float r = sqrtf(look[AREA] / (float)M_PI), both = 0, area = 0;
        for (int i = 0; i < n; i++) {
            float model = clamp01(0.5f - 1.75f * shape_distance(shape, r, look[AT], look[AT + 1], i, W));
            area += model;
            both += fminf(model, weight[i]);
        }
        look[FIT + shape] = both / (look[AREA] + area - both);
        if (clear && look[FIT + shape] > 0.4f) look[FOUND] = 1;
    }
    look[RING] /= 2 * (H + W) - 4;
    if (!look[FOUND]) memset(look + COLOR, 0, sizeof(Look) - COLOR * sizeof(float));
    free(weight);
}

// The mean of a clip's frames; from COLOR on, of those with an object. VELOCITY: the slope of the
// least-squares line through AT. QUALITY: consistency, how little color, area and shape differ from the mean;
// smoothness, how small the path's second differences are beside one step.
static void watch(Look mean, const float *x, int T, int H, int W) {
    Look *looks = (Look *)xalloc(T, sizeof(Look));
    float spread = 0, *velocity = mean + VELOCITY, *quality = mean + QUALITY;
    for (int t = 0; t < T; t++) {
        look_at(looks[t], x + (size_t)t * H * W, (size_t)T * H * W, H, W);
        looks[t][TIME] = t * looks[t][FOUND];
        for (int k = 0; k <= TIME; k++) mean[k] += looks[t][k];
    }
    for (int k = TIME; k >= 0; k--) mean[k] /= k > FOUND ? fmaxf(mean[FOUND], 1) : T;     // still a sum
    for (int t = 0; t < T; t++) {
        const float *now = looks[t];
        if (!now[FOUND]) continue;
        float dt = t - mean[TIME], bend[2], shape = 0;
        float paint = color_distance(now + COLOR, mean + COLOR), area = fabsf(logf(now[AREA] / mean[AREA]));
        for (int i = 0; i < 2; i++) velocity[i] += dt * now[AT + i];
        for (int k = FIT; k < FIT + SHAPES; k++) shape = fmaxf(shape, fabsf(now[k] - mean[k]));
        spread += dt * dt;
        quality[0] += clamp01(1.2f - paint - area - 2 * shape) / T;  // 0.2: what pixels may do
        if (t < 2 || !looks[t - 1][FOUND] || !looks[t - 2][FOUND]) continue;
        for (int i = 0; i < 2; i++) bend[i] = now[AT + i] - 2 * looks[t - 1][AT + i] + looks[t - 2][AT + i];
        quality[1] += clamp01(1.2f - length_of(bend[0], bend[1]) / full_speed(H, W));
    }
    for (int i = 0; i < 2 && spread > 0; i++) velocity[i] /= spread;
    quality[1] = T > 2 ? quality[1] / (T - 2) : mean[FOUND];
    free(looks);
}

// How much nearer to rgb the palette's entry `asked` is than any other: 0..1, above 1/2 if it is the nearest.
static float color_margin(const float (*palette)[3], int count, const float rgb[3], int asked) {
    float other = 1e9f, own = color_distance(rgb, palette[asked]);
    for (int i = 0; i < count; i++)
        if (i != asked) other = fminf(other, color_distance(rgb, palette[i]));
    return other / (own + other);
}

// score[7] in 0..1. Hard (what `osp eval` reports): is the asked word the nearest to what is seen? Soft (the
// reward of GRPO): the same measurements as slopes, above 1/2 on the right side, so that better pays.
static void shapes_score(float score[N_SCORES], const float *x, int caption, int T, int H, int W, bool soft) {
    float small = shape_radius(0, H, W), large = shape_radius(1, H, W), other = 0;
    Scene asked = scene_of(caption), saw = {0, 0, 0, 0, 0};
    Look look = {0};
    watch(look, x, T, H, W);
    const float *v = look + VELOCITY, *step = STEP[asked.motion], fit = look[FIT + asked.shape];
    for (int k = 0; k < SHAPES; k++) {
        if (k != asked.shape) other = fmaxf(other, look[FIT + k]);
        if (look[FIT + k] > look[FIT + saw.shape]) saw.shape = k;
    }
    saw.size = look[AREA] > (float)M_PI * small * large;  // the geometric mean of both areas
    int axis = fabsf(v[0]) <= fabsf(v[1]);
    saw.motion = 2 * axis + (v[axis] > 0);
    if (fabsf(v[axis]) < 0.5f * scene_speed(saw, T, H, W)) saw.motion = STILL;
    float color = color_margin(PAINT, COLORS, look + COLOR, asked.color);
    float back = color_margin(GROUND, BACKGROUNDS, look + BACK, asked.background);
    float r = asked.size ? large : small, speed = scene_speed(asked, T, H, W);
    float off = fabsf(logf(fmaxf(look[AREA], 1e-3f) / ((float)M_PI * r * r))), gap = 2 * logf(large / small);
    float miss = length_of(v[0] - speed * step[0], v[1] - speed * step[1]);    // 2·speed: the opposite way
    float pace = clamp01(1.05f - (speed > 0 ? miss / (2 * speed) : 0));
    float seen = soft || look[FOUND] >= 0.5f ? look[FOUND] : 0;
    float form = clamp01(0.5f + 6 * (fit - other)) * clamp01(1.5f * fit);
    score[0] = seen * (soft ? clamp01(1.2f * color) : color > 0.5f);
    score[1] = seen * (soft ? form : saw.shape == asked.shape);
    score[2] = seen * (soft ? clamp01(1.1f - off / gap) : saw.size == asked.size);
    score[3] = seen * (soft ? pace * pace : saw.motion == asked.motion);
    score[4] = look[RING] * (soft ? clamp01(1.2f * back) : back > 0.5f);
    score[5] = look[QUALITY], score[6] = look[QUALITY + 1];
}

// ---- what training and GRPO ask of the world -------------------------------------------------------------
// Sample b of a batch: a caption's words and its clip x0 at σ, with noise k of a seed.
static void sample_fill(Batch *a, const Run *r, int b, int caption, double sigma, uint64_t seed, uint64_t k) {
    int L = r->m->c.text_len;
    size_t size = latent_size(r);
    float *x = a->x + b * size, *target = a->target + b * size;
    draw_clip(x, caption, seed, k, r->T, 2 * r->H, 2 * r->W);
    caption_ids(a->ids + b * L, L, caption_text(caption));
    a->t[b] = 1000 * sigma;
    for (size_t i = 0; i < size; i++) {
        float noise = rng_normal(seed, NOISE_STREAM, k * size + i), x0 = x[i];
        x[i] = (float)sigma * noise + (float)(1 - sigma) * x0;
        target[i] = noise - x0;
    }
}

static void batch_fill(Batch *a, Run *r, const TrainOptions *o, int step) {
    int L = r->m->c.text_len;
    #pragma omp parallel for schedule(static)
    for (int b = 0; b < r->B; b++) {
        uint64_t k = (uint64_t)step * r->B + b;
        double sigma = 1 / (1 + exp(-(double)rng_normal(o->seed, SIGMA_STREAM, k)));
        sigma = shift_sigma(sigma, train_shift(r->H * r->W));
        sample_fill(a, r, b, training_caption(o->seed, k), sigma, o->seed, k);
        if (rng_uniform(o->seed, DROP_STREAM, k) < o->drop) caption_ids(a->ids + b * L, L, "");
    }
    batch_upload(r, a);
}

// reward: the name of a soft score; "all": their mean; "red": how red the clip is, which rewards hacking.
static double reward_of(const float *x, int caption, const Run *r, const char *reward) {
    size_t n = r->N * 4;
    double red = 0, sum = 0;
    float score[N_SCORES];
    for (size_t i = 0; i < n; i++) red += (x[i] - 0.5 * (x[n + i] + x[2 * n + i])) / (2.0 * n);
    if (!strcmp(reward, "red")) return red;
    shapes_score(score, x, caption, r->T, 2 * r->H, 2 * r->W, true);
    for (int s = 0; s < N_SCORES; s++) {
        if (!strcmp(reward, SCORE_NAMES[s])) return score[s];
        sum += score[s];
    }
    return sum / N_SCORES;
}
// ==========================================================================================================
// Ranks' plumbing: MPI, and what is built of one transfer
// ==========================================================================================================
static const char *const PURPOSE_NAME[] = {"exchange (SSP)", "Ulysses", "full<->sparse", "gradients",
                                           "HiF8 maxima", "output", "guidance"};
static int world_rank, ranks_here = 1;  // this process among all; how many run on this machine

#ifdef OSP_MPI
#ifndef _OPENMP
static int omp_get_num_procs(void) { return 1; }
static void omp_set_num_threads(int n) { (void)n; }
#endif
static MPI_Comm sample_ranks = MPI_COMM_WORLD, guidance_pair;
static MPI_Comm ranks_of(int purpose) { return purpose == GUIDANCE ? guidance_pair : sample_ranks; }

// The transfer itself, between buffers in host memory.
static void mpi_all_to_all(void *to, const void *from, const int *receive, const int *send, bool same,
                           size_t row_bytes, int R, int purpose) {
    int *send_at = (int *)xalloc(2 * R, sizeof(int)), *receive_at = send_at + R;
    MPI_Datatype row;
    for (int s = 1; s < R; s++) {
        send_at[s] = same ? 0 : send_at[s - 1] + send[s - 1];
        receive_at[s] = receive_at[s - 1] + receive[s - 1];
    }
    MPI_Type_contiguous((int)row_bytes, MPI_BYTE, &row);
    MPI_Type_commit(&row);
    MPI_Alltoallv(from, send, send_at, row, to, receive, receive_at, row, ranks_of(purpose));
    MPI_Type_free(&row);
    free(send_at);
}

// The largest of all ranks' numbers.
static uint64_t max_of_ranks(uint64_t x) {
    MPI_Allreduce(MPI_IN_PLACE, &x, 1, MPI_UINT64_T, MPI_MAX, sample_ranks);
    return x;
}

static void ranks_start(Ranks *k) {
    MPI_Comm here;
    int level;
    MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &level);
    MPI_Comm_rank(MPI_COMM_WORLD, &world_rank);
    MPI_Comm_size(MPI_COMM_WORLD, &k->size);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &here);
    MPI_Comm_size(here, &ranks_here);
    k->rank = world_rank, k->halves = 1;
    int cores = omp_get_num_procs() / ranks_here;  // shared evenly, unless OMP_NUM_THREADS is set
    if (!getenv("OMP_NUM_THREADS")) omp_set_num_threads(cores > 1 ? cores : 1);
}

// All ranks of the world -> `halves` groups of size/halves ranks.
static void ranks_split(Ranks *k, int halves) {
    int R = k->size / halves;
    k->size = R, k->rank = world_rank % R, k->half = world_rank / R, k->halves = halves;
    MPI_Comm_split(MPI_COMM_WORLD, k->half, world_rank, &sample_ranks);
    MPI_Comm_split(MPI_COMM_WORLD, k->rank, world_rank, &guidance_pair);
}

static void ranks_end(int error) {
    if (error) MPI_Abort(MPI_COMM_WORLD, error);
    else MPI_Finalize();
}
#else
static void mpi_all_to_all(void *to, ...) { (void)to; }  // one rank has no one to call it for
static uint64_t max_of_ranks(uint64_t x) { return x; }
static void ranks_start(Ranks *k) { k->size = k->halves = 1; }
static void ranks_split(Ranks *k, int halves) { (void)k, (void)halves; }
static void ranks_end(int error) { (void)error; }
#endif

#ifndef OSP_CUDA
#define device_all_to_all mpi_all_to_all     // osp_cuda.cu has its own between cards' memories
#endif

static void all_to_all(Ranks *k, void *to, const void *from, const int *receive, const int *send, bool same,
                       size_t row_bytes, int purpose) {
    int R = purpose == GUIDANCE ? k->halves : k->size, me = purpose == GUIDANCE ? k->half : k->rank;
    wait_device();  // so that the time is the transfer's alone
    double begin = seconds();
    device_all_to_all(to, from, receive, send, same, row_bytes, R, purpose);
    k->time[purpose] += seconds() - begin;
    k->calls[purpose]++;
    for (int s = 0; s < R; s++)
        if (s != me) k->bytes[purpose] += send[s] * row_bytes;
}

// Each rank adds up one slice, in rank order: every run gives the same bytes. Then all gather the slices.
static void sum_over_ranks(Ranks *k, float *x, size_t n, bool only_first) {
    size_t R = k->size;
    if (R == 1) return;
    if (n > INT_MAX) die("%zu gradients are more than MPI's counts hold: train fewer, or on one rank", n);
    int *slice = (int *)xalloc(2 * R, sizeof(int)), *mine = slice + R;  // mine: R times this rank's
    float *parts = device_floats(n + R);
    for (size_t s = 0; s < R; s++) slice[s] = (int)(n * (s + 1) / R - n * s / R);
    for (size_t s = 0; s < R; s++) mine[s] = slice[k->rank];
    all_to_all(k, parts, x, mine, slice, false, sizeof(float), GRADIENTS);
    for (size_t s = 1; s < R; s++) lincomb(parts, 1, parts, 1, parts + s * mine[s], mine[s]);
    all_to_all(k, x, parts, slice, mine, true, sizeof(float), GRADIENTS);
    if (only_first && k->rank > 0) zero(x, n * sizeof(float));
    device_free(parts);
    free(slice);
}

static void max_over_ranks(Ranks *k, float *m) {
    uint32_t most;  // floats from 0 on are ordered as their bits are
    if (k->size == 1) return;
    download(&most, m, sizeof most);
    double begin = seconds();
    most = (uint32_t)max_of_ranks(most);
    k->time[MAXIMA] += seconds() - begin;
    k->calls[MAXIMA]++, k->bytes[MAXIMA] += (k->size - 1) * sizeof most;
    upload(m, &most, sizeof most);
}

// A line for each purpose that was used: what this rank sent to others.
static void ranks_report(const Ranks *k) {
    for (int p = 0; p < PURPOSES; p++)
        if (k->calls[p])
            fprintf(stderr, "rank %d, %s: %zu calls, %.3f MB sent, %.3f s\n", k->rank, PURPOSE_NAME[p],
                    k->calls[p], (double)k->bytes[p] / 1e6, k->time[p]);
}

// Chained onto h, eight bytes at a time.
static uint64_t hash_bytes(const void *data, size_t size, uint64_t h) {
    for (size_t i = 0; i < size; i += 8) {
        uint64_t word = 0;
        memcpy(&word, (const uint8_t *)data + i, size - i < 8 ? size - i : 8);
        h = (h ^ word) * 0x9E3779B97F4A7C15ull;
        h ^= h >> 29;
    }
    return h;
}

// All ranks must read the same bytes and have the same settings, or stop as one.
static void ranks_agree(const Ranks *k, uint64_t hash) {
    if (k->size > 1 && max_of_ranks(hash) != ~max_of_ranks(~hash))  // the largest and the smallest
        die("ranks have different settings or files: start all alike on the same files");
}
// ==========================================================================================================
// Tools: errors, memory, random numbers, time
// ==========================================================================================================
static void output_abandon(void);  // what was being written is removed

// One line that says what, where and what to do; exit code 2 (bad use or bad input).
static void die(const char *format, ...) {
    char line[8192];
    va_list args;
    if (world_rank > 0) sleep(2);     // rank 0's abort ends the others before they repeat its message
    output_abandon();
    va_start(args, format);
    fflush(stdout);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    for (char *c = line; *c; c++) if (iscntrl((uint8_t)*c)) *c = ' ';  // one line, whatever is in it
    fprintf(stderr, "osp: %s\n", line);
    ranks_end(2);
    exit(2);
}

static void *xalloc(size_t count, size_t size) {
    void *p = calloc(count ? count : 1, size ? size : 1);
    if (!p) die("out of memory: %zu x %zu bytes asked for; use a smaller size or batch", count, size);
    return p;
}

static float *floats(size_t n) { return (float *)xalloc(n, sizeof(float)); }
static float *device_floats(size_t n) { return (float *)device_alloc(n * sizeof(float)); }

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static uint64_t rng_bits(uint64_t seed, uint64_t stream, uint64_t index) {
    uint64_t z = seed * 0x9E3779B97F4A7C15ull + stream * 0xD1B54A32D192ED03ull + 0x8CB92BA72F3D8DD7ull;
    for (uint64_t round = 0; round < 2; round++) {  // splitmix64's finaliser; the index comes second
        z += round * (index + 1) * 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        z ^= z >> 31;
    }
    return z;
}

static double rng_uniform(uint64_t seed, uint64_t stream, uint64_t index) {
    return ((double)(rng_bits(seed, stream, index) >> 11) + 0.5) * 0x1p-53;
}

static float rng_normal(uint64_t seed, uint64_t stream, uint64_t index) {  // Box-Muller
    double u = rng_uniform(seed, stream, 2 * index), v = rng_uniform(seed, stream, 2 * index + 1);
    return (float)(sqrt(-2.0 * log(u)) * cos(2 * M_PI * v));
}

static void show_progress(const char *what, int step, int steps, double began) {
    double left = step ? (seconds() - began) / step * (steps - step) : 0;
    fprintf(stderr, "\r\033[K%s %d/%d, %d:%02d left ", what, step, steps, (int)left / 60, (int)left % 60);
}
// ==========================================================================================================
// Files and checkpoints: written whole or not at all; safetensors in and out
// ==========================================================================================================

// An output grows in PATH.tmp, locked against a second run, and takes PATH's place when all of it is on the
// disk: a stopped program leaves the old file or the new one.
typedef struct {
    char path[PATH_MAX], target[PATH_MAX], temp[PATH_MAX + 4];
    FILE *file;  // NULL: not open
} Output;
static Output outputs[4];                         // no run has more open at a time
static char output_error[PATH_MAX + 200];         // what the last failure was

static void output_abandon(void) {  // for who ends a run early, the handler of a signal too
    for (Output *o = outputs; o < outputs + 4; o++) if (o->file) unlink(o->temp);
}

static Output *output_fail(const char *path, const char *why) {
    const char *format = "cannot write '%s' (%.99s): mend that, or choose another path";
    snprintf(output_error, sizeof output_error, format, path, why);
    return NULL;
}

// Claims path until output_close; NULL where it cannot be written. What stands there is not touched.
static Output *output_open(const char *path) {
    struct stat old, opened, named;
    Output *o = outputs;
    for (int i = 0; i < 4; i++) if (outputs[i].file && !strcmp(outputs[i].path, path)) return &outputs[i];
    while (o->file) o++;
    snprintf(o->path, sizeof o->path, "%s", path);
    if (!realpath(path, o->target)) strcpy(o->target, o->path);  // a link stays
    snprintf(o->temp, sizeof o->temp, "%s.tmp", o->target);
    bool exists = !lstat(o->target, &old);
    bool fit = exists ? S_ISREG(old.st_mode) && (old.st_mode & 0222) && !access(path, W_OK) : *path != 0;
    if (!fit) return output_fail(path, "no plain file, or read-only");
    int fd = open(o->temp, O_WRONLY | O_CREAT | O_NOFOLLOW | O_NONBLOCK, 0666);
    if (fd < 0) return output_fail(path, strerror(errno));
    bool busy = flock(fd, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK;
    bool gone = fstat(fd, &opened) || lstat(o->temp, &named) || opened.st_ino != named.st_ino;
    if (busy || gone || ftruncate(fd, 0)) return close(fd), output_fail(path, "another run is writing it");
    if (exists) fchmod(fd, old.st_mode & 0777);
    signal(SIGXFSZ, SIG_IGN);  // beyond a limit on file sizes fwrite fails
    o->file = fdopen(fd, "wb");
    return o;
}

static void check_writable(const char *path) { if (!output_open(path)) die("%s", output_error); }
static void output_bytes(Output *o, const void *data, size_t size) { fwrite(data, 1, size, o->file); }

// why: what is wrong with the content, or NULL. Returns NULL, or why the old file still stands there.
static const char *output_close(Output *o, const char *why) {
    FILE *f = o->file;
    errno = 0;
    if (!why && (fflush(f) || ferror(f) || fsync(fileno(f)) || rename(o->temp, o->target)))
        why = errno ? strerror(errno) : "the disk is full, or fails";
    if (why) output_fail(o->path, why), unlink(o->temp);
    fclose(f), o->file = NULL;
    int folder = open(dirname(o->temp), O_RDONLY);  // it must remember the new name
    fsync(folder), close(folder);
    return why ? output_error : NULL;
}

// ---- safetensors -----------------------------------------------------------------------------------------
// Eight bytes hold n; then come n bytes of JSON, the header, and then the data:
//
//    {"__metadata__":{"dim":"64",..}, "NAME":{"dtype":"BF16","shape":[64,64],"data_offsets":[0,8192]}, ..}
//
// Whoever wrote the file, nothing outside it is read: each tensor lies in the data, together they have its
// size, and may begin at any byte. HiF8 is a U8 tensor of codes and an F32 NAME.scale = k: a value is
// hif8(code)/k, exactly Q(x; 15). Little-endian machines only.
enum Dtype { F32, BF16, I32, U8, DTYPE_COUNT };
static const char *const DTYPE_NAME[] = {"F32", "BF16", "I32", "U8"};
static const size_t DTYPE_BYTES[] = {4, 2, 4, 1};

typedef struct {
    const char *name, *text;  // text: a string of __metadata__; NULL: a tensor
    enum Dtype dtype;
    int rank;
    size_t shape[8], count, bytes;
    const uint8_t *data;  // data[bytes] are `count` values
} Entry;

typedef struct {
    const char *path;
    uint8_t *map, *data;  // map[size] is the file, data[bytes] its end
    size_t size, bytes;
    Entry *entry;
    int count;
    char *header, *at;  // a copy in which strings end in 0; its reader's place
} File;

static Entry *file_find(const File *f, const char *name) {
    for (Entry *e = f->entry; e < f->entry + f->count; e++) if (!strcmp(e->name, name)) return e;
    return NULL;
}

static const char *file_meta(const File *f, const char *key) {
    const Entry *e = file_find(f, key);
    return e ? e->text : NULL;
}

// Steps over `form` where it comes next: $ is a string, # a number, all else itself; white space may stand
// between. A string stays as it is written. The 0 at the header's end stops every step.
static bool json(File *f, const char *form, ...) {
    char *at = f->at;
    va_list args;
    va_start(args, form);
    for (; *form; form++) {
        at += strspn(at, " \t\n\r");
        if (*form == '#' ? !isdigit((uint8_t)*at) : *at != (*form == '$' ? '"' : *form)) break;
        if (*form == '#') *va_arg(args, size_t *) = strtoull(at, &at, 10);
        else at++;
        if (*form != '$') continue;
        *va_arg(args, const char **) = at;
        for (; *at != '"' && !iscntrl((uint8_t)*at); at++) if (*at == '\\' && !iscntrl((uint8_t)at[1])) at++;
        if (*at != '"') break;
        *at++ = 0;
    }
    va_end(args);
    if (!*form) f->at = at;
    return !*form;
}

static bool json_tensor(File *f, Entry *t) {
    size_t at[2];
    const char *dtype;
    double size = 1;  // a double holds any product
    int d = 0;
    if (!json(f, "{\"dtype\":$,\"shape\":[", &dtype)) return false;
    while (t->rank < 8 && json(f, "#", &t->shape[t->rank]) && ++t->rank && json(f, ",")) {}
    if (!json(f, "],\"data_offsets\":[#,#]}", &at[0], &at[1])) return false;
    while (d < DTYPE_COUNT && strcmp(dtype, DTYPE_NAME[d])) d++;
    if (d == DTYPE_COUNT || at[0] > at[1] || at[1] > f->bytes) return false;
    for (int i = 0; i < t->rank; i++) size *= (double)t->shape[i];
    t->dtype = (enum Dtype)d, t->data = f->data + at[0], t->bytes = at[1] - at[0];
    t->count = t->bytes / DTYPE_BYTES[d];
    return (double)t->bytes == size * (double)DTYPE_BYTES[d];
}

// The header, and in it __metadata__.
static bool json_object(File *f, bool metadata) {
    if (!json(f, "{")) return false;
    if (json(f, "}")) return true;
    do {
        Entry *e = &f->entry[f->count];
        if (!json(f, "$:", &e->name)) return false;
        bool inner = !metadata && !strcmp(e->name, "__metadata__");
        if (!inner && (file_find(f, e->name) || f->count++ == 10000)) return false;
        bool good = inner ? json_object(f, true) : metadata ? json(f, "$", &e->text) : json_tensor(f, e);
        if (!good) return false;
    } while (json(f, ","));
    return json(f, "}");
}

static void file_lost(int n) { die("a file became shorter while it was read (signal %d); copy it again", n); }
static void file_close(File *f) { free(f->header), free(f->entry), munmap(f->map, f->size); }

static void file_open(File *f, const char *path) {
    struct stat s;
    uint64_t n = 0;
    memset(f, 0, sizeof *f);
    f->path = path;
    int fd = open(path, O_RDONLY | O_NONBLOCK);  // a pipe must not stop it
    if (fd < 0 || fstat(fd, &s)) die("%s: %s; check the path", path, strerror(errno));
    f->size = S_ISREG(s.st_mode) ? (size_t)s.st_size : 0;
    f->map = (uint8_t *)mmap(NULL, f->size, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    signal(SIGBUS, file_lost);
    if (f->map != MAP_FAILED && f->size > 8) memcpy(&n, f->map, 8);
    if (n < 2 || n > 100000000 || n > f->size - 8)
        die("%s: not a safetensors file, or cut short to %zu bytes; copy it again", path, f->size);
    f->data = f->map + 8 + n, f->bytes = f->size - 8 - n;
    f->header = f->at = (char *)xalloc(n + 1, 1);
    f->entry = (Entry *)xalloc(n / 5 + 1, sizeof(Entry));  // one takes at least 5 characters: "":""
    memcpy(f->header, f->map + 8, n);
    bool good = json_object(f, false);
    for (int i = 0; i < f->count; i++) n += f->entry[i].bytes;
    if (!good || n != f->size - 8)
        die("%s, byte %zd: want F32, BF16, I32 and U8 that fill the file", path, f->at - f->header + 8);
}

// The values of t, which the caller frees. NaN and Inf are refused.
static float *file_read(const File *f, const Entry *t) {
    float k = t->dtype == U8 ? 0 : 1, value[256], *out = floats(t->count);
    char name[320];
    snprintf(name, sizeof name, "%.300s.scale", t->name);
    const Entry *scale = file_find(f, name);
    if (t->dtype == U8 && scale && scale->dtype == F32 && scale->bytes == 4) memcpy(&k, scale->data, 4);
    if (t->dtype == I32 || !(k > 0 && isfinite(k)))
        die("%s: tensor %.99s: found I32, or U8 without a .scale above 0; export it again", f->path, t->name);
    for (int code = 0; code < 256; code++) value[code] = hif8_decode((uint8_t)code) / k;
    for (size_t i = 0; i < t->count; i++) {
        if (t->dtype == U8) out[i] = value[t->data[i]];
        else if (t->dtype == F32) memcpy(&out[i], t->data + 4 * i, 4);
        else memcpy((char *)&out[i] + 2, t->data + 2 * i, 2);  // the upper half of a float
        if (!isfinite(out[i])) die("%s: tensor %.99s has %g; use an earlier file", f->path, t->name, out[i]);
    }
    return out;
}

static char *shape_text(char text[200], int rank, const size_t *shape) {  // [64, 3, 2]
    char *end = text + sprintf(text, "[");
    for (int i = 0; i < rank; i++) end += sprintf(end, "%s%zu", i ? ", " : "", shape[i]);
    return strcpy(end, "]"), text;
}

// In a file of f32, bf16 or hif8. Vectors and tables are small and matter: they stay F32.
static enum Dtype stored_as(const Param *p, const char *dtype) {
    if (!strcmp(dtype, "hif8") && p->block_matrix) return U8;
    return strcmp(dtype, "f32") && p->product ? BF16 : F32;
}

// The data of p; false where file_read would refuse a value. Bytes take the place of floats.
static bool write_values(Output *o, const Param *p, const float *values, enum Dtype dtype) {
    float *x = floats(p->count), amax = 0, most = bits_float(dtype == BF16 ? 0x7F7F7FFF : 0x7F7FFFFF);
    download(x, values, p->count * sizeof(float));
    for (size_t i = 0; i < p->count; i++) amax = fabsf(x[i]) <= most ? fmaxf(amax, fabsf(x[i])) : INFINITY;
    float k = hif8_scale(15.0f, amax);
    for (size_t i = 0; i < p->count; i++) {
        uint32_t u = float_bits(x[i]);
        if (dtype == BF16) u = (u + 0x7FFF + (u >> 16 & 1)) >> 16;   // ties to even
        if (dtype == U8) u = hif8_encode(x[i] * k);
        memcpy((uint8_t *)x + DTYPE_BYTES[dtype] * i, &u, 4);
    }
    output_bytes(o, x, p->count * DTYPE_BYTES[dtype]);
    if (dtype == U8) output_bytes(o, &k, 4);
    free(x);
    return amax <= most;
}

// A file of param[count], whose values lie in an arena (NULL: where each w points), and of metadata, printed
// as "key":"value" pairs of JSON. NULL, or why it is not written.
static const char *file_write(const char *path, const Param *param, int count, const float *arena,
                              const char *dtype, const char *metadata, ...) {
    Output *o = output_open(path);
    static const char FORM[] = ",\n\"%s%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}";
    va_list args;
    size_t n = 0, at = 0;
    char shape[200];
    bool finite = true;
    if (!o) return output_error;
    output_bytes(o, &n, 8);  // not known yet
    fprintf(o->file, "{\"__metadata__\":{");
    va_start(args, metadata);
    vfprintf(o->file, metadata, args);
    va_end(args);
    fprintf(o->file, "}");
    for (const Param *p = param; p < param + count; p++) {
        enum Dtype d = stored_as(p, dtype);
        size_t end = at + p->count * DTYPE_BYTES[d];
        fprintf(o->file, FORM, p->name, "", DTYPE_NAME[d], shape_text(shape, p->rank, p->shape), at, end);
        if (d == U8) fprintf(o->file, FORM, p->name, ".scale", "F32", "[1]", end, end + 4);
        at = d == U8 ? end + 4 : end;
    }
    fprintf(o->file, "}%*s", (int)(7 - ftell(o->file) % 8), "");     // the data begins at a multiple of 8
    n = (size_t)ftell(o->file) - 8;
    for (const Param *p = param; p < param + count; p++)
        finite &= write_values(o, p, arena ? arena + p->offset : p->w, stored_as(p, dtype));
    fseek(o->file, 0, SEEK_SET);
    output_bytes(o, &n, 8);
    return output_close(o, finite ? NULL : "a value is NaN or too large for its type; lower --lr");
}

// ---- checkpoints: tensors under the names of spec §2, the config in the metadata -------------------------
static double number_in(const char *where, const char *name, const char *text, double least, double most,
                        bool whole) {
    char *end;
    double v = strtod(text, &end);
    if (end == text || *end || !(v >= least && v <= most) || (whole && v != floor(v)))
        die("%s %s: \"%.40s\"; want a %snumber from %.16g to %.16g", where, name, text,
            whole ? "whole " : "", least, most);
    return v;
}

// standard: where the key is missing; "": it must be there. Where `least` is whole the value must be, too.
static double meta_number(const File *f, const char *key, const char *standard, double least, double most) {
    const char *text = file_meta(f, key);
    if (!text && !*standard) die("%s: its metadata has no %s; see what it is: osp info", f->path, key);
    return number_in(f->path, key, text ? text : standard, least, most, least == floor(least));
}

static Config config_read(const File *f) {
    Config c;
    for (int i = 0; i < CONFIG_ROWS; i++)
        *config_field(&c, i) = (int)meta_number(f, CONFIG[i].name, i < CONFIG_NEEDED ? "" : "0",
                                                CONFIG[i].least, CONFIG[i].most);
    c.eps = meta_number(f, "eps", "1e-6", 1e-12, 0.1);
    config_check(&c, f->path);
    if (c.in_dim != c.out_dim || (c.vocab && (c.vocab < VOCAB || c.in_dim != 3)))
        die("%s: want in_dim = out_dim, and with a vocab 3 of them and %d words", f->path, VOCAB);
    return c;
}

// param[count], of a model, of its adapters or of a run's state, must be all that the file holds.
static void weights_check(const Param *param, int count, const File *f) {
    size_t used = 0;
    for (const Param *p = param; p < param + count; p++) {
        char want[200], have[200] = "missing";
        const Entry *t = file_find(f, p->name);
        if (t) shape_text(have, t->rank, t->shape);
        if (strcmp(shape_text(want, p->rank, p->shape), have))
            die("%s: tensor %s is %s, expected %s; export it again", f->path, p->name, have, want);
        used += t->bytes + (t->dtype == U8 ? 4 : 0);  // codes have a scale
    }
    if (used != f->bytes) die("%s: other tensors are there, too; export it again", f->path);
}

static void weights_read(Model *m, Param *param, int count, const File *f) {  // m NULL: a run's state
    weights_check(param, count, f);
    for (Param *p = param; p < param + count; p++) {
        const Entry *t = file_find(f, p->name);
        float *host = file_read(f, t);
        p->codes = t->dtype == U8;
        param_set(m, p, host);
        free(host);
    }
}

// weights: m->w, or their moving average.
static const char *model_save(const char *path, const Model *m, const float *weights, const char *dtype) {
    char text[1024], *end = text;
    for (int i = 0; i < CONFIG_ROWS; i++)
        end += sprintf(end, "\"%s\":\"%d\",", CONFIG[i].name, *config_field((Config *)&m->c, i));
    return file_write(path, m->param, m->params, weights, dtype, "%s\"eps\":\"%.9g\"", text, m->c.eps);
}

// A LoRA on its own: the names peft gives, rank and alpha in the metadata.
static const char *lora_save(const char *path, const Lora *l, const float *weights) {
    return file_write(path, l->param, 2 * l->count, weights, "f32",
                      "\"lora_rank\":\"%d\",\"lora_alpha\":\"%.9g\"", l->rank, (double)l->scale * l->rank);
}

static void lora_load(Model *m, const char *path) {
    File f;
    file_open(&f, path);
    int rank = (int)meta_number(&f, "lora_rank", "", 1, m->c.dim / 2);
    if (f.bytes < (size_t)16 * rank * m->c.num_layers * m->c.dim)
        die("%s: too small for rank %d on this model; give an adapter of this model", path, rank);
    lora_new(m, rank, meta_number(&f, "lora_alpha", "", 1e-6, 1e6), 0);
    weights_read(m, m->lora->param, 2 * m->lora->count, &f);
    file_close(&f);
}

// The state of a training run, beside its output: weights, moments, average, step, and the run's settings, so
// that only the same run continues from it. A resumed run continues bit for bit.
static Param *state_params(const Optimizer *o) {
    static const char *const NAMES[] = {"train.w", "train.m", "train.v", "train.ema"};
    static Param p[4];
    float *const arenas[] = {o->w, o->m, o->v, o->ema};
    for (int i = 0; i < 4; i++) {
        strcpy(p[i].name, NAMES[i]);
        p[i].rank = 1, p[i].shape[0] = p[i].count = o->n, p[i].w = arenas[i];
    }
    return p;
}

static const char *state_save(const char *path, const Optimizer *o, const char *run) {
    return file_write(path, state_params(o), 4, NULL, "f32",
                      "\"run\":\"%s\",\"step\":\"%d\",\"update\":\"%d\"", run, o->step, o->update);
}

static bool state_load(const char *path, Optimizer *o, const char *run) {
    File f;
    if (access(path, F_OK)) return false;
    file_open(&f, path);
    const char *of = file_meta(&f, "run");
    if (!of || strcmp(of, run))
        die("%s: of a run with other settings (%.300s); remove it or choose another -o", path, of ? of : "");
    o->step = (int)meta_number(&f, "step", "", 0, INT_MAX);
    o->update = (int)meta_number(&f, "update", "", 0, INT_MAX);
    weights_read(NULL, state_params(o), 4, &f);
    file_close(&f);
    return true;
}
// ==========================================================================================================
// Pictures: clips as an animated PNG and as a sheet of their frames
// ==========================================================================================================
#include <arpa/inet.h>  // htonl: PNG has the most significant byte first
#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STBIW_ASSERT(ok) ((ok) ? (void)0 : die("out of memory for a picture; use smaller or fewer clips"))
#if __has_include(<stb/stb_image_write.h>)
#include <stb/stb_image_write.h>  // Debian, Ubuntu: apt install libstb-dev
#else
#include <stb_image_write.h>
#endif

// Clips x[count][3, T, H, W] in [-1, 1] with their captions; a pixel is drawn as scale x scale pixels.
typedef struct { int T, H, W, count, scale; float **x; const char *const *captions; } Clips;

typedef struct { size_t width, height; uint8_t *rgb; } Picture;  // rgb[height, width, 3]
static uint8_t *pixel_at(const Picture *p, size_t x, size_t y) { return p->rgb + 3 * (y * p->width + x); }

// The letters a to z, 5x7 pixels: 7 characters each, one a row, whose pixels are the bits of c − '0'.
static const char FONT[] =
    "00>1?A?@@FIAAN00>@@A>11=CAA?00>AO@>698L88800?A?1>@@FIAAA40<444>20622B<@@BDHDB<44444>00JEEAA"
    "00FIAAA00>AAA>00NAN@@00=C?1100FI@@@00>@>1N88L889600AAAC=00AAA:400AAEE:00A:4:A00AA?1>00O248O";

static void draw_text(Picture *p, size_t x, size_t y, const char *text) {
    for (; *text && x + 6 < p->width; text++, x += 6)
        for (int i = 0; i < 35 && isalpha((unsigned char)*text); i++) {
            int row = FONT[7 * (tolower(*text) - 'a') + i / 5] - '0';
            if (row >> (4 - i % 5) & 1) memset(pixel_at(p, x + i % 5, y + i / 5), 0xE8, 3);
        }
}

// Before sampling: the larger picture is the sheet, see below.
static void check_pictures(const Clips *k) {
    double width = fmax(k->T * (k->W * k->scale + 4.0), 392), height = k->count * (k->H * k->scale + 17.0);
    if (3 * width * height > INT_MAX / 2)
        die("a picture of %.0fx%.0f pixels is too large; use smaller or fewer clips", width, height);
}

// An animation: for every frame a row of all clips; the file will hold these rows one after the other. Or a
// sheet: for every clip a row of all frames, with gaps and its caption above.
static Picture picture_draw(const Clips *k, bool sheet) {
    size_t width = k->W * k->scale, height = k->H * k->scale, gap = sheet ? 4 : 0, title = sheet ? 13 : 0;
    size_t columns = sheet ? k->T : k->count, rows = sheet ? k->count : k->T;
    Picture p = {columns * (width + gap) + gap, rows * (title + height + gap) + gap, NULL};
    if (sheet) p.width = larger(p.width, 392);
    p.rgb = (uint8_t *)xalloc(p.height, 3 * p.width);
    for (size_t i = 0; i < 3 * p.height * p.width; i++) p.rgb[i] = "\x20\x20\x24"[i % 3];
    for (size_t i = 0; i < rows * columns; i++) {
        size_t row = i / columns, column = i % columns, t = sheet ? column : row, clip = sheet ? row : column;
        size_t left = gap + column * (width + gap), top = gap + title + row * (title + height + gap);
        if (sheet) draw_text(&p, gap, top - 11, k->captions[clip]);
        for (size_t j = 0; j < 3 * width * height; j++) {
            size_t x = j / 3 % width, y = j / 3 / width, line = (j % 3 * k->T + t) * k->H + y / k->scale;
            float v = k->x[clip][line * k->W + x / k->scale];
            pixel_at(&p, left + x, top + y)[j % 3] = 255 * clamp01(0.5f + 0.5f * v) + 0.5f;
        }
    }
    return p;
}

// A PNG is a signature, then chunks of length, name, data, CRC. body: name and data.
static void png_chunk(Output *o, void *body, size_t size) {
    uint32_t length = htonl(size - 4), crc = htonl(stbiw__crc32((uint8_t *)body, size));
    output_bytes(o, &length, 4);
    output_bytes(o, body, size);
    output_bytes(o, &crc, 4);
}

// stb makes a PNG of each frame: 33 bytes of signature and IHDR, then IDAT, then 12 of IEND. An animation is
// an APNG: viewers without it show the first IDAT; the others become fdAT. The comment is a tEXt chunk.
static const char *save_png(const char *path, const Clips *k, bool sheet, const char *comment) {
    Picture p = picture_draw(k, sheet);
    Output *o = output_open(path);
    int frames = sheet ? 1 : k->T, width = p.width, height = p.height / frames, size;
    uint32_t animation[] = {htonl(0x6163544C), htonl(frames), 0};  // acTL: is played 0 times, for ever
    uint32_t control[] = {htonl(0x6663544C), 0, htonl(width), htonl(height), 0, 0, htonl(1 << 16 | 8), 0};
    uint32_t data[] = {htonl(0x66644154), 0};  // fdAT, before it fcTL: a number; at (0, 0), 1/8 s
    char text[2000];
    int used = snprintf(text, sizeof text, "tEXtosp%c%.1900s", 0, comment);
    stbi_write_force_png_filter = 0;  // none
    for (int t = 0; t < frames; t++) {
        uint8_t *png = stbi_write_png_to_mem(pixel_at(&p, 0, (size_t)t * height), 0, width, height, 3, &size);
        STBIW_ASSERT(png);
        control[1] = htonl(t ? 2 * t - 1 : 0), data[1] = htonl(2 * t);
        if (t == 0) {
            output_bytes(o, png, 33);
            png_chunk(o, text, used);
            if (frames > 1) png_chunk(o, animation, 12);
        }
        if (frames > 1) png_chunk(o, control, 30);
        if (t == 0) output_bytes(o, png + 33, size - 45);
        else png_chunk(o, memcpy(png + 33, data, 8), size - 49);  // for IDAT and its length
        if (t == frames - 1) output_bytes(o, png + size - 12, 12);
        free(png);
    }
    free(p.rgb);
    return output_close(o, NULL);
}
// ==========================================================================================================
// Commands
// ==========================================================================================================
// ---- options: one table says which commands take what, its default, range and help -----------------------
enum { MOST_CAPTIONS = 16 };
typedef struct {                             // what a command is told
    char command;                            // its first letter; T: train --preset toy
    bool training;
    const char *weights, *lora, *preset, *embeddings, *noise, *dtype, *out, *device, *sparse;
    char state[PATH_MAX + 16], *settings;    // a stopped run resumes from this file, if these are the same
    const char *captions[MOST_CAPTIONS];
    int captions_said, seed, steps, clips, soft, json, frames, height, width, full, full_blocks, hif8;
    int rank, every;
    double alpha, guidance, shift, save;
    TrainOptions train;
    PolicyOptions policy;
} Options;
static Options said;

typedef struct {
    const char *commands, *name;             // letters of the commands that take it
    char kind;                               // i int, d double, b switch, s text, f file, c choice, m many
    void *value;
    const char *text;  // what is said; at first the default, a/b: one for each command
    double least, most;
    const char *help;  // of a choice: "f32|bf16|hif8: ..."
} Option;

// An argument without a name is the value of the command's first row.
static Option OPTIONS[] = {
    {"s", "-p", 'm', said.captions, NULL, 0, 0, "what to draw, in quotes; several: side by side"},
    {"ise", "-w", 'f', &said.weights, NULL, 0, 0, "checkpoint; info: any file of osp"},
    {"tTg", "--init", 'f', &said.weights, NULL, 0, 0, "checkpoint to start from; train can do without"},
    {"tT", "--preset", 'c', &said.preset, "tiny", 0, 0, "tiny|toy: 4 frames of 16x16, or 8 of 32x32"},
    {"se", "--lora", 'f', &said.lora, NULL, 0, 0, "adapter from osp grpo, merged while loading"},
    {"s", "--text", 'f', &said.embeddings, NULL, 0, 0, "for a model without words, of weights_export.py"},
    {"s", "--noise", 'f', &said.noise, NULL, 0, 0, "start from tensor `noise` of this file"},
    {"sg", "-n", 'i', &said.steps, "20/8", 1, 1000, "sampling steps (paper: 50; grpo: 25)"},
    {"e", "-n", 'i', &said.clips, "96", 1, 100000, "clips"},
    {"e", "--steps", 'i', &said.steps, "20", 1, 1000, "sampling steps"},
    {"tTg", "--steps", 'i', &said.train.steps, "1300/5000/40", 0, 1e8, "AdamW steps; of grpo: updates"},
    {"etT", "--batch", 'i', &said.train.batch, "8/8/64", 1, 65536, "clips at a time"},
    {"g", "--prompts", 'i', &said.policy.prompts, "8", 1, 1024, "captions an update (released recipe: 2)"},
    {"g", "--group", 'i', &said.policy.group, "8", 2, 1024, "videos of a caption (paper: 4)"},
    {"g", "--micro", 'i', &said.policy.micro, "2", 1, 1024, "videos of an AdamW step (released recipe: 2)"},
    {"g", "--window", 'i', &said.policy.window, "2", 1, 127, "so many SDE steps at the start (paper: 10)"},
    {"seg", "-g", 'd', &said.guidance, "4/4/3", 0, 100, "guidance (paper: 5); 1: none"},
    {"seg", "--shift", 'd', &said.shift, "3/3/1", 0.01, 100, "shift of the schedule (paper: 7; grpo: 1)"},
    {"g", "--clip", 'd', &said.policy.clip, "5e-3", 1e-9, 1, "range of the ratio (code: 5e-3; 14B: 1e-4)"},
    {"g", "--beta", 'd', &said.policy.beta, "0.004", 0, 1e6, "weight of the KL (paper: 0.004)"},
    {"g", "--reward", 'c', &said.policy.reward, "all", 0, 0,
     "all|color|shape|size|motion|background|consistency|smoothness|red: scores' mean, one score, redness"},
    {"g", "--rank", 'i', &said.rank, "8", 1, 1024, "of the LoRA (paper: 32)"},
    {"g", "--alpha", 'd', &said.alpha, "16", 1e-6, 1e6, "of the LoRA (paper: 64)"},
    {"tTg", "--lr", 'd', &said.train.lr, "3e-3/2e-3/5e-4", 0, 10, "first learning rate (GRPO paper: 2e-5)"},
    {"tT", "--warmup", 'i', &said.train.warmup, "100/200", 0, 1e8, "steps of rising learning rate"},
    {"tTg", "--ema", 'd', &said.train.ema, "0.99/0.999/0.9", 0, 0.99999, "decay of the average written"},
    {"tT", "--drop", 'd', &said.train.drop, "0.1", 0, 1, "share of captions left out (paper: 0.1)"},
    {"stTge", "--seed", 'i', &said.seed, "1", 0, INT_MAX, "of weights, captions, clips, noise"},
    {"stT", "--frames", 'i', &said.frames, "0", 0, 4096, "of a clip; 0: as trained"},
    {"stT", "--height", 'i', &said.height, "0", 0, 16384, "in pixels; 0: as trained"},
    {"stT", "--width", 'i', &said.width, "0", 0, 16384, "in pixels; 0: as trained"},
    {"stTge", "--full", 'b', &said.full, NULL, 0, 1, "full attention in every block"},
    {"stTge", "--full-blocks", 'i', &said.full_blocks, "-1", -1, 1024, "so many at the ends; -1: as trained"},
    {"tT", "--sparse", 'c', &said.sparse, NULL, 0, 0, "both|token|group: kinds of sparse blocks (a trial)"},
    {"stTge", "--hif8", 'b', &said.hif8, NULL, 0, 1, "8 bits: HiF8 linear layers and attention"},
    {"stTge", "--device-dtype", 's', &said.device, NULL, 0, 0, "a GPU's arithmetic: f32, or else bf16"},
    {"e", "--soft", 'b', &said.soft, NULL, 0, 1, "the continuous scores that GRPO is rewarded with"},
    // up to here the settings, which a resumed run must have in common with the stopped one
    {"s", "-o", 's', &said.out, "out.png", 0, 0, "NAME.png (and NAME_sheet.png), or NAME.safetensors"},
    {"tTg", "-o", 's', &said.out, NULL, 0, 0, "must be given: checkpoint, or adapter, to write"},
    {"tT", "--dtype", 'c', &said.dtype, "f32", 0, 0, "f32|bf16|hif8: what the file holds"},
    {"tTg", "--save", 'd', &said.save, "15", 0, 1e9, "seconds between saved states, for resuming"},
    {"g", "--eval", 'i', &said.every, "0", 0, 1e6, "updates between held-out scores; 0: none"},
    {"se", "--json", 'b', &said.json, NULL, 0, 1, "figures as one JSON object on the last line"}, {}};

static void one_of(const char *name, const char *value, const char *choices) {    // "f32|bf16|hif8: ..."
    char *rest = strndup(choices, strcspn(choices, ":"));
    while (rest) if (!strcmp(strsep(&rest, "|"), value)) return;
    die("%s: \"%.40s\" is none of %s", name, value, choices);
}

static void option_set(Option *o, const char *text) {
    bool number = strchr("idb", o->kind);
    double v = number ? number_in("option", o->name, text, o->least, o->most, o->kind != 'd') : 0;
    if (o->kind == 'c') one_of(o->name, text, o->help);
    if (o->kind == 'd') *(double *)o->value = v;
    else if (number) *(int *)o->value = (int)v;
    else if (o->kind != 'm') *(const char **)o->value = text;
    else if (!strchr(text + strspn(text, " "), ' ')) die("-p \"%.60s\": want a sentence, in quotes", text);
    else if (said.captions_said == MOST_CAPTIONS) die("more than %d captions: run again", MOST_CAPTIONS);
    else said.captions[said.captions_said++] = text;
    o->text = text;
}

__attribute__((noreturn)) static void finish(int code) {
    if (fflush(stdout) || ferror(stdout)) die("cannot write to stdout: %s; mend that", strerror(errno));
    ranks_end(0);
    exit(code);
}

static bool asks_help(const char *text) { return !strcmp(text, "-h") || !strcmp(text, "--help"); }

// The command's rows come to the table's front, with its defaults: of "a/b" the one that stands where the
// command's letter does. Then argv from after its name on is read.
static void parse_options(int argc, char **argv, const char *example) {
    Option *o, *end = OPTIONS;
    for (o = OPTIONS; o->name; o++) {
        const char *letter = strchr(o->commands, said.command);
        char *rest = o->text ? strdup(o->text) : NULL;
        if (!letter) continue;
        for (const char *c = o->commands; c <= letter && rest; c++) o->text = strsep(&rest, "/");
        if (o->text) option_set(o, o->text);
        *end++ = *o;
    }
    end->name = NULL;
    for (int i = 0; i < argc; i++) {
        bool plain = *argv[i] != '-', help = asks_help(argv[i]);
        if (help) printf("example: %s\n", example);
        for (o = OPTIONS; o->name && help; o++)
            printf(o->text ? "  %-15s %s [%s]\n" : "  %-15s %s\n", o->name, o->help, o->text);
        if (help) finish(0);
        for (o = OPTIONS; o->name && !plain && strcmp(o->name, argv[i]);) o++;
        if (!o->name) die("unknown option \"%.60s\"; -h lists the options", argv[i]);
        const char *text = plain ? argv[i] : o->kind == 'b' ? "1" : argv[++i];
        if (!text || !*text) die("%s needs a value; -h lists the options", o->name);
        if (o->kind == 'f' && o->text) die("%s %.60s: it is %.60s already", o->name, text, o->text);
        option_set(o, text);
    }
}

// ---- what the commands share -----------------------------------------------------------------------------
// dim ffn heads layers full ratio in out text_dim text_len freq vocab quant quant_attn T H_l W_l sparse
static const Config PRESETS[] = {
    {64, 256, 4, 8, 4, 2, 3, 3, 64, 12, 64, VOCAB, 0, 0, 4, 16, 16, 0, 1e-6},
    {128, 512, 4, 12, 4, 2, 3, 3, 64, 12, 128, VOCAB, 0, 0, 8, 32, 32, 0, 1e-6}};

static bool speaks(const Ranks *k) { return k->rank == 0 && k->half == 0; }

// All ranks must be told and read the same. Then their groups: all on one sample, or two guidance halves.
static void ranks_arrange(Ranks *k, const Options *o, const Config *c) {
    int P2 = c->sparse_ratio * c->sparse_ratio, guided = !o->training && o->guidance != 1;
    int halves = P2 % k->size && guided ? 2 : 1;
    ranks_agree(k, hash_bytes(o->settings, strlen(o->settings), 0));
    if (k->size % halves || P2 % (k->size / halves))
        die("%d ranks: want a divisor of P^2 = %d, or (guidance, not training) twice one", k->size, P2);
    ranks_split(k, halves);
}

// As trained, or as asked. A model without words makes Wan's latents: a quarter of the frames (the first is
// alone), an eighth of height and width.
static void config_override(Config *c, const Options *o) {
    int side = c->vocab ? 2 : 16, frames = c->vocab ? 1 : 4;  // of a patch, of a latent
    if (o->height % side || o->width % side || (o->frames && (o->frames - 1) % frames))
        die("--frames %d --height %d --width %d: sides must be multiples of %d, frames less 1 one of %d",
            o->frames, o->height, o->width, side, frames);
    if (!c->T) c->T = 21, c->H_l = 90, c->W_l = 160;  // 81 frames of 1280x720
    if (o->frames) c->T = (o->frames - 1) / frames + 1;
    if (o->height) c->H_l = o->height / side * 2;
    if (o->width) c->W_l = o->width / side * 2;
    if (o->full_blocks >= 0) c->num_full_blocks = o->full_blocks;
    if (o->full) c->num_full_blocks = c->num_layers;
    if (o->hif8) c->quant = c->quant_attn = 1;
    if (o->sparse) c->sparse = *o->sparse == 'b' ? 0 : *o->sparse == 't' ? TOKEN_WISE : GROUP_WISE;
    config_check(c, "--full-blocks");
}

// What a run of B samples will take, and beside it one that samples `beside` (0: none): said and refused
// before any of it is asked for.
static void plan_memory(Model *m, Ranks *k, int B, int beside, bool training) {
    Run *plan = run_plan(m, k, B, training);
    double machine = device_memory() / ranks_here, GiB = 0x1p30;
    double weights = (double)model_place(m, NULL, training), run = (double)run_place(plan, NULL);
    if (beside) run += (double)run_place(run_plan(m, k, beside, false), NULL);
    if (training) weights += m->lora ? 20.0 * m->lora->n : 12.0 * m->count;  // moments, average; adapter
    if (speaks(k))
        fprintf(stderr, "memory: weights%s %.3f GiB + activations %.3f GiB; %d x %zu tokens\n",
                training ? ", gradients, moments" : "", weights / GiB, run / GiB, B, plan->N);
    if (weights + run > machine)
        die("%.1f GiB are more than this machine's %.1f; use a smaller size or batch, or more machines",
            (weights + run) / GiB, machine / GiB);
}

// A command's run of B samples (one of `beside` is to follow), its model from a checkpoint or a preset.
static Run *run_open(const Options *o, Ranks *k, int B, int beside) {
    Config c = PRESETS[o->command == 'T'];
    File f;
    if (!o->weights && !o->preset) die("no checkpoint given: -w FILE, grpo --init FILE; osp train makes one");
    if (o->weights) file_open(&f, o->weights), c = config_read(&f);
    if (o->command != 's' && (!c.vocab || !c.T)) die("%s: want a model that osp train made", o->weights);
    if (o->rank > c.dim / 2) die("--rank %d: at most half of dim %d", o->rank, c.dim);
    config_override(&c, o);
    device_start(o->device, k->rank);
    ranks_arrange(k, o, &c);
    Model *m = model_layout(&c);
    if (o->weights) weights_check(m->param, m->params, &f);  // before anything is allocated
    if (o->lora) lora_load(m, o->lora);
    if (o->rank) lora_new(m, o->rank, o->alpha, o->seed);
    plan_memory(m, k, B, beside, o->training);
    model_allocate(m, o->training);
    if (o->weights) weights_read(m, m->param, m->params, &f), file_close(&f);
    else model_random(m, o->seed);
    Run *r = run_new(m, k, B, o->training);
    r->show = !o->training && speaks(k) && isatty(2);
    return r;
}

// ---- a run that learns, and may have been stopped before: its state is kept beside its output ------------
static volatile sig_atomic_t learning, stopped;  // to be ended after a step; the signal that asked for it
static double began_at, saved_at;  // when learning began; when the state was saved last

static void stop(int number) {  // a second one ends the program at once
    if (!learning || stopped) output_abandon(), _exit(128 + number);
    stopped = number;
}

// What is learned: the adapter or the whole model, from the state of a stopped run on, if there is one.
static void learning_start(Optimizer *opt, Model *m, const Options *o, Ranks *k) {
    if (m->lora) optimizer_init(opt, m->lora->w, m->lora->dw, m->lora->n);
    else optimizer_init(opt, m->w, m->dw, m->count);
    if (state_load(o->state, opt, o->settings) && speaks(k))
        fprintf(stderr, "resumed from %s at step %d\n", o->state, opt->step);
    ranks_agree(k, (uint64_t)opt->step);
    began_at = saved_at = seconds();
    learning = 1;
}

// Between steps: saves the state now and then, and where a rank is to stop; without `more` to do the output.
static bool learning_more(bool more, const Optimizer *opt, const Model *m, const Options *o, Ranks *k) {
    int asked = (int)max_of_ranks((uint64_t)stopped);
    if (speaks(k) && more && (asked || seconds() - saved_at > o->save)) {
        const char *why = state_save(o->state, opt, o->settings);
        if (why && asked) die("%s; %s may hold an earlier step", why, o->state);
        if (why) fprintf(stderr, "warning: %s; the run goes on and tries again\n", why);
        if (asked) printf("stopped at step %d; run the same command to go on\n", opt->step);
        saved_at = seconds();
    }
    if (more && asked) {
        output_abandon();
        finish(128 + asked);
    }
    if (more || !speaks(k)) return more;
    const char *why = m->lora ? lora_save(o->out, m->lora, opt->ema)
                              : model_save(o->out, m, opt->ema, o->dtype);
    if (why) why = strdup(why);
    const char *lost = why ? state_save(o->state, opt, o->settings) : NULL;
    if (why) die("%s; %s %s", why, o->state, lost ? "may hold an earlier step" : "holds the last step");
    unlink(o->state);
    printf("wrote %s: %d steps, %.1f s\n", o->out, opt->step, seconds() - began_at);
    return false;
}

// ---- osp sample ------------------------------------------------------------------------------------------
static float *tensor_of(const char *path, const char *name, size_t count) {
    File f;
    file_open(&f, path);
    const Entry *t = file_find(&f, name);
    if (!t || t->count != count) die("%s: want a tensor %s of %zu numbers", path, name, count);
    float *x = file_read(&f, t);
    file_close(&f);
    return x;
}

// clip[count], one behind the other on the host: of a caption each or of --text, each alone in its batch.
static void sample_clips(float **clip, Run *r, const Options *o, int count) {
    const Config *c = &r->m->c;
    size_t size = latent_size(r), L = c->text_len;
    float *x = o->noise ? tensor_of(o->noise, "noise", count * size) : floats(count * size);
    int *ids = (int *)xalloc(count * L, sizeof(int));
    Text cond = {ids, NULL}, uncond = NO_TEXT;
    for (int i = 0; i < count && c->vocab; i++) caption_ids(ids + i * L, (int)L, o->captions[i]);
    if (!c->vocab) cond.rows = tensor_of(o->embeddings, "text_cond", L * c->text_dim);
    if (!c->vocab) uncond.rows = tensor_of(o->embeddings, "text_uncond", L * c->text_dim);
    if (!o->noise) noise_fill(x, count * size, o->seed, SAMPLE_STREAM, 0);
    for (int i = 0; i < count; i++) {
        clip[i] = x + i * size;
        sample(r, clip[i], cond, uncond, o->steps, o->shift, o->guidance);
        cond.ids += L;
    }
}

// Tensor latent: x[C, T, 2H, 2W]; of several captions [count, C, T, 2H, 2W].
static const char *save_latents(const Options *o, const float *x, int count, const Run *r) {
    int shape[] = {count, r->m->c.out_dim, r->T, 2 * r->H, 2 * r->W};
    static Param p;
    strcpy(p.name, "latent");
    for (int i = count == 1; i < 5; i++) p.shape[p.rank++] = (size_t)shape[i];
    p.count = count * latent_size(r), p.w = device_floats(p.count);
    upload(p.w, x, p.count * sizeof(float));
    return file_write(o->out, &p, 1, NULL, "f32", "\"comment\":\"%s\"", o->settings);
}

static void cmd_sample(const Options *o, Ranks *k) {
    const char *end = strrchr(o->out, '.'), *why;
    bool latent = end && !strcmp(end, ".safetensors");
    char sheet[PATH_MAX];
    if (!latent && (!end || strcmp(end, ".png"))) die("-o %s: want NAME.png or NAME.safetensors", o->out);
    snprintf(sheet, sizeof sheet, "%.*s_sheet.png", (int)(end - o->out), o->out);
    if (!latent && k->rank == 0) check_writable(sheet);
    Run *r = run_open(o, k, 1, 0);
    int vocab = r->m->c.vocab, count = vocab ? o->captions_said : 1;
    if (!count) die("no caption given: osp sample \"a small green square moving up on a navy background\"");
    if (!vocab && (!o->embeddings || !latent)) die("this model wants --text FILE and -o NAME.safetensors");
    if (vocab && o->embeddings) die("--text: this model has words of its own; give captions");
    float *clip[MOST_CAPTIONS];
    Clips clips = {r->T, 2 * r->H, 2 * r->W, count, r->W <= 8 ? 8 : r->W <= 32 ? 4 : 1, clip, o->captions};
    if (!latent) check_pictures(&clips);
    double began = seconds();
    sample_clips(clip, r, o, count);
    double took = seconds() - began;
    if (!speaks(k)) return;
    why = latent ? save_latents(o, clip[0], count, r) : save_png(o->out, &clips, false, o->settings);
    if (!latent && !why) why = save_png(sheet, &clips, true, o->settings);
    if (why) die("%s", why);
    for (int i = 0; i < count && vocab; i++) {
        float score[N_SCORES];
        int caption = parse_caption(o->captions[i]);
        if (caption < 0) continue;  // none of the world's
        shapes_score(score, clip[i], caption, r->T, 2 * r->H, 2 * r->W, false);
        printf("%s:", o->captions[i]);
        for (int s = 0; s < N_SCORES; s++) printf(" %s %.0f", SCORE_NAMES[s], 100 * (double)score[s]);
        printf("\n");
    }
    printf("wrote %s: seed %d, %d steps, %.2f s\n", o->out, o->seed, o->steps, took);
    if (o->json) printf("{\"seconds\": %.4f, \"steps\": %d, \"clips\": %d}\n", took, o->steps, count);
}

// ---- osp eval: ShapesBench on captions that training never saw -------------------------------------------
typedef struct { double mean, error; } Figure;  // over clips; its standard error

static void figures(Figure *f, const double *v, int count, int clips) {  // v[clips, count]
    for (int k = 0; k < count; k++) {
        double sum = 0, squares = 0;
        for (const double *at = v + k; at < v + clips * count; at += count) sum += *at, squares += *at * *at;
        f[k].mean = sum / clips;
        f[k].error = clips > 1 ? sqrt(fmax(squares / clips - f[k].mean * f[k].mean, 0) / (clips - 1)) : 0;
    }
}

// score[N_SCORES + 1]: percent, the last of the total, of `clips` samples made r->B at a time.
static void evaluate(Figure *score, Run *r, int clips, int steps, double shift, double guidance,
                     uint64_t seed, bool soft) {
    int L = r->m->c.text_len, start = rng_bits(seed, SAMPLE_STREAM, ~0ull) % CAPTIONS;
    int *ids = (int *)xalloc(r->B * L, sizeof(int));
    size_t size = latent_size(r);
    float *x = floats(r->B * size), seen[N_SCORES];
    double *v = (double *)xalloc(clips * (N_SCORES + 1), sizeof(double)), *clip = v;
    Text cond = {ids, NULL};
    for (int i = 0; i < clips; i++, clip += N_SCORES + 1) {
        int b = i % r->B;
        if (b == 0) {
            for (int j = 0; j < r->B; j++)
                caption_ids(ids + j * L, L, caption_text(held_out_caption(start, i + j)));
            noise_fill(x, r->B * size, seed, SAMPLE_STREAM, i * size);
            sample(r, x, cond, NO_TEXT, steps, shift, guidance);
        }
        shapes_score(seen, x + b * size, held_out_caption(start, i), r->T, 2 * r->H, 2 * r->W, soft);
        for (int s = 0; s < N_SCORES; s++) {
            clip[s] = 100.0 * seen[s];
            clip[N_SCORES] += 100.0 * (seen[s] / N_SCORES);
        }
    }
    figures(score, v, N_SCORES + 1, clips);
    free(ids), free(x), free(v);
}

// The loss that training lowers, mean (v − (ε − x0))², on captions held out: each clip at one σ of each of
// BINS parts of 0..1, the same clips, noise and σ for every model. loss[BINS + 1]: each part; all.
enum { BINS = 5 };
static void velocity_loss(Figure *loss, Run *r, int clips, uint64_t seed) {
    size_t size = latent_size(r);
    double *v = (double *)xalloc(clips * (BINS + 1), sizeof(double));
    Batch a = batch_new(r);
    for (int bin = 0; bin < BINS; bin++)
        for (int i = 0; i < clips; i++) {
            int b = i % r->B;
            double *clip = v + i * (BINS + 1);
            for (int j = i; j < i + r->B && b == 0; j++)
                sample_fill(&a, r, j - i, held_out_caption(0, j),
                            (bin + rng_uniform(seed, SIGMA_STREAM, j)) / BINS, seed, j);
            if (b == 0) batch_upload(r, &a), forward(r, a.x_device, a.t);
            clip[bin] = sum_squares(r->out + b * size, a.target_device + b * size, size) / size;
            clip[BINS] += clip[bin] / BINS;
        }
    figures(loss, v, BINS + 1, clips);
    free(v);
}

static void cmd_eval(const Options *o, Ranks *k) {
    static const char *const SIGMA[] = {"0.0 .. 0.2", "0.2 .. 0.4", "0.4 .. 0.6", "0.6 .. 0.8", "0.8 .. 1.0",
                                        "all"};
    Run *r = run_open(o, k, o->train.batch < o->clips ? o->train.batch : o->clips, 0);
    Figure score[N_SCORES + 1], loss[BINS + 1];
    evaluate(score, r, o->clips, o->steps, o->shift, o->guidance, o->seed, o->soft);
    velocity_loss(loss, r, o->clips, o->seed);
    if (!speaks(k)) return;
    printf("ShapesBench, %d clips of captions never trained on (mean and standard error):\n", o->clips);
    for (int s = 0; s <= N_SCORES; s++)
        printf("  %-12s %6.2f ± %.2f\n", SCORE_NAMES[s], score[s].mean, score[s].error);
    printf("velocity loss on such captions, by sigma:\n");
    for (int i = 0; i <= BINS; i++) printf("  %-12s %.4f ± %.4f\n", SIGMA[i], loss[i].mean, loss[i].error);
    if (!o->json) return;
    printf("{");
    for (int s = 0; s <= N_SCORES; s++)
        printf("\"%s\": %.4f, \"%s_error\": %.4f, ", SCORE_NAMES[s], score[s].mean, SCORE_NAMES[s],
               score[s].error);
    printf("\"velocity_loss\": %.5f, \"velocity_loss_error\": %.5f, \"clips\": %d}\n", loss[BINS].mean,
           loss[BINS].error, o->clips);
}

// ---- osp train -------------------------------------------------------------------------------------------
static void cmd_train(const Options *o, Ranks *k) {
    Run *r = run_open(o, k, o->train.batch, 0);
    Model *m = r->m;
    Optimizer opt;
    Batch batch = batch_new(r);
    learning_start(&opt, m, o, k);
    batch_fill(&batch, r, &o->train, opt.step);
    for (int first = opt.step, S = o->train.steps; learning_more(opt.step < S, &opt, m, o, k);) {
        for (int i = 0; opt.step > 0 && i < m->params; i++) m->param[i].codes = false;  // weights have moved
        double lr = learning_rate(&o->train, opt.step), loss = train_step(r, &batch);
        int step = opt.step + 1;
        batch_fill(&batch, r, &o->train, step);  // while a GPU is still at work it gets its next batch
        double norm = optimizer_step(&opt, k, &o->train, lr);
        double ms = 1e3 * (seconds() - began_at) / (step - first);
        if (!isfinite(loss + norm)) die("step %d: loss %g, gradient %g; lower --lr", step, loss, norm);
        if (speaks(k) && isatty(2)) show_progress("step", step - first, S - first, began_at);
        if (speaks(k) && (step % 10 == 0 || step == S))
            printf("step %d/%d loss %.5f grad %.4f lr %.2e ms %.1f\n", step, S, loss, norm, lr, ms);
    }
}

// ---- osp grpo --------------------------------------------------------------------------------------------
// Prints the soft score on 64 held-out clips, with the adapter's average.
static void policy_evaluate(Run *r, const Optimizer *opt, const Options *o, bool speaks) {
    Figure score[N_SCORES + 1], *total = &score[N_SCORES];
    size_t bytes = opt->n * sizeof(float);
    float *now = device_floats(opt->n);
    copy(now, opt->w, bytes), copy(opt->w, opt->ema, bytes), weights_prepare(r->m);
    evaluate(score, r, 64, o->policy.steps, 3, o->policy.guidance, o->seed, true);
    copy(opt->w, now, bytes), weights_prepare(r->m);
    device_free(now);
    if (speaks) printf("held out after %d: %.2f ± %.2f\n", opt->update, total->mean, total->error);
}

static void cmd_grpo(const Options *o, Ranks *k) {
    const PolicyOptions *p = &o->policy;
    int V = p->prompts * p->group, together = V;
    Optimizer opt;
    if (!(p->guidance > 0)) die("-g 0: the gradient is -g times the conditional velocity's; want more");
    if (p->window >= p->steps) die("--window %d: want fewer than the %d steps of -n", p->window, p->steps);
    if (p->micro > V) die("--micro %d: want at most a rollout's %d videos", p->micro, V);
    while (together > 32 || V % together) together--;  // videos made at a time
    Run *learn = run_open(o, k, p->micro, together);
    Model *m = learn->m;
    Run *make = run_new(m, k, together, false);
    learning_start(&opt, m, o, k);
    Policy *policy = policy_new(make, learn, p, &o->train);
    weights_prepare(m);
    if (o->every && opt.update == 0) policy_evaluate(make, &opt, o, speaks(k));
    while (learning_more(opt.update < p->updates, &opt, m, o, k)) {
        double began = seconds();
        PolicyFigures f = policy_update(policy, &opt);
        if (speaks(k))
            printf("update %d/%d reward %.4f spread %.4f ratio %.6f %.6f %.6f clipped %.4f kl %.3e "
                   "grad %.3e steps %d in %.2f s\n", opt.update, p->updates, f.reward, f.spread, f.ratio_min,
                   f.ratio_mean, f.ratio_max, f.clipped, f.kl, f.norm, f.steps, seconds() - began);
        if (o->every && opt.update % o->every == 0) policy_evaluate(make, &opt, o, speaks(k));
    }
}

// ---- osp info --------------------------------------------------------------------------------------------
static void cmd_info(const Options *o, Ranks *k) {
    File f;
    char shape[200];
    size_t parameters = 0;
    if (!o->weights) die("no file given: osp info FILE");
    if (!speaks(k)) return;
    file_open(&f, o->weights);
    for (const Entry *t = f.entry; t < f.entry + f.count; t++) {
        printf("  %-44s %-5s %.200s\n", t->name, t->text ? "" : DTYPE_NAME[t->dtype],
               t->text ? t->text : shape_text(shape, t->rank, t->shape));
        parameters += t->count - (t->dtype == U8);  // codes have a scale beside
    }
    printf("%zu bytes of tensors in a file of %zu\n", f.bytes, f.size);
    if (!file_meta(&f, "dim")) return;
    Config c = config_read(&f);
    printf("%zu parameters; blocks ", parameters);
    for (int i = 0; i < c.num_layers; i++) putchar(PATTERN_LETTER[pattern_of(&c, i)]);
    printf(" (F full, t token-wise, g group-wise)\n");
}

// ---- main ------------------------------------------------------------------------------------------------
typedef struct { const char *name; void (*run)(const Options *, Ranks *); const char *example; } Command;
static const Command COMMANDS[] = {
    {"sample", cmd_sample, "osp sample -w FILE \"a small red circle moving left on a black background\""},
    {"train", cmd_train, "osp train --preset tiny -o tiny.safetensors"},
    {"grpo", cmd_grpo, "osp grpo --init tiny.safetensors -o lora.safetensors"},
    {"eval", cmd_eval, "osp eval -w tiny.safetensors --lora lora.safetensors"},
    {"info", cmd_info, "osp info tiny.safetensors"}, {}};

static bool same_file(const char *a, const char *b) {
    struct stat s, t;
    return !stat(a, &s) && !stat(b, &t) && s.st_dev == t.st_dev && s.st_ino == t.st_ino;
}

static void options_read(Options *o, int argc, char **argv, const Command *command, const Ranks *k) {
    bool grpo = command->run == cmd_grpo;
    TrainOptions *t = &o->train;
    size_t size;
    o->command = *command->name;
    for (int i = 1; i < argc && o->command == 't'; i++)
        if (!strcmp(argv[i - 1], "--preset") && !strcmp(argv[i], "toy")) o->command = 'T';
    parse_options(argc, argv, command->example);
    o->training = strchr("tTg", o->command);
    if (o->training && !o->out) die("no output given: -o FILE.safetensors");
    if (o->out && !strcmp(o->out, "-")) die("-o -: stdout takes no files; give a name");
    if (o->out && k->rank == 0) check_writable(o->out);
    for (const Option *row = OPTIONS; row->name && o->out; row++)
        if (row->kind == 'f' && row->text && same_file(row->text, o->out))
            die("-o %s: it would replace the file that %s reads; give another name", o->out, row->name);
    if (o->training) snprintf(o->state, sizeof o->state, "%s.resume", o->out);
    t->seed = o->seed, t->clip = 1, t->eps = 1e-8, t->beta1 = 0.9, t->beta2 = grpo ? 0.999 : 0.99;
    t->weight_decay = grpo ? 0 : 0.01, t->ema_warmup = !grpo;
    o->policy.updates = t->steps, o->policy.steps = o->steps;
    o->policy.guidance = o->guidance, o->policy.shift = o->shift;
    // The settings; of a file also a hash, where a resumed run or other ranks must find the same.
    FILE *f = open_memstream(&o->settings, &size);
    for (const Option *row = OPTIONS; row->name && strcmp(row->name, "-o"); row++) {
        if (row->text && row->kind != 'm') fprintf(f, "%s %s ", row->name, row->text);
        if (!row->text || row->kind != 'f' || !(o->training || k->size > 1)) continue;
        File file;
        file_open(&file, row->text);
        fprintf(f, "%016llx ", (unsigned long long)hash_bytes(file.map, file.size, 0));
        file_close(&file);
    }
    for (int i = 0; i < o->captions_said; i++) fprintf(f, "-p '%s' ", o->captions[i]);
    fclose(f);
    for (char *c = o->settings; *c; c++)  // what JSON must escape
        if (iscntrl((uint8_t)*c) || *c == '"' || *c == '\\') *c = '\'';
}

static int osp_main(int argc, char **argv) {
    const char *name = argc > 1 ? argv[1] : "";
    const Command *c = COMMANDS;
    static Ranks ranks;
    ranks_start(&ranks);
    setvbuf(stdout, NULL, _IOLBF, BUFSIZ);  // what a run prints is seen at once
    signal(SIGINT, stop);
    signal(SIGTERM, stop);
    while (c->name && strcmp(name, c->name)) c++;
    if (c->name) {
        options_read(&said, argc - 2, argv + 2, c, &ranks);
        c->run(&said, &ranks);
        if (speaks(&ranks)) ranks_report(&ranks);
        finish(0);
    }
    if (*name && !asks_help(name)) die("\"%.40s\" is no command; osp -h shows all", name);
    printf("OSP-Next, a sparse video diffusion transformer in one file of C. Examples (-h lists options):\n");
    for (c = COMMANDS; c->name; c++) printf("  %s\n", c->example);
    finish(*name ? 0 : 2);
}

#ifndef OSP_NO_MAIN
int main(int argc, char **argv) { return osp_main(argc, argv); }
#endif
