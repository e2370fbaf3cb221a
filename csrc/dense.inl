// Strips of 32 rows times a matrix of weights, for encoders.
//
// With AMX, float32 is taken apart into three bfloat16 of 8 bits each, and six of the nine products
// of parts are summed in float32 tiles: what is left out lies below the last bit of float32. It is
// as exact as multiply-adds in another order, at two to three times their speed.

constexpr int64_t kDenseRows = 32;

#if defined(__AMX_BF16__)

struct TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

UPFEAT_INLINE int64_t dense_depth(int64_t inputs) { return (inputs + 31) / 32 * 32; }

// Tiles belong to a thread; a task that uses them says when it begins and ends.
UPFEAT_INLINE void dense_begin() {
  TileShapes shapes;
  memset(&shapes, 0, sizeof shapes);
  shapes.palette = 1;
  for (int i = 0; i < 8; ++i) {
    shapes.row_bytes[i] = 64;
    shapes.rows[i] = 16;
  }
  // The instruction's declaration names 8 of the 64 bytes: without this the rest is never written.
  __asm__ volatile("" : : "r"(&shapes) : "memory");
  _tile_loadconfig(&shapes);
}
UPFEAT_INLINE void dense_end() { _tile_release(); }

UPFEAT_INLINE __m256i upper_half(Vec value) { return (__m256i)_mm512_cvtneps_pbh((__m512)value); }
UPFEAT_INLINE Vec widen(__m256i halves) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}

// Left operands: (3, kDenseRows, depth) bfloat16.
UPFEAT_INLINE int64_t left_bytes(int64_t inputs) { return 3 * kDenseRows * dense_depth(inputs) * 2; }
UPFEAT_INLINE void put_left(char* left, int64_t inputs, int64_t row, int64_t c, Vec value) {
  const int64_t depth = dense_depth(inputs), part = kDenseRows * depth;
  uint16_t* to = reinterpret_cast<uint16_t*>(left) + row * depth + c;
  const __m256i high = upper_half(value);
  value = value - widen(high);
  const __m256i middle = upper_half(value);
  value = value - widen(middle);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), high);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + part), middle);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * part), upper_half(value));
}

// Right operands: (3, depth / 2, width, 2) bfloat16, pairs of rows side by side.
UPFEAT_INLINE int64_t right_bytes(int64_t inputs, int64_t width) {
  return 3 * dense_depth(inputs) * width * 2;
}
static void pack_right(const float* weight, int64_t pitch, int64_t inputs, int64_t width,
                       char* right) {
  const int64_t depth = dense_depth(inputs), part = depth * width;
  uint16_t* to = reinterpret_cast<uint16_t*>(right);
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t n = 0; n < width; ++n) {
      float value = k < inputs ? weight[k * pitch + n] : 0;
      for (int split = 0; split < 3; ++split) {
        const uint16_t half = to_bfloat16(value);
        to[split * part + (k / 2 * width + n) * 2 + k % 2] = half;
        value -= from_bfloat16(half);
      }
    }
  }
}

#define UPFEAT_TILES(a)        \
  _tile_dpbf16ps(0, 4, 6);     \
  if (wide) _tile_dpbf16ps(1, 4, 7);   \
  if (tall) _tile_dpbf16ps(2, 5, 6);   \
  if (wide && tall) _tile_dpbf16ps(3, 5, 7)

// Rows of the left times columns [first, end) of the right, to `out` (rows, out_pitch).
static void multiply_dense(int64_t rows, const char* left, int64_t inputs, const char* right,
                           int64_t width, int64_t first, int64_t end, float* out,
                           int64_t out_pitch) {
  const int64_t depth = dense_depth(inputs), left_part = kDenseRows * depth;
  const int64_t right_part = depth * width;
  const uint16_t* a = reinterpret_cast<const uint16_t*>(left);
  const uint16_t* b = reinterpret_cast<const uint16_t*>(right);
  const bool tall = rows > 16;
  const size_t left_step = static_cast<size_t>(depth) * 2, right_step = static_cast<size_t>(width) * 4;
  for (int64_t n = first; n < end; n += 32) {
    const bool wide = n + 16 < end;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += 32) {
      const auto take_left = [&](int64_t part) __attribute__((always_inline)) {
        _tile_loadd(4, a + part * left_part + k, left_step);
        if (tall) _tile_loadd(5, a + part * left_part + 16 * depth + k, left_step);
      };
      const auto take_right = [&](int64_t part) __attribute__((always_inline)) {
        const uint16_t* from = b + part * right_part + (k / 2 * width + n) * 2;
        _tile_loadd(6, from, right_step);
        if (wide) _tile_loadd(7, from + 32, right_step);
      };
      take_left(0);
      take_right(2);
      UPFEAT_TILES();
      take_right(1);
      UPFEAT_TILES();
      take_left(1);
      UPFEAT_TILES();
      take_right(0);
      UPFEAT_TILES();
      take_left(2);
      UPFEAT_TILES();
      take_left(0);
      UPFEAT_TILES();
    }
    float* to = out + n - first;
    const size_t step = static_cast<size_t>(out_pitch) * 4;
    _tile_stored(0, to, step);
    if (wide) _tile_stored(1, to + 16, step);
    if (tall) _tile_stored(2, to + 16 * out_pitch, step);
    if (wide && tall) _tile_stored(3, to + 16 * out_pitch + 16, step);
  }
}
#undef UPFEAT_TILES

#else

UPFEAT_INLINE void dense_begin() {}
UPFEAT_INLINE void dense_end() {}
UPFEAT_INLINE int64_t left_bytes(int64_t inputs) { return kDenseRows * whole_vectors(inputs) * 4; }
UPFEAT_INLINE void put_left(char* left, int64_t inputs, int64_t row, int64_t c, Vec value) {
  store(reinterpret_cast<float*>(left) + row * whole_vectors(inputs) + c, value);
}
// The right operand is used as it is, (inputs, width).
UPFEAT_INLINE int64_t right_bytes(int64_t inputs, int64_t width) { return inputs * width * 4; }
static void pack_right(const float* weight, int64_t pitch, int64_t inputs, int64_t width,
                       char* right) {
  float* to = reinterpret_cast<float*>(right);
  for (int64_t k = 0; k < inputs; ++k) {
    memcpy(to + k * width, weight + k * pitch, static_cast<size_t>(width) * 4);
  }
}
static void multiply_dense(int64_t rows, const char* left, int64_t inputs, const char* right,
                           int64_t width, int64_t first, int64_t end, float* out,
                           int64_t out_pitch) {
  multiply_rows((rows + 3) / 4 * 4, reinterpret_cast<const float*>(left), whole_vectors(inputs), 1,
                reinterpret_cast<const float*>(right) + first, nullptr, 1, inputs, width, out,
                out_pitch, (end - first) / kLanes);
}

#endif
