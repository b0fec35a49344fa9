// What of attention is not a library's, for torch.

#include "check.h"
#include "ops.h"
// Behind torch, some of whose functions have names that the emulation gives to macros.
#include "attention/merge_attention.h"

namespace echo::bindings {

Tensor merge_attention(const Tensor& outputs, const Tensor& logsumexps) {
  const Call call("merge_attention", {{"outputs", outputs}, {"logsumexps", logsumexps}});
  MergeAttentionParams params;
  params.dtype = call.floating({"outputs", outputs});
  call.dtype({"logsumexps", logsumexps}, at::kFloat);
  const auto [pieces, tokens, heads, head_dim] = call.sizes<4>({"outputs", outputs});
  call.require(pieces >= kFewestPieces && pieces <= kMostPieces, "outputs",
               std::to_string(kFewestPieces) + " to " + std::to_string(kMostPieces) + " pieces", pieces);
  call.shape({"logsumexps", logsumexps}, {pieces, heads, tokens});
  params.outputs_stride = call.row_stride({"outputs", outputs});
  call.contiguous({"logsumexps", logsumexps});
  const Tensor out = call.output(outputs, {tokens, heads * head_dim});
  params.outputs = outputs.const_data_ptr();
  params.logsumexps = logsumexps.const_data_ptr<float>();
  params.out = out.mutable_data_ptr();
  params.pieces = pieces;
  params.tokens = tokens;
  params.heads = heads;
  params.head_dim = head_dim;
  if (out.numel() != 0) call.done(launch_merge_attention(params, call.stream()));
  return out;
}

}  // namespace echo::bindings
