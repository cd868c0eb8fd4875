// What the row kernels are given: plain data only. The kernels are compiled once for each instruction set,
// and an inline function of the standard library or of torch, compiled for AVX-512, must never be the copy
// that the linker keeps.
#pragma once
#include <cstdint>

namespace whp {

enum class Dtype { float32, bfloat16, float16 };
enum class Combination { none, identity, whp, offset, difference, student_offset };  // difference: of three
enum class Divergence { label, hard, cross_entropy, forward_kl, reverse_kl, jsd };
enum class Edit { none, add, ban, mean };

constexpr int max_teachers = 3;

struct Matrix {
  char* data = nullptr;
  int64_t row_bytes = 0;
  Dtype dtype = Dtype::float32;
  const int64_t* rows = nullptr;  // which row of it belongs to row n; null: the same
};

// See losses/rows.py and losses/rule.py for the meaning of every field.
struct Problem {
  int64_t count = 0, vocabulary = 0;
  Matrix student, teachers[max_teachers], gradient;  // data is null for what is not there
  int n_teachers = 0;
  const int64_t* labels = nullptr;
  int64_t ignore_index = 0;
  const int64_t *edit_offsets = nullptr, *edit_tokens = nullptr;

  Combination combination = Combination::none;
  Divergence divergence = Divergence::label;
  Edit edit = Edit::none;
  float edit_value = 0, weight = 0, beta = 0.5f, temperature = 1, softcap = 0;
  bool relative_top = false, mask_outside = false;
  float log_fraction = 0;

  bool statistics = false;
  const float* row_scale = nullptr;
  float *losses = nullptr, *entropy = nullptr;
  int64_t *targets = nullptr, *predicted = nullptr;

  int64_t n_weights = 0;  // row_labels
  const double* weights = nullptr;
  int64_t *label_sets = nullptr, *own = nullptr;
};

// Sums over one tile, relative to the largest logits seen up to it.
struct TileSums {
  float t_peak, s_peak;
  double t_sum, s_sum, entropy, divergence;
};

// Memory of one thread.
struct Scratch {
  float* row[3];  // a whole row each: exponentials of the student and of the target, differences of logits
  float *base, *other[2], *student, *target, *out;  // a tile each
  TileSums* sums;                                   // one for each tile
};

struct Kernels {
  const char* name;
  int64_t tile_size;  // columns
  void (*losses)(const Problem&, int64_t row, const Scratch&);
  void (*labels)(const Problem&, int64_t row, const Scratch&);
};

extern const Kernels portable_kernels, avx2_kernels, avx512_kernels;

}  // namespace whp
