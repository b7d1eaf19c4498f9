#include "masked_step.h"

#include <cmath>

#include "lines.h"

namespace dau_fast {
namespace {

// ---- SGD

struct SgdFactors {
  float sign, decay, momentum;
  float old, fresh;  // what momentum takes of itself and of the gradient
  float lr;
  bool nesterov;
};

SgdFactors factors(const SgdSettings& s, bool first) {
  const double old = first ? 0 : s.momentum, fresh = first ? 1 : 1 - s.dampening;
  return {s.maximize ? -1.0f : 1.0f,
          static_cast<float>(s.weight_decay),
          static_cast<float>(s.momentum),
          static_cast<float>(old),
          static_cast<float>(fresh),
          static_cast<float>(s.lr),
          s.nesterov};
}

template <bool kMomentum>
struct SgdLines {
  float* weights;
  const float* grads;
  float* momentum;
  SgdFactors f;

  DAU_FAST_INSIDE void fetch(std::size_t i) const {
    DAU_FAST_PREFETCH(weights + i * kLine, 1);
    DAU_FAST_PREFETCH(grads + i * kLine, 0);
    if constexpr (kMomentum) DAU_FAST_PREFETCH(momentum + i * kLine, 1);
  }

  DAU_FAST_INSIDE void step(std::size_t i, std::uint32_t bits) const {
    float* w = weights + i * kLine;
    const float* g = grads + i * kLine;
    float* m = kMomentum ? momentum + i * kLine : nullptr;
#pragma omp simd
    for (std::size_t j = 0; j < kLine; ++j) {
      const std::uint32_t kept = bits & kLineBit[j];
      const float own = f.sign * g[j];
      // Without decay an infinite weight must not become NaN.
      const float grad = f.decay != 0 ? own + f.decay * w[j] : own;
      float change = grad;
      if constexpr (kMomentum) {
        const float moved = f.old * m[j] + f.fresh * grad;
        change = f.nesterov ? grad + f.momentum * moved : moved;
        m[j] = select(moved, kept);
      }
      w[j] = select(w[j] - f.lr * change, kept);
    }
  }
};

template <bool kMomentum>
DAU_FAST_INSIDE void sgd_piece(const SgdTensor& t, const SgdFactors& f, const Piece& piece) {
  each_kept_line(t.bits, piece, SgdLines<kMomentum>{t.weights, t.grads, t.momentum, f});
}

DAU_FAST_WIDE
void sgd_lines(const SgdTensor& t, const SgdFactors& f, const Piece& piece) {
  if (t.momentum) {
    sgd_piece<true>(t, f, piece);
  } else {
    sgd_piece<false>(t, f, piece);
  }
}

// The last line of a tensor, in a whole line of its own.
void sgd_rest(const SgdTensor& t, const SgdFactors& f, const Piece& piece) {
  const std::size_t start = piece.start(), rest = piece.rest;
  const std::uint32_t bits = rest_bits(t.bits, piece.begin, rest);
  if (bits == 0) return;
  float w[kLine] = {}, g[kLine] = {}, m[kLine] = {};
  std::copy_n(t.weights + start, rest, w);
  std::copy_n(t.grads + start, rest, g);
  if (t.momentum) {
    std::copy_n(t.momentum + start, rest, m);
    SgdLines<true>{w, g, m, f}.step(0, bits);
    std::copy_n(m, rest, t.momentum + start);
  } else {
    SgdLines<false>{w, g, nullptr, f}.step(0, bits);
  }
  std::copy_n(w, rest, t.weights + start);
}

// ---- AdamW

struct AdamwFactors {
  float sign, shrink, fresh1, beta2, fresh2, eps;
  float size, root;  // lr / (1 - beta1^t) and 1 / sqrt(1 - beta2^t)
};

AdamwFactors factors(const AdamwSettings& s, double t) {
  return {s.maximize ? -1.0f : 1.0f,
          static_cast<float>(1 - s.lr * s.weight_decay),
          static_cast<float>(1 - s.beta1),
          static_cast<float>(s.beta2),
          static_cast<float>(1 - s.beta2),
          static_cast<float>(s.eps),
          static_cast<float>(s.lr / (1 - std::pow(s.beta1, t))),
          static_cast<float>(1 / std::sqrt(1 - std::pow(s.beta2, t)))};
}

struct AdamwLines {
  float* weights;
  const float* grads;
  float* exp_avg;
  float* exp_avg_sq;
  AdamwFactors f;

