/* What reading one row costs beside the bytes of its encoder, in C: the product with the matrix as it is stored, the k
   largest, the error of the reconstruction. The blocks of Q8_0 are ggml's: F16 scale, 32 signed bytes. Every function
   has a general path (ggml, numpy) that it is tested against. */
#include "vectors.h"

#define QK 32
#define BLOCK_BYTES 34

enum kind { KIND_F32 = 0, KIND_F16 = 1, KIND_Q8_0 = 8, KIND_BF16 = 30 }; /* enum ggml_type */

int ggscope_topk_f32(const float * pre_NF, int64_t N, int64_t F, int64_t K, int32_t * idx_NK, int64_t threads);

static inline float half_at(const void * p) {
    uint16_t bits;
    memcpy(&bits, p, sizeof bits);
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#else
    uint32_t sign = (uint32_t) (bits & 0x8000) << 16, rest = bits & 0x7fff, out;
    if (rest >= 0x7c00) {
        out = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    } else if (rest >= 0x0400) {
        out = sign | ((rest << 13) + 0x38000000);
    } else {
        float small = (float) rest * 0x1p-24f;
        memcpy(&out, &small, sizeof out);
        out |= sign;
    }
    float value;
    memcpy(&value, &out, sizeof value);
    return value;
#endif
}

