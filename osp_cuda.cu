// osp_cuda.cu: the operations of osp.c (its section 4) on one NVIDIA GPU, compute capability 8.0 or newer.
//
// Nothing of the model is written twice: this file includes osp.c, which leaves out its CPU bodies, and brings its own.
// Every op puts its work on one stream and returns at once; only what gives a number to the host waits for it.
//
// What an op costs. A matrix product is cuBLASLt's business. Attention has its own section. All the rest does a few
// operations per number it reads, so its time is the bytes it moves over the card's 2 to 5 TB/s, and writing it well
// means four habits, which every kernel below follows:
//   - fuse, so that a row is read once, held in registers while it is needed, and written once (the comments count
//     the bytes per element: 4 for float, a for act, which is 2 or 4);
//   - let each thread move 4 or 8 neighbours at a time, neighbours in the warp side by side, all loads of a row first;
//   - give a row as many threads as keep it in registers: 16 for a row of 128 numbers, 256 for one of 5,120;
//   - sum in a fixed order: a block sums its own rows into a line of a table, a second kernel adds up the lines
//     (fold_kernel). No atomic float addition anywhere, so the same input gives the same bytes every time.
#define OSP_CUDA
#include "osp.c"
#include <cublasLt.h>
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#ifdef OSP_NCCL
#include <nccl.h>
#endif
typedef __nv_bfloat16 bf16;

// ============================================================================================================
// 1. The card
// ============================================================================================================
enum { STAGES = 4, STAGE_BYTES = 4 << 20, SUM_BLOCKS = 1024, PLANS = 256, WORKSPACE_BYTES = 64 << 20 };

// A matrix product that was asked for before: what identifies it, and what cuBLASLt made of it.
typedef struct {
    size_t m, n, k;
    int transpose_a, transpose_b, float_d, epilogue, align_a, align_b, align_d, align_aux;
} PlanKey;
typedef struct {
    PlanKey key;
    bool used, possible;
    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulAlgo_t algo;
} Plan;

static struct {
    bool half;                               // act is bfloat16; else float
    cudaDeviceProp card;
    cudaStream_t stream;
    cublasLtHandle_t blas;
    void *workspace;                         // cuBLASLt's
    Plan plan[PLANS];
    int plans;
    char *scratch;                           // partial sums, biases as act; grows, never shrinks
    size_t scratch_bytes;
    double *sums, *sums_host;                // [SUM_BLOCKS]
    struct { void *host; cudaEvent_t free; } stage[STAGES];    // pinned memory on the way to the card
    unsigned turn;
    char *room;                              // pinned memory for what ranks exchange; grows
    size_t room_bytes;
    bool shared;                             // several ranks use this card
} gpu;

#define cuda_check(call) cuda_report((call), #call, __LINE__)
static void cuda_report(cudaError_t e, const char *what, int line) {
    if (e != cudaSuccess)
        die("CUDA: %s in %.60s (osp_cuda.cu:%d); the run cannot go on", cudaGetErrorString(e), what, line);
}

#define blas_check(call) blas_report((call), #call, __LINE__)
static void blas_report(cublasStatus_t s, const char *what, int line) {
    if (s != CUBLAS_STATUS_SUCCESS)
        die("cuBLASLt: %s in %.60s (osp_cuda.cu:%d); the run cannot go on", cublasLtGetStatusString(s), what, line);
}

#define LAUNCH(kernel, grid, block, ...) \
    do { kernel<<<grid, block, 0, gpu.stream>>>(__VA_ARGS__); cuda_check(cudaGetLastError()); } while (0)

// The statement with A = the type of an act.
#define BY_TYPE(...) \
    do { if (gpu.half) { typedef bf16 A; __VA_ARGS__; } else { typedef float A; __VA_ARGS__; } } while (0)

// Takes card number `rank` (mod the number of cards), or says in one line why there is none. dtype: "f32" (parity with
// the CPU) or "bf16" (speed), which is what NULL means.
static void device_start(const char *dtype, int rank) {
    int cards = 0, driver = 0;
    if (!dtype) dtype = "bf16";
    cudaError_t e = cudaGetDeviceCount(&cards);
    cudaDriverGetVersion(&driver);
    if (strcmp(dtype, "f32") && strcmp(dtype, "bf16")) die("arithmetic on a GPU is f32 or bf16, not %s", dtype);
    if (driver == 0) die("no NVIDIA driver here: run the CPU program osp instead");
    if (e == cudaErrorInsufficientDriver)
        die("the NVIDIA driver is too old (for CUDA %d.%d; built with %d.%d): update it or rebuild with that CUDA",
            driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    if (e != cudaSuccess || cards < 1)
        die("no usable NVIDIA GPU here (%s): run the CPU program osp instead", cudaGetErrorString(e));
    cuda_check(cudaSetDevice(rank % cards));
    cuda_check(cudaGetDeviceProperties(&gpu.card, rank % cards));
    if (gpu.card.major < 8)
        die("%s has compute capability %d.%d: 8.0 or newer is needed", gpu.card.name, gpu.card.major, gpu.card.minor);
    gpu.shared = ranks_here() > cards;
    gpu.half = !strcmp(dtype, "bf16");
    cuda_check(cudaStreamCreateWithFlags(&gpu.stream, cudaStreamNonBlocking));
    blas_check(cublasLtCreate(&gpu.blas));
    cuda_check(cudaMalloc(&gpu.workspace, WORKSPACE_BYTES));
    cuda_check(cudaMalloc((void **)&gpu.sums, SUM_BLOCKS * sizeof(double)));
    cuda_check(cudaMallocHost((void **)&gpu.sums_host, SUM_BLOCKS * sizeof(double)));
    for (int i = 0; i < STAGES; i++) {
        cuda_check(cudaMallocHost(&gpu.stage[i].host, STAGE_BYTES));
        cuda_check(cudaEventCreateWithFlags(&gpu.stage[i].free, cudaEventDisableTiming));
    }
}

static void wait_device(void) { cuda_check(cudaStreamSynchronize(gpu.stream)); }

// Memory for the length of one op. The next op may take the same bytes: they follow each other on one stream.
static void *scratch(size_t bytes) {
    if (bytes > gpu.scratch_bytes) {
        cuda_check(cudaFree(gpu.scratch));   // waits for whoever still reads it
        gpu.scratch_bytes = bytes + bytes / 4 + (1 << 20);
        cuda_check(cudaMalloc((void **)&gpu.scratch, gpu.scratch_bytes));
    }
    return gpu.scratch;
}

static unsigned blocks(size_t n, size_t per_block) { return (unsigned)((n + per_block - 1) / per_block); }

// ============================================================================================================
// 2. Memory
// ============================================================================================================
static void *device_alloc(size_t bytes) {
    void *p = NULL;
    size_t room = 0, total = 0;
    if (cudaMalloc(&p, bytes ? bytes : 16) != cudaSuccess) {
        cudaMemGetInfo(&room, &total);
        die("the GPU has no room for %zu bytes (%zu of %zu are free): use a smaller size or batch", bytes, room, total);
    }
    zero(p, bytes);
    return p;
}

static void device_free(void *p) { cuda_check(cudaFree(p)); }
static size_t act_size(void) { return gpu.half ? sizeof(bf16) : sizeof(float); }
static act *act_at(act *p, size_t elements) { return (act *)((char *)p + elements * act_size()); }
static void zero(void *p, size_t bytes) { if (bytes) cuda_check(cudaMemsetAsync(p, 0, bytes, gpu.stream)); }

static void copy(void *dst, const void *src, size_t bytes) {
    if (bytes) cuda_check(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, gpu.stream));
}

// Through a ring of pinned buffers: the caller may reuse src at once, and the card does not wait for the host.
static void upload(void *dst, const void *src, size_t bytes) {
    for (size_t done = 0, part; done < bytes; done += part) {
        int i = (int)(gpu.turn++ % STAGES);
        part = bytes - done < (size_t)STAGE_BYTES ? bytes - done : (size_t)STAGE_BYTES;
        cuda_check(cudaEventSynchronize(gpu.stage[i].free));
        memcpy(gpu.stage[i].host, (const char *)src + done, part);
        cuda_check(cudaMemcpyAsync((char *)dst + done, gpu.stage[i].host, part, cudaMemcpyHostToDevice, gpu.stream));
        cuda_check(cudaEventRecord(gpu.stage[i].free, gpu.stream));
    }
}

static void download(void *dst, const void *src, size_t bytes) {
    if (bytes) cuda_check(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, gpu.stream));
    wait_device();
}

// Between ranks (section 7 of osp.c). With a card for every rank: NCCL's grouped sends and receives on one stream.
// Where NCCL is missing, or ranks share a card: down, through MPI between hosts' memories, up.
#ifdef OSP_NCCL
static void nccl_check(ncclResult_t r) {
    if (r != ncclSuccess) die("NCCL: %s; the run cannot go on", ncclGetErrorString(r));
}

// One communicator for the ranks of a sample, one for the guidance pair, each made when first used: the group's first
// rank draws an id, MPI brings it to the others. NVLink multicast stays off.
static ncclComm_t nccl_group(int purpose, int rank, int R) {
    static ncclComm_t groups[2];
    ncclComm_t *group = &groups[purpose == GUIDANCE];
    if (*group) return *group;
    ncclUniqueId id;
    setenv("NCCL_NVLS_ENABLE", "0", 1);
    if (rank == 0) nccl_check(ncclGetUniqueId(&id));
    MPI_Bcast(&id, sizeof(id), MPI_BYTE, 0, ranks_of(purpose));
    nccl_check(ncclCommInitRank(group, R, id, rank));
    return *group;
}

static bool nccl_all_to_all(void *to, const void *from, const int *receive, const int *send, bool same,
                            size_t row_bytes, int rank, int R, int purpose) {
    if (sample_ranks == MPI_COMM_NULL || gpu.shared) return false;
    ncclComm_t group = nccl_group(purpose, rank, R);
    size_t at_send = 0, at_receive = 0;
    nccl_check(ncclGroupStart());
    for (int s = 0; s < R; s++) {
        const char *out = (const char *)from + (same ? 0 : at_send);
        nccl_check(ncclSend(out, (size_t)send[s] * row_bytes, ncclUint8, s, group, gpu.stream));
        nccl_check(ncclRecv((char *)to + at_receive, (size_t)receive[s] * row_bytes, ncclUint8, s, group, gpu.stream));
        at_send += (size_t)send[s] * row_bytes, at_receive += (size_t)receive[s] * row_bytes;
    }
    nccl_check(ncclGroupEnd());
    return true;
}
#else
static bool nccl_all_to_all(void *, const void *, const int *, const int *, bool, size_t, int, int, int) {
    return false;
}
#endif

static char *pinned(size_t bytes) {
    if (bytes > gpu.room_bytes) {
        if (gpu.room) cuda_check(cudaFreeHost(gpu.room));
        cuda_check(cudaMallocHost((void **)&gpu.room, bytes));
        gpu.room_bytes = bytes;
    }
    return gpu.room;
}

static void device_all_to_all(void *to, const void *from, const int *receive, const int *send, bool same,
                              size_t row_bytes, int rank, int R, int purpose) {
    if (nccl_all_to_all(to, from, receive, send, same, row_bytes, rank, R, purpose)) return;
    size_t out = 0, in = 0;
    for (int s = 0; s < R; s++) out = same ? (size_t)send[s] : out + (size_t)send[s], in += (size_t)receive[s];
    char *host = pinned((out + in) * row_bytes);
    download(host, from, out * row_bytes);
    mpi_all_to_all(host + out * row_bytes, host, receive, send, same, row_bytes, purpose);
    upload(to, host + out * row_bytes, in * row_bytes);
}

// ============================================================================================================
// 3. How threads share rows
// ============================================================================================================
// V neighbours in one access where V is 4 or 8 (p aligned to 16 bytes, or to 8 for four act), else one by one.
constexpr size_t pack_alignment(size_t size, size_t V) { return V < 4 ? size : V * size < 16 ? V * size : 16; }
template <typename T, int V> struct alignas(pack_alignment(sizeof(T), V)) Pack { T x[V]; };

template <typename T, int V> static __device__ void load(float (&v)[V], const T *p) {
    Pack<T, V> pack = *(const Pack<T, V> *)p;
    for (int i = 0; i < V; i++) v[i] = (float)pack.x[i];
}

template <typename T, int V> static __device__ void store(T *p, const float (&v)[V]) {
    Pack<T, V> pack;
    for (int i = 0; i < V; i++) pack.x[i] = (T)v[i];
    *(Pack<T, V> *)p = pack;
}

// The same for what no one writes meanwhile (weights, gates, tables): through the read-only path, so that the compiler
// may move it above stores. v = otherwise where p is NULL.
template <int V> static __device__ void load_constant(float (&v)[V], const float *p, size_t at, float otherwise = 0) {
    if (!p) for (int i = 0; i < V; i++) v[i] = otherwise;
    else if constexpr (V >= 4)
        for (int i = 0; i < V; i += 4) {
            float4 q = __ldg((const float4 *)(p + at + i));
            v[i] = q.x, v[i + 1] = q.y, v[i + 2] = q.z, v[i + 3] = q.w;
        }
    else for (int i = 0; i < V; i++) v[i] = __ldg(p + at + i);
}

template <int V> static __device__ void load_sample(float (&v)[V], PerSample s, size_t b, int c, float otherwise = 0) {
    load_constant(v, s.p, b * s.stride + c, otherwise);
}

// 8 neighbours of an array of n from i on, whatever its alignment and end; what lies behind the end reads as 0.
template <typename T> static __device__ void load8(float (&v)[8], const T *p, size_t i, size_t n) {
    if (i + 8 <= n && ((uintptr_t)(p + i) & 15) == 0) load(v, p + i);
    else for (int j = 0; j < 8; j++) v[j] = i + j < n ? (float)p[i + j] : 0.0f;
}

template <typename T> static __device__ void store8(T *p, const float (&v)[8], size_t i, size_t n) {
    if (i + 8 <= n && ((uintptr_t)(p + i) & 15) == 0) store(p + i, v);
    else for (int j = 0; j < 8 && i + j < n; j++) p[i + j] = (T)v[j];
}

static __device__ size_t thread_index() { return blockIdx.x * (size_t)blockDim.x + threadIdx.x; }

// May rows of dim numbers at these addresses be read V at a time?
template <typename... P> static bool aligned(int V, size_t dim, const P *...p) {
    return dim % (size_t)V == 0 && (((uintptr_t)p | ...) & 15) == 0;
}

// A row by G threads: thread `lane` holds the K pieces of V neighbours from column (lane + k·G)·V on, k = 0..K-1. A
// block has ROWS rows in hand at a time; where it sums columns it goes through SHARE rows, so that its line of sums is
// small beside them.
template <int V_, int G_, int K_> struct Tile {
    enum { V = V_, G = G_, K = K_, THREADS = G > 128 ? G : 128, ROWS = THREADS / G, SHARE = ROWS > 1 ? 128 : 32 };
    static __device__ int column(int k) { return ((int)(threadIdx.x % G) + k * G) * V; }
};

