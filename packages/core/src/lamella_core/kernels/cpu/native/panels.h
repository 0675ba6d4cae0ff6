// Parts of the product with panel16 weights: what is computed (block_product), how rows are cut and packed, how results
// leave (finish). Included by matmul.cpp alone, which decides in which order the parts are taken.
#pragma once

#include <utility>

#include "common.h"

namespace lamella {
namespace {

constexpr int KC = 256;  // values of k per block; part of the definition of the result

// MR_MAX: rows whose sums fit the registers. *_panels(mr): panels side by side, so that enough independent sums are in
// flight to hide the latency of a multiply-add when rows are few.
#if defined(__AVX512F__)
constexpr int MR_MAX = 12;
constexpr int stream_panels(int mr) { return mr <= 1 ? 8 : mr <= 3 ? 4 : 2; }
constexpr int tile_panels(int) { return 2; }
#elif defined(__AVX__)
constexpr int MR_MAX = 6;
constexpr int stream_panels(int mr) { return mr <= 1 ? 4 : mr <= 3 ? 2 : 1; }
constexpr int tile_panels(int mr) { return mr <= 3 ? 2 : 1; }
#elif defined(__aarch64__)
constexpr int MR_MAX = 6;
constexpr int stream_panels(int mr) { return mr <= 1 ? 4 : mr <= 2 ? 2 : 1; }
constexpr int tile_panels(int) { return 1; }
#else
constexpr int MR_MAX = 2;
constexpr int stream_panels(int) { return 1; }
constexpr int tile_panels(int) { return 1; }
#endif
constexpr int UNIT = tile_panels(1);  // panels handled together by the blocked schedule

struct Problem {
  const void *x, *w, *bias;
  void* out;
  i64 m, n, k, x_stride;
  DType dtype, bias_dtype, out_dtype;
  int threads;
  i64 panels() const { return (n + PANEL - 1) / PANEL; }
};

// tile[MR][NP*16] (row stride ldt) (+)= a[kc][MR]^T b[NP][kc][16] (panel stride b_stride elements of T). While it runs,
// the line at next + k * next_step (bytes) of each panel (next_stride bytes apart) is fetched into L2.
template <int MR, int NP, typename T>
LAMELLA_INLINE void block_product(const float* a, const T* b, i64 b_stride, i64 kc, float* tile, i64 ldt, bool first,
                                  const char* next, i64 next_stride, i64 next_step) {
  vf acc[MR][NP * NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 16
    for (int j = 0; j < NP * NV; ++j) acc[r][j] = vf{};
  for (i64 k = 0; k < kc; ++k) {
    if constexpr (MR > int(sizeof(T)) / 2) {  // with fewer rows memory is the limit, and its own prefetcher does better
#pragma GCC unroll 16
      for (int p = 0; p < NP; ++p) __builtin_prefetch(next + p * next_stride + k * next_step, 0, 2);
    }
    const auto column = [&](int j) { return load(b + j / NV * b_stride + k * PANEL + j % NV * VW); };
    if constexpr (MR < NP * NV) {  // keep in registers whichever of the two factors is fewer
      vf row[MR];
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) row[r] = splat(a[k * MR + r]);
#pragma GCC unroll 16
      for (int j = 0; j < NP * NV; ++j) {
        const vf col = column(j);
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) acc[r][j] = madd(row[r], col, acc[r][j]);
      }
    } else {
      vf col[NP * NV];
#pragma GCC unroll 16
      for (int j = 0; j < NP * NV; ++j) col[j] = column(j);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        const vf row = splat(a[k * MR + r]);
#pragma GCC unroll 16
        for (int j = 0; j < NP * NV; ++j) acc[r][j] = madd(row, col[j], acc[r][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 16
    for (int j = 0; j < NP * NV; ++j) {
      float* dst = tile + r * ldt + j * VW;
      store(dst, first ? acc[r][j] : load(dst) + acc[r][j]);
    }
}

// ---- epilogue: add the bias, round to the output type ----------------------------------------------------------------

template <typename O, typename B>
void finish_panel(const float* tile, O* out, const B* bias, i64 valid) {
  if (valid >= PANEL) {
    for (int j = 0; j < NV; ++j) {
      const vf sum = load(tile + j * VW);
      store(out + j * VW, bias ? sum + load(bias + j * VW) : sum);
    }
    return;
  }
  for (i64 j = 0; j < valid; ++j) out[j] = from_float<O>(bias ? tile[j] + to_float(bias[j]) : tile[j]);
}

template <typename O>
void finish_row(const Problem& p, const float* tile, i64 row, i64 first_panel, i64 num_panels) {
  for (i64 i = 0; i < num_panels; ++i) {
    const i64 col = (first_panel + i) * PANEL;
    O* out = static_cast<O*>(p.out) + row * p.n + col;
    const float* src = tile + i * PANEL;
    const i64 valid = p.n - col;
    if (p.bias_dtype == kBF16) finish_panel(src, out, p.bias ? static_cast<const bf16*>(p.bias) + col : nullptr, valid);
    else if (p.bias_dtype == kF16) finish_panel(src, out, p.bias ? static_cast<const f16*>(p.bias) + col : nullptr, valid);
    else finish_panel(src, out, p.bias ? static_cast<const float*>(p.bias) + col : nullptr, valid);
  }
}

void finish(const Problem& p, const float* tile, i64 ldt, i64 row0, i64 rows, i64 first_panel, i64 num_panels) {
  for (i64 r = 0; r < rows; ++r) {
    if (p.out_dtype == kBF16) finish_row<bf16>(p, tile + r * ldt, row0 + r, first_panel, num_panels);
    else if (p.out_dtype == kF16) finish_row<f16>(p, tile + r * ldt, row0 + r, first_panel, num_panels);
    else finish_row<float>(p, tile + r * ldt, row0 + r, first_panel, num_panels);
  }
}

// ---- rows of x as float32 [K][mr] blocks -----------------------------------------------------------------------------

// Rows are cut into blocks of MR_MAX; the last two share what is left so that neither is inefficiently small.
struct RowBlocks {
  i64 rows, full, count, tail;  // full blocks of MR_MAX, then blocks of tail and rows - full * MR_MAX - tail
  explicit RowBlocks(i64 m) : rows(m), full(m / MR_MAX), count((m + MR_MAX - 1) / MR_MAX), tail(m % MR_MAX) {
    if (tail == 0 || full == 0) return;
    const i64 both = MR_MAX + tail;
    if (UNIT == 2 && MR_MAX == 6 && tail != 3 && tail != 5) tail = MR_MAX - 1;  // 5 + 2, 5 + 3, 5 + 5: more sums in flight
    else if (MR_MAX != 6 || UNIT != 2) tail = (both + 1) / 2;
    else return;
    --full;
  }
  i64 begin(i64 i) const { return i <= full ? i * MR_MAX : i == count ? rows : full * MR_MAX + tail; }
  i64 size(i64 i) const { return begin(i + 1) - begin(i); }
};

template <typename T>
void pack_rows(const T* x, i64 x_stride, i64 mr, i64 depth, float* a) {
  for (i64 k = 0; k < depth; ++k)
    for (i64 r = 0; r < mr; ++r) a[k * mr + r] = to_float(x[r * x_stride + k]);
}

}  // namespace
}  // namespace lamella
