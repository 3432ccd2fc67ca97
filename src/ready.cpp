#include "ready.hpp"

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <thread>
#include <utility>

#include "error.hpp"

namespace py = pybind11;

namespace dgrad {
namespace {

constexpr std::uintptr_t alignment = 16;

void* address(const dlpack::Tensor& tensor) {
    return static_cast<char*>(tensor.data) + tensor.byte_offset;
}

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

// Clears a Python error that a failed look left behind.
bool no() {
    PyErr_Clear();
    return false;
}

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

// A method by an interned name, made once.
template <typename... Arguments>
py::object call_method(const py::object& object, const py::str& name,
                       const Arguments&... arguments) {
    std::array<PyObject*, 1 + sizeof...(arguments)> all{object.ptr(), arguments.ptr()...};
    PyObject* const result = PyObject_VectorcallMethod(name.ptr(), all.data(), all.size(), nullptr);
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
}

const py::str& interned(const char* name) {
    // Leaked on purpose: nothing of Python may be touched once the interpreter has ended.
    return *new py::str(py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name)));
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

// Whether hashing and comparing such a value runs no code but the interpreter's own.
bool is_plain(PyObject* value) {
    if (PyTuple_CheckExact(value)) {
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
            if (!is_plain(PyTuple_GET_ITEM(value, i))) return false;
        }
        return true;
    }
    return value == Py_None || PyBool_Check(value) || PyLong_CheckExact(value) ||
           PyUnicode_CheckExact(value);
}

}  // namespace

ReadyCalls::ReadyCalls(const py::capsule& exchange, py::tuple types, py::object current_device)
    : exchange_(static_cast<const dlpack::Exchange*>(
          PyCapsule_GetPointer(exchange.ptr(), dlpack::capsule_name))),
      types_(std::move(types)),
      current_device_(std::move(current_device)) {
    if (exchange_ == nullptr) throw py::error_already_set();
    if (exchange_->major != dlpack::major_version || exchange_->tensor_from_py_object == nullptr) {
        throw std::invalid_argument("exchange is of DLPack " + std::to_string(exchange_->major) +
                                    ", expected version 1 with all its calls");
    }
}

bool ReadyCalls::Key::operator==(const Key& other) const {
    if (count != other.count || state_hash != other.state_hash ||
        !std::equal(facts.begin(), facts.begin() + static_cast<std::ptrdiff_t>(count),
                    other.facts.begin()) ||
        !same_types(state.ptr(), other.state.ptr())) {
        return false;
    }
    const int equal = PyObject_RichCompareBool(state.ptr(), other.state.ptr(), Py_EQ);
    return equal == 1 || (equal < 0 && no());
}

std::size_t ReadyCalls::Hash::operator()(const Key& key) const noexcept {
    std::uint64_t hash = static_cast<std::uint64_t>(key.state_hash);
    for (std::size_t i = 0; i < key.count; ++i) {
        hash = (hash ^ static_cast<std::uint64_t>(key.facts[i])) * 1099511628211ULL;
        hash ^= hash >> 29;
    }
    return static_cast<std::size_t>(hash);
}

dlpack::Tensor ReadyCalls::read(const py::object& tensor) const {
    dlpack::Tensor found{};
    if (exchange_->tensor_from_py_object(tensor.ptr(), &found) != 0) {
        throw py::error_already_set();
    }
    return found;
}

bool ReadyCalls::add_facts(const py::object& object, Key* key) const {
    const auto type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
    PyObject** const begin = PySequence_Fast_ITEMS(types_.ptr());
    PyObject** const end = begin + PyTuple_GET_SIZE(types_.ptr());
    if (std::find(begin, end, type) == end) return false;
    dlpack::Tensor tensor{};
    if (exchange_->tensor_from_py_object(object.ptr(), &tensor) != 0) return no();
    const auto dims = static_cast<std::size_t>(tensor.ndim);
    // A null address is of a tensor without memory, such as one of zeros. A negative view shares
    // all that is read here with what it is the negative of; PyTorch makes them of imaginary parts,
    // which are never aligned, and to ask each tensor would give the GIL to other threads.
    if (tensor.device_type != dlpack::cuda || tensor.strides == nullptr || tensor.data == nullptr ||
        reinterpret_cast<std::uintptr_t>(address(tensor)) % alignment != 0 || dims > 4 ||
        key->count + 2 * dims + 2 > most_facts) {
        return false;
    }
    const auto add = [key](std::int64_t fact) { key->facts[key->count++] = fact; };
    add(tensor.ndim | tensor.device_id << 8);
    add(tensor.type_code | tensor.type_bits << 8);
    for (std::size_t i = 0; i < dims; ++i) {
        add(tensor.shape[i]);
        add(tensor.strides[i]);
    }
    return true;
}

