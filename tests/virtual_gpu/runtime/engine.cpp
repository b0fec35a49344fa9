#include "engine.h"

#include <algorithm>
#include <chrono>
#include <random>

#include "interpreter.h"
#include "memory.h"

namespace virtual_gpu {
namespace {

Policy chosen = Policy::kEager;
std::mt19937 generator;
thread_local bool inside_an_item = false;

// At most so many items run by chance when another is queued.
constexpr size_t kMostByChance = 3;
// And so many each time that somebody asks whether something is done.
constexpr size_t kItemsPerQuestion = 2;
// Without any progress for so long, the program hangs: it waits for itself.
constexpr auto kPatience = std::chrono::seconds(120);

double milliseconds() {
  auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(since).count();
}

bool blocked(const Item& item) { return item.kind == Item::Kind::kWait && !item.record->passed; }

bool ready(const Stream& stream) { return !stream.running && !stream.queue.empty() && !blocked(stream.queue.front()); }

std::vector<Stream*> ready_streams() {
  std::vector<Stream*> found;
  for (Stream* stream : machine().streams) {
    if (ready(*stream)) found.push_back(stream);
  }
  return found;
}

bool will_pass(const Stream& stream, const Record& record) {
  return std::any_of(stream.queue.begin(), stream.queue.end(), [&](const Item& item) {
    return item.kind == Item::Kind::kRecord && item.record.get() == &record;
  });
}

Stream* leading_to(const Record& record);

// The stream whose next item brings `stream` nearer to its end; null where that item is running already.
Stream* leading_to(Stream& stream) {
  if (stream.running || stream.queue.empty()) return nullptr;
  const Item& next = stream.queue.front();
  return blocked(next) ? leading_to(*next.record) : &stream;
}

Stream* leading_to(const Record& record) {
  for (Stream* stream : machine().streams) {
    if (will_pass(*stream, record)) return leading_to(*stream);
  }
  return nullptr;
}

// Work runs as it would on a device: whole, and only where the memory it was given is still there.
void run(Lock& lock, Item& item) {
  trace("run " + item.name);
  bool lost = machine().fault != cudaSuccess;
  if (!lost && !all_allocated(lock, item.memory)) {
    complain(lock, item.name + " uses memory that was freed");
    machine().fault = cudaErrorIllegalAddress;
    lost = true;
  }
  lock.unlock();
  inside_an_item = true;
  bool worked = lost || !item.work || item.work();
  item.work = nullptr;
  inside_an_item = false;
  lock.lock();
  if (!worked) {
    complain(lock, item.name + " failed");
    machine().fault = cudaErrorLaunchFailure;
  }
}

void pass(const Item& mark) {
  if (mark.kind != Item::Kind::kRecord) return;
  mark.record->passed = true;
  mark.record->milliseconds = milliseconds();
}

void step(Lock& lock, Stream& stream) {
  Item item = std::move(stream.queue.front());
  stream.queue.pop_front();
  stream.running = true;
  if (item.kind == Item::Kind::kWork) {
    run(lock, item);
  } else {
    pass(item);
  }
  stream.running = false;
  machine().moved.notify_all();
}

bool step_by_chance(Lock& lock) {
  std::vector<Stream*> ready = ready_streams();
  if (ready.empty()) return false;
  step(lock, *ready[chance(lock, ready.size())]);
  return true;
}

bool anything_runs() {
  const auto& streams = machine().streams;
  return std::any_of(streams.begin(), streams.end(), [](const Stream* stream) { return stream->running; });
}

// Runs items until `done`. `next` is the stream to go on with where nothing but what is waited for may run.
cudaError_t drain(Lock lock, const std::function<bool()>& done, const std::function<Stream*()>& next) {
  if (inside_an_item) {
    // Python's collector may free what torch frees with a wait; an item cannot wait for itself.
    complain(lock, "work of the device waits for the device");
    return cudaErrorNotPermitted;
  }
  lock.unlock();
  InterpreterReleased released;
  lock.lock();
  while (!done()) {
    Stream* stream = chosen == Policy::kLazy ? next() : nullptr;
    if (stream != nullptr) {
      step(lock, *stream);
    } else if (chosen == Policy::kLazy || !step_by_chance(lock)) {
      if (done()) break;
      if (!anything_runs()) give_up("streams wait for one another");
      if (machine().moved.wait_for(lock, kPatience) == std::cv_status::timeout)
        give_up("an item does not come to its end");
    }
  }
  cudaError_t fault = machine().fault;
  lock.unlock();  // before the interpreter is asked for again, whose holder may want it
  return failed(fault);
}

// A place behind all that is in the queue by now: what comes later is not waited for.
std::shared_ptr<Record> mark_end(const Lock& lock, Stream& stream) {
  Item end;
  end.kind = Item::Kind::kRecord;
  end.name = "end";
  end.record = std::make_shared<Record>();
  auto record = end.record;
  enqueue_mark(lock, stream, std::move(end));
  return record;
}

void take_a_turn(Lock lock) {
  if (inside_an_item || chosen == Policy::kLazy) return;
  if (chosen == Policy::kEager) {
    wait_for_all(std::move(lock));
    return;
  }
  size_t many = chance(lock, kMostByChance + 1);
  if (many == 0 || ready_streams().empty()) return;
  lock.unlock();
  InterpreterReleased released;
  lock.lock();
  while (many-- > 0 && step_by_chance(lock)) {
  }
  lock.unlock();
}

// What moves the device while the host does nothing but ask.
class Beside {
 public:
  void ask(const Lock&) {
    if (!started_) std::thread([this] { work(); }).detach();
    started_ = true;
    owed_ = kItemsPerQuestion;
    asked_.notify_one();
  }