// The statement with T = the tile for rows of dim <= 5120. What is not wide goes by single numbers (V = 4) or pairs (8).
#define BY_TILE(V, wide, dim, ...) do { \
    if ((dim) > 5120) die("rows of %d numbers: on a GPU dim is at most 5120", (int)(dim)); \
    if (wide) { \
        if ((dim) <= 128)       { typedef Tile<V, 128 / V, 1> T; __VA_ARGS__; } \
        else if ((dim) <= 512)  { typedef Tile<V, 32, 16 / V> T; __VA_ARGS__; } \
        else if ((dim) <= 2048) { typedef Tile<V, 128, 16 / V> T; __VA_ARGS__; } \
        else                    { typedef Tile<V, 1024 / V, 5> T; __VA_ARGS__; } \
    } \
    else if ((dim) <= 128)      { typedef Tile<V / 4, 32, 16 / V> T; __VA_ARGS__; } \
    else                        { typedef Tile<V / 4, 256, 80 / V> T; __VA_ARGS__; } \
} while (0)

// The statement with V = 4 or 1 columns per thread, for kernels whose threads share rows in a simpler way.
#define BY_WIDTH(wide, ...) \
    do { if (wide) { enum { V = 4 }; BY_TYPE(__VA_ARGS__); } else { enum { V = 1 }; BY_TYPE(__VA_ARGS__); } } while (0)

// v[i] = its sum over the G threads of a row (N sums at once): lanes of a warp by shuffles, warps by shared memory.
template <int G, int N> static __device__ void group_sum(float (&v)[N]) {
    for (int step = (G < 32 ? G : 32) / 2; step; step /= 2)
        for (int i = 0; i < N; i++) v[i] += __shfl_xor_sync(~0u, v[i], step);
    if constexpr (G > 32) {
        __shared__ float part[N][G / 32];
        __syncthreads();
        if (threadIdx.x % 32 == 0) for (int i = 0; i < N; i++) part[i][threadIdx.x / 32] = v[i];
        __syncthreads();
        for (int i = 0; i < N; i++) {
            v[i] = 0.0f;
            for (int w = 0; w < G / 32; w++) v[i] += part[i][w];
        }
    }
}

// Column sums, first stage: line[S·dim] = the block's S vectors of sums, each thread's own in acc, rows added in order.
template <typename T, int S>
static __device__ void block_line(float *line, const float (&acc)[S][T::K][T::V], int dim) {
    if constexpr (T::ROWS == 1) {
        for (int s = 0; s < S; s++)
            for (int k = 0; k < T::K; k++) if (T::column(k) < dim) store(line + s * dim + T::column(k), acc[s][k]);
    } else {
        __shared__ float sum[S * 512];       // a narrow row, several of them per block
        for (int row = 0; row < T::ROWS; row++) {
            if ((int)threadIdx.x / T::G == row)
                for (int s = 0; s < S; s++)
                    for (int k = 0; k < T::K; k++)
                        for (int i = 0; i < T::V; i++) {
                            int c = s * dim + T::column(k) + i;
                            if (T::column(k) < dim) sum[c] = (row ? sum[c] : 0.0f) + acc[s][k][i];
                        }
            __syncthreads();
        }
        for (int c = threadIdx.x; c < S * dim; c += T::THREADS) line[c] = sum[c];
    }
}

// The same for a block of 8 warps, each with its own rows, thread (x, y) holding V columns: line[32·V] (columns < dim).
template <int V> static __device__ void warps_line(float *line, const float (&acc)[V], int dim) {
    __shared__ float sum[8][32 * V];
    for (int i = 0; i < V; i++) sum[threadIdx.y][threadIdx.x * V + i] = acc[i];
    __syncthreads();
    for (int c = threadIdx.y * 32 + threadIdx.x; c < 32 * V && c < dim; c += 256) {
        float total = 0.0f;
        for (int y = 0; y < 8; y++) total += sum[y][c];
        line[c] = total;
    }
}

// Second stage: sample b (blockIdx.y) adds its `count` lines of [2][dim] (or [1][dim]) onto d0[b], d1[b].
// 32 lines at a time: warp y takes lines y, y + 32, ...; then warp y adds up what all 32 found for column y.
static __global__ void fold_kernel(PerSample d0, PerSample d1, const float *lines, int count, int dim, int columns) {
    __shared__ float sum[32][33];
    int c = blockIdx.x * 32 + threadIdx.x, b = blockIdx.y;
    float total = 0.0f;
    if (c < columns)
#pragma unroll 8
        for (int i = threadIdx.y; i < count; i += 32) total += lines[((size_t)b * count + i) * columns + c];
    sum[threadIdx.y][threadIdx.x] = total;
    __syncthreads();
    float v[1] = {sum[threadIdx.x][threadIdx.y]};
    group_sum<32>(v);
    c = blockIdx.x * 32 + threadIdx.y;
    PerSample d = c < dim ? d0 : d1;
    if (threadIdx.x == 0 && c < columns && d.p) d.p[b * d.stride + c % dim] += v[0];
}

static void fold(PerSample d0, PerSample d1, const float *lines, int lines_per_sample, int B, int dim, int vectors) {
    int samples = d0.p && d0.stride ? B : d1.p && d1.stride ? B : 1;     // stride 0: one sum over all samples
    LAUNCH(fold_kernel, dim3(blocks((size_t)vectors * dim, 32), samples), dim3(32, 32), d0, d1, lines,
           lines_per_sample * (B / samples), dim, vectors * dim);
}

// ============================================================================================================
// 4. Elementwise on act
// ============================================================================================================
static constexpr float GELU_1 = 0.7978845608028654f, GELU_3 = 0.044715f; // √(2/π)

// 1 + tanh(z) = 2/(1 + e^−2z): one exponential. gelu(u) = u·sigmoid(2·√(2/π)·(u + 0.044715·u³)).
static __device__ float gelu_gate(float u) { return 1.0f / (1.0f + expf(-2.0f * GELU_1 * (u + GELU_3 * u * u * u))); }
static __device__ float gelu(float u) { return u * gelu_gate(u); }
static __device__ float gelu_slope(float u) {
    float s = gelu_gate(u);
    return s + u * s * (1.0f - s) * 2.0f * GELU_1 * (1.0f + 3.0f * GELU_3 * u * u);
}
static __device__ float silu(float u) { return u / (1.0f + expf(-u)); }
static __device__ float silu_slope(float u) { float s = 1.0f / (1.0f + expf(-u)); return s * (1.0f + u * (1.0f - s)); }

// y[n] = f(x[n]): a read, a write.
template <typename Y, typename X, float (*f)(float)> static __global__ void map_kernel(Y *y, const X *x, size_t n) {
    size_t i = 8 * thread_index();
    float v[8];
    load8(v, x, i, n);
    for (int j = 0; j < 8; j++) v[j] = f(v[j]);
    store8(y, v, i, n);
}

// dx[n] = dy[n]·f'(x[n]): two reads, a write.
template <typename A, float (*slope)(float)>
static __global__ void map_backward_kernel(A *dx, const A *dy, const A *x, size_t n) {
    size_t i = 8 * thread_index();
    float v[8], d[8];
    load8(v, x, i, n);
    load8(d, dy, i, n);
    for (int j = 0; j < 8; j++) d[j] *= slope(v[j]);
    store8(dx, d, i, n);
}

static __device__ float same(float u) { return u; }

// The launch of a kernel whose threads take 8 numbers each, of n.
#define LAUNCH8(kernel, n, ...) do { if ((n) > 0) LAUNCH(kernel, blocks(n, 8 * 256), 256, __VA_ARGS__, n); } while (0)

static void to_act(act *y, const float *x, size_t n) { BY_TYPE(LAUNCH8((map_kernel<A, float, same>), n, (A *)y, x)); }

static void to_float(float *y, const act *x, size_t n) {
    BY_TYPE(LAUNCH8((map_kernel<float, A, same>), n, y, (const A *)x));
}

static void gelu_backward(act *dx, const act *dy, const act *pre, size_t n) {
    BY_TYPE(LAUNCH8((map_backward_kernel<A, gelu_slope>), n, (A *)dx, (const A *)dy, (const A *)pre));
}

static void silu_forward(act *y, const act *x, size_t n) {
    BY_TYPE(LAUNCH8((map_kernel<A, A, silu>), n, (A *)y, (const A *)x));
}

static void silu_backward(act *dx, const act *dy, const act *x, size_t n) {
    BY_TYPE(LAUNCH8((map_backward_kernel<A, silu_slope>), n, (A *)dx, (const A *)dy, (const A *)x));
}

// ============================================================================================================
// 5. Matrix products
// ============================================================================================================
// cuBLASLt thinks in columns: a row-major [rows, cols] matrix is to it a [cols, rows] one. So y = x·w^T is asked for
// as y^T[out, rows] = w · x^T: first factor w, second x; a bias is a number per row there, which the epilogue adds.

static int alignment(const void *p) {
    size_t a = (uintptr_t)p & (~(uintptr_t)p + 1);
    return a == 0 || a > 256 ? 256 : (int)a;
}

static void plan_free(Plan *p) {
    if (!p->used) return;
    cublasLtMatmulDescDestroy(p->op);
    cublasLtMatrixLayoutDestroy(p->a);
    cublasLtMatrixLayoutDestroy(p->b);
    cublasLtMatrixLayoutDestroy(p->d);
}

static void plan_set(Plan *p, cublasLtMatmulDescAttributes_t attribute, const void *value, size_t bytes) {
    blas_check(cublasLtMatmulDescSetAttribute(p->op, attribute, value, bytes));
}

// Asks cuBLASLt's heuristics for the algorithm of a new product and takes the first offer. At the paper's sizes nothing
// else pays: of 8 offers and 80 variations of the best three (cluster, order of tiles), taken in turn on a hot card, the
// best was 2 % faster, because the card's power limit decides there. One exception: a product of short sums moves more
// than it computes, and there tiles of 128 x 128 win, two of which fit a multiprocessor, so that one loads while the
// other stores (131,072 x 128 x 128 on an H100: 0.030 ms, the first offer 0.043; with a second output, the gelu's
// input, they lose). The choice is by rule, not by timing, so that every run makes the same one. float stays float: no
// TF32.
static void plan_make(Plan *p, const PlanKey *k, const void *bias, void *aux) {
    cudaDataType_t in = gpu.half ? CUDA_R_16BF : CUDA_R_32F, out = k->float_d ? CUDA_R_32F : in;
    cublasOperation_t ta = k->transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N, tb = k->transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    int64_t aux_row = (int64_t)k->m;
    size_t room = WORKSPACE_BYTES;
    memset(p, 0, sizeof(*p));
    p->key = *k, p->used = true;
    blas_check(cublasLtMatmulDescCreate(&p->op, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    plan_set(p, CUBLASLT_MATMUL_DESC_TRANSA, &ta, sizeof(ta));
    plan_set(p, CUBLASLT_MATMUL_DESC_TRANSB, &tb, sizeof(tb));
    plan_set(p, CUBLASLT_MATMUL_DESC_EPILOGUE, &k->epilogue, sizeof(k->epilogue));
    if (bias) plan_set(p, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof(bias));
    if (aux) plan_set(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &aux, sizeof(aux));
    if (aux) plan_set(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &aux_row, sizeof(aux_row));
    size_t a_rows = k->transpose_a ? k->k : k->m, a_cols = k->transpose_a ? k->m : k->k;
    size_t b_rows = k->transpose_b ? k->n : k->k, b_cols = k->transpose_b ? k->k : k->n;
    blas_check(cublasLtMatrixLayoutCreate(&p->a, in, a_rows, a_cols, (int64_t)a_rows));
    blas_check(cublasLtMatrixLayoutCreate(&p->b, in, b_rows, b_cols, (int64_t)b_rows));
    blas_check(cublasLtMatrixLayoutCreate(&p->d, out, k->m, k->n, (int64_t)k->m));
    cublasLtMatmulPreference_t want;
    blas_check(cublasLtMatmulPreferenceCreate(&want));
    const struct { cublasLtMatmulPreferenceAttributes_t name; const void *value; size_t bytes; } wish[5] = {
        {CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &room, sizeof(room)},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &k->align_a, 4},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &k->align_b, 4},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &k->align_d, 4},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &k->align_d, 4}};
    for (int i = 0; i < 5; i++)
        blas_check(cublasLtMatmulPreferenceSetAttribute(want, wish[i].name, wish[i].value, wish[i].bytes));
    cublasLtMatmulHeuristicResult_t offer[8];
    int found = 0, take = 0, tile = 0;
    size_t written;
    cublasStatus_t s = cublasLtMatmulAlgoGetHeuristic(gpu.blas, p->op, p->a, p->b, p->d, p->d, want, 8, offer, &found);
    p->possible = s == CUBLAS_STATUS_SUCCESS && found > 0 && offer[0].state == CUBLAS_STATUS_SUCCESS;
    bool short_sums = k->k <= 512 && k->m * k->n >= (size_t)gpu.card.multiProcessorCount << 14 && !aux;
    for (int i = found - 1; i >= 0 && short_sums; i--) {
        blas_check(cublasLtMatmulAlgoConfigGetAttribute(&offer[i].algo, CUBLASLT_ALGO_CONFIG_TILE_ID, &tile,
                                                        sizeof(tile), &written));
        if (tile == CUBLASLT_MATMUL_TILE_128x128 && offer[i].state == CUBLAS_STATUS_SUCCESS) take = i;
    }
    if (p->possible) p->algo = offer[take].algo;
    cublasLtMatmulPreferenceDestroy(want);
}

// d[m, n] = op(a)·op(b) + beta·d, in cuBLASLt's columns, with its epilogue. false: cuBLASLt has no way to do this one.
static bool matmul(void *d, bool float_d, const act *a, bool ta, const act *b, bool tb, size_t m, size_t n, size_t k,
                   float beta, int epilogue = CUBLASLT_EPILOGUE_DEFAULT, const void *bias = NULL, void *aux = NULL) {
    PlanKey key;
    memset(&key, 0, sizeof(key));            // memcmp below looks at the padding too
    key.m = m, key.n = n, key.k = k, key.transpose_a = ta, key.transpose_b = tb;
    key.float_d = float_d, key.epilogue = epilogue;
    key.align_a = alignment(a), key.align_b = alignment(b), key.align_d = alignment(d), key.align_aux = alignment(aux);
    Plan *p = NULL;
    for (int i = 0; i < PLANS && gpu.plan[i].used && !p; i++)
        if (!memcmp(&gpu.plan[i].key, &key, sizeof(key))) p = &gpu.plan[i];
    if (!p) {
        p = &gpu.plan[gpu.plans++ % PLANS];
        plan_free(p);
        plan_make(p, &key, bias, aux);
    }
    if (!p->possible) return false;
    if (bias) plan_set(p, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof(bias));
    if (aux) plan_set(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &aux, sizeof(aux));
    float one = 1.0f;
    blas_check(cublasLtMatmul(gpu.blas, p->op, &one, a, p->a, b, p->b, &beta, d, p->d, d, p->d, &p->algo, gpu.workspace,
                              WORKSPACE_BYTES, gpu.stream));
    return true;
}

// cuBLASLt's epilogue wants the bias in the type of y.
static const void *bias_as_act(const float *b, int out) {
    if (!b || !gpu.half) return b;
    act *copy = (act *)scratch((size_t)out * act_size());
    to_act(copy, b, (size_t)out);
    return copy;
}

static void linear_forward(act *y, const act *x, const act *w, const float *b, size_t rows, int out, int in) {
    if (!rows) return;
    const void *bias = bias_as_act(b, out);
    if (!matmul(y, false, w, true, x, false, (size_t)out, rows, (size_t)in, 0.0f,
                b ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT, bias))
        die("cuBLASLt has no algorithm for y[%zu, %d] = x[.., %d]·w^T", rows, out, in);
}

