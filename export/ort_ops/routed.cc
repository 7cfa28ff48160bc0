// RoutedGLU: the selected experts of each token and their weighted sum, experts of any width.
#include <algorithm>
#include <numeric>
#include <utility>

#include "ops.h"

namespace moedge {
namespace {

struct Memory {
  Buffer x, gathered, both, h, y, order, offsets, list, weights;
};
thread_local Memory memory;

// Up to this many tokens go together through every expert that one of them has selected: reading weights takes longer
// than computing what a token does not need. More are grouped by expert.
constexpr size_t TOGETHER = 16;

struct Experts {
  Matrix gate_up, down;
  const float *x_threshold, *h_threshold, *compensation;
};

struct Routes {
  const int32_t* experts;  // [T][k]
  const float* weights;
  size_t top_k;
};

class RoutedGLU : public Node {
 public:
  explicit RoutedGLU(const Attributes& attributes)
      : experts_(attributes.size("num_experts")),
        width_(attributes.size("width")),
        hidden_(attributes.size("hidden")),
        bits_(attributes.bits()),
        interleaved_(bits_ != 32 && attributes.flag("interleaved")),
        activation_(attributes.activation()),
        ramp_(attributes.ramp()),
        kernels_(kernels()) {}

  void compute(const Call& call, const Threads& threads) const override {
    const int64_t count = static_cast<int64_t>(experts_), hidden = static_cast<int64_t>(hidden_);
    const Tensor x = call.tokens(hidden_);
    const size_t tokens = rows_of(x.dims);
    const Routes routes = routes_of(call, tokens);
    Experts experts{{bits_, hidden_, 2 * width_}, {bits_, width_, hidden_}, nullptr, nullptr, nullptr};
    experts.gate_up.interleaved = interleaved_;
    experts.x_threshold = call.floats(3, "x_threshold", {hidden});
    call.matrix(4, "gate_up", experts.gate_up, count);
    experts.h_threshold = call.floats(6, "h_threshold", {count * static_cast<int64_t>(width_)});
    call.matrix(7, "down", experts.down, count);
    experts.compensation = call.floats(9, "compensation", {count, hidden});
    float* y = call.output(x.dims);
    for (size_t begin = 0; begin < tokens; begin += MOST_TOKENS) {
      const size_t some = std::min(MOST_TOKENS, tokens - begin);
      const Routes mine{routes.experts + begin * routes.top_k, routes.weights + begin * routes.top_k, routes.top_k};
      run(experts, mine, threads, static_cast<const float*>(x.data) + begin * hidden_, some, y + begin * hidden_);
    }
  }

 private:
  Routes routes_of(const Call& call, size_t tokens) const {
    const Tensor indices = call.input(1), weights = call.input(2);
    const size_t rank = indices.dims.size();
    if (indices.type != INT32 || rank < 2 || rows_of(indices.dims) != tokens || indices.dims.back() < 1)
      call.refuse("input indices is " + describe(indices.type, indices.dims) + "; it has to be int32 [T, k], T " +
                  std::to_string(tokens) + ".");
    if (weights.type != FLOAT32 || weights.dims != indices.dims)
      call.refuse("input weights is " + describe(weights.type, weights.dims) + "; it has to be " +
                  describe(FLOAT32, indices.dims) + ".");
    const int32_t* values = static_cast<const int32_t*>(indices.data);
    const size_t top_k = static_cast<size_t>(indices.dims.back());
    for (size_t i = 0; i < tokens * top_k; ++i)
      if (values[i] < 0 || static_cast<size_t>(values[i]) >= experts_)
        call.refuse("an index is " + std::to_string(values[i]) + "; experts are 0 to " + std::to_string(experts_ - 1) +
                    ".");
    return {values, static_cast<const float*>(weights.data), top_k};
  }

