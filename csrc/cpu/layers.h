// What the layer kernels are given: plain data only, for the reason given in rows.h.
#pragma once
#include <cstdint>

namespace whp::layers {

enum class Element { float32, bfloat16 };

// Rows of `width` adjacent elements each, one row after the other; data is null for what is not there.
struct Rows {
  char* data = nullptr;
  Element element = Element::float32;
};

// See layers/rms_norm.py for the formulas.
struct Norm {
  int64_t width = 0;
  float eps = 0;
  Rows x, branch;
  const float* weight = nullptr;
  float* scale = nullptr;  // 1 / rms of every row
  Rows sum, out;           // of the forward pass: x + branch, and what is normalised
  Rows g_sum, g_out;       // of the backward pass; g_sum may be missing
  Rows g_x, g_branch;      // written by it; g_branch may be missing
};

// Heads of a tensor [batch, places, heads, 2 * half]; strides in elements.
struct Heads {
  char* data = nullptr;
  Element element = Element::float32;
  int64_t batch_stride = 0, place_stride = 0, head_stride = 0;
};

// See layers/rope.py.
struct Rope {
  int64_t places = 0, heads = 0, half = 0;
  Heads from, to;
  const float *cos = nullptr, *sin = nullptr;  // [places, 2 * half], or one such table for each of the batch
  int64_t table_stride = 0;                    // from one of the batch to the next: 0 if they share it
  bool inverse = false;                        // the transposed rotation: of gradients
};

struct Kernels {
  const char* name;
  // rows [begin, end); `buffers`: norm_buffers rows of padded_width(width) floats, 64-byte aligned
  void (*norm_forward)(const Norm&, int64_t begin, int64_t end, float* buffers);
  // the same; adds to d_weight [padded_width(width)], which may be null
  void (*norm_backward)(const Norm&, int64_t begin, int64_t end, float* buffers, float* d_weight);
  // elements [begin, end)
  void (*swiglu_forward)(Element, const char* gate, const char* up, char* out, int64_t begin, int64_t end);
  void (*swiglu_backward)(Element, const char* g, const char* gate, const char* up, char* g_gate, char* g_up,
                          int64_t begin, int64_t end);
  // rows [begin, end) of batch * places
  void (*rope)(const Rope&, int64_t begin, int64_t end);
};

constexpr int64_t norm_buffers = 3;
inline int64_t padded_width(int64_t width) { return (width + 15) / 16 * 16; }

extern const Kernels portable_kernels, avx2_kernels, avx512_kernels;

}  // namespace whp::layers
