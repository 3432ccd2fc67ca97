// The plan of one legacy algorithm.
#pragma once

#include <memory>
#include <string>

#include "../plan.hpp"
#include "problem.hpp"

namespace dgrad::legacy {

// Needs the device. Throws CudnnError where cuDNN does not support the algorithm here.
std::unique_ptr<Plan> make_plan(const Problem& problem, const std::string& algorithm,
                                const std::string& math_type);

}  // namespace dgrad::legacy
