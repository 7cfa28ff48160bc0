// The kernels, once for every instruction set: an isa_*.cc includes this file after it has defined `struct V`, its
// vector type. All is in an anonymous namespace, so that no function compiled for one set is linked in place of
// another's. See docs/kernels-cpu.md for the order of the loops.
//
// V has LANES floats a vector, `Float`, `Int` (LANES int32, or 4 * LANES bytes) and the functions used below.

// Loops over vectors are unrolled, so that arrays of vectors stay in registers.
#define MOEDGE_UNROLL _Pragma("GCC unroll 16")

namespace moedge {
namespace {

using Float = V::Float;
using Int = V::Int;
constexpr size_t LANES = V::LANES;
constexpr size_t BYTES = 4 * LANES;       // of a vector
constexpr size_t PARTS = LINE / BYTES;    // vectors a line
constexpr size_t CELLS = BLOCK / CELL;    // of a block
constexpr size_t STRIP = 2 * LANES;       // columns of floats at once: two vectors, for which each x is broadcast once
constexpr size_t FLOATS = LINE / sizeof(float);
static_assert(FLOAT_STRIP_COLUMNS % STRIP == 0, "tasks are whole strips, and a panel's strips fit into the scratch");

// Into the second level of the cache, as the first is too small for a block of rows; NEAR: into the first, for what is
// read a few lines later.
template <bool NEAR = false>
inline void prefetch(const void* address) {
  __builtin_prefetch(address, 0, NEAR ? 3 : 2);
  asm volatile("");  // or GCC takes a function that only prefetches for one without effect and drops its calls
}

// Columns that all rows are read of before the next ones: their sums stay in the first level of the cache, and what is
// prefetched of the rows that follow in the second. In whole rows of an output projection both would be megabytes.
constexpr size_t WINDOW = 4096;
// Columns that all tiles of tokens are computed of before the next ones: rows and sums stay in the first level.
constexpr size_t TILES_WINDOW = 512;

// ---- float32

// Lines to prefetch, one beside each row of a computation: many at once would hold it up.
struct Ahead {
  const float* first;
  size_t stride;  // of two rows
  size_t rows;

