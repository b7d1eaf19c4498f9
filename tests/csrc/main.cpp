// Tests of csrc/ against plain loops in double, without torch. Arrays end where their memory does, so that
// AddressSanitizer sees every step past them.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "masked_step.h"
#include "packed_masks.h"
#include "selection.h"
#include "sensitivity.h"

namespace {

using Floats = std::vector<float>;
using Flags = std::vector<std::uint8_t>;

const float kNan = std::numeric_limits<float>::quiet_NaN();
// Lines, words and pieces of 16,384, one less, one more, and enough for several threads.
const std::size_t kSizes[] = {0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1000, 16383, 16384, 16401, 300007};
const double kKept[] = {0, 0.003, 0.05, 0.5, 0.95, 1};

std::mt19937 generator(0);

Floats normal(std::size_t n) {
  std::normal_distribution<float> draw;
  Floats values(n);
  for (float& value : values) value = draw(generator);
  return values;
}

Flags flags(std::size_t n, double kept) {
  Flags values(n);
  for (auto& value : values) value = std::bernoulli_distribution(kept)(generator);
  return values;
}

Flags packed(const Flags& keep) {
  Flags bits((keep.size() + 7) / 8);
  dau_fast::pack(keep.data(), bits.data(), keep.size());
  return bits;
}

void clear(Floats& values, const Flags& keep) {
  for (std::size_t i = 0; i < keep.size(); ++i) values[i] = keep[i] ? values[i] : 0.0f;
}

bool same(const Floats& a, const Floats& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](float x, float y) {
    return std::bit_cast<std::uint32_t>(x) == std::bit_cast<std::uint32_t>(y);
  });
}

bool near(float found, double expected) {
  return std::abs(found - expected) <= 1e-5 * (1 + std::abs(expected));
}

bool positive_zero(float value) { return std::bit_cast<std::uint32_t>(value) == 0; }

// ---- masks

void test_pack_unpack_count_apply() {
  for (const std::size_t n : kSizes) {
    for (const double kept : kKept) {
      const Flags keep = flags(n, kept), bits = packed(keep);
      Flags back(n);
      dau_fast::unpack(bits.data(), back.data(), n);
      CHECK(back == keep);
      CHECK(dau_fast::count(bits.data(), n) ==
            static_cast<std::size_t>(std::count(keep.begin(), keep.end(), 1)));
      Floats weights = normal(n);
      for (std::size_t i = 0; i < n; i += 5) weights[i] = kNan;
      Floats expected = weights;
      clear(expected, keep);
      dau_fast::apply({{weights.data(), bits.data(), n}}, 3);
      CHECK(same(weights, expected));
    }
  }
}

void test_apply_to_many_tensors_at_any_address() {
  const Flags keep = flags(50001, 0.5), bits = packed(keep);
  for (const std::size_t offset : {0u, 1u, 3u}) {
    Floats first = normal(50001 + offset), second = normal(9);
    Floats expected = first;
    for (std::size_t i = 0; i < keep.size(); ++i) expected[offset + i] *= keep[i] ? 1.0f : 0.0f;
    for (float& value : expected) value += 0.0f;  // -0 becomes +0
    dau_fast::apply({{first.data() + offset, bits.data(), keep.size()}, {second.data(), bits.data(), 9}}, 2);
    CHECK(same(first, expected));
    for (std::size_t i = 0; i < 9; ++i) CHECK(keep[i] || positive_zero(second[i]));
  }
}

// ---- steps

void test_sgd() {
  for (const std::size_t n : kSizes) {
    for (const double kept : kKept) {
      for (const unsigned kind : {0u, 1u, 2u, 3u, 4u, 5u}) {
        const bool moving = kind >= 1, first = kind == 2, nesterov = kind == 3, maximize = kind == 4;
        const dau_fast::SgdSettings s{0.1,      moving ? 0.9 : 0, nesterov ? 0 : 0.3, kind == 5 ? 0 : 0.02,
                                      nesterov, maximize};
        const Flags keep = flags(n, kept), bits = packed(keep);
        Floats w = normal(n), g = normal(n), m = normal(n);
        for (std::size_t i = 0; i < n; ++i) g[i] = keep[i] ? g[i] : kNan;  // masked gradients do nothing
        clear(w, keep);
        clear(m, keep);
        const Floats w0 = w, m0 = m;
        dau_fast::masked_sgd({{w.data(), g.data(), moving ? m.data() : nullptr, bits.data(), n, first}}, s,
                             3);
        for (std::size_t i = 0; i < n; ++i) {
          if (!keep[i]) {
            CHECK(positive_zero(w[i]) && positive_zero(m[i]));
            continue;
          }
          const double grad = (maximize ? -g[i] : g[i]) + s.weight_decay * w0[i];
          const double momentum = first ? grad : s.momentum * m0[i] + (1 - s.dampening) * grad;
          const double change = !moving ? grad : nesterov ? grad + s.momentum * momentum : momentum;
          CHECK(near(w[i], w0[i] - s.lr * change));
          CHECK(near(m[i], moving ? momentum : m0[i]));
        }
      }
    }
  }
}

