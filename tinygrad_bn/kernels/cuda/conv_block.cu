// What follows a convolution: batch norm, ReLU and max pool, without what is in between in memory.
//
// Forward: `forward_sums` of batch_norm.cu goes over y, the convolution's output. `channel_moments`
// makes mean and variance of its partial sums, and of these the factors of y = γ x̂ + β. `activate`
// reads y once more, normalizes, cuts off at 0, takes the maxima, and writes these and, a byte each,
// which entry of its window it was that won.
//
// Backward: a cotangent reaches one entry of its window, or none where all are cut off. So
// `pooled_sums` reads of y only the entries that won. `channel_gradients` makes of the sums the
// gradients of γ and β, and the factors of that of y. `spread` writes that, entry by entry: what is
// normalized by the batch's statistics has a gradient wherever the cotangent goes. The gradients of
// images and weights are those of the convolution.
//
// The numbers are those of batch_norm.cuh, with the same care: sums in float64 of differences to a
// value of the channel, an element relative to the mean's high part. The two kernels of channels
// have a block for each; those of elements a thread for each that they write. Shared memory holds
// sums of a block, nothing else.
//
// To be defined: what batch_norm.cuh and images.cuh ask for, with VECTOR 1.

#include "common.cuh"
#include "images.cuh"
#include "batch_norm.cuh"

// No entry of a window: all are cut off.
constexpr int NONE = 255;

// y, (outer, rows, columns, inner), and the windows side by side on it.
struct Pool {
  int rows, columns;          // of y
  int high, wide;             // a window
  int out_rows, out_columns;  // how many there are
  int channels;
  INDEX inner;  // 1, or the channels

  __device__ __forceinline__ int channel(const Place& at) const {
    return inner == 1 ? (int)(at.outer % (INDEX)channels) : (int)at.inner;
  }
  // The entry of y that is `place` of window `at`.
  __device__ __forceinline__ INDEX entry(const Place& at, int place) const {
    int i = place / wide, j = place - i * wide;
    return offset(at.outer, at.row * high + i, at.column * wide + j, at.inner, rows, columns, inner);
  }
};

#define POOL                                                                                  \
  long long y_rows, long long y_columns, long long high, long long wide, long long out_rows, \
      long long out_columns, long long y_channels, long long y_inner
#define GIVEN_POOL                                                                           \
  {(int)y_rows,   (int)y_columns,   (int)high,       (int)wide,                              \
   (int)out_rows, (int)out_columns, (int)y_channels, (INDEX)y_inner}

// Add up the partial sums of channel blockIdx.x, (teams, members, tile, N); thread 0 has them.
template <int N>
__device__ void sum_members(const double* partials, double (&sums)[N], long long tile,
                            long long members) {
  long long team = blockIdx.x / tile, slot = blockIdx.x % tile;
  for (long long member = threadIdx.x; member < members; member += THREADS) {
    for (int n = 0; n < N; ++n) {
      sums[n] += partials[((team * members + member) * tile + slot) * N + n];
    }
  }
  sum_lanes(sums, (double*)dynamic_shared(), 0, threadIdx.x, 1, THREADS);
}

// mean: of y. reported: of y + offset, what the layer has for its running averages.
extern "C" __global__ void __launch_bounds__(THREADS)
channel_moments(const double* partials, const E* y, double* mean, double* reported, double* var,
                Affine* affines, const void* offset, long long offset_kind, const void* weight,
                long long weight_kind, const void* bias, long long bias_kind, double eps,
                long long count, long long inner, long long tile, long long members) {
  double sums[2] = {};
  sum_members(partials, sums, tile, members);
  if (threadIdx.x != 0) return;
  int c = blockIdx.x;
  Parameter added = {offset, offset_kind}, gamma = {weight, weight_kind}, beta = {bias, bias_kind};
  double d = sums[0] / count;
  double found = real(y[c * inner]) + d;  // the shift of forward_sums: the channel's first value
  double spread = sums[1] / count - d * d;
  spread = spread < 0 ? 0 : spread;  // NaN passes
  mean[c] = found;
  reported[c] = found + added.at(c, 0);
  var[c] = spread;
  affines[c] = affine(found, spread, eps, gamma.at(c, 1), beta.at(c, 0));
}

