// The inner loops of the linears. Compiled once per variant (SHOAL_VARIANT) with its flags; nothing
// here may come from a shared inline function, or the linker could pick one for another processor.

#include "kernels.h"
#include "lanes.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

#define INLINED __attribute__((always_inline))
#define INLINE inline INLINED

namespace shoal {
namespace {

constexpr int STEP = 4 * PANEL;  // bytes of one step of a panel
constexpr int AHEAD8 = 512 * PANEL;  // prefetched while used: the next block of inputs, into L2
constexpr uint32_t INFINITY_BITS = 0x7f800000, TINIEST_BITS = 0x2b8cbccc;  // 1e-12f

float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// Bits of max(max|x|, 1e-12f): floats without their sign order like integers, NaN above all.
uint32_t largest_bits(const float* x, int K) {
    int32_t largest = int32_t(TINIEST_BITS);
    for (int k = 0; k < K; k++) {
        const int32_t bits = four_bytes(x + k) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return uint32_t(largest);
}

float quantise(const float* __restrict x, int K, uint8_t* __restrict codes) {
    const uint32_t largest = largest_bits(x, K);
    if (largest >= INFINITY_BITS) {
        memset(codes, 128, size_t(K));
        return as_float(INFINITY_BITS | 0x400000);
    }
    const float scale = as_float(largest) / 127.f;
    for (int k = 0; k < K; k++) codes[k] = uint8_t(int32_t(x[k] / scale + 128.5f));
    return scale;
}

float quantise16(const float* __restrict x, int K, int16_t* __restrict codes) {
    const uint32_t largest = largest_bits(x, K);
    if (largest >= INFINITY_BITS) {
        memset(codes, 0, size_t(K) * 2);
        return as_float(INFINITY_BITS | 0x400000);
    }
    const float scale = as_float(largest) / 2047.f;
    const float rounder = 12582912.f;  // 1.5 * 2**23: adding it leaves no bits after the point
    for (int k = 0; k < K; k++) codes[k] = int16_t(int32_t((x[k] / scale + rounder) - rounder));
    return scale;
}

int64_t dot16(const int16_t* a, const int16_t* b, int inputs) {
    int64_t total = 0;
    for (int begin = 0; begin < inputs; begin += BLOCK16) {
        int32_t sum = 0;
        for (int k = begin; k < begin + BLOCK16; k++) sum += int32_t(a[k]) * int32_t(b[k]);
        total += sum;
    }
    return total;
}

void finish(const int32_t* __restrict sums, const float* __restrict ws,
            const float* __restrict bias, float s, int n, float* __restrict y) {
    if (bias) {
        for (int i = 0; i < n; i++) y[i] = float(sums[i]) * ws[i] * s + bias[i];
    } else {
        for (int i = 0; i < n; i++) y[i] = float(sums[i]) * ws[i] * s;
    }
}

#if !defined(SHOAL_NO_LANES)

// each<N>(f) is f(0), f(1) .. f(N - 1), with the numbers known when compiling: loops over an array of
// sums would leave the sums in memory (GCC 12), this leaves them in registers.
template <int I>
struct Constant {
    constexpr operator int() const { return I; }
};

template <int N, class F>
INLINE void each(F f) {
    if constexpr (N > 0) {
        each<N - 1>(f);
        f(Constant<N - 1>());
    }
}

INLINE void prefetch_step(const void* from) {
    __builtin_prefetch(from, 0, 2);
    __builtin_prefetch(static_cast<const char*>(from) + 64, 0, 2);
}

template <int R, int V>
INLINE void load_sums(Lanes::Sums (&sums)[R][V], const int32_t* from) {
    each<R * V>([&](auto i) INLINED {
        sums[i / V][i % V] = Lanes::load_sums(from + i / V * PANEL + i % V * Lanes::OUTPUTS);
    });
}

template <int R, int V>
INLINE void store_sums(const Lanes::Sums (&sums)[R][V], int32_t* to) {
    each<R * V>([&](auto i) INLINED {
        Lanes::store(to + i / V * PANEL + i % V * Lanes::OUTPUTS, sums[i / V][i % V]);
    });
}

// R rows times V vectors of outputs, beginning at vector `first`. All sums stay in registers.
template <int R, int V>
void some8(Rows rows, const int8_t* panel, int inputs, int first, int32_t* out) {
    out += first * Lanes::OUTPUTS;
    Lanes::Sums sums[R][V];
    load_sums(sums, out);
    const uint8_t* codes[R];
    each<R>([&](auto r) INLINED { codes[r] = rows.codes + r * rows.stride; });
    const int8_t* from = panel + first * Lanes::OUTPUTS * 4;
    for (ptrdiff_t k = 0; k < inputs; k += 4, from += STEP) {
        prefetch_step(from + AHEAD8);
        Lanes::Weights w[V];
        each<V>([&](auto v) INLINED { w[v] = Lanes::load(from + v * Lanes::OUTPUTS * 4); });
        each<R>([&](auto r) INLINED {
            const auto a = Lanes::spread(codes[r] + k);
            each<V>([&](auto v) INLINED { sums[r][v] = Lanes::dot(sums[r][v], a, w[v]); });
        });
    }
    store_sums(sums, out);
}

constexpr int VECTORS = PANEL / Lanes::OUTPUTS;

// How many vectors wide a tile of sums may be to stay in the registers.
constexpr int width(int rows) {
    int vectors = VECTORS;
    while (vectors > 1 && rows * vectors > Lanes::SUMS) vectors /= 2;
    return vectors;
}

template <int R>
void rows8(Rows rows, const int8_t* panel, int inputs, int32_t* sums) {
    constexpr int V = width(R);
    for (int v = 0; v < VECTORS; v += V) some8<R, V>(rows, panel, inputs, v, sums);
}

// Groups are summed on their own and multiplied as a whole. Where there are not registers enough
// for both, the totals stay in memory: wide tiles are worth more.
template <int R, int V>
void some4(Rows rows, Panel4 panel, int inputs, int first, int32_t* out) {
    out += first * Lanes::OUTPUTS;
    const auto table = Lanes::table(panel.lut);
    constexpr bool RESIDENT = 2 * R * V <= Lanes::SUMS;
    Lanes::Sums total[R][V];
    const uint8_t* codes[R];
    each<R>([&](auto r) INLINED { codes[r] = rows.codes + r * rows.stride; });
    if constexpr (RESIDENT) load_sums(total, out);
    const uint8_t* nibbles = panel.nibbles + first * Lanes::OUTPUTS * 4;
    const uint8_t* multipliers = panel.multipliers + first * Lanes::OUTPUTS;
    for (ptrdiff_t group = 0; group < inputs; group += GROUP) {
        Lanes::Sums sums[R][V];
        each<R * V>([&](auto i) INLINED { sums[i / V][i % V] = Lanes::zero(); });
        for (ptrdiff_t k = group; k < group + GROUP; k += 8, nibbles += STEP) {
            prefetch_step(nibbles + AHEAD8 / 2);
            Lanes::Weights even[V], odd[V];
            each<V>([&](auto v) INLINED {
                const auto both = Lanes::load(nibbles + v * Lanes::OUTPUTS * 4);
                even[v] = Lanes::low(table, both);
                odd[v] = Lanes::high(table, both);
            });
            each<R>([&](auto r) INLINED {
                const auto a = Lanes::spread(codes[r] + k), b = Lanes::spread(codes[r] + k + 4);
                each<V>([&](auto v) INLINED { sums[r][v] = Lanes::dot(sums[r][v], a, even[v]); });
                each<V>([&](auto v) INLINED { sums[r][v] = Lanes::dot(sums[r][v], b, odd[v]); });
            });
        }
        each<V>([&](auto v) INLINED {
            const auto m = Lanes::widen(multipliers + group + v * Lanes::OUTPUTS);
            each<R>([&](auto r) INLINED {
                const auto more = Lanes::times(sums[r][v], m);
                if constexpr (RESIDENT) {
                    total[r][v] = Lanes::add(total[r][v], more);
                } else {
                    int32_t* at = out + r * PANEL + v * Lanes::OUTPUTS;
                    Lanes::store(at, Lanes::add(Lanes::load_sums(at), more));
                }
            });
        });
    }
    if constexpr (RESIDENT) store_sums(total, out);
}

template <int R>
void rows4(Rows rows, Panel4 panel, int inputs, int32_t* sums) {
    constexpr int V = width(R);
    for (int v = 0; v < VECTORS; v += V) some4<R, V>(rows, panel, inputs, v, sums);
}

void unpack4(Panel4 panel, int inputs, int8_t* out) {
    const auto table = Lanes::table(panel.lut);
    const uint8_t* nibbles = panel.nibbles;
    for (ptrdiff_t group = 0; group < inputs; group += GROUP) {
        Lanes::Weights m[VECTORS];
        each<VECTORS>([&](auto v) INLINED {
            m[v] = Lanes::pairs(Lanes::widen(panel.multipliers + group + v * Lanes::OUTPUTS));
        });
        for (int k = 0; k < GROUP; k += 8, nibbles += STEP, out += 2 * STEP) {
            prefetch_step(nibbles + AHEAD8 / 2);
            each<VECTORS>([&](auto v) INLINED {
                constexpr int at = decltype(v)() * Lanes::OUTPUTS * 4;
                const auto both = Lanes::load(nibbles + at);
                Lanes::store(out + at, Lanes::times_bytes(Lanes::low(table, both), m[v]));
                Lanes::store(out + STEP + at, Lanes::times_bytes(Lanes::high(table, both), m[v]));
            });
        }
    }
}

template <int R>
void tile8_of(Rows rows, const int8_t* panel, int inputs, int32_t* sums) {
    if constexpr (R > 0) {
        if (rows.count < R) return tile8_of<R - 1>(rows, panel, inputs, sums);
        rows8<R>(rows, panel, inputs, sums);
    }
}

template <int R>
void tile4_of(Rows rows, Panel4 panel, int inputs, int32_t* sums) {
    if constexpr (R > 0) {
        if (rows.count < R) return tile4_of<R - 1>(rows, panel, inputs, sums);
        rows4<R>(rows, panel, inputs, sums);
    }
}

constexpr auto tile8 = tile8_of<Lanes::ROWS8>;
constexpr auto tile4 = tile4_of<Lanes::ROWS4>;

#else

// Weights of one step are spread over int16 once for all rows; the loops over j are the vectors.
void tile8(Rows rows, const int8_t* panel, int inputs, int32_t* sums) {
    int32_t total[Lanes::ROWS8][PANEL];
    memcpy(total, sums, size_t(rows.count) * sizeof total[0]);
    for (int k = 0; k < inputs; k += 4) {
        int16_t w[4][PANEL];
        const int8_t* from = panel + k * PANEL;
        for (int j = 0; j < PANEL; j++)
            for (int i = 0; i < 4; i++) w[i][j] = from[j * 4 + i];
        for (int r = 0; r < rows.count; r++) {
            const uint8_t* codes = rows.codes + size_t(r) * rows.stride + k;
            const int16_t a = int16_t(codes[0] - 128), b = int16_t(codes[1] - 128);
            const int16_t c = int16_t(codes[2] - 128), d = int16_t(codes[3] - 128);
            for (int j = 0; j < PANEL; j++)
                total[r][j] += a * w[0][j] + b * w[1][j] + c * w[2][j] + d * w[3][j];
        }
    }
    memcpy(sums, total, size_t(rows.count) * sizeof total[0]);
}

void unpack4(Panel4 panel, int inputs, int8_t* out) {
    const uint8_t* nibbles = panel.nibbles;
    for (int k = 0; k < inputs; k += 8, nibbles += STEP, out += 2 * STEP) {
        const uint8_t* m = panel.multipliers + k / GROUP * GROUP;
        for (int i = 0; i < STEP; i++) {
            out[i] = int8_t(panel.lut[nibbles[i] & 15] * m[i / 4]);
            out[STEP + i] = int8_t(panel.lut[nibbles[i] >> 4] * m[i / 4]);
        }
    }
}

constexpr void (*tile4)(Rows, Panel4, int, int32_t*) = nullptr;

#endif

constexpr Kernels KERNELS = {
    TEXT(SHOAL_VARIANT), Lanes::SIGNED, Lanes::ROWS8, Lanes::ROWS4, Lanes::DIRECT4, quantise,
    quantise16,          tile8,         tile4,        unpack4,      dot16,          finish,
};

}  // namespace

const Kernels* JOIN(kernels_, SHOAL_VARIANT)() { return &KERNELS; }

}  // namespace shoal
