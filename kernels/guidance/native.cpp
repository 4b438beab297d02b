// Chained guidance, adaptive projection, momentum and the scheduler's linear step in one call.
//
// Two passes: the first sums |d|^2, <d, onto> and |onto|^2 of every link d = p[new] - p[old], the second writes the
// outputs as linear combinations with weights made from the sums. Without a projection the second runs alone. Where
// every frame has sums of its own, frame after frame goes through both, so that the second finds it in the caches.
//
// The sums are taken over the differences themselves, not from products of predictions: the two sides of a link are
// close, and their products would lose the digits that matter. They run in float32 over short blocks, in float64
// beyond, in an order that depends on the sizes only: the same bits for every number of threads.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "sums.h"

namespace {

// --- second pass -----------------------------------------------------------------------------------------------------

// A link's share in v: of its difference, and of p[fresh] by itself.
template <typename T>
struct Part {
    const T* fresh;
    float of_delta, of_fresh;
};

// out = start + of_more * more + the parts of a chain; without projection neither `more` nor p[fresh] by itself.
template <int kParts, bool kProjected, typename T>
BERNINI_INLINE void add_parts(float* out, const T* start, const float* more, float of_more, const T* base,
                              const Part<T>* parts, int64_t count) {
    Part<T> part[kParts];
    for (int l = 0; l < kParts; ++l) part[l] = parts[l];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        float sum = kProjected ? of_more * more[i] : 0, before = widen(base[i]);
        for (int l = 0; l < kParts; ++l) {
            const float fresh = widen(part[l].fresh[i]);
            sum += part[l].of_delta * (fresh - before);
            if (kProjected) sum += part[l].of_fresh * fresh;
            before = fresh;
        }
        out[i] = widen(start[i]) + sum;
    }
}

// One or two outputs: out = the sum of weight * term, or that added to it.
template <int kOutputs, bool kAdds>
BERNINI_INLINE void combine(float* const* outputs, const float* const* terms, const float* const* weights,
                            int64_t number, int64_t count) {
    float* out[kOutputs];
    const float* term[kAtOnce];
    float weight[kOutputs][kAtOnce];
    for (int t = 0; t < kAtOnce; ++t) term[t] = t < number ? terms[t] : kZeros;
    for (int j = 0; j < kOutputs; ++j) {
        out[j] = outputs[j];
        for (int t = 0; t < kAtOnce; ++t) weight[j][t] = t < number ? weights[j][t] : 0;
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
        for (int j = 0; j < kOutputs; ++j) {
            float sum = weight[j][0] * term[0][i];
            for (int t = 1; t < kAtOnce; ++t) sum += weight[j][t] * term[t][i];
            out[j][i] = kAdds ? out[j][i] + sum : sum;
        }
}

template <int kOutputs>
BERNINI_INLINE void combine_all(float* const* outputs, const float* const* terms, const float* weights, int64_t number,
                                int64_t count) {
    for (int64_t t = 0; t < number; t += kAtOnce) {
        const float* rows[] = {weights + t, weights + number + t};
        t ? combine<kOutputs, true>(outputs, terms + t, rows, number - t, count)
          : combine<kOutputs, false>(outputs, terms, rows, number, count);
    }
}

// Rounds a block to an output; `room` holds another.
BERNINI_INLINE void put(const Array& output, int64_t at, const float* values, int64_t count, float* room,
                        bool streams) {
    const void* from = values;
    if (output.is_bf16) {
        bf16* narrowed = reinterpret_cast<bf16*>(room);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) narrow(values[i], narrowed[i]);
        from = room;
    }
    const int64_t size = output.is_bf16 ? 2 : 4;
    char* to = static_cast<char*>(output.data) + at * size;
    if (streams)
        stream(to, from, count * size);
    else if (to != from)
        std::memcpy(to, from, count * size);
}

