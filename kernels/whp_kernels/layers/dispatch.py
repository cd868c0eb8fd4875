"""Which backend runs a layer: Triton on CUDA and ROCm, compiled C++ on the CPU, else the reference.

A backend is a module with the functions of ``reference.py``: ``triton`` for float32, bfloat16 and float16,
``cpp`` for float32 and bfloat16. While ``torch.compile`` traces it is the reference, whose operators the
compiler fuses by itself. ``WHP_KERNELS_LAYERS``, read when the first layer runs, asks for one of them by name
wherever it can run: ``reference``, ``cpp``, or ``triton`` (in Triton's interpreter on the CPU too).
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from whp_kernels import extension
from whp_kernels.layers import cpp, reference

_CPP = (torch.float32, torch.bfloat16)
_TRITON = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = ("reference", "cpp", "triton")


def backend(*tensors: Tensor | None) -> ModuleType:
    """The backend for a call with these tensors (None: an argument that is left out)."""
    if torch.compiler.is_compiling():
        return reference
    given = [tensor for tensor in tensors if tensor is not None]
    asked = _asked()
    if asked == "reference":
        return reference
    if asked == "triton" or (not asked and all(tensor.is_cuda for tensor in given)):
        triton = _triton()
        return triton if triton is not None and all(t.dtype in _TRITON for t in given) else reference
    if all(tensor.is_cpu and tensor.dtype in _CPP for tensor in given) and extension.load() is not None:
        return cpp
    return reference


@functools.cache
def _asked() -> str:
    asked = os.environ.get("WHP_KERNELS_LAYERS", "")
    if asked and asked not in _NAMES:
        names = ", ".join(map(repr, _NAMES))
        raise ValueError(f"WHP_KERNELS_LAYERS is {asked!r}, expected one of {names}, or nothing")
    if asked == "cpp" and extension.load() is None:
        raise ValueError(f"WHP_KERNELS_LAYERS is 'cpp', but {extension.reason()}")
    if asked == "triton" and _triton() is None:
        raise ValueError("WHP_KERNELS_LAYERS is 'triton', but Triton cannot be imported; install triton")
    return asked


@functools.cache
def _triton() -> ModuleType | None:
    """Imported when a layer first runs on a GPU; None where there is no Triton."""
    try:
        return importlib.import_module("whp_kernels.layers.triton")
    except ImportError:
        return None
