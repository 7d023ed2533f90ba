// Batch norm in two launches each way, for any tensor, with or without a mask; see batch_norm.cuh.
//
// `*_sums` leaves the partial sums of every block in memory. `*_apply` adds them up, in the same
// order in every block that needs them, and goes over the elements once more. It goes over the tiles
// in reversed order, so that it begins with what is still in the cache.
//
// The launch bounds leave a thread 128 registers, so that two blocks of 256 threads fit on a
// multiprocessor: each thread has up to four loads of 16 bytes under way, 32 KB together, and the
// speed of an H100's memory takes 14 KB.

#include "common.cuh"
#include "batch_norm.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 2)
forward_sums(const E* x, const double* frequency, const double* total, const long long* example,
             double* partials, long long rows, long long channels, long long inner, long long tile,
             long long members) {
  double* scratch = (double*)dynamic_shared();
  Shape shape(rows, channels, inner, tile, members);
  Team team(shape, blockIdx.x);
  Walk walk(shape, team);
  Mask mask = {frequency, total, example};
  double shifts[LANES], sums[LANES * 2] = {};
  if (walk.count > 0) {
    for (int j = 0; j < LANES; ++j) {
      shifts[j] = shift(x, mask, shape, team.group, team.first + walk.slot(shape, j));
    }
  }
  visit<FORWARD_DEPTH, false>(
      walk, [&](long long at, long long, int) { return load<E, VECTOR>(x, at, AGAIN); },
      [&](long long, long long place, int, const Pack& pack) {
        add_moments(sums, pack, shifts, mask.at(shape, team.group, place));
      });
  write_partials<2>(sums, partials, scratch, shape, team, walk);
}