static inline float bfloat_at(const uint8_t * p) {
    uint32_t bits = (uint32_t) (p[0] | p[1] << 8) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* ---- pre = W u + b ----
   One stream of memory for each thread: chunks handed out as they come cost a tenth. */

#if defined(__AVX512F__) && defined(__F16C__) && defined(__GNUC__)
#define HAVE_FLOATS 1

static inline __m512 floats_at(int kind, const uint8_t * w, int64_t j) {
    if (kind == KIND_F32) return _mm512_loadu_ps((const float *) w + j);
    __m256i halves = _mm256_loadu_si256((const void *) (w + 2 * j));
    if (kind == KIND_F16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* <w, u> */
static inline __attribute__((always_inline)) float float_product(int kind, const uint8_t * w, const float * u, int64_t D) {
    __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t j = 0;
    for (; j + 64 <= D; j += 64) {
        for (int i = 0; i < 4; i++) {
            sum[i] = _mm512_fmadd_ps(floats_at(kind, w, j + 16 * i), _mm512_loadu_ps(u + j + 16 * i), sum[i]);
        }
    }
    for (; j + 16 <= D; j += 16) sum[0] = _mm512_fmadd_ps(floats_at(kind, w, j), _mm512_loadu_ps(u + j), sum[0]);
    float total = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
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

#define DEFINE_AFFINE(NAME, KIND, BYTES)                                                                               \
    static void NAME(const uint8_t * W, int64_t F, int64_t D, const float * u, const float * b_F, float * pre_F,       \
                     int64_t threads) {                                                                                \
        (void) threads; /* unused where there is no OpenMP */                                                          \
        _Pragma("omp parallel for num_threads((int) threads) schedule(static)")                                        \
        for (int64_t f = 0; f < F; f++) pre_F[f] = float_product(KIND, W + f * D * BYTES, u, D) + b_F[f];              \
    }

DEFINE_AFFINE(affine_f32, KIND_F32, 4)
DEFINE_AFFINE(affine_f16, KIND_F16, 2)
DEFINE_AFFINE(affine_bf16, KIND_BF16, 2)
#else
#define HAVE_FLOATS 0
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__F16C__) && defined(__GNUC__)
#define HAVE_Q8_0 1

/* ggml's rounding of a row: blocks of 32, scale max|u| / 127 as F16, the nearest whole numbers. `offset_D4` are the sums
   of four neighbours times -128: the weights are multiplied with 128 added, as unsigned bytes. */
static void quantise(const float * u, int64_t D, int8_t * q, float * scale, int32_t * offset) {
    for (int64_t b = 0; b < D / QK; b++) {
        float most = 0;
        for (int j = 0; j < QK; j++) {
            float size = fabsf(u[b * QK + j]);
            most = size > most ? size : most;
        }
        scale[b] = _cvtsh_ss(_cvtss_sh(most / 127.0f, 0));
        float inverse = most != 0 ? 127.0f / most : 0;
        for (int j = 0; j < QK; j++) q[b * QK + j] = (int8_t) rintf(u[b * QK + j] * inverse);
    }
    for (int64_t j = 0; j < D / 4; j++) {
        offset[j] = -128 * (q[4 * j] + q[4 * j + 1] + q[4 * j + 2] + q[4 * j + 3]);
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

static int affine_q8_0(
    const uint8_t * W, int64_t F, int64_t D, const float * u_D, const float * b_F, float * pre_F, int64_t threads) {
    int64_t blocks = D / QK;
    char * room = malloc((size_t) D + 4 * (size_t) (D / 4) + 4 * (size_t) blocks);
    if (!room) return -1;
    int32_t * offset = (int32_t *) room;
    float * scale = (float *) (offset + D / 4);
    int8_t * q = (int8_t *) (scale + blocks);
    quantise(u_D, D, q, scale, offset);
    #pragma omp parallel for num_threads((int) threads) schedule(static)
    for (int64_t f = 0; f < F; f++) {
        pre_F[f] = product(W + f * blocks * BLOCK_BYTES, blocks, q, scale, offset) + b_F[f];
    }
    free(room);
    return 0;
}
#else
#define HAVE_Q8_0 0
#endif

/* Whether there is a product with this type here. */
int ggscope_has_affine(int kind) {
    if (kind == KIND_Q8_0) return HAVE_Q8_0;
    return HAVE_FLOATS && (kind == KIND_F32 || kind == KIND_F16 || kind == KIND_BF16);
}

/* pre_F; rows of Q8_0 are multiples of 32 wide. 0: done, -1: no memory, -2: not here. */
int ggscope_affine(int kind, const uint8_t * W, int64_t F, int64_t D, const float * u_D, const float * b_F,
                   float * pre_F, int64_t threads) {
    if (!ggscope_has_affine(kind)) return -2;
#if HAVE_Q8_0
    if (kind == KIND_Q8_0) return affine_q8_0(W, F, D, u_D, b_F, pre_F, threads);
#endif
#if HAVE_FLOATS
    float * u = malloc((size_t) D * sizeof *u);
    if (!u) return -1;
    rounded(kind, u_D, D, u);
    if (kind == KIND_F32) affine_f32(W, F, D, u, b_F, pre_F, threads);
    if (kind == KIND_F16) affine_f16(W, F, D, u, b_F, pre_F, threads);
    if (kind == KIND_BF16) affine_bf16(W, F, D, u, b_F, pre_F, threads);
    free(u);
    return 0;
#else
    (void) W, (void) F, (void) D, (void) u_D, (void) b_F, (void) pre_F, (void) threads;
    return -2;
#endif
}

/* ---- the k largest above zero, sorted ---- */

static int larger_first(const void * a, const void * b) {
    uint64_t x = *(const uint64_t *) a, y = *(const uint64_t *) b;
    return (x < y) - (x > y);
}

/* idx_NK, vals_NK: by value, then by latent; slots without a value above zero are 0. 0: done, -1: no memory. */
int ggscope_largest(
    const float * pre_NF, int64_t N, int64_t F, int64_t K, int32_t * idx_NK, float * vals_NK, int64_t threads) {
    uint64_t * items = malloc((size_t) K * sizeof *items);
    int code = items ? ggscope_topk_f32(pre_NF, N, F, K, idx_NK, threads) : -1;
    for (int64_t n = 0; n < N && code == 0; n++) {
        const float * pre_F = pre_NF + n * F;
        int32_t * idx_K = idx_NK + n * K;
        for (int64_t j = 0; j < K; j++) items[j] = ranked(order_key(pre_F[idx_K[j]]), (uint32_t) idx_K[j]);
        qsort(items, (size_t) K, sizeof *items, larger_first);
        for (int64_t j = 0; j < K; j++) {
            int32_t latent = ranked_index(items[j]);
            int fires = pre_F[latent] > 0;
            idx_K[j] = fires ? latent : 0;
            vals_NK[n * K + j] = fires ? pre_F[latent] : 0;
        }
    }
    free(items);
    return code;
}

/* ---- ||x - sum_k a_k W_dec[k] - b_dec||^2 ---- */

static void add_row(int kind, const uint8_t * row, float a, float * y, int64_t D) {
    if (kind == KIND_F32) {
        add_scaled(y, a, (const float *) row, D);
    } else if (kind == KIND_F16) {
        for (int64_t j = 0; j < D; j++) y[j] += a * half_at(row + 2 * j);
    } else if (kind == KIND_BF16) {
        for (int64_t j = 0; j < D; j++) y[j] += a * bfloat_at(row + 2 * j);
    } else {
        for (int64_t b = 0; b < D / QK; b++, row += BLOCK_BYTES) {
            float scale = half_at(row);
            const int8_t * q = (const int8_t *) row + 2;
            for (int j = 0; j < QK; j++) y[b * QK + j] += a * (scale * q[j]);
        }
    }
}

/* error_N. 0: done, -1: no memory, -2: a type it does not know. `row_bytes`: of a row of W_dec. */
int ggscope_squared_error(
    int kind, const uint8_t * W_dec, int64_t row_bytes, int64_t D, const float * b_dec_D, const float * x_ND,
    const int32_t * idx_NK, const float * vals_NK, int64_t N, int64_t K, double * error_N) {
    if (kind != KIND_F32 && kind != KIND_F16 && kind != KIND_BF16 && kind != KIND_Q8_0) return -2;
    float * x_hat = malloc((size_t) D * sizeof *x_hat);
    if (!x_hat) return -1;
    for (int64_t n = 0; n < N; n++) {
        const int32_t * idx_K = idx_NK + n * K;
        const float * vals_K = vals_NK + n * K;
        for (int64_t k = 0; k < K && vals_K[k] > 0; k++) { /* they come from memory: ask for all before the first is used */
            const uint8_t * row = W_dec + idx_K[k] * row_bytes;
            for (int64_t j = 0; j < row_bytes; j += 64) __builtin_prefetch(row + j);
        }
        memset(x_hat, 0, (size_t) D * sizeof *x_hat);
        for (int64_t k = 0; k < K && vals_K[k] > 0; k++) {
            add_row(kind, W_dec + idx_K[k] * row_bytes, vals_K[k], x_hat, D);
        }
        double sum = 0;
        for (int64_t j = 0; j < D; j++) {
            double gap = (double) x_ND[n * D + j] - (double) (x_hat[j] + b_dec_D[j]);
            sum += gap * gap;
        }
        error_N[n] = sum;
    }
    free(x_hat);
    return 0;
}
