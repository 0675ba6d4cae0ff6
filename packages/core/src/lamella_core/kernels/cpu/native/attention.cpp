// Causal attention of packed queries over a paged KV cache.
//
// Keys are visited in tiles of KT positions aligned to the start of the sequence. For one query: scores of a tile are
// dot products over head_dim (VW lanes, each in rising order, added in a fixed tree); then one step of the online softmax
// (M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", 2018; T. Dao et al., "FlashAttention", 2022),
// in float32. What else is computed in the same call, how the prompt is cut into chunks and the number of threads never
// enter a query's result. All query heads of one KV head and several queries share each loaded tile.
#include <cmath>
#include <limits>
#include <vector>

#include "calls.h"
#include "lanes.h"

namespace lamella {
namespace {

constexpr int KT = 32;            // keys per tile; part of the definition of the result
constexpr int ROWS_PER_ITEM = 64; // (query, head) rows that share a tile at most
constexpr i64 LATENT_HEADS = 16;  // that one item takes of those that share a latent; other threads take the others
constexpr float NEG_INF = -std::numeric_limits<float>::infinity();

struct Problem {
  const void *q, *k_cache, *v_cache;
  void* out;
  const std::int32_t *block_tables, *query_start, *context_lens;
  const std::int32_t* prefix_lens;  // [num_seqs] or null: the first keys of a sequence, seen by its queries among them
  const float *alibi_slopes, *sink_logits;  // [q_heads] or null
  i64 tokens, q_heads, kv_heads, head_dim, q_stride, num_seqs, max_blocks, num_blocks, block_size;
  i64 window, chunked, num_sinks;
  i64 sparse_block, local_blocks, vert_stride, first_offset, head_step;  // BlockSparsity; sparse_block 0: none
  i64 value_dim;  // of a latent cache: values are the last value_dim numbers of keys; 0: they have a cache of their own
  i64 rounds_alibi;  // AttentionSpec's
  float scale, softcap;
  i64 group() const { return q_heads / kv_heads; }
  bool latent() const { return value_dim > 0; }
  i64 out_dim() const { return latent() ? value_dim : head_dim; }
  // First key that a query at `position` sees, sinks aside: of its window, or of its chunk.
  i64 oldest(i64 position) const {
    if (window <= 0) return 0;
    return chunked ? position / window * window : position + 1 - window;
  }
  i64 prefix(i64 seq) const { return prefix_lens ? prefix_lens[seq] : 0; }
  i64 heads_per_item() const { return latent() && group() > LATENT_HEADS ? LATENT_HEADS : group(); }
};

// Some queries of one sequence, for some of the query heads of one KV head.
struct Item {
  i64 seq, kv_head, first_query, num_queries, position;  // first_query: index into q; position: of that query
  i64 first_head, num_heads;
};

// ---- one tile --------------------------------------------------------------------------------------------------------

// Running softmax of one (query, head) row.
struct Row {
  float *q, *out;    // [padded]
  float maximum, total;
  i64 position, end, head;  // sees no key from `end` on
};

// Float32 copies of a tile, rows padded with zeros to whole registers, and the keys that exist.
struct Tile {
  float *k, *v;            // [KT][padded]; of a latent cache v points into k
  std::uint32_t present;   // bit i: key start + i is in the cache
};

template <typename T>
LAMELLA_INLINE void widen_row(const T* src, float* dst, i64 dim, i64 padded) {
  i64 i = 0;
  for (; i + VW <= dim; i += VW) store(dst + i, load(src + i));
  for (; i < padded; ++i) dst[i] = i < dim ? to_float(src[i]) : 0.0f;
}

// Loads keys [start, min(start + KT, context)) of a sequence; false when the block table names a block out of range.
template <typename T>
bool load_tile(const Problem& p, const Item& item, i64 start, i64 context, i64 padded, Tile& tile) {
  const std::int32_t* table = p.block_tables + item.seq * p.max_blocks;
  const i64 count = context - start < KT ? context - start : KT, ahead = start + 2 * KT <= context ? KT : 0;
  tile.present = 0;
  for (i64 i = 0; i < KT; ++i) {
    const i64 block = i < count ? table[(start + i) / p.block_size] : -1;
    if (block >= p.num_blocks) return false;
    if (block < 0) {
      std::memset(tile.k + i * padded, 0, std::size_t(padded) * sizeof(float));
      if (!p.latent()) std::memset(tile.v + i * padded, 0, std::size_t(padded) * sizeof(float));
      continue;
    }
    tile.present |= 1u << i;
    const i64 row = (block * p.kv_heads + item.kv_head) * p.block_size + (start + i) % p.block_size;
    const i64 soon = table[(start + i + ahead) / p.block_size];
    const i64 next = ((soon < 0 ? block : soon) * p.kv_heads + item.kv_head) * p.block_size + (start + i + ahead) % p.block_size;
    const T *k = static_cast<const T*>(p.k_cache), *v = static_cast<const T*>(p.v_cache);
    for (i64 d = 0; d < p.head_dim; d += 64 / i64(sizeof(T))) {
      __builtin_prefetch(k + next * p.head_dim + d, 0, 2);
      if (!p.latent()) __builtin_prefetch(v + next * p.head_dim + d, 0, 2);
    }
    widen_row(k + row * p.head_dim, tile.k + i * padded, p.head_dim, padded);
    if (!p.latent()) widen_row(v + row * p.head_dim, tile.v + i * padded, p.head_dim, padded);
  }
  return true;
}

// The lowest n bits.
std::uint32_t below(i64 n) { return n <= 0 ? 0u : n >= KT ? ~0u : (1u << n) - 1; }

// Keys of the tile at `start` that are in the pattern of a sparse head for a query at `position`, as bits.
std::uint32_t sparse_keys(const Problem& p, i64 start, i64 position, i64 head) {
  const i64 offset = p.first_offset + head * p.head_step + 1, nearest = position / p.sparse_block - p.local_blocks + 1;
  std::uint32_t seen = 0;
  for (i64 block = start / p.sparse_block; block * p.sparse_block < start + KT; ++block)
    if (block >= nearest || (block + offset) % p.vert_stride == 0)
      seen |= below((block + 1) * p.sparse_block - start) & ~below(block * p.sparse_block - start);
  return seen;
}

// Keys of the tile at `start` that a row sees, as bits.
std::uint32_t visible_keys(const Problem& p, i64 start, const Row& row, std::uint32_t present) {
  std::uint32_t seen = below(row.end - start);
  if (p.window > 0) seen &= ~below(p.oldest(row.position) - start) | below(p.num_sinks - start);
  if (p.sparse_block > 0) seen &= sparse_keys(p, start, row.position, row.head);
  return seen & present;
}

// ALiBi of a row for the VW keys from `key` on.
LAMELLA_INLINE vf alibi(const Problem& p, const Row& row, i64 key) {
  vf keys;
  for (int j = 0; j < VW; ++j) keys[j] = float(p.rounds_alibi ? key + j : key + j - row.position);
  const vf slope = splat(p.alibi_slopes[row.head]);
  return p.rounds_alibi ? splat(p.scale) * round_bf16(slope * round_bf16(keys)) : slope * keys;
}

// Dot products of one query with VW keys. DV: registers per head (0: known only at run time).
template <int DV>
LAMELLA_INLINE vf score_keys(const float* q, const float* k, i64 padded) {
  const i64 count = DV ? DV : padded / VW, stride = DV ? DV * VW : padded;
  vf acc[VW];
#pragma GCC unroll 16
  for (int j = 0; j < VW; ++j) acc[j] = vf{};
  for (i64 i = 0; i < count; ++i) {
    const vf lane = load(q + i * VW);
#pragma GCC unroll 16
    for (int j = 0; j < VW; ++j) acc[j] = madd(lane, load(k + j * stride + i * VW), acc[j]);
  }
  return sum_lanes(acc);
}

// out[C registers] = out * shrink + sum over keys [first, last) of weight[key] * v[key].
template <int C>
LAMELLA_INLINE void add_values(float* out, const float* v, const float* weight, i64 first, i64 last, i64 stride, float shrink) {
  vf acc[C];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) acc[c] = load(out + c * VW) * splat(shrink);
  for (i64 key = first; key < last; ++key) {
    const vf w = splat(weight[key]);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[c] = madd(w, load(v + key * stride + c * VW), acc[c]);
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) store(out + c * VW, acc[c]);
}

template <int DV>
void attend(const Problem& p, Row& row, const Tile& tile, i64 start, i64 padded) {
  const std::uint32_t seen = visible_keys(p, start, row, tile.present);
  if (seen == 0) return;
  const i64 first = __builtin_ctz(seen), last = 32 - __builtin_clz(seen);
  float weight[KT];
  vf best = splat(NEG_INF);
  for (i64 i = 0; i < KT; i += VW) {
    vf s = score_keys<DV>(row.q, tile.k + i * padded, padded) * splat(p.scale);
    if (p.softcap > 0.0f) s = splat(p.softcap) * vtanh(s / splat(p.softcap));
    if (p.alibi_slopes) s += alibi(p, row, start + i);
    if (seen != ~0u)
      for (int j = 0; j < VW; ++j)
        if (!(seen >> (i + j) & 1)) s[j] = NEG_INF;
    best = vmax(s, best);
    store(weight + i, s);
  }
  const float top = hmax(best), maximum = top > row.maximum ? top : row.maximum;
  vf sum{};
  for (i64 i = 0; i < KT; i += VW) {
    const vf e = vexp(load(weight + i) - splat(maximum));
    store(weight + i, e);
    sum += e;
  }
  const float shrink = row.maximum == NEG_INF ? 0.0f : vexp(splat(row.maximum - maximum))[0];
  row.total = row.total * shrink + hsum(sum);
  row.maximum = maximum;
  const i64 count = DV ? DV : (p.out_dim() + VW - 1) / VW, stride = DV ? DV * VW : padded;
  i64 c = 0;
  for (; c + 8 <= count; c += 8) add_values<8>(row.out + c * VW, tile.v + c * VW, weight, first, last, stride, shrink);
  for (; c + 4 <= count; c += 4) add_values<4>(row.out + c * VW, tile.v + c * VW, weight, first, last, stride, shrink);
  for (; c < count; ++c) add_values<1>(row.out + c * VW, tile.v + c * VW, weight, first, last, stride, shrink);
}

// ---- one item --------------------------------------------------------------------------------------------------------

template <typename T>
void open_rows(const Problem& p, const Item& item, i64 padded, float* q, float* out, Row* rows) {
  const i64 prefix = p.prefix(item.seq);
  for (i64 i = 0; i < item.num_queries * item.num_heads; ++i) {
    const i64 head = item.first_head + i % item.num_heads, query = item.first_query + i / item.num_heads;
    const i64 position = item.position + i / item.num_heads;
    const bool sink = p.sink_logits != nullptr;
    rows[i] = Row{q + i * padded, out + i * padded, sink ? p.sink_logits[head] : NEG_INF, sink ? 1.0f : 0.0f,
                  position, position < prefix ? prefix : position + 1, head};
    widen_row(static_cast<const T*>(p.q) + query * p.q_stride + head * p.head_dim, rows[i].q, p.head_dim, padded);
    std::memset(rows[i].out, 0, std::size_t(padded) * sizeof(float));
  }
}

template <typename T>
void close_rows(const Problem& p, const Item& item, const Row* rows) {
  const i64 dim = p.out_dim();
  for (i64 i = 0; i < item.num_queries * item.num_heads; ++i) {
    const float inverse = rows[i].total > 0.0f ? 1.0f / rows[i].total : rows[i].total;
    T* dst = static_cast<T*>(p.out) + ((item.first_query + i / item.num_heads) * p.q_heads + rows[i].head) * dim;
    for (i64 d = 0; d < dim; ++d) dst[d] = from_float<T>(rows[i].out[d] * inverse);
  }
}

template <int DV, typename T>
bool run_item(const Problem& p, const Item& item, i64 padded, float* scratch, std::vector<Row>& rows) {
  const i64 num_rows = item.num_queries * item.num_heads, last = item.position + item.num_queries;
  const i64 context = last < p.prefix(item.seq) ? p.prefix(item.seq) : last;
  Tile tile{scratch, p.latent() ? scratch + p.head_dim - p.value_dim : scratch + KT * padded, 0};
  float* q = scratch + 2 * KT * padded;
  rows.resize(std::size_t(num_rows));
  open_rows<T>(p, item, padded, q, q + num_rows * padded, rows.data());
  const i64 oldest = p.oldest(item.position);  // no later query sees an older key, sinks aside
  for (i64 start = 0; start < context; start += KT) {
    if (start + KT <= oldest && start >= p.num_sinks) continue;
    if (!load_tile<T>(p, item, start, context, padded, tile)) return false;
    for (Row& row : rows) attend<DV>(p, row, tile, start, padded);
  }
  close_rows<T>(p, item, rows.data());
  return true;
}

// Cuts the queries into items, the most expensive first; false when lengths contradict each other.
bool make_items(const Problem& p, std::vector<Item>& items) {
  const i64 group = p.group(), heads = p.heads_per_item();
  const i64 per_item = heads >= ROWS_PER_ITEM ? 1 : ROWS_PER_ITEM / heads;
  for (i64 s = 0; s < p.num_seqs; ++s) {
    const i64 begin = p.query_start[s], end = p.query_start[s + 1], context = p.context_lens[s];
    if (begin < 0 || end < begin || end > p.tokens || context < end - begin) return false;
    if ((context + p.block_size - 1) / p.block_size > p.max_blocks || p.prefix(s) > context) return false;
    for (i64 stop = end; stop > begin; stop -= per_item) {
      const i64 first = stop - per_item > begin ? stop - per_item : begin;
      for (i64 h = 0; h < p.kv_heads; ++h)
        for (i64 done = 0; done < group; done += heads) {
          const i64 count = heads < group - done ? heads : group - done;
          items.push_back(Item{s, h, first, stop - first, context - (end - first), h * group + done, count});
        }
    }
  }
  return true;
}

template <int DV, typename T>
Status run_items(const Problem& p, const std::vector<Item>& items, i64 padded, int threads) {
  Status status = kOk;
  const i64 count = i64(items.size());
#pragma omp parallel num_threads(threads) if (threads > 1 && count > 1)
  {
    static thread_local Scratch scratch;
    std::vector<Row> rows;
    const i64 max_rows = p.heads_per_item() > ROWS_PER_ITEM ? p.heads_per_item() : ROWS_PER_ITEM;
    float* memory = scratch.floats(std::size_t(2 * KT + 2 * max_rows) * padded);
#pragma omp for schedule(dynamic, 1)
    for (i64 i = 0; i < count; ++i) {
      if (!memory) status = kNoMemory;
      else if (!run_item<DV, T>(p, items[std::size_t(i)], padded, memory, rows)) status = kBadShape;
    }
  }
  return status;
}

template <typename T>
Status run(const Problem& p, int threads) {
  std::vector<Item> items;
  if (!make_items(p, items)) return kBadShape;
  const i64 padded = (p.head_dim + VW - 1) / VW * VW;
  if (p.latent()) return run_items<0, T>(p, items, padded, threads);
  if (padded == 64) return run_items<64 / VW, T>(p, items, padded, threads);
  if (padded == 128) return run_items<128 / VW, T>(p, items, padded, threads);
  return run_items<0, T>(p, items, padded, threads);
}

}  // namespace
}  // namespace lamella

