"""Blocks by torch.compile train as the fused layers do. Inductor needs a compiler and minutes: not here."""

import pytest
import torch
from tiny_training import CONTEXT, corpus, fit, label_objective, masters, take, tiny_model

from whp_fast import training_stage
from whp_fast.attention import attention
from whp_fast.compile_blocks import compile_blocks
from whp_fast.config import AnchorsConfig, DataConfig, JobConfig, ModelConfig
from whp_fast.generate import greedy
from whp_fast.processes import Processes


def training(compiled, layers=3):
    trainee = take(tiny_model(num_hidden_layers=layers))
    if compiled:
        compile_blocks(trainee.model, backend="aot_eager")
    records = fit(trainee, [label_objective(corpus(8, CONTEXT))])  # blocks of one length: one size of batches
    return [record.loss for record in records], masters(trainee), trainee


@pytest.fixture
def fresh():
    """No graph of another test is reused or counted."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def test_a_training_is_that_of_the_fused_layers(fresh):
    fused, exact, _ = training(False)
    compiled, found, trainee = training(True)
    assert compiled == pytest.approx(fused, rel=1e-5)
    assert all(torch.allclose(found[name], exact[name], rtol=0, atol=1e-4) for name in exact)
    of_three = fresh["stats"]["unique_graphs"]
    assert of_three >= 3  # before attention, after it, and the rest of a block around it
    assert all("attention" in reason for reason in fresh["graph_break"])  # nothing else stays outside
    greedy(trainee.model, [[1, 2, 3]], max_new_tokens=2)
    assert fresh["stats"]["unique_graphs"] == of_three  # generation compiles nothing
    assert all(block.self_attn.attention is not attention for block in trainee.model.model.layers)
    torch._dynamo.reset()
    fresh.clear()
    training(True, layers=2)
    assert fresh["stats"]["unique_graphs"] == of_three  # once for all blocks


def test_a_training_stage_compiles_when_it_is_asked_to(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(training_stage, "compile_blocks", seen.append)
    monkeypatch.setattr(training_stage, "use_fp8", lambda *_, **__: None)
    monkeypatch.setattr(training_stage.Trainee, "load", lambda *_, **__: type("T", (), {"model": "model"}))

    class Asked(Exception):
        pass

    def stop(trainee):
        raise Asked

    for layers, expected in (("fused", []), ("compile", ["model"])):
        job = JobConfig(
            model=ModelConfig(path="base", layers=layers),
            data=DataConfig(corpus=["a.txt"]),
            anchors=AnchorsConfig(path="a.json"),
        )
        stage = training_stage.TrainingStage(
            job, job.reinforce, tmp_path, tmp_path, "", torch.device("cpu"), Processes()
        )
        with pytest.raises(Asked):
            stage.work(tmp_path, stop)
        assert seen == expected
