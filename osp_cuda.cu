// osp_cuda.cu: the operations of osp.c on one NVIDIA GPU, compute capability 8.0 or newer.
//
// Nothing of the model is written twice: this file includes osp.c, which leaves out its CPU bodies. Every op
// puts its work on one stream and returns at once; only what gives a number to the host waits.
//
// What an op costs. A matrix product is cuBLASLt's business. Attention has its own section. All the rest
// does a few operations per number it reads, so its time is the bytes it moves over the card's 2 to 5 TB/s,
// and writing it well means four habits, which every kernel below follows:
//   - fuse, so that a row is read once, held in registers while it is needed, and written once (the comments
//     count the bytes per element: 4 for float, a for act, which is 2 or 4);
//   - let a thread move 4 or 8 neighbours at a time, neighbours in the warp side by side, all loads first;
//   - give a row as many threads as keep it in registers: 16 for a row of 128 numbers, 256 for one of 5,120;
//   - sum in a fixed order: a block sums its own rows into a line of a table, a second kernel adds up the
//     lines (fold_kernel). No atomic float addition anywhere: the same input gives the same bytes always.
#define OSP_CUDA
#include <stddef.h>
// osp.c's all_to_all calls this one.
static void device_all_to_all(void *to, const void *from, const int *receive, const int *send, bool same,
                              size_t row_bytes, int R, int purpose);
#include "osp.c"
#include <cublasLt.h>
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#ifdef OSP_NCCL
#include <nccl.h>
#endif
#if CUDART_VERSION < 12050
#error "osp_cuda.cu needs the CUDA Toolkit 12.5 or newer"
#endif
typedef __nv_bfloat16 bf16;

// ==========================================================================================================
// The card
// ==========================================================================================================
enum { STAGES = 4, STAGE_BYTES = 4 << 20, SUM_BLOCKS = 1024, PLANS = 256, WORKSPACE_BYTES = 64 << 20 };

// A matrix product that was asked for before: what identifies it, and what cuBLASLt made of it.
typedef struct {                             // without padding: compared as bytes
    size_t m, n, k;
    int in, out, transpose_a, transpose_b, epilogue, align_a, align_b, align_d;
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
    char *scratch;                           // partial sums; grows, never shrinks
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
        die("cuBLASLt: %s in %.60s (osp_cuda.cu:%d); the run cannot go on", cublasLtGetStatusString(s), what,
            line);
}

#define LAUNCH(kernel, grid, block, ...) do { \
    kernel<<<grid, block, 0, gpu.stream>>>(__VA_ARGS__); \
    cuda_check(cudaGetLastError()); \
} while (0)

// The same with `bytes` of shared memory, which a kernel must ask for above 48 KB.
#define LAUNCH_SHARED(kernel, grid, block, bytes, ...) do { \
    allow_shared(kernel, bytes); \
    kernel<<<grid, block, bytes, gpu.stream>>>(__VA_ARGS__); \
    cuda_check(cudaGetLastError()); \
} while (0)

template <typename K> static void allow_shared(K kernel, int bytes) {
    if ((size_t)bytes > gpu.card.sharedMemPerBlockOptin)
        die("%s has %zu bytes of shared memory for a block, %d are needed: use a smaller head_dim",
            gpu.card.name, gpu.card.sharedMemPerBlockOptin, bytes);
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// The statement with A = the type of an act.
#define BY_TYPE(...) \
    do { if (gpu.half) { typedef bf16 A; __VA_ARGS__; } else { typedef float A; __VA_ARGS__; } } while (0)

// How many blocks of per_block cover n.
template <typename N> EVERYWHERE N blocks(N n, int per_block) { return (n + per_block - 1) / per_block; }

// Memory of the card as it comes, or one line that says how much is missing.
static void *card_memory(size_t bytes) {
    void *p = NULL;
    size_t room = 0, total = 0;
    if (cudaMalloc(&p, bytes ? bytes : 16) == cudaSuccess) return p;
    cudaMemGetInfo(&room, &total);
    die("the GPU has no room for %zu bytes (%zu of %zu free): use a smaller size or batch", bytes, room,
        total);
}

static __global__ void empty_kernel(void) {}         // any kernel shows whether the program is for this card

// Takes card `rank` (mod their number) or says why it cannot. dtype: "f32" (parity) or "bf16" (speed; NULL).
static void device_start(const char *dtype, int rank) {
    int cards = 0, driver = 0;
    cudaDeviceProp *c = &gpu.card;
    cudaFuncAttributes found;
    cudaError_t e = cudaGetDeviceCount(&cards);
    cudaDriverGetVersion(&driver);
    gpu.half = !dtype || !strcmp(dtype, "bf16");
    if (!gpu.half && strcmp(dtype, "f32")) die("arithmetic on a GPU is f32 or bf16, not %s", dtype);
    if (driver == 0) die("no NVIDIA driver here: run the CPU program osp instead");
    if (e == cudaErrorInsufficientDriver)
        die("the NVIDIA driver is too old (CUDA %d.%d; built with %d.%d): update it, or build with its CUDA",
            driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    if (e != cudaSuccess || cards < 1)
        die("no usable NVIDIA GPU here (%s): run the CPU program osp instead", cudaGetErrorString(e));
    cuda_check(cudaSetDevice(rank % cards));
    cuda_check(cudaGetDeviceProperties(c, rank % cards));
    if (c->major < 8)
        die("%s has compute capability %d.%d: 8.0 or newer is needed", c->name, c->major, c->minor);
    if ((e = cudaFuncGetAttributes(&found, empty_kernel)) != cudaSuccess)
        die("built for other cards than %s (%s): make -B osp_cuda ARCH=%d%d%s", c->name,
            cudaGetErrorString(e), c->major, c->minor, c->major == 9 ? "a" : "");
    gpu.shared = ranks_here > cards;
    cuda_check(cudaStreamCreateWithFlags(&gpu.stream, cudaStreamNonBlocking));
    blas_check(cublasLtCreate(&gpu.blas));
    gpu.workspace = card_memory(WORKSPACE_BYTES);
    gpu.sums = (double *)card_memory(SUM_BLOCKS * sizeof(double));
    cuda_check(cudaMallocHost((void **)&gpu.sums_host, SUM_BLOCKS * sizeof(double)));
    for (int i = 0; i < STAGES; i++) {
        cuda_check(cudaMallocHost(&gpu.stage[i].host, STAGE_BYTES));
        cuda_check(cudaEventCreateWithFlags(&gpu.stage[i].free, cudaEventDisableTiming));
    }
}

static void wait_device(void) { cuda_check(cudaStreamSynchronize(gpu.stream)); }

// Memory for the length of one op. The next op may take the same bytes: ops follow each other on one stream.
static void *scratch(size_t bytes) {
    if (bytes > gpu.scratch_bytes) {
        cuda_check(cudaFree(gpu.scratch));   // waits for whoever still reads it
        gpu.scratch_bytes = bytes + bytes / 4 + (1 << 20);
        gpu.scratch = (char *)card_memory(gpu.scratch_bytes);
    }
    return gpu.scratch;
}

// ==========================================================================================================
// Memory
// ==========================================================================================================
static void *device_alloc(size_t bytes) {
    void *p = card_memory(bytes);
    zero(p, bytes);
    return p;
}

static void device_free(void *p) { cuda_check(cudaFree(p)); }
static double device_memory(void) {                       // of the cards of this machine's ranks
    size_t unused, all;
    cuda_check(cudaMemGetInfo(&unused, &all));
    return (double)all * (gpu.shared ? 1 : ranks_here);
}
static size_t act_size(void) { return gpu.half ? sizeof(bf16) : sizeof(float); }
static cudaDataType_t act_type(void) { return gpu.half ? CUDA_R_16BF : CUDA_R_32F; }

static void zero(void *p, size_t bytes) {
    if (bytes) cuda_check(cudaMemsetAsync(p, 0, bytes, gpu.stream));
}

static void copy(void *dst, const void *src, size_t bytes) {
    if (bytes) cuda_check(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, gpu.stream));
}

// Through a ring of pinned buffers: the caller may reuse src at once, and the card does not wait.
static void upload(void *dst, const void *src, size_t bytes) {
    for (size_t done = 0, part; done < bytes; done += part) {
        int i = (int)(gpu.turn++ % STAGES);
        void *host = gpu.stage[i].host;
        part = bytes - done < STAGE_BYTES ? bytes - done : (size_t)STAGE_BYTES;
        cuda_check(cudaEventSynchronize(gpu.stage[i].free));
        memcpy(host, (const char *)src + done, part);
        cuda_check(cudaMemcpyAsync((char *)dst + done, host, part, cudaMemcpyHostToDevice, gpu.stream));
        cuda_check(cudaEventRecord(gpu.stage[i].free, gpu.stream));
    }
}

static void download(void *dst, const void *src, size_t bytes) {
    if (bytes) cuda_check(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, gpu.stream));
    wait_device();
}

// Between ranks. With a card for every rank: NCCL's grouped sends and receives on one stream. Where NCCL is
// missing, or ranks share a card: down, through MPI between hosts' memories, up.
#ifdef OSP_NCCL
static void nccl_check(ncclResult_t r) {
    if (r != ncclSuccess) die("NCCL: %s; the run cannot go on", ncclGetErrorString(r));
}

// One communicator for the ranks of a sample, one for the guidance pair, each made when first used: the
// group's first rank draws an id, MPI brings it to the others. NVLink multicast stays off.
static ncclComm_t nccl_group(int purpose, int R) {
    static ncclComm_t groups[2];
    ncclComm_t *group = &groups[purpose == GUIDANCE];
    if (*group) return *group;
    ncclUniqueId id;
    int rank;
    MPI_Comm_rank(ranks_of(purpose), &rank);
    setenv("NCCL_NVLS_ENABLE", "0", 1);
    if (rank == 0) nccl_check(ncclGetUniqueId(&id));
    MPI_Bcast(&id, sizeof(id), MPI_BYTE, 0, ranks_of(purpose));
    nccl_check(ncclCommInitRank(group, R, id, rank));
    return *group;
}

static bool nccl_all_to_all(void *to, const void *from, const int *receive, const int *send, bool same,
                            size_t row_bytes, int R, int purpose) {
    if (sample_ranks == MPI_COMM_WORLD || gpu.shared) return false;
    ncclComm_t group = nccl_group(purpose, R);
    nccl_check(ncclGroupStart());
    for (int s = 0; s < R; s++) {
        size_t out = (size_t)send[s] * row_bytes, in = (size_t)receive[s] * row_bytes;
        nccl_check(ncclSend(from, out, ncclUint8, s, group, gpu.stream));
        nccl_check(ncclRecv(to, in, ncclUint8, s, group, gpu.stream));
        if (!same) from = (const char *)from + out;
        to = (char *)to + in;
    }
    nccl_check(ncclGroupEnd());
    return true;
}
#else
template <typename... P> static bool nccl_all_to_all(P...) { return false; }
#endif

static void device_all_to_all(void *to, const void *from, const int *receive, const int *send, bool same,
                              size_t row_bytes, int R, int purpose) {
    if (nccl_all_to_all(to, from, receive, send, same, row_bytes, R, purpose)) return;
    size_t out = 0, in = 0;
    for (int s = 0; s < R; s++) {
        out = same ? (size_t)send[s] : out + (size_t)send[s];
        in += (size_t)receive[s];
    }
    out *= row_bytes, in *= row_bytes;
    if (out + in > gpu.room_bytes) {
        cuda_check(cudaFreeHost(gpu.room));
        cuda_check(cudaMallocHost((void **)&gpu.room, gpu.room_bytes = out + in));
    }
    download(gpu.room, from, out);
    mpi_all_to_all(gpu.room + out, gpu.room, receive, send, same, row_bytes, R, purpose);
    upload(to, gpu.room + out, in);
}

// ==========================================================================================================
// How threads share rows
// ==========================================================================================================
// V neighbours in one access where V is 4 or 8 (p at a multiple of 16 bytes, or of 8 for four bf16).
template <typename T, int V>
struct alignas(V < 4 ? sizeof(T) : V * sizeof(T) < 16 ? V * sizeof(T) : 16) Pack { T x[V]; };

template <typename T, int V> static __device__ void load(float (&v)[V], const T *p) {
    Pack<T, V> pack = *(const Pack<T, V> *)p;
    for (int i = 0; i < V; i++) v[i] = (float)pack.x[i];
}

template <typename T, int V> static __device__ void store(T *p, const float (&v)[V]) {
    Pack<T, V> pack;
    for (int i = 0; i < V; i++) pack.x[i] = (T)v[i];
    *(Pack<T, V> *)p = pack;
}

// The same for what no one writes meanwhile (weights, gates, tables): through the read-only path, so that
// the compiler may move it above stores. v = otherwise where p is NULL.
template <int V>
static __device__ void load_constant(float (&v)[V], const float *p, size_t at, float otherwise = 0) {
    if (!p) for (int i = 0; i < V; i++) v[i] = otherwise;
    else if constexpr (V >= 4)
        for (int i = 0; i < V; i += 4) {
            float4 q = __ldg((const float4 *)(p + at + i));
            v[i] = q.x, v[i + 1] = q.y, v[i + 2] = q.z, v[i + 3] = q.w;
        }
    else for (int i = 0; i < V; i++) v[i] = __ldg(p + at + i);
}

template <int V>
static __device__ void load_sample(float (&v)[V], PerSample s, size_t b, int c, float otherwise = 0) {
    load_constant(v, s.p, b * s.stride + c, otherwise);
}

// 8 neighbours of an array of n from i on, whatever its alignment and end; behind the end lie zeros.
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

// A row by G threads: thread `lane` holds K pieces, piece k the V neighbours from column (lane + k·G)·V on.
// A block has ROWS rows in hand at a time; where it sums columns it goes through SHARE rows.
template <int V_, int G_, int K_> struct Tile {
    enum { V = V_, G = G_, K = K_ };
    enum { THREADS = G > 128 ? G : 128, ROWS = THREADS / G, SHARE = ROWS > 1 ? 128 : 32 };
    static __device__ int column(int k) { return ((int)(threadIdx.x % G) + k * G) * V; }
};

