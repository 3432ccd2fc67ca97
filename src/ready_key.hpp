// All that a ready call depends on, as a key.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "tensors.hpp"

namespace dgrad {

class ReadyKey {
  public:
    // Of the two inputs of a direction and a bias or None, on this thread. `state` is all else that
    // decides: exact ints, bools, strings, None and tuples of these. False if there is something
    // that no ready call takes.
    bool make(const TensorReader& tensors, const pybind11::object& a, const pybind11::object& b,
              const pybind11::object& bias, const pybind11::tuple& state);

    bool operator==(const ReadyKey& other) const;
    [[nodiscard]] std::size_t hash() const noexcept;

    struct Hash {
        std::size_t operator()(const ReadyKey& key) const noexcept { return key.hash(); }
    };

  private:
    static constexpr std::size_t most_facts = 32;

    bool add(const TensorReader& tensors, const pybind11::object& object);

    // What is read off the tensors.
    std::array<std::int64_t, most_facts> facts_{};
    std::size_t count_ = 0;
    pybind11::tuple state_;
    std::int64_t state_hash_ = 0;
};

}  // namespace dgrad
