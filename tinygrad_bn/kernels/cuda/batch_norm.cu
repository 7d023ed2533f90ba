// Batch norm: sums over each channel, then every element once more.
//
// A tensor is (groups, rows, channels, inner): a group is a ghost batch, with statistics of its own;
// inner is what follows the channel axes in memory, 1 for channels-last and 2-D. A *tile* is some
// adjacent channels of one group, and a *team* of `members` blocks serves it:
//
//   COLUMNS 0   a tile is one channel, and the threads of its team go along its runs of `inner`
//               elements: for a large inner (NCHW).
//   COLUMNS 1   a row of the tile lies together in memory, and each thread goes down the rows, with
//               sums for each of the columns of its vector: for a small inner (NHWC, 2-D, 7 x 7).
//
// Two launches each way: `*_sums` leaves the partial sums of every block in memory, and `*_apply`
// adds them up, in the same order in every block that needs them, and goes over the elements. It
// goes over the tiles in reversed order, so that it begins with what is still in the cache.
//
// What keeps the numbers right:
//
// - Sums are float64, of d = x - shift, where the shift is a value of the channel. The difference of
//   two floats is exact in float64, so an offset costs no digits, and a constant channel has d = 0.
//   (Sums of float32 would be faster on GPUs whose float64 is slow; at the speed of memory there is
//   time for two float64 operations an element on those whose float64 is not.)
// - An element is normalized in float32, relative to the mean's high part, a float32:
//       d = x unit - high,    y = d scale + constant
//   d is rounded once. The mean's low part, what `high` lacks, goes into the constant.
// - unit is a power of two, 1 as long as the deviation is in the middle of the range of float32.
//   Beyond, it brings x to where scale, and the gradient's factors, are ordinary numbers.
//
// To be defined: ELEMENT, VECTOR (elements in a load), COLUMNS, RELU, and THREADS of a block, a
// multiple of 32. A mask is served where VECTOR is 1.
//
// The launch bounds allow 128 registers; 256 threads with 64 would fill a multiprocessor to half,
// which is plenty: two to four loads of 16 bytes are under way in each thread.

#include "common.cuh"

typedef ELEMENT E;
typedef Arithmetic<E>::type Real;
typedef Vector<E, VECTOR> Pack;

constexpr bool MASKED = VECTOR == 1;
constexpr int LANES = COLUMNS ? VECTOR : 1;  // the columns of a thread, each with sums of its own
constexpr int DEPTH = COLUMNS ? 2 : 4;       // the loads of a thread that are under way at once

// --- who does what -------------------------------------------------------------------------------

struct Shape {
  long long rows, channels, inner;
  long long tile, members;
};

struct Team {
  long long number, group, first;  // `first` is its first channel
  int channels, member;

  __device__ Team(const Shape& shape, long long block) {
    long long tiles = ceil_div(shape.channels, shape.tile);
    number = block / shape.members;
    member = (int)(block % shape.members);
    group = number / tiles;
    first = number % tiles * shape.tile;
    channels = (int)min(shape.tile, shape.channels - first);
  }
};

// The vectors that a thread visits, by their offsets from the tensor's beginning, in vectors.
struct Walk {
  long long at, left;        // the next one, and how many there are
  long long step;            // to the one after it, unless that lies in a later run:
  long long i, step_i, run;  // where in its run of vectors it is, how far it steps, the run's length
  long long carry;           // from a run's end to the next one's beginning
  long long place, step_place;  // where in (rows, inner) it is
  int x, y, width, lanes;       // the thread's column and lane among the block's

  __device__ Walk(const Shape& shape, const Team& team) {
    int thread = threadIdx.x;
    long long first_row = team.group * shape.rows;
    if (COLUMNS) {
      width = (int)(team.channels * shape.inner / VECTOR);
      lanes = THREADS / width;
      x = thread % width;
      y = thread / width;
      long long row_vectors = shape.channels * shape.inner / VECTOR;
      long long share = ceil_div(shape.rows, shape.members);
      long long row = team.member * share + y;
      long long end = min(shape.rows, (team.member + 1) * share);
      left = y < lanes && row < end ? ceil_div(end - row, lanes) : 0;
      at = (first_row + row) * row_vectors + team.first * shape.inner / VECTOR + x;
      step = lanes * row_vectors;
      i = step_i = carry = 0;
      run = 1;
      place = row * shape.inner + x % shape.inner;
      step_place = lanes * shape.inner;
    } else {
      width = 1;
      lanes = THREADS;
      x = 0;
      y = thread;
      run = shape.inner / VECTOR;
      long long all = shape.rows * run;
      long long share = ceil_div(all, shape.members);
      long long end = min(all, (team.member + 1) * share);
      place = team.member * share + thread;
      step_place = THREADS;
      left = place < end ? ceil_div(end - place, (long long)THREADS) : 0;
      long long row = place / run;
      i = place % run;
      at = ((first_row + row) * shape.channels + team.first) * run + i;
      step_i = THREADS % run;
      step = THREADS / run * shape.channels * run + step_i;
      carry = (shape.channels - 1) * run;
    }
  }

