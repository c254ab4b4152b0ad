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
#include <omp.h>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#if defined(__AVX512BW__)
#define MM(op) _mm512_##op
typedef __m512i bytes;
constexpr int LANES = 16, PV = 4, MR = 4;  // register tile of the forward pass: MR channels x PV vectors of pixels
#elif defined(__AVX2__)
#define MM(op) _mm256_##op
typedef __m256i bytes;
constexpr int LANES = 8, PV = 2, MR = 5;
#else
#ifdef __x86_64__
#define MM(op) _mm_##op
typedef __m128i bytes;
#endif
constexpr int LANES = 4, PV = 2, MR = 5;
#endif
constexpr int CR = 2;                      // channels of a grad_x tile
constexpr int PW = PV * LANES;             // pixels of a panel; a panel row holds one tap of them
constexpr int FAR = 64;                    // elements between the buffers of two threads
constexpr int64_t PANEL_BYTES = 64 << 10;  // panels packed at a time (at least one)
#define UNROLL _Pragma("GCC unroll 8")

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
template <class V> struct Unaligned { typedef V type __attribute__((aligned(1), may_alias)); };
template <class V = vec, class T> static inline V load(const T* p) { return *(const typename Unaligned<V>::type*)p; }
template <class V, class T> static inline void store(T* p, V v) { *(typename Unaligned<V>::type*)p = v; }
static inline vec splat(float a) { return a - vec{}; }
static inline vec vabs(vec a) { return (vec)((ivec)a & 0x7fffffff); }
static inline ivec vabs(ivec a) { return (a ^ (a >> 31)) - (a >> 31); }
#ifdef __x86_64__                          // max and min return a NaN that is their second operand, as x86 does
static inline vec vmax(vec a, vec b) { return MM(max_ps)(a, b); }
static inline vec vmin(vec a, vec b) { return MM(min_ps)(a, b); }
#else
static inline vec vmax(vec a, vec b) { return a > b ? a : b; }
static inline vec vmin(vec a, vec b) { return a < b ? a : b; }
#endif
static inline bool all_set(ivec a) {
    for (int l = 1; l < LANES; ++l) a[0] &= a[l];
    return a[0];
}
// The value of a in a register, unknown to the compiler. A factor 1 hidden this way makes acc + m an FMA, which runs on
// other execution ports than max and sub: twice the speed.
template <class V> static inline V opaque(V a) {
#ifdef __AVX2__
    asm("" : "+x"(a));
#endif
    return a;
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
        if (run && all_read) std::copy_n(x + at[0], PW, to);
        else for (int l = 0; l < count; ++l) to[l] = read[l] ? x[at[l]] : 0;
    }
    void move_out(float* y, const float* from) const {
        if (run) std::copy_n(from, PW, y + at[0]);
        else for (int l = 0; l < count; ++l) y[at[l]] = from[l];
    }
};

// panel[k][lane] = tap k of the pixels, 0 past the end; sum[lane] = sum of the column
static void pack(const float* source, const Gather& a, int g, const Lanes& pixels, float* panel, float* sum) {
    typedef float oct __attribute__((vector_size(32)));
    typedef int32_t ioct __attribute__((vector_size(32)));
    const int64_t plane = (int64_t)a.H * a.W, size = (int64_t)a.N * a.G * a.C * plane;
    for (int l0 = 0; l0 < PW; l0 += 8) {
        int64_t base[8];                   // of tap (0, 0, 0)
        ioct row, col;
        bool run = true;                   // the 8 pixels lie side by side
        for (int l = 0; l < 8; ++l) {
            const int p = std::min(l0 + l, pixels.count - 1);
            row[l] = l0 + l < pixels.count ? pixels.i[p] * a.S + a.row0 : -a.KH, col[l] = pixels.j[p] * a.S + a.col0;
            base[l] = ((int64_t)pixels.n[p] * a.G + g) * a.C * plane + (int64_t)row[l] * a.W + col[l];
            run = run && l0 + l < pixels.count && base[l] == base[0] + l;
        }
        oct total{};
        for (int t = 0; t < a.KH * a.KW; ++t) {
            const int u = t / a.KW, v = t % a.KW;
            const ioct inside = (row + u >= 0) & (row + u < a.H) & (col + v >= 0) & (col + v < a.W);
            const int64_t delta = (int64_t)u * a.W + v, first = base[0] + delta;
            const bool vector = run && first >= 0 && first + (a.C - 1) * plane + 8 <= size;
            float* to = panel + (int64_t)t * PW + l0;
            for (int64_t c = 0; c < a.C; ++c, to += (int64_t)a.KH * a.KW * PW) {
                oct x;
                if (vector) x = load<oct>(source + first + c * plane);
                else for (int l = 0; l < 8; ++l) x[l] = inside[l] ? source[base[l] + delta + c * plane] : 0;
                x = (oct)((ioct)x & inside);
                store(to, x);
                total += x;
            }
        }
        store(sum + l0, total);
    }
}

