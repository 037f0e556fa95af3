// y = x W^T, the same bits for every number of rows of x.
//
// The summed axis is cut into blocks (a quantisation group, or 64 elements) and the blocks into RANGES ranges. A block's
// sum of code * x is made by mma, where codes are exact; scaled, it is added to its range; ranges are added in their
// order. So each output is a fixed sequence of roundings, whichever of the kernels makes it.
//
// BITS: 4 or 8, codes with a scale and a bias for each GROUP of a row; or 16, elements of T.
//
// Weights are laid out as a warp reads them (`layout.rs`): sixteen rows of a block stand together, in vectors of which
// each lane has its own.

constexpr int RANGES = 16;

// What is done with sums before they are written: bits of `mode`.
constexpr int ADD_BIAS = 1;
constexpr int ADD_RESIDUAL = 2;
// Rows of W come as eight of the gate, eight of the other factor: silu(gate) * other is written.
constexpr int GATED = 4;

template <typename T, typename Out>
struct Linear {
  const T* x;                 // [m, k]
  const unsigned char* codes; // [n / 16, k / BLOCK] of Tile::BYTES
  const T* scales;            // [n / 16, k / GROUP, 8]: scale and bias of row i, of row i + 8
  const T* bias;              // [n]
  const T* residual;          // [m, n]
  Out* out;                   // [m, n], or [m, n / 2] where GATED
  int m;
  int n;
  int k;
  int mode;
};

template <int WORDS>
DEVICE void load_words(unsigned (&word)[WORDS], const void* from) {
  if constexpr (WORDS >= 4) {
#pragma unroll
    for (int i = 0; i < WORDS / 4; ++i) {
      uint4 v = reinterpret_cast<const uint4*>(from)[i];
      word[4 * i] = v.x;
      word[4 * i + 1] = v.y;
      word[4 * i + 2] = v.z;
      word[4 * i + 3] = v.w;
    }
  } else {
    static_assert(WORDS == 2, "rows of a block are read in vectors of eight or sixteen bytes");
    uint2 v = *reinterpret_cast<const uint2*>(from);
    word[0] = v.x;
    word[1] = v.y;
  }
}

// Weights are read once: they pass by the first-level cache.
template <int WORDS>
DEVICE void stream_words(unsigned (&word)[WORDS], const void* from) {
  if constexpr (WORDS == 4) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
        : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3]) : "l"(from));
  } else {
    static_assert(WORDS == 2, "vectors have eight or sixteen bytes");
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "l"(from));
  }
}

// What a code becomes is a number of T: SIGN times the code, plus OFFSET, exactly. Scales and biases make up for that.
template <typename T, int BITS>
constexpr float SIGN = 1;
template <>
constexpr float SIGN<Bf16, 8> = -1;

template <typename T, int BITS>
constexpr float OFFSET = 0;
template <>
constexpr float OFFSET<Bf16, 4> = 128;
template <>
constexpr float OFFSET<F16, 4> = 1024;
template <>
constexpr float OFFSET<F16, 8> = 1024;

// Codes as numbers of T, in pairs: those of four bits that stand at the same place in both halves of a word, or bytes
// `first` and `first + 1` of a word.
template <typename T, int BITS>
struct Codes;

template <>
struct Codes<Bf16, 4> {
  DEVICE static unsigned pair(unsigned word, int at) { return ((word >> at) & 0x000F000F) | 0x43004300; }
};

template <>
struct Codes<F16, 4> {
  DEVICE static unsigned pair(unsigned word, int at) { return ((word >> at) & 0x000F000F) | 0x64006400; }
};

// As the low bits of 128, a byte gives t = 128 + code below 128, and 2 code from there on: the exponent is one more. So
// code = t / 2 - max(0, 128 - t / 2), without rounding. With -t it is -code, in two operations.
template <>
struct Codes<Bf16, 8> {
  DEVICE static unsigned pair(unsigned word, int first) {
    unsigned minus_t = __byte_perm(word, 0xC3C3C3C3, 0x4040 + 0x101 * first + 0x0100);
    unsigned rest, minus_code;
    asm("fma.rn.relu.bf16x2 %0, %1, %2, %3;" : "=r"(rest) : "r"(minus_t), "r"(0x3F003F00), "r"(0x43004300));
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(minus_code) : "r"(minus_t), "r"(0x3F003F00), "r"(rest));
    return minus_code;
  }
};

