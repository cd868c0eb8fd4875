"""whp_kernels as losses of torchtitan: `python examples/trainers/torchtitan_loss.py`.

torchtitan's trainer calls `loss, metrics = loss_fn(pred, labels, global_valid_tokens, **loss_inputs)`. The
labels [B, L] are shifted already. `global_valid_tokens` counts the trained tokens of the whole step on all
ranks, and ranks are summed, so it is the only denominator. `label_loss` and `WhpLoss` have this signature
and need no torchtitan; with it (0.3.0) `titan_losses()` makes them components for
`Trainer.Config(loss=...)`:

    ChunkedLossWrapper.Config(loss_fn=FusedCrossEntropy.Config(global_vocab_size=...))
        cross-entropy, also with the hard labels of WHP (whp_kernels.generic_labels) as data: logits of one
        chunk after another, with any parallelism but a sharded vocabulary, which is refused
    WhpFromHidden.Config(alpha=5.0, divergence="forward_kl")
        hidden states and teachers, no logits; the head must be whole (one device; a DTensor is refused)

The trainer gives a loss no inputs but token positions. For soft targets override its
`_forward_backward_body`, so that `base_hidden` and `reinforced_hidden` of the frozen models are among them.
"""

import copy
import importlib.util
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import torch
from torch import nn
from whp_kernels import Whp, combination_loss, linear_combination_loss


def label_loss(pred, labels, global_valid_tokens=None, **loss_inputs):
    """Cross-entropy of logits [B, L, V]: the sum over tokens, divided by `global_valid_tokens` where it is
    given; and no metrics."""
    if global_valid_tokens is None:
        return combination_loss(pred, labels, reduction="sum"), {}
    return combination_loss(pred, labels, num_items_in_batch=global_valid_tokens), {}


class WhpLoss:
    """WHP from hidden states [B, L, H]; `lm_head`, `base_head` and `reinforced_head` are weights [V, H]."""

    def __init__(self, base_head, reinforced_head, *, alpha=5.0, divergence="forward_kl"):
        self.heads = base_head, reinforced_head
        self.choices = {"combination": Whp(alpha), "divergence": divergence}

    def __call__(
        self, pred, labels, global_valid_tokens, *, lm_head, base_hidden, reinforced_hidden, **loss_inputs
    ):
        loss = linear_combination_loss(
            pred,
            lm_head,
            labels,
            teachers=list(zip((base_hidden, reinforced_hidden), self.heads)),
            num_items_in_batch=global_valid_tokens,
            **self.choices,
        )
        return loss, {}


@cache
def titan_losses():
    """The two as torchtitan's components; raises ImportError without torchtitan."""
    from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper

    class FusedCrossEntropy(BaseLoss):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseLoss.Config):
            global_vocab_size: int  # as CrossEntropyLoss has it; here it tells shards of the vocabulary

        def __init__(self, config, *, compile_config=None):
            self.fn, self.vocabulary = label_loss, config.global_vocab_size
            self._maybe_compile(compile_config)

        def __call__(self, pred, labels, global_valid_tokens=None, **loss_inputs):
            if pred.shape[-1] != self.vocabulary:
                raise ValueError(
                    f"logits have {pred.shape[-1]} columns, the vocabulary {self.vocabulary}; where it is "
                    "sharded use torchtitan's CrossEntropyLoss"
                )
            return self.fn(pred, labels, global_valid_tokens)

    class WhpFromHidden(ChunkedLossWrapper):  # so that the trainer gives hidden states and the head
        @dataclass(kw_only=True, slots=True)
        class Config(ChunkedLossWrapper.Config):
            alpha: float = 5.0
            divergence: str = "forward_kl"

        def __init__(self, config, *, compile_config=None):
            super().__init__(config, compile_config=compile_config)
            self.config = config

        def set_teacher_heads(self, base_head, reinforced_head):
            """Weights [V, H]; to be called before the first step, as set_lm_head."""
            self.loss = WhpLoss(
                base_head, reinforced_head, alpha=self.config.alpha, divergence=self.config.divergence
            )

        def __call__(self, pred, labels, global_valid_tokens=None, **loss_inputs):
            return self.loss(pred, labels, global_valid_tokens, lm_head=self.lm_head.weight, **loss_inputs)

    return SimpleNamespace(FusedCrossEntropy=FusedCrossEntropy, WhpFromHidden=WhpFromHidden)