  void run(const Experts& experts, const Routes& routes, const Threads& threads, const float* x, size_t tokens,
           float* y) const {
    const Product product(kernels_, threads, ramp_);
    const size_t stride = Product::stride_of(hidden_);
    float* chosen = memory.x.get<float>(tokens * stride);
    for (size_t t = 0; t < tokens; ++t)
      product.choose(x + t * hidden_, experts.x_threshold, hidden_, chosen + t * stride, stride);
    if (tokens == 1 || (tokens <= TOGETHER && experts_ <= 4 * routes.top_k))
      together(experts, routes, product, threads, chosen, tokens, y);
    else
      by_expert(experts, routes, product, chosen, tokens, y);
    if (experts.compensation)
      for (size_t t = 0; t < tokens; ++t) compensate(experts, routes, t, y + t * hidden_);
  }

  // Hidden units of one expert for one token, from gate and up side by side.
  void hidden_units(const Experts& experts, const Product& product, size_t expert, float weight, const float* both,
                    float* h) const {
    const size_t stride = Product::stride_of(width_);
    if (weight == 0) return std::fill(h, h + stride, 0.0f);  // also where h would not be finite: it is not selected
    kernels_.glu(both, both + width_, width_, activation_, h);
    product.choose(h, experts.h_threshold ? experts.h_threshold + expert * width_ : nullptr, width_, h, stride);
    for (size_t i = 0; i < width_; ++i) h[i] *= weight;
  }

  // The experts that are selected, in order, and each one's weight for each token [experts][tokens].
  size_t selected(const Routes& routes, size_t tokens, int32_t* list, float* weights) const {
    size_t* place = memory.offsets.get<size_t>(experts_);
    std::fill(place, place + experts_, size_t{0});
    for (size_t i = 0; i < tokens * routes.top_k; ++i) place[routes.experts[i]] = 1;
    size_t count = 0;
    for (size_t expert = 0; expert < experts_; ++expert) {
      list[count] = static_cast<int32_t>(expert);
      count += std::exchange(place[expert], count);
    }
    std::fill(weights, weights + count * tokens, 0.0f);
    for (size_t i = 0; i < tokens * routes.top_k; ++i)  // one that stands twice has the sum of its weights
      weights[place[routes.experts[i]] * tokens + i / routes.top_k] += routes.weights[i];
    return count;
  }

  void together(const Experts& experts, const Routes& routes, const Product& product, const Threads& threads,
                const float* x, size_t tokens, float* y) const {
    int32_t* list = memory.list.get<int32_t>(experts_ + 1);
    float* weights = memory.weights.get<float>(experts_ * tokens);
    const size_t count = selected(routes, tokens, list, weights);
    const size_t stride = Product::y_stride_of(experts.gate_up), h_stride = Product::stride_of(width_);
    float* both = memory.both.get<float>(count * tokens * stride);
    float* h = memory.h.get<float>(tokens * count * h_stride);
    const size_t tasks = tasks_of(count, count * experts.gate_up.rows() * experts.gate_up.row_bytes());
    const auto each = [&](const auto& inputs) {
      threads.run(tasks, [=, &experts, &product, &inputs](size_t task) {
        for (size_t slot = count * task / tasks; slot < count * (task + 1) / tasks; ++slot) {
          const size_t expert = static_cast<size_t>(list[slot]);
          float* mine = both + slot * tokens * stride;
          gate_and_up(inputs, experts.gate_up.expert(expert), mine, stride, tokens);
          for (size_t t = 0; t < tokens; ++t)
            hidden_units(experts, product, expert, weights[slot * tokens + t], mine + t * stride,
                         h + (t * count + slot) * h_stride);
        }
      });
    };
    if (interleaved_)
      each(Cells(kernels_, bits_, x, tokens, Product::stride_of(hidden_)));
    else
      each(Few(kernels_, bits_, x, tokens, Product::stride_of(hidden_)));
    const Segments segments{list, width_};
    const size_t y_stride = Product::y_stride_of(experts.down);
    float* sums = memory.y.get<float>(tokens * y_stride);
    product.multiply(experts.down, Few(kernels_, bits_, h, tokens, count * h_stride, &segments), tokens, sums, y_stride);
    for (size_t t = 0; t < tokens; ++t) std::copy(sums + t * y_stride, sums + t * y_stride + hidden_, y + t * hidden_);
  }