// acc = sum_k max(x, w), or sum_k |x - w| if direct, for one panel and MR channels
template <bool direct> static inline void forward_sums(const float* panel, const float* w, int K, vec (&acc)[MR][PV]) {
    const vec one = opaque(splat(1));
    UNROLL for (int r = 0; r < MR * PV; ++r) acc[r / PV][r % PV] = vec{};
    for (int k = 0; k < K; ++k, panel += PW, w += MR) {
        vec x[PV];
        UNROLL for (int q = 0; q < PV; ++q) x[q] = opaque(load(panel + q * LANES));
        UNROLL for (int r = 0; r < MR; ++r) {
            const vec b = splat(w[r]);
            UNROLL for (int q = 0; q < PV; ++q) acc[r][q] += (direct ? vabs(x[q] - b) : vmax(b, x[q])) * one;
        }
    }
}

// y of one panel and MR channels. |x - w| = 2 max(x, w) - x - w gives y = sum x + sum w - 2 sum max(x, w); where y is
// small beside sum |w| (x and w share an offset, or nearly agree) or not finite, the tile is redone from |x - w|.
static void forward_tile(const float* panel, const float* sum, const float* w, const float* sum_w, const float* abs_w,
                         int K, float (&out)[MR][PW]) {
    vec acc[MR][PV];
    forward_sums<false>(panel, w, K, acc);
    ivec good = ~ivec{};
    UNROLL for (int r = 0; r < MR; ++r) UNROLL for (int q = 0; q < PV; ++q) {
        acc[r][q] = 2 * acc[r][q] - sum_w[r] - load(sum + q * LANES);
        good &= (8 * acc[r][q] >= splat(abs_w[r])) & (acc[r][q] <= splat(FLT_MAX));
    }
    if (!all_set(good)) forward_sums<true>(panel, w, K, acc);
    UNROLL for (int r = 0; r < MR; ++r) UNROLL for (int q = 0; q < PV; ++q) store(out[r] + q * LANES, -acc[r][q]);
}

// gx = sum_k g clip(w - x, -1, 1) of one panel of g and CR channels; sum = sum_k g. As clip(w - x, -1, 1) =
// min(max(w, x - 1), x + 1) - x, a term is max, min and FMA; that loses digits as |x| grows, so beyond 8 it is direct.
template <bool direct> static inline void grad_sums(const float* panel, const float* sum, const float* w,
                                                    const float (&x)[CR][PW], int K, float (&out)[CR][PW]) {
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
            const vec b = splat(w[c]);
            UNROLL for (int q = 0; q < PV; ++q) acc[c][q] += g[q] * (direct
                ? vmin(one, vmax(-one, b - low[c][q])) : vmin(high[c][q], vmax(low[c][q], b)));
        }
    }
    UNROLL for (int c = 0; c < CR; ++c) UNROLL for (int q = 0; q < PV; ++q)
        store(out[c] + q * LANES, direct ? acc[c][q] : acc[c][q] - load(x[c] + q * LANES) * load(sum + q * LANES));
}

static void grad_tile(const float* panel, const float* sum, const float* w, const float (&x)[CR][PW], int K,
                      float (&out)[CR][PW]) {
    ivec small = ~ivec{};
    UNROLL for (int q = 0; q < CR * PV; ++q) small &= vabs(load(x[q / PV] + q % PV * LANES)) <= splat(8);
    if (all_set(small)) grad_sums<false>(panel, sum, w, x, K, out);
    else grad_sums<true>(panel, sum, w, x, K, out);
}

