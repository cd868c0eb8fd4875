"""benchmarks.loss runs all it says it runs, and a wrong result makes it fail."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from whp_kernels import Whp, combination_loss, linear_combination_loss

from benchmarks import loss, loss_checks
from benchmarks import loss_implementations as built_by
from benchmarks.loss_cases import ALPHA, OPS, Inputs, Sizes, make_inputs
from benchmarks.loss_measure import Desk, Outputs, last_level_cache, peak_memory
from benchmarks.loss_truth import allowed_error, find_truth

OURS_FROM_LOGITS = {"whp_kernels_inplace", "whp_kernels", "whp_kernels_recompute"}
OURS_FROM_HIDDEN = {"whp_kernels", "whp_kernels_store_free"}
CPU = torch.device("cpu")


def run(tmp_path, *arguments, compile_backend="none"):
    path = tmp_path / "out" / "rows.json"
    arguments = ("--quick", "--json", str(path), "--compile-backend", compile_backend, *arguments)
    try:
        loss.main(arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, json.loads(path.read_text())


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loss")
    code, found = run(folder, "--pictures", str(folder / "pictures"))
    return code, found, folder / "pictures"


def test_every_operation_is_measured_by_every_implementation(everything):
    code, found, _ = everything
    assert (code, found["wrong"]) == (0, [])
    impls = {}
    for row in found["rows"]:
        impls.setdefault((row["op"], row["dtype"]), set()).add(row["impl"])
    assert set(impls) == {(op, dtype) for op in OPS for dtype in ("float32", "bfloat16")}
    for (name, dtype), here in impls.items():
        op = OPS[name]
        expected = OURS_FROM_HIDDEN if op.linear else OURS_FROM_LOGITS if op.gradient else {"whp_kernels"}
        expected = expected | {"eager"} | ({"eager_f32"} if dtype == "bfloat16" else set())
        if op.linear:
            expected = expected | {"bare_gemms"}
        assert expected <= here, (name, dtype)
    reasons = {(left["op"], left["impl"]): left["reason"] for left in found["left_out"]}
    assert "GPU" in reasons["linear_ce", "liger"] and "GPU" in reasons["linear_ce", "cce"]


def test_rows_hold_what_the_tables_show(everything):
    _, found, _ = everything
    for row in found["rows"]:
        assert row["total_ms"] > 0 and row["fwd_ms"] > 0 and 1 <= row["rounds"] <= 2
        assert row["range_ms"][0] <= row["total_ms"] <= row["range_ms"][1]
        assert (row["bwd_ms"] > 0) == OPS[row["op"]].gradient
        assert row["peak_extra_mb"] >= row["peak_allocator_mb"] >= 0
        assert (row["pct_of_bandwidth"] is None) == (row["hidden"] is not None)
        assert (row["rel_err"] is None) == (row["impl"] == "bare_gemms")
        if row["ours"]:
            assert row["rel_err"] <= row["allowed_err"] < 0.01
    header = found["header"]
    for name in ("device", "versions", "command", "commit", "date", "threads", "copy_gb_per_s"):
        assert header[name], name
    assert header["versions"]["torch"] and "--quick" in header["command"]


def test_a_picture_of_each_operation(everything):
    _, _, folder = everything
    assert {path.name for path in folder.iterdir()} == {f"loss_cpu_{op}.png" for op in OPS}
    for path in folder.iterdir():
        assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000


def test_a_compiled_row(tmp_path):
    code, found = run(tmp_path, "--ops", "whp_soft", "--dtypes", "float32", compile_backend="aot_eager")
    (row,) = [row for row in found["rows"] if row["impl"] == "compile"]
    assert code == 0 and row["rel_err"] < 1e-5 and row["loss_err"] < 1e-5


class Times(torch.autograd.Function):
    """The loss as it is, its gradient times a factor."""

    @staticmethod
    def forward(ctx, value, factor):
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.factor, None


@pytest.mark.parametrize("factor", [0.0, -1.0, 2.0, 1.01, float("nan")])
def test_a_wrong_gradient_fails(tmp_path, monkeypatch, capsys, factor):
    right = built_by.combination_loss
    monkeypatch.setattr(built_by, "combination_loss", lambda *a, **k: Times.apply(right(*a, **k), factor))
    code, found = run(tmp_path, "--ops", "label_ce")
    assert code == 1 and len(found["wrong"]) == 2 * len(OURS_FROM_LOGITS)
    output = " ".join(capsys.readouterr().out.split())
    assert (
        "WRONG label_ce, bfloat16: whp_kernels_inplace is wrong, its gradient differs from float64" in output
    )


def test_a_wrong_gradient_of_the_head_fails(tmp_path, monkeypatch):
    right = built_by.linear_combination_loss

    def wrong(hidden, weight, *rest, **options):
        return right(hidden, Times.apply(weight, 0.99), *rest, **options)

    monkeypatch.setattr(built_by, "linear_combination_loss", wrong)
    code, found = run(tmp_path, "--ops", "linear_ce", "--dtypes", "float32")
    assert code == 1 and [line.split()[2] for line in found["wrong"]] == [
        "whp_kernels",
        "whp_kernels_store_free",
    ]


def test_a_wrong_loss_fails(tmp_path, monkeypatch):
    right = built_by.combination_loss
    monkeypatch.setattr(built_by, "combination_loss", lambda *a, **k: right(*a, **k) + 0.001)
    code, found = run(tmp_path, "--ops", "jsd", "--dtypes", "bfloat16")
    assert code == 1 and all("its loss differs" in line for line in found["wrong"]) and found["wrong"]


def test_wrong_labels_fail(tmp_path, monkeypatch):
    right = built_by.generic_labels

    def wrong(*arguments, **options):
        labels = right(*arguments, **options)
        labels[-1] += 1
        return labels

    monkeypatch.setattr(built_by, "generic_labels", wrong)
    code, found = run(tmp_path, "--ops", "generic_labels", "linear_labels", "--dtypes", "float32")
    assert code == 1 and len(found["wrong"]) == 1 + len(OURS_FROM_HIDDEN)


def test_an_implementation_of_ours_that_raises_fails_and_a_peer_is_left_out(tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no memory\nsecond line")

    monkeypatch.setattr(built_by, "eager", lambda op, dtype=None: broken)
    code, found = run(tmp_path, "--ops", "rklu", "--dtypes", "float32")
    assert code == 0 and {row["impl"] for row in found["rows"]} == OURS_FROM_LOGITS
    assert {"op": "rklu", "dtype": "float32", "impl": "eager", "reason": "RuntimeError: no memory"} in found[
        "left_out"
    ]
    monkeypatch.setattr(built_by, "combination_loss", broken)
    code, found = run(tmp_path, "--ops", "rklu", "--dtypes", "float32")
    assert code == 1 and len(found["wrong"]) == len(OURS_FROM_LOGITS)


def test_a_wrong_peer_is_reported_and_excuses_nothing(tmp_path, monkeypatch):
    right = built_by.eager
    monkeypatch.setattr(built_by, "eager", lambda op, dtype=None: lambda inputs: 2 * right(op, dtype)(inputs))
    code, found = run(tmp_path, "--ops", "whp_hard", "--dtypes", "float32")
    (row,) = [row for row in found["rows"] if row["impl"] == "eager"]
    assert code == 0 and row["rel_err"] == pytest.approx(1.0, rel=1e-3)
    ours = built_by.combination_loss
    monkeypatch.setattr(built_by, "combination_loss", lambda *a, **k: 1.001 * ours(*a, **k))
    assert run(tmp_path, "--ops", "whp_hard", "--dtypes", "float32")[0] == 1


def test_writing_into_a_teacher_fails(tmp_path, monkeypatch):
    right = built_by.generic_labels

    def wrong(base, reinforced, *rest, **options):
        labels = right(base, reinforced, *rest, **options)
        base[0, 0] = -77.0
        return labels

    monkeypatch.setattr(built_by, "generic_labels", wrong)
    code, found = run(tmp_path, "--ops", "generic_labels", "--dtypes", "float32")
    assert code == 1 and any("wrote into a teacher" in line for line in found["wrong"])


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.gradient])
def test_truth_is_what_the_definition_says(name):
    op = OPS[name]
    sizes = Sizes(301, 257, 8 if op.linear else None)  # more rows than are compared of the hidden states
    inputs = make_inputs(sizes, torch.float64, CPU)
    inputs = Desk(inputs).fresh()
    truth = find_truth(op, inputs)
    how = {"divergence": op.divergence, "impl": "reference"}
    if op.teachers:
        how |= {"teachers": (inputs.base, inputs.reinforced), "combination": Whp(ALPHA)}
    labels = None if op.teachers else inputs.labels
    if op.linear:
        value = linear_combination_loss(*inputs.student, labels, **how)
    else:
        value = combination_loss(inputs.student, labels, **how)
    gradients = torch.autograd.grad(value, inputs.leaves)
    error, loss_error = truth.errors(Outputs(value.detach(), gradients))
    assert error < 1e-12 and loss_error < 1e-12
    for k in range(len(gradients)):
        doubled = [2 * gradient if i == k else gradient for i, gradient in enumerate(gradients)]
        assert truth.errors(Outputs(value.detach(), doubled))[0] == pytest.approx(1.0)


def test_near_ties_are_left_out_and_exact_ties_go_to_the_first():
    base = torch.zeros(3, 5)
    base[0, 1], base[0, 3] = 4.0, 4.0  # a tie
    base[1, 2], base[1, 4] = 4.0, 4.0 + 1e-6  # too close
    base[2, 0] = 4.0
    inputs = Inputs(base, base, base, torch.zeros(3, dtype=torch.int64))
    truth = find_truth(OPS["generic_labels"], inputs)
    assert truth.rows[0].tolist() == [0, 2]
    assert truth.errors(Outputs(torch.tensor([1, 2, 0]), None)) == (0.0, None)
    assert truth.errors(Outputs(torch.tensor([3, 4, 0]), None)) == (0.5, None)
    hard = find_truth(OPS["whp_hard"], inputs)
    assert hard.rows[0].tolist() == [0, 2] and hard.gradients[0].argmin(dim=1).tolist() == [1, 0]


def test_allowed_is_twice_the_baseline_or_one_rounding():
    assert allowed_error(0.0, 1e-5) == pytest.approx(2.1e-5)
    assert allowed_error(1.7e-3, 1e-5) == pytest.approx(3.401e-3)
    assert allowed_error(0.0, 0.5) < 1e-3 and allowed_error(0.0, None) == pytest.approx(1e-6)


def test_peak_memory_sees_torch_and_other_libraries():
    megabytes = 40

    def torch_twice():
        first = torch.ones(megabytes * 250_000)
        second = first + 1
        del first
        return second.sum()

    peak, result = peak_memory(CPU, torch_twice)
    assert result == 2 * megabytes * 250_000
    assert 2 * megabytes <= peak.bytes / 1e6 < 2 * megabytes + 20
    if sys.platform == "linux":
        peak, _ = peak_memory(CPU, lambda: np.ones(megabytes * 125_000).sum())
        assert peak.allocator < 1e6 and megabytes - 2 <= peak.bytes / 1e6 < megabytes + 20
        peak, _ = peak_memory(CPU, lambda: None)
        assert peak.bytes < 10e6


def test_inputs_are_fresh_and_the_same_each_time():
    sizes = Sizes(5, 7)
    first, second = make_inputs(sizes, torch.float32, CPU), make_inputs(sizes, torch.float32, CPU)
    assert torch.equal(first.student, second.student) and torch.equal(first.base, second.base)
    desk = Desk(first)
    inputs = desk.fresh()
    inputs.student.detach().zero_()
    assert torch.equal(desk.fresh().student, second.student) and desk.unharmed()
    assert desk.fresh(2).student.shape == (2, 7) and len(desk.fresh(2).labels) == 2
    first.base[4, 6] += 1
    assert not desk.unharmed()


def test_sizes_are_paired():
    options = loss.read_options(["--tokens", "4", "8", "--vocab", "10", "--ops", "whp_soft", "linear_ce"])
    cases = loss.plan(options)
    assert [(case.op.name, case.dtype, *dataclasses.astuple(case.sizes)) for case in cases] == [
        ("whp_soft", "float32", 4, 10, None),
        ("whp_soft", "bfloat16", 4, 10, None),
        ("whp_soft", "float32", 8, 10, None),
        ("whp_soft", "bfloat16", 8, 10, None),
        ("linear_ce", "bfloat16", 4, 10, 1024),
        ("linear_ce", "bfloat16", 8, 10, 1024),
    ]
    with pytest.raises(SystemExit):
        loss.read_options(["--tokens", "4", "8", "--vocab", "1", "2", "3"])
    assert last_level_cache(CPU) >= 1 << 20


def measured(op, dtype, impl, ms, mb):
    linear = OPS[op].linear
    sizes = {"tokens": 2048, "vocab": 32_000, "hidden": 1024} if linear else {"tokens": 1024, "vocab": 32_000}
    return {
        "op": op,
        "dtype": dtype,
        "impl": impl,
        "total_ms": ms,
        "peak_extra_mb": mb,
        "hidden": None,
    } | sizes


def fast_enough():
    rows = []
    for dtype in ("float32", "bfloat16"):
        for op in ("whp_soft", "whp_hard"):
            times = {"whp_kernels_inplace": (10, 1), "eager": (150, 999), "compile": (30, 250)}
            rows += [measured(op, dtype, impl, *figures) for impl, figures in times.items()]
        for op in loss_checks.LINEAR:
            times = {
                "whp_kernels": (110, 240),
                "bare_gemms": (100, 300),
                "eager": (110, 1000),
                "compile": (111, 961),
            }
            rows += [measured(op, dtype, impl, *figures) for impl, figures in times.items()]
    return rows


def test_requirements_are_met_or_not():
    rows = fast_enough()
    assert all(line.met for line in loss_checks.requirements(rows, OPS))
    assert not any(line.met for line in loss_checks.requirements([], OPS)) and loss_checks.requirements(
        [], OPS
    )
    assert {line.what.split(",")[0] for line in loss_checks.requirements(rows, ["linear_ce"])} == {
        "linear_ce"
    }

    def missed(op, impl, **figures):
        changed = [row | (figures if (row["op"], row["impl"]) == (op, impl) else {}) for row in rows]
        return {
            line.what
            for line in loss_checks.requirements(changed, OPS)
            if not line.met and "float32" in line.what
        }

    assert missed("whp_soft", "eager", total_ms=149) == {
        "whp_soft, float32: in place at least 15x as fast as eager"
    }
    assert missed("whp_hard", "compile", total_ms=19) == {
        "whp_hard, float32: in place at least 2x as fast as compile"
    }
    assert missed("whp_soft", "whp_kernels_inplace", peak_extra_mb=64) == {
        "whp_soft, float32: in place below 64 MB"
    }
    assert missed("linear_ce", "bare_gemms", total_ms=95) == {
        "linear_ce, float32: within 1.15x of the matrix products"
    }
    assert missed("linear_ce", "eager", total_ms=109) == {"linear_ce, float32: not slower than eager"}
    assert missed("linear_ce", "compile", peak_extra_mb=960) == {
        "linear_ce, float32: under a quarter of the memory of compile"
    }
    faster = [*rows, measured("whp_soft", "bfloat16", "eager_f32", 100, 999)]  # the fastest eager counts
    assert [line.what for line in loss_checks.requirements(faster, OPS) if not line.met] == [
        "whp_soft, bfloat16: in place at least 15x as fast as eager"
    ]


def test_check_fails_where_nothing_was_measured(tmp_path, capsys):
    code, found = run(tmp_path, "--ops", "whp_soft", "--dtypes", "float32", "--check")
    assert code == 1 and not found["wrong"] and not any(line["met"] for line in found["requirements"])
    assert "FAIL whp_soft, float32: in place below 64 MB: not measured" in " ".join(
        capsys.readouterr().out.split()
    )
