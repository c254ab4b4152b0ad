// Kernels of ShiftAddNAS: the add operator y = -sum |x - w| on GPU and CPU, and exact integer add and shift.
// One file, three builds, plain C interface; load_kernels in shiftaddnas.py builds and loads them.
//
//   gpu      nvcc -O3 -std=c++17 -arch=sm_90 -shared -Xcompiler -fPIC kernels.cu -o gpu.so
//   cpu      g++ -x c++ -O3 -march=native -std=c++20 -fopenmp -shared -fPIC kernels.cu -o cpu.so
//            (AVX-512, AVX2 or 4 portable lanes, as the -m flags allow)
//   emulate  the cpu command and -DEMULATE: the code of the GPU kernels on CPU threads, a test without a GPU
//
//   function             reference in shiftaddnas.py    formula
//   add_conv2d_forward   add_conv2d_definition          y[n,m,i,j] = -sum |x[n,c,iS+u-P,jS+v-P] - w[m,c,u,v]|
//   add_conv2d_grad_x    add_conv2d_grad_x_definition   gx = sum of g clip(w - x, -1, 1) over its readers y
//   add_conv2d_u8, _int  int_conv2d_definition          y = -sum |x - w|, exact          (cpu build)
//   shift_conv2d_int     int_conv2d_definition          2^15 y = sum +-(x << 15 - e)     (cpu build)
//
// x (N,C,H,W), w (M,C/G,KH,KW), y and g (N,M,Ho,Wo), gx as x, contiguous, float32 unless said; padding reads
// x = 0. A NaN or infinity reaches exactly the results that depend on it. The last argument is the number of
// threads (cpu, emulate) or the cudaStream_t (gpu). A function returns 0, or a status for status_text.
#include <algorithm>
#include <cmath>
#include <cstdint>

struct ConvShape {
    int32_t N, C, H, W, M, KH, KW, S, P, G, Ho, Wo;
};

#ifdef __CUDACC__
#define BOTH __host__ __device__
static int clear(float* gx, int64_t size, int64_t stream) {
    return cudaMemsetAsync(gx, 0, size * sizeof(float), (cudaStream_t)stream);
}
extern "C" const char* status_text(int status) { return cudaGetErrorString((cudaError_t)status); }
#else
#define BOTH
static int clear(float* gx, int64_t size, int64_t) { return std::fill_n(gx, size, 0.0f), 0; }
extern "C" const char* status_text(int status) { return status ? "memory refused by the system" : "ok"; }
#endif
template <class T> BOTH constexpr T ceil_div(T a, int b) { return (a + b - 1) / b; }
static int64_t inputs(const ConvShape& s) { return (int64_t)s.N * s.C * s.H * s.W; }
static int64_t weights(const ConvShape& s) { return (int64_t)s.M * (s.C / s.G) * s.KH * s.KW; }

// Both passes gather. Pixel (a, b) of image n, group g, channel o of the result, at (a*step+row, b*step+col)
// of its map, is a sum over the taps k = (c, u, v) of the group: source[n, gC+c, aS+row0+u, bS+col0+v], 0
// outside its H x W map, meets w[g*wg + o*wo + c*wc + u*wu + v*wv + w0].
struct Gather {
    int N, A, B, G;                        // result pixels a channel N x A x B; groups
    int C, H, W, S, row0, col0, KH, KW;    // source: channels a group, map, stride, first tap, taps
    int M, width, step, row, col;          // result: channels a group, width, place of the pixels in a map
    int64_t image, channel;                // result: from image to image, channel to channel
    int64_t wg, wo, wc, wu, wv, w0;

    BOTH int taps() const { return C * KH * KW; }
    BOTH int64_t pixels() const { return (int64_t)N * A * B; }
};

static Gather forward_gather(const ConvShape& s) {
    const int Cg = s.C / s.G, Mg = s.M / s.G, area = s.KH * s.KW;
    const int64_t map = (int64_t)s.Ho * s.Wo;
    return {s.N, s.Ho, s.Wo, s.G, Cg, s.H, s.W, s.S, -s.P, -s.P, s.KH, s.KW, Mg, s.Wo, 1, 0, 0,
            s.M * map, map, (int64_t)Mg * Cg * area, Cg * area, area, s.KW, 1, 0};
}

