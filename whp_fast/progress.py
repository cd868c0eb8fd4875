"""What a person sees while long work runs: a live bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True)
_LINE_SECONDS = 10.0


@contextlib.contextmanager
def track(title: str, total: float) -> Iterator[Callable[..., None]]:
    """Follow work of a known size.

    Yields:
        ``advance(amount, note="")``: report that much more work; the note (loss, tokens/s) is shown behind
        the bar.
    """
    if console.is_terminal:
        columns = (
            TextColumn("  {task.description:<11}"),
            BarColumn(28),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(title, total=total, note="")
            yield lambda amount, note="": bar.update(task, advance=amount, note=note)
        return
    began = last = time.monotonic()
    done = 0.0

    def advance(amount: float, note: str = "") -> None:
        nonlocal last, done
        done += amount
        now = time.monotonic()
        if now - last >= _LINE_SECONDS and done < total:
            last = now
            left = (now - began) * (total - done) / max(done, 1e-9)
            say(
                f"  {title:<11} {100 * done / total:3.0f} %  {now - began:5.0f} s, about {left:.0f} s left  "
                f"{note}"
            )

    yield advance


def say(text: str = "") -> None:
    """Print a line at once, with rich markup."""
    console.print(text)
    sys.stdout.flush()
