// The part of ONNX Runtime's C interface that the operators use, declared here so that no header of it is needed.
//
// Every call goes through the table that OrtApiBase::GetApi(17) returns. The table only grows at its end, so the
// indices below hold in every release from 1.17 on. Version 17 is the lowest that has KernelContext_ParallelFor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace moedge {

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtValue;
struct OrtShape;  // OrtTensorTypeAndShapeInfo
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeContext;  // OrtShapeInferContext

using ApiTable = const void* const*;

struct OrtApiBase {
  ApiTable (*get_api)(uint32_t version);
  const char* (*get_version)();
};

constexpr uint32_t ABI_VERSION = 17;
constexpr int INVALID_ARGUMENT = 2;

enum ElementType : int { ANY = 0, FLOAT32 = 1, UINT8 = 2, INT32 = 6, FLOAT16 = 10 };
enum Presence : int { REQUIRED = 0, OPTIONAL = 1 };

// One operator. ONNX Runtime reads the members in this order and hands the same pointer back to each function.
struct OrtCustomOp {
  uint32_t version;
  void* (*create_kernel)(const OrtCustomOp*, ApiTable, const OrtKernelInfo*);
  const char* (*name)(const OrtCustomOp*);
  const char* (*execution_provider)(const OrtCustomOp*);
  int (*input_type)(const OrtCustomOp*, size_t);
  size_t (*input_count)(const OrtCustomOp*);
  int (*output_type)(const OrtCustomOp*, size_t);
  size_t (*output_count)(const OrtCustomOp*);
  void (*compute)(void*, OrtKernelContext*);
  void (*destroy)(void*);
  int (*input_presence)(const OrtCustomOp*, size_t);
  int (*output_presence)(const OrtCustomOp*, size_t);
  int (*input_memory)(const OrtCustomOp*, size_t);
  int (*variadic_input_least)(const OrtCustomOp*);
  int (*variadic_input_same)(const OrtCustomOp*);
  int (*variadic_output_least)(const OrtCustomOp*);
  int (*variadic_output_same)(const OrtCustomOp*);
  OrtStatus* (*create_kernel_v2)(const OrtCustomOp*, ApiTable, const OrtKernelInfo*, void**);
  OrtStatus* (*compute_v2)(void*, OrtKernelContext*);
  OrtStatus* (*infer_shape)(const OrtCustomOp*, OrtShapeContext*);
  int (*start_version)(const OrtCustomOp*);
  int (*end_version)(const OrtCustomOp*);
  size_t (*may_inplace)(int**, int**);
  void (*release_may_inplace)(int*, int*);
  size_t (*alias_map)(int**, int**);
  void (*release_alias_map)(int*, int*);
};
static_assert(sizeof(void*) != 8 || sizeof(OrtCustomOp) == 26 * 8, "the members of OrtCustomOp are its interface");

// What is wrong with a node or its inputs; becomes a status INVALID_ARGUMENT.
struct Invalid : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The functions of the table, by their index.
class Api {
 public:
  explicit Api(ApiTable table = nullptr) : table_(table) {}

  OrtStatus* status(const char* message) const { return call<0, OrtStatus*>(INVALID_ARGUMENT, message); }
  OrtStatus* create_domain(const char* name, OrtCustomOpDomain** out) const { return call<26, OrtStatus*>(name, out); }
  OrtStatus* add_op(OrtCustomOpDomain* domain, const OrtCustomOp* op) const { return call<27, OrtStatus*>(domain, op); }
  OrtStatus* add_domain(OrtSessionOptions* options, OrtCustomOpDomain* domain) const {
    return call<28, OrtStatus*>(options, domain);
  }
  void release(OrtStatus* status) const { call<93, void>(status); }

