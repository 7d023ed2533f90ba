// Batch norm, as it is computed: which thread has which elements, and what it does with them.
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
// What keeps the numbers right:
//
// - Sums are float64, of d = x - shift, where the shift is a value of the channel. The difference of
//   two floats is exact in float64, so an offset costs no digits, and a constant channel has d = 0.
//   (Sums of float32 would be faster on GPUs whose float64 is slow; at the speed of memory there is
//   time for two float64 operations an element on those whose float64 is not.)
// - They are added up in an order that depends on the launch alone: no atomics.
// - An element is normalized in float32, relative to the mean's high part, a float32:
//       d = x unit - high,    y = d scale + constant
//   d is rounded once. The mean's low part, what `high` lacks, goes into the constant.
// - unit is a power of two, 1 as long as the deviation is in the middle of the range of float32.
//   Beyond, it brings x to where scale, and the gradient's factors, are ordinary numbers.
//
// To be defined: ELEMENT, VECTOR (elements in a load), COLUMNS, RELU, and THREADS of a block, a
// multiple of 32. A mask is served where VECTOR is 1.

typedef ELEMENT E;
typedef Arithmetic<E>::type Real;
typedef Vector<E, VECTOR> Pack;

constexpr bool MASKED = VECTOR == 1;
constexpr int LANES = COLUMNS ? VECTOR : 1;  // the columns of a thread, each with sums of its own
// How many vectors a thread loads before it uses the first: enough are under way, and few enough for
// their registers. Backward, each is a vector of g and one of x.
constexpr int FORWARD_DEPTH = COLUMNS ? 2 : 4, BACKWARD_DEPTH = COLUMNS ? 1 : 2;

// --- who does what -------------------------------------------------------------------------------

// Numbers that pass 32 bits in a large tensor: offsets, rows, and the length of a run in elements.
// channel_tiles.py sees to it that all others do not.
struct Shape {
  long long rows, inner;
  int channels, tile, members;

  __device__ Shape(long long rows, long long channels, long long inner, long long tile,
                   long long members)
      : rows(rows), inner(inner), channels((int)channels), tile((int)tile), members((int)members) {}
};

struct Team {
  int number, group, first;  // `first` is its first channel
  int channels, member;

  __device__ Team(const Shape& shape, int block) {
    int tiles = (shape.channels - 1) / shape.tile + 1;
    number = block / shape.members;
    member = block % shape.members;
    group = number / tiles;
    first = number % tiles * shape.tile;
    channels = min(shape.tile, shape.channels - first);
  }
};

// The vectors that a thread visits, by their offsets from the tensor's beginning, in vectors.
struct Walk {
  long long at, step;     // the next one, and how far it is to the one after it in the same run
  long long carry;        // from a run's end to the next one's beginning
  int i, step_i, run;     // where in its run it is, how far it steps, the run's length
  int count;              // how many there are
  int x, y, width, lanes;  // the thread's column and lane, and how many the block has
  long long place, step_place;  // where in (rows, inner) it is; for masks

  __device__ Walk(const Shape& shape, const Team& team) {
    int thread = threadIdx.x;
    long long first_row = team.group * shape.rows;
    if (COLUMNS) {
      int inner = (int)shape.inner;
      width = team.channels * inner / VECTOR;
      lanes = THREADS / width;
      x = thread % width;
      y = thread / width;
      long long row_vectors = (long long)shape.channels * inner / VECTOR;
      long long share = ceil_div(shape.rows, shape.members);
      long long row = team.member * share + y;
      long long end = min(shape.rows, (team.member + 1) * share);
      count = y < lanes && row < end ? (int)((end - row - 1) / lanes) + 1 : 0;
      at = (first_row + row) * row_vectors + (long long)team.first * inner / VECTOR + x;
      step = lanes * row_vectors;
      i = step_i = 0;
      carry = 0;
      run = 1;
      place = row * inner + x % inner;
      step_place = lanes * inner;
    } else {
      width = 1;
      lanes = THREADS;
      x = 0;
      y = thread;
      run = (int)(shape.inner / VECTOR);
      long long all = shape.rows * run;
      long long share = ceil_div(all, shape.members);
      long long end = min(all, (team.member + 1) * share);
      place = team.member * share + thread;
      step_place = THREADS;
      count = place < end ? (int)((end - place - 1) / THREADS) + 1 : 0;
      long long row = place / run;
      i = (int)(place % run);
      at = ((first_row + row) * shape.channels + team.first) * run + i;
      step_i = THREADS % run;
      step = (long long)(THREADS / run) * shape.channels * run + step_i;
      carry = (long long)(shape.channels - 1) * run;
    }
  }

  __device__ __forceinline__ void next() {
    at += step;
    place += step_place;
    i += step_i;
    if (i >= run) {
      i -= run;
      at += carry;
    }
  }
  __device__ __forceinline__ void back() {
    at -= step;
    place -= step_place;
    i -= step_i;
    if (i < 0) {
      i += run;
      at -= carry;
    }
  }

