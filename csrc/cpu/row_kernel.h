// The two functions of an instruction set. The file that includes this has included its vector_*.h and
// defines WHP_ISA.
#pragma once
#include "soft_losses.h"

namespace whp::WHP_ISA {

inline void row_losses(const Problem& p, int64_t n, const Scratch& scratch) {
  if (ignored(p, n)) {
    if (p.statistics) p.predicted[n] = argmax(Student(p, scratch, n));
    return finish_without_loss(p, n);
  }
  switch (p.divergence) {
    case Divergence::label:
    case Divergence::hard:
      return index_loss(p, n, scratch);
    case Divergence::cross_entropy:
    case Divergence::forward_kl:
      return soft_loss<Kept::target>(p, n, scratch);
    case Divergence::reverse_kl:
      return soft_loss<Kept::difference>(p, n, scratch);
    case Divergence::jsd:
      return soft_loss<Kept::both>(p, n, scratch);
  }
}

inline void row_labels(const Problem& p, int64_t n, const Scratch& scratch) {
  constexpr int64_t at_once = 16;  // weights for one reading of the row
  const auto usable = [](float peak, bool nan) { return !nan && peak > -infinity && peak < infinity; };
  const bool skipped = ignored(p, n);
  for (int64_t from = 0; from == 0 || from < p.n_weights; from += at_once) {
    const int64_t left = p.n_weights - from, size = left < at_once ? left : at_once;
    Best own, best[at_once];
    bool own_nan = false, nan[at_once] = {};
    if (!skipped) {
      Teachers teachers(p, scratch, n);
      for_tiles(p, [&](Range range, int64_t) {
        const TeacherTiles tiles(teachers, range);
        own.see(tiles.tiles[0], range, peak_of(tiles.tiles[0], range));
        own_nan |= has_nan(tiles.tiles[0], range);
        for (int64_t k = 0; k < size; ++k) {
          const float weight = static_cast<float>(p.weights[from + k]);
          const Target target = target_of(teachers, tiles, range, weight, scratch.target);
          best[k].see(target.tile, range, target.peak);
          nan[k] |= target.nan;
        }
      });
    }
    for (int64_t k = 0; k < size; ++k) {
      const bool found = !skipped && usable(best[k].value, nan[k]);
      p.label_sets[(from + k) * p.count + n] = found ? best[k].index : p.ignore_index;
    }
    p.own[n] = !skipped && usable(own.value, own_nan) ? own.index : p.ignore_index;
  }
}

}  // namespace whp::WHP_ISA
