// ==========================================================================================================
// test_osp.c: the proof of osp.c, its timings and its pictures
// ==========================================================================================================
// Three kinds of judges: golden/ (an independent float64 implementation), formulas in double precision, exact
// rules (bits, permutations). Errors: |a − b| / |b| over one tensor. What is written was full of NaN before.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <setjmp.h>
#include <stdlib.h>
static jmp_buf *caught;                                  // where a wanted death ends; NULL: in an exit
__attribute__((noreturn)) static void caught_exit(int code) {
    if (caught) longjmp(*caught, 1);
    exit(code);
}
#define OSP_NO_MAIN
#define exit caught_exit
#ifdef TEST_CUDA
#include "osp_cuda.cu"
enum { ON_GPU = 1 };
#else
#include "osp.c"
enum { ON_GPU = 0 };
#endif
#undef exit
#include <dlfcn.h>
#include <glob.h>
#include <sys/wait.h>

__attribute__((format(printf, 1, 2)))
static char *fmt(const char *format, ...) {
    char *text;
    va_list args;
    va_start(args, format);
    if (vasprintf(&text, format, args) < 0) die("out of memory for a text");
    va_end(args);
    return text;
}

static char *scratch_folder(const char *what) {
    char *folder = fmt("%s/osp_%s_XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp", what);
    if (!mkdtemp(folder)) die("%s: %s; make room there", folder, strerror(errno));
    return folder;
}

// What a shell command prints, and its exit code.
static char *shell(int *code, const char *command) {
    char *said = (char *)xalloc(1 << 16, 1);
    FILE *p = popen(command, "r");
    if (!p) die("no shell: %s", strerror(errno));
    said[fread(said, 1, (1 << 16) - 1, p)] = 0;
    int status = pclose(p);
    *code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    return said;
}

// half: act is bfloat16. subject: what the rows are about, such as a file's name.
static struct { int passed, failed, skipped; bool silent, half; const char *subject; } tally;

// A check: measured may not exceed the limit. bfloat16 gets room in (0, 0.01]; limits below 0 are strict.
static void row(double measured, double limit, const char *what) {
    if (tally.half && limit > 0 && limit <= 1e-2) limit = limit <= 1e-5 ? 2e-2 : 1e-1;
    bool ok = measured <= (limit = fabs(limit));         // NaN is not
    if (ok) tally.passed++; else tally.failed++;
    what = fmt("%s%s", tally.subject, what);
    if (!tally.silent) printf("%-88s %9.2e %9.1e %s\n", what, measured, limit, ok ? "ok" : "FAILED");
    fflush(stdout);
    if (!ok && getenv("STOP_AT_FIRST")) exit(1);
}
static void skip(const char *why) {
    tally.skipped++;
    if (!tally.silent) printf("%sskipped: %s\n", tally.subject, why);
}
static int tally_print(void) {
    if (!tally.silent)
        printf("%d passed, %d failed, %d skipped\n", tally.passed, tally.failed, tally.skipped);
    return tally.failed;
}

// Many errors, one row: note() keeps the worst since the last worst_row().
static struct { double error; const char *name; int count; } worst;
static void note(const char *name, double error) {
    bool first = !worst.count++;
    if (first || isnan(error) || error > worst.error) worst.error = error, worst.name = name;
}
static void worst_row(double limit, const char *what) {
    if (worst.count) row(worst.error, limit, fmt("%s worst of %d (%s)", what, worst.count, worst.name));
    worst.count = 0;
}

static double relative(const float *a, const float *b, size_t n) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < n; i++) difference += pow((double)a[i] - b[i], 2), norm += pow(b[i], 2);
    return sqrt(norm == 0 ? difference : difference / norm);
}
static bool same_bits(const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (float_bits(a[i]) != float_bits(b[i]) && !(isnan(a[i]) && isnan(b[i]))) return false;
    return true;
}
#ifdef _OPENMP
static int threads_here(void) { return omp_get_max_threads(); }
static void threads_set(int n) { omp_set_num_threads(n); }
#else
static int threads_here(void) { return 1; }
static void threads_set(int n) { (void)n; }
#endif

// ---- between host and device -----------------------------------------------------------------------------
static bool in_float;  // every act is a float, whatever the device's kind
static double *doubles(size_t n) { return (double *)xalloc(n, sizeof(double)); }
static float *noise(uint64_t stream, size_t n, double scale) {
    float *x = floats(n);
    for (size_t i = 0; i < n; i++) x[i] = (float)scale * rng_normal(77, stream, i);
    return x;
}
static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
static double *widened(const float *x, size_t n) {
    double *y = doubles(n);
    for (size_t i = 0; i < n; i++) y[i] = x[i];
    return y;
}
static float *rounded(const double *x, size_t n) {
    float *y = floats(n);
    for (size_t i = 0; i < n; i++) y[i] = (float)x[i];
    return y;
}
static float *up(const float *host, size_t n) {
    float *p = device_floats(n);
    upload(p, host, n * sizeof(float));
    return p;
}
static void *fetched(const void *device, size_t bytes) {
    void *p = xalloc(bytes, 1);
    download(p, device, bytes);
    return p;
}
static float *down(const float *device, size_t n) { return (float *)fetched(device, n * sizeof(float)); }
static act *up_act(const float *host, size_t n) {        // an act is at most a float
    float *p = up(host, n);
    if (!in_float) to_act((act *)p, up(host, n), n);
    return (act *)p;
}
static float *down_act(const act *device, size_t n) {
    float *room = device_floats(n);
    if (in_float) return down((const float *)device, n);
    to_float(room, device, n);
    return down(room, n);
}
static float *as_act(const float *host, size_t n) { return down_act(up_act(host, n), n); }
static float *spoiled(size_t n) {                        // NaN in float and in bfloat16
    float *host = floats(n);
    memset(host, 0xFF, n * sizeof(float));
    return up(host, n);
}
static void spoil(void *device, size_t bytes) { copy(device, spoiled(bytes / 4 + 1), bytes); }
static act *spoiled_act(size_t n) { return (act *)spoiled(n); }
// Notes how far a tensor on the device is from numbers on the host.
static void near(const char *name, const float *device, const float *want, size_t n) {
    note(name, relative(down(device, n), want, n));
}

// A tensor that an operation reads, adds to or writes: the same numbers, which an act can hold, on the host
// (h; wide, where formulas work) and on the device (f, a); or room for them on the device, full of NaN.
typedef struct { size_t n; float *h, *f; act *a; double *wide; } Given;
static Given given_of(const float *x, size_t n) {
    float *h = as_act(x, n);
    Given g = {n, h, up(h, n), up_act(h, n), widened(h, n)};
    return g;
}
static Given given(size_t n) { static int stream; return given_of(noise(1000 + ++stream, n, 1), n); }
static Given again(Given g) { return g.f = spoiled(g.n), g.a = spoiled_act(g.n), g; }  // the same is wanted
static Given blank(size_t n) { Given g = {n, NULL, NULL, NULL, doubles(n)}; return again(g); }

// Notes how far what was written is from wide, the formula's: NaN where that is NaN, anything where infinite.
static void judge_host(const char *name, float *got, Given g) {
    float *want = rounded(g.wide, g.n);
    for (size_t i = 0; i < g.n; i++)
        if (isinf(want[i]) || (isnan(want[i]) && isnan(got[i]))) got[i] = want[i] = 0;
    note(name, relative(got, want, g.n));
}
static void judge(const char *name, Given g) { judge_host(name, down(g.f, g.n), g); }
static void judge_act(const char *name, Given g) { judge_host(name, down_act(g.a, g.n), g); }
static void judge_maximum(const float *amax, Given g) {  // exactly
    float *want = spoiled(1);
    absmax(want, g.a, g.n), note("maximum", *down(amax, 1) != *down(want, 1));
}

// ==== Operations against formulas in double precision =====================================================
// Q(x; s), one float operation at a time, with the rounding that golden/hif8 proves.
static float *nearest_tensor(const float *x, size_t n, float s) {
    float amax = 1e-8f, *y = floats(n);
    for (size_t i = 0; i < n; i++) amax = fmaxf(amax, fabsf(x[i]));
    volatile float k = s / amax, scaled;
    for (size_t i = 0; i < n; i++) scaled = x[i] * k, y[i] = hif8_round(scaled) / k;
    return y;
}

// Numbers around the mean, some `spike` times as large; powers > 0: of many sizes.
static Given uneven(size_t n, double mean, float spike, float powers) {
    float *x = given(n).h;
    for (size_t i = 0; i < n; i++)
        x[i] = (x[i] + (float)mean) * (i % 10007 == 5 ? spike : 1) * expf(powers * rng_normal(78, 1, i));
    return given_of(x, n);
}

// ---- HiF8 as E4M3 codes, on a card that multiplies them --------------------------------------------------
// The positive number of a code with m bits of mantissa and bias b; m 0: of HiF8.
static double float8_value(int code, int m, int b) {
    int E = code >> m, M = code & ((1 << m) - 1);
    if (!m) return hif8_decode((uint8_t)code);
    return E ? ldexp(1 + ldexp(M, -m), E - b) : ldexp(M, 1 - b - m);
}
static double code_value(uint8_t c) {                        // E4M3
    double size = (c & 127) == 127 ? NAN : float8_value(c & 127, 3, 7);
    return c & 128 ? -size : size;
}
static size_t to_16(size_t n) { return (n + 15) / 16 * 16; }
// A factor's numbers on the host, codes or not.
static float *down_factor(Factor f, size_t n) {
    if (!f.code) return f.exact ? down((float *)f.x, n) : down_act(f.x, n);
    uint8_t *code = (uint8_t *)fetched(f.code, n);
    float *x = floats(n), unit = *down(f.unit, 1);
    for (size_t i = 0; i < n; i++) x[i] = (float)code_value(code[i]) * unit;
    return x;
}

// g as a product reads it: codes of Q(g; s), or, where s is 0, g itself; g->wide becomes what that says.
static Factor factor(Given *g, int columns, float s) {
    Factor f = in_float ? exact(g->f) : plain(g->a);
    if (s > 0) {
        float *m = spoiled(1);
        size_t rows = g->n / columns;
        f.x = NULL, f.code = (uint8_t *)spoiled(g->n), f.unit = spoiled(1);
        f.turned = (uint8_t *)spoiled(columns * to_16(rows));
        absmax(m, g->a, g->n), hif8_tensor(f, g->a, rows, columns, s, m);
    }
    g->wide = widened(down_factor(f, g->n), g->n);
    return f;
}

// Codes are Q(x; s), or E4M3's nearest; turned: the same, zeros after the last row.
static void check_codes(int rows, int columns, float s) {
    size_t n = (size_t)rows * columns, padded = to_16(rows);
    Given x = uneven(n, 0, 1, 3);
    Factor f = factor(&x, columns, s);
    uint8_t *code = (uint8_t *)fetched(f.code, n), *turned = (uint8_t *)fetched(f.turned, columns * padded);
    float *want = nearest_tensor(x.h, n, s), unit = *down(f.unit, 1), wrong = 0;
    for (size_t i = 0; i < n; i++) {
        double size = fabs(want[i]) / unit, off = fabs(x.wide[i] - want[i]) / unit;
        wrong += !(off <= (size < 0x1p-6 ? 0x1p-10 : 1e-6 * size));
    }
    for (size_t i = 0; i < columns * padded; i++) {
        size_t r = i % padded, c = i / padded;
        wrong += turned[i] != (r < (size_t)rows ? code[r * columns + c] : 0);
    }
    row(wrong, 0, fmt("codes of Q(x; %g), [%d, %d], and turned, one by one", s, rows, columns));
}

static double gelu_of(double u) { return u / 2 * (1 + tanh(sqrt(2 / M_PI) * (u + 0.044715 * u * u * u))); }
static double silu_of(double u) { return u / (1 + exp(-u)); }

// A function of each number of u; dy: its slope times dy.
static Given mapped(double (*f)(double), Given u, const double *dy) {
    Given y = blank(u.n);
    for (size_t i = 0; i < u.n; i++)
        y.wide[i] = dy ? dy[i] * (f(u.wide[i] + 1e-5) - f(u.wide[i] - 1e-5)) / 2e-5 : f(u.wide[i]);
    return y;
}

// kind: the timestep's products are float, whatever an act is.
enum { ACTS, FLOATS, CODED };
static void check_linear(const int *size, int kind, double mean, float spike) {
    int R = size[0], O = size[1], I = size[2], codes = kind == CODED;
    char *what = fmt("linear %dx%dx%d%s", R, O, I, kind == FLOATS ? " in float" : "");
    double limit = kind == FLOATS ? -2e-6 : 2e-6;
    in_float = kind == FLOATS;
    Given x = uneven(R * I, mean, spike, 0), w = uneven(O * I, mean, 1, 0), b = given(O);
    Given dy = uneven(R * O, mean, spike, 0), dw = given(O * I), db = given(O), y = blank(R * O);
    Given z = blank(R * O), dx = blank(R * I), more = given(R * I);
    Factor xs = factor(&x, I, codes * 15), ws = factor(&w, I, codes * 15), dys = factor(&dy, O, codes * 224);
    linear_forward(y.a, xs, ws, b.a, R, O, I), linear_forward(z.a, xs, ws, NULL, R, O, I);
    linear_backward(dx.a, dw.f, db.f, dys, xs, ws, R, O, I, false);
    linear_backward(more.a, NULL, NULL, dys, xs, ws, R, O, I, true);
    for (int j = 0; j < R * O; j++) {
        int r = j / O * I, o = j % O * I;                // where their rows of x and w begin
        for (int i = 0; i < I; i++) {
            z.wide[j] += x.wide[r + i] * w.wide[o + i], dx.wide[r + i] += dy.wide[j] * w.wide[o + i];
            dw.wide[o + i] += dy.wide[j] * x.wide[r + i];
        }
        y.wide[j] = z.wide[j] + b.wide[j % O], db.wide[j % O] += dy.wide[j];
    }
    for (int i = 0; i < R * I; i++) more.wide[i] += dx.wide[i];
    judge_act("y", y), judge_act("y without bias", z), judge_act("dx", dx);
    worst_row(codes ? -2e-3 : limit, fmt("%s,", what));
    judge("dw", dw), judge("db", db);
    worst_row(codes ? -5e-4 : limit, fmt("%s, dw and db,", what));
    if (kind != FLOATS) {
        Given pre = again(y), g = mapped(gelu_of, y, NULL), bare = again(g);
        linear_gelu_forward(g.a, pre.a, xs, ws, b.a, R, O, I), judge_act("gelu", g), judge_act("pre", pre);
        linear_gelu_forward(bare.a, NULL, xs, ws, b.a, R, O, I), judge_act("gelu, pre NULL", bare);
    }
    judge_act("dx added, rounded twice", more);
    worst_row(codes ? -3e-3 : limit, fmt("%s, dx added, GELU,", what));
    in_float = false;
}

// A vector for each sample, or one for all, in the second of three slots: numbers lie between them.
static PerSample slot(Given g, int D, bool each) {
    PerSample v = {g.f + D, each ? 3 * (size_t)D : 0};
    return v;
}

// h = norm(x_out)·(1 or 0 + scale) + shift of x_out = x + gate·y; dx += what comes through the norm. Without
// a gate x_out is x. moved, left: rows of x_out and of x by a map.
static void check_norm(int n, int D, bool modulated, bool gated) {
    int B = 2, all = B * n * D, slots = 3 * B * D, count = B * n - 1;
    int *map = (int *)xalloc(count, sizeof(int));
    Rows rows = {B, (size_t)n, D};
    Given x = given(all), y = given(all), dh = given(all), dx = given(all), gate = given(slots);
    Given shift = given(slots), scale = given(slots), dshift = given(slots), dscale = given(slots);
    Given dgate = given(slots), x_out = gated ? blank(all) : x, h = blank(all), bare = again(h);
    Given dy = blank(all), moved = blank(count * D), left = blank(count * D), copied = again(left);
    PerSample none = {NULL, 0}, g = gated ? slot(gate, D, true) : none;
    Affine a = {slot(shift, D, modulated), slot(scale, D, modulated), (float)modulated};
    Affine d = {slot(dshift, D, modulated), slot(dscale, D, modulated), 0};
    float *stat = spoiled(2 * B * n), *amax = spoiled(1);
    for (int i = 0; i < count; i++) map[i] = i * 7 % (B * n);
    for (int i = 0; i < count * D; i++) left.wide[i] = x.wide[map[i / D] * D + i % D];
    int *at = to_device(map, count);
    residual_gather_forward(moved.f, x.f, y.a, g, at, count, rows);
    residual_gather_forward(left.f, x.f, NULL, none, at, count, rows);
    gather_rows(copied.f, x.f, at, count, D * sizeof(float)), judge("x moved", left), judge("rows", copied);
    residual_norm_forward(x_out.f, h.a, stat, amax, x.f, y.a, g, a, rows, 3e-4f);
    residual_norm_forward(NULL, bare.a, stat, NULL, x_out.f, NULL, none, a, rows, 3e-4f);
    norm_backward(dx.f, d, dh.a, x_out.f, stat, a, rows);
    gate_backward(dy.a, gated ? slot(dgate, D, true) : none, dx.f, y.a, g, rows);
    for (int r = 0; r < B * n; r++) {
        double mean = 0, var = 3e-4, dot = 0, dot_u = 0;
        for (int i = 0; i < 4 * D; i++) {
            int pass = i / D, k = i % D, j = r * D + k;
            int b = (3 * (r / n) + 1) * D + k, s = modulated ? b : D + k;
            double times = gated ? gate.wide[b] : 1, v = x.wide[j] + times * y.wide[j];
            double u = (v - mean) / sqrt(var), wide = modulated + scale.wide[s], du = dh.wide[j] * wide;
            if (pass == 0) mean += v / D;
            if (pass == 1) var += (v - mean) * (v - mean) / D;
            if (pass == 2) dot += du / D, dot_u += du * u / D;
            if (pass < 3) continue;
            x_out.wide[j] = v, h.wide[j] = u * wide + shift.wide[s];
            dx.wide[j] += (du - dot - u * dot_u) / sqrt(var);
            dy.wide[j] = times * dx.wide[j], dgate.wide[b] += gated * dx.wide[j] * y.wide[j];
            dshift.wide[s] += dh.wide[j], dscale.wide[s] += dh.wide[j] * u;
        }
    }
    for (int i = 0; i < count * D; i++) moved.wide[i] = x_out.wide[map[i / D] * D + i % D];
    judge("x_out", x_out), judge("x_out moved", moved), judge_maximum(amax, h);
    judge_act("h", h), judge_act("h of x_out", bare), judge("dx", dx), judge_act("dy", dy);
    judge("dgate", dgate), judge("dshift", dshift), judge("dscale", dscale);
    worst_row(5e-6, fmt("rows of %d, norm%s%s,", D, modulated ? ", modulated" : "", gated ? ", gate" : ""));
}

// y = turn(v), v = x·w/rms, rms² = mean x² + eps; with g = dy turned back, dw += g·x/rms.
static void check_rmsnorm_rope(int n, int D, int heads, bool rope) {
    int B = 2, all = B * n * D, hd = D / heads;
    Rows rows = {B, (size_t)n, D};
    Given x = given(all), w = given(D), dy = given(all), dw = given(D), y = blank(all), dx = blank(all);
    float *turn = noise(3, n * hd, 1), *rstd = spoiled(B * n), *amax = spoiled(1);
    for (int i = 0; i < n * hd; i += 2)
        turn[i + 1] = rope ? sinf(turn[i]) : 0, turn[i] = rope ? cosf(turn[i]) : 1;
    float *table = rope ? up(turn, n * hd) : NULL;
    rmsnorm_rope_forward(y.a, rstd, amax, x.a, w.f, table, rows, heads, 1e-3f);
    rmsnorm_rope_backward(dx.a, dw.f, dy.a, x.a, rstd, w.f, table, rows, heads);
    for (int r = 0; r < B * n; r++) {
        double squares = 1e-3, dot = 0;
        for (int i = 0; i < 3 * D; i++) {
            int pass = i / D, d = i % D, j = r * D + d, side = d % 2 ? -1 : 1, o = d + side;
            const float *t = turn + r % n * hd + (d & ~1) % hd;
            double rms = sqrt(squares), c = t[0], s = side * t[1], g = dy.wide[j] * c + dy.wide[j + side] * s;
            if (pass == 0) squares += x.wide[j] * x.wide[j] / D;
            if (pass == 1) dot += g * w.wide[d] * x.wide[j] / squares / D, dw.wide[d] += g * x.wide[j] / rms;
            if (pass < 2) continue;
            y.wide[j] = (x.wide[j] * w.wide[d] * c - x.wide[j + side] * w.wide[o] * s) / rms;
            dx.wide[j] = (g * w.wide[d] - x.wide[j] * dot) / rms;
        }
    }
    judge_act("y", y), judge_maximum(amax, y), judge("dw", dw), judge_act("dx", dx);
    rmsnorm_rope_backward(dy.a, w.f, dy.a, x.a, rstd, up(w.h, D), table, rows, heads);
    dx.a = dy.a, judge_act("dx in place", dx);
    worst_row(5e-6, fmt("rows of %d, rmsnorm%s", D, rope ? " + rope" : ""));
}

// Softmax attention of query a and head h, which sees n keys from k0 on, and all its gradients.
typedef struct { Given q, k, v, d, o, dq, dk, dv, lse; int heads, hd; } Attended;
static void attention_formula(const Attended *t, int a, int h, int k0, int n) {
    int D = t->heads * t->hd, at = a * D + h * t->hd, key0 = k0 * D + h * t->hd;
    double *p = doubles(2 * n), *dp = p + n, top = -INFINITY, sum = 0, mean = 0, scale = 1 / sqrt(t->hd);
    for (int b = 0; b < n; b++) {
        for (int j = 0; j < t->hd; j++) {
            p[b] += t->q.wide[at + j] * t->k.wide[key0 + b * D + j] * scale;
            dp[b] += t->d.wide[at + j] * t->v.wide[key0 + b * D + j];
        }
        top = fmax(top, p[b]);
    }
    for (int b = 0; b < n; b++) sum += p[b] = exp(p[b] - top);
    for (int b = 0; b < n; b++) p[b] /= sum, mean += p[b] * dp[b];
    t->lse.wide[a * t->heads + h] = top + log(sum);          // no keys: infinite
    for (int i = 0; i < n * t->hd; i++) {
        int b = i / t->hd, j = i % t->hd, key = key0 + b * D + j;
        double ds = p[b] * (dp[b] - mean) * scale;
        t->o.wide[at + j] += p[b] * t->v.wide[key], t->dq.wide[at + j] += ds * t->k.wide[key];
        t->dk.wide[key] += ds * t->q.wide[at + j], t->dv.wide[key] += p[b] * t->d.wide[at + j];
    }
    free(p);
}

// Scores that try a softmax: queries and keys lifted apart (scores far below 0), keys that grow from first to
// last, spikes. There query 5 is NaN, and must stay so, alone; gradients are not asked for. Last, codes.
enum { USUAL, LARGE, FAR_BELOW, SHRINKING = 5, CODES, CODES_SPIKES = 9 };
typedef struct { const char *name; float apart, first, last, spike, key_spike; int every; } Scores;
static const Scores SCORES[] = {
    {"usual", 0, 1, 1, 1, 1, 1}, {"large", 0, 9, 9, 1, 1, 1}, {"far below 0", 8, 1, 1, 1, 1, 1},
    {"spikes", 0, 1, 1, 30, 30, 997}, {"growing", 0, 0, 24, 1, 1, 1}, {"shrinking", 0, 24, 0, 1, 1, 1},
    {"usual", 0, 1, 1, 1, 1, 1}, {"far below 0", 8, 1, 1, 1, 1, 1}, {"growing", 0, 1, 4, 1, 1, 1},
    {"spikes", 0, 1, 1, 30, 1, 10007}};

