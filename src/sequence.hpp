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
        return joined(first_->notes(), second_->notes());
    }

    [[nodiscard]] std::vector<std::string> compiled() const override {
        return joined(first_->compiled(), second_->compiled());
    }

    [[nodiscard]] bool compiles() const noexcept override {
        return first_->compiles() || second_->compiles();
    }

    void execute(const Pointers& pointers, void* workspace, cudaStream_t stream) override {
        first_->execute(pointers, workspace, stream);
        second_->execute(pointers, workspace, stream);
    }

  private:
    static std::vector<std::string> joined(std::vector<std::string> texts,
                                           std::vector<std::string> more) {
        for (std::string& text : more) texts.push_back(std::move(text));
        return texts;
    }

    std::shared_ptr<Plan> first_;
    std::shared_ptr<Plan> second_;
};

}  // namespace dgrad
