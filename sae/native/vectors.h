/* Vectors of 16 floats, whatever the machine's registers are (GCC and Clang lower them), and what both passes share.
   Sums run in one fixed order, so equal input gives equal bits whatever the number of threads. */
#ifndef GGSCOPE_VECTORS_H
#define GGSCOPE_VECTORS_H
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__GNUC__)
#define HAVE_INT8 1
#endif

#define LANES 16
#define STRIP 32 /* rows of the 8-bit product's register tiles */
#define TILE_VNNI 12 /* latents of one register tile of the 8-bit product (product.h) */
#define TILE_AMX 16
#define UNIT 96 /* latents a thread takes at a time: whole tiles, so that no two threads write to one */

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));

static inline v16 load16(const float * p) { return *(const v16 *) p; }
static inline void store16(float * p, v16 x) { *(v16 *) p = x; }
static inline v16 all16(float x) { return x - (v16){0}; }

static inline float sum16(v16 x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512) x);
#else
    float t[LANES];
    store16(t, x);
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) {
            t[i] += t[i + half];
        }
    }
    return t[0];
#endif
}

/* The last `count` of a row's floats, fewer than a vector, and zeros. */
static inline v16 load_some(const float * p, int64_t count) {
    float t[LANES] = {0};
    memcpy(t, p, count * sizeof *t);
    return load16(t);
}

/* <a, b> */
static inline float dot(const float * a, const float * b, int64_t d) {
    v16 s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    int64_t j = 0;
    for (; j + 4 * LANES <= d; j += 4 * LANES) {
        s0 += load16(a + j) * load16(b + j);
        s1 += load16(a + j + 16) * load16(b + j + 16);
        s2 += load16(a + j + 32) * load16(b + j + 32);
        s3 += load16(a + j + 48) * load16(b + j + 48);
    }
    for (; j + LANES <= d; j += LANES) {
        s0 += load16(a + j) * load16(b + j);
    }
    if (j < d) s0 += load_some(a + j, d - j) * load_some(b + j, d - j);
    return sum16((s0 + s1) + (s2 + s3));
}

/* <a, b0>, <a, b1>, <a, b2>, <a, b3>, each to the bit as `dot` gives it: a is read once */
static inline void dot4(const float * a, const float * const * b, int64_t d, float * out) {
    v16 sum[4][4] = {{{0}}};
    int64_t j = 0;
    for (; j + 4 * LANES <= d; j += 4 * LANES) {
        _Pragma("GCC unroll 4")
        for (int part = 0; part < 4; part++) {
            v16 x = load16(a + j + LANES * part);
            _Pragma("GCC unroll 4")
            for (int r = 0; r < 4; r++) sum[r][part] += x * load16(b[r] + j + LANES * part);
        }
    }
    for (; j + LANES <= d; j += LANES) {
        v16 x = load16(a + j);
        _Pragma("GCC unroll 4")
        for (int r = 0; r < 4; r++) sum[r][0] += x * load16(b[r] + j);
    }
    for (int r = 0; r < 4; r++) {
        if (j < d) sum[r][0] += load_some(a + j, d - j) * load_some(b[r] + j, d - j);
        out[r] = sum16((sum[r][0] + sum[r][1]) + (sum[r][2] + sum[r][3]));
    }
}

/* y += a x */
static inline void add_scaled(float * restrict y, float a, const float * restrict x, int64_t d) {
    v16 a16 = all16(a);
    int64_t j = 0;
    for (; j + LANES <= d; j += LANES) {
        store16(y + j, load16(y + j) + a16 * load16(x + j));
    }
    for (; j < d; j++) {
        y[j] += a * x[j];
    }
}

/* y += a0 x0 + a1 x1 + a2 x2 + a3 x3: y is read and written once */
static inline void add_scaled4(float * restrict y, const float * a, const float * const * x, int64_t d) {
    v16 a0 = all16(a[0]), a1 = all16(a[1]), a2 = all16(a[2]), a3 = all16(a[3]);
    int64_t j = 0;
    for (; j + LANES <= d; j += LANES) {
        v16 left = load16(y + j) + a0 * load16(x[0] + j) + a1 * load16(x[1] + j);
        store16(y + j, left + a2 * load16(x[2] + j) + a3 * load16(x[3] + j));
    }
    for (; j < d; j++) {
        y[j] += a[0] * x[0][j] + a[1] * x[1][j] + a[2] * x[2][j] + a[3] * x[3][j];
    }
}

static inline void prefetch_row(const float * row, int64_t d) {
    for (int64_t j = 0; j < d; j += 16) {
        __builtin_prefetch(row + j);
    }
}

/* A key that orders like the value; NaN counts as the largest, as in torch.topk. */
static inline int32_t order_key(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    int32_t key = bits ^ ((bits >> 31) & INT32_MAX);
    return (bits & INT32_MAX) > 0x7f800000 ? INT32_MAX : key;
}

