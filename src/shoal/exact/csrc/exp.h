// e**x and what is made of it, operation by operation as in numbers.py. Plain scalar code that
// compilers turn into vectors; each kernel file gets its own copy, compiled with its own flags.

#pragma once
#include <stdint.h>
#include <string.h>

namespace {

inline float float_of(int32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline int32_t bits_of(float value) {
    int32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

// To whole numbers, ties to even: nothing is left after the point once 1.5 * 2**23 is added.
inline float rounded(float x) {  // |x| < 2**22
    const float large = 12582912.f;
    return (x + large) - large;
}

inline float rounded_positive(float x) {  // 0 <= x; from 2**23 on every float is whole
    const float large = 8388608.f;
    return x < large ? (x + large) - large : x;
}

inline float exp_of(float x) {
    float power = x * 1.44269504f;
    power = power < -100.f ? -100.f : power;
    power = power > 126.f ? 126.f : power;
    const float whole = rounded(power);
    const float rest = power - whole;
    float result = rest * 0.0013264728f;
    result = (result + 0.009671513f) * rest;
    result = (result + 0.055507336f) * rest;
    result = (result + 0.24022242f) * rest;
    result = (result + 0.693147f) * rest;
    const int32_t exponent = int32_t(uint32_t(int32_t(whole) + 127) << 23);
    return (result + 1.f) * float_of(exponent);
}

inline float tanh_of(float x) { return 1.f - 2.f / (exp_of(x + x) + 1.f); }

// The largest |x| of n floats as bits, which order as integers do; NaN is above all.
inline int32_t largest_bits_of(const float* x, int n) {
    int32_t largest = 0;
    for (int i = 0; i < n; i++) {
        const int32_t bits = bits_of(x[i]) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

inline float at_least(float least, float x) { return x < least ? least : x; }  // keeps NaN

}  // namespace
