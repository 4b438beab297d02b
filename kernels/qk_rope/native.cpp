// RMSNorm of q and k and SA-3D RoPE, forward and backward, for float32 and bfloat16. Computes in float32 (in double the
// product of the table rows and sums beyond one head) and rounds once, at the store.
//
// A pair of head dims (2k, 2k + 1) is one complex number. Factors and weights are kept as planes, all the even dims
// and then all the odd ones, so that a vector of pairs needs no shuffle; a bfloat16 pair is one 32-bit word.
//
// Forward reads each x and writes each y once (the second pass over a token finds it in the cache); backward reads x
// and dy and writes dx. Tokens are shared out to the threads. The gradient of a weight is summed over fixed runs of
// tokens and then over the runs, so it has the same bits for every number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "../native/common.h"

using namespace bernini;

namespace {

// One of q and k. Strides are in elements; the last axis is contiguous everywhere.
struct Side {
    const void* x;       // [T, H, D]
    const void* grad;    // [T, H, D], of the result; backward only
    void* out;           // [ranks, T, H / ranks, D]: the result, or the gradient of x
    const void* weight;  // [H * D] or, per head, [D]; null: no norm
    float* dweight;      // like weight; backward only
    int64_t x_token, x_head, grad_token, grad_head, out_rank, out_token, out_head;
    int64_t heads, heads_per_rank;
    int64_t weight_bf16;
};

struct Call {
    Side sides[2];
    const void* tables[4];  // [rows, pairs, 2] each, float32 or (wide) double
    int64_t table_rows[4], table_pairs[4];
    const void* rows;  // [T, 4]
    int64_t tokens, head_dim;
    double eps;
    int64_t bf16, per_head, wide_rows, wide_tables;
};

// A call and what is derived from it once.
struct Job {
    const Call& call;
    std::vector<float> weights[2];  // two planes; ones without a norm
    int64_t plane[2], head_step[2];
    int64_t bytes;  // of the results
    bool streams;
};

constexpr int64_t kBlock = 1024;      // pairs that are summed up in float32
constexpr int64_t kTokensAtOnce = 32;
constexpr int64_t kLeastRun = 16;     // tokens of a run of backward; the runs may not depend on the threads
constexpr int64_t kMostRuns = 64;
constexpr int64_t kUsualDim = 128;    // of every released model; a constant saves a tenth of the time

// --- the parts -------------------------------------------------------------------------------------------------------

// The rotation of a token: [t | h | w] * segment, slot by slot, rounded once; a plane of cosines and one of sines.
template <typename Table>
BERNINI_INLINE void turn(const Call& call, int64_t token, float* cosine, float* sine) {
    const auto row = [&](int axis) {
        return static_cast<const Table*>(call.tables[axis]) +
               2 * call.table_pairs[axis] * row_at(call.rows, call.wide_rows, 4 * token + axis);
    };
    const Table* segment = row(3);
    for (int axis = 0; axis < 3; ++axis) {
        const int64_t count = call.table_pairs[axis];
        const Table* table = row(axis);
#pragma omp simd
        for (int64_t k = 0; k < count; ++k) {
            const double a = table[2 * k], b = table[2 * k + 1], c = segment[2 * k], d = segment[2 * k + 1];
            cosine[k] = canonical(static_cast<float>(a * c - b * d));
            sine[k] = canonical(static_cast<float>(a * d + b * c));
        }
        segment += 2 * count, cosine += count, sine += count;
    }
}

BERNINI_INLINE void turn(const Call& call, int64_t token, float* cosine, float* sine) {
    call.wide_tables ? turn<double>(call, token, cosine, sine) : turn<float>(call, token, cosine, sine);
}

// The sum of squares of `spans` pieces of `pairs` each.
template <typename T>
BERNINI_INLINE double square_sum(const T* x, int64_t spans, int64_t step, int64_t pairs) {
    Sum sum;
    for (int64_t span = 0; span < spans; ++span, x += step)
        for (int64_t at = 0; at < pairs; at += kBlock) {
            float even[kLanes] = {}, odd[kLanes] = {};
            in_lanes(std::min(kBlock, pairs - at), [&](int64_t k, int lane) __attribute__((always_inline)) {
                const Pair v = load_pair(x, at + k);
                even[lane] += v.even * v.even;
                odd[lane] += v.odd * v.odd;
            });
            sum.add(even);
            sum.add(odd);
        }
    return sum.total();
}

BERNINI_INLINE float norm_factor(double squares, int64_t width, double eps) {
    return static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(width) + eps));
}