// grad_x: the input pixels (i, j) of one residue (row, col) mod S that some output reads meet the same taps
// u0 + S*b, v0 + S*d, so g is gathered at stride 1 with that part of w read backwards.
static Gather grad_x_gather(const ConvShape& s, int row, int col) {
    const int Cg = s.C / s.G, Mg = s.M / s.G, area = s.KH * s.KW;
    const int u0 = (row + s.P) % s.S, KH = u0 < s.KH ? ceil_div(s.KH - u0, s.S) : 0;
    const int v0 = (col + s.P) % s.S, KW = v0 < s.KW ? ceil_div(s.KW - v0, s.S) : 0;
    const int row0 = (row + s.P) / s.S - KH + 1, col0 = (col + s.P) / s.S - KW + 1;
    const int A = KH && row < s.H ? std::min(ceil_div(s.H - row, s.S), s.Ho - row0) : 0;
    const int B = KW && col < s.W ? std::min(ceil_div(s.W - col, s.S), s.Wo - col0) : 0;
    const int64_t map = (int64_t)s.H * s.W;
    return {s.N, A, B, s.G, Mg, s.Ho, s.Wo, 1, row0, col0, KH, KW, Cg, s.W, s.S, row, col, s.C * map, map,
            (int64_t)Mg * Cg * area, area, (int64_t)Cg * area, -s.S * s.KW, -s.S,
            (u0 + s.S * (KH - 1)) * s.KW + v0 + s.S * (KW - 1)};
}

// Clipping loses NaN. This marks the pixels that weight k meets if it is NaN; the kernels put back one in x.
BOTH inline void mark_nan_weight(float* gx, const float* w, const ConvShape& s, int64_t k) {
    if (w[k] == w[k]) return;
    const int Cg = s.C / s.G, area = s.KH * s.KW, u = k % area / s.KW - s.P, v = k % s.KW - s.P;
    const int64_t c = k / (Cg * area) / (s.M / s.G) * Cg + k / area % Cg;
    for (int64_t n = 0; n < s.N; ++n)
        for (int i = u; i < s.H && i < s.Ho * s.S + u; i += s.S)
            for (int j = v; j < s.W && j < s.Wo * s.S + v; j += s.S)
                if (i >= 0 && j >= 0) gx[((n * s.C + c) * s.H + i) * s.W + j] = w[k];
}

#if defined(__CUDACC__) || defined(EMULATE)
// ============================================================ gpu and emulate builds
//
// A kernel is a sequence of EACH_THREAD loops: on the GPU one thread's part closed by __syncthreads, emulated
// the 256 threads of a block in turn, blocks on CPU threads. PRIVATE is a thread's own, MINE(a) its copy.
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
// *p if there is one, else 0: the compiler would branch around each load, and the loads behind it would wait
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
    for (int64_t block = 0; block < blocks; ++block) BLOCK = int(block), kernel(a...);
    return 0;
}
#endif

// One term of the sum for source value v, weight b, own x. Forward, two FADD (the absolute value is free).
// grad: clip(d, -1, 1) = sat(d) - sat(-d), so two FADD.SAT, FADD and FFMA; sat(d/2 + 1/2) would save two, and
// digits of small d.
template <bool grad> DEVICE float term(float v, float b, float own) {
    return grad ? v * (__saturatef(b - own) - __saturatef(own - b)) : -fabsf(v - b);
}

// A tap's offset in source and weight, and its place in the kernel: out of every map past the last tap
struct alignas(16) Tap { int source, w, u, v; };
DEVICE Tap tap_of(int k, const Gather& a) {
    const int c = k / (a.KH * a.KW), u = k / a.KW % a.KH, v = k % a.KW;
    const int w = int(c * a.wc + u * a.wu + v * a.wv + a.w0);
    return {(c * a.H + u) * a.W + v, w, k < a.taps() ? u : INT32_MIN / 2, v};
}

// Pixel (i, j) of image n. A block divides once by 64 bits, for its first pixel; its threads by 32.
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

// Thread t owns 4 channels and R pixels of its block's tile: 4 and, 64 further, 4 (no bank is asked twice).
DEVICE int pixel_of(int t, int r) { return t % 16 * 4 + r % 4 + r / 4 * 64; }

