// What bindgen reads on Linux: the 16-bit float types of x86 first (Arm has them in mlx/c/half.h),
// then all of mlx-c. float16_t itself is replaced by a Rust struct, see scripts/setup.
#if defined(__x86_64__)
#define HAS_FLOAT16
#define HAS_BFLOAT16
typedef unsigned short float16_t;
typedef unsigned short bfloat16_t;
#endif
#include "mlx/c/mlx.h"
