// Quantise and dequantise blocks of weights on a CPU. Bytes and bits equal bitsandbytes' CPU functions:
//   4 bit:  scaled = w * (1 / max(absmax, 1e-38)); the code is the number of midpoints below it
//   8 bit:  step = trunc(fma((w / absmax + 1) / 2, 65535, 0.5)); the code comes from a 65,536-entry table
//   back:   codebook[code] * absmax in fp32, rounded once
// Blocks are multiples of 16 weights, so a vector of 16 never straddles two of them.
#include "kernels.h"

#ifdef HAVE_AVX512

INLINE __m512 load16(const void* p, int64_t i, int type) {
    if (type == FP32) return _mm512_loadu_ps((const float*)p + i);
    __m256i h = _mm256_loadu_si256((const __m256i*)((const uint16_t*)p + i));
    if (type == FP16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

INLINE void store16(void* p, int64_t i, __m512 f, int type) {
    if (type == FP32) {
        _mm512_storeu_ps((float*)p + i, f);
        return;
    }
    __m256i* to = (__m256i*)((uint16_t*)p + i);
    if (type == FP16) {
        _mm256_storeu_si256(to, _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
        return;
    }
    // by hand: the conversion instruction would flush denormals
    __m512i bits = _mm512_castps_si512(f),
            odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm256_storeu_si256(to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
}

// Largest magnitude of a block. Compared as integers, so that a NaN wins and the caller sees it.
INLINE float block_absmax(const void* w, int64_t start, int64_t n, int type) {
    __m512i best = _mm512_setzero_si512(), mask = _mm512_set1_epi32(0x7fffffff);
    for (int64_t i = 0; i < n; i += 16)
        best =
            _mm512_max_epi32(best, _mm512_and_si512(_mm512_castps_si512(load16(w, start + i, type)), mask));
    int32_t bits = _mm512_reduce_max_epi32(best);
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

typedef struct {
    __m512 lower, middle;
    __m512i order;
    __m512 bound[4];
} Tree;

// Depth-first search in four steps: bound[s] holds, for each partial answer, the midpoint to compare with.
INLINE Tree make_tree(const float* midpoints, const int32_t* order) {
    Tree t;
    float b[16];
    for (int s = 0; s < 4; s++) {
        for (int i = 0; i < 16; i++) {
            int half = 8 >> s, known = i & ~(2 * half - 1);
            b[i] = midpoints[known + half - 1];
        }
        t.bound[s] = _mm512_loadu_ps(b);
    }
    t.order = _mm512_loadu_si512(order);
    return t;
}

INLINE __m128i codes16(const void* w, int64_t i, int type, __m512 inverse, const Tree* t) {
    __m512 v = _mm512_mul_ps(load16(w, i, type), inverse);
    v = _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(-1)), _mm512_set1_ps(1));
    __m512i code = _mm512_setzero_si512();
    for (int s = 0; s < 4; s++) {
        __m512 bound = s ? _mm512_permutexvar_ps(code, t->bound[s]) : t->bound[0];
        __mmask16 above = _mm512_cmp_ps_mask(v, bound, _CMP_GT_OQ);
        code = _mm512_mask_or_epi32(code, above, code, _mm512_set1_epi32(8 >> s));
    }
    return _mm512_cvtepi32_epi8(_mm512_permutexvar_epi32(code, t->order));
}

INLINE void quantize_4bit_blocks(const void* w, uint8_t* codes, float* absmax, int64_t first, int64_t last,
                                 int64_t blocksize, int type, const float* midpoints, const int32_t* order) {
    Tree tree = make_tree(midpoints, order);
    const __m128i weights = _mm_set1_epi16(0x0110);  // first byte times 16 plus second byte
    for (int64_t block = first; block < last; block++) {
        int64_t start = block * blocksize;
        float largest = absmax[block] = block_absmax(w, start, blocksize, type);
        __m512 inverse = _mm512_set1_ps(1.0f / (largest < 1e-38f ? 1e-38f : largest));
        for (int64_t i = start; i < start + blocksize; i += 16) {
            __m128i pairs = _mm_maddubs_epi16(codes16(w, i, type, inverse, &tree), weights);
            _mm_storel_epi64((__m128i*)(codes + i / 2), _mm_packus_epi16(pairs, pairs));
        }
    }
}

typedef struct {
    __m512i level[6], level7[2], level8[4];
} Search;

// The code is the number of thresholds at or below the step: eight levels of a binary search, 32 words at a
// time.
INLINE Search make_search(const uint16_t* threshold) {
    Search t;
    uint16_t entry[128];
    for (int s = 0; s < 8; s++) {
        for (int i = 0; i < 128; i++) entry[i] = threshold[((i & ((1 << s) - 1)) << (8 - s)) + (128 >> s)];
        if (s < 6)
            t.level[s] = _mm512_loadu_si512(entry);
        else if (s == 6)
            for (int i = 0; i < 2; i++) t.level7[i] = _mm512_loadu_si512(entry + 32 * i);
        else
            for (int i = 0; i < 4; i++) t.level8[i] = _mm512_loadu_si512(entry + 32 * i);
    }
    return t;
}

INLINE __m512i search(__m512i step, const Search* t) {
    const __m512i one = _mm512_set1_epi16(1);
    __mmask32 upper = _mm512_cmpge_epu16_mask(step, t->level[0]);  // which half of the codes
    __m512i code = _mm512_maskz_mov_epi16(upper, one);
#pragma GCC unroll 7
    for (int s = 1; s < 8; s++) {
        __m512i bound;
        if (s < 6)
            bound = _mm512_permutexvar_epi16(code, t->level[s]);
        else if (s == 6)
            bound = _mm512_permutex2var_epi16(t->level7[0], code, t->level7[1]);
        else
            bound =
                _mm512_mask_blend_epi16(upper, _mm512_permutex2var_epi16(t->level8[0], code, t->level8[1]),
                                        _mm512_permutex2var_epi16(t->level8[2], code, t->level8[3]));
        code = _mm512_mask_add_epi16(_mm512_add_epi16(code, code), _mm512_cmpge_epu16_mask(step, bound),
                                     _mm512_add_epi16(code, code), one);
    }
    return code;
}

INLINE __m512i step16(const void* w, int64_t i, int type, __m512 inverse) {
    const __m512 one = _mm512_set1_ps(1), half = _mm512_set1_ps(0.5f);
    __m512 v = _mm512_mul_ps(load16(w, i, type), inverse);
    v = _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(-1)), one);  // a NaN (0 * inf) becomes -1
    return _mm512_cvttps_epi32(
        _mm512_fmadd_ps(_mm512_mul_ps(_mm512_add_ps(v, one), half), _mm512_set1_ps(65535), half));
}

INLINE void quantize_8bit_blocks(const void* w, uint8_t* codes, float* absmax, int64_t first, int64_t last,
                                 int64_t blocksize, int type, const uint8_t* table,
                                 const uint16_t* threshold) {
    (void)table;
    Search tree = make_search(threshold);
    int16_t low_words[32];
    for (int i = 0; i < 32; i++) low_words[i] = 2 * i;
    const __m512i join = _mm512_loadu_si512(low_words);
    for (int64_t block = first; block < last; block++) {
        int64_t start = block * blocksize, end = start + blocksize;
        float largest = absmax[block] = block_absmax(w, start, blocksize, type);
        if (largest == 0) {
            memset(codes + start, 0, blocksize);
            continue;
        }
        __m512 inverse = _mm512_set1_ps(1.0f / largest);
        for (int64_t i = start; i < end; i += 32) {
            __m512i a = step16(w, i, type, inverse), b = i + 16 < end ? step16(w, i + 16, type, inverse) : a;
            __m256i code = _mm512_cvtepi16_epi8(search(_mm512_permutex2var_epi16(a, join, b), &tree));
            if (i + 16 < end)
                _mm256_storeu_si256((__m256i*)(codes + i), code);
            else
                _mm_storeu_si128((__m128i*)(codes + i), _mm256_castsi256_si128(code));
        }
    }
}

INLINE void dequantize_blocks(const uint8_t* codes, const float* absmax, void* out, int64_t first,
                              int64_t last, int64_t blocksize, int bits, int type, const float* codebook) {
    const __m512 table = _mm512_loadu_ps(codebook);
    const __m128i low = _mm_set1_epi8(15);
    for (int64_t block = first; block < last; block++) {
        int64_t start = block * blocksize;
        __m512 scale = _mm512_set1_ps(absmax[block]);
        for (int64_t i = start; i < start + blocksize; i += 16) {
            __m512 v;
            if (bits == 4) {
                __m128i b = _mm_loadl_epi64((const __m128i*)(codes + i / 2));
                __m128i high = _mm_and_si128(_mm_srli_epi16(b, 4), low);
                b = _mm_unpacklo_epi8(high, _mm_and_si128(b, low));
                v = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(b), table);
            } else {
                __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + i)));
                v = _mm512_i32gather_ps(index, codebook, 4);
            }
            store16(out, i, _mm512_mul_ps(v, scale), type);
        }
    }
}

