"""The training loop against a plain one, and the promises it makes about steps, masks and failures."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from whp_fast.config import TrainConfig
from whp_fast.corpus import Blocks
from whp_fast.engine import plan_steps, schedule_factor, train
from whp_fast.errors import UserError
from whp_fast.model import Llama, LlamaConfig

VOCAB, CONTEXT = 29, 10
DEFAULTS = dict(lr=1e-3, batch_blocks=4, accumulate=2, steps=3, schedule="constant", clip_grad_norm=0.0)


def tiny_model(seed=0):
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def corpus(n_blocks=9, short=3, seed=0):
    """Blocks (the last one short) and labels whose number differs much from block to block."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (n_blocks - 1) * CONTEXT + short).astype(np.uint16)
    labels = rng.integers(0, VOCAB, len(tokens))
    for number in range(n_blocks):
        here = labels[number * CONTEXT : (number + 1) * CONTEXT]
        here[rng.random(len(here)) < number / (n_blocks + 1)] = -100
    return Blocks.of(tokens, CONTEXT), labels


def run(model=None, data=None, labels="own", seed=5, dtype=torch.float32, look=None, **settings):
    """(records, parameters) after training."""
    model = model or tiny_model()
    blocks, own = data or corpus()
    after, records = [], []
    arguments = dict(seed=seed, device=torch.device("cpu"), compute_dtype=dtype)
    n_steps = train(
        model,
        blocks,
        own if isinstance(labels, str) else labels,
        TrainConfig(**{**DEFAULTS, **settings}),
        **arguments,
        on_step=records.append,
        after_step=lambda step: (after.append(step), look and look(step)),
    )
    assert after == list(range(n_steps + 1)) and [r.step for r in records] == after[1:]
    return records, {name: p.detach().clone() for name, p in model.named_parameters()}


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
    losses = [[dataclasses.replace(r, seconds=0) for r in records] for records, _ in (one, other)]
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


# ---------------------------------------------------------------------------------------------- failures


def poisoned_run(poison, step, **settings):
    """Train with something broken after a step; the error and the parameters before and after it."""
    model, (blocks, labels) = tiny_model(), corpus()
    before = {}

    def after_step(number):
        if number == step:
            poison(model)
            before.update({name: p.detach().clone() for name, p in model.named_parameters()})

    done = []
    with pytest.raises(UserError) as caught:
        train(
            model,
            blocks,
            labels,
            TrainConfig(**{**DEFAULTS, **settings}),
            seed=5,
            device=torch.device("cpu"),
            compute_dtype=torch.float32,
            on_step=done.append,
            after_step=after_step,
        )
    assert [record.step for record in done] == list(range(1, step + 1))
    for name, p in model.named_parameters():
        assert torch.equal(p.detach().nan_to_num(7.5), before[name].nan_to_num(7.5)), name
    return str(caught.value)


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite(value, clip, step):
    def poison(model):
        model.lm_head_weight.data[3, 2] = value

    message = poisoned_run(poison, step, clip_grad_norm=clip)
    assert f"step {step + 1} is not finite" in message and message.startswith("train: the loss (nan)")


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_gradient_that_is_not_finite(clip):
    """A finite loss is not enough."""

    def poison(model):
        model.lm_head_weight.register_hook(lambda gradient: gradient * math.inf)

    message = poisoned_run(poison, 1, clip_grad_norm=clip)
    assert "step 2 is not finite" in message and "loss (nan)" not in message


def test_step_without_a_label_makes_no_update():
    blocks, labels = corpus()
    plan = plan_steps(len(blocks), TrainConfig(**{**DEFAULTS, "batch_blocks": 1, "accumulate": 1}), 5)
    second = int(plan[1][0])
    labels = labels.copy()
    labels[second * CONTEXT : (second + 1) * CONTEXT] = -100
    seen = []
    model = tiny_model()

    def look(step):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})

    records, _ = run(model, (blocks, labels), batch_blocks=1, accumulate=1, look=look)
    assert records[1].trained == 0 and records[0].trained > 0 and len(records) == len(plan)
    assert all(torch.equal(seen[1][name], seen[2][name]) for name in seen[1])
    assert not all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
    assert not all(torch.equal(seen[2][name], seen[3][name]) for name in seen[2])


