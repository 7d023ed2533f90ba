// In front of every kernel that g++ compiles in NVRTC's place: CUDA's types, the shim's threads,
// and what CuPy's kernels use beside that.

#pragma once

#define __CUDACC_VER_MAJOR__ 13

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>
#include <type_traits>

#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <vector_functions.h>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __restrict__
#undef __shared__
#undef __launch_bounds__
#define SHIM_VECTOR_TYPES
#include "../../kernels/cuda/shim.h"

// NVRTC calls device functions that are not marked so.
#undef __noinline__
#define __noinline__

namespace emulated {

// Run all threads one after the other: for kernels that never wait for each other.
inline int run_in_order(const unsigned* grid, const unsigned* block) {
  shim::grid_size = {grid[0], grid[1], grid[2]};
  shim::block_size = {block[0], block[1], block[2]};
  shim::Block here;
  shim::Thread thread;
  thread.block = &here;
  shim::current = &thread;
  for (unsigned bz = 0; bz < grid[2]; ++bz)
    for (unsigned by = 0; by < grid[1]; ++by)
      for (unsigned bx = 0; bx < grid[0]; ++bx) {
        here.index = {bx, by, bz};
        for (unsigned z = 0; z < block[2]; ++z)
          for (unsigned y = 0; y < block[1]; ++y)
            for (unsigned x = 0; x < block[0]; ++x) {
              thread.index = {x, y, z};
              shim::kernel(shim::arguments);
            }
      }
  return 0;
}

// The number of parameters of a kernel, then the size of each.
template <class... A>
const size_t* sizes(void (*)(A...)) {
  static const size_t all[] = {sizeof...(A), sizeof(A)...};
  return all;
}

}  // namespace emulated

// Make kernel FUNCTION known under NAME. WAITS: whether its threads may wait for each other.
#define EMULATED_EXPORT(NAME, FUNCTION, WAITS)                                                   \
  extern "C" const size_t* emulated_sizes_##NAME() { return emulated::sizes(&FUNCTION); }        \
  extern "C" int emulated_launch_##NAME(const unsigned* grid, const unsigned* block,             \
                                        size_t shared, int cooperative, void** arguments) {      \
    shim::kernel = [](void** given) { shim::call(&FUNCTION, given); };                           \
    shim::arguments = arguments;                                                                 \
    if (!WAITS) return emulated::run_in_order(grid, block);                                      \
    size_t blocks = size_t(grid[0]) * grid[1] * grid[2];                                         \
    return shim::launch(grid, block, shared, cooperative, false, 0, blocks);                     \
  }

// --- intrinsics that CuPy's kernels use ----------------------------------------------------------

template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
template <class To, class From>
To emulated_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __float_as_int(float x) { return emulated_bits<int>(x); }
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulated_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulated_bits<double>(x); }
inline long long __float2ll_rn(float x) { return llrintf(x); }
inline long long __double2ll_rn(double x) { return llrint(x); }
inline double exp10(double x) { return pow(10.0, x); }
inline float exp10f(float x) { return powf(10.0f, x); }
inline float fdividef(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline double normcdf(double x) { return erfc(-x / M_SQRT2) / 2; }

#include <cupy/complex.cuh>
#include <cupy/carray.cuh>
#include <cupy/atomics.cuh>
#include <cupy/math_constants.h>
