#pragma once

#include <stdint.h>

namespace upfeat {

// 64-byte aligned; null when `bytes` is negative or memory runs out. At least one byte is given.
void* allocate(int64_t bytes);
void release(void* memory);
// Asks for large pages under a large fresh buffer: faulting 4 KiB pages one by one costs more than
// the arithmetic that fills them.
void prefer_large_pages(void* begin, int64_t bytes);

}  // namespace upfeat
