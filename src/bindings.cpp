// The Python module dgrad._core: names and conversions only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "error.hpp"
#include "graph/engines.hpp"
#include "graph/operation_graph.hpp"
#include "graph/plan.hpp"
#include "legacy/algorithms.hpp"
#include "legacy/descriptors.hpp"
#include "legacy/plan.hpp"
#include "plan.hpp"
#include "problem.hpp"
#include "python.hpp"
#include "ready.hpp"
#include "sequence.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace {

void* pointer(std::uintptr_t address) {
    return reinterpret_cast<void*>(address);  // NOLINT(performance-no-int-to-ptr)
}

py::object decoded(const std::string& text) {
    return py::reinterpret_steal<py::object>(
        PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "replace"));
}

// dgrad.exceptions maps a status to its class: the classes exist without this module too.
void translate_cudnn_error(std::exception_ptr error) {
    try {
        if (error) std::rethrow_exception(error);
    } catch (const dgrad::CudnnError& failure) {
        const py::object instance =
            py::module_::import("dgrad.exceptions")
                .attr("cudnn_error")(failure.status(), decoded(failure.what()), failure.call(),
                                     decoded(failure.detail()));
        PyErr_SetObject(py::type::handle_of(instance).ptr(), instance.ptr());
    }
}

void bind_problem(py::module_& m) {
    using dgrad::Problem;
    py::class_<Problem>(m, "Problem")
        .def(py::init([](const std::string& direction, const std::string& dtype, bool tf32,
                         const std::string& layout, dgrad::Size4 x, dgrad::Size4 w, dgrad::Size4 y,
                         dgrad::Size2 padding, dgrad::Size2 stride, dgrad::Size2 dilation,
                         std::int64_t groups, bool bias, std::int64_t alignment,
                         std::int64_t device) {
                 const Problem problem{dgrad::parse_direction(direction),
                                       dgrad::parse_data_type(dtype),
                                       tf32,
                                       dgrad::parse_layout(layout),
                                       x,
                                       w,
                                       y,
                                       padding,
                                       stride,
                                       dilation,
                                       groups,
                                       bias,
                                       alignment,
                                       device};
                 problem.check();
                 return problem;
             }),
             py::kw_only(), "direction"_a, "dtype"_a, "tf32"_a, "layout"_a, "x"_a, "w"_a, "y"_a,
             "padding"_a, "stride"_a, "dilation"_a, "groups"_a, "bias"_a, "alignment"_a, "device"_a)
        .def_property_readonly("direction",
                               [](const Problem& p) { return dgrad::name(p.direction); })
        .def_property_readonly("dtype", [](const Problem& p) { return dgrad::name(p.dtype); })
        .def_readonly("tf32", &Problem::tf32)
        .def_property_readonly("layout", [](const Problem& p) { return dgrad::name(p.layout); })
        .def_readonly("x", &Problem::x)
        .def_readonly("w", &Problem::w)
        .def_readonly("y", &Problem::y)
        .def_readonly("padding", &Problem::padding)
        .def_readonly("stride", &Problem::stride)
        .def_readonly("dilation", &Problem::dilation)
        .def_readonly("groups", &Problem::groups)
        .def_readonly("bias", &Problem::bias)
        .def_readonly("alignment", &Problem::alignment)
        .def_readonly("device", &Problem::device)
        .def(
            "__eq__", [](const Problem& self, const Problem& other) { return self == other; },
            py::is_operator())
        .def("__hash__", &Problem::hash)
        .def("__str__", &Problem::text)
        .def("__repr__", [](const Problem& p) { return "<Problem " + p.text() + ">"; });
}