template <>
struct Codes<F16, 8> {
  DEVICE static unsigned pair(unsigned word, int first) {
    return __byte_perm(word, 0x64646464, 0x4040 + 0x101 * first + 0x0100);
  }
};

// A lane's codes of one row of a block become its places of A.
template <typename T, int BITS, int STEPS>
DEVICE void to_places(const unsigned* word, unsigned (&low)[STEPS], unsigned (&high)[STEPS]) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    if constexpr (BITS == 16) {
      low[step] = word[2 * step];
      high[step] = word[2 * step + 1];
    } else if constexpr (BITS == 8) {
      low[step] = Codes<T, 8>::pair(word[step], 0);
      high[step] = Codes<T, 8>::pair(word[step], 2);
    } else {
      low[step] = Codes<T, 4>::pair(word[step / 2], step % 2 * 8);
      high[step] = Codes<T, 4>::pair(word[step / 2], step % 2 * 8 + 4);
    }
  }
}

// Sixteen rows of W in one warp's registers, a block at a time. Lane l has of rows l / 4 and l / 4 + 8 the quarter l % 4
// of the block.
template <typename T, int BITS, int GROUP>
struct Tile {
  static constexpr int BLOCK = GROUP < 64 ? GROUP : 64;
  static constexpr int STEPS = BLOCK / 16;
  static constexpr int WORDS = STEPS * 4 * BITS / 32; // of a row, to a lane
  static constexpr int VECTOR = 2 * WORDS < 4 ? 2 * WORDS : 4; // words
  static constexpr int VECTORS = 2 * WORDS / VECTOR; // of a lane
  static constexpr int BYTES = 2 * WORDS * 4 * 32;
  static constexpr bool IS_QUANTIZED = BITS < 16;
  static constexpr int SCALE_BYTES = IS_QUANTIZED ? 64 : 0; // of a group

  // Scales and biases of a lane's two rows, not converted before they are used: that would wait for them.
  struct Scales {
    T scale[2];
    T bias[2];
  };

  // A lane's words of a block: of one in shared memory, or of one of the weight.
  template <bool IS_STAGED>
  DEVICE static void load(unsigned (&word)[2 * WORDS], const unsigned char* block) {
    const unsigned char* from = block + threadIdx.x % 32 * (VECTOR * 4);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      unsigned vector[VECTOR];
      if constexpr (IS_STAGED) {
        load_words<VECTOR>(vector, from + v * (VECTOR * 4 * 32));
      } else {
        stream_words<VECTOR>(vector, from + v * (VECTOR * 4 * 32));
      }
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        word[v * VECTOR + i] = vector[i];
      }
    }
  }

  // A lane's part of a group's scales.
  DEVICE static Scales load_scales(const void* group) {
    uint2 v = reinterpret_cast<const uint2*>(group)[threadIdx.x % 32 / 4];
    Scales scales;
    scales.scale[0].bits = v.x & 0xFFFF;
    scales.bias[0].bits = v.x >> 16;
    scales.scale[1].bits = v.y & 0xFFFF;
    scales.bias[1].bits = v.y >> 16;
    return scales;
  }

  DEVICE static void unpack(const unsigned (&word)[2 * WORDS], unsigned (&a)[STEPS][4]) {
    unsigned low[2][STEPS], high[2][STEPS];
    to_places<T, BITS, STEPS>(word, low[0], high[0]);
    to_places<T, BITS, STEPS>(word + WORDS, low[1], high[1]);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      a[step][0] = low[0][step];
      a[step][1] = low[1][step];
      a[step][2] = high[0][step];
      a[step][3] = high[1][step];
    }
  }

  // Sums of a block of x alone, which the biases multiply: of eight columns.
  DEVICE static void add_up(float (&total)[4], const unsigned (&x)[2 * STEPS]) {
    unsigned one = pack<T>(1.0f, 1.0f);
    unsigned ones[4] = {one, one, one, one};
    total[0] = total[1] = total[2] = total[3] = 0;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      multiply<T>(total, ones, x[2 * step], x[2 * step + 1]);
    }
  }

  // A block's product, added to its range's sum. total: the sum of x alone.
  DEVICE static float add(float sum, float product, T scale, T bias, float total) {
    float of_total = __fmaf_rn(float(scale), -OFFSET<T, BITS>, float(bias));
    return __fmaf_rn(of_total, total, __fmaf_rn(SIGN<T, BITS> * float(scale), product, sum));
  }

  // The same of eight columns. total: unless the weight is plain.
  DEVICE static void add(float (&sum)[4], const float (&product)[4], const Scales& of, const float (&total)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (IS_QUANTIZED) {
        sum[i] = add(sum[i], product[i], of.scale[i / 2], of.bias[i / 2], total[i]);
      } else {
        sum[i] = __fadd_rn(sum[i], product[i]);
      }
    }
  }
};

