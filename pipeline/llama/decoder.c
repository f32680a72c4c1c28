/* ||x - sum_k a_k W_dec[k] - b_dec||^2 with the decoder as it is stored. numpy is the general path. */
#include "reading.h"

/* y += a row, a piece of a row of W_dec */
static void add_row(int kind, const uint8_t * row, float a, float * y, int64_t D) {
    if (kind == KIND_F32) {
        add_scaled(y, a, (const float *) row, D);
    } else if (kind == KIND_F16) {
        int64_t j = 0;
#if defined(__AVX2__) && defined(__F16C__)
        for (; j + 8 <= D; j += 8) {
            __m256 part = _mm256_mul_ps(_mm256_set1_ps(a), _mm256_cvtph_ps(_mm_loadu_si128((const void *) (row + 2 * j))));
            _mm256_storeu_ps(y + j, _mm256_add_ps(_mm256_loadu_ps(y + j), part));
        }
#endif
        for (; j < D; j++) y[j] += a * half_at(row + 2 * j);
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

/* The squared error in columns first..last - 1, whole pieces of COLUMNS but for the row's end: a number for each piece. */
void ggscope_piece_errors(
    const struct decoder * d, const float * x_D, const int32_t * idx_K, const float * vals_K, int64_t K, int64_t first,
    int64_t last, double * errors) {
    int64_t from = bytes_before(d->kind, first), to = bytes_before(d->kind, last);
    for (int64_t k = 0; k < K; k++) { /* they come from memory: ask for all before the first is used */
        const uint8_t * row = d->W + idx_K[k] * d->row_bytes;
        for (int64_t j = from; j < to; j += 64) __builtin_prefetch(row + j);
    }
    for (int64_t j = first; j < last; j += COLUMNS) {
        int64_t width = last - j < COLUMNS ? last - j : COLUMNS;
        float x_hat[COLUMNS] = {0};
        for (int64_t k = 0; k < K; k++) {
            add_row(d->kind, d->W + idx_K[k] * d->row_bytes + bytes_before(d->kind, j), vals_K[k], x_hat, width);
        }
        double sum = 0;
        for (int64_t i = 0; i < width; i++) {
            double gap = (double) x_D[j + i] - (double) (x_hat[i] + d->b_D[j + i]);
            sum += gap * gap;
        }
        errors[j / COLUMNS] = sum;
    }
}

double ggscope_sum_of(const double * errors, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++) sum += errors[i];
    return sum;
}

int ggscope_knows_decoder(int kind) {
    return kind == KIND_F32 || kind == KIND_F16 || kind == KIND_BF16 || kind == KIND_Q8_0;
}

/* error_N. 0: done, -1: no memory, -2: a type it does not know. */
int ggscope_squared_error(
    const struct decoder * d, const float * x_ND, const int32_t * idx_NK, const float * vals_NK, int64_t N, int64_t K,
    double * error_N) {
    if (!ggscope_knows_decoder(d->kind)) return -2;
    double * errors = malloc((size_t) pieces_of(d->D) * sizeof *errors);
    if (!errors) return -1;
    for (int64_t n = 0; n < N; n++) {
        const float * vals_K = vals_NK + n * K;
        int64_t fired = 0;
        while (fired < K && vals_K[fired] > 0) fired++;
        ggscope_piece_errors(d, x_ND + n * d->D, idx_NK + n * K, vals_K, fired, 0, d->D, errors);
        error_N[n] = ggscope_sum_of(errors, pieces_of(d->D));
    }
    free(errors);
    return 0;
}