  __device__ __forceinline__ void next() {
    --left;
    at += step;
    place += step_place;
    i += step_i;
    if (i >= run) {
      i -= run;
      at += carry;
    }
  }

  // Which of the tile's channels column j of the thread's vector belongs to.
  __device__ __forceinline__ int slot(const Shape& shape, int j) const {
    return COLUMNS ? (int)((x * VECTOR + j) / shape.inner) : 0;
  }
};

// Call use(offset, place, load(offset)) for every vector of the walk, with DEPTH loads under way.
template <class Load, class Use>
__device__ __forceinline__ void visit(Walk walk, Load load, Use use) {
  while (walk.left >= DEPTH) {
    long long at[DEPTH], place[DEPTH];
    decltype(load(0)) loaded[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      at[d] = walk.at;
      place[d] = walk.place;
      loaded[d] = load(at[d]);
      walk.next();
    }
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) use(at[d], place[d], loaded[d]);
  }
  while (walk.left > 0) {
    use(walk.at, walk.place, load(walk.at));
    walk.next();
  }
}

// --- sums of a team ------------------------------------------------------------------------------

// Leave the block's part of the sums of each of its tile's channels in `partials`, (teams, members,
// tile, N). sums: the thread's, of each of its columns.
template <int N>
__device__ void write_partials(double (&sums)[LANES * N], double* partials, double* scratch,
                               const Shape& shape, const Team& team, const Walk& walk) {
  sum_lanes(sums, scratch, walk.x, walk.y, walk.width, walk.lanes);
  int columns = COLUMNS ? (int)shape.inner : 1;  // of a channel
  double* mine = partials + (team.number * shape.members + team.member) * shape.tile * N;
  for (int k = threadIdx.x; k < team.channels * N; k += THREADS) {
    int slot = k / N, n = k % N;
    double sum = 0;
    for (int c = 0; c < columns; ++c) sum += scratch[(slot * columns + c) * N + n];
    mine[k] = sum;
  }
}

// Call finish(slot, sums) in one thread for each of the tile's channels.
template <int N, class Finish>
__device__ void read_partials(const double* partials, double* scratch, const Shape& shape,
                              const Team& team, Finish finish) {
  const double* all = partials + team.number * shape.members * shape.tile * N;
  for (int base = 0; base < team.channels; base += THREADS) {
    int width = min(team.channels - base, THREADS), lanes = THREADS / width;
    int x = threadIdx.x % width, y = threadIdx.x / width;
    double sums[N] = {};
    if (y < lanes) {
      for (long long member = y; member < shape.members; member += lanes) {
        for (int n = 0; n < N; ++n) sums[n] += all[(member * shape.tile + base + x) * N + n];
      }
    }
    sum_lanes(sums, scratch, x, y, width, lanes);
    if (y == 0) finish(base + x, sums);
  }
}

// --- per channel ---------------------------------------------------------------------------------

struct Parameter {
  const void* values;
  long long kind;

  __device__ double at(long long index, double otherwise) const {
    return values ? parameter(values, kind, index) : otherwise;
  }
};

// Where values count; null pointers for everywhere. See `Mask` in batch_norm.py.
struct Mask {
  const double* frequency;   // (groups, rows, inner): how often a place counts
  const double* total;       // (groups,): the sum of the frequencies
  const long long* example;  // (groups,): a place that counts, if there is one

  // How often a place of a group counts.
  __device__ __forceinline__ double at(const Shape& shape, long long group, long long place) const {
    return MASKED && frequency ? frequency[group * shape.rows * shape.inner + place] : 1;
  }
  __device__ double count(const Shape& shape, long long group) const {
    return MASKED && frequency ? total[group] : (double)(shape.rows * shape.inner);
  }
};

// A value of channel c: the first, or one that counts.
__device__ double shift(const E* x, const Mask& mask, const Shape& shape, long long group,
                        long long c) {
  long long place = 0;
  if (MASKED && mask.frequency) {
    if (mask.total[group] == 0) return 0;
    place = mask.example[group];
  }
  long long row = group * shape.rows + place / shape.inner;
  return real(x[(row * shape.channels + c) * shape.inner + place % shape.inner]);
}

