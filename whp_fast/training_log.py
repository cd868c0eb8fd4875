"""The log of a training: a live line, JSON lines, and TensorBoard where it is installed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from whp_fast.engine import StepRecord
from whp_fast.progress import track


class TrainingLog:
    """Follows the steps of one training; a context manager.

    Args:
        file: ``log.jsonl``, one :class:`StepRecord` a line; None: not written (processes but the first).
        title: in front of the live line.
        n_steps: of the whole training.
        earlier: records of the steps made before this start.
        tensorboard: folder for event files; None: none.
        flops_per_token, peak_flops: for the share of the hardware's peak (of all processes); 0: not shown.
    """

    def __init__(
        self,
        file: Path | None,
        title: str,
        n_steps: int,
        *,
        earlier: Sequence[dict] = (),
        tensorboard: Path | None = None,
        flops_per_token: float = 0.0,
        peak_flops: float = 0.0,
    ):
        self.records: list[dict] = list(earlier)
        self._file, self._title, self._n_steps = file, title, n_steps
        self._tensorboard = tensorboard
        self._share = flops_per_token / peak_flops if peak_flops else 0.0
        self._stack = contextlib.ExitStack()
        self._advance: Callable[..., None] = lambda *_: None
        self._lines = self._events = None

    def __enter__(self) -> TrainingLog:
        with contextlib.ExitStack() as stack:
            if self._tensorboard is not None:  # first: its imports may swallow a Ctrl-C
                self._events = stack.enter_context(summary_writer()(self._tensorboard))
            if self._file is not None:
                self._lines = stack.enter_context(open(self._file, "w", encoding="utf-8"))
                self._lines.writelines(json.dumps(record) + "\n" for record in self.records)
            self._advance = stack.enter_context(track(self._title, self._n_steps))
            self._advance(len(self.records))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def on_step(self, record: StepRecord) -> None:
        """Write a step down and show it."""
        values = dataclasses.asdict(record)
        self.records.append(values)
        if self._lines is not None:
            self._lines.write(json.dumps(values) + "\n")
        rate = record.tokens / max(record.seconds, 1e-9)
        if self._events is not None:
            for key in ("loss", "grad_norm", "lr", "trained", "memory_bytes", "data_seconds"):
                self._events.add_scalar(f"{self._title}/{key}", values[key], record.step)
            self._events.add_scalar(f"{self._title}/tokens_per_second", rate, record.step)
        self._advance(1, self._line(record, rate))

    def _line(self, record: StepRecord, rate: float) -> str:
        parts = [
            f"step {record.step}/{self._n_steps}",
            f"loss {record.loss:.3f}",
            f"norm {record.grad_norm:.3g}",
            f"{rate:,.0f} tokens/s",
        ]
        if self._share:
            parts.append(f"{100 * rate * self._share:.0f} % of peak")
        parts.append(f"{record.memory_bytes / 1e9:.1f} GB")
        if record.data_seconds > 0.01 * record.seconds:
            parts.append(f"data {100 * record.data_seconds / record.seconds:.0f} %")
        return "  ".join(parts)


def summary_writer():
    """TensorBoard's writer of event files.

    Raises:
        ImportError: it is not installed.
    """
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter
