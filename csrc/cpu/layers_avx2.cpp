// The layer kernels for avx2; setup.py gives this file its compiler flags by its name.
#if defined(__x86_64__)
#define WHP_ISA avx2
#include "vector_avx2.h"

#include "elementary.h"
#include "layer_kernels.h"

namespace whp::layers {
const Kernels avx2_kernels = {"avx2",
                                avx2::norm_forward,
                                avx2::norm_backward,
                                avx2::swiglu_forward,
                                avx2::swiglu_backward,
                                avx2::rope};
}
#endif
