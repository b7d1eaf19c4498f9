// How Python hands arrays over: as (Tensor.data_ptr(), Tensor.numel()), or as two lists of these. So one build
// serves every version of torch. Callers see to types and contiguity; sizes are checked here.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "arguments.h"

namespace dau_fast {

void bind_barlow_twins(pybind11::module_& m);
void bind_masks(pybind11::module_& m);
void bind_selection(pybind11::module_& m);
void bind_steps(pybind11::module_& m);
void bind_sensitivity(pybind11::module_& m);
void bind_images(pybind11::module_& m);

// Everything is named, so that no two arguments can be swapped, and runs without Python's lock.
inline auto named_only() { return pybind11::kw_only(); }
using WithoutGil = pybind11::call_guard<pybind11::gil_scoped_release>;

// By hand: pybind11's own casters take five times as long for the lists of a model's tensors.
inline bool load(PyObject* number, std::uintptr_t& address) {
  if (!PyLong_Check(number)) return false;
  address = static_cast<std::uintptr_t>(PyLong_AsUnsignedLongLong(number));
  return address != static_cast<std::uintptr_t>(-1) || !PyErr_Occurred() || (PyErr_Clear(), false);
}

inline bool load(PyObject* number, std::int64_t& size) {
  if (!PyLong_Check(number)) return false;
  size = PyLong_AsLongLong(number);
  return size != -1 || !PyErr_Occurred() || (PyErr_Clear(), false);
}

template <typename Number>
bool load(PyObject* list, std::vector<Number>& numbers) {
  if (!PyList_Check(list)) return false;
  numbers.resize(static_cast<std::size_t>(PyList_GET_SIZE(list)));
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    if (!load(PyList_GET_ITEM(list, static_cast<Py_ssize_t>(i)), numbers[i])) return false;
  }
  return true;
}

template <typename First, typename Second>
bool load_pair(PyObject* pair, First& first, Second& second) {
  return PyTuple_Check(pair) && PyTuple_GET_SIZE(pair) == 2 && load(PyTuple_GET_ITEM(pair, 0), first) &&
         load(PyTuple_GET_ITEM(pair, 1), second);
}

}  // namespace dau_fast

namespace pybind11::detail {

template <>
struct type_caster<dau_fast::Given> {
  PYBIND11_TYPE_CASTER(dau_fast::Given, const_name("tuple[int, int]"));
  bool load(handle source, bool) { return dau_fast::load_pair(source.ptr(), value.address, value.n); }
};

template <>
struct type_caster<dau_fast::GivenList> {
  PYBIND11_TYPE_CASTER(dau_fast::GivenList, const_name("tuple[list[int], list[int]]"));
  bool load(handle source, bool) { return dau_fast::load_pair(source.ptr(), value.addresses, value.sizes); }
};

}  // namespace pybind11::detail
