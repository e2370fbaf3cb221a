// Checks of tensors for the portable files. Kernel files must not include this file, since they
// must not share inline functions with portable code.
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

// True if `count` positions from `start` on are within `length`; also bounds `length`, so that
// products of two lengths stay below 2^63.
inline bool lies_in(int64_t start, int64_t count, int64_t length) {
  return start >= 0 && length <= (int64_t{1} << 30) && start <= length - count;
}

// Runs `body` and turns exceptions into a status, as none may cross into C; the only possible one
// is that memory runs out.
template <typename Body>
inline int guarded(Body body) {
  try {
    return body();
  } catch (const std::exception&) {
    return UPFEAT_NO_MEMORY;
  }
}

}  // namespace upfeat
