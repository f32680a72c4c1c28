/* Which latents a row takes: an 8-bit product that leaves so few candidates that computing those exactly is cheap.
   With x' = x / balance and w' = w * balance rounded to sx qx and sw qw, the error of sx sw <qx, qw> is a sum of D
   rounding errors of variance sx^2 / 12 times w'^2 and sw^2 / 12 times x'^2. SIGMAS standard deviations of it on
   either side are taken as bounds; a latent whose upper bound is below the K-th largest lower bound is left out. */
#include "vectors.h"

#define BLOCK 32 /* rows of one register tile */
#define SIGMAS 4.0f
#define HALVINGS 10
#define APART 24 /* items between the rows' lists: a power of two would put them all into one set of the cache */
#define FETCHED 4 /* rows of the weights that come in while a tile is multiplied: a line of 16 floats every 4 columns */

#if defined(__AVX512VNNI__) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__GNUC__)
#define HAVE_INT8 1

struct block {
    uint8_t * q;       /* (D / 4, BLOCK, 4) */
    float * upper_FB;  /* upper bounds of the pre-activations, divided by the row's scale */
    float * lower_TB;  /* the largest lower bound of every tile */
    int32_t * hit_latent_F; /* candidates, and on which rows they are */
    uint32_t * hit_rows_F;
    uint64_t * items_BF; /* their exact values; room for twice F a row */
    int64_t found[BLOCK];
    float inverse[BLOCK], ratio[BLOCK], least[BLOCK]; /* 1 / sx; ||x'|| / sx; the bound to reach */
    int finite[BLOCK];
    float * row;
    /* What is left to do for the block before this one, whose candidates are known */
    int64_t first, rows, hits; /* its first row, its rows and its candidates */
    int64_t hit;               /* the candidate whose exact values come next */
    int64_t at, slot;          /* then, the row that is reconstructed next, and which of its latents is fetched next */
};

int ggscope_has_int8(void) { return 1; }

static void quantise_row(const struct step * s, struct block * b, int64_t n, int r) {
    const float * restrict x = s->centred_ND + n * s->D;
    float * restrict t = b->row;
    int32_t largest = 0;
    for (int64_t j = 0; j < s->D; j++) t[j] = x[j] / s->balance_D[j];
    const int32_t * bits = (const int32_t *) (const void *) t;
    for (int64_t j = 0; j < s->D; j++) {
        int32_t size = bits[j] & INT32_MAX;
        largest = size > largest ? size : largest;
    }
    float most, norm = sqrtf(dot(t, t, s->D));
    memcpy(&most, &largest, sizeof most);
    b->finite[r] = isfinite(norm) && isfinite(most);
    float inverse = b->finite[r] && most > 1e-30f ? 127.0f / most : 0.0f;
    b->inverse[r] = inverse > 0 ? inverse : 1.0f;
    b->ratio[r] = b->finite[r] ? norm * b->inverse[r] : 0.0f;
    int64_t quads = (s->D + 3) / 4;
    for (int64_t j = s->D; j < 4 * quads; j++) t[j] = 0;
    for (int64_t j = 0; j < 4 * quads && !b->finite[r]; j++) t[j] = 0;
    int32_t * out = (int32_t *) (void *) b->q + r;
    for (int64_t j = 0; j < quads; j += 4) { /* four dwords at a time: 16 values to 16 bytes */
        int64_t left = quads - j < 4 ? quads - j : 4;
        __m512 v = _mm512_maskz_loadu_ps((__mmask16) ((1u << (4 * left)) - 1), t + 4 * j);
        __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(v, _mm512_set1_ps(inverse))), _mm512_set1_epi32(128));
        int32_t four[4];
        _mm_storeu_si128((__m128i *) four, _mm512_cvtepi32_epi8(q));
        for (int64_t i = 0; i < left; i++) out[(j + i) * BLOCK] = four[i];
    }
}

/* GCC's intrinsic copies the accumulators to the stack and back in this loop: half the speed */
#define DOT4(acc, x, w) __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w))

