// One row of row_losses for the soft divergences: two distributions over the vocabulary. The file that
// includes this defines WHP_ISA. Passes: see row_losses.h; the Jensen-Shannon divergence has one more, as its
// mixture needs both sums.
#pragma once
#include "row_losses.h"

namespace whp::WHP_ISA {

enum class Kept { target, difference, both };  // beside the student's exponentials, for what comes after

// Exponentials and sums of one tile; difference = log p_s - log p_t up to a number that is the same for the
// whole tile.
template <Kept KEPT>
inline void soft_tile(const Problem& p, const float* t, const float* s, Range range, const Scratch& scratch,
                      int64_t at, TileSums* sums) {
  const Vec t_shift = fill(shift_of(sums->t_peak)), s_shift = fill(shift_of(sums->s_peak));
  const Vec inv_temperature = fill(1.0f / p.temperature), zero = fill(0.0f);
  Vec t_sum = zero, s_sum = zero, entropy = zero, divergence = zero;
  float *s_out = scratch.row[0] + at, *t_out = scratch.row[1] + at, *d_out = scratch.row[2] + at;
  for (int j = 0; j < range.padded; j += Vec::width) {
    const Vec t_log = (load(t + j) - t_shift) * inv_temperature;
    const Vec s_log = (load(s + j) - s_shift) * inv_temperature;
    const Vec t_exp = exp(t_log), s_exp = exp(s_log), difference = s_log - t_log;
    const Mask in_target = unequal(t_exp, zero);  // probability 0 gives 0, also where its logarithm is -inf
    t_sum = t_sum + t_exp;
    s_sum = s_sum + s_exp;
    entropy = fma(t_exp, where(in_target, t_log), entropy);
    store(s_out + j, s_exp);
    if constexpr (KEPT != Kept::difference) store(t_out + j, t_exp);
    if constexpr (KEPT != Kept::target) store(d_out + j, difference);
    if constexpr (KEPT == Kept::target) divergence = fma(t_exp, where(in_target, difference), divergence);
    if constexpr (KEPT == Kept::difference) {
      divergence = fma(s_exp, where(unequal(s_exp, zero), difference), divergence);
    }
  }
  sums->t_sum = total(t_sum);
  sums->s_sum = total(s_sum);
  sums->entropy = total(entropy);
  sums->divergence = total(divergence);
}

// A row after the first pass: peaks and their columns, and the sums relative to the row's peaks.
struct SoftRow {
  const Problem& p;
  const Scratch& scratch;
  const double inv_temperature;
  Best target, predicted;
  bool nan = false;
  double t_sum = 0, s_sum = 0, log_t_sum = 0, log_s_sum = 0, entropy = 0, divergence = 0;

  SoftRow(const Problem& problem, const Scratch& s)
      : p(problem), scratch(s), inv_temperature(1.0 / p.temperature) {}

  template <Kept KEPT>
  void read(Teachers& teachers, const Student& student, bool keep_all, bool peaks_known) {
    for_tiles(p, [&](Range range, int64_t k) {
      teachers.prefetch(range);
      const TeacherTiles tiles(teachers, range);
      const Target t = target_of(teachers, tiles, range, p.weight, scratch.target);
      const float* s = student.tile(range);
      TileSums& sums = scratch.sums[k];
      if (!peaks_known) {
        nan |= t.nan;
        see(&target, t.tile, range, t.peak);
        see(&predicted, s, range, peak_of(s, range));
      }
      sums.t_peak = target.value;
      sums.s_peak = predicted.value;
      soft_tile<KEPT>(p, t.tile, s, range, scratch, keep_all ? range.start : 0, &sums);
    });
    add_up<KEPT>();
  }

  void see(Best* best, const float* tile, Range range, float peak) const {
    if (p.statistics) {
      best->see(tile, range, peak);
    } else if (peak > best->value) {
      best->value = peak;
    }
  }

