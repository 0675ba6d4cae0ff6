// The gated delta rule, token by token: h decays, and where key k reads it, delta = beta (v - k h) is added; y = q h.
//
// All arithmetic is float32 in an order that depends on the sizes of a head alone: a sequence's results are the same
// bits however its tokens are divided into calls, whatever runs beside it, and with any number of threads.
#include <cmath>
#include <cstring>

#include "lanes.h"
#include "padding.h"

namespace lamella {
namespace {

constexpr i64 PARALLEL_WORK = 1 << 15;  // updates below which one thread is faster than waking the others
constexpr float LEAST_SQUARE = 1e-6f;   // added to the sum of squares of queries and keys

struct Rule {
  const float *qkv, *decay, *beta;
  float *states, *y;
  i64 k_heads, v_heads, k_dim, v_dim, stride;  // stride: of tokens in qkv
};

// to = factor x / |x|.
void normalize(const float* x, float* to, i64 size, float factor) {
  vf sum = {};
  float rest = 0.0f;
  i64 i = 0;
  for (; i + VW <= size; i += VW) sum = madd(load(x + i), load(x + i), sum);
  for (; i < size; ++i) rest += x[i] * x[i];
  const float scale = factor / std::sqrt(hsum(sum) + rest + LEAST_SQUARE);
  for (i = 0; i < size; ++i) to[i] = x[i] * scale;
}

// One token in COUNT registers of columns of h [k_dim, stride].
template <int COUNT>
LAMELLA_INLINE void update(float* h, i64 stride, const float* q, const float* k, i64 k_dim, float decay, float beta,
                           const float* v, float* y) {
  vf seen[COUNT] = {}, delta[COUNT], sum[COUNT] = {};
  for (i64 i = 0; i < k_dim; ++i)
    for (int c = 0; c < COUNT; ++c) seen[c] = madd(splat(k[i]), load(h + i * stride + c * VW), seen[c]);
  for (int c = 0; c < COUNT; ++c) delta[c] = splat(beta) * (load(v + c * VW) - splat(decay) * seen[c]);
  for (i64 i = 0; i < k_dim; ++i)
    for (int c = 0; c < COUNT; ++c) {
      float* at = h + i * stride + c * VW;
      const vf next = madd(splat(k[i]), delta[c], splat(decay) * load(at));
      store(at, next);
      sum[c] = madd(splat(q[i]), next, sum[c]);
    }
  for (int c = 0; c < COUNT; ++c) store(y + c * VW, sum[c]);
}

// Numbers of scratch memory that one head needs: its state, a query, a key, a value and a result.
i64 scratch_size(const Rule& r) { return (r.k_dim + 2) * padded_size(r.v_dim) + 2 * r.k_dim; }

// Tokens [begin, end) of one sequence and value head.
void run_head(const Rule& r, i64 head, float* stored, bool is_first, i64 begin, i64 end, float* scratch) {
  constexpr int WIDE = 4;
  const i64 padded = padded_size(r.v_dim), k_head = head / (r.v_heads / r.k_heads);
  const bool is_copied = padded != r.v_dim;
  float *h = is_copied ? scratch : stored, *own_v = scratch + r.k_dim * padded, *own_y = own_v + padded;
  float *q = own_y + padded, *k = q + r.k_dim;
  const float factor = 1.0f / std::sqrt(float(r.k_dim));
  if (is_first)
    std::memset(h, 0, std::size_t(r.k_dim * padded) * sizeof(float));
  else if (is_copied)
    widen(stored, h, r.k_dim, r.v_dim, padded);
  for (i64 t = begin; t < end; ++t) {
    const float* row = r.qkv + t * r.stride;
    normalize(row + k_head * r.k_dim, q, r.k_dim, factor);
    normalize(row + (r.k_heads + k_head) * r.k_dim, k, r.k_dim, 1.0f);
    const float* v = widened(row + 2 * r.k_heads * r.k_dim + head * r.v_dim, own_v, r.v_dim, padded);
    float* result = r.y + (t * r.v_heads + head) * r.v_dim;
    float* y = is_copied ? own_y : result;
    const float decay = r.decay[t * r.v_heads + head], beta = r.beta[t * r.v_heads + head];
    i64 n = 0;
    for (; n + WIDE * VW <= padded; n += WIDE * VW) update<WIDE>(h + n, padded, q, k, r.k_dim, decay, beta, v + n, y + n);
    for (; n < padded; n += VW) update<1>(h + n, padded, q, k, r.k_dim, decay, beta, v + n, y + n);
    if (is_copied) narrow(y, result, 1, r.v_dim, padded);
  }
  if (is_copied) narrow(h, stored, r.k_dim, r.v_dim, padded);
}

}  // namespace
}  // namespace lamella

using namespace lamella;

// qkv [tokens, queries and keys of k_heads, values of v_heads] with token stride (elements); decay and beta [tokens,
// v_heads], states [slots, v_heads, k_dim, v_dim] and y [tokens, v_heads, v_dim] contiguous. Sequence i has the tokens
// [starts[i], starts[i + 1]) and its states at slots[i].
LAMELLA_API std::int32_t lamella_gated_delta_rule(const float* qkv, const float* decay, const float* beta, float* states,
                                                  const std::int32_t* slots, const std::int32_t* starts,
                                                  const std::uint8_t* is_first, float* y, i64 sequences, i64 num_slots,
                                                  i64 k_heads, i64 v_heads, i64 k_dim, i64 v_dim, i64 stride,
                                                  std::int32_t threads) {
  const Rule rule{qkv, decay, beta, states, y, k_heads, v_heads, k_dim, v_dim, stride};
  if (k_heads < 1 || v_heads % k_heads) return kBadShape;
  for (i64 i = 0; i < sequences; ++i)
    if (slots[i] < 0 || slots[i] >= num_slots || starts[i + 1] < starts[i]) return kBadShape;
  const i64 work = i64(starts[sequences]) * v_heads * k_dim * v_dim, jobs = sequences * v_heads;
  bool failed = false;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) reduction(|| : failed) if (threads > 1 && jobs > 1 && work > PARALLEL_WORK)
  for (i64 job = 0; job < jobs; ++job) {
    static thread_local Scratch memory;
    float* scratch = memory.floats(std::size_t(scratch_size(rule)));
    if (!scratch) {
      failed = true;
      continue;
    }
    const i64 i = job / v_heads, head = job % v_heads;
    float* stored = states + (i64(slots[i]) * v_heads + head) * k_dim * v_dim;
    run_head(rule, head, stored, is_first[i] != 0, starts[i], starts[i + 1], scratch);
  }
  return failed ? kNoMemory : kOk;
}
