"""Every Triton kernel of the library with every tile that can be chosen for it.

``python -m benchmarks.compile_report`` compiles them all for several GPUs and fails if one spills registers.

To add a kernel, write a generator of :class:`Case` in a module of this folder and name it in ``SOURCES``. A
case holds the :class:`~whp_kernels.losses.triton.launch.Launch` that the kernel's own launcher would run,
built from tensors on the ``meta`` device (``torch.empty(..., device="meta")``); the report takes the types of
the arguments, their divisibility by 16 and the constexprs from it. Yield one case for each tile that the
launcher can choose, and for each family of constexprs that changes the code much. Every function whose name
ends with ``_kernel`` must appear.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import NamedTuple

from whp_kernels.losses.triton.launch import Launch

SOURCES = (
    "whp_kernels.losses.triton.row_cases:cases",
    "whp_kernels.losses.triton.linear_cases:cases",
    "whp_kernels.optim.triton_cases:cases",
    "whp_kernels.layers.triton.cases:cases",
)
"""``module:generator`` of each group of kernels."""


class Case(NamedTuple):
    """
    Attributes:
        name: what is compiled, for a table: rule, dtypes, options.
        tile: the tile, for a table.
        launch: what would run.
        quick: among the few that the tests compile.
        capabilities: NVIDIA compute capabilities on which the tile can be chosen (80, 90, 100), None for all.
            For AMD the report compiles the cases with None.
    """

    name: str
    tile: str
    launch: Launch
    quick: bool = False
    capabilities: tuple[int, ...] | None = None


def cases() -> Iterator[Case]:
    """All cases of all sources."""
    for source in SOURCES:
        module, generator = source.split(":")
        yield from getattr(importlib.import_module(module), generator)()