// out = sum_k term(source_k, w_k, x). Blocks: pixels fastest, then channels, groups. A step of TK taps lies
// in shared memory and gives a thread TK * 4 R terms, while the next step's values are on their way to next_.
template <bool grad, int R>
KERNEL add_kernel(float* out, const float* source, const float* w, const float* x, Gather a,
                  int pixel_tiles, int channel_tiles) {
    constexpr int TP = 16 * R;
    SHARED alignas(16) float xs[TK][TP];
    SHARED alignas(16) float ws[TK][TM + 4];
    SHARED Tap taps[TK];
    PRIVATE(float, acc, [4][R]);
    PRIVATE(float, own, [4][R]);
    PRIVATE(float, next_x, [R]);
    PRIVATE(float, next_w, [4]);
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
                MINE(next_w)[r] = read(w + (g * a.wg + m * a.wo + k.w), k.u >= 0 && m < a.M);
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

// The same for one channel a group, which would leave a tile empty. A thread makes one pixel of DEPTH images,
// which share its taps; its images are n, n + images, ...
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
            own[d] = read(grad ? x + at + d * result : x, grad && real[d]), sum[d] = 0;
        }
        for (int u = 0; u < a.KH; ++u)
            for (int v = 0; v < a.KW; ++v) {
                const float b = w[g * a.wg + u * a.wu + v * a.wv + a.w0];
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
        const int64_t tiles = ceil_div((int64_t)images * a.A * a.B, THREADS);
        const auto kernel = add_depthwise_kernel<grad>;
        return launch(kernel, tiles * a.G, stream, out, source, w, x, a, int(tiles), images);
    }
    const int64_t tiles = ceil_div(a.pixels(), 16 * R), blocks = tiles * ceil_div(a.M, TM) * a.G;
    return launch(add_kernel<grad, R>, blocks, stream, out, source, w, x, a, int(tiles),
                  ceil_div(a.M, TM));
}

#else
// ============================================================ cpu build
#include <cfloat>
#include <cstdlib>
#include <cstring>
#include <omp.h>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#if defined(__AVX512BW__) && defined(__AVX512DQ__)
#define AVX512
#define MM(op) _mm512_##op
constexpr int LANES = 16, MR = 8, CR = 4;  // floats of a vector; channels of a tile, forward and grad_x
#elif defined(__AVX2__)
#define MM(op) _mm256_##op
constexpr int LANES = 8, MR = 5, CR = 2;
#else
#define MM(op) _mm_##op
constexpr int LANES = 4, MR = 5, CR = 2;
#endif
constexpr int PV = 2, PW = PV * LANES;     // vectors, pixels of a panel
constexpr int ROWS = LANES / 2;            // rows of a depthwise tile
#define UNROLL _Pragma("GCC unroll 16")

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint64_t eight;                    // 8 bytes: the same pixel of 8 channels
typedef long long evec __attribute__((vector_size(LANES * 4)));
template <class V = vec> static inline V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V> static inline void store(void* p, const V& v) { std::memcpy(p, &v, sizeof v); }
static inline vec splat(float a) { return a - vec{}; }
// *p in every lane. As an integer: the broadcast of a float to 512 bits takes an arithmetic port on Zen 4.
static inline vec spread(const float* p) { return (vec)(load<int32_t>(p) - ivec{}); }
static inline evec spread(const eight* p) { return load<long long>(p) - evec{}; }
// The value of a, unknown to the compiler. A factor 1 hidden this way makes acc + m an FMA, which runs on
// other ports than max and sub: twice the speed.
template <class V> static inline V opaque(V a) {
#ifdef __AVX2__
    asm("" : "+v"(a));
#endif
    return a;
}
static inline vec vabs(vec a) { return (vec)((ivec)a & 0x7fffffff); }
static inline vec clip(vec a) {            // to [-1, 1]; NaN to an end of it
#ifdef AVX512
    return _mm512_range_ps(a, splat(1), 2);
#elif defined(__x86_64__)
    return MM(min_ps)(MM(max_ps)(a, splat(-1)), splat(1));
#else
    const vec low = a > -1 ? a : splat(-1);
    return low < 1 ? low : splat(1);
#endif
}
static inline evec sad(evec a, evec b) {   // sum of |a - b| over the bytes of each eight
#ifdef __x86_64__
    return (evec)MM(sad_epu8)(a, b);
#else
    evec sum{};
    for (int s = 0; s < 64; s += 8) {
        const evec d = (a >> s & 255) - (b >> s & 255);
        sum += d < 0 ? -d : d;
    }
    return sum;
#endif
}

