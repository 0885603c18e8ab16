// Shared by the native kernels: the description of a packed stack, and small helpers.
//
// Plain C ABI, called through ctypes; no torch headers. Everything is compiled for the machine it runs on
// (-march=native) with -ffp-contract=off, because bytes and bits must equal bitsandbytes'.
#ifndef MOESMITH_KERNELS_H
#define MOESMITH_KERNELS_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define HAVE_AVX512 1
#endif
#if defined(HAVE_AVX512) && defined(__AVX512BF16__)
#define HAVE_GEMM 1
#endif

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

enum { FP32 = 0, BF16 = 1, FP16 = 2 };                             // element types of inputs and outputs
enum { FOUR_BIT = 0, EIGHT_BIT = 1, RAW_BF16 = 2, RAW_FP16 = 3 };  // how a stack stores its weights

// One layer's expert matrices, (positions, rows, columns) row-major. Mirrored by _Stack in __init__.py.
typedef struct {
    const uint8_t* codes;
    const void* absmax;     // fp32, or uint8 if `scale` is set; NULL for raw weights
    const float* scale;     // (positions, scales): block scales of a quantised absmax
    const float* offset;    // (positions,)
    const float* codebook;  // 16 or 256 values
    const uint8_t* planes;  // 8 bit: byte b of every codebook value, (4, 256)
    const float* absmax_codebook;
    const int64_t* where;  // (experts,): the position of each expert; NULL: expert e lies at e
    int64_t experts, rows, columns;
    int64_t scales;       // block scales per expert
    int64_t row_blocks;   // blocks per row
    int32_t block_shift;  // a block is 1 << block_shift columns
    int32_t kind;
} Stack;

// One row of one expert: its bytes, and its fp32 absmax by block.
typedef struct {
    const uint8_t* codes;
    const float* absmax;
} Row;

// Row n of expert e. Of a quantised absmax the blocks of columns k0..k1 are unpacked into `buffer`
// (row_blocks floats), with the two roundings of dequantize_absmax.
INLINE Row row_at(const Stack* s, int64_t e, int64_t n, int64_t k0, int64_t k1, float* buffer) {
    if (s->where) e = s->where[e];
    int64_t row = e * s->rows + n, bytes = s->kind == FOUR_BIT ? s->columns / 2 : s->columns;
    if (s->kind == RAW_BF16 || s->kind == RAW_FP16) return (Row){s->codes + row * s->columns * 2, NULL};
    if (!s->scale) return (Row){s->codes + row * bytes, (const float*)s->absmax + row * s->row_blocks};
    const uint8_t* codes = (const uint8_t*)s->absmax + row * s->row_blocks;
    const float* scale = s->scale + e * s->scales;
    for (int64_t b = k0 >> s->block_shift; b <= (k1 - 1) >> s->block_shift; b++) {
        float value = s->absmax_codebook[codes[b]] * scale[(n * s->row_blocks + b) / 256];
        buffer[b] = value + s->offset[e];
    }
    return (Row){s->codes + row * bytes, buffer};
}

#endif
