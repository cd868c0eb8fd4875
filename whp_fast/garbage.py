"""Python's garbage collector in a training loop: it runs between steps, and not when it likes.

A full collection looks at every object of the process, for half a second beside a large model, and on a GPU
the queue of kernels runs empty meanwhile.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

EVERY = 50
"""Steps between collections."""


@contextlib.contextmanager
def collected_between_steps(n_steps: int, every: int = EVERY) -> Iterator[Callable[[], None]]:
    """The collector is off inside, but for a collection at every ``every``-th call of what this gives, which
    is to be called after each step. What was alive before is not looked at again.

    A loop too short for one collection is left alone. Afterwards everything is as it was.
    """
    if n_steps < every or not gc.isenabled():
        yield lambda: None
        return
    gc.collect()
    first = gc.get_freeze_count() == 0
    gc.freeze()
    gc.disable()
    steps = 0

    def after_step() -> None:
        nonlocal steps
        steps += 1
        if steps % every == 0:
            gc.collect()

    try:
        yield after_step
    finally:
        gc.enable()
        if first:  # else somebody else's frozen objects would thaw too
            gc.unfreeze()
