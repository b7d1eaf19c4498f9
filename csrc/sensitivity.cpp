#include "sensitivity.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

#include "parallel.h"
#include "ranges.h"

namespace dau_fast {
namespace {

// Numbers whose sum is kept in float; longer sums are put together in double.
constexpr std::size_t kBlock = 1024;
// Rows of up to so many classes are worked on whole in registers: loops of other lengths end in single numbers.
constexpr std::size_t kNarrow = 16;
// Numbers for which one more thread pays.
constexpr std::size_t kThreadWork = 1 << 16;

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

struct Parts {
  double rest, pull, scale;
};

DAU_FAST_INSIDE Parts put_together(double others, double squares, float at_label) {
  const double scale = 1 / (others + at_label), miss = others * scale, squared = squares * scale * scale;
  return {miss * at_label * scale - squared, std::sqrt(squared + miss * miss), scale};
}

// A row of at most kNarrow numbers, and `filling` behind them.
struct Narrow {
  alignas(64) float values[kNarrow];
};

DAU_FAST_INSIDE Narrow widen(const float* row, std::size_t n, float filling) {
  Narrow wide;
  for (std::size_t i = 0; i < kNarrow; ++i) wide.values[i] = filling;
  std::copy_n(row, n, wide.values);
  return wide;
}

DAU_FAST_INSIDE void exponentials_of(Narrow& z, float largest) {
#pragma omp simd
  for (std::size_t i = 0; i < kNarrow; ++i) z.values[i] = exp_negative(z.values[i] - largest);
}

// The same as forward_row, of few classes.
DAU_FAST_INSIDE Parts forward_narrow_row(const float* z, std::size_t classes, float largest,
                                         std::size_t label, float* out) {
  Narrow e = widen(z, classes, -std::numeric_limits<float>::infinity());
  exponentials_of(e, largest);
  const float at_label = std::exchange(e.values[label], 0.0f);
  float first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
  for (std::size_t i = 0; i < kNarrow; ++i) {
    first += e.values[i];
    second += e.values[i] * e.values[i];
  }
  const Parts parts = put_together(first, second, at_label);
  if (out) {
    e.values[label] = at_label;
    const float factor = static_cast<float>(parts.scale);
#pragma omp simd
    for (std::size_t i = 0; i < kNarrow; ++i) e.values[i] *= factor;
    std::copy_n(e.values, classes, out);
  }
  return parts;
}

// The softmax of one row into `out`, unless that is null, and what the other numbers are made of.
DAU_FAST_INSIDE Parts forward_row(const float* z, std::size_t classes, float largest, std::size_t label,
                                  float* out) {
  // The label is left out of the sums and not taken off them, which would cost its digits.
  const float* rest = z + label + 1;
  const std::size_t after = classes - label - 1;
  const Sums low =
      out ? exponentials<true>(z, label, largest, out) : exponentials<false>(z, label, largest, nullptr);
  const Sums high = out ? exponentials<true>(rest, after, largest, out + label + 1)
                        : exponentials<false>(rest, after, largest, nullptr);
  const float at_label = exp_negative(z[label] - largest);
  const Parts parts = put_together(low.first + high.first, low.second + high.second, at_label);
  if (out) {
    out[label] = at_label;
    const float factor = static_cast<float>(parts.scale);
#pragma omp simd
    for (std::size_t i = 0; i < classes; ++i) out[i] *= factor;
  }
  return parts;
}

DAU_FAST_WIDE
void forward_rows(const Batch& in, const std::int64_t* targets, bool bias, float* stats, float* shown,
                  std::int64_t* predicted, std::size_t begin, std::size_t end) {
  const std::size_t classes = in.classes;
  for (std::size_t row = begin; row < end; ++row) {
    const float* z = in.logits + row * classes;
    const float* h = in.features + row * in.width;
    const float largest = largest_of(z, classes);
    const std::size_t label =
        targets ? static_cast<std::size_t>(targets[row]) : first_equal(z, classes, largest);
    if (!targets) predicted[row] = static_cast<std::int64_t>(label);
    float* out = in.softmax ? shown + row * (classes + 1) : nullptr;
    const auto [rest, pull, scale] = classes <= kNarrow ? forward_narrow_row(z, classes, largest, label, out)
                                                        : forward_row(z, classes, largest, label, out);
    const double length = std::sqrt(dot(h, h, in.width) + (bias ? 1 : 0));
    shown[in.softmax ? row * (classes + 1) + classes : row] = static_cast<float>(pull * length);
    const double kept[] = {rest, pull, length, largest, scale};
    for (std::size_t k = 0; k < 5; ++k) stats[k * in.batch + row] = static_cast<float>(kept[k]);
  }
}

// What was kept of a row, in the order of stats.
struct Kept {
  float rest, pull, length, largest, scale;

