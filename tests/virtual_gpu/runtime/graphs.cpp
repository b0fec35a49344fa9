// Graphs: what was captured, put into a stream again at each launch, in an order that its own dependencies allow.

#include <algorithm>

#include "engine.h"

using namespace virtual_gpu;

namespace {

// Which of the nodes that could come next does: what a capture left open is open in its replay.
size_t pick(const Lock& lock, const std::vector<size_t>& ready) {
  switch (policy(lock)) {
    case Policy::kEager:
      return 0;  // as captured
    case Policy::kLazy:
      return ready.size() - 1;  // what was captured last, and so everything else as late as may be
    default:
      return chance(lock, ready.size());
  }
}

std::vector<Item> in_some_order(const Lock& lock, const Graph& graph) {
  std::vector<Item> items;
  std::vector<bool> done(graph.nodes.size());
  while (items.size() < graph.nodes.size()) {
    std::vector<size_t> ready;
    for (size_t index = 0; index < graph.nodes.size(); index++) {
      const auto& after = graph.nodes[index].after;
      bool free = std::all_of(after.begin(), after.end(), [&](size_t before) { return done[before]; });
      if (!done[index] && free) ready.push_back(index);
    }
    size_t next = ready[pick(lock, ready)];
    done[next] = true;
    items.push_back(graph.nodes[next].item);
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
  count(lock, "graph launches");
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
