"""The training loop against a plain one, and the promises it makes about steps, masks and failures."""

import dataclasses
import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_training import (
    CONTEXT,
    DEFAULTS,
    VOCAB,
    corpus,
    fit,
    label_objective,
    masters,
    run,
    take,
    tiny_model,
    unchanged,
)

from whp_fast.adapters import add_adapter, use_adapter
from whp_fast.config import MemoryConfig, TrainConfig
from whp_fast.corpus import Blocks
from whp_fast.engine import Keeping, plan_steps
from whp_fast.packing import pack
from whp_fast.snapshots import Snapshots
from whp_fast.stopping import Stopped
from whp_fast.trainee import Trainee


def assert_close(one, other, atol=1e-6):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=atol)


def plain_step_loss(model, blocks, labels, numbers):
    """Sum of the cross-entropies of whole logits, one block at a time, over the number of labels."""
    total, count = 0.0, 0
    for number in numbers:
        block = torch.from_numpy(blocks[int(number)].astype(np.int64))
        start = int(number) * CONTEXT
        logits = model(block[None])[0].float()
        if labels is None:
            logits, target = logits[:-1], block[1:]
        else:
            target = torch.from_numpy(labels[start : start + len(block)])
        total = total + F.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
        count += int((target != -100).sum())
    return total / count, count


# ------------------------------------------------------------------------------------------ a plain loop


@pytest.mark.parametrize("labels", ["own", None])
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_equals_a_plain_loop(labels, clip, schedule):
    """Three steps of AdamW; the linear schedule is that of transformers (to 0 after the last step)."""
    blocks, own = corpus()
    used = own if labels == "own" else None
    settings = dict(schedule=schedule, clip_grad_norm=clip, weight_decay=0.1, betas=[0.9, 0.98])
    records, trained = run(labels=used, **settings)

    model = tiny_model()
    matrices = [p for p in model.parameters() if p.ndim > 1]  # decay leaves the norms alone
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=False)
    plan = plan_steps(len(blocks), TrainConfig(**DEFAULTS), 5)
    for step, (numbers, record) in enumerate(zip(plan, records, strict=True)):
        lr = 1e-3 * (1 - step / 3 if schedule == "linear" else 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, count = plain_step_loss(model, blocks, used, numbers)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
        if clip:
            assert norm > clip
            for p in model.parameters():
                p.grad *= clip / norm
        optimizer.step()
        assert record.loss == pytest.approx(loss.item(), rel=1e-6)
        assert record.grad_norm == pytest.approx(float(norm), rel=1e-5)
        assert record.lr == pytest.approx(lr) and record.trained == count
    assert_close(trained, dict(model.named_parameters()))
    start = dict(tiny_model().named_parameters())
    assert all((trained[name] - start[name]).abs().max() > 5e-4 for name in trained)


def test_next_token_loss_by_hand():
    """As transformers: the logits at a position against the next token, the last position against none."""
    blocks, _ = corpus()
    (record,), _ = run(labels=None, steps=0, epochs=1.0, batch_blocks=3, accumulate=3)
    losses = []
    for number in range(len(blocks)):
        ids = torch.from_numpy(blocks[number].astype(np.int64))
        log_probs = torch.log_softmax(tiny_model()(ids[None])[0].double(), dim=-1)
        losses += [-log_probs[i, ids[i + 1]].item() for i in range(len(ids) - 1)]
    assert len(losses) == 8 * 9 + 2 == record.trained
    assert record.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)


# ---------------------------------------------------------------------------------- accumulation and masks


def test_accumulation_changes_nothing():
    """Micro-batches of any size give the same step, though their numbers of labels differ."""
    sizes = [(8, 1), (4, 2), (2, 4), (1, 8)]
    results = [run(batch_blocks=b, accumulate=a, lr=1e-4) for b, a in sizes]
    first_records, first = results[0]
    for records, parameters in results[1:]:
        for one, other in zip(records, first_records, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-6)
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-6)
            assert one.trained == other.trained
        assert_close(parameters, first)


def test_padding_and_masked_positions_take_no_part():
    """The tokens after the last label of a block cannot change anything; nor can another short block."""
    blocks, labels = corpus()
    labels = labels.copy()
    labels.reshape(-1)[[i for i in range(len(labels)) if i % CONTEXT >= 6]] = -100
    tokens = np.where(np.arange(len(labels)) % CONTEXT >= 6, (blocks.tokens + 1) % VOCAB, blocks.tokens)
    expected = run(data=(blocks, labels))[1]
    assert_close(run(data=(Blocks.of(tokens, CONTEXT), labels))[1], expected, atol=0)


