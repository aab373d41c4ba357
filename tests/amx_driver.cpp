// One product of the native chain on the tiles of amx_on_cpu.h, for test_native_amx.py: packed weights and inputs as
// the chain makes them, all memory ending at a page that nobody may touch.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/pack.h"

namespace coconut_fast {
namespace {

#define KERNEL_LEVEL 0
#include "cpu/vec.h"
//
#define INLINE_LAMBDA __attribute__((always_inline))
#include "cpu/rowwise_kernel.h"
//
#include "cpu/linear_amx.h"

// `count` values, NaN or -1 until they are written, right before a page without access.
template <class T>
class Guarded {
 public:
  explicit Guarded(size_t count) {
    const size_t page = sysconf(_SC_PAGESIZE), bytes = count * sizeof(T);
    size_ = (bytes + page - 1) / page * page + page;
    start_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (start_ == MAP_FAILED || mprotect(start_ + size_ - page, page, PROT_NONE) != 0) std::abort();
    std::memset(start_, 0xff, size_ - page);
    data_ = reinterpret_cast<T*>(start_ + size_ - page - bytes);
  }
  ~Guarded() { munmap(start_, size_); }
  Guarded(const Guarded&) = delete;
  T* data() const { return data_; }

 private:
  char* start_;
  size_t size_;
  T* data_;
};

template <Format format>
void run(Linear linear, const float* x, int rows, float* out) {
  const size_t k = linear.k_padded, segments = linear.segments(), bytes = linear.bytes_per_chunk() * linear.chunks;
  Guarded<char> weights(bytes);
  std::memcpy(weights.data(), linear.weights, bytes);
  linear.weights = weights.data();
  const size_t count = linear.scales ? linear.n_padded() : 0;
  Guarded<float> scales(count);
  if (count) std::memcpy(scales.data(), linear.scales, count * sizeof(float)), linear.scales = scales.data();

  const size_t stride = (2 * k / 64 | 1) * 64;  // Chain::make_inputs
  Guarded<char> data((rows - 1) * stride + 2 * k);
  Guarded<float> row_scales(rows * segments);
  Guarded<int32_t> offsets(rows * segments);
  constexpr InputKind kind = format == Format::bf16 ? InputKind::bf16 : InputKind::split16;
  for (int m = 0; m < rows; ++m) {
    char* row = data.data() + m * stride;
    std::memset(row, 0, 2 * k);
    prepare(x + size_t(m) * linear.k, linear.k,
            {kind, row, k, row_scales.data() + m * segments, offsets.data() + m * segments});
  }
  const bool digits = kind == InputKind::split16;
  const Input input{data.data(), stride, k, digits ? row_scales.data() : nullptr, digits ? offsets.data() : nullptr,
                    segments};
  const int width = linear.width();
  for (int c = 0; c < linear.chunks; ++c) {
    Guarded<float> sums(size_t(rows) * width);
    WeightPrefetch prefetch{linear.chunk(c), linear.chunk(linear.chunks), linear.weights, nullptr};
    KVPrefetch kv;
    linear_tiles<format>(linear, c, input, rows, sums.data(), width, prefetch, kv);
    if (amx_on_cpu::state.configured) std::abort();  // a thread that sleeps must not hold tiles
    for (int m = 0; m < rows; ++m)
      for (int i = 0; i < width && c * width + i < linear.n; ++i)
        out[size_t(m) * linear.n + c * width + i] = sums.data()[m * width + i];
  }
}

}  // namespace
}  // namespace coconut_fast

using namespace coconut_fast;

// out (rows, n) = x (rows, k) times w (n, k) transposed. bf16, or int8.
// counts: blocks in a chunk; tiles loaded; products; lines fetched ahead.
extern "C" void multiply(bool int8, const float* w, int n, int k, const float* x, int rows, float* out, long* counts) {
  Team team(1);
  Arena arena;
  const Format format = int8 ? Format::int8 : Format::bf16;
  const Linear linear = pack({w, Dtype::f32, k, 1}, nullptr, n, k, format, false, Isa::amx, arena, team);
  amx_on_cpu::State& state = amx_on_cpu::state;
  state.loads = state.products = state.fetches = 0;
  if (int8) run<Format::int8>(linear, x, rows, out);
  else run<Format::bf16>(linear, x, rows, out);
  counts[0] = linear.wide, counts[1] = state.loads, counts[2] = state.products, counts[3] = state.fetches;
}

// The set that kernels would run on, or why there is none.
extern "C" const char* chosen_isa() {
  static std::string answer;
  try {
    answer = isa_name(best_isa());
  } catch (const std::exception& error) {
    answer = error.what();
  }
  return answer.c_str();
}
