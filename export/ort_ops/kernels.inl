// The kernels, once for every instruction set: an isa_*.cc includes this file after it has defined `struct V`, its
// vector type. All is in an anonymous namespace, so that no function compiled for one set is linked in place of
// another's. See docs/kernels-cpu.md for the order of the loops.
//
// V has LANES floats a vector, `Float`, `Int` (LANES int32, or 4 * LANES bytes) and the functions used below.

namespace moedge {
namespace {

using Float = V::Float;
using Int = V::Int;
constexpr size_t LANES = V::LANES;
constexpr size_t BYTES = 4 * LANES;       // of a vector
constexpr size_t PARTS = LINE / BYTES;    // vectors a line
constexpr size_t CELLS = BLOCK / CELL;    // of a block
constexpr size_t STRIP = 2 * LANES;       // columns of a packed strip of floats

// Into the second level of the cache: the first is too small for a block of rows.
inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

// ---- float32

template <size_t W, size_t N>
inline void float_block(const float* weights, size_t stride, const uint32_t* rows, size_t begin, size_t end,
                        const float* x, float* y, size_t y_stride) {
  Float sums[W][N];
  for (size_t t = 0; t < W; ++t)
    for (size_t i = 0; i < N; ++i) sums[t][i] = V::load(y + t * y_stride + i * LANES);
  for (size_t r = begin; r < end; ++r) {
    const float* row = weights + (rows ? rows[r] : r) * stride;
    Float w[N];
    for (size_t i = 0; i < N; ++i) w[i] = V::load(row + i * LANES);
    for (size_t t = 0; t < W; ++t) {
      const Float value = V::set(x[r * W + t]);
      for (size_t i = 0; i < N; ++i) sums[t][i] = V::fma(value, w[i], sums[t][i]);
    }
  }
  for (size_t t = 0; t < W; ++t)
    for (size_t i = 0; i < N; ++i) V::store(y + t * y_stride + i * LANES, sums[t][i]);
}

using FloatBlock = void (*)(const float*, size_t, const uint32_t*, size_t, size_t, const float*, float*, size_t);

// float_block of each width, [0] unused.
template <size_t N, size_t... W>
constexpr std::array<FloatBlock, sizeof...(W) + 1> float_blocks(std::index_sequence<W...>) {
  return {nullptr, &float_block<W + 1, N>...};
}
constexpr auto WIDE = float_blocks<4>(std::make_index_sequence<V::FLOAT_TILE / 2>());
constexpr auto PAIRS = float_blocks<2>(std::make_index_sequence<V::FLOAT_TILE>());
constexpr auto SINGLE = float_blocks<1>(std::make_index_sequence<V::FLOAT_TILE>());

inline size_t float_vectors(size_t width) { return width <= V::FLOAT_TILE / 2 ? 4 : 2; }
inline FloatBlock float_kernel(size_t width, size_t vectors) {
  return vectors == 4 ? WIDE[width] : vectors == 2 ? PAIRS[width] : SINGLE[width];
}

void float_rows(const FloatProduct& p, size_t begin, size_t end) {
  const Tiles tiles(p.tokens, V::FLOAT_TILE);
  const size_t vectors = float_vectors(tiles.width(0));
  const size_t whole = p.columns / LANES * LANES;
  for (size_t r = begin; r < end; r += BLOCK) {
    const size_t last = std::min(r + BLOCK, end), ahead = std::min(last + BLOCK, end);
    for (size_t c = 0; c < whole;) {
      const size_t step = c + vectors * LANES <= whole ? vectors : 1;
      for (size_t line = 0; line < step * LANES; line += LINE / sizeof(float))
        for (size_t next = last; next < ahead; ++next)
          prefetch(p.weights + (p.rows ? p.rows[next] : next) * p.columns + c + line);
      for (size_t tile = 0; tile < tiles.count; ++tile) {
        const size_t t = tiles.begin(tile), width = tiles.width(tile);
        float_kernel(width, step)(p.weights + c, p.columns, p.rows, r, last, p.x + t * p.num_rows,
                                  p.y + t * p.y_stride + c, p.y_stride);
      }
      c += step * LANES;
    }
    for (size_t tile = 0; tile < tiles.count && whole < p.columns; ++tile) {
      const size_t first = tiles.begin(tile), width = tiles.width(tile);
      const float* x = p.x + first * p.num_rows;
      for (size_t row = r; row < last; ++row)
        for (size_t t = 0; t < width; ++t)
          for (size_t c = whole; c < p.columns; ++c)
            p.y[(first + t) * p.y_stride + c] +=
                x[row * width + t] * p.weights[(p.rows ? p.rows[row] : row) * p.columns + c];
    }
  }
}

// Rows [begin, end), columns [c, c + width) to [row][STRIP], zeros beyond.
inline void pack_strip(const FloatProduct& p, size_t begin, size_t end, size_t c, size_t width, float* strip) {
  for (size_t r = begin; r < end; ++r, strip += STRIP) {
    const float* row = p.weights + (p.rows ? p.rows[r] : r) * p.columns + c;
    for (size_t i = 0; i < STRIP; ++i) strip[i] = i < width ? row[i] : 0.0f;
  }
}

void float_strips(const FloatProduct& p, size_t begin, size_t end, float* scratch) {
  const Tiles tiles(p.tokens, V::FLOAT_TILE);
  float edge[V::FLOAT_TILE * STRIP];
  for (size_t t = 0; t < p.tokens; ++t) std::fill(p.y + t * p.y_stride + begin, p.y + t * p.y_stride + end, 0.0f);
  for (size_t r = 0; r < p.num_rows; r += FLOAT_STRIP_ROWS) {
    const size_t last = std::min(r + FLOAT_STRIP_ROWS, p.num_rows);
    const size_t each = (last - r + tiles.count - 1) / tiles.count;
    for (size_t c = begin; c < end; c += STRIP) {
      const size_t width = std::min(STRIP, end - c);
      pack_strip(p, r, last, c, width, scratch);
      for (size_t tile = 0; tile < tiles.count; ++tile) {
        // The next strip comes in while this one is computed.
        for (size_t row = r + tile * each; c + STRIP < end && row < std::min(r + (tile + 1) * each, last); ++row)
          for (size_t i = 0; i < STRIP; i += LINE / sizeof(float))
            prefetch(p.weights + (p.rows ? p.rows[row] : row) * p.columns + c + STRIP + i);
        const size_t t = tiles.begin(tile), w = tiles.width(tile);
        const float* x = p.x + t * p.num_rows + r * w;
        float* y = p.y + t * p.y_stride + c;
        if (width == STRIP) {
          PAIRS[w](scratch, STRIP, nullptr, 0, last - r, x, y, p.y_stride);
          continue;
        }
        for (size_t i = 0; i < w; ++i) std::copy(y + i * p.y_stride, y + i * p.y_stride + width, edge + i * STRIP);
        PAIRS[w](scratch, STRIP, nullptr, 0, last - r, x, edge, STRIP);
        for (size_t i = 0; i < w; ++i) std::copy(edge + i * STRIP, edge + i * STRIP + width, y + i * p.y_stride);
      }
    }
  }
}

// ---- integers

// Four float scales, of the columns that the four vectors of a part have.
template <bool HALF>
inline void load_scales(const IntProduct& p, size_t row, size_t column, Float out[4]) {
  const size_t at = row * p.columns + column;
  for (size_t i = 0; i < 4; ++i)
    out[i] = HALF ? V::load_half(static_cast<const uint16_t*>(p.scales) + at + 16 * i)
                  : V::load(static_cast<const float*>(p.scales) + at + 16 * i);
}

inline void add_scaled(const Int sums[4], const Float scales[4], float x_scale, float* y) {
  const Float factor = V::set(x_scale);
  for (size_t i = 0; i < 4; ++i)
    V::store(y + 16 * i, V::fma(V::to_float(sums[i]), V::mul(scales[i], factor), V::load(y + 16 * i)));
}

inline Int start(int32_t value) { return V::set_int(V::SIGNED ? 0 : value); }

// One line of a block's rows for W tokens, interleaved in registers: the least work for few tokens.
template <bool FOUR, bool HALF, size_t W>
inline void line_direct(const IntProduct& p, size_t b, const uint8_t* const* rows, size_t line, const int32_t* x,
                        size_t t) {
  constexpr size_t NIBBLES = FOUR ? 2 : 1;
  const Block& block = p.blocks[b];
  const int32_t* starts = p.starts + b * p.tokens + t;
  for (size_t part = 0; part < PARTS; ++part) {
    Int sums[W][NIBBLES * 4];
    for (size_t w = 0; w < W; ++w)
      for (size_t i = 0; i < NIBBLES * 4; ++i) sums[w][i] = start(starts[w]);
    for (size_t cell = 0; cell < block.end - block.begin; ++cell) {
      Int bytes[4];
      V::interleave(rows + 4 * cell, line * LINE + part * BYTES, bytes);
      for (size_t w = 0; w < W; ++w) {
        const Int value = V::set_int(x[cell * W + w]);
        for (size_t i = 0; i < 4; ++i) {
          sums[w][i] = V::dot<FOUR>(sums[w][i], FOUR ? V::low(bytes[i]) : V::whole(bytes[i]), value);
          if (FOUR) sums[w][i + 4 * (NIBBLES - 1)] = V::dot<FOUR>(sums[w][i + 4 * (NIBBLES - 1)], V::high(bytes[i]), value);
        }
      }
    }
    for (size_t nibble = 0; nibble < NIBBLES; ++nibble) {
      const size_t column = (line * NIBBLES + nibble) * LINE + part * LANES;
      Float scales[4];
      load_scales<HALF>(p, block.scale_row, column, scales);
      for (size_t w = 0; w < W; ++w)
        add_scaled(sums[w] + 4 * nibble, scales, p.x_scales[b * p.tokens + t + w], p.y + (t + w) * p.y_stride + column);
    }
  }
}

// The same from bytes that are interleaved already, [cell][4].
template <bool FOUR, bool HALF, size_t W>
inline void part_of_tile(const IntProduct& p, size_t b, const Int* bytes, const Float* scales, size_t column,
                         const int32_t* x, size_t t) {
  const Block& block = p.blocks[b];
  Int sums[W][4];
  for (size_t w = 0; w < W; ++w)
    for (size_t i = 0; i < 4; ++i) sums[w][i] = start(p.starts[b * p.tokens + t + w]);
  for (size_t cell = 0; cell < block.end - block.begin; ++cell) {
    Int values[4];
    for (size_t i = 0; i < 4; ++i) values[i] = bytes[4 * cell + i];
    for (size_t w = 0; w < W; ++w) {
      const Int value = V::set_int(x[cell * W + w]);
      for (size_t i = 0; i < 4; ++i) sums[w][i] = V::dot<FOUR>(sums[w][i], values[i], value);
    }
  }
  for (size_t w = 0; w < W; ++w)
    add_scaled(sums[w], scales, p.x_scales[b * p.tokens + t + w], p.y + (t + w) * p.y_stride + column);
}

using PartOfTile = void (*)(const IntProduct&, size_t, const Int*, const Float*, size_t, const int32_t*, size_t);
template <bool FOUR, bool HALF, size_t... W>
constexpr std::array<PartOfTile, sizeof...(W) + 1> parts_of_tile(std::index_sequence<W...>) {
  return {nullptr, &part_of_tile<FOUR, HALF, W + 1>...};
}

// One line of a block's rows for any number of tokens: interleaved once, then tile after tile.
template <bool FOUR, bool HALF>
inline void line_of_tiles(const IntProduct& p, size_t b, const uint8_t* const* rows, size_t line, const Tiles& tiles) {
  static constexpr auto KERNELS = parts_of_tile<FOUR, HALF>(std::make_index_sequence<V::INT_TILE>());
  constexpr size_t NIBBLES = FOUR ? 2 : 1;
  const Block& block = p.blocks[b];
  const size_t cells = block.end - block.begin;
  Int bytes[NIBBLES][PARTS][CELLS * 4];
  for (size_t part = 0; part < PARTS; ++part)
    for (size_t cell = 0; cell < cells; ++cell) {
      Int four[4];
      V::interleave(rows + 4 * cell, line * LINE + part * BYTES, four);
      for (size_t i = 0; i < 4; ++i) {
        bytes[0][part][4 * cell + i] = FOUR ? V::low(four[i]) : V::whole(four[i]);
        if (FOUR) bytes[NIBBLES - 1][part][4 * cell + i] = V::high(four[i]);
      }
    }
  for (size_t nibble = 0; nibble < NIBBLES; ++nibble)
    for (size_t part = 0; part < PARTS; ++part) {
      const size_t column = (line * NIBBLES + nibble) * LINE + part * LANES;
      Float scales[4];
      load_scales<HALF>(p, block.scale_row, column, scales);
      for (size_t tile = 0; tile < tiles.count; ++tile) {
        const size_t t = tiles.begin(tile), width = tiles.width(tile);
        KERNELS[width](p, b, bytes[nibble][part], scales, column, p.x + t * p.num_cells + block.begin * width, t);
      }
    }
}

template <bool FOUR, bool HALF>
inline void one_line(const IntProduct& p, size_t b, const uint8_t* const* rows, size_t line, const Tiles& tiles) {
  if (p.tokens == 1)
    line_direct<FOUR, HALF, 1>(p, b, rows, line, p.x + p.blocks[b].begin, 0);
  else if (p.tokens == 2 && V::INT_TILE > 2)
    line_direct<FOUR, HALF, 2>(p, b, rows, line, p.x + p.blocks[b].begin * 2, 0);
  else
    line_of_tiles<FOUR, HALF>(p, b, rows, line, tiles);
}

inline size_t row_pointers(const IntProduct& p, size_t b, const uint8_t** out) {
  const size_t begin = 4 * p.blocks[b].begin, end = 4 * p.blocks[b].end;
  for (size_t r = begin; r < end; ++r) out[r - begin] = p.weights + p.rows[r] * p.row_bytes;
  return end - begin;
}

template <bool FOUR, bool HALF>
inline void prefetch_line(const IntProduct& p, size_t b, const uint8_t* const* rows, size_t count, size_t line) {
  for (size_t r = 0; r < count; ++r) prefetch(rows[r] + line * LINE);
  constexpr size_t SIZE = (HALF ? 2 : 4) * LINE * (FOUR ? 2 : 1);
  const char* scales = static_cast<const char*>(p.scales) + p.blocks[b].scale_row * p.columns * (HALF ? 2 : 4);
  for (size_t i = 0; i < SIZE; i += LINE) prefetch(scales + line * SIZE + i);
}

template <bool FOUR, bool HALF>
void int_rows_of(const IntProduct& p, size_t begin, size_t end) {
  const Tiles tiles(p.tokens, V::INT_TILE);
  const uint8_t* memory[2][BLOCK];
  const uint8_t **rows = memory[0], **next = memory[1];
  if (begin < end) row_pointers(p, begin, rows);
  for (size_t b = begin; b < end; ++b) {
    const size_t count = b + 1 < end ? row_pointers(p, b + 1, next) : 0;
    for (size_t line = 0; line < p.row_bytes / LINE; ++line) {
      if (count) prefetch_line<FOUR, HALF>(p, b + 1, next, count, line);
      one_line<FOUR, HALF>(p, b, rows, line, tiles);
    }
    std::swap(rows, next);
  }
}

template <bool FOUR, bool HALF>
void int_strips_of(const IntProduct& p, size_t begin, size_t end, size_t num_blocks) {
  constexpr size_t COLUMNS = LINE * (FOUR ? 2 : 1);
  const Tiles tiles(p.tokens, V::INT_TILE);
  const uint8_t* memory[2][BLOCK];
  for (size_t t = 0; t < p.tokens; ++t)
    std::fill(p.y + t * p.y_stride + begin * COLUMNS, p.y + t * p.y_stride + end * COLUMNS, 0.0f);
  for (size_t line = begin; line < end; ++line) {
    const uint8_t **rows = memory[0], **next = memory[1];
    if (num_blocks) row_pointers(p, 0, rows);
    for (size_t b = 0; b < num_blocks; ++b) {
      const size_t count = b + 1 < num_blocks ? row_pointers(p, b + 1, next) : 0;
      if (count) prefetch_line<FOUR, HALF>(p, b + 1, next, count, line);
      line_of_tiles<FOUR, HALF>(p, b, rows, line, tiles);
      std::swap(rows, next);
    }
  }
}

template <bool FOUR>
void int_rows(const IntProduct& p, size_t begin, size_t end) {
  p.half ? int_rows_of<FOUR, true>(p, begin, end) : int_rows_of<FOUR, false>(p, begin, end);
}

template <bool FOUR>
void int_strips(const IntProduct& p, size_t begin, size_t end, size_t num_blocks) {
  p.half ? int_strips_of<FOUR, true>(p, begin, end, num_blocks) : int_strips_of<FOUR, false>(p, begin, end, num_blocks);
}

// ---- by element; plain loops that the compiler vectorises

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void mask(const float* x, const float* threshold, size_t size, float* out) {
  for (size_t i = 0; i < size; ++i) out[i] = float_of(bits_of(x[i]) & 0x7fffffffu) < threshold[i] ? 0.0f : x[i];
}

void round_blocks(const float* x, size_t blocks, int8_t* q, float* scales, int32_t* sums) {
  constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: added, it leaves an integer in the low bits, ties to even
  for (size_t b = 0; b < blocks; ++b, x += BLOCK, q += BLOCK) {
    int32_t most = 0;  // non-negative floats are ordered as their bits
    for (size_t i = 0; i < BLOCK; ++i) most = std::max(most, static_cast<int32_t>(bits_of(x[i]) & 0x7fffffffu));
    const bool finite = most < 0x7f800000;
    const float peak = float_of(most);
    const float inverse = finite && peak > 0 ? 127.0f / peak : 0.0f;
    const float factor = inverse <= 3.402823466e38f ? inverse : 0.0f;  // below 4e-37 nothing is left
    scales[b] = finite ? peak / 127.0f : float_of(0x7fc00000u);
    int32_t sum = 0;
    for (size_t i = 0; i < BLOCK; ++i) {
      const float value = finite ? x[i] * factor : 0.0f;
      const int32_t level = static_cast<int32_t>(bits_of(value + MAGIC)) - static_cast<int32_t>(bits_of(MAGIC));
      q[i] = static_cast<int8_t>(level);
      sum += level;
    }
    sums[b] = sum;
  }
}

// e^x to 2 units in the last place, x clamped to what has a normal result; NaN stays NaN. (Cephes' polynomial.)
inline float exponential(float x) {
  constexpr float MAGIC = 12582912.0f;
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + MAGIC;
  const float n = shifted - MAGIC;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return float_of(bits_of(p) + (bits_of(shifted) << 23));
}

inline float silu(float g) { return g / (1.0f + exponential(-g)); }

inline float gelu_tanh(float g) {
  return g / (1.0f + exponential(-1.5957691216f * (g + 0.044715f * g * g * g)));
}

// 1.5e-7 from the exact one (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26).
inline float gelu(float g) {
  const float z = float_of(bits_of(g) & 0x7fffffffu) * 0.70710678118f;
  const float t = 1.0f / (1.0f + 0.3275911f * z);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float tail = 0.5f * p * t * exponential(-z * z);
  return g * (g < 0 ? tail : 1.0f - tail);
}

void glu(const float* gate, const float* up, size_t size, int activation, float* out) {
  if (activation == SILU)
    for (size_t i = 0; i < size; ++i) out[i] = silu(gate[i]) * up[i];
  else if (activation == GELU_TANH)
    for (size_t i = 0; i < size; ++i) out[i] = gelu_tanh(gate[i]) * up[i];
  else
    for (size_t i = 0; i < size; ++i) out[i] = gelu(gate[i]) * up[i];
}

}  // namespace
}  // namespace moedge

#define MOEDGE_KERNELS(NAME)                                                                          \
  {NAME, V::FLOAT_TILE, V::INT_TILE, &float_rows, &int_rows<false>, &int_rows<true>, &float_strips,    \
   &int_strips<false>, &int_strips<true>, &mask, &round_blocks, &glu}
