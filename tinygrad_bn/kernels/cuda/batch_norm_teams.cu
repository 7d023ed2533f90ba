// Batch norm in one launch each way, with what a team of blocks works on kept on the chip.
//
// Two launches read everything twice. Here a team loads its tile once: every thread keeps its vectors
// in shared memory while it sums, the team's blocks wait for each other, and then each applies what
// it has kept and goes on to the team's next tile. What does not fit is read again, the last first,
// so that it is still in the cache if anything is. See batch_norm.cuh for tiles and teams.
//
// All blocks must be resident at once, or they would wait for ever: the launch is cooperative. Four
// blocks of 128 threads to a multiprocessor, which leaves a thread 128 registers and a block a fourth
// of the shared memory: while one waits for its team, the others keep the memory busy. A thread has
// its vectors at stash[k · THREADS + thread]: neighbours in neighbouring banks, and no other thread to
// wait for.

#include "common.cuh"
#include "batch_norm.cuh"

// Wait until all blocks of the team are here; what they wrote before is then seen by __ldcg.
//
// A round adds 2^31 to `arrived`: its highest bit turns over when the last block arrives, and the
// others are 0 again, ready for the next round.
__device__ void team_barrier(unsigned* arrived, const Team& team, int members) {
  __syncthreads();
  if (members > 1 && threadIdx.x == 0) {
    __threadfence();
    unsigned step = team.member == 0 ? 0x80000000u - (unsigned)(members - 1) : 1u;
    unsigned before = atomicAdd(arrived, step);
    while (((before ^ *(volatile unsigned*)arrived) & 0x80000000u) == 0) __nanosleep(32);
    __threadfence();
  }
  __syncthreads();
}

// Have finish(slot, sums) make a Coefficients of each channel's sums, and leave them in `shared`.
//
// Along runs, a tile has one channel and every block adds up its sums for itself. Down columns it has
// many: each block then takes some of them and hands the result to the others by `global`.
template <int N, class Coefficients, class Finish>
__device__ void settle(const double* partials, double* scratch, Coefficients* shared,
                       Coefficients* global, unsigned* arrived, const Shape& shape,
                       const Team& team, Finish finish) {
  if (!COLUMNS) {
    read_partials<N>(partials, scratch, shape, team, 0, team.channels,
                     [&](int slot, const double* sums) { shared[slot] = finish(slot, sums); });
    __syncthreads();
    return;
  }
  int each = (team.channels - 1) / shape.members + 1;
  int begin = min(team.member * each, team.channels), end = min(begin + each, team.channels);
  Coefficients* tile = global + (long long)team.number * shape.tile;
  read_partials<N>(partials, scratch, shape, team, begin, end,
                   [&](int slot, const double* sums) { tile[slot] = finish(slot, sums); });
  team_barrier(arrived, team, shape.members);
  constexpr int WORDS = sizeof(Coefficients) / sizeof(Real);
  for (int k = threadIdx.x; k < team.channels * WORDS; k += THREADS) {
    ((Real*)shared)[k] = __ldcg((const Real*)tile + k);
  }
  __syncthreads();
}

// mean and var are written. arrived: (teams,), zero. coefficients: (tiles, tile) of `Affine`.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
forward_teams(const E* x, const E* residual, E* y, double* partials, void* coefficients,
              unsigned* arrived, double* mean, double* var, const void* weight,
              long long weight_kind, const void* bias, long long bias_kind, double eps,
              long long teams, long long tiles, long long kept, long long rows, long long channels,
              long long inner, long long tile, long long members) {
  Pack* stash = (Pack*)dynamic_shared() + threadIdx.x;
  double* scratch = (double*)((Pack*)dynamic_shared() + (int)kept * THREADS);
  Affine* affines = (Affine*)(scratch + 2 * LANES * THREADS);
  Shape shape(rows, channels, inner, tile, members);
  Mask mask = {};
  Channels of = {{}, {}, {weight, weight_kind}, {bias, bias_kind}, eps};
  int mine = blockIdx.x / shape.members;
  for (int t = mine; t < tiles; t += teams) {
    Team team(shape, t * shape.members + blockIdx.x % shape.members);
    Walk walk(shape, team);
    double shifts[LANES], sums[LANES * 2] = {};
    if (walk.count > 0) {
      for (int j = 0; j < LANES; ++j) {
        shifts[j] = shift(x, mask, shape, team.group, team.first + walk.slot(shape, j));
      }
    }
    visit<FORWARD_DEPTH, false>(
        walk,
        [&](long long at, long long, int k) {
          return load<E, VECTOR>(x, at, k < kept ? LAST : AGAIN);
        },
        [&](long long, long long, int k, const Pack& pack) {
          if (k < kept) stash[k * THREADS] = pack;
          add_moments(sums, pack, shifts, 1);
        });
    write_partials<2>(sums, partials, scratch, shape, team, walk);
    team_barrier(arrived + mine, team, shape.members);
    settle<2>(partials, scratch, affines, (Affine*)coefficients, arrived + mine, shape, team,
              [&](int slot, const double* total) {
                bool writes = COLUMNS || team.member == 0;
                return moments_to_affine(total, x, mask, shape, team, slot, of,
                                         writes ? mean : nullptr, var);
              });
    Affine affine[LANES];
    if (walk.count > 0) {
      for (int j = 0; j < LANES; ++j) affine[j] = affines[walk.slot(shape, j)];
    }
    visit<FORWARD_DEPTH, true>(
        walk,
        [&](long long at, long long, int k) {
          return k < kept ? stash[k * THREADS] : load<E, VECTOR>(x, at);
        },
        [&](long long at, long long, int, const Pack& pack) {
          Pack added;
          if (RELU && residual) added = load<E, VECTOR>(residual, at);
          store<E, VECTOR>(y, at, outputs(pack, residual ? &added : nullptr, affine, true, 0));
        });
  }
}

