// What the kernels for Hopper have in common: barriers in shared memory, which copies report to, products, numbers.
//
// Macro: BFLOAT16 (of halves, else float16).

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct __align__(64) TensorMap {
  u64 opaque[16];
};

constexpr u32 SWIZZLE_BYTES = 1024;  // after so many the pattern repeats in which a copy swizzles rows of 128 bytes

// Where tiles may begin in shared memory: at `memory` or shortly after.
__device__ __forceinline__ u32 tiles_in(const char* memory) {
  return ((u32)__cvta_generic_to_shared(memory) + SWIZZLE_BYTES - 1) / SWIZZLE_BYTES * SWIZZLE_BYTES;
}

// ---- barriers ----

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// To be followed by a synchronization of all threads that use the barriers.
__device__ __forceinline__ void barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

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

// ---- products ----

#if BFLOAT16
#define HALF_TYPES "f32.bf16.bf16"
#else
#define HALF_TYPES "f32.f16.f16"
#endif

// Where a matrix of rows of 128 bytes, swizzled by the copy, begins: groups of eight rows follow each other. The next
// columns, of a matrix that has more of them and is read by columns, are `further` bytes from these.
__device__ __forceinline__ u64 matrix_at(u32 address, u32 further = 16) {
  return (u64)(address >> 4) | (u64)(further >> 4) << 16 | (u64)(SWIZZLE_BYTES >> 4) << 32 | (u64)1 << 62;
}

// So many registers of a product: as operands, and their names in its text.
#define LIST_8(x, i) \
  "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), \
      "+f"(x[i + 7])
#define LIST_32(x, i) LIST_8(x, i), LIST_8(x, i + 8), LIST_8(x, i + 16), LIST_8(x, i + 24)
#define LIST_64(x, i) LIST_32(x, i), LIST_32(x, i + 32)
#define NAMES_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64 \
  NAMES_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_issued() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

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

// Two numbers rounded to float8, the first in the low byte.
__device__ __forceinline__ u32 to_float8(float low, float high) {
  u16 codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
}
