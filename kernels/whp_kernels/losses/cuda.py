"""Row losses by thread-block clusters on NVIDIA Hopper GPUs: one pass over device memory (csrc/cuda).

A cluster of 1 to 16 blocks keeps one row in its shared memory, so every logit is read once and every element
of the gradient written once, however long the row. That is meant for vocabularies whose rows do not stay in
the L2 cache between the two passes of the Triton kernels: from about 128k columns on (the arithmetic is in
csrc/cuda/cluster_loss.cu).

It runs when asked for with ``impl="cuda"`` and is never chosen by itself: ``MEASURED_TO_WIN`` lists where it
was measured to beat the Triton kernels, and it is empty. The kernel compiles for sm_90a without spills, and
its algorithm is tested on the CPU (tests/kernels/test_cuda_cluster.py), but no GPU has run or timed it yet.

Taken: float32, bfloat16 and float16, mixed between student, teachers and gradient; every divergence; no
teachers, ``Identity``, ``Whp`` and ``Offset``; gathered teachers; row edits ``add`` and ``ban``; the gradient
in place. Not taken: ``StudentOffset``, ``RelativeTop``, row edits ``mean``, softcap, float64, teachers of
several dtypes, labels without a loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from whp_kernels import extension
from whp_kernels.losses.rows import RowLosses, Rows
from whp_kernels.losses.rule import DIVERGENCES

# (compute capability, range of vocabularies) where this kernel was measured to be the fastest.
MEASURED_TO_WIN: tuple[tuple[tuple[int, int], range], ...] = ()

CAPABILITY = (9, 0)  # the binary is sm_90a, which no other GPU runs
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# numbered as in csrc/cuda/row_terms.cuh, as are rule.DIVERGENCES
COMBINATIONS = ("none", "identity", "whp", "offset")
EDITS = ("none", "add", "ban")

_PACK_BYTES = 16  # of student logits: what one thread loads at once
_HEADER_BYTES = 2560  # kHeaderBytes of csrc/cuda/row_arguments.cuh
_BLOCK_BYTES = 227 * 1024  # kSharedLimit: shared memory that a block may have
_HALF_SM_BYTES = 113 * 1024  # with this, two blocks share the 228 KB of an SM (each costs 1 KB on top)


def available(device: torch.device | None = None) -> tuple[bool, str]:
    """Whether the kernel can run on this device (None: the current GPU), and the reason if not."""
    if not torch.cuda.is_available():
        return False, "there is no CUDA GPU"
    if device is not None and device.type != "cuda":
        return False, f"the logits are on {device}"
    found = torch.cuda.get_device_capability(device)
    if found != CAPABILITY:
        capability = ".".join(map(str, found))
        return False, f"the GPU has compute capability {capability}, the kernel is compiled for 9.0 (Hopper)"
    if extension.load() is None:
        return False, f"{extension.reason()}"
    if not hasattr(torch.ops.whp_kernels_C, "cluster_row_losses"):
        return False, "the extension was built without CUDA; build it with nvcc and WHP_KERNELS_FORCE_CUDA=1"
    return True, ""


def wins(capability: tuple[int, int], vocabulary: int) -> bool:
    """Whether ``impl="auto"`` should take this kernel: only where ``MEASURED_TO_WIN`` says so."""
    return any(capability == tuple(where) and vocabulary in columns for where, columns in MEASURED_TO_WIN)


def row_labels(rows: Rows, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Not offered: labels read their logits only once anyway."""
    raise ValueError("impl='cuda' has no labels kernel; use impl='triton'")