BERNINI_INLINE void scale(float* to, const float* from, float factor, int64_t count) {
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) to[k] = from[k] * factor;
}

// y = R * (x * weight) for one head; cosine and sine hold R times the norm's factor.
template <typename T>
BERNINI_INLINE void rotate(T* y, const T* x, const float* weight_even, const float* weight_odd, const float* cosine,
                           const float* sine, int64_t pairs) {
#pragma omp simd
    for (int64_t k = 0; k < pairs; ++k) {
        const Pair v = load_pair(x, k);
        const float even = v.even * weight_even[k], odd = v.odd * weight_odd[k];
        store_pair(y, k, {even * cosine[k] - odd * sine[k], odd * cosine[k] + even * sine[k]});
    }
}

#if defined(__x86_64__)
// The same for bfloat16 where the CPU itself rounds to it: a third of rotate()'s instructions do nothing else. Subnormal
// results become zeros. pairs is a multiple of 16; y is written past the cache if it is aligned to a vector and `streams`.
__attribute__((target("avx512f,avx512bw,avx512bf16"))) void rotate_512(bf16* y, const bf16* x, const float* weight_even,
                                                                      const float* weight_odd, const float* cosine,
                                                                      const float* sine, int64_t pairs, bool streams) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    uint16_t from[32];  // the even halves are the lower 16 of what is rounded together
    for (int i = 0; i < 32; ++i) from[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
    const __m512i order = _mm512_loadu_si512(from);
    streams = streams && reinterpret_cast<intptr_t>(y) % 64 == 0;
    for (int64_t k = 0; k < pairs; k += 16) {
        const __m512i both = _mm512_loadu_si512(x + 2 * k);
        const __m512 c = _mm512_loadu_ps(cosine + k), s = _mm512_loadu_ps(sine + k);
        const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)) * _mm512_loadu_ps(weight_even + k);
        const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(both, upper)) * _mm512_loadu_ps(weight_odd + k);
        const __m512 real = _mm512_fmsub_ps(even, c, _mm512_mul_ps(odd, s));
        const __m512 imaginary = _mm512_fmadd_ps(odd, c, _mm512_mul_ps(even, s));
        const __m512i rounded = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(imaginary, real));
        if (streams)
            _mm512_stream_si512(reinterpret_cast<__m512i*>(y + 2 * k), rounded);
        else
            _mm512_storeu_si512(y + 2 * k, rounded);
    }
}
const bool kRounds = __builtin_cpu_supports("avx512bf16");
#else
void rotate_512(bf16*, const bf16*, const float*, const float*, const float*, const float*, int64_t, bool) {}
constexpr bool kRounds = false;
#endif

// conj(R) * dy: the gradient before the rotation.
BERNINI_INLINE Pair turn_back(Pair dy, float cosine, float sine) {
    return {dy.even * cosine + dy.odd * sine, dy.odd * cosine - dy.even * sine};
}

// Adds one head to the sums of x^2 and of g * x, where g = conj(R) * dy * weight.
template <typename T>
BERNINI_INLINE void add_products(Sum& squares, Sum& products, const T* x, const T* dy, const float* weight_even,
                                 const float* weight_odd, const float* cosine, const float* sine, int64_t pairs) {
    float square[kLanes] = {}, product[kLanes] = {};
    in_lanes(pairs, [&](int64_t k, int lane) __attribute__((always_inline)) {
        const Pair v = load_pair(x, k), g = turn_back(load_pair(dy, k), cosine[k], sine[k]);
        square[lane] += v.even * v.even + v.odd * v.odd;
        product[lane] += g.even * weight_even[k] * v.even + g.odd * weight_odd[k] * v.odd;
    });
    squares.add(square);
    products.add(product);
}

