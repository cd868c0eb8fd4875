// One row of the vocabulary losses by a cluster of thread blocks: each block keeps a slice of the row in its shared
// memory, so that a row of any length up to 16 x 227 KB is read from device memory once and its gradient written once.
//
// `Machine` is what the algorithm needs of the hardware: threads, barriers of block and cluster, a shuffle, and the
// shared memory of the other blocks. cluster_loss.cu gives it the GPU's; emulation.cpp gives it a CPU's, for tests.
#pragma once

#include "row_passes.cuh"

namespace whp {

template <class Record>
struct Slots {
  Record of_warp[kThreads / kWarp];     // of this block
  Record of_block[kLargestCluster];     // one from each block of the cluster, written by them
};

// The beginning of a block's shared memory. Each exchange has slots of its own: no barrier is needed before the next.
struct Exchange {
  Slots<Peaks> peaks;
  Slots<Sums> sums;
  Slots<Halves> halves;
};
static_assert(sizeof(Exchange) <= kHeaderBytes, "the records do not fit their part of shared memory");
static_assert(kHeaderBytes % 128 == 0, "slices begin at a multiple of 128 bytes");

// Every lane gets the merged record of its warp. All lanes merge in an order that differs only by swapping the two
// halves of an addition, so they agree to the last bit.
template <class Record, class Machine>
WHP_INLINE void merge_warp(const Machine& machine, Record& record) {
  static_assert(sizeof(Record) % 4 == 0, "records are shuffled as words");
  WHP_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    uint32_t words[sizeof(Record) / 4];
    memcpy(words, &record, sizeof(Record));
    machine.shuffle_xor(words, mask);
    Record other;
    memcpy(&other, words, sizeof(Record));
    record.merge(other);
  }
}

// Every thread of the cluster gets the merged record of all of them. `complete(record)` is called on the block's record
// by its first warp before the other blocks see it; what the block's threads wrote before is visible to it.
template <class Record, class Machine, class Complete>
WHP_INLINE void merge_cluster(
    const Machine& machine, Slots<Record>& slots, Record& record, const Complete& complete) {
  const int lane = machine.thread() % kWarp, warp = machine.thread() / kWarp;
  merge_warp(machine, record);
  if (lane == 0) slots.of_warp[warp] = record;
  machine.sync_block();
  if (warp == 0) {
    record = Record{};
    if (lane < machine.threads() / kWarp) record = slots.of_warp[lane];
    merge_warp(machine, record);
    complete(record);
    if (lane < machine.blocks()) *machine.at(&slots.of_block[machine.block()], lane) = record;
  }
  machine.sync_cluster(warp == 0);  // only the first warp has written what other blocks read
  record = Record{};
  if (lane < machine.blocks()) record = slots.of_block[lane];
  merge_warp(machine, record);
}

WHP_INLINE bool is_ignored(const Arguments& a, int64_t row) {
  bool ignored = a.labels != nullptr && a.labels[row] == a.ignore_index;
  for (int k = 0; k < a.teacher_count; ++k) {
    ignored = ignored || (a.teachers[k].rows != nullptr && a.teachers[k].rows[row] < 0);
  }
  return ignored;
}

// Pass 1 and the row's edits, for one kind of target and one dtype of the teachers.
template <Target kind, class S, class T, class Machine>
WHP_INLINE Peaks load_and_edit(const Arguments& a, const Machine& machine, const Slice<S>& slice, int64_t row) {
  const Sources<S, T, kTeachers<kind>> sources(a, row, slice.first);
  Peaks peaks = load_slice<kind>(slice, sources, a.weight, a.aligned_inputs);
  if constexpr (kind != Target::none) {
    if (a.edit != Edit::none) {
      const int64_t begin = a.edit_offsets[row], end = a.edit_offsets[row + 1];
      if (begin < end) {  // the same in all threads of the cluster
        machine.sync_block();
        edit_slice<kind>(a, slice, sources, begin, end);
        machine.sync_block();
        peaks.target = target_peak(slice);
      }
    }
  }
  return peaks;
}

template <class S, class T, class Machine>
WHP_INLINE Peaks load_target(const Arguments& a, const Machine& machine, const Slice<S>& slice, int64_t row) {
  if (a.combination == Combination::identity) return load_and_edit<Target::identity, S, T>(a, machine, slice, row);
  if (a.combination == Combination::whp) return load_and_edit<Target::whp, S, T>(a, machine, slice, row);
  if (a.teacher_count == 2) return load_and_edit<Target::offset_one, S, T>(a, machine, slice, row);
  return load_and_edit<Target::offset_difference, S, T>(a, machine, slice, row);
}

template <class S, class Machine>
WHP_INLINE Peaks load_row(const Arguments& a, const Machine& machine, const Slice<S>& slice, int64_t row) {
  if (a.combination == Combination::none) return load_and_edit<Target::none, S, S>(a, machine, slice, row);
  if (a.teacher_dtype == Dtype::float32) return load_target<S, float>(a, machine, slice, row);
  if (a.teacher_dtype == Dtype::bfloat16) return load_target<S, Bfloat16>(a, machine, slice, row);
  return load_target<S, Float16>(a, machine, slice, row);
}

