#include "bind.h"
#include "masked_step.h"
#include "packed_masks.h"

namespace py = pybind11;

namespace dau_fast {
namespace {

using Byte = std::uint8_t;

std::ptrdiff_t place_of(std::size_t i) { return static_cast<std::ptrdiff_t>(i); }

// momenta, first: empty where there is no momentum. bits: with address 0 where every weight is kept.
void masked_sgd_arrays(const GivenList& weights, const GivenList& grads, const GivenList& momenta,
                       const GivenList& bits, const std::vector<bool>& first, double lr, double momentum,
                       double dampening, double weight_decay, bool nesterov, bool maximize,
                       std::int64_t threads) {
  Arguments call("masked_sgd", 4 * weights.sizes.size());
  const std::size_t count = call.lengths({{"weights", &weights}, {"grads", &grads}, {"bits", &bits}});
  const bool moving = !momenta.addresses.empty();
  if (moving) call.lengths({{"weights", &weights}, {"momenta", &momenta}});
  if (!first.empty() && first.size() != count) {
    call.refuse("first has " + std::to_string(first.size()) + " entries: expected " + std::to_string(count));
  }
  std::vector<SgdTensor> tensors;
  tensors.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t n = call.size("weights", weights.sizes[i]);
    const auto place = place_of(i);
    float* own = call.write<float>({"weights", place}, weights[i], n);
    float* moved = moving ? call.write<float>({"momenta", place}, momenta[i], n) : nullptr;
    const float* grad = call.read<float>({"grads", place}, grads[i], n);
    const Byte* kept = call.read_if_given<Byte>({"bits", place}, bits[i], packed_size(n));
    tensors.push_back({own, grad, moved, kept, n, !first.empty() && first[i]});
  }
  call.refuse_overlaps();
  const SgdSettings settings{lr, momentum, dampening, weight_decay, nesterov, maximize};
  masked_sgd(tensors, settings, call.size("threads", threads, 1));
}

void masked_adamw_arrays(const GivenList& weights, const GivenList& grads, const GivenList& exp_avgs,
                         const GivenList& exp_avg_sqs, const GivenList& steps, const GivenList& bits,
                         double lr, double beta1, double beta2, double eps, double weight_decay,
                         bool maximize, std::int64_t threads) {
  Arguments call("masked_adamw", 6 * weights.sizes.size());
  const std::size_t count = call.lengths({{"weights", &weights},
                                          {"grads", &grads},
                                          {"exp_avgs", &exp_avgs},
                                          {"exp_avg_sqs", &exp_avg_sqs},
                                          {"steps", &steps},
                                          {"bits", &bits}});
  std::vector<AdamwTensor> tensors;
  tensors.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t n = call.size("weights", weights.sizes[i]);
    const auto place = place_of(i);
    float* own = call.write<float>({"weights", place}, weights[i], n);
    float* mean = call.write<float>({"exp_avgs", place}, exp_avgs[i], n);
    float* square = call.write<float>({"exp_avg_sqs", place}, exp_avg_sqs[i], n);
    float* step = call.write<float>({"steps", place}, steps[i], 1);
    const float* grad = call.read<float>({"grads", place}, grads[i], n);
    const Byte* kept = call.read_if_given<Byte>({"bits", place}, bits[i], packed_size(n));
    tensors.push_back({own, grad, mean, square, step, kept, n});
  }
  call.refuse_overlaps();
  const AdamwSettings settings{lr, beta1, beta2, eps, weight_decay, maximize};
  masked_adamw(tensors, settings, call.size("threads", threads, 1));
}

}  // namespace

void bind_steps(py::module_& m) {
  m.def("masked_sgd", masked_sgd_arrays, named_only(), py::arg("weights"), py::arg("grads"),
        py::arg("momenta"), py::arg("bits"), py::arg("first"), py::arg("lr"), py::arg("momentum"),
        py::arg("dampening"), py::arg("weight_decay"), py::arg("nesterov"), py::arg("maximize"),
        py::arg("threads"), WithoutGil());
  m.def("masked_adamw", masked_adamw_arrays, named_only(), py::arg("weights"), py::arg("grads"),
        py::arg("exp_avgs"), py::arg("exp_avg_sqs"), py::arg("steps"), py::arg("bits"), py::arg("lr"),
        py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("maximize"),
        py::arg("threads"), WithoutGil());
}

}  // namespace dau_fast