// One head of dx = r * (g - x * c) and of dweight += conj(R) * dy * x * r.
template <typename T>
BERNINI_INLINE void normed_back(T* dx, const T* x, const T* dy, const float* weight_even, const float* weight_odd,
                                float* dweight_even, float* dweight_odd, const float* cosine, const float* sine,
                                float r, float c, int64_t pairs) {
#pragma omp simd
    for (int64_t k = 0; k < pairs; ++k) {
        const Pair v = load_pair(x, k), g = turn_back(load_pair(dy, k), cosine[k], sine[k]);
        dweight_even[k] += g.even * (v.even * r);
        dweight_odd[k] += g.odd * (v.odd * r);
        store_pair(dx, k, {r * (g.even * weight_even[k] - v.even * c), r * (g.odd * weight_odd[k] - v.odd * c)});
    }
}

template <typename T>
BERNINI_INLINE void plain_back(T* dx, const T* dy, const float* cosine, const float* sine, int64_t pairs) {
#pragma omp simd
    for (int64_t k = 0; k < pairs; ++k) store_pair(dx, k, turn_back(load_pair(dy, k), cosine[k], sine[k]));
}

// Walks over the destinations of a token's heads.
template <typename T>
struct Target {
    const Side& side;
    T* at;
    int64_t left;

    BERNINI_INLINE Target(const Side& side, int64_t token)
        : side(side), at(static_cast<T*>(side.out) + token * side.out_token), left(side.heads_per_rank) {}
    BERNINI_INLINE void advance() {
        at += side.out_head;
        if (--left == 0) {
            at += side.out_rank - side.heads_per_rank * side.out_head;
            left = side.heads_per_rank;
        }
    }
};

// --- all the heads of some tokens ------------------------------------------------------------------------------------

template <typename T, int64_t kDim>
BERNINI_INLINE void forward(const Job& job, int64_t begin, int64_t end) {
    const Call& call = job.call;
    const int64_t dim = kDim ? kDim : call.head_dim, pairs = dim / 2;
    std::vector<float> scratch(2 * dim);
    std::vector<T> stage(dim);
    float *turned = scratch.data(), *scaled = turned + dim;  // R, and R times the norm's factor
    for (int64_t token = begin; token < end; ++token) {
        turn(call, token, turned, turned + pairs);
        for (int s = 0; s < 2; ++s) {
            const Side &side = call.sides[s], &other = call.sides[1 - s];
            const T* x = static_cast<const T*>(side.x) + token * side.x_token;
            const T* next = static_cast<const T*>(other.x) + std::min(token + s, end - 1) * other.x_token;
            const float *factors = side.weight ? scaled : turned, *weight = job.weights[s].data();
            if (side.weight && !call.per_head) {
                const bool whole = side.x_head == dim;  // the heads lie side by side
                const double squares = whole ? square_sum(x, 1, 0, side.heads * pairs)
                                             : square_sum(x, side.heads, side.x_head, pairs);
                scale(scaled, turned, norm_factor(squares, side.heads * dim, call.eps), dim);
            }
            Target<T> to(side, token);
            for (int64_t head = 0; head < side.heads; ++head, to.advance()) {
                const T* from = x + head * side.x_head;
                const float* even = weight + head * job.head_step[s];
                if (head < other.heads) prefetch(next + head * other.x_head, dim);
                if (side.weight && call.per_head)
                    scale(scaled, turned, norm_factor(square_sum(from, 1, 0, pairs), dim, call.eps), dim);
                if constexpr (std::is_same_v<T, bf16>)
                    if (kRounds && pairs % 16 == 0) {
                        rotate_512(to.at, from, even, even + job.plane[s], factors, factors + pairs, pairs, job.streams);
                        continue;
                    }
                rotate(job.streams ? stage.data() : to.at, from, even, even + job.plane[s], factors, factors + pairs,
                       pairs);
                if (job.streams) stream(to.at, stage.data(), dim * static_cast<int64_t>(sizeof(T)));
            }
        }
    }
    fence();
}

