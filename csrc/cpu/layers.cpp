// The operators of kernels/whp_kernels/layers/cpp.py: arguments, choice of the instruction set, threads.
#include "layers.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

namespace whp::layers {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ------------------------------------------------------------------------------------------ instruction set

std::vector<const Kernels*> kernels_of_this_machine() {  // the best first
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) found.push_back(&avx512_kernels);
  if (avx2) found.push_back(&avx2_kernels);
#endif
  found.push_back(&portable_kernels);
  return found;
}

// WHP_KERNELS_ISA asks for another one than the best, as in rows.cpp.
const Kernels& kernels() {
  static const std::vector<const Kernels*> found = kernels_of_this_machine();
  const char* asked = std::getenv("WHP_KERNELS_ISA");
  if (asked == nullptr || *asked == '\0') return *found.front();
  for (const Kernels* candidate : found) {
    if (std::strcmp(candidate->name, asked) == 0) return *candidate;
  }
  STD_TORCH_CHECK(false, "WHP_KERNELS_ISA is ", asked, ", but this machine has only what cpu_isas() lists");
}

// ------------------------------------------------------------------------------------------------ arguments

Element element_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
  if (t.scalar_type() == ScalarType::Float) return Element::float32;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::BFloat16, name, " must be float32 or bfloat16");
  return Element::bfloat16;
}

char* data_of(const Tensor& t) { return static_cast<char*>(t.data_ptr()); }

Rows rows_of(const Tensor& t, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(t.is_contiguous() && t.dim() == like.dim() && t.numel() == like.numel() &&
                      t.size(t.dim() - 1) == like.size(like.dim() - 1),
                  name, " must be contiguous and of the same shape as the others");
  return {data_of(t), element_of(t, name)};
}

Tensor make(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
  return torch::stable::new_empty(like, size, dtype);
}

Tensor make_like(const Tensor& like, ScalarType dtype) {
  return torch::stable::new_empty(like, like.sizes(), dtype);
}

// [..., width] as rows
int64_t rows_in(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() >= 1, name, " must be [..., width]");
  return t.size(t.dim() - 1) == 0 ? 0 : t.numel() / t.size(t.dim() - 1);
}

// The weight in float32, padded with zeros.
std::vector<float> widened(const Tensor& weight, int64_t width) {
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == width && weight.is_contiguous(),
                  "weight must be contiguous, [", width, "]");
  std::vector<float> values(padded_width(width), 0.0f);
  if (element_of(weight, "weight") == Element::float32) {
    std::memcpy(values.data(), weight.data_ptr(), width * sizeof(float));
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(weight.data_ptr());
    for (int64_t j = 0; j < width; ++j) {
      const uint32_t bits = static_cast<uint32_t>(from[j]) << 16;
      std::memcpy(&values[j], &bits, sizeof(bits));
    }
  }
  return values;
}

// -------------------------------------------------------------------------------------------------- threads

constexpr int64_t least_elements = 1 << 14;  // of one thread: some microseconds

int64_t rows_a_thread(int64_t width) {
  return std::max<int64_t>(1, least_elements / std::max<int64_t>(width, 1));
}

// 64-byte aligned floats
class Floats {
 public:
  explicit Floats(int64_t count) : memory_(new float[count + 16]) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.get());
    start_ = memory_.get() + (64 - address % 64) % 64 / sizeof(float);
  }
  float* get() const { return start_; }

 private:
  std::unique_ptr<float[]> memory_;
  float* start_;
};

// ---------------------------------------------------------------------------------------------------- RMSNorm

