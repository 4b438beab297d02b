// What the native twins share. A family's native.cpp includes this file and exports plain C functions.
//
// The library links neither to libtorch nor to an OpenMP runtime: loader.py loads it after torch, so that its GOMP_*
// symbols meet the runtime torch already uses. Every exported function takes the thread count as its last argument.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Raised together with ABI in loader.py whenever the arguments of any exported function change.
#define BERNINI_NATIVE_ABI 3

#define BERNINI_API extern "C" __attribute__((visibility("default")))

// Compiles a function for plain x86-64, AVX2 and AVX-512; the dynamic linker picks by the CPU. Put it on the function
// that holds the arithmetic and keep OpenMP regions outside of it: GCC cuts a region out before it makes the clones.
// Helpers that it calls must be BERNINI_INLINE, or they stay plain x86-64.
#if defined(BERNINI_HAVE_CLONES)
#define BERNINI_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define BERNINI_CLONES
#endif
#define BERNINI_INLINE inline __attribute__((always_inline))

namespace bernini {

// Below this many bytes a second thread costs more than it saves.
constexpr int64_t kParallelBytes = 64 * 1024;

// Results larger than this leave the cache before anybody reads them, so they are written past it.
constexpr int64_t kStreamBytes = 8 << 20;

// How many rows a thread takes from the queue: a share, but not so much that one late thread holds up the others.
inline int64_t rows_at_once(int64_t rows, int threads, int64_t most) {
    return std::clamp<int64_t>((rows + threads - 1) / threads, 1, most);
}

// --- bfloat16: the upper half of a float32 ---------------------------------------------------------------------------

using bf16 = uint16_t;

BERNINI_INLINE float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

BERNINI_INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Rounds to nearest even at bit 16, which the caller cuts at, a value that is not NaN or a canonical one.
BERNINI_INLINE uint32_t round_at_16(float value) {
    const uint32_t bits = as_bits(value);
    return bits + 0x7fffu + ((bits >> 16) & 1u);
}

// A NaN with bits in its lower half could be carried over into a zero by round_at_16(). Widened bfloat16 has none, and
// arithmetic makes none of its own: it is enough to clear the few float32 values that a computation starts with.
BERNINI_INLINE float canonical(float value) { return value != value ? as_float(0x7fc00000u) : value; }

BERNINI_INLINE float widen(float value) { return value; }
BERNINI_INLINE float widen(bf16 value) { return as_float(static_cast<uint32_t>(value) << 16); }

// Rounds any value; NaNs of all kinds stay NaNs.
BERNINI_INLINE void narrow(float value, float& to) { to = value; }
BERNINI_INLINE void narrow(float value, bf16& to) { to = static_cast<bf16>(round_at_16(canonical(value)) >> 16); }

// Two neighbours. In bfloat16 they are one 32-bit word, so that vectors of pairs need no shuffle.
struct Pair {
    float even, odd;
};

BERNINI_INLINE Pair load_pair(const float* x, int64_t k) { return {x[2 * k], x[2 * k + 1]}; }

BERNINI_INLINE Pair load_pair(const bf16* x, int64_t k) {
    uint32_t both;
    std::memcpy(&both, x + 2 * k, sizeof both);
    return {as_float(both << 16), as_float(both & 0xffff0000u)};
}

BERNINI_INLINE void store_pair(float* y, int64_t k, Pair value) {
    y[2 * k] = value.even;
    y[2 * k + 1] = value.odd;
}

// NaNs must be canonical.
BERNINI_INLINE void store_pair(bf16* y, int64_t k, Pair value) {
    const uint32_t both = round_at_16(value.even) >> 16 | (round_at_16(value.odd) & 0xffff0000u);
    std::memcpy(y + 2 * k, &both, sizeof both);
}

// --- memory ----------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
constexpr bool kCanStream = true;

inline void stream_16(void* to, const void* from, int64_t bytes) {
    char* target = static_cast<char*>(to);
    const char* source = static_cast<const char*>(from);
    int64_t at = std::min<int64_t>(-reinterpret_cast<intptr_t>(target) & 15, bytes);  // up to an aligned address
    std::memcpy(target, source, at);
    for (; at + 16 <= bytes; at += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(target + at),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + at)));
    std::memcpy(target + at, source + at, bytes - at);
}

