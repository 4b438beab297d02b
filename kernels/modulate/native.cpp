// Gated residual, LayerNorm, scale and shift, forward and backward, for float32 and bfloat16. Computes in float32 (sums
// over a row in double beyond a block) and rounds each result once, at the store.
//
// A token is read once; the later passes over it work on a float32 copy of the row in the cache. The table rows of a
// token, weight and bias are put together into three rows, gate, factor and offset, and kept while tokens of the same
// table row follow each other; tokens are therefore taken in the order of their table rows.
//
// The gradients of the tables and of weight and bias come from three sums over the tokens of each table row, with u the
// normalised value: A = sum dn * u, B = sum dn, C = sum dh * branch. Then dscale = weight * A + bias * B, dshift = B,
// dgate = C, dweight = sum over rows of (1 + scale) * A, dbias = sum over rows of (1 + scale) * B. They are summed over
// fixed runs of tokens and then over the runs, so they have the same bits for every number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "../native/common.h"
#include "rows.h"

using namespace bernini;

namespace {

// Tokens that follow each other in the order below and have the same table row.
struct Run {
    int64_t row, begin, end;
};

struct Job {
    const Call& call;
    std::vector<int64_t> order;  // the tokens sorted by table row; empty: as they are
    int64_t bytes;               // of the results
    bool streams;

    BERNINI_INLINE int64_t token(int64_t position) const { return order.empty() ? position : order[position]; }
    BERNINI_INLINE int64_t row(int64_t token) const {
        return call.rows == 1 ? 0 : row_at(call.index, call.wide_index, token);
    }
};

constexpr int64_t kTokensAtOnce = 64;
constexpr int64_t kLeastRun = 16;  // tokens of a chunk of backward; the chunks may not depend on the threads
constexpr int64_t kMostChunks = 64;

// A token's row, or null where the tensor is absent.
template <typename T>
BERNINI_INLINE const T* at(const void* data, int64_t token, int64_t step) {
    return data ? static_cast<const T*>(data) + token * step : nullptr;
}
template <typename T>
BERNINI_INLINE T* at(void* data, int64_t token, int64_t step) {
    return data ? static_cast<T*>(data) + token * step : nullptr;
}

template <typename T>
BERNINI_INLINE void forward(const Job& job, int64_t begin, int64_t end) {
    const Call& call = job.call;
    const int64_t width = call.width;
    Rows rows(width);
    T stage[kBlock];
    for (int64_t position = begin; position < end; ++position) {
        const int64_t token = job.token(position), next = job.token(std::min(position + 1, end - 1));
        rows.load(call, job.row(token));
        const T* residual = at<T>(call.residual, token, call.residual_step);
        const T* branch = at<T>(call.branch, token, call.branch_step);
        const T* next_residual = at<T>(call.residual, next, call.residual_step);
        const T* next_branch = at<T>(call.branch, next, call.branch_step);
        T *sum = at<T>(call.sum, token, width), *normed = at<T>(call.normed, token, width);

        Moments moments;
        for (int64_t from = 0; from < width; from += kBlock) {
            const int64_t count = std::min(kBlock, width - from);
            T* to = !branch ? nullptr : job.streams ? stage : sum + from;
            add_branch(rows.h + from, to, residual + from, branch ? branch + from : nullptr, rows.gate + from, moments,
                       count);
            if (from == 0) moments.centre_on(rows.h, count);
            if (branch && job.streams) stream(sum + from, stage, count * static_cast<int64_t>(sizeof(T)));
        }
        const auto [mean, variance] = moments.of(width);
        const float centre = mean, r = static_cast<float>(1 / std::sqrt(variance + call.eps));
        for (int64_t from = 0; from < width; from += kBlock) {
            const int64_t count = std::min(kBlock, width - from), half = count / 2, last = count - 1;
            prefetch(next_residual + from, count);
            if (branch) prefetch(next_branch + from, count);
            const float *h = rows.h + from, *factor = rows.factor + from, *offset = rows.offset + from;
            T* to = job.streams ? stage : normed + from;
            const auto value = [&](int64_t i) __attribute__((always_inline)) {
                return (h[i] - centre) * r * factor[i] + offset[i];
            };
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) store(to, i, half, {value(i), value(half + i)});
            if (count % 2) narrow(value(last), to[last]);
            if (job.streams) stream(normed + from, stage, count * static_cast<int64_t>(sizeof(T)));
        }
    }
    fence();
}

// The sums that backward keeps for each run, one after the other, [width] each.
struct Kept {
    bool tables, gate;

    explicit Kept(const Call& call)
        : tables(call.dscale || call.dshift || call.dweight || call.dbias), gate(call.dgate) {}
    int64_t count() const { return 2 * tables + gate; }
};

// All the tokens of a run; its sums go to `kept`.
template <typename T>
BERNINI_INLINE void backward(const Job& job, Rows& rows, const Run& run, const Kept& keeps, float* kept) {
    const Call& call = job.call;
    const int64_t width = call.width;
    const double n = static_cast<double>(width);
    float *sum_a = kept, *sum_b = kept + width, *sum_c = kept + (keeps.tables ? 2 : 0) * width;
    T stage[kBlock];
    std::fill_n(kept, keeps.count() * width, 0.0f);
    rows.load(call, run.row);
    for (int64_t position = run.begin; position < run.end; ++position) {
        const int64_t token = job.token(position), next = job.token(std::min(position + 1, run.end - 1));
        const T* residual = at<T>(call.residual, token, call.residual_step);
        const T* branch = at<T>(call.branch, token, call.branch_step);
        const T* dsum = at<T>(call.dsum, token, call.dsum_step);
        const T* dnormed = at<T>(call.dnormed, token, call.dnormed_step);
        const T* next_residual = at<T>(call.residual, next, call.residual_step);
        const T* next_branch = at<T>(call.branch, next, call.branch_step);
        T *dresidual = at<T>(call.dresidual, token, width), *dbranch = at<T>(call.dbranch, token, width);

        Moments moments;
        Sum g_total, products;
        for (int64_t from = 0; from < width; from += kBlock) {
            const int64_t count = std::min(kBlock, width - from);
            prefetch(dnormed + from, count);
            add_branch<T>(rows.h + from, nullptr, residual + from, branch ? branch + from : nullptr, rows.gate + from,
                          moments, count);
            if (from == 0) moments.centre_on(rows.h, count);
        }
        const auto [mean, variance] = moments.of(width);
        const float centre = mean;
        for (int64_t from = 0; from < width; from += kBlock) {
            const int64_t count = std::min(kBlock, width - from), half = count / 2, last = count - 1;
            if (branch) prefetch(dsum + from, count);
            float g_sum[2][kLanes] = {}, product[2][kLanes] = {}, *centred = rows.h + from;
            const float* factor = rows.factor + from;
            const T* dn = dnormed + from;
            const auto add = [&](float dn, int64_t i, int plane, int lane) __attribute__((always_inline)) {
                const float g = dn * factor[i];
                centred[i] -= centre;
                g_sum[plane][lane] += g;
                product[plane][lane] += g * centred[i];
            };
            in_lanes(half, [&](int64_t i, int lane) __attribute__((always_inline)) {
                const Pair d = load(dn, i, half);
                add(d.even, i, 0, lane);
                add(d.odd, half + i, 1, lane);
            });
            if (count % 2) add(widen(dn[last]), last, 0, 0);
            for (int plane = 0; plane < 2; ++plane) {
                g_total.add(g_sum[plane]);
                products.add(product[plane]);
            }
        }
        // dh = r * (g - mean(g) - u * mean(g * u)), with u = centred * r.
        const double factor = 1 / std::sqrt(variance + call.eps);
        const float r = static_cast<float>(factor), mean_g = static_cast<float>(g_total.total() / n),
                    slope = static_cast<float>(factor * factor * (products.total() / n));
        for (int64_t from = 0; from < width; from += kBlock) {
            const int64_t count = std::min(kBlock, width - from), half = count / 2, last = count - 1;
            const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
            prefetch(next_residual + from, count);
            if (branch) prefetch(next_branch + from, count);
            const T *dn = dnormed + from, *ds = branch ? dsum + from : nullptr, *y = branch ? branch + from : nullptr;
            const float *factors = rows.factor + from, *gate = rows.gate + from;
            float *dh = rows.h + from, *a = sum_a + from, *b = sum_b + from, *c = sum_c + from;  // dh: centred before
            const auto keep = [&](float dn, int64_t i) __attribute__((always_inline)) {
                a[i] += dn * (dh[i] * r);
                b[i] += dn;
            };
            const auto before_norm = [&](float dn, int64_t i) __attribute__((always_inline)) {
                return r * (dn * factors[i] - mean_g - dh[i] * slope);
            };
            const auto gated = [&](float y, int64_t i) __attribute__((always_inline)) {
                c[i] += dh[i] * y;
                return dh[i] * gate[i];
            };
            if (keeps.tables) {
#pragma omp simd
                for (int64_t i = 0; i < half; ++i) {
                    const Pair d = load(dn, i, half);
                    keep(d.even, i);
                    keep(d.odd, half + i);
                }
                if (count % 2) keep(widen(dn[last]), last);
            }
            T* to = job.streams ? stage : dresidual + from;
            if (branch) {
#pragma omp simd
                for (int64_t i = 0; i < half; ++i) {
                    const Pair d = load(dn, i, half), s = load(ds, i, half);
                    dh[i] = before_norm(d.even, i) + s.even;
                    dh[half + i] = before_norm(d.odd, half + i) + s.odd;
                    store(to, i, half, {dh[i], dh[half + i]});
                }
                if (count % 2) narrow(dh[last] = before_norm(widen(dn[last]), last) + widen(ds[last]), to[last]);
            } else {
#pragma omp simd
                for (int64_t i = 0; i < half; ++i) {
                    const Pair d = load(dn, i, half);
                    store(to, i, half, {before_norm(d.even, i), before_norm(d.odd, half + i)});
                }
                if (count % 2) narrow(before_norm(widen(dn[last]), last), to[last]);
            }
            if (job.streams) stream(dresidual + from, stage, bytes);
            if (!keeps.gate) continue;
            to = job.streams ? stage : dbranch + from;
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                const Pair v = load(y, i, half);
                store(to, i, half, {gated(v.even, i), gated(v.odd, half + i)});
            }
            if (count % 2) narrow(gated(widen(y[last]), last), to[last]);
            if (job.streams) stream(dbranch + from, stage, bytes);
        }
    }
    fence();
}

