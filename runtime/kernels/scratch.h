// Memory for what is needed for a moment, kept for the next time.

#ifndef MORPH_SCRATCH_H
#define MORPH_SCRATCH_H

#include <stdint.h>

enum scratch_use { ACTIVATIONS, ROW, RESIDUAL, STEP, QUERIES, SHARES, RESULTS, NUM_USES };

// At least so many bytes of the calling thread, aligned for vectors; what was there before may be
// gone. Each `use` has its own.
void *scratch(enum scratch_use use, int64_t bytes);

#endif