/* Meanwhile FETCHED rows of D floats, `rows`, come into the cache: the product leaves the memory idle. */
static void bounds_of_tile(const struct step * s, struct block * b, int64_t tile, const float * const * rows) {
    int64_t quads = (s->D + 3) / 4, first = tile * TILE;
    const int8_t * w = s->q_tiles + tile * quads * TILE * 4;
    const uint8_t * x = b->q;
    __m512i left[TILE], right[TILE];
    _Pragma("GCC unroll 12")
    for (int r = 0; r < TILE; r++) {
        left[r] = right[r] = _mm512_set1_epi32(s->q_offset_F[first + r]);
    }
    for (int part = 0; part < FETCHED; part++) {
        const char * ahead = (const char *) rows[part];
        int64_t stop = (part + 1) * quads / FETCHED;
        for (int64_t j = part * quads / FETCHED; j < stop; j++, x += 128, w += 4 * TILE, ahead += 64) {
            __m512i x0 = _mm512_load_si512(x), x1 = _mm512_load_si512(x + 64);
            _mm_prefetch((const char *) w + 4096, _MM_HINT_T0);
            _mm_prefetch(ahead, _MM_HINT_T0);
            _Pragma("GCC unroll 12")
            for (int r = 0; r < TILE; r++) {
                int32_t four;
                memcpy(&four, w + 4 * r, sizeof four);
                __m512i w16 = _mm512_set1_epi32(four);
                DOT4(left[r], x0, w16);
                DOT4(right[r], x1, w16);
            }
        }
    }
    const float root12 = 3.4641016f;
    __m512 inverse0 = _mm512_loadu_ps(b->inverse), inverse1 = _mm512_loadu_ps(b->inverse + 16);
    __m512 ratio0 = _mm512_loadu_ps(b->ratio), ratio1 = _mm512_loadu_ps(b->ratio + 16);
    __m512 top0 = _mm512_set1_ps(-INFINITY), top1 = top0;
    _Pragma("GCC unroll 12")
    for (int r = 0; r < TILE; r++) {
        int64_t i = first + r;
        if (i >= s->F) break;
        __m512 scale = _mm512_set1_ps(s->q_scale_F[i]), bias = _mm512_set1_ps(s->b_enc_F[i]);
        __m512 of_x = _mm512_set1_ps(SIGMAS / root12 * s->q_norm_F[i]), of_w = _mm512_set1_ps(SIGMAS / root12 * s->q_scale_F[i]);
        __m512 value0 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(left[r]), scale, _mm512_mul_ps(bias, inverse0));
        __m512 value1 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(right[r]), scale, _mm512_mul_ps(bias, inverse1));
        __m512 error0 = _mm512_fmadd_ps(ratio0, of_w, of_x), error1 = _mm512_fmadd_ps(ratio1, of_w, of_x);
        top0 = _mm512_max_ps(_mm512_sub_ps(value0, error0), top0); /* NaN leaves top as it is */
        top1 = _mm512_max_ps(_mm512_sub_ps(value1, error1), top1);
        _mm512_storeu_ps(b->upper_FB + i * BLOCK, _mm512_add_ps(value0, error0));
        _mm512_storeu_ps(b->upper_FB + i * BLOCK + 16, _mm512_add_ps(value1, error1));
    }
    _mm512_storeu_ps(b->lower_TB + tile * BLOCK, top0);
    _mm512_storeu_ps(b->lower_TB + tile * BLOCK + 16, top1);
}

/* A bound that the largest lower bounds of at least K tiles reach, by bisection for 16 rows at once; 0 where fewer
   than K are positive: what is below zero makes no difference. */
static void bounds_to_reach(const struct step * s, struct block * b, int half) {
    int64_t tiles = (s->F + TILE - 1) / TILE;
    const float * lower = b->lower_TB + 16 * half;
    __m512 low = _mm512_setzero_ps(), high = low;
    for (int64_t t = 0; t < tiles; t++) high = _mm512_max_ps(_mm512_loadu_ps(lower + t * BLOCK), high);
    __m512i wanted = _mm512_set1_epi32((int) s->K), one = _mm512_set1_epi32(1);
    for (int round = 0; round < HALVINGS; round++) {
        __m512 middle = _mm512_mul_ps(_mm512_add_ps(low, high), _mm512_set1_ps(0.5f));
        __m512i count = _mm512_setzero_si512();
        for (int64_t t = 0; t < tiles; t++) {
            __mmask16 reaches = _mm512_cmp_ps_mask(_mm512_loadu_ps(lower + t * BLOCK), middle, _CMP_GE_OQ);
            count = _mm512_mask_add_epi32(count, reaches, count, one);
        }
        __mmask16 enough = _mm512_cmpge_epi32_mask(count, wanted);
        low = _mm512_mask_mov_ps(low, enough, middle);
        high = _mm512_mask_mov_ps(middle, enough, high);
    }
    _mm512_storeu_ps(b->least + 16 * half, low);
}

