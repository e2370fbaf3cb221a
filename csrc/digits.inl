// Products of strips of 32 rows with a matrix of weights, in integers, for encoders on machines
// with AMX.
//
// Every row is scaled by its largest number and rounded to 24 bits, which are three signed digits
// of 8 bits; so is every column of the weights. Of the nine products of digits, those that count
// are summed exactly, in tiles of 32-bit integers, by their order of magnitude. A product of tiles
// of bytes has twice as many inputs as one of bfloat16 and takes as long. The rounding is
// normwise: a number far below the largest of its row loses digits. Inputs whose weights are small
// throughout would lose them for nothing, so powers of two are moved from weights to inputs first.

#if defined(UPFEAT_PARTS)

constexpr int64_t kDigitBlock = 64;  // inputs per step
constexpr int kDigits = 3;
constexpr int kLevels = 3;  // orders of magnitude that are summed: six products
constexpr int64_t kProducts = 6;
// Less than 0x7f7f7f, the largest number of three digits, so that rounding up cannot exceed it.
constexpr float kLargest = 8355000.0f;
constexpr int64_t kLevelPlane = kDenseRows * 32;  // integers of one level: 32 rows, 32 outputs

UPFEAT_INLINE int64_t digit_blocks(int64_t inputs) {
  return (inputs + kDigitBlock - 1) / kDigitBlock;
}
// Left operands: kDigits of (blocks, kDenseRows, 64) bytes, the largest digits first; as in
// dense.inl, a cache line separates the digits.
UPFEAT_INLINE int64_t digit_part(int64_t inputs) {
  return kDenseRows * kDigitBlock * digit_blocks(inputs) + 64;
}
UPFEAT_INLINE int64_t digit_left_bytes(int64_t inputs) { return kDigits * digit_part(inputs); }
// Right operands: (width / 32, kDigits, blocks, 2, 16, 16, 4) bytes.
UPFEAT_INLINE int64_t digit_pair_bytes(int64_t inputs) {
  return kDigits * digit_blocks(inputs) * 2048;
}
UPFEAT_INLINE int64_t digit_right_bytes(int64_t inputs, int64_t width) {
  return (width + 31) / 32 * digit_pair_bytes(inputs);
}

// The numbers times `scale`, rounded to integers, plus 0x808080: its bytes are the digits plus 128.
UPFEAT_INLINE __m512i shifted_integers(Vec values, Vec scale) {
  return _mm512_cvtps_epi32((__m512)(values * scale + 8421504.0f));
}

UPFEAT_INLINE __m512i larger_bits(__m512i most, Vec value) {
  return _mm512_max_epu32(most, _mm512_and_si512((__m512i)value, _mm512_set1_epi32(0x7fffffff)));
}

// Numbers of a row, which wait to be divided into digits until their largest is known.
struct DigitRow {
  const float* values;
  int64_t width;
  char* to;  // the row in the first part of the left operand
  int64_t part;
  __m512i most;  // largest magnitude of each lane, as bits

  // Writes the digits, and to `back` the factor that turns integers back into numbers.
  UPFEAT_MEMBER void put(float* back) const {
    const uint32_t bits = _mm512_reduce_max_epu32(most);
    // A row of zeros has any scale, but the smallest would make denormal numbers, which are slow.
    float peak = bits ? bits_float(bits) : 1.0f;
    peak = peak > 1e-30f ? peak : 1e-30f;
    // Infinities and NaN make the whole row NaN.
    *back = bits < 0x7f800000u ? peak * (1.0f / kLargest) : __builtin_nanf("");
    const Vec scale = splat(kLargest / peak);
    const __m512i nothing = _mm512_set1_epi32(0x808080), flip = _mm512_set1_epi8(-128);
    const __m512i order = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    char* at = to;
    for (int64_t c = 0; c < width; c += kDigitBlock, at += kDenseRows * kDigitBlock) {
      __m512i bytes[4];  // in each quarter: four low bytes, four middle bytes, four high bytes
      UPFEAT_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int64_t here = c + i * kLanes;
        const __m512i number =
            here < width ? shifted_integers(load(values + here), scale) : nothing;
        bytes[i] = _mm512_shuffle_epi8(number, order);
      }
      const __m512i low = _mm512_unpacklo_epi32(bytes[0], bytes[1]);
      const __m512i other_low = _mm512_unpacklo_epi32(bytes[2], bytes[3]);
      const __m512i high = _mm512_unpackhi_epi32(bytes[0], bytes[1]);
      const __m512i other_high = _mm512_unpackhi_epi32(bytes[2], bytes[3]);
      const __m512i digits[kDigits] = {_mm512_unpacklo_epi64(high, other_high),
                                       _mm512_unpackhi_epi64(low, other_low),
                                       _mm512_unpacklo_epi64(low, other_low)};
      UPFEAT_UNROLL
      for (int i = 0; i < kDigits; ++i) {
        _mm512_store_si512(at + i * part, _mm512_xor_si512(digits[i], flip));
      }
    }
  }
};