// Calls work(job, thread) for every job in [0, jobs) on torch's own OpenMP team: a second pool would fight
// its idle workers, which spin, for the cores. One job writes each result: the thread count changes no bit.
template <class Work> static void parallel(int64_t jobs, int threads, Work work) {
    const int64_t chunk = std::max<int64_t>(1, jobs / (64 * threads));
#pragma omp parallel for schedule(dynamic, chunk) num_threads(threads) if (threads > 1 && jobs > 1)
    for (int64_t job = 0; job < jobs; ++job) work(job, omp_get_thread_num());
}

static bool side_by_side(const int64_t* place, int n) {
    bool run = true;
    for (int l = 1; l < n; ++l) run &= place[l] == place[0] + l;
    return run;
}

// PW pixels from q on: place in channel 0 of the result; place and coordinates in the source of tap (0, 0, 0)
struct Pixels {
    int64_t at[PW], from[PW];
    ivec row[PV], col[PV];
    int count;
    bool run;

    Pixels(const Gather& a, int64_t q) : count(int(std::min<int64_t>(PW, a.pixels() - q))) {
        int64_t n = q / (a.A * a.B);
        int i = int(q / a.B % a.A), j = int(q % a.B);
        for (int l = 0; l < PW; ++l) {
            const int u = l < count ? i * a.S + a.row0 : -a.KH, v = j * a.S + a.col0;  // outside past the end
            row[l / LANES][l % LANES] = u, col[l / LANES][l % LANES] = v;
            from[l] = (n * a.G * a.C * a.H + u) * a.W + v;
            at[l] = n * a.image + (int64_t)(i * a.step + a.row) * a.width + j * a.step + a.col;
            if (++j == a.B) j = 0, ++i;
            if (i == a.A) i = 0, ++n;
        }
        run = count == PW && side_by_side(at, PW);
    }
    template <class Copy> void each_run(Copy copy) const {  // copy(lane, size) by runs of the result
        if (run) copy(0, PW);
        else for (int l = 0; l < count; ++l) copy(l, 1);
    }
};

template <class T> struct alignas(64) Row { T lane[PW]; };  // one tap of a panel of pixels

// panel[k] = tap k of the pixels in group g, 0 past the end; panel[taps] = the sum of these rows
template <class T>
static void pack(Row<T>* panel, const T* source, const Gather& a, int g, const Pixels& pixels) {
    typedef T lanes __attribute__((vector_size(LANES * sizeof(T))));
    typedef decltype(lanes{} < lanes{}) mask;
    const int64_t plane = (int64_t)a.H * a.W, end = plane * a.N * a.G * a.C;
    const int area = a.KH * a.KW;
    for (int q = 0; q < PV; ++q) {
        const ivec row = pixels.row[q], col = pixels.col[q];
        const int64_t* from = pixels.from + q * LANES;
        const bool run = side_by_side(from, LANES);
        lanes sum{};
        for (int t = 0; t < area; ++t) {
            const int u = t / a.KW, v = t % a.KW;
            const int64_t tap = plane * a.C * g + u * a.W + v, first = from[0] + tap;
            const ivec inside = (row >= -u) & (row < a.H - u) & (col >= -v) & (col < a.W - v);
            const mask keep = __builtin_convertvector(inside, mask);
            const bool vector = run && first >= 0 && first + (a.C - 1) * plane + LANES <= end;
            for (int c = 0; c < a.C; ++c) {
                const T* p = source + tap + c * plane;
                lanes x;
                if (vector) std::memcpy(&x, p + from[0], sizeof x);
                else for (int l = 0; l < LANES; ++l) x[l] = inside[l] ? p[from[l]] : 0;
                x = (lanes)((mask)x & keep), sum += x;
                store(panel[c * area + t].lane + q * LANES, x);
            }
        }
        store(panel[a.taps()].lane + q * LANES, sum);
    }
}

// The weights of R channels from o on, k by k: rows of w where k counts on in them, the last one repeated
template <int R, class T> struct Rows {
    const T* row[R];

    Rows(const T* w, const Gather& a, int g, int o) {
        for (int r = 0; r < R; ++r) row[r] = w + g * a.wg + std::min(o + r, a.M - 1) * a.wo + a.w0;
    }
    const T* at(int k, int r) const { return row[r] + k; }
};

