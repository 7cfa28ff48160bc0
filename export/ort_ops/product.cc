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
  Buffer rows, source, x, q, scales, round_starts, blocks, x_scales, starts, parts;
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

// Tasks of a product that is cut by columns: some for each thread, as one may be held up, but none so small that its
// beginning counts, for which nothing is prefetched. All of one size where the columns allow it: the last is waited for.
size_t strip_tasks(size_t strips, size_t tokens) {
  constexpr size_t MOST = 3, LEAST_WORK = 1024;  // tasks a thread; strips times tokens of a task
  const size_t threads = std::min(processors(), MOST_PARTS);
  const size_t most = std::clamp<size_t>(strips * tokens / (threads * LEAST_WORK), 1, MOST);
  for (size_t each = most; each; --each)
    if (strips % (threads * each) == 0) return threads * each;
  return std::max<size_t>(1, std::min(strips, threads * (most + 1)));
}

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

// Where the bits of a byte are set: their positions in order, then any, and how many they are.
struct Positions {
  uint8_t at[256][8] = {}, count[256] = {};
  constexpr Positions() {
    for (unsigned byte = 0; byte < 256; ++byte)
      for (uint8_t bit = 0; bit < 8; ++bit)
        if (byte >> bit & 1) at[byte][count[byte]++] = bit;
  }
};
constexpr Positions POSITIONS;
constexpr size_t GROUP = 8;  // flags that are looked at together

// Writes `first` + the positions of those of BLOCK flags that are not zero, in order; returns how many they are. Up to
// GROUP numbers behind them are overwritten. Without branches, as any of the flags may be set.
size_t positions_of(const uint8_t* flags, uint32_t first, uint32_t* out) {
  size_t count = 0;
  for (size_t g = 0; g < BLOCK; g += GROUP) {
    uint64_t eight;
    std::memcpy(&eight, flags + g, GROUP);
    constexpr uint64_t LOW = 0x7f7f7f7f7f7f7f7fu, EACH_BIT = 0x0102040810204080u;
    const uint64_t high = (((eight & LOW) + LOW) | eight) & ~LOW;  // the highest bit of each byte that is not zero
    const uint8_t byte = static_cast<uint8_t>((high >> 7) * EACH_BIT >> 56);
    for (size_t i = 0; i < GROUP; ++i) out[count + i] = first + static_cast<uint32_t>(g) + POSITIONS.at[byte][i];
    count += POSITIONS.count[byte];
  }
  return count;
}

// Puts some rows of x [tokens][stride] into tiles, element [row][token in tile].
void into_tiles(const float* x, size_t stride, const uint32_t* rows, size_t num_rows, const Tiles& tiles, size_t tile,
                float* out) {
  const size_t t = tiles.begin(tile), width = tiles.width(tile);
  out += t * num_rows;
  x += t * stride;
  for (size_t w = 0; w < width; ++w)
    for (size_t r = 0; r < num_rows; ++r) out[r * width + w] = x[w * stride + rows[r]];
}

// The same of cells of four bytes.
void into_tiles(const int8_t* q, size_t stride, const uint32_t* source, size_t num_cells, const Tiles& tiles,
                size_t tile, int32_t* out) {
  const size_t t = tiles.begin(tile), width = tiles.width(tile);
  out += t * num_cells;
  q += t * stride;
  for (size_t w = 0; w < width; ++w, q += stride)
    for (size_t c = 0; c < num_cells; ++c) {
      int8_t four[CELL];
      for (size_t i = 0; i < CELL; ++i) four[i] = q[source ? source[CELL * c + i] : CELL * c + i];
      std::memcpy(out + c * width + w, four, CELL);
    }
}

// The rounded inputs of an integer product.
struct Rounded {
  int8_t* q;      // [tokens][stride]; the last bytes of a row are zero
  size_t stride;
  float* scales;  // [tokens][blocks]
  int32_t* starts;  // [tokens][blocks]
};

constexpr size_t ZEROS = 64;  // bytes behind the inputs of a token

Rounded rounded(size_t tokens, size_t blocks) {
  const size_t stride = blocks * BLOCK + ZEROS;
  return {memory.q.get<int8_t>(tokens * stride), stride, memory.scales.get<float>(tokens * blocks),
          memory.round_starts.get<int32_t>(tokens * blocks)};
}

