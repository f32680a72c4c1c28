/* What a question of llama.cpp's costs: every one goes on to another callback, and all of a decode are timed together. */
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

typedef bool (*callback)(void * tensor, bool ask, void * user_data);

struct meter {
    callback inner;
    void * inner_data;
    int nodes; /* asked for in one decode */
    int asked; /* so far */
    int64_t started, nanoseconds;
};

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t) t.tv_sec * 1000000000 + t.tv_nsec;
}

bool ggscope_bench_meter(void * tensor, bool ask, void * user_data) {
    struct meter * m = user_data;
    if (!ask) return m->inner(tensor, false, m->inner_data);
    if (m->asked == 0) m->started = now();
    const bool wanted = m->inner(tensor, true, m->inner_data);
    if (++m->asked == m->nodes) m->nanoseconds = now() - m->started;
    return wanted;
}

/* Nobody wants anything. */
bool ggscope_bench_no(void * tensor, bool ask, void * user_data) {
    (void) tensor, (void) ask, (void) user_data;
    return false;
}
