// y = x W^T, the same bits for every number of rows of x.
//
// The summed axis is cut into blocks (a quantisation group, or 64 elements) and the blocks into RANGES ranges. A block's
// sum of code * x is made by mma, where codes are exact; scaled, it is added to its range; ranges are added in their
// order. So each output is a fixed sequence of roundings, whichever of the kernels makes it.
//
// BITS: 4 or 8, codes with a scale and a bias for each GROUP of a row; or 16, elements of T.

constexpr int RANGES = 8;

// What is done with sums before they are written: bits of `mode`.
constexpr int ADD_BIAS = 1;
constexpr int ADD_RESIDUAL = 2;
// Rows of W come as eight of the gate, eight of the other factor: silu(gate) * other is written.
constexpr int GATED = 4;

template <typename T, typename Out>
struct Linear {
  const T* x;               // [m, k]
  const unsigned* weight;   // [n, k] codes
  const T* scales;          // [n, k / GROUP]
  const T* biases;          // the same
  const T* bias;            // [n]
  const T* residual;        // [m, n]
  Out* out;                 // [m, n], or [m, n / 2] where GATED
  int m;
  int n;
  int k;
  int mode;
};

template <int WORDS>
DEVICE void load_words(unsigned (&word)[WORDS], const unsigned char* from) {
  if constexpr (WORDS == 8) {
    Sixteen all = load_sixteen(from);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      word[i] = all.pair[i];
    }
  } else if constexpr (WORDS == 4) {
    uint4 v = *reinterpret_cast<const uint4*>(from);
    word[0] = v.x; word[1] = v.y; word[2] = v.z; word[3] = v.w;
  } else if constexpr (WORDS == 2) {
    uint2 v = *reinterpret_cast<const uint2*>(from);
    word[0] = v.x; word[1] = v.y;
  } else {
    word[0] = *reinterpret_cast<const unsigned*>(from);
  }
}

// Weights are read once: they pass by the first-level cache.
template <int WORDS>
DEVICE void stream_words(unsigned (&word)[WORDS], const unsigned char* from) {
  if constexpr (WORDS == 8) {
    unsigned low[4], high[4];
    stream_words<4>(low, from);
    stream_words<4>(high, from + 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      word[i] = low[i];
      word[i + 4] = high[i];
    }
  } else if constexpr (WORDS == 4) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
        : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3]) : "l"(from));
  } else if constexpr (WORDS == 2) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "l"(from));
  } else {
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(word[0]) : "l"(from));
  }
}

// A lane's codes of one row of a block become its places of A.
template <typename T, int BITS, int STEPS>
DEVICE void to_places(const unsigned (&word)[STEPS * 4 * BITS / 32], unsigned (&low)[STEPS], unsigned (&high)[STEPS]) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    if constexpr (BITS == 16) {
      low[step] = word[2 * step];
      high[step] = word[2 * step + 1];
    } else {
      float code[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // 2^23 + code, as its bits stand in a float
        unsigned bits;
        if constexpr (BITS == 8) {
          bits = __byte_perm(word[step], 0x4B000000, 0x7540 + i);
        } else {
          bits = 0x4B000000 | ((word[step / 2] >> (16 * (step % 2) + 4 * i)) & 15);
        }
        code[i] = __uint_as_float(bits) - 8388608.0f;
      }
      low[step] = pack<T>(code[0], code[1]);
      high[step] = pack<T>(code[2], code[3]);
    }
  }
}

// Sixteen rows of W in one warp's registers, a block at a time.
template <typename T, int BITS, int GROUP>
struct Tile {
  static constexpr int BLOCK = GROUP < 64 ? GROUP : 64;
  static constexpr int STEPS = BLOCK / 16;
  static constexpr int WORDS = STEPS * 4 * BITS / 32;
  static constexpr bool IS_QUANTIZED = BITS < 16;

  const unsigned char* codes[2];
  const T* scales[2];
  const T* biases[2];

  DEVICE Tile(const unsigned* w, const T* s, const T* z, int first_row, int k) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      size_t row = first_row + lane / 4 + 8 * half;
      codes[half] = reinterpret_cast<const unsigned char*>(w) + row * (k / 8 * BITS) + (lane % 4) * (WORDS * 4);
      scales[half] = s + row * (k / GROUP);
      biases[half] = z + row * (k / GROUP);
    }
  }

  struct Raw {
    unsigned word[2][WORDS];
    // Not converted before they are used: that would wait for them.
    T scale[2];
    T bias[2];
  };

  DEVICE Raw load(int block) const {
    Raw raw;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      stream_words<WORDS>(raw.word[half], codes[half] + size_t(block) * (BLOCK / 8 * BITS));
      if constexpr (IS_QUANTIZED) {
        raw.scale[half] = scales[half][block * BLOCK / GROUP];
        raw.bias[half] = biases[half][block * BLOCK / GROUP];
      }
    }
    return raw;
  }

  DEVICE static void unpack(const unsigned (&word)[2][WORDS], unsigned (&a)[STEPS][4]) {
    unsigned low[2][STEPS], high[2][STEPS];
    to_places<T, BITS, STEPS>(word[0], low[0], high[0]);
    to_places<T, BITS, STEPS>(word[1], low[1], high[1]);
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

  // A block's products of eight columns, added to their range's sums. total: sums of x alone, unless the weight is plain.
  DEVICE static void add(float (&sum)[4], const float (&product)[4], const T (&scale)[2], const T (&bias)[2],
                         const float (&total)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (IS_QUANTIZED) {
        sum[i] = __fmaf_rn(float(bias[i / 2]), total[i], __fmaf_rn(float(scale[i / 2]), product[i], sum[i]));
      } else {
        sum[i] = __fadd_rn(sum[i], product[i]);
      }
    }
  }
};

