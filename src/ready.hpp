// Calls that were made ready before: from tensors to queued work without leaving native code.
//
// Choosing, checking arguments and making plans is Python's part. What it came to is put here with
// all that it depended on; the same call again costs a look-up. A call that is not here, or that
// fails, is Python's again: nothing is reported from here.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "plan.hpp"
#include "problem.hpp"
#include "ready_key.hpp"
#include "tensors.hpp"

namespace dgrad {

// How often a problem was run by ready calls, of all threads: guarded by the GIL.
struct UseCount {
    std::uint64_t count = 0;
};

// How autograd takes the gradients of a ready call, which are ready calls too.
struct ReadyGradients {
    struct Gradient {
        std::size_t first, second;  // what its direction takes, by place among a, b and the
                                    // incoming gradient
        pybind11::tuple state;      // of its call, but for what the process decides
    };
    std::array<Gradient, 2> of;                         // of a and of b
    pybind11::object flags;                             // the call's own, or None
    std::vector<std::int64_t> a_strides, grad_strides;  // others must enter another layout first
    pybind11::object sum_bias;  // of the incoming gradient: the bias's, or None if a plain sum is
};

// Callables are Python's; None where there is nothing to do.
struct ReadyCall {
    std::shared_ptr<Plan> plan;
    Direction direction;
    pybind11::object make_out;        // of nothing: a tensor on the current device, for the result
    pybind11::object make_workspace;  // of nothing: a storage
    pybind11::object enter_bias;      // of the bias: the one that the plan reads
    pybind11::object is_capturing;    // of nothing: the current stream, by Note [Captured]
    bool plan_reads_bias;
    bool pytorch_adds_bias;  // to the result, once the plan has run
    bool python_captures;    // as a CUDA graph gets another plan
    std::shared_ptr<UseCount> uses;
    pybind11::object recipe;  // what Python needs of it; lives as long
    std::shared_ptr<const ReadyGradients> gradients;
};

// What of the process decides about each call: callables, of nothing unless said otherwise.
struct Process {
    pybind11::object current_device;  // its index
    pybind11::object flags;           // those in force, which count by identity
    pybind11::tuple switches;         // their values count
    pybind11::tuple guards;           // each with its value while native code may run a call
    pybind11::object recording;       // whether autograd is
    pybind11::object is_asked;        // of a node: whether the backward pass has a use for it
    pybind11::tuple is_odd;           // each of a gradient: whether it is none that can be read
};

// Not thread-safe: the GIL guards it, and a plan is found by the thread that made it only.
class ReadyCalls {
  public:
    ReadyCalls(const TensorReader& tensors, Process process)
        : tensors_(tensors), process_(std::move(process)) {}

    // The result of a direction for a, b and a bias or None, or None if it is not ready: of dgrad
    // for y and w, of fprop for x and w, of wgrad for x and y. `state` is all else that decides,
    // see ReadyKey.
    pybind11::object run(const pybind11::object& a, const pybind11::object& b,
                         const pybind11::object& bias, const pybind11::tuple& state);

    // The same for a state of `own` and what the process decides, with the call's own flags or
    // None. The ReadyCall itself where autograd must record it.
    pybind11::object call(const pybind11::object& a, const pybind11::object& b,
                          const pybind11::object& bias, const pybind11::tuple& own,
                          const pybind11::object& flags);

    // What run() does with a call that was found for these very tensors; None if it fails.
    pybind11::object execute(const ReadyCall& call, const pybind11::object& a,
                             const pybind11::object& b, const pybind11::object& bias);

    // What the backward pass of a recorded call gives: gradients of a, b, the bias and the call
    // itself. `context` is autograd's, `saved` are a and b, each None where no gradient needs it.
    // None if it is Python's to run.
    pybind11::object backward(const pybind11::object& context, const pybind11::object& call,
                              const pybind11::tuple& saved, const pybind11::object& grad);

    void put(const pybind11::object& a, const pybind11::object& b, const pybind11::object& bias,
             const pybind11::tuple& state, const pybind11::object& call);

    void clear();  // the hits stay
    [[nodiscard]] std::size_t size() const noexcept { return entries_.size(); }
    [[nodiscard]] std::uint64_t hits() const noexcept { return hits_; }

  private:
    // The call as Python has it, which would cost an object at each look-up otherwise.
    struct Entry {
        pybind11::object object;
        const ReadyCall* call = nullptr;
    };

    // Of no call if there is none. A copy, as the table's own may go while it runs.
    Entry look_up(const pybind11::object& a, const pybind11::object& b,
                  const pybind11::object& bias, const pybind11::tuple& state);
    [[nodiscard]] bool may_run() const;
    [[nodiscard]] pybind11::tuple state(const pybind11::tuple& own,
                                        const pybind11::object& flags) const;
    [[nodiscard]] bool enters(const pybind11::object& tensor,
                              const std::vector<std::int64_t>& strides) const;
    [[nodiscard]] bool is_asked(const pybind11::tuple& nodes, std::size_t input) const;

    TensorReader tensors_;
    Process process_;
    // No static of a function: making it may give the GIL away, to one that waits for the static.
    pybind11::tuple but_channels_ = pybind11::make_tuple(0, 2, 3);
    std::unordered_map<ReadyKey, Entry, ReadyKey::Hash> entries_;
    std::uint64_t hits_ = 0;
};

}  // namespace dgrad
