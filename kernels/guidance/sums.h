// A call of guide, and its first pass: the sums of every link, and the weights that follow from them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../native/common.h"

namespace {

using namespace bernini;

enum Apg : int64_t { kNone, kFrame, kGlobal };

// [F, M], contiguous, float32 or bfloat16.
struct Array {
    void* data;
    int64_t is_bf16;
};

struct Link {
    int64_t fresh, base;  // p[fresh] - p[base]
    double scale, threshold;
};

struct Call {
    const Array* predictions;
    const Array* terms;  // the latent (null data: there is none), then the history
    const Array* outputs;
    const Link* links;
    const double* coefficients;  // [outputs, 2 + history], of latent, v, history; null: the only output is v
    float* buffer;               // [links, F, M], changed; null: no momentum
    int64_t prediction_count, history_count, output_count, link_count;
    int64_t frames, values;
    double sigma, eta, momentum;
    int64_t apg, in_x0;

    template <typename T>
    const T* prediction(int64_t number) const {
        return static_cast<const T*>(predictions[number].data);
    }
};

// Values of a block: of all inputs together they fit the first-level cache, beside what is written in the second pass.
constexpr int64_t kMeasured = 1024, kBlock = 512;
constexpr int64_t kFinished = 256;   // of the second pass where it is one loop: short bursts past the cache
constexpr int64_t kCacheLine = 16;   // values; a vector that crosses its border takes twice as long
constexpr int64_t kMostChunks = 64;  // per frame: what is shared out to the threads
constexpr int64_t kLeastShare = 8;   // chunks of a frame for each thread, so that one more or less hardly counts
constexpr int64_t kAtOnce = 4;  // links of a chain, or terms, in registers
constexpr float kZeros[kBlock] = {};
constexpr double kFrameNormFloor = 1e-12, kGlobalEps = 1e-8;  // as in reference.py

// What is derived from a call.
struct Job {
    const Call& call;
    int64_t chunk, chunks;  // values of a chunk (a frame's last may have fewer), chunks of a frame
    bool measures;          // whether any sum is needed
    bool projects;          // whether the parallel part changes
    bool streams;
    bool usual;                  // whether the second pass is one loop
    int64_t at_once;             // links: of a chain, where each begins with the prediction that the last ended with
    int64_t scratch;             // values that a thread needs room for
    std::vector<double> sums;  // [F, chunks, links, 3]
    std::vector<float> coefficients;
};

BERNINI_INLINE const float* fetch(const Array& array, int64_t at, int64_t count, float* room) {
    if (!array.is_bf16) return static_cast<const float*>(array.data) + at;
    const bf16* from = static_cast<const bf16*>(array.data) + at;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) room[i] = widen(from[i]);
    return room;
}

// --- first pass ------------------------------------------------------------------------------------------------------

struct Step {
    float factor, momentum, sigma;
};

// Adds the three sums of some links of a chain: p[0] - base, p[1] - p[0], ... All inputs run through memory side by
// side. With momentum the buffer of the one link is brought up to date, and it is what is summed.
template <int kLinks, bool kInX0, bool kCarried, typename T>
BERNINI_INLINE void measure(Sum (*totals)[3], const T* base, const T* const* predictions, const float* latent,
                            float* carried, const Step& step, int64_t count) {
    const T* p[kLinks];
    for (int l = 0; l < kLinks; ++l) p[l] = predictions[l];
    float squares[kLinks][kLanes] = {}, along[kLinks][kLanes] = {}, size[kLinks][kLanes] = {};
    const auto add = [&](int64_t i, int lane) __attribute__((always_inline)) {
        float before = widen(base[i]);
        for (int l = 0; l < kLinks; ++l) {
            const float fresh = widen(p[l][i]);
            float delta = fresh - before;
            if (kCarried) carried[i] = delta = step.factor * delta + step.momentum * carried[i];
            const float onto = kInX0 ? latent[i] - step.sigma * fresh : fresh;
            squares[l][lane] += delta * delta;
            along[l][lane] += delta * onto;
            size[l][lane] += onto * onto;
            before = fresh;
        }
    };
    in_lanes(count, add, [&](int64_t i) __attribute__((always_inline)) {
        if (i % (64 / static_cast<int64_t>(sizeof(T))) == 0) {
            look_ahead(base + i);
            for (int l = 0; l < kLinks; ++l) look_ahead(p[l] + i);
        }
        if (kInX0) look_ahead(latent + i);
    });
    for (int l = 0; l < kLinks; ++l) {
        totals[l][0].add(squares[l]);
        totals[l][1].add(along[l]);
        totals[l][2].add(size[l]);
    }
}

