// The row kernels for avx512; setup.py gives this file its compiler flags by its name.
#if defined(__x86_64__)
#define WHP_ISA avx512
#include "vector_avx512.h"

#include "elementary.h"
#include "row_kernel.h"

namespace whp {
const Kernels avx512_kernels = {"avx512", avx512::tile_size, avx512::row_losses, avx512::row_labels};
}
#endif
