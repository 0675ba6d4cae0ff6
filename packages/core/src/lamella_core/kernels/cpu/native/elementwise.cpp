// Row-wise operations between the products: RMS norm with residual, SiLU gate, rotary embedding, KV cache write.
//
// All arithmetic is float32 per row; rows never meet, so results do not depend on the number of rows or threads.
#include <cmath>

#include "calls.h"
#include "lanes.h"

namespace lamella {
namespace {

constexpr i64 PARALLEL_ELEMENTS = 1 << 15;  // below this many elements one thread is faster than waking the others

// Calls fn(T tag) with the storage type of dtype.
template <typename F>
Status with_type(std::int32_t dtype, F&& fn) {
  switch (dtype) {
    case kF32: return fn(float{});
    case kBF16: return fn(bf16{});
    case kF16: return fn(f16{});
  }
  return kBadDType;
}

// Rounds a register to T and back.
template <typename T> LAMELLA_INLINE vf rounded(vf v) { T lane[VW]; store(lane, v); return load(lane); }
template <> LAMELLA_INLINE vf rounded<float>(vf v) { return v; }

// h = x (+ residual, rounded to T); y = T(h / rms(h)) * weight, where rms(h) = sqrt(mean(h^2) + eps). The sum of squares
// is 16 lanes, each in rising order, added in a fixed tree.
template <typename T>
void rms_norm_row(const T* x, const T* residual, const T* weight, T* y, T* sum_out, i64 hidden, float eps) {
  vf squares[NV] = {};
  float tail_squares = 0.0f;
  const i64 whole = hidden / PANEL * PANEL;
  for (i64 i = 0; i < whole; i += PANEL)
    for (int v = 0; v < NV; ++v) {
      vf h = load(x + i + v * VW);
      if (residual) {
        h = rounded<T>(h + load(residual + i + v * VW));
        store(sum_out + i + v * VW, h);
      }
      squares[v] = madd(h, h, squares[v]);
    }
  for (i64 i = whole; i < hidden; ++i) {
    float h = to_float(x[i]);
    if (residual) {
      sum_out[i] = from_float<T>(h + to_float(residual[i]));
      h = to_float(sum_out[i]);
    }
    tail_squares += h * h;
  }
  for (int width = NV / 2; width > 0; width /= 2)
    for (int v = 0; v < width; ++v) squares[v] += squares[v + width];
  const float inverse = 1.0f / std::sqrt((hsum(squares[0]) + tail_squares) / float(hidden) + eps);
  const T* h = residual ? sum_out : x;
  for (i64 i = 0; i < whole; i += VW) store(y + i, rounded<T>(load(h + i) * splat(inverse)) * load(weight + i));
  for (i64 i = whole; i < hidden; ++i)
    y[i] = from_float<T>(to_float(from_float<T>(to_float(h[i]) * inverse)) * to_float(weight[i]));
}

LAMELLA_INLINE vf silu(vf x) { return x / (splat(1.0f) + vexp(-x)); }

template <typename T>
void silu_and_mul_row(const T* gate, const T* up, T* out, i64 size) {
  i64 i = 0;
  for (; i + VW <= size; i += VW) store(out + i, silu(load(gate + i)) * load(up + i));
  if (i == size) return;
  T tail[3][VW] = {};
  for (i64 j = i; j < size; ++j) { tail[0][j - i] = gate[j]; tail[1][j - i] = up[j]; }
  store(tail[2], silu(load(tail[0])) * load(tail[1]));
  for (i64 j = i; j < size; ++j) out[j] = tail[2][j - i];
}

// Rotates pairs of one head in place; pair i is (x[i], x[i + half]), or (x[2i], x[2i + 1]) when interleaved.
template <typename T>
void rotate_head(T* x, const float* cosines, const float* sines, i64 half, bool interleaved) {
  const i64 step = interleaved ? 2 : 1, distance = interleaved ? 1 : half;
  i64 i = 0;
  if (!interleaved)
    for (; i + VW <= half; i += VW) {
      const vf a = load(x + i), b = load(x + half + i), c = load(cosines + i), s = load(sines + i);
      store(x + i, a * c - b * s);
      store(x + half + i, b * c + a * s);
    }
  for (; i < half; ++i) {
    const float a = to_float(x[i * step]), b = to_float(x[i * step + distance]);
    x[i * step] = from_float<T>(a * cosines[i] - b * sines[i]);
    x[i * step + distance] = from_float<T>(b * cosines[i] + a * sines[i]);
  }
}

}  // namespace
}  // namespace lamella