void round_token(const Kernels& kernels, int bits, const Rounded& to, const float* x, size_t blocks, size_t t) {
  int8_t* q = to.q + t * to.stride;
  kernels.round(x + t * blocks * BLOCK, blocks, bits == 4, q, to.scales + t * blocks, to.starts + t * blocks);
  std::memset(q + blocks * BLOCK, 0, ZEROS);
}

// A token with an input that is not finite has no finite result: rounding cannot tell infinite from not a number.
void poison_token(const float* scales, size_t blocks, float* y, size_t columns) {
  for (size_t b = 0; b < blocks; ++b)
    if (!std::isfinite(scales[b])) {
      std::fill(y, y + columns, std::numeric_limits<float>::quiet_NaN());
      return;
    }
}

IntProduct with_matrix(IntProduct p, const Matrix& matrix, size_t tokens, float* y, size_t y_stride) {
  p.weights = static_cast<const uint8_t*>(matrix.weights);
  p.row_bytes = matrix.row_bytes();
  p.lines = matrix.lines();
  p.columns = matrix.columns();
  p.scales = matrix.scales;
  p.half = matrix.half;
  p.tokens = tokens;
  p.y = y;
  p.y_stride = y_stride;
  return p;
}

// Which inputs of one block any token needs: writes their cells, returns how many. `row` is that of the first input.
size_t cells_of(const Rounded& x, size_t tokens, size_t block, size_t row, uint32_t* rows, uint32_t* source) {
  uint8_t any[BLOCK];
  std::memcpy(any, x.q + block * BLOCK, BLOCK);
  for (size_t t = 1; t < tokens; ++t)
    for (size_t i = 0; i < BLOCK; ++i) any[i] |= static_cast<uint8_t>(x.q[t * x.stride + block * BLOCK + i]);
  const size_t count = positions_of(any, static_cast<uint32_t>(block * BLOCK), source);
  for (size_t i = 0; i < BLOCK; ++i) rows[i] = source[i] + static_cast<uint32_t>(row - block * BLOCK);
  const size_t padded = (count + CELL - 1) / CELL * CELL;
  for (size_t i = count; i < padded; ++i) {
    rows[i] = rows[0];
    source[i] = static_cast<uint32_t>(x.stride - ZEROS);
  }
  return padded / CELL;
}

}  // namespace

Few::Few(const Kernels& kernels, int bits, const float* x, size_t tokens, size_t stride, const Segments* segments)
    : kernels_(kernels), bits_(bits), tokens_(tokens) {
  bits == 32 ? find_floats(x, stride, segments) : find_integers(x, stride, segments);
}

void Few::find_floats(const float* x, size_t stride, const Segments* segments) {
  uint32_t* rows = memory.rows.get<uint32_t>(stride + GROUP);
  uint32_t* source = memory.source.get<uint32_t>(stride + GROUP);
  size_t count = 0;
  for (size_t begin = 0; begin < stride; begin += BLOCK) {  // stride is whole blocks
    uint8_t any[BLOCK] = {};
    for (size_t t = 0; t < tokens_; ++t)
      for (size_t i = 0; i < BLOCK; ++i) any[i] |= x[t * stride + begin + i] != 0;  // also not a number
    count += positions_of(any, static_cast<uint32_t>(begin), source + count);
  }
  const size_t each = segments ? Product::stride_of(segments->width) : stride;
  if (segments)
    for (size_t r = 0; r < count; ++r)
      rows[r] = segments->experts[source[r] / each] * static_cast<uint32_t>(segments->width) + source[r] % each;
  const Tiles tiles(tokens_, kernels_.float_tile);
  float* packed = memory.x.get<float>(tokens_ * count);
  for (size_t tile = 0; tile < tiles.count; ++tile) into_tiles(x, stride, source, count, tiles, tile, packed);
  size_ = count;
  floats_ = {nullptr, 0, segments ? rows : source, count, packed, 0, tokens_, nullptr, 0};
}

