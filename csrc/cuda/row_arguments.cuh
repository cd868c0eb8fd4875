// What one launch of the row kernel is told, and how a row is cut into the slices of a cluster's blocks.
#pragma once

#include "row_terms.cuh"

#ifdef __CUDACC__
#define WHP_BOTH __host__ __device__ __forceinline__
#else
#define WHP_BOTH inline
#endif

namespace whp {

constexpr int kThreads = 512;       // of a block on the GPU
constexpr int kLargestCluster = 16;
constexpr int kWarp = 32;
constexpr int64_t kSharedLimit = 227 * 1024;  // bytes a block may have on sm_90 (opt-in)

// Rows of one teacher; `rows` says which row of it belongs to a row of the student (negative: none), or null.
struct Teacher {
  const void* data;
  int64_t stride;
  const int64_t* rows;
};

// Strides are in elements; all offsets are int64. Pointers carry no __restrict__: student, teachers and gradient may
// share storage.
struct Arguments {
  const void* student;
  int64_t student_stride;
  Teacher teachers[3];
  const int64_t* labels;
  const int64_t* edit_offsets;
  const int64_t* edit_tokens;
  const float* row_scale;
  void* gradient;
  int64_t gradient_stride;
  float* losses;
  int64_t* targets;
  float* entropy;
  int64_t* predicted;
  int64_t rows;
  int64_t ignore_index;
  int32_t vocabulary;
  int32_t packs;        // of 16 bytes of student logits in a block's slice
  int32_t teacher_count;
  Dtype student_dtype, teacher_dtype, gradient_dtype;
  Combination combination;
  Divergence divergence;
  Edit edit;
  float weight, beta, temperature, edit_value;
  bool statistics;
  bool aligned_inputs;    // every row of student and teachers begins at a multiple of 16 bytes
  bool aligned_gradient;  // every row of the gradient does
};

WHP_BOTH constexpr int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Columns in a pack: 16 bytes of student logits.
WHP_BOTH constexpr int pack_columns(Dtype student) { return static_cast<int>(16 / bytes_of(student)); }

WHP_BOTH constexpr int packs_of_block(int64_t vocabulary, Dtype student, int cluster) {
  const int64_t columns = pack_columns(student);
  const int64_t packs = (vocabulary + columns - 1) / columns;
  return static_cast<int>((packs + cluster - 1) / cluster);
}

constexpr int64_t kHeaderBytes = 2560;  // records that are exchanged; see Exchange in cluster_row.cuh

// Shared memory of a block: the student in its own dtype and, with teachers, the target in float32.
constexpr int64_t shared_bytes(int packs, Dtype student, bool target) {
  return kHeaderBytes + int64_t(packs) * (16 + (target ? 4 * pack_columns(student) : 0));
}

}  // namespace whp
