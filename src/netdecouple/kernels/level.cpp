// The inner loops, in vector extensions of GCC and Clang; compiled once per instruction set with
// LEVEL (a name), LANES (floats in a vector) and REGISTERS (of vectors) defined.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <tuple>

#include "layer.h"

namespace netdecouple {
namespace {

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

constexpr int BLOCK_ROWS = REGISTERS >= 32 ? 8 : 4;
constexpr int PANEL = 3;  // vectors; BLOCK_ROWS x PANEL sums, PANEL inputs and one weight fill the registers
constexpr int WIDEST = 14; // vectors a filter computes at one time

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
inline Vector splat(float value) { return value - Vector{}; }
#if defined(__clang__)
template <int... I>
inline Vector every_second(Vector a, Vector b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, 2 * I...);
}
inline Vector every_second(Vector a, Vector b) { return every_second(a, b, std::make_integer_sequence<int, LANES>()); }
#else
inline Vector every_second(Vector a, Vector b) {
    Bits lanes;
    for (int i = 0; i < LANES; ++i) lanes[i] = 2 * i;
    return __builtin_shuffle(a, b, lanes);
}
#endif

// Keep a vector in a register: else it is loaded anew for every use, and loads are what there are too few of.
#if defined(__x86_64__)
#define KEEP(vector) asm("" : "+v"(vector))
#elif defined(__aarch64__)
#define KEEP(vector) asm("" : "+w"(vector))
#else
#define KEEP(vector)
#endif

// Per thread, kept from call to call.
thread_local Aligned scratch;

float* scratch_of(size_t floats) {
    if (scratch.size < floats) {
        scratch = Aligned();  // free first
        scratch = Aligned(floats);
    }
    return scratch.data;
}

// Zeros, up to the next whole vector.
inline void clear(float* to, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(to + i, splat(0));
}

// ---- depthwise -----------------------------------------------------------------------------------------------------

// T filters of one channel on W vectors of output pixels, starting with vector v. Rows of the panels from k on are
// filled; row 0 of vector v stands at to[v].
template <int T, int W>
void filter(const float* const* taps, const Filters& filters, float* const* to, int64_t v, int64_t k) {
    const float* weights = filters.weights;
    Vector sum[T][W] = {};
    for (int64_t tap = 0; tap < filters.taps; ++tap, weights += T) {
        const float* from = taps[filters.which[tap]] + v * LANES;
        asm("" : "+r"(from));  // one address in a register, where GCC would have one for each j
#pragma GCC unroll 14
        for (int j = 0; j < W; ++j) {
            Vector x = load(from + j * LANES);
            KEEP(x);
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) sum[t][j] += weights[t] * x;
        }
    }
#pragma GCC unroll 14
    for (int j = 0; j < W; ++j)
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) store(to[v + j] + (k + t) * PANEL * LANES, sum[t][j]);
}

using FilterFunction = void (*)(const float* const*, const Filters&, float* const*, int64_t, int64_t);

// The most vectors whose sums fit into the registers, beside the weights and an input.
constexpr int widest(int terms) {
    const int fits = (REGISTERS - terms - 1) / terms;
    return fits < 1 ? 1 : fits > WIDEST ? WIDEST : fits;
}

template <int T, int W>
constexpr FilterFunction filter_of() {
    if constexpr (W <= widest(T)) return filter<T, W>;
    return nullptr;  // never called
}

#define WIDTHS(T)                                                                             \
    {filter_of<T, 1>(),  filter_of<T, 2>(),  filter_of<T, 3>(),  filter_of<T, 4>(),  filter_of<T, 5>(),  \
     filter_of<T, 6>(),  filter_of<T, 7>(),  filter_of<T, 8>(),  filter_of<T, 9>(),  filter_of<T, 10>(), \
     filter_of<T, 11>(), filter_of<T, 12>(), filter_of<T, 13>(), filter_of<T, 14>()}
constexpr FilterFunction FILTER[MOST_TERMS][WIDEST] = {WIDTHS(1), WIDTHS(2), WIDTHS(3), WIDTHS(4)};
constexpr int WIDEST_FOR[MOST_TERMS] = {widest(1), widest(2), widest(3), widest(4)};

// ---- pointwise -----------------------------------------------------------------------------------------------------