/* Largest first; among equal values the lower index. */
static inline uint64_t ranked(int32_t key, uint32_t index) {
    return ((uint64_t) ((uint32_t) key ^ 0x80000000u) << 32) | (uint32_t) ~index;
}
static inline int32_t ranked_index(uint64_t item) { return (int32_t) ~(uint32_t) item; }
static inline int32_t ranked_key(uint64_t item) { return (int32_t) ((uint32_t) (item >> 32) ^ 0x80000000u); }
/* The value back from the key; NaN stays NaN. */
static inline float ranked_value(uint64_t item) {
    int32_t key = ranked_key(item), bits = key ^ ((key >> 31) & INT32_MAX);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Reorder so that the k largest of the items come first; 0 < k <= count. */
void ggscope_take_largest(uint64_t * items, int64_t count, int64_t k);

/* One training step; every pointer is to plain arrays in row-major order. N rows, D width, F latents, K per row, P
   pairs of a row and a latent that is active on it: those of row n from first_N1[n] to first_N1[n + 1]. */
struct step {
    int64_t N, D, F, K, threads;
    int64_t pool_capacity;
    int64_t tile; /* TILE_VNNI or TILE_AMX, which say how q_tiles lies */
    int64_t C; /* width of named_NC */
    int64_t M, auxk_k; /* AuxK in 8 bits: dead latents, and how many of them a row takes */
    /* the model, and Adam's first and second moments */
    float *W_enc_FD, *W_enc_m, *W_enc_v, *b_enc_F, *b_enc_m, *b_enc_v;
    float *W_dec_FD, *W_dec_m, *W_dec_v, *b_dec_D, *b_dec_m, *b_dec_v;
    float beta1, beta2, eps, step_size, root_correction; /* lr / (1 - beta1^t), sqrt(1 - beta2^t) */
    float least; /* BatchTopK: pre-activations below it are not looked at */
    float auxk_weight; /* of L_aux in the loss */
    /* copies of W_enc that choose the latents: bfloat16 (F, D), or 8 bits in tiles; NULL where not in use */
    uint16_t * bf16_FD;
    int8_t * q_tiles;         /* as product.h says, zeros beyond F and D */
    float *q_scale_F, *q_norm_F; /* W_enc[i] * balance ~ q_scale[i] * q[i]; norm of W_enc[i] * balance */
    float * q_shift_F;        /* <W_enc[i] * balance, dither> */
    int32_t * q_offset_F;     /* -128 sum(q): the rows are stored with 128 added */
    const float * balance_D;  /* input dimensions are divided by it, those of W_enc multiplied */
    const float * dither_D;   /* added to a row before it is rounded; zeros beyond D up to a multiple of 16 */
    /* the batch */
    const float * u_ND;
    const int32_t * named_NC; /* latents of every row whose exact values decide, where a matrix product named them */
    float *centred_ND, *grad_ND; /* u - b_dec, dL/du_hat */
    int64_t * first_N1;
    int32_t *row_P, *idx_P;
    float *vals_P, *grad_vals_P;
    double * error_N; /* ||u - u_hat||^2 */
    int64_t * candidates_N; /* latents whose exact value was computed */
    /* BatchTopK: the pre-activations of the batch from `least` on, row by row but the rows in no order; NULL: TopK */
    uint64_t * pool;
    int64_t *pool_used, *pool_at_N, *pool_count_N;
    /* sums over the rows of a latent */
    int64_t * fired_F;
    int32_t *start_F1, *pair_P;
    int32_t * sorted_row_P; /* sums.c: the pairs as pair_P has them; NULL where the sums go latent by latent */
    float *sorted_val_P, *sorted_grad_P, *sum_enc_FD, *sum_dec_FD;
    float * partial_D; /* (ceil(N / UNIT) + ceil(F / UNIT), D): parts of db_dec */
    /* gradients that come from elsewhere (AuxK): the row of latent i is extra_of_F[i], -1: none; NULL: none at all */
    const int32_t * extra_of_F;
    float *extra_enc_MD, *extra_dec_MD, *extra_bias_M;
    /* AuxK in 8 bits (auxk.c); NULL: not, or no latent is dead */
    void * auxk_memory; /* at its start the dead latents' pre-activations */
    const int32_t * dead_M;
    double * auxk_loss;
};

/* Rows of its arrays that are by latent: whole tiles. */
static inline int64_t auxk_latents(const struct step * s) { return (s->M + TILE_VNNI - 1) / TILE_VNNI * TILE_VNNI; }

#ifdef HAVE_INT8
/* GCC's intrinsic copies the accumulators to the stack and back in loops: half the speed */
#define DOT4(acc, x, w) __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w))

/* To the nearest; of two as near the larger. */
static inline __m256i to_bf16_16(__m512 x) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000)), 16));
}
#endif

#define AHEAD 4 /* rows of W_enc fetched before they are needed: they come from L3 or memory */

/* One row whose candidates are known, `items` as above: the K largest. `spare`: room for as many items. */
void ggscope_choose(const struct step * s, int64_t row, const uint64_t * items, int64_t count, uint64_t * spare);
/* The decoder's rows of a row whose latents are chosen come into the cache. */
void ggscope_fetch_decoder(const struct step * s, int64_t row);
/* Reconstruction, residual and its gradients of a row whose latents are chosen. */
void ggscope_reconstruct(const struct step * s, int64_t row);
/* dW_enc and dW_dec into sum_enc_FD and sum_dec_FD, but for what comes from elsewhere. 0: done, -1: no memory. */
int ggscope_sums(const struct step * s);
/* Refresh the copies of W_enc[i] that are in use; `scratch`: D floats. */
void ggscope_refresh(const struct step * s, int64_t latent, float * scratch);

#endif
