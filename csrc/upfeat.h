// The C interface of libupfeat: plain pointers, sizes and strides, without Python or PyTorch.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define UPFEAT_ABI 12

#if defined(UPFEAT_BUILD) && defined(_WIN32)
#define UPFEAT_API __declspec(dllexport)
#elif defined(UPFEAT_BUILD)
#define UPFEAT_API __attribute__((visibility("default")))
#else
#define UPFEAT_API
#endif

enum { UPFEAT_FLOAT32 = 0, UPFEAT_BFLOAT16 = 1, UPFEAT_FLOAT16 = 2 };

enum { UPFEAT_OK = 0, UPFEAT_BAD_ARGUMENT = 1, UPFEAT_NO_MEMORY = 2, UPFEAT_NO_ISA = 3 };

// A strided 4-D tensor (batch, channel or tap, row, column). Strides are in elements and may be 0
// (expanded) or negative. `data` may be null for a tensor that is absent or empty.
typedef struct {
  void* data;
  int64_t size[4];
  int64_t stride[4];
  int64_t dtype;
} UpfeatTensor;

// Parameters of one JBU stage's filters, for G guidance channels, key width D and T taps; every
// array is dense float32, row-major.
typedef struct {
  const float* proj_w0;  // (D, G)
  const float* proj_b0;  // (D,)
  const float* proj_w1;  // (D, D)
  const float* proj_b1;  // (D,)
  const float* fix_w0;   // (T, T + G)
  const float* fix_b0;   // (T,)
  const float* fix_w1;   // (T, T)
  const float* fix_b1;   // (T,)
  int64_t key_width;     // D
  double temperature;    // factor of the key products, already exponentiated and clamped
  double sigma_spatial;
  double fixup_scale;
} UpfeatStage;

// The encoder of the neighbourhood upsampler; every array is dense float32. Queries have D
// channels, padded with zeros to a multiple of 32; the guidance has G.
typedef struct {
  const float* entry_w;   // (3, 3, G, D): rows and columns of the window, channels in, channels out
  const float* entry_b;   // (D,)
  const float* hidden_w;  // (levels - 1, 3, 3, D, D), or null if scales have no correction
  const float* hidden_b;  // (levels - 1, D)
  const float* last_w;    // (levels - 1, D, D), channels in, channels out
  const float* last_b;    // (levels - 1, D)
  const float* join_w;    // (levels, D, D), channels in, channels out
  const float* join_b;    // (levels, D)
  int64_t width;          // D
  int64_t levels;
} UpfeatPyramid;

UPFEAT_API int upfeat_abi(void);
// The package's version, a space, and the first 16 digits of this file's SHA-256, by which a
// library of an older build is detected even if its ABI number is the same.
UPFEAT_API const char* upfeat_identity(void);
// Bit i is set if this machine can run instruction set i: 0 baseline, 1 avx2, 2 avx512, 3 amx, and
// 4 amx with 17 bits of each float32 in dense products. An `isa` below 0 stands for the best set.
UPFEAT_API int upfeat_isa_mask(void);
enum { UPFEAT_BEST = -1, UPFEAT_BEST_HIGH = -2 };  // the best of sets 0 to 3; of all sets

// Computes out (B,C,H,W) from features (B,C,h,w), H >= h and W >= w, and weights (B,(2r+1)^2,H,W):
// bicubic resize, reflect padding and the correlation at every pixel in one pass.
UPFEAT_API int upfeat_jbu_forward(const UpfeatTensor* features, const UpfeatTensor* weights,
                                  const UpfeatTensor* out, int64_t radius, int isa, int threads);
// Either gradient may be null. Results do not depend on the thread count.
UPFEAT_API int upfeat_jbu_backward(const UpfeatTensor* features, const UpfeatTensor* weights,
                                   const UpfeatTensor* grad, const UpfeatTensor* grad_features,
                                   const UpfeatTensor* grad_weights, int64_t radius, int isa,
                                   int threads);

// The correlation alone, of features that are already padded: (B,C,H+2r,W+2r) -> (B,C,H,W).
UPFEAT_API int upfeat_conv_forward(const UpfeatTensor* padded, const UpfeatTensor* weights,
                                   const UpfeatTensor* out, int64_t radius, int isa, int threads);
UPFEAT_API int upfeat_conv_backward(const UpfeatTensor* padded, const UpfeatTensor* weights,
                                    const UpfeatTensor* grad, const UpfeatTensor* grad_padded,
                                    const UpfeatTensor* grad_weights, int64_t radius, int isa,
                                    int threads);

// Windows that tensors cover: tensors of fine pixels a window of the output, tensors of coarse
// cells a window of the grid, which contains all cells that the window of the output reads.
typedef struct {
  int64_t height, width;            // of the whole output
  int64_t top, left;                // first pixel of the window of the output
  int64_t grid_height, grid_width;  // of the whole grid
  int64_t grid_top, grid_left;      // first cell of the window of the grid
} UpfeatWindow;

