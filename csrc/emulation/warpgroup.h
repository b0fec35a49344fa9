// wgmma.m64nNk16 on the host. common/warpgroup.cuh gives it its names, and says how operands lie.
//
// A product happens when it is waited for, warp by warp, or later, when nobody else can go on. Until then its sums are
// poisoned, so that whoever reads them early gets NaN, and operands that are overwritten too early are read as they are
// then.

#pragma once

#include "emulation/block.h"

namespace echo::emulation {

void begin_products();
// sums (as warpgroup.cuh lays them out) += a [64,16] · b [columns,16]^T. T is __nv_bfloat16 or __half.
template <class T>
void multiply_async(float* sums, int columns, const Operand& a, const Operand& b, Site site);
void commit_products();
// Finishes all committed groups but the newest `allowed`.
void wait_products(size_t allowed);

}  // namespace echo::emulation
