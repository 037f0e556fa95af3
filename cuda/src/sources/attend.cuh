// Causal attention over paged keys and values, the same bits for a token in whatever company.
//
// Pages are merged in their order, PART at a time, and parts in theirs. A running result is (largest score, sum of
// weights, weighted values), in powers of two. Pages and parts that a row does not see change none of its bits.
//
// keys: [pages, kv heads, PAGE, head_dim], values: [pages, kv heads, head_dim, PAGE].
// tiles: [tiles, TILE], of tokens of one sequence: the first one's row, how many, the first one's position, where in
// `table` the sequence's pages begin, and where its partial results stand. A row of the matrices here is a query head of
// a token; the GROUP query heads of one kv head stand together.

constexpr int PART = 4; // pages
constexpr int TILE = 5; // numbers

DEVICE float factor(float largest, float of_both) {
  return largest == NONE ? 0.0f : exp2f(largest - of_both);
}

// What becomes of a running result and another one's when they are merged.
struct Merger {
  float mine;
  float others;

  DEVICE Merger(float& largest, float& weight, float other_largest, float other_weight) {
    float both = fmaxf(largest, other_largest);
    mine = factor(largest, both);
    others = factor(other_largest, both);
    largest = both;
    weight = __fmaf_rn(other_weight, others, __fmul_rn(weight, mine));
  }

  DEVICE void merge(float& value, float other) const {
    value = __fmaf_rn(other, others, __fmul_rn(value, mine));
  }
};

// One row's running result over `DIMS` of a head's dimensions.
template <int DIMS>
struct Running {
  float largest = NONE;
  float weight = 0;
  float value[DIMS] = {};

  template <typename From>
  DEVICE void merge(float other_largest, float other_weight, From other_value) {
    Merger merger(largest, weight, other_largest, other_weight);
#pragma unroll
    for (int i = 0; i < DIMS; ++i) {
      merger.merge(value[i], other_value(i));
    }
  }
};

// The queries of sixteen rows in a warp's registers.
template <typename T, int HEAD_DIM>
struct Queries {
  unsigned pair[HEAD_DIM / 64][2][8];
  int position[2]; // of the lane's rows; -1 where there is none

  template <int KV_HEADS, int GROUP>
  DEVICE void load(const T* queries, int first_row, int count, int first_position, int kv_head) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int row = lane / 4 + 8 * half;
      int token = row / GROUP;
      position[half] = token < count ? first_position + token : -1;
      int safe = max(min(token, count - 1), 0);
      size_t head_row = size_t(first_row + safe) * KV_HEADS * GROUP + kv_head * GROUP + row % GROUP;
#pragma unroll
      for (int part = 0; part < HEAD_DIM / 64; ++part) {
        Sixteen loaded = load_sixteen(queries + head_row * HEAD_DIM + part * 64 + lane % 4 * 16);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          pair[part][half][i] = loaded.pair[i];
        }
      }
    }
  }
};

// A lane's part of eight keys of a page, or of eight dimensions of its values: row `lane / 4` of them, of each 64
// elements the quarter `lane % 4`.
template <int PARTS>
struct Eight {
  Sixteen part[PARTS];

  template <typename T>
  DEVICE void load(const T* row) {
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
      part[i] = load_sixteen(row + i * 64 + threadIdx.x % 4 * 16);
    }
  }
};

// Keys stand in such an order that a lane's weights, and later its values, are neighbours: the place in the page of the
// lane's key of tile `tile`, of eight tiles of eight.
DEVICE int key_of_tile(int tile) {
  int column = threadIdx.x % 32 / 4;
  return column / 2 * 16 + tile / 2 * 4 + tile % 2 * 2 + column % 2;
}

// Products of queries and eight keys.
template <typename T, int HEAD_DIM>
DEVICE void score_keys(const Queries<T, HEAD_DIM>& q, const Eight<HEAD_DIM / 64>& k, float (&score)[4]) {
  score[0] = score[1] = score[2] = score[3] = 0;
#pragma unroll
  for (int part = 0; part < HEAD_DIM / 64; ++part) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      unsigned a[4] = {q.pair[part][0][2 * step], q.pair[part][1][2 * step], q.pair[part][0][2 * step + 1],
                       q.pair[part][1][2 * step + 1]};
      multiply<T>(score, a, k.part[part].pair[2 * step], k.part[part].pair[2 * step + 1]);
    }
  }
}

