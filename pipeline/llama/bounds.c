/* Upper bounds on pre-activations from four bits a weight: which latents of a row need their exact product at all.

   W_enc is rounded in blocks of 32 to s (q - 8 - v): s the block's step, q a whole number from 0 to 15, v the dither of
   the input dimension, drawn evenly from [-1/2, 1/2) once for all rows. What the rounding leaves of a weight is then
   evenly spread over a step whatever the weight is, and independent from dimension to dimension. So

       P(<w, u> > <its rounding, u> + c |s u|) <= exp(-6 c^2),   |s u|^2 = sum_j (s_j u_j)^2

   (a sum of independent bounded terms; each of width s_j u_j, variance a twelfth of its square and no heavier tails than
   a Gaussian of that variance). At c = 2.15 it is 9e-13. What the sums themselves round, those of the exact product too,
   is at most that of equal terms of which each rounds the same way: it grows as D sqrt(D), and `beyond` has that more.
   The dither costs a number a block: <q - 8 - v, u> = <q, u> - <8 + v, u>.

   The row itself is rounded to blocks of 8-bit integers. Q8_0's product does the same; for the others what is left of
   it, r, adds at most |w| |r|. */
#include "bytes.h"

static inline float beyond(int64_t D) { return 2.15f + 3e-8f * (float) D * sqrtf((float) D); }

/* Numbers smaller than this have squares that float32 loses. */
#define SQUARELESS 1.1e-19

/* Of Q8_0's scale: the product's sums are of whole numbers of up to 8 bits with 128 added, whatever the weights are, and
   round accordingly. The scales that quantising gives are smaller than a step's eighteenth, or 0. */
#define LEAST_STEPS 16

int64_t ggscope_bounds_input_bytes(int64_t D) { return D + 12 * (D / QK) + 4; }

int ggscope_has_bounds(int kind, int64_t F, int64_t D) {
    return ggscope_has_affine(kind, F) && kind != KIND_Q4_0 && F % 8 == 0 && D % QK == 0;
}

int64_t ggscope_bounds_bytes(int64_t F, int64_t D) { return F / 8 * (D / QK) * EIGHT_BYTES; }

#if HAVE_PRODUCTS
/* Where the parts of a rounded row lie. */
static inline float * scale_of(const void * input) { return (float *) input; }
static inline float * shift_of(const void * input, int64_t D) { return scale_of(input) + D / QK; }
static inline float * square_of(const void * input, int64_t D) { return shift_of(input, D) + D / QK; }
static inline float * rest_of(const void * input, int64_t D) { return square_of(input, D) + D / QK; }
static inline int8_t * whole_of(const void * input, int64_t D) { return (int8_t *) (rest_of(input, D) + 1); }

/* Block b of a row of W_enc. */
static void weights_of(int kind, const uint8_t * row, int64_t b, float * w) {
    const uint8_t * block = row + bytes_before(kind, b * QK);
    if (kind == KIND_F32) memcpy(w, block, QK * sizeof *w);
    for (int j = 0; j < QK; j++) {
        if (kind == KIND_F16) w[j] = half_at(block + 2 * j);
        if (kind == KIND_BF16) w[j] = bfloat_at(block + 2 * j);
        if (kind == KIND_Q8_0) w[j] = half_at(block) * (float) (int8_t) block[2 + j];
    }
}

