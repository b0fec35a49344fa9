// Hopper's products of a warpgroup (wgmma), by intent: four warps, both operands in shared memory, in the background.
// Machine code for sm_90a alone has them; kHasWarpgroupProducts says whether this is such.
//
// An operand is rows by 16 of depth, in matrices of 8 rows by 8 values: 128 bytes in one piece, a row after the other.
// It is named by where its first matrix starts, a multiple of 16 bytes, and how many bytes on the next 8 of depth and
// the next 8 rows are.
//
// The order of things: threads write shared memory and call fence_async(); a barrier; begin_products(); products,
// whose sums nobody touches; commit_products(); wait_products() of every thread, behind which the sums are there; and a
// barrier before the operands are overwritten.

#pragma once

#include <cstdint>
#include <type_traits>

#include "common/barrier.cuh"

namespace echo {

#if defined(ECHO_RT_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kHasWarpgroupProducts = true;
#else
inline constexpr bool kHasWarpgroupProducts = false;
#endif

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kWarpgroupRows = 64;                  // of the left operand and of the sums
inline constexpr int kMatrixRows = 8, kMatrixBytes = 128;  // of the matrices that operands are made of

class Operand {
 public:
  ECHO_DEVICE Operand(const void* start, int depth_stride, int row_stride);
  // The operand that starts `bytes` further on.
  ECHO_DEVICE Operand at(int bytes) const {
    Operand moved = *this;
#if defined(ECHO_RT_EMULATED)
    moved.named_.start += bytes;
#else
    moved.bits_ += static_cast<uint64_t>(bytes / kUnit);
#endif
    return moved;
  }

#if defined(ECHO_RT_EMULATED)
  const emulation::Operand& named() const { return named_; }
#else
  ECHO_DEVICE uint64_t bits() const { return bits_; }
#endif

 private:
  static constexpr int kUnit = 16;  // bytes, in which addresses and strides are given
#if defined(ECHO_RT_EMULATED)
  emulation::Operand named_;
#else
  uint64_t bits_;
#endif
};

ECHO_DEVICE Operand::Operand(const void* start, int depth_stride, int row_stride) {
#if defined(ECHO_RT_EMULATED)
  emulation::check_aligned(start, kUnit, "wgmma of an operand");
  named_ = {static_cast<const unsigned char*>(start), depth_stride, row_stride};
#else
  // The matrix descriptor of the PTX manual: address in bits 0..13, strides along the sum in 16..29 and along the rows
  // in 32..45; no swizzle is 0 in the highest bits.
  const auto units = [](uint32_t bytes) { return static_cast<uint64_t>(bytes / kUnit & 0x3FFF); };
  bits_ = units(detail::shared_address(start)) | units(static_cast<uint32_t>(depth_stride)) << 16 |
          units(static_cast<uint32_t>(row_stride)) << 32;
#endif
}

// Before the first product, and behind a wait: the sums are what the thread's registers hold.
ECHO_DEVICE void begin_products() {
#if defined(ECHO_RT_EMULATED)
  emulation::begin_products();
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

ECHO_DEVICE void commit_products() {
#if defined(ECHO_RT_EMULATED)
  emulation::commit_products();
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits for the warpgroup's groups of products, all but the newest kStillRunning.
template <int kStillRunning>
ECHO_DEVICE void wait_products() {
#if defined(ECHO_RT_EMULATED)
  emulation::wait_products(kStillRunning);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kStillRunning) : "memory");
#endif
}

// From here on each thread of this warpgroup has kCount registers, a multiple of 8: what one warpgroup gives back
// another one of the block takes, and waits for. A kernel starts with as many as its __launch_bounds__ leave a thread.
template <int kCount>
ECHO_DEVICE void give_back_registers() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

template <int kCount>
ECHO_DEVICE void take_registers() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

// Keeps the compiler from moving uses of sums across: it does not know that products write them in the background.
template <int kCount>
ECHO_DEVICE void hold(float (&sums)[kCount]) {
#if !defined(ECHO_RT_EMULATED)
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
#else
  (void)sums;
#endif
}

// sums [64,96] += left [64,16] · right [96,16]^T, in float32. Of the warpgroup's warp w, lane l with g = l / 4 and
// t = l % 4, element i is row 16w + g + 8 (i / 2 % 2), column 8 (i / 4) + 2t + i % 2. T is __nv_bfloat16 or __half.
#if defined(ECHO_RT_EMULATED)
template <class T>
void multiply_async(float (&sums)[48], const Operand& left, const Operand& right, const char* file = __builtin_FILE(),
                    int line = __builtin_LINE()) {
  emulation::multiply_async<T>(sums, 96, left.named(), right.named(), {file, line});
}
#else
#define ECHO_SUMS_8(i)                                                                                          \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
      "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define ECHO_MULTIPLY_ASYNC(type)                                                                                   \
  asm volatile(                                                                                                     \
      "{.reg .pred accumulate;\n setp.ne.u32 accumulate, %50, 0;\n"                                                 \
      "wgmma.mma_async.sync.aligned.m64n96k16.f32." type "." type                                                   \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
      "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "   \
      "%44, %45, %46, %47}, %48, %49, accumulate, 1, 1, 0, 0;\n}"                                                   \
      : ECHO_SUMS_8(0), ECHO_SUMS_8(8), ECHO_SUMS_8(16), ECHO_SUMS_8(24), ECHO_SUMS_8(32), ECHO_SUMS_8(40)          \
      : "l"(left.bits()), "l"(right.bits()), "r"(1))
template <class T>
ECHO_DEVICE void multiply_async(float (&sums)[48], const Operand& left, const Operand& right) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (std::is_same<T, __nv_bfloat16>::value) {
    ECHO_MULTIPLY_ASYNC("bf16");
  } else {
    static_assert(std::is_same<T, __half>::value, "tensor cores multiply 16-bit types here");
    ECHO_MULTIPLY_ASYNC("f16");
  }
#endif
}
#undef ECHO_MULTIPLY_ASYNC
#undef ECHO_SUMS_8
#endif

}  // namespace echo
