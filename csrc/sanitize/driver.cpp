// Runs every operator, forward and backward, over odd, tiny and non-square shapes, all storage
// types and layouts, all instruction sets and several thread counts. Tensors are allocated to the
// byte, so that the sanitizers see any access outside them; results must be finite and the same for
// every thread count. In the end, several threads call all operators at once.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "../upfeat.h"

namespace {

enum class Layout { kPlanes, kPixels, kSparse };

thread_local uint32_t state = 1;

float next_value() {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
}

uint16_t half_of(float value, int64_t dtype) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (dtype == UPFEAT_BFLOAT16) return static_cast<uint16_t>(bits >> 16);
  // Truncates, for magnitudes in (2^-14, 1]; sufficient for inputs.
  if (std::fabs(value) < 1e-4f) return 0;
  return static_cast<uint16_t>((bits >> 16 & 0x8000u) |
                               (((bits & 0x7fffffffu) - (112u << 23)) >> 13));
}

struct Buffer {
  UpfeatTensor tensor{};
  std::vector<char> bytes;

  Buffer(int64_t n, int64_t c, int64_t h, int64_t w, int64_t dtype, Layout layout) {
    const int64_t gap = layout == Layout::kSparse ? 2 : 1;
    const int64_t size[4] = {n, c, h, w};
    const int64_t planes[4] = {c * h * w * gap, h * w * gap, w * gap, gap};
    const int64_t pixels[4] = {c * h * w, 1, w * c, c};
    int64_t last = 0;
    for (int i = 0; i < 4; ++i) {
      tensor.size[i] = size[i];
      tensor.stride[i] = layout == Layout::kPixels ? pixels[i] : planes[i];
      last += (size[i] - 1) * tensor.stride[i];
    }
    tensor.dtype = dtype;
    const int64_t count = n * c * h * w ? last + 1 : 0;
    bytes.resize(static_cast<size_t>(count) * (dtype == UPFEAT_FLOAT32 ? 4 : 2));
    bytes.shrink_to_fit();
    for (int64_t i = 0; i < count; ++i) {
      const float value = next_value();
      const uint16_t half = half_of(value, dtype);
      if (dtype == UPFEAT_FLOAT32)
        std::memcpy(&bytes[static_cast<size_t>(4 * i)], &value, 4);
      else
        std::memcpy(&bytes[static_cast<size_t>(2 * i)], &half, 2);
    }
    tensor.data = bytes.data();
  }
};

std::atomic<int> failures{0};
std::atomic<long> calls{0};

void expect(int status, const char* what) {
  ++calls;
  if (status == UPFEAT_OK) return;
  std::printf("%s returned %d\n", what, status);
  ++failures;
}

// Calls `body` with several thread counts; the contents of `out` afterwards must be the same.
template <typename Body>
void repeat(const char* what, std::vector<Buffer*> out, Body body) {
  std::vector<std::vector<char>> first;
  for (int threads : {1, 2, 5}) {
    expect(body(threads), what);
    for (size_t i = 0; i < out.size(); ++i) {
      if (threads == 1)
        first.push_back(out[i]->bytes);
      else if (first[i] != out[i]->bytes) {
        std::printf("%s differs with %d threads\n", what, threads);
        ++failures;
      }
    }
  }
  for (Buffer* buffer : out) {
    for (size_t i = 0; buffer->tensor.dtype == UPFEAT_FLOAT32 && i + 4 <= buffer->bytes.size();
         i += 4) {
      float value;
      std::memcpy(&value, &buffer->bytes[i], 4);
      if (!std::isfinite(value)) {
        std::printf("%s is not finite\n", what);
        ++failures;
        break;
      }
    }
  }
}

struct Shape {
  int64_t n, c, h, w, height, width, radius;
};

