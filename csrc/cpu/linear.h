// Linear layers with packed weights: y[m] = W x[m], for a few rows m at a time, at the speed of memory.
//
// Packing. Outputs form blocks of 16 (one per 32-bit lane), and `wide` (1, 2 or 4) blocks form a chunk. A chunk is
//     [step of k][block of the chunk][16 outputs][k within the step]          one step = 64 bytes per block
// where a step is one k in fp32, two in bf16 and four in int8: the operand order of VDPBF16PS, VPDPBUSD and AMX tiles.
// Chunks are contiguous, so a thread that owns a range of chunks reads memory sequentially.
//
// Sums. k is cut into segments (of kSegment values); within a segment one fp32 chain runs through k, and the segments'
// sums are added in order. Every kernel of an instruction set does exactly this, however many rows it has at once, so
// a row's result does not depend on the batch. (Isa::amx sums bf16 in the tiles' order for 8 rows and more, in the
// vectors' order for fewer; its int8 sums are exact integers either way.)
//
// int8 weights are stored plus 128, with one scale per output. Where the CPU multiplies bytes (VNNI, AMX) inputs become
// 16-bit integers with one scale per row and segment, split into two bytes; elsewhere weights are converted and inputs
// stay fp32.
#pragma once

#include <cstddef>
#include <cstdint>

namespace coconut_fast {

enum class Format : int { fp32, bf16, int8 };
inline int step_of(Format format) { return format == Format::fp32 ? 1 : format == Format::bf16 ? 2 : 4; }

constexpr int kSegment = 256;

struct Linear {
  Format format = Format::fp32;
  int n = 0, k = 0;         // outputs, inputs
  int k_padded = 0;         // multiple of 64
  int wide = 1, chunks = 0; // chunks * wide * 16 >= n; what is beyond n is zero
  const char* weights = nullptr;
  const float* scales = nullptr;  // int8: (n_padded(),)
  const float* bias = nullptr;    // (n,) or null

  int width() const { return wide * 16; }
  int n_padded() const { return chunks * width(); }
  int segments() const { return (k_padded + kSegment - 1) / kSegment; }
  size_t bytes_per_step() const { return size_t(wide) * 64; }
  size_t bytes_per_chunk() const { return size_t(k_padded / step_of(format)) * bytes_per_step(); }
  const char* chunk(int c) const { return weights + c * bytes_per_chunk(); }
};

// The form in which a kernel takes its input rows.
enum class InputKind : int { fp32, bf16, split16 };

// Rows of input, zero from k to k_padded. Strides are odd multiples of 64 bytes: rows then never share cache sets.
// split16: a row is two rows of bytes (high, low digit; value = 256 high + low), `low` bytes apart, with scales and
// `offsets` (-128 times the sum of the segment's 16-bit values, modulo 2^32) per row and segment.
struct Input {
  const char* data = nullptr;
  size_t stride = 0;  // bytes
  size_t low = 0;
  const float* scales = nullptr;    // [row][segment_stride]
  const int32_t* offsets = nullptr; // [row][segment_stride]
  size_t segment_stride = 0;
};

// What a thread will read after its products: spans of keys, each followed by the same span of values. Products of many
// rows are bound by arithmetic, attention by memory: with keys and values already fetched it takes a third less time.
struct Span {
  size_t offset, bytes;
};
struct alignas(64) KVPrefetch {  // aligned: each thread keeps writing its own
  const Span *span = nullptr, *last = nullptr;
  const char *keys = nullptr, *values = nullptr;
  const char *at = nullptr, *end = nullptr;  // of the current span
  bool value = false;                        // the next span is of values

  // Goes to the next span once the current one is used up.
  void advance() {
    if (at < end || span == last) return;
    at = (value ? values : keys) + span->offset;
    end = at + span->bytes;
    if (value) ++span;
    value = !value;
  }
};

// The weights a thread reads: its share of a matrix up to `end`, then its share of the next one, from `next` on. With
// one or two rows `at` is what to prefetch next, some KiB ahead of the products; while the thread waits for others,
// prefetching continues up to `limit`.
struct alignas(64) WeightPrefetch {
  const char *at = nullptr, *end = nullptr;
  const char *next = nullptr, *limit = nullptr;
};

// out[m * out_stride + i] = sums of the chunk's outputs, i < width(), without bias. Meanwhile it prefetches as much as
// it reads: the weights that follow, or, for more than two rows, the next unit (chunk and segment), keys and values.
using LinearKernel = void (*)(const Linear& linear, int chunk, const Input& input, int rows, float* out,
                              size_t out_stride, WeightPrefetch& prefetch, KVPrefetch& kv);

}  // namespace coconut_fast
