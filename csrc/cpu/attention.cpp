// The operators of kernels/whp_kernels/layers/attention.py: arguments and threads. A batch is [batch, places] of
// equal lengths, or sequences of any lengths after each other.
#include "attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

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

struct Free {
  void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};

std::unique_ptr<char[], Free> aligned(int64_t bytes) {
  return std::unique_ptr<char[], Free>(
      static_cast<char*>(::operator new[](static_cast<size_t>(bytes), std::align_val_t{64})));
}

template <class Run>
void for_items(const Kernels& kernels, const Problem& p, bool backward, Run run) {
  const int64_t bytes = kernels.scratch_bytes(p, backward);
  torch::stable::parallel_for(0, p.batch * p.kv_heads, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = aligned(bytes);
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

// -------------------------------------------------------------------------------------------- packed sequences

View packed_view(const Tensor& t, const char* name, const Tensor& q, int64_t heads) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == q.scalar_type() && t.dim() == 3 && t.size(0) == q.size(0) &&
                      t.size(1) == heads && t.size(2) == q.size(2) && t.stride(2) == 1,
                  name, " must be a CPU tensor of the dtype of q, [", q.size(0), ", ", heads, ", ", q.size(2),
                  "], with adjacent columns");
  return {static_cast<char*>(t.data_ptr()), 0, t.stride(0), t.stride(1)};
}

// All sequences of a packed batch: what they share, and where each begins.
struct Packed {
  Problem all;  // of the longest sequence, its views at the first token of the batch
  std::vector<int64_t> starts, order;  // order: the longest first, so that no thread is left with one at the end
  int64_t item_bytes;                  // of a number of q

  Packed(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, int64_t window,
         double scale) {
    STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3, "q and k must be [tokens, heads, depth]");
    STD_TORCH_CHECK(cu_seqlens.is_cpu() && cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0 &&
                        cu_seqlens.is_contiguous() && cu_seqlens.scalar_type() == ScalarType::Int,
                    "cu_seqlens must be a contiguous int32 CPU tensor [sequences + 1]");
    const auto* ends = static_cast<const int32_t*>(cu_seqlens.data_ptr());
    starts.assign(ends, ends + cu_seqlens.size(0));
    int64_t longest = 0;
    for (size_t i = 0; i + 1 < starts.size(); ++i) {
      STD_TORCH_CHECK(starts[i] <= starts[i + 1], "cu_seqlens must not fall");
      longest = std::max(longest, starts[i + 1] - starts[i]);
      if (starts[i] < starts[i + 1]) order.push_back(static_cast<int64_t>(i));
    }
    STD_TORCH_CHECK(starts.front() == 0 && starts.back() == q.size(0),
                    "cu_seqlens must rise from 0 to the number of tokens");
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length(a) > length(b); });
    item_bytes = q.scalar_type() == ScalarType::Float ? 4 : 2;
    all.batch = 1;
    all.queries = all.keys = longest;
    all.heads = q.size(1);
    all.kv_heads = k.size(1);
    all.depth = q.size(2);
    STD_TORCH_CHECK(all.kv_heads > 0 && all.heads % all.kv_heads == 0 && all.depth > 0 && window >= 0,
                    "causal_attention_packed got shapes, or a window, that do not fit");
    all.window = window;
    all.scale = static_cast<float>(scale);
    all.q = packed_view(q, "q", q, all.heads);
    all.k = packed_view(k, "k", q, all.kv_heads);
    all.v = packed_view(v, "v", q, all.kv_heads);
  }

  int64_t length(int64_t sequence) const { return starts[sequence + 1] - starts[sequence]; }

  Problem of(int64_t sequence) const {
    Problem p = all;
    p.queries = p.keys = length(sequence);
    for (View* view : {&p.q, &p.k, &p.v, &p.out, &p.g, &p.g_q, &p.g_k, &p.g_v}) {
      if (view->data) view->data += starts[sequence] * view->place_stride * item_bytes;
    }
    p.log_sums += starts[sequence] * p.heads;  // [heads, length] of each sequence, one after the other
    return p;
  }

  // Items are of unequal length, so threads take the next one when they are done with the last.
  template <class Run>
  void for_items(const Kernels& kernels, bool backward, Run run) const {
    if (order.empty()) return;
    const int64_t bytes = kernels.scratch_bytes(all, backward);
    const int64_t items = static_cast<int64_t>(order.size()) * all.kv_heads;
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, items, 1, [&](int64_t, int64_t) {
      const auto scratch = aligned(bytes);
      for (int64_t item = next++; item < items; item = next++) {
        run(of(order[item / all.kv_heads]), item % all.kv_heads, scratch.get());
      }
    });
  }
};

