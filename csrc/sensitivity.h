// Softmax and sensitivity of rows of logits in one pass over each, and the gradients of both. The
// mathematics stands in dau_fast/ops/sensitivity.py. Every array is contiguous, row by row.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dau_fast {

// logits [batch, classes], features [batch, width].
struct Batch {
  const float* logits;
  const float* features;
  std::size_t batch, classes, width;
  bool softmax;  // shown is [batch, classes + 1] with the softmax before s, else s alone, [batch]
};

// stats [5, batch]: miss, pull, length, largest, scale, where scale is 1 over the sum of exponentials.
// targets: [batch], or null for the predicted labels, which then go into `predicted`. Throws
// std::invalid_argument, before anything is written, for a target that is no class.
void sensitivity_forward(const Batch& in, const std::int64_t* targets, bool bias, float* stats, float* shown,
                         std::int64_t* predicted, std::size_t threads);

// grad has the shape of `shown`. grad_logits, grad_features: null where not wanted. Throws as above.
void sensitivity_backward(const Batch& in, const std::int64_t* labels, const float* stats, const float* grad,
                          float* grad_logits, float* grad_features, std::size_t threads);

}  // namespace dau_fast
