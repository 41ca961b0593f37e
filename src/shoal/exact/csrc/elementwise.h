// Operations on one row of floats, as defined in numbers.py. Compiled once per variant.

#pragma once
#include <stdint.h>

namespace shoal {

struct Elementwise {
    const char* name;
    // y = x / root mean square (x) * weight
    void (*norm)(const float* x, const float* weight, double eps, int n, float* y);
    // x, y are the halves of what is rotated
    void (*rotate)(float* x, float* y, const float* cos, const float* sin, int half);
    void (*silu)(const float* gate, const float* up, int n, float* y);  // y = silu(gate) * up
    void (*gelu_tanh)(const float* gate, const float* up, int n, float* y);
    void (*add)(float* x, const float* y, int n);  // x += y
    void (*to_bf16)(float* x, int n);              // rounds, and stays float32
    void (*to_f16)(float* x, int n);
};

const Elementwise* elementwise_avx512vnni();
const Elementwise* elementwise_avxvnni();
const Elementwise* elementwise_avx2();
const Elementwise* elementwise_sse41();
const Elementwise* elementwise_neondot();
const Elementwise* elementwise_neon();
const Elementwise* elementwise_generic();

const Elementwise& elementwise();  // the ones of the variant in use

}  // namespace shoal
