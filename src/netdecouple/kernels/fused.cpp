// Checks and packs layers, chooses the instruction set, cuts a run into jobs.
#include "fused.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

#include "layer.h"

namespace netdecouple {

Aligned::Aligned(size_t floats) : size(floats) {
    if (!floats) return;
    data = static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t(64)));
    std::fill(data, data + floats, 0.0f);
}

Aligned::~Aligned() { ::operator delete(data, std::align_val_t(64)); }

namespace {

constexpr int64_t CHUNK = 128;       // rows of the panels; with TILE vectors they fill part of the L2 cache
constexpr int64_t TILE = 14;         // vectors
constexpr int64_t ROWS = 16;         // of the output in a tile, where they are long: they share their neighbours' input
constexpr int64_t MANY = 256;        // output channels, beside which the filters take little time
constexpr int64_t MOST = int64_t(1) << 40;

// The level of this name; NULL if this processor does not have it.
const Level* level_named(const std::string& name) {
#if defined(NETDECOUPLE_X86)
    __builtin_cpu_init();
    if (name == "avx512" && __builtin_cpu_supports("avx512f")) return level_avx512();
    if (name == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return level_avx2();
#endif
    return name == "baseline" ? level_baseline() : nullptr;
}

const Level* best_level() {
    for (const char* name : {"avx512", "avx2"})
        if (const Level* level = level_named(name)) return level;
    return level_baseline();
}

std::atomic<const Level*>& level() {
    static std::atomic<const Level*> chosen{best_level()};
    return chosen;
}

// Cores that this process may use: of the machine's, those that its affinity and its container's quota leave it.
int64_t count_cores() {
    int64_t count = std::thread::hardware_concurrency();  // 0 if that is not known
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) count = CPU_COUNT(&allowed);
    if (std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
        long long quota, period;  // without a limit the first is the word "max"
        if (std::fscanf(file, "%lld %lld", &quota, &period) == 2 && period > 0)
            count = std::clamp<int64_t>((quota + period - 1) / period, 1, count);
        std::fclose(file);
    }
#endif
    return count;
}

int64_t cores() {
    static const int64_t found = count_cores();
    return found;
}

void check(bool good, const char* what) {
    if (!good) throw std::invalid_argument(what);
}

void check(const netdecouple_shape& s, const int64_t* channels) {
    check(s.n_i > 0 && s.n_o > 0 && s.groups > 0 && s.rows > 0 && s.kh > 0 && s.kw > 0,
          "channels, groups, rows and kernel must be positive");
    check(std::max({s.n_i, s.n_o, s.groups, s.rows}) < MOST / s.rows && s.kh < 1 << 10 && s.kw < 1 << 10, "the layer is too large");
    check(s.n_i % s.groups == 0 && s.n_o % s.groups == 0 && s.rows % s.groups == 0,
          "input channels, output channels and rows must be multiples of the groups");
    for (int i = 0; i < 2; ++i)
        check(s.strides[i] > 0 && s.dilations[i] > 0 && s.strides[i] < 1 << 20 && s.dilations[i] < 1 << 20,
              "strides and dilations must be positive");
    for (int64_t pad : s.pads) check(pad >= 0 && pad < 1 << 20, "pads must not be negative");
    check(!std::isnan(s.minimum) && !std::isnan(s.maximum), "minimum and maximum must be numbers");
    const int64_t rows = s.rows / s.groups, inputs = s.n_i / s.groups;
    for (int64_t r = 0; r < s.rows; ++r)
        check(channels[r] >= r / rows * inputs && channels[r] < (r / rows + 1) * inputs,
              "a row reads a channel that its group does not have");
}

// Add the filters of one channel, `count` of them, in the order of their rows; they end as far as `weights` and `taps`
// are filled.
void add_filters(Layer& layer, int64_t channel, const float* depthwise, const int64_t* rows, int64_t count,
                 float*& weights, int32_t*& taps) {
    const int64_t size = layer.shape.kh * layer.shape.kw, before = layer.filters.size();
    const auto used = [&](int64_t from, int64_t n, int64_t tap) {
        return std::any_of(rows + from, rows + from + n, [&](int64_t row) { return depthwise[row * size + tap] != 0; });
    };
    const auto taps_of = [&](int64_t from, int64_t n) {
        int64_t total = 0;
        for (int64_t tap = 0; tap < size; ++tap) total += used(from, n, tap);
        return total;
    };
    for (int64_t from = 0; from < count;) {
        int64_t n = 1;
        // those that only pick a pixel stay alone; others go together, evenly: 5 as 3 + 2
        if (taps_of(from, 1) > 1) {
            int64_t run = 1;
            while (from + run < count && taps_of(from + run, 1) > 1) ++run;
            n = (run + (run + MOST_TERMS - 1) / MOST_TERMS - 1) / ((run + MOST_TERMS - 1) / MOST_TERMS);
        }
        layer.filters.push_back({channel, static_cast<int>(n), taps_of(from, n), taps, weights, 0});
        for (int64_t tap = 0; tap < size; ++tap) {
            if (!used(from, n, tap)) continue;
            *taps++ = static_cast<int32_t>(tap);
            for (int64_t t = 0; t < n; ++t) *weights++ = depthwise[rows[from + t] * size + tap];
        }
        from += n;
    }
    for (size_t f = before; f < layer.filters.size(); ++f) layer.filters[f].next = layer.filters.size();
}

std::unique_ptr<Layer> pack(const netdecouple_shape& s, const int64_t* channels, const float* depthwise,
                            const float* pointwise, const float* bias, const float* slope) {
    auto layer = std::make_unique<Layer>();
    layer->shape = s;
    layer->level = level();
    layer->inputs = s.n_i / s.groups;
    layer->outputs = s.n_o / s.groups;
    const int64_t rows = s.rows / s.groups, taps = s.kh * s.kw, block = layer->level->block_rows;
    layer->blocks = (layer->outputs + block - 1) / block;
    const int64_t padded = layer->blocks * block;

    for (int64_t ky = 0; ky < s.kh; ++ky) {
        const int remainder = static_cast<int>(ky * s.dilations[0] % s.strides[0]);
        auto found = std::find(layer->phases.begin(), layer->phases.end(), remainder);
        layer->phase.push_back(static_cast<int>(found - layer->phases.begin()));
        if (found == layer->phases.end()) layer->phases.push_back(remainder);
        layer->shift.push_back(static_cast<int>(ky * s.dilations[0] / s.strides[0]));
    }
    layer->deepest = layer->shift.back();

    layer->depthwise = Aligned(s.rows * taps);
    layer->taps.resize(s.rows * taps);
    layer->pointwise = Aligned(s.groups * padded * rows + 64);  // read a little ahead
    float *filter = layer->depthwise.data, *packed = layer->pointwise.data;
    int32_t* tap = layer->taps.data();
    for (int64_t g = 0; g < s.groups; ++g) {
        std::vector<int64_t> order(rows);  // rows by channel
        for (int64_t r = 0; r < rows; ++r) order[r] = g * rows + r;
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return channels[a] < channels[b]; });
        Group group;
        const int64_t chunks = (rows + CHUNK - 1) / CHUNK, size = (rows + chunks - 1) / chunks;
        for (int64_t first = 0; first < rows;) {
            Chunk chunk{layer->filters.size(), 0, 0, packed};
            int64_t last = first;
            while (last < rows && last - first < size) {
                const int64_t channel = channels[order[last]];
                int64_t same = 1;
                while (last + same < rows && channels[order[last + same]] == channel) ++same;
                add_filters(*layer, channel - g * layer->inputs, depthwise, &order[last], same, filter, tap);
                last += same;
            }
            chunk.last = layer->filters.size();
            chunk.depth = last - first;
            for (int64_t o = 0; o < padded; o += block)
                for (int64_t k = first; k < last; ++k)
                    for (int64_t i = 0; i < block; ++i) {
                        const int64_t output = g * layer->outputs + o + i;
                        *packed++ = o + i < layer->outputs ? pointwise[output * rows + order[k] - g * rows] : 0.0f;
                    }
            group.chunks.push_back(chunk);
            first = last;
        }
        layer->groups.push_back(std::move(group));
    }
    layer->bias = Aligned(s.groups * padded);
    layer->slope = Aligned(s.groups * padded);
    layer->has_slope = slope != nullptr;
    for (int64_t o = 0; o < s.n_o; ++o) {
        const int64_t at = o / layer->outputs * padded + o % layer->outputs;
        layer->bias.data[at] = bias[o];
        if (slope) layer->slope.data[at] = slope[o];
    }
    return layer;
}

int64_t output_length(const netdecouple_shape& s, int axis, int64_t length) {
    const int64_t kernel = (axis ? s.kw : s.kh) - 1;
    const int64_t room = length + s.pads[axis] + s.pads[axis + 2] - s.dilations[axis] * kernel - 1;
    return room < 0 ? 0 : room / s.strides[axis] + 1;
}

}  // namespace
}  // namespace netdecouple

using namespace netdecouple;

struct netdecouple_layer {
    std::unique_ptr<Layer> packed;
};

netdecouple_layer* netdecouple_create(const netdecouple_shape* shape, const int64_t* channels, const float* depthwise,
                                      const float* pointwise, const float* bias, const float* slope, char* error,
                                      size_t error_size) {
    try {
        check(*shape, channels);
        return new netdecouple_layer{pack(*shape, channels, depthwise, pointwise, bias, slope)};
    } catch (const std::bad_alloc&) {
        std::snprintf(error, error_size, "out of memory");
    } catch (const std::exception& problem) {
        std::snprintf(error, error_size, "%s", problem.what());
    } catch (...) {
        std::snprintf(error, error_size, "failed");
    }
    return nullptr;
}

void netdecouple_output_size(const netdecouple_layer* layer, int64_t h, int64_t w, int64_t* output_h, int64_t* output_w) {
    *output_h = output_length(layer->packed->shape, 0, h);
    *output_w = output_length(layer->packed->shape, 1, w);
}

