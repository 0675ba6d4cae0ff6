// Causal attention of prompts, or of their next chunks, over keys and values beside each other in memory, on Hopper.
//
// A block has three warpgroups. The first one's first warp takes tiles, 128 queries of one head, from a counter and
// brings queries, keys and values to shared memory with the tensor memory accelerator; the other two attend 64 queries
// each. They walk over tiles of 128 keys, the last one first: it and perhaps the one before need masks. The products of
// the next tile's keys are issued together with those of this tile's values, so that a softmax runs beside products;
// and the two warpgroups issue theirs in turn, so that one's softmax runs beside the other's.
//
// Blocks stay until there is no tile left. Late tiles of a sequence have the most keys and go first.
//
// Macros: DIM (64 or 128, of a head); BFLOAT16 (of queries, keys and values, else float16); OUT_FLOAT8 (the result is
// divided by a scale and stored as float8, else as halves).
// Sources: PTX ISA, "Asynchronous warpgroup-level matrix instructions", "Tensor data movement", "mbarrier"; Shah et al.
// 2024, "FlashAttention-3".

#include "hopper.h"

struct Params {
  // of the queries' tokens: [T, heads, DIM], [T, key heads, DIM] twice; of begun sequences: [*, key heads, DIM] twice
  TensorMap q_map, k_map, v_map, past_k_map, past_v_map;
  char* out;                 // [T, heads, DIM]
  const int *starts;         // [sequences + 1]: first tokens
  const int *lengths;        // [begun]: keys of the first sequences, which lie one after another in the past's maps
  const float *kv_scales;    // [2] of the past's keys and values, or null
  const float *out_scale;    // or null
  int* counters;             // [2] zeros, and left so
  float factor;              // of scores, in base 2
  int sequences, begun, heads, group, tiles;  // tiles: numbers that are given to tiles
};

constexpr int TILE_ROWS = 128, TILE_KEYS = 128, STAGES = 2, HALVES = DIM / 64;  // a half: 64 numbers, 128 bytes
constexpr u32 HALF_BYTES = 128 * 128, TILE_BYTES = HALVES * HALF_BYTES;
constexpr int SCORES = TILE_KEYS / 2, RESULTS = DIM / 2;  // of a thread
constexpr int WARPS = 8;  // that multiply
constexpr float LOWEST = -1e30f;

// What the warpgroups are told of a tile. count 0: there are no more.
struct Tile {
  int count;      // tiles of keys
  int position;   // of the first query
  int row;        // of the first query, among all tokens
  int rows;       // that there are, perhaps more than the tile's
  int last_keys;  // in the last tile of keys
  int head;
  int is_begun;
};

// Places in shared memory.
struct Shared {
  u32 q, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty;
  volatile Tile* tile;
};

// ---- barriers, and copies that report to them ----

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Barriers of both warpgroups' 256 threads. The first warpgroup's turn is given once more than it is taken; a block may
// end so.
__device__ __forceinline__ void turn_wait(int turn) { asm volatile("bar.sync %0, 256;" ::"r"(turn) : "memory"); }
__device__ __forceinline__ void turn_give(int turn) { asm volatile("bar.arrive %0, 256;" ::"r"(turn) : "memory"); }

// 128 rows of one head from a row on.
__device__ __forceinline__ void load_tile(u32 to, const TensorMap& map, u32 barrier, int head, int row) {
#pragma unroll
  for (int half = 0; half < HALVES; half++) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
            "r"(to + half * HALF_BYTES),
        "l"(&map), "r"(barrier), "r"(64 * half), "r"(head), "r"(row)
        : "memory");
  }
}

// ---- products ----

// 64 queries times 128 keys over 16 numbers of each: added to the scores, or in their place.
template <bool ADD>
__device__ __forceinline__ void multiply_keys(float (&scores)[SCORES], u64 queries, u64 keys) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16." HALF_TYPES " {" NAMES_64
               "}, %64, %65, add, 1, 1, 0, 0;\n}"
               : LIST_64(scores, 0)
               : "l"(queries), "l"(keys), "n"(ADD ? 1 : 0));
}