void test_adamw() {
  for (const std::size_t n : kSizes) {
    for (const double kept : kKept) {
      for (const float before : {0.0f, 41.0f}) {
        const dau_fast::AdamwSettings s{0.01, 0.9, 0.99, 1e-8, 0.1, before > 0};
        const Flags keep = flags(n, kept), bits = packed(keep);
        Floats w = normal(n), g = normal(n), m = normal(n), v = normal(n);
        for (float& value : v) value = std::abs(value);
        for (std::size_t i = 0; i < n; ++i) g[i] = keep[i] ? g[i] : kNan;
        for (Floats* values : {&w, &m, &v}) clear(*values, keep);
        const Floats w0 = w, m0 = m, v0 = v;
        float step = before;
        dau_fast::masked_adamw({{w.data(), g.data(), m.data(), v.data(), &step, bits.data(), n}}, s, 3);
        CHECK(step == before + 1);
        for (std::size_t i = 0; i < n; ++i) {
          if (!keep[i]) {
            CHECK(positive_zero(w[i]) && positive_zero(m[i]) && positive_zero(v[i]));
            continue;
          }
          const double grad = s.maximize ? -g[i] : g[i];
          const double mean = s.beta1 * m0[i] + (1 - s.beta1) * grad;
          const double square = s.beta2 * v0[i] + (1 - s.beta2) * grad * grad;
          const double corrected = std::sqrt(square / (1 - std::pow(s.beta2, step))) + s.eps;
          const double size = s.lr / (1 - std::pow(s.beta1, step));
          CHECK(near(m[i], mean) && near(v[i], square));
          CHECK(near(w[i], w0[i] * (1 - s.lr * s.weight_decay) - size * mean / corrected));
        }
      }
    }
  }
}

void test_without_a_mask_every_weight_moves() {
  for (const std::size_t n : kSizes) {
    Floats w(n, 1), g(n, 1), m(n);
    dau_fast::masked_sgd({{w.data(), g.data(), m.data(), nullptr, n, true}}, {0.5, 0.9, 0, 0, false, false},
                         2);
    CHECK(same(w, Floats(n, 0.5f)) && same(m, Floats(n, 1)));
  }
}

// ---- selection

void test_selection_against_a_sort() {
  for (const std::size_t n : kSizes) {
    for (const bool coarse : {false, true}) {
      Floats a = normal(n), b = normal(n / 3 + 1);
      if (coarse) {  // many ties
        for (Floats* values : {&a, &b}) {
          for (float& value : *values) value = std::round(2 * value) / 2;
        }
      }
      std::vector<std::pair<float, std::size_t>> order;
      for (const Floats* values : {&a, &b}) {
        for (const float value : *values) order.push_back({std::abs(value), order.size()});
      }
      std::sort(order.begin(), order.end());
      const std::vector<dau_fast::Scores> scores{{a.data(), a.size()}, {b.data(), b.size()}};
      for (const double share : {0.0, 0.3, 0.95, 1.0}) {
        const std::size_t k = std::max<std::size_t>(1, static_cast<std::size_t>(share * order.size()));
        const auto found = dau_fast::select_smallest(scores, k, 3);
        CHECK(found.nan == 0 && found.value == order[k - 1].first);
        Flags bits_a((a.size() + 7) / 8), bits_b((b.size() + 7) / 8);
        const std::size_t ties = k - found.below;
        dau_fast::mask_smallest(scores, {bits_a.data(), bits_b.data()}, found.value, ties,
                                ties == found.equal, 3);
        Flags keep(order.size(), 1), keep_a(a.size()), keep_b(b.size());
        for (std::size_t i = 0; i < k; ++i) keep[order[i].second] = 0;
        dau_fast::unpack(bits_a.data(), keep_a.data(), a.size());
        dau_fast::unpack(bits_b.data(), keep_b.data(), b.size());
        keep_a.insert(keep_a.end(), keep_b.begin(), keep_b.end());
        CHECK(keep_a == keep);
      }
    }
  }
}

