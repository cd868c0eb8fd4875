// The operators of kernels/whp_kernels/layers/attention.py: arguments and threads.
#include "attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <memory>
#include <new>
#include <tuple>

namespace whp::attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool has_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

bool has_avx512_bf16() {
#if defined(__x86_64__)
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool has_attention(ScalarType dtype) {
  return dtype == ScalarType::Float ? has_avx512() : dtype == ScalarType::BFloat16 && has_avx512_bf16();
}

const Kernels* kernels(ScalarType dtype) {
  STD_TORCH_CHECK(has_attention(dtype),
                  "causal_attention needs AVX-512 for float32 and AVX-512 BF16 for bfloat16");
#if defined(__x86_64__)
  return dtype == ScalarType::Float ? &float32_kernels : &bfloat16_kernels;
#else
  return nullptr;
#endif
}

View view_of(const Tensor& t, const char* name, const Tensor& q, int64_t places, int64_t heads) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == q.scalar_type() && t.dim() == 4 && t.size(0) == q.size(0) &&
                      t.size(1) == places && t.size(2) == heads && t.size(3) == q.size(3) && t.stride(3) == 1,
                  name, " must be a CPU tensor of the dtype of q, [", q.size(0), ", ", places, ", ", heads,
                  ", ", q.size(3), "], with adjacent columns");
  return {static_cast<char*>(t.data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

Problem problem_of(const Tensor& q, const Tensor& k, const Tensor& v, int64_t window, double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q and k must be [batch, places, heads, depth]");
  Problem p;
  p.batch = q.size(0);
  p.queries = q.size(1);
  p.heads = q.size(2);
  p.depth = q.size(3);
  p.keys = k.size(1);
  p.kv_heads = k.size(2);
  STD_TORCH_CHECK(p.batch > 0 && p.kv_heads > 0 && p.heads % p.kv_heads == 0 && p.depth > 0 && p.queries > 0 &&
                      p.queries <= p.keys && window >= 0,
                  "causal_attention got shapes, or a window, that do not fit");
  p.window = window;
  p.scale = static_cast<float>(scale);
  p.q = view_of(q, "q", q, p.queries, p.heads);
  p.k = view_of(k, "k", q, p.keys, p.kv_heads);
  p.v = view_of(v, "v", q, p.keys, p.kv_heads);
  return p;
}

template <class Run>
void for_items(const Kernels& kernels, const Problem& p, bool backward, Run run) {
  const int64_t bytes = kernels.scratch_bytes(p, backward);
  torch::stable::parallel_for(0, p.batch * p.kv_heads, 1, [&](int64_t begin, int64_t end) {
    constexpr std::align_val_t line{64};
    const auto free = [](char* memory) { ::operator delete[](memory, line); };
    const std::unique_ptr<char[], decltype(free)> scratch(
        static_cast<char*>(::operator new[](static_cast<size_t>(bytes), line)), free);
    for (int64_t item = begin; item < end; ++item) run(p, item, scratch.get());
  });
}

Tensor make(const Tensor& q, std::initializer_list<int64_t> size, ScalarType dtype) {
  return torch::stable::new_empty(q, size, dtype);
}

// out like q but contiguous, and log(sum(exp(scores))) [batch, heads, queries] float32
std::tuple<Tensor, Tensor> causal_attention(const Tensor& q, const Tensor& k, const Tensor& v, int64_t window,
                                            double scale) {
  Problem p = problem_of(q, k, v, window, scale);
  const Kernels* chosen = kernels(q.scalar_type());
  const Tensor out = make(q, {p.batch, p.queries, p.heads, p.depth}, q.scalar_type());
  const Tensor log_sums = make(q, {p.batch, p.heads, p.queries}, ScalarType::Float);
  p.out = view_of(out, "out", q, p.queries, p.heads);
  p.log_sums = static_cast<float*>(log_sums.data_ptr());
  for_items(*chosen, p, false, chosen->forward);
  return {out, log_sums};
}

std::tuple<Tensor, Tensor, Tensor> causal_attention_backward(const Tensor& g, const Tensor& q, const Tensor& k,
                                                             const Tensor& v, const Tensor& log_sums,
                                                             int64_t window, double scale) {
  Problem p = problem_of(q, k, v, window, scale);
  const Kernels* chosen = kernels(q.scalar_type());
  STD_TORCH_CHECK(log_sums.is_contiguous() && log_sums.scalar_type() == ScalarType::Float &&
                      log_sums.numel() == p.batch * p.heads * p.queries,
                  "log_sums must be contiguous float32, [batch, heads, queries]");
  p.log_sums = static_cast<float*>(log_sums.data_ptr());
  p.g = view_of(g, "g", q, p.queries, p.heads);
  const Tensor g_q = make(q, {p.batch, p.queries, p.heads, p.depth}, q.scalar_type());
  const Tensor g_k = make(q, {p.batch, p.keys, p.kv_heads, p.depth}, q.scalar_type());
  const Tensor g_v = make(q, {p.batch, p.keys, p.kv_heads, p.depth}, q.scalar_type());
  p.g_q = view_of(g_q, "g_q", q, p.queries, p.heads);
  p.g_k = view_of(g_k, "g_k", q, p.keys, p.kv_heads);
  p.g_v = view_of(g_v, "g_v", q, p.keys, p.kv_heads);
  for_items(*chosen, p, true, chosen->backward);
  return {g_q, g_k, g_v};
}

STABLE_TORCH_LIBRARY_FRAGMENT(whp_kernels_C, m) {
  m.def(
      "causal_attention(Tensor q, Tensor k, Tensor v, int window, float scale) -> (Tensor, Tensor)");
  m.def(
      "causal_attention_backward(Tensor g, Tensor q, Tensor k, Tensor v, Tensor log_sums, int window, "
      "float scale) -> (Tensor, Tensor, Tensor)");
  m.def("has_attention(ScalarType dtype) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(whp_kernels_C, CPU, m) {
  m.impl("causal_attention", TORCH_BOX(&causal_attention));
  m.impl("causal_attention_backward", TORCH_BOX(&causal_attention_backward));
}

STABLE_TORCH_LIBRARY_IMPL(whp_kernels_C, CompositeExplicitAutograd, m) {
  m.impl("has_attention", TORCH_BOX(&has_attention));
}

}  // namespace
}  // namespace whp::attention
