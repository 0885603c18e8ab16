// Turning packed bytes into bf16 vectors, for the products in grouped.c, decode.c and gram.c (AVX512-BF16
// only).
//
// Words used there: a `chunk` is 8 consecutive columns (128 bits of bf16), the unit that shuffles move; a
// `group` is 64 columns.
#ifndef MOESMITH_UNPACK_H
#define MOESMITH_UNPACK_H
#include "kernels.h"

#ifdef HAVE_GEMM

#define DOT(acc, a, b) acc = _mm512_dpbf16_ps(acc, (__m512bh)(a), (__m512bh)(b))

// Everything a product needs. Rows of x (R, in) are grouped by expert; `extra` adds x2 (R, rank) times mats
// (E, rank, out).
typedef struct {
    const Stack* stack;
    const uint16_t *x, *x2, *mats;
    uint16_t* y;
    int64_t in, out, rank;
    int fast;
} Job;

// Four bits in blocks of 64 columns or more: one absmax per group, see lookup_4bit.
INLINE int is_fast(const Stack* s) { return s->kind == FOUR_BIT && s->block_shift >= 6; }

// One specialised copy per kind of storage.
// clang-format off
#define FOR_KIND(s, fast, call)                            \
    if (fast) call(FOUR_BIT, 1);                           \
    else if ((s)->kind == FOUR_BIT) call(FOUR_BIT, 0);     \
    else if ((s)->kind == EIGHT_BIT) call(EIGHT_BIT, 0);   \
    else if ((s)->kind == RAW_BF16) call(RAW_BF16, 0);     \
    else call(RAW_FP16, 0)
// clang-format on

// Memory of this thread, kept between calls.
static _Thread_local struct {
    void* memory;
    size_t bytes;
} scratch_slot;

static void* scratch(size_t bytes) {
    if (scratch_slot.bytes < bytes) {
        free(scratch_slot.memory);
        scratch_slot.memory = aligned_alloc(64, (bytes + 4095) / 4096 * 4096);
        scratch_slot.bytes = bytes;
    }
    return scratch_slot.memory;
}

// 64 columns of a row in bf16; lo: chunks 0 2 4 6, hi: chunks 1 3 5 7.
typedef struct {
    __m512i lo, hi;
} Group;

INLINE __m512i pack_bf16(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

INLINE Group split_chunks(__m512i a, __m512i b) {
    const __m512i even = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13),
                  odd = _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15);
    return (Group){_mm512_permutex2var_epi64(a, even, b), _mm512_permutex2var_epi64(a, odd, b)};
}

// Four bits, one absmax for the whole group: scale and round the 16 possible values, then look words up.
INLINE void lookup_4bit(const uint8_t* codes, __m512 codebook, float absmax, __m512i* even, __m512i* odd) {
    __m256i values = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(codebook, _mm512_set1_ps(absmax)));
    __m512i table = _mm512_broadcast_i64x4(values);  // twice, so that bit 4 of an index does not matter
    __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)codes));
    *odd = _mm512_permutexvar_epi16(words, table);
    *even = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table);
}

// Sixteen columns of any packed kind, fp32; a block never ends inside them.
INLINE __m512 unpack16(const Stack* s, Row row, int64_t k, int kind, __m512 codebook) {
    __m512 scale = _mm512_set1_ps(row.absmax[k >> s->block_shift]);
    if (kind == EIGHT_BIT) {
        __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(row.codes + k)));
        return _mm512_mul_ps(_mm512_i32gather_ps(index, s->codebook, 4), scale);
    }
    const __m128i low = _mm_set1_epi8(15);
    __m128i b = _mm_loadl_epi64((const __m128i*)(row.codes + (uint64_t)k / 2));
    b = _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(b, 4), low), _mm_and_si128(b, low));
    return _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(b), codebook), scale);
}

