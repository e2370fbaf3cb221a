// Vectors of kLanes floats by the compiler's vector extensions, so that one source serves AVX-512,
// AVX2, SSE2 and NEON. Included inside the anonymous namespace of kernels.cpp.

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kMaxBlock = 6;  // channel vectors per output in registers: 4 * 6 of 32 for 4 outputs
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kMaxBlock = 3;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kMaxBlock = 6;
#else
constexpr int kLanes = 4;
constexpr int kMaxBlock = 2;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef Vec LooseVec __attribute__((aligned(4), may_alias));
typedef IVec LooseIVec __attribute__((aligned(4), may_alias));

constexpr int kRowVecs = static_cast<int>(kTile) / kLanes;  // vectors in one row of a tile
constexpr int kTileVecs = 2 * kRowVecs;                     // vectors in a tile (two rows)
constexpr int64_t kTilePixels = 2 * kTile;

#define UPFEAT_INLINE static inline __attribute__((always_inline))
// For functions long enough that the call costs nothing: not inlined, they get all registers.
#define UPFEAT_APART static __attribute__((noinline))
// Small constant loops over registers must be unrolled before registers are allocated.
#define UPFEAT_UNROLL _Pragma("GCC unroll 16")
#define UPFEAT_LAMBDA __attribute__((always_inline))
#define UPFEAT_APART_MEMBER __attribute__((noinline))
#define UPFEAT_MEMBER inline __attribute__((always_inline))

// `count` rounded up to whole vectors.
UPFEAT_INLINE int64_t whole_vectors(int64_t count) {
  return (count + kLanes - 1) / kLanes * kLanes;
}

UPFEAT_INLINE Vec load(const float* from) { return *reinterpret_cast<const LooseVec*>(from); }
UPFEAT_INLINE void store(float* to, Vec value) { *reinterpret_cast<LooseVec*>(to) = value; }
// Stores past the caches, for outputs larger than the caches; the thread must call fence_streams()
// afterwards.
UPFEAT_INLINE void stream(float* to, Vec value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, value);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, value);
#elif defined(__SSE__)
  _mm_stream_ps(to, value);
#else
  store(to, value);
