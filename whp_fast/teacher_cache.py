"""The teachers' hidden states on disk, so that soft targets need no teacher in memory.

One row a trained position: what the LM head of a teacher reads there. A row of logits is V numbers wide, a
row of hidden states H (Llama 2 7B: 64,000 bytes against 8,192 in bfloat16, 4,100 in float8), and the head
that turns one into the other costs one matrix product. Beside the rows stand the edits of the base's logits.

    base.json        what is in its files (see :mod:`whp_fast.row_files`), width and dtype
    base.rows        [rows, width], bfloat16 or float8 (e4m3)
    base.scales      float32 [rows], float8 only
    reinforced.*     the same of the other teacher
    edits.json       what is in its files
    edits.ends       int64 [rows], where the tokens of each row end
    edits.tokens     int32

    dtype       largest error of a number x in a row whose largest magnitude is m
    bfloat16    2^-8 |x|: half a unit in the last place
    float8      max(2^-4 |x|, 2^-10 m / 448), and what float32 rounds; read as bfloat16 that rounding on top
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from whp_fast.corpus import Blocks
from whp_fast.errors import UserError
from whp_fast.model import Llama
from whp_fast.packing import pack
from whp_fast.row_files import CHUNK_BYTES, RowFiles, RowWriter, join_parts, mend

DTYPES = ("bfloat16", "float8")
_FLOAT8_MAX = 448.0  # of e4m3 without infinities
_TINY = torch.finfo(torch.float32).tiny  # a row of zeros is divided by this


def row_bytes(width: int, dtype: str) -> int:
    """Bytes on disk of one row of hidden states, its scale included."""
    _check_dtype(dtype)
    return 2 * width if dtype == "bfloat16" else width + 4


class CacheWriter(RowWriter):
    """Writes rows of hidden states.

    Args:
        folder: an existing folder.
        name: of the files.
        width: H.
        dtype: ``bfloat16``, or ``float8``: e4m3 with a float32 scale a row, its largest magnitude / 448.
        chunk_bytes: what one checksum covers.
    """

    def __init__(
        self, folder: Path, name: str, width: int, dtype: str = "bfloat16", chunk_bytes: int = CHUNK_BYTES
    ):
        _check_dtype(dtype)
        self.width, self.dtype = width, dtype
        columns = {"rows": 2 * width} if dtype == "bfloat16" else {"rows": width, "scales": 4}
        about = {"kind": "hidden", "width": width, "dtype": dtype}
        super().__init__(folder, name, about, columns, chunk_bytes)

    @property
    def count(self) -> int:
        """Rows written so far."""
        return self._columns["rows"].rows

    def append(self, rows: Tensor) -> None:
        """Add rows [n, H] of any floating dtype and device.

        In float8 a row that holds NaN or infinity reads back as NaN everywhere; the losses leave such
        rows out.
        """
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise ValueError(f"rows have shape {tuple(rows.shape)}, expected [n, {self.width}]")
        rows = rows.detach()
        if self.dtype == "bfloat16":
            self._columns["rows"].append(_bytes(rows.to(torch.bfloat16)))
            return
        rows = rows.float()
        scales = (rows.abs().amax(dim=1) / _FLOAT8_MAX).clamp(min=_TINY)
        self._columns["rows"].append(_bytes((rows / scales.unsqueeze(1)).to(torch.float8_e4m3fn)))
        self._columns["scales"].append(scales.cpu().numpy())


class EditsWriter(RowWriter):
    """Writes lists of tokens, one a row."""

    def __init__(self, folder: Path, name: str, chunk_bytes: int = CHUNK_BYTES):
        super().__init__(folder, name, {"kind": "edits"}, {"ends": 8, "tokens": 4}, chunk_bytes)

    def append(self, offsets: np.ndarray, tokens: np.ndarray) -> None:
        """Add rows in CSR form: offsets [n + 1] from 0 to the number of tokens, tokens [m]."""
        before = self._columns["tokens"].rows
        self._columns["ends"].append(np.asarray(offsets[1:], dtype=np.int64) + before)
        self._columns["tokens"].append(np.asarray(tokens, dtype=np.int32))


class TargetWriter:
    """Writes what soft targets need, a row a trained position: both teachers' hidden states and the edits.

    Args:
        folder, width, dtype: see :class:`CacheWriter`.
        label_set: which of the labeller's alphas says what is trained.
    """

    def __init__(
        self,
        folder: Path,
        width: int,
        dtype: str = "bfloat16",
        *,
        label_set: int = 0,
        chunk_bytes: int = CHUNK_BYTES,
    ):
        self.label_set = label_set
        self.base = CacheWriter(folder, "base", width, dtype, chunk_bytes)
        self.reinforced = CacheWriter(folder, "reinforced", width, dtype, chunk_bytes)
        self.edits = EditsWriter(folder, "edits", chunk_bytes)

    def append(self, base: Tensor, reinforced: Tensor, offsets: np.ndarray, tokens: np.ndarray) -> None:
        """Add n positions: hidden states [n, H] twice, and the tokens that are set to the mean (CSR)."""
        if not len(base) == len(reinforced) == len(offsets) - 1:
            raise ValueError(
                f"{len(base)} rows of the base, {len(reinforced)} of the reinforced model and "
                f"{len(offsets) - 1} of edits; they must be the same positions"
            )
        self.base.append(base)
        self.reinforced.append(reinforced)
        self.edits.append(offsets, tokens)

    def close(self) -> None:
        for writer in (self.base, self.reinforced, self.edits):
            writer.close()

    def __enter__(self) -> TargetWriter:
        return self

    def __exit__(self, *error) -> None:
        for writer in (self.base, self.reinforced, self.edits):
            writer.__exit__(*error)


def join_targets(folder: Path, parts: Sequence[str]) -> None:
    """:func:`join_parts` for all that :class:`TargetWriter` writes."""
    for name in ("base", "reinforced", "edits"):
        join_parts(folder, name, parts)


@dataclass(frozen=True, eq=False)
class CachedRows:
    """Rows of hidden states as they lie on disk, so that what is sent to a device is narrow.

    Attributes:
        rows: uint8 [n, bytes of a row].
        scales: float32 [n, 1] of float8, else None.
    """

    rows: Tensor
    scales: Tensor | None

    def pin(self) -> CachedRows:
        """The same in page-locked memory."""
        scales = None if self.scales is None else self.scales.pin_memory()
        return CachedRows(self.rows.pin_memory(), scales)

    def to(self, device: torch.device | str) -> CachedRows:
        """The same on a device; from page-locked memory the copy is not waited for."""
        scales = None if self.scales is None else self.scales.to(device, non_blocking=True)
        return CachedRows(self.rows.to(device, non_blocking=True), scales)

    def values(self, dtype: torch.dtype) -> Tensor:
        """[n, H]. bfloat16 rounds what float8 holds once more; float32 does not."""
        if self.scales is None:
            return self.rows.view(torch.bfloat16).to(dtype)
        return (self.rows.view(torch.float8_e4m3fn).float() * self.scales).to(dtype)


class HiddenCache(RowFiles):
    """Rows that :class:`CacheWriter` wrote.

    Attributes:
        count: number of rows.
        width: H.
        dtype: ``bfloat16`` or ``float8``.

    Raises:
        UserError: a file is missing, torn or damaged.
    """

    kind = "hidden"

    def __init__(self, folder: Path, name: str):
        super().__init__(folder, name)
        self.width, self.dtype = self.about["width"], self.about["dtype"]

    def _sizes(self) -> dict[str, int]:
        width, dtype = self.about.get("width"), self.about.get("dtype")
        if not isinstance(width, int) or dtype not in DTYPES:
            raise UserError(f"{self.folder / self.name}.json: damaged; {mend(self.folder)}.")
        return {"rows": 2 * width} if dtype == "bfloat16" else {"rows": width, "scales": 4}

    def gather(
        self, index, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Rows of an integer index (array, tensor or sequence), in its order: [n, H].

        Args:
            dtype: of the result. bfloat16 rounds what float8 holds once more; float32 does not.

        Raises:
            UserError: a chunk that is read for the first time is damaged.
        """
        return self.read(index).to(device).values(dtype)

    def read(self, index) -> CachedRows:
        """Rows of an index as they lie on disk, on the CPU; see :meth:`gather`."""
        found: dict[str, np.ndarray] = {}
        pieces = self._by_part(index)
        n = sum(len(places) for _, places, _ in pieces)
        for column, size in self._sizes().items():
            parts = [(places, part[column].take(numbers)) for part, places, numbers in pieces]
            if len(parts) == 1:  # the common case: in the order that was asked for
                found[column] = parts[0][1]
                continue
            found[column] = np.empty((n, size), dtype=np.uint8)
            for places, values in parts:
                found[column][places] = values
        scales = torch.from_numpy(found["scales"].view(np.float32)) if "scales" in found else None
        # a tensor of no rows of numpy's has strides that no other dtype can be viewed with
        rows = torch.from_numpy(found["rows"]) if n else torch.empty(found["rows"].shape, dtype=torch.uint8)
        return CachedRows(rows, scales)

    def rows(
        self,
        first: int,
        last: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Rows ``first`` to ``last - 1``: [last - first, H]."""
        return self.gather(np.arange(first, last), dtype=dtype, device=device)


class EditsCache(RowFiles):
    """Lists of tokens that :class:`EditsWriter` wrote."""

    kind = "edits"

    def _sizes(self) -> dict[str, int]:
        return {"ends": 8, "tokens": 4}

    def gather(self, index) -> tuple[Tensor, Tensor]:
        """The lists of an integer index, in its order, in CSR form: offsets int64 [n + 1], tokens int64."""
        pieces = self._by_part(index)
        spans = []
        counts = np.zeros(sum(len(places) for _, places, _ in pieces), dtype=np.int64)
        for part, places, numbers in pieces:
            ends = part["ends"].take(numbers).view(np.int64).ravel()
            before = part["ends"].take(np.maximum(numbers - 1, 0)).view(np.int64).ravel()
            starts = np.where(numbers == 0, 0, before)
            counts[places] = ends - starts
            spans.append(starts)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        tokens = np.empty(offsets[-1], dtype=np.int64)
        for (part, places, _), starts in zip(pieces, spans):
            here = counts[places]
            within = np.arange(here.sum()) - np.repeat(np.cumsum(here) - here, here)
            found = part["tokens"].take(np.repeat(starts, here) + within)
            tokens[np.repeat(offsets[places], here) + within] = found.view(np.int32).ravel()
        return torch.from_numpy(offsets), torch.from_numpy(tokens)


class TargetCache:
    """What :class:`TargetWriter` wrote: ``base`` and ``reinforced`` (:class:`HiddenCache`), ``edits``.

    Raises:
        UserError: a file is missing, torn or damaged, or they do not hold the same number of rows.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.base = HiddenCache(self.folder, "base")
        self.reinforced = HiddenCache(self.folder, "reinforced")
        self.edits = EditsCache(self.folder, "edits")
        self.count = self.base.count
        for other in (self.reinforced, self.edits):
            if other.count != self.count:
                raise UserError(
                    f"{self.folder / other.name}.json: {other.count} rows beside {self.count} of the base; "
                    f"{mend(self.folder)}."
                )

    def verify(self) -> None:
        """Check all checksums; raises UserError for the first that does not fit."""
        for cache in (self.base, self.reinforced, self.edits):
            cache.verify()


@torch.inference_mode()
def cache_hidden_states(
    model: Llama,
    blocks: Blocks,
    writer: CacheWriter,
    first: int = 0,
    last: int | None = None,
    *,
    batch_size: int = 8,
    switch: Callable[[], AbstractContextManager] = nullcontext,
    progress: Callable[[int], None] = lambda n: None,
) -> None:
    """Write the hidden states of every position of blocks ``first`` to ``last - 1``, in order.

    Args:
        switch: called for every forward pass, which runs inside the context manager it returns (one that
            switches an adapter).
        progress: called with the number of tokens of each batch that is done.
    """
    device = next(model.parameters()).device
    last = len(blocks) if last is None else last
    while first < last:
        end = min(first - first % batch_size + batch_size, last)
        rows = [blocks[i] for i in range(first, end)]
        ids, packing = pack(rows)
        with switch():
            writer.append(model.hidden_states(ids.to(device), packing=packing.to(device)))
        progress(packing.tokens)
        first = end


def _bytes(rows: Tensor) -> np.ndarray:
    return rows.cpu().contiguous().view(torch.uint8).numpy()


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"cache dtype is {dtype!r}, give one of {', '.join(DTYPES)}")