// Packs a right operand. row(k) returns the `width` floats of input k, which are multiplied by
// inputs[k] and by columns[n]. A tile's rows contain inputs 16 j + 4 l to 16 j + 4 l + 3
// at 4 l + j, as put_digits orders them.
template <typename Rows>
static void pack_digits(Rows row, int64_t inputs, int64_t width, const float* factors,
                        const float* columns, char* right) {
  const int64_t blocks = digit_blocks(inputs);
  const __m512i byte = _mm512_set1_epi32(0xff), flip = _mm512_set1_epi8(-128);
  for (int64_t quad = 0; quad < 16 * blocks; ++quad) {
    const int64_t block = quad / 16, at = quad % 16;
    const int64_t first = block * kDigitBlock + at % 4 * 16 + at / 4 * 4;
    for (int64_t n = 0; n < width; n += kLanes) {
      __m512i numbers[4];
      for (int i = 0; i < 4; ++i) {
        numbers[i] = _mm512_set1_epi32(0x808080);
        if (first + i >= inputs) continue;
        numbers[i] = shifted_integers(load(row(first + i) + n) * factors[first + i],
                                      load(columns + n));
      }
      for (int digit = 0; digit < kDigits; ++digit) {
        const unsigned shift = static_cast<unsigned>(8 * (kDigits - 1 - digit));
        __m512i packed = _mm512_setzero_si512();
        for (int i = 0; i < 4; ++i) {
          const __m512i one = _mm512_and_si512(_mm512_srli_epi32(numbers[i], shift), byte);
          packed = _mm512_or_si512(packed, _mm512_slli_epi32(one, static_cast<unsigned>(8 * i)));
        }
        char* to = right + ((n / 32 * kDigits + digit) * blocks + block) * 2048 + n / 16 % 2 * 1024;
        _mm512_store_si512(to + at * 64, _mm512_xor_si512(packed, flip));
      }
    }
  }
}

// Computes the levels of 32 outputs (16 unless `wide`) of a strip, (kLevels, kDenseRows, 32);
// `right` is the part of the operand for these outputs, and `following` is needed next. `between`
// is called kPauses * blocks times.
constexpr int64_t kPauses = 3 * kProducts;
template <typename Between>
UPFEAT_INLINE void multiply_digits(int64_t rows, bool wide, const char* left, int64_t part,
                                   const char* right, const char* following, int64_t blocks,
                                   int32_t* levels, Between between) {
  const bool tall = rows > 16;
  int64_t fetched = 0;
  const auto pause = [&]() UPFEAT_LAMBDA {
    UPFEAT_UNROLL
    for (int line = 0; line < 6; ++line) __builtin_prefetch(following + fetched + line * 64, 0, 3);
    fetched += 384;
    between();
  };
  for (int level = kLevels - 1; level >= 0; --level) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int i = 0; i <= level; ++i) {
      for (int64_t block = 0; block < blocks; ++block) {
        const char* a = left + i * part + block * 2048;
        const char* b = right + ((level - i) * blocks + block) * 2048;
        _tile_loadd(4, a, 64);
        if (tall) _tile_loadd(5, a + 1024, 64);
        _tile_loadd(6, b, 64);
        if (wide) _tile_loadd(7, b + 1024, 64);
        pause();
        _tile_dpbssd(0, 4, 6);
        if (wide) _tile_dpbssd(1, 4, 7);
        pause();
        if (tall) _tile_dpbssd(2, 5, 6);
        if (wide && tall) _tile_dpbssd(3, 5, 7);
        pause();
      }
    }
    int32_t* to = levels + level * kLevelPlane;
    _tile_stored(0, to, 128);
    if (wide) _tile_stored(1, to + 16, 128);
    if (tall) _tile_stored(2, to + 16 * 32, 128);
    if (wide && tall) _tile_stored(3, to + 16 * 32 + 16, 128);
  }
}

// The sum of the levels of a row and 16 outputs, in units of kLevelUnit products of integers.
constexpr float kLevelUnit = 65536.0f;
UPFEAT_INLINE Vec level_sum(const int32_t* at) {
  const auto level = [&](int i) UPFEAT_LAMBDA {
    return (Vec)_mm512_cvtepi32_ps(_mm512_load_si512(at + i * kLevelPlane));
  };
  return (level(0) * 256.0f + level(1)) * 256.0f + level(2);
}

#endif
