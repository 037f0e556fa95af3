// A step of one token of one sequence through all layers in one kernel, the same bits as from the kernels of a layer.
//
// A thread block stays on each multiprocessor. Its warps ask for their weights of the layers one after the other, as
// far ahead as shared memory holds them, also while they wait for what other thread blocks compute: the memory is not
// idle between one matrix and the next.

constexpr int WARPS = RANGES; // of a thread block: each makes the sums of one range
constexpr int ROUND = 12; // tiles whose sums a thread block has at a time

template <typename T>
struct Matrix {
  const unsigned char* codes;
  const T* scales;
  const T* bias; // null: none
};

// In the order in which they are computed.
constexpr int QKV = 0;
constexpr int O = 1;
constexpr int GATE_UP = 2;
constexpr int DOWN = 3;
constexpr int MATRICES = 4;

template <typename T>
struct Layer {
  Matrix<T> matrix[MATRICES];
  const T* input_norm;
  const T* post_attention_norm;
  const T* q_norm;
  const T* k_norm;
  T* keys;
  T* values;
};

template <typename T, int LAYERS>
struct Decode {
  T* x;                     // [hidden], what enters and leaves
  T* qkv;                   // [(queries + 2 kv) head_dim]
  T* attended;              // [queries, head_dim]
  T* mlp;                   // [width of the MLP]
  float* partial;           // [kv heads, pages, GROUP, head_dim + 2]
  int* arrived;             // [kv heads], pages that are computed; zeros before and after
  unsigned* progress;       // [3], zeros before and after: see below
  const float* frequencies; // [head_dim / 2]
  const int* places;        // [2]
  const int* tile;          // [TILE]
  const int* table;
  int k[MATRICES];
  int n[MATRICES];
  float eps;
  int layer_count;
  Layer<T> layer[LAYERS];
};

// Of `progress`: matrices that thread blocks have finished, heads that are attended to, thread blocks that have ended.
constexpr int FINISHED = 0;
constexpr int ATTENDED = 1;
constexpr int ENDED = 2;

// What this thread block has written can be read by who waits for it.
DEVICE void tell_all(unsigned* counter) {
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
  }
}

DEVICE void wait_until(const unsigned* counter, unsigned count) {
  if (threadIdx.x == 0) {
    unsigned now;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    } while (now < count);
  }
  __syncthreads();
}

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

// What attention passes through shared memory.
template <typename T, int GROUP, int HEAD_DIM>
struct AttendShared {
  static constexpr int PAIRS = 128; // of dimensions that are merged at a time
  alignas(16) T queries[GROUP * HEAD_DIM];
  alignas(16) T key[HEAD_DIM];
  T value[HEAD_DIM];
  float4 score[8][32];
  float4 part[WARPS * 32 / PAIRS][PAIRS]; // largest, weight, two values
  bool is_last;
};

