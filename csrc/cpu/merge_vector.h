// Vectors of REFINEDET_VECTOR_BYTES for the merging kernels. Internal linkage, for the reason given there.
#pragma once

#include <cstdint>
#include <cstring>

namespace refinedet {
namespace {

constexpr int kWidth = REFINEDET_VECTOR_BYTES / sizeof(float);
typedef float Floats __attribute__((vector_size(REFINEDET_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(REFINEDET_VECTOR_BYTES)));
typedef float Unaligned __attribute__((vector_size(REFINEDET_VECTOR_BYTES), aligned(sizeof(float)), may_alias));

inline Floats load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Floats value) { *reinterpret_cast<Unaligned*>(to) = value; }
inline Floats fill(float value) { return Floats{} + value; }

inline Ints lanes() {
  Ints result{};
  for (int lane = 0; lane < kWidth; ++lane) result[lane] = lane;
  return result;
}

#ifdef REFINEDET_X86_TARGETS
#if REFINEDET_VECTOR_BYTES == 32
inline float largest(Floats v) {
  v = __builtin_ia32_maxps256(v, __builtin_shuffle(v, Ints{4, 5, 6, 7, 0, 1, 2, 3}));
  v = __builtin_ia32_maxps256(v, __builtin_shuffle(v, Ints{2, 3, 0, 1, 6, 7, 4, 5}));
  return __builtin_ia32_maxps256(v, __builtin_shuffle(v, Ints{1, 0, 3, 2, 5, 4, 7, 6}))[0];
}
inline Floats vmin(Floats a, Floats b) { return __builtin_ia32_minps256(a, b); }
inline Floats vmax(Floats a, Floats b) { return __builtin_ia32_maxps256(a, b); }
inline unsigned signs(Ints mask) { return __builtin_ia32_movmskps256(reinterpret_cast<Floats>(mask)); }
#else
inline float largest(Floats v) {
  v = __builtin_ia32_maxps(v, __builtin_shuffle(v, Ints{2, 3, 0, 1}));
  return __builtin_ia32_maxps(v, __builtin_shuffle(v, Ints{1, 0, 3, 2}))[0];
}
inline Floats vmin(Floats a, Floats b) { return __builtin_ia32_minps(a, b); }
inline Floats vmax(Floats a, Floats b) { return __builtin_ia32_maxps(a, b); }
inline unsigned signs(Ints mask) { return __builtin_ia32_movmskps(reinterpret_cast<Floats>(mask)); }
#endif
#else
inline float largest(Floats values) {
  float result = values[0];
  for (int lane = 1; lane < kWidth; ++lane) result = values[lane] > result ? values[lane] : result;
  return result;
}
inline Floats vmin(Floats a, Floats b) { return a < b ? a : b; }
inline Floats vmax(Floats a, Floats b) { return a > b ? a : b; }
inline unsigned signs(Ints mask) {
  unsigned bits = 0;
  for (int lane = 0; lane < kWidth; ++lane) bits |= static_cast<unsigned>(mask[lane] < 0) << lane;
  return bits;
}
#endif

// exp(-x) for x >= 0, to two units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes).
inline Floats exp_negative(Floats x) {
  const Floats y = -vmin(x, fill(87.0f));
  const Ints n = __builtin_convertvector(y * 1.44269504f - 0.5f, Ints);  // truncation rounds, as y is not positive
  const Floats whole = __builtin_convertvector(n, Floats);
  const Floats r = y - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * reinterpret_cast<Floats>((n + 127) << 23);
}

}  // namespace
}  // namespace refinedet