struct Store {
    float* y;               // output channel 0 of the block, pixel 0 of the panel
    const float* residual;  // likewise, or null
    int64_t stride;         // between output channels
    const float *bias, *slope;
    int rows;               // output channels of the block that exist
    int64_t pixels;         // of the panel that exist
    float minimum, maximum;
    bool first, last;       // chunk
};

#define EACH_SUM                                  \
    _Pragma("GCC unroll 8") for (int i = 0; i < BLOCK_ROWS; ++i) \
        _Pragma("GCC unroll 3") for (int j = 0; j < W; ++j)

// What becomes of a chunk's sums: added to the bias or to the chunks before, activated after the last chunk.
template <int W>
inline void finish(Vector (&sum)[BLOCK_ROWS][W], const Store& s, float* y, const float* residual, int64_t stride) {
    if (s.first)
        EACH_SUM sum[i][j] += splat(s.bias[i]);
    else
        EACH_SUM sum[i][j] += load(y + i * stride + j * LANES);
    if (s.last) {
        if (residual) EACH_SUM sum[i][j] += load(residual + i * stride + j * LANES);
        if (s.slope) EACH_SUM sum[i][j] = sum[i][j] < splat(0) ? sum[i][j] * splat(s.slope[i]) : sum[i][j];
        // written so that NaN stays NaN
        if (s.minimum > -INFINITY) EACH_SUM sum[i][j] = splat(s.minimum) > sum[i][j] ? splat(s.minimum) : sum[i][j];
        if (s.maximum < INFINITY) EACH_SUM sum[i][j] = splat(s.maximum) < sum[i][j] ? splat(s.maximum) : sum[i][j];
    }
    EACH_SUM store(y + i * stride + j * LANES, sum[i][j]);
}

// One block of output channels times one panel of W vectors.
template <int W>
void product(int64_t depth, const float* a, const float* b, const Store& s) {
    for (int i = 0; i < s.rows; ++i)
        for (int j = 0; j < W; ++j) __builtin_prefetch(s.y + i * s.stride + j * LANES, 1);
    Vector sum[BLOCK_ROWS][W] = {};
    for (int64_t k = 0; k < depth; ++k, a += BLOCK_ROWS, b += PANEL * LANES) {
        __builtin_prefetch(a + depth * BLOCK_ROWS);  // the next block; weights are cold
        Vector x[W];
#pragma GCC unroll 3
        for (int j = 0; j < W; ++j) x[j] = load(b + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < BLOCK_ROWS; ++i)
#pragma GCC unroll 3
            for (int j = 0; j < W; ++j) sum[i][j] += a[i] * x[j];
    }
    EACH_SUM KEEP(sum[i][j]);  // else GCC keeps the sums of narrow panels in memory, all through the loop
    if (s.rows == BLOCK_ROWS && s.pixels >= W * LANES) {
        finish<W>(sum, s, s.y, s.residual, s.stride);
        return;
    }
    // at the edge: in a copy of the panel
    float y[BLOCK_ROWS * W * LANES] = {}, residual[BLOCK_ROWS * W * LANES] = {};
    const size_t bytes = sizeof(float) * std::min<int64_t>(W * LANES, s.pixels);
    for (int i = 0; i < s.rows; ++i) {
        std::memcpy(y + i * W * LANES, s.y + i * s.stride, bytes);
        if (s.residual) std::memcpy(residual + i * W * LANES, s.residual + i * s.stride, bytes);
    }
    finish<W>(sum, s, y, s.residual ? residual : nullptr, W * LANES);
    for (int i = 0; i < s.rows; ++i) std::memcpy(s.y + i * s.stride, y + i * W * LANES, bytes);
}

using ProductFunction = void (*)(int64_t, const float*, const float*, const Store&);
constexpr ProductFunction PRODUCT[PANEL] = {product<1>, product<2>, product<3>};

// Which of `count` positions, `step` apart from `first` on, lie in [0, size): from the first of two to before the second.
std::pair<int64_t, int64_t> inside(int64_t first, int64_t step, int64_t size, int64_t count) {
    const int64_t from = first < 0 ? std::min((-first + step - 1) / step, count) : 0;
    return {from, std::max(from, size > first ? std::min((size - first + step - 1) / step, count) : 0)};
}