  // Which of the tile's channels column j of the thread's vector belongs to.
  __device__ __forceinline__ int slot(const Shape& shape, int j) const {
    return COLUMNS ? (x * VECTOR + j) / (int)shape.inner : 0;
  }
};

// Call use(offset, place, k, load(offset, place, k)) for every vector of the walk, the k-th of the
// thread, with DEPTH loads under way; from the first on, or, BACK, from behind the last.
template <int DEPTH, bool BACK, class Load, class Use>
__device__ __forceinline__ void visit(Walk& walk, Load load, Use use) {
  for (int done = 0; done < walk.count; done += DEPTH) {
    long long at[DEPTH], place[DEPTH];
    decltype(load(0, 0, 0)) loaded[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      if (done + d < walk.count) {
        if (BACK) walk.back();
        at[d] = walk.at;
        place[d] = walk.place;
        loaded[d] = load(at[d], place[d], BACK ? walk.count - 1 - done - d : done + d);
        if (!BACK) walk.next();
      }
    }
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      if (done + d < walk.count) {
        use(at[d], place[d], BACK ? walk.count - 1 - done - d : done + d, loaded[d]);
      }
    }
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
  long long block = (long long)team.number * shape.members + team.member;
  double* mine = partials + block * shape.tile * N;
  for (int k = threadIdx.x; k < team.channels * N; k += THREADS) {
    int slot = k / N, n = k % N;
    double sum = 0;
    for (int c = 0; c < columns; ++c) sum += scratch[(slot * columns + c) * N + n];
    mine[k] = sum;
  }
}

// Call finish(slot, sums) in one thread for each of the tile's channels from `begin` to `end`.
template <int N, class Finish>
__device__ void read_partials(const double* partials, double* scratch, const Shape& shape,
                              const Team& team, int begin, int end, Finish finish) {
  const double* all = partials + (long long)team.number * shape.members * shape.tile * N;
  for (int base = begin; base < end; base += THREADS) {
    int width = min(end - base, THREADS), lanes = THREADS / width;
    int x = threadIdx.x % width, y = threadIdx.x / width;
    double sums[N] = {};
    if (y < lanes) {
      for (int member = y; member < shape.members; member += lanes) {
        // From the cache that blocks share: another block has just written it.
        for (int n = 0; n < N; ++n) sums[n] += __ldcg(all + ((long long)member * shape.tile + base + x) * N + n);
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
  __device__ __forceinline__ double at(const Shape& shape, int group, long long place) const {
    return MASKED && frequency ? frequency[group * shape.rows * shape.inner + place] : 1;
  }
  __device__ double count(const Shape& shape, int group) const {
    return MASKED && frequency ? total[group] : (double)(shape.rows * shape.inner);
  }
};

// A value of channel c: the first, or one that counts.
__device__ double shift(const E* x, const Mask& mask, const Shape& shape, int group, int c) {
  long long place = 0;
  if (MASKED && mask.frequency) {
    if (mask.total[group] == 0) return 0;
    place = mask.example[group];
  }
  long long row = group * shape.rows + (place ? place / shape.inner : 0);
  return real(x[(row * shape.channels + c) * shape.inner + (place ? place % shape.inner : 0)]);
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

// gx = unit (slope g + tilt d + level)
struct Gradient {
  Real slope, tilt, level;
};

__device__ __forceinline__ E rounded(Real y) {
  E element;
  round_to(element, y);
  return element;
}

// The parameters and statistics of the channels; any dtype, by number.
struct Channels {
  Parameter mean, var, weight, bias;
  double eps;

  __device__ Affine affine_of(long long c, long long at) const {
    return affine(mean.at(at, 0), var.at(at, 0), eps, weight.at(c, 1), bias.at(c, 0));
  }
};

// --- forward -------------------------------------------------------------------------------------

// Add Σ d and Σ d² of a vector, which counts `often`, to the sums of each of its columns.
__device__ __forceinline__ void add_moments(double (&sums)[LANES * 2], const Pack& x,
                                            const double (&shifts)[LANES], double often) {
  if (MASKED && !(often > 0)) return;
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) {
    int lane = COLUMNS ? j : 0;
    double d = (double)real(x.at[j]) - shifts[lane];
    double share = MASKED ? d * often : d;
    sums[lane * 2] += share;
    sums[lane * 2 + 1] = fma(share, d, sums[lane * 2 + 1]);
  }
}

// From a channel's sums: its mean and variance, written where they are wanted, and y = γ x̂ + β. Where
// nothing counts they are 0 and 1: one can divide by them.
__device__ Affine moments_to_affine(const double* sums, const E* x, const Mask& mask,
                                    const Shape& shape, const Team& team, int slot,
                                    const Channels& of, double* mean, double* var) {
  int c = team.first + slot;
  long long at = (long long)team.group * shape.channels + c;
  double count = mask.count(shape, team.group);
  double offset = count > 0 ? sums[0] / count : 0;
  double found = shift(x, mask, shape, team.group, c) + offset;
  double spread = count > 0 ? sums[1] / count - offset * offset : 1;
  spread = spread < 0 ? 0 : spread;  // NaN passes
  if (mean) {
    mean[at] = found;
    var[at] = spread;
  }
  return affine(found, spread, of.eps, of.weight.at(c, 1), of.bias.at(c, 0));
}

// y, with RELU plus `residual` and at least 0. beta: what y is where nothing counts.
__device__ __forceinline__ Pack outputs(const Pack& x, const Pack* residual,
                                        const Affine (&of)[LANES], bool counts, double beta) {
  Pack out;
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) {
    Real y = of[COLUMNS ? j : 0](real(x.at[j]));
    if (MASKED && !counts) y = (Real)beta;
    if (RELU && residual) y += real(residual->at[j]);
    if (RELU) y = y < 0 ? 0 : y;  // NaN passes
    out.at[j] = rounded(y);
  }
  return out;
}

// --- backward ------------------------------------------------------------------------------------

// Σ g over the values that count, Σ g (x - mean) over them, and where there may be a mask Σ g over
// all.
constexpr int BACKWARD_SUMS = MASKED ? 3 : 2;

// What the backward pass reads of an element: out only with RELU and a residual.
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

// The cotangent of y. With RELU, g is that of max(y + residual, 0): it passes where `out`, that
// itself, is positive, or, without a residual, where y is, which is computed again.
__device__ __forceinline__ Pack gated(const Pack& g, const Pack& x, const Pack* out,
                                      const Affine (&of)[LANES], bool counts, double beta) {
  if (!RELU) return g;
  Pack passed;
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) {
    Real y = MASKED && !counts ? (Real)beta : of[COLUMNS ? j : 0](real(x.at[j]));
    bool passes = real(out ? out->at[j] : rounded(y)) > 0;
    passed.at[j] = passes ? g.at[j] : rounded(0);
  }
  return passed;
}

__device__ __forceinline__ void add_products(double (&sums)[LANES * BACKWARD_SUMS], const Pack& g,
                                             const Pack& x, const double (&means)[LANES],
                                             bool counts) {
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) {
    int lane = COLUMNS ? j : 0;
    double* sum = sums + lane * BACKWARD_SUMS;
    double gj = real(g.at[j]);
    if (MASKED) sum[2] += gj;
    if (MASKED && !counts) continue;
    sum[0] += gj;
    sum[1] = fma(gj, real(x.at[j]) - means[lane], sum[1]);
  }
}

