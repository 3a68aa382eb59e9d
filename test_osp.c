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
    while (fgetc(p) != EOF) {}                           // what finds no room
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
        wrong += !(off <= (size < 0x1p-6 ? 0x1.001p-10 : 1e-6 * size));
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
    int *at = (int *)to_device(map, count);
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
    Sequences s = {n, q, k, (int *)to_device(q, n + 1), (int *)to_device(k, n + 1)};
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
    int ids[ROWS] = {1, 4, 4, -1, 0, 2, 2, 4, 1, -1, -1, 2, 0, 4}, *at = (int *)to_device(ids, ROWS);
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
    return run_new(m, k, B, training);
}
static Run *run_of(Model *m, int B, bool training) { return run_on(&alone, m, B, training); }
static void spoil_run(Run *r) {                          // every buffer
    spoil(r->sin, run_place(run_plan(r->m, r->ranks, r->B, r->training), NULL));
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
    float *x = up_golden("noise"), *v = spoiled(n), *whole = golden("noise");
    Text cond = {NULL, golden("text_cond")}, uncond = {NULL, golden("text_uncond")};
    guided_velocity(r, v, x, sigma[0], cond, uncond, 1), note_float("v.cond", v);
    guided_velocity(r, v, x, sigma[0], cond, uncond, 0), note_float("v.uncond", v);
    for (int i = 0; i < S; i++) {
        guided_velocity(r, v, x, sigma[i], cond, uncond, g);
        lincomb(x, 1, x, (float)(sigma[i + 1] - sigma[i]), v, n);
        note_float(fmt("x.%d", i + 1), x);
    }
    sample(r, whole, cond, uncond, S, shift, g);
    note_golden(fmt("x.%d", S), whole);
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
static void check_golden_policy(Run *r, const char *set, const char *prefix, const float *order, int W) {
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
    else check_golden_policy(r, "case0.", "case0.", ORDER, 1);
    check_golden_policy(r, "case1.", "case1.", ORDER, 1);
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
        check_golden_policy(r, "", name, order + N * B, W);
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
    Run *r = run_of(small_model(VOCAB, 0, 1), 3, true);
    TrainOptions o = SMALL_TRAINING;
    Batch a = batch_new(r);
    size_t n = latent_size(r);
    int dropped = 0, ids[12];
    float *x = floats(n), *target = floats(n);
    o.drop = 0.5, o.seed = 9;
    for (int k = 15; k < 75; k++) {
        int b = k % 3, caption = training_caption(9, k);
        if (!b) batch_fill(&a, r, &o, k / 3);
        draw_clip(x, caption, 9, k, r->T, 2 * r->H, 2 * r->W);
        double sigma = shift_sigma(1 / (1 + exp(-rng_normal(9, SIGMA_STREAM, k))), train_shift(60));
        for (size_t i = 0; i < n; i++) {
            double eps = rng_normal(9, NOISE_STREAM, k * n + i), x0 = x[i];
            x[i] = (float)(sigma * eps + (1 - sigma) * x0), target[i] = (float)(eps - x0);
        }
        note("t", fabs(a.t[b] / 1000 / sigma - 1));
        note("x", relative(a.x + b * n, x, n)), note("target", relative(a.target + b * n, target, n));
        bool drop = a.ids[b * 12] < 0;
        note("a caption of training", held_out(caption));
        caption_ids(ids, 12, drop ? "" : caption_text(caption)), dropped += drop;
        note("words", memcmp(ids, a.ids + b * 12, sizeof ids) != 0);
    }
    note("half dropped", dropped < 15 || dropped > 45);
    worst_row(1e-5, "training's samples: sigma, x = sigma·noise + (1 − sigma)·clip, target, words,");
}

// An untrained model answers 0, so its velocity loss is the mean of (ε − x0)² at every σ, of held-out clips.
static void check_velocity_loss(void) {
    enum { CLIPS = 5 };
    Model *m = model_layout(&PRESETS[0]);
    model_allocate(m, true), model_random(m, 1);
    Run *r = run_of(m, 2, true);
    size_t n = latent_size(r);
    float *x0 = floats(n);
    Figure got[BINS + 1];
    double want = 0, squares = 0;
    for (int i = 0; i < CLIPS; i++) {
        int caption = held_out_caption(0, i);
        note("held out", !held_out(caption));
        draw_clip(x0, caption, 7, i, r->T, 2 * r->H, 2 * r->W);
        double loss = 0;
        for (size_t j = 0; j < n; j++) loss += pow(rng_normal(7, NOISE_STREAM, i * n + j) - x0[j], 2) / n;
        want += loss / CLIPS, squares += loss * loss / CLIPS;
    }
    double spread = sqrt((squares - want * want) / (CLIPS - 1));
    velocity_loss(got, r, CLIPS, 7);
    for (int bin = 0; bin <= BINS; bin++)
        note("mean", fabs(got[bin].mean / want - 1)), note("error", fabs(got[bin].error / spread - 1));
    worst_row(1e-4, "velocity loss of a model that answers 0, by sigma,");
}

static void check_one_kind(void) {
    static const char *const WANT[] = {"FFtgtgtgtgFF", "FFttttttttFF", "FFggggggggFF"};
    for (int kind = 0; kind < 3; kind++) {
        Config c = PRESETS[1];
        c.sparse = kind;
        const Run *r = run_plan(model_layout(&c), &alone, 1, false);
        for (int i = 0; i < c.num_layers; i++)
            note(WANT[kind], PATTERN_LETTER[r->saved[i].pattern] != WANT[kind][i]);
    }
    worst_row(0, "--sparse both, token, group: the patterns of 12 blocks,");
}

// One model trains for 6 steps and is saved after 3; the other goes on from there.
static void check_resume(const char *path, int quant) {
    Run *r[2];
    Optimizer o[2];
    for (int k = 0; k < 2; k++) {
        Model *m = small_model(VOCAB, quant, 500 + k);
        r[k] = run_of(m, 2, true);
        optimizer_init(&o[k], m->w, m->dw, m->count);
    }
    size_t n = o[0].n;
    Batch a = batch_new(r[0]);
    for (int i = 0; i < 9; i++) {
        int k = i > 5, step = k ? i - 3 : i;
        batch_fill(&a, r[k], &SMALL_TRAINING, step), train_step(r[k], &a);
        optimizer_step(&o[k], &alone, &SMALL_TRAINING, learning_rate(&SMALL_TRAINING, step));
        if (i == 2) note("saved", state_save(path, &o[0], "this run") != NULL);
        if (i == 5) note("loaded", !state_load(path, &o[1], "this run"));
    }
    const float *w[] = {o[0].w, o[0].m, o[0].v, o[0].ema}, *again[] = {o[1].w, o[1].m, o[1].v, o[1].ema};
    for (int i = 0; i < 4; i++) note("weights and moments", !same_bits(down(w[i], n), down(again[i], n), n));
    note("step", o[1].step != 6);
    worst_row(0, fmt("6 training steps = 3, saved, resumed, 3, bit for bit%s,", quant ? ", HiF8" : ""));
}

static void check_optimizer(void) {
    size_t n = 1000;
    TrainOptions o = SMALL_TRAINING;
    Optimizer a;
    float *g = noise(1, n, 1), *w = noise(2, n, 1), *m = floats(n), *v = floats(n), *ema = floats(n);
    double norm = sqrt(sum_squares(up(g, n), NULL, n));
    optimizer_init(&a, up(w, n), up(g, n), n);
    o.clip = 0.5;
    note("norm", fabs(optimizer_step(&a, &alone, &o, 1e-3) / norm - 1));
    float *after = down(a.w, n);
    for (size_t i = 0; i < n; i++) {
        double clipped = g[i] * 0.5 / norm;
        m[i] = (float)(0.1 * clipped), v[i] = (float)(0.01 * clipped * clipped);
        ema[i] = 2 / 11.0f * w[i] + 9 / 11.0f * after[i];
    }
    near("m", a.m, m, n), near("v", a.v, v, n), near("average, young", a.ema, ema, n);
    note("gradient zeroed", sum_squares(a.dw, NULL, n));
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
    Question q = question(&m->c, 0);
    File f;
    note("saved", model_save(path, m, m->w, kind) != NULL);
    file_open(&f, path);
    Config stored = config_read(&f);
    model_allocate(read, true), weights_read(read, read->param, read->params, &f);
    for (int i = 0; i < CONFIG_ROWS; i++)
        note(CONFIG[i].name, *config_field(&stored, i) != *config_field(&m->c, i));
    for (int i = 0; i < m->params; i++) {
        Param *p = &m->param[i];
        bool codes = p->block_matrix && !strcmp(kind, "hif8"), half = p->product && strcmp(kind, "f32");
        enum Dtype dtype = codes ? U8 : half ? BF16 : F32;
        float *want = as_stored(down(p->w, p->count), p->count, dtype);
        note(p->name, file_find(&f, p->name)->dtype != dtype);
        note(p->name, !same_bits(want, down(read->param[i].w, p->count), p->count));
        if (!codes) param_set(m, p, want);                   // so that the two models may be compared
    }
    file_close(&f);
    worst_row(0, fmt("a %s checkpoint read back, bit for bit,", kind));
    Run *r = run_of(read, 2, true);
    row(!same_answer(r, ask(r, &q), ask(run_of(m, 2, true), &q)), 0,
        fmt("a %s checkpoint's output and gradients under HiF8 = its origin's, bit for bit", kind));
    if (strcmp(kind, "bf16")) return;
    float large = 3.4e38f;
    upload(m->w, &large, sizeof large);
    row(!model_save(path, m, m->w, kind) || access(path, F_OK), 0, "3.4e38, infinite in bf16, is not saved");
}

// A whole update of Mix-GRPO, which dies where a ratio is not 1; who is learned from; the adapter's file.
static void check_policy_update(const char *path) {
    enum { V = 4, W = 2 };
    Config c = small_config(VOCAB, 0);
    Model *m = model_layout(&c);
    PolicyOptions o = {1, 2, 2, V, 4, W, 3, 1, 5e-3, 0.004, "all"};
    Optimizer opt;
    int video[V];
    lora_new(m, 4, 8, 1), model_allocate(m, true);
    for (int i = 0; i < m->params; i++) param_set(m, &m->param[i], noise(900 + i, m->param[i].count, 0.2));
    Lora *l = m->lora;
    upload(l->w, noise(5, l->n, 0.1), l->n * sizeof(float));
    optimizer_init(&opt, l->w, l->dw, l->n);
    weights_prepare(m);
    Policy *p = policy_new(run_of(m, V, false), run_of(m, V, true), &o, &SMALL_TRAINING);
    PolicyFigures f = policy_update(p, &opt);
    row(f.steps != 1 || f.count != V * W || !(f.kl > 1e-12 && f.norm > 0), 0,
        "GRPO: one AdamW step of all videos, whose reference has no adapter");
    p->advantage[0] = p->advantage[2] = 0;
    row(shuffled_videos(video, p, 7) != 2 || video[0] * video[1] != 3, 0,
        "GRPO: videos without an advantage are dropped");
    note("saved", lora_save(path, l, l->w) != NULL);
    lora_load(m, path);
    note("scale", m->lora == l || m->lora->scale != l->scale);
    for (const Param *a = l->param, *b = m->lora->param; a < l->param + 2 * l->count; a++, b++)
        note(a->name, !same_bits(down(a->w, a->count), down(b->w, a->count), a->count));
    worst_row(0, "an adapter's file read back, bit for bit,");
}

// ---- the exchanges of R ranks, played in one process -----------------------------------------------------
// The units (b·N + token)·shares + share of the heads that rank r holds, in its order; returns how many.
static int held_units(int *unit, const Pattern *p, int layout, int r, int shares, int B) {
    bool dealt = layout >= HEADS && layout < WHOLE;
    const Pattern *o = &p[layout % PATTERNS];
    int N = o->start[o->count], count = 0;
    for (int i = 0; i < B * N * shares; i++) {
        int b = i / shares / N, j = i / shares % N, share = i % shares;
        bool mine = dealt ? share == r : layout == WHOLE || (o->first[r] <= j && j < o->first[r + 1]);
        if (mine) unit[count++] = (b * N + o->order[j]) * shares + share;
    }
    return count;
}

// The wrong places after a move: rank r packs, rank s gets the next send[s] of it, and unpacks.
static int wrong_places(const Pattern *p, int have, int want, int R, int B) {
    int most = B * p->start[p->count] * R, sent[16] = {0}, wrong = 0, *unit = (int *)xalloc(4 * most, 4);
    int *map = unit + most, *got = map + most, *due = got + most;
    Exchange e[16];
    for (int r = 0; r < R; r++) e[r] = exchange_of(p, have, want, B, r, R);
    for (int s = 0; s < R; s++) {
        int n = 0;
        for (int r = 0; r < R; r++) {
            held_units(unit, p, have, r, e[r].shares, B);
            download(map, e[r].pack, e[r].sent * sizeof(int));
            for (int j = 0; j < e[r].send[s]; j++) got[n++] = unit[map[sent[r]++]];
            wrong += e[r].send[s] != e[s].receive[r];
        }
        wrong += held_units(due, p, want, s, e[s].shares, B) != n || (size_t)n != e[s].received;
        download(map, e[s].unpack, n * sizeof(int));
        for (int i = 0; i < n; i++) wrong += got[map[i]] != due[i];
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

// ---- the small world: captions, and ShapesBench on real clips, under their own captions and others' -------
static void check_world(int T, int H, int W) {
    static const double CHANCE[] = {1 / 8.0, 1 / 4.0, 1 / 2.0, 1 / 5.0, 1 / 3.0};
    float *x = floats(3 * T * H * W), score[N_SCORES];
    double total[4] = {0}, others[N_SCORES] = {0};           // own captions, soft; others' captions, soft
    int held = 0;
    for (int i = 0; i < CAPTIONS; i++) {
        held += held_out(i);
        note("read as written", parse_caption(fmt("%s", caption_text(i))) != i);
        draw_clip(x, i, 3, i, T, H, W);
        for (int kind = 0; kind < 4; kind++) {
            int asked = kind < 2 ? i : (int)(rng_bits(5, 5, i) % CAPTIONS);
            shapes_score(score, x, asked, T, H, W, kind % 2);
            for (int k = 0; k < N_SCORES; k++) {
                total[kind] += 100 * score[k] / CAPTIONS / N_SCORES;
                if (kind == 2) others[k] += 100 * score[k] / CAPTIONS;
            }
        }
    }
    note("96 held out", held != 96);
    worst_row(0, "captions,");
    for (int soft = 0; soft < 2; soft++)
        row(100 - total[soft], soft ? 10 : 1,
            fmt("ShapesBench%s, real clips of %dx%dx%d: 100 less the total", soft ? " soft" : "", T, H, W));
    for (int k = 0; k < 5; k++) note(SCORE_NAMES[k], fabs(others[k] - 100 * CHANCE[k]));
    worst_row(5, "ShapesBench, others' captions: points away from chance,");
    row(total[3], 80, "ShapesBench soft, others' captions");
}

static int run_tests(const char *folder, bool ops_only) {
    if (!tally.silent) printf("%-88s %9s %9s\n", "check", "measured", "limit");
    check_ops(ON_GPU || ops_only), check_all_codes();        // 20 s on a CPU, with all sizes
    if (ops_only) return tally_print();
    const char *scratch = scratch_folder("test"), *path = fmt("%s/file", scratch);
    check_golden(folder), check_exchanges();
    check_words_model(), check_repetition(2);
    for (int quant = 0; quant < 4; quant += 3) check_repetition(quant), check_resume(path, quant);
    check_batch_fill(), check_velocity_loss(), check_one_kind(), check_optimizer();
    check_checkpoint(path, "f32"), check_checkpoint(path, "bf16");
    if (!tally.half) check_checkpoint(path, "hif8");         // bf16 rounds first
    check_policy_update(path);
    check_world(4, 16, 16), check_world(8, 32, 32);
    unlink(path), rmdir(scratch);
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

static Pattern *config_patterns(const Config *c, int R) {
    return patterns_of(c->T, c->H_l / 2, c->W_l / 2, c->sparse_ratio, R);
}

// How many pairs of tokens meet in attention.
static double attention_pairs(const Pattern *p) {
    double sum = 0;
    for (int s = 0; s < p->count; s++) sum += pow(p->start[s + 1] - p->start[s], 2);
    return sum;
}

// FLOPs of one forward; a multiply and an add are two. Of a block: q, k, v, o; q, o of cross-attention; k, v
// of the text; the ffn's two; attention. Padded as the authors do: H and W up to a multiple of P².
static double model_flops(Config c, bool hybrid, bool padded) {
    int unit = 2 * c.sparse_ratio * c.sparse_ratio, L = c.num_layers, F = hybrid ? c.num_full_blocks : L;
    if (padded) c.H_l = (c.H_l + unit - 1) / unit * unit, c.W_l = (c.W_l + unit - 1) / unit * unit;
    const Pattern *p = config_patterns(&c, 1);
    double D = c.dim, n = p->start[1], text = c.text_len;
    double sum = 8 * n * D * (c.in_dim + c.out_dim) + 2 * text * D * (c.text_dim + D);
    sum += 4 * L * D * (n * (3 * D + c.ffn_dim) + text * (n + D));
    for (int i = 0; i < L; i++) sum += 4 * D * attention_pairs(p + block_pattern(i, L, F));
    return sum;
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

enum { NO, YES, UNJUDGED };                              // the last: a figure that could not be wrong
static int claims_failed;

static void claim(int ok, const char *what, const char *paper, const char *here) {
    static const char *const WORD[] = {"NO", "yes", "-"};
    claims_failed += ok == NO;
    if (!tally.silent) printf("| %-62s | %-15s | %-58s | %-3s |\n", what, paper, here, WORD[ok]);
}

// Of 14B: by FLOPs, the limit of what can be measured; and as bench recorded it, all 40 layers on a card.
static void verify_speed(const Config *c, const char *size, const char *paper, const char *paper_8) {
    const Pattern *p = config_patterns(c, 1);
    double N = p->start[1], full = model_flops(*c, false, false), hybrid = model_flops(*c, true, false);
    double most = fmax(attention_pairs(p + TOKEN_WISE), attention_pairs(p + GROUP_WISE)) / N / N, slow = 0;
    double padded = model_flops(*c, true, true);
    claim(fabs(most * 4 - 1) < 1e-3, fmt("%s, N = %.0f: attention's FLOPs, sparse / full", size, N),
          "1/P^2 = 1/4", fmt("%.5f", most));
    claim(UNJUDGED, fmt("%s: TFLOP of one forward of 14B", size), "",
          fmt("full %.0f, hybrid %.0f, padded %.0f", full / 1e12, hybrid / 1e12, padded / 1e12));
    claim(full / padded > atof(paper), fmt("%s: speed-up by FLOPs, the limit of what is measured", size),
          paper, fmt("%.2fx padded as the paper, %.2fx here", full / padded, full / hybrid));
    for (int eight = 0; eight < 2; eight++) {
        const char *dtype = eight ? "hif8" : "bf16", *said = eight ? paper_8 : paper;
        const char *log = fmt("assets/bench_%s_%s.log", size, dtype);
        if (!eight) slow = *read_series(log, "forward ", "layers: full", 0).y;
        double fast = *read_series(log, "forward ", "hybrid", 0).y, ratio = fast > 0 ? slow / fast : 0;
        claim(ratio > atof(said), fmt("%s: hybrid in %s over full in bf16, as recorded", size, dtype), said,
              fmt("%.2fx: %.0f, %.0f ms on an H100", ratio, slow, fast));
    }
}

// Which tokens of a frame (h0, w0) has heard after a token-wise and then a group-wise block: those of its
// group-wise subsequence (2), all that these heard before (1). Returns how many.
static int heard_of(uint8_t *heard, int H, int W, int P, int h0, int w0) {
    int count = 0, mine = subsequence(GROUP_WISE, h0, w0, P);
    bool met[64] = {false};                              // token-wise subsequences
    for (int pass = 0; pass < 2; pass++)
        for (int i = 0; i < H * W; i++) {
            bool ours = subsequence(GROUP_WISE, i / W, i % W, P) == mine;
            bool *through = &met[subsequence(TOKEN_WISE, i / W, i % W, P)];
            if (!pass) *through |= ours;
            else heard[i] = ours ? 2 : *through, count += *through;
        }
    return count;
}

static void verify_reach(int H, int W, int P) {
    uint8_t *heard = (uint8_t *)xalloc(H * W, 1);
    int least = H * W;
    for (int j = 0; j < H * W; j++) least = (int)fmin(least, heard_of(heard, H, W, P, j / W, j % W));
    const char *what = fmt("frame of %dx%d, P = %d: heard after one block of each kind", H, W, P);
    const char *here = fmt("%d of %d tokens at least", least, H * W);
    if (H > 3) claim(least == H * W, what, "every token", here);
    else claim(least < H * W, what, "", fmt("%s (row 2 does not hear row 1)", here));
}

// The positive values of a format of 8 bits up to `most`, rising.
static int float8_values(double v[128], int m, int b, double most) {
    int n = 0;
    for (int code = 1; code < 128; code++)
        if (float8_value(code, m, b) <= most) v[n++] = float8_value(code, m, b);
    qsort(v, n, sizeof(double), compare_doubles);
    return n;
}

static void verify_hif8(void) {
    double v[128];
    int binades = 1, top = float8_values(v, 0, 0, 0x1p15) - 1;
    for (int i = 1; i <= top; i++) binades += ilogb(v[i]) != ilogb(v[i - 1]);
    claim(binades == 38 && v[0] == 0x1p-22 && v[top] == 0x1p15, "HiF8: binades, smallest, largest",
          "38, 2^-22, 2^15", fmt("%d, 2^%d, 2^%d", binades, ilogb(v[0]), ilogb(v[top])));
}

// ---- what one rank sends in a forward, counted from the exchanges' own maps, and measured -----------------
// The first of R ranks: its layouts and maps, no buffers.
static Run *first_rank(const Config *c, int R, bool ulysses) {
    Ranks *k = (Ranks *)xalloc(1, sizeof(Ranks));
    k->size = R, k->ulysses = ulysses;
    Run *r = run_plan(model_layout(c), k, 1, false);
    memcpy(r->pattern, config_patterns(c, R), sizeof r->pattern);
    return r;
}

static double bytes_sent(Run *r, int have, int want) {
    const Exchange *e = move_of(r, have, want);
    return (double)(e->sent - e->send[r->ranks->rank]) * r->m->c.dim * sizeof(float) / e->shares;
}

// Block i: Ulysses' q, k, v, o inside it, x on its way to the next block's layout after it.
typedef struct { double inside, after; } Sent;
static Sent block_sent(Run *r, int i) {
    int at = r->saved[i].layout, heads = HEADS + r->saved[i].pattern;
    Sent s = {0, bytes_sent(r, at, r->saved[i + 1].layout)};
    if (at == FULL) s.inside = 3 * bytes_sent(r, FULL, heads) + bytes_sent(r, heads, FULL);
    return s;
}

static double forward_sent(Run *r) {
    double sum = 0;
    for (int i = 0; i < r->m->c.num_layers; i++) sum += block_sent(r, i).inside + block_sent(r, i).after;
    return sum;
}

static void verify_ranks(void) {
    for (int i = 0; i < 4; i++) {
        int size = 1 + i / 2, R = i % 2 ? 4 : 2;
        Run *ssp = first_rank(&WAN[size].c, R, false), *ulysses = first_rank(&WAN[size].c, R, true);
        double ratio = block_sent(ssp, 10).after / block_sent(ulysses, 10).inside;
        claim(fabs(ratio - 0.25) < (size == 1 ? 0.02 : 1e-9),
              fmt("%s, %d ranks: sent in a sparse block, SSP / Ulysses", WAN[size].name, R), "-75 %",
              fmt("%.4f (bytes where q, k, v, o have 16 bits: %.2f)", ratio, 2 * ratio));
    }
    double ssp = forward_sent(first_rank(&PRESETS[1], 4, false)) / 1e6;
    double ulysses = forward_sent(first_rank(&PRESETS[1], 4, true)) / 1e6;
    claim(UNJUDGED, "toy, 4 ranks: MB that a rank sends in a whole forward, float32", "",
          fmt("SSP %.2f, Ulysses %.2f: %.0f %% less", ssp, ulysses, 100 * (1 - ssp / ulysses)));
}

// One forward of a toy on these ranks: what was sent, against the count.
static void verify_measured(Ranks *k) {
    static const int GRID[][3] = {{8, 32, 32}, {3, 12, 20}, {2, 14, 10}};
    static const double t = 500;
    for (int i = 0; i < 6; i++) {
        Config c = PRESETS[1];
        c.T = GRID[i / 2][0], c.H_l = GRID[i / 2][1], c.W_l = GRID[i / 2][2], k->ulysses = i % 2;
        Run *r = run_on(k, random_model(&c, false, 1), 1, false);
        memset(k->calls, 0, sizeof k->calls), memset(k->bytes, 0, sizeof k->bytes);
        forward(r, given(latent_size(r)).f, &t);
        size_t sent = k->bytes[EXCHANGE] + k->bytes[CONVERT] + k->bytes[ULYSSES];
        size_t calls = k->calls[EXCHANGE] + k->calls[CONVERT] + k->calls[ULYSSES];
        double count = forward_sent(r);
        float bad = sent != count || calls != (k->ulysses ? 12 * 4 : 4 * 4 + 7 + 2), *any = up(&bad, 1);
        max_over_ranks(k, any);
        claim(*down(any, 1) == 0, fmt("%dx%dx%d, %d ranks, %s, a forward of 12 blocks, 4 full", r->T, r->H,
                                      r->W, k->size, k->ulysses ? "Ulysses" : "SSP"),
              k->ulysses ? "4 calls a block" : "1 call a block",
              fmt("%zu calls, %zu bytes; counted %.0f (all ranks)", calls, sent, count));
    }
    k->ulysses = false;
}

static int verify(Ranks *ranks) {
    if (!tally.silent)
        printf("| %-62s | %-15s | %-58s | ok  |\n|---|---|---|---|\n", "claim", "paper", "here");
    verify_speed(&WAN[1].c, "720p", "1.53x", "1.69x (Ascend)");
    verify_speed(&WAN[2].c, "768p", "1.64x", "2.27x (Ascend)");
    verify_reach(48, 80, 2), verify_reach(45, 80, 2), verify_reach(7, 5, 2), verify_reach(27, 18, 3);
    verify_reach(3, 8, 2);
    verify_hif8();
    verify_ranks();
    if (ranks->size > 1) verify_measured(ranks);
    if (!tally.silent) printf("%d claims do not hold (mpirun adds what ranks send)\n", claims_failed);
    return claims_failed;
}

// ==== bench: random weights; time of each part of a block, of blocks, of the whole model; FLOP/s; speed-up
// The parts of a block, how many calls of each it makes, and what is counted: F FLOPs, B bytes.
enum { NORMS, LINEARS, ROPE, SELF_ATTENTION, CROSS_ATTENTION, FFN_UP, FFN_DOWN, REARRANGE, ROUNDING,
       BACK_LINEARS, BACK_UP, BACK_DOWN, PARTS, WHOLE_BLOCK = PARTS, BLOCK_BACK, WHOLE_FORWARD, WHOLE_STEP };
static const struct { const char *name; int calls; char unit; } PART[PARTS] = {
    {"residual + norm + modulation", 3, 'B'}, {"linear q k v o, q o", 6, 'F'}, {"RMSNorm + RoPE", 3, 'B'},
    {"self-attention", 1, 'F'}, {"cross-attention", 1, 'F'}, {"ffn up + GELU", 1, 'F'}, {"ffn down", 1, 'F'},
    {"residual + rearrangement", 1, 'B'}, {"HiF8 of all that is read", 1, 'B'},
    {"backward: q k v o, q o", 6, 'F'}, {"backward: ffn up", 1, 'F'}, {"backward: ffn down", 1, 'F'}};

// FLOPs of a part of block i, or the bytes it moves at least.
static double part_work(const Run *r, int i, int part) {
    const Config *c = &r->m->c;
    double D = c->dim, F = c->ffn_dim, A = (double)act_size(), n = (double)r->N;
    const double call[] = {n * D * (8 + 2 * A), 2 * n * D * D, n * D * 2 * A,
                           4 * D * attention_pairs(&r->pattern[r->saved[i].pattern]), 4 * n * c->text_len * D,
                           2 * n * D * F, 2 * n * D * F, n * D * (8 + A),
                           n * (8 * D + 11 * A * D + F + 2 * A * F), 4 * n * D * D, 4 * n * D * F,
                           4 * n * D * F};
    return PART[part].calls * call[part];
}

static struct { float *x, *dout; Optimizer opt; } trial;     // what goes through a run

// One call of a part of block i, on the run's own buffers; the block; a forward; a step with AdamW and all.
static void once(Run *r, int i, int part) {
    const Config *c = &r->m->c;
    const Block *w = &r->m->block[i];
    Saved *s = &r->saved[i], *next = s + 1;
    SavedAttention *a = &s->self, *b = &s->cross;
    Rows rows = rows_of(r, s->layout);
    size_t n = count_of(rows);
    int D = c->dim, F = c->ffn_dim, heads = c->num_heads, hd = D / heads;
    const int *map = next->layout == s->layout ? NULL : move_of(r, s->layout, next->layout)->pack;
    const float *rope = r->rope[s->layout], *norm_q = w->self.norm_q->w;
    float *amax = c->quant ? r->m->amax : NULL;
    PerSample gate = of_row(s->e, 5, 6, D);
    Affine norm = modulated(s->e, 3, 6, D);
    const Factor known[] = {s->h1, s->h2, s->h3, a->q, a->k, a->oq, b->q, b->oq};    // their maxima, that is
    double t = 500;
    Batch batch = {NULL, NULL, trial.x, trial.x, trial.dout, NULL, &t};
    if (part == NORMS)
        residual_norm_forward(s->x1, s->h2.x, s->stat2, amax, s->x0, a->y, gate, norm, rows, c->eps);
    if (part == LINEARS) linear(a->q_raw, s->h1, &w->self.q, n);
    if (part == ROPE)
        rmsnorm_rope_forward(a->q.x, a->q_rstd, amax, a->q_raw, norm_q, rope, rows, heads, c->eps);
    if (part == SELF_ATTENTION)
        attention_forward(a->o, a->lse, amax, a->q, a->k, a->v, &r->self[s->pattern], heads, hd);
    if (part == CROSS_ATTENTION)
        attention_forward(b->o, b->lse, amax, b->q, b->k, b->v, &r->cross[s->layout], heads, hd);
    if (part == FFN_UP)
        linear_gelu_forward(s->f.x, s->f_pre, s->h3, w->ffn0.w->compute, w->ffn0.b->compute.x, n, F, D);
    if (part == FFN_DOWN) linear(s->y, s->f, &w->ffn2, n);
    if (part == REARRANGE) residual_gather_forward(next->x0, s->x2, s->y, gate, map, n, rows);
    if (part == ROUNDING && c->quant) {
        for (int j = 0; j < 8; j++) quantize_measured(r, known[j], known[j].x, n, D, 15);
        quantize(r, plain(a->v), a->v, n, D, 15), quantize(r, s->f, s->f.x, n, F, 15);
    }
    if (part == BACK_LINEARS) linear_back(r, r->dout, r->d1, s->h1, &w->self.q, n, false);
    if (part == BACK_UP) linear_back(r, r->d1, r->dff, s->h3, &w->ffn0, n, false);
    if (part == BACK_DOWN) linear_back(r, r->dff, r->d1, s->f, &w->ffn2, n, false);
    if (part == WHOLE_BLOCK) block_forward(r, i);
    if (part == BLOCK_BACK) block_backward(r, i);
    if (part == WHOLE_FORWARD) forward(r, trial.x, &t);
    if (part == WHOLE_STEP) train_step(r, &batch);
    if (part == WHOLE_STEP) optimizer_step(&trial.opt, r->ranks, &SMALL_TRAINING, 1e-5);
}

// Milliseconds of a call: the first quartile of up to 25 after one to warm up, for other programs on the
// machine only ever add time. Where a call is long one is enough, on a GPU two; ranks always make 26.
static double timed(Run *r, int i, int part) {
    double t[26], begin = seconds();
    int n = 0;
    do {
        double before = seconds();
        once(r, i, part), wait_device();
        t[n++] = 1e3 * (seconds() - before);
    } while (n < 26 && (r->ranks->size > 1 || seconds() - begin < 0.6 || n <= (ON_GPU || t[0] < 2e3)));
    if (n == 1) return t[0];
    qsort(t + 1, n - 1, sizeof(double), compare_doubles);
    return t[1 + (n - 1) / 4];
}

// block: a full one, the first sparse one, the next, which is of the other kind.
static void print_parts(Run *r, const int *block, const double *ms) {
    double products[2] = {0, 0};                             // linear layers and HiF8
    printf("%-28s | full block:  ms  share      rate | sparse block:  ms  share      rate\n", "forward");
    for (int part = 0; part < (r->training ? PARTS : BACK_LINEARS); part++) {
        printf("%-28s |", PART[part].name);
        for (int k = 0; k < 2; k++) {
            double t = PART[part].calls * timed(r, block[k], part);
            bool product = PART[part].unit == 'F' && part != SELF_ATTENTION && part != CROSS_ATTENTION;
            if (product || part == ROUNDING) products[k] += t;
            printf("%15.3f %5.1f%% %9.1f %c%s", t, 100 * t / ms[k], part_work(r, block[k], part) / t / 1e6,
                   PART[part].unit, k ? "\n" : " |");
        }
    }
    printf("%-28s |%15.3f   F = GFLOP/s      |%15.3f   B = GB/s   (of the other kind %.3f ms)\n",
           "whole block, forward", ms[0], ms[1], ms[2]);
    printf("%-28s |%15.3f                    |%15.3f\n", "linear layers and HiF8", products[0], products[1]);
}

// passes: a forward's FLOPs count once, a training step's three times.
static void print_speed(const Config *c, const char *what, double full, double hybrid, int passes) {
    double work = passes * model_flops(*c, false, false), less = passes * model_flops(*c, true, false);
    printf("%-14s of %2d layers: full %9.1f ms, hybrid %9.1f ms: %.2fx   (%.0f and %.0f GFLOP/s)\n", what,
           c->num_layers, full, hybrid, full / hybrid, work / full / 1e6, less / hybrid / 1e6);
}

static void bench_model(const char *shape, int layers, int frames, bool train, bool hif8, Ranks *k) {
    Config whole = shape_config(shape), c;
    if (frames) whole.T = frames;
    c = whole, c.quant = c.quant_attn = hif8;
    if (layers < 0) layers = !c.vocab;
    if (layers) c.num_layers = 4 * layers, c.num_full_blocks = 2 * layers;       // in the order F.. g t .. F
    const int F = c.num_full_blocks, L = c.num_layers, block[] = {0, F / 2, F / 2 + 1};
    double all[2][2], ms[2][3] = {{0}};                      // [training][hybrid], [training][block]
    const Ranks fresh = *k;
    Model *m = random_model(&c, train, 1);
    Run *r = run_plan(m, k, 1, train);
    printf("%s: %zu tokens, dim %d, heads %d, ffn %d; %d layers run of %d; by FLOPs %.2fx\n", shape, r->N,
           c.dim, c.num_heads, c.ffn_dim, L, whole.num_layers,
           model_flops(whole, false, false) / model_flops(whole, true, false));
    printf("memory: weights %.2f GiB, activations %.2f GiB\n",
           (double)model_place(model_layout(&c), NULL, train) / 0x1p30, (double)run_place(r, NULL) / 0x1p30);
    if (train) optimizer_init(&trial.opt, m->w, m->dw, m->count);
    trial.x = given(latent_size(r)).f, trial.dout = spoiled(latent_size(r));
    for (int hybrid = 0; hybrid < 2; hybrid++) {
        if (hybrid) device_free(r->sin);                     // where the run's one arena begins
        m->c.num_full_blocks = hybrid ? F : L;
        r = run_on(k, m, 1, train), *k = fresh;
        for (int t = 0; t <= train; t++) all[t][hybrid] = timed(r, 0, WHOLE_FORWARD + t);
    }
    if (k->rank == 0) ranks_report(k);
    for (int i = 0; i < 3; i++) {
        ms[0][i] = timed(r, block[i], WHOLE_BLOCK);
        if (train) ms[1][i] = ms[0][i] + timed(r, block[i], BLOCK_BACK);
    }
    if (k->size == 1) print_parts(r, block, ms[0]);
    for (int t = 0; t <= train; t++) {                       // half of the sparse blocks are of either kind
        double sparse = (ms[t][1] + ms[t][2]) / 2, saved = ms[t][0] - sparse;
        double full = all[t][1] + (L - F) * saved + (whole.num_layers - L) * ms[t][0];
        double hybrid = full - (whole.num_layers - whole.num_full_blocks) * saved;
        print_speed(&c, t ? "training step" : "forward", all[t][0], all[t][1], 1 + 2 * t);
        print_speed(&whole, "from blocks", full, hybrid, 1 + 2 * t);
    }
}

// ---- single ops, in turn, the best of each: ours, OpenBLAS's where it is installed, HiF8's, a copy --------
typedef void (*Sgemm)(int, int, int, int, int, int, float, float *, int, float *, int, float, float *, int);

static void bench_linear(const char *path) {
    static const int SIZE[][3] = {{2048, 512, 128}, {2048, 128, 512}, {8192, 1536, 1536}};
    void *blas = act_size() == sizeof(float) ? dlopen(path, RTLD_NOW) : NULL;
    Sgemm sgemm = blas ? (Sgemm)dlsym(blas, "cblas_sgemm") : NULL;
    printf("linear layers, %d threads, GFLOP/s; HiF8 of x and a copy, GB/s%s\n", threads_here(),
           sgemm ? "" : " (no OpenBLAS: apt-get install -y libopenblas0; or --blas PATH)");
    for (int s = 0; s < 3; s++) {
        int M = SIZE[s][0], N = SIZE[s][1], K = SIZE[s][2], n = M * K;
        Given x = given(n), w = given(N * K);
        float *z = spoiled(M * N), *amax = spoiled(1);
        act *y = spoiled_act(M * N), *q = spoiled_act(n);
        double t[5] = {1, 1, 1, 1, 1}, flop = 2e-9 * M * N * K, bytes = 2e-9 * (double)act_size() * n;
        for (int i = 0; i < (s == 2 ? 25 : 1500); i++) {
            double begin = seconds();
            if (i % 5 == 0) linear_forward(y, plain(x.a), plain(w.a), NULL, M, N, K);
            if (i % 5 == 1 && sgemm) sgemm(101, 111, 112, M, N, K, 1, x.f, K, w.f, K, 0, z, N);
            if (i % 5 == 2) absmax(amax, x.a, n);
            if (i % 5 == 3) hif8_tensor(plain(q), x.a, M, K, 15, amax);
            if (i % 5 == 4) copy(q, x.a, n * act_size());
            wait_device(), t[i % 5] = fmin(t[i % 5], seconds() - begin);
        }
        printf("  M %5d N %5d K %5d: osp %7.1f, OpenBLAS %7.1f; maximum %5.1f, rounded %5.1f, copy %5.1f\n",
               M, N, K, flop / t[0], sgemm ? flop / t[1] : 0, bytes / 2 / t[2], bytes / t[3], bytes / t[4]);
    }
}

static const char *option(int argc, char **argv, const char *name, const char *standard);

// argv[0] is "bench". --layers: of each sparse pattern, twice of full; 0: all; -1: all of tiny, toy; else 1.
static int bench(int argc, char **argv, Ranks *k) {
    const char *what = argc > 1 && *argv[1] != '-' ? argv[1] : "model";
    const char *layers = option(argc, argv, "--layers", "-1"), *frames = option(argc, argv, "--frames", "0");
    bool train = false, hif8 = false;
    one_of("bench", what, "model|linear:");
    for (int i = 1; i < argc; i++) {
        const char *all = "--shape|--layers|--frames|--train|--hif8|--ulysses|--blas|--device-dtype:";
        if (*argv[i] == '-') one_of("bench", argv[i], all);
        train |= !strcmp(argv[i], "--train"), hif8 |= !strcmp(argv[i], "--hif8");
        k->ulysses |= !strcmp(argv[i], "--ulysses");
    }
    if (k->rank && !freopen("/dev/null", "w", stdout)) return 1;
    if (*what == 'l') bench_linear(option(argc, argv, "--blas", "libopenblas.so.0"));
    else bench_model(option(argc, argv, "--shape", "toy"), atoi(layers), atoi(frames), train, hif8, k);
    return 0;
}

// ==== show: the pictures, as SVG ==========================================================================
// One color for each attention pattern in every picture; ranks, curves and number formats take the others.
#define INK "#1F2937"
#define SOFT "#6B7280"
#define RIM "#9CA3AF"
#define FAINT "#E5E7EB"
static const char *const PATTERN_COLOR[] = {"#475569", "#2563EB", "#EA7317"};
static const char *const PATTERN_NAME[] = {"full", "token-wise", "group-wise"};
static const char *const OTHER_COLOR[] = {"#0D9488", "#9333EA", "#DC2626", "#CA8A04",
                                          "#0891B2", "#4D7C0F", "#DB2777", "#78716C"};

static FILE *svg;                                        // the picture being drawn, and what was asked for
static struct { const char *kind, *preset; char **file; int files, R; } asked;

static void line(double x0, double y0, double x1, double y1, const char *color, double width) {
    const char *format = "<path d='M%.1f %.1fL%.1f %.1f' stroke='%s' stroke-width='%.1f'/>\n";
    fprintf(svg, format, x0, y0, x1, y1, color, width);
}
static void dot(double x, double y, double r, const char *color) {
    fprintf(svg, "<circle cx='%.1f' cy='%.1f' r='%.1f' fill='%s'/>\n", x, y, r, color);
}

// Text that begins (anchor 's'), is centred ('m') or ends ('e') at x, its baseline at y; titles are bold.
static void label(double x, double y, int size, char anchor, const char *color, const char *text) {
    const char *where = anchor == 's' ? "start" : anchor == 'm' ? "middle" : "end";
    fprintf(svg, "<text x='%.1f' y='%.1f' font-size='%d' text-anchor='%s' fill='%s' font-weight='%s'>"
            "%s</text>\n", x, y, size, where, color, size >= 15 ? "bold" : "normal", text);
}

// A box, a little smaller than what it is given, with text in its middle; of opacity 0: its outline.
static void box(double x, double y, double w, double h, const char *fill, double opacity, const char *text) {
    const char *outline = opacity ? "" : fmt(" stroke='%s' stroke-width='2'", fill);
    fprintf(svg, "<rect x='%.1f' y='%.1f' width='%.1f' height='%.1f' rx='%.1f' fill='%s' fill-opacity='%.2f'"
            "%s/>\n", x + 1, y + 1, w - 2, h - 2, fmin(4, 0.12 * fmin(w, h)), fill, opacity, outline);
    if (*text) label(x + w / 2, y + h / 2 + 5, 13, 'm', opacity > 0.5 ? "#FFFFFF" : SOFT, text);
}

static void picture(int width, int height, const char *title, const char *subtitle) {
    fprintf(svg, "<svg xmlns='http://www.w3.org/2000/svg' width='%d' height='%d' viewBox='0 0 %d %d' "
            "font-family='sans-serif'>\n<rect width='100%%' height='100%%' fill='#FFFFFF'/>\n", width, height,
            width, height);
    label(40, 46, 20, 's', INK, title);
    label(40, 74, 13, 's', SOFT, subtitle);
}

// ---- plots -----------------------------------------------------------------------------------------------
typedef struct { double x, y, w, h, x0, x1, y0, y1; } Plot;      // where it stands, and what it spans
static double at_x(const Plot *a, double v) { return a->x + (v - a->x0) / (a->x1 - a->x0) * a->w; }
static double at_y(const Plot *a, double v) { return a->y + (v - a->y1) / (a->y0 - a->y1) * a->h; }

// The frame and its grid: lines at multiples of 1, 2 or 5 times a power of ten, with their numbers.
static void axes(const Plot *a, const char *title, const char *x_format, const char *y_format) {
    for (int up = 0; up < 2; up++) {
        double low = up ? a->y0 : fmin(a->x0, a->x1), high = up ? a->y1 : fmax(a->x0, a->x1);
        double raw = (high - low) / (up ? 5 : 8), power = pow(10, floor(log10(raw)));
        double step = power * (raw <= 2 * power ? 2 : raw <= 5 * power ? 5 : 10);
        for (double n = ceil(low / step - 1e-9); n <= high / step + 1e-9; n++) {
            double x = up ? a->x : at_x(a, n * step), y = up ? at_y(a, n * step) : a->y + a->h;
            line(x, y, up ? x + a->w : x, up ? y : a->y, FAINT, 1);
            label(up ? x - 8 : x, up ? y + 4 : y + 18, 12, up ? 'e' : 'm', SOFT,
                  fmt(up ? y_format : x_format, n * step + 0.0));
        }
    }
    box(a->x, a->y, a->w, a->h, RIM, 0, "");
    label(a->x, a->y - 14, 15, 's', INK, title);
}

static void curve(const Plot *a, const double *x, const double *y, int n, const char *color, double width) {
    fprintf(svg, "<path fill='none' stroke='%s' stroke-width='%.1f' d='", color, width);
    for (int i = 0; i < n; i++) fprintf(svg, "%c%.1f %.1f", i ? 'L' : 'M', at_x(a, x[i]), at_y(a, y[i]));
    fputs("'/>\n", svg);
}

// ---- loss, reward: logs of osp train and osp grpo --------------------------------------------------------
typedef struct { double y, h; const char *title, *head, *key; int numbers; } Panel;
static const Panel PANEL[] = {
    {120, 390, "loss: mean (v − (noise − data))²", "step ", " loss ", 1},
    {120, 320, "reward of an update's videos, and the held-out score (dots)", "update ", " reward ", 1},
    {520, 150, "KL to the model without its adapter", "update ", " kl ", 1},
    {750, 150, "ratio: least, mean and largest of an update", "update ", " ratio ", 3}};

// The numbers after a key in each log, thin, and a running mean of the middle one. Of a loss its logarithm.
static Plot show_panel(const Panel *p) {
    Plot a = {80, p->y, 880, p->h, 0, 1, INFINITY, -INFINITY};
    Series all[24];                                      // of at most 8 logs
    int numbers = p->numbers, count = asked.files * numbers;
    for (int i = 0; i < count; i++) {
        const char *path = asked.file[i / numbers];
        Series s = all[i] = read_series(path, p->head, p->key, i % numbers);
        if (!s.n) die("%s: no line \"%s10/600 ..%s..\"; give osp's output", path, p->head, p->key);
        for (int j = 0; j < s.n; j++) {
            if (p == PANEL) s.y[j] = log2(s.y[j]);
            a.x1 = fmax(a.x1, s.x[j]), a.y0 = fmin(a.y0, s.y[j]), a.y1 = fmax(a.y1, s.y[j]);
        }
    }
    double room = 0.06 * (a.y1 - a.y0) + 1e-6;
    a.y0 -= room, a.y1 += room;
    axes(&a, p->title, "%g", p == PANEL ? "2^%g" : "%g");
    for (int i = 0; i < count; i++) {
        Series s = all[i];
        int w = s.n / 40 + 1, middle = i % numbers == numbers / 2 ? s.n - w : 0;
        double *mean = doubles(s.n);
        for (int j = w; j < middle; j++)
            for (int k = -w; k <= w; k++) mean[j] += s.y[j + k] / (2 * w + 1);
        curve(&a, s.x, s.y, s.n, OTHER_COLOR[i / numbers], 0.4);
        curve(&a, s.x + w, mean + w, middle - w, OTHER_COLOR[i / numbers], 2.5);
    }
    return a;
}

static void show_logs(void) {
    bool reward = *asked.kind == 'r';
    picture(1000, reward ? 960 : 560, reward ? "Mix-GRPO, by update" : "Flow matching, by training step",
            "thin: the log's numbers; thick: their running mean");
    for (int i = 2; i < 4 && reward; i++) show_panel(&PANEL[i]);
    Plot a = show_panel(&PANEL[reward]);
    for (int i = 0; i < asked.files; i++) {
        const char *path = asked.file[i];
        Series held = read_series(path, "held out after ", ": ", 0);
        label(1090 - 130 * (asked.files - i), 74, 13, 'e', OTHER_COLOR[i], basename(fmt("%s", path)));
        for (int j = 0; j < held.n; j++) {
            held.y[j] /= 100;
            dot(at_x(&a, held.x[j]), at_y(&a, held.y[j]), 5, OTHER_COLOR[i]);
        }
        curve(&a, held.x, held.y, held.n, OTHER_COLOR[i], 1.5);
    }
}

// ---- skiparse: who attends with whom ---------------------------------------------------------------------
// A frame's tokens, numbered by subsequence; strong: that of the traced (h0, w0). Below: all, as in memory.
static void skiparse_panel(double x, double y, double size, int kind, int H, int W, int h0, int w0) {
    int mine = subsequence(kind, h0, w0, 2);
    const Pattern *p = &patterns_of(1, H, W, 2, 1)[kind];
    double unit = size / H;
    for (int i = 0; i < H * W; i++) {
        int s = subsequence(kind, i / W, i % W, 2);
        box(x + i % W * size, y + i / W * size, size, size, PATTERN_COLOR[kind], s == mine ? 0.95 : 0.14,
            fmt("%d", s));
    }
    box(x + w0 * size, y + h0 * size, size, size, INK, 0, "");
    for (int s = 0; s < p->count; s++) {
        int n = p->start[s + 1] - p->start[s];
        box(x + unit * p->start[s], y + H * size + 14, unit * n, 26, PATTERN_COLOR[kind],
            s == mine ? 0.95 : 0.14, fmt("%d", n));
    }
}

static void show_skiparse(void) {
    enum { H = 8, W = 8, h0 = 5, w0 = 2 };
    static const char *const RULE[] = {"", "subsequence (h mod 2)·2 + w mod 2",
                                       "subsequence (⌊h/2⌋ mod 2)·2 + ⌊w/2⌋ mod 2"};
    uint8_t heard[H * W];
    heard_of(heard, H, W, 2, h0, w0);
    picture(1060, 730, "Skiparse-2D: which tokens attend together (P = 2)",
            "Numbers: a token's subsequence; strong: the framed token's. Bars: the rearranged sequence.");
    for (int k = TOKEN_WISE; k <= GROUP_WISE; k++) {
        label(340 * k - 300, 112, 15, 's', PATTERN_COLOR[k], PATTERN_NAME[k]);
        label(340 * k - 300, 132, 13, 's', PATTERN_COLOR[k], RULE[k]);
        skiparse_panel(340 * k - 300, 146, 34, k, H, W, h0, w0);
        skiparse_panel(340 * k - 300, 520, 27, k, 5, 6, 3, 2);
    }
    label(40, 502, 15, 's', INK, "A ragged grid, 5 x 6: lengths differ, no token is padded");
    label(720, 112, 15, 's', INK, "heard after both: every token");
    label(720, 132, 13, 's', PATTERN_COLOR[GROUP_WISE], "directly, in the group-wise block");
    label(720, 440, 13, 's', PATTERN_COLOR[TOKEN_WISE], "through these, in the token-wise block before");
    for (int i = 0; i < H * W; i++)
        box(720 + i % W * 34, 146 + i / W * 34, 34, 34, PATTERN_COLOR[heard[i]], 0.475 * heard[i], "");
    box(720 + w0 * 34, 146 + h0 * 34, 34, 34, INK, 0, "");
}

// ---- hif8: the format beside others ----------------------------------------------------------------------
static void show_hif8(void) {
    static const struct { const char *name; int mantissa, bias; double most; } FORMAT[] = {
        {"HiF8", 0, 0, 0x1p15}, {"FP8 E4M3", 3, 7, 448}, {"FP8 E5M2", 2, 15, 57344}};
    Plot a = {100, 110, 860, 300, -24, 16, -1, 8};
    picture(1000, 630, "HiF8: precision near 1, range far away", "");
    axes(&a, "Bits of mantissa: −log2(step to the next value / power of two below)", "2^%g", "%g");
    line(a.x, at_y(&a, 7), a.x + a.w, at_y(&a, 7), OTHER_COLOR[3], 2);
    label(a.x + 16, at_y(&a, 7) - 8, 13, 's', OTHER_COLOR[3], "bfloat16, from 2^-133 to 2^128");
    label(a.x, 466, 15, 's', INK, "The positive values themselves");
    for (int f = 2; f >= 0; f--) {
        double v[128] = {0}, x[256], y[256], top = 482 + 42 * f;       // the last value has no next one
        int n = float8_values(v, FORMAT[f].mantissa, FORMAT[f].bias, FORMAT[f].most);
        for (int i = 0; i < n; i++) {
            x[2 * i] = log2(v[i]), x[2 * i + 1] = log2(v[i + 1]);
            y[2 * i] = y[2 * i + 1] = ilogb(v[i]) - log2(v[i + 1] - v[i]);
            line(at_x(&a, x[2 * i]), top, at_x(&a, x[2 * i]), top + 22, OTHER_COLOR[f], 1.2);
        }
        curve(&a, x, y, 2 * (n - 1), OTHER_COLOR[f], f ? 2 : 4);
        label(a.x - 8, top + 16, 12, 'e', OTHER_COLOR[f], FORMAT[f].name);
    }
}

// ---- ranks: who holds which tokens, and what a forward moves ---------------------------------------------
static void rank_panels(const Config *c, const Pattern *p, int R) {
    int H = c->H_l / 2, W = c->W_l / 2, P = c->sparse_ratio;
    double size = 280.0 / W, unit = 280.0 / (c->T * H * W);
    for (int k = 0; k < PATTERNS; k++) {
        label(40 + 320 * k, 112, 15, 's', PATTERN_COLOR[k], PATTERN_NAME[k]);
        label(40 + 320 * k, 132, 12, 's', SOFT, k ? "one frame" : "all frames: a cut of the sequence");
        for (int i = 0; i < H * W && k; i++)
            box(40 + 320 * k + i % W * size, 144 + i / W * size, size, size,
                OTHER_COLOR[subsequence(k, i / W, i % W, P) * R / (P * P)], 0.85, "");
    }
    for (int r = 0; r < R; r++) {
        int first = p[FULL].first[r], end = p[FULL].first[r + 1];
        box(40, 144 + unit * first, 280, unit * (end - first), OTHER_COLOR[r], 0.85,
            fmt("rank %d: %d to %d", r, first, end - 1));
    }
}

// A forward's bytes, block by block, above y: q, k, v, o in it (Ulysses), x after it (SSP, conversions).
static void forward_bars(const Config *c, Run *r, double y) {
    int L = c->num_layers;
    double step = 760.0 / L, unit = 90 / block_sent(r, 0).inside;
    for (int i = 0; i < L; i++) {
        int k = block_pattern(i, L, c->num_full_blocks);
        Sent s = block_sent(r, i);
        double x = 40 + i * step, part = s.inside / 4 * unit, after = s.after * unit;
        for (int j = 0; j < 4 && s.inside; j++)
            box(x, y - part * (j + 1), step * 0.5, part, PATTERN_COLOR[k], 0.9, "");
        if (s.after) box(x + step * 0.6, y - after, step * 0.3, after, RIM, 1, "");
        label(x + step * 0.25, y + 18, 12, 'm', PATTERN_COLOR[k], fmt("%c", PATTERN_LETTER[k]));
    }
}

static void show_ranks(void) {
    Config c = shape_config(asked.preset);
    int R = asked.R, P2 = c.sparse_ratio * c.sparse_ratio;
    if (R < 1 || P2 % R || c.num_heads % R)
        die("-R %d: must divide P^2 = %d and the %d heads", R, P2, c.num_heads);
    Pattern *p = config_patterns(&c, R);
    double sent[2];
    picture(1000, 740, fmt("Sparse sequence parallelism: %s on %d ranks", asked.preset, R),
            fmt("%d x %d x %d tokens, dim %d", c.T, c.H_l / 2, c.W_l / 2, c.dim));
    rank_panels(&c, p, R);
    label(40, 464, 15, 's', INK, "Bytes that rank 0 sends in one forward, float32, block by block");
    label(960, 464, 12, 'e', SOFT, "stacks: q, k, v, o inside a block; gray: x between two layouts");
    for (int u = 0; u < 2; u++) {
        Run *r = first_rank(&c, R, u);
        sent[u] = forward_sent(r);
        forward_bars(&c, r, 580 + 126 * u);
        label(830, 520 + 126 * u, 15, 's', INK,
              fmt(u ? "Ulysses: %.2f MB" : "SSP: %.2f MB", sent[u] / 1e6));
    }
    label(830, 542, 13, 's', INK, fmt("%.0f %% less", 100 * (1 - sent[0] / sent[1])));
}

// ---- grpo: one noise, a window of SDE steps, a group that fans out, and what its rewards push -------------
static void show_grpo(void) {
    enum { G = 5, S = 8, WINDOW = 2, LEFT = 70, STEP = 70, MIDDLE = 280 };
    static const double END[G] = {-125, -60, 5, 70, 125}, REWARD[G] = {0.35, 0.62, 0.88, 0.71, 0.44};
    double advantage[G];
    picture(1000, 470, "Mix-GRPO: a group of videos of one caption, from one noise",
            "a sketch: chance spreads the group; a reward above the mean makes that chance likelier");
    advantages(advantage, REWARD, G);
    box(LEFT, 107, STEP * WINDOW, 28, PATTERN_COLOR[2], 0.9, "window: SDE");
    box(LEFT + STEP * WINDOW, 107, STEP * (S - WINDOW), 28, PATTERN_COLOR[0], 0.9, "ODE: no gradient");
    for (int v = 0; v < G; v++) {
        double from = MIDDLE, to;
        for (int i = 1; i <= S; i++, from = to) {        // chance spreads them, then each goes its way
            const char *color = PATTERN_COLOR[i <= WINDOW ? 2 : 0];
            double part = i <= WINDOW ? 0.55 * i / WINDOW : 0.55 + 0.45 * (i - WINDOW) / (S - WINDOW);
            to = MIDDLE + END[v] * part + (i == 1 ? 14 * sin(3.0 * v + 1) : 0);
            line(LEFT + STEP * (i - 1), from, LEFT + STEP * i, to, color, i <= WINDOW ? 2.5 : 1.5);
            dot(LEFT + STEP * i, to, i <= WINDOW ? 4 : 2.5, color);
        }
        const char *color = OTHER_COLOR[advantage[v] > 0 ? 0 : 2];
        box(650, from - 12, 150 * REWARD[v], 24, SOFT, 0.6, fmt("%.2f", REWARD[v]));
        label(880, from + 5, 15, 'e', color, fmt("%+.2f", advantage[v]));
        label(892, from + 5, 13, 's', color, advantage[v] > 0 ? "likelier" : "less likely");
    }
    dot(LEFT, MIDDLE, 7, INK);
    label(LEFT - 8, MIDDLE - 20, 13, 'e', INK, "noise");
    label(650, 104, 15, 's', INK, "reward");
    label(880, 104, 15, 'e', INK, "advantage");
    label(960, 450, 12, 'e', SOFT, "advantage = (reward − mean) / std");
}

// ---- cost: where a block's time goes, from two logs of bench, bf16 and HiF8 ------------------------------
static void show_cost(void) {
    picture(1060, 420, "Where a block's time goes", "14B at 768P on one H100: 80,640 tokens, milliseconds");
    for (int bar = 0; bar < 4; bar++) {
        bool sparse = bar / 2, eight = bar % 2;
        double x = 160, y = 110 + 46 * bar + 14 * sparse;
        label(150, y + 22, 13, 'e', PATTERN_COLOR[sparse],
              fmt("%s, %s", sparse ? "sparse" : "full", eight ? "HiF8" : "bf16"));
        for (int part = 0; part < BACK_LINEARS; part++) {
            const char *name = PART[part].name, *key = sparse ? fmt("%c |", PART[part].unit) : "|";
            Series s = read_series(asked.file[eight], name, key, 0);
            if (!s.n) die("%s: no line \"%s ..\"; give bench's output", asked.file[eight], name);
            double w = 3.2 * *s.y;
            box(x, y, w, 34, OTHER_COLOR[part % 8], part < 8 ? 0.85 : 0.4, w > 40 ? fmt("%.1f", *s.y) : "");
            x += w;
        }
        label(x + 8, y + 22, 14, 's', INK, fmt("%.1f", (x - 160) / 3.2));
    }
    for (int part = 0; part < BACK_LINEARS; part++) {
        double x = 160 + part % 3 * 290, y = 330 + part / 3 * 26;
        box(x, y, 18, 18, OTHER_COLOR[part % 8], part < 8 ? 0.85 : 0.4, "");
        label(x + 24, y + 13, 13, 's', INK, PART[part].name);
    }
}

// ---- flow: one number, two data points; what sampling does with the best velocity there is --------------
static void show_flow(void) {
    enum { S = 8, PATHS = 8 };
    static const double SHIFT[] = {1, 3, 7}, STEP[] = {0, 1, 2, 3, 4, 5, 6, 7, 8};
    Plot a = {100, 130, 520, 360, 1, 0, -2.4, 2.4}, b = {720, 130, 260, 360, 0, S, 0, 1};
    double sigma[S + 1], x[S + 1];
    picture(1040, 570, "Flow matching: straight lines in training, a few steps in sampling",
            "gray: lines of training, from noise ε (σ = 1) to data x0 = ±1 (σ = 0); color: 8 Euler steps");
    axes(&a, "x along σ", "%g", "%g"), axes(&b, "the schedule: σ after each step", "%g", "%g");
    for (int i = 0; i < 40; i++)
        line(a.x, at_y(&a, rng_normal(5, 1, i)), a.x + a.w, at_y(&a, i % 2 ? 1 : -1), FAINT, 1);
    schedule(sigma, S, 3);
    for (int p = 0; p < PATHS; p++) {
        const char *color = OTHER_COLOR[p < PATHS / 2];
        x[0] = -2 + 4.0 * p / (PATHS - 1);
        for (int i = 0; i < S; i++) {
            double v = (x[i] - tanh((1 - sigma[i]) * x[i] / (sigma[i] * sigma[i]))) / sigma[i];
            x[i + 1] = x[i] + (sigma[i + 1] - sigma[i]) * v;
            dot(at_x(&a, sigma[i + 1]), at_y(&a, x[i + 1]), 3, color);
        }
        curve(&a, sigma, x, S + 1, color, 2);
    }
    for (int k = 0; k < 3; k++) {
        schedule(sigma, S, SHIFT[k]);
        curve(&b, STEP, sigma, S + 1, OTHER_COLOR[2 + k], 2);
        label(740, 430 + 20 * k, 13, 's', OTHER_COLOR[2 + k], fmt("shift %g", SHIFT[k]));
    }
    label(100, 540, 13, 's', SOFT, "x += (σ_next − σ)·v; a larger shift spends more of the steps at large σ");
}

// ---- gradients: what HiF8 and E4M3 make of a trained model's, at one step -------------------------------
// share: of the values in each binade below a tensor's maximum. What HiF8 [0] and E4M3 [1] lose; then the
// same where an outlier, 1,000 times the maximum, sets the scale.
enum { BINADES = 35, KINDS = 4 };
static struct { double share[BINADES], zeros[4], off[4], squares, n; } dy_kind[KINDS];

static float e4m3_round(float x) {                           // nearest, |x| <= 448
    double step = ldexp(1, (fabsf(x) < 0x1p-6f ? -6 : ilogbf(x)) - 3);
    return (float)(rint(x / step) * step);
}

static void count_kind(int d, const act *device, size_t n) {
    float *g = down_act(device, n), most = 0;
    for (size_t i = 0; i < n; i++) most = fmaxf(most, fabsf(g[i]));
    for (size_t i = 0; i < n; i++) {
        dy_kind[d].share[(int)fmin(-floor(log2(fabsf(g[i]) / most)), BINADES - 1)]++;
        dy_kind[d].squares += (double)g[i] * g[i], dy_kind[d].n++;
        for (int j = 0; j < 4; j++) {
            double k = (j % 2 ? 448 : 224) / most / (j < 2 ? 1 : 1000);
            double q = (j % 2 ? e4m3_round : hif8_round)((float)(g[i] * k)) / k;
            dy_kind[d].zeros[j] += q == 0 && g[i] != 0, dy_kind[d].off[j] += (q - g[i]) * (q - g[i]);
        }
    }
}

// The gradients of the outputs of ffn.0, q, k, v in each block, of 4 clips.
static void gather_kinds(const char *path) {
    File f;
    TrainOptions o = SMALL_TRAINING;
    file_open(&f, path);
    Config c = config_read(&f);
    c.quant = c.quant_attn = 0, o.drop = 0, o.seed = 3;
    Model *m = model_layout(&c);
    model_allocate(m, true), weights_read(m, m->param, m->params, &f);
    Run *r = run_of(m, 4, true);
    Batch a = batch_new(r);
    batch_fill(&a, r, &o, 0), train_step(r, &a), head_backward(r, a.dout);
    for (int i = c.num_layers - 1; i >= 0; i--) {
        size_t n = count_of(rows_of(r, r->saved[i].layout));
        block_backward(r, i);
        const act *const dy[] = {r->dff, r->dq, r->dk, r->dv};
        for (int j = 0; j < KINDS; j++) count_kind(j, dy[j], n * (j ? c.dim : c.ffn_dim));
    }
}

static void show_gradients(void) {
    static const char *const NAME[] = {"ffn.0", "q", "k", "v"};
    static const char *const WAY[] = {"HiF8", "E4M3", "HiF8, outlier", "E4M3, outlier"};
    Plot a = {100, 120, 860, 330, 1 - BINADES, 0, 0, 20};
    picture(1000, 560, "A trained model's gradients, and what 8 bits hold of them",
            fmt("%s: dy of products, all blocks, 4 clips; a tensor's largest value is 2^0", asked.file[0]));
    axes(&a, "Share of the values in each binade", "2^%g", "%g %%");
    for (int f = 0; f < 2; f++) {                            // from the smallest value to the scale
        double left = at_x(&a, f ? log2(0x1p-9 / 448) : log2(0x1p-22 / 224));
        box(left, 486 + 30 * f, a.x + a.w - left, 26, OTHER_COLOR[f], 0.7, f ? "E4M3 holds" : "HiF8 holds");
    }
    gather_kinds(asked.file[0]);
    for (int i = 0; i < 4 * KINDS; i++) {
        int d = i / 4, w = i % 4;
        printf("%-5s %-13s: %7.4f %% become zero, error %.4f\n", NAME[d], WAY[w],
               100 * dy_kind[d].zeros[w] / dy_kind[d].n, sqrt(dy_kind[d].off[w] / dy_kind[d].squares));
    }
    for (int j = 0; j < KINDS; j++) {
        double x[BINADES], y[BINADES];
        for (int i = 1; i < BINADES; i++) x[i] = 0.5 - i, y[i] = 100 * dy_kind[j].share[i] / dy_kind[j].n;
        curve(&a, x + 1, y + 1, BINADES - 2, OTHER_COLOR[2 + j], 2.5);
        label(120, 150 + 22 * j, 14, 's', OTHER_COLOR[2 + j], fmt("dy of %s", NAME[j]));
    }
}

static const char *option(int argc, char **argv, const char *name, const char *standard) {
    for (int i = 1; i + 1 < argc; i++) if (!strcmp(argv[i], name)) return argv[i + 1];
    return standard;
}

static int show(int argc, char **argv) {
    static const struct { const char *name; void (*draw)(void); int least, most; } PICTURE[] = {     // files
        {"skiparse", show_skiparse, 0, 0}, {"hif8", show_hif8, 0, 0}, {"flow", show_flow, 0, 0},
        {"ranks", show_ranks, 0, 0}, {"grpo", show_grpo, 0, 0}, {"gradients", show_gradients, 1, 1},
        {"cost", show_cost, 2, 2}, {"loss", show_logs, 1, 8}, {"reward", show_logs, 1, 8}};
    const char *out = option(argc, argv, "-o", "picture.svg");
    int i = 0;
    asked.kind = argc ? argv[0] : "what?", asked.file = argv + 1;
    asked.preset = option(argc, argv, "--preset", "toy"), asked.R = atoi(option(argc, argv, "-R", "4"));
    while (asked.files + 1 < argc && *asked.file[asked.files] != '-') asked.files++;
    while (i < 9 && strcmp(PICTURE[i].name, asked.kind)) i++;
    if (i == 9 || asked.files < PICTURE[i].least || asked.files > PICTURE[i].most)
        die("show %s: want skiparse, hif8, flow, grpo, ranks [-R 4] [--preset toy]; gradients FILE; "
            "cost BF16_LOG HIF8_LOG; loss, reward LOG ..; each with -o FILE.svg", asked.kind);
    if (!(svg = fopen(out, "w"))) die("%s: %s", out, strerror(errno));
    PICTURE[i].draw();
    if (fputs("</svg>\n", svg) < 0 || fclose(svg)) die("%s: %s", out, strerror(errno));
    printf("wrote %s\n", out);
    return 0;
}

// ==== Whole files in memory ===============================================================================
static void put_file(const char *path, const void *data, size_t size) {
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, size, f) != size || fclose(f))
        die("%s: %s; the tests need a folder to write to", path, strerror(errno));
}

typedef struct { char *data; size_t size; } Raw;
static Raw get_file(const char *path) {
    struct stat s;
    FILE *f = fopen(path, "rb");
    if (!f || fstat(fileno(f), &s)) die("%s: %s; run in the folder of osp.c", path, strerror(errno));
    Raw r = {(char *)xalloc(s.st_size + 1, 1), (size_t)s.st_size};
    if (fread(r.data, 1, r.size, f) != r.size) die("%s: cannot be read", path);
    fclose(f);
    return r;
}

// A copy with " for each ': a header's text is easier to read without backslashes.
static char *quoted(const char *text) {
    char *copy = fmt("%s", text);
    for (char *c = copy; *c; c++) if (*c == '\'') *c = '"';
    return copy;
}

// A copy in which `fresh` bytes stand for the `old` ones at `at`; the rest follows.
static Raw spliced(Raw r, size_t at, size_t old, const char *piece, size_t fresh) {
    Raw out = {(char *)xalloc(r.size - old + fresh + 1, 1), r.size - old + fresh};
    memcpy(out.data, r.data, at), memcpy(out.data + at, piece, fresh);
    memcpy(out.data + at + fresh, r.data + at + old, r.size - at - old);
    return out;
}

// A copy in which the first `from` became `to`; data NULL where there is none, or (once) more than one.
static Raw edited(Raw r, const char *from, const char *to, bool once) {
    size_t n = strlen(from);
    const char *at = (const char *)memmem(r.data, r.size, from, n);
    Raw none = {NULL, 0};
    if (!at || (once && memmem(at + 1, r.data + r.size - at - 1, from, n))) return none;
    return spliced(r, at - r.data, n, to, strlen(to));
}

// ---- a random breaker of safetensors files ---------------------------------------------------------------
static size_t below(size_t n) { return n ? random() % n : 0; }

// How far a number, a word or a string with its quotes reaches.
static size_t token(const char *t) {
    if (*t == '"') return strcspn(t + 1, "\"") + 2;
    size_t n = strspn(t, "0123456789abcdefghijklmnopqrstuvwxyzF.-");
    return n ? n : 1;
}

// One to four times: a bit or byte changed, the header's length, or a piece of the header left out or put
// elsewhere, mostly in another's place; or the file cut.
static Raw mutated(Raw r, unsigned seed) {
    srandom(seed);
    for (size_t times = 1 + below(4); times; times--) {
        uint64_t header;
        memcpy(&header, r.data, 8);
        char *text = r.data + 8;
        size_t length = header < r.size - 8 ? header : r.size - 8, kind = below(8);
        size_t from = below(length), to = below(length), n = 0, old = 0;
        if (kind == 0) r.data[below(r.size)] = (char)below(256);
        if (kind == 1) text[from] ^= (char)(1 << below(8));
        if (kind == 2) header = below(2) ? length + 8 - below(16) : (uint64_t)random() << below(34);
        if (kind == 3) old = below(20);
        if (kind >= 4) n = token(text + from);
        if (kind >= 6) old = token(text + to);
        if (to + old > length || from + n > length) continue;
        Raw next = spliced(r, 8 + to, old, text + from, n);
        header += n - old;
        memcpy(next.data, &header, 8), free(r.data), r = next;
    }
    if (below(16) == 0) r.size = below(r.size);
    return r;
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
    {"attention: its matrix does not read o", "self->oq.x = self->o,", "self->oq.x = self->y,"},
    {"RoPE: h and w exchanged", "token / W % H, token % W}", "token % W, token / W % H}"},
    {"RoPE: not turned back in backward", "head_dim, -1.0f, heads", "head_dim, 1.0f, heads"},
    {"modulation: shift is scale", "of_row(e, row, rows, D)", "of_row(e, row + 1, rows, D)"},
    {"attention backward: without the mean", "p[i + j] * (ds[i + j] - delta[j])", "p[i + j] * ds[i + j]"},
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
    {"LoRA: merged without alpha/rank", "lincomb(l->d, l->scale", "lincomb(l->d, 1"},
    {"files: the step lost on resuming", "o->step = (int)", "o->step = 0 * (int)"},
    {"files: a HiF8 weight is off by its scale", "(uint8_t)code) / k", "(uint8_t)code) * k"}};

// All mutants (or those named `only`), two at a time: each must fail, and an unchanged copy must pass.
static int mutate(const char *golden_folder, const char *only) {
    char *golden_path = realpath(golden_folder, NULL);
    Raw source = get_file("osp.c");
    int wrong = 0, ran = 0, ignored;
    if (!golden_path) die("%s: %s", golden_folder, strerror(errno));
    const char *scratch = scratch_folder("mutate");
    #pragma omp parallel for schedule(dynamic) num_threads(2) reduction(+ : wrong, ran)
    for (int i = -1; i < (int)(sizeof MUTANTS / sizeof MUTANTS[0]); i++) {
        const char *name = i < 0 ? "osp.c as it is" : MUTANTS[i].name, *folder = fmt("%s/%d", scratch, i);
        char *said = fmt("not there once\n");
        int code = 99;
        if (only && i >= 0 && !strstr(name, only)) continue;
        Raw copy = i < 0 ? source : edited(source, MUTANTS[i].find, MUTANTS[i].replace, true);
        if (copy.data) {
            mkdir(folder, 0777), put_file(fmt("%s/osp.c", folder), copy.data, copy.size);
            said = shell(&code, fmt(
                "cp test_osp.c %s; cd %s; ${CC:-cc} -std=gnu11 -O1 -w -o t test_osp.c -lm -ldl 2>&1 || "
                "exit 99; ulimit -t 300; export TMPDIR=. STOP_AT_FIRST=1 OMP_NUM_THREADS=1; "
                "./t --golden '%s' >log 2>&1; c=$?; tail -1 log; exit $c", folder, folder, golden_path));
        }
        bool ok = i < 0 ? code == 0 : code && code != 99;
        printf("%-56s %s, exit %d: %.*s\n", name, ok ? "ok" : "WRONG", code, (int)strcspn(said, "\n"), said);
        fflush(stdout);
        ran += i >= 0, wrong += !ok;
    }
    shell(&ignored, fmt("rm -r %s", scratch));
    printf("%d mutants, %d not caught\n", ran, wrong);
    return wrong;
}

// ==== bad input: each case must end in one line and exit code 2, in time, and touch nothing ================
static struct { int cases, failed; } bad;

// One line "osp: ..", the last; before it only what says how much memory a run will take.
static bool one_line(const char *said) {
    while (!strncmp(said, "memory: ", 8) && strchr(said, '\n')) said = strchr(said, '\n') + 1;
    const char *end = strchr(said, '\n');
    return !strncmp(said, "osp: ", 5) && end && !end[1] && end - said > 12;
}

// A shell command that runs $OSP. What a killed run left is compared too.
static void try_case(const char *name, const char *command) {
    static const char *const LOOK = "ls -lAin --full-time";
    int code, ignored;
    char *files = shell(&code, LOOK), *said = shell(&code, fmt("%s 2>&1 >/dev/null </dev/null", command));
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
    try_case(name, memmem(data, size, "lora_", 5) ? "$OSP sample -w base.st" SHORT " --lora hostile"
                                                  : "$OSP sample -w hostile" SHORT);
    unlink("hostile");
}

// The first number of a tensor, or four codes, replaced.
static void try_value(const char *file, const char *tensor, uint32_t bits) {
    Raw raw = get_file(file);
    file_open(&gold, file);
    memcpy(raw.data + (entry(tensor)->data - gold.map), &bits, 4);
    file_close(&gold);
    try_file(fmt("bits %08x in %s", bits, tensor), raw.data, raw.size);
}

// A file, a form, what stands so in its header, and what replaces it, while the rest stays whole.
static const char *const EDITS[][14] = {
    {"base.st", "'dim':'%s'", "64", "0", "-64", "99999999999", "wide", "32"},
    {"base.st", "'num_heads':'%s'", "4", "3"}, {"base.st", "'num_layers':'%s'", "8", "9", "1000"},
    {"base.st", "'num_full_blocks':'%s'", "4", "6"}, {"base.st", "'H_l':'%s'", "16", "15", "0"},
    {"base.st", "'freq_dim':'%s'", "64", "63"},
    {"base.st", "'vocab':'%s'", "27", "927"}, {"lora.st", "'lora_rank':'%s'", "8", "99", "x"},
    {"base.st", "'%s':'64'", "dim", "mid", "eps"}, {"base.st", "%s", "'64'", "64", "{}"},
    {"base.st", "%s", "'F32'", "'F64'", "'I32'", "'U8'", "32"}, {"lora.st", "%s", "lora_A", "lora_C"},
    {"base.st", "%s", "patch_embedding.weight", "x", "patch_embedding.bias", "__metadata__", "\n"},
    {"base.st", "%s", "[64, 3, 1, 2, 2]", "[3,64,1,2,2]", "[1,1,1,1,1,64,3,2,2]", "[4294967296,4294967296,3]",
     "[-64,3,1,2,2]", "[[64, 3, 1, 2, 2]]", "[64 3,1,2,2]", "768", "null"},
    {"base.st", "%s", "[0,3072]", "[0,3071]", "[3072,0]", "[0,3072,3072]", "[0]", "[0,3072,]", "[0,3072.0]",
     "[1,3073]", "[99999999999,100000002671]", "[18446744073709551615,3071]"},
    {"base.st", "%s", "'shape'", "'dtype'", ""}, {"base.st", "%s", "},", "}},", "},,"},
    {"hif8.st", "self_attn.q.weight.%s", "scale", "stale"}};

static void try_hostile_files(void) {
    const char *scale = "blocks.0.self_attn.q.weight.scale", *codes = "blocks.1.ffn.2.weight";
    enum { NOT_A_NUMBER = 0x7FC00000 };
    Raw base = get_file("base.st");
    size_t cut[] = {0, 8, 1000, base.size - 1, base.size + 1};
    for (int i = 0; i < 5; i++) try_file(fmt("%zu bytes", cut[i]), base.data, cut[i]);
    try_file("text", "This is no checkpoint, only text.\n", 34);
    try_file("an empty header", "\2\0\0\0\0\0\0\0{}", 10);
    try_file("half a header", "\1\0\0\0\0\0\0\0{", 9);
    try_file("brackets", "\14\0\0\0\0\0\0\0{\"a\":[[[[[[[", 20);
    for (size_t i = 0; i < sizeof EDITS / sizeof EDITS[0]; i++)
        for (const char *const *e = EDITS[i], *const *to = e + 3; *to; to++) {
            Raw whole = get_file(e[0]);
            Raw out = edited(whole, quoted(fmt(e[1], e[2])), quoted(fmt(e[1], *to)), false);
            uint64_t n;
            if (!out.data) die("the test's %s has no %s", e[0], e[2]);
            memcpy(&n, out.data, 8), n += out.size - whole.size, memcpy(out.data, &n, 8);
            try_file(fmt(e[1], *to), out.data, out.size);
        }
    try_value("base.st", "blocks.3.ffn.0.weight", NOT_A_NUMBER);
    try_value("lora.st", "blocks.0.self_attn.q.lora_B.weight", NOT_A_NUMBER);
    try_value("hif8.st", scale, 0), try_value("hif8.st", scale, 0xBF800000);
    try_value("hif8.st", codes, 0x80808080), try_value("hif8.st", codes, 0x6F6F6F6F);
}

// One good command, and what makes it bad when it follows; the last of equal options counts.
static const char *const OPTIONS_BAD[][32] = {
    {"", "paint", "--seed 1", "info", "eval", "train", "grpo"},
    {"info", "text", "missing", "base.st hif8.st"},
    {"sample -w", "missing" SHORT, "folder" SHORT, "pipe" SHORT, "lora.st" SHORT, "other.st.resume" SHORT},
    {"sample", "--colour red", "-w", "-p a -o keep.png", "-w base.st -o keep.png"},
    {"sample -w base.st -o keep.png -p", "''", "'   '", "red", "'a purple circle'",
     "'a a a a a a a a a a a a a a a a a a a a a a a a a a a'",
     "'a a'" RED RED RED RED RED RED RED RED RED RED RED RED RED RED RED RED},
    {"sample -w base.st" SHORT, "-n 0", "-n 1e30", "-n 2.5", "-n 5x", "-n ''", "-g nan", "--shift 0",
     "--seed -1", "--seed 18446744073709551616", "--height 15", "--sp magic", "--noise base.st",
     "--frames 4096 --height 16384 --width 16384", "-o nowhere/out.png", "-o folder.png", "-o /proc/out.png",
     "-o out.gif", "-o ''", "-o -", "-o full.png", "--lora missing", "--lora base.st", "--text base.st"},
    {"train", "--preset tiny", "--steps"},
    {"train -o new.st", "--preset big", "--batch 0", "--lr inf", "--dtype fp4", "--init text",
     "--init missing", "--steps 0 -o folder", "--steps 0 -o /dev/full", "--batch 65536 --frames 4096",
     "--steps 5 -o other.st", "--steps 5 -o torn.st", "--steps 5 -o old.st", "--sparse none"},
    {"eval -w base.st", "-n 0", "-w text", "-w ''", "--steps 0"},
    {"grpo", "-o new.st", "--init base.st", "--init base.st -o base.st"},
    {"grpo -o new.st --init base.st", "--init missing", "-g 0", "--ema 1", "--group 1", "-n 5 --window 5",
     "--rank 64", "--clip 0", "--reward nothing", "-o grpo.st --group 2 --prompts 1"}, {NULL}};

static int bad_input(const char *osp) {
    const char *scratch = scratch_folder("bad"), *path = realpath(osp, NULL);
    int code;
    Model *m = model_layout(&PRESETS[0]);
    Optimizer o;
    if (!path || chdir(scratch)) die("%s, %s: %s; build osp first", osp, scratch, strerror(errno));
    setenv("OSP", fmt("timeout -s 9 10 %s", path), 1);
    setenv("ASAN_OPTIONS", "detect_leaks=0", 0);         // a program that stops with an error frees nothing
    model_allocate(m, true), model_random(m, 1), optimizer_init(&o, m->w, m->dw, 16);
    model_save("base.st", m, m->w, "f32"), model_save("hif8.st", m, m->w, "hif8");
    lora_new(m, 8, 16, 1), lora_save("lora.st", m->lora, m->lora->w);
    state_save("other.st.resume", &o, "preset tiny of another kind");
    state_save("grpo.st.resume", &o, "grpo of another kind");
    shell(&code, "mkdir folder folder.png && ln -s /dev/full full.png && mkfifo pipe && "
                 "cp base.st old.st.resume && echo no checkpoint | tee keep.png keep.st text torn.st.resume");
    if (code) die("cannot make test files in %s", scratch);
    try_hostile_files();
    for (const char *const (*row)[32] = OPTIONS_BAD; (*row)[0]; row++)
        for (const char *const *tail = *row + 1; *tail; tail++)
            try_case(*tail, fmt("$OSP %s %s", (*row)[0], *tail));
    try_case("a name of 300 letters", fmt("$OSP sample -w base.st" SHORT " -o %0300d.png", 0));
    try_case("disk full: picture", "ulimit -f 1; $OSP sample -w base.st" SHORT);
    try_case("disk full: checkpoint", "ulimit -f 1; $OSP train --steps 0 -o keep.st");
    try_case("disk full: latent", "ulimit -f 1; $OSP sample -w base.st" RED " -n 1 -o new.safetensors");
    shell(&code, fmt("rm -r %s", scratch));
    printf("bad input: %d cases, %d failed\n", bad.cases, bad.failed);
    return bad.failed;
}

// ---- ranks: R processes against one, in the same run (mpirun -np R ./test_osp_mpi) ----------------------
static void ranks_against_one(Ranks *k, const int *grid, int quant, bool sampled) {
    Config c = small_config(0, 3 * quant);
    c.num_heads = 4, c.T = grid[0], c.H_l = 2 * grid[1], c.W_l = 2 * grid[2];
    Model *m = random_model(&c, true, 5);
    Question q = question(&c, 0);
    Answer want = ask(run_of(m, 2, true), &q);
    size_t n = c.in_dim * c.T * c.H_l * c.W_l;
    char *what = fmt("%d x %d ranks, %dx%dx%d%s:", k->halves, k->size, grid[0], grid[1], grid[2],
                     quant ? ", HiF8" : "");
    for (int ulysses = 0; ulysses < 2; ulysses++) {
        k->ulysses = ulysses;
        Answer got = ask(run_on(k, m, 2, true), &q);
        note("output", relative(got.out, want.out, 2 * n));
        note("loss", fabs(got.loss / want.loss - 1));
        note("gradients", relative(got.grad, want.grad, m->count));
        worst_row(quant ? 5e-2 : 1e-6, fmt("%s output, loss, gradients as one vector,", what));
        if (!quant) note_each(m, got.grad, want.grad);
        note("text", relative(got.dtext, want.dtext, 2 * c.text_len * c.text_dim));
        worst_row(quant ? 3e-1 : 1e-5, fmt("%s each gradient, %s,", what, ulysses ? "Ulysses" : "SSP"));
    }
    k->ulysses = false;
    if (!sampled) return;
    Text cond = {NULL, q.rows}, uncond = {NULL, question(&c, 1).rows};
    float *one = noise(90, n, 1), *all = noise(90, n, 1);
    sample(run_of(m, 1, false), one, cond, uncond, 50, 7, 5);
    sample(run_on(k, m, 1, false), all, cond, uncond, 50, 7, 5);
    note("x", relative(all, one, n)), worst_row(1e-6, fmt("%s 50 guided steps,", what));
}

static int run_ranks(Ranks *world, bool small) {         // small: under the sanitizers
    static const int GRID[][3] = {{3, 6, 10}, {2, 7, 5}, {2, 8, 8}, {1, 45, 80}};
    ranks_split(world, world->size > 4 ? 2 : 1);
    tally.silent = world->rank || world->half;
    for (int i = 0; i < (small ? 2 : 4); i++)
        for (int quant = i < 3; quant >= 0; quant--)
            ranks_against_one(world, GRID[i], quant, !quant && i < (small ? 1 : 3));
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
// A small valid file; its data are spaces. What is nasty stands in its metadata: pieces are copied about.
static Raw fuzz_base(void) {
    char *text = fmt("%8s%s%41s", "", quoted("{'__metadata__':{'dim':'64','note':'a\\n\\u00e9\\ud800 -1 1.5 "
        "007 null [[[[ {{ }} ]] :, 4294967296 9223372036854775807 18446744073709551616 I32 F99 w.scale "
        "\\u0000 \\\\'},"
        "'w':{'dtype':'F32','shape':[2,3],'data_offsets':[0,24]},"
        "'b':{'dtype':'BF16','shape':[4],'data_offsets':[24,32]},"
        "'q':{'dtype':'U8','shape':[5],'data_offsets':[32,37]},"
        "'q.scale':{'dtype':'F32','shape':[],'data_offsets':[37,41]},"
        "'i':{'dtype':'I32','shape':[0,9,1,1,1,1,1,1],'data_offsets':[41,41]}} "), "");      // never read
    Raw r = {text, strlen(text)};
    uint64_t n = r.size - 8 - 41;
    memcpy(r.data, &n, 8);
    return r;
}

// Opens a file and reads its tensors; a name for the promise that this breaks, or NULL. A refusal is none.
static const char *broken_promise(File *f, const char *path, int *accepted) {
    jmp_buf here;
    caught = &here;
    if (setjmp(here)) return NULL;
    file_open(f, path);
    ++*accepted;
    for (const Entry *t = f->entry; t < f->entry + f->count; t++) {
        size_t count = 1;
        if (file_find(f, t->name) != t || file_meta(f, t->name) != t->text) return "lookup";
        for (int d = 0; d < t->rank; d++) count *= t->shape[d];
        if (t->text) continue;
        if (t->rank > 8 || count != t->count || t->bytes != count * DTYPE_BYTES[t->dtype]) return "shape";
        if (t->data < f->data || t->bytes > f->bytes || t->data + t->bytes > f->data + f->bytes)
            return "bounds";
    }
    for (const Entry *t = f->entry; t < f->entry + f->count; t++) {
        if (t->text) continue;
        float *out = file_read(f, t);
        for (size_t j = 0; j < t->count; j++) if (!isfinite(out[j])) return "NaN or Inf read";
        free(out);
    }
    return NULL;
}

// 0: every one of `runs` files was read or refused as promised. The first is valid.
static int fuzz_reader(long runs) {
    int fd = memfd_create("osp_fuzz", 0), accepted = 0;
    const char *path = fmt("/proc/self/fd/%d", fd), *broken = NULL;
    FILE *loud = stderr;
    stderr = fopen("/dev/null", "w");                    // what die says; a sanitizer does not write there
    for (long run = 0; run < runs && !broken; run++) {
        Raw r = run ? mutated(fuzz_base(), run) : fuzz_base();
        File f;
        if (ftruncate(fd, 0) || pwrite(fd, r.data, r.size, 0) != (ssize_t)r.size) die("fuzz: no memory");
        broken = broken_promise(&f, path, &accepted);
        if (!accepted) broken = "the valid file is read";
        if (broken) printf("fuzz: run %ld: broken promise: %s\n", run, broken);
        caught = NULL, file_close(&f), free(r.data);
    }
    stderr = loud;
    printf("fuzz: %ld files, %d accepted\n", runs, accepted);
    return broken != NULL;
}

// ==== torture: kills, full disks, hostile files, ranks that die or differ, on the whole program ===========
// Each script runs so many times in a folder of its own and must end with 0. $1, $2, $3: random numbers from
// 100 to 999; bad: a copy of `victim`, broken at random. $learn: a short training, one of three ($k), that
// saves its state after every step and unbroken makes want$k.st; $train: the first of them.
#define SAMPLE "sample -w base.st -n 1 -o it.png" RED " "
#define MPIRUN "OMP_NUM_THREADS=1 timeout 120 mpirun --oversubscribe -q -np "

// Up to 3 runs that a signal ends, and then one left alone.
#define KILLED_BY(signal) \
    "for t in 0.$1 0.$2 0.$3; do timeout -s " signal " $t $osp $learn it.st; c=$?; sleep 0.2; " \
    "case $c in 0|124|137) ;; *) exit 3;; esac; done >it.log 2>&1; $osp $learn it.st >>it.log 2>&1 && " \
    "cmp it.st want$k.st && rm it.st && test `echo it*` = it.log && " \
    "awk '/^stopped/ { n = $4 + 0 } /^resumed/ { if (n && n != $NF) exit 1; n = 0 }' it.log"
// A hostile file must be read or refused, in 5 s and 400 MB of addresses.
#define READS_BAD(command) \
    "(ulimit -v 400000; timeout 5 $osp " command " >it.log 2>&1); test $? = 0 -o $? = 2"

static const struct { int times; const char *what, *victim, *script; } TORTURE[] = {
    {1, "the files to begin with", NULL,
     "$osp train --preset tiny --steps 0 -o base.st && $osp grpo --init base.st --prompts 1 --group 2 "
     "--micro 2 --steps 1 -n 3 --window 1 -o lora.st && $osp sample -w base.st -n 1 -o clip.safetensors" RED},
    {3, "unbroken runs", NULL, "$osp $learn want$k.st"},
    {33, "SIGKILL at random moments: the same bytes at the end, nothing left", NULL, KILLED_BY("KILL")},
    {6, "SIGTERM, likewise", NULL, KILLED_BY("TERM")},
    {6, "SIGINT, likewise", NULL, KILLED_BY("INT")},
    {10, "a disk too full for the state: the run ends", NULL,
     "cp base.st it.st; (ulimit -f $((4800 + 9 * $1)); $osp $train it.st) && cmp it.st want0.st"},
    {10, "a disk too full for the output: the old file stays whole", NULL,
     "cp base.st it.st; (ulimit -f $((4 * $1)); $osp $train it.st); test $? = 2 && cmp it.st base.st"},
    {400, "hostile files, info", "base.st", READS_BAD("info bad")},
    {400, "hostile files, sample -w", "base.st", READS_BAD("sample -w bad -n 1 -o it.png" RED)},
    {400, "hostile files, sample --lora", "lora.st", READS_BAD(SAMPLE "--lora bad")},
    {400, "hostile files, sample --noise", "clip.safetensors", READS_BAD(SAMPLE "--noise bad")},
    {400, "hostile files, train's state", "base.st",
     "mv bad it.st.resume; " READS_BAD("train --preset tiny --steps 1 --batch 1 -o it.st")},
    {1, "two ranks train", NULL, MPIRUN "2 ${osp}_mpi $train want_ranks.st"},
    {6, "an input that differs on one of two ranks is named", NULL,
     MPIRUN "1 ${osp}_mpi " SAMPLE ": -np 1 ${osp}_mpi " SAMPLE "$differ >it.log 2>&1; c=$?; "
     "test $c != 0 -a $c != 124 && grep -q 'osp: rank' it.log"},
    {20, "a rank is killed: the others gone within 10 s, the next run ends the same", NULL,
     MPIRUN "2 ${osp}_mpi $train it.st & p=$!; sleep 0.4; sleep 0.$1; pkill -KILL -n -P `pgrep -P $p` || "
     "exit 3; timeout 11 tail --pid=$p -f /dev/null || exit 4; "
     MPIRUN "2 ${osp}_mpi $train it.st && cmp it.st want_ranks.st"}};

static int torture(const char *program) {
    static const char *const LEARN[] = {
        "train --preset tiny --steps 40 --batch 4 --save 0 -o",
        "train --preset tiny --steps 30 --batch 4 --hif8 --save 0 -o",
        "grpo --init base.st --prompts 1 --group 4 --steps 8 -n 4 --save 0 -o"};
    static const char *const DIFFER[] = {"--seed 2", "-n 3", "-p blue", "--lora lora.st", "--shift 4",
                                         "--noise clip.safetensors"};
    int code, rows = sizeof TORTURE / sizeof TORTURE[0];
    if (access(fmt("%s_mpi", program), X_OK)) rows -= 3, skip("ranks: make osp_mpi first");
    shell(&code, "rm -rf torture; mkdir torture");
    for (int t = 0; t < rows; t++) {
        int failed = 0;
        for (int i = 0; i < TORTURE[t].times; i++) {
            if (TORTURE[t].victim) {
                Raw r = mutated(get_file(fmt("torture/%s", TORTURE[t].victim)), i);
                put_file("torture/bad", r.data, r.size), free(r.data);
            }
            char *said = shell(&code, fmt(
                "cd torture; rm -f it*; osp=../%s; k=%d; learn='%s'; train='%s'; differ='%s'; "
                "set %zu %zu %zu; { %s; } 2>&1", program, i % 3, LEARN[i % 3], LEARN[0], DIFFER[i % 6],
                100 + below(900), 100 + below(900), 100 + below(900), TORTURE[t].script));
            if (code) printf("    run %d, exit %d: %.300s\n", i, code, said), failed++;
        }
        row(failed, 0, fmt("%d x %s", TORTURE[t].times, TORTURE[t].what));
    }
    return tally_print();
}

static int help(void) {
    puts("test_osp [--golden DIR]          every check; test_osp ops: of the operations only\n"
         "test_osp verify                  the paper's claims\n"
         "test_osp bench, .. bench linear  times: of a model; of single ops\n"
         "test_osp show                    lists the pictures it can draw\n"
         "test_osp ranks, test_osp lose    under mpirun: R ranks against one; a rank dies\n"
         "test_osp mutate [--only WORD]    breaks terms of osp.c: do the checks notice?\n"
         "test_osp badinput ./osp          hostile files and options\n"
         "test_osp fuzz N                  the file reader\n"
         "test_osp torture ./osp           kills, full disks, hostile files, ranks that die: 10 minutes");
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
                 : IS("bench")       ? bench(argc - 1, argv + 1, &k)
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
