// The linear kernel for batches, on AMX tiles, included inside its namespace after vec.h. No includes here.
//
// A tile is 16 rows of 64 bytes. Weights are packed in the order that products need: a tile of them is 16 steps of a
// block, bytes_per_step() apart. Inputs are read in place, 16 steps of `size` rows. Four tiles hold the sums of two
// tiles of inputs times two blocks. In bf16 the two have different rows, in int8 both digits of the same rows, so that
// one loop serves both. Each tile that is loaded takes part in two products of 16 cycles; loading its 16 lines from L1
// takes 8.
//
// Rows are divided evenly among as few tiles as hold them, and the last tile starts early enough to be full: rows in
// two tiles are computed twice and used once. So one configuration serves a chunk, and nothing beyond the rows is read.

constexpr int kTileRows = 16;

// The operand of LDTILECFG.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

// Tiles 0 to 3 are sums, 4 and 5 inputs, 6 and 7 weights.
static INLINE void configure_tiles(int size) {
  TileConfig config{};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = i < 6 ? size : kTileRows;
  // GCC 11 to 13 think that the instruction reads 8 bytes, and might leave the others unwritten.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// What products prefetch: weights of the next unit (chunk and segment), and one line of keys or values with every two
// lines of weights.
struct TileFetch {
  const char* weights;
  const int lines;  // per product
  KVPrefetch& kv;

  INLINE void operator()() {
    for (int i = 0; i < lines; ++i, weights += 64) __builtin_prefetch(weights, 0, 3);
    for (int i = 0; i < lines && kv.at < kv.end; i += 2, kv.at += 64) __builtin_prefetch(kv.at, 0, 3);
  }
};

struct alignas(64) TileSums {
  char tile[4][kTileRows][64];
};

#define MULTIPLY_TILES(sum, input, weight)                                    \
  {                                                                           \
    if constexpr (format == Format::bf16) _tile_dpbf16ps(sum, input, weight); \
    else _tile_dpbsud(sum, input, weight);                                    \
    fetch();                                                                  \
  }

// Inputs at `x` and, unless null, `x2` times one or two blocks of weights, over one segment: tile[2 * input + block].
template <Format format>
static INLINE void sum_tiles(const char* x, const char* x2, size_t stride, const char* w, size_t w_step,
                             bool two_blocks, int steps, TileFetch& fetch, TileSums& sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int s = 0; s < steps; s += kTileRows, x += 64, w += kTileRows * w_step) {
    _tile_loadd(4, x, stride);
    _tile_loadd(6, w, w_step);
    MULTIPLY_TILES(0, 4, 6)
    if (two_blocks) {
      _tile_loadd(7, w + 64, w_step);
      MULTIPLY_TILES(1, 4, 7)
    }
    if (!x2) continue;
    _tile_loadd(5, x2, stride);
    MULTIPLY_TILES(2, 5, 6)
    if (two_blocks) MULTIPLY_TILES(3, 5, 7)
    x2 += 64;
  }
  _tile_stored(0, sums.tile[0], 64);
  _tile_stored(1, sums.tile[1], 64);
  _tile_stored(2, sums.tile[2], 64);
  _tile_stored(3, sums.tile[3], 64);
}

#undef MULTIPLY_TILES

// Adds rows [first, last) of tile[from], and of tile[from + 1] for a second block, to the outputs; the tile has
// `skipped` rows before them. int8: these tiles hold the high digits, the ones two further on the low digits.
template <Format format>
static INLINE void finish_tile(const TileSums& sums, int from, int skipped, int blocks, const Input& input, int segment,
                               const float* scales, int first, int last, float* out, size_t out_stride) {
  for (int row = first; row < last; ++row)
    for (int i = 0; i < blocks * 16; i += W) {
      const int own = row - first + skipped;
      const auto lanes = [&](int tile) { return sums.tile[tile + i / 16][own] + i % 16 * sizeof(float); };
      Vec total;
      if constexpr (format == Format::bf16) {
        total = load(lanes(from));
      } else {  // as Int8Dot in linear_kernel.h, bit for bit
        const size_t at = row * input.segment_stride + segment;
        const IntVec low = load<IntVec>(lanes(from + 2)) + input.offsets[at];
        total = __builtin_convertvector((load<IntVec>(lanes(from)) << 8) + low, Vec) * input.scales[at];
        total *= load(scales + i);
      }
      float* to = out + row * out_stride + i;
      store(to, segment == 0 ? total : load(to) + total);
    }
}

template <Format format>
static void linear_tiles(const Linear& linear, int chunk, const Input& input, int rows, float* out, size_t out_stride,
                         WeightPrefetch& prefetch, KVPrefetch& kv) {
  constexpr bool digits = format == Format::int8;
  const int tiles = (rows + kTileRows - 1) / kTileRows, size = (rows + tiles - 1) / tiles;
  const int products = digits ? 2 * tiles : tiles;  // per tile of weights; together they prefetch another one
  const int blocks = linear.wide > 1 ? 2 : 1, segments = linear.segments();
  const size_t w_step = linear.bytes_per_step();
  const char* weights = linear.chunk(chunk);
  const float* scales = digits ? linear.scales + size_t(chunk) * linear.width() : nullptr;
  const auto first_row = [&](int tile) { return tile * size < rows - size ? tile * size : rows - size; };
  configure_tiles(size);
  for (int segment = 0; segment < segments; ++segment) {
    const int from = segment * kSegment, to = from + kSegment;
    const int steps = ((to < linear.k_padded ? to : linear.k_padded) - from) / step_of(format);
    const char* following = weights + steps * w_step;
    TileFetch fetch{following == prefetch.end ? prefetch.next : following, (kTileRows + products - 1) / products, kv};
    const auto inputs = [&](int tile) { return input.data + first_row(tile) * input.stride + from * (digits ? 1 : 2); };
    for (int tile = 0; tile < tiles; tile += digits ? 1 : 2)
      for (int block = 0; block < linear.wide; block += 2) {
        const char* x = inputs(tile);
        const char* x2 = digits ? x + input.low : tile + 1 < tiles ? inputs(tile + 1) : nullptr;
        TileSums sums;
        kv.advance();
        sum_tiles<format>(x, x2, input.stride, weights + block * 64, w_step, blocks == 2, steps, fetch, sums);
        for (int t = tile; t <= tile + (x2 && !digits); ++t) {
          const int first = t * size, last = first + size < rows ? first + size : rows;
          finish_tile<format>(sums, 2 * (t - tile), first - first_row(t), blocks, input, segment,
                              digits ? scales + block * 16 : nullptr, first, last, out + block * 16, out_stride);
        }
      }
    weights = following;
  }
  _tile_release();
}
