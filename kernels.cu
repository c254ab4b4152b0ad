// Kernels of ShiftAddNAS: the add operator y = -sum |x - w| on GPU and CPU, and exact integer add and shift. One
// file, three builds, plain C interface; shiftaddnas.py (load_kernels) compiles and loads them on first use.
//
//   gpu      nvcc -O3 -std=c++17 -arch=sm_90 -shared -Xcompiler -fPIC kernels.cu -o gpu.so
//   cpu      g++ -x c++ -O3 -march=native -std=c++20 -fopenmp -shared -fPIC kernels.cu -o cpu.so
//            (AVX-512, AVX2 or 4 portable lanes, as the -m flags allow)
//   emulate  the cpu command and -DEMULATE: the code of the GPU kernels on CPU threads, to test it without a GPU
//
//   function             reference in shiftaddnas.py    formula
//   add_conv2d_forward   add_conv2d_definition          y[n,m,i,j] = -sum |x[n,c,iS+u-P,jS+v-P] - w[m,c,u,v]|
//   add_conv2d_grad_x    add_conv2d_grad_x_definition   gx = sum of g clip(w - x, -1, 1) over the y that read x
//   add_conv2d_u8, _int  int_conv2d_definition          y = -sum |x - w|, exact          (cpu build)
//   shift_conv2d_int     int_conv2d_definition          2^15 y = sum +-(x << 15 - e)     (cpu build)
//
// x (N,C,H,W), w (M,C/G,KH,KW), y and g (N,M,Ho,Wo), gx as x, contiguous, float32 unless said; padding reads x = 0.
// A NaN or infinity reaches exactly the results that depend on it. The last argument is the number of threads (cpu,
// emulate) or the cudaStream_t (gpu). A function returns 0, or a status for status_text.
#include <cmath>
#include <cstdint>

struct ConvShape {
    int32_t N, C, H, W, M, KH, KW, S, P, G, Ho, Wo;
};

#ifdef __CUDACC__
#define BOTH __host__ __device__
#else
#define BOTH
#endif
template <class T> BOTH constexpr T ceil_div(T a, int b) { return (a + b - 1) / b; }
static int64_t outputs(const ConvShape& s) { return (int64_t)s.N * s.M * s.Ho * s.Wo; }
static int64_t inputs(const ConvShape& s) { return (int64_t)s.N * s.C * s.H * s.W; }

// Both passes gather. Pixel (a, b) of image n, group g and channel o of the result, at (a*step+row, b*step+col) of its
// map, is a sum over the taps k = (c, u, v) of the group: source[n, gC+c, aS+row0+u, bS+col0+v] (0 outside its H x W
// map) meets w[g*wg + o*wo + c*wc + u*wu + v*wv + w0].
struct Gather {
    int N, A, B, G;                      // result pixels a channel N x A x B; groups
    int C, H, W, S, row0, col0, KH, KW;  // source: channels a group, map, stride, first tap, taps
    int M, height, width, step, row, col;  // result: channels a group, map, place of the pixels in it
    int64_t wg, wo, wc, wu, wv, w0;

    BOTH int taps() const { return C * KH * KW; }
    BOTH int64_t pixels() const { return (int64_t)N * A * B; }
    BOTH int64_t at(int64_t q) const {   // of pixel q = (n, a, b) in channel 0 of the result
        const int64_t n = q / (A * B), r = q - n * (A * B);
        return (n * G * M * height + r / B * step + row) * width + r % B * step + col;
    }
    BOTH bool meets(int a, int b) const {  // whether some tap of pixel (a, b) is inside the source map
        const int i = a * S + row0, j = b * S + col0;
        return KH && KW && i < H && i + KH > 0 && j < W && j + KW > 0;
    }
};

static Gather forward_gather(const ConvShape& s) {
    const int Cg = s.C / s.G, Mg = s.M / s.G, area = s.KH * s.KW;
    return {s.N, s.Ho, s.Wo, s.G, Cg, s.H, s.W, s.S, -s.P, -s.P, s.KH, s.KW, Mg, s.Ho, s.Wo, 1, 0, 0,
            (int64_t)Mg * Cg * area, Cg * area, area, s.KW, 1, 0};
}

// grad_x: the input pixels (i, j) of one residue (row, col) mod S meet the same taps u0 + S*b, v0 + S*d, so g is
// gathered at stride 1 with that part of w read backwards.
static Gather grad_x_gather(const ConvShape& s, int row, int col) {
    const int Cg = s.C / s.G, Mg = s.M / s.G, area = s.KH * s.KW, u0 = (row + s.P) % s.S, v0 = (col + s.P) % s.S;
    const int KH = u0 < s.KH ? ceil_div(s.KH - u0, s.S) : 0, KW = v0 < s.KW ? ceil_div(s.KW - v0, s.S) : 0;
    return {s.N, ceil_div(s.H - row, s.S), ceil_div(s.W - col, s.S), s.G,
            Mg, s.Ho, s.Wo, 1, (row + s.P) / s.S - KH + 1, (col + s.P) / s.S - KW + 1, KH, KW,
            Cg, s.H, s.W, s.S, row, col, (int64_t)Mg * Cg * area, area, (int64_t)Cg * area, -s.S * s.KW, -s.S,
            (u0 + s.S * (KH - 1)) * s.KW + v0 + s.S * (KW - 1)};
}

