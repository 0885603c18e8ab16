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

enum { FP32 = 0, BF16 = 1, FP16 = 2 };           // element types of inputs and outputs
enum { FOUR_BIT = 0, EIGHT_BIT = 1, RAW_BF16 = 2, RAW_FP16 = 3 };  // how a stack stores its weights

// One layer's expert matrices, (experts, rows, columns) row-major. Mirrored by _Stack in __init__.py.
typedef struct {
    const uint8_t *codes;
    const void *absmax;      // fp32, or uint8 if `scale` is set; NULL for raw weights
    const float *scale;      // (experts, scales): block scales of a quantised absmax
    const float *offset;     // (experts,)
    const float *codebook;   // 16 or 256 values
    const float *absmax_codebook;
    int64_t experts, rows, columns, blocksize, scales;
    int32_t kind, pad;
} Stack;

// fp32 absmax of block i of expert e; two roundings, as dequantize_absmax does it.
INLINE float absmax_at(const Stack *s, int64_t e, int64_t i) {
    int64_t blocks = s->rows * (s->columns / s->blocksize);
    if (!s->scale) return ((const float *)s->absmax)[e * blocks + i];
    float value = s->absmax_codebook[((const uint8_t *)s->absmax)[e * blocks + i]];
    value *= s->scale[e * s->scales + i / 256];
    return value + s->offset[e];
}

#endif