def test_settings_without_effect_on_the_result():
    one, other = run(), run()
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])  # bit for bit
    losses = [
        [dataclasses.replace(r, seconds=0, data_seconds=0, memory_bytes=0) for r in records]
        for records, _ in (one, other)
    ]
    assert losses[0] == losses[1]
    different = run(seed=6)[1]
    assert any(not torch.equal(different[name], one[1][name]) for name in different)


def test_bfloat16_products_on_float32_weights():
    records, parameters = run(dtype=torch.bfloat16)
    expected, _ = run()
    for record, other in zip(records, expected):
        assert record.loss == pytest.approx(other.loss, rel=0.02)
        assert record.loss != other.loss
    assert {p.dtype for p in parameters.values()} == {torch.float32}


# ---------------------------------------------------------------------------------------- forms of memory


def moved(parameters, seed=0, **changes):
    """How far each element went, one vector."""
    start = dict(tiny_model(seed, **changes).named_parameters())
    return torch.cat([(parameters[name] - start[name]).flatten().detach() for name in start])


def likeness(one, other):
    """Cosine of the angle between two ways."""
    return F.cosine_similarity(one.double(), other.double(), dim=0).item()


def test_bfloat16_weights_with_remainders_go_the_way_of_a_float32_master():
    """At a learning rate that rounding bfloat16 weights would undo."""
    settings = dict(dtype=torch.bfloat16, lr=1e-6, steps=20)
    records, parameters = run(memory={"weights": "bfloat16"}, **settings)
    expected, autocast = run(memory={"weights": "float32"}, **settings)
    for one, other in zip(records, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=3e-3)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=2e-2)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert likeness(moved(parameters), moved(autocast)) > 0.97
    exact = run(lr=1e-6, steps=20)[1]
    assert likeness(moved(parameters), moved(exact)) > 0.97
    ratio = moved(parameters).norm() / moved(exact).norm()
    assert ratio == pytest.approx(1, abs=0.02)  # rounded weights would lag behind


def test_nothing_of_the_float32_weights_is_lost_by_bfloat16_parameters():
    trainee = take(tiny_model(), {"weights": "bfloat16"}, torch.bfloat16)
    assert {p.dtype for p in trainee.model.parameters()} == {torch.bfloat16}
    kept = masters(trainee)
    assert all(torch.equal(kept[name], p) for name, p in tiny_model().named_parameters())


def gradients_of(model, micro_batches, count):
    """Name -> float64 sum of the gradients of micro-batches, each computed alone as the engine does."""
    blocks, labels = corpus()
    targets = label_objective().targets
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    for numbers in micro_batches:
        ids, packing = pack([blocks[int(n)] for n in numbers])
        targets.loss(
            model.hidden_states(ids, packing=packing),
            model.lm_head_weight,
            targets.prepare(numbers),
            num_items_in_batch=count,
            compute_dtype=torch.bfloat16,
            chunk_mib=256,
        ).backward()
        for name, p in model.named_parameters():
            total[name] += p.grad.double()
            p.grad = None
    return total


@pytest.mark.parametrize("gradients", ["float32", "bfloat16"])
def test_gradients_of_micro_batches_are_added_up_in_float32(gradients):
    """Eight micro-batches: bfloat16 sums are wrong by a part in a thousand, float32 ones by rounding."""
    trainee = take(tiny_model(), {"weights": "bfloat16", "gradients": gradients}, torch.bfloat16)
    seen = {}
    update = trainee.update

    def keep(scale):
        seen.update({name: p.grad.clone() for name, p in trainee.trained.items()})
        update(scale)

    trainee.update = keep
    (record,) = fit(trainee, [label_objective()], steps=1, batch_blocks=1, accumulate=8)

    model = tiny_model().to(torch.bfloat16)
    model.residual_dtype = torch.float32
    for p in model.parameters():
        p.grad_dtype = torch.float32  # as the backward pass makes them
    (numbers,) = plan_steps(9, TrainConfig(**{**DEFAULTS, "batch_blocks": 1, "accumulate": 8, "steps": 1}), 5)
    expected = gradients_of(model, numbers[:, None], record.trained)
    assert {g.dtype for g in seen.values()} == {getattr(torch, gradients)}
    worst = max(
        ((seen[name].double() - total).abs().max() / total.abs().max()).item()
        for name, total in expected.items()
    )
    if gradients == "float32":
        norm = math.sqrt(sum(total.square().sum().item() for total in expected.values()))
        assert worst < 1e-6
        assert record.grad_norm == pytest.approx(norm, rel=1e-6)
    else:
        assert worst > 1e-3


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_activation_checkpointing_changes_no_bit(kind):
    dtype = getattr(torch, kind)
    expected = run(dtype=dtype)
    for checkpointing in ("selective", "full"):
        records, parameters = run(dtype=dtype, memory={"checkpointing": checkpointing})
        assert [r.loss for r in records] == [r.loss for r in expected[0]]
        assert all(torch.equal(parameters[name], expected[1][name]) for name in parameters)


