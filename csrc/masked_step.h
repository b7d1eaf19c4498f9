// Steps of SGD and AdamW over many tensors that keep masked weights and their state at +0.0. Masks are
// those of packed_masks.h. Weights and state must be 0 where a whole cache line of 16 is masked: where
// most lines are, nothing of those is read or written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dau_fast {

// bits: null where every weight is kept. momentum: null for plain SGD.
struct SgdTensor {
  float* weights;
  const float* grads;
  float* momentum;
  const std::uint8_t* bits;
  std::size_t n;
  bool first;  // of its steps: momentum becomes the gradient, as in torch
};

struct SgdSettings {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
};

void masked_sgd(const std::vector<SgdTensor>& tensors, const SgdSettings& settings, std::size_t threads);

// step: how many steps there were; raised by one.
struct AdamwTensor {
  float* weights;
  const float* grads;
  float* exp_avg;
  float* exp_avg_sq;
  float* step;
  const std::uint8_t* bits;
  std::size_t n;
};

struct AdamwSettings {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
};

void masked_adamw(const std::vector<AdamwTensor>& tensors, const AdamwSettings& settings,
                  std::size_t threads);

}  // namespace dau_fast
