// RMSNorm, with or without the residual, and SiLU times up.

#include "pointwise.h"

#include "pool.h"
#include "vectors.h"

#define PARTS 4     // vectors of interleaved sums of squares
#define PIECE 16384 // floats of a piece of work, some microseconds

static float mean_square(const float *x, int64_t n) {
    vec sums[PARTS] = {};
    int64_t i = 0;
    for (; i + PARTS * W <= n; i += PARTS * W) {
        UNROLL for (int p = 0; p < PARTS; p++) {
            const vec v = load(x + i + p * W);
            sums[p] = fma_vec(v, v, sums[p]);
        }
    }
    for (int p = 0; i < n; i += W, p++) {
        const vec v = load_up_to(x + i, n - i, 0);
        sums[p] = fma_vec(v, v, sums[p]);
    }
    return lane_sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / (float)n;
}

void rms_norm_row(const float *x, const float *weight, int64_t n, float eps, float *y) {
    const float scale = 1.0f / sqrtf(mean_square(x, n) + eps);
    int64_t i = 0;
    for (; i + W <= n; i += W) store(y + i, load(x + i) * splat(scale) * load(weight + i));
    for (; i < n; i++) y[i] = x[i] * scale * weight[i];
}

static void add_row(const float *x, int64_t n, float *sum) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(sum + i, load(sum + i) + load(x + i));
    for (; i < n; i++) sum[i] += x[i];
}

INLINE vec silu(vec x) {
    const vec bounded = min_vec(max_vec(x, splat(-88)), splat(87)); // e^-x is next to 0 or huge
    return x / (splat(1) + exp_vec(-bounded));
}

void silu_mul_row(const float *gate, const float *up, int64_t n, float *y) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(y + i, silu(load(gate + i)) * load(up + i));
    for (; i < n; i++) y[i] = silu(splat(gate[i]))[0] * up[i];
}

struct job {
    const float *x, *weight;
    float *residual, *y;
    float eps;
    int64_t m, n, rows; // rows of a piece
};

static struct job cut(struct job job) {
    job.rows = job.n < PIECE ? PIECE / job.n : 1;
    return job;
}

static int64_t num_pieces(const struct job *job) { return (job->m + job->rows - 1) / job->rows; }

static int64_t end_of(const struct job *job, int64_t piece) {
    const int64_t end = (piece + 1) * job->rows;
    return end < job->m ? end : job->m;
}

static void norm_rows(void *argument, int64_t piece) {
    const struct job *job = argument;
    const int64_t n = job->n;
    for (int64_t row = piece * job->rows; row < end_of(job, piece); row++) {
        const float *x = job->x + row * n;
        if (job->residual) {
            float *sum = job->residual + row * n;
            add_row(x, n, sum);
            x = sum;
        }
        rms_norm_row(x, job->weight, n, job->eps, job->y + row * n);
    }
}

static void gate_rows(void *argument, int64_t piece) {
    const struct job *job = argument;
    const int64_t n = job->n;
    for (int64_t row = piece * job->rows; row < end_of(job, piece); row++)
        silu_mul_row(job->x + 2 * row * n, job->x + (2 * row + 1) * n, n, job->y + row * n);
}

// x, residual, y: [m, n]; residual may be null, else x is added to it first.
void morph_rms_norm(const float *x, float *residual, const float *weight, float eps, int64_t m,
                    int64_t n, float *y, int threads) {
    struct job job = cut((struct job){x, weight, residual, y, eps, m, n, 0});
    run_pieces(norm_rows, &job, num_pieces(&job), threads);
}

// gate_up: [m, 2 n]; y: [m, n].
void morph_silu_mul(const float *gate_up, int64_t m, int64_t n, float *y, int threads) {
    struct job job = cut((struct job){.x = gate_up, .y = y, .m = m, .n = n});
    run_pieces(gate_rows, &job, num_pieces(&job), threads);
}
