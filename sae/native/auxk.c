/* AuxK of a batch in 8 bits: its gradients for the M dead latents, where their pre-activations are there from the search
   for the candidates (product.h). Four products are left; with e the error u_hat - u and ^ for rounded to 8 bits:

       rest = acts^ W_dec^ + e     da = rest^ W_dec^T where acts > 0     dW_enc = da^T x^     dW_dec = acts^T rest^

   The first two go by blocks of rows that stay in cache; the last two by latents, so that every scale is that of a
   latent or of a column, and those of the rows are part of what is rounded. */
#include "rounded.h"
#include <float.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#ifdef HAVE_INT8
#define BLOCK UNIT    /* rows: whole tiles and whole panels */
#define CHUNK 128     /* quads of rows: a panel of so many stays in L1 */
#define SCATTER_LEAST 1e-6 /* of the squares: errors that are all alike leave nothing but rounding */
#define MOST_GROUP 6  /* tiles of latents that share a pass over the rows */

struct auxk {
    int64_t strips, tiles, latents, width, group; /* latents and width (of D) with the zeros beyond them */
    uint16_t *acts, *grads;    /* bfloat16, (strips, latents, 32); acts: first the pre-activations */
    uint8_t *x, *rest, *dec;   /* panels: columns are those of D, quads are of rows, rows, latents */
    int32_t *dec_tiles, *acts_tiles, *grads_tiles; /* tiles: rows are latents, quads of columns, rows, rows */
    float *dec_scale, *acts_scale, *grads_scale;
    int32_t *dec_start, *acts_start, *grads_start; /* -128 sum(w) */
    float *x_scale, *rest_scale, *inverse; /* inverse: of the balance, by which x is divided */
    float * turns;             /* of rows, and of latents */
    double * square;           /* ||rest||^2 of every row */
    float factor;              /* of all gradients */
    char * threads;            /* memory of the threads, `each` bytes for one */
    int64_t each;
};

struct scratch {
    float *rest, *x, *acts, *grads; /* (BLOCK, width), (4, width), a latent's rows */
    int32_t *acts_tiles, *panels;   /* of a block: rows are its rows, quads of latents; columns its rows, quads of D */
    int32_t *sums, *out;            /* (MOST_GROUP * 12, width), (12, 32) */
};

static void * place(char ** at, int64_t bytes) {
    char * here = *at;
    *at += (bytes + 63) / 64 * 64;
    return here;
}

/* Where everything is in s->auxk_memory; returns how many bytes that has to have. */
static int64_t lay_out(const struct step * s, struct auxk * a) {
    char * at = s->auxk_memory;
    a->strips = (s->N + STRIP - 1) / STRIP;
    a->latents = auxk_latents(s);
    a->tiles = a->latents / TILE_VNNI;
    a->width = (s->D + PANEL - 1) / PANEL * PANEL;
    a->group = a->tiles / (2 * s->threads); /* several for every thread */
    a->group = a->group < 1 ? 1 : a->group > MOST_GROUP ? MOST_GROUP : a->group;
    int64_t rows = a->strips * STRIP, latents = a->latents, width = a->width;
    a->acts = place(&at, rows * latents * 2); /* where product.h puts the pre-activations */
    a->grads = place(&at, rows * latents * 2);
    a->x = place(&at, rows * width);
    a->rest = place(&at, rows * width);
    a->dec = place(&at, latents * width);
    a->dec_tiles = place(&at, latents * width);
    a->acts_tiles = place(&at, latents * rows);
    a->grads_tiles = place(&at, latents * rows);
    a->dec_scale = place(&at, latents * 4);
    a->acts_scale = place(&at, latents * 4);
    a->grads_scale = place(&at, latents * 4);
    a->dec_start = place(&at, latents * 4);
    a->acts_start = place(&at, latents * 4);
    a->grads_start = place(&at, latents * 4);
    a->x_scale = place(&at, rows * 4);
    a->rest_scale = place(&at, rows * 4);
    a->inverse = place(&at, width * 4);
    a->square = place(&at, rows * 8);
    a->turns = place(&at, (rows > latents ? rows : latents) * 4);
    a->each = BLOCK * width * 4 + 4 * width * 4 + 2 * rows * 4 + BLOCK * latents + BLOCK * width +
              MOST_GROUP * TILE_VNNI * width * 4 + TILE_VNNI * PANEL * 4; /* whole lines, all of them */
    a->threads = place(&at, s->threads * a->each);
    return at - (char *) s->auxk_memory;
}

