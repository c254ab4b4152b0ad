// The add operator of ShiftAddNAS on the CPU: y = -sum |x - w| and its input gradient, plain C ABI.
//
//   build   g++ -x c++ -O3 -std=c++20 -march=native -shared -fPIC -fopenmp kernels.cu -o kernels.so
//           (shiftaddnas.py does it on first use; -mavx2 -mfma or no -m flag give the slower CPU paths)
//
//   function            torch definition in shiftaddnas.py        formula
//   add_conv2d_forward  add_conv2d_definition                     y[n,m,i,j] = -sum |x[n,c,iS+u-P,jS+v-P] - w[m,c,u,v]|
//   add_conv2d_grad_x   add_conv2d_grad_x_definition              gx = sum over the outputs that read x of g clip(w-x,-1,1)
//
// float32, contiguous NCHW. The identity |x - w| = 2 max(x, w) - x - w leaves one max and one add a tap; where it would
// cancel, or meets infinity, the direct form runs. Every output is written by one job: results do not depend on threads.
#include <cstdint>

struct ConvShape { int32_t N, C, H, W, M, KH, KW, S, P, G, Ho, Wo; };      // x (N,C,H,W)  w (M,C/G,KH,KW)  y (N,M,Ho,Wo)

template <class T> static constexpr T ceil_div(T a, int b) { return (a + b - 1) / b; }
static int64_t pixels_out(const ConvShape& s) { return (int64_t)s.N * s.Ho * s.Wo; }
static bool empty_output(const ConvShape& s) { return pixels_out(s) * s.M == 0; }
static bool empty_input(const ConvShape& s) { return (int64_t)s.N * s.C * s.H * s.W == 0; }
enum { NO_MEMORY = -1 };

// ============================================================ CPU build
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>
#include <omp.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, PV = 4, MR = 4;      // register tile: MR filters x PV vectors of pixels
#elif defined(__AVX2__)
constexpr int LANES = 8, PV = 2, MR = 5;
#else
constexpr int LANES = 4, PV = 2, MR = 5;
#endif
constexpr int CR = 4;                          // channels of a grad_x tile
constexpr int PW = PV * LANES;                 // pixels of a panel; a panel row holds one tap of PW pixels
constexpr int64_t PANEL_BYTES = 64 << 10;      // panels packed at a time (at least one)

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef float vec_mem __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef float oct __attribute__((vector_size(32), aligned(4), may_alias));      // packing moves 8 pixels at a time
typedef int32_t ioct __attribute__((vector_size(32), aligned(4), may_alias));

static inline vec load(const float* p) { return *(const vec_mem*)p; }
static inline void store(float* p, vec v) { *(vec_mem*)p = v; }
static inline vec splat(float a) { return a - vec{}; }
static inline vec vabs(vec a) { return (vec)((ivec)a & 0x7fffffff); }
#if defined(__AVX512F__)                       // a NaN in the second operand is returned, as the kernels need
static inline vec vmax(vec a, vec b) { return _mm512_max_ps(a, b); }
static inline vec vmin(vec a, vec b) { return _mm512_min_ps(a, b); }
#elif defined(__AVX2__)
static inline vec vmax(vec a, vec b) { return _mm256_max_ps(a, b); }
static inline vec vmin(vec a, vec b) { return _mm256_min_ps(a, b); }
#else
static inline vec vmax(vec a, vec b) { return a > b ? a : b; }
static inline vec vmin(vec a, vec b) { return a < b ? a : b; }
#endif
// The value of a, kept in a register and unknown to the compiler. A factor 1 hidden this way makes acc + m an FMA, which
// runs on other execution ports than max and sub: twice the speed.
static inline vec opaque(vec a) {
#ifdef __FMA__
    asm("" : "+x"(a));
#endif
    return a;
}

// Calls work(job, thread) for every job in [0, jobs) on `threads` threads. They are torch's own OpenMP team: a second pool
// would fight its idle workers, which spin, for the cores. Each result is written by one job: the outcome does not depend
// on the number of threads.
template <class Work> static void parallel(int64_t jobs, int threads, Work work) {
    const int team = int(std::min<int64_t>(threads, jobs));
#pragma omp parallel for schedule(dynamic) num_threads(team) if (team > 1)
    for (int64_t job = 0; job < jobs; ++job) work(job, omp_get_thread_num());
}