DEVICE float gated(float gate, float other) {
  return gate / (1.0f + __expf(-gate)) * other;
}

// Writes two sums of a column: of output `row` and of `row + 8`.
template <typename T, typename Out>
DEVICE void finish(const Linear<T, Out>& of, float low, float high, int column, int row) {
  if (of.mode & GATED) {
    of.out[size_t(column) * (of.n / 2) + row / 16 * 8 + row % 16] = Out(gated(low, high));
    return;
  }
  float sums[2] = {low, high};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    size_t at = size_t(column) * of.n + row + 8 * half;
    if (of.mode & ADD_BIAS) {
      sums[half] += float(of.bias[row + 8 * half]);
    }
    if (of.mode & ADD_RESIDUAL) {
      sums[half] += float(of.residual[at]);
    }
    of.out[at] = Out(sums[half]);
  }
}

// 8 NT rows of x in a thread block of eight warps, sixteen outputs: each warp makes the sums of two ranges, which are
// then added up.
template <typename T, typename Out, int BITS, int GROUP, int NT>
DEVICE void linear_few(const Linear<T, Out>& of) {
  using W = Tile<T, BITS, GROUP>;
  constexpr int AHEAD = NT == 1 ? 4 : 2;
  __shared__ float shared[RANGES * NT * 128];
  let_next_begin();
  int lane = threadIdx.x % 32;
  int warp = threadIdx.x / 32;
  int first_column = blockIdx.y * NT * 8;
  int blocks = of.k / W::BLOCK;
  const unsigned char* codes = of.codes + size_t(blockIdx.x) * blocks * W::BYTES;
  const T* scales = of.scales + size_t(blockIdx.x) * (of.k / GROUP) * 32;
  int range = (blocks + RANGES - 1) / RANGES;
  int begin = min(blocks, warp * 2 * range);
  int middle = min(blocks, begin + range);
  int end = min(blocks, middle + range);
  struct Raw {
    unsigned word[2 * W::WORDS];
    typename W::Scales scales;
  };
  auto load = [&](Raw& raw, int block) {
    W::template load<false>(raw.word, codes + size_t(block) * W::BYTES);
    if constexpr (W::IS_QUANTIZED) {
      raw.scales = W::load_scales(scales + block * W::BLOCK / GROUP * 32);
    }
  };
  Raw raw[AHEAD];
#pragma unroll
  for (int ahead = 0; ahead < AHEAD; ++ahead) {
    if (begin + ahead < end) {
      load(raw[ahead], begin + ahead);
    }
  }
  const T* column[NT];
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) {
    // Columns past the end are computed with the last one, and not written.
    int at = min(first_column + nt * 8 + lane / 4, of.m - 1);
    column[nt] = of.x + size_t(at) * of.k + (lane % 4) * (W::BLOCK / 4);
  }
  float sum[NT][4] = {};
  auto keep_sums = [&](int of_range) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        shared[((of_range * NT + nt) * 4 + i) * 32 + lane] = sum[nt][i];
        sum[nt][i] = 0;
      }
    }
  };
  wait_for_previous();
  for (int first = begin; first < end; first += AHEAD) {
#pragma unroll
    for (int ahead = 0; ahead < AHEAD; ++ahead) {
      int block = first + ahead;
      if (block < end) {
        if (block == middle) {
          keep_sums(2 * warp);
        }
        Raw now = raw[ahead];
        if (block + AHEAD < end) {
          load(raw[ahead], block + AHEAD);
        }
        unsigned a[W::STEPS][4];
        W::unpack(now.word, a);
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          unsigned values[2 * W::STEPS];
          load_words<2 * W::STEPS>(values, column[nt] + block * W::BLOCK);
          float of_x[4];
          if constexpr (W::IS_QUANTIZED) {
            W::add_up(of_x, values);
          }
          float product[4] = {0, 0, 0, 0};
#pragma unroll
          for (int step = 0; step < W::STEPS; ++step) {
            multiply<T>(product, a[step], values[2 * step], values[2 * step + 1]);
          }
          W::add(sum[nt], product, now.scales, of_x);
        }
      }
    }
  }
  if (middle == end) {
    keep_sums(2 * warp);
  }
  keep_sums(2 * warp + 1);
  __syncthreads();
  for (int item = threadIdx.x; item < NT * 64; item += blockDim.x) {
    int of_lane = item % 32;
    int pair = item / 32 % 2;
    int nt = item / 64;
    float low = 0, high = 0;
#pragma unroll
    for (int of_range = 0; of_range < RANGES; ++of_range) {
      const float* sums = shared + (of_range * NT + nt) * 128 + of_lane;
      low += sums[pair * 32];
      high += sums[(pair + 2) * 32];
    }
    int at = first_column + nt * 8 + of_lane % 4 * 2 + pair;
    if (at < of.m) {
      finish(of, low, high, at, blockIdx.x * 16 + of_lane / 4);
    }
  }
}

