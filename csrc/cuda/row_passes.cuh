// The passes over a block's slice of one row, as one thread makes them: read both models' logits once from device
// memory into shared memory (pass 1), sum exponentials from there (passes 2 and 3), write the gradient from there.
//
// Between the passes the row's records are exchanged (cluster_row.cuh); the barriers of that exchange also lie between
// what a thread writes to shared memory here and what another reads.
#pragma once

#include "row_arguments.cuh"

namespace whp {

// A block's part of one row. Pack `v` holds columns first + v * W ... + W - 1. In shared memory a pack is 16 bytes of
// student logits and, with teachers, W float32 target logits, kept as W / 4 planes of 16 bytes a pack: neighbouring
// threads then touch neighbouring 16 bytes, which is free of bank conflicts (32 bytes a thread in a row would not be).
template <class S>
struct Slice {
  static constexpr int W = 16 / sizeof(S);

  char* student;
  char* target;
  int packs;          // of the block; the last may reach past the row's end
  int64_t first;      // column of the row at which the slice begins
  int columns;        // in the slice that exist; may be 0 or less for the last blocks
  int thread, threads;

  WHP_INLINE char* target_plane(int v, int plane) const { return target + (int64_t(plane) * packs + v) * 16; }

  WHP_INLINE void read_student(int v, float (&s)[W]) const {
    unpack<S, W>(load_shared(student + int64_t(v) * 16), s);
  }
  WHP_INLINE void read_target(int v, float (&t)[W]) const {
    WHP_UNROLL
    for (int plane = 0; plane < W / 4; ++plane) {
      const Words<4> words = load_shared(target_plane(v, plane));
      WHP_UNROLL
      for (int j = 0; j < 4; ++j) t[plane * 4 + j] = float_of_bits(words.word[j]);
    }
  }
  WHP_INLINE void write_target(int v, const float (&t)[W]) const {
    WHP_UNROLL
    for (int plane = 0; plane < W / 4; ++plane) {
      Words<4> words;
      WHP_UNROLL
      for (int j = 0; j < 4; ++j) words.word[j] = bits_of_float(t[plane * 4 + j]);
      store_shared(target_plane(v, plane), words);
    }
  }

  // One column of the slice, counted from its beginning.
  WHP_INLINE float student_at(int column) const { return value_at(reinterpret_cast<const S*>(student) + column); }
  WHP_INLINE float* target_at(int column) const {
    const int v = column / W, j = column % W;
    return reinterpret_cast<float*>(target_plane(v, j / 4)) + j % 4;
  }
};

// Where the slice begins in each input, for one row.
template <class S, class T, int K>
struct Sources {
  const S* student;
  const T* teachers[K == 0 ? 1 : K];

