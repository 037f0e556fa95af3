// What all kernels here use. T: the dtype of activations, Bf16 or F16.
//
// Products are those of `mma.m16n8k16`: A 16 x 16 by B 16 x 8, sums in f32. Lane l holds of A the rows l / 4 and
// l / 4 + 8, of B the column l / 4, and of both the places 2 (l % 4) and its three companions along the summed
// axis. Which element of a row stands at which place is free, as long as A and B agree: so every lane takes
// elements that are neighbours in memory, sixteen at a time in the order of four products.

#define DEVICE __device__ __forceinline__
#define NONE __int_as_float(0xFF800000) // minus infinity: the largest of no scores

struct Bf16 {
  unsigned short bits;
  Bf16() = default;
  DEVICE explicit Bf16(float value) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  }
  DEVICE explicit operator float() const { return __uint_as_float(unsigned(bits) << 16); }
};

struct F16 {
  unsigned short bits;
  F16() = default;
  DEVICE explicit F16(float value) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  }
  DEVICE explicit operator float() const {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }
};

// The kernel after this one may begin: it does what depends on nothing, then waits.
DEVICE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// All that the kernels before this one wrote can be read from here on. Every thread block comes here, also one without
// work: a kernel that is finished means that all before it are.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

struct Sixteen {
  unsigned pair[8];
};

DEVICE Sixteen load_sixteen(const void* from) {
  const uint4* vectors = reinterpret_cast<const uint4*>(from);
  uint4 low = vectors[0];
  uint4 high = vectors[1];
  return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}

// Begins to copy eight or sixteen bytes to shared memory.
template <int BYTES>
DEVICE void copy_vector(unsigned to, const void* from) {
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES));
  }
}

template <typename T>
DEVICE unsigned pack(float low, float high);

template <>
DEVICE unsigned pack<Bf16>(float low, float high) {
  unsigned both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

template <>
DEVICE unsigned pack<F16>(float low, float high) {
  unsigned both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

template <typename T>
DEVICE void unpack(unsigned both, float& low, float& high) {
  T of;
  of.bits = both & 0xFFFF;
  low = float(of);
  of.bits = both >> 16;
  high = float(of);
}

// d += a b
template <typename T>
DEVICE void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

template <>
DEVICE void multiply<Bf16>(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
DEVICE void multiply<F16>(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
