// Plan: the native object that runs one candidate for one problem.
#pragma once

#include <cudnn.h>

#include <cstddef>

namespace dgrad {

// Not thread-safe: one thread uses a plan at a time.
class Plan {
  public:
    Plan() = default;
    Plan(const Plan&) = delete;
    Plan& operator=(const Plan&) = delete;
    virtual ~Plan() = default;

    [[nodiscard]] virtual std::size_t workspace_bytes() const noexcept = 0;

    // Device pointers in the words of Note [Geometry]. The direction's result (x of dgrad, y of
    // fprop, w of wgrad) is overwritten and needs no clearing. Returns once the work is queued on
    // `stream`. The problem's device must be current; workspace holds workspace_bytes().
    virtual void execute(void* x, void* w, void* y, void* workspace, cudaStream_t stream) = 0;
};

}  // namespace dgrad
