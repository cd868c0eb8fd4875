"""Which implementation runs, why another does not, and what importing the library costs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from whp_kernels import backends, combination_loss, extension
from whp_kernels.losses import cpp, dispatch, reference
from whp_kernels.losses.rows import Rows

KERNELS = Path(__file__).parents[2] / "kernels"


def rows(dtype=torch.float32):
    return Rows(torch.zeros(2, 3, dtype=dtype), labels=torch.tensor([0, 1]))


def test_float64_is_for_the_reference():
    assert dispatch.backend("auto", rows(torch.float64)) is reference
    assert (
        combination_loss(torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 1])).dtype == torch.float64
    )


def test_the_extension_is_taken_on_the_cpu_where_it_is():
    expected = reference if extension.load() is None else cpp
    assert dispatch.backend("auto", rows()) is expected
    assert dispatch.backend("reference", rows()) is reference


def test_without_the_extension_one_warning_says_why(monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: None)
    monkeypatch.setattr(extension, "reason", lambda: "no compiler was there")
    dispatch._warn_once.cache_clear()
    with pytest.warns(
        UserWarning, match="cpp kernels are not available .no compiler was there.; eager torch"
    ):
        assert dispatch.backend("auto", rows()) is reference
    with pytest.raises(ValueError, match="impl='cpp' is not available: no compiler was there"):
        dispatch.backend("cpp", rows())
    dispatch._warn_once.cache_clear()


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match="impl is 'gpu', give one of auto, reference, triton, cpp, cuda"):
        dispatch.backend("gpu", rows())
    if not torch.cuda.is_available():
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        for name in ("triton", "cuda"):
            with pytest.raises(ValueError, match=f"impl='{name}' is not available: "):
                dispatch.backend(name, rows())


def test_report_names_every_implementation():
    report = backends()
    assert set(report) == {"reference", "cpp", "triton", "cuda"} and report["reference"] == "available"
    assert all(isinstance(reason, str) and reason for reason in report.values())


def test_import_needs_torch_alone_and_is_quick():
    """Neither Triton nor the extension is loaded, and the import takes under a tenth of a second (of
    processor time, as other work on the machine should not count)."""
    child = """
import sys, time, torch, torch.library
before, began = set(sys.modules), time.process_time()
import whp_kernels
took = time.process_time() - began
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert "triton" not in new and "whp_kernels._C" not in sys.modules, new
assert new <= {"whp_kernels"} | set(sys.stdlib_module_names) | {"torch"}, new
print(took)
"""
    environment = {**os.environ, "PYTHONPATH": str(KERNELS)}
    seconds = [
        float(
            subprocess.run(
                [sys.executable, "-c", child], env=environment, capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(2)
    ]
    assert min(seconds) < 0.1, seconds
