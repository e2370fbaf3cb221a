#pragma once

#include <stdint.h>

namespace upfeat {

// Returns 64-byte aligned memory of at least one byte; null if `bytes` is negative or memory runs
// out.
void* allocate(int64_t bytes);
void release(void* memory);
// Asks the system for large pages for a large buffer, as faulting 4 KiB pages one by one costs more
// than the arithmetic that fills them. Returns the number of large pages that are wholly inside the
// buffer; 0 if the buffer is small or the platform has no large pages.
int64_t prefer_large_pages(void* begin, int64_t bytes);
// Backs large page `index` of the buffer with memory now, and keeps its contents.
void populate_large_page(void* begin, int64_t index);

}  // namespace upfeat
