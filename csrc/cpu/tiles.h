// Tiles of a row as float32: reading, soft capping, editing, combining, writing. The file that includes this
// defines WHP_ISA.
//
// A tile is padded to whole vectors with values that change nothing: -inf for a logit that is exponentiated.
#pragma once
#include <cstring>

#include "rows.h"

namespace whp::WHP_ISA {

constexpr float infinity = __builtin_inff();

// Columns worked on at a time: a tile of each input stays in the first cache, and a vector lane adds 64
// numbers before the sum goes on in double.
constexpr int64_t tile_size = 64 * Vec::width;

struct Range {
  int64_t start;
  int count, padded;  // columns, and columns up to whole vectors
};

inline Range range_of(const Problem& p, int64_t start) {
  const int64_t left = p.vocabulary - start;
  const int count = static_cast<int>(left < tile_size ? left : tile_size);
  return {start, count, (count + Vec::width - 1) / Vec::width * Vec::width};
}

struct Source {
  const char* data;
  Dtype dtype;
};

inline Source source(const Matrix& m, int64_t n) {
  const int64_t row = m.rows ? m.rows[n] : n;
  return {m.data + (row < 0 ? 0 : row) * m.row_bytes, m.dtype};
}

// Asks for the columns after a tile, which the next tile or the next row reads: the processor's own
// prefetching stops at every page, and a tile of float32 is one. Worth a third of the time of a loss; nothing
// for row_labels, which compute too little to wait for.
inline void prefetch_next(Source row, Range range) {
  const int64_t size = row.dtype == Dtype::float32 ? 4 : 2;
  const char* from = row.data + (range.start + tile_size) * size;
  for (int64_t at = 0; at < tile_size * size; at += 64) __builtin_prefetch(from + at);
}

inline void fill_tail(float* tile, Range range, float pad) {
  for (int j = range.count; j < range.padded; ++j) tile[j] = pad;
}

template <Vec (*LOAD)(const uint16_t*)>
inline void widen(const uint16_t* from, Range range, float* to) {
  int j = 0;
  for (; j + Vec::width <= range.count; j += Vec::width) store(to + j, LOAD(from + j));
  if (j < range.count) {
    uint16_t last[Vec::width] = {};
    std::memcpy(last, from + j, (range.count - j) * sizeof(uint16_t));
    store(to + j, LOAD(last));
  }
}

template <void (*STORE)(uint16_t*, Vec)>
inline void narrow(const float* from, Range range, uint16_t* to) {
  int j = 0;
  for (; j + Vec::width <= range.count; j += Vec::width) STORE(to + j, load(from + j));
  if (j < range.count) {
    uint16_t last[Vec::width];
    STORE(last, load(from + j));
    std::memcpy(to + j, last, (range.count - j) * sizeof(uint16_t));
  }
}

// The tile as stored, in float32: the row itself where it can be read in whole vectors, else a copy in
// `buffer`.
inline const float* read(Source row, Range range, float pad, float* buffer) {
  if (row.dtype == Dtype::float32) {
    const float* tile = reinterpret_cast<const float*>(row.data) + range.start;
    if (range.count == range.padded) return tile;
    std::memcpy(buffer, tile, range.count * sizeof(float));
  } else {
    const uint16_t* tile = reinterpret_cast<const uint16_t*>(row.data) + range.start;
    if (row.dtype == Dtype::bfloat16) {
      widen<load_bfloat16>(tile, range, buffer);
    } else {
      widen<load_float16>(tile, range, buffer);
    }
  }
  fill_tail(buffer, range, pad);
  return buffer;
}

// The same after softcap * tanh(x / softcap).
inline const float* read_capped(Source row, Range range, float softcap, float pad, float* buffer) {
  const float* tile = read(row, range, 0.0f, buffer);
  if (softcap == 0) {
    if (tile == buffer) fill_tail(buffer, range, pad);
    return tile;
  }
  const Vec cap = fill(softcap);
  for (int j = 0; j < range.padded; j += Vec::width) store(buffer + j, cap * tanh(load(tile + j) / cap));
  fill_tail(buffer, range, pad);
  return buffer;
}

inline void write(const float* tile, Range range, const Matrix& m, char* row) {
  if (m.dtype == Dtype::float32) {
    float* to = reinterpret_cast<float*>(row) + range.start;
    if (to != tile) std::memcpy(to, tile, range.count * sizeof(float));
  } else if (m.dtype == Dtype::bfloat16) {
    narrow<store_bfloat16>(tile, range, reinterpret_cast<uint16_t*>(row) + range.start);
  } else {
    narrow<store_float16>(tile, range, reinterpret_cast<uint16_t*>(row) + range.start);
  }
}

// Largest value, NaN left out; -inf if there is none.
inline float peak_of(const float* tile, Range range) {
  Vec peak = fill(-infinity);
  for (int j = 0; j < range.padded; j += Vec::width) peak = larger(load(tile + j), peak);
  return largest(peak);
}

inline bool has_nan(const float* tile, Range range) {
  Mask nan = none();
  for (int j = 0; j < range.padded; j += Vec::width) nan = nan | either_nan(load(tile + j), load(tile + j));
  return any(nan);
}

inline int first_equal(const float* tile, Range range, float value) {
  for (int j = 0; j < range.padded; j += Vec::width) {
    const Mask found = equal(load(tile + j), fill(value));
    if (any(found)) return j + first(found);
  }
  return 0;
}

// The largest value of a row so far and the first column that holds it.
struct Best {
  float value = -infinity;
  int64_t index = 0;
  void see(const float* tile, Range range, float peak) {
    if (peak > value) {
      value = peak;
      index = range.start + first_equal(tile, range, peak);
    }
  }
};

// The teachers' rows of row n.
struct Teachers {
  const Problem& p;
  const Scratch& scratch;
  Source rows[max_teachers];
  const int64_t *edits = nullptr, *edits_end = nullptr, *edit = nullptr;
  float mean = 0, threshold = -infinity;

