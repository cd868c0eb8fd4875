"""Runs the checks of triton_rows.py: in Triton's interpreter, and on a GPU where there is one.

The interpreter is chosen when triton is imported, so the checks run in a process of their own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
CHECKS = Path(__file__).with_name("triton_rows.py")
PARTS = ("cases", "values", "arguments")


def run_checks(part: str, interpret: bool) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", part, str(CHECKS)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CHECKS.parents[2])
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    return child.stdout


@pytest.mark.parametrize("part", PARTS)
def test_in_the_interpreter(part):
    assert int(re.search(r"(\d+) passed", run_checks(part, interpret=True))[1]) >= 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_the_gpu():
    run_checks(" or ".join(PARTS), interpret=False)


def test_the_library_is_imported_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None; import whp_kernels.losses; "
        "assert not [name for name in sys.modules if name.startswith('whp_kernels.losses.triton')]"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
