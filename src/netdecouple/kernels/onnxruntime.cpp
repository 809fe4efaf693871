// The operator netdecouple::DecoupledConv for ONNX Runtime, as a custom operator library.
//
// Inputs: X (N, n_i, H, W), depthwise (rows, 1, kh, kw), pointwise (n_o, rows / group, 1, 1), bias (n_o),
// slope (n_o; optional), residual (N, n_o, H', W'; optional). All but X and the residual must be initializers.
// Attributes: in_channels, channels (rows), strides (2), pads (4), dilations (2), group, minimum, maximum.
//
// The runtime's headers do not come with its Python package, so the few entries of its C interface that are used
// are declared here. The interface is versioned and only ever grows at the end: positions never change.
#include <cmath>
#include <cstdio>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "fused.h"

namespace {

struct Status;  // null is success
constexpr uint32_t VERSION = 16;  // of the interface; ONNX Runtime 1.16

struct Api {
    void* entry[512];
    template <typename... Arguments>
    Status* call(int position, Arguments... arguments) const {
        return reinterpret_cast<Status* (*)(Arguments...)>(entry[position])(arguments...);
    }
};

struct ApiBase {
    const Api* (*get)(uint32_t version);
    const char* (*version)();
};

// Positions in the table.
constexpr int CREATE_STATUS = 0, CREATE_DOMAIN = 26, DOMAIN_ADD = 27, ADD_DOMAIN = 28, TENSOR_DATA = 51, ELEMENT_TYPE = 60,
              DIMENSION_COUNT = 61, DIMENSIONS = 62, TYPE_AND_SHAPE = 65, ATTRIBUTE_FLOAT = 85, ATTRIBUTE_INT = 86,
              GET_INPUT = 90, GET_OUTPUT = 91, RELEASE_STATUS = 93, RELEASE_TYPE_AND_SHAPE = 99, ATTRIBUTE_INTS = 163,
              CONSTANT_INPUT = 249, PARALLEL_FOR = 274;
constexpr int FAIL = 1, INVALID_ARGUMENT = 2;  // status codes
constexpr int FLOAT = 1;                       // element type
constexpr int REQUIRED = 0, OPTIONAL = 1;      // inputs

enum Input : size_t { X, DEPTHWISE, POINTWISE, BIAS, SLOPE, RESIDUAL, INPUTS };

// A failed call into the runtime; the status goes back to it.
struct Failed {
    Status* status;
};

Status* status(const Api* api, int code, const std::string& message) {
    return api->call<int, const char*>(CREATE_STATUS, code, ("DecoupledConv: " + message).c_str());
}

void must(Status* result) {
    if (result) throw Failed{result};
}

bool succeeded(const Api* api, Status* result) {
    if (result) reinterpret_cast<void (*)(Status*)>(api->entry[RELEASE_STATUS])(result);
    return !result;
}

struct Tensor {
    float* data = nullptr;
    std::vector<int64_t> shape;
};

Tensor tensor(const Api* api, const void* value, const char* name) {
    void* info = nullptr;
    must(api->call<const void*, void**>(TYPE_AND_SHAPE, value, &info));
    struct Release {
        const Api* api;
        void* info;
        ~Release() { reinterpret_cast<void (*)(void*)>(api->entry[RELEASE_TYPE_AND_SHAPE])(info); }
    } release{api, info};
    int type = 0;
    size_t count = 0;
    must(api->call<const void*, int*>(ELEMENT_TYPE, info, &type));
    if (type != FLOAT) throw std::invalid_argument(std::string(name) + " must be float32");
    must(api->call<const void*, size_t*>(DIMENSION_COUNT, info, &count));
    Tensor found;
    found.shape.resize(count);
    must(api->call<const void*, int64_t*, size_t>(DIMENSIONS, info, found.shape.data(), count));
    must(api->call<const void*, void**>(TENSOR_DATA, value, reinterpret_cast<void**>(&found.data)));
    return found;
}

std::string text(const std::vector<int64_t>& shape) {
    std::string all = "(";
    for (size_t i = 0; i < shape.size(); ++i) all += (i ? ", " : "") + std::to_string(shape[i]);
    return all + ")";
}

void check_shape(const Tensor& given, const std::vector<int64_t>& wanted, const char* name) {
    if (given.shape != wanted)
        throw std::invalid_argument(std::string(name) + " has shape " + text(given.shape) + ", not " + text(wanted));
}

struct Kernel {
    const Api* api;
    netdecouple_layer* layer = nullptr;
    int64_t n_i = 0, n_o = 0;
    ~Kernel() {
        if (layer) netdecouple_destroy(layer);
    }
};

Tensor constant(const Api* api, const void* info, size_t index, const char* name, bool required) {
    int is_constant = 0;
    const void* value = nullptr;
    const bool known = succeeded(
        api, api->call<const void*, size_t, int*, const void**>(CONSTANT_INPUT, info, index, &is_constant, &value));
    if (!known || !is_constant || !value) {
        if (required) throw std::invalid_argument(std::string(name) + " must be an initializer");
        return {};
    }
    return tensor(api, value, name);
}

void integers(const Api* api, const void* info, const char* name, int64_t* to, size_t count) {
    size_t size = 0;
    if (!succeeded(api, api->call<const void*, const char*, int64_t*, size_t*>(ATTRIBUTE_INTS, info, name, nullptr, &size)))
        return;  // the default stands
    if (size != count) throw std::invalid_argument(std::string(name) + " must have " + std::to_string(count) + " values");
    must(api->call<const void*, const char*, int64_t*, size_t*>(ATTRIBUTE_INTS, info, name, to, &size));
}

// Run `body`, and turn whatever it throws into a status.
template <typename Body>
Status* guarded(const Api* api, Body body) {
    try {
        body();
        return nullptr;
    } catch (const Failed& failed) {
        return failed.status;
    } catch (const std::bad_alloc&) {
        return status(api, FAIL, "out of memory");
    } catch (const std::exception& problem) {
        return status(api, INVALID_ARGUMENT, problem.what());
    }
}

Status* create(const void*, const Api* api, const void* info, void** made) {
    return guarded(api, [&] {
        const Tensor depthwise = constant(api, info, DEPTHWISE, "the depthwise weight", true);
        const Tensor pointwise = constant(api, info, POINTWISE, "the pointwise weight", true);
        const Tensor bias = constant(api, info, BIAS, "the bias", true);
        const Tensor slope = constant(api, info, SLOPE, "the slope", false);
        if (depthwise.shape.size() != 4 || depthwise.shape[1] != 1 || pointwise.shape.size() != 4)
            throw std::invalid_argument("weights must be (rows, 1, kh, kw) and (n_o, rows / group, 1, 1), not " +
                                        text(depthwise.shape) + " and " + text(pointwise.shape));
        const float infinity = std::numeric_limits<float>::infinity();
        netdecouple_shape s{0, pointwise.shape[0], 1, depthwise.shape[0], depthwise.shape[2], depthwise.shape[3],
                            {1, 1}, {0, 0, 0, 0}, {1, 1}, -infinity, infinity};
        succeeded(api, api->call<const void*, const char*, int64_t*>(ATTRIBUTE_INT, info, "group", &s.groups));
        succeeded(api, api->call<const void*, const char*, float*>(ATTRIBUTE_FLOAT, info, "minimum", &s.minimum));
        succeeded(api, api->call<const void*, const char*, float*>(ATTRIBUTE_FLOAT, info, "maximum", &s.maximum));
        must(api->call<const void*, const char*, int64_t*>(ATTRIBUTE_INT, info, "in_channels", &s.n_i));
        integers(api, info, "strides", s.strides, 2);
        integers(api, info, "pads", s.pads, 4);
        integers(api, info, "dilations", s.dilations, 2);
        if (s.groups < 1) throw std::invalid_argument("group must be positive");
        check_shape(pointwise, {s.n_o, s.rows / s.groups, 1, 1}, "the pointwise weight");
        check_shape(bias, {s.n_o}, "the bias");
        if (slope.data) check_shape(slope, {s.n_o}, "the slope");
        std::vector<int64_t> channels(s.rows, -1);
        integers(api, info, "channels", channels.data(), channels.size());
        char error[256] = "";
        auto* kernel = new Kernel{api};
        kernel->n_i = s.n_i, kernel->n_o = s.n_o;
        kernel->layer = netdecouple_create(&s, channels.data(), depthwise.data, pointwise.data, bias.data, slope.data,
                                           error, sizeof error);
        if (!kernel->layer) {
            delete kernel;
            throw std::invalid_argument(error);
        }
        *made = kernel;
    });
}

struct Pool {
    const Api* api;
    const void* context;
    Status* result;
};

void parallel_for(void* to, void (*work)(void*, size_t), size_t count, void* task) {
    auto* pool = static_cast<Pool*>(to);
    pool->result = pool->api->call<const void*, void (*)(void*, size_t), size_t, size_t, void*>(
        PARALLEL_FOR, pool->context, work, count, 0, task);
}

Status* compute(void* made, void* context) {
    const auto& kernel = *static_cast<Kernel*>(made);
    const Api* api = kernel.api;
    return guarded(api, [&] {
        const void *input = nullptr, *residual = nullptr;
        must(api->call<const void*, size_t, const void**>(GET_INPUT, context, X, &input));
        const Tensor x = tensor(api, input, "X");
        if (x.shape.size() != 4 || x.shape[1] != kernel.n_i)
            throw std::invalid_argument("X has shape " + text(x.shape) + ", not (N, " + std::to_string(kernel.n_i) + ", H, W)");
        std::vector<int64_t> shape{x.shape[0], kernel.n_o, 0, 0};
        netdecouple_output_size(kernel.layer, x.shape[2], x.shape[3], &shape[2], &shape[3]);
        if (shape[2] <= 0 || shape[3] <= 0)
            throw std::invalid_argument("X of shape " + text(x.shape) + " is smaller than the kernel");
        Tensor added;
        if (succeeded(api, api->call<const void*, size_t, const void**>(GET_INPUT, context, RESIDUAL, &residual)) && residual) {
            added = tensor(api, residual, "the residual");
            check_shape(added, shape, "the residual");
        }
        void* output = nullptr;
        must(api->call<void*, size_t, const int64_t*, size_t, void**>(GET_OUTPUT, context, 0, shape.data(), 4, &output));
        float* y = nullptr;
        must(api->call<const void*, void**>(TENSOR_DATA, output, reinterpret_cast<void**>(&y)));
        Pool pool{api, context, nullptr};
        if (netdecouple_run(kernel.layer, x.data, added.data, y, shape[0], x.shape[2], x.shape[3], parallel_for, &pool))
            throw std::bad_alloc();
        must(pool.result);
    });
}

struct CustomOp {
    uint32_t version;
    void* (*create_old)(const CustomOp*, const Api*, const void*);
    const char* (*name)(const CustomOp*);
    const char* (*provider)(const CustomOp*);
    int (*input_type)(const CustomOp*, size_t);
    size_t (*input_count)(const CustomOp*);
    int (*output_type)(const CustomOp*, size_t);
    size_t (*output_count)(const CustomOp*);
    void (*compute_old)(void*, void*);
    void (*destroy)(void*);
    int (*input_characteristic)(const CustomOp*, size_t);
    int (*output_characteristic)(const CustomOp*, size_t);
    int (*input_memory)(const CustomOp*, size_t);
    int (*variadic[4])(const CustomOp*);
    Status* (*create)(const CustomOp*, const Api*, const void*, void**);
    Status* (*compute)(void*, void*);
    Status* (*infer_shape)(const CustomOp*, void*);
    int (*first_version)(const CustomOp*);
    int (*last_version)(const CustomOp*);
    void* aliases[4];
};
static_assert(sizeof(void*) != 8 || sizeof(CustomOp) == 208, "the layout of ONNX Runtime's OrtCustomOp");

const CustomOp OPERATOR = {
    VERSION,
    nullptr,
    [](const CustomOp*) { return "DecoupledConv"; },
    [](const CustomOp*) { return "CPUExecutionProvider"; },
    [](const CustomOp*, size_t) { return FLOAT; },
    [](const CustomOp*) { return size_t(INPUTS); },
    [](const CustomOp*, size_t) { return FLOAT; },
    [](const CustomOp*) { return size_t(1); },
    nullptr,
    [](void* kernel) { delete static_cast<Kernel*>(kernel); },
    [](const CustomOp*, size_t index) { return index >= SLOPE ? OPTIONAL : REQUIRED; },
    [](const CustomOp*, size_t) { return REQUIRED; },
    [](const CustomOp*, size_t) { return 0; },
    {[](const CustomOp*) { return 0; }, [](const CustomOp*) { return 0; }, [](const CustomOp*) { return 0; },
     [](const CustomOp*) { return 0; }},
    [](const CustomOp*, const Api* api, const void* info, void** kernel) { return create(nullptr, api, info, kernel); },
    compute,
    nullptr,
    [](const CustomOp*) { return 1; },
    [](const CustomOp*) { return std::numeric_limits<int>::max(); },
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace

extern "C" NETDECOUPLE_EXPORT Status* RegisterCustomOps(void* options, const ApiBase* base) {
    const Api* api = base->get(VERSION);
    if (!api) return base->get(1)->call<int, const char*>(CREATE_STATUS, FAIL, "DecoupledConv needs ONNX Runtime 1.16 or newer");
    // A domain lives as long as the sessions that use it, and nothing tells when that ends: one for the whole process.
    static void* domain = nullptr;
    if (!domain) {
        if (Status* bad = api->call<const char*, void**>(CREATE_DOMAIN, "netdecouple", &domain)) return bad;
        if (Status* bad = api->call<void*, const CustomOp*>(DOMAIN_ADD, domain, &OPERATOR)) return bad;
    }
    return api->call<void*, void*>(ADD_DOMAIN, options, domain);
}