// A tap outside g enters grad_x as g = 0, and 0 * NaN is NaN: so the sums leave NaN weights out, and this marks the
// pixels that weight k meets if it is NaN.
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
// A kernel is a sequence of EACH_THREAD loops: on the GPU one thread's part closed by __syncthreads, emulated the 256
// threads of a block in turn (the blocks on CPU threads). PRIVATE is a thread's own array, MINE(a) the thread's copy.
constexpr int THREADS = 256, TP = 128, TM = 64, TK = 16;  // a block's tile: TP pixels x TM channels, TK taps a step
#ifdef __CUDACC__
#define KERNEL static __global__ void __launch_bounds__(THREADS, 2)
#define SHARED __shared__
#define EACH_THREAD for (int t = threadIdx.x, go = 1; go; go = 0, __syncthreads())
#define PRIVATE(name, size) float name size
#define MINE(name) name
#define UNROLL _Pragma("unroll")
#define BLOCK ((int64_t)blockIdx.x)
template <class... P, class... A> static int launch(void (*kernel)(P...), int64_t blocks, int64_t stream, A... a) {
    kernel<<<unsigned(blocks), THREADS, 0, (cudaStream_t)stream>>>(a...);
    return cudaGetLastError();
}
extern "C" const char* status_text(int status) { return cudaGetErrorString((cudaError_t)status); }
#else
static thread_local int64_t BLOCK;
static float __saturatef(float a) { return a > 0 ? a < 1 ? a : 1 : 0; }
#define KERNEL static void
#define SHARED
#define EACH_THREAD for (int t = 0; t < THREADS; ++t)
#define PRIVATE(name, size) float name[THREADS] size
#define MINE(name) name[t]
#define UNROLL
template <class... P, class... A> static int launch(void (*kernel)(P...), int64_t blocks, int64_t threads, A... a) {
#pragma omp parallel for num_threads(int(threads))
    for (int64_t block = 0; block < blocks; ++block) BLOCK = block, kernel(a...);
    return 0;
}
extern "C" const char* status_text(int) { return "ok"; }
#endif

// Thread t owns 4 channels and 8 pixels of its block's tile: 4 and, 64 further, 4 (no bank is asked twice).
BOTH inline int pixel_of(int t, int r) { return t % 16 * 4 + r % 4 + r / 4 * 64; }

struct Tap { int c, u, v; };
BOTH inline Tap tap_of(int k, const Gather& a) {
    return k < a.taps() ? Tap{k / (a.KH * a.KW), k / a.KW % a.KH, k % a.KW} : Tap{-1, 0, 0};
}

// out = -sum_k |source_k - w_k|, or with `grad` out = sum_k source_k clip(w_k - x, -1, 1). Blocks: pixels fastest, then
// channels, then groups. A step gathers TK taps of TP pixels and of TM channels into shared memory, then each thread
// adds 512 terms. Forward, a term is two FADD (the absolute value is free). grad: clip(d, -1, 1) = 2 sat(d/2 + 1/2) - 1
// makes it FADD.SAT and FFMA; sat turns NaN to 0: one in x is put back at the end, one in w by mark_nan_kernel.
template <bool grad> KERNEL add_kernel(float* out, const float* source, const float* w, const float* x, Gather a,
                                       int64_t pixel_tiles, int channel_tiles) {
    SHARED float xs[TK][TP];
    SHARED alignas(16) float ws[TK][TM + 4];
    SHARED Tap taps[TK];
    PRIVATE(acc, [4][8]);
    PRIVATE(half_x, [4][8]);
    PRIVATE(sum, [8]);
    const int g = BLOCK / pixel_tiles / channel_tiles, m0 = BLOCK / pixel_tiles % channel_tiles * TM;
    const int64_t q0 = BLOCK % pixel_tiles * TP, pixels = a.pixels(), area = (int64_t)a.height * a.width;
    EACH_THREAD {
        UNROLL for (int r = 0; r < 8; ++r) {
            const int64_t q = q0 + pixel_of(t, r), at = a.at(q) + (g * a.M + m0 + t / 16 * 4) * area;
            UNROLL for (int f = 0; f < 4; ++f) {
                MINE(acc)[f][r] = MINE(sum)[r] = MINE(half_x)[f][r] = 0;
                if (grad && q < pixels && m0 + t / 16 * 4 + f < a.M && a.meets(q / a.B % a.A, q % a.B))
                    MINE(half_x)[f][r] = 0.5f * x[at + f * area];
            }
        }
        if (t < TK) taps[t] = tap_of(t, a);
    }
    for (int k0 = 0; k0 < a.taps(); k0 += TK) {
        EACH_THREAD {
            const int64_t q = q0 + t % TP, n = q / (a.A * a.B), r = q - n * (a.A * a.B);
            const int i = r / a.B * a.S + a.row0, j = r % a.B * a.S + a.col0;
            UNROLL for (int k = t / TP; k < TK; k += THREADS / TP) {
                const Tap p = taps[k];
                const bool inside = q < pixels && p.c >= 0 && unsigned(i + p.u) < unsigned(a.H) &&
                                    unsigned(j + p.v) < unsigned(a.W);
                const int64_t plane = (n * a.G + g) * a.C + p.c;
                xs[k][t % TP] = inside ? source[(plane * a.H + i + p.u) * a.W + j + p.v] : 0;
            }
            const Tap p = taps[t % TK];
            const int64_t at = g * a.wg + p.c * a.wc + p.u * a.wu + p.v * a.wv + a.w0;
            UNROLL for (int m = t / TK; m < TM; m += THREADS / TK) {
                const float b = p.c >= 0 && m0 + m < a.M ? w[at + (m0 + m) * a.wo] : 0;
                ws[t % TK][m] = grad ? 0.5f * b + 0.5f : b;
            }
        }
        EACH_THREAD {
            UNROLL for (int k = 0; k < TK; ++k) {
                UNROLL for (int r = 0; grad && r < 8; ++r) MINE(sum)[r] += xs[k][pixel_of(t, r)];
                UNROLL for (int r = 0; r < 32; ++r) {
                    const float v = xs[k][pixel_of(t, r % 8)], b = ws[k][t / 16 * 4 + r / 8];
                    MINE(acc)[r / 8][r % 8] += grad ? v * __saturatef(b - MINE(half_x)[r / 8][r % 8]) : fabsf(v - b);
                }
            }
            if (t < TK) taps[t] = tap_of(k0 + TK + t, a);
        }
    }
    EACH_THREAD {
        UNROLL for (int r = 0; r < 8; ++r) {
            const int64_t q = q0 + pixel_of(t, r), at = a.at(q) + (g * a.M + m0 + t / 16 * 4) * area;
            UNROLL for (int f = 0; f < 4; ++f) {
                const float h = MINE(half_x)[f][r], total = 2 * MINE(acc)[f][r] - MINE(sum)[r];
                if (q < pixels && m0 + t / 16 * 4 + f < a.M)
                    out[at + f * area] = !grad ? -MINE(acc)[f][r] : h == h ? total : h;
            }
        }
    }
}

