// The arithmetic of one row's loss: what is known of a row after each pass over its columns, how two parts of a row are
// merged, and the loss and gradient that follow. The definitions are those of kernels/whp_kernels/losses/reference.py.
//
//   pass 1   Peaks      largest student and target logit, and whether a teacher holds a NaN
//   pass 2   Sums       sums of exponentials below these peaks, cross sum, lowest columns that hold a peak
//   pass 3   Halves     (Jensen-Shannon only) both Kullback-Leibler divergences to the mixture
//
// The peaks are exact before the first exponential, so nothing is ever rescaled, sums merge by addition, and a tie goes
// to the lowest column by a plain minimum, whichever thread or block holds it.
#pragma once

#include "row_values.cuh"

namespace whp {

// The orders are those of the operator's integer arguments; see cuda.py.
enum class Combination : int32_t { none = 0, identity = 1, whp = 2, offset = 3 };
enum class Divergence : int32_t { label = 0, hard = 1, cross_entropy = 2, forward_kl = 3, reverse_kl = 4, jsd = 5 };
enum class Edit : int32_t { none = 0, add = 1, ban = 2 };

constexpr int32_t kNowhere = std::numeric_limits<int32_t>::max();  // the column of a value that no column holds

// What becomes of the teachers' logits in a column. One loop of pass 1 is compiled for each.
enum class Target { none, identity, whp, offset_one, offset_difference };

template <Target kind>
constexpr int kTeachers =
    kind == Target::none ? 0 : kind == Target::identity ? 1 : kind == Target::offset_difference ? 3 : 2;

// The target logit of one column; `logits` are the teachers' in the combination's order, the first one edited.
template <Target kind, int K>
WHP_INLINE float combined(const float (&logits)[K], float weight) {
  const float base = logits[0];
  float target = base;
  if constexpr (kind == Target::whp) {
    target = sum(base, -product(weight, nan_max(sum(logits[1], -base), 0.0f)));
  } else if constexpr (kind == Target::offset_one) {
    target = sum(base, product(weight, logits[1]));
  } else if constexpr (kind == Target::offset_difference) {
    target = sum(base, product(weight, sum(logits[1], -logits[2])));
  }
  if constexpr (kind == Target::identity) return base;
  return base == -kInfinity ? base : target;  // what the first teacher rules out stays ruled out
}

// ---------------------------------------------------------------------------------------------------- the records

struct Peaks {
  float student = -kInfinity, target = -kInfinity;
  int32_t unusable = 0;  // a later teacher holds a NaN (one of the first teacher reaches the target's peak)

  WHP_INLINE void merge(const Peaks& other) {
    student = nan_max(student, other.student);
    target = nan_max(target, other.target);
    unusable |= other.unusable;
  }
};

struct Sums {
  float student = 0, target = 0;        // of exponentials of logits below their peak, divided by the temperature
  float cross = 0;                      // see add_forward, add_reverse
  float entropy = 0;                    // of exp(t) * t
  int32_t predicted = kNowhere;         // lowest column that holds the student's peak
  int32_t label = kNowhere;             // the label, or the lowest column that holds the target's peak
  float at_label = 0;                   // the student's logit there

  WHP_INLINE void merge(const Sums& other) {
    student += other.student;
    target += other.target;
    cross += other.cross;
    entropy += other.entropy;
    predicted = other.predicted < predicted ? other.predicted : predicted;
    if (other.label < label) {
      label = other.label;
      at_label = other.at_label;
    }
  }
};

struct Halves {
  float target = 0, student = 0;  // KL(p_t, m) and KL(p_s, m)

  WHP_INLINE void merge(const Halves& other) {
    target += other.target;
    student += other.student;
  }
};

// ------------------------------------------------------------------------------------------ what one column adds

// exp(x / T) for x = logit - peak, as 2^(x * rate) with rate = log2(e) / T. The difference is taken first: at an offset
// of thousands, logit * rate would have lost the digits that matter.
struct Exponents {
  float student_peak, target_peak, rate;

  WHP_INLINE float student(float logit) const { return exp2_fast((logit - student_peak) * rate); }
  WHP_INLINE float target(float logit) const { return exp2_fast((logit - target_peak) * rate); }
};

// cross = sum e_t (kl * d_t - d_s), where d = logit - peak. A column without probability adds nothing, even if 0 * inf.
WHP_INLINE void add_forward(Sums& sums, const Exponents& exponents, float s, float t, float kl) {
  const float d_s = s - exponents.student_peak, d_t = t - exponents.target_peak;
  const float e_s = exp2_fast(d_s * exponents.rate), e_t = exp2_fast(d_t * exponents.rate);
  sums.student += e_s;
  sums.target += e_t;
  if (!(e_t == 0)) {
    sums.entropy += e_t * d_t;
    sums.cross += e_t * (kl * d_t - d_s);
  }
}

// cross = sum e_s (d_s - d_t)
WHP_INLINE void add_reverse(Sums& sums, const Exponents& exponents, float s, float t) {
  const float d_s = s - exponents.student_peak, d_t = t - exponents.target_peak;
  const float e_s = exp2_fast(d_s * exponents.rate), e_t = exp2_fast(d_t * exponents.rate);
  sums.student += e_s;
  sums.target += e_t;
  if (!(e_t == 0)) sums.entropy += e_t * d_t;
  if (!(e_s == 0)) sums.cross += e_s * (d_s - d_t);
}

// The mixture beta p_t + (1 - beta) p_s in logarithms.
struct Mixture {
  float rate;                            // 1 / T
  float log_student, log_target;         // logarithms of the sums of exponentials
  float log_beta, log_rest;              // ln beta, ln (1 - beta)

