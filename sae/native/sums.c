/* Sums over the rows of every latent, a stripe of columns at a time: that part of all rows stays in a core's own cache,
   while whole rows come from what the cores share. Every sum has the order that it has latent by latent. */
#include "vectors.h"

#define WIDTH 32 /* columns of a stripe: two vectors */

/* A row's part of `centred` and, behind it, of `grad`. */
static void pack(const struct step * s, int64_t stripe, float * table) {
    for (int64_t n = 0; n < s->N; n++) {
        const float *centred = s->centred_ND + n * s->D + stripe * WIDTH, *grad = s->grad_ND + n * s->D + stripe * WIDTH;
        float * out = table + n * 2 * WIDTH;
        store16(out, load16(centred));
        store16(out + 16, load16(centred + 16));
        store16(out + 32, load16(grad));
        store16(out + 48, load16(grad + 16));
    }
}

static void sums_of_stripe(const struct step * s, int64_t stripe, int64_t first, int64_t stop, const float * table) {
    for (int64_t i = first; i < stop; i++) {
        v16 enc0 = {0}, enc1 = {0}, dec0 = {0}, dec1 = {0};
        for (int32_t p = s->start_F1[i]; p < s->start_F1[i + 1]; p++) {
            const float * row = table + (int64_t) s->sorted_row_P[p] * 2 * WIDTH;
            v16 grad = all16(s->sorted_grad_P[p]), value = all16(s->sorted_val_P[p]);
            enc0 += grad * load16(row);
            enc1 += grad * load16(row + 16);
            dec0 += value * load16(row + 32);
            dec1 += value * load16(row + 48);
        }
        float *enc = s->sum_enc_FD + i * s->D + stripe * WIDTH, *dec = s->sum_dec_FD + i * s->D + stripe * WIDTH;
        store16(enc, enc0);
        store16(enc + 16, enc1);
        store16(dec, dec0);
        store16(dec + 16, dec1);
    }
}

/* sum_enc_FD and sum_dec_FD, after the pairs are sorted. 0: done, -1: no memory. */
int ggscope_sums(const struct step * s) {
    int64_t stripes = s->D / WIDTH, chunks = (s->threads + stripes - 1) / stripes, tasks = stripes * chunks;
    int32_t pairs = s->start_F1[s->F];
    int failed = 0;
#pragma omp parallel num_threads((int) s->threads)
    {
        float * table = aligned_alloc(64, s->N * 2 * WIDTH * sizeof *table);
        int64_t packed = -1;
        if (!table) {
#pragma omp atomic write
            failed = -1;
        }
#pragma omp for schedule(static)
        for (int32_t p = 0; p < pairs; p++) {
            int32_t pair = s->pair_P[p];
            s->sorted_row_P[p] = s->row_P[pair];
            s->sorted_val_P[p] = s->vals_P[pair];
            s->sorted_grad_P[p] = s->grad_vals_P[pair];
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; task++) {
            int64_t stripe = task / chunks, chunk = task % chunks;
            if (!table) continue;
            if (stripe != packed) pack(s, stripe, table);
            packed = stripe;
            sums_of_stripe(s, stripe, chunk * s->F / chunks, (chunk + 1) * s->F / chunks, table);
        }
        free(table);
    }
    return failed;
}
