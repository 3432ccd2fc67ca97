// Problem: all that decides what can run and what is fastest.
//
// Note [Geometry]
// A transposed convolution is the data gradient of an ordinary convolution. In cuDNN's words
// x is the convolution's input (the large side), w its filter, y its output (the small side):
//
//     direction  PyTorch                          cuDNN
//     dgrad      output = conv_transpose2d(...)   dx from (w, dy):  dy = input, dx = output
//     fprop      grad_input                       y from (x, w):    x = grad_output
//     wgrad      grad_weight                      dw from (x, dy):  x = grad_output, dy = input
//
// PyTorch's weight (C_in, C_out/groups, kH, kW) is the filter (K, C/groups, R, S) as it is.
// Sizes are listed as (N, C, H, W) whatever the layout; all three tensors are dense in `layout`.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace dgrad {

enum class Direction { dgrad, fprop, wgrad };
enum class DataType { float16, bfloat16, float32, float64 };
enum class Layout { nchw, nhwc };

using Size2 = std::array<std::int64_t, 2>;
using Size4 = std::array<std::int64_t, 4>;

struct Problem {
    Direction direction;
    DataType dtype;
    bool tf32;  // float32 only: tensor cores may round the operands to tf32
    Layout layout;
    Size4 x;
    Size4 w;
    Size4 y;
    Size2 padding;
    Size2 stride;
    Size2 dilation;
    std::int64_t groups;
    bool bias;               // dgrad only: x gets a bias of one value a channel
    std::int64_t alignment;  // bytes: the least that all pointers keep, 1 to 16
    std::int64_t device;

    // Throws std::invalid_argument naming the field, its value and what was expected.
    void check() const;

    [[nodiscard]] bool operator==(const Problem& other) const noexcept;
    [[nodiscard]] std::size_t hash() const noexcept;
    [[nodiscard]] std::string text() const;
};

// Names as Python and the records write them; parsing an unknown name throws
// std::invalid_argument with the names there are.
const char* name(Direction direction) noexcept;
const char* name(DataType dtype) noexcept;
const char* name(Layout layout) noexcept;
Direction parse_direction(const std::string& text);
DataType parse_data_type(const std::string& text);
Layout parse_layout(const std::string& text);

}  // namespace dgrad