INLINE Group load_raw(const uint16_t* row, int64_t k, int64_t columns, int kind) {
    int64_t left = columns - k;
    __mmask32 m0 = left >= 32 ? ~0u : (1u << left) - 1;
    __mmask32 m1 = left >= 64 ? ~0u : left > 32 ? (1u << (left - 32)) - 1 : 0;
    __m512i a = _mm512_maskz_loadu_epi16(m0, row + k), b = _mm512_maskz_loadu_epi16(m1, row + k + 32);
    if (kind == RAW_FP16) {
        a = pack_bf16(_mm512_cvtph_ps(_mm512_castsi512_si256(a)),
                      _mm512_cvtph_ps(_mm512_extracti64x4_epi64(a, 1)));
        b = pack_bf16(_mm512_cvtph_ps(_mm512_castsi512_si256(b)),
                      _mm512_cvtph_ps(_mm512_extracti64x4_epi64(b, 1)));
    }
    return split_chunks(a, b);
}

#ifdef __AVX512VBMI__
// Eight bits: the four bytes of each fp32 value come from four 256-entry byte tables; a gather would be three
// times slower.
INLINE Group lookup_8bit(const uint8_t* codes, const uint8_t* planes, __m512 scale) {
    __m512i index = _mm512_loadu_si512(codes), byte[4];
    __mmask64 upper = _mm512_movepi8_mask(index);
#pragma GCC unroll 4
    for (int b = 0; b < 4; b++) {
        const uint8_t* t = planes + 256 * b;
        __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(t), index, _mm512_loadu_si512(t + 64));
        __m512i high =
            _mm512_permutex2var_epi8(_mm512_loadu_si512(t + 128), index, _mm512_loadu_si512(t + 192));
        byte[b] = _mm512_mask_blend_epi8(upper, low, high);
    }
    __m512i a = _mm512_unpacklo_epi8(byte[0], byte[1]), b = _mm512_unpacklo_epi8(byte[2], byte[3]);
    __m512i c = _mm512_unpackhi_epi8(byte[0], byte[1]), d = _mm512_unpackhi_epi8(byte[2], byte[3]);
    // lane L of the first holds columns 16 L + 0..3, of the second 16 L + 4..7, and so on
    __m512 f0 = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b)),
           f1 = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
    __m512 f2 = _mm512_castsi512_ps(_mm512_unpacklo_epi16(c, d)),
           f3 = _mm512_castsi512_ps(_mm512_unpackhi_epi16(c, d));
    const __m512i zip = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    __m512i lo = pack_bf16(_mm512_mul_ps(f0, scale), _mm512_mul_ps(f1, scale));
    __m512i hi = pack_bf16(_mm512_mul_ps(f2, scale), _mm512_mul_ps(f3, scale));
    return (Group){_mm512_permutexvar_epi64(zip, lo), _mm512_permutexvar_epi64(zip, hi)};
}

// One scale per 16 columns, in the lanes where lookup_8bit has them.
INLINE __m512 group_scale(const Stack* s, Row row, int64_t k) {
    if (s->block_shift >= 6) return _mm512_set1_ps(row.absmax[k >> s->block_shift]);
    int h = s->block_shift;
    float a = row.absmax[k >> h], b = row.absmax[(k + 16) >> h], c = row.absmax[(k + 32) >> h],
          d = row.absmax[(k + 48) >> h];
    return _mm512_setr_ps(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d);
}
#endif

// `fast`: four bits and blocks of 64 columns or more.
INLINE Group unpack_group(const Stack* s, Row row, int64_t k, int kind, int fast, __m512 codebook) {
    if (fast) {
        __m512i even, odd;
        lookup_4bit(row.codes + (uint64_t)k / 2, codebook, row.absmax[k >> s->block_shift], &even, &odd);
        return (Group){_mm512_unpacklo_epi16(even, odd), _mm512_unpackhi_epi16(even, odd)};
    }
    if (kind == RAW_BF16 || kind == RAW_FP16)
        return load_raw((const uint16_t*)row.codes, k, s->columns, kind);
#ifdef __AVX512VBMI__
    if (kind == EIGHT_BIT && k + 64 <= s->columns)
        return lookup_8bit(row.codes + k, s->planes, group_scale(s, row, k));
#endif
    __m512 f[4];
    for (int q = 0; q < 4; q++)
        f[q] = k + 16 * q < s->columns ? unpack16(s, row, k + 16 * q, kind, codebook) : _mm512_setzero_ps();
    return split_chunks(pack_bf16(f[0], f[1]), pack_bf16(f[2], f[3]));
}

#endif
#endif
