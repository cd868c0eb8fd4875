"""The run folder: one folder per stage, complete or not there.

A stage writes into ``.<stage>.partial`` beside its place; only when all is written and flushed to disk is the
folder renamed. So a run that was killed, or met a full disk, keeps every earlier artifact, and a folder with
a ``complete.json`` is whole. That file holds the fingerprint of everything the stage depends on: same
fingerprint, nothing to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from whp_fast.durable import flush
from whp_fast.errors import UserError

_MARKER = "complete.json"
_SETTINGS = "settings.json"
_FORMAT = 2  # raised when artifacts change their layout, so that old ones are made anew
_HASHED_BYTES = 1 << 20
_SAMPLES = 64


@dataclasses.dataclass(frozen=True)
class Stage:
    """A finished stage.

    Attributes:
        folder: where its files are.
        fingerprint: what they depend on.
        seconds: how long the stage took when it ran.
        summary: what the stage has to tell (counts and figures, JSON types).
        skipped: whether it was found complete.
    """

    folder: Path
    fingerprint: str
    seconds: float
    summary: dict
    skipped: bool


class RunFolder:
    """The folder of one run.

    Args:
        path: created if missing.
        settings: everything that decides the result, as JSON types; a folder made by other settings is
        refused.
        overwrite: start anew: remove the stages that are there.

    Raises:
        UserError: other settings, another process at work in it, or no right to write.
    """

    def __init__(self, path: Path, settings: dict, *, overwrite: bool = False):
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{self.path}: another process is working in this run folder; wait, or set run.dir."
            ) from error
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot write to the run folder ({error.strerror}); set run.dir."
            ) from error
        try:
            if overwrite:
                self._clear()
            self._check_settings(settings)
        except BaseException:
            self.close()
            raise

    def finished(self, name: str, fingerprint: str) -> Stage | None:
        """The stage, if it is complete for these dependencies (see :func:`stage_fingerprint`)."""
        self._recover(self.path / name)
        done = self.read(name)
        return done if done is not None and done.fingerprint == fingerprint else None

    def stage(self, name: str, depends_on: dict, work: Callable[[Path], dict | None]) -> Stage:
        """Run a stage unless it is complete for the same dependencies.

        Args:
            name: folder name.
            depends_on: everything the result depends on (settings, fingerprints of inputs and earlier
            stages).
            work: writes the files into the folder it is given; returns the summary, whose "earlier_seconds"
                (of a start that was stopped before) are added to those of the stage.

        Raises:
            UserError: the disk is full. What was there before stays, and nothing half-written is left.
        """
        fingerprint = stage_fingerprint(name, depends_on)
        folder = self.path / name
        done = self.finished(name, fingerprint)
        if done is not None:
            return done
        partial = folder.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        began = time.monotonic()
        try:
            partial.mkdir()
            summary = work(partial) or {}
            seconds = time.monotonic() - began + summary.pop("earlier_seconds", 0.0)
            _mark_complete(partial, fingerprint, seconds, summary)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if _disk_is_full(error):
                raise UserError(
                    f"{self.path}: the disk is full while stage {name!r} writes; free some space and start "
                    "again (finished stages are kept)."
                ) from error
            raise
        _exchange(partial, folder)
        return Stage(folder, fingerprint, seconds, summary, skipped=False)

    def read(self, name: str) -> Stage | None:
        """A complete stage, or None. Files of another size than recorded make it incomplete."""
        folder = self.path / name
        try:
            marker = json.loads((folder / _MARKER).read_text())
            whole = all((folder / file).stat().st_size == size for file, size in marker["files"].items())
        except (OSError, ValueError, KeyError):
            return None
        if not whole:
            return None
        return Stage(folder, marker["fingerprint"], marker["seconds"], marker["summary"], skipped=True)

    def close(self) -> None:
        self._lock.close()

    def _check_settings(self, settings: dict) -> None:
        file = self.path / _SETTINGS
        settings = json.loads(json.dumps(settings))
        stages = [entry for entry in self.path.iterdir() if (entry / _MARKER).is_file()]
        if file.is_file() and stages:  # with none finished there is nothing that other settings could spoil
            before = flatten(json.loads(file.read_text()))
            now = flatten(settings)
            different = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
            if different:
                shown = "; ".join(f"{k}: {before.get(k)!r} there, {now.get(k)!r} now" for k in different[:5])
                more = f" and {len(different) - 5} more" if len(different) > 5 else ""
                raise UserError(
                    f"{self.path}: this run folder was made with other settings ({shown}{more}); "
                    "set run.dir to a new folder, or add --overwrite to start anew."
                )
        write_json(file, settings)

    def _clear(self) -> None:
        ours = (".partial", ".old", ".snapshots")
        for entry in self.path.iterdir():
            if entry.is_dir() and ((entry / _MARKER).is_file() or entry.name.endswith(ours)):
                shutil.rmtree(entry)
        (self.path / _SETTINGS).unlink(missing_ok=True)

    def _recover(self, folder: Path) -> None:
        """After a kill between the two renames of an exchange, the old folder goes back to its place."""
        old = folder.with_name(f".{folder.name}.old")
        if old.is_dir():
            if folder.is_dir():
                shutil.rmtree(old)
            else:
                os.replace(old, folder)


class NpyWriter:
    """Appends to a one-dimensional ``.npy`` file whose length is not known beforehand."""

    def __init__(self, path: Path, dtype):
        self.dtype = np.dtype(dtype)
        self.count = 0
        self._file = open(path, "wb")
        self._write_header()

    def append(self, values) -> None:
        self._file.write(np.ascontiguousarray(values, dtype=self.dtype).tobytes())
        self.count += len(values)

    def close(self) -> None:
        # numpy pads the header so that the length may grow in place
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def __enter__(self) -> NpyWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _write_header(self) -> None:
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def write_json(path: Path, value) -> None:
    """Write JSON so that the file is the old or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def digest(value) -> str:
    """A fingerprint of JSON-like data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def stage_fingerprint(name: str, depends_on: dict) -> str:
    """What makes a stage's result the one that is asked for."""
    return digest({"stage": name, "format": _FORMAT, **depends_on})