// Products of a page become weights, as places of A. `begin(half, largest, weight)` is told of the lane's two rows, in
// all four lanes that share them.
template <typename T, int HEAD_DIM, typename Begin>
DEVICE void weigh_page(float (&score)[8][4], const int (&position)[2], int first_key, unsigned (&a)[4][4], Begin begin) {
  int quad = threadIdx.x % 4;
  const float scale = rsqrtf(float(HEAD_DIM)) * 1.4426950408889634f;
  float most[2] = {NONE, NONE};
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int key = first_key + quad * 16 + tile / 2 * 4 + tile % 2 * 2 + i % 2;
      score[tile][i] = key <= position[i / 2] ? __fmul_rn(score[tile][i], scale) : NONE;
      most[i / 2] = fmaxf(most[i / 2], score[tile][i]);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    most[half] = fmaxf(most[half], __shfl_xor_sync(0xFFFFFFFF, most[half], 1));
    most[half] = fmaxf(most[half], __shfl_xor_sync(0xFFFFFFFF, most[half], 2));
  }
  float sum[2] = {0, 0};
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float p = score[tile][i] == NONE ? 0.0f : exp2f(score[tile][i] - most[i / 2]);
      score[tile][i] = p;
      sum[i / 2] += p;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] += __shfl_xor_sync(0xFFFFFFFF, sum[half], 1);
    sum[half] += __shfl_xor_sync(0xFFFFFFFF, sum[half], 2);
    begin(half, most[half], sum[half]);
  }
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    a[step][0] = pack<T>(score[2 * step][0], score[2 * step][1]);
    a[step][1] = pack<T>(score[2 * step][2], score[2 * step][3]);
    a[step][2] = pack<T>(score[2 * step + 1][0], score[2 * step + 1][1]);
    a[step][3] = pack<T>(score[2 * step + 1][2], score[2 * step + 1][3]);
  }
}

// Weighted sums of eight dimensions.
template <typename T>
DEVICE void sum_values(const unsigned (&a)[4][4], const Eight<1>& v, float (&o)[4]) {
  o[0] = o[1] = o[2] = o[3] = 0;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    multiply<T>(o, a[step], v.part[0].pair[2 * step], v.part[0].pair[2 * step + 1]);
  }
}

// What a warp makes of one page, for sixteen rows: `begin` as above, then `take(tile, values)` of four values: of rows
// lane / 4 and lane / 4 + 8 (values 0, 1 and 2, 3) the dimensions 8 tile + 2 (lane % 4) and the next one.
template <typename T, int HEAD_DIM, int KEY_STRIDE, int VALUE_STRIDE, typename Begin, typename Take>
DEVICE void attend_page(const Queries<T, HEAD_DIM>& q, const T* keys, const T* values, int first_key, Begin begin,
                        Take take) {
  float score[8][4];
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
    Eight<HEAD_DIM / 64> k;
    k.load(keys + key_of_tile(tile) * KEY_STRIDE);
    score_keys<T, HEAD_DIM>(q, k, score[tile]);
  }
  unsigned a[4][4];
  weigh_page<T, HEAD_DIM>(score, q.position, first_key, a, begin);
#pragma unroll
  for (int tile = 0; tile < HEAD_DIM / 8; ++tile) {
    Eight<1> v;
    v.load(values + (tile * 8 + threadIdx.x % 32 / 4) * VALUE_STRIDE);
    float o[4];
    sum_values<T>(a, v, o);
    take(tile, o);
  }
}

// Where a warp has its page of keys and values in shared memory; later its results, where the keys were.
template <int HEAD_DIM>
struct Staged {
  static constexpr int KEY_STRIDE = HEAD_DIM + 8; // elements; so that lanes read different banks
  static constexpr int VALUE_STRIDE = PAGE + 8;
  static constexpr int BYTES = (PAGE * KEY_STRIDE + HEAD_DIM * VALUE_STRIDE) * 2;
};

