// Functions across and along the lanes of a register: sums in a fixed tree, maximum, exponential, hyperbolic tangent.
#pragma once

#include <utility>

#include "common.h"

namespace lamella {

// Largest whole number <= x, per lane, for |x| < 2^31.
LAMELLA_INLINE vf vfloor(vf x) {
  vf whole = __builtin_convertvector(__builtin_convertvector(x, vi32), vf);
  return whole - (whole > x ? splat(1.0f) : vf{});
}

LAMELLA_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }

// Sum of the lanes, in a fixed tree.
LAMELLA_INLINE float hsum(vf v) {
  float lane[VW];
  store(lane, v);
  for (int width = VW / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

LAMELLA_INLINE float hmax(vf v) {
  float best = v[0];
  for (int i = 1; i < VW; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// e^x per lane, relative error below 2e-7 for -87 < x < 88; below -87.3 the result is 0.
// Method: x = n ln2 + r, |r| <= ln2/2, degree-6 polynomial for e^r (Cephes expf coefficients), scaled by 2^n.
LAMELLA_INLINE vf vexp(vf x) {
  const vf lowest = splat(-87.3f), highest = splat(88.3f);
  const vi32 flushed = x < lowest;
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  const vf n = vfloor(x * splat(1.44269504088896341f) + splat(0.5f));
  const vf r = madd(n, splat(2.12194440e-4f), madd(n, splat(-0.693359375f), x));
  vf p = splat(1.9875691500e-4f);
  p = madd(p, r, splat(1.3981999507e-3f));
  p = madd(p, r, splat(8.3334519073e-3f));
  p = madd(p, r, splat(4.1665795894e-2f));
  p = madd(p, r, splat(1.6666665459e-1f));
  p = madd(p, r, splat(5.0000001201e-1f));
  p = madd(p, r * r, r) + splat(1.0f);
  const vi32 exponent = (__builtin_convertvector(n, vi32) + 127) << 23;
  return flushed ? vf{} : p * reinterpret_cast<vf>(exponent);
}

template <int... I>
LAMELLA_INLINE vf shuffle2(vf a, vf b, std::integer_sequence<int, I...>, int) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, vi32{I...});
#endif
}
template <int S, bool HIGH, int... J>
LAMELLA_INLINE vf pick(vf a, vf b, std::integer_sequence<int, J...>) {
  return shuffle2(a, b, std::integer_sequence<int, ((J & S) ? VW : 0) + (J & ~S) + (HIGH ? S : 0)...>{}, 0);
}

// Lane j of the result is the sum of the lanes of v[j], in a fixed tree.
template <int S = 1, int COUNT = VW>
LAMELLA_INLINE vf sum_lanes(const vf* v) {
  constexpr auto lanes = std::make_integer_sequence<int, VW>{};
  if constexpr (COUNT == 1) {
    return v[0];
  } else {
    vf half[COUNT / 2];
#pragma GCC unroll 16
    for (int i = 0; i < COUNT / 2; ++i)
      half[i] = pick<S, false>(v[2 * i], v[2 * i + 1], lanes) + pick<S, true>(v[2 * i], v[2 * i + 1], lanes);
    return sum_lanes<S * 2, COUNT / 2>(half);
  }
}

// tanh per lane (Cephes tanhf): odd polynomial near zero, 1 - 2 / (e^2x + 1) elsewhere.
LAMELLA_INLINE vf vtanh(vf x) {
  const vf z = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = madd(p, z, splat(2.06390887954e-2f));
  p = madd(p, z, splat(-5.37397155531e-2f));
  p = madd(p, z, splat(1.33314422036e-1f));
  p = madd(p, z, splat(-3.33332819422e-1f));
  const vf magnitude = x < vf{} ? -x : x;
  const vf far = splat(1.0f) - splat(2.0f) / (vexp(magnitude + magnitude) + splat(1.0f));
  return magnitude < splat(0.625f) ? x + x * z * p : (x < vf{} ? -far : far);
}

}  // namespace lamella
