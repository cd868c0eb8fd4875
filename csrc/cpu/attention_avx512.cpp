// Causal attention in float32; setup.py gives this file its compiler flags by its name.
#if defined(__x86_64__)
#define WHP_ISA avx512
#include "vector_avx512.h"

#include "elementary.h"
#include "attention_kernel.h"

namespace whp::attention {
const Kernels float32_kernels = {avx512::scratch_bytes<avx512::Single>, avx512::forward<avx512::Single>,
                                 avx512::backward<avx512::Single>};
}
#endif
