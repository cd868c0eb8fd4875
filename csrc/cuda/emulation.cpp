// The cluster kernel's algorithm on a CPU, for tests: the same cluster_row, whose blocks and threads are fibres.
// Compiled and loaded by tests/kernels/test_cuda_cluster.py; no part of the extension.
//
// A fibre runs until it meets a barrier or a shuffle, in the order that `emulate` was told: forwards, backwards, at
// random, or one block as far as it gets alone, then the next. So a value that is read without a barrier after its
// writing is read too early in one of the orders, and wrongly. Shared memory is filled with NaN before each row and
// followed by a guard; the memory of another block may be touched only between the start of its threads and their
// end.
#include <torch/csrc/stable/library.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cluster_operator.cuh"
#include "cluster_row.cuh"

namespace whp {
namespace {

struct Settings {
  int threads = 64;
  int order = 0;  // 0 forwards, 1 backwards, 2 at random, 3 block by block
} settings;

struct Barrier {
  int expected = 0, arrived = 0, passed = 0;
};

struct Cluster;

struct Fibre {
  Cluster* cluster;
  int block, thread;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool ended = false;
};

constexpr size_t kStack = 64 * 1024, kGuard = 64;
constexpr int kWords = 8;  // of the longest record that is shuffled

struct Cluster {
  const Arguments& a;
  const int blocks, threads;
  int64_t row = 0;
  std::vector<std::vector<char>> memory;  // shared memory of each block, with room to align it
  std::vector<Barrier> of_block, of_warp;
  Barrier of_cluster, of_start;
  std::vector<Words<kWords>> lanes;       // what each lane of the warps is shuffling
  std::vector<std::unique_ptr<Fibre>> fibres;
  ucontext_t scheduler;
  int64_t bytes;
  int64_t progress = 0;  // barriers passed and fibres ended
  std::string error;

  Cluster(const Arguments& arguments, int count)
      : a(arguments), blocks(count), threads(settings.threads),
        bytes(shared_bytes(a.packs, a.student_dtype, a.teacher_count > 0)) {
    memory.resize(blocks);
    for (auto& block : memory) block.resize(bytes + kGuard + 128);
    lanes.resize(size_t(blocks) * threads);
  }

  char* shared(int block) const {
    const auto address = reinterpret_cast<uintptr_t>(memory[block].data());
    return reinterpret_cast<char*>((address + 127) / 128 * 128);
  }

  void yield(Fibre& fibre) { swapcontext(&fibre.context, &scheduler); }

  void wait(Fibre& fibre, Barrier& barrier, int seen) {
    while (barrier.passed == seen) yield(fibre);
  }

  int arrive(Barrier& barrier) {
    const int seen = barrier.passed;
    if (++barrier.arrived == barrier.expected) barrier.arrived = 0, ++barrier.passed, ++progress;
    return seen;
  }

  void turn(Fibre& fibre);

  void run(int64_t of_row);
};

Fibre* current = nullptr;  // the fibre that runs now

// What Hopper is on the GPU.
struct Emulated {
  Fibre& self;

