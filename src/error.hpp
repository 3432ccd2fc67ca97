// cuDNN status codes as C++ exceptions that keep the call and cuDNN's own words.
#pragma once

#include <cudnn.h>

#include <stdexcept>
#include <string>

namespace dgrad {

// cuDNN's name of a status; a code newer than the library is shown as its number.
std::string status_name(cudnnStatus_t status);

class CudnnError : public std::runtime_error {
  public:
    // Reads cudnnGetLastErrorString, so it is made on the failing thread, before any other call.
    CudnnError(cudnnStatus_t status, std::string call);

    [[nodiscard]] int status() const noexcept { return static_cast<int>(status_); }
    [[nodiscard]] const std::string& call() const noexcept { return call_; }
    [[nodiscard]] const std::string& detail() const noexcept { return detail_; }

  private:
    CudnnError(cudnnStatus_t status, std::string call, std::string detail);

    cudnnStatus_t status_;
    std::string call_;
    std::string detail_;
};

// cuDNN keeps a thread's last text until somebody reads it, and not every failing call has one.
void forget_last_error();

// `expression` is the source text of the call; only the function's name is kept of it.
void check(cudnnStatus_t status, const char* expression);

}  // namespace dgrad

#define DGRAD_CUDNN_CHECK(expression) ::dgrad::check((expression), #expression)
