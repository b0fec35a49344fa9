// Runs the kernels on tensors of which each is an allocation of its own, exactly as large as it says: under the address
// sanitizer an access outside any of them ends the program. Usage: memory_driver OPERATION [SPARE]; SPARE elements more
// than there are is what the kernel is told.

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "attention/merge_attention.h"
#include "kv_ring/advance.h"
#include "kv_ring/reanchor.h"
#include "kv_ring/rope_table.h"
#include "memory/gated_update.h"
#include "memory/memory_attention.h"
#include "modulate/gated_residual_norm.h"
#include "modulate/gelu_quantize.h"
#include "modulate/modulated_layer_norm.h"
#include "qkv/qkv_norm_rope_store.h"
#include "sampler/counter_noise.h"
#include "sampler/flow_step.h"
#include "vae/causal_conv.h"
#include "vae/causal_conv_hopper.h"
#include "vae/frames_to_uint8.h"
#include "vae/rms_silu_window.h"
#include "vae/upsample_conv.h"

namespace {

using echo::ScalarType;

int64_t spare = 0;

struct Sizes {
  int64_t tokens, frames, heads, head_dim, temporal_pairs, memory_frames;
  int64_t rows() const { return tokens * frames; }
  int64_t dim() const { return heads * head_dim; }
  int64_t spatial_pairs() const { return head_dim / 2 - temporal_pairs; }
};
// Whole vectors and none, rows of one warp and of several.
const Sizes kSizes[] = {
    {5, 3, 2, 64, 12, 1}, {7, 2, 3, 14, 3, 2}, {1, 1, 1, 64, 10, 0}, {3, 1, 12, 128, 22, 1}, {2, 1, 1, 128, 22, 1}};

// All tensors of one call.
class Tensors {
 public:
  template <class T>
  T* zeros(int64_t count) {
    auto bytes = std::make_unique<unsigned char[]>(static_cast<size_t>(count) * sizeof(T));
    T* start = reinterpret_cast<T*>(bytes.get());
    owned_.push_back(std::move(bytes));
    return start;
  }
  void* zeros(ScalarType type, int64_t count) { return zeros<unsigned char>(count * echo::size_of(type)); }

  template <class T>
  T* counting(int64_t count, int64_t first) {
    T* values = zeros<T>(count);
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<T>(first + i);
    return values;
  }