static struct scratch scratch_of(const struct auxk * a, int thread) {
    char * at = a->threads + thread * a->each;
    struct scratch t;
    t.rest = place(&at, BLOCK * a->width * 4);
    t.x = place(&at, 4 * a->width * 4);
    t.acts = place(&at, a->strips * STRIP * 4);
    t.grads = place(&at, a->strips * STRIP * 4);
    t.acts_tiles = place(&at, BLOCK * a->latents);
    t.panels = place(&at, BLOCK * a->width);
    t.sums = place(&at, MOST_GROUP * TILE_VNNI * a->width * 4);
    t.out = place(&at, TILE_VNNI * PANEL * 4);
    return t;
}

int64_t ggscope_auxk_bytes(const struct step * s) {
    struct auxk a;
    return lay_out(s, &a);
}

/* Four dead latents' decoder rows. */
static void pack_decoder(const struct step * s, const struct auxk * a, float * rows, int64_t m) {
    const float half[4] = {0.5f, 0.5f, 0.5f, 0.5f};
    int32_t * own[4];
    memset(rows, 0, 4 * a->width * sizeof *rows);
    for (int i = 0; i < 4; i++) {
        if (m + i < s->M) memcpy(rows + i * a->width, s->W_dec_FD + s->dead_M[m + i] * s->D, s->D * sizeof *rows);
        own[i] = a->dec_tiles + (m + i) / TILE_VNNI * (a->width / 4) * TILE_VNNI + (m + i) % TILE_VNNI;
    }
    pack_rows(rows, a->width, half, a->dec_scale + m, a->dec, a->latents / 4, m / 4, own, TILE_VNNI, (int32_t) 0x80808080,
              a->dec_start + m);
}

/* ReLU, and all but the k largest of every row to zero, for the 32 rows of a strip; of equal ones the first stay. */
static void keep_largest(uint16_t * acts, int64_t latents, int64_t k) {
    const __m512i zero = _mm512_setzero_si512(), one = _mm512_set1_epi16(1), wanted = _mm512_set1_epi16((short) k);
    __m512i count = zero, kth = zero;
    for (int64_t m = 0; m < latents; m++) {
        __m512i v = _mm512_max_epi16(_mm512_load_si512(acts + m * STRIP), zero);
        _mm512_store_si512(acts + m * STRIP, v);
        count = _mm512_mask_add_epi16(count, _mm512_test_epi16_mask(v, v), count, one);
    }
    if (!_mm512_cmpgt_epi16_mask(count, wanted)) return;
    for (int bit = 14; bit >= 0; bit--) { /* the k-th largest, bit by bit */
        __m512i tried = _mm512_or_si512(kth, _mm512_set1_epi16((short) (1 << bit)));
        count = zero;
        for (int64_t m = 0; m < latents; m++) {
            __mmask32 reaches = _mm512_cmpge_epi16_mask(_mm512_load_si512(acts + m * STRIP), tried);
            count = _mm512_mask_add_epi16(count, reaches, count, one);
        }
        kth = _mm512_mask_mov_epi16(kth, _mm512_cmpge_epi16_mask(count, wanted), tried);
    }
    __m512i room = wanted; /* for those as large as the k-th */
    for (int64_t m = 0; m < latents; m++) {
        __mmask32 above = _mm512_cmpgt_epi16_mask(_mm512_load_si512(acts + m * STRIP), kth);
        room = _mm512_mask_sub_epi16(room, above, room, one);
    }
    for (int64_t m = 0; m < latents; m++) {
        __m512i v = _mm512_load_si512(acts + m * STRIP);
        __mmask32 equal = _mm512_cmpeq_epi16_mask(v, kth) & _mm512_cmpgt_epi16_mask(room, zero);
        room = _mm512_mask_sub_epi16(room, equal, room, one);
        _mm512_store_si512(acts + m * STRIP, _mm512_maskz_mov_epi16(equal | _mm512_cmpgt_epi16_mask(v, kth), v));
    }
}

