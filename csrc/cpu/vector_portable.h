// Four float32 lanes by the vector types of GCC and Clang: any processor. The same names exist in
// vector_avx512.h and vector_avx2.h.
#pragma once
#include <cstdint>
#include <cstring>

namespace whp::portable {

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));

struct Vec {
  static constexpr int width = 4;
  Floats lanes;
};
struct Mask {
  Ints bits;
};

inline Vec fill(float x) { return {Floats{x, x, x, x}}; }
inline Vec load(const float* p) {
  Vec a;
  std::memcpy(&a.lanes, p, sizeof(a.lanes));
  return a;
}
inline void store(float* p, Vec a) { std::memcpy(p, &a.lanes, sizeof(a.lanes)); }

inline Vec operator+(Vec a, Vec b) { return {a.lanes + b.lanes}; }
inline Vec operator-(Vec a, Vec b) { return {a.lanes - b.lanes}; }
inline Vec operator*(Vec a, Vec b) { return {a.lanes * b.lanes}; }
inline Vec operator/(Vec a, Vec b) { return {a.lanes / b.lanes}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.lanes * b.lanes + c.lanes}; }  // two roundings

// a if a > b, else b: a NaN in either gives b
inline Vec larger(Vec a, Vec b) { return {a.lanes > b.lanes ? a.lanes : b.lanes}; }
inline Vec absolute(Vec a) {
  return {reinterpret_cast<Floats>(reinterpret_cast<Ints>(a.lanes) & 0x7fffffff)};
}
inline Vec with_sign_of(Vec a, Vec b) {  // |a| with the sign of b
  const Ints sign = reinterpret_cast<Ints>(fill(-0.0f).lanes);
  return {reinterpret_cast<Floats>((reinterpret_cast<Ints>(a.lanes) & ~sign) |
                                   (reinterpret_cast<Ints>(b.lanes) & sign))};
}

inline Mask operator|(Mask a, Mask b) { return {a.bits | b.bits}; }
inline Mask none() { return {Ints{0, 0, 0, 0}}; }
inline bool any(Mask m) { return (m.bits[0] | m.bits[1] | m.bits[2] | m.bits[3]) != 0; }
inline int first(Mask m) { return m.bits[0] ? 0 : m.bits[1] ? 1 : m.bits[2] ? 2 : 3; }
inline Mask equal(Vec a, Vec b) { return {a.lanes == b.lanes}; }
inline Mask unequal(Vec a, Vec b) { return {a.lanes != b.lanes}; }  // or NaN
inline Mask at_least(Vec a, Vec b) { return {a.lanes >= b.lanes}; }
inline Mask either_nan(Vec a, Vec b) { return {(a.lanes != a.lanes) | (b.lanes != b.lanes)}; }
inline Mask below(Vec a, Vec b) { return {a.lanes < b.lanes}; }
inline Vec where(Mask m, Vec a, Vec b) { return {m.bits ? a.lanes : b.lanes}; }
inline Vec where(Mask m, Vec a) {
  return {reinterpret_cast<Floats>(m.bits & reinterpret_cast<Ints>(a.lanes))};
}
inline Vec product_unless(Mask m, Vec a, Vec b) { return where(Mask{~m.bits}, a * b); }  // a * b, 0 where m

// the float32 whose exponent field is the lowest 8 bits of a's representation
inline Vec low_bits_as_exponent(Vec a) {
  return {reinterpret_cast<Floats>(reinterpret_cast<Ints>(a.lanes) << 23)};
}
// a = result * 2^exponent with the result between 2/3 and 4/3, for normal a > 0
inline Vec split_exponent(Vec a, Vec* exponent) {
  const Ints bits = reinterpret_cast<Ints>(a.lanes);
  const Ints power = (bits - 0x3f2aaaab) >> 23;
  exponent->lanes = __builtin_convertvector(power, Floats);
  return {reinterpret_cast<Floats>(bits - (power << 23))};
}

inline float largest(Vec a) {
  const float x = a.lanes[0] > a.lanes[1] ? a.lanes[0] : a.lanes[1];
  const float y = a.lanes[2] > a.lanes[3] ? a.lanes[2] : a.lanes[3];
  return x > y ? x : y;
}
inline double total(Vec a) {
  return (double(a.lanes[0]) + double(a.lanes[1])) + (double(a.lanes[2]) + double(a.lanes[3]));
}

inline Vec load_bfloat16(const uint16_t* p) {
  const Ints bits{p[0] << 16, p[1] << 16, p[2] << 16, p[3] << 16};
  return {reinterpret_cast<Floats>(bits)};
}
inline void store_bfloat16(uint16_t* p, Vec a) {  // to nearest even
  const Ints bits = reinterpret_cast<Ints>(a.lanes);
  const Ints rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Ints nan = a.lanes != a.lanes;
  const Ints result = (nan & 0x7fc00000) | (~nan & rounded);
  for (int k = 0; k < 4; ++k) p[k] = static_cast<uint16_t>(static_cast<uint32_t>(result[k]) >> 16);
}

// Between float16 and float32 by a multiplication with 2^112, which shifts the exponent and makes denormals
// normal.
inline float from_float16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16, rest = half & 0x7fffu;
  uint32_t bits = rest << 13;
  if (rest >= 0x7c00u) {  // infinity and NaN
    bits |= 0x7f800000u;
  } else {
    float value;
    std::memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline uint16_t to_float16(float value) {  // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t(bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // from 65520 on: infinity
  if (bits < 0x38800000u) {                        // denormal: adding 0.5 rounds to multiples of 2^-24
    float shifted;
    std::memcpy(&shifted, &bits, 4);
    shifted += 0.5f;
    std::memcpy(&bits, &shifted, 4);
    return sign | uint16_t(bits - 0x3f000000u);
  }
  return sign | uint16_t((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13);
}
inline Vec load_float16(const uint16_t* p) {
  return {Floats{from_float16(p[0]), from_float16(p[1]), from_float16(p[2]), from_float16(p[3])}};
}
inline void store_float16(uint16_t* p, Vec a) {
  for (int k = 0; k < 4; ++k) p[k] = to_float16(a.lanes[k]);
}

}  // namespace whp::portable
