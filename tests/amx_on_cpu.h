// Intel's AMX on plain memory, so that csrc/cpu/linear_amx.h runs where there are no tiles:
// g++ -include tests/amx_on_cpu.h.
//
// Each intrinsic does what the manual's pseudocode says (Intel 64 and IA-32 Architectures Software Developer's Manual,
// volume 2), and what would fault there ends the process here. For isa.cpp the CPU has tiles and Linux grants them,
// unless COCONUT_FAST_TILES says "absent" or "refused".
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/isa.h"

#if COCONUT_FAST_X86
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace amx_on_cpu {

inline void check(bool fine, const char* what) {
  if (fine) return;
  std::fprintf(stderr, "AMX fault: %s\n", what);
  std::abort();
}

struct Tile {
  int rows, row_bytes;
  alignas(64) uint8_t data[16][64];

  template <class T>
  T& at(int row, int i) { return reinterpret_cast<T*>(data[row])[i]; }
};

struct State {
  bool configured;
  Tile tiles[8];
  long loads, products, fetches;  // for the tests to count

  Tile& tile(int t) {
    check(configured && tiles[t].rows > 0, "a tile that is not configured");
    return tiles[t];
  }
};
inline thread_local State state;

inline void release() {
  state.configured = false;
  std::memset(state.tiles, 0, sizeof state.tiles);
}

inline void load_config(const void* from) {
  uint8_t bytes[64];
  std::memcpy(bytes, from, sizeof bytes);
  release();
  if (bytes[0] == 0) return;
  check(bytes[0] == 1 && bytes[1] == 0, "palette 1, from the first row on, is all that is known");
  for (int i = 2; i < 16; ++i) check(bytes[i] == 0, "a reserved byte of the configuration");
  for (int t = 0; t < 16; ++t) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * t, 2);
    const int rows = bytes[48 + t];
    check(rows <= 16 && row_bytes <= 64 && (rows == 0) == (row_bytes == 0), "the shape of a tile");
    check(t < 8 || rows == 0, "there are eight tiles");
    if (t < 8) state.tiles[t].rows = rows, state.tiles[t].row_bytes = row_bytes;
  }
  state.configured = true;
}

inline void fetch(const void*, int = 0, int = 3) { ++state.fetches; }

inline void zero(int t) { std::memset(state.tile(t).data, 0, sizeof(Tile::data)); }

inline void load(int t, const void* from, long stride) {
  zero(t);
  Tile& tile = state.tile(t);
  ++state.loads;
  const char* row = static_cast<const char*>(from);
  for (int m = 0; m < tile.rows; ++m, row += stride) std::memcpy(tile.data[m], row, tile.row_bytes);
}

inline void store(int t, void* to, long stride) {
  Tile& tile = state.tile(t);
  for (int m = 0; m < tile.rows; ++m) std::memcpy(static_cast<char*>(to) + m * stride, tile.data[m], tile.row_bytes);
}

// For every sum c of row m of `left` and column n of `right`, in groups of four bytes: add(c, a, b, m, n, groups).
template <class Sum, class Add>
void multiply(int to, int left, int right, Add add) {
  Tile &c = state.tile(to), &a = state.tile(left), &b = state.tile(right);
  check(to != left && to != right && left != right, "a product's tiles must differ");
  check(c.rows == a.rows && c.row_bytes == b.row_bytes && a.row_bytes == 4 * b.rows, "tiles that do not fit together");
  ++state.products;
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.row_bytes / 4; ++n) add(c.at<Sum>(m, n), a, b, m, n, a.row_bytes / 4);
}

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
inline float widened(uint16_t x) {
  const uint32_t word = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return flushed(value);
}

// The pairs' first products are summed by one chain of FMA, their second ones by another, and both sums added to C.
inline void dpbf16ps(int to, int left, int right) {
  multiply<float>(to, left, right, [](float& c, Tile& a, Tile& b, int m, int n, int pairs) {
    float sums[2] = {};
    for (int k = 0; k < pairs; ++k)
      for (int i = 0; i < 2; ++i)
        sums[i] = flushed(
            std::fma(widened(a.at<uint16_t>(m, 2 * k + i)), widened(b.at<uint16_t>(k, 2 * n + i)), sums[i]));
    c = flushed(flushed(c) + flushed(sums[0] + sums[1]));
  });
}

// Signed bytes times unsigned ones, modulo 2^32.
inline void dpbsud(int to, int left, int right) {
  multiply<uint32_t>(to, left, right, [](uint32_t& c, Tile& a, Tile& b, int m, int n, int fours) {
    for (int k = 0; k < fours; ++k)
      for (int i = 0; i < 4; ++i)
        c += static_cast<uint32_t>(a.at<int8_t>(m, 4 * k + i) * int32_t(b.at<uint8_t>(k, 4 * n + i)));
  });
}

inline bool tiles_are(const char* what) {
  const char* said = std::getenv("COCONUT_FAST_TILES");
  return said && !std::strcmp(said, what);
}
inline bool cpu_has(const char* feature) { return std::strncmp(feature, "amx", 3) != 0 || !tiles_are("absent"); }
#if COCONUT_FAST_X86
template <class... Arguments>
long ask(long call, Arguments... arguments) {  // the standard library waits through syscall as well
  if (call != SYS_arch_prctl) return syscall(call, arguments...);
  const long asked[] = {long(arguments)...};
  check(sizeof asked == 16 && asked[0] == 0x1023 && asked[1] == 18, "not the request for the state of tiles");
  return tiles_are("refused") ? -1 : 0;
}
#endif

}  // namespace amx_on_cpu

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig amx_on_cpu::load_config
#define _tile_release amx_on_cpu::release
#define _tile_loadd amx_on_cpu::load
#define _tile_stored amx_on_cpu::store
#define _tile_zero amx_on_cpu::zero
#define _tile_dpbf16ps amx_on_cpu::dpbf16ps
#define _tile_dpbsud amx_on_cpu::dpbsud
#define __builtin_prefetch amx_on_cpu::fetch
#if COCONUT_FAST_X86
#define __builtin_cpu_supports amx_on_cpu::cpu_has
#define syscall amx_on_cpu::ask
#endif
