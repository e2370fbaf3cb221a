#include "memory.h"

#include <cstdlib>

#if defined(_WIN32)
#include <malloc.h>
#elif defined(__linux__)
#include <sys/mman.h>
#endif

namespace upfeat {

void* allocate(int64_t bytes) {
  if (bytes < 0) return nullptr;
  void* memory = nullptr;
  const size_t size = static_cast<size_t>(bytes) + 64;  // vector loads may run past the end
#if defined(_WIN32)
  memory = _aligned_malloc(size, 64);
#else
  if (posix_memalign(&memory, 64, size) != 0) return nullptr;
#endif
  prefer_large_pages(memory, bytes);
  return memory;
}

void release(void* memory) {
#if defined(_WIN32)
  _aligned_free(memory);
#else
  std::free(memory);
#endif
}

#if defined(__linux__) && defined(MADV_HUGEPAGE)

namespace {

constexpr uintptr_t kLarge = uintptr_t{2} << 20;
constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, Linux 5.14; older headers lack the name

uintptr_t first_page(void* begin) {
  return (reinterpret_cast<uintptr_t>(begin) + kLarge - 1) & ~(kLarge - 1);
}

}  // namespace

int64_t prefer_large_pages(void* begin, int64_t bytes) {
  if (!begin || bytes < static_cast<int64_t>(4 * kLarge)) return 0;
  const uintptr_t start = first_page(begin);
  const uintptr_t end = reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes);
  const uintptr_t pages = (end - start) / kLarge;
  madvise(reinterpret_cast<void*>(start), pages * kLarge, MADV_HUGEPAGE);
  return static_cast<int64_t>(pages);
}

void populate_large_page(void* begin, int64_t index) {
  // If the system refuses the advice, pages are allocated when they are first written, as usual.
  const uintptr_t page = first_page(begin) + static_cast<uintptr_t>(index) * kLarge;
  madvise(reinterpret_cast<void*>(page), kLarge, kPopulateWrite);
}

#else

int64_t prefer_large_pages(void*, int64_t) { return 0; }
void populate_large_page(void*, int64_t) {}

#endif

}  // namespace upfeat
