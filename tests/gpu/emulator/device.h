// The emulated GPUs: what the files of this folder share.
//
// Work given to a stream is not done at once but as late as CUDA allows: when somebody waits for it.
// So a wait that is missing shows, as it may on a GPU.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace emulated {

constexpr int DEVICES = 2;
constexpr size_t MEMORY = size_t(4) << 30;  // of each
constexpr int MULTIPROCESSORS = 4;
constexpr int THREADS_PER_MULTIPROCESSOR = 2048, BLOCKS_PER_MULTIPROCESSOR = 32;
constexpr size_t SHARED = 233472, SHARED_PER_BLOCK = 49152, SHARED_PER_BLOCK_OPTIN = 232448;

// A piece of work, behind the work that it needs.
struct Op {
  uint64_t number;  // what it needs has smaller ones
  std::function<void()> run;
  std::vector<std::shared_ptr<Op>> needs;
  bool done = false;
};
using Work = std::shared_ptr<Op>;

struct Capture {
  cudaStreamCaptureMode mode;
  struct Stream* origin;
  std::vector<Work> nodes;
  bool failed = false;
};

struct Stream {
  int device;
  unsigned flags = 0;
  int priority = 0;
  bool legacy = false;
  Work last;
  std::shared_ptr<Capture> capture;
};

extern std::recursive_mutex lock;
using Guard = std::lock_guard<std::recursive_mutex>;

extern thread_local int current_device;

// The stream of a handle, or null.
Stream* stream_of(void* handle);

// Give `run` to a stream: to be done later, or recorded.
cudaError_t enqueue(Stream* stream, std::function<void()> run);

// Do this work now, after all that it needs; the error of it or of earlier work.
cudaError_t finish(const Work& work);
cudaError_t finish_device(int device);

// What went wrong in work that was given earlier; like CUDA's, it stays.
extern cudaError_t failure;
void fail(cudaError_t error, const char* why);

// Memory that was allocated here.
struct Allocation {
  uintptr_t begin;
  size_t size;
  int device;  // -1: pinned memory of the host
};

// The allocation that holds `at`, or null.
const Allocation* allocation_of(const void* at);

}  // namespace emulated
