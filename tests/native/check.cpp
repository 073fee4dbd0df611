// Compares the CPU kernels with plain loops in double, on inputs and outputs whose last float ends where memory that may
// be touched ends: an allocation of exactly that size, which a sanitizer or valgrind watches, or a page before one that
// nobody may touch.
//
//     check [--cases N] [--seed S] [--threads T] [--largest W] [--heap] [ISA ...]
//
// Without names it takes all instruction sets of the processor; one that it lacks is an error. Exits with 1 at the first
// difference.
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include "kernels.h"

namespace {

bool on_heap = false;

[[noreturn]] void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

class Random {
public:
    explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 1) {}

    uint64_t next() {
        state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
        return state_ * 0x2545f4914f6cdd1dull >> 11;
    }
    int64_t below(int64_t n) { return (int64_t)(next() % (uint64_t)n); }
    int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
    int64_t one_of(std::initializer_list<int64_t> choices) { return choices.begin()[below((int64_t)choices.size())]; }
    bool chance(int64_t percent) { return below(100) < percent; }
    float real() { return (float)((double)below(1 << 20) / (1 << 19) - 1.0); }

private:
    uint64_t state_;
};

// `count` elements with nothing to touch after them, or (`before`) before them.
template <class T>
class Buffer {
public:
    explicit Buffer(int64_t count, bool before = false) : count_(count) {
        const size_t bytes = (size_t)count * sizeof(T);
        if (on_heap) {
            start_ = (T *)malloc(bytes ? bytes : 1);
            if (!start_) fail("no memory for %zu bytes", bytes);
            return;
        }
        const size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (bytes + page - 1) / page * page;
        mapped_ = pages + 2 * page;
        map_ = (char *)mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map_ == MAP_FAILED || (pages && mprotect(map_ + page, pages, PROT_READ | PROT_WRITE)))
            fail("no memory for %zu bytes", bytes);
        start_ = (T *)(before ? map_ + page : map_ + page + pages - bytes);
    }
    ~Buffer() {
        if (on_heap)
            free(start_);
        else
            munmap(map_, mapped_);
    }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;

    T *data() { return start_; }
    T &operator[](int64_t i) { return start_[i]; }
    int64_t size() const { return count_; }

private:
    T *start_ = nullptr;
    char *map_ = nullptr;
    size_t mapped_ = 0;
    int64_t count_;
};

// What GOMP_parallel does: the function once on each of n threads.
void team(void (*work)(void *), void *data, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; i++) others.emplace_back(work, data);
    work(data);
    for (std::thread &other : others) other.join();
}

uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// A tensor [images, height, width, channels] with gaps between pixels, rows and images.
struct Image {
    int64_t images, height, width, channels, pixel, row, image;

    Image(Random &random, int64_t n, int64_t h, int64_t w, int64_t c) : images(n), height(h), width(w), channels(c) {
        pixel = c + (random.chance(50) ? 0 : random.between(1, 20));
        if (random.chance(5)) pixel = (c + 1023) / 1024 * 1024;  // a distance at which kernels copy
        row = pixel * w + (random.chance(60) ? 0 : random.between(1, 9));
        image = row * h + (random.chance(60) ? 0 : random.between(1, 9));
    }
    int64_t at(int64_t n, int64_t y, int64_t x, int64_t c) const { return n * image + y * row + x * pixel + c; }
    int64_t floats() const { return at(images - 1, height - 1, width - 1, channels - 1) + 1; }
};

struct Layer {
    LbcWeight w{};
    LbcCall c{};
    std::vector<float> dense;

    float weight(int64_t o, int64_t i, int64_t r, int64_t s) const {
        return dense[(size_t)(((o * w.in + i) * w.kh + r) * w.kw + s)];
    }
    std::string text() const {
        char line[400];
        snprintf(line, sizeof line,
                 "[%ld, %ld, %ld, %ld] %ld:%ld/%ld half %ld, images %ld x %ld x %ld, stride %ld %ld, dilation %ld %ld, "
                 "zeros %ld %ld, result %ld x %ld, pixels %ld, relu %ld, bias %d, residual %d",
                 (long)w.out, (long)w.in, (long)w.kh, (long)w.kw, (long)w.n, (long)w.m, (long)w.vector, (long)w.half,
                 (long)c.images, (long)c.in_h, (long)c.in_w, (long)c.stride_h, (long)c.stride_w, (long)c.dilation_h,
                 (long)c.dilation_w, (long)c.pad_top, (long)c.pad_left, (long)c.out_h, (long)c.out_w, (long)c.x_pixel,
                 (long)c.relu, c.bias != nullptr, c.residual != nullptr);
        return line;
    }
};

