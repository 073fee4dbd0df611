// The micro-kernels, written once over an instruction set A:
//
//   A::lanes, A::R          a register of `lanes` floats
//   load, load_some(p, n)   unaligned; the first n, zeros in the others
//   store, store_some
//   spread(float *)         one float in all lanes
//   fma(a, b, c)            a * b + c, rounded once
//   add, relu               relu keeps NaN, as torch does
//   positions(uint8_t *)    `lanes` positions
//   pick<G>(x, positions)   lane i: channel positions[i] of the G channels at x
//   widen(uint16_t *)       `lanes` bfloat16 values
//
// Sums run over the slots in their order, one accumulator an output, whatever the tile: results do not depend on the
// number of threads, pixels or images.
#ifndef LBC_MICRO_H
#define LBC_MICRO_H

#include <utility>

#include "layout.h"

#define LBC_INLINE inline __attribute__((always_inline))

namespace lbc {

// Byte distance of the I-th pixel of a run, from the distances of 1, 3 and 5: an address without arithmetic.
template <int I>
LBC_INLINE const char *pixel(const char *base, size_t d1, size_t d3, size_t d5) {
    static_assert(I < 8, "a run has at most eight pixels");
    if constexpr (I == 0) return base;
    if constexpr (I == 1) return base + d1;
    if constexpr (I == 2) return base + 2 * d1;
    if constexpr (I == 3) return base + d3;
    if constexpr (I == 4) return base + 4 * d1;
    if constexpr (I == 5) return base + d5;
    if constexpr (I == 6) return base + 2 * d3;
    return base + 2 * d1 + d5;
}

template <class A, bool Half>
LBC_INLINE typename A::R load_values(const char *values, int64_t at) {
    if constexpr (Half)
        return A::widen((const uint16_t *)values + at);
    else
        return A::load((const float *)values + at);
}

// Asks for the lines of W registers of values some bytes ahead: too many streams for the processor to see by itself.
template <class A, bool Half, int W>
LBC_INLINE void fetch_values(const char *values, int64_t at, size_t ahead) {
    constexpr int bytes = W * A::lanes * (Half ? 2 : 4);
    const char *from = values + at * (Half ? 2 : 4) + ahead;
    for (int line = 0; line < bytes; line += 64) __builtin_prefetch(from + line);
}

// f(0), f(1), ... f(N - 1) with constants, so that what they index stays in registers.
template <class F, int... I>
LBC_INLINE void unrolled(F &f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}

template <int N, class F>
LBC_INLINE void each(F &&f) {
    unrolled(f, std::make_integer_sequence<int, N>{});
}

// The pixels of a tile in memory, as two runs.
template <int P>
struct Pixels {
    static constexpr int first_run = (P + 1) / 2;
    const char *run0, *run1;
    size_t d1, d3, d5;

    LBC_INLINE Pixels(const float *p0, const float *p1, size_t floats)
        : run0((const char *)p0), run1((const char *)p1), d1(floats * sizeof(float)), d3(3 * d1), d5(5 * d1) {}

    template <int I>
    LBC_INLINE float *at(int64_t floats) const {
        const int64_t bytes = floats * (int64_t)sizeof(float);
        if constexpr (I < first_run) return (float *)pixel<I>(run0 + bytes, d1, d3, d5);
        return (float *)pixel<I - (I < first_run ? I : first_run)>(run1 + bytes, d1, d3, d5);
    }
};

// Accumulators of P pixels x W registers, and what happens to them before and after the products.
template <class A, int P, int W>
struct Sums {
    typename A::R of[P][W];

    // `at`: first output channel; `left`: how many there are from there on.
    LBC_INLINE void begin(const Tile &t, int64_t at, int64_t left) {
        if (left >= W * A::lanes)
            begin_with<true>(t, at, left);
        else
            begin_with<false>(t, at, left);
    }

    LBC_INLINE void end(const Tile &t, int64_t at, int64_t left) {
        if (left >= W * A::lanes)
            end_with<true>(t, at, left);
        else
            end_with<false>(t, at, left);
    }

