"""The three heavy stages of a job as bytes, FLOP and seconds, and the change to make where one does not
fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from whp_kernels.optim.moments import BLOCK

from whp_fast.config import JobConfig, TrainConfig
from whp_fast.errors import UserError
from whp_fast.model_config import LlamaConfig
from whp_fast.plan_gpus import FLOAT32_SHARE, HOST_LINK, Gpu
from whp_fast.plan_memory import label_parts, training_parts
from whp_fast.plan_setup import ITEM, Setup, adapter_weights, numel, parameter_count, projections

STAGES = ("reinforce", "label", "unlearn")
STATIC = ("weights", "adapters", "remainder", "moments", "gradients")
"""The parts that stay from step to step."""

Change = dict[str, object]
"""Settings and their new values ("gpus" is the number of processes)."""


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes.

    Attributes:
        parts: bytes on one GPU at the highest point, by part.
        host: bytes of host memory for offloaded moments, for each GPU.
        tokens: read by the stage, once for each model that runs.
        steps: optimizer steps; 0 in the label stage.
        flops: on all GPUs together.
        seconds: expected; None where the speed of the device is not known.
        capacity: bytes of one GPU.
        changes: what makes it fit, the first to make first; empty where it fits or nothing helps.
    """

    stage: str
    parts: dict[str, int]
    host: int
    tokens: int
    steps: int
    flops: float
    seconds: float | None
    capacity: float
    changes: tuple[Change, ...] = ()

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def static(self) -> int:
        """Weights, adapters, remainder, moments and gradients."""
        return sum(self.parts[name] for name in STATIC)

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity


def plan_job(config: JobConfig, shape: LlamaConfig, tokens: int, gpu: Gpu, gpus: int = 1) -> list[StagePlan]:
    """All three stages, each with the changes it needs.

    Raises:
        UserError: processes that memory.replicas does not divide.
    """
    plans = []
    for stage in STAGES:
        plan = plan_stage(stage, config, shape, tokens, gpu, gpus)
        if not plan.fits:
            plan = dataclasses.replace(plan, changes=find_changes(stage, config, shape, tokens, gpu, gpus))
        plans.append(plan)
    return plans


