// A step of one token of one sequence through all layers in one kernel, the same bits as from the kernels of a layer.
//
// A thread block stays on each multiprocessor. Its warps ask for their weights of the layers one after the other, as
// far ahead as shared memory holds them, also while they wait for what other thread blocks compute: the memory is not
// idle between one matrix and the next.

constexpr int ROUND = 16; // tiles whose sums a thread block has at a time

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
    __threadfence();
    atomicAdd(counter, 1);
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

// The chunks of weights that one warp multiplies, in their order, through a ring in shared memory.
template <typename T, int BITS, int GROUP_SIZE, int STAGES, int LAYERS>
struct Chunks {
  using W = Tile<T, BITS, GROUP_SIZE>;
  static constexpr int CHUNK = BITS == 16 ? 1 : 2; // blocks
  static constexpr int BLOCK_BYTES = W::BYTES + W::SCALE_BYTES;
  static constexpr int BYTES = CHUNK * BLOCK_BYTES;

  const Decode<T, LAYERS>& of;
  unsigned char* ring;
  // The chunk that is asked for next.
  int layer = 0;
  int matrix = -1;
  int tile = 0;
  int block = 0;
  int begin = 0;
  int end = 0;
  int blocks = 0;
  int tiles = 0;
  const unsigned char* codes = nullptr;
  const T* scales = nullptr;
  int ahead = 0; // its place in the ring
  int now = 0; // of the one that is multiplied

  DEVICE Chunks(const Decode<T, LAYERS>& decode, unsigned char* staged) : of(decode) {
    ring = staged + threadIdx.x / 32 * (STAGES * BYTES);
    next_matrix();
#pragma unroll
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
    codes = of.layer[layer].matrix[matrix].codes;
    scales = of.layer[layer].matrix[matrix].scales;
  }

  DEVICE void ask() {
    if (layer < of.layer_count) {
      int lane = threadIdx.x % 32;
      unsigned to = __cvta_generic_to_shared(ring + ahead * BYTES);
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) {
        if (i == 0 || block + i < end) {
          const unsigned char* from = codes + (size_t(tile) * blocks + block + i) * W::BYTES;
#pragma unroll
          for (int v = 0; v < W::VECTORS; ++v) {
            int at = (v * 32 + lane) * W::VECTOR * 4;
            copy_vector<W::VECTOR * 4>(to + i * BLOCK_BYTES + at, from + at);
          }
          if (W::IS_QUANTIZED && lane < 4) {
            int group = (block + i) * W::BLOCK / GROUP_SIZE;
            const T* of_group = scales + (size_t(tile) * (blocks * W::BLOCK / GROUP_SIZE) + group) * 32;
            copy_vector<16>(to + i * BLOCK_BYTES + W::BYTES + lane * 16, of_group + lane * 8);
          }
        }
      }
      ahead = ahead + 1 == STAGES ? 0 : ahead + 1;
      block += CHUNK;
      if (block >= end) {
        block = begin;
        tile += gridDim.x;
        if (tile >= tiles) {
          next_matrix();
        }
      }
    }
    asm volatile("cp.async.commit_group;");
  }

  // The next chunk, which has arrived; another one is asked for.
  DEVICE const unsigned char* take() {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
    __syncwarp();
    ask();
    const unsigned char* chunk = ring + now * BYTES;
    now = now + 1 == STAGES ? 0 : now + 1;
    return chunk;
  }
};

