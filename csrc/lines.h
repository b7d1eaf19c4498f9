// Walks over packed masks by cache lines: 16 floats and their 2 mask bytes, on several threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "parallel.h"

namespace dau_fast {

constexpr std::size_t kLine = 16;
// Lines that a thread takes at a time: 64 KiB of weights, and a list of lines that stays in L1.
constexpr std::size_t kPieceLines = 1024;
// Weights for which one more thread pays.
constexpr std::size_t kThreadWeights = 1 << 16;

// Bits are tested by table and not by shifting, which compilers do not vectorise for baseline
// x86-64: it has no vector shift by lane.
constexpr std::uint32_t kLineBit[kLine] = {1u << 0,  1u << 1,  1u << 2,  1u << 3, 1u << 4,  1u << 5,
                                           1u << 6,  1u << 7,  1u << 8,  1u << 9, 1u << 10, 1u << 11,
                                           1u << 12, 1u << 13, 1u << 14, 1u << 15};
constexpr std::uint32_t kAll = 0xffff;

// A bitwise select, not a product: masked values become +0.0, whatever they were.
DAU_FAST_INSIDE float select(float value, std::uint32_t kept) {
  const std::uint32_t lanes = kept != 0 ? ~0u : 0u;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) & lanes);
}

// The mask of line `i`; without a mask every weight is kept.
DAU_FAST_INSIDE std::uint32_t line_bits(const std::uint8_t* bits, std::size_t i) {
  return bits ? bits[2 * i] | static_cast<std::uint32_t>(bits[2 * i + 1]) << 8 : kAll;
}

// The mask of a last line of `rest` < 16 weights, of whose bytes only those in use are read.
inline std::uint32_t rest_bits(const std::uint8_t* bits, std::size_t i, std::size_t rest) {
  const std::uint32_t used = (1u << rest) - 1;
  if (!bits) return used;
  const std::uint32_t high = rest > 8 ? bits[2 * i + 1] : 0;
  return (bits[2 * i] | high << 8) & used;
}

// How many weights each tensor has.
template <typename Tensor>
std::vector<std::size_t> sizes_of(const std::vector<Tensor>& tensors) {
  std::vector<std::size_t> sizes;
  for (const Tensor& tensor : tensors) sizes.push_back(tensor.n);
  return sizes;
}

// What a thread takes: whole lines [begin, end) of a tensor, or its last line where `rest` != 0.
struct Piece {
  std::size_t tensor, begin, end, rest;

  // Its first weight, and how many they are.
  std::size_t start() const { return begin * kLine; }
  std::size_t length() const { return (end - begin) * kLine + rest; }
};

inline std::vector<Piece> cut(const std::vector<std::size_t>& sizes) {
  std::vector<Piece> pieces;
  for (std::size_t tensor = 0; tensor < sizes.size(); ++tensor) {
    const std::size_t lines = sizes[tensor] / kLine, rest = sizes[tensor] % kLine;
    for (std::size_t begin = 0; begin < lines; begin += kPieceLines) {
      pieces.push_back({tensor, begin, std::min(lines, begin + kPieceLines), 0});
    }
    if (rest != 0) pieces.push_back({tensor, lines, lines, rest});
  }
  return pieces;
}

// How many of `threads` the weights are worth, at least one.
inline std::size_t worth(const std::vector<std::size_t>& sizes, std::size_t threads) {
  std::size_t weights = 0;
  for (const std::size_t size : sizes) weights += size;
  return std::max<std::size_t>(1, std::min(threads, weights / kThreadWeights + 1));
}

// Calls work(piece) for every piece; a thread that is done takes the next one, because masked lines
// cost less and layers differ in how many they have.
template <typename Work>
void each_piece(const std::vector<std::size_t>& sizes, std::size_t threads, const Work& work) {
  const std::vector<Piece> pieces = cut(sizes);
  std::atomic<std::size_t> next{0};
  on_threads(worth(sizes, threads), [&](std::size_t) {
    for (std::size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < pieces.size();) {
      work(pieces[i]);
    }
  });
}

// Calls lines.step(i, bits) for the lines of `piece` that keep a weight, with lines.fetch(i) ahead of it.
// Where more than 0.3 of them do, it is called for all: memory is read faster in one stretch than
// with gaps that it cannot guess. (Measured on an AMD EPYC: gaps win at 28 % of lines and lose at 56 %.)
template <typename Lines>
DAU_FAST_INSIDE void each_kept_line(const std::uint8_t* bits, const Piece& piece, const Lines& lines) {
  constexpr std::size_t kAhead = 8;
  std::uint32_t kept[kPieceLines + kAhead];
  std::size_t count = 0;
  for (std::size_t i = piece.begin; i < piece.end; ++i) {
    // Without a branch: it would be mispredicted too often.
    kept[count] = static_cast<std::uint32_t>(i - piece.begin);
    count += line_bits(bits, i) != 0;
  }
  if (10 * count > 3 * (piece.end - piece.begin)) {
    for (std::size_t i = piece.begin; i < piece.end; ++i) lines.step(i, line_bits(bits, i));
    return;
  }
  for (std::size_t k = 0; k < kAhead; ++k) kept[count + k] = count ? kept[count - 1] : 0;
  for (std::size_t k = 0; k < count; ++k) {
    lines.fetch(piece.begin + kept[k + kAhead]);
    const std::size_t i = piece.begin + kept[k];
    lines.step(i, line_bits(bits, i));
  }
}

}  // namespace dau_fast
