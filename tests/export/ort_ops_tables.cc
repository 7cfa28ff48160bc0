// Compares the table of kernels that this processor gets with the portable one, on random products of every form.
// Prints its name; exit status 1 and a line for each form that differs. Also run under an emulator of another processor.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "kernels.h"

using namespace moedge;

namespace {

std::mt19937 generator(1);
int failures = 0;

float uniform() { return std::uniform_real_distribution<float>(-1, 1)(generator); }

void compare(const char* what, size_t tokens, const std::vector<float>& a, const std::vector<float>& b) {
  float most = 0, difference = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    most = std::fmax(most, std::fabs(b[i]));
    difference = std::fmax(difference, std::fabs(a[i] - b[i]));
  }
  if (difference <= 5e-6f * most) return;  // sums in another order
  std::printf("%s, %zu tokens: %g of %g\n", what, tokens, static_cast<double>(difference), static_cast<double>(most));
  ++failures;
}

// Elements [row][token in tile] of tiles of at most `most`, from x [token][row].
template <typename T>
std::vector<T> tiled(const std::vector<T>& x, size_t rows, size_t tokens, size_t most) {
  const Tiles tiles(tokens, most);
  std::vector<T> out;
  for (size_t tile = 0; tile < tiles.count; ++tile)
    for (size_t r = 0; r < rows; ++r)
      for (size_t w = 0; w < tiles.width(tile); ++w) out.push_back(x[(tiles.begin(tile) + w) * rows + r]);
  return out;
}

void floats(const Kernels& mine, size_t tokens, size_t columns) {
  const size_t rows = 77;
  std::vector<float> weights(rows * columns), x(tokens * rows);
  for (float& value : weights) value = uniform();
  for (float& value : x) value = uniform();
  std::vector<float> results[2][2];
  for (const Kernels* kernels : {&mine, &PORTABLE}) {
    const std::vector<float> packed = tiled(x, rows, tokens, kernels->float_tile);
    for (int strips = 0; strips < 2; ++strips) {
      std::vector<float> y(tokens * columns), scratch(FLOAT_STRIP_SCRATCH + 16);
      const float* inputs = strips ? x.data() : packed.data();
      const FloatProduct p{weights.data(), columns, nullptr, rows, inputs, rows, tokens, y.data(), columns};
      if (strips)
        kernels->float_strips(p, 0, columns, scratch.data());
      else
        kernels->float_rows(p, 0, rows);
      results[strips][kernels == &PORTABLE] = y;
    }
  }
  compare("float_rows", tokens, results[0][0], results[0][1]);
  compare("float_strips", tokens, results[1][0], results[1][1]);
}

void integers(const Kernels& mine, size_t tokens, bool four, bool half) {
  const size_t blocks = 3, inputs = blocks * BLOCK, columns = 256, cells = inputs / CELL;
  std::vector<uint8_t> weights(inputs * columns);
  for (uint8_t& value : weights) value = static_cast<uint8_t>(generator());
  std::vector<float> singles(blocks * columns), x_scales(blocks * tokens);
  std::vector<uint16_t> halves(blocks * columns);
  for (float& value : singles) value = uniform();
  for (uint16_t& value : halves) value = static_cast<uint16_t>(0x2000 + generator() % 0x1000);
  for (float& value : x_scales) value = uniform();
  // Whole numbers, one of 127 a block: they are rounded to themselves.
  std::vector<float> values(tokens * inputs);
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = i % BLOCK ? static_cast<float>(static_cast<int>(generator() % 255) - 127) : 127.0f;
  // And the largest sums of either sign: two blocks of one value, and weights of the least and the most.
  for (size_t i = 0; i < 2 * BLOCK; ++i) values[i] = i < BLOCK ? 127.0f : -127.0f;
  for (size_t i = 0; i < weights.size(); ++i)
    if (i % LINE < 16) weights[i] = i & 1 ? 0 : 255;
  std::vector<uint32_t> rows(inputs);
  for (size_t r = 0; r < inputs; ++r) rows[r] = static_cast<uint32_t>(r);
  std::vector<Block> list;
  for (uint32_t b = 0; b < blocks; ++b) list.push_back({b, b * 8, b * 8 + 8});
  const char* names[] = {"int_rows", "int_strips", "int_cells"};
  std::vector<float> results[3][2];
  for (const Kernels* kernels : {&mine, &PORTABLE})
    for (int form = 0; form < 3; ++form) {
      std::vector<int8_t> bytes(tokens * inputs);
      std::vector<float> ones(tokens * blocks);
      std::vector<int32_t> x(tokens * cells), by_token(tokens * blocks), starts(blocks * tokens);
      kernels->round(values.data(), tokens * blocks, four, bytes.data(), ones.data(), by_token.data());
      __builtin_memcpy(x.data(), bytes.data(), bytes.size());
      for (size_t t = 0; t < tokens; ++t)
        for (size_t b = 0; b < blocks; ++b) starts[b * tokens + t] = by_token[t * blocks + b];
      const std::vector<int32_t> packed = tiled(x, cells, tokens, form == 2 ? CELL_TILE : kernels->int_tile);
      std::vector<float> y(tokens * columns);
      IntProduct p{};
      p.weights = weights.data();
      p.row_bytes = form == 2 ? columns * CELL : columns * (four ? 4 : 8) / 8;
      p.lines = p.row_bytes / LINE;
      p.columns = columns;
      p.scales = half ? static_cast<const void*>(halves.data()) : singles.data();
      p.half = half;
      p.blocks = list.data();
      p.num_cells = cells;
      p.rows = rows.data();
      p.x = packed.data();
      p.x_scales = x_scales.data();
      p.starts = starts.data();
      p.tokens = tokens;
      p.y = y.data();
      p.y_stride = columns;
      if (form == 0) (four ? kernels->int4_rows : kernels->int8_rows)(p, 0, blocks);
      if (form == 1) (four ? kernels->int4_strips : kernels->int8_strips)(p, 0, p.lines, blocks);
      if (form == 2) (four ? kernels->int4_cells : kernels->int8_cells)(p, blocks);
      results[form][kernels == &PORTABLE] = y;
    }
  for (int form = 0; form < 3; ++form) compare(names[form], tokens, results[form][0], results[form][1]);
}

}  // namespace

int main() {
  const Kernels& mine = kernels();
  std::puts(mine.name);
  for (const size_t tokens : {1, 2, 3, 4, 5, 9, 13, 17, 25})
    for (const size_t columns : {48, 64, 83}) floats(mine, tokens, columns);
  for (const size_t tokens : {1, 2, 3, 4, 5, 9})
    for (int form = 0; form < 4; ++form) integers(mine, tokens, form & 1, form & 2);
  return failures != 0;
}
