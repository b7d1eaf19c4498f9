// Batches of normalised images, cropped and mirrored as they are gathered, from uint8 pixels.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace dau_fast {

// [count, channels, height, width] with a stride in bytes for each. mean, std: [channels], in units of
// pixel / 255.
struct PixelStore {
  const std::uint8_t* pixels;
  std::array<std::ptrdiff_t, 4> strides;
  std::int64_t count;
  std::size_t channels, height, width;
  const float* mean;
  const float* std;
};

// One entry of each an image of the batch. rows, columns: where its window begins in the image that
// `pad` zeros surround, 0 to 2 pad; null where it is the image itself. flip: whether the window is
// mirrored then; null for never.
struct Windows {
  const std::int64_t* index;
  const std::int64_t* rows;
  const std::int64_t* columns;
  const std::int64_t* flip;
  std::size_t batch;
  std::int64_t pad;
};

enum class Number { float32, float16, bfloat16 };

// The widest padding: twice as much still fits what a GPU counts windows in.
constexpr std::int64_t kMostPad = (std::int64_t{1} << 30) - 1;

// out: [batch, height, width, channels]. Before anything is written throws std::out_of_range for an index that
// is no image, and std::invalid_argument for a window that lies outside.
void image_batch(const PixelStore& store, const Windows& windows, Number number, void* out,
                 std::size_t threads);

}  // namespace dau_fast
