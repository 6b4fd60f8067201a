// Memory that each thread keeps until it ends.

#include "scratch.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#define ALIGNMENT 64

static _Thread_local struct {
    void *memory;
    int64_t bytes;
} spaces[NUM_USES];

static pthread_key_t owner; // set in threads that have spaces

static void free_spaces(void *unused) {
    (void)unused;
    for (int use = 0; use < NUM_USES; use++) {
        free(spaces[use].memory);
        spaces[use].memory = 0;
        spaces[use].bytes = 0;
    }
}

__attribute__((constructor)) static void watch_ends(void) {
    pthread_key_create(&owner, free_spaces);
}

static void grow(enum scratch_use use, int64_t bytes) {
    free(spaces[use].memory);
    if (posix_memalign(&spaces[use].memory, ALIGNMENT, (size_t)bytes)) {
        fprintf(stderr, "morphserve: no memory is left for %lld bytes of a step's results\n",
                (long long)bytes);
        abort();
    }
    spaces[use].bytes = bytes;
    pthread_setspecific(owner, spaces);
}

void *scratch(enum scratch_use use, int64_t bytes) {
    if (spaces[use].bytes < bytes) grow(use, bytes + bytes / 2);
    return spaces[use].memory;
}
