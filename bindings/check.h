// What a binding demands of its tensors: device, dtype, shape, stride, alignment, checked in that order. A complaint
// names the operation and the tensor, and says what was expected and what came.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>

#include "common/device.h"
#include "common/row_width.h"
#include "common/scalar.h"
#if !defined(ECHO_RT_EMULATED)
#include <c10/cuda/CUDAStream.h>
#endif

namespace echo::bindings {

// A tensor under the name that the schema gives it; null for an optional one that was left out.
struct Named {
  Named(const char* name, const at::Tensor& tensor) : name(name), tensor(&tensor) {}
  Named(const char* name, const std::optional<at::Tensor>& tensor)
      : name(name), tensor(tensor.has_value() ? &*tensor : nullptr) {}

  const char* name;
  const at::Tensor* tensor;
};

inline constexpr size_t kVectorBytes = 16;
inline constexpr size_t kAngleBytes = 2 * sizeof(float);  // cosine and sine
// Entries of the position record that advance() writes, and the place of the block among them.
inline constexpr int64_t kPositionFields = 5, kBlockField = 0;

// One call of an operation: its name, its device and its stream. Every tensor must be on the device of the first.
class Call {
 public:
  Call(const char* op, std::initializer_list<Named> tensors) : op_(op), guard_(tensors.begin()->tensor->device()) {
    const Named& first = *tensors.begin();
    for (const Named& each : tensors) {
      if (each.tensor != nullptr && each.tensor->device() != first.tensor->device()) {
        fail(each.name, "device " + first.tensor->device().str() + ", that of " + first.name,
             each.tensor->device().str());
      }
    }
  }

  void dtype(Named arg, at::ScalarType expected) const {
    if (arg.tensor == nullptr || arg.tensor->scalar_type() == expected) return;
    fail(arg.name, std::string("dtype ") + text(expected), text(arg.tensor->scalar_type()));
  }

  // The dtype of a tensor that may have any that there is a kernel for.
  ScalarType floating(Named arg) const {
    switch (arg.tensor->scalar_type()) {
      case at::kFloat:
        return ScalarType::kFloat32;
      case at::kBFloat16:
        return ScalarType::kBFloat16;
      case at::kHalf:
        return ScalarType::kFloat16;
      default:
        fail(arg.name, "dtype float32, bfloat16 or float16", text(arg.tensor->scalar_type()));
    }
  }

  // The dtype of a tensor that goes through the tensor cores.
  ScalarType half(Named arg) const {
    const at::ScalarType found = arg.tensor->scalar_type();
    if (found != at::kBFloat16 && found != at::kHalf) fail(arg.name, "dtype bfloat16 or float16", text(found));
    return floating(arg);
  }

  template <size_t Rank>
  std::array<int64_t, Rank> sizes(Named arg) const {
    if (arg.tensor->dim() != static_cast<int64_t>(Rank)) {
      fail(arg.name, std::to_string(Rank) + " dimensions", "shape " + text(arg.tensor->sizes()));
    }
    std::array<int64_t, Rank> found;
    for (size_t i = 0; i < Rank; ++i) found[i] = arg.tensor->size(static_cast<int64_t>(i));
    return found;
  }

  void shape(Named arg, at::IntArrayRef expected) const {
    if (arg.tensor == nullptr || arg.tensor->sizes() == expected) return;
    fail(arg.name, "shape " + text(expected), text(arg.tensor->sizes()));
  }

  // A fact about a number that is not a tensor's whole shape, such as "a multiple of".
  void require(bool holds, const char* name, const std::string& expected, int64_t found) const {
    if (!holds) fail(name, expected, std::to_string(found));
  }

  void contiguous(Named arg) const {
    if (arg.tensor == nullptr || arg.tensor->is_contiguous()) return;
    fail(arg.name, "contiguous memory",
         "strides " + text(arg.tensor->strides()) + " of shape " + text(arg.tensor->sizes()));
  }

  // Five dimensions, of which the second lies innermost.
  void channels_last(Named arg) const {
    if (arg.tensor->is_contiguous(at::MemoryFormat::ChannelsLast3d)) return;
    fail(arg.name, "channels-last memory",
         "strides " + text(arg.tensor->strides()) + " of shape " + text(arg.tensor->sizes()));
  }

