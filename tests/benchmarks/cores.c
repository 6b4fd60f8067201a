// How long a cache line takes from one core to another and back.

#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <time.h>

#define TURNS 20000

static _Alignas(128) atomic_int turn;
static int cores[2];

static void stay_on(int core) {
    cpu_set_t only;
    CPU_ZERO(&only);
    CPU_SET(core, &only);
    sched_setaffinity(0, sizeof only, &only);
}

static void *answer(void *unused) {
    stay_on(cores[1]);
    for (int i = 0; i < TURNS; i++) {
        while (atomic_load(&turn) != 1) continue;
        atomic_store(&turn, 0);
    }
    return unused;
}

static void ask(int times) {
    for (int i = 0; i < times; i++) {
        atomic_store(&turn, 1);
        while (atomic_load(&turn) != 0) continue;
    }
}

static double now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

int main(void) {
    cpu_set_t granted;
    sched_getaffinity(0, sizeof granted, &granted);
    int count = 0;
    for (int core = 0; core < CPU_SETSIZE && count < 2; core++)
        if (CPU_ISSET(core, &granted)) cores[count++] = core;
    if (count < 2) return 1;
    stay_on(cores[0]);
    pthread_t other;
    pthread_create(&other, 0, answer, 0);
    ask(1); // the other one is there now
    const double started = now_ns();
    ask(TURNS - 1);
    printf("%.0f\n", (now_ns() - started) / (TURNS - 1));
    pthread_join(other, 0);
    return 0;
}
