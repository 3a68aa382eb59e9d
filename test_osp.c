#define OSP_NO_MAIN
#ifdef TEST_CUDA
#include "osp_cuda.cu"
#else
#include "osp.c"
#endif
#include <dirent.h>
#include <dlfcn.h>
#include <sys/resource.h>
#include <sys/wait.h>

// ============================================================================================================
// The proof: every number osp computes, against one it did not compute
// ============================================================================================================
// Three kinds of judges: golden/ (an independent float64 implementation), plain double-precision formulas with central
// differences for the gradients, and exact rules (bits, permutations, rounding to the nearest). Errors are relative:
// |a − b| / |b| over one tensor. What an operation must write is filled with NaN first. The tests free nothing.
static struct { int passed, failed, skipped; bool silent, half; } tally;

// bfloat16 keeps 8 bits: what is exact in float32 stays so (or is rounded once more, see as_act), the rest gets room.
static double limit_here(double limit) {
    if (!tally.half || limit == 0 || limit > 1e-2) return limit;
    return limit <= 1e-5 ? 2e-2 : 1e-1;
}

__attribute__((format(printf, 3, 4)))
static void row(double measured, double limit, const char *format, ...) {
    char name[160];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    limit = limit_here(limit);
    bool ok = measured <= limit;                                    // NaN is not
    if (ok) tally.passed++; else tally.failed++;
    if (!tally.silent) printf("%-88s %9.2e %9.1e %s\n", name, measured, limit, ok ? "ok" : "FAILED");
    fflush(stdout);
#ifdef STOP_AT_FIRST
    if (!ok) exit(1);
#endif
}

static void skip(const char *name, const char *why) {
    tally.skipped++;
    if (!tally.silent) printf("%-88s %s skipped\n", name, why);
}

// The worst of many.
typedef struct { double error; char name[80]; int count; } Worst;
static Worst nothing_yet(void) { Worst w; memset(&w, 0, sizeof w); return w; }
static void worse(Worst *w, double error, const char *name) {
    w->count++;
    if (isnan(w->error) || error <= w->error) return;
    w->error = error;
    snprintf(w->name, sizeof w->name, "%s", name);
}
__attribute__((format(printf, 3, 4)))
static void worst_row(const Worst *w, double limit, const char *format, ...) {
    char what[128];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    if (w->count)
        row(w->error, limit, "%s worst of %d%s%s%s", what, w->count, *w->name ? " (" : "", w->name,
            *w->name ? ")" : "");
}

static double relative(const float *a, const float *b, size_t n) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += (double)b[i] * b[i];
    }
    return sqrt(norm > 0 ? difference / norm : norm == 0 ? difference : NAN);
}

static bool same_bits(const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (float_bits(a[i]) != float_bits(b[i]) && !(isnan(a[i]) && isnan(b[i]))) return false;
    return true;
}

// ---- between host and device -------------------------------------------------------------------------------------
static float *floats(size_t n) { return (float *)xalloc(n, sizeof(float)); }
static float *noise(uint64_t stream, size_t n, double scale) {
    float *x = floats(n);
    for (size_t i = 0; i < n; i++) x[i] = (float)scale * rng_normal(77, stream, i);
    return x;
}
static double *doubles(const float *x, size_t n) {
    double *y = (double *)xalloc(n, sizeof(double));
    for (size_t i = 0; i < n; i++) y[i] = x[i];
    return y;
}
static float *rounded(const double *x, size_t n) {
    float *y = floats(n);
    for (size_t i = 0; i < n; i++) y[i] = (float)x[i];
    return y;
}
static float *up(const float *host, size_t n) {
    float *p = (float *)device_alloc(n * sizeof(float));
    upload(p, host, n * sizeof(float));
    return p;
}
static act *up_act(const float *host, size_t n) {
    act *p = (act *)device_alloc(n * act_size());
    to_act(p, up(host, n), n);
    return p;
}
static float *down(const float *device, size_t n) {
    float *p = floats(n);
    download(p, device, n * sizeof(float));
    return p;
}
static float *down_act(const act *device, size_t n) {
    float *room = (float *)device_alloc(n * sizeof(float));
    to_float(room, device, n);
    return down(room, n);
}
static float *as_act(const float *host, size_t n) { return down_act(up_act(host, n), n); }
static void spoil(void *device, size_t bytes) {                     // NaN in float and in bfloat16
    void *host = xalloc(bytes, 1);
    memset(host, 0xFF, bytes);
    upload(device, host, bytes);
    free(host);
}
static float *spoiled(size_t n) {
    float *p = (float *)device_alloc(n * sizeof(float));
    spoil(p, n * sizeof(float));
    return p;
}
static act *spoiled_act(size_t n) { act *p = (act *)device_alloc(n * act_size()); spoil(p, n * act_size()); return p; }
static double off(const float *device, const float *want, size_t n) { return relative(down(device, n), want, n); }
static double off_act(const act *device, const float *want, size_t n) { return relative(down_act(device, n), want, n); }

// ============================================================================================================
// HiF8
// ============================================================================================================
// The rule in its plainest form: of all finite values and one step above the largest, which is Inf, the nearest; of
// two equally near, the one farther from zero.
static float positive_hif8[129];
static int positive_count;
static int compare_values(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}
static void hif8_values(void) {
    for (int code = positive_count = 0; code < 128; code++)
        if (code != 0x6F) positive_hif8[positive_count++] = hif8_decode((uint8_t)code);
    qsort(positive_hif8, (size_t)positive_count, sizeof(float), compare_values);
    positive_hif8[positive_count++] = 49152;
}
static float nearest_hif8(float x) {
    double a = fabs((double)x);
    int low = 0, high = positive_count - 1;
    if (isnan(x)) return NAN;
    if (a >= 49152) return copysignf(INFINITY, x);
    while (high - low > 1) { int mid = (low + high) / 2; if (positive_hif8[mid] <= a) low = mid; else high = mid; }
    float y = a - positive_hif8[low] < positive_hif8[high] - a ? positive_hif8[low] : positive_hif8[high];
    y = y == 49152 ? INFINITY : y;
    return y == 0 ? 0 : copysignf(y, x);
}
static float *nearest_tensor(const float *x, size_t n, float s) {   // Q(x; s), one float operation at a time
    float amax = 0, *y = floats(n);
    for (size_t i = 0; i < n; i++) amax = fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
    volatile float k = s / (amax < 1e-8f ? 1e-8f : amax);
    for (size_t i = 0; i < n; i++) { volatile float scaled = x[i] * k; y[i] = nearest_hif8(scaled) / k; }
    return y;
}

static void check_hif8_rules(void) {
    int wrong = 0, binades = 0;
    float *x = floats(65536);
    hif8_values();
    for (int code = 0; code < 256; code++) wrong += hif8_encode(hif8_decode((uint8_t)code)) != code;
    row(wrong, 0, "hif8: all 256 codes round trip");
    for (int i = 1; i < positive_count - 1; i++) binades += ilogbf(positive_hif8[i]) != ilogbf(positive_hif8[i - 1]);
    row(binades != 38 || positive_hif8[positive_count - 2] != 32768 || positive_hif8[1] != 0x1p-22f, 0,
        "hif8: 38 binades from 2^-22 to 2^15");
    for (int half = 0; half < 2; half++) {
        wrong = 0;
        for (uint32_t u = 0; u < 65536; u++) {
            x[u] = half ? half_to_float(u) : bits_float(u << 16);
            float want = nearest_hif8(x[u]), got = hif8_round(x[u]), decoded = hif8_decode(hif8_encode(x[u]));
            wrong += !same_bits(&got, &want, 1) || !same_bits(&decoded, &want, 1);
        }
        row(wrong, 0, "hif8: all 65,536 %s patterns to the nearest value", half ? "float16" : "bfloat16");
    }
    size_t n = 5003;
    float *y = noise(1, n, 1), scales[] = {15, 224}, most;
    for (size_t i = 0; i < n; i++) y[i] *= expf(4 * rng_normal(78, 1, i));
    act *device = up_act(y, n);
    y = down_act(device, n);
    for (int i = 0; i < 2; i++) {
        float *m = spoiled(1);
        act *q = spoiled_act(n);
        absmax(m, device, n);
        hif8_tensor(q, device, n, scales[i], m);
        row(!same_bits(down_act(q, n), as_act(nearest_tensor(y, n, scales[i]), n), n), 0,
            "hif8_tensor(s = %g) = the nearest, bit for bit", scales[i]);
    }
    float tiny[3] = {1e-12f, -3e-10f, 0}, bad[5] = {1, NAN, -7, NAN, 2}, *m = spoiled(1);
    act *q = up_act(tiny, 3);
    absmax(m, q, 3);
    hif8_tensor(q, q, 3, 15, m);
    row(!same_bits(down_act(q, 3), as_act(nearest_tensor(as_act(tiny, 3), 3, 15), 3), 3), 0,
        "hif8_tensor where max|x| is clamped to 1e-8");
    absmax(m, up_act(bad, 5), 5);
    download(&most, m, sizeof most);
    row(most != 7, 0, "absmax leaves NaN out");
}

// ============================================================================================================
// Operations against formulas in double precision
// ============================================================================================================
typedef void (*Formula)(double *y, double *const *in, const int *s);   // y from some inputs; s: sizes

// d (Σ dy·y) / d in[which], by central differences.
static float *slope(Formula f, const int *s, double **in, int which, size_t count, const float *dy, size_t n) {
    double *high = (double *)xalloc(n, sizeof(double)), *low = (double *)xalloc(n, sizeof(double)), h = 1e-5;
    float *g = floats(count);
    for (size_t i = 0; i < count; i++) {
        double keep = in[which][i], sum = 0;
        in[which][i] = keep + h, f(high, in, s);
        in[which][i] = keep - h, f(low, in, s);
        in[which][i] = keep;
        for (size_t j = 0; j < n; j++) sum += dy[j] * (high[j] - low[j]) / (2 * h);
        g[i] = (float)sum;
    }
    free(high), free(low);
    return g;
}
static float *formula(Formula f, const int *s, double **in, size_t n) {
    double *y = (double *)xalloc(n, sizeof(double));
    f(y, in, s);
    return rounded(y, n);
}
static float *sum_of(const float *a, const float *b, size_t n) {
    float *y = floats(n);
    for (size_t i = 0; i < n; i++) y[i] = a[i] + b[i];
    return y;
}
static void check_linear(int rows, int out, int in) {
    size_t R = (size_t)rows, O = (size_t)out, I = (size_t)in;
    float *x = noise(1, R * I, 1), *w = noise(2, O * I, 1), *b = noise(3, O, 1), *dy = noise(4, R * O, 1),
          *plus = noise(5, R * I + O * I + O, 1);
    double *y = (double *)xalloc(R * O, sizeof(double)), *z = (double *)xalloc(R * O, sizeof(double)),
           *dx = doubles(plus, R * I);
    double *dx0 = (double *)xalloc(R * I, sizeof(double)), *dw = doubles(plus, O * I), *db = doubles(plus, O);
    for (size_t r = 0; r < R; r++)
        for (size_t o = 0; o < O; o++) {
            for (size_t i = 0; i < I; i++) {
                z[r * O + o] += (double)x[r * I + i] * w[o * I + i];
                dx0[r * I + i] += (double)dy[r * O + o] * w[o * I + i];
                dw[o * I + i] += (double)dy[r * O + o] * x[r * I + i];
            }
            y[r * O + o] = z[r * O + o] + b[o];
            db[o] += dy[r * O + o];
        }
    for (size_t i = 0; i < R * I; i++) dx[i] += dx0[i];
    act *xd = up_act(x, R * I), *wd = up_act(w, O * I), *dyd = up_act(dy, R * O), *yd = spoiled_act(R * O),
        *zd = spoiled_act(R * O);
    act *dxd = spoiled_act(R * I), *dxa = up_act(plus, R * I);
    float *dwd = up(plus, O * I), *dbd = up(plus, O);
    linear_forward(yd, xd, wd, up(b, O), R, out, in);
    linear_forward(zd, xd, wd, NULL, R, out, in);
    linear_backward(dxd, dwd, dbd, dyd, xd, wd, R, out, in, false);
    linear_backward(dxa, NULL, NULL, dyd, xd, wd, R, out, in, true);
    Worst e = nothing_yet();
    worse(&e, off_act(yd, rounded(y, R * O), R * O), "y"),
        worse(&e, off_act(zd, rounded(z, R * O), R * O), "y without bias");
    worse(&e, off_act(dxd, rounded(dx0, R * I), R * I), "dx"),
        worse(&e, off_act(dxa, rounded(dx, R * I), R * I), "dx accumulated");
    worse(&e, off(dwd, rounded(dw, O * I), O * I), "dw"), worse(&e, off(dbd, rounded(db, O), O), "db");
    worst_row(&e, 2e-6, "linear %dx%dx%d", rows, out, in);
}

static double gelu(double u) { return u / 2 * (1 + tanh(sqrt(2 / M_PI) * (u + 0.044715 * u * u * u))); }
static double silu(double u) { return u / (1 + exp(-u)); }
static double derivative(double (*f)(double), double u) { return (f(u + 1e-5) - f(u - 1e-5)) / 2e-5; }

static void check_activations(void) {
    int rows = 53, out = 37, in = 5;
    size_t n = (size_t)rows * (size_t)out;
    float *x = noise(1, (size_t)rows * 5, 1.3), *w = noise(2, (size_t)out * 5, 1), *b = noise(3, (size_t)out, 1),
          *dy = noise(4, n, 1);
    float *want[6];
    for (int i = 0; i < 6; i++) want[i] = floats(n);
    act *y = spoiled_act(n), *y2 = spoiled_act(n), *pre = spoiled_act(n), *dx = up_act(dy, n), *s = spoiled_act(n),
        *ds = up_act(dy, n);
    linear_gelu_forward(y, pre, up_act(x, (size_t)rows * 5), up_act(w, (size_t)out * 5), up(b, (size_t)out),
                        (size_t)rows, out, in);
    linear_gelu_forward(y2, NULL, up_act(x, (size_t)rows * 5), up_act(w, (size_t)out * 5), up(b, (size_t)out),
                        (size_t)rows, out, in);
    gelu_backward(dx, dx, pre, n);
    silu_forward(s, pre, n);
    silu_backward(ds, ds, pre, n);
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < out; o++) {
            double u = b[o];
            size_t i = (size_t)(r * out + o);
            for (int k = 0; k < in; k++) u += (double)x[r * in + k] * w[o * in + k];
            want[0][i] = (float)u, want[1][i] = (float)gelu(u), want[2][i] = (float)(dy[i] * derivative(gelu, u));
            want[3][i] = (float)silu(u), want[4][i] = (float)(dy[i] * derivative(silu, u));
        }
    Worst e = nothing_yet();
    worse(&e, off_act(pre, want[0], n), "pre"), worse(&e, off_act(y, want[1], n), "gelu"),
        worse(&e, off_act(y2, want[1], n), "gelu, pre NULL");
    worse(&e, off_act(dx, want[2], n), "gelu backward"), worse(&e, off_act(s, want[3], n), "silu"),
        worse(&e, off_act(ds, want[4], n), "silu backward");
    worst_row(&e, 2e-6, "activations");
}

// out[B, J, D] = mod[J, D] + e[B, Je, D]
static void modulation_formula(double *y, double *const *in, const int *s) {
    for (int b = 0; b < s[0]; b++)
        for (int j = 0; j < s[1]; j++)
            for (int i = 0; i < s[3]; i++)
                y[(b * s[1] + j) * s[3] + i] = in[0][j * s[3] + i] + in[1][(b * s[2] + (s[2] == 1 ? 0 : j)) * s[3] + i];
}
static void check_modulation(int Je) {
    int s[] = {3, 5, Je, 7};
    size_t n = 3 * 5 * 7, ne = 3 * (size_t)Je * 7;
    float *mod = noise(1, 35, 1), *e = noise(2, ne, 1), *dy = noise(3, n, 1), *plus = noise(4, n, 1);
    double *in[] = {doubles(mod, 35), doubles(e, ne)};
    float *y = spoiled(n), *dmod = up(plus, 35), *de = up(plus, ne);
    modulation_forward(y, up(mod, 35), up(e, ne), 3, 5, Je, 7);
    modulation_backward(dmod, de, up(dy, n), 3, 5, Je, 7);
    Worst w = nothing_yet();
    worse(&w, off(y, formula(modulation_formula, s, in, n), n), "forward");
    worse(&w, off(dmod, sum_of(plus, slope(modulation_formula, s, in, 0, 35, dy, n), 35), 35), "dmod");
    worse(&w, off(de, sum_of(plus, slope(modulation_formula, s, in, 1, ne, dy, n), ne), ne), "de");
    worst_row(&w, 2e-6, Je == 1 ? "modulation, one row of e" : "modulation");
}

// h = norm(x + gate·y), and x + gate·y. s: B, n, D, one, shift and scale per sample?, gate?, eps in millionths.
static void norm_formula(double *out, double *const *in, const int *s) {
    int B = s[0], n = s[1], D = s[2];
    for (int r = 0; r < B * n; r++) {
        double mean = 0, var = 0, *x = out + (B * n + r) * D;
        int at = s[4] ? r / n * D : 0;
        for (int i = 0; i < D; i++) {
            x[i] = in[0][r * D + i] + (s[5] ? in[2][r / n * D + i] : 1) * in[1][r * D + i];
            mean += x[i] / D;
        }
        for (int i = 0; i < D; i++) var += (x[i] - mean) * (x[i] - mean) / D;
        for (int i = 0; i < D; i++)
            out[r * D + i] = (x[i] - mean) / sqrt(var + 1e-6 * s[6]) * (s[3] + in[4][at + i]) + in[3][at + i];
    }
}

// A vector for each sample in the second of three slots, NaN in the others; stride 0 where all share one.
static PerSample per_sample(const float *host, int B, int D, bool each) {
    PerSample v = {spoiled(3 * (size_t)(B * D)), each ? 3 * (size_t)D : 0};
    v.p += D;
    for (int b = 0; b < (each ? B : 1); b++)
        upload(v.p + (size_t)b * v.stride, host + b * D, (size_t)D * sizeof(float));
    return v;
}
static double off_each(PerSample v, const float *want, int B, int D) {
    float *got = floats((size_t)(B * D));
    int count = v.stride ? B : 1;
    for (int b = 0; b < count; b++) download(got + b * D, v.p + (size_t)b * v.stride, (size_t)D * sizeof(float));
    return relative(got, want, (size_t)(count * D));
}

static void check_norm(bool modulated, bool gated, bool in_place) {
    int B = 2, n = 19, D = 13, s[] = {B, n, D, modulated, modulated, gated, 300};
    size_t rows = (size_t)(B * n * D), each = (size_t)(B * D);
    float *x = noise(1, rows, 0.1), *y = noise(2, rows, 0.1), *gate = noise(3, each, 1), *shift = noise(4, each, 1),
          *scale = noise(5, each, 1);
    float *dh = noise(6, 2 * rows, 1), *du = dh + rows, *plus = noise(7, each, 1), eps = 1e-6f * 300;
    double *in[] = {doubles(x, rows), doubles(y, rows), doubles(gate, each), doubles(shift, each),
                    doubles(scale, each)};
    PerSample none = {NULL, 0}, g = gated ? per_sample(gate, B, D, true) : none;
    PerSample dgate = gated ? per_sample(plus, B, D, true) : none, dshift = per_sample(plus, B, D, modulated),
              dscale = per_sample(plus, B, D, modulated);
    PerSample sh = per_sample(shift, B, D, modulated), sc = per_sample(scale, B, D, modulated);
    float *xd = up(x, rows), *x_out = in_place ? xd : spoiled(rows), *stat = spoiled(2 * (size_t)(B * n)),
          *dx = up(du, rows);
    act *h = spoiled_act(rows), *h2 = spoiled_act(rows), *yd = up_act(y, rows), *dy = spoiled_act(rows);
    residual_norm_forward(x_out, h, stat, xd, yd, g, sh, sc, modulated, B, (size_t)n, D, eps);
    residual_norm_forward(NULL, h2, stat, x_out, NULL, none, sh, sc, modulated, B, (size_t)n, D, eps);
    norm_backward(dx, dshift, dscale, up_act(dh, rows), x_out, stat, sc, modulated, B, (size_t)n, D);
    gate_backward(dy, dgate, dx, yd, g, B, (size_t)n, D);
    float *want = formula(norm_formula, s, in, 2 * rows);
    Worst w = nothing_yet();
    worse(&w, off_act(h, want, rows), "h"), worse(&w, off_act(h2, want, rows), "h alone"),
        worse(&w, off(x_out, want + rows, rows), "x_out");
    worse(&w, off(dx, slope(norm_formula, s, in, 0, rows, dh, 2 * rows), rows), "dx");
    worse(&w, off_act(dy, slope(norm_formula, s, in, 1, rows, dh, 2 * rows), rows), "dy");
    if (gated)
        worse(&w, off_each(dgate, sum_of(plus, slope(norm_formula, s, in, 2, each, dh, 2 * rows), each), B, D),
              "dgate");
    worse(&w, off_each(dshift, sum_of(plus, slope(norm_formula, s, in, 3, each, dh, 2 * rows), each), B, D), "dshift");
    worse(&w, off_each(dscale, sum_of(plus, slope(norm_formula, s, in, 4, each, dh, 2 * rows), each), B, D), "dscale");
    worst_row(&w, 5e-6, "residual, %s%s%s", modulated ? "modulated norm" : "affine norm", gated ? ", gate" : "",
              in_place ? ", in place" : "");
}

static void check_gathers(void) {
    int B = 2, n = 11, D = 6, map[17], count = 17;
    size_t rows = (size_t)(B * n * D), out = (size_t)(count * D);
    float *x = noise(1, rows, 1), *y = noise(2, rows, 1), *gate = noise(3, (size_t)(B * D), 1), *want = floats(out),
          *plain = floats(out);
    for (int j = 0; j < count; j++) {
        map[j] = j * 9 % (B * n);
        for (int i = 0; i < D; i++) {
            plain[j * D + i] = x[map[j] * D + i];
            want[j * D + i] = x[map[j] * D + i] + gate[map[j] / n * D + i] * y[map[j] * D + i];
        }
    }
    float *got = spoiled(out), *copied = spoiled(out), *bare = spoiled(out);
    int *md = to_device(map, (size_t)count);
    residual_gather_forward(got, up(x, rows), up_act(y, rows), per_sample(gate, B, D, true), md, (size_t)count, B,
                            (size_t)n, D);
    PerSample none = {NULL, 0};
    residual_gather_forward(bare, up(x, rows), NULL, none, md, (size_t)count, B, (size_t)n, D);
    gather_rows(copied, up(x, rows), md, (size_t)count, (size_t)D * sizeof(float));
    Worst w = nothing_yet();
    worse(&w, off(got, want, out), "residual_gather"), worse(&w, off(bare, plain, out), "no branch"),
        worse(&w, off(copied, plain, out), "gather_rows");
    worst_row(&w, 1e-6, "gathers by a map");
}

// y = rotate(x/√(mean x² + eps)·w). s: B, n, D, heads, rope?; in: x, w, rope[n, D/heads/2, 2].
static void rms_formula(double *y, double *const *in, const int *s) {
    int n = s[1], D = s[2], hd = D / s[3];
    for (int r = 0; r < s[0] * n; r++) {
        double squares = 0, *v = y + r * D;
        for (int i = 0; i < D; i++) squares += in[0][r * D + i] * in[0][r * D + i] / D;
        for (int i = 0; i < D; i++) v[i] = in[0][r * D + i] / sqrt(squares + 1e-3) * in[1][i];
        for (int i = 0; s[4] && i < D; i += 2) {
            double c = in[2][r % n * hd + i % hd], sn = in[2][r % n * hd + i % hd + 1], a = v[i], b = v[i + 1];
            v[i] = a * c - b * sn, v[i + 1] = a * sn + b * c;
        }
    }
}
static void check_rmsnorm_rope(bool rope) {
    int B = 2, n = 9, D = 18, heads = 3, s[] = {B, n, D, heads, rope};
    size_t rows = (size_t)(B * n * D), R = (size_t)(B * n), angles = (size_t)(n * D / heads);
    float *x = noise(1, rows, 0.1), *w = noise(2, (size_t)D, 1), *table = noise(3, angles, 1), *dy = noise(4, rows, 1),
          *plus = noise(5, (size_t)D, 1);
    for (size_t i = 0; i < angles; i += 2) { float a = table[i]; table[i] = cosf(a), table[i + 1] = sinf(a); }
    double *in[] = {doubles(x, rows), doubles(w, (size_t)D), doubles(table, angles)};
    act *xd = up_act(x, rows), *y = spoiled_act(rows), *dx = spoiled_act(rows), *same = up_act(dy, rows);
    float *rstd = spoiled(R), *rd = rope ? up(table, angles) : NULL, *wd = up(w, (size_t)D), *dw = up(plus, (size_t)D),
          *dw2 = up(plus, (size_t)D);
    rmsnorm_rope_forward(y, rstd, xd, wd, rd, B, (size_t)n, D, heads, 1e-3f);
    rmsnorm_rope_backward(dx, dw, up_act(dy, rows), xd, rstd, wd, rd, B, (size_t)n, D, heads);
    rmsnorm_rope_backward(same, dw2, same, xd, rstd, wd, rd, B, (size_t)n, D, heads);
    float *want = slope(rms_formula, s, in, 0, rows, dy, rows);
    Worst e = nothing_yet();
    worse(&e, off_act(y, formula(rms_formula, s, in, rows), rows), "y"), worse(&e, off_act(dx, want, rows), "dx"),
        worse(&e, off_act(same, want, rows), "dx in place");
    worse(&e, off(dw, sum_of(plus, slope(rms_formula, s, in, 1, (size_t)D, dy, rows), (size_t)D), (size_t)D), "dw");
    worst_row(&e, 5e-6, rope ? "rmsnorm + rope" : "rmsnorm");
}

// Softmax attention and its gradients, one query at a time: o, dq, dk, dv all at once.
static void attention_formula(double *o, double *dq, double *dk, double *dv, double *lse, const float *q,
                              const float *k, const float *v, const float *d, const Sequences *s, int heads, int hd) {
    int D = heads * hd;
    for (int i = 0; i < s->count; i++)
        for (int a = s->q[i]; a < s->q[i + 1]; a++)
            for (int h = 0; h < heads; h++) {
                int first = s->k[i], n = s->k[i + 1] - first;
                double *p = (double *)xalloc((size_t)n, sizeof(double)),
                       *dp = (double *)xalloc((size_t)n, sizeof(double)), top = -INFINITY, sum = 0, mean = 0;
                const float *qa = q + a * D + h * hd, *da = d + a * D + h * hd;
                for (int b = 0; b < n; b++) {
                    for (int j = 0; j < hd; j++)
                        p[b] += (double)qa[j] * k[(first + b) * D + h * hd + j] / sqrt(hd),
                            dp[b] += (double)da[j] * v[(first + b) * D + h * hd + j];
                    top = fmax(top, p[b]);
                }
                for (int b = 0; b < n; b++) sum += p[b] = exp(p[b] - top);
                for (int b = 0; b < n; b++) p[b] /= sum, mean += p[b] * dp[b];
                lse[a * heads + h] = top + log(sum);
                for (int b = 0; b < n; b++)
                    for (int j = 0; j < hd; j++) {
                        int at = (first + b) * D + h * hd + j;
                        double ds = p[b] * (dp[b] - mean) / sqrt(hd);
                        o[a * D + h * hd + j] += p[b] * v[at], dq[a * D + h * hd + j] += ds * k[at];
                        dk[at] += ds * qa[j], dv[at] += p[b] * da[j];
                    }
                free(p), free(dp);
            }
}

static void check_attention(const char *name, int count, const int *q, const int *k, int heads, int hd, double scale) {
    Sequences s = {count, (int *)xalloc((size_t)count + 1, sizeof(int)), (int *)xalloc((size_t)count + 1, sizeof(int)),
                   NULL, NULL};
    memcpy(s.q, q, ((size_t)count + 1) * sizeof(int)), memcpy(s.k, k, ((size_t)count + 1) * sizeof(int));
    s.q_device = to_device(q, (size_t)count + 1), s.k_device = to_device(k, (size_t)count + 1);
    size_t D = (size_t)(heads * hd), nq = (size_t)q[count] * D, nk = (size_t)k[count] * D,
           nl = (size_t)(q[count] * heads);
    float *in[] = {noise(1, nq, scale), noise(2, nk, scale), noise(3, nk, 1), noise(4, nq, 1)};
    double *w[5];
    for (int i = 0; i < 5; i++) w[i] = (double *)xalloc(i == 4 ? nl : i == 2 || i == 3 ? nk : nq, sizeof(double));
    attention_formula(w[0], w[1], w[2], w[3], w[4], in[0], in[1], in[2], in[3], &s, heads, hd);
    act *qd = up_act(in[0], nq), *kd = up_act(in[1], nk), *vd = up_act(in[2], nk), *dd = up_act(in[3], nq);
    act *o = spoiled_act(nq), *o2 = spoiled_act(nq), *dq = spoiled_act(nq), *dk = spoiled_act(nk),
        *dv = spoiled_act(nk);
    float *lse = spoiled(nl);
    attention_forward(o, lse, qd, kd, vd, &s, heads, hd);
    attention_forward(o2, NULL, qd, kd, vd, &s, heads, hd);
    attention_backward(dq, dk, dv, dd, qd, kd, vd, o, lse, &s, heads, hd);
    float *got = down(lse, nl), *want = rounded(w[4], nl);
    for (size_t i = 0; i < nl; i++) if (isinf(want[i]) || isnan(want[i])) got[i] = want[i] = 0;     // no keys: anything
    Worst e = nothing_yet();
    worse(&e, off_act(o, rounded(w[0], nq), nq), "o"), worse(&e, off_act(o2, rounded(w[0], nq), nq), "o without lse");
    worse(&e, relative(got, want, nl), "lse"), worse(&e, off_act(dq, rounded(w[1], nq), nq), "dq");
    worse(&e, off_act(dk, rounded(w[2], nk), nk), "dk"), worse(&e, off_act(dv, rounded(w[3], nk), nk), "dv");
    worst_row(&e, 5e-6, "attention, %s, %d heads of %d", name, heads, hd);
}

static void check_pixels_and_words(void) {
    int B = 2, C = 3, T = 2, H = 3, W = 5, L = 7, V = 5, ids[14] = {1, 4, 4, -1, 0, 2, 2, 4, 1, -1, -1, 2, 0, 4};
    size_t n = (size_t)(T * H * W), count = (size_t)B * 4 * (size_t)C * n;
    for (int first = 0; first < 2; first++) {
        float *x = noise(1, count, 1), *want = floats(count), *back = spoiled(count);
        for (int b = 0; b < B; b++)
            for (int c = 0; c < C; c++)
                for (int t = 0; t < T; t++)
                    for (int y = 0; y < 2 * H; y++)
                        for (int z = 0; z < 2 * W; z++) {
                            int column = first ? c * 4 + y % 2 * 2 + z % 2 : (y % 2 * 2 + z % 2) * C + c;
                            want[(b * (int)n + (t * H + y / 2) * W + z / 2) * 4 * C + column] =
                                x[(((b * C + c) * T + t) * 2 * H + y) * 2 * W + z];
                        }
        act *rows = spoiled_act(count), *some = spoiled_act((size_t)B * 9 * 4 * (size_t)C);
        latent_to_rows(rows, up(x, count), B, C, T, H, W, 0, n, first);
        latent_to_rows(some, up(x, count), B, C, T, H, W, 4, 9, first);
        rows_to_latent(back, rows, B, C, T, H, W, first);
        bool slice = true;
        want = as_act(want, count);
        float *part = down_act(some, (size_t)B * 9 * 4 * (size_t)C);
        for (int b = 0; b < B; b++)
            slice = slice && same_bits(part + b * 9 * 4 * C, want + (b * (int)n + 4) * 4 * C, (size_t)(9 * 4 * C));
        row(off_act(rows, want, count) + !slice + off(back, as_act(x, count), count), 0,
            "latent <-> rows, %s first, part of the tokens", first ? "channels" : "pixels");
    }
    float *table = noise(2, (size_t)(V * 4), 1), *pos = noise(3, (size_t)(L * 4), 1), *dy = noise(4, 14 * 4, 1),
          *want = floats(14 * 4), *grad = noise(5, (size_t)(V * 4), 1);
    float *dtable = up(grad, (size_t)(V * 4));
    for (int r = 0; r < 14; r++)
        for (int i = 0; i < 4 && ids[r] >= 0; i++)
            want[r * 4 + i] = table[ids[r] * 4 + i] + pos[r % L * 4 + i], grad[ids[r] * 4 + i] += dy[r * 4 + i];
    act *y = spoiled_act(14 * 4);
    embed_forward(y, up(table, (size_t)(V * 4)), up(pos, (size_t)(L * 4)), to_device(ids, 14), 14, L, 4);
    embed_backward(dtable, up_act(dy, 14 * 4), to_device(ids, 14), 14, V, 4);
    Worst e = nothing_yet();
    worse(&e, off_act(y, want, 14 * 4), "forward"), worse(&e, off(dtable, grad, (size_t)(V * 4)), "backward");
    worst_row(&e, 1e-6, "words");
}

