// The C interface of attention and of whole decoder layers; definitions in attention.py, layer.py.
//
// T new tokens, all rows together; E hidden width; H heads; K kv heads; D width of queries and
// keys; W of values. Arrays are contiguous, the first axis named first. Calls with a cache return
// 0, or one of the SHOAL_ errors, and then nothing has been written to the pools.

#pragma once
#include "shoal.h"

#ifdef __cplusplus
extern "C" {
#endif
#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

enum { SHOAL_BAD_ARGUMENT = 1, SHOAL_OUT_OF_BOUNDS = 2, SHOAL_OUT_OF_MEMORY = 3 };
enum { SHOAL_SILU = 0, SHOAL_GELU_TANH = 1 };
enum { SHOAL_F32 = 0, SHOAL_BF16 = 1, SHOAL_F16 = 2 };

// One layer's pools. A slot holds one token.
typedef struct {
    int64_t slots;
    int kv_heads, key_width, value_width;  // K; D, at most 512; W
    int16_t* keys;                         // (slots, K, D) codes
    float* key_scale;                      // (slots, K)
    int16_t* values;                       // (slots, K, W) codes
    float* value_scale;                    // (slots, K)
} shoal_cache;

typedef struct {
    float scaling;
    float softcap;       // 0: none
    int64_t window;      // 0: none; a token sees itself and window - 1 before
    const float* sinks;  // (H,), or NULL
} shoal_scores;

typedef struct {
    int half;          // R / 2
    const float* cos;  // (T, R / 2)
    const float* sin;
} shoal_angles;

// What is computed now: row r has count[r] new tokens from position start[r] on, its token at
// position p lies in slot pages[page_begin[r] + p / page_size] * page_size + p % page_size.
// Pages that no window reaches may be -1.
typedef struct {
    int tokens, rows, page_size, tables;
    const int64_t* start;       // (rows,)
    const int64_t* count;       // (rows,), their sum is T
    const int64_t* page_begin;  // (rows + 1,)
    const int64_t* pages;
    const int64_t* slots;       // (T,) where the new tokens are cached
    const shoal_angles* angles; // (tables,)
} shoal_step;

typedef struct {
    const shoal_linear* qkv;      // E -> (H + 2 K) * D; NULL: no attention in this layer
    const shoal_linear* out;      // H * D -> E
    const shoal_linear* gate_up;  // E -> 2 F; NULL: no feed-forward, and no rounding
    const shoal_linear* down;     // F -> E
    const float* attention_norm;   // (E,)
    const float* query_norm;       // NULL, or (query_norm_length,): D or H * D
    const float* key_norm;         // NULL, or (key_norm_length,): D or K * D
    const float* attention_after;  // NULL or (E,)
    const float* mlp_norm;         // (E,)
    const float* mlp_after;        // NULL or (E,)
    int query_norm_length, key_norm_length;
    int hidden, heads;  // E, H
    int angles;         // which of the step's
    int activation;
    double attention_eps, mlp_eps;
    shoal_scores scores;
    shoal_cache cache;  // its value_width is D
} shoal_layer;

// x (T, E), in place; rounded to `dtype` after each layer.
int shoal_layers_run(const shoal_layer* layers, int count, const shoal_step*, float* x, int dtype);

// q (T, H, D), k (T, K, D), v (T, K, W), already normed and rotated -> out (T, H, W).
int shoal_attention(const shoal_cache*, const shoal_scores*, const shoal_step*, int heads,
                    const float* q, const float* k, const float* v, float* out);

// y (T, E) = rms_norm(x)
void shoal_rms_norm(const float* weight, double eps, const float* x, int T, int E, float* y);

// y (T, N) = linear(rms_norm(x))
void shoal_norm_linear(const float* weight, double eps, const shoal_linear*, const float* x, int T,
                       float* y);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif
