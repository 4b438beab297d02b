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

using namespace bernini;

namespace {

// A table, weight or bias: rows `step` elements apart, or null where it is absent.
struct Part {
    const void* data;
    int64_t step, half;  // half: bfloat16, otherwise float32

    BERNINI_INLINE void read(float* to, float absent, int64_t row, int64_t begin, int64_t count) const {
        if (!data)
            std::fill_n(to, count, absent);
        else if (half)
            for (int64_t i = 0; i < count; ++i) to[i] = widen(static_cast<const bf16*>(data)[row * step + begin + i]);
        else
            std::copy_n(static_cast<const float*>(data) + row * step + begin, count, to);
    }
};

// Strides are in elements; the last axis is contiguous everywhere, and results are contiguous.
struct Call {
    const void *residual, *branch, *dsum, *dnormed;  // [T, N]; branch may be null, gradients are for backward
    int64_t residual_step, branch_step, dsum_step, dnormed_step;
    void *sum, *normed;         // forward: [T, N]; sum only with a branch
    void *dresidual, *dbranch;  // backward: [T, N]; dbranch only with a gate
    Part gate, scale, shift, weight, bias;
    float *dgate, *dscale, *dshift, *dweight, *dbias;  // backward; null where the part is absent
    const void* index;                                 // [T]; read only where there are several rows
    int64_t wide_index, tokens, width, rows;
    double eps;
    int64_t bf16;
};

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

constexpr int64_t kBlock = 512;  // elements that are summed up in float32 and written at once
constexpr int64_t kTokensAtOnce = 64;
constexpr int64_t kLeastRun = 16;  // tokens of a chunk of backward; the chunks may not depend on the threads
constexpr int64_t kMostChunks = 64;

// Puts the parts of one table row together: gate, weight * (1 + scale) and bias * (1 + scale) + shift. `spare` is
// overwritten. A function of its own, since everything else is compiled many times.
BERNINI_CLONES void combine(const Call& call, int64_t row, float* gate, float* factor, float* offset, float* spare) {
    const int64_t width = call.width;
    call.scale.read(factor, 0, row, 0, width);
    call.bias.read(gate, 0, 0, 0, width);
    call.shift.read(offset, 0, row, 0, width);
    call.weight.read(spare, 1, 0, 0, width);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        offset[i] += gate[i] * (1 + factor[i]);
        factor[i] = spare[i] * (1 + factor[i]);
    }
    call.gate.read(gate, 1, row, 0, width);
}

// The float32 rows that a thread works with: a token's own, and what combine() made for its table row.
struct Rows {
    std::vector<float> memory;
    float *h, *gate, *factor, *offset;
    int64_t loaded = -1;

    BERNINI_INLINE explicit Rows(int64_t width)
        : memory(4 * width), h(memory.data()), gate(h + width), factor(gate + width), offset(factor + width) {}

    BERNINI_INLINE void load(const Call& call, int64_t row) {
        if (row != loaded) combine(call, loaded = row, gate, factor, offset, h);
    }
};

// A token's row, or null where the tensor is absent.
template <typename T>
BERNINI_INLINE const T* at(const void* data, int64_t token, int64_t step) {
    return data ? static_cast<const T*>(data) + token * step : nullptr;
}
template <typename T>
BERNINI_INLINE T* at(void* data, int64_t token, int64_t step) {
    return data ? static_cast<T*>(data) + token * step : nullptr;
}

// Sums of a row's distances from a centre, and of their squares, in one pass. The centre is the mean of the first block,
// a share p = kBlock / width of the row, and then (mean - centre)^2 <= variance * (1 - p) / p: little can cancel when
// the square of the mean distance is taken off.
struct Moments {
    Sum sum, squares;
    float centre = 0;

