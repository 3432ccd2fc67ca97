// The algorithms and math types of the legacy API, by name, and cuDNN's order of them.
#pragma once

#include <cudnn.h>

#include <cstddef>
#include <string>
#include <vector>

#include "problem.hpp"

namespace dgrad::legacy {

// One line of cuDNN's heuristic answer.
struct HeuristicResult {
    std::string algorithm;
    std::string math_type;
    bool deterministic;
    std::size_t workspace_bytes;  // an estimate: a plan knows the true number
    std::string rejected;         // cuDNN's status where it says the algorithm cannot run, else ""
};

// All names there are for a direction, in the order of cuDNN's enum.
std::vector<std::string> algorithm_names(Direction direction);

// cudnnGetConvolution...Algorithm_v7: best first, by cuDNN's heuristic. Needs the device.
std::vector<HeuristicResult> heuristic(const Problem& problem);

const char* math_type_name(cudnnMathType_t math_type) noexcept;
cudnnMathType_t parse_math_type(const std::string& text);

// The enum's value for a name; throws std::invalid_argument with the names there are.
int parse_algorithm(Direction direction, const std::string& text);

}  // namespace dgrad::legacy
