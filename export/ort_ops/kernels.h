// What one instruction set offers. A table of functions is chosen once, in kernels.cc; the operators call nothing else.
//
// Products read chosen rows of a matrix that is stored with one row for each *input*, so that an input that is zero
// costs nothing. Tokens that are computed together are cut into tiles; the inputs of a tile of w tokens that begins at
// token t lie at `x + t * rows`, element [row][token in tile] (but for float_strips(), which takes them as they are).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

// g++ 10 and older know no AVX-VNNI; processors that have it get AVX2 from them.
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define MOEDGE_AVX_VNNI
#endif

namespace moedge {

constexpr size_t BLOCK = 32;  // inputs that share a scale
constexpr size_t CELL = 4;    // inputs that one dot product instruction sums
constexpr size_t CELL_TILE = 2;
constexpr size_t LINE = 64;   // bytes of a row that are taken at once: 64 columns of 8 bits, 128 of 4 bits

enum Activation : int { SILU = 0, GELU_TANH = 1, GELU = 2 };

// y[t][n] += sum over rows of x[row][t] * weights[row][n], float32.
struct FloatProduct {
  const float* weights;
  size_t columns;        // also the distance of two rows
  const uint32_t* rows;  // which rows of `weights`; null: all, in order
  size_t num_rows;
  const float* x;   // of float_strips(): [token][row], as the caller has it
  size_t x_stride;  // of two tokens there; float_rows() has tiles
  size_t tokens;
  float* y;
  size_t y_stride;
};

// One block of 32 inputs of an integer product.
struct Block {
  uint32_t scale_row;
  uint32_t begin, end;  // its cells: each 4 rows that are read
};

// y[t][n] += sum over blocks of x_scale * scale[n] * sum over the block's rows of x[row][t] * (weight[row][n] - zero).
struct IntProduct {
  const uint8_t* weights;  // unsigned; columns permuted inside 64 bytes, see pack.py
  size_t row_bytes;        // from one row to the next, a multiple of LINE
  size_t lines;            // of a row that hold columns; one may follow that does not
  size_t columns;          // what those lines hold, or a stored cell
  const void* scales;      // [blocks of the matrix][columns], float32 or float16
  bool half;
  const Block* blocks;
  size_t num_cells;
  const uint32_t* rows;   // 4 a cell
  const int32_t* x;       // 4 signed bytes a cell and token
  const float* x_scales;  // [block][token]
  const int32_t* starts;  // [block][token], of round()
  size_t tokens;
  float* y;
  size_t y_stride;
};

struct Kernels {
  const char* name;
  size_t float_tile, int_tile;  // most tokens of a tile

  // Few tokens: each row once, from left to right, for all of them. Part [begin, end) of the rows or blocks.
  void (*float_rows)(const FloatProduct&, size_t begin, size_t end);
  void (*int8_rows)(const IntProduct&, size_t begin, size_t end);
  void (*int4_rows)(const IntProduct&, size_t begin, size_t end);
  // Many tokens: one strip of columns after the other. Part [begin, end) of the columns (floats) or lines (integers)
  // and all rows, `rows` null; `scratch` has FLOAT_STRIP_SCRATCH floats. y is written, not added to.
  void (*float_strips)(const FloatProduct&, size_t begin, size_t end, float* scratch);
  void (*int8_strips)(const IntProduct&, size_t begin, size_t end, size_t num_blocks);
  void (*int4_strips)(const IntProduct&, size_t begin, size_t end, size_t num_blocks);

  // Narrow matrices, stored interleaved: [cell][column][4 bytes]; 4 bits have cell 2 c in the low halves and 2 c + 1 in
  // the high ones. All cells of all blocks; `row_bytes` is that of a stored cell, tiles are CELL_TILE. y is written.
  void (*int8_cells)(const IntProduct&, size_t num_blocks);
  void (*int4_cells)(const IntProduct&, size_t num_blocks);

  // out = x * clamp((|x| - threshold) / (threshold * ramp), 0, 1); with a ramp of 0, x where not |x| < threshold, else
  // 0. A NaN is kept.
  void (*mask)(const float* x, const float* threshold, float ramp, size_t size, float* out);
  // Rounds whole blocks to signed bytes. scale: largest |x| / 127, NaN if a value is not finite. start: what is added to
  // a block's sum of products, -zero * sum of x or what this table needs in place of it.
  void (*round)(const float* x, size_t blocks, bool four, int8_t* q, float* scales, int32_t* starts);
  // out = activation(gate) * up.
  void (*glu)(const float* gate, const float* up, size_t size, int activation, float* out);
};

// Tokens are cut into the fewest tiles of at most `most`, as even as can be.
struct Tiles {
  size_t count, base, more;  // the first `more` tiles have base + 1 tokens
  Tiles(size_t tokens, size_t most) : count((tokens + most - 1) / most), base(tokens / count), more(tokens % count) {}
  size_t begin(size_t tile) const { return tile * base + (tile < more ? tile : more); }
  size_t width(size_t tile) const { return base + (tile < more ? 1 : 0); }
};

// What centres a sum of products with weights as they are stored: minus their zero point times the sum of x.
inline int32_t minus_zero(bool four, int32_t sum) { return -(four ? 8 : 128) * sum; }

// What float_strips() copies for more tokens than WIDE_PANEL_TOKENS, and for fewer: rows of one strip. A strip of rows of
// either and the inputs of a tile are what the second and the first level of a cache hold.
constexpr size_t WIDE_PANEL_TOKENS = 64, WIDE_PANEL_ROWS = 320, WIDE_PANEL_STRIPS = 4, PANEL_ROWS = 512;

// Columns that a task of float_strips() has at least: a strip of the widest instruction set, whole ones of the others.
constexpr size_t FLOAT_STRIP_COLUMNS = 32;
constexpr size_t FLOAT_STRIP_SCRATCH =
    2 * std::max(WIDE_PANEL_ROWS * WIDE_PANEL_STRIPS, PANEL_ROWS) * FLOAT_STRIP_COLUMNS;

// The best table that this processor runs, or the one that MOEDGE_CPU_ISA names. Throws Invalid for a name that is
// unknown or that the processor cannot run.
const Kernels& kernels();

extern const Kernels PORTABLE;
#if defined(__x86_64__)
extern const Kernels AVX2, AVX_VNNI, AVX512_VNNI;  // AVX_VNNI: only with MOEDGE_AVX_VNNI
#elif defined(__aarch64__)
extern const Kernels NEON_DOT;
#endif

}  // namespace moedge