KERNEL mark_nan_kernel(float* gx, const float* w, ConvShape s, int64_t weights) {
    EACH_THREAD {
        const int64_t k = BLOCK * THREADS + t;
        if (k < weights) mark_nan_weight(gx, w, s, k);
    }
}

template <bool grad> static int launch_add(float* out, const float* source, const float* w, const float* x,
                                           const Gather& a, int64_t stream) {
    const int64_t pixel_tiles = ceil_div(a.pixels(), TP), channel_tiles = ceil_div(a.M, TM);
    return launch(add_kernel<grad>, pixel_tiles * channel_tiles * a.G, stream, out, source, w, x, a, pixel_tiles,
                  int(channel_tiles));
}

extern "C" int add_conv2d_forward(float* y, const float* x, const float* w, const ConvShape* s, int64_t stream) {
    return outputs(*s) ? launch_add<false>(y, x, w, nullptr, forward_gather(*s), stream) : 0;
}

extern "C" int add_conv2d_grad_x(float* gx, const float* g, const float* x, const float* w, const ConvShape* s,
                                 int64_t stream) {
    int status = 0;
    for (int i = 0; i < s->S && i < s->H && inputs(*s); ++i)
        for (int j = 0; j < s->S && j < s->W && !status; ++j)
            status = launch_add<true>(gx, g, w, x, grad_x_gather(*s, i, j), stream);
    const int64_t weights = (int64_t)s->M * (s->C / s->G) * s->KH * s->KW, blocks = ceil_div(weights, THREADS);
    return status || !inputs(*s) || !weights ? status : launch(mark_nan_kernel, blocks, stream, gx, w, *s, weights);
}