using namespace lamella;

// x, residual, y, sum_out [rows, hidden] contiguous; weight [hidden]; residual null: sum_out is not written.
LAMELLA_API std::int32_t lamella_rms_norm(const void* x, const void* residual, const void* weight, void* y, void* sum_out,
                                          i64 rows, i64 hidden, float eps, std::int32_t dtype, std::int32_t threads) {
  return with_type(dtype, [&](auto tag) {
    using T = decltype(tag);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows > 1 && rows * hidden > PARALLEL_ELEMENTS)
    for (i64 r = 0; r < rows; ++r)
      rms_norm_row(static_cast<const T*>(x) + r * hidden, residual ? static_cast<const T*>(residual) + r * hidden : nullptr,
                   static_cast<const T*>(weight), static_cast<T*>(y) + r * hidden,
                   residual ? static_cast<T*>(sum_out) + r * hidden : nullptr, hidden, eps);
    return kOk;
  });
}

// gate_up [rows, 2 * size] (row stride in elements): first the gate, then the value; out [rows, size] contiguous.
LAMELLA_API std::int32_t lamella_silu_and_mul(const void* gate_up, void* out, i64 rows, i64 size, i64 stride,
                                              std::int32_t dtype, std::int32_t threads) {
  return with_type(dtype, [&](auto tag) {
    using T = decltype(tag);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows > 1 && rows * size > PARALLEL_ELEMENTS)
    for (i64 r = 0; r < rows; ++r) {
      const T* row = static_cast<const T*>(gate_up) + r * stride;
      silu_and_mul_row(row, row + size, static_cast<T*>(out) + r * size, size);
    }
    return kOk;
  });
}

// q [tokens, q_heads, head_dim], k [tokens, kv_heads, head_dim] with token strides (elements), heads contiguous;
// cosines, sines [tokens, rotary_dim / 2] float32. The first rotary_dim values of each head are rotated in place.
LAMELLA_API std::int32_t lamella_rope(void* q, void* k, const float* cosines, const float* sines, i64 tokens, i64 q_heads,
                                      i64 kv_heads, i64 head_dim, i64 rotary_dim, i64 q_stride, i64 k_stride,
                                      std::int32_t interleaved, std::int32_t dtype, std::int32_t threads) {
  const i64 half = rotary_dim / 2, work = tokens * (q_heads + kv_heads) * rotary_dim;
  return with_type(dtype, [&](auto tag) {
    using T = decltype(tag);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && tokens > 1 && work > PARALLEL_ELEMENTS)
    for (i64 t = 0; t < tokens; ++t) {
      const float *c = cosines + t * half, *s = sines + t * half;
      for (i64 h = 0; h < q_heads; ++h)
        rotate_head(static_cast<T*>(q) + t * q_stride + h * head_dim, c, s, half, interleaved != 0);
      for (i64 h = 0; h < kv_heads; ++h)
        rotate_head(static_cast<T*>(k) + t * k_stride + h * head_dim, c, s, half, interleaved != 0);
    }
    return kOk;
  });
}

// k, v [tokens, kv_heads, head_dim] with token strides (elements) go to caches [num_blocks, kv_heads, block_size,
// head_dim] at slots[t] = block * block_size + offset; negative slots are skipped. item_bytes is the element size.
LAMELLA_API std::int32_t lamella_write_kv(const char* k, const char* v, char* k_cache, char* v_cache, const i64* slots,
                                          i64 tokens, i64 kv_heads, i64 head_dim, i64 block_size, i64 num_blocks,
                                          i64 k_stride, i64 v_stride, i64 item_bytes) {
  for (i64 t = 0; t < tokens; ++t)
    if (slots[t] >= num_blocks * block_size) return kBadShape;
  const i64 bytes = head_dim * item_bytes;
  for (i64 t = 0; t < tokens; ++t) {
    if (slots[t] < 0) continue;
    const i64 block = slots[t] / block_size, offset = slots[t] % block_size;
    for (i64 h = 0; h < kv_heads; ++h) {
      const i64 to = ((block * kv_heads + h) * block_size + offset) * bytes;
      std::memcpy(k_cache + to, k + t * k_stride * item_bytes + h * bytes, std::size_t(bytes));
      if (v) std::memcpy(v_cache + to, v + t * v_stride * item_bytes + h * bytes, std::size_t(bytes));
    }
  }
  return kOk;
}