// sequences: "300x12 130x0" are two, one of 300 queries and 12 keys, one of 130 queries.
static void check_attention(const char *sequences, int heads, int hd, int kind) {
    int n = 0, q[16] = {0}, k[16] = {0}, used;
    for (const char *at = sequences; sscanf(at, "%dx%d %n", &q[n + 1], &k[n + 1], &used) == 2; at += used)
        q[n + 1] += q[n], k[n + 1] += k[n], n++;
    int D = heads * hd, nq = q[n] * D, nk = k[n] * D;
    const Scores *is = &SCORES[kind];
    bool codes = kind >= CODES, odd = kind > LARGE && !codes;
    float lift = is->apart / sqrtf(sqrtf((float)hd)), *amax = spoiled(1);
    float *x = noise(1, nq, 1), *y = noise(2, nk, 1), *v = noise(3, nk, 1);
    for (int i = 0; i < nq; i++) x[i] = x[i] * (i % is->every ? 1 : is->spike) + lift;
    for (int i = 0; i < nk; i++) {
        float grown = is->first + (is->last - is->first) * (float)(i / D) / k[n];
        y[i] = y[i] * grown * (i % is->every ? 1 : is->key_spike) - lift, v[i] += codes;
    }
    for (int i = 5 * D; odd && i < 6 * D; i++) x[i] = NAN;
    Attended t = {given_of(x, nq), given_of(y, nk), given_of(v, nk), given(nq), blank(nq),
                  blank(nq), blank(nk), blank(nk), blank(q[n] * heads), heads, hd};
    Factor qs = factor(&t.q, D, codes ? 15 : 0), ks = factor(&t.k, D, codes ? 15 : 0);
    Sequences s = {n, q, k, to_device(q, n + 1), to_device(k, n + 1)};
    attention_forward(t.o.a, t.lse.f, amax, qs, ks, t.v.a, &s, heads, hd);
    for (int i = 0; i < n; i++)
        for (int a = q[i]; a < q[i + 1]; a++)
            for (int h = 0; h < heads; h++) attention_formula(&t, a, h, k[i], k[i + 1] - k[i]);
    judge_act("o", t.o), judge("lse", t.lse), judge_maximum(amax, t.o);
    if (kind <= LARGE) {
        Given bare = again(t.o);
        attention_forward(bare.a, NULL, NULL, qs, ks, t.v.a, &s, heads, hd);
        note("o without lse", !same_bits(down_act(bare.a, nq), down_act(t.o.a, nq), nq));
        attention_backward(t.dq.a, t.dk.a, t.dv.a, t.d.a, qs.x, ks.x, t.v.a, t.o.a, t.lse.f, &s, heads, hd);
        judge_act("dq", t.dq), judge_act("dk", t.dk), judge_act("dv", t.dv);
    }
    worst_row(codes ? -3e-3 : odd ? 1e-5 : 5e-6,
              fmt("attention, %s, scores %s, %d heads of %d,", sequences, is->name, heads, hd));
}

static void check_patches(bool channels_first) {
    enum { C = 3, T = 2, H = 3, W = 5, N = T * H * W, COUNT = 2 * 4 * C * N, PART = 9 * 4 * C };
    Grid g = {2, C, T, H, W};
    Given x = given(COUNT), rows = blank(COUNT), some = blank(2 * PART), back = again(x);
    for (int i = 0; i < COUNT; i++) {                        // i: x[b, c, t, y, z]
        int z = i % (2 * W), y = i / (2 * W) % (2 * H), t = i / (4 * W * H) % T, c = i / (4 * N) % C;
        int at = y % 2 * 2 + z % 2, column = channels_first ? c * 4 + at : at * C + c;
        rows.wide[(i / (4 * N * C) * N + (t * H + y / 2) * W + z / 2) * 4 * C + column] = x.wide[i];
    }
    for (int i = 0; i < 2 * PART; i++) some.wide[i] = rows.wide[(i / PART * N + 4) * 4 * C + i % PART];
    latent_to_rows(rows.a, x.f, g, 0, N, channels_first);
    latent_to_rows(some.a, x.f, g, 4, 9, channels_first);
    rows_to_latent(back.f, rows.a, g, channels_first);
    judge_act("all rows", rows), judge_act("some rows", some), judge("back", back);
    worst_row(0, fmt("latent <-> rows, %s first,", channels_first ? "channels" : "pixels"));
}

static void check_words(void) {
    enum { L = 7, V = 5, D = 4, ROWS = 14, N = ROWS * D };
    int ids[ROWS] = {1, 4, 4, -1, 0, 2, 2, 4, 1, -1, -1, 2, 0, 4}, *at = to_device(ids, ROWS);
    Given table = given(V * D), pos = given(L * D), dy = given(N), y = blank(N), dtable = given(V * D);
    for (int i = 0; i < N; i++) {
        int word = ids[i / D] * D + i % D;
        if (word < 0) continue;
        y.wide[i] = table.wide[word] + pos.wide[i % (L * D)];
        dtable.wide[word] += dy.wide[i];
    }
    embed_forward(y.a, table.f, pos.f, at, ROWS, L, D);
    embed_backward(dtable.f, dy.a, at, ROWS, V, D);
    judge_act("forward", y), judge("backward", dtable);
    worst_row(1e-6, "words,");
}

static void check_elementwise(void) {
    size_t n = 10007;
    Given x = given(n), z = given(n), y = blank(n), scaled = blank(n), d = blank(n);
    Given s = mapped(silu_of, x, NULL), ds = mapped(silu_of, x, z.wide), dg = mapped(gelu_of, x, z.wide);
    double squares = 0, distance = 0;
    for (size_t i = 0; i < n; i++) {
        double apart = x.wide[i] - z.wide[i];
        squares += x.wide[i] * x.wide[i], distance += apart * apart;
        y.wide[i] = 1.5 * x.wide[i] - 0.7 * z.wide[i], scaled.wide[i] = 1.5 * x.wide[i];
        d.wide[i] = 2 * apart / (double)n;
    }
    lincomb(y.f, 1.5f, x.f, -0.7f, z.f, n), judge("lincomb", y);
    lincomb(scaled.f, 1.5f, x.f, 0, NULL, n), judge("scaled", scaled);
    note("sum of squares", fabs(sum_squares(x.f, NULL, n) / squares - 1));
    note("squared distance", fabs(sum_squares(x.f, z.f, n) / distance - 1));
    note("mse", fabs(mse(d.f, x.f, z.f, n) * (double)n / distance - 1)), judge("d mse", d);
    silu_forward(s.f, x.f, n), judge("silu", s);
    ds.f = z.f, silu_backward(z.f, z.f, x.f, n), judge("silu backward", ds);
    dg.a = z.a, gelu_backward(z.a, z.a, x.a, n), judge_act("gelu backward", dg);
    worst_row(1e-6, "lincomb, sums, mse, SiLU, GELU,");
}

static const char *const SELF = "0x0 1x1 63x63 64x64 65x65 79x79 80x80 81x81 300x300";
static const char *const CROSS = "300x12 0x512 130x0 1x512";
static void check_all_codes(void) {
    static const int PRODUCT[][5] = {{64, 128, 256, 0, 1}, {515, 48, 80, 0, 1}, {2051, 128, 64, 1, 1},
                                     {1000, 256, 1024, 0, 300}};
    if (!codes_multiply(16, 16)) { skip("no products of 8-bit codes here"); return; }
    check_codes(1, 16, 15), check_codes(300, 208, 15), check_codes(515, 144, 224), check_codes(128, 64, 224);
    for (int i = 0; i < 4; i++) check_linear(PRODUCT[i], CODED, PRODUCT[i][3], PRODUCT[i][4]);
    if (!codes_attend(128)) return;
    check_attention(SELF, 2, 128, CODES), check_attention(CROSS, 2, 128, CODES);
    for (int i = CODES; i <= CODES_SPIKES; i++) check_attention("193x3000", 2, 128, i);
}

// kernels: also the sizes that a GPU has kernels of its own for; the same holds on a CPU.
static void check_ops(bool kernels) {
    static const int LINEAR[][3] = {{1, 1, 1}, {7, 5, 3}, {37, 70, 29}, {131, 33, 517}, {300, 64, 64},
                                    {64, 127, 255}, {515, 8, 1}, {2050, 136, 24}, {4500, 512, 8}};
    static const int ROWS[][3] = {{19, 13, 0}, {9, 18, 3}, {150, 128, 4}, {150, 512, 4}, {150, 1536, 12},
                                  {150, 5120, 40}};
    static const int HEAD_DIM[] = {32, 64, 128, 16, 24, 48, 72, 136, 256};
    float tiny[] = {1e-12f, -3e-10f, 0}, bad[] = {1, NAN, -7, NAN, 2}, *m = spoiled(1);
    for (int i = 0; i < 3; i++) {
        Given x = i < 2 ? uneven(5003, 0, 1, 4) : given_of(tiny, 3), y = again(x);
        float s = i == 1 ? 224 : 15, *want = as_act(nearest_tensor(x.h, x.n, s), x.n);
        absmax(m, x.a, x.n), hif8_tensor(plain(y.a), x.a, x.n, 1, s, m);
        note("Q(x; s)", !same_bits(down_act(y.a, x.n), want, x.n));
    }
    absmax(m, up_act(bad, 5), 5), note("absmax leaves NaN out", *down(m, 1) != 7);
    worst_row(0, "HiF8, bit for bit,");
    for (int i = 0; i < (kernels ? 9 : 5); i++) check_linear(LINEAR[i], ACTS, 0, 1);
    for (int i = 0; i < 3; i++) check_linear(LINEAR[i], FLOATS, 0, 1);
    for (int i = 0, n, D, heads; i < (kernels ? 6 : 2); i++) {
        n = ROWS[i][0], D = ROWS[i][1], heads = ROWS[i][2];
        for (int kind = 0; kind < 4; kind++) check_norm(n, D, kind & 1, kind >> 1);
        for (int rope = 0; rope < 2 && heads; rope++) check_rmsnorm_rope(n, D, heads, rope);
    }
    check_attention("5x5 0x0 33x33 1x1 164x164", 3, 6, USUAL), check_attention("300x300", 1, 40, LARGE);
    check_attention("70x9 0x4 1x0 10x197", 2, 10, USUAL);
    for (int i = 0; i < 9 && kernels; i++) check_attention("37x37 80x80", 2, HEAD_DIM[i], USUAL);
    for (int i = 0; i < 3 && kernels; i++) {
        check_attention(SELF, 2, HEAD_DIM[i], USUAL), check_attention(CROSS, 2, HEAD_DIM[i], USUAL);
        for (int j = FAR_BELOW; j <= SHRINKING; j++) check_attention("70x700", 1, HEAD_DIM[i], j);
    }
    check_patches(true), check_patches(false), check_words(), check_elementwise();
}

// ==== One driver: forward, loss, backward =================================================================
// A batch on the host (text: ids or rows), and what the model makes of it. dtext: d loss / d rows of text.
typedef struct { const float *x, *target, *rows; const int *ids; const double *t; } Question;
typedef struct { double loss; float *out, *grad, *dtext; } Answer;

// Gradients only of a run that trains; summed over ranks.
static Answer ask(Run *r, const Question *q) {
    Model *m = r->m;
    size_t n = r->B * latent_size(r), text = r->B * m->c.text_len * m->c.text_dim;
    float *dout = spoiled(n);
    Text said = {q->ids, q->rows};
    Answer a = {0, NULL, NULL, NULL};
    if (r->training) zero(m->dw, m->count * sizeof(float)), weights_prepare(m);
    text_set(r, said);
    forward(r, up(q->x, r->B * m->c.in_dim * r->N * 4), q->t);
    a.loss = mse(dout, r->out, up(q->target, n), n), a.out = down(r->out, n);
    if (!r->training) return a;
    backward(r, dout);
    float *dtext = up(down_act(r->dtext, text), text);           // rank 0 carries it, the others have zeros
    sum_over_ranks(r->ranks, m->dw, m->count, false), sum_over_ranks(r->ranks, dtext, text, false);
    a.grad = down(m->dw, m->count), a.dtext = down(dtext, text);
    return a;
}

static Ranks alone = {0, 1, 0, 1, false, {0}, {0}, {0}};     // one rank, one half
static const TrainOptions SMALL_TRAINING = {6, 2, 2, 2e-3, 0.9, 0.99, 1e-8, 0.01, 1, 0.99, 0.1, 1, 4};
static Run *run_on(Ranks *k, Model *m, int B, bool training) {
    return run_new(m, k, B, m->c.T, m->c.H_l / 2, m->c.W_l / 2, training);
}
static Run *run_of(Model *m, int B, bool training) { return run_on(&alone, m, B, training); }
static void spoil_run(Run *r) {                          // every buffer (of a model without a word table)
    Run *plan = run_plan(r->m, r->ranks, r->B, r->T, r->H, r->W, r->training);
    spoil(r->saved[0].x0, run_place(plan, NULL));
}

// ==== golden/: what a file is, is seen from what it holds =================================================
static File gold;                                        // the file being checked
static const void *needed(const void *found, const char *name) {
    if (!found) die("%s: no %s, which a file of this kind has; make the file again", gold.path, name);
    return found;
}
static const Entry *entry(const char *name) { return (const Entry *)needed(file_find(&gold, name), name); }
static double number(const char *key) { return atof((const char *)needed(file_meta(&gold, key), key)); }
// The values of a tensor, F32, I32 or plain U8, as floats on the host; NaN allowed.
static float *golden(const char *name) {
    const Entry *t = entry(name);
    const int32_t *whole = (const int32_t *)(const void *)t->data;
    float *x = floats(t->count);
    for (size_t i = 0; i < t->count; i++) x[i] = t->dtype == I32 ? (float)whole[i] : t->data[i];
    return t->dtype == F32 ? (float *)memcpy(x, whole, t->count * sizeof(float)) : x;
}
static float *up_golden(const char *name) { return up(golden(name), entry(name)->count); }
// Notes how far a tensor on the host, or the device, is from the golden one of this name.
static void note_golden(const char *name, const float *x) {
    note(name, relative(x, golden(name), entry(name)->count));
}
static void note_float(const char *name, const float *x) { note_golden(name, down(x, entry(name)->count)); }
static void note_act(const char *name, const act *x) { note_golden(name, down_act(x, entry(name)->count)); }

// The golden tensors of all these parameters as one arena. An adapter's LAYER.lora_A.weight is LAYER.A there.
static float *golden_arena(const char *prefix, const Param *param, int count) {
    float *all = floats(param[count - 1].offset + param[count - 1].count);
    for (const Param *p = param; p < param + count; p++) {
        const char *lora = strstr(p->name, ".lora_"), *name = fmt("%s%s", prefix, p->name);
        if (lora) name = fmt("%s%.*s.%c", prefix, (int)(lora - p->name), p->name, lora[6]);
        memcpy(all + p->offset, golden(name), p->count * sizeof(float));
    }
    return all;
}

// The file's model, with its adapters. plain: without HiF8.
static Run *golden_run(int B, bool training, bool plain) {
    Config c = config_read(&gold);
    if (plain) c.quant = c.quant_attn = 0;
    Model *m = model_layout(&c);
    if (file_meta(&gold, "lora_rank")) lora_new(m, (int)number("lora_rank"), number("lora_alpha"), 0);
    model_allocate(m, training);
    for (int i = 0; i < m->params; i++) param_set(m, &m->param[i], golden(m->param[i].name));
    Lora *l = m->lora;
    if (l) upload(l->w, golden_arena("lora.", l->param, 2 * l->count), l->n * sizeof(float));
    Run *r = run_of(m, B, training);
    spoil_run(r);
    return r;
}
static Answer golden_ask(Run *r) {
    double *t = widened(golden("input.t"), 1);
    Question q = {golden("input.latent"), golden("target"), golden("input.text"), NULL, t};
    return ask(r, &q);
}
static void note_each(const Model *m, const float *got, const float *want) {
    for (const Param *p = m->param; p < m->param + m->params; p++)
        note(p->name, relative(got + p->offset, want + p->offset, p->count));
}

// The residual stream after block i, tokens in plain order; alone: made from the golden one before it.
static void note_block(Run *r, int i, bool alone) {
    Saved *before = &r->saved[i], *after = before + 1;
    size_t row_bytes = r->m->c.dim * sizeof(float);
    float *all = up_golden(i ? fmt("act.block.%d", i - 1) : "act.patch");
    if (alone) {
        exchange(r, before->x0, all, WHOLE, before->layout, row_bytes);
        spoil(after->x0, r->N * row_bytes), block_forward(r, i);
    }
    spoil(all, r->N * row_bytes), exchange(r, all, after->x0, after->layout, WHOLE, row_bytes);
    note_float(fmt("act.block.%d", i), all);
}

// What products read of a matrix must be Q(W; 15), bit for bit; of the embeddings and the head, W itself.
static void check_quantized_weights(const Model *m) {
    for (const Param *p = m->param; p < m->param + m->params; p++) {
        if (!p->product) continue;
        size_t n = p->count;
        bool block = !strncmp(p->name, "blocks.", 7);
        float *want = down(p->w, n), *got = down_factor(p->compute, n);
        if (!p->exact) want = as_act(want, n);
        if (block) want = nearest_tensor(want, n, 15);
        if (p->compute.code) note(p->name, relative(got, want, n) > 1e-5);
        else note(p->name, !same_bits(got, block ? as_act(want, n) : want, n));
    }
    worst_row(0, "matrices as products read them, bit for bit (codes: to 1e-5),");
}

static void check_dit(void) {
    Config c = config_read(&gold);
    bool loose = c.quant && (tally.half || !file_meta(&gold, "margin"));
    double limit = loose ? tally.half ? 1e-1 : 5e-2 : 1e-5;
    bool full = c.num_full_blocks == c.num_layers;
    if (tally.half && full) { skip("gates of 0.002 are a difference of 0.37s: beyond bfloat16"); return; }
    Run *r = golden_run(1, true, false);
    Answer a = golden_ask(r);
    note_float("act.sin", r->sin), note_act("act.context", r->context), note_act("act.patch", r->tokens);
    note_float("act.e", r->e), note_float("act.e0", r->e0);
    worst_row(1e-5, "act.sin, e, e0, context, patch,");
    for (int i = 0; i < c.num_layers && !loose; i++) note_block(r, i, false);
    worst_row(1e-5, "act.block.*");
    note_golden("output", a.out);
    note_golden("output", golden_ask(golden_run(1, false, false)).out); // sampling shares buffers
    worst_row(limit, "with and without what backward keeps,");
    row(fabs(a.loss / *golden("loss") - 1), loose ? 5e-3 : 1e-5, "loss");
    float *want = golden_arena("grad.", r->m->param, r->m->params);
    if (loose) row(relative(a.grad, want, r->m->count), limit, "grad.* as one vector");
    else note_each(r->m, a.grad, want), note_golden("grad.input.text", a.dtext);
    worst_row(1e-4, "grad.*");
    if (!c.quant) return;
    check_quantized_weights(r->m);
    copy(r->e0, up_golden("act.e0"), entry("act.e0")->count * sizeof(float));
    to_act(r->context, up_golden("act.context"), entry("act.context")->count);
    quantize(r, r->context_q, r->context, c.text_len, c.dim, 15);
    for (int i = 0; i < c.num_layers && loose; i++) note_block(r, i, true);
    worst_row(2e-3, "each block from its golden input,");   // past a rounding boundary no two agree
    note_golden("output.unquantized", golden_ask(golden_run(1, false, true)).out);
    worst_row(1e-5, "HiF8 off,");
}

static void check_hif8_file(void) {
    size_t n = entry("x")->count;
    float all[256], *x = golden("x"), *y = floats(n), *code = golden("code"), fifteen = 15;
    act *q = up_act(x, n);
    for (int i = 0; i < 256; i++) all[i] = hif8_decode((uint8_t)i);
    for (size_t i = 0; i < n; i++)
        y[i] = hif8_round(x[i]), note("encode", hif8_encode(x[i]) != (uint8_t)code[i]);
    note("decode", !same_bits(all, golden("decode"), 256)), note("round", !same_bits(y, golden("y"), n));
    hif8_tensor(plain(q), q, n, 1, 15, up(&fifteen, 1));
    if (!tally.half) note("hif8_tensor", !same_bits(down_act(q, n), y, n));
    worst_row(0, "codes and values, bit for bit,");
}

// The three patterns of a grid, shared by R ranks.
static Pattern *patterns_of(int T, int H, int W, int P, int R) {
    Pattern *p = (Pattern *)xalloc(PATTERNS, sizeof(Pattern));
    for (int k = 0; k < PATTERNS; k++) {
        skiparse_lengths(&p[k], k, T, H, W, P, R);
        skiparse_order(&p[k], k, T, H, W, P);
    }
    return p;
}
static Exchange exchange_of(const Pattern *p, int have, int want, int B, int rank, int R) {
    Exchange e;
    memset(&e, 0, sizeof e);
    exchange_init(&e, p, have, want, B, rank, R);
    return e;
}

// What one rank's move packs.
static int *packed(const Pattern *p, int have, int want) {
    Exchange e = exchange_of(p, have, want, 1, 0, 1);
    return (int *)fetched(e.pack, e.sent * sizeof(int));
}
static void note_ints(const char *what, const int *got, const char *name) {
    note(what, memcmp(got, entry(name)->data, entry(name)->count * sizeof(int)) != 0);
}

static void check_skiparse_file(void) {
    static const char *const KIND[] = {"", "token", "group"};
    const char *at = file_meta(&gold, "cases");
    for (int T, H, W, P, used; sscanf(at, "%d,%d,%d,%d %n", &T, &H, &W, &P, &used) == 4; at += used) {
        const char *grid = fmt("T%dH%dW%dP%d", T, H, W, P);
        Pattern *p = patterns_of(T, H, W, P, 1);
        for (int i = TOKEN_WISE; i <= GROUP_WISE; i++) {
            const char *order = fmt("%s.%s_order", grid, KIND[i]);
            int *exit_map = packed(p, i, FULL), length[64];
            for (int s = 0; s < P * P; s++) length[s] = p[i].start[s + 1] - p[i].start[s];
            for (int j = 0; j < T * H * W; j++) note("exit", exit_map[p[i].order[j]] != j);
            note_ints("order", p[i].order, order), note_ints("entry", packed(p, FULL, i), order);
            note_ints("lengths", length, fmt("%s.%s_lens", grid, KIND[i]));
            note("count", p[i].count != P * P);
            note_ints("exchange", packed(p, i, 3 - i), fmt("%s.%s_to_%s", grid, KIND[i], KIND[3 - i]));
        }
        worst_row(0, fmt("%s,", grid));
    }
}

static void check_sampler(void) {
    int S = (int)number("S");
    size_t n = entry("noise")->count;
    double shift = number("shift"), g = number("guidance"), *sigma = doubles(S + 1), fifty[51];
    float *normal = golden("train.normal"), *tokens = golden("train.tokens"), *timestep = golden("timesteps");
    schedule(sigma, S, shift), schedule(fifty, 50, 7);
    note_golden("sigmas", rounded(sigma, S + 1)), note_golden("sigmas50", rounded(fifty, 51));
    for (int i = 0; i < S; i++) note("timesteps", fabs(1000 * sigma[i] / timestep[i] - 1));
    for (size_t i = 0; i < entry("train.tokens")->count; i++) {
        double s = train_shift((int)tokens[i]);
        note("train.shift", fabs(s / golden("train.shift")[i] - 1));
        note("train.sigma", fabs(shift_sigma(1 / (1 + exp(-normal[i])), s) / golden("train.sigma")[i] - 1));
    }
    worst_row(1e-6, "sigmas, timesteps, training's shift and sigma,");
    Run *r = golden_run(1, false, false);
    float *x = up_golden("noise"), *v = spoiled(n), *whole = up_golden("noise");
    Text cond = {NULL, golden("text_cond")}, uncond = {NULL, golden("text_uncond")};
    guided_velocity(r, v, x, sigma[0], cond, uncond, 1), note_float("v.cond", v);
    guided_velocity(r, v, x, sigma[0], cond, uncond, 0), note_float("v.uncond", v);
    for (int i = 0; i < S; i++) {
        guided_velocity(r, v, x, sigma[i], cond, uncond, g);
        lincomb(x, 1, x, (float)(sigma[i + 1] - sigma[i]), v, n);
        note_float(fmt("x.%d", i + 1), x);
    }
    sample(r, whole, cond, uncond, S, shift, g);
    note_float(fmt("x.%d", S), whole);
    worst_row(1e-5, "velocities, x after each step and after sample(),");
}