// Many rows of x: 64 of them and 128 outputs in a thread block of eight warps, 32 of both to a warp. x and codes pass
// through shared memory, some blocks ahead. Sums of x alone are the same for all outputs: each warp makes those of eight
// rows.
template <typename T, int BITS, int GROUP>
struct Wide {
  using W = Tile<T, BITS, GROUP>;
  static constexpr int ROWS = 64;
  static constexpr int OUTPUTS = 128;
  static constexpr int STAGES = BITS == 16 ? 3 : 4; // as many as smaller GPUs have memory for
  // Bytes of a row; so that lanes read different banks.
  static constexpr int X_STRIDE = W::BLOCK * 2 + 16;
  static constexpr int X_BYTES = ROWS * X_STRIDE;
  static constexpr int STAGE_BYTES = X_BYTES + OUTPUTS / 16 * W::BYTES;
  static constexpr int BYTES = STAGES * STAGE_BYTES;
};

template <typename T, typename Out, int BITS, int GROUP>
DEVICE void linear_wide(const Linear<T, Out>& of) {
  using S = Wide<T, BITS, GROUP>;
  using W = typename S::W;
  constexpr int TILES = 2; // of sixteen outputs, to a warp
  constexpr int COLUMNS = 4; // of eight rows of x, to a warp
  constexpr int THREADS = 256;
  extern __shared__ __align__(16) unsigned char staged[];
  __shared__ float2 totals_shared[S::ROWS / 2];
  let_next_begin();
  int lane = threadIdx.x % 32;
  int warp = threadIdx.x / 32;
  int first_column = blockIdx.y * S::ROWS;
  int first_output = blockIdx.x * S::OUTPUTS;
  int first_nt = warp / 4 * COLUMNS;
  int first_row = warp % 4 * 32;
  int blocks = of.k / W::BLOCK;
  int range = (blocks + RANGES - 1) / RANGES;
  // A thread copies sixteen bytes of a few tiles, and of the same column of a few rows of x; tiles and rows past the end
  // are computed as the last one, and not written.
  constexpr int TILE_VECTORS = W::BYTES / 16;
  constexpr int CODE_VECTORS = S::OUTPUTS / 16 * TILE_VECTORS;
  constexpr int CODE_COPIES = (CODE_VECTORS + THREADS - 1) / THREADS;
  constexpr int X_VECTORS = W::BLOCK / 8;
  constexpr int X_COPIES = (S::ROWS * X_VECTORS + THREADS - 1) / THREADS;
  const unsigned char* code_from[CODE_COPIES];
  const unsigned char* x_from[X_COPIES];
  int x_row = threadIdx.x / X_VECTORS;
#pragma unroll
  for (int i = 0; i < CODE_COPIES; ++i) {
    int vector = i * THREADS + threadIdx.x;
    size_t tile = min(first_output / 16 + vector / TILE_VECTORS, of.n / 16 - 1);
    code_from[i] = of.codes + tile * blocks * W::BYTES + vector % TILE_VECTORS * 16;
  }
#pragma unroll
  for (int i = 0; i < X_COPIES; ++i) {
    size_t row = min(first_column + x_row + i * (THREADS / X_VECTORS), of.m - 1);
    x_from[i] = reinterpret_cast<const unsigned char*>(of.x + row * of.k) + threadIdx.x % X_VECTORS * 16;
  }
  unsigned begin = __cvta_generic_to_shared(staged);
  unsigned code_to = begin + S::X_BYTES + threadIdx.x * 16;
  unsigned x_to = begin + x_row * S::X_STRIDE + threadIdx.x % X_VECTORS * 16;
  auto stage_codes = [&](int block, int stage) {
#pragma unroll
    for (int i = 0; i < CODE_COPIES; ++i) {
      if (CODE_VECTORS % THREADS == 0 || i * THREADS + threadIdx.x < CODE_VECTORS) {
        copy_vector<16>(code_to + stage * S::STAGE_BYTES + i * THREADS * 16, code_from[i] + size_t(block) * W::BYTES);
      }
    }
  };
  auto stage_x = [&](int block, int stage) {
#pragma unroll
    for (int i = 0; i < X_COPIES; ++i) {
      if (S::ROWS * X_VECTORS % THREADS == 0 || x_row + i * (THREADS / X_VECTORS) < S::ROWS) {
        copy_vector<16>(x_to + stage * S::STAGE_BYTES + i * (THREADS / X_VECTORS) * S::X_STRIDE,
                        x_from[i] + block * W::BLOCK * 2);
      }
    }
  };
  auto commit = [] { asm volatile("cp.async.commit_group;"); };

  typename W::Scales scales[2][TILES]; // of this block and of the next one
  auto load_scales = [&](int block, int to) {
    if constexpr (W::IS_QUANTIZED) {
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        size_t tile = min((first_output + first_row) / 16 + t, of.n / 16 - 1);
        scales[to][t] = W::load_scales(of.scales + (tile * (of.k / GROUP) + block * W::BLOCK / GROUP) * 32);
      }
    }
  };

  float sum[TILES][COLUMNS][4] = {};
  float total[TILES][COLUMNS][4] = {};
  load_scales(0, 1);
