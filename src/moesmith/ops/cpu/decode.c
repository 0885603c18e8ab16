// x @ W^T for a handful of rows: decoding. Reading the packed bytes is the whole cost, so there are no
// panels: each matrix row is unpacked in registers, multiplied with up to four rows of x, and forgotten.
#include "unpack.h"

#ifdef HAVE_GEMM

#define FEW 4         // rows of x that share one pass over the weights
#define FEW_BLOCK 64  // matrix rows per task

// Even and odd columns of each group of 64 apart, as lookup_4bit delivers them; zeros past the end.
static void split_row(const uint16_t* x, int64_t columns, __m512i* to) {
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
#define WORDS(o)                                                                                             \
    _mm512_set_epi16(62 + o, 60 + o, 58 + o, 56 + o, 30 + o, 28 + o, 26 + o, 24 + o, 54 + o, 52 + o, 50 + o, \
                     48 + o, 22 + o, 20 + o, 18 + o, 16 + o, 46 + o, 44 + o, 42 + o, 40 + o, 14 + o, 12 + o, \
                     10 + o, 8 + o, 38 + o, 36 + o, 34 + o, 32 + o, 6 + o, 4 + o, 2 + o, 0 + o)
#define EVEN_WORDS WORDS(0)
#define ODD_WORDS WORDS(1)

// sums[i * FEW_BLOCK + n - n0] = row i of x times matrix row n, for m rows of x (m <= FEW) and n0 <= n < n1.
INLINE void few_rows(const Stack* s, int64_t e, int64_t n0, int64_t n1, const __m512i* x, int m, float* sums,
                     float* buffer, int kind, int fast) {
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
                    // four rows on: the next pass
                    __builtin_prefetch(row[j].codes + g * 32 + 2 * s->columns);
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

static __attribute__((noinline)) void few_task(const Job* job, int64_t e, int64_t r0, int m, int64_t n0,
                                               int64_t n1, const __m512i* x) {
    float sums[FEW * FEW_BLOCK] __attribute__((aligned(64)));
    const Stack* s = job->stack;
    float* buffer = scratch((size_t)s->row_blocks * 16);
#define ROWS(m, kind, f) few_rows(s, e, n0, n1, x, m, sums, buffer, kind, f)
    // clang-format off
#define CALL(kind, f)                                            \
    do {                                                         \
        if (m == 1) ROWS(1, kind, f);                            \
        else if (m == 2) ROWS(2, kind, f);                       \
        else if (m == 3) ROWS(3, kind, f);                       \
        else ROWS(4, kind, f);                                   \
    } while (0)
    // clang-format on
    FOR_KIND(s, job->fast, CALL);
#undef CALL
#undef ROWS
    for (int i = 0; i < m; i++) {
        const uint16_t* low = job->x2 + (r0 + i) * job->rank;
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
            _mm256_mask_storeu_epi16(job->y + (r0 + i) * job->out + n, keep,
                                     (__m256i)_mm512_cvtneps_pbh(sum));
        }
    }
}

// As moesmith_project over columns, for a small R: one pass over the packed bytes per FEW rows, no panels.
EXPORT void moesmith_project_few(const Stack* s, const uint16_t* x, uint16_t* y, const int64_t* offsets,
                                 const uint16_t* x2, const uint16_t* mats, int64_t rank, int threads) {
    Job job = {.stack = s, .x = x, .x2 = x2, .mats = mats, .y = y, .rank = rank, .fast = is_fast(s)};
    job.in = s->columns, job.out = s->rows;
    int64_t rows = offsets[s->experts], groups = (s->columns + 63) / 64;
    int64_t blocks = (s->rows + FEW_BLOCK - 1) / FEW_BLOCK;
    __m512i* split = aligned_alloc(64, (size_t)(rows * groups * 2 + 1) * 64);
    int64_t *starts = malloc((size_t)(rows + 1) * 2 * sizeof *starts), batches = 0;
    for (int64_t r = 0; r < rows; r++) split_row(x + r * s->columns, s->columns, split + r * groups * 2);
    for (int64_t e = 0; e < s->experts; e++)
        for (int64_t r = offsets[e]; r < offsets[e + 1]; r += FEW)
            starts[batches * 2] = e, starts[batches++ * 2 + 1] = r;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (batches * blocks > 1)
    for (int64_t task = 0; task < batches * blocks; task++) {
        int64_t e = starts[task / blocks * 2], r0 = starts[task / blocks * 2 + 1];
        int64_t n0 = task % blocks * FEW_BLOCK;
        int64_t n1 = n0 + FEW_BLOCK < s->rows ? n0 + FEW_BLOCK : s->rows, m = offsets[e + 1] - r0;
        few_task(&job, e, r0, m < FEW ? (int)m : FEW, n0, n1, split + r0 * groups * 2);
    }
    free(starts), free(split);
}

#endif