void upsampling(const Shape& s, int64_t dtype, Layout layout, int isa) {
  const int64_t taps = (2 * s.radius + 1) * (2 * s.radius + 1);
  Buffer features(s.n, s.c, s.h, s.w, dtype, layout),
      grad_features(s.n, s.c, s.h, s.w, dtype, layout);
  Buffer weights(s.n, taps, s.height, s.width, dtype, layout);
  Buffer grad_weights(s.n, taps, s.height, s.width, dtype, layout);
  Buffer out(s.n, s.c, s.height, s.width, dtype, layout),
      grad(s.n, s.c, s.height, s.width, dtype, layout);
  repeat("jbu_forward", {&out}, [&](int threads) {
    return upfeat_jbu_forward(&features.tensor, &weights.tensor, &out.tensor, s.radius, isa,
                              threads);
  });
  repeat("jbu_backward", {&grad_features, &grad_weights}, [&](int threads) {
    return upfeat_jbu_backward(&features.tensor, &weights.tensor, &grad.tensor,
                               &grad_features.tensor, &grad_weights.tensor, s.radius, isa, threads);
  });
  Buffer padded(s.n, s.c, s.height + 2 * s.radius, s.width + 2 * s.radius, dtype, layout);
  Buffer grad_padded(s.n, s.c, s.height + 2 * s.radius, s.width + 2 * s.radius, dtype, layout);
  repeat("conv_forward", {&out}, [&](int threads) {
    return upfeat_conv_forward(&padded.tensor, &weights.tensor, &out.tensor, s.radius, isa,
                               threads);
  });
  repeat("conv_backward", {&grad_padded, &grad_weights}, [&](int threads) {
    return upfeat_conv_backward(&padded.tensor, &weights.tensor, &grad.tensor, &grad_padded.tensor,
                                &grad_weights.tensor, s.radius, isa, threads);
  });
}

void guidance_side(const Shape& s, int64_t dtype, Layout layout, int isa) {
  const int64_t taps = (2 * s.radius + 1) * (2 * s.radius + 1), width = s.c % 40 + 1, channels = 3;
  Buffer keys(s.n, width, s.height, s.width, dtype, layout),
      grad_keys(s.n, width, s.height, s.width, dtype, layout);
  Buffer weights(s.n, taps, s.height, s.width, dtype, layout);
  double scalars[2];
  repeat("bilateral_forward", {&weights}, [&](int threads) {
    return upfeat_bilateral_forward(&keys.tensor, &weights.tensor, s.radius, 1.5, 0.8, isa,
                                    threads);
  });
  repeat("bilateral_backward", {&grad_keys}, [&](int threads) {
    return upfeat_bilateral_backward(&keys.tensor, &weights.tensor, &grad_keys.tensor, scalars,
                                     s.radius, 1.5, 0.8, isa, threads);
  });
  Buffer guidance(s.n, channels, s.height, s.width, dtype, layout);
  const auto array = [](int64_t count) {
    return Buffer(1, 1, 1, count, UPFEAT_FLOAT32, Layout::kPlanes);
  };
  Buffer arrays[8] = {
      array(width * channels),         array(width), array(width * width), array(width),
      array(taps * (taps + channels)), array(taps),  array(taps * taps),   array(taps)};
  const auto at = [&](int i) { return static_cast<const float*>(arrays[i].tensor.data); };
  const UpfeatStage stage{at(0), at(1), at(2), at(3), at(4), at(5),
                          at(6), at(7), width, 1.5,   0.8,   0.1};
  repeat("stage_weights", {&weights}, [&](int threads) {
    return upfeat_stage_weights(&guidance.tensor, &stage, &weights.tensor, s.radius, isa, threads);
  });
  Buffer features(s.n, s.c, s.h, s.w, dtype, layout),
      out(s.n, s.c, s.height, s.width, dtype, layout);
  repeat("stage_forward", {&out}, [&](int threads) {
    return upfeat_stage_forward(&features.tensor, &guidance.tensor, &stage, &out.tensor, s.radius,
                                isa, threads);
  });
}

