// The Python module dau_fast._C. Memory comes as addresses (Tensor.data_ptr()), so that one build
// serves every version of torch. Callers check sizes, types and contiguity; nothing here can.
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>

#include "packed_masks.h"
#include "sensitivity.h"

namespace py = pybind11;

namespace {

template <typename T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  using Address = std::uintptr_t;
  using Flags = std::uint8_t;
  using Bits = std::uint8_t;
  const auto without_gil = py::call_guard<py::gil_scoped_release>();

  m.def(
      "pack",
      [](Address flags, Address bits, std::size_t n) {
        dau_fast::pack(at<const Flags>(flags), at<Bits>(bits), n);
      },
      py::arg("flags"), py::arg("bits"), py::arg("n"), without_gil);
  m.def(
      "unpack",
      [](Address bits, Address flags, std::size_t n) {
        dau_fast::unpack(at<const Bits>(bits), at<Flags>(flags), n);
      },
      py::arg("bits"), py::arg("flags"), py::arg("n"), without_gil);
  m.def(
      "apply",
      [](Address weights, Address bits, std::size_t n) {
        dau_fast::apply(at<float>(weights), at<const Bits>(bits), n);
      },
      py::arg("weights"), py::arg("bits"), py::arg("n"), without_gil);
  m.def(
      "count",
      [](Address bits, std::size_t n) { return dau_fast::count(at<const Bits>(bits), n); },
      py::arg("bits"), py::arg("n"), without_gil);

  using Label = std::int64_t;
  // Addresses that are 0 stand for arrays that are not there.
  m.def(
      "sensitivity_forward",
      [](Address logits, Address features, Address targets, Address shown, Address stats,
         Address predicted, std::size_t batch, std::size_t classes, std::size_t width, bool bias,
         bool softmax, std::size_t threads) {
        const dau_fast::Batch in{at<const float>(logits), at<const float>(features), at<float>(stats),
                                 batch, classes, width, softmax};
        return dau_fast::sensitivity_forward(in, at<const Label>(targets), bias, at<float>(shown),
                                             at<Label>(predicted), threads);
      },
      without_gil);
  m.def(
      "sensitivity_backward",
      [](Address grad, Address logits, Address features, Address labels, Address stats,
         Address grad_logits, Address grad_features, std::size_t batch, std::size_t classes,
         std::size_t width, bool softmax, std::size_t threads) {
        const dau_fast::Batch in{at<const float>(logits), at<const float>(features), at<float>(stats),
                                 batch, classes, width, softmax};
        dau_fast::sensitivity_backward(in, at<const Label>(labels), at<const float>(grad),
                                       at<float>(grad_logits), at<float>(grad_features), threads);
      },
      without_gil);
}