WIDE = dict(hidden_size=64, intermediate_size=96)


@pytest.mark.parametrize(("moments", "least"), [("bfloat16", 0.98), ("int8", 0.98)])
def test_narrow_moments_stay_close_to_float32_ones(moments, least):
    """Matrices of 4,096 elements and more; smaller ones keep float32."""
    settings = dict(steps=20, lr=1e-4)
    records, parameters = run(tiny_model(**WIDE), memory={"moments": moments}, **settings)
    expected, exact = run(tiny_model(**WIDE), **settings)
    for one, other in zip(records, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=2e-3)
    assert records[-1].loss != expected[-1].loss
    assert least < likeness(moved(parameters, **WIDE), moved(exact, **WIDE)) < 1


def test_moments_in_host_memory_change_no_bit():
    memory = {"weights": "bfloat16", "moments": "int8"}
    one = run(tiny_model(**WIDE), memory=memory, dtype=torch.bfloat16)[1]
    other = run(tiny_model(**WIDE), memory={**memory, "offload_moments": True}, dtype=torch.bfloat16)[1]
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_adapters_alone_are_trained(kind):
    dtype = getattr(torch, kind)
    model = tiny_model().to(dtype).requires_grad_(False)
    add_adapter(model, "own", rank=2, alpha=4.0, targets=["q_proj", "down_proj"])
    use_adapter(model, "own")
    memory = MemoryConfig(lora_rank=2)
    trainee = Trainee(model, TrainConfig(**DEFAULTS), memory, compute_dtype=dtype, adapter="own")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    records = fit(trainee, [label_objective()], steps=6, lr=1e-2)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(trainee.trained) and len(changed) == 2 * 2 * 2
    assert records[-1].loss < records[0].loss
    base = run(steps=1, dtype=dtype)[0]
    assert records[0].loss == pytest.approx(base[0].loss, rel=1e-6 if kind == "float32" else 2e-2)


# -------------------------------------------------------------------------------------- two objectives


def test_two_objectives_are_added_up_each_over_its_own_positions():
    """The loss of a step is L1 + w L2, each a mean over its own labels, and so is its gradient."""
    kept, kept_labels = corpus(n_blocks=5, short=7, seed=1)
    trainee = take(tiny_model())
    both = [label_objective(), label_objective((kept, kept_labels), weight=0.3)]
    record, second = fit(trainee, both, steps=2)

    blocks, labels = corpus()
    numbers = plan_steps(9, TrainConfig(**DEFAULTS), 5)[0]
    model = tiny_model()
    beside = retained_blocks(5, 16, seed=5)
    one, count = plain_step_loss(model, blocks, labels, numbers)
    two, other_count = plain_step_loss(model, kept, kept_labels, beside[:8])
    loss = one + 0.3 * two
    loss.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
    assert record.loss == pytest.approx(loss.item(), rel=1e-6)
    assert record.grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert record.trained == count + other_count
    counted = sum(int((kept_labels[n * CONTEXT : (n + 1) * CONTEXT] != -100).sum()) for n in beside[8:])
    alone, _ = run(steps=2)
    assert second.trained - alone[1].trained == counted


def retained_blocks(n_blocks, count, seed):
    """Round after round, each in an order of its own, whatever the steps."""
    rounds = math.ceil(count / n_blocks)
    orders = [np.random.default_rng([seed, r, 1]).permutation(n_blocks) for r in range(rounds)]
    return np.concatenate(orders)[:count]


def test_an_objective_of_weight_zero_changes_nothing():
    trainee = take(tiny_model())
    fit(trainee, [label_objective(), label_objective(corpus(seed=1), weight=0.0)])
    assert_close(masters(trainee), run()[1], atol=0)


def test_a_step_whose_first_objective_is_masked_trains_the_other():
    blocks, labels = corpus()
    plan = plan_steps(len(blocks), TrainConfig(**{**DEFAULTS, "batch_blocks": 1, "accumulate": 1}), 5)
    masked = labels.copy()
    masked[int(plan[0][0]) * CONTEXT : (int(plan[0][0]) + 1) * CONTEXT] = -100
    trainee = take(tiny_model())
    both = [label_objective((blocks, masked)), label_objective(corpus(seed=1))]
    (record,) = fit(trainee, both, steps=1, batch_blocks=1, accumulate=1)
    assert record.trained > 0 and record.loss > 0
    assert not unchanged(masters(trainee))


