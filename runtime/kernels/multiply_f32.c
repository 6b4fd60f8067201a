// Tiles of float32 weights; kinds are compiled side by side.

#include "multiply.h"

TILES_OF(F32)
const multiply_fn multiply_f32[MAX_ROWS] = TABLE_OF(F32);
