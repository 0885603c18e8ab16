// Rows grouped by expert times packed matrices, in bf16 with fp32 sums (AVX512-BF16 machines only).
//
// One expert's matrix is unpacked a panel at a time into a few hundred KB of scratch per thread, laid out so that the inner
// loops only load, broadcast and multiply; then rows pass over the panel six at a time. Tasks are (expert, block of rows,
// panel), dealt dynamically, so one crowded expert still fills every thread. Each output element is summed in one fixed
// order, whatever the other rows, the tiles and the number of threads.
//
// Words below: a `chunk` is 8 consecutive columns (128 bits of bf16), the unit that shuffles move; a `group` is 64 columns.
#include "kernels.h"

#ifdef HAVE_GEMM

#define ROW_BLOCK 384   // rows per task: bounds the fp32 scratch, and feeds threads when one expert has all rows
#define TILE 6          // rows per register tile: 6 x 4 sums, 4 weights, 1 broadcast of 32 registers
#define REDUCE_BLOCK 512  // matrix rows per panel when summing over rows

// ---------------------------------------------------------------- scratch

static _Thread_local struct { void *memory; size_t bytes; } scratch_slot;

static void *scratch(size_t bytes) {
    if (scratch_slot.bytes < bytes) {
        free(scratch_slot.memory);
        scratch_slot.memory = aligned_alloc(64, (bytes + 4095) / 4096 * 4096);
        scratch_slot.bytes = bytes;
    }
    return scratch_slot.memory;
}

// ---------------------------------------------------------------- unpacking 64 columns of one row

typedef struct { __m512i lo, hi; } Group;  // bf16, lo: chunks 0 2 4 6, hi: chunks 1 3 5 7

INLINE __m512i pack_bf16(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

INLINE Group split_chunks(__m512i a, __m512i b) {
    const __m512i even = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13), odd = _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15);
    return (Group){_mm512_permutex2var_epi64(a, even, b), _mm512_permutex2var_epi64(a, odd, b)};
}

// Four bits, one absmax for the whole group: scale and round the 16 possible values, then look words up.
INLINE void lookup_4bit(const uint8_t *codes, __m512 codebook, float absmax, __m512i *even, __m512i *odd) {
    __m256i values = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(codebook, _mm512_set1_ps(absmax)));
    __m512i table = _mm512_broadcast_i64x4(values);  // twice, so that bit 4 of an index does not matter
    __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes));
    *odd = _mm512_permutexvar_epi16(words, table);
    *even = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table);
}

// Sixteen columns of any packed kind, fp32; a block never ends inside them.
INLINE __m512 unpack16(const Stack *s, Row row, int64_t k, int kind, __m512 codebook) {
    __m512 scale = _mm512_set1_ps(row.absmax[k >> s->block_shift]);
    if (kind == EIGHT_BIT) {
        __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(row.codes + k)));
        return _mm512_mul_ps(_mm512_i32gather_ps(index, s->codebook, 4), scale);
    }
    const __m128i low = _mm_set1_epi8(15);
    __m128i b = _mm_loadl_epi64((const __m128i *)(row.codes + (uint64_t)k / 2));
    b = _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(b, 4), low), _mm_and_si128(b, low));
    return _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(b), codebook), scale);
}

INLINE Group load_raw(const uint16_t *row, int64_t k, int64_t columns, int kind) {
    int64_t left = columns - k;
    __mmask32 m0 = left >= 32 ? ~0u : (1u << left) - 1;
    __mmask32 m1 = left >= 64 ? ~0u : left > 32 ? (1u << (left - 32)) - 1 : 0;
    __m512i a = _mm512_maskz_loadu_epi16(m0, row + k), b = _mm512_maskz_loadu_epi16(m1, row + k + 32);
    if (kind == RAW_FP16) {
        a = pack_bf16(_mm512_cvtph_ps(_mm512_castsi512_si256(a)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(a, 1)));
        b = pack_bf16(_mm512_cvtph_ps(_mm512_castsi512_si256(b)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(b, 1)));
    }
    return split_chunks(a, b);
}

