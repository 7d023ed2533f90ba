// A step of an optimizer for many parameters in one launch.
//
// A network has dozens of parameters, most of them small, and an update by array operations takes
// some ten launches for each. Here SLOTS parameters at a time are arguments of the kernel: for each
// where it, its gradient and what is kept for it begin, and how many elements they have; null and 0
// for a slot that is empty. Addresses are arguments and not a table in memory, because a table would
// have to be copied there, at a time when the host may be far ahead.
//
// A block updates CHUNK elements of one parameter, each thread every THREADS-th. Every element is
// read and written once: p, g and the state. No shared memory.
//
// What differs from step to step, such as the learning rate, is a `Number`: an argument, or, in a
// step that is replayed as a graph, read from memory that the host renews. Both give the same bits.
//
// To be defined: ELEMENT (float or double), CHUNK, THREADS of a block. (The bounds of `adam` leave
// it 80 registers; by itself the compiler takes fewer, and spills.)

#include "common.cuh"

typedef ELEMENT E;

// A parameter, its gradient, two arrays of state (which the optimizer may not have), their size.
struct Tensor {
  E* p;
  const E* g;
  E *first, *second;
  long long size;
};

#define TENSOR(k) E *p##k, const E *g##k, E *first##k, E *second##k, long long size##k
#define GIVEN(k) {p##k, g##k, first##k, second##k, size##k}
#define FOUR(M, a, b, c, d) M(a), M(b), M(c), M(d)
#define ALL(M)                                                                      \
  FOUR(M, 0, 1, 2, 3), FOUR(M, 4, 5, 6, 7), FOUR(M, 8, 9, 10, 11), FOUR(M, 12, 13, 14, 15)
constexpr int SLOTS = 16;

struct Number {
  const E* at;
  double otherwise;

  __device__ E value() const { return at ? *at : (E)otherwise; }
};

// Call update(parameter, element) for the elements of this block's chunk.
template <class Update>
__device__ __forceinline__ void for_chunk(const Tensor (&tensors)[SLOTS], Update update) {
  long long chunk = blockIdx.x;
  Tensor mine = {};
  long long begin = 0;
#pragma unroll
  for (int k = 0; k < SLOTS; ++k) {
    long long chunks = ceil_div(tensors[k].size, CHUNK);
    if (chunk >= 0 && chunk < chunks) {
      mine = tensors[k];
      begin = chunk * CHUNK;
    }
    chunk -= chunks;
  }
  long long end = min(mine.size, begin + CHUNK);
#pragma unroll 4
  for (long long i = begin + threadIdx.x; i < end; i += THREADS) update(mine, i);
}

// g ← g + decay p;  v ← momentum v + g, or g where v is new;  p ← p + rate v (nesterov: rate (g +
// momentum v)). rate: minus the learning rate. first: v.
extern "C" __global__ void __launch_bounds__(THREADS)
sgd(const E* rate_at, double rate, double momentum, double decay, long long nesterov,
    long long fresh, ALL(TENSOR)) {
  const Tensor tensors[SLOTS] = {ALL(GIVEN)};
  E by = Number{rate_at, rate}.value(), keep = (E)momentum, shrink = (E)decay;
  for_chunk(tensors, [&](const Tensor& of, long long i) {
    E p = of.p[i], g = of.g[i];
    if (shrink != 0) g = fma(shrink, p, g);
    if (of.first) {
      E v = fresh ? g : fma(keep, of.first[i], g);
      of.first[i] = v;
      g = nesterov ? fma(keep, v, g) : v;
    }
    of.p[i] = fma(by, g, p);
  });
}

// p ← shrink p;  g ← g + decay p;  m ← m + (1 - β₁) (g - m);  v ← β₂ v + (1 - β₂) g²;
// p ← p + rate m / (√v / root + eps). first: m, second: v. rate: -lr / (1 - β₁ᵗ). root: √(1 - β₂ᵗ).
extern "C" __global__ void __launch_bounds__(THREADS, 3)
adam(const E* rate_at, double rate, const E* root_at, double root, const E* shrink_at,
     double shrink, double new_mean, double old_square, double new_square, double eps,
     double decay, ALL(TENSOR)) {
  const Tensor tensors[SLOTS] = {ALL(GIVEN)};
  E by = Number{rate_at, rate}.value(), correction = Number{root_at, root}.value();
  E left = Number{shrink_at, shrink}.value(), pull = (E)decay;
  E a = (E)new_mean, keep = (E)old_square, b = (E)new_square, least = (E)eps;
  for_chunk(tensors, [&](const Tensor& of, long long i) {
    E p = of.p[i] * left, g = of.g[i];
    if (pull != 0) g = fma(pull, p, g);
    E m = of.first[i], v = of.second[i];
    m = fma(a, g - m, m);
    v = fma(b, g * g, keep * v);
    of.first[i] = m;
    of.second[i] = v;
    of.p[i] = fma(by, m / (sqrt(v) / correction + least), p);
  });
}
