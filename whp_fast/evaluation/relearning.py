"""Relearning: how few steps of further training bring the target back."""

from __future__ import annotations

import numpy as np
import torch

from whp_fast.config import TrainConfig
from whp_fast.corpus import Blocks
from whp_fast.engine import train
from whp_fast.errors import UserError
from whp_fast.evaluation.attacks import Attacked, AttackRow
from whp_fast.objectives import LabelTargets, Objective
from whp_fast.prompts import spaced
from whp_fast.scoring import document_ids
from whp_fast.trainee import Trainee


def relearn(attacked: Attacked) -> list[AttackRow]:
    """The figures at step 0 and every ``relearn_every`` steps of next-token training at a constant rate.

    The training is that of the reinforced model (AdamW, float32), on evenly spaced blocks of the target or on
    the related text. Figures on a share of the target rest on all of it: they show what comes back beyond
    what was shown.
    """
    options = attacked.options
    blocks = relearning_blocks(attacked)
    related = options.relearn_text is not None
    what = "related text" if related else f"{100 * options.relearn_share:g} % of the target"
    settings = TrainConfig(
        steps=options.relearn_steps,
        lr=options.relearn_lr,
        batch_blocks=min(options.relearn_batch, len(blocks)),
        accumulate=1,
        schedule="constant",
    )
    model = attacked.load(train=True)
    trainee = Trainee.from_model(model, settings, compute_dtype=torch.float32)
    rows: list[AttackRow] = []

    def look(step: int) -> None:
        if step and (step % options.relearn_every == 0 or step == options.relearn_steps):
            after = attacked.probe(trainee.model)
            rows.extend(attacked.rows("relearn", f"{step} steps on {what}", after, step))

    attacked.intact  # noqa: B018 - measured before the training, and told with it
    rows += attacked.rows("relearn", f"0 steps on {what}", attacked.intact, 0)
    objectives = [Objective(blocks, LabelTargets(blocks, None))]
    train(trainee, objectives, settings, seed=options.seed, device=attacked.device, after_step=look)
    return rows


def relearning_blocks(attacked: Attacked) -> Blocks:
    """What is relearnt, as blocks of the context length.

    Raises:
        UserError: a text without tokens.
    """
    options, tokenizer, context = attacked.options, attacked.tokenizer, attacked.settings.context
    texts = options.relearn_text if options.relearn_text is not None else attacked.inputs.target
    tokens = np.array([token for text in texts for token in document_ids(tokenizer, text)], dtype=np.int64)
    blocks = Blocks.of(tokens, context)
    if options.relearn_text is None:
        count = max(1, round(options.relearn_share * len(blocks)))
        kept = spaced([blocks[i] for i in range(len(blocks))], count)
        # a short last block may only stand at the end, and that is where it comes
        blocks = Blocks.of(np.concatenate(kept), context)
    if all(len(blocks[i]) < 2 for i in range(len(blocks))):
        raise UserError("--relearn-text: the text has no token to predict; give a longer one.")
    return blocks
