// What modulate computes with: a token's row in float32, the rows of the tables put together, and the moments of a row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../native/common.h"

namespace {

using namespace bernini;

constexpr int64_t kBlock = 256;  // elements that are summed up in float32 and written at once

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

// --- rows in float32 -------------------------------------------------------------------------------------------------

// Such a row lies in planes, block by block, so that a vector of bfloat16 pairs needs no shuffle: the even elements of a
// block, then the odd ones. In float32 the planes are the two halves of the block, which leaves a row as it is. The last
// element of an odd block comes last.

BERNINI_INLINE Pair load(const float* x, int64_t i, int64_t half) { return {x[i], x[half + i]}; }
BERNINI_INLINE Pair load(const bf16* x, int64_t i, int64_t) { return load_pair(x, i); }
BERNINI_INLINE void store(float* y, int64_t i, int64_t half, Pair value) {
    y[i] = value.even;
    y[half + i] = value.odd;
}
BERNINI_INLINE void store(bf16* y, int64_t i, int64_t, Pair value) { store_pair(y, i, value); }

// Where element i of a block of `count` lies.
BERNINI_INLINE int64_t place(int64_t planes, int64_t i, int64_t count) {
    return planes && i < count / 2 * 2 ? i % 2 * (count / 2) + i / 2 : i;
}

// Puts the parts of one table row together: gate, weight * (1 + scale) and bias * (1 + scale) + shift.
BERNINI_CLONES void combine(const Call& call, int64_t row, float* gates, float* factors, float* offsets) {
    float gate[kBlock], scale[kBlock], shift[kBlock], weight[kBlock], bias[kBlock];
    for (int64_t from = 0; from < call.width; from += kBlock) {
        const int64_t count = std::min(kBlock, call.width - from);
        call.gate.read(gate, 1, row, from, count);
        call.scale.read(scale, 0, row, from, count);
        call.shift.read(shift, 0, row, from, count);
        call.weight.read(weight, 1, 0, from, count);
        call.bias.read(bias, 0, 0, from, count);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t to = from + place(call.bf16, i, count);
            gates[to] = canonical(gate[i]);
            factors[to] = canonical(weight[i] * (1 + scale[i]));
            offsets[to] = canonical(bias[i] * (1 + scale[i]) + shift[i]);
        }
    }
}

// The rows that a thread works with: a token's own, and what combine() made for its table row.
struct Rows {
    std::vector<float> memory;
    float *h, *gate, *factor, *offset;
    int64_t loaded = -1;

    explicit Rows(int64_t width)
        : memory(4 * width), h(memory.data()), gate(h + width), factor(gate + width), offset(factor + width) {}

    void load(const Call& call, int64_t row) {
        if (row != loaded) combine(call, loaded = row, gate, factor, offset);
    }
};

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

// h = residual + gate * branch for a block, or the residual alone; rounded into `to` as well unless that is null.
template <typename T>
BERNINI_INLINE void add_branch(float* h, T* to, const T* residual, const T* branch, const float* gate,
                               Moments& moments, int64_t count) {
    const int64_t half = count / 2, last = count - 1;
    const float centre = moments.centre;
    float sum[2][kLanes] = {}, squares[2][kLanes] = {};
    const auto keep = [&](float value, int64_t i, int plane, int lane) __attribute__((always_inline)) {
        h[i] = value;
        sum[plane][lane] += value - centre;
        squares[plane][lane] += (value - centre) * (value - centre);
        return value;
    };
    const auto added = [&](int64_t i, int lane) __attribute__((always_inline)) {
        const Pair x = load(residual, i, half), y = load(branch, i, half);
        return Pair{keep(x.even + gate[i] * y.even, i, 0, lane), keep(x.odd + gate[half + i] * y.odd, half + i, 1, lane)};
    };
    if (!branch)
        in_lanes(half, [&](int64_t i, int lane) __attribute__((always_inline)) {
            const Pair x = load(residual, i, half);
            keep(x.even, i, 0, lane);
            keep(x.odd, half + i, 1, lane);
        });
    else if (!to)
        in_lanes(half, [&](int64_t i, int lane) __attribute__((always_inline)) { added(i, lane); });
    else
        in_lanes(half, [&](int64_t i, int lane) __attribute__((always_inline)) { store(to, i, half, added(i, lane)); });
    if (count % 2) {
        keep(widen(residual[last]) + (branch ? gate[last] * widen(branch[last]) : 0), last, 0, 0);
        if (to) narrow(h[last], to[last]);
    }
    for (int plane = 0; plane < 2; ++plane) {
        moments.sum.add(sum[plane]);
        moments.squares.add(squares[plane]);
    }
}

}  // namespace
