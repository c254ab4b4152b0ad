// Kernels of ShiftAddNAS: the add operator y = -sum |x - w| on GPU and CPU.
// One file, three builds, a plain C interface; shiftaddnas.py builds and loads them.
//
//   gpu      nvcc -O3 -std=c++17 -arch=sm_90 -shared -Xcompiler -fPIC kernels.cu -o gpu.so
//   cpu      g++ -x c++ -O3 -march=native -std=c++20 -fopenmp -shared -fPIC kernels.cu -o cpu.so
//            (AVX-512, AVX2 or 4 lanes of any CPU, as the -m flags allow; without -fopenmp one thread)
//   emulate  the cpu command and -DEMULATE: the code of the GPU kernels on CPU threads, a test without a GPU
//
//   function            definition             formula
//   add_conv2d_forward  add_definition         y[n,m,i,j] = -sum |x[n,c,iS+u-P,jS+v-P] - w[m,c,u,v]|
//   add_conv2d_grad_x   add_grad_x_definition  gx = sum of g clip(w - x, -1, 1) over the y that read x
//   ..._f64 (cpu)                              float64: the definitions themselves
//
// x (N,C,H,W), w (M,C/G,KH,KW), y and g (N,M,Ho,Wo), gx as x; contiguous, float32 unless said; padding reads
// x = 0. A NaN or infinity reaches exactly the results that depend on it. The last argument is the number of
// threads (cpu, emulate) or the cudaStream_t (gpu). A function returns 0, or a status for status_text.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

struct ConvShape { int32_t N, C, H, W, M, KH, KW, S, P, G, Ho, Wo; };

#ifdef __CUDACC__
#define BOTH __host__ __device__
static int clear(float* gx, int64_t size, int64_t stream) {
    return cudaMemsetAsync(gx, 0, size * sizeof(float), (cudaStream_t)stream);
}
extern "C" const char* status_text(int status) { return cudaGetErrorString((cudaError_t)status); }
#else
#define BOTH
static int clear(float* gx, int64_t size, int64_t) { std::fill_n(gx, size, 0.0f); return 0; }
extern "C" const char* status_text(int status) { return status ? "memory refused by the system" : "ok"; }
#endif
template <class T> BOTH constexpr T ceil_div(T a, int b) { return (a + b - 1) / b; }
static int64_t inputs(const ConvShape& s) { return (int64_t)s.N * s.C * s.H * s.W; }
static int64_t weights(const ConvShape& s) { return (int64_t)s.M * (s.C / s.G) * s.KH * s.KW; }

// ============================================================ definition
//
// The operator and its gradient for x in plain loops: the float64 path, and what tests compare kernels with.

// Calls visit(q, p) for each result pixel q = (i, j) and the input pixel p = (iS + u - P, jS + v - P) that it
// reads through tap (u, v). Pixels of the padding are left out.
template <class Visit> BOTH inline void each_pair(const ConvShape& s, int u, int v, Visit visit) {
    const int first = s.P > v ? ceil_div(s.P - v, s.S) : 0, inside = ceil_div(s.W + s.P - v, s.S);
    const int end = inside < s.Wo ? inside : s.Wo;
    for (int i = 0; i < s.Ho; ++i) {
        const int row = i * s.S + u - s.P;
        if (row < 0 || row >= s.H) continue;
        for (int j = first; j < end; ++j) visit(i * s.Wo + j, row * s.W + j * s.S + v - s.P);
    }
}

// y[n,m,q] = -sum_k |seen[q] - w[m,k]| for image n and the filters m of group g. k counts taps (c, u, v);
// seen is the map that the result pixels see through tap k, 0 in the padding.
template <class T>
static void add_definition(T* y, const T* x, const T* w, const ConvShape& s, int64_t n, int64_t g) {
    const int area = s.KH * s.KW, Cg = s.C / s.G, Mg = s.M / s.G, size = s.Ho * s.Wo;
    std::fill_n(y + (n * s.M + g * Mg) * size, (int64_t)Mg * size, T(0));
    for (int k = 0; k < Cg * area; ++k) {
        const T* map = x + (n * s.C + g * Cg + k / area) * s.H * s.W;
        std::vector<T> seen(size);
        each_pair(s, k % area / s.KW, k % s.KW, [&](int q, int p) { seen[q] = map[p]; });
        for (int64_t m = g * Mg; m < (g + 1) * Mg; ++m) {
            T* result = y + (n * s.M + m) * size;
            const T weight = w[m * Cg * area + k];
            for (int q = 0; q < size; ++q) result[q] -= std::abs(seen[q] - weight);
        }
    }
}

// gx[n,c,p] = sum of g[n,m,q] clip(w[m,c,u,v] - x[n,c,p], -1, 1) over the filters m of the group and the
// pairs (q, p) of each tap (u, v). NaN stays NaN.
template <class T> static void add_grad_x_definition(T* gx, const T* g, const T* x, const T* w,
                                                     const ConvShape& s, int64_t n, int64_t c) {
    const int area = s.KH * s.KW, Cg = s.C / s.G, Mg = s.M / s.G, size = s.Ho * s.Wo;
    const int64_t map = (n * s.C + c) * s.H * s.W;
    std::fill_n(gx + map, s.H * s.W, T(0));
    for (int k = 0; k < area; ++k) {
        std::vector<T> seen(size), sum(size);
        each_pair(s, k / s.KW, k % s.KW, [&](int q, int p) { seen[q] = x[map + p]; });
        for (int64_t m = c / Cg * Mg; m < (c / Cg + 1) * Mg; ++m) {
            const T* result = g + (n * s.M + m) * size;
            const T weight = w[(m * Cg + c % Cg) * area + k];
            for (int q = 0; q < size; ++q) {
                const T d = weight - seen[q];
                sum[q] += result[q] * (std::abs(d) > 1 ? std::copysign(T(1), d) : d);
            }
        }
        each_pair(s, k / s.KW, k % s.KW, [&](int q, int p) { gx[map + p] += sum[q]; });
    }
}

