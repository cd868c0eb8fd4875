// The layer kernels for avx512; setup.py gives this file its compiler flags by its name.
#if defined(__x86_64__)
#define WHP_ISA avx512
#include "vector_avx512.h"

#include "elementary.h"
#include "layer_kernels.h"

namespace whp::layers {
const Kernels avx512_kernels = {"avx512",
                                avx512::norm_forward,
                                avx512::norm_backward,
                                avx512::swiglu_forward,
                                avx512::swiglu_backward,
                                avx512::rope};
}
#endif
