// Weights into panels; see kernels.h for the layout.

#include "linear.h"
#include "pool.h"
#include "shoal.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace shoal {

constexpr size_t HUGE_PAGE = size_t(2) << 20;

Bytes::Bytes(size_t size) {
    const size_t align = size >= 2 * HUGE_PAGE ? HUGE_PAGE : 64;
    size_ = (size + align - 1) / align * align;
    if (!size_) return;
    data_ = static_cast<char*>(std::aligned_alloc(align, size_));
    if (!data_) throw std::bad_alloc();
#if defined(__linux__)
    if (align == HUGE_PAGE) madvise(data_, size_, MADV_HUGEPAGE);
#endif
    memset(data_, 0, size_);
}

Bytes::~Bytes() { std::free(data_); }

namespace {

int rounded_up(int value, int step) { return (value + step - 1) / step * step; }

Bytes copied(const float* from, int count, int padded) {
    if (!from) return {};
    Bytes bytes(size_t(padded) * sizeof(float));
    memcpy(bytes.as<float>(), from, size_t(count) * sizeof(float));
    return bytes;
}

std::unique_ptr<Linear> blank(Kind kind, int N, int K, const float* ws, const float* bias) {
    if (N <= 0 || K <= 0 || K > SHOAL_LARGEST_K) return nullptr;
    auto linear = std::make_unique<shoal_linear>();
    linear->kind = kind;
    linear->N = N;
    linear->K = K;
    linear->inputs = rounded_up(K, kind == Kind::w16 ? BLOCK16 : GROUP);
    const int padded = rounded_up(N, PANEL);
    linear->scale = copied(ws, N, padded);
    linear->bias = copied(bias, N, padded);
    linear->offset = Bytes(size_t(padded) * sizeof(int32_t));
    return linear;
}

void pack8_row(Linear& linear, int n, const int8_t* row) {
    int8_t* to = linear.weights.as<int8_t>() + size_t(n / PANEL) * PANEL * linear.inputs;
    to += n % PANEL * 4;
    int32_t sum = 0;
    for (int k = 0; k < linear.K; k++) sum += row[k];
    linear.offset.as<int32_t>()[n] = 128 * sum;
    int k = 0;
    for (; k + 4 <= linear.K; k += 4) memcpy(to + k * PANEL, row + k, 4);
    if (k < linear.K) memcpy(to + k * PANEL, row + k, size_t(linear.K - k));
}

struct Table {
    const int8_t* values;
    int largest;      // of all 16, without sign
    uint8_t padding;  // the code of the smallest: padded codes are zero, and `offset` counts them

    explicit Table(const int8_t* lut) : values(lut), largest(0), padding(0) {
        for (int i = 0; i < 16; i++) {
            largest = std::max(largest, std::abs(lut[i]));
            if (std::abs(lut[i]) < std::abs(lut[padding])) padding = uint8_t(i);
        }
    }
    bool fits(const uint8_t* codes, int m) const {
        if (largest * m <= 127) return true;
        int used = 0;
        for (int i = 0; i < GROUP; i++) used = std::max(used, std::abs(values[codes[i]]));
        return used * m <= 127;
    }
};

// One group of one output, its codes filled up with `padding`. False if a value is out of range.
bool pack4_group(const Table& table, const uint8_t* codes, int m, uint8_t* to, int32_t& sum) {
    uint32_t bits = 0;
    for (int i = 0; i < GROUP; i += 4) {
        uint32_t four;
        memcpy(&four, codes + i, 4);
        bits |= four;
    }
    if (bits & 0xf0f0f0f0u || m < 1) return false;
    for (int pair = 0; pair < GROUP / 8; pair++) {
        uint32_t even, odd;
        memcpy(&even, codes + pair * 8, 4);
        memcpy(&odd, codes + pair * 8 + 4, 4);
        even |= odd << 4;
        memcpy(to + pair * 4 * PANEL, &even, 4);
    }
    int total = 0;
    for (int i = 0; i < GROUP; i++) total += table.values[codes[i]];
    sum += total * m;
    return table.fits(codes, m);
}

// Output n; codes and multipliers are nullptr for those that only fill the last panel.
bool pack4_row(Linear& linear, int n, const uint8_t* codes, const uint8_t* m, const Table& table) {
    const Panel4 panel = linear.panel4(n / PANEL);
    auto* nibbles = const_cast<uint8_t*>(panel.nibbles) + n % PANEL * 4;
    auto* multipliers = const_cast<uint8_t*>(panel.multipliers) + n % PANEL;
    uint8_t filled[GROUP];
    bool good = true;
    int32_t sum = 0;
    for (int k = 0; k < linear.inputs; k += GROUP) {
        const uint8_t* group = filled;
        if (codes && k + GROUP <= linear.K) {
            group = codes + k;
        } else {
            memset(filled, table.padding, GROUP);
            if (codes) memcpy(filled, codes + k, size_t(linear.K - k));
        }
        multipliers[k] = codes ? m[k / GROUP] : 1;
        good &= pack4_group(table, group, multipliers[k], nibbles + k * PANEL / 2, sum);
    }
    linear.offset.as<int32_t>()[n] = 128 * sum;
    return good;
}

}  // namespace

std::unique_ptr<Linear> pack8(const int8_t* w, const float* ws, const float* bias, int N, int K) {
    auto linear = blank(Kind::w8, N, K, ws, bias);
    if (!linear) return nullptr;
    linear->weights = Bytes(size_t(linear->panels()) * PANEL * linear->inputs);
    parallel(linear->panels(), [&](int panel) {
        for (int n = panel * PANEL; n < (panel + 1) * PANEL && n < N; n++)
            pack8_row(*linear, n, w + size_t(n) * K);
    });
    return linear;
}

std::unique_ptr<Linear> pack4(const uint8_t* codes, const int8_t lut[16], const uint8_t* m,
                              const float* ws, const float* bias, int N, int K) {
    auto linear = blank(Kind::w4, N, K, ws, bias);
    if (!linear) return nullptr;
    memcpy(linear->lut, lut, 16);
    const int groups = linear->inputs / GROUP;
    linear->weights = Bytes(size_t(linear->panels()) * PANEL * linear->inputs / 2);
    linear->multipliers = Bytes(size_t(linear->panels()) * PANEL * groups);
    const Table table(linear->lut);
    std::atomic<bool> good{true};
    parallel(linear->panels(), [&](int panel) {
        for (int n = panel * PANEL; n < (panel + 1) * PANEL; n++) {
            const bool real = n < N;
            const uint8_t* row = real ? codes + size_t(n) * K : nullptr;
            const uint8_t* row_m = real ? m + size_t(n) * groups : nullptr;
            if (!pack4_row(*linear, n, row, row_m, table)) good = false;
        }
    });
    return good ? std::move(linear) : nullptr;
}

std::unique_ptr<Linear> pack16(const float* w, const float* bias, int N, int K) {
    auto linear = blank(Kind::w16, N, K, nullptr, bias);
    if (!linear) return nullptr;
    linear->weights = Bytes(size_t(N) * linear->inputs * sizeof(int16_t));
    linear->scale = Bytes(size_t(N) * sizeof(float));
    parallel(N, [&](int n) {
        int16_t* to = linear->weights.as<int16_t>() + size_t(n) * linear->inputs;
        linear->scale.as<float>()[n] = kernels().quantise16(w + size_t(n) * K, K, to);
    });
    return linear;
}

}  // namespace shoal