// Writes two sums of a column: of output `row` and of `row + 8`.
template <typename T, typename Out>
DEVICE void finish(const Linear<T, Out>& of, float low, float high, int column, int row) {
  if (of.mode & GATED) {
    float gate = low / (1.0f + __expf(-low));
    of.out[size_t(column) * (of.n / 2) + row / 16 * 8 + row % 16] = Out(gate * high);
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

// 8 NT rows of x in a thread block of eight warps, sixteen outputs: each warp makes one range's sums, which are then
// added up.
template <typename T, typename Out, int BITS, int GROUP, int NT>
DEVICE void linear_few(const Linear<T, Out>& of) {
  using W = Tile<T, BITS, GROUP>;
  constexpr int AHEAD = NT == 1 ? 4 : 2;
  __shared__ float shared[RANGES * NT * 128];
  let_next_begin();
  int lane = threadIdx.x % 32;
  int warp = threadIdx.x / 32;
  int first_column = blockIdx.y * NT * 8;
  W tile(of.weight, of.scales, of.biases, blockIdx.x * 16, of.k);
  int blocks = of.k / W::BLOCK;
  int range = (blocks + RANGES - 1) / RANGES;
  int begin = warp * range;
  int end = min(blocks, begin + range);
  typename W::Raw raw[AHEAD];
#pragma unroll
  for (int ahead = 0; ahead < AHEAD; ++ahead) {
    if (begin + ahead < end) {
      raw[ahead] = tile.load(begin + ahead);
    }
  }
  const T* column[NT];
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) {
    // Columns past the end are computed with the last one, and not written.
    int at = min(first_column + nt * 8 + lane / 4, of.m - 1);
    column[nt] = of.x + size_t(at) * of.k + (lane % 4) * (W::BLOCK / 4);
  }
  float sum[NT][4];
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) {
    sum[nt][0] = sum[nt][1] = sum[nt][2] = sum[nt][3] = 0;
  }
  wait_for_previous();
  for (int first = begin; first < end; first += AHEAD) {
#pragma unroll
    for (int ahead = 0; ahead < AHEAD; ++ahead) {
      int block = first + ahead;
      if (block < end) {
        typename W::Raw now = raw[ahead];
        if (block + AHEAD < end) {
          raw[ahead] = tile.load(block + AHEAD);
        }
        unsigned a[W::STEPS][4];
        W::unpack(now.word, a);
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          unsigned values[2 * W::STEPS];
          load_words<2 * W::STEPS>(values, reinterpret_cast<const unsigned char*>(column[nt] + block * W::BLOCK));
          float of_x[4];
          if constexpr (W::IS_QUANTIZED) {
            W::add_up(of_x, values);
          }
          float product[4] = {0, 0, 0, 0};
#pragma unroll
          for (int step = 0; step < W::STEPS; ++step) {
            multiply<T>(product, a[step], values[2 * step], values[2 * step + 1]);
          }
          W::add(sum[nt], product, now.scale, now.bias, of_x);
        }
      }
    }
  }
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      shared[((warp * NT + nt) * 4 + i) * 32 + lane] = sum[nt][i];
    }
  }
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
  // Bytes of a row of each; so that lanes read different banks.
  static constexpr int X_STRIDE = W::BLOCK * 2 + 16;
  static constexpr int CODE_BYTES = W::BLOCK / 8 * BITS;
  static constexpr int CODE_STRIDE = BITS == 16 ? CODE_BYTES + 16 : CODE_BYTES;
  static constexpr int X_BYTES = ROWS * X_STRIDE;
  static constexpr int STAGE_BYTES = X_BYTES + OUTPUTS * CODE_STRIDE;
  static constexpr int BYTES = STAGES * STAGE_BYTES;
};