/* A strip's activations times the decoder's scales, with a scale for every row, as tiles from row `first` of the block. */
static void pack_acts(const struct auxk * a, const uint16_t * acts, int32_t * tiles, int64_t first, float * scale, int32_t * start) {
    int64_t quads = a->latents / 4;
    for (int half = 0; half < 2; half++, acts += 16) {
        __m512 most = _mm512_setzero_ps();
        __m512i sum = _mm512_setzero_si512();
        for (int64_t m = 0; m < a->latents; m++) {
            most = _mm512_max_ps(_mm512_mul_ps(from_bf16(acts + m * STRIP), _mm512_set1_ps(a->dec_scale[m])), most);
        }
        __mmask16 some = _mm512_cmp_ps_mask(most, _mm512_set1_ps(1e-30f), _CMP_GT_OQ);
        __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(LEVELS), most);
        _mm512_storeu_ps(scale + 16 * half, _mm512_div_ps(most, _mm512_set1_ps(LEVELS)));
        for (int64_t j = 0; j < quads; j++) {
            __m512i four = _mm512_setzero_si512();
            int32_t of_rows[16];
            for (int i = 0; i < 4; i++) {
                __m512 v = _mm512_mul_ps(from_bf16(acts + (4 * j + i) * STRIP), _mm512_set1_ps(a->dec_scale[4 * j + i]));
                __m512i q = _mm512_cvttps_epi32(_mm512_fmadd_ps(v, inverse, _mm512_set1_ps(a->turns[4 * j + i])));
                sum = _mm512_add_epi32(sum, q);
                four = _mm512_or_si512(four, _mm512_slli_epi32(q, 8 * i));
            }
            _mm512_storeu_si512(of_rows, four);
            for (int r = 0; r < 16; r++) {
                int64_t row = first + 16 * half + r;
                tiles[(row / TILE_VNNI * quads + j) * TILE_VNNI + row % TILE_VNNI] = of_rows[r];
            }
        }
        _mm512_storeu_si512(start + 16 * half, _mm512_mullo_epi32(sum, _mm512_set1_epi32(-128)));
    }
}

/* What is left of the error in a block of rows: the square of every row, and the panels of it and of x. */
static void rest_of_block(const struct step * s, const struct auxk * a, const struct scratch * t, int64_t first, int64_t rows) {
    const __m512 unit = _mm512_set1_ps((float) s->N / 2); /* grad_ND is 2/N times the error */
    float scale[BLOCK];
    int32_t start[BLOCK + TILE_VNNI] = {0};
    int64_t quads = a->latents / 4, row_quads = a->strips * STRIP / 4;
    for (int64_t r = 0; r < rows; r += STRIP) {
        uint16_t * acts = a->acts + (first + r) * a->latents;
        memset(acts + s->M * STRIP, 0, (a->latents - s->M) * STRIP * sizeof *acts);
        keep_largest(acts, a->latents, s->auxk_k);
        pack_acts(a, acts, t->acts_tiles, r, scale + r, start + r);
    }
    for (int64_t d = 0; d < a->width; d += PANEL) {
        __mmask32 there = s->D - d >= PANEL ? UINT32_MAX : (1u << (s->D - d)) - 1;
        for (int64_t tile = 0; tile * TILE_VNNI < rows; tile++) {
            for (int64_t r = tile * TILE_VNNI; r < (tile + 1) * TILE_VNNI && r < rows; r++) {
                prefetch_row(s->grad_ND + (first + r) * s->D + d, PANEL);
                prefetch_row(s->centred_ND + (first + r) * s->D + d, PANEL);
            }
            start_at(t->out, start + tile * TILE_VNNI);
            multiply(t->acts_tiles + tile * quads * TILE_VNNI, a->dec + d * quads * 4, quads, t->out, PANEL);
            for (int64_t r = tile * TILE_VNNI; r < (tile + 1) * TILE_VNNI && r < rows; r++) {
                const float * error = s->grad_ND + (first + r) * s->D + d;
                for (int h = 0; h < 2; h++) {
                    __m512 e = _mm512_maskz_loadu_ps((__mmask16) (there >> (16 * h)), error + 16 * h);
                    __m512 v = _mm512_cvtepi32_ps(_mm512_load_si512(t->out + (r - tile * TILE_VNNI) * PANEL + 16 * h));
                    v = _mm512_fmadd_ps(v, _mm512_set1_ps(scale[r]), _mm512_mul_ps(e, unit));
                    _mm512_store_ps(t->rest + r * a->width + d + 16 * h, v);
                }
            }
        }
    }
    for (int64_t r = 0; r < (rows + STRIP - 1) / STRIP * STRIP; r += 4) {
        float turns[4], x_turns[4];
        int32_t * own[4];
        memset(t->x, 0, 4 * a->width * sizeof *t->x);
        for (int64_t i = 0; i < 4; i++) {
            int64_t n = first + r + i;
            double square = 0;
            turns[i] = turn(n, 0.6180339887);
            x_turns[i] = turn(n, 0.7548776662);
            own[i] = t->panels + (r + i) / STRIP * a->width / 4 * STRIP + (r + i) % STRIP;
            if (r + i >= rows) {
                memset(t->rest + (r + i) * a->width, 0, a->width * sizeof *t->rest);
                continue;
            }
            for (int64_t j = 0; j < s->D; j++) t->x[i * a->width + j] = s->centred_ND[n * s->D + j] * a->inverse[j];
            for (int64_t j = 0; j < a->width; j += 256) { /* float32 within a stretch, float64 between them */
                const float * rest = t->rest + (r + i) * a->width + j;
                square += dot(rest, rest, a->width - j < 256 ? a->width - j : 256);
            }
            a->square[n] = square;
        }
        int64_t quad = (first + r) / 4;
        pack_rows(t->x, a->width, x_turns, a->x_scale + 4 * quad, a->x, row_quads, quad, NULL, 0, 0, NULL);
        pack_rows(t->rest + r * a->width, a->width, turns, a->rest_scale + 4 * quad, a->rest, row_quads, quad, own, STRIP, 0, NULL);
    }
}

