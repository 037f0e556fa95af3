// A step of one token of one sequence through all layers in one kernel, the same bits as from the kernels of a layer.
//
// A thread block stays on each multiprocessor. Its warps ask for their weights of the layers one after the other, as
// far ahead as shared memory holds them, also while they wait for what other thread blocks compute: the memory is not
// idle between one matrix and the next.

template <typename T, int BITS, int GROUP_SIZE, int QUERY_HEADS, int KV_HEADS, int HEAD_DIM, bool HAS_NORM, int STAGES,
          int LAYERS>
DEVICE void decode(const Decode<T, LAYERS>& of) {
  using C = Chunks<T, BITS, GROUP_SIZE, STAGES, LAYERS>;
  static_assert(WARPS * 32 == NORM_THREADS, "a thread block norms as one of the norm's own kernel");
  extern __shared__ __align__(16) unsigned char staged[]; // weights of each warp, x and as much as a block, sums of its blocks
  __shared__ float sums[ROUND][RANGES][16];
  __shared__ float of_warp[WARPS];
  __shared__ AttendShared<T, QUERY_HEADS / KV_HEADS, HEAD_DIM> attend_shared;
  __shared__ unsigned long long barriers[WARPS][STAGES];
  let_next_begin();
  T* x = reinterpret_cast<T*>(staged + WARPS * STAGES * C::BYTES);
  int widest = max(max(of.k[0], of.k[1]), max(of.k[2], of.k[3]));
  float* totals = reinterpret_cast<float*>(x + widest + C::W::BLOCK);
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