  void line(size_t number) const {
    constexpr size_t LINES = (STRIP + FLOATS - 1) / FLOATS;
    prefetch(first + number / LINES * stride + number % LINES * FLOATS);
  }
  size_t lines() const { return rows * ((STRIP * sizeof(float) + LINE - 1) / LINE); }
};

// y [W][STRIP] = or += rows of a strip times x [W][row].
template <size_t W>
void strip_block(const float* weights, size_t rows, const float* x, size_t x_stride, float* y, size_t y_stride, bool add,
                 const Ahead& ahead) {
  constexpr size_t N = STRIP / LANES, GROUP = 3;  // tokens that are reached from one pointer, as registers are few
  const float* tokens[(W + GROUP - 1) / GROUP];
  MOEDGE_UNROLL
  for (size_t g = 0; g < (W + GROUP - 1) / GROUP; ++g) tokens[g] = x + g * GROUP * x_stride;
  Float sums[W][N];
  if (add) {
    MOEDGE_UNROLL
    for (size_t t = 0; t < W; ++t)
      MOEDGE_UNROLL
      for (size_t i = 0; i < N; ++i) sums[t][i] = V::load(y + t * y_stride + i * LANES);
  } else {
    MOEDGE_UNROLL
    for (size_t t = 0; t < W; ++t)
      MOEDGE_UNROLL
      for (size_t i = 0; i < N; ++i) sums[t][i] = V::set(0.0f);
  }
  const size_t lines = ahead.lines();
  for (size_t r = 0; r < rows; ++r) {
    if (r < lines) ahead.line(r);
    Float w[N];
    MOEDGE_UNROLL
    for (size_t i = 0; i < N; ++i) w[i] = V::load(weights + r * STRIP + i * LANES);
    MOEDGE_UNROLL
    for (size_t t = 0; t < W; ++t) {
      const Float value = V::set(tokens[t / GROUP][r + t % GROUP * x_stride]);
      MOEDGE_UNROLL
      for (size_t i = 0; i < N; ++i) sums[t][i] = V::fma(value, w[i], sums[t][i]);
    }
  }
  MOEDGE_UNROLL
  for (size_t t = 0; t < W; ++t)
    MOEDGE_UNROLL
    for (size_t i = 0; i < N; ++i) V::store(y + t * y_stride + i * LANES, sums[t][i]);
}

using StripBlock = void (*)(const float*, size_t, const float*, size_t, float*, size_t, bool, const Ahead&);

// Of each width, [0] unused.
template <size_t... W>
constexpr std::array<StripBlock, sizeof...(W) + 1> strip_blocks(std::index_sequence<W...>) {
  return {nullptr, &strip_block<W + 1>...};
}

// Rows that are read side by side from left to right. More are more streams than the processor follows; fewer load and
// store the sums more often.
constexpr size_t rows_at_once(size_t width) { return width > 8 ? 16 : 8; }

// How far ahead rows are prefetched: some 100 ns of the memory's bandwidth, and at least the next rows.
constexpr size_t AHEAD_BYTES = 8192;
// Lines that are prefetched before they are read where rows are read line by line, and lines of a row that is too short
// for it: most of what is ahead belongs to other blocks then.
constexpr size_t AHEAD_LINES = 64, SHORT_LINES = 16;

// Columns [begin, end) of the rows [first, last); `ahead` rows further those are prefetched that come next, at the end the
// first ones again, `following` columns to the right (0: there is no further window).
struct Window {
  size_t begin, end, first, last, ahead, following;
};

// Adds `count` rows, x [row][W], to N vectors of y [W][N] from column c on.
template <size_t W, size_t N>
inline void add_rows(const float* const* rows, size_t count, const float* x, float* y, size_t y_stride, size_t c) {
  Float sums[W][N];
  MOEDGE_UNROLL
  for (size_t w = 0; w < W; ++w)
    MOEDGE_UNROLL
    for (size_t i = 0; i < N; ++i) sums[w][i] = V::load(y + w * y_stride + c + i * LANES);
  for (size_t r = 0; r < count; ++r) {
    Float weights[N];
    MOEDGE_UNROLL
    for (size_t i = 0; i < N; ++i) weights[i] = V::load(rows[r] + c + i * LANES);
    MOEDGE_UNROLL
    for (size_t w = 0; w < W; ++w) {
      const Float value = V::set(x[r * W + w]);
      MOEDGE_UNROLL
      for (size_t i = 0; i < N; ++i) sums[w][i] = V::fma(value, weights[i], sums[w][i]);
    }
  }
  MOEDGE_UNROLL
  for (size_t w = 0; w < W; ++w)
    MOEDGE_UNROLL
    for (size_t i = 0; i < N; ++i) V::store(y + w * y_stride + c + i * LANES, sums[w][i]);
}

template <size_t W>
void float_pass(const FloatProduct& p, const Window& window, size_t begin, size_t count, size_t t) {
  constexpr size_t ROWS = rows_at_once(W);
  const float *rows[ROWS], *next[ROWS];
  const float* x = p.x + t * p.num_rows + begin * W;
  float* y = p.y + t * p.y_stride;
  const auto row = [&p](size_t r) { return p.weights + (p.rows ? p.rows[r] : r) * p.columns; };
  const bool over = begin + window.ahead >= window.last;  // `t` 0: the first of the tiles prefetches
  const size_t from = over ? window.first : begin + window.ahead, shift = over ? window.following : 0;
  const size_t coming = t || (over && !shift) ? 0 : std::min(ROWS, window.last - from);
  for (size_t r = 0; r < count; ++r) rows[r] = row(begin + r);
  for (size_t r = 0; r < coming; ++r) next[r] = row(from + r) + shift;
  size_t c = window.begin;
  for (; c + STRIP <= window.end; c += STRIP) {
    if (c % FLOATS == 0)
      for (size_t r = 0; r < coming; ++r)
        MOEDGE_UNROLL
        for (size_t i = 0; i < STRIP; i += FLOATS) prefetch(next[r] + c + i);
    if (count == ROWS)
      add_rows<W, 2>(rows, ROWS, x, y, p.y_stride, c);
    else
      add_rows<W, 2>(rows, count, x, y, p.y_stride, c);
  }
  if (c + LANES <= window.end) {
    for (size_t r = 0; r < coming; ++r) prefetch(next[r] + c);
    add_rows<W, 1>(rows, count, x, y, p.y_stride, c);
    c += LANES;
  }
  for (; c < window.end; ++c)
    for (size_t r = 0; r < count; ++r)
      MOEDGE_UNROLL
      for (size_t w = 0; w < W; ++w) y[w * p.y_stride + c] += x[r * W + w] * rows[r][c];
}

using FloatPass = void (*)(const FloatProduct&, const Window&, size_t, size_t, size_t);
template <size_t... W>
constexpr std::array<FloatPass, sizeof...(W) + 1> float_passes(std::index_sequence<W...>) {
  return {nullptr, &float_pass<W + 1>...};
}

// Rows of N vectors, for W tokens: the sums stay in registers.
template <size_t W, size_t N>
void float_narrow(const FloatProduct& p, size_t begin, size_t end) {
  Float sums[W][N];
  MOEDGE_UNROLL
  for (size_t w = 0; w < W; ++w)
    MOEDGE_UNROLL
    for (size_t i = 0; i < N; ++i) sums[w][i] = V::load(p.y + w * p.y_stride + i * LANES);
  for (size_t r = begin; r < end; ++r) {
    const float* row = p.weights + (p.rows ? p.rows[r] : r) * p.columns;
    Float weights[N];
    MOEDGE_UNROLL
    for (size_t i = 0; i < N; ++i) {
      prefetch(row + i * LANES + AHEAD_BYTES / 2 / sizeof(float));
      weights[i] = V::load(row + i * LANES);
    }
    MOEDGE_UNROLL
    for (size_t w = 0; w < W; ++w) {
      const Float value = V::set(p.x[r * W + w]);
      MOEDGE_UNROLL
      for (size_t i = 0; i < N; ++i) sums[w][i] = V::fma(value, weights[i], sums[w][i]);
    }
  }
  MOEDGE_UNROLL
  for (size_t w = 0; w < W; ++w)
    MOEDGE_UNROLL
    for (size_t i = 0; i < N; ++i) V::store(p.y + w * p.y_stride + i * LANES, sums[w][i]);
}

using FloatRows = void (*)(const FloatProduct&, size_t, size_t);
template <size_t N, size_t... W>
constexpr std::array<FloatRows, sizeof...(W) + 1> narrow_rows(std::index_sequence<W...>) {
  return {nullptr, &float_narrow<W + 1, N>...};
}
constexpr size_t NARROW_TOKENS = V::FLOAT_TILE / 2;

// Null where rows are not narrow.
inline FloatRows narrow_kernel(size_t columns, size_t tokens) {
  static constexpr std::array<std::array<FloatRows, NARROW_TOKENS + 1>, 4> TABLE = {
      narrow_rows<1>(std::make_index_sequence<NARROW_TOKENS>()),
      narrow_rows<2>(std::make_index_sequence<NARROW_TOKENS>()),
      narrow_rows<3>(std::make_index_sequence<NARROW_TOKENS>()),
      narrow_rows<4>(std::make_index_sequence<NARROW_TOKENS>())};
  const bool narrow = columns % LANES == 0 && columns / LANES <= TABLE.size() && tokens <= NARROW_TOKENS;
  return narrow ? TABLE[columns / LANES - 1][tokens] : nullptr;
}

void float_rows(const FloatProduct& p, size_t begin, size_t end) {
  if (const FloatRows narrow = narrow_kernel(p.columns, p.tokens)) return narrow(p, begin, end);
  static constexpr auto PASSES = float_passes(std::make_index_sequence<V::FLOAT_TILE>());
  const Tiles tiles(p.tokens, V::FLOAT_TILE), windows((p.columns + FLOATS - 1) / FLOATS, WINDOW / FLOATS);
  const size_t rows = rows_at_once(tiles.width(tiles.count - 1));
  const size_t pass_bytes = rows * std::min(p.columns, windows.width(0) * FLOATS) * sizeof(float);
  const size_t ahead = (AHEAD_BYTES + pass_bytes - 1) / pass_bytes * rows;
  for (size_t w = 0; w < windows.count; ++w) {
    const size_t first = windows.begin(w) * FLOATS, last = first + windows.width(w) * FLOATS;
    const Window window{first, std::min(last, p.columns), begin, end, ahead, w + 1 < windows.count ? last - first : 0};
    const size_t step = tiles.count > 1 ? TILES_WINDOW : window.end - window.begin;
    for (size_t r = begin; r < end; r += rows)
      for (size_t c = window.begin; c < window.end; c += step) {
        Window part = window;
        part.begin = c, part.end = std::min(c + step, window.end);
        for (size_t tile = 0; tile < tiles.count; ++tile)
          PASSES[tiles.width(tile)](p, part, r, std::min(rows, end - r), tiles.begin(tile));
      }
  }
}

// A part of a matrix that is copied to one place, strip after strip, [row][STRIP]: rows of a wide matrix are many pages
// apart, and where their distance is a power of two, a cache holds few of them. All strips of a panel are computed for a
// tile of tokens before the next tile, so its inputs come from the first level for all strips but one.
struct Panel {
  size_t begin, end;     // rows
  size_t column, width;

