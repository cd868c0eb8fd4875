"""What a snapshot looks like on disk, and reading it.

    step-00000040/
        rank-00000-of-00002.safetensors   the rows of process 0 (none where it had no tensor)
        rank-00000-of-00002.json          its manifest: which rows of which tensor these are, size and sha256
        rank-00001-of-00002.safetensors
        rank-00001-of-00002.json
        state.json                        of process 0
        complete.json                     written last: identity, and size and sha256 of every file

Tensors are cut along their first dimension. Any range of rows can be read back, whatever number of processes
wrote it. There is no pickle in it.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from whp_fast.artifacts import digest
from whp_fast.durable import Record, read_record
from whp_fast.errors import UserError

FORMAT = 1  # raised when the layout changes, so that older snapshots are not read
MARKER = "complete.json"
STATE = "state.json"
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _CODES}


class Rows(NamedTuple):
    """Some rows of a tensor: those that this process holds.

    Attributes:
        values: [rows, ...], at least one dimension; no rows are allowed.
        first: number of the first of them in the whole tensor.
        shape: of the whole tensor.
    """

    values: torch.Tensor
    first: int
    shape: tuple[int, ...]


class Damaged(Exception):
    """A snapshot that cannot be used; the message says what is wrong with which file."""


class Piece(NamedTuple):
    """Rows ``first`` to ``last`` (not included) of a tensor are in ``file``."""

    first: int
    last: int
    file: str


class Entry(NamedTuple):
    """Where the rows of a tensor are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[Piece]


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def rank_file(rank: int, world_size: int) -> str:
    """Name of a process's files, without the ending."""
    return f"rank-{rank:05d}-of-{world_size:05d}"


def check_rows(name: str, rows: Rows) -> None:
    """Refuse rows that could not be read back.

    Raises:
        ValueError: no first dimension, a dtype that safetensors does not know, or rows outside the shape.
    """
    found, whole = tuple(rows.values.shape), tuple(rows.shape)
    if not name or name == "__metadata__":
        raise ValueError(f"{name!r} cannot be the name of a tensor in a snapshot.")
    if rows.values.dtype not in _CODES:
        raise ValueError(f"{name}: a snapshot cannot hold {rows.values.dtype}.")
    if not found or len(found) != len(whole) or found[1:] != whole[1:]:
        raise ValueError(f"{name}: values of shape {list(found)} are no rows of {list(whole)}.")
    last = rows.first + found[0]
    if not 0 <= rows.first <= last <= whole[0]:
        raise ValueError(f"{name}: rows {rows.first} to {last} are not within its {whole[0]}.")


def describe(tensors: Mapping[str, Rows]) -> dict[str, dict]:
    """The part of the manifest that says which rows are in the file."""
    return {
        name: {
            "dtype": str(rows.values.dtype).removeprefix("torch."),
            "shape": list(rows.shape),
            "first": rows.first,
            "rows": len(rows.values),
        }
        for name, rows in tensors.items()
    }


def file_pieces(tensors: dict[str, Rows]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file; each tensor is taken out of ``tensors`` when its turn comes, so that
    its memory is free once it is written.

    Written here and not by the safetensors library because the checksum comes from the same pass over
    memory, and an error of the disk keeps its errno. Layout: 8 bytes with the length of the header, the
    header as JSON, the tensors without gaps (wide dtypes first, so that each is aligned).
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].values.dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        values = tensors[name].values
        begin, end = end, end + values.numel() * values.dtype.itemsize
        code, shape = _CODES[values.dtype], list(values.shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        values = tensors.pop(name).values
        if values.numel():
            yield memoryview(values.reshape(-1).view(torch.uint8).numpy())


def index_of(manifests: list[dict]) -> dict[str, Entry]:
    """Where every tensor's rows are, from the manifests of all processes.

    Raises:
        ValueError: two processes disagree about a tensor, or rows of it are in no file.
    """
    index: dict[str, Entry] = {}
    for manifest in manifests:
        for name, told in manifest["tensors"].items():
            dtype, shape = _DTYPES[told["dtype"]], tuple(told["shape"])
            entry = index.setdefault(name, Entry(dtype, shape, []))
            if (dtype, shape) != (entry.dtype, entry.shape):
                raise ValueError(
                    f"process {manifest['rank']} has {name} as {told['dtype']} {list(shape)}, another as "
                    f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}"
                )
            if told["rows"]:
                piece = Piece(told["first"], told["first"] + told["rows"], manifest["file"]["name"])
                entry.pieces.append(piece)
    for name, entry in index.items():
        entry.pieces.sort()
        covered = 0
        for piece in entry.pieces:
            if piece.first > covered:
                break
            covered = max(covered, piece.last)
        if covered < entry.shape[0]:
            raise ValueError(f"row {covered} of {name} is in none of the files")
    return index


def marker_text(content: dict) -> bytes:
    """``complete.json``: the content and a digest of it, so that damage to the marker itself shows."""
    return json.dumps({**content, "digest": digest(content)}, indent=1).encode()