void bind_plan(py::module_& m) {
    py::class_<dgrad::Plan, std::shared_ptr<dgrad::Plan>>(m, "Plan")
        .def_property_readonly("workspace_bytes", &dgrad::Plan::workspace_bytes)
        .def_property_readonly("notes", &dgrad::Plan::notes)
        .def_property_readonly("compiled",
                               [](const dgrad::Plan& plan) {
                                   std::vector<std::string> texts;
                                   {
                                       const py::gil_scoped_release released;
                                       texts = plan.compiled();
                                   }
                                   return std::vector<py::bytes>(texts.begin(), texts.end());
                               })
        .def_property_readonly("compiles", &dgrad::Plan::compiles)
        .def(
            "execute",
            [](dgrad::Plan& plan, std::uintptr_t x, std::uintptr_t w, std::uintptr_t y,
               std::uintptr_t bias, std::uintptr_t workspace, std::uintptr_t stream) {
                const py::gil_scoped_release released;
                plan.execute({pointer(x), pointer(w), pointer(y), pointer(bias)},
                             pointer(workspace), static_cast<cudaStream_t>(pointer(stream)));
            },
            "x"_a, "w"_a, "y"_a, "bias"_a, "workspace"_a, "stream"_a);
    m.def(
        "sequence",
        [](std::shared_ptr<dgrad::Plan> first,
           std::shared_ptr<dgrad::Plan> second) -> std::shared_ptr<dgrad::Plan> {
            return std::make_shared<dgrad::Sequence>(std::move(first), std::move(second));
        },
        "first"_a.none(false), "second"_a.none(false));
    m.def("keep_for_graphs", &dgrad::keep_for_graphs, "plan"_a.none(false));
}

void bind_legacy(py::module_& m) {
    namespace legacy = dgrad::legacy;
    py::class_<legacy::HeuristicResult>(m, "HeuristicResult")
        .def_readonly("algorithm", &legacy::HeuristicResult::algorithm)
        .def_readonly("math_type", &legacy::HeuristicResult::math_type)
        .def_readonly("deterministic", &legacy::HeuristicResult::deterministic)
        .def_readonly("workspace_bytes", &legacy::HeuristicResult::workspace_bytes)
        .def_readonly("rejected", &legacy::HeuristicResult::rejected);
    m.def(
        "legacy_algorithms",
        [](const std::string& direction) {
            return legacy::algorithm_names(dgrad::parse_direction(direction));
        },
        "direction"_a);
    m.def("legacy_heuristic", &legacy::heuristic, "problem"_a,
          py::call_guard<py::gil_scoped_release>());
    m.def(
        "legacy_plan",
        [](const dgrad::Problem& problem, const std::string& algorithm,
           const std::string& math_type) -> std::shared_ptr<dgrad::Plan> {
            return legacy::make_plan(problem, algorithm, math_type);
        },
        "problem"_a, "algorithm"_a, "math_type"_a, py::call_guard<py::gil_scoped_release>());
    m.def("legacy_forward_output_size", &legacy::forward_output_size, "problem"_a);
}

void bind_graph(py::module_& m) {
    namespace graph = dgrad::graph;
    py::class_<graph::Engine>(m, "Engine")
        .def_readonly("name", &graph::Engine::name)
        .def_readonly("notes", &graph::Engine::notes);
    m.def(
        "graph_heuristic",
        [](const dgrad::Problem& problem, const std::string& operation) {
            auto found = graph::heuristic(problem, graph::parse_operation(operation));
            return std::pair(std::move(found.engines), std::move(found.refused));
        },
        "problem"_a, "operation"_a, py::call_guard<py::gil_scoped_release>());
    m.def(
        "graph_plan",
        [](const dgrad::Problem& problem, const std::string& operation,
           const std::string& engine) -> std::shared_ptr<dgrad::Plan> {
            return graph::make_plan(problem, graph::parse_operation(operation), engine);
        },
        "problem"_a, "operation"_a, "engine"_a, py::call_guard<py::gil_scoped_release>());
    m.def(
        "restored_plan",
        [](std::int64_t device, const py::bytes& compiled) -> std::shared_ptr<dgrad::Plan> {
            const std::string text = compiled;
            const py::gil_scoped_release released;
            return graph::restore_plan(device, text);
        },
        "device"_a, "compiled"_a);
}

using dgrad::FastArguments;

py::object call_ready(dgrad::ReadyCalls& self, FastArguments a) {
    return self.call(a[0], a[1], a[2], a[3], a[4]);
}

py::object execute_ready(dgrad::ReadyCalls& self, FastArguments a) {
    return self.execute(a[0].cast<const dgrad::ReadyCall&>(), a[1], a[2], a[3]);
}

py::object take_gradients(dgrad::ReadyCalls& self, FastArguments a) {
    return self.backward(a[0], a[1], a[2], a[3]);
}

