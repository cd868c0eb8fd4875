// Numbers as the row kernel loads, computes with and stores them: float32, bfloat16 and float16 in packs of 4 to 32
// bytes, and the few functions whose machine instruction differs from C++. Compiles as plain C++ too.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define WHP_INLINE __device__ __forceinline__
#define WHP_UNROLL _Pragma("unroll")
#else
#include <torch/headeronly/util/Half.h>
#define WHP_INLINE inline
#define WHP_UNROLL
#endif

namespace whp {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The order is that of the operator's integer arguments.
enum class Dtype : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// ---------------------------------------------------------------------------------------------------- arithmetic

// Largest of both, NaN if either is: a NaN of a row must reach the row's maximum (fmaxf would drop it).
WHP_INLINE float nan_max(float a, float b) {
#ifdef __CUDACC__
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return std::isnan(a) || std::isnan(b) ? kNaN : (a < b ? b : a);
#endif
}

// 2^x in one instruction, relative error below 2^-22. Results under 2^-126 are 0: such a probability adds nothing.
WHP_INLINE float exp2_fast(float x) {
#ifdef __CUDACC__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  const float result = std::exp2(x);
  return result < std::numeric_limits<float>::min() ? 0.0f : result;  // NaN stays NaN
#endif
}

// ln(x) for x in [1, 2], absolute error below 2^-22.
WHP_INLINE float log_fast(float x) {
#ifdef __CUDACC__
  return __log2f(x) * kLn2;
#else
  return std::log2(x) * kLn2;
#endif
}

// a * b and a - b rounded by themselves: the compiler may not fuse them. Labels are decided by the last bit of the
// combination, and eager torch, whose labels these must be, rounds after each operation.
WHP_INLINE float product(float a, float b) {
#ifdef __CUDACC__
  return __fmul_rn(a, b);
#else
  return a * b;  // compiled with -ffp-contract=off
#endif
}

WHP_INLINE float sum(float a, float b) {
#ifdef __CUDACC__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// --------------------------------------------------------------------------------------------------- conversions

WHP_INLINE float float_of_bits(uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

WHP_INLINE uint32_t bits_of_float(float value) {
#ifdef __CUDACC__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
#endif
}

#ifndef __CUDACC__
inline uint32_t bfloat16_bits(float value) {
  const uint32_t bits = bits_of_float(value);
  if (std::isnan(value)) return 0x7FC0;
  return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
}
#endif

// N words of 32 bits that are loaded and stored at once.
template <int N>
struct Words {
  uint32_t word[N];
};

template <class T, int W>
using Pack = Words<W * int(sizeof(T)) / 4>;

WHP_INLINE void unpack_pair(uint32_t word, Bfloat16, float& low, float& high) {
  low = float_of_bits(word << 16);
  high = float_of_bits(word & 0xFFFF0000u);
}

WHP_INLINE void unpack_pair(uint32_t word, Float16, float& low, float& high) {
#ifdef __CUDACC__
  low = __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
  high = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
#else
  low = c10::detail::fp16_ieee_to_fp32_value(static_cast<uint16_t>(word));
  high = c10::detail::fp16_ieee_to_fp32_value(static_cast<uint16_t>(word >> 16));
#endif
}

WHP_INLINE uint32_t pack_pair(float low, float high, Bfloat16) {
#ifdef __CUDACC__
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
#else
  return bfloat16_bits(low) | bfloat16_bits(high) << 16;
#endif
}

WHP_INLINE uint32_t pack_pair(float low, float high, Float16) {
#ifdef __CUDACC__
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
#else
  return c10::detail::fp16_ieee_from_fp32_value(low) | uint32_t(c10::detail::fp16_ieee_from_fp32_value(high)) << 16;
#endif
}

template <class T, int W>
WHP_INLINE void unpack(const Pack<T, W>& pack, float (&values)[W]) {
  WHP_UNROLL
  for (int j = 0; j < W; j += 2) {
    if constexpr (sizeof(T) == 4) {
      values[j] = float_of_bits(pack.word[j]);
      values[j + 1] = float_of_bits(pack.word[j + 1]);
    } else {
      unpack_pair(pack.word[j / 2], T{}, values[j], values[j + 1]);
    }
  }
}

// One rounding to T for each value.
template <class T, int W>
WHP_INLINE Pack<T, W> packed(const float (&values)[W]) {
  Pack<T, W> pack;
  WHP_UNROLL
  for (int j = 0; j < W; j += 2) {
    if constexpr (sizeof(T) == 4) {
      pack.word[j] = bits_of_float(values[j]);
      pack.word[j + 1] = bits_of_float(values[j + 1]);
    } else {
      pack.word[j / 2] = pack_pair(values[j], values[j + 1], T{});
    }
  }
  return pack;
}

// -------------------------------------------------------------------------------------------------------- memory

#ifndef __CUDACC__
// The emulation holds addresses to what the device demands of them.
inline void check_aligned(const void* address, int bytes) {
  if (reinterpret_cast<uintptr_t>(address) % uintptr_t(bytes)) throw "a pack is not aligned";
}
#endif

// From device memory, in pieces of at most 16 bytes, not to be kept in the caches (each is read once). Not the
// read-only path (ld.global.nc): the gradient may be written over the student within the same kernel.
template <int N>
WHP_INLINE Words<N> load_once(const void* address) {
  Words<N> words;
#ifdef __CUDACC__
  if constexpr (N == 2) {
    const uint2 two = __ldcs(static_cast<const uint2*>(address));
    words.word[0] = two.x, words.word[1] = two.y;
  } else {
    WHP_UNROLL
    for (int i = 0; i < N; i += 4) {
      const uint4 four = __ldcs(static_cast<const uint4*>(address) + i / 4);
      words.word[i] = four.x, words.word[i + 1] = four.y, words.word[i + 2] = four.z, words.word[i + 3] = four.w;
    }
  }
#else
  check_aligned(address, N == 2 ? 8 : 16);
  std::memcpy(&words, address, sizeof words);
#endif
  return words;
}

template <int N>
WHP_INLINE void store_once(void* address, const Words<N>& words) {
#ifdef __CUDACC__
  if constexpr (N == 2) {
    __stcs(static_cast<uint2*>(address), make_uint2(words.word[0], words.word[1]));
  } else {
    WHP_UNROLL
    for (int i = 0; i < N; i += 4) {
      __stcs(
          static_cast<uint4*>(address) + i / 4,
          make_uint4(words.word[i], words.word[i + 1], words.word[i + 2], words.word[i + 3]));
    }
  }
#else
  check_aligned(address, N == 2 ? 8 : 16);
  std::memcpy(address, &words, sizeof words);
#endif
}

// Sixteen bytes in shared memory.
WHP_INLINE Words<4> load_shared(const void* address) {
#ifdef __CUDACC__
  const uint4 four = *static_cast<const uint4*>(address);
  return {four.x, four.y, four.z, four.w};
#else
  check_aligned(address, 16);
  Words<4> words;
  std::memcpy(&words, address, 16);
  return words;
#endif
}

WHP_INLINE void store_shared(void* address, const Words<4>& words) {
#ifdef __CUDACC__
  *static_cast<uint4*>(address) = make_uint4(words.word[0], words.word[1], words.word[2], words.word[3]);
#else
  check_aligned(address, 16);
  std::memcpy(address, &words, 16);
#endif
}

// The bits of one element, and those of -inf, which stands for columns past the end: it adds nothing to any sum.
template <class T>
WHP_INLINE uint32_t element_bits(const T* address) {
  if constexpr (sizeof(T) == 4) {
    return bits_of_float(*address);
  } else {
    return address->bits;
  }
}

template <class T>
WHP_INLINE uint32_t ruled_out_bits();
template <>
WHP_INLINE uint32_t ruled_out_bits<float>() { return 0xFF800000u; }
template <>
WHP_INLINE uint32_t ruled_out_bits<Bfloat16>() { return 0xFF80u; }
template <>
WHP_INLINE uint32_t ruled_out_bits<Float16>() { return 0xFC00u; }

// W elements one by one: rows that are not aligned, and the end of a row. Columns from `count` on become -inf.
template <class T, int W>
WHP_INLINE Pack<T, W> load_singly(const T* address, int count) {
  Pack<T, W> pack;
  WHP_UNROLL
  for (int j = 0; j < W; ++j) {
    const uint32_t bits = j < count ? element_bits(address + j) : ruled_out_bits<T>();
    if constexpr (sizeof(T) == 4) {
      pack.word[j] = bits;
    } else if (j % 2 == 0) {
      pack.word[j / 2] = bits;
    } else {
      pack.word[j / 2] |= bits << 16;
    }
  }
  return pack;
}

template <class T, int W>
WHP_INLINE void store_singly(T* address, const Pack<T, W>& pack, int count) {
  WHP_UNROLL
  for (int j = 0; j < W; ++j) {
    if (j >= count) break;
    if constexpr (sizeof(T) == 4) {
      address[j] = float_of_bits(pack.word[j]);
    } else {
      address[j].bits = static_cast<uint16_t>(pack.word[j / 2] >> 16 * (j % 2));
    }
  }
}

template <class T>
WHP_INLINE float value_at(const T* address) {
  if constexpr (sizeof(T) == 4) {
    return *address;
  } else {
    float low, high;
    unpack_pair(address->bits, T{}, low, high);
    return low;
  }
}

}  // namespace whp
