"""The compiled part, ``whp_kernels._C``: loaded when it is first asked for; why it is missing where it is.

The package works without it (the reference and the Triton kernels need no compiler). See ``setup.py`` for how
it is built and for the environment variables that decide about it.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

_REASON_FILE = Path(__file__).with_name("_C.reason")
_HOW = "to build it, run `pip install --no-build-isolation .` beside torch and a C++17 compiler"


def load() -> ModuleType | None:
    """The extension, its operators registered under ``torch.ops.whp_kernels_C``; None where it is missing."""
    return _load()[0]


def reason() -> str | None:
    """Why :func:`load` gives None, in one sentence; None if the extension is there."""
    return _load()[1]


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    import torch  # noqa: F401  (the extension is linked with torch's libraries, which this loads)

    try:
        return importlib.import_module("whp_kernels._C"), None
    except ModuleNotFoundError:
        why = (
            _REASON_FILE.read_text(encoding="utf-8").strip() if _REASON_FILE.is_file() else "it was not built"
        )
        return None, f"whp_kernels._C is missing: {why}; {_HOW}"
    except ImportError as error:  # built for another torch, Python or processor
        return None, f"whp_kernels._C cannot be loaded: {error}; {_HOW}"
