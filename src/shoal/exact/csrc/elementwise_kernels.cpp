// Norm, rotation, activations, rounding. Compiled once per variant (SHOAL_VARIANT).

#include "elementwise.h"
#include "exp.h"

#include <math.h>

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

namespace shoal {
namespace {

// The squares of 15-bit numbers; 4096 blocks of them would still fit 64 bits by far.
int64_t sum_of_squares(const float* x, float scale, int n) {
    int64_t total = 0;
    for (int i = 0; i < n; i++) {
        const int32_t code = int32_t(rounded(x[i] / scale));
        total += int64_t(uint32_t(code * code));
    }
    return total;
}

// In place too.
void norm(const float* x, const float* weight, double eps, int n, float* y) {
    const float scale = at_least(1e-12f, float_of(largest_bits_of(x, n))) / 32767.f;
    const double wide = double(scale);
    const double mean = double(sum_of_squares(x, scale, n)) / double(n) * wide * wide + eps;
    const float factor = float(1.0 / sqrt(mean));
#pragma GCC ivdep
    for (int i = 0; i < n; i++) y[i] = x[i] * factor * weight[i];
}

void rotate(float* __restrict x, float* __restrict y, const float* __restrict cos,
            const float* __restrict sin, int half) {
    for (int i = 0; i < half; i++) {
        const float one = x[i], other = y[i];
        x[i] = one * cos[i] - other * sin[i];
        y[i] = other * cos[i] + one * sin[i];
    }
}

void silu(const float* __restrict gate, const float* __restrict up, int n, float* __restrict y) {
    for (int i = 0; i < n; i++) y[i] = gate[i] / (exp_of(-gate[i]) + 1.f) * up[i];
}

void gelu_tanh(const float* __restrict gate, const float* __restrict up, int n,
               float* __restrict y) {
    for (int i = 0; i < n; i++) {
        const float x = gate[i];
        const float cubed = x * x * x * 0.044715f;
        y[i] = x / (exp_of((cubed + x) * -1.5957691f) + 1.f) * up[i];
    }
}

void add(float* __restrict x, const float* __restrict y, int n) {
    for (int i = 0; i < n; i++) x[i] += y[i];
}

// `bits` with its last `cut` bits rounded away, ties to even. May carry into the exponent.
inline uint32_t cut_bits(uint32_t bits, int cut) {
    const uint32_t half = (1u << (cut - 1)) - 1 + (bits >> cut & 1);
    return (bits + half) & ~((1u << cut) - 1);
}

void to_bf16(float* __restrict x, int n) {
    for (int i = 0; i < n; i++) {
        const uint32_t bits = uint32_t(bits_of(x[i]));
        const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
        x[i] = float_of(int32_t(is_nan ? 0x7fc00000u : cut_bits(bits, 16)));
    }
}

void to_f16(float* __restrict x, int n) {
    for (int i = 0; i < n; i++) {
        const uint32_t bits = uint32_t(bits_of(x[i])), size = bits & 0x7fffffff;
        const uint32_t cut = cut_bits(size, 13);
        const uint32_t normal = cut > 0x477fe000 ? 0x7f800000u : cut;  // over 65504: infinity
        const float small = float_of(int32_t(size)) + 0.5f;            // steps of 2**-24
        const uint32_t subnormal = uint32_t(bits_of(small - 0.5f));
        const uint32_t finite = size < 0x38800000 ? subnormal : normal;  // 2**-14
        const uint32_t result = size > 0x7f800000 ? 0x7fc00000u : finite;
        x[i] = float_of(int32_t(result | (bits & 0x80000000)));
    }
}

constexpr Elementwise ELEMENTWISE = {
    TEXT(SHOAL_VARIANT), norm, rotate, silu, gelu_tanh, add, to_bf16, to_f16,
};

}  // namespace

const Elementwise* JOIN(elementwise_, SHOAL_VARIANT)() { return &ELEMENTWISE; }

}  // namespace shoal
