#include "product.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace moedge {
namespace {

// What a thread keeps. Worker threads get pointers into the caller's; they never name it themselves.
struct Memory {
  Buffer rows, source, x, q, scales, sums, blocks, x_scales, starts, parts;
};
thread_local Memory memory;

// Processors that this process may use. The number of parts of a product depends on it and not on the threads of the
// session, so numbers do not change with those.
size_t processors() {
  static const size_t count = [] {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return static_cast<size_t>(std::max(1, CPU_COUNT(&set)));
#endif
    return static_cast<size_t>(std::max(1u, std::thread::hardware_concurrency()));
  }();
  return count;
}

constexpr size_t MOST_PARTS = 16;
constexpr size_t LEAST_BYTES = 1 << 16;  // of weights in a part: less is not worth waking a thread for

// How many parts the rows of a product are cut into. Each has sums of its own, which must be few beside the weights.
size_t parts_of(size_t bytes, size_t sums_bytes) {
  const size_t most = std::min({processors(), MOST_PARTS, bytes / LEAST_BYTES, bytes / (4 * sums_bytes + 1)});
  return std::max<size_t>(most, 1);
}

// Tasks of a product that is cut by columns: some more than threads, as one may be held up.
size_t tasks_of(size_t units) { return std::max<size_t>(1, std::min(units, 2 * std::min(processors(), MOST_PARTS))); }

// Runs part(p, sums [tokens][columns]) for p < parts, each with zeroed sums of its own, and adds them into y.
template <typename Part>
void sum_of_parts(const Threads& threads, size_t parts, size_t tokens, size_t columns, float* y, size_t y_stride,
                  Part part) {
  const size_t size = tokens * y_stride;
  float* more = parts > 1 ? memory.parts.get<float>((parts - 1) * size) : nullptr;
  threads.run(parts, [=](size_t p) {
    float* sums = p ? more + (p - 1) * size : y;
    for (size_t t = 0; t < tokens; ++t) std::memset(sums + t * y_stride, 0, columns * sizeof(float));
    part(p, sums);
  });
  for (size_t p = 1; p < parts; ++p)
    for (size_t t = 0; t < tokens; ++t) {
      const float* from = more + (p - 1) * size + t * y_stride;
      float* to = y + t * y_stride;
      for (size_t c = 0; c < columns; ++c) to[c] += from[c];
    }
}

// Puts x [tokens][stride] into tiles, element [row][token in tile].
void into_tiles(const float* x, size_t stride, const uint32_t* rows, size_t num_rows, const Tiles& tiles, size_t tile,
                float* out) {
  const size_t t = tiles.begin(tile), width = tiles.width(tile);
  out += t * num_rows;
  x += t * stride;
  for (size_t r = 0; r < num_rows; ++r)
    for (size_t w = 0; w < width; ++w) *out++ = x[w * stride + (rows ? rows[r] : r)];
}

// The same of cells of four bytes.
void into_tiles(const int8_t* q, size_t stride, const uint32_t* source, size_t num_cells, const Tiles& tiles,
                size_t tile, int32_t* out) {
  const size_t t = tiles.begin(tile), width = tiles.width(tile);
  out += t * num_cells;
  q += t * stride;
  for (size_t c = 0; c < num_cells; ++c)
    for (size_t w = 0; w < width; ++w) {
      int8_t four[4];
      for (size_t i = 0; i < 4; ++i) four[i] = q[w * stride + (source ? source[4 * c + i] : 4 * c + i)];
      std::memcpy(out++, four, 4);
    }
}

// The rounded inputs of an integer product.
struct Rounded {
  int8_t* q;      // [tokens][stride]; the last bytes of a row are zero
  size_t stride;
  float* scales;  // [tokens][blocks]
  int32_t* sums;  // [tokens][blocks]
};

constexpr size_t ZEROS = 64;  // bytes behind the inputs of a token

Rounded rounded(size_t tokens, size_t blocks) {
  const size_t stride = blocks * BLOCK + ZEROS;
  return {memory.q.get<int8_t>(tokens * stride), stride, memory.scales.get<float>(tokens * blocks),
          memory.sums.get<int32_t>(tokens * blocks)};
}

void round_token(const Kernels& kernels, const Rounded& to, const float* x, size_t blocks, size_t t) {
  int8_t* q = to.q + t * to.stride;
  kernels.round(x + t * blocks * BLOCK, blocks, q, to.scales + t * blocks, to.sums + t * blocks);
  std::memset(q + blocks * BLOCK, 0, ZEROS);
}

// A token with an input that is not finite has no finite result: rounding cannot tell infinite from not a number.
void poison(const float* scales, size_t blocks, float* y, size_t columns) {
  for (size_t b = 0; b < blocks; ++b)
    if (!std::isfinite(scales[b])) {
      std::fill(y, y + columns, std::numeric_limits<float>::quiet_NaN());
      return;
    }
}

IntProduct integers(const Matrix& matrix, size_t tokens, float* y, size_t y_stride) {
  IntProduct p{};
  p.weights = static_cast<const uint8_t*>(matrix.weights);
  p.row_bytes = matrix.row_bytes();
  p.columns = matrix.columns();
  p.scales = matrix.scales;
  p.half = matrix.half;
  p.tokens = tokens;
  p.y = y;
  p.y_stride = y_stride;
  return p;
}

// Which rows of one block any token needs: writes their cells, returns how many.
size_t cells_of(const Rounded& x, size_t tokens, size_t block, uint32_t* rows, uint32_t* source) {
  uint8_t any[BLOCK];
  std::memcpy(any, x.q + block * BLOCK, BLOCK);
  for (size_t t = 1; t < tokens; ++t)
    for (size_t i = 0; i < BLOCK; ++i) any[i] |= static_cast<uint8_t>(x.q[t * x.stride + block * BLOCK + i]);
  size_t count = 0;
  for (size_t i = 0; i < BLOCK; ++i) {
    rows[count] = static_cast<uint32_t>(block * BLOCK + i);
    count += any[i] != 0;
  }
  const size_t padded = (count + CELL - 1) / CELL * CELL;
  for (size_t i = 0; i < count; ++i) source[i] = rows[i];
  for (size_t i = count; i < padded; ++i) {
    rows[i] = rows[0];
    source[i] = static_cast<uint32_t>(x.stride - ZEROS);
  }
  return padded / CELL;
}

}  // namespace

