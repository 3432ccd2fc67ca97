#include "graph/plan.hpp"

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <utility>

#include "error.hpp"
#include "graph/engines.hpp"
#include "handle.hpp"

namespace dgrad::graph {
namespace {

constexpr std::size_t max_uids = 4;
constexpr std::size_t kept_packs = 8;  // of a plan

// What a plan is made of again: cuDNN's text, and what that does not tell.
struct Compiled {
    std::vector<std::int64_t> uids;
    std::vector<std::string> notes;
    std::string text;
};

// A line of the uids and the notes, then cuDNN's text. No streams: libraries that bring a C++
// library of their own, as cuDNN's do, make those of others crash.
std::string to_text(const Compiled& compiled) {
    std::string line;
    for (const std::int64_t uid : compiled.uids) line += std::to_string(uid) + ' ';
    for (const std::string& note : compiled.notes) line += note + ' ';
    return line + '\n' + compiled.text;
}

Compiled parse(const std::string& text) {
    Compiled compiled;
    const std::size_t end = std::min(text.find('\n'), text.size());
    for (std::size_t from = 0; from < end;) {
        const std::size_t to = std::min(text.find(' ', from), end);
        const std::string word = text.substr(from, to - from);
        const auto uid = std::find_if(all_uids.begin(), all_uids.end(), [&](Uid each) {
            return word == std::to_string(static_cast<std::int64_t>(each));
        });
        if (uid != all_uids.end()) {
            compiled.uids.push_back(static_cast<std::int64_t>(*uid));
        } else {
            compiled.notes.push_back(word);
        }
        from = to + 1;
    }
    const bool named =
        std::none_of(compiled.notes.begin(), compiled.notes.end(),
                     [](const auto& note) { return note.find_first_of("0123456789") == 0; });
    if (end == text.size() || !named || compiled.uids.empty() || compiled.uids.size() > max_uids) {
        throw std::invalid_argument("compiled is not what Plan.compiled gave");
    }
    compiled.text = text.substr(end + 1);
    return compiled;
}

class GraphPlan final : public Plan {
  public:
    GraphPlan(const Problem& problem, Operation operation, const std::string& engine)
        : GraphPlan(problem.device) {
        const OperationGraph graph = make_operation_graph(problem, operation);
        const Descriptor config = engine_config(graph, engine);
        for (const Uid uid : graph.uids) uids_.push_back(static_cast<std::int64_t>(uid));
        notes_ = numerical_notes(config);
        compiles_ = compiles_at_run_time(config);
        plan_.set(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, config);
        finalize();
    }

    GraphPlan(std::int64_t device, Compiled compiled) : GraphPlan(device) {
        uids_ = std::move(compiled.uids);
        notes_ = std::move(compiled.notes);
        compiles_ = true;
        // cuDNN reads the text when it finalizes.
        plan_.set(CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION, compiled.text);
        finalize();
    }

    [[nodiscard]] std::size_t workspace_bytes() const noexcept override { return workspace_bytes_; }
    [[nodiscard]] std::vector<std::string> notes() const override { return notes_; }

    [[nodiscard]] std::vector<std::string> compiled() const override {
        if (!compiles_) return std::vector<std::string>(1);
        return {
            to_text({uids_, notes_, plan_.text(CUDNN_ATTR_EXECUTION_PLAN_JSON_REPRESENTATION)})};
    }

    [[nodiscard]] bool compiles() const noexcept override { return compiles_; }

    void execute(const Pointers& pointers, void* workspace, cudaStream_t stream) override {
        cudnnHandle_t handle = handle_for(device_);
        DGRAD_CUDNN_CHECK(cudnnSetStream(handle, stream));
        Addresses addresses{};
        for (std::size_t i = 0; i < uids_.size(); ++i) {
            addresses[i] = address(static_cast<Uid>(uids_[i]), pointers);
        }
        addresses.back() = workspace;
        DGRAD_CUDNN_CHECK(cudnnBackendExecute(handle, plan_.get(), pack(addresses).get()));
    }

  private:
    explicit GraphPlan(std::int64_t device)
        : device_(device), plan_(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR) {
        forget_last_error();
        plan_.set(CUDNN_ATTR_EXECUTION_PLAN_HANDLE, handle_for(device_));
    }

    void finalize() {
        plan_.finalize();
        workspace_bytes_ = static_cast<std::size_t>(
            plan_.value<std::int64_t>(CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE));
    }

    // uids_'s pointers in their order, the workspace last.
    using Addresses = std::array<void*, max_uids + 1>;

    // A finalized pack cannot be changed. An allocator that caches gives the same few addresses
    // again and again, as in the steps of a training, so the last packs are kept.
    const Descriptor& pack(const Addresses& addresses) {
        const auto known = std::find_if(packs_.begin(), packs_.end(), [&](const auto& each) {
            return each && each->first == addresses;
        });
        if (known != packs_.end()) return (*known)->second;
        Descriptor made(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);
        made.set(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, uids_);
        made.set_raw(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR,
                     static_cast<std::int64_t>(uids_.size()), addresses.data());
        made.set_raw(CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &addresses.back());
        made.finalize();
        return packs_[next_pack_++ % packs_.size()].emplace(addresses, std::move(made)).second;
    }

    static void* address(Uid uid, const Pointers& pointers) {
        switch (uid) {
            case Uid::w:
                return pointers.w;
            case Uid::y:
                return pointers.y;
            case Uid::bias:
                return pointers.bias;
            case Uid::x:
            case Uid::sum:  // in place
                break;
        }
        return pointers.x;
    }

    std::int64_t device_;
    Descriptor plan_;
    std::array<std::optional<std::pair<Addresses, Descriptor>>, kept_packs> packs_;
    std::size_t next_pack_ = 0;
    std::vector<std::int64_t> uids_;
    std::vector<std::string> notes_;
    bool compiles_ = false;
    std::size_t workspace_bytes_ = 0;
};

}  // namespace

std::unique_ptr<Plan> make_plan(const Problem& problem, Operation operation,
                                const std::string& engine) {
    return std::make_unique<GraphPlan>(problem, operation, engine);
}

std::unique_ptr<Plan> restore_plan(std::int64_t device, const std::string& compiled) {
    return std::make_unique<GraphPlan>(device, parse(compiled));
}

}  // namespace dgrad::graph
