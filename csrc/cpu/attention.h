// Causal attention on the CPU: what attention.cpp, compiled for any machine, and the files of the instruction
// sets share. Plain data only, for the reason given in rows.h.
#pragma once
#include <cstdint>

namespace whp::attention {

// [batch, places, heads, depth] with adjacent columns; strides in elements; null for what is not there.
struct View {
  char* data = nullptr;
  int64_t batch_stride = 0, place_stride = 0, head_stride = 0;
};

// Query i stands at place keys - queries + i and sees the places up to its own, at most `window` of them.
struct Problem {
  int64_t batch = 0, heads = 0, kv_heads = 0, queries = 0, keys = 0, depth = 0;
  int64_t window = 0;  // 0: all
  float scale = 1;     // of the scores
  View q, k, v, out;
  float* log_sums = nullptr;  // [batch, heads, queries]: log(sum(exp(scores))) of every query
  View g, g_q, g_k, g_v;      // of the backward pass: the gradient of out, and what it writes
};

// An item is one key head of one row of the batch, with the query heads that share it.
struct Kernels {
  int64_t (*scratch_bytes)(const Problem&, bool backward);
  void (*forward)(const Problem&, int64_t item, char* scratch);  // scratch begins at a multiple of 64 bytes
  void (*backward)(const Problem&, int64_t item, char* scratch);
};

#if defined(__x86_64__)
extern const Kernels bfloat16_kernels;  // AVX-512 with BF16
extern const Kernels float32_kernels;   // AVX-512
#endif

}  // namespace whp::attention