void Product::choose(const float* x, const float* threshold, size_t size, float* out, size_t stride) const {
  if (threshold)
    kernels_.mask(x, threshold, size, out);
  else if (x != out)
    std::memcpy(out, x, size * sizeof(float));
  std::fill(out + size, out + stride, 0.0f);
}

void Product::multiply(const Matrix& matrix, const float* x, size_t tokens, float* y, size_t y_stride) const {
  const bool few = tokens <= few_tokens(matrix.bits);
  if (matrix.bits == 32)
    few ? few_floats(matrix, x, tokens, y, y_stride) : many_floats(matrix, x, tokens, y, y_stride);
  else
    few ? few_integers(matrix, x, tokens, y, y_stride) : many_integers(matrix, x, tokens, y, y_stride);
}

void Product::few_floats(const Matrix& matrix, const float* x, size_t tokens, float* y, size_t y_stride) const {
  const size_t stride = stride_of(matrix.inputs);
  uint32_t* rows = memory.rows.get<uint32_t>(matrix.inputs + 1);
  size_t count = 0;
  for (size_t i = 0; i < matrix.inputs; ++i) {
    bool any = false;
    for (size_t t = 0; t < tokens; ++t) any |= x[t * stride + i] != 0;  // also not a number
    rows[count] = static_cast<uint32_t>(i);
    count += any;
  }
  const Tiles tiles(tokens, kernels_.float_tile);
  float* packed = memory.x.get<float>(tokens * count);
  for (size_t tile = 0; tile < tiles.count; ++tile) into_tiles(x, stride, rows, count, tiles, tile, packed);
  FloatProduct p{static_cast<const float*>(matrix.weights), matrix.outputs, rows, count, packed, tokens, y, y_stride};
  const size_t parts = parts_of(count * matrix.row_bytes(), tokens * matrix.row_bytes());
  const Kernels& kernels = kernels_;
  sum_of_parts(threads_, parts, tokens, matrix.outputs, y, y_stride, [=, &kernels](size_t part, float* sums) {
    FloatProduct mine = p;
    mine.y = sums;
    kernels.float_rows(mine, count * part / parts, count * (part + 1) / parts);
  });
}

void Product::many_floats(const Matrix& matrix, const float* x, size_t tokens, float* y, size_t y_stride) const {
  const size_t stride = stride_of(matrix.inputs), count = matrix.inputs;
  const Tiles tiles(tokens, kernels_.float_tile);
  float* packed = memory.x.get<float>(tokens * count);
  threads_.run(tiles.count, [=](size_t tile) { into_tiles(x, stride, nullptr, count, tiles, tile, packed); });
  const FloatProduct p{static_cast<const float*>(matrix.weights), matrix.outputs, nullptr, count, packed, tokens, y,
                       y_stride};
  const size_t strips = (matrix.outputs + FLOAT_STRIP_COLUMNS - 1) / FLOAT_STRIP_COLUMNS, tasks = tasks_of(strips);
  float* scratch = memory.parts.get<float>(tasks * FLOAT_STRIP_SCRATCH);
  const Kernels& kernels = kernels_;
  threads_.run(tasks, [=, &kernels](size_t task) {
    const size_t begin = strips * task / tasks * FLOAT_STRIP_COLUMNS;
    const size_t end = std::min(strips * (task + 1) / tasks * FLOAT_STRIP_COLUMNS, p.columns);
    kernels.float_strips(p, begin, end, scratch + task * FLOAT_STRIP_SCRATCH);
  });
}