static void check_elementwise(void) {
    size_t n = 10007;
    float *x = noise(1, n, 1), *z = noise(2, n, 1), *want = floats(n), *only = floats(n), *slope2 = floats(n),
          *y = spoiled(n), *y2 = spoiled(n), *d = spoiled(n);
    double squares = 0, distance = 0;
    for (size_t i = 0; i < n; i++) {
        squares += (double)x[i] * x[i], distance += ((double)x[i] - z[i]) * ((double)x[i] - z[i]);
        want[i] = (float)(1.5 * x[i] - 0.7 * z[i]), only[i] = 1.5f * x[i],
        slope2[i] = (float)(2 * ((double)x[i] - z[i]) / (double)n);
    }
    float *xd = up(x, n), *zd = up(z, n);
    lincomb(y, 1.5f, xd, -0.7f, zd, n), lincomb(y2, 1.5f, xd, 0, NULL, n);
    Worst e = nothing_yet();
    worse(&e, off(y, want, n), "lincomb"), worse(&e, off(y2, only, n), "scaled"),
        worse(&e, fabs(sum_squares(xd, NULL, n) / squares - 1), "sum of squares");
    worse(&e, fabs(sum_squares(xd, zd, n) / distance - 1), "squared distance"),
        worse(&e, fabs(mse(d, xd, zd, n) * (double)n / distance - 1), "mse");
    worse(&e, off(d, slope2, n), "d mse");
    worst_row(&e, 1e-6, "lincomb, sums, mse");
}

// Two steps of the formula, with a scaled gradient and no average.
static void check_adamw_formula(void) {
    size_t n = 101;
    float *w = noise(1, n, 1), *g = noise(2, n, 1), *wd = up(w, n), *md = up(w, n), *vd, *v = floats(n);
    double *W = doubles(w, n), *M = doubles(w, n), *V = (double *)xalloc(n, sizeof(double));
    for (size_t i = 0; i < n; i++) V[i] = v[i] = w[i] * w[i];
    vd = up(v, n);
    for (int t = 7; t < 9; t++) {
        adamw(wd, md, vd, NULL, up(g, n), n, 0.25f, 0.01f, 0.9, 0.99, 1e-6f, 0.1f, 0, t);
        for (size_t i = 0; i < n; i++) {
            double gi = 0.25 * g[i];
            M[i] = 0.9 * M[i] + 0.1 * gi, V[i] = 0.99 * V[i] + 0.01 * gi * gi;
            W[i] -= 0.01 * (0.1 * W[i] + M[i] / (1 - pow(0.9, t)) / (sqrt(V[i] / (1 - pow(0.99, t))) + 1e-6));
        }
    }
    Worst e = nothing_yet();
    worse(&e, off(wd, rounded(W, n), n), "w"), worse(&e, off(md, rounded(M, n), n), "m"),
        worse(&e, off(vd, rounded(V, n), n), "v");
    worst_row(&e, 1e-6, "adamw, scaled gradient, no average");
}

static void check_ops(void) {
    check_linear(1, 1, 1), check_linear(7, 5, 3), check_linear(37, 70, 29), check_linear(131, 33, 517),
        check_linear(300, 64, 64);
    check_activations();
    check_modulation(5), check_modulation(1);
    check_norm(true, true, false), check_norm(true, false, true), check_norm(false, true, false),
        check_norm(false, false, true);
    check_gathers();
    check_rmsnorm_rope(true), check_rmsnorm_rope(false);
    const int self[] = {0, 5, 5, 38, 39, 203}, q[] = {0, 70, 70, 71, 81}, k[] = {0, 9, 13, 13, 210}, one[] = {0, 300};
    check_attention("self, ragged, one empty", 5, self, self, 3, 6, 1);
    check_attention("cross, no queries or no keys", 4, q, k, 2, 10, 1);
    check_attention("self, 300 tokens, large scores", 1, one, one, 1, 40, 3);
    check_pixels_and_words();
    check_elementwise();
    check_adamw_formula();
}

// ============================================================================================================
// golden/: what a file is, is seen from what it holds
// ============================================================================================================
// The values of a tensor, F32, I32 or U8, as floats; NaN allowed.
__attribute__((format(printf, 3, 4)))
static float *golden(const File *f, size_t *count, const char *format, ...) {
    char name[160];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    const FileTensor *t = file_find(f, name);
    if (!t) die("%s: no tensor %s, which a file of this kind has; make the file again", f->path, name);
    float *x = floats(t->count);
    for (size_t i = 0; i < t->count; i++) {
        int32_t whole;
        if (!strcmp(t->dtype, "F32")) { memcpy(&x[i], t->data + 4 * i, 4); continue; }
        if (!strcmp(t->dtype, "I32")) { memcpy(&whole, t->data + 4 * i, 4); x[i] = (float)whole; continue; }
        x[i] = t->data[i];
    }
    if (count) *count = t->count;
    return x;
}
static double number(const File *f, const char *key) {
    const char *text = file_meta(f, key);
    if (!text) die("%s: no \"%s\" in its metadata, which a file of this kind has; make the file again", f->path, key);
    return atof(text);
}
static double golden_error(const File *f, const float *device, const char *name) {
    size_t n;
    float *want = golden(f, &n, "%s", name);
    return off(device, want, n);
}
static double golden_error_act(const File *f, const act *device, const char *name) {
    size_t n;
    float *want = golden(f, &n, "%s", name);
    return off_act(device, want, n);
}

// The file's model under a config (its own, or with HiF8 off); rank > 0: with adapters.
static Run *golden_run(const File *f, const Config *c, Ranks *k, int B, bool training, int rank, double alpha) {
    Model *m = model_layout(c);
    if (rank) lora_new(m, rank, alpha, 0);
    model_allocate(m, training);
    for (int i = 0; i < m->params; i++) {
        param_find(f, &m->param[i]);
        param_set(m, &m->param[i], golden(f, NULL, "%s", m->param[i].name));
    }
    return run_new(m, k, B, c->T, c->H_l / 2, c->W_l / 2, training, NULL);
}

static void spoil_run(Run *r) { // every buffer of activations, before anything is in it
    size_t bytes;
    free(run_new(r->m, r->ranks, r->B, r->T, r->H, r->W, r->training, &bytes));
    spoil(r->saved[0].x0, bytes);
}

// Tokens that the ranks hold in a pattern's order -> all tokens in the original order; and the way back.
static float *original_order(const Run *r, const float *x, int place) {
    size_t D = (size_t)r->m->c.dim, first = (size_t)r->pattern[place].first[r->ranks->rank];
    float *y = floats(r->N * D);
    for (size_t j = 0; j < r->n[place]; j++)
        memcpy(y + (size_t)r->pattern[place].order[first + j] * D, x + j * D, D * sizeof(float));
    float *all = up(y, r->N * D);
    sum_over_ranks(r->ranks, all, r->N * D, false);
    return down(all, r->N * D);
}
static float *stream_get(const Run *r, int i) {                     // the residual stream before block i
    int place = r->saved[i].place;
    return original_order(r, down(r->saved[i].x0, r->n[place] * (size_t)r->m->c.dim), place);
}
static void stream_put(Run *r, int i, const float *x) {
    const Pattern *p = &r->pattern[r->saved[i].place];
    size_t D = (size_t)r->m->c.dim, first = (size_t)p->first[r->ranks->rank], n = r->n[r->saved[i].place];
    float *y = floats(n * D);
    for (size_t j = 0; j < n; j++) memcpy(y + j * D, x + (size_t)p->order[first + j] * D, D * sizeof(float));
    upload(r->saved[i].x0, y, n * D * sizeof(float));
}

static void golden_forward(Run *r, const File *f) {
    double t = golden(f, NULL, "input.t")[0];
    size_t n;
    float *x = golden(f, &n, "input.latent");
    Text text = {NULL, golden(f, NULL, "input.text")};
    spoil_run(r);
    text_set(r, text);
    forward(r, up(x, n), &t);
}

static void check_activations_of(Run *r, const File *f, const char *name, double limit, bool loose) {
    const char *const names[] = {"act.sin", "act.e", "act.e0", "act.context", "act.patch"};
    size_t tokens;
    float *patch = golden(f, &tokens, "act.patch"),
          *got = original_order(r, down_act(r->tokens, r->n[FULL] * (size_t)r->m->c.dim), FULL);
    double error[] = {golden_error_act(f, r->sin, names[0]), golden_error(f, r->e, names[1]),
                      golden_error(f, r->e0, names[2]), golden_error_act(f, r->context, names[3]),
                      relative(got, patch, tokens)};
    Worst w = nothing_yet(), blocks = nothing_yet();
    for (int i = 0; i < 5; i++) worse(&w, error[i], names[i]);
    worst_row(&w, 1e-5, "%s: act.sin, e, e0, context, patch,", name);
    for (int i = 0; i < r->m->c.num_layers && !loose; i++) {
        char block[32];
        size_t n;
        snprintf(block, sizeof block, "act.block.%d", i);
        float *want = golden(f, &n, "%s", block);
        worse(&blocks, relative(stream_get(r, i + 1), want, n), block);
    }
    worst_row(&blocks, limit, "%s: act.block.*", name);
}

// d loss of every parameter, of the latent and of the text; loose: all parameters as one vector.
static void check_gradients_of(Run *r, const File *f, const char *name, const float *dlatent, bool loose) {
    Worst w = nothing_yet(), inputs = nothing_yet();
    double difference = 0, norm = 0;
    sum_over_ranks(r->ranks, r->m->dw, r->m->count, false);
    for (int i = 0; i < r->m->params; i++) {
        Param *p = &r->m->param[i];
        float *got = down(p->dw, p->count), *want = golden(f, NULL, "grad.%s", p->name);
        worse(&w, relative(got, want, p->count), p->name);
        for (size_t j = 0; j < p->count; j++)
            difference += pow((double)got[j] - want[j], 2), norm += (double)want[j] * want[j];
    }
    if (loose) row(sqrt(difference / norm), tally.half ? 1e-1 : 5e-2, "%s: grad.* as one vector", name);
    else worst_row(&w, 1e-4, "%s: grad.*", name);
    if (loose) return;
    worse(&inputs, golden_error(f, dlatent, "grad.input.latent"), "latent");
    if (r->ranks->rank == 0) worse(&inputs, golden_error_act(f, r->dtext, "grad.input.text"), "text");
    worst_row(&inputs, 1e-4, "%s: grad.input.*", name);
}

// HiF8 without margins: each block from its golden input; past a value on a rounding boundary nothing else can agree.
static void check_block_by_block(Run *r, const File *f, const char *name) {
    const Config *c = &r->m->c;
    Worst w = nothing_yet();
    size_t n;
    float *e0 = golden(f, &n, "act.e0");
    upload(r->e0, e0, n * sizeof(float));
    float *context = golden(f, &n, "act.context");
    to_act(r->context, up(context, n), n);
    quantize(r, r->context_q, r->context, n, 15);
    for (int i = 0; i < c->num_layers; i++) {
        char block[32];
        snprintf(block, sizeof block, "act.block.%d", i);
        stream_put(r, i, i ? golden(f, NULL, "act.block.%d", i - 1) : golden(f, NULL, "act.patch"));
        spoil(r->saved[i + 1].x0, r->n[r->saved[i + 1].place] * (size_t)c->dim * sizeof(float));
        block_forward(r, i);
        float *want = golden(f, &n, "%s", block);
        worse(&w, relative(stream_get(r, i + 1), want, n), block);
    }
    worst_row(&w, 2e-3, "%s: each block from its golden input,", name);
}

// What products read of a matrix must be Q(W; 15), bit for bit.
static void check_quantized_weights(const Model *m, const char *name) {
    int wrong = 0;
    for (int i = 0; i < m->params; i++) {
        const Param *p = &m->param[i];
        if (!p->block_matrix) continue;
        const float *w = as_act(down(p->w, p->count), p->count);
        const float *want = as_act(nearest_tensor(w, p->count, 15), p->count);
        wrong += !same_bits(down_act(p->c, p->count), want, p->count);
    }
    row(wrong, 0, "%s: block matrices that are not Q(W; 15), bit for bit", name);
}

static void check_flow_inputs(const File *f, const char *name) {
    size_t n;
    float *x0 = golden(f, &n, "input.x0"), *eps = golden(f, NULL, "input.noise"),
          sigma = golden(f, NULL, "input.sigma")[0];
    float *x = spoiled(n), *target = spoiled(n);
    lincomb(x, sigma, up(eps, n), 1 - sigma, up(x0, n), n);
    lincomb(target, 1, up(eps, n), -1, up(x0, n), n);
    Worst w = nothing_yet();
    worse(&w, golden_error(f, x, "input.latent"), "latent"), worse(&w, golden_error(f, target, "target"), "target");
    worse(&w, fabs(1000.0 * sigma / golden(f, NULL, "input.t")[0] - 1), "t");
    worst_row(&w, 1e-6, "%s: flow matching's inputs,", name);
}

static void check_unit_linear(const File *f, const char *name);
static void check_unit_attention(const File *f, const char *name);

static void check_dit(const File *f, const char *name, Ranks *k) {
    Config c = config_read(f);
    bool loose = c.quant && (tally.half || !file_meta(f, "margin"));
    if (tally.half && !c.quant && c.num_full_blocks == c.num_layers) {
        skip(name, "gates of 0.002 are a difference of 0.37s: beyond bfloat16,");
        return;
    }
    if (c.num_heads % k->size || (c.num_full_blocks < c.num_layers && c.sparse_ratio * c.sparse_ratio % k->size)) {
        skip(name, "cannot be shared by so many ranks,");
        return;
    }
    Run *r = golden_run(f, &c, k, 1, true, 0, 0);
    double limit = loose ? tally.half ? 1e-1 : 5e-2 : 1e-5;
    size_t n;
    float *target = golden(f, &n, "target"), *dout = spoiled(n),
          *dlatent = spoiled(n * (size_t)c.in_dim / (size_t)c.out_dim);
    golden_forward(r, f);
    check_activations_of(r, f, name, limit, loose);
    row(golden_error(f, r->out, "output"), limit, "%s: output", name);
    double loss = mse(dout, r->out, up(target, n), n);
    row(fabs(loss / golden(f, NULL, "loss")[0] - 1), loose ? 5e-3 : 1e-5, "%s: loss", name);
    backward(r, dlatent, dout);
    check_gradients_of(r, f, name, dlatent, loose);
    if (c.quant) check_quantized_weights(r->m, name);
    if (loose) check_block_by_block(r, f, name);
    Run *light = golden_run(f, &c, k, 1, false, 0, 0);                  // sampling shares buffers between blocks
    golden_forward(light, f);
    row(golden_error(f, light->out, "output"), limit, "%s: output without what backward keeps", name);
    if (file_find(f, "output.unquantized")) {
        Config plain = c;
        plain.quant = plain.quant_attn = 0;
        r = golden_run(f, &plain, k, 1, false, 0, 0);
        golden_forward(r, f);
        row(golden_error(f, r->out, "output.unquantized"), 1e-5, "%s: output with HiF8 off", name);
    }
    if (file_find(f, "input.x0")) check_flow_inputs(f, name);
    if (tally.half && file_find(f, "unit.linear.x")) {
        skip(name, "one layer's operands have float32's boundaries,");
        return;
    }
    if (file_find(f, "unit.linear.x")) check_unit_linear(f, name);
    if (file_find(f, "unit.attn.q")) check_unit_attention(f, name);
}

// Operands after Q: equal, or the value before Q lies within float32 rounding of the middle between the two.
static void operands_row(const File *f, const char *name, const char *unit, int count, const char *const *names,
                         float *const *got, float *const *before, const float *scales) {
    int boundary = 0, wrong = 0;
    size_t all = 0, n;
    for (int i = 0; i < count; i++) {
        float *want = golden(f, &n, "%s", names[i]), most = 0;
        for (size_t j = 0; j < n; j++) most = fmaxf(most, fabsf(before[i][j]));
        for (size_t j = 0; j < n; j++) {
            if (got[i][j] == want[j]) continue;
            double middle = ((double)got[i][j] + want[j]) / 2, k = scales[i] / most;
            bool next = fabsf(nearest_hif8((float)(middle * k * (1 + 1e-6))) -
                              nearest_hif8((float)(middle * k * (1 - 1e-6)))) > 0;
            if (next && fabs(before[i][j] / middle - 1) < 3e-6) boundary++; else wrong++;
        }
        all += n;
    }
    row(wrong, 0, "%s: %s: Q of %zu values, %d differ on a boundary; elsewhere", name, unit, all, boundary);
}

// One quantized layer through the model's own functions.
static void check_unit_linear(const File *f, const char *name) {
    Model m;
    Run r;
    Param w, b;
    Linear l = {&w, &b};
    Ranks alone;
    memset(&m, 0, sizeof m), memset(&r, 0, sizeof r), memset(&w, 0, sizeof w), memset(&b, 0, sizeof b),
        memset(&alone, 0, sizeof alone);
    size_t nx, nw, nb, ny;
    float *x = golden(f, &nx, "unit.linear.x"), *wx = golden(f, &nw, "unit.linear.w"),
          *bx = golden(f, &nb, "unit.linear.b"), *dyx = golden(f, &ny, "unit.linear.dy");
    alone.size = alone.halves = 1;
    m.c.quant = 1, m.amax = spoiled(1);
    r.m = &m, r.ranks = &alone;
    w.rank = 2, w.shape[0] = nb, w.shape[1] = nw / nb, w.count = nw, w.block_matrix = w.product = true;
    w.w = up(wx, nw), w.dw = (float *)device_alloc(nw * sizeof(float)), w.c = spoiled_act(nw);
    b.rank = 1, b.shape[0] = b.count = nb, b.w = up(bx, nb), b.dw = (float *)device_alloc(nb * sizeof(float));
    act *xq = up_act(x, nx), *y = spoiled_act(ny), *dy = up_act(dyx, ny), *dx = spoiled_act(nx);
    param_prepare(&m, &w, w.w);
    quantize(&r, xq, xq, nx, 15);
    linear(y, xq, &l, ny / nb);
    linear_back(&r, dx, dy, xq, &l, ny / nb, false);
    const char *const names[] = {"unit.linear.xq", "unit.linear.wq", "unit.linear.dyq"};
    float *got[] = {down_act(xq, nx), down_act(w.c, nw), down_act(dy, ny)}, *before[] = {x, wx, dyx};
    const float scales[] = {15, 15, 224};
    operands_row(f, name, "unit.linear", 3, names, got, before, scales);
    Worst e = nothing_yet();
    worse(&e, golden_error_act(f, y, "unit.linear.y"), "y"), worse(&e, golden_error_act(f, dx, "unit.linear.dx"), "dx");
    worse(&e, golden_error(f, w.dw, "unit.linear.dw"), "dw"), worse(&e, golden_error(f, b.dw, "unit.linear.db"), "db");
    worst_row(&e, 1e-6, "%s: unit.linear", name);
}

static void check_unit_attention(const File *f, const char *name) {
    static const char *const in[] = {"q", "k", "v", "dq_raw", "dk_raw", "dv_raw"};
    static const char *const out[] = {"unit.attn.qq", "unit.attn.kq", "unit.attn.vq",
                                      "unit.attn.dq", "unit.attn.dk", "unit.attn.dv"};
    const FileTensor *shape = file_find(f, "unit.attn.q");
    int heads = (int)shape->shape[1], hd = (int)shape->shape[2], q[] = {0, (int)shape->shape[0]},
        k[] = {0, (int)file_find(f, "unit.attn.k")->shape[0]};
    Sequences s = {1, q, k, to_device(q, 2), to_device(k, 2)};
    float *before[6], *got[6], scales[6], *m = spoiled(1);
    act *a[6];
    size_t n[6], no;
    Worst e = nothing_yet();
    for (int i = 0; i < 6; i++) {
        before[i] = golden(f, &n[i], "unit.attn.%s", in[i]);
        a[i] = up_act(before[i], n[i]);
        scales[i] = i < 3 ? 15 : 224;
        absmax(m, a[i], n[i]);
        hif8_tensor(a[i], a[i], n[i], scales[i], m);
        got[i] = down_act(a[i], n[i]);
    }
    operands_row(f, name, "unit.attn", 6, out, got, before, scales);
    float *dout = golden(f, &no, "unit.attn.do"), *lse = spoiled(no);
    act *o = spoiled_act(no), *d[] = {spoiled_act(n[0]), spoiled_act(n[1]), spoiled_act(n[2])};
    attention_forward(o, lse, a[0], a[1], a[2], &s, heads, hd);
    attention_backward(d[0], d[1], d[2], up_act(dout, no), a[0], a[1], a[2], o, lse, &s, heads, hd);
    worse(&e, golden_error_act(f, o, "unit.attn.o"), "o");
    for (int i = 0; i < 3; i++) worse(&e, off_act(d[i], before[3 + i], n[i]), in[3 + i]);
    worst_row(&e, 1e-6, "%s: unit.attn", name);
}

static void check_hif8_file(const File *f, const char *name) {
    float decode[256], y;
    size_t n;
    char error[256];
    float *x = golden(f, &n, "x"), *code = golden(f, NULL, "code"), *want = golden(f, NULL, "y");
    int codes = 0, values = 0, table = 0, tensor = 0;
    if (!read_raw(error, decode, file_find(f, "decode"), "F32", 256)) die("%s: %s", f->path, error);
    for (int i = 0; i < 256; i++) y = hif8_decode((uint8_t)i), table += !same_bits(&y, &decode[i], 1);
    for (size_t i = 0; i < n; i++) {
        codes += hif8_encode(x[i]) != (uint8_t)code[i];
        y = hif8_round(x[i]), values += !same_bits(&y, &want[i], 1);
    }
    row(table, 0, "%s: the value of all 256 codes", name);
    row(codes + values, 0, "%s: %zu codes and values, bit for bit", name, n);
    float *one = spoiled(1), fifteen = 15;
    act *q = up_act(x, n);
    upload(one, &fifteen, sizeof one[0]);
    hif8_tensor(q, q, n, 15, one);
    if (act_size() == sizeof(float)) tensor = !same_bits(down_act(q, n), want, n);
    row(tensor, 0, "%s: the same through hif8_tensor", name);
}

static int differing(const int *a, const float *b, size_t n) {
    int wrong = 0;
    for (size_t i = 0; i < n; i++) wrong += a[i] != (int)b[i];
    return wrong;
}

static void check_skiparse_file(const File *f, const char *name) {
    static const char *const KIND[] = {"", "token", "group"};
    int T, H, W, P, used;
    for (const char *at = file_meta(f, "cases"); sscanf(at, "%d,%d,%d,%d %n", &T, &H, &W, &P, &used) == 4; at += used) {
        char prefix[64];
        size_t N = (size_t)(T * H * W), n, lens;
        Pattern p[PATTERNS];
        int wrong = 0;
        snprintf(prefix, sizeof prefix, "T%dH%dW%dP%d", T, H, W, P);
        for (int i = 0; i < PATTERNS; i++) pattern_init(&p[i], i, T, H, W, P, 1);
        for (int i = TOKEN_WISE; i <= GROUP_WISE; i++) {
            float *order = golden(f, &n, "%s.%s_order", prefix, KIND[i]),
                  *len = golden(f, &lens, "%s.%s_lens", prefix, KIND[i]);
            wrong += n != N || differing(p[i].order, order, N) || (size_t)p[i].count != lens;
            for (size_t j = 0; j < lens; j++) wrong += p[i].start[j + 1] - p[i].start[j] != (int)len[j];
            for (size_t j = 0; j < N; j++) wrong += p[i].order[p[i].place[j]] != (int)j;
            Exchange in, out, other;
            int to = i == TOKEN_WISE ? GROUP_WISE : TOKEN_WISE;
            exchange_init(&in, &p[FULL], &p[i], 1, 0, 1), exchange_init(&out, &p[i], &p[FULL], 1, 0, 1),
                exchange_init(&other, &p[i], &p[to], 1, 0, 1);
            wrong += differing(in.pack, order, N) +
                     differing(other.pack, golden(f, NULL, "%s.%s_to_%s", prefix, KIND[i], KIND[to]), N);
            for (size_t j = 0; j < N; j++) wrong += in.pack[out.pack[j]] != (int)j;
        }
        row(wrong, 0, "%s: %s, orders, lengths, entry, exchanges, exit", name, prefix);
        if (*(at + used) == 0) break;
    }
}

static void check_sampler(const File *f, const char *name, Ranks *k) {
    Config c = config_read(f);
    if (c.num_heads % k->size) { skip(name, "cannot be shared by so many ranks,"); return; }
    int S = (int)number(f, "S");
    double shift = number(f, "shift"), g = number(f, "guidance"),
           *sigma = (double *)xalloc((size_t)S + 52, sizeof(double)), *fifty = sigma + S + 1;
    size_t n, count;
    Worst e = nothing_yet(), velocity = nothing_yet(), x_rows = nothing_yet(), learn = nothing_yet();
    schedule(sigma, S, shift), schedule(fifty, 50, 7);
    worse(&e, relative(rounded(sigma, (size_t)S + 1), golden(f, NULL, "sigmas"), (size_t)S + 1), "sigmas");
    worse(&e, relative(rounded(fifty, 51), golden(f, NULL, "sigmas50"), 51), "sigmas50");
    float *timesteps = golden(f, &count, "timesteps"), *tokens = golden(f, &count, "train.tokens"),
          *normal = golden(f, NULL, "train.normal");
    for (int i = 0; i < S; i++) worse(&e, fabs(1000 * sigma[i] / timesteps[i] - 1), "timesteps");
    for (size_t i = 0; i < count; i++) {
        double s = train_shift((int)tokens[i]);
        worse(&learn, fabs(s / golden(f, NULL, "train.shift")[i] - 1), "shift");
        worse(&learn, fabs(shift_sigma(1 / (1 + exp(-(double)normal[i])), s) / golden(f, NULL, "train.sigma")[i] - 1),
              "sigma");
    }
    worst_row(&e, 1e-6, "%s: sigmas and timesteps,", name);
    worst_row(&learn, 1e-6, "%s: training's shift and sigma,", name);
    Run *r = golden_run(f, &c, k, 1, false, 0, 0);
    float *start = golden(f, &n, "noise"), *x = up(start, n), *v = spoiled(n), *whole = up(start, n);
    Text cond = {NULL, golden(f, NULL, "text_cond")}, uncond = {NULL, golden(f, NULL, "text_uncond")};
    spoil_run(r);
    guided_velocity(r, v, x, sigma[0], cond, uncond, 1), worse(&velocity, golden_error(f, v, "v.cond"), "v.cond");
    guided_velocity(r, v, x, sigma[0], cond, uncond, 0), worse(&velocity, golden_error(f, v, "v.uncond"), "v.uncond");
    for (int i = 0; i < S; i++) {
        char step[16];
        snprintf(step, sizeof step, "x.%d", i + 1);
        guided_velocity(r, v, x, sigma[i], cond, uncond, g);
        lincomb(x, 1, x, (float)(sigma[i + 1] - sigma[i]), v, n);
        worse(&x_rows, golden_error(f, x, step), step);
    }
    sample(r, whole, cond, uncond, S, shift, g);
    worst_row(&velocity, 1e-5, "%s: velocities,", name);
    worst_row(&x_rows, 1e-5, "%s: x after each step,", name);
    char last[16];
    snprintf(last, sizeof last, "x.%d", S);
    row(golden_error(f, whole, last), 1e-5, "%s: sample(), all %d steps", name, S);
}

static void check_adamw_file(const File *f, const char *name) {
    size_t n;
    float *start = golden(f, &n, "param"), *w = up(start, n), *m = (float *)device_alloc(n * sizeof(float)),
          *v = (float *)device_alloc(n * sizeof(float)), *ema = up(start, n);
    Worst e = nothing_yet();
    for (int i = 1; i <= 3; i++) {
        const char *const names[] = {"param", "m", "v", "ema"};
        const float *const got[] = {w, m, v, ema};
        adamw(w, m, v, ema, up(golden(f, NULL, "grad.%d", i), n), n, 1, (float)number(f, "lr"), number(f, "beta1"),
              number(f, "beta2"), (float)number(f, "eps"), (float)number(f, "weight_decay"), number(f, "ema_decay"), i);
        for (int j = 0; j < 4; j++) {
            char tensor[24];
            snprintf(tensor, sizeof tensor, "%s.%d", names[j], i);
            worse(&e, golden_error(f, got[j], tensor), tensor);
        }
    }
    worst_row(&e, 1e-6, "%s: parameters, moments, average of 3 steps,", name);
}

static void check_advantages(const File *f, const char *name, const char *prefix) {
    size_t n;
    float *reward = golden(f, &n, "%srewards", prefix), *want = golden(f, NULL, "%sadvantages", prefix);
    double *got = (double *)xalloc(n, sizeof(double));
    advantages(got, doubles(reward, n), (int)n);
    row(relative(rounded(got, n), want, n), 1e-6, "%s: %sadvantages of %zu rewards", name, prefix, n);
}

// One case of clip and β: the figures of each video and the gradient of every adapter.
static void check_policy_case(Run *r, const File *f, const char *name, int which, const float *x, const float *x_next,
                              double sigma, double sigma_next, Text cond, Text uncond) {
    char prefix[24], key[32];
    size_t G = (size_t)r->B, n;
    Lora *l = r->m->lora;
    snprintf(prefix, sizeof prefix, "case%d.", which);
    PolicyOptions o;
    memset(&o, 0, sizeof o);
    o.guidance = number(f, "guidance");
    snprintf(key, sizeof key, "%sclip", prefix), o.clip = number(f, key);
    snprintf(key, sizeof key, "%sbeta", prefix), o.beta = number(f, key);
    float *ref = golden(f, &n, "mean_ref"), *mean = spoiled(n), *dmean = spoiled(n),
          *ratio = golden(f, NULL, "%sratio", prefix);
    float *policy = golden(f, NULL, "%spolicy_loss", prefix), *clipped = golden(f, NULL, "%sclipped", prefix),
          *kl = golden(f, NULL, "kl_loss");
    Surrogate *out = (Surrogate *)xalloc(G, sizeof(Surrogate));
    zero(l->dw, l->n * sizeof(float));
    double loss =
        policy_step(r, out, mean, dmean, x, x_next, up(ref, n), sigma, sigma_next, cond, uncond,
                    doubles(golden(f, NULL, "advantages"), G), doubles(golden(f, NULL, "%slogp_old", prefix), G), &o);
    lora_backward(r->m);
    sum_over_ranks(r->ranks, l->dw, l->n, false);
    Worst figures = nothing_yet(), grad = nothing_yet();
    worse(&figures, fabs(loss - golden(f, NULL, "%sloss", prefix)[0]), "loss");
    for (size_t i = 0; i < G; i++) {
        worse(&figures, fabs(out[i].ratio - ratio[i]), "ratio"),
            worse(&figures, fabs(out[i].policy_loss - policy[i]), "policy_loss");
        worse(&figures, out[i].clipped == (clipped[i] != 0) ? 0 : 1, "clipped");
        worse(&figures, 0.5 * fabs(out[i].kl / kl[i] - 1), "kl_loss");                  // 1e-5, relative
    }
    for (int i = 0; i < 2 * l->count; i++) {
        const Param *p = &l->param[i];
        const char *layer = l->target[i / 2]->name;
        float *want = golden(f, &n, "%sgrad.lora.%.*s.%c", prefix, (int)(strlen(layer) - 7), layer, i % 2 ? 'B' : 'A');
        worse(&grad, off(p->dw, want, n), p->name);
    }
    worst_row(&figures, 5e-6, "%s: %sloss, ratio, policy_loss, clipped, kl,", name, prefix);
    worst_row(&grad, 1e-4, "%s: %sgrad.lora.*", name, prefix);
}