// Source of panels: pixel (n, a, b) of an A x B grid and tap (c, u, v) read data[n, c, a*step+row0+u, b*step+col0+v],
// zero outside the H x W image. The forward pass reads x with it, grad_x reads g.
struct Source {
    const float* data;
    int N, channels, H, W, step, row0, col0, KH, KW, A, B;
    int64_t pixels() const { return (int64_t)N * A * B; }
};

// panel[(c, u, v)][lane] for the PW pixels from q0 on (zero past the end); sum[lane] = sum of the column
static void pack(const Source& s, int chan0, int chans, int64_t q0, float* panel, float* sum, int32_t* tap) {
    const int taps = s.KH * s.KW;
    int32_t* mask = tap + taps;                // tap[t]: offset of tap t in a plane; mask[t][8]: inside the image
    for (int t = 0; t < taps; ++t) tap[t] = t / s.KW * s.W + t % s.KW;
    const int64_t plane = (int64_t)s.H * s.W, size = plane * s.channels * s.N, end = s.pixels();
    for (int l0 = 0; l0 < PW; l0 += 8) {
        int64_t base[8];
        int row[8], col[8];
        bool run = true;                       // the 8 pixels lie side by side in memory
        for (int l = 0; l < 8; ++l) {
            const int64_t q = q0 + l0 + l, n = q / ((int64_t)s.A * s.B);
            const int r = int(q - n * s.A * s.B);
            row[l] = q < end ? r / s.B * s.step + s.row0 : -s.KH;
            col[l] = r % s.B * s.step + s.col0;
            base[l] = (n * s.channels + chan0) * plane + (int64_t)row[l] * s.W + col[l];
            run = run && q < end && base[l] == base[0] + l;
        }
        for (int t = 0; t < taps; ++t)
            for (int l = 0, u = t / s.KW, v = t % s.KW; l < 8; ++l)
                mask[t * 8 + l] = -int((unsigned)(row[l] + u) < (unsigned)s.H & (unsigned)(col[l] + v) < (unsigned)s.W);
        run = run && base[0] >= 0 && base[0] + (chans - 1) * plane + tap[taps - 1] + 8 <= size;
        oct total{};
        float* out = panel + l0;
        for (int c = 0; c < chans; ++c)
            for (int t = 0; t < taps; ++t, out += PW) {
                const int64_t delta = c * plane + tap[t];
                const ioct m = *(const ioct*)(mask + t * 8);
                oct x;
                if (run) x = *(const oct*)(s.data + base[0] + delta);
                else for (int l = 0; l < 8; ++l) x[l] = s.data[(base[l] + delta) & (int64_t)m[l]];
                x = (oct)((ioct)x & m);
                *(oct*)out = x;
                total += x;
            }
        *(oct*)(sum + l0) = total;
    }
}

// acc[r][q] = sum_k max(x, w), or sum_k |x - w| if direct, for MR filters (rows of w, K apart) and one panel
template <bool direct> static inline void add_tile(const float* panel, const float* const* w, int K, vec (&acc)[MR][PV]) {
    const vec one = opaque(splat(1));
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
        for (int q = 0; q < PV; ++q) acc[r][q] = vec{};
    for (int k = 0; k < K; ++k, panel += PW) {
        vec x[PV];
#pragma GCC unroll 8
        for (int q = 0; q < PV; ++q) x[q] = opaque(load(panel + q * LANES));
#pragma GCC unroll 8
        for (int r = 0; r < MR; ++r) {
            const vec wr = splat(w[r][k]);
#pragma GCC unroll 8
            for (int q = 0; q < PV; ++q) acc[r][q] += (direct ? vabs(x[q] - wr) : vmax(wr, x[q])) * one;
        }
    }
}

