/* pre = W u + b with the matrix as it is stored, a row u at a time. One stream of memory for each thread: chunks handed
   out as they come cost a tenth. ggml's products are the general path. */
#include "reading.h"

/* A Xeon with AMX gains a tenth to a sixth where a product's matrix is fetched this many bytes ahead: its own
   prefetching stops at every page. Zen 4 loses as much. */
#if defined(__AMX_TILE__)
#define FETCH(w, offset) __builtin_prefetch((const char *) (w) + 1536 + (offset))
#else
#define FETCH(w, offset) (void) (w)
#endif

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && defined(__GNUC__)
#define HAVE_FLOATS 1
#define EIGHTS 8 /* sums of eight values; with registers of sixteen one core of a Zen 4 reads a tenth less */

static inline __m256 floats_at(int kind, const uint8_t * w, int64_t j) {
    if (kind == KIND_F32) return _mm256_loadu_ps((const float *) w + j);
    __m128i halves = _mm_loadu_si128((const void *) (w + 2 * j));
    if (kind == KIND_F16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

/* <w, u> */
static inline __attribute__((always_inline)) float float_product(int kind, const uint8_t * w, const float * u, int64_t D) {
    __m256 sum[EIGHTS];
    for (int i = 0; i < EIGHTS; i++) sum[i] = _mm256_setzero_ps();
    int64_t j = 0;
    int64_t bytes = kind == KIND_F32 ? 4 : 2;
    for (; j + 8 * EIGHTS <= D; j += 8 * EIGHTS) {
        for (int64_t line = 0; line < bytes; line++) FETCH(w, bytes * j + 64 * line);
        for (int i = 0; i < EIGHTS; i++) {
            sum[i] = _mm256_fmadd_ps(floats_at(kind, w, j + 8 * i), _mm256_loadu_ps(u + j + 8 * i), sum[i]);
        }
    }
    for (; j + 8 <= D; j += 8) sum[0] = _mm256_fmadd_ps(floats_at(kind, w, j), _mm256_loadu_ps(u + j), sum[0]);
    for (int half = EIGHTS / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) sum[i] = _mm256_add_ps(sum[i], sum[i + half]);
    }
    float each[8], total = 0;
    _mm256_storeu_ps(each, sum[0]);
    for (int i = 0; i < 8; i++) total += each[i];
    for (; j < D; j++) {
        float value;
        if (kind == KIND_F32) {
            memcpy(&value, w + 4 * j, sizeof value);
        } else if (kind == KIND_F16) {
            value = half_at(w + 2 * j);
        } else {
            value = bfloat_at(w + 2 * j);
        }
        total += value * u[j];
    }
    return total;
}

/* u as ggml's product with this type takes it */
static void rounded(int kind, const float * u, int64_t D, float * out) {
    for (int64_t j = 0; j < D; j++) {
        if (kind == KIND_F16) {
            out[j] = _cvtsh_ss(_cvtss_sh(u[j], 0));
        } else if (kind == KIND_BF16) {
            uint32_t bits;
            memcpy(&bits, u + j, sizeof bits);
            bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
            memcpy(out + j, &bits, sizeof bits);
        } else {
            out[j] = u[j];
        }
    }
}

#define DEFINE_FLOATS(NAME, KIND, BYTES)                                                                               \
    static void NAME(                                                                                                  \
        const uint8_t * W, int64_t D, const float * u, const float * b_F, int64_t first, int64_t last, float * pre) {  \
        for (int64_t f = first; f < last; f++) *pre++ = float_product(KIND, W + f * D * BYTES, u, D) + b_F[f];         \
    }

DEFINE_FLOATS(floats_f32, KIND_F32, 4)
DEFINE_FLOATS(floats_f16, KIND_F16, 2)
DEFINE_FLOATS(floats_bf16, KIND_BF16, 2)
#else
#define HAVE_FLOATS 0
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__F16C__) && defined(__GNUC__)
#define HAVE_Q8_0 1

/* ggml's rounding of a row: blocks of 32, scale max|u| / 127 as F16, the nearest whole numbers. `offset_D4` are the sums
   of four neighbours times -128: the weights are multiplied with 128 added, as unsigned bytes. */