static void check_adamw_file(void) {
    AdamW o = {1, (float)number("lr"), (float)number("eps"), (float)number("weight_decay"), number("beta1"),
               number("beta2"), number("ema_decay"), 1};
    size_t n = entry("param")->count;
    float *w = up_golden("param"), *ema = up_golden("param"), *m = device_floats(n), *v = device_floats(n);
    for (; o.t <= 3; o.t++) {
        adamw(w, m, v, ema, up_golden(fmt("grad.%d", o.t)), n, o);
        note_float(fmt("param.%d", o.t), w), note_float(fmt("m.%d", o.t), m);
        note_float(fmt("v.%d", o.t), v), note_float(fmt("ema.%d", o.t), ema);
    }
    worst_row(1e-6, "parameters, moments, average of 3 steps,");
}

// ---- Mix-GRPO --------------------------------------------------------------------------------------------
// Row order[b]/per, step i of W, of a golden [rows, W, one], for each of B videos.
static float *picked(const char *name, const float *order, int per, int B, int i, int W, size_t one) {
    float *all = golden(name), *x = floats(B * one);
    for (size_t j = 0; j < B * one; j++)
        x[j] = all[((int)order[j / one] / per * W + i) * one + j % one];
    return x;
}

// Step i of W of the videos order[0 .. B − 1]. set: of whose old log-probabilities.
static PolicyBatch golden_batch(const Run *r, const char *set, const float *order, int i, int W) {
    int B = r->B, G = (int)number("group"), index = file_meta(&gold, "index") ? (int)number("index") : 0;
    size_t one = latent_size(r), n = B * one, text = entry("text_uncond")->count;
    float *sigma = golden("sigmas") + index + i;
    PolicyBatch p = {sigma[0], sigma[1], {NULL, picked("text_cond", order, G, B, 0, 1, text)},
                     {NULL, picked("text_uncond", order, 100, B, 0, 1, text)},
                     up(picked("x", order, 1, B, i, W, one), n),
                     up(picked("x_next", order, 1, B, i, W, one), n),
                     up(picked("mean_ref", order, 1, B, i, W, one), n),
                     widened(picked("advantages", order, 1, B, 0, 1, 1), B),
                     widened(picked(fmt("%slogp_old", set), order, 1, B, i, W, 1), B)};
    return p;
}

// W steps of these videos: the mean without the adapter, the figures of each, the loss, the gradients.
static void check_policy(Run *r, const char *set, const char *prefix, const float *order, int W) {
    static const char *const NAME[] = {"ratio", "policy_loss", "clipped", "kl_loss"};
    Lora *l = r->m->lora;
    size_t n = r->B * latent_size(r);
    float *mean = spoiled(n), scale = l->scale;
    float *grad = golden_arena(fmt("%sgrad.lora.", prefix), l->param, 2 * l->count);
    double loss = 0;
    Surrogate out[8];
    PolicyOptions o = {0, 0, 0, 0, 0, 0, number("guidance"), 0, number(fmt("%sclip", set)),
                       number(fmt("%sbeta", set)), NULL};
    zero(l->dw, l->n * sizeof(float));
    for (int i = 0; i < W; i++) {
        PolicyBatch p = golden_batch(r, set, order, i, W);
        l->scale = 0, weights_prepare(r->m);
        policy_mean(r, mean, &p, o.guidance), near("mean_ref", mean, down(p.mean_ref, n), n);
        l->scale = scale, weights_prepare(r->m);
        loss += policy_step(r, out, mean, spoiled(n), &p, &o, 1.0 / W) / W;
        for (int j = 0; j < 4 * r->B; j++) {
            int b = j / 4, k = j % 4;                    // kl_loss: relative, to 1e-5; the same in all cases
            const double got[] = {out[b].ratio, out[b].policy_loss, (double)out[b].clipped, out[b].kl};
            double want = golden(fmt("%s%s", k == 3 && *set ? "" : prefix, NAME[k]))[b * W + i];
            note(NAME[k], fabs(got[k] - want) / (k == 3 ? 2 * want : 1));
        }
    }
    note("loss", fabs(loss - *golden(fmt("%sloss", prefix))));
    if (*set) note_float("mean", mean);
    worst_row(5e-6, fmt("%smean_ref, ratio, policy_loss, clipped, kl_loss, loss,", prefix));
    lora_backward(r->m);
    for (const Param *p = l->param; p < l->param + 2 * l->count; p++)
        near(p->name, p->dw, grad + p->offset, p->count);
    worst_row(1e-4, fmt("%sgrad.lora.*", prefix));
}

static void check_grpo(void) {
    static const char *const PREFIX[] = {"", "adv_big.", "adv_flat."};
    static const float ORDER[] = {0, 1, 2, 3};
    int G = (int)number("group"), S = (int)number("S"), index = (int)number("index");
    Run *r = golden_run(G, true, false);
    size_t n = latent_size(r);
    double sigma[64], advantage[64];
    float *next = up_golden("x_next"), *mean = up_golden("mean");
    schedule(sigma, S, 1), note_golden("sigmas", rounded(sigma, S + 1));
    double std = sde_step(sigma[index], sigma[index + 1]).std;
    note("std", fabs(std / *golden("std") - 1));
    for (int b = 0; b < G; b++)
        note("logp", fabs(log_probability(next + b * n, mean + b * n, std, n) - golden("logp")[b]));
    for (int i = 0; i < 3; i++) {
        const char *rewards = fmt("%srewards", PREFIX[i]);
        size_t count = entry(rewards)->count;
        advantages(advantage, widened(golden(rewards), count), (int)count);
        note_golden(fmt("%sadvantages", PREFIX[i]), rounded(advantage, count));
    }
    worst_row(1e-6, "sigmas, std, log-probability, advantages,");
    if (tally.half) skip("case0: bfloat16 cannot tell on which side of a range of 1e-4 a ratio lies");
    else check_policy(r, "case0.", "case0.", ORDER, 1);
    check_policy(r, "case1.", "case1.", ORDER, 1);
}

// Two micro-batches, an AdamW step each, of videos of two captions.
static void check_grpo_micro(void) {
    int B = (int)number("micro"), W = (int)number("window");
    Optimizer opt;
    TrainOptions t = SMALL_TRAINING;
    if (tally.half) { skip("old log-probabilities of float64: bfloat16 leaves the clip's range"); return; }
    Run *r = golden_run(B, true, false);
    Lora *l = r->m->lora;
    float *start = down(l->w, l->n), *order = golden("order");
    t.beta1 = number("beta1"), t.beta2 = number("beta2"), t.eps = number("adam_eps");
    t.clip = number("max_norm"), t.weight_decay = number("weight_decay");
    optimizer_init(&opt, l->w, l->dw, l->n);
    for (int N = 0; N < 2; N++) {
        const char *name = fmt("micro%d.", N);
        check_policy(r, "", name, order + N * B, W);
        double norm = optimizer_step(&opt, &alone, &t, number("lr"));
        row(fabs(norm / *golden(fmt("%snorm", name)) - 1), 1e-5, fmt("%s norm before clipping", name));
        float *want = golden_arena(fmt("%slora.", name), l->param, 2 * l->count), *fresh = down(l->w, l->n);
        for (size_t i = 0; i < l->n; i++) fresh[i] -= start[i], want[i] -= start[i];
        row(relative(fresh, want, l->n), 3e-4, fmt("%s the adapter's whole change", name));
    }
}

static void check_golden(const char *folder) {
    glob_t g;
    if (glob(fmt("%s/*.safetensors", folder), 0, NULL, &g))
        die("--golden %s: no .safetensors there; give the folder of reference numbers", folder);
    for (size_t i = 0; i < g.gl_pathc; i++) {
        file_open(&gold, g.gl_pathv[i]);
        const char *name = strrchr(g.gl_pathv[i], '/') + 1;
        tally.subject = fmt("%.*s: ", (int)strcspn(name, "."), name);
        if (file_find(&gold, "decode")) check_hif8_file();
        else if (file_meta(&gold, "cases")) check_skiparse_file();
        else if (file_find(&gold, "ema.1")) check_adamw_file();
        else if (file_find(&gold, "micro0.ratio")) check_grpo_micro();
        else if (file_find(&gold, "rewards")) check_grpo();
        else if (file_find(&gold, "x.1")) check_sampler();
        else if (file_find(&gold, "output")) check_dit();
        else row(1, 0, "of a kind that nothing here checks");
        file_close(&gold);
    }
    tally.subject = "";
}

// ==== The model beyond golden/: batches, repetition, training, files, exchanges, the small world ==========
// quant: 1 linear layers, 2 attention, 3 both.
static Config small_config(int vocab, int quant) {
    Config c = {24, 40, 2, 8, 4, 2, 3, 3, 16, 12, 16, vocab, quant & 1, quant >> 1, 3, 12, 20, 0, 1e-6};
    return c;
}
// A model of random numbers, quickly: there may be billions of them.
static Model *random_model(const Config *c, bool training, uint64_t seed) {
    Model *m = model_layout(c);
    const float *random = noise(1, 1 << 16, 1);
    model_allocate(m, training);
    for (Param *p = m->param; p < m->param + m->params; p++) {
        float *w = floats(p->count), scale = p->rank > 1 ? sqrtf((float)p->shape[0] / p->count) : 0.2f;
        float middle = strstr(p->name, "norm") && strstr(p->name, "weight") ? 1 : 0;
        size_t first = (seed + (p - m->param)) * 7919;
        #pragma omp parallel for
        for (size_t j = 0; j < p->count; j++) w[j] = middle + scale * random[(first + 3 * j) % (1 << 16)];
        param_set(m, p, w), free(w);
    }
    return m;
}
static Model *small_model(int vocab, int quant, uint64_t seed) {
    Config c = small_config(vocab, quant);
    return random_model(&c, true, seed);
}

// Samples first.. of a fixed batch of two, for models of this config.
static Question question(const Config *c, int first) {
    static const double t[] = {700, 150};
    size_t pixels = c->in_dim * c->T * c->H_l * c->W_l, text = c->text_len * c->text_dim;
    int *ids = (int *)xalloc(2 * c->text_len, sizeof(int));
    caption_ids(ids, c->text_len, "a large red circle moving left on a black background");
    caption_ids(ids + c->text_len, c->text_len, "a small blue square");
    Question q = {noise(90, 2 * pixels, 1) + first * pixels, noise(91, 2 * pixels, 1) + first * pixels,
                  noise(92, 2 * text, 1) + first * text, ids + first * c->text_len, t + first};
    return q;
}

// The slope of a captioned model's loss along its gradient, which golden/ does not hold: its square.
static void check_words_model(void) {
    Run *r = run_of(small_model(VOCAB, 0, 300), 1, true);
    Model *m = r->m;
    Question q = question(&m->c, 0);
    float *w = up(down(m->w, m->count), m->count), *grad = up(ask(r, &q).grad, m->count);
    if (tally.half) { skip("a captioned model's slope needs float32's differences"); return; }
    for (int whole = 0; whole < 2; whole++) {
        size_t from = whole ? 0 : m->words->offset, n = whole ? m->count : m->words->count;
        double squares = sum_squares(grad + from, NULL, n), loss[2];
        float h = (float)(3e-3 / sqrt(squares));
        for (int i = 0; i < 2; i++) {
            lincomb(m->w + from, 1, w + from, i ? h : -h, grad + from, n);
            loss[i] = ask(r, &q).loss;
        }
        note(whole ? "all weights" : "the word table", fabs((loss[1] - loss[0]) / (2.0 * h) / squares - 1));
    }
    worst_row(3e-3, "a captioned model's slope along its gradient,");
}

static bool same_answer(const Run *r, Answer a, Answer b) {
    return same_bits(a.out, b.out, r->B * latent_size(r)) && same_bits(a.grad, b.grad, r->m->count);
}
// The same bits again, in other buffers, with other threads. Without HiF8 a batch is its samples' mean. HiF8
// in attention alone (2): nothing rounds dv again; rounding once more changes the scale's last bit only.
static void check_repetition(int quant) {
    Model *m = small_model(0, quant, 200);
    Run *r = run_of(m, 2, true), *fresh = run_of(m, 2, true), *one = run_of(m, 1, true);
    Question q = question(&m->c, 0), second = question(&m->c, 1);
    int threads = threads_here();
    size_t n = latent_size(one);
    spoil_run(fresh), spoil_run(one);
    Answer both = ask(r, &q), a = ask(one, &q), b = ask(one, &second);
    note("again", !same_answer(r, both, ask(r, &q))), note("fresh", !same_answer(r, both, ask(fresh, &q)));
    for (int t = 1; t <= 4; t *= 2)
        threads_set(t), note(fmt("%d threads", t), !same_answer(r, both, ask(r, &q)));
    threads_set(threads);
    worst_row(0, fmt("output and gradients, run to run, bit for bit%s,", quant ? ", HiF8" : ""));
    const SavedAttention *s = &r->saved[3].self;
    const act *const once[] = {s->q.x, s->k.x, s->v, r->dv};
    for (size_t i = 0, all = 2 * r->N * m->c.dim; i < 4 && quant == 2; i++) {
        float *x = down_act(once[i], all);
        note(i < 3 ? "q, k, v" : "dv", relative(x, nearest_tensor(x, all, i < 3 ? 15 : 224), all));
    }
    worst_row(1e-6, "HiF8 in attention alone: rounded once is rounded,");
    if (quant) return;
    note("first", relative(both.out, a.out, n)), note("second", relative(both.out + n, b.out, n));
    worst_row(3e-6, "a batch of 2 gives each sample's own output,");
    for (size_t i = 0; i < m->count; i++) a.grad[i] = (a.grad[i] + b.grad[i]) / 2;
    note_each(m, both.grad, a.grad);
    worst_row(1e-5, "a batch of 2 gives the mean of the gradients,");
}

// ---- training --------------------------------------------------------------------------------------------
// x_σ = σ·ε + (1 − σ)·x0, the target ε − x0, t = 1000σ, from the clips and draws that training names.
static void check_batch_fill(void) {
    enum { B = 3 };
    Run *r = run_of(small_model(VOCAB, 0, 1), B, true);
    TrainOptions o = SMALL_TRAINING;
    Batch a;
    size_t n = latent_size(r);
    int dropped = 0, wrong = 0, ids[12];
    float *x0 = floats(n), *x = floats(n), *target = floats(n);
    o.drop = 0.5, o.seed = 9;
    batch_new(&a, r);
    for (int k = 15; k < 75; k++) {
        int b = k % B, caption = -1;
        char text[128], known[128] = "";
        if (!b) batch_fill(&a, r, &o, k / B);
        training_caption(text, 9, k);
        while (strcmp(known, text) && ++caption < CAPTIONS)
            caption_text(known, sizeof known, scene_of(caption));
        draw_clip(x0, scene_of(caption), 9, k, r->m->c.T, r->m->c.H_l, r->m->c.W_l);
        double sigma = shift_sigma(1 / (1 + exp(-rng_normal(9, SIGMA_STREAM, k))), train_shift(60));
        for (size_t i = 0; i < n; i++) {
            double eps = rng_normal(9, NOISE_STREAM, k * n + i);
            x[i] = (float)(sigma * eps + (1 - sigma) * x0[i]), target[i] = (float)(eps - x0[i]);
        }
        note("t", fabs(a.t[b] / 1000 / sigma - 1));
        note("x", relative(a.x + b * n, x, n)), note("target", relative(a.target + b * n, target, n));
        bool drop = a.ids[b * 12] < 0;
        caption_ids(ids, 12, drop ? "" : text);
        dropped += drop;
        wrong += caption == CAPTIONS || held_out(caption) || memcmp(ids, a.ids + b * 12, sizeof ids);
    }
    worst_row(1e-5, "training's samples: sigma, x = sigma·noise + (1 − sigma)·clip, target,");
    note("captions, none held out", wrong), note("half dropped", dropped < 15 || dropped > 45);
    worst_row(0, "training's samples,");
}

// An untrained model answers 0, so its velocity loss is the mean of (ε − x0)² at every σ, of held-out clips.
static void check_velocity_loss(void) {
    enum { CLIPS = 5 };
    Model *m = model_layout(&PRESETS[0]);
    const Config *c = &m->c;
    model_allocate(m, true), model_random(m, 1);
    Run *r = run_of(m, 2, true);
    size_t n = latent_size(r);
    float *x0 = floats(n);
    double mean[BINS + 1], error[BINS + 1], want = 0, squares = 0;
    int caption = 0;
    for (int i = 0; i < CLIPS; i++) {
        caption = next_held_out(caption), note("held out", !held_out(caption));
        draw_clip(x0, scene_of(caption), 7, i, c->T, c->H_l, c->W_l);
        double loss = 0;
        for (size_t j = 0; j < n; j++) loss += pow(rng_normal(7, NOISE_STREAM, i * n + j) - x0[j], 2) / n;
        want += loss / CLIPS, squares += loss * loss / CLIPS;
    }
    double spread = sqrt((squares - want * want) / (CLIPS - 1));
    velocity_loss(mean, error, r, CLIPS, 7);
    for (int bin = 0; bin <= BINS; bin++)
        note("mean", fabs(mean[bin] / want - 1)), note("error", fabs(error[bin] / spread - 1));
    worst_row(1e-4, "velocity loss of a model that answers 0, by sigma,");
}

// Blocks of one kind where the config asks for it; the full ones stay.
static void check_one_kind(void) {
    int wrong = 0;
    for (int kind = 0; kind <= GROUP_WISE; kind++) {
        Config c = PRESETS[1];
        c.sparse = kind;
        const Run *r = run_plan(model_layout(&c), &alone, 1, c.T, c.H_l / 2, c.W_l / 2, false);
        for (int i = 0; i < c.num_layers; i++) {
            int want = i < 2 || i > 9 ? FULL : kind ? kind : i % 2 ? GROUP_WISE : TOKEN_WISE;
            wrong += r->saved[i].pattern != want;
        }
    }
    row(wrong, 0, "--sparse both, token, group: the patterns of 12 blocks");
}

static void train_some(Optimizer *opt, Model *m, int from, int to) {
    TrainOptions o = SMALL_TRAINING;
    Run *r = run_of(m, o.batch, true);
    size_t n = r->B * latent_size(r);
    float *x = spoiled(n), *target = spoiled(n), *dout = spoiled(n);
    Batch a;
    batch_new(&a, r);
    for (int step = from; step < to; step++) {
        batch_fill(&a, r, &o, step), batch_upload(r, &a, x, target);
        train_step(r, &a, x, target, dout);
        optimizer_step(opt, &alone, &o, learning_rate(&o, step));
    }
}
static void check_resume(const char *path, int quant) {
    Model *m[3];
    Optimizer o[3];
    for (int i = 0; i < 3; i++) {
        m[i] = small_model(VOCAB, quant, i < 2 ? 500 : 900);
        optimizer_init(&o[i], m[i]->w, m[i]->dw, m[i]->count);
    }
    size_t n = m[0]->count;
    train_some(&o[0], m[0], 0, 6), train_some(&o[1], m[1], 0, 3);
    note("saved", state_save(path, &o[1], "this run") != NULL);
    note("loaded", !state_load(path, &o[2], "this run"));
    train_some(&o[2], m[2], 3, 6);
    float *a[] = {o[0].w, o[0].m, o[0].v, o[0].ema}, *b[] = {o[2].w, o[2].m, o[2].v, o[2].ema};
    for (int i = 0; i < 4; i++) note("weights and moments", !same_bits(down(a[i], n), down(b[i], n), n));
    note("step", o[2].step != 6);
    worst_row(0, fmt("6 training steps = 3, saved, resumed, 3, bit for bit%s,", quant ? ", HiF8" : ""));
}

static void check_optimizer(void) {
    size_t n = 1000;
    TrainOptions o = SMALL_TRAINING;
    float *g = noise(1, n, 1), *w = noise(2, n, 1), *m = floats(n), *v = floats(n), *ema = floats(n);
    double norm = sqrt(sum_squares(up(g, n), NULL, n));
    for (int clipped = 0; clipped < 2; clipped++) {
        Optimizer a;
        optimizer_init(&a, up(w, n), up(g, n), n);
        o.clip = clipped ? 0.5 : 1e9;
        note("norm", fabs(optimizer_step(&a, &alone, &o, 1e-3) / norm - 1));
        float *after = down(a.w, n);
        for (size_t i = 0; i < n; i++) {
            double gi = g[i] * (clipped ? 0.5 / norm : 1);
            m[i] = (float)(0.1 * gi), v[i] = (float)(0.01 * gi * gi);
            ema[i] = 2 / 11.0f * w[i] + 9 / 11.0f * after[i];
        }
        near("m, clipped or not", a.m, m, n), near("v, clipped or not", a.v, v, n);
        near("average, young", a.ema, ema, n), note("gradient zeroed", sum_squares(a.dw, NULL, n));
    }
    o.steps = 100, o.warmup = 10, o.lr = 1;
    note("warm-up", fabs(learning_rate(&o, 0) - 0.1)), note("cosine", fabs(learning_rate(&o, 50) - 0.525));
    note("end", fabs(learning_rate(&o, 100) - 0.05));
    worst_row(1e-6, "optimizer: norm, clipping, average, schedule,");
}

// ---- files -----------------------------------------------------------------------------------------------
// What a tensor must be after a file: HiF8 codes, bfloat16 to the nearest (ties to even), or itself.
static float *as_stored(const float *x, size_t n, enum Dtype dtype) {
    float *y = floats(n);
    if (dtype == U8) return nearest_tensor(x, n, 15);
    for (size_t i = 0; i < n; i++) {
        double step = ldexp(1, ilogb(x[i]) - 7);             // rint is to even; no number here is subnormal
        y[i] = dtype == BF16 && x[i] ? (float)(rint(x[i] / step) * step) : x[i];
    }
    return y;
}

static void check_checkpoint(const char *path, const char *kind) {
    Model *m = small_model(VOCAB, 3, 700), *read = model_layout(&m->c);
    int count[4] = {0, 0, 0, 0}, matrices = 0;
    bool codes = !strcmp(kind, "hif8");
    File f;
    note("saved", model_save(path, m, m->w, kind) != NULL);
    file_open(&f, path);
    Config stored = config_read(&f);
    model_allocate(read, true), weights_read(read, read->param, read->params, &f);
    for (int i = 0; i < CONFIG_ROWS; i++)
        note(CONFIG[i], *config_field(&stored, i) != *config_field(&m->c, i));
    for (int i = 0; i < m->params; i++) {
        Param *p = &m->param[i], *back = &read->param[i];
        size_t n = p->count;
        enum Dtype dtype = file_find(&f, p->name)->dtype;
        float *want = as_stored(down(p->w, n), n, dtype);
        count[dtype]++, matrices += p->block_matrix;
        note(p->name, !same_bits(want, down(back->w, n), n) || (dtype == U8 && !p->block_matrix));
        if (!p->block_matrix) param_set(m, p, want);     // so that the two models may be compared
        else if (codes)
            note(p->name, !same_bits(down_factor(p->compute, n), down_factor(back->compute, n), n));
    }
    file_close(&f);
    note("dtypes", count[U8] != (codes ? matrices : 0) || (count[BF16] > 0) != (strcmp(kind, "f32") != 0));
    float large = 3.4e38f;                                   // rounds to infinity in 16 bits: the old file stays
    if (!strcmp(kind, "bf16")) upload(m->w, &large, sizeof large);
    if (!strcmp(kind, "bf16")) note("refused", !model_save(path, m, m->w, kind) || access(path, F_OK));
    worst_row(0, fmt("a %s checkpoint read back, bit for bit,", kind));
    if (!strcmp(kind, "bf16")) return;
    Question q = question(&m->c, 0);
    Run *r = run_of(read, 2, true);
    row(!same_answer(r, ask(r, &q), ask(run_of(m, 2, true), &q)), 0,
        fmt("a %s checkpoint's output and gradients under HiF8 = its origin's, bit for bit", kind));
}