// Such a store waits in a queue until memory takes it, and the queue counts stores, not bytes.
__attribute__((target("avx512f"))) inline void stream_64(void* to, const void* from, int64_t bytes) {
    char* target = static_cast<char*>(to);
    const char* source = static_cast<const char*>(from);
    int64_t at = std::min<int64_t>(-reinterpret_cast<intptr_t>(target) & 63, bytes);
    std::memcpy(target, source, at);
    for (; at + 64 <= bytes; at += 64)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(target + at), _mm512_loadu_si512(source + at));
    std::memcpy(target + at, source + at, bytes - at);
}

// Copies past the cache: without reading the target's lines first and without keeping them, a third less traffic for a
// result that is only written. fence() must follow before another thread may read it.
inline void (*const stream)(void* to, const void* from, int64_t bytes) =
    __builtin_cpu_supports("avx512f") ? stream_64 : stream_16;

inline void fence() { _mm_sfence(); }
#else
constexpr bool kCanStream = false;
inline void stream(void* to, const void* from, int64_t bytes) { std::memcpy(to, from, bytes); }
inline void fence() {}
#endif

// Asks for what the next pass or token reads, into the second cache: the first one is full of this token. Otherwise
// the passes that read memory would wait for it and the others leave it idle.
template <typename T>
BERNINI_INLINE void prefetch(const T* x, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(x + i, 0, 2);
}

// Asks for one cache line some way ahead, from inside a loop that reads more streams than the processor foresees: into
// the first cache, or past all others where the line is read this once.
constexpr int64_t kAhead = 512;  // values

template <typename T>
BERNINI_INLINE void look_ahead(const T* x) {
    __builtin_prefetch(x + kAhead, 0, 3);
}

template <typename T>
BERNINI_INLINE void look_ahead_once(const T* x) {
    __builtin_prefetch(x + kAhead, 0, 0);
}

// --- sums that vectorise and hardly depend on their length -----------------------------------------------------------

constexpr int kLanes = 16;  // strands of a sum: a vector of the widest kind

// Calls step(k, lane) for k in [0, count), lane after lane, so that a sum kept per lane is a vector; before each vector
// but a last short one ahead(k), which may look ahead.
template <typename Step, typename Ahead>
BERNINI_INLINE void in_lanes(int64_t count, const Step& step, const Ahead& ahead) {
    const int64_t whole = count / kLanes * kLanes;
    for (int64_t k = 0; k < whole; k += kLanes) {
        ahead(k);
#pragma omp simd
        for (int lane = 0; lane < kLanes; ++lane) step(k + lane, lane);
    }
    for (int64_t k = whole; k < count; ++k) step(k, static_cast<int>(k - whole));
}

template <typename Step>
BERNINI_INLINE void in_lanes(int64_t count, const Step& step) {
    in_lanes(count, step, [](int64_t) __attribute__((always_inline)) {});
}

// Adds up in double what in_lanes() summed up in float32, a block at a time.
struct Sum {
    double strands[kLanes] = {};

    BERNINI_INLINE void add(const float* lanes) {
#pragma omp simd
        for (int lane = 0; lane < kLanes; ++lane) strands[lane] += lanes[lane];
    }
    BERNINI_INLINE double total() const {
        double sum = 0;
        for (const double strand : strands) sum += strand;
        return sum;
    }
};

// --- row numbers, int64 (wide) or int32 ------------------------------------------------------------------------------

BERNINI_INLINE int64_t row_at(const void* index, int64_t wide, int64_t position) {
    return wide ? static_cast<const int64_t*>(index)[position] : static_cast<const int32_t*>(index)[position];
}

template <int kLimits, typename Index>
int64_t first_outside(const Index* index, int64_t count, const int64_t* limits) {
    bool outside = false;  // a plain reduction, so that the usual case (none) runs vectorised
    for (int64_t i = 0; i < count; i += kLimits)
        for (int j = 0; j < kLimits; ++j) outside |= index[i + j] < 0 || index[i + j] >= limits[j];
    if (outside)
        for (int64_t i = 0; i < count; ++i)
            if (index[i] < 0 || index[i] >= limits[i % kLimits]) return i;
    return -1;
}

// Position of the first of `count` row numbers that is outside its table, or -1. The limits take turns.
template <int kLimits>
int64_t first_outside(const void* index, int64_t wide, int64_t count, const int64_t* limits) {
    return wide ? first_outside<kLimits>(static_cast<const int64_t*>(index), count, limits)
                : first_outside<kLimits>(static_cast<const int32_t*>(index), count, limits);
}

}  // namespace bernini