static void quantise(const float * u, int64_t D, int8_t * q, float * scale, int32_t * offset) {
    for (int64_t b = 0; b < D / QK; b++, u += QK, q += QK, offset += QK / 4) {
        __m512 low = _mm512_loadu_ps(u), high = _mm512_loadu_ps(u + 16);
        float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
        scale[b] = _cvtsh_ss(_cvtss_sh(most / 127.0f, 0));
        __m512 inverse = _mm512_set1_ps(most != 0 ? 127.0f / most : 0);
        __m128i first = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(low, inverse)));
        __m128i second = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(high, inverse)));
        __m256i whole = _mm256_set_m128i(second, first);
        _mm256_storeu_si256((void *) q, whole);
        __m256i fours = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), whole);
        _mm256_storeu_si256((void *) offset, _mm256_mullo_epi32(fours, _mm256_set1_epi32(-128)));
    }
}

static inline __m512 two_blocks(const uint8_t * w, const int8_t * q, const int32_t * offset) {
    __m512i both = _mm512_inserti64x4(
        _mm512_castsi256_si512(_mm256_loadu_si256((const void *) (w + 2))),
        _mm256_loadu_si256((const void *) (w + BLOCK_BYTES + 2)), 1);
    both = _mm512_xor_si512(both, _mm512_set1_epi8((char) 0x80));
    return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_loadu_si512(offset), both, _mm512_loadu_si512(q)));
}

static float product(const uint8_t * w, int64_t blocks, const int8_t * q, const float * scale, const int32_t * offset) {
    const __m512i first = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(2));
    __m512 sum0 = _mm512_setzero_ps(), sum1 = _mm512_setzero_ps();
    int64_t b = 0;
    for (; b + 4 <= blocks; b += 4, w += 4 * BLOCK_BYTES) {
        FETCH(w, 0);
        FETCH(w, 64);
        if (b & 4) FETCH(w, 128);
        uint16_t h[4];
        for (int i = 0; i < 4; i++) memcpy(h + i, w + i * BLOCK_BYTES, 2);
        uint64_t halves = (uint64_t) h[3] << 48 | (uint64_t) h[2] << 32 | (uint64_t) h[1] << 16 | h[0];
        __m128 scales = _mm_mul_ps(_mm_cvtph_ps(_mm_cvtsi64_si128((long long) halves)), _mm_loadu_ps(scale + b));
        __m512 wide = _mm512_castps128_ps512(scales);
        sum0 = _mm512_fmadd_ps(two_blocks(w, q + QK * b, offset + 8 * b), _mm512_permutexvar_ps(first, wide), sum0);
        sum1 = _mm512_fmadd_ps(
            two_blocks(w + 2 * BLOCK_BYTES, q + QK * (b + 2), offset + 8 * (b + 2)),
            _mm512_permutexvar_ps(second, wide), sum1);
    }
    float total = _mm512_reduce_add_ps(_mm512_add_ps(sum0, sum1));
    for (; b < blocks; b++, w += BLOCK_BYTES) {
        const int8_t * signed_w = (const int8_t *) w + 2; /* GCC 12 takes a cast of each byte for no cast at all */
        int32_t whole = 0;
        for (int j = 0; j < QK; j++) whole += signed_w[j] * q[QK * b + j];
        total += (float) whole * (half_at(w) * scale[b]);
    }
    return total;
}

/* Q4_0 as ggml's CPU code lays it out anew: of eight rows together, for each block the eight F16 scales, then 8 bytes
   of each row, then the other 8 of each. The low halves are values j.. of the block, the high ones j + 16.., as signed
   four-bit numbers. `sums` are -8 times the sum of a block of u: the weights are multiplied with 8 added. */
#define EIGHT_BYTES 144

static inline __m512i eight_rows(__m512i sum, __m512i w, const int8_t * q) {
    const __m512i low = _mm512_set1_epi8(0x0f);
    long long near, far;
    memcpy(&near, q, 8);
    memcpy(&far, q + 16, 8);
    w = _mm512_xor_si512(w, _mm512_set1_epi8((char) 0x88));
    sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(w, low), _mm512_set1_epi64(near));
    return _mm512_dpbusd_epi32(sum, _mm512_and_si512(_mm512_srli_epi16(w, 4), low), _mm512_set1_epi64(far));
}

static void product8(
    const uint8_t * w, int64_t blocks, const int8_t * q, const float * scale, const int32_t * sums, float * out) {
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    __m512 total = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks; b++, w += EIGHT_BYTES, q += QK) {
        FETCH(w, 0);
        FETCH(w, 64);
        if ((b & 3) == 0) FETCH(w, 128);
        __m512i sum = _mm512_maskz_set1_epi32(0x5555, sums[b]);
        sum = eight_rows(sum, _mm512_loadu_si512(w + 16), q);
        sum = eight_rows(sum, _mm512_loadu_si512(w + 80), q + 8);
        __m256 scales = _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128((const void *) w)), _mm256_set1_ps(scale[b]));
        __m512 both = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(scales));
        total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), both, total);
    }
    __m512 pairs = _mm512_add_ps(total, _mm512_permute_ps(total, 0xb1));
    __m512i even = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 14, 12, 10, 8, 6, 4, 2, 0);
    _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_permutexvar_ps(even, pairs)));
}

