"""A model in training: loading, norms and clipping, what is saved, and what is taken back."""

import json
import math

import pytest
import torch
from tiny_training import CPU, DEFAULTS, fit, label_objective, masters, take, tiny_model

from whp_fast.checkpoint import load_model, save_model
from whp_fast.config import MemoryConfig, UnlearnConfig
from whp_fast.errors import UserError
from whp_fast.snapshots import Snapshots
from whp_fast.trainee import Trainee, clip_scale, load_frozen

WIDE = dict(hidden_size=64, intermediate_size=96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved float32 model."""
    path = tmp_path_factory.mktemp("base")
    save_model(tiny_model(**WIDE), path, dtype=torch.float32)
    return path


def load(folder, dtype="float32", seed=0, **memory):
    settings = UnlearnConfig(**DEFAULTS)
    compute_dtype = getattr(torch, dtype)
    return Trainee.load(
        folder, settings, MemoryConfig(**memory), compute_dtype=compute_dtype, device=CPU, seed=seed
    )


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def base():
    return {name: p.detach() for name, p in tiny_model(**WIDE).named_parameters()}


# ------------------------------------------------------------------------------------- loading and saving


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_model_is_the_saved_one_exactly(folder, dtype):
    trainee = load(folder, dtype)
    assert {p.dtype for p in trainee.model.parameters()} == {getattr(torch, dtype)}
    assert all(p.requires_grad for p in trainee.model.parameters())
    assert same(masters(trainee), base())
    assert list(trainee.trained) == [name for name, _ in trainee.model.named_parameters()]
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            trainee.model(ids).float(),
            tiny_model(**WIDE)(ids),
            rtol=0,
            atol=1e-6 if dtype == "float32" else 0.3,
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_trained_is_saved_in_float32(folder, dtype, tmp_path):
    trainee = load(folder, dtype)
    fit(trainee, [label_objective()], lr=1e-5)
    trainee.save(tmp_path, "base")
    saved = {name: p.detach() for name, p in load_model(tmp_path / "model").named_parameters()}
    assert same(saved, masters(trainee)) and not same(saved, base())
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "float32"
    assert not (tmp_path / "adapter").exists()
    model = trainee.to_float32()
    assert same(saved, {name: p.detach() for name, p in model.named_parameters()})
    assert model.residual_dtype is None


@pytest.mark.parametrize("frozen", ["auto", "nf4"])
def test_adapters_are_saved_merged_and_alone(folder, frozen, tmp_path):
    trainee = load(folder, "bfloat16", lora_rank=4, frozen=frozen, lora_targets=["q_proj", "up_proj"])
    assert all(".adapters.unlearn." in name for name in trainee.trained) and len(trainee.trained) == 8
    assert {p.dtype for p in trainee.trained.values()} == {torch.float32}
    before = {name: make().float() for name, make in trainee.masters().items()}
    fit(trainee, [label_objective()], lr=1e-2)
    trainee.save(tmp_path, "base")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    saved = {name: p.detach() for name, p in load_model(tmp_path / "model").named_parameters()}
    changed = {name for name in saved if not torch.equal(saved[name], before[name])}
    kinds = {name.split(".")[-2] for name in changed}
    assert kinds == {"q_proj", "up_proj"} and len(changed) == 4


def test_adapters_follow_the_seed(folder):
    def drawn(seed):
        trainee = load(folder, seed=seed, lora_rank=2)
        return {name: p.detach().clone() for name, p in trainee.trained.items()}

    assert same(drawn(3), drawn(3)) and not same(drawn(3), drawn(4))
    assert same({n: t.float() for n, t in masters(load(folder, lora_rank=2)).items()}, base())  # B is zero


@pytest.mark.parametrize(
    ("frozen", "kind"), [("auto", torch.bfloat16), ("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_frozen_bases(folder, frozen, kind):
    model = load_frozen(folder, MemoryConfig(frozen=frozen), torch.bfloat16, CPU)
    assert {p.dtype for p in model.parameters()} == {kind}
    assert not any(p.requires_grad for p in model.parameters())


# ------------------------------------------------------------------------------------------- norm and clip


@pytest.mark.parametrize(
    ("norm", "longest", "expected"),
    [(3.0, 0.0, 1.0), (0.5, 1.0, 1.0), (1.0, 1.0, 1.0), (4.0, 1.0, 0.25), (math.inf, 1.0, 1.0)],
)
def test_clip_scale(norm, longest, expected):
    assert clip_scale(norm, longest) == pytest.approx(expected, rel=1e-6)


def test_a_clipped_gradient_is_never_longer_than_asked():
    assert all(norm * clip_scale(norm, 1.0) <= 1.0 for norm in (1.0 + 1e-9, 1.5, 7.0, 1e9))


@pytest.mark.parametrize("optimizer", ["whp", "bitsandbytes"])
def test_norm_and_scaled_update(optimizer):
    """The norm is of the gradients as they are; the update sees them scaled, and they are gone after it."""
    one, other = (take(tiny_model(**WIDE), {"optimizer": optimizer}, betas=[0.9, 0.99]) for _ in range(2))
    for trainee, strength in ((one, 4.0), (other, 1.0)):
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            for p in trainee.trained.values():
                p.grad = strength * torch.randn(p.shape, generator=generator)
            norm = trainee.gradient_norm()
            total = math.sqrt(sum(p.grad.double().square().sum().item() for p in trainee.trained.values()))
            assert norm.dtype == torch.float64 and norm.item() == pytest.approx(total, rel=1e-6)
            trainee.update(1.0 / strength)
            assert all(p.grad is None for p in trainee.trained.values())
    assert same(masters(one), masters(other)) and not same(masters(one), base())


def test_no_gradient_has_norm_zero():
    assert take(tiny_model()).gradient_norm().item() == 0.0


def test_decay_is_for_matrices_alone():
    trainee = take(tiny_model(), weight_decay=0.1)
    decay = {
        id(p): group["weight_decay"] for group in trainee.optimizer.param_groups for p in group["params"]
    }
    assert {decay[id(p)] for p in trainee.trained.values() if p.ndim > 1} == {0.1}
    assert {decay[id(p)] for p in trainee.trained.values() if p.ndim <= 1} == {0.0}


def test_autocast_is_for_float32_weights_beside_bfloat16_products():
    for weights, dtype, expected in (
        ("float32", torch.float32, False),
        ("float32", torch.bfloat16, True),
        ("bfloat16", torch.bfloat16, False),
    ):
        trainee = take(tiny_model(), {"weights": weights}, dtype)
        with trainee.forward():
            assert torch.is_autocast_enabled("cpu") == expected
        stream = torch.float32 if weights == "bfloat16" else None
        assert trainee.model.residual_dtype == stream


# ---------------------------------------------------------------------------------------------- snapshots


def snapshot(trainee, folder):
    Snapshots(folder, identity="x").save(1, trainee.rows(), {}, wait=True)
    return Snapshots(folder, identity="x").latest()


def test_rows_are_weights_remainders_and_moments(folder):
    rows = load(folder, "bfloat16", moments="int8").rows()
    kinds = {name.partition("/")[0] for name in rows}
    assert kinds == {
        "weight",
        "remainder",
        "exp_avg",
        "exp_avg_sq",
        "exp_avg_scale",
        "exp_avg_sq_scale",
    }
    assert all(r.first == 0 and len(r.values) == r.shape[0] for r in rows.values())


def test_adapters_keep_nothing_of_the_base(folder):
    rows = load(folder, lora_rank=2).rows()
    assert all(".adapters." in name for name in rows)


@pytest.mark.parametrize("other", [dict(moments="int8"), dict(weights="bfloat16"), dict(lora_rank=2)])
def test_a_snapshot_of_another_training_is_refused(folder, other, tmp_path):
    found = snapshot(load(folder), tmp_path)
    trainee = load(folder, **other)
    with pytest.raises(UserError, match="there is no .* of this shape; the snapshot is of another training"):
        trainee.restore(found)


@pytest.mark.parametrize("optimizer", ["whp", "bitsandbytes"])
def test_everything_is_taken_back(folder, optimizer, tmp_path):
    trainee = load(folder, optimizer=optimizer)
    fit(trainee, [label_objective()])
    found = snapshot(trainee, tmp_path)
    other = load(folder, optimizer=optimizer)
    other.restore(found)
    other.set_step(3)
    assert same(masters(other), masters(trainee))
    for t in (trainee, other):
        for p in t.trained.values():
            p.grad = torch.full_like(p, 1e-3)
        t.update(1.0)
    assert same(masters(other), masters(trainee))
