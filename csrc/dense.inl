// Products of strips of rows with a matrix: with AMX for attention, without it for encoders.
//
// With AMX, float32 is split into three bfloat16 of 8 bits, and six of the nine products of these
// parts are summed in float32 tiles. The omitted products are below the last bit of float32, so the
// result is as exact as multiply-adds in another order. If the caller prefers speed, float32 is
// split into two parts with three products: 17 bits of each number are used, and a layer has a
// relative error of 2e-6.

constexpr int64_t kDenseRows = 32;

#if defined(UPFEAT_PARTS)

constexpr int64_t kDenseBlock = 32;  // inputs per step

struct Operands {
  const char *left, *right;
};

constexpr int kParts = UPFEAT_PARTS;  // 3 or 2

struct TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

UPFEAT_INLINE int64_t dense_blocks(int64_t inputs) {
  return (inputs + kDenseBlock - 1) / kDenseBlock;
}

// Tiles are configured per thread: a task that uses them must call dense_begin and dense_end.
UPFEAT_INLINE void dense_begin() {
  TileShapes shapes;
  memset(&shapes, 0, sizeof shapes);
  shapes.palette = 1;
  for (int i = 0; i < 8; ++i) {
    shapes.row_bytes[i] = 64;
    shapes.rows[i] = 16;
  }
  // The instruction is declared to read 8 of the 64 bytes; this forces all 64 to be written.
  __asm__ volatile("" : : "r"(&shapes) : "memory");
  _tile_loadconfig(&shapes);
}
UPFEAT_INLINE void dense_end() { _tile_release(); }

// Numbers rounded to 8 bits, still as float32.
UPFEAT_INLINE Vec upper_part(Vec x) {
  return as_float((as_bits(x) + 0x8000) & (IVec{} + static_cast<int32_t>(0xffff0000)));
}
// Converts 32 numbers to bfloat16, those of the first vector before those of the second.
UPFEAT_INLINE __m512i narrowed(Vec first, Vec second) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

// Left operands: kParts of (blocks, kDenseRows, 32) bfloat16. A cache line separates the parts, so
// that values which are written together do not fall into one set of the cache.
UPFEAT_INLINE int64_t left_part(int64_t inputs) {
  return kDenseRows * kDenseBlock * dense_blocks(inputs) + kDenseBlock;
}
UPFEAT_INLINE int64_t left_bytes(int64_t inputs) { return kParts * left_part(inputs) * 2; }
// Writes inputs 32 * block to 32 * block + 31 of a row; get(i) returns the vector of inputs from i
// on, and is called only for i below `width`.
template <typename Get>
UPFEAT_INLINE void put_left(char* left, int64_t inputs, int64_t row, int64_t block, int64_t width,
                            Get get) {
  const int64_t part = left_part(inputs), c = block * kDenseBlock;
  Vec first = get(c), second = c + kLanes < width ? get(c + kLanes) : Vec{};
  uint16_t* to =
      reinterpret_cast<uint16_t*>(left) + (block * kDenseRows + row) * kDenseBlock;
  UPFEAT_UNROLL
  for (int i = 0; i < kParts - 1; ++i) {
    const Vec one = upper_part(first), other = upper_part(second);
    _mm512_store_si512(to + i * part, narrowed(one, other));
    first -= one;
    second -= other;
  }
  _mm512_store_si512(to + (kParts - 1) * part, narrowed(first, second));
}

// Right operands: (width / 32, blocks, kParts, 2, 16, 16, 2) bfloat16, tiles in the order in which
// they are loaded: two columns of tiles at a time, the last parts first.
constexpr int64_t kTileHalves = 512;
constexpr int64_t kStepHalves = 2 * kParts * kTileHalves;  // for 32 inputs and 32 outputs
UPFEAT_INLINE int64_t right_bytes(int64_t inputs, int64_t width) {
  return (width + 31) / 32 * dense_blocks(inputs) * kStepHalves * 2;
}
// Converts two vectors of 16 numbers to bfloat16, interleaved.
UPFEAT_INLINE __m512i beside(Vec first, Vec second) {
  const __m512i low = _mm512_srli_epi32((__m512i)upper_part(first), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaau, low, (__m512i)upper_part(second));
}
// Packs a right operand; row(k) returns the `width` floats of input k.
template <typename Rows>
static void pack_right(Rows row, int64_t inputs, int64_t width, char* right) {
  const int64_t blocks = dense_blocks(inputs);
  for (int64_t k = 0; k < 16 * blocks; ++k) {
    const float* one = 2 * k < inputs ? row(2 * k) : nullptr;
    const float* other = 2 * k + 1 < inputs ? row(2 * k + 1) : nullptr;
    for (int64_t n = 0; n < width; n += 16) {
      uint16_t* to = reinterpret_cast<uint16_t*>(right) +
                     (n / 32 * blocks + k / 16) * kStepHalves + n / 16 % 2 * kTileHalves +
                     k % 16 * 32;
      Vec first = one ? load(one + n) : Vec{}, second = other ? load(other + n) : Vec{};
      for (int i = kParts - 1; i >= 0; --i) {
        _mm512_store_si512(to + 2 * i * kTileHalves, beside(first, second));
        first -= upper_part(first);
        second -= upper_part(second);
      }
    }
  }
}

