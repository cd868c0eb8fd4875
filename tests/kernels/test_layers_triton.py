"""Runs triton_layers.py in Triton's interpreter, and on a GPU where there is one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
CHECKS = Path(__file__).with_name("triton_layers.py")


def run_checks(interpret):
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(CHECKS)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CHECKS.parents[2])
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    return child.stdout


def test_in_the_interpreter():
    assert int(re.search(r"(\d+) passed", run_checks(interpret=True))[1]) >= 32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_the_gpu():
    run_checks(interpret=False)


def test_the_library_is_imported_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None; import whp_kernels.layers; "
        "assert not [name for name in sys.modules if name.startswith('whp_kernels.layers.triton')]"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")
def test_memory_is_read_and_written_16_bytes_at_a_time():
    """Columns of a wider tensor too; what is left are the scales, one number a row."""
    from whp_kernels.layers.triton.cases import cases

    from benchmarks.compile_report import TARGETS, compile_launch

    found = {}
    for case in cases():
        if case.quick:
            code = compile_launch(case.launch, TARGETS["sm_90"]).asm["ptx"]
            accesses = re.findall(r"(?:ld|st)\.global\S*", code)
            wide = sum("v4.b32" in access for access in accesses)
            found[case.launch.kernel.__name__, case.name] = (wide, len(accesses) - wide)
    others = {name: count[1] for name, count in found.items()}
    assert all(count[0] >= 4 for count in found.values())
    assert all(count == ("norm" in name[0]) for name, count in others.items()), others
