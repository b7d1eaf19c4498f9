#include "packed_masks.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "lines.h"

namespace dau_fast {
namespace {

constexpr std::size_t kBits = 8;
constexpr std::size_t kWordBits = 64;
constexpr std::size_t kWordBytes = kWordBits / kBits;

// Bits are tested by table and not by shifting, which compilers do not vectorise for baseline
// x86-64: it has no vector shift by lane.
constexpr std::uint8_t kBit[kBits] = {1, 2, 4, 8, 16, 32, 64, 128};

constexpr bool bit(std::uint8_t byte, std::size_t i) { return (byte & kBit[i]) != 0; }

// A mask may start at any byte, so words are copied out and never read through a cast pointer. The
// byte order of the result depends on the machine; its number of ones does not.
std::uint64_t load_word(const std::uint8_t* bits) {
  std::uint64_t word;
  std::memcpy(&word, bits, sizeof word);
  return word;
}

// The `n` < 8 bits that are in use of the last byte.
std::uint8_t low_bits(std::uint8_t byte, std::size_t n) {
  return static_cast<std::uint8_t>(byte & ((1u << n) - 1u));
}

std::uint8_t pack_byte(const std::uint8_t* flags, std::size_t n) {
  std::uint8_t byte = 0;
  for (std::size_t i = 0; i < n; ++i) byte |= static_cast<std::uint8_t>((flags[i] != 0) << i);
  return byte;
}

void unpack_byte(std::uint8_t byte, std::uint8_t* flags, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) flags[i] = bit(byte, i);
}

// Whole bytes of bits for `n` weights, a multiple of 8. A word that keeps all its weights costs no traffic;
// other words are not tested, as mispredicted branches cost more than the work.
DAU_FAST_WIDE
void apply_bytes(float* weights, const std::uint8_t* bits, std::size_t n) {
  for (; n >= kWordBits; n -= kWordBits, weights += kWordBits, bits += kWordBytes) {
    if (load_word(bits) == ~std::uint64_t{0}) continue;
    for (std::size_t i = 0; i < kWordBits / kLine; ++i) {
      const std::uint32_t kept = line_bits(bits, i);
      float* line = weights + i * kLine;
#pragma omp simd
      for (std::size_t j = 0; j < kLine; ++j) line[j] = select(line[j], kept & kLineBit[j]);
    }
  }
  for (; n >= kBits; n -= kBits, weights += kBits, ++bits) {
    for (std::size_t j = 0; j < kBits; ++j) weights[j] = select(weights[j], *bits & kLineBit[j]);
  }
}

void apply_range(float* weights, const std::uint8_t* bits, std::size_t n) {
  const std::size_t whole = n - n % kBits;
  apply_bytes(weights, bits, whole);
  for (std::size_t i = whole; i < n; ++i)
    weights[i] = bit(bits[whole / kBits], i - whole) ? weights[i] : 0.0f;
}

}  // namespace

void pack(const std::uint8_t* flags, std::uint8_t* bits, std::size_t n) {
  const std::size_t whole = n / kBits, rest = n % kBits;
  for (std::size_t i = 0; i < whole; ++i) bits[i] = pack_byte(flags + i * kBits, kBits);
  if (rest != 0) bits[whole] = pack_byte(flags + whole * kBits, rest);
}

void unpack(const std::uint8_t* bits, std::uint8_t* flags, std::size_t n) {
  const std::size_t whole = n / kBits, rest = n % kBits;
  for (std::size_t i = 0; i < whole; ++i) unpack_byte(bits[i], flags + i * kBits, kBits);
  if (rest != 0) unpack_byte(bits[whole], flags + whole * kBits, rest);
}

void apply(const std::vector<MaskedTensor>& tensors, std::size_t threads) {
  each_piece(sizes_of(tensors), threads, [&](const Piece& piece) {
    const auto [weights, bits, n] = tensors[piece.tensor];
    apply_range(weights + piece.start(), bits + piece.start() / kBits, piece.length());
  });
}

std::size_t count(const std::uint8_t* bits, std::size_t n) {
  std::size_t kept = 0;
  for (; n >= kWordBits; n -= kWordBits, bits += kWordBytes) kept += std::popcount(load_word(bits));
  for (; n >= kBits; n -= kBits, ++bits) kept += std::popcount(*bits);
  if (n != 0) kept += std::popcount(low_bits(*bits, n));
  return kept;
}

}  // namespace dau_fast
