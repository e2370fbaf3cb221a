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
// Older compilers do not accept "f16c" in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
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
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    mask |= 2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")) {
      mask |= 4;
#if defined(UPFEAT_AMX)
      static const bool amx = has_amx();
      if (amx) mask |= 8 | 16;
#endif
    }
  }
#endif
  return mask;
}
