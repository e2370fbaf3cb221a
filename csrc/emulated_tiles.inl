// The instructions for matrix tiles (AMX) in plain code, hundreds of times slower, so that the
// kernels that use them can be tested on machines without them (csrc/emulate.sh). Vectors of
// bfloat16 (AVX512-BF16) are still needed.

#if defined(UPFEAT_PARTS) && defined(UPFEAT_EMULATE_TILES)

constexpr int kTileRegisters = 8;

struct EmulatedTile {
  alignas(64) uint8_t bytes[16][64];
};

// State of a thread, as on the machine: the shapes of the tiles, and their contents.
static thread_local EmulatedTile emulated_tiles[kTileRegisters];
static thread_local int emulated_rows[kTileRegisters], emulated_row_bytes[kTileRegisters];
static thread_local bool emulated_configured = false;

// Without a configuration, these instructions fault.
static EmulatedTile& emulated_tile(int which) {
  if (!emulated_configured) __builtin_trap();
  return emulated_tiles[which];
}

static void emulated_zero(int which) { memset(&emulated_tile(which), 0, sizeof(EmulatedTile)); }

static void emulated_loadconfig(const void* shapes) {
  const uint8_t* bytes = static_cast<const uint8_t*>(shapes);
  if (bytes[0] != 1) __builtin_trap();
  emulated_configured = true;
  for (int i = 0; i < kTileRegisters; ++i) {
    uint16_t row_bytes;
    memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
    emulated_row_bytes[i] = row_bytes;
    emulated_rows[i] = bytes[48 + i];
    emulated_zero(i);
  }
}
static void emulated_release() { emulated_configured = false; }

static void emulated_loadd(int which, const void* base, int64_t stride) {
  emulated_zero(which);
  for (int row = 0; row < emulated_rows[which]; ++row) {
    memcpy(emulated_tiles[which].bytes[row], static_cast<const char*>(base) + row * stride,
           static_cast<size_t>(emulated_row_bytes[which]));
  }
}
static void emulated_stored(int which, void* base, int64_t stride) {
  const EmulatedTile& tile = emulated_tile(which);
  for (int row = 0; row < emulated_rows[which]; ++row) {
    memcpy(static_cast<char*>(base) + row * stride, tile.bytes[row],
           static_cast<size_t>(emulated_row_bytes[which]));
  }
}

// Calls add(sums, left, right) for each row of sums, four bytes of its row of the left tile, and
// the row of the right tile that they are multiplied with.
template <typename Add>
static void emulated_products(int sums, int left, int right, Add add) {
  EmulatedTile& out = emulated_tile(sums);
  for (int row = 0; row < emulated_rows[sums]; ++row) {
    for (int k = 0; k < emulated_row_bytes[left] / 4; ++k) {
      add(out.bytes[row], emulated_tiles[left].bytes[row] + 4 * k, emulated_tiles[right].bytes[k],
          emulated_row_bytes[sums] / 4);
    }
  }
}
static float widened_half(const uint8_t* from) {
  uint16_t half;
  memcpy(&half, from, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static void emulated_dpbf16ps(int sums, int left, int right) {
  const auto add = [](uint8_t* out, const uint8_t* a, const uint8_t* b, int columns) {
    float* to = reinterpret_cast<float*>(out);
    for (int part = 0; part < 2; ++part) {
      const float factor = widened_half(a + 2 * part);
      for (int n = 0; n < columns; ++n) to[n] += factor * widened_half(b + 4 * n + 2 * part);
    }
  };
  emulated_products(sums, left, right, add);
}
static void emulated_dpbssd(int sums, int left, int right) {
  const auto add = [](uint8_t* out, const uint8_t* a, const uint8_t* b, int columns) {
    int32_t* to = reinterpret_cast<int32_t*>(out);
    for (int part = 0; part < 4; ++part) {
      const int factor = static_cast<int8_t>(a[part]);
      for (int n = 0; n < columns; ++n) to[n] += factor * static_cast<int8_t>(b[4 * n + part]);
    }
  };
  emulated_products(sums, left, right, add);
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#define _tile_zero emulated_zero
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_dpbf16ps emulated_dpbf16ps
#define _tile_dpbssd emulated_dpbssd

#endif
