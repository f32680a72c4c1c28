/* Which latents a row takes: an 8-bit product that leaves so few candidates that computing those exactly is cheap.
   x' = x / balance is rounded to sx (qx - e) and w' = w * balance to sw qw, with e a dither, as in `pre_acts.py`: then
   the error of sx (sw <qx, qw> - <w', e>) is a sum of D errors of variance sx^2 / 12 times w'^2 and sw^2 / 12 times
   (sx qx)^2. SIGMAS standard deviations of both on either side are taken as bounds; a latent whose upper bound is below
   the K-th largest lower bound is left out. */
#include "product.h"

#define HALVINGS 10
#define STEPS 126.0f /* of a row's largest value: with the dither 127 at most */
#define FINE 24000.0f /* a bound of all but the latents with the largest biases, in 16 bits */
#define EARLY 8 /* candidates whose weights are fetched ahead where there is no product to do it meanwhile */

#ifdef HAVE_INT8
/* The heights of tiles that run here, the fastest first; how many there are. */
int ggscope_tiles(int64_t * heights) {
    int count = 0;
#ifdef HAVE_AMX
    if (amx_permitted()) heights[count++] = TILE_AMX;
#endif
    heights[count++] = TILE_VNNI;
    return count;
}

static void quantise_row(const struct step * s, struct strip * b, float * restrict t, float most_norm, int64_t n, int r) {
    const float * restrict x = s->centred_ND + n * s->D;
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
    float inverse = b->finite[r] && most > 1e-30f ? STEPS / most : 0.0f;
    b->inverse[r] = inverse > 0 ? inverse : 1.0f;
    /* by Cauchy and Schwarz, but for the bias and rounding */
    float largest_bound = b->finite[r] ? norm * b->inverse[r] * most_norm : 0.0f;
    b->fine[r] = largest_bound > 1e-30f ? FINE / largest_bound : 1.0f;
    int64_t quads = (s->D + 3) / 4;
    for (int64_t j = s->D; j < 4 * quads; j++) t[j] = 0;
    for (int64_t j = 0; j < 4 * quads && !b->finite[r]; j++) t[j] = 0;
    int32_t * out = (int32_t *) (void *) b->q + r;
    __m512 square = _mm512_setzero_ps();
    for (int64_t j = 0; j < quads; j += 4) { /* four dwords at a time: 16 values to 16 bytes */
        int64_t left = quads - j < 4 ? quads - j : 4;
        __m512 v = _mm512_maskz_loadu_ps((__mmask16) ((1u << (4 * left)) - 1), t + 4 * j);
        __m512i q = _mm512_cvtps_epi32(_mm512_fmadd_ps(v, _mm512_set1_ps(inverse), _mm512_loadu_ps(s->dither_D + 4 * j)));
        __m512 whole = _mm512_cvtepi32_ps(q);
        square = _mm512_fmadd_ps(whole, whole, square);
        int32_t four[4];
        _mm_storeu_si128((__m128i *) four, _mm512_cvtepi32_epi8(_mm512_add_epi32(q, _mm512_set1_epi32(128))));
        for (int64_t i = 0; i < left; i++) out[(j + i) * STRIP] = four[i];
    }
    b->length[r] = sqrtf(_mm512_reduce_add_ps(square));
}

/* A bound that the largest lower bounds of at least K tiles reach, by bisection for 16 rows at once; 0 where fewer
   than K are positive: what is below zero makes no difference. */
static void bounds_to_reach(const struct step * s, struct strip * b, int half) {
    int64_t tiles = (s->F + s->tile - 1) / s->tile;
    const float * lower = b->lower_TR + 16 * half;
    __m512 low = _mm512_setzero_ps(), high = low;
    for (int64_t t = 0; t < tiles; t++) high = _mm512_max_ps(_mm512_loadu_ps(lower + t * STRIP), high);
    __m512i wanted = _mm512_set1_epi32((int) s->K), one = _mm512_set1_epi32(1);
    for (int round = 0; round < HALVINGS; round++) {
        __m512 middle = _mm512_mul_ps(_mm512_add_ps(low, high), _mm512_set1_ps(0.5f));
        __m512i count = _mm512_setzero_si512();
        for (int64_t t = 0; t < tiles; t++) {
            __mmask16 reaches = _mm512_cmp_ps_mask(_mm512_loadu_ps(lower + t * STRIP), middle, _CMP_GE_OQ);
            count = _mm512_mask_add_epi32(count, reaches, count, one);
        }
        __mmask16 enough = _mm512_cmpge_epi32_mask(count, wanted);
        low = _mm512_mask_mov_ps(low, enough, middle);
        high = _mm512_mask_mov_ps(middle, enough, high);
    }
    _mm512_storeu_ps(b->least + 16 * half, low);
}