// out = -sum |source - w| or, with `grad`, sum source clip(w - x, -1, 1), by Gather. A job packs panels of pixels, then
// goes through the register tiles of channels, whose weights lie as taps[tile][k][R].
template <bool grad> static void add_panels(float* out, const float* source, const float* w, const float* x,
                                            const Gather& a, int threads) {
    constexpr int R = grad ? CR : MR;
    const int K = a.taps(), area = a.KH * a.KW;
    const int64_t tiles = ceil_div(a.M, R), map = (int64_t)a.height * a.width, panels = ceil_div(a.pixels(), PW);
    const int64_t block = std::max<int64_t>(1, PANEL_BYTES / ((K + 1) * PW * 4)), size = block * (K + 1) * PW + FAR;
    std::vector<float> taps(a.G * tiles * K * R), sum_w(a.G * tiles * R), abs_w(sum_w), work(threads * size);
    std::vector<Lanes> lanes(threads * block);
    std::vector<int64_t> offset(area);
    for (int t = 0; t < area; ++t) offset[t] = t / a.KW * a.wu + t % a.KW * a.wv + a.w0;
    parallel(a.G * tiles * R, threads, [&](int64_t job, int) {
        const int64_t g = job / (tiles * R), o = std::min<int64_t>(job % (tiles * R), a.M - 1);  // the last repeats
        double total = 0, total_abs = 0;
        float* to = taps.data() + job / R * K * R + job % R;
        for (int c = 0; c < a.C; ++c)
            for (int t = 0; t < area; ++t, to += R) {
                const float b = w[g * a.wg + o * a.wo + c * a.wc + offset[t]];
                *to = grad && std::isnan(b) ? 0 : b;
                total += b, total_abs += std::fabs(b);
            }
        sum_w[job] = float(total), abs_w[job] = float(total_abs);
    });
    parallel(ceil_div(panels, int(block)), threads, [&](int64_t job, int thread) {
        float *panel = work.data() + thread * size, *sum = panel + block * K * PW;
        Lanes* pixels = lanes.data() + thread * block;
        const int64_t first = job * block, count = std::min(block, panels - first);
        for (int64_t p = 0; p < count; ++p) pixels[p].set(a, (first + p) * PW);
        for (int g = 0; g < a.G; ++g) {
            for (int64_t p = 0; p < count; ++p)
                pack(source, a, g, pixels[p], panel + p * K * PW, sum + p * PW);
            for (int64_t tile = g * tiles; tile < (g + 1) * tiles; ++tile)
                for (int64_t p = 0; p < count; ++p) {
                    alignas(64) float in[R][PW], result[R][PW];
                    const int64_t o = tile % tiles * R, channel = (g * a.M + o) * map, rows = std::min<int64_t>(R, a.M - o);
                    const float *from = panel + p * K * PW, *b = taps.data() + tile * K * R;
                    if constexpr (grad) {
                        for (int r = 0; r < R; ++r) std::fill_n(in[r], PW, 0.f);
                        for (int r = 0; r < rows; ++r) pixels[p].move_in(in[r], x + channel + r * map);
                        grad_tile(from, sum + p * PW, b, in, K, result);
                    } else forward_tile(from, sum + p * PW, b, sum_w.data() + tile * R, abs_w.data() + tile * R, K, result);
                    for (int r = 0; r < rows; ++r) pixels[p].move_out(out + channel + r * map, result[r]);
                }
        }
    });
}

