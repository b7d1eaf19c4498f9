#include "bind.h"
#include "image_batch.h"

namespace py = pybind11;

namespace dau_fast {
namespace {

using Sides = std::array<std::int64_t, 4>;

// How many pixels lie from the first one of [count, channels, height, width] to the last one, both included.
std::size_t extent(const Arguments& call, const Sides& shape, const Sides& strides) {
  std::size_t last = 0;
  bool empty = false;
  for (std::size_t side = 0; side < shape.size(); ++side) {
    const std::size_t size = call.size("shape", shape[side]), stride = call.size("strides", strides[side]);
    empty = empty || size == 0;
    last = empty ? 0 : last + call.product({size - 1, stride});
    if (last > static_cast<std::size_t>(PTRDIFF_MAX) / 8) call.refuse("its strides reach beyond memory");
  }
  return empty ? 0 : last + 1;
}

template <typename T>
T* output(Arguments& call, const Given& out, std::size_t n) {
  return call.write<T>({"out"}, out, n);
}

// pixels: as many as may be read from their address on. rows, columns: both or neither; flip: or none.
void image_batch_arrays(const Given& pixels, const Sides& shape, const Sides& strides, const Given& mean,
                        const Given& std, const Given& index, const Given& rows, const Given& columns,
                        const Given& flip, std::int64_t pad, Number number, const Given& out,
                        std::int64_t threads) {
  using Start = std::int64_t;
  Arguments call("image_batch");
  const std::size_t reach = extent(call, shape, strides), there = call.size("pixels", pixels.n);
  if (reach > there) {
    call.refuse("pixels has " + std::to_string(there) + " elements: its shape and strides reach " +
                std::to_string(reach));
  }
  const auto side = [&](std::size_t place) { return static_cast<std::size_t>(shape[place]); };
  const std::size_t channels = side(1), batch = call.size("index", index.n);
  const PixelStore store{
      call.read<std::uint8_t>({"pixels"}, {pixels.address, static_cast<Start>(reach)}, reach),
      {strides[0], strides[1], strides[2], strides[3]},
      shape[0],
      channels,
      side(2),
      side(3),
      call.read<float>({"mean"}, mean, channels),
      call.read<float>({"std"}, std, channels)};
  const Windows windows{call.read<Start>({"index"}, index, batch),
                        call.read_if_given<Start>({"rows"}, rows, batch),
                        call.read_if_given<Start>({"columns"}, columns, batch),
                        call.read_if_given<Start>({"flip"}, flip, batch),
                        batch,
                        pad};
  if (!windows.rows != !windows.columns) call.refuse("of rows and columns one is missing");
  if (pad < 0 || pad > kMostPad) {
    call.refuse("pad is " + std::to_string(pad) + ": expected 0 to " + std::to_string(kMostPad));
  }
  const std::size_t n = call.product({batch, channels, side(2), side(3)});
  void* place = number == Number::float32 ? static_cast<void*>(output<float>(call, out, n))
                                          : output<std::uint16_t>(call, out, n);
  call.refuse_overlaps();
  image_batch(store, windows, number, place, call.size("threads", threads, 1));
}

}  // namespace

void bind_images(py::module_& m) {
  py::enum_<Number>(m, "Number")
      .value("float32", Number::float32)
      .value("float16", Number::float16)
      .value("bfloat16", Number::bfloat16);
  m.def("image_batch", image_batch_arrays, named_only(), py::arg("pixels"), py::arg("shape"),
        py::arg("strides"), py::arg("mean"), py::arg("std"), py::arg("index"), py::arg("rows"),
        py::arg("columns"), py::arg("flip"), py::arg("pad"), py::arg("number"), py::arg("out"),
        py::arg("threads"), WithoutGil());
}

}  // namespace dau_fast