/* Where the parts of a quantised row lie. */
static inline int32_t * offset_of(const void * input) { return (int32_t *) input; }
static inline float * scale_of(const void * input, int64_t D) { return (float *) (offset_of(input) + D / 4); }
static inline int8_t * whole_of(const void * input, int64_t D) { return (int8_t *) (scale_of(input, D) + D / QK); }
#else
#define HAVE_Q8_0 0
#endif

int ggscope_has_affine(int kind, int64_t F) {
    if (kind == KIND_Q8_0 || (kind == KIND_Q4_0 && F % 8 == 0)) return HAVE_Q8_0;
    return HAVE_FLOATS && (kind == KIND_F32 || kind == KIND_F16 || kind == KIND_BF16);
}

int64_t ggscope_input_bytes(int kind, int64_t D) {
    return kind == KIND_Q8_0 || kind == KIND_Q4_0 ? D + 4 * (D / 4) + 4 * (D / QK) : 4 * D;
}

void ggscope_round_input(int kind, const float * u_D, int64_t D, void * input) {
#if HAVE_Q8_0
    if (kind == KIND_Q8_0 || kind == KIND_Q4_0) {
        int32_t * offset = offset_of(input);
        quantise(u_D, D, whole_of(input, D), scale_of(input, D), offset);
        for (int64_t b = 0; kind == KIND_Q4_0 && b < D / QK; b++) {
            int32_t sum = 0;
            for (int j = 0; j < QK / 4; j++) sum += offset[b * (QK / 4) + j];
            offset[b] = sum / 16; /* -8 instead of -128 times the block's sum */
        }
        return;
    }
#endif
#if HAVE_FLOATS
    rounded(kind, u_D, D, input);
#else
    (void) kind, (void) u_D, (void) D, (void) input;
#endif
}

void ggscope_products(
    int kind, const uint8_t * W, int64_t D, const void * input, const float * b_F, int64_t first, int64_t last,
    float * pre) {
#if HAVE_Q8_0
    const int8_t * q = whole_of(input, D);
    const float * scale = scale_of(input, D);
    const int32_t * offset = offset_of(input);
    int64_t blocks = D / QK;
    if (kind == KIND_Q8_0) {
        for (int64_t f = first; f < last; f++) {
            *pre++ = product(W + f * blocks * BLOCK_BYTES, blocks, q, scale, offset) + b_F[f];
        }
    }
    if (kind == KIND_Q4_0) {
        for (int64_t f = first; f < last; f += 8, pre += 8) {
            product8(W + f / 8 * blocks * EIGHT_BYTES, blocks, q, scale, offset, pre);
            for (int i = 0; i < 8; i++) pre[i] += b_F[f + i];
        }
    }
#endif
#if HAVE_FLOATS
    if (kind == KIND_F32) floats_f32(W, D, input, b_F, first, last, pre);
    if (kind == KIND_F16) floats_f16(W, D, input, b_F, first, last, pre);
    if (kind == KIND_BF16) floats_bf16(W, D, input, b_F, first, last, pre);
#else
    (void) kind, (void) W, (void) D, (void) input, (void) b_F, (void) first, (void) last, (void) pre;
#endif
}

/* pre_F; rows of Q8_0 and Q4_0 are multiples of 32 wide. 0: done, -1: no memory, -2: not here. */
int ggscope_affine(int kind, const uint8_t * W, int64_t F, int64_t D, const float * u_D, const float * b_F,
                   float * pre_F, int64_t threads) {
    if (!ggscope_has_affine(kind, F)) return -2;
    void * input = malloc((size_t) ggscope_input_bytes(kind, D));
    if (!input) return -1;
    ggscope_round_input(kind, u_D, D, input);
    #pragma omp parallel for num_threads((int) threads) schedule(static)
    for (int64_t p = 0; p < threads; p++) {
        int64_t first = ggscope_part(F, p, threads), last = ggscope_part(F, p + 1, threads);
        ggscope_products(kind, W, D, input, b_F, first, last, pre_F + first);
    }
    free(input);
    return 0;
}