static void check_grpo(const File *f, const char *name, Ranks *k) {
    Config c = config_read(f);
    if (c.num_heads % k->size) { skip(name, "cannot be shared by so many ranks,"); return; }
    int G = (int)number(f, "group"), S = (int)number(f, "S"), at = (int)number(f, "index");
    double g = number(f, "guidance"), *sigma = (double *)xalloc((size_t)S + 1, sizeof(double));
    Run *r = golden_run(f, &c, k, G, true, (int)number(f, "lora_rank"), number(f, "lora_alpha"));
    Lora *l = r->m->lora;
    size_t n, text = (size_t)(c.text_len * c.text_dim);
    for (int i = 0; i < 2 * l->count; i++) {
        const Param *p = &l->param[i];
        const char *layer = l->target[i / 2]->name;
        float *w = golden(f, &n, "lora.%.*s.%c", (int)(strlen(layer) - 7), layer, i % 2 ? 'B' : 'A');
        upload(p->w, w, n * sizeof(float));
    }
    float *rows[] = {floats((size_t)G * text), floats((size_t)G * text)},
          *texts[] = {golden(f, NULL, "text_cond"), golden(f, NULL, "text_uncond")};
    for (int i = 0; i < 2 * G; i++) memcpy(rows[i / G] + (size_t)(i % G) * text, texts[i / G], text * sizeof(float));
    Text cond = {NULL, rows[0]}, uncond = {NULL, rows[1]};
    float *xh = golden(f, &n, "x"), *zh = golden(f, NULL, "z"), *nexth = golden(f, NULL, "x_next"),
          *logp = golden(f, NULL, "logp");
    float *x = up(xh, n), *mean = spoiled(n), *next = spoiled(n);
    size_t one = n / (size_t)G;
    schedule(sigma, S, 1);
    SdeStep step = sde_step(sigma[at], sigma[at + 1]);
    Worst e = nothing_yet(), figures = nothing_yet();
    worse(&e, relative(rounded(sigma, (size_t)S + 1), golden(f, NULL, "sigmas"), (size_t)S + 1), "sigmas");
    worse(&e, fabs(step.std / golden(f, NULL, "std")[0] - 1), "std");
    spoil_run(r);
    float scale = l->scale;
    l->scale = 0, weights_prepare(r->m);
    policy_mean(r, mean, x, sigma[at], sigma[at + 1], cond, uncond, g),
        worse(&e, golden_error(f, mean, "mean_ref"), "mean_ref");
    l->scale = scale, weights_prepare(r->m);
    policy_mean(r, mean, x, sigma[at], sigma[at + 1], cond, uncond, g),
        worse(&e, golden_error(f, mean, "mean"), "mean");
    lincomb(next, 1, mean, (float)step.std, up(zh, n), n), worse(&e, golden_error(f, next, "x_next"), "x_next");
    worst_row(&e, 1e-5, "%s: sigmas, std, mean, mean_ref, x_next,", name);
    next = up(nexth, n);
    for (int i = 0; i < G; i++)
        worse(&figures, fabs(log_probability(next + (size_t)i * one, mean + (size_t)i * one, step.std, one) - logp[i]),
              "logp");
    worst_row(&figures, 5e-6, "%s: log-probability,", name);
    for (int i = 0; i < 2; i++) check_policy_case(r, f, name, i, x, next, sigma[at], sigma[at + 1], cond, uncond);
    check_advantages(f, name, ""), check_advantages(f, name, "adv_big."), check_advantages(f, name, "adv_flat.");
}

static void check_golden_file(const char *folder, const char *file, Ranks *k) {
    char path[PATH_MAX], name[64];
    File f;
    snprintf(path, sizeof path, "%s/%s", folder, file);
    snprintf(name, sizeof name, "%.*s", (int)(strlen(file) - strlen(".safetensors")), file);
    if (!file_load(&f, path)) { row(1, 0, "%s: %.80s", file, f.error); return; }
    if (file_find(&f, "decode") && file_find(&f, "code")) check_hif8_file(&f, name);
    else if (file_meta(&f, "cases")) check_skiparse_file(&f, name);
    else if (file_find(&f, "ema.1")) check_adamw_file(&f, name);
    else if (file_find(&f, "rewards")) check_grpo(&f, name, k);
    else if (file_find(&f, "sigmas") && file_find(&f, "x.1")) check_sampler(&f, name, k);
    else if (file_find(&f, "output") && file_find(&f, "loss")) check_dit(&f, name, k);
    else skip(file, "is of no kind known here,");
    file_close(&f);
}

static int compare_names(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }
static void check_golden(const char *folder, Ranks *k) {
    DIR *d = opendir(folder);
    char *names[256];
    int count = 0;
    if (!d) die("--golden %s: %s; give the folder of reference numbers", folder, strerror(errno));
    for (struct dirent *e; (e = readdir(d)) && count < 256; )
        if (strlen(e->d_name) > 12 && !strcmp(e->d_name + strlen(e->d_name) - 12, ".safetensors"))
            names[count++] = strdup(e->d_name);
    closedir(d);
    if (!count) row(1, 0, "%s: no .safetensors there", folder);
    qsort(names, (size_t)count, sizeof names[0], compare_names);
    for (int i = 0; i < count; i++) check_golden_file(folder, names[i], k);
}

// ============================================================================================================
// The model beyond golden/: batches, repetition, resuming, files, ranks
// ============================================================================================================
static Config small_config(int vocab, int quant) {
    Config c;
    memset(&c, 0, sizeof c);
    c.dim = 24, c.ffn_dim = 40, c.num_heads = 2, c.num_layers = 8, c.num_full_blocks = 4, c.sparse_ratio = 2,
    c.in_dim = c.out_dim = 3;
    c.text_dim = 16, c.text_len = 12, c.freq_dim = 16, c.vocab = vocab, c.quant = c.quant_attn = quant, c.T = 3,
    c.H_l = 12, c.W_l = 20, c.eps = 1e-6;
    return c;
}
static Model *small_model(const Config *c, uint64_t seed) {
    Model *m = model_layout(c);
    model_allocate(m, true);
    for (int i = 0; i < m->params; i++) {
        Param *p = &m->param[i];
        float *w =
            noise(seed + (uint64_t)i, p->count, p->rank > 1 ? sqrt((double)p->shape[0] / (double)p->count) : 0.2);
        for (size_t j = 0; j < p->count && strstr(p->name, "norm") && strstr(p->name, "weight"); j++) w[j] += 1;
        param_set(m, p, w);
    }
    return m;
}

// Output, then every gradient, of samples first.. of a fixed batch.
typedef struct { size_t pixels, text; float *x, *dout, *rows; double t[2]; int ids[24]; } Questions;
static Questions questions(const Config *c) {
    Questions q;
    memset(&q, 0, sizeof q);
    q.pixels = (size_t)(c->in_dim * c->T * c->H_l * c->W_l), q.text = (size_t)(c->text_len * c->text_dim);
    q.x = noise(90, 2 * q.pixels, 1), q.dout = noise(91, 2 * q.pixels, 0.01), q.rows = noise(92, 2 * q.text, 1);
    q.t[0] = 700, q.t[1] = 150;
    caption_ids(q.ids, 12, "a large red circle moving left on a black background"),
        caption_ids(q.ids + 12, 12, "a small blue square");
    return q;
}
static float *answer(Run *r, const Questions *q, int first) {
    size_t n = (size_t)r->B * q->pixels;
    float *all = floats(n + r->m->count);
    Text text = {q->ids + first * 12, q->rows + (size_t)first * q->text};
    zero(r->m->dw, r->m->count * sizeof(float));
    text_set(r, text);
    forward(r, up(q->x + (size_t)first * q->pixels, n), q->t + first);
    backward(r, NULL, up(q->dout + (size_t)first * q->pixels, n));
    download(all, r->out, n * sizeof(float)), download(all + n, r->m->dw, r->m->count * sizeof(float));
    return all;
}
static Run *small_run(Model *m, Ranks *alone, int B) {
    return run_new(m, alone, B, m->c.T, m->c.H_l / 2, m->c.W_l / 2, true, NULL);
}

static void check_batch(Ranks *alone) {
    Config c = small_config(0, 0);
    Model *m = small_model(&c, 100);
    Questions q = questions(&c);
    Run *two = small_run(m, alone, 2), *one = small_run(m, alone, 1);
    spoil_run(two), spoil_run(one);
    float *both = answer(two, &q, 0), *each[] = {answer(one, &q, 0), answer(one, &q, 1)};
    size_t n = q.pixels;
    Worst e = nothing_yet(), g = nothing_yet();
    worse(&e, relative(both, each[0], n), "first"), worse(&e, relative(both + n, each[1], n), "second");
    worst_row(&e, 3e-6, "a batch of 2 gives each sample's own output,");
    for (int i = 0; i < m->params; i++) {
        const Param *p = &m->param[i];
        worse(&g,
              relative(both + 2 * n + p->offset, sum_of(each[0] + n + p->offset, each[1] + n + p->offset, p->count),
                       p->count),
              p->name);
    }
    worst_row(&g, 1e-5, "a batch of 2 gives the sum of the gradients,");
}

// Loss of the model with its weights moved by h along a direction, for derivatives of what golden/ does not hold.
static double moved_loss(Run *r, const Questions *q, float *w, float h, const float *d) {
    Text text = {q->ids, q->rows};
    float *moved = spoiled(r->m->count), *keep = down(r->m->w, r->m->count);
    lincomb(moved, 1, w, h, d, r->m->count);
    copy(r->m->w, moved, r->m->count * sizeof(float));
    weights_prepare(r->m);
    text_set(r, text);
    forward(r, up(q->x, q->pixels), q->t);
    float *out = down(r->out, q->pixels);
    double loss = 0;
    for (size_t i = 0; i < q->pixels; i++) loss += (double)out[i] * q->dout[i];
    upload(r->m->w, keep, r->m->count * sizeof(float));
    return loss;
}
static void check_words_model(Ranks *alone) {
    Config c = small_config(VOCAB, 0);
    Model *m = small_model(&c, 300);
    Questions q = questions(&c);
    Run *r = small_run(m, alone, 1);
    float *got = answer(r, &q, 0) + q.pixels, *w = up(down(m->w, m->count), m->count);
    if (tally.half) { skip("a captioned model's slope along its gradient", "needs float32's differences,"); return; }
    for (int whole = 0; whole < 2; whole++) {
        float *d = floats(m->count);
        double norm = 0;
        for (size_t i = whole ? 0 : m->words->offset; i < (whole ? m->count : m->words->offset + m->words->count); i++)
            norm += (double)got[i] * got[i], d[i] = got[i];
        float h = (float)(2e-3 / sqrt(norm));
        double rate =
            (moved_loss(r, &q, w, h, up(d, m->count)) - moved_loss(r, &q, w, -h, up(d, m->count))) / (2 * (double)h);
        row(fabs(rate / norm - 1), 3e-3, "a captioned model's slope along its gradient, %s",
            whole ? "all weights" : "the word table");
    }
}

static void check_repetition(Ranks *alone) {
    for (int quant = 0; quant < 2; quant++) {
        Config c = small_config(0, quant);
        Model *m = small_model(&c, 200);
        Questions q = questions(&c);
        Run *r = small_run(m, alone, 2), *fresh = small_run(m, alone, 2);
        size_t n = 2 * q.pixels + m->count;
        float *first = answer(r, &q, 0);
        spoil_run(fresh);
        row(!same_bits(first, answer(r, &q, 0), n) + !same_bits(first, answer(fresh, &q, 0), n), 0,
            "output and gradients, run to run, bit for bit%s", quant ? ", HiF8" : "");
#ifdef _OPENMP
        int threads = omp_get_max_threads(), wrong = 0;
        for (int t = 1; t <= 4; t *= 2) omp_set_num_threads(t), wrong += !same_bits(first, answer(r, &q, 0), n);
        omp_set_num_threads(threads);
        row(wrong, 0, "output and gradients, 1, 2 and 4 threads, bit for bit%s", quant ? ", HiF8" : "");
#endif
    }
}

// HiF8 in attention alone: nothing after it would round dv again, so what was left unrounded shows. Rounding once more
// must change nothing (but the last bit of the scale).
static void check_attention_alone(Ranks *alone) {
    Config c = small_config(0, 1);
    c.quant = 0;
    Run *r = small_run(small_model(&c, 250), alone, 1);
    Questions q = questions(&c);
    answer(r, &q, 0);
    size_t n = r->N * (size_t)c.dim;
    const SavedAttention *s = &r->saved[3].self;
    const act *const rounded_ones[] = {s->q, s->k, s->v, r->d5};
    const char *const names[] = {"q", "k", "v", "dv"};
    Worst e = nothing_yet();
    for (int i = 0; i < 4; i++) {
        float *x = down_act(rounded_ones[i], n);
        worse(&e, relative(x, nearest_tensor(x, n, i < 3 ? 15 : 224), n), names[i]);
    }
    worst_row(&e, 1e-6, "HiF8 in attention alone: rounded once is rounded,");
}

// x_σ = σ·ε + (1 − σ)·x0, the target ε − x0, t = 1000σ, from the clips and draws that training names.
static void check_batch_fill(Ranks *alone) {
    Config c = small_config(VOCAB, 0);
    Run *r = small_run(small_model(&c, 1), alone, 3);
    TrainOptions o;
    memset(&o, 0, sizeof o);
    o.drop = 0.5, o.seed = 9;
    Batch a;
    batch_new(&a, r);
    size_t n = (size_t)(c.in_dim * c.T * c.H_l * c.W_l);
    int clips = 0, dropped = 0, held = 0, wrong = 0;
    Worst e = nothing_yet();
    for (int step = 5; step < 25; step++) {
        batch_fill(&a, r, &o, step);
        for (int b = 0; b < 3; b++) {
            uint64_t k = (uint64_t)(step * 3 + b);
            double sigma = a.t[b] / 1000, s = train_shift(60);
            float *x = floats(n), *target = floats(n), *x0 = floats(n);
            worse(&e, fabs(sigma / shift_sigma(1 / (1 + exp(-rng_normal(9, SIGMA_STREAM, k))), s) - 1), "sigma");
            for (size_t i = 0; i < n; i++) {
                double noise = a.target[(size_t)b * n + i] +
                               (a.x[(size_t)b * n + i] - sigma * a.target[(size_t)b * n + i]); // ε = x0 + target
                x0[i] = (float)(noise - a.target[(size_t)b * n + i]);
                x[i] = a.x[(size_t)b * n + i];
                target[i] = (float)(sigma * rng_normal(9, NOISE_STREAM, k * n + i) + (1 - sigma) * (double)x0[i]);
            }
            worse(&e, relative(x, target, n), "x");
            bool found = false;
            for (int caption = 0; caption < CAPTIONS && !found; caption++) {
                char text[128];
                int ids[12];
                draw_clip(target, scene_of(caption), 9, k, c.T, c.H_l, c.W_l);
                if (!(relative(x0, target, n) < 1e-4)) continue;
                found = true, clips++, held += held_out(caption);
                caption_text(text, sizeof text, scene_of(caption));
                caption_ids(ids, 12, text);
                if (a.ids[b * 12] < 0) { dropped++; caption_ids(ids, 12, ""); }
                wrong += memcmp(ids, a.ids + b * 12, sizeof ids) != 0;
            }
        }
    }
    worst_row(&e, 1e-5, "training's samples: sigma, x = sigma·noise + (1 − sigma)·clip,");
    row(abs(clips - 60) + wrong + held + (dropped < 15 || dropped > 45), 0,
        "training's samples: clips of their captions, none held out, half dropped");
}

static void train_some(Run *r, Optimizer *opt, const TrainOptions *o, int from, int to) {
    size_t n = (size_t)r->B * (size_t)r->m->c.out_dim * r->N * 4;
    float *x = spoiled(n), *target = spoiled(n), *dout = spoiled(n);
    Batch a;
    batch_new(&a, r);
    for (int step = from; step < to; step++) {
        batch_fill(&a, r, o, step), batch_upload(r, &a, x, target);
        train_step(r, &a, x, target, dout);
        optimizer_step(opt, r->ranks, o, learning_rate(o, step));
    }
}
static TrainOptions small_training(void) {
    TrainOptions o;
    memset(&o, 0, sizeof o);
    o.steps = 6, o.batch = 2, o.warmup = 2, o.lr = 2e-3, o.beta1 = 0.9, o.beta2 = 0.99, o.eps = 1e-8,
    o.weight_decay = 0.01, o.clip = 1, o.ema = 0.99, o.drop = 0.1, o.seed = 4;
    return o;
}
static void check_resume(Ranks *alone, const char *folder) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/state", folder);
    for (int quant = 0; quant < 2; quant++) {
        Config c = small_config(VOCAB, quant);
        TrainOptions o = small_training();
        Model *m[] = {small_model(&c, 500), small_model(&c, 500), small_model(&c, 900)};
        Optimizer opt[3];
        for (int i = 0; i < 3; i++) optimizer_init(&opt[i], m[i]->w, m[i]->dw, m[i]->count);
        train_some(small_run(m[0], alone, 2), &opt[0], &o, 0, 6);
        train_some(small_run(m[1], alone, 2), &opt[1], &o, 0, 3);
        state_save(path, &opt[1], "this run");
        bool loaded = state_load(path, &opt[2], "this run");
        train_some(small_run(m[2], alone, 2), &opt[2], &o, 3, 6);
        float *a[] = {opt[0].w, opt[0].m, opt[0].v, opt[0].ema}, *b[] = {opt[2].w, opt[2].m, opt[2].v, opt[2].ema};
        int wrong = !loaded + (opt[2].step != 6);
        for (int i = 0; i < 4; i++) wrong += !same_bits(down(a[i], m[0]->count), down(b[i], m[0]->count), m[0]->count);
        row(wrong, 0, "6 training steps = 3, saved, resumed, 3, bit for bit%s", quant ? ", HiF8" : "");
    }
    unlink(path);
}

static void check_optimizer(Ranks *alone) {
    size_t n = 1000;
    TrainOptions o = small_training();
    float *g = noise(1, n, 1), *w = noise(2, n, 1);
    double norm = 0, first = 0;
    for (size_t i = 0; i < n; i++) norm += (double)g[i] * g[i];
    Worst e = nothing_yet();
    for (int clipped = 0; clipped < 2; clipped++) {
        Optimizer a;
        optimizer_init(&a, up(w, n), up(g, n), n);
        o.clip = clipped ? 0.5 : 1e9;
        worse(&e, fabs(optimizer_step(&a, alone, &o, 1e-3) / sqrt(norm) - 1), "norm");
        float *m = floats(n), *ema = floats(n), *after = down(a.w, n);
        for (size_t i = 0; i < n; i++)
            m[i] = (float)(0.1 * g[i] * (clipped ? 0.5 / sqrt(norm) : 1)),
            ema[i] = 2 / 11.0f * w[i] + 9 / 11.0f * after[i];
        worse(&e, off(a.m, m, n), clipped ? "clipped" : "not clipped"), worse(&e, off(a.ema, ema, n), "average, young");
        worse(&e, sum_squares(a.dw, NULL, n), "gradient zeroed");
    }
    o.steps = 100, o.warmup = 10, o.lr = 1;
    first = 0.1 * (0.05 + 0.95 * 0.5 * 2);
    worse(&e, fabs(learning_rate(&o, 0) - first), "warm-up"), worse(&e, fabs(learning_rate(&o, 50) - 0.525), "cosine"),
        worse(&e, fabs(learning_rate(&o, 100) - 0.05), "end");
    worst_row(&e, 1e-6, "optimizer: norm, clipping, average, schedule,");
}

// What a tensor must be after a file that keeps it so: HiF8 codes, bfloat16 to the nearest (ties to even), or itself.
static float *as_stored(const float *x, size_t n, const char *dtype) {
    if (!strcmp(dtype, "U8")) return nearest_tensor(x, n, 15);
    float *y = floats(n);
    for (size_t i = 0; i < n; i++) {
        float low = bits_float(float_bits(x[i]) & 0xFFFF0000u),
              high = bits_float((float_bits(x[i]) & 0xFFFF0000u) + 0x10000u);
        double below = fabs((double)x[i] - low), above = fabs((double)high - x[i]);
        y[i] = strcmp(dtype, "BF16")                                               ? x[i]
               : below < above || (below == above && !(float_bits(low) >> 16 & 1)) ? low
                                                                                   : high;
    }
    return y;
}
static void check_checkpoints(Ranks *alone, const char *folder) {
    static const char *const KIND[] = {"f32", "bf16", "hif8"};
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    Config c = small_config(VOCAB, 1);
    Questions q = questions(&c);
    for (int kind = 0; kind < (tally.half ? 2 : 3); kind++) {               // bfloat16 rounds before HiF8 does
        Model *m = small_model(&c, 700), *read = model_layout(&c);
        int wrong = 0, codes = 0, halves = 0, matrices = 0;
        File f;
        model_save(path, m, m->w, KIND[kind]);
        file_open(&f, path);
        Config stored = config_read(&f);
        model_allocate(read, true);
        weights_read(read, &f);
        wrong += memcmp(&stored, &c, offsetof(Config, eps)) != 0 || stored.eps != c.eps;
        for (int i = 0; i < m->params; i++) {
            Param *p = &m->param[i], *back = &read->param[i];
            const char *dtype = file_find(&f, p->name)->dtype;
            float *want = as_stored(down(p->w, p->count), p->count, dtype);
            codes += !strcmp(dtype, "U8"), halves += !strcmp(dtype, "BF16"), matrices += p->block_matrix;
            wrong += !same_bits(want, down(back->w, p->count), p->count) + (!strcmp(dtype, "U8") && !p->block_matrix);
            if (!p->block_matrix) param_set(m, p, want); // so that the two models may be compared
            else if (kind == 2) wrong += !same_bits(down_act(p->c, p->count), down_act(back->c, p->count), p->count);
        }
        file_close(&f);
        wrong += codes != (kind == 2 ? matrices : 0) || (kind == 0) != (halves == 0);
        row(wrong, 0, "a %s checkpoint read back, bit for bit%s", KIND[kind],
            kind == 2 ? ": what the quantized layers used" : "");
        if (kind == 1) continue;
        float *got = answer(small_run(read, alone, 2), &q, 0), *want = answer(small_run(m, alone, 2), &q, 0);
        row(!same_bits(got, want, 2 * q.pixels + m->count), 0,
            "a %s checkpoint's output and gradients under HiF8 = its origin's, bit for bit", KIND[kind]);
    }
    c.quant = 0;
    Model *base = small_model(&c, 700), *other = small_model(&c, 700);
    lora_new(base, 4, 8, 3);
    size_t n = base->lora->n;
    upload(base->lora->w, noise(5, n, 0.1), n * sizeof(float));
    lora_save(path, base->lora, base->lora->w);
    lora_load(other, path);
    int wrong = other->lora->scale != base->lora->scale;
    for (int i = 0; i < 2 * base->lora->count; i++) {
        const Param *p = &base->lora->param[i], *q = &other->lora->param[i];
        wrong += !same_bits(down(p->w, p->count), down(q->w, p->count), p->count);
    }
    row(wrong, 0, "an adapter's file read back, bit for bit");
    unlink(path);
}

// The exchanges of R ranks, played in one process: what arrives must be what the one-rank order holds.
static void check_exchanges(void) {
    int wrong = 0, B = 2, cases[][4] = {{3, 6, 10, 2}, {2, 8, 8, 2}, {2, 9, 18, 3}, {1, 3, 2, 2}};
    for (int i = 0; i < 4; i++)
        for (int R = 1; R <= cases[i][3] * cases[i][3]; R++) {
            int T = cases[i][0], H = cases[i][1], W = cases[i][2], P = cases[i][3], N = T * H * W;
            if (P * P % R) continue;
            Pattern p[PATTERNS];
            for (int k = 0; k < PATTERNS; k++) pattern_init(&p[k], k, T, H, W, P, R);
            for (int from = 0; from < PATTERNS; from++)
                for (int to = 0; to < PATTERNS; to++) {
                    Exchange *e = (Exchange *)xalloc((size_t)R, sizeof(Exchange));
                    if (from == to) continue;
                    for (int r = 0; r < R; r++) exchange_init(&e[r], &p[from], &p[to], B, r, R);
                    for (int r = 0; r < R; r++) {
                        int *arrived = (int *)xalloc(e[r].received, sizeof(int)), at = 0,
                            mine = p[to].first[r + 1] - p[to].first[r];
                        for (int s = 0; s < R; s++) {
                            int offset = 0, own = p[from].first[s + 1] - p[from].first[s];
                            for (int before = 0; before < r; before++) offset += e[s].send[before];
                            wrong += e[s].send[r] != e[r].receive[s];
                            for (int j = 0; j < e[s].send[r]; j++) {
                                int place = e[s].pack[offset + j], b = place / own;
                                arrived[at++] = b * N + p[from].order[p[from].first[s] + place % own];
                            }
                        }
                        for (int j = 0; j < B * mine; j++)
                            wrong += arrived[e[r].unpack[j]] != j / mine * N + p[to].order[p[to].first[r] + j % mine];
                    }
                }
        }
    row(wrong, 0, "exchanges among 1 to 9 ranks, batch 2, every token where it belongs");
}

// ============================================================================================================
// The small world: ShapesBench on real clips, under their own captions and under others'
// ============================================================================================================
static void check_world(void) {
    static const double chance[] = {1 / 8.0, 1 / 4.0, 1 / 2.0, 1 / 5.0, 1 / 3.0};
    int sizes[][3] = {{4, 16, 16}, {8, 32, 32}}, held = 0, wrong = 0;
    for (int i = 0; i < 2; i++) {
        int T = sizes[i][0], H = sizes[i][1], W = sizes[i][2];
        float *x = floats(3 * (size_t)(T * H * W)), score[N_SCORES];
        double own = 0, other[N_SCORES] = {0}, soft[2] = {0};
        Worst e = nothing_yet();
        for (int caption = 0; caption < CAPTIONS; caption++) {
            Scene s = scene_of(caption), strange = scene_of((int)(rng_bits(5, 5, (uint64_t)caption) % CAPTIONS));
            draw_clip(x, s, 3, (uint64_t)caption, T, H, W);
            shapes_score(score, x, s, T, H, W, false);
            for (int k = 0; k < N_SCORES; k++) own += score[k] / N_SCORES / CAPTIONS;
            shapes_score(score, x, strange, T, H, W, false);
            for (int k = 0; k < N_SCORES; k++) other[k] += score[k] / CAPTIONS;
            for (int k = 0; k < 2; k++) {
                shapes_score(score, x, k ? strange : s, T, H, W, true);
                for (int j = 0; j < N_SCORES; j++) soft[k] += score[j] / N_SCORES / CAPTIONS;
            }
        }
        row(100 * (1 - own), 1, "ShapesBench, real clips of %dx%dx%d: 100 less the total, %.2f", T, H, W, 100 * own);
        for (int k = 0; k < 5; k++) worse(&e, 100 * fabs(other[k] - chance[k]), SCORE_NAMES[k]);
        worst_row(&e, 5, "ShapesBench, others' captions: points away from chance,");
        row(100 * (1 - soft[0]), 10, "ShapesBench soft, real clips: 100 less the total, %.2f (others' captions %.2f)",
            100 * soft[0], 100 * soft[1]);
        row(soft[1] > soft[0] - 0.2, 0, "ShapesBench soft, others' captions score lower");
    }
    for (int caption = 0; caption < CAPTIONS; caption++) {
        char text[128];
        Scene s = scene_of(caption), back;
        held += held_out(caption);
        caption_text(text, sizeof text, s);
        wrong += !parse_caption(&back, text) || memcmp(&s, &back, sizeof s);
    }
    row(wrong + (held != 96), 0, "960 captions, written and read; 96 held out");
}

// ============================================================================================================
// All of it
// ============================================================================================================
static int run_tests(const char *folder, bool ops_only, Ranks *ranks) {
    Ranks alone;
    char scratch_folder[] = "/tmp/osp_test_XXXXXX";
    memset(&alone, 0, sizeof alone);
    alone.size = alone.halves = 1;
    tally.silent = ranks->rank || ranks->half;
    tally.half = act_size() != sizeof(float);
    if (!tally.silent) printf("%-88s %9s %9s\n", "check", "measured", "limit");
    hif8_values();
    if (!ops_only && !mkdtemp(scratch_folder)) die("%s: %s; make room there", scratch_folder, strerror(errno));
    check_hif8_rules();
    check_ops();
    if (ops_only) return tally.failed;
    check_golden(folder, ranks);
    check_exchanges();
    check_batch(&alone);
    check_words_model(&alone);
    check_repetition(&alone);
    check_attention_alone(&alone);
    check_batch_fill(&alone);
    check_optimizer(&alone);
    check_resume(&alone, scratch_folder);
    check_checkpoints(&alone, scratch_folder);
    check_world();
    rmdir(scratch_folder);
    if (!tally.silent) printf("%d passed, %d failed, %d skipped\n", tally.passed, tally.failed, tally.skipped);
    return tally.failed;
}
// ============================================================================================================
// verify: the paper's claims, each beside what is computed or measured here
// ============================================================================================================
typedef struct { bool speak; int rows, failed; } Claims;

__attribute__((format(printf, 5, 6)))
static void claim(Claims *c, bool ok, const char *what, const char *paper, const char *format, ...) {
    char here[256];
    va_list args;
    va_start(args, format);
    vsnprintf(here, sizeof here, format, args);
    va_end(args);
    c->rows++, c->failed += !ok;
    if (c->speak) printf("| %-49s | %-15s | %-71s | %-3s |\n", what, paper, here, ok ? "yes" : "NO"), fflush(stdout);
}

// A row of what cannot be measured here: neither right nor wrong, and not counted.
static void not_here(const Claims *c, const char *what, const char *paper, const char *why) {
    if (c->speak) printf("| %-49s | %-15s | %-71s | %-3s |\n", what, paper, why, "-");
}

static void claims_title(const Claims *c, const char *title) {
    if (c->speak)
        printf("|-- %s %.*s|\n", title, (int)(144 - strlen(title)),
               "--------------------------------------"
               "-------------------------------------------------------------------------------------------------------"
               "-------");
}

// Sizes that are only ever run with random weights; a grid of H_l/2 x W_l/2 tokens a frame.
typedef struct { const char *name; Config c; } Shape;
static const Shape SHAPES_OF_WAN[] = {
    {"1.3b-480p", {1536, 8960, 12, 30, 8, 2, 16, 16, 4096, 512, 256, 0, 0, 0, 21, 60, 104, 1e-6}},
    {"14b-720p", {5120, 13824, 40, 40, 8, 2, 16, 16, 4096, 512, 256, 0, 0, 0, 21, 90, 160, 1e-6}},
    {"14b-768p", {5120, 13824, 40, 40, 8, 2, 16, 16, 4096, 512, 256, 0, 0, 0, 21, 96, 160, 1e-6}},
};

static Config shape_config(const char *name) {
    for (int i = 0; i < 2; i++) if (!strcmp(PRESET_NAMES[i], name)) return PRESETS[i].c;
    for (int i = 0; i < 3; i++) if (!strcmp(SHAPES_OF_WAN[i].name, name)) return SHAPES_OF_WAN[i].c;
    die("shape \"%.40s\" is none of tiny, toy, 1.3b-480p, 14b-720p, 14b-768p", name);
}

