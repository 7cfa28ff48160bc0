// Stands in for libcuda.so.1, and drives a plugin as TensorRT does at run time. A launch becomes a call of Python.

#include <NvInferRuntime.h>

#include <cstdlib>
#include <cstring>
#include <utility>

using namespace nvinfer1;

namespace {
using Callback = int (*)(char const* ptx, char const* name, unsigned const* grid, unsigned threads, void** arguments);
using Function = std::pair<char const*, char const*>;
Callback launched;
int capability;
}  // namespace

extern "C" {

void use(Callback callback, int number) {
    launched = callback;
    capability = number;
}

int cuCtxGetCurrent(void** context) {
    *context = &capability;
    return 0;
}
int cuCtxGetDevice(int* device) {
    *device = 0;
    return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
    *value = attribute == 75 ? capability / 10 : capability % 10;
    return 0;
}
// As the driver: PTX for sm_120a loads on 12.0 only; and nothing that is for sm_99 loads.
int cuModuleLoadData(void** module, void const* image) {
    char const* target = std::strstr(static_cast<char const*>(image), ".target sm_");
    char* suffix{};
    long const number = target == nullptr ? 0 : std::strtol(target + std::strlen(".target sm_"), &suffix, 10);
    if (number == 99 || (suffix != nullptr && *suffix == 'a' && number != capability)) return 222;
    *module = strdup(static_cast<char const*>(image));
    return 0;
}
int cuModuleGetFunction(void** function, void* module, char const* name) {
    *function = new Function(static_cast<char const*>(module), strdup(name));
    return 0;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned,
    void*, void** arguments, void**) {
    auto const* found = static_cast<Function*>(function);
    unsigned const grid[] = {x, y, z};
    return launched(found->first, found->second, grid, threads, arguments);
}

// Load a plugin from its serialized fields, give it `shapes` (rank, then dimensions, of each input) and enqueue it.
int run(IPluginCreatorInterface* const* (*creators)(int32_t&), char const* spec, int length, int inputs, int outputs,
    long const* shapes, void const* const* given, void* const* made) {
    int32_t count{};
    auto* creator = static_cast<IPluginCreatorV3One*>(creators(count)[0]);
    PluginField const field("spec", spec, PluginFieldType::kCHAR, length);
    PluginFieldCollection const fields{1, &field};
    IPluginV3* plugin = creator->createPlugin("node", &fields, TensorRTPhase::kRUNTIME);
    if (plugin == nullptr) return 100;
    auto runtime = [](IPluginV3* p) {
        return static_cast<IPluginV3OneRuntime*>(p->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    };
    auto const* kept = runtime(plugin)->getFieldsToSerialize();
    if (kept->nbFields != 1 || kept->fields[0].length != length || std::memcmp(kept->fields[0].data, spec, length) != 0)
        return 101;
    IPluginV3* attached = runtime(plugin)->attachToContext(nullptr);
    delete plugin;
    if (attached == nullptr) return 102;
    PluginTensorDesc descriptions[16] = {};
    for (int i = 0; i < inputs; ++i) {
        auto& dims = descriptions[i].dims;
        dims.nbDims = static_cast<int32_t>(*shapes++);
        for (int d = 0; d < dims.nbDims; ++d) dims.d[d] = *shapes++;
    }
    int status = runtime(attached)->onShapeChange(descriptions, inputs, descriptions + inputs, outputs);
    status = status != 0 ? 103 : runtime(attached)->enqueue(descriptions, descriptions + inputs, given, made, nullptr, nullptr);
    delete attached;
    return status;
}
}