using namespace lamella;

// q [tokens, q_heads, head_dim] with token stride q_stride (elements); caches [num_blocks, kv_heads, block_size,
// head_dim]; block_tables [num_seqs, max_blocks], negative = evicted; query_start [num_seqs + 1]; context_lens
// [num_seqs]; out [tokens, q_heads, head_dim] contiguous. window 0: none; chunked: a query sees
// its chunk of `window` keys rather than the last ones; prefix_lens null: none; sparse_block 0: not sparse, else a head
// sees what `BlockSparsity` says, first_offset being that of this call's first head; softcap 0: none. value_dim above 0:
// v_cache is not read, values are the last value_dim numbers of keys, and out is [tokens, q_heads, value_dim].
// rounds_alibi: see `AttentionSpec`.
LAMELLA_API std::int32_t lamella_paged_attention(
    const void* q, const void* k_cache, const void* v_cache, void* out, const std::int32_t* block_tables,
    const std::int32_t* query_start, const std::int32_t* context_lens, const std::int32_t* prefix_lens,
    const float* alibi_slopes, const float* sink_logits, i64 tokens, i64 q_heads, i64 kv_heads, i64 head_dim,
    i64 q_stride, i64 num_seqs, i64 max_blocks, i64 num_blocks, i64 block_size, i64 window, i64 chunked, i64 num_sinks,
    i64 sparse_block, i64 local_blocks, i64 vert_stride, i64 first_offset, i64 head_step, i64 value_dim,
    i64 rounds_alibi, float scale, float softcap, std::int32_t dtype, std::int32_t threads) {
  const Problem p{q, k_cache, v_cache, out, block_tables, query_start, context_lens, prefix_lens, alibi_slopes,
                  sink_logits,
                  tokens, q_heads, kv_heads, head_dim, q_stride, num_seqs, max_blocks, num_blocks, block_size,
                  window, chunked, num_sinks, sparse_block, local_blocks, vert_stride, first_offset, head_step,
                  value_dim, rounds_alibi, scale, softcap};
  if (value_dim < 0 || value_dim > head_dim || (sparse_block > 0 && vert_stride <= 0)) return kBadShape;
  if (kv_heads <= 0 || q_heads % kv_heads != 0 || block_size <= 0 || head_dim <= 0) return kBadShape;
  switch (dtype) {
    case kF32: return run<float>(p, threads);
    case kBF16: return run<bf16>(p, threads);
    case kF16: return run<f16>(p, threads);
  }
  return kBadDType;
}