  DAU_FAST_INSIDE void fetch(std::size_t i) const {
    DAU_FAST_PREFETCH(weights + i * kLine, 1);
    DAU_FAST_PREFETCH(grads + i * kLine, 0);
    DAU_FAST_PREFETCH(exp_avg + i * kLine, 1);
    DAU_FAST_PREFETCH(exp_avg_sq + i * kLine, 1);
  }

  DAU_FAST_INSIDE void step(std::size_t i, std::uint32_t bits) const {
    float* w = weights + i * kLine;
    const float* g = grads + i * kLine;
    float* m = exp_avg + i * kLine;
    float* v = exp_avg_sq + i * kLine;
#pragma omp simd
    for (std::size_t j = 0; j < kLine; ++j) {
      const std::uint32_t kept = bits & kLineBit[j];
      const float grad = f.sign * g[j];
      const float mean = m[j] + f.fresh1 * (grad - m[j]);
      const float square = f.beta2 * v[j] + f.fresh2 * grad * grad;
      const float moved = f.size * mean / (std::sqrt(square) * f.root + f.eps);
      m[j] = select(mean, kept);
      v[j] = select(square, kept);
      w[j] = select(f.shrink * w[j] - moved, kept);
    }
  }
};

DAU_FAST_WIDE
void adamw_lines(const AdamwTensor& t, const AdamwFactors& f, const Piece& piece) {
  each_kept_line(t.bits, piece, AdamwLines{t.weights, t.grads, t.exp_avg, t.exp_avg_sq, f});
}

void adamw_rest(const AdamwTensor& t, const AdamwFactors& f, const Piece& piece) {
  const std::size_t start = piece.start(), rest = piece.rest;
  const std::uint32_t bits = rest_bits(t.bits, piece.begin, rest);
  if (bits == 0) return;
  float w[kLine] = {}, g[kLine] = {}, m[kLine] = {}, v[kLine] = {};
  std::copy_n(t.weights + start, rest, w);
  std::copy_n(t.grads + start, rest, g);
  std::copy_n(t.exp_avg + start, rest, m);
  std::copy_n(t.exp_avg_sq + start, rest, v);
  AdamwLines{w, g, m, v, f}.step(0, bits);
  std::copy_n(w, rest, t.weights + start);
  std::copy_n(m, rest, t.exp_avg + start);
  std::copy_n(v, rest, t.exp_avg_sq + start);
}

}  // namespace

void masked_sgd(const std::vector<SgdTensor>& tensors, const SgdSettings& settings, std::size_t threads) {
  const SgdFactors later = factors(settings, false), first = factors(settings, true);
  each_piece(sizes_of(tensors), threads, [&](const Piece& piece) {
    const SgdTensor& tensor = tensors[piece.tensor];
    (piece.rest ? sgd_rest : sgd_lines)(tensor, tensor.first ? first : later, piece);
  });
}

void masked_adamw(const std::vector<AdamwTensor>& tensors, const AdamwSettings& settings,
                  std::size_t threads) {
  std::vector<AdamwFactors> now;
  for (const AdamwTensor& tensor : tensors) now.push_back(factors(settings, *tensor.step += 1));
  each_piece(sizes_of(tensors), threads, [&](const Piece& piece) {
    (piece.rest ? adamw_rest : adamw_lines)(tensors[piece.tensor], now[piece.tensor], piece);
  });
}

}  // namespace dau_fast