#endif
}
UPFEAT_INLINE void fence_streams() {
#if defined(__SSE__)
  _mm_sfence();
#endif
}
UPFEAT_INLINE Vec splat(float value) { return value - Vec{}; }  // v - 0 is v; -0 + 0 would be 0
// Keeps the compiler from loading a value again from memory at each use, and from fusing a product
// with the operation that follows.
UPFEAT_INLINE Vec in_register(Vec value) {
#if defined(__SSE__)
  __asm__("" : "+v"(value));
#elif defined(__aarch64__)
  __asm__("" : "+w"(value));
#endif
  return value;
}
// A cast between vector types of one size keeps the bits.
UPFEAT_INLINE Vec as_float(IVec bits) { return (Vec)bits; }
UPFEAT_INLINE IVec as_bits(Vec value) { return (IVec)value; }
UPFEAT_INLINE Vec select(IVec mask, Vec yes, Vec no) {
  return as_float((mask & as_bits(yes)) | (~mask & as_bits(no)));
}
// Both return the second argument if either is NaN, as the instructions do.
#if defined(__AVX512F__)
UPFEAT_INLINE Vec max(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
UPFEAT_INLINE Vec min(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
#else
UPFEAT_INLINE Vec max(Vec a, Vec b) { return select(a > b, a, b); }
UPFEAT_INLINE Vec min(Vec a, Vec b) { return select(a < b, a, b); }
#endif

#if defined(__clang__)
#define UPFEAT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define UPFEAT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (IVec{__VA_ARGS__}))
#endif

// Interleave the lower halves, or the upper halves, of two vectors: a0 b0 a1 b1 ...
UPFEAT_INLINE Vec zip_low(Vec a, Vec b) {
#if defined(__AVX512F__)
  return UPFEAT_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX2__)
  return UPFEAT_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return UPFEAT_SHUFFLE(a, b, 0, 4, 1, 5);
#endif
}
UPFEAT_INLINE Vec zip_high(Vec a, Vec b) {
#if defined(__AVX512F__)
  return UPFEAT_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  return UPFEAT_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return UPFEAT_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}
// Adds the halves of a and of b; each pair of neighbouring lanes has a partial sum of a and one of
// b.
UPFEAT_INLINE Vec add_halves(Vec a, Vec b) { return zip_low(a, b) + zip_high(a, b); }

// Transposes kLanes rows in place, by log2(kLanes) perfect shuffles.
UPFEAT_INLINE void transpose(Vec* rows) {
  Vec other[kLanes];
  UPFEAT_UNROLL
  for (int round = 1; round < kLanes; round *= 2) {
    UPFEAT_UNROLL
    for (int i = 0; i < kLanes / 2; ++i) {
      other[2 * i] = zip_low(rows[i], rows[i + kLanes / 2]);
      other[2 * i + 1] = zip_high(rows[i], rows[i + kLanes / 2]);
    }
    UPFEAT_UNROLL
    for (int i = 0; i < kLanes; ++i) rows[i] = other[i];
  }
}

// Lane i of the result is the sum of the lanes of rows[i].
UPFEAT_INLINE Vec transpose_sum(Vec* rows) {
  UPFEAT_UNROLL
  for (int count = kLanes / 2; count > 0; count /= 2) {
    UPFEAT_UNROLL
    for (int i = 0; i < count; ++i) rows[i] = add_halves(rows[i], rows[i + count]);
  }
  return rows[0];
}

// exp: e^x to two ulp; x is clamped to -87 <= x <= 88, so far below the result is about 1e-38, not
// 0. NaN stays NaN, because min and max return their second argument. exp_within requires the
// range.
UPFEAT_INLINE Vec exp_within(Vec x) {  // for -87 <= x <= 88
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Vec shifted = x * 1.44269504f + magic;
  const Vec whole = shifted - magic;
  Vec r = x - whole * 0.693145752f;  // ln 2 in two parts
  r = r - whole * 1.42860677e-6f;
  Vec p = splat(1.0f / 5040.0f);  // Taylor, |r| <= ln(2)/2
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const IVec power = (as_bits(shifted) - as_bits(magic)) << 23;
  return as_float(as_bits(p) + power);
}
UPFEAT_INLINE Vec exp(Vec x) { return exp_within(max(splat(-87.0f), min(splat(88.0f), x))); }

#if defined(__AVX512F__)
// 2^x, with a relative error of 7e-8 besides that of x; 0 below 2^-149. Each operation is done in
// all kCount vectors before the next, which waits for it.
template <int kCount>
UPFEAT_INLINE void powers_of_two(const Vec* x, Vec* powers) {
  // A polynomial for 2^r on [-1/2, 1/2], from the highest power down.
  constexpr float kTerms[6] = {0.00132764713f, 0.00967554096f, 0.0555071309f,
                               0.240221202f,   0.693146944f,   1.00000012f};
  Vec r[kCount];
  UPFEAT_UNROLL
  for (int i = 0; i < kCount; ++i) r[i] = (Vec)_mm512_reduce_ps((__m512)x[i], 8);
  UPFEAT_UNROLL
  for (int i = 0; i < kCount; ++i) powers[i] = splat(kTerms[0]);
  UPFEAT_UNROLL
  for (int term = 1; term < 6; ++term) {
    UPFEAT_UNROLL
    for (int i = 0; i < kCount; ++i) powers[i] = powers[i] * r[i] + kTerms[term];
  }
  UPFEAT_UNROLL
  for (int i = 0; i < kCount; ++i) {
    powers[i] = (Vec)_mm512_scalef_ps((__m512)powers[i], (__m512)(x[i] - r[i]));
  }
}
#endif

// e^x for x <= 0 in kCount vectors, for weights relative to the largest; NaN stays NaN. Below
// 2^-100, a weight is 0: it would change no digit of a weighted mean, and as a denormal number,
// which it could become when it is normalised, it would take a hundred times as long.
constexpr float kFaint = -69.3147181f;
template <int kCount>
UPFEAT_INLINE void falling_exps(Vec* x) {
#if defined(__AVX512F__)
  Vec scaled[kCount], powers[kCount];
  UPFEAT_UNROLL
  for (int i = 0; i < kCount; ++i) scaled[i] = max(splat(kFaint), x[i]) * 1.44269504f;
  powers_of_two<kCount>(scaled, powers);
  UPFEAT_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const __m512 faint = (__m512)splat(kFaint);
    const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x[i], faint, _CMP_NLT_UQ);
    x[i] = (Vec)_mm512_maskz_mov_ps(counts, (__m512)powers[i]);
  }
#else
  UPFEAT_UNROLL
  for (int i = 0; i < kCount; ++i) {
    x[i] = select(x[i] < splat(kFaint), Vec{}, exp_within(max(splat(kFaint), x[i])));
  }