// A whole update of Mix-GRPO in one micro-batch, which dies where a ratio is not 1; then who is learned from.
static void check_policy_update(void) {
    enum { V = 4, W = 2 };
    Config c = small_config(VOCAB, 0);
    Model *m = model_layout(&c);
    PolicyOptions o = {1, 2, 2, V, 4, W, 3, 1, 5e-3, 0.004, "all"};
    TrainOptions t = SMALL_TRAINING;
    Optimizer opt;
    int video[V];
    lora_new(m, 4, 8, 1), model_allocate(m, true);
    for (int i = 0; i < m->params; i++) param_set(m, &m->param[i], noise(900 + i, m->param[i].count, 0.2));
    upload(m->lora->w, noise(5, m->lora->n, 0.1), m->lora->n * sizeof(float));
    optimizer_init(&opt, m->lora->w, m->lora->dw, m->lora->n);
    weights_prepare(m);
    Policy *p = policy_new(run_of(m, V, false), run_of(m, V, true), &o, &t);
    PolicyFigures f = policy_update(p, &opt);
    row(f.steps != 1 || f.count != V * W || !(f.kl > 1e-12 && f.norm > 0), 0,
        "GRPO: one AdamW step of all videos, whose reference has no adapter");
    p->advantage[0] = p->advantage[2] = 0;
    int count = shuffled_videos(video, p, 7);
    row(count != 2 || video[0] * video[1] != 3, 0, "GRPO: videos without an advantage are dropped");
}

static void check_adapter_file(const char *path) {
    Model *m = small_model(VOCAB, 0, 700), *other = small_model(VOCAB, 0, 700);
    lora_new(m, 4, 8, 3);
    Lora *l = m->lora;
    upload(l->w, noise(5, l->n, 0.1), l->n * sizeof(float));
    note("saved", lora_save(path, l, l->w) != NULL);
    lora_load(other, path);
    note("scale", other->lora->scale != l->scale);
    for (int i = 0; i < 2 * l->count; i++) {
        const Param *p = &l->param[i], *q = &other->lora->param[i];
        note(p->name, !same_bits(down(p->w, p->count), down(q->w, p->count), p->count));
    }
    worst_row(0, "an adapter's file read back, bit for bit,");
}

// ---- the exchanges of R ranks, played in one process -----------------------------------------------------
// What rank r holds, in its order: (b·N + token)·R + share of the heads.
static int held_units(int *unit, const Pattern *p, int layout, int r, int R, int B) {
    bool dealt = layout >= HEADS && layout < WHOLE, all = layout >= HEADS;
    const Pattern *order = &p[layout % PATTERNS];
    int N = order->start[order->count], count = 0;
    for (int b = 0; b < B; b++)
        for (int j = all ? 0 : order->first[r]; j < (all ? N : order->first[r + 1]); j++)
            for (int s = dealt ? r : 0; s < (dealt ? r + 1 : R); s++)
                unit[count++] = (b * N + order->order[j]) * R + s;
    return count;
}

// The wrong places after a move: each rank packs its units, sends, and unpacks what arrives.
static int wrong_places(const Pattern *p, int have, int want, int R, int B) {
    int N = p->start[p->count], most = B * N * R, *unit = (int *)xalloc(5 * most, sizeof(int)), wrong = 0;
    int *pack = unit + most, *sent = pack + most, *got = sent + most, *expected = got + most;
    Exchange e[16];
    for (int r = 0; r < R; r++) e[r] = exchange_of(p, have, want, B, r, R);
    for (int r = 0; r < R; r++) {
        int arrived = 0, per = R / e[r].shares, n = held_units(expected, p, want, r, R, B) / per;
        for (int s = 0; s < R; s++) { // rank s's packed units; those for r follow those before
            held_units(unit, p, have, s, R, B);
            download(pack, e[s].pack, e[s].sent * sizeof(int));
            const int *at = pack;
            for (int before = 0; before < r; before++) at += e[s].send[before];
            for (int j = 0; j < e[s].send[r]; j++) sent[arrived++] = unit[at[j] * per];
            wrong += e[s].send[r] != e[r].receive[s];
        }
        wrong += arrived != n || (size_t)n != e[r].received;
        download(got, e[r].unpack, n * sizeof(int));
        for (int i = 0; i < n; i++) wrong += sent[got[i]] != expected[i * per];
    }
    free(unit);
    return wrong;
}

static void check_exchanges(void) {
    static const int CASES[][4] = {{3, 6, 10, 2}, {2, 8, 8, 2}, {2, 9, 18, 3}, {1, 3, 2, 2}};
    for (int i = 0; i < 4; i++)
        for (int R = 1, P = CASES[i][3]; R <= P * P; R++) {
            if (P * P % R) continue;
            Pattern *p = patterns_of(CASES[i][0], CASES[i][1], CASES[i][2], P, R);
            for (int move = 0; move < WHOLE * LAYOUTS; move++) // from any layout but WHOLE to any
                note(fmt("%d ranks", R), wrong_places(p, move / LAYOUTS, move % LAYOUTS, R, 2));
        }
    worst_row(0, "exchanges between all layouts, batch 2, every token where it belongs,");
}

// ---- the small world: ShapesBench on real clips, under their own captions and under others' ---------------
static void check_world(int T, int H, int W) {
    static const double chance[] = {1 / 8.0, 1 / 4.0, 1 / 2.0, 1 / 5.0, 1 / 3.0};
    float *x = floats(3 * T * H * W), score[N_SCORES];
    double mean[2][2][N_SCORES + 1] = {{{0}}};           // [soft][others' captions][score; the last: total]
    for (int i = 0; i < 4 * CAPTIONS; i++) {
        int soft = i & 1, strange = i >> 1 & 1, caption = i / 4;
        Scene s = scene_of(caption), other = scene_of((int)(rng_bits(5, 5, caption) % CAPTIONS));
        if (i % 4 == 0) draw_clip(x, s, 3, caption, T, H, W);
        shapes_score(score, x, strange ? other : s, T, H, W, soft);
        for (int k = 0; k < 2 * N_SCORES; k++)
            mean[soft][strange][k < N_SCORES ? k : N_SCORES] +=
                100 * score[k % N_SCORES] / CAPTIONS / (k < N_SCORES ? 1 : N_SCORES);
    }
    for (int soft = 0; soft < 2; soft++)
        row(100 - mean[soft][0][N_SCORES], soft ? 10 : 1,
            fmt("ShapesBench%s, real clips of %dx%dx%d: 100 less the total", soft ? " soft" : "", T, H, W));
    for (int k = 0; k < 5; k++) note(SCORE_NAMES[k], fabs(mean[0][1][k] - 100 * chance[k]));
    worst_row(5, "ShapesBench, others' captions: points away from chance,");
    row(mean[1][1][N_SCORES], 80, "ShapesBench soft, others' captions");
}

static void check_captions(void) {
    int held = 0;
    for (int caption = 0; caption < CAPTIONS; caption++) {
        char text[128];
        caption_text(text, sizeof text, scene_of(caption)), held += held_out(caption);
        note("read as written", parse_caption(text) != caption);
    }
    note("96 held out", held != 96);
    worst_row(0, "captions,");
}

static int run_tests(const char *folder, bool ops_only) {
    static const char *const KIND[] = {"f32", "bf16", "hif8"};
    if (!tally.silent) printf("%-88s %9s %9s\n", "check", "measured", "limit");
    check_ops(ON_GPU || ops_only);                           // 20 s on a CPU, with all sizes
    check_all_codes();
    if (!ops_only) {
        const char *scratch = scratch_folder("test"), *path = fmt("%s/file", scratch);
        check_golden(folder);
        check_exchanges();
        check_words_model();
        check_repetition(2);
        for (int quant = 0; quant < 2; quant++) check_repetition(3 * quant), check_resume(path, 3 * quant);
        check_batch_fill(), check_velocity_loss(), check_one_kind();
        check_optimizer();
        for (int i = 0; i < (tally.half ? 2 : 3); i++) check_checkpoint(path, KIND[i]);  // bf16 rounds first
        check_adapter_file(path), check_policy_update();
        check_world(4, 16, 16), check_world(8, 32, 32);
        check_captions();
        unlink(path), rmdir(scratch);
    }
    return tally_print();
}

// ==== verify: the paper's claims, each beside what is computed or measured here ===========================
// Sizes that are only ever run with random weights; a frame has H_l/2 x W_l/2 tokens.
static const struct { const char *name; Config c; } WAN[] = {
    {"1.3b-480p", {1536, 8960, 12, 30, 8, 2, 16, 16, 4096, 512, 256, 0, 0, 0, 21, 60, 104, 0, 1e-6}},
    {"14b-720p", {5120, 13824, 40, 40, 8, 2, 16, 16, 4096, 512, 256, 0, 0, 0, 21, 90, 160, 0, 1e-6}},
    {"14b-768p", {5120, 13824, 40, 40, 8, 2, 16, 16, 4096, 512, 256, 0, 0, 0, 21, 96, 160, 0, 1e-6}}};

static Config shape_config(const char *name) {
    if (!strcmp(name, "tiny") || !strcmp(name, "toy")) return PRESETS[!strcmp(name, "toy")];
    for (int i = 0; i < 3; i++) if (!strcmp(WAN[i].name, name)) return WAN[i].c;
    die("shape \"%.40s\" is none of tiny, toy, 1.3b-480p, 14b-720p, 14b-768p", name);
}

// The positive values of a format of 8 bits up to `most`, rising.
static int float8_values(double v[128], int m, int b, double most) {
    int n = 0;
    for (int code = 1; code < 128; code++)
        if (float8_value(code, m, b) <= most) v[n++] = float8_value(code, m, b);
    qsort(v, n, sizeof(double), compare_doubles);
    return n;
}

// Which tokens of a frame (h0, w0) has heard after a token-wise and then a group-wise block: those of its
// group-wise subsequence (2), all that these heard before (1). Returns how many.
static int heard_of(uint8_t *heard, int H, int W, int P, int h0, int w0) {
    int count = 0, mine = subsequence(GROUP_WISE, h0, w0, P);
    bool met[64] = {false};                              // token-wise subsequences
    for (int pass = 0; pass < 2; pass++)
        for (int i = 0; i < H * W; i++) {
            bool near = subsequence(GROUP_WISE, i / W, i % W, P) == mine;
            bool *through = &met[subsequence(TOKEN_WISE, i / W, i % W, P)];
            if (!pass) *through |= near;
            else heard[i] = near ? 2 : *through, count += *through;
        }
    return count;
}

// ---- FLOPs: a multiply and an add are two ----------------------------------------------------------------
static double attention_pairs(int pattern, int T, int H, int W, int P) {
    Pattern p;
    double sum = 0;
    memset(&p, 0, sizeof p);
    skiparse_lengths(&p, pattern, T, H, W, P, 1);
    for (int s = 0; s < p.count; s++) sum += pow(p.start[s + 1] - p.start[s], 2);
    free(p.start), free(p.first);
    return sum;
}

typedef struct { double linear, attention, cross; } Flops;
static double flops_sum(Flops f) { return f.linear + f.attention + f.cross; }

// One block. Linear layers: q, k, v, o; q, o of cross-attention; k, v of the text; the two of the ffn.
static Flops block_flops(const Config *c, int pattern, int T, int H, int W) {
    double D = c->dim, n = (double)T * H * W, text = c->text_len;
    Flops f = {n * (12 * D * D + 4 * D * c->ffn_dim) + text * 4 * D * D,
               4 * D * attention_pairs(pattern, T, H, W, c->sparse_ratio), 4 * D * n * text};
    return f;
}

// One forward. Padded as the authors do: H and W up to the next multiple of P², in every layer.
static double model_flops(const Config *c, bool hybrid, bool padded) {
    int P2 = c->sparse_ratio * c->sparse_ratio, H = c->H_l / 2, W = c->W_l / 2, L = c->num_layers;
    if (padded) H = (H + P2 - 1) / P2 * P2, W = (W + P2 - 1) / P2 * P2;
    double D = c->dim, n = (double)c->T * H * W;
    double sum = 8 * n * D * (c->in_dim + c->out_dim) + 2.0 * c->text_len * D * (c->text_dim + D);
    for (int i = 0; i < L; i++)
        sum += flops_sum(block_flops(c, block_pattern(i, L, hybrid ? c->num_full_blocks : L), c->T, H, W));
    return sum;
}

// ---- what one rank sends, counted from the exchanges' own maps -------------------------------------------
static Pattern *config_patterns(const Config *c, int R) {
    return patterns_of(c->T, c->H_l / 2, c->W_l / 2, c->sparse_ratio, R);
}

static size_t bytes_sent(const Pattern *p, int have, int want, int rank, int R, size_t row_bytes) {
    Exchange e = exchange_of(p, have, want, 1, rank, R);
    size_t units = 0;
    for (int s = 0; s < R; s++) units += s == rank ? 0 : e.send[s];
    free(e.send), device_free(e.pack), device_free(e.unpack);
    return units * (row_bytes / e.shares);
}

// Block i of a forward: Ulysses' q, k, v, o inside it, x on its way to the next block's layout after it.
typedef struct { size_t inside, after; } Sent;
static Sent block_sent(const Config *c, const Pattern *p, int i, int rank, int R, bool ulysses) {
    int L = c->num_layers, F = c->num_full_blocks, k = block_pattern(i, L, F);
    int next = i + 1 < L ? block_pattern(i + 1, L, F) : FULL;
    size_t row = c->dim * sizeof(float);
    Sent s = {0, 0};
    if (!ulysses && k != next) s.after = bytes_sent(p, k, next, rank, R, row);
    if (!ulysses && k != FULL) return s;
    s.inside = 3 * bytes_sent(p, FULL, HEADS + k, rank, R, row);
    s.inside += bytes_sent(p, HEADS + k, FULL, rank, R, row);
    return s;
}

static size_t forward_sent(const Config *c, const Pattern *p, int rank, int R, bool ulysses) {
    size_t sum = 0;
    for (int i = 0; i < c->num_layers; i++) {
        Sent s = block_sent(c, p, i, rank, R, ulysses);
        sum += s.inside + s.after;
    }
    return sum;
}

enum { NO, YES, UNJUDGED };                              // the last: a figure that could not be wrong
static int claims_failed;

static void claim(int ok, const char *what, const char *paper, const char *here) {
    static const char *const WORD[] = {"NO", "yes", "-"};
    claims_failed += ok == NO;
    printf("| %-62s | %-15s | %-58s | %-3s |\n", what, paper, here, WORD[ok]);
    fflush(stdout);
}

static void verify_cost(const Config *c, const char *name, const char *paper) {
    int T = c->T, H = c->H_l / 2, W = c->W_l / 2, P = c->sparse_ratio;
    double N = (double)T * H * W, most = 0, full = model_flops(c, false, false);
    double ragged = model_flops(c, true, false), padded = model_flops(c, true, true);
    for (int p = TOKEN_WISE; p <= GROUP_WISE; p++) most = fmax(most, attention_pairs(p, T, H, W, P) / N / N);
    claim(fabs(most * P * P - 1) < 1e-3, fmt("%s, N = %.0f: attention's FLOPs, sparse / full", name, N),
          "1/P^2 = 1/4", fmt("%.5f", most));
    claim(UNJUDGED, fmt("%s: TFLOP of one forward of 14B", name), "",
          fmt("full %.0f, hybrid %.0f, padded %.0f", full / 1e12, ragged / 1e12, padded / 1e12));
    claim(full / padded > atof(paper),
          fmt("%s: speed-up of 14B; by FLOPs, the limit of what is measured", name), paper,
          fmt("%.2fx padded as the paper, %.2fx here", full / padded, full / ragged));
}

// ---- logs: of osp train, osp grpo and bench --------------------------------------------------------------
typedef struct { int n; double *x, *y; } Series;

// Of each line that begins with `head`: x the number after it, y number `which` after `key`.
static Series read_series(const char *path, const char *head, const char *key, int which) {
    enum { ROOM = 1 << 16 };
    char text[1024];
    Series s = {0, doubles(ROOM), doubles(ROOM)};
    FILE *file = fopen(path, "r");
    if (!file) die("%s: %s; give the log of osp train, osp grpo or bench", path, strerror(errno));
    while (s.n < ROOM && fgets(text, sizeof text, file)) {
        char *at = strstr(text, key);
        if (!at || strncmp(text, head, strlen(head))) continue;
        at += strlen(key), s.x[s.n] = atof(text + strlen(head));
        for (int i = 0; i <= which; i++) s.y[s.n] = strtod(at, &at);
        s.n++;
    }
    fclose(file);
    return s;
}

// A forward of 14B's 40 layers, full and hybrid, as bench printed it on a card.
static void verify_speed(const char *size, const char *paper, const char *paper_8) {
    const char *half = fmt("assets/bench_%s_bf16.log", size), *eight = fmt("assets/bench_%s_hif8.log", size);
    double full = *read_series(half, "forward ", "layers: full", 0).y;
    double hybrid = *read_series(half, "forward ", "hybrid", 0).y;
    double hybrid_8 = *read_series(eight, "forward ", "hybrid", 0).y;
    claim(full / hybrid > atof(paper), fmt("%s: hybrid over full, bf16, as recorded in assets/", size), paper,
          fmt("%.2fx: %.0f, %.0f ms on an H100", full / hybrid, full, hybrid));
    claim(full / hybrid_8 > atof(paper_8), fmt("%s: hybrid in HiF8 over full in bf16, as recorded", size),
          paper_8, fmt("%.2fx: %.0f, %.0f ms on an H100", full / hybrid_8, full, hybrid_8));
}

static void verify_reach(void) {
    static const int GRID[][3] = {{48, 80, 2}, {45, 80, 2}, {7, 5, 2}, {27, 18, 3}, {3, 8, 2}};
    for (int i = 0; i < 5; i++) {
        int H = GRID[i][0], W = GRID[i][1], P = GRID[i][2], least = H * W;
        uint8_t *heard = (uint8_t *)xalloc(H * W, 1);
        for (int j = 0; j < H * W; j++) least = (int)fmin(least, heard_of(heard, H, W, P, j / W, j % W));
        bool narrow = P == 2 && (H == 3 || W == 3);
        const char *what = fmt("frame of %dx%d, P = %d: heard after one block of each kind", H, W, P);
        claim((least == H * W) != narrow, what, narrow ? "" : "every token", fmt("%d of %d tokens at least%s",
              least, H * W, narrow ? " (row 2 does not hear row 1)" : ""));
    }
}

static void verify_hif8(void) {
    double v[128];
    int binades = 1, top = float8_values(v, 0, 0, 0x1p15) - 1;
    for (int i = 1; i <= top; i++) binades += ilogb(v[i]) != ilogb(v[i - 1]);
    claim(binades == 38 && v[0] == 0x1p-22 && v[top] == 0x1p15, "HiF8: binades, smallest, largest",
          "38, 2^-22, 2^15", fmt("%d, 2^%d, 2^%d", binades, ilogb(v[0]), ilogb(v[top])));
}

static void verify_ranks(void) {
    for (int i = 0; i < 4; i++) {
        const Config *c = &WAN[1 + i / 2].c;
        int R = i % 2 ? 4 : 2;
        Pattern *p = config_patterns(c, R);
        double ulysses = (double)block_sent(c, p, 10, 0, R, true).inside;
        double ratio = (double)block_sent(c, p, 10, 0, R, false).after / ulysses;
        claim(fabs(ratio - 0.25) < (i < 2 ? 0.02 : 1e-9),
              fmt("%s, %d ranks: sent in a sparse block, SSP / Ulysses", WAN[1 + i / 2].name, R), "-75 %",
              fmt("%.4f (bytes where q, k, v, o have 16 bits: %.2f)", ratio, 2 * ratio));
    }
    Pattern *p = config_patterns(&PRESETS[1], 4);
    double ssp = (double)forward_sent(&PRESETS[1], p, 0, 4, false);
    double ulysses = (double)forward_sent(&PRESETS[1], p, 0, 4, true);
    claim(UNJUDGED, "toy, 4 ranks: MB that a rank sends in a whole forward, float32", "",
          fmt("SSP %.2f, Ulysses %.2f: %.0f %% less", ssp / 1e6, ulysses / 1e6, 100 * (1 - ssp / ulysses)));
}

// One forward of a toy on these ranks: what was sent, against the count.
static void verify_measured(Ranks *k) {
    static const int GRID[][3] = {{8, 32, 32}, {3, 12, 20}, {2, 14, 10}};
    static const int MOVES[] = {EXCHANGE, CONVERT, ULYSSES};
    static const double t = 500;
    for (int i = 0; i < 6; i++) {
        Config c = PRESETS[1];
        c.T = GRID[i / 2][0], c.H_l = GRID[i / 2][1], c.W_l = GRID[i / 2][2], k->ulysses = i % 2;
        Model *m = model_layout(&c);
        model_allocate(m, false);
        Run *r = run_on(k, m, 1, false);
        text_set(r, caption_batch(m, NULL, 1));
        memset(k->calls, 0, sizeof k->calls), memset(k->bytes, 0, sizeof k->bytes);
        forward(r, given(latent_size(r)).f, &t);
        size_t sent = 0, calls = 0;
        for (int j = 0; j < 3; j++) sent += k->bytes[MOVES[j]], calls += k->calls[MOVES[j]];
        size_t count = forward_sent(&c, config_patterns(&c, k->size), k->rank, k->size, k->ulysses);
        float bad = sent != count || calls != (k->ulysses ? 12 * 4 : 4 * 4 + 7 + 2), *any = up(&bad, 1);
        max_over_ranks(k, any);
        const char *what = fmt("%dx%dx%d, %d ranks, %s, a forward of 12 blocks, 4 full", c.T, c.H_l / 2,
                               c.W_l / 2, k->size, k->ulysses ? "Ulysses" : "SSP");
        if (k->rank == 0)
            claim(*down(any, 1) == 0, what, k->ulysses ? "4 calls a block" : "1 call a block",
                  fmt("%zu calls, %zu bytes; counted %zu (all ranks)", calls, sent, count));
    }
    k->ulysses = false;
}

// All on rank 0, but what ranks send, which is measured by all. The number of claims that do not hold.
static int verify(Ranks *ranks) {
    if (ranks->rank == 0) {
        printf("| %-62s | %-15s | %-58s | ok  |\n|---|---|---|---|\n", "claim", "paper", "here");
        verify_cost(&WAN[1].c, "720P", "1.53x (padded)"), verify_cost(&WAN[2].c, "768P", "1.64x");
        verify_speed("720p", "1.53x", "1.69x (Ascend)"), verify_speed("768p", "1.64x", "2.27x (Ascend)");
        verify_reach();
        verify_hif8();
        verify_ranks();
    }
    if (ranks->size > 1) verify_measured(ranks);
    if (ranks->rank == 0) printf("%d claims do not hold (mpirun adds what ranks send)\n", claims_failed);
    return claims_failed;
}

// ==== bench: random weights; time of each part of a block, of blocks, of the whole model; FLOP/s; speed-up
// Of repeated timings the first quartile: other programs on the machine only ever add time. Sorts them.
static double typical(double *x, int n) {
    qsort(x, n, sizeof(double), compare_doubles);
    return x[n / 4];
}

// Typical seconds of a call, after one to warm up. Where a call is long one is enough, on a GPU two.
typedef void (*Work)(Run *, int, int);
static double timed(Work work, Run *r, int i, int what) {
    double t[26], begin = seconds();
    for (int n = 0; ; n++) {
        double before = seconds();
        work(r, i, what), wait_device();
        t[n] = seconds() - before;
        bool enough = t[0] > 2 ? n == ON_GPU : n == 25 || (n > 0 && seconds() - begin > 0.6);
        if (enough) return n ? typical(t + 1, n) : t[0];
    }
}