/* The gradients of a block's activations. */
static void grads_of_block(const struct auxk * a, const struct scratch * t, int64_t first, int64_t rows) {
    int64_t quads = a->width / 4;
    for (int64_t r = 0; r < rows; r += STRIP) {
        __m512 scale[2] = {_mm512_load_ps(a->rest_scale + first + r), _mm512_load_ps(a->rest_scale + first + r + 16)};
        int64_t at = (first + r) * a->latents;
        for (int64_t m = 0; m < a->latents; m++) {
            int64_t of_tile = m % TILE_VNNI;
            if (of_tile == 0) {
                start_at(t->out, a->dec_start + m);
                multiply(a->dec_tiles + m * quads, (const uint8_t *) (t->panels + r * quads), quads, t->out, PANEL);
            }
            for (int h = 0; h < 2; h++) {
                __m512 v = _mm512_cvtepi32_ps(_mm512_load_si512(t->out + of_tile * PANEL + 16 * h));
                v = _mm512_mul_ps(v, _mm512_mul_ps(scale[h], _mm512_set1_ps(a->dec_scale[m])));
                __m512 acts = from_bf16(a->acts + at + m * STRIP + 16 * h);
                v = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(acts, _mm512_setzero_ps(), _CMP_NEQ_UQ), v);
                _mm256_store_si256((void *) (a->grads + at + m * STRIP + 16 * h), to_bf16_16(v));
            }
        }
    }
}

/* A latent's values and gradients for all rows, and the gradient of its bias. */
static void pack_rows_of_latent(const struct step * s, const struct auxk * a, const struct scratch * t, int64_t m) {
    __m512 most[2] = {{0}}, sum = {0};
    for (int64_t n = 0; n < a->strips * STRIP; n += 16) {
        int64_t at = (n / STRIP * a->latents + m) * STRIP + n % STRIP;
        __m512 grads = from_bf16(a->grads + at);
        __builtin_prefetch(a->grads + at + 8 * STRIP);
        __builtin_prefetch(a->acts + at + 8 * STRIP);
        __m512 acts = _mm512_mul_ps(from_bf16(a->acts + at), _mm512_load_ps(a->rest_scale + n));
        sum = _mm512_add_ps(sum, grads);
        grads = _mm512_mul_ps(grads, _mm512_load_ps(a->x_scale + n));
        most[0] = _mm512_max_ps(acts, most[0]);
        most[1] = _mm512_max_ps(_mm512_abs_ps(grads), most[1]);
        _mm512_store_ps(t->acts + n, acts);
        _mm512_store_ps(t->grads + n, grads);
    }
    int64_t quads = a->strips * STRIP / 4;
    pack_row(t->acts, _mm512_reduce_max_ps(most[0]), quads, a->turns, m, a->acts_tiles, a->acts_scale + m, a->acts_start + m);
    pack_row(t->grads, _mm512_reduce_max_ps(most[1]), quads, a->turns, m, a->grads_tiles, a->grads_scale + m, a->grads_start + m);
    if (m < s->M) s->extra_bias_M[m] = a->factor * _mm512_reduce_add_ps(sum);
}