// v from the differences of the predictions.
template <typename T>
BERNINI_INLINE void guided(const Job& job, const float* weights, const float* latent, int64_t at, int64_t count,
                           float* v) {
    const Call& call = job.call;
    const int64_t links = call.link_count;
    const float* more = latent ? latent : kZeros;
    float of_more = weights[2 * links];
    const float* alone = links ? v : fetch(call.predictions[0], at, count, v);
    if (alone != v) std::copy_n(alone, count, v);
    for (int64_t first = 0; first < links; first += job.at_once) {
        Part<T> parts[kAtOnce];
        for (int64_t p = 0; p < kAtOnce; ++p) {  // a chain that is too short goes on with differences of zero
            const int64_t l = std::min(first + p, links - 1);
            parts[p] = {call.prediction<T>(call.links[l].fresh) + at, weights[l], weights[links + l]};
            if (first + p > l) parts[p].of_delta = parts[p].of_fresh = 0;
        }
        // The large term last, so that the others are not rounded to its precision.
        const bool last = first + job.at_once >= links, projected = job.projects || first > 0;
        const T* start = last ? call.prediction<T>(0) + at : reinterpret_cast<const T*>(kZeros);
        const T* base = call.prediction<T>(call.links[first].base) + at;
        if (job.at_once == 1)
            projected ? add_parts<1, true>(v, start, more, of_more, base, parts, count)
                      : add_parts<1, false>(v, start, more, of_more, base, parts, count);
        else
            projected ? add_parts<kAtOnce, true>(v, start, more, of_more, base, parts, count)
                      : add_parts<kAtOnce, false>(v, start, more, of_more, base, parts, count);
        more = v, of_more = 1;
    }
}

// The same from the momentum buffer.
BERNINI_INLINE void guided_by_buffer(const Job& job, const float* weights, const float* latent, int64_t at,
                                     int64_t count, float* v, float* room) {
    const Call& call = job.call;
    const int64_t links = call.link_count, size = call.frames * call.values;
    const float* first = fetch(call.predictions[0], at, count, v);
    if (first != v) std::copy_n(first, count, v);
    const float *of_latent = weights + 2 * links, *of_onto = weights + links;
    if (job.projects && latent) combine<1, true>(&v, &latent, &of_latent, 1, count);
    for (int64_t l = 0; l < links; ++l) {
        const float *carried = call.buffer + l * size + at, *of_carried = weights + l;
        combine<1, true>(&v, &carried, &of_carried, 1, count);
        const float *onto = fetch(call.predictions[call.links[l].fresh], at, count, room), *share = of_onto + l;
        if (job.projects) combine<1, true>(&v, &onto, &share, 1, count);
    }
}

// The usual step in one loop: a short chain, then the solver's one or two outputs from at most two of history. Nothing
// between is stored, and all inputs run through memory side by side, which the processor foresees best.
struct Shares {
    float of_delta[kAtOnce], of_base, of_latent;
    float rows[2][4];  // of the outputs: of the latent, v, history
};

template <int kOutputs, bool kProjected, typename T>
BERNINI_INLINE void finish(float* const* outputs, const T* start, const T* base, const T* const* chain,
                           const float* const* terms, const Shares& shares, int64_t count) {
    const Shares of = shares;
    const T* p[kAtOnce];
    float* out[kOutputs];
    for (int l = 0; l < kAtOnce; ++l) p[l] = chain[l];
    for (int j = 0; j < kOutputs; ++j) out[j] = outputs[j];
    const float *latent = terms[0], *newer = terms[1], *older = terms[2];
    const auto write = [&](int64_t i, int) __attribute__((always_inline)) {
        const float z = latent[i];
        float before = widen(base[i]), sum = kProjected ? of.of_latent * z + of.of_base * before : 0;
        for (int l = 0; l < kAtOnce; ++l) {
            const float fresh = widen(p[l][i]);
            sum += of.of_delta[l] * (fresh - before);
            before = fresh;
        }
        const float v = widen(start[i]) + sum;  // the large term last, as in guided()
        for (int j = 0; j < kOutputs; ++j)
            out[j][i] = of.rows[j][0] * z + of.rows[j][1] * v + of.rows[j][2] * newer[i] + of.rows[j][3] * older[i];
    };
    // The first pass left all but the history in a cache.
    in_lanes(count, write, [&](int64_t i) __attribute__((always_inline)) {
        look_ahead_once(newer + i);
        look_ahead_once(older + i);
    });
}

bool is_usual(const Job& job) {
    const Call& call = job.call;
    bool usual = call.coefficients && !call.buffer && job.at_once == kAtOnce;
    usual &= 0 < call.link_count && call.link_count <= kAtOnce && call.output_count <= 2 && call.history_count <= 2;
    for (int64_t t = 0; t <= call.history_count; ++t) usual &= !call.terms[t].is_bf16;
    return usual;
}