#else  // plain C: the same arithmetic, one weight at a time

static float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
    if (exponent == 31)
        bits = sign | 0x7f800000 | mantissa << 13;
    else if (exponent)
        bits = sign | (exponent + 112) << 23 | mantissa << 13;
    else {
        float f = (float)mantissa * 0x1p-24f;
        memcpy(&bits, &f, 4);
        bits |= sign;
    }
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static uint16_t float_to_half(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x47800000) return sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00);
    if (magnitude < 0x38800000) {  // denormal half: let the float adder round to a multiple of 2^-24
        float a;
        memcpy(&a, &magnitude, 4);
        a += 0.5f;
        uint32_t r;
        memcpy(&r, &a, 4);
        return sign | (r - 0x3f000000);
    }
    magnitude += 0xc8000fff + (magnitude >> 13 & 1);  // rebias the exponent, round to nearest even
    return sign | magnitude >> 13;
}

INLINE uint16_t float_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE float load_float(const void* p, int64_t i, int type) {
    if (type == FP32) return ((const float*)p)[i];
    uint16_t h = ((const uint16_t*)p)[i];
    if (type == FP16) return half_to_float(h);
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE void store_float(void* p, int64_t i, float f, int type) {
    if (type == FP32)
        ((float*)p)[i] = f;
    else
        ((uint16_t*)p)[i] = type == FP16 ? float_to_half(f) : float_to_bf16(f);
}

INLINE float block_absmax(const void* w, int64_t start, int64_t n, int type) {
    int32_t best = 0;
    for (int64_t i = 0; i < n; i++) {
        float f = load_float(w, start + i, type);
        int32_t bits;
        memcpy(&bits, &f, 4);
        bits &= 0x7fffffff;
        best = bits > best ? bits : best;
    }
    float f;
    memcpy(&f, &best, 4);
    return f;
}

INLINE void quantize_4bit_blocks(const void* w, uint8_t* codes, float* absmax, int64_t first, int64_t last,
                                 int64_t blocksize, int type, const float* midpoints, const int32_t* order) {
    for (int64_t block = first; block < last; block++) {
        int64_t start = block * blocksize;
        float largest = absmax[block] = block_absmax(w, start, blocksize, type);
        float inverse = 1.0f / (largest < 1e-38f ? 1e-38f : largest);
        for (int64_t i = start; i < start + blocksize; i += 2) {
            int code[2];
            for (int j = 0; j < 2; j++) {
                float v = load_float(w, i + j, type) * inverse;
                int n = 0;
                for (int m = 0; m < 15; m++)
                    n += v > midpoints[m];  // clamping to [-1, 1] would not change it
                code[j] = order[n];
            }
            codes[i / 2] = code[0] << 4 | code[1];
        }
    }
}

INLINE void quantize_8bit_blocks(const void* w, uint8_t* codes, float* absmax, int64_t first, int64_t last,
                                 int64_t blocksize, int type, const uint8_t* table,
                                 const uint16_t* threshold) {
    (void)threshold;
    for (int64_t block = first; block < last; block++) {
        int64_t start = block * blocksize;
        float largest = absmax[block] = block_absmax(w, start, blocksize, type);
        if (largest == 0) {
            memset(codes + start, 0, blocksize);
            continue;
        }
        float inverse = 1.0f / largest;
        for (int64_t i = start; i < start + blocksize; i++) {
            float v = load_float(w, i, type) * inverse;
            v = v > -1 ? v : -1;  // a NaN (0 * inf) becomes -1
            v = v < 1 ? v : 1;
            codes[i] = table[(int)fmaf((v + 1) * 0.5f, 65535.0f, 0.5f) & 65535];
        }
    }
}

INLINE void dequantize_blocks(const uint8_t* codes, const float* absmax, void* out, int64_t first,
                              int64_t last, int64_t blocksize, int bits, int type, const float* codebook) {
    for (int64_t i = first * blocksize; i < last * blocksize; i++) {
        int code = bits == 8 ? codes[i] : i & 1 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
        store_float(out, i, codebook[code] * absmax[i / blocksize], type);
    }
}

#endif

// Blocks are dealt in runs: long enough to be worth a thread, short enough to balance.
#define RUN 1024
// clang-format off
#define FOR_RUNS(blocks)                                                            \
    int64_t runs = ((blocks) + RUN - 1) / RUN;                                      \
    _Pragma("omp parallel for schedule(static) num_threads(threads) if (runs > 1)") \
    for (int64_t run = 0; run < runs; run++)
#define FOR_TYPE(type, call) \
    if ((type) == FP32) call(FP32); else if ((type) == BF16) call(BF16); else call(FP16)
// clang-format on
#define FIRST (run * RUN)
#define LAST(blocks) ((run + 1) * RUN < (blocks) ? (run + 1) * RUN : (blocks))

EXPORT void moesmith_quantize_4bit(const void* w, uint8_t* codes, float* absmax, int64_t blocks,
                                   int64_t blocksize, int type, const float* midpoints, const int32_t* order,
                                   int threads) {
    FOR_RUNS(blocks) {
#define CASE(t) quantize_4bit_blocks(w, codes, absmax, FIRST, LAST(blocks), blocksize, t, midpoints, order)
        FOR_TYPE(type, CASE);
#undef CASE
    }
}

// `table`: the code of each of 65,536 steps; `threshold`: the first step of each of the 256 codes.
EXPORT void moesmith_quantize_8bit(const void* w, uint8_t* codes, float* absmax, int64_t blocks,
                                   int64_t blocksize, int type, const uint8_t* table,
                                   const uint16_t* threshold, int threads) {
    FOR_RUNS(blocks) {
#define CASE(t) quantize_8bit_blocks(w, codes, absmax, FIRST, LAST(blocks), blocksize, t, table, threshold)
        FOR_TYPE(type, CASE);
#undef CASE
    }
}

EXPORT void moesmith_dequantize(const uint8_t* codes, const float* absmax, void* out, int64_t blocks,
                                int64_t blocksize, int bits, int type, const float* codebook, int threads) {
    FOR_RUNS(blocks) {
#define CASE4(t) dequantize_blocks(codes, absmax, out, FIRST, LAST(blocks), blocksize, 4, t, codebook)
#define CASE8(t) dequantize_blocks(codes, absmax, out, FIRST, LAST(blocks), blocksize, 8, t, codebook)
        if (bits == 4) {
            FOR_TYPE(type, CASE4);
        } else {
            FOR_TYPE(type, CASE8);
        }
#undef CASE4
#undef CASE8
    }
}

// What this build can do: 1 = vectorised blocks, 2 = the grouped products of grouped.c.
EXPORT int moesmith_features(void) {
    int features = 0;
#ifdef HAVE_AVX512
    features |= 1;
#endif
#ifdef HAVE_GEMM
    features |= 2;
#endif
    return features;
}
