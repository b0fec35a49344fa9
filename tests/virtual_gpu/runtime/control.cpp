// What the Python side asks of the device, through ctypes.

#include <cstring>
#include <map>

#include "engine.h"
#include "launches.h"

using namespace virtual_gpu;

namespace {

// Computes the work of a number, 0 if it worked; and lets go of it.
using Compute = int (*)(long number);
using Forget = void (*)(long number);

Compute compute = nullptr;
Forget forget = nullptr;

}  // namespace

VIRTUAL_GPU_API void virtual_gpu_set_worker(Compute compute_work, Forget forget_work) {
  compute = compute_work;
  forget = forget_work;
}

// Puts the work of `number` into a stream. It is forgotten when neither a queue nor a graph holds it any more.
VIRTUAL_GPU_API cudaError_t virtual_gpu_submit(cudaStream_t stream, long number, const char* name,
                                               const void* const* addresses, const size_t* bytes, size_t ranges) {
  auto held = std::shared_ptr<long>(new long(number), [](long* of) {
    forget(*of);
    delete of;
  });
  Item item;
  item.name = name;
  for (size_t index = 0; index < ranges; index++) item.memory.push_back({addresses[index], bytes[index]});
  item.work = [held] { return compute(*held) == 0; };
  cudaError_t error = submit(stream, std::move(item));
  cudaGetLastError();  // the caller raises it; the next call has not failed
  return error;
}

VIRTUAL_GPU_API void virtual_gpu_launches_are_computed_beside(bool so) { launches_are_computed_beside(so); }

// False for a policy that is not known.
VIRTUAL_GPU_API bool virtual_gpu_choose_policy(const char* name, unsigned seed) {
  static const std::map<std::string, Policy> known = {
      {"eager", Policy::kEager}, {"lazy", Policy::kLazy}, {"random", Policy::kRandom}};
  auto found = known.find(name);
  if (found == known.end()) return false;
  choose_policy(found->second, seed);
  return true;
}

// Of kernels, since the start.
VIRTUAL_GPU_API long virtual_gpu_launches() {
  Lock lock = hold();
  return machine().launches;
}

// All complaints, a line each, into `text`. The result is their length, which may be more than fits.
VIRTUAL_GPU_API size_t virtual_gpu_complaints(char* text, size_t bytes) {
  Lock lock = hold();
  std::string all;
  for (const std::string& complaint : machine().complaints) all += complaint + "\n";
  if (all.size() < bytes) std::memcpy(text, all.c_str(), all.size() + 1);
  return all.size();
}

VIRTUAL_GPU_API void virtual_gpu_forget_complaints() {
  Lock lock = hold();
  machine().complaints.clear();
}