#else
// ============================================================ cpu build
#include <algorithm>
#include <cfloat>
#include <cstring>
#include <omp.h>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#if defined(__AVX512BW__)
#define MM(op) _mm512_##op
constexpr int LANES = 16, MR = 8, CR = 4;  // floats of a vector; channels of a register tile, forward and grad_x
#elif defined(__AVX2__)
#define MM(op) _mm256_##op
constexpr int LANES = 8, MR = 5, CR = 2;
#else
#define MM(op) _mm_##op
constexpr int LANES = 4, MR = 5, CR = 2;
#endif
constexpr int PV = 2, PW = PV * LANES;     // vectors, pixels of a panel; a panel row holds one tap of them
constexpr int ROWS = LANES / 2;            // rows of a depthwise register tile
constexpr int FAR = 64;                    // elements between the buffers of two threads
constexpr int64_t PANEL_BYTES = 64 << 10;  // panels packed at a time (at least one)
#define UNROLL _Pragma("GCC unroll 16")

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef long long eight;                   // 8 bytes: the same pixel of 8 channels
typedef eight evec __attribute__((vector_size(LANES * 4)));
template <class V> struct Unaligned { typedef V type __attribute__((aligned(1), may_alias)); };
template <class V = vec, class T> static inline V load(const T* p) { return *(const typename Unaligned<V>::type*)p; }
template <class V, class T> static inline void store(T* p, V v) { *(typename Unaligned<V>::type*)p = v; }
static inline vec splat(float a) { return a - vec{}; }
static inline vec vabs(vec a) { return (vec)((ivec)a & 0x7fffffff); }
static inline ivec vabs(ivec a) { return (a ^ (a >> 31)) - (a >> 31); }
#ifdef __x86_64__                          // max and min return a NaN that is their second operand, as x86 does
static inline vec vmax(vec a, vec b) { return MM(max_ps)(a, b); }
static inline vec vmin(vec a, vec b) { return MM(min_ps)(a, b); }
static inline evec sad(evec a, evec b) { return (evec)MM(sad_epu8)(a, b); }  // sum of |a - b| over the bytes of an eight
#else
static inline vec vmax(vec a, vec b) { return a > b ? a : b; }
static inline vec vmin(vec a, vec b) { return a < b ? a : b; }
static inline evec sad(evec a, evec b) {
    evec sum{};
    for (int shift = 0; shift < 64; shift += 8) {
        const evec d = (a >> shift & 255) - (b >> shift & 255);
        sum += d < 0 ? -d : d;
    }
    return sum;
}
#endif
static inline bool all_set(ivec a) {
    for (int l = 1; l < LANES; ++l) a[0] &= a[l];
    return a[0];
}
// The value of a in a register, unknown to the compiler. A factor 1 hidden this way makes acc + m an FMA, which runs on
// other execution ports than max and sub: twice the speed.
template <class V> static inline V opaque(V a) {
#ifdef __AVX2__
    asm("" : "+v"(a));
#endif
    return a;
}
// *p in every lane. As an integer: the broadcast of a float to 512 bits takes an arithmetic port on Zen 4.
static inline vec spread(const float* p) { return (vec)(load<int32_t>(p) - ivec{}); }
// min(a, b) for b >= 0: there floats are ordered as integers are, whose minimum has twice the ports.
static inline vec min_bits(vec a, vec b) {
#ifdef __AVX2__
    return (vec)MM(min_epi32)((evec)a, (evec)b);
#else
    return vmin(a, b);
#endif
}

// Calls work(job, thread) for every job in [0, jobs) on torch's own OpenMP team: a second pool would fight its idle
// workers, which spin, for the cores. One job writes each result, so the thread count changes no bit.
template <class Work> static void parallel(int64_t jobs, int threads, Work work) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && jobs > 1)
    for (int64_t job = 0; job < jobs; ++job) work(job, omp_get_thread_num());
}

// The pixels of a panel: (n, i, j) in the grid and their place in channel 0 of the result
struct alignas(128) Lanes {
    int64_t at[PW];
    int n[PW], i[PW], j[PW], count = 0;
    bool read[PW], all_read = true, run = false;  // read by a tap; run: side by side, so that vectors move them

    void set(const Gather& a, int64_t q0) {
        int64_t image = q0 / (a.A * a.B), r = q0 - image * (a.A * a.B);
        int row = int(r / a.B), column = int(r % a.B);
        count = int(std::min<int64_t>(PW, a.pixels() - q0)), all_read = true;
        for (int l = 0; l < count; ++l) {
            n[l] = int(image), i[l] = row, j[l] = column;
            at[l] = (image * a.G * a.M * a.height + row * a.step + a.row) * a.width + column * a.step + a.col;
            all_read &= read[l] = a.meets(row, column);
            if (++column == a.B) column = 0, ++row;
            if (row == a.A) row = 0, ++image;
        }
        run = count == PW && at[PW - 1] - at[0] == PW - 1 && at[PW / 2] - at[0] == PW / 2;
    }
    void move_in(float* to, const float* x) const {
        if (run && all_read) for (int l = 0; l < PW; l += LANES) store(to + l, load(x + at[0] + l));
        else for (int l = 0; l < count; ++l) to[l] = read[l] ? x[at[l]] : 0;
    }
    template <class Y> void move_out(Y* y, const Y* from) const {
        if (run) for (int l = 0; l < PW; l += LANES) store(y + at[0] + l, load(from + l));
        else for (int l = 0; l < count; ++l) y[at[l]] = from[l];
    }
};

