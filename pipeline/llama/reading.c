/* Reading rows beside the products: the k largest, the error of the reconstruction, and all of it for one row. Every
   function has a general path (ggml, numpy) that it is tested against. */
#include "reading.h"

int ggscope_topk_f32(const float * pre_NF, int64_t N, int64_t F, int64_t K, int32_t * idx_NK, int64_t threads);

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

#define COLUMNS 256 /* of the reconstruction made at a time; whole blocks of Q8_0 */

/* An SAE's decoder: W_dec in rows of `row_bytes`. */
struct decoder {
    int32_t kind;
    int64_t row_bytes, D;
    const uint8_t * W;
    const float * b_D;
};

static inline int64_t bytes_before(int kind, int64_t j) { /* of a row, in front of column j */
    return kind == KIND_F32 ? 4 * j : kind == KIND_Q8_0 ? j / QK * BLOCK_BYTES : 2 * j;
}

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
static void piece_errors(
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

static inline int64_t pieces_of(int64_t D) { return (D + COLUMNS - 1) / COLUMNS; }

static double sum_of(const double * errors, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++) sum += errors[i];
    return sum;
}

static int knows_decoder(int kind) {
    return kind == KIND_F32 || kind == KIND_F16 || kind == KIND_BF16 || kind == KIND_Q8_0;
}

/* error_N. 0: done, -1: no memory, -2: a type it does not know. */
int ggscope_squared_error(
    const struct decoder * d, const float * x_ND, const int32_t * idx_NK, const float * vals_NK, int64_t N, int64_t K,
    double * error_N) {
    if (!knows_decoder(d->kind)) return -2;
    double * errors = malloc((size_t) pieces_of(d->D) * sizeof *errors);
    if (!errors) return -1;
    for (int64_t n = 0; n < N; n++) {
        const float * vals_K = vals_NK + n * K;
        int64_t fired = 0;
        while (fired < K && vals_K[fired] > 0) fired++;
        piece_errors(d, x_ND + n * d->D, idx_NK + n * K, vals_K, fired, 0, d->D, errors);
        error_N[n] = sum_of(errors, pieces_of(d->D));
    }
    free(errors);
    return 0;
}

/* ---- all of it for one row ---- */

#define BLOCK_LATENTS 64 /* pre-activations made between two looks at the bound */

struct pair {
    int32_t latent;
    float value;
};

/* What is known of W_enc without reading it (bounds.c). Where a part of the latents leaves more than `most` of them in
   question, that part is multiplied whole, and the bounds are not looked at for a number of rows that doubles from one
   such row to the next. */
struct bounds {
    const uint8_t * rows; /* NULL: there are none */
    const float *dither_D, *norm_F;
    void * input;
    float * upper_F;
    int32_t * open_F; /* latents in question; a part's begin at its first latent */
    uint64_t * items; /* room for K of every thread */
    int64_t most, pause, pauses;
    int64_t exact; /* of the last row: latents whose exact product was computed */
};

#define LONGEST_PAUSE 255

/* One row of an SAE without layer norm or skip, "topk" or "threshold". Memory is the caller's. */
struct reading {
    struct decoder decoder;
    int32_t kind; /* of W_enc */
    int64_t D, F, K, threads; /* K 0: "threshold" */
    const uint8_t * W_enc;
    const float * b_enc_F;
    const float * subtracted_D; /* b_dec or NULL */
    const float * threshold_F;
    float limit; /* values from here on are not held by the rounding to the product's type */
    const float * x_D;
    const float * y_O; /* what the reconstruction is compared with: x_D, or the row at a transcoder's output */
    float * u_D;
    void * input;
    struct bounds bounds;
    int64_t room; /* items of each thread */
    uint64_t * items;
    int64_t * counts;
    double * errors;
    /* what comes out: the active latents, largest first, then by latent */
    int32_t * idx;
    float * vals;
    struct pair * pairs; /* the same once more */
    int64_t fired;
    double error;
};

/* Room for the items of a thread: all its latents may pass a threshold, of the k largest it keeps a few times k. */
int64_t ggscope_reading_room(int64_t F, int64_t K, int64_t threads) {
    return K > 0 ? 4 * K + 4 * BLOCK_LATENTS : F / threads + 16;
}

/* The k largest items first, and the least of them. */
static uint64_t keep_largest(uint64_t * items, int64_t * count, int64_t K) {
    if (*count > K) {
        ggscope_take_largest(items, *count, K);
        *count = K;
    }
    uint64_t least = UINT64_MAX;
    for (int64_t i = 0; i < *count; i++) least = items[i] < least ? items[i] : least;
    return least;
}

