// The Python module whp_kernels._C: importing it loads this library, and loading it registers the operators
// of all source files (each has its own STABLE_TORCH_LIBRARY_FRAGMENT(whp_kernels_C, m)) under
// torch.ops.whp_kernels_C.
#include <Python.h>

extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition{
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