  Teachers(const Problem& problem, const Scratch& s, int64_t n) : p(problem), scratch(s) {
    for (int k = 0; k < p.n_teachers; ++k) rows[k] = source(p.teachers[k], n);
    if (p.edit != Edit::none) {
      edits = p.edit_tokens + p.edit_offsets[n];
      edits_end = p.edit_tokens + p.edit_offsets[n + 1];
    }
    if (p.edit == Edit::mean && edits != edits_end) mean = mean_of_first();
    if (p.relative_top) threshold = peak_of_first() + p.log_fraction;
  }

  void prefetch(Range range) const {
    for (int k = 0; k < p.n_teachers; ++k) prefetch_next(rows[k], range);
  }

  float mean_of_first() const {
    double sum = 0;
    for (int64_t start = 0; start < p.vocabulary; start += tile_size) {
      const Range range = range_of(p, start);
      const float* tile = read_capped(rows[0], range, p.softcap, 0.0f, scratch.base);
      Vec part = fill(0.0f);
      for (int j = 0; j < range.padded; j += Vec::width) part = part + load(tile + j);
      sum += total(part);
    }
    return static_cast<float>(sum / p.vocabulary);
  }

  float peak_of_first() {
    float peak = -infinity;
    for (int64_t start = 0; start < p.vocabulary; start += tile_size) {
      const Range range = range_of(p, start);
      const float tile_peak = peak_of(first(range), range);
      if (tile_peak > peak) peak = tile_peak;
    }
    return peak;
  }

  // A tile of the first teacher, capped and edited. Tiles are asked for from left to right.
  const float* first(Range range) {
    const float* tile = read_capped(rows[0], range, p.softcap, -infinity, scratch.base);
    if (edits == edits_end) return tile;
    if (range.start == 0) edit = edits;
    for (; edit != edits_end && *edit < range.start + range.count; ++edit) {
      if (*edit < range.start) continue;
      if (tile != scratch.base) {
        std::memcpy(scratch.base, tile, range.padded * sizeof(float));
        tile = scratch.base;
      }
      float& logit = scratch.base[*edit - range.start];
      logit = p.edit == Edit::add ? logit + p.edit_value : p.edit == Edit::ban ? -infinity : mean;
    }
    return tile;
  }