  WHP_INLINE Sources(const Arguments& a, int64_t row, int64_t first) : teachers{} {
    student = static_cast<const S*>(a.student) + (row * a.student_stride + first);
    WHP_UNROLL
    for (int k = 0; k < K; ++k) {
      int64_t of = a.teachers[k].rows == nullptr ? row : a.teachers[k].rows[row];
      of = of < 0 ? 0 : of;  // an ignored row is read for its statistics only
      teachers[k] = static_cast<const T*>(a.teachers[k].data) + (of * a.teachers[k].stride + first);
    }
  }
};

// Pass 1 for teachers of type T. U packs of every input are asked for before the first is used: as many as 24 registers
// hold, but at least one, and at most four. So 64 to 112 bytes are on the way to a thread (see cluster_loss.cu).
template <Target kind, class S, class T>
WHP_INLINE Peaks load_slice(
    const Slice<S>& slice, const Sources<S, T, kTeachers<kind>>& sources, float weight, bool aligned) {
  constexpr int W = Slice<S>::W, K = kTeachers<kind>;
  constexpr int Kept = K == 0 ? 1 : K;  // arrays have at least one element
  constexpr int Registers = 4 + K * W * int(sizeof(T)) / 4;
  constexpr int U = Registers > 12 ? 1 : Registers > 8 ? 2 : Registers > 4 ? 3 : 4;
  Peaks peaks;
  float later = -kInfinity;  // becomes NaN at a NaN of the second or third teacher

  const auto take = [&](int v, const Pack<S, W>& pack, const Pack<T, W>(&packs)[Kept]) {
    store_shared(slice.student + int64_t(v) * 16, pack);
    float s[W];
    unpack<S, W>(pack, s);
    WHP_UNROLL
    for (int j = 0; j < W; ++j) peaks.student = nan_max(peaks.student, s[j]);
    if constexpr (K > 0) {
      float logits[K][W], target[W];
      WHP_UNROLL
      for (int k = 0; k < K; ++k) unpack<T, W>(packs[k], logits[k]);
      WHP_UNROLL
      for (int j = 0; j < W; ++j) {
        float of_column[K];
        WHP_UNROLL
        for (int k = 0; k < K; ++k) {
          of_column[k] = logits[k][j];
          if (k > 0) later = nan_max(later, of_column[k]);
        }
        target[j] = combined<kind>(of_column, weight);
        peaks.target = nan_max(peaks.target, target[j]);
      }
      slice.write_target(v, target);
    }
  };

  const int whole = aligned && slice.columns > 0 ? slice.columns / W : 0;
  for (int v = slice.thread; v < whole; v += U * slice.threads) {
    Pack<S, W> of_student[U];
    Pack<T, W> of_teachers[U][Kept];
    WHP_UNROLL
    for (int u = 0; u < U; ++u) {
      const int at = v + u * slice.threads;
      if (at < whole) {
        of_student[u] = load_once<4>(sources.student + int64_t(at) * W);
        WHP_UNROLL
        for (int k = 0; k < K; ++k) {
          of_teachers[u][k] = load_once<W * sizeof(T) / 4>(sources.teachers[k] + int64_t(at) * W);
        }
      }
    }
    WHP_UNROLL
    for (int u = 0; u < U; ++u) {
      const int at = v + u * slice.threads;
      if (at < whole) take(at, of_student[u], of_teachers[u]);
    }
  }
  for (int v = whole + slice.thread; v < slice.packs; v += slice.threads) {
    const int count = slice.columns - v * W;
    Pack<T, W> of_teachers[Kept];
    WHP_UNROLL
    for (int k = 0; k < K; ++k) {
      of_teachers[k] = load_singly<T, W>(sources.teachers[k] + int64_t(v) * W, count);
    }
    take(v, load_singly<S, W>(sources.student + int64_t(v) * W, count), of_teachers);
  }
  peaks.unusable = later != later;
  return peaks;
}

// The target logit of one column with its edit, from the teachers in device memory. `times`: how often it is listed.
template <Target kind, class S, class T, int K>
WHP_INLINE float edited_target(const Arguments& a, const Sources<S, T, K>& sources, int column, int times) {
  float logits[K];
  WHP_UNROLL
  for (int k = 0; k < K; ++k) logits[k] = value_at(sources.teachers[k] + column);
  if (a.edit == Edit::ban) {
    logits[0] = -kInfinity;
  } else {
    for (int i = 0; i < times; ++i) logits[0] = sum(logits[0], a.edit_value);
  }
  return combined<kind>(logits, a.weight);
}

// Edits of the row's tokens [begin, end) within the slice, shared among the block's threads. Tokens are sorted.
template <Target kind, class S, class T, int K>
WHP_INLINE void edit_slice(
    const Arguments& a, const Slice<S>& slice, const Sources<S, T, K>& sources, int64_t begin, int64_t end) {
  for (int64_t i = begin + slice.thread; i < end; i += slice.threads) {
    const int64_t token = a.edit_tokens[i], column = token - slice.first;
    if (column < 0 || column >= slice.columns || (i > begin && a.edit_tokens[i - 1] == token)) continue;
    int times = 1;
    while (i + times < end && a.edit_tokens[i + times] == token) ++times;
    *slice.target_at(static_cast<int>(column)) = edited_target<kind>(a, sources, static_cast<int>(column), times);
  }
}

template <class S>
WHP_INLINE float target_peak(const Slice<S>& slice) {
  float peak = -kInfinity;
  for (int v = slice.thread; v < slice.packs; v += slice.threads) {
    float t[Slice<S>::W];
    slice.read_target(v, t);
    WHP_UNROLL
    for (int j = 0; j < Slice<S>::W; ++j) peak = nan_max(peak, t[j]);
  }
  return peak;
}

// Pass 2 without a target distribution: the sum of the student's exponentials.
template <class S>
WHP_INLINE void sum_student(const Slice<S>& slice, const Exponents& exponents, Sums& sums) {
  for (int v = slice.thread; v < slice.packs; v += slice.threads) {
    float s[Slice<S>::W];
    slice.read_student(v, s);
    WHP_UNROLL
    for (int j = 0; j < Slice<S>::W; ++j) sums.student += exponents.student(s[j]);
  }
}

// Passes 2 and 3 over both: `add(s, t)` for every column.
template <class S, class Add>
WHP_INLINE void over_both(const Slice<S>& slice, const Add& add) {
  for (int v = slice.thread; v < slice.packs; v += slice.threads) {
    float s[Slice<S>::W], t[Slice<S>::W];
    slice.read_student(v, s);
    slice.read_target(v, t);
    WHP_UNROLL
    for (int j = 0; j < Slice<S>::W; ++j) add(s[j], t[j]);
  }
}

// Lowest column of the row that holds `peak`, among this thread's.
template <bool target, class S>
WHP_INLINE int32_t column_of(const Slice<S>& slice, float peak) {
  for (int v = slice.thread; v < slice.packs; v += slice.threads) {
    float values[Slice<S>::W];
    if constexpr (target) {
      slice.read_target(v, values);
    } else {
      slice.read_student(v, values);
    }
    WHP_UNROLL
    for (int j = 0; j < Slice<S>::W; ++j) {
      if (values[j] == peak) return static_cast<int32_t>(slice.first) + v * Slice<S>::W + j;
    }
  }
  return kNowhere;
}

// ------------------------------------------------------------------------------------------------------ gradient

template <class G, int W>
WHP_INLINE void write_pack(G* slice_gradient, int v, int columns, bool aligned, const float (&values)[W]) {
  const Pack<G, W> pack = packed<G, W>(values);
  G* address = slice_gradient + int64_t(v) * W;
  const int count = columns - v * W;
  if (aligned && count >= W) {
    store_once(address, pack);
  } else {
    store_singly<G, W>(address, pack, count);
  }
}

// Writes `form(v, values)` for every pack of the slice, rounded once to the gradient's dtype.
template <class S, class Form>
WHP_INLINE void write_gradient(const Arguments& a, const Slice<S>& slice, int64_t row, const Form& form) {
  constexpr int W = Slice<S>::W;
  const int64_t at = row * a.gradient_stride + slice.first;
  for (int v = slice.thread; v < slice.packs; v += slice.threads) {
    float values[W];
    form(v, values);
    if (a.gradient_dtype == Dtype::float32) {
      write_pack(static_cast<float*>(a.gradient) + at, v, slice.columns, a.aligned_gradient, values);
    } else if (a.gradient_dtype == Dtype::bfloat16) {
      write_pack(static_cast<Bfloat16*>(a.gradient) + at, v, slice.columns, a.aligned_gradient, values);
    } else {
      write_pack(static_cast<Float16*>(a.gradient) + at, v, slice.columns, a.aligned_gradient, values);
    }
  }
}

template <class S>
WHP_INLINE void write_zeros(const Arguments& a, const Slice<S>& slice, int64_t row) {
  write_gradient(a, slice, row, [](int, float(&values)[Slice<S>::W]) {
    WHP_UNROLL
    for (int j = 0; j < Slice<S>::W; ++j) values[j] = 0;
  });
}

template <class S>
WHP_INLINE void write_label_gradient(
    const Arguments& a, const Slice<S>& slice, int64_t row, const Slope& slope, int32_t label) {
  constexpr int W = Slice<S>::W;
  const int32_t within = label - static_cast<int32_t>(slice.first);  // the label's column, counted in the slice
  write_gradient(a, slice, row, [&](int v, float(&values)[W]) {
    float s[W];
    slice.read_student(v, s);
    WHP_UNROLL
    for (int j = 0; j < W; ++j) values[j] = slope.label(s[j]);
    if (within >= v * W && within < v * W + W) {
      WHP_UNROLL
      for (int j = 0; j < W; ++j) {
        if (within == v * W + j) values[j] = slope.at_label(s[j]);
      }
    }
  });
}

template <class S, class Of>
WHP_INLINE void write_soft_gradient(const Arguments& a, const Slice<S>& slice, int64_t row, const Of& of) {
  constexpr int W = Slice<S>::W;
  write_gradient(a, slice, row, [&](int v, float(&values)[W]) {
    float s[W], t[W];
    slice.read_student(v, s);
    slice.read_target(v, t);
    WHP_UNROLL
    for (int j = 0; j < W; ++j) values[j] = of(s[j], t[j]);
  });
}

}  // namespace whp
