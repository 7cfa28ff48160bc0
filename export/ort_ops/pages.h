// Weights in large pages.
//
// ONNX Runtime maps a file of weights in pages of 4 KiB. Rows that are kept lie far apart, so a product goes through as
// many pages as rows, and for each the processor first has to find out where it lies. In pages of 2 MiB it knows.
#pragma once

#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include "abi.h"

namespace moedge {

// Whether weights are copied: the system gives large pages, and MOEDGE_CPU_PAGES is not `mapped`. Throws Invalid for
// another value of it.
bool large_pages();

// Copies of the weights of a node, the constant inputs of any type, from when its session is made until it ends.
class Copies {
 public:
  Copies() = default;
  Copies(const Api& api, const OrtKernelInfo* info, const int* types, size_t inputs);

  // The copy of an input that begins at `data`; `data` itself where there is none, as of weights that a graph computes.
  const void* of(const void* data) const {
    for (const auto& [from, copy] : copies_)
      if (from == data) return copy.get();
    return data;
  }

 private:
  std::vector<std::pair<const void*, std::shared_ptr<const void>>> copies_;
};

}  // namespace moedge
