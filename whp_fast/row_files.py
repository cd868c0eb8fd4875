"""Files of rows of equal size with checksums: appended to, then read memory-mapped.

A set of files has a ``.json`` that says what is in them: for every file the number and size of its rows, and
a CRC-32 of every 16 MiB. It is written last, when everything else is on disk: a set whose writer was killed
has none. Sets written by several processes are joined by their ``.json`` alone; the rows stay where they are.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from whp_fast.artifacts import write_json
from whp_fast.errors import UserError

CHUNK_BYTES = 16 << 20  # what one checksum covers: read whole when the first of its rows is asked for
_FORMAT = 1


class _ColumnWriter:
    """One file of rows of equal size, with a checksum for every chunk."""

    def __init__(self, path: Path, size: int, chunk_bytes: int):
        self.path, self.size = path, size
        self.chunk_rows = max(1, chunk_bytes // size)
        self.rows, self._filled, self._crc = 0, 0, 0
        self._sums: list[int] = []
        self._file = open(path, "wb")

    def append(self, values: np.ndarray) -> None:
        if not len(values):
            return
        data = memoryview(np.ascontiguousarray(values)).cast("B")
        whole = self.chunk_rows * self.size
        at = 0
        while at < len(data):
            piece = data[at : at + whole - self._filled]
            self._crc = zlib.crc32(piece, self._crc)
            self._filled += len(piece)
            at += len(piece)
            if self._filled == whole:
                self._end_chunk()
        self._file.write(data)
        self.rows += len(values)

    def close(self) -> dict:
        """Flush to disk; returns the file's entry in the ``.json``."""
        if self._filled:
            self._end_chunk()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        entry = {"file": self.path.name, "rows": self.rows, "row_bytes": self.size}
        return entry | {"chunk_rows": self.chunk_rows, "crc32": self._sums}

    def abandon(self) -> None:
        self._file.close()

    def _end_chunk(self) -> None:
        self._sums.append(self._crc)
        self._filled, self._crc = 0, 0


class RowWriter:
    """Columns that belong together, and the ``.json`` that makes them a whole."""

    def __init__(self, folder: Path, name: str, about: dict, columns: dict[str, int], chunk_bytes: int):
        self._folder, self._name = Path(folder), name
        self._about = about
        self._columns = {
            column: _ColumnWriter(self._folder / f"{name}.{column}", size, chunk_bytes)
            for column, size in columns.items()
        }

    def close(self) -> None:
        """Flush everything to disk and write the ``.json``."""
        part = {name: column.close() for name, column in self._columns.items()}
        write_json(self._folder / f"{self._name}.json", {"format": _FORMAT, **self._about, "parts": [part]})

    def __enter__(self):
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()
        else:  # half a cache stays without a .json
            for column in self._columns.values():
                column.abandon()


def join_parts(folder: Path, name: str, parts: Sequence[str]) -> None:
    """Make one set of those that lie in subfolders of ``folder``, in this order; no row is copied.

    Raises:
        UserError: a part is missing, damaged, or of another width or dtype.
    """
    folder = Path(folder)
    whole: dict | None = None
    for part in parts:
        about = read_json(folder / part, name)
        entries = [
            {column: {**entry, "file": f"{part}/{entry['file']}"} for column, entry in piece.items()}
            for piece in about.pop("parts")
        ]
        if whole is None:
            whole = {**about, "parts": []}
        elif about != {key: value for key, value in whole.items() if key != "parts"}:
            raise UserError(
                f"{folder / part / name}.json: written with other settings than {folder / parts[0]}; "
                f"{mend(folder)}."
            )
        whole["parts"] += entries
    if whole is None:
        raise ValueError("no parts are given")
    write_json(folder / f"{name}.json", whole)


