// Row scatter and gather: copies whole rows of bytes between buffers, so one function serves every dtype.
// Reads and writes each row once, and 4 or 8 bytes of index per row.
#include <cstdint>
#include <cstring>

#include "../native/common.h"

using namespace bernini;

namespace {

// A row of each goes to out; they may be any distance apart.
using Copy = void (*)(void* to, const void* from, int64_t bytes);

void plain(void* to, const void* from, int64_t bytes) { std::memcpy(to, from, bytes); }

// Calls row(copy, i) for i in [0, rows) by all threads. What leaves the cache anyhow is written past it: row by row
// memcpy() cannot know.
template <typename Row>
void each(int64_t rows, int64_t row_bytes, int threads, const Row& row) {
    const bool streams = kCanStream && rows * row_bytes > kStreamBytes;
    const Copy copy = streams ? static_cast<Copy>(stream) : plain;
#pragma omp parallel num_threads(threads) if (rows * row_bytes > kParallelBytes)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; ++i) row(copy, i);
        if (streams) fence();
    }
}

template <typename Index>
void scatter(char* out, int64_t out_stride, const char* source, int64_t source_stride, const Index* index,
             int64_t rows, int64_t row_bytes, int threads) {
    each(rows, row_bytes, threads, [&](Copy copy, int64_t i) {
        copy(out + index[i] * out_stride, source + i * source_stride, row_bytes);
    });
}

template <typename Index>
void gather(char* out, int64_t out_stride, const char* source, int64_t source_stride, const Index* index,
            int64_t rows, int64_t row_bytes, int threads) {
    each(rows, row_bytes, threads, [&](Copy copy, int64_t i) {
        copy(out + i * out_stride, source + index[i] * source_stride, row_bytes);
    });
}

template <typename Index>
int64_t first_outside(const Index* index, int64_t rows, int64_t limit) {
    bool outside = false;  // a plain reduction, so that the usual case (none) runs vectorised
    for (int64_t i = 0; i < rows; ++i) outside |= index[i] < 0 || index[i] >= limit;
    if (outside)
        for (int64_t i = 0; i < rows; ++i)
            if (index[i] < 0 || index[i] >= limit) return i;
    return -1;
}

}  // namespace

// out[index[i]] = source[i] for i in [0, rows). Strides in bytes; index is int64 (wide) or int32, within out and
// without repetitions.
BERNINI_API void bernini_scatter_rows(char* out, int64_t out_stride, const char* source, int64_t source_stride,
                                      const void* index, int wide, int64_t rows, int64_t row_bytes, int threads) {
    if (wide)
        scatter(out, out_stride, source, source_stride, static_cast<const int64_t*>(index), rows, row_bytes, threads);
    else
        scatter(out, out_stride, source, source_stride, static_cast<const int32_t*>(index), rows, row_bytes, threads);
}

// out[i] = source[index[i]] for i in [0, rows). The same arguments; repetitions are fine.
BERNINI_API void bernini_gather_rows(char* out, int64_t out_stride, const char* source, int64_t source_stride,
                                     const void* index, int wide, int64_t rows, int64_t row_bytes, int threads) {
    if (wide)
        gather(out, out_stride, source, source_stride, static_cast<const int64_t*>(index), rows, row_bytes, threads);
    else
        gather(out, out_stride, source, source_stride, static_cast<const int32_t*>(index), rows, row_bytes, threads);
}

// Position of the first index outside [0, limit), or -1.
BERNINI_API int64_t bernini_first_row_outside(const void* index, int wide, int64_t rows, int64_t limit) {
    return wide ? first_outside(static_cast<const int64_t*>(index), rows, limit)
                : first_outside(static_cast<const int32_t*>(index), rows, limit);
}
