"""The table of what a job runs with says what the settings say."""

import pytest
import torch

from whp_fast import choices as module
from whp_fast.choices import choices, tell_choices
from whp_fast.config import AnchorsConfig, DataConfig, JobConfig, MemoryConfig, ModelConfig
from whp_fast.processes import Processes

CPU = torch.device("cpu")


def job(compute="float32", **memory):
    return JobConfig(
        model=ModelConfig(path="base", compute_dtype=compute),
        data=DataConfig(corpus=["a.txt"]),
        anchors=AnchorsConfig(path="a.json"),
        memory=MemoryConfig(**memory),
    )


def table(config, processes=None):
    rows = choices(config, CPU, processes or Processes())
    assert len({what for what, _, _ in rows}) == len(rows) and all(why for _, _, why in rows)
    return {what: (choice, why) for what, choice, why in rows}


@pytest.mark.parametrize(
    ("compute", "memory", "expected"),
    [
        ("float32", {}, ("float32", "the master itself (memory.weights is auto)")),
        ("bfloat16", {}, ("bfloat16", "exact float32 master (memory.weights is auto)")),
        ("bfloat16", {"weights": "float32"}, ("float32", "the master itself (memory.weights is float32)")),
        (
            "bfloat16",
            {"optimizer": "bitsandbytes"},
            ("float32", "the master itself (memory.weights is auto)"),
        ),
    ],
)
def test_weights(compute, memory, expected):
    choice, why = table(job(compute, **memory))["weights"]
    assert choice == expected[0] and why.endswith(expected[1])


def test_optimizer():
    assert table(job())["optimizer"][0] == "AdamW, float32 moments"
    offloaded = table(job(moments="int8", offload_moments=True))["optimizer"][0]
    assert offloaded == "AdamW, int8 moments, in host memory"
    assert table(job(optimizer="bitsandbytes"))["optimizer"][0] == "AdamW, 8-bit moments"


def test_adapters_take_the_place_of_weights():
    rows = table(job("bfloat16", lora_rank=8))
    assert "weights" not in rows
    assert rows["trained"][0] == "adapters of rank 8" and rows["frozen base"][0] == "bfloat16"
    assert table(job("bfloat16", lora_rank=8, frozen="nf4"))["frozen base"] == ("nf4", "memory.frozen is nf4")


@pytest.mark.parametrize(
    ("memory", "text"),
    [({}, "FSDP2"), ({"replicas": 2}, "2 groups"), ({"lora_rank": 2}, "each holds the frozen base")],
)
def test_processes(memory, text):
    assert table(job(**memory))["processes"] == ("1", "nothing is sharded")
    choice, why = table(job(**memory), Processes(0, 4))["processes"]
    assert choice == "4" and text in why


def test_a_backend_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(
        module, "backends", lambda: {"reference": "available", "cpp": "not built: no compiler"}
    )
    assert table(job())["losses"] == ("reference", "eager torch, slow: cpp not built: no compiler")
    monkeypatch.setattr(module, "backends", lambda: {"reference": "available", "cpp": "available"})
    assert table(job())["losses"][0] == "cpp"


def test_products_and_attention(monkeypatch):
    monkeypatch.setattr(module.attention, "backend", lambda device, dtype: (f"for {dtype}", str(device)))
    rows = table(job())
    assert rows["matrix products"][0] == "float32" and rows["attention"] == ("for torch.float32", "cpu")
    monkeypatch.setattr(module, "from_accumulator", lambda dtype, device: False)
    rows = table(job("bfloat16"))
    assert rows["attention"][0] == "for torch.bfloat16"
    assert rows["matrix products"] == (
        "bfloat16",
        "model.compute_dtype; logits from float32 copies, this device has no such product",
    )
    assert table(job(checkpointing="full"))["checkpointing"][0] == "full"


def test_one_line_for_each(capsys, monkeypatch):
    """Brackets are no markup."""
    monkeypatch.setattr(module, "backends", lambda: {"cpp": "not built [bold] here"})
    config = job()
    tell_choices(config, CPU, Processes())
    told = capsys.readouterr().out.splitlines()
    rows = choices(config, CPU, Processes())
    assert len(told) == len(rows)
    for line, (what, choice, why) in zip(told, rows):
        assert line.split("  ")[1] == what and choice in line and line.endswith(why)
