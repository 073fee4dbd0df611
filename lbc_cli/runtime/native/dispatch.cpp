// A layer over a whole batch: how it is cut into tasks for threads, bands of the image and tiles for the micro-kernels.
//
// A task is a band of output pixels times a range of output channels. Its input is read where it lies, or copied first,
// with zeros around, where the image is padded, where the channels end within a step, or where neighbouring pixels would
// fall into one set of the cache. Within a band: for every chunk of input channels, for as many blocks of output
// channels as the second-level cache holds, for every tile.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "layout.h"

namespace lbc {
namespace {

constexpr int64_t tile_pixels = 14;            // what chunks are made for
constexpr int64_t first_level = 32 * 1024;     // bytes of input under a tile and a chunk
constexpr int64_t band_bytes = 384 * 1024;     // input and output of a band
constexpr int64_t group_bytes = 256 * 1024;    // weights that are used for all tiles of a band in turn
constexpr int64_t conflict = 4096;             // bytes between pixels that meet in one set of the first-level cache
constexpr size_t values_ahead = 2048;          // bytes that are asked for ahead of a group's first use
constexpr double most_floats = 1e15;           // no machine has room for more: that many do not overflow
constexpr int64_t small_work = 1 << 15;        // register-wide products that are not worth a second thread

const Isa *isa_of(int64_t number) {
    switch (number) {
        case LBC_PORTABLE: return &portable_isa;
#ifdef LBC_X86
        case LBC_AVX2: return &avx2_isa;
        case LBC_AVX512: return &avx512_isa;
#endif
        default: return nullptr;
    }
}

const Isa *best_isa() {
    static const Isa *best = [] {
        for (int64_t number : {LBC_AVX512, LBC_AVX2})
            if (const Isa *isa = isa_of(number); isa && isa->supported()) return isa;
        return &portable_isa;
    }();
    return best;
}

// Room that a thread keeps from call to call.
float *scratch(size_t floats) {
    struct Free {
        void operator()(void *p) const { std::free(p); }
    };
    thread_local std::unique_ptr<float, Free> room;
    thread_local size_t size = 0;
    if (floats > size) {
        room.reset();
        size = 0;
        const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
        room.reset((float *)std::aligned_alloc(64, bytes));
        if (!room) return nullptr;
        size = floats;
    }
    return room.get();
}

// A call in the form in which it is worked on: rows of output pixels. A layer that sees single pixels, all of them in
// equal distances, is one row of all pixels of all images.
struct Plan {
    const LbcWeight &w;
    LbcCall c;
    Layout l;
    Kernel kernel;
    int64_t channels;      // input channels, rounded up to whole steps
    bool copies;
    int64_t rows_of_band;  // one image's; or 1, and
    int64_t width;         // pixels of a row of a band
    int64_t bands_of_image, splits, blocks_of_split;
    int64_t tasks;
    std::atomic<int64_t> next{0};
    std::atomic<bool> out_of_memory{false};

    Plan(const LbcWeight &weight, const LbcCall &call, const Isa &isa)
        : w(weight), c(call), l(weight), kernel(isa.choose(weight)), channels(ceil_div(w.in, l.step) * l.step) {
        if (is_flat()) flatten();
        const bool padded = c.pad_top || c.pad_left || reach(c.out_h, c.stride_h, w.kh, c.dilation_h) > c.in_h ||
                            reach(c.out_w, c.stride_w, w.kw, c.dilation_w) > c.in_w;
        const uint64_t distance = (uint64_t)c.x_pixel * (uint64_t)c.stride_w * sizeof(float);
        copies = padded || channels != w.in || distance % conflict == 0;
        cut();
    }

    static int64_t reach(int64_t out, int64_t stride, int64_t kernel, int64_t dilation) {
        return (out - 1) * stride + (kernel - 1) * dilation + 1;
    }

    bool pointwise() const { return l.positions == 1 && !c.pad_top && !c.pad_left; }

    bool is_flat() const {
        return pointwise() && c.stride_h == 1 && c.stride_w == 1 && c.out_h == c.in_h && c.out_w == c.in_w &&
               even(c.x_pixel, c.x_row, c.x_image) && even(c.out_pixel, c.out_row, c.out_image) &&
               (!c.residual || even(c.residual_pixel, c.residual_row, c.residual_image));
    }

    bool even(int64_t pixel, int64_t row, int64_t image) const {
        return (c.in_h == 1 || row == pixel * c.in_w) && (c.images == 1 || image == pixel * c.in_w * c.in_h);
    }