/* Latents whose upper bound reaches what it has to on some row of the block, with those rows as a mask. */
static int64_t find_candidates(const struct step * s, struct block * b) {
    __m512 least0 = _mm512_loadu_ps(b->least), least1 = _mm512_loadu_ps(b->least + 16);
    int64_t hits = 0;
    for (int64_t i = 0; i < s->F; i++) {
        const float * upper = b->upper_FB + i * BLOCK;
        /* "not less", so that a latent with NaN weights is looked at, and stops the run as it does elsewhere */
        uint32_t rows = _mm512_cmp_ps_mask(_mm512_loadu_ps(upper), least0, _CMP_NLT_UQ);
        rows |= (uint32_t) _mm512_cmp_ps_mask(_mm512_loadu_ps(upper + 16), least1, _CMP_NLT_UQ) << 16;
        b->hit_latent_F[hits] = (int32_t) i;
        b->hit_rows_F[hits] = rows;
        hits += rows != 0;
    }
    return hits;
}

static uint64_t * items_of(const struct step * s, struct block * b, int r) {
    return b->items_BF + r * (2 * s->F + APART);
}

/* ---- the block before, a little after every tile ---- */

/* Exact values of candidate `hit` on its rows: a row of W_enc is fetched once for the block. */
static void exact_values(const struct step * s, struct block * b, int64_t hit) {
    uint32_t there = b->rows < BLOCK ? (1u << b->rows) - 1 : UINT32_MAX;
    for (uint32_t left = b->hit_rows_F[hit] & there; left; left &= left - 1) {
        int r = __builtin_ctz(left);
        items_of(s, b, r)[b->found[r]++] = exact_item(s, b->first + r, b->hit_latent_F[hit]);
    }
}

/* BatchTopK: what reaches s->least goes to the pool, a row's latents in their order. */
static void to_pool(const struct step * s, struct block * b) {
    for (int r = 0; r < b->rows; r++) {
        uint64_t * items = items_of(s, b, r);
        int64_t count = 0, row = b->first + r, at;
        for (int64_t c = 0; c < b->found[r]; c++) {
            items[count] = items[c];
            count += ranked_key(items[c]) >= order_key(s->least);
        }
        s->candidates_N[row] = b->found[r];
#pragma omp atomic capture
        {
            at = *s->pool_used;
            *s->pool_used += count;
        }
        s->pool_at_N[row] = at;
        s->pool_count_N[row] = count;
        if (at + count <= s->pool_capacity) memcpy(s->pool + at, items, count * sizeof *items);
    }
}

/* The next rows of the weights to be fetched; returns how many, the others are any address. Once the exact values are
   there, a row's latents are chosen when the first of them is fetched. */
static int rows_to_fetch(const struct step * s, struct block * b, const float ** rows) {
    int count = 0;
    if (b->hit < b->hits) {
        for (; count < FETCHED && b->hit + count < b->hits; count++) {
            rows[count] = s->W_enc_FD + b->hit_latent_F[b->hit + count] * s->D;
        }
    } else if (b->at < b->rows) {
        int64_t row = b->first + b->at;
        if (b->slot == 0) {
            s->candidates_N[row] = b->found[b->at];
            ggscope_choose(s, row, items_of(s, b, (int) b->at), b->found[b->at]);
        }
        for (; count < FETCHED && b->slot + count < s->K; count++) {
            rows[count] = s->W_dec_FD + s->idx_P[row * s->K + b->slot + count] * s->D;
        }
    }
    for (int i = count; i < FETCHED; i++) rows[i] = s->W_enc_FD;
    return count;
}

/* Work with the rows that were fetched. */
static void use_rows(const struct step * s, struct block * b, int count) {
    if (b->hit < b->hits) {
        for (int i = 0; i < count; i++) exact_values(s, b, b->hit++);
        if (s->pool && b->hit == b->hits) to_pool(s, b);
    } else if (b->at < b->rows) {
        b->slot += count;
        if (b->slot == s->K) {
            ggscope_reconstruct(s, b->first + b->at++);
            b->slot = 0;
        }
    }
}

