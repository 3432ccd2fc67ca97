#include "graph/backend.hpp"

#include <algorithm>

#include "error.hpp"

namespace dgrad::graph {

Descriptor::Descriptor(cudnnBackendDescriptorType_t type) {
    DGRAD_CUDNN_CHECK(cudnnBackendCreateDescriptor(type, &object_));
}

Descriptor::~Descriptor() {
    // A failing destroy has nobody left to tell and nothing left to undo.
    if (object_ != nullptr) static_cast<void>(cudnnBackendDestroyDescriptor(object_));
}

void Descriptor::set(cudnnBackendAttributeName_t name, const Descriptor& value) {
    set_raw(name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value.object_);
}

void Descriptor::set(cudnnBackendAttributeName_t name, const std::string& text) {
    set_raw(name, CUDNN_TYPE_CHAR, static_cast<std::int64_t>(text.size()), text.data());
}

void Descriptor::set(cudnnBackendAttributeName_t name,
                     const std::vector<const Descriptor*>& values) {
    std::vector<cudnnBackendDescriptor_t> objects;
    for (const Descriptor* value : values) objects.push_back(value->object_);
    set_raw(name, CUDNN_TYPE_BACKEND_DESCRIPTOR, static_cast<std::int64_t>(objects.size()),
            objects.data());
}

void Descriptor::set_raw(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
                         std::int64_t count, const void* values) {
    DGRAD_CUDNN_CHECK(cudnnBackendSetAttribute(object_, name, type, count, values));
}

void Descriptor::finalize() { DGRAD_CUDNN_CHECK(cudnnBackendFinalize(object_)); }

std::string Descriptor::text(cudnnBackendAttributeName_t name) const {
    std::int64_t length = 0;
    DGRAD_CUDNN_CHECK(
        cudnnBackendGetAttribute(object_, name, CUDNN_TYPE_CHAR, 0, &length, nullptr));
    std::string found(static_cast<std::size_t>(length), '\0');
    found.resize(static_cast<std::size_t>(get_raw(name, CUDNN_TYPE_CHAR, length, found.data())));
    return found;
}

std::vector<Descriptor> Descriptor::descriptors(cudnnBackendAttributeName_t name,
                                                cudnnBackendDescriptorType_t type,
                                                std::int64_t most) const {
    std::vector<Descriptor> found;  // cuDNN fills descriptors that the caller has made
    std::vector<cudnnBackendDescriptor_t> objects;
    for (std::int64_t i = 0; i < most; ++i) objects.push_back(found.emplace_back(type).get());
    const std::int64_t count = get_raw(name, CUDNN_TYPE_BACKEND_DESCRIPTOR, most, objects.data());
    while (static_cast<std::int64_t>(found.size()) > count) found.pop_back();
    return found;
}

std::int64_t Descriptor::count(cudnnBackendAttributeName_t name) const {
    std::int64_t there = 0;
    DGRAD_CUDNN_CHECK(
        cudnnBackendGetAttribute(object_, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 0, &there, nullptr));
    return there;
}

std::int64_t Descriptor::get_raw(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
                                 std::int64_t count, void* values) const {
    std::int64_t there = 0;
    DGRAD_CUDNN_CHECK(cudnnBackendGetAttribute(object_, name, type, count, &there, values));
    return std::min(count, there);
}

}  // namespace dgrad::graph
