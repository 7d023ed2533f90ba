// Devices, memory and copies: the part of the CUDA runtime without streams.

#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <map>

#include "device.h"

using namespace emulated;

namespace emulated {

thread_local int current_device = 0;
static std::map<uintptr_t, Allocation> allocations;
static size_t used[DEVICES];

const Allocation* allocation_of(const void* at) {
  auto next = allocations.upper_bound(uintptr_t(at));
  if (next == allocations.begin()) return nullptr;
  const Allocation& found = std::prev(next)->second;
  return uintptr_t(at) < found.begin + found.size ? &found : nullptr;
}

constexpr size_t PAGE = 4096;

static size_t pages(size_t size) { return (size + PAGE - 1) / PAGE * PAGE; }

// Memory that ends before a page nobody may touch, full of NaN.
static cudaError_t allocate(void** result, size_t size, int device) {
  if (size == 0) return *result = nullptr, cudaSuccess;
  if (device >= 0 && used[device] + size > MEMORY) return cudaErrorMemoryAllocation;
  void* got = mmap(nullptr, pages(size) + PAGE, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) return cudaErrorMemoryAllocation;
  mprotect(static_cast<char*>(got) + pages(size), PAGE, PROT_NONE);
  memset(got, 0xFF, size);
  if (device >= 0) used[device] += size;
  allocations[uintptr_t(got)] = {uintptr_t(got), size, device};
  *result = got;
  return cudaSuccess;
}

static cudaError_t release(void* at, bool on_device) {
  if (!at) return cudaSuccess;
  auto found = allocations.find(uintptr_t(at));
  if (found == allocations.end() || (found->second.device >= 0) != on_device)
    return cudaErrorInvalidValue;
  for (int device = 0; device < DEVICES; ++device) finish_device(device);
  if (on_device) used[found->second.device] -= found->second.size;
  munmap(at, pages(found->second.size) + PAGE);
  allocations.erase(found);
  return cudaSuccess;
}

// Do `act` on these pieces of memory, unless one of them has been freed meanwhile.
template <class F>
static void on_memory(std::initializer_list<std::pair<const void*, bool>> pieces, F act) {
  for (auto [at, was_allocated] : pieces)
    if (was_allocated && !allocation_of(at))
      return fail(cudaErrorIllegalAddress, "a copy or a fill of memory that has been freed");
  act();
}

// Whether `size` bytes from `at` may be on this side of a copy.
static bool fits(const void* at, size_t size, bool may_be_host, bool may_be_device) {
  const Allocation* found = allocation_of(at);
  if (found && uintptr_t(at) + size > found->begin + found->size) return false;
  return found && found->device >= 0 ? may_be_device : may_be_host;
}

static bool is_pageable(const void* at) { return !allocation_of(at); }

static cudaError_t copy(void* to, const void* from, size_t size, cudaMemcpyKind kind,
                        Stream* stream) {
  bool any = kind == cudaMemcpyDefault;
  bool from_host = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyHostToHost;
  bool to_host = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyHostToHost;
  if (size == 0) return cudaSuccess;
  if (!stream) return cudaErrorInvalidResourceHandle;
  if (!fits(to, size, any || to_host, any || !to_host)) return cudaErrorInvalidValue;
  if (!fits(from, size, any || from_host, any || !from_host)) return cudaErrorInvalidValue;
  if (!stream->capture && is_pageable(from)) {  // CUDA has read it when it returns
    auto staged = std::make_shared<std::vector<char>>(
        static_cast<const char*>(from), static_cast<const char*>(from) + size);
    bool to_ours = !is_pageable(to);
    cudaError_t error = enqueue(stream, [=] {
      on_memory({{to, to_ours}}, [&] { memcpy(to, staged->data(), size); });
    });
    if (error || !is_pageable(to)) return error;
  } else {
    bool from_ours = !is_pageable(from), to_ours = !is_pageable(to);
    cudaError_t error = enqueue(stream, [=] {
      on_memory({{from, from_ours}, {to, to_ours}}, [&] { memmove(to, from, size); });
    });
    if (error || stream->capture || !is_pageable(to)) return error;
  }
  return finish(stream->last);  // and written, to memory that is not pinned
}

static cudaError_t copy_now(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
  Stream* stream = stream_of(nullptr);
  cudaError_t error = copy(to, from, size, kind, stream);
  const Allocation *source = allocation_of(from), *target = allocation_of(to);
  bool inside = source && source->device >= 0 && target && target->device >= 0;
  return error || inside || size == 0 ? error : finish(stream->last);
}

// While a stream is capturing in another mode than the relaxed one, allocating is refused.
cudaError_t may_allocate();

}  // namespace emulated