void bind_ready(py::module_& m) {
    using dgrad::ReadyCall;
    using dgrad::ReadyCalls;
    using dgrad::ReadyGradients;
    py::class_<dgrad::UseCount, std::shared_ptr<dgrad::UseCount>>(m, "UseCount")
        .def(py::init<>())
        .def_readonly("count", &dgrad::UseCount::count);
    py::class_<ReadyGradients, std::shared_ptr<ReadyGradients>>(m, "ReadyGradients")
        .def(py::init([](const std::array<std::tuple<std::size_t, std::size_t, py::tuple>, 2>& of,
                         py::object flags, std::vector<std::int64_t> a_strides,
                         std::vector<std::int64_t> grad_strides, py::object sum_bias) {
                 const auto gradient = [](const auto& each) {
                     const auto& [first, second, state] = each;
                     if (std::max(first, second) > 2) throw py::value_error("no such place");
                     return ReadyGradients::Gradient{first, second, state};
                 };
                 return ReadyGradients{{gradient(of[0]), gradient(of[1])},
                                       std::move(flags),
                                       std::move(a_strides),
                                       std::move(grad_strides),
                                       std::move(sum_bias)};
             }),
             py::kw_only(), "of"_a, "flags"_a, "a_strides"_a, "grad_strides"_a, "sum_bias"_a);
    py::class_<ReadyCall>(m, "ReadyCall")
        .def(py::init([](std::shared_ptr<dgrad::Plan> plan, const std::string& direction,
                         py::object make_out, py::object make_workspace, py::object enter_bias,
                         py::object is_capturing, bool plan_reads_bias, bool pytorch_adds_bias,
                         bool python_captures, std::shared_ptr<dgrad::UseCount> uses,
                         py::object recipe, std::shared_ptr<ReadyGradients> gradients) {
                 return ReadyCall{std::move(plan),       dgrad::parse_direction(direction),
                                  std::move(make_out),   std::move(make_workspace),
                                  std::move(enter_bias), std::move(is_capturing),
                                  plan_reads_bias,       pytorch_adds_bias,
                                  python_captures,       std::move(uses),
                                  std::move(recipe),     std::move(gradients)};
             }),
             py::kw_only(), "plan"_a.none(false), "direction"_a, "make_out"_a, "make_workspace"_a,
             "enter_bias"_a, "is_capturing"_a, "plan_reads_bias"_a, "pytorch_adds_bias"_a,
             "python_captures"_a, "uses"_a.none(false), "recipe"_a, "gradients"_a)
        .def_readonly("recipe", &ReadyCall::recipe);
    py::class_<ReadyCalls> calls(m, "ReadyCalls");
    calls
        .def(py::init([](const py::capsule& exchange, py::tuple types, py::object current_device,
                         py::object flags, py::tuple switches, py::tuple guards,
                         py::object recording, py::object is_asked, py::tuple is_odd) {
                 return ReadyCalls(dgrad::TensorReader(exchange, std::move(types)),
                                   {std::move(current_device), std::move(flags),
                                    std::move(switches), std::move(guards), std::move(recording),
                                    std::move(is_asked), std::move(is_odd)});
             }),
             py::kw_only(), "exchange"_a, "types"_a, "current_device"_a, "flags"_a, "switches"_a,
             "guards"_a, "recording"_a, "is_asked"_a, "is_odd"_a)
        .def("run", &ReadyCalls::run, "a"_a, "b"_a, "bias"_a, "state"_a)
        .def("put", &ReadyCalls::put, "a"_a, "b"_a, "bias"_a, "state"_a, "call"_a)
        .def("clear", &ReadyCalls::clear)
        .def_property_readonly("size", &ReadyCalls::size)
        .def_property_readonly("hits", &ReadyCalls::hits);
    dgrad::define_fast<ReadyCalls, call_ready, 5>(calls, "call");
    dgrad::define_fast<ReadyCalls, execute_ready, 4>(calls, "execute");
    dgrad::define_fast<ReadyCalls, take_gradients, 4>(calls, "backward");
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    py::register_exception_translator(&translate_cudnn_error);
    m.attr("__version__") = DGRAD_VERSION;
    m.attr("compiled_cudnn_version") = CUDNN_VERSION;
    m.def("cudnn_version", [] { return cudnnGetVersion(); });
    m.def(
        "status_name",
        [](int status) { return dgrad::status_name(static_cast<cudnnStatus_t>(status)); },
        "status"_a);
    bind_problem(m);
    bind_plan(m);
    bind_legacy(m);
    bind_graph(m);
    bind_ready(m);
}