  // Everything behind the first dimension is dense; the answer is the first one's stride in elements.
  int64_t row_stride(Named arg) const {
    if (arg.tensor == nullptr) return 0;
    const at::Tensor& t = *arg.tensor;
    int64_t dense = 1;
    for (int64_t i = t.dim() - 1; i > 0; --i) {
      if (t.size(i) != 1 && t.stride(i) != dense) fail(arg.name, "dense rows", "strides " + text(t.strides()));
      dense *= t.size(i);
    }
    if (t.size(0) <= 1) return dense;  // one row is nowhere near a next one: torch may say any stride
    if (t.stride(0) < dense) fail(arg.name, "rows that do not overlap", "strides " + text(t.strides()));
    return t.stride(0);
  }

  // What a kernel reads or writes at a time: mostly 16 bytes, a pair of cosine and sine 8.
  void aligned(Named arg, size_t bytes = kVectorBytes) const {
    if (arg.tensor == nullptr) return;
    const size_t beyond = reinterpret_cast<uintptr_t>(arg.tensor->const_data_ptr()) % bytes;
    if (beyond != 0) {
      fail(arg.name, "an address that is a multiple of " + std::to_string(bytes),
           std::to_string(beyond) + " bytes more");
    }
  }

  // The same for every row of it.
  void aligned_rows(Named arg) const {
    aligned(arg);
    const int64_t bytes = row_stride(arg) * static_cast<int64_t>(arg.tensor->element_size());
    if (arg.tensor->size(0) > 1 && bytes % static_cast<int64_t>(kVectorBytes) != 0) {
      fail(arg.name, "rows that are a multiple of 16 bytes apart", std::to_string(bytes) + " bytes");
    }
  }

  // What is written shares no memory with what is read all along.
  void disjoint(Named written, std::initializer_list<Named> read) const {
    const auto begin = [](Named arg) { return reinterpret_cast<uintptr_t>(arg.tensor->const_data_ptr()); };
    const auto end = [&](Named arg) {
      int64_t last = 0;
      for (int64_t i = 0; i < arg.tensor->dim(); ++i) last += (arg.tensor->size(i) - 1) * arg.tensor->stride(i);
      return begin(arg) + (last + 1) * arg.tensor->element_size();
    };
    for (const Named& each : read) {
      if (written.tensor->numel() == 0 || begin(written) >= end(each) || begin(each) >= end(written)) continue;
      fail(written.name, std::string("memory apart from that of ") + each.name, "memory that they share");
    }
  }

  // Memory for a result. Emulated, it is full of NaN, so that an element which a kernel forgets is seen.
  at::Tensor output(const at::Tensor& like, at::IntArrayRef sizes) const {
    at::Tensor out = like.new_empty(sizes);
#if defined(ECHO_RT_EMULATED)
    std::memset(out.mutable_data_ptr(), 0xFF, out.nbytes());
#endif
    return out;
  }

  cudaStream_t stream() const {
#if defined(ECHO_RT_EMULATED)
    return nullptr;
#else
    return c10::cuda::getCurrentCUDAStream(guard_.current_device().index());
#endif
  }

  // The same for a kernel that keeps rows of `dim` channels in registers: what it refuses are rows that are too wide.
  void done(cudaError_t status, const char* rows, int64_t dim, int64_t widest = kWidestWholeRow) const {
    require(status != cudaErrorInvalidValue || dim <= kWidestRow, rows,
            "at most " + std::to_string(widest) + " channels, or " + std::to_string(kWidestRow) +
                " where not everything as wide as a row is made of aligned 16-byte pieces",
            dim);
    done(status);
  }

  void done(cudaError_t status) const {
    TORCH_CHECK(status == cudaSuccess, "echo_rt.", op_, ": ", describe_error(status));
  }

 private:
  // The name that Python uses.
  static const char* text(at::ScalarType dtype) {
    switch (dtype) {
      case at::kFloat:
        return "float32";
      case at::kDouble:
        return "float64";
      case at::kHalf:
        return "float16";
      case at::kBFloat16:
        return "bfloat16";
      case at::kFloat8_e4m3fn:
        return "float8_e4m3fn";
      case at::kByte:
        return "uint8";
      case at::kInt:
        return "int32";
      case at::kLong:
        return "int64";
      default:
        return c10::toString(dtype);
    }
  }

  static std::string text(at::IntArrayRef numbers) {
    std::string all = "[";
    for (size_t i = 0; i < numbers.size(); ++i) all += (i == 0 ? "" : ", ") + std::to_string(numbers[i]);
    return all + "]";
  }

  [[noreturn]] void fail(const char* name, const std::string& expected, const std::string& found) const {
    TORCH_CHECK_VALUE(false, "echo_rt.", op_, ": ", name, ": expected ", expected, "; got ", found);
    std::abort();  // the line above throws; not every compiler sees it
  }

  const char* op_;
  c10::DeviceGuard guard_;
};

}  // namespace echo::bindings
