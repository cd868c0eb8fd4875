"""Ctrl-C and SIGTERM: a training finishes its step, saves and leaves; a second signal leaves at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A training was asked to stop, saved a snapshot and left."""


class StopRequest:
    """Whether the person or the system has asked this process to stop.

    Outside of :meth:`awaited` a signal ends the work at once, as Ctrl-C does; inside it is only noted, once.

    Args:
        tell: say what happens; of several processes one does.
    """

    def __init__(self, tell: bool = True) -> None:
        self.asked, self._tell = False, tell

    @contextlib.contextmanager
    def awaited(self) -> Iterator[StopRequest]:
        """Note a signal in ``asked`` while this lasts, so that a step can be finished and saved."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # signals are the main thread's
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if self.asked:
            self._say(b"left at once; the last snapshot is kept\n")
            os._exit(128 + number)
        self.asked = True
        self._say(b"stopping: this step is finished and saved (once more leaves at once)\n")

    def _say(self, line: bytes) -> None:
        if self._tell:  # no print: it could be interrupted while it holds the lock of the stream
            os.write(2, line)


def interrupt_on_sigterm() -> None:
    """Outside of a training SIGTERM ends the work as Ctrl-C does, so that nothing half-written stays."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


@contextlib.contextmanager
def deaf_to_sigterm() -> Iterator[None]:
    """For what must be said before the end: torchrun sends SIGTERM to the others when one process died."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(_number: int, _frame) -> None:
    raise KeyboardInterrupt
