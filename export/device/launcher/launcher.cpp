// One TensorRT plugin, moedge::Launch, that launches PTX through the CUDA driver: any kernel of convert/ops/kernels/.
//
// A node's only attribute, `spec`, says everything: types and dimensions of its tensors, and for each kernel its compute
// capability, the most rows that it is for, its grid and its PTX (export/device/launcher/__init__.py writes it). The
// engine stores it, so the library knows no model and is compiled once. It needs libcuda at run time and nothing of CUDA
// at build time: an engine can be built without a GPU.

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

namespace {

using namespace nvinfer1;

constexpr char const* kName = "Launch";
constexpr char const* kVersion = "1";
constexpr char const* kNamespace = "moedge";

// What moedgeLaunchReason gives: TensorRT passes on that a plugin failed, not why.
struct Reason {
    std::mutex mutex;
    std::string text;
};

Reason& reason() {
    static Reason kept;
    return kept;
}

bool complain(std::string const& what) {
    {
        std::lock_guard<std::mutex> lock(reason().mutex);
        reason().text = what;
    }
    std::fprintf(stderr, "moedge::Launch: %s\n", what.c_str());
    return false;
}

// (times * n + plus) / over: moedge.runtime.device.moedge_plugins.Extent
struct Extent {
    int64_t times, plus, over;
    unsigned operator()(int64_t n) const { return static_cast<unsigned>((times * n + plus) / over); }
};

struct Kernel {
    int capability;
    int64_t most;  // the most rows (or tokens) that it is taken for
    unsigned threads, shared;
    bool takesSize;
    Extent grid[3];
    std::string name, ptx;

    // PTX runs on newer GPUs, too, but that of an architecture-specific target (`.target sm_120a`, which Triton writes)
    // runs on that one alone, and that of a family-specific one (`sm_120f`) within its major version.
    bool runsOn(int here) const {
        constexpr char const* kTarget = ".target sm_";
        size_t at = ptx.find(kTarget);
        at = at == std::string::npos ? at : ptx.find_first_not_of("0123456789", at + std::strlen(kTarget));
        char const suffix = at == std::string::npos ? ' ' : ptx[at];
        if (suffix == 'a') return capability == here;
        return capability <= here && (suffix != 'f' || capability / 10 == here / 10);
    }
};

// A dimension of an output: `times` if input < 0, else times * dimension `axis` of that input.
struct Dimension {
    int64_t times;
    int input, axis;
};

struct Input {
    int32_t type;
    std::vector<int64_t> dims;  // -1: dynamic
};

struct Output {
    int32_t type;
    std::vector<Dimension> dims;
};

struct Spec {
    std::string text;
    std::string label;
    int sizeInput, sizeAxis;  // the dynamic size n
    std::vector<Input> inputs;
    std::vector<Output> outputs;
    std::vector<Kernel> kernels;
};

// Numbers and names separated by white space; a PTX text follows its length in bytes and one newline.
std::shared_ptr<Spec const> parse(char const* data, size_t length) {
    auto spec = std::make_shared<Spec>();
    spec->text.assign(data, length);
    std::istringstream in(spec->text);
    std::string magic;
    size_t inputs{}, outputs{}, kernels{}, rank{};
    constexpr size_t kMost = 64;
    in >> magic >> spec->label >> spec->sizeInput >> spec->sizeAxis >> inputs >> outputs >> kernels;
    if (!in || magic != "moedge.launch/1" || inputs > kMost || outputs > kMost || kernels > kMost) return nullptr;
    spec->inputs.resize(inputs);
    for (auto& input : spec->inputs) {
        if (!(in >> input.type >> rank) || rank > Dims::MAX_DIMS) return nullptr;
        input.dims.resize(rank);
        for (auto& dim : input.dims) in >> dim;
    }
    spec->outputs.resize(outputs);
    for (auto& output : spec->outputs) {
        if (!(in >> output.type >> rank) || rank > Dims::MAX_DIMS) return nullptr;
        output.dims.resize(rank);
        for (auto& dim : output.dims) {
            in >> dim.times >> dim.input >> dim.axis;
            if (!in || dim.input >= static_cast<int>(inputs)) return nullptr;
            if (dim.input >= 0 && (dim.axis < 0 || dim.axis >= static_cast<int>(spec->inputs[dim.input].dims.size())))
                return nullptr;
        }
    }
    spec->kernels.resize(kernels);
    for (auto& kernel : spec->kernels) {
        in >> kernel.capability >> kernel.most >> kernel.threads >> kernel.shared >> kernel.takesSize;
        for (auto& extent : kernel.grid) {
            in >> extent.times >> extent.plus >> extent.over;
            if (!in || extent.over < 1) return nullptr;
        }
        size_t bytes{};
        in >> kernel.name >> bytes;
        if (!in || in.get() != '\n' || bytes > spec->text.size()) return nullptr;
        kernel.ptx.resize(bytes);
        in.read(&kernel.ptx[0], static_cast<std::streamsize>(bytes));
    }
    if (!in || spec->sizeInput < 0 || spec->sizeInput >= static_cast<int>(inputs) || spec->sizeAxis < 0
        || spec->sizeAxis >= static_cast<int>(spec->inputs[spec->sizeInput].dims.size()))
        return nullptr;
    return spec;
}

// The few functions of the CUDA driver, from the libcuda that is there.
struct Driver {
    int (*getContext)(void**){};
    int (*getDevice)(int*){};
    int (*getAttribute)(int*, int, int){};
    int (*loadModule)(void**, void const*){};
    int (*getFunction)(void**, void*, char const*){};
    int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, cudaStream_t, void**,
        void**){};
    bool ready{};

