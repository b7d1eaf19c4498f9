// The Python module dau_fast._C. Memory comes as addresses (Tensor.data_ptr()), so that one build
// serves every version of torch. Callers check sizes, types and contiguity; nothing here can.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <vector>

#include "image_batch.h"
#include "masked_step.h"
#include "packed_masks.h"
#include "selection.h"
#include "sensitivity.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
// One a tensor. An address that is 0 stands for an array that is not there.
using Addresses = std::vector<Address>;
using Sizes = std::vector<std::size_t>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

std::vector<dau_fast::Scores> score_tensors(const Addresses& values, const Sizes& sizes) {
  std::vector<dau_fast::Scores> tensors;
  for (std::size_t i = 0; i < sizes.size(); ++i) tensors.push_back({at<const float>(values[i]), sizes[i]});
  return tensors;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
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
      [](const Addresses& weights, const Addresses& bits, const Sizes& sizes, std::size_t threads) {
        std::vector<dau_fast::MaskedTensor> tensors;
        for (std::size_t i = 0; i < sizes.size(); ++i) {
          tensors.push_back({at<float>(weights[i]), at<const Bits>(bits[i]), sizes[i]});
        }
        dau_fast::apply(tensors, threads);
      },
      py::arg("weights"), py::arg("bits"), py::arg("sizes"), py::arg("threads"), without_gil);
  m.def(
      "count",
      [](Address bits, std::size_t n) { return dau_fast::count(at<const Bits>(bits), n); },
      py::arg("bits"), py::arg("n"), without_gil);

  m.def(
      "masked_sgd",
      [](const Addresses& weights, const Addresses& grads, const Addresses& momenta, const Addresses& bits,
         const Sizes& sizes, const std::vector<bool>& first, double lr, double momentum, double dampening,
         double weight_decay, bool nesterov, bool maximize, std::size_t threads) {
        std::vector<dau_fast::SgdTensor> tensors;
        for (std::size_t i = 0; i < sizes.size(); ++i) {
          float* moved = momenta.empty() ? nullptr : at<float>(momenta[i]);
          tensors.push_back({at<float>(weights[i]), at<const float>(grads[i]), moved, at<const Bits>(bits[i]),
                             sizes[i], !first.empty() && first[i]});
        }
        dau_fast::masked_sgd(tensors, {lr, momentum, dampening, weight_decay, nesterov, maximize}, threads);
      },
      without_gil);
  m.def(
      "masked_adamw",
      [](const Addresses& weights, const Addresses& grads, const Addresses& exp_avgs,
         const Addresses& exp_avg_sqs, const Addresses& steps, const Addresses& bits, const Sizes& sizes,
         double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize,
         std::size_t threads) {
        std::vector<dau_fast::AdamwTensor> tensors;
        for (std::size_t i = 0; i < sizes.size(); ++i) {
          tensors.push_back({at<float>(weights[i]), at<const float>(grads[i]), at<float>(exp_avgs[i]),
                             at<float>(exp_avg_sqs[i]), at<float>(steps[i]), at<const Bits>(bits[i]),
                             sizes[i]});
        }
        dau_fast::masked_adamw(tensors, {lr, beta1, beta2, eps, weight_decay, maximize}, threads);
      },
      without_gil);
  m.def(
      "select",
      [](const Addresses& values, const Sizes& sizes, std::size_t k, std::size_t threads) {
        const auto found = dau_fast::select_smallest(score_tensors(values, sizes), k, threads);
        return std::make_tuple(found.value, found.below, found.equal, found.nan);
      },
      py::arg("values"), py::arg("sizes"), py::arg("k"), py::arg("threads"), without_gil);
  m.def(
      "mask_smallest",
      [](const Addresses& values, const Addresses& bits, const Sizes& sizes, float threshold,
         std::size_t ties, bool all_ties, std::size_t threads) {
        std::vector<Bits*> out;
        for (const Address place : bits) out.push_back(at<Bits>(place));
        dau_fast::mask_smallest(score_tensors(values, sizes), out, threshold, ties, all_ties, threads);
      },
      py::arg("values"), py::arg("bits"), py::arg("sizes"), py::arg("threshold"), py::arg("ties"),
      py::arg("all_ties"), py::arg("threads"), without_gil);

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

  using Start = std::int64_t;
  py::enum_<dau_fast::Number>(m, "Number")
      .value("float32", dau_fast::Number::float32)
      .value("float16", dau_fast::Number::float16)
      .value("bfloat16", dau_fast::Number::bfloat16);
  m.def(
      "image_batch",
      [](Address pixels, const std::array<std::int64_t, 4>& shape, const std::array<std::ptrdiff_t, 4>& strides,
         Address mean, Address std, Address index, Address rows, Address columns, Address flip,
         std::size_t batch, std::int64_t pad, dau_fast::Number number, Address out, std::size_t threads) {
        const auto size = [&](int side) { return static_cast<std::size_t>(shape[side]); };
        const dau_fast::PixelStore store{at<const std::uint8_t>(pixels), strides, shape[0], size(1), size(2),
                                         size(3), at<const float>(mean), at<const float>(std)};
        const dau_fast::Windows windows{at<const Start>(index), at<const Start>(rows),
                                        at<const Start>(columns), at<const Start>(flip), batch, pad};
        return dau_fast::image_batch(store, windows, number, at<void>(out), threads);
      },
      without_gil);
}
