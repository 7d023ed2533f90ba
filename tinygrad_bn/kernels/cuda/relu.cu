// max(x, 0), and its derivative: 16 bytes a thread, at the speed of memory. No shared memory.
//
// To be defined: ELEMENT; VECTOR, elements of a load: 16 bytes where the arrays begin at a multiple
// of that, else one element; THREADS of a block.

#include "common.cuh"

typedef ELEMENT E;
typedef Vector<E, VECTOR> Pack;

// Call make(number) for the whole vector that this thread has, or, at the end of an
// array that is no whole number of vectors, one(at) for each element that is left.
template <class Make, class One>
__device__ __forceinline__ void for_vector(long long count, Make make, One one) {
  long long number = (long long)blockIdx.x * THREADS + threadIdx.x;
  long long begin = number * VECTOR;
  if (begin + VECTOR <= count) {
    make(number);
  } else {
    for (long long at = begin; at < count; ++at) one(at);
  }
}

__device__ __forceinline__ E zero() {
  E element;
  round_to(element, 0);
  return element;
}
__device__ __forceinline__ E cut(E x) { return real(x) < 0 ? zero() : x; }  // NaN passes
__device__ __forceinline__ E pass(E g, E out) { return real(out) > 0 ? g : zero(); }

extern "C" __global__ void __launch_bounds__(THREADS)
relu(const E* x, E* y, long long count) {
  for_vector(
      count,
      [&](long long number) {
        Pack pack = load<E, VECTOR>(x, number);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) pack.at[j] = cut(pack.at[j]);
        store<E, VECTOR>(y, number, pack);
      },
      [&](long long at) { y[at] = cut(x[at]); });
}

// g where the output was positive.
extern "C" __global__ void __launch_bounds__(THREADS)
relu_gradient(const E* g, const E* out, E* gx, long long count) {
  for_vector(
      count,
      [&](long long number) {
        Pack pack = load<E, VECTOR>(g, number), of = load<E, VECTOR>(out, number);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) pack.at[j] = pass(pack.at[j], of.at[j]);
        store<E, VECTOR>(gx, number, pack);
      },
      [&](long long at) { gx[at] = pass(g[at], out[at]); });
}
