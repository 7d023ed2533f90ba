// A step of an optimizer for all parameters of a dtype in one launch, however many there are.
//
// A network has dozens of parameters, most of them small, and an update by array operations takes
// some ten launches for each. Here one launch goes over them as if they lay in one flat buffer:
// block b updates chunk b of all chunks, CHUNK elements of one parameter, each thread every
// THREADS-th. Every element is read and written once: p, g and the state.
//
// Where the parameters really lie is told by a `Table` in memory. It is written by `set_words`, whose
// arguments are its content: a copy from the host would read memory that the host, far ahead, may
// have changed, and is not to be had while a graph is recorded. See optimizers.py for how seldom.
//
// What differs from step to step, such as the learning rate, is a `Number`: an argument, or, in a
// step that is replayed as a graph, read from memory that the host renews. Both give the same bits.
//
// To be defined: ELEMENT (float or double), CHUNK, THREADS of a block.

#include "common.cuh"

typedef ELEMENT E;

// A parameter, its gradient, two arrays of state (null for what the optimizer does not have).
struct Tensor {
  E* p;
  const E* g;
  E *first, *second;
};

// For each of `rows` parameters, one such vector after the other: how many chunks there are up to its
// last one, how many elements it has, and the four addresses of its `Tensor`.
struct Table {
  const long long* words;
  long long rows;

  __device__ long long end(int row) const { return row < 0 ? 0 : words[row]; }
  __device__ long long size(int row) const { return words[rows + row]; }
  __device__ Tensor tensor(int row) const {
    const long long* at = words + 2 * rows + row;
    return {(E*)at[0], (const E*)at[rows], (E*)at[2 * rows], (E*)at[3 * rows]};
  }
};

struct Number {
  const E* at;
  double otherwise;

  __device__ E value() const { return at ? *at : (E)otherwise; }
};

// Call update(parameter, element) for the elements of this block's chunk.
template <class Update>
__device__ __forceinline__ void for_chunk(const Table& table, Update update) {
  __shared__ int row;
  long long chunk = blockIdx.x;
  for (int k = threadIdx.x; k < table.rows; k += THREADS) {
    if (table.end(k - 1) <= chunk && chunk < table.end(k)) row = k;
  }
  __syncthreads();
  Tensor mine = table.tensor(row);
  long long begin = (chunk - table.end(row - 1)) * CHUNK;
  long long end = min(table.size(row), begin + CHUNK);
#pragma unroll 4
  for (long long i = begin + threadIdx.x; i < end; i += THREADS) update(mine, i);
}

// g ← g + decay p;  v ← momentum v + g, or g where v is new;  p ← p + rate v (nesterov: rate (g +
// momentum v)). rate: minus the learning rate. first: v.
extern "C" __global__ void __launch_bounds__(THREADS)
sgd(const E* rate_at, double rate, double momentum, double decay, long long nesterov,
    long long fresh, const long long* words, long long rows) {
  E by = Number{rate_at, rate}.value(), keep = (E)momentum, shrink = (E)decay;
  for_chunk({words, rows}, [&](const Tensor& of, long long i) {
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
extern "C" __global__ void __launch_bounds__(THREADS)
adam(const E* rate_at, double rate, const E* root_at, double root, const E* shrink_at,
     double shrink, double new_mean, double old_square, double new_square, double eps,
     double decay, const long long* words, long long rows) {
  E by = Number{rate_at, rate}.value(), correction = Number{root_at, root}.value();
  E left = Number{shrink_at, shrink}.value(), pull = (E)decay;
  E a = (E)new_mean, keep = (E)old_square, b = (E)new_square, least = (E)eps;
  for_chunk({words, rows}, [&](const Tensor& of, long long i) {
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

// words[0] to words[WORDS - 1] ← the arguments.
#define EIGHT(M, k) M(k##0), M(k##1), M(k##2), M(k##3), M(k##4), M(k##5), M(k##6), M(k##7)
#define ALL(M)                                                                      \
  EIGHT(M, 0), EIGHT(M, 1), EIGHT(M, 2), EIGHT(M, 3), EIGHT(M, 4), EIGHT(M, 5), EIGHT(M, 6), \
      EIGHT(M, 7)
#define WORD(k) long long word##k
#define SET(k) words[0##k] = word##k  // 0##k is octal: 00 to 077
extern "C" __global__ void __launch_bounds__(1)
set_words(long long* words, ALL(WORD)) {
  ALL(SET);
}