// Neighbourhoods on the whole output, and on a window of an output that is half as large again,
// with half of the cells.
void neighbourhood(const Shape& s, int64_t dtype, Layout layout, int isa, bool whole) {
  const int64_t radius = s.radius ? s.radius : 1, taps = (2 * radius + 1) * (2 * radius + 1);
  const int64_t depth = s.c % 40 + 1;
  const UpfeatWindow window{whole ? s.height : s.height + s.height / 2,
                            whole ? s.width : s.width + s.width / 2,
                            whole ? 0 : s.height / 2,
                            whole ? 0 : s.width / 3,
                            whole ? s.h : 2 * s.h,
                            whole ? s.w : 2 * s.w,
                            whole ? 0 : s.h / 2,
                            whole ? 0 : s.w / 3};
  Buffer features(s.n, s.c, s.h, s.w, dtype, layout),
      grad_features(s.n, s.c, s.h, s.w, dtype, layout);
  Buffer weights(s.n, taps, s.height, s.width, dtype, layout);
  Buffer grad_weights(s.n, taps, s.height, s.width, dtype, layout);
  Buffer out(s.n, s.c, s.height, s.width, dtype, layout),
      grad(s.n, s.c, s.height, s.width, dtype, layout);
  repeat("neighbourhood_forward", {&out}, [&](int threads) {
    return upfeat_neighbourhood_forward(&features.tensor, &weights.tensor, &out.tensor, &window,
                                        radius, isa, threads);
  });
  repeat("neighbourhood_backward", {&grad_features, &grad_weights}, [&](int threads) {
    return upfeat_neighbourhood_backward(&features.tensor, &weights.tensor, &grad.tensor,
                                         &grad_features.tensor, &grad_weights.tensor, &window,
                                         radius, isa, threads);
  });
  Buffer queries(s.n, depth, s.height, s.width, dtype, layout),
      grad_queries(s.n, depth, s.height, s.width, dtype, layout);
  Buffer keys(s.n, depth, s.h, s.w, dtype, layout), grad_keys(s.n, depth, s.h, s.w, dtype, layout);
  Buffer scalars(1, 1, 1, 8, UPFEAT_FLOAT16, Layout::kPlanes);  // the bytes of two doubles
  repeat("attend_backward", {&grad_queries, &grad_keys, &scalars}, [&](int threads) {
    return upfeat_attend_backward(
        &queries.tensor, &keys.tensor, &weights.tensor, &grad_queries.tensor, &grad_keys.tensor,
        static_cast<double*>(scalars.tensor.data), &window, radius, 1.5, 0.8, isa, threads);
  });
  repeat("attend_forward", {&weights}, [&](int threads) {
    return upfeat_attend_forward(&queries.tensor, &keys.tensor, &weights.tensor, &window, radius,
                                 1.5, 0.8, isa, threads);
  });
  if (window.height < window.grid_height || window.width < window.grid_width) return;
  Buffer lengths(s.n, 1, s.height, s.width, dtype, layout);
  const UpfeatTensor* factors = s.c % 2 ? &lengths.tensor : nullptr;
  repeat("attend_sum", {&out}, [&](int threads) {
    return upfeat_attend_sum(&features.tensor, &queries.tensor, &keys.tensor, factors, &out.tensor,
                             &window, radius, 1.5, 0.8, isa, threads);
  });
  const auto cells = [](int64_t start, int64_t count, int64_t length, int64_t all) {
    const auto own = [&](int64_t at) { return (2 * at + 1) * all / (2 * length); };
    return own(start + count - 1) + 1 - own(start);
  };
  Buffer means(s.n, taps, cells(window.top, s.height, window.height, window.grid_height),
               cells(window.left, s.width, window.width, window.grid_width), dtype, layout);
  repeat("attend_means", {&means}, [&](int threads) {
    return upfeat_attend_means(&queries.tensor, &keys.tensor, factors, &means.tensor, &window,
                               radius, 1.5, 0.8, isa, threads);
  });
}

// Queries of a whole image and of a window, with and without corrections.
void pyramid(const Shape& s, int64_t dtype, Layout layout, int isa, bool whole) {
  const int64_t width = 32 * (1 + s.c % 2), levels = 1 + s.c % 5, channels = 1 + s.c % 4;
  const auto array = [](int64_t count) {
    return Buffer(1, 1, 1, count, UPFEAT_FLOAT32, Layout::kPlanes);
  };
  Buffer arrays[8] = {array(9 * channels * width),
                      array(width),
                      array(levels * 9 * width * width),
                      array(levels * width),
                      array(levels * width * width),
                      array(levels * width),
                      array(levels * width * width),
                      array(levels * width)};
  const auto at = [&](int i) { return static_cast<const float*>(arrays[i].tensor.data); };
  const UpfeatPyramid parts{at(0), at(1), whole ? at(2) : nullptr, at(3), at(4), at(5), at(6),
                            at(7), width, levels};
  const int64_t top = whole ? 0 : s.height / 2, left = whole ? 0 : s.width / 3;
  Buffer guidance(s.n, channels, s.height, s.width, dtype, layout);
  Buffer queries(s.n, s.c % width + (s.c > 0), s.height - top, s.width - left, dtype, layout);
  repeat("pyramid", {&queries}, [&](int threads) {
    return upfeat_pyramid(&guidance.tensor, &parts, &queries.tensor, top, left, 1, isa, threads);
  });
  Buffer means(s.n, s.c % width + (s.c > 0), s.h, s.w, dtype, layout);
  repeat("pyramid_means", {&means}, [&](int threads) {
    return upfeat_pyramid_means(&guidance.tensor, &parts, &means.tensor, whole ? s.h : 2 * s.h,
                                whole ? s.w : 2 * s.w, whole ? 0 : s.h / 2, whole ? 0 : s.w / 3,
                                isa, threads);
  });
}