/* Latents whose upper bound reaches what it has to on some row of the block, with those rows as masks, and how many
   each row has. */
static void find_candidates(const struct step * s, struct block * b) {
    __m512i least[MOST_STRIPS];
    uint32_t there[MOST_STRIPS] = {0};
    for (int64_t p = 0; p < b->num_strips; p++) {
        const struct strip * strip = b->strips + p;
        int16_t of_rows[STRIP];
        for (int r = 0; r < STRIP; r++) { /* not finite: no latent will do; the row's error is not finite either */
            of_rows[r] = (int16_t) floorf(fminf(fmaxf(strip->least[r] * strip->fine[r], 0), INT16_MAX));
            there[p] |= (uint32_t) strip->finite[r] << r;
        }
        least[p] = _mm512_loadu_si512(of_rows);
    }
    b->hits = 0;
    memset(b->found, 0, sizeof b->found);
    for (int64_t first = 0; first < s->F; first += INT16_MAX) { /* as many as the 16 bits of a row's count can hold */
        int64_t stop = first + INT16_MAX < s->F ? first + INT16_MAX : s->F;
        __m512i count[MOST_STRIPS] = {{0}}, one = _mm512_set1_epi16(1);
        for (int64_t i = first; i < stop; i++) {
            uint32_t any = 0;
            for (int64_t p = 0; p < b->num_strips; p++) {
                uint32_t rows = _mm512_cmpge_epi16_mask(_mm512_load_si512(b->strips[p].upper_FR + i * STRIP), least[p]);
                rows &= there[p];
                count[p] = _mm512_mask_add_epi16(count[p], rows, count[p], one);
                b->hit_rows_F[b->hits][p] = rows;
                any |= rows;
            }
            b->hit_latent_F[b->hits] = (int32_t) i;
            b->hits += any != 0;
        }
        for (int64_t p = 0; p < b->num_strips; p++) {
            int16_t of_rows[STRIP];
            _mm512_storeu_si512(of_rows, count[p]);
            for (int r = 0; r < STRIP; r++) b->found[STRIP * p + r] += of_rows[r];
        }
    }
}

/* Where the exact values of every row go. 0: done, -1: no memory. */
static int place_items(struct block * b) {
    int64_t total = 0, most = 0;
    for (int64_t r = 0; r < MOST_ROWS; r++) {
        b->at_item[r] = total;
        total += b->found[r];
        most = b->found[r] > most ? b->found[r] : most;
    }
    memset(b->found, 0, sizeof b->found);
    if (!b->items || total + most > b->room) { /* behind the items: room to choose among those of a row */
        free(b->items);
        b->room = 2 * total + most + 1;
        b->items = malloc(b->room * sizeof *b->items);
    }
    return b->items ? 0 : -1;
}

/* ---- the block before, a little after every tile ---- */

/* Exact values of candidate `hit` on its rows: a row of W_enc is fetched once for the block. */
static void exact_values(const struct step * s, struct block * b, int64_t hit) {
    int32_t latent = b->hit_latent_F[hit];
    const float *w = s->W_enc_FD + latent * s->D, *rows[4];
    float bias = s->b_enc_F[latent], value[4];
    int held = 0, of_rows[4];
    for (int64_t p = 0; p < b->num_strips; p++) {
        for (uint32_t left = b->hit_rows_F[hit][p]; left; left &= left - 1) {
            int r = (int) (STRIP * p) + __builtin_ctz(left);
            of_rows[held] = r;
            rows[held++] = s->centred_ND + (b->first + r) * s->D;
            if (held < 4) continue;
            dot4(w, rows, s->D, value);
            for (; held; held--) {
                r = of_rows[held - 1];
                b->items[b->at_item[r] + b->found[r]++] = ranked(order_key(value[held - 1] + bias), (uint32_t) latent);
            }
        }
    }
    for (; held; held--) {
        int r = of_rows[held - 1];
        float one = dot(w, rows[held - 1], s->D) + bias;
        b->items[b->at_item[r] + b->found[r]++] = ranked(order_key(one), (uint32_t) latent);
    }
}