static float value_of(uint64_t item) { /* of `ranked`'s key; NaN comes out as NaN */
    int32_t key = (int32_t) ((uint32_t) (item >> 32) ^ 0x80000000u);
    int32_t bits = key ^ ((key >> 31) & INT32_MAX);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The candidates of one thread's latents. */
static void choose_among(struct reading * r, int64_t part) {
    int64_t first = ggscope_part(r->F, part, r->threads), last = ggscope_part(r->F, part + 1, r->threads), count = 0;
    uint64_t * items = r->items + part * r->room;
    uint64_t bound = ranked(0, 0); /* zero does not fire */
    float pre[BLOCK_LATENTS];
    for (int64_t f = first; f < last; f += BLOCK_LATENTS) {
        int64_t n = last - f < BLOCK_LATENTS ? last - f : BLOCK_LATENTS;
        ggscope_products(r->kind, r->W_enc, r->D, r->input, r->b_enc_F, f, f + n, pre);
        for (int64_t i = 0; i < n; i++) {
            uint64_t item = ranked(order_key(pre[i]), (uint32_t) (f + i));
            if (r->K > 0 ? item > bound : pre[i] > r->threshold_F[f + i]) items[count++] = item;
        }
        if (r->K > 0 && count + BLOCK_LATENTS > r->room) bound = keep_largest(items, &count, r->K);
    }
    if (r->K > 0) keep_largest(items, &count, r->K);
    r->counts[part] = count;
}

/* ---- the same by bounds ---- */

#define ROWS_AHEAD 4 /* that are begun to be fetched: the processor goes on by itself */
#define BYTES_AHEAD 512

/* Items of the exact values of some latents. */
static void exact_items(const struct reading * r, const int32_t * latents, int64_t count, uint64_t * items) {
    int64_t row_bytes = bytes_before(r->kind, r->D);
    for (int64_t i = 0; i < count; i++) {
        if (i + ROWS_AHEAD < count) {
            const uint8_t * row = r->W_enc + latents[i + ROWS_AHEAD] * row_bytes;
            for (int64_t j = 0; j < row_bytes && j < BYTES_AHEAD; j += 64) __builtin_prefetch(row + j, 0, 2);
        }
        float pre;
        ggscope_products(r->kind, r->W_enc, r->D, r->input, r->b_enc_F, latents[i], latents[i] + 1, &pre);
        items[i] = ranked(order_key(pre), (uint32_t) latents[i]);
    }
}

/* The bounds of a part's latents, and the exact values of the K of them that look largest. */
static void bound_part(struct reading * r, int64_t part) {
    struct bounds * b = &r->bounds;
    int64_t first = ggscope_part(r->F, part, r->threads), last = ggscope_part(r->F, part + 1, r->threads), count = 0;
    uint64_t *items = r->items + part * r->room, bound = 0;
    int32_t * open = b->open_F + first;
    float approx[BLOCK_LATENTS];
    for (int64_t f = first; f < last; f += BLOCK_LATENTS) {
        int64_t n = last - f < BLOCK_LATENTS ? last - f : BLOCK_LATENTS;
        ggscope_upper_bounds(b->rows, b->norm_F, r->D, b->input, r->b_enc_F, f, f + n, approx, b->upper_F);
        if (r->K == 0) continue;
        for (int64_t i = 0; i < n; i++) {
            uint64_t item = ranked(order_key(approx[i]), (uint32_t) (f + i));
            if (item > bound) items[count++] = item;
        }
        if (count + BLOCK_LATENTS > r->room) bound = keep_largest(items, &count, r->K);
    }
    if (r->K > 0) keep_largest(items, &count, r->K);
    for (int64_t i = 0; i < count; i++) {
        open[i] = ranked_index(items[i]);
        b->upper_F[open[i]] = -INFINITY; /* not to be asked about again */
    }
    exact_items(r, open, count, items);
    r->counts[part] = count;
}

/* The K-th largest of the exact values so far, at least 0: what a latent has to reach. */
static float least_wanted(const struct reading * r) {
    int64_t count = 0;
    for (int64_t part = 0; part < r->threads; part++) {
        memcpy(r->bounds.items + count, r->items + part * r->room, (size_t) r->counts[part] * sizeof *r->items);
        count += r->counts[part];
    }
    if (r->K == 0 || count < r->K) return 0;
    float least = value_of(keep_largest(r->bounds.items, &count, r->K));
    return least > 0 ? least : 0;
}

/* The candidates among a part's latents; 1 where they were too many to be looked at one by one. */
static int settle_part(struct reading * r, int64_t part, float least, int64_t * exact) {
    const struct bounds * b = &r->bounds;
    int64_t first = ggscope_part(r->F, part, r->threads), last = ggscope_part(r->F, part + 1, r->threads), in_question = 0;
    uint64_t * items = r->items + part * r->room;
    int32_t * open = b->open_F + first;
    for (int64_t f = first; f < last; f++) {
        open[in_question] = (int32_t) f;
        in_question += r->K > 0 ? !(b->upper_F[f] < least) : !(b->upper_F[f] <= r->threshold_F[f]);
    }
    if (in_question > b->most) {
        choose_among(r, part);
        *exact = last - first;
        return 1;
    }
    int64_t count = r->counts[part];
    *exact = count + in_question;
    for (int64_t i = 0; i < in_question; i += BLOCK_LATENTS) {
        int64_t n = in_question - i < BLOCK_LATENTS ? in_question - i : BLOCK_LATENTS;
        exact_items(r, open + i, n, items + count);
        if (r->K > 0) {
            count += n;
            if (count + BLOCK_LATENTS > r->room) keep_largest(items, &count, r->K);
            continue;
        }
        for (int64_t j = 0, made = count; j < n; j++) {
            if (value_of(items[made + j]) > r->threshold_F[open[i + j]]) items[count++] = items[made + j];
        }
    }
    if (r->K > 0) keep_largest(items, &count, r->K);
    r->counts[part] = count;
    return 0;
}

static void sort_chosen(struct reading * r) {
    int64_t count = r->counts[0];
    for (int64_t part = 1; part < r->threads; part++) {
        memmove(r->items + count, r->items + part * r->room, (size_t) r->counts[part] * sizeof *r->items);
        count += r->counts[part];
    }
    if (r->K > 0) keep_largest(r->items, &count, r->K);
    qsort(r->items, (size_t) count, sizeof *r->items, larger_first);
    r->fired = 0;
    for (int64_t i = 0; i < count; i++) {
        float value = value_of(r->items[i]);
        if (!(value > 0)) continue;
        r->idx[r->fired] = ranked_index(r->items[i]);
        r->vals[r->fired] = value;
        r->pairs[r->fired++] = (struct pair){ranked_index(r->items[i]), value};
    }
}

/* `fired`, `idx`, `vals`, `pairs` of x and, of a decoder that is known, `error` of y. 0: done, 1: x is beyond what the product holds,
   -2: no product of this type here. */
int ggscope_read_row(struct reading * r) {
    if (!ggscope_has_affine(r->kind, r->F)) return -2;
    int beyond = 0;
    for (int64_t j = 0; j < r->D; j++) {
        r->u_D[j] = r->subtracted_D ? r->x_D[j] - r->subtracted_D[j] : r->x_D[j];
        beyond |= !(fabsf(r->u_D[j]) < r->limit);
    }
    if (beyond) return 1;
    ggscope_round_input(r->kind, r->u_D, r->D, r->input);
    struct bounds * b = &r->bounds;
    int bounded = b->rows && b->pause == 0, failed = 0;
    if (b->pause > 0) b->pause--;
    if (bounded) {
        const float * taken_D = r->kind == KIND_Q8_0 ? r->u_D : (const float *) r->input;
        ggscope_round_for_bounds(r->kind, taken_D, r->D, b->dither_D, b->input);
    }
    float least = 0;
    int64_t exact = 0, pieces = pieces_of(r->decoder.D);
    int known = r->decoder.W && knows_decoder(r->decoder.kind);
    #pragma omp parallel num_threads((int) r->threads)
    {
        if (bounded) {
            #pragma omp for schedule(static)
            for (int64_t part = 0; part < r->threads; part++) bound_part(r, part);
            #pragma omp single
            least = least_wanted(r);
            #pragma omp for schedule(static) reduction(+ : exact) reduction(| : failed)
            for (int64_t part = 0; part < r->threads; part++) {
                int64_t some;
                failed |= settle_part(r, part, least, &some);
                exact += some;
            }
        } else {
            #pragma omp for schedule(static)
            for (int64_t part = 0; part < r->threads; part++) choose_among(r, part);
        }
        #pragma omp single
        sort_chosen(r);
        #pragma omp for schedule(static)
        for (int64_t part = 0; part < r->threads; part++) {
            int64_t first = pieces * part / r->threads * COLUMNS, last = pieces * (part + 1) / r->threads * COLUMNS;
            last = last < r->decoder.D ? last : r->decoder.D;
            if (known && first < last) {
                piece_errors(&r->decoder, r->y_O, r->idx, r->vals, r->fired, first, last, r->errors);
            }
        }
    }
    b->exact = bounded ? exact : r->F;
    if (bounded) b->pause = b->pauses = failed ? (2 * b->pauses + 1) & LONGEST_PAUSE : 0;
    r->error = known ? sum_of(r->errors, pieces) : NAN;
    return 0;
}
