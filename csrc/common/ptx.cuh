// Instructions that CUDA C++ has no words for, by intent. PTX stands here, Hopper's in barrier.cuh and warpgroup.cuh,
// and nowhere else.
//
// Lane l of a warp has g = l / 4 and t = l % 4. T is __nv_bfloat16 or __half; two of them fill a 32-bit register, the
// lower column or row in the low half.

#pragma once

#include <cstdint>
#include <type_traits>

#include "common/device.h"
#include "common/float8.h"
#include "common/scalar.h"

#if defined(ECHO_RT_EMULATED)
#define ECHO_SITE_PARAMETER , const char *file = __builtin_FILE(), int line = __builtin_LINE()
#else
#define ECHO_SITE_PARAMETER
#endif

namespace echo {

#if !defined(ECHO_RT_EMULATED)
namespace detail {
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
}  // namespace detail
#endif

// ---- asynchronous copies, global to shared

// Starts a copy of 16 bytes, both addresses multiples of 16; zeros, and global is not read, where not valid. It is
// there after wait_copies by this thread; other threads see it after a barrier behind that.
ECHO_DEVICE void copy_async_16(void* shared, const void* global, bool valid = true) {
#if defined(ECHO_RT_EMULATED)
  emulation::copy_async(shared, valid ? global : nullptr);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(detail::shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#endif
}

// Closes the group of the copies started since the last one; a group may be empty.
ECHO_DEVICE void commit_copies() {
#if defined(ECHO_RT_EMULATED)
  emulation::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for this thread's groups, all but the newest kStillRunning.
template <int kStillRunning>
ECHO_DEVICE void wait_copies() {
#if defined(ECHO_RT_EMULATED)
  emulation::wait_copies(kStillRunning);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kStillRunning) : "memory");
#endif
}

// ---- matrices of 8 rows of 8 values, shared memory to fragments

// Lane l gives the address of row l % 8 of matrix l / 8, a multiple of 16 bytes; register i receives of matrix i the
// columns 2t and 2t + 1 of row g.
ECHO_DEVICE void load_matrix_x4(uint32_t (&fragment)[4], const void* row ECHO_SITE_PARAMETER) {
#if defined(ECHO_RT_EMULATED)
  emulation::load_matrix<4, false>(fragment, row, {file, line});
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(detail::shared_address(row))
               : "memory");
#endif
}

// The same of the transposed matrices: rows 2t and 2t + 1 of column g.
ECHO_DEVICE void load_matrix_x4_transposed(uint32_t (&fragment)[4], const void* row ECHO_SITE_PARAMETER) {
#if defined(ECHO_RT_EMULATED)
  emulation::load_matrix<4, true>(fragment, row, {file, line});
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(detail::shared_address(row))
               : "memory");
#endif
}

// Two matrices, whose rows lanes 0 to 15 name; the other lanes' addresses are not used.
ECHO_DEVICE void load_matrix_x2(uint32_t (&fragment)[2], const void* row ECHO_SITE_PARAMETER) {
#if defined(ECHO_RT_EMULATED)
  emulation::load_matrix<2, false>(fragment, row, {file, line});
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(fragment[0]), "=r"(fragment[1])
               : "r"(detail::shared_address(row))
               : "memory");
#endif
}

ECHO_DEVICE void load_matrix_x2_transposed(uint32_t (&fragment)[2], const void* row ECHO_SITE_PARAMETER) {
#if defined(ECHO_RT_EMULATED)
  emulation::load_matrix<2, true>(fragment, row, {file, line});
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(fragment[0]), "=r"(fragment[1])
               : "r"(detail::shared_address(row))
               : "memory");
#endif
}

// ---- float8

// Two neighbours as e4m3, the first in the low byte: to nearest, ties to even, beyond 448 to 448; a NaN stays one.
ECHO_DEVICE uint32_t pack_float8(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t both;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(high), "f"(low));
  return both;
#else
  return float8_bits(low) | float8_bits(high) << 8;
#endif
}

// ---- tensor cores

// c [16,8] += a [16,16] · b [16,8] over a warp, summed in float32.
//   a: register r is row g + 8 (r & 1), columns 2t + 8 (r >> 1) and the next
//   b: register r is column g, rows 2t + 8 r and the next
//   c: element i is row g + 8 (i >> 1), column 2t + (i & 1)
template <class T>
ECHO_DEVICE void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2] ECHO_SITE_PARAMETER) {
#if defined(ECHO_RT_EMULATED)
  emulation::multiply_accumulate<T>(c, a, b, {file, line});
#else
  if constexpr (std::is_same<T, __nv_bfloat16>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same<T, __half>::value, "tensor cores multiply 16-bit types here");
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// 2^x within about two units in the last place; 0 for -infinity.
ECHO_DEVICE float exp2_approximate(float x) {
#if defined(ECHO_RT_EMULATED)
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace echo

#undef ECHO_SITE_PARAMETER
