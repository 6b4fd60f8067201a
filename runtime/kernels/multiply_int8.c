// Tiles of INT8 weights; kinds are compiled side by side.

#include "multiply.h"

TILES_OF(INT8)
const multiply_fn multiply_int8[MAX_ROWS] = TABLE_OF(INT8);