// float: the product's bias epilogue, then a pass of our own gelu. bfloat16: gelu in the epilogue too, on numbers still
// in float32 (it is the tanh form); AUX keeps them before the gelu, and its rows must be a multiple of 8 long.
static void linear_gelu_forward(act *y, act *pre, const act *x, const act *w, const float *b, size_t rows, int out,
                                int in) {
    if (!rows) return;
    const void *bias = bias_as_act(b, out);
    int epilogue = pre ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_BIAS;
    if (gpu.half && b && out % 8 == 0 &&
        matmul(y, false, w, true, x, false, (size_t)out, rows, (size_t)in, 0.0f, epilogue, bias, pre)) return;
    act *u = pre ? pre : y;
    linear_forward(u, x, w, b, rows, out, in);
    BY_TYPE(LAUNCH8((map_kernel<A, A, gelu>), rows * (size_t)out, (A *)y, (const A *)u));
}

// lines[chunk][dim] = Σ of dy[rows, dim] over the chunk's 128 rows: a read of dy.
template <typename A, int V> static __global__ void column_sum_kernel(float *lines, const A *dy, size_t rows, int dim) {
    int first = blockIdx.x * 32 * V, c = first + threadIdx.x * V;
    size_t r = blockIdx.y * (size_t)128 + threadIdx.y, end = min((blockIdx.y + 1) * (size_t)128, rows);
    float acc[V] = {}, v[V];
    if (c < dim)
#pragma unroll 8
        for (; r < end; r += 8) {
            load(v, dy + r * dim + c);
            for (int i = 0; i < V; i++) acc[i] += v[i];
        }
    warps_line<V>(lines + blockIdx.y * (size_t)dim + first, acc, dim - first);
}

static void column_sum(float *db, const act *dy, size_t rows, int dim) {
    unsigned chunks = blocks(rows, 128);
    float *lines = (float *)scratch((size_t)chunks * (size_t)dim * sizeof(float));
    PerSample d = {db, 0}, none = {NULL, 0};
    BY_WIDTH(aligned(4, (size_t)dim, dy), LAUNCH((column_sum_kernel<A, V>), dim3(blocks((size_t)dim, 32 * V), chunks),
                                                 dim3(32, 8), lines, (const A *)dy, rows, dim));
    fold(d, none, lines, (int)chunks, 1, dim, 1);
}

static void linear_backward(act *dx, float *dw, float *db, const act *dy, const act *x, const act *w, size_t rows,
                            int out, int in, bool accumulate) {
    size_t o = (size_t)out, i = (size_t)in;
    if (!rows) return;
    bool ok = true;
    if (dx) ok &= matmul(dx, false, w, false, dy, false, i, rows, o, accumulate ? 1.0f : 0.0f);
    if (dw) ok &= matmul(dw, true, x, false, dy, true, i, o, rows, 1.0f);
    if (!ok) die("cuBLASLt has no algorithm for the gradient of y[%zu, %d] = x[.., %d]·w^T", rows, out, in);
    if (db) column_sum(db, dy, rows, out);
}

// ============================================================================================================
// 6. Norms, modulation, residual
// ============================================================================================================
static __global__ void modulation_kernel(float *out, const float *mod, const float *e, int B, int J, int Je, int dim) {
    size_t i = thread_index(), row = (size_t)J * dim;
    if (i >= B * row) return;
    size_t b = i / row, c = i % dim, j = i % row / dim;
    out[i] = mod[i % row] + e[(b * Je + (Je > 1 ? j : 0)) * dim + c];
}

static void modulation_forward(float *out, const float *mod, const float *e, int B, int J, int Je, int dim) {
    LAUNCH(modulation_kernel, blocks((size_t)B * J * dim, 256), 256, out, mod, e, B, J, Je, dim);
}

// A thread for each number of dmod (sums over samples), then one for each number of de (sums over j where Je = 1).
static __global__ void modulation_backward_kernel(float *dmod, float *de, const float *dout, int B, int J, int Je,
                                                  int dim) {
    size_t i = thread_index(), row = (size_t)J * dim;
    if (i < row) {
        float total = 0.0f;
        if (dmod) for (int b = 0; b < B; b++) total += dout[b * row + i];
        if (dmod) dmod[i] += total;
        return;
    }
    i -= row;
    if (!de || i >= (size_t)B * Je * dim) return;
    float total = 0.0f;
    if (Je > 1) total = dout[i];
    else for (int j = 0; j < J; j++) total += dout[i / dim * row + (size_t)j * dim + i % dim];
    de[i] += total;
}

static void modulation_backward(float *dmod, float *de, const float *dout, int B, int J, int Je, int dim) {
    LAUNCH(modulation_backward_kernel, blocks((size_t)(J + B * Je) * dim, 256), 256, dmod, de, dout, B, J, Je, dim);
}

// x_out = x + gate·y, then h = norm(x_out), in one pass: reads 4 + a, writes 4 + a bytes per element. The row stays in
// registers, so mean and variance are two exact sums (not Σx² − mean²) at no further read.
template <typename A, typename T> static __global__ void __launch_bounds__(T::THREADS)
residual_norm_kernel(float *x_out, A *h, float *stat, const float *x, const A *y, PerSample gate, PerSample shift,
                     PerSample scale, float one, size_t rows, size_t n, int dim, float eps) {
    size_t row = (size_t)blockIdx.x * T::ROWS + threadIdx.x / T::G;
    bool live = row < rows;                  // idle rows of the last block go along with the last one, for the shuffles
    row = live ? row : rows - 1;
    size_t b = (unsigned)row / (unsigned)n, base = row * dim;        // 32 bits: a 64-bit division is slow
    float v[T::K][T::V] = {}, branch[T::K][T::V] = {}, sum[1] = {}, squares[1] = {};
    for (int k = 0; k < T::K; k++) if (T::column(k) < dim) load(v[k], x + base + T::column(k));
    if (y) {
        for (int k = 0; k < T::K; k++) if (T::column(k) < dim) load(branch[k], y + base + T::column(k));
        for (int k = 0; k < T::K; k++) {
            int c = T::column(k);
            if (c >= dim) continue;
            float g[T::V];
            load_sample(g, gate, b, c, 1.0f);
            for (int i = 0; i < T::V; i++) v[k][i] += g[i] * branch[k][i];
            if (live) store(x_out + base + c, v[k]);
        }
    }
    for (int k = 0; k < T::K; k++) for (int i = 0; i < T::V; i++) sum[0] += v[k][i];
    group_sum<T::G>(sum);
    float mean = sum[0] / dim;
    for (int k = 0; k < T::K; k++)
        if (T::column(k) < dim) for (int i = 0; i < T::V; i++) v[k][i] -= mean, squares[0] += v[k][i] * v[k][i];
    group_sum<T::G>(squares);
    float rstd = rsqrtf(squares[0] / dim + eps);
    if (!live) return;
    for (int k = 0; k < T::K; k++) {
        int c = T::column(k);
        if (c >= dim) continue;
        float s[T::V], t[T::V];
        load_sample(s, scale, b, c);
        load_sample(t, shift, b, c);
        for (int i = 0; i < T::V; i++) t[i] += v[k][i] * rstd * (one + s[i]);
        store(h + base + c, t);
    }
    if (stat && threadIdx.x % T::G == 0) stat[2 * row] = mean, stat[2 * row + 1] = rstd;
}

static void residual_norm_forward(float *x_out, act *h, float *stat, const float *x, const act *y, PerSample gate,
                                  PerSample shift, PerSample scale, float one, int B, size_t n, int dim, float eps) {
    size_t rows = (size_t)B * n;
    size_t strides = gate.stride | shift.stride | scale.stride;
    bool wide = aligned(4, (size_t)dim | strides, x_out, h, x, y, gate.p, shift.p, scale.p);
    if (rows)
        BY_TYPE(BY_TILE(4, wide, dim, LAUNCH((residual_norm_kernel<A, T>), blocks(rows, T::ROWS), T::THREADS, x_out,
                        (A *)h, stat, x, (const A *)y, gate, shift, scale, one, rows, n, dim, eps)));
}

// g = dh·(one + scale); dx += rstd·(g − mean g − x̂·mean(g·x̂)). Block (chunk, b): SHARE rows of sample b, and a line
// [dshift | dscale] of their column sums. Reads 8 + a, writes 4 bytes per element.
template <typename A, typename T> static __global__ void __launch_bounds__(T::THREADS)
norm_backward_kernel(float *dx, float *lines, const A *dh, const float *x, const float *stat, PerSample scale,
                     float one, size_t n, int dim) {
    size_t b = blockIdx.y, first = blockIdx.x * (size_t)T::SHARE, end = min(first + T::SHARE, n);
    float acc[2][T::K][T::V] = {};
    for (size_t i = first; i < end; i += T::ROWS) {
        size_t r = i + threadIdx.x / T::G, row = b * n + min(r, n - 1), base = row * dim;
        bool live = r < end;
        float g[T::K][T::V] = {}, xn[T::K][T::V] = {}, d[T::K][T::V], sum[2] = {};
        float mean = stat[2 * row], rstd = stat[2 * row + 1];
        for (int k = 0; k < T::K; k++) if (T::column(k) < dim) load(g[k], dh + base + T::column(k));
        for (int k = 0; k < T::K; k++) if (T::column(k) < dim) load(xn[k], x + base + T::column(k));
        for (int k = 0; k < T::K; k++) if (T::column(k) < dim) load(d[k], dx + base + T::column(k));
        for (int k = 0; k < T::K; k++) {
            if (T::column(k) >= dim) continue;
            float s[T::V];
            load_sample(s, scale, b, T::column(k));
            for (int j = 0; j < T::V; j++) {
                xn[k][j] = (xn[k][j] - mean) * rstd;
                if (live) acc[0][k][j] += g[k][j], acc[1][k][j] += g[k][j] * xn[k][j];
                g[k][j] *= one + s[j];
                sum[0] += g[k][j], sum[1] += g[k][j] * xn[k][j];
            }
        }
        group_sum<T::G>(sum);
        sum[0] /= dim, sum[1] /= dim;
        for (int k = 0; k < T::K; k++) {
            if (T::column(k) >= dim || !live) continue;
            for (int j = 0; j < T::V; j++) d[k][j] += rstd * (g[k][j] - sum[0] - xn[k][j] * sum[1]);
            store(dx + base + T::column(k), d[k]);
        }
    }
    block_line<T>(lines + (b * gridDim.x + blockIdx.x) * 2 * dim, acc, dim);
}

static void norm_backward(float *dx, PerSample dshift, PerSample dscale, const act *dh, const float *x,
                          const float *stat, PerSample scale, float one, int B, size_t n, int dim) {
    if (!B || !n) return;
    if (!scale.stride && !dshift.stride && !dscale.stride) n *= (size_t)B, B = 1;
    bool wide = aligned(4, (size_t)dim | scale.stride, dx, dh, x, scale.p);
    unsigned chunks = 0;
    float *lines = NULL;
    BY_TYPE(BY_TILE(4, wide, dim, chunks = blocks(n, T::SHARE);
                    lines = (float *)scratch((size_t)chunks * B * 2 * dim * sizeof(float));
                    LAUNCH((norm_backward_kernel<A, T>), dim3(chunks, B), T::THREADS, dx, lines, (const A *)dh, x, stat,
                           scale, one, n, dim)));
    fold(dshift, dscale, lines, (int)chunks, B, dim, 2);
}

// dy = gate·dx, and the column sums of dx·y over the chunk's 128 rows of sample b (blockIdx.z). Reads 4 + a, writes a.
template <typename A, int V> static __global__ void
gate_backward_kernel(A *dy, float *lines, const float *dx, const A *y, PerSample gate, size_t n, int dim) {
    size_t b = blockIdx.z, r = blockIdx.y * (size_t)128 + threadIdx.y, end = min((blockIdx.y + 1) * (size_t)128, n);
    int first = blockIdx.x * 32 * V, c = first + threadIdx.x * V;
    float acc[V] = {}, g[V], d[V], v[V];
    if (c < dim) {
        load_sample(g, gate, b, c, 1.0f);
#pragma unroll 4
        for (; r < end; r += 8) {
            size_t at = (b * n + r) * dim + c;
            load(d, dx + at);
            if (lines) load(v, y + at);
            for (int i = 0; i < V; i++) {
                if (lines) acc[i] += d[i] * v[i];
                d[i] *= g[i];
            }
            store(dy + at, d);
        }
    }
    if (lines) warps_line<V>(lines + (b * gridDim.y + blockIdx.y) * dim + first, acc, dim - first);
}

static void gate_backward(act *dy, PerSample dgate, const float *dx, const act *y, PerSample gate, int B, size_t n,
                          int dim) {
    unsigned chunks = blocks(n, 128);
    if (!B || !n) return;
    float *lines = dgate.p ? (float *)scratch((size_t)chunks * B * dim * sizeof(float)) : NULL;
    BY_WIDTH(aligned(4, (size_t)dim | gate.stride, dy, dx, y, gate.p),
             LAUNCH((gate_backward_kernel<A, V>), dim3(blocks((size_t)dim, 32 * V), chunks, B), dim3(32, 8), (A *)dy,
                    lines, dx, (const A *)y, gate, n, dim));
    PerSample none = {NULL, 0};
    if (lines) fold(dgate, none, lines, (int)chunks, B, dim, 1);
}

// Threads of a block for a kernel that moves rows of `pieces` pieces: x along the row, y rows.
static dim3 row_block(size_t pieces) {
    unsigned x = 1;
    while (x < 256 && x < pieces) x *= 2;
    return dim3(x, 256 / x);
}

// x_out[j] = x[map[j]] + gate·y[map[j]]: the residual of a block's end and the rearrangement of its rows, 4 + a bytes
// in and 4 out per element: the move costs nothing, since whole rows travel.
template <typename A, int V> static __global__ void
residual_gather_kernel(float *x_out, const float *x, const A *y, PerSample gate, const int *map, size_t count, size_t n,
                       int dim) {
    size_t j = blockIdx.x * (size_t)blockDim.y + threadIdx.y;
    if (j >= count) return;
    size_t i = map ? (size_t)map[j] : j, b = (unsigned)i / (unsigned)n;
#pragma unroll 2
    for (int c = threadIdx.x * V; c < dim; c += blockDim.x * V) {
        float v[V], u[V] = {}, g[V];
        load(v, x + i * dim + c);
        if (y) load(u, y + i * dim + c);
        load_sample(g, gate, b, c, 1.0f);
        for (int k = 0; k < V; k++) v[k] += g[k] * u[k];
        store(x_out + j * dim + c, v);
    }
}

static void residual_gather_forward(float *x_out, const float *x, const act *y, PerSample gate, const int *map,
                                    size_t count, int B, size_t n, int dim) {
    (void)B;
    if (!count) return;
    bool wide = aligned(4, (size_t)dim | gate.stride, x_out, x, y, gate.p);
    dim3 block = row_block((size_t)dim / (wide ? 4 : 1));
    BY_WIDTH(wide, LAUNCH((residual_gather_kernel<A, V>), blocks(count, block.y), block, x_out, x, (const A *)y, gate,
                          map, count, n, dim));
}

