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

// A weight [N, K] as pack.py stores it: one row for each of the K inputs.
struct Matrix {
  int bits;
  size_t inputs, outputs;  // K, N
  const void* weights = nullptr;
  const void* scales = nullptr;
  bool half = false;

  size_t line_columns() const { return bits == 4 ? 2 * LINE : LINE; }
  // N with padding.
  size_t columns() const {
    return bits == 32 ? outputs : (outputs + line_columns() - 1) / line_columns() * line_columns();
  }
  size_t row_bytes() const { return columns() * bits / 8; }
  size_t blocks() const { return (inputs + BLOCK - 1) / BLOCK; }
};

// Up to this many tokens a row is read once for all of them; above, the matrix is read in strips of columns (measured).
constexpr size_t few_tokens(int bits) { return bits == 32 ? 48 : 16; }

// Up to this many tokens, work on single inputs takes less time than waking a thread.
constexpr size_t FEW_TOKENS = 16;

// Tokens that go through a layer at once; bounds the memory that a long prompt takes.
constexpr size_t MOST_TOKENS = 512;

// The inputs of one product, and its result.
class Product {
 public:
  Product(const Kernels& kernels, const Threads& threads) : kernels_(kernels), threads_(threads) {}

  // [tokens][stride] of the inputs of `matrix`, which the caller fills: `stride` is K padded to whole blocks, the
  // padding zero. One instance at a time is in use on a thread.
  struct Inputs {
    float* values;
    size_t stride;
  };
  static size_t stride_of(size_t inputs) { return (inputs + BLOCK - 1) / BLOCK * BLOCK; }

  // A distance of rows of y that is no power of two: rows of which all would fall on the same lines of a cache.
  static size_t y_stride_of(const Matrix& matrix) { return matrix.columns() + 16; }

  // Writes x, where not below its threshold (null: all), and zeros beyond `size`, to `out` [stride].
  void choose(const float* x, const float* threshold, size_t size, float* out, size_t stride) const;

  // y [tokens][y_stride], y_stride at least matrix.columns(), = x times matrix. `x` [tokens][stride_of(K)].
  void multiply(const Matrix& matrix, const float* x, size_t tokens, float* y, size_t y_stride) const;

 private:
  void few_floats(const Matrix&, const float* x, size_t tokens, float* y, size_t y_stride) const;
  void many_floats(const Matrix&, const float* x, size_t tokens, float* y, size_t y_stride) const;
  void few_integers(const Matrix&, const float* x, size_t tokens, float* y, size_t y_stride) const;
  void many_integers(const Matrix&, const float* x, size_t tokens, float* y, size_t y_stride) const;

  const Kernels& kernels_;
  const Threads& threads_;
};

}  // namespace moedge
