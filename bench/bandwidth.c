/* How fast the machine reads memory: a sum of floats in as many threads as the sides of the benchmark have. */
#include <stdint.h>

float ggscope_bench_sum(const float * x, int64_t n, int threads) {
    float total = 0;
    #pragma omp parallel for simd num_threads(threads) reduction(+ : total) schedule(static)
    for (int64_t i = 0; i < n; i++) {
        total += x[i];
    }
    return total;
}
