// Attention over paged pools of rounded keys and values, as defined in attention.py.

#pragma once
#include "shoal_layer.h"

#include <stddef.h>
#include <stdint.h>

namespace shoal {

constexpr int ATTENTION_BLOCK = 128;  // tokens whose weights share a scale
constexpr int LANES = 32;             // tokens, or values, beside one another in a panel
constexpr int MOST_WIDTH = 512;       // of a head: the sums of its products fit 32 bits

// What each variant has to bring. A panel is (steps, 32) pairs of int16: two neighbouring entries
// of 32 keys, or one entry of 32 values of two neighbouring tokens.
struct AttentionKernels {
    const char* name;
    int rows;  // the most of one call of products

    // sums[r][lane] = sum over 2 * steps entries of a[r] times the panel; a[r] = a + r * stride
    void (*products)(const int16_t* a, size_t stride, int rows, const int32_t* panel, int steps,
                     int32_t* sums);
    void (*pack_keys)(const int16_t* const* tokens, int width, int32_t* panel);
    void (*pack_values)(const int16_t* const* tokens, int count, int width, int32_t* pairs,
                        size_t panel_size);

    // scores[i] = sums[i] * key_scale[i] * scale, capped; -inf outside begin .. end
    void (*score)(const int32_t* sums, const float* key_scale, float scale, float softcap,
                  int begin, int end, float* scores);
    float (*highest)(const float* scores, int n);
    // scores -> weights * value_scale, in place; returns the sum of weights in parts of 2**-24
    int64_t (*weigh)(float* scores, float highest, const float* value_scale, int n);
    int64_t (*weight_of)(float score, float highest);
    float (*encode)(const float* weights, int n, int16_t* codes);  // returns the scale
    void (*add)(float* out, const int32_t* sums, float scale, int n);
    void (*divide)(float* out, int64_t total, int n);
};

const AttentionKernels* attention_avx512vnni();
const AttentionKernels* attention_avxvnni();
const AttentionKernels* attention_avx2();
const AttentionKernels* attention_sse41();
const AttentionKernels* attention_neondot();
const AttentionKernels* attention_neon();
const AttentionKernels* attention_generic();

const AttentionKernels& attention_kernels();  // the ones of the variant in use

// Rounded queries: codes (T, H, stride) with zeros behind the head's width, scale (T, H), already
// times the layer's scaling.
struct Queries {
    const int16_t* codes;
    const float* scale;
    int heads, width;
    static int stride(int width) { return (width + 1) / 2 * 2; }
};

// out (T, H, W). Arguments have been checked; keys and values of the step are in the pools.
void attend(const Queries&, const shoal_cache&, const shoal_scores&, const shoal_step&, float* out);

// Whether every page and slot that the step reads or writes lies in the pools.
bool fits(const shoal_cache&, const shoal_scores&, const shoal_step&);

}  // namespace shoal
