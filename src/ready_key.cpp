#include "ready_key.hpp"

#include <algorithm>
#include <functional>
#include <thread>

#include "python.hpp"

namespace py = pybind11;

namespace dgrad {
namespace {

constexpr std::uintptr_t alignment = 16;

// Whether two tuples hold the same types: to ==, 1 is also 1.0 and True.
bool same_types(PyObject* left, PyObject* right) {
    if (Py_TYPE(left) != Py_TYPE(right)) return false;
    if (!PyTuple_CheckExact(left)) return true;
    const Py_ssize_t size = PyTuple_GET_SIZE(left);
    if (size != PyTuple_GET_SIZE(right)) return false;
    for (Py_ssize_t i = 0; i < size; ++i) {
        if (!same_types(PyTuple_GET_ITEM(left, i), PyTuple_GET_ITEM(right, i))) return false;
    }
    return true;
}

// Whether hashing and comparing such a value runs no code but the interpreter's own, and ends: a
// state is a tuple of values and of tuples, and deeper ones could use up the stack.
bool is_plain(PyObject* value, int levels = 2) {
    if (PyTuple_CheckExact(value)) {
        if (levels == 0) return false;
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
            if (!is_plain(PyTuple_GET_ITEM(value, i), levels - 1)) return false;
        }
        return true;
    }
    return value == Py_None || PyBool_Check(value) || PyLong_CheckExact(value) ||
           PyUnicode_CheckExact(value);
}

// A negative view shares all that is read off a tensor with what it is the negative of. PyTorch
// makes them of imaginary parts, which are not aligned; as_strided can move them to where they are.
// Those are asked that autograd calls views: to ask each would give the GIL to other threads.
bool is_negative_view(const py::object& tensor) {
    static const py::str &base = interned("_base"), &is_neg = interned("is_neg");
    return !attribute(tensor, base).is_none() && call_method(tensor, is_neg).ptr() != Py_False;
}

}  // namespace

bool ReadyKey::make(const TensorReader& tensors, const py::object& a, const py::object& b,
                    const py::object& bias, const py::tuple& state) {
    const std::hash<std::thread::id> thread;
    facts_[count_++] = static_cast<std::int64_t>(thread(std::this_thread::get_id()));
    if (!is_plain(state.ptr())) return false;
    state_hash_ = PyObject_Hash(state.ptr());
    if (state_hash_ == -1) return no();
    state_ = state;
    return add(tensors, a) && add(tensors, b) && (bias.is_none() || add(tensors, bias));
}

bool ReadyKey::add(const TensorReader& tensors, const py::object& object) {
    dlpack::Tensor tensor{};
    if (!tensors.try_read(object, &tensor)) return false;
    const auto dims = static_cast<std::size_t>(tensor.ndim);
    // A null address is of a tensor without memory, such as one of zeros.
    if (tensor.device_type != dlpack::cuda || tensor.strides == nullptr || tensor.data == nullptr ||
        reinterpret_cast<std::uintptr_t>(address(tensor)) % alignment != 0 || dims > 4 ||
        count_ + 2 * dims + 2 > most_facts || is_negative_view(object)) {
        return false;
    }
    const auto add_fact = [this](std::int64_t fact) { facts_[count_++] = fact; };
    add_fact(tensor.ndim | tensor.device_id << 8);
    add_fact(tensor.type_code | tensor.type_bits << 8);
    for (std::size_t i = 0; i < dims; ++i) {
        add_fact(tensor.shape[i]);
        add_fact(tensor.strides[i]);
    }
    return true;
}

bool ReadyKey::operator==(const ReadyKey& other) const {
    if (count_ != other.count_ || state_hash_ != other.state_hash_ ||
        !std::equal(facts_.begin(), facts_.begin() + static_cast<std::ptrdiff_t>(count_),
                    other.facts_.begin()) ||
        !same_types(state_.ptr(), other.state_.ptr())) {
        return false;
    }
    const int equal = PyObject_RichCompareBool(state_.ptr(), other.state_.ptr(), Py_EQ);
    return equal == 1 || (equal < 0 && no());
}

std::size_t ReadyKey::hash() const noexcept {
    std::uint64_t hash = static_cast<std::uint64_t>(state_hash_);
    for (std::size_t i = 0; i < count_; ++i) {
        hash = (hash ^ static_cast<std::uint64_t>(facts_[i])) * 1099511628211ULL;
        hash ^= hash >> 29;
    }
    return static_cast<std::size_t>(hash);
}

}  // namespace dgrad
