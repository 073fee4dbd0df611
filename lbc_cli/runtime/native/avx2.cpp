// AVX2: 8 lanes, so that a block of 16 output channels is two parts. A permutation picks among 8 input channels; more
// take several permutations and a choice between their results by the upper bits of the position.
#include <immintrin.h>

#include "micro.h"

namespace lbc {
namespace {

struct Avx2 {
    static constexpr int lanes = 8;
    using R = __m256;

    static LBC_INLINE __m256i some(int64_t n) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    static LBC_INLINE R zero() { return _mm256_setzero_ps(); }
    static LBC_INLINE R load(const float *p) { return _mm256_loadu_ps(p); }
    static LBC_INLINE R load_some(const float *p, int64_t n) { return _mm256_maskload_ps(p, some(n)); }
    static LBC_INLINE void store(float *p, R v) { _mm256_storeu_ps(p, v); }
    static LBC_INLINE void store_some(float *p, R v, int64_t n) { _mm256_maskstore_ps(p, some(n), v); }
    static LBC_INLINE R spread(const float *p) { return _mm256_broadcast_ss(p); }
    static LBC_INLINE R fma(R a, R b, R c) { return _mm256_fmadd_ps(a, b, c); }
    static LBC_INLINE R add(R a, R b) { return _mm256_add_ps(a, b); }
    static LBC_INLINE R relu(R v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }  // the second where one is NaN
    static LBC_INLINE __m256i positions(const uint8_t *p) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
    }
    static LBC_INLINE R widen(const uint16_t *p) {
        const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    }
    template <int G>
    static LBC_INLINE R pick(const char *x, __m256i where) {
        const float *from = (const float *)x;
        if constexpr (G == 8) {
            return _mm256_permutevar8x32_ps(load(from), where);  // reads the three lowest bits
        } else {
            constexpr int upper = G == 16 ? 28 : 27;  // brings the highest bit of the position to the sign
            const __m256 low = pick<G / 2>(x, where);
            const __m256 high = pick<G / 2>(x + G / 2 * sizeof(float), where);
            return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(where, upper)));
        }
    }
};

bool supported() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

Kernel choose(const LbcWeight &w) {
    const bool half = w.half != 0;
    if (w.vector == 32) return shared_kernel<Avx2, 32, 2, 3>(half);
    if (w.vector == 16) return shared_kernel<Avx2, 16, 2, 3>(half);
    if (w.m > 16) return permuted_kernel<Avx2, 32, 3>(half);
    return w.m > 8 ? permuted_kernel<Avx2, 16, 4>(half) : permuted_kernel<Avx2, 8, 6>(half);
}

// Ten independent sums hide the latency. In assembler, so that nothing but these instructions is measured.
#define LBC_LOOP(body)                                              \
    asm volatile(                                                   \
        "1:\n\t" body                                               \
        "dec %0\n\t"                                                \
        "jnz 1b"                                                    \
        : "+r"(rounds)                                              \
        :                                                           \
        : "cc", LBC_REGISTERS)
#define LBC_REGISTERS \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"
#define LBC_FMA(i) "vfmadd231ps %%ymm14, %%ymm13, %%ymm" #i "\n\t"
#define LBC_PAIR(i, free) "vpermps %%ymm14, %%ymm15, %%ymm" #free "\n\tvfmadd231ps %%ymm" #free ", %%ymm13, %%ymm" #i "\n\t"

double rate(int32_t kind, int64_t rounds) {
    const double count = 10.0 * (double)rounds;
    if (kind == 0)
        LBC_LOOP(LBC_FMA(0) LBC_FMA(1) LBC_FMA(2) LBC_FMA(3) LBC_FMA(4) LBC_FMA(5) LBC_FMA(6) LBC_FMA(7) LBC_FMA(8)
                     LBC_FMA(9));
    else
        LBC_LOOP(LBC_PAIR(0, 10) LBC_PAIR(1, 11) LBC_PAIR(2, 12) LBC_PAIR(3, 10) LBC_PAIR(4, 11) LBC_PAIR(5, 12)
                     LBC_PAIR(6, 10) LBC_PAIR(7, 11) LBC_PAIR(8, 12) LBC_PAIR(9, 10));
    return count;
}

}  // namespace

const Isa avx2_isa = {supported, choose, rate};

}  // namespace lbc