// out[p] = sum over |d| <= r of weights[d, p] * features[cell(p) + d], cells clamped to the grid,
// cell(p) = floor((p + 1/2) * h / H) along each axis. Any sizes, but meant for H >= h.
UPFEAT_API int upfeat_neighbourhood_forward(const UpfeatTensor* features,
                                            const UpfeatTensor* weights, const UpfeatTensor* out,
                                            const UpfeatWindow* window, int64_t radius, int isa,
                                            int threads);
UPFEAT_API int upfeat_neighbourhood_backward(const UpfeatTensor* features,
                                             const UpfeatTensor* weights, const UpfeatTensor* grad,
                                             const UpfeatTensor* grad_features,
                                             const UpfeatTensor* grad_weights,
                                             const UpfeatWindow* window, int64_t radius, int isa,
                                             int threads);

// weights[d, p] = softmax over |d| <= r of temperature * <queries[p], keys[cell(p) + d]> -
// |p - centre(cell(p) + d)|^2 / (2 sigma^2), with distances in cells, and without cells whose
// centre is farther than r + 1/2 along an axis; queries (B,D,H,W), keys (B,D,h,w), r >= 1, D >= 1.
UPFEAT_API int upfeat_attend_forward(const UpfeatTensor* queries, const UpfeatTensor* keys,
                                     const UpfeatTensor* weights, const UpfeatWindow* window,
                                     int64_t radius, double temperature, double sigma, int isa,
                                     int threads);
// The means of the weights of upfeat_attend_forward over the pixels of each cell,
// (B,(2r+1)^2,h',w'), for the h' x w' cells that contain the window's pixels. H >= h and W >= w.
// Products of a pixel's query are multiplied by lengths (B,1,H,W); null for no factors.
UPFEAT_API int upfeat_attend_means(const UpfeatTensor* queries, const UpfeatTensor* keys,
                                   const UpfeatTensor* lengths, const UpfeatTensor* means,
                                   const UpfeatWindow* window, int64_t radius, double temperature,
                                   double sigma, int isa, int threads);
// upfeat_neighbourhood_forward with the weights of upfeat_attend_forward, of which only one tile at
// a time is in memory. H >= h and W >= w. Lengths are those of upfeat_attend_means.
UPFEAT_API int upfeat_attend_sum(const UpfeatTensor* features, const UpfeatTensor* queries,
                                 const UpfeatTensor* keys, const UpfeatTensor* lengths,
                                 const UpfeatTensor* out, const UpfeatWindow* window,
                                 int64_t radius, double temperature, double sigma, int isa,
                                 int threads);
// grad_scalars receives d/d temperature and d/d sigma.
UPFEAT_API int upfeat_attend_backward(const UpfeatTensor* queries, const UpfeatTensor* keys,
                                      const UpfeatTensor* grad, const UpfeatTensor* grad_queries,
                                      const UpfeatTensor* grad_keys, double* grad_scalars,
                                      const UpfeatWindow* window, int64_t radius,
                                      double temperature, double sigma, int isa, int threads);

// Rectangles of cells that pixels attend to. rows (2H): the first grid row of every row of pixels,
// then one past the last of every row; columns (2W): the grid columns of every column of pixels, in
// the same order. blocks: number of channels of the values for each head; a single number, of all
// channels, if the heads' weights are averaged.
typedef struct {
  const int64_t* rows;
  const int64_t* columns;
  const int64_t* blocks;
  int64_t n_blocks;
  int64_t heads;
  double scale;
} UpfeatRanges;

// Computes out (B,C,H,W) from queries (B,D,H,W), keys (B,D,h,w) and values (B,C,h,w); a head's
// weights are a softmax over the pixel's cells of scale * <query, key>.
UPFEAT_API int upfeat_window_forward(const UpfeatTensor* queries, const UpfeatTensor* keys,
                                     const UpfeatTensor* values, const UpfeatTensor* out,
                                     const UpfeatRanges* ranges, int isa, int threads);
// Any gradient may be null. Results do not depend on the thread count.
UPFEAT_API int upfeat_window_backward(const UpfeatTensor* queries, const UpfeatTensor* keys,
                                      const UpfeatTensor* values, const UpfeatTensor* grad,
                                      const UpfeatTensor* grad_queries,
                                      const UpfeatTensor* grad_keys,
                                      const UpfeatTensor* grad_values, const UpfeatRanges* ranges,
                                      int isa, int threads);

