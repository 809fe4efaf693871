// The operator netdecouple::DecoupledConv for ONNX Runtime, as a custom operator library.
//
// Inputs: X (N, n_i, H, W), depthwise (rows, 1, kh, kw), pointwise (n_o, rows / group, 1, 1), bias (n_o),
// slope (n_o; optional), residual (N, n_o, H', W'; optional). All but X and the residual must be initializers.
// Attributes: in_channels, channels (rows), strides (2), pads (4), dilations (2), group, minimum, maximum.
//
// The runtime's headers do not come with its Python package, so the few entries of its C interface that are used
// are declared here. The interface is versioned and only ever grows at the end: positions never change.
#include <limits>
#include <map>
#include <memory>
#include <mutex>
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
              ATTRIBUTE_STRING = 87, GET_INPUT = 90, GET_OUTPUT = 91, RELEASE_STATUS = 93, RELEASE_TYPE_AND_SHAPE = 99,
              ATTRIBUTE_FLOATS = 162, ATTRIBUTE_INTS = 163, CONSTANT_INPUT = 249, PARALLEL_FOR = 274;
constexpr int FAIL = 1, INVALID_ARGUMENT = 2;  // status codes
constexpr int FLOAT = 1;                       // element type
constexpr int REQUIRED = 0, OPTIONAL = 1;      // inputs

enum Input : size_t { X, DEPTHWISE, POINTWISE, BIAS, SLOPE, RESIDUAL, INPUTS };

// A failed call into the runtime; the status goes back to it.
struct Failed {
    Status* status;
};