// or, where k does not, laid out so for all channels, as rows of one group
template <class T> static std::vector<T> lay_rows(const T* w, Gather& a, int threads) {
    std::vector<T> rows((int64_t)a.G * a.M * a.taps());
    parallel((int64_t)a.G * a.M, threads, [&](int64_t channel, int) {
        const T* from = w + channel / a.M * a.wg + channel % a.M * a.wo + a.w0;
        T* to = rows.data() + channel * a.taps();
        for (int c = 0; c < a.C; ++c)
            for (int u = 0; u < a.KH; ++u)
                for (int v = 0; v < a.KW; ++v) *to++ = from[c * a.wc + u * a.wu + v * a.wv];
    });
    a.wo = a.taps(), a.wg = a.M * a.wo, a.w0 = 0;
    return rows;
}

// In a linear layer pixels and filters can exchange their roles. Then results lie side by side.
static bool exchangeable(const Gather& a) {
    const bool linear = std::max({a.G, a.H, a.W, a.A, a.B, a.KH, a.KW}) == 1 && a.row0 == 0 && a.col0 == 0;
    return linear && a.M >= 2 * PW;
}
static Gather exchanged_forward(const Gather& a) {  // x reads w's rows, which are its pixels
    return {a.M, 1, 1, 1, a.C, 1, 1, 1, 0, 0, 1, 1, a.N, 1, 1, 0, 0, 1, a.M, 0, a.C, 1, 0, 0, 0};
}
static Gather exchanged_grad_x(const Gather& a) {   // g reads w's columns
    return {1, 1, a.M, 1, a.C, 1, a.M, 1, 0, 0, 1, 1, a.N, a.M, 1, 0, 0, 0, a.M, 0, a.C, 1, 0, 0, 0};
}

// Packs the pixels panel by panel; compute(g, o, panel, result[R][PW]) makes R channels of `out`, from o on.
// `result` holds those of `in`, if there is one, before. A job has at most 64 tiles.
template <int R, class Y, class T, class Compute>
static void add_panels(Y* out, const T* source, const Y* in, const Gather& a, int threads, Compute compute) {
    const int K = a.taps(), chunks = ceil_div(a.M, 64 * R);
    std::vector<Row<T>> work(threads * (K + 1));
    parallel(ceil_div(a.pixels(), PW) * chunks, threads, [&](int64_t job, int thread) {
        Row<T>* panel = work.data() + thread * (K + 1);
        const Pixels pixels(a, job / chunks * PW);
        const int start = int(job % chunks) * 64 * R, end = std::min(a.M, start + 64 * R);
        for (int g = 0; g < a.G; ++g) {
            pack(panel, source, a, g, pixels);
            for (int o = start; o < end; o += R) {
                const int rows = std::min(R, end - o);
                const int64_t at = ((int64_t)g * a.M + o) * a.channel;
                alignas(64) Y result[R][PW];
                if (in) std::memset(result, 0, sizeof result);
                for (int r = 0; in && r < rows; ++r) pixels.each_run([&](int l, int size) {
                    std::memcpy(result[r] + l, in + at + r * a.channel + pixels.at[l], size * sizeof(Y));
                });
                compute(g, o, panel, result);
                for (int r = 0; r < rows; ++r) pixels.each_run([&](int l, int size) {
                    std::memcpy(out + at + r * a.channel + pixels.at[l], result[r] + l, size * sizeof(Y));
                });
            }
        }
    });
}

// acc[r][q] = sum_k term(vector q of panel[k], weight k of row r, r, q)
template <int R, int Q, class V, class T, class Term>
static inline void tile_sums(V (&acc)[R][Q], const Row<T>* panel, const Rows<R, T>& w, int K, Term term) {
    UNROLL for (int r = 0; r < R * Q; ++r) acc[r / Q][r % Q] = V{};
    for (int k = 0; k < K; ++k, ++panel) {
        V x[Q];
        UNROLL for (int q = 0; q < Q; ++q) x[q] = opaque(load<V>(panel->lane + q * (PW / Q)));
        UNROLL for (int r = 0; r < R; ++r) {
            const V b = spread(w.at(k, r));
            UNROLL for (int q = 0; q < Q; ++q) acc[r][q] += term(x[q], b, r, q);
        }
    }
}

