// Convolution of few channels, as a product of matrices of which one is never in memory.
//
// The forward pass and the gradient of the images are the same sum,
//
//     y[p, o] = Σ_t  x[p + t] weight[t, o]      p: a pixel of y,  t = (channel, i, j): a *tap*
//
// with the roles of the images exchanged. A block makes TILE = 32 PIXELS pixels of OUTPUTS WARPS
// channels. In each warp the lanes stand for pixels and the warp for OUTPUTS channels, so that all
// lanes need the same weights, one word that is sent to all, and neighbours in memory are read and
// written by neighbours. A thread has PIXELS x OUTPUTS sums in registers: each number that it takes
// from shared memory is used four or eight times.
//
// Shared memory: the taps, worked out once for the block: how far each is from where a pixel's
// window begins; and twice DEPTH taps of all pixels and weights, one set being used while the
// next is on its way. There is no im2col in memory; each x is read KH KW times, from the cache.
//
// The gradient of the weights is the sum over the pixels, of which there are far more than there are
// weights. So the pixels are cut into *shares*, and a block makes a tile of weights (lanes: taps,
// warp: channels of y) from one share, 32 pixels at a time in shared memory. Its sums go into memory
// of their own, and a second launch adds the shares up in float64, in their order: no atomics, the
// same bits every time.
//
// All products are true float32 (or float64), added up in that, by fma. An infinite weight makes NaN
// where the window reaches beyond the image: what is there counts as 0.
//
// To be defined: ELEMENT (float or double), WARPS of a block, OUTPUTS (4 or 8), PIXELS; TAPS of a
// thread in the gradient of the weights; STRIDED: x has an entry for every `apart` of what the sums
// speak of, as the gradient of the images has where the convolution steps by more than one.

#include "common.cuh"

typedef ELEMENT E;
typedef Vector<E, 4> Four;

constexpr int THREADS = 32 * WARPS;
constexpr int TILE = 32 * PIXELS;
constexpr int CHANNELS = OUTPUTS * WARPS;  // of y in a block
constexpr int DEPTH = 8;
constexpr int TAP_TILE = 32 * TAPS;
// A row more than it takes, so that the lanes' stores to a column go to different banks; the weights
// are read in fours, which must stay aligned.
constexpr int TAP_ROW = TAP_TILE + 1, CHANNEL_ROW = CHANNELS + 4;

// Images (batch, channels, rows, columns), in either layout: the distances in memory.
struct Images {
  int channels, rows, columns;
  int channel, row, column;

  __device__ Images(long long channels, long long rows, long long columns, long long last)
      : channels((int)channels), rows((int)rows), columns((int)columns) {
    channel = last ? 1 : this->rows * this->columns;
    column = last ? this->channels : 1;
    row = this->columns * column;
  }
  __device__ long long image() const { return (long long)channels * rows * columns; }
  __device__ long long pixels() const { return (long long)rows * columns; }
};

// From pixel (row, column) of y, tap (i, j) is at (row step + origin + i tap, ...) of x.
struct Reach {
  int high, wide;
  int step_row, step_column, origin_row, origin_column, tap_row, tap_column;
  int apart_row, apart_column;
};

struct Tap {
  int offset, row, column, weight;  // in memory from the window's beginning; in x; in `weight`

  // weight_in: from one channel of x to the next among the weights
  __device__ Tap(int number, const Images& x, const Reach& reach, int weight_in, bool last) {
    int window = reach.high * reach.wide, channel, place;
    if (last) {  // channels first, as they lie together in memory
      place = number / x.channels;
      channel = number - place * x.channels;
    } else {
      channel = number / window;
      place = number - channel * window;
    }
    int i = place / reach.wide, j = place - i * reach.wide;
    row = i * reach.tap_row;
    column = j * reach.tap_column;
    offset = channel * x.channel + (STRIDED ? 0 : row * x.row + column * x.column);
    weight = channel * weight_in + place;
  }
};

// Where in x the window of a pixel of y begins.
struct Window {
  const E* image;  // null for a pixel that is not there
  int row, column, offset;