   private:
    template <bool Whole>
    LBC_INLINE void begin_with(const Tile &t, int64_t at, int64_t left) {
        const Pixels<P> out(t.out0, t.out1, t.out_pixel);
        each<W>([&](auto w) __attribute__((always_inline)) {
            const int64_t n = left - w * A::lanes, o = at + w * A::lanes;
            if (!t.first) {
                each<P>([&](auto p) __attribute__((always_inline)) { of[p][w] = load<Whole>(out.template at<p>(o), n); });
                return;
            }
            const auto bias = t.bias ? load<Whole>(t.bias + o, n) : A::zero();
            each<P>([&](auto p) __attribute__((always_inline)) {
                of[p][w] = bias;
                // Lines that will be written are asked for before the products, not after them.
                if (w * A::lanes % 16 == 0) __builtin_prefetch(out.template at<p>(o), 1);
            });
        });
    }

    template <bool Whole>
    LBC_INLINE void end_with(const Tile &t, int64_t at, int64_t left) {
        const Pixels<P> out(t.out0, t.out1, t.out_pixel);
        each<W>([&](auto w) __attribute__((always_inline)) {
            const int64_t n = left - w * A::lanes, o = at + w * A::lanes;
            if (t.last && t.residual0) {
                const Pixels<P> residual(t.residual0, t.residual1, t.residual_pixel);
                each<P>([&](auto p) __attribute__((always_inline)) {
                    of[p][w] = A::add(of[p][w], load<Whole>(residual.template at<p>(o), n));
                });
            }
            if (t.last && t.relu)
                each<P>([&](auto p) __attribute__((always_inline)) { of[p][w] = A::relu(of[p][w]); });
            each<P>([&](auto p) __attribute__((always_inline)) {
                if (Whole || n >= A::lanes)
                    A::store(out.template at<p>(o), of[p][w]);
                else if (n > 0)
                    A::store_some(out.template at<p>(o), of[p][w], n);
            });
        });
    }

