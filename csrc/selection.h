// Which weights of many tensors are the smallest in absolute value, without sorting them. Equal ones
// count by their place: tensor by tensor, and in each by index.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dau_fast {

struct Scores {
  const float* values;
  std::size_t n;
};

// value: the k-th smallest absolute value. below: how many are smaller; equal: how many are just that.
// nan: how many are NaN, in which case the rest says nothing.
struct Selection {
  float value;
  std::size_t below, equal, nan;
};

// 1 <= k <= all values together.
Selection select_smallest(const std::vector<Scores>& tensors, std::size_t k, std::size_t threads);

// Packed masks of ceil(n / 8) bytes a tensor that drop what is below `threshold` in absolute value and
// the first `ties` of those that equal it. all_ties: no other value equals it, so that no order counts.
void mask_smallest(const std::vector<Scores>& tensors, const std::vector<std::uint8_t*>& bits,
                   float threshold, std::size_t ties, bool all_ties, std::size_t threads);

}  // namespace dau_fast