    Driver() {
        void* library = dlopen("libcuda.so.1", RTLD_NOW);
        if (library == nullptr) return;
        auto find = [library](auto& function, char const* name) {
            function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
            return function != nullptr;
        };
        ready = find(getContext, "cuCtxGetCurrent") && find(getDevice, "cuCtxGetDevice")
            && find(getAttribute, "cuDeviceGetAttribute") && find(loadModule, "cuModuleLoadData")
            && find(getFunction, "cuModuleGetFunction") && find(launch, "cuLaunchKernel");
    }

    static Driver& get() {
        static Driver driver;
        return driver;
    }

    // major * 10 + minor of the current device, 0 without one
    int capability() const {
        constexpr int kMajor = 75, kMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
        int device{}, major{}, minor{};
        if (!ready || getDevice(&device) || getAttribute(&major, kMajor, device) || getAttribute(&minor, kMinor, device))
            return 0;
        return major * 10 + minor;
    }

    // Layers share kernels: each PTX is compiled once a context, and kept for the life of the process.
    void* function(std::string const& ptx, std::string const& name) {
        static std::mutex mutex;
        static std::map<std::pair<void*, std::string>, void*> loaded;
        void *context{}, *module{}, *found{};
        if (getContext(&context)) return nullptr;
        std::lock_guard<std::mutex> lock(mutex);
        auto& kept = loaded[{context, ptx}];
        if (kept == nullptr && loadModule(&module, ptx.c_str()) == 0 && getFunction(&found, module, name.c_str()) == 0)
            kept = found;
        return kept;
    }
};

class Launch final : public IPluginV3, IPluginV3OneCore, IPluginV3OneBuild, IPluginV3OneRuntime {
public:
    explicit Launch(std::shared_ptr<Spec const> spec) : mSpec(std::move(spec)) {}

