#include "image_batch.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "parallel.h"
#include "ranges.h"

namespace dau_fast {
namespace {

constexpr std::size_t kValues = 256;  // of a pixel
// Numbers for which one more thread pays.
constexpr std::size_t kThreadNumbers = 1 << 15;

// To the nearest, ties to even.
std::uint16_t bfloat16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (std::isnan(value)) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

std::uint16_t float16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  const float absolute = std::bit_cast<float>(size);
  std::uint32_t half;
  if (std::isnan(value)) {
    half = 0x7e00;
  } else if (absolute >= 65520.0f) {
    half = 0x7c00;
  } else if (absolute < 0x1p-14f) {
    half = static_cast<std::uint32_t>(std::nearbyint(absolute * 0x1p24f));  // denormal
  } else {
    half = ((size + 0xfff + (size >> 13 & 1)) >> 13) - (112 << 10);
  }
  return static_cast<std::uint16_t>(sign | half);
}

// What each value of a pixel becomes, [channels, 256].
std::vector<float> normalised(const PixelStore& store) {
  std::vector<float> table(store.channels * kValues);
  for (std::size_t c = 0; c < store.channels; ++c) {
    for (std::size_t value = 0; value < kValues; ++value) {
      table[c * kValues + value] = (static_cast<float>(value) / 255.0f - store.mean[c]) / store.std[c];
    }
  }
  return table;
}

std::vector<std::uint16_t> rounded(const std::vector<float>& table, std::uint16_t (*round)(float)) {
  std::vector<std::uint16_t> values(table.size());
  std::transform(table.begin(), table.end(), values.begin(), round);
  return values;
}

// What of a side of `size` pixels is inside the image when its window begins at `start`: [begin, end).
struct Inside {
  std::ptrdiff_t shift;
  std::size_t begin, end;

  Inside(std::size_t size, std::int64_t start, std::int64_t pad) : shift(start - pad) {
    const auto n = static_cast<std::ptrdiff_t>(size);
    begin = static_cast<std::size_t>(std::clamp<std::ptrdiff_t>(-shift, 0, n));
    end = std::max(begin, static_cast<std::size_t>(std::clamp<std::ptrdiff_t>(n - shift, 0, n)));
  }
};

// `count` pixels from `in` on, `step` bytes apart, and their channels `apart`.
template <std::size_t kChannels, typename T>
DAU_FAST_INSIDE void look_up(const std::uint8_t* in, std::ptrdiff_t step, std::ptrdiff_t apart,
                             std::size_t channels, const T* table, T* out, std::size_t count) {
  if constexpr (kChannels != 0) channels = kChannels;
  // Eight pixels are one load, which is what a table costs most.
  if constexpr (kChannels == 1 && std::endian::native == std::endian::little) {
    for (; step == 1 && count >= 8; count -= 8, in += 8, out += 8) {
      std::uint64_t eight;
      std::memcpy(&eight, in, 8);
      for (std::size_t x = 0; x < 8; ++x) out[x] = table[eight >> 8 * x & 0xff];
    }
  }
  std::ptrdiff_t pixel = 0;
  for (std::size_t x = 0; x < count; ++x, pixel += step, out += channels) {
    for (std::size_t c = 0; c < channels; ++c) {
      out[c] = table[c * kValues + in[pixel + static_cast<std::ptrdiff_t>(c) * apart]];
    }
  }
}

template <typename T>
void zeros(const T* table, std::size_t channels, T* out, std::size_t count) {
  for (std::size_t x = 0; x < count; ++x, out += channels) {
    for (std::size_t c = 0; c < channels; ++c) out[c] = table[c * kValues];
  }
}

// The images [first, last) of the batch; kChannels: how many there are, or 0 for any number.
template <std::size_t kChannels, typename T>
void images(const PixelStore& store, const Windows& windows, const T* table, T* out, std::size_t first,
            std::size_t last) {
  const auto [of_image, of_channel, of_row, of_column] = store.strides;
  // Rows that are taken whole, and lie behind one another, are one.
  const bool one_row =
      !windows.rows && !windows.flip && of_row == static_cast<std::ptrdiff_t>(store.width) * of_column;
  const std::size_t channels = store.channels, height = one_row ? 1 : store.height,
                    width = one_row ? store.height * store.width : store.width;
  for (std::size_t i = first; i < last; ++i) {
    const std::int64_t pad = windows.rows ? windows.pad : 0;
    const Inside rows(height, windows.rows ? windows.rows[i] : 0, pad);
    const Inside columns(width, windows.columns ? windows.columns[i] : 0, pad);
    const bool flip = windows.flip && windows.flip[i] != 0;
    const std::size_t count = columns.end - columns.begin;
    // Where the part inside the image begins in the output, and which of its pixels comes first.
    const std::size_t before = flip ? width - columns.end : columns.begin;
    const std::size_t start = flip ? columns.end - 1 : columns.begin;
    const std::ptrdiff_t column = static_cast<std::ptrdiff_t>(start) + columns.shift;
    const std::uint8_t* image = store.pixels + windows.index[i] * of_image;
    T* row = out + i * height * width * channels;
    for (std::size_t y = 0; y < height; ++y, row += width * channels) {
      if (y < rows.begin || y >= rows.end || count == 0) {
        zeros(table, channels, row, width);
        continue;
      }
      const std::ptrdiff_t source = static_cast<std::ptrdiff_t>(y) + rows.shift;
      zeros(table, channels, row, before);
      look_up<kChannels>(image + source * of_row + column * of_column, flip ? -of_column : of_column,
                         of_channel, channels, table, row + before * channels, count);
      zeros(table, channels, row + (before + count) * channels, width - before - count);
    }
  }
}

template <typename T>
void gather(const PixelStore& store, const Windows& windows, const std::vector<T>& table, T* out,
            std::size_t threads) {
  const std::size_t numbers = windows.batch * store.channels * store.height * store.width;
  const std::size_t count =
      std::min({threads, numbers / kThreadNumbers + 1, std::max<std::size_t>(windows.batch, 1)});
  const auto edge = [&](std::size_t part) { return windows.batch * part / count; };
  const auto run = store.channels == 1 ? images<1, T> : store.channels == 3 ? images<3, T> : images<0, T>;
  on_threads(count,
             [&](std::size_t part) { run(store, windows, table.data(), out, edge(part), edge(part + 1)); });
}

}  // namespace

void image_batch(const PixelStore& store, const Windows& windows, Number number, void* out,
                 std::size_t threads) {
  const std::size_t n = windows.batch;
  require_in_range<std::out_of_range>("index holds", windows.index, n, store.count - 1);
  for (const auto& [what, starts] :
       {std::pair{"rows hold", windows.rows}, {"columns hold", windows.columns}}) {
    require_in_range<std::invalid_argument>(what, starts, n, 2 * windows.pad, ", twice the padding");
  }
  const std::vector<float> table = normalised(store);
  if (number == Number::float32) {
    gather(store, windows, table, static_cast<float*>(out), threads);
  } else {
    const auto values = rounded(table, number == Number::float16 ? float16 : bfloat16);
    gather(store, windows, values, static_cast<std::uint16_t*>(out), threads);
  }
}

}  // namespace dau_fast
