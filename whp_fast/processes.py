"""The processes of a job: which one this is, what they tell each other, and what happens when one is gone.

One process needs no group and pays for none. Several (``torchrun --nproc-per-node N``) share a gloo group on
the CPU, and beside it NCCL where the models live on GPUs. Every process writes a heartbeat into the group's
store; one whose heartbeat stops, or that left with an error, is named by the others, which then end too,
instead of waiting for it in a collective for half an hour.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from whp_fast.errors import UserError
from whp_fast.stopping import deaf_to_sigterm

BEAT_SECONDS = 2.0
SILENT_SECONDS = 30.0
"""A process without a heartbeat for so long is taken for dead."""
TIMEOUT = datetime.timedelta(hours=6)
"""Of a collective: others wait while the first process tokenises or evaluates. The dead are found by their
heartbeats."""


@dataclass
class Processes:
    """The group that this process belongs to.

    Attributes:
        rank, world_size: its number, and how many there are.
        local_rank: its number on this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    _watch: _Watch | None = field(default=None, repr=False)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.world_size > 1

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.several:
            dist.all_reduce(values)
        return values

    def from_first(self, value: Any = None) -> Any:
        """What the first process has (small Python objects)."""
        if not self.several:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def all_of(self, value: Any) -> list:
        """What each process has (small Python objects), in order of rank."""
        if not self.several:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.several:
            self.all_of(None)

    def close(self, reason: str = "") -> None:
        """Leave the group. ``reason``: why this process cannot go on; the others tell it and end."""
        if self._watch is not None:
            self._watch.leave(reason)
            self._watch = None
        if self.several and dist.is_initialized() and not reason:
            dist.destroy_process_group()


@contextlib.contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """The group that ``torchrun`` describes in the environment; without it, this process alone.

    Args:
        device: ``run.device``; decides the library of collectives.

    Raises:
        UserError: the environment does not fit together, or the group does not come about.
    """
    world_size = _environment("WORLD_SIZE", 1)
    if world_size == 1:
        yield Processes()
        return
    rank, local_rank = _environment("RANK", 0), _environment("LOCAL_RANK", 0)
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"WORLD_SIZE: process {rank} would need GPU {local_rank} of this machine, which has "
                f"{torch.cuda.device_count()}; start torchrun with --nproc-per-node "
                f"{torch.cuda.device_count()}."
            )
        torch.cuda.set_device(local_rank)
    try:
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"MASTER_ADDR: the {world_size} processes did not find each other "
            f"({str(error).splitlines()[0]}); start them with torchrun."
        ) from error
    processes = Processes(rank, world_size, local_rank, _Watch(rank, world_size))
    watch = processes._watch
    try:
        yield processes
    except RuntimeError as error:  # of a collective, when another process is gone; or of our own
        with deaf_to_sigterm():
            lost = watch.gone(patience=6 * BEAT_SECONDS)
            processes.close(reason=lost or _in_a_line(error))
        if not lost:
            raise
        raise ProcessLost(lost, told_by=watch.lowest_here()) from error
    except BaseException as error:
        reason = _in_a_line(error)
        said = bool(rank) and watch.said_by_first(reason, patience=2 * BEAT_SECONDS)
        processes.close(reason)
        if said:
            raise SystemExit(2) from error  # the same in all processes: said once
        if not rank:
            watch.await_others(patience=4 * BEAT_SECONDS)  # they compare their reason with this one's
        raise
    processes.close()


class ProcessLost(Exception):
    """Another process is gone. ``told_by``: the process that tells the person."""

    def __init__(self, text: str, told_by: int):
        super().__init__(text)
        self.told_by = told_by


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdigit():
        raise UserError(f"{name}: {text!r} is no number of processes; start the job with torchrun.")
    return int(text)


