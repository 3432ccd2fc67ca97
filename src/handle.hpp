// cuDNN handles: one per thread and device.
#pragma once

#include <cudnn.h>

#include <cstdint>

namespace dgrad {

// The calling thread's handle for `device`, which the caller has made the current device.
// Made at first use; a thread that ends hands its handles to the next one that needs them.
cudnnHandle_t handle_for(std::int64_t device);

}  // namespace dgrad