// y = -sum_k |x - w| = sum x + sum w - 2 sum max(x, w); where y is small beside sum |w| (x and w share an
// offset, or nearly agree) or not finite, the tile is redone from |x - w|.
static void add_forward(float* y, const float* x, const float* w, Gather a, int threads) {
    if (exchangeable(a)) std::swap(x, w), a = exchanged_forward(a);
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
    const auto compute = [&](int g, int o, const Row<float>* panel, float (&result)[MR][PW]) {
        const Rows<MR, float> rows(w, a, g, o);
        const vec one = opaque(splat(1));
        vec acc[MR][PV];
        tile_sums(acc, panel, rows, K, [=](vec x, vec b, int, int) { return (b > x ? b : x) * one; });
        ivec bad{};
        UNROLL for (int r = 0; r < MR; ++r) UNROLL for (int q = 0; q < PV; ++q) {
            const int64_t channel = (int64_t)g * a.M + std::min(o + r, a.M - 1);
            acc[r][q] = 2 * acc[r][q] - sum_w[channel] - load(panel[K].lane + q * LANES);
            bad |= ~((8 * acc[r][q] >= splat(abs_w[channel])) & (acc[r][q] <= splat(FLT_MAX)));
        }
        for (int l = 1; l < LANES; ++l) bad[0] |= bad[l];
        if (bad[0]) tile_sums(acc, panel, rows, K, [=](vec x, vec b, int, int) { return vabs(x - b) * one; });
        UNROLL for (int r = 0; r < MR; ++r) UNROLL for (int q = 0; q < PV; ++q)
            store(result[r] + q * LANES, -acc[r][q]);
    };
    add_panels<MR>(y, x, (const float*)nullptr, a, threads, compute);
}

// gx = sum_k g clip(w - x, -1, 1). Every other difference is an FMA: sub, clip and FMA fill all ports.
template <bool exchanged>
static void add_grad_x(float* gx, const float* source, const float* x, const float* w, const Gather& a,
                       int threads) {
    const auto compute = [&](int g, int o, const Row<float>* panel, float (&result)[CR][PW]) {
        const vec one = opaque(splat(1));
        vec own[CR][PV], acc[CR][PV];
        UNROLL for (int c = 0; c < CR; ++c) UNROLL for (int q = 0; q < PV; ++q)
            own[c][q] = opaque(load(result[c] + q * LANES));
        tile_sums(acc, panel, Rows<CR, float>(w, a, g, o), a.taps(), [&](vec v, vec b, int c, int q) {
            if (exchanged) std::swap(v, b);
            return v * clip((q % 2 ? b * one : b) - own[c][q]);
        });
        UNROLL for (int c = 0; c < CR; ++c) UNROLL for (int q = 0; q < PV; ++q)
            store(result[c] + q * LANES, own[c][q] == own[c][q] ? acc[c][q] : own[c][q]);
    };
    add_panels<CR>(gx, source, x, a, threads, compute);
}

// y = -sum_k |x - w| of bytes: an eight holds 8 channels (0 past the last), a vector LANES / 2 eights.
static void add_u8(int32_t* y, const uint8_t* x, const uint8_t* w, Gather a, int threads) {
    const int C = a.C, eights = ceil_div(C, 8), area = a.KH * a.KW;
    const auto interleave = [=](const uint8_t* from, int64_t blocks, int64_t map) {
        std::vector<eight> to(blocks * eights * map);
        const std::vector<uint8_t> none(map);
        parallel(blocks, threads, [&](int64_t block, int) {
            const uint8_t* bytes = from + block * C * map;
            eight* row = to.data() + block * eights * map;
            if (map == 1) return (void)std::memcpy(row, bytes, C);
            for (int c = 0; c < C; c += 8, row += map) {
                const uint8_t* channel[8];
                for (int l = 0; l < 8; ++l) channel[l] = c + l < C ? bytes + (c + l) * map : none.data();
                _Pragma("GCC ivdep") for (int64_t q = 0, end = map; q < end; ++q) {
                    eight all = 0;
                    UNROLL for (int l = 0; l < 8; ++l) all |= eight(channel[l][q]) << 8 * l;
                    row[q] = all;
                }
            }
        });
        return to;
    };
    std::vector<eight> source = interleave(x, (int64_t)a.N * a.G, (int64_t)a.H * a.W);
    std::vector<eight> weight = interleave(w, (int64_t)a.G * a.M, area);
    a.C = eights, a.wo = a.taps(), a.wg = a.M * a.wo;
    if (exchangeable(a)) source.swap(weight), a = exchanged_forward(a);
    const auto compute = [&](int g, int o, const Row<eight>* panel, int32_t (&result)[CR][PW]) {
        typedef int32_t half __attribute__((vector_size(LANES * 2)));
        evec acc[CR][2 * PV];
        const auto term = [](evec x, evec b, int, int) { return sad(x, b); };
        tile_sums(acc, panel, Rows<CR, eight>(weight.data(), a, g, o), a.taps(), term);
        UNROLL for (int r = 0; r < CR; ++r) UNROLL for (int q = 0; q < 2 * PV; ++q)
            store(result[r] + q * LANES / 2, -__builtin_convertvector(acc[r][q], half));
    };
    add_panels<CR>(y, source.data(), (const int32_t*)nullptr, a, threads, compute);
}

