#include "call.h"

namespace moedge {

std::string describe(int type, const std::vector<int64_t>& dims) {
  std::string text = type == FLOAT32   ? "float32"
                     : type == UINT8   ? "uint8"
                     : type == INT32   ? "int32"
                     : type == FLOAT16 ? "float16"
                                       : "a tensor of ONNX type " + std::to_string(type);
  text += " [";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

Tensor Call::input(size_t index) const {
  Tensor tensor;
  const OrtValue* value = index < count_ ? api_.input(context_, index) : nullptr;
  if (!value) return tensor;
  tensor.type = api_.shape(value, tensor.dims);
  tensor.data = api_.data(value);
  // An empty tensor may have no memory; it is there nevertheless.
  static const char nothing = 0;
  if (!tensor.data) tensor.data = &nothing;
  return tensor;
}

const void* Call::exact(size_t index, const char* name, int type, const std::vector<int64_t>& dims,
                        bool optional) const {
  const Tensor tensor = input(index);
  if (!tensor.data) {
    if (optional) return nullptr;
    refuse("input " + std::string(name) + " is missing; it has to be " + describe(type, dims) + ".");
  }
  if (tensor.type != type || tensor.dims != dims)
    refuse("input " + std::string(name) + " is " + describe(tensor.type, tensor.dims) + "; it has to be " +
           describe(type, dims) + ".");
  return tensor.data;
}

Tensor Call::tokens(size_t inputs) const {
  const Tensor x = input(0);
  const size_t rank = x.dims.size();
  if (x.type != FLOAT32 || (rank != 2 && rank != 3) || x.dims.back() != static_cast<int64_t>(inputs))
    refuse("input x is " + describe(x.type, x.dims) + "; it has to be float32 [T, " + std::to_string(inputs) +
           "] or [B, S, " + std::to_string(inputs) + "].");
  return x;
}

void Call::matrix(size_t index, const char* name, Matrix& matrix, int64_t count) const {
  std::vector<int64_t> rows{static_cast<int64_t>(matrix.rows()), static_cast<int64_t>(matrix.outputs)};
  std::vector<int64_t> scales{static_cast<int64_t>(matrix.blocks()), static_cast<int64_t>(matrix.columns())};
  if (matrix.bits != 32) rows[1] = static_cast<int64_t>(matrix.row_bytes());
  if (count) {
    rows.insert(rows.begin(), count);
    scales.insert(scales.begin(), count);
  }
  const std::string scale_name = std::string(name) + "_scales";
  if (matrix.bits == 32) {
    matrix.weights = copies_.of(exact(index, name, FLOAT32, rows, false));
    if (input(index + 1).data) refuse("input " + scale_name + " is given, and float32 weights have no scales.");
    return;
  }
  matrix.weights = copies_.of(exact(index, name, UINT8, rows, false));
  matrix.half = input(index + 1).type == FLOAT16;
  matrix.scales = copies_.of(exact(index + 1, scale_name.c_str(), matrix.half ? FLOAT16 : FLOAT32, scales, false));
}

}  // namespace moedge