    template <bool Whole>
    static LBC_INLINE typename A::R load(const float *p, int64_t n) {
        if (Whole || n >= A::lanes) return A::load(p);
        return n > 0 ? A::load_some(p, n) : A::zero();
    }
};

// A mask per output channel: every lane picks its own input channel out of G by a permutation.
template <class A, int G, bool Half, int P>
void permuted(const Tile &t) {
    constexpr int P0 = (P + 1) / 2, P1 = P / 2;
    constexpr int64_t block = 16;
    const size_t d1 = t.x_pixel, d3 = 3 * d1, d5 = 5 * d1;
    const char *values = t.values;
    const uint8_t *index = t.index;
    const int64_t slots = t.kh * t.kw * t.steps * t.slots * block;  // elements of a block
    for (int64_t b = 0; b < t.blocks; b++) {
        for (int64_t part = 0; part < block; part += A::lanes) {
            const int64_t at = b * block + part;
            if (at >= t.lanes) break;
            Sums<A, P, 1> sums;
            sums.begin(t, at, t.lanes - at);
            int64_t slot = part;
            for (int64_t r = 0; r < t.kh; r++)
                for (int64_t s = 0; s < t.kw; s++) {
                    const char *x0 = t.x0 + r * t.x_row + s * t.x_col;
                    const char *x1 = t.x1 + r * t.x_row + s * t.x_col;
                    for (int64_t step = 0; step < t.steps; step++) {
                        for (int64_t k = 0; k < t.slots; k++) {
                            const auto where = A::positions(index + slot);
                            const auto weight = load_values<A, Half>(values, slot);
                            fetch_values<A, Half, 1>(values, slot, t.ahead);
                            slot += block;
                            each<P0>([&](auto p) __attribute__((always_inline)) {
                                sums.of[p][0] = A::fma(weight, A::template pick<G>(pixel<p>(x0, d1, d3, d5), where),
                                                       sums.of[p][0]);
                            });
                            each<P1>([&](auto p) __attribute__((always_inline)) {
                                sums.of[P0 + p][0] = A::fma(
                                    weight, A::template pick<G>(pixel<p>(x1, d1, d3, d5), where), sums.of[P0 + p][0]);
                            });
                        }
                        x0 += G * sizeof(float);
                        x1 += G * sizeof(float);
                    }
                }
            sums.end(t, at, t.lanes - at);
        }
        index += slots;
        values += slots * (Half ? 2 : 4);
    }
}

// B output channels share their input channels: one input in all lanes, as in a dense kernel that skips. W registers
// at a time.
template <class A, int B, int W, bool Half, int P>
void shared(const Tile &t) {
    constexpr int P0 = (P + 1) / 2, P1 = P / 2;
    const size_t d1 = t.x_pixel, d3 = 3 * d1, d5 = 5 * d1;
    const char *values = t.values;
    const uint16_t *index = (const uint16_t *)t.index;
    const int64_t slots = t.kh * t.kw * t.slots;
    for (int64_t b = 0; b < t.blocks; b++) {
        for (int64_t part = 0; part < B; part += W * A::lanes) {
            const int64_t at = b * B + part;
            if (at >= t.lanes) break;
            Sums<A, P, W> sums;
            sums.begin(t, at, t.lanes - at);
            const uint16_t *channel = index;
            int64_t slot = part;
            for (int64_t r = 0; r < t.kh; r++)
                for (int64_t s = 0; s < t.kw; s++) {
                    const char *x0 = t.x0 + r * t.x_row + s * t.x_col;
                    const char *x1 = t.x1 + r * t.x_row + s * t.x_col;
                    for (int64_t k = 0; k < t.slots; k++) {
                        const size_t offset = *channel++ * sizeof(float);
                        const char *y0 = x0 + offset, *y1 = x1 + offset;
                        typename A::R weight[W];
                        each<W>([&](auto w) __attribute__((always_inline)) {
                            weight[w] = load_values<A, Half>(values, slot + w * A::lanes);
                        });
                        fetch_values<A, Half, W>(values, slot, t.ahead);
                        slot += B;
                        each<P0>([&](auto p) __attribute__((always_inline)) {
                            const auto x = A::spread((const float *)pixel<p>(y0, d1, d3, d5));
                            each<W>([&](auto w) __attribute__((always_inline)) {
                                sums.of[p][w] = A::fma(weight[w], x, sums.of[p][w]);
                            });
                        });
                        each<P1>([&](auto p) __attribute__((always_inline)) {
                            const auto x = A::spread((const float *)pixel<p>(y1, d1, d3, d5));
                            each<W>([&](auto w) __attribute__((always_inline)) {
                                sums.of[P0 + p][w] = A::fma(weight[w], x, sums.of[P0 + p][w]);
                            });
                        });
                    }
                }
            sums.end(t, at, t.lanes - at);
        }
        index += slots;
        values += slots * B * (Half ? 2 : 4);
    }
}

// Tables by the number of pixels: entry p - 1 for p pixels.
template <class A, int G, bool Half, size_t... I>
const Micro *permuted_table(std::index_sequence<I...>) {
    static const Micro table[] = {permuted<A, G, Half, (int)I + 1>...};
    return table;
}

template <class A, int B, int W, bool Half, size_t... I>
const Micro *shared_table(std::index_sequence<I...>) {
    static const Micro table[] = {shared<A, B, W, Half, (int)I + 1>...};
    return table;
}

template <class A, int G, int Run>
Kernel permuted_kernel(bool half) {
    using Pixels = std::make_index_sequence<2 * Run>;
    return {half ? permuted_table<A, G, true>(Pixels{}) : permuted_table<A, G, false>(Pixels{}), Run, G};
}

template <class A, int B, int W, int Run>
Kernel shared_kernel(bool half) {
    using Pixels = std::make_index_sequence<2 * Run>;
    return {half ? shared_table<A, B, W, true>(Pixels{}) : shared_table<A, B, W, false>(Pixels{}), Run, 0};
}

}  // namespace lbc
#endif
