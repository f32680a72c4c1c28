/* Which latents a row takes, of pre-activations that are there: exact top-k. */
#include "vectors.h"

void ggscope_take_largest(uint64_t * items, int64_t count, int64_t k) {
    int64_t low = 0, high = count - 1;
    while (low < high) {
        uint64_t a = items[low], b = items[(low + high) / 2], c = items[high];
        uint64_t pivot = a < b ? (b < c ? b : (a < c ? c : a)) : (a < c ? a : (b < c ? c : b));
        int64_t i = low, j = high;
        while (i <= j) {
            while (items[i] > pivot) i++;
            while (items[j] < pivot) j--;
            if (i <= j) {
                uint64_t t = items[i];
                items[i++] = items[j];
                items[j--] = t;
            }
        }
        if (k - 1 <= j) {
            high = j;
        } else if (k - 1 >= i) {
            low = i;
        } else {
            return;
        }
    }
}

/* ---- top-k of pre-activations that are there ---- */

static inline int32_t key_f32(const float * p) { return order_key(*p); }
static inline int32_t key_bf16(const uint16_t * p) {
    uint32_t bits = (uint32_t) *p << 16;
    int32_t key = (int32_t) bits ^ (((int32_t) bits >> 31) & INT32_MAX);
    return (bits & INT32_MAX) > 0x7f800000 ? INT32_MAX : key;
}

/* The maxima of `groups` interleaved groups: the K-th largest of them is at most the K-th largest entry, so that only
   entries from there on need to be looked at one by one. */
#define DEFINE_TOPK(NAME, TYPE, KEY)                                                                                   \
    static void NAME##_row(const TYPE * pre_F, int64_t F, int64_t K, int32_t * idx_K, uint64_t * items, int32_t * top) { \
        int64_t groups = 32, count = 0;                                                                                \
        while (groups < 4 * K) groups *= 2;                                                                            \
        int32_t least = INT32_MIN;                                                                                     \
        if (F >= 2 * groups) {                                                                                         \
            for (int64_t j = 0; j < groups; j++) top[j] = KEY(pre_F + j);                                              \
            for (int64_t i = groups; i + groups <= F; i += groups) {                                                   \
                for (int64_t j = 0; j < groups; j++) {                                                                 \
                    int32_t key = KEY(pre_F + i + j);                                                                  \
                    top[j] = key > top[j] ? key : top[j];                                                              \
                }                                                                                                      \
            }                                                                                                          \
            for (int64_t j = 0; j < groups; j++) items[j] = ranked(top[j], (uint32_t) j);                              \
            ggscope_take_largest(items, groups, K);                                                                    \
            least = INT32_MAX;                                                                                         \
            for (int64_t j = 0; j < K; j++) {                                                                          \
                int32_t key = ranked_key(items[j]);                                                                    \
                least = key < least ? key : least;                                                                     \
            }                                                                                                          \
        }                                                                                                              \
        for (int64_t i = 0; i < F; i += 32) {                                                                          \
            int64_t stop = i + 32 < F ? i + 32 : F;                                                                    \
            int32_t any = 0;                                                                                           \
            if (stop == i + 32) {                                                                                      \
                for (int64_t j = 0; j < 32; j++) any |= KEY(pre_F + i + j) >= least;                                   \
            } else {                                                                                                   \
                any = 1;                                                                                               \
            }                                                                                                          \
            for (int64_t j = i; any && j < stop; j++) {                                                                \
                int32_t key = KEY(pre_F + j);                                                                          \
                items[count] = ranked(key, (uint32_t) j);                                                              \
                count += key >= least;                                                                                 \
            }                                                                                                          \
        }                                                                                                              \
        ggscope_take_largest(items, count, K);                                                                         \
        for (int64_t j = 0; j < K; j++) idx_K[j] = ranked_index(items[j]);                                             \
    }                                                                                                                  \
    /* idx_NK of the K largest entries of every row, in no order. 0: done, -1: no memory. */                           \
    int NAME(const TYPE * pre_NF, int64_t N, int64_t F, int64_t K, int32_t * idx_NK, int64_t threads) {                \
        int failed = 0;                                                                                                \
        _Pragma("omp parallel num_threads((int) threads)")                                                             \
        {                                                                                                              \
            uint64_t * items = malloc((F + 8 * K + 32) * sizeof *items);                                               \
            int32_t * top = malloc((8 * K + 32) * sizeof *top);                                                        \
            _Pragma("omp for schedule(static)")                                                                        \
            for (int64_t n = 0; n < N; n++) {                                                                          \
                if (items && top) NAME##_row(pre_NF + n * F, F, K, idx_NK + n * K, items, top);                        \
            }                                                                                                          \
            if (!items || !top) {                                                                                      \
                _Pragma("omp atomic write")                                                                            \
                failed = -1;                                                                                           \
            }                                                                                                          \
            free(items);                                                                                               \
            free(top);                                                                                                 \
        }                                                                                                              \
        return failed;                                                                                                 \
    }

