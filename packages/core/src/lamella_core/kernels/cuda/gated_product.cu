// silu(gate) * up of x [M, K] times w [2 F, K] transposed, the weight rows being [gate, up]: [M, F], on Hopper.
//
// A block has three warpgroups. The first one's thread 0 brings tiles of x [128, 128 bytes] and w [256, 128 bytes] to
// shared memory with the tensor memory accelerator, four steps ahead; the other two multiply 64 rows each with all 256
// weight rows, or half of them, and store what the gate makes of the sums. Two blocks form a cluster and share what
// both need, so that the L2 cache sends it once: of a tall pair the weights, of a wide pair the rows (`gated_pairs.h`).
// Blocks stay and take turns; the next turn's tiles arrive while this one's results are stored.
//
// A tile of weights has 128 rows of gate and the same of up. A thread has the sums of one row of x with the tile's rows
// 8 j + 2 (lane % 4) + e, j < 32 and e < 2. The weights' map, a box (128 bytes, 2, 4, RUN, 1) over strides of
// (1 number; F, RUN, 1, 4 * RUN rows), brings gate and up of one output to the same j, and outputs of 16 bytes side by
// side to neighbouring j: a thread stores 16 bytes at a time, and four threads 64.
//
// Macros: FLOAT8 (of x and w, else halves); BFLOAT16 (of halves, else float16); OUT_FLOAT8 (the result is divided by a
// scale and stored as float8, else as halves).
// Sources: PTX ISA, "Asynchronous warpgroup-level matrix instructions", "Tensor data movement", "mbarrier".

#include "gated_pairs.h"
#include "hopper.h"

struct Params {
  TensorMap x_map, w_map;
  char* out;
  const float *x_scale, *w_scale, *out_scale;
  int rows, tiles, steps, x_scale_step;  // step: 0 for one scale of all rows, 1 for each row's
  int halved;                            // pairs, the last ones, that are computed in halves
};

constexpr int TILE_WEIGHTS = 256, STEP_BYTES = 128, STAGES = 4;
constexpr u32 ROW_TILE_BYTES = BLOCK_ROWS * STEP_BYTES, WEIGHT_TILE_BYTES = TILE_WEIGHTS * STEP_BYTES;
constexpr u32 STAGE_BYTES = ROW_TILE_BYTES + WEIGHT_TILE_BYTES;
constexpr u16 BOTH_BLOCKS = 3;
constexpr int RUN = OUT_FLOAT8 ? 16 : 8, OUTPUTS = TILE_WEIGHTS / 2;  // of a thread side by side; of a tile
constexpr int PARTS = OUTPUTS / (4 * RUN);                            // of a tile of weights, one box each

#if FLOAT8
constexpr int STEP = STEP_BYTES;  // numbers
#define MULTIPLY(N) "wgmma.mma_async.sync.aligned.m64n" N "k32.f32.e4m3.e4m3"
#define TRANSPOSED ""
#else
constexpr int STEP = STEP_BYTES / 2;
#define TRANSPOSED ", 0, 0"
#define MULTIPLY(N) "wgmma.mma_async.sync.aligned.m64n" N "k16." HALF_TYPES
#endif

// ---- barriers, and copies that report to them ----

// Without a scope: what is ordered is the reading of shared memory by `multiply`, which has ended. A release at the
// cluster's scope would wait for all memory, once per step.
__device__ __forceinline__ void barrier_arrive(u32 barrier, u32 block) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(block)
      : "memory");
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Rows [row, row + 64) of x from number k on; to this block or, at the same place, to both.
__device__ __forceinline__ void load_rows(u32 to, const TensorMap& map, u32 barrier, int k, int row, bool both) {
  if (both) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to), "l"(&map), "r"(barrier), "r"(k), "r"(row), "h"(BOTH_BLOCKS)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
            "r"(to), "l"(&map), "r"(barrier), "r"(k), "r"(row)
        : "memory");
  }
}

// The weights' box at (k, 0, 0, 0, last), a part of a tile; to this block or to both.
__device__ __forceinline__ void load_weights(u32 to, const TensorMap& map, u32 barrier, int k, int last, bool both) {
  if (both) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4, %4, %4, %5}], [%2], %6;" ::"r"(to), "l"(&map), "r"(barrier), "r"(k), "r"(0), "r"(last),
        "h"(BOTH_BLOCKS)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %4, %4, %5}], [%2];" ::"r"(to), "l"(&map), "r"(barrier), "r"(k), "r"(0), "r"(last)
        : "memory");
  }
}

// ---- products ----

