// What each instruction set has to bring. linear_kernels.cpp is compiled once per variant.

#pragma once
#include <stddef.h>
#include <stdint.h>

namespace shoal {

// Weights lie in panels of 32 outputs: for every step of 4 inputs 32 x 4 bytes, output by output.
// 4-bit weights: two steps share a byte, the even one in the low nibbles; after every 32 inputs
// (a group) one multiplier per output applies, kept apart as (groups, 32) bytes.
constexpr int PANEL = 32;
constexpr int GROUP = 32;       // inputs are padded to whole groups; offsets below need GROUP == PANEL
constexpr int BLOCK16 = 256;    // 12-bit products: this many fit an int32 sum

struct Rows {  // codes of some rows; padded inputs are 128
    const uint8_t* codes;
    size_t stride;
    int count;
};

struct Panel4 {
    const uint8_t* nibbles;
    const uint8_t* multipliers;
    const int8_t* lut;
};

struct Kernels {
    const char* name;
    bool is_signed;
    int rows8;    // the most rows of one call of tile8
    int rows4;    // of tile4
    int direct4;  // with more rows in all, unpacking to int8 first is faster

    // x (K) -> codes, returns the scale; a row that is not finite gives codes 128 and NaN
    float (*quantise)(const float* x, int K, uint8_t* codes);
    float (*quantise16)(const float* x, int K, int16_t* codes);

    // sums[row][output] += sum of code * w over `inputs`, with code - 128 where is_signed
    void (*tile8)(Rows, const int8_t* panel, int inputs, int32_t* sums);
    void (*tile4)(Rows, Panel4, int inputs, int32_t* sums);
    void (*unpack4)(Panel4, int inputs, int8_t* panel);

    // inputs is a multiple of BLOCK16
    int64_t (*dot16)(const int16_t* a, const int16_t* b, int inputs);

    // y[i] = float(sums[i]) * ws[i] * s (+ bias[i])
    void (*finish)(const int32_t* sums, const float* ws, const float* bias, float s, int n, float* y);
};

const Kernels* kernels_avx512vnni();  // nullptr where not built
const Kernels* kernels_avxvnni();
const Kernels* kernels_avx2();
const Kernels* kernels_sse41();
const Kernels* kernels_neondot();
const Kernels* kernels_neon();
const Kernels* kernels_generic();

const Kernels& kernels();  // the ones in use

}  // namespace shoal
