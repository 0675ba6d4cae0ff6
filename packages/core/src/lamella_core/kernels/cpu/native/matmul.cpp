// y[M,N] = x[M,K] w[N,K]^T + bias for weights packed as "panel16": [ceil(N/16), K, 16].
//
// Every output is summed as: for each aligned block of KC values of k, one chain of fused multiply-adds in rising k
// starting from zero; the block sums are added in rising order. M, the thread count, the row's position and the tiling
// below never enter, so a row's result has the same bits whatever it is computed together with.
//
// Two schedules (loop order after K. Goto and R. van de Geijn, "Anatomy of High-Performance Matrix Multiplication"):
//   stream   M <= MR_MAX: each weight is read once from memory, converted in registers and used for all rows.
//   blocked  larger M: a KC x 16 block of weights is converted once into an L1-sized buffer and used by all row blocks.
#include <utility>

#include "common.h"

namespace lamella {
namespace {

constexpr int KC = 256;   // values of k per block; part of the definition of the result
constexpr int MC = 192;   // rows whose KC-slice of x stays in L2
constexpr int GROUP = 16; // panels per task of the blocked schedule at most

#if defined(__AVX512F__)
constexpr int MR_MAX = 12, TILE_PANELS = 2;
constexpr int stream_panels(int mr) { return mr <= 1 ? 8 : mr <= 3 ? 4 : 2; }
#elif defined(__AVX__)
constexpr int MR_MAX = 6, TILE_PANELS = 1;
constexpr int stream_panels(int mr) { return mr <= 1 ? 4 : mr <= 3 ? 2 : 1; }
#elif defined(__aarch64__)
constexpr int MR_MAX = 6, TILE_PANELS = 1;
constexpr int stream_panels(int mr) { return mr <= 1 ? 4 : mr <= 2 ? 2 : 1; }
#else
constexpr int MR_MAX = 2, TILE_PANELS = 1;
constexpr int stream_panels(int) { return 1; }
#endif
constexpr int MAX_PANELS = 8;

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
    vf col[NP * NV];
#pragma GCC unroll 16
    for (int p = 0; p < NP; ++p) {
      __builtin_prefetch(next + p * next_stride + k * next_step, 0, 2);
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) col[p * NV + j] = load(b + p * b_stride + k * PANEL + j * VW);
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const vf row = splat(a[k * MR + r]);
#pragma GCC unroll 16
      for (int j = 0; j < NP * NV; ++j) acc[r][j] += row * col[j];
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

// Rows are cut into near-equal blocks of at most MR_MAX; block i covers [begin(i), begin(i + 1)).
struct RowBlocks {
  i64 rows, count;
  explicit RowBlocks(i64 m) : rows(m), count((m + MR_MAX - 1) / MR_MAX) {}
  i64 begin(i64 i) const { return i * (rows / count) + (i < rows % count ? i : rows % count); }
};

template <typename T>
void pack_rows(const T* x, i64 x_stride, i64 mr, i64 k0, i64 k1, float* a) {
  for (i64 k = k0; k < k1; ++k)
    for (i64 r = 0; r < mr; ++r) a[k * mr + r] = to_float(x[r * x_stride + k]);
}

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
  static_assert(NP <= MAX_PANELS, "panel group too wide");
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

using TileFn = void (*)(const float*, const float*, i64, i64, float*, i64, bool, const char*, i64, i64);

template <int MR, int NP>
void tile_product(const float* a, const float* b, i64 b_stride, i64 kc, float* tile, i64 ldt, bool first,
                  const char* next, i64 next_stride, i64 next_step) {
  block_product<MR, NP>(a, b, b_stride, kc, tile, ldt, first, next, next_stride, next_step);
}

template <int NP, int... I>
TileFn tile_fn(i64 mr, std::integer_sequence<int, I...>) {
  static constexpr TileFn table[] = {tile_product<I + 1, NP>...};
  return table[mr - 1];
}

// Weights [count][kc][16] of one k block as float32: in place when they already are, else converted into buffer.
LAMELLA_INLINE const float* as_float(const float* w, i64, i64, i64, float*) { return w; }
template <typename T>
LAMELLA_INLINE const float* as_float(const T* w, i64 stride, i64 count, i64 kc, float* buffer) {
  for (i64 p = 0; p < count; ++p)
    for (i64 i = 0; i < kc * PANEL; i += VW) store(buffer + p * KC * PANEL + i, load(w + p * stride + i));
  return buffer;
}

// One task: all rows of the block [row0, row0 + rows) times `count` panels.
template <typename T>
void blocked_task(const Problem& p, const RowBlocks& blocks, const float* a, i64 row0, i64 panel0, i64 count, float* tile,
                  float* buffer) {
  constexpr auto kSizes = std::make_integer_sequence<int, MR_MAX>{};
  const i64 stride = p.k * PANEL, ldt = count * PANEL;
  const i64 b_stride = sizeof(T) == sizeof(float) ? stride : i64(KC) * PANEL;
  const T* w = static_cast<const T*>(p.w) + panel0 * stride;
  for (i64 k = 0; k < p.k; k += KC) {
    const i64 kc = p.k - k < KC ? p.k - k : KC;
    for (i64 panel = 0; panel < count; panel += TILE_PANELS) {
      const i64 width = count - panel < TILE_PANELS ? 1 : TILE_PANELS;
      const T* src = w + panel * stride + k * PANEL;
      const bool last = panel + TILE_PANELS >= count;
      const T* next = !last ? src + TILE_PANELS * stride : k + KC < p.k ? w + (k + KC) * PANEL : src;
      const float* b = as_float(src, stride, width, kc, buffer);
      for (i64 i = 0; i < blocks.count; ++i) {
        const i64 r = blocks.begin(i), mr = blocks.begin(i + 1) - r;
        const TileFn fn = width == 1 ? tile_fn<1>(mr, kSizes) : tile_fn<TILE_PANELS>(mr, kSizes);
        fn(a + r * p.k + k * mr, b, b_stride, kc, tile + r * ldt + panel * PANEL, ldt, k == 0,
           reinterpret_cast<const char*>(next), stride * i64(sizeof(T)), i == 0 ? PANEL * i64(sizeof(T)) : 0);
      }
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
  group = group < TILE_PANELS ? TILE_PANELS : group > GROUP ? GROUP : group;
  const i64 tasks = (panels + group - 1) / group;
  Status status = kOk;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
#pragma omp for schedule(static)
    for (i64 i = 0; i < blocks.count; ++i) {
      const i64 r = blocks.begin(i), mr = blocks.begin(i + 1) - r;
      pack_rows(x + r * p.x_stride, p.x_stride, mr, 0, p.k, a + r * p.k);
    }
    static thread_local Scratch scratch;
    float* tile = scratch.floats(std::size_t(rows) * group * PANEL + TILE_PANELS * KC * PANEL);
#pragma omp for schedule(dynamic, 1)
    for (i64 task = 0; task < tasks; ++task) {
      if (!tile) { status = kNoMemory; continue; }
      const i64 panel0 = task * group, count = panels - panel0 < group ? panels - panel0 : group;
      blocked_task<T>(p, blocks, a, row0, panel0, count, tile, tile + rows * group * PANEL);
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
    pack_rows(static_cast<const T*>(p.x), p.x_stride, p.m, 0, p.k, a);
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
