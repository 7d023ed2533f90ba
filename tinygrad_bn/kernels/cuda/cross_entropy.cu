// Softmax cross-entropy: -Σ_c t_c log softmax(x)_c at each position, and its derivative.
//
// Logits are (batch, classes, inner), a *position* is one of batch and inner. LANES threads share
// one: 32 where the classes of a position lie together (inner 1), so that a warp reads neighbours,
// and 1 where positions do. Each thread keeps what it needs in registers; the lanes of a warp
// exchange by shuffles. The logits of a position are read three times, for the largest, for the sum
// of powers and for the logarithms, the last two times from the cache.
//
// The mean over all positions is added up in float64, in blocks and then of blocks, in an order that
// depends on the launch alone. Shared memory holds a block's sums. Nothing is read back, so a label
// out of range is no error here; its loss is NaN.
//
// To be defined: ELEMENT, LANES (1 or 32), and THREADS of a block, a multiple of 32. Where the launch
// bounds speak of 3 blocks, that is to leave a thread 80 registers: else the compiler takes 40, and
// spills.

#include "common.cuh"

typedef ELEMENT E;
typedef Arithmetic<E>::type Real;

// Labels of any integer dtype: its size in bytes, negative if it has a sign. 0: there are
// probabilities instead, one for each logit.
struct Target {
  const void* values;
  long long kind;

  __device__ bool labels() const { return kind != 0; }
  __device__ long long label(long long position) const {
    switch (kind) {
      case -8: return ((const long long*)values)[position];
      case -4: return ((const int*)values)[position];
      case -2: return ((const short*)values)[position];
      case -1: return ((const signed char*)values)[position];
      case 1: return ((const unsigned char*)values)[position];
      case 2: return ((const unsigned short*)values)[position];
      case 4: return ((const unsigned*)values)[position];
      default: return ((const long long*)values)[position];  // more than 2^63 are negative: no class
    }
  }
  __device__ Real probability(long long at) const { return real(((const E*)values)[at]); }
};

// NVRTC has no header that names them.
__device__ __forceinline__ Real infinity() { return bit_cast<float>(0x7F800000u); }
__device__ __forceinline__ Real not_a_number() { return bit_cast<float>(0x7FC00000u); }

template <class Combine>
__device__ __forceinline__ Real over_lanes(Real value, Combine combine) {
  for (int by = LANES / 2; by > 0; by /= 2) {
    value = combine(value, __shfl_xor_sync(~0u, value, by));
  }
  return value;
}
__device__ __forceinline__ Real sum_over_lanes(Real value) {
  return over_lanes(value, [](Real a, Real b) { return a + b; });
}

// A thread's position, and its classes among those.
struct Row {
  long long position, first, step;  // first: of the position's logits; step: from class to class
  int lane;
  bool there;

  __device__ Row(long long positions, long long classes, long long inner) {
    position = ((long long)blockIdx.x * THREADS + threadIdx.x) / LANES;
    lane = threadIdx.x % LANES;
    there = position < positions;
    long long n = inner == 1 ? position : position / inner;
    first = n * classes * inner + (inner == 1 ? 0 : position % inner);
    step = inner;
  }
};

// logs = log softmax(x), to be used again by the derivative. The loss of each position goes to
// `losses`, or, where there is none, its sum over a block to `partials`.
extern "C" __global__ void __launch_bounds__(THREADS)
log_likelihood(const E* logits, const void* target, long long target_kind, Real* logs, E* losses,
               double* partials, long long positions, long long classes, long long inner) {
  Target t = {target, target_kind};
  Row row(positions, classes, inner);
  long long end = row.there ? classes : 0;
  Real top = -infinity();
  for (long long c = row.lane; c < end; c += LANES) {
    Real x = real(logits[row.first + c * row.step]);
    top = x > top ? x : top;  // NaN shows in the sum
  }
  top = over_lanes(top, [](Real a, Real b) { return a > b ? a : b; });
  Real sum = 0;
  for (long long c = row.lane; c < end; c += LANES) {
    sum += exp((Real)(real(logits[row.first + c * row.step]) - top));
  }
  Real scale = log(sum_over_lanes(sum)), loss = 0;
  long long label = row.there && t.labels() ? t.label(row.position) : -1;
  for (long long c = row.lane; c < end; c += LANES) {
    long long at = row.first + c * row.step;
    Real value = real(logits[at]) - top - scale;
    logs[at] = value;
    if (t.labels()) {
      if (c == label) loss = -value;
    } else {
      Real p = t.probability(at);
      if (p != 0) loss -= p * value;  // 0 times -inf would be NaN
    }
  }
  loss = sum_over_lanes(loss);
  if (row.there && t.labels() && (label < 0 || label >= classes)) loss = not_a_number();
  if (losses) {
    if (row.there && row.lane == 0) round_to(losses[row.position], loss);
    return;
  }
  double total[1] = {row.there && row.lane == 0 ? (double)loss : 0.0};
  sum_lanes(total, (double*)dynamic_shared(), 0, threadIdx.x, 1, THREADS);
  if (threadIdx.x == 0) partials[blockIdx.x] = total[0];
}

// The blocks' sums over `divisor`, by one block.
extern "C" __global__ void __launch_bounds__(THREADS)
total_loss(const double* partials, E* loss, long long count, double divisor) {
  double sum[1] = {};
  for (long long k = threadIdx.x; k < count; k += THREADS) sum[0] += partials[k];
  sum_lanes(sum, (double*)dynamic_shared(), 0, threadIdx.x, 1, THREADS);
  if (threadIdx.x == 0) round_to(*loss, (Real)(sum[0] / divisor));
}

// (softmax Σ_c t - t) g for the logits, -log softmax g for the target, where they are wanted. g: of
// each position, or one for all, over `divisor`.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
likelihood_gradient(const E* g, long long g_of_each, const Real* logs, const void* target,
                    long long target_kind, E* glogits, E* gtarget, double divisor,
                    long long positions, long long classes, long long inner) {
  Target t = {target, target_kind};
  Row row(positions, classes, inner);
  long long end = row.there ? classes : 0;
  Real cotangent = row.there ? real(g[g_of_each ? row.position : 0]) / (Real)divisor : 0;
  long long label = row.there && t.labels() ? t.label(row.position) : -1;
  Real sum = 1;
  if (!t.labels()) {
    sum = 0;
    for (long long c = row.lane; c < end; c += LANES) sum += t.probability(row.first + c * row.step);
    sum = sum_over_lanes(sum);
  }
  for (long long c = row.lane; c < end; c += LANES) {
    long long at = row.first + c * row.step;
    Real p = t.labels() ? (Real)(c == label) : t.probability(at);
    Real value = ((Real)exp((Real)logs[at]) * sum - p) * cotangent;
    if (glogits) round_to(glogits[at], value);
    if (gtarget) round_to(gtarget[at], -logs[at] * cotangent);
  }
}