// panel[k][lane] = tap k of the pixels, 0 past the end; sum[lane] = sum of the column. T is float or eight.
template <class T> static void pack(const T* source, const Gather& a, int g, const Lanes& pixels, T* panel, T* sum) {
    typedef T oct __attribute__((vector_size(8 * sizeof(T))));
    typedef decltype(oct{} < oct{}) mask;
    struct Tap { mask inside; int64_t delta; bool vector; };
    const int64_t plane = (int64_t)a.H * a.W, size = (int64_t)a.N * a.G * a.C * plane;
    const int area = a.KH * a.KW;
    std::vector<Tap> taps(area);
    for (int l0 = 0; l0 < PW; l0 += 8) {
        int64_t base[8];                   // of tap (0, 0, 0)
        mask row, col;
        bool run = true;                   // the 8 pixels lie side by side
        for (int l = 0; l < 8; ++l) {
            const int p = std::min(l0 + l, pixels.count - 1);
            row[l] = l0 + l < pixels.count ? pixels.i[p] * a.S + a.row0 : -a.KH, col[l] = pixels.j[p] * a.S + a.col0;
            base[l] = ((int64_t)pixels.n[p] * a.G + g) * a.C * plane + (int64_t)row[l] * a.W + col[l];
            run = run && l0 + l < pixels.count && base[l] == base[0] + l;
        }
        for (int t = 0; t < area; ++t) {
            const int u = t / a.KW, v = t % a.KW;
            const int64_t delta = (int64_t)u * a.W + v, first = base[0] + delta;
            taps[t] = {(row + u >= 0) & (row + u < a.H) & (col + v >= 0) & (col + v < a.W), delta,
                       run && first >= 0 && first + (a.C - 1) * plane + 8 <= size};
        }
        oct total{};
        T* to = panel + l0;
        for (int c = 0; c < a.C; ++c)
            for (const Tap& tap : taps) {
                const T* from = source + c * plane + tap.delta;
                oct x;
                if (tap.vector) std::memcpy(&x, from + base[0], sizeof x);
                else for (int l = 0; l < 8; ++l) x[l] = tap.inside[l] ? from[base[l]] : 0;
                x = (oct)((mask)x & tap.inside);
                std::memcpy(to, &x, sizeof x);
                to += PW;
                if constexpr (std::is_same_v<T, float>) total += x;  // eights would overflow
            }
        std::memcpy(sum + l0, &total, sizeof total);
    }
}

// The weights of R channels as taps[tile][k][R], the last channel of a group repeated to a whole tile
template <int R, class T, class Map> static std::vector<T> lay_taps(const T* w, const Gather& a, int threads, Map map) {
    const int64_t rows = ceil_div(a.M, R) * R;
    std::vector<T> taps(a.G * rows * a.taps());
    parallel(a.G * rows, threads, [&](int64_t job, int) {
        const T* from = w + job / rows * a.wg + std::min<int64_t>(job % rows, a.M - 1) * a.wo + a.w0;
        T* to = taps.data() + job / R * a.taps() * R + job % R;
        for (int c = 0; c < a.C; ++c)
            for (int u = 0; u < a.KH; ++u)
                for (int v = 0; v < a.KW; ++v, to += R) *to = map(from[c * a.wc + u * a.wu + v * a.wv]);
    });
    return taps;
}

// A panel of pixels meets `rows` of the R channels that taps[k][R] hold. channel: place of the first one in the result
template <class T> struct Tile {
    const T *panel, *sum, *taps;
    int64_t index, channel, rows;
    const Lanes& pixels;
};

// Packs panels of pixels, a few a job, and writes compute(tile, result[R][PW]) to `out`, tile by tile.
template <int R, class Y, class T, class Compute> static void add_panels(Y* out, const T* source, const T* taps,
                                                                         const Gather& a, int threads, Compute compute) {
    const int64_t K = a.taps(), tiles = ceil_div(a.M, R), map = (int64_t)a.height * a.width;
    const int64_t panels = ceil_div(a.pixels(), PW), bytes = (K + 1) * PW * sizeof(T);
    const int64_t block = std::max<int64_t>(1, PANEL_BYTES / bytes), size = block * (K + 1) * PW + FAR;
    std::vector<T> work(threads * size);
    std::vector<Lanes> lanes(threads * block);
    parallel(ceil_div(panels, int(block)), threads, [&](int64_t job, int thread) {
        T *panel = work.data() + thread * size, *sum = panel + block * K * PW;
        Lanes* pixels = lanes.data() + thread * block;
        const int64_t first = job * block, count = std::min(block, panels - first);
        for (int64_t p = 0; p < count; ++p) pixels[p].set(a, (first + p) * PW);
        for (int g = 0; g < a.G; ++g) {
            for (int64_t p = 0; p < count; ++p) pack(source, a, g, pixels[p], panel + p * K * PW, sum + p * PW);
            for (int64_t t = 0; t < tiles * count; ++t) {
                const int64_t o = t / count * R, p = t % count, index = g * tiles + t / count;
                const Tile<T> tile{panel + p * K * PW, sum + p * PW, taps + index * K * R, index, (g * a.M + o) * map,
                                   std::min<int64_t>(R, a.M - o), pixels[p]};
                alignas(64) Y result[R][PW];
                compute(tile, result);
                for (int r = 0; r < tile.rows; ++r) pixels[p].move_out(out + tile.channel + r * map, result[r]);
            }
        }
    });
}

// acc = sum_k max(x, w), or sum_k |x - w| if direct, for one panel and MR channels
template <bool direct> static inline void forward_sums(const float* panel, const float* w, int K, vec (&acc)[MR][PV]) {
    const vec one = opaque(splat(1));
    UNROLL for (int r = 0; r < MR * PV; ++r) acc[r / PV][r % PV] = vec{};
    for (int k = 0; k < K; ++k, panel += PW, w += MR) {
        vec x[PV];
        UNROLL for (int q = 0; q < PV; ++q) x[q] = opaque(load(panel + q * LANES));
        UNROLL for (int r = 0; r < MR; ++r) {
            const vec b = spread(w + r);
            UNROLL for (int q = 0; q < PV; ++q) acc[r][q] += (direct ? vabs(x[q] - b) : vmax(b, x[q])) * one;
        }
    }
}