// Sizes of a layer: mostly small ones at the edges of blocks, steps and tiles, now and then several chunks.
bool draw(Random &random, Layer &layer, int64_t largest) {
    LbcWeight &w = layer.w;
    LbcCall &c = layer.c;
    w.m = random.one_of({4, 8, 16, 32});
    w.n = random.chance(50) ? random.between(1, w.m - 1) : std::max<int64_t>(w.m / random.one_of({2, 4, 8}), 1);
    w.vector = random.one_of({1, 1, 16, 32});
    w.half = random.chance(25);
    w.out = random.between(1, random.one_of({16, 40, 100}));
    w.in = w.m * (random.chance(15) ? random.between(1, 1400 / w.m) : random.between(1, 6));
    const bool pointwise = random.chance(40);
    w.kh = pointwise ? 1 : random.one_of({1, 2, 3, 3, 3, 5, 7});
    w.kw = pointwise ? 1 : random.one_of({1, 2, 3, 3, 3, 5, 7});
    c.images = random.one_of({1, 1, 1, 2, 3});
    c.in_h = random.chance(20) ? 1 : random.between(1, 14);
    c.in_w = random.chance(20) ? random.between(1, 70) : random.between(1, 20);
    const bool plain = random.chance(50);
    c.stride_h = plain ? 1 : random.between(1, 3);
    c.stride_w = plain ? 1 : random.between(1, 3);
    c.dilation_h = random.chance(70) ? 1 : random.between(1, 4);
    c.dilation_w = random.chance(70) ? 1 : random.between(1, 4);
    c.pad_top = random.chance(50) ? 0 : random.between(0, 4);
    c.pad_left = random.chance(50) ? 0 : random.between(0, 4);
    const int64_t reach_h = (w.kh - 1) * c.dilation_h + 1, reach_w = (w.kw - 1) * c.dilation_w + 1;
    const int64_t height = c.in_h + c.pad_top + (random.chance(50) ? c.pad_top : random.between(0, 4));
    const int64_t width = c.in_w + c.pad_left + (random.chance(50) ? c.pad_left : random.between(0, 4));
    if (height < reach_h || width < reach_w) return false;
    c.out_h = (height - reach_h) / c.stride_h + 1;
    c.out_w = (width - reach_w) / c.stride_w + 1;
    c.relu = random.chance(40);
    return w.out * w.in * w.kh * w.kw * c.images * c.out_h * c.out_w <= largest;
}

// Non-zeros of random number and place, also none, the same for all output channels that share their mask.
void fill_weight(Random &random, Layer &layer) {
    const LbcWeight &w = layer.w;
    const int64_t block = w.vector;
    layer.dense.assign((size_t)(w.out * w.in * w.kh * w.kw), 0.0f);
    const bool full = random.chance(50);
    for (int64_t first = 0; first < w.out; first += block)
        for (int64_t group = 0; group < w.in; group += w.m)
            for (int64_t k = 0; k < w.kh * w.kw; k++) {
                bool used[32] = {};
                for (int64_t left = full ? w.n : random.between(0, w.n); left > 0;) {
                    bool &place = used[random.below(w.m)];
                    left -= !place;
                    place = true;
                }
                for (int64_t i = 0; i < w.m; i++)
                    for (int64_t o = first; used[i] && o < std::min(first + block, w.out); o++)
                        layer.dense[(size_t)((o * w.in + group + i) * w.kh * w.kw + k)] = random.real();
            }
    if (!w.half) return;
    for (float &value : layer.dense) {  // what bfloat16 can hold
        const uint32_t bits = bits_of(value) & 0xffff0000u;
        memcpy(&value, &bits, sizeof bits);
    }
}

