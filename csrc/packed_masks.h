// Weight masks at one bit a weight. Bit i of a mask is bit i % 8, least significant first, of byte
// i / 8. A 1 keeps the weight. Unused bits of the last byte are written as zero and never read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dau_fast {

// Bytes of a mask of `n` weights.
constexpr std::size_t packed_size(std::size_t n) { return n / 8 + (n % 8 != 0); }

// One byte for each of `n` flags in (any non-zero value is true), ceil(n / 8) bytes out.
void pack(const std::uint8_t* flags, std::uint8_t* bits, std::size_t n);

// The inverse of `pack`: every flag is written as 0 or 1.
void unpack(const std::uint8_t* bits, std::uint8_t* flags, std::size_t n);

struct MaskedTensor {
  float* weights;
  const std::uint8_t* bits;
  std::size_t n;
};

// Weights whose bit is 0 become +0.0, whatever they held; the others keep their value.
void apply(const std::vector<MaskedTensor>& tensors, std::size_t threads);

// How many of the first `n` bits are 1.
std::size_t count(const std::uint8_t* bits, std::size_t n);

}  // namespace dau_fast