// ============================================================ one geometry for both passes
//
// Both passes gather. Pixel (a, b) of channel o in group g of the result is a sum over the taps k = (c, u, v)
// of that group: source[n, g C + c, a S + row0 + u, b S + col0 + v], which is 0 outside the H x W map, meets
// w[w_first + g w_group + o w_out + c w_in + u w_row + v w_col].
struct Gather {
    int N = 1, G = 1;                           // images, groups
    int C = 1, H = 1, W = 1;                    // source: channels a group, rows and columns of a map
    int S = 1, row0 = 0, col0 = 0;              // source: stride, place of tap (0, 0) of result pixel (0, 0)
    int KH = 1, KW = 1;                         // taps: rows and columns
    int M = 1, A = 1, B = 1;                    // result: channels a group, rows and columns to compute
    int step = 1, row = 0, col = 0;             // result: pixel (a, b) lies at (a step + row, b step + col)
    int width = 1;                              // result: columns of a whole map
    int64_t image = 0, channel = 0;             // result: distance of images, of channels
    int64_t w_group = 0, w_out = 0, w_in = 0;   // weight: distance of groups, result and source channels
    int64_t w_row = 0, w_col = 0, w_first = 0;  // weight: distance of rows, columns; place of tap 0

    BOTH int taps() const { return C * KH * KW; }
    BOTH int64_t pixels() const { return (int64_t)N * A * B; }
};

// Forward: the result is y, the source x.
static Gather forward_gather(const ConvShape& s) {
    Gather a;
    a.N = s.N, a.G = s.G;
    a.C = s.C / s.G, a.M = s.M / s.G;
    a.H = s.H, a.W = s.W;
    a.S = s.S, a.row0 = a.col0 = -s.P;
    a.KH = s.KH, a.KW = s.KW;
    a.A = s.Ho, a.B = s.Wo;
    a.width = s.Wo;
    a.channel = (int64_t)s.Ho * s.Wo, a.image = s.M * a.channel;
    a.w_col = 1, a.w_row = s.KW;
    a.w_in = s.KH * s.KW, a.w_out = a.C * a.w_in;
    a.w_group = a.M * a.w_out;
    return a;
}

// Gradient: the result is gx, the source g. The pixels of gx with one residue (row, col) mod S meet the same
// taps, (u0 + S b, v0 + S d). So they gather g at stride 1, with that part of w read backwards.
static Gather grad_x_gather(const ConvShape& s, int row, int col) {
    const int u0 = (row + s.P) % s.S, v0 = (col + s.P) % s.S;
    Gather a;
    a.N = s.N, a.G = s.G;
    a.C = s.M / s.G, a.M = s.C / s.G;
    a.H = s.Ho, a.W = s.Wo;
    a.KH = u0 < s.KH ? ceil_div(s.KH - u0, s.S) : 0;
    a.KW = v0 < s.KW ? ceil_div(s.KW - v0, s.S) : 0;
    a.row0 = (row + s.P) / s.S - a.KH + 1;
    a.col0 = (col + s.P) / s.S - a.KW + 1;
    a.A = a.KH && row < s.H ? std::min(ceil_div(s.H - row, s.S), s.Ho - a.row0) : 0;  // that some y reads
    a.B = a.KW && col < s.W ? std::min(ceil_div(s.W - col, s.S), s.Wo - a.col0) : 0;
    a.step = s.S, a.row = row, a.col = col;
    a.width = s.W;
    a.channel = (int64_t)s.H * s.W, a.image = s.C * a.channel;
    a.w_col = -s.S, a.w_row = -s.S * s.KW;
    a.w_out = s.KH * s.KW, a.w_in = a.M * a.w_out;
    a.w_group = a.C * a.w_in;
    a.w_first = (u0 + s.S * (a.KH - 1)) * s.KW + v0 + s.S * (a.KW - 1);
    return a;
}

// The clip of the kernels below drops NaN. They restore a NaN in x; a NaN in weight k is written
// here, afterwards, to every pixel that the weight meets.
BOTH inline void mark_nan_weight(float* gx, const float* w, const ConvShape& s, int64_t k) {
    if (w[k] == w[k]) return;
    const int Cg = s.C / s.G, area = s.KH * s.KW;
    const int64_t c = k / (Cg * area) / (s.M / s.G) * Cg + k / area % Cg;
    for (int64_t n = 0; n < s.N; ++n) {
        float* map = gx + (n * s.C + c) * s.H * s.W;
        each_pair(s, k % area / s.KW, k % s.KW, [=](int, int p) { map[p] = w[k]; });
    }
}

