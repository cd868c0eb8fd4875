// One block of a step of AdamW: read, step, write. optim/update.py is the definition, optim/moments.py that
// of the narrow formats; what is written is the same to the last bit.
//
// The loops are plain, over arrays of a piece, and left to the compiler's vectoriser: every operation is
// rounded on its own (-ffp-contract=off), so the instruction set does not change a bit. Square roots are
// taken by vectors, because a compiler calls a function for each where errno may be set.
#pragma once
#include "adamw.h"

namespace whp::WHP_ISA {
namespace {

using adamw::block_size;
using adamw::Moments;
using adamw::Problem;

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
inline float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t mixed(uint32_t x) {  // lowbias32, see moments.py
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// All bits where true. The codes are made by comparing and masking integers: the vectoriser leaves loops with
// branches, and those that mix floats, bytes and truth values.
inline uint32_t mask(bool condition) { return 0u - uint32_t(condition); }

// Codes of magnitudes with 3 bits of exponent: moments.Map
template <int mantissa>
struct Map {
  static constexpr int dropped = 23 - mantissa;
  static constexpr uint32_t linear = 1u << mantissa, largest = 8 * linear - 1;
  static constexpr float top = float((2 * linear - 1) << 6);
  static constexpr uint32_t bias = (uint32_t(127 + mantissa) << mantissa) - linear;

  static float value(uint32_t code) {
    const uint32_t small = mask(code < linear);
    return from_bits((bits_of(float(int32_t(code))) & small) | (((code + bias) << dropped) & ~small));
  }
  static uint32_t code(float t, uint32_t random) {
    const uint32_t low = random & ((1u << dropped) - 1);
    const uint32_t small = mask(bits_of(t) < uint32_t(127 + mantissa) << 23);  // t < linear, as t >= 0
    const uint32_t upper = ((bits_of(t) + low) >> dropped) - bias;
    const float within = from_bits(bits_of(t) & small) * float(1 << dropped);  // fits into int32
    const uint32_t unit = (uint32_t(int32_t(within)) + low) >> dropped;
    const uint32_t found = (unit & small) | (upper & ~small);
    return found < largest ? found : largest;
  }
};
using First = Map<4>;
using Second = Map<5>;

// The scale of numbers, as maximum of bit patterns without signs: so that a NaN is the largest of all
inline float scale_of(const float* numbers, int whole) {
  int32_t largest = 0;
  for (int i = 0; i < whole; ++i) {
    const int32_t bits = int32_t(bits_of(numbers[i]) & 0x7fffffffu);
    largest = bits > largest ? bits : largest;
  }
  const float scale = from_bits(uint32_t(largest));
  return scale < 0x1p-100f ? 0.0f : scale;
}

inline void read_bfloat16(float* to, const uint16_t* from, int n) {
  for (int i = 0; i < n; ++i) to[i] = from_bits(uint32_t(from[i]) << 16);
}
inline void write_bfloat16(uint16_t* to, const float* from, const uint32_t* random, int shift, int n) {
  for (int i = 0; i < n; ++i) {
    const uint32_t rounded = (bits_of(from[i]) + ((random[i] >> shift) & 0xffffu)) >> 16;
    to[i] = uint16_t(from[i] != from[i] ? 0x7fc0u : rounded);
  }
}

// Elements worked on at a time: a block goes through in pieces, because all of it would fill the cache
constexpr int piece_size = 256;

struct Block {
  alignas(64) float weights[piece_size], gradient[piece_size], v[piece_size];  // of the piece at work
  alignas(64) float m[block_size], root[block_size];  // until the scales are known
};

// n elements up to whole vectors
inline int vectors(int n) { return (n + Vec::width - 1) / Vec::width * Vec::width; }

// n elements of piece `from` of the block, of which `at` is the first
inline void read(const Problem& p, Block& b, int from, int64_t at, int64_t number, int n) {
  float* m = b.m + from;
  for (int i = n; i < vectors(n); ++i) b.weights[i] = b.gradient[i] = m[i] = b.v[i] = 0;  // decides no scale
  if (p.high == nullptr) {
    __builtin_memcpy(b.weights, p.weights + at, size_t(n) * 4);
  } else {
    for (int i = 0; i < n; ++i) {
      b.weights[i] = from_bits((uint32_t(p.high[at + i]) << 16) + uint32_t(int32_t(p.remainder[at + i])));
    }
  }
  if (p.gradient16 == nullptr) {
    __builtin_memcpy(b.gradient, p.gradient + at, size_t(n) * 4);
  } else {
    read_bfloat16(b.gradient, p.gradient16 + at, n);
  }
  switch (p.moments) {
    case Moments::float32:
      __builtin_memcpy(m, static_cast<const float*>(p.exp_avg) + at, size_t(n) * 4);
      __builtin_memcpy(b.v, static_cast<const float*>(p.exp_avg_sq) + at, size_t(n) * 4);
      break;
    case Moments::bfloat16:
      read_bfloat16(m, static_cast<const uint16_t*>(p.exp_avg) + at, n);
      read_bfloat16(b.v, static_cast<const uint16_t*>(p.exp_avg_sq) + at, n);
      break;
    case Moments::int8: {
      const int8_t* first = static_cast<const int8_t*>(p.exp_avg) + at;
      const uint8_t* second = static_cast<const uint8_t*>(p.exp_avg_sq) + at;
      const float unit = p.exp_avg_scale[number] / First::top;
      const float root_unit = p.exp_avg_sq_scale[number] / Second::top;
      for (int i = 0; i < n; ++i) {
        const int32_t code = first[i], sign = code >> 31;
        const float value = First::value(uint32_t((code ^ sign) - sign)) * unit;
        m[i] = from_bits(bits_of(value) | (uint32_t(sign) & 0x80000000u));
        const float root = Second::value(second[i]) * root_unit;
        b.v[i] = root * root;
      }
    }
  }
}

inline void step(const Problem& p, Block& b, int from, int n) {
  const int whole = vectors(n);
  float *m = b.m + from, *root = b.root + from;
  for (int i = 0; i < whole; ++i) {
    const float g = b.gradient[i] * p.grad_scale;
    const float before = m[i];
    m[i] = __builtin_fmaf(p.weight, g - before, p.from_gradient ? g : before);
    b.v[i] = __builtin_fmaf(g * p.share2, g, b.v[i] * p.beta2);
  }
  for (int i = 0; i < whole; i += Vec::width) store(root + i, square_root(load(b.v + i)));
  for (int i = 0; i < whole; ++i) {
    const float denominator = root[i] / p.correction + p.eps;
    b.weights[i] = b.weights[i] * p.decay + (m[i] * p.rate) / denominator;
  }
}

inline void draw(const Problem& p, uint32_t* random, int64_t at, int n) {
  for (int i = 0; i < n; ++i) random[i] = mixed((p.first + uint32_t(at) + uint32_t(i)) ^ p.key);
}

inline void write(const Problem& p, const Block& b, int from, int64_t at, int n) {
  const float* m = b.m + from;
  if (p.high == nullptr) {
    __builtin_memcpy(p.weights + at, b.weights, size_t(n) * 4);
  } else {
    for (int i = 0; i < n; ++i) {
      const uint32_t bits = bits_of(b.weights[i]);
      p.high[at + i] = uint16_t((bits + 0x8000u) >> 16);
      p.remainder[at + i] = int16_t(uint16_t(bits));
    }
  }
  if (p.moments == Moments::float32) {
    __builtin_memcpy(static_cast<float*>(p.exp_avg) + at, m, size_t(n) * 4);
    __builtin_memcpy(static_cast<float*>(p.exp_avg_sq) + at, b.v, size_t(n) * 4);
  } else if (p.moments == Moments::bfloat16) {
    alignas(64) uint32_t random[piece_size];
    draw(p, random, at, n);
    write_bfloat16(static_cast<uint16_t*>(p.exp_avg) + at, m, random, 0, n);
    write_bfloat16(static_cast<uint16_t*>(p.exp_avg_sq) + at, b.v, random, 16, n);
  }
}

// The 8-bit moments of a whole block
inline void write_codes(const Problem& p, const Block& b, int64_t at, int64_t number, int n) {
  alignas(64) uint32_t random[piece_size];
  alignas(64) int8_t first[piece_size];  // here, because a pointer to bytes may point to anything
  alignas(64) uint8_t second[piece_size];
  const float scale = scale_of(b.m, vectors(n)), root_scale = scale_of(b.root, vectors(n));
  const float per_unit = scale == 0 ? 0.0f : First::top / scale;
  const float per_root_unit = root_scale == 0 ? 0.0f : Second::top / root_scale;
  const uint32_t positive = root_scale > 0;
  for (int from = 0; from < n; from += piece_size) {
    const int some = n - from < piece_size ? n - from : piece_size, whole = vectors(some);
    const float *m = b.m + from, *roots = b.root + from;
    draw(p, random, at + from, whole);
    for (int i = 0; i < whole; ++i) {
      const uint32_t sign = mask(bits_of(m[i]) - 0x80000001u < 0x7f800000u);  // m < 0: no NaN, no -0
      const float magnitude = from_bits(bits_of(m[i]) & 0x7fffffffu);
      first[i] = int8_t(int32_t((First::code(magnitude * per_unit, random[i]) ^ sign) - sign));
      const uint32_t found = Second::code(roots[i] * per_root_unit, random[i] >> 14);
      const uint32_t root = bits_of(roots[i]), least = root < positive ? root : positive;
      second[i] = uint8_t(found > least ? found : least);
    }
    __builtin_memcpy(static_cast<int8_t*>(p.exp_avg) + at + from, first, size_t(some));
    __builtin_memcpy(static_cast<uint8_t*>(p.exp_avg_sq) + at + from, second, size_t(some));
  }
  p.exp_avg_scale[number] = scale;
  p.exp_avg_sq_scale[number] = root_scale;
}

inline void update_block(const Problem& p, int64_t row, int64_t column) {
  const int64_t left = p.columns - column, at = row * p.columns + column;
  const int n = left < block_size ? int(left) : block_size;
  const int64_t number = row * ((p.columns + block_size - 1) / block_size) + column / block_size;
  Block b;
  for (int from = 0; from < n; from += piece_size) {
    const int some = n - from < piece_size ? n - from : piece_size;
    read(p, b, from, at + from, number, some);
    step(p, b, from, some);
    write(p, b, from, at + from, some);
  }
  if (p.moments == Moments::int8) write_codes(p, b, at, number, n);
}

}  // namespace
}  // namespace whp::WHP_ISA
