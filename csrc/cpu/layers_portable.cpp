// The layer kernels for portable: any processor.
#define WHP_ISA portable
#include "vector_portable.h"

#include "elementary.h"
#include "layer_kernels.h"

namespace whp::layers {
const Kernels portable_kernels = {"portable",
                                portable::norm_forward,
                                portable::norm_backward,
                                portable::swiglu_forward,
                                portable::swiglu_backward,
                                portable::rope};
}