void test_selection_counts_nan() {
  Floats values = normal(1001);
  values[1000] = kNan;
  values[3] = -kNan;
  values[4] = std::numeric_limits<float>::infinity();
  CHECK(dau_fast::select_smallest({{values.data(), values.size()}}, 5, 2).nan == 2);
}

// ---- sensitivity

struct Sensitivity {
  Floats logits, features, stats, shown;
  std::vector<std::int64_t> labels;
  dau_fast::Batch batch;

  // Whatever is not written stays NaN, or -1.
  Sensitivity(Floats z, Floats h, std::size_t rows, bool softmax)
      : logits(std::move(z)), features(std::move(h)), stats(5 * rows, kNan), labels(rows, -1) {
    const std::size_t classes = logits.size() / rows;
    shown.assign(rows * (softmax ? classes + 1 : 1), kNan);
    batch = {logits.data(), features.data(), rows, classes, features.size() / rows, softmax};
  }

  void forward(const std::int64_t* targets, bool bias, std::size_t threads) {
    dau_fast::sensitivity_forward(batch, targets, bias, stats.data(), shown.data(), labels.data(), threads);
  }

  void backward(const std::int64_t* targets, const float* grad, float* grad_z, float* grad_h,
                std::size_t threads) const {
    dau_fast::sensitivity_backward(batch, targets, stats.data(), grad, grad_z, grad_h, threads);
  }
};

void test_sensitivity_by_hand() {
  // p = (1/2, 1/2), p - e_y = (-1/2, 1/2), ||h|| = 5: s = sqrt(1/2) sqrt(25 + 1), and without a bias sqrt(1/2) 5.
  const std::int64_t first = 0;
  Sensitivity even({7, 7}, {3, 4}, 1, true);
  even.forward(&first, true, 1);
  CHECK(near(even.shown[0], 0.5) && near(even.shown[1], 0.5) && near(even.shown[2], std::sqrt(13)));
  const float grad[] = {0, 0, 1};
  Floats grad_z(2, kNan), grad_h(2, kNan);
  even.backward(&first, grad, grad_z.data(), grad_h.data(), 1);
  // ds/dz = length / pull p (e - <p, e>) = sqrt(52) (-1/4, 1/4); ds/dh = pull / length h = h / sqrt(52).
  CHECK(near(grad_z[0], -std::sqrt(3.25)) && near(grad_z[1], std::sqrt(3.25)));
  CHECK(near(grad_h[0], 3 / std::sqrt(52)) && near(grad_h[1], 4 / std::sqrt(52)));
  Sensitivity alone({7, 7}, {3, 4}, 1, false);
  alone.forward(&first, false, 1);
  CHECK(near(alone.shown[0], std::sqrt(12.5)));
  // The first of equal logits is the prediction; one class is always right, and what is far below has p = 0.
  Sensitivity predicted({1, 1, -300, 5, 9, 9}, {0, 0}, 2, true);
  predicted.forward(nullptr, true, 2);
  CHECK(predicted.labels == (std::vector<std::int64_t>{0, 1}));
  CHECK(positive_zero(predicted.shown[2]));
  Sensitivity certain({-3}, {2}, 1, false);
  certain.forward(&first, true, 1);
  CHECK(certain.shown[0] == 0);
}

