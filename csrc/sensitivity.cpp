#include "sensitivity.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "parallel.h"

namespace dau_fast {
namespace {

// Numbers whose sum is kept in float; longer sums are put together in double.
constexpr std::size_t kBlock = 1024;
// Numbers for which one more thread pays.
constexpr std::size_t kThreadWork = 1 << 20;

// exp(x) for x <= 0, to about 1 unit in the last place; 0 where the result would be denormal. NaN
// stays NaN, and so does what comes of infinity minus infinity.
DAU_FAST_INSIDE float exp_negative(float x) {
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * kLog2e + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * kLn2High) - n * kLn2Low;
  float poly = 1.9875691500e-4f;
  poly = poly * r + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  poly = poly * r * r + r + 1.0f;
  // The integer stands in the low bits of `shifted`.
  const auto exponent = (std::bit_cast<std::uint32_t>(shifted) + 127u) << 23;
  const float value = poly * std::bit_cast<float>(exponent);
  return x < -87.0f ? 0.0f : value;
}

struct Sums {
  double first = 0, second = 0;
};

DAU_FAST_INSIDE float largest_of(const float* z, std::size_t n) {
  float largest = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : largest)
  for (std::size_t i = 0; i < n; ++i) largest = z[i] > largest ? z[i] : largest;
  return largest;
}

// Sums of e = exp(z - largest) and of e^2; e goes to `out` with kWrite.
template <bool kWrite>
DAU_FAST_INSIDE Sums exponentials(const float* z, std::size_t n, float largest, float* out) {
  Sums total;
  for (std::size_t start = 0; start < n; start += kBlock) {
    const std::size_t end = std::min(n, start + kBlock);
    float first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
    for (std::size_t i = start; i < end; ++i) {
      const float e = exp_negative(z[i] - largest);
      if constexpr (kWrite) out[i] = e;
      first += e;
      second += e * e;
    }
    total.first += first;
    total.second += second;
  }
  return total;
}

DAU_FAST_INSIDE double dot(const float* a, const float* b, std::size_t n) {
  double total = 0;
  for (std::size_t start = 0; start < n; start += kBlock) {
    const std::size_t end = std::min(n, start + kBlock);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (std::size_t i = start; i < end; ++i) part += a[i] * b[i];
    total += part;
  }
  return total;
}

DAU_FAST_INSIDE std::size_t first_equal(const float* z, std::size_t n, float value) {
  const auto found = std::find(z, z + n, value);
  return found == z + n ? 0 : static_cast<std::size_t>(found - z);
}

DAU_FAST_WIDE
void forward_rows(const Batch& in, const std::int64_t* targets, bool bias, float* shown,
                  std::int64_t* predicted, std::size_t begin, std::size_t end) {
  const std::size_t classes = in.classes;
  for (std::size_t row = begin; row < end; ++row) {
    const float* z = in.logits + row * classes;
    const float* h = in.features + row * in.width;
    float* out = in.softmax ? shown + row * (classes + 1) : nullptr;
    const float largest = largest_of(z, classes);
    const std::size_t label = targets ? static_cast<std::size_t>(targets[row])
                                      : first_equal(z, classes, largest);
    if (!targets) predicted[row] = static_cast<std::int64_t>(label);
    // The label is left out of the sums and not taken off them, which would cost its digits.
    const float* rest = z + label + 1;
    const std::size_t after = classes - label - 1;
    const Sums low = out ? exponentials<true>(z, label, largest, out)
                         : exponentials<false>(z, label, largest, nullptr);
    const Sums high = out ? exponentials<true>(rest, after, largest, out + label + 1)
                          : exponentials<false>(rest, after, largest, nullptr);
    const float at_label = exp_negative(z[label] - largest);
    const double others = low.first + high.first, squares = low.second + high.second;
    const double scale = 1 / (others + at_label);
    const double miss = others * scale, pull = std::sqrt(squares * scale * scale + miss * miss);
    const double length = std::sqrt(dot(h, h, in.width) + (bias ? 1 : 0));
    if (out) {
      out[label] = at_label;
      const float factor = static_cast<float>(scale);
#pragma omp simd
      for (std::size_t i = 0; i < classes; ++i) out[i] *= factor;
    }
    shown[in.softmax ? row * (classes + 1) + classes : row] = static_cast<float>(pull * length);
    const double kept[] = {miss, pull, length, largest, scale};
    for (std::size_t k = 0; k < 5; ++k) in.stats[k * in.batch + row] = static_cast<float>(kept[k]);
  }
}

