// AnyUp's basis of patterns. Per cell, the window of every channel is multiplied with every
// pattern, and divided by the number of the window's cells that are in the grid. These numbers,
// ordered channel by channel, are then read as one row per pattern; a softmax runs down every
// column, and each row is averaged, less 1 / count. The averages differ from it by some parts in a
// thousand, so it is subtracted before they are rounded.
struct PatternJob {
  const UpfeatTensor *features, *out;
  const float* patterns;  // (side * side, pitch)
  int64_t count, side, pitch;
  char* scratch;
  int64_t worker_bytes, rows, width;  // rows: channels in fours; width: patterns in whole vectors
};

// Computes a softmax of `share` times the numbers, (count, channels), down the columns from c on,
// in kCount vectors, and adds it, less 1 / count, to `sums`, (count, kLanes). `powers` has room for
// (count, kCount) vectors. Lanes past the row's end belong to the next row, and are not added.
template <int kCount>
UPFEAT_INLINE void softmax_columns(const float* numbers, int64_t count, int64_t channels, int64_t c,
                                   float share, float* powers, float* sums) {
  Vec most[kCount], total[kCount];
  UPFEAT_UNROLL
  for (int m = 0; m < kCount; ++m) {
    most[m] = splat(-3.4e38f);
    total[m] = Vec{};
  }
  for (int64_t k = 0; k < count; ++k) {
    const float* at = numbers + k * channels + c;
    UPFEAT_UNROLL
    for (int m = 0; m < kCount; ++m) most[m] = max(most[m], load(at + m * kLanes));
  }
  for (int64_t k = 0; k < count; ++k) {
    const float* at = numbers + k * channels + c;
    UPFEAT_UNROLL
    for (int m = 0; m < kCount; ++m) {
      const Vec e = falling_exp((load(at + m * kLanes) - most[m]) * share);
      store(powers + (k * kCount + m) * kLanes, e);
      total[m] += e;
    }
  }
  const float even = 1.0f / static_cast<float>(count);
  const IVec mine = lanes_below(channels - c - (kCount - 1) * kLanes);  // of the last vector
  UPFEAT_UNROLL
  for (int m = 0; m < kCount; ++m) total[m] = 1.0f / total[m];
  for (int64_t k = 0; k < count; ++k) {
    Vec sum = load(sums + k * kLanes);
    UPFEAT_UNROLL
    for (int m = 0; m < kCount; ++m) {
      const Vec weight = load(powers + (k * kCount + m) * kLanes) * total[m] - even;
      sum += m + 1 < kCount ? weight : select(mine, weight, Vec{});
    }
    store(sums + k * kLanes, sum);
  }
}

static void pattern_task(void* context, int64_t task, int worker) {
  const PatternJob& job = *static_cast<const PatternJob*>(context);
  const UpfeatTensor& features = *job.features;
  const int64_t channels = features.size[1], taps = job.side * job.side, half = job.side / 2;
  float* windows = reinterpret_cast<float*>(job.scratch + worker * job.worker_bytes);
  float* responses = windows + job.rows * taps;
  float* dense = responses + job.rows * job.width;
  float* result = dense + channels * job.count + kLanes;
  float* sums = result + job.width + kLanes;
  float* powers = sums + job.count * kLanes;
  const int64_t batch = task / features.size[2], y = task % features.size[2];
  for (int64_t x = 0; x < features.size[3]; ++x) {
    for (int64_t i = 0; i < job.rows * taps; ++i) windows[i] = 0;
    const int64_t top = y > half ? y - half : 0, bottom = smaller(y + half + 1, features.size[2]);
    const int64_t left = x > half ? x - half : 0, right = smaller(x + half + 1, features.size[3]);
    const int64_t inside = (bottom - top) * (right - left);
    for (int64_t row = top; row < bottom; ++row) {
      const Row from = row_of(features, batch, row);
      float* to = windows + (row - y + half) * job.side + left - x + half;
      for (int64_t c = 0; c < channels; ++c, to += taps) {
        if (from.dtype == UPFEAT_FLOAT32) {
          const float* numbers = static_cast<const float*>(from.at(c, left));
          for (int64_t i = 0; i < right - left; ++i) to[i] = numbers[i * from.column_stride];
        } else {
          read_run(from.at(c, left), from.column_stride, from.dtype, right - left, to);
        }
      }
    }
    multiply_rows(job.rows, windows, taps, 1, job.patterns, nullptr, 1, taps, job.pitch, responses,
                  job.width, job.width / kLanes);
    // Gaps between channels are removed, so that the numbers can be read as rows of other lengths.
    float* numbers = responses;
    if (job.width != job.count) {
      numbers = dense;
      for (int64_t c = 0; c < channels; ++c) {
        memcpy(dense + c * job.count, responses + c * job.width,
               static_cast<size_t>(job.count) * 4);
      }
    }
    const float share = 1.0f / static_cast<float>(inside);
    for (int64_t i = 0; i < job.count * kLanes; ++i) sums[i] = 0;
    int64_t c = 0;
    for (; c + 4 * kLanes <= channels; c += 4 * kLanes) {
      softmax_columns<4>(numbers, job.count, channels, c, share, powers, sums);
    }
    for (; c < channels; c += kLanes) {
      softmax_columns<1>(numbers, job.count, channels, c, share, powers, sums);
    }
    for (int64_t k = 0; k < job.count; ++k) {
      result[k] = lane_sum(load(sums + k * kLanes)) * (1.0f / static_cast<float>(channels));
    }
    write_channels_last(row_of(*job.out, batch, y), 0, job.count, x, 1, result, job.width, false);
  }
}

static int run_patterns(const Runtime& runtime, const UpfeatTensor& features,
                        const float* patterns, int64_t side, int64_t pitch,
                        const UpfeatTensor& out) {
  PatternJob job{&features, &out, patterns, out.size[1], side, pitch, nullptr, 0, 0, 0};
  job.rows = (features.size[1] + 3) / 4 * 4;
  job.width = whole_vectors(job.count);
  const int64_t floats = job.rows * (side * side + job.width) + features.size[1] * job.count +
                         2 * kLanes + job.width + 5 * job.count * kLanes;
  job.worker_bytes = (floats * 4 + 63) / 64 * 64;
  job.scratch = static_cast<char*>(runtime.allocate(job.worker_bytes * runtime.workers));
  if (!job.scratch) return UPFEAT_NO_MEMORY;
  runtime.parallel_for(runtime.workers, features.size[0] * features.size[2], pattern_task, &job);
  runtime.release(job.scratch);
  return UPFEAT_OK;
}
