// y[M,N] = x[M,K] w[N,K]^T + bias for weights packed as "panel16": [ceil(N/16), K, 16].
//
// Every output is summed as: for each aligned block of KC values of k, one chain of fused multiply-adds in rising k
// starting from zero; the block sums are added in rising order. M, the thread count, the row's position and the tiling
// below never enter, so a row's result has the same bits whatever it is computed together with.
//
// Two schedules (loop order after K. Goto and R. van de Geijn, "Anatomy of High-Performance Matrix Multiplication"):
//   stream   M <= MR_MAX: panels pass from memory through the registers once, used for all rows.
//   blocked  larger M: a KC x 16 block of weights stays in L1 while all row blocks use it.
// Weights are converted to float32 in registers; next to MR_MAX multiply-adds per weight that costs no time.
#include "calls.h"
#include "panels.h"

namespace lamella {
namespace {

constexpr int MC = 192;    // rows whose KC-slice of x stays in L2
constexpr int GROUP = 16;  // panels per task of the blocked schedule at most

// ---- stream ----------------------------------------------------------------------------------------------------------

template <int MR, int NP, typename T>
LAMELLA_INLINE void stream_panels_of(const Problem& p, const float* a, i64 panel) {
  float tile[MR * NP * PANEL];
  const i64 stride = p.k * PANEL;
  const T* w = static_cast<const T*>(p.w) + panel * stride;
  const i64 ahead_panels = panel + 2 * NP <= p.panels() ? NP : 0;
  for (i64 k = 0; k < p.k; k += KC) {
    const i64 kc = p.k - k < KC ? p.k - k : KC;
    const T* next = k + KC < p.k ? w + (k + KC) * PANEL : w + ahead_panels * stride;
    block_product<MR, NP>(a + k * MR, w + k * PANEL, stride, kc, tile, NP * PANEL, k == 0,
                          reinterpret_cast<const char*>(next), stride * i64(sizeof(T)), PANEL * i64(sizeof(T)));
  }
  finish(p, tile, NP * PANEL, 0, MR, panel, NP);
}

template <int MR, typename T>
void stream(const Problem& p, const float* a) {
  constexpr int NP = stream_panels(MR);
  const i64 panels = p.panels(), share = panels / (p.threads * 8);
  const i64 chunk = share < NP ? NP : share / NP * NP, tasks = (panels + chunk - 1) / chunk;
#pragma omp parallel for num_threads(p.threads) schedule(dynamic, 1) if (p.threads > 1 && tasks > 1)
  for (i64 task = 0; task < tasks; ++task) {
    const i64 end = (task + 1) * chunk < panels ? (task + 1) * chunk : panels;
    i64 panel = task * chunk;
    for (; panel + NP <= end; panel += NP) stream_panels_of<MR, NP, T>(p, a, panel);
    for (; panel < end; ++panel) stream_panels_of<MR, 1, T>(p, a, panel);
  }
}

template <typename T, int... I>
void stream_rows(const Problem& p, const float* a, std::integer_sequence<int, I...>) {
  using Fn = void (*)(const Problem&, const float*);
  static constexpr Fn table[] = {stream<I + 1, T>...};
  table[p.m - 1](p, a);
}

// ---- blocked ---------------------------------------------------------------------------------------------------------

// One k block of some panels, and what to fetch while it is in use (see block_product).
template <typename T>
struct Weights {
  const T* at;
  i64 stride, kc;
  bool first;
  const char* next;
};

template <int MR, int NP, typename T>
void tile_product(const float* a, const Weights<T>& w, float* tile, i64 ldt, i64 next_step) {
  block_product<MR, NP>(a, w.at, w.stride, w.kc, tile, ldt, w.first, w.next, w.stride * i64(sizeof(T)), next_step);
}

template <typename T, bool WIDE, int... I>
void tile_rows(i64 mr, const float* a, const Weights<T>& w, float* tile, i64 ldt, bool fetch, std::integer_sequence<int, I...>) {
  using Fn = void (*)(const float*, const Weights<T>&, float*, i64, i64);
  static constexpr Fn table[] = {tile_product<I + 1, WIDE ? tile_panels(I + 1) : 1, T>...};
  table[mr - 1](a, w, tile, ldt, fetch ? PANEL * i64(sizeof(T)) : 0);
}

// All row blocks times `width` (at most UNIT) panels for one k block. a: this k block of the first row block's rows.
template <typename T>
void unit_product(const RowBlocks& blocks, const float* a, i64 k, i64 depth, Weights<T> w, i64 width, float* tile, i64 ldt) {
  constexpr auto sizes = std::make_integer_sequence<int, MR_MAX>{};
  const Weights<T> start = w;
  bool fetch = true;
  for (i64 panel = 0; panel < width; ++panel, w.at += w.stride, w.next += w.stride * i64(sizeof(T)), fetch = true)
    for (i64 i = 0; i < blocks.count; ++i) {
      const i64 r = blocks.begin(i), mr = blocks.size(i);
      if (width == UNIT && tile_panels(int(mr)) == UNIT && UNIT > 1) continue;
      tile_rows<T, false>(mr, a + r * depth + k * mr, w, tile + r * ldt + panel * PANEL, ldt, fetch, sizes);
      fetch = false;
    }
  if (width < UNIT || UNIT == 1) return;
  for (i64 i = 0; i < blocks.count; ++i) {
    const i64 r = blocks.begin(i), mr = blocks.size(i);
    if (tile_panels(int(mr)) == UNIT) tile_rows<T, true>(mr, a + r * depth + k * mr, start, tile + r * ldt, ldt, true, sizes);
  }
}

// One task: all rows of the block [row0, row0 + rows) times `count` panels.
template <typename T>
void blocked_task(const Problem& p, const RowBlocks& blocks, const float* a, i64 row0, i64 panel0, i64 count, float* tile) {
  const i64 stride = p.k * PANEL, ldt = count * PANEL;
  const T* w = static_cast<const T*>(p.w) + panel0 * stride;
  for (i64 k = 0; k < p.k; k += KC) {
    const i64 kc = p.k - k < KC ? p.k - k : KC;
    for (i64 panel = 0; panel < count; panel += UNIT) {
      const i64 width = count - panel < UNIT ? count - panel : UNIT;
      const T* at = w + panel * stride + k * PANEL;
      const T* next = panel + UNIT < count ? at + UNIT * stride : k + KC < p.k ? w + (k + KC) * PANEL : at;
      unit_product<T>(blocks, a, k, p.k, {at, stride, kc, k == 0, reinterpret_cast<const char*>(next)}, width,
                      tile + panel * PANEL, ldt);
    }
  }
  finish(p, tile, ldt, row0, blocks.rows, panel0, count);
}

template <typename T>
Status run_row_block(const Problem& p, i64 row0, i64 rows, float* a) {
  const RowBlocks blocks(rows);
  const T* x = static_cast<const T*>(p.x) + row0 * p.x_stride;
  const i64 panels = p.panels();
  i64 group = panels / (p.threads * 4);
  group = group < UNIT ? UNIT : group > GROUP ? GROUP : group / UNIT * UNIT;
  const i64 tasks = (panels + group - 1) / group;
  Status status = kOk;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
#pragma omp for schedule(static)
    for (i64 i = 0; i < blocks.count; ++i) {
      const i64 r = blocks.begin(i);
      pack_rows(x + r * p.x_stride, p.x_stride, blocks.size(i), p.k, a + r * p.k);
    }
    static thread_local Scratch scratch;
    float* tile = scratch.floats(std::size_t(rows) * group * PANEL);
#pragma omp for schedule(dynamic, 1)
    for (i64 task = 0; task < tasks; ++task) {
      if (!tile) { status = kNoMemory; continue; }
      const i64 panel0 = task * group, count = panels - panel0 < group ? panels - panel0 : group;
      blocked_task<T>(p, blocks, a, row0, panel0, count, tile);
    }
  }
  return status;
}

template <typename T>
Status run(const Problem& p) {
  static thread_local Scratch scratch;
  if (p.m <= MR_MAX) {
    float* a = scratch.floats(std::size_t(p.m) * p.k);
    if (!a) return kNoMemory;
    pack_rows(static_cast<const T*>(p.x), p.x_stride, p.m, p.k, a);
    stream_rows<T>(p, a, std::make_integer_sequence<int, MR_MAX>{});
    return kOk;
  }
  const i64 parts = (p.m + MC - 1) / MC, size = (p.m + parts - 1) / parts;
  const i64 rows_per_part = (size + MR_MAX - 1) / MR_MAX * MR_MAX;
  float* a = scratch.floats(std::size_t(rows_per_part) * p.k);
  if (!a) return kNoMemory;
  for (i64 row = 0; row < p.m; row += rows_per_part) {
    const Status status = run_row_block<T>(p, row, p.m - row < rows_per_part ? p.m - row : rows_per_part, a);
    if (status != kOk) return status;
  }
  return kOk;
}

}  // namespace
}  // namespace lamella

