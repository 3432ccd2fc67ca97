#include "legacy/algorithms.hpp"

#include <algorithm>
#include <array>

#include "handle.hpp"
#include "legacy/api.hpp"
#include "names.hpp"

namespace dgrad::legacy {
namespace {

constexpr std::array<const char*, 4> math_type_names{"DEFAULT_MATH", "TENSOR_OP_MATH",
                                                     "TENSOR_OP_MATH_ALLOW_CONVERSION", "FMA_MATH"};

}  // namespace

std::vector<std::string> algorithm_names(Direction direction) {
    return with_api(direction, [](auto api) {
        return std::vector<std::string>(api.names.begin(), api.names.end());
    });
}

int parse_algorithm(Direction direction, const std::string& text) {
    return static_cast<int>(index_of("algorithm", algorithm_names(direction), text));
}

const char* math_type_name(cudnnMathType_t math_type) noexcept {
    const auto index = static_cast<std::size_t>(math_type);
    return index < math_type_names.size() ? math_type_names[index] : "UNKNOWN_MATH";
}

cudnnMathType_t parse_math_type(const std::string& text) {
    return static_cast<cudnnMathType_t>(index_of("math_type", math_type_names, text));
}

std::vector<HeuristicResult> heuristic(const Problem& problem) {
    problem.check();
    return with_api(problem.direction, [&problem](auto api) {
        const Descriptors descriptors(problem, widest_math_type(problem));
        // An algorithm can be listed once for each math type.
        std::array<typename decltype(api)::Performance, api.names.size() * math_type_names.size()>
            results{};
        int count = 0;
        api.heuristic(handle_for(problem.device), descriptors, static_cast<int>(results.size()),
                      &count, results.data());
        std::vector<HeuristicResult> found;
        for (std::size_t i = 0; i < std::min(static_cast<std::size_t>(count), results.size());
             ++i) {
            const auto& result = results[i];
            const auto algorithm = static_cast<std::size_t>(result.algo);
            // Newer than the headers built against.
            if (algorithm >= api.names.size() ||
                static_cast<std::size_t>(result.mathType) >= math_type_names.size()) {
                continue;
            }
            const bool runs = result.status == CUDNN_STATUS_SUCCESS;
            found.push_back({api.names[algorithm], math_type_name(result.mathType),
                             result.determinism == CUDNN_DETERMINISTIC, runs ? result.memory : 0,
                             runs ? "" : status_name(result.status)});
        }
        return found;
    });
}

}  // namespace dgrad::legacy
