// The recurrence of selective state spaces, token by token: h = exp(dt a) h + dt x b, y = <h, c> + d x.
//
// All arithmetic is float32 in an order that depends on the state's size alone: a sequence's results are the same bits
// however its tokens are divided into calls, whatever runs beside it, and with any number of threads.
#include <cstring>

#include "lanes.h"
#include "padding.h"

namespace lamella {
namespace {

constexpr i64 PARALLEL_WORK = 1 << 15;  // updates below which one thread is faster than waking the others

struct Scan {
  const float *x, *dt, *a, *b, *c, *d;
  float *states, *y;
  i64 heads, head_dim, size, groups, a_size, x_stride, dt_stride, bc_stride;
};

// Tokens [begin, end) of one sequence and head. `scratch` holds the head's states [head_dim, padded], then four rows.
void scan_head(const Scan& s, i64 head, float* stored, bool is_first, i64 begin, i64 end, float* scratch) {
  const i64 padded = padded_size(s.size), group = head / (s.heads / s.groups);
  float *h = scratch, *a = h + s.head_dim * padded, *decay = a + padded;
  float *own_b = decay + padded, *own_c = own_b + padded;  // where the source's rows are not whole registers
  if (is_first)
    std::memset(h, 0, std::size_t(s.head_dim * padded) * sizeof(float));
  else
    widen(stored, h, s.head_dim, s.size, padded);
  for (i64 n = 0; n < padded; ++n) a[n] = n >= s.size ? 0.0f : s.a[head * s.a_size + (s.a_size == 1 ? 0 : n)];
  for (i64 t = begin; t < end; ++t) {
    const float dt = s.dt[t * s.dt_stride + head];
    if (s.a_size == 1) {
      const vf same = vexp(splat(dt * a[0]));
      for (i64 n = 0; n < padded; n += VW) store(decay + n, same);
    } else {
      for (i64 n = 0; n < padded; n += VW) store(decay + n, vexp(splat(dt) * load(a + n)));
    }
    const float* b = widened(s.b + t * s.bc_stride + group * s.size, own_b, s.size, padded);
    const float* c = widened(s.c + t * s.bc_stride + group * s.size, own_c, s.size, padded);
    for (i64 p = 0; p < s.head_dim; ++p) {
      const float x = s.x[t * s.x_stride + head * s.head_dim + p];
      const vf input = splat(dt * x);
      float* row = h + p * padded;
      vf sum = {};
      for (i64 n = 0; n < padded; n += VW) {
        const vf next = madd(load(decay + n), load(row + n), input * load(b + n));
        store(row + n, next);
        sum = madd(next, load(c + n), sum);
      }
      s.y[(t * s.heads + head) * s.head_dim + p] = hsum(sum) + s.d[head] * x;
    }
  }
  narrow(h, stored, s.head_dim, s.size, padded);
}

}  // namespace
}  // namespace lamella

using namespace lamella;

// x [tokens, heads, head_dim], dt [tokens, heads], b and c [tokens, groups, size] with token strides (elements);
// a [heads, a_size] with a_size 1 or size; d [heads]; states [slots, heads, head_dim, size] and y [tokens, heads,
// head_dim] contiguous. Sequence i has the tokens [starts[i], starts[i + 1]) and its states at slots[i].
LAMELLA_API std::int32_t lamella_state_scan(const float* x, const float* dt, const float* a, const float* b,
                                            const float* c, const float* d, float* states, const std::int32_t* slots,
                                            const std::int32_t* starts, const std::uint8_t* is_first, float* y,
                                            i64 sequences, i64 num_slots, i64 heads, i64 head_dim, i64 size, i64 groups,
                                            i64 a_size, i64 x_stride, i64 dt_stride, i64 bc_stride,
                                            std::int32_t threads) {
  const Scan scan{x, dt, a, b, c, d, states, y, heads, head_dim, size, groups, a_size, x_stride, dt_stride, bc_stride};
  for (i64 i = 0; i < sequences; ++i)
    if (slots[i] < 0 || slots[i] >= num_slots || starts[i + 1] < starts[i]) return kBadShape;
  const i64 work = i64(starts[sequences]) * heads * head_dim * size, jobs = sequences * heads;
  bool failed = false;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8) reduction(|| : failed) if (threads > 1 && jobs > 1 && work > PARALLEL_WORK)
  for (i64 job = 0; job < jobs; ++job) {
    static thread_local Scratch memory;
    float* scratch = memory.floats(std::size_t((head_dim + 4) * padded_size(size)));
    if (!scratch) {
      failed = true;
      continue;
    }
    const i64 i = job / heads, head = job % heads;
    float* stored = states + ((i64(slots[i]) * heads + head) * head_dim) * size;
    scan_head(scan, head, stored, is_first[i] != 0, starts[i], starts[i + 1], scratch);
  }
  return failed ? kNoMemory : kOk;
}
