#include "bind.h"
#include "sensitivity.h"

namespace py = pybind11;

namespace dau_fast {
namespace {

using Target = std::int64_t;
constexpr std::size_t kStats = 5, kSums = 4;

struct Sizes {
  std::size_t batch, classes, width, shown;

  Sizes(const Arguments& call, std::int64_t b, std::int64_t c, std::int64_t d, bool softmax)
      : batch(call.size("batch", b)),
        classes(call.size("classes", c, 1)),
        width(call.size("width", d)),
        shown(softmax ? call.product({batch, classes + 1}) : batch) {}
};

// Of targets and predicted one is given. predicted, stats, shown: written.
void forward_arrays(const Given& logits, const Given& features, const Given& targets, const Given& shown,
                    const Given& stats, const Given& predicted, std::int64_t batch, std::int64_t classes,
                    std::int64_t width, bool bias, bool softmax, std::int64_t threads) {
  Arguments call("sensitivity_forward");
  const Sizes size(call, batch, classes, width, softmax);
  const Batch in{call.read<float>({"logits"}, logits, call.product({size.batch, size.classes})),
                 call.read<float>({"features"}, features, call.product({size.batch, size.width})),
                 size.batch,
                 size.classes,
                 size.width,
                 softmax};
  const Target* given = call.read_if_given<Target>({"targets"}, targets, size.batch);
  Target* found = given ? nullptr : call.write<Target>({"predicted"}, predicted, size.batch);
  float* kept = call.write<float>({"stats"}, stats, call.product({kStats, size.batch}));
  float* out = call.write<float>({"shown"}, shown, size.shown);
  call.refuse_overlaps();
  sensitivity_forward(in, given, bias, kept, out, found, call.size("threads", threads, 1));
}

// grad_logits, grad_features: written where they are given.
void backward_arrays(const Given& grad, const Given& logits, const Given& features, const Given& labels,
                     const Given& stats, const Given& grad_logits, const Given& grad_features,
                     std::int64_t batch, std::int64_t classes, std::int64_t width, bool softmax,
                     std::int64_t threads) {
  Arguments call("sensitivity_backward");
  const Sizes size(call, batch, classes, width, softmax);
  const std::size_t of_logits = call.product({size.batch, size.classes});
  const std::size_t of_features = call.product({size.batch, size.width});
  const Batch in{call.read<float>({"logits"}, logits, of_logits),
                 call.read<float>({"features"}, features, of_features),
                 size.batch,
                 size.classes,
                 size.width,
                 softmax};
  const Target* targets = call.read<Target>({"labels"}, labels, size.batch);
  const float* kept = call.read<float>({"stats"}, stats, call.product({kStats, size.batch}));
  const float* pull = call.read<float>({"grad"}, grad, size.shown);
  float* to_logits = call.write_if_given<float>({"grad_logits"}, grad_logits, of_logits);
  float* to_features = call.write_if_given<float>({"grad_features"}, grad_features, of_features);
  call.refuse_overlaps();
  sensitivity_backward(in, targets, kept, pull, to_logits, to_features, call.size("threads", threads, 1));
}

LogitsPiece piece(Arguments& call, const Given& logits, std::int64_t batch, std::int64_t classes,
                  std::int64_t stride, std::int64_t first) {
  const std::size_t b = call.size("batch", batch), c = call.size("classes", classes, 1);
  const std::size_t apart = call.size("stride", stride, classes);
  call.size("first", first);
  const std::size_t reach = b == 0 ? 0 : call.product({b, apart}) - (apart - c);
  return {call.read<float>({"logits"}, logits, reach), b, c, apart, first};
}

// sums: changed.
void add_logits_arrays(const Given& logits, const Given& targets, const Given& sums, std::int64_t batch,
                       std::int64_t classes, std::int64_t stride, std::int64_t first, std::int64_t threads) {
  Arguments call("add_logits");
  const LogitsPiece in = piece(call, logits, batch, classes, stride, first);
  const Target* labels = call.read<Target>({"targets"}, targets, in.batch);
  double* found = call.write<double>({"sums"}, sums, call.product({kSums, in.batch}));
  call.refuse_overlaps();
  add_logits(in, labels, found, call.size("threads", threads, 1));
}

// grad_logits: written.
void pull_logits_arrays(const Given& logits, const Given& targets, const Given& stats, const Given& grad,
                        const Given& grad_logits, std::int64_t batch, std::int64_t classes,
                        std::int64_t stride, std::int64_t first, std::int64_t threads) {
  Arguments call("pull_logits");
  const LogitsPiece in = piece(call, logits, batch, classes, stride, first);
  const Target* labels = call.read<Target>({"targets"}, targets, in.batch);
  const float* kept = call.read<float>({"stats"}, stats, call.product({kStats, in.batch}));
  const float* pull = call.read<float>({"grad"}, grad, in.batch);
  float* out = call.write<float>({"grad_logits"}, grad_logits, call.product({in.batch, in.classes}));
  call.refuse_overlaps();
  pull_logits(in, labels, kept, pull, out, call.size("threads", threads, 1));
}

}  // namespace

void bind_sensitivity(py::module_& m) {
  m.def("sensitivity_forward", forward_arrays, named_only(), py::arg("logits"), py::arg("features"),
        py::arg("targets"), py::arg("shown"), py::arg("stats"), py::arg("predicted"), py::arg("batch"),
        py::arg("classes"), py::arg("width"), py::arg("bias"), py::arg("softmax"), py::arg("threads"),
        WithoutGil());
  m.def("sensitivity_backward", backward_arrays, named_only(), py::arg("grad"), py::arg("logits"),
        py::arg("features"), py::arg("labels"), py::arg("stats"), py::arg("grad_logits"),
        py::arg("grad_features"), py::arg("batch"), py::arg("classes"), py::arg("width"), py::arg("softmax"),
        py::arg("threads"), WithoutGil());
  m.def("add_logits", add_logits_arrays, named_only(), py::arg("logits"), py::arg("targets"), py::arg("sums"),
        py::arg("batch"), py::arg("classes"), py::arg("stride"), py::arg("first"), py::arg("threads"),
        WithoutGil());
  m.def("pull_logits", pull_logits_arrays, named_only(), py::arg("logits"), py::arg("targets"),
        py::arg("stats"), py::arg("grad"), py::arg("grad_logits"), py::arg("batch"), py::arg("classes"),
        py::arg("stride"), py::arg("first"), py::arg("threads"), WithoutGil());
}

}  // namespace dau_fast
