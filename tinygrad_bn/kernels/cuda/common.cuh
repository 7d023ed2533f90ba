// What the kernels share: element types, vectors of 16 bytes, sums over a block.
//
// No header is included: NVRTC needs none for this, and finds them in other places on every system.

// --- element types -------------------------------------------------------------------------------

struct Half {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

// What arithmetic on an element is done in.
template <class E>
struct Arithmetic {
  typedef float type;
};
template <>
struct Arithmetic<double> {
  typedef double type;
};

template <class To, class From>
__device__ __forceinline__ To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

__device__ __forceinline__ float real(float value) { return value; }
__device__ __forceinline__ double real(double value) { return value; }
__device__ __forceinline__ float real(BFloat16 value) {
  return bit_cast<float>((unsigned)value.bits << 16);
}
__device__ __forceinline__ float real(Half value) {
#ifdef __CUDACC__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  return bit_cast<_Float16>(value.bits);
#endif
}

// `value` rounded to the nearest element, ties to even.
__device__ __forceinline__ void round_to(float& element, float value) { element = value; }
__device__ __forceinline__ void round_to(double& element, double value) { element = value; }
__device__ __forceinline__ void round_to(BFloat16& element, float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(element.bits) : "f"(value));
#else
  unsigned bits = bit_cast<unsigned>(value);
  // A NaN stays one: rounding could carry its bits into those of an infinity.
  element.bits = isnan(value) ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
#endif
}
__device__ __forceinline__ void round_to(Half& element, float value) {
#ifdef __CUDACC__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(element.bits) : "f"(value));
#else
  element.bits = bit_cast<unsigned short>((_Float16)value);
#endif
}

// --- vectors -------------------------------------------------------------------------------------

// N elements that are moved at once.
template <class E, int N>
struct Vector {
  E at[N];
};

// Whether data is read again soon. What is not should not push anything else out of the cache.
enum Use { AGAIN, LAST };

template <class V, class Word>
__device__ __forceinline__ V load_as(const void* from, long long index, Use use) {
  const Word* at = (const Word*)from + index;
  return bit_cast<V>(use == LAST ? __ldcs(at) : *at);
}
template <class V, class Word>
__device__ __forceinline__ void store_as(void* to, long long index, V value) {
  __stcs((Word*)to + index, bit_cast<Word>(value));
}

template <class E, int N>
__device__ __forceinline__ Vector<E, N> load(const E* from, long long index, Use use = LAST) {
  typedef Vector<E, N> V;
  if constexpr (sizeof(V) == 16) return load_as<V, uint4>(from, index, use);
  else if constexpr (sizeof(V) == 8) return load_as<V, unsigned long long>(from, index, use);
  else if constexpr (sizeof(V) == 4) return load_as<V, unsigned>(from, index, use);
  else return load_as<V, unsigned short>(from, index, use);
}
template <class E, int N>
__device__ __forceinline__ void store(E* to, long long index, Vector<E, N> value) {
  typedef Vector<E, N> V;
  if constexpr (sizeof(V) == 16) store_as<V, uint4>(to, index, value);
  else if constexpr (sizeof(V) == 8) store_as<V, unsigned long long>(to, index, value);
  else if constexpr (sizeof(V) == 4) store_as<V, unsigned>(to, index, value);
  else store_as<V, unsigned short>(to, index, value);
}

// --- vectors of parameters -----------------------------------------------------------------------

// A value per channel may have any dtype: which, by number, is `KINDS` in launch.py.
__device__ __forceinline__ double parameter(const void* from, long long kind, long long index) {
  switch (kind) {
    case 0: return ((const float*)from)[index];
    case 1: return real(((const Half*)from)[index]);
    case 2: return real(((const BFloat16*)from)[index]);
    default: return ((const double*)from)[index];
  }
}
__device__ __forceinline__ void set_parameter(void* to, long long kind, long long index,
                                              double value) {
  switch (kind) {
    case 0: ((float*)to)[index] = (float)value; break;
    case 1: round_to(((Half*)to)[index], (float)value); break;
    case 2: round_to(((BFloat16*)to)[index], (float)value); break;
    default: ((double*)to)[index] = value;
  }
}

// --- a block's threads together ------------------------------------------------------------------

// The memory that a launch asks for by its number of bytes.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
#else
  return SHIM_DYNAMIC_SHARED;
#endif
}

__device__ __forceinline__ long long ceil_div(long long a, long long b) { return (a + b - 1) / b; }

// Sum `value` over the threads of equal x, in an order that depends on the launch alone. Thread
// (x, y) of `width` times `lanes` has N values; threads with y >= lanes have none. Afterwards
// scratch[x * N + n] holds the sums, and every thread may read them; thread (x, 0) has them too.
//
// scratch: room for threads * N; all threads call this, and have no use for what is in it.
template <int N>
__device__ void sum_lanes(double (&value)[N], double* scratch, int x, int y, int width, int lanes) {
  if (width == 1) {  // whole warps of lanes: each sums up by itself first
    for (int by = 16; by > 0; by /= 2) {
      for (int n = 0; n < N; ++n) value[n] += __shfl_down_sync(~0u, value[n], by);
    }
    lanes /= 32;
    y = y % 32 == 0 ? y / 32 : lanes;
  }
  __syncthreads();
  if (y < lanes) {
    for (int n = 0; n < N; ++n) scratch[(y * width + x) * N + n] = value[n];
  }
  while (lanes > 1) {
    int half = (lanes + 1) / 2;
    __syncthreads();
    if (y < lanes - half) {
      for (int n = 0; n < N; ++n) {
        value[n] += scratch[((y + half) * width + x) * N + n];
        scratch[(y * width + x) * N + n] = value[n];
      }
    }
    lanes = half;
  }
  __syncthreads();
}