#if defined(__CUDACC__) || defined(EMULATE)
// ============================================================ gpu and emulate builds
//
// A kernel is a sequence of EACH_THREAD statements, each with a barrier behind it. Here thread t of a block
// squares t and then takes the square of its neighbour:
//
//     SHARED int squares[THREADS];                       // one array of the block
//     PRIVATE(int, mine, );                              // one int for each thread; MINE(mine) is that of t
//     EACH_THREAD squares[t] = t * t;
//     EACH_THREAD MINE(mine) = squares[(t + 1) % THREADS];
//
// On the GPU, EACH_THREAD runs the statement for t = threadIdx.x, then __syncthreads(); MINE(mine) is a
// register. Emulated, it is a loop over all t, and MINE(mine) element t of an array.
constexpr int THREADS = 256, TM = 64, TK = 16, DEPTH = 4;  // a step: TM channels, TK taps
#ifdef __CUDACC__
#define DEVICE static __device__ inline
#define KERNEL static __global__ void __launch_bounds__(THREADS, 2)
#define SHARED __shared__
#define EACH_THREAD for (int t = threadIdx.x, go = 1; go; go = 0, __syncthreads())
#define PRIVATE(type, name, size) type name size
#define MINE(name) name
#define UNROLL _Pragma("unroll")
#define BLOCK int(blockIdx.x)
// *p if it is real, else 0. A plain `if` compiles to a branch, which serialises the loads.
DEVICE float read(const float* p, bool real) {
    float value;
    asm("{ .reg .pred q; setp.ne.s32 q, %2, 0; mov.f32 %0, 0f00000000; @q ld.global.nc.f32 %0, [%1]; }"
        : "=f"(value) : "l"(p), "r"(int(real)));
    return value;
}
DEVICE void store_four(float* p, const float* y) { *(float4*)p = *(const float4*)y; }
template <class... P, class... A>
static int launch(void (*kernel)(P...), int64_t blocks, int64_t stream, A... a) {
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    if (blocks) kernel<<<unsigned(blocks), THREADS, 0, (cudaStream_t)stream>>>(a...);
    return cudaGetLastError();
}
#else
static thread_local int BLOCK;
static float read(const float* p, bool real) { return real ? *p : 0; }
static void store_four(float* p, const float* y) { std::copy(y, y + 4, p); }
static float __saturatef(float a) { return a > 0 ? a < 1 ? a : 1 : 0; }
#define DEVICE static inline
#define KERNEL static void
#define SHARED
#define EACH_THREAD for (int t = 0; t < THREADS; ++t)
#define PRIVATE(type, name, size) type name[THREADS] size
#define MINE(name) name[t]
#define UNROLL
template <class... P, class... A>
static int launch(void (*kernel)(P...), int64_t blocks, int64_t threads, A... a) {
#pragma omp parallel for num_threads(int(threads))
    for (int64_t block = 0; block < blocks; ++block) {
        BLOCK = int(block);
        kernel(a...);
    }
    return 0;
}
#endif

// One term of the sum for source value v, weight b and, in grad, the x of the result pixel.
// Forward it takes two FADD: the absolute value is free. In grad, clip(d, -1, 1) = sat(d) - sat(-d) takes two
// FADD.SAT, FADD and FFMA. 2 sat(d/2 + 1/2) - 1 would take two fewer, but loses the digits of small d.
template <bool grad> DEVICE float term(float v, float b, float own) {
    return grad ? v * (__saturatef(b - own) - __saturatef(own - b)) : -fabsf(v - b);
}
// A tap: offsets in source and weight, row and column in the kernel. Past the last, u is outside every map.
struct alignas(16) Tap { int source, w, u, v; };
DEVICE Tap tap_of(int k, const Gather& a) {
    const int c = k / (a.KH * a.KW), u = k / a.KW % a.KH, v = k % a.KW;
    const int w = int(c * a.w_in + u * a.w_row + v * a.w_col + a.w_first);
    return {(c * a.H + u) * a.W + v, w, k < a.taps() ? u : INT32_MIN / 2, v};
}
// Pixel (i, j) of image n. A block divides once in 64 bits, for its first pixel; its threads in 32 bits.
struct Pixel { int64_t n; int i, j; };
DEVICE Pixel pixel_after(int64_t n, int r, const Gather& a) {  // r pixels after the first of image n
    const int rest = r % (a.A * a.B);
    return {n + r / (a.A * a.B), rest / a.B, rest % a.B};
}
DEVICE int64_t result_at(const Pixel& p, int channel, const Gather& a) {
    const int64_t line = (int64_t)(p.i * a.step + a.row) * a.width;
    return p.n * a.image + channel * a.channel + line + p.j * a.step + a.col;
}
// Where tap (0, 0, 0) of a pixel in group g lies in the source
struct Place { const float* from; int row, col; };
DEVICE Place place_of(const Pixel& p, int g, bool real, const float* source, const Gather& a) {
    const int row = p.i * a.S + a.row0, col = p.j * a.S + a.col0;
    return {source + ((p.n * a.G + g) * a.C * a.H + row) * a.W + col, real ? row : INT32_MIN / 2, col};
}
DEVICE bool in_map(const Place& p, int u, int v, const Gather& a) {
    return unsigned(p.row + u) < unsigned(a.H) && unsigned(p.col + v) < unsigned(a.W);
}
// Thread t makes 4 channels and R pixels of its block's tile: 4 and, 64 further, 4 (no bank is asked twice).
DEVICE int pixel_of(int t, int r) { return t % 16 * 4 + r % 4 + r / 4 * 64; }

