// echo_rt._C.build_info(): how this extension was compiled.

#include <sstream>
#include <string>

#include "register.h"

#if !defined(ECHO_RT_VERSION) || !defined(ECHO_RT_CUDA_ARCHS)
#error "the build defines ECHO_RT_VERSION and ECHO_RT_CUDA_ARCHS"
#endif

namespace py = pybind11;

namespace echo::bindings {
namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("gcc ") + __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

// "80 90a" -> ("80", "90a")
py::tuple cuda_archs() {
  py::list archs;
  std::istringstream words(ECHO_RT_CUDA_ARCHS);
  for (std::string word; words >> word;) archs.append(word);
  return py::tuple(archs);
}

py::dict build_info() {
  py::dict info;
  info["version"] = ECHO_RT_VERSION;
  info["compiler"] = compiler();
  info["cxx_standard"] = __cplusplus / 100 % 100;
  info["cuda_archs"] = cuda_archs();
  return info;
}

}  // namespace

void register_build_info(py::module_& module) {
  module.def("build_info", &build_info,
             "How this extension was compiled: version, compiler, cxx_standard (17), cuda_archs ((\"80\", ...)).");
}

}  // namespace echo::bindings
