// The pool: helpers spin for a moment after each piece of work, as the next one mostly follows
// within microseconds, then sleep until they are woken.

#define _GNU_SOURCE // pthread_atfork, clock_gettime and sched_getcpu

#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#define MAX_HELPERS 255
#define SPIN_NS 20000 // longer took the cores from HTTP and from other programs, and gained nothing
#define LOOKS 64 // between two readings of the clock

static struct {
    // Of the work that is open; written while no helper is inside.
    work_fn work;
    void *job;
    int64_t pieces;
    int helpers; // that may take part
    int cpu;     // that the caller runs on
    _Atomic int64_t next;

    _Atomic uint32_t round; // odd while work is open
    _Atomic int inside;     // helpers that may be reading the work
    _Atomic int sleeping;
    int started;
    pthread_mutex_t lock; // of sleep and waking
    pthread_cond_t wake;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static atomic_flag taken = ATOMIC_FLAG_INIT;

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

#ifdef __linux__
static cpu_set_t granted; // cores, when the first helper was started

static int this_cpu(void) { return sched_getcpu(); }

// Schedulers may wake a helper on the caller's core and leave it there, beside an idle one, where
// the two only take turns.
static void leave(int cpu) {
    cpu_set_t others = granted;
    CPU_CLR(cpu, &others);
    if (CPU_COUNT(&others)) sched_setaffinity(0, sizeof others, &others);
}

static void note_cores(void) { sched_getaffinity(0, sizeof granted, &granted); }
#else
static int this_cpu(void) { return -1; }
static void leave(int cpu) { (void)cpu; }
static void note_cores(void) {}
#endif

static void claim_pieces(void) {
    for (;;) {
        const int64_t piece = atomic_fetch_add(&pool.next, 1);
        if (piece >= pool.pieces) return;
        pool.work(pool.job, piece);
    }
}

// Announces itself before it looks whether the round is still open: a round is closed first and
// its helpers are counted then, so that one of the two sees the other.
static void join(uint32_t round, int helper) {
    atomic_fetch_add(&pool.inside, 1);
    if (atomic_load(&pool.round) == round && helper < pool.helpers) {
        const int cpu = this_cpu();
        if (cpu >= 0 && cpu == pool.cpu) leave(cpu);
        claim_pieces();
    }
    atomic_fetch_sub(&pool.inside, 1);
}

static void sleep_until_after(uint32_t round) {
    pthread_mutex_lock(&pool.lock);
    atomic_fetch_add(&pool.sleeping, 1);
    while (atomic_load(&pool.round) == round) pthread_cond_wait(&pool.wake, &pool.lock);
    atomic_fetch_sub(&pool.sleeping, 1);
    pthread_mutex_unlock(&pool.lock);
}

static uint32_t next_round(uint32_t seen) {
    const int64_t until = now_ns() + SPIN_NS;
    do {
        for (int look = 0; look < LOOKS; look++) {
            const uint32_t round = atomic_load(&pool.round);
            if (round != seen && round % 2) return round;
            relax();
        }
    } while (now_ns() < until);
    const uint32_t last = atomic_load(&pool.round);
    if (last % 2 == 0 || last == seen) sleep_until_after(last);
    return atomic_load(&pool.round);
}

static void *help(void *argument) {
    const int helper = (int)(intptr_t)argument;
    for (uint32_t round = 0;;) {
        round = next_round(round);
        if (round % 2) join(round, helper);
    }
    return 0;
}

// A child of fork() has none of the helpers.
static void forget_helpers(void) {
    pool.started = 0;
    atomic_store(&pool.round, 0);
    atomic_store(&pool.inside, 0);
    atomic_store(&pool.sleeping, 0);
    pthread_mutex_init(&pool.lock, 0);
    pthread_cond_init(&pool.wake, 0);
    atomic_flag_clear(&taken);
}

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(0, 0, forget_helpers); }

static void start_helpers(int count) {
    if (!pool.started && count) note_cores();
    for (; pool.started < count && pool.started < MAX_HELPERS; pool.started++) {
        pthread_t thread;
        if (pthread_create(&thread, 0, help, (void *)(intptr_t)pool.started)) return;
        pthread_detach(thread);
    }
}

static void open_round(work_fn work, void *job, int64_t pieces, int helpers) {
    pool.work = work;
    pool.job = job;
    pool.pieces = pieces;
    pool.helpers = helpers;
    pool.cpu = this_cpu();
    atomic_store(&pool.next, 0);
    atomic_fetch_add(&pool.round, 1);
    if (!atomic_load(&pool.sleeping)) return;
    pthread_mutex_lock(&pool.lock);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
}

// The pieces are all claimed by now: waits for those that helpers still work on.
static void close_round(void) {
    atomic_fetch_add(&pool.round, 1);
    for (int look = 0; atomic_load(&pool.inside); look++) {
        if (look < LOOKS * LOOKS)
            relax();
        else
            sched_yield();
    }
}

void run_pieces(work_fn work, void *job, int64_t pieces, int threads) {
    const int64_t helpers = (threads < pieces ? threads : pieces) - 1;
    if (helpers < 1 || atomic_flag_test_and_set(&taken)) {
        for (int64_t piece = 0; piece < pieces; piece++) work(job, piece);
        return;
    }
    start_helpers((int)helpers);
    open_round(work, job, pieces, (int)helpers);
    claim_pieces();
    close_round();
    atomic_flag_clear(&taken);
}