// acc[c][q] = sum_k g * clip(w - x, -1, 1) for CR channels and one panel of g; x stays in the first-level cache
static inline void grad_tile(const float* panel, const float* w, const float* x, int rows, vec (&acc)[CR][PV]) {
    const vec one = opaque(splat(1)), low = -one;
#pragma GCC unroll 8
    for (int c = 0; c < CR; ++c)
#pragma GCC unroll 8
        for (int q = 0; q < PV; ++q) acc[c][q] = vec{};
    for (int k = 0; k < rows; ++k, panel += PW, w += CR) {
        vec g[PV];
#pragma GCC unroll 8
        for (int q = 0; q < PV; ++q) g[q] = opaque(load(panel + q * LANES));
#pragma GCC unroll 8
        for (int c = 0; c < CR; ++c) {
            const vec wc = splat(w[c]);
#pragma GCC unroll 8
            for (int q = 0; q < PV; ++q)
                acc[c][q] += g[q] * vmin(one, vmax(low, wc * one - load(x + c * PW + q * LANES)));
        }
    }
}

// Offsets of the PW pixels from q0 on inside a tensor (N, planes, ...) whose pixel (n, a, b) is at
// n*image + (a*step+row0)*width + b*step+col0; returns the number of pixels that exist
struct Lanes { int64_t at[PW]; int count; bool run; };
static Lanes lanes(int64_t q0, int64_t end, int A, int B, int64_t image, int width, int step, int row0, int col0) {
    Lanes o;
    o.count = int(std::min<int64_t>(PW, end - q0));
    for (int l = 0; l < o.count; ++l) {
        const int64_t q = q0 + l, n = q / ((int64_t)A * B), r = q - n * A * B;
        o.at[l] = n * image + (r / B * step + row0) * width + r % B * step + col0;
    }
    o.run = o.count == PW && o.at[PW - 1] - o.at[0] == PW - 1 && o.at[PW / 2] - o.at[0] == PW / 2;
    return o;
}

// y of MR filters and one panel. |x - w| = 2 max(x, w) - x - w gives y = sum x + sum w - 2 sum max(x, w); where y is
// small beside sum |w| (x and w share an offset, or nearly agree), or not finite, the tile is redone from |x - w|.
static void add_forward_tile(const float* panel, const float* sum, const float* const* w, const float* sum_w,
                             const float* sum_abs_w, int K, float (&out)[MR][PW]) {
    vec acc[MR][PV];
    add_tile<false>(panel, w, K, acc);
    ivec ok = ~ivec{};
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
        for (int q = 0; q < PV; ++q) {
            const vec y = load(sum + q * LANES) + (sum_w[r] - 2 * acc[r][q]);
            ok &= (-8 * y >= splat(sum_abs_w[r])) & (-y <= splat(FLT_MAX));
            store(out[r] + q * LANES, y);
        }
    int all = -1;
    for (int l = 0; l < LANES; ++l) all &= ok[l];
    if (all) return;
    add_tile<true>(panel, w, K, acc);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
        for (int q = 0; q < PV; ++q) store(out[r] + q * LANES, -acc[r][q]);
}

static void add_forward_panels(float* y, const float* x, const float* w, const ConvShape& s, int threads) {
    const int Cg = s.C / s.G, Mg = s.M / s.G, K = Cg * s.KH * s.KW;
    const Source src{x, s.N, s.C, s.H, s.W, s.S, -s.P, -s.P, s.KH, s.KW, s.Ho, s.Wo};
    const int64_t area = (int64_t)s.Ho * s.Wo, panels = ceil_div(src.pixels(), PW);
    const int64_t block = std::max<int64_t>(1, PANEL_BYTES / ((K + 1) * PW * 4)), jobs = ceil_div(panels, block);
    std::vector<float> sums(2 * (s.M + MR)), work(std::min<int64_t>(threads, jobs) * block * (K + 1) * PW);
    std::vector<Lanes> pixels(std::min<int64_t>(threads, jobs) * block);
    std::vector<int32_t> masks(std::min<int64_t>(threads, jobs) * s.KH * s.KW * 9);
    float *sum_w = sums.data(), *sum_abs_w = sum_w + s.M + MR;
    for (int m = 0; m < s.M; ++m) {
        double total = 0, total_abs = 0;
        for (int k = 0; k < K; ++k) total += w[(int64_t)m * K + k], total_abs += std::fabs(w[(int64_t)m * K + k]);
        sum_w[m] = float(total), sum_abs_w[m] = float(total_abs);
    }
    parallel(jobs, threads, [&](int64_t job, int thread) {
        float *panel = work.data() + thread * block * (K + 1) * PW, *sum = panel + block * K * PW;
        const int64_t first = job * block, count = std::min(block, panels - first);
        Lanes* at = &pixels[thread * block];
        for (int64_t p = 0; p < count; ++p)
            at[p] = lanes((first + p) * PW, src.pixels(), s.Ho, s.Wo, s.M * area, s.Wo, 1, 0, 0);
        for (int g = 0; g < s.G; ++g) {
            for (int64_t p = 0; p < count; ++p)
                pack(src, g * Cg, Cg, (first + p) * PW, panel + p * K * PW, sum + p * PW, &masks[thread * s.KH * s.KW * 9]);
            for (int m0 = 0; m0 < Mg; m0 += MR)
                for (int64_t p = 0; p < count; ++p) {
                    const float* rows[MR];     // a short last tile repeats its last filter
                    float tile_sum[MR], tile_abs[MR];
                    for (int r = 0; r < MR; ++r) {
                        const int m = g * Mg + std::min(m0 + r, Mg - 1);
                        rows[r] = w + (int64_t)m * K, tile_sum[r] = sum_w[m], tile_abs[r] = sum_abs_w[m];
                    }
                    alignas(64) float out[MR][PW];
                    add_forward_tile(panel + p * K * PW, sum + p * PW, rows, tile_sum, tile_abs, K, out);
                    const Lanes& to = at[p];
                    for (int r = 0; r < std::min(MR, Mg - m0); ++r) {
                        float* ym = y + (g * Mg + m0 + r) * area;
                        if (to.run) std::copy(out[r], out[r] + PW, ym + to.at[0]);
                        else for (int l = 0; l < to.count; ++l) ym[to.at[l]] = out[r][l];
                    }
                }
        }
    });
}