// y = -sum_k |x - w| = sum x + sum w - 2 sum max(x, w); where y is small beside sum |w| (x and w share an offset, or
// nearly agree) or not finite, the tile is redone from |x - w|.
static void add_forward(float* y, const float* x, const float* w, const Gather& a, int threads) {
    const std::vector<float> taps = lay_taps<MR>(w, a, threads, [](float b) { return b; });
    const int K = a.taps();
    std::vector<float> sum_w(taps.size() / K), abs_w(sum_w);
    parallel(sum_w.size() / MR, threads, [&](int64_t tile, int) {
        double total[MR] = {}, total_abs[MR] = {};
        for (int64_t k = 0; k < K * MR; ++k) {
            const double b = taps[tile * K * MR + k];
            total[k % MR] += b, total_abs[k % MR] += std::fabs(b);
        }
        for (int r = 0; r < MR; ++r) sum_w[tile * MR + r] = total[r], abs_w[tile * MR + r] = total_abs[r];
    });
    add_panels<MR>(y, x, taps.data(), a, threads, [&](const Tile<float>& t, float (&result)[MR][PW]) {
        vec acc[MR][PV];
        forward_sums<false>(t.panel, t.taps, K, acc);
        ivec good = ~ivec{};
        UNROLL for (int r = 0; r < MR; ++r) UNROLL for (int q = 0; q < PV; ++q) {
            acc[r][q] = 2 * acc[r][q] - sum_w[t.index * MR + r] - load(t.sum + q * LANES);
            good &= (8 * acc[r][q] >= splat(abs_w[t.index * MR + r])) & (acc[r][q] <= splat(FLT_MAX));
        }
        if (!all_set(good)) forward_sums<true>(t.panel, t.taps, K, acc);
        UNROLL for (int r = 0; r < MR; ++r) UNROLL for (int q = 0; q < PV; ++q) store(result[r] + q * LANES, -acc[r][q]);
    });
}

// result = sum_k g clip(w - x, -1, 1) of one panel of g and CR channels; sum = sum_k g; w and x have SHIFT added. As
// clip(w - x, -1, 1) = min(max(w, x - 1), x + 1) - x, a term is max, min and FMA. That loses digits as |x| grows and wants
// x + 1 >= 0, so outside -1 .. 11 it is direct.
constexpr float SHIFT = 3;
template <bool direct> static inline void grad_sums(const Tile<float>& t, const float (&x)[CR][PW], int K,
                                                    float (&result)[CR][PW]) {
    const float *panel = t.panel, *w = t.taps;
    const vec one = opaque(splat(1));
    vec low[CR][PV], high[CR][PV], acc[CR][PV];
    UNROLL for (int c = 0; c < CR; ++c) UNROLL for (int q = 0; q < PV; ++q) {
        const vec v = load(x[c] + q * LANES);
        low[c][q] = opaque(direct ? v : v - 1), high[c][q] = opaque(v + 1), acc[c][q] = vec{};
    }
    for (int k = 0; k < K; ++k, panel += PW, w += CR) {
        vec g[PV];
        UNROLL for (int q = 0; q < PV; ++q) g[q] = opaque(load(panel + q * LANES));
        UNROLL for (int c = 0; c < CR; ++c) {
            const vec b = spread(w + c);
            UNROLL for (int q = 0; q < PV; ++q) acc[c][q] += g[q] * (direct
                ? vmin(one, vmax(-one, b - low[c][q])) : min_bits(vmax(low[c][q], b), high[c][q]));
        }
    }
    UNROLL for (int c = 0; c < CR; ++c) UNROLL for (int q = 0; q < PV; ++q)
        store(result[c] + q * LANES, direct ? acc[c][q] : acc[c][q] - load(x[c] + q * LANES) * load(t.sum + q * LANES));
}

static void add_grad_x(float* gx, const float* g, const float* x, const float* w, const Gather& a, int threads) {
    const std::vector<float> taps = lay_taps<CR>(w, a, threads, [](float b) { return b == b ? b + SHIFT : 0; });
    const int64_t map = (int64_t)a.height * a.width;
    add_panels<CR>(gx, g, taps.data(), a, threads, [&](const Tile<float>& t, float (&result)[CR][PW]) {
        alignas(64) float in[CR][PW] = {};
        for (int r = 0; r < t.rows; ++r) t.pixels.move_in(in[r], x + t.channel + r * map);
        ivec small = ~ivec{};
        for (auto& row : in) UNROLL for (int l = 0; l < PW; l += LANES) {
            const vec v = load(row + l) + SHIFT;
            store(row + l, v), small &= (v >= splat(-1)) & (v <= splat(11));
        }
        if (all_set(small)) grad_sums<false>(t, in, a.taps(), result);
        else grad_sums<true>(t, in, a.taps(), result);
    });
}

