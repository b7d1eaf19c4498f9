#include "barlow_twins.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "parallel.h"

namespace dau_fast {
namespace {

// Rows whose sum is kept in float; longer sums are put together in double.
constexpr std::size_t kBlock = 64;
// Columns that a thread takes at least, a cache line, and numbers for which one more thread pays.
constexpr std::size_t kLine = 16, kThreadWork = 1 << 16;

// The columns [begin, end) of arrays [n, d]; what belongs to columns is given from the first column on.
struct Columns {
  std::size_t n, d, begin, end;

  std::size_t width() const { return end - begin; }
  std::size_t at(std::size_t row) const { return row * d + begin; }
};

// Adds x to `total`, or with kProducts x y, by columns. shift: what x and y are less by, or null.
template <bool kProducts>
DAU_FAST_INSIDE void add_columns(const Columns& in, const float* x, const float* y, const float* shift,
                                 std::vector<double>& total) {
  const std::size_t width = in.width();
  std::vector<float> part(width);
  float* sums = part.data();
  for (std::size_t start = 0; start < in.n; start += kBlock) {
    std::fill(part.begin(), part.end(), 0.0f);
    for (std::size_t row = start; row < std::min(in.n, start + kBlock); ++row) {
      const float *left = x + in.at(row), *right = y + in.at(row);
      if constexpr (!kProducts) {
#pragma omp simd
        for (std::size_t j = 0; j < width; ++j) sums[j] += left[j];
      } else if (shift) {
#pragma omp simd
        for (std::size_t j = 0; j < width; ++j) sums[j] += (left[j] - shift[j]) * (right[j] - shift[j]);
      } else {
#pragma omp simd
        for (std::size_t j = 0; j < width; ++j) sums[j] += left[j] * right[j];
      }
    }
    for (std::size_t j = 0; j < width; ++j) total[j] += sums[j];
  }
}

DAU_FAST_INSIDE void standardise(const Columns& in, const float* z, const float* mean, const float* scale,
                                 float* out) {
  for (std::size_t row = 0; row < in.n; ++row) {
    const float* from = z + in.at(row);
    float* to = out + in.at(row);
#pragma omp simd
    for (std::size_t j = 0; j < in.width(); ++j) to[j] = (from[j] - mean[j]) * scale[j];
  }
}

DAU_FAST_WIDE
void normalise_columns(const Columns& in, const float* z, double eps, float* mean, float* scale, float* out) {
  std::vector<double> total(in.width());
  const auto n = static_cast<double>(in.n);
  add_columns<false>(in, z, z, nullptr, total);
  for (std::size_t j = 0; j < in.width(); ++j) mean[j] = static_cast<float>(total[j] / n);
  std::fill(total.begin(), total.end(), 0.0);
  add_columns<true>(in, z, z, mean, total);
  for (std::size_t j = 0; j < in.width(); ++j)
    scale[j] = static_cast<float>(1 / std::sqrt(total[j] + n * eps));
  standardise(in, z, mean, scale, out);
}

DAU_FAST_WIDE
void standardise_columns(const Columns& in, const float* z, const float* mean, const float* scale,
                         float* out) {
  standardise(in, z, mean, scale, out);
}

DAU_FAST_WIDE
void multiply_columns(const Columns& in, const float* x, const float* y, std::vector<double>& total) {
  add_columns<true>(in, x, y, nullptr, total);
}

// Factors of pulled, other and own, by columns.
struct Factors {
  std::vector<float> pulled, other, own;
};

DAU_FAST_WIDE
void combine_columns(const Columns& in, const Factors& by, const float* own, const float* other,
                     float* pulled) {
  const float *of_pulled = by.pulled.data(), *of_other = by.other.data(), *of_own = by.own.data();
  for (std::size_t row = 0; row < in.n; ++row) {
    const float *x = own + in.at(row), *y = other + in.at(row);
    float* out = pulled + in.at(row);
#pragma omp simd
    for (std::size_t j = 0; j < in.width(); ++j) {
      out[j] = of_pulled[j] * out[j] + of_other[j] * y[j] + of_own[j] * x[j];
    }
  }
}

// Sums of squares of the rows [begin, end) of C off its diagonal, by row, and added to `columns`.
DAU_FAST_WIDE
void square_rows(const float* correlation, std::size_t d, float* rows, std::vector<double>& columns,
                 std::size_t begin, std::size_t end) {
  constexpr std::size_t kRow = 1024;
  std::vector<float> part(d);
  float* down = part.data();
  for (std::size_t i = begin; i < end; ++i) {
    const float* row = correlation + i * d;
    double total = 0;
    for (std::size_t start = 0; start < d; start += kRow) {
      float across = 0;
#pragma omp simd reduction(+ : across)
      for (std::size_t j = start; j < std::min(d, start + kRow); ++j) {
        const float square = row[j] * row[j];
        across += square;
        down[j] += square;
      }
      total += across;
    }
    rows[i] = static_cast<float>(total);
    if ((i - begin) % kBlock == kBlock - 1 || i + 1 == end) {
      for (std::size_t j = 0; j < d; ++j) columns[j] += down[j];
      std::fill(part.begin(), part.end(), 0.0f);
    }
  }
}

// Calls work(columns) for shares of the columns of arrays [n, d].
template <typename Work>
void share(std::size_t n, std::size_t d, std::size_t threads, const Work& work) {
  const std::size_t most = std::max<std::size_t>(d / kLine, 1);
  const std::size_t count = std::min({threads, n * d / kThreadWork + 1, most});
  const auto edge = [&](std::size_t part) { return part == count ? d : most * part / count * kLine; };
  on_threads(count, [&](std::size_t part) { work(Columns{n, d, edge(part), edge(part + 1)}); });
}

}  // namespace

void normalise_views(const Views& in, double eps, float* mean, float* scale, float* views, float* c,
                     std::size_t threads) {
  float* second = views + in.n * in.d;
  share(in.n, in.d, threads, [&](const Columns& columns) {
    const std::size_t first = columns.begin, of_b = in.d + first;
    normalise_columns(columns, in.a, eps, mean + first, scale + first, views);
    normalise_columns(columns, in.b, eps, mean + of_b, scale + of_b, second);
    if (!c) return;
    std::vector<double> total(columns.width());
    multiply_columns(columns, views, second, total);
    std::transform(total.begin(), total.end(), c + first, [](double sum) { return static_cast<float>(sum); });
  });
}

void standardise_views(const Views& in, const float* mean, const float* scale, float* views,
                       std::size_t threads) {
  share(in.n, in.d, threads, [&](const Columns& columns) {
    const std::size_t first = columns.begin, of_b = in.d + first;
    standardise_columns(columns, in.a, mean + first, scale + first, views);
    standardise_columns(columns, in.b, mean + of_b, scale + of_b, views + in.n * in.d);
  });
}

double primal_loss(float* correlation, std::size_t d, double lambda, float* c, float* rows, float* columns,
                   std::size_t threads) {
  double loss = 0;
  for (std::size_t i = 0; i < d; ++i) {
    c[i] = std::exchange(correlation[i * d + i], 0.0f);
    loss += (1.0 - c[i]) * (1.0 - c[i]);
  }
  const std::size_t count = std::min({threads, d * d / kThreadWork + 1, std::max<std::size_t>(d, 1)});
  std::vector<std::vector<double>> totals(count, std::vector<double>(d));
  on_threads(count, [&](std::size_t part) {
    square_rows(correlation, d, rows, totals[part], d * part / count, d * (part + 1) / count);
  });
  for (std::size_t i = 0; i < d; ++i) {
    double total = 0;
    for (const auto& part : totals) total += part[i];
    columns[i] = static_cast<float>(total);
    loss += lambda * rows[i];
  }
  return loss;
}

void finish_gradient(const Side& side, const float* squares, double lambda, double grad_loss, float* pulled,
                     std::size_t threads) {
  share(side.n, side.d, threads, [&](const Columns& columns) {
    const std::size_t width = columns.width();
    std::vector<double> total(width);
    if (squares) {
      std::copy_n(squares + columns.begin, width, total.begin());
    } else {
      multiply_columns(columns, side.own, pulled, total);
    }
    Factors by{std::vector<float>(width), std::vector<float>(width), std::vector<float>(width)};
    for (std::size_t j = 0; j < width; ++j) {
      const double c = side.c[columns.begin + j], factor = side.scale[columns.begin + j] * grad_loss;
      // The diagonal of G; the Gram form's squares still hold C's diagonal.
      const double slope = 2 * (c - 1) - (squares ? 0 : 2 * lambda * c);
      by.pulled[j] = static_cast<float>(2 * lambda * factor);
      by.other[j] = static_cast<float>(slope * factor);
      by.own[j] = static_cast<float>(-(slope * c + 2 * lambda * total[j]) * factor);
    }
    combine_columns(columns, by, side.own, side.other, pulled);
  });
}

}  // namespace dau_fast
