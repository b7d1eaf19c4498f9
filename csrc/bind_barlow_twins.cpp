#include "barlow_twins.h"
#include "bind.h"

namespace py = pybind11;

namespace dau_fast {
namespace {

// Two views of one size, and what belongs to their columns.
struct Both {
  std::size_t n, d;
  Views views;

  Both(Arguments& call, const Given& a, const Given& b, std::int64_t rows, std::int64_t columns)
      : n(call.size("n", rows, 1)), d(call.size("d", columns)), views{} {
    views = {call.read<float>({"a"}, a, call.product({n, d})), call.read<float>({"b"}, b, n * d), n, d};
  }
};

// mean, scale, views and, where it is given, c: written.
void normalise_arrays(const Given& a, const Given& b, const Given& mean, const Given& scale,
                      const Given& views, const Given& c, std::int64_t n, std::int64_t d, double eps,
                      std::int64_t threads) {
  Arguments call("normalise_views");
  const Both in(call, a, b, n, d);
  const std::size_t two = call.product({2, in.d});
  float* to_mean = call.write<float>({"mean"}, mean, two);
  float* to_scale = call.write<float>({"scale"}, scale, two);
  float* to_views = call.write<float>({"views"}, views, call.product({2, in.n, in.d}));
  float* to_c = call.write_if_given<float>({"c"}, c, in.d);
  call.refuse_overlaps();
  normalise_views(in.views, eps, to_mean, to_scale, to_views, to_c, call.size("threads", threads, 1));
}

// views: written.
void standardise_arrays(const Given& a, const Given& b, const Given& mean, const Given& scale,
                        const Given& views, std::int64_t n, std::int64_t d, std::int64_t threads) {
  Arguments call("standardise_views");
  const Both in(call, a, b, n, d);
  const std::size_t two = call.product({2, in.d});
  const float* by_mean = call.read<float>({"mean"}, mean, two);
  const float* by_scale = call.read<float>({"scale"}, scale, two);
  float* to_views = call.write<float>({"views"}, views, call.product({2, in.n, in.d}));
  call.refuse_overlaps();
  standardise_views(in.views, by_mean, by_scale, to_views, call.size("threads", threads, 1));
}

// correlation: changed; c, rows, columns: written. Returns the loss.
double primal_loss_arrays(const Given& correlation, const Given& c, const Given& rows, const Given& columns,
                          std::int64_t d, double lambda, std::int64_t threads) {
  Arguments call("primal_loss");
  const std::size_t size = call.size("d", d);
  float* of_pairs = call.write<float>({"correlation"}, correlation, call.product({size, size}));
  float* to_c = call.write<float>({"c"}, c, size);
  float* to_rows = call.write<float>({"rows"}, rows, size);
  float* to_columns = call.write<float>({"columns"}, columns, size);
  call.refuse_overlaps();
  return primal_loss(of_pairs, size, lambda, to_c, to_rows, to_columns, call.size("threads", threads, 1));
}

// pulled: changed. squares: missing in the Gram form.
void finish_arrays(const Given& pulled, const Given& own, const Given& other, const Given& c,
                   const Given& scale, const Given& squares, std::int64_t n, std::int64_t d, double lambda,
                   double grad_loss, std::int64_t threads) {
  Arguments call("finish_gradient");
  const std::size_t rows = call.size("n", n, 1), columns = call.size("d", d);
  const std::size_t all = call.product({rows, columns});
  const Side side{call.read<float>({"own"}, own, all),
                  call.read<float>({"other"}, other, all),
                  call.read<float>({"c"}, c, columns),
                  call.read<float>({"scale"}, scale, columns),
                  rows,
                  columns};
  const float* given = call.read_if_given<float>({"squares"}, squares, columns);
  float* out = call.write<float>({"pulled"}, pulled, all);
  call.refuse_overlaps();
  finish_gradient(side, given, lambda, grad_loss, out, call.size("threads", threads, 1));
}

}  // namespace

void bind_barlow_twins(py::module_& m) {
  m.def("normalise_views", normalise_arrays, named_only(), py::arg("a"), py::arg("b"), py::arg("mean"),
        py::arg("scale"), py::arg("views"), py::arg("c"), py::arg("n"), py::arg("d"), py::arg("eps"),
        py::arg("threads"), WithoutGil());
  m.def("standardise_views", standardise_arrays, named_only(), py::arg("a"), py::arg("b"), py::arg("mean"),
        py::arg("scale"), py::arg("views"), py::arg("n"), py::arg("d"), py::arg("threads"), WithoutGil());
  m.def("primal_loss", primal_loss_arrays, named_only(), py::arg("correlation"), py::arg("c"),
        py::arg("rows"), py::arg("columns"), py::arg("d"), py::arg("lambd"), py::arg("threads"),
        WithoutGil());
  m.def("finish_gradient", finish_arrays, named_only(), py::arg("pulled"), py::arg("own"), py::arg("other"),
        py::arg("c"), py::arg("scale"), py::arg("squares"), py::arg("n"), py::arg("d"), py::arg("lambd"),
        py::arg("grad_loss"), py::arg("threads"), WithoutGil());
}

}  // namespace dau_fast