// x̂ and what is linear in it.
struct Affine {
  Real unit, high, scale, constant;

  // d, of which x̂ is a multiple but for the mean's low part
  __device__ __forceinline__ Real centred(Real x) const { return fma(x, unit, -high); }
  __device__ __forceinline__ Real operator()(Real x) const {
    return fma(centred(x), scale, constant);
  }
};

__device__ double unit_for(double deviation, double mean) {
  bool extreme = deviation < 0x1p-40 || deviation > 0x1p40;
  if (sizeof(Real) == 8 || !extreme || deviation == 0 || !isfinite(deviation)) return 1;
  int exponent = min(max(ilogb(deviation), -126), 126);
  // A mean without a spread to match, such as a constant's, must stay finite.
  if (mean != 0 && isfinite(mean)) exponent = max(exponent, ilogb(mean) - 100);
  return ldexp(1.0, -exponent);
}

__device__ Affine affine(double mean, double var, double eps, double gamma, double beta) {
  double deviation = sqrt(var + eps);
  double unit = unit_for(deviation, mean);
  double scale = gamma / (deviation * unit);
  Affine made;
  made.unit = (Real)unit;
  made.high = (Real)(mean * unit);
  made.scale = (Real)scale;
  made.constant = (Real)(beta - (mean * unit - made.high) * scale);
  return made;
}

// y rounded to an element, and whether ReLU lets it through.
__device__ __forceinline__ E rounded(Real y) {
  E element;
  round_to(element, y);
  return element;
}
__device__ __forceinline__ bool passes(Real y) { return real(rounded(y)) > 0; }

// --- forward -------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 2)
forward_sums(const E* x, const double* frequency, const double* total, const long long* example,
             double* partials, long long rows, long long channels, long long inner, long long tile,
             long long members) {
  double* scratch = (double*)dynamic_shared();
  Shape shape = {rows, channels, inner, tile, members};
  Team team(shape, blockIdx.x);
  Walk walk(shape, team);
  Mask mask = {frequency, total, example};
  double shifts[LANES], sums[LANES * 2] = {};
  if (walk.left > 0) {
    for (int j = 0; j < LANES; ++j) {
      shifts[j] = shift(x, mask, shape, team.group, team.first + walk.slot(shape, j));
    }
  }
  visit(
      walk, [&](long long at) { return load<E, VECTOR>(x, at, AGAIN); },
      [&](long long, long long place, const Pack& pack) {
        double often = mask.at(shape, team.group, place);
        if (MASKED && !(often > 0)) return;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
          int lane = COLUMNS ? j : 0;
          double d = (double)real(pack.at[j]) - shifts[lane];
          double share = MASKED ? d * often : d;
          sums[lane * 2] += share;
          sums[lane * 2 + 1] = fma(share, d, sums[lane * 2 + 1]);
        }
      });
  write_partials<2>(sums, partials, scratch, shape, team, walk);
}

// y = γ x̂ + β, plus `residual` and at least 0 with RELU. partials: of forward_sums; the statistics
// are then written, as float64. None: they are given, in any dtype.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
forward_apply(const E* x, const E* residual, E* y, const double* partials, void* mean,
              long long mean_kind, void* var, long long var_kind, const void* weight,
              long long weight_kind, const void* bias, long long bias_kind,
              const double* frequency, const double* total, const long long* example, double eps,
              long long rows, long long channels, long long inner, long long tile,
              long long members) {
  double* scratch = (double*)dynamic_shared();
  Affine* coefficients = (Affine*)(scratch + 2 * THREADS);
  Shape shape = {rows, channels, inner, tile, members};
  Team team(shape, gridDim.x - 1 - (long long)blockIdx.x);
  Walk walk(shape, team);
  Mask mask = {frequency, total, example};
  Parameter gamma = {weight, weight_kind}, beta = {bias, bias_kind};
  if (partials) {
    double count = mask.count(shape, team.group);
    read_partials<2>(partials, scratch, shape, team, [&](int slot, const double* sums) {
      long long c = team.first + slot, at = team.group * channels + c;
      double offset = count > 0 ? sums[0] / count : 0;
      double found = shift(x, mask, shape, team.group, c) + offset;
      double spread = count > 0 ? sums[1] / count - offset * offset : 0;
      spread = spread < 0 ? 0 : spread;  // NaN passes
      coefficients[slot] = affine(found, spread, eps, gamma.at(c, 1), beta.at(c, 0));
      if (team.member == 0) {
        ((double*)mean)[at] = found;
        ((double*)var)[at] = spread;
      }
    });
  } else {
    for (int slot = threadIdx.x; slot < team.channels; slot += THREADS) {
      long long c = team.first + slot;
      coefficients[slot] = affine(parameter(mean, mean_kind, c), parameter(var, var_kind, c), eps,
                                  gamma.at(c, 1), beta.at(c, 0));
    }
  }
  __syncthreads();
  Affine of[LANES];
  if (walk.left > 0) {
    for (int j = 0; j < LANES; ++j) of[j] = coefficients[walk.slot(shape, j)];
  }
  struct Loaded {
    Pack x, residual;
  };
  visit(
      walk,
      [&](long long at) {
        Loaded loaded;
        loaded.x = load<E, VECTOR>(x, at);
        if (RELU && residual) loaded.residual = load<E, VECTOR>(residual, at);
        return loaded;
      },
      [&](long long at, long long place, const Loaded& loaded) {
        Pack out;
        bool counts = mask.at(shape, team.group, place) > 0;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
          int lane = COLUMNS ? j : 0;
          Real value = of[lane](real(loaded.x.at[j]));
          if (MASKED && !counts) value = (Real)beta.at(team.first + walk.slot(shape, j), 0);
          if (RELU && residual) value += real(loaded.residual.at[j]);
          if (RELU) value = value < 0 ? 0 : value;  // NaN passes
          out.at[j] = rounded(value);
        }
        store<E, VECTOR>(y, at, out);
      });
}