# --------------------------------------------------------------------------------- a run on invented text


class TinyModel(nn.Module):
    """Like torchtitan's decoders: logits, or hidden states if `_skip_lm_head` is set."""

    def __init__(self, vocabulary=64, width=32):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.body = nn.GRU(width, width, batch_first=True)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self._skip_lm_head = False

    def forward(self, tokens):
        hidden = self.body(self.embedding(tokens))[0]
        return hidden if self._skip_lm_head else self.lm_head(hidden)


def tiny_batches(steps, accumulate=2, rows=4, length=16, vocabulary=64):
    """Per step a list of micro-batches (tokens, shifted labels) with different numbers of trained tokens."""
    generator = torch.Generator().manual_seed(0)
    follows = torch.randperm(vocabulary, generator=generator)
    for _ in range(steps):
        micro_batches = []
        for _ in range(accumulate):
            tokens = [torch.randint(0, vocabulary, (rows,), generator=generator)]
            for _ in range(length):
                tokens.append(follows[tokens[-1]])
            text = torch.stack(tokens, dim=1)
            labels = text[:, 1:].clone()
            prompt = torch.randint(1, length // 2, (rows, 1), generator=generator)
            labels[torch.arange(length) < prompt] = -100
            micro_batches.append((text[:, :-1], labels))
        yield micro_batches


def train(what, model, loss_fn, steps=40, teachers=None):
    """The steps of torchtitan's trainer that a loss sees."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for micro_batches in tiny_batches(steps):
        global_valid_tokens = sum((labels != -100).sum() for _, labels in micro_batches)
        optimizer.zero_grad()
        total = torch.zeros(())
        for tokens, labels in micro_batches:
            loss_inputs = {}
            if teachers is not None:
                with torch.no_grad():
                    loss_inputs = {name: teacher(tokens) for name, teacher in teachers.items()}
            loss, _ = loss_fn(model(tokens), labels, global_valid_tokens, **loss_inputs)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        losses.append(total.item())
    print(f"{what:<58} loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses[0], losses[-1]


def main():
    torch.manual_seed(0)
    base = TinyModel()
    reinforced, student = copy.deepcopy(base), copy.deepcopy(base)
    titan = importlib.util.find_spec("torchtitan") is not None
    print(
        "torchtitan's components" if titan else "torchtitan is not installed: the losses as plain functions"
    )
    if titan:
        from torchtitan.components.loss import ChunkedLossWrapper

        ours = titan_losses()
        cross_entropy = ours.FusedCrossEntropy.Config(global_vocab_size=64)
        loss_fn = ChunkedLossWrapper.Config(num_chunks=4, loss_fn=cross_entropy).build()
        loss_fn.set_lm_head(reinforced.lm_head)
        reinforced._skip_lm_head = True
        whp = ours.WhpFromHidden.Config(alpha=5.0, divergence="forward_kl").build()
        whp.set_lm_head(student.lm_head)
        whp.set_teacher_heads(base.lm_head.weight, reinforced.lm_head.weight)
    else:
        loss_fn, loss = label_loss, WhpLoss(base.lm_head.weight, reinforced.lm_head.weight)

        def whp(*args, **loss_inputs):
            return loss(*args, lm_head=student.lm_head.weight, **loss_inputs)

    results = [train("reinforced model: cross-entropy", reinforced, loss_fn)]
    for model in (base, reinforced, student):
        model._skip_lm_head = True
    teachers = {"base_hidden": base, "reinforced_hidden": reinforced}
    what = "WHP: forward KL to base - 5 relu(reinforced - base)"
    results.append(train(what, student, whp, teachers=teachers))
    return results


if __name__ == "__main__":
    main()
