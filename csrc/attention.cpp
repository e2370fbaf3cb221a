// Attention from pixels to rectangles of cells: checks, and division into runs of pixels that
// attend to the same cells.
#include <algorithm>
#include <vector>

#include "checks.h"
#include "plan.h"
#include "runtime.h"
#include "upfeat.h"

namespace upfeat {
namespace {

constexpr int64_t kRunColumns = 64;
constexpr int64_t kLineFloats = int64_t{1} << 17;  // a run's rows of one line: 512 KiB
constexpr int64_t kBands = 8;
constexpr int64_t kStreamedBytes = int64_t{16} << 20;

bool in_grid(const int64_t* bounds, int64_t pixels, int64_t cells) {
  for (int64_t i = 0; i < pixels; ++i) {
    if (bounds[i] < 0 || bounds[i] >= bounds[pixels + i] || bounds[pixels + i] > cells) {
      return false;
    }
  }
  return true;
}

// The first pixels of runs of at most `most` pixels that attend to the same cells, then the end.
std::vector<int64_t> runs_of(const int64_t* bounds, int64_t pixels, int64_t most) {
  std::vector<int64_t> runs{0};
  for (int64_t i = 1; i < pixels; ++i) {
    const bool same = bounds[i] == bounds[i - 1] && bounds[pixels + i] == bounds[pixels + i - 1];
    if (!same || i - runs.back() >= most) runs.push_back(i);
  }
  runs.push_back(pixels);
  return runs;
}

int64_t widest(const int64_t* bounds, int64_t pixels) {
  int64_t most = 0;
  for (int64_t i = 0; i < pixels; ++i) most = std::max(most, bounds[pixels + i] - bounds[i]);
  return most;
}

bool fits(const UpfeatTensor& queries, const UpfeatTensor& keys, const UpfeatTensor& values,
          const UpfeatRanges& ranges) {
  const int64_t *q = queries.size, *k = keys.size, *v = values.size;
  if (!ranges.rows || !ranges.columns || !ranges.blocks || ranges.heads < 1) return false;
  if (q[0] != k[0] || k[0] != v[0] || q[1] != k[1] || k[2] != v[2] || k[3] != v[3]) return false;
  if (q[1] < 1 || q[1] % ranges.heads) return false;
  if (ranges.n_blocks != 1 && ranges.n_blocks != ranges.heads) return false;
  int64_t channels = 0;
  for (int64_t n = 0; n < ranges.n_blocks; ++n) {
    if (ranges.blocks[n] < 0) return false;
    channels += ranges.blocks[n];
  }
  return channels == v[1] && in_grid(ranges.rows, q[2], v[2]) &&
         in_grid(ranges.columns, q[3], v[3]);
}

// The plan of a call, which owns the arrays that `attention` points to.
struct Plan {
  WindowAttention attention{};
  std::vector<int64_t> row_run, column_run, band_first, band_offset;

  Plan(const UpfeatTensor* queries, const UpfeatTensor* keys, const UpfeatTensor* values,
       const UpfeatRanges& ranges) {
    attention.queries = queries;
    attention.keys = keys;
    attention.values = values;
    attention.rows = ranges.rows;
    attention.columns = ranges.columns;
    attention.heads = ranges.heads;
    attention.scale = ranges.scale;
    attention.blocks = ranges.blocks;
    attention.n_blocks = ranges.n_blocks;
    const int64_t line = kTile * values->size[1];
    attention.most_rows = std::min<int64_t>(std::max<int64_t>(kLineFloats / line, 1), 16);
    row_run = runs_of(ranges.rows, queries->size[2], attention.most_rows);
    column_run = runs_of(ranges.columns, queries->size[3], kRunColumns);
    attention.row_run = row_run.data();
    attention.row_runs = static_cast<int64_t>(row_run.size()) - 1;
    attention.column_run = column_run.data();
    attention.column_runs = static_cast<int64_t>(column_run.size()) - 1;
    attention.most_cells = widest(ranges.rows, queries->size[2]) *
                           widest(ranges.columns, queries->size[3]);
  }

