// The descriptors that a problem needs in cuDNN's legacy API.
#pragma once

#include <cudnn.h>

#include "problem.hpp"
#include "unique_handle.hpp"

namespace dgrad::legacy {

using TensorDescriptor = UniqueHandle<cudnnTensorDescriptor_t, cudnnCreateTensorDescriptor,
                                      cudnnDestroyTensorDescriptor>;
using FilterDescriptor = UniqueHandle<cudnnFilterDescriptor_t, cudnnCreateFilterDescriptor,
                                      cudnnDestroyFilterDescriptor>;
using ConvolutionDescriptor =
    UniqueHandle<cudnnConvolutionDescriptor_t, cudnnCreateConvolutionDescriptor,
                 cudnnDestroyConvolutionDescriptor>;

// Needs no device. The math type decides which of an algorithm's kernels may run.
struct Descriptors {
    Descriptors(const Problem& problem, cudnnMathType_t math_type);

    TensorDescriptor x{"cudnnCreateTensorDescriptor"};
    FilterDescriptor w{"cudnnCreateFilterDescriptor"};
    TensorDescriptor y{"cudnnCreateTensorDescriptor"};
    ConvolutionDescriptor convolution{"cudnnCreateConvolutionDescriptor"};
};

// The math type to ask the heuristic with: the fastest that the problem's precision allows.
cudnnMathType_t widest_math_type(const Problem& problem) noexcept;

// cuDNN's own answer for the size of y, to hold Problem's arithmetic against.
Size4 forward_output_size(const Problem& problem);

}  // namespace dgrad::legacy
