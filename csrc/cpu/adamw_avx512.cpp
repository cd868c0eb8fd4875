// The AdamW kernel for avx512; setup.py gives this file its compiler flags by its name.
#if defined(__x86_64__)
#define WHP_ISA avx512
#include "vector_avx512.h"

namespace whp::avx512 {
namespace {
// masked, because GCC 12 warns of its own undefined operand in the plain one
inline Vec square_root(Vec a) { return {_mm512_maskz_sqrt_ps(0xffff, a.lanes)}; }
}  // namespace
}  // namespace whp::avx512

#include "adamw_kernel.h"

namespace whp::adamw {
const Kernel avx512_kernel = {"avx512", avx512::update_block};
}
#endif
