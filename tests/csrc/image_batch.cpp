// Batches of images against a loop over their pixels. Arrays end where their memory does.
#include "image_batch.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"

namespace {

using dau_fast::Number;
using Bytes = std::vector<std::uint8_t>;
using Starts = std::vector<std::int64_t>;

std::mt19937 generator(1);

std::int64_t below(std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(0, high - 1)(generator);
}

Starts some(std::size_t n, std::int64_t high) {
  Starts values(n);
  for (auto& value : values) value = below(high);
  return values;
}

// An image set with memory of its own, row by row or with the channels last.
struct Stored {
  std::size_t count, channels, height, width;
  bool channels_last;
  Bytes pixels;
  std::vector<float> mean, std;

  Stored(std::size_t n, std::size_t c, std::size_t h, std::size_t w, bool last)
      : count(n), channels(c), height(h), width(w), channels_last(last), pixels(n * c * h * w) {
    for (auto& pixel : pixels) pixel = static_cast<std::uint8_t>(below(256));
    for (std::size_t i = 0; i < c; ++i) {
      mean.push_back(static_cast<float>(below(1000)) / 1000);
      std.push_back(static_cast<float>(below(1000) + 100) / 1000);
    }
  }

  std::array<std::ptrdiff_t, 4> strides() const {
    const auto c = static_cast<std::ptrdiff_t>(channels), h = static_cast<std::ptrdiff_t>(height),
               w = static_cast<std::ptrdiff_t>(width);
    if (channels_last) return {h * w * c, 1, w * c, c};
    return {c * h * w, h * w, w, 1};
  }

  dau_fast::PixelStore view() const {
    return {pixels.data(), strides(), static_cast<std::int64_t>(count), channels, height, width,
            mean.data(),   std.data()};
  }

