#include "graph/operation_graph.hpp"

#include <array>
#include <utility>

#include "data_type.hpp"
#include "error.hpp"
#include "handle.hpp"
#include "names.hpp"

namespace dgrad::graph {
namespace {

constexpr std::array<const char*, 5> operation_names{"convolution", "convolution_identity",
                                                     "convolution_bias", "bias", "bias_rows"};
constexpr std::int64_t virtual_uid = 'v';

using Sizes = std::vector<std::int64_t>;

struct Shape {
    Sizes sizes;
    Sizes strides;
};

Shape dense(const Size4& size, Layout layout) {
    const auto [n, c, h, w] = size;
    if (layout == Layout::nhwc) return {{n, c, h, w}, {h * w * c, 1, w * c, c}};
    return {{n, c, h, w}, {c * h * w, h * w, w, 1}};
}

// The shapes of x and of the bias that is added to it.
std::pair<Shape, Shape> bias_shapes(const Problem& problem, Operation operation) {
    const auto [n, c, h, w] = problem.x;
    if (operation == Operation::bias_rows) {
        return {{{1, h * w, n * c, 1}, {n * c * h * w, 1, h * w, h * w}},
                {{1, 1, n * c, 1}, {n * c, 1, 1, 1}}};
    }
    return {dense(problem.x, problem.layout), {{1, c, 1, 1}, {c, 1, c, c}}};
}

// Adds descriptors one after another; a graph keeps all of them.
class Builder {
  public:
    // The handle comes first: without a device that is what to tell of.
    explicit Builder(const Problem& problem)
        : problem_(problem), handle_(handle_for(problem.device)) {
        parts_.reserve(16);  // references to parts stay good
        forget_last_error();
    }

    const Descriptor& tensor(Uid uid, const Shape& shape) {
        uids_.push_back(uid);
        return tensor(static_cast<std::int64_t>(uid), shape, data_type(problem_.dtype), false);
    }

    // Between two operations, in no memory.
    const Descriptor& virtual_tensor(const Shape& shape) {
        return tensor(virtual_uid, shape, compute_type(problem_), true);
    }

    void convolution(const Descriptor& x, const Descriptor& w, const Descriptor& y) {
        Descriptor& conv = add(CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR);
        const auto list = [](const Size2& values) { return Sizes(values.begin(), values.end()); };
        conv.set(CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, std::int64_t{2});
        conv.set(CUDNN_ATTR_CONVOLUTION_COMP_TYPE, compute_type(problem_));
        conv.set(CUDNN_ATTR_CONVOLUTION_CONV_MODE, CUDNN_CROSS_CORRELATION);
        conv.set(CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, list(problem_.padding));
        conv.set(CUDNN_ATTR_CONVOLUTION_POST_PADDINGS, list(problem_.padding));
        conv.set(CUDNN_ATTR_CONVOLUTION_DILATIONS, list(problem_.dilation));
        conv.set(CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES, list(problem_.stride));
        conv.finalize();
        switch (problem_.direction) {
            case Direction::dgrad:
                return operation(CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR,
                                 {{CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DX, x},
                                  {CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_W, w},
                                  {CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DY, y},
                                  {CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_CONV_DESC, conv}},
                                 CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_ALPHA,
                                 CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_BETA);
            case Direction::fprop:
                return operation(CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR,
                                 {{CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X, x},
                                  {CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W, w},
                                  {CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y, y},
                                  {CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC, conv}},
                                 CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA,
                                 CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA);
            case Direction::wgrad:
                break;
        }
        operation(CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR,
                  {{CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_X, x},
                   {CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DW, w},
                   {CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DY, y},
                   {CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_CONV_DESC, conv}},
                  CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_ALPHA,
                  CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_BETA);
    }

    void addition(const Descriptor& left, const Descriptor& right, const Descriptor& sum) {
        pointwise(CUDNN_POINTWISE_ADD, left, &right, sum);
    }

    void identity(const Descriptor& from, const Descriptor& to) {
        pointwise(CUDNN_POINTWISE_IDENTITY, from, nullptr, to);
    }

