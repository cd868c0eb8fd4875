"""Which backend runs a layer: compiled C++ for float32 and bfloat16 on the CPU, else the reference.

A backend is a module with the functions of ``reference.py``. ``WHP_KERNELS_LAYERS=reference`` asks for the
reference everywhere; it is read when the first layer runs.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch
from torch import Tensor

from whp_kernels import extension
from whp_kernels.layers import cpp, reference

_DTYPES = (torch.float32, torch.bfloat16)


def backend(*tensors: Tensor | None) -> ModuleType:
    """The backend for a call with these tensors (None: an argument that is left out)."""
    for tensor in tensors:
        if tensor is not None and not (tensor.is_cpu and tensor.dtype in _DTYPES):
            return reference
    return _on_cpu()


@functools.cache
def _on_cpu() -> ModuleType:
    asked = os.environ.get("WHP_KERNELS_LAYERS", "")
    if asked not in ("", "reference"):
        raise ValueError(f"WHP_KERNELS_LAYERS is {asked!r}, expected 'reference' or nothing")
    return cpp if not asked and extension.load() is not None else reference
