#include "legacy/plan.hpp"

#include "handle.hpp"
#include "legacy/algorithms.hpp"
#include "legacy/api.hpp"

namespace dgrad::legacy {
namespace {

// cuDNN reads alpha and beta as double for float64 and as float for all other types.
constexpr float one_float = 1.0F;
constexpr float zero_float = 0.0F;
constexpr double one_double = 1.0;
constexpr double zero_double = 0.0;

template <typename LegacyApi>
class LegacyPlan final : public Plan {
  public:
    LegacyPlan(const Problem& problem, int algorithm, cudnnMathType_t math_type)
        : device_(problem.device),
          is_double_(problem.dtype == DataType::float64),
          algorithm_(static_cast<typename LegacyApi::Algorithm>(algorithm)),
          descriptors_(problem, math_type) {
        LegacyApi::workspace(handle_for(device_), descriptors_, algorithm_, &workspace_bytes_);
    }

    [[nodiscard]] std::size_t workspace_bytes() const noexcept override { return workspace_bytes_; }

    void execute(const Pointers& pointers, void* workspace, cudaStream_t stream) override {
        cudnnHandle_t handle = handle_for(device_);
        DGRAD_CUDNN_CHECK(cudnnSetStream(handle, stream));
        const auto pick = [this](const float& single, const double& twofold) -> const void* {
            return is_double_ ? static_cast<const void*>(&twofold) : &single;
        };
        LegacyApi::run(handle, descriptors_, algorithm_, pointers.x, pointers.w, pointers.y,
                       workspace, workspace_bytes_, pick(one_float, one_double),
                       pick(zero_float, zero_double));
    }

  private:
    std::int64_t device_;
    bool is_double_;
    typename LegacyApi::Algorithm algorithm_;
    Descriptors descriptors_;
    std::size_t workspace_bytes_ = 0;
};

}  // namespace

std::unique_ptr<Plan> make_plan(const Problem& problem, const std::string& algorithm,
                                const std::string& math_type) {
    problem.check();
    const int index = parse_algorithm(problem.direction, algorithm);
    const cudnnMathType_t math = parse_math_type(math_type);
    return with_api(problem.direction, [&](auto api) -> std::unique_ptr<Plan> {
        return std::make_unique<LegacyPlan<decltype(api)>>(problem, index, math);
    });
}

}  // namespace dgrad::legacy
