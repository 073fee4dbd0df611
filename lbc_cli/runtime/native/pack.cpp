// Dense weights to packed ones and back; see layout.h.
#include <algorithm>
#include <cstring>

#include "layout.h"

namespace lbc {
namespace {

uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// One group of M input channels at one kernel position, for the output channels of a block.
struct Group {
    const LbcWeight &w;
    const Layout &l;
    int64_t block, position, channel;  // channel: the first of the group

    int64_t at(int64_t lane, int64_t offset) const {  // flat position in the dense weight
        return ((block * l.block + lane) * w.in + channel + offset) * l.positions + position;
    }
    bool real(int64_t lane) const { return block * l.block + lane < w.out && channel < w.in; }

    // The N positions to keep of some lanes that share them: those in use, then those that hold -0.0, then the lowest
    // free ones, ascending. Returns -1, or the flat position of one too many.
    int64_t keep(const float *dense, int64_t lane, int64_t lanes, int64_t *kept) const {
        int64_t used = 0;
        bool is_used[32] = {}, is_negative[32] = {};
        for (int64_t i = 0; i < w.m; i++) {
            for (int64_t j = lane; j < lane + lanes && !is_used[i]; j++) {
                if (!real(j)) continue;
                // By its bits: for a processor that is told so, subnormal numbers equal 0.
                const uint32_t bits = bits_of(dense[at(j, i)]);
                if (bits << 1 == 0) {
                    is_negative[i] = is_negative[i] || bits;
                    continue;
                }
                if (used == w.n) return at(j, i);
                is_used[i] = true;
                used++;
            }
        }
        for (const bool any : {false, true})
            for (int64_t i = 0; i < w.m && used < w.n; i++)
                if (!is_used[i] && (any || is_negative[i])) is_used[i] = true, used++;
        for (int64_t i = 0; i < w.m; i++)
            if (is_used[i]) *kept++ = i;
        return -1;
    }
};

void put(const LbcWeight &w, void *values, int64_t at, float value) {
    if (w.half)
        ((uint16_t *)values)[at] = (uint16_t)(bits_of(value) >> 16);
    else
        ((float *)values)[at] = value;
}

float get(const LbcWeight &w, const void *values, int64_t at) {
    if (!w.half) return ((const float *)values)[at];
    const uint32_t bits = (uint32_t)((const uint16_t *)values)[at] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// Calls f(group, slot, begin) for every group: `slot` its first slot in storage, `begin` its channel within the step
// or, for shared positions, within the chunk.
template <class F>
int64_t each_group(const LbcWeight &w, F &&f) {
    const Layout l(w);
    for (int64_t c = 0; c < l.chunks; c++) {
        const int64_t channels = chunk_channels(w, l, c), slots = chunk_slots(w, l, c);
        for (int64_t b = 0; b < l.blocks; b++)
            for (int64_t p = 0; p < l.positions; p++)
                for (int64_t g = 0; g < channels / w.m; g++) {
                    const int64_t slot = first_slot(w, l, c, b) + p * slots + g * w.n;
                    const int64_t begin = w.vector == 1 ? g * w.m % l.step : g * w.m;
                    const int64_t fault = f(Group{w, l, b, p, c * w.chunk + g * w.m}, slot, begin);
                    if (fault >= 0) return fault;
                }
    }
    return -1;
}

}  // namespace
}  // namespace lbc

using namespace lbc;

extern "C" int64_t lbc_values(const LbcWeight *w) {
    if (!is_planned(*w)) return -1;
    const Layout l(*w);
    return all_slots(*w, l) * l.blocks * l.block;
}

extern "C" int64_t lbc_index_bytes(const LbcWeight *w) {
    if (!is_planned(*w)) return -1;
    const Layout l(*w);
    return all_slots(*w, l) * l.blocks * index_stride(*w, l);
}

extern "C" int64_t lbc_pack(const LbcWeight *weight, const float *dense, void *values, uint8_t *index) {
    const LbcWeight &w = *weight;
    return each_group(w, [&](const Group &group, int64_t slot, int64_t begin) -> int64_t {
        const int64_t block = group.l.block, shared = w.vector == 1 ? 1 : block;
        for (int64_t lane = 0; lane < block; lane += shared) {
            int64_t kept[32];
            const int64_t fault = group.keep(dense, lane, shared, kept);
            if (fault >= 0) return fault;
            for (int64_t k = 0; k < w.n; k++) {
                for (int64_t j = lane; j < lane + shared; j++)
                    put(w, values, (slot + k) * block + j, group.real(j) ? dense[group.at(j, kept[k])] : 0.0f);
                if (w.vector == 1)
                    index[(slot + k) * block + lane] = (uint8_t)(begin + kept[k]);
                else
                    ((uint16_t *)index)[slot + k] = (uint16_t)(begin + kept[k]);
            }
        }
        return -1;
    });
}

extern "C" void lbc_unpack(const LbcWeight *weight, const void *values, const uint8_t *index, float *dense) {
    const LbcWeight &w = *weight;
    std::fill_n(dense, w.out * w.in * w.kh * w.kw, 0.0f);
    each_group(w, [&](const Group &group, int64_t slot, int64_t begin) -> int64_t {
        const int64_t block = group.l.block;
        for (int64_t k = 0; k < w.n; k++)
            for (int64_t j = 0; j < block; j++) {
                if (!group.real(j)) continue;
                const int64_t where =
                    w.vector == 1 ? index[(slot + k) * block + j] : ((const uint16_t *)index)[slot + k];
                dense[group.at(j, where - begin)] = get(w, values, (slot + k) * block + j);
            }
        return -1;
    });
}