#define NAMES_128 \
  NAMES_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, " \
  "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, " \
  "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, " \
  "%122, %123, %124, %125, %126, %127"

// Adds 64 rows times WEIGHTS weights over 32 bytes of each to the sums.
template <int WEIGHTS>
__device__ __forceinline__ void multiply(float (&sums)[WEIGHTS / 2], u64 rows, u64 weights) {
  if constexpr (WEIGHTS == TILE_WEIGHTS) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n" MULTIPLY("256")
                 " {" NAMES_128 "}, %128, %129, add, 1, 1" TRANSPOSED ";\n}"
                 : LIST_64(sums, 0), LIST_64(sums, 64)
                 : "l"(rows), "l"(weights));
  } else {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n" MULTIPLY("128")
                 " {" NAMES_64 "}, %64, %65, add, 1, 1" TRANSPOSED ";\n}"
                 : LIST_64(sums, 0)
                 : "l"(rows), "l"(weights));
  }
}

// Waits until all products that were begun have ended: the sums are there.
__device__ __forceinline__ void wait_for(float (&sums)[TILE_WEIGHTS / 2]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" : LIST_64(sums, 0), LIST_64(sums, 64)::"memory");
}

__device__ __forceinline__ void wait_for(float (&sums)[TILE_WEIGHTS / 4]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" : LIST_64(sums, 0)::"memory");
}

// ---- numbers ----

__device__ __forceinline__ float2 from_halves(u32 halves) {
#if BFLOAT16
  return make_float2(__uint_as_float(halves << 16), __uint_as_float(halves & 0xFFFF0000u));
#else
  float2 numbers;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
      : "=f"(numbers.x), "=f"(numbers.y)
      : "r"(halves));
  return numbers;
#endif
}

// A divisor known before: the quotient is corrected by its remainder once (Markstein 1990) and then has the float8 of
// the exact one, if the divisor is a normal finite number.
struct Divisor {
  static constexpr float MOST = 1e4f;  // quotients beyond are no float8, rounded or not
  float value, inverse;

  __device__ explicit Divisor(float value) : value(value), inverse(__frcp_rn(value)) {}

  __device__ float divide(float number) const {
    const float quotient = fminf(fmaxf(number * inverse, -MOST), MOST);  // infinite remainders stay infinite
    return fmaf(fmaf(-quotient, value, number), inverse, quotient);
  }
};

// silu(gate) * up of two halves, in float32; the caller rounds once.
__device__ __forceinline__ float gated(u32 halves) {
  const float2 both = from_halves(halves);
  float quotient;
  asm("div.full.f32 %0, %1, %2;" : "=f"(quotient) : "f"(both.x), "f"(1.0f + __expf(-both.x)));
  return quotient * both.y;
}

// Stores a thread's outputs of one row, those of sums[first + 4 j + e], from the first output at `to` on.
template <int COUNT>
__device__ __forceinline__ void store_row(
    const float (&sums)[COUNT], int first, float scale, const Divisor& out_scale, char* to) {
#pragma unroll
  for (int part = 0; part < COUNT / (4 * RUN); part++) {
    u32 results[RUN / 2];
#pragma unroll
    for (int i = 0; i < RUN / 2; i++) {
      const int at = first + 4 * (part * RUN + 2 * i);
      results[i] = to_halves(gated(to_halves(sums[at] * scale, sums[at + 1] * scale)),
                             gated(to_halves(sums[at + 4] * scale, sums[at + 5] * scale)));
    }
#if OUT_FLOAT8
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float2 a = from_halves(results[2 * i]), b = from_halves(results[2 * i + 1]);
      results[i] = to_float8(out_scale.divide(a.x), out_scale.divide(a.y)) |
                   to_float8(out_scale.divide(b.x), out_scale.divide(b.y)) << 16;
    }
#endif
    *(uint4*)(to + part * 64) = make_uint4(results[0], results[1], results[2], results[3]);
  }
}

// ---- what the warpgroups do ----

// Where a warpgroup is in the ring of stages.
struct Ring {
  u32 stages, full, empty;  // full, empty: barriers of each
  u32 stage, phase;

  __device__ u32 rows() const { return stages + stage * STAGE_BYTES; }
  __device__ u32 weights() const { return rows() + ROW_TILE_BYTES; }