// Begins to copy a page of ROWS rows of WIDTH elements, by the threads of which this is one.
template <typename T, int ROWS, int WIDTH, int STRIDE, int THREADS>
DEVICE void stage_page(T* staged, const T* page, int thread) {
  constexpr int VECTORS = WIDTH / 8;
  unsigned to = __cvta_generic_to_shared(staged + thread / VECTORS * STRIDE + thread % VECTORS * 8);
#pragma unroll
  for (int i = 0; i < ROWS * VECTORS / THREADS; ++i) {
    copy_vector<16>(to + i * (THREADS / VECTORS) * STRIDE * 2, page + (i * THREADS + thread) * 8);
  }
}

// A part of one tile of up to sixteen rows, a warp to a page: for steps of few tokens. Of the thread blocks of a tile
// the one that ends last merges the parts in their order. Grid: tiles, kv heads, parts.
// partial: [tokens x heads, parts, HEAD_DIM + 2]. arrived: [tiles, kv heads], zeros before and after.
// IS_STAGED: pages pass through shared memory, those of earlier steps before the kernels before this one have ended.
template <typename T, int KV_HEADS, int GROUP, int HEAD_DIM, bool IS_STAGED>
DEVICE void attend_few(const T* queries, const T* keys, const T* values, const int* tiles, const int* table,
                       float* partial, int* arrived, T* out) {
  using S = Staged<HEAD_DIM>;
  constexpr int DIMS = HEAD_DIM / 8; // of a thread, when results are merged
  constexpr int STRIDE = HEAD_DIM + 4;
  constexpr int WARP_BYTES = IS_STAGED ? S::BYTES : 16 * STRIDE * 4;
  extern __shared__ __align__(16) unsigned char staged[];
  __shared__ float largest_shared[PART][16];
  __shared__ float weight_shared[PART][16];
  __shared__ bool is_last;
  let_next_begin();
  // The step's numbers were there before its first kernel.
  int kv_head = blockIdx.y;
  const int* tile = tiles + TILE * blockIdx.x;
  int first_row = tile[0];
  int count = tile[1];
  int first_position = tile[2];
  const int* pages = table + tile[3];
  int page_count = (first_position + count + PAGE - 1) / PAGE;
  int part = blockIdx.z;
  int lane = threadIdx.x % 32;
  int warp = threadIdx.x / 32;
  int page = part * PART + warp;
  bool has_page = page < page_count;
  // What this step itself writes is there after the wait.
  bool is_old = page < first_position / PAGE;
  const T* page_keys = keys;
  const T* page_values = values;
  T* staged_keys = reinterpret_cast<T*>(staged + warp * WARP_BYTES);
  T* staged_values = staged_keys + PAGE * S::KEY_STRIDE;
  auto stage = [&] {
    stage_page<T, PAGE, HEAD_DIM, S::KEY_STRIDE, 32>(staged_keys, page_keys, lane);
    asm volatile("cp.async.commit_group;");
    stage_page<T, HEAD_DIM, PAGE, S::VALUE_STRIDE, 32>(staged_values, page_values, lane);
    asm volatile("cp.async.commit_group;");
  };
  if (has_page) {
    size_t at = (size_t(pages[page]) * KV_HEADS + kv_head) * PAGE * HEAD_DIM;
    page_keys += at;
    page_values += at;
    if (IS_STAGED && is_old) {
      stage();
    }
  }
  wait_for_previous();
  if (part * PART >= page_count) {
    return;
  }
  float* result = reinterpret_cast<float*>(staged_keys); // of the warp: [16, STRIDE]
  auto begin = [&](int half, float largest, float weight) {
    if (lane % 4 == 0) {
      largest_shared[warp][lane / 4 + 8 * half] = largest;
      weight_shared[warp][lane / 4 + 8 * half] = weight;
    }
    if (IS_STAGED && half == 1) {
      asm volatile("cp.async.wait_group 0;");
      __syncwarp();
    }
  };
  auto take = [&](int tile, const float (&o)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      result[(lane / 4 + i / 2 * 8) * STRIDE + tile * 8 + lane % 4 * 2 + i % 2] = o[i];
    }
  };
  if (has_page) {
    Queries<T, HEAD_DIM> q;
    q.template load<KV_HEADS, GROUP>(queries, first_row, count, first_position, kv_head);
    if constexpr (IS_STAGED) {
      if (!is_old) {
        stage();
      }
      asm volatile("cp.async.wait_group 1;");
      __syncwarp();
      attend_page<T, HEAD_DIM, S::KEY_STRIDE, S::VALUE_STRIDE>(q, staged_keys, staged_values, page * PAGE, begin, take);
    } else {
      attend_page<T, HEAD_DIM, HEAD_DIM, PAGE>(q, page_keys, page_values, page * PAGE, begin, take);
    }
  }
  __syncthreads();
  int row = threadIdx.x / 8;
  int dim = threadIdx.x % 8 * DIMS;
  int token = row / GROUP;
  bool is_there = token < count;
  Running<DIMS> all;
  if (is_there) {
    for (int other = 0; other < min(PART, page_count - part * PART); ++other) {
      const float* value = reinterpret_cast<const float*>(staged + other * WARP_BYTES) + row * STRIDE + dim;
      all.merge(largest_shared[other][row], weight_shared[other][row], [&](int i) { return value[i]; });
    }
  }
  int part_count = (page_count + PART - 1) / PART;
  if (part_count > 1) {
    size_t partial_row = size_t(tile[4] + token) * KV_HEADS * GROUP + kv_head * GROUP + row % GROUP;
    float* parts = partial + partial_row * gridDim.z * (HEAD_DIM + 2);
    if (is_there) {
      float* to = parts + part * (HEAD_DIM + 2);
#pragma unroll
      for (int i = 0; i < DIMS; ++i) {
        to[dim + i] = all.value[i];
      }
      if (dim == 0) {
        to[HEAD_DIM] = all.largest;
        to[HEAD_DIM + 1] = all.weight;
      }
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      int* counter = arrived + blockIdx.x * KV_HEADS + kv_head;
      is_last = atomicAdd(counter, 1) == part_count - 1;
      if (is_last) {
        *counter = 0;
      }
    }
    __syncthreads();
    if (!is_last) {
      return;
    }
    __threadfence();
    if (is_there) {
      all = Running<DIMS>();
      struct Loaded {
        float largest, weight, value[DIMS];
      };
      auto load = [&](int part) {
        Loaded loaded;
        const float* from = parts + part * (HEAD_DIM + 2);
        loaded.largest = __ldcg(from + HEAD_DIM);
        loaded.weight = __ldcg(from + HEAD_DIM + 1);
#pragma unroll
        for (int i = 0; i < DIMS; ++i) {
          loaded.value[i] = __ldcg(from + dim + i);
        }
        return loaded;
      };
      Loaded next = load(0);
      for (int part = 0; part < part_count; ++part) {
        Loaded now = next;
        next = load(min(part + 1, part_count - 1));
        all.merge(now.largest, now.weight, [&](int i) { return now.value[i]; });
      }
    }
  }
  if (is_there) {
    size_t head_row = size_t(first_row + token) * KV_HEADS * GROUP + kv_head * GROUP + row % GROUP;
#pragma unroll
    for (int i = 0; i < DIMS; i += 2) {
      unsigned both = pack<T>(__fdividef(all.value[i], all.weight), __fdividef(all.value[i + 1], all.weight));
      *reinterpret_cast<unsigned*>(out + head_row * HEAD_DIM + dim + i) = both;
    }
  }
}

