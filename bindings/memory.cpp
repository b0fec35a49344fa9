// The memory's operations for torch. Both go through the tensor cores: no float32, and rows on 16 bytes.

#include "check.h"
#include "memory/gated_update.h"
#include "memory/memory_attention.h"
#include "ops.h"

namespace echo::bindings {
namespace {

constexpr int64_t kTile = 16;  // columns of one tensor-core product

}  // namespace

Tensor memory_attention(const Tensor& q, const Tensor& norm_q, const Tensor& k, const Tensor& v, double eps) {
  const Call call("memory_attention", {{"q", q}, {"norm_q", norm_q}, {"k", k}, {"v", v}});
  const ScalarType dtype = call.half({"q", q});
  call.dtype({"norm_q", norm_q}, at::kFloat);
  call.dtype({"k", k}, q.scalar_type());
  call.dtype({"v", v}, q.scalar_type());
  const auto [keys, heads, head_dim] = call.sizes<3>({"k", k});
  const int64_t queries = call.sizes<2>({"q", q})[0];
  call.require(head_dim == 64 || head_dim == 128, "k", "head size 64 or 128", head_dim);
  call.require(keys >= 1, "k", "at least one key", keys);
  call.shape({"q", q}, {queries, heads * head_dim});
  call.shape({"norm_q", norm_q}, {heads * head_dim});
  call.shape({"v", v}, {keys, heads, head_dim});
  MemoryAttentionParams params;
  params.q_row_stride = call.row_stride({"q", q});
  params.k_row_stride = call.row_stride({"k", k});
  params.v_row_stride = call.row_stride({"v", v});
  params.out_row_stride = heads * head_dim;
  call.contiguous({"norm_q", norm_q});
  for (const Named& each : {Named("q", q), Named("k", k), Named("v", v)}) call.aligned_rows(each);
  call.aligned({"norm_q", norm_q});
  const Tensor out = call.output(q, {queries, heads * head_dim});
  params.q = q.const_data_ptr();
  params.norm_q = norm_q.const_data_ptr<float>();
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.dtype = dtype;
  params.queries = queries;
  params.keys = keys;
  params.heads = heads;
  params.head_dim = head_dim;
  params.eps = static_cast<float>(eps);
  if (out.numel() != 0) call.done(launch_memory_attention(params, call.stream()));
  return out;
}

void gated_update(const Tensor& old, const Tensor& candidate, const Tensor& norm, const Tensor& gate_weight,
                  const Tensor& gate_bias, const Tensor& out, double eps) {
  const Call call("gated_update", {{"old", old},
                                   {"candidate", candidate},
                                   {"norm", norm},
                                   {"gate_weight", gate_weight},
                                   {"gate_bias", gate_bias},
                                   {"out", out}});
  const ScalarType dtype = call.half({"old", old});
  call.dtype({"candidate", candidate}, old.scalar_type());
  call.dtype({"norm", norm}, at::kFloat);
  for (const Named& each : {Named("gate_weight", gate_weight), Named("gate_bias", gate_bias), Named("out", out)}) {
    call.dtype(each, old.scalar_type());
  }
  const auto [rows, dim] = call.sizes<2>({"old", old});
  call.require(dim % kTile == 0, "old", "a width that is a multiple of " + std::to_string(kTile), dim);
  call.shape({"candidate", candidate}, {rows, dim});
  call.shape({"norm", norm}, {dim});
  call.shape({"gate_weight", gate_weight}, {dim, 2 * dim});
  call.shape({"gate_bias", gate_bias}, {dim});
  call.shape({"out", out}, {rows, dim});
  GatedUpdateParams params;
  params.old_row_stride = call.row_stride({"old", old});
  params.candidate_row_stride = call.row_stride({"candidate", candidate});
  params.weight_row_stride = call.row_stride({"gate_weight", gate_weight});
  params.out_row_stride = call.row_stride({"out", out});
  call.contiguous({"norm", norm});
  call.contiguous({"gate_bias", gate_bias});
  for (const Named& each :
       {Named("old", old), Named("candidate", candidate), Named("gate_weight", gate_weight), Named("out", out)}) {
    call.aligned_rows(each);
  }
  call.aligned({"norm", norm});
  call.aligned({"gate_bias", gate_bias});
  call.disjoint({"out", out}, {{"old", old}, {"candidate", candidate}});
  params.old = old.const_data_ptr();
  params.candidate = candidate.const_data_ptr();
  params.norm = norm.const_data_ptr<float>();
  params.gate_weight = gate_weight.const_data_ptr();
  params.gate_bias = gate_bias.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.dtype = dtype;
  params.rows = rows;
  params.dim = dim;
  params.eps = static_cast<float>(eps);
  if (out.numel() != 0) call.done(launch_gated_update(params, call.stream()));
}

}  // namespace echo::bindings
