// Options that callers choose by a word.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

namespace fastmaml {

template <class Value>
Value named(const char* what, const std::string& name, std::initializer_list<std::pair<const char*, Value>> known) {
  std::string names;
  for (const auto& [candidate, value] : known) {
    if (name == candidate) return value;
    names += std::string(names.empty() ? "" : ", ") + candidate;
  }
  throw std::invalid_argument(std::string(what) + " \"" + name + "\" is not one of " + names);
}

}  // namespace fastmaml
