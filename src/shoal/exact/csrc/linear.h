// Packed linears and quantised rows, for C++ callers that use one quantisation for several linears.
//
//     Codes codes;
//     quantise_rows(x, M, K, codes);
//     const Task tasks[] = {{q, &codes, 0, M, yq, ldq}, {k, &codes, 0, M, yk, ldk}};
//     run(tasks, 2);                      one phase on the pool for both

#pragma once
#include "kernels.h"

#include <cstddef>
#include <cstdint>
#include <memory>

namespace shoal {

// Zeroed memory at a cache line, in huge pages where that helps. Moves, never copies.
class Bytes {
  public:
    Bytes() = default;
    explicit Bytes(size_t size);  // throws std::bad_alloc
    Bytes(Bytes&& other) noexcept { swap(other); }
    Bytes& operator=(Bytes&& other) noexcept { return swap(other), *this; }
    ~Bytes();

    void reserve(size_t size) {  // contents are lost
        if (size > size_) *this = Bytes(size + size / 4);
    }
    template <class T>
    T* as() const {
        return reinterpret_cast<T*>(data_);
    }
    size_t size() const { return size_; }

  private:
    void swap(Bytes& other) {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
    }
    char* data_ = nullptr;
    size_t size_ = 0;
};

enum class Kind { w8, w4, w16 };

struct Linear {
    virtual ~Linear() = default;  // made as shoal_linear

    Kind kind;
    int N, K;
    int inputs;        // K, padded to GROUP (w16: BLOCK16)
    Bytes weights;     // panels (w16: rows)
    Bytes multipliers; // w4: panels of (groups, 32) bytes
    Bytes offset;      // int32 (N padded): 128 * sum of the row's weights
    Bytes scale;       // float (N padded)
    Bytes bias;        // float (N padded), or empty
    int8_t lut[16];

    int panels() const { return (N + PANEL - 1) / PANEL; }
    const float* bias_or_null() const { return bias.size() ? bias.as<float>() : nullptr; }
    const int8_t* panel8(int panel) const {
        return weights.as<int8_t>() + size_t(panel) * PANEL * inputs;
    }
    Panel4 panel4(int panel) const {
        return {weights.as<uint8_t>() + size_t(panel) * PANEL * inputs / 2,
                multipliers.as<uint8_t>() + size_t(panel) * inputs / GROUP * PANEL, lut};
    }
    size_t bytes() const {
        return weights.size() + multipliers.size() + offset.size() + scale.size() + bias.size();
    }
};

// nullptr where shoal.h says so; arguments as there.
std::unique_ptr<Linear> pack8(const int8_t* w, const float* ws, const float* bias, int N, int K);
std::unique_ptr<Linear> pack4(const uint8_t* codes, const int8_t lut[16], const uint8_t* m,
                              const float* ws, const float* bias, int N, int K);
std::unique_ptr<Linear> pack16(const float* w, const float* bias, int N, int K);

// Rows rounded for int8 and 4-bit linears (uint8 codes) or for 12-bit ones (int16 codes).
struct Codes {
    int M = 0, K = 0;
    size_t stride = 0;  // bytes from row to row; padded inputs hold the code of zero
    Bytes codes, scale;

    const uint8_t* row(int m) const { return codes.as<uint8_t>() + size_t(m) * stride; }
    float row_scale(int m) const { return scale.as<float>()[m]; }
};

void quantise_rows(const float* x, int M, int K, Codes& codes);
void quantise_rows16(const float* x, int M, int K, Codes& codes);

// Rows begin .. end of the codes go through one linear; row m is written to y + (m - begin) * ldy.
struct Task {
    const Linear* linear;
    const Codes* codes;
    int begin, end;
    float* y;
    size_t ldy;
};

// All tasks in one phase. Each task's codes have to be of the linear's kind and K.
void run(const Task* tasks, int count);

inline void run(const Linear& linear, const Codes& codes, float* y, size_t ldy) {
    const Task task = {&linear, &codes, 0, codes.M, y, ldy};
    run(&task, 1);
}

// Quantises for the linear's kind.
void quantise_for(const Linear& linear, const float* x, int M, Codes& codes);

}  // namespace shoal

struct shoal_linear : shoal::Linear {};
