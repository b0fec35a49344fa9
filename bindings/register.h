// One function for each file of bindings; module.cpp calls them all.

#pragma once

#include <pybind11/pybind11.h>

namespace echo::bindings {

void register_build_info(pybind11::module_& module);
void register_ring_layout(pybind11::module_& module);

}  // namespace echo::bindings
