// The plan of one engine of cuDNN's backend API, and of two plans in a row.
#pragma once

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

}  // namespace dgrad::graph