// dst[j] = src[map[j]], rows of any bytes in words W.
template <typename W>
static __global__ void gather_kernel(W *dst, const W *src, const int *map, size_t count, size_t words) {
    size_t j = blockIdx.x * (size_t)blockDim.y + threadIdx.y;
    if (j >= count) return;
    size_t i = (size_t)map[j];
    for (size_t c = threadIdx.x; c < words; c += blockDim.x) dst[j * words + c] = src[i * words + c];
}

static void gather_rows(void *dst, const void *src, const int *map, size_t count, size_t row_bytes) {
    if (!count || !row_bytes) return;
    size_t word = aligned(16, row_bytes, dst, src) ? 16 : (row_bytes | (uintptr_t)dst | (uintptr_t)src) % 4 ? 1 : 4;
    size_t words = row_bytes / word;
    dim3 block = row_block(words);
    unsigned grid = blocks(count, block.y);
    if (word == 16)     LAUNCH(gather_kernel, grid, block, (uint4 *)dst, (const uint4 *)src, map, count, words);
    else if (word == 4) LAUNCH(gather_kernel, grid, block, (float *)dst, (const float *)src, map, count, words);
    else                LAUNCH(gather_kernel, grid, block, (char *)dst, (const char *)src, map, count, words);
}

// The pairs of v turn by (cos, sin) = turn[2p], turn[2p+1]; direction −1 turns back (the backward pass: a rotation's
// transpose is its inverse).
template <int V> static __device__ void rotate(float (&v)[V], const float (&turn)[V], float direction) {
    for (int i = 0; i < V; i += 2) {
        float a = v[i], b = v[i + 1], c = turn[i], s = direction * turn[i + 1];
        v[i] = a * c - b * s;
        v[i + 1] = a * s + b * c;
    }
}

// RMSNorm over the row, then RoPE inside each head: reads a, writes a bytes per element. The table [n, head_dim/2, 2]
// lies just as the features of a head do, so column c of a row meets entry c mod head_dim of its token's line.
template <typename A, typename T> static __global__ void __launch_bounds__(T::THREADS)
rmsnorm_rope_kernel(A *y, float *rstd, const A *x, const float *w, const float *rope, size_t rows, size_t n, int dim,
                    int head_dim, float eps) {
    size_t row = (size_t)blockIdx.x * T::ROWS + threadIdx.x / T::G;
    bool live = row < rows;
    row = live ? row : rows - 1;
    size_t token = (unsigned)row % (unsigned)n, base = row * dim;
    float v[T::K][T::V] = {}, squares[1] = {};
    for (int k = 0; k < T::K; k++) if (T::column(k) < dim) load(v[k], x + base + T::column(k));
    for (int k = 0; k < T::K; k++) for (int i = 0; i < T::V; i++) squares[0] += v[k][i] * v[k][i];
    group_sum<T::G>(squares);
    float r = rsqrtf(squares[0] / dim + eps);
    if (!live) return;
    for (int k = 0; k < T::K; k++) {
        int c = T::column(k);
        if (c >= dim) continue;
        float s[T::V], turn[T::V];
        load_constant(s, w, c);
        for (int i = 0; i < T::V; i++) v[k][i] *= r * s[i];
        if (rope) {
            load_constant(turn, rope, token * head_dim + c % head_dim);
            rotate(v[k], turn, 1.0f);
        }
        store(y + base + c, v[k]);
    }
    if (rstd && threadIdx.x % T::G == 0) rstd[row] = r;
}

static void rmsnorm_rope_forward(act *y, float *rstd, const act *x, const float *w, const float *rope, int B, size_t n,
                                 int dim, int heads, float eps) {
    size_t rows = (size_t)B * n;
    bool wide = aligned(8, (size_t)(dim / heads), y, x, w, rope);
    if (rows)
        BY_TYPE(BY_TILE(8, wide, dim, LAUNCH((rmsnorm_rope_kernel<A, T>), blocks(rows, T::ROWS), T::THREADS, (A *)y,
                        rstd, (const A *)x, w, rope, rows, n, dim, dim / heads, eps)));
}

// d = dy turned back; g = d·w; dx = rstd·(g − x̂·mean(g·x̂)); a line of column sums of d·x̂. Reads 2a, writes a.
template <typename A, typename T> static __global__ void __launch_bounds__(T::THREADS)
rmsnorm_rope_backward_kernel(A *dx, float *lines, const A *dy, const A *x, const float *rstd, const float *w,
                             const float *rope, size_t rows, size_t n, int dim, int head_dim) {
    size_t first = blockIdx.x * (size_t)T::SHARE, end = min(first + T::SHARE, rows);
    float acc[1][T::K][T::V] = {};
    for (size_t i = first; i < end; i += T::ROWS) {
        size_t r = i + threadIdx.x / T::G, row = min(r, rows - 1), base = row * dim;
        size_t token = (unsigned)row % (unsigned)n;
        bool live = r < end;
        float g[T::K][T::V] = {}, xn[T::K][T::V] = {}, scale = rstd[row], sum[1] = {};
        for (int k = 0; k < T::K; k++) if (T::column(k) < dim) load(g[k], dy + base + T::column(k));
        for (int k = 0; k < T::K; k++) if (T::column(k) < dim) load(xn[k], x + base + T::column(k));
        for (int k = 0; k < T::K; k++) {
            int c = T::column(k);
            if (c >= dim) continue;
            float s[T::V], turn[T::V];
            load_constant(s, w, c);
            if (rope) {
                load_constant(turn, rope, token * head_dim + c % head_dim);
                rotate(g[k], turn, -1.0f);
            }
            for (int j = 0; j < T::V; j++) {
                xn[k][j] *= scale;
                if (live) acc[0][k][j] += g[k][j] * xn[k][j];
                g[k][j] *= s[j];
                sum[0] += g[k][j] * xn[k][j];
            }
        }
        group_sum<T::G>(sum);
        sum[0] /= dim;
        for (int k = 0; k < T::K; k++) {
            if (T::column(k) >= dim || !live) continue;
            for (int j = 0; j < T::V; j++) g[k][j] = scale * (g[k][j] - xn[k][j] * sum[0]);
            store(dx + base + T::column(k), g[k]);
        }
    }
    block_line<T>(lines + blockIdx.x * (size_t)dim, acc, dim);
}

static void rmsnorm_rope_backward(act *dx, float *dw, const act *dy, const act *x, const float *rstd, const float *w,
                                  const float *rope, int B, size_t n, int dim, int heads) {
    size_t rows = (size_t)B * n;
    bool wide = aligned(8, (size_t)(dim / heads), dx, dy, x, w, rope);
    unsigned chunks = 0;
    float *lines = NULL;
    if (!rows) return;
    BY_TYPE(BY_TILE(8, wide, dim, chunks = blocks(rows, T::SHARE);
                    lines = (float *)scratch((size_t)chunks * dim * sizeof(float));
                    LAUNCH((rmsnorm_rope_backward_kernel<A, T>), chunks, T::THREADS, (A *)dx, lines, (const A *)dy,
                           (const A *)x, rstd, w, rope, rows, n, dim, dim / heads)));
    PerSample d = {dw, 0}, none = {NULL, 0};
    if (dw) fold(d, none, lines, (int)chunks, 1, dim, 1);
}

// ============================================================================================================
// 7. HiF8
// ============================================================================================================
// m = max |x|. A maximum does not depend on the order of its terms, so here an atomic is fine: non-negative floats
// compare as their bits do. fmaxf passes over a NaN.
template <typename A> static __global__ void absmax_kernel(float *m, const A *x, size_t n) {
    __shared__ float part[8];
    float best = 0.0f, v[8];
    for (size_t i = 8 * thread_index(); i < n; i += 8 * (size_t)gridDim.x * blockDim.x) {
        load8(v, x, i, n);
        for (int j = 0; j < 8; j++) best = fmaxf(best, fabsf(v[j]));
    }
    for (int step = 16; step; step /= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, step));
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = best;
    __syncthreads();
    for (int w = 0; w < 8; w++) best = fmaxf(best, part[w]);
    if (threadIdx.x == 0) atomicMax((int *)m, __float_as_int(best));
}

static void absmax(float *m, const act *x, size_t n) {
    unsigned grid = blocks(n, 8 * 256), most = 8 * (unsigned)gpu.card.multiProcessorCount;
    zero(m, sizeof(float));
    if (n) BY_TYPE(LAUNCH(absmax_kernel<A>, grid < most ? grid : most, 256, m, (const A *)x, n));
}

// y = hif8(x·k)/k, k = s/max|x|: a read, a write. The maximum never leaves the card. The division is a product with 1/k
// and one correction by the exact remainder, which rounds as the division does in a third of its instructions.
template <typename A> static __global__ void hif8_kernel(A *y, const A *x, float s, const float *m, size_t n) {
    size_t i = 8 * thread_index();
    float v[8], k = hif8_scale(s, __ldg(m)), inverse = 1.0f / k;
    load8(v, x, i, n);
    for (int j = 0; j < 8; j++) {
        float q = hif8_round(v[j] * k), y0 = q * inverse;
        v[j] = isinf(q) ? q : fmaf(fmaf(-y0, k, q), inverse, y0);
    }
    store8(y, v, i, n);
}

static void hif8_tensor(act *y, const act *x, size_t n, float s, const float *m) {
    BY_TYPE(LAUNCH8(hif8_kernel<A>, n, (A *)y, (const A *)x, s, m));
}

// ============================================================================================================
// 8. Pixels and words
// ============================================================================================================
// Where feature f of token t of sample b lies in a latent [B, C, T, 2H, 2W] (the op's comment gives the two orders).
static __device__ size_t pixel(size_t b, size_t t, int f, int C, int T, int H, int W, bool channels_first) {
    int c = channels_first ? f / 4 : f % C, patch = channels_first ? f % 4 : f / C;
    size_t w = t % W, h = t / W % H, frame = t / ((size_t)W * H);
    return (((b * C + c) * T + frame) * (2 * H) + 2 * h + patch / 2) * (2 * W) + 2 * w + patch % 2;
}

template <typename A> static __global__ void
latent_to_rows_kernel(A *rows, const float *x, int B, int C, int T, int H, int W, size_t first, size_t n,
                      bool channels_first) {
    size_t i = thread_index(), width = 4 * (size_t)C;
    if (i < B * n * width)
        rows[i] = (A)x[pixel(i / width / n, first + i / width % n, (int)(i % width), C, T, H, W, channels_first)];
}

static void latent_to_rows(act *rows, const float *x, int B, int C, int T, int H, int W, size_t first, size_t n,
                           bool channels_first) {
    size_t count = (size_t)B * n * 4 * C;
    if (count) BY_TYPE(LAUNCH(latent_to_rows_kernel, blocks(count, 256), 256, (A *)rows, x, B, C, T, H, W, first, n,
                              channels_first));
}

template <typename A> static __global__ void
rows_to_latent_kernel(float *x, const A *rows, int B, int C, int T, int H, int W, bool channels_first) {
    size_t i = thread_index(), width = 4 * (size_t)C, n = (size_t)T * H * W;
    if (i < B * n * width)
        x[pixel(i / width / n, i / width % n, (int)(i % width), C, T, H, W, channels_first)] = (float)rows[i];
}

static void rows_to_latent(float *x, const act *rows, int B, int C, int T, int H, int W, bool channels_first) {
    size_t count = (size_t)B * T * H * W * 4 * C;
    if (count) BY_TYPE(LAUNCH(rows_to_latent_kernel, blocks(count, 256), 256, x, (const A *)rows, B, C, T, H, W,
                              channels_first));
}

template <typename A> static __global__ void
embed_kernel(A *y, const float *table, const float *pos, const int *ids, size_t rows, int L, int dim) {
    size_t i = thread_index(), r = i / dim, c = i % dim;
    if (r >= rows) return;
    int id = ids[r];
    y[i] = (A)(id < 0 ? 0.0f : table[(size_t)id * dim + c] + pos[r % L * dim + c]);
}

static void embed_forward(act *y, const float *table, const float *pos, const int *ids, size_t rows, int L, int dim) {
    if (rows) BY_TYPE(LAUNCH(embed_kernel<A>, blocks(rows * dim, 256), 256, (A *)y, table, pos, ids, rows, L, dim));
}

// Block per word: it looks through all ids for its own, in order. A small vocabulary needs nothing better.
template <typename A> static __global__ void
embed_backward_kernel(float *dtable, const A *dy, const int *ids, size_t rows, int dim) {
    int word = blockIdx.x, c = blockIdx.y * blockDim.x + threadIdx.x;
    float total = 0.0f;
    if (c >= dim) return;
#pragma unroll 8
    for (size_t r = 0; r < rows; r++)
        if (__ldg(ids + r) == word) total += (float)dy[r * dim + c];
    dtable[(size_t)word * dim + c] += total;
}

static void embed_backward(float *dtable, const act *dy, const int *ids, size_t rows, int vocab, int dim) {
    dim3 grid(vocab, blocks((size_t)dim, 128));
    if (rows) BY_TYPE(LAUNCH(embed_backward_kernel, grid, 128, dtable, (const A *)dy, ids, rows, dim));
}

// ============================================================================================================
// 9. Elementwise on float, reductions to the host, optimizer
// ============================================================================================================
static __global__ void lincomb_kernel(float *y, float a, const float *x, float b, const float *z, size_t n) {
    size_t i = 8 * thread_index();
    float u[8], v[8] = {};
    load8(u, x, i, n);
    if (z) load8(v, z, i, n);
    for (int j = 0; j < 8; j++) u[j] = z ? a * u[j] + b * v[j] : a * u[j];
    store8(y, u, i, n);
}

static void lincomb(float *y, float a, const float *x, float b, const float *z, size_t n) {
    LAUNCH8(lincomb_kernel, n, y, a, x, b, z);
}

// sums[block] = Σ (x − z)² of the block's share, in double; slope·(x − z) goes to dout where it is wanted.
static __global__ void square_kernel(double *sums, float *dout, const float *x, const float *z, size_t n, float slope) {
    __shared__ double part[8];
    double total = 0.0;
    for (size_t i = 8 * thread_index(); i < n; i += 8 * (size_t)gridDim.x * blockDim.x) {
        float u[8], v[8] = {};
        load8(u, x, i, n);
        if (z) load8(v, z, i, n);
        for (int j = 0; j < 8; j++) {
            float d = u[j] - v[j];
            total += (double)d * (double)d;
            u[j] = slope * d;
        }
        if (dout) store8(dout, u, i, n);
    }
    for (int step = 16; step; step /= 2) total += __shfl_xor_sync(~0u, total, step);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < 8; w++) total += part[w];
        sums[blockIdx.x] = total;
    }
}

// The host adds up the blocks' sums in order: this is where a training step waits for the card.
static double squares(float *dout, const float *x, const float *z, size_t n, float slope) {
    unsigned grid = blocks(n, 8 * 256);
    double total = 0.0;
    if (!n) return 0.0;
    grid = grid < (unsigned)SUM_BLOCKS ? grid : (unsigned)SUM_BLOCKS;
    LAUNCH(square_kernel, grid, 256, gpu.sums, dout, x, z, n, slope);
    download(gpu.sums_host, gpu.sums, grid * sizeof(double));
    for (unsigned i = 0; i < grid; i++) total += gpu.sums_host[i];
    return total;
}

static double sum_squares(const float *x, const float *z, size_t n) { return squares(NULL, x, z, n, 0.0f); }

static double mse(float *dout, const float *out, const float *target, size_t n) {
    return n ? squares(dout, out, target, n, (float)(2.0 / (double)n)) / (double)n : 0.0;
}