void Product::few_integers(const Matrix& matrix, const float* x, size_t tokens, float* y, size_t y_stride) const {
  const size_t all = matrix.blocks();
  const Rounded round = rounded(tokens, all);
  for (size_t t = 0; t < tokens; ++t) round_token(kernels_, round, x, all, t);
  uint32_t* rows = memory.rows.get<uint32_t>(all * BLOCK + 1);
  uint32_t* source = memory.source.get<uint32_t>(all * BLOCK + 1);
  Block* blocks = memory.blocks.get<Block>(all);
  float* x_scales = memory.x_scales.get<float>(all * tokens);
  int32_t* starts = memory.starts.get<int32_t>(all * tokens);
  const int32_t zero = matrix.bits == 4 ? 8 : 128;
  size_t count = 0, cells = 0;
  for (size_t b = 0; b < all; ++b) {
    const size_t more = cells_of(round, tokens, b, rows + 4 * cells, source + 4 * cells);
    if (!more) continue;
    blocks[count] = {static_cast<uint32_t>(b), static_cast<uint32_t>(cells), static_cast<uint32_t>(cells + more)};
    for (size_t t = 0; t < tokens; ++t) {
      x_scales[count * tokens + t] = round.scales[t * all + b];
      starts[count * tokens + t] = -zero * round.sums[t * all + b];
    }
    cells += more;
    ++count;
  }
  const Tiles tiles(tokens, kernels_.int_tile);
  int32_t* packed = memory.x.get<int32_t>(tokens * cells);
  for (size_t tile = 0; tile < tiles.count; ++tile)
    into_tiles(round.q, round.stride, source, cells, tiles, tile, packed);
  IntProduct p = integers(matrix, tokens, y, y_stride);
  p.blocks = blocks;
  p.num_cells = cells;
  p.rows = rows;
  p.x = packed;
  p.x_scales = x_scales;
  p.starts = starts;
  const size_t parts = parts_of(4 * cells * p.row_bytes, tokens * p.columns * sizeof(float));
  const auto kernel = matrix.bits == 4 ? kernels_.int4_rows : kernels_.int8_rows;
  const auto border = [=](size_t part) {  // blocks have unlike numbers of cells
    const Block *first = blocks, *end = blocks + count;
    const auto before = [](const Block& block, size_t cell) { return block.begin < cell; };
    return static_cast<size_t>(std::lower_bound(first, end, cells * part / parts, before) - first);
  };
  sum_of_parts(threads_, parts, tokens, p.columns, y, y_stride, [=](size_t part, float* sums) {
    IntProduct mine = p;
    mine.y = sums;
    kernel(mine, border(part), part + 1 == parts ? count : border(part + 1));
  });
  for (size_t t = 0; t < tokens; ++t) poison(round.scales + t * all, all, y + t * y_stride, p.columns);
}

void Product::many_integers(const Matrix& matrix, const float* x, size_t tokens, float* y, size_t y_stride) const {
  const size_t all = matrix.blocks(), cells = all * (BLOCK / CELL);
  const Rounded round = rounded(tokens, all);
  uint32_t* rows = memory.rows.get<uint32_t>(all * BLOCK);
  for (size_t i = 0; i < all * BLOCK; ++i)  // the padding of the last block: any row that is there, times zero
    rows[i] = static_cast<uint32_t>(std::min(i, matrix.inputs - 1));
  Block* blocks = memory.blocks.get<Block>(all);
  for (size_t b = 0; b < all; ++b)
    blocks[b] = {static_cast<uint32_t>(b), static_cast<uint32_t>(b * 8), static_cast<uint32_t>(b * 8 + 8)};
  float* x_scales = memory.x_scales.get<float>(all * tokens);
  int32_t* starts = memory.starts.get<int32_t>(all * tokens);
  int32_t* packed = memory.x.get<int32_t>(tokens * cells);
  const int32_t zero = matrix.bits == 4 ? 8 : 128;
  const Tiles tiles(tokens, kernels_.int_tile);
  const Kernels& kernels = kernels_;
  threads_.run(tiles.count, [=, &kernels](size_t tile) {
    for (size_t t = tiles.begin(tile); t < tiles.begin(tile) + tiles.width(tile); ++t) {
      round_token(kernels, round, x, all, t);
      for (size_t b = 0; b < all; ++b) {
        x_scales[b * tokens + t] = round.scales[t * all + b];
        starts[b * tokens + t] = -zero * round.sums[t * all + b];
      }
    }
    into_tiles(round.q, round.stride, nullptr, cells, tiles, tile, packed);
  });
  IntProduct p = integers(matrix, tokens, y, y_stride);
  p.blocks = blocks;
  p.num_cells = cells;
  p.rows = rows;
  p.x = packed;
  p.x_scales = x_scales;
  p.starts = starts;
  const size_t lines = p.row_bytes / LINE, tasks = tasks_of(lines);
  const auto kernel = matrix.bits == 4 ? kernels_.int4_strips : kernels_.int8_strips;
  threads_.run(tasks, [=](size_t task) { kernel(p, lines * task / tasks, lines * (task + 1) / tasks, all); });
  for (size_t t = 0; t < tokens; ++t) poison(round.scales + t * all, all, y + t * y_stride, p.columns);
}

}  // namespace moedge
