/* The 8-bit product of a tile of latents with a block of rows, and the bounds on the pre-activations that follow from
   it. Two layouts of the weights, `s->tile` tells which:
   - 12 latents, a register each, for `vpdpbusd` (AVX-512 VNNI): q_tiles is (F / 12, D / 4, 12, 4);
   - 16 latents, the rows of a tile register, two of them at a time (AMX): q_tiles is (F / 16, D / 64, 16, 64).
   The sums are whole numbers, so both give the same bounds. */
#ifndef GGSCOPE_PRODUCT_H
#define GGSCOPE_PRODUCT_H
#include "vectors.h"
#if defined(HAVE_INT8) && defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__linux__)
#define HAVE_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef HAVE_INT8
#define MOST_STRIPS 4 /* of a block, which share a pass over the weights */
#define MOST_ROWS (STRIP * MOST_STRIPS)
#define SIGMAS 4.0f
/* Rows of the weights that come in while a tile is multiplied with a strip: VNNI takes 4 columns of the tile in the time
   of a line for one of 4 rows, AMX is done with 64 columns in that of a few lines. */
#define FETCHED_VNNI 4
#define FETCHED_AMX 4
#define MOST_FETCHED (FETCHED_AMX * MOST_STRIPS)

struct strip {
    uint8_t * q;         /* (D / 4, STRIP, 4), D up to a multiple of 64 */
    int16_t * upper_FR;  /* upper bounds of the pre-activations divided by the row's scale, times fine[r] */
    float * lower_TR;    /* the largest lower bound of every tile, divided by the row's scale */
    uint16_t * dead_MR;  /* bfloat16 pre-activations of the dead latents, where AuxK needs them; else NULL */
    float inverse[STRIP], length[STRIP], least[STRIP]; /* 1 / sx; ||qx||; the bound to reach */
    float fine[STRIP];   /* so that the bounds of latents of ordinary norm use the 16 bits */
    int finite[STRIP];
};

/* A thread's rows: a block is multiplied while what is left to do for the one before is done. */
struct block {
    int64_t num_strips;
    float norm; /* the largest of the latents' finite norms */
    struct strip strips[MOST_STRIPS];
    float * row;    /* scratch: a row */
    int32_t * sums; /* scratch, AMX: (2 tiles, STRIP) */
    /* The block before, whose candidates are known */
    int64_t first, rows;    /* its first row, its rows */
    int64_t hits;           /* candidates, and on which rows they are */
    int32_t * hit_latent_F;
    uint32_t (* hit_rows_F)[MOST_STRIPS];
    int64_t at_item[MOST_ROWS], found[MOST_ROWS]; /* where the exact values of a row's candidates are in `items` */
    uint64_t * items;
    int64_t room;           /* of items */
    int64_t hit;            /* the candidate whose exact values come next */
    int64_t at, slot;       /* then, the row that is reconstructed next, and which of its latents is fetched next */
};

/* Two vectors of upper bounds as 16-bit integers, rounded up; what is too large, and NaN, as the largest of them. */
static inline __m512i up_to_16(__m512 x0, __m512 x1) {
    const __m512 most = _mm512_set1_ps(1e9f);
    enum { up = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC };
    __m256i low = _mm512_cvtsepi32_epi16(_mm512_cvt_roundps_epi32(_mm512_min_ps(x0, most), up));
    __m256i high = _mm512_cvtsepi32_epi16(_mm512_cvt_roundps_epi32(_mm512_min_ps(x1, most), up));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

/* Bounds of latent i on the strip's rows, from its sums; top0 and top1: the largest lower bounds of its tile. */
static inline void bounds_of_latent(const struct step * s, struct strip * b, int64_t i, __m512i sum0, __m512i sum1,
                                    __m512 * top0, __m512 * top1) {
    const float root12 = 3.4641016f;
    __m512 scale = _mm512_set1_ps(s->q_scale_F[i]), bias = _mm512_set1_ps(s->b_enc_F[i]), shift = _mm512_set1_ps(s->q_shift_F[i]);
    __m512 of_x = _mm512_set1_ps(SIGMAS / root12 * s->q_norm_F[i]), of_w = _mm512_set1_ps(SIGMAS / root12 * s->q_scale_F[i]);
    __m512 value0 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum0), scale, _mm512_fmsub_ps(bias, _mm512_loadu_ps(b->inverse), shift));
    __m512 value1 = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum1), scale, _mm512_fmsub_ps(bias, _mm512_loadu_ps(b->inverse + 16), shift));
    __m512 error0 = _mm512_fmadd_ps(_mm512_loadu_ps(b->length), of_w, of_x);
    __m512 error1 = _mm512_fmadd_ps(_mm512_loadu_ps(b->length + 16), of_w, of_x);
    *top0 = _mm512_max_ps(_mm512_sub_ps(value0, error0), *top0); /* NaN leaves top as it is */
    *top1 = _mm512_max_ps(_mm512_sub_ps(value1, error1), *top1);
    __m512 upper0 = _mm512_mul_ps(_mm512_add_ps(value0, error0), _mm512_loadu_ps(b->fine));
    __m512 upper1 = _mm512_mul_ps(_mm512_add_ps(value1, error1), _mm512_loadu_ps(b->fine + 16));
    _mm512_store_si512(b->upper_FR + i * STRIP, up_to_16(upper0, upper1));
    if (b->dead_MR && s->extra_of_F[i] >= 0) {
        uint16_t * dead = b->dead_MR + s->extra_of_F[i] * STRIP;
        _mm256_store_si256((void *) dead, to_bf16_16(_mm512_div_ps(value0, _mm512_loadu_ps(b->inverse))));
        _mm256_store_si256((void *) (dead + 16), to_bf16_16(_mm512_div_ps(value1, _mm512_loadu_ps(b->inverse + 16))));
    }
}

