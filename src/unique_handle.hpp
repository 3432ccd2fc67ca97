// Ownership of one cuDNN object: created in the constructor, destroyed with the owner.
#pragma once

#include <cudnn.h>

#include <utility>

#include "error.hpp"

namespace dgrad {

template <typename T, cudnnStatus_t (*create)(T*), cudnnStatus_t (*destroy)(T)>
class UniqueHandle {
  public:
    // `name`: of the creating call, for its error.
    explicit UniqueHandle(const char* name) { check(create(&object_), name); }
    UniqueHandle(UniqueHandle&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
    UniqueHandle(const UniqueHandle&) = delete;
    UniqueHandle& operator=(const UniqueHandle&) = delete;
    UniqueHandle& operator=(UniqueHandle&&) = delete;

    // A failing destroy has nobody left to tell and nothing left to undo.
    ~UniqueHandle() {
        if (object_ != nullptr) static_cast<void>(destroy(object_));
    }

    [[nodiscard]] T get() const noexcept { return object_; }

  private:
    T object_ = nullptr;
};

}  // namespace dgrad
