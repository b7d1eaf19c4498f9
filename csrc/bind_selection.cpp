#include <cmath>
#include <tuple>

#include "bind.h"
#include "packed_masks.h"
#include "selection.h"

namespace py = pybind11;

namespace dau_fast {
namespace {

std::vector<Scores> scores_of(Arguments& call, const GivenList& values) {
  std::vector<Scores> tensors;
  const std::size_t count = call.lengths({{"values", &values}});
  tensors.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t n = call.size("values", values.sizes[i]);
    tensors.push_back({call.read<float>({"values", static_cast<std::ptrdiff_t>(i)}, values[i], n), n});
  }
  return tensors;
}

std::size_t values_in(const std::vector<Scores>& tensors) {
  std::size_t total = 0;
  for (const Scores& tensor : tensors) total += tensor.n;
  return total;
}

// The value, how many are below it, equal to it, and NaN.
std::tuple<float, std::size_t, std::size_t, std::size_t> select_array(const GivenList& values, std::int64_t k,
                                                                      std::int64_t threads) {
  Arguments call("select", values.sizes.size());
  const std::vector<Scores> tensors = scores_of(call, values);
  const std::size_t place = call.size("k", k, 1), total = values_in(tensors);
  if (place > total) call.refuse("k is " + std::to_string(k) + ": expected 1 to " + std::to_string(total));
  const auto found = select_smallest(tensors, place, call.size("threads", threads, 1));
  return {found.value, found.below, found.equal, found.nan};
}

void mask_arrays(const GivenList& values, const GivenList& bits, float threshold, std::int64_t ties,
                 bool all_ties, std::int64_t threads) {
  Arguments call("mask_smallest", 2 * values.sizes.size());
  call.lengths({{"values", &values}, {"bits", &bits}});
  const std::vector<Scores> tensors = scores_of(call, values);
  std::vector<std::uint8_t*> out;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const Label label{"bits", static_cast<std::ptrdiff_t>(i)};
    out.push_back(call.write<std::uint8_t>(label, bits[i], packed_size(tensors[i].n)));
  }
  if (std::isnan(threshold)) call.refuse("threshold is NaN: expected a number");
  call.refuse_overlaps();
  mask_smallest(tensors, out, threshold, call.size("ties", ties), all_ties, call.size("threads", threads, 1));
}

}  // namespace

void bind_selection(py::module_& m) {
  m.def("select", select_array, named_only(), py::arg("values"), py::arg("k"), py::arg("threads"),
        WithoutGil());
  m.def("mask_smallest", mask_arrays, named_only(), py::arg("values"), py::arg("bits"), py::arg("threshold"),
        py::arg("ties"), py::arg("all_ties"), py::arg("threads"), WithoutGil());
}

}  // namespace dau_fast
