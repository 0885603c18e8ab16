// Rows grouped by expert times packed matrices, in bf16 with fp32 sums (AVX512-BF16 machines only).
//
// One expert's matrix is unpacked a panel at a time into a few hundred KB of scratch per thread, laid out so
// that the inner loops only load, broadcast and multiply; then rows pass over the panel six at a time. Tasks
// are (expert, block of rows, panel), dealt dynamically, so one crowded expert still fills every thread. Each
// output element is summed in one fixed order, whatever the other rows, the tiles and the number of threads.
#include "unpack.h"

#ifdef HAVE_GEMM

// Rows per task: bounds the fp32 scratch, and feeds every thread when one expert has all rows.
#define ROW_BLOCK 384
// Rows per register tile: 6 x 4 sums, 4 weights and a broadcast, of 32 registers.
#define TILE 6
// Matrix rows per panel when summing over rows.
#define REDUCE_BLOCK 512

// 4 x 4 transposition of 128-bit lanes.
INLINE void transpose_lanes(__m512i* a) {
    __m512i t0 = _mm512_shuffle_i32x4(a[0], a[1], 0x44), t1 = _mm512_shuffle_i32x4(a[2], a[3], 0x44);
    __m512i t2 = _mm512_shuffle_i32x4(a[0], a[1], 0xee), t3 = _mm512_shuffle_i32x4(a[2], a[3], 0xee);
    a[0] = _mm512_shuffle_i32x4(t0, t1, 0x88), a[1] = _mm512_shuffle_i32x4(t0, t1, 0xdd);
    a[2] = _mm512_shuffle_i32x4(t2, t3, 0x88), a[3] = _mm512_shuffle_i32x4(t2, t3, 0xdd);
}

// ---------------------------------------------------------------- x @ W^T: sums over columns

// Panel of 16 matrix rows: for each chunk four vectors; vector g holds the chunk of rows g, g+4, g+8, g+12.
INLINE void pack_columns(const Stack* s, int64_t e, int64_t n0, __m512i* panel, float* buffer, int kind,
                         int fast) {
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
                    for (int line = 0; line < bits * 8; line += 64)
                        __builtin_prefetch(row[lane].codes + c * bits + line + ahead, 0, 2);
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
static void pack_extra_columns(const uint16_t* mats, int64_t rank, int64_t rows, int64_t n0,
                               uint16_t* panel) {
    for (int64_t r = 0; r < rank; r++)
        for (int n = 0; n < 16; n++)
            panel[(((r / 8) * 4 + n % 4) * 4 + n / 4) * 8 + r % 8] =
                n0 + n < rows ? mats[r * rows + n0 + n] : 0;
}

INLINE void dot_chunks(__m512 acc[TILE][4], int m, const uint16_t* x, int64_t ldx, const __m512i* panel,
                       int64_t chunks) {
    for (int64_t c = 0; c < chunks; c++, panel += 4, x += 8) {
        __m512i w0 = panel[0], w1 = panel[1], w2 = panel[2], w3 = panel[3];
#pragma GCC unroll 6
        for (int i = 0; i < m; i++) {
            __m512i b = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(x + i * ldx)));
            DOT(acc[i][0], w0, b), DOT(acc[i][1], w1, b), DOT(acc[i][2], w2, b), DOT(acc[i][3], w3, b);
        }
    }
}

INLINE void columns_tile(int m, const uint16_t* x, int64_t ldx, const __m512i* panel, int64_t chunks,
                         const uint16_t* x2, int64_t ldx2, const __m512i* panel2, int64_t chunks2,
                         uint16_t* y, int64_t ldy, __mmask16 keep) {
    __m512 acc[TILE][4];
#pragma GCC unroll 6
    for (int i = 0; i < m; i++) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = _mm512_setzero_ps();
    dot_chunks(acc, m, x, ldx, panel, chunks);
    dot_chunks(acc, m, x2, ldx2, panel2, chunks2);
#pragma GCC unroll 6
    for (int i = 0; i < m; i++) {  // each 128-bit lane holds four partial sums of one matrix row
        __m512 a =
            _mm512_add_ps(_mm512_unpacklo_ps(acc[i][0], acc[i][1]), _mm512_unpackhi_ps(acc[i][0], acc[i][1]));
        __m512 b =
            _mm512_add_ps(_mm512_unpacklo_ps(acc[i][2], acc[i][3]), _mm512_unpackhi_ps(acc[i][2], acc[i][3]));
        __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
        a = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)),
                          _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
        _mm256_mask_storeu_epi16(y + i * ldy, keep, (__m256i)_mm512_cvtneps_pbh(a));
    }
}

// ---------------------------------------------------------------- g @ W: sums over matrix rows

