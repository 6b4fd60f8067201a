// Linear: y[M, N] = x[M, K] times weight[N, K], transposed; float32, bfloat16, INT4 or INT8 weights.

#include "vectors.h"

#if W == 16
#define MAX_ROWS 6 // rows of a register tile; its accumulators and operands fit the registers
#else
#define MAX_ROWS 3
#endif
#define COLS 4        // weight rows of a register tile
#define STEP 32       // features that a tile takes at once; INT4 codes are packed in such runs
#define VECS (STEP / W)
#define DEPTH 1024    // features whose products are summed before they join the output
#define BLOCK_ROWS 48 // activation rows that stay in the second-level cache

typedef struct {
    const char *data;    // float32 or bfloat16 [N, K], or codes: INT4 [N, K / 2], INT8 [N, K]
    const float *scales; // of codes: INT4 [N, groups]; others [N, groups, 2]: scale, -zero * scale
    int64_t n, k;
    int64_t row_bytes;
    int64_t row_scales; // floats
    int group_shift; // log2 of the features that share a scale; 62: all features of a row
} weight_t;

typedef struct {
    const char *data;
    const float *scales;
    int64_t next, next_scales; // bytes, floats to the same feature of the next tile's row
} row_t;

// Past the last row, the last one again.
INLINE row_t weight_row(const weight_t *w, int64_t n) {
    if (n >= w->n) n = w->n - 1;
    row_t row = {w->data + n * w->row_bytes, w->scales + n * w->row_scales, COLS * w->row_bytes, COLS * w->row_scales};
    return row;
}

// 32 codes as weights. INT4 codes are 16 bytes: byte i holds feature i (low half) and 16 + i (high
// half). Scales come from float16, so (code - zero) * scale has at most 19 significant bits, as
// has zero * scale: both are exact, and the linear equals, bit for bit, the float32 linear over
// the dequantised weight.
INLINE void unpack(int kind, const uint8_t *codes, row_t row, int64_t group, vec w[VECS]) {
    const float *s = row.scales + (kind == INT4 ? group : 2 * group);
    const vec scale = splat(s[0]), offset = kind == INT4 ? scale * splat(-8.0f) : splat(s[1]);
    if (kind != INT8) __builtin_prefetch(s + row.next_scales); // INT8 seldom has many
    UNROLL for (int v = 0; v < VECS; v++) {
        const vecu byte = load_bytes(codes + (kind == INT8 ? v : v % (VECS / 2)) * W);
        const vecu code = kind == INT8 ? byte : v < VECS / 2 ? byte & 15 : byte >> 4;
        w[v] = fma_vec(__builtin_convertvector((veci)code, vec), scale, offset);
    }
}

// Bytes of so many features.
INLINE int64_t bytes_of(int kind, int64_t features) {
    switch (kind) {
    case F32: return features << 2;
    case BF16: return features << 1;
    case INT8: return features;
    default: return features >> 1;
    }
}

// A tile reads short runs far apart, which the hardware does not foresee: hence the prefetch of
// the next tile's. Past the weight's end it does nothing.
INLINE void load_step(int kind, row_t row, int group_shift, int64_t k, vec out[VECS]) {
    const char *p = row.data + bytes_of(kind, k);
    __builtin_prefetch(p + row.next);
    if (kind == F32) __builtin_prefetch(p + row.next + 64);
    if (kind == F32 || kind == BF16) {
        UNROLL for (int v = 0; v < VECS; v++) out[v] = load_as_float(kind, p, v * W);
    } else {
        unpack(kind, (const uint8_t *)p, row, k >> group_shift, out);
    }
}

// The sums of four vectors, each added up in the same order.
INLINE vec4 sum_lanes(const vec a[COLS]) {
#if W >= 8
    __m256 h[COLS];
    UNROLL for (int i = 0; i < COLS; i++) {
#if W == 16
        h[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)a[i]),
                             _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)a[i], 1)));
#else
        h[i] = (__m256)a[i];
#endif
    }
    __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(h[0], h[1]), _mm256_hadd_ps(h[2], h[3]));
    return (vec4)_mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
#else
    vec4 sums;
    UNROLL for (int i = 0; i < COLS; i++) sums[i] = (a[i][0] + a[i][1]) + (a[i][2] + a[i][3]);
    return sums;