int64_t rounded(int64_t number, int64_t step) { return (number + step - 1) / step * step; }

// ---- a tile --------------------------------------------------------------------------------------------------------

// What a tile reads of a channel, once per column of taps and vertical phase, in rows as wide as the output's: any
// tap of any output pixel is then a fixed distance away, whatever padding, stride and dilation.
struct Plane {
    int64_t from;          // in the channel, of the first row
    int64_t above, below;  // rows before `above` and from `below` on are outside of the input
    int64_t left, right;   // likewise columns
    bool direct;           // the input itself is such a plane: nothing to copy
};

// How the vectors of a tile are shared among calls of a filter, evenly: piece p ends before vector end[p].
struct Pieces {
    int count;
    int end[WIDEST_TILE];
};

Pieces pieces_of(int vectors, int widest) {
    Pieces found{(vectors + widest - 1) / widest, {}};
    for (int p = 0; p < found.count; ++p) found.end[p] = (p + 1) * vectors / found.count;
    return found;
}

struct Tile {
    const Run& run;
    const netdecouple_shape& s;
    int64_t first, vectors;    // pixels (an index), and how many
    int64_t first_row, start;  // of the output; where the tile starts in it
    int64_t rows, lead, size;  // of a plane; floats before the first row, so that `start` is on a boundary; floats
    std::vector<Plane>& planes;
    float* data;               // two sets of planes: one is filled while the other is read
    const float** taps;        // two sets of (kh, kw): where the input of a tap stands for the tile's first pixel
    Pieces pieces[MOST_TERMS];

    void plan() {
        for (int terms = 0; terms < MOST_TERMS; ++terms) pieces[terms] = pieces_of(vectors, WIDEST_FOR[terms]);
        planes.clear();
        for (int64_t kx = 0; kx < s.kw; ++kx)
            for (int phase : run.layer->phases) {
                const int64_t top = first_row * s.strides[0] + phase - s.pads[0], step = s.strides[0];
                const int64_t column = kx * s.dilations[1] - s.pads[1];
                Plane plane{top * run.w + column, 0, 0, 0, 0, false};
                std::tie(plane.left, plane.right) = inside(column, s.strides[1], run.w, run.output_w);
                std::tie(plane.above, plane.below) = inside(top, step, run.h, rows);
                plane.direct = run.flat && kx == run.direct && plane.above == 0 && plane.below == rows;
                planes.push_back(plane);
            }
        for (int side = 0; side < 2; ++side) {
            const float* from = data + side * planes.size() * size + lead + start;
            for (int64_t kx = 0; kx < s.kw; ++kx)
                for (int64_t ky = 0; ky < s.kh; ++ky)
                    taps[(side * s.kh + ky) * s.kw + kx] =
                        from + (kx * run.layer->phases.size() + run.layer->phase[ky]) * size + run.layer->shift[ky] * run.output_w;
        }
    }

    void fill(int side, const float* channel) const {
        float* to = data + side * planes.size() * size + lead;
        for (const Plane& plane : planes) {
            if (plane.direct && channel + plane.from + start + vectors * LANES + run.layer->deepest * run.w <= run.x_end) {
                const float* from = channel + plane.from + start;
                for (int64_t ky = 0; ky < s.kh; ++ky)
                    taps[(side * s.kh + ky) * s.kw + run.direct] = from + run.layer->shift[ky] * run.w;
            } else if (run.flat) {
                fill_flat(to, channel + plane.from, plane);
                if (plane.direct)
                    for (int64_t ky = 0; ky < s.kh; ++ky)
                        taps[(side * s.kh + ky) * s.kw + run.direct] = to + start + run.layer->shift[ky] * run.w;
            } else {
                fill_rows(to, channel + plane.from, plane);
            }
            to += size;
        }
    }

