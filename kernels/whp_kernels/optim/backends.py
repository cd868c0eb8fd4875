"""Which implementation makes a step: ``reference`` (eager torch), ``cpp`` (CPU), ``triton`` (GPU)."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable

import torch

from whp_kernels import extension
from whp_kernels.losses.dispatch import triton_reason
from whp_kernels.optim.update import Numbers, Tensors

IMPLEMENTATIONS = ("auto", "reference", "cpp", "triton")


def update_function(impl: str, device: torch.device) -> Callable[[Tensors, Numbers], None]:
    """The function of :mod:`whp_kernels.optim.update` for parameters on ``device``.

    Raises:
        ValueError: an unknown ``impl``, or one that is not available or not made for the device.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}, give one of {', '.join(IMPLEMENTATIONS)}")
    name = _choose(device.type) if impl == "auto" else impl
    if impl != "auto" and name != "reference":
        reason = {"cpp": extension.reason, "triton": triton_reason}[name]()
        if reason is not None:
            raise ValueError(f"impl={name!r} is not available: {reason}")
        if name == "cpp" and device.type != "cpu":
            raise ValueError(f"impl='cpp' takes parameters on the CPU, they are on {device}")
    return importlib.import_module(f"whp_kernels.optim.{name}").update


def _choose(device_type: str) -> str:
    fast, reason = {"cuda": ("triton", triton_reason), "cpu": ("cpp", extension.reason)}.get(
        device_type, ("reference", lambda: None)
    )
    if reason() is None:
        return fast
    _warn_once(fast, reason())
    return "reference"


@functools.cache
def _warn_once(name: str, reason: str) -> None:
    warnings.warn(
        f"whp_kernels: the {name} AdamW is not available ({reason}); eager torch is used", stacklevel=4
    )
