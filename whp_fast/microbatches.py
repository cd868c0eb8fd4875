"""The micro-batches of a training: which blocks each holds, and their tokens and targets, prepared ahead.

A thread reads, packs and looks up what the next micro-batches need, in page-locked memory where they go to a
GPU, so that the loop only waits when reading is slower than computing. What a step holds follows from its
number alone, so the thread runs on from step to step.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from whp_fast.objectives import Objective, Prepared
from whp_fast.packing import Packing, pack
from whp_fast.processes import Processes

AHEAD = 2
"""Micro-batches that are ready before they are asked for."""


@dataclass(frozen=True)
class StepCounts:
    """What a step holds.

    Attributes:
        tokens: read, of all objectives and processes.
        trained: positions of each objective, of all processes.
        batches: micro-batches of this process; none where nothing is trained.
    """

    tokens: int
    trained: tuple[int, ...]
    batches: int


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Blocks of one objective, packed.

    Attributes:
        objective: its number.
        input_ids: int64 [tokens].
        prepared: of the targets; None for a process that has no block left and computes along.
    """

    objective: int
    input_ids: Tensor
    packing: Packing
    prepared: Prepared | None

    def pin(self) -> MicroBatch:
        """The same in page-locked memory."""
        prepared = None if self.prepared is None else self.prepared.pin()
        return MicroBatch(self.objective, self.input_ids.pin_memory(), self.packing.pin(), prepared)

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device; from page-locked memory the copy is not waited for."""
        prepared = None if self.prepared is None else self.prepared.to(device)
        ids = self.input_ids.to(device, non_blocking=True)
        return MicroBatch(self.objective, ids, self.packing.to(device), prepared)


class MicroBatches:
    """This process's micro-batches, step after step; a context manager, whose end ends the thread.

    For each step :meth:`step` has to be called once, then :meth:`next` as often as it says.

    Args:
        plan: the block numbers of the first objective, step by step, from the step ``first`` on.
        seed: of the order of the other objectives' blocks.
        size: blocks in a micro-batch.
        device: where the micro-batches go.

    Attributes:
        waited: seconds spent waiting so far.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        plan: Sequence[np.ndarray],
        *,
        first: int,
        seed: int,
        size: int,
        processes: Processes,
        device: torch.device,
    ):
        self._objectives, self._plan, self._first = list(objectives), plan, first
        self._seed, self._size, self._processes, self._device = seed, size, processes, device
        # a thread begins on GPU 0, where page-locked memory of another GPU would make a context
        self._gpu = None
        if device.type == "cuda":
            self._gpu = torch.cuda.current_device() if device.index is None else device.index
        self.waited = 0.0
        self._ready: queue.Queue = queue.Queue(AHEAD)
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="micro-batches")

    def __enter__(self) -> MicroBatches:
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._left.set()
        self._thread.join()

    def step(self) -> StepCounts:
        """What the next step holds.

        Raises:
            UserError: a cache of the targets is damaged.
        """
        return self._take()

    def next(self) -> MicroBatch:
        """The next micro-batch of the step, on the device."""
        return self._take().to(self._device)

    def _take(self):
        began = time.monotonic()
        found = self._ready.get()
        self.waited += time.monotonic() - began
        if isinstance(found, BaseException):
            raise found
        return found

    def _run(self) -> None:
        try:
            if self._gpu is not None:
                torch.cuda.set_device(self._gpu)
            for found in self._all():
                if not self._put(found):
                    return
        except BaseException as error:  # told where the micro-batches are used
            self._put(error)

    def _put(self, found) -> bool:
        while not self._left.is_set():
            try:
                self._ready.put(found, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _all(self) -> Iterator[StepCounts | MicroBatch]:
        for step, main in enumerate(self._plan, start=self._first):
            chosen = numbers_of_step(self._objectives, main, step, self._seed)
            trained = tuple(o.targets.count(numbers) for o, numbers in zip(self._objectives, chosen))
            mine = [
                (k, numbers, part)
                for k, numbers in enumerate(chosen)
                if trained[k]
                for part in _parts(numbers, self._size, self._processes)
            ]
            pairs = zip(self._objectives, chosen)
            tokens = sum(len(o.blocks[int(number)]) for o, numbers in pairs for number in numbers)
            yield StepCounts(tokens, trained, len(mine))
            for k, numbers, part in mine:
                batch = self._batch(k, part, numbers[:1])
                yield batch if self._gpu is None else batch.pin()

    def _batch(self, k: int, part: np.ndarray, instead: np.ndarray) -> MicroBatch:
        objective = self._objectives[k]
        read = part if len(part) else instead
        ids, packing = pack([objective.blocks[int(number)] for number in read])
        return MicroBatch(k, ids, packing, objective.targets.prepare(part) if len(part) else None)


def numbers_of_step(
    objectives: Sequence[Objective], main: np.ndarray, step: int, seed: int
) -> list[np.ndarray]:
    """The blocks of each objective in this step: of the others as many as of the first, round and round."""
    chosen = [main]
    for k, objective in enumerate(objectives[1:], start=1):
        n_blocks, per_step = len(objective.blocks), len(main)
        places = np.arange((step - 1) * per_step, step * per_step)
        rounds = {
            int(r): np.random.default_rng([seed, int(r), k]).permutation(n_blocks)
            for r in np.unique(places // n_blocks)
        }
        chosen.append(np.array([rounds[int(place) // n_blocks][place % n_blocks] for place in places]))
    return chosen


def makes_an_update(objectives: Sequence[Objective], main: np.ndarray, step: int, seed: int) -> bool:
    """Whether a step has anything to train."""
    every = numbers_of_step(objectives, main, step, seed)
    return any(o.targets.count(numbers) > 0 for o, numbers in zip(objectives, every))


def _parts(numbers: np.ndarray, size: int, processes: Processes) -> list[np.ndarray]:
    """This process's blocks of a step, ``size`` at a time; as many times on every process."""
    times = math.ceil(math.ceil(len(numbers) / processes.world_size) / size)
    mine = numbers[processes.rank :: processes.world_size]
    return [mine[k * size : (k + 1) * size] for k in range(times)]