// grad_x by gather. Input pixels of one residue (i mod S, j mod S) meet the same taps u = u0 + S*b, v = v0 + S*d, so
// each residue class is a stride-1 correlation of g with a part of w, read backwards.
static void add_grad_x_class(float* gx, const float* g, const float* x, const float* w, const ConvShape& s, int ri, int rj,
                             int threads) {
    const int Cg = s.C / s.G, Mg = s.M / s.G, u0 = (ri + s.P) % s.S, v0 = (rj + s.P) % s.S;
    const int BH = u0 < s.KH ? ceil_div(s.KH - u0, s.S) : 0, BW = v0 < s.KW ? ceil_div(s.KW - v0, s.S) : 0;
    const Source src{g, s.N, s.M, s.Ho, s.Wo, 1, (ri + s.P) / s.S - BH + 1, (rj + s.P) / s.S - BW + 1, BH, BW,
                     int(ceil_div(s.H - ri, s.S)), int(ceil_div(s.W - rj, s.S))};
    const int rows = Mg * BH * BW, tiles = ceil_div(Cg, CR);
    const int64_t area = (int64_t)s.H * s.W, panels = ceil_div(src.pixels(), PW);
    const int64_t block = std::max<int64_t>(1, PANEL_BYTES / ((rows + 1) * PW * 4)), jobs = ceil_div(panels, block);
    std::vector<float> taps((int64_t)s.G * tiles * rows * CR), work(std::min<int64_t>(threads, jobs) * block * (rows + 1) * PW);
    std::vector<Lanes> pixels(std::min<int64_t>(threads, jobs) * block);
    std::vector<int32_t> masks(std::min<int64_t>(threads, jobs) * BH * BW * 9 + 1);
    for (int64_t m = 0; m < s.M; ++m)
        for (int c = 0; c < Cg; ++c)
            for (int b = 0; b < BH; ++b)
                for (int d = 0; d < BW; ++d) {
                    const float a = w[((m * Cg + c) * s.KH + u0 + s.S * (BH - 1 - b)) * s.KW + v0 + s.S * (BW - 1 - d)];
                    const int64_t row = ((m % Mg) * BH + b) * BW + d, tile = m / Mg * tiles + c / CR;
                    taps[(tile * rows + row) * CR + c % CR] = std::isnan(a) ? 0 : a;      // see mark_nan_weights
                }
    parallel(jobs, threads, [&](int64_t job, int thread) {
        float *panel = work.data() + thread * block * (rows + 1) * PW, *sum = panel + block * rows * PW;
        const int64_t first = job * block, count = std::min(block, panels - first);
        Lanes* pixel = &pixels[thread * block];
        for (int64_t p = 0; p < count; ++p)
            pixel[p] = lanes((first + p) * PW, src.pixels(), src.A, src.B, s.C * area, s.W, s.S, ri, rj);
        for (int grp = 0; grp < s.G; ++grp) {
            for (int64_t p = 0; p < count; ++p)
                pack(src, grp * Mg, Mg, (first + p) * PW, panel + p * rows * PW, sum, &masks[thread * BH * BW * 9]);
            for (int c0 = 0; c0 < Cg; c0 += CR)
                for (int64_t p = 0; p < count; ++p) {
                    const Lanes& at = pixel[p];
                    alignas(64) float xt[CR * PW] = {};
                    const int chans = std::min(CR, Cg - c0);
                    const int64_t plane = (grp * Cg + c0) * area;
                    for (int c = 0; c < chans; ++c)
                        if (at.run) std::copy_n(x + plane + c * area + at.at[0], PW, xt + c * PW);
                        else for (int l = 0; l < at.count; ++l) xt[c * PW + l] = x[plane + c * area + at.at[l]];
                    vec acc[CR][PV];
                    grad_tile(panel + p * rows * PW, taps.data() + (int64_t)(grp * tiles + c0 / CR) * rows * CR, xt, rows, acc);
#pragma GCC unroll 8
                    for (int c = 0; c < CR; ++c)
#pragma GCC unroll 8
                        for (int q = 0; q < PV; ++q) store(xt + c * PW + q * LANES, acc[c][q]);
                    for (int c = 0; c < chans; ++c)
                        if (at.run) std::copy_n(xt + c * PW, PW, gx + plane + c * area + at.at[0]);
                        else for (int l = 0; l < at.count; ++l) gx[plane + c * area + at.at[l]] = xt[c * PW + l];
                }
        }
    });
}

