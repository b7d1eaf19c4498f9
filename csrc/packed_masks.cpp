#include "packed_masks.h"

#include <algorithm>
#include <array>
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

float select(float weight, std::uint32_t select_bits) {
  // A bitwise select, not a product: 0 * NaN would stay NaN, and 0 * -1 would be -0.
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(weight) & select_bits);
}

// Four bits spread to four lanes, again by table: this runs at memory speed on one core, a branch a
// weight does not.
constexpr auto kLanes = [] {
  std::array<std::array<std::uint32_t, 4>, 16> lanes{};
  for (std::uint8_t bits = 0; bits < 16; ++bits) {
    for (std::size_t i = 0; i < 4; ++i) lanes[bits][i] = bit(bits, i) ? ~0u : 0u;
  }
  return lanes;
}();

void apply_four(float* weights, std::uint8_t bits) {
  for (std::size_t i = 0; i < 4; ++i) weights[i] = select(weights[i], kLanes[bits][i]);
}

void apply_byte(float* weights, std::uint8_t byte) {
  apply_four(weights, low_bits(byte, 4));
  apply_four(weights + 4, static_cast<std::uint8_t>(byte >> 4));
}

void apply_range(float* weights, const std::uint8_t* bits, std::size_t n) {
  // A word that keeps all its weights costs no memory traffic, one that keeps none costs no read.
  // Single bytes are not tested: at 95 % kept, the mispredicted branches cost more than the work.
  for (; n >= kWordBits; n -= kWordBits, weights += kWordBits, bits += kWordBytes) {
    const std::uint64_t word = load_word(bits);
    if (word == ~std::uint64_t{0}) continue;
    if (word == 0) {
      std::fill_n(weights, kWordBits, 0.0f);
    } else {
      for (std::size_t i = 0; i < kWordBytes; ++i) apply_byte(weights + i * kBits, bits[i]);
    }
  }
  for (; n >= kBits; n -= kBits, weights += kBits, ++bits) apply_byte(weights, *bits);
  for (std::size_t i = 0; i < n; ++i) weights[i] = bit(*bits, i) ? weights[i] : 0.0f;
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