// The same for depthwise layers, float32 or bytes. The source map is copied with its padding, split into S column phases,
// so that the source pixels a tap needs for side-by-side result pixels lie side by side.
template <bool grad, class Y, class X> static void add_depthwise(Y* out, const X* source, const X* w, const X* x,
                                                                 const Gather& a, int threads) {
    typedef X x_vec __attribute__((vector_size(LANES * sizeof(X))));
    typedef Y y_vec __attribute__((vector_size(LANES * sizeof(Y))));
    const int rows = (a.A - 1) * a.S + a.KH, columns = (a.B - 1) * a.S + a.KW, width = ceil_div(columns, a.S) + LANES;
    const int64_t size = (int64_t)rows * a.S * width + FAR;
    const bool all_read = a.meets(0, 0) && a.meets(a.A - 1, a.B - 1);
    std::vector<X> work(threads * size);
    const int taps = a.taps();
    std::vector<Y> weight(a.G * taps);
    std::vector<int> offset(taps);
    for (int k = 0; k < a.G * taps; ++k) {
        const int u = k % taps / a.KW, v = k % a.KW;
        const X b = w[k / taps * a.wg + u * a.wu + v * a.wv + a.w0];
        weight[k] = grad && b != b ? 0 : b, offset[k % taps] = (u * a.S + v % a.S) * width + v / a.S;
    }
    parallel((int64_t)a.N * a.G, threads, [&](int64_t p, int thread) {
        X* plane = work.data() + thread * size;
        for (int i = std::max(0, a.row0); i < std::min(a.H, rows + a.row0); ++i)
            for (int phase = 0; phase < a.S; ++phase) {
                X* to = plane + ((int64_t)(i - a.row0) * a.S + phase) * width;
                const X* from = source + (p * a.H + i) * a.W + a.col0 + phase;
                const int first = ceil_div(std::max(0, -a.col0 - phase), a.S);
                const int last = ceil_div(std::max(0, std::min(a.W - a.col0, columns) - phase), a.S);
                if (a.S == 1) std::copy(from + first, from + std::max(first, last), to + first);
                else for (int b = first; b < last; ++b) to[b] = from[b * a.S];
            }
        const Y* b = weight.data() + p % a.G * taps;
        for (int i = 0; i < a.A; ++i)
            for (int j = 0; j < a.B; j += LANES) {
                const int64_t at = (p * a.height + (int64_t)i * a.step + a.row) * a.width + (int64_t)j * a.step + a.col;
                const int count = std::min(LANES, a.B - j);
                const X* from = plane + (int64_t)i * a.S * a.S * width + j;
                y_vec pixel{}, acc{};
                if constexpr (grad) {
                    if (count == LANES && a.step == 1 && all_read) pixel = load(x + at);
                    else for (int l = 0; l < count; ++l)
                        if (all_read || a.meets(i, j + l)) pixel[l] = x[at + l * a.step];
                }
                for (int k = 0; k < taps; ++k) {
                    const y_vec value = __builtin_convertvector(load<x_vec>(from + offset[k]), y_vec);
                    if constexpr (grad) acc += value * vmin(splat(1), vmax(splat(-1), b[k] - pixel));
                    else acc -= vabs(value - b[k]);
                }
                if (count == LANES && a.step == 1) store(out + at, acc);
                else for (int l = 0; l < count; ++l) out[at + l * a.step] = acc[l];
            }
    });
}

// Runs a launcher's body; memory that the system refuses becomes a status.
template <class Body> static int guarded(Body body) {
    try { body(); } catch (const std::exception&) { return -1; }
    return 0;
}

template <bool grad> static void add_gather(float* out, const float* source, const float* w, const float* x,
                                            const Gather& a, int64_t threads) {
    if (a.C == 1 && a.M == 1) add_depthwise<grad>(out, source, w, x, a, int(threads));
    else add_panels<grad>(out, source, w, x, a, int(threads));
}

extern "C" int add_conv2d_forward(float* y, const float* x, const float* w, const ConvShape* s, int64_t threads) {
    return outputs(*s) == 0 ? 0 : guarded([&] { add_gather<false>(y, x, w, nullptr, forward_gather(*s), threads); });
}

