// What is computed, as cuDNN's backend API takes it: tensors, operations, the graph of them.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "graph/backend.hpp"
#include "problem.hpp"

namespace dgrad::graph {

// convolution:           the problem's direction, without a bias
// convolution_identity:  the same for engines that cuDNN compiles at run time: they take a
//                        convolution only with an operation after it, here one that does nothing
// convolution_bias:      dgrad and the bias, by one such engine
// bias:                  x = x + bias in place, of a finished dgrad
// bias_rows:             the same for nchw memory. Engines for such graphs want the channels last
//                        and broadcast the bias over all else, so each channel of each image is a
//                        row of its own, and the bias has N * C values: itself, N times
enum class Operation { convolution, convolution_identity, convolution_bias, bias, bias_rows };

Operation parse_operation(const std::string& text);

// The tensors by the names that a variant pack gives pointers to.
enum class Uid : std::int64_t { x = 'x', w = 'w', y = 'y', bias = 'b', sum = 's' };
inline constexpr std::array<Uid, 5> all_uids{Uid::x, Uid::w, Uid::y, Uid::bias, Uid::sum};

// The graph, and whatever must live as long.
struct OperationGraph {
    std::vector<Descriptor> parts;
    Descriptor graph;
    std::vector<Uid> uids;
};

// Needs the device. Throws CudnnError where cuDNN takes no such graph.
OperationGraph make_operation_graph(const Problem& problem, Operation operation);

}  // namespace dgrad::graph