// The part gradients for the columns of one block from the sums of all the runs.
BERNINI_CLONES void finish(const Call& call, const std::vector<Run>& runs, const float* kept, int64_t begin,
                           int64_t end) {
    const Kept keeps(call);
    const int64_t width = call.width, count = end - begin;
    double sums[3][kBlock], dweight[kBlock] = {}, dbias[kBlock] = {};
    float weight[kBlock], bias[kBlock], scale[kBlock];
    call.weight.read(weight, 1, 0, begin, count);
    call.bias.read(bias, 0, 0, begin, count);
    auto run = runs.begin();
    for (int64_t row = 0; row < call.rows; ++row) {
        for (auto& sum : sums) std::fill_n(sum, count, 0.0);
        for (; run != runs.end() && run->row == row; ++run)
            for (int64_t s = 0; s < keeps.count(); ++s) {
                const float* from = kept + ((run - runs.begin()) * keeps.count() + s) * width + begin;
                double* to = sums[keeps.tables ? s : 2];
                for (int64_t i = 0; i < count; ++i) to[i] += from[i];
            }
        call.scale.read(scale, 0, row, begin, count);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t to = row * width + begin + i, from = place(call.bf16, i, count);
            const double a = sums[0][from], b = sums[1][from], factor = 1.0 + scale[i];
            if (call.dgate) call.dgate[to] = static_cast<float>(sums[2][from]);
            if (call.dscale) call.dscale[to] = static_cast<float>(weight[i] * a + bias[i] * b);
            if (call.dshift) call.dshift[to] = static_cast<float>(b);
            dweight[i] += factor * a;
            dbias[i] += factor * b;
        }
    }
    if (call.dweight) std::copy_n(dweight, count, call.dweight + begin);
    if (call.dbias) std::copy_n(dbias, count, call.dbias + begin);
}

// --- for both dtypes -------------------------------------------------------------------------------------------------

BERNINI_CLONES void forward_f32(const Job& job, int64_t begin, int64_t end) { forward<float>(job, begin, end); }
BERNINI_CLONES void forward_bf16(const Job& job, int64_t begin, int64_t end) { forward<bf16>(job, begin, end); }