    OperationGraph finish() {
        Descriptor graph(CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
        graph.set(CUDNN_ATTR_OPERATIONGRAPH_HANDLE, handle_);
        graph.set(CUDNN_ATTR_OPERATIONGRAPH_OPS, operations_);
        graph.finalize();
        return {std::move(parts_), std::move(graph), std::move(uids_)};
    }

  private:
    Descriptor& add(cudnnBackendDescriptorType_t type) { return parts_.emplace_back(type); }

    const Descriptor& tensor(std::int64_t uid, const Shape& shape, cudnnDataType_t type,
                             bool is_virtual) {
        Descriptor& made = add(CUDNN_BACKEND_TENSOR_DESCRIPTOR);
        made.set(CUDNN_ATTR_TENSOR_UNIQUE_ID, uid);
        made.set(CUDNN_ATTR_TENSOR_DATA_TYPE, type);
        made.set(CUDNN_ATTR_TENSOR_DIMENSIONS, shape.sizes);
        made.set(CUDNN_ATTR_TENSOR_STRIDES, shape.strides);
        made.set(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, problem_.alignment);
        made.set(CUDNN_ATTR_TENSOR_IS_VIRTUAL, is_virtual);
        made.finalize();
        return made;
    }

    void pointwise(cudnnPointwiseMode_t mode, const Descriptor& left, const Descriptor* right,
                   const Descriptor& result) {
        Descriptor& pointwise = add(CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
        pointwise.set(CUDNN_ATTR_POINTWISE_MODE, mode);
        pointwise.set(CUDNN_ATTR_POINTWISE_MATH_PREC, compute_type(problem_));
        pointwise.finalize();
        Descriptor& made = add(CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
        made.set(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, pointwise);
        made.set(CUDNN_ATTR_OPERATION_POINTWISE_XDESC, left);
        if (right != nullptr) made.set(CUDNN_ATTR_OPERATION_POINTWISE_BDESC, *right);
        made.set(CUDNN_ATTR_OPERATION_POINTWISE_YDESC, result);
        made.finalize();
        operations_.push_back(&made);
    }

    struct Attribute {
        cudnnBackendAttributeName_t name;
        const Descriptor& value;
    };

    void operation(cudnnBackendDescriptorType_t type, const std::vector<Attribute>& attributes,
                   cudnnBackendAttributeName_t alpha, cudnnBackendAttributeName_t beta) {
        Descriptor& made = add(type);
        for (const Attribute& attribute : attributes) made.set(attribute.name, attribute.value);
        if (problem_.dtype == DataType::float64) {
            made.set(alpha, 1.0);
            made.set(beta, 0.0);
        } else {
            made.set(alpha, 1.0F);
            made.set(beta, 0.0F);
        }
        made.finalize();
        operations_.push_back(&made);
    }

    const Problem& problem_;
    cudnnHandle_t handle_;
    std::vector<Descriptor> parts_;
    std::vector<const Descriptor*> operations_;
    std::vector<Uid> uids_;
};

}  // namespace

Operation parse_operation(const std::string& text) {
    return static_cast<Operation>(index_of("operation", operation_names, text));
}

OperationGraph make_operation_graph(const Problem& problem, Operation operation) {
    problem.check();
    Builder builder(problem);
    const auto [sum_shape, bias_shape] = bias_shapes(problem, operation);
    if (operation == Operation::bias || operation == Operation::bias_rows) {
        const Descriptor& x = builder.tensor(Uid::x, sum_shape);
        const Descriptor& bias = builder.tensor(Uid::bias, bias_shape);
        builder.addition(x, bias, builder.tensor(Uid::sum, sum_shape));
        return builder.finish();
    }
    const std::array<Uid, 3> uids{Uid::x, Uid::y, Uid::w};  // in the order of Direction
    const Uid made = uids.at(static_cast<std::size_t>(problem.direction));
    const bool fused = operation != Operation::convolution;
    const Descriptor* between = nullptr;
    const auto tensor = [&](Uid uid, const Size4& size) -> const Descriptor& {
        const Shape shape = dense(size, problem.layout);
        if (!fused || uid != made) return builder.tensor(uid, shape);
        between = &builder.virtual_tensor(shape);
        return *between;
    };
    const Descriptor& x = tensor(Uid::x, problem.x);
    const Descriptor& w = tensor(Uid::w, problem.w);
    const Descriptor& y = tensor(Uid::y, problem.y);
    builder.convolution(x, w, y);
    if (operation == Operation::convolution_bias) {
        const Descriptor& bias = builder.tensor(Uid::bias, bias_shape);
        builder.addition(*between, bias, builder.tensor(made, sum_shape));
    } else if (fused) {
        const Size4& size = made == Uid::x ? problem.x : made == Uid::y ? problem.y : problem.w;
        builder.identity(*between, builder.tensor(made, dense(size, problem.layout)));
    }
    return builder.finish();
}

}  // namespace dgrad::graph