// Cells that pixels attend to: all, or windows of about a third of the axis that move along it.
std::vector<int64_t> bounds_of(int64_t pixels, int64_t cells, bool whole) {
  std::vector<int64_t> bounds(static_cast<size_t>(2 * pixels));
  const int64_t side = cells / 3 + 1;
  for (int64_t i = 0; i < pixels; ++i) {
    const int64_t first = whole ? 0 : std::min(i * cells / pixels, cells - side);
    bounds[static_cast<size_t>(i)] = first;
    bounds[static_cast<size_t>(pixels + i)] = whole ? cells : first + side;
  }
  return bounds;
}

// Attention to rectangles of cells: with the heads' mean, or with blocks of channels, one of them
// empty.
void windows(const Shape& s, int64_t dtype, Layout layout, int isa, bool whole) {
  if (!s.c) return;
  const int64_t heads = 1 + s.c % 3, depth = heads * (1 + s.c % 19);
  Buffer queries(s.n, depth, s.height, s.width, dtype, layout);
  Buffer keys(s.n, depth, s.h, s.w, dtype, layout), values(s.n, s.c, s.h, s.w, dtype, layout);
  Buffer out(s.n, s.c, s.height, s.width, dtype, layout);
  Buffer grad(s.n, s.c, s.height, s.width, dtype, layout);
  Buffer grad_queries(s.n, depth, s.height, s.width, dtype, layout);
  Buffer grad_keys(s.n, depth, s.h, s.w, dtype, layout);
  Buffer grad_values(s.n, s.c, s.h, s.w, dtype, layout);
  const std::vector<int64_t> rows = bounds_of(s.height, s.h, whole);
  const std::vector<int64_t> columns = bounds_of(s.width, s.w, whole);
  std::vector<int64_t> blocks(static_cast<size_t>(whole ? 1 : heads), 0);
  blocks.back() = s.c;
  const UpfeatRanges ranges{rows.data(), columns.data(), blocks.data(),
                            static_cast<int64_t>(blocks.size()), heads, 0.5};
  repeat("window_forward", {&out}, [&](int threads) {
    return upfeat_window_forward(&queries.tensor, &keys.tensor, &values.tensor, &out.tensor,
                                 &ranges, isa, threads);
  });
  repeat("window_backward", {&grad_queries, &grad_keys, &grad_values}, [&](int threads) {
    return upfeat_window_backward(&queries.tensor, &keys.tensor, &values.tensor, &grad.tensor,
                                  &grad_queries.tensor, &grad_keys.tensor, &grad_values.tensor,
                                  &ranges, isa, threads);
  });
}

