#include "error.hpp"

#include <array>
#include <utility>

namespace dgrad {
namespace {

std::string last_error_string() {
    std::array<char, 2048> text{};
    cudnnGetLastErrorString(text.data(), text.size());
    text.back() = '\0';
    return text.data();
}

std::string message(cudnnStatus_t status, const std::string& call, const std::string& detail) {
    std::string text =
        call + " returned " + std::to_string(static_cast<int>(status)) + " " + status_name(status);
    if (!detail.empty()) text += ": " + detail;
    return text;
}

}  // namespace

std::string status_name(cudnnStatus_t status) {
    const char* name = cudnnGetErrorString(status);
    return name != nullptr && *name != '\0' ? name : "(a status this cuDNN does not name)";
}

CudnnError::CudnnError(cudnnStatus_t status, std::string call)
    : CudnnError(status, std::move(call), last_error_string()) {}

CudnnError::CudnnError(cudnnStatus_t status, std::string call, std::string detail)
    : std::runtime_error(message(status, call, detail)),
      status_(status),
      call_(std::move(call)),
      detail_(std::move(detail)) {}

void forget_last_error() { last_error_string(); }

void check(cudnnStatus_t status, const char* expression) {
    if (status == CUDNN_STATUS_SUCCESS) return;
    const std::string text = expression;
    throw CudnnError(status, text.substr(0, text.find('(')));
}

}  // namespace dgrad