int netdecouple_run(const netdecouple_layer* handle, const float* x, const float* residual, float* y, int64_t n,
                    int64_t h, int64_t w, netdecouple_parallel_for parallel_for, void* pool) {
    const Layer& layer = *handle->packed;
    const netdecouple_shape& s = layer.shape;
    try {
        Run run{&layer, x, residual, y, h, w, output_length(s, 0, h), output_length(s, 1, w), 0, 0, 1, x + n * s.n_i * h * w, false, -1, false};
        if (n <= 0 || run.output_h <= 0 || run.output_w <= 0) return 0;
        const int64_t lanes = layer.level->lanes;
        run.vectors = (run.output_h * run.output_w + lanes - 1) / lanes;
        const int64_t target = std::clamp((ROWS * run.output_w + lanes - 1) / lanes, TILE, WIDEST_TILE);
        run.tiles = (run.vectors + target - 1) / target;
        if (parallel_for) run.tiles = std::max(run.tiles, std::min(cores(), (run.vectors + TILE - 1) / TILE));
        if (run.tiles > 4) run.tiles = (run.tiles + 3) / 4 * 4;  // to be shared evenly among threads
        if (parallel_for && n * s.groups * run.tiles < 2) {
            // Two threads at least have something to do. Parts of the output channels compute all filters each.
            if (layer.outputs >= MANY)
                run.parts = 2;
            else
                run.tiles = std::min<int64_t>(run.vectors, 2);
        }
        run.flat = s.strides[0] == 1 && s.strides[1] == 1 && run.output_w == w;
        if (s.pads[1] % s.dilations[1] == 0) run.direct = s.pads[1] / s.dilations[1];
        const size_t jobs = n * s.groups * run.parts * run.tiles;
        if (parallel_for && jobs > 1)
            parallel_for(pool, layer.level->work, jobs, &run);
        else
            for (size_t job = 0; job < jobs; ++job) layer.level->work(&run, job);
        return run.failed;
    } catch (...) {
        return 1;
    }
}

namespace {

struct Team {
    void (*work)(void*, size_t);
    void* task;
    size_t count;
    std::atomic<size_t> next;
};

}  // namespace

void netdecouple_openmp_for(void* to, void (*work)(void*, size_t), size_t count, void* task) {
    const auto* pool = static_cast<const netdecouple_openmp*>(to);
    Team team{work, task, count, {0}};
    const auto member = [](void* data) {  // every thread of the team takes what is left to do
        auto& team = *static_cast<Team*>(data);
        for (size_t i; (i = team.next.fetch_add(1, std::memory_order_relaxed)) < team.count;) team.work(team.task, i);
    };
    pool->parallel(member, &team, static_cast<unsigned>(std::min<size_t>(pool->threads, count)), 0);
}

void netdecouple_destroy(netdecouple_layer* layer) { delete layer; }

const char* netdecouple_level(void) { return level().load()->name; }

int netdecouple_use_level(const char* name) {
    const Level* wanted = level_named(name);
    if (wanted) level() = wanted;
    return wanted != nullptr;
}

int64_t netdecouple_multiply(int64_t count) { return level().load()->multiply(count); }
