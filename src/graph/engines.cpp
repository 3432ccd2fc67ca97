#include "graph/engines.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "error.hpp"

namespace dgrad::graph {
namespace {

constexpr std::array<const char*, 10> note_names{"TENSOR_CORE",
                                                 "DOWN_CONVERT_INPUTS",
                                                 "REDUCED_PRECISION_REDUCTION",
                                                 "FFT",
                                                 "NONDETERMINISTIC",
                                                 "WINOGRAD",
                                                 "WINOGRAD_TILE_4x4",
                                                 "WINOGRAD_TILE_6x6",
                                                 "WINOGRAD_TILE_13x13",
                                                 "STRICT_NAN_PROP"};
constexpr std::array<std::pair<cudnnBackendHeurMode_t, const char*>, 3> modes{
    {{CUDNN_HEUR_MODE_A, "A"}, {CUDNN_HEUR_MODE_B, "B"}, {CUDNN_HEUR_MODE_FALLBACK, "fallback"}}};
constexpr std::size_t most_notes = 64;
constexpr std::int64_t most_knobs = 64;

using Knob = std::pair<std::int64_t, std::int64_t>;  // type and value

struct Identity {
    std::int64_t engine = 0;
    std::vector<Knob> knobs;  // in order of type
};

std::string to_text(const Identity& identity) {
    std::string text = "eng" + std::to_string(identity.engine);
    for (const auto& [type, value] : identity.knobs) {
        text += "_k" + std::to_string(type) + "=" + std::to_string(value);
    }
    return text;
}

[[noreturn]] void refuse(const std::string& name) {
    throw std::invalid_argument("engine is '" + name +
                                "', expected a name such as 'eng5_k2=3_k24=0'");
}

// Takes `prefix` and a number off the front of `text`.
std::int64_t take(std::string_view& text, std::string_view prefix, const std::string& name) {
    std::int64_t value = 0;
    const bool begins = text.substr(0, prefix.size()) == prefix;
    if (begins) text.remove_prefix(prefix.size());
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (!begins || error != std::errc{}) refuse(name);
    text.remove_prefix(static_cast<std::size_t>(end - text.data()));
    return value;
}

Identity parse(const std::string& name) {
    std::string_view text = name;
    Identity identity;
    identity.engine = take(text, "eng", name);
    while (!text.empty()) {
        const std::int64_t type = take(text, "_k", name);
        if (type > std::numeric_limits<std::int32_t>::max()) refuse(name);
        identity.knobs.emplace_back(type, take(text, "=", name));
    }
    const auto not_before = [](const Knob& left, const Knob& right) {
        return left.first >= right.first;
    };
    const auto& knobs = identity.knobs;
    // One engine has one name.
    if (std::adjacent_find(knobs.begin(), knobs.end(), not_before) != knobs.end() ||
        to_text(identity) != name) {
        refuse(name);
    }
    return identity;
}

Descriptor engine_of(const Descriptor& config) {
    std::vector<Descriptor> engines =
        config.descriptors(CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_BACKEND_ENGINE_DESCRIPTOR, 1);
    if (engines.size() != 1)
        throw std::invalid_argument("cuDNN names no engine in a configuration");
    return std::move(engines.front());
}

Identity identity_of(const Descriptor& config) {
    Identity identity;
    identity.engine = engine_of(config).value<std::int64_t>(CUDNN_ATTR_ENGINE_GLOBAL_INDEX);
    for (const Descriptor& choice : config.descriptors(
             CUDNN_ATTR_ENGINECFG_KNOB_CHOICES, CUDNN_BACKEND_KNOB_CHOICE_DESCRIPTOR, most_knobs)) {
        const auto type = choice.value<cudnnBackendKnobType_t>(CUDNN_ATTR_KNOB_CHOICE_KNOB_TYPE);
        identity.knobs.emplace_back(static_cast<std::int64_t>(type),
                                    choice.value<std::int64_t>(CUDNN_ATTR_KNOB_CHOICE_KNOB_VALUE));
    }
    std::sort(identity.knobs.begin(), identity.knobs.end());
    return identity;
}

std::vector<Descriptor> configs(const OperationGraph& graph, cudnnBackendHeurMode_t mode) {
    Descriptor heuristic(CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
    heuristic.set(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph.graph);
    heuristic.set(CUDNN_ATTR_ENGINEHEUR_MODE, mode);
    heuristic.finalize();
    return heuristic.descriptors(CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR,
                                 heuristic.count(CUDNN_ATTR_ENGINEHEUR_RESULTS));
}

}  // namespace

Heuristic heuristic(const Problem& problem, Operation operation) {
    const OperationGraph graph = make_operation_graph(problem, operation);
    Heuristic found;
    std::vector<Engine>& engines = found.engines;
    std::optional<CudnnError> first;
    for (const auto& [mode, mode_name] : modes) {
        try {
            for (const Descriptor& config : configs(graph, mode)) {
                std::string name = to_text(identity_of(config));
                const bool known =
                    std::any_of(engines.begin(), engines.end(),
                                [&](const Engine& each) { return each.name == name; });
                if (!known) engines.push_back({std::move(name), numerical_notes(config)});
            }
        } catch (const CudnnError& error) {  // another mode may have an answer
            if (!first) first.emplace(error);
            found.refused.push_back(std::string("heuristic mode ") + mode_name + ": " +
                                    error.what());
        }
    }
    if (engines.empty() && first) throw CudnnError(*first);
    return found;
}

Descriptor engine_config(const OperationGraph& graph, const std::string& name) {
    const Identity identity = parse(name);
    Descriptor engine(CUDNN_BACKEND_ENGINE_DESCRIPTOR);
    engine.set(CUDNN_ATTR_ENGINE_OPERATION_GRAPH, graph.graph);
    engine.set(CUDNN_ATTR_ENGINE_GLOBAL_INDEX, identity.engine);
    engine.finalize();
    std::vector<Descriptor> choices;
    for (const auto& [type, value] : identity.knobs) {
        Descriptor& choice = choices.emplace_back(CUDNN_BACKEND_KNOB_CHOICE_DESCRIPTOR);
        choice.set(CUDNN_ATTR_KNOB_CHOICE_KNOB_TYPE, static_cast<cudnnBackendKnobType_t>(type));
        choice.set(CUDNN_ATTR_KNOB_CHOICE_KNOB_VALUE, value);
        choice.finalize();
    }
    Descriptor config(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
    config.set(CUDNN_ATTR_ENGINECFG_ENGINE, engine);
    if (!choices.empty()) {
        std::vector<const Descriptor*> pointers;
        for (const Descriptor& choice : choices) pointers.push_back(&choice);
        config.set(CUDNN_ATTR_ENGINECFG_KNOB_CHOICES, pointers);
    }
    config.finalize();
    return config;
}

std::vector<std::string> numerical_notes(const Descriptor& engine_config) {
    std::vector<std::string> names;
    for (const auto note :
         engine_of(engine_config)
             .values<cudnnBackendNumericalNote_t>(CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, most_notes)) {
        const auto index = static_cast<std::size_t>(note);
        // A note newer than the headers built against is shown, never dropped.
        names.push_back(index < note_names.size() ? note_names[index]
                                                  : "NOTE_" + std::to_string(index));
    }
    return names;
}

bool compiles_at_run_time(const Descriptor& engine_config) {
    const auto notes =
        engine_of(engine_config)
            .values<cudnnBackendBehaviorNote_t>(CUDNN_ATTR_ENGINE_BEHAVIOR_NOTE, most_notes);
    return std::find(notes.begin(), notes.end(), CUDNN_BEHAVIOR_NOTE_RUNTIME_COMPILATION) !=
           notes.end();
}

}  // namespace dgrad::graph
