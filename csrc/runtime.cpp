// Choice of the instruction set and the number of threads of a call; large pages for its output.
#include "runtime.h"

#if defined(UPFEAT_X86)
#include <cpuid.h>
#endif
#if defined(UPFEAT_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "memory.h"
#include "threads.h"

namespace upfeat {
namespace {

#if defined(UPFEAT_X86)
// The bits of upfeat_isa_mask that the machine has and the system saves the registers of. Not by
// __builtin_cpu_supports: older compilers do not know "f16c", and some run-time libraries answer
// no to everything.
int vector_sets() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kFirst = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29;  // fma, osxsave, avx, f16c
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kFirst) != kFirst) return 0;
  unsigned saved = 0, high = 0;
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if ((saved & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  if (!(b & 1u << 5)) return 0;  // avx2
#if defined(__APPLE__)
  saved |= 0xe0;  // this system enables the wide registers at their first use
#endif
  constexpr unsigned kWide = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // avx512 f, dq, bw, vl
  return (saved & 0xe0) == 0xe0 && (b & kWide) == kWide ? 2 | 4 : 2;
}
#endif

#if defined(UPFEAT_AMX)
// True if the machine has matrix tiles and the system permits this process to use them.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5)) return false;  // avx512bf16
#if defined(UPFEAT_EMULATE_TILES)
  return true;
#else
  constexpr int kAskForState = 0x1023, kTileData = 18;
  // Products of bfloat16, tiles, products of bytes.
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kNeeded) != kNeeded) return false;
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#endif
}
#endif

void populate_task(void* begin, int64_t page, int) { populate_large_page(begin, page); }

}  // namespace

const Kernels* kernels_for(int isa) {
  const int mask = upfeat_isa_mask();
  if (isa == UPFEAT_BEST_HIGH && (mask & 16)) isa = 4;
  if (isa < 0) isa = (mask & 8) ? 3 : (mask & 4) ? 2 : (mask & 2) ? 1 : 0;
  if (isa > 4 || !(mask & (1 << isa))) return nullptr;
#if defined(UPFEAT_AMX)
  if (isa == 4) return kernels_amx_high();
  if (isa == 3) return kernels_amx();
#endif
#if defined(UPFEAT_X86)
  if (isa == 2) return kernels_avx512();
  if (isa == 1) return kernels_avx2();
#endif
  return kernels_baseline();
}

// Starting a thread costs about as much as a million multiply-adds.
Runtime runtime_for(int threads, double work) {
  int workers = threads < 1 ? 1 : (threads > 1024 ? 1024 : threads);
  if (work < 1e6 * workers) workers = 1 + static_cast<int>(work / 1e6);
  return Runtime{parallel_for, allocate, release, workers};
}

// Large pages are faulted in by all threads beforehand. If the kernels did so, threads that write
// neighbouring planes would all clear the same pages.
void prepare_output(const UpfeatTensor& out, int threads) {
  int64_t extent = 1;
  for (int i = 0; i < 4; ++i) {
    if (out.stride[i] < 0) return;
    extent += (out.size[i] - 1) * out.stride[i];
  }
  const int64_t bytes = extent * (out.dtype == UPFEAT_FLOAT32 ? 4 : 2);
  const int64_t pages = prefer_large_pages(out.data, bytes);
  if (pages) parallel_for(threads < 1 ? 1 : threads, pages, populate_task, out.data);
}

}  // namespace upfeat

using namespace upfeat;

extern "C" int upfeat_isa_mask(void) {
  int mask = 1;
#if defined(UPFEAT_X86)
  static const int sets = vector_sets();
  mask |= sets;
#if defined(UPFEAT_AMX)
  static const bool amx = (sets & 4) && has_amx();
  if (amx) mask |= 8 | 16;
#endif
#endif
  return mask;
}
