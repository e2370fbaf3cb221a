#include "memory.h"

#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace upfeat {

void* allocate(int64_t bytes) {
  if (bytes < 0) return nullptr;
  void* memory = nullptr;
  const size_t size = static_cast<size_t>(bytes) + 64;  // vector loads may run past the end
  return posix_memalign(&memory, 64, size) == 0 ? memory : nullptr;
}

void release(void* memory) { std::free(memory); }

void prefer_large_pages(void* begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLarge = uintptr_t{2} << 20;
  if (!begin || bytes < static_cast<int64_t>(4 * kLarge)) return;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(begin) + kLarge - 1) & ~(kLarge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes)) & ~(kLarge - 1);
  if (end > start) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#else
  (void)begin;
  (void)bytes;
#endif
}

}  // namespace upfeat
