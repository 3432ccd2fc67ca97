// Plan: the native object that runs one candidate for one problem.
#pragma once

#include <cudnn.h>

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

namespace dgrad {

// Device pointers in the words of Note [Geometry]. The direction's result (x of dgrad, y of fprop,
// w of wgrad) is overwritten and needs no clearing. The bias is null where the plan adds none.
struct Pointers {
    void* x;
    void* w;
    void* y;
    void* bias;
};

// Not thread-safe: one thread uses a plan at a time.
class Plan {
  public:
    Plan() = default;
    Plan(const Plan&) = delete;
    Plan& operator=(const Plan&) = delete;
    virtual ~Plan() = default;

    [[nodiscard]] virtual std::size_t workspace_bytes() const noexcept = 0;

    // cuDNN's numerical notes on what runs, such as "TENSOR_CORE"; the legacy API has none.
    [[nodiscard]] virtual std::vector<std::string> notes() const { return {}; }

    // For each part of what runs the text of what cuDNN compiled for it, from which it is built
    // again without compiling; empty where cuDNN had nothing to compile.
    [[nodiscard]] virtual std::vector<std::string> compiled() const {
        return std::vector<std::string>(1);
    }

    // Whether cuDNN compiled any of it; see Note [Captured].
    [[nodiscard]] virtual bool compiles() const noexcept { return false; }

    // Queues the work on `stream`. The problem's device must be current; the workspace holds
    // workspace_bytes().
    virtual void execute(const Pointers& pointers, void* workspace, cudaStream_t stream) = 0;
};

// Keeps a plan until the process ends. Needs the GIL.
//
// Note [Captured]
// What cuDNN compiles for a plan goes with the plan, and a CUDA graph that was captured from it
// does not hold it: after that a replay crashes, or gives wrong numbers (cuDNN 9.19). Nobody tells
// when a graph has gone, so a plan of this kind stays once it has run in a capture.
void keep_for_graphs(std::shared_ptr<Plan> plan);

}  // namespace dgrad
