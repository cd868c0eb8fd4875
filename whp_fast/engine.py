"""One training loop for both trainings: the reinforced model, and the unlearned one.

The loss of a step is the sum over its trained positions divided by their number, over all accumulated
micro-batches and all processes together, so masking, accumulation and the number of processes never change
it. A step's blocks are dealt out to the processes in turn; one that has none left computes along on a block
without labels, because shards are gathered by all or by none.

Nothing is read from the device between the first micro-batch of a step and its end, where loss and norm come
together: until then the host only hands out work, and the device never waits for it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from whp_fast.config import TrainConfig
from whp_fast.errors import UserError
from whp_fast.garbage import collected_between_steps
from whp_fast.microbatches import MicroBatches, makes_an_update
from whp_fast.objectives import Objective
from whp_fast.processes import Processes
from whp_fast.snapshots import Snapshot, Snapshots
from whp_fast.stopping import Stopped, StopRequest
from whp_fast.trainee import Trainee, clip_scale


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as it stands in the log.

    Attributes:
        step: counted from 1.
        loss: mean over the trained positions of the step, nats, weighted objectives added up.
        grad_norm: before clipping.
        lr: learning rate of the step.
        trained: positions with a label.
        tokens: tokens read, of all processes.
        seconds: wall time of the step.
        data_seconds: of these, spent waiting for micro-batches, which are prepared ahead.
        memory_bytes: highest so far: allocated on the GPU, or resident of a process on the CPU.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    trained: int
    tokens: int
    seconds: float
    data_seconds: float = 0.0
    memory_bytes: int = 0


@dataclass
class Keeping:
    """When and where a training is saved, so that it can go on after it was stopped or killed.

    Attributes:
        snapshots: where.
        resumed: the snapshot to go on from, or None.
        minutes, steps: between snapshots; 0: none by this measure.
        state: called for what the caller wants back, as JSON types, when the training goes on.
    """

    snapshots: Snapshots
    resumed: Snapshot | None = None
    minutes: float = 10.0
    steps: int = 0
    state: Callable[[], dict] = dict

    def due(self, step: int, last: float) -> bool:
        by_time = self.minutes and time.monotonic() - last >= 60 * self.minutes
        return bool(by_time or (self.steps and step % self.steps == 0))


def train(
    trainee: Trainee,
    objectives: Sequence[Objective],
    settings: TrainConfig,
    *,
    seed: int,
    device: torch.device,
    processes: Processes | None = None,
    keeping: Keeping | None = None,
    on_step: Callable[[StepRecord], None] = lambda record: None,
    after_step: Callable[[int], None] = lambda step: None,
) -> int:
    """Train the model in place.

    Args:
        trainee: the model with its optimizer.
        objectives: the first one's blocks decide the steps; the others' are drawn beside, as many a step.
        settings: see :class:`whp_fast.config.TrainConfig`.
        seed: of the order of blocks.
        device: of the model.
        processes: the group that trains together; each calls this with the same arguments.
        keeping: snapshots; None: none.
        on_step: called with each step's record, on every process.
        after_step: called with the step's number after each update, and with 0 before the first.

    Returns:
        the number of steps.

    Raises:
        UserError: no position to train, processes that do not divide a step, or a loss or gradient that is
            not finite; the update is not made then, on any process.
        Stopped: a signal asked for it; a snapshot was saved.
    """
    processes = processes or Processes()
    main = objectives[0]
    _refuse_what_cannot_be(main, settings, processes)
    plan = plan_steps(len(main.blocks), settings, seed)
    first = 1
    trainee.model.train()
    resumed = keeping.resumed if keeping is not None else None
    if resumed is not None:  # before anything is gathered: a gathered head is kept until the backward pass
        trainee.restore(resumed)
        first = resumed.step + 1
        resumed.close()
    if trainee.sharded:
        # gathered weights get their memory here: an evaluation would make it of inference tensors, which
        # cannot be trained with
        with torch.no_grad():
            trainee.model.hidden_states(torch.zeros((1, 1), dtype=torch.int64, device=device))
    if resumed is None:
        after_step(0)
    saved, asked = time.monotonic(), StopRequest(tell=processes.first)
    updates = sum(
        makes_an_update(objectives, numbers, step, seed) for step, numbers in enumerate(plan[: first - 1], 1)
    )
    trainee.set_step(updates)
    batches = MicroBatches(
        objectives,
        plan[first - 1 :],
        first=first,
        seed=seed,
        size=settings.batch_blocks,
        processes=processes,
        device=device,
    )
    left = len(plan) + 1 - first
    with asked.awaited(), batches, collected_between_steps(left) as collected:
        for step in range(first, len(plan) + 1):
            began = time.monotonic()
            lr = settings.lr * schedule_factor(step, len(plan), settings)
            record = _step(
                trainee, objectives, batches, settings, step=step, lr=lr, device=device, processes=processes
            )
            record = dataclasses.replace(
                record, seconds=time.monotonic() - began, memory_bytes=_peak_memory(device)
            )
            on_step(record)
            after_step(step)
            collected()
            if keeping is None:
                if asked.asked:
                    raise Stopped
                continue
            wishes = torch.tensor([keeping.due(step, saved), asked.asked], dtype=torch.int64)
            due, stop = (bool(wish) for wish in processes.add(wishes))  # what one wants, all do
            if (due and step < len(plan)) or stop:
                keeping.snapshots.save(step, trainee.rows(), keeping.state(), wait=stop)
                saved = time.monotonic()
            if stop:
                raise Stopped
    if keeping is not None:
        keeping.snapshots.wait()
    return len(plan)


def _step(trainee, objectives, batches, settings, *, step, lr, device, processes) -> StepRecord:
    """One optimizer step: every process's micro-batches, the global norm, the update."""
    waited = batches.waited
    held = batches.step()
    if not any(held.trained):  # a step of fully masked blocks, or of a last block of one token: no update
        return StepRecord(step, 0.0, 0.0, lr, 0, held.tokens, 0.0)
    for group in trainee.optimizer.param_groups:
        group["lr"] = lr
    total = torch.zeros((), dtype=torch.float64, device=device)
    for _ in range(held.batches):
        batch = batches.next()
        objective = objectives[batch.objective]
        with trainee.forward():
            hidden = trainee.model.hidden_states(batch.input_ids, packing=batch.packing)
        head = trainee.model.lm_head_weight
        if batch.prepared is not None:
            loss = objective.weight * objective.targets.loss(
                hidden,
                head,
                batch.prepared,
                num_items_in_batch=held.trained[batch.objective],
                compute_dtype=trainee.compute_dtype,
                chunk_mib=settings.loss_chunk_mib,
            )
        else:
            loss = 0.0 * (hidden.float().sum() + head[:1].float().sum())
        loss.backward()
        total += loss.detach()
    total, norm = processes.add(total), trainee.gradient_norm()
    loss, norm = torch.stack((total, norm.to(total))).tolist()  # the one read of a step
    if not (math.isfinite(loss) and math.isfinite(norm)):
        trainee.drop_gradients()
        raise UserError(
            f"{settings.name}: the loss ({loss}) or gradient norm ({norm}) of step {step} is not finite; the "
            "update was not made, lower the learning rate or check the model's weights."
        )
    trainee.update(clip_scale(norm, settings.clip_grad_norm))
    return StepRecord(
        step, loss, norm, lr, sum(held.trained), held.tokens, 0.0, data_seconds=batches.waited - waited
    )