  // Divides the runs of rows into bands, whose number depends on the shape alone, and finds the
  // grid rows that each band adds to.
  void cut_bands() {
    const int64_t runs = attention.row_runs, batch = attention.values->size[0];
    const int64_t height = attention.queries->size[2];
    attention.runs_per_band = (runs + kBands - 1) / kBands;
    attention.bands = (runs + attention.runs_per_band - 1) / attention.runs_per_band;
    band_offset.push_back(0);
    for (int64_t task = 0; task < batch * attention.bands; ++task) {
      const int64_t first = task % attention.bands * attention.runs_per_band;
      const int64_t last = std::min(first + attention.runs_per_band, runs);
      const int64_t *begin = attention.rows + row_run[first], *end = attention.rows + row_run[last];
      const int64_t low = *std::min_element(begin, end);
      band_first.push_back(low);
      band_offset.push_back(band_offset.back() + *std::max_element(begin + height, end + height) -
                            low);
    }
    attention.band_first = band_first.data();
    attention.band_offset = band_offset.data();
  }

  double work() const {
    const UpfeatTensor &q = *attention.queries, &v = *attention.values;
    return static_cast<double>(q.size[0] * q.size[2]) * static_cast<double>(q.size[3]) *
           static_cast<double>(attention.most_cells) * static_cast<double>(q.size[1] + v.size[1]);
  }
};

}  // namespace
}  // namespace upfeat

using namespace upfeat;

extern "C" {

int upfeat_window_forward(const UpfeatTensor* queries, const UpfeatTensor* keys,
                          const UpfeatTensor* values, const UpfeatTensor* out,
                          const UpfeatRanges* ranges, int isa, int threads) {
  if (!all_valid({queries, keys, values, out}) || !ranges) return UPFEAT_BAD_ARGUMENT;
  const int64_t* q = queries->size;
  if (!sized(*out, q[0], values->size[1], q[2], q[3])) return UPFEAT_BAD_ARGUMENT;
  if (is_empty(*out)) return UPFEAT_OK;
  if (!fits(*queries, *keys, *values, *ranges)) return UPFEAT_BAD_ARGUMENT;
  const Kernels* kernels = kernels_for(isa);
  if (!kernels) return UPFEAT_NO_ISA;
  return guarded([&] {
    Plan plan(queries, keys, values, *ranges);
    plan.attention.out = out;
    plan.attention.streamed = out->dtype == UPFEAT_FLOAT32 && out->stride[3] == 1 &&
                              elements(*out) * 4 >= static_cast<double>(kStreamedBytes);
    prepare_output(*out, threads);
    return kernels->attend_windows(runtime_for(threads, plan.work()), plan.attention);
  });
}

int upfeat_window_backward(const UpfeatTensor* queries, const UpfeatTensor* keys,
                           const UpfeatTensor* values, const UpfeatTensor* grad,
                           const UpfeatTensor* grad_queries, const UpfeatTensor* grad_keys,
                           const UpfeatTensor* grad_values, const UpfeatRanges* ranges, int isa,
                           int threads) {
  if (!all_valid({queries, keys, values, grad}) || !ranges) return UPFEAT_BAD_ARGUMENT;
  const int64_t *q = queries->size, *k = keys->size, *v = values->size;
  if (!sized(*grad, q[0], v[1], q[2], q[3])) return UPFEAT_BAD_ARGUMENT;
  const auto like = [](const UpfeatTensor* given, const int64_t* size) {
    return !given || (valid(given) && sized(*given, size[0], size[1], size[2], size[3]));
  };
  if (!like(grad_queries, q) || !like(grad_keys, k) || !like(grad_values, v)) {
    return UPFEAT_BAD_ARGUMENT;
  }
  if (is_empty(*grad)) return UPFEAT_OK;
  if (!fits(*queries, *keys, *values, *ranges)) return UPFEAT_BAD_ARGUMENT;
  const Kernels* kernels = kernels_for(isa);
  if (!kernels) return UPFEAT_NO_ISA;
  return guarded([&] {
    Plan plan(queries, keys, values, *ranges);
    plan.attention.grad = grad;
    plan.attention.grad_queries = grad_queries;
    plan.attention.grad_keys = grad_keys;
    plan.attention.grad_values = grad_values;
    plan.cut_bands();
    return kernels->grad_windows(runtime_for(threads, 3 * plan.work()), plan.attention);
  });
}

}  // extern "C"
