"""Kernels compiled without a GPU: the few cases meant for tests, and that the report leaves nothing out."""

import dataclasses
import importlib
import json
import os
import re
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from whp_kernels.losses.rows import RowLosses, Rows  # noqa: E402
from whp_kernels.losses.rule import Rule  # noqa: E402
from whp_kernels.losses.triton import catalogue, rows  # noqa: E402

from benchmarks import compile_report  # noqa: E402
from benchmarks.compile_report import TARGETS, Result, compile_case, compile_launch  # noqa: E402

CASES = list(catalogue.cases())
QUICK = [case for case in CASES if case.quick]


def name(case):
    return f"{case.launch.kernel.__name__}: {case.name}".replace(" ", "_")


def loss_launch(dtype=torch.bfloat16, tile=None, stride=32000):
    """Forward KL to a WHP target with gradient, on the meta device."""

    def meta(dtype, *shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    n = 8
    logits = [
        torch.empty_strided((n, 32000), (stride, 1), dtype=dtype, device="meta").detach() for _ in range(4)
    ]
    results = RowLosses(*(meta(t, n) for t in (torch.float32, torch.int64, torch.float32, torch.int64)))
    given = Rows(logits[0], tuple(logits[1:3]), rule=Rule("whp", 5.0, divergence="forward_kl"))
    return rows.row_losses_launch(given, results, False, meta(torch.float32, n), logits[3], tile)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("case", QUICK, ids=name)
def test_quick_cases_fit(case, target):
    if case.capabilities is not None and TARGETS[target].arch not in case.capabilities:
        pytest.skip("the tile is not chosen there")
    result = compile_case(case, target)
    assert not result.error
    assert result.registers > 8 and result.kernel == case.launch.kernel.__name__


def test_every_kernel_is_in_the_catalogue():
    """Modules by their files: a kernel that is not registered may not be imported by the catalogue either."""
    root = Path(catalogue.__file__).parents[2]
    kernels = set()
    for file in root.rglob("*.py"):
        if "triton.jit" not in file.read_text(encoding="utf-8"):
            continue
        names = file.relative_to(root.parent).with_suffix("").parts
        module = importlib.import_module(".".join(names))
        kernels |= {
            key
            for key, value in vars(module).items()
            if isinstance(value, triton.JITFunction) and key.endswith("_kernel")
        }
    assert {case.launch.kernel.__name__ for case in CASES} == kernels


def test_every_tile_of_the_row_kernels_is_in_the_catalogue():
    chosen = {
        (case.launch.arguments["BLOCK"], case.launch.warps, case.launch.registers)
        for case in CASES
        if case.launch.kernel.__name__ in ("row_losses_kernel", "row_labels_kernel")
    }
    tiles = {value for value in vars(rows).values() if isinstance(value, rows.RowTile)}
    assert chosen == {tuple(tile) for tile in tiles}


def test_rows_are_read_16_bytes_at_a_time_and_rounded_to_nearest():
    code = compile_launch(loss_launch(), TARGETS["sm_90"]).asm["ptx"]
    loads = re.findall(r"ld\.global\S*", code)
    assert loads.count("ld.global.v4.b32") == 6  # student, base and reinforced, in both passes
    assert not [load for load in loads if load.endswith(("b16", "u16"))]
    assert "cvt.rn.bf16x2.f32" in code


def test_no_warp_waits_for_another_inside_the_loops():
    """The groups of a tile are merged after the loop; a shuffle or barrier for each tile would show here."""
    code = compile_launch(loss_launch(), TARGETS["sm_90"]).asm["ptx"]
    labels = {m[1]: m.start() for m in re.finditer(r"^(\$L\w+):", code, re.M)}
    loops = [
        code[labels[m[1]] : m.start()]
        for m in re.finditer(r"bra(?:\.uni)?\s+(\$L\w+);", code)
        if m[1] in labels and labels[m[1]] < m.start()
    ]
    assert len([loop for loop in loops if "ld.global.v4" in loop]) == 2
    assert not [loop for loop in loops if "shfl" in loop or "bar.sync" in loop]


def test_offsets_of_rows_have_64_bits():
    """The row times the stride, for student, two teachers and gradient."""
    for stride, kind in ((32000, "i32"), (2**31 + 16, "i64")):
        code = compile_launch(loss_launch(stride=stride), TARGETS["sm_90"]).asm["ttir"]
        products = re.findall(r"arith\.muli %row\w*, .* : (i\d+)", code)
        assert products == ["i64"] * 4
        assert all(f"%stride_{of}: {kind}" in code for of in ("student", "first", "second", "gradient"))


def test_spills_are_reported():
    case = QUICK[0]._replace(launch=loss_launch(tile=rows.RowTile(4096, 16, 24)))
    result = compile_case(case, "sm_90")
    assert result.spilled_bytes > 0 and "spills" in result.error


def test_too_much_shared_memory_is_reported(monkeypatch):
    monkeypatch.setitem(compile_report.SHARED_LIMIT, "sm_90", 8)
    case = QUICK[0]._replace(launch=loss_launch())
    assert "bytes of shared memory" in compile_case(case, "sm_90").error


def test_what_does_not_compile_is_reported():
    launch = loss_launch()
    launch = dataclasses.replace(launch, arguments=launch.arguments | {"BLOCK": 3000})
    assert compile_case(QUICK[0]._replace(launch=launch), "sm_90").error.startswith("does not compile")


def test_the_report_of_one_kernel(tmp_path, capsys):
    file = tmp_path / "results" / "report.json"
    arguments = ["--targets", "sm_80", "--match", "scale_kernel", "--jobs", "1", "--json", str(file)]
    assert compile_report.main(arguments) == 0
    written = json.loads(file.read_text())["rows"]
    assert [row["kernel"] for row in written] == ["scale_kernel"] * 2
    assert all(row["registers"] > 0 and not row["error"] for row in written)
    assert "2 compiled, 0 must not be chosen" in capsys.readouterr().out


def test_the_report_fails_where_a_tile_spills(monkeypatch, capsys):
    bad = Result("k_kernel", "case", "tile", "sm_80", 255, 16, 0, "spills 16 bytes")
    monkeypatch.setattr(compile_report, "report", lambda *_: [bad])
    assert compile_report.main(["--quick", "--targets", "sm_80"]) == 1
    assert "k_kernel [case; tile] on sm_80: spills 16 bytes" in capsys.readouterr().out


def test_an_unknown_case_is_refused(capsys):
    with pytest.raises(SystemExit):
        compile_report.main(["--match", "no such kernel"])
    assert "no case" in capsys.readouterr().err
