// A step of one token: weights through shared memory, and their products with a row.

// Copies of the GPU's own engine, which loads and stores of threads do not queue behind; a barrier counts their bytes.
DEVICE void begin_barrier(unsigned barrier) {
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

DEVICE void expect_bytes(unsigned barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

DEVICE void copy_bytes(unsigned to, const void* from, unsigned bytes, unsigned barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

DEVICE void wait_for_bytes(unsigned barrier, unsigned phase) {
  unsigned is_done;
  do {
    asm volatile(
        "{ .reg .pred done; mbarrier.try_wait.parity.shared.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }"
        : "=r"(is_done)
        : "r"(barrier), "r"(phase)
        : "memory");
  } while (!is_done);
}

// The chunks of weights that one warp multiplies, in their order, through a ring in shared memory. A chunk is one block,
// or two that follow one another in the warp's range, and their scales.
template <typename T, int BITS, int GROUP_SIZE, int STAGES, int LAYERS>
struct Chunks {
  using W = Tile<T, BITS, GROUP_SIZE>;
  static constexpr int CHUNK = BITS == 16 ? 1 : 2; // blocks
  static constexpr int CODE_BYTES = CHUNK * W::BYTES;
  static constexpr int BYTES = CODE_BYTES + CHUNK * W::SCALE_BYTES;

  const Decode<T, LAYERS>& of;
  unsigned char* ring;
  unsigned barriers; // one for each place in the ring
  // The chunk that is asked for next.
  int layer = 0;
  int matrix = -1;
  int tile = 0;
  int block = 0;
  int begin = 0;
  int end = 0;
  int blocks = 0;
  int tiles = 0;
  const unsigned char* codes = nullptr; // of the tile
  const T* scales = nullptr; // of the tile
  int ahead = 0; // its place in the ring
  // The one that is multiplied.
  int now = 0;
  unsigned phase = 0;

  DEVICE Chunks(const Decode<T, LAYERS>& decode, unsigned char* staged, unsigned long long (&all)[WARPS][STAGES])
      : of(decode) {
    int warp = threadIdx.x / 32;
    ring = staged + warp * (STAGES * BYTES);
    barriers = __cvta_generic_to_shared(all[warp]);
    if (threadIdx.x % 32 < STAGES) {
      begin_barrier(barriers + threadIdx.x % 32 * 8);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    next_matrix();
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; ++i) {
      ask();
    }
  }

  // The blocks of a matrix that this warp multiplies.
  DEVICE static void range_of(int blocks, int& begin, int& end) {
    int range = (blocks + RANGES - 1) / RANGES;
    begin = min(blocks, int(threadIdx.x / 32) * range);
    end = min(blocks, begin + range);
  }

  // Which of a range's groups, counted from that of its block 0.
  DEVICE static int group_of(int block) { return block * W::BLOCK / GROUP_SIZE; }

  DEVICE void next_matrix() {
    do {
      if (++matrix == MATRICES) {
        matrix = 0;
        ++layer;
      }
      if (layer == of.layer_count) {
        return;
      }
      blocks = of.k[matrix] / W::BLOCK;
      tiles = of.n[matrix] / 16;
      range_of(blocks, begin, end);
    } while (begin == end || blockIdx.x >= tiles);
    tile = blockIdx.x;
    block = begin;
    const Matrix<T>& now = of.layer[layer].matrix[matrix];
    codes = now.codes + size_t(tile) * blocks * W::BYTES;
    scales = now.scales + size_t(tile) * group_of(blocks) * 32;
  }

  DEVICE void ask() {
    if (layer == of.layer_count) {
      return;
    }
    if (threadIdx.x % 32 == 0) {
      int count = min(CHUNK, end - block);
      unsigned to = __cvta_generic_to_shared(ring + ahead * BYTES);
      unsigned barrier = barriers + ahead * 8;
      if constexpr (W::IS_QUANTIZED) {
        int first = group_of(block);
        unsigned scale_bytes = (group_of(block + count - 1) - first + 1) * W::SCALE_BYTES;
        expect_bytes(barrier, count * W::BYTES + scale_bytes);
        copy_bytes(to + CODE_BYTES, scales + first * 32, scale_bytes, barrier);
      } else {
        expect_bytes(barrier, count * W::BYTES);
      }
      copy_bytes(to, codes + size_t(block) * W::BYTES, count * W::BYTES, barrier);
    }
    ahead = ahead + 1 == STAGES ? 0 : ahead + 1;
    block += CHUNK;
    if (block >= end) {
      block = begin;
      tile += gridDim.x;
      codes += size_t(gridDim.x) * blocks * W::BYTES;
      scales += size_t(gridDim.x) * group_of(blocks) * 32;
      if (tile >= tiles) {
        next_matrix();
      }
    }
  }

  // The next chunk, once it has arrived; another one is asked for in place of the one before.
  DEVICE const unsigned char* take() {
    __syncwarp();
    ask();
    wait_for_bytes(barriers + now * 8, phase);
    const unsigned char* chunk = ring + now * BYTES;
    if (++now == STAGES) {
      now = 0;
      phase ^= 1;
    }
    return chunk;
  }
};

// Products of one matrix and a row of x in shared memory: of the tiles that are this thread block's.
// totals: room for the sum of each block of x.
// residual(output): what will be added to an output. done(tile, row, low, high, residuals): the sums of outputs 16 tile
// + row and 16 tile + row + 8.
template <typename Chunks, typename T, typename Residual, typename Done>
DEVICE void multiply_row(Chunks& chunks, const T* x, float* totals, int k, int n, float (&sums)[ROUND][RANGES][16],
                         Residual residual, Done done) {
  using W = typename Chunks::W;
  constexpr int CHUNK = Chunks::CHUNK;
  int lane = threadIdx.x % 32;
  int warp = threadIdx.x / 32;
  int tiles = n / 16;
  int begin, end;
  Chunks::range_of(k / W::BLOCK, begin, end);
  const T* column = x + (lane % 4) * (W::BLOCK / 4);
  for (int first_tile = blockIdx.x; first_tile < tiles; first_tile += ROUND * gridDim.x) {
    int mine = threadIdx.x / 8;
    int row = threadIdx.x % 8;
    int tile = first_tile + mine * gridDim.x;
    bool is_mine = mine < ROUND && tile < tiles;
    float2 added = {};
    if (is_mine) {
      added = make_float2(residual(tile * 16 + row), residual(tile * 16 + row + 8));
    }
    for (int i = 0; i < ROUND && first_tile + i * gridDim.x < tiles; ++i) {
      bool is_first = i == 0 && first_tile == blockIdx.x;
      float low = 0, high = 0;
      for (int first = begin; first < end; first += CHUNK) {
        const unsigned char* chunk = chunks.take();
        // The products of a chunk side by side: each is a chain of its own. Where there is no second block, what is
        // computed of it is not added; shared memory has what is read for it.
        unsigned values[CHUNK][2 * W::STEPS] = {};
        unsigned a[CHUNK][W::STEPS][4];
        float product[CHUNK][4] = {};
        float total[CHUNK];
#pragma unroll
        for (int c = 0; c < CHUNK; ++c) {
          unsigned word[2 * W::WORDS];
          W::template load<true>(word, chunk + c * W::BYTES);
          if (lane < 4) { // which have the first column
            load_words<2 * W::STEPS>(values[c], column + (first + c) * W::BLOCK);
          }
          W::unpack(word, a[c]);
        }
        if (W::IS_QUANTIZED && is_first) {
#pragma unroll
          for (int c = 0; c < CHUNK; ++c) {
            float of_x[4];
            W::add_up(of_x, values[c]);
            total[c] = of_x[0];
            if (lane == 0 && (c == 0 || first + c < end)) {
              totals[first + c] = of_x[0];
            }
          }
        } else if (W::IS_QUANTIZED) {
#pragma unroll
          for (int c = 0; c < CHUNK; ++c) {
            total[c] = totals[first + c];
          }
        }
#pragma unroll
        for (int step = 0; step < W::STEPS; ++step) {
#pragma unroll
          for (int c = 0; c < CHUNK; ++c) {
            multiply<T>(product[c], a[c][step], values[c][2 * step], values[c][2 * step + 1]);
          }
        }
        // Only the lanes that have the first column, which is x, go on with what is of use.
#pragma unroll
        for (int c = 0; c < CHUNK; ++c) {
          if constexpr (W::IS_QUANTIZED) {
            int group = Chunks::group_of(first + c) - Chunks::group_of(first);
            typename W::Scales of = W::load_scales(chunk + Chunks::CODE_BYTES + group * W::SCALE_BYTES);
            float to_low = W::add(low, product[c][0], of.scale[0], of.bias[0], total[c]);
            float to_high = W::add(high, product[c][2], of.scale[1], of.bias[1], total[c]);
            low = c == 0 || first + c < end ? to_low : low;
            high = c == 0 || first + c < end ? to_high : high;
          } else {
            low = __fadd_rn(low, product[c][0]);
            high = __fadd_rn(high, product[c][2]);
          }
        }
      }
      if (lane % 4 == 0) {
        sums[i][warp][lane / 4] = low;
        sums[i][warp][lane / 4 + 8] = high;
      }
      __syncwarp(); // totals
    }
    __syncthreads();
    if (is_mine) {
      float low = 0, high = 0;
#pragma unroll
      for (int range = 0; range < RANGES; ++range) {
        low += sums[mine][range][row];
        high += sums[mine][range][row + 8];
      }
      done(tile, row, low, high, added);
    }
    if (first_tile + ROUND * gridDim.x < tiles) {
      __syncthreads();
    }
  }
}