    // Input and output have the same width and stride 1: all rows at once, then what is beside the input.
    void fill_flat(float* to, const float* from, const Plane& plane) const {
        const int64_t above = plane.above * run.w, below = plane.below * run.w;
        clear(to, above);
        const int64_t begin = above ? above : -lead;  // on a boundary
        if (from + begin >= run.x && from + below + LANES <= run.x_end) {
#pragma GCC unroll 4
            for (int64_t i = begin; i < below; i += LANES) store(to + i, load(from + i));
        } else {
            for (int64_t i = above; i < below; ++i) to[i] = from + i >= run.x && from + i < run.x_end ? from[i] : 0.0f;
        }
        for (int64_t column = 0; column < plane.left; ++column)
            for (int64_t i = above; i < below; i += run.w) to[i + column] = 0;
        for (int64_t column = plane.right; column < run.w; ++column)
            for (int64_t i = above; i < below; i += run.w) to[i + column] = 0;
        clear(to + below, rows * run.w - below);
    }

    void fill_rows(float* to, const float* from, const Plane& plane) const {
        const int64_t width = run.output_w, step = s.strides[1];
        clear(to, plane.above * width);
        from += plane.above * s.strides[0] * run.w;
        for (int64_t j = plane.above; j < plane.below; ++j, from += s.strides[0] * run.w) {
            float* row = to + j * width;
            if (step > 2 || from < run.x || from + rounded(width, LANES) * step > run.x_end)
                for (int64_t i = plane.left; i < plane.right; ++i) row[i] = from[i * step];
            else if (step == 2)
                for (int64_t i = 0; i < width; i += LANES)
                    store(row + i, every_second(load(from + 2 * i), load(from + 2 * i + LANES)));
            else
                for (int64_t i = 0; i < width; i += LANES) store(row + i, load(from + i));
            std::fill(row, row + plane.left, 0.0f);
            std::fill(row + plane.right, row + width, 0.0f);
        }
        clear(to + plane.below * width, (rows - plane.below) * width);
    }

    // Ask for the input of a channel that comes soon: rows are too short for the processor to notice a pattern.
    // (Inlined by force: GCC drops calls of a function that does nothing but this.)
    __attribute__((always_inline)) void prefetch(const float* channel) const {
        const int64_t top = first_row * s.strides[0] - s.pads[0];
        const float* end = channel + std::min(top + rows * s.strides[0], run.h) * run.w;
        for (const float* at = channel + std::max<int64_t>(top, 0) * run.w; at < end; at += 16) __builtin_prefetch(at);
    }
};

// Filters of a chunk, all of them, into the panels.
void filter_chunk(const Tile& tile, const Chunk& chunk, const float* x, float* const* columns) {
    const Run& run = tile.run;
    const std::vector<Filters>& filters = run.layer->filters;
    const int64_t plane = run.h * run.w, taps = tile.s.kh * tile.s.kw;
    int side = 0;
    int64_t k = 0;
    tile.fill(side, x + filters[chunk.first].channel * plane);
    for (size_t f = chunk.first; f < chunk.last;) {
        // the next channel is read before this one is computed, so that nothing waits for memory
        const size_t next = filters[f].next, after = next < chunk.last ? filters[next].next : next;
        if (next < chunk.last) tile.fill(1 - side, x + filters[next].channel * plane);
        if (after < chunk.last) tile.prefetch(x + filters[after].channel * plane);
        for (; f < next; ++f) {
            const int terms = filters[f].count;
            const Pieces& pieces = tile.pieces[terms - 1];
            for (int p = 0, v = 0; p < pieces.count; v = pieces.end[p++])
                FILTER[terms - 1][pieces.end[p] - v - 1](tile.taps + side * taps, filters[f], columns, v, k);
            k += terms;
        }
        side = 1 - side;
    }
}

