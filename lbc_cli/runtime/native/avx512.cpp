// AVX-512: 16 lanes. A permutation of one register picks among 16 input channels, of two registers among 32.
#include <immintrin.h>

#include "micro.h"

namespace lbc {
namespace {

struct Avx512 {
    static constexpr int lanes = 16;
    using R = __m512;

    static LBC_INLINE __mmask16 some(int64_t n) { return (__mmask16)((1u << n) - 1); }
    static LBC_INLINE R zero() { return _mm512_setzero_ps(); }
    static LBC_INLINE R load(const float *p) { return _mm512_loadu_ps(p); }
    static LBC_INLINE R load_some(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(some(n), p); }
    static LBC_INLINE void store(float *p, R v) { _mm512_storeu_ps(p, v); }
    static LBC_INLINE void store_some(float *p, R v, int64_t n) { _mm512_mask_storeu_ps(p, some(n), v); }
    static LBC_INLINE R spread(const float *p) { return _mm512_set1_ps(*p); }
    static LBC_INLINE R fma(R a, R b, R c) { return _mm512_fmadd_ps(a, b, c); }
    static LBC_INLINE R add(R a, R b) { return _mm512_add_ps(a, b); }
    static LBC_INLINE R relu(R v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }  // the second where one is NaN
    static LBC_INLINE __m512i positions(const uint8_t *p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    }
    static LBC_INLINE R widen(const uint16_t *p) {
        const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    }
    template <int G>
    static LBC_INLINE R pick(const char *x, __m512i where) {
        const float *from = (const float *)x;
        if constexpr (G == 16)
            return _mm512_permutexvar_ps(where, load(from));
        else
            return _mm512_permutex2var_ps(load(from), where, load(from + 16));
    }
};

bool supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}

Kernel choose(const LbcWeight &w) {
    const bool half = w.half != 0;
    if (w.vector == 32) return shared_kernel<Avx512, 32, 2, 7>(half);
    if (w.vector == 16) return shared_kernel<Avx512, 16, 1, 7>(half);
    return w.m > 16 ? permuted_kernel<Avx512, 32, 6>(half) : permuted_kernel<Avx512, 16, 7>(half);
}

// Twelve independent sums hide the latency. In assembler, so that nothing but these instructions is measured.
#define LBC_LOOP(body)                                              \
    asm volatile(                                                   \
        "1:\n\t" body                                               \
        "dec %0\n\t"                                                \
        "jnz 1b"                                                    \
        : "+r"(rounds)                                              \
        :                                                           \
        : "cc", LBC_REGISTERS)
#define LBC_REGISTERS \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19"
#define LBC_FMA(i) "vfmadd231ps %%zmm14, %%zmm13, %%zmm" #i "\n\t"
#define LBC_PAIR(i, free) "vpermps %%zmm14, %%zmm15, %%zmm" #free "\n\tvfmadd231ps %%zmm" #free ", %%zmm13, %%zmm" #i "\n\t"

double rate(int32_t kind, int64_t rounds) {
    const double count = 12.0 * (double)rounds;
    if (kind == 0)
        LBC_LOOP(LBC_FMA(0) LBC_FMA(1) LBC_FMA(2) LBC_FMA(3) LBC_FMA(4) LBC_FMA(5) LBC_FMA(6) LBC_FMA(7) LBC_FMA(8)
                     LBC_FMA(9) LBC_FMA(10) LBC_FMA(11));
    else
        LBC_LOOP(LBC_PAIR(0, 16) LBC_PAIR(1, 17) LBC_PAIR(2, 18) LBC_PAIR(3, 19) LBC_PAIR(4, 16) LBC_PAIR(5, 17)
                     LBC_PAIR(6, 18) LBC_PAIR(7, 19) LBC_PAIR(8, 16) LBC_PAIR(9, 17) LBC_PAIR(10, 18)
                         LBC_PAIR(11, 19));
    return count;
}

}  // namespace

const Isa avx512_isa = {supported, choose, rate};

}  // namespace lbc
