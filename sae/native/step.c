/* The rest of a training step: row by row forward and backward, then latent by latent gradient and update. The
   gradient of a latent's weights lives in cache from its sum to its use; it is never written to memory. */
#include "vectors.h"

/* u_hat - u of the row, in grad_ND until it is scaled */
static void decode_row(const struct step * s, int64_t row) {
    const int32_t * idx = s->idx_P + s->first_N1[row];
    const float * vals = s->vals_P + s->first_N1[row];
    int64_t count = s->first_N1[row + 1] - s->first_N1[row];
    float * error = s->grad_ND + row * s->D;
    const float * centred = s->centred_ND + row * s->D;
    for (int64_t j = 0; j < s->D; j++) error[j] = -centred[j];
    float four[4];
    const float * rows[4];
    int held = 0;
    for (int64_t k = 0; k < count; k++) {
        if (vals[k] == 0) continue;
        four[held] = vals[k];
        rows[held++] = s->W_dec_FD + idx[k] * s->D;
        if (held == 4) {
            add_scaled4(error, four, rows, s->D);
            held = 0;
        }
    }
    for (int i = 0; i < held; i++) add_scaled(error, four[i], rows[i], s->D);
}

void ggscope_choose(const struct step * s, int64_t row, const uint64_t * items, int64_t count, uint64_t * spare) {
    int64_t K = s->K;
    int32_t * idx = s->idx_P + row * K;
    float * vals = s->vals_P + row * K;
    uint64_t least = 0; /* of the items taken; an item holds its index, so no two are equal */
    if (count > K) {
        memcpy(spare, items, count * sizeof *items);
        ggscope_take_largest(spare, count, K);
        least = UINT64_MAX;
        for (int64_t k = 0; k < K; k++) least = spare[k] < least ? spare[k] : least;
    }
    int64_t taken = 0;
    for (int64_t c = 0; c < count; c++) { /* in the order of the candidates, whichever others there were */
        if (items[c] < least) continue;
        float value = ranked_value(items[c]);
        idx[taken] = ranked_index(items[c]);
        vals[taken++] = value < 0 ? 0 : value;
    }
    for (; taken < K; taken++) {
        idx[taken] = 0;
        vals[taken] = 0;
    }
}

void ggscope_reconstruct(const struct step * s, int64_t row) {
    int64_t D = s->D, count = s->first_N1[row + 1] - s->first_N1[row];
    const int32_t * idx = s->idx_P + s->first_N1[row];
    const float * vals = s->vals_P + s->first_N1[row];
    float * grad_vals = s->grad_vals_P + s->first_N1[row];
    decode_row(s, row);
    float * grad = s->grad_ND + row * D;
    double sum = 0;
    float scale = 2.0f / (float) s->N;
    for (int64_t first = 0; first < D; first += 256) { /* float32 within a stretch, float64 between them */
        int64_t width = D - first < 256 ? D - first : 256;
        sum += dot(grad + first, grad + first, width);
    }
    s->error_N[row] = sum;
    for (int64_t j = 0; j < D; j++) grad[j] *= scale;
    for (int64_t k = 0; k < count; k += 4) {
        const float * rows[4];
        float dots[4];
        int64_t stop = k + 4 < count ? k + 4 : count;
        for (int64_t i = k; i < k + 4; i++) rows[i - k] = s->W_dec_FD + idx[i < stop ? i : k] * D;
        dot4(grad, rows, D, dots);
        for (int64_t i = k; i < stop; i++) grad_vals[i] = vals[i] != 0 ? dots[i - k] : 0;
    }
}

void ggscope_fetch_decoder(const struct step * s, int64_t row) {
    for (int64_t p = s->first_N1[row]; p < s->first_N1[row + 1]; p++) prefetch_row(s->W_dec_FD + s->idx_P[p] * s->D, s->D);
}