#pragma unroll
  for (int block = 0; block < S::STAGES - 1; ++block) {
    if (block < blocks) {
      stage_codes(block, block);
    }
  }
  wait_for_previous();
#pragma unroll
  for (int block = 0; block < S::STAGES - 1; ++block) {
    if (block < blocks) {
      stage_x(block, block);
    }
    commit();
  }
  int stage = 0;
  int stage_ahead = S::STAGES - 1;
  int end_of_range = range - 1;
  for (int block = 0; block < blocks; ++block) {
    asm volatile("cp.async.wait_group %0;" ::"n"(S::STAGES - 2));
    __syncthreads();
    if (block + S::STAGES - 1 < blocks) {
      stage_codes(block + S::STAGES - 1, stage_ahead);
      stage_x(block + S::STAGES - 1, stage_ahead);
    }
    commit();
    stage_ahead = stage_ahead + 1 == S::STAGES ? 0 : stage_ahead + 1;
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      scales[0][t] = scales[1][t];
    }
    load_scales(min(block + 1, blocks - 1), 1);
    const unsigned char* x = staged + stage * S::STAGE_BYTES;
    stage = stage + 1 == S::STAGES ? 0 : stage + 1;
    auto load_x = [&](int nt, unsigned (&values)[2 * W::STEPS]) {
      load_words<2 * W::STEPS>(values, x + (nt * 8 + lane / 4) * S::X_STRIDE + (lane % 4) * (W::BLOCK / 2));
    };
    if constexpr (W::IS_QUANTIZED) {
      unsigned values[2 * W::STEPS];
      float of_x[4];
      load_x(warp, values);
      W::add_up(of_x, values);
      if (lane < 4) {
        totals_shared[warp * 4 + lane] = make_float2(of_x[0], of_x[1]);
      }
    }
    unsigned a[TILES][W::STEPS][4];
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      unsigned word[2 * W::WORDS];
      W::template load<true>(word, x + S::X_BYTES + (first_row / 16 + t) * W::BYTES);
      W::unpack(word, a[t]);
    }
    // All products of the block side by side: each is a chain of its own.
    float product[TILES][COLUMNS][4] = {};
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      unsigned values[2 * W::STEPS];
      load_x(first_nt + c, values);