bool ReadyCalls::make_key(const py::object& a, const py::object& b, const py::object& bias,
                          const py::tuple& state, Key* key) const {
    const std::hash<std::thread::id> thread;
    key->facts[key->count++] = static_cast<std::int64_t>(thread(std::this_thread::get_id()));
    if (!is_plain(state.ptr())) return false;
    key->state_hash = PyObject_Hash(state.ptr());
    if (key->state_hash == -1) return no();
    key->state = state;
    return add_facts(a, key) && add_facts(b, key) && (bias.is_none() || add_facts(bias, key));
}

const ReadyCalls::Entry* ReadyCalls::look_up(const py::object& a, const py::object& b,
                                             const py::object& bias, const py::tuple& state) {
    Key key;
    if (!make_key(a, b, bias, state, &key)) return nullptr;
    const auto found = entries_.find(key);
    if (found == entries_.end()) return nullptr;
    ++hits_;
    return &found->second;
}

py::object ReadyCalls::find(const py::object& a, const py::object& b, const py::object& bias,
                            const py::tuple& state) {
    const Entry* const entry = look_up(a, b, bias, state);
    return entry == nullptr ? py::none() : entry->object;
}

py::object ReadyCalls::run(const py::object& a, const py::object& b, const py::object& bias,
                           const py::tuple& state) {
    const Entry* const entry = look_up(a, b, bias, state);
    if (entry == nullptr) return py::none();
    const Entry kept = *entry;  // the table's own may go while it runs
    return execute(*kept.call, a, b, bias);
}

py::object ReadyCalls::execute(const ReadyCall& call, const py::object& a, const py::object& b,
                               const py::object& bias) {
    try {
        const dlpack::Tensor from = read(a);
        void* stream = nullptr;
        if (current_device_().cast<std::int32_t>() != from.device_id) return py::none();
        if (exchange_->current_work_stream(dlpack::cuda, from.device_id, &stream) != 0) {
            throw py::error_already_set();
        }
        py::object out = call.make_out();
        const py::object workspace =
            call.make_workspace.is_none() ? py::none() : call.make_workspace();
        void* const scratch = workspace.is_none() ? nullptr : storage_address(workspace);
        Pointers pointers =
            in_slots(call.direction, address(from), address(read(b)), address(read(out)));
        const py::object entered = call.enter_bias.is_none() ? bias : call.enter_bias(bias);
        if (call.plan_reads_bias) pointers.bias = address(read(entered));
        if (!call.is_capturing.is_none() && call.is_capturing().cast<bool>()) {
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
    } catch (const CudnnError&) {
    }
    clear();  // Python runs it again, and tells what is wrong
    return py::none();
}

void ReadyCalls::put(const py::object& a, const py::object& b, const py::object& bias,
                     const py::tuple& state, const py::object& call) {
    if (!py::isinstance<ReadyCall>(call)) throw py::type_error("call is not a ReadyCall");
    Key key;
    if (!make_key(a, b, bias, state, &key)) return;
    Entry& entry = entries_[std::move(key)];
    // Destroyed at the end, as what goes may call back.
    const Entry old = std::exchange(entry, Entry{call, &call.cast<const ReadyCall&>()});
}

void ReadyCalls::clear() {
    // Destroyed at the end, as what goes may call back.
    decltype(entries_) entries;
    entries.swap(entries_);
}

}  // namespace dgrad