// Adds 64 rows of 16 weights times the values of 16 keys to the results.
__device__ __forceinline__ void multiply_values(float (&results)[RESULTS], const u32* weights, u64 values) {
#if DIM == 128
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16." HALF_TYPES " {" NAMES_64
               "}, {%64, %65, %66, %67}, %68, add, 1, 1, 1;\n}"
               : LIST_64(results, 0)
               : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values));
#else
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16." HALF_TYPES " {" NAMES_32
               "}, {%32, %33, %34, %35}, %36, add, 1, 1, 1;\n}"
               : LIST_32(results, 0)
               : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values));
#endif
}

template <int LEFT>
__device__ __forceinline__ void products_wait(float (&scores)[SCORES]) {
  asm volatile("wgmma.wait_group.sync.aligned %64;" : LIST_64(scores, 0) : "n"(LEFT) : "memory");
}

__device__ __forceinline__ void products_end(float (&results)[RESULTS]) {
#if DIM == 128
  asm volatile("wgmma.wait_group.sync.aligned 0;" : LIST_64(results, 0)::"memory");
#else
  asm volatile("wgmma.wait_group.sync.aligned 0;" : LIST_32(results, 0)::"memory");
#endif
}

// ---- numbers ----

__device__ __forceinline__ float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- what the first warpgroup tells the others ----

__device__ __forceinline__ void tell(volatile Tile& to, const Tile& tile) {
  to.count = tile.count, to.position = tile.position, to.row = tile.row, to.rows = tile.rows;
  to.last_keys = tile.last_keys, to.head = tile.head, to.is_begun = tile.is_begun;
}

__device__ __forceinline__ Tile heard(const volatile Tile& of) {
  return {of.count, of.position, of.row, of.rows, of.last_keys, of.head, of.is_begun};
}

// ---- the first warpgroup ----

// Returns the tile of a number, in every lane; count 0: none has it. Sequence i has the numbers from
// starts[i] / TILE_ROWS + i on, enough for its tiles wherever it begins; no tile has those that are left over.
__device__ __forceinline__ Tile find_tile(const Params& params, int number, int lane, int& first_key) {
  int found = -1, keys = 0, past_keys = 0;  // keys: of the begun sequences before
  for (int base = 0; base < params.sequences; base += 32) {
    const int sequence = base + lane;
    const bool there = sequence < params.sequences && params.starts[sequence] / TILE_ROWS + sequence <= number;
    found += __popc(__ballot_sync(~0u, there));
  }
  Tile tile = {};
  if (found < 0) return tile;
  const int start = params.starts[found], count = params.starts[found + 1] - start;
  const int first = (number - found - start / TILE_ROWS) * TILE_ROWS;
  if (first >= count) return tile;
  tile.is_begun = found < params.begun;
  if (tile.is_begun) {
    for (int i = lane; i < found; i += 32) keys += params.lengths[i];
    for (int step = 16; step > 0; step /= 2) keys += __shfl_xor_sync(~0u, keys, step);
    past_keys = params.lengths[found] - count;
  }
  first_key = tile.is_begun ? keys : start;
  const int all_keys = past_keys + count;
  tile.position = past_keys + first;
  tile.row = start + first;
  tile.rows = count - first;
  const int seen = min(tile.position + TILE_ROWS, all_keys);
  tile.count = (seen + TILE_KEYS - 1) / TILE_KEYS;
  tile.last_keys = min(all_keys - (tile.count - 1) * TILE_KEYS, TILE_KEYS);
  return tile;
}