  WHP_INLINE float log_mixture(float log_s, float log_t) const {
    const float a = log_t + log_beta, b = log_s + log_rest;
    const float high = a < b ? b : a, low = a < b ? a : b;
    return high + log_fast(1.0f + exp2_fast((low - high) * kLog2E));
  }
};

WHP_INLINE void add_halves(Halves& halves, const Exponents& peaks, const Mixture& mixture, float s, float t) {
  const float log_s = (s - peaks.student_peak) * mixture.rate - mixture.log_student;
  const float log_t = (t - peaks.target_peak) * mixture.rate - mixture.log_target;
  const float p_s = exp2_fast(log_s * kLog2E), p_t = exp2_fast(log_t * kLog2E);
  const float log_m = mixture.log_mixture(log_s, log_t);
  if (!(p_t == 0)) halves.target += p_t * (log_t - log_m);
  if (!(p_s == 0)) halves.student += p_s * (log_s - log_m);
}

// ------------------------------------------------------------------------------------------------- loss and slope

struct RowLoss {
  float loss, entropy;
};

WHP_INLINE RowLoss loss_of_label(const Peaks& peaks, const Sums& sums) {
  if (sums.label == kNowhere) return {kNaN, 0};  // a label outside the vocabulary
  // both halves are shifted by the row's maximum: log l - (s_y - m) keeps its digits at any offset
  return {logf(sums.student) - (sums.at_label - peaks.student), 0};
}

WHP_INLINE RowLoss loss_of_divergence(
    Divergence divergence, const Sums& sums, const Halves& halves, float temperature, float beta) {
  const float log_student = logf(sums.student), log_target = logf(sums.target);
  const float entropy = log_target - sums.entropy / (sums.target * temperature);
  float loss;
  if (divergence == Divergence::cross_entropy) {
    loss = sums.cross / (sums.target * temperature) + log_student;
  } else if (divergence == Divergence::forward_kl) {
    loss = sums.cross / (sums.target * temperature) + (log_student - log_target);
  } else if (divergence == Divergence::reverse_kl) {
    loss = sums.cross / (sums.student * temperature) + (log_target - log_student);
  } else {
    loss = beta * halves.target + (1 - beta) * halves.student;
  }
  return {loss, entropy};
}

// scale * d loss / d s, as a function of one column's logits. The quotients are formed once for the row.
//   label         e_s * a                          and at the label e_s * a - scale   a = scale / l_s
//   forward       e_s * a - e_t * b                         a = scale / (T l_s)      b = scale / (T l_t)
//   reverse       e_s * a * (d_s - d_t - b)                 a = scale / (T^2 l_s)    b = cross / l_s
//   mixture       p_s * a * (log p_s - log m - b)           a = scale (1 - beta) / T b = KL(p_s, m)
struct Slope {
  Exponents exponents;
  float a, b, scale;

  WHP_INLINE float label(float s) const { return exponents.student(s) * a; }
  WHP_INLINE float at_label(float s) const { return fmaf(exponents.student(s), a, -scale); }
  // Both products are rounded alike, so that a student that equals its target has a gradient of exactly zero.
  WHP_INLINE float forward(float s, float t) const {
    return sum(product(exponents.student(s), a), -product(exponents.target(t), b));
  }
  WHP_INLINE float reverse(float s, float t) const {
    const float e_s = exponents.student(s);
    const float difference = (s - exponents.student_peak) - (t - exponents.target_peak);
    return e_s * a * ((e_s == 0 ? 0.0f : difference) - b);
  }
  WHP_INLINE float mixture(float s, float t, const Mixture& mixture) const {
    const float log_s = (s - exponents.student_peak) * mixture.rate - mixture.log_student;
    const float log_t = (t - exponents.target_peak) * mixture.rate - mixture.log_target;
    const float p_s = exp2_fast(log_s * kLog2E);
    return p_s * a * ((p_s == 0 ? 0.0f : log_s - mixture.log_mixture(log_s, log_t)) - b);
  }
};

WHP_INLINE Slope slope_of(
    Divergence divergence, const Exponents& exponents, const Sums& sums, const Halves& halves, float temperature,
    float beta, float scale) {
  Slope slope{exponents, 0, 0, scale};
  if (divergence == Divergence::label || divergence == Divergence::hard) {
    slope.a = sums.label == kNowhere ? kNaN : scale / sums.student;
  } else if (divergence == Divergence::cross_entropy || divergence == Divergence::forward_kl) {
    slope.a = scale / (temperature * sums.student);
    slope.b = scale / (temperature * sums.target);
  } else if (divergence == Divergence::reverse_kl) {
    slope.a = scale / (temperature * temperature * sums.student);
    slope.b = sums.cross / sums.student;
  } else {
    slope.a = scale * (1 - beta) / temperature;
    slope.b = halves.student;
  }
  return slope;
}

}  // namespace whp