#ifdef __AVX512VBMI__
// Eight bits: the four bytes of each fp32 value come from four 256-entry byte tables; a gather would be three times slower.
INLINE Group lookup_8bit(const uint8_t *codes, const uint8_t *planes, __m512 scale) {
    __m512i index = _mm512_loadu_si512(codes), byte[4];
    __mmask64 upper = _mm512_movepi8_mask(index);
#pragma GCC unroll 4
    for (int b = 0; b < 4; b++) {
        const uint8_t *t = planes + 256 * b;
        __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(t), index, _mm512_loadu_si512(t + 64));
        __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(t + 128), index, _mm512_loadu_si512(t + 192));
        byte[b] = _mm512_mask_blend_epi8(upper, low, high);
    }
    __m512i a = _mm512_unpacklo_epi8(byte[0], byte[1]), b = _mm512_unpacklo_epi8(byte[2], byte[3]);
    __m512i c = _mm512_unpackhi_epi8(byte[0], byte[1]), d = _mm512_unpackhi_epi8(byte[2], byte[3]);
    // lane L of the first holds columns 16 L + 0..3, of the second 16 L + 4..7, and so on
    __m512 f0 = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b)), f1 = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
    __m512 f2 = _mm512_castsi512_ps(_mm512_unpacklo_epi16(c, d)), f3 = _mm512_castsi512_ps(_mm512_unpackhi_epi16(c, d));
    const __m512i zip = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    __m512i lo = pack_bf16(_mm512_mul_ps(f0, scale), _mm512_mul_ps(f1, scale));
    __m512i hi = pack_bf16(_mm512_mul_ps(f2, scale), _mm512_mul_ps(f3, scale));
    return (Group){_mm512_permutexvar_epi64(zip, lo), _mm512_permutexvar_epi64(zip, hi)};
}

// One scale per 16 columns, in the lanes where lookup_8bit has them.
INLINE __m512 group_scale(const Stack *s, Row row, int64_t k) {
    if (s->block_shift >= 6) return _mm512_set1_ps(row.absmax[k >> s->block_shift]);
    int h = s->block_shift;
    float a = row.absmax[k >> h], b = row.absmax[(k + 16) >> h], c = row.absmax[(k + 32) >> h], d = row.absmax[(k + 48) >> h];
    return _mm512_setr_ps(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d);
}
#endif

// `fast`: four bits and blocks of 64 columns or more.
INLINE Group unpack_group(const Stack *s, Row row, int64_t k, int kind, int fast, __m512 codebook) {
    if (fast) {
        __m512i even, odd;
        lookup_4bit(row.codes + (uint64_t)k / 2, codebook, row.absmax[k >> s->block_shift], &even, &odd);
        return (Group){_mm512_unpacklo_epi16(even, odd), _mm512_unpackhi_epi16(even, odd)};
    }
    if (kind == RAW_BF16 || kind == RAW_FP16) return load_raw((const uint16_t *)row.codes, k, s->columns, kind);
#ifdef __AVX512VBMI__
    if (kind == EIGHT_BIT && k + 64 <= s->columns) return lookup_8bit(row.codes + k, s->planes, group_scale(s, row, k));
#endif
    __m512 f[4];
    for (int q = 0; q < 4; q++)
        f[q] = k + 16 * q < s->columns ? unpack16(s, row, k + 16 * q, kind, codebook) : _mm512_setzero_ps();
    return split_chunks(pack_bf16(f[0], f[1]), pack_bf16(f[2], f[3]));
}

// 4 x 4 transposition of 128-bit lanes.
INLINE void transpose_lanes(__m512i *a) {
    __m512i t0 = _mm512_shuffle_i32x4(a[0], a[1], 0x44), t1 = _mm512_shuffle_i32x4(a[2], a[3], 0x44);
    __m512i t2 = _mm512_shuffle_i32x4(a[0], a[1], 0xee), t3 = _mm512_shuffle_i32x4(a[2], a[3], 0xee);
    a[0] = _mm512_shuffle_i32x4(t0, t1, 0x88), a[1] = _mm512_shuffle_i32x4(t0, t1, 0xdd);
    a[2] = _mm512_shuffle_i32x4(t2, t3, 0x88), a[3] = _mm512_shuffle_i32x4(t2, t3, 0xdd);
}

// ---------------------------------------------------------------- x @ W^T: sums over columns

