// N:M linear and 2-D convolution layers on CPUs: the C interface.
//
// Shapes and names: O output channels, I input channels, [kh, kw] kernel positions. Images are float32, channels last:
// a pixel's channels lie side by side, everything else has strides, in elements. The packed weight does not depend on
// the instruction set; what it looks like is said in layout.h.
#ifndef LBC_KERNELS_H
#define LBC_KERNELS_H

#include <stdint.h>

#if defined(__GNUC__)
#define LBC_EXPORT __attribute__((visibility("default")))  // everything else stays inside the library
#else
#define LBC_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define LBC_INTERFACE 2  // raised whenever a structure or a layout below changes

enum { LBC_AUTO = -1, LBC_PORTABLE = 0, LBC_AVX2 = 1, LBC_AVX512 = 2 };

// A weight [O, I, kh, kw] with at most N non-zeros in every M consecutive input channels.
typedef struct {
    int64_t out, in, kh, kw;
    int64_t n, m;
    int64_t vector;  // 1: a mask per output channel; 16 or 32: that many output channels share theirs
    int64_t chunk;   // input channels that are worked on at once; 0: chosen by lbc_plan
    int64_t half;    // 1: values are stored as bfloat16 and widened when used
} LbcWeight;

// One call. Strides count floats.
typedef struct {
    const float *x;         // [images, in_h, in_w, I]
    const void *values;     // as lbc_pack wrote them
    const uint8_t *index;
    const float *bias;      // [O] or null
    const float *residual;  // like out, added before the activation; or null
    float *out;             // [images, out_h, out_w, O]; must not overlap x
    int64_t images, in_h, in_w, out_h, out_w;
    int64_t x_image, x_row, x_pixel;
    int64_t out_image, out_row, out_pixel;
    int64_t residual_image, residual_row, residual_pixel;
    int64_t stride_h, stride_w, dilation_h, dilation_w;
    int64_t pad_top, pad_left;  // zeros before; those after follow from out_h and out_w
    int64_t relu;
    int64_t isa;      // LBC_AUTO or one that lbc_isa_available accepts
    int64_t threads;
    // GOMP_parallel of the OpenMP library that the caller's other code uses, so that there is one pool of threads;
    // null: everything on the calling thread.
    void (*fork)(void (*)(void *), void *, unsigned, unsigned);
} LbcCall;

LBC_EXPORT int32_t lbc_interface(void);

// The digest of the sources that the library was compiled from, as compile.py counts it; "" where it gave none.
LBC_EXPORT const char *lbc_sources(void);

// Whether the processor has the instructions and this build the code.
LBC_EXPORT int32_t lbc_isa_available(int32_t isa);

// Checks a weight's numbers and fills in `chunk`; 0, or a negative number where there is no kernel for them.
LBC_EXPORT int32_t lbc_plan(LbcWeight *weight, int64_t stride_w);

// Elements of the packed values, bytes of the packed index; -1 for numbers that lbc_plan would not give. What follows
// takes numbers that were planned: it does not look at them again.
LBC_EXPORT int64_t lbc_values(const LbcWeight *weight);
LBC_EXPORT int64_t lbc_index_bytes(const LbcWeight *weight);

// Packs a contiguous dense weight. Returns -1, or the flat position in `dense` of the first non-zero that is one too
// many for its group. -0.0 is a zero, kept where there is room for it.
LBC_EXPORT int64_t lbc_pack(const LbcWeight *weight, const float *dense, void *values, uint8_t *index);

// The inverse: every element of `dense` is written; what is not kept becomes +0.0.
LBC_EXPORT void lbc_unpack(const LbcWeight *weight, const void *values, const uint8_t *index, float *dense);

// Runs a layer. Returns 0, or a negative number: -1 no such instruction set here, -2 out of memory.
LBC_EXPORT int32_t lbc_run(const LbcWeight *weight, const LbcCall *call);

// Runs layers one after the other; ends with the first that fails, and what it returned.
LBC_EXPORT int32_t lbc_run_all(int64_t count, const LbcWeight *weights, const LbcCall *calls);

// Instructions per second of one thread, for the bounds that results are compared with; kind 0: multiply-adds of
// one register of the instruction set, kind 1: pairs of permute and multiply-add. 0 where the set has none.
LBC_EXPORT double lbc_rate(int32_t isa, int32_t kind);

#ifdef __cplusplus
}
#endif
#endif