extern "C" {

cudaError_t cudaMalloc(void** result, size_t size) {
  Guard guard(lock);
  cudaError_t error = may_allocate();
  return error ? error : allocate(result, size, current_device);
}
cudaError_t cudaFree(void* at) {
  Guard guard(lock);
  cudaError_t error = may_allocate();
  return error ? error : release(at, true);
}
cudaError_t cudaHostAlloc(void** result, size_t size, unsigned) {
  Guard guard(lock);
  cudaError_t error = may_allocate();
  return error ? error : allocate(result, size, -1);
}
cudaError_t cudaFreeHost(void* at) {
  Guard guard(lock);
  cudaError_t error = may_allocate();
  return error ? error : release(at, false);
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  Guard guard(lock);
  *free = MEMORY - used[current_device];
  *total = MEMORY;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* at) {
  Guard guard(lock);
  const Allocation* allocation = allocation_of(at);
  *found = {};
  found->type = !allocation                ? cudaMemoryTypeUnregistered
                : allocation->device < 0 ? cudaMemoryTypeHost
                                         : cudaMemoryTypeDevice;
  found->device = allocation ? allocation->device : -2;
  if (allocation && allocation->device >= 0) found->devicePointer = const_cast<void*>(at);
  if (allocation && allocation->device < 0) {
    found->device = 0;
    found->devicePointer = found->hostPointer = const_cast<void*>(at);
  }
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
  Guard guard(lock);
  return copy_now(to, from, size, kind);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  Guard guard(lock);
  return copy(to, from, size, kind, stream_of(stream));
}
cudaError_t cudaMemcpyPeer(void* to, int, const void* from, int, size_t size) {
  Guard guard(lock);
  return copy_now(to, from, size, cudaMemcpyDeviceToDevice);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size,
                                cudaStream_t stream) {
  Guard guard(lock);
  return copy(to, from, size, cudaMemcpyDeviceToDevice, stream_of(stream));
}
cudaError_t cudaMemsetAsync(void* at, int value, size_t size, cudaStream_t handle) {
  Guard guard(lock);
  Stream* stream = stream_of(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  if (!fits(at, size, false, true)) return cudaErrorInvalidValue;
  return enqueue(stream, [=] { on_memory({{at, true}}, [&] { memset(at, value, size); }); });
}
cudaError_t cudaMemset(void* at, int value, size_t size) {
  return cudaMemsetAsync(at, value, size, nullptr);
}

// --- devices -------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) { return *count = DEVICES, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= DEVICES) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}
// Strict: a kernel may not touch another device's memory; copies between devices are possible.
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13020, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13020, cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
  return snprintf(id, length, "0000:%02x:00.0", device + 1), cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= DEVICES) return cudaErrorInvalidDevice;
  static const std::map<int, size_t> known = {
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrComputeCapabilityMinor, 0},
      {cudaDevAttrMultiProcessorCount, MULTIPROCESSORS},
      {cudaDevAttrMaxThreadsPerMultiProcessor, THREADS_PER_MULTIPROCESSOR},
      {cudaDevAttrMaxBlocksPerMultiprocessor, BLOCKS_PER_MULTIPROCESSOR},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, SHARED},
      {cudaDevAttrMaxSharedMemoryPerBlock, SHARED_PER_BLOCK},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, SHARED_PER_BLOCK_OPTIN},
      {cudaDevAttrCooperativeLaunch, 1},
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrUnifiedAddressing, 1},
  };
  auto found = known.find(attribute);
  *value = found == known.end() ? 0 : int(found->second);
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device < 0 || device >= DEVICES) return cudaErrorInvalidDevice;
  *properties = {};
  strcpy(properties->name, "emulated on the CPU");
  properties->major = 9;
  properties->totalGlobalMem = MEMORY;
  properties->multiProcessorCount = MULTIPROCESSORS;
  properties->maxThreadsPerMultiProcessor = THREADS_PER_MULTIPROCESSOR;
  properties->maxBlocksPerMultiProcessor = BLOCKS_PER_MULTIPROCESSOR;
  properties->sharedMemPerMultiprocessor = SHARED;
  properties->sharedMemPerBlock = SHARED_PER_BLOCK;
  properties->sharedMemPerBlockOptin = SHARED_PER_BLOCK_OPTIN;
  properties->maxThreadsPerBlock = 1024;
  properties->warpSize = 32;
  properties->cooperativeLaunch = 1;
  properties->pciBusID = device + 1;
  return cudaSuccess;
}

}  // extern "C"