class Snapshot:
    """A whole snapshot. Files are mapped into memory at the first look into them, until :meth:`close`.

    Attributes:
        folder: where it is.
        step: the optimizer step it was taken after.
        state: what process 0 gave to ``save``.
    """

    def __init__(self, folder: Path, step: int, state: dict, index: dict[str, Entry]):
        self.folder = folder
        self.step = step
        self.state = state
        self._index = index
        self._files: dict[str, Any] = {}

    def names(self) -> list[str]:
        return sorted(self._index)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows ``first`` to ``last`` (not included) in memory of their own, on the CPU.

        Raises:
            KeyError: no such tensor.
            ValueError: rows outside the tensor.
            UserError: a file was damaged or removed since the snapshot was opened.
        """
        entry = self._entry(name)
        if not 0 <= first <= last <= entry.shape[0]:
            raise ValueError(f"{name}: rows {first} to {last} are not within its {entry.shape[0]}.")
        values = torch.empty((last - first, *entry.shape[1:]), dtype=entry.dtype)
        done = first
        for piece in entry.pieces:  # in order; two may hold the same rows
            if piece.first <= done < min(piece.last, last):
                end = min(piece.last, last)
                values[done - first : end - first] = self._slice(piece, name, done, end)
                done = end
        return values

    def close(self) -> None:
        """Let go of the files; they are opened again when asked for."""
        self._files.clear()

    def _entry(self, name: str) -> Entry:
        if name not in self._index:
            raise KeyError(f"{self.folder}: there is no tensor {name} in it")
        return self._index[name]

    def _slice(self, piece: Piece, name: str, first: int, last: int) -> torch.Tensor:
        path = self.folder / piece.file
        try:
            if piece.file not in self._files:
                self._files[piece.file] = safe_open(path, framework="pt", device="cpu")
            return self._files[piece.file].get_slice(name)[first - piece.first : last - piece.first]
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: the file cannot be read ({error}); start again, and an earlier snapshot is used."
            ) from error


def open_snapshot(folder: Path, step: int, identity: str, *, checksums: bool) -> Snapshot:
    """A snapshot, checked.

    Args:
        checksums: read and compare every file; else only sizes, and the checksums of the small files.

    Raises:
        Damaged: it is not whole, or not of this identity.
    """
    marker = _read_marker(folder, step, identity)
    records = {name: Record(*told) for name, told in marker["files"].items()}
    _compare(folder, records, checksums)
    stems = [rank_file(rank, marker["world_size"]) for rank in range(marker["world_size"])]
    try:
        manifests = [json.loads((folder / f"{stem}.json").read_text("utf-8")) for stem in stems]
        state = json.loads((folder / STATE).read_text("utf-8"))
        return Snapshot(folder, step, state, index_of(manifests))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"its files do not belong together ({error})") from error


def is_whole(folder: Path, step: int, identity: str) -> bool:
    """Whether all files are there in their sizes: what is asked of a snapshot before another is removed."""
    try:
        marker = _read_marker(folder, step, identity)
        return all((folder / name).stat().st_size == told[0] for name, told in marker["files"].items())
    except (Damaged, OSError):
        return False


def marker_attempt(folder: Path) -> str | None:
    """Which attempt at saving made the folder whole, or None where there is no readable marker."""
    try:
        return json.loads((folder / MARKER).read_bytes())["attempt"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def candidates(folder: Path) -> list[tuple[int, Path]]:
    """Folders that may hold a snapshot, newest step first; one that was moved aside comes behind the one that
    took its place."""
    found = []
    for name in os.listdir(folder) if folder.is_dir() else []:
        match = re.fullmatch(r"step-(\d{8,})|\.step-(\d{8,})\.[^.]+\.old", name)
        if match and (folder / name).is_dir():
            found.append((int(match[1] or match[2]), match[1] is not None, folder / name))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def _read_marker(folder: Path, step: int, identity: str) -> dict:
    path = folder / MARKER
    try:
        marker = json.loads(path.read_bytes())
        told = marker.pop("digest")
    except FileNotFoundError:
        raise Damaged(f"there is no {MARKER} in it, so it was not written to its end") from None
    except OSError as error:
        raise Damaged(f"{MARKER} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise Damaged(f"{MARKER} is damaged") from error
    if digest(marker) != told:
        raise Damaged(f"{MARKER} is damaged")
    if marker.get("format") != FORMAT:
        raise Damaged(f"it is of format {marker.get('format')}, and {FORMAT} is read")
    if marker["identity"] != identity:
        raise Damaged("it was made with other settings, inputs or weights")
    if marker["step"] != step:
        raise Damaged(f"it is of step {marker['step']}, and its name says {step}")
    return marker


def _compare(folder: Path, records: dict[str, Record], checksums: bool) -> None:
    for name, record in records.items():
        try:
            size = os.stat(folder / name).st_size
        except FileNotFoundError:
            raise Damaged(f"{name} is missing") from None
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from error
        if size != record.bytes:
            raise Damaged(f"{name} has {size} bytes, and {record.bytes} were written")
    chosen = [name for name in records if checksums or name.endswith(".json")]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        try:
            found = list(pool.map(lambda name: read_record(folder / name), chosen))
        except OSError as error:
            raise Damaged(f"{Path(error.filename or '').name} cannot be read ({error.strerror})") from error
    for name, record in zip(chosen, found):
        if record != records[name]:
            raise Damaged(f"{name} has another checksum than was written")
