// Conversion of storage types to and from float32, and strided copies into and out of tiles.

UPFEAT_INLINE int64_t bytes_of(int64_t dtype) { return dtype == UPFEAT_FLOAT32 ? 4 : 2; }

UPFEAT_INLINE uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
UPFEAT_INLINE float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

UPFEAT_INLINE float from_bfloat16(uint16_t half) { return bits_float(uint32_t{half} << 16); }
UPFEAT_INLINE uint16_t to_bfloat16(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // nearest even
}

#if defined(__F16C__)
UPFEAT_INLINE float from_float16(uint16_t half) { return _cvtsh_ss(half); }
UPFEAT_INLINE uint16_t to_float16(float value) { return _cvtss_sh(value, 0); }
#elif defined(__aarch64__)
UPFEAT_INLINE float from_float16(uint16_t half) {
  __fp16 value;
  memcpy(&value, &half, 2);
  return static_cast<float>(value);
}
UPFEAT_INLINE uint16_t to_float16(float value) {
  const __fp16 half = static_cast<__fp16>(value);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
#else
UPFEAT_INLINE float from_float16(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16, rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return bits_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // The exponents of float32 and float16 differ by 112; the product also scales subnormals right.
  return bits_float(sign | float_bits(bits_float(rest << 13) * bits_float((127u + 112u) << 23)));
}
UPFEAT_INLINE uint16_t to_float16(float value) {
  const uint32_t bits = float_bits(value), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (rest < 0x38800000u) {  // subnormal: adding 1/2 rounds the result into the low bits
    return static_cast<uint16_t>(sign | (float_bits(bits_float(rest) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((rest + 0xfffu + ((rest >> 13) & 1u) - (112u << 23)) >> 13));
}
#endif

UPFEAT_INLINE float read_one(const void* from, int64_t index, int64_t dtype) {
  if (dtype == UPFEAT_FLOAT32) return static_cast<const float*>(from)[index];
  const uint16_t half = static_cast<const uint16_t*>(from)[index];
  return dtype == UPFEAT_BFLOAT16 ? from_bfloat16(half) : from_float16(half);
}
UPFEAT_INLINE void write_one(void* to, int64_t index, int64_t dtype, float value) {
  if (dtype == UPFEAT_FLOAT32) {
    static_cast<float*>(to)[index] = value;
  } else {
    static_cast<uint16_t*>(to)[index] =
        dtype == UPFEAT_BFLOAT16 ? to_bfloat16(value) : to_float16(value);
  }
}

// Reads `count` elements, `stride` apart, into dense float32.
static void read_run(const void* from, int64_t stride, int64_t dtype, int64_t count, float* to) {
  if (stride == 1 && dtype == UPFEAT_FLOAT32) {
    memcpy(to, from, static_cast<size_t>(count) * 4);
  } else if (stride == 1 && dtype == UPFEAT_BFLOAT16) {
    for (int64_t i = 0; i < count; ++i)
      to[i] = from_bfloat16(static_cast<const uint16_t*>(from)[i]);
  } else {
    int64_t i = 0;
#if defined(__F16C__)
    for (; stride == 1 && i + 8 <= count; i += 8) {
      const __m128i halves =
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(from) + i));
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
    }
#endif
    for (; i < count; ++i) to[i] = read_one(from, i * stride, dtype);
  }
}

static void write_run(void* to, int64_t stride, int64_t dtype, int64_t count, const float* from) {
  if (stride == 1 && dtype == UPFEAT_FLOAT32) {
    memcpy(to, from, static_cast<size_t>(count) * 4);
  } else if (stride == 1 && dtype == UPFEAT_BFLOAT16) {
    for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(to)[i] = to_bfloat16(from[i]);
  } else {
    int64_t i = 0;
#if defined(__F16C__)
    for (; stride == 1 && i + 8 <= count; i += 8) {
      const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(to) + i), halves);
    }
#endif
    for (; i < count; ++i) write_one(to, i * stride, dtype, from[i]);
  }
}

// One row of pixels of a tensor, in all channels.
struct Row {
  char* data;
  int64_t channel_stride, column_stride, dtype;

  UPFEAT_MEMBER void* at(int64_t channel, int64_t column) const {
    return data + (channel * channel_stride + column * column_stride) * bytes_of(dtype);
  }
};

UPFEAT_INLINE Row row_of(const UpfeatTensor& tensor, int64_t batch, int64_t row) {
  const int64_t offset = batch * tensor.stride[0] + row * tensor.stride[2];
  return Row{static_cast<char*>(tensor.data) + offset * bytes_of(tensor.dtype), tensor.stride[1],
             tensor.stride[3], tensor.dtype};
}