// Panel of 64 columns and rows n0..n1: for each pair of rows four vectors; vector q, lane L holds the pairs
// of columns 16 L + 4 q + 0..3.
INLINE void store_pair(__m512i* to, Group a, Group b) {
    _mm512_store_si512(to + 0, _mm512_unpacklo_epi16(a.lo, b.lo));
    _mm512_store_si512(to + 1, _mm512_unpackhi_epi16(a.lo, b.lo));
    _mm512_store_si512(to + 2, _mm512_unpacklo_epi16(a.hi, b.hi));
    _mm512_store_si512(to + 3, _mm512_unpackhi_epi16(a.hi, b.hi));
}

INLINE void pack_rows(const Stack* s, int64_t e, int64_t n0, int64_t n1, int64_t k0, int groups,
                      __m512i* panel, float* buffer, int kind, int fast) {
    __m512 codebook = kind == FOUR_BIT ? _mm512_loadu_ps(s->codebook) : _mm512_setzero_ps();
    int64_t pairs = (n1 - n0) / 2, bits = kind == FOUR_BIT ? 4 : kind == EIGHT_BIT ? 8 : 16;
    int64_t row_bytes = s->columns * bits / 8, k1 = k0 + 64 * groups;
    if (k1 > s->columns) k1 = s->columns;
    for (int64_t p = 0; p < pairs; p++) {
        int64_t n = n0 + 2 * p;
        Row first = row_at(s, e, n, k0, k1, buffer);
        Row second = row_at(s, e, n + 1, k0, k1, buffer + s->row_blocks);
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

static void pack_extra_rows(const uint16_t* mats, int64_t rank, int64_t columns, int64_t k, __m512i* panel) {
    for (int64_t r = 0; r < rank; r += 2)
        store_pair(panel + r / 2 * 4, load_raw(mats + r * columns, k, columns, RAW_BF16),
                   load_raw(mats + (r + 1) * columns, k, columns, RAW_BF16));
}

INLINE void dot_pairs(__m512 acc[TILE][4], int m, const uint16_t* g, int64_t ldg, const __m512i* panel,
                      int64_t pairs) {
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
INLINE void rows_tile(int m, const uint16_t* g, int64_t ldg, const __m512i* panel, int64_t pairs,
                      const uint16_t* g2, int64_t ldg2, const __m512i* panel2, int64_t pairs2, __m512* sums,
                      int first, int last, uint16_t* y, int64_t ldy, __mmask32 keep0, __mmask32 keep1) {
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
        __m512i v[4] = {_mm512_castps_si512(acc[i][0]), _mm512_castps_si512(acc[i][1]),
                        _mm512_castps_si512(acc[i][2]), _mm512_castps_si512(acc[i][3])};
        transpose_lanes(v);
        uint16_t* to = y + i * ldy;
        _mm512_mask_storeu_epi16(to, keep0, pack_bf16(_mm512_castsi512_ps(v[0]), _mm512_castsi512_ps(v[1])));
        _mm512_mask_storeu_epi16(to + 32, keep1,
                                 pack_bf16(_mm512_castsi512_ps(v[2]), _mm512_castsi512_ps(v[3])));
    }
}

// One specialised copy per number of rows, so that the sums stay in registers.
// clang-format off
#define FOR_TILE(m, call)                                                       \
    switch (m) {                                                                \
        case 1: call(1); break; case 2: call(2); break; case 3: call(3); break; \
        case 4: call(4); break; case 5: call(5); break; default: call(6);       \
    }
// clang-format on

static __attribute__((noinline)) void columns_pack(const Stack* s, int64_t e, int64_t n0, __m512i* panel,
                                                   float* buffer, int fast) {
#define CALL(kind, f) pack_columns(s, e, n0, panel, buffer, kind, f)
    FOR_KIND(s, fast, CALL);
#undef CALL
}

static __attribute__((noinline)) void rows_pack(const Stack* s, int64_t e, int64_t n0, int64_t n1, int64_t k0,
                                                int groups, __m512i* panel, float* buffer, int fast) {
#define CALL(kind, f) pack_rows(s, e, n0, n1, k0, groups, panel, buffer, kind, f)
    FOR_KIND(s, fast, CALL);
#undef CALL
}

static void columns_task(const Job* job, int64_t e, int64_t r0, int64_t r1, int64_t n0, int64_t n1) {
    const Stack* s = job->stack;
    int64_t chunks = job->in / 8, padded = (job->in + 63) / 64 * 8, chunks2 = job->rank / 8;
    int64_t stride = (padded + chunks2) * 4;  // vectors per 16 matrix rows
    int64_t vectors = (n1 - n0 + 15) / 16 * stride;
    __m512i* panel = scratch((size_t)vectors * 64 + (size_t)s->row_blocks * 16);
    float* buffer = (float*)(panel + vectors);
    for (int64_t n = n0; n < n1; n += 16) {
        __m512i* to = panel + (n - n0) / 16 * stride;
        columns_pack(s, e, n, to, buffer, job->fast);
        if (job->rank)
            pack_extra_columns(job->mats + e * job->rank * job->out, job->rank, job->out, n,
                               (uint16_t*)(to + padded * 4));
    }
    for (int64_t r = r0; r < r1; r += TILE) {
        const uint16_t *x = job->x + r * job->in, *x2 = job->x2 + r * job->rank;
        int m = r1 - r < TILE ? (int)(r1 - r) : TILE;
        for (int64_t n = n0; n < n1; n += 16) {
            const __m512i* w = panel + (n - n0) / 16 * stride;
            __mmask16 keep = n1 - n >= 16 ? 0xffff : (1u << (n1 - n)) - 1;
            uint16_t* y = job->y + r * job->out + n;
#define CALL(m) \
    columns_tile(m, x, job->in, w, chunks, x2, job->rank, w + padded * 4, chunks2, y, job->out, keep)
            FOR_TILE(m, CALL)
#undef CALL
        }
    }
}

static void rows_task(const Job* job, int64_t e, int64_t r0, int64_t r1, int64_t k0, int64_t k1) {
    const Stack* s = job->stack;
    int groups = (int)((k1 - k0 + 63) / 64);
    int64_t panel_vectors = REDUCE_BLOCK / 2 * 4, rank = job->rank;
    int64_t sum_vectors = (r1 - r0) * 4;
    size_t vectors = groups * (panel_vectors + sum_vectors + rank * 2);
    __m512i* panel = scratch(vectors * 64 + (size_t)s->row_blocks * 8);
    __m512* sums = (__m512*)(panel + groups * panel_vectors);
    __m512i* panel2 = (__m512i*)(sums + groups * sum_vectors);
    float* buffer = (float*)(panel2 + groups * rank * 2);
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
                uint16_t* y = job->y + r * job->out + k0 + 64 * g;
                __m512* sum = sums + g * sum_vectors + (r - r0) * 4;
                int m = r1 - r < TILE ? (int)(r1 - r) : TILE;
#define CALL(m)                                                                                        \
    rows_tile(m, x, job->in, w, (n1 - n0) / 2, x2, rank, w2, rank / 2, sum, n0 == 0, n1 == job->in, y, \
              job->out, keep0, keep1)
                FOR_TILE(m, CALL)
#undef CALL
            }
        }
    }
}