// Products of one matrix and a row of x in shared memory: of the tiles that are this thread block's.
// done(tile, row, low, high): the sums of outputs 16 tile + row and 16 tile + row + 8.
template <typename Chunks, typename T, typename Done>
DEVICE void multiply_row(Chunks& chunks, const T* x, int k, int n, float (&sums)[ROUND][RANGES][16], Done done) {
  using W = typename Chunks::W;
  int lane = threadIdx.x % 32;
  int warp = threadIdx.x / 32;
  int tiles = n / 16;
  int begin, end;
  Chunks::range_of(k / W::BLOCK, begin, end);
  const T* column = x + (lane % 4) * (W::BLOCK / 4);
  for (int first_tile = blockIdx.x; first_tile < tiles; first_tile += ROUND * gridDim.x) {
    for (int i = 0; i < ROUND && first_tile + i * gridDim.x < tiles; ++i) {
      float sum[4] = {0, 0, 0, 0};
      for (int first = begin; first < end; first += Chunks::CHUNK) {
        const unsigned char* chunk = chunks.take();
        // The products of a chunk side by side: each is a chain of its own.
        float product[Chunks::CHUNK][4] = {};
        float of_x[Chunks::CHUNK][4] = {};
#pragma unroll
        for (int c = 0; c < Chunks::CHUNK; ++c) {
          if (c == 0 || first + c < end) {
            unsigned word[2 * W::WORDS];
            W::template load<true>(word, chunk + c * Chunks::BLOCK_BYTES);
            unsigned a[W::STEPS][4];
            W::unpack(word, a);
            unsigned values[2 * W::STEPS];
            load_words<2 * W::STEPS>(values, column + (first + c) * W::BLOCK);
            if constexpr (W::IS_QUANTIZED) {
              W::add_up(of_x[c], values);
            }
#pragma unroll
            for (int step = 0; step < W::STEPS; ++step) {
              multiply<T>(product[c], a[step], values[2 * step], values[2 * step + 1]);
            }
          }
        }
#pragma unroll
        for (int c = 0; c < Chunks::CHUNK; ++c) {
          if (c == 0 || first + c < end) {
            typename W::Scales scales;
            if constexpr (W::IS_QUANTIZED) {
              scales = W::load_scales(chunk + c * Chunks::BLOCK_BYTES + W::BYTES);
            }
            W::add(sum, product[c], scales, of_x[c]);
          }
        }
      }
      if (lane % 4 == 0) {
        sums[i][warp][lane / 4] = sum[0];
        sums[i][warp][lane / 4 + 8] = sum[2];
      }
    }
    __syncthreads();
    int mine = threadIdx.x / 8;
    int tile = first_tile + mine * gridDim.x;
    if (mine < ROUND && tile < tiles) {
      int row = threadIdx.x % 8;
      float low = 0, high = 0;
#pragma unroll
      for (int range = 0; range < RANGES; ++range) {
        low += sums[mine][range][row];
        high += sums[mine][range][row + 8];
      }
      done(tile, row, low, high);
    }
    if (first_tile + ROUND * gridDim.x < tiles) {
      __syncthreads();
    }
  }
}

// What attention passes through shared memory.
template <typename T, int GROUP, int HEAD_DIM>
struct AttendShared {
  alignas(16) T queries[GROUP * HEAD_DIM];
  float4 score[8][32];
  bool is_last;
};

