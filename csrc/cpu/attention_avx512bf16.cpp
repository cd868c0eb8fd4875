// Causal attention in bfloat16; setup.py gives this file its compiler flags by its name.
#if defined(__x86_64__)
// elementary.h under a name of this file's own: what is compiled for BF16 must not be linked elsewhere
#define WHP_ISA avx512bf16
#include "vector_avx512.h"

namespace whp::avx512bf16 {
using namespace whp::avx512;
}
#include "elementary.h"
#include "attention_kernel.h"

namespace whp::attention {
using avx512bf16::Pair;
const Kernels bfloat16_kernels = {avx512bf16::scratch_bytes<Pair>, avx512bf16::forward<Pair>,
                                  avx512bf16::backward<Pair>};
}
#endif