    // --- IPluginV3
    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        default: return static_cast<IPluginV3OneCore*>(this);
        }
    }
    IPluginV3* clone() noexcept override { return new Launch(mSpec); }

    // --- IPluginV3OneCore
    char const* getPluginName() const noexcept override { return kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }

    // --- IPluginV3OneBuild
    int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(mSpec->outputs.size()); }
    char const* getMetadataString() noexcept override { return mSpec->label.c_str(); }

    int32_t getOutputDataTypes(DataType* types, int32_t count, DataType const*, int32_t given) const noexcept override {
        if (!counts(given, count)) return 1;
        for (int32_t i = 0; i < count; ++i) types[i] = static_cast<DataType>(mSpec->outputs[i].type);
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t given, DimsExprs const*, int32_t, DimsExprs* outputs,
        int32_t count, IExprBuilder& builder) noexcept override {
        if (!counts(given, count)) return 1;
        for (int32_t i = 0; i < given; ++i) {
            auto const& expected = mSpec->inputs[i].dims;
            bool same = inputs[i].nbDims == static_cast<int32_t>(expected.size());
            for (size_t d = 0; same && d < expected.size(); ++d)
                same = expected[d] < 0
                    || (inputs[i].d[d]->isConstant() && inputs[i].d[d]->getConstantValue() == expected[d]);
            if (!same) return wrong(i, "other dimensions");
        }
        for (int32_t i = 0; i < count; ++i) {
            auto const& dims = mSpec->outputs[i].dims;
            outputs[i].nbDims = static_cast<int32_t>(dims.size());
            for (size_t d = 0; d < dims.size(); ++d) {
                auto const* times = builder.constant(dims[d].times);
                outputs[i].d[d] = dims[d].input < 0
                    ? times
                    : builder.operation(DimensionOperation::kPROD, *inputs[dims[d].input].d[dims[d].axis], *times);
            }
        }
        return 0;
    }

    bool supportsFormatCombination(
        int32_t position, DynamicPluginTensorDesc const* tensors, int32_t given, int32_t count) noexcept override {
        auto const& desc = tensors[position].desc;
        return counts(given, count) && desc.format == TensorFormat::kLINEAR
            && static_cast<int32_t>(desc.type) == typeOf(position);
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t given, DynamicPluginTensorDesc const*,
        int32_t count) noexcept override {
        if (!counts(given, count)) return 1;
        for (int32_t i = 0; i < given; ++i)
            if (static_cast<int32_t>(inputs[i].desc.type) != mSpec->inputs[i].type) return wrong(i, "another type");
        return 0;
    }

    // --- IPluginV3OneRuntime
    int32_t onShapeChange(PluginTensorDesc const* inputs, int32_t given, PluginTensorDesc const*,
        int32_t count) noexcept override {
        if (!counts(given, count)) return 1;
        for (int32_t i = 0; i < given; ++i) {
            auto const& expected = mSpec->inputs[i].dims;
            bool same = inputs[i].dims.nbDims == static_cast<int32_t>(expected.size());
            for (size_t d = 0; same && d < expected.size(); ++d)
                same = expected[d] < 0 || inputs[i].dims.d[d] == expected[d];
            if (!same) return wrong(i, "other dimensions");
        }
        return 0;
    }

    // Modules are loaded here, not when the first call may be part of the capture of a CUDA graph.
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override {
        auto made = std::make_unique<Launch>(mSpec);
        return made->load() ? made.release() : nullptr;
    }

    int32_t enqueue(PluginTensorDesc const* inputs, PluginTensorDesc const*, void const* const* inputData,
        void* const* outputData, void*, cudaStream_t stream) noexcept override {
        int64_t const n = inputs[mSpec->sizeInput].dims.d[mSpec->sizeAxis];
        if (n == 0) return 0;
        for (auto const& [kernel, function] : mLoaded) {
            if (n > kernel->most) continue;
            auto size = static_cast<int32_t>(n);
            std::vector<void const*> pointers(inputData, inputData + mSpec->inputs.size());
            pointers.insert(pointers.end(), outputData, outputData + mSpec->outputs.size());
            std::vector<void*> arguments;
            for (auto& pointer : pointers) arguments.push_back(&pointer);
            if (kernel->takesSize)
                arguments.insert(arguments.begin() + static_cast<std::ptrdiff_t>(mSpec->inputs.size()), &size);
            auto const& grid = kernel->grid;
            int const status = Driver::get().launch(function, grid[0](n), grid[1](n), grid[2](n), kernel->threads, 1, 1,
                kernel->shared, stream, arguments.data(), nullptr);
            return status == 0 ? 0 : failed("cuLaunchKernel of " + kernel->name, status);
        }
        return failed("no kernel was loaded for a size", n);
    }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override {
        auto const& text = mSpec->text;
        mField = PluginField("spec", text.data(), PluginFieldType::kCHAR, static_cast<int32_t>(text.size()));
        mFields.nbFields = 1;
        mFields.fields = &mField;
        return &mFields;
    }

