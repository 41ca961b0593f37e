// The inner loops of the linears. Compiled once per variant (SHOAL_VARIANT) with its flags; nothing
// here may come from a shared inline function, or the linker could pick one for another processor.

#include "kernels.h"
#include "lanes.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

namespace shoal {
namespace {

constexpr int STEP = 4 * PANEL;  // bytes of one step of a panel
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

// R rows times V vectors of outputs, beginning at vector `first`. All sums stay in registers.
template <int R, int V>
void some8(Rows rows, const int8_t* panel, int inputs, int first, const int32_t* offset,
           int32_t* out) {
    typename Lanes::Sums sums[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sums[r][v] = Lanes::zero();
    const uint8_t* codes[R];
    for (int r = 0; r < R; r++) codes[r] = rows.codes + size_t(r) * rows.stride;
    const int8_t* from = panel + first * Lanes::OUTPUTS * 4;
    for (int k = 0; k < inputs; k += 4, from += STEP) {
        typename Lanes::Weights w[V];
        for (int v = 0; v < V; v++) w[v] = Lanes::load(from + v * Lanes::OUTPUTS * 4);
        if (R <= 2) {
            __builtin_prefetch(from + 8192);
            __builtin_prefetch(from + 8192 + 64);
        }
        for (int r = 0; r < R; r++) {
            const auto a = Lanes::spread(codes[r] + k);
            for (int v = 0; v < V; v++) sums[r][v] = Lanes::dot(sums[r][v], a, w[v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) {
            const int at = (first + v) * Lanes::OUTPUTS;
            if (!Lanes::SIGNED) sums[r][v] = Lanes::subtract(sums[r][v], Lanes::load(offset + at));
            Lanes::store(out + r * PANEL + at, sums[r][v]);
        }
}

constexpr int VECTORS = PANEL / Lanes::OUTPUTS;

// One row streams whole panels; more rows take as many vectors as the registers hold.
template <int R>
void rows8(Rows rows, const int8_t* panel, int inputs, const int32_t* offset, int32_t* out) {
    constexpr int V = R <= 2 || VECTORS == 2 ? VECTORS : VECTORS == 4 ? 2 : 4;
    for (int v = 0; v < VECTORS; v += V) some8<R, V>(rows, panel, inputs, v, offset, out);
}

template <int R>
void rows4(Rows rows, Panel4 panel, int inputs, const int32_t* offset, int32_t* out) {
    constexpr int V = VECTORS;
    const auto table = Lanes::table(panel.lut);
    typename Lanes::Sums total[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) total[r][v] = Lanes::zero();
    const uint8_t* nibbles = panel.nibbles;
    for (int group = 0; group < inputs; group += GROUP) {
        typename Lanes::Sums sums[R][V];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sums[r][v] = Lanes::zero();
        for (int k = group; k < group + GROUP; k += 8, nibbles += STEP) {
            __builtin_prefetch(nibbles + 4096);
            __builtin_prefetch(nibbles + 4096 + 64);
            typename Lanes::Weights even[V], odd[V];
            for (int v = 0; v < V; v++) {
                const auto both = Lanes::load(nibbles + v * Lanes::OUTPUTS * 4);
                even[v] = Lanes::low(table, both);
                odd[v] = Lanes::high(table, both);
            }
            for (int r = 0; r < R; r++) {
                const uint8_t* codes = rows.codes + size_t(r) * rows.stride + k;
                const auto a = Lanes::spread(codes), b = Lanes::spread(codes + 4);
                for (int v = 0; v < V; v++) sums[r][v] = Lanes::dot(sums[r][v], a, even[v]);
                for (int v = 0; v < V; v++) sums[r][v] = Lanes::dot(sums[r][v], b, odd[v]);
            }
        }
        for (int v = 0; v < V; v++) {
            const auto m = Lanes::widen(panel.multipliers + group + v * Lanes::OUTPUTS);
            for (int r = 0; r < R; r++)
                total[r][v] = Lanes::add(total[r][v], Lanes::times(sums[r][v], m));
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) {
            const int at = v * Lanes::OUTPUTS;
            if (!Lanes::SIGNED)
                total[r][v] = Lanes::subtract(total[r][v], Lanes::load(offset + at));
            Lanes::store(out + r * PANEL + at, total[r][v]);
        }
}

void unpack4(Panel4 panel, int inputs, int8_t* out) {
    const auto table = Lanes::table(panel.lut);
    for (int v = 0; v < VECTORS; v++) {
        const int at = v * Lanes::OUTPUTS;
        const uint8_t* nibbles = panel.nibbles + at * 4;
        int8_t* to = out + at * 4;
        for (int group = 0; group < inputs; group += GROUP) {
            const auto m = Lanes::pairs(Lanes::widen(panel.multipliers + group + at));
            for (int k = 0; k < GROUP; k += 8, nibbles += STEP, to += 2 * STEP) {
                const auto both = Lanes::load(nibbles);
                Lanes::store(to, Lanes::times_bytes(Lanes::low(table, both), m));
                Lanes::store(to + STEP, Lanes::times_bytes(Lanes::high(table, both), m));
            }
        }
    }
}

template <int R>
void tile8_of(Rows rows, const int8_t* panel, int inputs, const int32_t* offset, int32_t* sums) {
    if constexpr (R > 0) {
        if (rows.count < R) return tile8_of<R - 1>(rows, panel, inputs, offset, sums);
        rows8<R>(rows, panel, inputs, offset, sums);
    }
}

template <int R>
void tile4_of(Rows rows, Panel4 panel, int inputs, const int32_t* offset, int32_t* sums) {
    if constexpr (R > 0) {
        if (rows.count < R) return tile4_of<R - 1>(rows, panel, inputs, offset, sums);
        rows4<R>(rows, panel, inputs, offset, sums);
    }
}

constexpr auto tile8 = tile8_of<Lanes::ROWS8>;
constexpr auto tile4 = tile4_of<Lanes::ROWS4>;

#else

// Weights of one step are spread over int16 once for all rows; the loops over j are the vectors.
void tile8(Rows rows, const int8_t* panel, int inputs, const int32_t*, int32_t* sums) {
    int32_t total[Lanes::ROWS8][PANEL] = {};
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

constexpr void (*tile4)(Rows, Panel4, int, const int32_t*, int32_t*) = nullptr;

#endif

constexpr Kernels KERNELS = {
    TEXT(SHOAL_VARIANT), Lanes::ROWS8, Lanes::ROWS4, quantise, quantise16,
    tile8,               tile4,        unpack4,      dot16,    finish,
};

}  // namespace

const Kernels* JOIN(kernels_, SHOAL_VARIANT)() { return &KERNELS; }

}  // namespace shoal