void test_sensitivity_against_double() {
  struct Size {
    std::size_t batch, classes, width;
  };
  // Odd tails, sums of more than one block of 1,024, and enough numbers for three threads.
  const Size sizes[] = {{1, 2, 1},     {3, 7, 0},    {5, 9, 17},   {2, 16, 64},
                        {4, 33, 1025}, {2, 1024, 3}, {2, 2051, 5}, {3, 700001, 9}};
  for (const auto [rows, classes, width] : sizes) {
    for (const bool softmax : {false, true}) {
      for (const bool given : {false, true}) {
        Sensitivity found(normal(rows * classes), normal(rows * width), rows, softmax);
        std::vector<std::int64_t> targets(rows);
        for (auto& target : targets) target = static_cast<std::int64_t>(generator() % classes);
        found.forward(given ? targets.data() : nullptr, given, 3);
        const std::vector<std::int64_t>& labels = given ? targets : found.labels;
        const Floats grad = normal(found.shown.size());
        Floats grad_z(rows * classes, kNan), grad_h(rows * width, kNan);
        found.backward(labels.data(), grad.data(), grad_z.data(), grad_h.data(), 3);
        for (std::size_t row = 0; row < rows; ++row) {
          const float *z = &found.logits[row * classes], *h = found.features.data() + row * width;
          const std::size_t columns = softmax ? classes + 1 : 1;
          const float *shown = &found.shown[row * columns], *g = &grad[row * columns];
          const auto label = static_cast<std::size_t>(labels[row]);
          if (!given) CHECK(z[label] == *std::max_element(z, z + classes));
          std::vector<double> p(z, z + classes);
          double sum = 0, pull = 0, length = given ? 1 : 0, mean = 0, along = 0;
          for (double& value : p) sum += value = std::exp(value);
          for (double& value : p) value /= sum;
          for (std::size_t i = 0; i < width; ++i) length += double(h[i]) * h[i];
          for (std::size_t i = 0; i < classes; ++i) {
            const double error = p[i] - (i == label ? 1 : 0);
            pull += error * error;
            along += p[i] * error;
            if (softmax) mean += p[i] * g[i];
          }
          pull = std::sqrt(pull);
          length = std::sqrt(length);
          CHECK(near(shown[columns - 1], pull * length));
          for (std::size_t i = 0; i < classes; ++i) {
            const double error = p[i] - (i == label ? 1 : 0);
            const double by_s = g[columns - 1] * length / pull * p[i] * (error - along);
            CHECK(near(grad_z[row * classes + i], by_s + (softmax ? p[i] * (g[i] - mean) : 0)));
            if (softmax) CHECK(near(shown[i], p[i]));
          }
          for (std::size_t i = 0; i < width; ++i) {
            CHECK(near(grad_h[row * width + i], g[columns - 1] * pull / length * h[i]));
          }
        }
      }
    }
  }
}

void test_sensitivity_refuses_targets_and_leaves_out_what_is_not_wanted() {
  for (const std::int64_t wrong : {std::int64_t{-1}, std::int64_t{4}}) {
    const std::int64_t targets[] = {0, 3, wrong};
    Sensitivity found(normal(12), normal(6), 3, true);
    const std::string range = wrong < 0 ? "-1 to 3" : "0 to 4";
    const auto refused = [&](auto&& call) {
      return says<std::invalid_argument>(call, "targets lie in " + range + ": expected 0 to 3");
    };
    CHECK(refused([&] { found.forward(targets, true, 2); }));
    for (const float value : found.shown) CHECK(std::isnan(value));
    Floats grad_z(12, kNan);
    CHECK(refused([&] { found.backward(targets, found.shown.data(), grad_z.data(), nullptr, 2); }));
    for (const float value : grad_z) CHECK(std::isnan(value));
  }
  const std::int64_t targets[] = {0, 3, 1};
  Sensitivity found(normal(12), normal(6), 3, false);
  found.forward(targets, true, 2);
  Floats grad_z(12, kNan), grad_h(6, kNan), both_z(12), both_h(6);
  const Floats grad = normal(3);
  found.backward(targets, grad.data(), grad_z.data(), nullptr, 2);
  found.backward(targets, grad.data(), nullptr, grad_h.data(), 2);
  found.backward(targets, grad.data(), both_z.data(), both_h.data(), 2);
  CHECK(same(grad_z, both_z) && same(grad_h, both_h));
  Sensitivity none({}, {}, 1, false);
  none.batch.batch = 0;
  none.forward(targets, true, 2);
}

}  // namespace

int main() {
  test_pack_unpack_count_apply();
  test_apply_to_many_tensors_at_any_address();
  test_sgd();
  test_adamw();
  test_without_a_mask_every_weight_moves();
  test_selection_against_a_sort();
  test_selection_counts_nan();
  test_sensitivity_by_hand();
  test_sensitivity_against_double();
  test_sensitivity_refuses_targets_and_leaves_out_what_is_not_wanted();
  test_image_batch();
  test_arguments();
}