 private:
  std::vector<std::unique_ptr<unsigned char[]>> owned_;
};

template <class Run>
cudaError_t for_sizes(Run&& run) {
  for (const Sizes& sizes : kSizes) {
    Tensors tensors;
    if (const cudaError_t error = run(sizes, tensors); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class Run>
cudaError_t for_types(Run&& run) {
  return for_sizes([&](const Sizes& sizes, Tensors& tensors) {
    for (const ScalarType type : {ScalarType::kFloat32, ScalarType::kBFloat16, ScalarType::kFloat16}) {
      if (const cudaError_t error = run(sizes, tensors, type); error != cudaSuccess) return error;
    }
    return cudaSuccess;
  });
}

cudaError_t rope_table() {
  return for_sizes([](const Sizes& s, Tensors& t) {
    echo::RopeTableParams p;
    p.frames = t.counting<int64_t>(s.frames, 5);
    p.inverse_frequencies = t.zeros<double>(s.temporal_pairs);
    p.out = t.zeros<float>(s.frames * s.temporal_pairs * 2);
    p.frame_count = s.frames + spare;
    p.pairs = s.temporal_pairs;
    return launch_rope_table(p, nullptr);
  });
}

cudaError_t advance() {
  return for_sizes([](const Sizes& s, Tensors& t) {
    echo::AdvanceParams p;
    p.layout = {s.frames, s.frames, 3 * s.frames, s.memory_frames, 20};
    p.positions = t.zeros<int64_t>(5);
    p.inverse_frequencies = t.zeros<double>(s.temporal_pairs);
    p.temporal_block = t.zeros<float>(s.frames * s.temporal_pairs * 2);
    p.temporal_anchor = t.zeros<float>((s.memory_frames + s.frames) * s.temporal_pairs * 2);
    p.write_index = t.zeros<int64_t>(s.rows());
    p.pairs = s.temporal_pairs;
    p.tokens = s.rows() + spare * s.frames;
    return launch_advance(p, nullptr);
  });
}

// Of a type, and of float8.
template <class Run>
cudaError_t for_caches(Run&& run) {
  return for_types([&](const Sizes& sizes, Tensors& tensors, ScalarType type) {
    const cudaError_t error = run(sizes, tensors, type, false);
    return error == cudaSuccess ? run(sizes, tensors, type, true) : error;
  });
}

cudaError_t qkv_norm_rope_store() {
  return for_caches([](const Sizes& s, Tensors& t, ScalarType type, bool float8) {
    const auto cache = [&](int64_t count) -> void* { return float8 ? t.zeros<uint8_t>(count) : t.zeros(type, count); };
    const int64_t above = 2, kept = s.tokens;
    echo::QkvNormRopeStoreParams p;
    p.qkv = t.zeros(type, s.rows() * 3 * s.dim());
    p.norm_q = t.zeros<float>(s.dim());
    p.norm_k = t.zeros<float>(s.dim());
    p.temporal = t.zeros<float>(s.frames * s.temporal_pairs * 2);
    p.spatial = t.zeros<float>(s.tokens * s.spatial_pairs() * 2);
    p.q = cache(s.rows() * s.dim());
    p.k_cache = cache((above + kept) * s.dim());
    p.v_cache = cache((above + kept) * s.dim());
    p.write_index = t.counting<int64_t>(kept, above + spare);
    p.raw_k = t.zeros(type, kept * s.dim());
    p.dtype = type;
    p.float8 = float8;
    p.tokens = s.rows();
    p.stored_tokens = kept;
    p.heads = s.heads;
    p.head_dim = s.head_dim;
    p.tokens_per_frame = s.tokens;
    p.temporal_pairs = s.temporal_pairs;
    p.spatial_pairs = s.spatial_pairs();
    p.qkv_stride = 3 * s.dim();
    p.k_cache_stride = p.v_cache_stride = p.raw_k_stride = s.dim();
    p.raw_offset = above;
    p.eps = 1e-6f;
    return launch_qkv_norm_rope_store(p, nullptr);
  });
}

cudaError_t reanchor() {
  return for_caches([](const Sizes& s, Tensors& t, ScalarType type, bool float8) {
    const int64_t layers = 3, memory = s.memory_frames * s.tokens;
    echo::ReanchorParams p;
    p.rows = memory + s.rows();
    const int64_t count = layers * 2 * p.rows * s.dim();
    p.kv = float8 ? t.zeros<uint8_t>(count) : t.zeros(type, count);
    p.temporal_anchor = t.zeros<float>((s.memory_frames + s.frames) * s.temporal_pairs * 2);
    p.spatial = t.zeros<float>(s.tokens * s.spatial_pairs() * 2);
    p.sink_k = t.zeros(type, layers * s.rows() * s.dim());
    p.memory_k = t.zeros(type, memory * s.dim());
    p.memory_v = t.zeros(type, memory * s.dim());
    p.dtype = type;
    p.float8 = float8;
    p.layers = layers + spare;
    p.heads = s.heads;
    p.head_dim = s.head_dim;
    p.memory_tokens = memory;
    p.sink_tokens = s.rows();
    p.tokens_per_frame = s.tokens;
    p.temporal_pairs = s.temporal_pairs;
    p.spatial_pairs = s.spatial_pairs();
    return launch_reanchor(p, nullptr);
  });
}

// Whether the tensor cores have tiles for it. Wide ones take long here, and have the same tiles.
bool tiled(const Sizes& s, ScalarType type) {
  return type != ScalarType::kFloat32 && s.head_dim % 64 == 0 && s.heads <= 3;
}

cudaError_t memory_attention() {
  return for_types([](const Sizes& s, Tensors& t, ScalarType type) {
    if (!tiled(s, type)) return cudaSuccess;
    echo::MemoryAttentionParams p;
    p.queries = s.rows();
    p.keys = 67 + spare;
    p.q = t.zeros(type, s.rows() * s.dim());
    p.norm_q = t.zeros<float>(s.dim());
    p.k = t.zeros(type, 67 * s.dim());
    p.v = t.zeros(type, 67 * s.dim());
    p.out = t.zeros(type, s.rows() * s.dim());
    p.dtype = type;
    p.heads = s.heads;
    p.head_dim = s.head_dim;
    p.q_row_stride = p.k_row_stride = p.v_row_stride = p.out_row_stride = s.dim();
    p.eps = 1e-6f;
    return launch_memory_attention(p, nullptr);
  });
}

cudaError_t gated_update() {
  return for_types([](const Sizes& s, Tensors& t, ScalarType type) {
    if (!tiled(s, type)) return cudaSuccess;
    echo::GatedUpdateParams p;
    p.old = t.zeros(type, s.rows() * s.dim());
    p.candidate = t.zeros(type, s.rows() * s.dim());
    p.norm = t.zeros<float>(s.dim());
    p.gate_weight = t.zeros(type, 2 * s.dim() * s.dim());
    p.gate_bias = t.zeros(type, s.dim());
    p.out = t.zeros(type, s.rows() * s.dim());
    p.dtype = type;
    p.rows = s.rows() + spare;
    p.dim = s.dim();
    p.old_row_stride = p.candidate_row_stride = p.out_row_stride = s.dim();
    p.weight_row_stride = 2 * s.dim();
    p.eps = 1e-6f;
    return launch_gated_update(p, nullptr);
  });
}

cudaError_t modulated_layer_norm_as(bool quantize) {
  return for_types([=](const Sizes& s, Tensors& t, ScalarType type) {
    echo::ModulatedLayerNormParams p;
    p.x = t.zeros(type, s.rows() * s.dim());
    p.shift = t.zeros<float>(s.dim());
    p.scale = t.zeros<float>(s.dim());
    p.out = quantize ? t.zeros<uint8_t>(s.rows() * s.dim()) : t.zeros(type, s.rows() * s.dim());
    if (quantize) p.out_scale = t.zeros<float>(s.rows());
    p.dtype = type;
    p.tokens = s.rows() + spare;
    p.dim = p.x_stride = s.dim();
    p.eps = 1e-6f;
    return launch_modulated_layer_norm(p, nullptr);
  });
}

cudaError_t modulated_layer_norm() { return modulated_layer_norm_as(false); }
cudaError_t modulated_layer_norm_quantize() { return modulated_layer_norm_as(true); }

cudaError_t gated_residual_norm_as(bool quantize) {
  return for_types([=](const Sizes& s, Tensors& t, ScalarType type) {
    echo::GatedResidualNormParams p;
    p.x = t.zeros(type, s.rows() * s.dim());
    p.y = t.zeros(type, s.rows() * s.dim());
    p.gate = t.zeros<float>(s.dim());
    p.shift = t.zeros<float>(s.dim());
    p.scale = t.zeros<float>(s.dim());
    p.out = quantize ? t.zeros<uint8_t>(s.rows() * s.dim()) : t.zeros(type, s.rows() * s.dim());
    if (quantize) p.out_scale = t.zeros<float>(s.rows());
    p.dtype = type;
    p.tokens = s.rows() + spare;
    p.dim = p.x_stride = p.y_stride = s.dim();
    p.eps = 1e-6f;
    return launch_gated_residual_norm(p, nullptr);
  });
}

cudaError_t gated_residual_norm() { return gated_residual_norm_as(false); }
cudaError_t gated_residual_norm_quantize() { return gated_residual_norm_as(true); }

cudaError_t merge_attention() {
  return for_types([](const Sizes& s, Tensors& t, ScalarType type) {
    echo::MergeAttentionParams p;
    p.pieces = 3;
    p.outputs_stride = s.rows() * s.dim();
    p.outputs = t.zeros(type, p.pieces * p.outputs_stride);
    p.logsumexps = t.zeros<float>(p.pieces * s.heads * s.rows());
    p.out = t.zeros(type, s.rows() * s.dim());
    p.dtype = type;
    p.tokens = s.rows() + spare;
    p.heads = s.heads;
    p.head_dim = s.head_dim;
    return launch_merge_attention(p, nullptr);
  });
}

cudaError_t gelu_quantize() {
  return for_types([](const Sizes& s, Tensors& t, ScalarType type) {
    echo::GeluQuantizeParams p;
    p.x = t.zeros(type, s.rows() * s.dim());
    p.out = t.zeros<uint8_t>(s.rows() * s.dim());
    p.out_scale = t.zeros<float>(s.rows());
    p.dtype = type;
    p.tokens = s.rows() + spare;
    p.dim = p.x_stride = s.dim();
    return launch_gelu_quantize(p, nullptr);
  });
}

cudaError_t counter_noise() {
  return for_sizes([](const Sizes& s, Tensors& t) {
    echo::CounterNoiseParams p;
    p.count = s.rows() * 3;  // mostly no whole number of vectors
    p.out = t.zeros<float>(p.count);
    p.count += spare;
    p.block = t.zeros<int64_t>(1);
    p.seed = t.zeros<int64_t>(2);
    p.step = 1;
    return launch_counter_noise(p, nullptr);
  });
}

cudaError_t flow_step() {
  return for_types([](const Sizes& s, Tensors& t, ScalarType type) {
    echo::FlowStepParams p;
    p.count = s.rows() * 3;
    p.x = t.zeros<float>(p.count);
    p.flow = t.zeros(type, p.count);
    p.noise = t.zeros<float>(p.count);
    p.sigmas = t.zeros<double>(2);
    p.dtype = type;
    p.count += spare;
    return launch_flow_step(p, nullptr);
  });
}

cudaError_t rms_silu_window() {
  return for_types([](const Sizes& s, Tensors& t, ScalarType type) {
    for (const int64_t channels : {s.dim(), int64_t{1030}}) {
      echo::RmsSiluWindowParams p;
      p.past = 2;
      p.x = t.zeros(type, s.rows() * channels);
      p.bias = t.zeros<float>(channels);
      p.residual = t.zeros(type, s.rows() * channels);
      p.gamma = t.zeros<float>(channels);
      p.window = t.zeros(type, (p.past * s.tokens + s.rows()) * channels);
      p.history = t.zeros(type, p.past * s.tokens * channels);
      p.dtype = type;
      p.frames = s.frames;
      p.frame_pixels = s.tokens + spare;
      p.channels = channels;
      p.keep = true;
      if (const cudaError_t error = launch_rms_silu_window(p, nullptr); error != cudaSuccess) return error;
    }
    return cudaSuccess;
  });
}

cudaError_t frames_to_uint8() {
  return for_types([](const Sizes& s, Tensors& t, ScalarType type) {
    echo::FramesToUint8Params p;
    p.count = s.rows() * 3;
    p.video = t.zeros(type, p.count);
    p.out = t.zeros<uint8_t>(p.count);
    p.dtype = type;
    p.count += spare;
    return launch_frames_to_uint8(p, nullptr);
  });
}

// Whole chunks and none, many channels that come out and few, pixels of two patches.
template <class Launch>
cudaError_t convolution(int64_t scale, int64_t taps, Launch&& launch) {
  struct {
    int64_t height, width, channels, out_channels;
    ScalarType type;
  } const sizes[] = {
      {3, 17, 8, 20, ScalarType::kBFloat16}, {2, 3, 40, 16, ScalarType::kFloat16}, {2, 3, 7, 5, ScalarType::kBFloat16}};
  for (const auto& s : sizes) {
    Tensors t;
    echo::ConvolutionParams p;
    p.frames = 2;
    p.height = s.height;
    p.width = s.width;
    p.channels = s.channels;
    p.out_channels = s.out_channels;
    p.kernel_frames = scale == 1 ? 2 : 1;
    p.x_frame_stride = s.height * s.width * s.channels;
    p.residual_frame_stride = p.out_frame_stride = scale * scale * s.height * s.width * s.out_channels;
    p.x = t.zeros(s.type, (p.frames + p.kernel_frames - 1) * p.x_frame_stride);
    p.weight = t.zeros(s.type, scale * scale * s.out_channels * p.kernel_frames * taps * s.channels);
    p.bias = t.zeros<float>(s.out_channels);
    p.residual = scale == 1 ? t.zeros(s.type, p.frames * p.out_frame_stride) : nullptr;
    p.out = t.zeros(s.type, p.frames * p.out_frame_stride);
    p.dtype = s.type;
    p.frames += spare;
    if (const cudaError_t error = launch(p); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t causal_conv() {
  for (const int64_t side : {1, 3}) {
    const auto launch = [&](const echo::ConvolutionParams& p) { return launch_causal_conv(p, side, nullptr); };
    if (const cudaError_t error = convolution(1, side * side, launch); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t causal_conv_hopper() {
  namespace hopper = echo::hopper;
  for (const ScalarType type : {ScalarType::kBFloat16, ScalarType::kFloat16}) {
    Tensors t;
    echo::ConvolutionParams p = {};
    p.frames = 2, p.height = 17, p.width = 5, p.kernel_frames = 3;
    p.channels = hopper::kDepth, p.out_channels = hopper::kColumns;
    p.x_frame_stride = p.height * p.width * p.channels;
    p.out_frame_stride = p.height * p.width * p.out_channels;
    p.x = t.zeros(type, (p.frames + p.kernel_frames - 1) * p.x_frame_stride);
    p.weight = t.zeros(type, p.out_channels * p.kernel_frames * hopper::kTaps * p.channels);
    p.out = t.zeros(type, p.frames * p.out_frame_stride);
    p.dtype = type;
    p.frames += spare;
    int* const taken = t.zeros<int>(1);
    if (const cudaError_t error = launch_causal_conv_hopper(p, taken, nullptr); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t upsample_conv() {
  return convolution(2, 4, [](const echo::ConvolutionParams& p) { return launch_upsample_conv(p, nullptr); });
}

}  // namespace

int main(int count, char** words) {
  const std::map<std::string, cudaError_t (*)()> operations = {
      {"rope_table", rope_table},
      {"advance", advance},
      {"qkv_norm_rope_store", qkv_norm_rope_store},
      {"reanchor", reanchor},
      {"memory_attention", memory_attention},
      {"gated_update", gated_update},
      {"modulated_layer_norm", modulated_layer_norm},
      {"gated_residual_norm", gated_residual_norm},
      {"modulated_layer_norm_quantize", modulated_layer_norm_quantize},
      {"gated_residual_norm_quantize", gated_residual_norm_quantize},
      {"gelu_quantize", gelu_quantize},
      {"merge_attention", merge_attention},
      {"counter_noise", counter_noise},
      {"flow_step", flow_step},
      {"rms_silu_window", rms_silu_window},
      {"frames_to_uint8", frames_to_uint8},
      {"causal_conv", causal_conv},
      {"causal_conv_hopper", causal_conv_hopper},
      {"upsample_conv", upsample_conv},
  };
  if (count < 2 || operations.count(words[1]) == 0) return 2;
  if (count > 2) spare = std::atoi(words[2]);
  const cudaError_t error = operations.at(words[1])();
  if (error == cudaSuccess) return EXIT_SUCCESS;
  std::fprintf(stderr, "%s: %s\n", words[1], echo::describe_error(error).c_str());
  return EXIT_FAILURE;
}
