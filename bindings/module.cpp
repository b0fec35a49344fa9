// The extension module echo_rt._C.

#include "register.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "The compiled part of echo-rt.";
  echo::bindings::register_build_info(module);
  echo::bindings::register_ring_layout(module);
}