void Few::find_integers(const float* x, size_t stride, const Segments* segments) {
  const size_t all = stride / BLOCK;
  const Rounded round = rounded(tokens_, all);
  for (size_t t = 0; t < tokens_; ++t) round_token(kernels_, bits_, round, x, all, t);
  uint32_t* rows = memory.rows.get<uint32_t>(all * BLOCK + BLOCK);
  uint32_t* source = memory.source.get<uint32_t>(all * BLOCK + BLOCK);
  Block* blocks = memory.blocks.get<Block>(all);
  float* x_scales = memory.x_scales.get<float>(all * tokens_);
  int32_t* starts = memory.starts.get<int32_t>(all * tokens_);
  const size_t each = segments ? Product::stride_of(segments->width) / BLOCK : all;
  size_t cells = 0;
  for (size_t b = 0; b < all; ++b) {
    const size_t expert = segments ? static_cast<size_t>(segments->experts[b / each]) : 0;
    const size_t row = (segments ? expert * segments->width : 0) + b % each * BLOCK;
    const size_t more = cells_of(round, tokens_, b, row, rows + 4 * cells, source + 4 * cells);
    if (!more) continue;
    const size_t scale_row = expert * each + b % each;
    blocks[size_] = {static_cast<uint32_t>(scale_row), static_cast<uint32_t>(cells), static_cast<uint32_t>(cells + more)};
    for (size_t t = 0; t < tokens_; ++t) {
      x_scales[size_ * tokens_ + t] = round.scales[t * all + b];
      starts[size_ * tokens_ + t] = round.starts[t * all + b];
    }
    cells += more;
    ++size_;
  }
  const Tiles tiles(tokens_, kernels_.int_tile);
  int32_t* packed = memory.x.get<int32_t>(tokens_ * cells);
  for (size_t tile = 0; tile < tiles.count; ++tile)
    into_tiles(round.q, round.stride, source, cells, tiles, tile, packed);
  integers_.blocks = blocks;
  integers_.num_cells = cells;
  integers_.rows = rows;
  integers_.x = packed;
  integers_.x_scales = x_scales;
  integers_.starts = starts;
  all_blocks_ = all;
  all_scales_ = round.scales;
}

size_t Few::bytes(const Matrix& matrix) const {
  return (bits_ == 32 ? size_ : CELL * integers_.num_cells) * matrix.row_bytes();
}

size_t Few::border(size_t p, size_t parts) const {
  if (bits_ == 32) return size_ * p / parts;
  if (p == parts) return size_;
  // Blocks have unlike numbers of cells.
  const Block *first = integers_.blocks, *end = first + size_;
  const auto before = [](const Block& block, size_t cell) { return block.begin < cell; };
  return static_cast<size_t>(std::lower_bound(first, end, integers_.num_cells * p / parts, before) - first);
}

void Few::add(const Matrix& matrix, size_t begin, size_t end, float* sums, size_t y_stride) const {
  if (bits_ == 32) {
    FloatProduct p = floats_;
    p.weights = static_cast<const float*>(matrix.weights);
    p.columns = matrix.outputs;
    p.y = sums;
    p.y_stride = y_stride;
    return kernels_.float_rows(p, begin, end);
  }
  const IntProduct p = with_matrix(integers_, matrix, tokens_, sums, y_stride);
  bits_ == 4 ? kernels_.int4_rows(p, begin, end) : kernels_.int8_rows(p, begin, end);
}

void Few::poison(float* y, size_t y_stride, size_t columns) const {
  for (size_t t = 0; t < tokens_ && bits_ != 32; ++t)
    poison_token(all_scales_ + t * all_blocks_, all_blocks_, y + t * y_stride, columns);
}

Cells::Cells(const Kernels& kernels, int bits, const float* x, size_t tokens, size_t stride)
    : kernels_(kernels), tokens_(tokens), blocks_(stride / BLOCK) {
  const Rounded round = rounded(tokens, blocks_);
  float* x_scales = memory.x_scales.get<float>(blocks_ * tokens);
  int32_t* starts = memory.starts.get<int32_t>(blocks_ * tokens);
  for (size_t t = 0; t < tokens; ++t) {
    round_token(kernels, bits, round, x, blocks_, t);
    for (size_t b = 0; b < blocks_; ++b) {
      x_scales[b * tokens + t] = round.scales[t * blocks_ + b];
      starts[b * tokens + t] = round.starts[t * blocks_ + b];
    }
  }
  product_.num_cells = blocks_ * (BLOCK / CELL);
  const Tiles tiles(tokens, CELL_TILE);
  int32_t* packed = memory.x.get<int32_t>(tokens * product_.num_cells);
  for (size_t tile = 0; tile < tiles.count; ++tile)
    into_tiles(round.q, round.stride, nullptr, product_.num_cells, tiles, tile, packed);
  product_.x = packed;
  product_.x_scales = x_scales;
  product_.starts = starts;
  all_scales_ = round.scales;
}

