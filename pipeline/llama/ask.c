/* Which graph nodes Python is asked about: llama.cpp asks for each of hundreds, and each question takes Python's
   interpreter lock. Only the nodes somebody watches, every `every`-th one (so that a signal is noticed), and
   everything while `always` is set go on to Python; the rest are answered "compute it, do not hand it over". */
#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#define NAME_BYTES 64
#define MAX_NAMES 256

typedef bool (*python_callback)(void * tensor, bool ask, void * user_data);

struct filter {
    python_callback python;
    size_t name_offset; /* of the name in a ggml_tensor */
    int always;
    int every;
    int asked;
    int count;
    char names[MAX_NAMES][NAME_BYTES];
};

bool ggscope_ask(void * tensor, bool ask, void * user_data) {
    struct filter * f = user_data;
    if (!ask || f->always || ++f->asked % f->every == 0) {
        return f->python(tensor, ask, NULL);
    }
    const char * name = (const char *) tensor + f->name_offset;
    for (int i = 0; i < f->count; i++) {
        if (strncmp(name, f->names[i], NAME_BYTES) == 0) {
            return f->python(tensor, ask, NULL);
        }
    }
    return false;
}
