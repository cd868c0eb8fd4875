// The operators row_losses and row_labels of losses/cpp.py: arguments, choice of the instruction set,
// threads.
#include "rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace whp {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ------------------------------------------------------------------------------------------ instruction set

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

std::vector<const Kernels*> kernels_of_this_machine() {  // the best first
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  if (has_avx512()) found.push_back(&avx512_kernels);
  if (has_avx2()) found.push_back(&avx2_kernels);
#endif
  found.push_back(&portable_kernels);
  return found;
}

// WHP_KERNELS_ISA asks for another one than the best; it is read at every call, so that tests can compare
// them.
const Kernels& kernels() {
  static const std::vector<const Kernels*> found = kernels_of_this_machine();
  const char* asked = std::getenv("WHP_KERNELS_ISA");
  if (asked == nullptr || *asked == '\0') return *found.front();
  for (const Kernels* candidate : found) {
    if (std::strcmp(candidate->name, asked) == 0) return *candidate;
  }
  STD_TORCH_CHECK(false, "WHP_KERNELS_ISA is ", asked, ", but this machine has only what cpu_isas() lists");
}

std::string cpu_isas() {
  std::string names;
  for (const Kernels* candidate : kernels_of_this_machine()) {
    names += (names.empty() ? "" : " ") + std::string(candidate->name);
  }
  return names;
}

// ------------------------------------------------------------------------------------------------ arguments

template <class Choice>
Choice choice(const std::string& text, std::initializer_list<std::pair<const char*, Choice>> names) {
  for (const auto& [name, value] : names) {
    if (text == name) return value;
  }
  STD_TORCH_CHECK(false, "there is no ", text, " among the choices of a rule");
}

Matrix matrix(const Tensor& t, const char* name, int64_t vocabulary) {
  STD_TORCH_CHECK(
      t.is_cpu() && t.dim() == 2 && t.size(1) == vocabulary && (vocabulary == 1 || t.stride(1) == 1), name,
      " must be a CPU tensor [n, ", vocabulary, "] with adjacent columns");
  Matrix m;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      m.dtype = Dtype::float32;
      break;
    case ScalarType::BFloat16:
      m.dtype = Dtype::bfloat16;
      break;
    case ScalarType::Half:
      m.dtype = Dtype::float16;
      break;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
  m.data = static_cast<char*>(t.data_ptr());
  m.row_bytes = t.stride(0) * static_cast<int64_t>(t.element_size());
  return m;
}

template <class T>
T* vector(const Tensor& t, const char* name, ScalarType dtype, int64_t size) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.numel() == size && t.is_contiguous(), name,
                  " must be a contiguous CPU tensor of ", size, " elements and of the dtype the schema says");
  return static_cast<T*>(t.data_ptr());
}

const int64_t* indices(const std::optional<Tensor>& t, const char* name, int64_t size) {
  return t ? vector<int64_t>(*t, name, ScalarType::Long, size) : nullptr;
}

// A teacher's gathered row must be one of its rows. Row 0 is read in place of negative ones where the
// student's argmax is told for ignored rows too.
void check_rows(const int64_t* rows, int64_t count, int64_t available) {
  STD_TORCH_CHECK(count == 0 || available > 0, "a teacher has no rows");
  for (int64_t n = 0; n < count; ++n) {
    STD_TORCH_CHECK(rows[n] < available, "teacher_rows holds ", rows[n], ", but the teacher has ", available,
                    " rows");
  }
}

struct Target {
  const std::vector<Tensor>& teachers;
  const std::vector<Tensor>& teacher_rows;  // an empty tensor stands for: the same row
  const std::optional<Tensor>&labels, &edit_offsets, &edit_tokens;
  int64_t ignore_index;
  const std::string &combination, &outside, &edit;
  double weight, relative_top, edit_value, softcap;
};

