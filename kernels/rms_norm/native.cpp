// RMSNorm forward and backward for float32 and bfloat16, with a float32 weight or none. Computes in float32 (sums over a
// row in double beyond a block) and rounds each result once, at the store.
//
// With r = rsqrt(mean(x^2) + eps) and g = dy * weight: y = x * r * weight, dx = r * (g - x * r^2 * mean(g * x)) and
// dweight = sum over tokens of dy * x * r. A row is read once and widened into the cache. The tokens of dweight are
// summed over fixed chunks and then over the chunks, so it has the same bits for every number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "../native/common.h"

using namespace bernini;

namespace {

constexpr int64_t kBlock = 256;  // elements that are summed up in float32
constexpr int64_t kTokensAtOnce = 64;
constexpr int64_t kLeastTokens = 16;  // of a chunk of backward; the chunks may not depend on the threads
constexpr int64_t kMostChunks = 64;

// Strides are in elements; rows and results are contiguous.
struct Call {
    const void *x, *dy;  // [T, N]; dy in backward
    int64_t x_step, dy_step;
    const float* weight;  // [N], or null
    void *y, *dx;         // [T, N]: of forward, of backward
    float* dweight;       // [N], or null
    int64_t tokens, width;
    double eps;
    int64_t bf16;
};

template <typename T>
BERNINI_INLINE const T* at(const void* data, int64_t token, int64_t step) {
    return static_cast<const T*>(data) + token * step;
}

template <typename T>
BERNINI_INLINE void forward(const Call& call, int64_t begin, int64_t end) {
    const int64_t width = call.width;
    std::vector<float> row(width);
    float* wide = row.data();
    for (int64_t token = begin; token < end; ++token) {
        const T* x = at<T>(call.x, token, call.x_step);
        T* y = static_cast<T*>(call.y) + token * width;
        Sum squares;
        for (int64_t from = 0; from < width; from += kBlock) {
            float lanes[kLanes] = {};
            in_lanes(std::min(kBlock, width - from), [&](int64_t i, int lane) __attribute__((always_inline)) {
                const float value = wide[from + i] = widen(x[from + i]);
                lanes[lane] += value * value;
            });
            squares.add(lanes);
        }
        const float r = static_cast<float>(1 / std::sqrt(squares.total() / static_cast<double>(width) + call.eps));
        if (const float* weight = call.weight)
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) narrow(wide[i] * r * weight[i], y[i]);
        else
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) narrow(wide[i] * r, y[i]);
    }
}

// One chunk of tokens; `kept`: its part of dweight, [N], or null.
template <typename T>
BERNINI_INLINE void backward(const Call& call, int64_t begin, int64_t end, float* kept) {
    const int64_t width = call.width;
    const double n = static_cast<double>(width);
    std::vector<float> rows(2 * width), ones(call.weight ? 0 : width, 1.0f);
    float *wide = rows.data(), *d = wide + width;
    const float* weight = call.weight ? call.weight : ones.data();
    if (kept) std::fill_n(kept, width, 0.0f);
    for (int64_t token = begin; token < end; ++token) {
        const T *x = at<T>(call.x, token, call.x_step), *dy = at<T>(call.dy, token, call.dy_step);
        T* dx = static_cast<T*>(call.dx) + token * width;
        Sum squares, products;
        for (int64_t from = 0; from < width; from += kBlock) {
            float square[kLanes] = {}, product[kLanes] = {};
            in_lanes(std::min(kBlock, width - from), [&](int64_t k, int lane) __attribute__((always_inline)) {
                const int64_t i = from + k;
                const float value = wide[i] = widen(x[i]), slope = d[i] = widen(dy[i]);
                square[lane] += value * value;
                product[lane] += slope * weight[i] * value;
            });
            squares.add(square);
            products.add(product);
        }
        const double inverse = 1 / std::sqrt(squares.total() / n + call.eps);
        const float r = static_cast<float>(inverse);
        const float slope = static_cast<float>(inverse * inverse * (products.total() / n));
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) narrow(r * (d[i] * weight[i] - wide[i] * slope), dx[i]);
        if (kept)
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) kept[i] += d[i] * (wide[i] * r);
    }
}

BERNINI_CLONES void forward_f32(const Call& call, int64_t begin, int64_t end) { forward<float>(call, begin, end); }
BERNINI_CLONES void forward_bf16(const Call& call, int64_t begin, int64_t end) { forward<bf16>(call, begin, end); }
BERNINI_CLONES void backward_f32(const Call& call, int64_t begin, int64_t end, float* kept) {
    backward<float>(call, begin, end, kept);
}
BERNINI_CLONES void backward_bf16(const Call& call, int64_t begin, int64_t end, float* kept) {
    backward<bf16>(call, begin, end, kept);
}

BERNINI_INLINE bool worth_threads(const Call& call) {
    return call.tokens * call.width * (call.bf16 ? 2 : 4) > kParallelBytes;
}

}  // namespace

BERNINI_API void bernini_rms_norm(const Call* call, int threads) {
    const int64_t step = rows_at_once(call->tokens, threads, kTokensAtOnce);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (worth_threads(*call))
    for (int64_t begin = 0; begin < call->tokens; begin += step)
        (call->bf16 ? forward_bf16 : forward_f32)(*call, begin, std::min(begin + step, call->tokens));
}

BERNINI_API void bernini_rms_norm_backward(const Call* call, int threads) {
    const int64_t tokens = call->tokens, width = call->width;
    const int64_t chunks = std::clamp<int64_t>(tokens / kLeastTokens, 1, kMostChunks);
    const std::unique_ptr<float[]> kept(call->dweight ? new float[chunks * width] : nullptr);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (worth_threads(*call))
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
        (call->bf16 ? backward_bf16 : backward_f32)(*call, chunk * tokens / chunks, (chunk + 1) * tokens / chunks,
                                                    kept ? kept.get() + chunk * width : nullptr);
    if (!kept) return;
    for (int64_t i = 0; i < width; ++i) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += kept[chunk * width + i];
        call->dweight[i] = static_cast<float>(sum);
    }
}