struct BothCoefficients {
  Affine affine;
  Gradient gradient;
};

// A thread keeps the cotangent of y, behind the gate of RELU, and x. bfloat16 in vectors of eight needs
// a few registers more than 128: there, three blocks share what four have otherwise.
extern "C" __global__ void __launch_bounds__(THREADS, VECTOR == 8 ? 3 : 4)
backward_teams(const E* g, const E* x, const E* out, E* gx, double* partials, void* coefficients,
               unsigned* arrived, const double* mean, const double* var, const void* weight,
               long long weight_kind, const void* bias, long long bias_kind, void* gweight,
               long long gweight_kind, void* gbias, long long gbias_kind, double eps,
               long long teams, long long tiles, long long kept, long long rows,
               long long channels, long long inner, long long tile, long long members) {
  Pack* stash = (Pack*)dynamic_shared() + threadIdx.x;
  double* scratch = (double*)((Pack*)dynamic_shared() + 2 * (int)kept * THREADS);
  BothCoefficients* both = (BothCoefficients*)(scratch + BACKWARD_SUMS * LANES * THREADS);
  Shape shape(rows, channels, inner, tile, members);
  Mask mask = {};
  Channels of = {{mean, 3}, {var, 3}, {weight, weight_kind}, {bias, bias_kind}, eps};
  Cotangents to = {gweight, gweight_kind, gbias, gbias_kind, nullptr, nullptr};
  int mine = blockIdx.x / shape.members;
  for (int t = mine; t < tiles; t += teams) {
    Team team(shape, t * shape.members + blockIdx.x % shape.members);
    Walk walk(shape, team);
    double means[LANES], sums[LANES * BACKWARD_SUMS] = {};
    Affine affine[LANES];
    if (walk.count > 0) {
      for (int j = 0; j < LANES; ++j) {
          int c = team.first + walk.slot(shape, j);
        long long at = team.group * channels + c;
        means[j] = of.mean.at(at, 0);
        if (RELU) affine[j] = of.affine_of(c, at);
      }
    }
    visit<BACKWARD_DEPTH, false>(
        walk,
        [&](long long at, long long, int k) {
          return load_backward(g, x, out, at, k < kept ? LAST : AGAIN);
        },
        [&](long long, long long, int k, const LoadedBackward& loaded) {
          Pack passed =
              gated(loaded.g, loaded.x, out ? &loaded.out : nullptr, affine, true, 0);
          if (k < kept) {
            stash[2 * k * THREADS] = passed;
            stash[(2 * k + 1) * THREADS] = loaded.x;
          }
          add_products(sums, passed, loaded.x, means, true);
        });
    write_partials<BACKWARD_SUMS>(sums, partials, scratch, shape, team, walk);
    team_barrier(arrived + mine, team, shape.members);
    settle<BACKWARD_SUMS>(
        partials, scratch, both, (BothCoefficients*)coefficients, arrived + mine, shape, team,
        [&](int slot, const double* total) {
          int c = team.first + slot;
          BothCoefficients made;
          made.affine = of.affine_of(c, team.group * channels + c);
          made.gradient = products_to_gradient(total, made.affine, mask, shape, team, slot, of,
                                               false, COLUMNS || team.member == 0, to);
          return made;
        });
    Gradient gradient[LANES];
    if (walk.count > 0) {
      for (int j = 0; j < LANES; ++j) {
        affine[j] = both[walk.slot(shape, j)].affine;
        gradient[j] = both[walk.slot(shape, j)].gradient;
      }
    }
    visit<BACKWARD_DEPTH, true>(
        walk,
        [&](long long at, long long, int k) {
          LoadedBackward loaded;
          if (k < kept) {
            loaded.g = stash[2 * k * THREADS];
            loaded.x = stash[(2 * k + 1) * THREADS];
          } else {
            loaded = load_backward(g, x, out, at, LAST);
            const Pack* by = out ? &loaded.out : nullptr;
            loaded.g = gated(loaded.g, loaded.x, by, affine, true, 0);
          }
          return loaded;
        },
        [&](long long at, long long, int, const LoadedBackward& loaded) {
          store<E, VECTOR>(gx, at, gradients(loaded.g, loaded.x, affine, gradient, 1));
        });
  }
}
