// The plan of one engine of cuDNN's backend API, and of two plans in a row.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "../plan.hpp"
#include "graph/operation_graph.hpp"
#include "problem.hpp"

namespace dgrad::graph {

// Needs the device. Throws CudnnError where cuDNN does not support the engine here,
// std::invalid_argument where `engine` is no name of one.
std::unique_ptr<Plan> make_plan(const Problem& problem, Operation operation,
                                const std::string& engine);

// The plan that `compiled` is a part of Plan::compiled() of, on a GPU of the same kind and with the
// same cuDNN, which trusts the GPU's code in it. Throws as make_plan.
std::unique_ptr<Plan> restore_plan(std::int64_t device, const std::string& compiled);

}  // namespace dgrad::graph