// out = sum_k term(source_k, w_k, x). Blocks count pixel tiles fastest, then channel tiles, then groups. A
// step of TK taps lies in shared memory and gives a thread TK * 4 R terms, while next_* load the next step.
template <bool grad, int R>
KERNEL add_kernel(float* out, const float* source, const float* w, const float* x, Gather a,
                  int pixel_tiles, int channel_tiles) {
    constexpr int TP = 16 * R;
    SHARED alignas(16) float xs[TK][TP];
    SHARED alignas(16) float ws[TK][TM + 4];
    SHARED Tap taps[TK];
    PRIVATE(float, acc, [4][R]); PRIVATE(float, own, [4][R]);
    PRIVATE(float, next_x, [R]); PRIVATE(float, next_w, [4]);
    PRIVATE(Place, place, );
    const int g = BLOCK / pixel_tiles / channel_tiles, m0 = BLOCK / pixel_tiles % channel_tiles * TM;
    const int64_t q0 = (int64_t)(BLOCK % pixel_tiles) * TP, n0 = q0 / (a.A * a.B);
    const int r0 = int(q0 - n0 * (a.A * a.B)), count = int(a.pixels() - q0 < TP ? a.pixels() - q0 : TP);
    EACH_THREAD {
        MINE(place) = place_of(pixel_after(n0, r0 + t % TP, a), g, t % TP < count, source, a);
        if (t < TK) taps[t] = tap_of(t, a);
    }
    UNROLL for (int r = 0; r < R; ++r) EACH_THREAD {  // a barrier each: 32 loads at once spill
        const int channel = m0 + t / 16 * 4;
        const int64_t at = result_at(pixel_after(n0, r0 + pixel_of(t, r), a), g * a.M + channel, a);
        UNROLL for (int f = 0; f < 4; ++f) {
            MINE(acc)[f][r] = MINE(own)[f][r] = 0;
            if (grad && pixel_of(t, r) < count && channel + f < a.M) MINE(own)[f][r] = x[at + f * a.channel];
        }
    }
    for (int k0 = -TK; k0 < a.taps(); k0 += TK) {
        EACH_THREAD {
            UNROLL for (int r = 0; r < R; ++r) {
                const Tap k = taps[t / TP + r * (THREADS / TP)];
                MINE(next_x)[r] = read(MINE(place).from + k.source, in_map(MINE(place), k.u, k.v, a));
            }
            const Tap k = taps[t % TK];
            UNROLL for (int r = 0; r < 4; ++r) {
                const int m = m0 + t / TK + r * (THREADS / TK);
                MINE(next_w)[r] = read(w + (g * a.w_group + m * a.w_out + k.w), k.u >= 0 && m < a.M);
            }
            UNROLL for (int k = 0; k < (k0 < 0 ? 0 : TK); ++k)
                UNROLL for (int r = 0; r < 4 * R; ++r) {
                    const float v = xs[k][pixel_of(t, r % R)], b = ws[k][t / 16 * 4 + r / R];
                    MINE(acc)[r / R][r % R] += term<grad>(v, b, MINE(own)[r / R][r % R]);
                }
        }
        EACH_THREAD {
            UNROLL for (int r = 0; r < R; ++r) xs[t / TP + r * (THREADS / TP)][t % TP] = MINE(next_x)[r];
            UNROLL for (int r = 0; r < 4; ++r) ws[t % TK][t / TK + r * (THREADS / TK)] = MINE(next_w)[r];
            if (t < TK) taps[t] = tap_of(k0 + 2 * TK + t, a);
        }
    }
    EACH_THREAD UNROLL for (int r = 0; r < R; r += 4) {
        const int channel = m0 + t / 16 * 4, first = pixel_of(t, r);
        const auto at = [&](int l) {
            return result_at(pixel_after(n0, r0 + first + l, a), g * a.M + channel, a);
        };
        alignas(16) float y[4][4];
        UNROLL for (int f = 0; f < 4; ++f) UNROLL for (int l = 0; l < 4; ++l) {
            const float x0 = MINE(own)[f][r + l];
            y[f][l] = x0 == x0 ? MINE(acc)[f][r + l] : x0;
        }
        if (first + 4 <= count && at(3) == at(0) + 3 && (at(0) | a.channel) % 4 == 0) {
            UNROLL for (int f = 0; f < 4; ++f)
                if (channel + f < a.M) store_four(out + at(0) + f * a.channel, y[f]);
        } else {
            UNROLL for (int l = 0; l < 4; ++l) UNROLL for (int f = 0; f < 4; ++f)
                if (first + l < count && channel + f < a.M) out[at(l) + f * a.channel] = y[f][l];
        }
    }
}

