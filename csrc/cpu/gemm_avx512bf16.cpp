// bfloat16 x bfloat16 -> float32 with vdpbf16ps: packing, the register tile, and the loops over cache blocks.
//
// vdpbf16ps adds two products to each of 16 float32 sums, rounds to nearest, and takes subnormals for zero.
#include "gemm.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // false alarms within GCC's own intrinsics (its bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <utility>

namespace whp::gemm {
namespace {

// -------------------------------------------------------------------------------------------------- packing
//
// A panel holds `width` lanes, step by step as the tile reads them. A step is one 32-bit word for each lane:
// the pair of its elements at depth 2 s (low half) and 2 s + 1. An odd depth is filled up with zeros in A and
// in B, so that inf and NaN meet no zero that is not theirs. Lanes past the last may hold anything: no result
// that is written comes from them.

inline int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
inline __mmask16 first16(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1);
}
inline __mmask32 first32(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0 : (uint32_t{1} << n) - 1; }

// r: the rows of a 16 x 16 matrix of words; becomes its columns.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // quarter q of r[i + c] is now column 4 q + c of rows i ... i + 3: a 4 x 4 transpose of quarters is left
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c) {
    const __m512i even_upper = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
    const __m512i odd_upper = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    const __m512i even_lower = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    const __m512i odd_lower = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(even_upper, even_lower, 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(odd_upper, odd_lower, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(even_upper, even_lower, 0xdd);
    t[12 + c] = _mm512_shuffle_i32x4(odd_upper, odd_lower, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// One panel of x with depth_stride 1: the pairs are there, the panel is the transpose of a matrix of words.
template <int64_t width>
void pack_transposed(const uint16_t* x, int64_t lane_stride, int64_t lanes, int64_t depth, uint32_t* panel) {
  for (int64_t lane = 0; lane < smaller(lanes, width); lane += 16) {
    const __mmask16 stored = first16(width - lane);
    for (int64_t from = 0; from < depth; from += 32) {
      const __mmask32 loaded = first32(depth - from);
      const int64_t steps = (depth - from + 1) / 2;
      uint32_t* to = panel + from / 2 * width + lane;
      __m512i r[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        r[i] = lane + i < lanes ? _mm512_maskz_loadu_epi16(loaded, x + (lane + i) * lane_stride + from)
                                : _mm512_setzero_si512();
      }
      transpose(r);
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        if (i < steps) _mm512_mask_storeu_epi32(to + i * width, stored, r[i]);
      }
    }
  }
}

// All panels of x with lane_stride 1: a pair is made of two rows of x. Only a few steps are made at a time,
// of all panels: so the cache lines of x are used up while they are in the first cache, even where rows of x
// are a power of two apart and compete for the same few places.
template <int64_t width>
void pack_interleaved(const uint16_t* x, int64_t depth_stride, int64_t lanes, int64_t depth,
                      uint32_t* panels) {
  constexpr int64_t steps_at_once = 8;
  const int64_t steps = (depth + 1) / 2;
  for (int64_t from = 0; from < steps; from += steps_at_once) {
    for (int64_t first = 0; first < lanes; first += width) {
      for (int64_t step = from; step < smaller(from + steps_at_once, steps); ++step) {
        const uint16_t* even = x + 2 * step * depth_stride + first;
        uint32_t* to = panels + first * steps + step * width;
        for (int64_t lane = 0; lane < width; lane += 16) {
          const __mmask16 there = first16(lanes - first - lane);
          const __mmask16 both_there = 2 * step + 1 < depth ? there : 0;
          const __m256i low = _mm256_maskz_loadu_epi16(there, even + lane);
          const __m256i high = _mm256_maskz_loadu_epi16(both_there, even + depth_stride + lane);
          const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
          const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(low), upper);
          _mm512_mask_storeu_epi32(to + lane, first16(width - lane), pairs);
        }
      }
    }
  }
}

// All panels of any x, one element at a time.
template <int64_t width>
void pack_elements(const Operand& x, int64_t lanes, int64_t depth, uint32_t* panels) {
  const int64_t steps = (depth + 1) / 2;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const uint16_t* from = x.data + lane * x.lane_stride;
    uint32_t* to = panels + lane / width * width * steps + lane % width;
    for (int64_t step = 0; step < steps; ++step) {
      const uint32_t low = from[2 * step * x.depth_stride];
      const uint32_t high = 2 * step + 1 < depth ? from[(2 * step + 1) * x.depth_stride] : 0;
      to[step * width] = low | high << 16;
    }
  }
}

// Lanes [lane, lane + lanes) of x, from `from` to `from + depth`, as ceil(lanes / width) adjacent panels.
template <int64_t width>
void pack(const Operand& x, int64_t lane, int64_t lanes, int64_t from, int64_t depth, uint32_t* panels) {
  const int64_t steps = (depth + 1) / 2;
  const uint16_t* data = x.data + lane * x.lane_stride + from * x.depth_stride;
  if (x.depth_stride == 1) {
    for (int64_t i = 0; i < lanes; i += width) {
      pack_transposed<width>(data + i * x.lane_stride, x.lane_stride, lanes - i, depth, panels + i * steps);
    }
  } else if (x.lane_stride == 1) {
    pack_interleaved<width>(data, x.depth_stride, lanes, depth, panels);
  } else {
    pack_elements<width>({data, x.lane_stride, x.depth_stride}, lanes, depth, panels);
  }
}

// -------------------------------------------------------------------------------------------- register tile

constexpr int vectors = tile_columns / 16;

// rows x tile_columns results of one panel of A and one of B; the columns named by `columns` are written.
template <int rows>
void tile(const uint32_t* a, const uint32_t* b, int64_t steps, const Result& out, float* to,
          const __mmask16 (&columns)[vectors]) {
  __m512 sums[rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      const float* place = to + i * out.row_stride + 16 * j;
      sums[i][j] = _mm512_setzero_ps();
      if (out.accumulate) _mm_prefetch(reinterpret_cast<const char*>(place), _MM_HINT_T0);
    }
  }
  for (int64_t step = 0; step < steps; ++step, a += tile_rows, b += tile_columns) {
    __m512bh right[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) right[j] = (__m512bh)_mm512_loadu_si512(b + 16 * j);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i]));
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      float* place = to + i * out.row_stride + 16 * j;
      if (out.accumulate) sums[i][j] = _mm512_add_ps(_mm512_maskz_loadu_ps(columns[j], place), sums[i][j]);
      _mm512_mask_storeu_ps(place, columns[j], sums[i][j]);
    }
  }
}

