// Pools: the largest entry or the mean of every window, and what is their transpose.
//
// One thread makes one entry of what is written, from the few entries that it depends on: a pool
// reads the entries of a window, its transpose the windows that an entry lies in. Nothing is added
// to memory that another thread writes, so there are no atomics, and sums have one order, that of
// the places in a window: the bits are those of the generic form. Windows that overlap read entries
// again, which are in the cache by then. No shared memory.
//
// To be defined: ELEMENT, and what images.cuh asks for.

#include "common.cuh"
#include "images.cuh"

typedef ELEMENT E;
typedef Arithmetic<E>::type Real;

// As `Windows` in windows.py, for the two axes of an image.
struct Windows {
  int rows, columns;            // of an image
  int high, wide;               // a window
  int down, across;             // from one window to the next
  int above, left;              // padding
  int out_rows, out_columns;    // how many windows there are
};

__device__ __forceinline__ E rounded(Real value) {
  E element;
  round_to(element, value);
  return element;
}

// Call use(place in the window, entry of x) for the entries of a window that are no padding.
template <class Use>
__device__ __forceinline__ void visit_window(const E* x, const Windows& w, const Place& at,
                                             INDEX width, Use use) {
  int top = at.row * w.down - w.above, first = at.column * w.across - w.left;
  for (int i = max(-top, 0); i < w.high && top + i < w.rows; ++i) {
    for (int j = max(-first, 0); j < w.wide && first + j < w.columns; ++j) {
      INDEX from = offset(at.outer, top + i, first + j, at.inner, w.rows, w.columns, width);
      use(i * w.wide + j, real(x[from]));
    }
  }
}

// Call use(place in the window, window) for the windows that an entry lies in, by growing place.
template <class Use>
__device__ __forceinline__ void visit_covering(const Windows& w, const Place& at, INDEX width,
                                               Use use) {
  int row = at.row + w.above, column = at.column + w.left;
  int last = row / w.down;
  for (int i = row - last * w.down, r = last; i < w.high && r >= 0; i += w.down, --r) {
    if (r >= w.out_rows) continue;
    int end = column / w.across;
    for (int j = column - end * w.across, c = end; j < w.wide && c >= 0; j += w.across, --c) {
      if (c >= w.out_columns) continue;
      use(i * w.wide + j, r, c, offset(at.outer, r, c, at.inner, w.out_rows, w.out_columns, width));
    }
  }
}

// By what the sum of window (row, column) is divided.
__device__ __forceinline__ Real entries(const Windows& w, int row, int column, bool with_padding) {
  if (with_padding) return (Real)(w.high * w.wide);
  int top = row * w.down - w.above, first = column * w.across - w.left;
  int rows = min(top + w.high, w.rows) - max(top, 0);
  return (Real)(rows * (min(first + w.wide, w.columns) - max(first, 0)));
}

#define WINDOWS                                                                                   \
  long long rows, long long columns, long long high, long long wide, long long down,              \
      long long across, long long above, long long left, long long out_rows, long long out_columns
#define GIVEN_WINDOWS                                                                          \
  {(int)rows,   (int)columns, (int)high, (int)wide,     (int)down,                             \
   (int)across, (int)above,   (int)left, (int)out_rows, (int)out_columns}

// The largest entry of every window; the first of equals, and NaN before all numbers. places: which
// it is, wide · row + column.
extern "C" __global__ void __launch_bounds__(THREADS)
max_pool(const E* x, E* y, unsigned char* places, long long count, long long inner, WINDOWS) {
  Windows w = GIVEN_WINDOWS;
  INDEX number;
  if (!mine(number, count)) return;
  Place at(number, w.out_rows, w.out_columns, (INDEX)inner);
  int place = -1;
  Real best = 0;
  visit_window(x, w, at, (INDEX)inner, [&](int here, Real entry) {
    if (place < 0 || entry > best || (isnan(entry) && !isnan(best))) {
      best = entry;
      place = here;
    }
  });
  y[number] = rounded(best);
  places[number] = (unsigned char)place;
}

// The transpose of choosing: each window's y, added to the entry at its place.
extern "C" __global__ void __launch_bounds__(THREADS)
scatter_windows(const E* y, const unsigned char* places, E* x, long long count, long long inner,
                WINDOWS) {
  Windows w = GIVEN_WINDOWS;
  INDEX number;
  if (!mine(number, count)) return;
  Place at(number, w.rows, w.columns, (INDEX)inner);
  Real sum = 0;
  visit_covering(w, at, (INDEX)inner, [&](int here, int, int, INDEX window) {
    if (places[window] == here) sum += real(y[window]);
  });
  x[number] = rounded(sum);
}

// The mean of every window, of its entries or with padding counted as zeros.
extern "C" __global__ void __launch_bounds__(THREADS)
average_pool(const E* x, E* y, long long with_padding, long long count, long long inner, WINDOWS) {
  Windows w = GIVEN_WINDOWS;
  INDEX number;
  if (!mine(number, count)) return;
  Place at(number, w.out_rows, w.out_columns, (INDEX)inner);
  Real sum = 0;
  visit_window(x, w, at, (INDEX)inner, [&](int, Real entry) { sum += entry; });
  y[number] = rounded(sum / entries(w, at.row, at.column, with_padding));
}

// Its transpose: to each entry its share of every window that it lies in.
extern "C" __global__ void __launch_bounds__(THREADS)
spread_windows(const E* y, E* x, long long with_padding, long long count, long long inner,
               WINDOWS) {
  Windows w = GIVEN_WINDOWS;
  INDEX number;
  if (!mine(number, count)) return;
  Place at(number, w.rows, w.columns, (INDEX)inner);
  Real sum = 0;
  visit_covering(w, at, (INDEX)inner, [&](int, int row, int column, INDEX window) {
    sum += real(y[window]) / entries(w, row, column, with_padding);
  });
  x[number] = rounded(sum);
}