// ---- what is timed ---------------------------------------------------------------------------------------
// One call of each part of a block, on the run's own buffers, and how many such calls a block makes.
enum { NORMS, LINEARS, ROPE, SELF_ATTENTION, CROSS_ATTENTION, FFN_UP, FFN_DOWN, REARRANGE, ROUNDING,
       BACK_LINEARS, BACK_UP, BACK_DOWN, PARTS };
static const struct { const char *name; int calls; char unit; } PART[PARTS] = {        // F: FLOPs, B: bytes
    {"residual + norm + modulation", 3, 'B'}, {"linear q k v o, q o", 6, 'F'}, {"RMSNorm + RoPE", 3, 'B'},
    {"self-attention", 1, 'F'}, {"cross-attention", 1, 'F'}, {"ffn up + GELU", 1, 'F'}, {"ffn down", 1, 'F'},
    {"residual + rearrangement", 1, 'B'}, {"HiF8 of all that is read", 1, 'B'},
    {"backward: q k v o, q o", 6, 'F'}, {"backward: ffn up", 1, 'F'}, {"backward: ffn down", 1, 'F'}};

// What the ops that wrote it have measured: h1, h2, h3, q, k, o and cross-attention's q and o; then v and f.
static void block_rounding(Run *r, Saved *s, size_t n) {
    int D = r->m->c.dim;
    const Factor known[] = {s->h1, s->h2, s->h3, s->self.q, s->self.k, s->cross.q, s->self.oq, s->cross.oq};
    for (int i = 0; i < 8; i++) quantize_measured(r, known[i], known[i].x, n, D, 15);
    quantize(r, plain(s->self.v), s->self.v, n, D, 15);
    quantize(r, s->f, s->f.x, n, r->m->c.ffn_dim, 15);
}

static void block_part(Run *r, int i, int part) {
    const Config *c = &r->m->c;
    const Block *w = &r->m->block[i];
    Saved *s = &r->saved[i], *next = &r->saved[i + 1];
    SavedAttention *a = &s->self, *b = &s->cross;
    Rows rows = rows_of(r, s->layout);
    int D = c->dim, heads = c->num_heads, hd = D / heads;
    size_t n = rows.B * rows.n;
    PerSample gate1 = of_row(s->e, 2, 6, D), gate2 = of_row(s->e, 5, 6, D);
    Affine norm = modulated(s->e, 3, 6, D);
    const int *map = next->layout == s->layout ? NULL : move_of(r, s->layout, next->layout)->pack;
    const float *rope = r->rope[s->layout];
    float *amax = c->quant ? r->m->amax : NULL;
    if (part == NORMS) 
        residual_norm_forward(s->x1, s->h2.x, s->stat2, amax, s->x0, a->y, gate1, norm, rows, 1e-6f);
    if (part == LINEARS) linear(a->q_raw, s->h1, &w->self.q, n);
    if (part == ROPE)
        rmsnorm_rope_forward(a->q.x, a->q_rstd, amax, a->q_raw, w->self.norm_q->w, rope, rows, heads, 1e-6f);
    if (part == SELF_ATTENTION)
        attention_forward(a->o, a->lse, amax, a->q, a->k, a->v, &r->self[s->pattern], heads, hd);
    if (part == CROSS_ATTENTION)
        attention_forward(b->o, b->lse, amax, b->q, b->k, b->v, &r->cross[s->layout], heads, hd);
    if (part == FFN_UP)
        linear_gelu_forward(s->f.x, s->f_pre, s->h3, w->ffn0.w->compute, w->ffn0.b->compute.x, n, c->ffn_dim,
                            D);
    if (part == FFN_DOWN) linear(s->y, s->f, &w->ffn2, n);
    if (part == REARRANGE) residual_gather_forward(next->x0, s->x2, s->y, gate2, map, n, rows);
    if (part == ROUNDING && c->quant) block_rounding(r, s, n);
    if (part == BACK_LINEARS) linear_back(r, r->dout, r->d1, s->h1, &w->self.q, n, false);
    if (part == BACK_UP) linear_back(r, r->d1, r->dff, s->h3, &w->ffn0, n, false);
    if (part == BACK_DOWN) linear_back(r, r->dff, r->d1, s->f, &w->ffn2, n, false);
}

// FLOPs of a part in a block, or the bytes it moves at least.
static double part_work(const Run *r, int i, int part) {
    const Config *c = &r->m->c;
    double D = c->dim, a = (double)act_size(), n = (double)r->N, ffn = 2 * n * D * c->ffn_dim;
    Flops f = block_flops(c, r->saved[i].pattern, r->T, r->H, r->W);
    const double work[] = {3 * n * D * (8 + 2 * a), 12 * n * D * D, 3 * n * D * 2 * a, f.attention, f.cross,
                           ffn, ffn, n * D * (8 + a),
                           n * (8 * D * (a + 1) + D * 3 * a + c->ffn_dim * (2 * a + 1)), 24 * n * D * D,
                           2 * ffn, 2 * ffn};
    return work[part];
}

static void whole_block(Run *r, int i, int back) { if (back) block_backward(r, i); else block_forward(r, i); }

// A forward, or a training step with AdamW and all.
static struct { float *x, *target, *dout; Optimizer opt; } trial;
static void whole_step(Run *r, int i, int training) {
    static const TrainOptions o = {1, 1, 0, 1e-5, 0.9, 0.99, 1e-8, 0.01, 1, 0.99, 0, 1, 1};
    double t = 500;
    Batch a = {NULL, NULL, NULL, &t};
    (void)i;
    if (!training) { forward(r, trial.x, &t); return; }
    train_step(r, &a, trial.x, trial.target, trial.dout);
    optimizer_step(&trial.opt, r->ranks, &o, o.lr);
}

static Run *trial_run(Model *m, Ranks *k, bool full, bool training) {
    int F = m->c.num_full_blocks;
    if (full) m->c.num_full_blocks = m->c.num_layers;        // read when the run is built, and only then
    Run *r = run_on(k, m, 1, training);
    m->c.num_full_blocks = F;
    size_t count = larger(m->c.in_dim, m->c.out_dim) * r->N * 4;
    Text text = caption_batch(m, NULL, m->c.vocab ? 1 : 0);
    text.rows = noise(2, m->c.text_len * m->c.text_dim, 1);
    text_set(r, text);
    trial.x = given(count).f, trial.target = given(count).f, trial.dout = spoiled(count);
    return r;
}

// Seconds of one block of each pattern, and of what is not a block. training 0: forward alone.
typedef struct { double block[PATTERNS], rest, all; } Timing;

static int block_of(const Run *r, int pattern) {
    for (int i = 0; i < r->m->c.num_layers; i++) if (r->saved[i].pattern == pattern) return i;
    return 0;
}

static Timing model_timing(Run *r, int training) {
    Timing s = {{0}, 0, timed(whole_step, r, 0, training)};
    s.rest = s.all;
    for (int i = 0; i < PATTERNS * (1 + training); i++)
        s.block[i % PATTERNS] += timed(whole_block, r, block_of(r, i % PATTERNS), i / PATTERNS);
    for (int i = 0; i < r->m->c.num_layers; i++) s.rest = fmax(0, s.rest - s.block[r->saved[i].pattern]);
    return s;
}

// The whole model as the shape defines it, from its blocks.
static double predicted(const Timing *s, const Config *whole, bool full) {
    int L = whole->num_layers;
    double time = s->rest;
    for (int i = 0; i < L; i++) time += s->block[block_pattern(i, L, full ? L : whole->num_full_blocks)];
    return time;
}

static void print_parts(Run *r, const Timing *s) {
    int block[2] = {block_of(r, FULL), block_of(r, TOKEN_WISE)};
    double all[2] = {s->block[FULL], s->block[TOKEN_WISE]}, products[2] = {0, 0};
    printf("%-28s | full block:  ms  share      rate | sparse block:  ms  share      rate\n", "forward");
    for (int part = 0; part < (r->training ? PARTS : BACK_LINEARS); part++) {
        printf("%-28s |", PART[part].name);
        for (int k = 0; k < 2; k++) {
            double t = PART[part].calls * timed(block_part, r, block[k], part);
            if (PART[part].unit == 'F' || part == ROUNDING) products[k] += 1e3 * t;
            if (part == SELF_ATTENTION || part == CROSS_ATTENTION) products[k] -= 1e3 * t;
            printf("%15.3f %5.1f%% %9.1f %c%s", 1e3 * t, 100 * t / all[k],
                   part_work(r, block[k], part) / t / 1e9, PART[part].unit, k ? "\n" : " |");
        }
    }
    printf("%-28s |%15.3f   F = GFLOP/s      |%15.3f   B = GB/s   (group-wise block %.3f ms)\n",
           "whole block, forward", 1e3 * all[0], 1e3 * all[1], 1e3 * s->block[GROUP_WISE]);
    printf("%-28s |%15.3f                    |%15.3f\n", "linear layers and HiF8", products[0], products[1]);
}

// passes: a forward's FLOPs count once, a training step's three times.
static void print_speed(const Config *c, const char *what, double full, double hybrid, int passes) {
    double work = passes * model_flops(c, false, false) / 1e9;
    double less = passes * model_flops(c, true, false) / 1e9;
    printf("%-14s of %2d layers: full %9.1f ms, hybrid %9.1f ms: %.2fx   (%.0f and %.0f GFLOP/s)\n", what,
           c->num_layers, 1e3 * full, 1e3 * hybrid, full / hybrid, work / full, less / hybrid);
}

typedef struct {
    const char *what, *shape, *device, *blas;
    int layers, frames, train, force, hif8, json;
} BenchOptions;

static void bench_model(const BenchOptions *o) {
    Config whole = shape_config(o->shape), c = whole;
    int layers = o->layers >= 0 ? o->layers : !whole.vocab;
    if (layers) c.num_layers = 4 * layers, c.num_full_blocks = 2 * layers;       // in the order F.. g t .. F
    if (o->frames) c.T = whole.T = o->frames;
    int T = c.T, H = c.H_l / 2, W = c.W_l / 2;
    double full[2] = {0, 0}, work = model_flops(&whole, true, false);
    c.quant = c.quant_attn = o->hif8;
    printf("%s: %d tokens (%dx%dx%d), dim %d, heads %d, ffn %d; %d layers run of %d; by FLOPs %.2fx\n",
           o->shape, T * H * W, T, H, W, c.dim, c.num_heads, c.ffn_dim, c.num_layers, whole.num_layers,
           model_flops(&whole, false, false) / work);
    if (act_size() == sizeof(float) && !o->force && flops_sum(block_flops(&c, FULL, T, H, W)) > 2e12)
        die("a forward takes %.0f TFLOP, too much for a CPU: --force runs it", work / 1e12);
    Model *m = random_model(&c, o->train, 1);
    printf("memory: weights %.2f GiB, activations %.2f GiB\n", (double)model_bytes(m, o->train) / 0x1p30,
           (double)run_place(run_plan(m, &alone, 1, T, H, W, o->train), NULL) / 0x1p30);
    if (o->train) optimizer_init(&trial.opt, m->w, m->dw, m->count);
    Run *r = trial_run(m, &alone, false, o->train);
    Timing s[2] = {{{0}, 0, 0}, {{0}, 0, 0}};
    for (int t = 0; t <= o->train; t++) s[t] = model_timing(r, t);
    print_parts(r, &s[0]);
    device_free(r->saved[0].x0);                             // where the run's one arena begins
    r = trial_run(m, &alone, true, o->train);
    for (int t = 0; t <= o->train; t++) {
        full[t] = timed(whole_step, r, 0, t);
        print_speed(&c, t ? "training step" : "forward", full[t], s[t].all, 1 + 2 * t);
        print_speed(&whole, "from blocks", predicted(&s[t], &whole, true), predicted(&s[t], &whole, false),
                    1 + 2 * t);
    }
    if (o->json)
        printf("{\"forward\": %.6f, \"forward_full\": %.6f, \"step\": %.6f, \"step_full\": %.6f}\n", s[0].all,
               full[0], s[1].all, full[1]);
}

// ---- against OpenBLAS, where it is installed: in turn, the same threads ----------------------------------
typedef void (*Sgemm)(int, int, int, int, int, int, float, float *, int, float *, int, float, float *, int);

static void bench_linear(const char *path) {
    static const int SIZE[][3] = {{2048, 512, 128}, {2048, 128, 512}, {8192, 1536, 1536}};
    void *blas = act_size() == sizeof(float) ? dlopen(path, RTLD_NOW) : NULL;
    Sgemm sgemm = blas ? (Sgemm)dlsym(blas, "cblas_sgemm") : NULL;
    void (*set_threads)(int) = blas ? (void (*)(int))dlsym(blas, "openblas_set_num_threads") : NULL;
    if (set_threads) set_threads(threads_here());
    printf("linear layers, %d threads, GFLOP/s (best of alternating runs)\n", threads_here());
    if (!sgemm) printf("no %s to compare with (apt-get install -y libopenblas0; or --blas PATH)\n", path);
    for (int s = 0; s < 3; s++) {
        int M = SIZE[s][0], N = SIZE[s][1], K = SIZE[s][2];
        size_t nx = (size_t)M * K, nw = (size_t)N * K, ny = (size_t)M * N;
        Given x = given(nx), w = given(nw);
        float *z = spoiled(ny);
        act *y = spoiled_act(ny);
        double ours = 1e30, theirs = 1e30, work = 2.0 * (double)ny * K / 1e9;
        for (int i = 0; i < (s == 2 ? 5 : 300); i++) {
            double begin = seconds();
            linear_forward(y, plain(x.a), plain(w.a), NULL, M, N, K), wait_device();
            double middle = seconds();
            if (sgemm) sgemm(101, 111, 112, M, N, K, 1, x.f, K, w.f, K, 0, z, N);
            ours = fmin(ours, middle - begin), theirs = fmin(theirs, seconds() - middle);
        }
        printf("  M %5d N %5d K %5d: osp %7.1f", M, N, K, work / ours);
        if (sgemm) printf(", OpenBLAS %7.1f, ratio %.2f", work / theirs, theirs / ours);
        printf("\n");
    }
}

// ---- HiF8: bytes read and written a second, beside a copy ------------------------------------------------
static void bench_hif8(void) {
    size_t n = (size_t)(ON_GPU ? 80640 : 3276) * 5120;
    bool codes = codes_multiply(5120, 5120);
    double best[3] = {1e30, 1e30, 1e30}, gigabytes = (double)(n * act_size()) / 1e9;
    act *x = up_act(noise(1, n, 1), n), *y = spoiled_act(n);
    Factor q = {y, codes ? (uint8_t *)y : NULL, NULL, spoiled(1), false};
    float *m = spoiled(1);
    for (int i = 0; i < 20; i++) {
        double t[4] = {seconds()};
        absmax(m, x, n), wait_device(), t[1] = seconds();
        hif8_tensor(q, x, n / 5120, 5120, 15, m), wait_device(), t[2] = seconds();
        copy(y, x, n * act_size()), wait_device(), t[3] = seconds();
        for (int k = 0; k < 3; k++) best[k] = fmin(best[k], t[k + 1] - t[k]);
    }
    printf("HiF8, %zu numbers, %d threads, GB/s: maximum, read %.1f; %s, read + written %.1f; copy (one "
           "thread) %.1f\n", n, threads_here(), gigabytes / best[0], codes ? "codes" : "rounded",
           (codes ? 1.5 : 2) * gigabytes / best[1], 2 * gigabytes / best[2]);
}

// ---- under mpirun: how much of a forward the transfers take; SSP and Ulysses in turn ---------------------
static void bench_comm(const char *shape, Ranks *k) {
    enum { ROUNDS = 9 };
    Config c = shape_config(shape);
    double time[2][ROUNDS], moving[2] = {0, 0}, sent[2] = {0, 0};
    Model *m = random_model(&c, false, 1);
    Run *r[2];
    for (int i = -2; i < 2 * ROUNDS; i++) {                  // the first two to warm up
        int u = k->ulysses = i & 1;
        if (i < 0) r[u] = trial_run(m, k, false, false);
        memset(k->time, 0, sizeof k->time), memset(k->bytes, 0, sizeof k->bytes);
        double begin = seconds();
        whole_step(r[u], 0, 0), wait_device();
        if (i < 0) continue;
        time[u][i / 2] = seconds() - begin, sent[u] = 0;
        for (int p = 0; p < PURPOSES; p++) moving[u] += k->time[p] / ROUNDS, sent[u] += (double)k->bytes[p];
    }
    for (int u = 0; u < 2 && k->rank == 0; u++)
        printf("%s, %d ranks, %-7s: a forward %8.2f ms, %8.2f of it in transfers and waiting, %12.0f bytes "
               "sent\n", shape, k->size, u ? "Ulysses" : "SSP", 1e3 * typical(time[u], ROUNDS),
               1e3 * moving[u], sent[u]);
}

static int bench(int argc, char **argv, Ranks *ranks) {
    #define AT(field) offsetof(BenchOptions, field)
    static const Option OPTION[] = {
        {"", "WHAT", 's', AT(what), "model", 0, 0, "model; linear (and OpenBLAS's); hif8; comm (mpirun)"},
        {"", "--shape", 's', AT(shape), "toy", 0, 0, "tiny, toy, 1.3b-480p, 14b-720p or 14b-768p"},
        {"", "--layers", 'i', AT(layers), "-1", -1, 64, "of each pattern, twice of full; 0: all; -1: choose"},
        {"", "--frames", 'i', AT(frames), "0", 0, 1024, "of latents; 0: the shape's"},
        {"", "--train", 'b', AT(train), "0", 0, 1, "backward and the training step, too"},
        {"", "--device-dtype", 's', AT(device), "bf16", 0, 0, "arithmetic on a GPU: f32 or bf16"},
        {"", "--hif8", 'b', AT(hif8), "0", 0, 1, "8 bits"},
        {"", "--force", 'b', AT(force), "0", 0, 1, "run Wan's shapes on a CPU, for as long as it takes"},
        {"", "--blas", 's', AT(blas), "libopenblas.so.0", 0, 0, "what bench linear compares with"},
        {"", "--json", 'b', AT(json), "0", 0, 1, "seconds as one JSON object on the last line"}};
    #undef AT
    BenchOptions o;
    const char *text[10];
    parse_options(argc, argv, "test_osp bench --shape toy --train", OPTION, 10, 0, &o, text);
    one_of("bench", o.what, "model|linear|hif8|comm:");
    if (*o.what == 'c') bench_comm(o.shape, ranks);
    else if (ranks->rank) return 0;
    else if (*o.what == 'm') bench_model(&o);
    else if (*o.what == 'l') bench_linear(o.blas);
    else bench_hif8();
    return 0;
}

// ==== show: the pictures, as SVG ==========================================================================
// One color for each attention pattern in every picture; ranks, curves and number formats take the others.
#define INK "#1F2937"
#define SOFT "#6B7280"
#define RIM "#9CA3AF"
#define FAINT "#E5E7EB"
#define PAPER "#FFFFFF"
static const char *const PATTERN_COLOR[] = {"#475569", "#2563EB", "#EA7317"};
static const char *const PATTERN_NAME[] = {"full", "token-wise", "group-wise"};
static const char *const OTHER_COLOR[] = {"#0D9488", "#9333EA", "#DC2626", "#CA8A04",
                                          "#0891B2", "#4D7C0F", "#DB2777", "#78716C"};

static FILE *svg;                                        // the picture being drawn
static void box(double x, double y, double w, double h, const char *fill, double opacity) {
    fprintf(svg, "<rect x='%.1f' y='%.1f' width='%.1f' height='%.1f' rx='%.1f' fill='%s' "
            "fill-opacity='%.2f'/>\n", x, y, w, h, fmin(4, 0.12 * fmin(w, h)), fill, opacity);
}
static void rim(double x, double y, double w, double h, const char *color, double width) {
    fprintf(svg, "<rect x='%.1f' y='%.1f' width='%.1f' height='%.1f' rx='3' fill='none' stroke='%s' "
            "stroke-width='%.1f'/>\n", x, y, w, h, color, width);
}
static void line(double x0, double y0, double x1, double y1, const char *color, double width) {
    const char *format = "<path d='M%.1f %.1fL%.1f %.1f' stroke='%s' stroke-width='%.1f'/>\n";
    fprintf(svg, format, x0, y0, x1, y1, color, width);
}

static void dot(double x, double y, double r, const char *color) {
    fprintf(svg, "<circle cx='%.1f' cy='%.1f' r='%.1f' fill='%s'/>\n", x, y, r, color);
}

// Text that begins (anchor 's'), is centred ('m') or ends ('e') at x, its baseline at y; titles are bold.
__attribute__((format(printf, 6, 7)))
static void label(double x, double y, double size, char anchor, const char *color, const char *format, ...) {
    const char *where = anchor == 's' ? "start" : anchor == 'm' ? "middle" : "end";
    va_list args;
    fprintf(svg, "<text x='%.1f' y='%.1f' font-size='%.1f' text-anchor='%s' fill='%s' font-weight='%s'>", x,
            y, size, where, color, size >= 15 ? "bold" : "normal");
    va_start(args, format);
    vfprintf(svg, format, args);
    va_end(args);
    fputs("</text>\n", svg);
}

static void picture(int width, int height, const char *title, const char *subtitle) {
    fprintf(svg, "<svg xmlns='http://www.w3.org/2000/svg' width='%d' height='%d' viewBox='0 0 %d %d' "
            "font-family='sans-serif'>\n", width, height, width, height);
    box(0, 0, width, height, PAPER, 1);
    label(40, 46, 20, 's', INK, "%s", title);
    label(40, 74, 13, 's', SOFT, "%s", subtitle);
}

// ---- plots: a frame, ticks, curves -----------------------------------------------------------------------
typedef struct { double x, y, w, h, x0, x1, y0, y1; bool log_y; } Plot;
static double at_x(const Plot *a, double v) { return a->x + (v - a->x0) / (a->x1 - a->x0) * a->w; }
static double at_y(const Plot *a, double v) {
    double u = a->log_y ? log(v / a->y0) / log(a->y1 / a->y0) : (v - a->y0) / (a->y1 - a->y0);
    return a->y + a->h * (1 - fmin(fmax(u, 0), 1));
}
// A line of the grid and its number: at a height, or across.
static void tick(const Plot *a, bool height, double v, const char *text) {
    double x = height ? a->x : at_x(a, v), y = height ? at_y(a, v) : a->y + a->h;
    line(x, y, height ? x + a->w : x, height ? y : a->y, FAINT, 1);
    label(height ? x - 8 : x, height ? y + 4 : y + 18, 12, height ? 'e' : 'm', SOFT, "%s", text);
}
static void frame(const Plot *a, const char *title) {
    rim(a->x, a->y, a->w, a->h, RIM, 1);
    label(a->x, a->y - 14, 15, 's', INK, "%s", title);
}

// Ticks at multiples of 1, 2 or 5 times a power of ten; on a logarithmic axis at 1, 2, 5, 10, ..
static void axes(const Plot *a, const char *title) {
    for (int axis = 0; axis < 2; axis++) {
        double low = axis ? a->y0 : a->x0, high = axis ? a->y1 : a->x1, raw = (high - low) / (axis ? 5 : 8);
        double power = pow(10, floor(log10(raw))), digits = raw / power;
        double step = power * (digits <= 2 ? 2 : digits <= 5 ? 5 : 10);
        bool log_axis = axis && a->log_y;
        double next, first = log_axis ? pow(10, floor(log10(low))) : ceil(low / step - 1e-9) * step;
        for (double v = first; v <= high * (1 + 1e-9); v = next) {
            bool two = round(v / pow(10, floor(log10(v) + 1e-9))) == 2;
            next = log_axis ? v * (two ? 2.5 : 2) : v + step;
            if (v >= low) tick(a, axis, v, fmt("%g", fabs(v) < 1e-9 * step ? 0 : v));
        }
    }
    frame(a, title);
}

