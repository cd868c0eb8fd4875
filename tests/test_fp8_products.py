"""8-bit products in a model, its trainings and the label stage: who uses them, and who refuses them."""

import pytest
import torch
from test_choices import table
from test_plan import WIDE, Setup, plan_activations, trainee
from tiny_training import CPU, corpus, fit, label_objective, masters, take, tiny_model
from tiny_world import arguments, command, make_world, without_pictures
from whp_kernels.layers import fp8 as kernels

from whp_fast import job, label_stage, training_stage
from whp_fast.config import AnchorsConfig, DataConfig, JobConfig, LabelConfig, MemoryConfig, ModelConfig
from whp_fast.errors import UserError
from whp_fast.fp8 import refuse_fp8, use_fp8

BFLOAT16 = torch.bfloat16


def model_of(scaling, only_in_training=True, **changes):
    model = tiny_model(**{"intermediate_size": 32, **changes})
    use_fp8(model, scaling, only_in_training=only_in_training)
    return model


def in_8_bits(model):
    return {name for name, module in model.named_modules() if hasattr(module, "fp8")}


def settings(memory=None, **model):
    return JobConfig(
        model=ModelConfig(path="base", **model),
        data=DataConfig(corpus=["a.txt"]),
        anchors=AnchorsConfig(path="a.json"),
        memory=MemoryConfig(**(memory or {})),
    )


def test_projections_of_the_blocks_and_nothing_else():
    found = in_8_bits(model_of("rowwise"))
    assert len(found) == 2 * 7 and all("_proj" in name for name in found)
    assert in_8_bits(model_of("off")) == set()


def test_what_16_does_not_divide_stays_with_all_that_reads_the_same():
    found = in_8_bits(model_of("tensorwise", intermediate_size=24))
    assert {name.split(".")[-1] for name in found} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    grouped = in_8_bits(model_of("tensorwise", num_key_value_heads=1))  # k and v have 8 rows
    assert {name.split(".")[-1] for name in grouped} == {"o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("bias", [False, True])
def test_one_quantisation_of_x_for_those_that_share_it(bias, monkeypatch):
    model = model_of("tensorwise", only_in_training=False, num_hidden_layers=1, attention_bias=bias)
    for parameter in model.parameters():
        parameter.data.add_(0.01)  # biases too
    seen = []
    real = kernels.quantise
    monkeypatch.setattr(kernels, "quantise", lambda x, *rest: seen.append(x.shape) or real(x, *rest))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        narrow, wide = model(ids), model_of("off", num_hidden_layers=1, attention_bias=bias)
        wide.load_state_dict(model.state_dict())
        assert sum(shape[0] == 20 for shape in seen) == 4  # before q k v, o, gate up, down
        assert len(seen) == 4 + 7
        apart = (narrow - wide(ids)).norm() / wide(ids).norm()
    assert 1e-4 < apart < 0.1


def test_what_is_measured_between_steps_is_not_in_8_bits():
    model, exact = model_of("tensorwise"), model_of("off")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids), exact(ids))
    assert not torch.equal(model(ids), exact(ids))


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_a_training_is_near_that_in_bfloat16(scaling):
    losses = {}
    for how in ("off", scaling):
        model = take(model_of("off"), dtype=BFLOAT16, lr=1e-2)
        use_fp8(model.model, how, only_in_training=True)
        losses[how] = [record.loss for record in fit(model, [label_objective()], lr=1e-2)]
    assert losses[scaling] != losses["off"] and losses["off"][-1] < losses["off"][0]
    assert losses[scaling] == pytest.approx(losses["off"], abs=0.05)


def test_checkpointing_changes_no_bit():
    found = []
    for checkpointing in ("none", "selective", "full"):
        model = take(model_of("off"), {"checkpointing": checkpointing}, BFLOAT16)
        use_fp8(model.model, "tensorwise", only_in_training=True)
        fit(model, [label_objective()], steps=2)
        found.append(masters(model))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