  void* data(const OrtValue* value) const {
    void* out = nullptr;
    check(call<51, OrtStatus*>(const_cast<OrtValue*>(value), &out));
    return out;
  }
  // Element type and dimensions of a tensor.
  int shape(const OrtValue* value, std::vector<int64_t>& dims) const {
    OrtShape* info = nullptr;
    check(call<65, OrtStatus*>(value, &info));
    int type = 0;
    size_t rank = 0;
    OrtStatus* status = call<60, OrtStatus*>(info, &type);
    if (!status) status = call<61, OrtStatus*>(info, &rank);
    dims.resize(rank);
    if (!status) status = call<62, OrtStatus*>(info, dims.data(), rank);
    call<99, void>(info);
    check(status);
    return type;
  }
  // Whether every dimension has a number or a name. One that has neither would be passed on as the number -1.
  bool is_known(const OrtShape* shape) const {
    size_t rank = 0;
    check(call<61, OrtStatus*>(shape, &rank));
    std::vector<int64_t> dims(rank);
    std::vector<const char*> names(rank);
    check(call<62, OrtStatus*>(shape, dims.data(), rank));
    check(call<63, OrtStatus*>(shape, names.data(), rank));
    for (size_t i = 0; i < rank; ++i)
      if (dims[i] < 0 && !(names[i] && *names[i])) return false;
    return true;
  }
  // False where the node has no such attribute.
  bool attribute(const OrtKernelInfo* info, const char* name, int64_t& out) const {
    return found(call<86, OrtStatus*>(info, name, &out));
  }
  bool attribute(const OrtKernelInfo* info, const char* name, std::string& out) const {
    size_t size = 0;
    if (!found(call<87, OrtStatus*>(info, name, static_cast<char*>(nullptr), &size)) || size == 0) return false;
    out.resize(size);
    if (!found(call<87, OrtStatus*>(info, name, &out[0], &size))) return false;
    out.resize(size - 1);  // the size counts the final zero
    return true;
  }
  bool attribute(const OrtKernelInfo* info, const char* name, float& out) const {
    return found(call<85, OrtStatus*>(info, name, &out));
  }
  // An input of a node that is a constant of the graph; null where it is computed, or left out.
  const OrtValue* constant(const OrtKernelInfo* info, size_t index) const {
    int is_constant = 0;
    const OrtValue* out = nullptr;
    return found(call<249, OrtStatus*>(info, index, &is_constant, &out)) && is_constant ? out : nullptr;
  }
  size_t input_count(const OrtKernelContext* context) const {
    size_t out = 0;
    check(call<88, OrtStatus*>(context, &out));
    return out;
  }
  size_t output_count(const OrtKernelContext* context) const {
    size_t out = 0;
    check(call<89, OrtStatus*>(context, &out));
    return out;
  }
  // Null for an input that is left out.
  const OrtValue* input(const OrtKernelContext* context, size_t index) const {
    const OrtValue* out = nullptr;
    check(call<90, OrtStatus*>(context, index, &out));
    return out;
  }
  OrtValue* output(OrtKernelContext* context, size_t index, const std::vector<int64_t>& dims) const {
    OrtValue* out = nullptr;
    check(call<91, OrtStatus*>(context, index, dims.data(), dims.size(), &out));
    return out;
  }
  // Runs work(data, 0..total-1) on the threads of the session; returns when all are done.
  void parallel_for(const OrtKernelContext* context, void (*work)(void*, size_t), size_t total, void* data) const {
    check(call<274, OrtStatus*>(context, work, total, size_t{0}, data));
  }
  OrtStatus* input_shape(OrtShapeContext* context, size_t index, OrtShape** out) const {
    return call<268, OrtStatus*>(context, index, out);
  }
  OrtStatus* set_output_shape(OrtShapeContext* context, size_t index, OrtShape* shape) const {
    return call<270, OrtStatus*>(context, index, shape);
  }

  // Throws what a failed call says.
  void check(OrtStatus* status) const {
    if (!status) return;
    const std::string message = call<2, const char*>(status);
    release(status);
    throw Invalid(message);
  }

 private:
  template <size_t INDEX, typename Result, typename... Arguments>
  Result call(Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(const_cast<void*>(table_[INDEX]))(arguments...);
  }
  bool found(OrtStatus* status) const {
    if (status) release(status);
    return !status;
  }

  ApiTable table_;
};

}  // namespace moedge
