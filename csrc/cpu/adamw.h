// What the AdamW kernels are given: plain data only, as in rows.h and for the same reason.
#pragma once
#include <cstdint>

namespace whp::adamw {

enum class Moments { float32, bfloat16, int8 };

constexpr int block_size = 1024;  // elements of a call; with 8-bit moments, those that share a scale

// See optim/update.py for the meaning of every field. All arrays are [rows, columns], scales [rows, blocks].
struct Problem {
  int64_t rows = 0, columns = 0;
  float* weights = nullptr;   // either these
  uint16_t* high = nullptr;   // or these
  int16_t* remainder = nullptr;
  const float* gradient = nullptr;      // either this
  const uint16_t* gradient16 = nullptr;  // or this, bfloat16
  Moments moments = Moments::float32;
  void *exp_avg = nullptr, *exp_avg_sq = nullptr;
  float *exp_avg_scale = nullptr, *exp_avg_sq_scale = nullptr;

  float grad_scale = 1, decay = 1, weight = 0, beta2 = 0, share2 = 0, correction = 1, eps = 0, rate = 0;
  bool from_gradient = false;
  uint32_t key = 0, first = 0;  // of the random bits; number of the first element
};

struct Kernel {
  const char* name;
  // the elements of a row from a column on, at most block_size
  void (*update)(const Problem&, int64_t row, int64_t column);
};

extern const Kernel portable_kernel, avx2_kernel, avx512_kernel;

}  // namespace whp::adamw
