// Rows whose length is no multiple of a register's, copied to rows that are, and back.
#pragma once

#include <cstring>

#include "common.h"

namespace lamella {

LAMELLA_INLINE i64 padded_size(i64 size) { return (size + VW - 1) / VW * VW; }

// Copies rows of `size` values to rows of `padded` ones; what pads is zero.
inline void widen(const float* from, float* to, i64 rows, i64 size, i64 padded) {
  for (i64 r = 0; r < rows; ++r) {
    std::memcpy(to + r * padded, from + r * size, std::size_t(size) * sizeof(float));
    for (i64 n = size; n < padded; ++n) to[r * padded + n] = 0.0f;
  }
}

// One row as whole registers: itself, or its copy in `to`.
inline const float* widened(const float* from, float* to, i64 size, i64 padded) {
  if (size == padded) return from;
  widen(from, to, 1, size, padded);
  return to;
}

inline void narrow(const float* from, float* to, i64 rows, i64 size, i64 padded) {
  for (i64 r = 0; r < rows; ++r) std::memcpy(to + r * size, from + r * padded, std::size_t(size) * sizeof(float));
}

}  // namespace lamella
