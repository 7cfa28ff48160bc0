// The operators of the domain moedge.cpu, version 1.
#pragma once

#include <memory>
#include <string>

#include "abi.h"
#include "call.h"

namespace moedge {

// The attributes of a node.
class Attributes {
 public:
  Attributes(const Api& api, const OrtKernelInfo* info, const char* op) : api_(api), info_(info), op_(op) {}

  // A number of at least `least`. Throws Invalid.
  size_t size(const char* name, int64_t least = 1) const;
  // Whether an attribute is 1; false where it is left out.
  bool flag(const char* name) const;
  int bits() const;
  // Width of the ramp on which a value grows from nothing at its threshold, in thresholds; 0, a step, where it is missing.
  float ramp() const;
  Activation activation() const;

 private:
  [[noreturn]] void refuse(const std::string& what) const { throw Invalid("moedge::" + std::string(op_) + ": " + what); }

  const Api& api_;
  const OrtKernelInfo* info_;
  const char* op_;
};

// A node of a graph. Its members do not change after it is made: calls come from several threads at once.
class Node {
 public:
  virtual ~Node() = default;
  virtual void compute(const Call& call, const Threads& threads) const = 0;
};

template <typename Op>
std::unique_ptr<Node> make(const Attributes& attributes) {
  return std::make_unique<Op>(attributes);
}

// What ONNX Runtime is told of an operator, and how a node of it is made.
struct Signature {
  const char* name;
  size_t inputs;
  const int* types;       // of each input; ANY is checked at each call
  const bool* required;   // of each input
  bool keeps_shape;       // whether y has the shape of x
  std::unique_ptr<Node> (*make)(const Attributes&);
  size_t outputs = 1;     // of which all but the first may be left out
};

extern const Signature GATHER_GLU, GATHER_LINEAR, ROUTED_GLU;

}  // namespace moedge