// Attention of the token: the pages of a kv head are shared out over thread blocks, a page to a thread block at a time,
// eight of its keys to a warp, later eight dimensions of its values. The thread block that ends last merges all pages
// of the head. `wait` returns once qkv can be read; the pages as earlier steps left them are asked for before.
template <typename T, int LAYERS, int QUERY_HEADS, int KV_HEADS, int HEAD_DIM, bool HAS_NORM, typename Wait>
DEVICE void attend_row(const Decode<T, LAYERS>& of, const Layer<T>& layer,
                       AttendShared<T, QUERY_HEADS / KV_HEADS, HEAD_DIM>& shared,
                       const typename Head<T, HEAD_DIM>::Turn& turn, int position, int target, const int* pages,
                       Wait wait) {
  constexpr int GROUP = QUERY_HEADS / KV_HEADS;
  constexpr int PARTS_OF_KEY = HEAD_DIM / 64;
  constexpr int STRIDE = HEAD_DIM + 2; // of a row's partial result
  int each = gridDim.x / KV_HEADS; // thread blocks of a head
  int kv_head = blockIdx.x % KV_HEADS;
  int page = blockIdx.x / KV_HEADS;
  int page_count = position / PAGE + 1;
  if (page >= each || page >= page_count) {
    return;
  }
  int lane = threadIdx.x % 32;
  int warp = threadIdx.x / 32;
  // Warps without keys or values of their own load another one's, and do not use them.
  bool has_keys = warp < 8;
  bool has_values = warp < HEAD_DIM / 8;
  int key = key_of_tile(warp % 8);
  int dim = warp % (HEAD_DIM / 8) * 8 + lane / 4; // of the lane's values
  Eight<PARTS_OF_KEY> keys;
  Eight<1> values;
  auto load = [&] {
    size_t at = (size_t(pages[page]) * KV_HEADS + kv_head) * PAGE * HEAD_DIM;
    keys.load(layer.keys + at + key * HEAD_DIM);
    values.load(layer.values + at + dim * PAGE);
  };
  load();
  typename Head<T, HEAD_DIM>::Norm norm;
  if constexpr (HAS_NORM) {
    norm.load(warp < GROUP ? layer.q_norm : layer.k_norm);
  }
  wait();
  // The last page is this thread block's if one of its pages is: then keys and values are to be written.
  bool has_new = (page_count - 1) % each == page;
  for (int head = warp; head < GROUP + (has_new ? 2 : 0); head += WARPS) {
    Head<T, HEAD_DIM> turned;
    int from = head < GROUP ? kv_head * GROUP + head : QUERY_HEADS + (head - GROUP) * KV_HEADS + kv_head;
    turned.load(of.qkv + from * HEAD_DIM);
    if (head <= GROUP) {
      if constexpr (HAS_NORM) {
        if (head == WARPS) {
          norm.load(layer.k_norm);
        }
        turned.norm(norm, of.eps);
      }
      turned.rotate(turn);
    }
    if (head < GROUP) {
      turned.store(shared.queries + head * HEAD_DIM, 1);
    } else if (head == GROUP) {
      turned.store(shared.key, 1);
      turned.store(layer.keys + place_of_key<KV_HEADS, HEAD_DIM>(target, kv_head), 1);
    } else {
      turned.store(shared.value, 1);
      turned.store(layer.values + place_of_value<KV_HEADS, HEAD_DIM>(target, kv_head), PAGE);
    }
  }
  __syncthreads();
  Queries<T, HEAD_DIM> q;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int row = lane / 4 + 8 * half;
#pragma unroll
    for (int part = 0; part < PARTS_OF_KEY; ++part) {
      Sixteen loaded = load_sixteen(shared.queries + row % GROUP * HEAD_DIM + part * 64 + lane % 4 * 16);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        q.pair[part][half][i] = loaded.pair[i];
      }
    }
  }
  int positions[2] = {lane / 4 < GROUP ? position : -1, lane / 4 + 8 < GROUP ? position : -1};
  float* of_head = of.partial + size_t(kv_head) * page_count * GROUP * STRIDE;
  int computed = 0;
  for (; page < page_count; page += each) {
    if (computed > 0) {
      load();
      __syncthreads();
    }
    ++computed;
    if (page + 1 == page_count) {
      // This step's key and value, which may not be there yet.
      int place = target % PAGE;
      Eight<PARTS_OF_KEY> fresh;
      fresh.load(shared.key);
#pragma unroll
      for (int part = 0; part < PARTS_OF_KEY; ++part) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          keys.part[part].pair[i] = key == place ? fresh.part[part].pair[i] : keys.part[part].pair[i];
        }
      }
      unsigned bits = shared.value[dim].bits;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        unsigned pair = values.part[0].pair[i];
        unsigned with = place % 2 ? (pair & 0xFFFF) | bits << 16 : (pair & 0xFFFF0000) | bits;
        values.part[0].pair[i] = lane % 4 == place / 16 && place % 16 / 2 == i ? with : pair;
      }
    }
    if (has_keys) {
      float product[4];
      score_keys<T, HEAD_DIM>(q, keys, product);
      shared.score[warp][lane] = make_float4(product[0], product[1], product[2], product[3]);
    }
    __syncthreads();
    if (!has_values) {
      continue;
    }
    float score[8][4];