/* Meanwhile FETCHED_VNNI rows of D floats, `rows`, come into the cache: the product leaves the memory idle. */
static void bounds_of_tile_vnni(const struct step * s, struct strip * b, int64_t tile, const float * const * rows) {
    int64_t quads = (s->D + 3) / 4, first = tile * TILE_VNNI;
    const int8_t * w = s->q_tiles + tile * quads * TILE_VNNI * 4;
    const uint8_t * x = b->q;
    __m512i left[TILE_VNNI], right[TILE_VNNI];
    _Pragma("GCC unroll 12")
    for (int r = 0; r < TILE_VNNI; r++) {
        left[r] = right[r] = _mm512_set1_epi32(s->q_offset_F[first + r]);
    }
    for (int part = 0; part < FETCHED_VNNI; part++) {
        const char * ahead = (const char *) rows[part];
        int64_t stop = (part + 1) * quads / FETCHED_VNNI;
        for (int64_t j = part * quads / FETCHED_VNNI; j < stop; j++, x += 128, w += 4 * TILE_VNNI, ahead += 64) {
            __m512i x0 = _mm512_load_si512(x), x1 = _mm512_load_si512(x + 64);
            _mm_prefetch((const char *) w + 4096, _MM_HINT_T0);
            _mm_prefetch(ahead, _MM_HINT_T0);
            _Pragma("GCC unroll 12")
            for (int r = 0; r < TILE_VNNI; r++) {
                int32_t four;
                memcpy(&four, w + 4 * r, sizeof four);
                __m512i w16 = _mm512_set1_epi32(four);
                DOT4(left[r], x0, w16);
                DOT4(right[r], x1, w16);
            }
        }
    }
    __m512 top0 = _mm512_set1_ps(-INFINITY), top1 = top0;
    _Pragma("GCC unroll 12")
    for (int r = 0; r < TILE_VNNI; r++) {
        if (first + r >= s->F) break;
        bounds_of_latent(s, b, first + r, left[r], right[r], &top0, &top1);
    }
    _mm512_storeu_ps(b->lower_TR + tile * STRIP, top0);
    _mm512_storeu_ps(b->lower_TR + tile * STRIP + 16, top1);
}

#ifdef HAVE_AMX
/* Older compilers' intrinsics do not say which memory they read and write. */
#define MEMORY_IS_READ __asm__ volatile("" ::: "memory")

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* Whether the kernel lets this process use the tile registers: asked for once, it is then there for all threads. */
static int amx_permitted(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

/* The registers as the product needs them; `before` is what others (a matrix library) had set up on this thread. */
static void open_amx(struct tile_config * before) {
    struct tile_config mine = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        mine.rows[i] = 16;
        mine.row_bytes[i] = 64;
    }
    _tile_storeconfig(before);
    MEMORY_IS_READ;
    _tile_loadconfig(&mine);
}

static void close_amx(const struct tile_config * before) {
    MEMORY_IS_READ;
    if (before->palette) {
        _tile_loadconfig(before);
    } else {
        _tile_release();
    }
}

static void bounds_of_sums(const struct step * s, struct strip * b, int64_t tile, const int32_t * sums) {
    __m512 top0 = _mm512_set1_ps(-INFINITY), top1 = top0;
    for (int r = 0; r < TILE_AMX; r++, sums += STRIP) {
        int64_t i = tile * TILE_AMX + r;
        if (i >= s->F) break;
        __m512i offset = _mm512_set1_epi32(s->q_offset_F[i]);
        bounds_of_latent(s, b, i, _mm512_add_epi32(_mm512_load_si512(sums), offset),
                         _mm512_add_epi32(_mm512_load_si512(sums + 16), offset), &top0, &top1);
    }
    _mm512_storeu_ps(b->lower_TR + tile * STRIP, top0);
    _mm512_storeu_ps(b->lower_TR + tile * STRIP + 16, top1);
}

/* Two tiles of latents; meanwhile `count` rows of D floats come into the cache. */
static void bounds_of_tiles_amx(const struct step * s, struct strip * b, int64_t tile, const float * const * rows, int count,
                                int32_t * sums) {
    int64_t chunks = (s->D + 63) / 64;
    const int8_t * w = s->q_tiles + tile * chunks * 1024;
    const uint8_t * x = b->q;
    MEMORY_IS_READ;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t c = 0; c < chunks; c++, w += 1024, x += 2048) {
        _tile_loadd(6, x, 128);
        _tile_loadd(4, w, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, x + 64, 128);
        _tile_dpbsud(1, 4, 7);
        _tile_loadd(5, w + chunks * 1024, 64);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
        for (int r = 0; r < count; r++) {
            for (int64_t j = 64 * c; j < 64 * (c + 1) && j < s->D; j += 16) __builtin_prefetch(rows[r] + j);
        }
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 16 * STRIP, 128);
    _tile_stored(3, sums + 16 * STRIP + 16, 128);
    bounds_of_sums(s, b, tile, sums);
    bounds_of_sums(s, b, tile + 1, sums + 16 * STRIP);
}
#endif
#endif
#endif
