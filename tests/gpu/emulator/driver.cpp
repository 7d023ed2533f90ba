// The part of CUDA's driver that CuPy uses: modules, kernels and their launches.
//
// A module is a library that `nvrtc.cpp` had g++ make; its image is the library's path.

#include <dlfcn.h>
#include <xmmintrin.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "device.h"

using namespace emulated;

namespace {

enum Result {
  OK = 0,
  INVALID_VALUE = 1,
  INVALID_IMAGE = 200,
  FILE_NOT_FOUND = 301,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  COOPERATIVE_LAUNCH_TOO_LARGE = 720,
};

struct Module {
  void* library;
  int device;
  bool flushes;  // whether float32 has no subnormals: NVRTC's -ftz=true
};

struct Function {
  Module* module;
  const size_t* sizes;
  int (*launch)(const unsigned*, const unsigned*, size_t, int, void**);
  std::string name;
  size_t dynamic_shared = SHARED_PER_BLOCK;
};

int resident_blocks(const Function&, int threads, size_t shared) {
  if (threads <= 0) return 0;
  int by_threads = THREADS_PER_MULTIPROCESSOR / ((threads + 31) / 32 * 32);
  int by_shared = int(SHARED / (shared + 1024));  // the system takes a kilobyte of each block
  return std::min({by_threads, by_shared, BLOCKS_PER_MULTIPROCESSOR});
}

// The arguments of a launch, kept until it is made.
struct Arguments {
  std::vector<std::vector<uint64_t>> values;  // aligned as any parameter is
  std::vector<void*> pointers;
  std::vector<const void*> memory;  // what they point to: an array's address is its first word
  Arguments(const size_t* sizes, void** given) {
    for (size_t i = 0; i < sizes[0]; ++i) {
      values.emplace_back((sizes[i + 1] + 7) / 8);
      memcpy(values.back().data(), given[i], sizes[i + 1]);
    }
    for (auto& value : values) {
      pointers.push_back(value.data());
      auto* at = value.empty() ? nullptr : reinterpret_cast<const void*>(value[0]);
      if (allocation_of(at)) memory.push_back(at);
    }
  }
  bool reachable_from(int device) const {
    return std::all_of(memory.begin(), memory.end(), [&](const void* at) {
      const Allocation* found = allocation_of(at);
      return found && (found->device == device || found->device < 0);
    });
  }
};

int launch(Function* function, const unsigned (&grid)[3], const unsigned (&block)[3],
           unsigned shared, void* handle, void** given, bool cooperative) {
  Guard guard(lock);
  Stream* stream = stream_of(handle);
  if (!function || !stream) return INVALID_HANDLE;
  int device = function->module->device;
  if (device != current_device || device != stream->device) return INVALID_HANDLE;
  size_t threads = size_t(block[0]) * block[1] * block[2];
  if (threads == 0 || threads > 1024 || block[2] > 64) return INVALID_VALUE;
  if (!grid[0] || grid[0] > 0x7FFFFFFF || !grid[1] || grid[1] > 65535 || !grid[2] ||
      grid[2] > 65535 || shared > function->dynamic_shared)
    return INVALID_VALUE;
  size_t blocks = size_t(grid[0]) * grid[1] * grid[2];
  if (cooperative &&
      blocks > size_t(resident_blocks(*function, threads, shared)) * MULTIPROCESSORS)
    return COOPERATIVE_LAUNCH_TOO_LARGE;
  auto arguments = std::make_shared<Arguments>(function->sizes, given);
  std::vector<unsigned> sizes = {grid[0], grid[1], grid[2], block[0], block[1], block[2]};
  return enqueue(stream, [=] {
    if (!arguments->reachable_from(device))
      return fail(cudaErrorIllegalAddress,
                  (function->name + ": memory that was freed, or another device's").c_str());
    unsigned before = _mm_getcsr();
    if (function->module->flushes) _mm_setcsr(before | 0x8040);  // results, and what is read
    int failed = function->launch(sizes.data(), sizes.data() + 3, shared, cooperative,
                                  arguments->pointers.data());
    _mm_setcsr(before);
    if (failed) fail(cudaErrorLaunchFailure, (function->name + ": threads wait for ever").c_str());
  });
}

}  // namespace

