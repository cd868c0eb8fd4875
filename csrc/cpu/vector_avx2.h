// Eight float32 lanes: AVX2, FMA and F16C. The same names exist in vector_avx512.h and vector_portable.h.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace whp::avx2 {

struct Vec {
  static constexpr int width = 8;
  __m256 lanes;
};
struct Mask {
  __m256 bits;
};

inline Vec fill(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.lanes); }

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.lanes, b.lanes)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.lanes, b.lanes)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.lanes, b.lanes)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.lanes, b.lanes)}; }
// a * b + c with one rounding
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.lanes, b.lanes, c.lanes)}; }

// a if a > b, else b: a NaN in either gives b
inline Vec larger(Vec a, Vec b) { return {_mm256_max_ps(a.lanes, b.lanes)}; }
inline Vec absolute(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.lanes)}; }
inline Vec with_sign_of(Vec a, Vec b) {  // |a| with the sign of b
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(sign, a.lanes), _mm256_and_ps(sign, b.lanes))};
}

inline Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.bits, b.bits)}; }
inline Mask none() { return {_mm256_setzero_ps()}; }
inline bool any(Mask m) { return _mm256_movemask_ps(m.bits) != 0; }
inline int first(Mask m) { return __builtin_ctz(_mm256_movemask_ps(m.bits)); }
inline Mask equal(Vec a, Vec b) { return {_mm256_cmp_ps(a.lanes, b.lanes, _CMP_EQ_OQ)}; }
inline Mask unequal(Vec a, Vec b) { return {_mm256_cmp_ps(a.lanes, b.lanes, _CMP_NEQ_UQ)}; }  // or NaN
inline Mask at_least(Vec a, Vec b) { return {_mm256_cmp_ps(a.lanes, b.lanes, _CMP_GE_OQ)}; }
inline Mask either_nan(Vec a, Vec b) { return {_mm256_cmp_ps(a.lanes, b.lanes, _CMP_UNORD_Q)}; }
inline Mask below(Vec a, Vec b) { return {_mm256_cmp_ps(a.lanes, b.lanes, _CMP_LT_OQ)}; }
inline Vec where(Mask m, Vec a, Vec b) { return {_mm256_blendv_ps(b.lanes, a.lanes, m.bits)}; }
inline Vec where(Mask m, Vec a) { return {_mm256_and_ps(m.bits, a.lanes)}; }  // else 0
inline Vec product_unless(Mask m, Vec a, Vec b) {                             // a * b, 0 where m
  return {_mm256_andnot_ps(m.bits, _mm256_mul_ps(a.lanes, b.lanes))};
}

// the float32 whose exponent field is the lowest 8 bits of a's representation
inline Vec low_bits_as_exponent(Vec a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.lanes), 23))};
}
// a = result * 2^exponent with the result between 2/3 and 4/3, for normal a > 0
inline Vec split_exponent(Vec a, Vec* exponent) {
  const __m256i bits = _mm256_castps_si256(a.lanes);
  const __m256i power = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f2aaaab)), 23);
  exponent->lanes = _mm256_cvtepi32_ps(power);
  return {_mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(power, 23)))};
}

inline float largest(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.lanes), _mm256_extractf128_ps(a.lanes, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline double total(Vec a) {
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(a.lanes));
  const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(a.lanes, 1));
  const __m256d sum = _mm256_add_pd(low, high);
  const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(sum), _mm256_extractf128_pd(sum, 1));
  return _mm_cvtsd_f64(pair) + _mm_cvtsd_f64(_mm_unpackhi_pd(pair, pair));
}

inline Vec load_bfloat16(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
inline Vec load_float16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void store_bfloat16(uint16_t* p, Vec a) {  // to nearest even
  const __m256i bits = _mm256_castps_si256(a.lanes);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.lanes, a.lanes, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
  const __m256i high = _mm256_srli_epi32(result, 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}
inline void store_float16(uint16_t* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lanes, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace whp::avx2
