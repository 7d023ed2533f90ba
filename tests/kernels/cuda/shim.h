// Enough of CUDA C++ to run a kernel on the CPU: put in front of its text and compiled by g++.
//
// Each thread of a block is a fiber (ucontext to start it, setjmp/longjmp to switch, which makes no
// system calls). A fiber runs until it waits: at __syncthreads, for its warp, or in __nanosleep;
// then the next one runs. So within a block everything before a barrier happens before anything
// behind it, and a missing barrier shows: the first thread (or the last, see `backwards`) is through
// before the others have written. Blocks run one after another, but all at once in a cooperative
// launch. What this proves is indexing and barriers; it proves no memory order, and no speed.
//
// A launch fails, with words, where threads wait for ever: some at a barrier, the others gone or at
// another one; or blocks for blocks that are not resident.
//
// Of shared memory, `extern __shared__` is replaced by SHIM_DYNAMIC_SHARED (common.cuh has the one
// use of it), and `__shared__` variables are static: not for cooperative kernels, whose blocks would
// all have the same ones.

#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <utility>
#include <vector>

using std::isfinite;
using std::isnan;

#define __global__
#ifndef __device__
#define __device__
#endif
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __shared__ static
#define __launch_bounds__(...)

#ifndef SHIM_VECTOR_TYPES  // CUDA's own headers may have been included
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
#endif

namespace shim {

constexpr size_t STACK = 128 << 10;

struct Warp {
  uint64_t exchanged[32];
  unsigned threads = 0, arrived = 0, rounds = 0;
};

struct Block {
  dim3 index;
  unsigned threads = 0, arrived = 0, rounds = 0;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
};

// A stack and a place in the code on it; kept from launch to launch.
struct Fiber {
  jmp_buf context;
  ucontext_t start;
  char* stack;
  bool started = false;
};

struct Thread {
  dim3 index;
  unsigned number = 0;  // in the block
  Block* block = nullptr;
  Fiber* fiber = nullptr;
  bool done = false;
  const unsigned* awaited = nullptr;  // the counter of rounds whose next value it waits for
  unsigned seen = 0;
};

inline Thread* current;  // null between threads
inline dim3 block_size, grid_size;
inline jmp_buf scheduler;
inline uint64_t events;  // grows whenever something happens that another thread may wait for
inline void (*kernel)(void**);
inline void** arguments;
inline std::vector<Fiber*> fibers;

// For races.h: what to tell of a fence and of an atomic operation, and whether the access that is
// being made belongs to one, or passes by the cache of a multiprocessor.
inline void (*on_fence)();
inline void (*on_atomic)(void*);
inline volatile bool atomic, from_shared_cache;

// True for as long as it lives; the compiler moves nothing across its ends.
struct Meanwhile {
  volatile bool& flag;

  explicit Meanwhile(volatile bool& flag) : flag(flag) {
    flag = true;
    asm volatile("" ::: "memory");
  }
  ~Meanwhile() {
    asm volatile("" ::: "memory");
    flag = false;
  }
};

inline void begin_atomic(void* at) {
  ++events;
  if (on_atomic) on_atomic(at);
}

inline void yield() {
  if (_setjmp(current->fiber->context) == 0) _longjmp(scheduler, 1);
}

inline void wait_for(const unsigned* rounds) {
  current->awaited = rounds;
  current->seen = *rounds;
  yield();
  current->awaited = nullptr;
}

// Wait until all `threads` have arrived.
inline void barrier(unsigned threads, unsigned& arrived, unsigned& rounds) {
  ++events;
  if (++arrived == threads) {
    arrived = 0;
    ++rounds;
  } else {
    wait_for(&rounds);
  }
}

inline void warp_barrier() {
  Warp& warp = current->block->warps[current->number / 32];
  barrier(warp.threads, warp.arrived, warp.rounds);
}

// What lane `lane` of the warp holds; its own value where there is no such lane.
template <class T>
T exchange(T value, unsigned lane) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
  Warp& warp = current->block->warps[current->number / 32];
  memcpy(&warp.exchanged[current->number % 32], &value, sizeof(T));
  warp_barrier();
  if (lane < warp.threads) memcpy(&value, &warp.exchanged[lane], sizeof(T));
  warp_barrier();
  return value;
}

inline void main_of_fiber() {
  for (;;) {  // once for each thread that it is given
    kernel(arguments);
    current->done = true;
    ++events;
    yield();
  }
}

inline void resume(Thread* thread) {
  current = thread;
  if (_setjmp(scheduler) != 0) {
    current = nullptr;
    return;
  }
  Fiber& fiber = *thread->fiber;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack;
  fiber.start.uc_stack.ss_size = STACK;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, main_of_fiber, 0);
  setcontext(&fiber.start);
}

inline Fiber* fiber(size_t number) {
  while (fibers.size() <= number) {
    Fiber* made = new Fiber;
    void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) abort();
    made->stack = static_cast<char*>(stack);
    fibers.push_back(made);
  }
  return fibers[number];
}

