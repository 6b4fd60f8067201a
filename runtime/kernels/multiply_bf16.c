// Tiles of bfloat16 weights; kinds are compiled side by side.

#include "multiply.h"

TILES_OF(BF16)
const multiply_fn multiply_bf16[MAX_ROWS] = TABLE_OF(BF16);
