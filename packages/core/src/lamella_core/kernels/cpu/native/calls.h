// What a decoding step calls, declared once: `replay.cpp` calls it, and whoever defines it otherwise does not compile.
#pragma once
#include "common.h"

using lamella::i64;

LAMELLA_API std::int32_t lamella_matmul_panels(const void*, const void*, const void*, void*, i64, i64, i64, i64, std::int32_t,
                                               std::int32_t, std::int32_t, std::int32_t);
LAMELLA_API std::int32_t lamella_gemv_rows(const void*, const void*, const void*, void*, i64, i64, i64, i64, std::int32_t,
                                           std::int32_t, std::int32_t, std::int32_t);
LAMELLA_API std::int32_t lamella_rms_norm(const void*, const void*, const void*, void*, void*, i64, i64, float, std::int32_t,
                                          std::int32_t);
LAMELLA_API std::int32_t lamella_silu_and_mul(const void*, void*, i64, i64, i64, std::int32_t, std::int32_t);
LAMELLA_API std::int32_t lamella_rope(void*, void*, const float*, const float*, i64, i64, i64, i64, i64, i64, i64, std::int32_t,
                                      std::int32_t, std::int32_t);
LAMELLA_API std::int32_t lamella_write_kv(const char*, const char*, char*, char*, const i64*, i64, i64, i64, i64, i64, i64, i64,
                                          i64);
LAMELLA_API std::int32_t lamella_paged_attention(const void*, const void*, const void*, void*, const std::int32_t*,
                                                 const std::int32_t*, const std::int32_t*, const std::int32_t*,
                                                 const float*, const float*, i64, i64, i64, i64, i64, i64, i64, i64, i64, i64,
                                                 i64, i64, i64, i64, i64, i64, i64, i64, i64,
                                                 float, float, std::int32_t, std::int32_t);
