// What happens to the QKV product, for torch.

#include "check.h"
#include "ops.h"
#include "qkv/qkv_norm_rope_store.h"

namespace echo::bindings {

Tensor qkv_norm_rope_store(const Tensor& qkv, const Tensor& norm_q, const Tensor& norm_k, const Tensor& temporal,
                           const Tensor& spatial, const Tensor& k_cache, const Tensor& v_cache,
                           const Tensor& write_index, const OptionalTensor& raw_k, int64_t raw_offset, double eps) {
  const Named raw("raw_k", raw_k);
  const Call call("qkv_norm_rope_store", {{"qkv", qkv},
                                          {"norm_q", norm_q},
                                          {"norm_k", norm_k},
                                          {"temporal", temporal},
                                          {"spatial", spatial},
                                          {"k_cache", k_cache},
                                          {"v_cache", v_cache},
                                          {"write_index", write_index},
                                          raw});
  const ScalarType dtype = call.floating({"qkv", qkv});
  for (const Named& each :
       {Named("norm_q", norm_q), Named("norm_k", norm_k), Named("temporal", temporal), Named("spatial", spatial)}) {
    call.dtype(each, at::kFloat);
  }
  const bool float8 = k_cache.scalar_type() == at::kFloat8_e4m3fn;
  if (!float8) call.dtype({"k_cache", k_cache}, qkv.scalar_type());
  call.dtype({"v_cache", v_cache}, k_cache.scalar_type());
  call.dtype(raw, qkv.scalar_type());
  call.dtype({"write_index", write_index}, at::kLong);

  const auto [rows, heads, head_dim] = call.sizes<3>({"k_cache", k_cache});
  const int64_t dim = heads * head_dim;
  call.shape({"v_cache", v_cache}, {rows, heads, head_dim});
  const int64_t tokens = call.sizes<2>({"qkv", qkv})[0];
  call.shape({"qkv", qkv}, {tokens, 3 * dim});
  call.shape({"norm_q", norm_q}, {dim});
  call.shape({"norm_k", norm_k}, {dim});
  const auto [frames, temporal_pairs, parts] = call.sizes<3>({"temporal", temporal});
  const int64_t tokens_per_frame = call.sizes<3>({"spatial", spatial})[0];
  const int64_t spatial_pairs = head_dim / 2 - temporal_pairs;
  call.shape({"temporal", temporal}, {frames, temporal_pairs, 2});
  call.shape({"spatial", spatial}, {tokens_per_frame, spatial_pairs, 2});
  call.require(frames * tokens_per_frame == tokens, "qkv",
               std::to_string(frames) + " frames of " + std::to_string(tokens_per_frame) + " tokens", tokens);
  const auto [stored] = call.sizes<1>({"write_index", write_index});
  call.require(stored <= tokens, "write_index", "at most the " + std::to_string(tokens) + " tokens of qkv", stored);
  if (raw_k) call.shape(raw, {call.sizes<3>(raw)[0], heads, head_dim});

  QkvNormRopeStoreParams params;
  params.qkv_stride = call.row_stride({"qkv", qkv});
  params.k_cache_stride = call.row_stride({"k_cache", k_cache});
  params.v_cache_stride = call.row_stride({"v_cache", v_cache});
  params.raw_k_stride = call.row_stride(raw);
  for (const Named& each : {Named("norm_q", norm_q), Named("norm_k", norm_k), Named("temporal", temporal),
                            Named("spatial", spatial), Named("write_index", write_index)}) {
    call.contiguous(each);
  }
  call.aligned({"temporal", temporal}, kAngleBytes);
  call.aligned({"spatial", spatial}, kAngleBytes);
  const Tensor q = call.output(k_cache, {tokens, heads, head_dim});
  params.qkv = qkv.const_data_ptr();
  params.norm_q = norm_q.const_data_ptr<float>();
  params.norm_k = norm_k.const_data_ptr<float>();
  params.temporal = temporal.const_data_ptr<float>();
  params.spatial = spatial.const_data_ptr<float>();
  params.q = q.mutable_data_ptr();
  params.k_cache = k_cache.mutable_data_ptr();
  params.v_cache = v_cache.mutable_data_ptr();
  params.write_index = write_index.const_data_ptr<int64_t>();
  params.raw_k = raw_k ? raw_k->mutable_data_ptr() : nullptr;
  params.dtype = dtype;
  params.float8 = float8;
  params.tokens = tokens;
  params.stored_tokens = stored;
  params.heads = heads;
  params.head_dim = head_dim;
  params.tokens_per_frame = tokens_per_frame;
  params.temporal_pairs = temporal_pairs;
  params.spatial_pairs = spatial_pairs;
  params.raw_offset = raw_offset;
  params.eps = static_cast<float>(eps);
  if (q.numel() != 0) call.done(launch_qkv_norm_rope_store(params, call.stream()), "k_cache", dim);
  return q;
}

}  // namespace echo::bindings