// `dweights` takes what these tokens add to the gradients of the weights, as planes, q before k.
template <typename T, int64_t kDim>
BERNINI_INLINE void backward(const Job& job, float* dweights, int64_t begin, int64_t end) {
    const Call& call = job.call;
    const int64_t dim = kDim ? kDim : call.head_dim, pairs = dim / 2;
    std::vector<float> scratch(dim);
    std::vector<T> stage(dim);
    float *cosine = scratch.data(), *sine = cosine + pairs;
    if (dweights) std::fill_n(dweights, 2 * (job.plane[0] + job.plane[1]), 0.0f);
    for (int64_t token = begin; token < end; ++token) {
        turn(call, token, cosine, sine);
        for (int s = 0; s < 2; ++s) {
            const Side &side = call.sides[s], &other = call.sides[1 - s];
            const int64_t after = std::min(token + s, end - 1), plane = job.plane[s];
            const T *x = static_cast<const T*>(side.x) + token * side.x_token,
                    *dy = static_cast<const T*>(side.grad) + token * side.grad_token,
                    *next = static_cast<const T*>(other.x) + after * other.x_token,
                    *next_dy = static_cast<const T*>(other.grad) + after * other.grad_token;
            const float* weight = job.weights[s].data();
            float *dweight = dweights + (s ? 2 * job.plane[0] : 0), r = 1, c = 0;
            const auto measure = [&](int64_t first, int64_t last) __attribute__((always_inline)) {
                Sum squares, products;
                for (int64_t head = first; head < last; ++head) {
                    const float* even = weight + head * job.head_step[s];
                    add_products(squares, products, x + head * side.x_head, dy + head * side.grad_head, even,
                                 even + plane, cosine, sine, pairs);
                }
                const double width = static_cast<double>((last - first) * dim);
                const double factor = 1.0 / std::sqrt(squares.total() / width + call.eps);
                r = static_cast<float>(factor);
                c = static_cast<float>(factor * factor * (products.total() / width));
            };
            if (side.weight && !call.per_head) measure(0, side.heads);
            Target<T> to(side, token);
            for (int64_t head = 0; head < side.heads; ++head, to.advance()) {
                const T *from = x + head * side.x_head, *grad = dy + head * side.grad_head;
                const int64_t at = head * job.head_step[s];
                if (head < other.heads) {
                    if (side.weight) prefetch(next + head * other.x_head, dim);
                    prefetch(next_dy + head * other.grad_head, dim);
                }
                T* dx = job.streams ? stage.data() : to.at;
                if (side.weight && call.per_head) measure(head, head + 1);
                if (side.weight)
                    normed_back(dx, from, grad, weight + at, weight + at + plane, dweight + at, dweight + at + plane,
                                cosine, sine, r, c, pairs);
                else
                    plain_back(dx, grad, cosine, sine, pairs);
                if (job.streams) stream(to.at, dx, dim * static_cast<int64_t>(sizeof(T)));
            }
        }
    }
    fence();
}

BERNINI_CLONES void forward_f32(const Job& job, int64_t begin, int64_t end) {
    job.call.head_dim == kUsualDim ? forward<float, kUsualDim>(job, begin, end) : forward<float, 0>(job, begin, end);
}

BERNINI_CLONES void forward_bf16(const Job& job, int64_t begin, int64_t end) {
    job.call.head_dim == kUsualDim ? forward<bf16, kUsualDim>(job, begin, end) : forward<bf16, 0>(job, begin, end);
}

BERNINI_CLONES void backward_f32(const Job& job, float* dweights, int64_t begin, int64_t end) {
    job.call.head_dim == kUsualDim ? backward<float, kUsualDim>(job, dweights, begin, end)
                                   : backward<float, 0>(job, dweights, begin, end);
}

