"""State in host memory that goes through the device a piece at a time.

On a GPU three streams work at once: one brings the state of the next piece, one (the current stream) makes
the step, one takes the state back. The buffers on the device live during a step only; at most three pieces
are there. On other devices the same pieces go one after the other.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from whp_kernels.optim.update import Numbers, Tensors

PIECE_ELEMENTS = 1 << 23
"""Elements of a parameter at a time: at most 80 MiB of state."""
_SLOTS = 3
_PAGE = 4096
_ALIGNED = 64


def host_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros in host memory, pinned if ``device`` is a GPU.

    The memory is registered with the driver instead of taken from torch's pinned allocator, which rounds
    sizes up to powers of two.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cuda" or size == 0:
        return torch.zeros(shape, dtype=dtype)
    whole_pages = -(-size // _PAGE) * _PAGE  # of its own: the driver refuses a page that it has already
    memory = torch.zeros(whole_pages + _PAGE, dtype=torch.uint8)
    offset = -memory.data_ptr() % _PAGE
    tensor = memory[offset : offset + size].view(dtype).view(shape)
    driver, address = torch.cuda.cudart(), tensor.data_ptr()
    torch.cuda.check_error(driver.cudaHostRegister(address, whole_pages, 0))
    weakref.finalize(tensor, driver.cudaHostUnregister, address).atexit = False
    return tensor


def step(work: Sequence[tuple[Tensors, Numbers]], update: Callable[[Tensors, Numbers], None]) -> None:
    """``update`` of every parameter of ``work``, whose weights are on one device and states in host memory.

    It returns before the GPU has finished; the current stream waits for it.
    """
    pieces = [(piece, numbers) for whole, numbers in work for piece in whole.pieces(PIECE_ELEMENTS)]
    if not pieces:
        return
    device = pieces[0][0].weights.device
    size = max(_offsets(piece)[1] for piece, _ in pieces)
    slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(_SLOTS, len(pieces)))]
    streams = _Streams(device, len(slots))
    for number, (piece, numbers) in enumerate(pieces):
        slot = number % len(slots)
        there = _views(slots[slot], piece)
        with streams.bringing(slot):
            for name, tensor in piece.state.items():
                there[name].copy_(tensor, non_blocking=True)
        streams.brought()
        update(replace(piece, **there), numbers)
        with streams.taking(slot):
            for name, tensor in piece.state.items():
                tensor.copy_(there[name], non_blocking=True)
    streams.finish()


class _Streams:
    """Orders copies and steps; nothing to do where there are no streams."""

    def __init__(self, device: torch.device, slots: int):
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._main = torch.cuda.current_stream(device)
            self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)
            self._up.wait_stream(self._main)  # the buffers are the current stream's, and so is the last step
            self._free: list[torch.cuda.Event | None] = [None] * slots

    @contextlib.contextmanager
    def bringing(self, slot: int):
        if not self._cuda:
            yield
            return
        if self._free[slot] is not None:
            self._up.wait_event(self._free[slot])
        with torch.cuda.stream(self._up):
            yield

    def brought(self) -> None:
        if self._cuda:
            self._main.wait_event(self._up.record_event())

    @contextlib.contextmanager
    def taking(self, slot: int):
        if not self._cuda:
            yield
            return
        self._down.wait_event(self._main.record_event())
        with torch.cuda.stream(self._down):
            yield
        self._free[slot] = self._down.record_event()

    def finish(self) -> None:
        if self._cuda:
            self._main.wait_stream(self._down)


def _offsets(piece: Tensors) -> tuple[dict[str, int], int]:
    """Where each tensor of the state lies in a slot, and the bytes of all."""
    offsets, end = {}, 0
    for name, tensor in piece.state.items():
        offsets[name] = end
        end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    return offsets, end


def _views(slot: Tensor, piece: Tensors) -> dict[str, Tensor]:
    offsets, _ = _offsets(piece)
    return {
        name: slot[offsets[name] : offsets[name] + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for name, tensor in piece.state.items()
    }