// A convolution of an encoder, and the steps before it, which are applied as pixels are read, in
// this order: a rotation by position, a scale and a shift per channel, SiLU, unit scale. Arrays are
// dense float32; channels of `weight`, `bias`, `scale` and `shift` are padded with zeros to a
// multiple of 16.
typedef struct {
  const float* weight;  // (inputs, pitch); kernel 3: (9 * channels, pitch), with inputs = channels
                        // if winograd is set, otherwise inputs = 9 * channels; only for packing
  const void* packed;   // what upfeat_layer_pack made of `weight`, with the same isa; on 64 bytes
  const float* bias;    // (pitch,) or null
  const float* scale;   // (B, in_pitch) or null
  const float* shift;   // (B, in_pitch) or null
  const float* rotate_rows;     // (H, 2, inputs): cosines and sines of angles; or null
  const float* rotate_columns;  // (W, 2, inputs): the angles of a pixel are the sum of both
  const double* sums;   // (B, sum_groups, 2): sums of x over groups of channels, and of x^2,
                        // from which scale and shift are computed as a group norm's; or null
  const float* gain;    // (inputs,), the group norm's weights; or null
  const float* offset;  // (inputs,), its biases; or null
  int64_t inputs, outputs, pitch, in_pitch;
  int64_t kernel;    // 1 or 3
  int64_t winograd;  // kernel 3: use minimal filtering; if 0, no steps may come before
  int64_t activation;  // after scale and shift: 0 for none, 1 for SiLU, 2 for ReLU
  int64_t unit;
  int64_t reflect;  // reflect the borders; otherwise they are padded with zeros
  int64_t pair;     // channels i and i + pair of each block of 2 * pair are rotated
  int64_t groups;   // number of groups of channels to sum
  int64_t sum_groups, sum_count;  // number of groups of `sums`, and of values in each
  int64_t packed_bytes;           // size of `packed`
  double epsilon;      // added to the mean of squares for the unit scale
  double sum_epsilon;  // added to the variance of each group
} UpfeatLayer;

// Packs `weight` of a layer for upfeat_layer_forward, as matrices in the order in which they are
// read. `packed` is aligned to 64 bytes, `bytes` is its size; if it is null, `bytes` receives the
// size that is needed.
UPFEAT_API int upfeat_layer_pack(const UpfeatLayer* layer, void* packed, int64_t* bytes, int isa,
                                 int threads);
// Computes out (B,O,H,W) from x (B,I,H,W), and adds a residual unless it is null; `out` may be the
// residual, or x if the kernel is 1. sums (B, groups, 2) receives the sums of the output and of its
// squares.
UPFEAT_API int upfeat_layer_forward(const UpfeatTensor* x, const UpfeatLayer* layer,
                                    const UpfeatTensor* residual, const UpfeatTensor* out,
                                    double* sums, int isa, int threads);
// The steps before a convolution alone, followed by means over the cells of a grid (as in adaptive
// average pooling; upfeat_layer_pool), or for every pixel (upfeat_layer_prepare, where `out` may be
// x).
UPFEAT_API int upfeat_layer_pool(const UpfeatTensor* x, const UpfeatLayer* layer,
                                 const UpfeatTensor* out, int isa, int threads);
UPFEAT_API int upfeat_layer_prepare(const UpfeatTensor* x, const UpfeatLayer* layer,
                                    const UpfeatTensor* out, int isa, int threads);

// Computes out (B,K,h,w) from features (B,C,h,w) and K patterns (side^2, pitch), K padded to a
// multiple of 16: the responses of each channel's windows, a softmax over patterns, and the mean
// over channels less 1 / K, as in AnyUp.
UPFEAT_API int upfeat_patterns(const UpfeatTensor* features, const float* patterns, int64_t side,
                               int64_t pitch, const UpfeatTensor* out, int isa, int threads);

// Computes weights (B,(2r+1)^2,H,W) from keys (B,D,H,W).
UPFEAT_API int upfeat_bilateral_forward(const UpfeatTensor* keys, const UpfeatTensor* weights,
                                        int64_t radius, double temperature, double sigma_spatial,
                                        int isa, int threads);
// grad_scalars receives d/d temperature and d/d sigma_spatial.
UPFEAT_API int upfeat_bilateral_backward(const UpfeatTensor* keys, const UpfeatTensor* grad,
                                         const UpfeatTensor* grad_keys, double* grad_scalars,
                                         int64_t radius, double temperature, double sigma_spatial,
                                         int isa, int threads);

// Computes weights (B,(2r+1)^2,H,W) from guidance (B,G,H,W).
UPFEAT_API int upfeat_stage_weights(const UpfeatTensor* guidance, const UpfeatStage* stage,
                                    const UpfeatTensor* weights, int64_t radius, int isa,
                                    int threads);
// A whole stage, with only one tile of weights at a time in memory.
UPFEAT_API int upfeat_stage_forward(const UpfeatTensor* features, const UpfeatTensor* guidance,
                                    const UpfeatStage* stage, const UpfeatTensor* out,
                                    int64_t radius, int isa, int threads);

// Computes queries (B,d,h,w), d <= D, for the pixels from (top, left) on of guidance (B,G,H,W); of
// unit length if `unit` is not 0.
UPFEAT_API int upfeat_pyramid(const UpfeatTensor* guidance, const UpfeatPyramid* encoder,
                             const UpfeatTensor* queries, int64_t top, int64_t left, int64_t unit,
                             int isa, int threads);

// Computes out (B,d,h,w): the mean of the unit queries of each cell's pixels, for the cells from
// (top, left) on of a grid of grid_height x grid_width cells that covers the guidance; cells
// overlap where the grid does not divide the guidance's sides.
UPFEAT_API int upfeat_pyramid_means(const UpfeatTensor* guidance, const UpfeatPyramid* encoder,
                                    const UpfeatTensor* out, int64_t grid_height,
                                    int64_t grid_width, int64_t top, int64_t left, int isa,
                                    int threads);

#ifdef __cplusplus
}
#endif