// x + branch (no elements without a branch), its norm, and 1 / rms of the rows
std::tuple<Tensor, Tensor, Tensor> rms_norm(const Tensor& x, const std::optional<Tensor>& branch,
                                            const Tensor& weight, double eps, bool narrow) {
  const int64_t rows = rows_in(x, "x"), width = x.size(x.dim() - 1);
  Norm p;
  p.width = width;
  p.eps = static_cast<float>(eps);
  p.x = rows_of(x, "x", x);
  const Tensor sum = branch ? make_like(x, x.scalar_type()) : make(x, {0}, x.scalar_type());
  if (branch) {
    p.branch = rows_of(*branch, "branch", x);
    p.sum = rows_of(sum, "sum", x);
  }
  const Tensor out = make_like(x, narrow ? ScalarType::BFloat16 : ScalarType::Float);
  p.out = rows_of(out, "out", x);
  std::vector<int64_t> lead;
  for (int64_t k = 0; k + 1 < x.dim(); ++k) lead.push_back(x.size(k));
  const Tensor scale = torch::stable::new_empty(
      x, torch::headeronly::IntHeaderOnlyArrayRef(lead.data(), lead.size()), ScalarType::Float);
  p.scale = static_cast<float*>(scale.data_ptr());
  const std::vector<float> wide = widened(weight, width);
  p.weight = wide.data();
  const Kernels& chosen = kernels();
  torch::stable::parallel_for(0, rows, rows_a_thread(width), [&](int64_t begin, int64_t end) {
    const Floats buffers(norm_buffers * padded_width(width));
    chosen.norm_forward(p, begin, end, buffers.get());
  });
  return {sum, out, scale};
}

// The gradients of x, of the branch (no elements where x has its dtype: it is that of x), and of the weight in
// float32 (no elements unless asked for). g_sum: the gradient that x + branch has from elsewhere.
//
// Rows are summed up for the weight in at most 64 parts, however many threads there are: so the result does
// not depend on their number.
std::tuple<Tensor, Tensor, Tensor> rms_norm_backward(const Tensor& g_out, const std::optional<Tensor>& g_sum,
                                                     const Tensor& sum, const Tensor& weight,
                                                     const Tensor& scale, bool narrow_branch,
                                                     bool weight_too) {
  const int64_t rows = rows_in(sum, "sum"), width = sum.size(sum.dim() - 1), padded = padded_width(width);
  Norm p;
  p.width = width;
  p.sum = rows_of(sum, "sum", sum);
  p.g_out = rows_of(g_out, "g_out", sum);
  if (g_sum) p.g_sum = rows_of(*g_sum, "g_sum", sum);
  const Tensor g_x = make_like(sum, sum.scalar_type());
  p.g_x = rows_of(g_x, "g_x", sum);
  const bool apart = narrow_branch && p.sum.element == Element::float32;
  const Tensor g_branch =
      apart ? make_like(sum, ScalarType::BFloat16) : make(sum, {0}, ScalarType::BFloat16);
  if (apart) p.g_branch = rows_of(g_branch, "g_branch", sum);
  STD_TORCH_CHECK(scale.is_contiguous() && scale.numel() == rows && scale.scalar_type() == ScalarType::Float,
                  "scale must be contiguous float32, [", rows, "]");
  p.scale = static_cast<float*>(scale.data_ptr());
  const std::vector<float> wide = widened(weight, width);
  p.weight = wide.data();

  const int64_t size = std::max<int64_t>((rows + 63) / 64, 8);
  const int64_t parts = (rows + size - 1) / size;
  const Floats partial(weight_too ? std::max<int64_t>(parts, 1) * padded : 0);
  std::fill_n(partial.get(), weight_too ? std::max<int64_t>(parts, 1) * padded : 0, 0.0f);
  const Kernels& chosen = kernels();
  torch::stable::parallel_for(0, parts, std::max<int64_t>(1, rows_a_thread(width) / size), [&](int64_t begin, int64_t end) {
    const Floats buffers(norm_buffers * padded);
    for (int64_t part = begin; part < end; ++part) {
      chosen.norm_backward(p, part * size, std::min(rows, (part + 1) * size), buffers.get(),
                           weight_too ? partial.get() + part * padded : nullptr);
    }
  });
  const Tensor g_weight = make(sum, {weight_too ? width : 0}, ScalarType::Float);
  if (weight_too) {
    std::vector<double> total(width, 0.0);
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t j = 0; j < width; ++j) total[j] += partial.get()[part * padded + j];
    }
    float* to = static_cast<float*>(g_weight.data_ptr());
    for (int64_t j = 0; j < width; ++j) to[j] = static_cast<float>(total[j]);
  }
  return {g_x, g_branch, g_weight};
}