// Panel of 16 matrix rows: for each chunk four vectors; vector g holds the chunk of rows g, g+4, g+8, g+12.
INLINE void pack_columns(const Stack *s, int64_t e, int64_t n0, __m512i *panel, float *buffer, int kind, int fast) {
    __m512 codebook = kind == FOUR_BIT ? _mm512_loadu_ps(s->codebook) : _mm512_setzero_ps();
    int64_t chunks = (s->columns + 63) / 64 * 8, bits = kind == FOUR_BIT ? 4 : kind == EIGHT_BIT ? 8 : 16;
    for (int g = 0; g < 4; g++) {
        // the rows of the next pass; hardware does not look past the end of a row
        int64_t ahead = (g < 3 ? 1 : 13) * (s->columns * bits / 8);
        Row row[4];
        int valid[4];
        for (int lane = 0; lane < 4; lane++) {
            int64_t n = n0 + g + 4 * lane;
            valid[lane] = n < s->rows;
            if (valid[lane]) row[lane] = row_at(s, e, n, 0, s->columns, buffer + lane * s->row_blocks);
        }
        for (int64_t c = 0; c < chunks; c += 8) {
            __m512i lo[4], hi[4];
#pragma GCC unroll 4
            for (int lane = 0; lane < 4; lane++) {
                Group w = {_mm512_setzero_si512(), _mm512_setzero_si512()};
                if (valid[lane]) {
                    w = unpack_group(s, row[lane], c * 8, kind, fast, codebook);
                    for (int line = 0; line < bits * 8; line += 64) __builtin_prefetch(row[lane].codes + c * bits + line + ahead, 0, 2);
                }
                lo[lane] = w.lo, hi[lane] = w.hi;
            }
            transpose_lanes(lo), transpose_lanes(hi);
            for (int j = 0; j < 4; j++) {
                _mm512_store_si512(panel + (c + 2 * j) * 4 + g, lo[j]);
                _mm512_store_si512(panel + (c + 2 * j + 1) * 4 + g, hi[j]);
            }
        }
    }
}

// The same layout for rank-major adapter matrices (rank, rows): 16 of their columns, `rank` a multiple of 8.
static void pack_extra_columns(const uint16_t *mats, int64_t rank, int64_t rows, int64_t n0, uint16_t *panel) {
    for (int64_t r = 0; r < rank; r++)
        for (int n = 0; n < 16; n++)
            panel[(((r / 8) * 4 + n % 4) * 4 + n / 4) * 8 + r % 8] = n0 + n < rows ? mats[r * rows + n0 + n] : 0;
}

#define DOT(acc, a, b) acc = _mm512_dpbf16_ps(acc, (__m512bh)(a), (__m512bh)(b))

INLINE void dot_chunks(__m512 acc[TILE][4], int m, const uint16_t *x, int64_t ldx, const __m512i *panel, int64_t chunks) {
    for (int64_t c = 0; c < chunks; c++, panel += 4, x += 8) {
        __m512i w0 = panel[0], w1 = panel[1], w2 = panel[2], w3 = panel[3];
#pragma GCC unroll 6
        for (int i = 0; i < m; i++) {
            __m512i b = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(x + i * ldx)));
            DOT(acc[i][0], w0, b), DOT(acc[i][1], w1, b), DOT(acc[i][2], w2, b), DOT(acc[i][3], w3, b);
        }
    }
}

INLINE void columns_tile(int m, const uint16_t *x, int64_t ldx, const __m512i *panel, int64_t chunks, const uint16_t *x2,
                         int64_t ldx2, const __m512i *panel2, int64_t chunks2, uint16_t *y, int64_t ldy, __mmask16 keep) {
    __m512 acc[TILE][4];
#pragma GCC unroll 6
    for (int i = 0; i < m; i++)
        acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = _mm512_setzero_ps();
    dot_chunks(acc, m, x, ldx, panel, chunks);
    dot_chunks(acc, m, x2, ldx2, panel2, chunks2);
#pragma GCC unroll 6
    for (int i = 0; i < m; i++) {  // each 128-bit lane holds four partial sums of one matrix row
        __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(acc[i][0], acc[i][1]), _mm512_unpackhi_ps(acc[i][0], acc[i][1]));
        __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(acc[i][2], acc[i][3]), _mm512_unpackhi_ps(acc[i][2], acc[i][3]));
        __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
        a = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
        _mm256_mask_storeu_epi16(y + i * ldy, keep, (__m256i)_mm512_cvtneps_pbh(a));
    }
}

// ---------------------------------------------------------------- g @ W: sums over matrix rows

// Panel of 64 columns and rows n0..n1: for each pair of rows four vectors; vector q, lane L holds the pairs of columns
// 16 L + 4 q + 0..3.
INLINE void store_pair(__m512i *to, Group a, Group b) {
    _mm512_store_si512(to + 0, _mm512_unpacklo_epi16(a.lo, b.lo)), _mm512_store_si512(to + 1, _mm512_unpackhi_epi16(a.lo, b.lo));
    _mm512_store_si512(to + 2, _mm512_unpacklo_epi16(a.hi, b.hi)), _mm512_store_si512(to + 3, _mm512_unpackhi_epi16(a.hi, b.hi));
}