  static void gate_and_up(const Cells& inputs, const Matrix& matrix, float* both, size_t stride, size_t) {
    inputs.multiply(matrix, both, stride);
  }
  static void gate_and_up(const Few& inputs, const Matrix& matrix, float* both, size_t stride, size_t tokens) {
    for (size_t t = 0; t < tokens; ++t) std::fill(both + t * stride, both + t * stride + matrix.columns(), 0.0f);
    inputs.add(matrix, 0, inputs.size(), both, stride);
    inputs.poison(both, stride, matrix.columns());
  }

  void by_expert(const Experts& experts, const Routes& routes, const Product& product, const float* x, size_t tokens,
                 float* y) const {
    const size_t all = tokens * routes.top_k, x_stride = Product::stride_of(hidden_);
    const size_t h_stride = Product::stride_of(width_);
    const size_t both_stride = Product::y_stride_of(experts.gate_up), y_stride = Product::y_stride_of(experts.down);
    // Choices by expert, in the order of tokens.
    uint32_t* order = memory.order.get<uint32_t>(all);
    size_t* offsets = memory.offsets.get<size_t>(experts_ + 1);
    std::fill(offsets, offsets + experts_ + 1, size_t{0});
    for (size_t i = 0; i < all; ++i) ++offsets[routes.experts[i] + 1];
    std::partial_sum(offsets, offsets + experts_ + 1, offsets);
    for (size_t i = 0; i < all; ++i) order[offsets[routes.experts[i]]++] = static_cast<uint32_t>(i);
    std::fill(y, y + tokens * hidden_, 0.0f);
    for (size_t expert = 0, begin = 0; expert < experts_; begin = offsets[expert++]) {
      // An expert that stands twice in a row of indices has more rows than there are tokens.
      for (size_t from = begin, rows; from < offsets[expert]; from += rows) {
        rows = std::min(offsets[expert] - from, MOST_TOKENS);
        const uint32_t* mine = order + from;
        float* gathered = memory.gathered.get<float>(rows * x_stride);
        float* both = memory.both.get<float>(rows * both_stride);
        float* h = memory.h.get<float>(rows * h_stride);
        float* sums = memory.y.get<float>(rows * y_stride);
        for (size_t r = 0; r < rows; ++r) {
          const float* row = x + mine[r] / routes.top_k * x_stride;
          std::copy(row, row + x_stride, gathered + r * x_stride);
        }
        if (interleaved_)
          Cells(kernels_, bits_, gathered, rows, x_stride).multiply(experts.gate_up.expert(expert), both, both_stride);
        else
          product.multiply(experts.gate_up.expert(expert), gathered, rows, both, both_stride);
        for (size_t r = 0; r < rows; ++r)
          hidden_units(experts, product, expert, routes.weights[mine[r]], both + r * both_stride, h + r * h_stride);
        product.multiply(experts.down.expert(expert), h, rows, sums, y_stride);
        for (size_t r = 0; r < rows; ++r) {
          float* to = y + mine[r] / routes.top_k * hidden_;
          for (size_t i = 0; i < hidden_; ++i) to[i] += sums[r * y_stride + i];
        }
      }
    }
  }

  // Adds what the experts that a token has not selected give in the mean.
  void compensate(const Experts& experts, const Routes& routes, size_t token, float* y) const {
    const int32_t *begin = routes.experts + token * routes.top_k, *end = begin + routes.top_k;
    for (size_t expert = 0; expert < experts_; ++expert) {
      if (std::find(begin, end, static_cast<int32_t>(expert)) != end) continue;
      const float* row = experts.compensation + expert * hidden_;
      for (size_t i = 0; i < hidden_; ++i) y[i] += row[i];
    }
  }

  size_t experts_, width_, hidden_;
  int bits_;
  bool interleaved_;
  Activation activation_;
  float ramp_;
  const Kernels& kernels_;
};

constexpr int TYPES[] = {FLOAT32, INT32, FLOAT32, FLOAT32, ANY, ANY, FLOAT32, ANY, ANY, FLOAT32};
constexpr bool NEEDED[] = {true, true, true, false, true, false, false, true, false, false};

}  // namespace

const Signature ROUTED_GLU{"RoutedGLU", 10, TYPES, NEEDED, true, &make<RoutedGLU>};

}  // namespace moedge
