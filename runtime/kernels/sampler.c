// The next token of each row of logits: the greatest, or one drawn from what its request keeps.

#include "kept.h"
#include "pool.h"
#include "scratch.h"

#include <float.h>

#define BLOCKS 64         // that a row's mass is summed in
#define CHUNK 1024        // logits between two looks for a new greatest one
#define MIN_RATE 1e-30    // at which the lowest float is still far from any logit
#define MIN_SHARED 200000 // greedy logits; fewer are done before a second thread has come
#define DRAWN_COST 8      // of a drawn row, in greedy ones

struct draw {
    double temperature; // 0: the greatest logit
    double min_p, top_k, top_p;
    double uniform; // in [0, 1): where in the kept mass the token lies
};

// The first of the greatest logits, or -1 if one is not finite.
static int64_t find_greatest(const float *x, int64_t n) {
    const veci magnitude = (veci)((vecu){} + 0x7fffffffu), infinity = (veci){} + 0x7f800000;
    veci broken = {};
    float greatest = -INFINITY;
    int64_t block = 0;
    for (int64_t start = 0; start < n; start += CHUNK) {
        const int64_t end = start + CHUNK < n ? start + CHUNK : n;
        vec top[2] = {splat(greatest), splat(greatest)};
        for (int64_t i = start; i < end; i += 2 * W) {
            const vec a = load_up_to(x + i, end - i, x[i]);
            const vec b = i + W < end ? load_up_to(x + i + W, end - i - W, x[i]) : a;
            broken |= ((veci)a & magnitude) >= infinity;
            broken |= ((veci)b & magnitude) >= infinity;
            top[0] = max_vec(top[0], a);
            top[1] = max_vec(top[1], b);
        }
        top[0] = max_vec(top[0], top[1]);
        if (!bits_of(above(top[0], splat(greatest)))) continue;
        block = start;
        greatest = lane_max(top[0]);
    }
    for (int i = 0; i < W; i++)
        if (broken[i]) return -1;
    while (x[block] != greatest) block++;
    return block;
}

INLINE vec kept_weights(const struct row *row, int64_t i, int64_t end, float floor) {
    const vec logits = load_up_to(row->logits + i, end - i, -INFINITY);
    const lanes kept = at_least(logits, splat(floor));
    return bits_of(kept) ? only(kept, weigh(row, logits)) : (vec){};
}

static float mass_between(const struct row *row, int64_t start, int64_t end, float floor) {
    vec sum = {};
    for (int64_t i = start; i < end; i += W) sum += kept_weights(row, i, end, floor);
    return lane_sum(sum);
}

INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) {
    return x < low ? low : x > high ? high : x;
}

static double mass_of(const struct row *row, int64_t start, int64_t end) {
    const int64_t split = clamp(row->split, start, end);
    const float later = nextafterf(row->floor, INFINITY);
    return (double)mass_between(row, start, split, row->floor) +
           (double)mass_between(row, split, end, later);
}

INLINE int64_t block_size(const struct row *row) {
    const int64_t size = (row->vocab + BLOCKS - 1) / BLOCKS;
    return (size + W - 1) / W * W;
}

static double block_masses(const struct row *row, double *masses) {
    const int64_t size = block_size(row), n = row->vocab;
    double total = 0;
    for (int64_t b = 0; b < BLOCKS; b++) {
        masses[b] = mass_of(row, clamp(b * size, 0, n), clamp((b + 1) * size, 0, n));
        total += masses[b];
    }
    return total;
}

struct search {
    double before, place; // masses: of the tokens passed, and the one wanted
    int64_t token;        // the latest kept one passed
};

static void search_between(const struct row *row, int64_t start, int64_t end, float floor,
                           struct search *search) {
    for (int64_t i = start; i < end && search->before <= search->place; i += W) {
        float weights[W];
        store(weights, kept_weights(row, i, end, floor));
        for (int lane = 0; lane < W && search->before <= search->place; lane++) {
            if (weights[lane] == 0) continue;
            search->before += weights[lane];
            search->token = i + lane;
        }
    }
}

// The first token whose mass, with all before it, is more than `place`; where rounding leaves
// none, the last kept one.
static int64_t pick(const struct row *row, const double *masses, double place) {
    struct search search = {0, place, 0};
    int64_t block = 0;
    double sum = 0;
    for (int64_t b = 0; b < BLOCKS && sum <= place; b++) {
        if (masses[b] == 0) continue;
        block = b;
        search.before = sum;
        sum += masses[b];
    }
    const int64_t size = block_size(row);
    const int64_t start = clamp(block * size, 0, row->vocab);
    const int64_t end = clamp(start + size, 0, row->vocab);
    const int64_t split = clamp(row->split, start, end);
    search_between(row, start, split, row->floor, &search);
    search_between(row, split, end, nextafterf(row->floor, INFINITY), &search);
    return search.token;
}

static struct row new_row(const float *logits, int64_t vocab, float greatest,
                          const struct draw *draw) {
    const double rate = fmin(fmax(M_LOG2E / draw->temperature, MIN_RATE), FLT_MAX);
    return (struct row){.logits = logits,
                        .vocab = vocab,
                        .split = vocab,
                        .floor = -INFINITY,
                        .greatest = greatest,
                        .rate = (float)rate,
                        .least = fmaxf((float)draw->min_p, FLT_MIN)};
}

static int64_t sample_row(const float *logits, int64_t vocab, const struct draw *draw) {
    const int64_t greatest = find_greatest(logits, vocab);
    if (greatest < 0 || !draw || draw->temperature == 0) return greatest;
    float *rest = scratch(ROW, 4 * (vocab + PADDING));
    struct row row = new_row(logits, vocab, logits[greatest], draw);
    if (draw->top_k > 0 && draw->top_k < (double)vocab)
        keep_top_k(&row, (int64_t)draw->top_k, rest);
    if (draw->top_p < 1) keep_top_p(&row, draw->top_p, rest);
    double masses[BLOCKS];
    const double total = block_masses(&row, masses);
    return pick(&row, masses, draw->uniform * total);
}

struct job {
    const float *logits;
    const struct draw *draws;
    int64_t vocab;
    int64_t *tokens;
};

static void sample_one(void *argument, int64_t i) {
    const struct job *job = argument;
    const struct draw *draw = job->draws ? job->draws + i : 0;
    job->tokens[i] = sample_row(job->logits + i * job->vocab, job->vocab, draw);
}

// logits: [rows, vocab]; draws: [rows], null if all are greedy; tokens: [rows], -1 where a row is
// not finite.
void morph_sample(const float *logits, const struct draw *draws, int64_t rows, int64_t vocab,
                  int64_t *tokens, int threads) {
    struct job job = {logits, draws, vocab, tokens};
    const int64_t work = rows * vocab * (draws ? DRAWN_COST : 1);
    run_pieces(sample_one, &job, rows, work < MIN_SHARED ? 1 : threads);
}