// The same for one channel a group, where most of a tile would be empty. A thread makes one pixel of DEPTH
// images, which share its taps: n, n + images, ...
template <bool grad>
KERNEL add_depthwise_kernel(float* out, const float* source, const float* w, const float* x, Gather a,
                            int pixel_tiles, int images) {
    const int g = BLOCK / pixel_tiles;
    const int64_t q0 = (int64_t)(BLOCK % pixel_tiles) * THREADS, n0 = q0 / (a.A * a.B);
    const int64_t map = (int64_t)images * a.G * a.H * a.W, result = images * a.image;
    EACH_THREAD {
        const Pixel pixel = pixel_after(n0, int(q0 - n0 * (a.A * a.B)) + t, a);
        const Place place = place_of(pixel, g, pixel.n < images, source, a);
        const int64_t at = result_at(pixel, g, a);
        float own[DEPTH], sum[DEPTH];
        bool real[DEPTH];
        UNROLL for (int d = 0; d < DEPTH; ++d) {
            real[d] = pixel.n < images && pixel.n + d * images < a.N;
            own[d] = read(grad ? x + at + d * result : x, grad && real[d]);
            sum[d] = 0;
        }
        for (int u = 0; u < a.KH; ++u)
            for (int v = 0; v < a.KW; ++v) {
                const float b = w[g * a.w_group + u * a.w_row + v * a.w_col + a.w_first];
                const bool inside = in_map(place, u, v, a);
                UNROLL for (int d = 0; d < DEPTH; ++d) {
                    const float value = read(place.from + (u * a.W + v) + d * map, inside && real[d]);
                    sum[d] += term<grad>(value, b, own[d]);
                }
            }
        UNROLL for (int d = 0; d < DEPTH; ++d)
            if (real[d]) out[at + d * result] = own[d] == own[d] ? sum[d] : own[d];
    }
}

KERNEL mark_nan_kernel(float* gx, const float* w, ConvShape s, int64_t count) {
    EACH_THREAD {
        const int64_t k = (int64_t)BLOCK * THREADS + t;
        if (k < count) mark_nan_weight(gx, w, s, k);
    }
}
static int mark_nan_weights(float* gx, const float* w, const ConvShape& s, int64_t stream) {
    return launch(mark_nan_kernel, ceil_div(weights(s), THREADS), stream, gx, w, s, weights(s));
}

template <bool grad> static int add(float* out, const float* source, const float* w, const float* x,
                                    const Gather& a, int64_t stream) {
    constexpr int R = grad ? 4 : 8;
    if (a.C == 1 && a.M == 1) {
        const int images = ceil_div(a.N, DEPTH);
        const int64_t tiles = ceil_div((int64_t)images * a.A * a.B, THREADS), blocks = tiles * a.G;
        return launch(add_depthwise_kernel<grad>, blocks, stream, out, source, w, x, a, int(tiles), images);
    }
    const int channel_tiles = ceil_div(a.M, TM);
    const int64_t tiles = ceil_div(a.pixels(), 16 * R), blocks = tiles * channel_tiles * a.G;
    return launch(add_kernel<grad, R>, blocks, stream, out, source, w, x, a, int(tiles), channel_tiles);
}

#else
// ============================================================ cpu build
#include <cfloat>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif

#ifdef __x86_64__
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
// LANES: floats of a vector. MR, CR: channels of a tile in forward and grad_x, as many as registers hold.
#ifdef __AVX512DQ__
constexpr int LANES = 16, MR = 8, CR = 4;
#elif defined(__AVX2__)
#define MM(op) _mm256_##op
constexpr int LANES = 8, MR = 5, CR = 2;
#elif defined(__aarch64__)
constexpr int LANES = 4, MR = 8, CR = 4;
#else
#define MM(op) _mm_##op
constexpr int LANES = 4, MR = 5, CR = 2;
#endif
constexpr int PV = 2, PW = PV * LANES;     // vectors, pixels of a panel
constexpr int ROWS = LANES / 2;            // rows of a depthwise tile
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#pragma clang fp contract(fast)            // as GCC: acc + a * b becomes an FMA
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
template <class V = vec> static inline V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
static inline vec splat(float a) { return a - vec{}; }
// *p in every lane. As an integer: the broadcast of a float to 512 bits takes an arithmetic port on Zen 4.
static inline vec spread(const float* p) { return (vec)(load<int32_t>(p) - ivec{}); }
// The value of a, unknown to the compiler. A factor 1 hidden this way makes acc + m an FMA, which runs on
// other ports than max and sub: twice the speed.
static inline vec opaque(vec a) {
#ifdef __AVX2__
    asm("" : "+v"(a));
#endif
    return a;
}
static inline vec vabs(vec a) { return (vec)((ivec)a & 0x7fffffff); }
static inline vec vmax(vec a, vec b) {     // b if a is NaN
#ifdef __aarch64__
    return (vec)vmaxnmq_f32((float32x4_t)a, (float32x4_t)b);
#else
    return a > b ? a : b;
#endif
}
static inline vec clip(vec a) {            // to [-1, 1]; NaN to an end of it
#ifdef __AVX512DQ__
    return _mm512_range_ps(a, splat(1), 2);
#elif defined(__x86_64__)
    return MM(min_ps)(MM(max_ps)(a, splat(-1)), splat(1));
#else
    const vec low = vmax(a, splat(-1));
    return low < 1 ? low : splat(1);
#endif
}

// Calls work(job, thread) for every job in [0, jobs) on torch's own OpenMP team: a second pool would fight
// its idle workers, which spin, for the cores. One job writes each result: the thread count changes no bit.
template <class Work> static void parallel(int64_t jobs, int threads, Work work) {
    [[maybe_unused]] const int64_t chunk = std::max<int64_t>(1, jobs / (64 * threads));
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads) if (threads > 1 && jobs > 1)
    for (int64_t job = 0; job < jobs; ++job) work(job, omp_get_thread_num());
}

static bool side_by_side(const int64_t* place, int n) {
    bool run = true;
    for (int l = 1; l < n; ++l) run &= place[l] == place[0] + l;
    return run;
}

