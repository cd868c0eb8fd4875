// The row losses for vocabularies whose rows do not fit the L2 cache twice, on Hopper (sm_90a): one pass over device
// memory. A cluster of C thread blocks owns one row; see cluster_row.cuh for the algorithm. This file launches it.
//
// Why. A kernel of one block a row reads the logits twice: for the sums, then for the gradient. The second reading is
// cheap while the rows in work stay in L2. With 128,256 columns, bfloat16, two teachers and one row on each of 132
// SMs these are 132 x 770 KB = 102 MB, twice the 50 MB of L2. A column costs, in bytes of device memory:
//
//                                      one pass    two passes
//     student, 2 teachers, bfloat16        8           14       (6 read, 2 written; 12 and 2)
//     student, 2 teachers, float32        16           28
//     student alone (label), bfloat16      4            6
//
// At 3.35 TB/s (H100), 4096 such rows of the first line take at least 128256 * 4096 * 8 / 3.35e12 = 1.25 ms in one
// pass and 2.2 ms in two.
//
// Shared memory. The student is kept in its own dtype and the combined target in float32 (bfloat16 would lose what
// alpha amplifies): 6 or 8 bytes a column, 2 or 4 without teachers. cuda.py takes the smallest cluster whose slices
// leave room for two blocks on an SM (128,256 columns: bfloat16 C = 8, 96 KB a block; float32 C = 16, 65 KB), so that
// the loads of one block fill the time of another's barriers and arithmetic.
//
// Loads in flight. Plain vector loads suffice. At a latency of 0.8 us under load, 3.35 TB/s / 132 SMs * 0.8 us = 20
// KB must be on the way in each SM at all times. A thread asks for 96 bytes (2 packs of 3 inputs) before it uses the
// first, a block of 512 threads for 48 KB, the two blocks of an SM for 96 KB; even if a block loads for a third of
// its time only, that is enough. Bulk copies (TMA) would want rows aligned to 16 bytes, so a second code path for
// those that are not, and shared memory for all raw inputs (12 bytes a column in float32 instead of 8).
//
// Arithmetic. At 3.35 TB/s an SM gets a column of the first line every 1.7e9 * 132 * 8 / 3.35e12 = 0.54 clocks, in
// which it issues 128 * 0.54 = 69 instructions of a lane, 8.6 of them exponentials. The machine code of nvcc 13.0 for
// a forward KL with Whp has about 43 a column (14 + 15 + 14 in the three passes), 4 of them exponentials. At the 4.8
// TB/s of an H200 48 are allowed: there the kernel is near the limit of both.
//
// All this is reckoned, not measured; cuda.py takes the kernel only where it is asked for.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "cluster_kernel.cuh"
#include "cluster_operator.cuh"

namespace whp {
namespace {

template <class S>
void launch_as(const Arguments& a, int cluster, cudaStream_t stream) {
  const void* kernel = reinterpret_cast<const void*>(&cluster_row_kernel<S>);
  const auto bytes = static_cast<size_t>(shared_bytes(a.packs, a.student_dtype, a.teacher_count > 0));
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kSharedLimit)));
  STD_CUDA_CHECK(cudaFuncSetAttribute(
      kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));

  STD_TORCH_CHECK(
      a.rows * cluster <= std::numeric_limits<int32_t>::max(), "cluster_row_losses: ", a.rows, " rows are too many");
  cudaLaunchAttribute dimension;
  dimension.id = cudaLaunchAttributeClusterDimension;
  dimension.val.clusterDim.x = static_cast<unsigned>(cluster);
  dimension.val.clusterDim.y = 1;
  dimension.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(a.rows * cluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &dimension;
  config.numAttrs = 1;
  if (cluster > 8) {  // not portable: a GPU with fewer SMs in a group cannot hold it
    int clusters = 0;
    STD_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
    STD_TORCH_CHECK(
        clusters > 0, "cluster_row_losses: this GPU cannot run a cluster of ", cluster, " blocks with ", bytes,
        " bytes of shared memory each");
  }
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, cluster_row_kernel<S>, a));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void launch(const Arguments& a, int cluster, int32_t device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  switch (a.student_dtype) {
    case Dtype::float32:
      return launch_as<float>(a, cluster, static_cast<cudaStream_t>(stream));
    case Dtype::bfloat16:
      return launch_as<Bfloat16>(a, cluster, static_cast<cudaStream_t>(stream));
    case Dtype::float16:
      return launch_as<Float16>(a, cluster, static_cast<cudaStream_t>(stream));
  }
}

}  // namespace
}  // namespace whp

STABLE_TORCH_LIBRARY_FRAGMENT(whp_kernels_C, m) {
  m.def(whp::kClusterSchema);
}

STABLE_TORCH_LIBRARY_IMPL(whp_kernels_C, CUDA, m) {
  m.impl("cluster_row_losses", TORCH_BOX(&whp::cluster_row_losses<&whp::launch>));
}