/* Everything that goes row by row, for the K largest of the C latents in named_NC. 0: done, -1: no memory. */
int ggscope_rows(const struct step * s) {
    int failed = 0;
#pragma omp parallel num_threads((int) s->threads)
    {
        uint64_t * items = malloc(2 * s->C * sizeof *items);
        if (!items) {
#pragma omp atomic write
            failed = -1;
        }
#pragma omp for schedule(dynamic, 16)
        for (int64_t row = 0; row < s->N; row++) {
            if (!items) continue;
            const int32_t * idx = s->named_NC + row * s->C;
            const float * u = s->u_ND + row * s->D;
            float * centred = s->centred_ND + row * s->D;
            for (int64_t j = 0; j < s->D; j++) centred[j] = u[j] - s->b_dec_D[j];
            for (int64_t k = 0; k < s->C; k++) {
                if (k + AHEAD < s->C) prefetch_row(s->W_enc_FD + idx[k + AHEAD] * s->D, s->D);
                float value = dot(s->W_enc_FD + idx[k] * s->D, centred, s->D) + s->b_enc_F[idx[k]];
                items[k] = ranked(order_key(value), (uint32_t) idx[k]);
            }
            s->candidates_N[row] = s->C;
            ggscope_choose(s, row, items, s->C, items + s->C);
            ggscope_fetch_decoder(s, row);
            ggscope_reconstruct(s, row);
        }
        free(items);
    }
    return failed;
}

/* The rest of what goes row by row, for pairs that are there, with their values. 0: done. */
int ggscope_rows_of_pairs(const struct step * s) {
#pragma omp parallel for schedule(dynamic, 16) num_threads((int) s->threads)
    for (int64_t row = 0; row < s->N; row++) {
        if (row + 1 < s->N) ggscope_fetch_decoder(s, row + 1);
        ggscope_reconstruct(s, row);
    }
    return 0;
}

/* BatchTopK: the K N largest of the pool become the pairs; all of them, where there are fewer. Among equal ones the
   earlier row, then the lower latent. 0: done, -1: no memory. */
int ggscope_pairs_of_pool(const struct step * s) {
    int64_t seen = *s->pool_used, wanted = s->N * s->K < seen ? s->N * s->K : seen, place = 0, pair = 0;
    const uint64_t high = (uint64_t) UINT32_MAX << 32;
    uint64_t least = 0, * ranks = malloc((seen + 1) * sizeof *ranks); /* with the place in the batch for an index */
    if (!ranks) return -1;
    for (int64_t row = 0; row < s->N; row++) {
        const uint64_t * items = s->pool + s->pool_at_N[row];
        for (int64_t c = 0; c < s->pool_count_N[row]; c++, place++) ranks[place] = (items[c] & high) | (uint32_t) ~place;
    }
    if (wanted < seen) {
        ggscope_take_largest(ranks, seen, wanted);
        least = UINT64_MAX;
        for (int64_t c = 0; c < wanted; c++) least = ranks[c] < least ? ranks[c] : least;
    }
    free(ranks);
    place = 0;
    for (int64_t row = 0; row < s->N; row++) {
        const uint64_t * items = s->pool + s->pool_at_N[row];
        s->first_N1[row] = pair;
        for (int64_t c = 0; c < s->pool_count_N[row]; c++, place++) {
            if (((items[c] & high) | (uint32_t) ~place) < least) continue;
            s->row_P[pair] = (int32_t) row;
            s->idx_P[pair] = ranked_index(items[c]);
            s->vals_P[pair++] = ranked_value(items[c]);
        }
    }
    s->first_N1[s->N] = pair;
    return 0;
}

/* ---- latent by latent ---- */