// Layers of an encoder: 1x1 and 3x3 kernels, few and many channels, with all steps before and
// after.
void layers(const Shape& s, int64_t dtype, Layout layout, int isa, bool reflect) {
  if (!s.c) return;
  const auto array = [](int64_t count) {
    return Buffer(1, 1, 1, count, UPFEAT_FLOAT32, Layout::kPlanes);
  };
  const auto at = [](const Buffer& buffer) { return static_cast<const float*>(buffer.tensor.data); };
  const auto padded = [](int64_t count) { return (count + 15) / 16 * 16; };
  const int64_t outputs = 8 * (1 + s.c % 7), pitch = padded(outputs), in_pitch = padded(s.c);
  Buffer x(s.n, s.c, s.height, s.width, dtype, layout);
  Buffer residual(s.n, outputs, s.height, s.width, dtype, layout);
  Buffer out(s.n, outputs, s.height, s.width, dtype, layout);
  Buffer weight = array(9 * s.c * pitch), bias = array(pitch);
  Buffer scale = array(s.n * in_pitch + 1), shift = array(s.n * in_pitch + 1);
  Buffer rows = array(s.height * 2 * s.c), columns = array(s.width * 2 * s.c);
  std::vector<double> sums(static_cast<size_t>(s.n * 8 + 1));
  const auto describe = [&](int64_t kernel, bool winograd) {
    UpfeatLayer layer{};
    layer.weight = at(weight);
    layer.bias = at(bias);
    layer.inputs = kernel == 3 && !winograd ? 9 * s.c : s.c;
    layer.outputs = outputs;
    layer.pitch = pitch;
    layer.in_pitch = in_pitch;
    layer.kernel = kernel;
    layer.winograd = winograd;
    layer.reflect = reflect;
    layer.groups = 4;
    layer.epsilon = 1e-5;
    if (kernel == 1 || winograd) {
      layer.scale = at(scale);
      layer.shift = at(shift);
      layer.activation = s.c % 3;
    }
    return layer;
  };
  for (const auto& [kernel, winograd] : {std::pair<int64_t, bool>{1, false}, {3, false}, {3, true}}) {
    UpfeatLayer layer = describe(kernel, winograd);
    if (upfeat_layer_pack(&layer, nullptr, &layer.packed_bytes, isa, 1) != UPFEAT_OK) continue;
    const std::align_val_t line{64};
    const auto release = [line](void* memory) { ::operator delete(memory, line); };
    const std::unique_ptr<void, decltype(release)> packed(
        ::operator new(static_cast<size_t>(layer.packed_bytes), line), release);
    expect(upfeat_layer_pack(&layer, packed.get(), &layer.packed_bytes, isa, 1), "layer_pack");
    layer.packed = packed.get();
    layer.weight = nullptr;
    repeat("layer_forward", {&out}, [&](int threads) {
      return upfeat_layer_forward(&x.tensor, &layer, reflect ? &residual.tensor : nullptr,
                                  &out.tensor, sums.data(), isa, threads);
    });
  }
  UpfeatLayer layer = describe(1, false);
  Buffer means(s.n, s.c, s.h, s.w, dtype, layout), prepared(s.n, s.c, s.height, s.width, dtype, layout);
  repeat("layer_pool", {&means}, [&](int threads) {
    return upfeat_layer_pool(&x.tensor, &layer, &means.tensor, isa, threads);
  });
  if (s.c % 2 == 0) {
    layer.rotate_rows = at(rows);
    layer.rotate_columns = at(columns);
    layer.pair = s.c / 2;
  }
  layer.unit = 1;
  repeat("layer_prepare", {&prepared}, [&](int threads) {
    return upfeat_layer_prepare(&x.tensor, &layer, &prepared.tensor, isa, threads);
  });
  Buffer patterns = array(9 * pitch), features(s.n, s.c, s.h, s.w, dtype, layout);
  Buffer matches(s.n, outputs, s.h, s.w, dtype, layout);
  repeat("patterns", {&matches}, [&](int threads) {
    return upfeat_patterns(&features.tensor, at(patterns), 3, pitch, &matches.tensor, isa, threads);
  });
}

// All operators on one shape.
void everything(const Shape& shape, int64_t dtype, Layout layout, int isa) {
  upsampling(shape, dtype, layout, isa);
  guidance_side(shape, dtype, layout, isa);
  for (bool either : {true, false}) {
    neighbourhood(shape, dtype, layout, isa, either);
    pyramid(shape, dtype, layout, isa, either);
    windows(shape, dtype, layout, isa, either);
    layers(shape, dtype, layout, isa, either);
  }
}

}  // namespace

int main() {
  const Shape shapes[] = {
      {1, 5, 7, 9, 14, 18, 3},   {2, 33, 8, 8, 16, 16, 3}, {1, 100, 1, 1, 4, 5, 3},
      {1, 1, 2, 2, 4, 4, 1},     {1, 17, 4, 8, 7, 14, 2},  {1, 31, 3, 5, 12, 20, 3},
      {1, 24, 5, 20, 11, 21, 2}, {3, 7, 6, 6, 6, 6, 0},    {1, 16, 3, 4, 20, 23, 4},
      {1, 64, 9, 17, 18, 34, 3}, {2, 18, 1, 1, 1, 2, 3},   {1, 4, 1, 3, 3, 19, 5},
      {0, 4, 3, 3, 6, 6, 1},     {2, 0, 3, 3, 6, 6, 1}};
  const int mask = upfeat_isa_mask();
  std::vector<std::thread> callers;
  for (int isa = 0; isa < 5; ++isa) {
    if (!(mask & 1 << isa)) continue;
    for (const Shape& shape : shapes) {
      for (int64_t dtype = 0; dtype < 3; ++dtype) {
        for (Layout layout : {Layout::kPlanes, Layout::kPixels, Layout::kSparse}) {
          everything(shape, dtype, layout, isa);
        }
      }
    }
    for (int caller = 0; caller < 4; ++caller)
      callers.emplace_back(everything, shapes[1], UPFEAT_FLOAT32, Layout::kPlanes, isa);
    for (std::thread& caller : callers) caller.join();
    callers.clear();
  }
  std::printf("%ld calls, instruction sets %d, %d failures\n", calls.load(), mask,
              failures.load());
  return failures.load() ? 1 : 0;
}
