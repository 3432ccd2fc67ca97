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

#include "dlpack.hpp"
#include "plan.hpp"
#include "problem.hpp"

namespace dgrad {

// How often a problem was run by ready calls, of all threads: guarded by the GIL.
struct UseCount {
    std::uint64_t count = 0;
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
    std::shared_ptr<UseCount> uses;
    pybind11::object recipe;  // what Python needs of it; lives as long
};

// Not thread-safe: the GIL guards it, and a plan is found by the thread that made it only.
class ReadyCalls {
  public:
    // `exchange`: the capsule of the tensor type. `types`: the exact types of tensors that are
    // read, as a subclass may have rules of its own. `current_device`: the index of the device.
    ReadyCalls(const pybind11::capsule& exchange, pybind11::tuple types,
               pybind11::object current_device);

    // The result of a direction for a, b and a bias or None, or None if it is not ready: of dgrad
    // for y and w, of fprop for x and w, of wgrad for x and y. `state` is all else that decides:
    // exact ints, bools, strings, None and tuples of these.
    pybind11::object run(const pybind11::object& a, const pybind11::object& b,
                         const pybind11::object& bias, const pybind11::tuple& state);

    // The call that run() would make, or None.
    pybind11::object find(const pybind11::object& a, const pybind11::object& b,
                          const pybind11::object& bias, const pybind11::tuple& state);

    // What run() does with a call that was found for these very tensors; None if it fails.
    pybind11::object execute(const ReadyCall& call, const pybind11::object& a,
                             const pybind11::object& b, const pybind11::object& bias);

    void put(const pybind11::object& a, const pybind11::object& b, const pybind11::object& bias,
             const pybind11::tuple& state, const pybind11::object& call);

    void clear();  // the hits stay
    [[nodiscard]] std::size_t size() const noexcept { return entries_.size(); }
    [[nodiscard]] std::uint64_t hits() const noexcept { return hits_; }

  private:
    static constexpr std::size_t most_facts = 32;

    // What is read off the tensors.
    struct Key {
        std::array<std::int64_t, most_facts> facts{};
        std::size_t count = 0;
        pybind11::tuple state;
        std::int64_t state_hash = 0;

        bool operator==(const Key& other) const;
    };
    struct Hash {
        std::size_t operator()(const Key& key) const noexcept;
    };
    // The call as Python has it, which would cost an object at each look-up otherwise.
    struct Entry {
        pybind11::object object;
        const ReadyCall* call;
    };

    bool add_facts(const pybind11::object& object, Key* key) const;
    // What is found is counted as a hit; null if nothing is.
    const Entry* look_up(const pybind11::object& a, const pybind11::object& b,
                         const pybind11::object& bias, const pybind11::tuple& state);
    bool make_key(const pybind11::object& a, const pybind11::object& b,
                  const pybind11::object& bias, const pybind11::tuple& state, Key* key) const;
    [[nodiscard]] dlpack::Tensor read(const pybind11::object& tensor) const;

    const dlpack::Exchange* exchange_;
    pybind11::tuple types_;
    pybind11::object current_device_;
    std::unordered_map<Key, Entry, Hash> entries_;
    std::uint64_t hits_ = 0;
};

}  // namespace dgrad