  // The next one of columns up to `last`: further down, then to the right.
  Panel following(const FloatProduct& p, size_t last, size_t height) const {
    if (end < p.num_rows) return {end, std::min(end + height, p.num_rows), column, width};
    return {0, column + width < last ? height : 0, column + width, std::min(width, last - column - width)};
  }
  size_t rows() const { return end - begin; }
  size_t strips() const { return (width + STRIP - 1) / STRIP; }
  const float* row(const FloatProduct& p, size_t r, size_t strip) const {
    return p.weights + (begin + r) * p.columns + column + strip * STRIP;
  }
  // Rows of a strip of it, counted from its first.
  Ahead ahead(const FloatProduct& p, size_t from, size_t to, size_t strip) const {
    to = std::min(to, rows());
    return {row(p, from, strip), p.columns, from < to && strip < strips() ? to - from : 0};
  }
  void copy(const FloatProduct& p, size_t from, size_t to, float* out) const {
    to = std::min(to, rows());
    for (size_t strip = 0; strip < strips(); ++strip, out += rows() * STRIP) {
      const size_t columns = std::min(STRIP, width - strip * STRIP);
      for (size_t r = from; r < to; ++r) {
        const float* values = row(p, r, strip);
        if (columns == STRIP) {
          V::store(out + r * STRIP, V::load(values));
          V::store(out + r * STRIP + LANES, V::load(values + LANES));
        } else {
          for (size_t i = 0; i < STRIP; ++i) out[r * STRIP + i] = i < columns ? values[i] : 0.0f;
        }
      }
    }
  }
};

inline void strip_of_tile(const FloatProduct& p, const Panel& panel, size_t strip, const float* weights,
                          const Tiles& tiles, size_t tile, const Ahead& ahead) {
  static constexpr auto BLOCKS = strip_blocks(std::make_index_sequence<V::FLOAT_TILE>());
  const size_t t = tiles.begin(tile), w = tiles.width(tile), columns = std::min(STRIP, panel.width - strip * STRIP);
  const float* x = p.x + t * p.x_stride + panel.begin;
  float* y = p.y + t * p.y_stride + panel.column + strip * STRIP;
  weights += strip * panel.rows() * STRIP;
  const bool add = panel.begin != 0;
  if (columns == STRIP) return BLOCKS[w](weights, panel.rows(), x, p.x_stride, y, p.y_stride, add, ahead);
  float edge[V::FLOAT_TILE * STRIP] = {};
  for (size_t i = 0; i < w && add; ++i) std::copy(y + i * p.y_stride, y + i * p.y_stride + columns, edge + i * STRIP);
  BLOCKS[w](weights, panel.rows(), x, p.x_stride, edge, STRIP, true, ahead);
  for (size_t i = 0; i < w; ++i) std::copy(edge + i * STRIP, edge + i * STRIP + columns, y + i * p.y_stride);
}

void float_strips(const FloatProduct& p, size_t begin, size_t end, float* scratch) {
  if (begin == end || p.num_rows == 0) return;
  const Tiles tiles(p.tokens, V::FLOAT_TILE);
  // Nothing is computed while the first panel is copied, so few tokens have a narrow one.
  const bool wide = p.tokens > WIDE_PANEL_TOKENS;
  const size_t height = Tiles(p.num_rows, wide ? WIDE_PANEL_ROWS : PANEL_ROWS).width(0);
  float *now = scratch, *next = scratch + FLOAT_STRIP_SCRATCH / 2;
  Panel panel{0, height, begin, std::min(STRIP * (wide ? WIDE_PANEL_STRIPS : 1), end - begin)};
  panel.copy(p, 0, height, now);
  while (panel.begin < panel.end) {
    const Panel coming = panel.following(p, end, height);
    // With each tile a slice of the next panel comes in: prefetched beside one tile, copied after the next.
    const size_t slice = tiles.count > 1 ? (height + tiles.count - 2) / (tiles.count - 1) : height;
    for (size_t tile = 0; tile < tiles.count; ++tile) {
      for (size_t strip = 0; strip < panel.strips(); ++strip)
        strip_of_tile(p, panel, strip, now, tiles, tile, coming.ahead(p, tile * slice, (tile + 1) * slice, strip));
      if (tile) coming.copy(p, (tile - 1) * slice, tile * slice, next);
    }
    if (tiles.count == 1) coming.copy(p, 0, height, next);
    panel = coming;
    std::swap(now, next);
  }
}

// ---- integers

// Four float scales, of the columns that the four vectors of a part have.
template <bool HALF>
inline void load_scales(const IntProduct& p, size_t row, size_t column, Float out[4]) {
  const size_t at = row * p.columns + column;
  MOEDGE_UNROLL
  for (size_t i = 0; i < 4; ++i)
    out[i] = HALF ? V::load_half(static_cast<const uint16_t*>(p.scales) + at + 16 * i)
                  : V::load(static_cast<const float*>(p.scales) + at + 16 * i);
}

template <bool FOUR>
inline void add_scaled(const Int sums[4], int32_t start, const Float scales[4], float x_scale, float* y) {
  const Float factor = V::set(x_scale);
  const Int begin = V::set_int(start);
  MOEDGE_UNROLL
  for (size_t i = 0; i < 4; ++i) {
    const Float total = V::to_float(V::total<FOUR>(sums[i], begin));
    V::store(y + 16 * i, V::fma(total, V::mul(scales[i], factor), V::load(y + 16 * i)));
  }
}

// The rows of a block, and lines that are prefetched beside them: one with each row, as a processor waits for some 20
// lines at once and holds up what follows until it can take the next one. NEAR: few tokens, which read them soon.
struct Rows {
  const uint8_t* now[BLOCK];
  const uint8_t* next[BLOCK];   // rows of the block that comes next, then any others up to the number of `now`
  const uint8_t* const* ahead;  // one of both ...
  size_t ahead_at;              // ... and where in these rows the line is
  size_t more;                  // rows of `ahead` that `now` has no row for

