// The product of bfloat16 matrices with float32 results: what gemm.cpp, compiled for any machine, and
// gemm_avx512bf16.cpp share. Plain data only, for the reason given in rows.h.
#pragma once
#include <cstdint>

namespace whp::gemm {

// The register tile: 14 rows x 2 vectors of 16 columns take 28 of the 32 registers, a step of B two, one of A
// one.
constexpr int64_t tile_rows = 14;
constexpr int64_t tile_columns = 32;

// The cache blocks (gemm_avx512bf16.cpp says what lies where).
constexpr int64_t block_depth = 1024;
constexpr int64_t block_rows = 73 * tile_rows;
constexpr int64_t block_columns = 8 * tile_columns;

// A bfloat16 matrix. A lane is what survives the product: a row of A, a column of B. Strides are in elements.
struct Operand {
  const uint16_t* data;
  int64_t lane_stride, depth_stride;
};

// out [rows, columns] of float32, adjacent columns.
struct Result {
  float* data;
  int64_t row_stride;
  bool accumulate;  // add to what is there
};

// The part of the product that one thread computes.
struct Part {
  int64_t first_row, rows, first_column, columns;
};

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }
inline int64_t round_up(int64_t x, int64_t unit) { return ceil_div(x, unit) * unit; }

#if defined(__x86_64__)
// Memory that multiply() works in, for a part of at most this size: under 2.6 MB.
int64_t scratch_bytes(int64_t rows, int64_t columns, int64_t depth);

// out[part] = (a @ b)[part], or += it; depth > 0; scratch begins at a multiple of 64 bytes.
void multiply(const Operand& a, const Operand& b, int64_t depth, const Part& part, const Result& out,
              char* scratch);
#endif

}  // namespace whp::gemm
