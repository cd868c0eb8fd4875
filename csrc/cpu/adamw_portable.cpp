// The AdamW kernel for any processor.
#define WHP_ISA portable
#include "vector_portable.h"

namespace whp::portable {
namespace {
inline Vec square_root(Vec a) {
  for (int k = 0; k < Vec::width; ++k) a.lanes[k] = __builtin_sqrtf(a.lanes[k]);
  return a;
}
}  // namespace
}  // namespace whp::portable

#include "adamw_kernel.h"

namespace whp::adamw {
const Kernel portable_kernel = {"portable", portable::update_block};
}