void set_target(Problem* p, const Target& a) {
  STD_TORCH_CHECK(a.teachers.size() <= max_teachers && a.teachers.size() == a.teacher_rows.size(),
                  "expected at most ", max_teachers, " teachers, each with its rows");
  p->n_teachers = static_cast<int>(a.teachers.size());
  for (int k = 0; k < p->n_teachers; ++k) {
    p->teachers[k] = matrix(a.teachers[k], "a teacher", p->vocabulary);
    if (a.teacher_rows[k].numel() != 0) {
      p->teachers[k].rows = vector<int64_t>(a.teacher_rows[k], "teacher_rows", ScalarType::Long, p->count);
      check_rows(p->teachers[k].rows, p->count, a.teachers[k].size(0));
    } else {
      STD_TORCH_CHECK(a.teachers[k].size(0) >= p->count, "a teacher has fewer rows than the student");
    }
  }
  p->labels = indices(a.labels, "labels", p->count);
  p->ignore_index = a.ignore_index;
  p->combination = choice<Combination>(
      a.combination, {{"none", Combination::none},
                      {"identity", Combination::identity},
                      {"whp", Combination::whp},
                      {"offset", p->n_teachers == 3 ? Combination::difference : Combination::offset},
                      {"student_offset", Combination::student_offset}});
  const int needed[] = {0, 1, 2, 2, 3, 2};
  STD_TORCH_CHECK(p->n_teachers == needed[static_cast<int>(p->combination)], a.combination,
                  " does not go with ", p->n_teachers, " teachers");
  p->edit = choice<Edit>(
      a.edit, {{"none", Edit::none}, {"add", Edit::add}, {"ban", Edit::ban}, {"mean", Edit::mean}});
  p->edit_offsets = indices(a.edit_offsets, "edit_offsets", p->count + 1);
  p->edit_tokens = indices(a.edit_tokens, "edit_tokens", a.edit_tokens ? a.edit_tokens->numel() : 0);
  if (!a.edit_offsets || !a.edit_tokens) {  // the data of an empty tensor is null as well
    STD_TORCH_CHECK(p->edit == Edit::none, "edits need offsets and tokens");
  } else {
    // the offsets of a chunk of rows speak of the whole batch's tokens: they need not start at 0
    bool rising = p->edit_offsets[0] >= 0 && p->edit_offsets[p->count] <= a.edit_tokens->numel();
    for (int64_t n = 0; n < p->count; ++n) rising &= p->edit_offsets[n] <= p->edit_offsets[n + 1];
    STD_TORCH_CHECK(rising, "edit_offsets must rise and stay within the number of tokens");
  }
  p->weight = static_cast<float>(a.weight);
  p->edit_value = static_cast<float>(a.edit_value);
  p->softcap = static_cast<float>(a.softcap);
  p->relative_top = a.relative_top != 0;
  p->mask_outside = a.outside == "mask";
  p->log_fraction = p->relative_top ? static_cast<float>(std::log(a.relative_top)) : 0;
}

// -------------------------------------------------------------------------------------------------- threads

// Rows are handed out in small blocks: ignored rows cost nothing, and they often lie together.
template <class Function>
void for_rows(const Problem& p, int64_t tile_size, int whole_rows, Function function) {
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  const int64_t block = std::clamp<int64_t>(p.count / (threads * int64_t{8}), 1, 8);
  const int64_t blocks = (p.count + block - 1) / block, tiles = (p.vocabulary + tile_size - 1) / tile_size;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min<int64_t>(threads, blocks), 1, [&](int64_t, int64_t) {
    constexpr int64_t line = 16;  // floats in a cache line: between arrays that are used together
    const int64_t row_size = tiles * tile_size + line, size = whole_rows * row_size + 6 * (tile_size + line);
    const std::unique_ptr<float[]> memory(new float[size + line]);
    const std::unique_ptr<TileSums[]> sums(new TileSums[tiles]);
    float* free = memory.get() + line - reinterpret_cast<uintptr_t>(memory.get()) % 64 / sizeof(float);
    Scratch s{};
    for (int k = 0; k < whole_rows; ++k, free += row_size) s.row[k] = free;
    for (float** tile : {&s.base, &s.other[0], &s.other[1], &s.student, &s.target, &s.out}) {
      *tile = free;
      free += tile_size + line;
    }
    s.sums = sums.get();
    for (int64_t start = next.fetch_add(block); start < p.count; start = next.fetch_add(block)) {
      for (int64_t n = start; n < std::min(start + block, p.count); ++n) function(p, n, s);
    }
  });
}

// ------------------------------------------------------------------------------------------------ operators

int rows_kept(Divergence divergence) {
  if (divergence == Divergence::label || divergence == Divergence::hard) return 1;
  return divergence == Divergence::cross_entropy || divergence == Divergence::forward_kl ? 2 : 3;
}

constexpr const char* target_schema =
    "Tensor[] teachers, Tensor[] teacher_rows, Tensor? labels, Tensor? edit_offsets, Tensor? edit_tokens, "
    "int ignore_index, str combination, float weight, float relative_top, str outside, str edit, "
    "float edit_value, float softcap";