// The whole row. Every thread of the cluster calls it with the same row.
template <class S, class Machine>
WHP_INLINE void cluster_row(const Arguments& a, const Machine& machine, int64_t row) {
  char* shared = machine.shared();
  Exchange& exchange = *reinterpret_cast<Exchange*>(shared);
  const int64_t first = int64_t(machine.block()) * a.packs * Slice<S>::W;
  const int64_t columns = a.vocabulary - first, most = int64_t(a.packs) * Slice<S>::W;
  const Slice<S> slice{
      shared + kHeaderBytes,
      shared + kHeaderBytes + int64_t(a.packs) * 16,
      a.packs,
      first,
      static_cast<int>(columns < most ? columns : most),
      machine.thread(),
      machine.threads()};

  const bool ignored = is_ignored(a, row);
  const bool reports = machine.block() == 0 && machine.thread() == 0;
  if (ignored && !a.statistics) {  // the whole cluster leaves
    if (a.gradient != nullptr) write_zeros(a, slice, row);
    if (reports) {
      a.losses[row] = 0, a.targets[row] = a.ignore_index, a.entropy[row] = 0, a.predicted[row] = 0;
    }
    return;
  }

  // Another block's shared memory may be written only once that block runs: say so now, wait when it matters.
  machine.arrive_at_start();
  Peaks peaks = load_row(a, machine, slice, row);
  machine.wait_for_start();
  merge_cluster(machine, exchange.peaks, peaks, [](Peaks&) {});

  const bool soft = a.divergence != Divergence::label && a.divergence != Divergence::hard;
  const Exponents exponents{peaks.student, peaks.target, kLog2E / a.temperature};
  Sums sums;
  if (!soft) {
    sum_student(slice, exponents, sums);
  } else if (a.divergence == Divergence::reverse_kl) {
    over_both(slice, [&](float s, float t) { add_reverse(sums, exponents, s, t); });
  } else {
    const float kl = a.divergence == Divergence::forward_kl ? 1.0f : 0.0f;
    over_both(slice, [&](float s, float t) { add_forward(sums, exponents, s, t, kl); });
  }
  if (a.statistics) sums.predicted = column_of<false>(slice, peaks.student);
  if (a.divergence == Divergence::hard || (soft && a.statistics)) sums.label = column_of<true>(slice, peaks.target);
  merge_cluster(machine, exchange.sums, sums, [&](Sums& of_block) {
    if (a.divergence == Divergence::label) {
      const int64_t label = a.labels[row];
      const bool here = label >= slice.first && label < slice.first + slice.columns;
      of_block.label = here ? static_cast<int32_t>(label) : kNowhere;
    }
    if (!soft && of_block.label != kNowhere) {
      of_block.at_label = slice.student_at(of_block.label - static_cast<int32_t>(slice.first));
    }
  });

  Halves halves;
  Mixture mixture{};
  if (a.divergence == Divergence::jsd) {
    mixture = {1 / a.temperature, logf(sums.student), logf(sums.target), logf(a.beta), log1pf(-a.beta)};
    over_both(slice, [&](float s, float t) { add_halves(halves, exponents, mixture, s, t); });
    merge_cluster(machine, exchange.halves, halves, [](Halves&) {});
  }

  // NaN is not below infinity, so a NaN of the first teacher makes the row unusable here.
  const bool usable =
      a.combination == Combination::none || (peaks.unusable == 0 && fabsf(peaks.target) < kInfinity);
  const bool used = usable && !ignored;
  if (reports) {
    RowLoss loss{0, 0};
    if (used) {
      loss = soft ? loss_of_divergence(a.divergence, sums, halves, a.temperature, a.beta)
                  : loss_of_label(peaks, sums);
    }
    int64_t target = sums.label;
    if (a.divergence == Divergence::label) target = a.labels[row];
    if (soft && !a.statistics) target = 0;
    a.losses[row] = loss.loss;
    a.targets[row] = used ? target : a.ignore_index;
    a.entropy[row] = loss.entropy;
    a.predicted[row] = sums.predicted == kNowhere ? 0 : sums.predicted;
  }

  // Every block has read all of its row before the exchange of the sums, so the gradient may lie over any input of it.
  if (a.gradient == nullptr) return;
  if (!used) {
    write_zeros(a, slice, row);
    return;
  }
  const Slope slope =
      slope_of(a.divergence, exponents, sums, halves, a.temperature, a.beta, a.row_scale[row]);
  if (!soft) {
    write_label_gradient(a, slice, row, slope, sums.label);
  } else if (a.divergence == Divergence::reverse_kl) {
    write_soft_gradient(a, slice, row, [&](float s, float t) { return slope.reverse(s, t); });
  } else if (a.divergence == Divergence::jsd) {
    write_soft_gradient(a, slice, row, [&](float s, float t) { return slope.mixture(s, t, mixture); });
  } else {
    write_soft_gradient(a, slice, row, [&](float s, float t) { return slope.forward(s, t); });
  }
}

}  // namespace whp