/* A block's step, `least` or more, and its whole numbers. */
static uint16_t round_block(const float * w, float least, const float * dither, uint8_t * q, float * norm2) {
    float largest = 0, sum = 0;
    for (int j = 0; j < QK; j++) {
        largest = fabsf(w[j]) > largest ? fabsf(w[j]) : largest;
        sum += w[j] * w[j];
    }
    *norm2 = sum;
    float wanted = largest / 7 > least ? largest / 7 : least;
    uint16_t step = _cvtss_sh(wanted, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
    float s = _cvtsh_ss(step), inverse = s > 0 ? 1 / s : 0;
    for (int j = 0; j < QK; j++) {
        float whole = rintf(w[j] * inverse + 8 + dither[j]);
        q[j] = (uint8_t) (whole < 0 ? 0 : whole > 15 ? 15 : whole);
    }
    return step;
}

/* Eight rows. 0: done, -1: weights that have no bounds: not finite, or beyond what a step holds. */
static int round_rows(
    int kind, const uint8_t * W, int64_t row_bytes, int64_t D, const float * dither, uint8_t * out, float * norm) {
    double sums[8] = {0};
    int fine = 1, some[8] = {0};
    for (int64_t b = 0; b < D / QK; b++, out += EIGHT_BYTES) {
        for (int r = 0; r < 8; r++) {
            float w[QK], norm2;
            uint8_t q[QK];
            weights_of(kind, W + r * row_bytes, b, w);
            float scale = kind == KIND_Q8_0 ? fabsf(half_at(W + r * row_bytes + b * BLOCK_BYTES)) : 0;
            uint16_t step = round_block(w, LEAST_STEPS * scale, dither + b * QK, q, &norm2);
            sums[r] += norm2;
            some[r] |= step != 0;
            fine &= isfinite(norm2) && isfinite(_cvtsh_ss(step));
            memcpy(out + 2 * r, &step, 2);
            for (int half = 0; half < 2; half++) { /* where four_rows looks for them */
                uint8_t * bytes = out + 16 + 64 * half + 8 * r;
                for (int j = 0; j < 8; j++) {
                    bytes[j] = (uint8_t) ((q[8 * half + j] | q[8 * half + j + 16] << 4) ^ 0x88);
                }
            }
        }
    }
    for (int r = 0; r < 8; r++) {
        double lost = some[r] ? SQUARELESS * sqrt((double) D) : 0;
        norm[r] = (float) ((sqrt(sums[r]) + lost) * (1 + 1e-5 + 1e-9 * (double) D));
    }
    return fine ? 0 : -1;
}

/* Upper bounds of eight latents without their biases; `approx`: the products with the rounded weights. */
static void bounds8(const uint8_t * w, int64_t D, const void * input, __m256 * approx, __m256 * upper) {
    __m256 spread;
    *approx = eight_rows(
        w, D / QK, whole_of(input, D), scale_of(input), shift_of(input, D), square_of(input, D), &spread);
    *upper = _mm256_fmadd_ps(_mm256_sqrt_ps(spread), _mm256_set1_ps(beyond(D)), *approx);
}
#endif

/* The four-bit copy of W_enc (`ggscope_bounds_bytes`) and the norms of its rows. 0: done, -1: it has no bounds. */
int ggscope_make_bounds(
    int kind, const uint8_t * W, int64_t F, int64_t D, const float * dither_D, uint8_t * out, float * norm_F,
    int64_t threads) {
    int failed = !ggscope_has_bounds(kind, F, D);
#if HAVE_PRODUCTS
    int64_t row_bytes = bytes_before(kind, D);
    #pragma omp parallel for num_threads((int) threads) schedule(static) reduction(| : failed)
    for (int64_t f = 0; f < (failed ? 0 : F); f += 8) {
        uint8_t * rows = out + f / 8 * (D / QK) * EIGHT_BYTES;
        failed |= round_rows(kind, W + f * row_bytes, row_bytes, D, dither_D, rows, norm_F + f) != 0;
    }
#else
    (void) W, (void) dither_D, (void) out, (void) norm_F, (void) threads;
#endif
    return failed ? -1 : 0;
}

/* `taken`: the row as the exact product takes it, Q8_0's product rounds it the same way. */
void ggscope_round_for_bounds(int kind, const float * taken_D, int64_t D, const float * dither_D, void * input) {
#if HAVE_PRODUCTS
    float *scale = scale_of(input), *shift = shift_of(input, D), *square = square_of(input, D);
    int8_t * q = whole_of(input, D);
    quantise(taken_D, D, ADDED_4, q, scale, shift);
    double rest = 0;
    for (int64_t b = 0; b < D / QK; b++, q += QK, taken_D += QK, dither_D += QK) {
        v16 product = {0}, left = {0};
        int32_t squares = 0;
        float whole[QK];
        for (int j = 0; j < QK; j++) {
            whole[j] = q[j];
            squares += q[j] * q[j];
        }
        for (int j = 0; j < QK; j += 16) {
            product += load16(whole + j) * load16(dither_D + j);
            v16 gap = load16(taken_D + j) - all16(scale[b]) * load16(whole + j);
            left += gap * gap;
        }
        shift[b] += sum16(product);
        square[b] = (float) squares;
        rest += sum16(left);
    }
    *rest_of(input, D) = kind == KIND_Q8_0 ? 0 : (float) (sqrt(rest) + SQUARELESS * sqrt((double) D));
#else
    (void) kind, (void) taken_D, (void) D, (void) dither_D, (void) input;
#endif
}

/* Of latents first..last - 1, multiples of 8: the products with the rounded weights (`approx` begins with the first of
   them), and what the exact ones do not exceed. */
void ggscope_upper_bounds(
    const uint8_t * rows, const float * norm_F, int64_t D, const void * input, const float * b_F, int64_t first,
    int64_t last, float * approx, float * upper_F) {
#if HAVE_PRODUCTS
    __m256 rest = _mm256_set1_ps(*rest_of(input, D));
    for (int64_t f = first; f < last; f += 8, approx += 8) {
        __m256 near, above, bias = _mm256_loadu_ps(b_F + f);
        bounds8(rows + f / 8 * (D / QK) * EIGHT_BYTES, D, input, &near, &above);
        _mm256_storeu_ps(approx, _mm256_add_ps(near, bias));
        _mm256_storeu_ps(upper_F + f, _mm256_add_ps(_mm256_fmadd_ps(_mm256_loadu_ps(norm_F + f), rest, above), bias));
    }
#else
    (void) rows, (void) norm_F, (void) D, (void) input, (void) b_F, (void) first, (void) last, (void) approx;
    (void) upper_F;
#endif
}
