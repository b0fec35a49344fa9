// See warpgroup.h.

#include "emulation/warpgroup.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "emulation/half.h"
#include "emulation/warp.h"

namespace echo::emulation {

namespace {

constexpr int kRows = 16, kDepth = 16, kWarps = 4;  // of one warp; of a warpgroup
constexpr int kMatrixRows = 8, kRowBytes = 16;
constexpr uint32_t kAllLanes = 0xFFFFFFFF;

float value_of_bits(uint16_t bits, __nv_bfloat16) { return bfloat16_value(bits); }
float value_of_bits(uint16_t bits, __half) { return half_value(bits); }

const PendingProduct& product_of(const Meeting& meeting, int lane) {
  return *value_of<const PendingProduct*>(meeting.deposits[lane]);
}

bool same(const Operand& a, const Operand& b) {
  return a.start == b.start && a.depth_stride == b.depth_stride && a.row_stride == b.row_stride;
}

// Row `row` of an operand: its 16 values along the sum.
template <class T>
void load_row(const Operand& operand, int row, float* values) {
  for (int depth = 0; depth < kDepth; depth += kMatrixRows) {
    const unsigned char* at = operand.start + row / kMatrixRows * operand.row_stride + row % kMatrixRows * kRowBytes +
                              depth / kMatrixRows * operand.depth_stride;
    check_shared(at, kRowBytes, "wgmma of a row");
    uint16_t bits[kMatrixRows];
    std::memcpy(bits, at, sizeof bits);
    for (int i = 0; i < kMatrixRows; ++i) values[depth + i] = value_of_bits(bits[i], T{});
  }
}

// The rows of one warp, by the lane that comes last: each value is widened once.
template <class T>
void multiply_rows(Meeting& meeting) {
  const PendingProduct& product = product_of(meeting, 0);
  for (int lane = 1; lane < kWarpSize; ++lane) {
    const PendingProduct& other = product_of(meeting, lane);
    if (!same(other.a, product.a) || !same(other.b, product.b)) fail("wgmma whose lanes name different operands");
  }
  std::vector<float>& b = current_thread->warp->operand;
  b.resize(static_cast<size_t>(product.columns) * kDepth);
  for (int column = 0; column < product.columns; ++column) load_row<T>(product.b, column, &b[column * kDepth]);
  for (int row = 0; row < kRows; ++row) {
    float a[kDepth];
    load_row<T>(product.a, product.first_row + row, a);
    for (int column = 0; column < product.columns; ++column) {
      float sum = 0;
      for (int depth = 0; depth < kDepth; ++depth) sum += a[depth] * b[column * kDepth + depth];
      // Of row g or g + 8 lane 4g + t has columns 8j + 2t and the next, as its elements 4j and on.
      const int lane = row % 8 * 4 + column % 8 / 2;
      product_of(meeting, lane).sums->values[column / 8 * 4 + row / 8 * 2 + column % 2] += sum;
    }
  }
}

// The sums in flight at this address, which hold nothing that anyone may read until they are waited for.
SumsInFlight* take_off(Thread& self, float* sums, size_t count) {
  for (const auto& flying : self.sums) {
    if (flying->home == sums) return flying.get();
  }
  self.sums.push_back(std::make_unique<SumsInFlight>(SumsInFlight{sums, {sums, sums + count}}));
  std::fill(sums, sums + count, std::numeric_limits<float>::quiet_NaN());
  return self.sums.back().get();
}

}  // namespace

void begin_products() { current_thread->products_begun = true; }

template <class T>
void multiply_async(float* sums, int columns, const Operand& a, const Operand& b, Site site) {
  Thread& self = *current_thread;
  if (self.writes_unfenced) fail("wgmma behind copies to shared memory, without fence.proxy.async between");
  if (!self.products_begun) fail("wgmma without wgmma.fence before it");
  const unsigned rank = self.index.x / kWarpSize, warp = rank % kWarps;
  if ((rank - warp + kWarps) * kWarpSize > current_block->size.x) fail("wgmma in a warpgroup that is not whole");
  self.products.push_back({take_off(self, sums, static_cast<size_t>(columns) / 2), columns,
                           static_cast<int>(warp) * kRows, a, b, site, multiply_rows<T>});
}

template void multiply_async<__nv_bfloat16>(float*, int, const Operand&, const Operand&, Site);
template void multiply_async<__half>(float*, int, const Operand&, const Operand&, Site);

void commit_products() { current_thread->product_ends.push_back(current_thread->products.size()); }

void wait_products(size_t allowed) {
  Thread& self = *current_thread;
  self.products_begun = false;
  if (self.product_ends.size() <= allowed) return;
  const size_t groups = self.product_ends.size() - allowed, finished = self.product_ends[groups - 1];
  stand_back();  // who may overwrite the operands already does that now
  for (size_t i = 0; i < finished; ++i) {
    const PendingProduct& product = self.products[i];
    leave(meet(kAllLanes, Operation::kWarpgroupMultiply, product.site, deposit_of(&product), product.run));
  }
  self.products.erase(self.products.begin(), self.products.begin() + static_cast<ptrdiff_t>(finished));
  self.product_ends.erase(self.product_ends.begin(), self.product_ends.begin() + static_cast<ptrdiff_t>(groups));
  for (size_t& end : self.product_ends) end -= finished;
  const auto landed = std::partition(self.sums.begin(), self.sums.end(), [&](const auto& flying) {
    return std::any_of(self.products.begin(), self.products.end(),
                       [&](const PendingProduct& product) { return product.sums == flying.get(); });
  });
  for (auto it = landed; it != self.sums.end(); ++it) {
    std::copy((*it)->values.begin(), (*it)->values.end(), (*it)->home);
  }
  self.sums.erase(landed, self.sums.end());
}

}  // namespace echo::emulation
