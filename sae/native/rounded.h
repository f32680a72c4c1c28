/* Products of whole numbers of 8 bits (AVX-512 VNNI): w of -127 to 127 in tiles of 12 rows, (rows / 12, quads, 12, 4),
   times x, with 128 added, in panels of 32 columns, (columns / 32, quads, 32, 4). A quad is four terms of the sum, which
   starts with -128 sum(w). Floats are rounded up or down in turns that follow no row, column or value: right on
   average, and nothing is drawn. */
#ifndef GGSCOPE_ROUNDED_H
#define GGSCOPE_ROUNDED_H
#include "vectors.h"

#ifdef HAVE_INT8
#define PANEL STRIP
#define LEVELS 126.9f /* of the largest value: rounded up it is 127 */

/* From 0 to below 1: for the n-th, of which any stretch is spread evenly. */
static inline float turn(int64_t n, double by) { return (float) (n * by - floor(n * by)) * 0.9999f; }

static inline __m512 from_bf16(const uint16_t * p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *) p)), 16));
}

/* 128 was added; NaN becomes any byte. */
static inline __m512i to_byte(__m512 x) { return _mm512_and_si512(_mm512_cvttps_epi32(x), _mm512_set1_epi32(255)); }

static inline void start_at(int32_t * out, const int32_t * start) {
    for (int r = 0; r < TILE_VNNI; r++) {
        _mm512_store_si512(out + PANEL * r, _mm512_set1_epi32(start[r]));
        _mm512_store_si512(out + PANEL * r + 16, _mm512_set1_epi32(start[r]));
    }
}

/* out (12, `stride`) += a tile times a panel */
static inline void multiply(const int32_t * w, const uint8_t * x, int64_t quads, int32_t * out, int64_t stride) {
    __m512i left[TILE_VNNI], right[TILE_VNNI];
    _Pragma("GCC unroll 12")
    for (int r = 0; r < TILE_VNNI; r++) {
        left[r] = _mm512_load_si512(out + r * stride);
        right[r] = _mm512_load_si512(out + r * stride + 16);
    }
    for (int64_t j = 0; j < quads; j++, x += 128, w += TILE_VNNI) {
        __m512i x0 = _mm512_load_si512(x), x1 = _mm512_load_si512(x + 64);
        _mm_prefetch((const char *) w + 2048, _MM_HINT_T0);
        _Pragma("GCC unroll 12")
        for (int r = 0; r < TILE_VNNI; r++) {
            __m512i w16 = _mm512_set1_epi32(w[r]);
            DOT4(left[r], x0, w16);
            DOT4(right[r], x1, w16);
        }
    }
    _Pragma("GCC unroll 12")
    for (int r = 0; r < TILE_VNNI; r++) {
        _mm512_store_si512(out + r * stride, left[r]);
        _mm512_store_si512(out + r * stride + 16, right[r]);
    }
}

/* Four rows of `width` floats, rounded with their scales: quad `quad` of panels of `quads`; and each on its own, four
   columns every `stride` from `own`, its signs turned by `flip`. */
static inline void pack_rows(const float * rows, int64_t width, const float * turns, float * scale, uint8_t * panels,
                             int64_t quads, int64_t quad, int32_t * const * own, int64_t stride, int32_t flip, int32_t * start) {
    __m512 inverse[4], up[4];
    __m512i sum[4];
    for (int i = 0; i < 4; i++) {
        __m512 most = _mm512_setzero_ps();
        for (int64_t j = 0; j < width; j += 16) most = _mm512_max_ps(_mm512_abs_ps(_mm512_load_ps(rows + i * width + j)), most);
        float largest = _mm512_reduce_max_ps(most);
        scale[i] = largest / LEVELS;
        inverse[i] = _mm512_set1_ps(largest > 1e-30f ? LEVELS / largest : 0);
        up[i] = _mm512_set1_ps(128 + turns[i]);
        sum[i] = _mm512_setzero_si512();
    }
    for (int64_t j = 0; j < width; j += 16) {
        __m512i four = _mm512_setzero_si512();
        _Pragma("GCC unroll 4")
        for (int i = 0; i < 4; i++) {
            __m512i q = to_byte(_mm512_fmadd_ps(_mm512_load_ps(rows + i * width + j), inverse[i], up[i]));
            sum[i] = _mm512_add_epi32(sum[i], q);
            four = _mm512_or_si512(four, _mm512_slli_epi32(q, 8 * i));
            if (!own) continue;
            int32_t quads_of_row[4];
            _mm_storeu_si128((__m128i *) quads_of_row, _mm512_cvtepi32_epi8(q));
            for (int c = 0; c < 4; c++) own[i][(j / 4 + c) * stride] = quads_of_row[c] ^ flip;
        }
        _mm512_store_si512(panels + ((j / PANEL) * quads + quad) * 128 + j % PANEL * 4, four);
    }
    if (!start) return;
    for (int i = 0; i < 4; i++) start[i] = -128 * (_mm512_reduce_add_epi32(sum[i]) - 128 * (int32_t) width);
}

/* 4 * quads floats, `most` the largest of them, rounded with one scale: row m of tiles. */
static inline void pack_row(const float * values, float most, int64_t quads, const float * turns, int64_t m, int32_t * tiles,
                            float * scale, int32_t * start) {
    int32_t * out = tiles + m / TILE_VNNI * quads * TILE_VNNI + m % TILE_VNNI;
    __m512 inverse = _mm512_set1_ps(most > 1e-30f ? LEVELS / most : 0), of_row = _mm512_set1_ps(turn(m, 0.6180339887));
    __m512i sum = _mm512_setzero_si512(), zero = _mm512_set1_epi32(128);
    for (int64_t j = 0; j < quads; j += 4) {
        __m512 up = _mm512_add_ps(_mm512_load_ps(turns + 4 * j), of_row);
        up = _mm512_fmadd_ps(_mm512_sub_ps(up, _mm512_floor_ps(up)), _mm512_set1_ps(0.9999f), _mm512_set1_ps(128));
        __m512i q = _mm512_sub_epi32(to_byte(_mm512_fmadd_ps(_mm512_load_ps(values + 4 * j), inverse, up)), zero);
        int32_t four[4];
        sum = _mm512_add_epi32(sum, q);
        _mm_storeu_si128((__m128i *) four, _mm512_cvtepi32_epi8(q));
        for (int c = 0; c < 4; c++) out[(j + c) * TILE_VNNI] = four[c];
    }
    *scale = most / LEVELS;
    *start = -128 * _mm512_reduce_add_epi32(sum);
}
#endif
#endif