void row_losses(const Tensor& student, const std::vector<Tensor>& teachers,
                const std::vector<Tensor>& teacher_rows, const std::optional<Tensor>& labels,
                const std::optional<Tensor>& edit_offsets, const std::optional<Tensor>& edit_tokens,
                int64_t ignore_index, const std::string& combination, double weight, double relative_top,
                const std::string& outside, const std::string& edit, double edit_value, double softcap,
                const std::string& divergence, double beta, double temperature, bool statistics,
                const std::optional<Tensor>& row_scale, const std::optional<Tensor>& gradient,
                const Tensor& losses, const Tensor& targets, const Tensor& entropy, const Tensor& predicted) {
  Problem p;
  p.count = student.size(0);
  p.vocabulary = student.size(1);
  p.student = matrix(student, "student", p.vocabulary);
  set_target(&p, {teachers, teacher_rows, labels, edit_offsets, edit_tokens, ignore_index, combination,
                  outside, edit, weight, relative_top, edit_value, softcap});
  p.divergence = choice<Divergence>(divergence, {{"label", Divergence::label},
                                                 {"hard", Divergence::hard},
                                                 {"cross_entropy", Divergence::cross_entropy},
                                                 {"forward_kl", Divergence::forward_kl},
                                                 {"reverse_kl", Divergence::reverse_kl},
                                                 {"jsd", Divergence::jsd}});
  const bool through_teachers =
      p.combination == Combination::none || p.combination == Combination::student_offset;
  STD_TORCH_CHECK((p.divergence == Divergence::label) == through_teachers, divergence, " does not go with ",
                  combination);
  if (p.divergence == Divergence::label) {
    STD_TORCH_CHECK(labels.has_value(), "the divergence label needs labels");
    for (int64_t n = 0; n < p.count; ++n) {
      STD_TORCH_CHECK(p.labels[n] == ignore_index || (p.labels[n] >= 0 && p.labels[n] < p.vocabulary),
                      "label ", p.labels[n], " of row ", n, " is outside the vocabulary of ", p.vocabulary);
    }
  }
  p.beta = static_cast<float>(beta);
  p.temperature = static_cast<float>(temperature);
  p.statistics = statistics;
  if (gradient) {
    STD_TORCH_CHECK(row_scale.has_value() && gradient->dim() == 2 && gradient->size(0) == p.count,
                    "a gradient needs row_scale and the student's number of rows");
    p.gradient = matrix(*gradient, "gradient", p.vocabulary);
    p.row_scale = vector<float>(*row_scale, "row_scale", ScalarType::Float, p.count);
  }
  p.losses = vector<float>(losses, "losses", ScalarType::Float, p.count);
  p.targets = vector<int64_t>(targets, "targets", ScalarType::Long, p.count);
  p.entropy = vector<float>(entropy, "entropy", ScalarType::Float, p.count);
  p.predicted = vector<int64_t>(predicted, "predicted", ScalarType::Long, p.count);
  const Kernels& chosen = kernels();
  for_rows(p, chosen.tile_size, rows_kept(p.divergence), chosen.losses);
}

void row_labels(int64_t count, const std::vector<Tensor>& teachers, const std::vector<Tensor>& teacher_rows,
                const std::optional<Tensor>& labels, const std::optional<Tensor>& edit_offsets,
                const std::optional<Tensor>& edit_tokens, int64_t ignore_index,
                const std::string& combination, double weight, double relative_top,
                const std::string& outside, const std::string& edit, double edit_value, double softcap,
                const std::vector<double>& weights, const Tensor& sets, const Tensor& own) {
  STD_TORCH_CHECK(!teachers.empty(), "row_labels needs teachers");
  Problem p;
  p.count = count;
  p.vocabulary = teachers[0].size(1);
  set_target(&p, {teachers, teacher_rows, labels, edit_offsets, edit_tokens, ignore_index, combination,
                  outside, edit, weight, relative_top, edit_value, softcap});
  p.n_weights = static_cast<int64_t>(weights.size());
  p.weights = weights.data();
  p.label_sets = vector<int64_t>(sets, "sets", ScalarType::Long, p.count * p.n_weights);
  p.own = vector<int64_t>(own, "own", ScalarType::Long, p.count);
  const Kernels& chosen = kernels();
  for_rows(p, chosen.tile_size, 0, chosen.labels);
}

std::string cpu_isa() { return kernels().name; }

STABLE_TORCH_LIBRARY_FRAGMENT(whp_kernels_C, m) {
  const std::string target = target_schema;
  m.def(("row_losses(Tensor student, " + target +
         ", str divergence, float beta, float temperature, bool statistics, Tensor? row_scale, "
         "Tensor(a!)? gradient, Tensor(b!) losses, Tensor(c!) targets, Tensor(d!) entropy, "
         "Tensor(e!) predicted) -> ()")
            .c_str());
  m.def(("row_labels(int count, " + target + ", float[] weights, Tensor(a!) sets, Tensor(b!) own) -> ()")
            .c_str());
  m.def("cpu_isa() -> str");   // the instruction set that the next call uses
  m.def("cpu_isas() -> str");  // all that this machine has, the best first
}

STABLE_TORCH_LIBRARY_IMPL(whp_kernels_C, CPU, m) {
  m.impl("row_losses", TORCH_BOX(&row_losses));
  m.impl("row_labels", TORCH_BOX(&row_labels));
}

STABLE_TORCH_LIBRARY_IMPL(whp_kernels_C, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
}

}  // namespace
}  // namespace whp