  int thread() const { return self.thread; }
  int threads() const { return self.cluster->threads; }
  int block() const { return self.block; }
  int blocks() const { return self.cluster->blocks; }
  char* shared() const { return self.cluster->shared(self.block); }
  void sync_block() const {
    Barrier& barrier = self.cluster->of_block[self.block];
    self.cluster->wait(self, barrier, self.cluster->arrive(barrier));
  }
  void sync_cluster(bool) const {
    self.cluster->wait(self, self.cluster->of_cluster, self.cluster->arrive(self.cluster->of_cluster));
  }
  void arrive_at_start() const { self.cluster->arrive(self.cluster->of_start); }
  void wait_for_start() const { self.cluster->wait(self, self.cluster->of_start, 0); }
  template <int N>
  void shuffle_xor(uint32_t (&words)[N], int mask) const {
    static_assert(N <= kWords);
    Cluster& cluster = *self.cluster;
    const int at = self.block * cluster.threads + self.thread;
    Barrier& barrier = cluster.of_warp[at / kWarp];
    std::memcpy(cluster.lanes[at].word, words, sizeof words);
    cluster.wait(self, barrier, cluster.arrive(barrier));
    std::memcpy(words, cluster.lanes[at ^ mask].word, sizeof words);
    cluster.wait(self, barrier, cluster.arrive(barrier));
  }
  template <class T>
  T* at(T* address, int block) const {
    Cluster& cluster = *self.cluster;
    if (cluster.of_start.passed == 0) cluster.error = "a block's memory is touched before its threads have started";
    for (int thread = 0; thread < cluster.threads; ++thread) {
      if (cluster.fibres[size_t(block) * cluster.threads + thread]->ended) {
        cluster.error = "a block's memory is touched after its threads have ended";
      }
    }
    return reinterpret_cast<T*>(cluster.shared(block) + (reinterpret_cast<char*>(address) - shared()));
  }
};

void run_fibre() {
  Fibre& self = *current;
  Cluster& cluster = *self.cluster;
  try {
    const Emulated machine{self};
    switch (cluster.a.student_dtype) {
      case Dtype::float32:
        cluster_row<float>(cluster.a, machine, cluster.row);
        break;
      case Dtype::bfloat16:
        cluster_row<Bfloat16>(cluster.a, machine, cluster.row);
        break;
      case Dtype::float16:
        cluster_row<Float16>(cluster.a, machine, cluster.row);
        break;
    }
  } catch (const char* message) {
    cluster.error = message;
  }
  self.ended = true;
  ++cluster.progress;
  swapcontext(&self.context, &cluster.scheduler);
}

void Cluster::turn(Fibre& fibre) {
  if (fibre.ended) return;
  current = &fibre;
  swapcontext(&scheduler, &fibre.context);
}

void Cluster::run(int64_t of_row) {
  row = of_row;
  of_block.assign(blocks, Barrier{threads});
  of_warp.assign(size_t(blocks) * threads / kWarp, Barrier{kWarp});
  of_cluster = of_start = Barrier{blocks * threads};
  for (auto& block : memory) std::fill(block.begin(), block.end(), char(0xFF));
  fibres.resize(size_t(blocks) * threads);
  for (int i = 0; i < blocks * threads; ++i) {
    if (!fibres[i]) fibres[i] = std::make_unique<Fibre>();
    Fibre& fibre = *fibres[i];
    fibre.cluster = this;
    fibre.block = i / threads, fibre.thread = i % threads;
    fibre.ended = false;
    if (!fibre.stack) fibre.stack = std::make_unique<char[]>(kStack);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = &scheduler;
    makecontext(&fibre.context, run_fibre, 0);
  }
  std::vector<int> order(fibres.size());
  std::iota(order.begin(), order.end(), 0);
  if (settings.order == 1) std::reverse(order.begin(), order.end());
  std::mt19937 random(static_cast<unsigned>(of_row));
  const size_t together = settings.order == 3 ? threads : order.size();  // fibres that run while they get on
  for (int64_t before = -1; before != progress;) {
    before = progress;
    for (size_t from = 0; from < order.size(); from += together) {
      for (int64_t seen = -1; seen != progress;) {
        seen = progress;
        if (settings.order == 2) std::shuffle(order.begin(), order.end(), random);
        for (size_t i = from; i < from + together; ++i) turn(*fibres[order[i]]);
      }
    }
  }
  STD_TORCH_CHECK(error.empty(), "emulation: ", error);
  for (auto& fibre : fibres) STD_TORCH_CHECK(fibre->ended, "emulation: the threads wait for each other");
  for (int block = 0; block < blocks; ++block) {
    for (size_t i = 0; i < kGuard; ++i) {
      STD_TORCH_CHECK(shared(block)[bytes + i] == char(0xFF), "emulation: a write past the end of shared memory");
    }
  }
}

void launch_emulated(const Arguments& a, int cluster, int32_t) {
  Cluster of_rows(a, cluster);
  for (int64_t row = 0; row < a.rows; ++row) of_rows.run(row);
}

void emulate(int64_t threads, int64_t order) {
  STD_TORCH_CHECK(threads % kWarp == 0 && threads >= kWarp && threads <= kThreads, "emulation: ", threads, " threads");
  settings.threads = static_cast<int>(threads);
  settings.order = static_cast<int>(order);
}

}  // namespace
}  // namespace whp

STABLE_TORCH_LIBRARY(whp_cluster_emulation, m) {
  m.def(whp::kClusterSchema);
  m.def("emulate(int threads, int order) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(whp_cluster_emulation, CPU, m) {
  m.impl("cluster_row_losses", TORCH_BOX(&whp::cluster_row_losses<&whp::launch_emulated>));
}

STABLE_TORCH_LIBRARY_IMPL(whp_cluster_emulation, CompositeExplicitAutograd, m) {
  m.impl("emulate", TORCH_BOX(&whp::emulate));
}