static void choose(const struct step * s, struct block * b, int64_t r) {
    uint64_t * spare = b->items + b->room - b->found[r];
    s->candidates_N[b->first + r] = b->found[r];
    ggscope_choose(s, b->first + r, b->items + b->at_item[r], b->found[r], spare);
}

/* BatchTopK: what reaches s->least goes to the pool, a row's latents in their order. */
static void to_pool(const struct step * s, struct block * b) {
    for (int r = 0; r < b->rows; r++) {
        uint64_t * items = b->items + b->at_item[r];
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
static int rows_to_fetch(const struct step * s, struct block * b, const float ** rows, int at_once) {
    int count = 0;
    if (b->hit < b->hits) {
        for (; count < at_once && b->hit + count < b->hits; count++) {
            rows[count] = s->W_enc_FD + b->hit_latent_F[b->hit + count] * s->D;
        }
    } else if (b->at < b->rows) {
        int64_t row = b->first + b->at;
        if (b->slot == 0) choose(s, b, b->at);
        for (; count < at_once && b->slot + count < s->K; count++) {
            rows[count] = s->W_dec_FD + s->idx_P[row * s->K + b->slot + count] * s->D;
        }
    }
    for (int i = count; i < at_once; i++) rows[i] = s->W_enc_FD;
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

/* All that is left, where no product is there to fetch for it: each fetches for a later one. */
static void finish_block(const struct step * s, struct block * b) {
    if (b->hit < b->hits) {
        for (; b->hit < b->hits; b->hit++) {
            if (b->hit + EARLY < b->hits) prefetch_row(s->W_enc_FD + b->hit_latent_F[b->hit + EARLY] * s->D, s->D);
            exact_values(s, b, b->hit);
        }
        if (s->pool) to_pool(s, b);
    }
    if (b->at == b->rows) return;
    if (b->slot == 0) choose(s, b, b->at);
    for (b->slot = 0; b->at < b->rows; b->at++) {
        if (b->at + 1 < b->rows) {
            choose(s, b, b->at + 1);
            ggscope_fetch_decoder(s, b->first + b->at + 1);
        }
        ggscope_reconstruct(s, b->first + b->at);
    }
}

/* Strips of a block: as many as share a pass over the weights, while there are several blocks for every thread. */
static int64_t strips_of(const struct step * s) {
    int64_t strips = s->N / (4 * STRIP * s->threads);
    return strips < 1 ? 1 : strips > MOST_STRIPS ? MOST_STRIPS : strips;
}

static int64_t strip_bytes(const struct step * s) { return (s->D + 63) / 64 * 64 * STRIP; }

static int open_block(const struct step * s, struct block * b) {
    int64_t tiles = (s->F + s->tile - 1) / s->tile;
    int opened = 1;
    b->num_strips = strips_of(s);
    for (int64_t p = 0; p < b->num_strips; p++) {
        struct strip * strip = b->strips + p;
        strip->q = aligned_alloc(64, strip_bytes(s));
        strip->upper_FR = aligned_alloc(64, s->F * STRIP * sizeof *strip->upper_FR);
        strip->lower_TR = aligned_alloc(64, (tiles + 1) * STRIP * sizeof(float)); /* one more: tiles may come in pairs */
        opened = opened && strip->q && strip->upper_FR && strip->lower_TR;
    }
    b->hit_latent_F = malloc((s->F + 1) * sizeof *b->hit_latent_F);
    b->hit_rows_F = malloc((s->F + 1) * sizeof *b->hit_rows_F);
    b->row = malloc((s->D + LANES) * sizeof(float));
    b->sums = aligned_alloc(64, 2 * TILE_AMX * STRIP * sizeof(int32_t));
    return opened && b->hit_latent_F && b->hit_rows_F && b->row && b->sums;
}

static void close_block(struct block * b) {
    for (int64_t p = 0; p < b->num_strips; p++) {
        free(b->strips[p].q);
        free(b->strips[p].upper_FR);
        free(b->strips[p].lower_TR);
    }
    free(b->hit_latent_F);
    free(b->hit_rows_F);
    free(b->items);
    free(b->row);
    free(b->sums);
}

static void open_strip(const struct step * s, struct block * b, int64_t p, int64_t first, int64_t rows) {
    struct strip * strip = b->strips + p;
    strip->dead_MR = s->auxk_memory ? (uint16_t *) s->auxk_memory + first * auxk_latents(s) : NULL;
    memset(strip->q, 128, strip_bytes(s));
    for (int r = 0; r < STRIP; r++) strip->inverse[r] = strip->length[r] = strip->fine[r] = 1, strip->finite[r] = 0;
    for (int r = 0; r < rows; r++) {
        const float * restrict u = s->u_ND + (first + r) * s->D;
        float * restrict centred = s->centred_ND + (first + r) * s->D;
        for (int64_t j = 0; j < s->D; j++) centred[j] = u[j] - s->b_dec_D[j];
        quantise_row(s, strip, b->row, b->norm, first + r, r);
    }
}

/* The next tile, or two of them, with all strips; returns how many. */
static int64_t bounds_of_tiles(const struct step * s, struct block * b, int64_t tile, const float ** rows, int count) {
    (void) count;
    for (int64_t p = 0; p < b->num_strips; p++) {
#ifdef HAVE_AMX
        if (s->tile == TILE_AMX) {
            int first = (int) p * FETCHED_AMX, some = count - first < FETCHED_AMX ? count - first : FETCHED_AMX;
            bounds_of_tiles_amx(s, b->strips + p, tile, rows + first, some, b->sums);
            continue;
        }
#endif
        bounds_of_tile_vnni(s, b->strips + p, tile, rows + p * FETCHED_VNNI);
    }
    return s->tile == TILE_AMX ? 2 : 1;
}

/* The candidates of a block, and the rest of the block before. 0: done, -1: no memory. */
static int block_of_rows(const struct step * s, struct block * b, int64_t first) {
    int64_t rows = s->N - first < STRIP * b->num_strips ? s->N - first : STRIP * b->num_strips;
    for (int64_t p = 0; p < b->num_strips; p++) {
        int64_t left = rows - STRIP * p;
        open_strip(s, b, p, first + STRIP * p, left < STRIP ? left : STRIP);
    }
    const float * fetched[MOST_FETCHED];
    int at_once = (int) b->num_strips * (s->tile == TILE_AMX ? FETCHED_AMX : FETCHED_VNNI);
    for (int64_t t = 0; t < (s->F + s->tile - 1) / s->tile;) {
        int count = rows_to_fetch(s, b, fetched, at_once);
        t += bounds_of_tiles(s, b, t, fetched, count);
        use_rows(s, b, count);
    }
    finish_block(s, b);
    for (int64_t p = 0; p < b->num_strips; p++) {
        struct strip * strip = b->strips + p;
        if (s->pool) {
            for (int r = 0; r < STRIP; r++) strip->least[r] = s->least * strip->inverse[r];
        } else {
            bounds_to_reach(s, strip, 0);
            bounds_to_reach(s, strip, 1);
        }
    }
    find_candidates(s, b);
    b->first = first;
    b->rows = rows;
    b->hit = b->slot = 0;
    b->at = s->pool ? rows : 0; /* BatchTopK reconstructs when all rows have been seen */
    return place_items(b);
}

/* TopK: everything that goes row by row, latents chosen by their exact float32 values. BatchTopK: the pool; where
   pool_used says more than there is room for, it is not whole. 0: done, -1: no memory. */
int ggscope_rows_int8(const struct step * s) {
    int failed = 0;
    int64_t stride = STRIP * strips_of(s);
    float norm = 0;
    for (int64_t i = 0; i < s->F; i++) {
        if (isfinite(s->q_norm_F[i]) && s->q_norm_F[i] > norm) norm = s->q_norm_F[i];
    }
    if (s->pool) {
        *s->pool_used = 0;
        memset(s->pool_count_N, 0, s->N * sizeof *s->pool_count_N);
        memset(s->candidates_N, 0, s->N * sizeof *s->candidates_N);
    }
#pragma omp parallel num_threads((int) s->threads)
    {
        struct block b = {.norm = norm};
        int opened = open_block(s, &b);
#ifdef HAVE_AMX
        struct tile_config before;
        if (s->tile == TILE_AMX) open_amx(&before);
#endif
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t first = 0; first < s->N; first += stride) {
            if (opened) opened = block_of_rows(s, &b, first) == 0;
        }
        if (opened) {
            finish_block(s, &b);
        } else {
#pragma omp atomic write
            failed = -1;
        }
#ifdef HAVE_AMX
        if (s->tile == TILE_AMX) close_amx(&before);
#endif
        close_block(&b);
    }
    return failed;
}
#else
int ggscope_tiles(int64_t * heights) {
    (void) heights;
    return 0;
}
int ggscope_rows_int8(const struct step * s) {
    (void) s;
    return -2;
}
#endif
