// Shared pieces of Lamella's CPU kernels: scalar types, native-width vectors, conversions, thread-owned scratch memory.
//
// Everything is written with GCC/Clang vector extensions and compiled with -march=native, so that one source serves
// SSE2, AVX2, AVX-512 and NEON. A vector is as wide as the widest register of the target; a panel row of 16 columns
// is NV vectors. Arithmetic is float32 in an order that depends only on the operand shapes along the reduced axis.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#define LAMELLA_API extern "C" __attribute__((visibility("default")))
#define LAMELLA_INLINE inline __attribute__((always_inline))

namespace lamella {

using i64 = std::int64_t;

// Storage types; the values cross the C ABI.
enum DType : std::int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };
struct bf16 { std::uint16_t bits; };
struct f16 { std::uint16_t bits; };

#if defined(__AVX512F__)
constexpr int VW = 16;  // float32 lanes of one register
#elif defined(__AVX__)
constexpr int VW = 8;
#else
constexpr int VW = 4;
#endif
constexpr int PANEL = 16;         // columns of one packed panel
constexpr int NV = PANEL / VW;    // vectors of one panel row

typedef float vf __attribute__((vector_size(VW * 4)));
typedef float vf_u __attribute__((vector_size(VW * 4), aligned(4), may_alias));
typedef std::uint32_t vu32 __attribute__((vector_size(VW * 4)));
typedef std::int32_t vi32 __attribute__((vector_size(VW * 4)));
typedef std::uint16_t vu16 __attribute__((vector_size(VW * 2)));
typedef std::uint16_t vu16_u __attribute__((vector_size(VW * 2), aligned(2), may_alias));

LAMELLA_INLINE vf splat(float x) { return x - vf{}; }

// a * b + c, rounded once where the processor has such an instruction. Fused multiply-adds are written with this and
// nothing else is fused (-ffp-contract=off): left to itself the compiler may fuse in one instance of a template and not
// in another, and a row's bits would depend on the tile that computes it.
LAMELLA_INLINE vf madd(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<vf>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#elif defined(__aarch64__)
  return reinterpret_cast<vf>(vfmaq_f32(reinterpret_cast<float32x4_t>(c), reinterpret_cast<float32x4_t>(a),
                                        reinterpret_cast<float32x4_t>(b)));
#else
  return a * b + c;
#endif
}

// ---- scalar conversions ------------------------------------------------------------------------------------------

LAMELLA_INLINE float from_bits(std::uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
LAMELLA_INLINE std::uint32_t to_bits(float f) { std::uint32_t u; std::memcpy(&u, &f, 4); return u; }

LAMELLA_INLINE float to_float(float v) { return v; }
LAMELLA_INLINE float to_float(bf16 v) { return from_bits(std::uint32_t(v.bits) << 16); }
LAMELLA_INLINE float to_float(f16 v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#elif defined(__aarch64__)
  __fp16 h; std::memcpy(&h, &v.bits, 2); return float(h);
#else
  const std::uint32_t sign = std::uint32_t(v.bits & 0x8000) << 16, mag = v.bits & 0x7fff;
  if (mag >= 0x7c00) return from_bits(sign | 0x7f800000u | ((mag & 0x3ff) << 13));
  return from_bits(sign | to_bits(from_bits(mag << 13) * from_bits(0x77800000u)));  // times 2^112; exact for subnormals
#endif
}

template <typename T> LAMELLA_INLINE T from_float(float f);
template <> LAMELLA_INLINE float from_float<float>(float f) { return f; }
template <> LAMELLA_INLINE bf16 from_float<bf16>(float f) {  // round to nearest, ties to even; NaN stays quiet NaN
  const std::uint32_t u = to_bits(f);
  const std::uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return bf16{std::uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}
template <> LAMELLA_INLINE f16 from_float<f16>(float f) {
#if defined(__F16C__)
  return f16{std::uint16_t(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT))};
#elif defined(__aarch64__)
  __fp16 h = __fp16(f); f16 r; std::memcpy(&r.bits, &h, 2); return r;
#else
  const std::uint32_t u = to_bits(f), sign = (u >> 16) & 0x8000, mag = u & 0x7fffffff;
  if (mag > 0x7f800000) return f16{std::uint16_t(sign | 0x7e00)};
  if (mag >= 0x477ff000) return f16{std::uint16_t(sign | 0x7c00)};  // 65520 and more round to infinity
  if (mag < 0x38800000) {                                           // subnormal half: let the adder round
    const float shifted = from_bits(mag) + 0.5f;
    return f16{std::uint16_t(sign | (to_bits(shifted) - to_bits(0.5f)))};
  }
  return f16{std::uint16_t(sign | ((mag - 0x38000000 + 0xfff + ((mag >> 13) & 1)) >> 13))};
#endif
}

// ---- vector loads and stores (any alignment) -----------------------------------------------------------------------

LAMELLA_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_u*>(p); }
LAMELLA_INLINE vf load(const bf16* p) {  // compilers turn the portable form into shuffles through half registers
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
#elif defined(__AVX2__)
  return reinterpret_cast<vf>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
#elif defined(__aarch64__)
  return reinterpret_cast<vf>(vshll_n_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(p)), 16));
#else
  const vu16 raw = *reinterpret_cast<const vu16_u*>(p);
  return reinterpret_cast<vf>(__builtin_convertvector(raw, vu32) << 16);
#endif
}
LAMELLA_INLINE vf load(const f16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX__) && defined(__F16C__)
  return reinterpret_cast<vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__aarch64__)
  return vcvt_f32_f16(vld1_f16(reinterpret_cast<const __fp16*>(p)));
#else
  vf out;
  for (int i = 0; i < VW; ++i) out[i] = to_float(p[i]);
  return out;
#endif
}

LAMELLA_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_u*>(p) = v; }
LAMELLA_INLINE void store(bf16* p, vf v) {
  const vu32 u = reinterpret_cast<vu32>(v);
  const vu32 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const vu32 nan = vu32{} + 0x7fc0;
  const vu32 kept = (v != v) ? nan : rounded;
  *reinterpret_cast<vu16_u*>(p) = __builtin_convertvector(kept, vu16);
}
LAMELLA_INLINE void store(f16* p, vf v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX__) && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < VW; ++i) p[i] = from_float<f16>(v[i]);
#endif
}

// Finite numbers as bfloat16 holds them: rounded to nearest, ties to even.
LAMELLA_INLINE vf round_bf16(vf v) {
  const vu32 u = reinterpret_cast<vu32>(v);
  return reinterpret_cast<vf>((u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u);
}

// ---- scratch memory ------------------------------------------------------------------------------------------------

// A growing buffer owned by one thread; reused between calls and freed when the thread ends.
class Scratch {
 public:
  float* floats(std::size_t count) {
    if (count > capacity_) {
      std::free(data_);
      const std::size_t bytes = (count * sizeof(float) + 4095) / 4096 * 4096;
      data_ = static_cast<float*>(std::aligned_alloc(4096, bytes));
      capacity_ = data_ ? bytes / sizeof(float) : 0;
    }
    return data_;  // null when memory is exhausted
  }
  ~Scratch() { std::free(data_); }

 private:
  float* data_ = nullptr;
  std::size_t capacity_ = 0;
};

// Status of a native call: the Python side turns it into an exception.
enum Status : std::int32_t { kOk = 0, kNoMemory = 1, kBadDType = 2, kBadShape = 3 };

}  // namespace lamella
