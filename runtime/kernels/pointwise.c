// RMSNorm, with or without the residual, and SiLU times up.

#include "pointwise.h"

#include "vectors.h"

#define PARTS 4 // vectors of interleaved sums of squares

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

// x, residual, y: [m, n]; residual may be null, else x is added to it first.
void morph_rms_norm(const float *x, float *residual, const float *weight, float eps, int64_t m,
                    int64_t n, float *y) {
    for (int64_t row = 0; row < m; row++, x += n, y += n) {
        const float *input = x;
        if (residual) {
            float *sum = residual + row * n;
            add_row(x, n, sum);
            input = sum;
        }
        rms_norm_row(input, weight, n, eps, y);
    }
}

// gate_up: [m, 2 n]; y: [m, n].
void morph_silu_mul(const float *gate_up, int64_t m, int64_t n, float *y) {
    for (int64_t row = 0; row < m; row++, gate_up += 2 * n, y += n)
        silu_mul_row(gate_up, gate_up + n, n, y);
}