// ---- FLOPs: a multiply and an add are two --------------------------------------------------------------------------
// Σ length² over the subsequences of a pattern: query-key pairs.
static double attention_pairs(int pattern, int T, int H, int W, int P) {
    int count = pattern == FULL ? 1 : P * P;
    double sum = 0;
    for (int s = 0; s < count; s++) {
        double n = 0;
        for (int h = 0; h < H; h++) for (int w = 0; w < W; w++) n += subsequence(pattern, h, w, P) == s;
        sum += T * n * T * n;
    }
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

// Padded as the authors do: H and W up to the next multiple of P², in every layer.
static double model_flops(const Config *c, bool hybrid, bool padded) {
    int P2 = c->sparse_ratio * c->sparse_ratio, T = c->T, H = c->H_l / 2, W = c->W_l / 2, L = c->num_layers;
    if (padded) H = (H + P2 - 1) / P2 * P2, W = (W + P2 - 1) / P2 * P2;
    double D = c->dim, n = (double)T * H * W;
    double sum = 8 * n * D * (c->in_dim + c->out_dim) + 2.0 * c->text_len * D * (c->text_dim + D);
    for (int i = 0; i < L; i++)
        sum += flops_sum(block_flops(c, block_pattern(i, L, hybrid ? c->num_full_blocks : L), T, H, W));
    return sum;
}

static void verify_flops(Claims *c) {
    claims_title(c, "Skiparse-2D: cost (FLOPs are counted; speed-up = their ratio, every part at the same FLOP/s)");
    for (int s = 1; s < 3; s++) {
        Config k = SHAPES_OF_WAN[s].c;
        int H = k.H_l / 2, W = k.W_l / 2, P = k.sparse_ratio;
        const char *name = s == 1 ? "720P" : "768P", *paper = s == 1 ? "1.53x (padded)" : "1.64x";
        double paper_speed = s == 1 ? 1.53 : 1.64, N = (double)k.T * H * W, worst = 0;
        char what[96];
        for (int p = TOKEN_WISE; p <= GROUP_WISE; p++) worst = fmax(worst, attention_pairs(p, k.T, H, W, P) / N / N);
        snprintf(what, sizeof what, "%s, N = %.0f: attention FLOPs, sparse / full", name, N);
        claim(c, fabs(worst * P * P - 1) < (s == 1 ? 1e-3 : 1e-12), what, "1/P^2 = 1/4", "%.5f%s", worst,
              s == 1 ? " (ragged: subsequences of 19,320 and 18,480)" : "");
        double full = model_flops(&k, false, false), padded = model_flops(&k, true, true);
        double ragged = model_flops(&k, true, false);
        snprintf(what, sizeof what, "%s: TFLOP of one forward of 14B", name);
        claim(c, ragged < padded * (1 + 1e-12) && padded < full, what, "", "full %.0f, hybrid %.0f%s%.0f%s",
              full / 1e12, ragged / 1e12,
              s == 1 ? ", hybrid padded as the paper " : " (no padding needed: ", padded / 1e12, s == 1 ? "" : ")");
        snprintf(what, sizeof what, "%s: speed-up of 14B predicted from FLOPs", name);
        claim(c, full / padded > paper_speed && full / padded < 1.15 * paper_speed, what, paper, s == 1 ?
              "padded as the paper %.2fx, ragged as here %.2fx" : "%.2fx (paper measured; the gap is what is no FLOP)",
              full / padded, full / ragged);
    }
}

// ---- token orders ------------------------------------------------------------------------------------------------------
// True where each order is a permutation and token -> group, group -> token undo each other; *same: one map for both;
// *reach: the smallest share of all tokens that some token hears from after a token-wise and then a group-wise block.
static bool check_orders(int T, int H, int W, int P, bool *same, double *reach) {
    int N = T * H * W, wrong = 0;
    Pattern token, group;
    pattern_init(&token, TOKEN_WISE, T, H, W, P, 1), pattern_init(&group, GROUP_WISE, T, H, W, P, 1);
    int *seen = (int *)xalloc((size_t)N * 2, sizeof(int));
    *same = true, *reach = 1;
    for (int j = 0; j < N; j++) seen[token.order[j]]++, seen[N + group.order[j]]++;
    for (int j = 0; j < 2 * N; j++) wrong += seen[j] != 1;
    for (int j = 0; j < N; j++) {
        int there = token.place[group.order[j]], back = group.place[token.order[j]];      // the two exchanges
        wrong += group.place[token.order[there]] != j;
        *same = *same && there == back;
    }
    for (int g = 0; g < group.count; g++) {
        int heard = 0;
        for (int s = 0; s < token.count; s++) {               // does a token of g belong to s? then all of s is heard
            bool met = false;
            for (int j = group.start[g]; j < group.start[g + 1]; j++)
                met = met || (token.place[group.order[j]] >= token.start[s] &&
                              token.place[group.order[j]] < token.start[s + 1]);
            heard += met ? token.start[s + 1] - token.start[s] : 0;
        }
        if (group.start[g + 1] > group.start[g]) *reach = fmin(*reach, (double)heard / N);
    }
    free(seen);
    free(token.order), free(token.place), free(token.start), free(token.first);
    free(group.order), free(group.place), free(group.start), free(group.first);
    return !wrong;
}

static void verify_orders(Claims *c) {
    static const int GRID[][4] = {{21, 48, 80, 2}, {21, 45, 80, 2}, {3, 6, 10, 2}, {2, 7, 5, 2}, {1, 27, 18, 3}};
    claims_title(c, "Skiparse-2D: order and reach");
    for (int i = 0; i < 5; i++) {
        const int *g = GRID[i];
        bool same, divides = g[1] % (g[3] * g[3]) == 0 && g[2] % (g[3] * g[3]) == 0;
        double reach;
        bool ok = check_orders(g[0], g[1], g[2], g[3], &same, &reach);
        char what[96];
        snprintf(what, sizeof what, "%dx%dx%d, P = %d: orders permute, exchanges undo", g[0], g[1], g[2], g[3]);
        claim(c, ok && (same || !divides), what, divides ? "one map" : "", "permutations, inverse; %s",
              same ? "both exchanges are the same map" : "two maps, one for each direction");
        snprintf(what, sizeof what, "%dx%dx%d: a token hears, after two sparse blocks", g[0], g[1], g[2]);
        claim(c, reach == 1, what, "every token", "%.0f %% of all tokens at least (after one block: %.0f %%)",
              100 * reach, 100.0 / g[3] / g[3]);
    }
}

// ---- golden cases: the model as it computes here; grad, out: on the host -----------------------------------------------------
typedef struct { File f; Model *m; Run *r; size_t count; float *out, *grad; } Pass;

static Ranks one_rank(void) {
    Ranks k;
    memset(&k, 0, sizeof k);
    k.size = k.halves = 1;
    return k;
}

// Forward and backward of golden/NAME; quant, quant_attn: -1 as the file says.
static Pass golden_pass(const char *folder, const char *name, int quant, int quant_attn, Ranks *one) {
    Pass p;
    char *path = (char *)xalloc(PATH_MAX, 1);
    memset(&p, 0, sizeof p);
    snprintf(path, PATH_MAX, "%s/%s.safetensors", folder, name);
    file_open(&p.f, path);
    Config c = config_read(&p.f);
    if (quant >= 0) c.quant = quant, c.quant_attn = quant_attn;
    p.r = golden_run(&p.f, &c, one, 1, true, 0, 0), p.m = p.r->m;
    golden_forward(p.r, &p.f);
    float *target = golden(&p.f, &p.count, "target"), *dout = (float *)device_alloc(p.count * sizeof(float));
    mse(dout, p.r->out, up(target, p.count), p.count);
    backward(p.r, NULL, dout);
    p.out = down(p.r->out, p.count), p.grad = down(p.m->dw, p.m->count);
    return p;
}

static void verify_parity(Claims *c, const char *folder, Ranks *one) {
    static const char *const NAMES[] = {"dit_full", "dit_hybrid", "dit_hif8_margin"};
    double limit = act_size() == sizeof(float) ? 1e-5 : 5e-2;                // bfloat16 has 8 bits
    claims_title(c, "The model: output against golden/ (float64), relative L2");
    for (int i = 0; i < 3; i++) {
        Pass p = golden_pass(folder, NAMES[i], -1, -1, one);
        double d = relative(p.out, golden(&p.f, NULL, "output"), p.count);
        claim(c, d < limit, NAMES[i], act_size() == sizeof(float) ? "< 1e-05" : "< 5e-02", "%.1e", d);
    }
}

// ---- HiF8 ----------------------------------------------------------------------------------------------------------------
static void verify_hif8_format(Claims *c) {
    int binades = 0, trips = 0, wrong = 0;
    const float *v = positive_hif8;
    hif8_values();
    claims_title(c, "HiF8: the format");
    for (int i = 1; i + 1 < positive_count; i++) binades += i == 1 || ilogbf(v[i]) != ilogbf(v[i - 1]);
    for (int code = 0; code < 256; code++) trips += hif8_encode(hif8_decode((uint8_t)code)) == code;
    for (uint32_t h = 0; h < 65536; h++) {
        float x = bits_float(h << 16), y = hif8_round(x), want = nearest_hif8(x), z = hif8_decode(hif8_encode(x));
        wrong +=
            isnan(x) ? !isnan(y) || !isnan(z) : float_bits(y) != float_bits(want) || float_bits(z) != float_bits(want);
    }
    claim(c, binades == 38, "binades", "38", "%d", binades);
    float top = v[positive_count - 2], low = v[1];
    claim(c, top == 0x1p15f && low == 0x1p-22f, "largest, smallest positive", "2^15, 2^-22", "2^%d, 2^%d", ilogbf(top),
          ilogbf(low));
    bool special = !float_bits(hif8_decode(0)) && isnan(hif8_decode(0x80)) && hif8_decode(0x6F) == INFINITY
                && hif8_decode(0xEF) == -INFINITY && hif8_encode(-0.0f) == 0;
    claim(c, special, "specials", "0, NaN, +-Inf", "0x00 = 0 (one zero), 0x80 = NaN, 0x6F = +Inf, 0xEF = -Inf");
    claim(c, trips == 256, "codes that decode and encode to themselves", "256", "%d of 256", trips);
    claim(c, wrong == 0, "all 65,536 bfloat16 values against a search", "nearest", "%d wrong", wrong);
}

// Relative error of the gradients of block i (all: -1) whose name contains `part`.
static double gradient_apart(const Pass *a, const Pass *b, int block, const char *part) {
    double difference = 0, norm = 0;
    char stem[32] = "";
    if (block >= 0) snprintf(stem, sizeof stem, "blocks.%d.", block);
    for (int i = 0; i < a->m->params; i++) {
        const Param *p = &a->m->param[i];
        if (strncmp(p->name, stem, strlen(stem)) || !strstr(p->name, part)) continue;
        for (size_t j = p->offset; j < p->offset + p->count; j++)
            difference += pow((double)a->grad[j] - b->grad[j], 2), norm += (double)b->grad[j] * b->grad[j];
    }
    return sqrt(difference / (norm > 0 ? norm : 1));
}

// What HiF8 does to the three branches of block i, each alone: q (8 bits) and f (float) get the same golden input.
static void branch_errors(double error[3], const Pass *q, const Pass *f, int i) {
    const Config *c = &q->m->c;
    const Block *w = &q->m->block[i];
    Run *r = q->r;
    Saved *s = &r->saved[i], *g = &f->r->saved[i];
    int at = s->place;
    size_t n = r->n[at], size = n * (size_t)c->dim, text = (size_t)c->text_len;
    act *const to[] = {s->h1, s->h2, s->h3, s->self.y, s->cross.y, s->y}, *const from[] = {g->h1,     g->h2,      g->h3,
                                                                                           g->self.y, g->cross.y, g->y};
    stream_put(f->r, i, i ? golden(&f->f, NULL, "act.block.%d", i - 1) : golden(&f->f, NULL, "act.patch"));
    block_forward(f->r, i);
    for (int k = 0; k < 3; k++) quantize(r, to[k], from[k], size, 15);
    attention_layer(r, &w->self, &s->self, s->h1, s->h1, n, n, r->rope[at], &r->self[s->pattern], -1);
    attention_layer(r, &w->cross, &s->cross, s->h2, r->context_q, n, text, NULL, &r->cross[at], -1);
    linear_gelu_forward(s->f, NULL, s->h3, w->ffn0.w->c, w->ffn0.b->w, n, c->ffn_dim, c->dim);
    quantize(r, s->f, s->f, n * (size_t)c->ffn_dim, 15);
    linear(s->y, s->f, &w->ffn2, n);
    for (int k = 0; k < 3; k++) error[k] = off_act(to[3 + k], down_act(from[3 + k], size), size);
}

static void verify_hif8_model(Claims *c, const char *folder, Ranks *one) {
    static const char *const WHAT[] = {"HiF8 linear layers alone", "HiF8 attention (q, k, v) alone", "HiF8 both"};
    Pass f = golden_pass(folder, "dit_hif8", 0, 0, one), q[3];
    claims_title(c, "HiF8: what 8 bits do to the model (golden/dit_hif8, untrained), against float32");
    for (int i = 0; i < 3; i++) {
        q[i] = golden_pass(folder, "dit_hif8", i != 1, i != 0, one);
        double out = relative(q[i].out, f.out, f.count), grad = gradient_apart(&q[i], &f, -1, "");
        claim(c, out > 1e-3 && out < 0.15 && grad < 0.5, WHAT[i], "", "output off by %.1e, all gradients by %.1e", out,
              grad);
    }
    double d = relative(q[2].out, golden(&f.f, NULL, "output"), f.count);
    claim(c, d < 5e-2, "HiF8 both, output against golden/", "< 5e-02",
          "%.1e (a value over a rounding boundary moves it)", d);
    for (int i = 0; i < f.m->c.num_layers; i++) {
        double e[3], attention = gradient_apart(&q[2], &f, i, "attn"), ffn = gradient_apart(&q[2], &f, i, "ffn");
        char what[96];
        branch_errors(e, &q[2], &f, i);
        snprintf(what, sizeof what, "block %d (%c) alone: self-, cross-attention, ffn", i,
                 PATTERN_LETTER[f.r->saved[i].pattern]);
        claim(c, e[0] < 0.2 && e[1] < 0.2 && e[2] < 0.2, what, "",
              "%.1e, %.1e, %.1e; end to end, gradient of attn %.1e, ffn %.1e", e[0], e[1], e[2], attention, ffn);
    }
}

static void verify_quality(Claims *c, const char *weights, Ranks *one) {
    double total[2], error[2];
    claims_title(c, "HiF8: quality (paper: VBench; here: ShapesBench total, 48 clips, 20 steps)");
    for (int i = 0; i < 2; i++) {
        Options o;
        memset(&o, 0, sizeof o);
        o.weights = weights, o.clips = 48, o.hif8 = i, o.sp = "ssp", o.full_blocks = -1;
        Model *m = model_open(&o, one, false, false);
        Run *r = run_new(m, one, 8, m->c.T, m->c.H_l / 2, m->c.W_l / 2, false, NULL);
        Bench b = evaluate(r, 48, 20, 3, 4, 1, false);
        total[i] = b.mean[N_SCORES], error[i] = b.error[N_SCORES];
    }
    claim(c, total[1] > total[0] - 3 * hypot(error[0], error[1]), "float -> HiF8", "83.73 -> 83.29",
          "%.2f -> %.2f (each +- %.2f)", total[0], total[1], error[0]);
}

// ---- ranks -----------------------------------------------------------------------------------------------------------------
static void verify_ranks_formula(Claims *c) {
    claims_title(c,
                 "Sparse sequence parallelism: sent by a rank for one sparse block of 14B, x in bfloat16, by formula");
    for (int s = 1; s < 3; s++)
        for (int R = 4; R <= 8; R += 4) {
            const Config *k = &SHAPES_OF_WAN[s].c;
            double N = (double)k->T * (k->H_l / 2) * (k->W_l / 2), sent = (R - 1.0) / R * N / R * k->dim * 2 / 1e6;
            char what[96];
            snprintf(what, sizeof what, "%s, R = %d: (R-1)/R * N/R * dim, calls x MB", s == 1 ? "720P" : "768P", R);
            claim(c, true, what, "-75 %, 4 -> 1", "SSP 1 x %.1f = %.1f MB, Ulysses 4 x %.1f = %.1f MB%s", sent, sent,
                  sent, 4 * sent, R == 8 ? " (8 run as 2 x 4)" : "");
        }
}

// Rows that rank `rank` must send from one sparse order to the other, counted token by token.
static size_t rows_leaving(const Config *c, int from, int to, int rank, int R) {
    int P = c->sparse_ratio, share = P * P / R;
    size_t rows = 0;
    for (int h = 0; h < c->H_l / 2; h++)
        for (int w = 0; w < c->W_l / 2; w++)
            rows += subsequence(from, h, w, P) / share == rank && subsequence(to, h, w, P) / share != rank;
    return rows * (size_t)c->T;
}

// One forward of a random toy on these ranks: what each kind of block sent, against the formula.
static void verify_ranks_measured(Claims *c, Ranks *k) {
    static const int GRID[][3] = {{8, 32, 32}, {3, 12, 20}, {2, 14, 10}};
    claims_title(c, "Sparse sequence parallelism: measured on these ranks, float32, one forward (12 blocks: 4 full, 8 "
                    "sparse)");
    for (int g = 0; g < 3; g++) {
        Config config = PRESETS[1].c;
        size_t got[2], calls[2], expect = 0, row = (size_t)config.dim * sizeof(float);
        config.T = GRID[g][0], config.H_l = GRID[g][1], config.W_l = GRID[g][2];
        if (!g) ranks_arrange(k, &config, "ssp", true);
        Model *m = model_layout(&config);
        model_allocate(m, false);
        model_random(m, 1);
        char what[96], size[32];
        bool ok = true;
        snprintf(size, sizeof size, "%dx%dx%d", config.T, config.H_l / 2, config.W_l / 2);
        for (int u = 0; u < 2; u++) {
            k->ulysses = u;
            Run *r = run_new(m, k, 1, config.T, config.H_l / 2, config.W_l / 2, false, NULL);
            float *x = (float *)device_alloc((size_t)config.in_dim * r->N * 4 * sizeof(float));
            double t = 500;
            Text text = caption_batch(m, NULL, 1);
            text_set(r, text);
            memset(k->calls, 0, sizeof k->calls), memset(k->bytes, 0, sizeof k->bytes);
            forward(r, x, &t);
            int p = u ? ULYSSES_SPARSE : EXCHANGE;
            size_t mine = r->n[FULL];
            got[u] = k->bytes[p], calls[u] = k->calls[p];
            size_t share = row / (size_t)k->size, qkv = 3 * mine * (size_t)(k->size - 1) * share,
                   back = (r->N - mine) * share;
            if (u) expect = 8 * (qkv + back), ok = calls[1] == 32 && got[1] == expect;
            else {
                expect = (4 * rows_leaving(&config, TOKEN_WISE, GROUP_WISE, k->rank, k->size)
                        + 3 * rows_leaving(&config, GROUP_WISE, TOKEN_WISE, k->rank, k->size)) * row;
                ok = calls[0] == 7 && got[0] == expect && k->calls[ULYSSES_FULL] == 16 && k->calls[CONVERT] == 2;
            }
            float bad = ok ? 0 : 1, *worst = (float *)device_alloc(sizeof(float));
            upload(worst, &bad, sizeof(float)), max_over_ranks(k, worst), download(&bad, worst, sizeof(float));
            snprintf(what, sizeof what, "%s, %d ranks: %s", size, k->size,
                     u ? "Ulysses, 8 sparse blocks" : "SSP, 7 exchanges of 8 blocks");
            claim(c, bad == 0, what, u ? "4 a block" : "1 a block",
                  "%zu calls, %zu bytes; by formula %zu (every rank checked)", calls[u], got[u], expect);
            device_free(worst), device_free(x), free((void *)text.ids);
        }
        double ratio = (double)got[0] / 7 / ((double)got[1] / 8);
        snprintf(what, sizeof what, "%s: bytes of one exchange / Ulysses block", size);
        claim(c, g ? fabs(ratio - 0.25) < 0.1 : ratio == 0.25, what, "1/4", "%.4f%s", ratio,
              g ? " (ragged: rank 0's share)" : "");
    }
    k->ulysses = false;
}

static double measured_speedup(const char *shape, Ranks *one);               // in bench

static void verify_gpu(Claims *c, Ranks *one) {
    claims_title(c, "Speed-up of the hybrid over the full model, 14B, one GPU");
    for (int s = 1; s < 3; s++) {
        const char *what = s == 1 ? "720P, ragged" : "768P", *paper = s == 1 ? "1.53x (padded)" : "1.64x";
#ifdef OSP_CUDA
        if (act_size() == sizeof(float)) { not_here(c, what, paper, "measured with --device-dtype bf16"); continue; }
        double speed = measured_speedup(SHAPES_OF_WAN[s].name, one);
        claim(c, speed > (s == 1 ? 1.53 : 1.64), what, paper, "%.2fx, blocks measured, 40 layers computed from them",
              speed);
#else
        (void)one, (void)measured_speedup;
        not_here(c, what, paper, "no GPU here");
#endif
    }
}

// Every row on rank 0; what ranks send is measured by all. The number of rows that do not hold.
static int verify(const char *golden, const char *weights, Ranks *ranks) {
    Claims c = {ranks->rank == 0, 0, 0};
    Ranks one = one_rank();
    if (c.speak) {
        printf("| %-49s | %-15s | %-71s | ok  |\n", "claim", "paper", "here");
        verify_flops(&c), verify_orders(&c);
        verify_parity(&c, golden, &one);
        verify_hif8_format(&c), verify_hif8_model(&c, golden, &one);
        if (weights) verify_quality(&c, weights, &one);
        verify_ranks_formula(&c);
    }
    if (ranks->size > 1) verify_ranks_measured(&c, ranks);
    if (c.speak) {
        verify_gpu(&c, &one);
        printf("%d rows, %d not ok%s\n", c.rows, c.failed,
               weights ? "" : "; -w FILE adds ShapesBench, mpirun the measured transfers");
    }
    return c.failed;
}
// ============================================================================================================
// bench: random weights; time of each part of a block, of blocks, of the whole model; FLOP/s; speed-up
// ============================================================================================================
static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Of repeated timings the first quartile: other programs on the machine only ever add time. Sorts them.
static double typical(double *x, int n) {
    qsort(x, (size_t)n, sizeof(double), compare_doubles);
    return x[n / 4];
}

// ---- the parts of a block --------------------------------------------------------------------------------------------
enum { NORMS, LINEARS, ROPE, SELF_ATTENTION, CROSS_ATTENTION, FFN_UP, FFN_DOWN, REARRANGE, ROUNDING, PARTS };
static const char *const PART_NAME[] = {"norms + modulation", "linear q k v o, q o",      "RMSNorm + RoPE",
                                        "self-attention",     "cross-attention",          "ffn up + GELU",
                                        "ffn down",           "residual + rearrangement", "HiF8 rounding"};
static bool counts_flops(int part) { return part != NORMS && part != ROPE && part != REARRANGE && part != ROUNDING; }

// What part `part` of a block does, on the run's own buffers; all of its calls.
static void part_forward(Run *r, int i, int part) {
    const Config *c = &r->m->c;
    const Block *w = &r->m->block[i];
    Saved *s = &r->saved[i], *next = &r->saved[i + 1];
    int B = r->B, D = c->dim, at = s->place, heads = c->num_heads;
    size_t n = r->n[at], rows = (size_t)B * n, text = (size_t)(B * c->text_len);
    float eps = (float)c->eps, *e = s->e;
    switch (part) {
    case NORMS:
        modulation_forward(e, w->modulation->w, r->e0, B, 6, 6, D);
        residual_norm_forward(NULL, s->h1, s->stat1, s->x0, NULL, NOTHING, of_row(e, 0, 6, D), of_row(e, 1, 6, D), 1, B,
                              n, D, eps);
        residual_norm_forward(s->x1, s->h2, s->stat2, s->x0, s->self.y, of_row(e, 2, 6, D), shared(w->norm3.b->w),
                              shared(w->norm3.w->w), 0, B, n, D, eps);
        residual_norm_forward(s->x2, s->h3, s->stat3, s->x1, s->cross.y, NOTHING, of_row(e, 3, 6, D),
                              of_row(e, 4, 6, D), 1, B, n, D, eps);
        break;
    case LINEARS:
        linear(s->self.q_raw, s->h1, &w->self.q, rows), linear(s->self.k_raw, s->h1, &w->self.k, rows);
        linear(s->self.v, s->h1, &w->self.v, rows), linear(s->self.y, s->self.oq, &w->self.o, rows);
        linear(s->cross.q_raw, s->h2, &w->cross.q, rows), linear(s->cross.y, s->cross.oq, &w->cross.o, rows);
        linear(s->cross.k_raw, r->context_q, &w->cross.k, text), linear(s->cross.v, r->context_q, &w->cross.v, text);
        break;
    case ROPE:
        rmsnorm_rope_forward(s->self.q, s->self.q_rstd, s->self.q_raw, w->self.norm_q->w, r->rope[at], B, n, D, heads,
                             eps);
        rmsnorm_rope_forward(s->self.k, s->self.k_rstd, s->self.k_raw, w->self.norm_k->w, r->rope[at], B, n, D, heads,
                             eps);
        rmsnorm_rope_forward(s->cross.q, s->cross.q_rstd, s->cross.q_raw, w->cross.norm_q->w, NULL, B, n, D, heads,
                             eps);
        rmsnorm_rope_forward(s->cross.k, s->cross.k_rstd, s->cross.k_raw, w->cross.norm_k->w, NULL, B,
                             (size_t)c->text_len, D, heads, eps);
        break;
    case SELF_ATTENTION:
        attention_forward(s->self.o, s->self.lse, s->self.q, s->self.k, s->self.v, &r->self[s->pattern], heads,
                          D / heads);
        break;
    case CROSS_ATTENTION:
        attention_forward(s->cross.o, s->cross.lse, s->cross.q, s->cross.k, s->cross.v, &r->cross[at], heads,
                          D / heads);
        break;
    case FFN_UP: linear_gelu_forward(s->f, s->f_pre, s->h3, w->ffn0.w->c, w->ffn0.b->w, rows, c->ffn_dim, D); break;
    case FFN_DOWN: linear(s->y, s->f, &w->ffn2, rows); break;
    case REARRANGE:
        residual_gather_forward(next->x0, s->x2, s->y, of_row(e, 5, 6, D),
                                at == next->place ? NULL : r->move[at][next->place].pack, rows, B, n, D);
        break;
    default: {                                                               // in place: what 8 bits would add
        act *const wide[] = {s->h1, s->self.q, s->self.k, s->self.v, s->self.o, s->h2, s->cross.q, s->cross.o, s->h3};
        for (int k = 0; k < 9; k++)
            absmax(r->m->amax, wide[k], rows * (size_t)D), hif8_tensor(wide[k], wide[k], rows * (size_t)D, 15, r->m->amax);
        absmax(r->m->amax, s->f, rows * (size_t)c->ffn_dim),
            hif8_tensor(s->f, s->f, rows * (size_t)c->ffn_dim, 15, r->m->amax);
    }
    }
}

// FLOPs of a part, or the bytes it moves at least.
static double part_work(const Run *r, int i, int part) {
    const Config *c = &r->m->c;
    double D = c->dim, O = c->ffn_dim, a = (double)act_size(), n = (double)r->N, text = c->text_len;
    Flops f = block_flops(c, r->saved[i].pattern, r->T, r->H, r->W);
    const double work[] = {n * D * (20 + 5 * a),
                           (12 * n + 4 * text) * D * D,
                           (3 * n + text) * D * 2 * a,
                           f.attention,
                           f.cross,
                           2 * n * D * O,
                           2 * n * D * O,
                           n * D * (8 + a),
                           n * (9 * D + O) * 3 * a};
    return work[part];
}

typedef void (*Work)(Run *, int, int);
static void whole_block(Run *r, int i, int back) { if (back) block_backward(r, i); else block_forward(r, i); }

// Typical seconds of a call, after one to warm up; fewer repetitions of what takes long.
static double time_work(Work work, Run *r, int i, int what) {
    double t[25];
    int n = 0;
    for (double begin = seconds(), now = begin; n < 2 || (n < 25 && now - begin < 0.4); n++) {
        double before = seconds();
        work(r, i, what), wait_device();
        now = seconds();
        if (n == 24 || (n == 1 && now - before > 2)) { t[n++] = now - before; break; }
        t[n] = now - before;
    }
    return typical(t + 1, n - 1);
}

// ---- a model to measure ------------------------------------------------------------------------------------------------
static void run_free(Run *r) { device_free(r->saved[0].x0); } // which is where the run's one arena begins

// Numbers of the right size, quickly: billions of them.
static void model_noise(Model *m) {
    enum { ROOM = 1 << 16 };
    float *noise = (float *)xalloc(ROOM, sizeof(float));
    for (size_t i = 0; i < ROOM; i++) noise[i] = rng_normal(1, 1, i);
    for (int i = 0; i < m->params; i++) {
        Param *p = &m->param[i];
        float *host = (float *)xalloc(p->count, sizeof(float));
        double in = p->rank > 1 ? (double)p->count / (double)p->shape[0] : 100;
        bool norm = strstr(p->name, "norm") && strstr(p->name, "weight");
        float scale = (float)(1 / sqrt(in));
        #pragma omp parallel for
        for (size_t j = 0; j < p->count; j++) host[j] = norm ? 1 : scale * noise[(j * 3 + (size_t)i) % ROOM];
        param_set(m, p, host);
        free(host);
    }
    free(noise);
}

typedef struct { Run *r; float *x, *target, *dout; Optimizer opt; } Trial;
static TrainOptions bench_options(void) { TrainOptions o = PRESETS[0].train; o.clip = 1; return o; }

static Trial trial_new(Model *m, Ranks *k, bool full, bool training) {
    Trial t;
    Config c = m->c;
    memset(&t, 0, sizeof t);
    m->c.num_full_blocks = full ? c.num_layers : c.num_full_blocks; // read when the run is built, and only then
    Run *r = t.r = run_new(m, k, 1, c.T, c.H_l / 2, c.W_l / 2, training, NULL);
    m->c = c;
    size_t count = (size_t)(c.in_dim > c.out_dim ? c.in_dim : c.out_dim) * r->N * 4,
           words = (size_t)c.text_len * (size_t)c.text_dim;
    float *host = (float *)xalloc(count > words ? count : words, sizeof(float));
    noise_fill(host, count > words ? count : words, 1, NOISE_STREAM, 0);
    t.x = (float *)device_alloc(count * sizeof(float)), t.target = (float *)device_alloc(count * sizeof(float));
    t.dout = (float *)device_alloc(count * sizeof(float));
    upload(t.x, host, count * sizeof(float));
    Text text = c.vocab ? caption_batch(m, NULL, 1) : caption_batch(m, NULL, 0);
    text.rows = host;
    text_set(r, text);
    free(host), free((void *)text.ids);
    return t;
}

static void trial_free(Trial *t) { run_free(t->r), device_free(t->x), device_free(t->target), device_free(t->dout); }

// what 0: a forward; 1: a training step, AdamW and all.
static void trial_step(Trial *t, int what) {
    TrainOptions o = bench_options();
    double time = 500;
    if (what) weights_prepare(t->r->m);
    forward(t->r, t->x, &time);
    if (!what) return;
    mse(t->dout, t->r->out, t->target, (size_t)t->r->m->c.out_dim * t->r->N * 4);
    backward(t->r, NULL, t->dout);
    optimizer_step(&t->opt, t->r->ranks, &o, 1e-5);
}

static double trial_time(Trial *t, int what) {
    double time[9];
    int n = 0;
    trial_step(t, what), wait_device();
    for (double begin = seconds(), now = begin; n < 1 || (n < 9 && now - begin < 1); n++) {
        double before = seconds();
        trial_step(t, what), wait_device();
        now = seconds();
        time[n] = now - before;
    }
    return typical(time, n);
}

// Seconds of one block of each pattern, of what is not a block, and of whole runs: [0] forward, [1] training step.
typedef struct { double block[PATTERNS], rest, full, hybrid; } Timing;

static int block_of(const Config *c, int pattern) {
    for (int i = 0; i < c->num_layers; i++)
        if (block_pattern(i, c->num_layers, c->num_full_blocks) == pattern) return i;
    return 0;
}

static Timing model_timing(Trial *t, int what) {
    const Config *c = &t->r->m->c;
    Timing s;
    memset(&s, 0, sizeof s);
    s.hybrid = s.rest = trial_time(t, what);
    for (int p = 0; p < PATTERNS; p++) {
        s.block[p] = time_work(whole_block, t->r, block_of(c, p), 0);
        if (what) s.block[p] += time_work(whole_block, t->r, block_of(c, p), 1);
        for (int i = 0; i < c->num_layers; i++) if (t->r->saved[i].pattern == p) s.rest -= s.block[p];
    }
    s.rest = s.rest > 0 ? s.rest : 0;
    return s;
}

// The whole model as the shape defines it, from its blocks.
static double predicted(const Timing *s, const Config *whole, bool full) {
    double time = s->rest;
    for (int i = 0; i < whole->num_layers; i++)
        time += s->block[block_pattern(i, whole->num_layers, full ? whole->num_layers : whole->num_full_blocks)];
    return time;
}

// `layers` token-wise, as many group-wise and twice as many full blocks, in the order F.. g t .. F.
static Config few_layers(Config c, int layers) {
    if (layers) c.num_layers = 4 * layers, c.num_full_blocks = 2 * layers;
    return c;
}

static double measured_speedup(const char *shape, Ranks *one) {
    Config whole = shape_config(shape), c = few_layers(whole, 1);
    Model *m = model_layout(&c);
    model_allocate(m, false);
    model_noise(m);
    Trial t = trial_new(m, one, false, false);
    Timing s = model_timing(&t, 0);
    trial_free(&t);
    for (int i = 0; i < m->params; i++) {
        if (m->param[i].c != (act *)m->param[i].w) device_free(m->param[i].c);
        device_free(m->param[i].w);
    }
    return predicted(&s, &whole, true) / predicted(&s, &whole, false);
}

// ---- tables --------------------------------------------------------------------------------------------------------------
static void print_parts(Run *r, const Timing *s) {
    const Config *c = &r->m->c;
    int block[2] = {block_of(c, FULL), block_of(c, TOKEN_WISE)};
    double sum[2] = {0, 0};
    printf("\n%-26s | full block:    ms  share      rate | sparse block:  ms  share      rate\n", "forward");
    for (int part = 0; part < PARTS; part++) {
        printf("%-26s |", PART_NAME[part]);
        for (int k = 0; k < 2; k++) {
            double t = time_work(part_forward, r, block[k], part), rate = part_work(r, block[k], part) / t / 1e9;
            double all = s->block[k ? TOKEN_WISE : FULL];
            bool counted = part != ROUNDING || c->quant;
            printf(" %16.3f %5.1f%% %9.1f%s%s", 1e3 * t, 100 * t / all, rate, counts_flops(part) ? " F" : " B",
                   k ? "\n" : " |");
            sum[k] += counted ? t : 0;
        }
    }
    printf("%-26s | %16.3f %5.1f%%             | %16.3f %5.1f%%\n", c->quant ? "sum" : "sum (without HiF8)",
           1e3 * sum[0], 100 * sum[0] / s->block[FULL], 1e3 * sum[1], 100 * sum[1] / s->block[TOKEN_WISE]);
    printf("%-26s | %16.3f  F = GFLOP/s      | %16.3f  B = GB/s   (group-wise block %.3f ms)\n",
           "whole block, measured", 1e3 * s->block[FULL], 1e3 * s->block[TOKEN_WISE], 1e3 * s->block[GROUP_WISE]);
}

// passes: a forward's FLOPs count once, a training step's three times.
static void print_speed(const Config *c, const char *what, double full, double hybrid, int passes, const char *paper) {
    printf("%-34s full %9.1f ms, hybrid %9.1f ms: %.2fx   (%.0f and %.0f GFLOP/s)%s\n", what, 1e3 * full, 1e3 * hybrid,
           full / hybrid, passes * model_flops(c, false, false) / full / 1e9,
           passes * model_flops(c, true, false) / hybrid / 1e9, paper);
}

// Where a block would run for minutes: each part from its FLOPs and the rate of a sample.
static void bench_formula(const char *name, const Config *c) {
    size_t D = (size_t)c->dim, rows = 256;
    act *x = (act *)device_alloc(rows * D * act_size()), *w = (act *)device_alloc(D * D * act_size()),
        *y = (act *)device_alloc(rows * D * act_size());
    double best = 1e30;
    for (int i = 0; i < 4; i++) {
        double begin = seconds();
        linear_forward(y, x, w, NULL, rows, c->dim, c->dim), wait_device();
        best = fmin(best, seconds() - begin);
    }
    double rate = 2.0 * (double)(rows * D) * (double)D / best;
    int T = c->T, H = c->H_l / 2, W = c->W_l / 2;
    Flops full = block_flops(c, FULL, T, H, W), sparse = block_flops(c, TOKEN_WISE, T, H, W);
    printf("%s is large for a CPU: by formula, at the %.0f GFLOP/s that a sample of its linear layers reaches (--force "
           "runs it)\n",
           name, rate / 1e9);
    printf("%-26s | full block: TFLOP  share | sparse block: TFLOP  share\n", "part");
    const double part[3][2] = {{full.linear, sparse.linear},
                               {full.attention, sparse.attention},
                               {full.cross, sparse.cross}};
    const char *const title[] = {"linear layers", "self-attention", "cross-attention"};
    for (int i = 0; i < 3; i++)
        printf("%-26s | %17.2f %5.1f%% | %19.2f %5.1f%%\n", title[i], part[i][0] / 1e12,
               100 * part[i][0] / flops_sum(full), part[i][1] / 1e12, 100 * part[i][1] / flops_sum(sparse));
    double all = model_flops(c, false, false), hybrid = model_flops(c, true, false);
    printf("one forward of %d layers: full %.0f TFLOP, %.1f h; hybrid %.0f TFLOP, %.1f h; %.2fx%s\n", c->num_layers,
           all / 1e12, all / rate / 3600, hybrid / 1e12, hybrid / rate / 3600, all / hybrid,
           strstr(name, "720p")   ? " (paper, padded, one H200: 1.53x)"
           : strstr(name, "768p") ? " (paper, one H200: 1.64x)"
                                  : "");
    device_free(x), device_free(w), device_free(y);
}

typedef struct { const char *shape, *device; int layers, train, force, hif8; } BenchOptions;

static void bench_shape(const BenchOptions *o, Ranks *one) {
    Config whole = shape_config(o->shape), c = few_layers(whole, o->layers >= 0 ? o->layers : whole.vocab ? 0 : 1);
    c.quant = c.quant_attn = o->hif8;
    const char *paper = strstr(o->shape, "720p")   ? "; paper, padded: 1.53x"
                        : strstr(o->shape, "768p") ? "; paper: 1.64x"
                                                   : "";
    bool small = act_size() != sizeof(float) || flops_sum(block_flops(&c, FULL, c.T, c.H_l / 2, c.W_l / 2)) < 2e12;
    Model *m = model_layout(&c);
    size_t bytes;
    run_new(m, one, 1, c.T, c.H_l / 2, c.W_l / 2, o->train, &bytes);
    printf("%s: %d tokens (%dx%dx%d), dim %d, heads %d, ffn %d; %d layers run of %d\n", o->shape,
           c.T * c.H_l * c.W_l / 4, c.T, c.H_l / 2, c.W_l / 2, c.dim, c.num_heads, c.ffn_dim, c.num_layers,
           whole.num_layers);
    printf("memory planned: weights%s %.2f GiB, activations %.2f GiB\n", o->train ? ", gradients, moments" : "",
           gib((double)(model_bytes(m, o->train) + (o->train ? 3 * m->count * sizeof(float) : 0))), gib((double)bytes));
    fflush(stdout);
    if (!small && !o->force) { bench_formula(o->shape, &whole); return; }
    model_allocate(m, o->train);
    model_noise(m);
    Trial t = trial_new(m, one, false, o->train);
    if (o->train) optimizer_init(&t.opt, m->w, m->dw, m->count);
    Optimizer opt = t.opt;
    Timing s = model_timing(&t, 0), step;
    memset(&step, 0, sizeof step);
    print_parts(t.r, &s);
    if (o->train) {
        step = model_timing(&t, 1);
        printf("forward + backward: full block %.3f ms, token-wise %.3f ms, group-wise %.3f ms\n",
               1e3 * step.block[FULL], 1e3 * step.block[TOKEN_WISE], 1e3 * step.block[GROUP_WISE]);
    }
    trial_free(&t);
    t = trial_new(m, one, true, o->train), t.opt = opt;
    s.full = trial_time(&t, 0), step.full = o->train ? trial_time(&t, 1) : 0;
    trial_free(&t);
    printf("\n");
    char what[64];
    snprintf(what, sizeof what, "forward of %d layers, measured", c.num_layers);
    print_speed(&c, what, s.full, s.hybrid, 1, "");
    if (o->train) print_speed(&c, "training step, measured", step.full, step.hybrid, 3, "");
    snprintf(what, sizeof what, "forward of %d layers, from blocks", whole.num_layers);
    print_speed(&whole, what, predicted(&s, &whole, true), predicted(&s, &whole, false), 1, paper);
    snprintf(what, sizeof what, "training step of %d, from blocks", whole.num_layers);
    if (o->train) print_speed(&whole, what, predicted(&step, &whole, true), predicted(&step, &whole, false), 3, "");
    printf("counting FLOPs alone: %.2fx\n", model_flops(&whole, false, false) / model_flops(&whole, true, false));
}

static int threads_here(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// ---- bench linear: against OpenBLAS, where it can be found; taken in turn, the same threads --------------------------------
typedef void (*Sgemm)(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *, int);

static void bench_linear(void) {
    static const int SIZE[][3] = {{2048, 512, 128}, {2048, 128, 512}, {8192, 1536, 1536}};
    void *blas = act_size() == sizeof(float) ? dlopen("libopenblas.so.0", RTLD_NOW) : NULL;
    Sgemm sgemm = blas ? (Sgemm)dlsym(blas, "cblas_sgemm") : NULL;
    void (*set_threads)(int) = blas ? (void (*)(int))dlsym(blas, "openblas_set_num_threads") : NULL;
    int threads = threads_here();
    if (set_threads) set_threads(threads);
    printf("linear layers, %d threads, GFLOP/s (best of alternating runs)%s\n", threads,
           sgemm ? "" : "; no libopenblas.so.0 to compare with");
    for (int s = 0; s < 3; s++) {
        size_t M = (size_t)SIZE[s][0], N = (size_t)SIZE[s][1], K = (size_t)SIZE[s][2];
        int rounds = M * N * K > 1e10 ? 5 : 300;
        float *host = (float *)xalloc(M * K + N * K, sizeof(float)),
              *f = (float *)device_alloc((M * K + N * K + M * N) * sizeof(float));
        act *x = (act *)device_alloc(M * K * act_size()), *w = (act *)device_alloc(N * K * act_size()),
            *y = (act *)device_alloc(M * N * act_size());
        noise_fill(host, M * K + N * K, 1, 1, 0);
        upload(f, host, (M * K + N * K) * sizeof(float));
        to_act(x, f, M * K), to_act(w, f + M * K, N * K);
        double ours = 1e30, theirs = 1e30, work = 2.0 * (double)M * (double)N * (double)K / 1e9;
        for (int i = 0; i < rounds; i++) {
            double begin = seconds();
            linear_forward(y, x, w, NULL, M, (int)N, (int)K), wait_device();
            double middle = seconds();
            if (sgemm)
                sgemm(101, 111, 112, (int)M, (int)N, (int)K, 1, f, (int)K, f + M * K, (int)K, 0, f + M * K + N * K,
                      (int)N);
            ours = fmin(ours, middle - begin), theirs = fmin(theirs, seconds() - middle);
        }
        printf("  M %5zu N %5zu K %5zu: osp %7.1f", M, N, K, work / ours);
        if (sgemm)
            printf(", OpenBLAS %7.1f, ratio %.2f, apart %.0e", work / theirs, theirs / ours,
                   off_act(y, down(f + M * K + N * K, M * N), M * N));
        printf("\n"), fflush(stdout);
        free(host), device_free(f), device_free(x), device_free(w), device_free(y);
    }
}

// ---- bench hif8: bytes read and written a second, beside a copy -------------------------------------------------------------
static void bench_hif8(void) {
    size_t n = 1 << 24;
    double best[3] = {1e30, 1e30, 1e30}, bytes = (double)(n * act_size());
    act *x = (act *)device_alloc(n * act_size()), *y = (act *)device_alloc(n * act_size());
    float *host = (float *)xalloc(n, sizeof(float)), *f = (float *)device_alloc(n * sizeof(float)),
          *m = (float *)device_alloc(sizeof(float));
    noise_fill(host, n, 1, 1, 0);
    upload(f, host, n * sizeof(float)), to_act(x, f, n);
    absmax(m, x, n);
    for (int i = 0; i < 20; i++) {
        double t[4] = {seconds()};
        copy(y, x, n * act_size()), wait_device(), t[1] = seconds();
        hif8_tensor(y, x, n, 15, m), wait_device(), t[2] = seconds();
        absmax(m, x, n), wait_device(), t[3] = seconds();
        for (int k = 0; k < 3; k++) best[k] = fmin(best[k], t[k + 1] - t[k]);
    }
    int threads = threads_here();
    printf("HiF8, %zu numbers, %d threads, GB/s read + written: copy (one thread) %.1f; quantize-dequantize %.1f (%.1f "
           "a thread); maximum "
           "alone %.1f (read)\n",
           n, threads, 2 * bytes / best[0] / 1e9, 2 * bytes / best[1] / 1e9, 2 * bytes / best[1] / 1e9 / threads,
           bytes / best[2] / 1e9);
    free(host), device_free(f), device_free(m), device_free(x), device_free(y);
}

// ---- bench comm: under mpirun, how much of a forward the transfers take; SSP and Ulysses in turn ----------------------------
static void bench_comm(const BenchOptions *o, Ranks *k) {
    Config c = shape_config(o->shape);
    Trial t[2];
    double time[2][9], sent[2][PURPOSES], count[2][PURPOSES];
    ranks_arrange(k, &c, "ssp", true);
    Model *m = model_layout(&c);
    model_allocate(m, false);
    model_noise(m);
    for (int u = 0; u < 2; u++) {
        k->ulysses = u;
        t[u] = trial_new(m, k, false, false);
        trial_step(&t[u], 0);
        memset(sent[u], 0, sizeof sent[u]);
    }
    for (int i = 0; i < 9; i++)
        for (int u = 0; u < 2; u++) {
            memset(k->time, 0, sizeof k->time), memset(k->bytes, 0, sizeof k->bytes);
            double begin = seconds();
            trial_step(&t[u], 0), wait_device();
            time[u][i] = seconds() - begin;
            for (int p = 0; p < PURPOSES; p++) sent[u][p] += k->time[p] / 9, count[u][p] = (double)k->bytes[p];
        }
    if (!speaks(k)) return;
    printf("%s, %d ranks%s: one forward, rank 0; waiting for slower ranks counts as transfer\n", o->shape, k->size,
           k->halves == 2 ? " x 2 halves" : "");
    if (k->size == 1) printf("(one rank sends nothing: start with mpirun -np 2 ./test_osp_mpi bench comm)\n");
    for (int u = 0; u < 2; u++) {
        double all = typical(time[u], 9), moving = 0;
        for (int p = 0; p < PURPOSES; p++) moving += sent[u][p];
        printf("%-8s %8.2f ms, %5.1f %% of it in transfers\n", u ? "Ulysses" : "SSP", 1e3 * all, 100 * moving / all);
        for (int p = 0; p < PURPOSES; p++)
            if (count[u][p] > 0)
                printf("    %-24s %8.2f ms %12.0f bytes\n", PURPOSE_NAME[p], 1e3 * sent[u][p], count[u][p]);
    }
    printf("SSP / Ulysses: %.2f of the time (fastest of 9: %.2f)\n", typical(time[0], 9) / typical(time[1], 9),
           time[0][0] / time[1][0]);
}

static int bench(int argc, char **argv, Ranks *ranks) {
    BenchOptions o;
    Ranks one = one_rank();
    const char *what = NULL;
    static const Option options[] = {
        STRING("", "--shape", BenchOptions, shape, "toy", "tiny, toy, 1.3b-480p, 14b-720p or 14b-768p"),
        INT("", "--layers", BenchOptions, layers, -1, -1, 64,
            "run so many token-wise, as many group-wise, twice as many full blocks; 0: all; -1: 1 (toys: all)"),
        SWITCH("", "--train", BenchOptions, train, "backward and the training step, too"),
        STRING("", "--device-dtype", BenchOptions, device, "bf16", "arithmetic on a GPU: f32 or bf16"),
        SWITCH("", "--hif8", BenchOptions, hif8, "8 bits"),
        SWITCH("", "--force", BenchOptions, force, "run Wan's shapes on a CPU, for as long as it takes"),
    };
    option_defaults(options, 6, 0, &o);
    parse_options(argc, argv, "test_osp bench [linear|hif8|comm] --shape toy --train", options, 6, 0, &o, &what);
    if (what && !strcmp(what, "comm")) bench_comm(&o, ranks);
    else if (ranks->rank) return 0;
    else if (!what) bench_shape(&o, &one);
    else if (!strcmp(what, "linear")) bench_linear();
    else if (!strcmp(what, "hif8")) bench_hif8();
    else die("bench: \"%.40s\" is none of linear, hif8, comm", what);
    return 0;
}
// ============================================================================================================
// show: the pictures
// ============================================================================================================
// Everything is drawn by distance: a pixel's coverage is how far inside a shape its centre lies, so edges are smooth.
enum { INK = 0x1F2937, SOFT = 0x6B7280, FAINT = 0xE5E7EB, PAPER = 0xFFFFFF };
static const uint32_t PALETTE[] = {0x2F6DB5, 0xE8792B, 0x2E9E6B, 0xA04FA8, 0xD64550,
                                   0x17A2B8, 0xC9A227, 0x6B5B95, 0x8C6D46};
enum { PALETTE_SIZE = sizeof(PALETTE) / sizeof(PALETTE[0]) };
static uint32_t color_of(int i) { return PALETTE[i % PALETTE_SIZE]; }

static uint32_t tint(uint32_t a, uint32_t b, double u) {                      // u = 0: a, 1: b
    uint32_t c = 0;
    for (int s = 16; s >= 0; s -= 8) c |= (uint32_t)((a >> s & 255) * (1 - u) + (b >> s & 255) * u + 0.5) << s;
    return c;
}

static void blend(Picture *p, int x, int y, uint32_t color, float alpha) {
    if (x < 0 || y < 0 || x >= p->width || y >= p->height || alpha <= 0) return;
    uint8_t *at = p->rgb + ((size_t)y * (size_t)p->width + (size_t)x) * 3;
    uint32_t was = (uint32_t)at[0] << 16 | (uint32_t)at[1] << 8 | at[2], is = tint(was, color, alpha > 1 ? 1 : alpha);
    for (int c = 0; c < 3; c++) at[c] = (uint8_t)(is >> (16 - 8 * c));
}

static float to_segment(float x, float y, const float s[4]) { // distance to a line from (s0, s1) to (s2, s3)
    float dx = s[2] - s[0], dy = s[3] - s[1], n = dx * dx + dy * dy,
          u = n > 0 ? ((x - s[0]) * dx + (y - s[1]) * dy) / n : 0;
    u = clamp01(u);
    return hypotf(x - s[0] - u * dx, y - s[1] - u * dy);
}

static void stroke(Picture *p, double x0, double y0, double x1, double y1, double width, uint32_t color, double alpha) {
    const float s[4] = {(float)x0, (float)y0, (float)x1, (float)y1}, half = (float)width / 2;
    for (int y = (int)(fmin(y0, y1) - width - 1); y <= fmax(y0, y1) + width + 1; y++)
        for (int x = (int)(fmin(x0, x1) - width - 1); x <= fmax(x0, x1) + width + 1; x++)
            blend(p, x, y, color,
                  (float)alpha * clamp01(half + 0.5f - to_segment((float)x + 0.5f, (float)y + 0.5f, s)));
}

// A box with round corners; line > 0: only its rim, so wide.
static void box(Picture *p, double x, double y, double w, double h, double radius, double line, uint32_t color,
                double alpha) {
    for (int j = (int)y - 3; j < y + h + 3; j++)
        for (int i = (int)x - 3; i < x + w + 3; i++) {
            double qx = fabs(i + 0.5 - x - w / 2) - w / 2 + radius, qy = fabs(j + 0.5 - y - h / 2) - h / 2 + radius;
            double d = hypot(fmax(qx, 0), fmax(qy, 0)) + fmin(fmax(qx, qy), 0) - radius;
            if (line > 0) d = fabs(d + line / 2) - line / 2;
            blend(p, i, j, color, (float)alpha * clamp01((float)(0.5 - d)));
        }
}

// The font's pixels joined to strokes, with real descenders. size: of a capital; anchor: 0 x is the left end, 1 the right.
__attribute__((format(printf, 7, 8)))
static void label(Picture *p, double x, double y, double size, double anchor, uint32_t color, const char *format, ...) {
    static const int STEP[4][2] = {{1, 0}, {0, 1}, {1, 1}, {-1, 1}};
    static const char *const DEEP = "gjpqy", *const DEEP_FONT = "00?AAA?1>"
                                                                "2062222B<"
                                                                "00NAAAN@@"
                                                                "00?AAA?11"
                                                                "00AAAA?1>";
    char text[256];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    float u = (float)size / 7, half = fmaxf(0.5f, 0.46f * u);
    x -= anchor * (6 * (double)strlen(text) - 1) * u;
    for (const char *t = text; *t; t++, x += 6 * u) {
        const char *deep = strchr(DEEP, *t),
                   *glyph = deep ? DEEP_FONT + 9 * (deep - DEEP) : FONT + 7 * ((*t < ' ' || *t > '~' ? '?' : *t) - ' ');
        float line[64][4];
        int lines = 0, rows = deep ? 9 : 7;
        #define LIT(c, r) ((c) >= 0 && (c) < 5 && (r) < rows && ((glyph[r] - '0') >> (4 - (c)) & 1))
        for (int i = 0; i < 5 * rows; i++) {
            int c = i % 5, r = i / 5, joined = 0;
            for (int k = 0; k < 4 && LIT(c, r); k++) {
                int a = c + STEP[k][0], b = r + STEP[k][1];
                if (!LIT(a, b) || (k > 1 && (LIT(a, r) || LIT(c, b))) || lines > 60) continue;
                float s[4] = {(float)x + (c + 0.5f) * u, (float)y + (r + 0.5f) * u, (float)x + (a + 0.5f) * u,
                              (float)y + (b + 0.5f) * u};
                memcpy(line[lines++], s, sizeof s), joined++;
            }
            float dot[4] = {(float)x + (c + 0.5f) * u, (float)y + (r + 0.5f) * u, (float)x + (c + 0.5f) * u,
                            (float)y + (r + 0.5f) * u};
            if (LIT(c, r) && !joined && lines < 64) memcpy(line[lines++], dot, sizeof dot);
        }
        #undef LIT
        for (int j = (int)y - 1; j < y + rows * u + 1; j++)
            for (int i = (int)x - 1; i < x + 5 * u + 1; i++) {
                float d = 1e9f;
                for (int k = 0; k < lines; k++) d = fminf(d, to_segment((float)i + 0.5f, (float)j + 0.5f, line[k]));
                blend(p, i, j, color, clamp01(half + 0.5f - d));
            }
    }
}

static void arrow(Picture *p, double x0, double y0, double x1, double y1, uint32_t color) {
    double n = hypot(x1 - x0, y1 - y0), ux = (x1 - x0) / n * 7, uy = (y1 - y0) / n * 7;
    stroke(p, x0, y0, x1, y1, 2, color, 1);
    stroke(p, x1, y1, x1 - ux - 0.6 * uy, y1 - uy + 0.6 * ux, 2, color, 1),
        stroke(p, x1, y1, x1 - ux + 0.6 * uy, y1 - uy - 0.6 * ux, 2, color, 1);
}

static void finish(const char *out, Picture p, const char *what) {
    save_png(out, p, what);
    printf("wrote %s: %d x %d pixels\n", out, p.width, p.height);
    free(p.rgb);
}

// ---- plots: a frame, ticks, curves -----------------------------------------------------------------------------------
typedef struct { Picture *p; double x, y, w, h, x0, x1, y0, y1; bool log_y; } Plot;
static double at_x(const Plot *a, double v) { return a->x + (v - a->x0) / (a->x1 - a->x0) * a->w; }
static double at_y(const Plot *a, double v) {
    double u = a->log_y ? (log(v) - log(a->y0)) / (log(a->y1) - log(a->y0)) : (v - a->y0) / (a->y1 - a->y0);
    return a->y + a->h * (1 - fmin(fmax(u, -0.01), 1.01));
}

static double nice_step(double range, int ticks) {                           // 1, 2 or 5 times a power of ten
    double raw = range / ticks, power = pow(10, floor(log10(raw)));
    return power * (raw <= power ? 1 : raw <= 2 * power ? 2 : raw <= 5 * power ? 5 : 10);
}

static void axes(const Plot *a, const char *title, const char *x_title) {
    double step = nice_step(a->x1 - a->x0, 8);
    label(a->p, a->x, a->y - 30, 15, 0, INK, "%s", title);
    label(a->p, a->x + a->w, a->y + a->h + 28, 11, 1, SOFT, "%s", x_title);
    for (double v = ceil(a->x0 / step - 1e-9) * step; v <= a->x1 + 1e-9 * step; v += step) {
        stroke(a->p, at_x(a, v), a->y, at_x(a, v), a->y + a->h, 1, FAINT, 1);
        label(a->p, at_x(a, v), a->y + a->h + 9, 11, 0.5, SOFT, "%g", fabs(v) < 1e-9 * step ? 0 : v);
    }
    step = a->log_y ? 0 : nice_step(a->y1 - a->y0, 6);
    double v = a->log_y ? pow(10, floor(log10(a->y0))) : ceil(a->y0 / step - 1e-9) * step;
    while (v <= a->y1 * (1 + 1e-9) + 1e-9 * step) {
        double digit = a->log_y ? round(v / pow(10, floor(log10(v) + 1e-9))) : 0;
        if (v >= a->y0 * (1 - 1e-9) || !a->log_y) {
            stroke(a->p, a->x, at_y(a, v), a->x + a->w, at_y(a, v), 1, FAINT, 1);
            double decades = a->log_y ? log10(a->y1 / a->y0) : 0;
            if (!a->log_y || digit == 1 || decades < 1 || (decades < 2 && (digit == 2 || digit == 5)))
                label(a->p, a->x - 8, at_y(a, v) - 5.5, 11, 1, SOFT, "%g", fabs(v) < 1e-9 * step ? 0 : v);
        }
        v += a->log_y ? pow(10, floor(log10(v) + 1e-9)) : step;
    }
    box(a->p, a->x, a->y, a->w, a->h, 0, 1, 0x9CA3AF, 1);
}

static void curve(const Plot *a, const double *x, const double *y, int n, double width, uint32_t color, double alpha) {
    for (int i = 1; i < n; i++)
        if (isfinite(y[i]) && isfinite(y[i - 1]))
            stroke(a->p, at_x(a, x[i - 1]), at_y(a, y[i - 1]), at_x(a, x[i]), at_y(a, y[i]), width, color, alpha);
}

static double *smoothed(const double *y, int n, int window) {                // the mean of a window around each point
    double *s = (double *)xalloc((size_t)n, sizeof(double));
    for (int i = 0; i < n; i++) {
        int low = i < window ? 0 : i - window, high = i + window < n ? i + window : n - 1;
        for (int j = low; j <= high; j++) s[i] += y[j] / (high - low + 1);
    }
    return s;
}

// ---- logs ---------------------------------------------------------------------------------------------------------------
enum { FIELDS = 8, MOST_LOGS = 8 };
typedef struct { char name[64]; int n; double *step, *field[FIELDS]; } Log;

// Lines "HEAD 10/600 .. KEY number ..": field k is the number after key k ("ratio+1": the second number after "ratio").
static Log read_log(const char *path, const char *head, const char *const *keys, int count) {
    Log l;
    char line[1024], key[32];
    const char *slash = strrchr(path, '/');
    FILE *file = fopen(path, "r");
    int room = 0;
    memset(&l, 0, sizeof l);
    snprintf(l.name, sizeof l.name, "%.60s", slash ? slash + 1 : path);
    if (!file) die("%s: %s; give the log of osp train or osp grpo (its standard output)", path, strerror(errno));
    while (fgets(line, sizeof line, file)) {
        char *at = line + strlen(head), *end;
        if (strncmp(line, head, strlen(head)) || *at != ' ') continue;
        if (l.n == room) {
            room = 2 * room + 64;
            for (int k = -1; k < count; k++) {
                double **v = k < 0 ? &l.step : &l.field[k];
                if (!(*v = (double *)realloc(*v, (size_t)room * sizeof(double)))) die("%s: out of memory", path);
            }
        }
        l.step[l.n] = strtod(at, &end);
        bool ok = end != at;
        for (int k = 0; k < count; k++) {
            int skip = keys[k][strlen(keys[k]) - 1] - '0', length = (int)strlen(keys[k]) - 2;
            if (!strchr(keys[k], '+')) skip = 0, length += 2;
            snprintf(key, sizeof key, " %.*s ", length, keys[k]);
            char *hit = strstr(line, key);
            double value = NAN;
            for (char *from = hit ? hit + strlen(key) : NULL; from && skip >= 0; skip--, from = end)
                value = strtod(from, &end);
            l.field[k][l.n] = value, ok = ok && isfinite(value);
        }
        l.n += ok;
    }
    fclose(file);
    if (!l.n)
        die("%s: no line like \"%s 10/600 %s ...\"; give the standard output of osp %s", path, head, keys[0],
            *head == 's' ? "train" : "grpo");
    return l;
}

static void span(double *low, double *high, const Log *logs, int count, int field) {   // field < 0: the steps
    *low = INFINITY, *high = -INFINITY;
    for (int i = 0; i < count; i++)
        for (int j = 0; j < logs[i].n; j++) {
            double v = field < 0 ? logs[i].step[j] : logs[i].field[field][j];
            *low = fmin(*low, v), *high = fmax(*high, v);
        }
    if (*high <= *low) *high = *low + (*low ? fabs(*low) * 0.1 : 1);
}

static void legend(Picture *p, const Log *logs, int count, double right, double y) {
    for (int i = 0; i < count; i++) {
        double wide = 6.0 * 13 / 7 * (double)strlen(logs[i].name);
        stroke(p, right - wide - 34, y + 6 + 20 * i, right - wide - 12, y + 6 + 20 * i, 4, color_of(i), 1);
        label(p, right, y + 20 * i, 13, 1, INK, "%s", logs[i].name);
    }
}

static void show_loss(const char *const *paths, int count, const char *out) {
    static const char *const KEYS[] = {"loss"};
    Log logs[MOST_LOGS];
    Picture p = new_picture(1100, 620, PAPER);
    Plot a = {&p, 80, 60, 980, 490, 0, 1, 0, 1, false};
    for (int i = 0; i < count; i++) logs[i] = read_log(paths[i], "step", KEYS, 1);
    double low;
    span(&low, &a.x1, logs, count, -1), span(&a.y0, &a.y1, logs, count, 0);
    a.log_y = a.y0 > 0 && a.y1 > 4 * a.y0;
    if (a.log_y) a.y0 *= 0.95, a.y1 *= 1.05;
    else low = 0.05 * (a.y1 - a.y0), a.y0 -= low, a.y1 += low;
    axes(&a, a.log_y ? "training loss (logarithmic)" : "training loss", "step");
    for (int i = 0; i < count; i++) {
        curve(&a, logs[i].step, logs[i].field[0], logs[i].n, 1.2, color_of(i), 0.3);
        curve(&a, logs[i].step, smoothed(logs[i].field[0], logs[i].n, logs[i].n / 40 + 1), logs[i].n, 3, color_of(i),
              1);
    }
    legend(&p, logs, count, a.x + a.w - 18, a.y + 18);
    finish(out, p, "training loss");
}

static void show_reward(const char *const *paths, int count, const char *out) {
    static const char *const KEYS[] = {"reward", "spread", "ratio", "ratio+1", "ratio+2", "kl"};
    static const char *const TITLE[] = {"reward (mean; the band is +- the spread of the videos)",
                                        "KL to the base model", "ratio (mean; band: min .. max)"};
    Log logs[MOST_LOGS];
    Picture p = new_picture(1100, 1010, PAPER);
    double low, high;
    for (int i = 0; i < count; i++) logs[i] = read_log(paths[i], "update", KEYS, 6);
    span(&low, &high, logs, count, -1);
    for (int k = 0; k < 3; k++) {
        Plot a = {&p, 100, k ? 520 + 250.0 * (k - 1) : 60, 960, k ? 170.0 : 370.0, low, high, 0, 1, false};
        double least = INFINITY, most = -INFINITY;
        for (int i = 0; i < count; i++)
            for (int j = 0; j < logs[i].n; j++) {
                double **f = logs[i].field, v = k == 0 ? f[0][j] : k == 1 ? f[5][j] : f[2][j], s = k ? 0 : f[1][j];
                least = fmin(least, v - s), most = fmax(most, k == 2 ? f[4][j] : v + s);
            }
        double room = most > least ? 0.06 * (most - least) : 0.01;
        a.y0 = k == 1 ? fmin(0, least) : least - room, a.y1 = most + room;
        axes(&a, TITLE[k], k == 2 ? "update" : "");
        for (int i = 0; i < count; i++) {
            const Log *l = &logs[i];
            for (double x = a.x + 1; x < a.x + a.w - 1 && k != 1; x++) {              // the band, column by column
                double v = a.x0 + (x + 0.5 - a.x) / a.w * (a.x1 - a.x0);
                int j = 0;
                while (j + 2 < l->n && l->step[j + 1] < v) j++;
                if (l->n < 2 || v < l->step[0] || v > l->step[l->n - 1]) continue;
                double u = (v - l->step[j]) / (l->step[j + 1] - l->step[j]), edge[2];
                for (int e = 0; e < 2; e++) {
                    double at[2];
                    for (int d = 0; d < 2; d++)
                        at[d] = k ? l->field[e ? 4 : 2][j + d] : l->field[0][j + d] + (e ? 1 : -1) * l->field[1][j + d];
                    edge[e] = at_y(&a, at[0] + u * (at[1] - at[0]));
                }
                stroke(&p, x + 0.5, edge[1], x + 0.5, edge[0], 1, color_of(i), count > 1 ? 0.12 : 0.2);
            }
            const double *y = l->field[k == 0 ? 0 : k == 1 ? 5 : 3];
            if (!k) curve(&a, l->step, y, l->n, 1.2, color_of(i), 0.35);
            curve(&a, l->step, k ? y : smoothed(y, l->n, l->n / 40 + 1), l->n, 3, color_of(i), 1);
        }
    }
    legend(&p, logs, count, 1040, 78);
    finish(out, p, "GRPO");
}

// ---- skiparse: who attends with whom -------------------------------------------------------------------------------------
static void show_skiparse(int P, int T, int H, int W, const char *out) {
    static const char *const TITLE[] = {"full", "token-wise", "group-wise"};
    int N = T * H * W, columns = T * W + T - 1, cell = 336 / (columns > H ? columns : H), wide = cell * columns;
    if (cell < 4) die("--grid %dx%dx%d: at most 84 tokens across, frames side by side", T, H, W);
    int panel = wide > 330 ? wide : 330, high = cell * H, width = 3 * panel + 4 * 40, top = 118, mark_h = H / 2,
        mark_w = W / 2 - (W > 4);
    Picture p = new_picture(width, top + high + 240, PAPER);
    label(&p, 40, 30, 20, 0, INK, "Skiparse-2D, P = %d: which tokens attend with the marked one", P);
    for (int k = FULL; k < PATTERNS; k++) {
        int left = 40 + k * (panel + 40), x0 = left + (panel - wide) / 2, mine = subsequence(k, mark_h, mark_w, P),
            heard = 0;
        Pattern pattern;
        pattern_init(&pattern, k, T, H, W, P, 1);
        for (int t = 0; t < T; t++)
            for (int h = 0; h < H; h++)
                for (int w = 0; w < W; w++) {
                    int s = subsequence(k, h, w, P), x = x0 + (t * (W + 1) + w) * cell, y = top + h * cell;
                    heard += s == mine;
                    box(&p, x + 0.5, y + 0.5, cell - 1, cell - 1, cell * 0.16, 0,
                        tint(color_of(s), PAPER, s == mine ? 0 : 0.78), 1);
                    if (h != mark_h || w != mark_w || t != T / 2) continue;
                    box(&p, x - 0.5, y - 0.5, cell + 1, cell + 1, cell * 0.2, cell * 0.13, INK, 1);
                    box(&p, x + cell * 0.32, y + cell * 0.32, cell * 0.36, cell * 0.36, cell * 0.18, 0, PAPER, 1);
                }
        label(&p, left, top - 48, 17, 0, INK, "%s", TITLE[k]);
        label(&p, left, top - 22, 11, 0, SOFT,
              k == FULL ? "attends with all %d tokens" : "attends with %d of %d tokens", heard, N);
        int y = top + high + 34, at = pattern.place[(T / 2 * H + mark_h) * W + mark_w];
        label(&p, left, y, 11, 0, SOFT, k == FULL ? "one sequence, (t, h, w) order" : "rearranged: %d subsequences",
              pattern.count);
        double one = (double)panel / N;
        for (int j = 0; j < N; j++) {
            int s = 0, token = pattern.order[j];
            while (pattern.start[s + 1] <= j) s++;
            double shade = 0.12 + 0.38 * (double)(token / W % H) / H;        // rows of the frame, top to bottom
            fill_rect(&p, (int)(left + j * one), y + 22, (int)ceil(one), 30,
                      tint(color_of(s), PAPER, s == mine ? shade : 0.66 + 0.4 * shade));
        }
        for (int s = 1; s < pattern.count; s++)
            fill_rect(&p, (int)(left + pattern.start[s] * one) - 1, y + 20, 2, 34, PAPER);
        double x = left + (at + 0.5) * one;
        stroke(&p, x, y + 18, x, y + 56, 2.5, INK, 1);
        box(&p, x - 4, y + 56, 8, 8, 4, 0, INK, 1);
        for (int s = 0; s < pattern.count; s++) { // what is computed: squares on the diagonal
            double side = 72, b = side * pattern.start[s] / N, e = side * pattern.start[s + 1] / N;
            box(&p, left + b, y + 84 + b, e - b, e - b, 1.5, 0, tint(color_of(s), PAPER, s == mine ? 0 : 0.6), 1);
        }
        box(&p, left, y + 84, 72, 72, 0, 1, 0xC4C8CF, 1);
        double pairs = attention_pairs(k, T, H, W, P) / N / N;
        label(&p, left + 90, y + 96, 11, 0, SOFT, "attention: queries x keys");
        if (k == FULL) label(&p, left + 90, y + 118, 17, 0, INK, "all %d x %d", N, N);
        else if (fabs(pairs * P * P - 1) < 1e-9) label(&p, left + 90, y + 118, 17, 0, INK, "1/%d of them", P * P);
        else label(&p, left + 90, y + 118, 17, 0, INK, "%.3f of them", pairs);
        free(pattern.order), free(pattern.place), free(pattern.start), free(pattern.first);
    }
    label(&p, 40, p.height - 30, 11, 0, SOFT,
          "A token-wise and a group-wise block in turn: every token hears every other, at 1/%d of the attention each.",
          P * P);
    finish(out, p, "Skiparse-2D");
}

// ---- model: the layout of the blocks, and one of them --------------------------------------------------------------------
static void show_model(const Config *c, const char *name, const char *out) {
    static const uint32_t TONE[] = {0x374151, 0x2F6DB5, 0xE8792B};
    static const char *const TITLE[] = {"full attention", "token-wise sparse", "group-wise sparse"};
    int L = c->num_layers, T = c->T, H = c->H_l / 2, W = c->W_l / 2, counts[PATTERNS] = {0, 0, 0}, y = 96;
    double N = (double)T * H * W, step = 1020.0 / (L > 12 ? L : 12), side = fmin(step * 0.82, 54);
    Picture p = new_picture(1100, 544 + (int)(side * 1.5), PAPER);
    label(&p, 40, 30, 20, 0, INK, "OSP-Next, %s: %d tokens (%dx%dx%d), dim %d", name, (int)N, T, H, W, c->dim);
    for (int i = 0; i < L; i++) {
        int k = block_pattern(i, L, c->num_full_blocks);
        double x = 40 + i * step;
        counts[k]++;
        box(&p, x, y, side, side * 1.5 + 14, 5, 0, TONE[k], 1);
        label(&p, x + side / 2, y + side * 0.75, fmin(14, side * 0.6), 0.5, PAPER, "%c", PATTERN_LETTER[k]);
        if (i + 1 < L) stroke(&p, x + side + 1, y + side * 0.75 + 7, x + step - 1, y + side * 0.75 + 7, 2, 0xB6BBC4, 1);
    }
    y += (int)(side * 1.5) + 40;
    double x = 40;
    for (int k = 0; k < PATTERNS; k++) {
        box(&p, x, y, 14, 14, 4, 0, TONE[k], 1);
        label(&p, x + 22, y + 2, 11, 0, INK, "%c  %d x %s", PATTERN_LETTER[k], counts[k], TITLE[k]);
        x += 300;
    }
    y += 44;
    label(&p, 40, y, 13, 0, SOFT, "The whole model");
    label(&p, 420, y, 13, 0, SOFT, "One block: x is the residual stream, [N, dim]");
    char shape[8][96];
    snprintf(shape[0], 96, "latent [%d, %d, %d, %d]", c->in_dim, T, 2 * H, 2 * W);
    snprintf(shape[1], 96, "patches 2x2 -> [%d, %d]", (int)N, c->dim);
    snprintf(shape[2], 96, "%d blocks", L);
    snprintf(shape[3], 96, "norm, head -> [%d, %d]", (int)N, 4 * c->out_dim);
    snprintf(shape[4], 96, "velocity [%d, %d, %d, %d]", c->out_dim, T, 2 * H, 2 * W);
    for (int i = 0; i < 5; i++) {
        double by = y + 34 + i * 62;
        box(&p, 40, by, 330, 40, 8, 0, i == 2 ? 0xE3ECF7 : 0xF3F4F6, 1),
            box(&p, 40, by, 330, 40, 8, 1.2, i == 2 ? 0x2F6DB5 : 0xC4C8CF, 1);
        label(&p, 205, by + 14.5, 11, 0.5, INK, "%s", shape[i]);
        if (i < 4) arrow(&p, 205, by + 42, 205, by + 59, SOFT);
    }
    snprintf(shape[0], 96, "x += gate1 * SelfAttn( LN(x) * (1 + scale1) + shift1 )");
    snprintf(shape[1], 96, "q k v o [%d, %d]; %d heads of %d; RMSNorm, RoPE", c->dim, c->dim, c->num_heads,
             c->dim / c->num_heads);
    snprintf(shape[2], 96, "x += CrossAttn( LN(x), text )");
    snprintf(shape[3], 96, "text [%d, %d] -> [%d, %d]; no RoPE, no mask", c->text_len, c->text_dim, c->text_len,
             c->dim);
    snprintf(shape[4], 96, "x += gate2 * ffn( LN(x) * (1 + scale2) + shift2 )");
    snprintf(shape[5], 96, "%d -> %d -> GELU -> %d", c->dim, c->ffn_dim, c->dim);
    snprintf(shape[6], 96, "t -> e [%d] -> shift, scale, gate: [6, %d]", c->dim, c->dim);
    snprintf(shape[7], 96, "plus the block's own learned modulation [6, %d]", c->dim);
    for (int i = 0; i < 4; i++) {
        double by = y + 34 + i * 76;
        uint32_t tone = i == 3 ? 0x2E9E6B : i == 1 ? 0xA04FA8 : 0x2F6DB5;
        box(&p, 420, by, 640, 60, 8, 0, tint(tone, PAPER, 0.9), 1),
            box(&p, 420, by, 640, 60, 8, 1.2, tint(tone, PAPER, 0.3), 1);
        label(&p, 440, by + 14, 13, 0, INK, "%s", shape[2 * i]);
        label(&p, 440, by + 37, 11, 0, SOFT, "%s", shape[2 * i + 1]);
    }
    finish(out, p, "model");
}

// ---- hif8: the format beside others, a checkpoint's weights under it --------------------------------------------------------
// The positive finite values of a format with e exponent bits and m of mantissa, bias b, cut after `most`; rising.
static int float8_values(double *v, int m, int b, double most) {
    int n = 0;
    for (int code = 1; code < 128; code++) {
        int E = code >> m, M = code & ((1 << m) - 1);
        double x = E ? ldexp(1 + ldexp(M, -m), E - b) : ldexp(M, 1 - b - m);
        if (x <= most) v[n++] = x;
    }
    return n;
}

static void show_hif8(const char *weights, const char *out) {
    static const char *const NAME[] = {"HiF8", "FP8 E4M3", "FP8 E5M2", "bfloat16"};
    double v[4][128], low = -24, high = 17;
    int n[4], height = weights ? 1010 : 690;
    hif8_values();
    for (n[0] = 0; n[0] + 2 < positive_count; n[0]++) v[0][n[0]] = positive_hif8[n[0] + 1];
    n[1] = float8_values(v[1], 3, 7, 448), n[2] = float8_values(v[2], 2, 15, 57344), n[3] = 0;
    Picture p = new_picture(1100, height, PAPER);
    Plot a = {&p, 110, 70, 950, 350, low, high, 0x1p-8, 3, true};
    label(&p, a.x, 28, 15, 0, INK, "Relative step: from a value to the next one, over the value");
    for (int e = -7; e <= 0; e++) {
        stroke(&p, a.x, at_y(&a, ldexp(1, e)), a.x + a.w, at_y(&a, ldexp(1, e)), 1, FAINT, 1);
        label(&p, a.x - 8, at_y(&a, ldexp(1, e)) - 5.5, 11, 1, SOFT, e ? "1/%d" : "1", 1 << -e);
    }
    for (int k = -24; k <= 16; k += 4) {
        stroke(&p, at_x(&a, k), a.y, at_x(&a, k), height - (weights ? 50 : 30), 1, FAINT, 1);
        label(&p, at_x(&a, k), a.y + a.h + 8, 11, 0.5, SOFT, "2^%d", k);
    }
    box(&p, a.x, a.y, a.w, a.h, 0, 1, 0x9CA3AF, 1);
    for (int f = 3; f >= 0; f--) {                                           // one line a binade: the widest step in it
        double before = -1, width = f ? 2.2 : 4;
        for (int e = (int)low; e < (int)high; e++) {
            double step = f == 3 ? 0x1p-7 : 0;
            for (int i = 0; i + 1 < n[f]; i++)
                if (ilogb(v[f][i]) == e) step = fmax(step, (v[f][i + 1] - v[f][i]) / ldexp(1, e));
            if (step > 0)
                stroke(&p, at_x(&a, e), at_y(&a, step), at_x(&a, e + 1), at_y(&a, step), width, color_of(f), 1);
            if (step > 0 && before > 0)
                stroke(&p, at_x(&a, e), at_y(&a, before), at_x(&a, e), at_y(&a, step), width, color_of(f), 1);
            before = step;
        }
        double y = 490 + 46.0 * f;
        label(&p, a.x - 8, y + 3, 11, 1, color_of(f), "%s", NAME[f]);
        if (f == 3) box(&p, a.x, y - 4, a.w, 24, 0, 0, color_of(f), 0.75);
        for (int i = 0; i < n[f]; i++)
            if (v[f][i] >= ldexp(1, (int)low))
                stroke(&p, at_x(&a, log2(v[f][i])), y - 4, at_x(&a, log2(v[f][i])), y + 20, 1.3, color_of(f), 0.9);
    }
    label(&p, a.x, 462, 11, 0, SOFT, "the positive values themselves (bfloat16: 128 a binade, on to 2^-133 and 2^127)");
    if (weights) {
        enum { BINS = 164 };
        double bin[BINS] = {0}, all = 0, most = 0, zero_count = 0;
        File file;
        file_open(&file, weights);
        for (int i = 0; i < file.count; i++) {
            const FileTensor *t = &file.tensors[i];
            if (t->rank != 2 || strncmp(t->name, "blocks.", 7) || !ends_with(t->name, ".weight")) continue;
            float *x = file_read(&file, t, t->count), amax = 0;
            for (size_t j = 0; j < t->count; j++) amax = fmaxf(amax, fabsf(x[j]));
            for (size_t j = 0; j < t->count; j++, all++) {
                double u = (log2(fabs((double)x[j] * hif8_scale(15, amax))) - low) / (high - low) * BINS;
                if (u >= 0 && u < BINS) bin[(int)u]++; else zero_count++;
            }
            free(x);
        }
        if (!all) die("%s: no matrices blocks.*.weight in it; give a checkpoint of osp train", weights);
        Plot b = {&p, a.x, 720, a.w, 240, low, high, 0, 1, false};
        for (int i = 0; i < BINS; i++) most = fmax(most, bin[i]);
        for (int i = 0; i < BINS; i++) {
            double centre = fabs(floor(low + (i + 0.5) / BINS * (high - low))), h = bin[i] / most * (b.h - 12);
            uint32_t tone = tint(color_of(0), PAPER, centre <= 3 ? 0 : centre <= 7 ? 0.35 : centre <= 15 ? 0.6 : 0.8);
            box(&p, b.x + b.w * i / BINS + 0.5, b.y + b.h - h, b.w / BINS - 1, h, 1, 0, tone, 1);
        }
        label(&p, b.x, b.y - 26, 12, 0, INK,
              "Block matrices, |w| * 15 / max|w|: %.0f weights, %.2g %% below 2^-24 or zero", all,
              100 * zero_count / all);
        box(&p, b.x, b.y, b.w, b.h, 0, 1, 0x9CA3AF, 1);
        for (int k = 0; k < 4; k++) {
            box(&p, b.x + 14, b.y + 14 + 22 * k, 14, 14, 3, 0,
                tint(color_of(0), PAPER,
                     k == 0   ? 0
                     : k == 1 ? 0.35
                     : k == 2 ? 0.6
                              : 0.8),
                1);
            label(&p, b.x + 36, b.y + 16 + 22 * k, 11, 0, SOFT, "%d bit%s of mantissa", 3 - k, k == 2 ? "" : "s");
        }
        for (int k = -24; k <= 16; k += 4) label(&p, at_x(&b, k), b.y + b.h + 8, 11, 0.5, SOFT, "2^%d", k);
    }
    for (int f = 0; f < 4; f++) {
        box(&p, a.x + a.w - 320 + 160 * (f % 2), a.y + 14 + 24 * (f / 2), 22, 4, 2, 0, color_of(f), 1);
        label(&p, a.x + a.w - 290 + 160 * (f % 2), a.y + 10 + 24 * (f / 2), 12, 0, INK, "%s", NAME[f]);
    }
    finish(out, p, "HiF8");
}

// ---- ranks: who holds which tokens, and what one exchange moves ------------------------------------------------------------
static void show_ranks(int R, int P, int H, int W, const char *out) {
    static const char *const TITLE[] = {"full block: a cut of the sequence", "token-wise: whole subsequences",
                                        "group-wise: whole subsequences"};
    Pattern pattern[PATTERNS];
    if (P * P % R) die("-R %d: must divide P^2 = %d", R, P * P);
    int N = H * W, cell = 320 / (W > H ? W : H), high = cell * H, y = 118;
    if (cell < 4) die("--grid %dx%d: at most 80 tokens across", H, W);
    Picture p = new_picture(1120, y + high + 310, PAPER);
    label(&p, 40, 30, 20, 0, INK, "Sparse sequence parallelism: %d ranks share %d tokens, P = %d", R, N, P);
    for (int k = 0; k < PATTERNS; k++) {
        int left = 40 + 360 * k;
        pattern_init(&pattern[k], k, 1, H, W, P, R);
        label(&p, left, y - 26, 12, 0, INK, "%s", TITLE[k]);
        for (int i = 0; i < N; i++) {
            int owner = 0;
            while (pattern[k].first[owner + 1] <= pattern[k].place[i]) owner++;
            box(&p, left + i % W * cell + 0.5, y + i / W * cell + 0.5, cell - 1, cell - 1, cell * 0.16, 0,
                color_of(owner), 1);
        }
    }
    y += high + 44;
    label(&p, 40, y, 13, 0, INK, "Token-wise to group-wise");
    label(&p, 40, y + 22, 11, 0, SOFT, "tokens from rank (row) to rank");
    int side = 168 / R, moved = 0;
    for (int r = 0; r < R; r++) {
        Exchange e;
        exchange_init(&e, &pattern[TOKEN_WISE], &pattern[GROUP_WISE], 1, r, R);
        for (int s = 0; s < R; s++) {
            double x = 76 + s * side, top = y + 66 + r * side;
            moved += r == s ? 0 : e.send[s];
            box(&p, x, top, side - 3, side - 3, 5, 0, r == s ? 0xF3F4F6 : tint(color_of(r), PAPER, 0.55), 1);
            label(&p, x + (side - 3) / 2.0, top + side / 2.0 - 7, 11, 0.5, r == s ? 0x9CA3AF : INK, "%d", e.send[s]);
            if (!r) label(&p, x + (side - 3) / 2.0, y + 48, 11, 0.5, SOFT, "%d", s);
        }
        label(&p, 58, y + 66 + r * side + side / 2.0 - 7, 11, 0.5, color_of(r), "%d", r);
        free(e.pack), free(e.unpack), free(e.send), free(e.receive);
    }
    static const char *const WHAT[] = {"SSP", "Ulysses"}, *const CALL[] = {"x", "q", "k", "v", "o"};
    double all = 4.0 * N * (R - 1) / R, unit = 520 / all;
    label(&p, 400, y, 13, 0, INK, "Sent for one sparse block, in rows of dim numbers");
    for (int u = 0; u < 2; u++) {
        double top = y + 48 + 78 * u, x = 490, rows = u ? all / 4 : moved;
        label(&p, 476, top + 14, 13, 1, INK, "%s", WHAT[u]);
        for (int c = 0; c < (u ? 4 : 1); c++, x += rows * unit) {
            box(&p, x, top, rows * unit - 3, 40, 6, 0, color_of(u), 1);
            label(&p, x + rows * unit / 2 - 2, top + 14, 13, 0.5, PAPER, "%s", CALL[u ? c + 1 : 0]);
        }
        label(&p, 490, top + 48, 11, 0, SOFT, u ? "4 All-to-Alls, %.0f rows" : "1 All-to-All, %.0f rows",
              u ? all : rows);
    }
    label(&p, 400, y + 212, 11, 0, SOFT, "Here SSP moves %.2f of what Ulysses moves.", moved / all);
    finish(out, p, "ranks");
}

// H x W or T x H x W.
static void read_grid(const char *text, int *T, int *H, int *W) {
    int v[3], n = 0;
    const char *at = text;
    for (char *end; n < 3; at = end + 1) {
        v[n++] = (int)strtol(at, &end, 10);
        if (end == at || v[n - 1] < 1 || v[n - 1] > 4096 || (*end && *end != 'x') || (n == 3 && *end)) { n = 0; break; }
        if (!*end) break;
    }
    if (n < 2) die("--grid \"%.40s\": expected HxW or TxHxW, such as 12x20", text);
    *T = n == 3 ? v[0] : 1, *H = v[n - 2], *W = v[n - 1];
}

typedef struct { const char *out, *grid, *weights, *preset; int P, R; } ShowOptions;

static int show(int argc, char **argv) {
    static const char *const KINDS[] = {"skiparse", "model", "loss", "reward", "hif8", "ranks", NULL};
    const char *paths[MOST_LOGS];
    int T, H, W, logs = 0;
    ShowOptions o;
    static const Option options[] = {
        STRING("", "-o", ShowOptions, out, NULL, "picture to write, .png"),
        INT("", "-P", ShowOptions, P, 2, 1, 8, "sparse ratio"),
        STRING("", "--grid", ShowOptions, grid, NULL, "tokens HxW or TxHxW (skiparse, ranks)"),
        INT("", "-R", ShowOptions, R, 4, 1, 64, "ranks"),
        STRING("", "-w", ShowOptions, weights, NULL, "checkpoint (model, hif8)"),
        STRING("", "--preset", ShowOptions, preset, "14b-720p", "tiny, toy, 1.3b-480p, 14b-720p or 14b-768p (model)"),
    };
    const char *example = "test_osp show skiparse|model|loss LOG..|reward LOG..|hif8|ranks -o picture.png",
               *kind = argc > 0 ? argv[0] : "-h";
    option_defaults(options, 6, 0, &o);
    if (*kind != '-') one_of("show", kind, KINDS);
    else { print_help(example, options, 6, 0, &o); return 0; }
    for (; argc > 1 && argv[1][0] != '-'; argc--, argv++) {
        if (logs == MOST_LOGS) die("at most %d logs in one picture", MOST_LOGS);
        paths[logs++] = argv[1];
    }
    parse_options(argc - 1, argv + 1, example, options, 6, 0, &o, NULL);
    const char *out = o.out, *grid = o.grid, *weights = o.weights, *preset = o.preset;
    int P = o.P, R = o.R;
    if (!out || !ends_with(out, ".png")) die("no picture to write: -o NAME.png");
    check_writable(out);
    bool skiparse = !strcmp(kind, "skiparse"), reward = !strcmp(kind, "reward");
    read_grid(grid ? grid : skiparse ? "12x12" : "16x16", &T, &H, &W);
    if ((reward || !strcmp(kind, "loss")) && !logs) die("no log given: test_osp show %s LOG -o %s", kind, out);
    if (skiparse) show_skiparse(P, T, H, W, out);
    else if (reward) show_reward(paths, logs, out);
    else if (!strcmp(kind, "loss")) show_loss(paths, logs, out);
    else if (!strcmp(kind, "hif8")) show_hif8(weights, out);
    else if (!strcmp(kind, "ranks")) show_ranks(R, P, H, W, out);
    else {
        File f;
        Config c = shape_config(preset);
        if (weights) file_open(&f, weights), c = config_read(&f);
        if (!c.T) die("%s: no size of clips in its metadata; give --preset instead", weights);
        show_model(&c, weights ? weights : preset, out);
    }
    return 0;
}

// ============================================================================================================
// mutate: can the tests fail? Single terms of a copy of osp.c are broken, one at a time; every copy must be caught
// ============================================================================================================
// A mutant that does not compile, or whose place is not found exactly once, is an error of this table. More than one
// place: alternating find and replace strings.
typedef struct { const char *name, *find, *replace, *find2, *replace2; } Mutant;
static const Mutant MUTANTS[] = {
    // HiF8
    {"HiF8: overflow beyond 40960, not at it", "a >= 0x47200000u", "a > 0x47200000u", 0, 0},
    {"HiF8: 2^-23 rounds to zero", "a < 0x34000000u ? 0u", "a <= 0x34000000u ? 0u", 0, 0},
    {"HiF8: ties towards zero", "(a + (1u << (drop - 1)))", "(a + (1u << (drop - 1)) - 1u)", 0, 0},
    {"HiF8: |E| = 8 keeps two mantissa bits", "+ (size > 7)", "+ (size > 8)", 0, 0},
    {"HiF8: exponent's sign in a code", "s = E < 0, mantissa", "s = E > 0, mantissa", 0, 0},
    {"HiF8: maximum clamped to 1e-7", "amax < 1e-8f ? 1e-8f", "amax < 1e-7f ? 1e-7f", 0, 0},
    {"HiF8: the embeddings and the head quantized too", "p->block_matrix = block >= 0 &&", "p->block_matrix =", 0, 0},
    {"HiF8: weights scaled to 14", "hif8_tensor(p->c, p->c, p->count, 15", "hif8_tensor(p->c, p->c, p->count, 14", 0,
     0},
    {"HiF8: gradients scaled to 15", "rows * (size_t)out, 224)", "rows * (size_t)out, 15)", 0, 0},
    {"HiF8: dy not quantized", "if (r->m->c.quant && l->w->block_matrix) quantize(r, dy", "if (0) quantize(r, dy", 0,
     0},
    {"HiF8: db from dy before it is quantized", "if (r->m->c.quant && l->w->block_matrix) quantize(r, dy",
     "linear_backward(NULL, NULL, l->b->dw, dy, x, l->w->c, rows, out, in, false);\n    if (r->m->c.quant && "
     "l->w->block_matrix) quantize(r, dy",
     "linear_backward(dx, l->w->dw, l->b->dw, dy", "linear_backward(dx, l->w->dw, NULL, dy"},
    {"HiF8: dq not quantized", "quantize(r, dq, dq, rows * width, 224);", "", 0, 0},
    {"HiF8: dv of the text and all else not quantized", "quantize(r, dv, dv, kv_rows * width, 224);", "", 0, 0},
    {"HiF8: v not quantized", "quantize(r, s->v, s->v, kv_rows * width, 15);", "", 0, 0},
    {"HiF8: k scaled to 14", "quantize(r, s->k, s->k, kv_rows * width, 15)",
     "quantize(r, s->k, s->k, kv_rows * width, 14)", 0, 0},
    {"HiF8: attention's output not quantized", "quantize(r, s->oq, s->o, rows * width, 15);",
     "copy(s->oq, s->o, rows * width * act_size());", 0, 0},
    // Skiparse
    {"Skiparse: token-wise and group-wise exchanged", "i % 2 == 0 ? TOKEN_WISE", "i % 2 == 1 ? TOKEN_WISE", 0, 0},
    {"Skiparse: token-wise subsequences transposed", "return h % P * P + w % P", "return w % P * P + h % P", 0, 0},
    {"Skiparse: groups one token wide", "return h / P % P * P + w / P % P", "return h / P % P * P + w % P", 0, 0},
    {"Skiparse: one full block too many", "i < F / 2 ||", "i <= F / 2 ||", 0, 0},
    {"Skiparse: the exchange's map transposed, forward", "r->move[at][next->place].pack",
     "r->move[next->place][at].pack", 0, 0},
    {"Skiparse: the exchange's map transposed, backward", "exchange_rows(r, moved, r->dx, from, to)",
     "exchange_rows(r, moved, r->dx, to, from)", 0, 0},
    {"Skiparse: ranks unpack in order of arrival", "e->unpack[b * next + j - to->first[rank]] = arrived++",
     "e->unpack[arrived] = arrived, arrived++", 0, 0},
    {"Skiparse: ranks pack the first sample twice", "e->pack[packed++] = b * mine + i", "e->pack[packed++] = i", 0, 0},
    // RoPE, norms, modulation
    {"RoPE: h and w exchanged", "token / (H * W), token / W % H, token % W",
     "token / (H * W), token % W, token / W % H", 0, 0},
    {"RoPE: the spare pairs go to w", "{pairs - 2 * (pairs / 3), pairs / 3, pairs / 3}",
     "{pairs / 3, pairs / 3, pairs - 2 * (pairs / 3)}", 0, 0},
    {"RoPE: turns the other way", "x[2 * p] = a * c - b * s", "x[2 * p] = a * c + b * s",
     "x[2 * p + 1] = a * s + b * c", "x[2 * p + 1] = b * c - a * s"},
    {"RoPE: frequencies of the whole head", "pow(10000.0, -(double)j / m[axis])", "pow(10000.0, -(double)j / pairs)", 0,
     0},
    {"RoPE: tokens take the place's position", "token = p->order[(size_t)first + i]",
     "token = (int)((size_t)first + i)", 0, 0},
    {"RoPE: not turned back in backward", "r % n * (D / H), -1.0f", "r % n * (D / H), 1.0f", 0, 0},
    {"LN: eps outside the root", "sqrtf(var / (float)D + eps)", "(sqrtf(var / (float)D) + eps)", 0, 0},
    {"RMSNorm: no eps", "sqrtf(squares / (float)D + eps)", "sqrtf(squares / (float)D)", 0, 0},
    {"RMSNorm: v normalised like k", "linear(s->v, context, &w->v, kv_rows);",
     "linear(s->v, context, &w->v, kv_rows);\n    rmsnorm_rope_forward(s->v, s->k_rstd, s->v, w->norm_k->w, NULL, B, "
     "kv_n, D, heads, (float)c->eps);",
     0, 0},
    {"eps 1e-5", "\"number\") : 1e-6", "\"number\") * 10 : 1e-5", 0, 0},
    {"modulation: shift and scale exchanged", "PerSample shift1 = of_row(e, 0, 6, D), scale1 = of_row(e, 1, 6, D)",
     "PerSample shift1 = of_row(e, 1, 6, D), scale1 = of_row(e, 0, 6, D)", 0, 0},
    {"modulation: no gate after self-attention", "s->x0, s->self.y, gate1,", "s->x0, s->self.y, NOTHING,", 0, 0},
    {"modulation: the ffn takes attention's gate", "x_out, s->x2, s->y, gate2, pack",
     "x_out, s->x2, s->y, gate1, pack", 0, 0},
    {"modulation: head's shift and scale exchanged", "NULL, NOTHING, of_row(r->head_e, 0, 2, D)",
     "NULL, NOTHING, of_row(r->head_e, 1, 2, D)", 0, 0},
    {"norm backward: shift's and scale's gradients exchanged", "of_row(de, 3, 6, D), of_row(de, 4, 6, D), r->d1",
     "of_row(de, 4, 6, D), of_row(de, 3, 6, D), r->d1", 0, 0},
    {"norm backward: one term 1 % off", "sum_gx /= (float)D", "sum_gx *= 1.01f / (float)D", 0, 0},
    {"rmsnorm backward: one term 1 % off", "sum *= scale / (float)D", "sum *= 1.01f * scale / (float)D", 0, 0},
    {"gate backward: no gate", "g ? g[i] * dxr[i] : dxr[i]", "dxr[i]", 0, 0},
    // The rest of the model
    {"GELU: another constant", "0.044715f * u[i] * u[i] * u[i]", "0.04415f * u[i] * u[i] * u[i]", 0, 0},
    {"GELU backward: 2 for 3", "1.0f + 3.0f * cube", "1.0f + 2.0f * cube", 0, 0},
    {"SiLU backward: without 1 - s", "x[i] * (e * s) * s", "x[i] * s * s", 0, 0},
    {"attention: scale of another width", "    float c = (float)(LOG2E / sqrt((double)t.dim));",
     "    float c = (float)(LOG2E / sqrt((double)t.dim + 1));", 0, 0},
    {"attention backward: without the mean", "= s[j] * (dp[j] - D[j])", "= s[j] * dp[j]", 0, 0},
    {"attention backward: dq 1 % off", "= scale * dqt", "= 1.01f * scale * dqt", 0, 0},
    {"attention backward: the text's gradient from k alone",
     "linear_back(r, dcontext, dv, context, &w->v, kv_rows, true)",
     "linear_back(r, dcontext, dv, context, &w->v, kv_rows, false)", 0, 0},
    {"linear backward: db 1 % off", "p[i] += dy[r * O + i];", "p[i] += 1.01f * dy[r * O + i];", 0, 0},
    {"patches: ph and pw exchanged", "2 * h + patch / 2) * 2 * Wt + 2 * w + patch % 2",
     "2 * h + patch % 2) * 2 * Wt + 2 * w + patch / 2", 0, 0},
    {"time: sin before cos",
     "out[j] = (float)cos(angle), out[half + j] = (float)sin(angle)",
     "out[j] = (float)sin(angle), out[half + j] = (float)cos(angle)", 0, 0},
    {"time backward: nothing from the head", "lincomb(r->small, 1, r->small, 1, r->de_e",
     "lincomb(r->small, 1, r->small, 0, r->de_e", 0, 0},
    {"words: no positions", "* D + i] + pos[r % (size_t)L * D + i]", "* D + i] + 0 * pos[r % (size_t)L * D + i]", 0, 0},
    {"loss: gradient without its 2", "lincomb(dout, 2.0f / (float)n", "lincomb(dout, 1.0f / (float)n", 0, 0},
    // Flow matching, optimizer
    {"sampling: steps the wrong way",
     "sigma[i], cond, uncond, guidance);\n        lincomb(x, 1, x, (float)(sigma[i + 1] - sigma[i])",
     "sigma[i], cond, uncond, guidance);\n        lincomb(x, 1, x, (float)(sigma[i] - sigma[i + 1])", 0, 0},
    {"guidance: conditional and unconditional exchanged", "(float)(1 - g), v, (float)g, r->out",
     "(float)g, v, (float)(1 - g), r->out", 0, 0},
    {"schedule: shift's denominator", "s * sigma / (1 + (s - 1) * sigma)", "s * sigma / (1 + s * sigma)", 0, 0},
    {"training: the target's sign", "target[i] = noise - x0", "target[i] = x0 - noise", 0, 0},
    {"training: shift of another resolution", "(tokens - 256) / (4096 - 256)", "tokens / 4096", 0, 0},
    {"training: sees the captions that eval asks", "k++) % CAPTIONS); while (held_out(caption));",
     "k++) % CAPTIONS); while (0);", 0, 0},
    {"AdamW: no bias correction of m", "lr / (1.0 - pow(beta1, t))", "lr", 0, 0},
    {"AdamW: no bias correction of v", "1.0 / sqrt(1.0 - pow(beta2, t))", "1.0", 0, 0},
    {"AdamW: no decay", "keep * w[i] - rate", "w[i] - rate", 0, 0},
    {"AdamW: eps before the correction", "(sqrtf(v[i]) * grow + eps)", "((sqrtf(v[i]) + eps) * grow)", 0, 0},
    {"clipping: by the square of the norm", "options->clip / norm : 1", "options->clip / (norm * norm) : 1", 0, 0},
    // Mix-GRPO
    {"GRPO: sample deviation", "(reward[i] - mean) * (reward[i] - mean) / G",
     "(reward[i] - mean) * (reward[i] - mean) / (G - 1)", 0, 0},
    {"GRPO: 1e-8 for 1e-4", "sqrt(var) + 1e-4", "sqrt(var) + 1e-8", 0, 0},
    {"GRPO: advantages not clipped", "a > 5 ? 5", "a > 50 ? 50", 0, 0},
    {"GRPO: clipped on the wrong side", "clipped = -A * inside > -A * ratio", "clipped = -A * inside < -A * ratio", 0,
     0},
    {"GRPO: gradient of clipped ratios", "clipped ? 0 : -A * ratio", "-A * ratio", 0, 0},
    {"GRPO: KL's gradient reversed", "(float)(k - w), mean_i", "(float)(-k - w), mean_i", 0, 0},
    {"GRPO: KL without its 1/2", "/ n / (2 * variance)", "/ n / variance", 0, 0},
    {"GRPO: mean of the SDE without its drift", "1 + eta * eta / (2 * sigma) * dt",
     "1 + 0 * eta * eta / (2 * sigma) * dt", 0, 0},
    {"GRPO: deviation of the SDE", "eta * sqrt(-dt)", "eta * -dt", 0, 0},
    {"GRPO: log-probability's deviation", "- log(std)", "+ log(std)", 0, 0},
    {"GRPO: no guidance in the gradient", "s.b * o->guidance / (n", "s.b / (n", 0, 0},
    {"LoRA: merged without alpha/rank", "lincomb(scaled, l->scale", "lincomb(scaled, 1", 0, 0},
    {"LoRA: gradient without alpha/rank", "lincomb(p->dw, l->scale, p->dw", "lincomb(p->dw, 1, p->dw", 0, 0},
    // Files, the world
    {"files: bfloat16 cut, not rounded", "(u + 0x7FFF + (u >> 16 & 1)) >> 16", "u >> 16", 0, 0},
    {"files: moments exchanged on resuming", "float *const arenas[] = {o->w, o->m, o->v, o->ema};\n    File f",
     "float *const arenas[] = {o->w, o->v, o->m, o->ema};\n    File f", 0, 0},
    {"files: a HiF8 weight is off by its scale", "hif8_decode((uint8_t)code) / k", "hif8_decode((uint8_t)code) * k", 0,
     0},
    {"ShapesBench: left and right exchanged", "fabsf(vy) ? vx > 0", "fabsf(vy) ? vx < 0", 0, 0},
};
enum { MUTANT_COUNT = sizeof(MUTANTS) / sizeof(MUTANTS[0]) };

static char *read_text(const char *path) {
    FILE *f = fopen(path, "rb");
    size_t size = 0, got;
    char *text = (char *)xalloc(1 << 24, 1);
    if (!f) die("%s: %s; run in the folder of osp.c and test_osp.c", path, strerror(errno));
    while ((got = fread(text + size, 1, (1 << 24) - 1 - size, f)) > 0) size += got;
    fclose(f);
    return text;
}

static bool mutate_text(char **text, const char *find, const char *replace) {    // where find stands exactly once
    char *at = find ? strstr(*text, find) : *text;
    if (!find) return true;
    if (!at || strstr(at + 1, find)) return false;
    char *out = (char *)xalloc(strlen(*text) + strlen(replace) + 1, 1);
    sprintf(out, "%.*s%s%s", (int)(at - *text), *text, replace, at + strlen(find));
    *text = out;
    return true;
}

static void write_file(const char *path, const void *data, size_t size) {
    Output o;
    output_open(&o, path);
    output_bytes(&o, data, size);
    output_close(&o);
}

// Writes, compiles and tests one copy (m NULL: unchanged) in its folder; the exit status says what became of it.
enum { CAUGHT, MISSED, NOT_FOUND, NOT_COMPILED };
static int run_mutant(const Mutant *m, const char *source, const char *test, const char *folder,
                      const char *golden_folder) {
    const char *cc = getenv("CC"), *flags = getenv("MUTATE_FLAGS");
    char path[PATH_MAX], command[3 * PATH_MAX], *text = strdup(source);
    if (m && !(mutate_text(&text, m->find, m->replace) && mutate_text(&text, m->find2, m->replace2))) return NOT_FOUND;
    mkdir(folder, 0777);
    snprintf(path, sizeof path, "%s/osp.c", folder), write_file(path, text, strlen(text));
    snprintf(path, sizeof path, "%s/test_osp.c", folder), write_file(path, test, strlen(test));
    snprintf(command, sizeof command,
             "cd %s && %s -std=gnu11 -O1 -w %s -DSTOP_AT_FIRST -o t test_osp.c -lm -ldl > log 2>&1", folder,
             cc ? cc : "cc", flags ? flags : "");
    if (system(command)) return NOT_COMPILED;
    snprintf(command, sizeof command, "cd %s && ulimit -t 300 && OMP_NUM_THREADS=1 ./t --golden '%s' > log 2>&1",
             folder, golden_folder);
    int status = system(command) ? CAUGHT : MISSED;
    snprintf(path, sizeof path, "%s/t", folder), unlink(path);
    return status;
}

// The row that failed, or what the program said before it stopped.
static void last_line(char line[256], const char *folder) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/log", folder);
    FILE *f = fopen(path, "r");
    line[0] = 0;
    if (!f) return;
    for (char next[256]; fgets(next, sizeof next, f); ) if (*next != '\n') strcpy(line, next);
    fclose(f);
    line[strcspn(line, "\n")] = 0;
    char *end = strstr(line, "   ");
    if (end) *end = 0;
}

// test_osp mutate [--golden DIR] [--only WORD]: all of the table (or the names with WORD), two at a time.
static int mutate(int argc, char **argv) {
    static const char *const WHAT[] = {"caught", "MISSED", "ERROR: its place is not there exactly once",
                                       "ERROR: does not compile"};
    const char *folder_given = "golden", *only = NULL;
    for (int i = 0; i + 1 < argc; i++) {
        if (!strcmp(argv[i], "--golden")) folder_given = argv[i + 1];
        if (!strcmp(argv[i], "--only")) only = argv[i + 1];
    }
    char scratch_folder[] = "/tmp/osp_mutate_XXXXXX", *golden_folder = realpath(folder_given, NULL);
    char *source = read_text("osp.c"), *test = read_text("test_osp.c");
    int next = -1, running = 0, bad = 0, caught = 0, ran = 0;
    pid_t process[2] = {0, 0};
    int which[2] = {0, 0};
    if (!golden_folder) die("--golden %s: %s; give the folder of reference numbers", folder_given, strerror(errno));
    if (!mkdtemp(scratch_folder)) die("%s: %s; make room there", scratch_folder, strerror(errno));
    while (next < MUTANT_COUNT || running) {
        char folder[64], line[256];
        while (next >= 0 && next < MUTANT_COUNT && only && !strstr(MUTANTS[next].name, only)) next++;
        if (next < MUTANT_COUNT && running < (next < 0 ? 1 : 2)) {
            int slot = process[0] ? 1 : 0;
            fflush(stdout);
            snprintf(folder, sizeof folder, "%s/%d", scratch_folder, next + 1);
            process[slot] = fork(), which[slot] = next;
            if (process[slot] < 0) die("fork: %s; close other programs", strerror(errno));
            if (process[slot] == 0)
                _exit(run_mutant(next < 0 ? NULL : &MUTANTS[next], source, test, folder, golden_folder));
            running++, next++;
            if (next > 0) continue;                                     // the unchanged copy goes first and alone
        }
        int status, slot;
        pid_t done = wait(&status);
        for (slot = 0; slot < 2 && process[slot] != done; ) slot++;
        if (slot == 2) continue;
        int code = WIFEXITED(status) ? WEXITSTATUS(status) : NOT_COMPILED, i = which[slot];
        process[slot] = 0, running--;
        snprintf(folder, sizeof folder, "%s/%d", scratch_folder, i + 1);
        last_line(line, folder);
        if (i < 0 && code != MISSED)
            die("the tests must pass before they can be tried: %s%s (%s/log)", line,
                code == CAUGHT ? "" : ", cc failed", folder);
        if (i < 0) { printf("unchanged: all tests pass\n"); continue; }
        ran++, caught += code == CAUGHT, bad += code != CAUGHT;
        printf("%-56s %s%s%.80s\n", MUTANTS[i].name, WHAT[code], code == CAUGHT ? ": " : "",
               code == CAUGHT ? line : "");
    }
    char command[128];
    snprintf(command, sizeof command, "rm -r %s", scratch_folder);
    if (system(command)) fprintf(stderr, "%s is left\n", scratch_folder);
    printf("%d of %d mutants caught\n", caught, ran);
    return bad;
}
// ============================================================================================================
// Bad input: each case must end in one line and exit code 2, in time, and touch nothing
// ============================================================================================================
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { PATIENCE_MS = 5000 };
#else
enum { PATIENCE_MS = 1000 };
#endif

// A file of raw bytes, from some number of pieces.
static void put_file(const char *name, const void *data, size_t size) {
    FILE *f = fopen(name, "wb");
    if (!f || fwrite(data, 1, size, f) != size || fclose(f))
        die("%s: %s; the tests need a folder to write to", name, strerror(errno));
}

static void put_header(const char *name, const char *json,
                       size_t data) { // a safetensors file of zeros under this header
    uint64_t n = strlen(json);
    char *all = (char *)xalloc(8 + n + data, 1);
    memcpy(all, &n, 8), memcpy(all + 8, json, n);
    put_file(name, all, 8 + n + data);
    free(all);
}

typedef struct { uint8_t *data; size_t size; } Raw;
static Raw get_file(const char *name) {
    Raw r = {NULL, 0};
    struct stat s;
    FILE *f = fopen(name, "rb");
    if (!f || fstat(fileno(f), &s)) die("%s: %s; the tests could not make it", name, strerror(errno));
    r.size = (size_t)s.st_size, r.data = (uint8_t *)xalloc(r.size, 1);
    if (fread(r.data, 1, r.size, f) != r.size) die("%s: cannot be read", name);
    fclose(f);
    return r;
}

// A copy of a checkpoint in whose header the first `from` became `to`.
static void put_edited(const char *name, Raw base, const char *from, const char *to) {
    uint64_t n;
    memcpy(&n, base.data, 8);
    char *header = (char *)xalloc(n + 1, 1), *all = (char *)xalloc(base.size + strlen(to) + 1, 1);
    memcpy(header, base.data + 8, n);
    char *hit = strstr(header, from);
    if (!hit) die("%s: the test's checkpoint has no %s", name, from);
    size_t before = (size_t)(hit - header), m = n - strlen(from) + strlen(to);
    memcpy(all, &m, 8), memcpy(all + 8, header, before);
    memcpy(all + 8 + before, to, strlen(to));
    memcpy(all + 8 + before + strlen(to), hit + strlen(from), n - before - strlen(from));
    memcpy(all + 8 + m, base.data + 8 + n, base.size - 8 - n);
    put_file(name, all, base.size - n + m);
    free(header), free(all);
}

// A copy whose tensor holds other bytes at its beginning.
static void put_patched(const char *name, const char *from, const char *tensor, const void *bytes, size_t size) {
    Raw raw = get_file(from);
    File f;
    file_open(&f, from);
    const FileTensor *t = file_find(&f, tensor);
    if (!t || t->bytes < size) die("%s: the test's checkpoint has no %s", from, tensor);
    memcpy(raw.data + (t->data - f.map), bytes, size);
    put_file(name, raw.data, raw.size);
    file_close(&f);
    free(raw.data);
}

static void put_state(const char *name, const char *run, const char *step, size_t n) {
    static const char *const NAMES[] = {"train.w", "train.m", "train.v", "train.ema"};
    Writer w;
    float *zeros = (float *)device_alloc(n * sizeof(float));
    writer_open(&w, name);
    writer_meta(&w, "run", "%s", run), writer_meta(&w, "step", "%s", step);
    for (int i = 0; i < 4; i++) writer_add(&w, NAMES[i], "F32", 1, &n, zeros);
    writer_close(&w);
    device_free(zeros);
}

// All the hostile files, in the present folder.
static void make_hostile_files(Ranks *one) {
    static const char *const EDITS[][3] = {
        // name, what stands in a good header, what replaces it
        {"dim0", "\"dim\":\"64\"", "\"dim\":\"0\""},
        {"dimneg", "\"dim\":\"64\"", "\"dim\":\"-64\""},
        {"dimbig", "\"dim\":\"64\"", "\"dim\":\"99999999999\""},
        {"dimtext", "\"dim\":\"64\"", "\"dim\":\"wide\""},
        {"dim32", "\"dim\":\"64\"", "\"dim\":\"32\""},
        {"nodim", "\"dim\":\"64\"", "\"mid\":\"64\""},
        {"heads3", "\"num_heads\":\"4\"", "\"num_heads\":\"3\""},
        {"layers9", "\"num_layers\":\"8\"", "\"num_layers\":\"9\""},
        {"layers1000", "\"num_layers\":\"8\"", "\"num_layers\":\"1000\""},
        {"full6", "\"num_full_blocks\":\"4\"", "\"num_full_blocks\":\"6\""},
        {"ratio0", "\"sparse_ratio\":\"2\"", "\"sparse_ratio\":\"0\""},
        {"odd", "\"H_l\":\"16\"", "\"H_l\":\"15\""},
        {"tall", "\"H_l\":\"16\"", "\"H_l\":\"16386\""},
        {"epsnan", "\"eps\":\"1e-06\"", "\"eps\":\"nan\""},
        {"f64", "\"dtype\":\"F32\"", "\"dtype\":\"F64\""},
        {"i32", "\"dtype\":\"F32\"", "\"dtype\":\"I32\""},
        {"q9", "\"dtype\":\"F32\"", "\"dtype\":\"Q9\""},
        {"renamed", "patch_embedding.weight", "patch_embedding.height"},
        {"twice", "patch_embedding.bias", "patch_embedding.weight"},
        {"shape", "\"shape\":[64,3,1,2,2]", "\"shape\":[3,64,1,2,2]"},
        {"rank9", "\"shape\":[64,3,1,2,2]", "\"shape\":[1,1,1,1,1,64,3,2,2]"},
        {"overflow", "\"shape\":[64,3,1,2,2]", "\"shape\":[4294967296,4294967296,3]"},
        {"minus", "\"shape\":[64,3,1,2,2]", "\"shape\":[-64,3,1,2,2]"},
        {"hole", "\"data_offsets\":[0,3072]", "\"data_offsets\":[256,3328]"},
        {"overlap", "\"data_offsets\":[3072,3328]", "\"data_offsets\":[2816,3072]"},
        {"outside", "\"data_offsets\":[0,3072]", "\"data_offsets\":[99999999999,100000002671]"},
        {"backwards", "\"data_offsets\":[0,3072]", "\"data_offsets\":[3072,0]"},
        {"wrap", "\"data_offsets\":[0,3072]", "\"data_offsets\":[18446744073709551615,3071]"},
        {"vocab", "\"vocab\":\"", "\"vocab\":\"9"},
    };
    Config c = PRESETS[0].c;
    Model *m = model_layout(&c);
    float nan = NAN, inf = INFINITY, none = 0, minus = -1;
    uint8_t code = 0x80, top = 0x6F;
    uint64_t noise[64], long_header = 1ull << 62;
    model_allocate(m, true), model_random(m, 1), (void)one;
    model_save("base.st", m, m->w, "f32"), model_save("hif8.st", m, m->w, "hif8");
    lora_new(m, 8, 16, 1), lora_save("lora.st", m->lora, m->lora->w);
    Raw base = get_file("base.st"), hif8 = get_file("hif8.st"), lora = get_file("lora.st");
    for (size_t i = 0; i < sizeof(EDITS) / sizeof(EDITS[0]); i++)
        put_edited(EDITS[i][0], base, EDITS[i][1], EDITS[i][2]);
    for (size_t i = 0; i < 64; i++) noise[i] = rng_bits(9, 9, i);
    put_file("empty", "", 0), put_file("bytes7", "1234567", 7),
        put_file("text", "This is no checkpoint, only text.\n", 34);
    put_file("noise", noise, sizeof noise), put_file("header62", &long_header, 8);
    put_file("cut8", base.data, 8), put_file("cut1000", base.data, 1000), put_file("cut1", base.data, base.size - 1);
    uint8_t *longer = (uint8_t *)xalloc(base.size + 1, 1);
    memcpy(longer, base.data, base.size), put_file("longer", longer, base.size + 1), free(longer);
    put_header("json0", "", 0), put_header("json1", "{", 0), put_header("json2", "{\"a\":[[[[[[[[", 0),
        put_header("nothing", "{}", 0);
    put_header("alien", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8);
    put_patched("nan", "base.st", "blocks.3.ffn.0.weight", &nan, 4),
        put_patched("inf", "base.st", "head.head.bias", &inf, 4);
    put_patched("k0", "hif8.st", "blocks.0.self_attn.q.weight.scale", &none, 4),
        put_patched("kneg", "hif8.st", "blocks.0.self_attn.q.weight.scale", &minus, 4);
    put_patched("knan", "hif8.st", "blocks.0.self_attn.q.weight.scale", &nan, 4),
        put_patched("kinf", "hif8.st", "blocks.0.self_attn.q.weight.scale", &inf, 4);
    put_patched("codenan", "hif8.st", "blocks.1.ffn.2.weight", &code, 1),
        put_patched("codeinf", "hif8.st", "blocks.1.ffn.2.weight", &top, 1);
    put_edited("noscale", hif8, "self_attn.q.weight.scale", "self_attn.q.weight.stale");
    put_edited("lorarank", lora, "\"lora_rank\":\"8\"", "\"lora_rank\":\"99\""),
        put_edited("loraalpha", lora, "\"lora_alpha\":\"16\"", "\"lora_alpha\":\"x\"");
    put_edited("loraname", lora, "lora_A", "lora_C");
    put_patched("loranan", "lora.st", "blocks.0.self_attn.q.lora_B.weight", &nan, 4);
    put_state("other.st.resume", "preset tiny of another kind", "3", 16),
        put_state("grpo.st.resume", "grpo of another kind", "3", 16);
    put_file("torn.st.resume", noise, sizeof noise), put_file("old.st.resume", base.data, base.size);
    put_file("keep.png", "kept", 4), put_file("keep.st", "kept", 4);
    if (mkdir("folder", 0777) || mkdir("folder.png", 0777) || symlink("/dev/full", "full.png") || mkfifo("pipe", 0666))
        die("cannot make test files");
}

// A line per case: its name, special circumstances, arguments separated by '|'. S: stands for "sample -w", BASE for a caption
// and the shortest sampling; limits: f a file may not grow over 1,000 bytes, o stdout is /dev/full.
#define RED "|-p|a small red circle standing still on a black background"
#define SHORT RED "|-n|1|-g|1|-o|keep.png"
typedef struct { const char *name, *limits, *arguments; } BadCase;
#define FILE_CASE(name) {"weights " name, "", "sample|-w|" name SHORT}
static const BadCase BAD_CASES[] = {
    FILE_CASE("missing"),
    FILE_CASE("empty"),
    FILE_CASE("bytes7"),
    FILE_CASE("text"),
    FILE_CASE("noise"),
    FILE_CASE("header62"),
    FILE_CASE("cut8"),
    FILE_CASE("cut1000"),
    FILE_CASE("cut1"),
    FILE_CASE("longer"),
    FILE_CASE("json0"),
    FILE_CASE("json1"),
    FILE_CASE("json2"),
    FILE_CASE("nothing"),
    FILE_CASE("alien"),
    FILE_CASE("folder"),
    FILE_CASE("pipe"),
    FILE_CASE("nan"),
    FILE_CASE("inf"),
    FILE_CASE("k0"),
    FILE_CASE("kneg"),
    FILE_CASE("knan"),
    FILE_CASE("kinf"),
    FILE_CASE("codenan"),
    FILE_CASE("codeinf"),
    FILE_CASE("noscale"),
    FILE_CASE("dim0"),
    FILE_CASE("dimneg"),
    FILE_CASE("dimbig"),
    FILE_CASE("dimtext"),
    FILE_CASE("dim32"),
    FILE_CASE("nodim"),
    FILE_CASE("heads3"),
    FILE_CASE("layers9"),
    FILE_CASE("layers1000"),
    FILE_CASE("full6"),
    FILE_CASE("ratio0"),
    FILE_CASE("odd"),
    FILE_CASE("tall"),
    FILE_CASE("epsnan"),
    FILE_CASE("f64"),
    FILE_CASE("i32"),
    FILE_CASE("q9"),
    FILE_CASE("renamed"),
    FILE_CASE("twice"),
    FILE_CASE("shape"),
    FILE_CASE("rank9"),
    FILE_CASE("overflow"),
    FILE_CASE("minus"),
    FILE_CASE("overlap"),
    FILE_CASE("hole"),
    FILE_CASE("outside"),
    FILE_CASE("backwards"),
    FILE_CASE("wrap"),
    FILE_CASE("vocab"),
    FILE_CASE("lora.st"),
    FILE_CASE("other.st.resume"),
    {"info of nothing", "", "info"},
    {"info of text", "", "info|text"},
    {"info of a missing file", "", "info|missing"},
    {"info of two files", "", "info|base.st|hif8.st"},
    {"no such command", "", "paint"},
    {"empty command", "", ""},
    {"option of no command", "", "--seed|1"},
    {"unknown option", "", "sample|--colour|red"},
    {"option without its value", "", "sample|-w"},
    {"no weights", "", "sample" SHORT},
    {"no caption", "", "sample|-w|base.st|-o|keep.png"},
    {"empty caption", "", "sample|-w|base.st|-p||-o|keep.png"},
    {"unknown word", "", "sample|-w|base.st|-p|a purple circle|-o|keep.png"},
    {"too long a caption", "",
     "sample|-w|base.st|-p|a a a a a a a a a a a a a a a a a a a a a a a a a a a|-o|keep.png"},
    {"17 captions", "",
     "sample|-w|base.st|-p|a|-p|a|-p|a|-p|a|-p|a|-p|a|-p|a|-p|a|-p|a|-p|a|-p|a|-p|a|-p|a|-p|a|-p|a|-p|a|-p|a|-o|keep."
     "png"},
    {"-n 0", "", "sample|-w|base.st" RED "|-n|0"},
    {"-n -3", "", "sample|-w|base.st" RED "|-n|-3"},
    {"-n 1e30", "", "sample|-w|base.st" RED "|-n|1e30"},
    {"-n 2.5", "", "sample|-w|base.st" RED "|-n|2.5"},
    {"-n 5x", "", "sample|-w|base.st" RED "|-n|5x"},
    {"-n (empty)", "", "sample|-w|base.st" RED "|-n|"},
    {"-g nan", "", "sample|-w|base.st" RED "|-g|nan"},
    {"-g inf", "", "sample|-w|base.st" RED "|-g|inf"},
    {"--shift 0", "", "sample|-w|base.st" RED "|--shift|0"},
    {"--seed -1", "", "sample|-w|base.st" RED "|--seed|-1"},
    {"--seed 2^64", "", "sample|-w|base.st" RED "|--seed|18446744073709551616"},
    {"--height 15", "", "sample|-w|base.st" SHORT "|--height|15"},
    {"--frames 0", "", "sample|-w|base.st" SHORT "|--frames|0"},
    {"a clip of 68 G tokens", "", "sample|-w|base.st" SHORT "|--frames|4096|--height|16384|--width|16384"},
    {"--sp magic", "", "sample|-w|base.st" SHORT "|--sp|magic"},
    {"--noise of another size", "", "sample|-w|base.st" SHORT "|--noise|alien"},
    {"output in no folder", "", "sample|-w|base.st" RED "|-o|nowhere/out.png"},
    {"output is a folder", "", "sample|-w|base.st" RED "|-o|folder.png"},
    {"output unwritable", "", "sample|-w|base.st" RED "|-o|/proc/out.png"},
    {"output of no kind", "", "sample|-w|base.st" RED "|-o|out.gif"},
    {"output without a name", "", "sample|-w|base.st" RED "|-o|"},
    {"output's name of 300 letters", "n", "sample|-w|base.st" RED "|-o|"},
    {"disk full: a device", "", "sample|-w|base.st" RED "|-n|1|-o|full.png"},
    {"disk full: stdout", "o", "sample|-w|base.st" RED "|-n|1|-o|-"},
    {"disk full: picture", "f", "sample|-w|base.st" SHORT},
    {"disk full: checkpoint", "f", "train|--steps|0|-o|keep.st"},
    {"disk full: latent", "f", "sample|-w|base.st" RED "|-n|1|-o|new.safetensors"},
    {"LoRA missing", "", "sample|-w|base.st" SHORT "|--lora|missing"},
    {"LoRA of no kind", "", "sample|-w|base.st" SHORT "|--lora|base.st"},
    {"LoRA rank 99", "", "sample|-w|base.st" SHORT "|--lora|lorarank"},
    {"LoRA alpha x", "", "sample|-w|base.st" SHORT "|--lora|loraalpha"},
    {"LoRA of other names", "", "sample|-w|base.st" SHORT "|--lora|loraname"},
    {"LoRA with NaN", "", "sample|-w|base.st" SHORT "|--lora|loranan"},
    {"train without output", "", "train|--preset|tiny"},
    {"train --preset big", "", "train|--preset|big|-o|new.st"},
    {"train --steps -1", "", "train|-o|new.st|--steps|-1"},
    {"train --batch 0", "", "train|-o|new.st|--batch|0"},
    {"train --lr nan", "", "train|-o|new.st|--lr|nan"},
    {"train --dtype fp4", "", "train|-o|new.st|--dtype|fp4"},
    {"train --size 9", "", "train|-o|new.st|--size|9"},
    {"train into a folder", "", "train|-o|folder|--steps|0"},
    {"train into /dev/full", "", "train|-o|/dev/full|--steps|0"},
    {"train --init text", "", "train|-o|new.st|--init|text"},
    {"train --init with NaN", "", "train|-o|new.st|--init|nan"},
    {"train --batch 65536 --size 512", "", "train|-o|new.st|--batch|65536|--size|512"},
    {"resume another run", "", "train|-o|other.st|--steps|5"},
    {"resume noise", "", "train|-o|torn.st|--steps|5"},
    {"resume a checkpoint", "", "train|-o|old.st|--steps|5"},
    {"eval without weights", "", "eval"},
    {"eval -n 0", "", "eval|-w|base.st|-n|0"},
    {"eval of text", "", "eval|-w|text"},
    {"eval --batch -2", "", "eval|-w|base.st|--batch|-2"},
    {"grpo without --init", "", "grpo|-o|new.st"},
    {"grpo without output", "", "grpo|--init|base.st"},
    {"grpo --init missing", "", "grpo|-o|new.st|--init|missing"},
    {"grpo --group 1", "", "grpo|-o|new.st|--init|base.st|--group|1"},
    {"grpo --window as long as -n", "", "grpo|-o|new.st|--init|base.st|-n|5|--window|5"},
    {"grpo --rank 64 of dim 64", "", "grpo|-o|new.st|--init|base.st|--rank|64"},
    {"grpo --rank 0", "", "grpo|-o|new.st|--init|base.st|--rank|0"},
    {"grpo --clip 0", "", "grpo|-o|new.st|--init|base.st|--clip|0"},
    {"grpo --w-red -1", "", "grpo|-o|new.st|--init|base.st|--w-red|-1"},
    {"grpo without any weight", "",
     "grpo|-o|new.st|--init|base.st|--w-color|0|--w-shape|0|--w-size|0|--w-motion|0|--w-background|0|--w-consistency|0|"
     "--w-smoothness|0"},
    {"grpo --dtype fp4", "", "grpo|-o|new.st|--init|base.st|--dtype|fp4"},
    {"grpo resumes another run", "", "grpo|-o|grpo.st|--init|base.st|--group|2|--prompts|1"},
};

// A fingerprint of the folder: names, sizes, times and numbers of all its files.
static uint64_t folder_state(int *count) {
    uint64_t sum = 0;
    DIR *d = opendir(".");
    *count = 0;
    for (struct dirent *e; d && (e = readdir(d)); ++*count) {
        struct stat s;
        if (lstat(e->d_name, &s) || !strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
        uint64_t part[5] = {hash_bytes(e->d_name, strlen(e->d_name)), (uint64_t)s.st_size, (uint64_t)s.st_ino,
                            S_ISDIR(s.st_mode) ? 0 : (uint64_t)s.st_mtim.tv_sec,
                            S_ISDIR(s.st_mode) ? 0 : (uint64_t)s.st_mtim.tv_nsec};
        sum += hash_bytes(part, sizeof part);
    }
    if (d) closedir(d);
    return sum;
}

// Runs one case; its standard error into said, its milliseconds into *took. The exit code, or −signal.
static int run_case(const char *osp, const BadCase *c, char *said, size_t room, double *took) {
    char arguments[2048], *argv[64] = {(char *)(uintptr_t)osp};
    int argc = 1, ends[2], status = 0;
    snprintf(arguments, sizeof arguments, "%s", c->arguments);
    if (strchr(c->limits, 'n')) {
        size_t n = strlen(arguments);
        memset(arguments + n, 'x', 300), strcpy(arguments + n + 300, ".png");
    }
    for (char *at = arguments; at && argc < 63; ) {
        argv[argc++] = at;
        if ((at = strchr(at, '|'))) *at++ = 0;
    }
    if (pipe(ends)) die("no pipe: %s", strerror(errno));
    double began = seconds();
    pid_t child = fork();
    if (child == 0) {
        struct rlimit limit = {1000, 1000};
        int out = open(strchr(c->limits, 'o') ? "/dev/full" : "/dev/null", O_WRONLY), in = open("/dev/null", O_RDONLY);
        dup2(in, 0), dup2(out, 1), dup2(ends[1], 2), close(ends[0]), close(ends[1]);
        if (strchr(c->limits, 'f')) setrlimit(RLIMIT_FSIZE, &limit);
        execv(osp, argv);
        _exit(127);
    }
    close(ends[1]);
    fcntl(ends[0], F_SETFL, O_NONBLOCK);
    size_t used = 0;
    for (bool over = false; ; usleep(500)) {
        ssize_t n = read(ends[0], said + used, room - 1 - used);
        used += n > 0 ? (size_t)n : 0;
        if (n > 0) continue;
        if (over) break;
        over = waitpid(child, &status, WNOHANG) == child;
        if (!over && seconds() - began > PATIENCE_MS / 1e3)
            kill(child, SIGKILL), waitpid(child, &status, 0), over = true;
    }
    said[used] = 0, *took = 1e3 * (seconds() - began);
    close(ends[0]);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

// One line "osp: ..", the last; before it only what says how much memory a run will take.
static bool one_line(const char *said) {
    const char *line = said;
    while (!strncmp(line, "memory: ", 8) && strchr(line, '\n')) line = strchr(line, '\n') + 1;
    const char *end = strchr(line, '\n');
    return !strncmp(line, "osp: ", 5) && end && !end[1] && end - line > 12;
}

// The number of cases that fail.
static int bad_input(const char *osp) {
    char folder[] = "/tmp/osp_bad_XXXXXX", said[8192], *binary = realpath(osp, NULL), back[PATH_MAX];
    int failed = 0, cases = (int)(sizeof(BAD_CASES) / sizeof(BAD_CASES[0])), files, after;
    Ranks one = one_rank();
    double slowest = 0;
    if (!binary || !getcwd(back, sizeof back)) die("%s: %s; build it first", osp, strerror(errno));
    if (!mkdtemp(folder) || chdir(folder)) die("%s: %s", folder, strerror(errno));
    make_hostile_files(&one);
    setenv("ASAN_OPTIONS", "detect_leaks=0", 0); // a program that stops with an error frees nothing
    for (int i = 0; i < cases; i++) {
        const BadCase *c = &BAD_CASES[i];
        double took;
        uint64_t before = folder_state(&files);
        int code = run_case(binary, c, said, sizeof said, &took);
        if (code == -SIGKILL)
            code = run_case(binary, c, said, sizeof said, &took); // once more: the machine may be busy
        bool same = folder_state(&after) == before, ok = code == 2 && one_line(said) && same;
        slowest = fmax(slowest, took);
        failed += !ok;
        const char *line = ok ? strstr(said, "osp: ") : said;
        if (ok) said[strlen(said) - 1] = 0;
        printf("%-32s %4.0f ms exit %3d%s %s%s%.*s%s\n", c->name, took, code, same ? "" : ", FILES CHANGED",
               ok ? "ok" : "FAILED", ok ? "  " : "\n", ok ? 100 : 2000, line, ok && strlen(line) > 100 ? ".." : "");
        fflush(stdout);
    }
    DIR *d = opendir(".");
    for (struct dirent *e; d && (e = readdir(d)); ) if (remove(e->d_name)) continue;
    if (d) closedir(d);
    if (chdir(back) || rmdir(folder)) printf("%s could not be removed\n", folder);
    printf("bad input: %d cases, %d failed; slowest %.0f ms\n", cases, failed, slowest);
    free(binary);
    return failed;
}
// ============================================================================================================
// Ranks: R processes against one, in the same run (mpirun -np R ./test_osp_mpi)
// ============================================================================================================
// Every rank computes the one-rank answer by itself as well, and compares. The golden files' models have 2 heads; these
// have 4, for up to 4 ranks, on grids that P² and R divide and on grids that they do not.
typedef struct { float *out, *dw, *dlatent; double loss; } Answer;

static Answer ask(Model *m, Ranks *k, int T, int H, int W, const float *latent, const float *target,
                  const float *text) {
    Run *r = run_new(m, k, 2, T, H, W, true, NULL);
    size_t count = 2 * (size_t)m->c.in_dim * r->N * 4;
    float *dlatent = spoiled(count), *dout = spoiled(count);
    double t[2] = {913, 250};
    Text rows = {NULL, text};
    Answer a;
    zero(m->dw, m->count * sizeof(float));
    weights_prepare(m);
    text_set(r, rows);
    forward(r, up(latent, count), t);
    a.loss = mse(dout, r->out, up(target, count), count);
    backward(r, dlatent, dout);
    sum_over_ranks(k, m->dw, m->count, false);
    a.out = down(r->out, count), a.dw = down(m->dw, m->count), a.dlatent = down(dlatent, count);
    return a;
}

static Ranks alone_rank(void) { Ranks k; memset(&k, 0, sizeof k); k.size = k.halves = 1; return k; }

static void ranks_against_one(Ranks *k, int T, int H, int W, int quant) {
    Config c = small_config(0, quant);
    c.T = T, c.H_l = 2 * H, c.W_l = 2 * W, c.num_heads = 4;
    Ranks alone = alone_rank();
    Model *m = small_model(&c, 5);
    size_t count = 2 * (size_t)c.in_dim * (size_t)(T * H * W) * 4;
    const float *latent = noise(60, count, 1), *target = noise(61, count, 1);
    const float *text = noise(62, 2 * (size_t)c.text_len * (size_t)c.text_dim, 1);
    Answer want = ask(m, &alone, T, H, W, latent, target, text);
    const char *what = quant ? "HiF8" : "float32";
    double limit = quant ? 5e-2 : 1e-6;
    for (int ulysses = 0; ulysses < 2; ulysses++) {
        k->ulysses = ulysses;
        Answer got = ask(m, k, T, H, W, latent, target, text);
        Worst w = nothing_yet();
        for (int i = 0; i < m->params; i++) {
            const Param *p = &m->param[i];
            double e = relative(got.dw + p->offset, want.dw + p->offset, p->count);
            if (!quant) worse(&w, e, p->name);
        }
        row(relative(got.dw, want.dw, m->count), limit, "%d ranks, %dx%dx%d, %s, %s: gradients as one vector", k->size,
            T, H, W, ulysses ? "Ulysses" : "SSP", what);
        worse(&w, relative(got.dlatent, want.dlatent, count), "latent");
        const char *sp = ulysses ? "Ulysses" : "SSP";
        row(relative(got.out, want.out, count), limit, "%d ranks, %dx%dx%d, %s, %s: output", k->size, T, H, W, sp,
            what);
        row(fabs(got.loss - want.loss) / want.loss, limit, "%d ranks, %dx%dx%d, %s, %s: loss", k->size, T, H, W, sp,
            what);
        worst_row(&w, quant ? 3e-1 : 1e-5, "%d ranks, %dx%dx%d, %s, %s: each gradient", k->size, T, H, W, sp, what);
    }
    k->ulysses = false;
}

static void ranks_sample(Ranks *k, int T, int H, int W) {
    Config c = small_config(0, 0);
    c.T = T, c.H_l = 2 * H, c.W_l = 2 * W, c.num_heads = 4;
    Ranks alone = alone_rank();
    Model *m = small_model(&c, 6);
    float *x[2];
    Text cond = {NULL, noise(63, (size_t)c.text_len * (size_t)c.text_dim, 1)};
    Text uncond = {NULL, noise(64, (size_t)c.text_len * (size_t)c.text_dim, 1)};
    size_t count = (size_t)c.in_dim * (size_t)(T * H * W) * 4;
    for (int i = 0; i < 2; i++) {
        Run *r = run_new(m, i ? k : &alone, 1, T, H, W, false, NULL);
        x[i] = up(noise(65, count, 1), count);
        sample(r, x[i], cond, uncond, 50, 7, 5);
    }
    row(relative(down(x[1], count), down(x[0], count), count), 1e-6,
        "%d x %d ranks, %dx%dx%d: 50 guided sampling steps", k->halves, k->size, T, H, W);
}

// What one exchange and one Ulysses block send, measured against spec §5; on balanced grids exactly 1 : 4.
static void ranks_volume(Ranks *k, int T, int H, int W) {
    Config c = small_config(0, 0);
    c.T = T, c.H_l = 2 * H, c.W_l = 2 * W, c.num_heads = 4;
    Model *m = small_model(&c, 7);
    Text text = {NULL, noise(66, (size_t)c.text_len * (size_t)c.text_dim, 1)};
    size_t count = (size_t)c.in_dim * (size_t)(T * H * W) * 4, bytes[2], calls[2];
    double t = 500;
    int sparse = c.num_layers - c.num_full_blocks;
    for (int ulysses = 0; ulysses < 2; ulysses++) {
        int purpose = ulysses ? ULYSSES_SPARSE : EXCHANGE;
        k->ulysses = ulysses;
        Run *r = run_new(m, k, 1, T, H, W, false, NULL);
        text_set(r, text);
        memset(k->calls, 0, sizeof k->calls), memset(k->bytes, 0, sizeof k->bytes);
        forward(r, up(noise(67, count, 1), count), &t);
        bytes[ulysses] = k->bytes[purpose], calls[ulysses] = k->calls[purpose];
    }
    k->ulysses = false;
    size_t each = (size_t)(T * H * W / k->size) * (size_t)c.dim * 4 * (size_t)(k->size - 1) / (size_t)k->size;
    row(fabs((double)calls[0] - (sparse - 1)) + fabs((double)calls[1] - 4 * sparse), 0,
        "%d ranks: SSP 1 all_to_all a block, Ulysses 4", k->size);
    row(fabs((double)bytes[0] / (sparse - 1) - (double)each), 0,
        "%d ranks: SSP sends (R-1)/R N/R dim a block: %zu bytes", k->size, each);
    row(fabs((double)bytes[1] / sparse - 4 * (double)each), 0, "%d ranks: Ulysses sends four times that", k->size);
}

static int run_ranks(Ranks *world, bool small) {               // small: under the sanitizers
    int P2 = 4, halves = world->size > P2 ? 2 : 1;
    ranks_split(world, halves);
    bool speak = speaks(world);
    tally.silent = !speak;
    static const int grids[][3] = {{3, 6, 10}, {2, 7, 5}, {2, 8, 8}, {1, 45, 80}};
    for (int i = 0; i < (small ? 2 : 4); i++)
        for (int quant = 0; quant < (i < 3 ? 2 : 1); quant++)
            ranks_against_one(world, grids[i][0], grids[i][1], grids[i][2], quant);
    for (int i = 0; i < (small ? 1 : 3); i++) ranks_sample(world, grids[i][0], grids[i][1], grids[i][2]);
    if (world->size > 1) ranks_volume(world, 2, 8, 8);
    if (speak) printf("%d passed, %d failed, %d skipped\n", tally.passed, tally.failed, tally.skipped);
    return tally.failed;
}

// One rank dies in the middle: the others must not wait for it for ever.
static int lose_rank(Ranks *k) {
    ranks_split(k, 1);
    float *x = spoiled(64);
    for (int i = 0; i < 1000000; i++) {
        if (i == 10 && k->rank == k->size - 1) kill(getpid(), SIGKILL);
        sum_over_ranks(k, x, 64, false);
    }
    return 0;
}
// ---- fuzzing: parse_safetensors against mutated files --------------------------------------------------------
// A small valid file is mutated a few times, knowing its structure (numbers, names, brackets, the header's length), and
// parsed from a block of exactly its size, so that the sanitizers see every byte read outside. What is accepted must
// keep every promise of the reader; what is refused must say why. Same seed, same files.

typedef struct { char text[4096]; size_t length; uint8_t data[512]; size_t bytes; uint64_t header; bool lie; } FuzzCase;

typedef struct { uint64_t seed, stream, index; } FuzzRandom;

static size_t fuzz_below(FuzzRandom *r, size_t n) {
    return n ? (size_t)(rng_bits(r->seed, r->stream, r->index++) % n) : 0;
}

static void fuzz_base(FuzzCase *c) {
    static const char *text = "{\"__metadata__\":{\"dim\":\"64\",\"note\":\"a\\n\\u00e9\\ud83d\\ude00\"},"
        "\"w\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},"
        "\"b\":{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[24,32]},"
        "\"h\":{\"dtype\":\"F16\",\"shape\":[1,3],\"data_offsets\":[32,38]},"
        "\"e\":{\"dtype\":\"I32\",\"shape\":[0,9],\"data_offsets\":[38,38]},"
        "\"q\":{\"dtype\":\"U8\",\"shape\":[5],\"data_offsets\":[38,43]},"
        "\"q.scale\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[43,47]}} ";
    memset(c, 0, sizeof *c);
    c->length = strlen(text);
    memcpy(c->text, text, c->length);
    c->bytes = 47;
    for (size_t i = 0; i < 43; i++) c->data[i] = (uint8_t)(i * 5 % 64);
    c->data[46] = 0x3F;                                       // scale 0.5
}

// Replaces text[at, at + old) by `with`, where there is room.
static void fuzz_replace(FuzzCase *c, size_t at, size_t old, const char *with, size_t length) {
    if (at > c->length || old > c->length - at || c->length - old + length > sizeof c->text) return;
    memmove(c->text + at + length, c->text + at + old, c->length - at - old);
    memcpy(c->text + at, with, length);
    c->length += length - old;
}

// A run of characters between two places where `edge` changes: a number (digits) or a string with its quotes.
static bool fuzz_token(const FuzzCase *c, FuzzRandom *r, bool number, size_t *at, size_t *length) {
    size_t start = fuzz_below(r, c->length), end;
    if (number) {
        while (start < c->length && !isdigit((unsigned char)c->text[start])) start++;
        for (end = start; end < c->length && isdigit((unsigned char)c->text[end]); ) end++;
    } else {
        while (start < c->length && c->text[start] != '"') start++;
        for (end = start + 1; end < c->length && c->text[end] != '"'; ) end++;
        end = end < c->length ? end + 1 : start;
    }
    *at = start;
    *length = end > start ? end - start : 0;
    return *length > 0;
}

static void fuzz_mutate(FuzzCase *c, FuzzRandom *r) {
    static const char *numbers[] = {
        "0", "1", "2", "24", "38", "43", "47", "48", "-1", "1.5", "1e3", "007", "255", "65536", "2147483648",
        "4294967296", "4611686018427387904", "9223372036854775807", "9223372036854775808", "18446744073709551615",
        "18446744073709551616", "99999999999999999999999999", "", "null", "[1]", "3,", "1,1", "\"2\""};
    static const char *strings[] = {
        "\"F32\"", "\"BF16\"", "\"F16\"", "\"U8\"", "\"I32\"", "\"F8_E4M3\"", "\"F99\"", "\"\"", "\"w\"", "\"b\"",
        "\"q\"", "\"q.scale\"", "\"w.scale\"", "\"__metadata__\"", "\"dtype\"", "\"shape\"", "\"data_offsets\"",
        "\"\\u0000\"", "\"\\ud800\"", "\"\\ud800\\u0041\"", "\"\\udc00\"", "\"\\u12g4\"", "\"\\x\"", "\"\\",
        "\"a\\u0077\"", "\"\x01\"", "\"\xFF\xFE\"", "{}", "[]", "7"};
    static const char *pieces[] = {
        "[[[[[[[[[[[[[[[[", "{\"a\":{\"b\":{\"c\":", "]", "}", ",", ":", "\"", "\\", "{", "[", " ", "\t\n\r", "\0",
        "\"z\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]},",
        "\"z\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[47,48]},",
        "\"x\":{\"dtype\":\"F64\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,8]},", "\"k\":\"v\",",
        "\"dtype\":\"F32\","};
    size_t at = 0, length = 0, from = fuzz_below(r, c->length + 1), to = fuzz_below(r, c->length + 1), pick;
    char copy[64];
    switch (fuzz_below(r, 15)) {
    case 0: if (c->length) c->text[fuzz_below(r, c->length)] ^= (char)(1 << fuzz_below(r, 8)); break;
    case 1: if (c->length) c->text[fuzz_below(r, c->length)] = (char)fuzz_below(r, 256); break;
    case 2: case 3: case 4:                                   // another number
        pick = fuzz_below(r, sizeof numbers / sizeof *numbers);
        if (fuzz_token(c, r, true, &at, &length)) fuzz_replace(c, at, length, numbers[pick], strlen(numbers[pick]));
        break;
    case 5: case 6:                                           // another name, dtype or field
        pick = fuzz_below(r, sizeof strings / sizeof *strings);
        if (fuzz_token(c, r, false, &at, &length)) fuzz_replace(c, at, length, strings[pick], strlen(strings[pick]));
        break;
    case 7:                                                   // a piece more; 0 stands for a zero byte
        pick = fuzz_below(r, sizeof pieces / sizeof *pieces);
        fuzz_replace(c, from, 0, pieces[pick], *pieces[pick] ? strlen(pieces[pick]) : 1);
        break;
    case 8: fuzz_replace(c, from, fuzz_below(r, 20), "", 0); break;                          // a piece less
    case 9:                                                   // a splice: a stretch copied elsewhere
        length = fuzz_below(r, sizeof copy);
        if (from + length > c->length) break;
        memcpy(copy, c->text + from, length);
        fuzz_replace(c, to, fuzz_below(r, 2) * length, copy, length);
        break;
    case 10:                                                  // data cut or longer
        c->bytes = fuzz_below(r, 4) ? 40 + fuzz_below(r, 16) : fuzz_below(r, sizeof c->data);
        break;
    case 11: if (c->bytes) c->data[fuzz_below(r, c->bytes)] = (uint8_t)fuzz_below(r, 256); break;
    case 12: c->length = from; break;                         // header cut
    case 13: {                                                // a tensor moved: both offsets shifted
        const char *mark = "data_offsets\":[";
        unsigned long long begin, end;
        size_t m = strlen(mark);
        for (at = fuzz_below(r, c->length + 1); at + m + 40 < c->length; at++) {
            if (memcmp(c->text + at, mark, m)) continue;
            memcpy(copy, c->text + at + m, 40);
            copy[40] = 0;
            if (sscanf(copy, "%llu,%llu", &begin, &end) != 2) break;
            length = strcspn(copy, "]");
            unsigned long long by = fuzz_below(r, 9) - 4ull;
            snprintf(copy, sizeof copy, "%llu,%llu", begin + by, end + by);
            fuzz_replace(c, at + m, length, copy, strlen(copy));
            break;
        }
        break;
    }
    default:                                                  // a lie about the header's length, or noise
        c->lie = true;
        c->header = c->length + 8 - fuzz_below(r, 16);
        if (fuzz_below(r, 2)) c->header = (uint64_t)fuzz_below(r, SIZE_MAX) >> fuzz_below(r, 64);
        if (fuzz_below(r, 8) == 0) for (size_t i = 0; i < c->length; i++) c->text[i] = (char)fuzz_below(r, 256);
    }
}

// The reader's promises about a file it accepted; a name for the broken one, or NULL.
static const char *fuzz_check(const File *f, const uint8_t *data, size_t size, unsigned *touched) {
    const uint8_t *end = f->count ? f->tensors[0].data : data + size;
    if (f->count && (size_t)(end - data) < 10) return "data before the header's end";
    for (int i = 0; i < f->count; i++) {
        const FileTensor *t = &f->tensors[i];
        size_t count = 1;
        for (int d = 0; d < t->rank; d++) count *= t->shape[d];
        if (t->rank < 0 || t->rank > 8 || count != t->count || t->bytes > size || t->count > t->bytes) return "shape";
        if (t->data != end) return "tiling";
        if (file_find(f, t->name) != t) return "lookup";
        for (size_t b = 0; b < t->bytes; b++) *touched += t->data[b];
        float *out = (float *)xalloc(t->count, sizeof(float));
        char error[256] = "";
        bool ok = try_read(error, out, f, t, t->count), finite = true;
        for (size_t j = 0; ok && j < t->count; j++) finite = finite && isfinite(out[j]);
        free(out);
        if (!finite) return "NaN or Inf read";
        if (!ok && !error[0]) return "a refusal without a reason";
        end += t->bytes;
    }
    if (end != data + size) return "the file's end";
    for (int i = 0; i < f->pairs; i++)
        if (file_meta(f, f->by_key[i].key) != f->by_key[i].value) return "metadata lookup";
    return NULL;
}

// The case as a file of exactly `size` bytes in memory.
static uint8_t *fuzz_file(const FuzzCase *c, uint64_t n, size_t size) {
    uint8_t *whole = (uint8_t *)xalloc(8 + c->length + c->bytes, 1), *data = (uint8_t *)xalloc(size, 1);
    memcpy(whole, &n, 8);
    memcpy(whole + 8, c->text, c->length);
    memcpy(whole + 8 + c->length, c->data, c->bytes);
    memcpy(data, whole, size);
    free(whole);
    return data;
}

// One edit each of the valid file that must be refused; the number of those that are not.
static int fuzz_refusals(void) {
#define EMPTY12 "\"\":\"\",\"\":\"\",\"\":\"\",\"\":\"\",\"\":\"\",\"\":\"\"," \
                "\"\":\"\",\"\":\"\",\"\":\"\",\"\":\"\",\"\":\"\",\"\":\"\","
    static const char *edits[][2] = {
        {"[0,24]", "[0,23]"}, {"[0,24]", "[24,0]"}, {"[0,24]", "[0,24,24]"}, {"[0,24]", "[0]"},
        {"[0,24]", "[1,25]"}, {"[0,24]", "[0,24,]"}, {"[24,32]", "[23,31]"}, {"[24,32]", "[0,8]"},
        {"[43,47]", "[44,48]"}, {"[43,47]", "[43,18446744073709551663]"}, {"[24,32]", "[24,32.0]"},
        {"[2,3]", "[2,-3]"}, {"[2,3]", "[02,3]"}, {"[2,3]", "[4294967296,4294967296,6]"},
        {"[2,3]", "[1,1,1,1,1,1,1,2,3]"}, {"[2,3]", "[[2,3]]"}, {"[2,3]", "6"}, {"[2,3]", "null"},
        {"\"BF16\"", "\"BF17\""}, {"\"BF16\"", "\"U8\""}, {"\"BF16\"", "16"}, {"\"b\"", "\"w\""},
        {"\"b\"", "\"\\u0077\""}, {"\"b\"", "\"\\u0000\""}, {"\"b\"", "\"\n\""}, {"\"b\"", "\"\\n\""},
        {"\"b\"", "\"__metadata__\""}, {"\"dim\"", "\"note\""}, {"\"64\"", "64"}, {"\"64\"", "{}"},
        {"\"shape\"", "\"dtype\""}, {"\"shape\":[2,3],", ""}, {"\"w\":", "\"w\""},
        {"\"w\":", ",\"w\":"}, {"}} ", "}}x"}, {"}} ", "} "}, {"}} ", "}}} "},
        {"\"dim\"", EMPTY12 EMPTY12 EMPTY12 EMPTY12 EMPTY12 EMPTY12 EMPTY12 EMPTY12 "\"dim\""}};
#undef EMPTY12
    int wrong = 0;
    for (size_t i = 0; i < sizeof edits / sizeof *edits; i++) {
        FuzzCase c;
        File f;
        fuzz_base(&c);
        const char *at = strstr(c.text, edits[i][0]);
        if (!at) die("fuzz: %s does not stand in the valid file; correct the table", edits[i][0]);
        fuzz_replace(&c, (size_t)(at - c.text), strlen(edits[i][0]), edits[i][1], strlen(edits[i][1]));
        uint8_t *data = fuzz_file(&c, c.length, 8 + c.length + c.bytes);
        if (parse_safetensors(&f, data, 8 + c.length + c.bytes)) {
            printf("fuzz: accepted with %s in the place of %s\n", edits[i][1], edits[i][0]);
            file_close(&f);
            wrong++;
        }
        free(data);
    }
    return wrong;
}

// 0: every one of `executions` files was read or refused as promised.
static int fuzz_safetensors(long executions, uint64_t seed) {
    long accepted = 0;
    unsigned touched = 0;
    double start = seconds();
    if (fuzz_refusals()) return 1;
    FuzzCase base, *c = (FuzzCase *)xalloc(1, sizeof *c);
    fuzz_base(&base);
    for (long run = 0; run < executions; run++) {
        FuzzRandom random = {seed, (uint64_t)run, 0};
        *c = base;
        size_t mutations = run == 0 ? 0 : 1 + fuzz_below(&random, 4);        // the first file is the valid one
        while (mutations--) fuzz_mutate(c, &random);
        uint64_t n = c->lie ? c->header : c->length;
        size_t size = 8 + c->length + c->bytes;
        if (run && fuzz_below(&random, 32) == 0) size = fuzz_below(&random, size);           // the file cut anywhere
        uint8_t *data = fuzz_file(c, n, size);
        File f;
        const char *broken = NULL;
        if (parse_safetensors(&f, data, size)) {
            accepted++;
            broken = fuzz_check(&f, data, size, &touched);
            file_close(&f);
        } else {
            if (!f.error[0] || f.header || f.tensors || f.by_name || f.by_key) broken = "refusal";
            for (const char *p = f.error; *p; p++) if ((unsigned char)*p < 0x20) broken = "a message on one line";
        }
        free(data);
        if (broken || (run == 0 && !accepted)) {
            printf("fuzz: seed %llu, run %ld: broken promise: %s\n", (unsigned long long)seed, run,
                   broken ? broken : "the valid file is read");
            free(c);
            return 1;
        }
    }
    free(c);
    printf("fuzz: %ld files, %ld accepted, %.1f s (sum %u)\n", executions, accepted, seconds() - start, touched);
    return 0;
}
// ============================================================================================================
// Commands
// ============================================================================================================
static const char *option(int argc, char **argv, const char *name, const char *standard) {
    for (int i = 1; i + 1 < argc; i++) if (!strcmp(argv[i], name)) return argv[i + 1];
    return standard;
}

int main(int argc, char **argv) {
    Ranks ranks;
    memset(&ranks, 0, sizeof ranks);
    ranks_start(&ranks, &argc, &argv);
    const char *command = argc > 1 && argv[1][0] != '-' ? argv[1] : "",
               *folder = option(argc, argv, "--golden", "golden");
    int failed = 0;
    if (argc > 1 && (!strcmp(argv[1], "-h") || !strcmp(argv[1], "--help"))) command = "help";
    bool device = !*command || !strcmp(command, "ops") || !strcmp(command, "verify") || !strcmp(command, "bench") ||
                  !strcmp(command, "ranks") ||
                  !strcmp(command, "lose");
    if (device)
        device_start(option(argc, argv, "--device-dtype", !strcmp(command, "bench") ? NULL : "f32"), ranks.rank);
    if (!*command || !strcmp(command, "ops")) failed = run_tests(folder, *command, &ranks);
    else if (!strcmp(command, "osp")) return osp_main(argc - 1, argv + 1);
    else if (!strcmp(command, "verify")) failed = verify(folder, option(argc, argv, "-w", NULL), &ranks);
    else if (!strcmp(command, "bench")) failed = bench(argc - 2, argv + 2, &ranks);
    else if (!strcmp(command, "show")) failed = show(argc - 2, argv + 2);
    else if (!strcmp(command, "ranks")) failed = run_ranks(&ranks, argc > 2 && !strcmp(argv[2], "small"));
    else if (!strcmp(command, "lose")) failed = lose_rank(&ranks);
    else if (!strcmp(command, "badinput") && argc > 2) failed = bad_input(argv[2]);
    else if (!strcmp(command, "fuzz") && argc > 2) failed = fuzz_safetensors(atol(argv[2]), 1);
    else if (!strcmp(command, "mutate")) failed = mutate(argc - 2, argv + 2);
    else {
        printf(
            "test_osp [--golden DIR]          every check; test_osp ops: of the operations only\ntest_osp verify [-w FILE]        the paper's claims\n"
            "test_osp bench [--shape toy|1.3b-480p|14b-720p|14b-768p] [--layers L] [--train]; bench linear|hif8|comm\n"
            "test_osp show skiparse|model|loss|reward|hif8|ranks ... -o FILE.png\n"
            "test_osp ranks (under mpirun)    R ranks against one\ntest_osp lose (under mpirun)     one rank dies\n"
            "test_osp badinput ./osp          hostile files and options\ntest_osp fuzz N                  the file "
            "reader\n"
            "test_osp mutate                  breaks single terms of osp.c and looks whether the checks notice\n");
        failed = strcmp(command, "help") != 0;
    }
    ranks_end();
    return failed > 0;
}
