// The row kernels for any processor.
#define WHP_ISA portable
#include "vector_portable.h"

#include "elementary.h"
#include "row_kernel.h"

namespace whp {
const Kernels portable_kernels = {"portable", portable::tile_size, portable::row_losses,
                                  portable::row_labels};
}
