#include "encoder.h"

namespace upfeat {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// floor((2p + 1) * coarse / (2 * fine) - 1/2), at least 0.
int64_t cell_before(int64_t fine, int64_t coarse, int64_t pixel) {
  const int64_t numerator = (2 * pixel + 1) * coarse - fine;
  return numerator < 0 ? 0 : numerator / (2 * fine);
}

}  // namespace

void plan_encoder_axis(EncoderAxis* axes, const int64_t* lengths, int64_t levels, int64_t start,
                       int64_t count) {
  for (int64_t level = 0; level < levels; ++level) {
    EncoderAxis& axis = axes[level];
    axis.length = lengths[level];
    if (level == 0) {
      axis.out = {start, start + count};
      continue;
    }
    const int64_t fine = lengths[level - 1], coarse = lengths[level];
    const EncoderSpan& below = axes[level - 1].out;
    axis.out.start = cell_before(fine, coarse, below.start);
    axis.out.stop = smaller(cell_before(fine, coarse, below.stop - 1) + 2, coarse);
  }
  for (int64_t level = levels - 1; level >= 0; --level) {
    EncoderAxis& axis = axes[level];
    axis.seen = axis.out;
    if (level + 1 < levels) {
      const EncoderSpan& needed = axes[level + 1].read;
      const int64_t fine = lengths[level], coarse = lengths[level + 1];
      axis.seen.start = smaller(axis.seen.start, needed.start * fine / coarse);
      axis.seen.stop = larger(axis.seen.stop, (needed.stop * fine + coarse - 1) / coarse);
    }
    axis.read.start = larger(axis.seen.start - 1, 0);
    axis.read.stop = smaller(axis.seen.stop + 1, axis.length);
  }
}

}  // namespace upfeat