def plan_stage(
    stage: str, config: JobConfig, shape: LlamaConfig, tokens: int, gpu: Gpu, gpus: int = 1
) -> StagePlan:
    """One stage, without advice.

    Args:
        stage: reinforce, label or unlearn.
        tokens: of the corpus.
        gpus: processes; the blocks of a step are divided among them, a micro-batch stays as it is.

    Raises:
        UserError: processes that memory.replicas does not divide.
    """
    memory = config.memory
    if gpus % memory.replicas:
        raise UserError(
            f"memory.replicas: {gpus} processes do not divide into {memory.replicas} groups; set a divisor "
            f"of {gpus}, or start a multiple of {memory.replicas} processes."
        )
    context = config.data.context
    if stage == "label":
        label = config.label
        parts = label_parts(
            shape,
            memory,
            label.dtype,
            config.model.compute_dtype,
            label.batch_blocks,
            context,
            label.chunk_mib,
            gpus,
        )
        host = parts.pop("host")
        flops = tokens * 2 * forward_flops(shape, context)
        seconds = _label_seconds(config, shape, flops, tokens, gpu, gpus)
        return StagePlan(stage, parts, host, 2 * tokens, 0, flops, seconds, gpu.memory)

    settings: TrainConfig = getattr(config, stage)
    per_step = settings.batch_blocks * settings.accumulate
    if per_step % gpus:
        raise UserError(
            f"{stage}.accumulate: the {per_step} blocks of a step do not divide among {gpus} processes; set "
            "batch_blocks and accumulate so that they do."
        )
    setup = Setup(
        shape,
        memory,
        config.model.compute_dtype,
        min(settings.batch_blocks, per_step // gpus),
        context,
        settings.loss_chunk_mib,
        teachers=_teachers(config) if stage == "unlearn" else 0,
        gpus=gpus,
        cpu=gpu.bfloat16 == 0 and config.run.device == "cpu",
        fp8=config.model.fp8 != "off",
    )
    parts = training_parts(setup)
    host = parts.pop("host")
    steps, read = steps_and_tokens(settings, tokens, context)
    if stage == "unlearn" and config.unlearn.retain:
        read *= 2  # each step reads as many blocks of the text to keep
    flops = read * training_flops(setup)
    seconds = _training_seconds(setup, settings, flops, read, steps, gpu)
    return StagePlan(stage, parts, host, read, steps, flops, seconds, gpu.memory)


def _teachers(config: JobConfig) -> int:
    """Models whose hidden states are the target of the unlearn stage."""
    if config.unlearn.target != "hard":
        return 2
    return 1 if config.unlearn.retain else 0


# Work and time ----------------------------------------------------------------------------------------------


def steps_and_tokens(settings: TrainConfig, tokens: int, context: int) -> tuple[int, int]:
    """(optimizer steps, tokens read) of a training over a corpus of so many tokens."""
    per_step = settings.batch_blocks * settings.accumulate
    blocks = math.ceil(tokens / context)
    visits = settings.steps * per_step if settings.steps else math.ceil(settings.epochs * blocks)
    return math.ceil(visits / per_step), round(visits * tokens / max(blocks, 1))


def forward_flops(shape: LlamaConfig, context: int, head: bool = True) -> float:
    """FLOP for each token: two for each weight of a product, and attention over the places before it."""
    q = shape.num_attention_heads * shape.head_dim
    attention = shape.num_hidden_layers * 2 * context * q  # 4 * context * q, half of it masked
    out = 2 * shape.vocab_size * shape.hidden_size if head else 0
    return 2 * numel(projections(shape)) + attention + out


def training_flops(s: Setup) -> float:
    """FLOP for each token, forward and backward: three forward passes; two under adapters, whose frozen
    weights need no gradient; one more of the blocks with full checkpointing; teachers' heads for soft
    targets."""
    forward = forward_flops(s.shape, s.context)
    passes = 2 if s.lora else 3
    flops = passes * forward + 6 * numel(adapter_weights(s.shape, s.memory))
    if s.memory.checkpointing == "full":
        flops += forward_flops(s.shape, s.context, head=False)
    return flops + s.teachers * 2 * s.shape.vocab_size * s.shape.hidden_size


def _speed(gpu: Gpu, dtype: str) -> float:
    return gpu.float32 * FLOAT32_SHARE if dtype == "float32" else gpu.bfloat16 * gpu.share


def _training_seconds(
    s: Setup, settings: TrainConfig, flops: float, read: int, steps: int, gpu: Gpu
) -> float | None:
    """The longest of arithmetic, memory traffic and traffic between GPUs, and the optimizer behind it."""
    if not gpu.bfloat16:
        return None
    passes = 3 if s.memory.checkpointing == "full" else 2
    micro_batches = read / s.tokens / s.gpus
    c, n = ITEM[s.compute_dtype], parameter_count(s.shape)
    trained = numel(adapter_weights(s.shape, s.memory)) if s.lora else n
    arithmetic = flops / s.gpus / _speed(gpu, s.compute_dtype)
    # Weights are read by each pass (written and read once more where they are dequantised), gradients added
    # up.
    weights = n * c * passes * (2 if s.quantised else 1)
    gradients = trained * (c + 2 * (4 if s.master == "float32" else ITEM[s.memory.gradients]))
    traffic = micro_batches * (weights + gradients) / gpu.bandwidth
    between = 0.0
    if s.sharded:
        gathered = passes * n * c + 4 * trained
        between = micro_batches * gathered * (s.gpus - 1) / s.gpus / gpu.link
    state = trained / s.shards * 20  # read and write weights, remainder, moments and gradients
    update = state / gpu.bandwidth
    if s.memory.offload_moments:
        update += 2 * trained / s.shards * _offloaded(s) / HOST_LINK
    return max(arithmetic, traffic, between) + steps * update


def _offloaded(s: Setup) -> float:
    """Bytes of moments and remainder for each trained weight."""
    moments = {"float32": 8, "bfloat16": 4, "int8": 2 + 8 / BLOCK}[s.memory.moments]
    return moments + (2 if s.master == "bfloat16" else 0)


def _label_seconds(
    config: JobConfig, shape: LlamaConfig, flops: float, tokens: int, gpu: Gpu, gpus: int
) -> float | None:
    if not gpu.bfloat16:
        return None
    s = Setup(shape, config.memory, config.model.compute_dtype, 1, 1)
    dtype = s.outer if config.memory.lora_rank else config.label.dtype
    arithmetic = flops / gpus / _speed(gpu, dtype)
    batches = tokens / (config.label.batch_blocks * config.data.context) / gpus
    read = 2 * parameter_count(shape) * ITEM[dtype]
    between = 0.0
    if config.memory.shard_teachers and gpus > 1:
        between = batches * read * (gpus - 1) / gpus / gpu.link
    return max(arithmetic, batches * read / gpu.bandwidth, between)


# What to change ---------------------------------------------------------------------------------------------


def find_changes(
    stage: str, config: JobConfig, shape: LlamaConfig, tokens: int, gpu: Gpu, gpus: int = 1
) -> tuple[Change, ...]:
    """The changes that make a stage fit, from the harmless to the costly; empty where nothing helps.

    Changes are made one after the other until the stage fits. Then those that turn out not to be needed are
    taken back, the costly ones first, and of those that are left each is made as small as it may be.
    """

    def fits(changes: list[Change]) -> bool:
        try:
            changed, processes = apply_changes(config, gpus, changes)
            return plan_stage(stage, changed, shape, tokens, gpu, processes).fits
        except UserError:  # settings that refuse each other are no way out
            return False

    candidates = list(_candidates(stage, config, gpus))
    made: list[Change] = []
    for change in candidates:
        made = [other for other in made if other.keys() != change.keys()] + [change]
        if fits(made):
            break
    else:
        return ()
    for other in made[-2::-1]:
        fewer = [one for one in made if one is not other]
        made = fewer if fits(fewer) else made
    for i, change in enumerate(made):
        for weaker in candidates[: candidates.index(change)]:
            instead = [*made[:i], weaker, *made[i + 1 :]]
            if weaker.keys() == change.keys() and fits(instead):
                made = instead
                break
    return tuple(made)


def apply_changes(config: JobConfig, gpus: int, changes: list[Change]) -> tuple[JobConfig, int]:
    """The job and the number of processes after some changes."""
    for change in changes:
        for key, value in change.items():
            if key == "gpus":
                gpus = int(value)
                continue
            section, name = key.split(".")
            changed = dataclasses.replace(getattr(config, section), **{name: value})
            config = dataclasses.replace(config, **{section: changed})
    return config, gpus


def _candidates(stage: str, config: JobConfig, gpus: int) -> Iterator[Change]:
    """Single changes, from the harmless to the costly, that are not made yet and that the settings allow."""
    if stage == "label":
        yield from _label_candidates(config, gpus)
        return
    memory, settings = config.memory, getattr(config, stage)
    bfloat16 = config.model.compute_dtype == "bfloat16"
    ours = memory.optimizer == "whp"
    if ours and memory.moments != "int8":
        yield {"memory.moments": "int8"}
    if ours and bfloat16 and memory.gradients == "float32":
        change: Change = {"memory.weights": "bfloat16"} if memory.weights == "float32" else {}
        yield change | {"memory.gradients": "bfloat16"}
    yield from _smaller(stage, settings.batch_blocks, settings.accumulate)
    for kind in ("selective", "full")[("none", "selective", "full").index(memory.checkpointing) :]:
        yield {"memory.checkpointing": kind}
    if settings.loss_chunk_mib > 64:
        yield {f"{stage}.loss_chunk_mib": 64}
    for more in (2, 4, 8):
        if more > gpus and more % memory.replicas == 0 and not memory.lora_rank:
            yield {"gpus": more}
    if ours and not memory.offload_moments:
        yield {"memory.offload_moments": True}
    if not memory.lora_rank:
        yield {"memory.lora_rank": 16}
    if memory.frozen not in ("nf4", "int8"):
        yield {"memory.lora_rank": memory.lora_rank or 16, "memory.frozen": "nf4"}


def _label_candidates(config: JobConfig, gpus: int) -> Iterator[Change]:
    memory, label = config.memory, config.label
    yield from _smaller("label", label.batch_blocks, None)
    if label.chunk_mib > 64:
        yield {"label.chunk_mib": 64}
    if label.dtype == "float32" and not memory.lora_rank:
        yield {"label.dtype": "bfloat16"}
    for more in dict.fromkeys((gpus, 2, 4, 8)):
        if more > 1 and more >= gpus and more % memory.replicas == 0:
            if more > gpus or not memory.shard_teachers:
                yield {"memory.shard_teachers": True} | ({"gpus": more} if more > gpus else {})
    if not memory.lora_rank:
        yield {"memory.lora_rank": 16}
    if memory.frozen not in ("nf4", "int8"):
        yield {"memory.lora_rank": memory.lora_rank or 16, "memory.frozen": "nf4"}


def _smaller(stage: str, blocks: int, accumulate: int | None) -> Iterator[Change]:
    """Halved micro-batches; the batch of a step stays what it is."""
    smaller = blocks
    while smaller % 2 == 0:
        smaller //= 2
        change: Change = {f"{stage}.batch_blocks": smaller}
        if accumulate is not None:
            change[f"{stage}.accumulate"] = accumulate * (blocks // smaller)
        yield change
    if smaller > 1:
        yield {f"{stage}.batch_blocks": 1} | (
            {} if accumulate is None else {f"{stage}.accumulate": accumulate * blocks}
        )