// Reads w, m, v, g, ema, writes all but g: 36 bytes per parameter in one pass.
typedef struct {
    float gscale, lr, beta1, new1, beta2, new2, eps, decay, ema_decay, fresh, correct1, correct2;
} AdamStep;
static __global__ void adamw_kernel(float *w, float *m, float *v, float *ema, const float *g, AdamStep s, size_t n) {
    size_t i = 8 * thread_index();
    float w8[8], m8[8], v8[8], g8[8], e8[8] = {};
    load8(w8, w, i, n);
    load8(m8, m, i, n);
    load8(v8, v, i, n);
    load8(g8, g, i, n);
    if (ema) load8(e8, ema, i, n);
    for (int j = 0; j < 8; j++) {
        float d = g8[j] * s.gscale;
        m8[j] = s.beta1 * m8[j] + s.new1 * d;
        v8[j] = s.beta2 * v8[j] + s.new2 * d * d;
        w8[j] -= s.lr * s.decay * w8[j];
        w8[j] -= s.lr * (m8[j] / s.correct1) / (sqrtf(v8[j] / s.correct2) + s.eps);
        e8[j] = s.ema_decay * e8[j] + s.fresh * w8[j];
    }
    store8(w, w8, i, n);
    store8(m, m8, i, n);
    store8(v, v8, i, n);
    if (ema) store8(ema, e8, i, n);
}

static void adamw(float *w, float *m, float *v, float *ema, const float *g, size_t n, float gscale, float lr,
                  double beta1, double beta2, float eps, float weight_decay, double ema_decay, int t) {
    AdamStep s = {gscale, lr, (float)beta1, (float)(1 - beta1), (float)beta2, (float)(1 - beta2), eps, weight_decay,
                  (float)ema_decay, (float)(1 - ema_decay), (float)(1 - pow(beta1, t)), (float)(1 - pow(beta2, t))};
    LAUNCH8(adamw_kernel, n, w, m, v, ema, g, s);
}

// ============================================================================================================
// 10. Attention
// ============================================================================================================
// ============================================================================================================
// Attention: o = softmax(q·k^T/√head_dim)·v inside each sequence
// ============================================================================================================
// Three forward kernels compute the same function (attention_forward_bf16 picks one when it runs), two the gradients:
//   attention_simple    any type, any head_dim to 256: float arithmetic, the parity kernel and the last resort
//   attention_mma       bf16, head_dim 16, 32, 64, 128, from sm_80 on: mma.sync tensor-core instructions
//   attention_hopper    bf16, head_dim 128, sm_90a: wgmma on tiles that TMA brings, one warpgroup loads, three compute
//   attention_backward_simple, attention_backward_mma: each in two passes of one kernel (rows stay, columns pass by)
// All of them walk the keys in blocks and keep, for each query row, a maximum m, a sum l = Σ exp(score − m) and the
// unnormalised output Σ exp(score − m)·v; when m grows, l and the output are scaled down (blockwise softmax).
// The two tensor-core kernels walk the blocks from the last to the first: only the last can be partial, so masking
// stays out of the main loop.

typedef __nv_bfloat16 bf16;
#define UNROLL _Pragma("unroll")
#define LOG2_OF_E 1.4426950408889634f

// q, o [q rows, heads·head_dim]; k, v [k rows, ..]; lse [q rows, heads] or NULL; sequence s has the query rows
// [q_start[s], q_start[s+1]) and the key rows [k_start[s], k_start[s+1]), each possibly none.
template <typename T> struct Forward {
    T *o;
    float *lse;
    const T *q, *k, *v;
    const int *q_start, *k_start;
    int heads, head_dim;
};

__device__ static inline float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ static inline uint32_t pack_bf16(float low, float high) {      // two bf16 in one register
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
__device__ static inline uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ static inline int tiles_of(int n, int tile) { return (n + tile - 1) / tile; }

// Tensor-core accumulators, mma.sync and wgmma alike: of a 16-row slab lane t of a warp holds, for every 8 columns j,
// d[4j], d[4j+1] = row t/4, columns 8j + 2(t%4) + {0,1}, and d[4j+2], d[4j+3] = the same columns of row t/4 + 8.
// Packed in pairs they are at once the A operand of the next product (P·V): no shuffle, no shared memory.

// One block of scores s (N columns, two rows per thread): s becomes P = exp2((s − m)·c); m, l updated; alpha is what
// earlier sums must be multiplied with. Lazy: m may stay up to 2^8 behind the true maximum (alpha = 1); P ≤ 256 is as
// exact in bf16 as P ≤ 1, and o and l share m, so nothing is lost; nearly all rescaling of o disappears.
// Four chains per row for max and sum: a scheduler holds few warps here, so latency must be hidden inside a thread.
template <int N>
__device__ static inline void softmax_block(float (&s)[N / 2], float (&m)[2], float (&l)[2], float (&alpha)[2],
                                            float c) {
    UNROLL for (int r = 0; r < 2; r++) {
        float x[4] = { s[2 * r], s[2 * r + 1], s[4 + 2 * r], s[5 + 2 * r] };
        UNROLL for (int i = 8; i < N / 2; i += 8) {
            x[0] = fmaxf(x[0], s[i + 2 * r]);     x[1] = fmaxf(x[1], s[i + 2 * r + 1]);
            x[2] = fmaxf(x[2], s[i + 4 + 2 * r]); x[3] = fmaxf(x[3], s[i + 5 + 2 * r]);
        }
        float top = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));                  // a row lies in the 4 lanes of a quad
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        bool stay = (top - m[r]) * c <= 8.f;
        alpha[r] = stay ? 1.f : ex2((m[r] - top) * c);
        m[r] = stay ? m[r] : top;
        float shift = -m[r] * c, sum[4] = { 0, 0, 0, 0 };
        UNROLL for (int i = 0; i < N / 2; i += 8)
            UNROLL for (int e = 0; e < 4; e++) {
                float &v = s[i + (e >> 1) * 4 + 2 * r + (e & 1)];
                v = ex2(fmaf(v, c, shift));
                sum[e] += v;
            }
        l[r] = l[r] * alpha[r] + ((sum[0] + sum[1]) + (sum[2] + sum[3]));   // this lane's part of the row's sum
    }
}

__device__ static inline float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// Store rows `row` and `row + 8` of accumulators d as bf16, row r times scale[r], where row < rows. The quad
// transposes its 4 x 4 words first, so that a lane writes 16 bytes and a quad 64 in a row instead of 4 and 16.
template <int HD>
__device__ static inline void store_rows(bf16 *out, size_t stride, int row, int rows, const float (&d)[HD / 2],
                                         float scale0, float scale1) {
    int t = threadIdx.x % 4;
    UNROLL for (int r = 0; r < 2; r++) {
        bf16 *to = out + (size_t)(row + 8 * r) * stride;
        float scale = r ? scale1 : scale0;
        bool in = row + 8 * r < rows;
        if constexpr (HD % 32 == 0) {
            UNROLL for (int g = 0; g < HD / 32; g++) {
                uint32_t w[4];
                UNROLL for (int i = 0; i < 4; i++)
                    w[i] = pack_bf16(d[16 * g + 4 * i + 2 * r] * scale, d[16 * g + 4 * i + 2 * r + 1] * scale);
                UNROLL for (int bit = 1; bit <= 2; bit *= 2)            // swap off-diagonal words, then pairs
                    UNROLL for (int i = 0; i < 4; i++)
                        if (!(i & bit)) {
                            uint32_t x = __shfl_xor_sync(~0u, t & bit ? w[i] : w[i + bit], bit);
                            if (t & bit) w[i] = x; else w[i + bit] = x;
                        }
                if (in) *(uint4 *)(to + 32 * g + 8 * t) = make_uint4(w[0], w[1], w[2], w[3]);
            }
        } else {
            UNROLL for (int i = 2 * r; i < HD / 2; i += 4)
                if (in) *(uint32_t *)(to + 2 * (i - 2 * r) + 2 * t) = pack_bf16(d[i] * scale, d[i + 1] * scale);
        }
    }
}
// lse of rows `row` and `row + 8`, where row < end: the maximum and the sum are known to all four lanes of the quad.
__device__ static inline void store_lse(const Forward<bf16> &a, const float (&l)[2], const float (&m)[2], float c,
                                        int row, int end, int head) {
    if (a.lse && threadIdx.x % 4 == 0)
        for (int r = 0; r < 2; r++)
            if (row + 8 * r < end)
                a.lse[(size_t)(row + 8 * r) * a.heads + head] =
                    l[r] > 0 ? (m[r] * c + log2f(l[r])) / LOG2_OF_E : -INFINITY;
}

// ---- any type, any head_dim: float arithmetic -------------------------------------------------------------------
// 256 threads as 16 x 16: thread (ty, tx) has rows ty + 16i of a tile and columns tx + 16j of scores, features
// tx + 16f of the output. Rows in shared memory are one float longer than their data: 16 rows' columns hit 16 banks.

__device__ static inline float load_float(float x) { return x; }
__device__ static inline float load_float(bf16 x) { return __bfloat162float(x); }
__device__ static inline void store_float(float *p, float x) { *p = x; }
__device__ static inline void store_float(bf16 *p, float x) { *p = __float2bfloat16(x); }

// to[ROWS][W + 1] = `valid` rows of x (features beyond head_dim, rows beyond valid: 0).
template <typename T, int ROWS, int W>
__device__ static void load_rows(float *to, const T *x, size_t stride, int valid, int head_dim) {
    for (int i = threadIdx.x; i < ROWS * W; i += 256) {
        int r = i / W, f = i % W;
        to[r * (W + 1) + f] = r < valid && f < head_dim ? load_float(x[r * stride + f]) : 0;
    }
}
// s[i][j] = row ty + 16i of a · row tx + 16j of b.
template <int I, int J, int W>
__device__ static inline void dot_rows(float (&s)[I][J], const float *a, const float *b, int ty, int tx) {
    for (int i = 0; i < I; i++) for (int j = 0; j < J; j++) s[i][j] = 0;
    for (int f = 0; f < W; f++)
        UNROLL for (int i = 0; i < I; i++)
            UNROLL for (int j = 0; j < J; j++)
                s[i][j] = fmaf(a[(ty + 16 * i) * (W + 1) + f], b[(tx + 16 * j) * (W + 1) + f], s[i][j]);
}
// o[i][f] += Σ_n p[row ty + 16i][n] · b[n][tx + 16f] over 32 columns n.
template <int I, int F>
__device__ static inline void add_weighted(float (&o)[I][F], const float *p, const float *b, int ty, int tx) {
    for (int n = 0; n < 32; n++)
        UNROLL for (int i = 0; i < I; i++)
            UNROLL for (int f = 0; f < F; f++)
                o[i][f] = fmaf(p[(ty + 16 * i) * 33 + n], b[n * (16 * F + 1) + tx + 16 * f], o[i][f]);
}

// Tiles of `rows` rows, tiles of 32 columns, and one of P.
template <int F> constexpr int simple_shared_bytes(int row_tiles, int rows, int column_tiles) {
    return 4 * ((row_tiles * rows + 32 * column_tiles) * (16 * F + 1) + rows * 33);
}

// Grid: (query tiles of 64, heads, sequences). F = head_dim/16, rounded up to a power of two.
template <typename T, int F>
__global__ void __launch_bounds__(256) attention_simple(const Forward<T> a) {
    enum { W = 16 * F };
    extern __shared__ float tile[];
    float *q_tile = tile, *kv_tile = q_tile + 64 * (W + 1), *p_tile = kv_tile + 32 * (W + 1);
    int sequence = blockIdx.z, q0 = a.q_start[sequence] + blockIdx.x * 64, q_rows = a.q_start[sequence + 1] - q0;
    if (q_rows <= 0) return;
    int k0 = a.k_start[sequence], k_rows = a.k_start[sequence + 1] - k0, head_dim = a.head_dim;
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    size_t width = (size_t)a.heads * head_dim, at = (size_t)blockIdx.y * head_dim;
    float scale = rsqrtf((float)head_dim), acc[4][F] = {}, m[4], l[4], s[4][2];
    for (int i = 0; i < 4; i++) { m[i] = -INFINITY; l[i] = 0; }
    load_rows<T, 64, W>(q_tile, a.q + q0 * width + at, width, q_rows, head_dim);
    for (int j = 0; j < k_rows; j += 32) {
        load_rows<T, 32, W>(kv_tile, a.k + (k0 + j) * width + at, width, k_rows - j, head_dim);
        __syncthreads();
        dot_rows<4, 2, W>(s, q_tile, kv_tile, ty, tx);
        UNROLL for (int i = 0; i < 4; i++) {
            float top = m[i];
            for (int n = 0; n < 2; n++) {
                s[i][n] = j + tx + 16 * n < k_rows ? s[i][n] * scale : -INFINITY;
                top = fmaxf(top, s[i][n]);
            }
            for (int bit = 8; bit; bit /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, bit));
            float alpha = expf(m[i] - top), sum = 0;
            for (int n = 0; n < 2; n++) {
                float p = expf(s[i][n] - top);
                p_tile[(ty + 16 * i) * 33 + tx + 16 * n] = p;
                sum += p;
            }
            for (int bit = 8; bit; bit /= 2) sum += __shfl_xor_sync(~0u, sum, bit);
            m[i] = top;
            l[i] = l[i] * alpha + sum;
            for (int f = 0; f < F; f++) acc[i][f] *= alpha;
        }
        __syncthreads();
        load_rows<T, 32, W>(kv_tile, a.v + (k0 + j) * width + at, width, k_rows - j, head_dim);
        __syncthreads();
        add_weighted<4, F>(acc, p_tile, kv_tile, ty, tx);
        __syncthreads();
    }
    UNROLL for (int i = 0; i < 4; i++) {
        int row = ty + 16 * i;
        if (row >= q_rows) continue;
        UNROLL for (int f = 0; f < F; f++)
            if (tx + 16 * f < head_dim)
                store_float(a.o + (q0 + row) * width + at + tx + 16 * f, l[i] > 0 ? acc[i][f] / l[i] : 0);
        if (a.lse && tx == 0)
            a.lse[(size_t)(q0 + row) * a.heads + blockIdx.y] = l[i] > 0 ? m[i] + logf(l[i]) : -INFINITY;
    }
}

// Backward. With P = exp(scores − lse), D = Σ_features do·o (of a query):
//   dv = P^T·do,  dP = do·v^T,  dS = P·(dP − D),  dq = dS·k/√head_dim,  dk = dS^T·q/√head_dim.
// One kernel does it twice: rows stay, columns stream past. KEYS = false: rows are queries (a1 = q, a2 = do), columns
// are keys (b1 = k, b2 = v), out1 = dq. KEYS = true: rows are keys (a1 = k, a2 = v), columns are queries (b1 = q,
// b2 = do), out1 = dk, out2 = dv. Each gradient is summed by one block in a fixed order: no atomics, the same bytes
// every time; the price is that scores and dP are computed twice (7 products instead of 5).
// With few keys and many queries (text!) the second pass has too few rows to fill the card: the queries are cut into
// `chunks`, each writes float sums of its own (partial[chunk][k rows, width], dk's, then dv's), attention_fold adds.
template <typename T> struct Backward {
    T *out1, *out2;                          // [rows, width]
    float *partial;                          // NULL: one chunk
    const T *a1, *a2, *b1, *b2;
    const float *lse, *delta;                // [q rows, heads]
    const int *row_start, *column_start;
    int heads, head_dim, chunks, chunk_columns;
    size_t rows;                             // of all sequences
};

