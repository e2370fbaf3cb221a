// Structs shared by the portable part of the library and the kernels for each instruction set. This
// file must not contain inline functions: kernel files are compiled several times with different
// machine flags, and the linker could merge their copies of an inline function into one.
#pragma once

#include <stdint.h>

#include "upfeat.h"

namespace upfeat {

constexpr int64_t kTile = 16;  // output columns of a tile; a tile has two rows

// The squared distance of a cell that must not have a weight.
constexpr float kOutOfReach = 1e30f;

// Tables by which one output axis reads the coarse axis: either with reflect padding and bicubic
// resizing, or the cells around the cell of each coordinate. Two neighbouring output coordinates
// form a group and share a window of `window` coarse cells.
struct Axis {
  int64_t in = 0;            // coarse cells
  int64_t out = 0;           // output coordinates
  int64_t taps = 0;          // 2r+1
  int64_t window = 0;        // coarse cells read by any group
  int64_t groups = 0;        // ceil(out / 2)
  int64_t* lo = nullptr;     // (groups,) first coarse cell of each window
  float* coef = nullptr;     // (2*groups, window, taps): coefficient of coarse cell a in tap d
  int64_t* first = nullptr;  // (2*groups, window): taps outside [first, last) have coefficient 0
  int64_t* last = nullptr;
  // coef, first and last again, for tiles of kTile coordinates.
  int64_t tiles = 0;
  float* tile_coef = nullptr;     // (tiles, window, taps, kTile)
  int64_t* tile_first = nullptr;  // (tiles, window)
  int64_t* tile_last = nullptr;
  // Only if an axis reads the cells around a coordinate: the cell that contains the coordinate,
  // (out,), counted from the first cell of the tensor; and the squared distances from coordinates
  // to the centres of the cells that they read, in cells, (taps, tiles * kTile), kOutOfReach for a
  // cell that must not have a weight.
  int64_t* own = nullptr;
  float* away = nullptr;
};

// Runs body(context, task, worker) for every task in [0, tasks), worker in [0, workers).
typedef void (*TaskBody)(void* context, int64_t task, int worker);
typedef void (*ParallelFor)(int workers, int64_t tasks, TaskBody body, void* context);
// 64-byte aligned memory or null.
typedef void* (*Allocate)(int64_t bytes);
typedef void (*Release)(void* memory);

struct Runtime {
  ParallelFor parallel_for;
  Allocate allocate;
  Release release;
  int workers;
};

// The source of weights: given weights, or keys of a bilateral kernel, or guidance and the
// parameters of a stage.
struct WeightSource {
  const UpfeatTensor* weights = nullptr;
  const UpfeatTensor* keys = nullptr;
  const UpfeatTensor* guidance = nullptr;
  const UpfeatStage* stage = nullptr;
  int64_t radius = 0;
  double temperature = 0;
  double sigma_spatial = 0;
};

// The arguments of a softmax over the cells around each pixel.
struct Attention {
  const UpfeatTensor* queries;
  const UpfeatTensor* keys;
  double temperature;
  double sigma;
  const UpfeatTensor* lengths = nullptr;  // factors of the pixels' products; or null
};

// Weights over the cells around pixels, and the results to compute from them; null if not needed.
struct Neighbourhood {
  Attention attention;
  const UpfeatTensor* weights;
  const UpfeatTensor* means;           // of the weights over the pixels of each cell
  const UpfeatTensor *features, *out;  // out: weighted sums of the features
};

// Attention from pixels to rectangles of cells. Runs are neighbouring pixels that attend to the
// same cells: row_run and column_run contain the first pixel of each run, then the end of the last.
struct WindowAttention {
  const UpfeatTensor *queries, *keys, *values, *out;
  const UpfeatTensor *grad, *grad_queries, *grad_keys, *grad_values;  // backward; or null
  const int64_t *rows, *columns;  // first cells of pixel rows and columns, then their ends
  int64_t heads;
  double scale;
  const int64_t* blocks;  // channels of the values for each head, or one number for their mean
  int64_t n_blocks;
  const int64_t *row_run, *column_run;
  int64_t row_runs, column_runs, most_cells, most_rows;  // most pixel rows of a run
  bool streamed;
  // Backward: row runs are divided into bands, each with its own rows of the grid to sum gradients.
  int64_t bands, runs_per_band;
  const int64_t *band_first, *band_offset;  // (B * bands): first grid row; rows before, and in all
};

enum Activation { kNoActivation, kSilu, kRelu };

// A convolution with the steps before and after it; see UpfeatLayer.
struct Layer {
  const UpfeatTensor *x, *residual, *out;
  const float *weight, *bias, *scale, *shift, *rotate_rows, *rotate_columns;
  int64_t inputs, outputs, pitch, in_pitch, kernel, pair, groups;
  double epsilon;
  Activation activation;
  bool winograd, unit, reflect;
  const char* packed;  // the weights, as `pack_layer` packed them
  double* partial;     // (tasks, groups, 2): sums and sums of squares; or null
  int64_t row_tasks, rows_per_task, column_tasks;
};

// A run along one axis; `stop` is one past its end.
struct PyramidSpan {
  int64_t start, stop;
};

// Runs of one scale of the encoder along one axis: `out` of the sum of this and coarser scales,
// which is added to the finer scale; `seen` of the scale itself; `read` of the mean of the finer
// scale.
struct PyramidAxis {
  int64_t length;
  PyramidSpan out, seen, read;
};

constexpr int64_t kMostLevels = 32;
constexpr int64_t kPyramidRows = 8;  // rows of one task

// `count` cells from `first` on, of `all`, to average over; `count` is 0 if there are no averages.
struct PyramidCells {
  int64_t first, count, all;
};

struct PyramidPlan {
  PyramidCells cell_rows, cell_columns;  // with a count of 0, queries of pixels are computed
  int64_t levels;
  PyramidAxis rows[kMostLevels], columns[kMostLevels];
};

struct Kernels {
  int (*upsample)(const Runtime&, const UpfeatTensor& features, const WeightSource&,
                  const UpfeatTensor& out, const Axis& rows, const Axis& columns);
  int (*make_weights)(const Runtime&, const WeightSource&, const UpfeatTensor& weights);
  int (*grad_features)(const Runtime&, const UpfeatTensor& weights, const UpfeatTensor& grad,
                       const UpfeatTensor& grad_features, const Axis& rows, const Axis& columns);
  int (*grad_weights)(const Runtime&, const UpfeatTensor& features, const UpfeatTensor& grad,
                      const UpfeatTensor& grad_weights, const Axis& rows, const Axis& columns);
  int (*grad_bilateral)(const Runtime&, const WeightSource&, const UpfeatTensor& grad,
                        const UpfeatTensor& grad_keys, double* grad_scalars);
  int (*attend)(const Runtime&, const Neighbourhood&, const Axis& rows, const Axis& columns);
  // As `attend`, for an output of fewer pixels than cells; computes weights only.
  int (*attend_shrinking)(const Runtime&, const Attention&, const UpfeatTensor& weights,
                          const Axis& rows, const Axis& columns);
  int (*grad_attend)(const Runtime&, const Attention&, const UpfeatTensor& grad,
                     const UpfeatTensor& grad_queries, const UpfeatTensor& grad_keys,
                     double* grad_scalars, const Axis& rows, const Axis& columns);
  int (*attend_windows)(const Runtime&, const WindowAttention&);
  int (*grad_windows)(const Runtime&, const WindowAttention&);
  int64_t (*packed_bytes)(const Layer&);
  int (*pack_layer)(const Runtime&, const Layer&, char* packed);
  int (*run_layer)(const Runtime&, const Layer&);
  int (*pool_layer)(const Runtime&, const Layer&);
  int (*prepare_layer)(const Runtime&, const Layer&);
  int (*run_patterns)(const Runtime&, const UpfeatTensor& features, const float* patterns,
                      int64_t side, int64_t pitch, const UpfeatTensor& out);
  int (*encode_pyramid)(const Runtime&, const UpfeatTensor& guidance, const UpfeatPyramid&,
                const PyramidPlan&, const UpfeatTensor& queries, bool unit);
};

const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_amx();
const Kernels* kernels_amx_high();

}  // namespace upfeat
