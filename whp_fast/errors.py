"""The one exception a person is meant to read, and how commands tell it."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch


class UserError(Exception):
    """Something the person who runs the program can mend.

    The message is one sentence that names the file or field, says what was found and what to do. The command
    line prints it without a traceback and leaves with status 2 (``--debug`` shows the traceback too).
    """


def exit_status(work: Callable[[], None], *, debug: bool = False) -> int:
    """Run a command's work; tell what the user can mend in one line, without a traceback unless ``debug``."""
    try:
        work()
    except (UserError, OSError) as error:
        if debug:
            raise
        told = str(error)
        if isinstance(error, OSError):  # the system refused something that no stage expects
            what = f"{error.filename or 'run.dir'}: {error.strerror or error}"
            told = f"{what}; check the path, its rights and the free space."
        print("error: " + " ".join(told.splitlines()), file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        if debug:
            raise
        print(
            f"error: run.device: out of memory ({str(error).splitlines()[0]}); set "
            "memory.checkpointing, or smaller batch_blocks (with more accumulate) and chunk_mib.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("stopped; finished stages are kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0
