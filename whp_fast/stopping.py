"""Ctrl-C and SIGTERM: a training finishes its step, saves and leaves; a second signal leaves at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A training was asked to stop, saved a snapshot and left."""


class StopRequest:
    """Whether the person or the system has asked this process to stop.

    Outside of :meth:`awaited` a signal ends the work at once, as Ctrl-C does; inside it is only noted, once.
    """

    def __init__(self) -> None:
        self.asked = False

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
            os.write(sys.stderr.fileno(), b"left at once; the last snapshot is kept\n")
            os._exit(128 + number)
        self.asked = True
        # no print: it could be interrupted while it holds the lock of the stream
        os.write(
            sys.stderr.fileno(), b"stopping: this step is finished and saved (once more leaves at once)\n"
        )


def interrupt_on_sigterm() -> None:
    """Outside of a training SIGTERM ends the work as Ctrl-C does, so that nothing half-written stays."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(_number: int, _frame) -> None:
    raise KeyboardInterrupt
