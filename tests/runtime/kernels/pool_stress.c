// Shares out many rounds of work and checks that each piece is done once, and seen when the call
// returns. Meant to run under a thread sanitiser, which sees what no result shows.

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pool.h"

#define MOST 40

typedef struct {
    int64_t times[MOST]; // that each piece was done; plain, so that two threads at it are a race
    int is_outer;
} Job;

static void work(void *argument, int64_t piece) {
    Job *job = argument;
    job->times[piece]++;
    if (!job->is_outer) return;
    Job inner = {0};
    run_pieces(work, &inner, 3, 4);
    job->times[piece] += inner.times[0] + inner.times[1] + inner.times[2] - 3;
}

static void share_out(int rounds) {
    for (int round = 0; round < rounds; round++) {
        Job job = {.is_outer = round % 11 == 0};
        const int64_t pieces = round % MOST;
        run_pieces(work, &job, pieces, 1 + round % 5);
        for (int64_t piece = 0; piece < MOST; piece++) {
            if (job.times[piece] == (piece < pieces)) continue;
            fprintf(stderr, "round %d: piece %d of %d was done %d times\n", round, (int)piece,
                    (int)pieces, (int)job.times[piece]);
            exit(1);
        }
        if (round % 100 == 99) usleep(300); // helpers fall asleep
    }
}

static void *share_out_beside(void *rounds) {
    share_out(*(int *)rounds);
    return 0;
}

int main(void) {
    int rounds = 4000;
    pthread_t other;
    pthread_create(&other, 0, share_out_beside, &rounds);
    share_out(rounds);
    pthread_join(other, 0);
    const pid_t child = fork();
    if (child == 0) {
        share_out(rounds);
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    return status != 0;
}
