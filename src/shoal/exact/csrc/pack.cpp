// Weights into panels; see kernels.h for the layout.

#include "linear.h"
#include "pool.h"
#include "shoal.h"

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

// Padded weights take the table's smallest value; their codes are zero, and `offset` counts them.
int smallest(const int8_t* lut) {
    int best = 0;
    for (int i = 1; i < 16; i++)
        if (std::abs(lut[i]) < std::abs(lut[best])) best = i;
    return best;
}

struct Row4 {
    const uint8_t* codes;        // K, or nullptr for a padded row
    const uint8_t* multipliers;  // K / 32, rounded up
};

// One group of 32 inputs of one output. False where a value is out of range.
bool pack4_group(Linear& linear, int n, int group, Row4 row, uint8_t padding, int32_t& sum) {
    const size_t panel = size_t(n / PANEL), groups = size_t(linear.inputs / GROUP);
    const uint8_t m = row.codes ? row.multipliers[group] : 1;
    linear.multipliers.as<uint8_t>()[(panel * groups + group) * PANEL + n % PANEL] = m;
    uint8_t* to = linear.weights.as<uint8_t>() + panel * PANEL * linear.inputs / 2;
    to += group * (GROUP * PANEL / 2) + n % PANEL * 4;
    bool good = m >= 1;
    for (int i = 0; i < GROUP; i++) {
        const int k = group * GROUP + i;
        const uint8_t code = row.codes && k < linear.K ? row.codes[k] : padding;
        const int value = linear.lut[code & 15] * m;
        good &= code < 16 && value >= -127 && value <= 127;
        to[i / 8 * (4 * PANEL) + i % 4] |= uint8_t((code & 15) << (i / 4 % 2 * 4));
        sum += value;
    }
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
    const uint8_t padding = uint8_t(smallest(lut));
    std::atomic<bool> good{true};
    parallel(linear->panels(), [&](int panel) {
        for (int n = panel * PANEL; n < (panel + 1) * PANEL; n++) {
            Row4 row{nullptr, nullptr};
            if (n < N) row = {codes + size_t(n) * K, m + size_t(n) * groups};
            int32_t sum = 0;
            for (int group = 0; group < groups; group++)
                if (!pack4_group(*linear, n, group, row, padding, sum)) good = false;
            linear->offset.as<int32_t>()[n] = 128 * sum;
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
