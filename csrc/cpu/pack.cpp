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

// A block is [column][output of the chunk], without gaps: 64 columns of a chunk of up to 64 outputs, zero where the
// matrix has none. It stays in L1 from reading to writing.
constexpr int kColumns = 64, kWidest = 64;

float to_float(float x) { return x; }
float to_float(uint16_t x) { return bf16_to_f32(x); }

class Packer {
 public:
  Packer(const Matrix& w, int n, int k, bool paired, const Linear& to, char* weights, float* scales)
      : w_(w), k_(k), parts_(paired ? 2 : 1), rows_(n / parts_), to_(to), weights_(weights), scales_(scales) {}

  // Row of the source matrix for output i of a chunk, or -1 for padding.
  int source(int chunk, int i) const {
    const int own = to_.width() / parts_, row = chunk * own + i % own;
    return row < rows_ ? i / own * rows_ + row : -1;
  }

  void chunk(int c) const {
    const int width = to_.width();
    alignas(64) float block[kColumns * kWidest];
    float largest[kWidest] = {}, inverse[kWidest];
    if (to_.format == Format::int8) {
      for (int column = 0; column < k_; column += kColumns) {
        read(c, column, block);
        for (int j = 0; j < kColumns; ++j)
          for (int i = 0; i < width; ++i) largest[i] = std::max(largest[i], std::fabs(block[j * width + i]));
      }
      for (int i = 0; i < width; ++i) {
        inverse[i] = largest[i] > 0 ? 127.0f / largest[i] : 0.0f;
        scales_[size_t(c) * width + i] = largest[i] / 127.0f;
      }
    }
    char* out = weights_ + c * to_.bytes_per_chunk();
    for (int column = 0; column < k_; column += kColumns) {
      read(c, column, block);
      for (int j = 0; j < kColumns; j += step_of(to_.format), out += to_.bytes_per_step()) {
        const float* values = block + j * width;
        if (to_.format == Format::fp32) std::memcpy(out, values, to_.bytes_per_step());
        if (to_.format == Format::bf16) write_bf16(values, width, out);
        if (to_.format == Format::int8) write_int8(values, width, inverse, out);
      }
    }
  }

 private:
  void read(int c, int column, float* block) const {
    if (w_.dtype == Dtype::f32) read(static_cast<const float*>(w_.data), c, column, block);
    else read(static_cast<const uint16_t*>(w_.data), c, column, block);
  }

  template <class T>
  void read(const T* data, int c, int column, float* block) const {
    const int width = to_.width(), own = width / parts_, columns = std::min(kColumns, k_ - column);
    const int outputs = std::clamp(rows_ - c * own, 0, own);
    if (outputs < own || columns < kColumns) std::fill_n(block, kColumns * width, 0.0f);
    for (int part = 0; part < parts_; ++part) {
      const T* first = data + (int64_t(part) * rows_ + c * own) * w_.row_stride + column * w_.column_stride;
      float* to = block + part * own;
      if (w_.row_stride == 1)
        for (int j = 0; j < columns; ++j)
          for (int i = 0; i < outputs; ++i) to[j * width + i] = to_float(first[j * w_.column_stride + i]);
      else
        for (int i = 0; i < outputs; i += 4)
          for (int j = 0; j < columns; j += 4)
            transpose(first + i * w_.row_stride + j * w_.column_stride, std::min(4, outputs - i),
                      std::min(4, columns - j), to + j * width + i, width);
    }
  }

  // Up to four rows by four columns of the matrix.
  template <class T>
  void transpose(const T* from, int rows, int columns, float* to, int width) const {
    if (rows == 4 && columns == 4 && w_.column_stride == 1) {
      T tile[4][4];
      for (int i = 0; i < 4; ++i) std::memcpy(tile[i], from + i * w_.row_stride, sizeof tile[i]);
      for (int j = 0; j < 4; ++j)
        for (int i = 0; i < 4; ++i) to[j * width + i] = to_float(tile[i][j]);
    } else {
      for (int j = 0; j < columns; ++j)
        for (int i = 0; i < rows; ++i) to[j * width + i] = to_float(from[i * w_.row_stride + j * w_.column_stride]);
    }
  }

  static void write_bf16(const float* values, int width, char* out) {
    uint32_t pairs[kWidest];
    for (int i = 0; i < width; ++i)
      pairs[i] = f32_to_bf16(values[i]) | uint32_t(f32_to_bf16(values[width + i])) << 16;
    std::memcpy(out, pairs, 4 * width);
  }

  static void write_int8(const float* values, int width, const float* inverse, char* out) {
    uint32_t bytes[kWidest] = {};
    for (int q = 0; q < 4; ++q)
      for (int i = 0; i < width; ++i)
        bytes[i] |= static_cast<uint32_t>(std::lrint(values[q * width + i] * inverse[i]) + 128) << 8 * q;
    std::memcpy(out, bytes, 4 * width);
  }

  const Matrix& w_;
  const int k_, parts_, rows_;
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
  const Packer packer(w, n, k, paired, to, weights, scales);
  team.run([&](int t) {
    const auto [first, last] = share(to.chunks, t, team.size());
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