// What a block works on: grid (row tiles, heads, sequences x chunks).
struct BackwardTile { int head, chunk, row0, rows, column0, columns; };
template <typename T> __device__ static inline BackwardTile backward_tile(const Backward<T> &b, int tile_rows) {
    BackwardTile t;
    int sequence = blockIdx.z / b.chunks;
    t.head = blockIdx.y;
    t.chunk = blockIdx.z % b.chunks;
    t.row0 = b.row_start[sequence] + blockIdx.x * tile_rows;
    t.rows = b.row_start[sequence + 1] - t.row0;
    int first = t.chunk * b.chunk_columns, all = b.column_start[sequence + 1] - b.column_start[sequence];
    t.column0 = b.column_start[sequence] + first;
    t.columns = max(0, min(b.chunk_columns, all - first));
    return t;
}

template <int F> constexpr int backward_simple_rows = F > 8 ? 32 : 64;
template <typename T, int F, bool KEYS>
__global__ void __launch_bounds__(256) attention_backward_simple(const Backward<T> b) {
    enum { W = 16 * F, I = backward_simple_rows<F> / 16 };
    extern __shared__ float tile[];
    float *a1 = tile, *a2 = a1 + 16 * I * (W + 1), *b1 = a2 + 16 * I * (W + 1), *b2 = b1 + 32 * (W + 1);
    float *p_tile = b2 + 32 * (W + 1);
    BackwardTile t = backward_tile(b, 16 * I);
    if (t.rows <= 0) return;
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    size_t width = (size_t)b.heads * b.head_dim, at = (size_t)t.head * b.head_dim;
    float scale = rsqrtf((float)b.head_dim), s[I][2], dp[I][2], acc1[I][F] = {}, acc2[I][F] = {};
    load_rows<T, 16 * I, W>(a1, b.a1 + t.row0 * width + at, width, t.rows, b.head_dim);
    load_rows<T, 16 * I, W>(a2, b.a2 + t.row0 * width + at, width, t.rows, b.head_dim);
    for (int j = 0; j < t.columns; j += 32) {
        load_rows<T, 32, W>(b1, b.b1 + (t.column0 + j) * width + at, width, t.columns - j, b.head_dim);
        load_rows<T, 32, W>(b2, b.b2 + (t.column0 + j) * width + at, width, t.columns - j, b.head_dim);
        __syncthreads();
        dot_rows<I, 2, W>(s, a1, b1, ty, tx);
        dot_rows<I, 2, W>(dp, a2, b2, ty, tx);
        for (int i = 0; i < I; i++)
            for (int n = 0; n < 2; n++) {
                int row = ty + 16 * i, column = tx + 16 * n;
                bool in = row < t.rows && j + column < t.columns;
                size_t query = (size_t)(KEYS ? t.column0 + j + column : t.row0 + row) * b.heads + t.head;
                s[i][n] = in ? expf(s[i][n] * scale - b.lse[query]) : 0;
                dp[i][n] = in ? s[i][n] * (dp[i][n] - b.delta[query]) * scale : 0;
            }
        for (int pass = KEYS ? 0 : 1; pass < 2; pass++) {               // P·b2, then dS·b1
            for (int i = 0; i < I; i++)
                for (int n = 0; n < 2; n++) p_tile[(ty + 16 * i) * 33 + tx + 16 * n] = pass ? dp[i][n] : s[i][n];
            __syncthreads();
            if (pass) add_weighted<I, F>(acc1, p_tile, b1, ty, tx);
            else      add_weighted<I, F>(acc2, p_tile, b2, ty, tx);
            __syncthreads();
        }
    }
    UNROLL for (int i = 0; i < I; i++)
        UNROLL for (int f = 0; f < F; f++)
            if (ty + 16 * i < t.rows && tx + 16 * f < b.head_dim) {
                size_t to = (t.row0 + ty + 16 * i) * width + at + tx + 16 * f;
                if (KEYS && b.partial) {
                    b.partial[t.chunk * b.rows * width + to] = acc1[i][f];
                    b.partial[(b.chunks + t.chunk) * b.rows * width + to] = acc2[i][f];
                } else {
                    store_float(b.out1 + to, acc1[i][f]);
                    if (KEYS) store_float(b.out2 + to, acc2[i][f]);
                }
            }
}

// delta[q row, head] = Σ_features do·o: `lanes` neighbouring threads for each, V features at a time.
template <typename T, int V>
__global__ void attention_delta(float *delta, const T *dout, const T *o, size_t n, int head_dim, int lanes) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / lanes, row = i < n ? i : n - 1;
    float sum = 0, a[V], b[V];
    for (int f = threadIdx.x % lanes * V; f < head_dim; f += lanes * V) {
        load(a, dout + row * head_dim + f);
        load(b, o + row * head_dim + f);
        for (int j = 0; j < V; j++) sum += a[j] * b[j];
    }
    for (int bit = lanes / 2; bit; bit /= 2) sum += __shfl_xor_sync(~0u, sum, bit);
    if (i < n && threadIdx.x % lanes == 0) delta[i] = sum;
}

// dk, dv [n] = Σ_chunks partial, in the order of the chunks.
template <typename T>
__global__ void attention_fold(T *dk, T *dv, const float *partial, int chunks, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float a = 0, b = 0;
    for (int c = 0; c < chunks; c++) { a += partial[c * n + i]; b += partial[(chunks + c) * n + i]; }
    store_float(dk + i, a);
    store_float(dv + i, b);
}

// ---- bf16 from sm_80 on: mma.sync ---------------------------------------------------------------------------------
// Tiles in shared memory [rows][HD], brought by cp.async (16 bytes a piece, past the registers). Chunk c (16 bytes) of
// row r lies at c ^ (r mod 8), or the like for short rows: ldmatrix reads one chunk of 8 rows, all in different banks.

template <int HD> __device__ static inline uint32_t chunk_at(int r, int c) {
    constexpr int C = HD / 8, ROWS = C < 8 ? 8 / C : 1;                 // chunks in a row, rows in 128 bytes
    return (r * C + (c ^ (r / ROWS % (C < 8 ? C : 8)))) * 16;
}
// Start the copy of ROWS rows by 128 threads, 2048 bytes at a time; rows from `valid` on become 0.
template <int HD, int ROWS>
__device__ static inline void copy_rows(uint32_t to, const bf16 *x, size_t stride, int valid) {
    int r = threadIdx.x / (HD / 8), c = threadIdx.x % (HD / 8);
    to += chunk_at<HD>(r, c);                                           // the swizzle repeats every 2048 bytes or less
    x += 8 * c;
    #pragma unroll 2
    for (int n = 0; n < ROWS * HD / 1024; n++, r += 1024 / HD)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :: "r"(to + 2048 * n), "l"(x + (r < valid ? r * stride : 0)), "r"(r < valid ? 16 : 0) : "memory");
}
__device__ static inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ static inline void copy_wait()   { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// Four 8 x 8 matrices at once; lanes 8i..8i+7 give the addresses of the rows of matrix i, x[i] is the lane's part.
template <bool TRANSPOSED> __device__ static inline void load_matrices(uint32_t (&x)[4], uint32_t address) {
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}
// d[16 x 8] += a[16 x 16]·b[16 x 8]
__device__ static inline void mma(float *d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// s[M slabs of 16][N] = rows row.. of tile a · (N rows of tile b)^T, summed over HD features. Each piece of b that is
// read serves M slabs: with M = 2 a warp computes twice as much for the same traffic from shared memory.
// The next 16 features are 2 chunks on: 32·f xor-ed into the address, which leaves the swizzle as it is.
template <int HD, int M, int N>
__device__ static inline void products_rows(float (&s)[M][N / 2], uint32_t a, int row, uint32_t b) {
    int lane = threadIdx.x % 32;
    // Matrices of a: rows 0-7, 8-15, then the next chunk. Of b: rows 0-7 of both chunks, then rows 8-15, so that each
    // operand B is two neighbouring registers (otherwise the compiler moves registers 130 times a block).
    a += chunk_at<HD>(row + lane % 16, lane / 16);
    b += chunk_at<HD>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    UNROLL for (int i = 0; i < M; i++)
        UNROLL for (int j = 0; j < N / 2; j++) s[i][j] = 0;
    UNROLL for (int f = 0; f < HD / 16; f++) {
        uint32_t x[M][4], y[4];
        UNROLL for (int i = 0; i < M; i++) load_matrices<false>(x[i], (a ^ 32 * f) + i * 16 * HD * 2);
        UNROLL for (int n = 0; n < N / 16; n++) {
            load_matrices<false>(y, (b ^ 32 * f) + n * 16 * HD * 2);
            UNROLL for (int i = 0; i < M; i++) {
                mma(&s[i][8 * n], x[i], y[0], y[1]);
                mma(&s[i][8 * n + 4], x[i], y[2], y[3]);
            }
        }
    }
}
// o[M slabs of 16][HD] += p[M slabs][N] · tile b[N][HD], p straight from the accumulators of products_rows.
template <int HD, int M, int N>
__device__ static inline void products_columns(float (&o)[M][HD / 2], const float (&p)[M][N / 2], uint32_t b) {
    int lane = threadIdx.x % 32;
    b += chunk_at<HD>(lane % 16, lane / 16);
    UNROLL for (int n = 0; n < N / 16; n++) {
        uint32_t x[M][4], y[4];
        UNROLL for (int i = 0; i < M; i++)
            UNROLL for (int e = 0; e < 4; e++) x[i][e] = pack_bf16(p[i][8 * n + 2 * e], p[i][8 * n + 2 * e + 1]);
        UNROLL for (int f = 0; f < HD / 16; f++) {
            load_matrices<true>(y, (b ^ 32 * f) + n * 16 * HD * 2);
            UNROLL for (int i = 0; i < M; i++) {
                mma(&o[i][8 * f], x[i], y[0], y[1]);
                mma(&o[i][8 * f + 4], x[i], y[2], y[3]);
            }
        }
    }
}

// Grid: (query tiles of 128, heads, sequences), 4 warps of 32 queries, blocks of 64 keys, 2 stages of K and V: the
// next block is copied while this one is computed. Q stays in shared memory: its fragments would take 64 registers
// where o takes 128.
template <int HD>
__global__ void __launch_bounds__(128, 2) attention_mma(const Forward<bf16> a) {
    extern __shared__ __align__(128) char raw[];
    enum { BN = 64, KV_BYTES = BN * HD * 2 };
    int sequence = blockIdx.z, q0 = a.q_start[sequence] + blockIdx.x * 128, q_rows = a.q_start[sequence + 1] - q0;
    if (q_rows <= 0) return;
    int k0 = a.k_start[sequence], k_rows = a.k_start[sequence + 1] - k0, blocks = tiles_of(k_rows, BN);
    size_t width = (size_t)a.heads * HD, at = (size_t)blockIdx.y * HD;
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 32;           // the warp's first row of the tile
    uint32_t q_tile = shared_address(raw), k_tile = q_tile + 128 * HD * 2, v_tile = k_tile + 2 * KV_BYTES;
    const float c = LOG2_OF_E / sqrtf((float)HD);
    float s[2][BN / 2], acc[2][HD / 2], m[2][2], l[2][2], alpha[2][2];
    UNROLL for (int i = 0; i < 2; i++) {
        m[i][0] = m[i][1] = -INFINITY;
        l[i][0] = l[i][1] = 0;
        UNROLL for (int e = 0; e < HD / 2; e++) acc[i][e] = 0;
    }
    int first = (blocks - 1) * BN, left = k_rows - first;               // the last block, taken first, has `left` keys
    const bf16 *k = a.k + (k0 + first) * width + at, *v = a.v + (k0 + first) * width + at;
    copy_rows<HD, 128>(q_tile, a.q + q0 * width + at, width, q_rows);
    if (blocks > 0) {
        copy_rows<HD, BN>(k_tile, k, width, left);
        copy_rows<HD, BN>(v_tile, v, width, left);
    }
    copy_commit();
    uint32_t stage = 0;
    auto block = [&](bool masked, bool more) {
        copy_wait();                                                    // K and V of this block are here,
        __syncthreads();                                                // for all; all are done with the block before
        if (more) {
            copy_rows<HD, BN>(k_tile + (stage ^ KV_BYTES), k -= BN * width, width, INT_MAX);
            copy_rows<HD, BN>(v_tile + (stage ^ KV_BYTES), v -= BN * width, width, INT_MAX);
        }
        copy_commit();
        products_rows<HD, 2, BN>(s, q_tile, row, k_tile + stage);
        UNROLL for (int i = 0; i < 2; i++) {
            if (masked)
                UNROLL for (int e = 0; e < BN / 2; e++)
                    if (e / 4 * 8 + e % 2 + 2 * (lane % 4) >= left) s[i][e] = -INFINITY;
            softmax_block<BN>(s[i], m[i], l[i], alpha[i], c);
        }
        if (__any_sync(~0u, alpha[0][0] * alpha[0][1] * alpha[1][0] * alpha[1][1] != 1.f))        // each is at most 1
            UNROLL for (int i = 0; i < 2; i++)
                UNROLL for (int e = 0; e < HD / 2; e++) acc[i][e] *= alpha[i][e / 2 % 2];
        products_columns<HD, 2, BN>(acc, s, v_tile + stage);
        stage ^= KV_BYTES;
    };
    if (blocks > 0) block(true, blocks > 1);
    for (int j = blocks - 2; j >= 0; j--) block(false, j > 0);
    copy_wait();
    UNROLL for (int i = 0; i < 2; i++) {
        int r0 = row + 16 * i + lane / 4;
        float sum[2] = { quad_sum(l[i][0]), quad_sum(l[i][1]) };
        store_rows<HD>(a.o + q0 * width + at, width, r0, q_rows, acc[i], sum[0] > 0 ? 1 / sum[0] : 0,
                       sum[1] > 0 ? 1 / sum[1] : 0);
        store_lse(a, sum, m[i], c, q0 + r0, q0 + q_rows, blockIdx.y);
    }
}

// The backward of above (see attention_backward_simple for what rows and columns are): 4 warps of M slabs of 16 rows,
// BN columns at a time in 2 stages. P and dS go from accumulators to operands in registers; nothing returns to shared
// memory. M and BN are what the registers hold: two sums for keys, one for queries, and the scores and dP.
template <int HD, bool KEYS> struct BackwardShape {
    enum { M = KEYS && HD == 128 ? 1 : 2, ROWS = 64 * M, BN = HD == 128 || (KEYS && HD == 64) ? 32 : 64,
           A_BYTES = ROWS * HD * 2, B_BYTES = BN * HD * 2,
           SHARED = 2 * A_BYTES + 4 * B_BYTES + 4 * BN * 4 };         // rows, 2 stages of columns, lse and delta
};
template <int HD, bool KEYS>
__global__ void __launch_bounds__(128, 2) attention_backward_mma(const Backward<bf16> b) {
    extern __shared__ __align__(128) char raw[];
    typedef BackwardShape<HD, KEYS> Shape;
    enum { M = Shape::M, BN = Shape::BN, A_BYTES = Shape::A_BYTES, B_BYTES = Shape::B_BYTES };
    BackwardTile t = backward_tile(b, Shape::ROWS);
    if (t.rows <= 0) return;
    uint32_t a1 = shared_address(raw), a2 = a1 + A_BYTES, b1 = a2 + A_BYTES, b2 = b1 + 2 * B_BYTES;
    float *column_lse = (float *)(raw + 2 * A_BYTES + 4 * B_BYTES), *column_delta = column_lse + 2 * BN;  // 2 stages
    size_t width = (size_t)b.heads * HD, at = (size_t)t.head * HD;
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * M;
    const float scale = rsqrtf((float)HD), c = LOG2_OF_E * scale;
    auto copy_columns = [&](int j) {                                    // block j into stage j % 2
        if (j * BN < t.columns) {
            size_t from = (size_t)(t.column0 + j * BN) * width + at;
            int valid = t.columns - j * BN;
            copy_rows<HD, BN>(b1 + j % 2 * B_BYTES, b.b1 + from, width, valid);
            copy_rows<HD, BN>(b2 + j % 2 * B_BYTES, b.b2 + from, width, valid);
            if (KEYS && threadIdx.x < BN) {                             // lse = inf beyond the end: P = 0
                bool in = (int)threadIdx.x < valid;
                size_t query = (size_t)(t.column0 + j * BN + threadIdx.x) * b.heads + t.head;
                column_lse[j % 2 * BN + threadIdx.x] = in ? b.lse[query] * LOG2_OF_E : INFINITY;
                column_delta[j % 2 * BN + threadIdx.x] = in ? b.delta[query] : 0;
            }
        }
        copy_commit();
    };
    float row_lse[M][2], row_delta[M][2], s[M][BN / 2], dp[M][BN / 2], acc1[M][HD / 2], acc2[M][HD / 2];
    UNROLL for (int i = 0; i < M; i++) {
        UNROLL for (int e = 0; e < HD / 2; e++) acc1[i][e] = acc2[i][e] = 0;
        UNROLL for (int r = 0; r < 2; r++) {
            int my = row + 16 * i + lane / 4 + 8 * r;
            bool in = !KEYS && my < t.rows;
            size_t query = (size_t)(t.row0 + my) * b.heads + t.head;
            row_lse[i][r] = in ? b.lse[query] * LOG2_OF_E : INFINITY;
            row_delta[i][r] = in ? b.delta[query] : 0;
        }
    }
    copy_rows<HD, Shape::ROWS>(a1, b.a1 + t.row0 * width + at, width, t.rows);
    copy_rows<HD, Shape::ROWS>(a2, b.a2 + t.row0 * width + at, width, t.rows);
    copy_columns(0);
    for (int j = 0; j * BN < t.columns; j++) {
        copy_wait();
        __syncthreads();
        copy_columns(j + 1);
        if (row >= t.rows) continue;                                    // a warp without rows only copies
        uint32_t stage = j % 2 * B_BYTES;
        products_rows<HD, M, BN>(s, a1, row, b1 + stage);
        products_rows<HD, M, BN>(dp, a2, row, b2 + stage);
        int left = t.columns - j * BN - 2 * (lane % 4), my = j % 2 * BN + 2 * (lane % 4);
        UNROLL for (int i = 0; i < M; i++)
            UNROLL for (int e = 0; e < BN / 2; e++) {
                int column = e / 4 * 8 + e % 2, r = e / 2 % 2;
                float p = ex2(s[i][e] * c - (KEYS ? column_lse[my + column] : row_lse[i][r]));
                if (!KEYS && column >= left) p = 0;
                s[i][e] = p;
                dp[i][e] = p * (dp[i][e] - (KEYS ? column_delta[my + column] : row_delta[i][r]));
            }
        if (KEYS) products_columns<HD, M, BN>(acc2, s, b2 + stage);
        products_columns<HD, M, BN>(acc1, dp, b1 + stage);
    }
    copy_wait();
    row += lane / 4;
    UNROLL for (int i = 0; i < M; i++, row += 16)
        if (KEYS && b.partial) {
            float *to = b.partial + ((size_t)t.chunk * b.rows + t.row0 + row) * width + at + 2 * (lane % 4);
            UNROLL for (int e = 0; e < HD / 2; e += 2)
                if (row + e / 2 % 2 * 8 < t.rows) {
                    float *x = to + e / 2 % 2 * 8 * width + e / 4 * 8, *y = x + b.chunks * b.rows * width;
                    *(float2 *)x = make_float2(acc1[i][e] * scale, acc1[i][e + 1] * scale);
                    *(float2 *)y = make_float2(acc2[i][e], acc2[i][e + 1]);
                }
        } else {
            store_rows<HD>(b.out1 + t.row0 * width + at, width, row, t.rows, acc1[i], scale, scale);
            if (KEYS) store_rows<HD>(b.out2 + t.row0 * width + at, width, row, t.rows, acc2[i], 1, 1);
        }
}

// ---- Hopper forward: wgmma + TMA ---------------------------------------------------------------------------------
// A block of 512 threads keeps one SM: warpgroup 0 is the producer (one thread starts all copies), warpgroups 1..3
// compute, each on 64 query rows of its own (192 together), on the same blocks of BN keys. K and V have 4 stages each.
// Within a warpgroup the products of one key block overlap the softmax of another: q·k^T of block j and P·V of block
// j − 1 are both in the tensor core's queue while the exponentials of block j are computed.
// A tile in shared memory: rows of 128 bytes (64 numbers), so head_dim 128 is two panels [rows][64], one after the
// other; 16-byte chunk c of row r lies at c ^ (r % 8), which TMA writes and wgmma reads (128-byte swizzle).

enum { HOPPER_WG = 3, HOPPER_ROWS = 64 * HOPPER_WG, HOPPER_STAGES = 4, HOPPER_THREADS = 128 * (HOPPER_WG + 1),
       HOPPER_Q_BYTES = 64 * 256 };
template <int BN> constexpr int hopper_shared_bytes() {            // tiles, barriers, room to align to 1024
    return HOPPER_WG * HOPPER_Q_BYTES + 2 * HOPPER_STAGES * BN * 256 + 8 * (4 * HOPPER_STAGES + 2 * HOPPER_WG) + 1024;
}

__device__ static inline void barrier_init(uint32_t bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(bar), "r"(count) : "memory");
}
__device__ static inline void barrier_arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(bar) : "memory");
}
__device__ static inline void barrier_wait(uint32_t bar, int phase) {       // until the phase of that parity is over
    asm volatile("{ .reg .pred p;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra done;\n bra again;\n done: }" :: "r"(bar), "r"(phase) : "memory");
}
// Start the copy of a box [2 panels][rows][64] from rows `row`.. of one head; `bar` counts its bytes.
__device__ static inline void tma_load(uint32_t to, const CUtensorMap *map, int row, int head, uint32_t bar,
                                       int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(bar), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %2, %4}], [%5];"
                 :: "r"(to), "l"(map), "r"(0), "r"(row), "r"(head), "r"(bar) : "memory");
}