static void finish_block(const struct step * s, struct block * b) {
    const float * rows[FETCHED];
    while (b->hit < b->hits || b->at < b->rows) {
        int count = rows_to_fetch(s, b, rows);
        for (int i = 0; i < count; i++) prefetch_row(rows[i], s->D);
        use_rows(s, b, count);
    }
}

static int open_block(const struct step * s, struct block * b) {
    int64_t quads = (s->D + 3) / 4, tiles = (s->F + TILE - 1) / TILE;
    b->q = aligned_alloc(64, quads * BLOCK * 4);
    b->upper_FB = aligned_alloc(64, tiles * TILE * BLOCK * sizeof(float));
    b->lower_TB = aligned_alloc(64, tiles * BLOCK * sizeof(float));
    b->hit_latent_F = malloc(s->F * sizeof(int32_t));
    b->hit_rows_F = malloc(s->F * sizeof(uint32_t));
    b->items_BF = malloc(BLOCK * (2 * s->F + APART) * sizeof(uint64_t)); /* little of it is ever touched */
    b->row = malloc((s->D + LANES) * sizeof(float));
    return b->q && b->upper_FB && b->lower_TB && b->hit_latent_F && b->hit_rows_F && b->items_BF && b->row;
}

static void close_block(struct block * b) {
    free(b->q);
    free(b->upper_FB);
    free(b->lower_TB);
    free(b->hit_latent_F);
    free(b->hit_rows_F);
    free(b->items_BF);
    free(b->row);
}

/* The candidates of a block, and the rest of the block before. */
static void block_of_rows(const struct step * s, struct block * b, int64_t first) {
    int64_t rows = s->N - first < BLOCK ? s->N - first : BLOCK, tiles = (s->F + TILE - 1) / TILE;
    memset(b->q, 128, (s->D + 3) / 4 * BLOCK * 4);
    for (int r = 0; r < BLOCK; r++) b->inverse[r] = b->ratio[r] = 1, b->finite[r] = 0;
    for (int r = 0; r < rows; r++) {
        const float * restrict u = s->u_ND + (first + r) * s->D;
        float * restrict centred = s->centred_ND + (first + r) * s->D;
        for (int64_t j = 0; j < s->D; j++) centred[j] = u[j] - s->b_dec_D[j];
        quantise_row(s, b, first + r, r);
    }
    const float * fetched[FETCHED];
    for (int64_t t = 0; t < tiles; t++) {
        int count = rows_to_fetch(s, b, fetched);
        bounds_of_tile(s, b, t, fetched);
        use_rows(s, b, count);
    }
    finish_block(s, b);
    if (s->pool) {
        for (int r = 0; r < BLOCK; r++) b->least[r] = s->least * b->inverse[r];
    } else {
        bounds_to_reach(s, b, 0);
        bounds_to_reach(s, b, 1);
    }
    for (int r = 0; r < BLOCK; r++) {
        if (!b->finite[r]) b->least[r] = INFINITY; /* no latent will do; the row's error is not finite either */
    }
    b->hits = find_candidates(s, b);
    b->first = first;
    b->rows = rows;
    b->hit = b->slot = 0;
    b->at = s->pool ? rows : 0; /* BatchTopK reconstructs when all rows have been seen */
    memset(b->found, 0, sizeof b->found);
}

/* TopK: everything that goes row by row, latents chosen by their exact float32 values. BatchTopK: the pool; where
   pool_used says more than there is room for, it is not whole. 0: done, -1: no memory. */
int ggscope_rows_int8(const struct step * s) {
    int failed = 0;
    if (s->pool) {
        *s->pool_used = 0;
        memset(s->pool_count_N, 0, s->N * sizeof *s->pool_count_N);
        memset(s->candidates_N, 0, s->N * sizeof *s->candidates_N);
    }
#pragma omp parallel num_threads((int) s->threads)
    {
        struct block b = {0};
        int opened = open_block(s, &b);
        if (!opened) {
#pragma omp atomic write
            failed = -1;
        }
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t first = 0; first < s->N; first += BLOCK) {
            if (opened) block_of_rows(s, &b, first);
        }
        if (opened) finish_block(s, &b);
        close_block(&b);
    }
    return failed;
}
#else
int ggscope_has_int8(void) { return 0; }
int ggscope_rows_int8(const struct step * s) {
    (void) s;
    return -2;
}
#endif