DEVICE void copy_sixteen(unsigned to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
}

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
  // A thread copies sixteen bytes of the same column of a few rows; outputs and rows past the end are computed as the
  // last one, and not written.
  constexpr int CODE_VECTORS = S::CODE_BYTES / 16;
  constexpr int CODE_COPIES = (S::OUTPUTS * CODE_VECTORS + THREADS - 1) / THREADS;
  constexpr int X_VECTORS = W::BLOCK / 8;
  constexpr int X_COPIES = (S::ROWS * X_VECTORS + THREADS - 1) / THREADS;
  const unsigned char* code_from[CODE_COPIES];
  const unsigned char* x_from[X_COPIES];
  int code_row = threadIdx.x / CODE_VECTORS;
  int x_row = threadIdx.x / X_VECTORS;
#pragma unroll
  for (int i = 0; i < CODE_COPIES; ++i) {
    size_t row = min(first_output + code_row + i * (THREADS / CODE_VECTORS), of.n - 1);
    code_from[i] = reinterpret_cast<const unsigned char*>(of.weight) + row * (size_t(of.k) / 8 * BITS) +
                   threadIdx.x % CODE_VECTORS * 16;
  }
#pragma unroll
  for (int i = 0; i < X_COPIES; ++i) {
    size_t row = min(first_column + x_row + i * (THREADS / X_VECTORS), of.m - 1);
    x_from[i] = reinterpret_cast<const unsigned char*>(of.x + row * of.k) + threadIdx.x % X_VECTORS * 16;
  }
  unsigned begin = __cvta_generic_to_shared(staged);
  unsigned code_to = begin + S::X_BYTES + code_row * S::CODE_STRIDE + threadIdx.x % CODE_VECTORS * 16;
  unsigned x_to = begin + x_row * S::X_STRIDE + threadIdx.x % X_VECTORS * 16;
  auto stage_codes = [&](int block, int stage) {
#pragma unroll
    for (int i = 0; i < CODE_COPIES; ++i) {
      if (S::OUTPUTS * CODE_VECTORS % THREADS == 0 || code_row + i * (THREADS / CODE_VECTORS) < S::OUTPUTS) {
        copy_sixteen(code_to + stage * S::STAGE_BYTES + i * (THREADS / CODE_VECTORS) * S::CODE_STRIDE,
                     code_from[i] + block * S::CODE_BYTES);
      }
    }
  };
  auto stage_x = [&](int block, int stage) {
#pragma unroll
    for (int i = 0; i < X_COPIES; ++i) {
      if (S::ROWS * X_VECTORS % THREADS == 0 || x_row + i * (THREADS / X_VECTORS) < S::ROWS) {
        copy_sixteen(x_to + stage * S::STAGE_BYTES + i * (THREADS / X_VECTORS) * S::X_STRIDE,
                     x_from[i] + block * W::BLOCK * 2);
      }
    }
  };
  auto commit = [] { asm volatile("cp.async.commit_group;"); };

  const T* scales[TILES][2];
  const T* biases[TILES][2];
  T scale[2][TILES][2], bias[2][TILES][2]; // of this block and of the next one
  if constexpr (W::IS_QUANTIZED) {
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        size_t row = min(first_output + first_row + 16 * t + lane / 4 + 8 * half, of.n - 1);
        scales[t][half] = of.scales + row * (of.k / GROUP);
        biases[t][half] = of.biases + row * (of.k / GROUP);
      }
    }
  }
  auto load_scales = [&](int block, int to) {
    if constexpr (W::IS_QUANTIZED) {
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          scale[to][t][half] = scales[t][half][block * W::BLOCK / GROUP];
          bias[to][t][half] = biases[t][half][block * W::BLOCK / GROUP];
        }
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
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scale[0][t][half] = scale[1][t][half];
        bias[0][t][half] = bias[1][t][half];
      }
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
      unsigned word[2][W::WORDS];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int row = first_row + 16 * t + lane / 4 + 8 * half;
        load_words<W::WORDS>(word[half], x + S::X_BYTES + row * S::CODE_STRIDE + (lane % 4) * (W::WORDS * 4));
      }
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
        W::add(sum[t][c], product[t][c], scale[0][t], bias[0][t], of_x);
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
DEVICE void look_up(const unsigned* weight, const T* scales, const T* biases, const int* tokens, T* out, int k) {
  let_next_begin();
  wait_for_previous();
  size_t row = tokens[blockIdx.x];
  for (int at = threadIdx.x; at < k; at += blockDim.x) {
    T* to = out + size_t(blockIdx.x) * k + at;
    if constexpr (BITS == 16) {
      *to = reinterpret_cast<const T*>(weight)[row * k + at];
    } else {
      constexpr int PER_WORD = 32 / BITS;
      unsigned word = weight[row * (k / PER_WORD) + at / PER_WORD];
      float code = float((word >> (at % PER_WORD * BITS)) & ((1u << BITS) - 1));
      size_t group = row * (k / GROUP) + at / GROUP;
      *to = T(__fmaf_rn(float(scales[group]), code, float(biases[group])));
    }
  }
}