#endif
}

typedef struct {
    const float *x; // first activation row, at the first feature of the chunk
    float *y;       // first output row
    int64_t x_stride, y_stride;
    int64_t depth; // features of the chunk, a multiple of STEP
    const float *bias; // added by the last chunk; null elsewhere
    int first;     // the chunk's sums start the output instead of joining it
} job_t;

INLINE void finish(const job_t *job, int rows, int cols, int64_t n, vec acc[][COLS]) {
    UNROLL for (int i = 0; i < rows; i++) {
        vec4 total = sum_lanes(acc[i]);
        float *y = job->y + i * job->y_stride + n;
        if (cols == COLS) {
            if (!job->first) total = *(loose_vec4 *)y + total;
            if (job->bias) total += *(const loose_vec4 *)(job->bias + n);
            *(loose_vec4 *)y = total;
            continue;
        }
        for (int j = 0; j < cols; j++) {
            float sum = job->first ? total[j] : y[j] + total[j];
            y[j] = job->bias ? sum + job->bias[n + j] : sum;
        }
    }
}

// A register tile straight from the stored weight: for batches of so few rows that each weight
// is used once. Surplus columns at the edge repeat the last one and are not stored.
INLINE void tile_direct(int kind, int rows, const job_t *job, const weight_t *w, int64_t n,
                        int64_t k) {
    const int cols = w->n - n < COLS ? (int)(w->n - n) : COLS;
    const float *x = job->x;
    const int64_t x_stride = job->x_stride, depth = job->depth;
    const int group_shift = w->group_shift;
    row_t weight_rows[COLS];
    UNROLL for (int j = 0; j < COLS; j++) weight_rows[j] = weight_row(w, n + j);
    vec acc[MAX_ROWS][COLS] = {};
    for (int64_t d = 0; d < depth; d += STEP)
        UNROLL for (int j = 0; j < COLS; j++) {
            vec weights[VECS];
            load_step(kind, weight_rows[j], group_shift, k + d, weights);
            UNROLL for (int v = 0; v < VECS; v++)
                UNROLL for (int i = 0; i < rows; i++)
                    acc[i][j] = fma_vec(load(x + i * x_stride + d + v * W), weights[v], acc[i][j]);
        }
    finish(job, rows, cols, n, acc);
}

// A register tile from `panel`, float32 [depth / W][COLS][W] in the first-level cache.
INLINE void tile_panel(int rows, const job_t *job, const float *panel, int cols, int64_t n) {
    const float *x = job->x;
    const int64_t x_stride = job->x_stride, depth = job->depth;
    vec acc[MAX_ROWS][COLS] = {};
    for (int64_t d = 0; d < depth; d += W) {
        vec xs[MAX_ROWS];
        UNROLL for (int i = 0; i < rows; i++) xs[i] = in_register(load(x + i * x_stride + d));
        UNROLL for (int j = 0; j < COLS; j++) {
            vec weight = in_register(load(panel + d * COLS + j * W));
            UNROLL for (int i = 0; i < rows; i++) acc[i][j] = fma_vec(xs[i], weight, acc[i][j]);
        }
    }
    finish(job, rows, cols, n, acc);
}

#if MAX_ROWS == 6
#define FOR_ROWS(CASE) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#else
#define FOR_ROWS(CASE) CASE(1) CASE(2) CASE(3)
#endif

INLINE void direct(int kind, int rows, const job_t *job, const weight_t *w, int64_t n, int64_t k) {
    switch (rows) {
#define CASE(R) \
    case R: tile_direct(kind, R, job, w, n, k); break;
        FOR_ROWS(CASE)
#undef CASE
    }
}

static void from_panel(int rows, const job_t *job, const float *panel, int cols, int64_t n) {
    switch (rows) {
#define CASE(R) \
    case R: tile_panel(R, job, panel, cols, n); break;
        FOR_ROWS(CASE)
#undef CASE
    }
}

