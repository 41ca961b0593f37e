// The C interface: see shoal.h. No exception crosses it.

#include "shoal.h"

#include "linear.h"
#include "pool.h"

#include <cstring>
#include <new>
#include <vector>

using namespace shoal;

namespace {

template <class Pack>
shoal_linear* packed(Pack pack) {
    try {
        return static_cast<shoal_linear*>(pack().release());
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

Codes& this_threads_codes() {
    static thread_local Codes codes;
    return codes;
}

}  // namespace

void shoal_set_threads(int threads) { set_threads(threads); }
int shoal_threads(void) { return threads(); }
void shoal_set_spin_us(int microseconds) { set_spin_us(microseconds); }

shoal_linear* shoal_linear8(const int8_t* w, const float* ws, const float* bias, int N, int K) {
    return packed([&] { return pack8(w, ws, bias, N, K); });
}

shoal_linear* shoal_linear4(const uint8_t* codes, const int8_t lut[16], const uint8_t* m,
                            const float* ws, const float* bias, int N, int K) {
    return packed([&] { return pack4(codes, lut, m, ws, bias, N, K); });
}

shoal_linear* shoal_linear16(const float* w, const float* bias, int N, int K) {
    return packed([&] { return pack16(w, bias, N, K); });
}

void shoal_linear_free(shoal_linear* linear) { delete linear; }

int64_t shoal_linear_bytes(const shoal_linear* linear) { return int64_t(linear->bytes()); }

void shoal_quantise(const float* x, int M, int K, uint8_t* codes, float* scale) {
    parallel(M, [&](int m) {
        scale[m] = kernels().quantise(x + size_t(m) * K, K, codes + size_t(m) * K);
    });
}

void shoal_linear_run(const shoal_linear* linear, const float* x, int M, float* y) {
    Codes& codes = this_threads_codes();
    quantise_for(*linear, x, M, codes);
    run(*linear, codes, y, size_t(linear->N));
}

void shoal_linear_run_rows(const shoal_linear* const* experts, int count, const int* row_begin,
                           const float* x, float* y) {
    if (count <= 0) return;
    const int begin = row_begin[0], M = row_begin[count] - begin;
    const size_t N = size_t(experts[0]->N), K = size_t(experts[0]->K);
    Codes& codes = this_threads_codes();
    quantise_for(*experts[0], x + size_t(begin) * K, M, codes);
    std::vector<Task> tasks;
    for (int e = 0; e < count; e++)
        if (row_begin[e + 1] > row_begin[e])
            tasks.push_back({experts[e], &codes, row_begin[e] - begin, row_begin[e + 1] - begin,
                             y + size_t(row_begin[e]) * N, N});
    run(tasks.data(), int(tasks.size()));
}