INLINE void pack_rows(const Stack *s, int64_t e, int64_t n0, int64_t n1, int64_t k0, int groups, __m512i *panel, float *buffer,
                      int kind, int fast) {
    __m512 codebook = kind == FOUR_BIT ? _mm512_loadu_ps(s->codebook) : _mm512_setzero_ps();
    int64_t pairs = (n1 - n0) / 2, bits = kind == FOUR_BIT ? 4 : kind == EIGHT_BIT ? 8 : 16;
    int64_t row_bytes = s->columns * bits / 8, k1 = k0 + 64 * groups < s->columns ? k0 + 64 * groups : s->columns;
    for (int64_t p = 0; p < pairs; p++) {
        int64_t n = n0 + 2 * p;
        Row first = row_at(s, e, n, k0, k1, buffer), second = row_at(s, e, n + 1, k0, k1, buffer + s->row_blocks);
        // columns of neighbouring rows are far apart in memory; ask early
        __builtin_prefetch(first.codes + 16 * row_bytes + k0 * bits / 8);
        __builtin_prefetch(second.codes + 16 * row_bytes + k0 * bits / 8);
#pragma GCC unroll 2
        for (int g = 0; g < groups; g++) {
            Group a = unpack_group(s, first, k0 + 64 * g, kind, fast, codebook);
            Group b = unpack_group(s, second, k0 + 64 * g, kind, fast, codebook);
            store_pair(panel + (g * (int64_t)(REDUCE_BLOCK / 2) + p) * 4, a, b);
        }
    }
}

static void pack_extra_rows(const uint16_t *mats, int64_t rank, int64_t columns, int64_t k, __m512i *panel) {
    for (int64_t r = 0; r < rank; r += 2)
        store_pair(panel + r / 2 * 4, load_raw(mats + r * columns, k, columns, RAW_BF16),
                   load_raw(mats + (r + 1) * columns, k, columns, RAW_BF16));
}

INLINE void dot_pairs(__m512 acc[TILE][4], int m, const uint16_t *g, int64_t ldg, const __m512i *panel, int64_t pairs) {
    for (int64_t p = 0; p < pairs; p++, panel += 4, g += 2) {
        __m512i w0 = panel[0], w1 = panel[1], w2 = panel[2], w3 = panel[3];
#pragma GCC unroll 6
        for (int i = 0; i < m; i++) {
            int32_t pair;
            memcpy(&pair, g + i * ldg, 4);
            __m512i b = _mm512_set1_epi32(pair);
            DOT(acc[i][0], w0, b), DOT(acc[i][1], w1, b), DOT(acc[i][2], w2, b), DOT(acc[i][3], w3, b);
        }
    }
}

// One tile: sums start at zero (first) or where the last block of rows left them; the last block writes bf16.
INLINE void rows_tile(int m, const uint16_t *g, int64_t ldg, const __m512i *panel, int64_t pairs, const uint16_t *g2,
                      int64_t ldg2, const __m512i *panel2, int64_t pairs2, __m512 *sums, int first, int last, uint16_t *y,
                      int64_t ldy, __mmask32 keep0, __mmask32 keep1) {
    __m512 acc[TILE][4];
#pragma GCC unroll 6
    for (int i = 0; i < m; i++)
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) acc[i][q] = first ? _mm512_setzero_ps() : sums[i * 4 + q];
    dot_pairs(acc, m, g, ldg, panel, pairs);
    if (!last) {
#pragma GCC unroll 6
        for (int i = 0; i < m; i++)
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++) sums[i * 4 + q] = acc[i][q];
        return;
    }
    dot_pairs(acc, m, g2, ldg2, panel2, pairs2);
#pragma GCC unroll 6
    for (int i = 0; i < m; i++) {
        __m512i v[4] = {_mm512_castps_si512(acc[i][0]), _mm512_castps_si512(acc[i][1]), _mm512_castps_si512(acc[i][2]),
                        _mm512_castps_si512(acc[i][3])};
        transpose_lanes(v);
        uint16_t *to = y + i * ldy;
        _mm512_mask_storeu_epi16(to, keep0, pack_bf16(_mm512_castsi512_ps(v[0]), _mm512_castsi512_ps(v[1])));
        _mm512_mask_storeu_epi16(to + 32, keep1, pack_bf16(_mm512_castsi512_ps(v[2]), _mm512_castsi512_ps(v[3])));
    }
}

// One specialised copy per number of rows, so that the sums stay in registers.
#define FOR_TILE(m, call)                                                                        \
    switch (m) {                                                                                 \
        case 1: call(1); break; case 2: call(2); break; case 3: call(3); break;                  \
        case 4: call(4); break; case 5: call(5); break; default: call(6);                        \
    }
#define FOR_KIND(s, fast, call)                                                                  \
    if (fast) call(FOUR_BIT, 1); else if ((s)->kind == FOUR_BIT) call(FOUR_BIT, 0);              \
    else if ((s)->kind == EIGHT_BIT) call(EIGHT_BIT, 0); else if ((s)->kind == RAW_BF16) call(RAW_BF16, 0); \
    else call(RAW_FP16, 0)