__device__ static inline void wgmma_fence()  { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ static inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Wait until at most `pending` groups run. The accumulators pass through, so that no use of them moves above the wait.
template <int N> __device__ static inline void wgmma_wait(float (&d)[N], int pending) {
    if (pending) asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    else         asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    UNROLL for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i]) :: "memory");
}
// What wgmma is told of a tile: its address, the step from panel to panel (used where the columns are not the inner
// dimension: V), the step from 8 rows to the next 8 (1024), 128-byte swizzle; all in units of 16 bytes.
__device__ static inline uint64_t wgmma_tile(uint32_t address, int panel_bytes) {
    return (uint64_t)((address & 0x3FFFF) >> 4) | (uint64_t)(panel_bytes >> 4) << 16 | (uint64_t)(1024 >> 4) << 32
         | 1ull << 62;
}
#define D8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
                 "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define R32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26," \
            "%27,%28,%29,%30,%31"
#define R40 R32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define R64 R40 ",%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
// d[64 x BN] (= or +=) a[64 x 16]·b[BN x 16]^T, both in shared memory.
__device__ static inline void wgmma_qk(float (&d)[40], uint64_t a, uint64_t b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %42, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {" R40 "}, %40, %41, p, 1, 1, 0, 0; }"
                 : D8(d, 0), D8(d, 8), D8(d, 16), D8(d, 24), D8(d, 32) : "l"(a), "l"(b), "r"(add));
}
__device__ static inline void wgmma_qk(float (&d)[32], uint64_t a, uint64_t b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" R32 "}, %32, %33, p, 1, 1, 0, 0; }"
                 : D8(d, 0), D8(d, 8), D8(d, 16), D8(d, 24) : "l"(a), "l"(b), "r"(add));
}
// d[64 x 128] (= or +=) a[64 x 16]·b[16 x 128], a in registers, b in shared memory.
__device__ static inline void wgmma_pv(float (&d)[64], const uint32_t *a, uint64_t b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{" R64 "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1; }"
                 : D8(d, 0), D8(d, 8), D8(d, 16), D8(d, 24), D8(d, 32), D8(d, 40), D8(d, 48), D8(d, 56)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
// The products of a whole block: 8 steps of 16 features (4 in each panel), BN/16 steps of 16 keys.
template <int BN> __device__ static inline void products_qk(float (&s)[BN / 2], uint64_t q, uint64_t k) {
    wgmma_fence();
    UNROLL for (int i = 0; i < 8; i++)
        wgmma_qk(s, q + i / 4 * (64 * 128 / 16) + i % 4 * 2, k + i / 4 * (BN * 128 / 16) + i % 4 * 2, i > 0);
    wgmma_commit();
}
template <int BN>
__device__ static inline void products_pv(float (&o)[64], const uint32_t (&p)[BN / 4], uint64_t v, int add) {
    wgmma_fence();
    UNROLL for (int i = 0; i < BN / 16; i++) wgmma_pv(o, p + 4 * i, v + i * (16 * 128 / 16), i > 0 ? 1 : add);
    wgmma_commit();
}

// Tile number -> head, sequence, rows. Query tiles run fastest, then sequences, then heads: the blocks of all SMs work
// on the same K and V at the same time, which therefore come from L2. A tile past its sequence's end holds the next
// sequence's rows: such keys get P = 0, such queries are not stored (so every row of K and V must be finite).
struct HopperTile { int head, q0, q_rows, k0, k_rows; };
__device__ static inline HopperTile hopper_tile(int tile, int tiles_per_head, const Forward<bf16> &a) {
    HopperTile t;
    t.head = tile / tiles_per_head;
    tile -= t.head * tiles_per_head;
    int s = 0, q0 = a.q_start[0], q1 = a.q_start[1];
    for (int n; tile >= (n = tiles_of(q1 - q0, HOPPER_ROWS)); tile -= n) { s++; q0 = q1; q1 = a.q_start[s + 1]; }
    t.q0 = q0 + tile * HOPPER_ROWS;
    t.q_rows = q1 - t.q0;                                               // rows from q0 to the sequence's end
    t.k0 = a.k_start[s];
    t.k_rows = a.k_start[s + 1] - t.k0;
    return t;
}

template <int BN>
__global__ void __launch_bounds__(HOPPER_THREADS, 1)
attention_hopper(const Forward<bf16> a, int tiles, int tiles_per_head, const __grid_constant__ CUtensorMap map_q,
                 const __grid_constant__ CUtensorMap map_k, const __grid_constant__ CUtensorMap map_v) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ char raw[];
    enum { S = HOPPER_STAGES, KV_BYTES = BN * 256 };
    uint32_t q_tile = (shared_address(raw) + 1023) & ~1023u, k_tile = q_tile + HOPPER_WG * HOPPER_Q_BYTES;
    uint32_t v_tile = k_tile + S * KV_BYTES, bar = v_tile + S * KV_BYTES;
    // full: the copy has landed. empty: all readers are done. Q's are per warpgroup: each goes to its next tile alone.
    uint32_t k_full = bar, k_empty = bar + 8 * S, v_full = bar + 16 * S, v_empty = bar + 24 * S;
    uint32_t q_full = bar + 32 * S, q_empty = q_full + 8 * HOPPER_WG;
    if (threadIdx.x == 0) {
        for (int i = 0; i < S; i++) {
            barrier_init(k_full + 8 * i, 1);  barrier_init(k_empty + 8 * i, 4 * HOPPER_WG);     // one arrival per warp
            barrier_init(v_full + 8 * i, 1);  barrier_init(v_empty + 8 * i, 4 * HOPPER_WG);
        }
        for (int i = 0; i < HOPPER_WG; i++) { barrier_init(q_full + 8 * i, 1); barrier_init(q_empty + 8 * i, 4); }
        asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async;" ::: "memory");
    }
    __syncthreads();
    int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);

    if (warpgroup == 0) {                                               // ---- producer
        asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
        if (threadIdx.x != 0) return;
        int stage = 0, phase = 0, q_phase = 0;
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            HopperTile t = hopper_tile(tile, tiles_per_head, a);
            int blocks = tiles_of(t.k_rows, BN);
            for (int j = blocks - 1; j >= 0; j--) {
                barrier_wait(k_empty + 8 * stage, phase ^ 1);           // a fresh barrier lets parity 1 through
                tma_load(k_tile + stage * KV_BYTES, &map_k, t.k0 + j * BN, t.head, k_full + 8 * stage, KV_BYTES);
                if (j == blocks - 1) {
                    for (int w = 0; w < HOPPER_WG; w++) {
                        barrier_wait(q_empty + 8 * w, q_phase ^ 1);
                        tma_load(q_tile + w * HOPPER_Q_BYTES, &map_q, t.q0 + 64 * w, t.head, q_full + 8 * w,
                                 HOPPER_Q_BYTES);
                    }
                    q_phase ^= 1;
                }
                barrier_wait(v_empty + 8 * stage, phase ^ 1);
                tma_load(v_tile + stage * KV_BYTES, &map_v, t.k0 + j * BN, t.head, v_full + 8 * stage, KV_BYTES);
                if (++stage == S) { stage = 0; phase ^= 1; }
            }
        }
        return;
    }
    // ---- consumers
    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    int wg = warpgroup - 1, lane = threadIdx.x % 32, row = 64 * wg + threadIdx.x % 128 / 32 * 16 + lane / 4;
    const float c = LOG2_OF_E * 0.08838834764831845f;                   // log2(e)/√128
    uint64_t q = wgmma_tile(q_tile + wg * HOPPER_Q_BYTES, 0), k0 = wgmma_tile(k_tile, 0);
    uint64_t v0 = wgmma_tile(v_tile, BN * 128);
    int ks = 0, k_phase = 0, vs = 0, v_phase = 0, q_phase = 0;          // V runs one block behind K
    float s[BN / 2], acc[64];
    uint32_t p[BN / 4];
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        HopperTile t = hopper_tile(tile, tiles_per_head, a);
        int blocks = tiles_of(t.k_rows, BN);
        float m[2] = { -INFINITY, -INFINITY }, l[2] = { 0, 0 }, alpha[2];
        auto k_done = [&] {
            if (lane == 0) barrier_arrive(k_empty + 8 * ks);
            if (++ks == S) { ks = 0; k_phase ^= 1; }
        };
        auto v_done = [&] {
            if (lane == 0) barrier_arrive(v_empty + 8 * vs);
            if (++vs == S) { vs = 0; v_phase ^= 1; }
        };
        auto pack = [&] {
            UNROLL for (int i = 0; i < BN / 4; i++) p[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
        };
        if (blocks > 0) {
            barrier_wait(q_full + 8 * wg, q_phase);                     // the last block: it may be partial
            q_phase ^= 1;
            barrier_wait(k_full + 8 * ks, k_phase);
            products_qk<BN>(s, q, k0 + ks * (KV_BYTES / 16));
            wgmma_wait(s, 0);
            k_done();
            if (blocks == 1 && lane == 0) barrier_arrive(q_empty + 8 * wg);
            int left = t.k_rows - (blocks - 1) * BN - 2 * (lane % 4);
            if (left < BN)
                UNROLL for (int i = 0; i < BN / 2; i++) if (i / 4 * 8 + i % 2 >= left) s[i] = -INFINITY;
            softmax_block<BN>(s, m, l, alpha, c);
            pack();
            for (int j = blocks - 2; j >= 0; j--) {
                barrier_wait(k_full + 8 * ks, k_phase);
                products_qk<BN>(s, q, k0 + ks * (KV_BYTES / 16));
                barrier_wait(v_full + 8 * vs, v_phase);
                products_pv<BN>(acc, p, v0 + vs * (KV_BYTES / 16), j < blocks - 2);
                wgmma_wait(s, 1);                                       // scores of block j are there, P·V still runs
                k_done();
                if (j == 0 && lane == 0) barrier_arrive(q_empty + 8 * wg);
                softmax_block<BN>(s, m, l, alpha, c);
                wgmma_wait(acc, 0);
                v_done();
                pack();
                if (__any_sync(~0u, alpha[0] != 1.f || alpha[1] != 1.f))
                    UNROLL for (int i = 0; i < 64; i++) acc[i] *= alpha[i / 2 % 2];
            }
            barrier_wait(v_full + 8 * vs, v_phase);
            products_pv<BN>(acc, p, v0 + vs * (KV_BYTES / 16), blocks > 1);
            wgmma_wait(acc, 0);
            v_done();
        } else {
            UNROLL for (int i = 0; i < 64; i++) acc[i] = 0;             // a query without keys gives 0
        }
        l[0] = quad_sum(l[0]);
        l[1] = quad_sum(l[1]);
        size_t width = (size_t)a.heads * 128;
        store_rows<128>(a.o + t.q0 * width + t.head * 128, width, row, t.q_rows, acc, l[0] > 0 ? 1 / l[0] : 0,
                        l[1] > 0 ? 1 / l[1] : 0);
        store_lse(a, l, m, c, t.q0 + row, t.q0 + t.q_rows, t.head);
    }