// Attention of the token: the pages of a kv head are shared out over thread blocks, a page to a thread block at a time,
// eight of its keys to a warp, later some of the dimensions of its values. The thread block that ends last merges all
// pages of the head. `wait` returns once qkv can be read; pages of earlier steps are asked for before.
template <typename T, int LAYERS, int QUERY_HEADS, int KV_HEADS, int HEAD_DIM, bool HAS_NORM, typename Wait>
DEVICE void attend_row(const Decode<T, LAYERS>& of, const Layer<T>& layer,
                       AttendShared<T, QUERY_HEADS / KV_HEADS, HEAD_DIM>& shared, Wait wait) {
  constexpr int GROUP = QUERY_HEADS / KV_HEADS;
  constexpr int PARTS_OF_KEY = HEAD_DIM / 64;
  constexpr int DIM_TILES = HEAD_DIM / 64; // of a warp
  int each = gridDim.x / KV_HEADS; // thread blocks of a head
  int kv_head = blockIdx.x % KV_HEADS;
  int page = blockIdx.x / KV_HEADS;
  int position = of.places[0];
  int target = of.places[1];
  const int* pages = of.table + of.tile[3];
  int page_count = position / PAGE + 1;
  if (page >= each || page >= page_count) {
    return;
  }
  int lane = threadIdx.x % 32;
  int warp = threadIdx.x / 32;
  Eight<PARTS_OF_KEY> keys;
  Eight<1> values[DIM_TILES];
  auto load = [&] {
    size_t at = (size_t(pages[page]) * KV_HEADS + kv_head) * PAGE * HEAD_DIM;
    keys.load(layer.keys + at + key_of_tile(warp) * HEAD_DIM);
#pragma unroll
    for (int t = 0; t < DIM_TILES; ++t) {
      values[t].load(layer.values + at + ((warp * DIM_TILES + t) * 8 + lane / 4) * PAGE);
    }
  };
  bool is_new = page + 1 == page_count;
  if (!is_new) {
    load();
  }
  wait();
  // The last page is this thread block's if one of its pages is: then keys and values are to be written.
  bool has_new = (page_count - 1) % each == page;
  for (int head = warp; head < GROUP + (has_new ? 2 : 0); head += 8) {
    Head<T, HEAD_DIM> turned;
    int from = head < GROUP ? kv_head * GROUP + head : QUERY_HEADS + (head - GROUP) * KV_HEADS + kv_head;
    turned.load(of.qkv + from * HEAD_DIM);
    if (head <= GROUP) {
      if constexpr (HAS_NORM) {
        turned.norm(head < GROUP ? layer.q_norm : layer.k_norm, of.eps);
      }
      turned.rotate(of.frequencies, float(position));
    }
    if (head < GROUP) {
      turned.store(shared.queries + head * HEAD_DIM, 1);
    } else if (head == GROUP) {
      turned.store(layer.keys + place_of_key<KV_HEADS, HEAD_DIM>(target, kv_head), 1);
    } else {
      turned.store(layer.values + place_of_value<KV_HEADS, HEAD_DIM>(target, kv_head), PAGE);
    }
  }
  __syncthreads();
  Queries<T, HEAD_DIM> q;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int row = lane / 4 + 8 * half;
    q.position[half] = row < GROUP ? position : -1;
#pragma unroll
    for (int part = 0; part < PARTS_OF_KEY; ++part) {
      Sixteen loaded = load_sixteen(shared.queries + row % GROUP * HEAD_DIM + part * 64 + lane % 4 * 16);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        q.pair[part][half][i] = loaded.pair[i];
      }
    }
  }
  if (is_new) {
    load();
  }
  float* of_head = of.partial + size_t(kv_head) * page_count * GROUP * (HEAD_DIM + 2);
  int computed = 0;
  for (; page < page_count; page += each) {
    if (computed > 0) {
      load();
      __syncthreads();
    }
    ++computed;
    float product[4];
    score_keys<T, HEAD_DIM>(q, keys, product);
    shared.score[warp][lane] = make_float4(product[0], product[1], product[2], product[3]);
    __syncthreads();
    float score[8][4];
#pragma unroll
    for (int tile = 0; tile < 8; ++tile) {
      float4 all = shared.score[tile][lane];
      score[tile][0] = all.x;
      score[tile][1] = all.y;
      score[tile][2] = all.z;
      score[tile][3] = all.w;
    }
    float* result = of_head + page * GROUP * (HEAD_DIM + 2);
    unsigned a[4][4];
    weigh_page<T, HEAD_DIM>(score, q.position, page * PAGE, a, [&](int half, float largest, float weight) {
      int row = lane / 4 + 8 * half;
      if (warp == 0 && lane % 4 == 0 && row < GROUP) {
        result[row * (HEAD_DIM + 2) + HEAD_DIM] = largest;
        result[row * (HEAD_DIM + 2) + HEAD_DIM + 1] = weight;
      }
    });
#pragma unroll
    for (int t = 0; t < DIM_TILES; ++t) {
      float o[4];
      sum_values<T>(a, values[t], o);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int row = lane / 4 + 8 * half;
        if (row < GROUP) {
          float* to = result + row * (HEAD_DIM + 2) + (warp * DIM_TILES + t) * 8 + lane % 4 * 2;
          *reinterpret_cast<float2*>(to) = make_float2(o[2 * half], o[2 * half + 1]);
        }
      }
    }
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    int* counter = of.arrived + kv_head;
    shared.is_last = atomicAdd(counter, computed) + computed == page_count;
    if (shared.is_last) {
      *counter = 0;
    }
  }
  __syncthreads();
  if (!shared.is_last) {
    return;
  }
  __threadfence();
  for (int pair = threadIdx.x; pair < GROUP * HEAD_DIM / 2; pair += 256) {
    int row = pair / (HEAD_DIM / 2);
    int dim = pair % (HEAD_DIM / 2) * 2;
    const float* of_row = of_head + row * (HEAD_DIM + 2);
    Running<2> all, part;
#pragma unroll 4
    for (int page = 0; page < page_count; ++page) {
      const float* from = of_row + page * GROUP * (HEAD_DIM + 2);
      float2 most = __ldcg(reinterpret_cast<const float2*>(from + HEAD_DIM));
      float2 value = __ldcg(reinterpret_cast<const float2*>(from + dim));
      part.merge(most.x, most.y, [&](int i) { return i == 0 ? value.x : value.y; });
      if (page % PART == PART - 1 || page + 1 == page_count) {
        all.merge(part.largest, part.weight, [&](int i) { return part.value[i]; });
        part = Running<2>();
      }
    }
    unsigned both = pack<T>(__fdividef(all.value[0], all.weight), __fdividef(all.value[1], all.weight));
    *reinterpret_cast<unsigned*>(of.attended + (kv_head * GROUP + row) * HEAD_DIM + dim) = both;
  }
  tell_all(of.progress + ATTENDED);
}