static __attribute__((noinline)) void columns_pack(const Stack *s, int64_t e, int64_t n0, __m512i *panel,
                                                   float *buffer, int fast) {
#define CALL(kind, f) pack_columns(s, e, n0, panel, buffer, kind, f)
    FOR_KIND(s, fast, CALL);
#undef CALL
}

static __attribute__((noinline)) void rows_pack(const Stack *s, int64_t e, int64_t n0, int64_t n1, int64_t k0, int groups,
                                                __m512i *panel, float *buffer, int fast) {
#define CALL(kind, f) pack_rows(s, e, n0, n1, k0, groups, panel, buffer, kind, f)
    FOR_KIND(s, fast, CALL);
#undef CALL
}

// Everything a product needs. Rows of x (R, in) are grouped by expert; `extra` adds x2 (R, rank) times mats (E, rank, out).
typedef struct {
    const Stack *stack;
    const uint16_t *x, *x2, *mats;
    uint16_t *y;
    const int64_t *offsets;
    int64_t in, out, rank;
    int fast;
} Job;

static void columns_task(const Job *job, int64_t e, int64_t r0, int64_t r1, int64_t n0, int64_t n1) {
    const Stack *s = job->stack;
    int64_t chunks = job->in / 8, padded = (job->in + 63) / 64 * 8, chunks2 = job->rank / 8;
    int64_t stride = (padded + chunks2) * 4;  // vectors per 16 matrix rows
    int64_t vectors = (n1 - n0 + 15) / 16 * stride;
    __m512i *panel = scratch((size_t)vectors * 64 + (size_t)s->row_blocks * 16);
    float *buffer = (float *)(panel + vectors);
    for (int64_t n = n0; n < n1; n += 16) {
        __m512i *to = panel + (n - n0) / 16 * stride;
        columns_pack(s, e, n, to, buffer, job->fast);
        if (job->rank)
            pack_extra_columns(job->mats + e * job->rank * job->out, job->rank, job->out, n, (uint16_t *)(to + padded * 4));
    }
    for (int64_t r = r0; r < r1; r += TILE) {
        const uint16_t *x = job->x + r * job->in, *x2 = job->x2 + r * job->rank;
        int m = r1 - r < TILE ? (int)(r1 - r) : TILE;
        for (int64_t n = n0; n < n1; n += 16) {
            const __m512i *w = panel + (n - n0) / 16 * stride;
            __mmask16 keep = n1 - n >= 16 ? 0xffff : (1u << (n1 - n)) - 1;
            uint16_t *y = job->y + r * job->out + n;
#define CALL(m) columns_tile(m, x, job->in, w, chunks, x2, job->rank, w + padded * 4, chunks2, y, job->out, keep)
            FOR_TILE(m, CALL)
#undef CALL
        }
    }
}

static void rows_task(const Job *job, int64_t e, int64_t r0, int64_t r1, int64_t k0, int64_t k1) {
    const Stack *s = job->stack;
    int groups = (int)((k1 - k0 + 63) / 64);
    int64_t panel_vectors = REDUCE_BLOCK / 2 * 4, rank = job->rank;
    int64_t sum_vectors = (r1 - r0) * 4;
    __m512i *panel = scratch((size_t)(groups * (panel_vectors + sum_vectors + rank * 2)) * 64 + (size_t)s->row_blocks * 8);
    __m512 *sums = (__m512 *)(panel + groups * panel_vectors);
    __m512i *panel2 = (__m512i *)(sums + groups * sum_vectors);
    float *buffer = (float *)(panel2 + groups * rank * 2);
    for (int g = 0; rank && g < groups; g++)
        pack_extra_rows(job->mats + e * rank * job->out, rank, job->out, k0 + 64 * g, panel2 + g * rank * 2);
    for (int64_t n0 = 0; n0 < job->in; n0 += REDUCE_BLOCK) {
        int64_t n1 = n0 + REDUCE_BLOCK < job->in ? n0 + REDUCE_BLOCK : job->in;
        rows_pack(s, e, n0, n1, k0, groups, panel, buffer, job->fast);
        for (int g = 0; g < groups; g++) {
            const __m512i *w = panel + g * panel_vectors, *w2 = panel2 + g * rank * 2;
            int64_t left = k1 - k0 - 64 * g;
            __mmask32 keep0 = left >= 32 ? ~0u : (1u << left) - 1;
            __mmask32 keep1 = left >= 64 ? ~0u : left > 32 ? (1u << (left - 32)) - 1 : 0;
            for (int64_t r = r0; r < r1; r += TILE) {
                const uint16_t *x = job->x + r * job->in + n0, *x2 = job->x2 + r * rank;
                uint16_t *y = job->y + r * job->out + k0 + 64 * g;
                __m512 *sum = sums + g * sum_vectors + (r - r0) * 4;
                int m = r1 - r < TILE ? (int)(r1 - r) : TILE;
#define CALL(m)                                                                                                          \
    rows_tile(m, x, job->in, w, (n1 - n0) / 2, x2, rank, w2, rank / 2, sum, n0 == 0, n1 == job->in, y, job->out, keep0, keep1)
                FOR_TILE(m, CALL)
#undef CALL
            }
        }
    }
}

// y (R, out) = x (R, in) times each expert's matrix: W^T if over_columns, else W. bf16; offsets on the host, experts + 1.
// Wants: columns a multiple of 16 (any multiple of 8 for raw weights over columns), rows even if summed over, rank of 8.
EXPORT void moesmith_project(const Stack *s, const uint16_t *x, uint16_t *y, const int64_t *offsets, int over_columns,
                             const uint16_t *x2, const uint16_t *mats, int64_t rank, int threads) {
    Job job = {s, x, x2, mats, y, offsets, over_columns ? s->columns : s->rows, over_columns ? s->rows : s->columns, rank,
               s->kind == FOUR_BIT && s->block_shift >= 6};
    // over columns: as many matrix rows as fit beside the rows of x in a typical 1 MB second-level cache
    int64_t width = 128;
    if (over_columns) {
        int64_t per16 = 16 * 2 * ((job.in + 63) / 64 * 64);
        width = per16 * 4 <= (384 << 10) ? 64 : per16 * 2 <= (384 << 10) ? 32 : 16;
    }
    int64_t panels = (job.out + width - 1) / width;
    int64_t *first = malloc((size_t)(s->experts + 1) * sizeof *first);
    first[0] = 0;
    for (int64_t e = 0; e < s->experts; e++)
        first[e + 1] = first[e] + (offsets[e + 1] - offsets[e] + ROW_BLOCK - 1) / ROW_BLOCK * panels;
    int64_t tasks = first[s->experts];
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (tasks > 1)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t low = 0, high = s->experts;
        while (high - low > 1) {
            int64_t middle = (low + high) / 2;
            if (first[middle] <= task) low = middle; else high = middle;
        }
        int64_t block = (task - first[low]) / panels, panel = (task - first[low]) % panels;
        int64_t r0 = offsets[low] + block * ROW_BLOCK, r1 = r0 + ROW_BLOCK, c0 = panel * width, c1 = c0 + width;
        if (r1 > offsets[low + 1]) r1 = offsets[low + 1];
        if (c1 > job.out) c1 = job.out;
        if (over_columns) columns_task(&job, low, r0, r1, c0, c1); else rows_task(&job, low, r0, r1, c0, c1);
    }
    free(first);
}

// ---------------------------------------------------------------- x @ W^T for a handful of rows: decoding

#define FEW 4          // rows of x that share one pass over the weights
#define FEW_BLOCK 64   // matrix rows per task

// Even and odd columns of each group of 64 apart, as lookup_4bit delivers them; zeros past the end.
static void split_row(const uint16_t *x, int64_t columns, __m512i *to) {
    int16_t index[64];
    for (int i = 0; i < 32; i++) index[i] = 2 * i, index[32 + i] = 2 * i + 1;
    __m512i even = _mm512_loadu_si512(index), odd = _mm512_loadu_si512(index + 32);
    for (int64_t k = 0; k < columns; k += 64) {
        int64_t left = columns - k;
        __mmask32 m0 = left >= 32 ? ~0u : (1u << left) - 1;
        __mmask32 m1 = left >= 64 ? ~0u : left > 32 ? (1u << (left - 32)) - 1 : 0;
        __m512i a = _mm512_maskz_loadu_epi16(m0, x + k), b = _mm512_maskz_loadu_epi16(m1, x + k + 32);
        *to++ = _mm512_permutex2var_epi16(a, even, b), *to++ = _mm512_permutex2var_epi16(a, odd, b);
    }
}

// From chunk order to even and odd words: lane by lane, the even words of lo, then those of hi.
#define WORDS(o)                                                                                                            \
    _mm512_set_epi16(62 + o, 60 + o, 58 + o, 56 + o, 30 + o, 28 + o, 26 + o, 24 + o, 54 + o, 52 + o, 50 + o, 48 + o, 22 + o,  \
                     20 + o, 18 + o, 16 + o, 46 + o, 44 + o, 42 + o, 40 + o, 14 + o, 12 + o, 10 + o, 8 + o, 38 + o, 36 + o,    \
                     34 + o, 32 + o, 6 + o, 4 + o, 2 + o, 0 + o)
