// What ONNX Runtime calls: the registration of the operators, and between its functions and ours.
#include <new>
#include <string>
#include <utility>

#include "abi.h"
#include "ops.h"

namespace moedge {
namespace {

struct Op : OrtCustomOp {
  Signature signature{};
  Api api{nullptr};
};

const Op& as_op(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

struct Kernel {
  const Op* op;
  std::unique_ptr<Node> node;
  Copies copies;
};

// Runs work(); what it throws becomes a status.
template <typename Work>
OrtStatus* guarded(const Api& api, Work work) {
  try {
    work();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return api.status("moedge: out of memory.");
  } catch (const std::exception& error) {
    return api.status(error.what());
  }
}

OrtStatus* create(const OrtCustomOp* op, ApiTable, const OrtKernelInfo* info, void** out) {
  const Op& self = as_op(op);
  return guarded(self.api, [&] {
    *out = nullptr;
    auto node = self.signature.make(Attributes(self.api, info, self.signature.name));
    *out = new Kernel{&self, std::move(node), Copies(self.api, info, self.signature.types, self.signature.inputs)};
  });
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  const Kernel& self = *static_cast<Kernel*>(kernel);
  const Api& api = self.op->api;
  return guarded(api, [&] {
    self.node->compute(Call(api, context, self.op->signature.name, self.copies), Threads(api, context));
  });
}

OrtStatus* shape_of_x(const OrtCustomOp* op, OrtShapeContext* context) {
  const Api& api = as_op(op).api;
  return guarded(api, [&] {
    OrtShape* shape = nullptr;
    api.check(api.input_shape(context, 0, &shape));
    if (api.is_known(shape)) api.check(api.set_output_shape(context, 0, shape));
  });
}

void fill(Op& op, const Signature& signature, const Api& api) {
  op.signature = signature;
  op.api = api;
  op.version = ABI_VERSION;
  op.name = [](const OrtCustomOp* self) { return as_op(self).signature.name; };
  op.execution_provider = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU
  op.input_type = [](const OrtCustomOp* self, size_t i) -> int { return as_op(self).signature.types[i]; };
  op.input_count = [](const OrtCustomOp* self) { return as_op(self).signature.inputs; };
  op.output_type = [](const OrtCustomOp*, size_t) -> int { return FLOAT32; };
  op.output_count = [](const OrtCustomOp* self) { return as_op(self).signature.outputs; };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.input_presence = [](const OrtCustomOp* self, size_t i) -> int {
    return as_op(self).signature.required[i] ? REQUIRED : OPTIONAL;
  };
  op.output_presence = [](const OrtCustomOp*, size_t i) -> int { return i ? OPTIONAL : REQUIRED; };
  op.input_memory = [](const OrtCustomOp*, size_t) { return 0; };
  op.variadic_input_least = op.variadic_input_same = [](const OrtCustomOp*) { return 0; };
  op.variadic_output_least = op.variadic_output_same = [](const OrtCustomOp*) { return 0; };
  op.create_kernel_v2 = &create;
  op.compute_v2 = &compute;
  op.infer_shape = signature.keeps_shape ? &shape_of_x : nullptr;
  op.start_version = [](const OrtCustomOp*) { return 1; };
  op.end_version = [](const OrtCustomOp*) { return 0x7fffffff; };
}

constexpr const Signature* SIGNATURES[] = {&GATHER_LINEAR, &GATHER_GLU, &ROUTED_GLU};
constexpr size_t COUNT = sizeof SIGNATURES / sizeof SIGNATURES[0];

// The operators and their domain outlive every session: made once, never released.
struct Domain {
  Op ops[COUNT];
  OrtCustomOpDomain* domain = nullptr;

  explicit Domain(const Api& api) {
    kernels();  // a wrong MOEDGE_CPU_ISA or MOEDGE_CPU_PAGES is said here, not at the first token
    large_pages();
    api.check(api.create_domain("moedge.cpu", &domain));
    for (size_t i = 0; i < COUNT; ++i) {
      fill(ops[i], *SIGNATURES[i], api);
      api.check(api.add_op(domain, &ops[i]));
    }
  }
};

}  // namespace
}  // namespace moedge

extern "C" __attribute__((visibility("default"))) moedge::OrtStatus* RegisterCustomOps(
    moedge::OrtSessionOptions* options, const moedge::OrtApiBase* base) {
  const moedge::ApiTable table = base->get_api(moedge::ABI_VERSION);
  if (!table) return nullptr;  // older than 1.17: its own sentence says that the operators are not registered
  const moedge::Api api(table);
  return moedge::guarded(api, [&] {
    static moedge::Domain* domain = new moedge::Domain(api);
    api.check(api.add_domain(options, domain->domain));
  });
}