// The PW result pixels from pixel q on
struct Pixels {
    int64_t at[PW];            // place in channel 0 of the result
    int64_t from[PW];          // place of tap (0, 0, 0) in the source
    ivec row[PV], col[PV];     // its row and column
    int count;                 // pixels that exist
    bool run;                  // they lie side by side in the result

    Pixels(const Gather& a, int64_t q) : count(int(std::min<int64_t>(PW, a.pixels() - q))) {
        int64_t n = q / (a.A * a.B);
        int i = int(q / a.B % a.A), j = int(q % a.B);
        for (int l = 0; l < PW; ++l) {
            const int u = l < count ? i * a.S + a.row0 : -a.KH;  // a pixel past the end lies outside the map
            const int v = j * a.S + a.col0;
            row[l / LANES][l % LANES] = u, col[l / LANES][l % LANES] = v;
            from[l] = (n * a.G * a.C * a.H + u) * a.W + v;
            at[l] = n * a.image + (int64_t)(i * a.step + a.row) * a.width + j * a.step + a.col;
            if (++j == a.B) j = 0, ++i;
            if (i == a.A) i = 0, ++n;
        }
        run = count == PW && side_by_side(at, PW);
    }
    template <class Copy> void each_run(Copy copy) const {  // copy(lane, bytes) by runs of the result
        if (run) copy(0, PW * sizeof(float));
        else for (int l = 0; l < count; ++l) copy(l, sizeof(float));
    }
};

struct alignas(64) Row { float lane[PW]; };  // one tap of a panel of pixels
// panel[k] = tap k of the pixels in group g, 0 past the end; panel[taps] = the sum of these rows
static void pack(Row* panel, const float* source, const Gather& a, int g, const Pixels& pixels) {
    const int64_t plane = (int64_t)a.H * a.W, end = plane * a.N * a.G * a.C;
    const int area = a.KH * a.KW;
    for (int q = 0; q < PV; ++q) {
        const ivec row = pixels.row[q], col = pixels.col[q];
        const int64_t* from = pixels.from + q * LANES;
        const bool run = side_by_side(from, LANES);
        vec sum{};
        for (int t = 0; t < area; ++t) {
            const int u = t / a.KW, v = t % a.KW;
            const int64_t tap = plane * a.C * g + u * a.W + v, first = from[0] + tap;
            const ivec inside = (row >= -u) & (row < a.H - u) & (col >= -v) & (col < a.W - v);
            const bool vector = run && first >= 0 && first + (a.C - 1) * plane + LANES <= end;
            for (int c = 0; c < a.C; ++c) {
                const float* p = source + tap + c * plane;
                vec x;
                if (vector) x = load(p + from[0]);
                else for (int l = 0; l < LANES; ++l) x[l] = inside[l] ? p[from[l]] : 0;
                x = (vec)((ivec)x & inside);
                sum += x;
                store(panel[c * area + t].lane + q * LANES, x);
            }
        }
        store(panel[a.taps()].lane + q * LANES, sum);
    }
}

// The weights as rows of taps: (G, M, taps). Those of the forward pass lie so already.
static std::vector<float> lay_rows(const float* w, const Gather& a, int threads) {
    std::vector<float> rows((int64_t)a.G * a.M * a.taps());
    parallel((int64_t)a.G * a.M, threads, [&](int64_t channel, int) {
        const float* from = w + channel / a.M * a.w_group + channel % a.M * a.w_out + a.w_first;
        float* to = rows.data() + channel * a.taps();
        for (int c = 0; c < a.C; ++c)
            for (int u = 0; u < a.KH; ++u)
                for (int v = 0; v < a.KW; ++v) *to++ = from[c * a.w_in + u * a.w_row + v * a.w_col];
    });
    return rows;
}

// In a linear layer pixels and filters can exchange their roles: then a panel's results lie side by side.
static bool exchangeable(const Gather& a) {
    const bool linear = std::max({a.G, a.H, a.W, a.A, a.B, a.KH, a.KW}) == 1 && a.row0 == 0 && a.col0 == 0;
    return linear && a.M >= 2 * PW;
}
// The source is then w: forward, its rows are images of one pixel; in the gradient, its columns are one map.
static Gather exchanged(const Gather& a, bool grad) {
    Gather b;
    b.C = a.C;
    b.M = a.N, b.channel = a.M;
    if (grad) b.W = b.B = b.width = a.M;
    else b.N = a.M, b.image = 1;
    return b;
}

// Packs the pixels panel by panel. compute(channel, rows, panel, result[R][PW]) makes R channels of `out` or,
// at the end of a group, fewer. Before, `result` holds those of `in`, if any. A job is 64 such tiles.
template <int R, class Compute> static void add_panels(float* out, const float* source, const float* in,
                                                       const Gather& a, int threads, Compute compute) {
    const int K = a.taps(), chunks = ceil_div(a.M, 64 * R);
    std::vector<Row> work(threads * (K + 1));
    parallel(ceil_div(a.pixels(), PW) * chunks, threads, [&](int64_t job, int thread) {
        Row* panel = work.data() + thread * (K + 1);
        const Pixels pixels(a, job / chunks * PW);
        const int start = int(job % chunks) * 64 * R, end = std::min(a.M, start + 64 * R);
        for (int g = 0; g < a.G; ++g) {
            pack(panel, source, a, g, pixels);
            for (int o = start; o < end; o += R) {
                const int rows = std::min(R, end - o);
                const int64_t channel = (int64_t)g * a.M + o;
                alignas(64) float result[R][PW];
                if (in) std::memset(result, 0, sizeof result);
                for (int r = 0; in && r < rows; ++r) pixels.each_run([&](int l, int bytes) {
                    std::memcpy(result[r] + l, in + (channel + r) * a.channel + pixels.at[l], bytes);
                });
                compute(channel, rows, panel, result);
                for (int r = 0; r < rows; ++r) pixels.each_run([&](int l, int bytes) {
                    std::memcpy(out + (channel + r) * a.channel + pixels.at[l], result[r] + l, bytes);
                });
            }
        }
    });
}

