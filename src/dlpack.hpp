// The part of DLPack's C exchange table that is used here, laid out as DLPack 1.3 fixes it.
//
// A framework's tensor type carries it as the capsule __dlpack_c_exchange_api__ (PyTorch 2.11
// does, 2.4 does not): pointers, sizes and the stream without PyTorch's library and without Python.
// https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once

#include <cstdint>

namespace dgrad::dlpack {

constexpr std::uint32_t major_version = 1;
constexpr const char* capsule_name = "dlpack_exchange_api";
constexpr std::int32_t cuda = 2;

struct Tensor {
    void* data;
    std::int32_t device_type;
    std::int32_t device_id;
    std::int32_t ndim;
    std::uint8_t type_code;
    std::uint8_t type_bits;
    std::uint16_t type_lanes;
    const std::int64_t* shape;
    const std::int64_t* strides;  // in elements; may be null for a compact tensor
    std::uint64_t byte_offset;
};

struct Exchange {
    std::uint32_t major;
    std::uint32_t minor;
    const void* previous;
    void* managed_tensor_allocator;
    void* managed_tensor_from_py_object;
    void* managed_tensor_to_py_object;
    // Both return 0, or -1 with a Python error set. The first borrows from the object.
    int (*tensor_from_py_object)(void* object, Tensor* out);
    int (*current_work_stream)(std::int32_t device_type, std::int32_t device_id, void** stream);
};

}  // namespace dgrad::dlpack