// out like q but contiguous, and log(sum(exp(scores))) float32 [tokens * heads]
std::tuple<Tensor, Tensor> causal_attention_packed(const Tensor& q, const Tensor& k, const Tensor& v,
                                                   const Tensor& cu_seqlens, int64_t window, double scale) {
  const Kernels* chosen = kernels(q.scalar_type());
  Packed packed(q, k, v, cu_seqlens, window, scale);
  Problem& p = packed.all;
  const Tensor out = make(q, {q.size(0), p.heads, p.depth}, q.scalar_type());
  const Tensor log_sums = make(q, {q.size(0) * p.heads}, ScalarType::Float);
  p.out = packed_view(out, "out", q, p.heads);
  p.log_sums = static_cast<float*>(log_sums.data_ptr());
  packed.for_items(*chosen, false, chosen->forward);
  return {out, log_sums};
}

std::tuple<Tensor, Tensor, Tensor> causal_attention_packed_backward(
    const Tensor& g, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& log_sums,
    const Tensor& cu_seqlens, int64_t window, double scale) {
  const Kernels* chosen = kernels(q.scalar_type());
  Packed packed(q, k, v, cu_seqlens, window, scale);
  Problem& p = packed.all;
  STD_TORCH_CHECK(log_sums.is_contiguous() && log_sums.scalar_type() == ScalarType::Float &&
                      log_sums.numel() == q.size(0) * p.heads,
                  "log_sums must be contiguous float32, [tokens * heads]");
  p.log_sums = static_cast<float*>(log_sums.data_ptr());
  p.g = packed_view(g, "g", q, p.heads);
  const Tensor g_q = make(q, {q.size(0), p.heads, p.depth}, q.scalar_type());
  const Tensor g_k = make(q, {q.size(0), p.kv_heads, p.depth}, q.scalar_type());
  const Tensor g_v = make(q, {q.size(0), p.kv_heads, p.depth}, q.scalar_type());
  p.g_q = packed_view(g_q, "g_q", q, p.heads);
  p.g_k = packed_view(g_k, "g_k", q, p.kv_heads);
  p.g_v = packed_view(g_v, "g_v", q, p.kv_heads);
  packed.for_items(*chosen, true, chosen->backward);
  return {g_q, g_k, g_v};
}

STABLE_TORCH_LIBRARY_FRAGMENT(whp_kernels_C, m) {
  m.def(
      "causal_attention(Tensor q, Tensor k, Tensor v, int window, float scale) -> (Tensor, Tensor)");
  m.def(
      "causal_attention_backward(Tensor g, Tensor q, Tensor k, Tensor v, Tensor log_sums, int window, "
      "float scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "causal_attention_packed(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int window, float scale) -> "
      "(Tensor, Tensor)");
  m.def(
      "causal_attention_packed_backward(Tensor g, Tensor q, Tensor k, Tensor v, Tensor log_sums, "
      "Tensor cu_seqlens, int window, float scale) -> (Tensor, Tensor, Tensor)");
  m.def("has_attention(ScalarType dtype) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(whp_kernels_C, CPU, m) {
  m.impl("causal_attention", TORCH_BOX(&causal_attention));
  m.impl("causal_attention_backward", TORCH_BOX(&causal_attention_backward));
  m.impl("causal_attention_packed", TORCH_BOX(&causal_attention_packed));
  m.impl("causal_attention_packed_backward", TORCH_BOX(&causal_attention_packed_backward));
}

STABLE_TORCH_LIBRARY_IMPL(whp_kernels_C, CompositeExplicitAutograd, m) {
  m.impl("has_attention", TORCH_BOX(&has_attention));
}

}  // namespace
}  // namespace whp::attention