// acc[r][q] = sum_k term(vector q of panel[k], w[r][k], r, q); the last of `rows` rows of w is repeated
template <int R, class Term> static inline void tile_sums(vec (&acc)[R][PV], const Row* panel, const float* w,
                                                          int rows, int K, Term term) {
    const float* row[R];
    for (int r = 0; r < R; ++r) row[r] = w + (int64_t)std::min(r, rows - 1) * K;
    UNROLL for (int r = 0; r < R * PV; ++r) acc[r / PV][r % PV] = vec{};
    for (int k = 0; k < K; ++k, ++panel) {
        vec x[PV];
        UNROLL for (int q = 0; q < PV; ++q) x[q] = opaque(load(panel->lane + q * LANES));
        UNROLL for (int r = 0; r < R; ++r) {
            const vec b = spread(row[r] + k);
            UNROLL for (int q = 0; q < PV; ++q) acc[r][q] += term(x[q], b, r, q);
        }
    }
}

// y = -sum_k |x - w| = sum x + sum w - 2 sum max(x, w). Where y is not finite or small beside sum |w| (x and
// w share an offset or nearly agree), the tile is computed again, from |x - w|.
static void add_forward(float* y, const float* x, const float* w, Gather a, int threads) {
    if (exchangeable(a)) {
        std::swap(x, w);
        a = exchanged(a, false);
    }
    const int K = a.taps();
    std::vector<float> sum_w((int64_t)a.G * a.M), abs_w(sum_w.size());
    parallel(sum_w.size(), threads, [&](int64_t channel, int) {
        const float* row = w + channel * K;
        vec sum{}, size{};
        int k = 0;
        for (; k + LANES <= K; k += LANES) sum += load(row + k), size += vabs(load(row + k));
        for (; k < K; ++k) sum[0] += row[k], size[0] += std::fabs(row[k]);
        for (int l = 0; l < LANES; ++l) sum_w[channel] += sum[l], abs_w[channel] += size[l];
    });
    add_panels<MR>(y, x, nullptr, a, threads, [&](int64_t channel, int rows, const Row* panel, auto& result) {
        const float* tile_w = w + channel * K;
        const vec one = opaque(splat(1));
        vec acc[MR][PV];
        tile_sums(acc, panel, tile_w, rows, K, [=](vec x, vec b, int, int) { return vmax(b, x) * one; });
        ivec bad{};
        UNROLL for (int r = 0; r < MR; ++r) UNROLL for (int q = 0; q < PV; ++q) {
            const int64_t m = channel + std::min(r, rows - 1);
            acc[r][q] = 2 * acc[r][q] - sum_w[m] - load(panel[K].lane + q * LANES);
            bad |= ~((8 * acc[r][q] >= splat(abs_w[m])) & (acc[r][q] <= splat(FLT_MAX)));
        }
        for (int l = 1; l < LANES; ++l) bad[0] |= bad[l];
        const auto distance = [=](vec x, vec b, int, int) { return vabs(x - b) * one; };
        if (bad[0]) tile_sums(acc, panel, tile_w, rows, K, distance);
        UNROLL for (int r = 0; r < MR; ++r) UNROLL for (int q = 0; q < PV; ++q)
            store(result[r] + q * LANES, -acc[r][q]);
    });
}

// gx = sum_k g clip(w - x, -1, 1). Every other difference is an FMA, b * one - x, which fills all ports.
template <bool exchanged> static void add_grad_x(float* gx, const float* source, const float* x,
                                                 const float* w, const Gather& a, int threads) {
    const int K = a.taps();
    add_panels<CR>(gx, source, x, a, threads, [&](int64_t channel, int rows, const Row* panel, auto& result) {
        const vec one = opaque(splat(1));
        vec own[CR][PV], acc[CR][PV];
        UNROLL for (int c = 0; c < CR; ++c) UNROLL for (int q = 0; q < PV; ++q)
            own[c][q] = opaque(load(result[c] + q * LANES));
        tile_sums(acc, panel, w + channel * K, rows, K, [&](vec v, vec b, int c, int q) {
            if (exchanged) std::swap(v, b);
            return v * clip((q % 2 ? b * one : b) - own[c][q]);
        });
        UNROLL for (int c = 0; c < CR; ++c) UNROLL for (int q = 0; q < PV; ++q)
            store(result[c] + q * LANES, own[c][q] == own[c][q] ? acc[c][q] : own[c][q]);
    });
}

