// The kernel: cluster_row on a GPU with thread-block clusters. What it costs is reckoned in cluster_loss.cu.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "cluster_row.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#error "thread block clusters need sm_90: compile csrc/cuda with -gencode arch=compute_90a,code=sm_90a"
#endif

namespace whp {

extern __shared__ __align__(128) char shared_memory[];  // its size is given at the launch

// The GPU as cluster_row sees it.
struct Hopper {
  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int threads() const { return kThreads; }
  __device__ __forceinline__ int block() const {
    return static_cast<int>(cooperative_groups::this_cluster().block_rank());
  }
  __device__ __forceinline__ int blocks() const {
    return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
  }
  __device__ __forceinline__ char* shared() const { return shared_memory; }
  __device__ __forceinline__ void sync_block() const { __syncthreads(); }
  // A barrier of all threads of the cluster, which acquires; `releases` is the same in all threads of a warp. A release
  // waits for memory (MEMBAR in the machine code), so warps that have written nothing for others do without.
  __device__ __forceinline__ void sync_cluster(bool releases) const {
    if (releases) {
      __cluster_barrier_arrive();
    } else {
      __cluster_barrier_arrive_relaxed();
    }
    __cluster_barrier_wait();
  }
  __device__ __forceinline__ void arrive_at_start() const { __cluster_barrier_arrive_relaxed(); }
  __device__ __forceinline__ void wait_for_start() const { __cluster_barrier_wait(); }
  // The words of the lane whose number differs by `mask`.
  template <int N>
  __device__ __forceinline__ void shuffle_xor(uint32_t (&words)[N], int mask) const {
    WHP_UNROLL
    for (int i = 0; i < N; ++i) words[i] = __shfl_xor_sync(0xFFFFFFFFu, words[i], mask);
  }
  // What lies at `address` of this block's shared memory, in that of another block.
  template <class T>
  __device__ __forceinline__ T* at(T* address, int block) const {
    return cooperative_groups::this_cluster().map_shared_rank(address, block);
  }
};

// Two blocks an SM: 64 registers for each of 1024 threads.
template <class S>
__global__ void __launch_bounds__(kThreads, 2) cluster_row_kernel(const __grid_constant__ Arguments a) {
  const Hopper machine;
  cluster_row<S>(a, machine, blockIdx.x / machine.blocks());
}

}  // namespace whp
