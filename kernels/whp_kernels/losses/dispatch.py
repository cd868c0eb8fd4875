"""The one place that decides which implementation runs a loss.

reference   eager torch: any device, any dtype, float64
cpp         the compiled extension, CPU: AVX-512, AVX2 or portable
triton      NVIDIA and AMD GPUs
cuda        thread-block clusters, NVIDIA Hopper and newer; on request, or where it was measured to win
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from types import ModuleType

import torch

from whp_kernels import extension
from whp_kernels.losses.rows import Rows

IMPLEMENTATIONS = ("auto", "reference", "triton", "cpp", "cuda")


def backend(impl: str, rows: Rows) -> ModuleType:
    """The module that offers ``row_labels`` and ``row_losses`` for these rows.

    Raises:
        ValueError: an unknown ``impl``, or one that cannot run these rows.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}, give one of {', '.join(IMPLEMENTATIONS)}")
    name = choose(rows) if impl == "auto" else impl
    if impl != "auto":
        _refuse_unavailable(name)
    return importlib.import_module(f"whp_kernels.losses.{name}")


def choose(rows: Rows) -> str:
    """What ``impl="auto"`` means for these rows; warns once where the fast one is missing."""
    tensors = [*rows.teachers, *([] if rows.student is None else [rows.student])]
    if any(t.dtype == torch.float64 for t in tensors):
        return "reference"
    device = rows.first.device.type
    if device == "cuda":
        if triton_reason() is not None:
            _warn_once("triton", triton_reason())
            return "reference"
        if rows.student is not None:
            from whp_kernels.losses import cuda

            if cuda.wins(torch.cuda.get_device_capability(rows.first.device), rows.first.shape[1]):
                return "cuda"
        return "triton"
    if device == "cpu":
        if extension.load() is None:
            _warn_once("cpp", extension.reason())
            return "reference"
        return "cpp"
    return "reference"


def backends() -> dict[str, str]:
    """What is there: implementation -> ``"available"`` or the reason why not."""
    return {
        "reference": "available",
        "cpp": extension.reason() or "available",
        "triton": triton_reason() or "available",
        "cuda": _cuda_reason() or "available",
    }


def _refuse_unavailable(name: str) -> None:
    reasons = {"cpp": extension.reason, "triton": triton_reason, "cuda": _cuda_reason}
    reason = reasons[name]() if name in reasons else None
    if reason is not None:
        raise ValueError(f"impl={name!r} is not available: {reason}")


def triton_reason() -> str | None:
    """Why the Triton kernels cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        return "there is no GPU (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter)"
    return None


def _cuda_reason() -> str | None:
    from whp_kernels.losses import cuda

    available, reason = cuda.available()
    return None if available else reason


@functools.cache
def _warn_once(name: str, reason: str | None) -> None:
    warnings.warn(
        f"whp_kernels: the {name} kernels are not available ({reason}); eager torch is used", stacklevel=4
    )
