// Sixteen float32 lanes: AVX-512 F, BW, DQ and VL. The same names exist in vector_avx2.h and
// vector_portable.h.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own header: gcc.gnu.org/bugzilla, 105593
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include <cstdint>

namespace whp::avx512 {

struct Vec {
  static constexpr int width = 16;
  __m512 lanes;
};
struct Mask {
  __mmask16 bits;
};

inline Vec fill(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.lanes); }

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.lanes, b.lanes)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.lanes, b.lanes)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.lanes, b.lanes)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.lanes, b.lanes)}; }
// a * b + c with one rounding
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.lanes, b.lanes, c.lanes)}; }

// a if a > b, else b: a NaN in either gives b
inline Vec larger(Vec a, Vec b) { return {_mm512_max_ps(a.lanes, b.lanes)}; }
inline Vec absolute(Vec a) { return {_mm512_abs_ps(a.lanes)}; }
inline Vec with_sign_of(Vec a, Vec b) {  // |a| with the sign of b
  const __m512 sign = _mm512_set1_ps(-0.0f);
  return {_mm512_or_ps(_mm512_andnot_ps(sign, a.lanes), _mm512_and_ps(sign, b.lanes))};
}

inline Mask operator|(Mask a, Mask b) { return {static_cast<__mmask16>(a.bits | b.bits)}; }
inline Mask none() { return {0}; }
inline bool any(Mask m) { return m.bits != 0; }
inline int first(Mask m) { return __builtin_ctz(m.bits); }
inline Mask equal(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.lanes, b.lanes, _CMP_EQ_OQ)}; }
inline Mask unequal(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.lanes, b.lanes, _CMP_NEQ_UQ)}; }  // or NaN
inline Mask at_least(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.lanes, b.lanes, _CMP_GE_OQ)}; }
inline Mask either_nan(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.lanes, b.lanes, _CMP_UNORD_Q)}; }
inline Mask below(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.lanes, b.lanes, _CMP_LT_OQ)}; }
inline Vec where(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_ps(m.bits, b.lanes, a.lanes)}; }
inline Vec where(Mask m, Vec a) { return {_mm512_maskz_mov_ps(m.bits, a.lanes)}; }  // else 0
inline Vec product_unless(Mask m, Vec a, Vec b) {                                   // a * b, 0 where m
  return {_mm512_maskz_mul_ps(static_cast<__mmask16>(~m.bits), a.lanes, b.lanes)};
}

// the float32 whose exponent field is the lowest 8 bits of a's representation
inline Vec low_bits_as_exponent(Vec a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.lanes), 23))};
}
// a = result * 2^exponent with the result between 2/3 and 4/3, for normal a > 0
inline Vec split_exponent(Vec a, Vec* exponent) {
  const __m512i bits = _mm512_castps_si512(a.lanes);
  const __m512i power = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f2aaaab)), 23);
  exponent->lanes = _mm512_cvtepi32_ps(power);
  return {_mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(power, 23)))};
}

inline float largest(Vec a) { return _mm512_reduce_max_ps(a.lanes); }
inline double total(Vec a) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a.lanes));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.lanes, 1));
  return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
}

inline Vec load_bfloat16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline Vec load_float16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// to nearest even by integers: vcvtneps2bf16 would flush denormals
inline void store_bfloat16(uint16_t* p, Vec a) {
  const __m512i bits = _mm512_castps_si512(a.lanes);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.lanes, a.lanes, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
}
inline void store_float16(uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.lanes, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace whp::avx512
