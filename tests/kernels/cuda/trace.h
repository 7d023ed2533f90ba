// Counts what a kernel reads and writes, array by array: put between shim.h and the kernel's text.
//
// g++ -fsanitize=thread calls a function at every access to memory that is not a thread's own. These
// are such functions; the sanitizer's library itself takes no part. What the cache of a GPU would
// serve is counted as well: these are the bytes that the text asks for.

namespace trace {

struct Range {
  uintptr_t begin, end;
  uint64_t read, written;
};
inline Range ranges[16];
inline int watched;

#define UNTRACED __attribute__((no_sanitize_thread))

UNTRACED inline void note(const void* at, size_t bytes, bool writes) {
  for (int k = 0; k < watched; ++k) {
    Range& range = ranges[k];
    if ((uintptr_t)at - range.begin < range.end - range.begin) {
      (writes ? range.written : range.read) += bytes;
    }
  }
}

}  // namespace trace

extern "C" {

UNTRACED void trace_watch(int watched, const uintptr_t* begins, const uintptr_t* ends) {
  trace::watched = watched;
  for (int k = 0; k < watched; ++k) trace::ranges[k] = {begins[k], ends[k], 0, 0};
}

UNTRACED void trace_counts(uint64_t* counts) {
  for (int k = 0; k < trace::watched; ++k) {
    counts[2 * k] = trace::ranges[k].read;
    counts[2 * k + 1] = trace::ranges[k].written;
  }
}

#define TRACE(NAME, BYTES, WRITES) \
  UNTRACED void NAME(void* at) { trace::note(at, BYTES, WRITES); }
#define TRACE_SIZE(BYTES)                               \
  TRACE(__tsan_read##BYTES, BYTES, false)               \
  TRACE(__tsan_write##BYTES, BYTES, true)               \
  TRACE(__tsan_unaligned_read##BYTES, BYTES, false)     \
  TRACE(__tsan_unaligned_write##BYTES, BYTES, true)     \
  TRACE(__tsan_volatile_read##BYTES, BYTES, false)      \
  TRACE(__tsan_volatile_write##BYTES, BYTES, true)
TRACE_SIZE(1)
TRACE_SIZE(2)
TRACE_SIZE(4)
TRACE_SIZE(8)
TRACE_SIZE(16)
UNTRACED void __tsan_read_range(void* at, size_t bytes) { trace::note(at, bytes, false); }
UNTRACED void __tsan_write_range(void* at, size_t bytes) { trace::note(at, bytes, true); }
UNTRACED void __tsan_vptr_read(void*) {}
UNTRACED void __tsan_vptr_update(void*, void*) {}
UNTRACED void __tsan_func_entry(void*) {}
UNTRACED void __tsan_func_exit() {}
UNTRACED void __tsan_init() {}
}
