#include "selection.h"

#include <bit>
#include <cmath>
#include <mutex>

#include "lines.h"

namespace dau_fast {
namespace {

// Absolute values of floats are ordered as their bits are, read as integers; NaN comes last.
constexpr std::uint32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;

DAU_FAST_INSIDE std::uint32_t magnitude(float value) {
  return std::bit_cast<std::uint32_t>(value) & kMagnitude;
}

// How many values with the digits `prefix` above `shift + width` have each digit of `width` bits.
std::vector<std::size_t> histogram(const std::vector<Scores>& tensors, std::uint32_t prefix, int shift,
                                   int width, std::size_t threads) {
  const std::uint32_t digits = (1u << width) - 1;
  std::vector<std::size_t> total(digits + 1);
  std::mutex own;
  const auto sizes = sizes_of(tensors);
  const std::vector<Piece> pieces = cut(sizes);
  const std::size_t parts = worth(sizes, threads);
  on_threads(parts, [&](std::size_t part) {
    // Two counters a digit: neighbours are often equal, and would wait for each other.
    std::vector<std::size_t> counts(2 * (digits + 1));
    for (std::size_t p = part; p < pieces.size(); p += parts) {
      const float* values = tensors[pieces[p].tensor].values + pieces[p].start();
      const std::size_t n = pieces[p].length();
      for (std::size_t i = 0; i < n; ++i) {
        const std::uint32_t bits = magnitude(values[i]);
        if (bits >> shift >> width == prefix) counts[2 * ((bits >> shift) & digits) + i % 2] += 1;
      }
    }
    const std::lock_guard lock(own);
    for (std::size_t d = 0; d <= digits; ++d) total[d] += counts[2 * d] + counts[2 * d + 1];
  });
  return total;
}

DAU_FAST_WIDE
std::size_t count_nan(const float* values, std::size_t n) {
  std::size_t found = 0;
#pragma omp simd reduction(+ : found)
  for (std::size_t i = 0; i < n; ++i) found += magnitude(values[i]) > kInfinity;
  return found;
}

std::size_t count_nan(const std::vector<Scores>& tensors, std::size_t threads) {
  std::atomic<std::size_t> found{0};
  each_piece(sizes_of(tensors), threads, [&](const Piece& piece) {
    found += count_nan(tensors[piece.tensor].values + piece.start(), piece.length());
  });
  return found;
}

// The bits of up to eight values; `ties` falls by those that it dropped.
std::uint8_t mask_byte(const float* values, std::size_t n, std::uint32_t threshold, std::size_t& ties) {
  std::uint8_t byte = 0;
  for (std::size_t j = 0; j < n; ++j) {
    const std::uint32_t bits = magnitude(values[j]);
    const bool tie = bits == threshold && ties != 0;
    ties -= tie;
    byte |= static_cast<std::uint8_t>((bits >= threshold && !tie) << j);
  }
  return byte;
}

// Drops everything up to and with `threshold`.
DAU_FAST_WIDE
void mask_bytes(const float* values, std::size_t n, std::uint32_t threshold, std::uint8_t* bits) {
  for (std::size_t i = 0; i < n; i += 8) {
    std::uint32_t byte = 0;
    const std::size_t end = n - i < 8 ? n - i : 8;
    for (std::size_t j = 0; j < end; ++j) {
      byte |= static_cast<std::uint32_t>(magnitude(values[i + j]) > threshold) << j;
    }
    bits[i / 8] = static_cast<std::uint8_t>(byte);
  }
}

}  // namespace

Selection select_smallest(const std::vector<Scores>& tensors, std::size_t k, std::size_t threads) {
  Selection found{0, 0, 0, count_nan(tensors, threads)};
  if (found.nan != 0) return found;
  // Digit by digit, 11 + 10 + 10 bits: each pass reads the values once and keeps one digit's worth.
  struct Digit {
    int shift, width;
  };
  std::uint32_t value = 0;
  for (const auto [shift, width] : {Digit{20, 11}, Digit{10, 10}, Digit{0, 10}}) {
    const auto counts = histogram(tensors, value, shift, width, threads);
    std::uint32_t digit = 0;
    // Bounded by the digits as well: the values may be changed meanwhile.
    while (digit + 1 < counts.size() && found.below + counts[digit] < k) found.below += counts[digit++];
    value = value << width | digit;
    found.equal = counts[digit];
  }
  found.value = std::bit_cast<float>(value);
  return found;
}

void mask_smallest(const std::vector<Scores>& tensors, const std::vector<std::uint8_t*>& bits,
                   float threshold, std::size_t ties, bool all_ties, std::size_t threads) {
  const std::uint32_t limit = magnitude(threshold);
  if (all_ties) {
    each_piece(sizes_of(tensors), threads, [&](const Piece& piece) {
      mask_bytes(tensors[piece.tensor].values + piece.start(), piece.length(), limit,
                 bits[piece.tensor] + piece.start() / 8);
    });
    return;
  }
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    const auto [values, n] = tensors[t];
    for (std::size_t i = 0; i < n; i += 8) {
      bits[t][i / 8] = mask_byte(values + i, std::min<std::size_t>(8, n - i), limit, ties);
    }
  }
}

}  // namespace dau_fast