DEFINE_TOPK(ggscope_topk_f32, float, key_f32)
DEFINE_TOPK(ggscope_topk_bf16, uint16_t, key_bf16)

/* ---- all but the k largest to zero: for a k that is a good part of the row ---- */

#define STRETCH 4096

#define DEFINE_KEEP(NAME, TYPE, INFINITE)                                                                              \
    static int64_t NAME##_reach(const TYPE * bits_F, int64_t F, TYPE least) {                                          \
        int64_t count = 0;                                                                                             \
        for (int64_t i = 0; i < F; i += STRETCH) { /* counts of the entries' own width vectorise best */               \
            int64_t stop = i + STRETCH < F ? i + STRETCH : F;                                                          \
            TYPE some = 0;                                                                                             \
            for (int64_t j = i; j < stop; j++) some = (TYPE) (some + (bits_F[j] >= least));                            \
            count += some;                                                                                             \
        }                                                                                                              \
        return count;                                                                                                  \
    }                                                                                                                  \
    static void NAME##_row(TYPE * bits_F, int64_t F, int64_t K) {                                                      \
        const TYPE sign = (TYPE) ((TYPE) 1 << (8 * sizeof(TYPE) - 1));                                                 \
        for (int64_t j = 0; j < F; j++) { /* NaN stays, without its sign: the largest of all */                        \
            TYPE size = (TYPE) (bits_F[j] & (TYPE) ~sign);                                                             \
            bits_F[j] = bits_F[j] < sign || size > (TYPE) INFINITE ? size : 0;                                         \
        }                                                                                                              \
        if (NAME##_reach(bits_F, F, 1) <= K) return;                                                                   \
        TYPE kth = 0; /* the K-th largest, bit by bit */                                                               \
        for (TYPE bit = sign >> 1; bit; bit >>= 1) {                                                                   \
            if (NAME##_reach(bits_F, F, (TYPE) (kth | bit)) >= K) kth |= bit;                                          \
        }                                                                                                              \
        int64_t equal = K - NAME##_reach(bits_F, F, (TYPE) (kth + 1)); /* of those as large as the K-th, the first */  \
        for (int64_t j = 0; j < F; j++) bits_F[j] = bits_F[j] >= kth ? bits_F[j] : 0;                                  \
        for (int64_t j = 0; j < F; j++) {                                                                              \
            if (bits_F[j] == kth && --equal < 0) bits_F[j] = 0;                                                        \
        }                                                                                                              \
    }                                                                                                                  \
    /* ReLU, and of every row all but the K largest to zero, in place. 0: done. */                                     \
    int NAME(TYPE * bits_NF, int64_t N, int64_t F, int64_t K, int64_t threads) {                                       \
        (void) threads; /* unused where there is no OpenMP */                                                          \
        _Pragma("omp parallel for schedule(dynamic, 16) num_threads((int) threads)")                                   \
        for (int64_t n = 0; n < N; n++) NAME##_row(bits_NF + n * F, F, K);                                             \
        return 0;                                                                                                      \
    }

DEFINE_KEEP(ggscope_keep_f32, uint32_t, 0x7f800000)
DEFINE_KEEP(ggscope_keep_bf16, uint16_t, 0x7f80)