def row_losses(
    rows: Rows, *, statistics: bool = False, row_scale: Tensor | None = None, gradient: Tensor | None = None
) -> RowLosses:
    """As :func:`whp_kernels.losses.reference.row_losses`, for CUDA tensors.

    A label outside the vocabulary makes the row's loss and gradient NaN. ``gradient`` may lie over the
    student, row over row. The results are new tensors [n]: float32 losses and entropy, int64 targets and
    predictions.

    Raises:
        ValueError: a rule, dtype or vocabulary that the kernel does not take; see the module.
    """
    student, rule = rows.student, rows.rule
    _refuse(rows, gradient)
    n, vocabulary = student.shape

    def empty(dtype: torch.dtype) -> Tensor:
        return torch.empty(n, dtype=dtype, device=student.device)

    def vector(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if values is None else values.to(dtype).contiguous()

    results = RowLosses(empty(torch.float32), empty(torch.int64), empty(torch.float32), empty(torch.int64))
    edited = rule.edit != "none"
    _operator(student.device)(
        student,
        list(rows.teachers),
        [vector(index, torch.int64) for index in rows.teacher_rows],
        vector(rows.labels, torch.int64),
        vector(rows.edit_offsets, torch.int64) if edited else None,
        vector(rows.edit_tokens, torch.int64) if edited else None,
        vector(row_scale, torch.float32) if gradient is not None else None,
        gradient,
        *results,
        COMBINATIONS.index(rule.combination),
        rule.weight,
        DIVERGENCES.index(rule.divergence),
        rule.beta,
        rule.temperature,
        EDITS.index(rule.edit),
        rule.edit_value,
        rows.ignore_index,
        statistics,
        cluster_size(vocabulary, student.element_size(), with_target=bool(rows.teachers)),
    )
    return results


def cluster_size(vocabulary: int, element_size: int, *, with_target: bool) -> int:
    """Blocks in a cluster for a row of ``vocabulary`` columns: the fewest whose slices leave room for two
    blocks on an SM, else 16. A column takes ``element_size`` bytes of shared memory for the student, 4 for a
    target.

    Raises:
        ValueError: a row that not even 16 blocks hold.
    """
    columns = _PACK_BYTES // element_size  # of a pack
    pack_bytes = _PACK_BYTES + (4 * columns if with_target else 0)
    packs = -(-vocabulary // columns)
    for blocks in (1, 2, 4, 8, 16):
        if _HEADER_BYTES + -(-packs // blocks) * pack_bytes <= _HALF_SM_BYTES:
            return blocks
    most = (_BLOCK_BYTES - _HEADER_BYTES) // pack_bytes * columns * 16
    if vocabulary > most:
        raise ValueError(
            f"impl='cuda' holds rows of up to {most} columns here, the vocabulary has {vocabulary}; use "
            "impl='triton'"
        )
    return 16


def _operator(device: torch.device):
    ok, reason = available(device)
    if not ok:
        raise ValueError(f"impl='cuda' is not available: {reason}")
    return torch.ops.whp_kernels_C.cluster_row_losses


def _refuse(rows: Rows, gradient: Tensor | None) -> None:
    """Raise ValueError for what the kernel does not take."""
    rule = rows.rule
    if rows.student is None:
        raise ValueError("impl='cuda' computes losses of a student, but no student is given")
    for found, what in (
        (rule.combination not in COMBINATIONS, "StudentOffset"),
        (bool(rule.relative_top), "relative_top"),
        (rule.edit not in EDITS, f"row edits of kind {rule.edit!r}"),
        (bool(rule.softcap), "softcap"),
    ):
        if found:
            raise ValueError(f"impl='cuda' does not take {what}; use impl='triton'")
    named = [("student", rows.student), *((f"teacher {k}", t) for k, t in enumerate(rows.teachers))]
    if gradient is not None:
        named.append(("gradient", gradient))
    for name, tensor in named:
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"impl='cuda' takes float32, bfloat16 and float16, but the {name} is {tensor.dtype}"
            )
        if tensor.stride(1) != 1 and tensor.shape[1] != 1:
            raise ValueError(
                f"impl='cuda' needs adjacent columns, but the {name} has strides {tensor.stride()}"
            )
    dtypes = {teacher.dtype for teacher in rows.teachers}
    if len(dtypes) > 1:
        found = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"impl='cuda' takes teachers of one dtype, got {found}; use impl='triton'")
    if gradient is None:
        return
    for k, tensor in enumerate((rows.student, *rows.teachers)):
        gathered = k > 0 and bool(rows.teacher_rows) and rows.teacher_rows[k - 1] is not None
        if _lies_over_other_rows(gradient, tensor, gathered):
            what = "student" if k == 0 else f"teacher {k - 1}"
            raise ValueError(
                f"the gradient lies over other rows of the {what} than its own, which could be read after "
                "they were overwritten; give a gradient with the same rows, or one of its own"
            )


def _lies_over_other_rows(gradient: Tensor, tensor: Tensor, gathered: bool) -> bool:
    """Whether writing row ``n`` of the gradient changes another row of the tensor than ``n``: rows are read
    and written at the same time, each by its own cluster."""
    n, vocabulary = tensor.shape
    if n == 0 or gradient.shape[0] == 0:
        return False
    begin, at = tensor.data_ptr(), gradient.data_ptr()
    row, written = vocabulary * tensor.element_size(), vocabulary * gradient.element_size()
    step, stride = tensor.stride(0) * tensor.element_size(), gradient.stride(0) * gradient.element_size()
    if at + (gradient.shape[0] - 1) * stride + written <= begin or begin + (n - 1) * step + row <= at:
        return False  # nothing in common
    if gathered:
        return True
    return n > 1 and (step != stride or at < begin - step + row or at + written > begin + step)