    void flatten() {
        c.in_w = c.out_w = c.in_w * c.in_h * c.images;
        c.in_h = c.out_h = c.images = 1;
    }

    // Bands and ranges of output channels. Threads share either the pixels or the output channels: whichever leaves
    // each with less to read.
    void cut() {
        const int64_t pixels = c.images * c.out_h * c.out_w;
        const double weights = (double)all_slots(w, l) * l.blocks * (l.block * 4 + index_stride(w, l));
        const double images = (double)c.images * c.in_h * c.in_w * w.in * 4 + (double)pixels * w.out * 4;
        int64_t threads = c.fork ? c.threads : 1;
        if ((double)pixels * all_slots(w, l) * l.blocks < small_work) threads = 1;
        int64_t best = 1;
        double least = 1e300;
        for (int64_t s = 1; s <= threads && s <= l.blocks; s++) {
            if (threads % s) continue;
            const int64_t parts = threads / s;
            const double share_of_pixels = std::max(1.0 / parts, (double)std::min<int64_t>(pixels, 2 * kernel.run) / pixels);
            const double share_of_blocks = (double)ceil_div(l.blocks, s) / l.blocks;
            // Uneven shares cost more than bytes: they are what the slowest thread computes.
            const double cost = share_of_pixels * share_of_blocks *
                                (1e3 * (double)pixels * (double)all_slots(w, l) * l.blocks) +
                                weights * share_of_blocks + images * share_of_pixels;
            if (cost < least) least = cost, best = s;
        }
        c.threads = threads;
        blocks_of_split = ceil_div(l.blocks, best);
        splits = ceil_div(l.blocks, blocks_of_split);
        cut_bands(ceil_div(threads, splits));
        tasks = c.images * bands_of_image * splits;
    }

    void cut_bands(int64_t parts) {
        const int64_t inputs = std::min(c.stride_h, c.in_h) * std::min(c.stride_w, c.in_w);  // of an output pixel
        const int64_t pixel_bytes = (w.in * inputs + w.out) * (int64_t)sizeof(float);
        if (c.images == 1 && c.out_h == 1) {
            const int64_t tile = 2 * kernel.run;
            int64_t most = std::max(band_bytes / pixel_bytes / tile * tile, tile);
            int64_t bands = ceil_div(ceil_div(c.out_w, most), parts) * parts;
            width = ceil_div(ceil_div(c.out_w, bands), tile) * tile;
            if (ceil_div(c.out_w, width) < parts) width = ceil_div(c.out_w, bands);
            rows_of_band = 1;
            bands_of_image = ceil_div(c.out_w, width);
            return;
        }
        width = c.out_w;
        const int64_t most = std::max<int64_t>(band_bytes / (pixel_bytes * c.out_w), 1);
        int64_t bands = ceil_div(c.out_h, most);
        while (c.images * bands % parts && c.images * bands < 4 * parts && bands < c.out_h) bands++;
        rows_of_band = ceil_div(c.out_h, bands);
        if (two_rows() && rows_of_band % 2 && rows_of_band < c.out_h && c.images * bands > parts) rows_of_band++;
        bands_of_image = ceil_div(c.out_h, rows_of_band);
    }

