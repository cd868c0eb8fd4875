"""One launch of a Triton kernel as a value: what it is called with, before it is called.

A launcher builds a :class:`Launch` and runs it. ``benchmarks/compile_report.py`` builds the same launches
from tensors on the ``meta`` device and compiles them without a GPU, so what is reported is what runs.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Launch:
    """
    Attributes:
        kernel: the function decorated with ``triton.jit``. Its name ends with ``_kernel``.
        grid: number of programs, 1 to 3 numbers. A 0 among them means that there is nothing to do.
        arguments: every argument by name: tensors, None for those not used, numbers, constexprs.
        warps: in units of 32 lanes; halved on devices whose warps have 64 (AMD CDNA).
        stages: of the software pipeline of matrix products.
        fp_fusion: whether ``a * b + c`` may be rounded once. Always given: Triton's default changes in 3.10.
        registers: at most this many a lane (NVIDIA); None: the compiler weighs registers against occupancy.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int = 1
    fp_fusion: bool = True
    registers: int | None = None

    def run(self, device: torch.device) -> None:
        """Runs on the current stream of ``device`` (which holds all tensors)."""
        if 0 in self.grid:
            return
        with _current(device):
            self.kernel[self.grid](**self.arguments, **self.options(*_backend(device)))

    def options(self, backend: str, warp_size: int) -> dict[str, Any]:
        """Triton's options on a backend (``cuda`` or ``hip``) whose warps have ``warp_size`` lanes."""
        chosen = {
            "num_warps": max(self.warps * 32 // warp_size, 1),
            "num_stages": self.stages,
            "enable_fp_fusion": self.fp_fusion,
        }
        if self.registers is not None and backend == "cuda":
            chosen["maxnreg"] = self.registers
        return chosen


def _current(device: torch.device):
    # a kernel goes to the current device whatever device its tensors are on
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _backend(device: torch.device) -> tuple[str, int]:
    if device.type != "cuda":  # the interpreter has no warps
        return "cuda", 32
    target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.warp_size
