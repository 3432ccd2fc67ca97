#include "ready.hpp"

#include <algorithm>
#include <exception>
#include <utility>

#include "python.hpp"

namespace py = pybind11;

namespace dgrad {
namespace {

// Where the two inputs of a direction and its result stand; see Note [Geometry].
Pointers in_slots(Direction direction, void* a, void* b, void* out) {
    switch (direction) {
        case Direction::fprop:
            return {a, b, out, nullptr};
        case Direction::wgrad:
            return {a, out, b, nullptr};
        case Direction::dgrad:
            break;
    }
    return {out, b, a, nullptr};
}

void* storage_address(const py::object& storage) {
    static const py::str& data_ptr = interned("data_ptr");
    return PyLong_AsVoidPtr(call_method(storage, data_ptr).ptr());
}

// Nothing here runs Python code, so no signal handler does either.
void add_over_channels(const py::object& tensor, const py::object& bias) {
    static const py::str& view = interned("view");
    static const py::str& add = interned("add_");
    static const py::int_& one = *new py::int_(1);
    static const py::int_& rest = *new py::int_(-1);
    call_method(tensor, add, call_method(bias, view, one, rest, one, one));
}

py::object sum_over(const py::object& tensor, const py::tuple& dims) {
    static const py::str& sum = interned("sum");
    return call_method(tensor, sum, dims);
}

bool requires_grad(const py::object& tensor) {
    static const py::str& name = interned("requires_grad");
    return !tensor.is_none() && attribute(tensor, name).is(py::handle(Py_True));
}

bool is_true(const py::object& callable) {
    return stolen(PyObject_CallNoArgs(callable.ptr())).is(py::handle(Py_True));
}

}  // namespace

bool ReadyCalls::may_run() const {
    for (const py::handle guard : process_.guards) {
        PyObject* const* const pair = PySequence_Fast_ITEMS(guard.ptr());
        const py::object found = stolen(PyObject_CallNoArgs(pair[0]));
        const int equal = PyObject_RichCompareBool(found.ptr(), pair[1], Py_EQ);
        if (equal < 0) throw py::error_already_set();
        if (equal == 0) return false;
    }
    return true;
}

// As dgrad.config.switches() has it.
py::tuple ReadyCalls::state(const py::tuple& own, const py::object& flags) const {
    const auto size = own.size(), count = process_.switches.size();
    py::tuple state(size + 2 + count);
    // What is called meanwhile may let other code walk the collector's objects.
    PyObject_GC_UnTrack(state.ptr());
    const auto set = [&state](std::size_t i, py::object value) {
        PyTuple_SET_ITEM(state.ptr(), static_cast<Py_ssize_t>(i), value.release().ptr());
    };
    const auto identity = [](const py::object& object) {
        return stolen(PyLong_FromVoidPtr(object.ptr()));
    };
    for (std::size_t i = 0; i < size; ++i) set(i, own[i]);
    set(size, identity(flags));
    set(size + 1, identity(stolen(PyObject_CallNoArgs(process_.flags.ptr()))));
    for (std::size_t i = 0; i < count; ++i) {
        const auto place = static_cast<Py_ssize_t>(i);
        set(size + 2 + i,
            stolen(PyObject_CallNoArgs(PyTuple_GET_ITEM(process_.switches.ptr(), place))));
    }
    PyObject_GC_Track(state.ptr());
    return state;
}

ReadyCalls::Entry ReadyCalls::look_up(const py::object& a, const py::object& b,
                                      const py::object& bias, const py::tuple& state) {
    ReadyKey key;
    if (!key.make(tensors_, a, b, bias, state)) return {};
    const auto found = entries_.find(key);
    if (found == entries_.end()) return {};
    Entry entry = found->second;
    if (entry.call->python_captures && is_true(entry.call->is_capturing)) return {};
    return entry;
}

py::object ReadyCalls::run(const py::object& a, const py::object& b, const py::object& bias,
                           const py::tuple& state) {
    const Entry entry = look_up(a, b, bias, state);
    if (entry.call == nullptr) return py::none();
    ++hits_;
    return execute(*entry.call, a, b, bias);
}

py::object ReadyCalls::call(const py::object& a, const py::object& b, const py::object& bias,
                            const py::tuple& own, const py::object& flags) {
    if (!may_run()) return py::none();
    const Entry entry = look_up(a, b, bias, state(own, flags));
    if (entry.call == nullptr) return py::none();
    ++hits_;
    if (is_true(process_.recording) &&
        (requires_grad(a) || requires_grad(b) || requires_grad(bias))) {
        return entry.object;
    }
    return execute(*entry.call, a, b, bias);
}

py::object ReadyCalls::execute(const ReadyCall& call, const py::object& a, const py::object& b,
                               const py::object& bias) {
    try {
        const dlpack::Tensor from = tensors_.read(a);
        if (process_.current_device().cast<std::int32_t>() != from.device_id) return py::none();
        void* const stream = tensors_.stream(from.device_id);
        py::object out = call.make_out();
        const py::object workspace =
            call.make_workspace.is_none() ? py::none() : call.make_workspace();
        void* const scratch = workspace.is_none() ? nullptr : storage_address(workspace);
        Pointers pointers = in_slots(call.direction, address(from), address(tensors_.read(b)),
                                     address(tensors_.read(out)));
        const py::object entered = call.enter_bias.is_none() ? bias : call.enter_bias(bias);
        if (call.plan_reads_bias) pointers.bias = address(tensors_.read(entered));
        if (!call.is_capturing.is_none() && is_true(call.is_capturing)) {
            keep_for_graphs(call.plan);
        }
        {
            const py::gil_scoped_release released;
            call.plan->execute(pointers, scratch, static_cast<cudaStream_t>(stream));
        }
        if (call.pytorch_adds_bias) add_over_channels(out, bias);
        ++call.uses->count;
        return out;
    } catch (const py::error_already_set& error) {
        if (!error.matches(PyExc_RuntimeError)) throw;  // an interrupt, for example
    } catch (const std::exception&) {
    }
    clear();  // Python runs it again, and tells what is wrong
    return py::none();
}

bool ReadyCalls::enters(const py::object& tensor, const std::vector<std::int64_t>& strides) const {
    dlpack::Tensor found{};
    return tensors_.try_read(tensor, &found) && found.strides != nullptr &&
           static_cast<std::size_t>(found.ndim) == strides.size() &&
           std::equal(strides.begin(), strides.end(), found.strides);
}

bool ReadyCalls::is_asked(const py::tuple& nodes, std::size_t input) const {
    const py::tuple edge = nodes[input];
    PyObject* const node = PyTuple_GET_ITEM(edge.ptr(), 0);
    PyObject* const answer = PyObject_CallOneArg(process_.is_asked.ptr(), node);
    if (answer != nullptr) return stolen(answer).is(py::handle(Py_True));
    // A leaf whose gradient torch.autograd.grad was asked for.
    if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) throw py::error_already_set();
    return !no();
}

