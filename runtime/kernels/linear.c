// Linears: y[M, N] = x[M, K] times weight[N, K], transposed, in pieces that threads share.

#include "linear.h"

#include "multiply.h"
#include "pool.h"

#define PIECE_BYTES (128 << 10) // of weights
#define BLOCK_BYTES (384 << 10) // of activations that stay in the second-level cache
#define MIN_SHARED (1 << 18)    // multiply-adds that are worth a second thread

// Strips of one piece, for one block of rows. Pieces of the same strips follow each other.
static void multiply_piece(void *job, int64_t index) {
    static const multiply_fn *const of_kind[] = {multiply_f32, multiply_bf16, multiply_int4,
                                                 multiply_int8};
    const product_t *p = job;
    const int64_t blocks = (p->a->tiles + p->block_tiles - 1) / p->block_tiles;
    const int64_t piece = index / blocks, block = index % blocks;
    const int64_t first = p->strips * piece / p->pieces, end = p->strips * (piece + 1) / p->pieces;
    const int64_t past = (block + 1) * p->block_tiles;
    for (int64_t t = block * p->block_tiles; t < past && t < p->a->tiles; t++) {
        const tile_t tile = row_tile(p->a, t);
        of_kind[p->w->kind][tile.rows - 1](p, &tile, first, end);
    }
}

void linear(const linear_t *w, row_fn rows, const void *source, int64_t m, float *y, int add,
            int threads) {
    if (!m) return;
    if (m * w->n * w->k < MIN_SHARED) threads = 1;
    const activations_t a = prepare(w, rows, source, m, threads);
    product_t p = {.w = w, .a = &a, .y = y, .add = add};
    p.strips = (w->n + STRIP - 1) / STRIP;
    p.strip_bytes = (w->kind == INT4 ? a.words / 2 : a.words) * WORD_BYTES;
    p.pieces = (p.strips * p.strip_bytes + PIECE_BYTES - 1) / PIECE_BYTES;
    p.pieces = (p.pieces + threads - 1) / threads * threads;
    if (p.pieces > p.strips) p.pieces = p.strips;
    p.block_tiles = BLOCK_BYTES / (4 * MAX_ROWS * a.words) + 1;
    const int64_t blocks = (a.tiles + p.block_tiles - 1) / p.block_tiles;
    run_pieces(multiply_piece, &p, p.pieces * blocks, threads);
}

void morph_linear(const linear_t *w, const float *x, int64_t m, float *y, int threads) {
    const matrix_t matrix = {x, w->k};
    linear(w, matrix_row, &matrix, m, y, 0, threads);
}