template <int kOutputs, bool kProjected, typename T>
BERNINI_INLINE void finish_chunk(const Job& job, int64_t frame, int64_t number, const float* weights, float* scratch) {
    const Call& call = job.call;
    const int64_t links = call.link_count, terms = 2 + call.history_count;
    const int64_t start = frame * call.values, end = start + std::min((number + 1) * job.chunk, call.values);
    Shares shares{};
    shares.of_latent = weights[2 * links];
    for (int64_t l = links; l-- > 0;) {  // a prediction is the base and all differences up to it
        shares.of_base += weights[links + l];
        shares.of_delta[l] = weights[l] + shares.of_base;
    }
    for (int j = 0; j < kOutputs; ++j) std::copy_n(job.coefficients.data() + j * terms, terms, shares.rows[j]);
    for (int64_t at = start + number * job.chunk; at < end; at += kFinished) {
        const int64_t count = std::min(kFinished, end - at);
        const T* chain[kAtOnce];  // one that is too short goes on with differences of share zero
        for (int64_t l = 0; l < kAtOnce; ++l)
            chain[l] = call.prediction<T>(call.links[std::min(l, links - 1)].fresh) + at;
        const float* inputs[3] = {kZeros, kZeros, kZeros};
        for (int64_t t = 0; t <= call.history_count; ++t)
            inputs[t] = static_cast<const float*>(call.terms[t].data) + at;
        float *to[kOutputs], *out[kOutputs];
        for (int j = 0; j < kOutputs; ++j) {
            to[j] = static_cast<float*>(call.outputs[j].data) + at;
            out[j] = job.streams ? scratch + j * kFinished : to[j];
        }
        const T* base = call.prediction<T>(call.links[0].base) + at;
        finish<kOutputs, kProjected>(out, call.prediction<T>(0) + at, base, chain, inputs, shares, count);
        for (int j = 0; j < kOutputs && job.streams; ++j) stream(to[j], out[j], count * sizeof(float));
    }
}

template <int kOutputs, typename T>
BERNINI_INLINE void finish_chunk(const Job& job, int64_t frame, int64_t number, const float* weights, float* scratch) {
    job.projects ? finish_chunk<kOutputs, true, T>(job, frame, number, weights, scratch)
                 : finish_chunk<kOutputs, false, T>(job, frame, number, weights, scratch);
}

template <typename T>
BERNINI_INLINE void write_chunk(const Job& job, int64_t frame, int64_t number, const float* weights, float* scratch) {
    const Call& call = job.call;
    if (job.usual)
        return call.output_count == 2 ? finish_chunk<2, T>(job, frame, number, weights, scratch)
                                      : finish_chunk<1, T>(job, frame, number, weights, scratch);
    const int64_t terms = 2 + call.history_count;
    const int64_t start = frame * call.values, end = start + std::min((number + 1) * job.chunk, call.values);
    std::vector<const float*> inputs(terms);
    for (int64_t at = start + number * job.chunk; at < end; at += kBlock) {
        const int64_t count = std::min(kBlock, end - at);
        float *v = scratch, *room = scratch + kBlock;
        inputs[1] = v;
        if (call.terms[0].data) inputs[0] = fetch(call.terms[0], at, count, room);
        room += kBlock;
        const float* latent = call.in_x0 ? inputs[0] : nullptr;
        // What is read once, in bursts between arithmetic, the processor does not foresee.
        for (int64_t h = 1; h <= call.history_count && at + 2 * kBlock <= end; ++h)
            call.terms[h].is_bf16 ? prefetch(static_cast<const bf16*>(call.terms[h].data) + at + kBlock, kBlock)
                                  : prefetch(static_cast<const float*>(call.terms[h].data) + at + kBlock, kBlock);
        call.buffer ? guided_by_buffer(job, weights, latent, at, count, v, room)
                    : guided<T>(job, weights, latent, at, count, v);
        if (!call.coefficients) {
            put(call.outputs[0], at, v, count, room, job.streams);
            continue;
        }
        for (int64_t h = 0; h < call.history_count; ++h, room += kBlock)
            inputs[2 + h] = fetch(call.terms[1 + h], at, count, room);
        for (int64_t j = 0; j < call.output_count; j += 2) {
            const bool pair = j + 1 < call.output_count;
            float* sums[2] = {room, room + kBlock};
            for (int k = 0; k < 1 + pair; ++k)
                if (!job.streams && !call.outputs[j + k].is_bf16)
                    sums[k] = static_cast<float*>(call.outputs[j + k].data) + at;
            const float* rows = job.coefficients.data() + j * terms;
            pair ? combine_all<2>(sums, inputs.data(), rows, terms, count)
                 : combine_all<1>(sums, inputs.data(), rows, terms, count);
            for (int k = 0; k < 1 + pair; ++k)
                put(call.outputs[j + k], at, sums[k], count, room + 2 * kBlock, job.streams);
        }
    }
}