// Depthwise forward: one plane at a time, copied with its padding and split into S column phases so that the pixels of
// an output row that meet one tap lie side by side.
static void add_forward_depthwise(float* y, const float* x, const float* w, const ConvShape& s, int threads) {
    const int rows = s.H + 2 * s.P, width = ceil_div(s.W + 2 * s.P, s.S) + LANES, taps = s.KH * s.KW;
    const int64_t planes = (int64_t)s.N * s.C, size = (int64_t)rows * s.S * width;
    std::vector<float> work(std::min<int64_t>(threads, planes) * size);
    parallel(planes, threads, [&](int64_t p, int thread) {
        float* plane = work.data() + thread * size;
        for (int i = 0; i < s.H; ++i)
            for (int j = 0; j < s.W; ++j)
                plane[((i + s.P) * s.S + (j + s.P) % s.S) * width + (j + s.P) / s.S] = x[(p * s.H + i) * s.W + j];
        const float* wp = w + p % s.C * taps;
        for (int i = 0; i < s.Ho; ++i)
            for (int j = 0; j < s.Wo; j += LANES) {
                vec acc{};
                for (int u = 0; u < s.KH; ++u)
                    for (int v = 0; v < s.KW; ++v)
                        acc -= vabs(load(plane + ((i * s.S + u) * s.S + v % s.S) * width + j + v / s.S) - wp[u * s.KW + v]);
                float* out = y + (p * s.Ho + i) * s.Wo + j;
                if (j + LANES <= s.Wo) store(out, acc);
                else for (int l = 0; j + l < s.Wo; ++l) out[l] = acc[l];
            }
    });
}

