/* Reading one row of activations in C: what products.c, bounds.c, decoder.c and reading.c share. The blocks of Q8_0 are
   ggml's: F16 scale, 32 signed bytes; the rows of Q4_0 lie as bytes.h says. */
#ifndef GGSCOPE_READING_H
#define GGSCOPE_READING_H
#include "vectors.h"

#define QK 32
#define BLOCK_BYTES 34

enum kind { KIND_F32 = 0, KIND_F16 = 1, KIND_Q4_0 = 2, KIND_Q8_0 = 8, KIND_BF16 = 30 }; /* enum ggml_type */

static inline float half_at(const void * p) {
    uint16_t bits;
    memcpy(&bits, p, sizeof bits);
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#else
    uint32_t sign = (uint32_t) (bits & 0x8000) << 16, rest = bits & 0x7fff, out;
    if (rest >= 0x7c00) {
        out = sign | 0x7f800000 | (rest & 0x3ff) << 13;
    } else if (rest >= 0x0400) {
        out = sign | ((rest << 13) + 0x38000000);
    } else {
        float small = (float) rest * 0x1p-24f;
        memcpy(&out, &small, sizeof out);
        out |= sign;
    }
    float value;
    memcpy(&value, &out, sizeof value);
    return value;
#endif
}

static inline float bfloat_at(const uint8_t * p) {
    uint32_t bits = (uint32_t) (p[0] | p[1] << 8) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Whether there is a product with F rows of this type here. */
int ggscope_has_affine(int kind, int64_t F);
/* Bytes of a row u as the product with this type takes it, and making that of it. */
int64_t ggscope_input_bytes(int kind, int64_t D);
void ggscope_round_input(int kind, const float * u_D, int64_t D, void * input);
/* The first latent of part p of P: parts begin at multiples of 8. */
static inline int64_t ggscope_part(int64_t F, int64_t p, int64_t P) { return p == P ? F : F / 8 * p / P * 8; }
/* pre = W u + b of latents first..last - 1; `pre` begins with the first of them. */
void ggscope_products(
    int kind, const uint8_t * W, int64_t D, const void * input, const float * b_F, int64_t first, int64_t last,
    float * pre);

/* bounds.c, which says what they are. Whether matrices of this type and shape can have them; bytes of the copy of W_enc. */
int ggscope_has_bounds(int kind, int64_t F, int64_t D);
int64_t ggscope_bounds_bytes(int64_t F, int64_t D);
/* Bytes of a row as the bounds take it, and making that of a row as the exact product takes it, in floats. */
int64_t ggscope_bounds_input_bytes(int64_t D);
void ggscope_round_for_bounds(int kind, const float * taken_D, int64_t D, const float * dither_D, void * input);
/* What the pre-activations of latents first..last - 1 do not exceed, and about what they are (`approx` begins with the
   first of them); first and last are multiples of 8. */
void ggscope_upper_bounds(
    const uint8_t * rows, const float * norm_F, int64_t D, const void * input, const float * b_F, int64_t first,
    int64_t last, float * approx, float * upper_F);

/* decoder.c */
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

static inline int64_t pieces_of(int64_t D) { return (D + COLUMNS - 1) / COLUMNS; }

int ggscope_knows_decoder(int kind);
/* The squared error in columns first..last - 1, whole pieces of COLUMNS but for the row's end: a number for each piece. */
void ggscope_piece_errors(
    const struct decoder * d, const float * x_D, const int32_t * idx_K, const float * vals_K, int64_t K, int64_t first,
    int64_t last, double * errors);
double ggscope_sum_of(const double * errors, int64_t count);

#endif
