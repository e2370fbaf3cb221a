// Checks of tensors that the portable files share. Kernel files must not include it: they may share
// no inline function with portable code.
#pragma once

#include <exception>
#include <initializer_list>

#include "upfeat.h"

namespace upfeat {

inline double elements(const UpfeatTensor& tensor) {
  double count = 1;
  for (int64_t size : tensor.size) count *= static_cast<double>(size);
  return count;
}

inline bool valid(const UpfeatTensor* tensor) {
  if (!tensor || tensor->dtype < 0 || tensor->dtype > 2) return false;
  bool empty = false;
  for (int64_t size : tensor->size) {
    if (size < 0) return false;
    empty = empty || size == 0;
  }
  return empty || tensor->data;
}

inline bool all_valid(std::initializer_list<const UpfeatTensor*> tensors) {
  for (const UpfeatTensor* tensor : tensors) {
    if (!valid(tensor)) return false;
  }
  return true;
}

inline bool is_empty(const UpfeatTensor& tensor) {
  return !tensor.size[0] || !tensor.size[1] || !tensor.size[2] || !tensor.size[3];
}

inline bool sized(const UpfeatTensor& tensor, int64_t n, int64_t c, int64_t h, int64_t w) {
  return tensor.size[0] == n && tensor.size[1] == c && tensor.size[2] == h && tensor.size[3] == w;
}

// Whether `count` from `start` on lie in `length`; products of two lengths stay below 2^63.
inline bool lies_in(int64_t start, int64_t count, int64_t length) {
  return start >= 0 && length <= (int64_t{1} << 30) && start <= length - count;
}

// No exception may cross into C: running out of memory is the only one there is.
template <typename Body>
inline int guarded(Body body) {
  try {
    return body();
  } catch (const std::exception&) {
    return UPFEAT_NO_MEMORY;
  }
}

}  // namespace upfeat
