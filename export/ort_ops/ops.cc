#include "ops.h"

#include <algorithm>

namespace moedge {

size_t Attributes::size(const char* name, int64_t least) const {
  int64_t value = 0;
  if (!api_.attribute(info_, name, value)) refuse("attribute " + std::string(name) + " is missing; it is an integer.");
  // The most keeps every product of two sizes in range.
  if (value < least || value > (int64_t{1} << 30))
    refuse("attribute " + std::string(name) + " is " + std::to_string(value) + "; it has to be " +
           std::to_string(least) + " to 2^30.");
  return static_cast<size_t>(value);
}

bool Attributes::flag(const char* name) const {
  int64_t value = 0;
  return api_.attribute(info_, name, value) && value != 0;
}

int Attributes::bits() const {
  const size_t bits = size("bits");
  if (bits != 32 && bits != 8 && bits != 4)
    refuse("attribute bits is " + std::to_string(bits) + "; it has to be 32 (float32), 8 or 4.");
  return static_cast<int>(bits);
}

float Attributes::ramp() const {
  float ramp = 0;
  if (!api_.attribute(info_, "ramp", ramp)) return 0;
  if (!(ramp >= 0 && ramp <= 10)) refuse("attribute ramp is " + std::to_string(ramp) + "; it has to be 0 to 10.");
  return ramp;
}

Activation Attributes::activation() const {
  std::string name;
  if (!api_.attribute(info_, "activation", name)) refuse("attribute activation is missing; it is a string.");
  if (name == "silu") return SILU;
  if (name == "gelu_tanh") return GELU_TANH;
  if (name == "gelu") return GELU;
  refuse("attribute activation is '" + name + "'; it has to be silu, gelu_tanh or gelu.");
}

namespace {

struct Memory {
  Buffer x, both, h, y;
};
thread_local Memory memory;

// Adds the bias [outputs], or nothing, to y [tokens][stride] and writes it to out [tokens][outputs].
void finish(const float* y, size_t stride, const float* bias, size_t tokens, size_t outputs, float* out) {
  if (y == out && !bias) return;
  for (size_t t = 0; t < tokens; ++t, y += stride, out += outputs)
    if (bias)
      for (size_t i = 0; i < outputs; ++i) out[i] = y[i] + bias[i];
    else
      std::copy(y, y + outputs, out);
}

// Where sums may go: to `out` itself, if nothing is added and its rows do not fall on the same lines of a cache.
struct Sums {
  float* at;
  size_t stride;
  Sums(const Matrix& matrix, const float* bias, size_t tokens, float* out) {
    const bool direct = !bias && matrix.columns() == matrix.outputs && (tokens == 1 || matrix.outputs % 512 != 0);
    stride = direct ? matrix.outputs : Product::y_stride_of(matrix);
    at = direct ? out : memory.y.get<float>(tokens * stride);
  }
};

// One task a token where there are many; one for all of a few, as it takes less time than waking a thread.
template <typename Work>
void each_token(const Threads& threads, size_t tokens, Work work) {
  if (tokens > FEW_TOKENS) return threads.run(tokens, work);
  for (size_t t = 0; t < tokens; ++t) work(t);
}

// The inputs of a product, [tokens][stride_of(size)]: x itself, or a copy without what is below its threshold.
const float* chosen(const Product& product, const Threads& threads, const float* x, const float* threshold,
                    size_t tokens, size_t size) {
  const size_t stride = Product::stride_of(size);
  if (!threshold && stride == size) return x;
  float* out = memory.x.get<float>(tokens * stride);
  each_token(threads, tokens,
             [=, &product](size_t t) { product.choose(x + t * size, threshold, size, out + t * stride, stride); });
  return out;
}

// What is shown of values [tokens][size] that lie [tokens][stride]; nothing where nobody reads it.
void show(const float* values, size_t stride, size_t tokens, size_t size, float* out) {
  for (size_t t = 0; out && t < tokens; ++t) std::copy(values + t * stride, values + t * stride + size, out + t * size);
}

// A part of an output that may be left out.
inline float* from(float* output, size_t at) { return output ? output + at : nullptr; }

// Outputs: y, and for parity x as it is multiplied.
class GatherLinear : public Node {
 public:
  explicit GatherLinear(const Attributes& attributes)
      : matrix_{attributes.bits(), attributes.size("K"), attributes.size("N")},
        ramp_(attributes.ramp()),
        kernels_(kernels()) {}

  void compute(const Call& call, const Threads& threads) const override {
    Matrix matrix = matrix_;
    const size_t inputs = matrix.inputs, outputs = matrix.outputs;
    const Tensor x = call.tokens(inputs);
    const float* threshold = call.floats(1, "threshold", {static_cast<int64_t>(inputs)});
    call.matrix(2, "weight", matrix);
    const float* bias = call.floats(4, "bias", {static_cast<int64_t>(outputs)});
    std::vector<int64_t> dims = x.dims;
    dims.back() = static_cast<int64_t>(outputs);
    float* y = call.output(dims);
    float* x_kept = call.optional_output(1, x.dims);
    const size_t all = rows_of(x.dims), stride = Product::stride_of(inputs);
    const Product product(kernels_, threads, ramp_);
    for (size_t begin = 0; begin < all; begin += MOST_TOKENS) {
      const size_t tokens = std::min(MOST_TOKENS, all - begin);
      const float* given = static_cast<const float*>(x.data) + begin * inputs;
      float* to = y + begin * outputs;
      const Sums sums(matrix, bias, tokens, to);
      const float* multiplied = chosen(product, threads, given, threshold, tokens, inputs);
      show(multiplied, stride, tokens, inputs, from(x_kept, begin * inputs));
      product.multiply(matrix, multiplied, tokens, sums.at, sums.stride);
      finish(sums.at, sums.stride, bias, tokens, outputs, to);
    }
  }