def plan_steps(n_blocks: int, settings: TrainConfig, seed: int) -> list[np.ndarray]:
    """The block numbers of every step: each epoch visits all blocks once, in an order of its own.

    With ``settings.steps`` the number of steps is exact and epochs follow; else the last step takes what is
    left.
    """
    per_step = settings.batch_blocks * settings.accumulate
    total = settings.steps * per_step if settings.steps else math.ceil(settings.epochs * n_blocks)
    if n_blocks == 0 or total == 0:
        return []
    epochs = math.ceil(total / n_blocks)
    order = np.concatenate(
        [np.random.default_rng([seed, epoch]).permutation(n_blocks) for epoch in range(epochs)]
    )
    return [order[i : min(i + per_step, total)] for i in range(0, total, per_step)]


def schedule_factor(step: int, n_steps: int, settings: TrainConfig) -> float:
    """Share of the learning rate at a step (counted from 1): warm-up, then constant, linear or cosine decay.

    The linear schedule is that of the reference fine-tuning: it would reach zero one step after the last.
    """
    if step <= settings.warmup_steps:
        return step / (settings.warmup_steps + 1)
    progress = (step - 1 - settings.warmup_steps) / max(1, n_steps - settings.warmup_steps)
    if settings.schedule == "constant":
        return 1.0
    falling = 1.0 - progress if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.final_lr_share + (1.0 - settings.final_lr_share) * falling


def _refuse_what_cannot_be(main: Objective, settings: TrainConfig, processes: Processes) -> None:
    per_step = settings.batch_blocks * settings.accumulate
    if per_step % processes.world_size:
        raise UserError(
            f"{settings.name}.accumulate: the {per_step} blocks of a step do not divide among "
            f"{processes.world_size} processes; set batch_blocks and accumulate so that they do."
        )
    if all(main.targets.count(np.arange(i, i + 1)) == 0 for i in range(len(main.blocks))):
        raise UserError(
            f"{settings.name}: no position of the corpus has a label, so there is nothing to train; use a "
            "longer corpus, or see statistics.json of the label stage for what masks it."
        )


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