class _Column:
    """One file of rows, memory-mapped; a chunk is checked when one of its rows is first asked for."""

    def __init__(self, folder: Path, entry: dict, size: int):
        self._folder, self.path = folder, folder / entry["file"]
        self.rows, self._chunk_rows, self._sums = entry["rows"], entry["chunk_rows"], entry["crc32"]
        try:
            found = self.path.stat().st_size
        except OSError as error:
            raise UserError(f"{self.path}: cannot read ({error.strerror}); {mend(folder)}.") from error
        n_chunks = -(-self.rows // self._chunk_rows)
        if found != self.rows * size or entry["row_bytes"] != size or len(self._sums) != n_chunks:
            whole = min(found // (self._chunk_rows * size), n_chunks)
            raise UserError(
                f"{self.path}: {found} bytes where {self.rows} rows of {size} bytes were written; the file "
                f"is torn at chunk {whole}; {mend(folder)}."
            )
        # an empty file cannot be mapped
        self._map = np.memmap(self.path, np.uint8, "r", shape=(self.rows, size)) if found else None
        self._size = size
        self._checked = np.zeros(n_chunks, dtype=bool)

    def take(self, index: np.ndarray) -> np.ndarray:
        """The rows of an int64 index as uint8 [n, row bytes], copied."""
        if not len(index):
            return np.zeros((0, self._size), dtype=np.uint8)
        first, last = int(index[0]), int(index[-1])
        if last - first == len(index) - 1 and (np.diff(index) == 1).all():  # one run: the common case
            return self.run(first, last + 1)
        self._check(np.unique(index // self._chunk_rows))
        return self._map[index]

    def run(self, first: int, last: int) -> np.ndarray:
        """Rows ``first`` to ``last - 1``, copied."""
        if first >= last:
            return np.zeros((0, self._size), dtype=np.uint8)
        self._check(range(first // self._chunk_rows, (last - 1) // self._chunk_rows + 1))
        return np.array(self._map[first:last])

    def verify(self) -> None:
        self._checked[:] = False
        self._check(range(len(self._checked)))

    def _check(self, chunks: Iterable[int]) -> None:
        for chunk in chunks:
            if self._checked[chunk]:
                continue
            first = int(chunk) * self._chunk_rows
            last = min(first + self._chunk_rows, self.rows)
            if zlib.crc32(self._map[first:last]) != self._sums[chunk]:
                raise UserError(
                    f"{self.path}: chunk {chunk} (rows {first} to {last - 1}) is damaged, its checksum does "
                    f"not fit; {mend(self._folder)}."
                )
            self._checked[chunk] = True


class RowFiles:
    """Reads a set of files: parts of equal columns, one after the other.

    Attributes:
        count: number of rows.

    Raises:
        UserError: a file is missing, torn or (when its rows are first read) damaged.
    """

    kind = ""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = Path(folder), name
        self.about = read_json(self.folder, name)
        if self.about.get("kind") != self.kind:
            raise UserError(f"{self.folder / name}.json: not a cache of {self.kind}; {mend(self.folder)}.")
        sizes = self._sizes()
        try:
            self._parts = [
                {column: _Column(self.folder, part[column], size) for column, size in sizes.items()}
                for part in self.about["parts"]
            ]
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"{self.folder / name}.json: damaged; {mend(self.folder)}.") from error
        counted = next(iter(sizes))
        self._starts = np.cumsum([0, *(part[counted].rows for part in self._parts)]).astype(np.int64)
        self.count = int(self._starts[-1])

    def _sizes(self) -> dict[str, int]:
        """Bytes of a row of each column; the first one has a row for each row of the cache."""
        raise NotImplementedError

    def verify(self) -> None:
        """Read everything and check it.

        Raises:
            UserError: a file is damaged; names it and the chunk.
        """
        for part in self._parts:
            for column in part.values():
                column.verify()

    def _by_part(self, index) -> list[tuple[dict[str, _Column], np.ndarray, np.ndarray]]:
        """For each part that the index meets: its columns, the places of the index that it serves, and the
        row numbers within it."""
        index = np.asarray(index.cpu() if isinstance(index, Tensor) else index, dtype=np.int64).ravel()
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.count:
            wrong = int(index.min()) if index.min() < 0 else int(index.max())
            raise IndexError(f"row {wrong} of {self.folder / self.name}, which has {self.count}")
        of = np.searchsorted(self._starts, index, side="right") - 1
        return [
            (self._parts[k], places, index[places] - self._starts[k])
            for k in np.unique(of)
            for places in [np.flatnonzero(of == k)]
        ]


def read_json(folder: Path, name: str) -> dict:
    path = folder / f"{name}.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] != _FORMAT or not isinstance(about["parts"], list):
            raise ValueError
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror}); {mend(folder)}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged, or of another version; {mend(folder)}.") from error
    return about


def mend(folder: Path) -> str:
    return f"delete the folder {folder} and run again (its stage is made anew), or run with --overwrite"