  Kept(const float* stats, std::size_t batch, std::size_t row)
      : rest(stats[row]),
        pull(stats[batch + row]),
        length(stats[2 * batch + row]),
        largest(stats[3 * batch + row]),
        scale(stats[4 * batch + row]) {}
};

// Of ds/dz: what is the same for all classes of a row.
struct Slope {
  float factor, rest, label;

  Slope(const Kept& kept, float grad_s) {
    const float tiny = std::sqrt(std::numeric_limits<float>::min());
    factor = grad_s * kept.length / (kept.pull < tiny ? tiny : kept.pull);
    rest = kept.rest;
    label = -grad_s * kept.length * kept.pull;
  }
};

// dL/dz of `n` logits from dL/ds, the label's left to the caller.
DAU_FAST_INSIDE void pull_row(const float* z, std::size_t n, const Kept& kept, const Slope& slope,
                              float* out) {
  const float largest = kept.largest, scale = kept.scale, factor = slope.factor, rest = slope.rest;
#pragma omp simd
  for (std::size_t i = 0; i < n; ++i) {
    const float p = exp_negative(z[i] - largest) * scale;
    out[i] = p * factor * (p + rest);
  }
}

// dL/dz of one row from dL/ds and, with `softmax`, dL/dp, the numbers of `grad` [classes].
DAU_FAST_INSIDE void logits_row(const float* z, std::size_t classes, std::size_t label, const Kept& kept,
                                float grad_s, const float* grad, bool softmax, float* out) {
  const Slope slope(kept, grad_s);
  const float largest = kept.largest, scale = kept.scale, factor = slope.factor, rest = slope.rest;
  const float p_label = exp_negative(z[label] - largest) * scale;
  float at_label = slope.label * p_label;
  if (softmax) {
#pragma omp simd
    for (std::size_t i = 0; i < classes; ++i) out[i] = exp_negative(z[i] - largest) * scale;
    const float mean = static_cast<float>(dot(out, grad, classes));
    at_label += p_label * (grad[label] - mean);
#pragma omp simd
    for (std::size_t i = 0; i < classes; ++i) {
      const float p = out[i];
      out[i] = p * factor * (p + rest) + p * (grad[i] - mean);
    }
  } else {
    pull_row(z, classes, kept, slope, out);
  }
  out[label] = at_label;
}

// The same as logits_row, of few classes.
DAU_FAST_INSIDE void logits_narrow_row(const float* z, std::size_t classes, std::size_t label,
                                       const Kept& kept, float grad_s, const float* grad, bool softmax,
                                       float* out) {
  const Slope slope(kept, grad_s);
  Narrow p = widen(z, classes, -std::numeric_limits<float>::infinity()), found;
  exponentials_of(p, kept.largest);
#pragma omp simd
  for (std::size_t i = 0; i < kNarrow; ++i) {
    p.values[i] *= kept.scale;
    found.values[i] = p.values[i] * slope.factor * (p.values[i] + slope.rest);
  }
  found.values[label] = slope.label * p.values[label];
  if (softmax) {
    const Narrow wanted = widen(grad, classes, 0);
    float mean = 0;
#pragma omp simd reduction(+ : mean)
    for (std::size_t i = 0; i < kNarrow; ++i) mean += p.values[i] * wanted.values[i];
#pragma omp simd
    for (std::size_t i = 0; i < kNarrow; ++i) found.values[i] += p.values[i] * (wanted.values[i] - mean);
  }
  std::copy_n(found.values, classes, out);
}

DAU_FAST_INSIDE void features_row(const float* h, std::size_t width, const Kept& kept, float grad_s,
                                  float* out) {
  const float tiny = std::sqrt(std::numeric_limits<float>::min());
  const float factor = grad_s * kept.pull / (kept.length < tiny ? tiny : kept.length);
#pragma omp simd
  for (std::size_t i = 0; i < width; ++i) out[i] = factor * h[i];
}

DAU_FAST_WIDE
void backward_rows(const Batch& in, const std::int64_t* labels, const float* stats, const float* grad,
                   float* grad_logits, float* grad_features, std::size_t begin, std::size_t end) {
  const std::size_t classes = in.classes, batch = in.batch;
  for (std::size_t row = begin; row < end; ++row) {
    const float* grad_row = grad + (in.softmax ? row * (classes + 1) : row);
    const float grad_s = in.softmax ? grad_row[classes] : grad_row[0];
    const Kept kept(stats, batch, row);
    if (grad_logits) {
      const auto label = static_cast<std::size_t>(labels[row]);
      const float* z = in.logits + row * classes;
      float* out = grad_logits + row * classes;
      if (classes <= kNarrow) {
        logits_narrow_row(z, classes, label, kept, grad_s, grad_row, in.softmax, out);
      } else {
        logits_row(z, classes, label, kept, grad_s, grad_row, in.softmax, out);
      }
    }
    if (grad_features) {
      features_row(in.features + row * in.width, in.width, kept, grad_s, grad_features + row * in.width);
    }
  }
}

// ---- some of the classes at a time

// Where a row's label stands among the classes of `in`, or how many these are where it is none of them.
DAU_FAST_INSIDE std::size_t place_of(std::int64_t target, const LogitsPiece& in) {
  const std::int64_t place = target - in.first;
  return place < 0 ? in.classes : std::min(static_cast<std::size_t>(place), in.classes);
}

DAU_FAST_WIDE
void add_rows(const LogitsPiece& in, const std::int64_t* targets, double* sums, std::size_t begin,
              std::size_t end) {
  for (std::size_t row = begin; row < end; ++row) {
    const float* z = in.logits + row * in.stride;
    double &first = sums[row], &second = sums[in.batch + row], &at_label = sums[2 * in.batch + row],
           &largest = sums[3 * in.batch + row];
    const double before = largest;
    largest = std::max<double>(before, largest_of(z, in.classes));
    // While all logits are -inf there is nothing to add up, and NaN must not come of it.
    const float base = std::isinf(largest) && largest < 0 ? 0.0f : static_cast<float>(largest);
    const std::size_t label = place_of(targets[row], in), after = std::min(label + 1, in.classes);
    const Sums low = exponentials<false>(z, label, base, nullptr);
    const Sums high = exponentials<false>(z + after, in.classes - after, base, nullptr);
    const double ratio = std::exp(before - base);
    first = first * ratio + low.first + high.first;
    second = second * ratio * ratio + low.second + high.second;
    if (label < in.classes) at_label = z[label];
  }
}

DAU_FAST_WIDE
void pull_rows(const LogitsPiece& in, const std::int64_t* targets, const float* stats, const float* grad,
               float* grad_logits, std::size_t begin, std::size_t end) {
  for (std::size_t row = begin; row < end; ++row) {
    const float* z = in.logits + row * in.stride;
    float* out = grad_logits + row * in.classes;
    const Kept kept(stats, in.batch, row);
    const Slope slope(kept, grad[row]);
    pull_row(z, in.classes, kept, slope, out);
    const std::size_t label = place_of(targets[row], in);
    if (label < in.classes) out[label] = slope.label * exp_negative(z[label] - kept.largest) * kept.scale;
  }
}

void check_labels(const Batch& in, const std::int64_t* labels) {
  const auto last = static_cast<std::int64_t>(in.classes) - 1;
  require_in_range<std::invalid_argument>("targets lie in", labels, in.batch, last);
}

// Calls work(begin, end) for shares of the rows, on as many threads as the `numbers` in each are worth.
template <typename Work>
void share(std::size_t batch, std::size_t numbers, std::size_t threads, const Work& work) {
  const std::size_t worth = batch * numbers / kThreadWork;
  const std::size_t count = std::min({threads, worth + 1, std::max<std::size_t>(batch, 1)});
  const auto edge = [&](std::size_t part) { return batch * part / count; };
  on_threads(count, [&](std::size_t part) { work(edge(part), edge(part + 1)); });
}

}  // namespace

void sensitivity_forward(const Batch& in, const std::int64_t* targets, bool bias, float* stats, float* shown,
                         std::int64_t* predicted, std::size_t threads) {
  check_labels(in, targets);
  share(in.batch, in.classes + in.width, threads, [&](std::size_t begin, std::size_t end) {
    forward_rows(in, targets, bias, stats, shown, predicted, begin, end);
  });
}

void sensitivity_backward(const Batch& in, const std::int64_t* labels, const float* stats, const float* grad,
                          float* grad_logits, float* grad_features, std::size_t threads) {
  check_labels(in, labels);
  share(in.batch, in.classes + in.width, threads, [&](std::size_t begin, std::size_t end) {
    backward_rows(in, labels, stats, grad, grad_logits, grad_features, begin, end);
  });
}

void add_logits(const LogitsPiece& in, const std::int64_t* targets, double* sums, std::size_t threads) {
  share(in.batch, in.classes, threads,
        [&](std::size_t begin, std::size_t end) { add_rows(in, targets, sums, begin, end); });
}

void pull_logits(const LogitsPiece& in, const std::int64_t* targets, const float* stats, const float* grad,
                 float* grad_logits, std::size_t threads) {
  share(in.batch, in.classes, threads, [&](std::size_t begin, std::size_t end) {
    pull_rows(in, targets, stats, grad, grad_logits, begin, end);
  });
}

}  // namespace dau_fast