// A line through (x, y), or, where `back` is given, the band between y and back.
static void curve(const Plot *a, const double *x, const double *y, const double *back, int n,
                  const char *color, double width, double opacity) {
    fprintf(svg, "<path fill='%s' stroke='%s' opacity='%.2f' stroke-width='%.1f' d='", back ? color : "none",
            back ? "none" : color, opacity, width);
    for (int i = 0; i < n; i++) fprintf(svg, "%c%.1f %.1f", i ? 'L' : 'M', at_x(a, x[i]), at_y(a, y[i]));
    for (int i = n - 1; back && i >= 0; i--) fprintf(svg, "L%.1f %.1f", at_x(a, x[i]), at_y(a, back[i]));
    fputs("'/>\n", svg);
}

static double *smoothed(const double *y, int n) {        // the mean of a window around each point
    double *s = doubles(n);
    int window = n / 40 + 1;
    for (int i = 0; i < n; i++) {
        int low = i < window ? 0 : i - window, high = i + window < n ? i + window : n - 1;
        for (int j = low; j <= high; j++) s[i] += y[j] / (high - low + 1);
    }
    return s;
}

// ---- loss, reward: logs of osp train and osp grpo --------------------------------------------------------
enum { MOST_LOGS = 8 };
typedef struct { const char *title, *head, *key; double y, h; bool log_y, band; } Panel;
static const Panel PANEL[] = {
    {"loss: mean (v − (noise − data))², and its running mean", "step ", " loss ", 120, 390, true, false},
    {"reward of an update's videos (thin), its running mean, and the held-out score (dots)", "update ",
     " reward ", 120, 320, false, false},
    {"KL to the model without its adapter, and its running mean", "update ", " kl ", 520, 150, false, false},
    {"ratio: mean, least and largest of an update", "update ", " ratio ", 750, 150, false, true}};

// A number of each log, thin, and its running mean; or of three numbers the mean and the band around it.
static Plot show_panel(const Panel *p, const char *const *paths, int count) {
    Plot a = {80, p->y, 880, p->h, 0, 1, INFINITY, -INFINITY, p->log_y};
    Series low[MOST_LOGS], high[MOST_LOGS];
    for (int i = 0; i < count; i++) {
        low[i] = read_series(paths[i], p->head, p->key, 0);
        high[i] = read_series(paths[i], p->head, p->key, 2 * p->band);
        if (!low[i].n) die("%s: no line \"%s10/600 ..%s..\"; give osp's output", paths[i], p->head, p->key);
        for (int j = 0; j < low[i].n; j++) {
            a.x1 = fmax(a.x1, low[i].x[j]);
            a.y0 = fmin(a.y0, low[i].y[j]), a.y1 = fmax(a.y1, high[i].y[j]);
        }
    }
    double room = p->log_y ? 0 : 0.06 * (a.y1 - a.y0) + 1e-6;
    a.y0 -= room, a.y1 += room;
    axes(&a, p->title);
    for (int i = 0; i < count; i++) {
        Series s = low[i];
        curve(&a, s.x, s.y, p->band ? high[i].y : NULL, s.n, OTHER_COLOR[i], 1, 0.3);
        double *mean = p->band ? read_series(paths[i], p->head, p->key, 1).y : smoothed(s.y, s.n);
        curve(&a, s.x, mean, NULL, s.n, OTHER_COLOR[i], 2.5, 1);
    }
    return a;
}

static void show_logs(const char *const *paths, int count, bool reward) {
    picture(1000, reward ? 960 : 560, reward ? "Mix-GRPO, by update" : "Flow matching, by training step", "");
    Plot a = show_panel(&PANEL[reward], paths, count);
    for (int i = 0; i < count; i++) {
        const char *slash = strrchr(paths[i], '/'), *name = slash ? slash + 1 : paths[i];
        label(1080 - 120 * (count - i), 74, 13, 'e', OTHER_COLOR[i], "%.*s", (int)strcspn(name, "."), name);
        Series held = read_series(paths[i], "held out after ", ": ", 0);
        for (int j = 0; j < held.n; j++) {
            held.y[j] /= 100;
            dot(at_x(&a, held.x[j]), at_y(&a, held.y[j]), 5, OTHER_COLOR[i]);
        }
        if (held.n) curve(&a, held.x, held.y, NULL, held.n, OTHER_COLOR[i], 1.5, 1);
    }
    for (int k = 2; k < 4 && reward; k++) show_panel(&PANEL[k], paths, count);
}

// ---- skiparse: who attends with whom ---------------------------------------------------------------------
// The tokens of a frame and their subsequences; strong: that of the traced (h0, w0); below, as in memory.
static void skiparse_panel(double x, double y, double cell, int kind, int H, int W, int P, int h0, int w0) {
    int mine = subsequence(kind, h0, w0, P);
    const Pattern *p = &patterns_of(1, H, W, P, 1)[kind];
    const char *color = PATTERN_COLOR[kind];
    double unit = cell / H, below = y + H * cell + 14;
    label(x, y - 12, 15, 's', color, "%s", PATTERN_NAME[kind]);
    for (int i = 0; i < H * W; i++) {
        int s = subsequence(kind, i / W, i % W, P);
        double left = x + i % W * cell, top = y + i / W * cell;
        box(left + 1, top + 1, cell - 2, cell - 2, color, s == mine ? 0.95 : 0.14);
        label(left + cell / 2, top + cell / 2 + 5, 13, 'm', s == mine ? PAPER : SOFT, "%d", s);
    }
    rim(x + w0 * cell, y + h0 * cell, cell, cell, INK, 3);
    for (int s = 0; s < p->count; s++) {
        int n = p->start[s + 1] - p->start[s];
        box(x + unit * p->start[s] + 1, below, unit * n - 2, 24, color, s == mine ? 0.95 : 0.14);
        label(x + unit * (p->start[s] + n / 2.0), below + 17, 12, 'm', s == mine ? PAPER : SOFT, "%d", n);
    }
}

// What the traced token has heard after a token-wise and then a group-wise block.
static void heard_panel(double x, double y, double cell, int H, int W, int P, int h0, int w0) {
    static const double OPACITY[] = {0.05, 0.45, 0.95};
    uint8_t *heard = (uint8_t *)xalloc(H * W, 1);
    int count = heard_of(heard, H, W, P, h0, w0);
    for (int i = 0; i < H * W; i++)
        box(x + i % W * cell + 1, y + i / W * cell + 1, cell - 2, cell - 2, PATTERN_COLOR[heard[i]],
            OPACITY[heard[i]]);
    rim(x + w0 * cell, y + h0 * cell, cell, cell, INK, 3);
    y += H * cell;
    label(x, y - H * cell - 12, 15, 's', INK, "heard after both");
    label(x, y + 24, 13, 's', PATTERN_COLOR[GROUP_WISE], "directly, in the group-wise block");
    label(x, y + 44, 13, 's', PATTERN_COLOR[TOKEN_WISE], "through these, in the token-wise block before");
    label(x, y + 64, 13, 's', INK, "%d of %d tokens", count, H * W);
}

static void show_skiparse(void) {
    enum { H = 8, W = 8, P = 2, RAGGED_H = 5, RAGGED_W = 6, h0 = 5, w0 = 2 };
    static const char *const RULE[] = {"", "token-wise: (h mod P)·P + w mod P",
                                       "group-wise: (⌊h/P⌋ mod P)·P + ⌊w/P⌋ mod P"};
    picture(1060, 739, "Skiparse-2D: which tokens attend together (P = 2)",
            "Numbers: the token's subsequence. Strong: that of the traced token (framed). Bars: the "
            "rearranged sequence.");
    heard_panel(720, 130, 34, H, W, P, h0, w0);
    label(40, 496, 15, 's', INK, "A ragged grid, 5 x 6: lengths differ, no token is padded");
    label(720, 546, 15, 's', INK, "The traced token: (h, w) = (%d, %d)", h0, w0);
    for (int k = TOKEN_WISE; k <= GROUP_WISE; k++) {
        int left = 40 + 340 * (k - 1), y = 576 + 52 * (k - 1), s = subsequence(k, h0, w0, P);
        skiparse_panel(left, 130, 34, k, H, W, P, h0, w0);
        skiparse_panel(left, 540, 27, k, RAGGED_H, RAGGED_W, P, RAGGED_H - 2, P);
        label(720, y, 13, 's', PATTERN_COLOR[k], "%s", RULE[k]);
        label(720, y + 20, 13, 's', PATTERN_COLOR[k], "= %d·%d + %d = %d", s / P, P, s % P, s);
    }
}

// ---- model: the layout of the blocks, and one of them ----------------------------------------------------
static void show_model(const Config *c, const char *name) {
    static const char *const BLOCK[][2] = {
        {"x += gate1 · SelfAttention(LN(x)·(1 + scale1) + shift1)",
         "q, k, v, o; RMSNorm on q and k, rotary positions"},
        {"x += CrossAttention(LN(x), text)", "q of x; k, v of the text; no positions, no mask"},
        {"x += gate2 · FFN(LN(x)·(1 + scale2) + shift2)", "up, GELU, down"},
        {"shift, scale, gate = modulation + e0", "six vectors: its own table plus what the timestep says"}};
    int L = c->num_layers, H = c->H_l / 2, W = c->W_l / 2, count[PATTERNS] = {0, 0, 0}, N = c->T * H * W;
    double step = 960.0 / (L > 12 ? L : 12), wide = step * 0.8;
    const char *stage[] = {fmt("latent [%d, %d, %d, %d]", c->in_dim, c->T, 2 * H, 2 * W),
                           fmt("2x2 patches → x [%d, %d]", N, c->dim), fmt("%d blocks", L),
                           fmt("norm, head → [%d, %d]", N, 4 * c->out_dim),
                           fmt("velocity [%d, %d, %d, %d]", c->out_dim, c->T, 2 * H, 2 * W)};
    picture(1040, 590, fmt("OSP-Next, %s", name),
            fmt("%d blocks, dim %d, %d heads, ffn %d; %d tokens: %d frames of %d x %d", L, c->dim,
                c->num_heads, c->ffn_dim, N, c->T, H, W));
    for (int i = 0; i < L; i++) {
        int k = block_pattern(i, L, c->num_full_blocks);
        count[k]++;
        if (i + 1 < L) line(40 + i * step + wide, 137, 40 + (i + 1) * step, 137, RIM, 2);
        box(40 + i * step, 100, wide, 74, PATTERN_COLOR[k], 1);
        label(40 + i * step + wide / 2, 142, fmin(16, wide * 0.7), 'm', PAPER, "%c", PATTERN_LETTER[k]);
    }
    for (int k = 0; k < PATTERNS; k++)
        label(40 + 230 * k, 208, 14, 's', PATTERN_COLOR[k], "%c: %d %s", PATTERN_LETTER[k], count[k],
              PATTERN_NAME[k]);
    label(40, 262, 15, 's', INK, "The whole model");
    label(400, 262, 15, 's', INK, "One block: x is the residual stream [%d, %d]", N, c->dim);
    for (int i = 0; i < 5; i++) {
        box(40, 280 + i * 60, 300, 38, i == 2 ? PATTERN_COLOR[FULL] : RIM, i == 2 ? 0.9 : 0.2);
        label(190, 304 + i * 60, 13, 'm', i == 2 ? PAPER : INK, "%s", stage[i]);
        if (i < 4) label(190, 334 + i * 60, 14, 'm', SOFT, "↓");
    }
    for (int i = 0; i < 4; i++) {
        box(400, 280 + i * 74, 600, 60, RIM, 0.2);
        label(420, 305 + i * 74, 14, 's', INK, "%s", BLOCK[i][0]);
        label(420, 327 + i * 74, 12, 's', SOFT, "%s", BLOCK[i][1]);
    }
}

// ---- hif8: the format beside others ----------------------------------------------------------------------
static void show_hif8(void) {
    enum { LOW = -24, HIGH = 17 };                       // the binades drawn
    static const char *const NAME[] = {"HiF8", "FP8 E4M3", "FP8 E5M2", "bfloat16"};
    double v[4][128];
    int n[] = {float8_values(v[0], 0, 0, 0x1p15), float8_values(v[1], 3, 7, 448),
               float8_values(v[2], 2, 15, 57344), 0};
    Plot a = {100, 110, 860, 300, LOW, HIGH, 0x1p-8, 3, true};
    picture(1000, 670, "HiF8: precision near 1, range far away", "");
    for (int e = 0; e <= 7; e++) tick(&a, true, ldexp(1, -e), fmt(e ? "1/%d" : "1", 1 << e));
    for (int k = LOW; k <= HIGH; k += 4) tick(&a, false, k, fmt("2^%d", k));
    frame(&a, "Relative step: from a value to the next one, over the power of two below");
    label(a.x, 466, 15, 's', INK, "The positive values themselves");
    for (int f = 3; f >= 0; f--) {
        double x[2 * (HIGH - LOW)], y[2 * (HIGH - LOW)], top = 482 + 42 * f;
        int points = 0;
        for (int e = LOW; e < HIGH; e++) {               // the widest step of each binade
            double step = f == 3 ? 0x1p-7 : 0;
            for (int i = 0; i + 1 < n[f]; i++)
                if (ilogb(v[f][i]) == e) step = fmax(step, (v[f][i + 1] - v[f][i]) / ldexp(1, e));
            for (int side = 0; side < 2 && step > 0; side++) x[points] = e + side, y[points++] = step;
        }
        curve(&a, x, y, NULL, points, OTHER_COLOR[f], f ? 2 : 4, 1);
        label(a.x - 8, top + 16, 12, 'e', OTHER_COLOR[f], "%s", NAME[f]);
        if (f == 3) box(a.x, top, a.w, 22, OTHER_COLOR[f], 0.8);
        for (int i = 0; i < n[f]; i++) {
            double at = at_x(&a, log2(v[f][i]));
            if (at >= a.x) line(at, top, at, top + 22, OTHER_COLOR[f], 1.2);
        }
    }
}

// ---- ranks: who holds which tokens, and what a forward moves ---------------------------------------------
static void rank_panels(const Config *c, const Pattern *p, int R) {
    static const char *const HELD[] = {"all frames: a cut of the sequence", "one frame: whole subsequences"};
    int H = c->H_l / 2, W = c->W_l / 2, P = c->sparse_ratio;
    double cell = 280.0 / W, unit = 280.0 / (c->T * H * W);
    for (int k = 0; k < PATTERNS; k++) {
        label(40 + 320 * k, 112, 15, 's', PATTERN_COLOR[k], "%s", PATTERN_NAME[k]);
        label(40 + 320 * k, 132, 12, 's', SOFT, "%s", HELD[k > 0]);
        for (int i = 0; i < H * W && k; i++)
            box(40.7 + 320 * k + i % W * cell, 144.7 + i / W * cell, cell - 1.4, cell - 1.4,
                OTHER_COLOR[subsequence(k, i / W, i % W, P) * R / (P * P)], 0.85);
    }
    for (int r = 0; r < R; r++) {
        int first = p[FULL].first[r], end = p[FULL].first[r + 1];
        box(40, 145 + unit * first, 280, unit * (end - first) - 2, OTHER_COLOR[r], 0.85);
        label(180, 150 + unit * (first + end) / 2, 14, 'm', PAPER, "rank %d: %d to %d", r, first, end - 1);
    }
}

// A forward's bytes, block by block: `inside` a block (Ulysses: q, k, v, o) and after it (SSP, conversions).
static void forward_bars(const Config *c, const Pattern *p, int R, bool ulysses, double y) {
    int L = c->num_layers;
    double step = 760.0 / L, unit = 90 / (double)block_sent(c, p, 0, 0, R, false).inside;
    for (int i = 0; i < L; i++) {
        int k = block_pattern(i, L, c->num_full_blocks);
        Sent s = block_sent(c, p, i, 0, R, ulysses);
        double x = 40 + i * step, part = (double)s.inside / 4 * unit, after = (double)s.after * unit;
        for (int j = 0; j < 4 && s.inside; j++)
            box(x, y - part * (j + 1), step * 0.5, part - 2, PATTERN_COLOR[k], 0.9);
        if (s.after) box(x + step * 0.62, y - after, step * 0.26, after - 2, RIM, 1);
        line(x, y, x + step * 0.5, y, PATTERN_COLOR[k], 3);
        label(x + step * 0.25, y + 18, 12, 'm', PATTERN_COLOR[k], "%c", PATTERN_LETTER[k]);
    }
}

static void show_ranks(const Config *c, const char *name, int R) {
    int P2 = c->sparse_ratio * c->sparse_ratio, F = c->num_full_blocks;
    if (P2 % R || c->num_heads % R) die("-R %d: must divide P^2 = %d and the %d heads", R, P2, c->num_heads);
    Pattern *p = config_patterns(c, R);
    double sparse[2], all[2];
    picture(1000, 850, fmt("Sparse sequence parallelism: %s on %d ranks", name, R),
            fmt("%d x %d x %d tokens, dim %d. Bytes: what rank 0 sends to the others in one forward, float32",
                c->T, c->H_l / 2, c->W_l / 2, c->dim));
    rank_panels(c, p, R);
    label(40, 470, 15, 's', INK, "One sparse block");
    label(380, 470, 12, 's', SOFT, "where q, k, v, o have 16 bits and x 32, SSP sends half of the bytes");
    label(40, 580, 15, 's', INK, "The whole forward, block by block");
    label(380, 580, 12, 's', SOFT,
          "stacks: q, k, v, o inside a block (Ulysses); gray: x between two layouts");
    for (int u = 0; u < 2; u++) {
        Sent s = block_sent(c, p, F / 2, 0, R, u);
        const char *color = u ? PATTERN_COLOR[block_pattern(F / 2, c->num_layers, F)] : RIM;
        double x = u ? 420 : 40;
        sparse[u] = (double)(s.inside + s.after), all[u] = (double)forward_sent(c, p, 0, R, u);
        for (int j = 0; j < (u ? 4 : 1); j++) {
            box(x + 100 * j, 486, 95, 30, color, 0.9);
            label(x + 47 + 100 * j, 506, 14, 'm', PAPER, "%c", u ? "qkvo"[j] : 'x');
        }
        label(x, 536, 13, 's', INK, "%s, %.0f bytes", u ? "Ulysses: 4 all-to-alls" : "SSP: 1 all-to-all",
              sparse[u]);
        forward_bars(c, p, R, u, 690 + 126 * u);
        label(830, 660 + 126 * u, 15, 's', INK, u ? "Ulysses: %.2f MB" : "SSP: %.2f MB", all[u] / 1e6);
    }
    label(150, 506, 14, 's', INK, "%.0f %% less", 100 * (1 - sparse[0] / sparse[1]));
    label(830, 682, 13, 's', INK, "%.0f %% less in all", 100 * (1 - all[0] / all[1]));
}

// ---- grpo: one noise, a window of SDE steps, a group that fans out, and what its rewards push -------------
static void show_grpo(void) {
    enum { G = 5, S = 8, WINDOW = 2 };
    static const double END[G] = {125, 60, -5, -70, -125}, REWARD[G] = {0.35, 0.62, 0.88, 0.71, 0.44};
    double advantage[G], sigma[S + 1], x[S + 1], y[S + 1];
    Plot a = {70, 120, 560, 310, 0, S, -150, 160, false};
    picture(1000, 470, "Mix-GRPO: a group of videos of one caption, from one noise",
            "a sketch: chance spreads the group; a reward above the mean makes that chance likelier");
    schedule(sigma, S, 1);
    advantages(advantage, REWARD, G);
    for (int i = 0; i <= S; i++) x[i] = i, tick(&a, false, i, fmt("σ %.3g", sigma[i]));
    for (int ode = 0; ode < 2; ode++) {
        double left = at_x(&a, ode ? WINDOW : 0), wide = at_x(&a, ode ? S : WINDOW) - left;
        box(left, 108, wide, 26, PATTERN_COLOR[ode ? 0 : 2], 0.9);
        label(left + wide / 2, 126, 13, 'm', PAPER, ode ? "ODE: no noise, no gradient" : "window: SDE");
    }
    for (int v = 0; v < G; v++) {
        for (int i = 0; i <= S; i++) {                   // chance spreads them, then each goes its way
            double part = i <= WINDOW ? 0.55 * i / WINDOW : 0.55 + 0.45 * (i - WINDOW) / (S - WINDOW);
            y[i] = END[v] * part - (i == 1 ? 14 * sin(3.0 * v + 1) : 0);
            dot(at_x(&a, i), at_y(&a, y[i]), i <= WINDOW ? 4 : 2.5, PATTERN_COLOR[i <= WINDOW ? 2 : 0]);
        }
        curve(&a, x, y, NULL, WINDOW + 1, PATTERN_COLOR[2], 2.5, 1);
        curve(&a, x + WINDOW, y + WINDOW, NULL, S - WINDOW + 1, PATTERN_COLOR[0], 1.5, 1);
        const char *color = OTHER_COLOR[advantage[v] > 0 ? 0 : 2];
        double middle = at_y(&a, y[S]);
        box(650, middle - 11, 150 * REWARD[v], 22, RIM, 0.6);
        label(656, middle + 5, 13, 's', INK, "reward %.2f", REWARD[v]);
        label(880, middle + 5, 15, 'e', color, "%+.2f", advantage[v]);
        label(892, middle + 5, 13, 's', color, "%s", advantage[v] > 0 ? "likelier" : "less likely");
    }
    dot(70, 280, 7, INK);
    label(62, 260, 13, 'e', INK, "noise");
    label(650, 104, 15, 's', INK, "reward");
    label(880, 104, 15, 'e', INK, "advantage");
    label(960, 452, 12, 'e', SOFT, "advantage = (reward − mean) / std");
}

// ---- cost: where a block's time goes, from two logs of bench, bf16 and HiF8 ------------------------------
static void show_cost(const char *const *log) {
    static const char *const BYTES[][2] = {
        {"forward", "x: bf16 → one byte, the HiF8 value of 15·x/max|x| as E4M3; W likewise → y: bf16"},
        {"attention", "q, k: one byte; v and P: bf16 (8 bits of P are too few over 80,640 keys) → o: bf16"},
        {"backward", "dy: bf16 → bytes of 224·dy/max|dy|, turned, too; W, x turned → dx: bf16, dW: float"}};
    picture(1060, 560, "Where a block's time goes", "14B at 768P on one H100: 80,640 tokens, milliseconds");
    for (int bar = 0; bar < 4; bar++) {
        bool sparse = bar / 2, eight = bar % 2;
        double x = 160, y = 110 + 46 * bar + 14 * sparse, sum = 0;
        label(150, y + 22, 13, 'e', PATTERN_COLOR[sparse], "%s, %s", sparse ? "sparse" : "full",
              eight ? "HiF8" : "bf16");
        for (int part = 0; part < BACK_LINEARS; part++) {
            const char *name = PART[part].name, *key = sparse ? fmt("%c |", PART[part].unit) : "|";
            Series s = read_series(log[eight], name, key, 0);
            if (!s.n) die("%s: no line \"%s ..\"; give what test_osp bench prints", log[eight], name);
            double ms = s.y[0], wide = 3.2 * ms;
            box(x, y, wide, 34, OTHER_COLOR[part % 8], part < 8 ? 0.85 : 0.4);
            if (wide > 40) label(x + wide / 2, y + 22, 12, 'm', PAPER, "%.1f", ms);
            x += wide, sum += ms;
        }
        label(x + 8, y + 22, 14, 's', INK, "%.1f", sum);
    }
    for (int part = 0; part < BACK_LINEARS; part++) {
        double x = 160 + part % 3 * 290, y = 330 + part / 3 * 26;
        box(x, y, 16, 16, OTHER_COLOR[part % 8], part < 8 ? 0.85 : 0.4);
        label(x + 24, y + 13, 13, 's', INK, "%s", PART[part].name);
    }
    label(40, 446, 15, 's', INK, "What is read, in bytes");
    for (int i = 0; i < 3; i++) {
        label(150, 476 + 26 * i, 13, 'e', SOFT, "%s", BYTES[i][0]);
        label(160, 476 + 26 * i, 13, 's', INK, "%s", BYTES[i][1]);
    }
}