// Both passes of depthwise layers, in tiles of ROWS x LANES pixels. The source map is copied with its padding
// and its columns sorted by residue mod S: what a tap reads for pixels side by side lies side by side.
template <bool grad> static void add_depthwise(float* out, const float* source, const float* w,
                                               const float* x, const Gather& a, int threads) {
    const int taps = a.taps(), rows = (a.A - 1) * a.S + a.KH, columns = (a.B - 1) * a.S + a.KW;
    const int width = ceil_div(columns, a.S) + LANES;
    const int64_t pitch = (int64_t)a.S * a.S * width, size = rows * a.S * width + ROWS * pitch;
    const std::vector<float> weight = lay_rows(w, a, 1);
    std::vector<float> work(threads * size);
    std::vector<int> place(std::max(columns, a.KW));  // of column c in a row of the copy
    std::vector<int64_t> tap(taps);                   // of tap k in the copy
    for (int c = 0; c < int(place.size()); ++c) place[c] = c % a.S * width + c / a.S;
    for (int k = 0; k < taps; ++k) tap[k] = (int64_t)k / a.KW * a.S * width + place[k % a.KW];
    const int top = std::max(0, a.row0), left = std::max(0, -a.col0), right = std::min(a.W - a.col0, columns);
    const vec one = opaque(splat(1));
    parallel((int64_t)a.N * a.G, threads, [&](int64_t p, int thread) {
        float* plane = work.data() + thread * size;
        for (int i = top; i < std::min(a.H, rows + a.row0); ++i) {
            const float* from = source + (p * a.H + i) * a.W + a.col0;
            float* to = plane + (int64_t)(i - a.row0) * a.S * width;
            int c = left;
            for (; a.S == 1 && c + LANES <= right; c += LANES) store(to + c, load(from + c));
            for (; c < right; ++c) to[place[c]] = from[c];
        }
        for (int i = 0; i < a.A; i += ROWS)
            for (int j = 0; j < a.B; j += LANES) {
                const int count = std::min(LANES, a.B - j), height = std::min(ROWS, a.A - i);
                const bool whole = count == LANES && a.step == 1;
                const int64_t line = (int64_t)a.width * a.step;
                const int64_t at = p * a.channel + (int64_t)a.row * a.width + i * line + j * a.step + a.col;
                vec own[ROWS] = {}, acc[ROWS] = {};
                for (int r = 0; grad && r < height; ++r)
                    if (whole) own[r] = load(x + at + r * line);
                    else for (int l = 0; l < count; ++l) own[r][l] = x[at + r * line + l * a.step];
                for (int k = 0; k < taps; ++k) {
                    const float b = weight[p % a.G * taps + k];
                    const float* from = plane + i * pitch + tap[k] + j;
                    UNROLL for (int r = 0; r < ROWS; ++r) {
                        const vec value = load(from + r * pitch);
                        if (grad) acc[r] += value * clip(b - own[r]);
                        else acc[r] -= vabs(value - b) * one;
                    }
                }
                for (int r = 0; r < height; ++r) {
                    const vec y = own[r] == own[r] ? acc[r] : own[r];
                    if (whole) store(out + at + r * line, y);
                    else for (int l = 0; l < count; ++l) out[at + r * line + l * a.step] = y[l];
                }
            }
    });
}

static int mark_nan_weights(float* gx, const float* w, const ConvShape& s, int64_t) {
    for (int64_t k = 0; k < weights(s); ++k) mark_nan_weight(gx, w, s, k);
    return 0;
}

template <bool grad> static int add(float* out, const float* source, const float* w, const float* x,
                                    const Gather& a, int64_t where) try {
    const int threads = int(where);
    if (a.pixels() == 0) return 0;
    if (a.C == 1 && a.M == 1) add_depthwise<grad>(out, source, w, x, a, threads);
    else if (!grad) add_forward(out, source, w, a, threads);
    else if (exchangeable(a)) add_grad_x<true>(out, w, x, source, exchanged(a, true), threads);
    else add_grad_x<false>(out, source, x, lay_rows(w, a, threads).data(), a, threads);
    return 0;
} catch (const std::exception&) { return -1; }  // memory

// float64: the definitions. A job makes the channels of a group of y, or a channel of gx.
extern "C" int add_conv2d_forward_f64(double* y, const double* x, const double* w, const ConvShape* s,
                                      int64_t threads) {
    parallel((int64_t)s->N * s->G, int(threads),
             [&](int64_t job, int) { add_definition(y, x, w, *s, job / s->G, job % s->G); });
    return 0;
}
extern "C" int add_conv2d_grad_x_f64(double* gx, const double* g, const double* x, const double* w,
                                     const ConvShape* s, int64_t threads) {
    parallel((int64_t)s->N * s->C, int(threads),
             [&](int64_t job, int) { add_grad_x_definition(gx, g, x, w, *s, job / s->C, job % s->C); });
    return 0;
}
#endif

extern "C" int add_conv2d_forward(float* y, const float* x, const float* w, const ConvShape* s,
                                  int64_t where) {
    return add<false>(y, x, w, x, forward_gather(*s), where);
}

extern "C" int add_conv2d_grad_x(float* gx, const float* g, const float* x, const float* w,
                                 const ConvShape* s, int64_t where) {
    int status = s->S > 1 ? clear(gx, inputs(*s), where) : 0;
    for (int k = 0; k < s->S * s->S && !status; ++k)
        status = add<true>(gx, g, w, x, grad_x_gather(*s, k / s->S, k % s->S), where);
    return status ? status : mark_nan_weights(gx, w, *s, where);
}
