// The few ways in which native code asks Python at every call, without pybind11's own look at the
// arguments, which costs more than what is asked.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <exception>
#include <string>

namespace dgrad {

// Clears a Python error that a failed look left behind.
inline bool no() {
    PyErr_Clear();
    return false;
}

// Leaked on purpose: nothing of Python may be touched once the interpreter has ended.
inline const pybind11::str& interned(const char* name) {
    return *new pybind11::str(
        pybind11::reinterpret_steal<pybind11::str>(PyUnicode_InternFromString(name)));
}

inline pybind11::object stolen(PyObject* object) {
    if (object == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(object);
}

inline pybind11::object attribute(const pybind11::object& object, const pybind11::str& name) {
    return stolen(PyObject_GetAttr(object.ptr(), name.ptr()));
}

template <typename... Arguments>
pybind11::object call_method(const pybind11::object& object, const pybind11::str& name,
                             const Arguments&... arguments) {
    std::array<PyObject*, 1 + sizeof...(arguments)> all{object.ptr(), arguments.ptr()...};
    return stolen(PyObject_VectorcallMethod(name.ptr(), all.data(), all.size(), nullptr));
}

// The arguments of a method that `define_fast` defines, borrowed.
struct FastArguments {
    PyObject* const* values;

    [[nodiscard]] pybind11::object operator[](std::size_t i) const {
        return pybind11::reinterpret_borrow<pybind11::object>(values[i]);
    }
};

template <typename Self, pybind11::object (*function)(Self&, FastArguments), Py_ssize_t count>
PyObject* call_fast(PyObject* self, PyObject* const* arguments, Py_ssize_t given) noexcept {
    try {
        if (given != count) {
            throw pybind11::type_error("expected " + std::to_string(count) + " arguments, got " +
                                       std::to_string(given));
        }
        return function(pybind11::cast<Self&>(pybind11::handle(self)), {arguments}).release().ptr();
    } catch (pybind11::error_already_set& error) {
        error.restore();
    } catch (const pybind11::builtin_exception& error) {
        error.set_error();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

// Defines a method of a bound class that takes `count` arguments by place.
template <typename Self, pybind11::object (*function)(Self&, FastArguments), Py_ssize_t count>
void define_fast(const pybind11::object& type, const char* name) {
    const auto call = reinterpret_cast<void (*)()>(&call_fast<Self, function, count>);
    // Leaked on purpose: the method refers to it.
    auto* const method =
        new PyMethodDef{name, reinterpret_cast<PyCFunction>(call), METH_FASTCALL, nullptr};
    type.attr(name) =
        stolen(PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), method));
}

}  // namespace dgrad
