#include "cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/attention_tasks.h"
#include "cpu/isa.h"

#if COCONUT_FAST_X86
#include <immintrin.h>
#endif

#define KERNEL_BF16
#define KERNEL_SOURCE "cpu/attention_kernels.h"
#include "cpu/each_isa.h"

namespace coconut_fast {

namespace {

struct Kernels {
  void (*rows_forward)(const Attention&, const Task&, void*, void*);
  void (*tiles_forward)(const Attention&, const Task&, void*, void*);
  void (*rows_backward)(const Attention&, const Task&, const AttentionGrads&);
  void (*tiles_backward)(const Attention&, const Task&, const AttentionGrads&);
};

#define KERNELS(isa, F) \
  {isa::rows_forward<F>, isa::tiles_forward<isa::Fp32Products>, isa::rows_backward<F>, \
   isa::tiles_backward<isa::Fp32Products>}

// Tiles use bf16 arithmetic where query and cache are bf16 and the CPU has it; few queries are memory-bound without it.
Kernels kernels(Isa isa, Dtype query, Dtype cache) {
  const bool f64 = query == Dtype::f64;
#if COCONUT_FAST_X86
  if (isa >= Isa::avx512_bf16 && query == Dtype::bf16 && cache == Dtype::bf16)
    return {avx512::rows_forward<float>, avx512_bf16::tiles_forward<avx512_bf16::Bf16Products>,
            avx512::rows_backward<float>, avx512_bf16::tiles_backward<avx512_bf16::Bf16Products>};
  if (isa >= Isa::avx512) return f64 ? Kernels KERNELS(avx512, double) : Kernels KERNELS(avx512, float);
  if (isa >= Isa::avx2) return f64 ? Kernels KERNELS(avx2, double) : Kernels KERNELS(avx2, float);
#endif
  (void)isa, (void)cache;
  return f64 ? Kernels KERNELS(portable, double) : Kernels KERNELS(portable, float);
}

// Forward, a row's lanes are cut into chunks, one task each, those with the most keys first; backward, all go to one
// task, which fixes the order in which dK and dV are summed. A tile task has one kv head, and smaller chunks where
// threads would be idle. With few queries the heads of a task share the pages they read, so heads are split only as far
// as it takes to occupy the threads. How tasks are cut never changes a result.
std::vector<Task> cut(const Attention& a, int64_t threads, bool backward) {
  const int64_t group = a.heads / a.kv_heads;
  auto lanes_of = [&](int64_t b) { return static_cast<int64_t>(a.offsets[b + 1] - a.offsets[b]) * group; };
  auto is_few = [&](int64_t lanes) { return lanes <= kFewLanes || a.query_dtype == Dtype::f64; };
  int64_t few = 0;
  for (int64_t b = 0; b < a.batch; ++b) few += lanes_of(b) > 0 && is_few(lanes_of(b));
  const int64_t pieces = std::clamp<int64_t>(few ? 3 * threads / few : 1, 1, a.kv_heads);

  const int64_t tile_lanes = a.batch * a.kv_heads >= 2 * threads ? kChunkLanes : kChunkLanes / 3;

  std::vector<Task> tasks;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t lanes = lanes_of(b);
    if (lanes == 0) continue;
    const bool tiles = !is_few(lanes);
    const int64_t heads = tiles ? 1 : (a.kv_heads + pieces - 1) / pieces;
    const int64_t chunk = backward ? lanes : tiles ? tile_lanes : std::max<int64_t>(group, kFewLanes / group * group);
    for (int64_t lane = (lanes - 1) / chunk * chunk; lane >= 0; lane -= chunk)
      for (int64_t head = 0; head < a.kv_heads; head += heads)
        tasks.push_back({b, head, std::min(head + heads, a.kv_heads), lane, std::min(lane + chunk, lanes), tiles});
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
  const Kernels k = kernels(best_isa(), a.query_dtype, a.cache_dtype);
  run_all(cut(a, parallel.threads, false), parallel,
          [&](const Task& task) { (task.tiles ? k.tiles_forward : k.rows_forward)(a, task, out, lse); });
}

void attend_prompt(const Attention& a, Isa isa, int64_t b, int64_t kv_head, void* out, void* lse) {
  const Kernels k = kernels(isa, a.cache_dtype, a.cache_dtype);
  const int64_t lanes = Row(a, b).lanes();
  for (int64_t lane = 0; lane < lanes; lane += kChunkLanes)
    k.tiles_forward(a, {b, kv_head, kv_head + 1, lane, std::min(lane + kChunkLanes, lanes), true}, out, lse);
}

bool reserve_prompt(int64_t head_dim) noexcept try {
  thread_scratch().reset(tiles_bytes(head_dim, head_dim, kChunkLanes));
  return true;
} catch (const std::bad_alloc&) {
  return false;
}

void attention_backward(const Attention& a, const AttentionGrads& grads, const Parallel& parallel) {
  const Kernels k = kernels(best_isa(), a.query_dtype, a.cache_dtype);
  run_all(cut(a, parallel.threads, true), parallel,
          [&](const Task& task) { (task.tiles ? k.tiles_backward : k.rows_backward)(a, task, grads); });
}

}  // namespace coconut_fast
