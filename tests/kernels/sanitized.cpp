// Runs the fused operator on random layers, in buffers of exactly the size they need, and compares the results with
// plain float64 loops. Built with the sanitizers by test_fused.py:  sanitized CASES LEVEL
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "fused.h"

namespace {

std::mt19937 generator(1);

int64_t draw(int64_t low, int64_t high) {  // the standard's distributions differ between libraries
    return low + static_cast<int64_t>(generator() % static_cast<uint64_t>(high - low + 1));
}

float number() { return static_cast<float>(draw(-1000, 1000)) / 500.0f; }

std::unique_ptr<float[]> numbers(int64_t count) {
    std::unique_ptr<float[]> made(new float[count]);
    for (int64_t i = 0; i < count; ++i) made[i] = number();
    return made;
}

struct Case {
    netdecouple_shape s;
    std::vector<int64_t> channels;
    std::unique_ptr<float[]> depthwise, pointwise, bias, slope, x, residual;
    int64_t n, h, w, output_h, output_w;
};

int64_t length(int64_t size, int64_t pads, int64_t kernel, int64_t dilation, int64_t stride) {
    const int64_t room = size + pads - dilation * (kernel - 1) - 1;
    return room < 0 ? 0 : room / stride + 1;
}

Case any_case(int index) {
    Case c;
    netdecouple_shape& s = c.s;
    s.groups = draw(0, 2) ? 1 : draw(2, 4);
    const int64_t inputs = draw(1, 5), outputs = draw(0, 5) ? draw(1, 20) : draw(40, 70);
    // one in twelve has more rows than are multiplied at one time
    const int64_t rows = index % 12 ? draw(1, 3 * inputs) : draw(100, 300);
    s.n_i = s.groups * inputs, s.n_o = s.groups * outputs, s.rows = s.groups * rows;
    for (int64_t r = 0; r < s.rows; ++r) c.channels.push_back(r / rows * inputs + draw(0, inputs - 1));
    s.kh = draw(1, 7), s.kw = draw(1, 7);
    const bool same = draw(0, 1);  // output as wide as the input: a path of its own
    for (int i = 0; i < 2; ++i) s.strides[i] = same ? 1 : draw(1, 4), s.dilations[i] = draw(1, 3);
    for (int64_t& pad : s.pads) pad = draw(0, 1) ? draw(0, 3) : draw(0, 25);
    if (same) {
        const int64_t span = s.dilations[1] * (s.kw - 1);
        s.pads[1] = draw(0, 2) ? span / 2 : draw(0, span), s.pads[3] = span - s.pads[1];
    }
    const float infinity = std::numeric_limits<float>::infinity();
    s.minimum = draw(0, 1) ? -infinity : number(), s.maximum = draw(0, 1) ? infinity : s.minimum + 3;
    c.n = draw(1, 3);
    const bool wide = !draw(0, 5);
    c.h = draw(1, wide ? 4 : 24), c.w = wide ? draw(200, 500) : draw(1, 40);
    for (;; ++c.h, ++c.w) {
        c.output_h = length(c.h, s.pads[0] + s.pads[2], s.kh, s.dilations[0], s.strides[0]);
        c.output_w = length(c.w, s.pads[1] + s.pads[3], s.kw, s.dilations[1], s.strides[1]);
        if (c.output_h > 0 && c.output_w > 0) break;
    }
    c.depthwise = numbers(s.rows * s.kh * s.kw);
    c.pointwise = numbers(s.n_o * rows);
    c.bias = numbers(s.n_o);
    if (draw(0, 1)) c.slope = numbers(s.n_o);
    c.x = numbers(c.n * s.n_i * c.h * c.w);
    if (draw(0, 1)) c.residual = numbers(c.n * s.n_o * c.output_h * c.output_w);
    return c;
}

// The largest difference, relative to the largest output before it was clipped.
double error_of(const Case& c, const float* y) {
    const netdecouple_shape& s = c.s;
    const int64_t rows = s.rows / s.groups, outputs = s.n_o / s.groups, pixels = c.output_h * c.output_w;
    double worst = 0, largest = 0;
    std::vector<double> filtered(s.rows * pixels);
    for (int64_t image = 0; image < c.n; ++image) {
        for (int64_t r = 0; r < s.rows; ++r)
            for (int64_t oy = 0; oy < c.output_h; ++oy)
                for (int64_t ox = 0; ox < c.output_w; ++ox) {
                    double sum = 0;
                    for (int64_t ky = 0; ky < s.kh; ++ky)
                        for (int64_t kx = 0; kx < s.kw; ++kx) {
                            const int64_t iy = oy * s.strides[0] + ky * s.dilations[0] - s.pads[0];
                            const int64_t ix = ox * s.strides[1] + kx * s.dilations[1] - s.pads[1];
                            if (iy >= 0 && iy < c.h && ix >= 0 && ix < c.w)
                                sum += double(c.depthwise[(r * s.kh + ky) * s.kw + kx]) *
                                       c.x[((image * s.n_i + c.channels[r]) * c.h + iy) * c.w + ix];
                        }
                    filtered[(r * c.output_h + oy) * c.output_w + ox] = sum;
                }
        for (int64_t o = 0; o < s.n_o; ++o)
            for (int64_t pixel = 0; pixel < pixels; ++pixel) {
                double sum = c.bias[o];
                for (int64_t r = 0; r < rows; ++r)
                    sum += c.pointwise[o * rows + r] * filtered[(o / outputs * rows + r) * pixels + pixel];
                const int64_t at = (image * s.n_o + o) * pixels + pixel;
                if (c.residual) sum += c.residual[at];
                if (c.slope && sum < 0) sum *= c.slope[o];
                largest = std::fmax(largest, std::fabs(sum));
                sum = std::fmin(std::fmax(sum, s.minimum), s.maximum);
                if (std::isnan(y[at])) return y[at];
                worst = std::fmax(worst, std::fabs(sum - y[at]));
            }
    }
    return largest > 0 ? worst / largest : worst;
}

void one_by_one(void*, void (*work)(void* task, size_t i), size_t count, void* task) {
    while (count--) work(task, count);
}

bool refused(const Case& c, netdecouple_shape shape, const char* what) {
    char error[40] = "";  // too short for most messages
    netdecouple_layer* layer = netdecouple_create(&shape, c.channels.data(), c.depthwise.get(), c.pointwise.get(),
                                                  c.bias.get(), nullptr, error, sizeof error);
    if (layer) netdecouple_destroy(layer);
    if (layer || !*error) std::printf("not refused: %s\n", what);
    return !layer && *error;
}

bool refuses_what_is_wrong() {
    const Case c = any_case(1);
    const int64_t huge = std::numeric_limits<int64_t>::max();
    bool good = true;
    auto with = [&](const char* what, auto change) {
        netdecouple_shape shape = c.s;
        change(shape);
        good &= refused(c, shape, what);
    };
    for (int64_t bad : {int64_t(0), int64_t(-1), -huge}) {
        with("n_i", [&](auto& s) { s.n_i = bad; });
        with("n_o", [&](auto& s) { s.n_o = bad; });
        with("groups", [&](auto& s) { s.groups = bad; });
        with("rows", [&](auto& s) { s.rows = bad; });
        with("kh", [&](auto& s) { s.kh = bad; });
        with("kw", [&](auto& s) { s.kw = bad; });
        with("strides", [&](auto& s) { s.strides[1] = bad; });
        with("dilations", [&](auto& s) { s.dilations[0] = bad; });
        if (bad) with("pads", [&](auto& s) { s.pads[2] = bad; });
    }
    with("n_i huge", [&](auto& s) { s.n_i = huge; });
    with("n_o huge", [&](auto& s) { s.n_o = huge; });
    with("rows huge", [&](auto& s) { s.rows = huge; });
    with("kh huge", [&](auto& s) { s.kh = huge; });
    with("strides huge", [&](auto& s) { s.strides[0] = huge; });
    with("dilations huge", [&](auto& s) { s.dilations[0] = huge; });
    with("pads huge", [&](auto& s) { s.pads[0] = huge; });
    with("groups do not divide", [&](auto& s) { s.groups = 1009; });
    with("NaN", [&](auto& s) { s.maximum = std::nanf(""); });
    Case other = any_case(1);
    other.channels[0] = other.s.n_i;
    good &= refused(other, other.s, "channel beyond the last");
    other.channels[0] = -1;
    return good & refused(other, other.s, "negative channel");
}

}  // namespace

