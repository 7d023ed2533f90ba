// The products of cuBLAS that CuPy and `kernels/cuda/blas.py` ask for, as loops.

#include <cstring>
#include <vector>

#include "device.h"

using namespace emulated;

namespace {

enum Status { OK = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, EXECUTION_FAILED = 13 };
enum Type { FLOAT = 0, DOUBLE = 1, HALF = 2, BFLOAT = 14 };
enum Compute { FAST_TF32 = 77 };

struct Handle {
  void* stream = nullptr;
  int device = current_device, pointer_mode = 0, math_mode = 0;
};

struct Matrices {
  const char* at;
  Type type;
  bool transposed;
  long long leading, stride;
};

size_t size_of(Type type) { return type == DOUBLE ? 8 : type == FLOAT ? 4 : 2; }

double element(const char* at, Type type) {
  if (type == DOUBLE) return *reinterpret_cast<const double*>(at);
  if (type == FLOAT) return *reinterpret_cast<const float*>(at);
  if (type == HALF) return *reinterpret_cast<const _Float16*>(at);
  uint32_t bits = uint32_t(*reinterpret_cast<const uint16_t*>(at)) << 16;
  float value;
  return memcpy(&value, &bits, 4), value;
}

void set_element(char* at, Type type, double value) {
  if (type == DOUBLE) *reinterpret_cast<double*>(at) = value;
  else if (type == FLOAT) *reinterpret_cast<float*>(at) = float(value);
  else if (type == HALF) *reinterpret_cast<_Float16*>(at) = _Float16(float(value));
  else {
    float narrow = float(value);
    uint32_t bits;
    memcpy(&bits, &narrow, 4);
    bits = narrow != narrow ? 0x7FFF0000 : bits + 0x7FFF + (bits >> 16 & 1);
    *reinterpret_cast<uint16_t*>(at) = bits >> 16;
  }
}

float as_tf32(float value) {  // a significand of 11 bits
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value == value) bits = (bits + 0x0FFF + (bits >> 13 & 1)) & ~0x1FFFu;
  return memcpy(&value, &bits, 4), value;
}

// One matrix, its columns one behind the other.
template <class T>
std::vector<T> columns_of(const Matrices& from, long long rows, long long columns, bool tf32) {
  std::vector<T> dense(rows * columns);
  for (long long c = 0; c < columns; ++c)
    for (long long r = 0; r < rows; ++r) {
      long long place = from.transposed ? c + r * from.leading : r + c * from.leading;
      T value = T(element(from.at + place * size_of(from.type), from.type));
      dense[r + c * rows] = tf32 ? T(as_tf32(float(value))) : value;
    }
  return dense;
}

template <class T>
void multiply(long long m, long long n, long long k, T alpha, const Matrices& a, const Matrices& b,
              T beta, const Matrices& c, bool tf32) {
  std::vector<T> left = columns_of<T>(a, m, k, tf32), right = columns_of<T>(b, k, n, tf32), sum(m);
  char* out = const_cast<char*>(c.at);
  for (long long j = 0; j < n; ++j) {
    std::fill(sum.begin(), sum.end(), T(0));
    for (long long i = 0; i < k; ++i) {
      T factor = right[i + j * k];
      for (long long r = 0; r < m; ++r) sum[r] += left[r + i * m] * factor;
    }
    for (long long r = 0; r < m; ++r) {
      char* at = out + (r + j * c.leading) * size_of(c.type);
      T before = beta == 0 ? T(0) : T(beta * T(element(at, c.type)));
      set_element(at, c.type, alpha * sum[r] + before);
    }
  }
}

// All of a cuBLAS call's matrices are in memory of the handle's device.
bool reaches(const Matrices& matrices, long long rows, long long columns, long long count,
             int device) {
  if (matrices.transposed) std::swap(rows, columns);
  if (matrices.leading < std::max(1LL, rows)) return false;
  const Allocation* found = allocation_of(matrices.at);
  long long entries = (count - 1) * matrices.stride + (columns - 1) * matrices.leading + rows;
  return found && found->device == device &&
         uintptr_t(matrices.at) + entries * size_of(matrices.type) <= found->begin + found->size;
}

int product(Handle* handle, long long m, long long n, long long k, const void* alpha, Matrices a,
            Matrices b, const void* beta, Matrices c, long long count, bool wide, bool tf32) {
  Guard guard(lock);
  if (!handle) return NOT_INITIALIZED;
  Stream* stream = stream_of(handle->stream);
  if (m == 0 || n == 0 || count == 0) return OK;
  if (handle->pointer_mode || m < 0 || n < 0 || k < 0 || count < 0) return INVALID_VALUE;
  if (k > 0 && (!reaches(a, m, k, count, handle->device) || !reaches(b, k, n, count, handle->device)))
    return INVALID_VALUE;
  if (!reaches(c, m, n, count, handle->device)) return INVALID_VALUE;
  if (!stream || stream->device != handle->device) return EXECUTION_FAILED;
  double by = wide ? *static_cast<const double*>(alpha) : *static_cast<const float*>(alpha);
  double add = wide ? *static_cast<const double*>(beta) : *static_cast<const float*>(beta);
  cudaError_t error = enqueue(stream, [=] {
    for (long long i = 0; i < count; ++i) {
      auto part = [i](Matrices all) {
        all.at += i * all.stride * size_of(all.type);
        return all;
      };
      if (wide) multiply<double>(m, n, k, by, part(a), part(b), add, part(c), false);
      else multiply<float>(m, n, k, float(by), part(a), part(b), float(add), part(c), tf32);
    }
  });
  return error ? EXECUTION_FAILED : OK;
}