// Computes the sum, over `count` pairs of operands, of the rows of the left times columns
// [first, end) of the right, to `out` (rows, out_pitch); `first` is a multiple of 32.
UPFEAT_INLINE void multiply_dense(int64_t rows, const Operands* operands, int64_t count,
                                  int64_t inputs, int64_t, int64_t first, int64_t end,
                                  float* out, int64_t out_pitch) {
  const int64_t part = left_part(inputs), blocks = dense_blocks(inputs);
  const bool tall = rows > 16;
  for (int64_t n = first; n < end; n += 32) {
    const bool wide = n + 16 < end;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < count; ++i) {
      const uint16_t* a = reinterpret_cast<const uint16_t*>(operands[i].left);
      const uint16_t* b = reinterpret_cast<const uint16_t*>(operands[i].right) +
                          n / 32 * blocks * kStepHalves;
      for (int64_t k = 0; k < blocks; ++k) {
        const auto take_left = [&](int which) UPFEAT_LAMBDA {
          _tile_loadd(4, a + which * part, 64);
          if (tall) _tile_loadd(5, a + which * part + 16 * kDenseBlock, 64);
        };
        const auto take_right = [&](int which) UPFEAT_LAMBDA {
          _tile_loadd(6, b + 2 * which * kTileHalves, 64);
          if (wide) _tile_loadd(7, b + (2 * which + 1) * kTileHalves, 64);
        };
        const auto add = [&](int line) UPFEAT_LAMBDA {
          _tile_dpbf16ps(0, 4, 6);
          if (wide) _tile_dpbf16ps(1, 4, 7);
          if (tall) _tile_dpbf16ps(2, 5, 6);
          if (wide && tall) _tile_dpbf16ps(3, 5, 7);
          // Prefetches of the next step's tiles, distributed over this step's products.
          constexpr int kLines = kParts == 3 ? 16 : 22;
          UPFEAT_UNROLL
          for (int ahead = 0; ahead < kLines; ++ahead) {
            __builtin_prefetch(b + kStepHalves + (line * kLines + ahead) * 32, 0, 3);
          }
        };
        // Left parts are numbered from the first; right parts from the last, as they are stored.
        // The order of the pairs is one in which few tiles are loaded twice.
        take_left(0);
        for (int which = 0; which < kParts; ++which) {
          take_right(which);
          add(which);
        }
        take_left(1);
        add(kParts);
        if (kParts == 3) {
          take_right(1);
          add(4);
          take_left(2);
          take_right(2);
          add(5);
        }
        a += kDenseRows * kDenseBlock;
        b += kStepHalves;
      }
    }
    float* to = out + n - first;
    const size_t step = static_cast<size_t>(out_pitch) * 4;
    _tile_stored(0, to, step);
    if (wide) _tile_stored(1, to + 16, step);
    if (tall) _tile_stored(2, to + 16 * out_pitch, step);
    if (wide && tall) _tile_stored(3, to + 16 * out_pitch + 16, step);
  }
}

#else

UPFEAT_INLINE void dense_begin() {}
UPFEAT_INLINE void dense_end() {}

