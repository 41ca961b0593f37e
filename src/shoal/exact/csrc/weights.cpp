// Rounds float weights to 4 bits; the definition is quantise_int4 in weights.py.

#include <stdint.h>

#include <algorithm>
#include <cmath>

#include "pool.h"
#include "shoal.h"

namespace shoal {
namespace {

constexpr int GROUP = 32;
constexpr int LARGEST_CODE = 7, LARGEST_MULTIPLIER = 18, CANDIDATES = 4;
constexpr int UNIT = 256;  // parts of the smallest step
constexpr float PARTS = float(LARGEST_CODE * LARGEST_MULTIPLIER * UNIT);

// To the nearest whole number, ties to even, for |x| < 2**22: adding 1.5 * 2**23 rounds there.
inline float nearest(float x) {
    const float large = 12582912.f;
    return (x + large) - large;
}

inline int code_of(int32_t parts, float step) {
    int code = int(nearest(float(parts) / step));
    return std::min(std::max(code, -LARGEST_CODE), LARGEST_CODE);
}

// The squared error with this multiplier: 32 numbers below 2**31, summed exactly.
uint64_t error_of(const int32_t* parts, int multiplier) {
    const float step = float(UNIT * multiplier);
    uint32_t high = 0, low = 0;
    for (int k = 0; k < GROUP; k++) {
        int32_t miss = UNIT * multiplier * code_of(parts[k], step) - parts[k];
        uint32_t square = uint32_t(miss) * uint32_t(miss);
        high += square >> 16;
        low += square & 0xffff;
    }
    return (uint64_t(high) << 16) + low;
}

int best_multiplier(const int32_t* parts) {
    int32_t largest = 0;
    for (int k = 0; k < GROUP; k++) largest = std::max(largest, std::abs(parts[k]));
    const int step = LARGEST_CODE * UNIT;
    const int whole = (largest + step - 1) / step;  // cuts nothing off
    int best = 1;
    uint64_t least = UINT64_MAX;
    for (int less = 0; less < CANDIDATES; less++) {
        int multiplier = std::max(whole - less, 1);
        uint64_t error = error_of(parts, multiplier);
        if (error < least) least = error, best = multiplier;
    }
    return best;
}

void round_row(const float* w, int K, uint8_t* codes, uint8_t* multipliers, float* scale) {
    float largest = 1e-12f;
    for (int k = 0; k < K; k++) largest = std::max(largest, std::fabs(w[k]));
    const float part = largest / PARTS;
    *scale = part * float(UNIT);
    for (int begin = 0; begin < K; begin += GROUP) {
        const int count = std::min(GROUP, K - begin);
        int32_t parts[GROUP] = {};
        for (int k = 0; k < count; k++) parts[k] = int32_t(nearest(w[begin + k] / part));
        const int multiplier = best_multiplier(parts);
        const float step = float(UNIT * multiplier);
        for (int k = 0; k < count; k++) codes[begin + k] = uint8_t(8 + code_of(parts[k], step));
        multipliers[begin / GROUP] = uint8_t(multiplier);
    }
}

}  // namespace
}  // namespace shoal

void shoal_round4(const float* w, int N, int K, uint8_t* codes, uint8_t* m, float* ws) {
    const int groups = (K + shoal::GROUP - 1) / shoal::GROUP;
    const int rows = std::max(1, 65536 / K);
    shoal::parallel((N + rows - 1) / rows, [=](int chunk) {
        for (int n = chunk * rows; n < std::min(N, (chunk + 1) * rows); n++) {
            const size_t row = size_t(n);
            shoal::round_row(w + row * K, K, codes + row * K, m + row * groups, ws + n);
        }
    });
}
