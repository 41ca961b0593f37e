// One word says everything about the current loop: its number, how many chunks it has, and which
// is next. A chunk is claimed by exchanging that word, so a thread that was away for a while can
// never take a chunk of a loop that it does not know, and nobody waits for a thread without one.

#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace shoal {
namespace {

constexpr int COUNT_BITS = 24;
constexpr uint64_t COUNT_MASK = (uint64_t(1) << COUNT_BITS) - 1;
constexpr int LARGEST_COUNT = int(COUNT_MASK);

using Clock = std::chrono::steady_clock;

std::atomic<int> spin_us{50};
thread_local bool inside = false;

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// True as soon as `ready` is; false after about `microseconds`.
template <class Ready>
bool spin(int microseconds, Ready ready) {
    const auto end = Clock::now() + std::chrono::microseconds(microseconds);
    do {
        for (int i = 0; i < 32; i++) {
            if (ready()) return true;
            relax();
        }
    } while (Clock::now() < end);
    return false;
}

class Pool {
  public:
    explicit Pool(int threads) { start(threads); }

    int threads() const { return int(workers_.size()) + 1; }

    void resize(int threads) {
        std::lock_guard<std::mutex> one_caller(caller_);
        stop();
        start(threads);
    }

    void run(int chunks, void (*work)(void*, int), void* context) {
        std::lock_guard<std::mutex> one_caller(caller_);
        work_ = work;
        context_ = context;
        done_.store(0, std::memory_order_relaxed);
        loop_number_ = (loop_number_ + 1) & 0xffff;
        word_.store(loop_number_ << (2 * COUNT_BITS) | uint64_t(chunks) << COUNT_BITS);
        wake();
        take_chunks();
        const auto finished = [&] { return done_.load(std::memory_order_acquire) == chunks; };
        while (!spin(10, finished)) std::this_thread::yield();
    }

  private:
    static bool has_chunk(uint64_t word) {
        return (word & COUNT_MASK) < (word >> COUNT_BITS & COUNT_MASK);
    }

    void take_chunks() {
        inside = true;
        uint64_t word = word_.load(std::memory_order_acquire);
        while (has_chunk(word)) {
            if (!word_.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel)) continue;
            work_(context_, int(word & COUNT_MASK));  // the loop cannot end before this chunk
            done_.fetch_add(1, std::memory_order_release);
            word = word_.load(std::memory_order_acquire);
        }
        inside = false;
    }

    void wake() {
        if (sleepers_.load() == 0) return;
        { std::lock_guard<std::mutex> lock(sleep_); }
        alarm_.notify_all();
    }

    void work() {
        const auto called = [&] { return has_chunk(word_.load()) || stopping_.load(); };
        while (true) {
            if (!spin(spin_us.load(std::memory_order_relaxed), called)) sleep(called);
            if (stopping_.load()) return;
            take_chunks();
        }
    }

    template <class Called>
    void sleep(Called called) {
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1);  // before looking again: the caller stores the word, then looks here
        alarm_.wait(lock, called);
        sleepers_.fetch_sub(1);
    }

    void start(int threads) {
        stopping_.store(false);
        for (int i = 1; i < threads; i++) workers_.emplace_back([this] { work(); });
    }

    void stop() {
        stopping_.store(true);
        wake();
        for (auto& worker : workers_) worker.join();
        workers_.clear();
    }

    alignas(64) std::atomic<uint64_t> word_{0};
    alignas(64) std::atomic<int> done_{0};
    alignas(64) void (*work_)(void*, int) = nullptr;
    void* context_ = nullptr;
    uint64_t loop_number_ = 0;
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stopping_{false};
    std::mutex caller_, sleep_;
    std::condition_variable alarm_;
    std::vector<std::thread> workers_;
};

std::atomic<Pool*> the_pool{nullptr};  // never destroyed: its threads may outlive main
std::mutex creation;
std::atomic<int> wanted_threads{1};

// A forked child has none of its parent's threads: it forgets the pool and makes its own.
void forget_pool() {
    the_pool.store(nullptr);
    new (&creation) std::mutex;
    inside = false;
}

Pool& pool() {
    if (Pool* existing = the_pool.load(std::memory_order_acquire)) return *existing;
    std::lock_guard<std::mutex> lock(creation);
    if (!the_pool.load()) the_pool.store(new Pool(wanted_threads));
    return *the_pool.load();
}

struct AtStart {
    AtStart() {
        const int cores = int(std::thread::hardware_concurrency());
        wanted_threads = cores > 1 ? cores : 1;
#if defined(__unix__) || defined(__APPLE__)
        pthread_atfork(nullptr, nullptr, forget_pool);
#endif
    }
} at_start;

}  // namespace

void parallel_call(int chunks, void (*work)(void*, int), void* context) {
    if (chunks <= 1 || chunks > LARGEST_COUNT || inside || threads() == 1) {
        for (int chunk = 0; chunk < chunks; chunk++) work(context, chunk);
        return;
    }
    pool().run(chunks, work, context);
}

void set_threads(int threads) {
    wanted_threads = threads > 1 ? threads : 1;
    if (Pool* existing = the_pool.load()) existing->resize(wanted_threads);
}

int threads() { return wanted_threads; }

void set_spin_us(int microseconds) { spin_us.store(microseconds > 0 ? microseconds : 0); }

}  // namespace shoal