  const float* other(int k, Range range) const {  // padded with 0: the first teacher's -inf stays
    return read_capped(rows[k], range, p.softcap, 0.0f, scratch.other[k - 1]);
  }
};

struct Target {
  const float* tile;
  float peak;
  bool nan;  // in a teacher or in the target
};

// Tiles of all teachers, ready to be combined with any weight.
struct TeacherTiles {
  const float* tiles[max_teachers];
  TeacherTiles(Teachers& teachers, Range range) {
    tiles[0] = teachers.first(range);
    for (int k = 1; k < teachers.p.n_teachers; ++k) tiles[k] = teachers.other(k, range);
  }
};

// `formula` gives the target's logits; where the first teacher is -inf it stays so, whatever the others say.
template <class Formula>
inline Target combine(const TeacherTiles& from, Range range, float* out, Formula formula) {
  const Vec lowest = fill(-infinity);
  Vec peak = lowest;
  Mask nan = none();
  for (int j = 0; j < range.padded; j += Vec::width) {
    const Vec base = load(from.tiles[0] + j), other = load(from.tiles[1] + j);
    const Vec target = where(equal(base, lowest), base, formula(base, other, j));
    nan = nan | either_nan(base, other) | either_nan(target, target);
    peak = larger(target, peak);
    store(out + j, target);
  }
  return {out, largest(peak), any(nan)};
}

// Products and sums are rounded one by one, as eager torch does: the same labels where two columns are close.
inline Target target_of(const Teachers& teachers, const TeacherTiles& from, Range range, float weight,
                        float* out) {
  const Problem& p = teachers.p;
  const Vec w = fill(weight);
  Target target;
  if (p.combination == Combination::identity) {
    target = {from.tiles[0], peak_of(from.tiles[0], range), has_nan(from.tiles[0], range)};
  } else if (p.combination == Combination::whp) {
    target = combine(from, range, out, [&](Vec base, Vec reinforced, int) {
      return base - w * larger(fill(0.0f), reinforced - base);  // in this order a NaN stays
    });
  } else if (p.combination == Combination::offset) {
    target = combine(from, range, out, [&](Vec base, Vec assistant, int) { return base + w * assistant; });
  } else {
    const bool nan = has_nan(from.tiles[2], range);
    target = combine(from, range, out,
                     [&](Vec base, Vec plus, int j) { return base + w * (plus - load(from.tiles[2] + j)); });
    target.nan |= nan;
  }
  if (!p.relative_top) return target;

  bool nan = false;
  for (int k = 0; k < p.n_teachers; ++k) nan |= has_nan(from.tiles[k], range);
  const Vec threshold = fill(teachers.threshold), lowest = fill(-infinity);
  for (int j = 0; j < range.padded; j += Vec::width) {
    const Vec base = load(from.tiles[0] + j);
    store(out + j, where(at_least(base, threshold), load(target.tile + j), p.mask_outside ? lowest : base));
  }
  return {out, peak_of(out, range), nan || has_nan(out, range)};
}

// The student's row n as the loss sees it: capped, and added to the teachers' for student_offset.
struct Student {
  const Problem& p;
  const Scratch& scratch;
  Source row, base, offset;

  Student(const Problem& problem, const Scratch& s, int64_t n)
      : p(problem), scratch(s), row(source(p.student, n)), base{}, offset{} {
    if (p.combination == Combination::student_offset) {
      base = source(p.teachers[0], n);
      offset = source(p.teachers[1], n);
    }
  }

  const float* capped(Range range, float pad) const {
    return read_capped(row, range, p.softcap, pad, scratch.student);
  }

  const float* tile(Range range) const {
    prefetch_next(row, range);
    if (p.combination != Combination::student_offset) return capped(range, -infinity);
    const float* student = capped(range, 0.0f);
    const float* from = read_capped(base, range, p.softcap, -infinity, scratch.base);
    const float* minus = read_capped(offset, range, p.softcap, 0.0f, scratch.other[0]);
    const Vec w = fill(p.weight);
    for (int j = 0; j < range.padded; j += Vec::width) {
      const Vec first = load(from + j), sum = first + w * (load(student + j) - load(minus + j));
      store(scratch.student + j, where(equal(first, fill(-infinity)), first, sum));
    }
    return scratch.student;
  }
};

}  // namespace whp::WHP_ISA
