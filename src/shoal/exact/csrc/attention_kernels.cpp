// The inner loops of attention. Compiled once per variant (SHOAL_VARIANT).

#include "attention.h"
#include "exp.h"

#if defined(__SSE4_1__)
#include <immintrin.h>
#endif

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

#define INLINED __attribute__((always_inline))

namespace shoal {
namespace {

inline int32_t pair_at(const int16_t* from) {
    int32_t pair;
    memcpy(&pair, from, 4);
    return pair;
}

#if defined(__AVX512VNNI__)

struct Pairs {
    using Vector = __m512i;
    static constexpr int SIZE = 16, ROWS = 12;
    static Vector zero() { return _mm512_setzero_si512(); }
    static Vector load(const void* p) { return _mm512_loadu_si512(p); }
    static void store(void* p, Vector v) { _mm512_storeu_si512(p, v); }
    static Vector spread(const int16_t* a) { return _mm512_set1_epi32(pair_at(a)); }
    static Vector dot(Vector sum, Vector a, Vector b) { return _mm512_dpwssd_epi32(sum, a, b); }

    // rows[i] = 16 pairs of token i -> column c (16 tokens) at to + c * LANES
    static void turn(const int16_t* const* rows, int at, int32_t* to) {
        __m512i a[16], b[16];
        for (int i = 0; i < 16; i++) a[i] = load(rows[i] + at);
        for (int i = 0; i < 16; i += 2) {
            b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {  // a[i + c]: columns c, 4 + c, 8 + c, 12 + c of 4 rows
            a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
            a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
            a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
            a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
        }
        for (int c = 0; c < 4; c++) {
            const __m512i even = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
            const __m512i odd = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
            const __m512i even2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
            const __m512i odd2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
            store(to + c * LANES, _mm512_shuffle_i32x4(even, even2, 0x88));
            store(to + (4 + c) * LANES, _mm512_shuffle_i32x4(odd, odd2, 0x88));
            store(to + (8 + c) * LANES, _mm512_shuffle_i32x4(even, even2, 0xdd));
            store(to + (12 + c) * LANES, _mm512_shuffle_i32x4(odd, odd2, 0xdd));
        }
    }

    // 32 values of two tokens -> pairs
    static void join(const int16_t* even, const int16_t* odd, int32_t* to) {
        alignas(64) static constexpr int16_t ORDER[64] = {
            0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
            8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
            16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
            24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
        const __m512i a = load(even), b = load(odd);
        store(to, _mm512_permutex2var_epi16(a, load(ORDER), b));
        store(to + 16, _mm512_permutex2var_epi16(a, load(ORDER + 32), b));
    }
};

#elif defined(__AVX2__)

struct Pairs {
    using Vector = __m256i;
    static constexpr int SIZE = 8, ROWS = 3;
    static Vector zero() { return _mm256_setzero_si256(); }
    static Vector load(const void* p) {
        return _mm256_loadu_si256(static_cast<const __m256i*>(p));
    }
    static void store(void* p, Vector v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
    static Vector spread(const int16_t* a) { return _mm256_set1_epi32(pair_at(a)); }
#if defined(__AVXVNNI__)
    static Vector dot(Vector sum, Vector a, Vector b) { return _mm256_dpwssd_avx_epi32(sum, a, b); }
#else
    static Vector dot(Vector sum, Vector a, Vector b) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
    }
#endif

    static void turn(const int16_t* const* rows, int at, int32_t* to) {
        __m256i a[8], b[8];
        for (int i = 0; i < 8; i++) a[i] = load(rows[i] + at);
        for (int i = 0; i < 8; i += 2) {
            b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {  // a[i + c]: columns c and 4 + c of 4 rows
            a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
            a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
            a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
            a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
        }
        for (int c = 0; c < 4; c++) {
            store(to + c * LANES, _mm256_permute2x128_si256(a[c], a[4 + c], 0x20));
            store(to + (4 + c) * LANES, _mm256_permute2x128_si256(a[c], a[4 + c], 0x31));
        }
    }

    // 32 values of two tokens -> pairs
    static void join(const int16_t* even, const int16_t* odd, int32_t* to) {
        for (int i = 0; i < LANES; i += 16) {
            const __m256i a = load(even + i), b = load(odd + i);
            const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
            store(to + i, _mm256_permute2x128_si256(low, high, 0x20));
            store(to + i + 8, _mm256_permute2x128_si256(low, high, 0x31));
        }
    }
};

#elif defined(__SSE4_1__)

struct Pairs {
    using Vector = __m128i;
    static constexpr int SIZE = 4, ROWS = 1;
    static Vector zero() { return _mm_setzero_si128(); }
    static Vector load(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
    static void store(void* p, Vector v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
    static Vector spread(const int16_t* a) { return _mm_set1_epi32(pair_at(a)); }
    static Vector dot(Vector sum, Vector a, Vector b) {
        return _mm_add_epi32(sum, _mm_madd_epi16(a, b));
    }

    static void turn(const int16_t* const* rows, int at, int32_t* to) {
        const __m128i a = load(rows[0] + at), b = load(rows[1] + at);
        const __m128i c = load(rows[2] + at), d = load(rows[3] + at);
        const __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d);
        const __m128i ab2 = _mm_unpackhi_epi32(a, b), cd2 = _mm_unpackhi_epi32(c, d);
        store(to, _mm_unpacklo_epi64(ab, cd));
        store(to + LANES, _mm_unpackhi_epi64(ab, cd));
        store(to + 2 * LANES, _mm_unpacklo_epi64(ab2, cd2));
        store(to + 3 * LANES, _mm_unpackhi_epi64(ab2, cd2));
    }

    static void join(const int16_t* even, const int16_t* odd, int32_t* to) {
        for (int i = 0; i < LANES; i += 8) {
            const __m128i a = load(even + i), b = load(odd + i);
            store(to + i, _mm_unpacklo_epi16(a, b));
            store(to + i + 4, _mm_unpackhi_epi16(a, b));
        }
    }
};

#endif

#if defined(__SSE4_1__)

template <int I>
struct Constant {
    constexpr operator int() const { return I; }
};

// f(0), f(1), ...: written out, so that arrays of vectors stay in registers.
template <int N, class F>
inline INLINED void each(F f) {
    if constexpr (N > 0) {
        each<N - 1>(f);
        f(Constant<N - 1>());
    }
}

template <int R>
void products_of(const int16_t* a, size_t stride, const int32_t* panel, int steps, int32_t* out) {
    constexpr int SIZE = Pairs::SIZE, V = LANES / SIZE;
    Pairs::Vector sums[R][V];
    const int16_t* row[R];
    each<R>([&](auto r) INLINED {
        row[r] = a + r * stride;
        each<V>([&](auto v) INLINED { sums[r][v] = Pairs::zero(); });
    });
    for (ptrdiff_t s = 0; s < steps; s++, panel += LANES) {
        Pairs::Vector b[V];
        each<V>([&](auto v) INLINED { b[v] = Pairs::load(panel + v * SIZE); });
        each<R>([&](auto r) INLINED {
            const auto pair = Pairs::spread(row[r] + 2 * s);
            each<V>([&](auto v) INLINED { sums[r][v] = Pairs::dot(sums[r][v], pair, b[v]); });
        });
    }
    each<R>([&](auto r) INLINED {
        each<V>([&](auto v) INLINED { Pairs::store(out + r * LANES + v * SIZE, sums[r][v]); });
    });
}

template <int R>
void products_up_to(const int16_t* a, size_t stride, int rows, const int32_t* panel, int steps,
                    int32_t* sums) {
    if constexpr (R > 0) {
        if (rows < R) return products_up_to<R - 1>(a, stride, rows, panel, steps, sums);
        products_of<R>(a, stride, panel, steps, sums);
    }
}

constexpr int ROWS = Pairs::ROWS;
constexpr auto products = products_up_to<ROWS>;

int turn_tokens(const int16_t* const* tokens, int width, int32_t* panel) {
    constexpr int SIZE = Pairs::SIZE;
    int at = 0;
    for (; at + 2 * SIZE <= width; at += 2 * SIZE)
        for (int t = 0; t < LANES; t += SIZE)
            Pairs::turn(tokens + t, at, panel + at / 2 * LANES + t);
    return at;
}

#else

constexpr int ROWS = 4;

void products(const int16_t* a, size_t stride, int rows, const int32_t* panel, int steps,
              int32_t* sums) {
    int32_t total[ROWS][LANES] = {};
    for (int s = 0; s < steps; s++, panel += LANES)
        for (int r = 0; r < rows; r++) {
            const int16_t* pair = a + size_t(r) * stride + 2 * s;
            const int32_t first = pair[0], second = pair[1];
            for (int i = 0; i < LANES; i++)
                total[r][i] += first * int16_t(panel[i]) + second * (panel[i] >> 16);
        }
    memcpy(sums, total, size_t(rows) * sizeof total[0]);
}

int turn_tokens(const int16_t* const*, int, int32_t*) { return 0; }

struct Pairs {
    static void join(const int16_t* even, const int16_t* odd, int32_t* to) {
        for (int i = 0; i < LANES; i++)
            to[i] = int32_t(uint16_t(even[i]) | uint32_t(uint16_t(odd[i])) << 16);
    }
};

#endif

void pack_keys(const int16_t* const* tokens, int width, int32_t* panel) {
    for (int at = turn_tokens(tokens, width, panel); at < width; at += 2)
        for (int t = 0; t < LANES; t++) {
            const uint32_t second = at + 1 < width ? uint16_t(tokens[t][at + 1]) : 0;
            panel[at / 2 * LANES + t] = int32_t(uint16_t(tokens[t][at]) | second << 16);
        }
}

void pack_values(const int16_t* const* tokens, int count, int width, int32_t* pairs,
                 size_t panel_size) {
    const int whole = width / LANES * LANES;
    for (int t = 0; t < count; t += 2, pairs += LANES) {
        int32_t* to = pairs;
        for (int at = 0; at < whole; at += LANES, to += panel_size)
            Pairs::join(tokens[t] + at, tokens[t + 1] + at, to);
        for (int i = 0; whole < width && i < LANES; i++) {
            const bool there = whole + i < width;
            const uint32_t first = there ? uint16_t(tokens[t][whole + i]) : 0;
            const uint32_t second = there ? uint16_t(tokens[t + 1][whole + i]) : 0;
            to[i] = int32_t(first | second << 16);
        }
    }
}

void score(const int32_t* __restrict sums, const float* __restrict key_scale, float scale,
           float softcap, int begin, int end, float* __restrict scores) {
    for (int i = 0; i < LANES; i++) scores[i] = float(sums[i]) * key_scale[i] * scale;
    if (softcap > 0)
        for (int i = 0; i < LANES; i++) scores[i] = tanh_of(scores[i] / softcap) * softcap;
    for (int i = 0; i < begin; i++) scores[i] = -__builtin_inff();
    for (int i = end; i < LANES; i++) scores[i] = -__builtin_inff();
}

float highest(const float* scores, int n) {
    int32_t best = bits_of(-__builtin_inff()) ^ 0x7fffffff;
    for (int i = 0; i < n; i++) {  // bits of negative floats turned round order as integers do
        const int32_t bits = bits_of(scores[i]);
        const int32_t ordered = bits ^ (bits >> 31 & 0x7fffffff);
        best = ordered > best ? ordered : best;
    }
    return float_of(best ^ (best >> 31 & 0x7fffffff));
}

constexpr float ONE = 16777216.f;

int64_t weigh(float* __restrict scores, float highest, const float* __restrict value_scale, int n) {
    uint32_t total = 0;  // at most 128 * 2**24
    for (int i = 0; i < n; i++) {
        const float weight = exp_of(scores[i] - highest);
        total += uint32_t(int32_t(rounded_positive(weight * ONE)));
        const float scaled = weight * value_scale[i];
        scores[i] = scores[i] == -__builtin_inff() ? 0.f : scaled;
    }
    return int64_t(total);
}

int64_t weight_of(float score, float highest) {
    return int64_t(rounded_positive(exp_of(score - highest) * ONE));
}

float encode(const float* __restrict weights, int n, int16_t* __restrict codes) {
    const float scale = at_least(1e-20f, float_of(largest_bits_of(weights, n))) / 8191.f;
    for (int i = 0; i < n; i++) codes[i] = int16_t(int32_t(rounded(weights[i] / scale)));
    return scale;
}

void add(float* __restrict out, const int32_t* __restrict sums, float scale, int n) {
    for (int i = 0; i < n; i++) out[i] += float(sums[i]) * scale;
}

void divide(float* out, int64_t total, int n) {
    const float by = float(total) * (1.f / ONE);
    for (int i = 0; i < n; i++) out[i] /= by;
}

constexpr AttentionKernels ATTENTION = {
    TEXT(SHOAL_VARIANT), ROWS,      products, pack_keys, pack_values, score,
    highest,             weigh,     weight_of, encode,   add,         divide,
};

}  // namespace

const AttentionKernels* JOIN(attention_, SHOAL_VARIANT)() { return &ATTENTION; }

}  // namespace shoal
