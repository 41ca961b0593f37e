// The few vector operations the kernels are made of, for the instruction set being compiled.
//
// Lanes holds sums of OUTPUTS outputs. dot(sum, four codes, weights) adds four products per output.
// SIGNED says that dot takes code - 128 (as int8) instead of the code. SUMS registers are for sums;
// tiles have up to ROWS8 rows (4-bit weights: ROWS4); for more than DIRECT4 rows 4-bit weights are
// unpacked to 8 bits first.

#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) || defined(__SSE4_1__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

inline int32_t four_bytes(const void* from) {
    int32_t value;
    memcpy(&value, from, 4);
    return value;
}

#if defined(__AVX512VNNI__)

struct Lanes {
    using Sums = __m512i;
    using Weights = __m512i;
    using Codes = __m512i;
    static constexpr int OUTPUTS = 16, SUMS = 24, ROWS8 = 12, ROWS4 = 8, DIRECT4 = 24;
    static constexpr bool SIGNED = false;
    static Sums zero() { return _mm512_setzero_si512(); }
    static Weights load(const void* p) { return _mm512_loadu_si512(p); }
    static Sums load_sums(const void* p) { return load(p); }
    static void store(void* p, __m512i v) { _mm512_storeu_si512(p, v); }
    static Codes spread(const uint8_t* codes) { return _mm512_set1_epi32(four_bytes(codes)); }
    static Sums dot(Sums sums, Codes a, Weights w) { return _mm512_dpbusd_epi32(sums, a, w); }
    static Sums add(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
    static Sums times(Sums a, Sums b) { return _mm512_mullo_epi32(a, b); }
    static Sums widen(const uint8_t* m) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(m)));
    }
    static Weights table(const int8_t* lut) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lut)));
    }
    static Weights low(Weights table, Weights v) {
        return _mm512_shuffle_epi8(table, _mm512_and_si512(v, _mm512_set1_epi8(15)));
    }
    static Weights high(Weights table, Weights v) { return low(table, _mm512_srli_epi16(v, 4)); }
    static Weights pairs(Sums m) { return _mm512_or_si512(m, _mm512_slli_epi32(m, 16)); }
    static Weights times_bytes(Weights w, Weights m) {  // modulo 256; m: 16-bit, see pairs
        const __m512i odd = _mm512_set1_epi16(int16_t(0xff00));
        return _mm512_ternarylogic_epi32(odd, _mm512_mullo_epi16(_mm512_and_si512(w, odd), m),
                                         _mm512_mullo_epi16(w, m), 0xca);  // odd ? b : c
    }
};

#elif defined(__AVX2__)

struct Lanes {
    using Sums = __m256i;
    using Weights = __m256i;
    using Codes = __m256i;
    static constexpr int OUTPUTS = 8;
    static constexpr bool SIGNED = false;
    static Sums zero() { return _mm256_setzero_si256(); }
    static Weights load(const void* p) {
        return _mm256_loadu_si256(static_cast<const __m256i*>(p));
    }
    static Sums load_sums(const void* p) { return load(p); }
    static void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
    static Codes spread(const uint8_t* codes) { return _mm256_set1_epi32(four_bytes(codes)); }
#if defined(__AVXVNNI__)
    static constexpr int SUMS = 12, ROWS8 = 6, ROWS4 = 6, DIRECT4 = 12;
    static Sums dot(Sums sums, Codes a, Weights w) { return _mm256_dpbusd_avx_epi32(sums, a, w); }
#else
    // In 16 bits, even and odd bytes apart: pairs of 8-bit products would saturate.
    static constexpr int SUMS = 8, ROWS8 = 4, ROWS4 = 4, DIRECT4 = 8;
    static Sums dot(Sums sums, Codes a, Weights w) {
        const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8);
        const __m256i odd = _mm256_srai_epi16(w, 8);
        const __m256i a_even = _mm256_and_si256(a, _mm256_set1_epi16(255));
        const __m256i a_odd = _mm256_srli_epi16(a, 8);
        return add(sums, add(_mm256_madd_epi16(even, a_even), _mm256_madd_epi16(odd, a_odd)));
    }
#endif
    static Sums add(Sums a, Sums b) { return _mm256_add_epi32(a, b); }
    static Sums times(Sums a, Sums b) { return _mm256_mullo_epi32(a, b); }
    static Sums widen(const uint8_t* m) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(m)));
    }
    static Weights table(const int8_t* lut) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lut)));
    }
    static Weights low(Weights table, Weights v) {
        return _mm256_shuffle_epi8(table, _mm256_and_si256(v, _mm256_set1_epi8(15)));
    }
    static Weights high(Weights table, Weights v) { return low(table, _mm256_srli_epi16(v, 4)); }
    static Weights pairs(Sums m) { return _mm256_or_si256(m, _mm256_slli_epi32(m, 16)); }
    static Weights times_bytes(Weights w, Weights m) {
        const __m256i odd = _mm256_set1_epi16(int16_t(0xff00));
        return _mm256_blendv_epi8(_mm256_mullo_epi16(w, m),
                                  _mm256_mullo_epi16(_mm256_and_si256(w, odd), m), odd);
    }
};