// y (R, out) = x (R, in) times each expert's matrix: W^T if over_columns, else W. bf16; offsets on the host,
// experts + 1. Wants: columns a multiple of 16 (any multiple of 8 for raw weights over columns), rows even if
// summed over, rank of 8.
EXPORT void moesmith_project(const Stack* s, const uint16_t* x, uint16_t* y, const int64_t* offsets,
                             int over_columns, const uint16_t* x2, const uint16_t* mats, int64_t rank,
                             int threads) {
    Job job = {.stack = s, .x = x, .x2 = x2, .mats = mats, .y = y, .rank = rank, .fast = is_fast(s)};
    job.in = over_columns ? s->columns : s->rows, job.out = over_columns ? s->rows : s->columns;
    // over columns: as many matrix rows as fit beside the rows of x in a typical 1 MB second-level cache
    int64_t width = 128;
    if (over_columns) {
        int64_t per16 = 16 * 2 * ((job.in + 63) / 64 * 64);
        width = per16 * 4 <= (384 << 10) ? 64 : per16 * 2 <= (384 << 10) ? 32 : 16;
    }
    int64_t panels = (job.out + width - 1) / width;
    int64_t* first = malloc((size_t)(s->experts + 1) * sizeof *first);
    first[0] = 0;
    for (int64_t e = 0; e < s->experts; e++)
        first[e + 1] = first[e] + (offsets[e + 1] - offsets[e] + ROW_BLOCK - 1) / ROW_BLOCK * panels;
    int64_t tasks = first[s->experts];
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (tasks > 1)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t low = 0, high = s->experts;
        while (high - low > 1) {
            int64_t middle = (low + high) / 2;
            if (first[middle] <= task)
                low = middle;
            else
                high = middle;
        }
        int64_t block = (task - first[low]) / panels, panel = (task - first[low]) % panels;
        int64_t r0 = offsets[low] + block * ROW_BLOCK, r1 = r0 + ROW_BLOCK;
        int64_t c0 = panel * width, c1 = c0 + width;
        if (r1 > offsets[low + 1]) r1 = offsets[low + 1];
        if (c1 > job.out) c1 = job.out;
        if (over_columns)
            columns_task(&job, low, r0, r1, c0, c1);
        else
            rows_task(&job, low, r0, r1, c0, c1);
    }
    free(first);
}

#endif
