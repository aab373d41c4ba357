#include "cpu/team.h"

#include <unistd.h>

#include <stdexcept>

namespace coconut_fast {

namespace {

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins while `changed()` is false; yields the CPU from time to time, in case the thread waited for has none.
template <typename F>
bool spin(F changed, int tries) {
  for (int i = 1; i <= tries; ++i) {
    if (changed()) return true;
    pause_briefly();
    if (i % 2048 == 0) std::this_thread::yield();
  }
  return changed();
}

}  // namespace

Team::Team(int threads) : size_(threads), process_(getpid()) {
  if (threads < 1) throw std::invalid_argument("threads must be at least 1, found " + std::to_string(threads));
  threads_.reserve(threads - 1);
  try {
    for (int t = 1; t < threads; ++t) threads_.emplace_back(&Team::work, this, t);
  } catch (const std::exception& error) {
    stop();  // destroying a std::thread that still runs would terminate the process
    throw std::runtime_error(std::to_string(threads) + " threads cannot be started (" + error.what() +
                             "); ask for fewer (threads, or OMP_NUM_THREADS)");
  }
}

Team::~Team() {
  if (getpid() != process_) {
    // A forked child has no threads to join or detach, and by now their handles may be those of threads of its own.
    // Destroying them would end the process.
    new std::vector<std::thread>(std::move(threads_));
    return;
  }
  stop();
}

void Team::stop() {
  stop_ = true;
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void Team::start(const std::function<void(int)>& job) {
  if (getpid() != process_)
    throw std::runtime_error("the native engine was made before this process forked; make a new one in the child");
  job_ = &job;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  job(0);
  barrier();
}

void Team::work(int thread) {
  for (uint32_t seen = 0;;) {
    // A short spin catches a caller that runs the next job at once; then the thread sleeps.
    if (!spin([&] { return epoch_.load(std::memory_order_acquire) != seen; }, 4096))
      epoch_.wait(seen, std::memory_order_acquire);
    if (epoch_.load(std::memory_order_acquire) == seen) continue;
    ++seen;
    if (stop_) return;
    (*job_)(thread);
    barrier();
  }
}

void Team::barrier() {
  const char* nothing = nullptr;
  barrier(nothing, nullptr);
}

void Team::barrier(const char*& at, const char* end) {
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  const auto passed = [&] { return phase_.load(std::memory_order_acquire) != phase; };
  for (; at < end && !passed(); at += 256)
    for (int line = 0; line < 256; line += 64) __builtin_prefetch(at + line, 0, 3);
  while (!spin(passed, 1 << 20)) {
  }
}

}  // namespace coconut_fast