def test_a_number_that_is_not_finite_stops_the_training():
    model = take(model_of("off"), dtype=BFLOAT16)
    use_fp8(model.model, "tensorwise", only_in_training=True)
    model.trained["model.layers.1.mlp.up_proj.weight"].data[3, 4] = float("inf")
    with pytest.raises(UserError, match="finite"):
        fit(model, [label_objective(corpus())])


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_the_plan_counts_what_is_kept(checkpointing, weights):
    real = trainee(WIDE, MemoryConfig(weights=weights, checkpointing=checkpointing), "bfloat16")
    use_fp8(real.model, "tensorwise", only_in_training=True)
    saved = {}
    known = {p.untyped_storage().data_ptr() for p in real.model.parameters()}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(4, 128, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), real.forward():
        real.model.hidden_states(ids)
    measured = sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in known)
    setup = Setup(WIDE, real_memory(weights, checkpointing), "bfloat16", 4, 128, cpu=True, fp8=True)
    planned = plan_activations.activation_bytes(setup)[0]
    assert planned == pytest.approx(measured, rel=0.1)
    wide = Setup(WIDE, real_memory(weights, checkpointing), "bfloat16", 4, 128, cpu=True)
    assert checkpointing == "full" or planned < 0.95 * plan_activations.activation_bytes(wide)[0]


def real_memory(weights, checkpointing):
    return MemoryConfig(weights=weights, checkpointing=checkpointing)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"fp8": "tensorwise", "compute_dtype": "float32"}, "model.fp8.*float32"),
        ({"fp8": "rowwise", "memory": {"lora_rank": 4}}, "model.fp8.*adapters"),
        ({"layers": "compile", "memory": {"checkpointing": "selective"}}, "model.layers.*selective"),
        ({"layers": "compile", "memory": {"frozen": "nf4", "lora_rank": 4}}, "model.layers.*nf4"),
    ],
)
def test_what_cannot_be_is_refused(changes, told):
    with pytest.raises(UserError, match=told):
        settings(**changes)


def test_labels_in_8_bits_are_refused_under_adapters():
    with pytest.raises(UserError, match="label.fp8.*adapters"):
        JobConfig(label=LabelConfig(fp8="rowwise"), memory=MemoryConfig(lora_rank=4))


def test_an_older_gpu_is_refused(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(UserError, match="model.fp8: A100 has no 8-bit floats"):
        refuse_fp8(settings(fp8="tensorwise"), gpu)
    labels = settings()
    labels.label.fp8 = "rowwise"
    with pytest.raises(UserError, match="label.fp8"):
        refuse_fp8(labels, gpu)
    refuse_fp8(settings(), gpu)
    refuse_fp8(settings(fp8="tensorwise"), CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    refuse_fp8(settings(fp8="tensorwise"), gpu)


def test_results_depend_on_the_products_but_not_on_the_compiler():
    assert settings().settings() != settings(fp8="tensorwise").settings()
    assert settings().settings() == settings(layers="compile").settings()


def test_the_table_tells_them():
    rows = table(settings(fp8="rowwise"))
    assert rows["fp8 in training"][0] == "rowwise" and "emulated" in rows["fp8 in training"][1]
    assert "fp8 in labels" not in rows and "fp8 in training" not in table(settings())
    assert table(settings(layers="compile"))["layers"][0] == "compiled blocks"


def test_a_job_uses_them(tmp_path, monkeypatch, capsys):
    used = []

    def spy(model, scaling, *, only_in_training):
        used.append((scaling, only_in_training))
        use_fp8(model, scaling, only_in_training=only_in_training)

    refused = []
    for module in (training_stage, label_stage):
        monkeypatch.setattr(module, "use_fp8", spy)
    monkeypatch.setattr(job, "refuse_fp8", lambda config, device: refused.append(config.model.fp8))
    make_world(tmp_path / "world")
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)
    words = arguments(evaluation=False, model__compute_dtype="bfloat16")
    first = command(capsys, [*words, "--model.fp8", "tensorwise", "--label.fp8", "rowwise"])
    assert first.status == 0, first.err
    assert used == [("tensorwise", True), ("rowwise", False), ("rowwise", False), ("tensorwise", True)]
    assert refused == ["tensorwise"]


def test_stages_know_the_products(monkeypatch):
    def depends(**model):
        one = job.Job.__new__(job.Job)
        one.config = settings(**model)
        return one._training_depends(one.config.reinforce)

    assert depends() != depends(fp8="rowwise") != depends(fp8="tensorwise")
    assert depends() == depends(layers="compile")