class _Watch:
    """Heartbeats of all processes, in the group's store, written and read by a thread."""

    def __init__(self, rank: int, world_size: int):
        self._rank, self._others = rank, [r for r in range(world_size) if r != rank]
        # a connection of its own: the group's would be blocked while the main thread waits on it
        self._store = dist.PrefixStore("heartbeat", dist.distributed_c10d._get_default_store().clone())
        self._where = f"{socket.gethostname()}, pid {os.getpid()}"
        self._seen = {r: ("", time.monotonic()) for r in self._others}
        self._lock = threading.Lock()
        self._left = threading.Event()
        self._beat(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def leave(self, reason: str) -> None:
        """Tell the others that the silence to come is meant: a good end, or ``reason``."""
        self._left.set()
        self._thread.join(timeout=4 * BEAT_SECONDS)
        with contextlib.suppress(RuntimeError, OSError):
            self._store.set(f"{self._rank}", f"left|{self._where}|{reason[:1000]}")

    def gone(self, patience: float) -> str:
        """A sentence about a process that is gone; waits so long for one to fall silent. Empty: none."""
        until = time.monotonic() + patience
        while time.monotonic() < until:
            try:
                told = self._look(silent=4 * BEAT_SECONDS)
            except (RuntimeError, OSError):
                return self._without_store()
            if told:
                return told
            time.sleep(0.2)
        return ""

    def lowest_here(self) -> int:
        """The lowest number among the processes that have not left and are not silent."""
        now = time.monotonic()
        here = [
            r
            for r, (beat, at) in self._seen.items()
            if not beat.startswith("left") and now - at < 4 * BEAT_SECONDS
        ]
        return min([self._rank, *here])

    def said_by_first(self, reason: str, patience: float) -> bool:
        """Whether process 0 leaves for the same reason, within so many seconds."""
        until = time.monotonic() + patience
        while time.monotonic() < until:
            with contextlib.suppress(RuntimeError, OSError), self._lock:
                if self._store.get("0").decode().split("|", 2)[2] == reason[:1000]:
                    return True
            time.sleep(0.1)
        return False

    def await_others(self, patience: float) -> None:
        """Until the others have left too, or so many seconds: the store may be this process's."""
        until = time.monotonic() + patience
        with contextlib.suppress(RuntimeError, OSError), self._lock:
            while time.monotonic() < until:
                beats = [self._store.get(f"{r}") for r in self._others if self._store.check([f"{r}"])]
                if len(beats) == len(self._others) and all(beat.startswith(b"left") for beat in beats):
                    return
                time.sleep(0.05)

    def _run(self) -> None:
        count = 0
        while not self._left.wait(BEAT_SECONDS):
            count += 1
            try:
                self._beat(count)
                told = self._look(silent=SILENT_SECONDS)
            except (RuntimeError, OSError):
                told = self._without_store()
            if told and not self._left.wait(8 * BEAT_SECONDS):  # the main thread may find out by itself
                if self.lowest_here() == self._rank and "could not go on" not in told:
                    print(f"error: {told}", file=sys.stderr, flush=True)
                os._exit(1)

    def _without_store(self) -> str:
        if 0 in self._seen:  # it, or torchrun beside it, kept the store
            self._seen[0] = ("left", time.monotonic())
        return (
            "process 0, or the torchrun that started it, is gone: it was killed, or its machine is gone; "
            "start the job again, it goes on from the last snapshot."
        )

    def _beat(self, count: int) -> None:
        with self._lock:
            self._store.set(f"{self._rank}", f"here|{self._where}|{count}")

    def _look(self, silent: float) -> str:
        with self._lock:
            present = [r for r in self._others if self._store.check([f"{r}"])]
            beats = {r: self._store.get(f"{r}").decode() for r in present}
        now = time.monotonic()
        for r in self._others:
            beat = beats.get(r, "")
            if beat != self._seen[r][0]:
                self._seen[r] = (beat, now)
            state, where, reason = (beat.split("|", 2) + ["", ""])[:3] if beat else ("", "", "")
            if state == "left" and reason:
                return f"process {r} ({where}) could not go on: {reason}"
            if state != "left" and now - self._seen[r][1] > silent:
                where = f" ({where})" if where else ""
                return (
                    f"process {r}{where} has stopped answering: it was killed, or its machine is gone; start "
                    "the job again, it goes on from the last snapshot."
                )
        return ""
