// Finds accesses to one byte by two threads, one of them a write, that nothing puts in an order: put
// between shim.h and hooks.h. In whatever order the shim happens to run them, they are found.
//
// Within a block, order comes from __syncthreads alone: a block's *round* counts those that are past.
// (No kernel relies on the order within a warp.) Between blocks it comes from a thread that calls
// __threadfence and then an atomic operation, which releases what its block did in rounds before, and
// one that reads that address as volatile, whose block has it from its next round on. `seen[b]` says
// of how many rounds of block b that is so. Data from another block must be read by __ldcg: the cache
// of a multiprocessor may have what was there before.
//
// Watched are the arrays that a launch is given, and dynamic shared memory. What is not seen: a struct
// that the compiler has a function write right to where it belongs. So something may be overlooked,
// and nothing is reported that is in order.

#include <map>
#include <string>

#define UNTRACED __attribute__((no_sanitize_thread))

namespace races {

struct Access {
  int block = -1;
  unsigned thread = 0, round = 0;
};
struct Byte {
  Access wrote, read, read_before;  // by the last thread that read it, and by another one
};
struct Range {
  uintptr_t begin = 0, end = 0;
  std::vector<Byte> bytes;
  int block = -1;  // whose shared memory it is
};
typedef std::vector<unsigned> Rounds;  // of each block
struct Order {
  Rounds seen, coming;
  unsigned coming_after = 0, fenced = ~0u;
};

inline std::vector<Range> arrays;
inline std::map<shim::Block*, Range> shared;
inline std::vector<Order> orders;
inline std::map<void*, Rounds> released;
inline std::string found;
inline bool busy;  // what is used here, such as a map, calls `observe` itself

struct Busy {
  UNTRACED Busy() { busy = true; }
  UNTRACED ~Busy() { busy = false; }
};

UNTRACED inline bool in_kernel() {
  if (busy || !shim::current || !shim::current->fiber) return false;
  return (uintptr_t)__builtin_frame_address(0) - (uintptr_t)shim::current->fiber->stack < shim::STACK;
}

UNTRACED inline void merge(Rounds& into, const Rounds& from) {
  for (size_t b = 0; b < into.size(); ++b) {
    if (from[b] > into[b]) into[b] = from[b];
  }
}

UNTRACED inline Order& order_of(const shim::Block& block) {
  size_t blocks = (size_t)shim::grid_size.x;
  if (orders.size() != blocks) orders.assign(blocks, {Rounds(blocks), Rounds(blocks)});
  Order& order = orders[block.index.x];
  if (block.rounds > order.coming_after) merge(order.seen, order.coming);
  return order;
}

UNTRACED inline Range* range_of(uintptr_t at, shim::Block& block) {
  Range& own = shared[&block];
  if (own.block != (int)block.index.x) {  // blocks that are through make room for others
    own.block = (int)block.index.x;
    own.begin = (uintptr_t)block.shared.data();
    own.end = own.begin + block.shared.size();
    own.bytes.assign(block.shared.size(), {});
  }
  if (at - own.begin < own.end - own.begin) return &own;
  for (Range& range : arrays) {
    if (at - range.begin < range.end - range.begin) return &range;
  }
  return nullptr;
}

UNTRACED inline bool ordered(const Access& before, const Access& now, const Order& order) {
  if (before.block < 0) return true;
  if (before.block != now.block) return order.seen[before.block] > before.round;
  return before.thread == now.thread || before.round < now.round;
}

UNTRACED inline void report(const char* what, const Range& range, uintptr_t at, const Access& a,
                            const Access& b) {
  if (!found.empty()) return;
  bool is_array = !arrays.empty() && &range >= &arrays[0] && &range <= &arrays.back();
  found = std::string(what) + " byte " + std::to_string(at - range.begin) + " of " +
          (is_array ? "array " + std::to_string(&range - &arrays[0]) : "shared memory");
  for (const Access* access : {&a, &b}) {
    found += ", block " + std::to_string(access->block) + " thread " +
             std::to_string(access->thread) + " round " + std::to_string(access->round);
  }
}

}  // namespace races

UNTRACED inline void observe(void* at, size_t bytes, bool writes, bool is_volatile) {
  using namespace races;
  if (shim::atomic || !in_kernel()) return;
  Busy now_busy;
  shim::Block& block = *shim::current->block;
  Order& order = order_of(block);
  if (is_volatile) {
    if (released.count(at)) {
      merge(order.coming, released[at]);
      order.coming_after = block.rounds;
    }
    return;
  }
  Range* range = range_of((uintptr_t)at, block);
  if (!range) return;
  Access now = {(int)block.index.x, shim::current->number, block.rounds};
  for (uintptr_t k = (uintptr_t)at; k < (uintptr_t)at + bytes && k < range->end; ++k) {
    Byte& byte = range->bytes[k - range->begin];
    if (!ordered(byte.wrote, now, order)) report("unordered", *range, k, byte.wrote, now);
    if (writes) {
      for (const Access& read : {byte.read, byte.read_before}) {
        if (!ordered(read, now, order)) report("unordered", *range, k, read, now);
      }
      byte = {now, {}, {}};
      continue;
    }
    if (byte.wrote.block >= 0 && byte.wrote.block != now.block && !shim::from_shared_cache) {
      report("not read by __ldcg:", *range, k, byte.wrote, now);
    }
    if (byte.read.block != now.block || byte.read.thread != now.thread) byte.read_before = byte.read;
    byte.read = now;
  }
}

UNTRACED inline void observe_fence() {
  races::Busy now_busy;
  races::order_of(*shim::current->block).fenced = shim::current->block->rounds;
}

UNTRACED inline void observe_atomic(void* at) {
  using namespace races;
  Busy now_busy;
  const shim::Block& block = *shim::current->block;
  Order& order = order_of(block);
  Rounds& rounds = released[at];
  rounds.resize(shim::grid_size.x);
  if (order.fenced != block.rounds) return;
  merge(rounds, order.seen);
  rounds[block.index.x] = std::max(rounds[block.index.x], block.rounds);
}

extern "C" {

UNTRACED void watch(int watched, const uintptr_t* begins, const uintptr_t* ends) {
  shim::on_fence = observe_fence;
  shim::on_atomic = observe_atomic;
  races::arrays.clear();
  races::shared.clear();
  races::orders.clear();
  races::released.clear();
  races::found.clear();
  for (int k = 0; k < watched; ++k) {
    races::arrays.push_back({begins[k], ends[k], std::vector<races::Byte>(ends[k] - begins[k])});
  }
}

UNTRACED const char* race() { return races::found.c_str(); }
}