void tile(Run& run, size_t job) {
    const Layer& layer = *run.layer;
    const netdecouple_shape& s = layer.shape;
    const int64_t index = job % run.tiles, part = job / run.tiles % run.parts;
    const int64_t group = job / (run.tiles * run.parts) % s.groups, image = job / (run.tiles * run.parts * s.groups);

    const int64_t pixels = run.output_h * run.output_w;
    const int64_t begin = index * run.vectors / run.tiles;
    const int64_t vectors = (index + 1) * run.vectors / run.tiles - begin;
    const int64_t first = begin * LANES, last = std::min(first + vectors * LANES, pixels);
    const int64_t first_row = first / run.output_w, start = first - first_row * run.output_w;
    const int64_t rows = (last - 1) / run.output_w - first_row + 1 + layer.deepest;
    const int64_t lead = rounded(start, LANES) - start;

    const std::vector<Chunk>& chunks = layer.groups[group].chunks;
    int64_t deepest = 0;
    for (const Chunk& chunk : chunks) deepest = std::max(deepest, chunk.depth);
    // what is computed beyond the last pixel stays inside as well
    const int64_t size = rounded(lead + start + vectors * LANES + (layer.deepest + 1) * run.output_w + LANES, LANES);
    const int64_t planes = s.kw * layer.phases.size() * size;
    const int64_t count = (vectors + PANEL - 1) / PANEL;  // panels; vectors are shared evenly among them
    float* panels = scratch_of(deepest * count * PANEL * LANES + 2 * planes + 4 * s.kh * s.kw);
    float* data = panels + deepest * count * PANEL * LANES;
    static thread_local std::vector<Plane> plane;
    Tile tile{run, s, first, vectors, first_row, start, rows, lead, size, plane, data,
              reinterpret_cast<const float**>(data + 2 * planes), {}};
    tile.plan();

    const int64_t first_block = part * layer.blocks / run.parts, last_block = (part + 1) * layer.blocks / run.parts;
    const int64_t biases = group * layer.blocks * BLOCK_ROWS;
    const float* x = run.x + (image * s.n_i + group * layer.inputs) * run.h * run.w;
    for (const Chunk& chunk : chunks) {
        float* columns[WIDEST_TILE];
        for (int64_t p = 0; p < count; ++p) {
            const int64_t v0 = p * vectors / count, v1 = (p + 1) * vectors / count;
            for (int64_t v = v0; v < v1; ++v) columns[v] = panels + (chunk.depth * p * PANEL + v - v0) * LANES;
        }
        filter_chunk(tile, chunk, x, columns);
        Store to{};
        to.stride = pixels;
        to.minimum = s.minimum, to.maximum = s.maximum;
        to.first = &chunk == &chunks.front(), to.last = &chunk == &chunks.back();
        for (int64_t p = 0; p < count; ++p) {
            const int64_t v0 = p * vectors / count, v1 = (p + 1) * vectors / count;
            to.pixels = pixels - first - v0 * LANES;
            for (int64_t block = first_block; block < last_block; ++block) {
                const int64_t channel = block * BLOCK_ROWS;
                const int64_t at = (image * s.n_o + group * layer.outputs + channel) * pixels + first + v0 * LANES;
                to.y = run.y + at;
                to.residual = run.residual ? run.residual + at : nullptr;
                to.bias = layer.bias.data + biases + channel;
                to.slope = layer.has_slope ? layer.slope.data + biases + channel : nullptr;
                to.rows = static_cast<int>(std::min<int64_t>(BLOCK_ROWS, layer.outputs - channel));
                PRODUCT[v1 - v0 - 1](chunk.depth, chunk.pointwise + channel * chunk.depth, columns[v0], to);
            }
        }
    }
}

void work(void* run, size_t job) {
    try {
        tile(*static_cast<Run*>(run), job);
    } catch (...) {  // nothing may be thrown through the caller's threads
        static_cast<Run*>(run)->failed = true;
    }
}

// Multiply-adds of numbers that stay in registers: no layer can be computed faster.
int64_t multiply(int64_t count) {
    constexpr int W = PANEL;
    Vector sum[BLOCK_ROWS][W] = {}, factor = splat(0.5f), summand = splat(1);
    KEEP(factor);
    KEEP(summand);
    for (int64_t n = 0; n < count; ++n) {
        EACH_SUM sum[i][j] = sum[i][j] * factor + summand;
        EACH_SUM KEEP(sum[i][j]);
    }
    EACH_SUM factor += sum[i][j];
    volatile float used = factor[0];  // else nothing need be computed
    (void)used;
    return count * BLOCK_ROWS * W * LANES;
}

}  // namespace

#define JOIN(a, b) a##b
#define NAMED(level) JOIN(level_, level)
#define QUOTE(a) #a
#define QUOTED(a) QUOTE(a)
const Level* NAMED(LEVEL)() {
    static const Level level{QUOTED(LEVEL), LANES, BLOCK_ROWS, work, multiply};
    return &level;
}

}  // namespace netdecouple
