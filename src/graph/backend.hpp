// One descriptor of cuDNN's backend API: created, filled attribute by attribute, finalized.
#pragma once

#include <cudnn.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace dgrad::graph {

// The backend's tag for a C++ type; pointers and descriptors share one type and have calls of
// their own below.
template <typename T>
struct AttributeType;
template <>
struct AttributeType<std::int64_t> {
    static constexpr auto value = CUDNN_TYPE_INT64;
};
template <>
struct AttributeType<float> {
    static constexpr auto value = CUDNN_TYPE_FLOAT;
};
template <>
struct AttributeType<double> {
    static constexpr auto value = CUDNN_TYPE_DOUBLE;
};
template <>
struct AttributeType<bool> {
    static constexpr auto value = CUDNN_TYPE_BOOLEAN;
};
template <>
struct AttributeType<cudnnHandle_t> {
    static constexpr auto value = CUDNN_TYPE_HANDLE;
};
template <>
struct AttributeType<cudnnDataType_t> {
    static constexpr auto value = CUDNN_TYPE_DATA_TYPE;
};
template <>
struct AttributeType<cudnnConvolutionMode_t> {
    static constexpr auto value = CUDNN_TYPE_CONVOLUTION_MODE;
};
template <>
struct AttributeType<cudnnPointwiseMode_t> {
    static constexpr auto value = CUDNN_TYPE_POINTWISE_MODE;
};
template <>
struct AttributeType<cudnnBackendHeurMode_t> {
    static constexpr auto value = CUDNN_TYPE_HEUR_MODE;
};
template <>
struct AttributeType<cudnnBackendKnobType_t> {
    static constexpr auto value = CUDNN_TYPE_KNOB_TYPE;
};
template <>
struct AttributeType<cudnnBackendNumericalNote_t> {
    static constexpr auto value = CUDNN_TYPE_NUMERICAL_NOTE;
};
template <>
struct AttributeType<cudnnBackendBehaviorNote_t> {
    static constexpr auto value = CUDNN_TYPE_BEHAVIOR_NOTE;
};

class Descriptor {
  public:
    explicit Descriptor(cudnnBackendDescriptorType_t type);
    Descriptor(Descriptor&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    Descriptor& operator=(Descriptor&&) = delete;
    ~Descriptor();

    [[nodiscard]] cudnnBackendDescriptor_t get() const noexcept { return object_; }

    template <typename T>
    void set(cudnnBackendAttributeName_t name, const T& value) {
        set_raw(name, AttributeType<T>::value, 1, &value);
    }
    template <typename T>
    void set(cudnnBackendAttributeName_t name, const std::vector<T>& values) {
        set_raw(name, AttributeType<T>::value, static_cast<std::int64_t>(values.size()),
                values.data());
    }
    void set(cudnnBackendAttributeName_t name, const Descriptor& value);
    void set(cudnnBackendAttributeName_t name, const std::string& text);
    void set(cudnnBackendAttributeName_t name, const std::vector<const Descriptor*>& values);
    void set_raw(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
                 std::int64_t count, const void* values);
    void finalize();

    template <typename T>
    [[nodiscard]] T value(cudnnBackendAttributeName_t name) const {
        T found{};
        if (get_raw(name, AttributeType<T>::value, 1, &found) != 1) {
            throw std::invalid_argument("cuDNN gives no value of an attribute");
        }
        return found;
    }
    // At most `most` values.
    template <typename T>
    [[nodiscard]] std::vector<T> values(cudnnBackendAttributeName_t name, std::size_t most) const {
        std::vector<T> found(most);
        found.resize(static_cast<std::size_t>(
            get_raw(name, AttributeType<T>::value, static_cast<std::int64_t>(most), found.data())));
        return found;
    }
    [[nodiscard]] std::string text(cudnnBackendAttributeName_t name) const;
    // Descriptors of `type` that this one holds, at most `most`.
    [[nodiscard]] std::vector<Descriptor> descriptors(cudnnBackendAttributeName_t name,
                                                      cudnnBackendDescriptorType_t type,
                                                      std::int64_t most) const;
    // How many descriptors there are under a name.
    [[nodiscard]] std::int64_t count(cudnnBackendAttributeName_t name) const;

  private:
    // How many there are of it, at most `count`.
    std::int64_t get_raw(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
                         std::int64_t count, void* values) const;

    cudnnBackendDescriptor_t object_ = nullptr;
};

}  // namespace dgrad::graph