// y = -sum_k |x - w| of bytes: an eight holds 8 channels (0 past the last), a vector those of LANES / 2 pixels.
static void add_u8(int32_t* y, const uint8_t* x, const uint8_t* w, Gather a, int threads) {
    const int C = a.C, eights = ceil_div(C, 8);
    const auto interleave = [=](const uint8_t* from, int64_t blocks, int64_t map) {
        std::vector<eight> to(blocks * eights * map);
        parallel(blocks * eights, threads, [&](int64_t job, int) {
            for (int64_t c = job % eights * 8, end = std::min<int64_t>(c + 8, C); c < end; ++c)
                for (int64_t q = 0; q < map; ++q)
                    to[job * map + q] |= (uint64_t)from[(job / eights * C + c) * map + q] << c % 8 * 8;
        });
        return to;
    };
    const int area = a.KH * a.KW;
    const std::vector<eight> source = interleave(x, (int64_t)a.N * a.G, (int64_t)a.H * a.W);
    const std::vector<eight> weight = interleave(w, (int64_t)a.G * a.M, area);
    a.C = eights, a.wc = area, a.wo = a.taps(), a.wg = a.M * a.wo;
    const std::vector<eight> taps = lay_taps<CR>(weight.data(), a, threads, [](eight b) { return b; });
    add_panels<CR>(y, source.data(), taps.data(), a, threads, [&](const Tile<eight>& t, int32_t (&result)[CR][PW]) {
        typedef int32_t half __attribute__((vector_size(LANES * 2)));
        const eight *panel = t.panel, *b = t.taps;
        evec acc[CR][2 * PV] = {};
        for (int k = 0; k < a.taps(); ++k, panel += PW, b += CR) {
            evec v[2 * PV];
            UNROLL for (int q = 0; q < 2 * PV; ++q) v[q] = opaque(load<evec>(panel + q * LANES / 2));
            UNROLL for (int r = 0; r < CR; ++r) UNROLL for (int q = 0; q < 2 * PV; ++q)
                acc[r][q] += sad(v[q], b[r] - evec{});
        }
        UNROLL for (int r = 0; r < CR; ++r) UNROLL for (int q = 0; q < 2 * PV; ++q)
            store(result[r] + q * LANES / 2, -__builtin_convertvector(acc[r][q], half));
    });
}

// The same for depthwise layers, float32 or bytes, in tiles of ROWS x LANES pixels. The source map is copied with its
// padding, split into S column phases, so that the source pixels a tap needs for side-by-side result pixels lie side by
// side.
template <bool grad, class Y, class X> static void add_depthwise(Y* out, const X* source, const X* w, const X* x,
                                                                 const Gather& a, int threads) {
    typedef Y y_vec __attribute__((vector_size(LANES * sizeof(Y))));
    const int taps = a.taps(), rows = (a.A - 1) * a.S + a.KH, columns = (a.B - 1) * a.S + a.KW;
    const int width = ceil_div(columns, a.S) + LANES;
    const int64_t pitch = (int64_t)a.S * a.S * width, size = rows * a.S * width + ROWS * pitch + FAR;
    const bool all_read = a.meets(0, 0) && a.meets(a.A - 1, a.B - 1);
    std::vector<Y> work(threads * size);
    std::vector<Y> weight(a.G * taps);
    std::vector<int> offset(taps);
    for (int k = 0; k < a.G * taps; ++k) {
        const int u = k % taps / a.KW, v = k % a.KW;
        const X b = w[k / taps * a.wg + u * a.wu + v * a.wv + a.w0];
        weight[k] = grad && b != b ? 0 : b, offset[k % taps] = (u * a.S + v % a.S) * width + v / a.S;
    }
    parallel((int64_t)a.N * a.G, threads, [&](int64_t p, int thread) {
        Y* plane = work.data() + thread * size;
        for (int phase = 0; phase < a.S; ++phase) {
            const int start = ceil_div(std::max(0, -a.col0 - phase), a.S);
            const int count = ceil_div(std::max(0, std::min(a.W - a.col0, columns) - phase), a.S) - start;
            for (int i = std::max(0, a.row0); i < std::min(a.H, rows + a.row0); ++i) {
                Y* to = plane + ((int64_t)(i - a.row0) * a.S + phase) * width + start;
                const X* from = source + (p * a.H + i) * a.W + a.col0 + phase + start * a.S;
                if (std::is_same_v<X, Y> && a.S == 1 && count >= LANES)
                    for (int b = 0; b < count; b += LANES) {  // the last vector overlaps the one before
                        const int at = std::min(b, count - LANES);
                        store(to + at, load<y_vec>(from + at));
                    }
                else for (int b = 0; b < count; ++b) to[b] = from[b * a.S];
            }
        }
        for (int i = 0; i < a.A; i += ROWS)
            for (int j = 0; j < a.B; j += LANES) {
                const int count = std::min(LANES, a.B - j), height = std::min(ROWS, a.A - i);
                const bool whole = count == LANES && a.step == 1;
                const int64_t at = (p * a.height + (int64_t)i * a.step + a.row) * a.width + (int64_t)j * a.step + a.col;
                const Y* from = plane + i * pitch + j;
                y_vec pixel[ROWS] = {}, acc[ROWS] = {};
                if constexpr (grad) for (int r = 0; r < height; ++r) {
                    const float* own = x + at + (int64_t)r * a.width * a.step;
                    if (whole && all_read) pixel[r] = load(own);
                    else for (int l = 0; l < count; ++l)
                        if (all_read || a.meets(i + r, j + l)) pixel[r][l] = own[l * a.step];
                }
                y_vec one = 1 + y_vec{};
                if constexpr (std::is_same_v<Y, float>) one = opaque(one);
                const Y* b = weight.data() + p % a.G * taps;
                for (int k = 0; k < taps; ++k) UNROLL for (int r = 0; r < ROWS; ++r) {
                    const y_vec value = load<y_vec>(from + offset[k] + r * pitch);
                    if constexpr (grad) acc[r] += value * vmin(splat(1), vmax(splat(-1), b[k] - pixel[r]));
                    else acc[r] -= vabs(value - b[k]) * one;
                }
                for (int r = 0; r < height; ++r) {
                    Y* to = out + at + (int64_t)r * a.width * a.step;
                    if (whole) store(to, acc[r]);
                    else for (int l = 0; l < count; ++l) to[l * a.step] = acc[r][l];
                }
            }
    });
}