@pytest.mark.parametrize("kind", ["no label", "no token"])
def test_nothing_to_train_is_refused(kind):
    blocks, labels = corpus()
    if kind == "no token":
        blocks, labels = Blocks.of(np.zeros(0, np.uint16), CONTEXT), np.zeros(0, np.int64)
    with pytest.raises(UserError, match="train: no position of the corpus has a label"):
        run(data=(blocks, np.full_like(labels, -100)))
    with pytest.raises(UserError, match="no position"):
        run(data=(Blocks.of(np.zeros(1, np.uint16), CONTEXT), None))


def unchanged(parameters):
    return all(torch.equal(p, parameters[name]) for name, p in tiny_model().named_parameters())


# --------------------------------------------------------------------------------------------- the plan


@given(
    n_blocks=st.integers(1, 30),
    epochs=st.sampled_from([0.3, 1.0, 1.5, 2.0, 3.0]),
    batch_blocks=st.integers(1, 5),
    accumulate=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_every_epoch_visits_every_block_once(n_blocks, epochs, batch_blocks, accumulate, seed):
    settings = TrainConfig(epochs=epochs, batch_blocks=batch_blocks, accumulate=accumulate)
    plan = plan_steps(n_blocks, settings, seed)
    sizes = [len(numbers) for numbers in plan]
    per_step = batch_blocks * accumulate
    assert sum(sizes) == math.ceil(epochs * n_blocks)
    assert all(size == per_step for size in sizes[:-1]) and 0 < sizes[-1] <= per_step
    visits = np.concatenate(plan)
    for begin in range(0, len(visits), n_blocks):
        epoch = visits[begin : begin + n_blocks]
        assert len(set(epoch.tolist())) == len(epoch) and 0 <= epoch.min() and epoch.max() < n_blocks
    again = plan_steps(n_blocks, settings, seed)
    assert all(np.array_equal(a, b) for a, b in zip(plan, again))


def test_orders():
    settings = TrainConfig(epochs=2.0, batch_blocks=50, accumulate=1)
    first, second = plan_steps(50, settings, 0)
    assert not np.array_equal(first, second) and not np.array_equal(first, np.arange(50))
    assert not np.array_equal(plan_steps(50, settings, 1)[0], first)


def test_exact_number_of_steps():
    settings = TrainConfig(steps=7, epochs=1.0, batch_blocks=2, accumulate=2)
    plan = plan_steps(5, settings, 0)
    assert [len(numbers) for numbers in plan] == [4] * 7
    assert sorted(np.concatenate(plan)[:25].tolist()) == sorted(list(range(5)) * 5)
    assert plan_steps(0, settings, 0) == []


# ------------------------------------------------------------------------------------------- the schedule


def factors(n_steps, **settings):
    settings = TrainConfig(**settings)
    return [schedule_factor(step, n_steps, settings) for step in range(1, n_steps + 1)]


def test_schedules():
    assert factors(4, schedule="linear") == pytest.approx([1, 0.75, 0.5, 0.25])
    assert factors(4, schedule="constant") == [1, 1, 1, 1]
    cosine = [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert factors(4, schedule="cosine") == pytest.approx(cosine)
    assert factors(1, schedule="linear") == factors(1, schedule="cosine") == [1]
    assert factors(4, schedule="linear", final_lr_share=0.5) == pytest.approx([1, 0.875, 0.75, 0.625])
    assert factors(4, schedule="constant", final_lr_share=0.5) == [1, 1, 1, 1]
    with pytest.raises(UserError, match="train.final_lr_share: 1.5 is no share"):
        factors(4, schedule="linear", final_lr_share=1.5)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_warm_up(schedule):
    with_warm_up = factors(7, schedule=schedule, warmup_steps=3)
    assert with_warm_up[:3] == pytest.approx([0.25, 0.5, 0.75])
    assert with_warm_up[3:] == pytest.approx(factors(4, schedule=schedule))
    assert factors(2, schedule=schedule, warmup_steps=3) == pytest.approx([0.25, 0.5])


def test_the_schedule_reaches_the_optimizer():
    """With a learning rate of (nearly) 0 in the first step, nothing moves."""
    _, parameters = run(steps=1, lr=1e-30)
    assert unchanged(parameters)
    records, _ = run(steps=4, schedule="linear", warmup_steps=1)
    assert [r.lr for r in records] == pytest.approx([5e-4, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    assert [r.tokens for r in records[:1]] == [80] and all(r.seconds >= 0 for r in records)
