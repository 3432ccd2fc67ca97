// Enums as the names that Python, the records and the logs use.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

namespace dgrad {

// The place of `text` in `names`; throws std::invalid_argument with the names there are.
template <typename Names>
std::size_t index_of(const char* what, const Names& names, const std::string& text) {
    std::string known;
    std::size_t index = 0;
    for (const auto& name : names) {
        if (text == name) return index;
        known += (index == 0 ? "" : ", ") + std::string(name);
        ++index;
    }
    throw std::invalid_argument(std::string(what) + " is '" + text + "', expected one of " + known);
}

}  // namespace dgrad