  __device__ __forceinline__ Window() : image(nullptr), row(0), column(0), offset(0) {}
  __device__ __forceinline__ Window(const E* x, long long image_number, int r, int c,
                                    const Images& images, const Reach& reach) {
    image = x + image_number * images.image();
    row = r * reach.step_row + reach.origin_row;
    column = c * reach.step_column + reach.origin_column;
    offset = STRIDED ? 0 : row * images.row + column * images.column;
  }
  __device__ __forceinline__ E at(const Tap& tap, const Images& images, const Reach& reach) const {
    int r = row + tap.row, c = column + tap.column, from = offset + tap.offset;
    if (STRIDED) {
      if (r < 0 || c < 0) return 0;
      int quotient_row = r / reach.apart_row, quotient_column = c / reach.apart_column;
      if (quotient_row * reach.apart_row != r || quotient_column * reach.apart_column != c) return 0;
      r = quotient_row;
      c = quotient_column;
      from += r * images.row + c * images.column;
    }
    bool there = image && (unsigned)r < (unsigned)images.rows && (unsigned)c < (unsigned)images.columns;
    return there ? image[from] : 0;
  }
};

__device__ __forceinline__ void multiply_add(E (&sums)[OUTPUTS], E factor, const E* others) {
#pragma unroll
  for (int o = 0; o < OUTPUTS; o += 4) {
    Four four = *(const Four*)__builtin_assume_aligned(others + o, 16);
#pragma unroll
    for (int n = 0; n < 4; ++n) sums[o + n] = fma(factor, four.at[n], sums[o + n]);
  }
}

// The sums of a block; bias may be null. weight_out, weight_in: from one channel of y, and of x, to
// the next among the weights. last: whether channels are the last axis.
extern "C" __global__ void __launch_bounds__(THREADS)
convolve(const E* x, const E* weight, const E* bias, E* y, long long last, long long batch,
         long long x_channels, long long x_rows, long long x_columns, long long y_channels,
         long long y_rows, long long y_columns, long long weight_out, long long weight_in,
         long long high, long long wide, long long step_row, long long step_column,
         long long origin_row, long long origin_column, long long tap_row, long long tap_column,
         long long apart_row, long long apart_column) {
  Images from(x_channels, x_rows, x_columns, last), to(y_channels, y_rows, y_columns, last);
  Reach reach = {(int)high,        (int)wide,          (int)step_row, (int)step_column,
                 (int)origin_row,  (int)origin_column, (int)tap_row,  (int)tap_column,
                 (int)apart_row,   (int)apart_column};
  int taps = from.channels * reach.high * reach.wide;
  E* factors = (E*)dynamic_shared();              // [2][DEPTH][TILE]
  E* weights = factors + 2 * DEPTH * TILE;        // [2][DEPTH][CHANNELS]
  Tap* table = (Tap*)(weights + 2 * DEPTH * CHANNELS);
  int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  for (int t = thread; t < taps; t += THREADS) {
    table[t] = Tap(t, from, reach, (int)weight_in, last);
  }

  int tiles = (to.channels - 1) / CHANNELS + 1;
  int first = blockIdx.x % tiles * CHANNELS;  // of its channels
  long long first_pixel = (long long)(blockIdx.x / tiles) * TILE;
  long long pixels = batch * to.pixels();
  Window windows[PIXELS];
#pragma unroll
  for (int p = 0; p < PIXELS; ++p) {
    long long pixel = first_pixel + 32 * p + lane;
    if (pixel >= pixels) continue;
    long long image = pixel / to.pixels();
    int within = (int)(pixel - image * to.pixels()), row = within / to.columns;
    windows[p] = Window(x, image, row, within - row * to.columns, from, reach);
  }
  __syncthreads();

  constexpr int ROUNDS = (DEPTH - 1) / WARPS + 1;                    // of the warps over DEPTH
  constexpr int WEIGHT_ROUNDS = (DEPTH * CHANNELS - 1) / THREADS + 1;  // of the threads
  E next[ROUNDS][PIXELS], next_weights[WEIGHT_ROUNDS];
  auto fetch = [&](int begin) {
#pragma unroll
    for (int n = 0; n < ROUNDS; ++n) {
      int d = warp + n * WARPS;
      bool there = d < DEPTH && begin + d < taps;
#pragma unroll
      for (int p = 0; p < PIXELS; ++p) {
        next[n][p] = there ? windows[p].at(table[begin + d], from, reach) : 0;
      }
    }
#pragma unroll
    for (int n = 0; n < WEIGHT_ROUNDS; ++n) {
      int k = thread + n * THREADS, d = k % DEPTH, channel = first + k / DEPTH;
      bool there = begin + d < taps && k < DEPTH * CHANNELS && channel < to.channels;
      next_weights[n] = there ? weight[channel * weight_out + table[begin + d].weight] : 0;
    }
  };
  auto keep = [&](int buffer) {
#pragma unroll
    for (int n = 0; n < ROUNDS; ++n) {
      int d = warp + n * WARPS;
      if (d >= DEPTH) break;
#pragma unroll
      for (int p = 0; p < PIXELS; ++p) {
        factors[(buffer * DEPTH + d) * TILE + 32 * p + lane] = next[n][p];
      }
    }
#pragma unroll
    for (int n = 0; n < WEIGHT_ROUNDS; ++n) {
      int k = thread + n * THREADS;
      if (k < DEPTH * CHANNELS) {
        weights[(buffer * DEPTH + k % DEPTH) * CHANNELS + k / DEPTH] = next_weights[n];
      }
    }
  };

  E sums[PIXELS][OUTPUTS] = {};
  fetch(0);
  keep(0);
  __syncthreads();
  for (int begin = 0, buffer = 0; begin < taps; begin += DEPTH, buffer ^= 1) {
    bool more = begin + DEPTH < taps;
    if (more) fetch(begin + DEPTH);
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      const E* row = factors + (buffer * DEPTH + d) * TILE + lane;
      const E* others = weights + (buffer * DEPTH + d) * CHANNELS + warp * OUTPUTS;
#pragma unroll
      for (int p = 0; p < PIXELS; ++p) multiply_add(sums[p], row[32 * p], others);
    }
    if (more) keep(buffer ^ 1);  // that was read before the last barrier
    __syncthreads();
  }