// --- backward ------------------------------------------------------------------------------------

// With RELU the cotangent is that of max(y + residual, 0): it passes where `out` is positive, or,
// without a residual, where y is, which is computed again.
struct Gate {
  Affine y[LANES];
  Real beta[LANES];  // y where nothing counts

  __device__ __forceinline__ Real pass(Real g, Real x, bool counts, bool by_out, Real out,
                                       int lane) const {
    if (!RELU) return g;
    if (by_out) return out > 0 ? g : 0;
    return passes(MASKED && !counts ? beta[lane] : y[lane](x)) ? g : 0;
  }
};

// Σ g over the values that count, Σ g (x - mean) over them, and with a mask Σ g over all.
constexpr int BACKWARD_SUMS = MASKED ? 3 : 2;

struct LoadedBackward {
  Pack g, x, out;
};

__device__ __forceinline__ LoadedBackward load_backward(const E* g, const E* x, const E* out,
                                                        long long at, Use use) {
  LoadedBackward loaded;
  loaded.g = load<E, VECTOR>(g, at, use);
  loaded.x = load<E, VECTOR>(x, at, use);
  if (RELU && out) loaded.out = load<E, VECTOR>(out, at, use);
  return loaded;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
backward_sums(const E* g, const E* x, const E* out, double* partials, const void* mean,
              long long mean_kind, const void* var, long long var_kind, const void* weight,
              long long weight_kind, const void* bias, long long bias_kind,
              const double* frequency, double eps, long long rows, long long channels,
              long long inner, long long tile, long long members) {
  double* scratch = (double*)dynamic_shared();
  Shape shape = {rows, channels, inner, tile, members};
  Team team(shape, blockIdx.x);
  Walk walk(shape, team);
  Mask mask = {frequency, nullptr, nullptr};
  Parameter gamma = {weight, weight_kind}, beta = {bias, bias_kind};
  double means[LANES], sums[LANES * BACKWARD_SUMS] = {};
  Gate gate;
  if (walk.left > 0) {
    for (int j = 0; j < LANES; ++j) {
      long long c = team.first + walk.slot(shape, j), at = team.group * channels + c;
      means[j] = parameter(mean, mean_kind, at);
      if (RELU) {
        gate.y[j] =
            affine(means[j], parameter(var, var_kind, at), eps, gamma.at(c, 1), beta.at(c, 0));
        if (MASKED) gate.beta[j] = (Real)beta.at(c, 0);
      }
    }
  }
  visit(
      walk, [&](long long at) { return load_backward(g, x, out, at, AGAIN); },
      [&](long long, long long place, const LoadedBackward& loaded) {
        bool counts = mask.at(shape, team.group, place) > 0;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
          int lane = COLUMNS ? j : 0;
          double* sum = sums + lane * BACKWARD_SUMS;
          Real xj = real(loaded.x.at[j]), outj = RELU && out ? real(loaded.out.at[j]) : 0;
          double gj = gate.pass(real(loaded.g.at[j]), xj, counts, out != nullptr, outj, lane);
          if (MASKED) sum[2] += gj;
          if (MASKED && !counts) continue;
          sum[0] += gj;
          sum[1] = fma(gj, xj - means[lane], sum[1]);
        }
      });
  write_partials<BACKWARD_SUMS>(sums, partials, scratch, shape, team, walk);
}

