// Running statistics of all channels moved towards a batch's, mean and variance in one launch.
//
// A thread has a channel. mean, var: (groups, channels), averaged over the groups; factor: what makes
// the variance unbiased, or 1. momentum: a value at an address, or the number.
//
// To be defined: THREADS of a block.

#include "common.cuh"

// r ← (1 - momentum) r + momentum value, within the dtype of r: its largest number, not infinity.
__device__ void move(void* running, long long kind, double most, long long at, double value,
                     double momentum) {
  double old = parameter(running, kind, at);
  double moved = (1 - momentum) * old + momentum * value;
  if (moved > most) moved = most;  // NaN passes
  if (moved < -most) moved = -most;
  set_parameter(running, kind, at, moved);
}

extern "C" __global__ void __launch_bounds__(THREADS)
move_statistics(const double* mean, const double* var, void* running_mean, long long mean_kind,
                double most_mean, void* running_var, long long var_kind, double most_var,
                const void* momentum_at, long long momentum_kind, double momentum, double factor,
                long long groups, long long channels) {
  long long c = (long long)blockIdx.x * THREADS + threadIdx.x;
  if (c >= channels) return;
  double by = momentum_at ? parameter(momentum_at, momentum_kind, 0) : momentum;
  double mean_sum = 0, var_sum = 0;
  for (long long group = 0; group < groups; ++group) {
    mean_sum += mean[group * channels + c];
    var_sum += var[group * channels + c] * factor;
  }
  move(running_mean, mean_kind, most_mean, c, mean_sum / (double)groups, by);
  move(running_var, var_kind, most_var, c, var_sum / (double)groups, by);
}