#endif
}
UPFEAT_INLINE Vec falling_exp(Vec x) {
  falling_exps<1>(&x);
  return x;
}
// A logit less the largest one, which was rounded: fused, they would differ by its rounding error.
UPFEAT_INLINE Vec below_top(Vec value, Vec factor, Vec top) {
  return in_register(value * factor) - top;
}

// x * Phi(x), with Phi the normal distribution function; Phi - 1/2 is approximated by an odd
// rational function on |x| <= 5.6 (error 1e-8 before rounding).
UPFEAT_INLINE Vec gelu(Vec x) {
  const Vec z = max(min(x, splat(5.6f)), splat(-5.6f));
  const Vec t = z * z;
  Vec p = splat(2.2145382416738357e-08f);
  p = p * t + 6.356488029268803e-06f;
  p = p * t + 0.00017384780221618712f;
  p = p * t + 0.0047072418965399265f;
  p = p * t + 0.03437584266066551f;
  p = p * t + 0.398942232131958f;
  Vec q = splat(1.1802106882896624e-06f);
  q = q * t + 7.510084833484143e-05f;
  q = q * t + 0.0019129619468003511f;
  q = q * t + 0.028939932584762573f;
  q = q * t + 0.25283318758010864f;
  q = q * t + 1.0f;
  return x * (z * p / q + 0.5f);
}

#if defined(__AVX512F__)
// Bits of 2^(i / 32), less i * 2^18.
alignas(64) static const int32_t kRoots[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a,
    0x3f79c3d3, 0x3f78f4f0, 0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043,
    0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6, 0x3f7504f3, 0x3f74fbaf,
    0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba,
    0x3f7d257d, 0x3f7e83b3};
#endif

// Replaces x by x / (1 + e^-x), in kCount vectors, one operation in all of them at a time, as each
// waits for the one before. With AVX-512, the power is a number from a table, whose exponent is
// changed, times a short polynomial, and an approximate reciprocal of 14 bits is refined to twice
// as many: multiply-adds take time from the products, and a division takes four times as long.
template <int kCount>
UPFEAT_INLINE void silu(Vec* x) {
#if defined(__AVX512F__)
  const __m512 first = _mm512_castsi512_ps(_mm512_load_si512(kRoots));
  const __m512 second = _mm512_castsi512_ps(_mm512_load_si512(kRoots + 16));
  const Vec magic = splat(393216.0f);  // 1.5 * 2^18: adding it rounds to a multiple of 1/32
  Vec shifted[kCount], below[kCount], guess[kCount];
  UPFEAT_UNROLL
  for (int i = 0; i < kCount; ++i) {
    // In a range in which neither the power nor its reciprocal underflows.
    below[i] = max(splat(-120.0f), min(splat(120.0f), x[i] * -1.44269504f));
  }
  UPFEAT_UNROLL
  for (int i = 0; i < kCount; ++i) shifted[i] = below[i] + magic;
  UPFEAT_UNROLL
  for (int i = 0; i < kCount; ++i) below[i] -= in_register(shifted[i]) - magic;
  UPFEAT_UNROLL
  for (int i = 0; i < kCount; ++i) guess[i] = below[i] * 0.2402265f + 0.69314718f;
  UPFEAT_UNROLL
  for (int i = 0; i < kCount; ++i) below[i] = guess[i] * below[i] + 1.0f;
  UPFEAT_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const __m512 root = _mm512_permutex2var_ps(first, (__m512i)as_bits(shifted[i]), second);
    guess[i] = as_float((IVec)(__m512i)root + (as_bits(shifted[i]) << 18));
  }
  UPFEAT_UNROLL
  for (int i = 0; i < kCount; ++i) below[i] = below[i] * guess[i] + 1.0f;
  UPFEAT_UNROLL
  for (int i = 0; i < kCount; ++i) guess[i] = (Vec)_mm512_rcp14_ps((__m512)below[i]);
  UPFEAT_UNROLL
  for (int i = 0; i < kCount; ++i) x[i] = x[i] * guess[i] * (2.0f - below[i] * guess[i]);
#else
  UPFEAT_UNROLL
  for (int i = 0; i < kCount; ++i) x[i] = x[i] / (exp(-x[i]) + 1.0f);
#endif
}
UPFEAT_INLINE Vec silu(Vec x) {
  silu<1>(&x);
  return x;
}

UPFEAT_INLINE float lane_sum(Vec value) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += value[i];
  return sum;
}
