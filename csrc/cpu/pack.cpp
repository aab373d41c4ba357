#include "cpu/pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace coconut_fast {

namespace {

constexpr size_t kBlock = size_t(64) << 20, kHuge = size_t(2) << 20;

int blocks_of(int outputs) { return (outputs + 15) / 16; }

// With 16 vector registers a tile of many rows is one block wide, so that a unit (a segment of a chunk) is read several
// times; one of 16 KiB stays in an L1 of 32 meanwhile.
int widest_for(Isa isa, Format format) { return isa < Isa::avx512 ? step_of(format) : 4; }

// The widest chunk that still gives every thread nearly the same number of outputs.
int choose_wide(int blocks, int threads, int least, int widest) {
  for (int wide = widest; wide > least; wide /= 2) {
    const int chunks = (blocks + wide - 1) / wide, most = (chunks + threads - 1) / threads;
    if (20 * blocks >= 19 * wide * most * threads) return wide;
  }
  return least;
}

class Packer {
 public:
  Packer(const Matrix& w, int n, int k, bool paired, const Linear& to, char* weights, float* scales)
      : w_(w), n_(n), k_(k), paired_(paired), to_(to), weights_(weights), scales_(scales) {}

  // Row of the source matrix for output i of a chunk, or -1 for padding.
  int source(int chunk, int i) const {
    const int width = to_.width(), rows = paired_ ? n_ / 2 : n_, half = paired_ ? width / 2 : width;
    const int row = chunk * half + i % half;
    if (row >= rows) return -1;
    return i < half ? row : rows + row;
  }

  void chunk(int c) {
    for (int i = 0; i < to_.width(); ++i) {
      const int row = source(c, i);
      if (row < 0) continue;
      if (to_.format == Format::int8) quantise(c, i, row);
      else copy(c, i, row);
    }
  }

 private:
  char* place(int c, int i, int column) const {
    const int step = step_of(to_.format);
    return weights_ + c * to_.bytes_per_chunk() + size_t(column / step) * to_.bytes_per_step() + i * 4 +
           column % step * (4 / step);
  }

  void copy(int c, int i, int row) {
    for (int column = 0; column < k_; ++column) {
      const float value = w_.at(row, column);
      if (to_.format == Format::fp32) std::memcpy(place(c, i, column), &value, 4);
      const uint16_t half = f32_to_bf16(value);
      if (to_.format == Format::bf16) std::memcpy(place(c, i, column), &half, 2);
    }
  }

  void quantise(int c, int i, int row) {
    float largest = 0;
    for (int column = 0; column < k_; ++column) largest = std::max(largest, std::fabs(w_.at(row, column)));
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    scales_[size_t(c) * to_.width() + i] = largest / 127.0f;
    for (int column = 0; column < k_; ++column)
      *place(c, i, column) = static_cast<char>(std::lrint(w_.at(row, column) * inverse) + 128);
  }

  const Matrix& w_;
  const int n_, k_;
  const bool paired_;
  const Linear& to_;
  char* weights_;
  float* scales_;
};

}  // namespace

char* Arena::take(size_t bytes) {
  bytes = (bytes + 4095) / 4096 * 4096;
  if (bytes > left_) {
    const size_t size = (std::max(bytes, kBlock) + kHuge - 1) / kHuge * kHuge;
    blocks_.push_back(make_memory<char>(size + kHuge));
    free_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(blocks_.back().get()) + kHuge - 1) / kHuge * kHuge);
    left_ = size;
  }
  char* start = free_;
  free_ += bytes, left_ -= bytes;
  return start;
}

Linear pack(const Matrix& w, const float* bias, int n, int k, Format format, bool paired, Isa isa, Arena& arena,
            Team& team) {
  Linear to;
  to.format = format;
  to.n = n, to.k = k;
  to.k_padded = (k + 63) / 64 * 64;
  const int blocks = paired ? 2 * blocks_of(n / 2) : blocks_of(n);
  to.wide = choose_wide(blocks, team.size(), paired ? 2 : 1, widest_for(isa, format));
  to.chunks = (blocks + to.wide - 1) / to.wide;
  const size_t bytes = to.bytes_per_chunk() * to.chunks;
  char* weights = arena.take(bytes);
  float* scales = nullptr;
  if (format == Format::int8) scales = reinterpret_cast<float*>(arena.take(sizeof(float) * to.n_padded()));
  Packer packer(w, n, k, paired, to, weights, scales);
  team.run([&](int t) {
    const auto [first, last] = share(to.chunks, t, team.size());
    if (format == Format::int8)  // a zero weight is stored as 128
      std::memset(weights + first * to.bytes_per_chunk(), 128, (last - first) * to.bytes_per_chunk());
    for (int c = first; c < last; ++c) packer.chunk(c);
  });
  if (bias) {
    float* packed = reinterpret_cast<float*>(arena.take(sizeof(float) * to.n_padded()));
    for (int c = 0; c < to.chunks; ++c)
      for (int i = 0; i < to.width(); ++i)
        if (const int row = packer.source(c, i); row >= 0) packed[c * to.width() + i] = bias[row];
    to.bias = packed;
  }
  to.weights = weights;
  to.scales = scales;
  return to;
}

}  // namespace coconut_fast
