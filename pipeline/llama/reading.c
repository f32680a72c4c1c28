/* Reading rows beside the products: the k largest, and all of a reading for one row. Every function has a general path
   (ggml, numpy) that it is tested against. */
#include "reading.h"

int ggscope_topk_f32(const float * pre_NF, int64_t N, int64_t F, int64_t K, int32_t * idx_NK, int64_t threads);

/* ---- the k largest above zero, sorted ---- */

static int larger_first(const void * a, const void * b) {
    uint64_t x = *(const uint64_t *) a, y = *(const uint64_t *) b;
    return (x < y) - (x > y);
}

#define FEW 64

static void sort_larger_first(uint64_t * items, int64_t count) {
    if (count > FEW) {
        qsort(items, (size_t) count, sizeof *items, larger_first);
        return;
    }
    for (int64_t i = 1; i < count; i++) { /* without the library's code, which is not in the cache */
        uint64_t item = items[i];
        int64_t j = i;
        for (; j > 0 && items[j - 1] < item; j--) items[j] = items[j - 1];
        items[j] = item;
    }
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
        sort_larger_first(items, K);
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

/* ---- all of it for one row ---- */

#define BLOCK_LATENTS 64 /* pre-activations made between two looks at the bound */

enum state { DONE = 0, BEYOND = 1, NO_PRODUCT = -2 };

/* What comes out, in one piece: the active latents, largest first, then by latent. */
struct found {
    int64_t state, fired;
    double error;
    struct pair {
        int32_t latent;
        float value;
    } pairs[];
};

/* What is known of W_enc without reading it (bounds.c). Where more than `most` latents are in question all are multiplied,
   and the bounds are not looked at for a number of rows that doubles from one such row to the next. */
struct bounds {
    const uint8_t * rows; /* NULL: there are none */
    const float *dither_D, *norm_F;
    void * input;
    float * upper_F;
    int32_t * open_F; /* latents in question; a part's begin at its first latent */
    uint64_t * items; /* room for K of every thread */
    int64_t * questions; /* of every thread */
    int64_t most, pause, pauses;
    int64_t exact; /* of the last row: latents whose exact product was computed */
};

#define LONGEST_PAUSE 255

/* The chunks of a part that nobody has taken: from the first (the lower half of the word) to before the last. */
struct span {
    uint64_t left;
    uint64_t apart[7]; /* no two in one line of the cache */
};

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
    struct span * spans; /* of every thread */
    double * errors;
    int32_t * idx; /* the active latents as in `found` */
    float * vals;
    struct found * found;
};

/* Room for the items of a thread: all latents may pass a threshold, of the k largest it keeps a few times k. */
int64_t ggscope_reading_room(int64_t F, int64_t K) { return K > 0 ? 4 * K + 4 * BLOCK_LATENTS : F; }

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

/* ---- the latents, shared out ---- */

static int64_t chunks_of(int64_t latents) { return (latents + BLOCK_LATENTS - 1) / BLOCK_LATENTS; }

static void share_out(struct reading * r) {
    for (int64_t part = 0; part < r->threads; part++) {
        int64_t latents = ggscope_part(r->F, part + 1, r->threads) - ggscope_part(r->F, part, r->threads);
        r->spans[part].left = (uint64_t) chunks_of(latents) << 32;
    }
}

