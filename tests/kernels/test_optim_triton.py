"""Runs triton_optim.py in Triton's interpreter, and on a GPU where there is one; looks at the code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
CHECKS = Path(__file__).with_name("triton_optim.py")


def run_checks(interpret):
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(CHECKS)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CHECKS.parents[2])
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    return child.stdout


def test_in_the_interpreter():
    assert "13 passed" in run_checks(interpret=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_the_gpu():
    run_checks(interpret=False)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_the_kernel_fits_and_rounds_to_nearest(target):
    """No spills; one fused multiply-add for each moment, exact division and root, 16 bytes at a time."""
    from whp_kernels.optim.triton_cases import cases

    from benchmarks.compile_report import TARGETS, compile_case, compile_launch

    [case] = [c for c in cases() if c.name == "bfloat16, gradient bfloat16, moments int8"]
    result = compile_case(case, target)
    assert not result.error and result.registers > 8
    code = compile_launch(case.launch, TARGETS[target]).asm["ptx"]
    elements = 1024 // (4 * 32)  # of a lane

    def count(name):
        return len(re.findall(rf"\b{re.escape(name)}\b", code))

    assert count("fma.rn.f32") + 2 * count("fma.rn.f32x2") == 2 * elements
    assert count("sqrt.rn.f32") == elements and count("div.rn.f32") >= 2 * elements
    assert not re.search(r"approx|div\.full|\.ftz", code)