// Tiles of up to four times as many rows, a warp to sixteen of them, all parts one after the other: for prompts. Pages
// pass through shared memory. Grid: tiles, kv heads.
template <typename T, int KV_HEADS, int GROUP, int HEAD_DIM>
DEVICE void attend_many(const T* queries, const T* keys, const T* values, const int* tiles, const int* table, T* out) {
  constexpr int PER_WARP = 16 / GROUP; // tokens
  constexpr int DIM_TILES = HEAD_DIM / 8;
  constexpr int KEY_STRIDE = Staged<HEAD_DIM>::KEY_STRIDE;
  constexpr int VALUE_STRIDE = Staged<HEAD_DIM>::VALUE_STRIDE;
  __shared__ __align__(16) T staged_keys[PAGE * KEY_STRIDE];
  __shared__ __align__(16) T staged_values[HEAD_DIM * VALUE_STRIDE];
  let_next_begin();
  wait_for_previous();
  int kv_head = blockIdx.y;
  // The longest first.
  const int* tile = tiles + TILE * (gridDim.x - 1 - blockIdx.x);
  int lane = threadIdx.x % 32;
  int before = threadIdx.x / 32 * PER_WARP;
  int count = min(PER_WARP, tile[1] - before);
  int first_position = tile[2] + before;
  const int* pages = table + tile[3];
  int page_count = (tile[2] + tile[1] + PAGE - 1) / PAGE;
  Queries<T, HEAD_DIM> q;
  q.template load<KV_HEADS, GROUP>(queries, tile[0] + (count > 0 ? before : 0), count, first_position, kv_head);

  float largest[2] = {NONE, NONE}, weight[2] = {0, 0};
  float part_largest[2] = {NONE, NONE}, part_weight[2] = {0, 0};
  float value[DIM_TILES][4] = {}, part_value[DIM_TILES][4] = {};
  for (int page = 0; page < page_count; ++page) {
    size_t at = (size_t(pages[page]) * KV_HEADS + kv_head) * PAGE * HEAD_DIM;
    __syncthreads();
    stage_page<T, PAGE, HEAD_DIM, KEY_STRIDE, 128>(staged_keys, keys + at, threadIdx.x);
    stage_page<T, HEAD_DIM, PAGE, VALUE_STRIDE, 128>(staged_values, values + at, threadIdx.x);
    asm volatile("cp.async.wait_all;");
    __syncthreads();
    if (count > 0 && page * PAGE < first_position + count) {
      float mine[2], others[2];
      attend_page<T, HEAD_DIM, KEY_STRIDE, VALUE_STRIDE>(
          q, staged_keys, staged_values, page * PAGE,
          [&](int half, float of_page, float weight_of_page) {
            Merger merger(part_largest[half], part_weight[half], of_page, weight_of_page);
            mine[half] = merger.mine;
            others[half] = merger.others;
          },
          [&](int tile, const float (&o)[4]) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              part_value[tile][i] = __fmaf_rn(o[i], others[i / 2], __fmul_rn(part_value[tile][i], mine[i / 2]));
            }
          });
    }
    if (page % PART == PART - 1 || page + 1 == page_count) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Merger merger(largest[half], weight[half], part_largest[half], part_weight[half]);
#pragma unroll
        for (int tile = 0; tile < DIM_TILES; ++tile) {
          merger.merge(value[tile][2 * half], part_value[tile][2 * half]);
          merger.merge(value[tile][2 * half + 1], part_value[tile][2 * half + 1]);
          part_value[tile][2 * half] = part_value[tile][2 * half + 1] = 0;
        }
        part_largest[half] = NONE;
        part_weight[half] = 0;
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int row = lane / 4 + 8 * half;
    int token = row / GROUP;
    if (token < count && row < PER_WARP * GROUP) {
      size_t head_row = size_t(tile[0] + before + token) * KV_HEADS * GROUP + kv_head * GROUP + row % GROUP;
#pragma unroll
      for (int tile = 0; tile < DIM_TILES; ++tile) {
        unsigned both = pack<T>(__fdividef(value[tile][2 * half], weight[half]),
                                __fdividef(value[tile][2 * half + 1], weight[half]));
        *reinterpret_cast<unsigned*>(out + head_row * HEAD_DIM + tile * 8 + lane % 4 * 2) = both;
      }
    }
  }
}
