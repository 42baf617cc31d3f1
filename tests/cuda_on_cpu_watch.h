// What cuda_on_cpu.h sees of memory when it is compiled with -fsanitize=thread but without that sanitizer's library:
// GCC then calls the __tsan_* functions at the end for every access, and they are ours. They find two threads of a
// launch that touch the same bytes with no barrier between them, one of them writing and not both by atomics. They
// count the 32-byte sectors of global memory that launches touch, in all and by requests: a request is what the threads
// of a warp do when they come to an instruction for the first, second, third time. Without the flag nothing is watched.
#pragma once
#ifndef __SANITIZE_THREAD__
namespace on_cpu {
inline void watch(const void*, int, bool, bool) {}
inline void begin_watching() {}
inline void begin_block() {}
}  // namespace on_cpu
#else
#include <map>
#include <tuple>
#include <unordered_map>
#include <unordered_set>

namespace on_cpu {
// Who touched a byte last, and when.
struct Byte {
  int writer = -1, write_block = -1, write_epoch = -1;
  int reader = -1, read_block = -1, read_epoch = -1;  // reader -2: several
  bool atomic = false;                                // the write was
};
inline std::unordered_map<uintptr_t, Byte> bytes;
inline std::unordered_set<uintptr_t> sectors;
inline uintptr_t main_stack = 0;

// How often a thread of the block has come to an instruction; sectors of (block, warp, instruction, how often).
inline std::map<std::pair<int, void*>, int> times;
inline std::map<std::tuple<int, int, void*, int>, std::unordered_set<uintptr_t>> requests;

UNWATCHED inline int block_number() { return (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x; }
UNWATCHED inline void begin_block() { times.clear(); }
UNWATCHED inline bool within(uintptr_t at, const void* begin, size_t size) {
  return at >= uintptr_t(begin) && at < uintptr_t(begin) + size;
}
UNWATCHED inline void look(uintptr_t at, int size, bool write, bool atomic, void* code) {
  const bool of_host = at > main_stack - (1 << 20) && at < main_stack + (8 << 20);  // arguments of launches
  const bool of_fiber =
      within(at, running->stack.get(), STACK) || within(at, fibers.data(), fibers.size() * sizeof(Fiber));
  if (of_host || of_fiber) return;
  const bool of_block = within(at, shared.data(), shared.size());
  const int me = running->number, block = of_block ? 0 : block_number();
  if (!of_block) {
    auto& request = requests[{block, me / 32, code, times[{me, code}]++}];
    for (uintptr_t s = at / 32; s <= (at + size - 1) / 32; s++) sectors.insert(s), request.insert(s);
  }
  for (uintptr_t b = at; b < at + size; b++) {
    Byte& byte = bytes[b];
    const bool after_write =
        byte.writer >= 0 && (byte.write_block != block || (byte.write_epoch == epoch && byte.writer != me));
    const bool after_read =
        byte.reader != -1 && (byte.read_block != block || (byte.read_epoch == epoch && byte.reader != me));
    if ((after_write && !(atomic && byte.atomic)) || (write && after_read))
      fail(std::string("race: thread ") + std::to_string(me) + (write ? " writes" : " reads") + " what another one " +
           (after_write ? "wrote" : "read"));
    if (write) byte.writer = me, byte.write_block = block, byte.write_epoch = epoch, byte.atomic = atomic;
    else byte.reader = byte.read_block == block && byte.read_epoch == epoch && byte.reader != me ? -2 : me,
         byte.read_block = block, byte.read_epoch = epoch;
  }
}
UNWATCHED inline void watch(const void* address, int size, bool write, bool atomic, void* code = nullptr) {
  if (!watching) return;
  watching = false;  // what `look` calls is watched as well
  look(uintptr_t(address), size, write, atomic, code);
  watching = true;
}
// A launch begins.
UNWATCHED inline void begin_watching() {
  int here;
  bytes.clear(), main_stack = uintptr_t(&here);
}
}  // namespace on_cpu

#define WATCH(name, n, write) \
  WEAK void __tsan_##name##n(void* at) { on_cpu::watch(at, n, write, false, __builtin_return_address(0)); }
#define WATCH_ALL(n) \
  WATCH(read, n, false) WATCH(write, n, true) WATCH(unaligned_read, n, false) WATCH(unaligned_write, n, true)
WATCH_ALL(1) WATCH_ALL(2) WATCH_ALL(4) WATCH_ALL(8) WATCH_ALL(16)
#undef WATCH_ALL
#undef WATCH
WEAK void __tsan_read_range(void* at, long size) {
  on_cpu::watch(at, size, false, false, __builtin_return_address(0));
}
WEAK void __tsan_write_range(void* at, long size) {
  on_cpu::watch(at, size, true, false, __builtin_return_address(0));
}
WEAK void __tsan_init() {}
WEAK void __tsan_func_entry(void*) {}
WEAK void __tsan_func_exit() {}
WEAK int __tsan_atomic32_fetch_add(int* at, int value, int) {  // the host's
  return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);
}
WEAK void __tsan_vptr_update(void*, void*) {}
WEAK void __tsan_vptr_read(void*) {}
// How many sectors the launches since the last call have touched.
WEAK long cuda_on_cpu_sectors() {
  const long count = on_cpu::sectors.size();
  return on_cpu::sectors.clear(), on_cpu::requests.clear(), count;
}
// How many of one tensor's a request has touched, in the mean over those that touched any.
WEAK double cuda_on_cpu_request(const char* begin, long size) {
  double requests = 0, touched = 0;
  for (const auto& [_, request] : on_cpu::requests) {
    const long inside = std::count_if(request.begin(), request.end(), [&](uintptr_t sector) {
      return on_cpu::within(sector * 32, begin - 31, size + 31);
    });
    requests += inside > 0, touched += inside;
  }
  return touched / requests;
}
#endif
