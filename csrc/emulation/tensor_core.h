// cp.async, ldmatrix and mma.sync.m16n8k16 on the host. common/ptx.cuh gives them their names.
//
// Fragments, for lane l with g = l / 4 and t = l % 4, as the PTX manual lays them out:
//   ldmatrix   lane l names row l % 8 of matrix l / 8, and receives of matrix i, row g, the pair of columns 2t, 2t + 1
//              (transposed: column g, rows 2t and 2t + 1)
//   A [16,16]  register r: row g + 8 (r & 1), columns 2t + 8 (r >> 1) and the next
//   B [16,8]   register r: column g, rows 2t + 8 r and the next
//   C [16,8]   element i: row g + 8 (i >> 1), column 2t + (i & 1)

#pragma once

#include <cstddef>
#include <cstdint>

#include "emulation/block.h"

namespace echo::emulation {

// Issues a copy of 16 bytes, or of zeros where from is null. It happens when it is waited for; until then the target is
// poisoned, so that whoever reads it early gets NaN, and whoever still reads what was there before does too.
void copy_async(void* to, const void* from);
void perform(const PendingCopy& copy);
void commit_copies();
// Finishes all committed groups but the newest `allowed`.
void wait_copies(size_t allowed);

template <int kMatrices, bool kTransposed>
void load_matrix(uint32_t (&registers)[kMatrices], const void* row, Site site);

extern template void load_matrix<4, false>(uint32_t (&)[4], const void*, Site);
extern template void load_matrix<4, true>(uint32_t (&)[4], const void*, Site);
extern template void load_matrix<2, false>(uint32_t (&)[2], const void*, Site);
extern template void load_matrix<2, true>(uint32_t (&)[2], const void*, Site);

// c += a · b with products and sums in float32. T is __nv_bfloat16 or __half.
template <class T>
void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site);

}  // namespace echo::emulation
