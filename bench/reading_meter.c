/* How long a reading takes inside llama.cpp's callback: the call goes on to the reading's own function. */
#include <stdint.h>
#include <time.h>

struct reading_meter {
    int (*inner)(void * argument);
    void * argument;
    int64_t nanoseconds; /* of the last call */
};

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t) t.tv_sec * 1000000000 + t.tv_nsec;
}

int ggscope_bench_reading(void * meter) {
    struct reading_meter * m = meter;
    int64_t started = now();
    int code = m->inner(m->argument);
    m->nanoseconds = now() - started;
    return code;
}