#pragma unroll
    for (int tile = 0; tile < 8; ++tile) {
      float4 all = shared.score[tile][lane];
      score[tile][0] = all.x;
      score[tile][1] = all.y;
      score[tile][2] = all.z;
      score[tile][3] = all.w;
    }
    float* result = of_head + page * GROUP * STRIDE;
    unsigned a[4][4];
    weigh_page<T, HEAD_DIM>(score, positions, page * PAGE, a, [&](int half, float largest, float weight) {
      int row = lane / 4 + 8 * half;
      if (warp == 0 && lane % 4 == 0 && row < GROUP) {
        *reinterpret_cast<float2*>(result + row * STRIDE + HEAD_DIM) = make_float2(largest, weight);
      }
    });
    float o[4];
    sum_values<T>(a, values, o);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int row = lane / 4 + 8 * half;
      if (row < GROUP) {
        float* to = result + row * STRIDE + warp * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(to) = make_float2(o[2 * half], o[2 * half + 1]);
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int* counter = of.arrived + kv_head;
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(computed) : "memory");
    shared.is_last = before + computed == page_count;
    if (shared.is_last) {
      *counter = 0;
    }
  }
  __syncthreads();
  if (!shared.is_last) {
    return;
  }
  // Some parts at a time, each by threads of its own; then one after the other.
  constexpr int PAIRS = AttendShared<T, GROUP, HEAD_DIM>::PAIRS;
  constexpr int AT_ONCE = WARPS * 32 / PAIRS;
  int mine = threadIdx.x / PAIRS;
  for (int first = 0; first < GROUP * HEAD_DIM / 2; first += PAIRS) {
    int pair = first + threadIdx.x % PAIRS;
    bool is_there = pair < GROUP * HEAD_DIM / 2;
    int row = is_there ? pair / (HEAD_DIM / 2) : 0;
    int dim = pair % (HEAD_DIM / 2) * 2;
    const float* of_row = of_head + row * STRIDE;
    Running<2> all;
    for (int first_page = 0; first_page < page_count; first_page += AT_ONCE * PART) {
      float2 most[PART], value[PART];
      int page = first_page + mine * PART;
#pragma unroll
      for (int i = 0; i < PART; ++i) {
        const float* from = of_row + min(page + i, page_count - 1) * GROUP * STRIDE;
        most[i] = __ldcg(reinterpret_cast<const float2*>(from + HEAD_DIM));
        value[i] = __ldcg(reinterpret_cast<const float2*>(from + dim));
      }
      Running<2> part;
#pragma unroll
      for (int i = 0; i < PART; ++i) {
        if (page + i < page_count) {
          part.merge(most[i].x, most[i].y, [&](int d) { return d == 0 ? value[i].x : value[i].y; });
        }
      }
      shared.part[mine][threadIdx.x % PAIRS] = make_float4(part.largest, part.weight, part.value[0], part.value[1]);
      __syncthreads();
      if (mine == 0) {
        for (int other = 0; other < AT_ONCE && first_page + other * PART < page_count; ++other) {
          float4 of_part = shared.part[other][threadIdx.x];
          all.merge(of_part.x, of_part.y, [&](int d) { return d == 0 ? of_part.z : of_part.w; });
        }
      }
      __syncthreads();
    }
    if (mine == 0 && is_there) {
      unsigned both = pack<T>(__fdividef(all.value[0], all.weight), __fdividef(all.value[1], all.weight));
      *reinterpret_cast<unsigned*>(of.attended + (kv_head * GROUP + row) * HEAD_DIM + dim) = both;
    }
  }
  tell_all(of.progress + ATTENDED);
}

