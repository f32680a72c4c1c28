/* Threads that live for one piece of work and wait asleep. Those of OpenMP spin between two pieces and at the end of
   each: beside a busy process, or torch's own threads, they take the core from the one they wait for. */
#include "vectors.h"
#include <pthread.h>

#define MOST_THREADS 256

static void * take_parts(void * shared) {
    struct work * work = shared;
    void * scratch = work->open(work->step);
    if (!scratch) {
        atomic_store(&work->failed, -1); /* the others do its parts, but whether all were done is then unknown */
        return NULL;
    }
    for (int64_t part; (part = atomic_fetch_add(&work->next, 1)) < work->parts;) {
        work->part(work->step, scratch, part);
    }
    work->close(scratch);
    return NULL;
}

int ggscope_share_out(struct work * work) {
    int64_t wanted = work->step->threads < work->parts ? work->step->threads : work->parts;
    pthread_t others[MOST_THREADS];
    int64_t started = 0;
    while (started < wanted - 1 && started < MOST_THREADS && !pthread_create(others + started, NULL, take_parts, work)) {
        started++; /* where no more can be had, fewer do the same */
    }
    take_parts(work);
    for (int64_t i = 0; i < started; i++) pthread_join(others[i], NULL);
    return atomic_load(&work->failed);
}
