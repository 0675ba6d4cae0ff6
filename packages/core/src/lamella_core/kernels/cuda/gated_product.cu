// silu(gate) * up of x [M, K] times w [2 F, K] transposed, the weight rows being [gate, up]: [M, F], on Hopper.
//
// A block has three warpgroups. The first one's thread 0 brings tiles of x [128, 128 bytes] and w [256, 128 bytes] to
// shared memory with the tensor memory accelerator, four steps ahead; the other two multiply 64 rows each with all 256
// weight rows, and store what the gate makes of the sums. Two blocks form a cluster and share what both need, so that
// the L2 cache sends it once: two tiles of rows and one of weights (a tall pair), or for the last 128 rows one of rows
// and two of weights (a wide pair). Blocks stay and take pairs in turn; the next pair's tiles arrive while this one's
// results are stored.
//
// A tile of weights has 128 rows of gate and the same of up. A thread has the sums of one row of x with the tile's rows
// 8 j + 2 (lane % 4) + e, j < 32 and e < 2. The weights' map, a box (128 bytes, 2, 4, RUN, 1) over strides of
// (1 number; F, RUN, 1, 4 * RUN rows), brings gate and up of one output to the same j, and outputs of 16 bytes side by
// side to neighbouring j: a thread stores 16 bytes at a time, and four threads 64.
//
// Macros: FLOAT8 (of x and w, else halves); BFLOAT16 (of halves, else float16); OUT_FLOAT8 (the result is divided by a
// scale and stored as float8, else as halves).
// Sources: PTX ISA, "Asynchronous warpgroup-level matrix instructions", "Tensor data movement", "mbarrier".

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct __align__(64) TensorMap {
  u64 opaque[16];
};

struct Params {
  TensorMap x_map, w_map;
  char* out;
  const float *x_scale, *w_scale, *out_scale;
  int rows, tiles, steps, x_scale_step;  // step: 0 for one scale of all rows, 1 for each row's
};

constexpr int BLOCK_ROWS = 128, TILE_WEIGHTS = 256, STEP_BYTES = 128, STAGES = 4;
constexpr int GROUP = 8;  // tall pairs that share weights take turns first, so that these stay in the L2 cache
constexpr u32 ROW_TILE_BYTES = BLOCK_ROWS * STEP_BYTES, WEIGHT_TILE_BYTES = TILE_WEIGHTS * STEP_BYTES;
constexpr u32 STAGE_BYTES = ROW_TILE_BYTES + WEIGHT_TILE_BYTES, SWIZZLE_BYTES = 1024;
constexpr u16 BOTH_BLOCKS = 3;
constexpr int SUMS = 128;  // of a thread
constexpr int RUN = OUT_FLOAT8 ? 16 : 8, OUTPUTS = TILE_WEIGHTS / 2;  // of a thread side by side; of a tile
constexpr int PARTS = OUTPUTS / (4 * RUN);                            // of a tile of weights, one box each

#if FLOAT8
constexpr int STEP = STEP_BYTES;  // numbers
#define MULTIPLY "wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3"
#define TRANSPOSED ""
#else
constexpr int STEP = STEP_BYTES / 2;
#define TRANSPOSED ", 0, 0"
#if BFLOAT16
#define MULTIPLY "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16"
#else
#define MULTIPLY "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16"
#endif
#endif

// ---- barriers in shared memory, and copies that report to them ----

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

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

// Where a matrix of rows of 128 bytes, swizzled by the copy, begins: groups of eight rows follow each other.
__device__ __forceinline__ u64 matrix_at(u32 address) {
  return (u64)(address >> 4) | (u64)1 << 16 | (u64)(SWIZZLE_BYTES >> 4) << 32 | (u64)1 << 62;
}

#define SUMS_8(i) \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
      "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define SUMS_64(i) \
  SUMS_8(i), SUMS_8(i + 8), SUMS_8(i + 16), SUMS_8(i + 24), SUMS_8(i + 32), SUMS_8(i + 40), SUMS_8(i + 48), \
      SUMS_8(i + 56)

// Adds 64 rows times 256 weights over 32 bytes of each to the sums.
__device__ __forceinline__ void multiply(float (&sums)[SUMS], u64 rows, u64 weights) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n" MULTIPLY
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
      "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, "
      "%45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, "
      "%67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, "
      "%89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, "
      "%109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "
      "%127}, %128, %129, add, 1, 1" TRANSPOSED ";\n}"
      : SUMS_64(0), SUMS_64(64)
      : "l"(rows), "l"(weights));
}

// ---- numbers ----

// Two numbers rounded to halves, the first in the low half.
__device__ __forceinline__ u32 to_halves(float low, float high) {
  u32 halves;
#if BFLOAT16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(high), "f"(low));
#endif
  return halves;
}

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

__device__ __forceinline__ u32 to_float8(float a, float b, float c, float d) {
  u16 low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return (u32)low | (u32)high << 16;
}

// A divisor known before: the quotient is corrected by its remainder once (Markstein 1990) and then has the float8 of the
// exact one, if the divisor is a normal finite number.
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

// Stores a thread's outputs of one row, those of sums[first + 4 j + e], from the tile's output 0 at `to` on.
__device__ __forceinline__ void store_row(
    const float (&sums)[SUMS], int first, float scale, const Divisor& out_scale, char* to) {
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
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
      results[i] = to_float8(out_scale.divide(a.x), out_scale.divide(a.y), out_scale.divide(b.x), out_scale.divide(b.y));
    }
