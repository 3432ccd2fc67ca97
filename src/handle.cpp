#include "handle.hpp"

#include <map>
#include <mutex>
#include <vector>

#include "error.hpp"

namespace dgrad {
namespace {

// Handles that no thread holds. Leaked on purpose: at exit the CUDA driver may be gone before
// cuDNN, and cudnnDestroy then crashes. PyTorch leaks its handles for the same reason.
class HandlePool {
  public:
    static HandlePool& instance() {
        static HandlePool* const pool = new HandlePool;
        return *pool;
    }

    cudnnHandle_t take(std::int64_t device) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            std::vector<cudnnHandle_t>& free = free_[device];
            if (!free.empty()) {
                cudnnHandle_t handle = free.back();
                free.pop_back();
                return handle;
            }
        }
        cudnnHandle_t handle = nullptr;
        forget_last_error();
        DGRAD_CUDNN_CHECK(cudnnCreate(&handle));
        return handle;
    }

    void give_back(const std::map<std::int64_t, cudnnHandle_t>& handles) {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (const auto& [device, handle] : handles) free_[device].push_back(handle);
    }

  private:
    std::mutex mutex_;
    std::map<std::int64_t, std::vector<cudnnHandle_t>> free_;
};

struct ThreadHandles {
    std::map<std::int64_t, cudnnHandle_t> by_device;

    ThreadHandles() = default;
    ThreadHandles(const ThreadHandles&) = delete;
    ThreadHandles& operator=(const ThreadHandles&) = delete;
    ~ThreadHandles() {
        try {
            HandlePool::instance().give_back(by_device);
        } catch (...) {  // No memory for the list: these handles leak, as all do at exit.
        }
    }
};

}  // namespace

cudnnHandle_t handle_for(std::int64_t device) {
    thread_local ThreadHandles handles;
    const auto found = handles.by_device.find(device);
    if (found != handles.by_device.end()) return found->second;
    cudnnHandle_t handle = HandlePool::instance().take(device);
    handles.by_device.emplace(device, handle);
    return handle;
}

}  // namespace dgrad
