// The engines that cuDNN has for a graph, by name, in the order of its heuristics.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "graph/backend.hpp"
#include "graph/operation_graph.hpp"

namespace dgrad::graph {

// One engine with its knobs set. The name is the whole identity: "eng5_k2=3_k24=0" is engine 5
// with knob type 2 at 3 and knob type 24 at 0, as cuDNN numbers them.
struct Engine {
    std::string name;
    std::vector<std::string> notes;  // cuDNN's numerical notes, such as "TENSOR_CORE"
};

struct Heuristic {
    std::vector<Engine> engines;       // best first, each once
    std::vector<std::string> refused;  // the modes that failed while another answered, and why
};

// What cuDNN's heuristic modes A, B and fallback name; CudnnError where all fail. Needs the device.
Heuristic heuristic(const Problem& problem, Operation operation);

// The finalized configuration of a named engine; std::invalid_argument for what is no name,
// CudnnError where cuDNN has no such engine for the graph.
Descriptor engine_config(const OperationGraph& graph, const std::string& name);

std::vector<std::string> numerical_notes(const Descriptor& engine_config);

// Whether cuDNN compiles the engine's kernel when a plan of it is made.
bool compiles_at_run_time(const Descriptor& engine_config);

}  // namespace dgrad::graph
