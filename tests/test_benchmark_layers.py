"""The benchmark of the layers runs, and a wrong layer makes it fail."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import layer_cases, layers


def run(tmp_path, *arguments):
    file = tmp_path / "out" / "layers.json"
    words = ("--quick", "--compile-backend", "none", "--json", str(file), *arguments)
    return layers.main(words), json.loads(file.read_text())


def test_every_layer_is_measured_by_everyone(tmp_path, capsys):
    code, found = run(tmp_path, "--pictures", str(tmp_path))
    assert (code, found["wrong"], found["left_out"]) == (0, [], [])
    ways = {(row["layer"], row["dtype"]): set() for row in found["rows"]}
    assert set(ways) == {(layer, dtype) for layer in layer_cases.CASES for dtype in layers.DTYPES}
    for row in found["rows"]:
        ways[row["layer"], row["dtype"]].add(row["impl"])
        assert row["fwd_ms"] > 0 and row["bwd_ms"] > 0 and row["kept_mb"] >= 0
        small = 1e-5 if row["dtype"] == "float32" else 0.02
        assert 0 < row["out_err"] < small and 0 < row["grad_err"] < small
    assert all({"whp_kernels", "reference", "transformers"} <= names for names in ways.values())
    for name in ("device", "versions", "command", "commit", "date", "sizes"):
        assert found["header"][name], name
    assert (tmp_path / "layers_cpu.png").read_bytes()[:4] == b"\x89PNG"
    assert "whole layer" not in capsys.readouterr().err


@pytest.mark.parametrize("factor", [0.0, -1.0, 2.0, float("nan")])
def test_a_wrong_gradient_fails(tmp_path, monkeypatch, factor):
    right = layer_cases.swiglu

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate):
            return gate.clone()

        @staticmethod
        def backward(ctx, g):
            return factor * g

    monkeypatch.setattr(layer_cases, "swiglu", lambda gate, up: right(Wrong.apply(gate), up))
    code, found = run(tmp_path, "--layers", "swiglu", "--dtypes", "bfloat16")
    assert code == 1
    # beside a reference that is wrong in the same way the best of the others is transformers'
    assert [line.split(" is wrong, its ")[1].split(" differs")[0] for line in found["wrong"]] == [
        "gradient of gate"
    ] * 2


def test_what_raises_is_left_out_or_wrong(tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no memory\nsecond line")

    monkeypatch.setattr(layer_cases, "rope", broken)
    code, found = run(tmp_path, "--layers", "rope", "--dtypes", "float32")
    assert code == 1 and found["wrong"] == [
        f"rope, float32: {name} raised RuntimeError: no memory" for name in ("whp_kernels", "reference")
    ]
    assert {left["impl"] for left in found["left_out"]} == {"whp_kernels", "reference"}


def test_bytes_that_are_kept():
    """Of a product x * y both are inputs; of exp its result is kept, once."""
    x = torch.ones(1000, requires_grad=True)
    case = layer_cases.Case("c", {"x": x}, (torch.ones(1000),), [], [])

    def run(x):
        y = x.exp()
        return (y * y,)

    assert layers._kept_bytes(case, layer_cases.Way("w", "w", run)) == 4000
    assert layers._kept_bytes(case, layer_cases.Way("w", "w", lambda x: (x * x,))) == 0