/* A chunk of this part, its first or its last; -1: none is left. */
static int64_t claimed(struct reading * r, int64_t part, int from_behind) {
    uint64_t * left = &r->spans[part].left, now = __atomic_load_n(left, __ATOMIC_RELAXED);
    for (;;) {
        uint64_t first = now & 0xffffffffu, last = now >> 32;
        if (first >= last) return -1;
        uint64_t then = from_behind ? now - (1ull << 32) : now + 1;
        if (__atomic_compare_exchange_n(left, &now, then, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
            return (int64_t) (from_behind ? last - 1 : first);
        }
    }
}

/* The candidates among a thread's latents by exact values, or, with `by_bounds`, those that look largest and the bounds of
   all. Its own part from the front, then what others have left of theirs from behind: one is slower where it is an
   efficiency core, or has a neighbour. */
static void choose_part(struct reading * r, int64_t part, int by_bounds) {
    uint64_t *items = r->items + part * r->room, bound = by_bounds ? 0 : ranked(0, 0); /* zero does not fire */
    int64_t count = 0;
    float pre[BLOCK_LATENTS];
    for (int64_t other = 0; other < r->threads; other++) {
        int64_t from = (part + other) % r->threads, chunk;
        int64_t first = ggscope_part(r->F, from, r->threads), last = ggscope_part(r->F, from + 1, r->threads);
        while ((chunk = claimed(r, from, other > 0)) >= 0) {
            int64_t f = first + chunk * BLOCK_LATENTS, n = last - f < BLOCK_LATENTS ? last - f : BLOCK_LATENTS;
            if (by_bounds) {
                const struct bounds * b = &r->bounds;
                ggscope_upper_bounds(b->rows, b->norm_F, r->D, b->input, r->b_enc_F, f, f + n, pre, b->upper_F);
                if (r->K == 0) continue;
            } else {
                ggscope_products(r->kind, r->W_enc, r->D, r->input, r->b_enc_F, f, f + n, pre);
            }
            for (int64_t i = 0; i < n; i++) {
                uint64_t item = ranked(order_key(pre[i]), (uint32_t) (f + i));
                if (r->K > 0 ? item > bound : pre[i] > r->threshold_F[f + i]) items[count++] = item;
            }
            if (r->K > 0 && count + BLOCK_LATENTS > r->room) bound = keep_largest(items, &count, r->K);
        }
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

/* The bounds of a thread's latents, and the exact values of the K of them that look largest. */
static void bound_part(struct reading * r, int64_t part) {
    choose_part(r, part, 1);
    uint64_t * items = r->items + part * r->room;
    int32_t * open = r->bounds.open_F + ggscope_part(r->F, part, r->threads);
    for (int64_t i = 0; i < r->counts[part]; i++) {
        open[i] = ranked_index(items[i]);
        r->bounds.upper_F[open[i]] = -INFINITY; /* not to be asked about again */
    }
    exact_items(r, open, r->counts[part], items);
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

/* How many of a part's latents are in question: those in open_F. */
static int64_t question_part(const struct reading * r, int64_t part, float least) {
    const struct bounds * b = &r->bounds;
    int64_t first = ggscope_part(r->F, part, r->threads), last = ggscope_part(r->F, part + 1, r->threads), count = 0;
    for (int64_t f = first; f < last; f++) {
        b->open_F[first + count] = (int32_t) f;
        count += r->K > 0 ? !(b->upper_F[f] < least) : !(b->upper_F[f] <= r->threshold_F[f]);
    }
    return count;
}

/* The candidates among so many latents in question, beside those that looked largest. */
static void settle_part(struct reading * r, int64_t part, int64_t in_question) {
    uint64_t * items = r->items + part * r->room;
    const int32_t * open = r->bounds.open_F + ggscope_part(r->F, part, r->threads);
    int64_t count = r->counts[part];
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
}

static void sort_chosen(struct reading * r) {
    int64_t count = r->counts[0];
    for (int64_t part = 1; part < r->threads; part++) {
        memmove(r->items + count, r->items + part * r->room, (size_t) r->counts[part] * sizeof *r->items);
        count += r->counts[part];
    }
    if (r->K > 0) keep_largest(r->items, &count, r->K);
    sort_larger_first(r->items, count);
    int64_t fired = 0;
    for (int64_t i = 0; i < count; i++) {
        float value = value_of(r->items[i]);
        if (!(value > 0)) continue;
        r->idx[fired] = ranked_index(r->items[i]);
        r->vals[fired] = value;
        r->found->pairs[fired++] = (struct pair){ranked_index(r->items[i]), value};
    }
    r->found->fired = fired;
}

static int read_row(struct reading * r) {
    if (!ggscope_has_affine(r->kind, r->F)) return NO_PRODUCT;
    int beyond = 0;
    for (int64_t j = 0; j < r->D; j++) {
        r->u_D[j] = r->subtracted_D ? r->x_D[j] - r->subtracted_D[j] : r->x_D[j];
        beyond |= !(fabsf(r->u_D[j]) < r->limit);
    }
    if (beyond) return BEYOND;
    ggscope_round_input(r->kind, r->u_D, r->D, r->input);
    struct bounds * b = &r->bounds;
    int bounded = b->rows && b->pause == 0;
    if (b->pause > 0) b->pause--;
    if (bounded) {
        const float * taken_D = r->kind == KIND_Q8_0 ? r->u_D : (const float *) r->input;
        ggscope_round_for_bounds(r->kind, taken_D, r->D, b->dither_D, b->input);
    }
    share_out(r);
    float least = 0;
    int64_t exact = 0, pieces = pieces_of(r->decoder.D);
    int known = r->decoder.W && ggscope_knows_decoder(r->decoder.kind);
    #pragma omp parallel num_threads((int) r->threads)
    {
        if (bounded) {
            #pragma omp for schedule(static)
            for (int64_t part = 0; part < r->threads; part++) bound_part(r, part);
            #pragma omp single
            {
                least = least_wanted(r);
                for (int64_t part = 0; part < r->threads; part++) exact += r->counts[part];
            }
            #pragma omp for schedule(static) reduction(+ : exact)
            for (int64_t part = 0; part < r->threads; part++) exact += b->questions[part] = question_part(r, part, least);
            if (exact <= b->most) {
                #pragma omp for schedule(static)
                for (int64_t part = 0; part < r->threads; part++) settle_part(r, part, b->questions[part]);
            } else {
                #pragma omp single
                share_out(r);
            }
        }
        if (!bounded || exact > b->most) {
            #pragma omp for schedule(static)
            for (int64_t part = 0; part < r->threads; part++) choose_part(r, part, 0);
        }
        #pragma omp single
        sort_chosen(r);
        #pragma omp for schedule(static)
        for (int64_t part = 0; part < r->threads; part++) {
            int64_t first = pieces * part / r->threads * COLUMNS, last = pieces * (part + 1) / r->threads * COLUMNS;
            last = last < r->decoder.D ? last : r->decoder.D;
            if (known && first < last) {
                ggscope_piece_errors(&r->decoder, r->y_O, r->idx, r->vals, r->found->fired, first, last, r->errors);
            }
        }
    }
    int settled = bounded && exact <= b->most;
    b->exact = settled ? exact : r->F;
    if (bounded) b->pause = b->pauses = settled ? 0 : (2 * b->pauses + 1) & LONGEST_PAUSE;
    r->found->error = known ? ggscope_sum_of(r->errors, pieces) : NAN;
    return DONE;
}

/* `found`, `idx` and `vals` of x, the error of y where the decoder is known. BEYOND: x is not held by the product,
   NO_PRODUCT: there is none of this type here. */
int ggscope_read_row(struct reading * r) {
    r->found->state = read_row(r);
    return (int) r->found->state;
}