Status* status(const Api* api, int code, const char* message) {
    return api->call<int, const char*>(CREATE_STATUS, code, message);
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
    const Api* api = nullptr;
    netdecouple_layer* layer = nullptr;
    int64_t n_i = 0, n_o = 0;
    bool has_slope = false;
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

// What a call says that asks for an attribute; false if the node has no such attribute, of whatever type.
bool given(const Api* api, const void* info, const char* name, const char* type, Status* answer) {
    if (succeeded(api, answer)) return true;
    float one = 0;
    int64_t whole = 0;
    size_t size = 0;
    if (succeeded(api, api->call<const void*, const char*, float*>(ATTRIBUTE_FLOAT, info, name, &one)) ||
        succeeded(api, api->call<const void*, const char*, int64_t*>(ATTRIBUTE_INT, info, name, &whole)) ||
        succeeded(api, api->call<const void*, const char*, char*, size_t*>(ATTRIBUTE_STRING, info, name, nullptr, &size)) ||
        succeeded(api, api->call<const void*, const char*, float*, size_t*>(ATTRIBUTE_FLOATS, info, name, nullptr, &size)) ||
        succeeded(api, api->call<const void*, const char*, int64_t*, size_t*>(ATTRIBUTE_INTS, info, name, nullptr, &size)))
        throw std::invalid_argument(std::string(name) + " must be " + type);
    return false;
}

bool integer(const Api* api, const void* info, const char* name, int64_t* to) {
    return given(api, info, name, "an integer",
                 api->call<const void*, const char*, int64_t*>(ATTRIBUTE_INT, info, name, to));
}

void number(const Api* api, const void* info, const char* name, float* to) {
    given(api, info, name, "a float", api->call<const void*, const char*, float*>(ATTRIBUTE_FLOAT, info, name, to));
}

bool integers(const Api* api, const void* info, const char* name, int64_t* to, size_t count) {
    size_t size = 0;
    if (!given(api, info, name, "a list of integers",
               api->call<const void*, const char*, int64_t*, size_t*>(ATTRIBUTE_INTS, info, name, nullptr, &size)))
        return false;
    if (size != count)
        throw std::invalid_argument(std::string(name) + " must have " + std::to_string(count) + " values, not " +
                                    std::to_string(size));
    must(api->call<const void*, const char*, int64_t*, size_t*>(ATTRIBUTE_INTS, info, name, to, &size));
    return true;
}

// Run `body`, and turn whatever it throws into a status: nothing may be thrown through the runtime's C code.
template <typename Body>
Status* guarded(const Api* api, Body body) {
    try {
        try {
            body();
            return nullptr;
        } catch (const Failed& failed) {
            return failed.status;
        } catch (const std::invalid_argument& problem) {
            return status(api, INVALID_ARGUMENT, (std::string("DecoupledConv: ") + problem.what()).c_str());
        }
    } catch (const std::bad_alloc&) {
        return status(api, FAIL, "DecoupledConv: out of memory");
    } catch (...) {
        return status(api, FAIL, "DecoupledConv: failed");
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
        integer(api, info, "group", &s.groups);
        number(api, info, "minimum", &s.minimum);
        number(api, info, "maximum", &s.maximum);
        if (!integer(api, info, "in_channels", &s.n_i)) throw std::invalid_argument("the attribute in_channels is missing");
        integers(api, info, "strides", s.strides, 2);
        integers(api, info, "pads", s.pads, 4);
        integers(api, info, "dilations", s.dilations, 2);
        if (s.groups < 1) throw std::invalid_argument("group must be positive");
        check_shape(pointwise, {s.n_o, s.rows / s.groups, 1, 1}, "the pointwise weight");
        check_shape(bias, {s.n_o}, "the bias");
        if (slope.data) check_shape(slope, {s.n_o}, "the slope");
        std::vector<int64_t> channels(s.rows, -1);
        if (!integers(api, info, "channels", channels.data(), channels.size()))
            throw std::invalid_argument("the attribute channels is missing");
        char error[256] = "";
        auto kernel = std::make_unique<Kernel>();
        kernel->api = api, kernel->n_i = s.n_i, kernel->n_o = s.n_o;
        kernel->layer = netdecouple_create(&s, channels.data(), depthwise.data, pointwise.data, bias.data, slope.data,
                                           error, sizeof error);
        if (!kernel->layer) throw std::invalid_argument(error);
        kernel->has_slope = slope.data != nullptr;
        *made = kernel.release();
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

// An input of a run, or null if the node has none there.
const void* optional(const Api* api, const void* context, size_t index) {
    const void* value = nullptr;
    return succeeded(api, api->call<const void*, size_t, const void**>(GET_INPUT, context, index, &value)) ? value : nullptr;
}

Status* compute(void* made, void* context) {
    const auto& kernel = *static_cast<Kernel*>(made);
    const Api* api = kernel.api;
    return guarded(api, [&] {
        const void* input = nullptr;
        must(api->call<const void*, size_t, const void**>(GET_INPUT, context, X, &input));
        const Tensor x = tensor(api, input, "X");
        if (x.shape.size() != 4 || x.shape[1] != kernel.n_i)
            throw std::invalid_argument("X has shape " + text(x.shape) + ", not (N, " + std::to_string(kernel.n_i) + ", H, W)");
        std::vector<int64_t> shape{x.shape[0], kernel.n_o, 0, 0};
        netdecouple_output_size(kernel.layer, x.shape[2], x.shape[3], &shape[2], &shape[3]);
        if (shape[2] <= 0 || shape[3] <= 0)
            throw std::invalid_argument("X of shape " + text(x.shape) + " is smaller than the kernel");
        // one that is computed could not be seen when the kernel was made
        if (!kernel.has_slope && optional(api, context, SLOPE)) throw std::invalid_argument("the slope must be an initializer");
        Tensor added;
        if (const void* residual = optional(api, context, RESIDUAL)) {
            added = tensor(api, residual, "the residual");
            check_shape(added, shape, "the residual");
        }
        void* output = nullptr;
        must(api->call<void*, size_t, const int64_t*, size_t, void**>(GET_OUTPUT, context, 0, shape.data(), 4, &output));
        float* y = nullptr;
        must(api->call<const void*, void**>(TENSOR_DATA, output, reinterpret_cast<void**>(&y)));
        Pool pool{api, context, nullptr};
        const bool failed =
            netdecouple_run(kernel.layer, x.data, added.data, y, shape[0], x.shape[2], x.shape[3], parallel_for, &pool);
        must(pool.result);
        if (failed) throw std::bad_alloc();
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
    if (!api) {
        const Api* oldest = base->get(1);
        return oldest ? status(oldest, FAIL, "DecoupledConv needs ONNX Runtime 1.16 or newer") : nullptr;
    }
    return guarded(api, [&] {
        // A domain lives as long as the sessions that use it, and nothing tells when that ends: one for the whole
        // process, and for each copy of ONNX Runtime in it.
        static std::mutex turn;
        static std::map<const Api*, void*> domains;
        const std::lock_guard<std::mutex> mine(turn);
        void*& domain = domains[api];
        if (!domain) {
            void* fresh = nullptr;
            must(api->call<const char*, void**>(CREATE_DOMAIN, "netdecouple", &fresh));
            must(api->call<void*, const CustomOp*>(DOMAIN_ADD, fresh, &OPERATOR));
            domain = fresh;
        }
        must(api->call<void*, void*>(ADD_DOMAIN, options, domain));
    });
}
