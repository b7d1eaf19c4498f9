// What the Barlow Twins loss does between its matrix products, in as few passes over each array as can be. The
// mathematics stands in dau_fast/ops/barlow_twins.py. Every array is contiguous, row by row.
#pragma once

#include <cstddef>

namespace dau_fast {

// Two views, [n, d] each.
struct Views {
  const float* a;
  const float* b;
  std::size_t n, d;
};

// Columns less their means, times scale = 1 / sqrt(sum of squares + n eps): views [2, n, d], mean and scale
// [2, d]. c: null, or [d] for sum_n a_n b_n of the normalised columns.
void normalise_views(const Views& in, double eps, float* mean, float* scale, float* views, float* c,
                     std::size_t threads);

// The same by means and scales that are known.
void standardise_views(const Views& in, const float* mean, const float* scale, float* views,
                       std::size_t threads);

// The loss from C [d, d], whose diagonal goes into c [d] and becomes 0. rows, columns [d]: sums of squares of C
// off its diagonal.
double primal_loss(float* correlation, std::size_t d, double lambda, float* c, float* rows, float* columns,
                   std::size_t threads);

// One view's part of the backward pass. own, other: the views normalised, [n, d]; c, scale: [d].
struct Side {
  const float* own;
  const float* other;
  const float* c;
  const float* scale;
  std::size_t n, d;
};

// The view's gradient in place of `pulled` [n, d]: other C or other C^T, C with a zero diagonal, of which
// `squares` [d] are the sums, or, in the Gram form, (other other^T) own with `squares` null.
void finish_gradient(const Side& side, const float* squares, double lambda, double grad_loss, float* pulled,
                     std::size_t threads);

}  // namespace dau_fast
