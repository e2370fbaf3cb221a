// The encoder of the neighbourhood upsampler: checks, and the windows of every scale that a window
// of queries depends on.
#include "checks.h"
#include "runtime.h"

namespace upfeat {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// floor((2p + 1) * coarse / (2 * fine) - 1/2), at least 0.
int64_t cell_before(int64_t fine, int64_t coarse, int64_t pixel) {
  const int64_t numerator = (2 * pixel + 1) * coarse - fine;
  return numerator < 0 ? 0 : numerator / (2 * fine);
}

void plan_pyramid_axis(PyramidAxis* axes, const int64_t* lengths, int64_t levels, int64_t start,
                       int64_t count) {
  for (int64_t level = 0; level < levels; ++level) {
    PyramidAxis& axis = axes[level];
    axis.length = lengths[level];
    if (level == 0) {
      axis.out = {start, start + count};
      continue;
    }
    const int64_t fine = lengths[level - 1], coarse = lengths[level];
    const PyramidSpan& below = axes[level - 1].out;
    axis.out.start = cell_before(fine, coarse, below.start);
    axis.out.stop = smaller(cell_before(fine, coarse, below.stop - 1) + 2, coarse);
  }
  for (int64_t level = levels - 1; level >= 0; --level) {
    PyramidAxis& axis = axes[level];
    axis.seen = axis.out;
    if (level + 1 < levels) {
      const PyramidSpan& needed = axes[level + 1].read;
      const int64_t fine = lengths[level], coarse = lengths[level + 1];
      axis.seen.start = smaller(axis.seen.start, needed.start * fine / coarse);
      axis.seen.stop = larger(axis.seen.stop, (needed.stop * fine + coarse - 1) / coarse);
    }
    axis.read.start = larger(axis.seen.start - 1, 0);
    axis.read.stop = smaller(axis.seen.stop + 1, axis.length);
  }
}

// Sizes of an image's scales: each is half of the last, rounded up, while both sides are 2 or more.
int64_t pyramid_lengths(const UpfeatTensor& guidance, int64_t most, int64_t* rows,
                        int64_t* columns) {
  rows[0] = guidance.size[2];
  columns[0] = guidance.size[3];
  int64_t levels = 1;
  while (levels < most && rows[levels - 1] >= 2 && columns[levels - 1] >= 2) {
    rows[levels] = (rows[levels - 1] + 1) / 2;
    columns[levels] = (columns[levels - 1] + 1) / 2;
    ++levels;
  }
  return levels;
}

bool fits(const UpfeatPyramid& pyramid, const UpfeatTensor& guidance, const UpfeatTensor& out) {
  return pyramid.levels >= 1 && pyramid.levels <= kMostLevels && pyramid.width >= 32 &&
         pyramid.width % 32 == 0 && out.size[1] <= pyramid.width &&
         out.size[0] == guidance.size[0] && guidance.size[1] >= 1;
}

int run(const UpfeatTensor& guidance, const UpfeatPyramid& pyramid, const UpfeatTensor& out,
        PyramidPlan& plan, const PyramidSpan& down, const PyramidSpan& across, bool unit, int isa,
        int threads) {
  const Kernels* kernels = kernels_for(isa);
  if (!kernels) return UPFEAT_NO_ISA;
  int64_t rows[kMostLevels], columns[kMostLevels];
  plan.levels = pyramid_lengths(guidance, pyramid.levels, rows, columns);
  plan_pyramid_axis(plan.rows, rows, plan.levels, down.start, down.stop - down.start);
  plan_pyramid_axis(plan.columns, columns, plan.levels, across.start, across.stop - across.start);
  prepare_output(out, threads);
  const double work = static_cast<double>(down.stop - down.start) *
                      static_cast<double>(across.stop - across.start) *
                      static_cast<double>(6 * pyramid.width * pyramid.width);
  return kernels->encode_pyramid(runtime_for(threads, work), guidance, pyramid, plan, out, unit);
}

int encode(const UpfeatTensor* guidance, const UpfeatPyramid& pyramid, const UpfeatTensor* queries,
           int64_t top, int64_t left, bool unit, int isa, int threads) {
  if (!all_valid({guidance, queries})) return UPFEAT_BAD_ARGUMENT;
  const int64_t *g = guidance->size, *q = queries->size;
  if (!lies_in(top, q[2], g[2]) || !lies_in(left, q[3], g[3])) return UPFEAT_BAD_ARGUMENT;
  if (is_empty(*queries)) return UPFEAT_OK;
  if (!fits(pyramid, *guidance, *queries)) return UPFEAT_BAD_ARGUMENT;
  PyramidPlan plan{};
  return run(*guidance, pyramid, *queries, plan, {top, top + q[2]}, {left, left + q[3]}, unit, isa,
             threads);
}

// The pixels of a run of cells; a pixel that two cells share belongs to both.
PyramidSpan pixels_of(const PyramidCells& cells, int64_t length) {
  return {cells.first * length / cells.all,
          ((cells.first + cells.count) * length + cells.all - 1) / cells.all};
}

int means(const UpfeatTensor* guidance, const UpfeatPyramid& pyramid, const UpfeatTensor* out,
          const PyramidCells& rows, const PyramidCells& columns, int isa, int threads) {
  if (!all_valid({guidance, out})) return UPFEAT_BAD_ARGUMENT;
  if (!lies_in(rows.first, rows.count, rows.all) ||
      !lies_in(columns.first, columns.count, columns.all)) {
    return UPFEAT_BAD_ARGUMENT;
  }
  if (is_empty(*out)) return UPFEAT_OK;
  if (is_empty(*guidance) || !fits(pyramid, *guidance, *out)) return UPFEAT_BAD_ARGUMENT;
  PyramidPlan plan{};
  plan.cell_rows = rows;
  plan.cell_columns = columns;
  return run(*guidance, pyramid, *out, plan, pixels_of(rows, guidance->size[2]),
             pixels_of(columns, guidance->size[3]), true, isa, threads);
}

}  // namespace
}  // namespace upfeat

using namespace upfeat;

extern "C" int upfeat_pyramid(const UpfeatTensor* guidance, const UpfeatPyramid* encoder,
                              const UpfeatTensor* queries, int64_t top, int64_t left, int64_t unit,
                              int isa, int threads) {
  if (!encoder) return UPFEAT_BAD_ARGUMENT;
  return guarded([&] {
    return encode(guidance, *encoder, queries, top, left, unit != 0, isa, threads);
  });
}

extern "C" int upfeat_pyramid_means(const UpfeatTensor* guidance, const UpfeatPyramid* encoder,
                                    const UpfeatTensor* out, int64_t grid_height,
                                    int64_t grid_width, int64_t top, int64_t left, int isa,
                                    int threads) {
  if (!encoder || !out) return UPFEAT_BAD_ARGUMENT;
  return guarded([&] {
    return means(guidance, *encoder, out, {top, out->size[2], grid_height},
                 {left, out->size[3], grid_width}, isa, threads);
  });
}