// partials: of forward_sums; mean and var are then written, as float64. None: they are given, in any
// dtype.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
forward_apply(const E* x, const E* residual, E* y, const double* partials, void* mean,
              long long mean_kind, void* var, long long var_kind, const void* weight,
              long long weight_kind, const void* bias, long long bias_kind,
              const double* frequency, const double* total, const long long* example, double eps,
              long long rows, long long channels, long long inner, long long tile,
              long long members) {
  double* scratch = (double*)dynamic_shared();
  Affine* coefficients = (Affine*)(scratch + 2 * THREADS);
  Shape shape(rows, channels, inner, tile, members);
  Team team(shape, gridDim.x - 1 - blockIdx.x);
  Walk walk(shape, team);
  Mask mask = {frequency, total, example};
  Channels of = {{mean, mean_kind}, {var, var_kind}, {weight, weight_kind}, {bias, bias_kind}, eps};
  if (partials) {
    double* to_mean = team.member == 0 ? (double*)mean : nullptr;
    read_partials<2>(partials, scratch, shape, team, 0, team.channels,
                     [&](int slot, const double* sums) {
                       coefficients[slot] = moments_to_affine(sums, x, mask, shape, team, slot, of,
                                                              to_mean, (double*)var);
                     });
  } else {
    for (int slot = threadIdx.x; slot < team.channels; slot += THREADS) {
      coefficients[slot] = of.affine_of(team.first + slot, team.first + slot);
    }
  }
  __syncthreads();
  Affine affine[LANES];
  double beta = 0;
  if (walk.count > 0) {
    for (int j = 0; j < LANES; ++j) affine[j] = coefficients[walk.slot(shape, j)];
    if (MASKED) beta = of.bias.at(team.first + walk.slot(shape, 0), 0);
  }
  struct Loaded {
    Pack x, residual;
  };
  visit<FORWARD_DEPTH, false>(
      walk,
      [&](long long at, long long, int) {
        Loaded loaded;
        loaded.x = load<E, VECTOR>(x, at);
        if (RELU && residual) loaded.residual = load<E, VECTOR>(residual, at);
        return loaded;
      },
      [&](long long at, long long place, int, const Loaded& loaded) {
        bool counts = mask.at(shape, team.group, place) > 0;
        const Pack* added = residual ? &loaded.residual : nullptr;
        store<E, VECTOR>(y, at, outputs(loaded.x, added, affine, counts, beta));
      });
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
backward_sums(const E* g, const E* x, const E* out, double* partials, const void* mean,
              long long mean_kind, const void* var, long long var_kind, const void* weight,
              long long weight_kind, const void* bias, long long bias_kind,
              const double* frequency, double eps, long long rows, long long channels,
              long long inner, long long tile, long long members) {
  double* scratch = (double*)dynamic_shared();
  Shape shape(rows, channels, inner, tile, members);
  Team team(shape, blockIdx.x);
  Walk walk(shape, team);
  Mask mask = {frequency, nullptr, nullptr};
  Channels of = {{mean, mean_kind}, {var, var_kind}, {weight, weight_kind}, {bias, bias_kind}, eps};
  double means[LANES], sums[LANES * BACKWARD_SUMS] = {}, beta = 0;
  Affine affine[LANES];
  if (walk.count > 0) {
    for (int j = 0; j < LANES; ++j) {
      int c = team.first + walk.slot(shape, j);
      long long at = team.group * channels + c;
      means[j] = of.mean.at(at, 0);
      if (RELU) affine[j] = of.affine_of(c, at);
      if (MASKED) beta = of.bias.at(c, 0);
    }
  }
  visit<BACKWARD_DEPTH, false>(
      walk,
      [&](long long at, long long, int) { return load_backward(g, x, out, at, AGAIN); },
      [&](long long, long long place, int, const LoadedBackward& loaded) {
        bool counts = mask.at(shape, team.group, place) > 0;
        const Pack* by = out ? &loaded.out : nullptr;
        Pack passed = gated(loaded.g, loaded.x, by, affine, counts, beta);
        add_products(sums, passed, loaded.x, means, counts);
      });
  write_partials<BACKWARD_SUMS>(sums, partials, scratch, shape, team, walk);
}

// partials: of backward_sums; None where only gx is wanted and statistics are given, which takes no
// sums. gx and other cotangents may be None: they are left out.
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
  Gradient* all_gradients = (Gradient*)(affines + tile);
  Shape shape(rows, channels, inner, tile, members);
  Team team(shape, gridDim.x - 1 - blockIdx.x);
  Walk walk(shape, team);
  Mask mask = {frequency, total, nullptr};
  Channels of = {{mean, mean_kind}, {var, var_kind}, {weight, weight_kind}, {bias, bias_kind}, eps};
  Cotangents to = {gweight, gweight_kind, gbias, gbias_kind, gmean, gvar};
  auto finish = [&](int slot, const double* sums) {
    int c = team.first + slot;
    affines[slot] = of.affine_of(c, team.group * channels + c);
    all_gradients[slot] = products_to_gradient(sums, affines[slot], mask, shape, team, slot, of,
                                               given, team.member == 0, to);
  };
  if (partials) {
    read_partials<BACKWARD_SUMS>(partials, scratch, shape, team, 0, team.channels, finish);
  } else {
    const double none[BACKWARD_SUMS] = {};
    for (int slot = threadIdx.x; slot < team.channels; slot += THREADS) finish(slot, none);
  }
  if (!gx) return;
  __syncthreads();
  Affine affine[LANES];
  Gradient gradient[LANES];
  double beta = 0;
  if (walk.count > 0) {
    for (int j = 0; j < LANES; ++j) {
      affine[j] = affines[walk.slot(shape, j)];
      gradient[j] = all_gradients[walk.slot(shape, j)];
    }
    if (MASKED) beta = of.bias.at(team.first + walk.slot(shape, 0), 0);
  }
  visit<BACKWARD_DEPTH, false>(
      walk, [&](long long at, long long, int) { return load_backward(g, x, out, at, LAST); },
      [&](long long at, long long place, int, const LoadedBackward& loaded) {
        double often = mask.at(shape, team.group, place);
        const Pack* by = out ? &loaded.out : nullptr;
        Pack passed = gated(loaded.g, loaded.x, by, affine, often > 0, beta);
        store<E, VECTOR>(gx, at, gradients(passed, loaded.x, affine, gradient, often));
      });
}