// ---- flow: one number, two data points; what sampling does with the best velocity there is --------------
static void show_flow(void) {
    enum { S = 8, PATHS = 8 };
    static const double SHIFT[] = {1, 3, 7};
    Plot a = {100, 130, 520, 360, 1, 0, -2.4, 2.4, false}, b = {720, 130, 260, 360, 0, S, 0, 1, false};
    double sigma[S + 1], x[S + 1], step[S + 1];
    picture(1040, 570, "Flow matching: straight lines in training, a few steps in sampling",
            "gray: lines of training, from noise ε (σ = 1) to data x0 = ±1 (σ = 0); color: 8 Euler steps");
    axes(&a, "x along σ"), axes(&b, "the schedule: σ after each step");
    for (int i = 0; i < 40; i++)
        line(at_x(&a, 1), at_y(&a, rng_normal(5, 1, i)), at_x(&a, 0), at_y(&a, i % 2 ? 1 : -1), FAINT, 1);
    schedule(sigma, S, 3);
    for (int p = 0; p < PATHS; p++) {
        const char *color = OTHER_COLOR[p < PATHS / 2];
        x[0] = -2 + 4.0 * p / (PATHS - 1);
        for (int i = 0; i < S; i++) {
            double v = (x[i] - tanh((1 - sigma[i]) * x[i] / (sigma[i] * sigma[i]))) / sigma[i];
            x[i + 1] = x[i] + (sigma[i + 1] - sigma[i]) * v;
            dot(at_x(&a, sigma[i + 1]), at_y(&a, x[i + 1]), 3, color);
        }
        curve(&a, sigma, x, NULL, S + 1, color, 2, 1);
    }
    for (int i = 0; i <= S; i++) step[i] = i;
    for (int k = 0; k < 3; k++) {
        schedule(sigma, S, SHIFT[k]);
        curve(&b, step, sigma, NULL, S + 1, OTHER_COLOR[2 + k], 2, 1);
        label(740, 440 + 20 * k, 13, 's', OTHER_COLOR[2 + k], "shift %g", SHIFT[k]);
    }
    label(100, 540, 13, 's', SOFT, "x += (σ_next − σ)·v; a larger shift spends more of the steps at large σ, "
          "where the layout is decided");
}

// ---- gradients: what HiF8 and E4M3 make of a trained model's, at one step -------------------------------
enum { BINADES = 48, KINDS = 5 };
static const double OUTLIER[] = {1, 1000};                   // a largest value so many times as large
typedef struct { double share[BINADES], zeros[2][2], off[2][2], squares, n; } Kind;      // [outlier][format]

static float e4m3_round(float x) {                           // nearest, |x| <= 448
    double step = ldexp(1, (fabsf(x) < 0x1p-6f ? -6 : ilogbf(x)) - 3);
    return (float)(rint(x / step) * step);
}

// A tensor's magnitudes by binade below its maximum, and what HiF8 and E4M3 lose of it.
static void count_kind(Kind *kind, const act *device, size_t n) {
    float *g = down_act(device, n), most = 0;
    for (size_t i = 0; i < n; i++) most = fmaxf(most, fabsf(g[i]));
    for (size_t i = 0; i < n; i++) {
        int below = g[i] ? (int)-floor(log2(fabsf(g[i]) / most)) : BINADES;
        if (below < BINADES) kind->share[below] += 1;
        kind->squares += (double)g[i] * g[i], kind->n++;
        for (int j = 0; j < 4; j++) {
            int o = j / 2, f = j % 2;
            double k = (f ? 448 : 224) / (most * OUTLIER[o]);
            double q = (f ? e4m3_round : hif8_round)((float)(g[i] * k)) / k;
            kind->zeros[o][f] += q == 0 && g[i] != 0, kind->off[o][f] += (q - g[i]) * (q - g[i]);
        }
    }
}

// The gradients that enter the products of each block, of 4 clips: of the outputs of ffn.2, ffn.0, q, k, v.
static void gather_kinds(Kind *kind, const char *path) {
    File f;
    TrainOptions o = SMALL_TRAINING;
    Batch a;
    file_open(&f, path);
    Config c = config_read(&f);
    c.quant = c.quant_attn = 0, o.drop = 0, o.seed = 3;
    Model *m = model_layout(&c);
    model_allocate(m, true), weights_read(m, m->param, m->params, &f);
    Run *r = run_of(m, 4, true);
    size_t count = r->B * latent_size(r);
    float *x = spoiled(count), *target = spoiled(count), *dout = spoiled(count);
    batch_new(&a, r), batch_fill(&a, r, &o, 0), batch_upload(r, &a, x, target);
    train_step(r, &a, x, target, dout), head_backward(r, dout);
    for (int i = c.num_layers - 1; i >= 0; i--) {
        Saved *s = &r->saved[i];
        size_t n = numbers(rows_of(r, s->layout));
        PerSample gate = of_row(s->e, 5, 6, c.dim);
        gate_backward(r->d1, NONE, r->dx, s->y, gate, rows_of(r, r->saved[i + 1].layout));
        count_kind(&kind[0], r->d1, n);
        block_backward(r, i);
        const act *const dy[] = {r->dff, r->dq, r->dk, r->dv};
        for (int j = 0; j < 4; j++) count_kind(&kind[1 + j], dy[j], j ? n : n / c.dim * c.ffn_dim);
    }
}

static void show_gradients(const char *path) {
    static const char *const NAME[] = {"ffn.2", "ffn.0", "q", "k", "v"};
    Plot a = {100, 120, 860, 330, -34, 0, 0, 0.2, false};
    Kind kind[KINDS];
    picture(1000, 560, "A trained model's gradients, and what 8 bits hold of them",
            fmt("%s: dy of each product, all blocks, 4 clips; a tensor's largest value is 2^0", path));
    for (int k = -30; k <= 0; k += 5) tick(&a, false, k, fmt("2^%d", k));
    for (int k = 0; k <= 4; k++) tick(&a, true, 0.05 * k, fmt("%d %%", 5 * k));
    frame(&a, "Share of the values in each binade");
    for (int f = 0; f < 2; f++) {                            // from the smallest value to the scale
        double low = f ? log2(0x1p-9 / 448) : log2(0x1p-22 / 224);
        box(at_x(&a, low), 492 + 30 * f, at_x(&a, 0) - at_x(&a, low), 20, OTHER_COLOR[f], 0.7);
        label(at_x(&a, low) - 8, 507 + 30 * f, 13, 'e', OTHER_COLOR[f], f ? "E4M3 holds" : "HiF8 holds");
    }
    memset(kind, 0, sizeof kind);
    gather_kinds(kind, path);
    printf("%-7s %9s | zeros: HiF8, E4M3 | relative error: HiF8, E4M3\n", "dy of", "outlier");
    for (int i = 0; i < 2 * KINDS; i++) {
        const Kind *k = &kind[i % KINDS];
        const double *zeros = k->zeros[i / KINDS], *off = k->off[i / KINDS], n = k->n / 100;
        printf("%-7s %9s | %8.4f %% %8.4f %% | %8.4f %8.4f\n", NAME[i % KINDS], i < KINDS ? "none" : "1000x",
               zeros[0] / n, zeros[1] / n, sqrt(off[0] / k->squares), sqrt(off[1] / k->squares));
    }
    for (int j = 0; j < KINDS; j++) {
        double x[34], y[34];
        for (int i = 0; i < 34; i++) x[i] = -i - 0.5, y[i] = kind[j].share[i + 1] / kind[j].n;
        curve(&a, x, y, NULL, 34, OTHER_COLOR[2 + j], 2.5, 1);
        label(120, 150 + 22 * j, 14, 's', OTHER_COLOR[2 + j], "dy of %s", NAME[j]);
    }
}

typedef struct { const char *out, *preset; Captions words; int R; } ShowOptions;

static int show(int argc, char **argv) {
    #define AT(field) offsetof(ShowOptions, field)
    static const Option OPTION[] = {
        {"", "KIND", 'm', AT(words), NULL, 0, 0,
         "skiparse, model, hif8, flow, ranks, grpo; gradients FILE; cost, loss, reward: with logs"},
        {"", "-o", 's', AT(out), "picture.svg", 0, 0, "picture to write"},
        {"", "-R", 'i', AT(R), "4", 1, 8, "ranks"},
        {"", "--preset", 's', AT(preset), "toy", 0, 0, "of model and ranks: tiny, toy, .., 14b-768p"}};
    #undef AT
    const char *said[4], *why;
    char *text;
    size_t size;
    ShowOptions o;
    memset(&o, 0, sizeof o);
    parse_options(argc, argv, "test_osp show ranks -R 4 -o ranks.svg", OPTION, 4, 0, &o, said);
    const char *kind = o.words.count ? o.words.text[0] : "nothing", *const *logs = o.words.text + 1;
    int count = o.words.count - 1;
    Config c = shape_config(o.preset);
    one_of("show", kind, "skiparse|model|hif8|flow|ranks|grpo|gradients|cost|loss|reward:");
    if (!(svg = open_memstream(&text, &size))) die("no memory for a picture: %s", strerror(errno));
    if (!strcmp(kind, "skiparse")) show_skiparse();
    else if (!strcmp(kind, "model")) show_model(&c, o.preset);
    else if (!strcmp(kind, "hif8")) show_hif8();
    else if (!strcmp(kind, "flow")) show_flow();
    else if (!strcmp(kind, "grpo")) show_grpo();
    else if (!strcmp(kind, "ranks")) show_ranks(&c, o.preset, o.R);
    else if (!strcmp(kind, "gradients") && count == 1) show_gradients(logs[0]);
    else if (!strcmp(kind, "cost") && count == 2) show_cost(logs);
    else if (count < 1 || count > MOST_LOGS) die("show %s: 1 to %d logs, here %d", kind, MOST_LOGS, count);
    else show_logs(logs, count, !strcmp(kind, "reward"));
    fputs("</svg>\n", svg), fclose(svg);
    Output *out = output_open(o.out);
    output_bytes(out, text, size);
    if ((why = output_close(out))) die("%s", why);
    printf("wrote %s: %zu bytes\n", o.out, size);
    return 0;
}

// ==== mutate: single terms of a copy of osp.c are broken, one at a time; each must be caught ===============
// A mutant whose text is not found exactly once, or that does not compile, is an error of this table.
static const struct { const char *name, *find, *replace; } MUTANTS[] = {
    {"HiF8: overflow beyond 40960, not at it", "a >= 0x47200000u", "a > 0x47200000u"},
    {"HiF8: the exponent's sign in a code", "negative ? -size : size", "negative ? size : -size"},
    {"HiF8: the embeddings and the head quantized", "p->block_matrix = block >= 0 &&", "p->block_matrix ="},
    {"HiF8: dy scaled to 15", "rows, out, 224)", "rows, out, 15)"},
    {"HiF8: dq, dk, dv not quantized", "count_of(j ? a.kv : a.q), c->dim, 224)", "0, 0, 224)"},
    {"HiF8: q, k, v not quantized", "if (!r->m->c.quant_attn) return;", "return;"},
    {"HiF8: o not quantized", "s->oq.x : s->o, count_of(a.q), c->dim, 15)", "s->oq.x : s->o, 0, 0, 15)"},
    {"HiF8: q's maximum before RMSNorm", "absmax(amax, y, rows * D)", "absmax(amax, x, rows * D)"},
    {"Skiparse: token-wise and group-wise exchanged", "i % 2 == 0 ? TOKEN_WISE", "i % 2 ? TOKEN_WISE"},
    {"Skiparse: one kind of block not heeded", "&& c->sparse ? c->sparse", "&& 0 ? c->sparse"},
    {"Skiparse: groups one token wide", "h / P % P;", "h % P;"},
    {"Skiparse: one full block too many", "i < F / 2 ||", "i <= F / 2 ||"},
    {"exchange: forward, have and want exchanged", "s->layout, next)->pack", "next, s->layout)->pack"},
    {"exchange: backward, have and want exchanged", "r->dx, have, want,", "r->dx, want, have,"},
    {"exchange: ranks unpack in order of arrival", "= arrival[holder[unit[i]]]++", "= (int)i"},
    {"sampling: o not into oq in sparse blocks", "self.oq.x = s->self.o;", "self.oq.x = first->self.y;"},
    {"RoPE: h and w exchanged", "token / W % H, token % W}", "token % W, token / W % H}"},
    {"RoPE: not turned back in backward", "head_dim, -1.0f, heads", "head_dim, 1.0f, heads"},
    {"modulation: shift is scale", "of_row(e, row, rows, D)", "of_row(e, row + 1, rows, D)"},
    {"attention backward: without the mean", "s[j] * (dp[j] - delta[j])", "s[j] * dp[j]"},
    {"text: its gradient from k alone", "&a.w->v, count_of(a.kv), true", "&a.w->v, count_of(a.kv), false"},
    {"text: dtext not from the loss", "dw, r->dtext", "dw, r->text"},
    {"patches: pw for ph", "2 * h + patch / 2", "2 * h + patch % 2"},
    {"time backward: nothing from the head", "1, r->de_e, 1, r->dt", "0, r->de_e, 1, r->dt"},
    {"sampling: steps the wrong way", "(float)(sigma[i + 1] - sigma[i])", "(float)(sigma[i] - sigma[i + 1])"},
    {"guidance: both sides exchanged", "(float)(1 - g), v, (float)g", "(float)g, v, (float)(1 - g)"},
    {"training: the target's sign", "target[i] = noise - x0", "target[i] = x0 - noise"},
    {"training: sees the captions that eval asks", "while (held_out(caption));", "while (0);"},
    {"AdamW: beta2 is beta1", "t->beta1, t->beta2, young", "t->beta1, t->beta1, young"},
    {"GRPO: advantages not clipped", "a > 5 ? 5", "a > 50 ? 50"},
    {"GRPO: gradient of clipped ratios", "clipped ? 0 : -A * ratio", "-A * ratio"},
    {"GRPO: KL's gradient reversed", "(float)(k - w), mean_i", "(float)(-k - w), mean_i"},
    {"GRPO: the SDE's mean without its drift", "s = {1 + eta * eta /", "s = {1 + 0 * eta /"},
    {"GRPO: no guidance in the gradient", "share * s.b * o->guidance", "share * s.b"},
    {"GRPO: learns from one video for all", "p->x, i + 1, video[b]", "p->x, i + 1, video[0]"},
    {"GRPO: videos without an advantage not dropped", "if (p->advantage[v] != 0) video", "video"},
    {"GRPO: the reference has the adapter", "r->m->lora->scale = 0, weights_prepare", "weights_prepare"},
    {"LoRA: merged without alpha/rank", "lincomb(scaled, l->scale", "lincomb(scaled, 1"},
    {"files: the step lost on resuming", "o->step = (int)", "o->step = 0 * (int)"},
    {"files: a HiF8 weight is off by its scale", "(uint8_t)code) / k", "(uint8_t)code) * k"}};
enum { MUTANT_COUNT = sizeof MUTANTS / sizeof MUTANTS[0] };

static void put_file(const char *path, const void *data, size_t size) {
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, size, f) != size || fclose(f))
        die("%s: %s; the tests need a folder to write to", path, strerror(errno));
}

typedef struct { char *data; size_t size; } Raw;
static Raw get_file(const char *path) {
    struct stat s;
    FILE *f = fopen(path, "rb");
    if (!f || fstat(fileno(f), &s))
        die("%s: %s; run in the folder of osp.c and test_osp.c", path, strerror(errno));
    Raw r = {(char *)xalloc(s.st_size + 1, 1), (size_t)s.st_size};
    if (fread(r.data, 1, r.size, f) != r.size) die("%s: cannot be read", path);
    fclose(f);
    return r;
}

// `old` bytes at `at` replaced by `fresh` others; the rest follows.
static Raw spliced(Raw r, size_t at, size_t old, const char *piece, size_t fresh) {
    Raw out = {(char *)xalloc(r.size - old + fresh + 1, 1), r.size - old + fresh};
    memcpy(out.data, r.data, at), memcpy(out.data + at, piece, fresh);
    memcpy(out.data + at + fresh, r.data + at + old, r.size - at - old);
    return out;
}

// A copy in which the first `from` became `to`; data NULL where there is none, or (once) more than one.
static Raw edited(Raw r, const char *from, const char *to, bool once) {
    const char *at = (const char *)memmem(r.data, r.size, from, strlen(from));
    Raw none = {NULL, 0};
    if (!at || (once && memmem(at + 1, r.data + r.size - at - 1, from, strlen(from)))) return none;
    return spliced(r, at - r.data, strlen(from), to, strlen(to));
}

// ---- a random breaker of safetensors files ---------------------------------------------------------------
static struct { uint64_t run, index; } dice;             // where the random numbers come from
static size_t below(size_t n) { return n ? (size_t)(rng_bits(1, dice.run, dice.index++) % n) : 0; }

// How far a number, a word or a string with its quotes reaches.
static size_t token(const char *t) {
    if (*t == '"') return strcspn(t + 1, "\"") + 2;
    size_t n = strspn(t, "0123456789abcdefghijklmnopqrstuvwxyzF.-");
    return n ? n : 1;
}

// One to four times: a bit or byte changed, the header's length, or a piece of the header left out or put
// elsewhere, mostly in another's place; or the file cut.
static Raw mutated(Raw r, uint64_t run) {
    dice.run = run, dice.index = 0;
    for (size_t times = 1 + below(4); times; times--) {
        uint64_t header;
        memcpy(&header, r.data, 8);
        char *text = r.data + 8;
        size_t length = header < r.size - 8 ? header : r.size - 8, old = 0, n = 0;
        size_t from = below(length), to = below(length), kind = below(8);
        if (kind == 0) text[from] ^= (char)(1 << below(8));
        if (kind == 1) text[from] = (char)below(256);
        if (kind == 2) r.data[below(r.size)] = (char)below(256);
        if (kind == 3) header = below(2) ? length + 8 - below(16) : (uint64_t)below(SIZE_MAX) >> below(64);
        if (kind == 4) old = below(20);
        if (kind >= 5) n = token(text + from);
        if (kind >= 6) old = token(text + to);
        if (to + old > length || from + n > length) continue;
        Raw next = spliced(r, 8 + to, old, text + from, n);
        header += n - old;
        memcpy(next.data, &header, 8), free(r.data), r = next;
    }
    if (below(16) == 0) r.size = below(r.size);
    return r;
}

// Compiles and tests one copy in a folder of its own. line: the last that was said.
enum { CAUGHT, MISSED, NOT_FOUND, NOT_COMPILED };
static int run_copy(Raw source, const char *folder, const char *golden_path, char **line) {
    int code;
    mkdir(folder, 0777), put_file(fmt("%s/osp.c", folder), source.data, source.size);
    *line = shell(&code, fmt("cp test_osp.c %s; cd %s; ${CC:-cc} -std=gnu11 -O1 -w -o t test_osp.c -lm -ldl "
                             "2>&1", folder, folder));
    if (code) return NOT_COMPILED;
    *line = shell(&code, fmt("cd %s; ulimit -t 300; export TMPDIR=. STOP_AT_FIRST=1 OMP_NUM_THREADS=1; "
                             "./t --golden '%s' >log 2>&1; c=$?; tail -1 log; exit $c", folder, golden_path));
    return code ? CAUGHT : MISSED;
}

// All mutants (or those named `only`), two at a time, after an unchanged copy, which must pass.
static int mutate(const char *golden_folder, const char *only) {
    static const char *const WHAT[] = {"caught: ", "MISSED ", "ERROR, not there once ", "ERROR, no program "};
    char *golden_path = realpath(golden_folder, NULL), *said;
    Raw source = get_file("osp.c");
    int caught_ones = 0, ran = 0, code;
    if (!golden_path) die("%s: %s", golden_folder, strerror(errno));
    const char *scratch = scratch_folder("mutate");
    if (run_copy(source, fmt("%s/unchanged", scratch), golden_path, &said) != MISSED)
        die("the unchanged osp.c fails: %s (%s)", said, scratch);
    #pragma omp parallel for schedule(dynamic) num_threads(2) reduction(+ : caught_ones, ran)
    for (int i = 0; i < MUTANT_COUNT; i++) {
        char *line = fmt("\n");
        if (only && !strstr(MUTANTS[i].name, only)) continue;
        Raw copy = edited(source, MUTANTS[i].find, MUTANTS[i].replace, true);
        int status = copy.data ? run_copy(copy, fmt("%s/%d", scratch, i), golden_path, &line) : NOT_FOUND;
        ran++, caught_ones += status == CAUGHT;
        printf("%-56s %s%.*s\n", MUTANTS[i].name, WHAT[status], (int)strcspn(line, "\n"), line);
        fflush(stdout);
    }
    shell(&code, fmt("rm -r %s", scratch));
    printf("%d of %d mutants caught\n", caught_ones, ran);
    return ran - caught_ones;
}

// ---- bad input: each case must end in one line and exit code 2, in time, and touch nothing --------------
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define PATIENCE "5"                                     // seconds
#else
#define PATIENCE "1"
#endif
static struct { char *osp; int cases, failed; } bad;

// One line "osp: ..", the last; before it only what says how much memory a run will take.
static bool one_line(const char *said) {
    while (!strncmp(said, "memory: ", 8) && strchr(said, '\n')) said = strchr(said, '\n') + 1;
    const char *end = strchr(said, '\n');
    return !strncmp(said, "osp: ", 5) && end && !end[1] && end - said > 12;
}

// `before`: shell code that comes first. What a killed run left is compared too.
static void try_case(const char *name, const char *args, const char *before) {
    static const char *const LOOK = "ls -lAin --full-time";
    int code, ignored;
    char *run = fmt("%s timeout -s 9 " PATIENCE " %s %s 2>&1 >/dev/null </dev/null", before, bad.osp, args);
    char *files = shell(&code, LOOK), *said = shell(&code, run);
    if (code == 137) said = shell(&code, run);               // once more: the machine may be busy
    bool same = !strcmp(shell(&ignored, LOOK), files), ok = code == 2 && one_line(said) && same;
    printf("%-44.44s exit %3d%s %s %s", name, code, same ? "" : ", CHANGED", ok ? "ok" : "FAILED\n", said);
    fflush(stdout);
    bad.cases++, bad.failed += !ok;
}

// ---- hostile checkpoints ---------------------------------------------------------------------------------
#define RED " -p 'a small red circle standing still on a black background'"
#define SHORT RED " -n 1 -g 1 -o keep.png"

static void try_file(const char *name, const void *data, size_t size) {
    put_file("hostile", data, size);
    try_case(name, memmem(data, size, "lora_", 5) ? "sample -w base.st" SHORT " --lora hostile"
                                                  : "sample -w hostile" SHORT, "");
    unlink("hostile");
}

// A checkpoint in whose header the first `from` became `to`, and which else is whole.
static void try_header(const char *file, const char *from, const char *to) {
    Raw base = get_file(file), out = edited(base, from, to, false);
    uint64_t n;
    if (!out.data) die("the test's %s has no %s", file, from);
    memcpy(&n, out.data, 8), n += out.size - base.size, memcpy(out.data, &n, 8);
    try_file(to, out.data, out.size);
}

// The first number of a tensor, 4 bytes or a code, replaced.
static void try_value(const char *file, const char *tensor, float value) {
    Raw raw = get_file(file);
    file_open(&gold, file);
    char *at = raw.data + (entry(tensor)->data - gold.map);
    if (entry(tensor)->dtype == U8) *at = (char)(int)value; else memcpy(at, &value, 4);
    file_close(&gold);
    try_file(fmt("%g in %s", value, tensor), raw.data, raw.size);
}