def files_digest(files: Iterable[Path], *, sampled: bool = False) -> str:
    """A fingerprint of files: their whole content, or with ``sampled`` of files beyond 64 MiB the size and 64
    pieces of 1 MiB, evenly spaced from the first to the last.

    Samples are for weights, which would take as long to hash as to load: training or merging changes so many
    tensors that some of the pieces show it. An edit of a text can be anywhere.
    """
    state = hashlib.sha256()
    for path in files:
        path = Path(path)
        try:
            size = path.stat().st_size
            state.update(f"{path.name}:{size}:".encode())
            with open(path, "rb") as file:
                if not sampled or size <= _SAMPLES * _HASHED_BYTES:
                    while block := file.read(_HASHED_BYTES):
                        state.update(block)
                else:
                    for k in range(_SAMPLES):
                        file.seek(k * (size - _HASHED_BYTES) // (_SAMPLES - 1))
                        state.update(file.read(_HASHED_BYTES))
        except OSError as error:
            raise UserError(f"{path}: cannot read ({error.strerror}); check the path.") from error
    return state.hexdigest()[:32]


def flatten(settings: dict, prefix: str = "") -> dict:
    """``{"a": {"b": 1}}`` to ``{"a.b": 1}``."""
    flat: dict = {}
    for key, value in settings.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _disk_is_full(error: BaseException) -> bool:
    """Also as numpy and safetensors put it, which give no errno."""
    if isinstance(error, OSError):
        written_less = re.fullmatch(r"\d+ requested and \d+ written", str(error))  # ndarray.tofile
        return error.errno in (errno.ENOSPC, errno.EDQUOT) or written_less is not None
    return isinstance(error, SafetensorError) and os.strerror(errno.ENOSPC) in str(error)


def _mark_complete(folder: Path, fingerprint: str, seconds: float, summary: dict) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in files:
        flush(path)
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in files}
    write_json(
        folder / _MARKER,
        {"fingerprint": fingerprint, "seconds": round(seconds, 3), "files": sizes, "summary": summary},
    )
    flush(folder)


def _exchange(new: Path, place: Path) -> None:
    old = place.with_name(f".{place.name}.old")
    with contextlib.suppress(FileNotFoundError):
        os.replace(place, old)
    os.replace(new, place)
    flush(place.parent)
    shutil.rmtree(old, ignore_errors=True)
