#pragma once

#include <stdint.h>

namespace upfeat {

// 64-byte aligned; null when `bytes` is negative or memory runs out. At least one byte is given.
void* allocate(int64_t bytes);
void release(void* memory);
// Asks for large pages under a large buffer: faulting 4 KiB pages one by one costs more than the
// arithmetic that fills them. Returns how many large pages lie wholly inside; 0 when it is small or
// the platform has none.
int64_t prefer_large_pages(void* begin, int64_t bytes);
// Backs the index-th of those pages with memory now; what it holds already is kept.
void populate_large_page(void* begin, int64_t index);

}  // namespace upfeat
