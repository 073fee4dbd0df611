// The packed weight, and what a tile of work is.
//
// Output channels are taken in blocks of B (16; 32 where 32 of them share their positions), input channels in chunks of
// C. Kept weights stand as slots, in the order in which they are used:
//
//   vector = 1    values [chunk][block][kernel position][step][slot][B]   index, one byte each, of the same shape
//                 A step is G = max(16, M) input channels, a slot one kept weight of each of the B output channels;
//                 the byte is its channel within the step.
//   vector = B    values [chunk][block][kernel position][slot][B]         index uint16 [chunk][block][position][slot]
//                 All B output channels of a slot read the same input channel; the index is that within the chunk.
//
// What is missing at the ends (output channels, input channels up to a multiple of G) has values 0 and a valid index.
#ifndef LBC_LAYOUT_H
#define LBC_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

#include <initializer_list>

#include "kernels.h"

namespace lbc {

constexpr int64_t most_elements = (int64_t)1 << 40;  // of a weight: no size below overflows
constexpr int64_t most_chunk = 1 << 16;              // what an index of 16 bits reaches

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Layout {
    int64_t block;      // B
    int64_t blocks;     // of output channels
    int64_t positions;  // kh * kw
    int64_t step;       // G
    int64_t chunks;

    explicit Layout(const LbcWeight &w)
        : block(w.vector == 1 ? 16 : w.vector),
          blocks(ceil_div(w.out, block)),
          positions(w.kh * w.kw),
          step(w.m > 16 ? w.m : 16),
          chunks(ceil_div(w.in, w.chunk)) {}
};

// Whether a weight's numbers are those of one that has a kernel, apart from the chunk.
inline bool is_possible(const LbcWeight &w) {
    int64_t elements = 1;
    for (int64_t size : {w.out, w.in, w.kh, w.kw}) {
        if (size < 1 || size > most_elements / elements) return false;
        elements *= size;
    }
    if (w.m != 4 && w.m != 8 && w.m != 16 && w.m != 32) return false;
    if (w.n < 1 || w.n >= w.m || w.in % w.m) return false;
    return (w.vector == 1 || w.vector == 16 || w.vector == 32) && (w.half == 0 || w.half == 1);
}

// Whether they are such that lbc_plan could have given them.
inline bool is_planned(const LbcWeight &w) {
    if (!is_possible(w) || w.chunk < 1 || w.chunk > most_chunk) return false;
    const int64_t step = Layout(w).step;
    return w.chunk % step == 0 && w.chunk <= ceil_div(w.in, step) * step;
}

// Input channels of a chunk, rounded up to whole steps.
inline int64_t chunk_channels(const LbcWeight &w, const Layout &l, int64_t chunk) {
    int64_t left = w.in - chunk * w.chunk;
    return ceil_div(left < w.chunk ? left : w.chunk, l.step) * l.step;
}

// Slots of one kernel position of a chunk.
inline int64_t chunk_slots(const LbcWeight &w, const Layout &l, int64_t chunk) {
    return chunk_channels(w, l, chunk) / w.m * w.n;
}

// Slots of one block before a chunk begins, all kernel positions.
inline int64_t slots_before(const LbcWeight &w, const Layout &l, int64_t chunk) {
    return chunk * (w.chunk / w.m * w.n) * l.positions;
}

inline int64_t all_slots(const LbcWeight &w, const Layout &l) {
    return slots_before(w, l, l.chunks - 1) + chunk_slots(w, l, l.chunks - 1) * l.positions;
}

// First slot of a block within a chunk, in the order of storage.
inline int64_t first_slot(const LbcWeight &w, const Layout &l, int64_t chunk, int64_t block) {
    return slots_before(w, l, chunk) * l.blocks + block * chunk_slots(w, l, chunk) * l.positions;
}

inline int64_t index_stride(const LbcWeight &w, const Layout &l) {  // bytes of a slot
    return w.vector == 1 ? l.block : (int64_t)sizeof(uint16_t);
}

// Some output pixels times some blocks of output channels, for one chunk of input channels. The pixels are two runs of
// neighbours, which may lie in two rows of the image. Distances in bytes for inputs, in floats for outputs.
struct Tile {
    const char *x0, *x1;        // input under kernel position (0, 0) of the first pixel of either run
    size_t x_pixel, x_row, x_col;  // from pixel to pixel, and between kernel positions
    const char *values;
    const uint8_t *index;
    int64_t kh, kw;
    int64_t steps, slots;  // slots of a step (vector: one step)
    int64_t blocks;
    int64_t lanes;  // output channels in all
    size_t ahead;   // bytes: how far values are fetched ahead; 0 where they are in the cache
    float *out0, *out1;
    size_t out_pixel;
    const float *residual0, *residual1;  // null: none
    size_t residual_pixel;
    const float *bias;  // null: none
    bool first;         // begin with the bias; else with what `out` holds
    bool last;          // add the residual and apply the activation
    bool relu;
};

using Micro = void (*)(const Tile &);

// What one instruction set has. Micro-kernels by their number of pixels 1 .. 2 * run, ceil and floor of half in the two
// runs.
struct Kernel {
    const Micro *micro;
    int64_t run;      // pixels of a run, at most
    int64_t channels;  // input channels of a step
};

struct Isa {
    bool (*supported)();
    Kernel (*choose)(const LbcWeight &);
    double (*rate)(int32_t kind, int64_t rounds);  // instructions, all rounds; 0: none
};

extern const Isa portable_isa;
#ifdef LBC_X86
extern const Isa avx2_isa;
extern const Isa avx512_isa;
#endif

}  // namespace lbc
#endif