template <typename T, int BITS, int GROUP_SIZE, int QUERY_HEADS, int KV_HEADS, int HEAD_DIM, bool HAS_NORM, int STAGES,
          int LAYERS>
DEVICE void decode(const Decode<T, LAYERS>& of) {
  using C = Chunks<T, BITS, GROUP_SIZE, STAGES, LAYERS>;
  static_assert(WARPS * 32 == NORM_THREADS, "a thread block norms as one of the norm's own kernel");
  extern __shared__ __align__(16) unsigned char staged[]; // weights of each warp, x and as much as a block, sums of its blocks
  __shared__ float sums[ROUND][RANGES][16];
  __shared__ float of_warp[WARPS];
  __shared__ AttendShared<T, QUERY_HEADS / KV_HEADS, HEAD_DIM> attend_shared;
  let_next_begin();
  T* x = reinterpret_cast<T*>(staged + WARPS * STAGES * C::BYTES);
  int widest = max(max(of.k[0], of.k[1]), max(of.k[2], of.k[3]));
  float* totals = reinterpret_cast<float*>(x + widest + C::W::BLOCK);
  __shared__ unsigned long long barriers[WARPS][STAGES];
  C chunks(of, staged, barriers);
  int position = of.places[0];
  int target = of.places[1];
  const int* pages = of.table + of.tile[3];
  typename Head<T, HEAD_DIM>::Turn turn(of.frequencies, float(position));
  wait_for_previous();
  unsigned finished = 0;
#pragma unroll 1
  for (int index = 0; index < of.layer_count; ++index) {
    const Layer<T>& layer = of.layer[index];
#pragma unroll 1
    for (int matrix = 0; matrix < MATRICES; ++matrix) {
      int k = of.k[matrix];
      bool is_normed = matrix == QKV || matrix == GATE_UP;
      const T* norm = matrix == QKV ? layer.input_norm : layer.post_attention_norm;
      uint4 first = is_normed ? first_of_norm(norm, k) : uint4();
      auto wait = [&] { wait_until(of.progress + FINISHED, finished * gridDim.x); };
      if (matrix == O) {
        attend_row<T, LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM, HAS_NORM>(of, layer, attend_shared, turn, position, target,
                                                                         pages, wait);
        wait_until(of.progress + ATTENDED, (index + 1) * KV_HEADS);
      } else if (finished > 0) {
        wait();
      }
      if (is_normed) {
        norm_row(of.x, norm, first, x, k, of.eps, of_warp);
      } else {
        const uint4* from = reinterpret_cast<const uint4*>(matrix == O ? of.attended : of.mlp);
        for (int at = threadIdx.x; at < k / 8; at += WARPS * 32) {
          reinterpret_cast<uint4*>(x)[at] = from[at];
        }
      }
      __syncthreads();
      const T* bias = layer.matrix[matrix].bias;
      auto residual = [&](int at) { return matrix == O || matrix == DOWN ? float(of.x[at]) : 0.0f; };
      auto done = [&](int tile, int row, float low, float high, float2 added) {
        if (matrix == GATE_UP) {
          of.mlp[tile * 8 + row] = T(gated(low, high));
          return;
        }
        float both[2] = {low, high};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int at = tile * 16 + row + 8 * half;
          if (bias) {
            both[half] += float(bias[at]);
          }
          if (matrix == QKV) {
            of.qkv[at] = T(both[half]);
          } else {
            of.x[at] = T(both[half] + (half == 0 ? added.x : added.y));
          }
        }
      };
      multiply_row(chunks, x, totals, k, of.n[matrix], sums, residual, done);
      tell_all(of.progress + FINISHED);
      ++finished;
    }
  }
  if (threadIdx.x == 0 && atomicAdd(of.progress + ENDED, 1) == gridDim.x - 1) {
    of.progress[FINISHED] = of.progress[ATTENDED] = of.progress[ENDED] = 0;
  }
}
