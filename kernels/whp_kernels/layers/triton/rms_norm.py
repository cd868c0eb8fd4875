"""RMSNorm on GPUs: tiles and launches; the contract is in :mod:`whp_kernels.layers.reference`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from whp_kernels.layers.triton.column_sums import column_sums_kernel
from whp_kernels.layers.triton.rms_norm_backward import rms_norm_backward_kernel
from whp_kernels.layers.triton.rms_norm_forward import rms_norm_forward_kernel
from whp_kernels.losses.triton.launch import Launch


class NormTile(NamedTuple):
    """Rows and columns that a program has at once, its warps of 32 lanes, and whether that is a whole row."""

    rows: int
    block: int
    warps: int
    whole: bool


WIDEST_WHOLE = 8192
"""Rows up to here stay in registers, 16 columns a lane: the backward pass, which holds four rows of them
(x, gradient, weight, sum for the weight's gradient), spills on none of the GPUs of the compile report."""

LOOPED = NormTile(1, 4096, 8, False)
REGISTERS = 128
"""A lane may have: all of a multiprocessor's for the 16 warps of the widest tile. Left alone, the compiler
takes 40 to 100 and spills a few bytes of the float32 tiles."""
SUM_ROWS, SUM_COLUMNS = 32, 32  # of a program: one line of memory of each row


def norm_tile(width: int) -> NormTile:
    """The tile of both passes."""
    if width > WIDEST_WHOLE:
        return LOOPED
    block = max(triton.next_power_of_2(width), 64)
    return NormTile(max(1, 1024 // block), block, max(4, block // 512), True)


def weight_parts(rows: int, tile: NormTile) -> int:
    """Programs of the backward pass, each with its sums for the weight's gradient.

    It depends on the shape alone, and so do the bits of the gradient. 4 MiB of sums: at a width of 4096 these
    are 256 programs, of which two at a time fit onto each of an H100's 132 multiprocessors.
    """
    most = min(max(2**20 // (tile.rows * tile.block), 128), 1024)
    return min(triton.cdiv(rows, tile.rows), most)


def rms_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`whp_kernels.layers.reference.rms_norm`."""
    x = x.contiguous()
    branch = None if branch is None else branch.contiguous()
    total = x if branch is None else torch.empty_like(x)
    out = torch.empty_like(x, dtype=dtype)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    forward_launch(x, branch, weight.contiguous(), eps, total, out, scale).run(x.device)
    return total, out, scale


def rms_norm_backward(
    g_out: Tensor,
    g_sum: Tensor | None,
    total: Tensor,
    weight: Tensor,
    scale: Tensor,
    branch_dtype: torch.dtype | None,
    weight_too: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See :func:`whp_kernels.layers.reference.rms_norm_backward`."""
    width, device = total.shape[-1], total.device
    g_x = torch.empty_like(total)
    g_branch = None
    if branch_dtype is not None:
        g_branch = g_x if branch_dtype == total.dtype else torch.empty_like(total, dtype=branch_dtype)
    parts = g_weight = None
    if weight_too:
        tile = norm_tile(width)
        count = weight_parts(scale.numel(), tile)
        make = torch.empty if tile.whole else torch.zeros
        parts = make((count, width), dtype=torch.float32, device=device)
        g_weight = torch.empty(width, dtype=torch.float32, device=device)
    backward_launch(
        g_out.contiguous(),
        None if g_sum is None else g_sum.contiguous(),
        total,
        weight.contiguous(),
        scale,
        g_x,
        None if g_branch is g_x else g_branch,
        parts,
    ).run(device)
    if weight_too:
        sums_launch(parts, g_weight).run(device)
    return g_x, g_branch, g_weight


def forward_launch(x, branch, weight, eps, total, out, scale) -> Launch:
    """What :func:`rms_norm` runs; all tensors are contiguous."""
    rows, width = scale.numel(), x.shape[-1]
    tile = norm_tile(width)
    arguments = {
        "p_x": x,
        "p_branch": branch,
        "p_weight": weight,
        "p_sum": None if branch is None else total,
        "p_out": out,
        "p_scale": scale,
        "rows": rows,
        "width": width,
        "eps": eps,
    }
    return _launch(rms_norm_forward_kernel, triton.cdiv(rows, tile.rows), arguments, tile)


def backward_launch(g_out, g_sum, total, weight, scale, g_x, g_branch, parts) -> Launch:
    """What :func:`rms_norm_backward` runs for the rows; ``parts`` [programs, width] or None."""
    rows, width = scale.numel(), total.shape[-1]
    tile = norm_tile(width)
    arguments = {
        "p_g_out": g_out,
        "p_g_sum": g_sum,
        "p_sum": total,
        "p_weight": weight,
        "p_scale": scale,
        "p_g_x": g_x,
        "p_g_branch": g_branch,
        "p_parts": parts,
        "rows": rows,
        "width": width,
    }
    return _launch(rms_norm_backward_kernel, weight_parts(rows, tile), arguments, tile)


def _launch(kernel, programs: int, arguments: dict, tile: NormTile) -> Launch:
    constants = {"ROWS": tile.rows, "BLOCK": tile.block, "WHOLE": tile.whole}
    return Launch(kernel, (programs,), arguments | constants, tile.warps, registers=REGISTERS)


def sums_launch(parts: Tensor, out: Tensor) -> Launch:
    """``out[j] = sum of parts[:, j]``."""
    rows, width = parts.shape
    arguments = {"p_x": parts, "p_out": out, "rows": rows, "width": width}
    arguments |= {"ROWS": SUM_ROWS, "BLOCK": SUM_COLUMNS}
    return Launch(column_sums_kernel, (triton.cdiv(width, SUM_COLUMNS),), arguments, 4)