#define EVEN_WORDS WORDS(0)
#define ODD_WORDS WORDS(1)

// sums[i * FEW_BLOCK + n - n0] = row i of x times matrix row n, for m rows of x (m <= FEW) and n0 <= n < n1.
INLINE void few_rows(const Stack *s, int64_t e, int64_t n0, int64_t n1, const __m512i *x, int m, float *sums, float *buffer,
                     int kind, int fast) {
    __m512 codebook = kind == FOUR_BIT ? _mm512_loadu_ps(s->codebook) : _mm512_setzero_ps();
    int64_t groups = (s->columns + 63) / 64;
    int shift = s->block_shift - 6;
    for (int64_t n = n0; n < n1; n += 4) {
        Row row[4];
        for (int j = 0; j < 4; j++)
            row[j] = row_at(s, e, n + j < n1 ? n + j : n1 - 1, 0, s->columns, buffer + j * s->row_blocks);
        __m512 acc[4][FEW];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
            for (int i = 0; i < m; i++) acc[j][i] = _mm512_setzero_ps();
        for (int64_t g = 0; g < groups; g++) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                __m512i even, odd;
                if (fast) {
                    __builtin_prefetch(row[j].codes + g * 32 + 2 * s->columns);  // four rows on: the next pass
                    lookup_4bit(row[j].codes + g * 32, codebook, row[j].absmax[g >> shift], &even, &odd);
                } else {
                    Group w = unpack_group(s, row[j], g * 64, kind, 0, codebook);
                    even = _mm512_permutex2var_epi16(w.lo, EVEN_WORDS, w.hi);
                    odd = _mm512_permutex2var_epi16(w.lo, ODD_WORDS, w.hi);
                }
#pragma GCC unroll 4
                for (int i = 0; i < m; i++) {
                    DOT(acc[j][i], even, x[(i * groups + g) * 2]);
                    DOT(acc[j][i], odd, x[(i * groups + g) * 2 + 1]);
                }
            }
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
            for (int i = 0; i < m; i++) sums[i * FEW_BLOCK + n - n0 + j] = _mm512_reduce_add_ps(acc[j][i]);
    }
}

static __attribute__((noinline)) void few_task(const Job *job, int64_t e, int64_t r0, int m, int64_t n0, int64_t n1,
                                               const __m512i *x) {
    float sums[FEW * FEW_BLOCK] __attribute__((aligned(64)));
    const Stack *s = job->stack;
    float *buffer = scratch((size_t)s->row_blocks * 16);
#define ROWS(m, kind, f) few_rows(s, e, n0, n1, x, m, sums, buffer, kind, f)
#define CALL(kind, f)                                                                                                     \
    do { if (m == 1) ROWS(1, kind, f); else if (m == 2) ROWS(2, kind, f); else if (m == 3) ROWS(3, kind, f); else ROWS(4, kind, f); } while (0)
    FOR_KIND(s, job->fast, CALL);
#undef CALL
#undef ROWS
    for (int i = 0; i < m; i++) {
        const uint16_t *low = job->x2 + (r0 + i) * job->rank;
        for (int64_t n = n0; n < n1; n += 16) {
            __mmask16 keep = n1 - n >= 16 ? 0xffff : (1u << (n1 - n)) - 1;
            __m512 sum = _mm512_load_ps(sums + i * FEW_BLOCK + n - n0);
            for (int64_t r = 0; r < job->rank; r++) {
                __m256i half = _mm256_maskz_loadu_epi16(keep, job->mats + (e * job->rank + r) * job->out + n);
                __m512 b = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
                uint32_t bits = (uint32_t)low[r] << 16;
                float a;
                memcpy(&a, &bits, 4);
                sum = _mm512_fmadd_ps(_mm512_set1_ps(a), b, sum);
            }
            _mm256_mask_storeu_epi16(job->y + (r0 + i) * job->out + n, keep, (__m256i)_mm512_cvtneps_pbh(sum));
        }
    }
}

