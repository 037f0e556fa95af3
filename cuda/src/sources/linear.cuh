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
    float scale[2];
    float bias[2];
  };

  DEVICE Raw load(int block) const {
    Raw raw;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      stream_words<WORDS>(raw.word[half], codes[half] + size_t(block) * (BLOCK / 8 * BITS));
      if constexpr (IS_QUANTIZED) {
        raw.scale[half] = float(scales[half][block * BLOCK / GROUP]);
        raw.bias[half] = float(biases[half][block * BLOCK / GROUP]);
      }
    }
    return raw;
  }

  DEVICE static void unpack(const Raw& raw, unsigned (&a)[STEPS][4]) {
    unsigned low[2][STEPS], high[2][STEPS];
    to_places<T, BITS, STEPS>(raw.word[0], low[0], high[0]);
    to_places<T, BITS, STEPS>(raw.word[1], low[1], high[1]);
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

  // A block's part of eight columns, added to their range's sums. x: the lane's 4 STEPS elements of its column.
  DEVICE static void add(float (&sum)[4], const unsigned (&a)[STEPS][4], const Raw& raw,
                         const unsigned (&x)[2 * STEPS]) {
    float product[4] = {0, 0, 0, 0};
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      multiply<T>(product, a[step], x[2 * step], x[2 * step + 1]);
    }
    if constexpr (IS_QUANTIZED) {
      float total[4];
      add_up(total, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[i] = __fmaf_rn(raw.bias[i / 2], total[i], __fmaf_rn(raw.scale[i / 2], product[i], sum[i]));
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
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
        W::unpack(now, a);
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          unsigned values[2 * W::STEPS];
          load_words<2 * W::STEPS>(values, reinterpret_cast<const unsigned char*>(column[nt] + block * W::BLOCK));
          W::add(sum[nt], a, now, values);
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

// Many rows of x: 64 of them in a thread block of four warps, 64 outputs; x passes through shared memory.
template <typename T, typename Out, int BITS, int GROUP>
DEVICE void linear_wide(const Linear<T, Out>& of) {
  using W = Tile<T, BITS, GROUP>;
  constexpr int ROWS = 64;
  constexpr int STRIDE = W::BLOCK + 8; // elements; so that lanes read different banks
  __shared__ __align__(16) T staged[2][ROWS * STRIDE];
  let_next_begin();
  int lane = threadIdx.x % 32;
  int warp = threadIdx.x / 32;
  int first_column = blockIdx.y * ROWS;
  int tile_row = blockIdx.x * 64 + warp * 16;
  bool is_inside = tile_row < of.n;
  W tile(of.weight, of.scales, of.biases, is_inside ? tile_row : 0, of.k);
  int blocks = of.k / W::BLOCK;
  int range = (blocks + RANGES - 1) / RANGES;

  auto stage = [&](int block, int buffer) {
    constexpr int VECTORS = W::BLOCK / 8; // of 16 bytes in a row
    for (int item = threadIdx.x; item < ROWS * VECTORS; item += blockDim.x) {
      int row = item / VECTORS;
      int vector = item % VECTORS;
      const T* from = of.x + size_t(min(first_column + row, of.m - 1)) * of.k + block * W::BLOCK + vector * 8;
      unsigned to = __cvta_generic_to_shared(&staged[buffer][row * STRIDE + vector * 8]);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
    }
    asm volatile("cp.async.commit_group;");
  };

  float sum[8][4];
  float total[8][4];
#pragma unroll
  for (int nt = 0; nt < 8; ++nt) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[nt][i] = total[nt][i] = 0;
    }
  }
  auto next = tile.load(0);
  wait_for_previous();
  stage(0, 0);
  for (int block = 0; block < blocks; ++block) {
    auto raw = next;
    if (block + 1 < blocks) {
      stage(block + 1, (block + 1) % 2);
      next = tile.load(block + 1);
      asm volatile("cp.async.wait_group 1;");
    } else {
      asm volatile("cp.async.wait_group 0;");
    }
    __syncthreads();
    unsigned a[W::STEPS][4];
    W::unpack(raw, a);
#pragma unroll
    for (int nt = 0; nt < 8; ++nt) {
      unsigned values[2 * W::STEPS];
      const T* from = &staged[block % 2][(nt * 8 + lane / 4) * STRIDE + (lane % 4) * (W::BLOCK / 4)];
      load_words<2 * W::STEPS>(values, reinterpret_cast<const unsigned char*>(from));
      W::add(sum[nt], a, raw, values);
    }
    if ((block + 1) % range == 0 || block + 1 == blocks) {
#pragma unroll
      for (int nt = 0; nt < 8; ++nt) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[nt][i] += sum[nt][i];
          sum[nt][i] = 0;
        }
      }
    }
    __syncthreads();
  }
  if (is_inside) {
#pragma unroll
    for (int nt = 0; nt < 8; ++nt) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        int at = first_column + nt * 8 + lane % 4 * 2 + pair;
        if (at < of.m) {
          finish(of, total[nt][pair], total[nt][pair + 2], at, tile_row + lane / 4);
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