// Runs a launcher's body; memory that the system refuses becomes a status.
template <class Body> static int guarded(Body body) {
    try { body(); } catch (const std::exception&) { return -1; }
    return 0;
}

static bool depthwise(const ConvShape* s) { return s->G == s->C && s->G == s->M; }

extern "C" int add_conv2d_forward(float* y, const float* x, const float* w, const ConvShape* s, int64_t threads) {
    return outputs(*s) == 0 ? 0 : guarded([&] {
        if (depthwise(s)) add_depthwise<false>(y, x, w, x, forward_gather(*s), int(threads));
        else add_forward(y, x, w, forward_gather(*s), int(threads));
    });
}

extern "C" int add_conv2d_grad_x(float* gx, const float* g, const float* x, const float* w, const ConvShape* s,
                                 int64_t threads) {
    return inputs(*s) == 0 ? 0 : guarded([&] {
        for (int k = 0; k < std::min(s->S, s->H) * std::min(s->S, s->W); ++k) {
            const Gather a = grad_x_gather(*s, k / std::min(s->S, s->W), k % std::min(s->S, s->W));
            if (depthwise(s)) add_depthwise<true>(gx, g, w, x, a, int(threads));
            else add_grad_x(gx, g, x, w, a, int(threads));
        }
        for (int64_t k = 0; k < (int64_t)s->M * (s->C / s->G) * s->KH * s->KW; ++k) mark_nan_weight(gx, w, *s, k);
    });
}

// y = sum_k term(k)(x_k)
template <class Y, class X, class Term>
static int int_conv(Y* y, const X* x, const ConvShape* s, int64_t threads, Term term) {
    const Gather a = forward_gather(*s);
    parallel((int64_t)s->N * s->M * s->Ho, int(threads), [&](int64_t job, int) {
        const int64_t n = job / a.A / s->M, m = job / a.A % s->M, i = job % a.A * a.S + a.row0;
        Y* to = y + job * a.B;
        for (int j = 0; j < a.B; ++j) to[j] = 0;
        for (int k = 0; k < a.taps(); ++k) {
            const int64_t h = i + k / a.KW % a.KH, v = k % a.KW + a.col0, c = n * s->C + m / a.M * a.C + k / (a.KH * a.KW);
            const auto weigh = term(m * a.taps() + k);
            for (int j = 0; j < a.B; ++j) {
                const bool inside = h >= 0 && h < a.H && j * a.S + v >= 0 && j * a.S + v < a.W;
                to[j] += weigh(inside ? x[(c * a.H + h) * a.W + j * a.S + v] : X{0});
            }
        }
    });
    return 0;
}

extern "C" int add_conv2d_int(int64_t* y, const int32_t* x, const int32_t* w, const ConvShape* s, int64_t threads) {
    return int_conv(y, x, s, threads, [=](int64_t k) { return [b = w[k]](int64_t v) { return -std::abs(v - b); }; });
}

// 2^15 y for weights +-2^-e: bits 5k .. 5k + 4 of `packed`, after its first byte, hold 16 (w < 0) + e of weight k, and
// 31 stands for weight 0 if the first byte is 1. A product is a shift of x to the left by 15 - e.
extern "C" int shift_conv2d_int(int64_t* y, const int32_t* x, const uint8_t* packed, const ConvShape* s, int64_t threads) {
    return int_conv(y, x, s, threads, [=](int64_t k) {
        const uint8_t* at = packed + 1 + 5 * k / 8;
        const int start = 5 * k % 8, code = (at[0] | (start > 3 ? at[1] << 8 : 0)) >> start & 31;
        const int64_t sign = -(code >> 4), keep = -(code != 31 || packed[0] == 0);
        return [=](int64_t v) { return ((int64_t(uint64_t(v) << (15 - (code & 15))) ^ sign) - sign) & keep; };
    });
}

extern "C" int add_conv2d_u8(int32_t* y, const uint8_t* x, const uint8_t* w, const ConvShape* s, int64_t threads) {
    return outputs(*s) == 0 ? 0 : guarded([&] {
        if (depthwise(s)) add_depthwise<false>(y, x, w, x, forward_gather(*s), int(threads));
        else add_u8(y, x, w, forward_gather(*s), int(threads));
    });
}

extern "C" const char* status_text(int status) { return status == 0 ? "ok" : "memory refused by the system"; }
#endif