extern "C" int omp_get_num_threads();  // declared here: some compilers ship OpenMP without its header

using namespace lamella;

// x [m,k] with row stride x_stride (elements), w [ceil(n/16),k,16], bias [n] or null, out [m,n] contiguous.
LAMELLA_API std::int32_t lamella_matmul_panels(const void* x, const void* w, const void* bias, void* out, i64 m, i64 n,
                                               i64 k, i64 x_stride, std::int32_t dtype, std::int32_t bias_dtype,
                                               std::int32_t out_dtype, std::int32_t threads) {
  if (m == 0 || n == 0) return kOk;
  const Problem p{x, w, bias, out, m, n, k, x_stride, DType(dtype), DType(bias_dtype), DType(out_dtype), threads};
  if (k <= 0) return kBadShape;
  switch (p.dtype) {
    case kF32: return run<float>(p);
    case kBF16: return run<bf16>(p);
    case kF16: return run<f16>(p);
  }
  return kBadDType;
}

// How many threads a region asking for `threads` gets from the OpenMP runtime that the kernels are bound to.
LAMELLA_API std::int32_t lamella_team_size(std::int32_t threads) {
  std::int32_t count = 0;
#pragma omp parallel num_threads(threads)
#pragma omp single
  count = omp_get_num_threads();
  return count;
}