/* pair_P: the pairs with a value, by latent and then by row; those of latent i from start[i] to start[i + 1] */
static void sort_pairs(const struct step * s) {
    int64_t P = s->first_N1[s->N];
    int32_t * start = s->start_F1;
    memset(start, 0, (s->F + 1) * sizeof *start);
    for (int64_t p = 0; p < P; p++) start[s->idx_P[p] + 1] += s->vals_P[p] != 0;
    for (int64_t i = 0; i < s->F; i++) {
        s->fired_F[i] = start[i + 1];
        start[i + 1] += start[i];
    }
    for (int64_t p = 0; p < P; p++) {
        if (s->vals_P[p] != 0) s->pair_P[start[s->idx_P[p]]++] = (int32_t) p;
    }
    memmove(start + 1, start, s->F * sizeof *start); /* every start stands now where the next one begins */
    start[0] = 0;
}

/* torch.optim.Adam: rows without a gradient move too */
static void adam(const struct step * s, float * restrict w, float * restrict m, float * restrict v,
                 const float * restrict g, int64_t d) {
    float b1 = 1.0f - s->beta1, beta2 = s->beta2, b2 = 1.0f - s->beta2, eps = s->eps;
    float step_size = s->step_size, inverse = 1.0f / s->root_correction;
    for (int64_t j = 0; j < d; j++) {
        float mj = m[j] + b1 * (g[j] - m[j]);
        float vj = beta2 * v[j] + b2 * g[j] * g[j];
        m[j] = mj;
        v[j] = vj;
        w[j] -= step_size * (mj / (sqrtf(vj) * inverse + eps));
    }
}

static void to_bf16(uint16_t * restrict out, const float * restrict in, int64_t d) {
    const uint32_t * bits = (const uint32_t *) (const void *) in;
    for (int64_t j = 0; j < d; j++) {
        uint32_t b = bits[j], even = (b + 0x7fffu + ((b >> 16) & 1)) >> 16;
        out[j] = (uint16_t) ((b & INT32_MAX) > 0x7f800000 ? 0x7fc0u : even);
    }
}

/* AuxK: rest = product + unit * minus_error; the squares of its rows in square_N; the product becomes scale * rest, the
   gradient. 0: done. */
int ggscope_rest_bf16(uint16_t * product_ND, const float * minus_error_ND, int64_t N, int64_t D, float unit, float scale,
                      double * square_N, int64_t threads) {
    (void) threads; /* unused where there is no OpenMP */
#pragma omp parallel for schedule(dynamic, 16) num_threads((int) threads)
    for (int64_t n = 0; n < N; n++) {
        double square = 0;
        for (int64_t first = 0; first < D; first += 256) { /* float32 within a stretch, float64 between them */
            int64_t width = D - first < 256 ? D - first : 256;
            uint16_t * product = product_ND + n * D + first;
            const float * minus_error = minus_error_ND + n * D + first;
            uint32_t bits[256];
            float rest[256];
            for (int64_t j = 0; j < width; j++) bits[j] = (uint32_t) product[j] << 16;
            memcpy(rest, bits, width * sizeof *rest);
            for (int64_t j = 0; j < width; j++) rest[j] += unit * minus_error[j];
            square += dot(rest, rest, width);
            for (int64_t j = 0; j < width; j++) rest[j] *= scale;
            to_bf16(product, rest, width);
        }
        square_N[n] = square;
    }
    return 0;
}

