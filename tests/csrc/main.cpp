// Tests of csrc/ against plain loops in double, without torch. Arrays end where their memory does, so that
// AddressSanitizer sees every step past them.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "check.h"
#include "masked_step.h"
#include "packed_masks.h"
#include "selection.h"

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
        const dau_fast::SgdSettings s{0.1, moving ? 0.9 : 0, nesterov ? 0 : 0.3, kind == 5 ? 0 : 0.02,
                                      nesterov, maximize};
        const Flags keep = flags(n, kept), bits = packed(keep);
        Floats w = normal(n), g = normal(n), m = normal(n);
        for (std::size_t i = 0; i < n; ++i) g[i] = keep[i] ? g[i] : kNan;  // masked gradients do nothing
        clear(w, keep);
        clear(m, keep);
        const Floats w0 = w, m0 = m;
        dau_fast::masked_sgd({{w.data(), g.data(), moving ? m.data() : nullptr, bits.data(), n, first}}, s, 3);
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
    dau_fast::masked_sgd({{w.data(), g.data(), m.data(), nullptr, n, true}}, {0.5, 0.9, 0, 0, false, false}, 2);
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

}  // namespace

int main() {
  test_pack_unpack_count_apply();
  test_apply_to_many_tensors_at_any_address();
  test_sgd();
  test_adamw();
  test_without_a_mask_every_weight_moves();
  test_selection_against_a_sort();
  test_selection_counts_nan();
  test_image_batch();
}
