// A step of one token: attention.

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
        if (head == WARPS) { // the key's, where there are as many queries as warps
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
    weigh_page<T, HEAD_DIM>(score, q.position, page * PAGE, a, [&](int half, float largest, float weight) {
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