// Where the cotangents of parameters and statistics go; null pointers for what is not wanted.
struct Cotangents {
  void* weight;
  long long weight_kind;
  void* bias;
  long long bias_kind;
  double *mean, *var;
};

// From a channel's sums: gx = γ s (g - p Σ g - p x̂ Σ g x̂), and, in one block, gγ = Σ g x̂ and
// gβ = Σ g. given: the statistics are not the batch's: gx = γ s g, gμ = -Σ gx and
// gv = -½ s² Σ gx (x - μ).
__device__ Gradient products_to_gradient(const double* sums, const Affine& y, const Mask& mask,
                                         const Shape& shape, const Team& team, int slot,
                                         const Channels& of, bool given, bool writes,
                                         const Cotangents& to) {
  int c = team.first + slot;
  long long at = (long long)team.group * shape.channels + c;
  double count = mask.count(shape, team.group);
  double mu = of.mean.at(at, 0), v = of.var.at(at, 0), gamma = of.weight.at(c, 1);
  double deviation = sqrt(v + of.eps), sum_g = sums[0], sum_gx = sums[1] / deviation;
  double unit = y.unit, slope = gamma / (deviation * unit), tilt = 0, level = 0;
  if (!given && count > 0) {
    tilt = -slope * sum_gx / (count * deviation * unit);
    level = -slope * sum_g / count - tilt * (mu * unit - y.high);
  }
  if (writes) {
    if (to.weight) set_parameter(to.weight, to.weight_kind, at, sum_gx);
    if (to.bias) set_parameter(to.bias, to.bias_kind, at, sums[MASKED ? 2 : 0]);
    if (to.mean) to.mean[at] = -gamma / deviation * sum_g;
    if (to.var) to.var[at] = -0.5 * gamma * sum_gx / (v + of.eps);
  }
  return {(Real)slope, (Real)tilt, (Real)level};
}

// gx of a vector that counts `often`. g: the cotangent of y.
__device__ __forceinline__ Pack gradients(const Pack& g, const Pack& x, const Affine (&of)[LANES],
                                          const Gradient (&gradient)[LANES], double often) {
  Pack result;
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) {
    const Affine& y = of[COLUMNS ? j : 0];
    const Gradient& k = gradient[COLUMNS ? j : 0];
    Real rest = fma(y.centred(real(x.at[j])), k.tilt, k.level);
    if (MASKED) rest *= (Real)often;
    Real value = fma(real(g.at[j]), k.slope, rest) * y.unit;
    result.at[j] = rounded(MASKED && !(often > 0) ? 0 : value);
  }
  return result;
}