// As moesmith_project over columns, for a small R: one pass over the packed bytes per FEW rows, no panels.
EXPORT void moesmith_project_few(const Stack *s, const uint16_t *x, uint16_t *y, const int64_t *offsets, const uint16_t *x2,
                                 const uint16_t *mats, int64_t rank, int threads) {
    Job job = {s, x, x2, mats, y, offsets, s->columns, s->rows, rank, s->kind == FOUR_BIT && s->block_shift >= 6};
    int64_t rows = offsets[s->experts], groups = (s->columns + 63) / 64, blocks = (s->rows + FEW_BLOCK - 1) / FEW_BLOCK;
    __m512i *split = aligned_alloc(64, (size_t)(rows * groups * 2 + 1) * 64);
    int64_t *starts = malloc((size_t)(rows + 1) * 2 * sizeof *starts), batches = 0;
    for (int64_t r = 0; r < rows; r++) split_row(x + r * s->columns, s->columns, split + r * groups * 2);
    for (int64_t e = 0; e < s->experts; e++)
        for (int64_t r = offsets[e]; r < offsets[e + 1]; r += FEW) starts[batches * 2] = e, starts[batches++ * 2 + 1] = r;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (batches * blocks > 1)
    for (int64_t task = 0; task < batches * blocks; task++) {
        int64_t e = starts[task / blocks * 2], r0 = starts[task / blocks * 2 + 1], n0 = task % blocks * FEW_BLOCK;
        int64_t n1 = n0 + FEW_BLOCK < s->rows ? n0 + FEW_BLOCK : s->rows, m = offsets[e + 1] - r0;
        few_task(&job, e, r0, m < FEW ? (int)m : FEW, n0, n1, split + r0 * groups * 2);
    }
    free(starts), free(split);
}

// ---------------------------------------------------------------- p^T q, per expert

#define GRAM_WIDTH 512

INLINE void gram_strip(const int32_t *pairs, int64_t ranks, int64_t rank0, const uint16_t *q, int64_t rows, int64_t width,
                       void *out, int type, int m, __mmask32 keep) {
    __m512 acc[8][2];
#pragma GCC unroll 8
    for (int i = 0; i < m; i++) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    for (int64_t r = 0; r < rows; r += 2) {
        __m512i a = _mm512_maskz_loadu_epi16(keep, q + r * width), b = _mm512_setzero_si512();
        if (r + 1 < rows) b = _mm512_maskz_loadu_epi16(keep, q + (r + 1) * width);
        __m512i w0 = _mm512_unpacklo_epi16(a, b), w1 = _mm512_unpackhi_epi16(a, b);
        const int32_t *pair = pairs + r / 2 * ranks + rank0;
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
            _mm512_mask_storeu_ps((float *)out + at, (__mmask16)keep, a);
            _mm512_mask_storeu_ps((float *)out + at + 16, (__mmask16)(keep >> 16), b);
        } else {
            _mm512_mask_storeu_epi16((uint16_t *)out + at, keep, pack_bf16(a, b));
        }
    }
}

static void gram_task(const uint16_t *p, const uint16_t *q, void *out, int64_t rows, int64_t ranks, int64_t width,
                      int64_t c0, int64_t c1, int type) {
    int32_t *pairs = scratch((size_t)((rows + 1) / 2 * ranks) * 4 + 64);
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t i = 0; i < ranks; i++)
            pairs[r / 2 * ranks + i] = p[r * ranks + i] | (r + 1 < rows ? (int32_t)p[(r + 1) * ranks + i] << 16 : 0);
    for (int64_t c = c0; c < c1; c += 32) {
        __mmask32 keep = c1 - c >= 32 ? ~0u : (1u << (c1 - c)) - 1;
        void *to = type == FP32 ? (void *)((float *)out + c) : (void *)((uint16_t *)out + c);
        int64_t i = 0;
        for (; i + 8 <= ranks; i += 8) gram_strip(pairs, ranks, i, q + c, rows, width, to, type, 8, keep);
        for (; i + 4 <= ranks; i += 4) gram_strip(pairs, ranks, i, q + c, rows, width, to, type, 4, keep);
        for (; i < ranks; i++) gram_strip(pairs, ranks, i, q + c, rows, width, to, type, 1, keep);
    }
}

// out (E, ranks, width), fp32 or bf16 = p (R, ranks)^T q (R, width) per expert; zero where an expert has no rows.
EXPORT void moesmith_gram(const uint16_t *p, const uint16_t *q, void *out, const int64_t *offsets, int64_t experts,
                          int64_t ranks, int64_t width, int type, int threads) {
    int64_t strips = (width + GRAM_WIDTH - 1) / GRAM_WIDTH, size = type == FP32 ? 4 : 2;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < experts * strips; task++) {
        int64_t e = task / strips, c0 = task % strips * GRAM_WIDTH, c1 = c0 + GRAM_WIDTH < width ? c0 + GRAM_WIDTH : width;
        gram_task(p + offsets[e] * ranks, q + offsets[e] * width, (char *)out + e * ranks * width * size,
                  offsets[e + 1] - offsets[e], ranks, width, c0, c1, type);
    }
}

#endif
