"""One training loop for both trainings: the reinforced model, and the unlearned one.

The weights are an exact float32 master; matrix products run in ``compute_dtype`` under autocast. The loss of
a step is the sum over its trained positions divided by their number, over all accumulated micro-batches
together, so masking and accumulation never change it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from whp_kernels.losses import IGNORE_INDEX, linear_combination_loss

from whp_fast.config import TrainConfig
from whp_fast.corpus import Blocks
from whp_fast.errors import UserError
from whp_fast.model import Llama


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as it stands in the log.

    Attributes:
        step: counted from 1.
        loss: mean over the trained positions of the step, nats.
        grad_norm: before clipping.
        lr: learning rate of the step.
        trained: positions with a label.
        tokens: tokens read.
        seconds: wall time of the step.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    trained: int
    tokens: int
    seconds: float


def train(
    model: Llama,
    blocks: Blocks,
    labels: np.ndarray | None,
    settings: TrainConfig,
    *,
    seed: int,
    device: torch.device,
    compute_dtype: torch.dtype,
    on_step: Callable[[StepRecord], None] = lambda record: None,
    after_step: Callable[[int], None] = lambda step: None,
) -> int:
    """Train the model in place.

    Args:
        model: float32 parameters, already on ``device``.
        blocks: the original blocks.
        labels: integer array over the token stream, -100 where untrained; None for next-token prediction.
        settings: see :class:`whp_fast.config.TrainConfig`.
        seed: of the order of blocks.
        compute_dtype: dtype of matrix products and activations.
        on_step: called with each step's record.
        after_step: called with the step's number after each update, and with 0 before the first.

    Returns:
        the number of steps.

    Raises:
        UserError: no position to train, or a loss or gradient that is not finite; the update is not made
        then.
    """
    _refuse_nothing_to_train(blocks, labels, settings)
    plan = plan_steps(len(blocks), settings, seed)
    n_steps = len(plan)
    optimizer = _optimizer(model, settings)
    model.train()
    after_step(0)
    for step, numbers in enumerate(plan, start=1):
        began = time.monotonic()
        lr = settings.lr * schedule_factor(step, n_steps, settings)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batches = list(_micro_batches(blocks, labels, numbers, settings.batch_blocks))
        trained = sum(int((y != IGNORE_INDEX).sum()) for _, y in batches)
        tokens = sum(len(blocks[int(number)]) for number in numbers)
        if trained == 0:  # a step of fully masked blocks, or of a last block of one token: no update
            on_step(StepRecord(step, 0.0, 0.0, lr, 0, tokens, time.monotonic() - began))
            after_step(step)
            continue
        total = torch.zeros((), device=device)
        for input_ids, targets in batches:
            input_ids, targets = input_ids.to(device), targets.to(device)
            with torch.autocast(device.type, dtype=compute_dtype, enabled=compute_dtype != torch.float32):
                hidden = model.hidden_states(input_ids)
            loss = linear_combination_loss(
                hidden,
                model.lm_head_weight,
                targets,
                num_items_in_batch=trained,
                ignore_index=IGNORE_INDEX,
                compute_dtype=compute_dtype,
                chunk_mib=settings.loss_chunk_mib,
            )
            loss.backward()
            total += loss.detach()
        limit = settings.clip_grad_norm if settings.clip_grad_norm > 0 else math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        loss_value, norm_value = float(total), float(grad_norm)
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise UserError(
                f"{settings.name}: the loss ({loss_value}) or gradient norm ({norm_value}) of step {step} is "
                "not finite; "
                "the update was not made, lower the learning rate or check the model's weights."
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # evaluation and saving need not live beside gradients
        on_step(StepRecord(step, loss_value, norm_value, lr, trained, tokens, time.monotonic() - began))
        after_step(step)
    return n_steps


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


def _refuse_nothing_to_train(blocks: Blocks, labels: np.ndarray | None, settings: TrainConfig) -> None:
    if labels is None:
        anything = blocks.n_tokens > 1
    else:
        pieces = range(0, len(labels), 1 << 20)
        anything = any((labels[i : i + (1 << 20)] != IGNORE_INDEX).any() for i in pieces)
    if not anything:
        raise UserError(
            f"{settings.name}: no position of the corpus has a label, so there is nothing to train; use a "
            "longer "
            "corpus, or see statistics.json of the label stage for what masks it."
        )


def _optimizer(model: Llama, settings: TrainConfig) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]  # norms and biases: decay would only shift them
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    betas, decay = tuple(settings.betas), settings.weight_decay
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, weight_decay=decay, fused=True)


def _micro_batches(blocks, labels, numbers, size) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (input_ids, targets) int64 [b, T]; short blocks are padded on the right, where no label is."""
    for first in range(0, len(numbers), size):
        rows = numbers[first : first + size]
        longest = max(len(blocks[int(b)]) for b in rows)
        input_ids = np.zeros((len(rows), longest), dtype=np.int64)
        targets = np.full((len(rows), longest), IGNORE_INDEX, dtype=np.int64)
        for k, number in enumerate(rows):
            block = blocks[int(number)]
            input_ids[k, : len(block)] = block
            if labels is None:
                targets[k, : len(block) - 1] = block[1:]
            else:
                start = int(number) * blocks.context
                targets[k, : len(block)] = labels[start : start + len(block)]
        yield torch.from_numpy(input_ids), torch.from_numpy(targets)