__device__ __forceinline__ void load_tiles(const Params& params, const Shared& shared) {
  const int lane = threadIdx.x;
  u32 stage = 0, phase = 1, q_phase = 1;
  const int all = params.tiles * params.heads;
  int unit = blockIdx.x;
  while (unit < all) {
    int first_key;
    Tile tile = find_tile(params, params.tiles - 1 - unit / params.heads, lane, first_key);
    if (tile.count > 0 && lane == 0) {
      tile.head = unit % params.heads;
      const int kv_head = tile.head / params.group;
      const TensorMap &k_map = tile.is_begun ? params.past_k_map : params.k_map;
      const TensorMap &v_map = tile.is_begun ? params.past_v_map : params.v_map;
      barrier_wait(shared.q_empty, q_phase);
      tell(*shared.tile, tile);
      barrier_expect(shared.q_full, TILE_BYTES);
      load_tile(shared.q, params.q_map, shared.q_full, tile.head, tile.row);
      q_phase ^= 1;
#pragma unroll 1
      for (int i = tile.count - 1; i >= 0; i--) {
        barrier_wait(shared.k_empty + 8 * stage, phase);
        barrier_expect(shared.k_full + 8 * stage, TILE_BYTES);
        load_tile(shared.k + stage * TILE_BYTES, k_map, shared.k_full + 8 * stage, kv_head, first_key + i * TILE_KEYS);
        barrier_wait(shared.v_empty + 8 * stage, phase);
        barrier_expect(shared.v_full + 8 * stage, TILE_BYTES);
        load_tile(shared.v + stage * TILE_BYTES, v_map, shared.v_full + 8 * stage, kv_head, first_key + i * TILE_KEYS);
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
    }
    if (lane == 0) unit = gridDim.x + atomicAdd(params.counters, 1);
    unit = __shfl_sync(~0u, unit, 0);
  }
  if (lane == 0) {
    barrier_wait(shared.q_empty, q_phase);
    shared.tile->count = 0;
    barrier_arrive(shared.q_full);
    if (atomicAdd(params.counters + 1, 1) == gridDim.x - 1) {  // every block has taken its last number
      atomicExch(params.counters, 0);
      atomicExch(params.counters + 1, 0);
    }
  }
}

// ---- the other two ----

// The running softmax of a thread's two rows, eight apart.
struct Softmax {
  float highest[2], total[2], fade[2];

  __device__ void reset() {
#pragma unroll
    for (int half = 0; half < 2; half++) highest[half] = LOWEST, total[half] = 0.0f;
  }

  // Turns scores, -inf where nothing is seen, into weights; sets by what earlier results are to be multiplied.
  __device__ void advance(float (&scores)[SCORES], float factor) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float now = highest[half];
#pragma unroll
      for (int i = 0; i < SCORES; i += 4) now = fmaxf(now, fmaxf(scores[i + 2 * half], scores[i + 2 * half + 1]));
      now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
      now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));
      fade[half] = power((highest[half] - now) * factor);
      highest[half] = now;
      const float base = now * factor;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < SCORES; i += 4) {
#pragma unroll
        for (int j = i + 2 * half; j < i + 2 * half + 2; j++) {
          scores[j] = power(fmaf(scores[j], factor, -base));
          sum += scores[j];
        }
      }
      total[half] = total[half] * fade[half] + sum;
    }
  }
};

__device__ __forceinline__ void score(float (&scores)[SCORES], u64 queries, u64 keys) {
  multiply_keys<false>(scores, queries, keys);
#pragma unroll
  for (int step = 1; step < DIM / 16; step++) {
    const u64 at = step / 4 * (HALF_BYTES >> 4) + step % 4 * 2;
    multiply_keys<true>(scores, queries + at, keys + at);
  }
}

__device__ __forceinline__ void add_values(float (&results)[RESULTS], const u32 (&weights)[SCORES / 2], u64 values) {
#pragma unroll
  for (int step = 0; step < TILE_KEYS / 16; step++) multiply_values(results, weights + 4 * step, values + step * 128);
}

// -inf for keys after a thread's queries, the first of which is at a position among the tile's keys.
__device__ __forceinline__ void hide(float (&scores)[SCORES], int position, int lane) {
#pragma unroll
  for (int i = 0; i < SCORES; i++) {
    const int key = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (key > position + i / 2 % 2 * 8) scores[i] = __int_as_float(0xff800000);
  }
}

// The k-th group of 16 weights of 64 rows lies in weights[4 k] to weights[4 k + 3].
__device__ __forceinline__ void round_weights(u32 (&weights)[SCORES / 2], const float (&scores)[SCORES]) {
#pragma unroll
  for (int i = 0; i < SCORES / 2; i++) weights[i] = to_halves(scores[2 * i], scores[2 * i + 1]);
}

