// Two plans in a row as one, in one workspace: a convolution, then its bias.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "plan.hpp"

namespace dgrad {

class Sequence final : public Plan {
  public:
    Sequence(std::shared_ptr<Plan> first, std::shared_ptr<Plan> second)
        : first_(std::move(first)), second_(std::move(second)) {}

    [[nodiscard]] std::size_t workspace_bytes() const noexcept override {
        return std::max(first_->workspace_bytes(), second_->workspace_bytes());
    }

    [[nodiscard]] std::vector<std::string> notes() const override {
        std::vector<std::string> notes = first_->notes();
        for (std::string& note : second_->notes()) notes.push_back(std::move(note));
        return notes;
    }

    void execute(const Pointers& pointers, void* workspace, cudaStream_t stream) override {
        first_->execute(pointers, workspace, stream);
        second_->execute(pointers, workspace, stream);
    }

  private:
    std::shared_ptr<Plan> first_;
    std::shared_ptr<Plan> second_;
};

}  // namespace dgrad
