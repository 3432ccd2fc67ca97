// PyTorch's tensors, read through DLPack's C exchange table: no libtorch and no Python code.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "dlpack.hpp"

namespace dgrad {

class TensorReader {
  public:
    // `exchange`: the capsule of the tensor type. `types`: the exact types of tensors that are
    // read, as a subclass may have rules of its own.
    TensorReader(const pybind11::capsule& exchange, pybind11::tuple types);

    [[nodiscard]] dlpack::Tensor read(const pybind11::object& tensor) const;

    // Whether it is one of the types and can be read.
    bool try_read(const pybind11::object& object, dlpack::Tensor* tensor) const;

    // The current one of PyTorch on a device.
    [[nodiscard]] void* stream(std::int32_t device) const;

  private:
    const dlpack::Exchange* exchange_;
    pybind11::tuple types_;
};

inline void* address(const dlpack::Tensor& tensor) {
    return static_cast<char*>(tensor.data) + tensor.byte_offset;
}

}  // namespace dgrad