template <int kLinks, typename T>
BERNINI_INLINE void measure_up_to(Sum (*totals)[3], const T* base, const T* const* predictions, int64_t number,
                                  const float* latent, const Step& step, int64_t count) {
    if constexpr (kLinks > 1) {
        if (number < kLinks)
            return measure_up_to<kLinks - 1>(totals, base, predictions, number, latent, step, count);
    }
    latent ? measure<kLinks, true, false>(totals, base, predictions, latent, nullptr, step, count)
           : measure<kLinks, false, false>(totals, base, predictions, latent, nullptr, step, count);
}

template <typename T>
BERNINI_INLINE void measure_chunk(Job& job, int64_t frame, int64_t number, float* scratch) {
    const Call& call = job.call;
    const int64_t links = call.link_count, size = call.frames * call.values;
    const int64_t start = frame * call.values, end = start + std::min((number + 1) * job.chunk, call.values);
    const float sigma = static_cast<float>(call.sigma);
    const Step step{call.in_x0 ? -sigma : 1.0f, static_cast<float>(call.momentum), sigma};
    double* to = job.sums.data() + (frame * job.chunks + number) * links * 3;
    for (int64_t first = 0; first < links; first += job.at_once) {
        const int64_t some = std::min(job.at_once, links - first);
        Sum totals[kAtOnce][3];
        for (int64_t at = start + number * job.chunk; at < end; at += kMeasured) {
            const int64_t count = std::min(kMeasured, end - at);
            const float* latent = call.in_x0 ? fetch(call.terms[0], at, count, scratch) : nullptr;
            float* carried = call.buffer ? call.buffer + first * size + at : nullptr;
            const T* base = call.prediction<T>(call.links[first].base) + at;
            const T* p[kAtOnce];
            for (int64_t l = 0; l < some; ++l) p[l] = call.prediction<T>(call.links[first + l].fresh) + at;
            if (!carried)
                measure_up_to<kAtOnce>(totals, base, p, some, latent, step, count);
            else if (latent)
                measure<1, true, true>(totals, base, p, latent, carried, step, count);
            else
                measure<1, false, true>(totals, base, p, latent, carried, step, count);
        }
        for (int64_t l = 0; l < some; ++l)
            for (int s = 0; s < 3; ++s) to[(first + l) * 3 + s] = totals[l][s].total();
    }
}

BERNINI_CLONES void measure_f32(Job& job, int64_t frame, int64_t number, float* scratch) {
    measure_chunk<float>(job, frame, number, scratch);
}

BERNINI_CLONES void measure_bf16(Job& job, int64_t frame, int64_t number, float* scratch) {
    measure_chunk<bf16>(job, frame, number, scratch);
}

// The weights `to` [count, 2 links + 1] of some frames from their sums; without sums (no projection and no threshold)
// from the scales alone.
void weigh(const Job& job, int64_t first, int64_t count, float* to) {
    const Call& call = job.call;
    const int64_t links = call.link_count, width = 2 * links + 1;
    const int64_t together = call.apg == kGlobal ? count : 1;
    const double sign = call.in_x0 ? -call.sigma : 1.0;  // an x0 difference is -sigma times that of the velocities
    const double kept = call.buffer ? 1.0 : sign;        // the buffer holds what the sums are meant for already
    std::vector<double> sums(3 * links);
    for (int64_t frame = first; frame < first + count; frame += together) {
        std::fill(sums.begin(), sums.end(), 0.0);
        if (job.measures)
            for (int64_t chunk = frame * job.chunks; chunk < (frame + together) * job.chunks; ++chunk)
                for (int64_t s = 0; s < 3 * links; ++s) sums[s] += job.sums[chunk * 3 * links + s];
        double of_latent = 0;
        for (int64_t l = 0; l < links; ++l) {
            const double squares = kept * kept * sums[3 * l], along = kept * sums[3 * l + 1], size = sums[3 * l + 2];
            const double scale = call.links[l].scale / sign, threshold = call.links[l].threshold;
            double clip = 1, parallel = 0;
            if (call.apg != kNone && threshold > 0 && squares > threshold * threshold)
                clip = threshold / std::sqrt(squares);
            if (job.projects)
                parallel = (call.eta - 1) * clip * along /
                           (call.apg == kFrame ? std::max(size, kFrameNormFloor * kFrameNormFloor) : size + kGlobalEps);
            to[l] = static_cast<float>(scale * clip * kept);
            to[links + l] = static_cast<float>(scale * parallel * sign);
            if (call.in_x0) of_latent += scale * parallel;
        }
        to[2 * links] = static_cast<float>(of_latent);
        for (int64_t other = 1; other < together; ++other) std::copy(to, to + width, to + other * width);
        to += together * width;
    }
}

}  // namespace