    bool two_rows() const { return width <= kernel.run && c.out_h > 1; }
};

// The input of a band, and its place in the output.
struct Band {
    const float *x;
    int64_t pixel, row, col;  // floats: between output pixels, output rows, neighbouring input pixels
    int64_t input_row;        // between neighbouring input rows
    int64_t rows, width;
    float *out;
    const float *residual;
};

// Copies the input under a band, with the zeros around it. Returns null where memory is short.
const float *copy_band(const Plan &plan, int64_t image, int64_t top, int64_t left, Band &band) {
    const LbcCall &c = plan.c;
    const LbcWeight &w = plan.w;
    // Where a kernel sees single pixels those that it skips are left out.
    const bool skips = plan.l.positions == 1;
    const int64_t step_h = skips ? c.stride_h : 1, step_w = skips ? c.stride_w : 1;
    const int64_t rows = skips ? band.rows : Plan::reach(band.rows, c.stride_h, w.kh, c.dilation_h);
    const int64_t cols = skips ? band.width : Plan::reach(band.width, c.stride_w, w.kw, c.dilation_w);
    const int64_t pixel = plan.channels + 16;  // an odd number of lines: neighbours lie in different sets
    if ((double)rows * (double)cols * (double)pixel > most_floats) return nullptr;
    float *room = scratch((size_t)(rows * cols * pixel));
    if (!room) return nullptr;
    const float *from = c.x + image * c.x_image;
    const size_t bytes = (size_t)w.in * sizeof(float), rest = (size_t)(plan.channels - w.in) * sizeof(float);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t y = top * c.stride_h - c.pad_top + r * step_h;
        for (int64_t s = 0; s < cols; s++) {
            const int64_t x = left * c.stride_w - c.pad_left + s * step_w;
            float *to = room + (r * cols + s) * pixel;
            if (y < 0 || y >= c.in_h || x < 0 || x >= c.in_w) {
                memset(to, 0, bytes + rest);
            } else {
                memcpy(to, from + y * c.x_row + x * c.x_pixel, bytes);
                if (rest) memset(to + w.in, 0, rest);
            }
        }
    }
    band.col = pixel;
    band.input_row = cols * pixel;
    band.pixel = pixel * (skips ? 1 : c.stride_w);
    band.row = cols * pixel * (skips ? 1 : c.stride_h);
    return room;
}

// One tile of `pixels` pixels in one row, or of two runs of `width` pixels in two rows.
struct Place {
    int64_t row, col, pixels;
    bool two_rows;
};

void run_tile(const Plan &plan, const Band &band, const Tile &tile, int64_t first_channel, const Place &at) {
    const LbcCall &c = plan.c;
    const int64_t first = (at.pixels + 1) / 2;
    const int64_t next_row = at.two_rows ? at.row + 1 : at.row;
    const int64_t next_col = at.two_rows ? at.col : at.col + first;
    const float *x = band.x + first_channel;
    Tile t = tile;
    t.x_pixel = (size_t)band.pixel * sizeof(float);
    t.x0 = (const char *)(x + at.row * band.row + at.col * band.pixel);
    t.x1 = (const char *)(x + next_row * band.row + next_col * band.pixel);
    t.out0 = tile.out0 + at.row * c.out_row + at.col * c.out_pixel;
    t.out1 = tile.out0 + next_row * c.out_row + next_col * c.out_pixel;
    if (tile.residual0) {
        t.residual0 = tile.residual0 + at.row * c.residual_row + at.col * c.residual_pixel;
        t.residual1 = tile.residual0 + next_row * c.residual_row + next_col * c.residual_pixel;
    }
    plan.kernel.micro[at.pixels - 1](t);
}

template <class F>
void each_tile(const Plan &plan, const Band &band, F &&f) {
    const int64_t most = 2 * plan.kernel.run;
    int64_t row = 0;
    if (band.width <= plan.kernel.run)
        for (; row + 1 < band.rows; row += 2) f(Place{row, 0, 2 * band.width, true});
    const int64_t tiles = ceil_div(band.width, most);
    for (; row < band.rows; row++) {
        int64_t col = 0;
        for (int64_t n = 0; n < tiles; n++) {  // of nearly equal sizes: short tiles waste most
            const int64_t pixels = (band.width - col) / (tiles - n);
            f(Place{row, col, pixels, false});
            col += pixels;
        }
    }
}

void run_band(const Plan &plan, const Band &band, int64_t first_block, int64_t end_block) {
    const LbcWeight &w = plan.w;
    const LbcCall &c = plan.c;
    const Layout &l = plan.l;
    const int64_t value_bytes = w.half ? 2 : 4;
    for (int64_t chunk = 0; chunk < l.chunks; chunk++) {
        const int64_t slots = chunk_slots(w, l, chunk), block_slots = slots * l.positions;
        const int64_t block_bytes = block_slots * (l.block * value_bytes + index_stride(w, l));
        const int64_t together = std::max<int64_t>(group_bytes / block_bytes, 1);
        for (int64_t block = first_block; block < end_block; block += together) {
            const int64_t slot = first_slot(w, l, chunk, block);
            Tile tile{};
            tile.x_row = (size_t)(band.input_row * c.dilation_h) * sizeof(float);
            tile.x_col = (size_t)(band.col * c.dilation_w) * sizeof(float);
            const int64_t first_channel = chunk * w.chunk;
            tile.values = (const char *)c.values + slot * l.block * value_bytes;
            tile.index = c.index + slot * index_stride(w, l);
            tile.kh = w.kh;
            tile.kw = w.kw;
            tile.steps = w.vector == 1 ? chunk_channels(w, l, chunk) / plan.kernel.channels : 1;
            tile.slots = slots / tile.steps;
            tile.blocks = std::min(together, end_block - block);
            tile.lanes = w.out - block * l.block;
            tile.out0 = band.out + block * l.block;
            tile.out_pixel = (size_t)c.out_pixel;
            tile.residual0 = band.residual ? band.residual + block * l.block : nullptr;
            tile.residual_pixel = (size_t)c.residual_pixel;
            tile.bias = c.bias ? c.bias + block * l.block : nullptr;
            tile.first = chunk == 0;
            tile.last = chunk == l.chunks - 1;
            tile.relu = c.relu != 0;
            tile.ahead = values_ahead;
            each_tile(plan, band, [&](const Place &at) {
                run_tile(plan, band, tile, first_channel, at);
                tile.ahead = 0;
            });
        }
    }
}

void run_task(Plan &plan, int64_t task) {
    const LbcCall &c = plan.c;
    const int64_t split = task % plan.splits, number = task / plan.splits;
    const int64_t image = number / plan.bands_of_image, part = number % plan.bands_of_image;
    const bool flat = plan.rows_of_band == 1 && plan.c.images == 1 && plan.c.out_h == 1;
    const int64_t top = flat ? 0 : part * plan.rows_of_band, left = flat ? part * plan.width : 0;
    Band band{};
    band.rows = std::min(plan.rows_of_band, c.out_h - top);
    band.width = std::min(plan.width, c.out_w - left);
    band.out = c.out + image * c.out_image + top * c.out_row + left * c.out_pixel;
    if (c.residual)
        band.residual = c.residual + image * c.residual_image + top * c.residual_row + left * c.residual_pixel;
    if (plan.copies) {
        band.x = copy_band(plan, image, top, left, band);
        if (!band.x) {
            plan.out_of_memory = true;
            return;
        }
    } else {
        band.x = c.x + image * c.x_image + top * c.stride_h * c.x_row + left * c.stride_w * c.x_pixel;
        band.col = c.x_pixel;
        band.input_row = c.x_row;
        band.pixel = c.x_pixel * c.stride_w;
        band.row = c.x_row * c.stride_h;
    }
    const int64_t first = split * plan.blocks_of_split;
    run_band(plan, band, first, std::min(first + plan.blocks_of_split, plan.l.blocks));
}

void work(void *data) {
    Plan &plan = *(Plan *)data;
    for (int64_t task; (task = plan.next.fetch_add(1)) < plan.tasks;) run_task(plan, task);
}

}  // namespace
}  // namespace lbc

