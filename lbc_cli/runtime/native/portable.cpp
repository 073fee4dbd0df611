// Plain C++ for any processor: the same order of sums, without instructions of its own.
#include <cmath>
#include <cstring>

#include "micro.h"

namespace lbc {
namespace {

struct Portable {
    static constexpr int lanes = 16;
    struct R {
        float of[lanes];
    };
    struct Positions {
        const uint8_t *of;
    };

    static R zero() { return R{}; }
    static R load(const float *p) {
        R v;
        memcpy(v.of, p, sizeof v.of);
        return v;
    }
    static R load_some(const float *p, int64_t n) {
        R v{};
        memcpy(v.of, p, (size_t)n * sizeof(float));
        return v;
    }
    static void store(float *p, const R &v) { memcpy(p, v.of, sizeof v.of); }
    static void store_some(float *p, const R &v, int64_t n) { memcpy(p, v.of, (size_t)n * sizeof(float)); }
    static R spread(const float *p) {
        float value;
        memcpy(&value, p, sizeof value);
        R v;
        for (float &lane : v.of) lane = value;
        return v;
    }
    // Rounded twice where the processor has no such instruction: std::fma would be a slow library call there.
    static R fma(const R &a, const R &b, R c) {
        for (int i = 0; i < lanes; i++) c.of[i] += a.of[i] * b.of[i];
        return c;
    }
    static R add(R a, const R &b) {
        for (int i = 0; i < lanes; i++) a.of[i] += b.of[i];
        return a;
    }
    static R relu(R v) {
        for (float &lane : v.of) lane = lane < 0 ? 0.0f : lane;
        return v;
    }
    static Positions positions(const uint8_t *p) { return {p}; }
    static R widen(const uint16_t *p) {
        R v;
        for (int i = 0; i < lanes; i++) {
            const uint32_t bits = (uint32_t)p[i] << 16;
            memcpy(&v.of[i], &bits, sizeof bits);
        }
        return v;
    }
    template <int G>
    static R pick(const char *x, Positions where) {
        R v;
        for (int i = 0; i < lanes; i++) memcpy(&v.of[i], x + where.of[i] * sizeof(float), sizeof(float));
        return v;
    }
};

bool supported() { return true; }

Kernel choose(const LbcWeight &w) {
    const bool half = w.half != 0;
    if (w.vector == 32) return shared_kernel<Portable, 32, 1, 2>(half);
    if (w.vector == 16) return shared_kernel<Portable, 16, 1, 2>(half);
    return w.m > 16 ? permuted_kernel<Portable, 32, 2>(half) : permuted_kernel<Portable, 16, 2>(half);
}

double rate(int32_t, int64_t) { return 0; }

}  // namespace

const Isa portable_isa = {supported, choose, rate};

}  // namespace lbc
