#include "cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/attention_tasks.h"
#include "cpu/isa.h"

namespace coconut_fast {

namespace portable {
#include "cpu/vec.h"
#include "cpu/attention_rows.h"
#include "cpu/attention_tiles.h"
#include "cpu/attention_tiles_backward.h"
}  // namespace portable

#if COCONUT_FAST_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#include "cpu/vec.h"
#include "cpu/attention_rows.h"
#include "cpu/attention_tiles.h"
#include "cpu/attention_tiles_backward.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace avx512 {
#include "cpu/vec.h"
#include "cpu/attention_rows.h"
#include "cpu/attention_tiles.h"
#include "cpu/attention_tiles_backward.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

namespace {

struct Kernels {
  void (*rows_forward)(const Attention&, const Task&, void*, void*);
  void (*rows_forward_f64)(const Attention&, const Task&, void*, void*);
  void (*tiles_forward)(const Attention&, const Task&, void*, void*);
  void (*rows_backward)(const Attention&, const Task&, const AttentionGrads&);
  void (*rows_backward_f64)(const Attention&, const Task&, const AttentionGrads&);
  void (*tiles_backward)(const Attention&, const Task&, const AttentionGrads&);
};

#define KERNELS(isa)                                                                               \
  Kernels {                                                                                        \
    isa::rows_forward<float>, isa::rows_forward<double>, isa::tiles_forward, isa::rows_backward<float>, \
        isa::rows_backward<double>, isa::tiles_backward                                            \
  }

Kernels kernels() {
#if COCONUT_FAST_X86
  const Isa isa = best_isa();
  if (isa >= Isa::avx512) return KERNELS(avx512);
  if (isa >= Isa::avx2) return KERNELS(avx2);
#else
  best_isa();  // refuses a wrong COCONUT_FAST_ISA
#endif
  return KERNELS(portable);
}

// Tasks of `lanes_apart` lanes where queries may be apart from each other (forward), of whole rows where not (backward).
// Neighbouring heads share the pages of few-query rows, so these are cut by heads only as far as threads ask for it.
std::vector<Task> cut(const Attention& a, int64_t threads, bool backward) {
  const int64_t group = a.heads / a.kv_heads;
  std::vector<Task> tasks;
  int64_t few = 0;
  auto is_few = [&](int64_t lanes) { return lanes <= kFewLanes || a.query_dtype == Dtype::f64; };
  for (int64_t b = 0; b < a.batch; ++b) few += is_few((a.offsets[b + 1] - a.offsets[b]) * group);
  const int64_t pieces = std::clamp<int64_t>(few ? 3 * threads / few : 1, 1, a.kv_heads);
  const int64_t heads = (a.kv_heads + pieces - 1) / pieces;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t lanes = (a.offsets[b + 1] - a.offsets[b]) * group;
    const bool tiles = !is_few(lanes);
    const int64_t most = backward ? lanes : tiles ? kChunkLanes : std::max<int64_t>(group, kFewLanes / group * group);
    const int64_t together = tiles ? 1 : heads;
    for (int64_t first = (lanes - 1) / std::max<int64_t>(most, 1) * most; first >= 0 && lanes > 0; first -= most)
      for (int64_t head = 0; head < a.kv_heads; head += together)
        tasks.push_back({b, head, std::min(head + together, a.kv_heads), first, std::min(first + most, lanes), tiles});
  }
  return tasks;
}

template <typename Run>
void run_all(const std::vector<Task>& tasks, const Parallel& parallel, const Run& run) {
  std::atomic<size_t> next{0};
  parallel.run(std::min<int64_t>(parallel.threads, static_cast<int64_t>(tasks.size())), [&] {
    for (size_t i = next++; i < tasks.size(); i = next++) run(tasks[i]);
  });
}

}  // namespace

void attention_forward(const Attention& a, void* out, void* lse, const Parallel& parallel) {
  const Kernels k = kernels();
  run_all(cut(a, parallel.threads, false), parallel, [&](const Task& task) {
    (task.tiles ? k.tiles_forward : a.query_dtype == Dtype::f64 ? k.rows_forward_f64 : k.rows_forward)(a, task, out, lse);
  });
}

void attention_backward(const Attention& a, const AttentionGrads& grads, const Parallel& parallel) {
  const Kernels k = kernels();
  run_all(cut(a, parallel.threads, true), parallel, [&](const Task& task) {
    (task.tiles ? k.tiles_backward : a.query_dtype == Dtype::f64 ? k.rows_backward_f64 : k.rows_backward)(a, task, grads);
  });
}

}  // namespace coconut_fast