using namespace lbc;

extern "C" int32_t lbc_interface(void) { return LBC_INTERFACE; }

extern "C" const char *lbc_sources(void) {
#ifdef LBC_SOURCES
    return LBC_SOURCES;
#else
    return "";
#endif
}

extern "C" int32_t lbc_isa_available(int32_t number) {
    const Isa *isa = isa_of(number);
    return isa && isa->supported();
}

extern "C" int32_t lbc_plan(LbcWeight *w, int64_t stride_w) {
    if (!is_possible(*w) || stride_w < 1) return -1;
    const int64_t step = w->m > 16 ? w->m : 16;
    // In floating point: sizes and strides may be such that the pixels of a tile overflow an integer.
    const double pixels = (double)w->kh * ((double)(tile_pixels - 1) * (double)stride_w + (double)w->kw);
    const int64_t most = std::max((int64_t)(first_level / sizeof(float) / pixels) / step * step, step);
    const int64_t chunks = ceil_div(w->in, most);
    w->chunk = ceil_div(ceil_div(w->in, chunks), step) * step;
    return 0;
}

extern "C" int32_t lbc_run(const LbcWeight *w, const LbcCall *call) {
    const Isa *isa = call->isa == LBC_AUTO ? best_isa() : isa_of(call->isa);
    if (!isa || !isa->supported()) return -1;
    if (call->images < 1 || call->out_h < 1 || call->out_w < 1) return 0;
    Plan plan(*w, *call, *isa);
    if (plan.c.threads > 1 && plan.tasks > 1)
        plan.c.fork(work, &plan, (unsigned)plan.c.threads, 0);
    else
        work(&plan);
    return plan.out_of_memory ? -2 : 0;
}

extern "C" int32_t lbc_run_all(int64_t count, const LbcWeight *weights, const LbcCall *calls) {
    int32_t failed = 0;
    for (int64_t i = 0; i < count && !failed; i++) failed = lbc_run(weights + i, calls + i);
    return failed;
}

extern "C" double lbc_rate(int32_t number, int32_t kind) {
    const Isa *isa = isa_of(number);
    if (!isa || !isa->supported()) return 0;
    double best = 0;
    for (int repeat = 0; repeat < 8; repeat++) {
        const auto begin = std::chrono::steady_clock::now();
        const double count = isa->rate(kind, 1000000);
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
        best = std::max(best, count / taken.count());
    }
    return best;
}