    BERNINI_INLINE void centre_on(const float* block, int64_t count) {
        centre = static_cast<float>(sum.total() / static_cast<double>(count));
        float lanes[kLanes] = {}, square[kLanes] = {};
        in_lanes(count, [&](int64_t i, int lane) __attribute__((always_inline)) {
            const float distance = block[i] - centre;
            lanes[lane] += distance;
            square[lane] += distance * distance;
        });
        sum = squares = Sum();
        sum.add(lanes);
        squares.add(square);
    }
    struct Result {
        float mean;
        double variance;
    };
    BERNINI_INLINE Result of(int64_t width) const {
        const double n = static_cast<double>(width), distance = sum.total() / n;
        return {static_cast<float>(centre + distance), std::max(squares.total() / n - distance * distance, 0.0)};
    }
};

// h = residual + gate * branch for a block, or the residual alone.
template <typename T>
BERNINI_INLINE void add_branch(float* h, const T* residual, const T* branch, const float* gate, Moments& moments,
                               int64_t count) {
    float lanes[kLanes] = {}, square[kLanes] = {};
    const float centre = moments.centre;
    const auto add = [&](float value, int64_t i, int lane) __attribute__((always_inline)) {
        h[i] = value;
        lanes[lane] += value - centre;
        square[lane] += (value - centre) * (value - centre);
    };
    if (branch)
        in_lanes(count, [&](int64_t i, int lane) __attribute__((always_inline)) {
            add(widen(residual[i]) + gate[i] * widen(branch[i]), i, lane);
        });
    else
        in_lanes(count, [&](int64_t i, int lane) __attribute__((always_inline)) { add(widen(residual[i]), i, lane); });
    moments.sum.add(lanes);
    moments.squares.add(square);
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
        float* h = rows.h;

        Moments moments;
        for (int64_t from = 0; from < width; from += kBlock) {
            const int64_t count = std::min(kBlock, width - from);
            add_branch(h + from, residual + from, branch ? branch + from : nullptr, rows.gate + from, moments, count);
            if (from == 0) moments.centre_on(h, count);
            if (!branch) continue;
            T* to = job.streams ? stage : sum + from;
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) narrow(h[from + i], to[i]);
            if (job.streams) stream(sum + from, stage, count * static_cast<int64_t>(sizeof(T)));
        }
        const auto [mean, variance] = moments.of(width);
        const float r = static_cast<float>(1 / std::sqrt(variance + call.eps));
        for (int64_t from = 0; from < width; from += kBlock) {
            const int64_t count = std::min(kBlock, width - from);
            prefetch(next_residual + from, count);
            if (branch) prefetch(next_branch + from, count);
            T* to = job.streams ? stage : normed + from;
            const float *values = h + from, *factor = rows.factor + from, *offset = rows.offset + from;
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) narrow((values[i] - mean) * r * factor[i] + offset[i], to[i]);
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
    float *sum_a = kept, *sum_b = kept + width, *sum_c = kept + (keeps.tables ? 2 : 0) * width, *h = rows.h;
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
            add_branch(h + from, residual + from, branch ? branch + from : nullptr, rows.gate + from, moments, count);
            if (from == 0) moments.centre_on(h, count);
        }
        const Moments::Result row = moments.of(width);
        for (int64_t from = 0; from < width; from += kBlock) {
            const int64_t count = std::min(kBlock, width - from);
            if (branch) prefetch(dsum + from, count);
            float g_sum[kLanes] = {}, product[kLanes] = {}, *centred = h + from;
            const float* factor = rows.factor + from;
            const T* dn = dnormed + from;
            in_lanes(count, [&](int64_t i, int lane) __attribute__((always_inline)) {
                const float value = centred[i] - row.mean, g = widen(dn[i]) * factor[i];
                centred[i] = value;
                g_sum[lane] += g;
                product[lane] += g * value;
            });
            g_total.add(g_sum);
            products.add(product);
        }
        // dh = r * (g - mean(g) - u * mean(g * u)), with u = centred * r.
        const double factor = 1 / std::sqrt(row.variance + call.eps);
        const float r = static_cast<float>(factor), mean_g = static_cast<float>(g_total.total() / n),
                    slope = static_cast<float>(factor * factor * (products.total() / n));
        for (int64_t from = 0; from < width; from += kBlock) {
            const int64_t count = std::min(kBlock, width - from), bytes = count * static_cast<int64_t>(sizeof(T));
            prefetch(next_residual + from, count);
            if (branch) prefetch(next_branch + from, count);
            const T* dn = dnormed + from;
            float* dh = h + from;  // the centred value before
            if (keeps.tables) {
                float *a = sum_a + from, *b = sum_b + from;
#pragma omp simd
                for (int64_t i = 0; i < count; ++i) {
                    a[i] += widen(dn[i]) * (dh[i] * r);
                    b[i] += widen(dn[i]);
                }
            }
            const float* factors = rows.factor + from;
            T* to = job.streams ? stage : dresidual + from;
            if (branch) {
                const T* ds = dsum + from;
#pragma omp simd
                for (int64_t i = 0; i < count; ++i) {
                    dh[i] = r * (widen(dn[i]) * factors[i] - mean_g - dh[i] * slope) + widen(ds[i]);
                    narrow(dh[i], to[i]);
                }
            } else {
#pragma omp simd
                for (int64_t i = 0; i < count; ++i)
                    narrow(r * (widen(dn[i]) * factors[i] - mean_g - dh[i] * slope), to[i]);
            }
            if (job.streams) stream(dresidual + from, to, bytes);
            if (!keeps.gate) continue;
            to = job.streams ? stage : dbranch + from;
            const T* added = branch + from;
            const float* gate = rows.gate + from;
            float* c = sum_c + from;
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) {
                c[i] += dh[i] * widen(added[i]);
                narrow(dh[i] * gate[i], to[i]);
            }
            if (job.streams) stream(dbranch + from, to, bytes);
        }
    }
    fence();
}

