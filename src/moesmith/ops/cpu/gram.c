// p^T q per expert, with p a few columns wide: the gradients of the adapters.
#include "unpack.h"

#ifdef HAVE_GEMM

#define GRAM_WIDTH 512

INLINE void gram_strip(const int32_t* pairs, int64_t ranks, int64_t rank0, const uint16_t* q, int64_t rows,
                       int64_t width, void* out, int type, int m, __mmask32 keep) {
    __m512 acc[8][2];
#pragma GCC unroll 8
    for (int i = 0; i < m; i++) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    for (int64_t r = 0; r < rows; r += 2) {
        __m512i a = _mm512_maskz_loadu_epi16(keep, q + r * width), b = _mm512_setzero_si512();
        if (r + 1 < rows) b = _mm512_maskz_loadu_epi16(keep, q + (r + 1) * width);
        __m512i w0 = _mm512_unpacklo_epi16(a, b), w1 = _mm512_unpackhi_epi16(a, b);
        const int32_t* pair = pairs + r / 2 * ranks + rank0;
#pragma GCC unroll 8
        for (int i = 0; i < m; i++) {
            __m512i p = _mm512_set1_epi32(pair[i]);
            DOT(acc[i][0], w0, p), DOT(acc[i][1], w1, p);
        }
    }
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
#pragma GCC unroll 8
    for (int i = 0; i < m; i++) {
        __m512 a = _mm512_permutex2var_ps(acc[i][0], first, acc[i][1]);
        __m512 b = _mm512_permutex2var_ps(acc[i][0], second, acc[i][1]);
        int64_t at = (rank0 + i) * width;
        if (type == FP32) {
            _mm512_mask_storeu_ps((float*)out + at, (__mmask16)keep, a);
            _mm512_mask_storeu_ps((float*)out + at + 16, (__mmask16)(keep >> 16), b);
        } else {
            _mm512_mask_storeu_epi16((uint16_t*)out + at, keep, pack_bf16(a, b));
        }
    }
}

static void gram_task(const uint16_t* p, const uint16_t* q, void* out, int64_t rows, int64_t ranks,
                      int64_t width, int64_t c0, int64_t c1, int type) {
    int32_t* pairs = scratch((size_t)((rows + 1) / 2 * ranks) * 4 + 64);
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t i = 0; i < ranks; i++)
            pairs[r / 2 * ranks + i] =
                p[r * ranks + i] | (r + 1 < rows ? (int32_t)p[(r + 1) * ranks + i] << 16 : 0);
    for (int64_t c = c0; c < c1; c += 32) {
        __mmask32 keep = c1 - c >= 32 ? ~0u : (1u << (c1 - c)) - 1;
        void* to = type == FP32 ? (void*)((float*)out + c) : (void*)((uint16_t*)out + c);
        int64_t i = 0;
        for (; i + 8 <= ranks; i += 8) gram_strip(pairs, ranks, i, q + c, rows, width, to, type, 8, keep);
        for (; i + 4 <= ranks; i += 4) gram_strip(pairs, ranks, i, q + c, rows, width, to, type, 4, keep);
        for (; i < ranks; i++) gram_strip(pairs, ranks, i, q + c, rows, width, to, type, 1, keep);
    }
}

// out (E, ranks, width), fp32 or bf16 = p (R, ranks)^T q (R, width) per expert; zero where an expert has no
// rows.
EXPORT void moesmith_gram(const uint16_t* p, const uint16_t* q, void* out, const int64_t* offsets,
                          int64_t experts, int64_t ranks, int64_t width, int type, int threads) {
    int64_t strips = (width + GRAM_WIDTH - 1) / GRAM_WIDTH, size = type == FP32 ? 4 : 2;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < experts * strips; task++) {
        int64_t e = task / strips, c0 = task % strips * GRAM_WIDTH,
                c1 = c0 + GRAM_WIDTH < width ? c0 + GRAM_WIDTH : width;
        gram_task(p + offsets[e] * ranks, q + offsets[e] * width, (char*)out + e * ranks * width * size,
                  offsets[e + 1] - offsets[e], ranks, width, c0, c1, type);
    }
}

#endif