// Run all threads of these blocks to their end; false if they wait for ever.
inline bool run(std::vector<Block>& blocks, bool backwards) {
  std::vector<Thread> threads;
  for (Block& block : blocks) {
    for (unsigned number = 0; number < block.threads; ++number) {
      Thread thread;
      thread.number = number;
      thread.index = {number % block_size.x, number / block_size.x % block_size.y,
                      number / block_size.x / block_size.y};
      thread.block = &block;
      thread.fiber = fiber(threads.size());
      threads.push_back(thread);
    }
  }
  size_t alive = threads.size();
  while (alive > 0) {
    uint64_t before = events;
    for (size_t b = 0; b < blocks.size(); ++b) {
      // A block goes on until it waits for another: blocks that should wait and do not show.
      size_t each = blocks[b].threads;
      for (uint64_t seen = events - 1; seen != events;) {
        seen = events;
        for (size_t i = 0; i < each; ++i) {
          Thread& thread = threads[b * each + (backwards ? each - 1 - i : i)];
          if (thread.done || (thread.awaited && *thread.awaited == thread.seen)) continue;
          resume(&thread);
          alive -= thread.done;
        }
      }
    }
    if (events == before) {
      for (Thread& thread : threads) thread.fiber->started &= thread.done;
      return false;
    }
  }
  return true;
}

// Launch `kernel`, or of its blocks those from `begin` to `end`: 0, or 1 if threads waited for ever.
inline int launch(const unsigned* grid, const unsigned* block, size_t shared, bool cooperative,
                  bool backwards, size_t begin, size_t end) {
  grid_size = {grid[0], grid[1], grid[2]};
  block_size = {block[0], block[1], block[2]};
  unsigned threads = block[0] * block[1] * block[2];
  std::vector<Block> blocks;
  for (size_t i = begin; i < end; ++i) {
    size_t at = backwards ? begin + end - 1 - i : i;
    Block made;
    made.index = {unsigned(at % grid[0]), unsigned(at / grid[0] % grid[1]),
                  unsigned(at / grid[0] / grid[1])};
    made.threads = threads;
    made.warps.resize((threads + 31) / 32);
    for (size_t w = 0; w < made.warps.size(); ++w) {
      made.warps[w].threads = w + 1 < made.warps.size() ? 32 : threads - 32 * w;
    }
    made.shared.assign(shared + 16, 0xFF);  // NaN: what was never written shows
    blocks.push_back(std::move(made));
    if (!cooperative || i + 1 == end) {
      if (!run(blocks, backwards)) return 1;
      blocks.clear();
    }
  }
  return 0;
}

template <class... A, size_t... I>
void call(void (*function)(A...), void** given, std::index_sequence<I...>) {
  function(*static_cast<A*>(given[I])...);
}

template <class... A>
void call(void (*function)(A...), void** given) {
  call(function, given, std::index_sequence_for<A...>());
}

template <class... A>
constexpr int parameters(void (*)(A...)) {
  return sizeof...(A);
}

}  // namespace shim

// Make kernel NAME callable from outside: the number of its parameters, and a launch.
#define SHIM_EXPORT(NAME)                                                                     \
  extern "C" int shim_parameters_##NAME() { return shim::parameters(NAME); }                  \
  extern "C" int shim_launch_##NAME(const unsigned* grid, const unsigned* block,              \
                                    size_t shared, int cooperative, int backwards,            \
                                    size_t begin, size_t end, void** arguments) {             \
    shim::kernel = [](void** given) { shim::call(NAME, given); };                             \
    shim::arguments = arguments;                                                              \
    return shim::launch(grid, block, shared, cooperative, backwards, begin, end);             \
  }

#define threadIdx (shim::current->index)
#define blockIdx (shim::current->block->index)
#define blockDim (shim::block_size)
#define gridDim (shim::grid_size)
#define warpSize 32
#define SHIM_DYNAMIC_SHARED \
  (shim::current->block->shared.data() + (-uintptr_t(shim::current->block->shared.data()) & 15))

inline void __syncthreads() {
  shim::Block& block = *shim::current->block;
  shim::barrier(block.threads, block.arrived, block.rounds);
}
inline void __syncwarp(unsigned = ~0u) { shim::warp_barrier(); }
inline void __threadfence() {
  if (shim::on_fence) shim::on_fence();
}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { shim::yield(); }

template <class T>
T __shfl_sync(unsigned, T value, int lane, int width = 32) {
  unsigned self = shim::current->number % 32;
  return shim::exchange(value, self / width * width + unsigned(lane) % width);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask, int = 32) {
  return shim::exchange(value, (shim::current->number % 32) ^ unsigned(mask));
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned by, int width = 32) {
  unsigned self = shim::current->number % 32;
  return shim::exchange(value, self % width + by < unsigned(width) ? self + by : self);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned by, int width = 32) {
  unsigned self = shim::current->number % 32;
  return shim::exchange(value, self % width >= by ? self - by : self);
}

template <class T, class U>
T atomicAdd(T* at, U value) {
  shim::begin_atomic(at);
  shim::Meanwhile now(shim::atomic);
  T before = *at;
  *at = T(before + value);
  return before;
}
template <class T, class U>
T atomicMax(T* at, U value) {
  shim::begin_atomic(at);
  shim::Meanwhile now(shim::atomic);
  T before = *at;
  if (T(value) > before) *at = T(value);
  return before;
}
template <class T, class U>
T atomicExch(T* at, U value) {
  shim::begin_atomic(at);
  shim::Meanwhile now(shim::atomic);
  T before = *at;
  *at = T(value);
  return before;
}
template <class T, class U, class V>
T atomicCAS(T* at, U expected, V value) {
  shim::begin_atomic(at);
  shim::Meanwhile now(shim::atomic);
  T before = *at;
  if (before == T(expected)) *at = T(value);
  return before;
}

template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcs(const T* at) {
  return *at;
}
template <class T>
T __ldcg(const T* at) {
  shim::Meanwhile now(shim::from_shared_cache);
  return *at;
}
template <class T>
void __stcs(T* at, T value) {
  *at = value;
}
template <class T>
void __stcg(T* at, T value) {
  *at = value;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