extern "C" {

int cuModuleLoadData(Module** result, const char* image) {
  Guard guard(lock);
  constexpr char MAGIC[] = "emulated:";
  if (strncmp(image, MAGIC, strlen(MAGIC)) != 0) return INVALID_IMAGE;
  void* library = dlopen(image + strlen(MAGIC), RTLD_NOW | RTLD_LOCAL);
  if (!library) return fprintf(stderr, "emulated GPU: %s\n", dlerror()), FILE_NOT_FOUND;
  auto flushes = static_cast<const int*>(dlsym(library, "emulated_flushes"));
  *result = new Module{library, current_device, flushes && *flushes};
  return OK;
}
int cuModuleUnload(Module*) { return OK; }  // a launch of it may still be waiting

int cuModuleGetFunction(Function** result, Module* module, const char* name) {
  Guard guard(lock);
  auto entry = [&](const char* prefix) {
    return dlsym(module->library, (prefix + std::string(name)).c_str());
  };
  void *sizes = entry("emulated_sizes_"), *run = entry("emulated_launch_");
  if (!sizes || !run) return NOT_FOUND;
  *result = new Function{module, reinterpret_cast<const size_t* (*)()>(sizes)(),
                         reinterpret_cast<decltype(Function::launch)>(run), name};
  return OK;
}
int cuModuleGetGlobal_v2(void** at, size_t* size, Module* module, const char* name) {
  *at = dlsym(module->library, name);
  if (size) *size = 0;
  return *at ? OK : NOT_FOUND;
}

int cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                   unsigned by, unsigned bz, unsigned shared, void* stream, void** arguments,
                   void**) {
  return launch(function, {gx, gy, gz}, {bx, by, bz}, shared, stream, arguments, false);
}
int cuLaunchCooperativeKernel(Function* function, unsigned gx, unsigned gy, unsigned gz,
                              unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream,
                              void** arguments) {
  return launch(function, {gx, gy, gz}, {bx, by, bz}, shared, stream, arguments, true);
}

enum { MAX_THREADS = 0, STATIC_SHARED = 1, REGISTERS = 4, MAX_DYNAMIC_SHARED = 8 };

int cuFuncGetAttribute(int* value, int attribute, Function* function) {
  *value = attribute == MAX_THREADS          ? 1024
           : attribute == REGISTERS          ? 32
           : attribute == MAX_DYNAMIC_SHARED ? int(function->dynamic_shared)
                                             : 0;
  return OK;
}
int cuFuncSetAttribute(Function* function, int attribute, int value) {
  if (attribute != MAX_DYNAMIC_SHARED) return OK;
  if (value < 0 || size_t(value) > SHARED_PER_BLOCK_OPTIN) return INVALID_VALUE;
  function->dynamic_shared = value;
  return OK;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function* function, int threads,
                                                size_t shared) {
  *blocks = resident_blocks(*function, threads, shared);
  return OK;
}

int cuCtxGetDevice(int* device) { return *device = current_device, OK; }
int cuCtxGetCurrent(void** context) {
  static char contexts[DEVICES];
  return *context = contexts + current_device, OK;
}
int cuGetErrorName(int error, const char** name) {
  switch (error) {
    case INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; break;
    case INVALID_IMAGE: *name = "CUDA_ERROR_INVALID_IMAGE"; break;
    case FILE_NOT_FOUND: *name = "CUDA_ERROR_FILE_NOT_FOUND"; break;
    case INVALID_HANDLE: *name = "CUDA_ERROR_INVALID_HANDLE"; break;
    case NOT_FOUND: *name = "CUDA_ERROR_NOT_FOUND"; break;
    case COOPERATIVE_LAUNCH_TOO_LARGE: *name = "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"; break;
    default: *name = cudaGetErrorName(cudaError_t(error));
  }
  return OK;
}
int cuGetErrorString(int, const char** text) { return *text = "said by the emulated GPU", OK; }

}  // extern "C"