// gx = unit (slope g + tilt d + level)
struct Gradient {
  Real slope, tilt, level;
};

// gx = γ s (g - p Σ g - p x̂ Σ g x̂), gγ = Σ g x̂, gβ = Σ g; where any of them is None it is left out.
// given: the statistics are not the batch's: gx = γ s g, gμ = -Σ gx, gv = -½ s² Σ gx (x - μ).
extern "C" __global__ void __launch_bounds__(THREADS, 2)
backward_apply(const E* g, const E* x, const E* out, E* gx, const double* partials,
               const void* mean, long long mean_kind, const void* var, long long var_kind,
               const void* weight, long long weight_kind, const void* bias, long long bias_kind,
               void* gweight, long long gweight_kind, void* gbias, long long gbias_kind,
               double* gmean, double* gvar, long long given, const double* frequency,
               const double* total, double eps, long long rows, long long channels,
               long long inner, long long tile, long long members) {
  double* scratch = (double*)dynamic_shared();
  Affine* affines = (Affine*)(scratch + BACKWARD_SUMS * THREADS);
  Gradient* gradients = (Gradient*)(affines + tile);
  Shape shape = {rows, channels, inner, tile, members};
  Team team(shape, gridDim.x - 1 - (long long)blockIdx.x);
  Walk walk(shape, team);
  Parameter gamma = {weight, weight_kind}, beta = {bias, bias_kind};
  Mask mask = {frequency, total, nullptr};
  double count = mask.count(shape, team.group);
  auto finish = [&](int slot, const double* sums) {
    long long c = team.first + slot, at = team.group * channels + c;
    double mu = parameter(mean, mean_kind, at), v = parameter(var, var_kind, at);
    double deviation = sqrt(v + eps), factor = gamma.at(c, 1);
    Affine y = affine(mu, v, eps, factor, beta.at(c, 0));
    double unit = y.unit, slope = factor / (deviation * unit), tilt = 0, level = 0;
    double sum_g = sums[0], sum_gx = sums[1] / deviation;
    if (!given && count > 0) {
      tilt = -slope * sum_gx / (count * deviation * unit);
      level = -slope * sum_g / count - tilt * (mu * unit - y.high);
    }
    affines[slot] = y;
    gradients[slot] = {(Real)slope, (Real)tilt, (Real)level};
    if (team.member != 0) return;
    if (gweight) set_parameter(gweight, gweight_kind, at, sum_gx);
    if (gbias) set_parameter(gbias, gbias_kind, at, sums[BACKWARD_SUMS - (MASKED ? 1 : 2)]);
    if (gmean) gmean[at] = -factor / deviation * sum_g;
    if (gvar) gvar[at] = -0.5 * factor * sum_gx / (v + eps);
  };
  if (partials) {
    read_partials<BACKWARD_SUMS>(partials, scratch, shape, team, finish);
  } else {  // with given statistics gx needs no sums
    const double none[BACKWARD_SUMS] = {};
    for (int slot = threadIdx.x; slot < team.channels; slot += THREADS) finish(slot, none);
  }
  if (!gx) return;
  __syncthreads();
  Gate gate;
  Gradient gradient[LANES];
  if (walk.left > 0) {
    for (int j = 0; j < LANES; ++j) {
      gate.y[j] = affines[walk.slot(shape, j)];
      if (RELU && MASKED) gate.beta[j] = (Real)beta.at(team.first + walk.slot(shape, j), 0);
      gradient[j] = gradients[walk.slot(shape, j)];
    }
  }
  visit(
      walk, [&](long long at) { return load_backward(g, x, out, at, LAST); },
      [&](long long at, long long place, const LoadedBackward& loaded) {
        double often = mask.at(shape, team.group, place);
        bool counts = often > 0;
        Pack result;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
          int lane = COLUMNS ? j : 0;
          const Affine& y = gate.y[lane];
          const Gradient& k = gradient[lane];
          Real xj = real(loaded.x.at[j]), outj = RELU && out ? real(loaded.out.at[j]) : 0;
          Real gj = gate.pass(real(loaded.g.at[j]), xj, counts, out != nullptr, outj, lane);
          Real rest = fma(y.centred(xj), k.tilt, k.level);
          if (MASKED) rest *= (Real)often;
          Real value = fma(gj, k.slope, rest) * y.unit;
          result.at[j] = rounded(MASKED && !counts ? 0 : value);
        }
        store<E, VECTOR>(gx, at, result);
      });
}
