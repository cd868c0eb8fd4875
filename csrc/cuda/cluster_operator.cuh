// The operator's schema, and its tensors turned into what the kernel is told. PyTorch's stable ABI only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "row_arguments.cuh"

namespace whp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Choices are integers in the order of the enumerations of row_terms.cuh. Results are written into the given tensors.
constexpr const char* kClusterSchema =
    "cluster_row_losses(Tensor student, Tensor[] teachers, Tensor?[] teacher_rows, Tensor? labels, "
    "Tensor? edit_offsets, Tensor? edit_tokens, Tensor? row_scale, Tensor(a!)? gradient, Tensor(b!) losses, "
    "Tensor(c!) targets, Tensor(d!) entropy, Tensor(e!) predicted, int combination, float weight, int divergence, "
    "float beta, float temperature, int edit, float edit_value, int ignore_index, bool statistics, int cluster) -> ()";

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      STD_TORCH_CHECK(false, "cluster_row_losses: ", name, " must be float32, bfloat16 or float16");
  }
  return Dtype::float32;
}

inline void check_matrix(const Tensor& tensor, const char* name, int64_t vocabulary) {
  STD_TORCH_CHECK(
      tensor.dim() == 2 && tensor.size(1) == vocabulary && (tensor.stride(1) == 1 || vocabulary == 1),
      "cluster_row_losses: ", name, " must be a matrix of ", vocabulary, " adjacent columns");
}

// A vector of `count` elements, or null where there is none.
template <class T>
T* vector_of(const std::optional<Tensor>& tensor, const char* name, ScalarType dtype, int64_t count) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(
      tensor->dim() == 1 && tensor->scalar_type() == dtype && tensor->is_contiguous() &&
          (count < 0 || tensor->size(0) == count),
      "cluster_row_losses: ", name, " must be a contiguous vector of its dtype, of ", count, " elements");
  return static_cast<T*>(tensor->data_ptr());
}

// Whether every row begins at a multiple of 16 bytes.
inline bool rows_aligned(const Tensor& tensor, Dtype dtype) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0 && tensor.stride(0) * bytes_of(dtype) % 16 == 0;
}

