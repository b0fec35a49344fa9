// The ring's operations for torch: angles, the step to the next block, keys moved to where the shift puts them.

#include "check.h"
#include "kv_ring/advance.h"
#include "kv_ring/reanchor.h"
#include "kv_ring/rope_table.h"
#include "ops.h"

namespace echo::bindings {
void rope_table(const Tensor& frames, const Tensor& inverse_frequencies, const Tensor& out) {
  const Call call("rope_table", {{"frames", frames}, {"inverse_frequencies", inverse_frequencies}, {"out", out}});
  call.dtype({"frames", frames}, at::kLong);
  call.dtype({"inverse_frequencies", inverse_frequencies}, at::kDouble);
  call.dtype({"out", out}, at::kFloat);
  const auto [count] = call.sizes<1>({"frames", frames});
  const auto [pairs] = call.sizes<1>({"inverse_frequencies", inverse_frequencies});
  call.shape({"out", out}, {count, pairs, 2});
  for (const Named& each :
       {Named("frames", frames), Named("inverse_frequencies", inverse_frequencies), Named("out", out)}) {
    call.contiguous(each);
  }
  RopeTableParams params;
  params.frames = frames.const_data_ptr<int64_t>();
  params.inverse_frequencies = inverse_frequencies.const_data_ptr<double>();
  params.out = out.mutable_data_ptr<float>();
  params.frame_count = count;
  params.pairs = pairs;
  if (out.numel() != 0) call.done(launch_rope_table(params, call.stream()));
}

void advance(const Tensor& positions, int64_t frames_per_block, int64_t sink_frames, int64_t local_frames,
             int64_t memory_frames, int64_t max_temporal_id, const Tensor& inverse_frequencies,
             const Tensor& temporal_block, const Tensor& temporal_anchor, const Tensor& write_index) {
  const Call call("advance", {{"positions", positions},
                              {"inverse_frequencies", inverse_frequencies},
                              {"temporal_block", temporal_block},
                              {"temporal_anchor", temporal_anchor},
                              {"write_index", write_index}});
  call.dtype({"positions", positions}, at::kLong);
  call.dtype({"inverse_frequencies", inverse_frequencies}, at::kDouble);
  call.dtype({"temporal_block", temporal_block}, at::kFloat);
  call.dtype({"temporal_anchor", temporal_anchor}, at::kFloat);
  call.dtype({"write_index", write_index}, at::kLong);
  call.require(frames_per_block >= 1, "frames_per_block", "at least 1", frames_per_block);
  call.require(sink_frames >= 0, "sink_frames", "at least 0", sink_frames);
  call.require(local_frames >= 1, "local_frames", "at least 1", local_frames);
  call.require(memory_frames >= 0, "memory_frames", "at least 0", memory_frames);
  call.shape({"positions", positions}, {kPositionFields});
  const auto [pairs] = call.sizes<1>({"inverse_frequencies", inverse_frequencies});
  call.shape({"temporal_block", temporal_block}, {frames_per_block, pairs, 2});
  call.shape({"temporal_anchor", temporal_anchor}, {memory_frames + sink_frames, pairs, 2});
  const auto [tokens] = call.sizes<1>({"write_index", write_index});
  call.require(tokens % frames_per_block == 0, "write_index",
               "a multiple of frames_per_block " + std::to_string(frames_per_block) + " entries", tokens);
  for (const Named& each : {Named("positions", positions), Named("inverse_frequencies", inverse_frequencies),
                            Named("temporal_block", temporal_block), Named("temporal_anchor", temporal_anchor),
                            Named("write_index", write_index)}) {
    call.contiguous(each);
  }
  AdvanceParams params;
  params.layout = RingLayout{frames_per_block, sink_frames, local_frames, memory_frames, max_temporal_id};
  params.positions = positions.mutable_data_ptr<int64_t>();
  params.inverse_frequencies = inverse_frequencies.const_data_ptr<double>();
  params.temporal_block = temporal_block.mutable_data_ptr<float>();
  params.temporal_anchor = temporal_anchor.mutable_data_ptr<float>();
  params.write_index = write_index.mutable_data_ptr<int64_t>();
  params.pairs = pairs;
  params.tokens = tokens;
  call.done(launch_advance(params, call.stream()));
}

void reanchor(const Tensor& kv, const Tensor& temporal_anchor, const Tensor& spatial, const OptionalTensor& sink_k,
              const OptionalTensor& memory_k, const OptionalTensor& memory_v, int64_t memory_tokens) {
  const Named sink("sink_k", sink_k), keys("memory_k", memory_k), values("memory_v", memory_v);
  const Call call("reanchor",
                  {{"kv", kv}, {"temporal_anchor", temporal_anchor}, {"spatial", spatial}, sink, keys, values});
  const Named& first = sink_k ? sink : memory_k ? keys : values;  // of those that are given
  const bool float8 = kv.scalar_type() == at::kFloat8_e4m3fn;
  const bool nothing = !sink_k && !memory_k && !memory_v;
  if (float8 && nothing) return;
  const ScalarType dtype = call.floating(float8 ? first : Named("kv", kv));
  call.dtype({"temporal_anchor", temporal_anchor}, at::kFloat);
  call.dtype({"spatial", spatial}, at::kFloat);
  for (const Named& each : {sink, keys, values}) call.dtype(each, (float8 ? *first.tensor : kv).scalar_type());
  const auto [layers, two, rows, heads, head_dim] = call.sizes<5>({"kv", kv});
  call.shape({"kv", kv}, {layers, 2, rows, heads, head_dim});
  const auto [tokens, spatial_pairs, parts] = call.sizes<3>({"spatial", spatial});
  const int64_t temporal_pairs = head_dim / 2 - spatial_pairs;
  call.shape({"spatial", spatial}, {tokens, spatial_pairs, 2});
  call.require(tokens >= 1, "spatial", "at least one token", tokens);
  call.require(memory_tokens >= 0 && memory_tokens % tokens == 0, "memory_tokens",
               "a multiple of the " + std::to_string(tokens) + " tokens of a frame", memory_tokens);
  const int64_t anchors = call.sizes<3>({"temporal_anchor", temporal_anchor})[0];
  const int64_t sink_tokens = (anchors - memory_tokens / tokens) * tokens;
  call.require(sink_tokens >= 0 && memory_tokens + sink_tokens <= rows, "temporal_anchor",
               "frames of the memory and the sink, which are rows of kv", anchors);
  call.shape({"temporal_anchor", temporal_anchor}, {anchors, temporal_pairs, 2});
  call.shape(sink, {layers, sink_tokens, heads, head_dim});
  call.shape(keys, {memory_tokens, heads, head_dim});
  call.shape(values, {memory_tokens, heads, head_dim});
  for (const Named& each :
       {Named("kv", kv), Named("temporal_anchor", temporal_anchor), Named("spatial", spatial), sink, keys, values}) {
    call.contiguous(each);
  }
  call.aligned({"temporal_anchor", temporal_anchor}, kAngleBytes);
  call.aligned({"spatial", spatial}, kAngleBytes);
  ReanchorParams params;
  params.kv = kv.mutable_data_ptr();
  params.temporal_anchor = temporal_anchor.const_data_ptr<float>();
  params.spatial = spatial.const_data_ptr<float>();
  params.sink_k = sink_k ? sink_k->const_data_ptr() : nullptr;
  params.memory_k = memory_k ? memory_k->const_data_ptr() : nullptr;
  params.memory_v = memory_v ? memory_v->const_data_ptr() : nullptr;
  params.dtype = dtype;
  params.float8 = float8;
  params.layers = layers;
  params.rows = rows;
  params.heads = heads;
  params.head_dim = head_dim;
  params.memory_tokens = memory_tokens;
  params.sink_tokens = sink_k ? sink_tokens : 0;
  params.tokens_per_frame = tokens;
  params.temporal_pairs = temporal_pairs;
  params.spatial_pairs = spatial_pairs;
  if (!nothing) call.done(launch_reanchor(params, call.stream()));
}

}  // namespace echo::bindings
