"""A training so small that a step takes milliseconds: a model of width 16 on nine blocks of ten tokens."""

import numpy as np
import torch

from whp_fast.config import MemoryConfig, TrainConfig
from whp_fast.corpus import Blocks
from whp_fast.engine import train
from whp_fast.model import Llama, LlamaConfig
from whp_fast.objectives import LabelTargets, Objective
from whp_fast.trainee import Trainee

VOCAB, CONTEXT = 29, 10
DEFAULTS = dict(lr=1e-3, batch_blocks=4, accumulate=2, steps=3, schedule="constant", clip_grad_norm=0.0)
CPU = torch.device("cpu")


def tiny_model(seed=0, **changes):
    """Width 16; ``changes`` are fields of its config."""
    config = dict(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    model = Llama(LlamaConfig(**{**config, **changes}))
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


def label_objective(data=None, weight=1.0):
    """The objective of labels; ``data`` is (blocks, labels)."""
    blocks, labels = data or corpus()
    return Objective(blocks, LabelTargets(blocks, labels), weight)


def fit(trainee, objectives, seed=5, done=None, **settings):
    """Records of a training with the settings above but for those that are given; a few name arguments of
    ``train`` itself. ``done``: a list that takes the records, for a training that fails."""
    own = {key: settings.pop(key) for key in ("processes", "keeping", "after_step") if key in settings}
    records = [] if done is None else done
    train(
        trainee,
        objectives,
        TrainConfig(**{**DEFAULTS, **settings}),
        seed=seed,
        device=CPU,
        on_step=records.append,
        **own,
    )
    return records


def take(model, memory=None, dtype=torch.float32, **settings):
    """A trainee of a model in this process."""
    memory = MemoryConfig(**(memory or {}))
    return Trainee.from_model(model, TrainConfig(**{**DEFAULTS, **settings}), memory, compute_dtype=dtype)


def masters(trainee):
    """Name -> exact float32 weights, copies."""
    return {name: make().detach().clone() for name, make in trainee.masters().items()}


def run(model=None, data=None, labels="own", seed=5, dtype=torch.float32, look=None, memory=None, **settings):
    """(records, exact weights) after training."""
    blocks, own = data or corpus()
    after = []
    trainee = take(model or tiny_model(), memory, dtype, **settings)
    records = fit(
        trainee,
        [label_objective((blocks, own if isinstance(labels, str) else labels))],
        seed=seed,
        after_step=lambda step: (after.append(step), look and look(step)),
        **settings,
    )
    assert after == list(range(len(records) + 1)) and [r.step for r in records] == after[1:]
    return records, masters(trainee)


def unchanged(parameters):
    """Whether these are the parameters of the model before any training."""
    return all(torch.equal(p, parameters[name]) for name, p in tiny_model().named_parameters())