#pragma unroll
  for (int p = 0; p < PIXELS; ++p) {
    long long pixel = first_pixel + 32 * p + lane;
    if (pixel >= pixels) continue;
    long long image = pixel / to.pixels();
    E* out = y + image * to.image() + (pixel - image * to.pixels()) * to.column;
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) {
      int channel = first + warp * OUTPUTS + o;
      if (channel < to.channels) {
        out[(long long)channel * to.channel] = sums[p][o] + (bias ? bias[channel] : 0);
      }
    }
  }
}

// --- the gradient of the weights -----------------------------------------------------------------

// A pixel of y, and the way to the one 32 further on.
struct Pixel {
  long long image;
  int row, column;
  int images_on, rows_on, columns_on;

  __device__ Pixel(long long number, const Images& y) {
    image = number / y.pixels();
    int within = (int)(number - image * y.pixels());
    row = within / y.columns;
    column = within - row * y.columns;
    int pixels = (int)min(y.pixels(), 64LL);  // more than 32 is as good as any
    images_on = 32 / pixels;
    rows_on = 32 % pixels / y.columns;
    columns_on = 32 % pixels % y.columns;
  }
  __device__ __forceinline__ void next(const Images& y) {
    column += columns_on;
    row += rows_on;
    image += images_on;
    if (column >= y.columns) {
      column -= y.columns;
      ++row;
    }
    if (row >= y.rows) {
      row -= y.rows;
      ++image;
    }
  }
};