/* The gradients of W_enc or W_dec for the latents of some tiles. */
static void sum_over_rows(const struct step * s, const struct auxk * a, const struct scratch * t, int64_t tile, int of_encoder) {
    const int32_t *tiles = of_encoder ? a->grads_tiles : a->acts_tiles, *start = of_encoder ? a->grads_start : a->acts_start;
    const uint8_t * panels = of_encoder ? a->x : a->rest;
    const float * scale = of_encoder ? a->grads_scale : a->acts_scale;
    float * out = of_encoder ? s->extra_enc_MD : s->extra_dec_MD;
    int64_t quads = a->strips * STRIP / 4, stop = tile + a->group < a->tiles ? tile + a->group : a->tiles, first = tile * TILE_VNNI;
    for (int64_t m = first; m < stop * TILE_VNNI; m++) {
        for (int64_t d = 0; d < a->width; d++) t->sums[(m - first) * a->width + d] = start[m];
    }
    for (int64_t j = 0; j < quads; j += CHUNK) {
        int64_t some = quads - j < CHUNK ? quads - j : CHUNK;
        for (int64_t d = 0; d < a->width; d += PANEL) {
            for (int64_t i = tile; i < stop; i++) {
                multiply(tiles + (i * quads + j) * TILE_VNNI, panels + (d * quads + j * PANEL) * 4, some,
                         t->sums + (i - tile) * TILE_VNNI * a->width + d, a->width);
            }
        }
    }
    for (int64_t m = first; m < stop * TILE_VNNI && m < s->M; m++) {
        const int32_t * sums = t->sums + (m - first) * a->width;
        float factor = scale[m] * a->factor;
        for (int64_t d = 0; d < s->D; d++) out[m * s->D + d] = (float) sums[d] * factor * (of_encoder ? s->balance_D[d] : 1);
    }
}

/* L_aux, which is sum ||rest||^2 / sum ||e - mean(e)||^2, and the factor of its gradients. */
static void add_up(const struct step * s, struct auxk * a) {
    double squares = 0, square = 0;
    for (int64_t n = 0; n < s->N; n++) {
        squares += s->error_N[n];
        square += a->square[n];
    }
    double scatter = squares, least = SCATTER_LEAST * squares;
    for (int64_t j = 0; j < s->D; j++) {
        double sum = 0; /* of grad_ND: twice the mean of the errors */
        for (int64_t part = 0; part * BLOCK < s->N; part++) sum += s->partial_D[part * s->D + j];
        scatter -= (double) s->N * sum * sum / 4;
    }
    scatter = scatter < least ? least : scatter;
    scatter = scatter < FLT_MIN ? FLT_MIN : scatter;
    *s->auxk_loss = square / scatter;
    a->factor = (float) (2 * s->auxk_weight / scatter);
}

/* L_aux, and its gradients for the dead latents into extra_*. 0: done. */
int ggscope_auxk(const struct step * s) {
    struct auxk a;
    lay_out(s, &a);
    memset(a.inverse, 0, a.width * sizeof *a.inverse);
    for (int64_t j = 0; j < s->D; j++) a.inverse[j] = 1 / s->balance_D[j];
    for (int64_t i = 0; i < a.strips * STRIP || i < a.latents; i++) a.turns[i] = turn(i, 0.5698402910);
#pragma omp parallel num_threads((int) s->threads)
    {
#ifdef _OPENMP
        struct scratch t = scratch_of(&a, omp_get_thread_num());
#else
        struct scratch t = scratch_of(&a, 0);
#endif
#pragma omp for schedule(static)
        for (int64_t m = 0; m < a.latents; m += 4) pack_decoder(s, &a, t.x, m);
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < s->N; first += BLOCK) {
            int64_t rows = s->N - first < BLOCK ? s->N - first : BLOCK;
            rest_of_block(s, &a, &t, first, rows);
            grads_of_block(&a, &t, first, rows);
            float * sum = s->partial_D + first / BLOCK * s->D; /* the pass over the latents has not begun */
            memset(sum, 0, s->D * sizeof *sum);
            for (int64_t n = first; n < first + rows; n++) add_scaled(sum, 1, s->grad_ND + n * s->D, s->D);
        }
#pragma omp single
        add_up(s, &a);
#pragma omp for schedule(static)
        for (int64_t m = 0; m < a.latents; m++) pack_rows_of_latent(s, &a, &t, m);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < 2 * ((a.tiles + a.group - 1) / a.group); task++) {
            sum_over_rows(s, &a, &t, task / 2 * a.group, task % 2);
        }
    }
    return 0;
}
#else
int64_t ggscope_auxk_bytes(const struct step * s) {
    (void) s;
    return 0;
}
int ggscope_auxk(const struct step * s) {
    (void) s;
    return -2;
}
#endif
