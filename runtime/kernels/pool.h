// Threads that share one piece of work at a time.

#ifndef MORPH_POOL_H
#define MORPH_POOL_H

#include <stdint.h>

typedef void (*work_fn)(void *job, int64_t piece);

// work(job, 0), ..., work(job, pieces - 1), each once, on the calling thread and up to threads - 1
// others. Returns when all are done. Pieces are claimed one by one, so that a thread whose core is
// taken by another program holds up one piece and no more. A call from inside a piece, or while
// another thread's call runs, does all of its pieces on its own thread.
void run_pieces(work_fn work, void *job, int64_t pieces, int threads);

#endif
