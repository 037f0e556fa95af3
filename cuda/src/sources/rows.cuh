// Norms, rotation and the last step of a row.

// Sums over a warp; every lane has the result.
DEVICE float sum_of_warp(float value) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFF, value, other);
  }
  return value;
}

constexpr int NORM_THREADS = 512;

// to = from / rms * weight, by a thread block of NORM_THREADS, eight elements to a thread at a time. first: of the weight
// what is the thread's first, if it has any. of_warp: a number of shared memory for each warp.
template <typename T>
DEVICE void norm_row(const T* from, const T* weight, uint4 first, T* to, int width, float eps, float* of_warp) {
  const uint4* vectors = reinterpret_cast<const uint4*>(from);
  const uint4* weights = reinterpret_cast<const uint4*>(weight);
  int count = width / 8;
  uint4 mine = {};
  float squares = 0;
  for (int at = threadIdx.x; at < count; at += NORM_THREADS) {
    uint4 vector = vectors[at];
    mine = at == threadIdx.x ? vector : mine;
    unsigned pairs[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float low, high;
      unpack<T>(pairs[i], low, high);
      squares = __fmaf_rn(high, high, __fmaf_rn(low, low, squares));
    }
  }
  squares = sum_of_warp(squares);
  if (threadIdx.x % 32 == 0) {
    of_warp[threadIdx.x / 32] = squares;
  }
  __syncthreads();
  squares = 0;
#pragma unroll
  for (int warp = 0; warp < NORM_THREADS / 32; ++warp) {
    squares += of_warp[warp];
  }
  float scale = rsqrtf(squares / width + eps);
  for (int at = threadIdx.x; at < count; at += NORM_THREADS) {
    uint4 x = at == threadIdx.x ? mine : vectors[at];
    uint4 w = at == threadIdx.x ? first : weights[at];
    unsigned pairs[4] = {x.x, x.y, x.z, x.w};
    unsigned factors[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float low, high, of_low, of_high;
      unpack<T>(pairs[i], low, high);
      unpack<T>(factors[i], of_low, of_high);
      pairs[i] = pack<T>(low * scale * of_low, high * scale * of_high);
    }
    reinterpret_cast<uint4*>(to)[at] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}

// A thread's first of a norm's weight.
template <typename T>
DEVICE uint4 first_of_norm(const T* weight, int width) {
  return threadIdx.x < width / 8 ? reinterpret_cast<const uint4*>(weight)[threadIdx.x] : uint4();
}

// out[i] = x[rows[i]] / rms * weight (x[i] without `rows`), a thread block of NORM_THREADS a row.
template <typename T>
DEVICE void rms_norm(const T* x, const T* weight, const int* rows, T* out, int width, float eps) {
  __shared__ float of_warp[NORM_THREADS / 32];
  let_next_begin();
  uint4 first = first_of_norm(weight, width);
  wait_for_previous();
  int row = rows ? rows[blockIdx.x] : blockIdx.x;
  norm_row(x + size_t(row) * width, weight, first, out + size_t(blockIdx.x) * width, width, eps, of_warp);
}

// One head of a token in a warp's registers: pairs lane, lane + 32 of its halves.
template <typename T, int HEAD_DIM>
struct Head {
  static constexpr int PAIRS = HEAD_DIM / 2;
  static constexpr int EACH = (PAIRS + 31) / 32;
  float low[EACH];
  float high[EACH];

  DEVICE void load(const T* from) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      int pair = lane + 32 * i;
      low[i] = pair < PAIRS ? float(from[pair]) : 0.0f;
      high[i] = pair < PAIRS ? float(from[pair + PAIRS]) : 0.0f;
    }
  }

  // The weight of a norm over a head: what is the lane's.
  struct Norm {
    T low[EACH];
    T high[EACH];

    DEVICE void load(const T* weight) {
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        int pair = min(int(threadIdx.x % 32) + 32 * i, PAIRS - 1);
        low[i] = weight[pair];
        high[i] = weight[pair + PAIRS];
      }
    }
  };

  DEVICE void norm(const Norm& weight, float eps) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      squares += low[i] * low[i] + high[i] * high[i];
    }
    float scale = rsqrtf(sum_of_warp(squares) / HEAD_DIM + eps);
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      low[i] *= scale * float(weight.low[i]);
      high[i] *= scale * float(weight.high[i]);
    }
  }

  // By how much a position turns the lane's pairs.
  struct Turn {
    float sine[EACH];
    float cosine[EACH];

    DEVICE Turn(const float* frequencies, float position) {
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        int pair = min(int(threadIdx.x % 32) + 32 * i, PAIRS - 1);
        sincosf(position * frequencies[pair], &sine[i], &cosine[i]);
      }
    }
  };

  DEVICE void rotate(const Turn& by) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      float turned = low[i] * by.cosine[i] - high[i] * by.sine[i];
      high[i] = high[i] * by.cosine[i] + low[i] * by.sine[i];
      low[i] = turned;
    }
  }

  // Elements `stride` apart.
  DEVICE void store(T* to, int stride) const {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      int pair = lane + 32 * i;
      if (pair < PAIRS) {
        to[pair * stride] = T(low[i]);
        to[(pair + PAIRS) * stride] = T(high[i]);
      }
    }
  }
};

