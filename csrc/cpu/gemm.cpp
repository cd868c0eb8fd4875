// The operators of kernels/whp_kernels/gemm.py: arguments, and which thread computes which part.
#include "gemm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <new>

namespace whp::gemm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool has_avx512_bf16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// ------------------------------------------------------------------------------------------------- threads

struct Grid {
  int64_t down, across;   // number of parts
  int64_t rows, columns;  // size of a part, in whole tiles
};

// Each thread packs all of A's rows and B's columns that its part needs. Parts are therefore as square as the
// packing asks for, and a small product is not worth many threads.
[[maybe_unused]] Grid grid(int64_t rows, int64_t columns, int64_t depth) {
  constexpr double packing = 40;              // packing one element takes about as long as 40 products
  constexpr double least_products = 4 << 20;  // of one thread: some 20 microseconds
  const double results = static_cast<double>(rows) * static_cast<double>(columns);
  const double products = results * static_cast<double>(depth);
  const int64_t worthwhile = static_cast<int64_t>(std::min(products / least_products, 1e6));
  const int64_t threads = std::clamp<int64_t>(worthwhile, 1, torch::stable::get_num_threads());
  Grid best{};
  double least = std::numeric_limits<double>::infinity();
  for (int64_t down = 1; down <= threads; ++down) {
    Grid g{down, threads / down, 0, 0};
    g.rows = ceil_div(ceil_div(rows, tile_rows), g.down) * tile_rows;
    g.columns = ceil_div(ceil_div(columns, tile_columns), g.across) * tile_columns;
    const double height = static_cast<double>(g.rows), width = static_cast<double>(g.columns);
    const double cost = height * width + packing * (height + width);
    if (cost < least) {
      least = cost;
      best = g;
    }
  }
  return best;
}

// ------------------------------------------------------------------------------------------------ operators

void check(const Tensor& out, const Tensor& a, const Tensor& b) {
  for (const Tensor* t : {&out, &a, &b}) {
    STD_TORCH_CHECK(t->is_cpu() && t->dim() == 2, "mm_bf16_f32_ takes CPU matrices");
  }
  STD_TORCH_CHECK(a.scalar_type() == ScalarType::BFloat16 && b.scalar_type() == ScalarType::BFloat16 &&
                      out.scalar_type() == ScalarType::Float,
                  "mm_bf16_f32_ takes bfloat16 operands and a float32 result");
  STD_TORCH_CHECK(a.size(1) == b.size(0) && out.size(0) == a.size(0) && out.size(1) == b.size(1),
                  "mm_bf16_f32_ got a [", a.size(0), ", ", a.size(1), "], b [", b.size(0), ", ", b.size(1),
                  "] and out [", out.size(0), ", ", out.size(1), "], which do not fit");
  const bool adjacent = out.size(1) <= 1 || out.stride(1) == 1;
  const bool apart = out.size(0) <= 1 || out.stride(0) >= out.size(1);
  STD_TORCH_CHECK(adjacent && apart, "mm_bf16_f32_ got out with strides [", out.stride(0), ", ",
                  out.stride(1), "], but its columns must be adjacent and its rows apart");
}

// out = a @ b, or out += a @ b. a and b may have any strides; out must not lie where they do.
void mm_bf16_f32_(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  check(out, a, b);
  const int64_t rows = a.size(0), columns = b.size(1), depth = a.size(1);
  const Result result{static_cast<float*>(out.mutable_data_ptr()), out.stride(0), accumulate};
  if (rows == 0 || columns == 0) return;
  if (depth == 0) {
    for (int64_t i = 0; i < rows && !accumulate; ++i) {
      std::fill_n(result.data + i * result.row_stride, columns, 0.0f);
    }
    return;
  }
  STD_TORCH_CHECK(has_avx512_bf16(), "mm_bf16_f32_ needs a processor with AVX-512 BF16");
#if defined(__x86_64__)
  const Operand left{static_cast<const uint16_t*>(a.const_data_ptr()), a.stride(0), a.stride(1)};
  const Operand right{static_cast<const uint16_t*>(b.const_data_ptr()), b.stride(1), b.stride(0)};
  const Grid g = grid(rows, columns, depth);
  const int64_t parts = g.down * g.across;
  // taken here, because the threads may throw nothing; whole pages, because no two threads should share one
  constexpr std::align_val_t page{4096};
  const int64_t bytes = round_up(scratch_bytes(g.rows, g.columns, depth), static_cast<int64_t>(page));
  const auto free = [](char* p) { ::operator delete[](p, page); };
  const std::unique_ptr<char[], decltype(free)> scratch(
      static_cast<char*>(::operator new[](static_cast<size_t>(parts * bytes), page)), free);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / g.across * g.rows, column = i % g.across * g.columns;
      if (row >= rows || column >= columns) continue;  // parts of whole tiles can cover more than there is
      const Part part{row, std::min(g.rows, rows - row), column, std::min(g.columns, columns - column)};
      multiply(left, right, depth, part, result, scratch.get() + i * bytes);
    }
  });
#endif
}

STABLE_TORCH_LIBRARY_FRAGMENT(whp_kernels_C, m) {
  m.def("mm_bf16_f32_(Tensor(a!) out, Tensor a, Tensor b, bool accumulate) -> ()");
  m.def("has_avx512_bf16() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(whp_kernels_C, CPU, m) { m.impl("mm_bf16_f32_", TORCH_BOX(&mm_bf16_f32_)); }

STABLE_TORCH_LIBRARY_IMPL(whp_kernels_C, CompositeExplicitAutograd, m) {
  m.impl("has_avx512_bf16", TORCH_BOX(&has_avx512_bf16));
}

}  // namespace
}  // namespace whp::gemm
