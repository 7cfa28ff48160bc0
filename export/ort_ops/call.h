// The inputs of one call of an operator, checked.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "abi.h"
#include "pages.h"
#include "product.h"

namespace moedge {

struct Tensor {
  int type = ANY;
  std::vector<int64_t> dims;
  const void* data = nullptr;  // null: the input is left out
};

std::string describe(int type, const std::vector<int64_t>& dims);

class Call {
 public:
  Call(const Api& api, OrtKernelContext* context, const char* op, const Copies& copies)
      : api_(api),
        context_(context),
        op_(op),
        copies_(copies),
        count_(api.input_count(context)),
        output_count_(api.output_count(context)) {}

  // An input of any shape; Tensor.data is null where it is left out.
  Tensor input(size_t index) const;

  // An input of the given type and shape, or null where it is left out and may be. Throws Invalid.
  const void* exact(size_t index, const char* name, int type, const std::vector<int64_t>& dims, bool optional) const;
  const float* floats(size_t index, const char* name, const std::vector<int64_t>& dims, bool optional = true) const {
    return static_cast<const float*>(exact(index, name, FLOAT32, dims, optional));
  }

  // x, [T, inputs] or [B, S, inputs].
  Tensor tokens(size_t inputs) const;

  // Inputs `index` and `index + 1`: the rows of `matrix` and, of integers, their scales; `count` of them (0: one, and
  // no dimension for it). Sets its pointers, to the copies in large pages where there are any.
  void matrix(size_t index, const char* name, Matrix& matrix, int64_t count = 0) const;

  float* output(const std::vector<int64_t>& dims) const { return optional_output(0, dims); }

  // Null where the node does not name this output: nobody reads it.
  float* optional_output(size_t index, const std::vector<int64_t>& dims) const {
    if (index >= output_count_) return nullptr;
    OrtValue* value = api_.output(context_, index, dims);
    return value ? static_cast<float*>(api_.data(value)) : nullptr;
  }

  [[noreturn]] void refuse(const std::string& what) const { throw Invalid("moedge::" + std::string(op_) + ": " + what); }

 private:
  const Api& api_;
  OrtKernelContext* context_;
  const char* op_;
  const Copies& copies_;
  size_t count_, output_count_;
};

// The product of all dimensions but the last.
inline size_t rows_of(const std::vector<int64_t>& dims) {
  size_t rows = 1;
  for (size_t i = 0; i + 1 < dims.size(); ++i) rows *= static_cast<size_t>(dims[i]);
  return rows;
}

}  // namespace moedge
