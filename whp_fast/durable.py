"""Files and folders that survive a power cut: written, flushed to the disk, and only then relied on.

Every change goes through a function of ``os``, so that tests can let each of them fail in turn.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_PIECE = 16 << 20  # bytes hashed and written at a time


class Record(NamedTuple):
    """What a file held when it was written: its size and the sha256 of its content, hexadecimal."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> Record:
        return cls(len(content), hashlib.sha256(content).hexdigest())


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> Record:
    """Write a new file and flush it; its entry in the folder is durable after :func:`flush`.

    Raises:
        OSError: the file is there already, or the disk refuses; a part of the file may be there then.
    """
    state = hashlib.sha256()
    size = 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for piece in pieces:
            view = memoryview(piece)
            for first in range(0, len(view), _PIECE):
                left = view[first : first + _PIECE]
                state.update(left)
                size += len(left)
                while len(left):  # the system may take less than it was given
                    left = left[os.write(handle, left) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    return Record(size, state.hexdigest())


def read_record(path: Path) -> Record:
    """The record of a file as it is now."""
    state = hashlib.sha256()
    size = 0
    block = memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            state.update(block[:count])
            size += count
    return Record(size, state.hexdigest())


def make_folder(path: Path) -> None:
    """Make a folder and those above it, durably; others may be making them at the same time."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Make the content of a file, or the entries of a folder (new, renamed, removed), durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_folder(path: Path) -> None:
    """Remove a folder that holds files only."""
    for name in os.listdir(path):
        os.unlink(path / name)
    os.rmdir(path)