int main(int count, char** arguments) {
    const int cases = count > 1 ? std::atoi(arguments[1]) : 100;
    if (count > 2 && !netdecouple_use_level(arguments[2])) return std::printf("no %s\n", arguments[2]), 0;
    if (!refuses_what_is_wrong()) return 1;
    double worst = 0;
    for (int index = 0; index < cases; ++index) {
        const Case c = any_case(index);
        char error[256] = "";
        netdecouple_layer* layer = netdecouple_create(&c.s, c.channels.data(), c.depthwise.get(), c.pointwise.get(),
                                                      c.bias.get(), c.slope.get(), error, sizeof error);
        if (!layer) return std::printf("case %d refused: %s\n", index, error), 1;
        int64_t h = 0, w = 0;
        netdecouple_output_size(layer, c.h, c.w, &h, &w);
        const int64_t size = c.n * c.s.n_o * c.output_h * c.output_w;
        std::unique_ptr<float[]> y(new float[size]);
        std::memset(y.get(), 0xff, size * sizeof(float));  // NaN
        const bool failed = netdecouple_run(layer, c.x.get(), c.residual.get(), y.get(), c.n, c.h, c.w,
                                            index % 2 ? one_by_one : nullptr, nullptr);
        netdecouple_destroy(layer);
        const double off = error_of(c, y.get());
        worst = std::fmax(worst, off);
        if (failed || h != c.output_h || w != c.output_w || !(off < 1e-5))
            return std::printf("case %d: %s, output %lld x %lld, error %g\n", index, failed ? "failed" : "ran",
                               static_cast<long long>(h), static_cast<long long>(w), off), 1;
    }
    std::printf("%s %d %g\n", netdecouple_level(), cases, worst);
    return 0;
}