  // log p_s - log p_t is the kept difference plus this, but for the logarithms of the sums
  double between_peaks(const TileSums& sums) const {
    const double s = double(shift_of(sums.s_peak)) - predicted.value;
    const double t = double(shift_of(sums.t_peak)) - target.value;
    return (s - t) * inv_temperature;
  }
  double offset(const TileSums& sums) const { return between_peaks(sums) - log_s_sum + log_t_sum; }
  double t_factor(const TileSums& sums) const { return rescale(sums.t_peak, target.value, inv_temperature); }
  double s_factor(const TileSums& sums) const {
    return rescale(sums.s_peak, predicted.value, inv_temperature);
  }

  template <Kept KEPT>
  void add_up() {
    t_sum = s_sum = entropy = divergence = 0;
    for (int64_t k = 0; k < tiles_of(p); ++k) {
      const TileSums& sums = scratch.sums[k];
      const double by_t = t_factor(sums), by_s = s_factor(sums);
      t_sum += by_t * sums.t_sum;
      s_sum += by_s * sums.s_sum;
      if (by_t != 0) {  // else the tile's peak may be -inf
        const double peak = (double(sums.t_peak) - target.value) * inv_temperature;
        entropy += by_t * (sums.entropy + sums.t_sum * peak);
      }
      const double by = KEPT == Kept::target ? by_t : by_s;
      const double sum = KEPT == Kept::target ? sums.t_sum : sums.s_sum;
      if (by != 0) divergence += by * (sums.divergence + sum * between_peaks(sums));
    }
    if (predicted.value == -infinity) s_sum = __builtin_nan("");
    log_t_sum = std::log(t_sum);
    log_s_sum = std::log(s_sum);
    entropy = log_t_sum - entropy / t_sum;
    if (KEPT == Kept::target) divergence = log_s_sum - log_t_sum - divergence / t_sum;
    if (KEPT == Kept::difference) divergence = divergence / s_sum - log_s_sum + log_t_sum;
  }