std::vector<double> expected(const Layer &layer, const Image &x, const Image &residual) {
    const LbcWeight &w = layer.w;
    const LbcCall &c = layer.c;
    std::vector<double> result;
    for (int64_t n = 0; n < c.images; n++)
        for (int64_t y = 0; y < c.out_h; y++)
            for (int64_t z = 0; z < c.out_w; z++)
                for (int64_t o = 0; o < w.out; o++) {
                    double sum = c.bias ? (double)c.bias[o] : 0.0;
                    for (int64_t r = 0; r < w.kh; r++)
                        for (int64_t s = 0; s < w.kw; s++) {
                            const int64_t from_y = y * c.stride_h + r * c.dilation_h - c.pad_top;
                            const int64_t from_x = z * c.stride_w + s * c.dilation_w - c.pad_left;
                            if (from_y < 0 || from_y >= c.in_h || from_x < 0 || from_x >= c.in_w) continue;
                            const float *pixel = c.x + x.at(n, from_y, from_x, 0);
                            for (int64_t i = 0; i < w.in; i++)
                                sum += (double)pixel[i] * (double)layer.weight(o, i, r, s);
                        }
                    if (c.residual) sum += (double)c.residual[residual.at(n, y, z, o)];
                    result.push_back(c.relu && sum < 0 ? 0.0 : sum);
                }
    return result;
}

constexpr uint32_t untouched = 0x7fa5a5a5u;  // a NaN that no sum gives

void compare(const Layer &layer, const Image &place, Buffer<float> &out, const std::vector<double> &want, const char *what) {
    const LbcCall &c = layer.c;
    double largest = 1e-30;
    for (double value : want) largest = std::max(largest, std::abs(value));
    std::vector<bool> written((size_t)out.size());
    size_t next = 0;
    for (int64_t n = 0; n < c.images; n++)
        for (int64_t y = 0; y < c.out_h; y++)
            for (int64_t z = 0; z < c.out_w; z++)
                for (int64_t o = 0; o < layer.w.out; o++, next++) {
                    const int64_t at = place.at(n, y, z, o);
                    written[(size_t)at] = true;
                    if (!(std::abs(out[at] - want[next]) <= 1e-5 * largest))
                        fail("%s: image %ld, row %ld, column %ld, channel %ld is %g, not %g: %s", what, (long)n, (long)y,
                             (long)z, (long)o, (double)out[at], want[next], layer.text().c_str());
                }
    for (int64_t i = 0; i < out.size(); i++)
        if (!written[(size_t)i] && bits_of(out[i]) != untouched)
            fail("%s: wrote between the results, at %ld: %s", what, (long)i, layer.text().c_str());
}

void check_unpack(const Layer &layer, Buffer<char> &values, Buffer<uint8_t> &index) {
    Buffer<float> restored((int64_t)layer.dense.size());
    memset((void *)restored.data(), 0xff, layer.dense.size() * sizeof(float));
    lbc_unpack(&layer.w, values.data(), index.data(), restored.data());
    if (memcmp(restored.data(), layer.dense.data(), layer.dense.size() * sizeof(float)))
        fail("unpacked to something else: %s", layer.text().c_str());
}

struct Options {
    int64_t cases = 200, seed = 1, threads = 3, largest = 4000000;
    std::vector<int64_t> isas;
};

const char *name_of(int64_t isa) { return isa == LBC_AVX512 ? "avx512" : isa == LBC_AVX2 ? "avx2" : "portable"; }