# ---------------------------------------------------------------------------------------- stop and go on

KEPT = {
    "float32": ("float32", {}),
    "bfloat16 weights": ("bfloat16", {"weights": "bfloat16"}),
    "bfloat16 moments": ("float32", {"moments": "bfloat16"}),
    "8-bit moments": ("bfloat16", {"moments": "int8", "offload_moments": True}),
    "bitsandbytes": ("float32", {"optimizer": "bitsandbytes"}),
}


def snapshots(folder, identity="one"):
    return Snapshots(folder, identity=identity)


@pytest.mark.parametrize("kind", KEPT)
def test_a_stopped_training_goes_on_with_the_same_bits(kind, tmp_path):
    """A signal in step 3, one of its steps without a label: it counts for the schedule, not for AdamW."""
    dtype, memory = KEPT[kind]
    settings = dict(steps=5, batch_blocks=1, accumulate=2, schedule="linear", warmup_steps=1, lr=1e-2)
    blocks, labels = corpus()
    for number in plan_steps(9, TrainConfig(**{**DEFAULTS, **settings}), 5)[1]:
        labels[int(number) * CONTEXT : (int(number) + 1) * CONTEXT] = -100

    def part(resumed=None, signal_at=None, points=None):
        trainee = take(tiny_model(**WIDE), memory, getattr(torch, dtype), **settings)
        keeping = Keeping(snapshots(tmp_path), resumed, minutes=0, state=lambda: {"kept": len(done)})
        done = []

        def after_step(step):
            if points is not None:
                points.append(step)
            if step == signal_at:
                signal.raise_signal(signal.SIGTERM)

        objectives = [label_objective((blocks, labels))]
        try:
            fit(trainee, objectives, done=done, keeping=keeping, after_step=after_step, **settings)
            assert signal_at is None
        except Stopped:
            assert len(done) == signal_at
        return [r.loss for r in done], masters(trainee)

    losses, expected = part()
    assert losses[1] == 0 and all(losses[k] > 0 for k in (0, 2, 3, 4))
    points = []
    first, _ = part(signal_at=3, points=points)
    found = snapshots(tmp_path).latest()
    assert found.step == 3 and found.state == {"kept": 3} and first == losses[:3]
    second, weights = part(found, points=points)
    assert points == [0, 1, 2, 3, 4, 5]  # nothing is measured twice
    assert second == losses[3:]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_snapshots_by_steps_and_by_time(tmp_path):
    def kept(folder, **when):
        made = []
        keeper = snapshots(folder)
        save = keeper.save

        def note(step, *arguments, **options):
            made.append(step)
            save(step, *arguments, **options)

        keeper.save = note
        fit(take(tiny_model()), [label_objective()], steps=7, keeping=Keeping(keeper, **when))
        return made

    assert kept(tmp_path / "a", minutes=0, steps=2) == [2, 4, 6]
    assert kept(tmp_path / "b", minutes=0) == []
    assert kept(tmp_path / "c", minutes=1e-9) == [1, 2, 3, 4, 5, 6]  # none after the last
    assert snapshots(tmp_path / "a").latest().step == 6


def test_a_stop_without_snapshots(tmp_path):
    def after_step(step):
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    done = []
    with pytest.raises(Stopped):
        fit(take(tiny_model()), [label_objective()], done=done, after_step=after_step)
    assert len(done) == 2


# ---------------------------------------------------------------------------------------- known results

GOLDEN = Path(__file__).parent / "golden" / "losses_float32.json"


def golden_losses():
    """Twenty steps of a tiny model in float32 on one thread. A change of the algorithm shows here, one of
    the order of sums does not.

    After a wanted change, make the file anew in this folder:
    python -c "import test_engine; test_engine.write_golden()"
    """
    records, _ = run(
        steps=20, lr=3e-3, schedule="cosine", warmup_steps=3, clip_grad_norm=1.0, weight_decay=0.1
    )
    return [record.loss for record in records]


def write_golden():
    torch.set_num_threads(1)
    GOLDEN.write_text(json.dumps(golden_losses(), indent=1) + "\n")


def test_losses_are_those_of_earlier_versions():
    expected = json.loads(GOLDEN.read_text())
    assert len(expected) == 20 and expected[-1] < expected[0]
    assert golden_losses() == pytest.approx(expected, rel=1e-5)