#elif defined(__SSE4_1__) && !defined(SHOAL_PLAIN)

struct Lanes {  // as for AVX2, half as wide
    using Sums = __m128i;
    using Weights = __m128i;
    using Codes = __m128i;
    static constexpr int OUTPUTS = 4, SUMS = 8, ROWS8 = 4, ROWS4 = 4, DIRECT4 = 8;
    static constexpr bool SIGNED = false;
    static Sums zero() { return _mm_setzero_si128(); }
    static Weights load(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
    static Sums load_sums(const void* p) { return load(p); }
    static void store(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
    static Codes spread(const uint8_t* codes) { return _mm_set1_epi32(four_bytes(codes)); }
    static Sums dot(Sums sums, Codes a, Weights w) {
        const __m128i even = _mm_srai_epi16(_mm_slli_epi16(w, 8), 8), odd = _mm_srai_epi16(w, 8);
        const __m128i a_even = _mm_and_si128(a, _mm_set1_epi16(255));
        const __m128i a_odd = _mm_srli_epi16(a, 8);
        return add(sums, add(_mm_madd_epi16(even, a_even), _mm_madd_epi16(odd, a_odd)));
    }
    static Sums add(Sums a, Sums b) { return _mm_add_epi32(a, b); }
    static Sums times(Sums a, Sums b) { return _mm_mullo_epi32(a, b); }
    static Sums widen(const uint8_t* m) {
        return _mm_cvtepu8_epi32(_mm_cvtsi32_si128(four_bytes(m)));
    }
    static Weights table(const int8_t* lut) { return load(lut); }
    static Weights low(Weights table, Weights v) {
        return _mm_shuffle_epi8(table, _mm_and_si128(v, _mm_set1_epi8(15)));
    }
    static Weights high(Weights table, Weights v) { return low(table, _mm_srli_epi16(v, 4)); }
    static Weights pairs(Sums m) { return _mm_or_si128(m, _mm_slli_epi32(m, 16)); }
    static Weights times_bytes(Weights w, Weights m) {
        const __m128i odd = _mm_set1_epi16(int16_t(0xff00));
        return _mm_blendv_epi8(_mm_mullo_epi16(w, m), _mm_mullo_epi16(_mm_and_si128(w, odd), m), odd);
    }
};

#elif defined(__ARM_NEON) && defined(__aarch64__) && !defined(SHOAL_PLAIN)

struct Lanes {
    using Sums = int32x4_t;
    using Weights = int8x16_t;
    using Codes = int8x16_t;
    static constexpr int OUTPUTS = 4, SUMS = 24, ROWS8 = 6, ROWS4 = 6, DIRECT4 = 6;
    static constexpr bool SIGNED = true;
    static Sums zero() { return vdupq_n_s32(0); }
    static Weights load(const void* p) { return vld1q_s8(static_cast<const int8_t*>(p)); }
    static Sums load_sums(const void* p) { return vld1q_s32(static_cast<const int32_t*>(p)); }
    static void store(void* p, Sums v) { vst1q_s32(static_cast<int32_t*>(p), v); }
    static void store(void* p, Weights v) { vst1q_s8(static_cast<int8_t*>(p), v); }
    static Codes spread(const uint8_t* codes) {
        return vreinterpretq_s8_s32(vdupq_n_s32(int32_t(uint32_t(four_bytes(codes)) ^ 0x80808080u)));
    }
#if defined(__ARM_FEATURE_DOTPROD)
    static Sums dot(Sums sums, Codes a, Weights w) { return vdotq_s32(sums, a, w); }
#else
    static Sums dot(Sums sums, Codes a, Weights w) {  // 2 * 128 * 127 still fits 16 bits
        const int16x8_t first = vmull_s8(vget_low_s8(a), vget_low_s8(w));
        return vpadalq_s16(sums, vpaddq_s16(first, vmull_high_s8(a, w)));
    }
#endif
    static Sums add(Sums a, Sums b) { return vaddq_s32(a, b); }
    static Sums times(Sums a, Sums b) { return vmulq_s32(a, b); }
    static Sums widen(const uint8_t* m) { return Sums{m[0], m[1], m[2], m[3]}; }
    static Weights table(const int8_t* lut) { return vld1q_s8(lut); }
    static Weights low(Weights table, Weights v) {
        return vqtbl1q_s8(table, vandq_u8(vreinterpretq_u8_s8(v), vdupq_n_u8(15)));
    }
    static Weights high(Weights table, Weights v) {
        return vqtbl1q_s8(table, vshrq_n_u8(vreinterpretq_u8_s8(v), 4));
    }
    static Weights pairs(Sums m) { return vreinterpretq_s8_s32(vmulq_n_s32(m, 0x01010101)); }
    static Weights times_bytes(Weights w, Weights m) { return vmulq_s8(w, m); }
};

#else

struct Lanes {  // plain C++, written so that compilers find the vectors
    static constexpr int OUTPUTS = 16, ROWS8 = 4, ROWS4 = 0, DIRECT4 = 0;
    static constexpr bool SIGNED = true;
};
#define SHOAL_NO_LANES 1

#endif

}  // namespace