  bool usable() const { return !nan && target.value > -infinity && target.value < infinity; }
};

// p_s, log(p_s / m) and log(p_t / m) of one tile, with m the mixture; returns KL(p_s, m), and KL(p_t, m) in
// *t_part. With u = log(p_t / p_s): log(m / p_s) = log1p(beta (e^u - 1)), and the same from the other side
// where u > 0, so that nothing overflows and nothing cancels where the two are close.
inline double mixture_tile(const SoftRow& row, Range range, const TileSums& sums, double* t_part) {
  const float* t_exp = row.scratch.row[1] + range.start;
  float *s_exp = row.scratch.row[0] + range.start, *difference = row.scratch.row[2] + range.start;
  const Vec by_t = fill(static_cast<float>(row.t_factor(sums) / row.t_sum));
  const Vec by_s = fill(static_cast<float>(row.s_factor(sums) / row.s_sum));
  const Vec offset = fill(static_cast<float>(row.offset(sums))), zero = fill(0.0f);
  const Vec beta = fill(row.p.beta), rest = fill(1.0f - row.p.beta);
  Vec t_divergence = zero, s_divergence = zero;
  for (int j = 0; j < range.padded; j += Vec::width) {
    const Vec u = zero - (load(difference + j) + offset), below = zero - absolute(u);
    const Mask more = at_least(u, zero);
    const Vec c = log1p(where(more, rest, beta) * expm1(below));
    const Vec s_log = where(more, below - c, zero - c), t_log = where(more, zero - c, below - c);
    const Vec s = load(s_exp + j) * by_s, t = load(t_exp + j) * by_t;
    s_divergence = fma(s, where(unequal(s, zero), s_log), s_divergence);
    t_divergence = fma(t, where(unequal(t, zero), t_log), t_divergence);
    store(s_exp + j, s);
    store(difference + j, s_log);
  }
  *t_part = total(t_divergence);
  return total(s_divergence);
}

// p (l + offset) * factor with l the kept differences: the gradient of a divergence whose weights are the
// student's. Probability 0 gives 0 whatever its logarithm, but a NaN of the whole row stays.
inline void centred_tile(const Scratch& scratch, Range range, double offset, double factor, float* out) {
  const float *p = scratch.row[0] + range.start, *l = scratch.row[2] + range.start;
  const Vec by = fill(static_cast<float>(factor)), add = fill(static_cast<float>(offset)), zero = fill(0.0f);
  for (int j = 0; j < range.padded; j += Vec::width) {
    const Vec scaled = load(p + j) * by;
    store(out + j, where(unequal(load(p + j), zero), scaled * (load(l + j) + add), scaled));
  }
}

inline void finish(const SoftRow& row, int64_t n, double loss) {
  const Problem& p = row.p;
  p.losses[n] = static_cast<float>(loss);
  p.entropy[n] = static_cast<float>(row.entropy);
  p.targets[n] = p.statistics ? row.target.index : 0;
}

template <Kept KEPT>
inline void soft_loss(const Problem& p, int64_t n, const Scratch& scratch) {
  const Student student(p, scratch, n);
  Teachers teachers(p, scratch, n);
  SoftRow row(p, scratch);
  const bool with_gradient = p.gradient.data;
  row.read<KEPT>(teachers, student, with_gradient || KEPT == Kept::both, false);
  if (p.statistics) {
    const bool whole = row.s_sum == row.s_sum || row.predicted.value == -infinity;
    p.predicted[n] = whole ? row.predicted.index : argmax(student);
  }
  if (!row.usable()) return finish_without_loss(p, n);
  // Relative to a tile's own peak a probability can be above 0 that is 0 relative to the row's; where an
  // infinite loss hangs on it, the row's peak decides.
  if (KEPT != Kept::both && !(__builtin_fabs(row.divergence) < infinity)) {
    row.read<KEPT>(teachers, student, with_gradient, true);
  }
  const double scale = with_gradient ? p.row_scale[n] * row.inv_temperature : 0;

  if constexpr (KEPT == Kept::target) {
    finish(row, n, row.divergence + (p.divergence == Divergence::cross_entropy ? row.entropy : 0));
    if (!with_gradient) return;
    write_gradient(student, scratch, n, [&](Range range, int64_t k, float* out) {
      const float *s = scratch.row[0] + range.start, *t = scratch.row[1] + range.start;
      const Vec by_s = fill(static_cast<float>(row.s_factor(scratch.sums[k]) / row.s_sum * scale));
      const Vec by_t = fill(static_cast<float>(-row.t_factor(scratch.sums[k]) / row.t_sum * scale));
      for (int j = 0; j < range.padded; j += Vec::width) {
        store(out + j, fma(load(s + j), by_s, load(t + j) * by_t));
      }
    });
  } else if constexpr (KEPT == Kept::difference) {
    finish(row, n, row.divergence);
    if (!with_gradient) return;
    write_gradient(student, scratch, n, [&](Range range, int64_t k, float* out) {
      const TileSums& sums = scratch.sums[k];
      const double by_s = row.s_factor(sums) / row.s_sum * scale;
      centred_tile(scratch, range, row.offset(sums) - row.divergence, by_s, out);
    });
  } else {
    double s_part = 0, t_part = 0;
    for_tiles(p, [&](Range range, int64_t k) {
      double t_tile;
      s_part += mixture_tile(row, range, scratch.sums[k], &t_tile);
      t_part += t_tile;
    });
    const double beta = p.beta;
    finish(row, n, beta * t_part + (1 - beta) * s_part);
    if (!with_gradient) return;
    write_gradient(student, scratch, n, [&](Range range, int64_t, float* out) {
      centred_tile(scratch, range, -s_part, (1 - beta) * scale, out);
    });
  }
}

}  // namespace whp::WHP_ISA