DAU_FAST_WIDE
void backward_rows(const Batch& in, const std::int64_t* labels, const float* grad, float* grad_logits,
                   float* grad_features, std::size_t begin, std::size_t end) {
  const std::size_t classes = in.classes;
  const float tiny = std::sqrt(std::numeric_limits<float>::min());
  for (std::size_t row = begin; row < end; ++row) {
    const float* grad_row = grad + (in.softmax ? row * (classes + 1) : row);
    const float grad_s = in.softmax ? grad_row[classes] : grad_row[0];
    float kept[5];
    for (std::size_t k = 0; k < 5; ++k) kept[k] = in.stats[k * in.batch + row];
    const auto [miss, pull, length, largest, scale] = kept;
    if (grad_logits) {
      const float* z = in.logits + row * classes;
      float* out = grad_logits + row * classes;
      const float factor = grad_s * length / (pull < tiny ? tiny : pull), rest = miss - pull * pull;
      const std::size_t label = static_cast<std::size_t>(labels[row]);
      const float p_label = exp_negative(z[label] - largest) * scale;
      float at_label = -grad_s * length * pull * p_label;
      if (in.softmax) {
#pragma omp simd
        for (std::size_t i = 0; i < classes; ++i) out[i] = exp_negative(z[i] - largest) * scale;
        const float mean = static_cast<float>(dot(out, grad_row, classes));
        at_label += p_label * (grad_row[label] - mean);
#pragma omp simd
        for (std::size_t i = 0; i < classes; ++i) {
          const float p = out[i];
          out[i] = p * factor * (p + rest) + p * (grad_row[i] - mean);
        }
      } else {
#pragma omp simd
        for (std::size_t i = 0; i < classes; ++i) {
          const float p = exp_negative(z[i] - largest) * scale;
          out[i] = p * factor * (p + rest);
        }
      }
      out[label] = at_label;
    }
    if (grad_features) {
      const float factor = grad_s * pull / (length < tiny ? tiny : length);
      const float* h = in.features + row * in.width;
      float* out = grad_features + row * in.width;
#pragma omp simd
      for (std::size_t i = 0; i < in.width; ++i) out[i] = factor * h[i];
    }
  }
}

// Calls work(begin, end) for shares of the rows, on as many threads as the numbers in them are worth.
template <typename Work>
void share(const Batch& in, std::size_t threads, const Work& work) {
  const std::size_t worth = in.batch * (in.classes + in.width) / kThreadWork;
  const std::size_t count = std::min({threads, worth + 1, std::max<std::size_t>(in.batch, 1)});
  const auto edge = [&](std::size_t part) { return in.batch * part / count; };
  on_threads(count, [&](std::size_t part) { work(edge(part), edge(part + 1)); });
}

}  // namespace

std::size_t sensitivity_forward(const Batch& in, const std::int64_t* targets, bool bias, float* shown,
                                std::int64_t* predicted, std::size_t threads) {
  if (targets) {
    const auto classes = static_cast<std::int64_t>(in.classes);
    for (std::size_t row = 0; row < in.batch; ++row) {
      if (targets[row] < 0 || targets[row] >= classes) return row;
    }
  }
  share(in, threads, [&](std::size_t begin, std::size_t end) {
    forward_rows(in, targets, bias, shown, predicted, begin, end);
  });
  return in.batch;
}

void sensitivity_backward(const Batch& in, const std::int64_t* labels, const float* grad,
                          float* grad_logits, float* grad_features, std::size_t threads) {
  share(in, threads, [&](std::size_t begin, std::size_t end) {
    backward_rows(in, labels, grad, grad_logits, grad_features, begin, end);
  });
}

}  // namespace dau_fast
