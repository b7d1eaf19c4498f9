// The Python module dau_fast._C.
#include "bind.h"

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  dau_fast::bind_barlow_twins(m);
  dau_fast::bind_masks(m);
  dau_fast::bind_selection(m);
  dau_fast::bind_steps(m);
  dau_fast::bind_sensitivity(m);
  dau_fast::bind_images(m);
}
