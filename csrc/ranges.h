// What an array of integers must lie in.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

namespace dau_fast {

// Throws `Error` unless all `values`, where there are any, lie in 0 to `high`: what they do ("index holds"),
// between which and what was expected, and `more`.
template <typename Error>
void require_in_range(const char* what, const std::int64_t* values, std::size_t n, std::int64_t high,
                      const char* more = "") {
  if (!values || n == 0) return;
  const auto [low, most] = std::minmax_element(values, values + n);
  if (*low >= 0 && *most <= high) return;
  throw Error(std::string(what) + " " + std::to_string(*low) + " to " + std::to_string(*most) +
              ": expected 0 to " + std::to_string(high) + more);
}

}  // namespace dau_fast
