// What this machine can do at most: how fast memory is read, how fast registers multiply.

#include "vectors.h"

enum {
    READS = 8, // vectors read at once
    SUMS = 12, // that grow side by side: enough to hide the time until a product is there
};

enum product { OF_FLOAT32, OF_BFLOAT16, OF_INT8 }; // as in morphcli/bench/kernels/machine.py

typedef uint64_t wide __attribute__((vector_size(64), may_alias));

// Adds up `bytes` bytes, a multiple of 512, as 64-bit words.
void morph_probe_read(const void *data, int64_t bytes, uint64_t *sum) {
    const wide *p = data, *end = p + bytes / (int64_t)sizeof *p;
    wide sums[READS] = {{0}}, all = {0};
    for (; p < end; p += READS) {
        UNROLL for (int i = 0; i < READS; i++) sums[i] += p[i];
    }
    for (int i = 0; i < READS; i++) all += sums[i];
    *sum = 0;
    for (int i = 0; i < 8; i++) *sum += all[i];
}

#if defined(__x86_64__)
#define REGISTER "v"
#elif defined(__aarch64__)
#define REGISTER "w"
#else
#define REGISTER "m"
#endif

// The empty asm keeps the sums in the loop and in registers, and equal ones from becoming one.
#define MULTIPLY(name, type, product)                                                              \
    static void name(int64_t rounds) {                                                             \
        type a = {1}, b = {2}, sums[SUMS] = {{0}};                                                 \
        for (int64_t i = 0; i < rounds; i++) {                                                     \
            UNROLL for (int j = 0; j < SUMS; j++) {                                                \
                sums[j] = (type)product;                                                           \
                __asm__ volatile("" : "+" REGISTER(sums[j]));                                      \
            }                                                                                      \
        }                                                                                          \
    }

MULTIPLY(multiply_f32, vec, fma_vec(a, b, sums[j]))
#if defined(__AVX512BF16__)
#define HAS_BF16 1
MULTIPLY(multiply_bf16, vec, _mm512_dpbf16_ps((__m512)sums[j], (__m512bh)a, (__m512bh)b))
#endif
#if defined(__AVX512VNNI__)
#define HAS_INT8 1
MULTIPLY(multiply_int8, veci, _mm512_dpbusd_epi32((__m512i)sums[j], (__m512i)a, (__m512i)b))
#elif defined(__AVXVNNI__)
#define HAS_INT8 1
MULTIPLY(multiply_int8, veci, _mm256_dpbusd_avx_epi32((__m256i)sums[j], (__m256i)a, (__m256i)b))
#endif

// Multiplies in registers for so many rounds. `done`: multiply-adds; 0 where the CPU has no
// instruction for the kind.
void morph_probe_multiply(int kind, int64_t rounds, int64_t *done) {
    int64_t products = 0; // of one instruction
    switch (kind) {
    case OF_FLOAT32: multiply_f32(rounds), products = W; break;
#ifdef HAS_BF16
    case OF_BFLOAT16: multiply_bf16(rounds), products = 2 * W; break;
#endif
#ifdef HAS_INT8
    case OF_INT8: multiply_int8(rounds), products = 4 * W; break;
#endif
    }
    *done = rounds * SUMS * products;
}