// Zeros the values after the last key, whatever they are: they have no weight, but no number times 0 is none. Either
// warpgroup does so for itself; it may write zeros over zeros that the other reads.
__device__ __forceinline__ void clear_values(u32 values, int last_keys, int thread, int warpgroup) {
#pragma unroll
  for (int half = 0; half < HALVES; half++) {
    for (int at = last_keys * 128 + thread * 16; at < TILE_KEYS * 128; at += 128 * 16)
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(values + half * HALF_BYTES + at), "r"(0)
                   : "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("bar.sync %0, 128;" ::"r"(4 + warpgroup) : "memory");
}

// Swaps columns among four threads: thread i's x[j] goes to thread j's x[i].
__device__ __forceinline__ void swap_columns(u32 (&x)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & bit) continue;
      const u32 got = __shfl_xor_sync(~0u, upper ? x[i] : x[i | bit], bit);
      if (upper) x[i] = got; else x[i | bit] = got;
    }
  }
}

__device__ __forceinline__ void store(
    const Params& params, const Tile& tile, const float (&results)[RESULTS], const float (&total)[2], int row,
    int lane) {
  float factors[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float sum = total[half];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const float v_scale = tile.is_begun && params.kv_scales ? params.kv_scales[1] : 1.0f;
    factors[half] = v_scale / (sum == 0.0f ? 1.0f : sum);
#if OUT_FLOAT8
    factors[half] /= *params.out_scale;
#endif
  }
  constexpr int BYTES = OUT_FLOAT8 ? 1 : 2;
  char* to = params.out + BYTES * (((i64)(tile.row + row) * params.heads + tile.head) * DIM + lane % 4 * 8);
  const i64 below = (i64)BYTES * 8 * params.heads * DIM;
#pragma unroll
  for (int i = 0; i < RESULTS; i += 16) {  // 32 columns; afterwards a thread has eight side by side
#if OUT_FLOAT8
    u32 x[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float* four = results + i + 4 * j;
      x[j] = to_float8(four[0] * factors[0], four[1] * factors[0]) |
             to_float8(four[2] * factors[1], four[3] * factors[1]) << 16;
    }
    swap_columns(x, lane);
    if (row < tile.rows)
      *(uint2*)(to + 2 * i) = make_uint2(__byte_perm(x[0], x[1], 0x5410), __byte_perm(x[2], x[3], 0x5410));
    if (row + 8 < tile.rows)
      *(uint2*)(to + below + 2 * i) = make_uint2(__byte_perm(x[0], x[1], 0x7632), __byte_perm(x[2], x[3], 0x7632));
#else
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 x[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float* two = results + i + 4 * j + 2 * half;
        x[j] = to_halves(two[0] * factors[half], two[1] * factors[half]);
      }
      swap_columns(x, lane);
      if (row + 8 * half < tile.rows) *(uint4*)(to + half * below + 4 * i) = make_uint4(x[0], x[1], x[2], x[3]);
    }
#endif
  }
}