 private:
  Matrix matrix_;
  float ramp_;
  const Kernels& kernels_;
};

// Outputs: y, and for parity x as gate and up multiply it, h [.., inner], and h as down multiplies it.
class GatherGLU : public Node {
 public:
  explicit GatherGLU(const Attributes& attributes)
      : hidden_(attributes.size("hidden")),
        inner_(attributes.size("inner")),
        bits_(attributes.bits()),
        activation_(attributes.activation()),
        ramp_(attributes.ramp()),
        kernels_(kernels()) {}

  void compute(const Call& call, const Threads& threads) const override {
    const int64_t hidden = static_cast<int64_t>(hidden_), inner = static_cast<int64_t>(inner_);
    const Tensor x = call.tokens(hidden_);
    Layer layer{{bits_, hidden_, 2 * inner_}, {bits_, inner_, hidden_}, nullptr, nullptr, nullptr, nullptr};
    layer.x_threshold = call.floats(1, "x_threshold", {hidden});
    call.matrix(2, "gate_up", layer.gate_up);
    layer.h_threshold = call.floats(4, "h_threshold", {inner});
    call.matrix(5, "down", layer.down);
    layer.gate_up_bias = call.floats(7, "gate_up_bias", {2 * inner});
    layer.down_bias = call.floats(8, "down_bias", {hidden});
    float* y = call.output(x.dims);
    std::vector<int64_t> h_dims = x.dims;
    h_dims.back() = inner;
    const Shown shown{call.optional_output(1, x.dims), call.optional_output(2, h_dims), call.optional_output(3, h_dims)};
    const size_t all = rows_of(x.dims);
    const Product product(kernels_, threads, ramp_);
    for (size_t begin = 0; begin < all; begin += MOST_TOKENS)
      run(layer, product, threads, static_cast<const float*>(x.data) + begin * hidden_,
          std::min(MOST_TOKENS, all - begin), y + begin * hidden_,
          {from(shown.x_kept, begin * hidden_), from(shown.h, begin * inner_), from(shown.h_kept, begin * inner_)});
  }

 private:
  struct Layer {
    Matrix gate_up, down;
    const float *x_threshold, *h_threshold, *gate_up_bias, *down_bias;
  };
  struct Shown {
    float *x_kept, *h, *h_kept;
  };

  void run(const Layer& layer, const Product& product, const Threads& threads, const float* x, size_t tokens,
           float* y, const Shown& shown) const {
    const size_t hidden = hidden_, inner = inner_;
    const size_t h_stride = Product::stride_of(inner), both_stride = Product::y_stride_of(layer.gate_up);
    float* both = memory.both.get<float>(tokens * both_stride);
    float* h = memory.h.get<float>(tokens * h_stride);
    const float* multiplied = chosen(product, threads, x, layer.x_threshold, tokens, hidden);
    show(multiplied, Product::stride_of(hidden), tokens, hidden, shown.x_kept);
    product.multiply(layer.gate_up, multiplied, tokens, both, both_stride);
    const Activation activation = activation_;
    const Kernels& kernels = kernels_;
    each_token(threads, tokens, [=, &layer, &kernels](size_t t) {
      float *gate = both + t * both_stride, *to = h + t * h_stride;
      if (layer.gate_up_bias) finish(gate, 0, layer.gate_up_bias, 1, 2 * inner, gate);
      kernels.glu(gate, gate + inner, inner, activation, to);
      show(to, h_stride, 1, inner, from(shown.h, t * inner));
      product.choose(to, layer.h_threshold, inner, to, h_stride);
    });
    show(h, h_stride, tokens, inner, shown.h_kept);
    const Sums sums(layer.down, layer.down_bias, tokens, y);
    product.multiply(layer.down, h, tokens, sums.at, sums.stride);
    finish(sums.at, sums.stride, layer.down_bias, tokens, hidden, y);
  }

  size_t hidden_, inner_;
  int bits_;
  Activation activation_;
  float ramp_;
  const Kernels& kernels_;
};

constexpr int LINEAR_TYPES[] = {FLOAT32, FLOAT32, ANY, ANY, FLOAT32};
constexpr bool LINEAR_REQUIRED[] = {true, false, true, false, false};
constexpr int GLU_TYPES[] = {FLOAT32, FLOAT32, ANY, ANY, FLOAT32, ANY, ANY, FLOAT32, FLOAT32};
constexpr bool GLU_REQUIRED[] = {true, false, true, false, false, true, false, false, false};

}  // namespace

const Signature GATHER_LINEAR{"GatherLinear", 5, LINEAR_TYPES, LINEAR_REQUIRED, false, &make<GatherLinear>, 2};
const Signature GATHER_GLU{"GatherGLU", 9, GLU_TYPES, GLU_REQUIRED, true, &make<GatherGLU>, 4};

}  // namespace moedge
