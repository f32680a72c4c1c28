/* pre = W u + b with the matrix as it is stored, a row u at a time. One stream of memory for each thread: chunks handed
   out as they come cost a tenth. ggml's products are the general path. */
#include "bytes.h"

#if HAVE_PRODUCTS
#define EIGHTS 8 /* sums of eight values; with registers of sixteen one core of a Zen 4 reads a tenth less */

static inline __m256 floats_at(int kind, const uint8_t * w, int64_t j) {
    if (kind == KIND_F32) return _mm256_loadu_ps((const float *) w + j);
    __m128i halves = _mm_loadu_si128((const void *) (w + 2 * j));
    if (kind == KIND_F16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

static inline float sum_of_eight(__m256 x) {
    float each[8], total = 0;
    _mm256_storeu_ps(each, x);
    for (int i = 0; i < 8; i++) total += each[i];
    return total;
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
    float total = sum_of_eight(sum[0]);
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
/* A block's products with a row's, in eight sums: of the weights with ADDED_8 added, as unsigned bytes, where there are
   dot products of four. */
#define ADDED_8 (HAVE_FOURS ? 128.0f : 0.0f)

static inline __m256 block_sums(const uint8_t * w, const int8_t * q) {
    __m256i bytes = bytes_at(w + 2), zero = _mm256_setzero_si256();
#if HAVE_FOURS
    return _mm256_cvtepi32_ps(FOURS(zero, _mm256_xor_si256(bytes, _mm256_set1_epi8((char) 0x80)), bytes_at(q)));
#else
    return _mm256_cvtepi32_ps(FOURS(zero, _mm256_abs_epi8(bytes), _mm256_sign_epi8(bytes_at(q), bytes)));
#endif
}

static inline __m256 copies(__m128 scales, int i) {
    __m128i place = _mm_set1_epi32(0x03020100 + 0x04040404 * i);
    return _mm256_broadcastss_ps(_mm_castsi128_ps(_mm_shuffle_epi8(_mm_castps_si128(scales), place)));
}

static float product(const uint8_t * w, int64_t blocks, const int8_t * q, const float * scale, const float * excess) {
    __m256 sum[4];
    __m128 much = _mm_setzero_ps();
    for (int i = 0; i < 4; i++) sum[i] = _mm256_setzero_ps();
    int64_t b = 0;
    for (; b + 4 <= blocks; b += 4, w += 4 * BLOCK_BYTES, q += 4 * QK) {
        FETCH(w, 0);
        FETCH(w, 64);
        if (b & 4) FETCH(w, 128);
        uint16_t h[4];
        for (int i = 0; i < 4; i++) memcpy(h + i, w + i * BLOCK_BYTES, 2);
        uint64_t halves = (uint64_t) h[3] << 48 | (uint64_t) h[2] << 32 | (uint64_t) h[1] << 16 | h[0];
        __m128 scales = _mm_mul_ps(_mm_cvtph_ps(_mm_cvtsi64_si128((long long) halves)), _mm_loadu_ps(scale + b));
        for (int i = 0; i < 4; i++) {
            sum[i] = _mm256_fmadd_ps(block_sums(w + i * BLOCK_BYTES, q + i * QK), copies(scales, i), sum[i]);
        }
        much = _mm_fmadd_ps(scales, _mm_loadu_ps(excess + b), much);
    }
    float each[4];
    _mm_storeu_ps(each, much);
    float least = (each[0] + each[1]) + (each[2] + each[3]);
    for (; b < blocks; b++, w += BLOCK_BYTES, q += QK) {
        float both = half_at(w) * scale[b];
        sum[0] = _mm256_fmadd_ps(block_sums(w, q), _mm256_set1_ps(both), sum[0]);
        least += both * excess[b];
    }
    return sum_of_eight(_mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3]))) - least;
}

/* Where the parts of a quantised row lie. */
static inline float * scale_of(const void * input) { return (float *) input; }
static inline float * excess_of(const void * input, int64_t D) { return scale_of(input) + D / QK; }
static inline int8_t * whole_of(const void * input, int64_t D) { return (int8_t *) (excess_of(input, D) + D / QK); }
#endif

int ggscope_has_affine(int kind, int64_t F) {
    if (kind == KIND_Q4_0) return HAVE_PRODUCTS && F % 8 == 0;
    return HAVE_PRODUCTS && (kind == KIND_F32 || kind == KIND_F16 || kind == KIND_BF16 || kind == KIND_Q8_0);
}

int64_t ggscope_input_bytes(int kind, int64_t D) {
    return kind == KIND_Q8_0 || kind == KIND_Q4_0 ? D + 8 * (D / QK) : 4 * D;
}

void ggscope_round_input(int kind, const float * u_D, int64_t D, void * input) {
#if HAVE_PRODUCTS
    if (kind == KIND_Q8_0 || kind == KIND_Q4_0) {
        float added = kind == KIND_Q8_0 ? ADDED_8 : ADDED_4;
        quantise(u_D, D, added, whole_of(input, D), scale_of(input), excess_of(input, D));
        return;
    }
    rounded(kind, u_D, D, input);
#else
    (void) kind, (void) u_D, (void) D, (void) input;
#endif
}

void ggscope_products(
    int kind, const uint8_t * W, int64_t D, const void * input, const float * b_F, int64_t first, int64_t last,
    float * pre) {
#if HAVE_PRODUCTS
    const int8_t * q = whole_of(input, D);
    const float * scale = scale_of(input);
    const float * excess = excess_of(input, D);
    int64_t blocks = D / QK;
    if (kind == KIND_Q8_0) {
        for (int64_t f = first; f < last; f++) {
            *pre++ = product(W + f * blocks * BLOCK_BYTES, blocks, q, scale, excess) + b_F[f];
        }
    }
    if (kind == KIND_Q4_0) {
        for (int64_t f = first; f < last; f += 8, pre += 8) {
            __m256 sums = eight_rows(W + f / 8 * blocks * EIGHT_BYTES, blocks, q, scale, excess, NULL, NULL);
            _mm256_storeu_ps(pre, _mm256_add_ps(sums, _mm256_loadu_ps(b_F + f)));
        }
    }
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