private:
    bool counts(int32_t inputs, int32_t outputs) const {
        return inputs == static_cast<int32_t>(mSpec->inputs.size())
            && outputs == static_cast<int32_t>(mSpec->outputs.size())
            ? true
            : complain(mSpec->label + " has another number of inputs or outputs");
    }

    int32_t typeOf(int32_t position) const {
        auto const inputs = static_cast<int32_t>(mSpec->inputs.size());
        return position < inputs ? mSpec->inputs[position].type : mSpec->outputs[position - inputs].type;
    }

    int32_t wrong(int32_t input, char const* what) const {
        complain("input " + std::to_string(input) + " of " + mSpec->label + " has " + what + " than its kernels");
        return 1;
    }

    int32_t failed(std::string const& what, int64_t number) const {
        complain(mSpec->label + ": " + what + " (" + std::to_string(number) + ")");
        return 1;
    }

    // Take the kernels of the newest capability that runs here, in the order in which they are tried; those of an older one
    // where the driver does not load them.
    bool load() {
        auto& driver = Driver::get();
        int const here = driver.capability();
        std::map<int, bool, std::greater<int>> found;  // capability -> all of its kernels run here
        for (auto const& kernel : mSpec->kernels) {
            auto const entry = found.emplace(kernel.capability, true).first;
            entry->second = entry->second && kernel.runsOn(here);
        }
        std::string refused;
        for (auto const& [capability, runs] : found)
            if (runs && take(capability, refused)) return true;
        return complain(refused.empty() ? mSpec->label + " has no kernel for SM" + std::to_string(here) : refused);
    }

    bool take(int capability, std::string& refused) {
        mLoaded.clear();
        for (auto const& kernel : mSpec->kernels) {
            if (kernel.capability != capability) continue;
            void* function = Driver::get().function(kernel.ptx, kernel.name);
            if (function == nullptr) {
                if (refused.empty())
                    refused = "the CUDA driver does not load " + kernel.name + " for SM" + std::to_string(capability);
                return false;
            }
            mLoaded.emplace_back(&kernel, function);
        }
        return true;
    }

    std::shared_ptr<Spec const> mSpec;
    std::vector<std::pair<Kernel const*, void*>> mLoaded;
    PluginField mField;
    PluginFieldCollection mFields{};
};

class Creator final : public IPluginCreatorV3One {
public:
    IPluginV3* createPlugin(char const* name, PluginFieldCollection const* fields, TensorRTPhase) noexcept override {
        for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
            auto const& field = fields->fields[i];
            if (std::strcmp(field.name, "spec") != 0 || field.type != PluginFieldType::kCHAR) continue;
            if (auto spec = parse(static_cast<char const*>(field.data), static_cast<size_t>(field.length)))
                return new Launch(std::move(spec));
        }
        complain(std::string("node ") + name + " has no spec that this version reads");
        return nullptr;
    }
    PluginFieldCollection const* getFieldNames() noexcept override { return &mFields; }
    char const* getPluginName() const noexcept override { return kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }

private:
    PluginField mField{"spec", nullptr, PluginFieldType::kCHAR, 0};
    PluginFieldCollection mFields{1, &mField};
};

}  // namespace

// What IPluginRegistry::loadLibrary looks for.
#define EXPORTED extern "C" __attribute__((visibility("default")))

// TensorRT for RTX 1.7 asks for it, and its finder finds no logger: messages go to the standard error stream.
EXPORTED void setLoggerFinder(ILoggerFinder*) {}

EXPORTED IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static Creator creator;
    static IPluginCreatorInterface* const creators[] = {&creator};
    count = 1;
    return creators;
}

// The reason of the last failure, empty where there was none since the last call: for the error that the user sees.
EXPORTED char const* moedgeLaunchReason() {
    thread_local std::string last;
    std::lock_guard<std::mutex> lock(reason().mutex);
    last.swap(reason().text);
    reason().text.clear();
    return last.c_str();
}
