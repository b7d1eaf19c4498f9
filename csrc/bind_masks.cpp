#include "bind.h"
#include "packed_masks.h"

namespace py = pybind11;

namespace dau_fast {
namespace {

using Byte = std::uint8_t;

void pack_array(const Given& flags, const Given& bits) {
  Arguments call("pack");
  const std::size_t n = call.size("flags", flags.n);
  const Byte* in = call.read<Byte>({"flags"}, flags, n);
  Byte* out = call.write<Byte>({"bits"}, bits, packed_size(n));
  call.refuse_overlaps();
  dau_fast::pack(in, out, n);
}

void unpack_array(const Given& bits, const Given& flags) {
  Arguments call("unpack");
  const std::size_t n = call.size("flags", flags.n);
  const Byte* in = call.read<Byte>({"bits"}, bits, packed_size(n));
  Byte* out = call.write<Byte>({"flags"}, flags, n);
  call.refuse_overlaps();
  dau_fast::unpack(in, out, n);
}

std::size_t count_bits(const Given& bits, std::int64_t n) {
  Arguments call("count");
  const std::size_t flags = call.size("n", n);
  return dau_fast::count(call.read<Byte>({"bits"}, bits, packed_size(flags)), flags);
}

void apply_arrays(const GivenList& weights, const GivenList& bits, std::int64_t threads) {
  Arguments call("apply", 2 * weights.sizes.size());
  const std::size_t count = call.lengths({{"weights", &weights}, {"bits", &bits}});
  std::size_t parts = call.size("threads", threads, 1);
  std::vector<MaskedTensor> tensors;
  tensors.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    const auto place = static_cast<std::ptrdiff_t>(i);
    const std::size_t n = call.size("weights", weights.sizes[i]);
    float* own = call.write<float>({"weights", place}, weights[i], n);
    tensors.push_back({own, call.read<Byte>({"bits", place}, bits[i], packed_size(n)), n});
  }
  call.refuse_overlaps(true);
  // A tensor may be there twice, with two masks; but two threads could undo what the other one did.
  if (call.writes_twice()) parts = 1;
  dau_fast::apply(tensors, parts);
}

}  // namespace

void bind_masks(py::module_& m) {
  m.def("pack", pack_array, named_only(), py::arg("flags"), py::arg("bits"), WithoutGil());
  m.def("unpack", unpack_array, named_only(), py::arg("bits"), py::arg("flags"), WithoutGil());
  m.def("count", count_bits, named_only(), py::arg("bits"), py::arg("n"), WithoutGil());
  m.def("apply", apply_arrays, named_only(), py::arg("weights"), py::arg("bits"), py::arg("threads"),
        WithoutGil());
}

}  // namespace dau_fast