// ----------------------------------------------------------------------------------------------------- SwiGLU

void check_alike(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == like.numel() && t.scalar_type() == like.scalar_type(), name,
                  " must be contiguous, of the size and dtype of gate");
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  const Element element = element_of(gate, "gate");
  check_alike(gate, gate, "gate");
  check_alike(up, gate, "up");
  const Tensor out = torch::stable::empty_like(gate);
  const Kernels& chosen = kernels();
  torch::stable::parallel_for(0, gate.numel(), least_elements, [&](int64_t begin, int64_t end) {
    chosen.swiglu_forward(element, data_of(gate), data_of(up), data_of(out), begin, end);
  });
  return out;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& g, const Tensor& gate, const Tensor& up) {
  const Element element = element_of(gate, "gate");
  check_alike(gate, gate, "gate");
  check_alike(up, gate, "up");
  check_alike(g, gate, "g");
  const Tensor g_gate = torch::stable::empty_like(gate), g_up = torch::stable::empty_like(gate);
  const Kernels& chosen = kernels();
  torch::stable::parallel_for(0, gate.numel(), least_elements, [&](int64_t begin, int64_t end) {
    chosen.swiglu_backward(element, data_of(g), data_of(gate), data_of(up), data_of(g_gate), data_of(g_up),
                           begin, end);
  });
  return {g_gate, g_up};
}

// ------------------------------------------------------------------------------------------------------- RoPE

Heads heads_of(const Tensor& t) {
  return {data_of(t), element_of(t, "x"), t.stride(0), t.stride(1), t.stride(2)};
}

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(3) % 2 == 0 && (x.size(3) == 0 || x.stride(3) == 1),
                  "x must be [batch, places, heads, an even depth] with adjacent columns");
  Rope p;
  p.places = x.size(1);
  p.heads = x.size(2);
  p.half = x.size(3) / 2;
  p.inverse = inverse;
  const int64_t one = p.places * x.size(3);
  for (const Tensor* table : {&cos, &sin}) {
    STD_TORCH_CHECK(table->is_cpu() && table->scalar_type() == ScalarType::Float && table->is_contiguous() &&
                        (table->numel() == one || table->numel() == x.size(0) * one) &&
                        table->numel() == cos.numel(),
                    "cos and sin must be contiguous float32, [places, depth] or [batch, places, depth]");
  }
  p.table_stride = cos.numel() == one ? 0 : one;
  p.cos = static_cast<const float*>(cos.data_ptr());
  p.sin = static_cast<const float*>(sin.data_ptr());
  const Tensor out = make(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type());
  p.from = heads_of(x);
  p.to = heads_of(out);
  const Kernels& chosen = kernels();
  torch::stable::parallel_for(0, x.size(0) * p.places, rows_a_thread(p.heads * x.size(3)),
                              [&](int64_t begin, int64_t end) { chosen.rope(p, begin, end); });
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(whp_kernels_C, m) {
  m.def(
      "rms_norm(Tensor x, Tensor? branch, Tensor weight, float eps, bool narrow) -> (Tensor, Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor g_out, Tensor? g_sum, Tensor sum, Tensor weight, Tensor scale, "
      "bool narrow_branch, bool weight_too) -> (Tensor, Tensor, Tensor)");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor g, Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.def("rope(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(whp_kernels_C, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  m.impl("rope", TORCH_BOX(&rope));
}

}  // namespace
}  // namespace whp::layers