// The statement with T = the tile for rows of dim <= 5120. What is not wide goes by a quarter of V.
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
#define BY_WIDTH(wide, ...) do { \
    if (wide) { enum { V = 4 }; BY_TYPE(__VA_ARGS__); } \
    else      { enum { V = 1 }; BY_TYPE(__VA_ARGS__); } \
} while (0)

// v[i] = its sum over the G threads of a row: lanes of a warp by shuffles, warps by shared memory.
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

// Column sums, first stage: line[S·dim] = S vectors of sums over the block's rows, in order, out of acc.
template <typename T, int S>
static __device__ void block_line(float *line, const float (&acc)[S][T::K][T::V], int dim) {
    if constexpr (T::ROWS == 1) {
        for (int s = 0; s < S; s++)
            for (int k = 0; k < T::K; k++)
                if (T::column(k) < dim) store(line + s * dim + T::column(k), acc[s][k]);
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

// The same for 8 warps, each with its own rows, thread (x, y) holding V columns: line[32·V], columns < dim.
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
static __global__ void
fold_kernel(PerSample d0, PerSample d1, const float *lines, int count, int dim, int columns) {
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

static void fold(PerSample d0, PerSample d1, const float *lines, int lines_per_sample, int B, int dim,
                 int vectors) {
    bool each = (d0.p && d0.stride) || (d1.p && d1.stride);              // else one sum over all samples
    int samples = each ? B : 1, columns = vectors * dim;
    LAUNCH(fold_kernel, dim3(blocks((size_t)columns, 32), samples), dim3(32, 32), d0, d1, lines,
           lines_per_sample * (B / samples), dim, columns);
}

// ==========================================================================================================
// Elementwise on act
// ==========================================================================================================
// y[n] = f(x[n]): a read, a write.
template <typename Y, typename X, float (*f)(float)>
static __global__ void map_kernel(Y *y, const X *x, size_t n) {
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

EVERYWHERE float same(float u) { return u; }

// The launch of a kernel whose threads take 8 numbers each, of n.
#define LAUNCH8(kernel, n, ...) \
    do { if ((n) > 0) LAUNCH(kernel, blocks(n, 8 * 256), 256, __VA_ARGS__, n); } while (0)

static void to_act(act *y, const float *x, size_t n) {
    BY_TYPE(LAUNCH8((map_kernel<A, float, same>), n, (A *)y, x));
}

static void to_float(float *y, const act *x, size_t n) {
    BY_TYPE(LAUNCH8((map_kernel<float, A, same>), n, y, (const A *)x));
}

static void gelu_backward(act *dx, const act *dy, const act *pre, size_t n) {
    BY_TYPE(LAUNCH8((map_backward_kernel<A, gelu_slope>), n, (A *)dx, (const A *)dy, (const A *)pre));
}

static void silu_forward(float *y, const float *x, size_t n) {
    LAUNCH8((map_kernel<float, float, silu>), n, y, x);
}

static void silu_backward(float *dx, const float *dy, const float *x, size_t n) {
    LAUNCH8((map_backward_kernel<float, silu_slope>), n, dx, dy, x);
}

// ==========================================================================================================
// Matrix products
// ==========================================================================================================
// cuBLASLt thinks in columns: a row-major [rows, cols] matrix is to it a [cols, rows] one. So y = x·w^T is
// asked for as y^T[out, rows] = w · x^T: first factor w, second x; the bias is a number per row there.

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

// A matrix as cuBLASLt is to read it: act, float, or 8-bit codes, each worth *unit.
typedef struct { const void *p; bool transposed; cudaDataType_t type; const float *unit; } Operand;
static cudaDataType_t type_of(const Factor &f) { return f.exact ? CUDA_R_32F : act_type(); }
static Operand numbers_of(const Factor &f, bool transposed) {
    Operand o = {f.x, transposed, type_of(f), NULL};
    return o;
}
static Operand codes_of(const uint8_t *code, const Factor &f, bool transposed) {
    Operand o = {code, transposed, CUDA_R_8F_E4M3, f.unit};
    return o;
}

// The product's description for cuBLASLt: types, transposes, epilogue, shapes. float stays float: no TF32.
// For codes FAST_ACCUM stays 0, its default: the tensor core adds with 13 bits, so sums move to float32
// registers every few steps. (With FAST_ACCUM long sums of one sign lose most of their tail.)
static void plan_describe(Plan *p, const PlanKey *k, bool bias, bool aux) {
    cudaDataType_t in = (cudaDataType_t)k->in, out = (cudaDataType_t)k->out;
    cublasOperation_t ta = k->transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasOperation_t tb = k->transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    int64_t aux_row = (int64_t)k->m;
    blas_check(cublasLtMatmulDescCreate(&p->op, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    plan_set(p, CUBLASLT_MATMUL_DESC_TRANSA, &ta, sizeof(ta));
    plan_set(p, CUBLASLT_MATMUL_DESC_TRANSB, &tb, sizeof(tb));
    plan_set(p, CUBLASLT_MATMUL_DESC_EPILOGUE, &k->epilogue, sizeof(k->epilogue));
    if (aux) plan_set(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &aux_row, sizeof(aux_row));
    if (bias) plan_set(p, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &out, sizeof(out));
    size_t a_rows = k->transpose_a ? k->k : k->m, a_cols = k->transpose_a ? k->m : k->k;
    size_t b_rows = k->transpose_b ? k->n : k->k, b_cols = k->transpose_b ? k->k : k->n;
    blas_check(cublasLtMatrixLayoutCreate(&p->a, in, a_rows, a_cols, (int64_t)a_rows));
    blas_check(cublasLtMatrixLayoutCreate(&p->b, in, b_rows, b_cols, (int64_t)b_rows));
    blas_check(cublasLtMatrixLayoutCreate(&p->d, out, k->m, k->n, (int64_t)k->m));
}

// Whether an algorithm computes tiles of 128 x 128; one that does not say is not taken for it.
static bool tile_is_128(const cublasLtMatmulAlgo_t *algo) {
    int tile = CUBLASLT_MATMUL_TILE_UNDEFINED;
    size_t written;
    cublasLtMatmulAlgoConfigGetAttribute(algo, CUBLASLT_ALGO_CONFIG_TILE_ID, &tile, sizeof(tile), &written);
    return tile == CUBLASLT_MATMUL_TILE_128x128;
}

// Asks cuBLASLt's heuristics for the algorithm of a new product and takes the first offer: at the paper's
// sizes none of 8 offers and 80 variations was more than 2 % faster. But a product of short sums moves more
// than it computes, and there tiles of 128 x 128 win, two of which fit a multiprocessor: one loads while the
// other stores (131,072 x 128 x 128 on an H100: 0.030 ms, the first offer 0.043; not with a second output,
// the gelu's input). The choice is by rule, not by timing, so that every run makes the same one.
static void plan_make(Plan *p, const PlanKey *k, bool aux) {
    size_t room = WORKSPACE_BYTES;
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
    int found = 0, take = 0;
    cublasLtMatmulAlgoGetHeuristic(gpu.blas, p->op, p->a, p->b, p->d, p->d, want, 8, offer, &found);
    cublasLtMatmulPreferenceDestroy(want);
    p->possible = found > 0 && offer[0].state == CUBLAS_STATUS_SUCCESS;
    if (!p->possible) return;
    bool short_sums = k->k <= 512 && k->m * k->n >= (size_t)gpu.card.multiProcessorCount << 14 && !aux;
    for (int i = found - 1; i >= 0 && short_sums; i--)
        if (offer[i].state == CUBLAS_STATUS_SUCCESS && tile_is_128(&offer[i].algo)) take = i;
    p->algo = offer[take].algo;
}

// d[m, n] = op(a)·op(b) + beta·d, in cuBLASLt's columns, with its epilogue. false: cuBLASLt cannot do it.
static bool matmul(void *d, cudaDataType_t out, Operand a, Operand b, size_t m, size_t n, size_t k,
                   float beta, int epilogue = CUBLASLT_EPILOGUE_DEFAULT, const void *bias = NULL,
                   void *aux = NULL) {
    const PlanKey key = {m, n, k, a.type, out, a.transposed, b.transposed, epilogue, alignment(a.p),
                         alignment(b.p), alignment(d)};
    Plan *p = NULL;
    for (int i = 0; i < PLANS && gpu.plan[i].used && !p; i++)
        if (!memcmp(&gpu.plan[i].key, &key, sizeof(key))) p = &gpu.plan[i];
    bool fresh = !p;
    if (fresh) {
        p = &gpu.plan[gpu.plans++ % PLANS];
        plan_free(p);
        memset(p, 0, sizeof(*p));
        p->key = key, p->used = true;
        plan_describe(p, &key, bias, aux);
    }
    if (bias) plan_set(p, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof(bias));
    if (aux) plan_set(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &aux, sizeof(aux));
    if (a.unit) plan_set(p, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &a.unit, sizeof(a.unit));
    if (b.unit) plan_set(p, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &b.unit, sizeof(b.unit));
    if (fresh) plan_make(p, &key, aux);
    if (!p->possible) return false;
    float one = 1.0f;
    blas_check(cublasLtMatmul(gpu.blas, p->op, &one, a.p, p->a, b.p, p->b, &beta, d, p->d, d, p->d, &p->algo,
                              gpu.workspace, WORKSPACE_BYTES, gpu.stream));
    return true;
}

// y = x·w^T as cuBLASLt's y^T = w·x^T, of codes where both have them.
static bool product(act *y, Factor x, Factor w, size_t rows, int out, int in, int epilogue, const act *bias,
                    void *aux = NULL) {
    bool codes = x.code && w.code;
    Operand a = codes ? codes_of(w.code, w, true) : numbers_of(w, true);
    Operand b = codes ? codes_of(x.code, x, false) : numbers_of(x, false);
    return matmul(y, type_of(x), a, b, (size_t)out, rows, (size_t)in, 0.0f, epilogue, bias, aux);
}

static void linear_forward(act *y, Factor x, Factor w, const act *b, size_t rows, int out, int in) {
    cublasLtEpilogue_t epilogue = b ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    if (rows && !product(y, x, w, rows, out, in, epilogue, b))
        die("cuBLASLt has no algorithm for y[%zu, %d] = x[.., %d]·w^T", rows, out, in);
}

// float: the product's bias epilogue, then a pass of our own gelu. bfloat16: gelu in the epilogue too, on
// numbers still in float32 (it is the tanh form); AUX keeps those before it, in rows of whole 16 bytes.
static void linear_gelu_forward(act *y, act *pre, Factor x, Factor w, const act *b, size_t rows, int out,
                                int in) {
    if (!rows) return;
    int epilogue = pre ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_BIAS;
    if (gpu.half && b && aligned(8, (size_t)out, pre) && product(y, x, w, rows, out, in, epilogue, b, pre))
        return;
    act *u = pre ? pre : y;
    linear_forward(u, x, w, b, rows, out, in);
    BY_TYPE(LAUNCH8((map_kernel<A, A, gelu>), rows * (size_t)out, (A *)y, (const A *)u));
}

// lines[chunk][dim] = Σ of dy[rows, dim] over the chunk's 128 rows: a read of dy.
template <typename A, int V>
static __global__ void column_sum_kernel(float *lines, const A *dy, size_t rows, int dim) {
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
    BY_WIDTH(aligned(4, (size_t)dim, dy),
             LAUNCH((column_sum_kernel<A, V>), dim3(blocks(dim, 32 * V), chunks), dim3(32, 8), lines,
                    (const A *)dy, rows, dim));
    fold(shared(db), NONE, lines, (int)chunks, 1, dim, 1);
}

// db[out] += unit·Σ of a row of turned codes, `row` bytes long: a block for each.
static __global__ void code_sum_kernel(float *db, const uint8_t *turned, const float *unit, size_t row) {
    const uint4 *line = (const uint4 *)(turned + blockIdx.x * row);
    float sum[1] = {};
#pragma unroll 4
    for (size_t i = threadIdx.x; i < row / 16; i += 512) {
        uint4 q = line[i];
        const __nv_fp8x4_e4m3 *four = (const __nv_fp8x4_e4m3 *)&q;
        for (int j = 0; j < 4; j++) {
            float4 v = (float4)four[j];
            sum[0] += (v.x + v.y) + (v.z + v.w);
        }
    }
    group_sum<512>(sum);
    if (threadIdx.x == 0) db[blockIdx.x] += *unit * sum[0];
}

// Codes multiply only with the summed dimension last in both: dx reads w turned, dw reads dy and x turned.
static void linear_backward(act *dx, float *dw, float *db, Factor dy, Factor x, Factor w, size_t rows,
                            int out, int in, bool accumulate) {
    size_t o = (size_t)out, i = (size_t)in, padded = blocks(rows, 16) * 16;
    bool codes = dy.code != NULL, ok = true;
    if (!rows) return;
    if (dx) {
        Operand a = codes ? codes_of(w.turned, w, true) : numbers_of(w, false);
        Operand b = codes ? codes_of(dy.code, dy, false) : numbers_of(dy, false);
        ok &= matmul(dx, type_of(dy), a, b, i, rows, o, accumulate ? 1.0f : 0.0f);
    }
    if (dw) {
        Operand a = codes ? codes_of(x.turned, x, true) : numbers_of(x, false);
        Operand b = codes ? codes_of(dy.turned, dy, false) : numbers_of(dy, true);
        ok &= matmul(dw, CUDA_R_32F, a, b, i, o, codes ? padded : rows, 1.0f);
    }
    if (!ok) die("cuBLASLt has no algorithm for the gradient of y[%zu, %d] = x[.., %d]·w^T", rows, out, in);
    if (db && codes) LAUNCH(code_sum_kernel, out, 512, db, dy.turned, dy.unit, padded);
    else if (db && dy.exact) fold(shared(db), NONE, (const float *)dy.x, (int)rows, 1, out, 1);
    else if (db) column_sum(db, dy.x, rows, out);
}

// ==========================================================================================================
// Norms, modulation, residual
// ==========================================================================================================
static __global__ void
modulation_kernel(float *out, const float *mod, const float *e, int B, int J, int Je, int dim) {
    size_t i = thread_index(), row = (size_t)J * dim;
    if (i >= B * row) return;
    size_t b = i / row, c = i % dim, j = i % row / dim;
    out[i] = mod[i % row] + e[(b * Je + (Je > 1 ? j : 0)) * dim + c];
}

static void modulation_forward(float *out, const float *mod, const float *e, int B, int J, int Je, int dim) {
    LAUNCH(modulation_kernel, blocks((size_t)B * J * dim, 256), 256, out, mod, e, B, J, Je, dim);
}

// A thread for each number of dmod (a sum over samples), then one for each of de (over j, if Je = 1).
static __global__ void
modulation_backward_kernel(float *dmod, float *de, const float *dout, int B, int J, int Je, int dim) {
    size_t i = thread_index(), row = (size_t)J * dim, step = row;
    float *to = dmod + i, total = 0.0f;
    int count = B;
    if (i >= row) {
        i -= row, to = de + i, step = dim;
        count = i >= (size_t)B * Je * dim ? 0 : Je > 1 ? 1 : J;
        if (Je == 1) i = i / dim * row + i % dim;
    }
    for (int k = 0; k < count; k++) total += dout[i + k * step];
    if (count) *to += total;
}

static void modulation_backward(float *dmod, float *de, const float *dout, int B, int J, int Je, int dim) {
    size_t n = (size_t)(J + B * Je) * dim;
    LAUNCH(modulation_backward_kernel, blocks(n, 256), 256, dmod, de, dout, B, J, Je, dim);
}

// *amax = the largest of it and of all threads' best >= 0. Such floats are ordered as their bits are, and
// maxima have no order: an atomic gives the same bytes always. All threads of the warp come here.
static __device__ void raise_maximum(float *amax, float best) {
    unsigned bits = __reduce_max_sync(~0u, __float_as_uint(best));
    if (threadIdx.x % 32 == 0 && bits > *(volatile unsigned *)amax) atomicMax((unsigned *)amax, bits);
}

// The same, by a whole block at its end: one atomic, not one for each warp.
static __device__ void block_maximum(float *amax, float best) {
    __shared__ float part[8];
    best = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(best)));
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x < 32) raise_maximum(amax, threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0.0f);
}

template <typename A, int V> static __device__ float largest(float best, const float (&v)[V]) {
    for (int i = 0; i < V; i++) best = fmaxf(best, fabsf((float)(A)v[i]));                 // NaN: skipped
    return best;
}

// x_out[j] = x[i] + gate·y[i], i = map[j] (map NULL: i = j), then h[j] = norm(x_out[j]), in one pass: reads
// 4 + a, writes 4 + a bytes per element. The row stays in registers, so mean and variance are two exact sums
// (not Σx² − mean²) at no further read. y, x_out or h NULL: without that part.
template <typename A, typename T> static __global__ void __launch_bounds__(T::THREADS)
residual_norm_kernel(float *x_out, A *h, float *stat, float *amax, const float *x, const A *y,
                     PerSample gate, const int *map, size_t rows, Affine a, Rows r, float eps) {
    size_t row = (size_t)blockIdx.x * T::ROWS + threadIdx.x / T::G;
    bool live = row < rows;                  // idle threads of the last block repeat its last row (shuffles)
    row = live ? row : rows - 1;
    size_t from = map ? (size_t)map[row] : row, base = from * r.dim;
    size_t b = (unsigned)from / (unsigned)r.n;                                 // a 64-bit division is slow
    float v[T::K][T::V] = {}, branch[T::K][T::V] = {}, sum[1] = {}, squares[1] = {};
    for (int k = 0; k < T::K; k++) if (T::column(k) < r.dim) load(v[k], x + base + T::column(k));
    if (y) {
        for (int k = 0; k < T::K; k++) if (T::column(k) < r.dim) load(branch[k], y + base + T::column(k));
        for (int k = 0; k < T::K; k++) {
            float g[T::V];
            if (T::column(k) >= r.dim) continue;
            load_sample(g, gate, b, T::column(k), 1.0f);
            for (int i = 0; i < T::V; i++) v[k][i] += g[i] * branch[k][i];
        }
    }
    base = row * r.dim;
    for (int k = 0; k < T::K; k++)
        if (x_out && live && T::column(k) < r.dim) store(x_out + base + T::column(k), v[k]);
    if (!h) return;
    for (int k = 0; k < T::K; k++) for (int i = 0; i < T::V; i++) sum[0] += v[k][i];
    group_sum<T::G>(sum);
    float mean = sum[0] / r.dim;
    for (int k = 0; k < T::K; k++)
        if (T::column(k) < r.dim)
            for (int i = 0; i < T::V; i++) {
                v[k][i] -= mean;
                squares[0] += v[k][i] * v[k][i];
            }
    group_sum<T::G>(squares);
    float rstd = rsqrtf(squares[0] / r.dim + eps), best = 0.0f;
    for (int k = 0; k < T::K; k++) {
        float s[T::V], t[T::V];
        if (!live || T::column(k) >= r.dim) continue;
        load_sample(s, a.scale, b, T::column(k));
        load_sample(t, a.shift, b, T::column(k));
        for (int i = 0; i < T::V; i++) t[i] += v[k][i] * rstd * (a.one + s[i]);
        store(h + base + T::column(k), t);
        best = largest<A>(best, t);
    }
    if (amax) block_maximum(amax, best);
    if (stat && live && threadIdx.x % T::G == 0) stat[2 * row] = mean, stat[2 * row + 1] = rstd;
}

static void residual_norm(float *x_out, act *h, float *stat, float *amax, const float *x, const act *y,
                          PerSample gate, const int *map, size_t count, Affine a, Rows r, float eps) {
    size_t strides = gate.stride | a.shift.stride | a.scale.stride;
    bool wide = aligned(4, (size_t)r.dim | strides, x_out, h, x, y, gate.p, a.shift.p, a.scale.p);
    if (amax) zero(amax, sizeof(float));
    if (count)
        BY_TYPE(BY_TILE(4, wide, r.dim,
                        LAUNCH((residual_norm_kernel<A, T>), blocks(count, T::ROWS), T::THREADS, x_out,
                               (A *)h, stat, amax, x, (const A *)y, gate, map, count, a, r, eps)));
}

static void residual_norm_forward(float *x_out, act *h, float *stat, float *amax, const float *x,
                                  const act *y, PerSample gate, Affine a, Rows r, float eps) {
    residual_norm(y ? x_out : NULL, h, stat, amax, x, y, gate, NULL, (size_t)r.B * r.n, a, r, eps);
}

static void residual_gather_forward(float *x_out, const float *x, const act *y, PerSample gate,
                                    const int *map, size_t count, Rows r) {
    residual_norm(x_out, NULL, NULL, NULL, x, y, gate, map, count, affine(NULL, NULL), r, 0.0f);
}

// g = dh·(one + scale); dx += rstd·(g − mean g − x̂·mean(g·x̂)). Block (chunk, b): SHARE rows of sample b,
// and a line [dshift | dscale] of their column sums. Reads 8 + a, writes 4 bytes per element.
template <typename A, typename T> static __global__ void __launch_bounds__(T::THREADS)
norm_backward_kernel(float *dx, float *lines, const A *dh, const float *x, const float *stat,
                     PerSample scale, float one, size_t n, int dim) {
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

static void norm_backward(float *dx, Affine d, const act *dh, const float *x, const float *stat, Affine a,
                          Rows r) {
    if (!r.B || !r.n) return;
    if (!a.scale.stride && !d.shift.stride && !d.scale.stride) r.n *= (size_t)r.B, r.B = 1;
    bool wide = aligned(4, (size_t)r.dim | a.scale.stride, dx, dh, x, a.scale.p);
    unsigned chunks = 0;
    float *lines = NULL;
    BY_TYPE(BY_TILE(4, wide, r.dim, chunks = blocks(r.n, T::SHARE);
                    lines = (float *)scratch((size_t)chunks * r.B * 2 * r.dim * sizeof(float));
                    LAUNCH((norm_backward_kernel<A, T>), dim3(chunks, r.B), T::THREADS, dx, lines,
                           (const A *)dh, x, stat, a.scale, a.one, r.n, r.dim)));
    fold(d.shift, d.scale, lines, (int)chunks, r.B, r.dim, 2);
}

// dy = gate·dx, and the sums of dx·y over 128 rows of sample b (blockIdx.z). Reads 4 + a, writes a.
template <typename A, int V> static __global__ void
gate_backward_kernel(A *dy, float *lines, const float *dx, const A *y, PerSample gate, size_t n, int dim) {
    size_t b = blockIdx.z, r = blockIdx.y * (size_t)128 + threadIdx.y;
    size_t end = min((blockIdx.y + 1) * (size_t)128, n);
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

static void gate_backward(act *dy, PerSample dgate, const float *dx, const act *y, PerSample gate, Rows r) {
    unsigned chunks = blocks(r.n, 128);
    if (!r.B || !r.n) return;
    float *lines = dgate.p ? (float *)scratch((size_t)chunks * r.B * r.dim * sizeof(float)) : NULL;
    BY_WIDTH(aligned(4, (size_t)r.dim | gate.stride, dy, dx, y, gate.p),
             LAUNCH((gate_backward_kernel<A, V>), dim3(blocks(r.dim, 32 * V), chunks, r.B), dim3(32, 8),
                    (A *)dy, lines, dx, (const A *)y, gate, r.n, r.dim));
    if (lines) fold(dgate, NONE, lines, (int)chunks, r.B, r.dim, 1);
}

// dst[j] = src[map[j]], rows of any bytes in words W.
template <typename W>
static __global__ void gather_kernel(W *dst, const W *src, const int *map, size_t count, size_t words) {
    size_t j = blockIdx.x * (size_t)blockDim.y + threadIdx.y;
    if (j >= count) return;
    size_t i = (size_t)map[j];
    for (size_t c = threadIdx.x; c < words; c += blockDim.x) dst[j * words + c] = src[i * words + c];
}

template <typename W>
static void gather(void *dst, const void *src, const int *map, size_t count, size_t words) {
    unsigned x = 1;                          // threads along a row; the block's others take more rows
    while (x < 256 && x < words) x *= 2;
    dim3 block(x, 256 / x);
    LAUNCH(gather_kernel, blocks(count, block.y), block, (W *)dst, (const W *)src, map, count, words);
}

static void gather_rows(void *dst, const void *src, const int *map, size_t count, size_t row_bytes) {
    size_t odd = row_bytes | (uintptr_t)dst | (uintptr_t)src;
    if (!count || !row_bytes) return;
    if (odd % 16 == 0)     gather<uint4>(dst, src, map, count, row_bytes / 16);
    else if (odd % 4 == 0) gather<float>(dst, src, map, count, row_bytes / 4);
    else                   gather<char>(dst, src, map, count, row_bytes);
}

// The pairs of v turn by (cos, sin) = turn[2p], turn[2p+1]; direction −1 turns back, which is the transpose.
template <int V> static __device__ void rotate(float (&v)[V], const float (&turn)[V], float direction) {
    for (int i = 0; i < V; i += 2) {
        float a = v[i], b = v[i + 1], c = turn[i], s = direction * turn[i + 1];
        v[i] = a * c - b * s;
        v[i + 1] = a * s + b * c;
    }
}

// RMSNorm over the row, then RoPE inside each head: reads a, writes a bytes per element. The table's lines,
// [head_dim/2, 2], lie as the features of a head do: column c of a row meets entry c mod head_dim.
template <typename A, typename T> static __global__ void __launch_bounds__(T::THREADS)
rmsnorm_rope_kernel(A *y, float *rstd, float *amax, const A *x, const float *w, const float *rope,
                    size_t rows, size_t n, int dim, int head_dim, float eps) {
    size_t row = (size_t)blockIdx.x * T::ROWS + threadIdx.x / T::G;
    bool live = row < rows;
    row = live ? row : rows - 1;
    size_t token = (unsigned)row % (unsigned)n, base = row * dim;
    float v[T::K][T::V] = {}, squares[1] = {};
    for (int k = 0; k < T::K; k++) if (T::column(k) < dim) load(v[k], x + base + T::column(k));
    for (int k = 0; k < T::K; k++) for (int i = 0; i < T::V; i++) squares[0] += v[k][i] * v[k][i];
    group_sum<T::G>(squares);
    float r = rsqrtf(squares[0] / dim + eps), best = 0.0f;
    for (int k = 0; k < T::K; k++) {
        int c = T::column(k);
        if (!live || c >= dim) continue;
        float s[T::V], turn[T::V];
        load_constant(s, w, c);
        for (int i = 0; i < T::V; i++) v[k][i] *= r * s[i];
        if (rope) {
            load_constant(turn, rope, token * head_dim + c % head_dim);
            rotate(v[k], turn, 1.0f);
        }
        store(y + base + c, v[k]);
        best = largest<A>(best, v[k]);
    }
    if (amax) block_maximum(amax, best);
    if (rstd && live && threadIdx.x % T::G == 0) rstd[row] = r;
}

static void rmsnorm_rope_forward(act *y, float *rstd, float *amax, const act *x, const float *w,
                                 const float *rope, Rows r, int heads, float eps) {
    size_t rows = (size_t)r.B * r.n;
    int head_dim = r.dim / heads;
    bool wide = aligned(8, (size_t)head_dim, y, x, w, rope);
    if (amax) zero(amax, sizeof(float));
    if (rows)
        BY_TYPE(BY_TILE(8, wide, r.dim,
                        LAUNCH((rmsnorm_rope_kernel<A, T>), blocks(rows, T::ROWS), T::THREADS, (A *)y, rstd,
                               amax, (const A *)x, w, rope, rows, r.n, r.dim, head_dim, eps)));
}

// d = dy turned back; g = d·w; dx = rstd·(g − x̂·mean(g·x̂)); a line of sums of d·x̂. Reads 2a, writes a.
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

static void rmsnorm_rope_backward(act *dx, float *dw, const act *dy, const act *x, const float *rstd,
                                  const float *w, const float *rope, Rows r, int heads) {
    size_t rows = (size_t)r.B * r.n;
    int head_dim = r.dim / heads;
    bool wide = aligned(8, (size_t)head_dim, dx, dy, x, w, rope);
    unsigned chunks = 0;
    float *lines = NULL;
    if (!rows) return;
    BY_TYPE(BY_TILE(8, wide, r.dim, chunks = blocks(rows, T::SHARE);
                    lines = (float *)scratch((size_t)chunks * r.dim * sizeof(float));
                    LAUNCH((rmsnorm_rope_backward_kernel<A, T>), chunks, T::THREADS, (A *)dx, lines,
                           (const A *)dy, (const A *)x, rstd, w, rope, rows, r.n, r.dim, head_dim)));
    if (dw) fold(shared(dw), NONE, lines, (int)chunks, 1, r.dim, 1);
}

// ==========================================================================================================
// HiF8
// ==========================================================================================================
// m = max |x|: a read.
template <typename A> static __global__ void absmax_kernel(float *m, const A *x, size_t n) {
    float best = 0.0f, v[8];
    for (size_t i = 8 * thread_index(); i < n; i += 8 * (size_t)gridDim.x * blockDim.x) {
        load8(v, x, i, n);
        best = largest<A>(best, v);
    }
    block_maximum(m, best);
}

static void absmax(float *m, const act *x, size_t n) {
    unsigned grid = blocks(n, 8 * 256), most = 8 * (unsigned)gpu.card.multiProcessorCount;
    zero(m, sizeof(float));
    if (n) BY_TYPE(LAUNCH(absmax_kernel<A>, grid < most ? grid : most, 256, m, (const A *)x, n));
}

// y = hif8(x·k)/k, k = s/max|x|: a read, a write. The maximum never leaves the card. The division is a
// product with 1/k and a correction by the exact remainder: rounded alike, in a third of the instructions.
template <typename A>
static __global__ void hif8_kernel(A *y, const A *x, float s, const float *m, size_t n) {
    size_t i = 8 * thread_index();
    float v[8], k = hif8_scale(s, __ldg(m)), inverse = 1.0f / k;
    load8(v, x, i, n);
    for (int j = 0; j < 8; j++) {
        float q = hif8_round(v[j] * k), y0 = q * inverse;
        v[j] = isinf(q) ? q : fmaf(fmaf(-y0, k, q), inverse, y0);
    }
    store8(y, v, i, n);
}

// Codes. 16 times HiF8's values up to 15, and 2 times those up to 224, are values of E4M3 (up to 448, 3 bits
// of mantissa, down to 2^-9), which tensor cores multiply: exactly, but for those below 2^-16 of the maximum,
// which become 0 or their neighbour. (E5M2 would keep those and lose the third bit of most others.)
enum { CODE_ROWS = 128, CODE_COLUMNS = 64 };
static __host__ __device__ float code_scale(float s) { return s > 15 ? 2.0f : 16.0f; }

// scale·hif8_round(v), for v in a tensor scaled to s <= 224, from y = scale·v; what E4M3 does not reach is
// left to the conversion. Of 23 mantissa bits 20 go, one more where |E| > 3, another where |E| > 7.
static __device__ float hif8_round_scaled(float y, float scale) {
    uint32_t u = float_bits(y), a = u & 0x7FFFFFFFu;
    uint32_t more = (a < float_bits(scale / 8)) + (a < float_bits(scale / 128))
                  + (a >= float_bits(scale * 16));
    return bits_float(((a + (0x80000u << more)) & (0xFFF00000u << more)) | (u & 0x80000000u));
}

// A tile of 128 rows and 64 columns: thread (i, j) = (threadIdx.x / 8, % 8) has rows 4i.. and columns 8j..
// For turned codes the tile goes through shared memory in words of 4 rows. Reads 2 bytes, writes 1, or 2.
static __global__ void __launch_bounds__(256)
codes_kernel(Factor y, const bf16 *x, size_t rows, size_t columns, float s, const float *m) {
    __shared__ uint32_t tile[CODE_COLUMNS][CODE_ROWS / 4 + 1];
    float scale = code_scale(s), k = scale * hif8_scale(s, __ldg(m)), v[8];
    size_t row = blockIdx.y * (size_t)CODE_ROWS + threadIdx.x / 8 * 4;
    size_t column = blockIdx.x * (size_t)CODE_COLUMNS + threadIdx.x % 8 * 8;
    uint32_t word[4][2] = {};                                      // [row][4 columns each]
    for (int i = 0; i < 4; i++) {
        if (row + i >= rows || column >= columns) continue;
        load(v, x + (row + i) * columns + column);
        for (int j = 0; j < 8; j++) v[j] = hif8_round_scaled(v[j] * k, scale);
        for (int j = 0; j < 2; j++) {
            float4 four = make_float4(v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3]);
            word[i][j] = __nv_fp8x4_e4m3(four).__x;
        }
        *(uint2 *)(y.code + (row + i) * columns + column) = make_uint2(word[i][0], word[i][1]);
    }
    if (thread_index() == 0 && blockIdx.y == 0) *y.unit = 1.0f / k;
    if (!y.turned) return;
    for (int j = 0; j < 8; j++) {                                  // byte j % 4 of four rows' words
        uint32_t pick = (j % 4) | (j % 4 + 4) << 4, low = __byte_perm(word[0][j / 4], word[1][j / 4], pick);
        uint32_t high = __byte_perm(word[2][j / 4], word[3][j / 4], pick);
        tile[threadIdx.x % 8 * 8 + j][threadIdx.x / 8] = __byte_perm(low, high, 0x5410);
    }
    __syncthreads();
    size_t padded = blocks(rows, 16) * 16, first = blockIdx.y * (size_t)CODE_ROWS + threadIdx.x % 32 * 4;
    for (int c = threadIdx.x / 32; c < CODE_COLUMNS; c += 8) {
        size_t to = blockIdx.x * (size_t)CODE_COLUMNS + c;
        if (to < columns && first < padded)
            *(uint32_t *)(y.turned + to * padded + first) = tile[c][threadIdx.x % 32];
    }
}

static void hif8_tensor(Factor y, const act *x, size_t rows, int columns, float s, const float *m) {
    size_t n = rows * columns;
    if (!y.code) BY_TYPE(LAUNCH8(hif8_kernel<A>, n, (A *)y.x, (const A *)x, s, m));
    else if (n) LAUNCH(codes_kernel, dim3(blocks(columns, CODE_COLUMNS), blocks(rows, CODE_ROWS)), 256, y,
                       (const bf16 *)x, rows, (size_t)columns, s, m);
}

// Tensor cores know E4M3 from compute capability 8.9 on; rows of codes must be multiples of 16 bytes.
static bool codes_multiply(int dim, int ffn_dim) {
    return gpu.half && gpu.card.major * 10 + gpu.card.minor >= 89 && dim % 16 == 0 && ffn_dim % 16 == 0;
}

// ==========================================================================================================
// Pixels and words
// ==========================================================================================================
// A thread for each number of rows[B, n, 4·C], tokens first.., from its place in x[B, C, T, 2H, 2W] or to it
template <typename A> static __global__ void
latent_kernel(A *rows, float *x, bool to_rows, Grid g, size_t first, size_t n, bool channels_first) {
    size_t i = thread_index(), width = 4 * (size_t)g.C, row = i / width;
    if (row >= g.B * n) return;
    x += row / n * width * g.T * g.H * g.W + pixel(first + row % n, i % width, g, channels_first);
    if (to_rows) rows[i] = (A)*x;
    else *x = (float)rows[i];
}

static void latent(act *rows, float *x, bool to_rows, Grid g, size_t first, size_t n, bool channels_first) {
    size_t count = (size_t)g.B * n * 4 * g.C;
    if (count)
        BY_TYPE(LAUNCH(latent_kernel, blocks(count, 256), 256, (A *)rows, x, to_rows, g, first, n,
                       channels_first));
}

static void latent_to_rows(act *rows, const float *x, Grid g, size_t first, size_t n, bool channels_first) {
    latent(rows, (float *)x, true, g, first, n, channels_first);
}

static void rows_to_latent(float *x, const act *rows, Grid g, bool channels_first) {
    latent((act *)rows, x, false, g, 0, (size_t)g.T * g.H * g.W, channels_first);
}

template <typename A> static __global__ void
embed_kernel(A *y, const float *table, const float *pos, const int *ids, size_t rows, int L, int dim) {
    size_t i = thread_index(), r = i / dim, c = i % dim;
    if (r >= rows) return;
    int id = ids[r];
    y[i] = (A)(id < 0 ? 0.0f : table[(size_t)id * dim + c] + pos[r % L * dim + c]);
}

static void embed_forward(act *y, const float *table, const float *pos, const int *ids, size_t rows, int L,
                          int dim) {
    size_t n = rows * dim;
    if (n) BY_TYPE(LAUNCH(embed_kernel<A>, blocks(n, 256), 256, (A *)y, table, pos, ids, rows, L, dim));
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

// ==========================================================================================================
// Elementwise on float, reductions to the host, optimizer
// ==========================================================================================================
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
static __global__ void
square_kernel(double *sums, float *dout, const float *x, const float *z, size_t n, float slope) {
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
    if (grid > SUM_BLOCKS) grid = SUM_BLOCKS;
    LAUNCH(square_kernel, grid, 256, gpu.sums, dout, x, z, n, slope);
    download(gpu.sums_host, gpu.sums, grid * sizeof(double));
    for (unsigned i = 0; i < grid; i++) total += gpu.sums_host[i];
    return total;
}

static double sum_squares(const float *x, const float *z, size_t n) { return squares(NULL, x, z, n, 0.0f); }

static double mse(float *dout, const float *out, const float *target, size_t n) {
    return n ? squares(dout, out, target, n, (float)(2.0 / (double)n)) / (double)n : 0.0;
}

// Reads w, m, v, g, ema, writes all but g: 36 bytes per parameter in one pass. correct1 = 1 − β1^t.
static __global__ void
adamw_kernel(float *w, float *m, float *v, float *ema, const float *g, AdamW o, float correct1,
             float correct2, size_t n) {
    size_t i = 8 * thread_index();
    float w8[8], m8[8], v8[8], g8[8], e8[8] = {};
    float old1 = (float)o.beta1, old2 = (float)o.beta2, stay = (float)o.ema_decay;
    float new1 = (float)(1 - o.beta1), new2 = (float)(1 - o.beta2), fresh = (float)(1 - o.ema_decay);
    load8(w8, w, i, n);
    load8(m8, m, i, n);
    load8(v8, v, i, n);
    load8(g8, g, i, n);
    if (ema) load8(e8, ema, i, n);
    for (int j = 0; j < 8; j++) {
        float d = g8[j] * o.gscale;
        m8[j] = old1 * m8[j] + new1 * d;
        v8[j] = old2 * v8[j] + new2 * d * d;
        w8[j] -= o.lr * o.weight_decay * w8[j];
        w8[j] -= o.lr * (m8[j] / correct1) / (sqrtf(v8[j] / correct2) + o.eps);
        e8[j] = stay * e8[j] + fresh * w8[j];
    }
    store8(w, w8, i, n);
    store8(m, m8, i, n);
    store8(v, v8, i, n);
    if (ema) store8(ema, e8, i, n);
}

static void adamw(float *w, float *m, float *v, float *ema, const float *g, size_t n, AdamW o) {
    float correct1 = (float)(1 - pow(o.beta1, o.t)), correct2 = (float)(1 - pow(o.beta2, o.t));
    LAUNCH8(adamw_kernel, n, w, m, v, ema, g, o, correct1, correct2);
}

// ==========================================================================================================
// Attention
// ==========================================================================================================
// o = softmax(q·k^T/√head_dim)·v inside each sequence. Three forward kernels compute the same function, two
// the gradients; forward_launch and backward_launch choose:
//   attention_simple    any type, any head_dim to 256: float arithmetic; parity, and the last resort
//   attention_mma       bf16, head_dim 16, 32, 64, 128: tensor cores through mma.sync
//   attention_hopper    bf16, or q and k as codes, head_dim 128, on a Hopper: tensor cores through wgmma,
//                       tiles brought by TMA
//   attention_backward_simple, attention_backward_mma: two passes of one kernel (rows stay, columns pass by)
// The forward kernels walk the keys in blocks and keep, for each query row, a bound m of its scores, the sum
// l = Σ exp(score − m) and the output before its division, Σ exp(score − m)·v. Where m grows, l and the
// output are scaled down (blockwise softmax). The two on tensor cores go from the last block to the first:
// only the last can be partial, so masking stays out of the main loop.

#define UNROLL _Pragma("unroll")
#define INLINE static __device__ __forceinline__      // what takes arrays that must stay in registers
static constexpr float LOG2_OF_E = 1.4426950408889634f;

// q, o [q rows, heads·head_dim]; k, v [k rows, ..]; lse [q rows, heads] or NULL; sequence s has the query
// rows [q_start[s], q_start[s+1]) and the key rows [k_start[s], k_start[s+1]), each possibly none.
template <typename A> struct Forward {
    A *o;
    float *lse, *amax;                       // amax: becomes at least max |o|; or NULL
    const A *q, *k, *v;
    const int *q_start, *k_start;
    int heads, head_dim;
    const uint8_t *q_code, *k_code;          // in place of q and k, or NULL
    const float *q_unit, *k_unit;            // what a code is worth
};

INLINE float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

INLINE uint32_t pack_bf16(float low, float high) {                      // two bf16 in one register
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

INLINE uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// The sum, or the maximum, over `lanes` neighbouring threads; all of them get it.
INLINE float lanes_sum(float x, int lanes) {
    for (int step = lanes / 2; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}
INLINE float lanes_max(float x, int lanes) {
    for (int step = lanes / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// ---- any type, any head_dim: float arithmetic ------------------------------------------------------------
// 256 threads as 16 x 16: thread (ty, tx) has rows ty + 16i of a tile and columns tx + 16j of scores,
// features tx + 16f of the output. Rows in shared memory are one float longer than their data: 16 rows'
// columns hit 16 banks. Everything here fits the 99 KB that a block has on cards for desktops.

// to[ROWS][W + 1] = `valid` rows of x (features beyond head_dim, rows beyond valid: 0).
template <int ROWS, int W, typename A>
INLINE void load_rows(float *to, const A *x, size_t stride, int valid, int head_dim) {
    for (int i = threadIdx.x; i < ROWS * W; i += 256) {
        int r = i / W, f = i % W;
        to[r * (W + 1) + f] = r < valid && f < head_dim ? (float)x[r * stride + f] : 0.0f;
    }
}

// s[i][j] = row ty + 16i of a · row tx + 16j of b.
template <int I, int J, int W> INLINE void dot_rows(float (&s)[I][J], const float *a, const float *b) {
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    for (int i = 0; i < I; i++) for (int j = 0; j < J; j++) s[i][j] = 0;
    for (int f = 0; f < W; f++)
        UNROLL for (int i = 0; i < I; i++)
            UNROLL for (int j = 0; j < J; j++)
                s[i][j] = fmaf(a[(ty + 16 * i) * (W + 1) + f], b[(tx + 16 * j) * (W + 1) + f], s[i][j]);
}

// o[i][f] += Σ_n p[row ty + 16i][n] · b[n][tx + 16f]: 32 columns; the row's thread n has p's n and n + 16.
template <int I, int F> INLINE void add_weighted(float (&o)[I][F], const float (&p)[I][2], const float *b) {
    int tx = threadIdx.x % 16;
    UNROLL for (int half = 0; half < 2; half++)
        _Pragma("unroll 4") for (int n = 0; n < 16; n++, b += 16 * F + 1)
            UNROLL for (int i = 0; i < I; i++) {
                float weight = __shfl_sync(~0u, p[i][half], n, 16);
                UNROLL for (int f = 0; f < F; f++) o[i][f] = fmaf(weight, b[tx + 16 * f], o[i][f]);
            }
}

// Grid: (query tiles of 64, heads, sequences), 32 keys at a time. F = head_dim/16, up to a power of two.
template <int F> constexpr size_t simple_bytes(int rows) { return rows * (16 * F + 1) * sizeof(float); }
template <typename A, int F>
static __global__ void __launch_bounds__(256) attention_simple(const Forward<A> a) {
    enum { W = 16 * F };
    extern __shared__ float tile[];
    float *q_tile = tile, *kv_tile = q_tile + 64 * (W + 1);
    int q0 = a.q_start[blockIdx.z] + blockIdx.x * 64, q_rows = a.q_start[blockIdx.z + 1] - q0;
    int k0 = a.k_start[blockIdx.z], k_rows = a.k_start[blockIdx.z + 1] - k0;
    if (q_rows <= 0) return;
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16, head_dim = a.head_dim;
    size_t width = (size_t)a.heads * head_dim, at = (size_t)blockIdx.y * head_dim;
    float scale = rsqrtf((float)head_dim), acc[4][F] = {}, m[4], l[4] = {}, s[4][2];
    for (int i = 0; i < 4; i++) m[i] = -INFINITY;
    load_rows<64, W>(q_tile, a.q + q0 * width + at, width, q_rows, head_dim);
    for (int j = 0; j < k_rows; j += 32) {
        load_rows<32, W>(kv_tile, a.k + (k0 + j) * width + at, width, k_rows - j, head_dim);
        __syncthreads();
        dot_rows<4, 2, W>(s, q_tile, kv_tile);
        UNROLL for (int i = 0; i < 4; i++) {
            for (int n = 0; n < 2; n++) s[i][n] = j + tx + 16 * n < k_rows ? s[i][n] * scale : -INFINITY;
            float top = lanes_max(fmaxf(m[i], fmaxf(s[i][0], s[i][1])), 16), alpha = expf(m[i] - top);
            for (int n = 0; n < 2; n++) s[i][n] = expf(s[i][n] - top);
            m[i] = top;
            l[i] = l[i] * alpha + lanes_sum(s[i][0] + s[i][1], 16);
            for (int f = 0; f < F; f++) acc[i][f] *= alpha;
        }
        __syncthreads();
        load_rows<32, W>(kv_tile, a.v + (k0 + j) * width + at, width, k_rows - j, head_dim);
        __syncthreads();
        add_weighted<4, F>(acc, s, kv_tile);
        __syncthreads();
    }
    UNROLL for (int i = 0; i < 4; i++) {
        size_t row = q0 + ty + 16 * i;
        if (ty + 16 * i >= q_rows) continue;
        UNROLL for (int f = 0; f < F; f++)                              // l = 0: no keys
            if (tx + 16 * f < head_dim)
                a.o[row * width + at + tx + 16 * f] = (A)(l[i] == 0 ? 0.0f : acc[i][f] / l[i]);
        if (a.lse && tx == 0) a.lse[row * a.heads + blockIdx.y] = m[i] + logf(l[i]);
    }
}

// Backward. With P = exp(scores − lse), delta = Σ_features do·o (of a query):
//   dv = P^T·do,  dP = do·v^T,  dS = P·(dP − delta),  dq = dS·k/√head_dim,  dk = dS^T·q/√head_dim.
// One kernel does it twice: rows stay, columns stream past. KEYS false: rows are queries (a1 = q, a2 = do),
// columns are keys (b1 = k, b2 = v), out1 = dq, and delta is made. KEYS true: rows are keys (a1 = k, a2 =
// v), columns are queries (b1 = q, b2 = do), out1 = dk, out2 = dv. One block sums each gradient in a fixed
// order: no atomics, the same bytes every time; the price: scores and dP are computed twice (7 products, not
// 5). With few keys and many queries (text!) the second pass has too few rows to fill the card: the queries
// are cut into `chunks` with float sums of their own (dk's partial[chunk][k rows, width], then dv's).
template <typename A> struct Backward {
    A *out1, *out2;                          // [rows, width]
    float *partial;                          // NULL: one chunk
    const A *a1, *a2, *b1, *b2, *o;
    const float *lse;                        // [q rows, heads], and so is delta
    float *delta;
    const int *row_start, *column_start;
    int heads, head_dim, chunks, chunk_columns;
    size_t rows;                             // of all sequences
};

// What a block works on: grid (row tiles, heads, sequences x chunks).
struct BackwardTile { int head, chunk, row0, rows, column0, columns; };
template <typename A> INLINE BackwardTile backward_tile(const Backward<A> &b, int tile_rows) {
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

// delta of a query, if `in`, by LANES neighbouring threads, V features at a time; kept for the second pass.
template <int LANES, int V, typename A>
INLINE float make_delta(const Backward<A> &b, size_t query, int head, int head_dim, bool in) {
    size_t line = query * b.heads + head;
    float sum = 0, x[V], y[V];
    for (int f = threadIdx.x % LANES * V; in && f < head_dim; f += LANES * V) {
        load(x, b.a2 + line * head_dim + f);
        load(y, b.o + line * head_dim + f);
        for (int j = 0; j < V; j++) sum += x[j] * y[j];
    }
    sum = lanes_sum(sum, LANES);
    if (in && threadIdx.x % LANES == 0) b.delta[line] = sum;
    return sum;
}

// I·16 rows a block: as many as fit shared memory.
template <typename A, int F, bool KEYS>
static __global__ void __launch_bounds__(256, F > 8 ? 2 : 0) attention_backward_simple(const Backward<A> b) {
    enum { W = 16 * F, I = F > 8 ? 1 : 4 };
    extern __shared__ float tile[];
    float *a1 = tile, *a2 = a1 + 16 * I * (W + 1), *b1 = a2 + 16 * I * (W + 1), *b2 = b1 + 32 * (W + 1);
    BackwardTile t = backward_tile(b, 16 * I);
    if (t.rows <= 0) return;
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    size_t width = (size_t)b.heads * b.head_dim, at = (size_t)t.head * b.head_dim;
    float scale = rsqrtf((float)b.head_dim), s[I][2], dp[I][2], acc1[I][F] = {}, acc2[I][F] = {}, delta[I];
    load_rows<16 * I, W>(a1, b.a1 + t.row0 * width + at, width, t.rows, b.head_dim);
    load_rows<16 * I, W>(a2, b.a2 + t.row0 * width + at, width, t.rows, b.head_dim);
    if (!KEYS)
        UNROLL for (int i = 0; i < I; i++)
            delta[i] = make_delta<16, 1>(b, t.row0 + ty + 16 * i, t.head, b.head_dim, ty + 16 * i < t.rows);
    for (int j = 0; j < t.columns; j += 32) {
        size_t from = (size_t)(t.column0 + j) * width + at;
        load_rows<32, W>(b1, b.b1 + from, width, t.columns - j, b.head_dim);
        load_rows<32, W>(b2, b.b2 + from, width, t.columns - j, b.head_dim);
        __syncthreads();
        dot_rows<I, 2, W>(s, a1, b1);
        dot_rows<I, 2, W>(dp, a2, b2);
        UNROLL for (int i = 0; i < I; i++)
            for (int n = 0; n < 2; n++) {
                int row = ty + 16 * i, column = tx + 16 * n;
                bool in = row < t.rows && j + column < t.columns;
                size_t query = (size_t)(KEYS ? t.column0 + j + column : t.row0 + row) * b.heads + t.head;
                s[i][n] = in ? expf(s[i][n] * scale - b.lse[query]) : 0;
                dp[i][n] = in ? s[i][n] * (dp[i][n] - (KEYS ? b.delta[query] : delta[i])) * scale : 0;
            }
        if (KEYS) add_weighted<I, F>(acc2, s, b2);
        add_weighted<I, F>(acc1, dp, b1);
        __syncthreads();
    }
    UNROLL for (int i = 0; i < I; i++)
        UNROLL for (int f = 0; f < F; f++)
            if (ty + 16 * i < t.rows && tx + 16 * f < b.head_dim) {
                size_t to = (t.row0 + ty + 16 * i) * width + at + tx + 16 * f;
                if (KEYS && b.partial) {
                    b.partial[t.chunk * b.rows * width + to] = acc1[i][f];
                    b.partial[(b.chunks + t.chunk) * b.rows * width + to] = acc2[i][f];
                } else {
                    b.out1[to] = (A)acc1[i][f];
                    if (KEYS) b.out2[to] = (A)acc2[i][f];
                }
            }
}

// dk, dv [n] = Σ_chunks partial, in the order of the chunks.
template <typename A>
static __global__ void attention_fold(A *dk, A *dv, const float *partial, int chunks, size_t n) {
    size_t i = thread_index() % n, which = thread_index() / n;
    float sum = 0;
    if (which > 1) return;
    for (int c = 0; c < chunks; c++) sum += partial[(which * chunks + c) * n + i];
    (which ? dv : dk)[i] = (A)sum;
}

// ---- what the kernels on tensor cores share --------------------------------------------------------------
// Accumulators, of mma.sync and wgmma alike: of a slab of 16 rows lane t of a warp holds, for every 8
// columns j, d[4j], d[4j+1] = row t/4, columns 8j + 2(t%4) + {0,1}, and d[4j+2], d[4j+3] = the same columns
// of row t/4 + 8. Packed in pairs they are at once the A operand of the next product (P·V): no shuffle, no
// shared memory. Lane t's two rows are numbered r = 0, 1 below; a row lies in the 4 lanes of a quad.

// The softmax of a block of scores s: P = 2^(s·c + shift), with c = log2(e)/√head_dim and shift = −m·c,
// infinite before the first block. m need not be the maximum, only high enough that P <= 2^LAZY: P is as
// exact in bf16 there as below 1, and o and l share m, so nothing is lost. So the warp VOTES: a thread looks
// at its own scores, and only if one asks for it (mostly in the first block alone) do the lanes exchange the
// exact maxima and raise m. The look is an integer maximum of the floats' bits: the true one if a score is
// >= 0; if all are negative, so is the true one, and shift alone bounds P. A NaN makes P and l NaN.
enum { LAZY = 64 };

// Whether this thread asks for a larger m, so that P stays below 2^LAZY.
template <int N> INLINE bool vote(const float (&shift)[2], const float (&s)[N], float c) {
    bool over = false;
    UNROLL for (int r = 0; r < 2; r++) {
        int top = INT_MIN;
        UNROLL for (int j = 2 * r; j < N; j += 4)
            top = __vimax3_s32(top, __float_as_int(s[j]), __float_as_int(s[j + 1]));
        over |= fmaxf(fmaf(__int_as_float(top), c, shift[r]), shift[r]) > LAZY;
    }
    return over;
}

// After such a vote: m becomes the maximum where it is too small. Earlier sums are to be multiplied by alpha.
template <int N>
INLINE void raise_bound(float (&shift)[2], float (&l)[2], float (&alpha)[2], const float (&s)[N], float c) {
    UNROLL for (int r = 0; r < 2; r++) {
        float top = -INFINITY;
        UNROLL for (int j = 2 * r; j < N; j += 4) top = fmaxf(top, fmaxf(s[j], s[j + 1]));
        top = lanes_max(top, 4);
        float next = fmaf(top, c, shift[r]) <= LAZY ? shift[r] : -top * c;
        alpha[r] = ex2(next - shift[r]);
        l[r] *= alpha[r];
        shift[r] = next;
    }
}

// s becomes P; l gets this lane's part of the row's sum (where SUM), in four chains that hide each other's
// latency.
template <bool SUM, int N>
INLINE void exponentials(float (&s)[N], float (&l)[2], const float (&shift)[2], float c) {
    UNROLL for (int r = 0; r < 2; r++) {
        float sum[4] = {};
        UNROLL for (int j = 2 * r; j < N; j += 8)
            UNROLL for (int e = 0; e < 4; e++) {
                float &v = s[j + e / 2 * 4 + e % 2];
                v = ex2(fmaf(v, c, shift[r]));
                if (SUM) sum[e] += v;
            }
        l[r] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
}

// Store rows `row` and `row + 8` of accumulators d as bf16, row r times scale[r], where row < rows. The quad
// transposes its 4 x 4 words first, so that a lane writes 16 bytes in a row, not 4, and a quad 64, not 16.
template <int HD, int N>
INLINE void store_rows(bf16 *out, size_t stride, int row, int rows, const float (&d)[N], float scale0,
                       float scale1) {
    int t = threadIdx.x % 4;
    UNROLL for (int r = 0; r < 2; r++) {
        bf16 *to = out + (size_t)(row + 8 * r) * stride;
        float scale = r ? scale1 : scale0;
        bool in = row + 8 * r < rows;
        auto word = [&](int i) { return pack_bf16(d[i + 2 * r] * scale, d[i + 2 * r + 1] * scale); };
        if constexpr (HD % 32 == 0) {
            UNROLL for (int g = 0; g < HD / 32; g++) {
                uint32_t w[4];
                UNROLL for (int i = 0; i < 4; i++) w[i] = word(16 * g + 4 * i);
                UNROLL for (int bit = 1; bit <= 2; bit *= 2)           // swap off-diagonal words, then pairs
                    UNROLL for (int i = 0; i < 4; i++)
                        if (!(i & bit)) {
                            uint32_t x = __shfl_xor_sync(~0u, t & bit ? w[i] : w[i + bit], bit);
                            if (t & bit) w[i] = x; else w[i + bit] = x;
                        }
                if (in) *(uint4 *)(to + 32 * g + 8 * t) = make_uint4(w[0], w[1], w[2], w[3]);
            }
        } else {
            UNROLL for (int i = 0; i < HD / 2; i += 4)
                if (in) *(uint32_t *)(to + 2 * i + 2 * t) = word(i);
        }
    }
}

// The end of a slab: o = acc/l and lse of rows `row` and `row + 8`, both < rows, of a tile from query q0 on.
// Accumulators beyond o's hold the products of P with ones: the sums l, in every lane.
template <int HD, int N>
INLINE void store_output(const Forward<bf16> &a, int head, int q0, int row, int rows, const float (&acc)[N],
                         const float (&l)[2], const float (&shift)[2]) {
    size_t width = (size_t)a.heads * HD;
    float sum[2], scale[2];
    UNROLL for (int r = 0; r < 2; r++) {
        if constexpr (N > HD / 2) sum[r] = acc[HD / 2 + 2 * r]; else sum[r] = lanes_sum(l[r], 4);
        scale[r] = sum[r] == 0 ? 0 : 1 / sum[r];                        // 0: no keys
    }
    store_rows<HD>(a.o + q0 * width + head * HD, width, row, rows, acc, scale[0], scale[1]);
    if (a.amax) {
        float best = 0;
        UNROLL for (int i = 0; i < HD / 2; i++) {
            float v[1] = {acc[i] * scale[i / 2 % 2]};
            if (row + i / 2 % 2 * 8 < rows) best = largest<bf16>(best, v);
        }
        raise_maximum(a.amax, best);
    }
    for (int r = 0; r < 2; r++)
        if (a.lse && threadIdx.x % 4 == 0 && row + 8 * r < rows)
            a.lse[(size_t)(q0 + row + 8 * r) * a.heads + head] = (log2f(sum[r]) - shift[r]) / LOG2_OF_E;
}

// ---- bf16: mma.sync --------------------------------------------------------------------------------------
// Tiles in shared memory [rows][HD], brought by cp.async, 16 bytes a piece. Chunk c (16 bytes) of row r lies
// at c ^ (r mod 8), or the like for short rows: ldmatrix reads one chunk of 8 rows, all in different banks.
template <int HD> INLINE uint32_t chunk_at(int r, int c) {
    constexpr int C = HD / 8, ROWS = C < 8 ? 8 / C : 1;                 // chunks in a row, rows in 128 bytes
    return (r * C + (c ^ (r / ROWS % (C < 8 ? C : 8)))) * 16;
}

// Start the copy of ROWS rows by 128 threads, 2048 bytes at a time; rows from `valid` on become 0.
template <int HD, int ROWS> INLINE void copy_rows(uint32_t to, const bf16 *x, size_t stride, int valid) {
    static_assert(ROWS * HD % 1024 == 0, "128 threads copy 2048 bytes at a time");
    int r = threadIdx.x / (HD / 8), c = threadIdx.x % (HD / 8);
    to += chunk_at<HD>(r, c);                // the same every 2048 bytes: there the swizzle begins anew
    x += 8 * c;
    #pragma unroll 2
    for (int n = 0; n < ROWS * HD / 1024; n++, r += 1024 / HD)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :: "r"(to + 2048 * n), "l"(x + (r < valid ? r * stride : 0)), "r"(r < valid ? 16 : 0)
                     : "memory");
}

INLINE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
INLINE void copy_wait()   { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// Four 8 x 8 matrices; lanes 8i..8i+7 give the addresses of matrix i's rows, x[i] is the lane's part of it.
template <bool TRANSPOSED> INLINE void load_matrices(uint32_t (&x)[4], uint32_t address) {
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}

// d[16 x 8] += a[16 x 16]·b[16 x 8]
INLINE void mma(float *d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// s[M slabs of 16][N] = rows row.. of tile a · (N rows of tile b)^T, summed over HD features. Each piece of
// b that is read serves M slabs: with M = 2 a warp computes twice as much for the same traffic. The next 16
// features are 2 chunks on: 32·f xor-ed into the address, which leaves the swizzle as it is.
template <int HD, int M, int N>
INLINE void products_rows(float (&s)[M][N / 2], uint32_t a, int row, uint32_t b) {
    int lane = threadIdx.x % 32;
    // Matrices of a: rows 0-7, 8-15, then the next chunk. Of b: rows 0-7 of both chunks, then rows 8-15, so
    // that each operand B is two neighbouring registers (else the compiler moves 130 registers a block).
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
INLINE void products_columns(float (&o)[M][HD / 2], const float (&p)[M][N / 2], uint32_t b) {
    int lane = threadIdx.x % 32;
    b += chunk_at<HD>(lane % 16, lane / 16);
    UNROLL for (int n = 0; n < N / 16; n++) {
        uint32_t x[M][4], y[4];
        UNROLL for (int i = 0; i < M; i++)
            UNROLL for (int e = 0; e < 4; e++)
                x[i][e] = pack_bf16(p[i][8 * n + 2 * e], p[i][8 * n + 2 * e + 1]);
        UNROLL for (int f = 0; f < HD / 16; f++) {
            load_matrices<true>(y, (b ^ 32 * f) + n * 16 * HD * 2);
            UNROLL for (int i = 0; i < M; i++) {
                mma(&o[i][8 * f], x[i], y[0], y[1]);
                mma(&o[i][8 * f + 4], x[i], y[2], y[3]);
            }
        }
    }
}

// Grid: (query tiles of 128, heads, sequences), 4 warps of 32 queries, blocks of 64 keys, 2 stages of K and
// V: the next block is copied while this one is computed. Q stays in shared memory: o fills the registers.
template <int HD>
static __global__ void __launch_bounds__(128, 2) attention_mma(const Forward<bf16> a) {
    extern __shared__ __align__(128) char raw[];
    enum { BN = 64, KV_BYTES = BN * HD * 2 };
    int q0 = a.q_start[blockIdx.z] + blockIdx.x * 128, q_rows = a.q_start[blockIdx.z + 1] - q0;
    int k0 = a.k_start[blockIdx.z], k_rows = a.k_start[blockIdx.z + 1] - k0;
    if (q_rows <= 0) return;
    size_t width = (size_t)a.heads * HD, at = (size_t)blockIdx.y * HD;
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 32;           // the warp's first row of the tile
    uint32_t q_tile = shared_address(raw), k_tile = q_tile + 128 * HD * 2, v_tile = k_tile + 2 * KV_BYTES;
    const float c = LOG2_OF_E / sqrtf((float)HD);
    float s[2][BN / 2], acc[2][HD / 2] = {}, l[2][2] = {}, alpha[2];
    float shift[2][2] = {{INFINITY, INFINITY}, {INFINITY, INFINITY}};
    int count = blocks(k_rows, BN), first = (count - 1) * BN, left = k_rows - first;     // of the last block
    const bf16 *k = a.k + (k0 + first) * width + at, *v = a.v + (k0 + first) * width + at;
    copy_rows<HD, 128>(q_tile, a.q + q0 * width + at, width, q_rows);
    if (count > 0) {
        copy_rows<HD, BN>(k_tile, k, width, left);
        copy_rows<HD, BN>(v_tile, v, width, left);
    }
    copy_commit();
    uint32_t stage = 0;
    auto block = [&](bool masked, bool more) {
        copy_wait();                         // K and V of this block are here,
        __syncthreads();                     // for all; and all are done with the block before
        if (more) {
            copy_rows<HD, BN>(k_tile + (stage ^ KV_BYTES), k -= BN * width, width, INT_MAX);
            copy_rows<HD, BN>(v_tile + (stage ^ KV_BYTES), v -= BN * width, width, INT_MAX);
        }
        copy_commit();
        products_rows<HD, 2, BN>(s, q_tile, row, k_tile + stage);
        if (masked)
            UNROLL for (int i = 0; i < 2; i++)
                UNROLL for (int e = 0; e < BN / 2; e++)
                    if (e / 4 * 8 + e % 2 + 2 * (lane % 4) >= left) s[i][e] = -INFINITY;
        bool over = vote(shift[0], s[0], c) | vote(shift[1], s[1], c);
        if (__any_sync(~0u, over))
            UNROLL for (int i = 0; i < 2; i++) {
                raise_bound(shift[i], l[i], alpha, s[i], c);
                UNROLL for (int e = 0; e < HD / 2; e++) acc[i][e] *= alpha[e / 2 % 2];
            }
        UNROLL for (int i = 0; i < 2; i++) exponentials<true>(s[i], l[i], shift[i], c);
        products_columns<HD, 2, BN>(acc, s, v_tile + stage);
        stage ^= KV_BYTES;
    };
    if (count > 0) block(true, count > 1);
    for (int j = count - 2; j >= 0; j--) block(false, j > 0);
    copy_wait();
    q0 = a.q_start[blockIdx.z] + blockIdx.x * 128;                      // again: no register keeps them
    q_rows = a.q_start[blockIdx.z + 1] - q0;
    UNROLL for (int i = 0; i < 2; i++)
        store_output<HD>(a, blockIdx.y, q0, row + 16 * i + lane / 4, q_rows, acc[i], l[i], shift[i]);
}

// The backward of above (rows and columns: see attention_backward_simple): 4 warps of M slabs of 16 rows, BN
// columns at a time in 2 stages. P and dS go from accumulators to operands in registers; nothing returns to
// shared memory. M and BN are what the registers hold: sums (two for keys), scores and dP.
template <int HD, bool KEYS> struct BackwardShape {
    enum { M = KEYS && HD == 128 ? 1 : 2, ROWS = 64 * M, BN = HD == 16 ? 64 : 32,
           A_BYTES = ROWS * HD * 2, B_BYTES = BN * HD * 2,
           SHARED = 2 * A_BYTES + 4 * B_BYTES + 4 * BN * 4 };   // rows; 2 stages of columns, lse and delta
};

template <int HD, bool KEYS>
static __global__ void __launch_bounds__(128, HD == 32 ? 3 : 2)
attention_backward_mma(const Backward<bf16> b) {
    extern __shared__ __align__(128) char raw[];
    typedef BackwardShape<HD, KEYS> Shape;
    enum { M = Shape::M, BN = Shape::BN, A_BYTES = Shape::A_BYTES, B_BYTES = Shape::B_BYTES };
    BackwardTile t = backward_tile(b, Shape::ROWS);
    if (t.rows <= 0) return;
    uint32_t a1 = shared_address(raw), a2 = a1 + A_BYTES, b1 = a2 + A_BYTES, b2 = b1 + 2 * B_BYTES;
    float *column_lse = (float *)(raw + 2 * A_BYTES + 4 * B_BYTES), *column_delta = column_lse + 2 * BN;
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
    copy_rows<HD, Shape::ROWS>(a1, b.a1 + t.row0 * width + at, width, t.rows);
    copy_rows<HD, Shape::ROWS>(a2, b.a2 + t.row0 * width + at, width, t.rows);
    copy_columns(0);
    float row_lse[M][2] = {}, row_delta[M][2] = {}, s[M][BN / 2], dp[M][BN / 2];
    float acc1[M][HD / 2] = {}, acc2[M][HD / 2] = {};
    if (!KEYS)
        UNROLL for (int i = 0; i < M; i++)
            UNROLL for (int r = 0; r < 2; r++) {
                int mine = row + 16 * i + lane / 4 + 8 * r;
                size_t query = t.row0 + mine;
                bool in = mine < t.rows;
                row_lse[i][r] = in ? b.lse[query * b.heads + t.head] * LOG2_OF_E : INFINITY;
                row_delta[i][r] = make_delta<4, 8>(b, query, t.head, HD, in);
            }
    for (int j = 0; j * BN < t.columns; j++) {
        copy_wait();
        __syncthreads();
        copy_columns(j + 1);
        if (row >= t.rows) continue;                                    // a warp without rows only copies
        uint32_t stage = j % 2 * B_BYTES;
        products_rows<HD, M, BN>(s, a1, row, b1 + stage);
        products_rows<HD, M, BN>(dp, a2, row, b2 + stage);
        int left = t.columns - j * BN - 2 * (lane % 4), mine = j % 2 * BN + 2 * (lane % 4);
        if (!KEYS && left < BN)                                         // the last block: it may be partial
            UNROLL for (int i = 0; i < M * BN / 2; i++)
                if (i % (BN / 2) / 4 * 8 + i % 2 >= left) s[i / (BN / 2)][i % (BN / 2)] = -INFINITY;
        UNROLL for (int i = 0; i < M; i++)
            UNROLL for (int e = 0; e < BN / 2; e++) {
                int column = e / 4 * 8 + e % 2, r = e / 2 % 2;
                float p = ex2(s[i][e] * c - (KEYS ? column_lse[mine + column] : row_lse[i][r]));
                s[i][e] = p;
                dp[i][e] = p * (dp[i][e] - (KEYS ? column_delta[mine + column] : row_delta[i][r]));
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

// ---- bf16 on Hopper: wgmma and TMA -----------------------------------------------------------------------
// The words of this kernel:
//   mbarrier      counts arrivals, in shared memory. When all that its phase waits for have come, the phase
//                 is over and the next begins. One waits for a phase by its parity (0, 1, 0, ..); before the
//                 first is over, parity 1 counts as over: a producer that begins with 1 finds stages empty
//   expect_tx     an arrival that adds bytes to what the phase waits for; a copy takes them off as they land
//   TMA           copies a box of a tensor for the one thread that asks; a tensor map describes both
//   wgmma         a product, by 4 warps, that runs beside them: sums in registers, tiles in shared memory
//   descriptor    64 bits that tell wgmma where a tile lies and how
//   commit group  the wgmmas since the last commit; one waits until at most so many groups are still running
//   setmaxnreg    returns registers of a warpgroup, or takes what another has returned
//   proxy         a way to memory; TMA's and wgmma's is not that of ordinary stores: a fence joins the two
// One block fills an SM: one thread of warpgroup 0 loads; warpgroups 1..3 compute, each on 64 query rows of
// its own, all on the same blocks of BN keys. Registers: 128·32 + 384·160 = 65,536, all there are; who
// computes needs 64 for o, BN/2 for S, BN/4 for P and about 25 more: hence BN = 80. K and V have 4 stages.
// Inside a warpgroup the exponentials of a block run beside the products of its neighbours, the next block's
// scores and the last one's P·V (blocks are numbered in the order they are taken; S(j) = q·k^T):
//     tensor cores  | S(0) |            | S(1) | P·V(0)     | S(2) | P·V(1)     | S(3) | P·V(2)     ...
//     ALU           |      | softmax(0) |      | softmax(1) |      | softmax(2) |      | softmax(3) ...
// and the three warpgroups fill each other's gaps.
// A tile in shared memory has rows of 128 bytes (64 numbers), so head_dim 128 is two panels [rows][64], one
// after the other; 16-byte chunk c of row r lies at c ^ (r % 8), as TMA writes and wgmma reads (128-byte
// swizzle). Behind the tiles lie the barriers. FULL: the copy has landed; EMPTY: all readers are done. Q's
// are per warpgroup: each goes on to its next tile alone.
// E is what q and k are made of: bf16, or codes, whose S takes half the time: rows of 128 bytes then, so one
// panel, and c holds what a score of codes is worth. P·V stays bf16: the tensor core adds products of codes
// with 13 bits, which is enough for 128 features and wrong for 80,640 keys. With codes the ALU is what is
// short, and the sums l come from the tensor core, too: V has a third panel, of ones.
// 512 keys (a text) fill 8 blocks of 64, but 6.4 of 80: then BN is 64.
enum { WARPGROUPS = 3, HOPPER_ROWS = 64 * WARPGROUPS, HOPPER_THREADS = 128 * (WARPGROUPS + 1) };
enum { KV_RING = 4, K_FULL = 0, K_EMPTY = KV_RING, V_FULL = 2 * KV_RING, V_EMPTY = 3 * KV_RING,
       Q_FULL = 4 * KV_RING, Q_EMPTY = Q_FULL + WARPGROUPS, BARRIERS = Q_EMPTY + WARPGROUPS };
template <typename Element, int KEYS> struct Hopper {
    typedef Element E;
    enum { BN = KEYS, PANELS = sizeof(E), CODES = PANELS == 1,          // of q and k
           Q_PANEL = 64 * 128, K_PANEL = BN * 128, Q_BYTES = PANELS * Q_PANEL, K_BYTES = PANELS * K_PANEL,
           V_BYTES = 2 * BN * 128, V_STAGE = V_BYTES + CODES * BN * 128,
           SHARED = 1024 + WARPGROUPS * Q_BYTES + KV_RING * (K_BYTES + V_STAGE) + 8 * BARRIERS };
    typedef float Output[CODES ? 68 : 64];                              // of a thread: o, and l of 2 rows
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
struct HopperShared { uint32_t q, k, v, bar; };
INLINE void barrier_init(const HopperShared &at, int first, int n, int arrivals) {
    for (int i = first; i < first + n; i++)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(at.bar + 8 * i), "r"(arrivals));
}
INLINE void barrier_arrive(const HopperShared &at, int i) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(at.bar + 8 * i) : "memory");
}
INLINE void barrier_wait(const HopperShared &at, int i, int parity) {
    asm volatile("{ .reg .pred p;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra done;\n bra again;\n done: }" :: "r"(at.bar + 8 * i), "r"(parity) : "memory");
}

// Start the copy of a box [2 panels][rows][64] from rows `row`.. of one head; barrier i counts its bytes.
INLINE void tma_load(const HopperShared &at, uint32_t to, const CUtensorMap *map, int row, int head, int i,
                     int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(at.bar + 8 * i), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %2, %4}], [%5];"
                 :: "r"(to), "l"(map), "r"(0), "r"(row), "r"(head), "r"(at.bar + 8 * i) : "memory");
}

INLINE void wgmma_fence()  { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `pending` groups run. The sums pass through, so that no use of them moves above the wait.
template <int N> INLINE void wgmma_wait(float (&d)[N], int pending) {
    if (pending) asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    else         asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    UNROLL for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i]) :: "memory");
}

// The descriptor of a tile: address, step from panel to panel (read for V alone, whose rows are the summed
// dimension), step from 8 rows to the next 8 (1024), all three in units of 16 bytes; 1: 128-byte swizzle.
INLINE uint64_t wgmma_tile(uint32_t address, int panel_bytes) {
    return (uint64_t)((address & 0x3FFFF) >> 4) | (uint64_t)(panel_bytes >> 4) << 16
         | (uint64_t)(1024 >> 4) << 32 | 1ull << 62;
}

#define D8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
                 "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define R32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24," \
            "%25,%26,%27,%28,%29,%30,%31"
#define R40 R32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define R64 R40 ",%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61," \
            "%62,%63"
#define D64(d) D8(d, 0), D8(d, 8), D8(d, 16), D8(d, 24), D8(d, 32), D8(d, 40), D8(d, 48), D8(d, 56)
// d[64 x BN] = a[64 x 32 bytes]·b[BN x 32 bytes]^T, or += where add; a and b are descriptors.
template <typename E> INLINE void wgmma_qk(float (&d)[32], uint64_t a, uint64_t b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {" R32 "}, %32, %33, p, 1, 1; }"
                 : D8(d, 0), D8(d, 8), D8(d, 16), D8(d, 24) : "l"(a), "l"(b), "r"(add));
}
template <typename E> INLINE void wgmma_qk(float (&d)[40], uint64_t a, uint64_t b, int add) {
    if constexpr (sizeof(E) == 2)
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %42, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 "
                     "{" R40 "}, %40, %41, p, 1, 1, 0, 0; }"
                     : D8(d, 0), D8(d, 8), D8(d, 16), D8(d, 24), D8(d, 32) : "l"(a), "l"(b), "r"(add));
    else
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %42, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n80k32.f32.e4m3.e4m3 {" R40 "}, %40, %41, p, 1, 1; }"
                     : D8(d, 0), D8(d, 8), D8(d, 16), D8(d, 24), D8(d, 32) : "l"(a), "l"(b), "r"(add));
}

// d[64 x 128] = a[64 x 16]·b[16 x 128], or += where add; a in registers, b's descriptor (1: transposed).
INLINE void wgmma_pv(float (&d)[64], const uint32_t *a, uint64_t b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{" R64 "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1; }"
                 : D64(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

// The same with 8 columns more, those of the ones.
INLINE void wgmma_pv(float (&d)[68], const uint32_t *a, uint64_t b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %73, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n136k16.f32.bf16.bf16 "
                 "{" R64 ",%64,%65,%66,%67}, {%68,%69,%70,%71}, %72, p, 1, 1, 1; }"
                 : D64(d), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

// S of a block: 4 steps of 32 bytes in each panel.
template <typename H> INLINE void products_qk(float (&s)[H::BN / 2], uint64_t q, uint64_t k) {
    wgmma_fence();
    UNROLL for (int i = 0; i < 4 * H::PANELS; i++)
        wgmma_qk<typename H::E>(s, q + i / 4 * (H::Q_PANEL / 16) + i % 4 * 2,
                                k + i / 4 * (H::K_PANEL / 16) + i % 4 * 2, i > 0);
    wgmma_commit();
}

// P·V of a block: BN/16 steps of 16 keys, 16 rows of 128 bytes apart.
template <int N, int M> INLINE void products_pv(float (&o)[N], const uint32_t (&p)[M], uint64_t v, int add) {
    wgmma_fence();
    UNROLL for (int i = 0; i < M / 4; i++) wgmma_pv(o, p + 4 * i, v + i * (16 * 128 / 16), i > 0 || add);
    wgmma_commit();
}

// Tile number -> head, sequence, rows. Query tiles run fastest, then sequences, then heads: all SMs work on
// the same K and V at the same time, which therefore come from L2. A tile past its sequence's end has rows
// of the next: such keys get P = 0, such queries are not stored (so all of K and V must be finite).
struct HopperTile { int head, q0, q_rows, k0, k_rows; };
INLINE HopperTile hopper_tile(int tile, int tiles_per_head, const Forward<bf16> &a) {
    HopperTile t;
    t.head = tile / tiles_per_head;
    tile -= t.head * tiles_per_head;
    int s = 0;
    for (int n; tile >= (n = blocks(a.q_start[s + 1] - a.q_start[s], HOPPER_ROWS)); s++) tile -= n;
    t.q0 = a.q_start[s] + tile * HOPPER_ROWS;
    t.q_rows = a.q_start[s + 1] - t.q0;                                 // rows from q0 to the sequence's end
    t.k0 = a.k_start[s];
    t.k_rows = a.k_start[s + 1] - t.k0;
    return t;
}

// Where a loop over the stages stands; the parity flips with every round.
struct Ring { int stage, parity; };
INLINE void next_stage(Ring &r) {
    if (++r.stage == KV_RING) r.stage = 0, r.parity ^= 1;
}

// The tiles stand at multiples of 1024 bytes. A copy arrives at FULL once, each warp that has read at EMPTY.
template <typename H> INLINE HopperShared hopper_shared(const char *raw) {
    HopperShared at;
    at.q = (shared_address(raw) + 1023) & ~1023u;
    at.k = at.q + WARPGROUPS * H::Q_BYTES;
    at.v = at.k + KV_RING * H::K_BYTES;
    at.bar = at.v + KV_RING * H::V_STAGE;
    enum { WORDS = H::BN * 32 };
    for (int i = threadIdx.x; H::CODES && i < KV_RING * WORDS; i += HOPPER_THREADS)        // V's ones
        asm volatile("st.shared.b32 [%0], %1;" :: "r"(at.v + i / WORDS * H::V_STAGE + H::V_BYTES
                                                      + i % WORDS * 4), "r"(0x3F803F80) : "memory");
    if (threadIdx.x == 0) {
        barrier_init(at, K_FULL, KV_RING, 1);
        barrier_init(at, V_FULL, KV_RING, 1);
        barrier_init(at, Q_FULL, WARPGROUPS, 1);
        barrier_init(at, K_EMPTY, KV_RING, 4 * WARPGROUPS);
        barrier_init(at, V_EMPTY, KV_RING, 4 * WARPGROUPS);
        barrier_init(at, Q_EMPTY, WARPGROUPS, 4);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    asm volatile("fence.proxy.async;" ::: "memory");
    __syncthreads();
    return at;
}

// The producer, one thread: as far ahead of the consumers as stages are empty.
template <typename H>
INLINE void hopper_load(const HopperShared &at, const Forward<bf16> &a, int tiles, int tiles_per_head,
                        const CUtensorMap *map_q, const CUtensorMap *map_k, const CUtensorMap *map_v) {
    enum { BN = H::BN };
    Ring r = {0, 1};
    int q_parity = 1;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        HopperTile t = hopper_tile(tile, tiles_per_head, a);
        int last = blocks(t.k_rows, BN) - 1;
        for (int j = last; j >= 0; j--) {
            int row = t.k0 + j * BN, i = r.stage;
            barrier_wait(at, K_EMPTY + i, r.parity);
            tma_load(at, at.k + i * H::K_BYTES, map_k, row, t.head, K_FULL + i, H::K_BYTES);
            if (j == last) {
                for (int w = 0; w < WARPGROUPS; w++) {
                    barrier_wait(at, Q_EMPTY + w, q_parity);
                    tma_load(at, at.q + w * H::Q_BYTES, map_q, t.q0 + 64 * w, t.head, Q_FULL + w, H::Q_BYTES);
                }
                q_parity ^= 1;
            }
            barrier_wait(at, V_EMPTY + i, r.parity);
            tma_load(at, at.v + i * H::V_STAGE, map_v, row, t.head, V_FULL + i, H::V_BYTES);
            next_stage(r);
        }
    }
}

// Consumer warpgroup wg: 64 query rows of every tile of this block. V runs one block of keys behind K.
template <typename H>
INLINE void hopper_compute(const HopperShared &at, const Forward<bf16> &a, int tiles, int tiles_per_head,
                           int wg) {
    enum { BN = H::BN };
    int lane = threadIdx.x % 32, row = 64 * wg + threadIdx.x % 128 / 32 * 16 + lane / 4, q_parity = 0;
    float c = LOG2_OF_E * 0.08838834764831845f;                         // log2(e)/√128
    if (H::CODES) c *= *a.q_unit * *a.k_unit;
    uint64_t q = wgmma_tile(at.q + wg * H::Q_BYTES, 0);
    uint64_t k0 = wgmma_tile(at.k, 0), v0 = wgmma_tile(at.v, BN * 128);
    Ring k = {0, 0}, v = {0, 0};
    float s[BN / 2];
    typename H::Output acc;
    uint32_t p[BN / 4];
    auto start_scores = [&] {
        barrier_wait(at, K_FULL + k.stage, k.parity);
        products_qk<H>(s, q, k0 + k.stage * (H::K_BYTES / 16));
    };
    auto end_scores = [&](int pending, bool last) {
        wgmma_wait(s, pending);
        if (lane == 0) barrier_arrive(at, K_EMPTY + k.stage);
        if (lane == 0 && last) barrier_arrive(at, Q_EMPTY + wg);
        next_stage(k);
    };
    auto start_output = [&](int add) {
        barrier_wait(at, V_FULL + v.stage, v.parity);
        products_pv(acc, p, v0 + v.stage * (H::V_STAGE / 16), add);
    };
    auto end_output = [&] {
        wgmma_wait(acc, 0);
        if (lane == 0) barrier_arrive(at, V_EMPTY + v.stage);
        next_stage(v);
    };
    auto pack = [&] {
        UNROLL for (int i = 0; i < BN / 4; i++) p[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
    };
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        HopperTile t = hopper_tile(tile, tiles_per_head, a);
        int count = blocks(t.k_rows, BN), left = t.k_rows - (count - 1) * BN - 2 * (lane % 4);
        float shift[2] = {INFINITY, INFINITY}, l[2] = {}, alpha[2];
        if (count > 0) {
            barrier_wait(at, Q_FULL + wg, q_parity);                    // the last block: it may be partial
            q_parity ^= 1;
            start_scores();
            end_scores(0, count == 1);
            if (left < BN)
                UNROLL for (int i = 0; i < BN / 2; i++)
                    if (i / 4 * 8 + i % 2 >= left) s[i] = -INFINITY;
            raise_bound(shift, l, alpha, s, c);
            exponentials<!H::CODES>(s, l, shift, c);
            pack();
            for (int j = count - 2; j >= 0; j--) {
                start_scores();
                start_output(j < count - 2);
                end_scores(1, j == 0);                                  // P·V still runs
                bool raised = __any_sync(~0u, vote(shift, s, c));
                if (raised) raise_bound(shift, l, alpha, s, c);
                exponentials<!H::CODES>(s, l, shift, c);
                end_output();
                pack();
                if (raised) UNROLL for (float &x : acc) x *= alpha[(&x - acc) / 2 % 2];
            }
            start_output(count > 1);
            end_output();
        } else {
            UNROLL for (float &x : acc) x = 0;                          // a query without keys gives 0
        }
        store_output<128>(a, t.head, t.q0, row, t.q_rows, acc, l, shift);
    }
}

template <typename H> static __global__ void __launch_bounds__(HOPPER_THREADS, 1)
attention_hopper(const Forward<bf16> a, int tiles, int tiles_per_head,
                 const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
                 const __grid_constant__ CUtensorMap map_v) {
    extern __shared__ char raw[];
    HopperShared at = hopper_shared<H>(raw);
    int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);             // in a register that the warp shares
    if (warpgroup == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
        if (threadIdx.x == 0) hopper_load<H>(at, a, tiles, tiles_per_head, &map_q, &map_k, &map_v);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
        hopper_compute<H>(at, a, tiles, tiles_per_head, warpgroup - 1);
    }
}
#else                                        // for other cards: never launched
template <typename H> static __global__ void
attention_hopper(const Forward<bf16>, int, int, const __grid_constant__ CUtensorMap,
                 const __grid_constant__ CUtensorMap, const __grid_constant__ CUtensorMap) {}
#endif

// Whether this program has the kernel for this card: elsewhere its body is empty and needs few registers.
static bool hopper_usable(void) {
    cudaFuncAttributes kernel;
    cuda_check(cudaFuncGetAttributes(&kernel, attention_hopper<Hopper<bf16, 80>>));
    return kernel.numRegs >= 100;
}

// The map of x[rows, heads·128] with boxes of [panels][box_rows][128 bytes]; past the end come zeros.
template <typename E> static CUtensorMap tensor_map(const E *x, int rows, int heads, int box_rows) {
    const cuuint32_t panels = sizeof(E), wide = 128 / panels;           // features in a panel
    static decltype(&cuTensorMapEncodeTiled) encode = NULL;             // from the driver: no -lcuda
    cudaDriverEntryPointQueryResult found;
    if (!encode)
        cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void **)&encode, 12000,
                                                    cudaEnableDefault, &found));
    CUtensorMap map;
    cuuint64_t dims[4] = {wide, (cuuint64_t)rows, panels, (cuuint64_t)heads};
    cuuint64_t strides[3] = {(cuuint64_t)heads * 128 * panels, 128, 128 * panels};  // bytes; dims[0] is dense
    cuuint32_t box[4] = {wide, (cuuint32_t)box_rows, panels, 1}, step[4] = {1, 1, 1, 1};
    CUtensorMapDataType type = panels == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    CUresult e = encode(&map, type, 4, (void *)x, dims, strides, box, step,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (e != CUDA_SUCCESS) die("attention: no tensor map for %d x %d heads (error %d)", rows, heads, (int)e);
    return map;
}

// ---- which kernel, and its launch ------------------------------------------------------------------------
template <typename A, int F> static void simple_forward(const Forward<A> &a, const Sequences *s) {
    dim3 grid(blocks(longest(s->q, s->count), 64), a.heads, s->count);
    LAUNCH_SHARED((attention_simple<A, F>), grid, 256, simple_bytes<F>(64 + 32), a);
}

template <int HD> static void mma_forward(const Forward<bf16> &a, const Sequences *s) {
    dim3 grid(blocks(longest(s->q, s->count), 128), a.heads, s->count);
    LAUNCH_SHARED(attention_mma<HD>, grid, 128, (128 + 4 * 64) * HD * 2, a);        // Q, 2 stages of K and V
}

template <typename H>
static void hopper_launch(const Forward<bf16> &a, const void *q, const void *k, const Sequences *s) {
    typedef typename H::E E;
    int per_head = 0, q_rows = s->q[s->count], k_rows = s->k[s->count], most = gpu.card.multiProcessorCount;
    for (int i = 0; i < s->count; i++) per_head += blocks(s->q[i + 1] - s->q[i], HOPPER_ROWS);
    int tiles = per_head * a.heads;
    LAUNCH_SHARED(attention_hopper<H>, tiles < most ? tiles : most, HOPPER_THREADS, H::SHARED, a, tiles,
                  per_head, tensor_map((const E *)q, q_rows, a.heads, 64),
                  tensor_map((const E *)k, k_rows, a.heads, H::BN), tensor_map(a.v, k_rows, a.heads, H::BN));
}

static void hopper_forward(const Forward<bf16> &a, const Sequences *s) {
    if (!a.q_code) hopper_launch<Hopper<bf16, 80>>(a, a.q, a.k, s);
    else if (longest(s->k, s->count) > 512) hopper_launch<Hopper<uint8_t, 80>>(a, a.q_code, a.k_code, s);
    else hopper_launch<Hopper<uint8_t, 64>>(a, a.q_code, a.k_code, s);
}

static bool codes_attend(int head_dim) { return gpu.half && head_dim == 128 && hopper_usable(); }

template <typename A> static void forward_launch(const Forward<A> &a, const Sequences *s) {
    int hd = a.head_dim;
    if (!s->count || !s->q[s->count]) return;
    if (hd > 256) die("attention: head_dim %d; this backend has kernels up to 256", hd);
    auto simple_launch = hd <= 16 ? simple_forward<A, 1> : hd <= 32 ? simple_forward<A, 2>
                       : hd <= 64 ? simple_forward<A, 4> : hd <= 128 ? simple_forward<A, 8>
                       : simple_forward<A, 16>, launch = simple_launch;
    if constexpr (sizeof(A) == 2)
        if (aligned(8, 8, a.o, a.q, a.k, a.v))
            launch = hd == 128 && s->k[s->count] && hopper_usable() ? hopper_forward
                   : hd == 128 ? mma_forward<128> : hd == 64 ? mma_forward<64>
                   : hd == 32 ? mma_forward<32> : hd == 16 ? mma_forward<16> : launch;
    launch(a, s);
    if (a.amax && launch == simple_launch)
        absmax(a.amax, (const act *)a.o, (size_t)s->q[s->count] * a.heads * hd);
}

static void attention_forward(act *o, float *lse, float *amax, Factor q, Factor k, const act *v,
                              const Sequences *s, int heads, int head_dim) {
    if (amax) zero(amax, sizeof(float));
    BY_TYPE(Forward<A> a = {(A *)o, lse, amax, (const A *)q.x, (const A *)k.x, (const A *)v, s->q_device,
                            s->k_device, heads, head_dim, q.code, k.code, q.unit, k.unit};
            forward_launch(a, s));
}

template <typename A, int F, bool KEYS>
static void simple_backward(const Backward<A> &b, int longest_row, int count) {
    const int rows = F > 8 ? 16 : 64;
    dim3 grid(blocks(longest_row, rows), b.heads, count * b.chunks);
    LAUNCH_SHARED((attention_backward_simple<A, F, KEYS>), grid, 256, simple_bytes<F>(2 * rows + 2 * 32), b);
}

template <int HD, bool KEYS> static void mma_backward(const Backward<bf16> &b, int longest_row, int count) {
    dim3 grid(blocks(longest_row, BackwardShape<HD, KEYS>::ROWS), b.heads, count * b.chunks);
    LAUNCH_SHARED((attention_backward_mma<HD, KEYS>), grid, 128, (BackwardShape<HD, KEYS>::SHARED), b);
}

template <bool KEYS, typename A>
static void backward_launch(const Backward<A> &b, int longest_row, int count, bool wide) {
    int hd = b.head_dim;
    auto launch = hd <= 16 ? simple_backward<A, 1, KEYS> : hd <= 32 ? simple_backward<A, 2, KEYS>
                : hd <= 64 ? simple_backward<A, 4, KEYS> : hd <= 128 ? simple_backward<A, 8, KEYS>
                : simple_backward<A, 16, KEYS>;
    if constexpr (sizeof(A) == 2)
        if (wide)
            launch = hd == 128 ? mma_backward<128, KEYS> : hd == 64 ? mma_backward<64, KEYS>
                   : hd == 32 ? mma_backward<32, KEYS> : hd == 16 ? mma_backward<16, KEYS> : launch;
    launch(b, longest_row, count);
}

// Chunks of queries so that about 1,000 blocks sum dk and dv: a number that does not depend on the card.
static int query_chunks(const Sequences *s, int heads) {
    int work = 0, most = blocks(longest(s->q, s->count), 256);
    for (int i = 0; i < s->count; i++) work += blocks(s->k[i + 1] - s->k[i], 64) * heads;
    int chunks = work ? blocks(1024, work) : 1;
    chunks = chunks < most ? chunks : most;
    return chunks > 1 ? chunks : 1;
}

template <typename A>
static void backward_passes(A *dq, A *dk, A *dv, const A *dout, const A *q, const A *k, const A *v,
                            const A *o, const float *lse, const Sequences *s, int heads, int head_dim) {
    if (!s->count) return;
    size_t width = (size_t)heads * head_dim, q_rows = s->q[s->count], k_rows = s->k[s->count];
    size_t n = (q_rows * heads + 3) / 4 * 4;
    int long_q = longest(s->q, s->count), long_k = longest(s->k, s->count), chunks = query_chunks(s, heads);
    int chunk_queries = blocks(blocks(long_q, chunks), 64) * 64;
    float *delta = (float *)scratch((n + (chunks > 1 ? 2 * chunks * k_rows * width : 0)) * sizeof(float));
    float *partial = chunks > 1 ? delta + n : NULL;                     // then there are keys
    bool wide = aligned(8, 8, dq, dk, dv, dout, q, k, v, o);
    Backward<A> by_query = {dq, NULL, NULL, q, dout, k, v, o, lse, delta, s->q_device, s->k_device, heads,
                            head_dim, 1, INT_MAX, q_rows};
    Backward<A> by_key = {dk, dv, partial, k, v, q, dout, o, lse, delta, s->k_device, s->q_device, heads,
                          head_dim, chunks, chunk_queries, k_rows};
    if (q_rows) backward_launch<false>(by_query, long_q, s->count, wide);
    if (k_rows) backward_launch<true>(by_key, long_k, s->count, wide);
    size_t n_keys = k_rows * width;
    if (partial) LAUNCH(attention_fold<A>, blocks(2 * n_keys, 256), 256, dk, dv, partial, chunks, n_keys);
}

static void attention_backward(act *dq, act *dk, act *dv, const act *dout, const act *q, const act *k,
                               const act *v, const act *o, const float *lse, const Sequences *s, int heads,
                               int head_dim) {
    BY_TYPE(backward_passes((A *)dq, (A *)dk, (A *)dv, (const A *)dout, (const A *)q, (const A *)k,
                            (const A *)v, (const A *)o, lse, s, heads, head_dim));
}
