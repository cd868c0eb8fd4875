"""Time, memory and bandwidth of one implementation, on the CPU or on a GPU.

Time: inputs are made fresh and caches are flushed before each run, outside of what is timed. On a GPU by
events.

Memory: the highest point of a call above what was there before it, everything new included (gradients too).
On a GPU by the allocator. On the CPU the larger of two: the sum over torch's allocations in time (its
profiler), and how far the resident set rose (what libraries allocate by themselves; Linux only).
"""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.loss_cases import Inputs, Model, Op
from benchmarks.loss_implementations import Implementation


class Outputs(NamedTuple):
    loss: Tensor  # or labels
    gradients: tuple[Tensor, ...] | None
    milliseconds: tuple[float, float] = (0.0, 0.0)  # of both passes


def run(implementation: Implementation, op: Op, inputs: Inputs) -> Outputs:
    """Forward and, where there is one, backward; timed by the clock on the wall."""
    with torch.set_grad_enabled(op.gradient):
        began = time.perf_counter()
        loss = implementation.forward(inputs)
        between = time.perf_counter()
        gradients = implementation.backward(loss, inputs) if op.gradient else None
        ended = time.perf_counter() if op.gradient else between
    return Outputs(loss.detach(), gradients, (1e3 * (between - began), 1e3 * (ended - between)))


class Desk:
    """The inputs of one case, renewed before each run: an implementation may write over the student's logits.

    The teachers are only looked at; :meth:`unharmed` says whether that is so.
    """

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        self.buffer = None if isinstance(inputs.student, Model) else torch.empty_like(inputs.student)
        self.sums = self._sums()

    def fresh(self, rows: int | None = None) -> Inputs:
        """The inputs (of the first ``rows`` rows), with leaves that ask for a gradient."""
        inputs, part = self.inputs, slice(rows)
        if self.buffer is None:
            student = Model(inputs.student.hidden[part].detach(), inputs.student.weight.detach())
            for leaf in student:
                leaf.requires_grad_()
        else:
            self.buffer.copy_(inputs.student)
            student = self.buffer[part].detach().requires_grad_()
        if rows is None:
            return inputs._replace(student=student)
        teachers = [
            Model(teacher.hidden[part], teacher.weight) if isinstance(teacher, Model) else teacher[part]
            for teacher in (inputs.base, inputs.reinforced)
        ]
        return Inputs(student, *teachers, inputs.labels[part])

    def unharmed(self) -> bool:
        return self._sums() == self.sums

    def _sums(self) -> list[float]:
        shared = [*self.inputs[1:3], *(self.inputs.student if self.buffer is None else ())]
        tensors = [tensor for value in shared for tensor in (value if isinstance(value, Model) else [value])]
        return [float(tensor.sum(dtype=torch.float64)) for tensor in tensors]


# ------------------------------------------------------------------------------------------------------- time


class Clock:
    """Times runs on a device; holds the buffer that flushes its last-level cache."""

    def __init__(self, device: torch.device, flush_bytes: int | None = None):
        self.device = device
        self.flush_buffer = torch.zeros(
            flush_bytes or 4 * last_level_cache(device), dtype=torch.uint8, device=device
        )

    def time(self, implementation: Implementation, op: Op, inputs: Inputs) -> tuple[float, float]:
        """Milliseconds of the forward and of the backward pass."""
        gc.disable()
        try:
            self.flush_buffer.add_(1)
            if self.device.type == "cpu":
                return run(implementation, op, inputs).milliseconds
            with torch.set_grad_enabled(op.gradient):
                return self._events(implementation, op, inputs)
        finally:
            gc.enable()

    def _events(self, implementation, op, inputs):
        began, between, ended = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        began.record()
        loss = implementation.forward(inputs)
        between.record()
        gradients = implementation.backward(loss, inputs) if op.gradient else None
        ended.record()
        torch.cuda.synchronize(self.device)
        del gradients
        return began.elapsed_time(between), between.elapsed_time(ended) if op.gradient else 0.0

    def copy_bandwidth(self, megabytes: int) -> float:
        """GB/s read plus written by torch's copy of a buffer far larger than the caches; the best of ten."""
        source = torch.ones(megabytes * 10**6, dtype=torch.uint8, device=self.device)
        target = torch.zeros_like(source)
        copy = Implementation("copy", "", lambda inputs: target.copy_(source))
        op = Op("copy", "", "", None)
        best = min(self.time(copy, op, None)[0] for _ in range(10))
        return 2 * source.nbytes / best / 1e6


def last_level_cache(device: torch.device) -> int:
    """Bytes; where nothing is known 64 MiB."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    sizes = [64 << 20]
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    if caches:
        sizes = [int(path.read_text().strip().removesuffix("K")) << 10 for path in caches]
    return max(sizes)


# ----------------------------------------------------------------------------------------------------- memory


class Peak(NamedTuple):
    """Bytes above what was there before; None where it cannot be seen."""

    allocator: int
    resident: int | None

    @property
    def bytes(self) -> int:
        return max(self.allocator, self.resident or 0)


def peak_memory(device: torch.device, call: Callable[[], object]) -> tuple[Peak, object]:
    """The highest point of memory during ``call`` above the start, and what it returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        return Peak(torch.cuda.max_memory_allocated(device) - before, None), result
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        before = _reset_resident()
        result = call()
        resident = None if before is None else max(0, _status("VmHWM") - before)
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    now = highest = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        now += change
        highest = max(highest, now)
    return Peak(highest, resident), result


def _reset_resident() -> int | None:
    """Bytes resident now, with the high-water mark set back to that; None where the system has none."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the C library keeps would hide what is taken from it again
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, AttributeError):
        return None


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE).group(1)) * 1024