  // Pixel (y, x) of the image and what surrounds it.
  std::uint8_t at(std::int64_t image, std::size_t c, std::int64_t y, std::int64_t x) const {
    if (y < 0 || x < 0 || y >= static_cast<std::int64_t>(height) || x >= static_cast<std::int64_t>(width)) {
      return 0;
    }
    const auto s = strides();
    const std::int64_t place = image * s[0] + static_cast<std::int64_t>(c) * s[1] + y * s[2] + x * s[3];
    return pixels[static_cast<std::size_t>(place)];
  }
};

void test_every_window(const Stored& stored, std::size_t batch, std::int64_t pad) {
  const Starts index = some(batch, static_cast<std::int64_t>(stored.count));
  const Starts rows = some(batch, 2 * pad + 1), columns = some(batch, 2 * pad + 1), flip = some(batch, 2);
  for (const bool cropped : {false, true}) {
    for (const bool flipped : {false, true}) {
      const dau_fast::Windows windows{index.data(),
                                      cropped ? rows.data() : nullptr,
                                      cropped ? columns.data() : nullptr,
                                      flipped ? flip.data() : nullptr,
                                      batch,
                                      pad};
      std::vector<float> out(batch * stored.height * stored.width * stored.channels,
                             std::numeric_limits<float>::quiet_NaN());
      dau_fast::image_batch(stored.view(), windows, Number::float32, out.data(), 3);
      const float* found = out.data();
      for (std::size_t i = 0; i < batch; ++i) {
        for (std::size_t y = 0; y < stored.height; ++y) {
          for (std::size_t x = 0; x < stored.width; ++x) {
            for (std::size_t c = 0; c < stored.channels; ++c, ++found) {
              const std::size_t across = flipped && flip[i] ? stored.width - 1 - x : x;
              const std::uint8_t pixel =
                  stored.at(index[i], c, static_cast<std::int64_t>(y) + (cropped ? rows[i] - pad : 0),
                            static_cast<std::int64_t>(across) + (cropped ? columns[i] - pad : 0));
              const float scaled = static_cast<float>(pixel) / 255.0f - stored.mean[c];
              CHECK(*found == scaled / stored.std[c]);
            }
          }
        }
      }
    }
  }
}

void test_what_does_not_exist_is_named_and_nothing_read() {
  const Stored stored(3, 2, 4, 5, true);
  const Starts good{0, 1, 2};
  std::vector<float> out(3 * 2 * 4 * 5, 7);
  for (const std::int64_t wrong :
       {std::int64_t{-1}, std::int64_t{3}, std::numeric_limits<std::int64_t>::min(),
        std::numeric_limits<std::int64_t>::max()}) {
    const Starts bad{0, 1, wrong};
    for (const int which : {0, 1, 2}) {
      const auto chosen = [&](int place) { return place == which ? bad.data() : good.data(); };
      const dau_fast::Windows windows{chosen(0), chosen(1), chosen(2), nullptr, 3, 1};
      const auto call = [&] {
        dau_fast::image_batch(stored.view(), windows, Number::float32, out.data(), 2);
      };
      const std::string held = std::to_string(std::min<std::int64_t>(0, wrong)) + " to " +
                               std::to_string(std::max<std::int64_t>(1, wrong)) + ": expected 0 to 2";
      const char* names[] = {"index holds ", "rows hold ", "columns hold "};
      CHECK(which == 0 ? says<std::out_of_range>(call, names[0] + held)
                       : says<std::invalid_argument>(call, names[which] + held + ", twice the padding"));
      for (const float value : out) CHECK(value == 7);
    }
  }
}

// The value of a number of `mantissa` bits whose exponent is `bias` too large.
double value_of(std::uint16_t bits, int mantissa, int bias) {
  const int exponent = (bits & 0x7fff) >> mantissa, fraction = bits & ((1 << mantissa) - 1);
  const double size = exponent == 0 ? std::ldexp(fraction, 1 - bias - mantissa)
                                    : std::ldexp(fraction + (1 << mantissa), exponent - bias - mantissa);
  return bits & 0x8000 ? -size : size;
}

void test_halves_are_the_nearest() {
  // The last one overflows float16 at its largest pixels; the first one is denormal there.
  for (const float std : {1e7f, 30000.0f, 1.0f, 0.247f, 1e-3f, 1.2e-5f}) {
    Stored stored(1, 1, 16, 16, true);
    for (std::size_t i = 0; i < 256; ++i) stored.pixels[i] = static_cast<std::uint8_t>(i);
    stored.std[0] = std;
    const std::int64_t index = 0;
    const dau_fast::Windows windows{&index, nullptr, nullptr, nullptr, 1, 0};
    std::vector<float> exact(256);
    dau_fast::image_batch(stored.view(), windows, Number::float32, exact.data(), 1);
    for (const auto& [number, mantissa, bias] :
         {std::tuple{Number::float16, 10, 15}, {Number::bfloat16, 7, 127}}) {
      std::vector<std::uint16_t> found(256);
      dau_fast::image_batch(stored.view(), windows, number, found.data(), 1);
      const std::uint16_t infinity = number == Number::float16 ? 0x7c00 : 0x7f80;
      for (std::size_t i = 0; i < 256; ++i) {
        const std::uint16_t bits = found[i] & 0x7fff;
        if (number == Number::float16 && std::abs(exact[i]) >= 65520) {
          CHECK(bits == infinity);
          continue;
        }
        CHECK(bits < infinity && (found[i] & 0x8000) == (std::signbit(exact[i]) ? 0x8000 : 0));
        const double here = std::abs(value_of(found[i], mantissa, bias) - exact[i]);
        for (const int step : {-1, 1}) {  // neither neighbour is nearer, and of two as near this one is even
          if (bits == 0 && step < 0) continue;
          const auto next = static_cast<std::uint16_t>(found[i] + step);
          const double there = std::abs(value_of(next, mantissa, bias) - exact[i]);
          CHECK(here < there || (here == there && bits % 2 == 0));
        }
      }
    }
  }
}

}  // namespace

void test_image_batch() {
  for (const bool channels_last : {false, true}) {
    for (const std::size_t channels : {1u, 2u, 3u}) {
      for (const std::int64_t pad : {0, 1, 9}) {
        test_every_window(Stored(4, channels, 5, 7, channels_last), 40, pad);
        test_every_window(Stored(2, channels, 1, 1, channels_last), 5, pad);
      }
    }
  }
  test_every_window(Stored(3, 3, 32, 32, true), 301, 4);  // several threads
  test_every_window(Stored(3, 3, 32, 32, true), 0, 4);
  test_what_does_not_exist_is_named_and_nothing_read();
  test_halves_are_the_nearest();
}
