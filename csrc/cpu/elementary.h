// exp, expm1, log1p and tanh of a vector, within 2 units in the last place where the vector has fused
// multiply-add. WHP_ISA names the namespace of the vector type; the file that includes this defines it.
// Polynomials: minimax fits on the intervals given, made for these functions.
#pragma once
#include <cmath>

namespace whp::WHP_ISA {

// x = power * log(2) + r with |r| <= log(2) / 2, for -88 <= x <= 88
struct Reduced {
  Vec scale, r;  // scale = 2^power
};
inline Reduced reduce(Vec x) {
  // Adding 1.5 * 2^23 leaves no place for a fraction; with the exponent's bias on top, the lowest bits of the
  // sum are those of the float32 2^power.
  const Vec shift = fill(12582912.0f + 127.0f), sum = fma(x, fill(1.44269504f), shift), power = sum - shift;
  Vec r = fma(power, fill(-0.693145752f), x);  // log(2) in two parts: the first ends in 9 zero bits
  r = fma(power, fill(-1.42860677e-6f), r);
  return {low_bits_as_exponent(sum), r};
}

// (exp(r) - 1 - r) / r^2
inline Vec exp_tail(Vec r) {
  Vec q = fill(1.381446706e-3f);
  q = fma(q, r, fill(8.368780411e-3f));
  q = fma(q, r, fill(4.166839421e-2f));
  q = fma(q, r, fill(1.666652011e-1f));
  return fma(q, r, fill(4.999999341e-1f));
}

// exp(x) for x <= 88; 0 below the smallest normal number, so also for -inf; NaN stays
inline Vec exp(Vec x) {
  const Reduced e = reduce(x);
  const Vec one = fill(1.0f);
  return product_unless(below(x, fill(-87.33f)), e.scale, fma(fma(exp_tail(e.r), e.r, one), e.r, one));
}

// exp(x) - 1 for x <= 0, with its digits kept near 0; -1 for -inf; NaN stays
inline Vec expm1(Vec x) {
  const Reduced e = reduce(larger(fill(-87.0f), x));
  return fma(e.scale, fma(exp_tail(e.r), e.r * e.r, e.r), e.scale - fill(1.0f));
}

// log(1 + y) for -1 <= y <= 1, with its digits kept near 0; a finite, very negative number for -1; NaN stays
inline Vec log1p(Vec y) {
  const Vec sum = larger(fill(1e-30f), fill(1.0f) + y);
  const Vec lost = y - (sum - fill(1.0f));  // what rounding took from 1 + y
  Vec exponent;
  const Vec f = split_exponent(sum, &exponent) - fill(1.0f);  // -1/3 <= f <= 1/3
  Vec q = fill(-0.13191744f);
  q = fma(q, f, fill(0.13962417f));
  q = fma(q, f, fill(-0.12115107f));
  q = fma(q, f, fill(0.14010926f));
  q = fma(q, f, fill(-0.16685467f));
  q = fma(q, f, fill(0.20010044f));
  q = fma(q, f, fill(-0.24999689f));
  q = fma(q, f, fill(0.33333224f));
  q = q * f * (f * f);                          // log(1 + f) = f - f^2 / 2 + f^3 q(f)
  q = fma(exponent, fill(-2.12194440e-4f), q);  // log(2) in two parts
  q = fma(f * f, fill(-0.5f), q) + lost / sum;
  return fma(exponent, fill(0.693359375f), q + f);
}

inline Vec tanh(Vec x) {
  const Vec size = absolute(x);
  const Vec e = exp(fill(-2.0f) * size);
  const Vec far = (fill(1.0f) - e) / (fill(1.0f) + e);
  const Vec square = x * x;
  Vec q = fill(-0.005717045f);
  q = fma(q, square, fill(0.020650587f));
  q = fma(q, square, fill(-0.053743498f));
  q = fma(q, square, fill(0.13331491f));
  q = fma(q, square, fill(-0.33333284f));
  const Vec near = fma(q * square, x, x);
  return where(at_least(size, fill(0.625f)), with_sign_of(far, x), near);
}

}  // namespace whp::WHP_ISA