BERNINI_CLONES void backward_bf16(const Job& job, float* dweights, int64_t begin, int64_t end) {
    job.call.head_dim == kUsualDim ? backward<bf16, kUsualDim>(job, dweights, begin, end)
                                   : backward<bf16, 0>(job, dweights, begin, end);
}

// Separates the planes of a weight.
BERNINI_CLONES void spread(float* planes, const Side& side, int64_t half) {
    const auto copy = [&](const auto* weight) __attribute__((always_inline)) {
#pragma omp simd
        for (int64_t k = 0; k < half; ++k) {
            const Pair v = load_pair(weight, k);
            planes[k] = canonical(v.even);
            planes[half + k] = canonical(v.odd);
        }
    };
    side.weight_bf16 ? copy(static_cast<const bf16*>(side.weight)) : copy(static_cast<const float*>(side.weight));
}

// dweight = the sum over the runs, back in the order of the weight.
BERNINI_CLONES void gather(float* dweight, const float* planes, int64_t half, int64_t runs, int64_t run_step) {
    for (int64_t k = 0; k < half; ++k) {
        double even = 0, odd = 0;
        for (int64_t run = 0; run < runs; ++run) {
            even += planes[run * run_step + k];
            odd += planes[run * run_step + half + k];
        }
        dweight[2 * k] = static_cast<float>(even);
        dweight[2 * k + 1] = static_cast<float>(odd);
    }
}

Job prepare(const Call& call) {
    Job job{call, {}, {}, {}, 0, false};
    for (int s = 0; s < 2; ++s) {
        const Side& side = call.sides[s];
        const bool across = side.weight && !call.per_head;
        job.plane[s] = (across ? side.heads : 1) * call.head_dim / 2;
        job.head_step[s] = across ? call.head_dim / 2 : 0;
        job.weights[s].assign(2 * job.plane[s], 1.0f);
        if (side.weight) spread(job.weights[s].data(), side, job.plane[s]);
        job.bytes += call.tokens * side.heads * call.head_dim * (call.bf16 ? 2 : 4);
    }
    job.streams = kCanStream && job.bytes > kStreamBytes;
    return job;
}

int64_t first_bad_row(const Call& call) {
    return first_outside<4>(call.rows, call.wide_rows, 4 * call.tokens, call.table_rows);
}

}  // namespace

// Both return -1, or the position in rows of the first number outside its table; nothing is written then.

BERNINI_API int64_t bernini_qk_rope(const Call* call, int threads) {
    const int64_t tokens = call->tokens, bad = first_bad_row(*call);
    if (bad >= 0) return bad;
    const Job job = prepare(*call);
    const int64_t step = rows_at_once(tokens, threads, kTokensAtOnce);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (job.bytes > kParallelBytes)
    for (int64_t begin = 0; begin < tokens; begin += step)
        (call->bf16 ? forward_bf16 : forward_f32)(job, begin, std::min(begin + step, tokens));
    return -1;
}

BERNINI_API int64_t bernini_qk_rope_backward(const Call* call, int threads) {
    const int64_t tokens = call->tokens, bad = first_bad_row(*call);
    if (bad >= 0) return bad;
    const Job job = prepare(*call);
    const int64_t runs = std::clamp<int64_t>(tokens / kLeastRun, 1, kMostRuns);
    const int64_t run_step = 2 * (job.plane[0] + job.plane[1]);
    // One side may have no heads, and then no weight across them.
    const bool weighted = call->sides[0].weight || call->sides[1].weight;
    const std::unique_ptr<float[]> dweights(weighted ? new float[runs * run_step] : nullptr);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (job.bytes > kParallelBytes)
    for (int64_t run = 0; run < runs; ++run)
        (call->bf16 ? backward_bf16 : backward_f32)(job, weighted ? dweights.get() + run * run_step : nullptr,
                                                    run * tokens / runs, (run + 1) * tokens / runs);
    for (int s = 0; weighted && s < 2; ++s)
        if (call->sides[s].weight)
            gather(call->sides[s].dweight, dweights.get() + (s ? 2 * job.plane[0] : 0), job.plane[s], runs, run_step);
    return -1;
}
