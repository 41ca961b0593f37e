// Persistent threads that share the chunks of one loop at a time.

#pragma once
#include <type_traits>

namespace shoal {

// Calls work(context, chunk) for every chunk in 0 .. chunks - 1, on any thread, in any order.
// The caller works too. Returns when all are done. Inside a chunk it runs on that thread alone.
void parallel_call(int chunks, void (*work)(void*, int), void* context);

// parallel(chunks, [&](int chunk) { ... })
template <class F>
void parallel(int chunks, F&& f) {
    using Function = std::remove_reference_t<F>;
    parallel_call(
        chunks, [](void* function, int chunk) { (*static_cast<Function*>(function))(chunk); }, &f);
}

void set_threads(int threads);
int threads();
void set_spin_us(int microseconds);

}  // namespace shoal