  template <bool NEAR>
  void beside(size_t cell) const {
    MOEDGE_UNROLL
    for (size_t r = 0; r < CELL; ++r) prefetch<NEAR>(ahead[CELL * cell + r] + ahead_at);
  }
  template <bool NEAR>
  void behind(size_t cells) const {
    for (size_t r = 0; r < more; ++r) prefetch<NEAR>(ahead[CELL * cells + r] + ahead_at);
  }
};

// One line of the rows of block b for W tokens, interleaved in registers: the least work for few tokens.
template <bool FOUR, bool HALF, size_t W>
inline void line_direct(const IntProduct& p, size_t b, const Rows& rows, size_t line, const int32_t* x) {
  constexpr size_t NIBBLES = FOUR ? 2 : 1, SUMS = 4 * NIBBLES;
  const Block block = p.blocks[b];
  const size_t cells = block.end - block.begin;
  MOEDGE_UNROLL
  for (size_t part = 0; part < PARTS; ++part) {
    Int sums[W][SUMS];
    MOEDGE_UNROLL
    for (size_t w = 0; w < W; ++w)
      MOEDGE_UNROLL
      for (size_t i = 0; i < SUMS; ++i) sums[w][i] = V::set_int(0);
    for (size_t cell = 0; cell < cells; ++cell) {
      Int bytes[4];
      if (part == 0) rows.beside<true>(cell);
      V::interleave(rows.now + 4 * cell, line * LINE + part * BYTES, bytes);
      MOEDGE_UNROLL
      for (size_t w = 0; w < W; ++w) {
        const Int value = V::set_int(x[cell * W + w]);
        MOEDGE_UNROLL
        for (size_t i = 0; i < 4; ++i) {
          sums[w][i] = V::dot<FOUR>(sums[w][i], FOUR ? V::low(bytes[i]) : V::whole(bytes[i]), value);
          if (FOUR) sums[w][SUMS - 4 + i] = V::dot<FOUR>(sums[w][SUMS - 4 + i], V::high(bytes[i]), value);
        }
      }
    }
    if (part == 0) rows.behind<true>(cells);
    MOEDGE_UNROLL
    for (size_t nibble = 0; nibble < NIBBLES; ++nibble) {
      const size_t column = (line * NIBBLES + nibble) * LINE + part * LANES;
      Float scales[4];
      load_scales<HALF>(p, block.scale_row, column, scales);
      MOEDGE_UNROLL
      for (size_t w = 0; w < W; ++w)
        add_scaled<FOUR>(sums[w] + 4 * nibble, p.starts[b * W + w], scales, p.x_scales[b * W + w],
                         p.y + w * p.y_stride + column);
    }
  }
}

// The same from bytes that are interleaved already, [cell][4].
template <bool FOUR, bool HALF, size_t W>
inline void part_of_tile(const IntProduct& p, size_t b, const Int* bytes, const Float* scales, size_t column,
                         const int32_t* x, size_t t) {
  const size_t cells = p.blocks[b].end - p.blocks[b].begin;
  Int sums[W][4];
  MOEDGE_UNROLL
  for (size_t w = 0; w < W; ++w)
    MOEDGE_UNROLL
    for (size_t i = 0; i < 4; ++i) sums[w][i] = V::set_int(0);
  for (size_t cell = 0; cell < cells; ++cell) {
    Int values[4];
    MOEDGE_UNROLL
    for (size_t i = 0; i < 4; ++i) values[i] = bytes[4 * cell + i];
    MOEDGE_UNROLL
    for (size_t w = 0; w < W; ++w) {
      const Int value = V::set_int(x[cell * W + w]);
      MOEDGE_UNROLL
      for (size_t i = 0; i < 4; ++i) sums[w][i] = V::dot<FOUR>(sums[w][i], values[i], value);
    }
  }
  MOEDGE_UNROLL
  for (size_t w = 0; w < W; ++w) {
    const size_t at = b * p.tokens + t + w;
    add_scaled<FOUR>(sums[w], p.starts[at], scales, p.x_scales[at], p.y + (t + w) * p.y_stride + column);
  }
}

using PartOfTile = void (*)(const IntProduct&, size_t, const Int*, const Float*, size_t, const int32_t*, size_t);
template <bool FOUR, bool HALF, size_t... W>
constexpr std::array<PartOfTile, sizeof...(W) + 1> parts_of_tile(std::index_sequence<W...>) {
  return {nullptr, &part_of_tile<FOUR, HALF, W + 1>...};
}

// One line of a block's rows for any number of tokens: interleaved once, then tile after tile.
template <bool FOUR, bool HALF, bool NEAR>
inline void line_of_tiles(const IntProduct& p, size_t b, const Rows& rows, size_t line, const Tiles& tiles) {
  static constexpr auto KERNELS = parts_of_tile<FOUR, HALF>(std::make_index_sequence<V::INT_TILE>());
  constexpr size_t NIBBLES = FOUR ? 2 : 1;
  const Block& block = p.blocks[b];
  const size_t cells = block.end - block.begin;
  Int bytes[NIBBLES][PARTS][CELLS * 4];
  MOEDGE_UNROLL
  for (size_t part = 0; part < PARTS; ++part)
    for (size_t cell = 0; cell < cells; ++cell) {
      Int four[4];
      if (part == 0) rows.beside<NEAR>(cell);
      V::interleave(rows.now + 4 * cell, line * LINE + part * BYTES, four);
      MOEDGE_UNROLL
      for (size_t i = 0; i < 4; ++i) {
        bytes[0][part][4 * cell + i] = FOUR ? V::low(four[i]) : V::whole(four[i]);
        if (FOUR) bytes[NIBBLES - 1][part][4 * cell + i] = V::high(four[i]);
      }
    }
  rows.behind<NEAR>(cells);
  MOEDGE_UNROLL
  for (size_t nibble = 0; nibble < NIBBLES; ++nibble)
    MOEDGE_UNROLL
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

inline void row_pointers(const IntProduct& p, size_t b, const uint8_t** out) {
  const size_t begin = 4 * p.blocks[b].begin, end = 4 * p.blocks[b].end;
  for (size_t r = begin; r < end; ++r) out[r - begin] = p.weights + p.rows[r] * p.row_bytes;
}

inline size_t num_rows(const IntProduct& p, size_t b) { return CELL * (p.blocks[b].end - p.blocks[b].begin); }

template <bool FOUR, bool HALF>
inline void prefetch_scales(const IntProduct& p, size_t b, size_t line) {
  constexpr size_t SIZE = (HALF ? 2 : 4) * LINE * (FOUR ? 2 : 1);
  const char* row = static_cast<const char*>(p.scales) + p.blocks[b].scale_row * p.columns * (HALF ? 2 : 4);
  MOEDGE_UNROLL
  for (size_t i = 0; i < SIZE; i += LINE) prefetch<true>(row + line * SIZE + i);
}

// Which rows come after those of a block. Both tell how many more there are than the block has.
struct NextRows {
  const IntProduct& p;
  size_t end;
  size_t seen = 0;  // the first cell that several() has not given yet

  // Those of one block.
  size_t of(size_t b, size_t then, Rows& rows) const {
    row_pointers(p, b, rows.now);
    row_pointers(p, then, rows.next);
    return filled(num_rows(p, b), num_rows(p, then), rows);
  }

  // As many as the block has, or as are needed for AHEAD_BYTES, of blocks up to `end`.
  size_t several(size_t b, Rows& rows) {
    const size_t ahead = std::max(CELLS, AHEAD_BYTES / (CELL * p.row_bytes));
    const size_t until = std::min<size_t>(p.blocks[b].end + ahead, p.blocks[end - 1].end);
    row_pointers(p, b, rows.now);
    size_t coming = 0;
    for (seen = std::max<size_t>(seen, p.blocks[b].end); seen < until && coming < BLOCK; ++seen)
      for (size_t r = 0; r < CELL; ++r) rows.next[coming++] = p.weights + p.rows[CELL * seen + r] * p.row_bytes;
    if (!coming) rows.next[0] = rows.now[0];
    return filled(num_rows(p, b), coming, rows);
  }

 private:
  static size_t filled(size_t count, size_t coming, Rows& rows) {
    for (size_t r = std::max<size_t>(coming, 1); r < count; ++r) rows.next[r] = rows.next[0];
    return coming > count ? coming - count : 0;
  }
};

// `line` is called for each line of each block: window by window, in it block by block, rows from left to right. What is
// AHEAD_LINES further on that way is prefetched; with short rows the same line of the rows that come next.
template <bool FOUR, bool HALF, typename Line>
inline void each_line(const IntProduct& p, size_t begin, size_t end, Line line) {
  if (begin == end) return;
  Rows rows;
  NextRows next{p, end};
  const bool brief = p.lines <= SHORT_LINES;
  const Tiles windows(p.lines, WINDOW / LINE / (FOUR ? 2 : 1));
  for (size_t w = 0; w < windows.count; ++w) {
    const size_t first = windows.begin(w), last = first + windows.width(w);
    for (size_t b = begin; b < end; ++b) {
      // Behind this block: the next one, or the first one in the next window, or nothing but its own last line.
      const bool below = b + 1 < end, right = !below && w + 1 < windows.count;
      const size_t then = below ? b + 1 : right ? begin : b, to = below || brief ? first : last;
      const size_t more = brief ? next.several(b, rows) : next.of(b, then, rows);
      const size_t count = num_rows(p, b), whole = last - first;
      const size_t distance = brief ? whole : std::min((AHEAD_LINES + count - 1) / count, whole);
      for (size_t i = first; i < last; ++i) {
        const size_t at = i + distance;
        const bool inside = at < last;
        const size_t ahead = inside ? at : std::min(to + (at - last), p.lines - 1);
        rows.ahead = inside ? rows.now : rows.next;
        rows.ahead_at = ahead * LINE;
        rows.more = inside ? 0 : more;
        prefetch_scales<FOUR, HALF>(p, inside ? b : then, ahead);
        line(b, rows, i);
      }
    }
  }
}

template <bool FOUR, bool HALF, size_t W>
void int_rows_for(const IntProduct& p, size_t begin, size_t end) {
  each_line<FOUR, HALF>(p, begin, end, [&p](size_t b, const Rows& rows, size_t line) {
    line_direct<FOUR, HALF, W>(p, b, rows, line, p.x + p.blocks[b].begin * W);
  });
}

// What is prefetched where one token's rows are read almost all: whole rows one after the other, which memory gives
// fastest, as many lines as are read.
class Following {
 public:
  // Rows [first, end) of p.rows in each window; `ahead` lines of them at once.
  Following(const IntProduct& p, const Tiles& windows, size_t first, size_t end, size_t ahead)
      : p_(p), windows_(windows), first_(first), end_(end), row_(first) {
    start_row();
    lines(ahead);
  }

  void lines(size_t count) {
    for (size_t i = 0; i < count; ++i, at_ += LINE) {
      if (at_ == until_ && !next_row()) return;
      prefetch<true>(at_);
    }
  }

 private:
  bool next_row() {
    if (row_ + 1 < end_)
      ++row_;
    else if (window_ + 1 < windows_.count)
      row_ = first_, ++window_;
    else
      return false;
    start_row();
    return true;
  }
  void start_row() {
    at_ = p_.weights + p_.rows[row_] * p_.row_bytes + windows_.begin(window_) * LINE;
    until_ = at_ + windows_.width(window_) * LINE;
  }

  const IntProduct& p_;
  const Tiles& windows_;
  size_t first_, end_, row_, window_ = 0;
  const uint8_t *at_, *until_;
};

// The four rows of a cell for one token, in lines [first, last). What a block has summed is in `sums`
// [line][PARTS][SUMS], which its first cell begins; its last one adds them to y.
template <bool FOUR, bool HALF, bool BEGINS, bool ENDS>
inline void whole_cell(const IntProduct& p, size_t b, size_t cell, size_t first, size_t last, Following& following,
                       Int* sums) {
  constexpr size_t NIBBLES = FOUR ? 2 : 1, SUMS = 4 * NIBBLES;
  const Int value = V::set_int(p.x[cell]);
  const uint8_t* rows[CELL];
  MOEDGE_UNROLL
  for (size_t r = 0; r < CELL; ++r) rows[r] = p.weights + p.rows[CELL * cell + r] * p.row_bytes;
  for (size_t line = first; line < last; ++line) {
    following.lines(CELL);
    if (BEGINS) prefetch_scales<FOUR, HALF>(p, b, line);
    MOEDGE_UNROLL
    for (size_t part = 0; part < PARTS; ++part, sums += SUMS) {
      Int bytes[4], now[SUMS];
      V::interleave(rows, line * LINE + part * BYTES, bytes);
      MOEDGE_UNROLL
      for (size_t i = 0; i < SUMS; ++i) {
        const Int weights = !FOUR ? V::whole(bytes[i]) : i < 4 ? V::low(bytes[i]) : V::high(bytes[i - 4]);
        now[i] = V::dot<FOUR>(BEGINS ? V::set_int(0) : sums[i], weights, value);
        if (!ENDS) sums[i] = now[i];
      }
      MOEDGE_UNROLL
      for (size_t nibble = 0; nibble < NIBBLES && ENDS; ++nibble) {
        const size_t column = (line * NIBBLES + nibble) * LINE + part * LANES;
        Float scales[4];
        load_scales<HALF>(p, p.blocks[b].scale_row, column, scales);
        add_scaled<FOUR>(now + 4 * nibble, p.starts[b], scales, p.x_scales[b], p.y + column);
      }
    }
  }
}

// One token, of which almost all rows are read: cell after cell, so that few rows are read side by side.
template <bool FOUR, bool HALF>
void int_rows_whole(const IntProduct& p, size_t begin, size_t end) {
  using Cell = void (*)(const IntProduct&, size_t, size_t, size_t, size_t, Following&, Int*);
  static constexpr Cell CELL_OF[2][2] = {{&whole_cell<FOUR, HALF, false, false>, &whole_cell<FOUR, HALF, false, true>},
                                         {&whole_cell<FOUR, HALF, true, false>, &whole_cell<FOUR, HALF, true, true>}};
  constexpr size_t MOST_LINES = WINDOW / LINE / (FOUR ? 2 : 1);
  Int sums[MOST_LINES * PARTS * (FOUR ? 8 : 4)];
  const Tiles windows(p.lines, MOST_LINES);
  const size_t ahead = CELL * windows.width(0) + AHEAD_LINES / 2;  // the cell that comes next, and some more
  Following following(p, windows, CELL * p.blocks[begin].begin, CELL * p.blocks[end - 1].end, ahead);
  for (size_t w = 0; w < windows.count; ++w) {
    const size_t first = windows.begin(w), last = first + windows.width(w);
    for (size_t b = begin; b < end; ++b) {
      const Block& block = p.blocks[b];
      for (size_t cell = block.begin; cell < block.end; ++cell)
        CELL_OF[cell == block.begin][cell + 1 == block.end](p, b, cell, first, last, following, sums);
    }
  }
}

// Whether so many of the rows of some blocks are read that it takes less time to read whole rows one after the other
// (measured, docs/kernels-cpu.md); of short rows more of what is left out lies in what a processor fetches anyway.
inline bool almost_all(const IntProduct& p, size_t begin, size_t end) {
  if (begin == end) return false;
  const size_t cells = p.blocks[end - 1].end - p.blocks[begin].begin, percent = p.lines <= SHORT_LINES ? 55 : 67;
  return 100 * cells >= percent * CELLS * (end - begin);
}

using IntRows = void (*)(const IntProduct&, size_t, size_t);
template <bool FOUR, bool HALF, size_t... W>
constexpr std::array<IntRows, sizeof...(W) + 1> int_rows_table(std::index_sequence<W...>) {
  return {nullptr, &int_rows_for<FOUR, HALF, W + 1>...};
}

template <bool FOUR, bool HALF>
void int_rows_of(const IntProduct& p, size_t begin, size_t end) {
  if (p.tokens == 1 && almost_all(p, begin, end)) return int_rows_whole<FOUR, HALF>(p, begin, end);
  // Four bits have twice the sums: of one token less they still fit into registers.
  constexpr size_t MOST = FOUR ? V::INT_TILE - 1 : V::INT_TILE;
  static constexpr auto DIRECT = int_rows_table<FOUR, HALF>(std::make_index_sequence<MOST>());
  if (p.tokens <= MOST) return DIRECT[p.tokens](p, begin, end);
  const Tiles tiles(p.tokens, V::INT_TILE);
  each_line<FOUR, HALF>(p, begin, end, [&p, &tiles](size_t b, const Rows& rows, size_t line) {
    line_of_tiles<FOUR, HALF, true>(p, b, rows, line, tiles);
  });
}

template <bool FOUR, bool HALF>
void int_strips_of(const IntProduct& p, size_t begin, size_t end, size_t num_blocks) {
  constexpr size_t COLUMNS = LINE * (FOUR ? 2 : 1);
  const Tiles tiles(p.tokens, V::INT_TILE);
  for (size_t t = 0; t < p.tokens; ++t)
    std::fill(p.y + t * p.y_stride + begin * COLUMNS, p.y + t * p.y_stride + end * COLUMNS, 0.0f);
  Rows rows;
  for (size_t line = begin; line < end; ++line) {
    NextRows next{p, num_blocks};
    rows.ahead = rows.next;
    rows.ahead_at = line * LINE;
    for (size_t b = 0; b < num_blocks; ++b) {
      rows.more = next.several(b, rows);
      if (b + 1 < num_blocks) prefetch_scales<FOUR, HALF>(p, b + 1, line);
      line_of_tiles<FOUR, HALF, false>(p, b, rows, line, tiles);
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

// ---- integers of narrow matrices, interleaved when they were stored

// y [W][N vectors] of columns from `column` on, all blocks.
template <bool FOUR, bool HALF, size_t W, size_t N>
inline void cells_of_tile(const IntProduct& p, size_t num_blocks, size_t column, size_t t) {
  constexpr size_t NIBBLES = FOUR ? 2 : 1;
  const int32_t* x = p.x + t * p.num_cells;
  const uint8_t* weights = p.weights + column * CELL;
  Float y[W][N];
  MOEDGE_UNROLL
  for (size_t w = 0; w < W; ++w)
    MOEDGE_UNROLL
    for (size_t i = 0; i < N; ++i) y[w][i] = V::set(0.0f);
  for (size_t b = 0; b < num_blocks; ++b) {
    Int sums[W][N];
    MOEDGE_UNROLL
    for (size_t w = 0; w < W; ++w)
      MOEDGE_UNROLL
      for (size_t i = 0; i < N; ++i) sums[w][i] = V::set_int(0);
    for (size_t stored = 0; stored < CELLS / NIBBLES; ++stored, weights += p.row_bytes) {
      MOEDGE_UNROLL
      for (size_t i = 0; i < N; ++i) {
        prefetch(weights + i * BYTES + AHEAD_BYTES / 2);
        const Int bytes = V::bytes(weights + i * BYTES);
        MOEDGE_UNROLL
        for (size_t w = 0; w < W; ++w) {
          const Int first = V::set_int(x[stored * NIBBLES * W + w]);
          sums[w][i] = V::dot<FOUR>(sums[w][i], FOUR ? V::low(bytes) : V::whole(bytes), first);
          if (!FOUR) continue;
          sums[w][i] = V::dot<FOUR>(sums[w][i], V::high(bytes), V::set_int(x[(stored * NIBBLES + NIBBLES - 1) * W + w]));
        }
      }
    }
    x += CELLS * W;
    const size_t at = b * p.columns + column;
    MOEDGE_UNROLL
    for (size_t i = 0; i < N; ++i) {
      const Float scale = HALF ? V::load_half(static_cast<const uint16_t*>(p.scales) + at + i * LANES)
                               : V::load(static_cast<const float*>(p.scales) + at + i * LANES);
      MOEDGE_UNROLL
      for (size_t w = 0; w < W; ++w) {
        const size_t token = b * p.tokens + t + w;
        const Float total = V::to_float(V::total<FOUR>(sums[w][i], V::set_int(p.starts[token])));
        y[w][i] = V::fma(total, V::mul(scale, V::set(p.x_scales[token])), y[w][i]);
      }
    }
  }
  MOEDGE_UNROLL
  for (size_t w = 0; w < W; ++w)
    MOEDGE_UNROLL
    for (size_t i = 0; i < N; ++i) V::store(p.y + (t + w) * p.y_stride + column + i * LANES, y[w][i]);
}

template <bool FOUR, bool HALF, size_t W>
inline void cells_of_tokens(const IntProduct& p, size_t num_blocks, size_t t) {
  for (size_t column = 0; column < p.columns;) {
    const size_t left = (p.columns - column) / LANES;
    if (left >= 4)
      cells_of_tile<FOUR, HALF, W, 4>(p, num_blocks, column, t), column += 4 * LANES;
    else if (left == 3)
      cells_of_tile<FOUR, HALF, W, 3>(p, num_blocks, column, t), column += 3 * LANES;
    else if (left == 2)
      cells_of_tile<FOUR, HALF, W, 2>(p, num_blocks, column, t), column += 2 * LANES;
    else
      cells_of_tile<FOUR, HALF, W, 1>(p, num_blocks, column, t), column += LANES;
  }
}

template <bool FOUR, bool HALF>
inline void int_cells_of(const IntProduct& p, size_t num_blocks) {
  const Tiles tiles(p.tokens, CELL_TILE);
  for (size_t tile = 0; tile < tiles.count; ++tile)
    if (tiles.width(tile) == 2)
      cells_of_tokens<FOUR, HALF, 2>(p, num_blocks, tiles.begin(tile));
    else
      cells_of_tokens<FOUR, HALF, 1>(p, num_blocks, tiles.begin(tile));
}

template <bool FOUR>
void int_cells(const IntProduct& p, size_t num_blocks) {
  p.half ? int_cells_of<FOUR, true>(p, num_blocks) : int_cells_of<FOUR, false>(p, num_blocks);
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

void mask(const float* x, const float* threshold, float ramp, size_t size, float* out) {
  if (ramp > 0) {
    for (size_t i = 0; i < size; ++i) {
      // In this order 0 / 0 and infinite / infinite, at a threshold of 0 or without end, decide nothing.
      const float size_of = float_of(bits_of(x[i]) & 0x7fffffffu);
      const float part = (size_of - threshold[i]) / (threshold[i] * ramp);
      out[i] = x[i] * (size_of < threshold[i] ? 0.0f : part < 1.0f ? part : 1.0f);
    }
    return;
  }
  for (size_t i = 0; i < size; ++i) out[i] = float_of(bits_of(x[i]) & 0x7fffffffu) < threshold[i] ? 0.0f : x[i];
}

void round_blocks(const float* x, size_t blocks, bool four, int8_t* q, float* scales, int32_t* starts) {
  constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: added, it leaves an integer in the low bits, ties to even
  for (size_t b = 0; b < blocks; ++b, x += BLOCK, q += BLOCK) {
    int32_t most = 0;  // non-negative floats are ordered as their bits
    for (size_t i = 0; i < BLOCK; ++i) most = std::max(most, static_cast<int32_t>(bits_of(x[i]) & 0x7fffffffu));
    const bool finite = most < 0x7f800000;
    const float peak = float_of(most);
    const float inverse = finite && peak > 0 ? 127.0f / peak : 0.0f;
    const float factor = inverse <= 3.402823466e38f ? inverse : 0.0f;  // below 4e-37 nothing is left
    scales[b] = finite ? peak / 127.0f : float_of(0x7fc00000u);
    int32_t sum = 0, negative = 0;
    for (size_t i = 0; i < BLOCK; ++i) {
      const float value = finite ? x[i] * factor : 0.0f;
      const int32_t level = static_cast<int32_t>(bits_of(value + MAGIC)) - static_cast<int32_t>(bits_of(MAGIC));
      q[i] = static_cast<int8_t>(level);
      sum += level;
      negative += level < 0 ? level : 0;
    }
    starts[b] = four ? V::start<true>(sum, negative) : V::start<false>(sum, negative);
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
   &int_strips<false>, &int_strips<true>, &int_cells<false>, &int_cells<true>, &mask, &round_blocks, &glu}
