// Products of tokens with a packed matrix that read only the rows of inputs that are not zero.
#pragma once

#include <cstddef>
#include <cstdint>

#include "abi.h"
#include "kernels.h"
#include "scratch.h"

namespace moedge {

// Runs numbered tasks on the threads of the session.
class Threads {
 public:
  Threads(const Api& api, const OrtKernelContext* context) : api_(&api), context_(context) {}

  template <typename Task>
  void run(size_t total, Task task) const {
    if (total == 1) return task(size_t{0});
    api_->parallel_for(context_, [](void* data, size_t i) { (*static_cast<Task*>(data))(i); }, total, &task);
  }

 private:
  const Api* api_;
  const OrtKernelContext* context_;
};

// How many tasks `units` of work are cut into that read so many bytes of weights together.
size_t tasks_of(size_t units, size_t bytes);

// Rows that are a multiple of so many lines apart (1 KiB) fall on few places of a cache: the 32 of a block throw each
// other out of the first level, which has 64 places of 8 lines. Such rows get one line more, which nobody reads.
constexpr size_t CROWDED_LINES = 16;

// A weight [N, K] as pack.py stores it: one row for each of the K inputs.
struct Matrix {
  int bits;
  size_t inputs, outputs;  // K, N
  const void* weights = nullptr;
  const void* scales = nullptr;
  bool half = false;
  bool interleaved = false;  // stored for Cells

  size_t line_columns() const { return bits == 4 ? 2 * LINE : LINE; }
  // N with padding.
  size_t columns() const {
    const size_t unit = bits == 32 ? 1 : interleaved ? 16 : line_columns();
    return (outputs + unit - 1) / unit * unit;
  }
  // Rows as they are stored, and their bytes: an input each, or a cell of four (8 bits), of eight (4 bits).
  size_t rows() const { return interleaved ? blocks() * bits : inputs; }
  size_t row_bytes() const {
    if (interleaved) return columns() * CELL;
    if (bits == 32) return columns() * sizeof(float);
    return (lines() + (lines() % CROWDED_LINES == 0)) * LINE;
  }
  // Of a row of integers.
  size_t lines() const { return columns() * bits / 8 / LINE; }
  // One of a stack.
  Matrix expert(size_t number) const {
    Matrix one = *this;
    one.weights = static_cast<const char*>(weights) + number * rows() * row_bytes();
    if (scales) one.scales = static_cast<const char*>(scales) + number * blocks() * columns() * (half ? 2 : 4);
    return one;
  }
  size_t blocks() const { return (inputs + BLOCK - 1) / BLOCK; }
};

// Up to this many tokens a row is read once for all of them; above, the matrix is read in strips of columns (measured).
constexpr size_t few_tokens(int bits) { return bits == 32 ? 20 : 16; }

// Up to this many tokens, work on single inputs takes less time than waking a thread.
constexpr size_t FEW_TOKENS = 16;

// Tokens that go through a layer at once; bounds the memory that a long prompt takes.
constexpr size_t MOST_TOKENS = 512;

// Which experts the inputs of a product belong to, where they are the hidden units of several: `width` of each, padded
// to whole blocks, expert after expert.
struct Segments {
  const int32_t* experts;
  size_t width;
};

// The inputs of a few tokens that are not zero, and their rows; for any number of matrices. One of a thread at a time.
class Few {
 public:
  // x [tokens][stride]: stride_of(inputs), or that of each segment side by side.
  Few(const Kernels& kernels, int bits, const float* x, size_t tokens, size_t stride, const Segments* segments = nullptr);

  // Rows (floats) or blocks (integers) with work.
  size_t size() const { return size_; }
  // Bytes of weights that a product reads.
  size_t bytes(const Matrix& matrix) const;
  // Where part p of `parts` begins, in size().
  size_t border(size_t p, size_t parts) const;
  // sums [tokens][y_stride] += part [begin, end) of the product; weights and scales are those of `matrix`.
  void add(const Matrix& matrix, size_t begin, size_t end, float* sums, size_t y_stride) const;
  // A token of which an input is not finite has no finite result, if rounding hid that.
  void poison(float* y, size_t y_stride, size_t columns) const;

 private:
  void find_floats(const float* x, size_t stride, const Segments* segments);
  void find_integers(const float* x, size_t stride, const Segments* segments);

  const Kernels& kernels_;
  int bits_;
  size_t tokens_, size_ = 0, all_blocks_ = 0;
  FloatProduct floats_{};
  IntProduct integers_{};
  const float* all_scales_ = nullptr;
};

// All inputs of tokens for matrices that are stored interleaved (narrow ones). One of a thread at a time.
class Cells {
 public:
  Cells(const Kernels& kernels, int bits, const float* x, size_t tokens, size_t stride);
  // y [tokens][y_stride] = the product.
  void multiply(const Matrix& matrix, float* y, size_t y_stride) const;

 private:
  const Kernels& kernels_;
  size_t tokens_, blocks_;
  IntProduct product_{};
  const float* all_scales_;
};

// Products of all of a matrix's inputs.
class Product {
 public:
  // `ramp`: of choose(), see Attributes::ramp().
  Product(const Kernels& kernels, const Threads& threads, float ramp)
      : kernels_(kernels), threads_(threads), ramp_(ramp) {}

  // Inputs of a token, padded to whole blocks; the padding is zero.
  static size_t stride_of(size_t inputs) { return (inputs + BLOCK - 1) / BLOCK * BLOCK; }

  // A distance of rows of y that is no power of two: rows of which all would fall on the same lines of a cache.
  static size_t y_stride_of(const Matrix& matrix) { return matrix.columns() + 16; }

  // Writes x, where not below its threshold (null: all), and zeros beyond `size`, to `out` [stride].
  void choose(const float* x, const float* threshold, size_t size, float* out, size_t stride) const;

  // y [tokens][y_stride] = what `few` stands for times matrix.
  void multiply(const Matrix& matrix, const Few& few, size_t tokens, float* y, size_t y_stride) const;

  // y [tokens][y_stride], y_stride at least matrix.columns(), = x times matrix. `x` [tokens][stride_of(K)].
  void multiply(const Matrix& matrix, const float* x, size_t tokens, float* y, size_t y_stride) const;

 private:
  void many_floats(const Matrix&, const float* x, size_t tokens, float* y, size_t y_stride) const;
  void many_integers(const Matrix&, const float* x, size_t tokens, float* y, size_t y_stride) const;

  const Kernels& kernels_;
  const Threads& threads_;
  float ramp_;
};

}  // namespace moedge
