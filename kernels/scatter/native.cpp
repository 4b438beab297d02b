// Row scatter and gather: copies whole rows of bytes between buffers, so one function serves every dtype.
// Reads and writes each row once, and 4 or 8 bytes of index per row.
#include <cstdint>
#include <cstring>

#include "../native/common.h"

namespace {

// Below this many bytes a second thread costs more than it saves.
constexpr int64_t kParallelBytes = 64 * 1024;

template <typename Index>
void scatter(char* out, int64_t out_stride, const char* source, int64_t source_stride, const Index* index,
             int64_t rows, int64_t row_bytes, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * row_bytes > kParallelBytes)
    for (int64_t i = 0; i < rows; ++i)
        std::memcpy(out + index[i] * out_stride, source + i * source_stride, row_bytes);
}

template <typename Index>
void gather(char* out, int64_t out_stride, const char* source, int64_t source_stride, const Index* index,
            int64_t rows, int64_t row_bytes, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * row_bytes > kParallelBytes)
    for (int64_t i = 0; i < rows; ++i)
        std::memcpy(out + i * out_stride, source + index[i] * source_stride, row_bytes);
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
