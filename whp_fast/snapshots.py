"""Checkpoints within a training stage: written beside the training, and whole or not there.

Every process copies its rows to host memory; a thread of its own writes them into a folder
``.step-….partial``. Processes meet through the file system, because collectives from a second thread would
get in between those of the training: process 0 waits until every manifest is there, writes ``complete.json``
last, and renames the folder. Files, folder and parent are flushed to disk before anything older is removed.
So a process that is killed, a disk that is full or a power cut leaves the snapshot before, or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape

from whp_fast.durable import flush, make_folder, remove_folder, write_file
from whp_fast.errors import UserError
from whp_fast.progress import say
from whp_fast.rendezvous import Rendezvous
from whp_fast.snapshot_files import (
    FORMAT,
    MARKER,
    STATE,
    Damaged,
    Rows,
    Snapshot,
    candidates,
    check_rows,
    describe,
    file_pieces,
    index_of,
    is_whole,
    marker_text,
    open_snapshot,
    rank_file,
    step_folder,
)

__all__ = ["Rows", "Snapshot", "Snapshots"]


class Snapshots:
    """The snapshots of one training stage.

    Args:
        folder: made when the first snapshot is written; all processes see the same one.
        identity: fingerprint of everything the training depends on; snapshots of another are not used.
        rank: number of this process.
        world_size: number of processes; each must call :meth:`save` for every snapshot, in the same order.
        attempt: drawn anew by process 0 at every start and given to all, so that files of processes that were
            killed are never taken for those of this start. One process draws its own.
        barrier: waits for all processes; only called in :meth:`remove`, by the caller's thread.
        keep: how many whole snapshots stay.
        warn: is told, in one line each, what cannot be used or removed; also from the thread that writes.
        timeout: seconds to wait for the files of the other processes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        identity: str,
        rank: int = 0,
        world_size: int = 1,
        attempt: str = "",
        barrier: Callable[[], None] = lambda: None,
        keep: int = 2,
        warn: Callable[[str], None] = lambda text: say(f"[yellow]warning:[/yellow] {escape(text)}"),
        timeout: float = 1800.0,
    ):
        if not 0 <= rank < world_size or keep < 1:
            raise ValueError(f"rank {rank} of {world_size}, keep {keep}: out of range.")
        if world_size > 1 and not attempt:
            raise ValueError("several processes need one attempt, drawn by process 0.")
        if not re.fullmatch(r"[A-Za-z0-9_-]*", attempt):
            raise ValueError(f"attempt {attempt!r} must be of letters, digits, _ and -.")
        self.folder = Path(folder)
        self.identity = identity
        self.rank = rank
        self.world_size = world_size
        self.keep = keep
        self._attempt = attempt or os.urandom(8).hex()
        self._barrier = barrier
        self._warn = warn
        self._timeout = timeout
        self._saves = 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, tensors: Mapping[str, Rows], state: dict, *, wait: bool = False) -> None:
        """Take a snapshot; the writing goes on beside the caller.

        A save still in flight is waited for first. When this returns, the tensors may change: what is written
        is a copy in host memory.

        Args:
            step: the optimizer step that was done last.
            tensors: this process's rows. Of replicas with the same rows one is enough; the others pass none,
                but take part.
            state: JSON types; that of process 0 is kept.
            wait: until the snapshot is whole.

        Raises:
            UserError: an earlier save failed (full disk, a process that is gone), or this one with ``wait``.
            ValueError: tensors that could not be read back.
        """
        self._saves += 1  # first: it names the folder where processes meet, whatever goes wrong below
        self.wait()
        if step < 0:
            raise ValueError(f"step {step} is negative.")
        for name, rows in tensors.items():
            check_rows(name, rows)
        work = _Work(
            step=step,
            number=self._saves,
            attempt=f"{self._attempt}-{self._saves}",
            tensors={name: _copy(rows) for name, rows in tensors.items()},
            state=json.dumps(state, ensure_ascii=False).encode(),
        )
        name = f"snapshot-rank-{self.rank}"
        # a daemon: a process that ends in an error must not wait here for others that are gone too
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until no save is in flight; after it the last snapshot is whole.

        Raises:
            UserError: it could not be written. Told once; earlier snapshots are as they were.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def latest(self) -> Snapshot | None:
        """The newest whole snapshot of this identity, every checksum compared; None if there is none.

        For process 0, which tells the others the step: they :meth:`open` it. What cannot be used is named
        through ``warn``.
        """
        refused: list[str] = []
        chosen = None
        for step, path in candidates(self.folder):
            try:
                chosen = open_snapshot(path, step, self.identity, checksums=True)
                break
            except Damaged as error:
                refused.append(f"{path}: {error}")
        instead = f"step {chosen.step} is used instead" if chosen else "the training starts anew"
        for text in refused:
            self._warn(f"{text}; {instead}.")
        return chosen

    def open(self, step: int) -> Snapshot:
        """The snapshot of a step that :meth:`latest` chose; checksums of tensors are not compared again.

        Raises:
            UserError: it is not there, or not whole.
        """
        reason = "there is no snapshot of this step"
        for found, path in candidates(self.folder):
            if found == step:
                try:
                    return open_snapshot(path, step, self.identity, checksums=False)
                except Damaged as error:
                    reason = str(error)
        raise UserError(
            f"{self.folder / step_folder(step)}: {reason}; all processes must see the same run folder."
        )

    def remove(self) -> None:
        """Remove all snapshots, for a stage that is complete. Every process calls it. A save that failed is
        only told through ``warn``: its snapshot is not needed any more."""
        try:
            self.wait()
        except UserError as error:
            self._warn(str(error))
        self._barrier()
        if self.rank == 0 and self.folder.is_dir():
            for name in sorted(os.listdir(self.folder)):
                if re.match(r"step-\d|\.step-\d", name):
                    self._discard(self.folder / name, f"{self._attempt}-{self._saves}")
            with contextlib.suppress(OSError):  # something else is in it
                os.rmdir(self.folder)

    def _run(self, work: _Work) -> None:
        try:
            self._write(work)
        except BaseException as error:  # told by the next save() or wait()
            self._error = self._told(error, work.step)
            self._give_up(work, str(self._error))

    def _write(self, work: _Work) -> None:
        make_folder(self.folder)
        staging = self._staging(work)
        if self.rank == 0:
            self._clear_leftovers(work)
        with contextlib.suppress(FileExistsError):
            os.mkdir(staging)
        manifest = {
            "format": FORMAT,
            "identity": self.identity,
            "attempt": work.attempt,
            "step": work.step,
            "rank": self.rank,
            "tensors": describe(work.tensors),
            "file": None,
        }
        if work.tensors:
            file = self._tensor_file()
            record = write_file(staging / file, file_pieces(work.tensors))
            manifest["file"] = {"name": file, **record._asdict()}
        meeting = self._meeting(work)
        meeting.announce(manifest)
        if self.rank == 0:
            self._complete(work, staging, meeting)
        else:
            meeting.await_complete(self.folder / step_folder(work.step))

    def _complete(self, work: _Work, staging: Path, meeting: Rendezvous) -> None:
        """Process 0: meet the others, mark the snapshot complete, put it in its place, remove older ones."""
        files, manifests = meeting.gather()
        index_of(manifests)  # refuses what could not be read back
        files[STATE] = write_file(staging / STATE, [work.state])
        marker = {
            "format": FORMAT,
            "identity": self.identity,
            "attempt": work.attempt,
            "step": work.step,
            "world_size": self.world_size,
            "files": {name: list(record) for name, record in files.items()},
        }
        write_file(staging / MARKER, [marker_text(marker)])
        flush(staging)
        place = self.folder / step_folder(work.step)
        if os.path.lexists(place):  # until the new one is in its place this is found under its other name
            os.replace(place, self.folder / f".{place.name}.{work.attempt}.old")
        os.replace(staging, place)
        flush(self.folder)
        self._prune(work)

    def _give_up(self, work: _Work, reason: str) -> None:
        """Free the disk space and tell the other processes; whatever of it works."""
        staging = self._staging(work)
        work.tensors.clear()
        with contextlib.suppress(OSError):
            os.unlink(staging / self._tensor_file())
        with contextlib.suppress(OSError):
            if self.world_size == 1:
                remove_folder(staging)
            else:
                self._meeting(work).tell_failure(reason)

    def _told(self, error: BaseException, step: int) -> BaseException:
        if not isinstance(error, OSError):
            return error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "the disk is full"
            todo = "free some space and start again"
        else:
            what = f"{error.strerror or error}"
            todo = "check the disk and the rights of the folder"
        told = UserError(
            f"{error.filename or self.folder}: {what} while the snapshot of step {step} was written; {todo} "
            "(earlier snapshots are kept)."
        )
        told.__cause__ = error
        return told

    def _staging(self, work: _Work) -> Path:
        return self.folder / f".{step_folder(work.step)}.{work.attempt}.partial"

    def _tensor_file(self) -> str:
        return f"{rank_file(self.rank, self.world_size)}.safetensors"

    def _meeting(self, work: _Work) -> Rendezvous:
        return Rendezvous(self._staging(work), work.attempt, self.rank, self.world_size, self._timeout)

    def _clear_leftovers(self, work: _Work) -> None:
        """What killed processes and failed saves left. A folder of a later save is not touched: a process
        whose own save failed at once may be ahead."""
        for name in os.listdir(self.folder):
            match = re.fullmatch(r"\.step-\d+\.(.+)-(\d+)\.(partial|removed)", name)
            if match and not (match[1] == self._attempt and int(match[2]) >= work.number):
                self._remove(self.folder / name)

    def _prune(self, work: _Work) -> None:
        """Keep the new snapshot and the newest whole ones before it. Later steps were passed over when the
        training went on from an earlier one, so they are no use either."""
        kept = 0
        for step, path in candidates(self.folder):
            if path.name == step_folder(work.step):
                kept += 1
            elif step < work.step and 0 < kept < self.keep and is_whole(path, step, self.identity):
                kept += 1
            else:
                self._discard(path, work.attempt)

    def _discard(self, path: Path, attempt: str) -> None:
        """Remove a snapshot; a kill meanwhile leaves nothing that looks like a damaged one."""
        removed = path
        if path.name.startswith("step-"):
            removed = path.with_name(f".{path.name}.{attempt}.removed")
            try:
                os.replace(path, removed)
            except OSError as error:
                self._warn(f"{path}: cannot be removed ({error.strerror}); remove it by hand.")
                return
        self._remove(removed)

    def _remove(self, path: Path) -> None:
        try:
            remove_folder(path)
        except OSError as error:
            self._warn(f"{path}: cannot be removed ({error.strerror}); remove it by hand.")


@dataclass
class _Work:
    """One save: ``number`` counts those of this start, ``attempt`` names start and number."""

    step: int
    number: int
    attempt: str
    tensors: dict[str, Rows]
    state: bytes


def _copy(rows: Rows) -> Rows:
    values = rows.values.detach().to("cpu", copy=True).contiguous()
    return Rows(values, int(rows.first), tuple(int(size) for size in rows.shape))
