// The fused depthwise + pointwise convolution: one plain C interface, no Python, torch or ONNX in it.
//
//   y[o] = clamp(prelu(sum_r pointwise[o, r] * (depthwise[r] * x[channels[r]]) + bias[o] + residual[o]))
//
// The depthwise results are computed straight into the panels that the pointwise matrix product reads,
// so they never go through memory. All tensors are float32, row-major, N C H W.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define NETDECOUPLE_EXPORT __attribute__((visibility("default")))
#else
#define NETDECOUPLE_EXPORT
#endif

extern "C" {

typedef struct {
    int64_t n_i, n_o, groups;
    int64_t rows;           // depthwise filters, all groups together; the same number in each group
    int64_t kh, kw;
    int64_t strides[2];     // vertical, horizontal
    int64_t pads[4];        // top, left, bottom, right
    int64_t dilations[2];   // vertical, horizontal
    float minimum, maximum; // of the output; ReLU is 0 and infinity
} netdecouple_shape;

// Calls work(task, i) for every i < count, in any order, on any threads, and returns when all are done.
typedef void (*netdecouple_parallel_for)(void* pool, void (*work)(void* task, size_t i), size_t count, void* task);

// A pool for netdecouple_openmp_for: the host's own OpenMP, by the address of its GOMP_parallel.
typedef struct {
    void (*parallel)(void (*work)(void* data), void* data, unsigned threads, unsigned flags);
    unsigned threads;       // at most
} netdecouple_openmp;

typedef struct netdecouple_layer netdecouple_layer;

// Check and pack a layer: channels (rows), depthwise (rows, kh, kw), pointwise (n_o, rows / groups),
// bias (n_o), slope (n_o) for negative outputs or NULL. The arrays may be freed afterwards.
// Returns NULL when something is wrong and writes one line about it to `error`.
NETDECOUPLE_EXPORT netdecouple_layer* netdecouple_create(
    const netdecouple_shape* shape, const int64_t* channels, const float* depthwise, const float* pointwise,
    const float* bias, const float* slope, char* error, size_t error_size);

// Height and width of the output for an input of h x w; zero or less if there is none.
NETDECOUPLE_EXPORT void netdecouple_output_size(
    const netdecouple_layer* layer, int64_t h, int64_t w, int64_t* output_h, int64_t* output_w);

// x (n, n_i, h, w) -> y (n, n_o, output_h, output_w); residual like y, or NULL. Safe to call at the same time
// from several threads. Without parallel_for everything runs in the calling thread.
// Returns 0, or 1 if memory ran out.
NETDECOUPLE_EXPORT int netdecouple_run(
    const netdecouple_layer* layer, const float* x, const float* residual, float* y, int64_t n, int64_t h, int64_t w,
    netdecouple_parallel_for parallel_for, void* pool);

// A netdecouple_parallel_for; the pool is a netdecouple_openmp.
NETDECOUPLE_EXPORT void netdecouple_openmp_for(void* pool, void (*work)(void* task, size_t i), size_t count, void* task);

NETDECOUPLE_EXPORT void netdecouple_destroy(netdecouple_layer* layer);

// The instruction set in use: "avx512", "avx2", "neon" or "baseline".
NETDECOUPLE_EXPORT const char* netdecouple_level(void);

// For tests: the instruction set of layers that are created from now on. Returns 0, and changes nothing, if this
// processor does not have it.
NETDECOUPLE_EXPORT int netdecouple_use_level(const char* name);

// For benchmarks: do `count` rounds of multiply-adds on registers alone; returns how many these were.
NETDECOUPLE_EXPORT int64_t netdecouple_multiply(int64_t count);

}  // extern "C"