// AllTiles::of[rows - 1] is tile<rows>: the last rows of a matrix, and single rows, cost no more than they
// are.
template <class Numbers>
struct Tiles;
template <int... number>
struct Tiles<std::integer_sequence<int, number...>> {
  static constexpr decltype(&tile<1>) of[] = {tile<number + 1>...};
};
using AllTiles = Tiles<std::make_integer_sequence<int, tile_rows>>;

// ------------------------------------------------------------------------------------------------- blocking

// The smallest multiple of `unit` that covers n in as few blocks as blocks of size `most` would.
int64_t even_block(int64_t n, int64_t most, int64_t unit) {
  return round_up(ceil_div(n, ceil_div(n, most)), unit);
}

}  // namespace

// An upper bound: the even blocks of a smaller part can be larger than those of this one.
int64_t scratch_bytes(int64_t rows, int64_t columns, int64_t depth) {
  const int64_t left = round_up(smaller(rows, block_rows), tile_rows);
  const int64_t right = round_up(smaller(columns, block_columns), tile_columns);
  return (left + right) * even_block(depth, block_depth, 2) * 2 + 64;
}

// A block of A (1022 rows, 1024 deep: 2 MB, in the third cache) meets one block of B after the other (256
// columns, 1024 deep: 512 KB, in the second). Within, one panel of A (14 rows: 28 KB) meets all panels of B
// (32 columns: 64 KB each). A tile thus reads 92 KB for its 512 steps of 28 vdpbf16ps; where two of them are
// issued in a cycle, these are 13 bytes a cycle, and the second cache gives 32 or 64. A is packed once, B
// once for 1022 rows of A, and a result is read and written again for each 1024 of depth.
void multiply(const Operand& a, const Operand& b, int64_t depth, const Part& part, const Result& out,
              char* scratch) {
  const int64_t high = even_block(part.rows, block_rows, tile_rows);
  const int64_t wide = even_block(part.columns, block_columns, tile_columns);
  const int64_t deepest = even_block(depth, block_depth, 2);
  uint32_t* left = reinterpret_cast<uint32_t*>(scratch);
  uint32_t* right = reinterpret_cast<uint32_t*>(scratch + round_up(high * deepest * 2, 64));
  for (int64_t row = 0; row < part.rows; row += high) {
    const int64_t rows = smaller(high, part.rows - row);
    for (int64_t from = 0; from < depth; from += deepest) {
      const int64_t deep = smaller(deepest, depth - from), steps = (deep + 1) / 2;
      const Result sum{out.data, out.row_stride, out.accumulate || from > 0};
      pack<tile_rows>(a, part.first_row + row, rows, from, deep, left);
      for (int64_t column = 0; column < part.columns; column += wide) {
        const int64_t columns = smaller(wide, part.columns - column);
        pack<tile_columns>(b, part.first_column + column, columns, from, deep, right);
        for (int64_t i = 0; i < rows; i += tile_rows) {
          const auto run = AllTiles::of[smaller(tile_rows, rows - i) - 1];
          float* to = out.data + (part.first_row + row + i) * out.row_stride + part.first_column + column;
          for (int64_t j = 0; j < columns; j += tile_columns) {
            const __mmask16 written[vectors] = {first16(columns - j), first16(columns - j - 16)};
            run(left + i * steps, right + j * steps, steps, sum, to + j, written);
          }
        }
      }
    }
  }
}

}  // namespace whp::gemm

#endif