template <typename T>
BERNINI_INLINE void backward(const Job& job, const Run* run, const Run* end, float* kept) {
    const Kept keeps(job.call);
    Rows rows(job.call.width);
    for (; run != end; ++run, kept += keeps.count() * job.call.width) backward<T>(job, rows, *run, keeps, kept);
}

BERNINI_CLONES void backward_f32(const Job& job, const Run* run, const Run* end, float* kept) {
    backward<float>(job, run, end, kept);
}
BERNINI_CLONES void backward_bf16(const Job& job, const Run* run, const Run* end, float* kept) {
    backward<bf16>(job, run, end, kept);
}

// Sorts the tokens by table row, keeping their order within a row, unless they are sorted already.
std::vector<int64_t> sorted_by_row(const Job& job) {
    const int64_t tokens = job.call.tokens;
    bool sorted = true;
    for (int64_t token = 1; token < tokens && sorted; ++token) sorted = job.row(token - 1) <= job.row(token);
    if (sorted) return {};
    std::vector<int64_t> start(job.call.rows + 1), order(tokens);
    for (int64_t token = 0; token < tokens; ++token) ++start[job.row(token) + 1];
    for (int64_t row = 0; row < job.call.rows; ++row) start[row + 1] += start[row];
    for (int64_t token = 0; token < tokens; ++token) order[start[job.row(token)]++] = token;
    return order;
}

int64_t first_bad_row(const Call& call) {
    return call.rows == 1 ? -1 : first_outside<1>(call.index, call.wide_index, call.tokens, &call.rows);
}

Job prepare(const Call& call, int64_t results) {
    Job job{call, {}, results * call.tokens * call.width * (call.bf16 ? 2 : 4), false};
    job.order = sorted_by_row(job);
    job.streams = kCanStream && job.bytes > kStreamBytes;
    return job;
}

}  // namespace

// Both return -1, or the position of the first index outside the tables; nothing is written then.

BERNINI_API int64_t bernini_modulate(const Call* call, int threads) {
    const int64_t tokens = call->tokens, bad = first_bad_row(*call);
    if (bad >= 0) return bad;
    const Job job = prepare(*call, call->branch ? 2 : 1);
    const int64_t step = rows_at_once(tokens, threads, kTokensAtOnce);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (job.bytes > kParallelBytes)
    for (int64_t begin = 0; begin < tokens; begin += step)
        (call->bf16 ? forward_bf16 : forward_f32)(job, begin, std::min(begin + step, tokens));
    return -1;
}

BERNINI_API int64_t bernini_modulate_backward(const Call* call, int threads) {
    const int64_t tokens = call->tokens, width = call->width, bad = first_bad_row(*call);
    if (bad >= 0) return bad;
    const Job job = prepare(*call, call->dgate ? 2 : 1);
    const int64_t chunks = std::clamp<int64_t>(tokens / kLeastRun, 1, kMostChunks);
    std::vector<Run> runs;
    std::vector<int64_t> first(chunks + 1);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        first[chunk] = static_cast<int64_t>(runs.size());
        for (int64_t at = chunk * tokens / chunks, end = (chunk + 1) * tokens / chunks; at < end; ++at) {
            const int64_t row = job.row(job.token(at));
            if (first[chunk] == static_cast<int64_t>(runs.size()) || runs.back().row != row) runs.push_back({row, at, at});
            runs.back().end = at + 1;
        }
    }
    first[chunks] = static_cast<int64_t>(runs.size());

    const int64_t step = Kept(*call).count() * width;
    const std::unique_ptr<float[]> kept(new float[runs.size() * step]);
#pragma omp parallel num_threads(threads) if (job.bytes > kParallelBytes)
    {
#pragma omp for schedule(dynamic)
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
            (call->bf16 ? backward_bf16 : backward_f32)(job, runs.data() + first[chunk], runs.data() + first[chunk + 1],
                                                        kept.get() + first[chunk] * step);
#pragma omp for schedule(dynamic)
        for (int64_t begin = 0; begin < width; begin += kBlock)
            finish(*call, runs, kept.get(), begin, std::min(begin + kBlock, width));
    }
    return -1;
}