// One layer on every instruction set, on one thread and several; returns whether the draw was a possible one.
bool check_layer(Random &random, const Options &options) {
    Layer layer;
    LbcWeight &w = layer.w;
    LbcCall &c = layer.c;
    if (!draw(random, layer, options.largest)) return false;
    fill_weight(random, layer);
    if (lbc_plan(&w, c.stride_w)) fail("no plan: %s", layer.text().c_str());
    const bool before = random.chance(30);
    Buffer<char> values(lbc_values(&w) * (w.half ? 2 : 4), before);
    Buffer<uint8_t> index(lbc_index_bytes(&w), before);
    Buffer<float> dense((int64_t)layer.dense.size(), before);
    memcpy(dense.data(), layer.dense.data(), layer.dense.size() * sizeof(float));
    if (const int64_t fault = lbc_pack(&w, dense.data(), values.data(), index.data()); fault >= 0)
        fail("a weight of the pattern was refused at %ld: %s", (long)fault, layer.text().c_str());
    check_unpack(layer, values, index);

    const Image x(random, c.images, c.in_h, c.in_w, w.in), place(random, c.images, c.out_h, c.out_w, w.out);
    const Image added(random, c.images, c.out_h, c.out_w, w.out);
    Buffer<float> input(x.floats(), before), bias(w.out, before), residual(added.floats(), before);
    // Gaps hold NaN: one that is read shows in the results.
    for (int64_t i = 0; i < input.size(); i++) input[i] = NAN;
    for (int64_t n = 0; n < c.images; n++)
        for (int64_t y = 0; y < c.in_h; y++)
            for (int64_t z = 0; z < c.in_w; z++)
                for (int64_t i = 0; i < w.in; i++) input[x.at(n, y, z, i)] = random.real();
    for (int64_t i = 0; i < residual.size(); i++) residual[i] = random.real();
    for (int64_t i = 0; i < bias.size(); i++) bias[i] = random.real();

    c.x = input.data(), c.values = values.data(), c.index = index.data();
    c.bias = random.chance(50) ? bias.data() : nullptr;
    c.residual = random.chance(40) ? residual.data() : nullptr;
    c.x_image = x.image, c.x_row = x.row, c.x_pixel = x.pixel;
    c.out_image = place.image, c.out_row = place.row, c.out_pixel = place.pixel;
    c.residual_image = added.image, c.residual_row = added.row, c.residual_pixel = added.pixel;
    const std::vector<double> want = expected(layer, x, added);
    for (int64_t isa : options.isas) {
        std::vector<uint32_t> first;
        for (int64_t threads : {(int64_t)1, options.threads}) {
            Buffer<float> out(place.floats(), before);
            for (int64_t i = 0; i < out.size(); i++) memcpy((void *)&out[i], &untouched, sizeof untouched);
            c.out = out.data(), c.isa = isa, c.threads = threads, c.fork = threads > 1 ? team : nullptr;
            if (const int32_t code = lbc_run(&w, &c)) fail("%s refused: %d: %s", name_of(isa), code, layer.text().c_str());
            compare(layer, place, out, want, name_of(isa));
            std::vector<uint32_t> bits;
            for (int64_t i = 0; i < out.size(); i++) bits.push_back(bits_of(out[i]));
            if (first.empty()) first = bits;
            if (bits != first)
                fail("%s: %ld threads give other bits: %s", name_of(isa), (long)threads, layer.text().c_str());
        }
    }
    return true;
}

Options read_options(int count, char **words) {
    Options options;
    for (int i = 1; i < count; i++) {
        const std::string word = words[i];
        const int64_t number = i + 1 < count ? atoll(words[i + 1]) : 0;
        if (word == "--heap")
            on_heap = true;
        else if (word == "--cases")
            options.cases = number, i++;
        else if (word == "--seed")
            options.seed = number, i++;
        else if (word == "--threads")
            options.threads = number, i++;
        else if (word == "--largest")
            options.largest = number, i++;
        else {
            const int64_t isa = word == "avx512" ? LBC_AVX512 : word == "avx2" ? LBC_AVX2 : LBC_PORTABLE;
            if (word != name_of(isa)) fail("%s is no option and no instruction set", word.c_str());
            if (!lbc_isa_available((int32_t)isa)) fail("%s is not available", word.c_str());
            options.isas.push_back(isa);
        }
    }
    if (options.isas.empty())
        for (int64_t isa : {LBC_PORTABLE, LBC_AVX2, LBC_AVX512})
            if (lbc_isa_available((int32_t)isa)) options.isas.push_back(isa);
    return options;
}

}  // namespace

int main(int count, char **words) {
    const Options options = read_options(count, words);
    Random random((uint64_t)options.seed);
    for (int64_t done = 0; done < options.cases;) done += check_layer(random, options);
    printf("ok: %ld layers on", (long)options.cases);
    for (int64_t isa : options.isas) printf(" %s", name_of(isa));
    printf("\n");
    return 0;
}