// Where a token's keys and values of one kv head stand in the pools: keys are [pages, kv heads, PAGE, head_dim], values
// [pages, kv heads, head_dim, PAGE], `target` is page * PAGE + place in it.
template <int KV_HEADS, int HEAD_DIM>
DEVICE size_t place_of_key(int target, int kv_head) {
  return ((size_t(target / PAGE) * KV_HEADS + kv_head) * PAGE + target % PAGE) * HEAD_DIM;
}

template <int KV_HEADS, int HEAD_DIM>
DEVICE size_t place_of_value(int target, int kv_head) {
  return (size_t(target / PAGE) * KV_HEADS + kv_head) * HEAD_DIM * PAGE + target % PAGE;
}

// Queries, keys and values of new tokens: norms over a head where there are some, rotation by position, and keys and
// values written to their pages. One warp a head of a token.
//
// places: [rows, 2], the token's position, and where it stands in the pools.
template <typename T, int QUERY_HEADS, int KV_HEADS, int HEAD_DIM, bool HAS_NORM>
DEVICE void rotate(const T* qkv, const T* q_norm, const T* k_norm, const float* frequencies, const int* places,
                   T* queries, T* keys, T* values, int rows, float eps) {
  constexpr int HEADS = QUERY_HEADS + 2 * KV_HEADS;
  let_next_begin();
  wait_for_previous();
  int warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  int row = warp / HEADS;
  int head = warp % HEADS;
  if (row >= rows) {
    return;
  }
  Head<T, HEAD_DIM> of;
  of.load(qkv + (size_t(row) * HEADS + head) * HEAD_DIM);
  if (head < QUERY_HEADS + KV_HEADS) {
    if constexpr (HAS_NORM) {
      typename Head<T, HEAD_DIM>::Norm norm;
      norm.load(head < QUERY_HEADS ? q_norm : k_norm);
      of.norm(norm, eps);
    }
    of.rotate(typename Head<T, HEAD_DIM>::Turn(frequencies, float(places[2 * row])));
  }
  int target = places[2 * row + 1];
  if (head < QUERY_HEADS) {
    of.store(queries + (size_t(row) * QUERY_HEADS + head) * HEAD_DIM, 1);
  } else if (head < QUERY_HEADS + KV_HEADS) {
    of.store(keys + place_of_key<KV_HEADS, HEAD_DIM>(target, head - QUERY_HEADS), 1);
  } else {
    of.store(values + place_of_value<KV_HEADS, HEAD_DIM>(target, head - QUERY_HEADS - KV_HEADS), PAGE);
  }
}

// The largest of each row of logits, the first of equals; -1 if one of them is no number. Two kernels: a part of a row
// to a thread block, then the parts of each row.
struct Best {
  float logit;
  int token;
};

DEVICE Best better(Best a, Best b) {
  if (a.token == -1 || b.token == -1) {
    return {0, -1};
  }
  return b.logit > a.logit || (b.logit == a.logit && b.token < a.token) ? b : a;
}

DEVICE Best best_of_warp(Best best) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    float logit = __shfl_xor_sync(0xFFFFFFFF, best.logit, other);
    int token = __shfl_xor_sync(0xFFFFFFFF, best.token, other);
    best = better(best, {logit, token});
  }
  return best;
}

constexpr int NO_TOKEN = 0x7FFFFFFF;

extern "C" __global__ void __launch_bounds__(256) best_of_parts(const float* logits, int width,
                                                                    int stride, Best* parts) {
  __shared__ Best of_warp[8];
  let_next_begin();
  wait_for_previous();
  const float* row = logits + size_t(blockIdx.y) * stride;
  Best best = {NONE, NO_TOKEN};
  for (int at = blockIdx.x * 256 + threadIdx.x; at < width; at += gridDim.x * 256) {
    float logit = row[at];
    best = better(best, {logit, logit == logit ? at : -1});
  }
  best = best_of_warp(best);
  if (threadIdx.x % 32 == 0) {
    of_warp[threadIdx.x / 32] = best;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < 8; ++warp) {
      best = better(best, of_warp[warp]);
    }
    parts[blockIdx.y * gridDim.x + blockIdx.x] = best;
  }
}

extern "C" __global__ void __launch_bounds__(32) best_of_rows(const Best* parts, int count, Best* rows) {
  let_next_begin();
  wait_for_previous();
  Best best = {NONE, NO_TOKEN};
  for (int at = threadIdx.x; at < count; at += 32) {
    best = better(best, parts[blockIdx.x * count + at]);
  }
  best = best_of_warp(best);
  if (threadIdx.x == 0) {
    rows[blockIdx.x] = best;
  }
}
