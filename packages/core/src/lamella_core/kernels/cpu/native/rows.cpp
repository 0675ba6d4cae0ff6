// y[M,N] = x[M,K] w[N,K]^T + bias for row-major weights.
//
// Every output is the sum of 16 lanes: lane i adds the products of k = i, i + 16, i + 32, ... in rising order by fused
// multiply-adds (K is padded with zeros to a multiple of 16); the lanes are then added in a fixed tree. Nothing else
// enters, so a row's result has the same bits for every M, thread count and position.
#include "calls.h"
#include "lanes.h"

namespace lamella {
namespace {

constexpr int LANES = 16;
#if defined(__AVX512F__)
constexpr int MR = 4, NR = 4, NR_SINGLE = 8;
#elif defined(__AVX__)
constexpr int MR = 3, NR = 2, NR_SINGLE = 4;
#elif defined(__aarch64__)
constexpr int MR = 2, NR = 2, NR_SINGLE = 4;
#else
constexpr int MR = 1, NR = 2, NR_SINGLE = 2;
#endif

struct Problem {
  const void *w, *bias;
  void* out;
  i64 m, n, k, k_padded;
  DType bias_dtype, out_dtype;
  int threads;
};

LAMELLA_INLINE float load_as(const void* p, DType dtype, i64 i) {
  if (dtype == kBF16) return to_float(static_cast<const bf16*>(p)[i]);
  if (dtype == kF16) return to_float(static_cast<const f16*>(p)[i]);
  return static_cast<const float*>(p)[i];
}

LAMELLA_INLINE void store_as(void* p, DType dtype, i64 i, float value) {
  if (dtype == kBF16) static_cast<bf16*>(p)[i] = from_float<bf16>(value);
  else if (dtype == kF16) static_cast<f16*>(p)[i] = from_float<f16>(value);
  else static_cast<float*>(p)[i] = value;
}

// acc += x[R rows][16 lanes] * w[C rows][16 lanes]
template <int R, int C, typename T>
LAMELLA_INLINE void multiply_add(vf (&acc)[R][C][NV], const float* x, i64 x_stride, const T* w, i64 w_stride) {
#pragma GCC unroll 16
  for (int v = 0; v < NV; ++v) {
    vf wv[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) wv[c] = load(w + c * w_stride + v * VW);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf xv = load(x + r * x_stride + v * VW);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) acc[r][c][v] = madd(xv, wv[c], acc[r][c][v]);
    }
  }
}

// Outputs rows [row, row + R) times columns [col, col + C). x is float32 [m][k_padded], zero padded.
template <int R, int C, typename T>
LAMELLA_INLINE void tile(const Problem& p, const float* x, i64 row, i64 col) {
  const T* w = static_cast<const T*>(p.w) + col * p.k;
  const float* xr = x + row * p.k_padded;
  const i64 ahead = col + 2 * C <= p.n ? C * p.k : 0, whole = p.k / LANES * LANES;
  vf acc[R][C][NV] = {};
  for (i64 k = 0; k < whole; k += LANES) {
    if (row == 0) {  // later rows find the weights in the cache
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) __builtin_prefetch(w + c * p.k + k + ahead, 0, 2);
    }
    multiply_add<R, C>(acc, xr + k, p.k_padded, w + k, p.k);
  }
  if (whole < p.k) {
    T tail[C][LANES] = {};
    for (int c = 0; c < C; ++c) std::memcpy(tail[c], w + c * p.k + whole, std::size_t(p.k - whole) * sizeof(T));
    multiply_add<R, C>(acc, xr + whole, p.k_padded, &tail[0][0], LANES);
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      for (int width = NV / 2; width > 0; width /= 2)
        for (int v = 0; v < width; ++v) acc[r][c][v] += acc[r][c][v + width];
      float sum = hsum(acc[r][c][0]);
      if (p.bias) sum += load_as(p.bias, p.bias_dtype, col + c);
      store_as(p.out, p.out_dtype, (row + r) * p.n + col + c, sum);
    }
}

template <int C, typename T>
void all_rows(const Problem& p, const float* x, i64 col) {
  i64 row = 0;
  for (; row + MR <= p.m; row += MR) tile<MR, C, T>(p, x, row, col);
  if constexpr (MR > 3) if (p.m - row == 3) { tile<3, C, T>(p, x, row, col); return; }
  if constexpr (MR > 2) if (p.m - row == 2) { tile<2, C, T>(p, x, row, col); return; }
  if (p.m - row == 1) tile<1, C, T>(p, x, row, col);
}

template <int C, typename T>
void columns(const Problem& p, const float* x, i64 begin, i64 end) {
  i64 col = begin;
  for (; col + C <= end; col += C) all_rows<C, T>(p, x, col);
  for (; col < end; ++col) all_rows<1, T>(p, x, col);
}

template <typename T>
Status run(const Problem& p, const T* x, i64 x_stride) {
  static thread_local Scratch scratch;
  float* wide = scratch.floats(std::size_t(p.m) * p.k_padded);
  if (!wide) return kNoMemory;
  for (i64 r = 0; r < p.m; ++r)
    for (i64 k = 0; k < p.k_padded; ++k) wide[r * p.k_padded + k] = k < p.k ? to_float(x[r * x_stride + k]) : 0.0f;
  const i64 unit = NR_SINGLE, share = p.n / (p.threads * 8);
  const i64 chunk = share < unit ? unit : share / unit * unit, tasks = (p.n + chunk - 1) / chunk;
#pragma omp parallel for num_threads(p.threads) schedule(dynamic, 1) if (p.threads > 1 && tasks > 1)
  for (i64 task = 0; task < tasks; ++task) {
    const i64 begin = task * chunk, end = begin + chunk < p.n ? begin + chunk : p.n;
    if (p.m == 1) columns<NR_SINGLE, T>(p, wide, begin, end);
    else columns<NR, T>(p, wide, begin, end);
  }
  return kOk;
}

}  // namespace
}  // namespace lamella

using namespace lamella;

// x [m,k] with row stride x_stride (elements), w [n,k], bias [n] or null, out [m,n] contiguous.
LAMELLA_API std::int32_t lamella_gemv_rows(const void* x, const void* w, const void* bias, void* out, i64 m, i64 n, i64 k,
                                           i64 x_stride, std::int32_t dtype, std::int32_t bias_dtype,
                                           std::int32_t out_dtype, std::int32_t threads) {
  if (m == 0 || n == 0) return kOk;
  if (k <= 0) return kBadShape;
  const i64 padded = (k + LANES - 1) / LANES * LANES;
  const Problem p{w, bias, out, m, n, k, padded, DType(bias_dtype), DType(out_dtype), threads};
  switch (dtype) {
    case kF32: return run(p, static_cast<const float*>(x), x_stride);
    case kBF16: return run(p, static_cast<const bf16*>(x), x_stride);
    case kF16: return run(p, static_cast<const f16*>(x), x_stride);
  }
  return kBadDType;
}