// Depthwise grad_x: g spread by the stride over a zero plane, then each input pixel gathers its taps.
static void add_grad_x_depthwise(float* gx, const float* g, const float* x, const float* w, const ConvShape& s, int threads) {
    const int rows = std::max(s.H + s.P + s.KH, s.H + 2 * s.P + s.KH), width = s.W + 2 * s.P + s.KW + LANES;
    const int64_t planes = (int64_t)s.N * s.C, size = (int64_t)rows * width;
    std::vector<float> work(std::min<int64_t>(threads, planes) * size);
    parallel(planes, threads, [&](int64_t p, int thread) {
        float* plane = work.data() + thread * size;
        for (int a = 0; a < s.Ho; ++a)
            for (int b = 0; b < s.Wo; ++b)
                plane[(a * s.S + s.KH - 1) * width + b * s.S + s.KW - 1] = g[(p * s.Ho + a) * s.Wo + b];
        const float* wp = w + p % s.C * s.KH * s.KW;
        for (int i = 0; i < s.H; ++i)
            for (int j = 0; j < s.W; j += LANES) {
                const int64_t at = (p * s.H + i) * s.W + j;
                const int count = std::min(LANES, s.W - j);
                vec xv{}, acc{};
                if (count == LANES) xv = load(x + at);
                else for (int l = 0; l < count; ++l) xv[l] = x[at + l];
                const float* gp = plane + (i + s.P + s.KH - 1) * width + j + s.P + s.KW - 1;
                for (int u = 0; u < s.KH; ++u)
                    for (int v = 0; v < s.KW; ++v) {
                        const float a = wp[u * s.KW + v];
                        if (std::isnan(a)) continue;                                       // see mark_nan_weights
                        acc += load(gp - u * width - v) * vmin(splat(1), vmax(splat(-1), a - xv));
                    }
                if (count == LANES) store(gx + at, acc);
                else for (int l = 0; l < count; ++l) gx[at + l] = acc[l];
            }
    });
}

// The gather multiplies taps outside the output by g = 0, and 0 * NaN is NaN: a pixel that no window reads gets 0 here,
static void clear_unread_pixels(float* gx, const ConvShape& s) {
    auto unread = [&](int i, int kernel, int outputs) {
        for (int u = 0; u < kernel; ++u)
            if ((i + s.P - u) % s.S == 0 && i + s.P - u >= 0 && (i + s.P - u) / s.S < outputs) return false;
        return true;
    };
    for (int i = 0; i < s.H; ++i)
        for (int j = 0; j < s.W; ++j)
            if (unread(i, s.KH, s.Ho) || unread(j, s.KW, s.Wo))
                for (int64_t p = 0; p < (int64_t)s.N * s.C; ++p) gx[(p * s.H + i) * s.W + j] = 0;
}

// and a NaN weight, left out of the sums, marks exactly the pixels its tap meets.
static void mark_nan_weights(float* gx, const float* w, const ConvShape& s) {
    const int Cg = s.C / s.G, taps = s.KH * s.KW;
    for (int64_t k = 0; k < (int64_t)s.M * Cg * taps; ++k) {
        if (!std::isnan(w[k])) continue;
        const int64_t m = k / (Cg * taps), c = m / (s.M / s.G) * Cg + k / taps % Cg;
        const int u = k % taps / s.KW, v = k % s.KW;
        for (int64_t n = 0; n < s.N; ++n)
            for (int a = 0; a < s.Ho; ++a)
                for (int b = 0; b < s.Wo; ++b) {
                    const int i = a * s.S + u - s.P, j = b * s.S + v - s.P;
                    if (i >= 0 && i < s.H && j >= 0 && j < s.W) gx[((n * s.C + c) * s.H + i) * s.W + j] = NAN;
                }
    }
}

// Runs a launcher's body; memory that the system refuses becomes a status.
template <class Body> static int guarded(Body body) {
    try { body(); }
    catch (const std::exception&) { return NO_MEMORY; }
    return 0;
}

extern "C" int add_conv2d_forward(float* y, const float* x, const float* w, const ConvShape* s, int64_t threads) {
    if (empty_output(*s)) return 0;
    return guarded([&] {
        if (s->C == s->G && s->M == s->G) add_forward_depthwise(y, x, w, *s, int(threads));
        else add_forward_panels(y, x, w, *s, int(threads));
    });
}

extern "C" int add_conv2d_grad_x(float* gx, const float* g, const float* x, const float* w, const ConvShape* s,
                                 int64_t threads) {
    if (empty_input(*s)) return 0;
    return guarded([&] {
        if (s->C == s->G && s->M == s->G) add_grad_x_depthwise(gx, g, x, w, *s, int(threads));
        else
            for (int ri = 0; ri < std::min(s->S, s->H); ++ri)
                for (int rj = 0; rj < std::min(s->S, s->W); ++rj) add_grad_x_class(gx, g, x, w, *s, ri, rj, int(threads));
        if (s->S > 1) clear_unread_pixels(gx, *s);
        mark_nan_weights(gx, w, *s);
    });
}

extern "C" const char* status_text(int status) {
    return status == 0 ? "ok" : "memory refused by the system";
}
