// Finds the kernels of attention and of rows that belong to the variant in use (see isa.cpp).

#include "attention.h"
#include "elementwise.h"
#include "kernels.h"

#include <string.h>

namespace shoal {
namespace {

using GetElementwise = const Elementwise* (*)();
using GetAttention = const AttentionKernels* (*)();

constexpr GetElementwise ELEMENTWISE[] = {
#ifdef SHOAL_HAS_avx512vnni
    elementwise_avx512vnni,
#endif
#ifdef SHOAL_HAS_avxvnni
    elementwise_avxvnni,
#endif
#ifdef SHOAL_HAS_avx2
    elementwise_avx2,
#endif
#ifdef SHOAL_HAS_sse41
    elementwise_sse41,
#endif
#ifdef SHOAL_HAS_neondot
    elementwise_neondot,
#endif
#ifdef SHOAL_HAS_neon
    elementwise_neon,
#endif
    elementwise_generic,
};

constexpr GetAttention ATTENTION[] = {
#ifdef SHOAL_HAS_avx512vnni
    attention_avx512vnni,
#endif
#ifdef SHOAL_HAS_avxvnni
    attention_avxvnni,
#endif
#ifdef SHOAL_HAS_avx2
    attention_avx2,
#endif
#ifdef SHOAL_HAS_sse41
    attention_sse41,
#endif
#ifdef SHOAL_HAS_neondot
    attention_neondot,
#endif
#ifdef SHOAL_HAS_neon
    attention_neon,
#endif
    attention_generic,
};

// The table ends with the plain kernels, which every processor runs.
template <class Kernel, size_t N>
const Kernel& named(const Kernel* (*const (&table)[N])()) {
    size_t at = 0;
    while (at + 1 < N && strcmp(table[at]()->name, kernels().name) != 0) at++;
    return *table[at]();
}

}  // namespace

const Elementwise& elementwise() { return named(ELEMENTWISE); }

const AttentionKernels& attention_kernels() { return named(ATTENTION); }

}  // namespace shoal
