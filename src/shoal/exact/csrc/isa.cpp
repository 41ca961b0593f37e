// Chooses the variant that this processor can run.

#include "kernels.h"
#include "shoal.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace shoal {
namespace {

#if defined(__x86_64__) || defined(__i386__)

struct Leaf {
    unsigned a = 0, b = 0, c = 0, d = 0;
    Leaf(unsigned number, unsigned sub) { __get_cpuid_count(number, sub, &a, &b, &c, &d); }
};

bool bit(unsigned word, int number) { return word >> number & 1; }

// The registers that the operating system saves: 6 for AVX, 0xe6 for AVX-512.
bool saved(unsigned wanted) {
    if (!bit(Leaf(1, 0).c, 27)) return false;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & wanted) == wanted;
}

bool has_sse41() { return bit(Leaf(1, 0).c, 19) && bit(Leaf(1, 0).c, 9); }
bool has_avx2() { return saved(6) && bit(Leaf(7, 0).b, 5); }
bool has_avxvnni() { return has_avx2() && bit(Leaf(7, 1).a, 4); }
bool has_avx512vnni() {
    const Leaf leaf(7, 0);
    const bool foundation = bit(leaf.b, 16) && bit(leaf.b, 17) && bit(leaf.b, 30) && bit(leaf.b, 31);
    return saved(0xe6) && has_avx2() && foundation && bit(leaf.c, 11);
}

#elif defined(__aarch64__)

bool has_neondot() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1;
#else
    return true;  // every 64-bit Apple computer
#endif
}

#endif

bool always() { return true; }

struct Variant {
    const Kernels* (*kernels)();
    bool (*runs_here)();
};

const Variant VARIANTS[] = {  // fastest first; build.py says which were built
#ifdef SHOAL_HAS_avx512vnni
    {kernels_avx512vnni, has_avx512vnni},
#endif
#ifdef SHOAL_HAS_avxvnni
    {kernels_avxvnni, has_avxvnni},
#endif
#ifdef SHOAL_HAS_avx2
    {kernels_avx2, has_avx2},
#endif
#ifdef SHOAL_HAS_sse41
    {kernels_sse41, has_sse41},
#endif
#ifdef SHOAL_HAS_neondot
    {kernels_neondot, has_neondot},
#endif
#ifdef SHOAL_HAS_neon
    {kernels_neon, always},
#endif
    {kernels_generic, always},
};

std::atomic<const Kernels*> chosen{nullptr};

const Kernels* find(const char* name) {
    for (const Variant& variant : VARIANTS)
        if (variant.runs_here() && (!name || !strcmp(variant.kernels()->name, name)))
            return variant.kernels();
    return nullptr;
}

}  // namespace

const Kernels& kernels() {
    if (const Kernels* known = chosen.load(std::memory_order_acquire)) return *known;
    const char* wish = getenv("SHOAL_ISA");
    const Kernels* found = wish ? find(wish) : nullptr;
    if (!found) found = find(nullptr);
    chosen.store(found, std::memory_order_release);
    return *found;
}

}  // namespace shoal

const char* shoal_fingerprint(void) { return SHOAL_FINGERPRINT; }

const char* shoal_isa(void) { return shoal::kernels().name; }

int shoal_set_isa(const char* name) {
    const shoal::Kernels* found = shoal::find(name);
    if (found) shoal::chosen.store(found, std::memory_order_release);
    return found != nullptr;
}
