// Graphs: what was captured, put into a stream again at each launch, in an order that its own dependencies allow.

#include <iterator>

#include "engine.h"

using namespace virtual_gpu;

namespace {

// Which of the nodes that could come next does: what a capture left open is open in its replay.
size_t pick(const Lock& lock, const std::set<size_t>& ready) {
  switch (policy(lock)) {
    case Policy::kEager:
      return *ready.begin();  // as captured
    case Policy::kLazy:
      return *ready.rbegin();  // what was captured last, and so all else as late as may be
    default:
      return *std::next(ready.begin(), static_cast<long>(chance(lock, ready.size())));
  }
}

std::vector<Item> in_some_order(const Lock& lock, const Graph& graph) {
  std::vector<size_t> missing(graph.nodes.size());  // how many of those before it are not in the order yet
  std::vector<std::vector<size_t>> later(graph.nodes.size());
  std::set<size_t> ready;
  for (size_t index = 0; index < graph.nodes.size(); index++) {
    missing[index] = graph.nodes[index].after.size();
    for (size_t before : graph.nodes[index].after) later[before].push_back(index);
    if (missing[index] == 0) ready.insert(index);
  }
  std::vector<Item> items;
  while (!ready.empty()) {
    size_t next = pick(lock, ready);
    ready.erase(next);
    items.push_back(graph.nodes[next].item);
    for (size_t index : later[next]) {
      if (--missing[index] == 0) ready.insert(index);
    }
  }
  return items;
}

}  // namespace

VIRTUAL_GPU_API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph,
                                                          unsigned long long) {
  *exec = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}

VIRTUAL_GPU_API cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t handle) {
  Lock lock = hold();
  if (machine().fault != cudaSuccess) return failed(machine().fault);
  Stream& stream = stream_of(lock, handle);
  if (stream.capture != nullptr) {
    // CUDA makes it a node of its own; nothing here needs that.
    complain(lock, "a graph is launched into a capture");
    return failed(cudaErrorNotSupported);
  }
  const Graph& graph = *reinterpret_cast<Graph*>(exec);
  std::vector<Item> items = in_some_order(lock, graph);
  enqueue(std::move(lock), stream, std::move(items));
  return cudaSuccess;
}

// What was launched holds its work itself, so these need not wait.
VIRTUAL_GPU_API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}

VIRTUAL_GPU_API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete reinterpret_cast<Graph*>(exec);
  return cudaSuccess;
}

// torch warns of graphs without nodes.
VIRTUAL_GPU_API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = reinterpret_cast<Graph*>(graph)->nodes.size();
  return cudaSuccess;
}