static void to_tile(const struct step * s, int64_t i, float * restrict t) {
    const float * restrict w = s->W_enc_FD + i * s->D;
    int64_t D = s->D, quads = (D + 3) / 4;
    int32_t largest = 0, total = 0;
    for (int64_t j = 0; j < D; j++) t[j] = w[j] * s->balance_D[j];
    const int32_t * bits = (const int32_t *) (const void *) t;
    for (int64_t j = 0; j < D; j++) {
        int32_t size = bits[j] & INT32_MAX;
        largest = size > largest ? size : largest;
    }
    float most;
    memcpy(&most, &largest, sizeof most);
    float norm = sqrtf(dot(t, t, D));
    if (!isfinite(norm) || !isfinite(most)) { /* always a candidate, its exact value decides */
        memset(t, 0, D * sizeof *t);
        most = 0;
        norm = INFINITY;
    }
    s->q_shift_F[i] = dot(t, s->dither_D, D);
    float inverse = most > 1e-30f ? 127.0f / most : 0.0f;
    for (int64_t j = 0; j < D; j++) t[j] = t[j] * inverse + 12582912.0f; /* 1.5 * 2^23: the low byte is the rounded value */
    for (int64_t j = D; j < 4 * quads; j++) t[j] = 12582912.0f;
    if (s->tile == TILE_AMX) {
        int8_t * out = s->q_tiles + (i / TILE_AMX) * ((D + 63) / 64) * 1024 + (i % TILE_AMX) * 64;
        for (int64_t first = 0; first < D; first += 64, out += 1024) {
            int64_t width = D - first < 64 ? D - first : 64;
            for (int64_t j = 0; j < width; j++) out[j] = (int8_t) bits[first + j];
        }
    } else {
        int8_t * out = s->q_tiles + (i / TILE_VNNI) * quads * TILE_VNNI * 4 + (i % TILE_VNNI) * 4;
        for (int64_t j = 0; j < quads; j++, out += 4 * TILE_VNNI) {
            uint32_t four = (uint32_t) (bits[4 * j] & 255) | (uint32_t) (bits[4 * j + 1] & 255) << 8 |
                            (uint32_t) (bits[4 * j + 2] & 255) << 16 | (uint32_t) (bits[4 * j + 3] & 255) << 24;
            memcpy(out, &four, sizeof four);
        }
    }
    for (int64_t j = 0; j < D; j++) total += (int8_t) bits[j];
    s->q_scale_F[i] = inverse > 0 ? 1.0f / inverse : 0.0f;
    s->q_norm_F[i] = norm;
    s->q_offset_F[i] = -128 * total;
}

void ggscope_refresh(const struct step * s, int64_t latent, float * scratch) {
    if (s->bf16_FD) to_bf16(s->bf16_FD + latent * s->D, s->W_enc_FD + latent * s->D, s->D);
    if (s->q_tiles) to_tile(s, latent, scratch);
}

/* The copies of all of W_enc, from the weights as they are. 0: done, -1: no memory. */
int ggscope_refresh_all(const struct step * s) {
    int failed = 0;
#pragma omp parallel num_threads((int) s->threads)
    {
        float * scratch = malloc((s->D + LANES) * sizeof *scratch);
        if (!scratch) {
#pragma omp atomic write
            failed = -1;
        }
#pragma omp for schedule(static, UNIT)
        for (int64_t i = 0; i < s->F; i++) {
            if (scratch) ggscope_refresh(s, i, scratch);
        }
        free(scratch);
    }
    return failed;
}

/* dW_enc[i] and dW_dec[i] into `enc` and `dec`; returns db_enc[i] */
static float sum_gradients(const struct step * s, int64_t i, float * enc, float * dec) {
    int64_t D = s->D;
    int32_t p = s->start_F1[i], stop = s->start_F1[i + 1];
    int32_t extra = s->extra_of_F ? s->extra_of_F[i] : -1;
    float bias = 0;
    if (s->sum_enc_FD) {
        for (; p < stop; p++) bias += s->sorted_grad_P[p];
    } else {
        memset(enc, 0, D * sizeof *enc);
        memset(dec, 0, D * sizeof *dec);
    }
    for (; p + 4 <= stop; p += 4) {
        float vals[4], grads[4];
        const float *centred[4], *grad[4];
        for (int q = 0; q < 4; q++) {
            int64_t pair = s->pair_P[p + q], row = s->row_P[pair];
            vals[q] = s->vals_P[pair];
            bias += grads[q] = s->grad_vals_P[pair];
            centred[q] = s->centred_ND + row * D;
            grad[q] = s->grad_ND + row * D;
        }
        add_scaled4(enc, grads, centred, D);
        add_scaled4(dec, vals, grad, D);
    }
    for (; p < stop; p++) {
        int64_t pair = s->pair_P[p], row = s->row_P[pair];
        bias += s->grad_vals_P[pair];
        add_scaled(enc, s->grad_vals_P[pair], s->centred_ND + row * D, D);
        add_scaled(dec, s->vals_P[pair], s->grad_ND + row * D, D);
    }
    if (extra >= 0) {
        bias += s->extra_bias_M[extra];
        add_scaled(enc, 1, s->extra_enc_MD + extra * D, D);
        add_scaled(dec, 1, s->extra_dec_MD + extra * D, D);
    }
    return bias;
}