#endif
    *(uint4*)(to + part * 64) = make_uint4(results[0], results[1], results[2], results[3]);
  }
}

// ---- what the warpgroups do ----

// The pairs of tiles of a product in the order in which they are computed.
struct Pairs {
  int rows, tiles;  // of x; of w
  int tall, count;

  __device__ Pairs(int rows, int tiles) : rows(rows), tiles(tiles) {
    const int left = rows % (2 * BLOCK_ROWS);
    tall = rows / (2 * BLOCK_ROWS) + (left > BLOCK_ROWS);
    count = tall * tiles + (left > 0 && left <= BLOCK_ROWS ? (tiles + 1) / 2 : 0);
  }

  __device__ bool is_wide(int pair) const { return pair >= tall * tiles; }

  // The first row and the tile of weights of one block of a pair.
  __device__ int2 place(int pair, int rank) const {
    if (is_wide(pair)) return make_int2(tall * 2 * BLOCK_ROWS, 2 * (pair - tall * tiles) + rank);
    const int first = pair / (GROUP * tiles) * GROUP, inside = pair % (GROUP * tiles);
    const int size = min(GROUP, tall - first);
    return make_int2((2 * (first + inside % size) + rank) * BLOCK_ROWS, inside / size);
  }
};

__device__ __forceinline__ void load_tiles(
    const Params& params, const Pairs& pairs, u32 stages, u32 full, u32 empty) {
  const int rank = cluster_rank();
  u32 stage = 0, phase = 1;
  for (int pair = blockIdx.x / 2; pair < pairs.count; pair += gridDim.x / 2) {
    const int2 place = pairs.place(pair, rank);
    const bool wide = pairs.is_wide(pair);
#pragma unroll 1
    for (int k = 0; k < params.steps; k++) {
      const u32 rows = stages + stage * STAGE_BYTES, weights = rows + ROW_TILE_BYTES, barrier = full + 8 * stage;
      barrier_wait(empty + 8 * stage, phase);
      barrier_expect(barrier, STAGE_BYTES);
#pragma unroll
      for (int part = 0; part < 2; part++) {
        if (wide && part != rank) continue;
        load_rows(rows + part * (ROW_TILE_BYTES / 2), params.x_map, barrier, k * STEP, place.x + part * 64, wide);
      }
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        if (!wide && part / (PARTS / 2) != rank) continue;
        const u32 to = weights + part * (WEIGHT_TILE_BYTES / PARTS);
        load_weights(to, params.w_map, barrier, k * STEP, place.y * PARTS + part, !wide);
      }
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
  }
}

__device__ __forceinline__ void multiply_tiles(
    const Params& params, const Pairs& pairs, u32 stages, u32 full, u32 empty) {
  const int rank = cluster_rank(), thread = threadIdx.x % 128, warpgroup = threadIdx.x / 128 - 1;
  const int first_row = warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4;
  const Divisor out_scale(OUT_FLOAT8 ? *params.out_scale : 1.0f);
  constexpr int OUT_BYTES = OUT_FLOAT8 ? 1 : 2;
  float sums[SUMS];
  u32 stage = 0, phase = 0;
  for (int pair = blockIdx.x / 2; pair < pairs.count; pair += gridDim.x / 2) {
    u32 before = 0;
#pragma unroll
    for (int i = 0; i < SUMS; i++) sums[i] = 0.0f;  // defined here, or compilers before CUDA 12.9 serialize the products
#pragma unroll 1
    for (int k = 0; k < params.steps; k++) {
      const u32 rows = stages + stage * STAGE_BYTES + warpgroup * (ROW_TILE_BYTES / 2);
      const u64 a = matrix_at(rows), b = matrix_at(stages + stage * STAGE_BYTES + ROW_TILE_BYTES);
      barrier_wait(full + 8 * stage, phase);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int part = 0; part < 4; part++) multiply(sums, a + 2 * part, b + 2 * part);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      if (k > 0) {  // this step's products run while the stage of those before is given back
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (thread < 2) barrier_arrive(empty + 8 * before, thread);
      }
      before = stage;
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" : SUMS_64(0), SUMS_64(64)::"memory");
    if (thread < 2) barrier_arrive(empty + 8 * before, thread);
    const int2 place = pairs.place(pair, rank);
    if (place.y >= pairs.tiles) continue;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = place.x + first_row + 8 * half;
      if (row >= pairs.rows) continue;
      const float scale = FLOAT8 ? *params.w_scale * params.x_scale[row * params.x_scale_step] : 1.0f;
      const i64 output = (i64)row * (pairs.tiles * OUTPUTS) + place.y * OUTPUTS + thread % 4 * RUN;
      store_row(sums, 2 * half, scale, out_scale, params.out + OUT_BYTES * output);
    }
    __syncwarp();  // rows beyond the last left the loop before
  }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    gated_product(const __grid_constant__ Params params) {
  extern __shared__ char memory[];
  const u32 stages = ((u32)__cvta_generic_to_shared(memory) + SWIZZLE_BYTES - 1) / SWIZZLE_BYTES * SWIZZLE_BYTES;
  const u32 full = stages + STAGES * STAGE_BYTES, empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; stage++) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, 4);  // two warpgroups of either block
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  cluster_sync();
  const Pairs pairs(params.rows, params.tiles);
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) load_tiles(params, pairs, stages, full, empty);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    multiply_tiles(params, pairs, stages, full, empty);
  }
  __syncwarp();
  cluster_sync();  // a block's shared memory is written and signalled by the other until both are done
}