// `launch(arguments, cluster, device index)` runs the kernel.
template <void (*launch)(const Arguments&, int, int32_t)>
void cluster_row_losses(
    Tensor student, std::vector<Tensor> teachers, std::vector<std::optional<Tensor>> teacher_rows,
    std::optional<Tensor> labels, std::optional<Tensor> edit_offsets, std::optional<Tensor> edit_tokens,
    std::optional<Tensor> row_scale, std::optional<Tensor> gradient, Tensor losses, Tensor targets, Tensor entropy,
    Tensor predicted, int64_t combination, double weight, int64_t divergence, double beta, double temperature,
    int64_t edit, double edit_value, int64_t ignore_index, bool statistics, int64_t cluster) {
  STD_TORCH_CHECK(student.dim() == 2, "cluster_row_losses: the student must be a matrix");
  const int64_t n = student.size(0), vocabulary = student.size(1);
  STD_TORCH_CHECK(
      vocabulary > 0 && vocabulary < kNowhere, "cluster_row_losses: a vocabulary of ", vocabulary, " is not supported");
  STD_TORCH_CHECK(
      cluster >= 1 && cluster <= kLargestCluster && (cluster & (cluster - 1)) == 0,
      "cluster_row_losses: a cluster of ", cluster, " blocks does not exist, give 1, 2, 4, 8 or 16");
  STD_TORCH_CHECK(
      combination >= 0 && combination <= 3 && divergence >= 0 && divergence <= 5 && edit >= 0 && edit <= 2,
      "cluster_row_losses: unknown combination, divergence or edit");
  check_matrix(student, "the student", vocabulary);

  Arguments a{};
  a.student = student.data_ptr();
  a.student_stride = student.stride(0);
  a.student_dtype = dtype_of(student, "the student");
  a.aligned_inputs = rows_aligned(student, a.student_dtype);
  a.combination = static_cast<Combination>(combination);
  a.divergence = static_cast<Divergence>(divergence);
  a.edit = static_cast<Edit>(edit);

  const auto count = static_cast<int64_t>(teachers.size());
  const bool fits = a.combination == Combination::none       ? count == 0
                    : a.combination == Combination::identity ? count == 1
                    : a.combination == Combination::whp      ? count == 2
                                                             : count == 2 || count == 3;
  STD_TORCH_CHECK(fits, "cluster_row_losses: the combination does not take ", count, " teachers");
  STD_TORCH_CHECK(
      (a.combination == Combination::none) == (a.divergence == Divergence::label),
      "cluster_row_losses: the divergence 'label' goes without teachers, every other with them");
  STD_TORCH_CHECK(
      teacher_rows.empty() || teacher_rows.size() == teachers.size(),
      "cluster_row_losses: ", teacher_rows.size(), " teacher_rows for ", count, " teachers");
  a.teacher_count = static_cast<int32_t>(count);
  for (size_t k = 0; k < teachers.size(); ++k) {
    const Tensor& teacher = teachers[k];
    check_matrix(teacher, "a teacher", vocabulary);
    const Dtype dtype = dtype_of(teacher, "a teacher");
    STD_TORCH_CHECK(k == 0 || dtype == a.teacher_dtype, "cluster_row_losses: the teachers' dtypes differ");
    a.teacher_dtype = dtype;
    const int64_t* of =
        teacher_rows.empty() ? nullptr : vector_of<int64_t>(teacher_rows[k], "teacher_rows", ScalarType::Long, n);
    const bool gathered = !teacher_rows.empty() && teacher_rows[k].has_value();
    STD_TORCH_CHECK(gathered || teacher.size(0) == n, "cluster_row_losses: a teacher has not ", n, " rows");
    a.teachers[k] = {teacher.data_ptr(), teacher.stride(0), of};
    a.aligned_inputs = a.aligned_inputs && rows_aligned(teacher, dtype);
  }

  a.labels = vector_of<int64_t>(labels, "labels", ScalarType::Long, n);
  STD_TORCH_CHECK(
      labels.has_value() || a.divergence != Divergence::label, "cluster_row_losses: 'label' needs labels");
  a.edit_offsets = vector_of<int64_t>(edit_offsets, "edit_offsets", ScalarType::Long, n + 1);
  a.edit_tokens = vector_of<int64_t>(edit_tokens, "edit_tokens", ScalarType::Long, -1);
  STD_TORCH_CHECK(
      a.edit == Edit::none || (edit_offsets.has_value() && edit_tokens.has_value()),
      "cluster_row_losses: edits need their offsets and tokens");
  a.row_scale = vector_of<float>(row_scale, "row_scale", ScalarType::Float, n);
  if (gradient.has_value()) {
    check_matrix(*gradient, "the gradient", vocabulary);
    STD_TORCH_CHECK(
        gradient->size(0) == n && row_scale.has_value(), "cluster_row_losses: a gradient needs a scale for each row");
    a.gradient = gradient->data_ptr();
    a.gradient_stride = gradient->stride(0);
    a.gradient_dtype = dtype_of(*gradient, "the gradient");
    a.aligned_gradient = rows_aligned(*gradient, a.gradient_dtype);
  }
  a.losses = vector_of<float>(losses, "losses", ScalarType::Float, n);
  a.targets = vector_of<int64_t>(targets, "targets", ScalarType::Long, n);
  a.entropy = vector_of<float>(entropy, "entropy", ScalarType::Float, n);
  a.predicted = vector_of<int64_t>(predicted, "predicted", ScalarType::Long, n);

  a.rows = n;
  a.vocabulary = static_cast<int32_t>(vocabulary);
  a.packs = packs_of_block(vocabulary, a.student_dtype, static_cast<int>(cluster));
  a.ignore_index = ignore_index;
  a.weight = static_cast<float>(weight);
  a.beta = static_cast<float>(beta);
  a.temperature = static_cast<float>(temperature);
  a.edit_value = static_cast<float>(edit_value);
  a.statistics = statistics;
  const int64_t bytes = shared_bytes(a.packs, a.student_dtype, count > 0);
  STD_TORCH_CHECK(
      bytes <= kSharedLimit, "cluster_row_losses: ", vocabulary, " columns over ", cluster, " blocks need ", bytes,
      " bytes of shared memory each, there are ", kSharedLimit);
  if (n > 0) launch(a, static_cast<int>(cluster), student.get_device_index());
}

}  // namespace whp
