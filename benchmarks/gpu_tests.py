"""The tests that use a GPU where there is one, and what came of them.

    python -m benchmarks.gpu_tests --json FILE [tests/kernels ...]

Runs pytest on the test files whose subject has a GPU side and writes, beside device, versions, command and
commit, how many tests of each file passed, failed and were skipped. Exit status 1 if one failed, 2 without a
GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from benchmarks.header import commit, now

TESTS = (
    "tests/kernels",
    "tests/test_attention.py",
    "tests/test_model.py",
    "tests/test_engine.py",
    "tests/test_engine_steps.py",
)
_PACKAGES = ("torch", "triton", "flash-attn", "flash-attn-4", "bitsandbytes", "pytest")


class Tally:
    """Counts outcomes by file; a pytest plugin."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = {}
        self.seconds: Counter[str] = Counter()
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.split("::")[0]
        self.seconds[file] += report.duration
        if report.when == "call" or not report.passed:  # a skip or an error of a fixture has no call
            outcome = "skipped" if report.skipped else report.outcome
            self.outcomes.setdefault(file, Counter())[outcome] += 1
            if report.failed:
                self.failures.append(report.nodeid)

    def rows(self) -> list[dict]:
        return [
            {"file": file, **{name: found[name] for name in ("passed", "failed", "skipped")}}
            | {"total_s": round(self.seconds[file], 1)}
            for file, found in sorted(self.outcomes.items())
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_tests", description=__doc__.split("\n")[0]
    )
    parser.add_argument("tests", nargs="*", default=TESTS, help="files and folders (default: all of them)")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: there is no GPU for torch to use; nothing was run.", file=sys.stderr)
        return 2
    tally, began = Tally(), time.monotonic()
    status = pytest.main([*map(str, options.tests)], plugins=[tally])
    if options.json:
        words = sys.argv[1:] if arguments is None else list(arguments)
        result = {
            "header": {
                "command": " ".join(["python -m benchmarks.gpu_tests", *words]),
                "device": torch.cuda.get_device_name(),
                "versions": {"python": sys.version.split()[0], "cuda": torch.version.cuda} | _versions(),
                "commit": commit(),
                "date": now(),
                "seconds": round(time.monotonic() - began, 1),
            },
            "rows": tally.rows(),
            "failures": tally.failures,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(status)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
