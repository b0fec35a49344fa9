// Python's interpreter lock, let go while this thread waits: the work that it waits for is computed in Python.
#pragma once

#include <dlfcn.h>

namespace virtual_gpu {

// Python is found at run time, so that programs without it can load the library: compilers inherit LD_PRELOAD.
class InterpreterReleased {
 public:
  InterpreterReleased() {
    static auto* initialized = function<int()>("Py_IsInitialized");
    static auto* held = function<int()>("PyGILState_Check");
    static auto* save = function<void*()>("PyEval_SaveThread");
    if (initialized != nullptr && initialized() != 0 && held() != 0) state_ = save();
  }

  ~InterpreterReleased() {
    static auto* restore = function<void(void*)>("PyEval_RestoreThread");
    if (state_ != nullptr) restore(state_);
  }

  InterpreterReleased(const InterpreterReleased&) = delete;
  InterpreterReleased& operator=(const InterpreterReleased&) = delete;

 private:
  template <class Signature>
  static Signature* function(const char* name) {
    return reinterpret_cast<Signature*>(dlsym(RTLD_DEFAULT, name));
  }

  void* state_ = nullptr;
};

}  // namespace virtual_gpu
