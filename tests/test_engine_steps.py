"""The steps of a training: what they refuse, which blocks they hold, their learning rate, and how little they
ask the device."""

import gc
import itertools
import math
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import (
    CONTEXT,
    CPU,
    DEFAULTS,
    corpus,
    fit,
    label_objective,
    run,
    take,
    tiny_model,
    unchanged,
)

from whp_fast import garbage, microbatches
from whp_fast.config import TrainConfig
from whp_fast.corpus import Blocks
from whp_fast.engine import plan_steps, schedule_factor, train
from whp_fast.errors import UserError
from whp_fast.garbage import collected_between_steps
from whp_fast.microbatches import AHEAD, MicroBatches
from whp_fast.objectives import LabelTargets, Objective
from whp_fast.processes import Processes

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
        fit(
            take(model, **settings),
            [label_objective((blocks, labels))],
            after_step=after_step,
            done=done,
            **settings,
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


# ------------------------------------------------------------------------------- what the device is asked for


def events_of_a_step(batch_blocks, accumulate, kind):
    """How often each operator ran in a training of one step, those inside other operators too."""
    settings = dict(steps=1, batch_blocks=batch_blocks, accumulate=accumulate)
    model = tiny_model()
    trainee = take(model, {"weights": "bfloat16"}, torch.bfloat16) if kind == "bfloat16" else take(model)
    objectives = [label_objective(corpus(n_blocks=9, short=10))]
    if kind == "next tokens":
        blocks, _ = corpus(n_blocks=9, short=10)
        objectives = [Objective(blocks, LabelTargets(blocks, None))]
    with torch.profiler.profile() as profile:
        fit(trainee, objectives, **settings)
    return {event.key: event.count for event in profile.key_averages()}


@pytest.mark.parametrize("kind", ["labels", "next tokens", "bfloat16"])
def test_no_micro_batch_waits_for_the_device(kind):
    """What reads a value, or needs one to know a size, runs as often for four micro-batches as for one."""
    once, often = (events_of_a_step(8 // n, n, kind) for n in (1, 4))
    waiting = [
        f"aten::{n}" for n in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select")
    ]
    assert [often.get(name, 0) for name in waiting] == [once.get(name, 0) for name in waiting]
    assert once["whp_kernels::linear_sum"] == 1 and often["whp_kernels::linear_sum"] == 4


def test_the_loss_of_a_step_is_read_once(monkeypatch):
    """Loss and norm of a step come together; nothing else of it becomes a Python number."""
    read = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.append(self.shape) or tolist(self))
    for name in ("item", "__float__", "__bool__", "__int__"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, name=name, plain=plain: read.append(name) or plain(self)
        )
    numbers = []
    for accumulate in (1, 4):
        read.clear()
        how = dict(steps=2, batch_blocks=8 // accumulate, accumulate=accumulate)
        fit(take(tiny_model()), [label_objective()], **how)
        numbers.append(list(read))
    assert numbers[0] == numbers[1] and numbers[0].count((2,)) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_no_micro_batch_waits_for_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())

    def waits(accumulate):
        settings = TrainConfig(**{**DEFAULTS, "batch_blocks": 8 // accumulate, "accumulate": accumulate})
        trainee = take(tiny_model().to(device), {"weights": "bfloat16"}, torch.bfloat16)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                train(trainee, [label_objective()], settings, seed=5, device=device)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return [str(w.message) for w in caught if "synchron" in str(w.message)]

    for accumulate in (1, 4):
        waits(accumulate)  # kernels are compiled
    once, often = waits(1), waits(4)
    assert len(once) == len(often), (once, often)


# ----------------------------------------------------------------------------------- what is prepared ahead


def feed(objectives, plan, **changes):
    how = dict(first=1, seed=5, size=2, processes=Processes(), device=CPU)
    return MicroBatches(objectives, plan, **{**how, **changes})


@pytest.mark.parametrize("processes", [Processes(), Processes(0, 3), Processes(2, 3)], ids=str)
def test_micro_batches_are_the_blocks_of_the_plan(processes):
    blocks, labels = corpus()
    plan = [np.array([3, 8, 0, 5]), np.array([1])]
    second = label_objective(corpus(n_blocks=3, short=2, seed=1))
    with feed([label_objective((blocks, labels)), second], plan, processes=processes) as batches:
        for step, numbers in enumerate(plan, 1):
            held = batches.step()
            others = microbatches.numbers_of_step([None, second], numbers, step, 5)[1]
            assert held.trained == tuple(
                label_objective(data).targets.count(n)
                for data, n in (((blocks, labels), numbers), (corpus(n_blocks=3, short=2, seed=1), others))
            )
            expected = sum(len(blocks[n]) for n in numbers) + sum(len(second.blocks[n]) for n in others)
            assert held.tokens == expected
            taken = [batches.next() for _ in range(held.batches)]
            for k, (of, own) in enumerate(((blocks, numbers), (second.blocks, others))):
                mine = own[processes.rank :: processes.world_size]
                parts = [batch for batch in taken if batch.objective == k]
                assert len(parts) == math.ceil(math.ceil(len(own) / processes.world_size) / 2)
                with_labels = [batch for batch in parts if batch.prepared is not None]
                ids = torch.cat([batch.input_ids for batch in with_labels]) if with_labels else []
                assert list(ids) == list(itertools.chain(*(of[n] for n in mine)))
                for batch in parts[len(with_labels) :]:  # computes along
                    assert batch.input_ids.tolist() == of[own[0]].tolist()
    assert "micro-batches" not in [thread.name for thread in threading.enumerate()]


def test_a_few_are_ready_and_no_more(monkeypatch):
    prepared, (blocks, labels) = [], corpus()
    targets = LabelTargets(blocks, labels)
    prepare = targets.prepare
    monkeypatch.setattr(targets, "prepare", lambda numbers: prepared.append(len(numbers)) or prepare(numbers))
    with feed([Objective(blocks, targets)], [np.arange(8)] * 3, size=1) as batches:
        until = time.monotonic() + 5
        while len(prepared) < AHEAD and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(prepared) == AHEAD  # the step itself, and one; another waits for room
        assert batches.step().batches == 8 and batches.waited >= 0


def test_what_fails_on_the_thread_is_told_in_the_loop():
    blocks, labels = corpus()

    class Damaged(LabelTargets):
        def prepare(self, numbers):
            if len(seen) == 3:
                raise UserError("base.rows: chunk 0 is damaged.")
            seen.append(1)
            return super().prepare(numbers)

    seen, done = [], []
    with pytest.raises(UserError, match="chunk 0 is damaged"):
        fit(take(tiny_model()), [Objective(blocks, Damaged(blocks, labels))], done=done)
    assert len(done) == 1 and "micro-batches" not in [thread.name for thread in threading.enumerate()]


# --------------------------------------------------------------------------------- the garbage collector


def test_garbage_is_collected_between_steps():
    found = []

    def note(phase, info):
        if phase == "start":
            found.append(info["generation"])

    gc.callbacks.append(note)
    try:
        with collected_between_steps(7, every=3) as after_step:
            assert not gc.isenabled() and gc.get_freeze_count() > 0 and found == [2]
            for _ in range(7):
                _ = [[] for _ in range(5000)]
                after_step()
            inside = list(found)
    finally:
        gc.callbacks.remove(note)
    assert inside == [2, 2, 2] and gc.isenabled() and gc.get_freeze_count() == 0


def test_the_collector_is_as_it_was_after_an_error(monkeypatch):
    monkeypatch.setattr(garbage.collected_between_steps.__wrapped__, "__defaults__", (1,))
    seen = []

    def fail(step):
        seen.append(gc.isenabled())
        if step == 2:
            raise KeyError

    with pytest.raises(KeyError):
        fit(take(tiny_model()), [label_objective()], after_step=fail)
    assert seen == [True, False, False] and gc.isenabled() and gc.get_freeze_count() == 0


def test_a_short_training_and_a_collector_that_is_off_are_left_alone():
    with collected_between_steps(2, every=3) as after_step:
        assert gc.isenabled() and gc.get_freeze_count() == 0
        after_step()
    gc.disable()
    try:
        with collected_between_steps(9, every=3):
            assert gc.get_freeze_count() == 0
        assert not gc.isenabled()
    finally:
        gc.enable()