py::object ReadyCalls::backward(const py::object& context, const py::object& call,
                                const py::tuple& saved, const py::object& grad) {
    static const py::str& needs_input_grad = interned("needs_input_grad");
    static const py::str& next_functions = interned("next_functions");
    const auto gradients = call.cast<const ReadyCall&>().gradients;
    if (gradients == nullptr || !may_run() || is_true(process_.recording)) return py::none();
    const std::array<py::object, 3> values{saved[0], saved[1], grad};
    if (!enters(grad, gradients->grad_strides) ||
        !(values[0].is_none() || enters(values[0], gradients->a_strides))) {
        return py::none();
    }
    for (const py::handle odd : process_.is_odd) {
        if (stolen(PyObject_CallOneArg(odd.ptr(), grad.ptr())).is(py::handle(Py_True))) {
            return py::none();
        }
    }
    const py::tuple needed = attribute(context, needs_input_grad);
    const py::tuple nodes = attribute(context, next_functions);
    const auto is_needed = [&needed](std::size_t input) {
        return PyTuple_GET_ITEM(needed.ptr(), static_cast<Py_ssize_t>(input)) == Py_True;
    };
    std::array<Entry, 2> found;  // all, before any runs
    for (std::size_t i = 0; i < 2; ++i) {
        if (!is_needed(i) || !is_asked(nodes, i)) continue;
        const ReadyGradients::Gradient& each = gradients->of[i];
        found[i] = look_up(values[each.first], values[each.second], py::none(),
                           state(each.state, gradients->flags));
        if (found[i].call == nullptr) return py::none();
    }
    std::array<py::object, 2> results{py::none(), py::none()};
    for (std::size_t i = 0; i < 2; ++i) {
        if (found[i].call == nullptr) continue;
        const ReadyGradients::Gradient& each = gradients->of[i];
        ++hits_;
        results[i] = execute(*found[i].call, values[each.first], values[each.second], py::none());
        if (results[i].is_none()) return py::none();
    }
    // Last, as in PyTorch: a sum is slow to fetch what the others bring into the cache.
    py::object of_bias = py::none();
    if (is_needed(2)) {
        const py::object& sum = gradients->sum_bias;
        of_bias = sum.is_none() ? sum_over(grad, but_channels_) : sum(grad);
    }
    return py::make_tuple(results[0], results[1], of_bias, py::none());
}

void ReadyCalls::put(const py::object& a, const py::object& b, const py::object& bias,
                     const py::tuple& state, const py::object& call) {
    if (!py::isinstance<ReadyCall>(call)) throw py::type_error("call is not a ReadyCall");
    Entry entry{call, &call.cast<const ReadyCall&>()};
    ReadyKey key;
    if (!key.make(tensors_, a, b, bias, state)) return;
    // Destroyed at the end, as what goes may call back.
    const Entry old = std::exchange(entries_[std::move(key)], std::move(entry));
}

void ReadyCalls::clear() {
    // Destroyed at the end, as what goes may call back.
    decltype(entries_) entries;
    entries.swap(entries_);
}

}  // namespace dgrad