static void update_latent(const struct step * s, int64_t i, float * enc, float * dec, float * partial_D) {
    int64_t D = s->D, at = i * D;
    float * scratch = enc;
    if (s->sum_enc_FD) {
        enc = s->sum_enc_FD + at;
        dec = s->sum_dec_FD + at;
    }
    float *w_enc = s->W_enc_FD + at, *w_dec = s->W_dec_FD + at;
    if (i + 1 < s->F) {
        float * const next[6] = {s->W_enc_FD, s->W_enc_m, s->W_enc_v, s->W_dec_FD, s->W_dec_m, s->W_dec_v};
        for (int a = 0; a < 6; a++) prefetch_row(next[a] + at + D, D);
    }
    float bias = sum_gradients(s, i, enc, dec);
    if (bias != 0) add_scaled(partial_D, -bias, w_enc, D); /* u enters as u - b_dec */
    adam(s, w_enc, s->W_enc_m + at, s->W_enc_v + at, enc, D);
    adam(s, s->b_enc_F + i, s->b_enc_m + i, s->b_enc_v + i, &bias, 1);
    add_scaled(dec, -dot(dec, w_dec, D), w_dec, D); /* what is along the row would only change its norm */
    adam(s, w_dec, s->W_dec_m + at, s->W_dec_v + at, dec, D);
    float norm = sqrtf(dot(w_dec, w_dec, D)), inverse = 1.0f / (norm == 0 ? 1 : norm); /* a row of zeros stays */
    for (int64_t j = 0; j < D; j++) w_dec[j] *= inverse;
    ggscope_refresh(s, i, scratch);
}

/* Gradient and update of all parameters, after the rows. 0: done, -1: no memory. */
int ggscope_latents(const struct step * s) {
    int64_t D = s->D, row_parts = (s->N + UNIT - 1) / UNIT, parts = row_parts + (s->F + UNIT - 1) / UNIT;
    int failed = 0;
    sort_pairs(s);
    if (s->sum_enc_FD && ggscope_sums(s)) return -1;
#pragma omp parallel num_threads((int) s->threads)
    {
        float *enc = malloc((D + LANES) * sizeof *enc), *dec = malloc((D + LANES) * sizeof *dec);
        int opened = enc && dec;
        if (!opened) {
#pragma omp atomic write
            failed = -1;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t part = 0; part < parts; part++) {
            if (!opened) continue;
            float * partial = s->partial_D + part * D;
            memset(partial, 0, D * sizeof *partial);
            int64_t first = (part < row_parts ? part : part - row_parts) * UNIT, end = part < row_parts ? s->N : s->F;
            int64_t stop = first + UNIT < end ? first + UNIT : end;
            for (int64_t i = first; i < stop; i++) {
                if (part < row_parts) {
                    add_scaled(partial, 1, s->grad_ND + i * D, D);
                } else {
                    update_latent(s, i, enc, dec, partial);
                }
            }
        }
        free(enc);
        free(dec);
    }
    if (failed) return failed;
    for (int64_t part = 1; part < parts; part++) add_scaled(s->partial_D, 1, s->partial_D + part * D, D);
    adam(s, s->b_dec_D, s->b_dec_m, s->b_dec_v, s->partial_D, D);
    return 0;
}

int64_t ggscope_step_bytes(void) { return sizeof(struct step); }

int ggscope_has_threads(void) {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}