// Reads (channels, columns) of a row into dense (columns, pitch) float32; channels up to the next
// multiple of kLanes are set to 0.
UPFEAT_APART void read_channels_last(const Row& row, int64_t channel, int64_t channels,
                                     int64_t column, int64_t columns, float* to, int64_t pitch) {
  const int64_t padded = (channels + kLanes - 1) / kLanes * kLanes;
  if (row.channel_stride == 1 && row.dtype == UPFEAT_FLOAT32 && padded == channels) {
    for (int64_t x = 0; x < columns; ++x) {
      const float* pixel = static_cast<const float*>(row.at(channel, column + x));
      for (int64_t c = 0; c < channels; c += kLanes) store(to + x * pitch + c, load(pixel + c));
    }
    return;
  }
  if (row.channel_stride == 1 || row.column_stride != 1) {
    for (int64_t x = 0; x < columns; ++x) {
      float* pixel = to + x * pitch;
      read_run(row.at(channel, column + x), row.channel_stride, row.dtype, channels, pixel);
      for (int64_t c = channels; c < padded; ++c) pixel[c] = 0;
    }
    return;
  }
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t have = channels - c < kLanes ? channels - c : kLanes;
    for (int64_t x = 0; x < columns; x += kLanes) {
      const int64_t wide = columns - x < kLanes ? columns - x : kLanes;
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = Vec{};
      for (int64_t i = 0; i < have; ++i) {
        if (wide == kLanes && row.dtype == UPFEAT_FLOAT32) {
          const float* from = static_cast<const float*>(row.at(channel + c + i, column + x));
          // Planes are too far apart for the hardware prefetcher; this is the plane's next line.
          __builtin_prefetch(from + kTile);
          block[i] = load(from);
        } else {
          read_run(row.at(channel + c + i, column + x), 1, row.dtype, wide,
                   reinterpret_cast<float*>(block + i));
        }
      }
      transpose(block);
      for (int64_t i = 0; i < wide; ++i) store(to + (x + i) * pitch + c, block[i]);
    }
  }
}

// Inverse of read_channels_last: writes dense (columns, pitch) float32 to (channels, columns) of a
// row.
UPFEAT_APART void write_channels_last(const Row& row, int64_t channel, int64_t channels,
                                      int64_t column, int64_t columns, const float* from,
                                      int64_t pitch, bool streamed) {
  if (row.channel_stride == 1 || row.column_stride != 1) {
    for (int64_t x = 0; x < columns; ++x) {
      write_run(row.at(channel, column + x), row.channel_stride, row.dtype, channels,
                from + x * pitch);
    }
    return;
  }
  // Whole lines of kTile columns are written: a half line would be evicted from the caches twice.
  constexpr int kParts = static_cast<int>(kTile) / kLanes;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t have = channels - c < kLanes ? channels - c : kLanes;
    for (int64_t x = 0; x < columns; x += kTile) {
      const int64_t wide = columns - x < kTile ? columns - x : kTile;
      Vec block[kParts][kLanes];
      for (int part = 0; part < kParts; ++part) {
        for (int i = 0; i < kLanes; ++i) {
          const int64_t at = part * kLanes + i;
          block[part][i] = at < wide ? load(from + (x + at) * pitch + c) : Vec{};
        }
        transpose(block[part]);
      }
      for (int64_t i = 0; i < have; ++i) {
        float* to = static_cast<float*>(row.at(channel + c + i, column + x));
        const bool whole = wide == kTile && row.dtype == UPFEAT_FLOAT32;
        if (whole && streamed && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
          for (int part = 0; part < kParts; ++part) stream(to + part * kLanes, block[part][i]);
        } else if (whole) {
          for (int part = 0; part < kParts; ++part) store(to + part * kLanes, block[part][i]);
        } else {
          float line[kTile];
          for (int part = 0; part < kParts; ++part) store(line + part * kLanes, block[part][i]);
          write_run(to, 1, row.dtype, wide, line);
        }
      }
    }
  }
}

// Reads the tap planes of a tile, [taps][2 rows][kTile]; pixels outside the image are 0.
static void read_tile(const UpfeatTensor& tensor, int64_t batch, int64_t y, int64_t x,
                      float* tile) {
  const int64_t columns = tensor.size[3] - x < kTile ? tensor.size[3] - x : kTile;
  const bool whole = columns == kTile && tensor.stride[3] == 1 && tensor.dtype == UPFEAT_FLOAT32;
  for (int64_t py = 0; py < 2; ++py) {
    const bool inside = y + py < tensor.size[2];
    const Row row = row_of(tensor, batch, inside ? y + py : y);
    for (int64_t k = 0; k < tensor.size[1]; ++k) {
      float* to = tile + (2 * k + py) * kTile;
      if (whole && inside) {
        const float* from = static_cast<const float*>(row.at(k, x));
        __builtin_prefetch(from + kTile);  // the line of the next tile
        for (int v = 0; v < kRowVecs; ++v) store(to + v * kLanes, load(from + v * kLanes));
        continue;
      }
      if (inside) read_run(row.at(k, x), row.column_stride, row.dtype, columns, to);
      for (int64_t i = inside ? columns : 0; i < kTile; ++i) to[i] = 0;
    }
  }
}

static void write_tile(const UpfeatTensor& tensor, int64_t batch, int64_t y, int64_t x,
                       const float* tile) {
  const int64_t columns = tensor.size[3] - x < kTile ? tensor.size[3] - x : kTile;
  const bool whole = columns == kTile && tensor.stride[3] == 1 && tensor.dtype == UPFEAT_FLOAT32;
  for (int64_t py = 0; py < 2 && y + py < tensor.size[2]; ++py) {
    const Row row = row_of(tensor, batch, y + py);
    for (int64_t k = 0; k < tensor.size[1]; ++k) {
      const float* from = tile + (2 * k + py) * kTile;
      if (whole) {
        float* to = static_cast<float*>(row.at(k, x));
        __builtin_prefetch(to + kTile, 1);
        for (int v = 0; v < kRowVecs; ++v) store(to + v * kLanes, load(from + v * kLanes));
      } else {
        write_run(row.at(k, x), row.column_stride, row.dtype, columns, from);
      }
    }
  }
}
