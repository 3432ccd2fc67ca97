#include "ready.hpp"

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <thread>
#include <utility>

namespace py = pybind11;

namespace dgrad {
namespace {

constexpr std::uintptr_t alignment = 16;

void* address(const dlpack::Tensor& tensor) {
    return static_cast<char*>(tensor.data) + tensor.byte_offset;
}

// Clears a Python error that a failed look left behind.
bool no() {
    PyErr_Clear();
    return false;
}

void* storage_address(const py::object& storage) {
    return PyLong_AsVoidPtr(storage.attr("data_ptr")().ptr());
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
                    other.facts.begin())) {
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

bool ReadyCalls::read(const py::object& object, dlpack::Tensor* tensor, Key* key) const {
    const auto type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
    const auto begin = PySequence_Fast_ITEMS(types_.ptr());
    if (std::find(begin, begin + PyTuple_GET_SIZE(types_.ptr()), type) ==
        begin + PyTuple_GET_SIZE(types_.ptr())) {
        return false;
    }
    if (exchange_->tensor_from_py_object(object.ptr(), tensor) != 0) return no();
    // A negative view shares all that is read here with what it is the negative of.
    if (!object.attr("is_neg")().is(py::bool_(false))) return false;
    const auto dims = static_cast<std::size_t>(tensor->ndim);
    if (tensor->device_type != dlpack::cuda || tensor->strides == nullptr || dims > 4 ||
        key->count + 2 * dims + 2 > most_facts) {
        return false;
    }
    const auto add = [key](std::int64_t fact) { key->facts[key->count++] = fact; };
    add(tensor->ndim | tensor->device_id << 8);
    add(tensor->type_code | tensor->type_bits << 8 |
        (reinterpret_cast<std::uintptr_t>(address(*tensor)) % alignment == 0) << 16);
    for (std::size_t i = 0; i < dims; ++i) {
        add(tensor->shape[i]);
        add(tensor->strides[i]);
    }
    return true;
}

bool ReadyCalls::read_all(const py::object& y, const py::object& w, const py::object& bias,
                          Tensors* tensors, Key* key) const {
    const std::hash<std::thread::id> thread;
    key->facts[key->count++] = static_cast<std::int64_t>(thread(std::this_thread::get_id()));
    return read(y, &tensors->y, key) && read(w, &tensors->w, key) &&
           (bias.is_none() || read(bias, &tensors->bias, key));
}

py::object ReadyCalls::run(const py::object& y, const py::object& w, const py::object& bias,
                           const py::tuple& state) {
    Tensors tensors{};
    Key key;
    key.state_hash = PyObject_Hash(state.ptr());
    if (key.state_hash == -1 || !read_all(y, w, bias, &tensors, &key)) {
        no();
        return py::none();
    }
    key.state = state;
    const auto found = entries_.find(key);
    if (found == entries_.end()) return py::none();
    const std::shared_ptr<ReadyCall> call = found->second.call;  // the entry may go while it runs
    const std::int32_t device = tensors.y.device_id;
    void* stream = nullptr;
    if (current_device_().cast<std::int32_t>() != device ||
        exchange_->current_work_stream(dlpack::cuda, device, &stream) != 0) {
        no();
        return py::none();
    }
    py::object out;
    try {
        out = call->make_out();
        dlpack::Tensor result{};
        if (exchange_->tensor_from_py_object(out.ptr(), &result) != 0) {
            throw py::error_already_set();
        }
        const py::object workspace =
            call->make_workspace.is_none() ? py::none() : call->make_workspace();
        void* const scratch = workspace.is_none() ? nullptr : storage_address(workspace);
        py::object entered = bias;
        Pointers pointers{address(result), address(tensors.w), address(tensors.y), nullptr};
        if (call->plan_reads_bias) {
            pointers.bias = address(tensors.bias);
            if (!call->enter_bias.is_none()) {
                entered = call->enter_bias(bias);
                dlpack::Tensor rows{};
                if (exchange_->tensor_from_py_object(entered.ptr(), &rows) != 0) {
                    throw py::error_already_set();
                }
                pointers.bias = address(rows);
            }
        }
        {
            const py::gil_scoped_release released;
            call->plan->execute(pointers, scratch, static_cast<cudaStream_t>(stream));
        }
        if (!call->add_bias.is_none()) call->add_bias(out, bias);
    } catch (const std::exception&) {  // Python runs it again, and tells what is wrong
        entries_.erase(key);
        return py::none();
    }
    ++call->uses->count;
    ++hits_;
    return out;
}

void ReadyCalls::put(const py::object& y, const py::object& w, const py::object& bias,
                     const py::tuple& state, std::shared_ptr<ReadyCall> call, py::object kept) {
    Tensors tensors{};
    Key key;
    key.state_hash = PyObject_Hash(state.ptr());
    if (key.state_hash == -1 || !read_all(y, w, bias, &tensors, &key)) {
        no();
        return;
    }
    key.state = state;
    entries_.insert_or_assign(std::move(key), Entry{std::move(call), std::move(kept)});
}

void ReadyCalls::clear() {
    hits_ = 0;
    // Destroyed at the end, as what goes may call back.
    std::unordered_map<Key, Entry, Hash> entries;
    entries.swap(entries_);
}

}  // namespace dgrad
