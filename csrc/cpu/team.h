// A persistent team of threads: one run() wakes them, then phases are separated by spinning barriers (about 0.2 us
// where every thread has a core) instead of a fork and join per layer. Between runs they sleep.
#pragma once

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace coconut_fast {

class Team {
 public:
  explicit Team(int threads);  // std::runtime_error if the system cannot start that many
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Runs job(thread) on every thread, the caller being thread 0; returns when all are done. Throws std::runtime_error
  // in a process forked after the team was made, since the threads do not exist there.
  template <class Job>
  void run(const Job& job) {
    start(std::cref(job));  // a std::function of a reference does not allocate memory
  }

  // Inside a job: waits until every thread has arrived; meanwhile prefetches from `at` on, up to `end`.
  void barrier();
  void barrier(const char*& at, const char* end);

 private:
  void start(const std::function<void(int)>& job);
  void work(int thread);
  void stop();

  const int size_;
  const int process_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* job_ = nullptr;
  alignas(64) std::atomic<uint32_t> epoch_{0};  // counts runs; workers sleep on it
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};  // counts barriers
  bool stop_ = false;
};

}  // namespace coconut_fast
