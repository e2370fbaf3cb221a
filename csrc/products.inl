// Small matrix products: four rows of one operand against vectors of the other.

// sum[i][m] = sum over k of a[i][k * a_step] * b[k][m], with k over rows x columns of b.
struct Product {
  const float* a[4];
  int64_t a_step;
  const float* b;
  const int64_t* row;  // offsets of b's rows, or null for a single row
  int64_t rows, columns, b_step;
  float* out[4];
  bool add;
};

template <int kBlock>
UPFEAT_APART void multiply_block(const Product& job, int64_t at) {
  Vec sum[4][kBlock];
  UPFEAT_UNROLL
  for (int i = 0; i < 4; ++i) {
    UPFEAT_UNROLL
    for (int m = 0; m < kBlock; ++m) sum[i][m] = Vec{};
  }
  const float *a0 = job.a[0], *a1 = job.a[1], *a2 = job.a[2], *a3 = job.a[3];
  const int64_t a_step = job.a_step, b_step = job.b_step;
  int64_t r = 0;
  do {
    const float* b = job.b + (job.row ? job.row[r] : 0) + at;
    int64_t k = job.columns;
    do {
      Vec right[kBlock];
      UPFEAT_UNROLL
      for (int m = 0; m < kBlock; ++m) right[m] = in_register(load(b + m * kLanes));
      const float left[4] = {*a0, *a1, *a2, *a3};
      UPFEAT_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Vec value = splat(left[i]);
        UPFEAT_UNROLL
        for (int m = 0; m < kBlock; ++m) sum[i][m] += value * right[m];
      }
      b += b_step;
      a0 += a_step;
      a1 += a_step;
      a2 += a_step;
      a3 += a_step;
    } while (--k);
  } while (++r < job.rows);
  UPFEAT_UNROLL
  for (int i = 0; i < 4; ++i) {
    UPFEAT_UNROLL
    for (int m = 0; m < kBlock; ++m) {
      float* to = job.out[i] + at + m * kLanes;
      store(to, job.add ? load(to) + sum[i][m] : sum[i][m]);
    }
  }
}

UPFEAT_INLINE void multiply(const Product& job, int64_t vectors) {
  const Blocks blocks = blocks_of(vectors * kLanes);
  for (int64_t index = 0; index < blocks.count; ++index) {
    const int64_t at = blocks.begin(index) * kLanes;
    switch (blocks.size(index)) {
      case 1:
        multiply_block<1>(job, at);
        break;
      case 2:
        multiply_block<2>(job, at);
        break;
      case 3:
        multiply_block<kMaxBlock >= 3 ? 3 : 1>(job, at);
        break;
      case 4:
        multiply_block<kMaxBlock >= 4 ? 4 : 1>(job, at);
        break;
      case 5:
        multiply_block<kMaxBlock >= 5 ? 5 : 1>(job, at);
        break;
      default:
        multiply_block<kMaxBlock >= 6 ? 6 : 1>(job, at);
    }
  }
}

// Multiplies `rows` rows of a, four at a time, with b; a and out have pitches of their own.
UPFEAT_INLINE void multiply_rows(int64_t rows, const float* a, int64_t a_pitch, int64_t a_step,
                                 const float* b, const int64_t* row, int64_t b_rows,
                                 int64_t columns, int64_t b_step, float* out, int64_t out_pitch,
                                 int64_t vectors, bool add = false) {
  for (int64_t i = 0; i < rows; i += 4) {
    Product job{};
    for (int j = 0; j < 4; ++j) {
      job.a[j] = a + (i + j) * a_pitch;
      job.out[j] = out + (i + j) * out_pitch;
    }
    job.a_step = a_step;
    job.b = b;
    job.row = row;
    job.rows = b_rows;
    job.columns = columns;
    job.b_step = b_step;
    job.add = add;
    multiply(job, vectors);
  }
}
