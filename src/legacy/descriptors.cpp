#include "legacy/descriptors.hpp"

#include "data_type.hpp"
#include "error.hpp"

namespace dgrad::legacy {
namespace {

// Problem::check has bounded every value.
int as_int(std::int64_t value) { return static_cast<int>(value); }

void set_tensor(const TensorDescriptor& descriptor, const Problem& problem, const Size4& size) {
    const cudnnTensorFormat_t format =
        problem.layout == Layout::nhwc ? CUDNN_TENSOR_NHWC : CUDNN_TENSOR_NCHW;
    DGRAD_CUDNN_CHECK(cudnnSetTensor4dDescriptor(descriptor.get(), format, data_type(problem.dtype),
                                                 as_int(size[0]), as_int(size[1]), as_int(size[2]),
                                                 as_int(size[3])));
}

}  // namespace

Descriptors::Descriptors(const Problem& problem, cudnnMathType_t math_type) {
    forget_last_error();
    set_tensor(x, problem, problem.x);
    set_tensor(y, problem, problem.y);
    const cudnnTensorFormat_t format =
        problem.layout == Layout::nhwc ? CUDNN_TENSOR_NHWC : CUDNN_TENSOR_NCHW;
    DGRAD_CUDNN_CHECK(cudnnSetFilter4dDescriptor(w.get(), data_type(problem.dtype), format,
                                                 as_int(problem.w[0]), as_int(problem.w[1]),
                                                 as_int(problem.w[2]), as_int(problem.w[3])));
    DGRAD_CUDNN_CHECK(cudnnSetConvolution2dDescriptor(
        convolution.get(), as_int(problem.padding[0]), as_int(problem.padding[1]),
        as_int(problem.stride[0]), as_int(problem.stride[1]), as_int(problem.dilation[0]),
        as_int(problem.dilation[1]), CUDNN_CROSS_CORRELATION, compute_type(problem)));
    DGRAD_CUDNN_CHECK(cudnnSetConvolutionGroupCount(convolution.get(), as_int(problem.groups)));
    DGRAD_CUDNN_CHECK(cudnnSetConvolutionMathType(convolution.get(), math_type));
}

cudnnMathType_t widest_math_type(const Problem& problem) noexcept {
    switch (problem.dtype) {
        case DataType::float16:
        case DataType::bfloat16:
            return CUDNN_TENSOR_OP_MATH;
        case DataType::float32:
            // Since Ampere the default math type means tf32; only FMA forbids it.
            return problem.tf32 ? CUDNN_DEFAULT_MATH : CUDNN_FMA_MATH;
        case DataType::float64:
            break;
    }
    return CUDNN_DEFAULT_MATH;
}

Size4 forward_output_size(const Problem& problem) {
    const Descriptors descriptors(problem, widest_math_type(problem));
    int n = 0;
    int c = 0;
    int h = 0;
    int w = 0;
    DGRAD_CUDNN_CHECK(cudnnGetConvolution2dForwardOutputDim(
        descriptors.convolution.get(), descriptors.x.get(), descriptors.w.get(), &n, &c, &h, &w));
    return {n, c, h, w};
}

}  // namespace dgrad::legacy
