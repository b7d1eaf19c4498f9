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

// stats [5, batch]: rest, pull, length, largest, scale, where scale is 1 over the sum of exponentials.
// targets: [batch], or null for the predicted labels, which then go into `predicted`. Throws
// std::invalid_argument, before anything is written, for a target that is no class.
void sensitivity_forward(const Batch& in, const std::int64_t* targets, bool bias, float* stats, float* shown,
                         std::int64_t* predicted, std::size_t threads);

// grad has the shape of `shown`. grad_logits, grad_features: null where not wanted. Throws as above.
void sensitivity_backward(const Batch& in, const std::int64_t* labels, const float* stats, const float* grad,
                          float* grad_logits, float* grad_features, std::size_t threads);

// Logits [batch, classes] of the classes from `first` on, of which there may be more before and after; their rows
// begin `stride` numbers apart.
struct LogitsPiece {
  const float* logits;
  std::size_t batch, classes, stride;
  std::int64_t first;
};

// The forward pass piece by piece. sums [4, batch]: what it has found so far of exp(z - largest) of the classes
// that are not the label, their sum and that of their squares; the label's logit; and the largest logit. They
// begin as 0, 0, any number and -infinity.
void add_logits(const LogitsPiece& in, const std::int64_t* targets, double* sums, std::size_t threads);

// The backward pass: gradients of these logits, [batch, classes]. stats: as above, of all classes.
void pull_logits(const LogitsPiece& in, const std::int64_t* targets, const float* stats, const float* grad,
                 float* grad_logits, std::size_t threads);

}  // namespace dau_fast
