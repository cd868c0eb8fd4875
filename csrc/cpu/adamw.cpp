// The operator of optim/cpp.py: arguments, choice of the instruction set, threads.
#include "adamw.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <vector>

namespace whp::adamw {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// As for the row kernels (rows.cpp): the best, or the one that WHP_KERNELS_ISA asks for
const Kernel& kernel() {
  std::vector<const Kernel*> found;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    found.push_back(&avx512_kernel);
  }
  if (avx2) found.push_back(&avx2_kernel);
#endif
  found.push_back(&portable_kernel);
  const char* asked = std::getenv("WHP_KERNELS_ISA");
  if (asked == nullptr || *asked == '\0') return *found.front();
  for (const Kernel* candidate : found) {
    if (std::strcmp(candidate->name, asked) == 0) return *candidate;
  }
  STD_TORCH_CHECK(false, "WHP_KERNELS_ISA is ", asked, ", but this machine has only what cpu_isas() lists");
}

template <class T>
T* data(const Tensor& t, const char* name, ScalarType dtype, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.dim() == 2 && t.size(0) == rows &&
                      t.size(1) == columns && t.is_contiguous(),
                  name, " must be a contiguous CPU tensor [", rows, ", ", columns,
                  "] of the dtype that goes with the others");
  return static_cast<T*>(t.data_ptr());
}

void adamw_(const Tensor& weights, const std::optional<Tensor>& remainder, const Tensor& gradient,
            const Tensor& exp_avg, const Tensor& exp_avg_sq, const std::optional<Tensor>& exp_avg_scale,
            const std::optional<Tensor>& exp_avg_sq_scale, const std::optional<Tensor>& grad_scale,
            int64_t first, int64_t key, bool from_gradient, const std::vector<double>& numbers) {
  STD_TORCH_CHECK(weights.dim() == 2 && numbers.size() == 7, "adamw_ takes weights [R, C] and seven numbers");
  Problem p;
  const int64_t rows = weights.size(0), columns = weights.size(1);
  const int64_t blocks = (columns + block_size - 1) / block_size;
  if (remainder) {
    p.high = data<uint16_t>(weights, "weights", ScalarType::BFloat16, rows, columns);
    p.remainder = data<int16_t>(*remainder, "remainder", ScalarType::Short, rows, columns);
  } else {
    p.weights = data<float>(weights, "weights", ScalarType::Float, rows, columns);
  }
  if (gradient.scalar_type() == ScalarType::BFloat16) {
    p.gradient16 = data<uint16_t>(gradient, "gradient", ScalarType::BFloat16, rows, columns);
  } else {
    p.gradient = data<float>(gradient, "gradient", ScalarType::Float, rows, columns);
  }
  const auto dtype = exp_avg.scalar_type();
  p.moments = dtype == ScalarType::Char        ? Moments::int8
              : dtype == ScalarType::BFloat16 ? Moments::bfloat16
                                              : Moments::float32;
  const auto kept = p.moments == Moments::float32 ? ScalarType::Float : dtype;
  const auto kept_sq = p.moments == Moments::int8 ? ScalarType::Byte : kept;
  p.exp_avg = data<void>(exp_avg, "exp_avg", kept, rows, columns);
  p.exp_avg_sq = data<void>(exp_avg_sq, "exp_avg_sq", kept_sq, rows, columns);
  if (p.moments == Moments::int8) {
    STD_TORCH_CHECK(exp_avg_scale.has_value() && exp_avg_sq_scale.has_value(), "8-bit moments need scales");
    p.exp_avg_scale = data<float>(*exp_avg_scale, "exp_avg_scale", ScalarType::Float, rows, blocks);
    p.exp_avg_sq_scale = data<float>(*exp_avg_sq_scale, "exp_avg_sq_scale", ScalarType::Float, rows, blocks);
  }
  if (grad_scale) {
    STD_TORCH_CHECK(
        grad_scale->is_cpu() && grad_scale->numel() == 1 && grad_scale->scalar_type() == ScalarType::Float,
        "grad_scale must be one float32 number on the CPU");
    p.grad_scale = *static_cast<const float*>(grad_scale->data_ptr());
  }
  float* fields[] = {&p.decay, &p.weight, &p.beta2, &p.share2, &p.correction, &p.eps, &p.rate};
  for (size_t i = 0; i < numbers.size(); ++i) *fields[i] = static_cast<float>(numbers[i]);
  p.from_gradient = from_gradient;
  p.key = static_cast<uint32_t>(key);
  p.first = static_cast<uint32_t>(first);
  // without scales rows mean nothing: blocks may cross them
  p.rows = p.moments == Moments::int8 ? rows : 1;
  p.columns = p.moments == Moments::int8 ? columns : rows * columns;
  const int64_t across = (p.columns + block_size - 1) / block_size;
  const Kernel& chosen = kernel();
  constexpr int64_t grain = 32;  // blocks that are worth a thread
  torch::stable::parallel_for(0, p.rows * across, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      chosen.update(p, block / across, block % across * block_size);
    }
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(whp_kernels_C, m) {
  m.def(
      "adamw_(Tensor(a!) weights, Tensor(b!)? remainder, Tensor gradient, Tensor(c!) exp_avg, "
      "Tensor(d!) exp_avg_sq, Tensor(e!)? exp_avg_scale, Tensor(f!)? exp_avg_sq_scale, Tensor? grad_scale, "
      "int first, int key, bool from_gradient, float[] numbers) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(whp_kernels_C, CPU, m) { m.impl("adamw_", TORCH_BOX(&adamw_)); }

}  // namespace
}  // namespace whp::adamw
