// cuDNN's data types for a problem's.
#pragma once

#include <cudnn.h>

#include "problem.hpp"

namespace dgrad {

inline cudnnDataType_t data_type(DataType dtype) {
    switch (dtype) {
        case DataType::float16:
            return CUDNN_DATA_HALF;
        case DataType::bfloat16:
            return CUDNN_DATA_BFLOAT16;
        case DataType::float32:
            return CUDNN_DATA_FLOAT;
        case DataType::float64:
            break;
    }
    return CUDNN_DATA_DOUBLE;
}

// Half types accumulate in float, as in PyTorch.
inline cudnnDataType_t compute_type(const Problem& problem) {
    return problem.dtype == DataType::float64 ? CUDNN_DATA_DOUBLE : CUDNN_DATA_FLOAT;
}

}  // namespace dgrad
