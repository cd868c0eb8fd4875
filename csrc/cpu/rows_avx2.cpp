// The row kernels for avx2; setup.py gives this file its compiler flags by its name.
#if defined(__x86_64__)
#define WHP_ISA avx2
#include "vector_avx2.h"

#include "elementary.h"
#include "row_kernel.h"

namespace whp {
const Kernels avx2_kernels = {"avx2", avx2::tile_size, avx2::row_losses, avx2::row_labels};
}
#endif
