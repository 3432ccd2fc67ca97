#include "tensors.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "python.hpp"

namespace py = pybind11;

namespace dgrad {

TensorReader::TensorReader(const py::capsule& exchange, py::tuple types)
    : exchange_(static_cast<const dlpack::Exchange*>(
          PyCapsule_GetPointer(exchange.ptr(), dlpack::capsule_name))),
      types_(std::move(types)) {
    if (exchange_ == nullptr) throw py::error_already_set();
    if (exchange_->major != dlpack::major_version || exchange_->tensor_from_py_object == nullptr) {
        throw std::invalid_argument("exchange is of DLPack " + std::to_string(exchange_->major) +
                                    ", expected version 1 with all its calls");
    }
}

dlpack::Tensor TensorReader::read(const py::object& tensor) const {
    dlpack::Tensor found{};
    if (exchange_->tensor_from_py_object(tensor.ptr(), &found) != 0) {
        throw py::error_already_set();
    }
    return found;
}

bool TensorReader::try_read(const py::object& object, dlpack::Tensor* tensor) const {
    const auto type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
    PyObject** const begin = PySequence_Fast_ITEMS(types_.ptr());
    PyObject** const end = begin + PyTuple_GET_SIZE(types_.ptr());
    if (std::find(begin, end, type) == end) return false;
    return exchange_->tensor_from_py_object(object.ptr(), tensor) == 0 || no();
}

void* TensorReader::stream(std::int32_t device) const {
    void* found = nullptr;
    if (exchange_->current_work_stream(dlpack::cuda, device, &found) != 0) {
        throw py::error_already_set();
    }
    return found;
}

}  // namespace dgrad