// max(γ x̂ + β, 0) of the largest entry of every window, and which that is, or NONE.
extern "C" __global__ void __launch_bounds__(THREADS)
activate(const E* y, const Affine* affines, E* out, unsigned char* places, long long count, POOL) {
  Pool pool = GIVEN_POOL;
  INDEX number;
  if (!mine(number, count)) return;
  Place at(number, pool.out_rows, pool.out_columns, pool.inner);
  Affine normalized = affines[pool.channel(at)];
  Real best = normalized(real(y[pool.entry(at, 0)]));
  int place = 0;
  for (int here = 1; here < pool.high * pool.wide; ++here) {
    Real value = normalized(real(y[pool.entry(at, here)]));
    if (value > best || (isnan(value) && !isnan(best))) {
      best = value;
      place = here;
    }
  }
  out[number] = rounded(best < 0 ? 0 : best);  // NaN passes
  places[number] = (unsigned char)(best > 0 ? place : NONE);
}

// Σ g and Σ g (y - mean) of each channel, over the entries that won; as partial sums of teams that
// share g as batch_norm.cuh says.
extern "C" __global__ void __launch_bounds__(THREADS)
pooled_sums(const E* g, const unsigned char* places, const E* y, const double* mean,
            double* partials, POOL, long long rows, long long channels, long long inner,
            long long tile, long long members) {
  double* scratch = (double*)dynamic_shared();
  Pool pool = GIVEN_POOL;
  Shape shape(rows, channels, inner, tile, members);
  Team team(shape, blockIdx.x);
  Walk walk(shape, team);
  double sums[2] = {}, centre = walk.count > 0 ? mean[team.first + walk.slot(shape, 0)] : 0;
  for (int done = 0; done < walk.count; ++done, walk.next()) {
    int place = places[walk.at];
    if (place == NONE) continue;
    Place at((INDEX)walk.at, pool.out_rows, pool.out_columns, pool.inner);
    double cotangent = real(g[walk.at]);
    sums[0] += cotangent;
    sums[1] = fma(cotangent, real(y[pool.entry(at, place)]) - centre, sums[1]);
  }
  write_partials<2>(sums, partials, scratch, shape, team, walk);
}

// gγ = Σ g x̂ and gβ = Σ g, where they are wanted, and the factors of gy.
extern "C" __global__ void __launch_bounds__(THREADS)
channel_gradients(const double* partials, const double* mean, const double* var,
                  const Affine* affines, Gradient* gradients, const void* weight,
                  long long weight_kind, void* gweight, long long gweight_kind, void* gbias,
                  long long gbias_kind, double eps, long long count, long long tile,
                  long long members) {
  double sums[2] = {};
  sum_members(partials, sums, tile, members);
  if (threadIdx.x != 0) return;
  int c = blockIdx.x;
  Parameter gamma = {weight, weight_kind};
  Affine of = affines[c];
  double unit = of.unit, deviation = sqrt(var[c] + eps), sum_gx = sums[1] / deviation;
  double slope = gamma.at(c, 1) / (deviation * unit);
  double tilt = -slope * sum_gx / (count * deviation * unit);
  double level = -slope * sums[0] / count - tilt * (mean[c] * unit - of.high);
  gradients[c] = {(Real)slope, (Real)tilt, (Real)level};
  if (gweight) set_parameter(gweight, gweight_kind, c, sum_gx);
  if (gbias) set_parameter(gbias, gbias_kind, c, sums[0]);
}

// The gradient of y: unit (slope g + tilt d + level), where g is 0 but for entries that won.
extern "C" __global__ void __launch_bounds__(THREADS)
spread(const E* g, const unsigned char* places, const E* y, const Affine* affines,
       const Gradient* gradients, E* gy, long long count, POOL) {
  Pool pool = GIVEN_POOL;
  INDEX number;
  if (!mine(number, count)) return;
  Place at(number, pool.rows, pool.columns, pool.inner);
  int channel = pool.channel(at), row = at.row / pool.high, column = at.column / pool.wide;
  Affine normalized = affines[channel];
  Gradient gradient = gradients[channel];
  Real cotangent = 0;
  if (row < pool.out_rows && column < pool.out_columns) {  // no window covers the rest
    INDEX window = offset(at.outer, row, column, at.inner, pool.out_rows, pool.out_columns,
                          pool.inner);
    int place = (at.row - row * pool.high) * pool.wide + at.column - column * pool.wide;
    if (places[window] == place) cotangent = real(g[window]);
  }
  Real rest = fma(normalized.centred(real(y[number])), gradient.tilt, gradient.level);
  gy[number] = rounded(fma(cotangent, gradient.slope, rest) * normalized.unit);
}