extern "C" int add_conv2d_grad_x(float* gx, const float* g, const float* x, const float* w, const ConvShape* s,
                                 int64_t threads) {
    return inputs(*s) == 0 ? 0 : guarded([&] {
        for (int i = 0; i < std::min(s->S, s->H); ++i)
            for (int j = 0; j < std::min(s->S, s->W); ++j)
                add_gather<true>(gx, g, w, x, grad_x_gather(*s, i, j), threads);
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

#ifdef __x86_64__
// minus the sums of the 64-bit lanes of four vectors (their upper halves are 0)
typedef int32_t quad __attribute__((vector_size(16)));
static inline quad minus_totals(const bytes* s) {
    const auto ab = MM(shuffle_ps)((vec)s[0], (vec)s[1], 0x88), cd = MM(shuffle_ps)((vec)s[2], (vec)s[3], 0x88);
    const ivec sum = (ivec)MM(shuffle_ps)(ab, cd, 0x88) + (ivec)MM(shuffle_ps)(ab, cd, 0xdd);
    quad total{};
    UNROLL for (int l = 0; l < LANES; l += 4) total -= load<quad>((const int32_t*)&sum + l);
    return total;
}

// add_conv2d_u8 by psadbw, the sum of absolute differences of bytes, in tiles of 4 pixels x 2 filters. x is laid out with
// channels last, then the patches of TILE pixels one after the other; zeros pad x, and patches and filters to `depth`.
static void add_u8_panels(int32_t* y, const uint8_t* x, const uint8_t* w, const Gather& a, int threads) {
    constexpr int TILE = 16, VB = sizeof(bytes);
    const int area = a.KH * a.KW, row = a.KW * a.C;
    const int64_t rows = (a.A - 1) * a.S + a.KH, columns = (a.B - 1) * a.S + a.KW, map = (int64_t)a.A * a.B;
    const int64_t depth = ceil_div((int64_t)a.taps(), VB) * VB, size = TILE * depth + 4 * FAR;
    std::vector<uint8_t> last(a.N * a.G * rows * columns * a.C), filters((a.G * a.M + 1) * depth), work(threads * size);
    for (int64_t m = 0; m < (int64_t)a.G * a.M; ++m)
        for (int c = 0; c < a.C; ++c)
            for (int t = 0; t < area; ++t) filters[m * depth + t * a.C + c] = w[(m * a.C + c) * area + t];
    parallel((int64_t)a.N * a.G, threads, [&](int64_t image, int) {
        for (int i = 0; i < std::min<int64_t>(a.H, rows + a.row0); ++i)
            for (int j = 0; j < std::min<int64_t>(a.W, columns + a.col0); ++j) {
                uint8_t* to = last.data() + ((image * rows + i - a.row0) * columns + j - a.col0) * a.C;
                const uint8_t* from = x + (image * a.C * a.H + i) * a.W + j;
                for (int64_t c = 0, map = (int64_t)a.H * a.W; c < a.C; ++c) to[c] = from[c * map];
            }
    });
    parallel(ceil_div(a.pixels(), TILE) * a.G, threads, [&](int64_t job, int thread) {
        const int64_t g = job % a.G, q0 = job / a.G * TILE, count = std::min<int64_t>(TILE, a.pixels() - q0);
        uint8_t* patches = work.data() + thread * size;
        int64_t at[TILE];
        for (int l = 0; l < count; ++l) {
            const int64_t n = (q0 + l) / map, r = (q0 + l) % map;
            at[l] = (n * a.G + g) * a.M * map + r;
            const uint8_t* from = last.data() + (((n * a.G + g) * rows + r / a.B * a.S) * columns + r % a.B * a.S) * a.C;
            for (int u = 0; u < a.KH; ++u) std::copy_n(from + u * columns * a.C, row, patches + l * depth + u * row);
        }
        for (int m = 0; m < a.M; m += 2)
            for (int l = 0; l < count; l += 4) {
                const uint8_t *patch = patches + l * depth, *filter = filters.data() + (g * a.M + m) * depth;
                bytes sum0[4] = {}, sum1[4] = {};
                for (int64_t k = 0; k < depth; k += VB) {
                    const bytes b0 = opaque(load<bytes>(filter + k)), b1 = opaque(load<bytes>(filter + depth + k));
                    UNROLL for (int p = 0; p < 4; ++p) {
                        const bytes v = opaque(load<bytes>(patch + p * depth + k));
                        sum0[p] += MM(sad_epu8)(v, b0), sum1[p] += MM(sad_epu8)(v, b1);
                    }
                }
                for (int f = 0; f < std::min(2, a.M - m); ++f) {
                    const quad total = minus_totals(f ? sum1 : sum0);
                    int32_t* ym = y + (m + f) * map;
                    if (l + 4 <= count && at[l + 3] == at[l] + 3) store(ym + at[l], total);
                    else for (int p = 0; p < std::min<int64_t>(4, count - l); ++p) ym[at[l + p]] = total[p];
                }
            }
    });
}
#endif

extern "C" int add_conv2d_u8(int32_t* y, const uint8_t* x, const uint8_t* w, const ConvShape* s, int64_t threads) {
    const Gather a = forward_gather(*s);
    return outputs(*s) == 0 ? 0 : guarded([&] {
        if (a.C == 1 && a.M == 1) add_depthwise<false>(y, x, w, (const uint8_t*)nullptr, a, int(threads));
#ifdef __x86_64__
        else add_u8_panels(y, x, w, a, int(threads));
#else
        else int_conv(y, x, s, threads, [=](int64_t k) { return [b = w[k]](int v) { return -std::abs(v - b); }; });
#endif
    });
}

extern "C" const char* status_text(int status) { return status == 0 ? "ok" : "memory refused by the system"; }
#endif