template <typename T, int BITS, int GROUP_SIZE, int QUERY_HEADS, int KV_HEADS, int HEAD_DIM, bool HAS_NORM, int STAGES,
          int LAYERS>
DEVICE void decode(const Decode<T, LAYERS>& of) {
  using C = Chunks<T, BITS, GROUP_SIZE, STAGES, LAYERS>;
  extern __shared__ __align__(16) unsigned char staged[]; // weights of each warp, then x
  __shared__ float sums[ROUND][RANGES][16];
  __shared__ float of_warp[8];
  __shared__ AttendShared<T, QUERY_HEADS / KV_HEADS, HEAD_DIM> attend_shared;
  let_next_begin();
  T* x = reinterpret_cast<T*>(staged + RANGES * STAGES * C::BYTES);
  C chunks(of, staged);
  wait_for_previous();
  unsigned finished = 0;
  for (int index = 0; index < of.layer_count; ++index) {
    const Layer<T>& layer = of.layer[index];
    for (int matrix = 0; matrix < MATRICES; ++matrix) {
      int k = of.k[matrix];
      auto wait = [&] { wait_until(of.progress + FINISHED, finished * gridDim.x); };
      if (matrix == O) {
        attend_row<T, LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM, HAS_NORM>(of, layer, attend_shared, wait);
        wait_until(of.progress + ATTENDED, (index + 1) * KV_HEADS);
      } else if (finished > 0) {
        wait();
      }
      if (matrix == QKV || matrix == GATE_UP) {
        norm_row(of.x, matrix == QKV ? layer.input_norm : layer.post_attention_norm, x, k, of.eps, of_warp);
      } else {
        const uint4* from = reinterpret_cast<const uint4*>(matrix == O ? of.attended : of.mlp);
        for (int at = threadIdx.x; at < k / 8; at += 256) {
          reinterpret_cast<uint4*>(x)[at] = from[at];
        }
      }
      __syncthreads();
      const T* bias = layer.matrix[matrix].bias;
      multiply_row(chunks, x, k, of.n[matrix], sums, [&](int tile, int row, float low, float high) {
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
            of.x[at] = T(both[half] + float(of.x[at]));
          }
        }
      });
      tell_all(of.progress + FINISHED);
      ++finished;
    }
  }
  if (threadIdx.x == 0 && atomicAdd(of.progress + ENDED, 1) == gridDim.x - 1) {
    of.progress[FINISHED] = of.progress[ATTENDED] = of.progress[ENDED] = 0;
  }
}
