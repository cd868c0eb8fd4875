// One row of row_losses where an index is the target, and what soft_losses.h shares with it. The file that
// includes this defines WHP_ISA.
//
// A row is read once, tile by tile: each tile is combined, and its exponentials are taken relative to the
// largest logit seen so far and kept in float32; a second pass turns them into the gradient. So the inputs
// come from memory once, and an element costs one exponential for the student and one for a soft target. Sums
// are float32 within a vector lane of a tile and double above.
#pragma once
#include <cmath>

#include "tiles.h"

namespace whp::WHP_ISA {

// exp((from - to) / temperature), the factor that brings sums relative to one peak to another; 0 for -inf.
inline double rescale(float from, float to, double inv_temperature) {
  if (from == to) return 1;
  return from == -infinity ? 0 : std::exp((double(from) - double(to)) * inv_temperature);
}

// What is subtracted before an exponential: a row or tile that holds only -inf gives exponentials of 0, not
// NaN.
inline float shift_of(float peak) { return peak == -infinity ? 0 : peak; }

inline bool ignored(const Problem& p, int64_t n) {
  if (p.labels && p.labels[n] == p.ignore_index) return true;
  for (int k = 0; k < p.n_teachers; ++k) {
    if (p.teachers[k].rows && p.teachers[k].rows[n] < 0) return true;
  }
  return false;
}

inline int64_t tiles_of(const Problem& p) { return (p.vocabulary + tile_size - 1) / tile_size; }

template <class Visit>
inline void for_tiles(const Problem& p, Visit visit) {
  int64_t k = 0;
  for (int64_t start = 0; start < p.vocabulary; start += tile_size) visit(range_of(p, start), k++);
}

inline void finish_without_loss(const Problem& p, int64_t n) {
  p.losses[n] = 0;
  p.entropy[n] = 0;
  p.targets[n] = p.ignore_index;
  if (p.gradient.data) {
    const int64_t size = p.gradient.dtype == Dtype::float32 ? 4 : 2;
    std::memset(p.gradient.data + n * p.gradient.row_bytes, 0, p.vocabulary * size);
  }
}

// The student's argmax is told for every row; with a NaN in the row there is none, and it is 0.
inline int64_t argmax(const Student& student) {
  Best best;
  bool nan = false;
  for_tiles(student.p, [&](Range range, int64_t) {
    const float* s = student.tile(range);
    best.see(s, range, peak_of(s, range));
    nan |= has_nan(s, range);
  });
  return nan ? 0 : best.index;
}

// Writes the gradient tile by tile; `fill_tile` computes one tile of d loss / d (capped) student.
template <class FillTile>
inline void write_gradient(const Student& student, const Scratch& scratch, int64_t n, FillTile fill_tile) {
  const Problem& p = student.p;
  char* row = p.gradient.data + n * p.gradient.row_bytes;
  for_tiles(p, [&](Range range, int64_t k) {
    const bool in_place = p.gradient.dtype == Dtype::float32 && range.count == range.padded;
    float* out = in_place ? reinterpret_cast<float*>(row) + range.start : scratch.out;
    // the student may lie where the gradient goes: all that is needed of a tile is read before it is written
    const float* capped = p.softcap != 0 ? student.capped(range, 0.0f) : nullptr;
    fill_tile(range, k, out);
    if (capped) {
      const Vec cap = fill(p.softcap), one = fill(1.0f);
      for (int j = 0; j < range.padded; j += Vec::width) {
        const Vec tanh = load(capped + j) / cap;
        store(out + j, load(out + j) * (one - tanh * tanh));
      }
    }
    write(out, range, p.gradient, row);
  });
}

// ---------------------------------------------------------------------- label, hard: an index is the target

inline double exponentials(const float* s, Range range, float shift, float* out) {
  Vec sum = fill(0.0f);
  for (int j = 0; j < range.padded; j += Vec::width) {
    const Vec e = exp(load(s + j) - fill(shift));
    sum = sum + e;
    store(out + j, e);
  }
  return total(sum);
}

inline void index_loss(const Problem& p, int64_t n, const Scratch& scratch) {
  const Student student(p, scratch, n);
  Teachers teachers(p, scratch, n);
  const bool hard = p.divergence == Divergence::hard, with_gradient = p.gradient.data;
  Best target, predicted;
  bool nan = false;
  for_tiles(p, [&](Range range, int64_t k) {
    if (p.n_teachers) {
      teachers.prefetch(range);
      const TeacherTiles tiles(teachers, range);
      if (hard) {
        const Target t = target_of(teachers, tiles, range, p.weight, scratch.target);
        target.see(t.tile, range, t.peak);
        nan |= t.nan;
      } else {  // student_offset: only the teachers can make a row unusable
        const float peak = peak_of(tiles.tiles[0], range);
        if (peak > target.value) target.value = peak;
        nan |= has_nan(tiles.tiles[0], range) || has_nan(tiles.tiles[1], range);
      }
    }
    const float* s = student.tile(range);
    const float peak = peak_of(s, range);
    if (p.statistics) {
      predicted.see(s, range, peak);
    } else if (peak > predicted.value) {
      predicted.value = peak;
    }
    float* out = with_gradient ? scratch.row[0] + range.start : scratch.out;
    TileSums& sums = scratch.sums[k];
    sums.s_peak = predicted.value;
    sums.s_sum = exponentials(s, range, shift_of(sums.s_peak), out);
  });
  const float peak = predicted.value;
  double sum = 0;
  for (int64_t k = 0; k < tiles_of(p); ++k) {
    sum += scratch.sums[k].s_sum * rescale(scratch.sums[k].s_peak, peak, 1);
  }
  if (peak == -infinity) sum = __builtin_nan("");
  if (p.statistics) p.predicted[n] = sum == sum || peak == -infinity ? predicted.index : argmax(student);
  if (p.n_teachers && (nan || !(target.value > -infinity && target.value < infinity))) {
    return finish_without_loss(p, n);
  }
  const int64_t label = hard ? target.index : p.labels[n];
  const Range labelled = range_of(p, label / tile_size * tile_size);
  const double shifted = double(student.tile(labelled)[label - labelled.start]) - double(peak);
  p.losses[n] = static_cast<float>(std::log(sum) - shifted);
  p.targets[n] = label;
  p.entropy[n] = 0;
  if (!with_gradient) return;

  const double scale = p.row_scale[n] * (p.combination == Combination::student_offset ? p.weight : 1.0f);
  // p - 1 at the label in double: next to 1 a float32 quotient has lost the difference
  const float at_label = static_cast<float>((std::exp(shifted) / sum - 1) * scale);
  write_gradient(student, scratch, n, [&](Range range, int64_t k, float* out) {
    const Vec factor = fill(static_cast<float>(rescale(scratch.sums[k].s_peak, peak, 1) / sum * scale));
    const float* e = scratch.row[0] + range.start;
    for (int j = 0; j < range.padded; j += Vec::width) store(out + j, load(e + j) * factor);
    if (label >= range.start && label < range.start + range.count) out[label - range.start] = at_label;
  });
}

}  // namespace whp::WHP_ISA