// The part gradients for the columns [begin, end), end - begin <= kBlock, from the sums of all the runs.
BERNINI_CLONES void finish(const Call& call, const std::vector<Run>& runs, const float* kept, int64_t begin,
                           int64_t end) {
    const Kept keeps(call);
    const int64_t width = call.width, count = end - begin;
    double a[kBlock], b[kBlock], c[kBlock], dweight[kBlock] = {}, dbias[kBlock] = {};
    float weight[kBlock], bias[kBlock], scale[kBlock];
    call.weight.read(weight, 1, 0, begin, count);
    call.bias.read(bias, 0, 0, begin, count);
    auto run = runs.begin();
    for (int64_t row = 0; row < call.rows; ++row) {
        std::fill_n(a, count, 0.0);
        std::fill_n(b, count, 0.0);
        std::fill_n(c, count, 0.0);
        for (; run != runs.end() && run->row == row; ++run) {
            const float* sums = kept + (run - runs.begin()) * keeps.count() * width + begin;
            if (keeps.tables) {
                for (int64_t i = 0; i < count; ++i) a[i] += sums[i];
                for (int64_t i = 0; i < count; ++i) b[i] += sums[width + i];
            }
            if (keeps.gate)
                for (int64_t i = 0; i < count; ++i) c[i] += sums[keeps.tables * 2 * width + i];
        }
        call.scale.read(scale, 0, row, begin, count);
        const int64_t to = row * width + begin;
        for (int64_t i = 0; i < count; ++i) {
            if (call.dgate) call.dgate[to + i] = static_cast<float>(c[i]);
            if (call.dscale) call.dscale[to + i] = static_cast<float>(weight[i] * a[i] + bias[i] * b[i]);
            if (call.dshift) call.dshift[to + i] = static_cast<float>(b[i]);
            dweight[i] += (1.0 + scale[i]) * a[i];
            dbias[i] += (1.0 + scale[i]) * b[i];
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        if (call.dweight) call.dweight[begin + i] = static_cast<float>(dweight[i]);
        if (call.dbias) call.dbias[begin + i] = static_cast<float>(dbias[i]);
    }
}

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