// Σ_p x[p + t] y[p, o] over a share of the pixels, as (shares, channels of y, taps).
extern "C" __global__ void __launch_bounds__(THREADS)
weight_sums(const E* x, const E* y, E* partials, long long last, long long shares, long long batch,
            long long x_channels, long long x_rows, long long x_columns, long long y_channels,
            long long y_rows, long long y_columns, long long high, long long wide,
            long long step_row, long long step_column, long long origin_row,
            long long origin_column, long long tap_row, long long tap_column) {
  Images from(x_channels, x_rows, x_columns, last), to(y_channels, y_rows, y_columns, last);
  Reach reach = {(int)high,        (int)wide,          (int)step_row, (int)step_column,
                 (int)origin_row,  (int)origin_column, (int)tap_row,  (int)tap_column, 1, 1};
  int taps = from.channels * reach.high * reach.wide;
  E* cotangents = (E*)dynamic_shared();                   // [32][CHANNEL_ROW]
  E* factors = cotangents + 32 * CHANNEL_ROW;             // [32][TAP_ROW]
  Tap* table = (Tap*)(factors + 32 * TAP_ROW);            // [TAP_TILE]
  int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  int channel_tiles = (to.channels - 1) / CHANNELS + 1, tap_tiles = (taps - 1) / TAP_TILE + 1;
  int tile = blockIdx.x % (channel_tiles * tap_tiles);
  long long share = blockIdx.x / (channel_tiles * tap_tiles);
  int first = tile % channel_tiles * CHANNELS, first_tap = tile / channel_tiles * TAP_TILE;
  for (int t = thread; t < TAP_TILE; t += THREADS) {
    // In the order of the weights, whichever the layout. Beyond the last, some tap that is there.
    table[t] = Tap(min(first_tap + t, taps - 1), from, reach, reach.high * reach.wide, false);
  }

  long long pixels = batch * to.pixels(), size = ceil_div(ceil_div(pixels, shares), 32) * 32;
  long long end = min(pixels, (share + 1) * size);
  E sums[TAPS][OUTPUTS] = {};
  Pixel pixel(min(share * size + lane, pixels - 1), to);
  for (long long at = share * size; at < end; at += 32, pixel.next(to)) {
    bool there = at + lane < end;
    Window window;
    if (there) window = Window(x, pixel.image, pixel.row, pixel.column, from, reach);
    const E* of_y = y + (there ? pixel.image * to.image() + pixel.row * to.row +
                                     (long long)pixel.column * to.column
                               : 0);
    __syncthreads();  // the last 32 pixels have been used, and the table is there
    for (int t = warp; t < TAP_TILE; t += WARPS) {
      factors[lane * TAP_ROW + t] = window.at(table[t], from, reach);
    }
    for (int o = warp; o < CHANNELS; o += WARPS) {
      bool counts = there && first + o < to.channels;
      cotangents[lane * CHANNEL_ROW + o] = counts ? of_y[(long long)(first + o) * to.channel] : 0;
    }
    __syncthreads();
#pragma unroll 4
    for (int p = 0; p < 32; ++p) {
#pragma unroll
      for (int t = 0; t < TAPS; ++t) {
        multiply_add(sums[t], factors[p * TAP_ROW + 32 * t + lane],
                     cotangents + p * CHANNEL_ROW + warp * OUTPUTS);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < TAPS; ++t) {
    int tap = first_tap + 32 * t + lane;
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) {
      int channel = first + warp * OUTPUTS + o;
      if (tap < taps && channel < to.channels) {
        partials[(share * to.channels + channel) * taps + tap] = sums[t][o];
      }
    }
  }
}

// The shares' sums of each weight, added up: 32 weights a block, and as many threads for each as the
// block has warps.
extern "C" __global__ void __launch_bounds__(1024)
weight_total(const E* partials, E* weight, long long shares, long long count) {
  double* scratch = (double*)dynamic_shared();
  int x = threadIdx.x % 32, y = threadIdx.x / 32, lanes = blockDim.x / 32;
  long long number = (long long)blockIdx.x * 32 + x;
  double sum[1] = {};
  if (number < count) {
#pragma unroll 4
    for (long long share = y; share < shares; share += lanes) {
      sum[0] += partials[share * count + number];
    }
  }
  sum_lanes(sum, scratch, x, y, 32, lanes);
  if (y == 0 && number < count) weight[number] = (E)sum[0];
}