#pragma unroll
      for (int step = 0; step < W::STEPS; ++step) {
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
          multiply<T>(product[t][c], a[t][step], values[2 * step], values[2 * step + 1]);
        }
      }
    }
    if constexpr (W::IS_QUANTIZED) {
      __syncthreads();
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      float of_x[4] = {0, 0, 0, 0};
      if constexpr (W::IS_QUANTIZED) {
        float2 both = totals_shared[(first_nt + c) * 4 + lane % 4];
        of_x[0] = of_x[2] = both.x;
        of_x[1] = of_x[3] = both.y;
      }
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        W::add(sum[t][c], product[t][c], scales[0][t], of_x);
      }
    }
    if (block == end_of_range || block + 1 == blocks) {
      end_of_range += range;
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            total[t][c][i] += sum[t][c][i];
            sum[t][c][i] = 0;
          }
        }
      }
    }
  }
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
    int row = first_output + first_row + 16 * t;
    if (row < of.n) {
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          int at = first_column + (first_nt + c) * 8 + lane % 4 * 2 + pair;
          if (at < of.m) {
            finish(of, total[t][c][pair], total[t][c][pair + 2], at, row + lane / 4);
          }
        }
      }
    }
  }
}

// Rows of W: out[i] = W[tokens[i]], a thread block a row.
template <typename T, int BITS, int GROUP>
DEVICE void look_up(const unsigned char* codes, const T* scales, const int* tokens, T* out, int k) {
  using W = Tile<T, BITS, GROUP>;
  constexpr int QUARTER = W::BLOCK / 4;
  let_next_begin();
  wait_for_previous();
  int row = tokens[blockIdx.x];
  size_t tile = row / 16;
  int half = row % 16 / 8;
  for (int at = threadIdx.x; at < k; at += blockDim.x) {
    int block = at / W::BLOCK;
    int lane = row % 8 * 4 + at % W::BLOCK / QUARTER;
    int word = half * W::WORDS + at % QUARTER * BITS / 32;
    int bit = BITS == 4 ? at % 2 * 16 + at % 8 / 2 * 4 : at % (32 / BITS) * BITS; // in the word
    size_t first = (tile * (k / W::BLOCK) + block) * (W::BYTES / 4);
    int place = (word / W::VECTOR * 32 + lane) * W::VECTOR + word % W::VECTOR;
    unsigned bits = reinterpret_cast<const unsigned*>(codes)[first + place] >> bit;
    T* to = out + size_t(blockIdx.x) * k + at;
    if constexpr (BITS == 16) {
      to->bits = bits;
    } else {
      const T* of = scales + (tile * (k / GROUP) + at / GROUP) * 32 + row % 8 * 4 + half * 2;
      *to = T(__fmaf_rn(float(of[0]), float(bits & ((1u << BITS) - 1)), float(of[1])));
    }
  }
}
