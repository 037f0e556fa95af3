// A step of one token as one kernel: what it is given, and how its thread blocks wait for one another.

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
