// echo_rt._C.RingLayout: the ring's arithmetic, with its arguments checked.

#include "kv_ring/ring_layout.h"

#include <limits>
#include <string>

#include "register.h"

namespace py = pybind11;

namespace echo::bindings {
namespace {

void require_count(const char* name, int64_t value, int64_t smallest) {
  if (value >= smallest) return;
  throw py::value_error("RingLayout: " + std::string(name) + " must be at least " + std::to_string(smallest) +
                        ", got " + std::to_string(value));
}

void require_whole_blocks(const char* name, int64_t frames, int64_t frames_per_block) {
  if (frames % frames_per_block == 0) return;
  throw py::value_error("RingLayout: " + std::string(name) + " must be a multiple of frames_per_block " +
                        std::to_string(frames_per_block) + ", got " + std::to_string(frames));
}

RingLayout checked_layout(int64_t frames_per_block, int64_t sink_frames, int64_t local_frames, int64_t memory_frames,
                          int64_t max_temporal_id) {
  require_count("frames_per_block", frames_per_block, 1);
  require_count("sink_frames", sink_frames, memory_frames > 0 ? 1 : 0);
  require_count("local_frames", local_frames, 1);
  require_count("memory_frames", memory_frames, 0);
  require_count("max_temporal_id", max_temporal_id, 1);
  require_whole_blocks("sink_frames", sink_frames, frames_per_block);
  require_whole_blocks("local_frames", local_frames, frames_per_block);
  if (memory_frames > frames_per_block) {
    throw py::value_error("RingLayout: memory_frames must be at most frames_per_block " +
                          std::to_string(frames_per_block) + ", got " + std::to_string(memory_frames));
  }
  // One after the other, so that no sum can overflow.
  const bool ids_suffice = sink_frames <= max_temporal_id && local_frames <= max_temporal_id - sink_frames + 1 &&
                           memory_frames <= max_temporal_id - sink_frames - local_frames + 1;
  if (!ids_suffice) {
    throw py::value_error("RingLayout: sink_frames " + std::to_string(sink_frames) + " + memory_frames " +
                          std::to_string(memory_frames) + " + local_frames " + std::to_string(local_frames) +
                          " need more temporal ids than 0.." + std::to_string(max_temporal_id));
  }
  return RingLayout{frames_per_block, sink_frames, local_frames, memory_frames, max_temporal_id};
}

// The block itself, if its frames can be counted in 64 bits.
int64_t checked_block(const RingLayout& layout, int64_t block) {
  const int64_t largest = std::numeric_limits<int64_t>::max() / layout.frames_per_block - 1;
  if (block >= 0 && block <= largest) return block;
  throw py::value_error("RingLayout: block must be in 0.." + std::to_string(largest) + ", got " +
                        std::to_string(block));
}

int64_t checked_frame(int64_t frame) {
  if (frame >= 0) return frame;
  throw py::value_error("RingLayout: frame must not be negative, got " + std::to_string(frame));
}

// A method of a block, with the block checked.
template <typename Result>
auto of_block(Result (RingLayout::*method)(int64_t) const) {
  return [method](const RingLayout& layout, int64_t block) { return (layout.*method)(checked_block(layout, block)); };
}

std::string representation(const RingLayout& layout) {
  return "RingLayout(frames_per_block=" + std::to_string(layout.frames_per_block) +
         ", sink_frames=" + std::to_string(layout.sink_frames) +
         ", local_frames=" + std::to_string(layout.local_frames) +
         ", memory_frames=" + std::to_string(layout.memory_frames) +
         ", max_temporal_id=" + std::to_string(layout.max_temporal_id) + ")";
}

}  // namespace

void register_ring_layout(py::module_& module) {
  const auto block = py::arg("block");
  py::class_<RingLayout>(module, "RingLayout",
                         "Slots, evictions and temporal ids of the KV ring; every number counts latent frames.")
      .def(py::init(&checked_layout), py::kw_only(), py::arg("frames_per_block"), py::arg("sink_frames"),
           py::arg("local_frames"), py::arg("memory_frames"), py::arg("max_temporal_id"))
      .def_readonly("frames_per_block", &RingLayout::frames_per_block)
      .def_readonly("sink_frames", &RingLayout::sink_frames)
      .def_readonly("local_frames", &RingLayout::local_frames)
      .def_readonly("memory_frames", &RingLayout::memory_frames)
      .def_readonly("max_temporal_id", &RingLayout::max_temporal_id)
      .def_property_readonly("slots", &RingLayout::slots)
      .def("first_frame", of_block(&RingLayout::first_frame), block)
      .def("last_frame", of_block(&RingLayout::last_frame), block)
      .def("is_sink_block", of_block(&RingLayout::is_sink_block), block)
      .def(
          "slot", [](const RingLayout& layout, int64_t frame) { return layout.slot(checked_frame(frame)); },
          py::arg("frame"))
      .def("evicts", of_block(&RingLayout::evicts), block)
      .def("evicted_frame", of_block(&RingLayout::evicted_frame), block)
      .def("oldest_local", of_block(&RingLayout::oldest_local), block)
      .def("local_filled", of_block(&RingLayout::local_filled), block)
      .def("attended_begin", &RingLayout::attended_begin, py::arg("memory_active"))
      .def("attended_end", of_block(&RingLayout::attended_end), block)
      .def("shift", of_block(&RingLayout::shift), block)
      .def(
          "temporal_id",
          [](const RingLayout& layout, int64_t block, int64_t frame) {
            return layout.temporal_id(checked_block(layout, block), checked_frame(frame));
          },
          block, py::arg("frame"))
      .def("memory_frame", of_block(&RingLayout::memory_frame), block)
      .def("memory_fits", of_block(&RingLayout::memory_fits), block)
      .def("__repr__", &representation);
}

}  // namespace echo::bindings