void Cells::multiply(const Matrix& matrix, float* y, size_t y_stride) const {
  const IntProduct p = with_matrix(product_, matrix, tokens_, y, y_stride);
  matrix.bits == 4 ? kernels_.int4_cells(p, blocks_) : kernels_.int8_cells(p, blocks_);
  for (size_t t = 0; t < tokens_; ++t) poison_token(all_scales_ + t * blocks_, blocks_, y + t * y_stride, p.columns);
}

size_t tasks_of(size_t units, size_t bytes) {
  return std::max<size_t>(1, std::min({units, 2 * std::min(processors(), MOST_PARTS), bytes / LEAST_BYTES}));
}

void Product::choose(const float* x, const float* threshold, size_t size, float* out, size_t stride) const {
  if (threshold)
    kernels_.mask(x, threshold, ramp_, size, out);
  else if (x != out)
    std::memcpy(out, x, size * sizeof(float));
  std::fill(out + size, out + stride, 0.0f);
}

void Product::multiply(const Matrix& matrix, const float* x, size_t tokens, float* y, size_t y_stride) const {
  if (tokens <= few_tokens(matrix.bits))
    multiply(matrix, Few(kernels_, matrix.bits, x, tokens, stride_of(matrix.inputs)), tokens, y, y_stride);
  else if (matrix.bits == 32)
    many_floats(matrix, x, tokens, y, y_stride);
  else
    many_integers(matrix, x, tokens, y, y_stride);
}

void Product::multiply(const Matrix& matrix, const Few& few, size_t tokens, float* y, size_t y_stride) const {
  const size_t parts = parts_of(few.bytes(matrix), tokens * matrix.columns() * sizeof(float));
  sum_of_parts(threads_, parts, tokens, matrix.columns(), y, y_stride, [&few, &matrix, parts, y_stride](size_t p, float* sums) {
    few.add(matrix, few.border(p, parts), few.border(p + 1, parts), sums, y_stride);
  });
  few.poison(y, y_stride, matrix.columns());
}

void Product::many_floats(const Matrix& matrix, const float* x, size_t tokens, float* y, size_t y_stride) const {
  const FloatProduct p{static_cast<const float*>(matrix.weights), matrix.outputs, nullptr, matrix.inputs, x,
                       stride_of(matrix.inputs), tokens, y, y_stride};
  const size_t strips = (matrix.outputs + FLOAT_STRIP_COLUMNS - 1) / FLOAT_STRIP_COLUMNS;
  const size_t tasks = strip_tasks(strips, tokens);
  float* scratch = memory.parts.get<float>(tasks * FLOAT_STRIP_SCRATCH);
  const Kernels& kernels = kernels_;
  threads_.run(tasks, [=, &kernels](size_t task) {
    const size_t begin = strips * task / tasks * FLOAT_STRIP_COLUMNS;
    const size_t end = std::min(strips * (task + 1) / tasks * FLOAT_STRIP_COLUMNS, p.columns);
    kernels.float_strips(p, begin, end, scratch + task * FLOAT_STRIP_SCRATCH);
  });
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
  const int bits = matrix.bits;
  const Tiles tiles(tokens, kernels_.int_tile);
  const Kernels& kernels = kernels_;
  threads_.run(tiles.count, [=, &kernels](size_t tile) {
    for (size_t t = tiles.begin(tile); t < tiles.begin(tile) + tiles.width(tile); ++t) {
      round_token(kernels, bits, round, x, all, t);
      for (size_t b = 0; b < all; ++b) {
        x_scales[b * tokens + t] = round.scales[t * all + b];
        starts[b * tokens + t] = round.starts[t * all + b];
      }
    }
    into_tiles(round.q, round.stride, nullptr, cells, tiles, tile, packed);
  });
  IntProduct p = with_matrix({}, matrix, tokens, y, y_stride);
  p.blocks = blocks;
  p.num_cells = cells;
  p.rows = rows;
  p.x = packed;
  p.x_scales = x_scales;
  p.starts = starts;
  const size_t lines = p.lines, tasks = strip_tasks(lines, tokens);
  const auto kernel = matrix.bits == 4 ? kernels_.int4_strips : kernels_.int8_strips;
  threads_.run(tasks, [=](size_t task) { kernel(p, lines * task / tasks, lines * (task + 1) / tasks, all); });
  for (size_t t = 0; t < tokens; ++t) poison_token(round.scales + t * all, all, y + t * y_stride, p.columns);
}

}  // namespace moedge