#endif
}

// The map of x[rows, heads·128] whose boxes are [2 panels][box_rows][64 features]; rows past the end arrive as zeros.
static CUtensorMap tensor_map(const bf16 *x, int rows, int heads, int box_rows) {
    static decltype(&cuTensorMapEncodeTiled) encode = NULL;          // from the driver by the runtime: no -lcuda
    cudaDriverEntryPointQueryResult found;
    if (!encode)
        cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void **)&encode, 12000,
                                                    cudaEnableDefault, &found));
    CUtensorMap map;
    cuuint64_t dims[4] = { 64, (cuuint64_t)rows, 2, (cuuint64_t)heads };
    cuuint64_t strides[3] = { (cuuint64_t)heads * 256, 128, 256 };      // bytes; dims[0] is dense
    cuuint32_t box[4] = { 64, (cuuint32_t)box_rows, 2, 1 }, step[4] = { 1, 1, 1, 1 };
    CUresult e = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, (void *)x, dims, strides, box, step,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (e != CUDA_SUCCESS) die("attention: no tensor map for %d rows, %d heads (error %d)", rows, heads, (int)e);
    return map;
}

template <int BN> static void hopper_launch(const Forward<bf16> &a, const Sequences *s, cudaStream_t stream) {
    int per_head = 0, device, sms, bytes = hopper_shared_bytes<BN>(), q_rows = s->q[s->count], k_rows = s->k[s->count];
    for (int i = 0; i < s->count; i++) per_head += (s->q[i + 1] - s->q[i] + HOPPER_ROWS - 1) / HOPPER_ROWS;
    cuda_check(cudaGetDevice(&device));
    cuda_check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
    cuda_check(cudaFuncSetAttribute(attention_hopper<BN>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    int tiles = per_head * a.heads;
    attention_hopper<BN><<<tiles < sms ? tiles : sms, HOPPER_THREADS, bytes, stream>>>(a, tiles, per_head,
        tensor_map(a.q, q_rows, a.heads, 64), tensor_map(a.k, k_rows, a.heads, BN),
        tensor_map(a.v, k_rows, a.heads, BN));
    cuda_check(cudaGetLastError());
}

// Whether the card is a Hopper and this program holds the kernel for it (built for plain sm_90 its body is empty).
static bool hopper_usable(void) {
    static int usable = -1;
    if (usable < 0) {
        int device, major, minor;
        cudaFuncAttributes kernel;
        cuda_check(cudaGetDevice(&device));
        cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
        cuda_check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
        cuda_check(cudaFuncGetAttributes(&kernel, attention_hopper<80>));
        usable = major == 9 && minor == 0 && kernel.numRegs >= 100;
    }
    return usable;
}

// ---- which kernel, and its launch ---------------------------------------------------------------------------------
// Tensors start at multiples of 16 bytes. Everything is put on `stream`; nothing waits.

static int longest(const int *start, int count) {
    int n = 0;
    for (int i = 0; i < count; i++) if (start[i + 1] - start[i] > n) n = start[i + 1] - start[i];
    return n;
}
template <typename Kernel> static void allow_shared(Kernel kernel, int bytes) {    // above 48 KB a kernel must ask
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

template <typename T, int F> static void simple_launch(const Forward<T> &a, const Sequences *s, cudaStream_t stream) {
    const int bytes = simple_shared_bytes<F>(1, 64, 1);
    allow_shared(attention_simple<T, F>, bytes);
    dim3 grid((longest(s->q, s->count) + 63) / 64, a.heads, s->count);
    attention_simple<T, F><<<grid, 256, bytes, stream>>>(a);
    cuda_check(cudaGetLastError());
}
template <int HD> static void mma_launch(const Forward<bf16> &a, const Sequences *s, cudaStream_t stream) {
    const int bytes = (128 + 4 * 64) * HD * 2;                          // Q, 2 stages of K and V
    allow_shared(attention_mma<HD>, bytes);
    dim3 grid((longest(s->q, s->count) + 127) / 128, a.heads, s->count);
    attention_mma<HD><<<grid, 128, bytes, stream>>>(a);
    cuda_check(cudaGetLastError());
}
// portable: do not take the Hopper kernel even where it could run (to compare them).
template <typename T>
static void forward_launch(const Forward<T> &a, const Sequences *s, cudaStream_t stream, bool portable) {
    if (!s->count || !s->q[s->count]) return;
    int hd = a.head_dim;
    if (hd > 256) die("attention: head_dim %d; this backend has kernels up to 256", hd);
    auto launch = hd <= 16 ? simple_launch<T, 1> : hd <= 32 ? simple_launch<T, 2> : hd <= 64 ? simple_launch<T, 4>
                : hd <= 128 ? simple_launch<T, 8> : simple_launch<T, 16>;
    if constexpr (sizeof(T) == 2) {
        launch = hd == 128 ? mma_launch<128> : hd == 64 ? mma_launch<64> : hd == 32 ? mma_launch<32>
               : hd == 16 ? mma_launch<16> : launch;
        if (hd == 128 && s->k[s->count] && !portable && hopper_usable()) {
            double padded80 = 0, padded64 = 0;                          // scores with blocks of 80 and of 64 keys;
            for (int i = 0; i < s->count; i++) {                        // 80 are 1.05 to 1.15 x as fast per score
                double queries = s->q[i + 1] - s->q[i];
                padded80 += queries * ((s->k[i + 1] - s->k[i] + 79) / 80 * 80);
                padded64 += queries * ((s->k[i + 1] - s->k[i] + 63) / 64 * 64);
            }
            launch = padded64 * 1.05 < padded80 ? hopper_launch<64> : hopper_launch<80>;
        }
    }
    launch(a, s, stream);
}
static void attention_forward_f32(float *o, float *lse, const float *q, const float *k, const float *v,
                                  const Sequences *s, int heads, int head_dim, cudaStream_t stream) {
    forward_launch(Forward<float>{ o, lse, q, k, v, s->q_device, s->k_device, heads, head_dim }, s, stream, true);
}
static void attention_forward_bf16(bf16 *o, float *lse, const bf16 *q, const bf16 *k, const bf16 *v,
                                   const Sequences *s, int heads, int head_dim, cudaStream_t stream,
                                   bool portable = false) {
    forward_launch(Forward<bf16>{ o, lse, q, k, v, s->q_device, s->k_device, heads, head_dim }, s, stream, portable);
}

template <typename T, int F, bool KEYS>
static void backward_simple_launch(const Backward<T> &b, int longest_row, int count, cudaStream_t stream) {
    const int rows = backward_simple_rows<F>, bytes = simple_shared_bytes<F>(2, rows, 2);
    allow_shared(attention_backward_simple<T, F, KEYS>, bytes);
    dim3 grid((longest_row + rows - 1) / rows, b.heads, count * b.chunks);
    attention_backward_simple<T, F, KEYS><<<grid, 256, bytes, stream>>>(b);
    cuda_check(cudaGetLastError());
}
template <int HD, bool KEYS>
static void backward_mma_launch(const Backward<bf16> &b, int longest_row, int count, cudaStream_t stream) {
    const int rows = BackwardShape<HD, KEYS>::ROWS, bytes = BackwardShape<HD, KEYS>::SHARED;
    allow_shared(attention_backward_mma<HD, KEYS>, bytes);
    dim3 grid((longest_row + rows - 1) / rows, b.heads, count * b.chunks);
    attention_backward_mma<HD, KEYS><<<grid, 128, bytes, stream>>>(b);
    cuda_check(cudaGetLastError());
}
template <bool KEYS, typename T>
static void backward_launch(const Backward<T> &b, int longest_row, int count, cudaStream_t stream) {
    int hd = b.head_dim;
    auto launch = hd <= 16 ? backward_simple_launch<T, 1, KEYS> : hd <= 32 ? backward_simple_launch<T, 2, KEYS>
                : hd <= 64 ? backward_simple_launch<T, 4, KEYS> : hd <= 128 ? backward_simple_launch<T, 8, KEYS>
                : backward_simple_launch<T, 16, KEYS>;
    if constexpr (sizeof(T) == 2)
        launch = hd == 128 ? backward_mma_launch<128, KEYS> : hd == 64 ? backward_mma_launch<64, KEYS>
               : hd == 32 ? backward_mma_launch<32, KEYS> : hd == 16 ? backward_mma_launch<16, KEYS> : launch;
    launch(b, longest_row, count, stream);
}

template <typename T>
static void attention_backward_any(T *dq, T *dk, T *dv, const T *dout, const T *q, const T *k, const T *v, const T *o,
                                   const float *lse, const Sequences *s, int heads, int head_dim,
                                   cudaStream_t stream) {
    if (!s->count) return;
    if (head_dim > 256) die("attention: head_dim %d; this backend has kernels up to 256", head_dim);
    size_t width = (size_t)heads * head_dim, q_rows = s->q[s->count], k_rows = s->k[s->count], n = q_rows * heads;
    int long_q = longest(s->q, s->count), long_k = longest(s->k, s->count), blocks = 0, chunks = 1;
    // Chunks of queries so that dk and dv are summed by about 1,000 blocks: a number that does not depend on the card.
    for (int i = 0; i < s->count; i++) blocks += (s->k[i + 1] - s->k[i] + 63) / 64 * heads;
    if (blocks) chunks = (1024 + blocks - 1) / blocks;
    if (chunks > (long_q + 255) / 256) chunks = (long_q + 255) / 256;
    if (chunks < 1) chunks = 1;
    int chunk_queries = ((long_q + chunks - 1) / chunks + 63) / 64 * 64;
    size_t delta_floats = (n + 3) / 4 * 4;
    float *delta = (float *)scratch((delta_floats + (chunks > 1 ? 2 * chunks * k_rows * width : 0)) * sizeof(float));
    float *partial = chunks > 1 ? delta + delta_floats : NULL;
    if (q_rows) {
        int lanes = head_dim / 8;                                            // 16 bytes of bf16 each, where that fits
        if (head_dim % 8 == 0 && (lanes & (lanes - 1)) == 0 && lanes <= 32 && aligned(8, 8, dout, o))
            LAUNCH((attention_delta<T, 8>), (unsigned)((n * lanes + 255) / 256), 256, delta, dout, o, n, head_dim,
                   lanes);
        else
            LAUNCH((attention_delta<T, 1>), (unsigned)((n + 7) / 8), 256, delta, dout, o, n, head_dim, 32);
        Backward<T> b = { dq, NULL, NULL, q, dout, k, v, lse, delta, s->q_device, s->k_device, heads, head_dim, 1,
                          INT_MAX, q_rows };
        backward_launch<false>(b, long_q, s->count, stream);
    }
    if (k_rows) {
        Backward<T> b = { dk, dv, partial, k, v, q, dout, lse, delta, s->k_device, s->q_device, heads, head_dim,
                          chunks, chunk_queries, k_rows };
        backward_launch<true>(b, long_k, s->count, stream);
        unsigned folds = (unsigned)((k_rows * width + 255) / 256);
        if (partial) attention_fold<<<folds, 256, 0, stream>>>(dk, dv, partial, chunks, k_rows * width);
    }
    cuda_check(cudaGetLastError());
}
static void attention_backward_f32(float *dq, float *dk, float *dv, const float *dout, const float *q, const float *k,
                                   const float *v, const float *o, const float *lse, const Sequences *s, int heads,
                                   int head_dim, cudaStream_t stream) {
    attention_backward_any(dq, dk, dv, dout, q, k, v, o, lse, s, heads, head_dim, stream);
}
static void attention_backward_bf16(bf16 *dq, bf16 *dk, bf16 *dv, const bf16 *dout, const bf16 *q, const bf16 *k,
                                    const bf16 *v, const bf16 *o, const float *lse, const Sequences *s, int heads,
                                    int head_dim, cudaStream_t stream) {
    attention_backward_any(dq, dk, dv, dout, q, k, v, o, lse, s, heads, head_dim, stream);
}

static void attention_forward(act *o, float *lse, const act *q, const act *k, const act *v, const Sequences *s,
                              int heads, int head_dim) {
    if (gpu.half)
        attention_forward_bf16((bf16 *)o, lse, (const bf16 *)q, (const bf16 *)k, (const bf16 *)v, s, heads, head_dim,
                               gpu.stream);
    else
        attention_forward_f32((float *)o, lse, (const float *)q, (const float *)k, (const float *)v, s, heads, head_dim,
                              gpu.stream);
}

static void attention_backward(act *dq, act *dk, act *dv, const act *dout, const act *q, const act *k, const act *v,
                               const act *o, const float *lse, const Sequences *s, int heads, int head_dim) {
    if (gpu.half)
        attention_backward_bf16((bf16 *)dq, (bf16 *)dk, (bf16 *)dv, (const bf16 *)dout, (const bf16 *)q,
                                (const bf16 *)k, (const bf16 *)v, (const bf16 *)o, lse, s, heads, head_dim,
                                gpu.stream);
    else
        attention_backward_f32((float *)dq, (float *)dk, (float *)dv, (const float *)dout, (const float *)q,
                               (const float *)k, (const float *)v, (const float *)o, lse, s, heads, head_dim,
                               gpu.stream);
}
