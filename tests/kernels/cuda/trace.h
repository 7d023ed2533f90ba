// Counts what a kernel reads and writes, array by array: put between shim.h and hooks.h.
//
// What the cache of a GPU would serve is counted as well: these are the bytes that the text asks for.

#define UNTRACED __attribute__((no_sanitize_thread))

namespace trace {

struct Range {
  uintptr_t begin, end;
  uint64_t read, written;
};
inline Range ranges[16];
inline int watched;

}  // namespace trace

UNTRACED inline void observe(const void* at, size_t bytes, bool writes, bool) {
  for (int k = 0; k < trace::watched; ++k) {
    trace::Range& range = trace::ranges[k];
    if ((uintptr_t)at - range.begin < range.end - range.begin) {
      (writes ? range.written : range.read) += bytes;
    }
  }
}

extern "C" {

UNTRACED void watch(int watched, const uintptr_t* begins, const uintptr_t* ends) {
  trace::watched = watched;
  for (int k = 0; k < watched; ++k) trace::ranges[k] = {begins[k], ends[k], 0, 0};
}

UNTRACED void counts(uint64_t* found) {
  for (int k = 0; k < trace::watched; ++k) {
    found[2 * k] = trace::ranges[k].read;
    found[2 * k + 1] = trace::ranges[k].written;
  }
}
}
