/* Which graph nodes Python is asked about: llama.cpp asks for each of hundreds, and each question takes Python's
   interpreter lock. Only the nodes somebody watches, every `every`-th one (so that a signal is noticed), and
   everything while `always` is set go on to Python; the rest are answered "compute it, do not hand it over".
   Single rows that are only read go to their readers' memory from here, and what reads them is called. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define NAME_BYTES 64
#define MAX_NAMES 256
#define MAX_READS 64
#define BEGIN -1

typedef bool (*python_callback)(void * tensor, bool ask, void * user_data);

/* A row of one node, copied when it is handed over; `then` is called when all rows with this argument are there. */
struct read {
    char name[NAME_BYTES];
    char op[NAME_BYTES];
    int64_t width;
    float * into;
    void * tensor;  /* ... or where it goes instead: one row, maybe on another device */
    int (*then)(void * argument); /* or NULL */
    void * argument;
    int occurrence; /* which node of this name it is */
    int seen;       /* how many of this name were asked for in this decode */
    int done;
};

/* Where things lie in a ggml_tensor, and llama.cpp's own functions. */
struct layout {
    size_t name, op, type, ne, nb;
    int f32;
    size_t size;
    const char * (*op_name)(int op);
    void (*get)(const void * tensor, void * data, size_t offset, size_t bytes);
    void (*copy)(void * tensor, void * to);
};

struct filter {
    python_callback python;
    struct layout at;
    int always;
    int every; /* 0: never */
    int asked;
    int count;
    int read_count;
    int missing; /* rows not read yet in this decode, BEGIN before its first node; nothing sets it right again where a
                    row's node was not what it should be */
    char names[MAX_NAMES][NAME_BYTES];
    struct read reads[MAX_READS];
};

static bool is_row(const struct filter * f, const struct read * r, const char * tensor) {
    int op, type;
    int64_t ne[4];
    size_t nb[4];
    memcpy(&op, tensor + f->at.op, sizeof op);
    memcpy(&type, tensor + f->at.type, sizeof type);
    memcpy(ne, tensor + f->at.ne, sizeof ne);
    memcpy(nb, tensor + f->at.nb, sizeof nb);
    size_t stride = sizeof(float);
    for (int i = 0; i < 4; i++) {
        if (ne[i] != 1 && nb[i] != stride) return false;
        stride *= (size_t) ne[i];
    }
    return type == f->at.f32 && stride == (size_t) r->width * sizeof(float) && strcmp(f->at.op_name(op), r->op) == 0;
}

/* Whether somebody reads a row of this node. */
static bool wanted(struct filter * f, const char * name) {
    bool found = false;
    for (int i = 0; i < f->read_count; i++) {
        struct read * r = f->reads + i;
        if (strncmp(name, r->name, NAME_BYTES) == 0) found |= r->seen++ == r->occurrence;
    }
    return found;
}

/* The copy wants both tensors shaped alike: this one is shown as a plain row. */
static bool copied(const struct filter * f, const struct read * r, const char * tensor) {
    _Alignas(16) char row[1024];
    if (f->at.size > sizeof row) return false;
    const int64_t ne[4] = {r->width, 1, 1, 1};
    const size_t bytes = (size_t) r->width * sizeof(float), nb[4] = {sizeof(float), bytes, bytes, bytes};
    memcpy(row, tensor, f->at.size);
    memcpy(row + f->at.ne, ne, sizeof ne);
    memcpy(row + f->at.nb, nb, sizeof nb);
    f->at.copy(row, r->tensor);
    return true;
}

static bool all_done(const struct filter * f, const void * argument) {
    for (int i = 0; i < f->read_count; i++) {
        if (f->reads[i].argument == argument && !f->reads[i].done) return false;
    }
    return true;
}

static bool handed_over(struct filter * f, const char * tensor) {
    bool found = false;
    for (int i = 0; i < f->read_count; i++) {
        struct read * r = f->reads + i;
        if (r->done || r->seen != r->occurrence + 1 || strncmp(tensor + f->at.name, r->name, NAME_BYTES) != 0) continue;
        found = true;
        if (!is_row(f, r, tensor) || (r->tensor && !copied(f, r, tensor))) continue; /* it stays missing */
        if (!r->tensor) f->at.get(tensor, r->into, 0, (size_t) r->width * sizeof(float));
        r->done = 1;
        f->missing--;
        if (r->then && all_done(f, r->argument)) r->then(r->argument);
    }
    return found;
}

bool ggscope_ask(void * tensor, bool ask, void * user_data) {
    struct filter * f = user_data;
    if (f->missing == BEGIN) {
        f->missing = f->read_count;
        for (int i = 0; i < f->read_count; i++) f->reads[i].seen = f->reads[i].done = 0;
    }
    if (f->always) return f->python(tensor, ask, NULL);
    if (!ask) return handed_over(f, tensor) || f->python(tensor, ask, NULL);
    const char * name = (const char *) tensor + f->at.name;
    if (wanted(f, name)) return true;
    if (f->every && ++f->asked % f->every == 0) return f->python(tensor, ask, NULL);
    for (int i = 0; i < f->count; i++) {
        if (strncmp(name, f->names[i], NAME_BYTES) == 0) {
            return f->python(tensor, ask, NULL);
        }
    }
    return false;
}
