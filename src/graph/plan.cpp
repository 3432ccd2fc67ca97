#include "graph/plan.hpp"

#include <array>
#include <optional>
#include <utility>

#include "error.hpp"
#include "graph/engines.hpp"
#include "handle.hpp"

namespace dgrad::graph {
namespace {

class GraphPlan final : public Plan {
  public:
    GraphPlan(const Problem& problem, Operation operation, const std::string& engine)
        : device_(problem.device), plan_(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR) {
        const OperationGraph graph = make_operation_graph(problem, operation);
        const Descriptor config = engine_config(graph, engine);
        notes_ = numerical_notes(config);
        plan_.set(CUDNN_ATTR_EXECUTION_PLAN_HANDLE, handle_for(device_));
        plan_.set(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, config);
        plan_.finalize();
        workspace_bytes_ = static_cast<std::size_t>(
            plan_.value<std::int64_t>(CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE));
        for (const Uid uid : graph.uids) uids_.push_back(static_cast<std::int64_t>(uid));
    }

    [[nodiscard]] std::size_t workspace_bytes() const noexcept override { return workspace_bytes_; }
    [[nodiscard]] std::vector<std::string> notes() const override { return notes_; }

    void execute(const Pointers& pointers, void* workspace, cudaStream_t stream) override {
        cudnnHandle_t handle = handle_for(device_);
        DGRAD_CUDNN_CHECK(cudnnSetStream(handle, stream));
        Addresses addresses{};
        for (std::size_t i = 0; i < uids_.size(); ++i) {
            addresses[i] = address(static_cast<Uid>(uids_[i]), pointers);
        }
        addresses.back() = workspace;
        if (!pack_ || addresses != packed_) pack(addresses);
        DGRAD_CUDNN_CHECK(cudnnBackendExecute(handle, plan_.get(), pack_->get()));
    }

  private:
    // uids_'s pointers in their order, the workspace last.
    using Addresses = std::array<void*, 5>;

    // A finalized pack cannot be changed. An allocator that caches often gives the same addresses
    // again, so the last pack is kept.
    void pack(const Addresses& addresses) {
        pack_.reset();
        Descriptor made(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);
        made.set(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, uids_);
        made.set_raw(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR,
                     static_cast<std::int64_t>(uids_.size()), addresses.data());
        made.set_raw(CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &addresses.back());
        made.finalize();
        pack_.emplace(std::move(made));
        packed_ = addresses;
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
    std::optional<Descriptor> pack_;
    Addresses packed_{};
    std::vector<std::int64_t> uids_;
    std::vector<std::string> notes_;
    std::size_t workspace_bytes_ = 0;
};

}  // namespace

std::unique_ptr<Plan> make_plan(const Problem& problem, Operation operation,
                                const std::string& engine) {
    return std::make_unique<GraphPlan>(problem, operation, engine);
}

}  // namespace dgrad::graph
