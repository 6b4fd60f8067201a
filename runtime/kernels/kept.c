// What top_k and top_p keep, without sorting: found from its border, the logit at which so many
// tokens, or so much of the mass, is reached from above. A few pivots cut the row in parts, and
// only the part with the border in it is looked at again.

#include "kept.h"

#define CHUNK 2048 // logits whose sums fit a float well
#define SAMPLE 32  // logits that pivots are chosen from
#define PIVOTS 5   // above them lie about 1/32, 1/16, ..., 1/2 of the logits
#define ALL PIVOTS // place of the sum over everything

INLINE double measure_one(const struct row *row, int by_mass, float logit) {
    return by_mass ? weigh(row, splat(logit))[0] : 1;
}

// How many logits are at least each pivot, or their mass; and of all.
INLINE void measure(const struct row *row, int by_mass, const float *x, int64_t n,
                    const float *pivots, double *sums) {
    for (int p = 0; p <= ALL; p++) sums[p] = 0;
    for (int64_t start = 0; start < n; start += CHUNK) {
        const int64_t end = start + CHUNK < n ? start + CHUNK : n;
        vec parts[PIVOTS + 1] = {};
        for (int64_t i = start; i < end; i += W) {
            const vec logits = load_up_to(x + i, end - i, -INFINITY);
            const vec weight = by_mass ? weigh(row, logits) : splat(1);
            UNROLL for (int p = 0; p < PIVOTS; p++)
                parts[p] = add_at(at_least(logits, splat(pivots[p])), parts[p], weight);
            if (by_mass) parts[ALL] += weight;
        }
        for (int p = 0; p <= ALL; p++) sums[p] += lane_sum(parts[p]);
    }
    if (!by_mass) sums[ALL] = (double)n;
}

// Writes the logits greater than `low` and less than `high` to `out`, which may be x itself;
// returns how many.
static int64_t between(const float *x, int64_t n, float low, float high, float *out) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += W) {
        const vec logits = load_up_to(x + i, n - i, -INFINITY);
        const lanes inside = above(logits, splat(low)) & above(splat(high), logits);
        uint32_t bits = bits_of(inside);
#if W == 16
        store(out + count, (vec)_mm512_maskz_compress_ps(inside, (__m512)logits));
        count += __builtin_popcount(bits);
#else
        for (; bits; bits &= bits - 1) out[count++] = logits[__builtin_ctz(bits)];
#endif
    }
    return count;
}

// x: [SAMPLE]; afterwards the greatest comes first.
static void sort_sample(float *x) {
    float sorted[SAMPLE];
    for (int i = 0; i < SAMPLE; i++) {
        int place = 0;
        for (int j = 0; j < SAMPLE; j++) place += (x[j] > x[i]) | ((x[j] == x[i]) & (j < i));
        sorted[place] = x[i];
    }
    memcpy(x, sorted, sizeof sorted);
}

static void choose_pivots(const float *x, int64_t n, float *pivots) {
    float sample[SAMPLE];
    for (int i = 0; i < SAMPLE; i++) sample[i] = x[i * n / SAMPLE];
    sort_sample(sample);
    for (int p = 0; p < PIVOTS; p++) pivots[p] = sample[(1 << p) - 1];
}

struct border {
    float logit;    // the greatest at which the goal is reached; -infinity: never
    double missing; // of the goal above it: how many of this logit are kept, or their mass
};

// n <= SAMPLE logits, between `border`'s and what it counts as above.
static struct border walk(const struct row *row, int by_mass, const float *x, int64_t n,
                          struct border border) {
    float sorted[SAMPLE];
    for (int64_t i = 0; i < SAMPLE; i++) sorted[i] = i < n ? x[i] : -INFINITY;
    sort_sample(sorted);
    for (int64_t i = 0, end; i < n; i = end) {
        for (end = i + 1; end < n && sorted[end] == sorted[i];) end++;
        const double sum = (double)(end - i) * measure_one(row, by_mass, sorted[i]);
        if (sum >= border.missing) return (struct border){sorted[i], border.missing};
        border.missing -= sum;
    }
    return border;
}

// From the greatest logit down, so many or, by mass, this share. `rest` may be x itself.
INLINE struct border find_border(const struct row *row, int by_mass, const float *x, int64_t n,
                                 double goal, float *rest) {
    struct border border = {-INFINITY, goal};
    for (int round = 0; round == 0 || n > SAMPLE; round++) {
        float pivots[PIVOTS];
        double sums[PIVOTS + 1];
        choose_pivots(x, n, pivots);
        measure(row, by_mass, x, n, pivots, sums);
        if (by_mass && round == 0) border.missing *= sums[ALL];
        if (sums[ALL] < border.missing) {
            border.missing -= sums[ALL];
            return border;
        }
        int p = 0;
        while (p < PIVOTS && sums[p] < border.missing) p++;
        if (p < PIVOTS) border.logit = pivots[p];
        // Logits equal to a pivot stay out on both sides: each round has fewer, whatever they are.
        n = between(x, n, border.logit, p ? pivots[p - 1] : INFINITY, rest);
        border.missing -= p ? sums[p - 1] : 0;
        x = rest;
    }
    return walk(row, by_mass, x, n, border);
}

// The place after the `count`th token of this logit, or the row's end.
static int64_t after_equals(const struct row *row, float logit, double count) {
    for (int64_t i = 0; i < row->vocab; i += W) {
        const vec logits = load_up_to(row->logits + i, row->vocab - i, -INFINITY);
        uint32_t bits = bits_of(equal(logits, splat(logit)));
        for (; bits; bits &= bits - 1)
            if (--count <= 0) return i + __builtin_ctz(bits) + 1;
    }
    return row->vocab;
}

// Of the border's own tokens the first `count` are kept, of those that were before.
static void narrow(struct row *row, struct border border, double count) {
    if (border.logit == -INFINITY) return;
    const int64_t split = after_equals(row, border.logit, count);
    if (border.logit > row->floor || split < row->split) row->split = split;
    row->floor = border.logit;
}

void keep_top_k(struct row *row, int64_t k, float *rest) {
    const struct border border =
        find_border(row, 0, row->logits, row->vocab, (double)k, rest);
    row->equals = (int64_t)border.missing;
    narrow(row, border, border.missing);
}

// The logits that top_k kept.
static int64_t copy_kept(const struct row *row, float *out) {
    int64_t n = between(row->logits, row->vocab, row->floor, INFINITY, out);
    for (int64_t i = 0; i < row->equals; i++) out[n++] = row->floor;
    return n;
}

void keep_top_p(struct row *row, double share, float *rest) {
    const int cut = row->floor > -INFINITY;
    const float *x = cut ? rest : row->logits;
    const int64_t n = cut ? copy_kept(row, rest) : row->vocab;
    const struct border border = find_border(row, 1, x, n, share, rest);
    narrow(row, border, ceil(border.missing / measure_one(row, 1, border.logit)));
}
