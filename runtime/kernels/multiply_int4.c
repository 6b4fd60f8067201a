// Tiles of INT4 weights; kinds are compiled side by side.

#include "multiply.h"

TILES_OF(INT4)
const multiply_fn multiply_int4[MAX_ROWS] = TABLE_OF(INT4);
