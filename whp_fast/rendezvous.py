"""Processes that write one snapshot meet through its folder: collectives from the thread that writes
would get in between those of the training.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from whp_fast.durable import Record, flush, write_file
from whp_fast.errors import UserError
from whp_fast.snapshot_files import marker_attempt, rank_file

_VANISHED_SECONDS = 60.0  # how long another machine may see neither a folder's old name nor its new one


class Rendezvous:
    """One meeting.

    Args:
        folder: where all write; its name is of this attempt alone, so no other's files are in it.
        attempt: the name of this save, as in the marker.
        rank: number of this process.
        world_size: number of processes.
        timeout: seconds to wait for others.
    """

    def __init__(self, folder: Path, attempt: str, rank: int, world_size: int, timeout: float):
        self.folder = folder
        self._attempt = attempt
        self._rank = rank
        self._world_size = world_size
        self._timeout = timeout

    def announce(self, manifest: dict) -> None:
        """Tell process 0 that this process's part is written.

        The manifest gets its name only when all is durable: process 0 waits for it and may rename the folder
        at once.
        """
        name = _manifest_file(self._rank, self._world_size)
        write_file(self.folder / f".{name}", [json.dumps(manifest, indent=1).encode()])
        flush(self.folder)  # on another machine, that of process 0 need not cover what is new here
        os.replace(self.folder / f".{name}", self.folder / name)

    def gather(self) -> tuple[dict[str, Record], list[dict]]:
        """Process 0: records of all files and the manifests of all processes, once they are there.

        Raises:
            UserError: another process told a failure, or did not come in time.
        """
        names = [_manifest_file(rank, self._world_size) for rank in range(self._world_size)]

        def missing() -> str:
            present = set(os.listdir(self.folder))
            self._refuse_failed(present)
            ranks = [str(rank) for rank, name in enumerate(names) if name not in present]
            return f"nothing came from process {', '.join(ranks)} of {self._world_size}" if ranks else ""

        self._poll(missing)
        files: dict[str, Record] = {}
        manifests = []
        for name in names:
            text = (self.folder / name).read_bytes()
            manifests.append(json.loads(text))
            files[name] = Record.of(text)
            if told := manifests[-1]["file"]:
                files[told["name"]] = Record(told["bytes"], told["sha256"])
        return files, manifests

    def await_complete(self, place: Path) -> None:
        """The others: until process 0 has put the snapshot in its place.

        Raises:
            UserError: as for :meth:`gather`.
        """
        vanished: float | None = None

        def missing() -> str:
            nonlocal vanished
            if marker_attempt(place) == self._attempt:
                return ""
            try:
                self._refuse_failed(set(os.listdir(self.folder)))
            except FileNotFoundError:  # renamed just now, or process 0 gave up and cleared it
                vanished = vanished or time.monotonic()
                if time.monotonic() - vanished > _VANISHED_SECONDS:
                    raise UserError(
                        f"{self.folder}: process 0 gave this snapshot up; see its message."
                    ) from None
            return "process 0 did not complete it"

        self._poll(missing)

    def tell_failure(self, reason: str) -> None:
        """Let the others know at once, as far as the disk allows."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.folder)
        note = self.folder / _failure_file(self._rank)
        partial = note.with_name(f".{note.name}")
        with contextlib.suppress(OSError):  # a full disk still takes an empty file
            write_file(partial, [reason.encode()])
        os.replace(partial, note)

    def _poll(self, missing: Callable[[], str]) -> None:
        deadline = time.monotonic() + self._timeout
        pause = 0.01
        while what := missing():
            left = deadline - time.monotonic()
            if left <= 0:
                raise UserError(
                    f"{self.folder}: {what} within {self._timeout:g} s; look at the messages of that process "
                    "and check that all processes see the same run folder."
                )
            time.sleep(min(pause, left))
            pause = min(1.0, 1.5 * pause)

    def _refuse_failed(self, present: set[str]) -> None:
        for rank in range(self._world_size):
            if _failure_file(rank) in present:
                reason = (self.folder / _failure_file(rank)).read_text("utf-8", errors="replace")
                raise UserError(f"process {rank}: {reason or 'its part of the snapshot cannot be written.'}")


def _manifest_file(rank: int, world_size: int) -> str:
    return f"{rank_file(rank, world_size)}.json"


def _failure_file(rank: int) -> str:
    return f"failed-{rank:05d}.txt"
