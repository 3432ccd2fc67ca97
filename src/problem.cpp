#include "problem.hpp"

#include <limits>
#include <stdexcept>
#include <tuple>

#include "names.hpp"

namespace dgrad {
namespace {

// Legacy descriptors hold sizes and strides as int.
constexpr std::int64_t max_elements = std::numeric_limits<std::int32_t>::max();

constexpr std::array<const char*, 3> direction_names{"dgrad", "fprop", "wgrad"};
constexpr std::array<const char*, 4> data_type_names{"float16", "bfloat16", "float32", "float64"};
constexpr std::array<const char*, 2> layout_names{"nchw", "nhwc"};

template <std::size_t n>
std::string join(const std::array<std::int64_t, n>& values, const char* separator) {
    std::string text;
    for (std::size_t i = 0; i < n; ++i) {
        text += (i == 0 ? "" : separator) + std::to_string(values[i]);
    }
    return text;
}

void require(bool holds, const std::string& field, const std::string& value,
             const std::string& expected) {
    if (!holds) {
        throw std::invalid_argument(field + " is " + value + ", expected " + expected);
    }
}

template <std::size_t n>
void require_range(const char* field, const std::array<std::int64_t, n>& values,
                   std::int64_t least) {
    for (const std::int64_t value : values) {
        require(least <= value && value <= max_elements, field, join(values, "x"),
                "each from " + std::to_string(least) + " to " + std::to_string(max_elements));
    }
}

void require_sizes(const char* field, const Size4& sizes) {
    require_range(field, sizes, 1);
    std::int64_t elements = 1;
    for (const std::int64_t size : sizes) {
        // Checked at each step, so the product of two int32 values cannot overflow.
        elements *= size;
        require(elements <= max_elements, field, join(sizes, "x"),
                "at most " + std::to_string(max_elements) + " elements, cuDNN's 32-bit limit");
    }
}

}  // namespace

const char* name(Direction direction) noexcept {
    return direction_names[static_cast<std::size_t>(direction)];
}
const char* name(DataType dtype) noexcept {
    return data_type_names[static_cast<std::size_t>(dtype)];
}
const char* name(Layout layout) noexcept { return layout_names[static_cast<std::size_t>(layout)]; }

Direction parse_direction(const std::string& text) {
    return static_cast<Direction>(index_of("direction", direction_names, text));
}
DataType parse_data_type(const std::string& text) {
    return static_cast<DataType>(index_of("dtype", data_type_names, text));
}
Layout parse_layout(const std::string& text) {
    return static_cast<Layout>(index_of("layout", layout_names, text));
}

void Problem::check() const {
    require_sizes("x", x);
    require_sizes("w", w);
    require_sizes("y", y);
    require_range("padding", padding, 0);
    require_range("stride", stride, 1);
    require_range("dilation", dilation, 1);
    require(groups >= 1 && x[1] % groups == 0 && y[1] % groups == 0, "groups",
            std::to_string(groups), "a divisor of the channels of x and y");
    require(w[0] == y[1] && w[1] * groups == x[1], "w", join(w, "x"),
            "(channels of y, channels of x / groups, R, S)");
    require(x[0] == y[0], "y", join(y, "x"), "the batch size of x");
    require(alignment == 1 || alignment == 2 || alignment == 4 || alignment == 8 || alignment == 16,
            "alignment", std::to_string(alignment), "1, 2, 4, 8 or 16 bytes");
    require(device >= 0 && device <= max_elements, "device", std::to_string(device),
            "0 or more, in 32 bits");
    require(!bias || direction == Direction::dgrad, "bias", "true",
            "false, as direction is not dgrad");
    require(!tf32 || dtype == DataType::float32, "tf32", "true", "false, as dtype is not float32");
    for (std::size_t i = 0; i < 2; ++i) {
        // All factors fit in 32 bits, so nothing here overflows 64. cuDNN has 32 for the sums.
        const std::int64_t padded = x[i + 2] + 2 * padding[i];
        const std::int64_t kernel = dilation[i] * (w[i + 2] - 1) + 1;
        require(padded <= max_elements, "padding", join(padding, "x"),
                "fewer than 2^31 rows and columns of x with it");
        require(kernel <= max_elements, "dilation", join(dilation, "x"),
                "fewer than 2^31 rows and columns of w with it");
        const std::int64_t span = padded - kernel;
        require(span >= 0 && span / stride[i] + 1 == y[i + 2], "y", join(y, "x"),
                "the size of the convolution of x with w");
    }
}

bool Problem::operator==(const Problem& other) const noexcept {
    const auto fields = [](const Problem& p) {
        return std::tie(p.direction, p.dtype, p.tf32, p.layout, p.x, p.w, p.y, p.padding, p.stride,
                        p.dilation, p.groups, p.bias, p.alignment, p.device);
    };
    return fields(*this) == fields(other);
}

std::size_t Problem::hash() const noexcept {
    std::uint64_t state = 1469598103934665603ULL;  // FNV-1a over 64-bit words
    const auto add = [&state](auto value) {
        state = (state ^ static_cast<std::uint64_t>(value)) * 1099511628211ULL;
        state ^= state >> 29;
    };
    const auto add_all = [&add](const auto& values) {
        for (const std::int64_t value : values) add(value);
    };
    add(direction);
    add(dtype);
    add(tf32);
    add(layout);
    add_all(x);
    add_all(w);
    add_all(y);
    add_all(padding);
    add_all(stride);
    add_all(dilation);
    add(groups);
    add(bias);
    add(alignment);
    add(device);
    return static_cast<std::size_t>(state);
}

std::string Problem::text() const {
    std::string text = std::string(name(direction)) + (bias ? "+bias " : " ") + name(dtype);
    if (dtype == DataType::float32) text += tf32 ? "/tf32" : "/ieee";
    return text + " " + name(layout) + " x=" + join(x, "x") + " w=" + join(w, "x") +
           " y=" + join(y, "x") + " padding=" + join(padding, ",") +
           " stride=" + join(stride, ",") + " dilation=" + join(dilation, ",") +
           " groups=" + std::to_string(groups) + " alignment=" + std::to_string(alignment) +
           " device=" + std::to_string(device);
}

}  // namespace dgrad
