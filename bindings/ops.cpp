// The extension module echo_rt._ops: every operation's schema, and the kernels behind it. `(a!)` marks what is written.

#include "ops.h"

#include <Python.h>
#include <torch/library.h>

#if !defined(ECHO_RT_VERSION) || !defined(ECHO_RT_CUDA_ARCHS) || !defined(ECHO_RT_TORCH)
#error "the build defines ECHO_RT_VERSION, ECHO_RT_CUDA_ARCHS and ECHO_RT_TORCH"
#endif

#if defined(ECHO_RT_EMULATED)
#define ECHO_RT_BACKEND "emulated"
#define ECHO_RT_DISPATCH_KEY CPU
#else
#define ECHO_RT_BACKEND "cuda"
#define ECHO_RT_DISPATCH_KEY CUDA
#endif

// Two builds in one process need two names: tests/virtual_gpu loads the emulated kernels beside those for CUDA.
#if !defined(ECHO_RT_NAMESPACE)
#define ECHO_RT_NAMESPACE echo_rt
#endif
// TORCH_LIBRARY takes its argument by the letter; through a macro, its value.
#define ECHO_RT_LIBRARY(name, module) TORCH_LIBRARY(name, module)

ECHO_RT_LIBRARY(ECHO_RT_NAMESPACE, m) {
  m.def("rope_table(Tensor frames, Tensor inverse_frequencies, Tensor(a!) out) -> ()");
  m.def(
      "advance(Tensor(a!) positions, int frames_per_block, int sink_frames, int local_frames, int memory_frames, "
      "int max_temporal_id, Tensor inverse_frequencies, Tensor(b!) temporal_block, Tensor(c!) temporal_anchor, "
      "Tensor(d!) write_index) -> ()");
  m.def(
      "qkv_norm_rope_store(Tensor qkv, Tensor norm_q, Tensor norm_k, Tensor temporal, Tensor spatial, "
      "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor write_index, Tensor(c!)? raw_k, int raw_offset, float eps) "
      "-> Tensor");
  m.def("merge_attention(Tensor outputs, Tensor logsumexps) -> Tensor");
  m.def(
      "reanchor(Tensor(a!) kv, Tensor temporal_anchor, Tensor spatial, Tensor? sink_k, Tensor? memory_k, "
      "Tensor? memory_v, int memory_tokens) -> ()");
  m.def("memory_attention(Tensor q, Tensor norm_q, Tensor k, Tensor v, float eps) -> Tensor");
  m.def(
      "gated_update(Tensor old, Tensor candidate, Tensor norm, Tensor gate_weight, Tensor gate_bias, Tensor(a!) out, "
      "float eps) -> ()");
  m.def("modulated_layer_norm(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor");
  m.def("gated_residual_norm(Tensor(a!) x, Tensor y, Tensor? gate, Tensor shift, Tensor scale, float eps) -> Tensor");
  m.def(
      "modulated_layer_norm_quantize(Tensor x, Tensor shift, Tensor scale, Tensor(a!) out, Tensor(b!) out_scale, "
      "float eps) -> ()");
  m.def(
      "gated_residual_norm_quantize(Tensor(a!) x, Tensor y, Tensor? gate, Tensor shift, Tensor scale, Tensor(b!) out, "
      "Tensor(c!) out_scale, float eps) -> ()");
  m.def("gelu_quantize(Tensor x, Tensor(a!) out, Tensor(b!) out_scale) -> ()");
  m.def("counter_noise(Tensor(a!) out, Tensor positions, Tensor seed, int step) -> ()");
  m.def("flow_step(Tensor(a!) x, Tensor flow, Tensor sigmas, Tensor? noise) -> ()");
  m.def(
      "rms_silu_window(Tensor(a!) x, Tensor? bias, Tensor? residual, Tensor gamma, Tensor(b!) window, "
      "Tensor(c!)? history, bool keep) -> ()");
  m.def("frames_to_uint8(Tensor video, Tensor(a!) out) -> ()");
  m.def("causal_conv(Tensor window, Tensor weight, Tensor? bias, Tensor? residual, Tensor(a!) out) -> ()");
  m.def("causal_conv_hopper(Tensor window, Tensor weight, Tensor(a!) out) -> ()");
  m.def("upsample_conv(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(ECHO_RT_NAMESPACE, ECHO_RT_DISPATCH_KEY, m) {
  using namespace echo::bindings;
  m.impl("rope_table", &rope_table);
  m.impl("advance", &advance);
  m.impl("qkv_norm_rope_store", &qkv_norm_rope_store);
  m.impl("merge_attention", &merge_attention);
  m.impl("reanchor", &reanchor);
  m.impl("memory_attention", &memory_attention);
  m.impl("gated_update", &gated_update);
  m.impl("modulated_layer_norm", &modulated_layer_norm);
  m.impl("gated_residual_norm", &gated_residual_norm);
  m.impl("modulated_layer_norm_quantize", &modulated_layer_norm_quantize);
  m.impl("gated_residual_norm_quantize", &gated_residual_norm_quantize);
  m.impl("gelu_quantize", &gelu_quantize);
  m.impl("counter_noise", &counter_noise);
  m.impl("flow_step", &flow_step);
  m.impl("rms_silu_window", &rms_silu_window);
  m.impl("frames_to_uint8", &frames_to_uint8);
  m.impl("causal_conv", &causal_conv);
  m.impl("causal_conv_hopper", &causal_conv_hopper);
  m.impl("upsample_conv", &upsample_conv);
}

// Importing the module is what registers the operations; beside that it says what it is.
PyMODINIT_FUNC PyInit__ops() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   "_ops",
                                   "The kernels of echo-rt as operations of torch.",
                                   -1,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr || PyModule_AddStringConstant(module, "BACKEND", ECHO_RT_BACKEND) < 0 ||
      PyModule_AddStringConstant(module, "VERSION", ECHO_RT_VERSION) < 0 ||
      PyModule_AddStringConstant(module, "TORCH", ECHO_RT_TORCH) < 0 ||
      PyModule_AddStringConstant(module, "CUDA_ARCHS", ECHO_RT_CUDA_ARCHS) < 0) {
    Py_XDECREF(module);
    return nullptr;
  }
  return module;
}