// Features past the end of a row are filled with zeros.
INLINE void fill_panel(int kind, const weight_t *w, int64_t n, int64_t k, int64_t depth,
                       float *panel) {
    for (int j = 0; j < COLS; j++) {
        const row_t row = weight_row(w, n + j);
        int64_t d = 0;
        for (; d < depth && k + d + STEP <= w->k; d += STEP) {
            vec step[VECS];
            load_step(kind, row, w->group_shift, k + d, step);
            UNROLL for (int v = 0; v < VECS; v++)
                store(panel + (d + v * W) * COLS + j * W, step[v]);
        }
        for (; d < depth; d++) {
            float value = k + d >= w->k  ? 0.0f
                          : kind == BF16 ? from_bf16(((const uint16_t *)row.data)[k + d])
                                         : ((const float *)row.data)[k + d];
            panel[(d / W * COLS + j) * W + d % W] = value;
        }
    }
}

// Rows in tiles of nearly equal height: a lone last row would wait for its own sums.
static void rows_from_panel(const job_t *block, int rows, const float *panel, int cols, int64_t n) {
    const int tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
    job_t job = *block;
    for (int t = 0; t < tiles; t++) {
        int height = rows / tiles + (t < rows % tiles);
        from_panel(height, &job, panel, cols, n);
        job.x += height * job.x_stride;
        job.y += height * job.y_stride;
    }
}

INLINE void linear_strips(int kind, const float *x, int64_t m, int64_t x_stride,
                          const weight_t *w, const float *bias, float *y, int64_t first_strip,
                          int64_t last_strip) {
    float panel[COLS * DEPTH] __attribute__((aligned(64)));
    const int64_t blocks = (m + BLOCK_ROWS - 1) / BLOCK_ROWS, block = (m + blocks - 1) / blocks;
    for (int64_t row = 0; row < m; row += block)
        for (int64_t k = 0; k < x_stride; k += DEPTH) {
            int rows = m - row < block ? (int)(m - row) : (int)block;
            int64_t depth = x_stride - k < DEPTH ? x_stride - k : DEPTH;
            job_t job = {x + row * x_stride + k, y + row * w->n, x_stride, w->n, depth,
                         k + depth == x_stride ? bias : 0, k == 0};
            for (int64_t strip = first_strip; strip < last_strip; strip++) {
                int64_t n = strip * COLS;
                if (rows <= MAX_ROWS && w->k == x_stride) {
                    direct(kind, rows, &job, w, n, k);
                    continue;
                }
                int cols = w->n - n < COLS ? (int)(w->n - n) : COLS;
                fill_panel(kind, w, n, k, depth, panel);
                rows_from_panel(&job, rows, panel, cols, n);
            }
        }
}

static void linear_kind(int kind, const float *x, int64_t m, int64_t x_stride, const weight_t *w,
                        const float *bias, float *y, int64_t first, int64_t last) {
    switch (kind) {
    case F32: linear_strips(F32, x, m, x_stride, w, bias, y, first, last); break;
    case BF16: linear_strips(BF16, x, m, x_stride, w, bias, y, first, last); break;
    case INT4: linear_strips(INT4, x, m, x_stride, w, bias, y, first, last); break;
    case INT4_ZEROS: linear_strips(INT4_ZEROS, x, m, x_stride, w, bias, y, first, last); break;
    case INT8: linear_strips(INT8, x, m, x_stride, w, bias, y, first, last); break;
    }
}

// x: [m, x_stride] where x_stride is k rounded up to a multiple of STEP, zeros past k. A row of codes
// is a whole number of STEPs, and so is a group of them; several groups have a power of two.
void morph_linear(int kind, const float *x, int64_t m, int64_t x_stride, const void *data,
                  const float *scales, int64_t n, int64_t k, int64_t groups, const float *bias,
                  float *y, int threads) {
    if (!m) return;
    const weight_t w = {.data = data,
                        .scales = scales,
                        .n = n,
                        .k = k,
                        .row_bytes = bytes_of(kind, k),
                        .row_scales = kind == INT4 ? groups : 2 * groups,
                        .group_shift = groups > 1 ? __builtin_ctzll(k / groups) : 62};
    const int64_t strips = (n + COLS - 1) / COLS;
    if (threads > strips) threads = (int)strips;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int t = 0; t < threads; t++)
        linear_kind(kind, x, m, x_stride, &w, bias, y, strips * t / threads,
                    strips * (t + 1) / threads);
}