// Without AMX, a right operand is divided into panels of as many columns as four rows of the
// product keep in registers: (panels, inputs, columns of a panel). A cache line separates operands,
// which would otherwise fall into the same sets of the cache.
UPFEAT_INLINE int64_t right_bytes(int64_t inputs, int64_t width) {
  return inputs * width * 4 + 64;
}
// Returns the place in the right operand of input k for column n, a multiple of kLanes.
UPFEAT_INLINE float* right_place(char* right, int64_t inputs, int64_t width, int64_t k,
                                 int64_t n) {
  const Blocks panels = blocks_of(width);
  const int64_t vector = n / kLanes;
  // The last panel whose begin() is not after the vector.
  const int64_t index = ((vector + 1) * panels.count - 1) / panels.vectors;
  const int64_t first = panels.begin(index) * kLanes;
  return reinterpret_cast<float*>(right) + first * inputs + k * panels.size(index) * kLanes + n -
         first;
}
template <typename Rows>
static void pack_right(Rows row, int64_t inputs, int64_t width, char* right) {
  for (int64_t k = 0; k < inputs; ++k) {
    const float* from = row(k);
    for (int64_t n = 0; n < width; n += kLanes) {
      store(right_place(right, inputs, width, k, n), load(from + n));
    }
  }
}

// Memory that will soon be read or written, to be prefetched during a product: `step` bytes further
// on for every input. Memory is idle then, and many prefetches at once would stall other accesses.
struct Ahead {
  const char* at;
  int64_t step;
};

// Writes products to (rows, pitch).
struct StoreRows {
  float* out;
  int64_t pitch;

  template <int kBlock>
  UPFEAT_MEMBER void put(const Vec (&sum)[4][kBlock], int64_t row, int64_t column) const {
    UPFEAT_UNROLL
    for (int i = 0; i < 4; ++i) {
      UPFEAT_UNROLL
      for (int m = 0; m < kBlock; ++m) {
        store(out + (row + i) * pitch + column + m * kLanes, sum[i][m]);
      }
    }
  }
};

// Multiplies four rows, `pitch` floats apart, with a panel of kBlock vectors, and gives the
// products to `results`, with their row and column.
template <int kBlock, typename Results>
UPFEAT_APART void multiply_panel(const float* left, int64_t pitch, int64_t inputs,
                                 const float* panel, Ahead ahead, const Results& results,
                                 int64_t row, int64_t column) {
  Vec sum[4][kBlock];
  UPFEAT_UNROLL
  for (int i = 0; i < 4; ++i) {
    UPFEAT_UNROLL
    for (int m = 0; m < kBlock; ++m) sum[i][m] = Vec{};
  }
  const float *a0 = left, *a1 = a0 + pitch, *a2 = a1 + pitch, *a3 = a2 + pitch;
  int64_t k = 0;
  do {
    Vec right[kBlock];
    UPFEAT_UNROLL
    for (int m = 0; m < kBlock; ++m) right[m] = in_register(load(panel + m * kLanes));
    const float values[4] = {a0[k], a1[k], a2[k], a3[k]};
    UPFEAT_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Vec value = splat(values[i]);
      UPFEAT_UNROLL
      for (int m = 0; m < kBlock; ++m) sum[i][m] += value * right[m];
    }
    panel += kBlock * kLanes;
    __builtin_prefetch(ahead.at, 1, 2);
    ahead.at += ahead.step;
  } while (++k < inputs);
  results.template put<kBlock>(sum, row, column);
}

// Multiplies `rows` rows, rounded up to a multiple of 4, with a right operand, whose columns are
// `width`. ahead() returns what to prefetch during the next four rows times a panel.
template <typename Results, typename GetAhead>
UPFEAT_INLINE void multiply_dense(int64_t rows, const float* left, int64_t pitch, int64_t inputs,
                                  const char* right, int64_t width, const Results& results,
                                  GetAhead ahead) {
  const Blocks panels = blocks_of(width);
  for (int64_t index = 0; index < panels.count; ++index) {
    const int64_t first = panels.begin(index) * kLanes;
    const float* panel = reinterpret_cast<const float*>(right) + first * inputs;
    for (int64_t i = 0; i < rows; i += 4) {
      const auto panel_of = [&](auto multiply) UPFEAT_LAMBDA {
        multiply(left + i * pitch, pitch, inputs, panel, ahead(), results, i, first);
      };
      switch (panels.size(index)) {
        case 1:
          panel_of(multiply_panel<1, Results>);
          break;
        case 2:
          panel_of(multiply_panel<2, Results>);
          break;
        case 3:
          panel_of(multiply_panel<kMaxBlock >= 3 ? 3 : 1, Results>);
          break;
        case 4:
          panel_of(multiply_panel<kMaxBlock >= 4 ? 4 : 1, Results>);
          break;
        case 5:
          panel_of(multiply_panel<kMaxBlock >= 5 ? 5 : 1, Results>);
          break;
        default:
          panel_of(multiply_panel<kMaxBlock >= 6 ? 6 : 1, Results>);
      }
    }
  }
}

#endif
