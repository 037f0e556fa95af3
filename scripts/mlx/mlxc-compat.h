// Given to every file of mlx-c with -include, on Linux only. Closes two gaps of older compilers:
// gcc before 13 has no <format>, and mlx/c/half.h defines the 16-bit float types on Arm only.
#pragma once
#ifdef __cplusplus
#if !__has_include(<format>)
#define FMT_HEADER_ONLY
#include <fmt/format.h>
namespace std {
using fmt::format;
}
#endif
#if defined(__x86_64__)
#include <mlx/types/half_types.h>
#define HAS_FLOAT16
#define HAS_BFLOAT16
typedef mlx::core::float16_t float16_t;
typedef mlx::core::bfloat16_t bfloat16_t;
#endif
#endif
