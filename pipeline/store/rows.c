/* Rows of a store between its format and float32, by row numbers: one pass where numpy needs four.
   `kind`: 0 float32, 1 float16, 2 bfloat16 (bits). */
#define _GNU_SOURCE /* preadv */
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

static inline float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* float16 to float32, exact: the exponent's bias by a product, which also makes subnormals right. */
static inline float half_value(uint16_t h) {
    uint32_t magnitude = (uint32_t) (h & 0x7fff) << 13, sign = (uint32_t) (h & 0x8000) << 16;
    if (magnitude >= 0x0f800000) {
        return from_bits(sign | 0x70000000 | magnitude); /* infinity and NaN */
    }
    float x = from_bits(magnitude) * 0x1p112f;
    return sign ? -x : x;
}

static void halves(const uint16_t * from, float * to, int64_t n) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16) {
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) (from + i))));
    }
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (from + i))));
    }
#endif
    for (; i < n; i++) {
        to[i] = half_value(from[i]);
    }
}

static void brains(const uint16_t * from, float * to, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        to[i] = from_bits((uint32_t) from[i] << 16);
    }
}

/* out[r] = float32 of table[rows[r]] */
void ggscope_take_rows(const void * table, int64_t kind, int64_t width, const int64_t * rows, int64_t count, float * out) {
    int64_t bytes = width * (kind == 0 ? 4 : 2);
    for (int64_t r = 0; r < count; r++) {
        const char * row = (const char *) table + rows[r] * bytes;
        float * to = out + r * width;
        if (r + 4 < count) { /* rows lie apart: the next ones are asked for while this one is converted */
            const char * ahead = (const char *) table + rows[r + 4] * bytes;
            for (int64_t at = 0; at < bytes; at += 64) {
                __builtin_prefetch(ahead + at);
            }
        }
        if (kind == 0) {
            memcpy(to, row, bytes);
        } else if (kind == 1) {
            halves((const uint16_t *) row, to, width);
        } else {
            brains((const uint16_t *) row, to, width);
        }
    }
}

#define VECTORS 512 /* of one system call; POSIX grants 1024 where it says so, Linux and macOS do */

/* `bytes` from `offset` of a file into one row. 0, an errno, or -1 where the file ends too soon. */
static int read_row(int file, char * to, int64_t bytes, int64_t offset) {
    for (int64_t done = 0; done < bytes;) {
        ssize_t got = pread(file, to + done, bytes - done, offset + done);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            return got < 0 ? errno : -1;
        }
        done += got;
    }
    return 0;
}

/* table[slots[r]] = row rows[r] - first of the rows that begin at `offset` of a file; `rows` ascend. Neighbours are
   read in one call, straight to where they belong. The result of `read_row`. */
int ggscope_read_rows(int file, int64_t offset, char * table, int64_t bytes, const int64_t * slots, const int64_t * rows,
                      int64_t first, int64_t count) {
    struct iovec vectors[VECTORS];
    for (int64_t start = 0, stop; start < count; start = stop) {
        int64_t used = 0;
        for (stop = start; stop < count && rows[stop] == rows[start] + (stop - start); stop++) {
            if (stop > start && slots[stop] == slots[stop - 1] + 1) {
                vectors[used - 1].iov_len += bytes;
            } else if (used < VECTORS) {
                vectors[used++] = (struct iovec) {table + slots[stop] * bytes, bytes};
            } else {
                break;
            }
        }
        int64_t at = offset + (rows[start] - first) * bytes;
        if (preadv(file, vectors, (int) used, at) == (stop - start) * bytes) {
            continue;
        }
        for (int64_t r = start; r < stop; r++) { /* interrupted, at the file's end, or an error: row by row says which */
            int failed = read_row(file, table + slots[r] * bytes, bytes, offset + (rows[r] - first) * bytes);
            if (failed) {
                return failed;
            }
        }
    }
    return 0;
}

/* table[slots[r]] = data[rows[r] - first], whole rows of `bytes` */
void ggscope_put_rows(char * table, int64_t bytes, const int64_t * slots, const char * data, const int64_t * rows,
                      int64_t first, int64_t count) {
    for (int64_t r = 0; r < count; r++) {
        memcpy(table + slots[r] * bytes, data + (rows[r] - first) * bytes, bytes);
    }
}
