/* Products of bytes in registers of 32 bytes: what products.c and bounds.c share. */
#ifndef GGSCOPE_BYTES_H
#define GGSCOPE_BYTES_H
#include "reading.h"

/* A Xeon with AMX gains a tenth to a sixth where a product's matrix is fetched this many bytes ahead: its own
   prefetching stops at every page. Zen 4 loses as much. */
#if defined(__AMX_TILE__)
#define FETCH(w, offset) __builtin_prefetch((const char *) (w) + 1536 + (offset))
#else
#define FETCH(w, offset) (void) (w)
#endif

#define EIGHT_BYTES 144 /* of a block of eight rows in four bits: four_rows */

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && defined(__GNUC__)
#define HAVE_PRODUCTS 1

/* The dot products of four neighbours, unsigned bytes with signed ones, added to `sum`. */
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define HAVE_FOURS 1
#define FOURS(sum, u8, s8) _mm256_dpbusd_epi32(sum, u8, s8)
#elif defined(__AVXVNNI__)
#define HAVE_FOURS 1
#define FOURS(sum, u8, s8) _mm256_dpbusd_avx_epi32(sum, u8, s8)
#else /* for products of two neighbours that 16 bits hold */
#define HAVE_FOURS 0
#define FOURS(sum, u8, s8) _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(u8, s8), _mm256_set1_epi16(1)))
#endif

static inline __m256i bytes_at(const void * p) { return _mm256_loadu_si256(p); }

/* ggml's rounding of a row: blocks of 32, scale max|u| / 127 as F16, the nearest whole numbers. `excess`: what a block's
   product has too much where `added` was added to every weight. */
static void quantise(const float * u, int64_t D, float added, int8_t * q, float * scale, float * excess) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    for (int64_t b = 0; b < D / QK; b++, u += QK, q += QK) {
        __m256 most = _mm256_setzero_ps();
        for (int i = 0; i < 4; i++) most = _mm256_max_ps(most, _mm256_and_ps(magnitude, _mm256_loadu_ps(u + 8 * i)));
        float each[8], largest = 0;
        _mm256_storeu_ps(each, most);
        for (int i = 0; i < 8; i++) largest = each[i] > largest ? each[i] : largest;
        scale[b] = _cvtsh_ss(_cvtss_sh(largest / 127.0f, 0));
        __m256 inverse = _mm256_set1_ps(largest != 0 ? 127.0f / largest : 0);
        __m256i whole[4];
        for (int i = 0; i < 4; i++) whole[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(u + 8 * i), inverse));
        __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(whole[0], whole[1]), _mm256_packs_epi32(whole[2], whole[3]));
        bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_storeu_si256((void *) q, bytes);
        int32_t sum = 0;
        for (int j = 0; j < QK; j++) sum += q[j];
        excess[b] = added * (float) sum;
    }
}

/* Q4_0 as ggml's CPU code lays it out anew: of eight rows together, for each block the eight F16 scales, then 8 bytes
   of each row, then the other 8 of each. The low halves are values j.. of the block, the high ones j + 16.., as signed
   four-bit numbers; they are multiplied with ADDED_4 added. */
#define ADDED_4 8.0f

static inline __m256i four_rows(__m256i sum, const uint8_t * w, const int8_t * q) {
    const __m256i low = _mm256_set1_epi8(0x0f);
    long long near, far;
    memcpy(&near, q, 8);
    memcpy(&far, q + 16, 8);
    __m256i both = _mm256_xor_si256(bytes_at(w), _mm256_set1_epi8((char) 0x88));
    sum = FOURS(sum, _mm256_and_si256(both, low), _mm256_set1_epi64x(near));
    return FOURS(sum, _mm256_and_si256(_mm256_srli_epi16(both, 4), low), _mm256_set1_epi64x(far));
}

/* The products of eight rows with a row's blocks, less `excess` of each block times its scales. With `square`, of every
   block, also the sum of that times the scales' squares: in `spread`. */
static inline __attribute__((always_inline)) __m256 eight_rows(
    const uint8_t * w, int64_t blocks, const int8_t * q, const float * scale, const float * excess, const float * square,
    __m256 * spread) {
    const __m256i upper = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3), lower = _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7);
    __m256 total0 = _mm256_setzero_ps(), total4 = total0, much = total0, squares = total0; /* rows 0 to 3 and 4 to 7 */
    for (int64_t b = 0; b < blocks; b++, w += EIGHT_BYTES, q += QK) {
        FETCH(w, 0);
        FETCH(w, 64);
        if ((b & 3) == 0) FETCH(w, 128);
        __m256i sum0 = four_rows(four_rows(_mm256_setzero_si256(), w + 16, q), w + 80, q + 8);
        __m256i sum4 = four_rows(four_rows(_mm256_setzero_si256(), w + 48, q), w + 112, q + 8);
        __m256 scales = _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128((const void *) w)), _mm256_set1_ps(scale[b]));
        much = _mm256_fmadd_ps(scales, _mm256_set1_ps(excess[b]), much);
        if (square) squares = _mm256_fmadd_ps(_mm256_mul_ps(scales, scales), _mm256_set1_ps(square[b]), squares);
        total0 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum0), _mm256_permutevar8x32_ps(scales, upper), total0);
        total4 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum4), _mm256_permutevar8x32_ps(scales, lower), total4);
    }
    if (square) *spread = squares;
    __m256 pairs = _mm256_hadd_ps(total0, total4); /* rows 0 1 4 5 2 3 6 7 */
    return _mm256_sub_ps(_mm256_permutevar8x32_ps(pairs, _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7)), much);
}
#else
#define HAVE_PRODUCTS 0
#endif

#endif
