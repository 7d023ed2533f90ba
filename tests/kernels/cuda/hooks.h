// What g++ -fsanitize=thread calls at every access to memory that may be shared: `observe`, which the
// text before this one defines. The sanitizer's own library takes no part.

extern "C" {

#define HOOK(NAME, BYTES, WRITES, VOLATILE) \
  UNTRACED void NAME(void* at) { observe(at, BYTES, WRITES, VOLATILE); }
#define HOOKS(BYTES)                                     \
  HOOK(__tsan_read##BYTES, BYTES, false, false)            \
  HOOK(__tsan_write##BYTES, BYTES, true, false)            \
  HOOK(__tsan_unaligned_read##BYTES, BYTES, false, false)  \
  HOOK(__tsan_unaligned_write##BYTES, BYTES, true, false)  \
  HOOK(__tsan_volatile_read##BYTES, BYTES, false, true)    \
  HOOK(__tsan_volatile_write##BYTES, BYTES, true, true)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
UNTRACED void __tsan_read_range(void* at, size_t bytes) { observe(at, bytes, false, false); }
UNTRACED void __tsan_write_range(void* at, size_t bytes) { observe(at, bytes, true, false); }
UNTRACED void __tsan_vptr_read(void*) {}
UNTRACED void __tsan_vptr_update(void*, void*) {}
UNTRACED void __tsan_func_entry(void*) {}
UNTRACED void __tsan_func_exit() {}
UNTRACED void __tsan_init() {}
}