// `weights`: of the frame.
BERNINI_CLONES void write_f32(const Job& job, int64_t frame, int64_t number, const float* weights, float* scratch) {
    write_chunk<float>(job, frame, number, weights, scratch);
}

BERNINI_CLONES void write_bf16(const Job& job, int64_t frame, int64_t number, const float* weights, float* scratch) {
    write_chunk<bf16>(job, frame, number, weights, scratch);
}

Job prepare(const Call& call) {
    Job job{call, 0, 1, false, call.apg != kNone && call.eta != 1, false, false, 1, 0, {}, {}};
    const int64_t least = (call.values + kMostChunks - 1) / kMostChunks;
    job.chunk = (least + kMeasured - 1) / kMeasured * kMeasured;
    job.chunks = (call.values + job.chunk - 1) / job.chunk;
    job.measures = job.projects;
    for (int64_t l = 0; call.apg != kNone && l < call.link_count; ++l) job.measures |= call.links[l].threshold > 0;
    int64_t written = 0;
    for (int64_t j = 0; j < call.output_count; ++j)
        written += call.frames * call.values * (call.outputs[j].is_bf16 ? 2 : 4);
    job.streams = kCanStream && written > kStreamBytes;
    job.scratch = std::max(kMeasured, (call.history_count + 5) * kBlock);
    job.at_once = call.buffer ? 1 : kAtOnce;
    for (int64_t l = 1; l < call.link_count; ++l)
        if (call.links[l].base != call.links[l - 1].fresh) job.at_once = 1;
    job.usual = is_usual(job);
    job.sums.resize(call.frames * job.chunks * call.link_count * 3);
    const int64_t numbers = call.coefficients ? call.output_count * (2 + call.history_count) : 0;
    job.coefficients.assign(call.coefficients, call.coefficients + numbers);
    return job;
}

}  // namespace

// See bernini.kernels.guide. Sizes are positive.
BERNINI_API void bernini_guide(const Call* described, int threads) {
    const Call& call = *described;
    Job job = prepare(call);
    const bool two_passes = job.measures || call.buffer;
    const int64_t items = call.frames * job.chunks, width = 2 * call.link_count + 1;
    const auto measure = call.predictions[0].is_bf16 ? measure_bf16 : measure_f32;
    const auto write = call.predictions[0].is_bf16 ? write_bf16 : write_f32;
    // Threads that take equal shares of a frame through both passes find them again in their own caches, and wait for
    // each other once a frame. Where shares would be small, all frames go through the first pass before the second.
    const bool by_frames = two_passes && call.apg == kFrame && job.chunks >= kLeastShare * threads;
    std::vector<float> all(call.frames * width);  // weights
    if (!two_passes) weigh(job, 0, call.frames, all.data());
#pragma omp parallel num_threads(threads) if (items * job.chunk * call.prediction_count * 4 > kParallelBytes)
    {
        std::vector<float> memory(job.scratch + kCacheLine), own(width);
        const intptr_t past = reinterpret_cast<intptr_t>(memory.data()) / sizeof(float) % kCacheLine;
        float* scratch = memory.data() + (kCacheLine - past) % kCacheLine;
        for (int64_t frame = 0; by_frames && frame < call.frames; ++frame) {
#pragma omp for schedule(static)
            for (int64_t number = 0; number < job.chunks; ++number) measure(job, frame, number, scratch);
            weigh(job, frame, 1, own.data());
            // In the same direction again: nearness to what was read last gains less than the processor's foresight.
#pragma omp for schedule(static) nowait
            for (int64_t number = 0; number < job.chunks; ++number) write(job, frame, number, own.data(), scratch);
        }
        if (two_passes && !by_frames) {
#pragma omp for schedule(dynamic)
            for (int64_t item = 0; item < items; ++item) measure(job, item / job.chunks, item % job.chunks, scratch);
#pragma omp single
            weigh(job, 0, call.frames, all.data());
        }
        if (!by_frames) {
#pragma omp for schedule(dynamic)
            for (int64_t item = 0; item < items; ++item) {
                const int64_t frame = item / job.chunks;
                write(job, frame, item % job.chunks, all.data() + frame * width, scratch);
            }
        }
        fence();
    }
}