__device__ __forceinline__ void attend_tiles(const Params& params, const Shared& shared) {
  const int thread = threadIdx.x % 128, lane = thread % 32, warpgroup = threadIdx.x / 128 - 1;
  const int row = warpgroup * 64 + thread / 32 * 16 + lane / 4;
  const float past_factor = params.kv_scales ? params.factor * params.kv_scales[0] : params.factor;
  const u64 queries = matrix_at(shared.q + warpgroup * 64 * 128);
  u32 stage = 0, phase = 0, q_phase = 0;
  float scores[SCORES], results[RESULTS];
  u32 weights[SCORES / 2];
  Softmax softmax;
  if (warpgroup == 1) turn_give(1);  // the first warpgroup begins
  for (;;) {
    barrier_wait(shared.q_full, q_phase);
    const Tile tile = heard(*shared.tile);
    if (tile.count == 0) break;
    q_phase ^= 1;
    const float factor = tile.is_begun ? past_factor : params.factor;
    softmax.reset();
#pragma unroll
    for (int i = 0; i < RESULTS; i++) results[i] = 0.0f;

    barrier_wait(shared.k_full + 8 * stage, phase);
    products_begin();
    score(scores, queries, matrix_at(shared.k + stage * TILE_BYTES));
    products_issued();
    products_wait<0>(scores);
    if (lane == 0) barrier_arrive(shared.k_empty + 8 * stage);
    hide(scores, tile.position + row - (tile.count - 1) * TILE_KEYS, lane);
    softmax.advance(scores, factor);
    round_weights(weights, scores);
    if (tile.last_keys < TILE_KEYS) {
      barrier_wait(shared.v_full + 8 * stage, phase);
      clear_values(shared.v + stage * TILE_BYTES, tile.last_keys, thread, warpgroup);
    }
#pragma unroll 1
    for (int i = tile.count - 2; i >= 0; i--) {
      const u32 v_stage = stage, v_phase = phase;
      if (++stage == STAGES) stage = 0, phase ^= 1;
      barrier_wait(shared.k_full + 8 * stage, phase);
      turn_wait(1 + warpgroup);
      products_begin();
      score(scores, queries, matrix_at(shared.k + stage * TILE_BYTES));
      products_issued();
      barrier_wait(shared.v_full + 8 * v_stage, v_phase);
      products_begin();
      add_values(results, weights, matrix_at(shared.v + v_stage * TILE_BYTES, HALF_BYTES));
      products_issued();
      turn_give(2 - warpgroup);
      products_wait<1>(scores);
      if (lane == 0) barrier_arrive(shared.k_empty + 8 * stage);
      const int hidden = tile.position + row - i * TILE_KEYS;
      if (tile.position + warpgroup * 64 < (i + 1) * TILE_KEYS - 1) hide(scores, hidden, lane);
      softmax.advance(scores, factor);
      products_end(results);
      if (lane == 0) barrier_arrive(shared.v_empty + 8 * v_stage);
#pragma unroll
      for (int j = 0; j < RESULTS; j++) results[j] *= softmax.fade[j / 2 % 2];
      round_weights(weights, scores);
    }
    if (lane == 0) barrier_arrive(shared.q_empty);
    barrier_wait(shared.v_full + 8 * stage, phase);
    products_begin();
    add_values(results, weights, matrix_at(shared.v + stage * TILE_BYTES, HALF_BYTES));
    products_issued();
    products_end(results);
    if (lane == 0) barrier_arrive(shared.v_empty + 8 * stage);
    if (++stage == STAGES) stage = 0, phase ^= 1;
    store(params, tile, results, softmax.total, row, lane);
  }
}

extern "C" __global__ void __launch_bounds__(384, 1) prompt_attention(const __grid_constant__ Params params) {
  extern __shared__ char memory[];
  __shared__ Tile tile;
  __shared__ u64 barriers[2 + 4 * STAGES];
  Shared shared;
  shared.tile = &tile;
  shared.q = tiles_in(memory);
  shared.k = shared.q + TILE_BYTES;
  shared.v = shared.k + STAGES * TILE_BYTES;
  shared.q_full = (u32)__cvta_generic_to_shared(barriers);
  shared.q_empty = shared.q_full + 8;
  shared.k_full = shared.q_full + 16;
  shared.k_empty = shared.k_full + 8 * STAGES;
  shared.v_full = shared.k_empty + 8 * STAGES;
  shared.v_empty = shared.v_full + 8 * STAGES;
  if (threadIdx.x == 0) {
    barrier_init(shared.q_full, 1);
    barrier_init(shared.q_empty, WARPS);
    for (int stage = 0; stage < STAGES; stage++) {
      barrier_init(shared.k_full + 8 * stage, 1);
      barrier_init(shared.k_empty + 8 * stage, WARPS);
      barrier_init(shared.v_full + 8 * stage, 1);
      barrier_init(shared.v_empty + 8 * stage, WARPS);
    }
    barriers_made();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x < 32) load_tiles(params, shared);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    attend_tiles(params, shared);
  }
}