static void try_hostile_files(void) {
    static const char *const EDIT[][14] = {
        // file, form, what stands in its header, what replaces it
        {"base.st", "\"dim\":\"%s\"", "64", "0", "-64", "99999999999", "wide", "32"},
        {"base.st", "\"num_heads\":\"%s\"", "4", "3"},
        {"base.st", "\"num_layers\":\"%s\"", "8", "9", "1000"},
        {"base.st", "\"num_full_blocks\":\"%s\"", "4", "6"},
        {"base.st", "\"sparse_ratio\":\"%s\"", "2", "0"},
        {"base.st", "\"H_l\":\"%s\"", "16", "15"},
        {"base.st", "\"eps\":\"%s\"", "1e-06", "nan"},
        {"base.st", "\"vocab\":\"%s\"", "27", "927"},
        {"lora.st", "\"lora_rank\":\"%s\"", "8", "99"},
        {"lora.st", "\"lora_alpha\":\"%s\"", "16", "x"},
        {"base.st", "\"%s\":\"64\"", "dim", "mid", "eps"},
        {"base.st", "%s", "\"64\"", "64", "{}"},
        {"base.st", "%s", "\"F32\"", "\"F64\"", "\"I32\"", "\"U8\"", "32"},
        {"lora.st", "%s", "lora_A", "lora_C"},
        {"base.st", "%s", "patch_embedding.weight", "patch_embedding.height", "patch_embedding.bias",
         "__metadata__", "\n"},
        {"base.st", "%s", "[64, 3, 1, 2, 2]", "[3,64,1,2,2]", "[1,1,1,1,1,64,3,2,2]",
             "[4294967296,4294967296,3]", "[-64,3,1,2,2]", "[[64, 3, 1, 2, 2]]", "768", "null"},
        {"base.st", "%s", "[0,3072]", "[0,3071]", "[3072,0]", "[0,3072,3072]", "[0]", "[0,3072,]",
         "[0,3072.0]", "[1,3073]", "[99999999999,100000002671]", "[18446744073709551615,3071]"},
        {"base.st", "%s", "\"shape\"", "\"dtype\"", ""},
        {"base.st", "%s", "},", "}},", "},,"}, {"hif8.st", "self_attn.q.weight.%s", "scale", "stale"}};
    static const char *const K = "blocks.0.self_attn.q.weight.scale", *const CODES = "blocks.1.ffn.2.weight";
    Raw base = get_file("base.st");
    size_t cut[] = {0, 7, 8, 1000, base.size - 1, base.size + 1};
    uint64_t noise[64] = {1ull << 62};
    try_file("a header of 2^62 bytes", noise, 8);
    for (int i = 0; i < 64; i++) noise[i] = rng_bits(9, 9, i);
    for (int i = 0; i < 6; i++) try_file(fmt("%zu bytes", cut[i]), base.data, cut[i]);
    try_file("text", "This is no checkpoint, only text.\n", 34);
    try_file("noise", noise, sizeof noise);
    try_file("an empty header", "\2\0\0\0\0\0\0\0{}", 10);
    try_file("half a header", "\1\0\0\0\0\0\0\0{", 9);
    try_file("brackets", "\14\0\0\0\0\0\0\0{\"a\":[[[[[[[", 20);
    for (size_t i = 0; i < sizeof EDIT / sizeof EDIT[0]; i++)
        for (const char *const *to = &EDIT[i][3]; *to; to++)
            try_header(EDIT[i][0], fmt(EDIT[i][1], EDIT[i][2]), fmt(EDIT[i][1], *to));
    try_value("base.st", "blocks.3.ffn.0.weight", NAN), try_value("base.st", "head.head.bias", INFINITY);
    try_value("hif8.st", K, 0), try_value("hif8.st", K, -1), try_value("hif8.st", K, NAN);
    try_value("hif8.st", CODES, 0x80), try_value("hif8.st", CODES, 0x6F);
    try_value("lora.st", "blocks.0.self_attn.q.lora_B.weight", NAN);
}

// One good command, and what makes it bad when it follows; the last of equal options counts.
static const char *const OPTIONS_BAD[][32] = {
    {"", "paint", "--seed 1", "info", "eval", "train", "grpo"},
    {"info", "text", "missing", "base.st hif8.st"},
    {"sample -w", "missing" SHORT, "folder" SHORT, "pipe" SHORT, "lora.st" SHORT, "other.st.resume" SHORT},
    {"sample", "--colour red", "-w", "-p a -o keep.png", "-w base.st -o keep.png"},
    {"sample -w base.st -o keep.png -p", "''", "'a purple circle'",
     "'a a a a a a a a a a a a a a a a a a a a a a a a a a a'",
     "a -p a -p a -p a -p a -p a -p a -p a -p a -p a -p a -p a -p a -p a -p a -p a -p a"},
    {"sample -w base.st" SHORT, "-n 0", "-n -3", "-n 1e30", "-n 2.5", "-n 5x", "-n ''", "-g nan", "-g inf",
     "--shift 0", "--seed -1", "--seed 18446744073709551616", "--height 15", "--frames -1", "--sp magic",
     "--frames 4096 --height 16384 --width 16384", "--noise base.st", "-o nowhere/out.png", "-o folder.png",
     "-o /proc/out.png", "-o out.gif", "-o ''", "-o -", "-o full.png", "--lora missing", "--lora base.st"},
    {"train", "--preset tiny", "--steps"},
    {"train -o new.st", "--preset big", "--steps -1", "--batch 0", "--lr nan", "--dtype fp4", "--init text",
     "--init missing", "--steps 0 -o folder", "--steps 0 -o /dev/full", "--batch 65536 --frames 4096",
     "--steps 5 -o other.st", "--steps 5 -o torn.st", "--steps 5 -o old.st", "--sparse none"},
    {"eval -w base.st", "-n 0", "-w text", "--batch -2", "-w ''", "--steps 0"},
    {"grpo", "-o new.st", "--init base.st"},
    {"grpo -o new.st --init base.st", "--init missing", "--group 1", "-n 5 --window 5", "--rank 64",
     "--rank 0", "--clip 0", "--reward nothing", "--dtype fp4", "-o grpo.st --group 2 --prompts 1"}, {NULL}};

// The number of cases that fail.
static int bad_input(const char *osp) {
    const char *scratch = scratch_folder("bad");
    int code;
    Model *m = model_layout(&PRESETS[0]);
    Optimizer o;
    bad.osp = realpath(osp, NULL);
    if (!bad.osp) die("%s: %s; build it first", osp, strerror(errno));
    if (chdir(scratch)) die("%s: %s", scratch, strerror(errno));
    setenv("ASAN_OPTIONS", "detect_leaks=0", 0);         // a program that stops with an error frees nothing
    model_allocate(m, true), model_random(m, 1), optimizer_init(&o, m->w, m->dw, 16);
    model_save("base.st", m, m->w, "f32"), model_save("hif8.st", m, m->w, "hif8");
    lora_new(m, 8, 16, 1), lora_save("lora.st", m->lora, m->lora->w);
    state_save("other.st.resume", &o, "preset tiny of another kind");
    state_save("grpo.st.resume", &o, "grpo of another kind");
    put_file("keep.png", "kept", 4), put_file("keep.st", "kept", 4), put_file("text", "no checkpoint", 13);
    put_file("torn.st.resume", "torn", 4);
    put_file("old.st.resume", get_file("base.st").data, get_file("base.st").size);
    if (mkdir("folder", 0777) || mkdir("folder.png", 0777) || symlink("/dev/full", "full.png") ||
        mkfifo("pipe", 0666))
        die("cannot make test files in %s", scratch);
    try_hostile_files();
    for (const char *const (*row)[32] = OPTIONS_BAD; (*row)[0]; row++)
        for (const char *const *tail = *row + 1; *tail; tail++)
            try_case(*tail, fmt("%s %s", (*row)[0], *tail), "");
    try_case("a name of 300 letters", fmt("sample -w base.st" SHORT " -o %0300d.png", 0), "");
    try_case("disk full: picture", "sample -w base.st" SHORT, "ulimit -f 1;");
    try_case("disk full: checkpoint", "train --steps 0 -o keep.st", "ulimit -f 1;");
    try_case("disk full: latent", "sample -w base.st" RED " -n 1 -o new.safetensors", "ulimit -f 1;");
    shell(&code, fmt("rm -r %s", scratch));
    printf("bad input: %d cases, %d failed\n", bad.cases, bad.failed);
    return bad.failed;
}

// ---- ranks: R processes against one, in the same run (mpirun -np R ./test_osp_mpi) ----------------------
static Config ranked_config(const int *grid, int quant) {
    Config c = small_config(0, 3 * quant);
    c.num_heads = 4, c.T = grid[0], c.H_l = 2 * grid[1], c.W_l = 2 * grid[2];
    return c;
}

static void ranks_against_one(Ranks *k, const int *grid, int quant) {
    Config c = ranked_config(grid, quant);
    Model *m = random_model(&c, true, 5);
    Question q = question(&c, 0);
    Answer want = ask(run_of(m, 2, true), &q);
    for (int ulysses = 0; ulysses < 2; ulysses++) {
        k->ulysses = ulysses;
        Run *r = run_on(k, m, 2, true);
        Answer got = ask(r, &q);
        char *what = fmt("%d ranks, %dx%dx%d, %s%s", k->size, grid[0], grid[1], grid[2],
                         ulysses ? "Ulysses" : "SSP", quant ? ", HiF8" : "");
        note("output", relative(got.out, want.out, 2 * latent_size(r)));
        note("loss", fabs(got.loss / want.loss - 1));
        note("gradients", relative(got.grad, want.grad, m->count));
        worst_row(quant ? 5e-2 : 1e-6, fmt("%s: output, loss, gradients as one vector,", what));
        if (!quant) note_each(m, got.grad, want.grad);
        note("text", relative(got.dtext, want.dtext, 2 * c.text_len * c.text_dim));
        worst_row(quant ? 3e-1 : 1e-5, fmt("%s: each gradient,", what));
    }
    k->ulysses = false;
}

static void ranks_sample(Ranks *k, const int *grid) {
    Config c = ranked_config(grid, 0);
    Model *m = random_model(&c, true, 6);
    Run *one = run_of(m, 1, false);
    Text cond = {NULL, question(&c, 0).rows}, uncond = {NULL, question(&c, 1).rows};
    size_t n = latent_size(one);
    float *want = up(question(&c, 0).x, n), *got = up(question(&c, 0).x, n);
    sample(one, want, cond, uncond, 50, 7, 5), sample(run_on(k, m, 1, false), got, cond, uncond, 50, 7, 5);
    near("x", got, down(want, n), n);
    worst_row(1e-6, fmt("%d x %d ranks, %dx%dx%d, 50 guided steps,", k->halves, k->size, grid[0], grid[1],
                        grid[2]));
}

static int run_ranks(Ranks *world, bool small) {         // small: under the sanitizers
    static const int GRID[][3] = {{3, 6, 10}, {2, 7, 5}, {2, 8, 8}, {1, 45, 80}};
    ranks_split(world, world->size > 4 ? 2 : 1);
    tally.silent = world->rank || world->half;
    for (int i = 0; i < (small ? 2 : 4); i++)
        for (int quant = 0; quant < (i < 3 ? 2 : 1); quant++) ranks_against_one(world, GRID[i], quant);
    for (int i = 0; i < (small ? 1 : 3); i++) ranks_sample(world, GRID[i]);
    return tally_print();
}

// One rank dies in the middle: the others must not wait for it for ever.
static int lose_rank(Ranks *k) {
    float *x = spoiled(64);
    ranks_split(k, 1);
    for (int i = 0; i < 1000000; i++) {
        if (i == 10 && k->rank == k->size - 1) kill(getpid(), SIGKILL);
        sum_over_ranks(k, x, 64, false);
    }
    return 0;
}

// ---- fuzz: the reader of safetensors against mutated files ----------------------------------------------
// A small valid file. What is nasty stands in its metadata, for pieces of the header are copied about.
static Raw fuzz_base(void) {
    static const char *const HEADER =
        "{\"__metadata__\":{\"dim\":\"64\",\"note\":\"a\\n\\u00e9\\ud800 -1 1.5 007 null [[[[ {{ }} ]] :, "
        "4294967296 9223372036854775807 18446744073709551616 I32 F99 w.scale \\u0000 \\\\\"},"
        "\"w\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},"
        "\"b\":{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[24,32]},"
        "\"e\":{\"dtype\":\"I32\",\"shape\":[0,9,1,1,1,1,1,1],\"data_offsets\":[32,32]},"
        "\"q\":{\"dtype\":\"U8\",\"shape\":[5],\"data_offsets\":[32,37]},"
        "\"q.scale\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[37,41]}} ";
    uint64_t n = strlen(HEADER);
    Raw r = {(char *)xalloc(8 + n + 41 + 1, 1), 8 + n + 41};
    memcpy(r.data, &n, 8), memcpy(r.data + 8, HEADER, n);
    for (size_t i = 0; i < 37; i++) r.data[8 + n + i] = (char)(i * 5 % 64);
    r.data[8 + n + 40] = 0x3F;                           // scale 0.5
    return r;
}

// file_open (t NULL) or file_read, whose deaths are not the end.
static bool survives(File *f, const char *path, const Entry *t, float **out) {
    jmp_buf here;
    volatile bool ok = false;
    caught = &here;
    if (!setjmp(here)) {
        if (t) *out = file_read(f, t); else file_open(f, path);
        ok = true;
    }
    caught = NULL;
    return ok;
}

// The reader's promises about a file it accepted; a name for the broken one, or NULL.
static const char *broken_promise(File *f) {
    for (const Entry *t = f->entry; t < f->entry + f->count; t++) {
        size_t count = 1;
        float *out = NULL;
        if (file_find(f, t->name) != t || file_meta(f, t->name) != t->text) return "lookup";
        for (int d = 0; d < t->rank; d++) count *= t->shape[d];
        if (t->text) continue;
        if (t->rank > 8 || count != t->count || t->bytes != count * DTYPE_BYTES[t->dtype]) return "shape";
        if (t->data < f->data || t->bytes > f->bytes || t->data + t->bytes > f->data + f->bytes)
            return "bounds";
        bool ok = survives(f, NULL, t, &out);
        for (size_t j = 0; ok && j < count; j++) if (!isfinite(out[j])) return "NaN or Inf read";
        free(out);
    }
    return NULL;
}

// 0: every one of `runs` files was read or refused as promised. The first is valid.
static int fuzz_reader(long runs) {
    int fd = memfd_create("osp_fuzz", 0), wrong = 0, accepted = 0;
    double start = seconds();
    FILE *loud = stderr;
    const char *path = fmt("/proc/self/fd/%d", fd);
    stderr = fopen("/dev/null", "w");                    // what die says; a sanitizer does not write there
    for (long run = 0; run < runs && !wrong; run++) {
        Raw r = run ? mutated(fuzz_base(), run) : fuzz_base();
        File f;
        bool put = !ftruncate(fd, 0) && pwrite(fd, r.data, r.size, 0) == (ssize_t)r.size;
        if (!put) die("fuzz: %s", strerror(errno));
        bool ok = survives(&f, path, NULL, NULL);
        const char *broken = ok ? broken_promise(&f) : run ? NULL : "the valid file is read";
        if (broken) printf("fuzz: run %ld: broken promise: %s\n", run, broken);
        accepted += ok, wrong += broken != NULL;
        file_close(&f), free(r.data);
    }
    stderr = loud;
    printf("fuzz: %ld files, %d accepted, %.1f s\n", runs, accepted, seconds() - start);
    return wrong;
}

// ==== Commands ============================================================================================
static const char *option(int argc, char **argv, const char *name, const char *standard) {
    for (int i = 1; i + 1 < argc; i++) if (!strcmp(argv[i], name)) return argv[i + 1];
    return standard;
}

// ==== torture: kills, full disks, hostile files, ranks that die or differ, on the whole program ===========
#define SAMPLE " sample -w base.st -n 1 -o it.png" RED " "
static const char *const LEARN[] = {                     // short, and the state is saved after every step
    "train --preset tiny --steps 40 --batch 4 --save 0 -o",
    "train --preset tiny --steps 30 --batch 4 --hif8 --save 0 -o",
    "grpo --init base.st --prompts 1 --group 4 --steps 8 -n 4 --save 0 -o"};

// 0: the script did as wanted.
static int failed_script(const char *script) {
    int code;
    char *said = shell(&code, fmt("cd torture && { %s; } 2>&1", script));
    if (code) printf("    %.300s\n    exit %d: %.300s\n", script, code, said);
    return code != 0;
}

// Runs that are killed up to 3 times and then left alone must end as an unbroken one, and leave nothing else.
static void torture_kills(const char *osp, const char *signal, int kills, uint64_t seed) {
    int failed = 0;
    for (int i = 0; i < kills; i += 3) {
        const char *run = fmt("%s %s it.st >it.log 2>it.err", osp, LEARN[i / 3 % 3]);
        double t[3];
        for (int k = 0; k < 3; k++) t[k] = 0.05 + 0.9 * rng_uniform(seed, 1, i + k);
        failed += failed_script(fmt(
            "rm -f it*; p=; for t in %.3f %.3f %.3f; do timeout -s %s $t %s; c=$?; sleep 0.1; "
            "case $c in 0|124|130|137|143) ;; *) exit 1;; esac; "
            "if [ -n \"$p\" ] && grep -q resumed it.err; then grep -q \"at step $p$\" it.err || exit 2; fi; "
            "n=`sed -n 's/^stopped at step \\([0-9]*\\);.*/\\1/p' it.log`; [ -n \"$n\" ] && p=$n; "
            "[ $c = 0 ] && p=; done; %s && cmp it.st want%d.st && rm it.log it.err it.st && "
            "test -z \"`ls it* 2>/dev/null`\"", t[0], t[1], t[2], signal, run, run, i / 3 % 3));
    }
    row(failed, 0, fmt("SIG%s at %d random moments: the same bytes at the end, nothing left", signal, kills));
}

// A limit between the sizes of output and state: saving warns, the run ends. One below: the old file stays.
static void torture_disk(const char *osp) {
    int failed = 0;
    for (int i = 0; i < 20; i++) {
        bool fits = i % 2;
        int limit = (int)(fits ? 4800 + 9000 * rng_uniform(5, 2, i) : 1 + 4400 * rng_uniform(5, 2, i));
        failed += failed_script(fmt("rm -f it*; cp base.st it.st; (ulimit -f %d; %s %s it.st >it.log 2>&1); "
                                    "test $? = %d && cmp it.st %s", limit, osp, LEARN[0], fits ? 0 : 2,
                                    fits ? "want0.st" : "base.st"));
    }
    row(failed, 0, "20 full disks: no run ends that need not, old files stay whole");
}

// Broken copies of real files, through every command that reads one.
static void torture_files(const char *osp, int count) {
    static const char *const USE[][2] = {                // the file that is broken, and who reads it
        {"base.st", "info bad"}, {"base.st", "sample -w bad -n 1 -o it.png" RED},
        {"lora.st", SAMPLE "--lora bad"}, {"clip.safetensors", SAMPLE "--noise bad"},
        {"base.st", "train --preset tiny --steps 1 --batch 1 -o bad.st"}};
    int failed = 0;
    for (int i = 0; i < count; i++) {
        Raw r = mutated(get_file(fmt("torture/%s", USE[i % 5][0])), i);
        put_file(i % 5 == 4 ? "torture/bad.st.resume" : "torture/bad", r.data, r.size), free(r.data);
        failed += failed_script(fmt("rm -f it.png* bad.st; (ulimit -v 400000; timeout 5 %s %s >it.log); "
                                    "test $? = 0 -o $? = 2", osp, USE[i % 5][1]));
    }
    row(failed, 0, fmt("%d hostile files: exit 0 or 2 within 5 s and 400 MB of addresses", count));
}

// Two ranks told different things must stop with a message, and a killed rank must end the other.
static void torture_ranks(const char *osp) {
    static const char *const DIFFER[] = {"--seed 2", "-n 3", "-p 'a large blue square'", "--lora lora.st",
                                         "--noise clip.safetensors", "--shift 4"};
    const char *mpirun = "OMP_NUM_THREADS=1 timeout 30 mpirun --oversubscribe -q -np";
    const char *learn = fmt("2 %s_mpi %s it.st >it.log 2>&1", osp, LEARN[0]);
    const char *sample = fmt("%s_mpi" SAMPLE, osp);
    int failed = 0;
    if (access(fmt("torture/%s_mpi", osp), X_OK)) { skip("ranks: make osp_mpi first"); return; }
    failed += failed_script(fmt("OMP_NUM_THREADS=1 mpirun --oversubscribe -q -np %s && mv it.st "
                                "want_ranks.st", learn));
    for (int i = 0; i < 6; i++)
        failed += failed_script(fmt("%s 1 %s : -np 1 %s %s >it.log 2>&1; c=$?; test $c != 0 -a $c != 124 && "
                                    "grep -q 'osp: rank' it.log", mpirun, sample, sample, DIFFER[i]));
    row(failed, 0, "6 inputs that differ on one of two ranks are named");
    failed = 0;
    for (int i = 0; i < 20; i++)
        failed += failed_script(
            fmt("rm -f it*; %s %s & p=$!; sleep %.2f; pkill -KILL -n -P `pgrep -P $p` || exit 3; "
                "for k in 1 2 3 4 5 6 7 8 9 10 11; do kill -0 $p 2>/dev/null || break; sleep 1; done; "
                "kill -0 $p 2>/dev/null && exit 1; %s %s && cmp it.st want_ranks.st",
                mpirun, learn, 0.4 + rng_uniform(8, 1, i), mpirun, learn));
    row(failed, 0, "20 ranks killed: the others gone within 10 s, the next run ends the same");
}

static int torture(const char *program) {
    const char *osp = fmt("../%s", program);
    int code;
    shell(&code, "rm -rf torture; mkdir torture");
    int failed = failed_script(fmt("%s train --preset tiny --steps 0 -o base.st && %s grpo --init base.st "
                                   "--prompts 1 --group 2 --micro 2 --steps 1 -n 3 --window 1 -o lora.st && "
                                   "%s sample -w base.st -n 1 -o clip.safetensors" RED, osp, osp, osp));
    for (int i = 0; i < 3; i++) failed += failed_script(fmt("%s %s want%d.st", osp, LEARN[i], i));
    row(failed, 0, "the files to begin with");
    torture_kills(osp, "KILL", 99, 1), torture_kills(osp, "TERM", 15, 2), torture_kills(osp, "INT", 15, 3);
    torture_disk(osp);
    torture_files(osp, 2000);
    torture_ranks(osp);
    return tally_print();
}

static int help(void) {
    puts("test_osp [--golden DIR]          every check; test_osp ops: of the operations only\n"
         "test_osp verify                  the paper's claims\n"
         "test_osp bench [-h]              times: of a model; linear, hif8, comm\n"
         "test_osp show KIND -o FILE.svg   pictures (show -h lists them)\n"
         "test_osp ranks, test_osp lose    under mpirun: R ranks against one; a rank dies\n"
         "test_osp badinput ./osp          hostile files and options\n"
         "test_osp torture ./osp           kills, full disks, thousands of hostile files, ranks that die: 10 "
         "minutes\n"
         "test_osp fuzz N                  the file reader\n"
         "test_osp mutate [--only WORD]    breaks single terms of osp.c and looks whether the checks notice");
    return 2;
}

int main(int argc, char **argv) {
    Ranks k;
    memset(&k, 0, sizeof k);
    ranks_start(&k);
    const char *word = argc > 1 ? argv[1] : "", *command = *word != '-' ? word : word[1] == 'h' ? "help" : "";
    const char *folder = option(argc, argv, "--golden", "golden"), *more = argc > 2 ? argv[2] : "";
    #define IS(name) (!strcmp(command, name))
    if (IS("osp")) return osp_main(argc - 1, argv + 1);
    if (!IS("mutate")) device_start(option(argc, argv, "--device-dtype", IS("bench") ? NULL : "f32"), k.rank);
    tally.half = !IS("mutate") && act_size() != sizeof(float), tally.silent = k.rank, tally.subject = "";
    int failed = IS("") || IS("ops") ? run_tests(folder, IS("ops"))
                 : IS("verify")      ? verify(&k)
                 : IS("bench")       ? bench(argc - 2, argv + 2, &k)
                 : IS("show")        ? show(argc - 2, argv + 2)
                 : IS("ranks")       ? run_ranks(&k, !strcmp(more, "small"))
                 : IS("lose")        ? lose_rank(&k)
                 : IS("badinput")    ? bad_input(more)
                 : IS("torture")     ? torture(more)
                 : IS("fuzz")        ? fuzz_reader(atol(more))
                 : IS("mutate")      ? mutate(folder, option(argc, argv, "--only", NULL))
                                     : help();
    ranks_end(0);
    return failed > 0;
}