 private:
  void work() {
    Lock lock = hold();
    while (true) {
      asked_.wait(lock, [this] { return owed_ > 0; });
      if (!step_by_chance(lock)) owed_ = 0;
      if (owed_ > 0) owed_--;
    }
  }

  bool started_ = false;
  size_t owed_ = 0;
  std::condition_variable asked_;
};

}  // namespace

void choose_policy(Policy policy, unsigned seed) {
  wait_for_all(hold());
  Lock lock = hold();
  chosen = policy;
  generator.seed(seed);
}

Policy policy(const Lock&) { return chosen; }

size_t chance(const Lock&, size_t limit) { return generator() % limit; }

bool idle(const Stream& stream) { return stream.queue.empty() && !stream.running; }

cudaError_t submit(cudaStream_t handle, Item item) {
  Lock lock = hold();
  if (machine().fault != cudaSuccess) return failed(machine().fault);
  Stream& stream = stream_of(lock, handle);
  if (Capture* capture = stream.capture.get()) {
    if (capture->invalid) return failed(cudaErrorStreamCaptureInvalidated);
    capture->graph.nodes.push_back({std::move(item), stream.latest});
    stream.latest = {capture->graph.nodes.size() - 1};
    return cudaSuccess;
  }
  std::vector<Item> items;
  items.push_back(std::move(item));
  enqueue(std::move(lock), stream, std::move(items));
  return cudaSuccess;
}

void enqueue(Lock lock, Stream& stream, std::vector<Item> items) {
  std::move(items.begin(), items.end(), std::back_inserter(stream.queue));
  take_a_turn(std::move(lock));
}

void enqueue_mark(const Lock&, Stream& stream, Item mark) {
  stream.queue.push_back(std::move(mark));
  // At once where nothing is before it, which is always so where all runs at once.
  while (chosen == Policy::kEager && ready(stream) && stream.queue.front().kind != Item::Kind::kWork) {
    pass(stream.queue.front());
    stream.queue.pop_front();
  }
}

cudaError_t wait_for_all(Lock lock) {
  std::vector<std::shared_ptr<Record>> ends;
  for (Stream* stream : machine().streams) {
    if (!idle(*stream)) ends.push_back(mark_end(lock, *stream));
  }
  cudaError_t fault = failed(machine().fault);
  lock.unlock();
  for (auto& end : ends) fault = wait_for(hold(), std::move(end));
  return fault;
}

cudaError_t wait_for(Lock lock, Stream& stream) {
  auto end = mark_end(lock, stream);
  return wait_for(std::move(lock), std::move(end));
}

cudaError_t wait_for(Lock lock, std::shared_ptr<Record> record) {
  return drain(std::move(lock), [=] { return record->passed; }, [=] { return leading_to(*record); });
}

void go_on_beside(const Lock& lock) {
  static auto* beside = new Beside;
  beside->ask(lock);
}

}  // namespace virtual_gpu