  __device__ void advance() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

__device__ __forceinline__ void load_tiles(const Params& params, const Pairs& pairs, Ring ring) {
  const int rank = cluster_rank();
  for (int turn = blockIdx.x / 2; turn < pairs.count; turn += gridDim.x / 2) {
    const Unit unit = pairs.unit(turn, rank);
#pragma unroll 1
    for (int k = 0; k < params.steps; k++) {
      const u32 barrier = ring.full + 8 * ring.stage;
      barrier_wait(ring.empty + 8 * ring.stage, ring.phase);
      barrier_expect(barrier, ROW_TILE_BYTES + (unit.is_half ? WEIGHT_TILE_BYTES / 2 : WEIGHT_TILE_BYTES));
#pragma unroll
      for (int part = 0; part < 2; part++) {
        if (unit.is_wide && part != rank) continue;
        const u32 to = ring.rows() + part * (ROW_TILE_BYTES / 2);
        load_rows(to, params.x_map, barrier, k * STEP, unit.row + part * 64, unit.is_wide);
      }
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        if (!unit.is_wide && part % 2 != rank) continue;  // the other block's
        if (unit.is_half && part / (PARTS / 2) != unit.half) continue;
        const u32 to = ring.weights() + (unit.is_half ? part % (PARTS / 2) : part) * (WEIGHT_TILE_BYTES / PARTS);
        load_weights(to, params.w_map, barrier, k * STEP, unit.tile * PARTS + part, !unit.is_wide);
      }
      ring.advance();
    }
  }
}

// A warpgroup's rows of a unit with WEIGHTS weight rows: all of its tile, or half.
template <int WEIGHTS>
__device__ __forceinline__ void multiply_unit(
    const Params& params, const Unit& unit, const Divisor& out_scale, Ring& ring) {
  const int thread = threadIdx.x % 128, warpgroup = threadIdx.x / 128 - 1;
  constexpr int OUT_BYTES = OUT_FLOAT8 ? 1 : 2;
  float sums[WEIGHTS / 2];
  u32 before = 0;
#pragma unroll
  for (int i = 0; i < WEIGHTS / 2; i++) sums[i] = 0.0f;  // here, or compilers before CUDA 12.9 serialize the products
#pragma unroll 1
  for (int k = 0; k < params.steps; k++) {
    const u64 a = matrix_at(ring.rows() + warpgroup * (ROW_TILE_BYTES / 2)), b = matrix_at(ring.weights());
    barrier_wait(ring.full + 8 * ring.stage, ring.phase);
    products_begin();
#pragma unroll
    for (int part = 0; part < 4; part++) multiply<WEIGHTS>(sums, a + 2 * part, b + 2 * part);
    products_issued();
    if (k > 0) {  // this step's products run while the stage of those before is given back
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      if (thread < 2) barrier_arrive(ring.empty + 8 * before, thread);
    }
    before = ring.stage;
    ring.advance();
  }
  wait_for(sums);
  if (thread < 2) barrier_arrive(ring.empty + 8 * before, thread);
  if (unit.tile >= params.tiles) return;
#pragma unroll
  for (int below = 0; below < 2; below++) {
    const int row = unit.row + warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4 + 8 * below;
    if (row >= params.rows) continue;
    const float scale = FLOAT8 ? *params.w_scale * params.x_scale[row * params.x_scale_step] : 1.0f;
    const int output = unit.tile * OUTPUTS + unit.half * (OUTPUTS / 2) + thread % 4 * RUN;
    char* to = params.out + OUT_BYTES * ((i64)row * (params.tiles * OUTPUTS) + output);
    store_row(sums, 2 * below, scale, out_scale, to);
  }
  __syncwarp();  // rows beyond the last left the loop before
}

__device__ __forceinline__ void multiply_tiles(const Params& params, const Pairs& pairs, Ring ring) {
  const Divisor out_scale(OUT_FLOAT8 ? *params.out_scale : 1.0f);
  for (int turn = blockIdx.x / 2; turn < pairs.count; turn += gridDim.x / 2) {
    const Unit unit = pairs.unit(turn, cluster_rank());
    if (unit.is_half) {
      multiply_unit<TILE_WEIGHTS / 2>(params, unit, out_scale, ring);
    } else {
      multiply_unit<TILE_WEIGHTS>(params, unit, out_scale, ring);
    }
  }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    gated_product(const __grid_constant__ Params params) {
  extern __shared__ char memory[];
  const u32 stages = tiles_in(memory), full = stages + STAGES * STAGE_BYTES, empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, 4);  // two warpgroups of either block
    }
    barriers_made();
  }
  __syncthreads();
  cluster_sync();
  const Pairs pairs(params.rows, params.tiles, params.halved);
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) load_tiles(params, pairs, Ring{stages, full, empty, 0, 1});
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    multiply_tiles(params, pairs, Ring{stages, full, empty, 0, 0});
  }
  __syncwarp();
  cluster_sync();  // a block's shared memory is written and signalled by the other until both are done
}
