"""Every Triton kernel x tile compiled without a GPU: registers, spills and shared memory.

    python -m benchmarks.compile_report [--json FILE] [--targets sm_80 gfx942] [--match TEXT] [--quick]

What is compiled stands in ``whp_kernels.losses.triton.catalogue``. It ends with 1 where a kernel does not
compile, spills registers to memory, or needs more shared memory than a block may have: such a tile must not
be one that can be chosen. It says nothing about results; those are tested in the interpreter and on GPUs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from whp_kernels.losses.triton.catalogue import Case, cases
from whp_kernels.losses.triton.launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# bytes of shared memory that one block may have: A100, H100, B200 (CUDA programming guide, table of compute
# capabilities) and MI300
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Result:
    """One kernel, tile and target.

    Attributes:
        registers: of a lane; for AMD vector registers.
        spilled_bytes: of a lane, in local memory.
        shared_bytes: of a block.
        error: why it did not compile, or what makes the tile one that must not be chosen; empty if nothing.
    """

    kernel: str
    case: str
    tile: str
    target: str
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    error: str = ""


def report(chosen: Sequence[tuple[int, str]], jobs: int, progress: Progress) -> list[Result]:
    """Results of ``(index of the case, target)`` pairs, in their order."""
    task = progress.add_task("compile", total=len(chosen))
    results: dict[tuple[int, str], Result] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker) as pool:
        futures = {pool.submit(_compile_numbered, *pair): pair for pair in chosen}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            progress.advance(task)
    return [results[pair] for pair in chosen]


def select(
    all_cases: Iterable[Case], targets: Sequence[str], match: str, quick: bool
) -> list[tuple[int, str]]:
    """The ``(index, target)`` pairs that are asked for and possible."""
    chosen = []
    for index, case in enumerate(all_cases):
        text = f"{case.launch.kernel.__name__} {case.name} {case.tile}"
        if match not in text or (quick and not case.quick):
            continue
        for target in targets:
            capability = TARGETS[target].arch if TARGETS[target].backend == "cuda" else None
            if case.capabilities is None or capability in case.capabilities:
                chosen.append((index, target))
    return chosen


def compile_case(case: Case, target: str) -> Result:
    """What the compiler makes of a case."""
    named = (case.launch.kernel.__name__, case.name, case.tile, target)
    try:
        compiled = compile_launch(case.launch, TARGETS[target])
        registers, spilled = (_amd_usage if TARGETS[target].backend == "hip" else _nvidia_usage)(compiled)
    except Exception as error:  # whatever the compiler raises is what the report is for
        return Result(*named, error=f"does not compile: {_reason(error)}")
    shared, limit = compiled.metadata.shared, SHARED_LIMIT[target]
    reasons = []
    if spilled:
        reasons.append(f"spills {spilled} bytes")
    if shared > limit:
        reasons.append(f"needs {shared} bytes of shared memory, {limit} are there")
    return Result(*named, registers, spilled, shared, "; ".join(reasons))


def _reason(error: BaseException) -> str:
    """The last line of what was raised first: Triton wraps it in one excerpt of code for each call."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else 'no message'}"


def compile_launch(launch: Launch, target: GPUTarget):
    """The compiled kernel of a launch, with the types and specialisations that it would run with."""
    signature, constexprs, attributes = {}, {}, {}

    def describe(value, path):
        if value is None or (type(value) is int and value == 1):
            constexprs[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(describe(part, (*path, i)) for i, part in enumerate(value))
        if isinstance(value, torch.Tensor):
            if value.data_ptr() % 16 == 0:  # always, on the meta device
                attributes[path] = [["tt.divisibility", 16]]
            return "*" + _NAMES[value.dtype]
        if isinstance(value, bool):
            return "i1"
        if isinstance(value, int):
            if value % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        return "fp32"

    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constexprs[(i,)] = "constexpr", value
        else:
            signature[parameter.name] = describe(value, (i,))
    return triton.compile(
        ASTSource(launch.kernel, signature, constexprs, attributes),
        target=target,
        options=launch.options(target.backend, target.warp_size),
    )


def _nvidia_usage(compiled) -> tuple[int, int]:
    """Registers and bytes of stack; the kernels have no arrays of their own: a stack holds spilled
    registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump names no registers: {text[:200]!r}")
    return int(found[1]), int(found[2])


def _amd_usage(compiled) -> tuple[int, int]:
    text = compiled.asm["amdgcn"]
    registers, spilled = (
        re.search(rf"\.{name}:\s*(\d+)", text) for name in ("vgpr_count", "vgpr_spill_count")
    )
    if registers is None or spilled is None:
        raise ValueError("the assembly names no registers")
    return int(registers[1]), 4 * int(spilled[1])


_worker_cases: list[Case] = []


def _start_worker() -> None:
    torch.set_num_threads(1)
    _worker_cases.extend(cases())


def _compile_numbered(index: int, target: str) -> Result:
    return compile_case(_worker_cases[index], target)


def _table(results: Sequence[Result], targets: Sequence[str]) -> Table:
    """One line a kernel and tile: registers for each target, red where the tile must not be chosen."""
    table = Table(title=f"registers a lane (Triton {triton.__version__})", title_justify="left")
    for heading in ("kernel", "case", "tile"):
        table.add_column(heading)
    for target in targets:
        table.add_column(target, justify="right", no_wrap=True)
    table.add_column("shared", justify="right")
    lines: dict[tuple[str, str, str], dict[str, Result]] = {}
    for result in results:
        lines.setdefault((result.kernel, result.case, result.tile), {})[result.target] = result
    for key, by_target in lines.items():
        cells = []
        for target in targets:
            result = by_target.get(target)
            if result is None:
                cells.append("-")
            elif result.error:
                cells.append(f"[red]{result.registers or '?'} !")
            else:
                cells.append(str(result.registers))
        table.add_row(*key, *cells, str(max(result.shared_bytes for result in by_target.values())))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--match", default="", help="only cases whose kernel, name or tile contains this")
    parser.add_argument("--quick", action="store_true", help="only the few cases that the tests compile")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 2))
    options = parser.parse_args(arguments)
    chosen = select(cases(), options.targets, options.match, options.quick)
    if not chosen:
        parser.error(f"no case has {options.match!r} in it")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        results = report(chosen, options.jobs, progress)
    # a table that is piped or redirected is not to be squeezed into 80 columns
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(_table(results, options.targets))
    bad = [result for result in results if result.error]
    for result in bad:
        console.print(
            f"{result.kernel} [{result.case}; {result.tile}] on {result.target}: {result.error}", markup=False
        )
    console.print(f"{len(results)} compiled, {len(bad)} must not be chosen")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        rows = [asdict(result) for result in results]
        options.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
