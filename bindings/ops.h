// The operations as torch calls them; ops.cpp has their schemas, echo_rt/ops/schema.py says what they compute.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace echo::bindings {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void rope_table(const Tensor& frames, const Tensor& inverse_frequencies, const Tensor& out);

void advance(const Tensor& positions, int64_t frames_per_block, int64_t sink_frames, int64_t local_frames,
             int64_t memory_frames, int64_t max_temporal_id, const Tensor& inverse_frequencies,
             const Tensor& temporal_block, const Tensor& temporal_anchor, const Tensor& write_index);

void reanchor(const Tensor& kv, const Tensor& temporal_anchor, const Tensor& spatial, const OptionalTensor& sink_k,
              const OptionalTensor& memory_k, const OptionalTensor& memory_v, int64_t memory_tokens);

Tensor qkv_norm_rope_store(const Tensor& qkv, const Tensor& norm_q, const Tensor& norm_k, const Tensor& temporal,
                           const Tensor& spatial, const Tensor& k_cache, const Tensor& v_cache,
                           const Tensor& write_index, const OptionalTensor& raw_k, int64_t raw_offset, double eps);

Tensor merge_attention(const Tensor& outputs, const Tensor& logsumexps);

Tensor memory_attention(const Tensor& q, const Tensor& norm_q, const Tensor& k, const Tensor& v, double eps);

void gated_update(const Tensor& old, const Tensor& candidate, const Tensor& norm, const Tensor& gate_weight,
                  const Tensor& gate_bias, const Tensor& out, double eps);

Tensor modulated_layer_norm(const Tensor& x, const Tensor& shift, const Tensor& scale, double eps);

Tensor gated_residual_norm(const Tensor& x, const Tensor& y, const OptionalTensor& gate, const Tensor& shift,
                           const Tensor& scale, double eps);

void modulated_layer_norm_quantize(const Tensor& x, const Tensor& shift, const Tensor& scale, const Tensor& out,
                                   const Tensor& out_scale, double eps);

void gated_residual_norm_quantize(const Tensor& x, const Tensor& y, const OptionalTensor& gate, const Tensor& shift,
                                  const Tensor& scale, const Tensor& out, const Tensor& out_scale, double eps);

void gelu_quantize(const Tensor& x, const Tensor& out, const Tensor& out_scale);

void counter_noise(const Tensor& out, const Tensor& positions, const Tensor& seed, int64_t step);

void flow_step(const Tensor& x, const Tensor& flow, const Tensor& sigmas, const OptionalTensor& noise);

void rms_silu_window(const Tensor& x, const OptionalTensor& bias, const OptionalTensor& residual, const Tensor& gamma,
                     const Tensor& window, const OptionalTensor& history, bool keep);

void frames_to_uint8(const Tensor& video, const Tensor& out);

void causal_conv(const Tensor& window, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                 const Tensor& out);

void causal_conv_hopper(const Tensor& window, const Tensor& weight, const Tensor& out);

void upsample_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& out);

}  // namespace echo::bindings
