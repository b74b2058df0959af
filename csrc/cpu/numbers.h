// Vectors of the accumulation type, and the 16-bit formats read into and written from it.
//
// Everything here has internal linkage: it is compiled once per instruction set, and the linker must not mix them.
// REFINEDET_VECTOR_BYTES is the width of a register, set by the file that includes this.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/align_conv.h"

namespace refinedet {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename T>
struct Simd {
  static constexpr int kWidth = REFINEDET_VECTOR_BYTES / sizeof(T);
  typedef T Vector __attribute__((vector_size(REFINEDET_VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(REFINEDET_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float load(const float* from) { return *from; }
inline double load(const double* from) { return *from; }
inline float load(const BFloat16* from) { return as_float(uint32_t(from->bits) << 16); }
inline float load(const Half* from) {
  // Exponent and mantissa moved into place and rebiased by a multiplication, which gets subnormals right too.
  const uint32_t magnitude = uint32_t(from->bits & 0x7fff) << 13;
  uint32_t bits = as_bits(as_float(magnitude) * as_float(0x77800000u));
  if (magnitude >= 0x0f800000u) bits |= 0x7f800000u;  // infinity, NaN
  return as_float(bits | uint32_t(from->bits & 0x8000) << 16);
}

inline void store(float* to, float value) { *to = value; }
inline void store(double* to, double value) { *to = value; }
inline void store(BFloat16* to, float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  to->bits = static_cast<uint16_t>(value == value ? rounded : (bits >> 16) | 0x40);
}
inline void store(Half* to, float value) {
  const uint32_t bits = as_bits(value), sign = (bits >> 16) & 0x8000;
  const float magnitude = as_float(bits & 0x7fffffff);
  uint32_t result;
  if (!(magnitude == magnitude)) {
    result = 0x7e00;
  } else if (magnitude >= 65520.0f) {
    result = 0x7c00;
  } else if (magnitude < as_float(0x38800000u)) {
    result = as_bits(magnitude + 0.5f) - as_bits(0.5f);  // subnormal: the addition rounds at 2^-24
  } else {
    const uint32_t raw = as_bits(magnitude);
    result = (raw - 0x38000000u + 0xfff + ((raw >> 13) & 1)) >> 13;
  }
  to->bits = static_cast<uint16_t>(result | sign);
}

template <typename T>
inline typename Simd<T>::Vector load_vector(const T* from) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(from);
}

typedef uint16_t HalfWords
    __attribute__((vector_size(REFINEDET_VECTOR_BYTES / 2), aligned(sizeof(uint16_t)), may_alias));
typedef uint32_t Words __attribute__((vector_size(REFINEDET_VECTOR_BYTES)));

template <typename T>
inline typename Simd<T>::Vector load_vector(const BFloat16* from) {
  const Words words = __builtin_convertvector(*reinterpret_cast<const HalfWords*>(from), Words) << 16;
  return reinterpret_cast<typename Simd<T>::Vector>(words);
}

template <typename T>
inline typename Simd<T>::Vector load_vector(const Half* from) {
  const Words words = __builtin_convertvector(*reinterpret_cast<const HalfWords*>(from), Words);
  const Words magnitude = (words & 0x7fff) << 13;
  Words bits = reinterpret_cast<Words>(reinterpret_cast<typename Simd<T>::Vector>(magnitude) * as_float(0x77800000u));
  bits |= reinterpret_cast<Words>(magnitude >= 0x0f800000u) & 0x7f800000u;
  return reinterpret_cast<typename Simd<T>::Vector>(bits | (words & 0x8000) << 16);
}

template <typename T>
inline void store_vector(T* to, typename Simd<T>::Vector value) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(to) = value;
}

}  // namespace
}  // namespace refinedet