// The same for matrices at addresses that stand in memory of the device.
template <class T>
int batched(Handle* handle, int trans_a, int trans_b, int m, int n, int k, const T* alpha,
            const T* const* a, int lda, const T* const* b, int ldb, const T* beta, T* const* c,
            int ldc, int count) {
  Guard guard(lock);
  Stream* stream = stream_of(handle->stream);
  if (!stream || stream->device != handle->device) return EXECUTION_FAILED;
  Type type = sizeof(T) == 8 ? DOUBLE : FLOAT;
  T by = *alpha, add = *beta;
  cudaError_t error = enqueue(stream, [=] {
    auto seen = [&](const void* at, int transposed, int leading) {
      return Matrices{static_cast<const char*>(at), type, transposed != 0, leading, 0};
    };
    for (int i = 0; i < count; ++i)
      multiply<T>(m, n, k, by, seen(a[i], trans_a, lda), seen(b[i], trans_b, ldb), add,
                  seen(c[i], 0, ldc), false);
  });
  return error ? EXECUTION_FAILED : OK;
}

}  // namespace

extern "C" {

int cublasCreate_v2(Handle** handle) { return *handle = new Handle, OK; }
int cublasDestroy_v2(Handle* handle) { return delete handle, OK; }
int cublasSetStream_v2(Handle* handle, void* stream) { return handle->stream = stream, OK; }
int cublasGetStream_v2(Handle* handle, void** stream) { return *stream = handle->stream, OK; }
int cublasSetWorkspace_v2(Handle* handle, void* at, size_t size) {
  Guard guard(lock);
  const Allocation* found = allocation_of(at);
  bool fits = found && found->device == handle->device &&
              uintptr_t(at) + size <= found->begin + found->size && uintptr_t(at) % 256 == 0;
  return fits ? OK : INVALID_VALUE;
}
int cublasSetMathMode(Handle* handle, int mode) { return handle->math_mode = mode, OK; }
int cublasGetMathMode(Handle* handle, int* mode) { return *mode = handle->math_mode, OK; }
int cublasSetPointerMode_v2(Handle* handle, int mode) { return handle->pointer_mode = mode, OK; }
int cublasGetPointerMode_v2(Handle* handle, int* mode) { return *mode = handle->pointer_mode, OK; }
int cublasGetVersion_v2(Handle*, int* version) { return *version = 130200, OK; }

int cublasGemmStridedBatchedEx_64(Handle* handle, int trans_a, int trans_b, int64_t m, int64_t n,
                                  int64_t k, const void* alpha, const void* a, Type type_a,
                                  int64_t lda, long long stride_a, const void* b, Type type_b,
                                  int64_t ldb, long long stride_b, const void* beta, void* c,
                                  Type type_c, int64_t ldc, long long stride_c, int64_t count,
                                  int compute, int) {
  auto at = [](const void* pointer) { return static_cast<const char*>(pointer); };
  return product(handle, m, n, k, alpha, {at(a), type_a, trans_a != 0, lda, stride_a},
                 {at(b), type_b, trans_b != 0, ldb, stride_b}, beta,
                 {at(c), type_c, false, ldc, stride_c}, count, type_c == DOUBLE,
                 compute == FAST_TF32);
}
int cublasGemmStridedBatchedEx(Handle* handle, int trans_a, int trans_b, int m, int n, int k,
                               const void* alpha, const void* a, Type type_a, int lda,
                               long long stride_a, const void* b, Type type_b, int ldb,
                               long long stride_b, const void* beta, void* c, Type type_c, int ldc,
                               long long stride_c, int count, int compute, int algorithm) {
  return cublasGemmStridedBatchedEx_64(handle, trans_a, trans_b, m, n, k, alpha, a, type_a, lda,
                                       stride_a, b, type_b, ldb, stride_b, beta, c, type_c, ldc,
                                       stride_c, count, compute, algorithm);
}
int cublasGemmEx(Handle* handle, int trans_a, int trans_b, int m, int n, int k, const void* alpha,
                 const void* a, Type type_a, int lda, const void* b, Type type_b, int ldb,
                 const void* beta, void* c, Type type_c, int ldc, int compute, int algorithm) {
  return cublasGemmStridedBatchedEx_64(handle, trans_a, trans_b, m, n, k, alpha, a, type_a, lda, 0,
                                       b, type_b, ldb, 0, beta, c, type_c, ldc, 0, 1, compute,
                                       algorithm);
}

int cublasSgemmBatched(Handle* handle, int trans_a, int trans_b, int m, int n, int k,
                       const float* alpha, const float* const* a, int lda, const float* const* b,
                       int ldb, const float* beta, float* const* c, int ldc, int count) {
  return batched(handle, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc, count);
}
int cublasDgemmBatched(Handle* handle, int trans_a, int trans_b, int m, int n, int k,
                       const double* alpha, const double* const* a, int lda,
                       const double* const* b, int ldb, const double* beta, double* const* c,
                       int ldc, int count) {
  return batched(handle, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc, count);
}

}  // extern "C"
