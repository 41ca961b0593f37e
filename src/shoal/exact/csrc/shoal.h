// The C interface of the compiled library. Plain types only, so that Python's ctypes can call it.
//
// Weights are int8, 4-bit or 12-bit with one float scale per output; activations are quantised
// inside, row by row. All long sums are sums of integers, and every float step is one IEEE
// operation in the order written here: a row's bits do not depend on the other rows, the number of
// threads, or the instruction set chosen.
//
// M rows, K inputs, N outputs; arrays are contiguous, rows first.

#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

typedef struct shoal_linear shoal_linear;

// Of the sources and flags that this library was made from: a caller refuses any other.
const char* shoal_fingerprint(void);

// The variant in use: "avx512vnni", "avxvnni", "avx2", "sse41"; on ARM "neondot", "neon"; "generic".
// Chosen when first needed: SHOAL_ISA if set and possible here, else the fastest this processor has.
const char* shoal_isa(void);

// Uses the named variant from now on; 0 where it is unknown, not built, or cannot run here.
// Packed weights stay valid: all variants share their layout.
int shoal_set_isa(const char* name);

// How many threads compute, the caller included (at least 1).
void shoal_set_threads(int threads);
int shoal_threads(void);

// How long an idle worker spins before it sleeps, in microseconds (default 50).
void shoal_set_spin_us(int microseconds);

// Pack weights; the arrays may be freed afterwards. NULL if K is over SHOAL_LARGEST_K, a size is
// not positive, a value is out of range, or memory is short.
//
// linear8:  y = float(sum (code - 128) * w) * ws * s + bias,   code, s as in shoal_quantise
// linear4:  the same with w = lut[code4] * m[n, k / 32]; m is (N, ceil(K / 32)), m >= 1 and
//           -127 <= w <= 127 for every weight. 4.25 bits a weight.
// linear16: w and x rounded to 12 bits: s = max(max|row|, 1e-12f) / 2047, code = rint(x / s);
//           y = float(int64 sum of products) * ws * s + bias. w is (N, K) float32.
// Multiplied and added from left to right; without bias (NULL) nothing is added.
#define SHOAL_LARGEST_K 131000
shoal_linear* shoal_linear8(const int8_t* w, const float* ws, const float* bias, int N, int K);
shoal_linear* shoal_linear4(const uint8_t* codes, const int8_t lut[16], const uint8_t* m,
                            const float* ws, const float* bias, int N, int K);
shoal_linear* shoal_linear16(const float* w, const float* bias, int N, int K);
void shoal_linear_free(shoal_linear*);
int64_t shoal_linear_bytes(const shoal_linear*);

// w (N, K) of finite numbers -> codes (N, K), m (N, ceil(K / 32)), ws (N) of a linear4 whose lut is
// -8 .. 7, as quantise_int4 in weights.py.
void shoal_round4(const float* w, int N, int K, uint8_t* codes, uint8_t* m, float* ws);

// x (M, K) -> codes (M, K), scale (M): scale = max(max|row|, 1e-12f) / 127,
// code = trunc(x / scale + 128.5f). A row with a NaN or an infinity gets codes 128 and scale NaN:
// every output of such a row is NaN, and no other row changes.
void shoal_quantise(const float* x, int M, int K, uint8_t* codes, float* scale);

// x (M, K) -> y (M, N)
void shoal_linear_run(const shoal_linear*, const float* x, int M, float* y);

// Expert e computes rows row_begin[e] .. row_begin[e + 1] of x (row_begin has count + 1 entries).
// All experts have the same N, K and kind; one parallel region for all of them.
void shoal_linear_run_rows(const shoal_linear* const* experts, int count, const int* row_begin,
                           const float* x, float* y);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#ifdef __cplusplus
}
#endif
