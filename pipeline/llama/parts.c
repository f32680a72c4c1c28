/* A read-only stream made of bytes in memory and ranges of a file, for a reader that takes a FILE. What lies in no
   part reads as zero. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#define BUFFER_BYTES (1 << 18) /* glibc reads such a stream through its buffer, whatever is asked for */

struct part {
    int64_t start;  /* in the stream, ascending; parts do not overlap */
    int64_t length;
    int64_t source; /* where it begins in the file */
};

struct stream {
    int file;
    int64_t size, position, head_bytes;
    int64_t count;
    struct part * parts;
    char * head; /* the first bytes of the stream */
    char buffer[BUFFER_BYTES];
};

/* As much as one piece has: the head, a part or a gap, whichever the position lies in. So a buffer that is filled
   after a seek takes nothing that is not wanted. */
static ssize_t parts_read(void * cookie, char * to, size_t bytes) {
    struct stream * s = cookie;
    const int64_t at = s->position;
    int64_t border = s->size, source = -1;
    for (int64_t i = 0; i < s->count; i++) {
        const struct part * p = &s->parts[i];
        if (at < p->start + p->length) { /* the first part that does not end before */
            border = at < p->start ? p->start : p->start + p->length;
            source = at < p->start ? -1 : p->source + at - p->start;
            break;
        }
    }
    const int64_t left = (at < s->head_bytes ? s->head_bytes : border) - at;
    if (left <= 0) {
        return 0;
    }
    ssize_t given = (int64_t) bytes < left ? (ssize_t) bytes : (ssize_t) left;
    if (at < s->head_bytes) {
        memcpy(to, s->head + at, (size_t) given);
    } else if (source < 0) {
        memset(to, 0, (size_t) given);
    } else {
        do {
            given = pread(s->file, to, (size_t) given, source);
        } while (given < 0 && errno == EINTR);
        if (given == 0) { /* the file has become shorter */
            errno = EIO;
            given = -1;
        }
    }
    s->position += given > 0 ? given : 0;
    return given;
}

static int parts_seek(void * cookie, off64_t * offset, int whence) {
    struct stream * s = cookie;
    const int64_t base = whence == SEEK_SET ? 0 : whence == SEEK_CUR ? s->position : s->size;
    if (base + *offset < 0) {
        errno = EINVAL;
        return -1;
    }
    *offset = s->position = base + *offset;
    return 0;
}

static int parts_close(void * cookie) {
    struct stream * s = cookie;
    free(s->parts);
    free(s->head);
    free(s);
    return 0;
}

/* The stream, or NULL without memory. `file` stays the caller's, and must stay open as long as the stream. */
FILE * ggscope_open_parts(
    int file, int64_t size, const char * head, int64_t head_bytes, const struct part * parts, int64_t count) {
    const cookie_io_functions_t functions = {.read = parts_read, .seek = parts_seek, .close = parts_close};
    struct stream * s = malloc(sizeof(*s));
    if (s == NULL) {
        return NULL;
    }
    s->file = file;
    s->size = size;
    s->position = 0;
    s->head_bytes = head_bytes;
    s->count = count;
    s->parts = malloc((size_t) count * sizeof(*parts) + 1);
    s->head = malloc((size_t) head_bytes + 1);
    FILE * made = s->parts != NULL && s->head != NULL ? fopencookie(s, "rb", functions) : NULL;
    if (made == NULL) {
        parts_close(s);
        return NULL;
    }
    memcpy(s->parts, parts, (size_t) count * sizeof(*parts));
    memcpy(s->head, head, (size_t) head_bytes);
    setvbuf(made, s->buffer, _IOFBF, BUFFER_BYTES);
    return made;
}

int ggscope_close_parts(FILE * made) {
    return fclose(made);
}
