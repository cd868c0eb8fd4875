// The AdamW kernel for avx2; setup.py gives this file its compiler flags by its name.
#if defined(__x86_64__)
#define WHP_ISA avx2
#include "vector_avx2.h"

namespace whp::avx2 {
namespace {
inline Vec square_root(Vec a) { return {_mm256_sqrt_ps(a.lanes)}; }
}  // namespace
}  // namespace whp::avx2

#include "adamw_kernel.h"

namespace whp::adamw {
const Kernel avx2_kernel = {"avx2", avx2::update_block};
}
#endif