// Both passes of depthwise layers in tiles of ROWS x LANES pixels. The source map is copied with its padding,
// split into S column phases: what a tap reads for pixels side by side lies side by side. Bytes are summed in
// 16 bits (C = int16_t), which hold 128 taps.
template <bool grad, class C, class Y, class X>
static void add_depthwise(Y* out, const X* source, const X* w, const X* x, Gather a, int threads) {
    typedef X x_vec __attribute__((vector_size(LANES * sizeof(X))));
    typedef C c_vec __attribute__((vector_size(LANES * sizeof(C))));
    typedef Y y_vec __attribute__((vector_size(LANES * sizeof(Y))));
    const int taps = a.taps(), rows = (a.A - 1) * a.S + a.KH, columns = (a.B - 1) * a.S + a.KW;
    const int width = ceil_div(columns, a.S) + LANES;
    const int64_t pitch = (int64_t)a.S * a.S * width, size = rows * a.S * width + ROWS * pitch;
    const std::vector<X> weight = lay_rows(w, a, 1);
    std::vector<C> work(threads * size);
    std::vector<int> place(std::max(columns, a.KW));  // of column c in a row of the copy
    std::vector<int64_t> tap(taps);                   // of tap k in the copy
    for (int c = 0; c < int(place.size()); ++c) place[c] = c % a.S * width + c / a.S;
    for (int k = 0; k < taps; ++k) tap[k] = (int64_t)k / a.KW * a.S * width + place[k % a.KW];
    const int top = std::max(0, a.row0), left = std::max(0, -a.col0), right = std::min(a.W - a.col0, columns);
    const vec one = opaque(splat(1));
    parallel((int64_t)a.N * a.G, threads, [&](int64_t p, int thread) {
        C* plane = work.data() + thread * size;
        for (int i = top; i < std::min(a.H, rows + a.row0); ++i) {
            const X* from = source + (p * a.H + i) * a.W + a.col0;
            C* to = plane + (int64_t)(i - a.row0) * a.S * width;
            int c = left;
            for (; a.S == 1 && c + LANES <= right; c += LANES)
                store(to + c, __builtin_convertvector(load<x_vec>(from + c), c_vec));
            for (; c < right; ++c) to[place[c]] = from[c];
        }
        for (int i = 0; i < a.A; i += ROWS)
            for (int j = 0; j < a.B; j += LANES) {
                const int count = std::min(LANES, a.B - j), height = std::min(ROWS, a.A - i);
                const bool whole = count == LANES && a.step == 1;
                const int64_t line = (int64_t)a.width * a.step;
                const int64_t at = p * a.channel + (int64_t)a.row * a.width + i * line + j * a.step + a.col;
                c_vec own[ROWS] = {}, acc[ROWS] = {};
                for (int r = 0; grad && r < height; ++r)
                    if (whole) own[r] = load<c_vec>(x + at + r * line);
                    else for (int l = 0; l < count; ++l) own[r][l] = x[at + r * line + l * a.step];
                for (int k = 0; k < taps; ++k) {
                    const C b = weight[p % a.G * taps + k];
                    const C* from = plane + i * pitch + tap[k] + j;
                    UNROLL for (int r = 0; r < ROWS; ++r) {
                        const c_vec value = load<c_vec>(from + r * pitch), d = value - b;
                        if constexpr (grad) acc[r] += value * clip(b - own[r]);
                        else if constexpr (sizeof(C) == 4) acc[r] -= vabs(d) * one;
                        else acc[r] -= d < 0 ? -d : d;
                    }
                }
                for (int r = 0; r < height; ++r) {
                    const y_vec y = __builtin_convertvector(own[r] == own[r] ? acc[r] : own[r], y_vec);
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
                                    const Gather& a, int64_t threads) try {
    if (a.pixels() == 0) return 0;
    if (a.C == 1 && a.M == 1) add_depthwise<grad, float>(out, source, w, x, a, int(threads));
    else if (!grad) add_forward(out, source, w, a, int(threads));
    else if (exchangeable(a)) add_grad_x<true>(out, w, x, source, exchanged_grad_x(a), int(threads));
    else {
        Gather rows = a;
        const std::vector<float> weight = lay_rows(w, rows, int(threads));
        add_grad_x<false>(out, source, x, weight.data(), rows, int(threads));
    }
    return 0;
} catch (const std::exception&) { return -1; }  // memory

extern "C" int add_conv2d_u8(int32_t* y, const uint8_t* x, const uint8_t* w, const ConvShape* s,
                             int64_t threads) try {
    const Gather a = forward_gather(*s);
    if (a.pixels() == 0) return 0;
    const bool depthwise = a.C == 1 && a.M == 1;
    if (depthwise && a.taps() <= 128) add_depthwise<false, int16_t>(y, x, w, x, a, int(threads));
    else if (depthwise) add_depthwise<false, float>(y, x, w, x, a, int(threads));
    else add_u8(y, x, w, a, int(threads));
    return 0;
} catch (const std::exception&) { return -1; }

// y = sum_k term(k)(x_k)
template <class Y, class X, class Term>
static int int_conv(Y* y, const X* x, const ConvShape* s, int64_t threads, Term term) {
    const Gather a = forward_gather(*s);
    parallel((int64_t)s->N * s->M * s->Ho, int(threads), [&](int64_t job, int) {
        const int64_t n = job / a.A / s->M, m = job / a.A % s->M;
        Y* to = y + job * a.B;
        std::fill_n(to, a.B, Y{0});
        for (int k = 0; k < a.taps(); ++k) {
            const int i = job % a.A * a.S + a.row0 + k / a.KW % a.KH, v = a.col0 + k % a.KW;
            const X* row = x + ((n * s->C + m / a.M * a.C + k / (a.KH * a.KW)) * a.H + i) * a.W + v;
            const auto weigh = term(m * a.taps() + k);
            for (int j = 0; j < a.B; ++j) {
                const bool inside = unsigned(i) < unsigned(a.H) && unsigned(j * a.S + v) < unsigned(a.W);
                to[j] += weigh(inside ? row[j * a.S] : X{0});
            }
        }
    });
    return 0;
}

extern "C" int add_conv2d_int(int64_t* y, const int32_t* x, const int32_t* w, const ConvShape* s,
                              int64_t threads) {
    return int_conv(y, x, s, threads, [=](int64_t k) {
        return [b = w[k]](int64_t v) { return -std::abs(v - b); };
    });
}

// 2^15 y for weights +-2^-e: bits 5k .. 5k + 4 of `packed`, after its first byte, hold 16 (w < 0) + e of
// weight k; 31 stands for weight 0 if the first byte is 1. A product is a shift of x to the left by 15 - e.
extern "C" int shift_conv2d_int(int64_t* y, const int32_t* x, const uint8_t* packed, const ConvShape* s,
                                int64_t threads) {
    return int_conv(y, x, s, threads, [=](int64_t k) {
        const uint8_t* at = packed + 1 + 5 * k / 8;
        const int start = 5 * k % 8, code = (at[0] | (start > 3 ? at[1] << 8 : 0)) >> start & 31;
        const int64_t sign = -(code >> 4), keep = -(code != 31 || packed[0] == 0);
        return [=](int64_t v) { return ((int64_t(uint64_t(v) << (15 - (code & 15))) ^ sign) - sign) & keep; };
    });
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
