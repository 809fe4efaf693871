// A packed layer and one run of it, as seen by the code that is compiled once per instruction set.
#pragma once
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "fused.h"

namespace netdecouple {

// Memory on a boundary that any vector may be loaded from.
struct Aligned {
    explicit Aligned(size_t floats = 0);
    ~Aligned();
    Aligned(Aligned&& other) noexcept : data(other.data), size(other.size) { other.data = nullptr, other.size = 0; }
    Aligned& operator=(Aligned&& other) noexcept {
        std::swap(data, other.data), std::swap(size, other.size);
        return *this;
    }
    float* data = nullptr;
    size_t size = 0;
};

constexpr int MOST_TERMS = 4;  // filters of one channel computed together: each loaded input feeds all of them

constexpr int64_t WIDEST_TILE = 56;  // vectors

// Up to MOST_TERMS filters that read the same channel. Taps where all of them are zero are left out: a filter that
// only picks a pixel, as in a dense convolution written this way, costs a copy.
struct Filters {
    int64_t channel;
    int count;
    int64_t taps;
    const int32_t* which;  // (taps), in (kh, kw)
    const float* weights;  // (taps, count)
    size_t next;  // the first after these that read another channel, or the end of the chunk
};

// Rows of the panels that are computed, and multiplied, at one time.
struct Chunk {
    size_t first, last;      // of `filters`
    int64_t depth;           // rows
    const float* pointwise;  // (blocks of output channels, depth, channels of a block), zero-padded
};

struct Group {
    std::vector<Chunk> chunks;
};

// What a set of instructions brings along.
struct Level {
    const char* name;
    int lanes;       // floats in a vector
    int block_rows;  // output channels computed together
    void (*work)(void* run, size_t job);
    int64_t (*multiply)(int64_t count);
};

struct Layer {
    netdecouple_shape shape;
    const Level* level;
    int64_t inputs, outputs;  // channels of a group
    int64_t blocks;           // of output channels, per group
    std::vector<Filters> filters;
    std::vector<Group> groups;
    Aligned depthwise, pointwise;
    std::vector<int32_t> taps;  // of all filters
    Aligned bias, slope;  // (groups, blocks * block_rows)
    bool has_slope;
    // taps: where the input of a filter's tap stands, as (plane, rows down); see Run
    std::vector<int> phase;  // (kh): which of `phases` a row of taps reads
    std::vector<int> shift;  // (kh): rows down in that phase
    std::vector<int> phases; // distinct remainders of the rows' dilated positions by the stride
    int deepest = 0;         // largest shift
};

// One call: the output is cut into tiles of consecutive pixels.
struct Run {
    const Layer* layer;
    const float *x, *residual;
    float* y;
    int64_t h, w, output_h, output_w;
    int64_t vectors;          // per image: output pixels / lanes, rounded up
    int64_t tiles, parts;     // per image and group; each part computes some of the output channels
    const float* x_end;
    bool flat;                   // rows of the input and the output follow each other in the same way
    int64_t direct;              // column of taps that sees the input as it is, if it is flat
    bool failed = false;      // memory ran out
};

const Level* level_avx512();
const Level* level_avx2();
const Level* level_baseline();

}  // namespace netdecouple
