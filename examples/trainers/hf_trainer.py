"""whp_kernels in the Trainer of Hugging Face: `python examples/trainers/hf_trainer.py`.

    labels         Trainer(compute_loss_func=label_loss); the generic labels of WHP are labels too, made once
                   before the training (generic_labels_of)
    soft targets   WhpTrainer, which computes the teachers' logits: compute_loss_func sees no inputs

Both divide by `num_items_in_batch`, the trained tokens of all accumulated micro-batches, so that
accumulation equals one large batch. The losses here start from logits, whatever model and wrapper (DDP,
FSDP) they come from. Without logits, and without their rounding in bfloat16: trl_sft.py and
open_unlearning.py.
"""

import copy
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # this example needs nothing from the Hub

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from whp_kernels import Whp, combination_loss, generic_labels


def label_loss(outputs, labels, num_items_in_batch=None):
    """Cross-entropy for `Trainer(compute_loss_func=...)`. In training the gradient takes the memory of the
    logits, which are lost; evaluation leaves them alone."""
    return combination_loss(
        outputs.logits, labels, shift_labels=True, num_items_in_batch=num_items_in_batch, inplace=True
    )


@torch.no_grad()
def generic_labels_of(base, reinforced, inputs, alpha=5.0):
    """The hard labels of WHP [B, T], aligned with `input_ids` as Trainer expects; -100 stays -100.

    From hidden states and heads: logits rounded to bfloat16 would give other labels at 2-5 % of the tokens.
    """
    batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    taught = generic_labels(
        base.get_decoder()(**batch).last_hidden_state,
        reinforced.get_decoder()(**batch).last_hidden_state,
        alpha,
        base_head=base.get_output_embeddings().weight,
        reinforced_head=reinforced.get_output_embeddings().weight,
    )
    labels = inputs["labels"].clone()
    # what position t is taught stands at t + 1
    labels[:, 1:] = torch.where(labels[:, 1:] == -100, -100, taught[:, :-1])
    return labels


class WhpTrainer(Trainer):
    """Trainer whose target is a combination of frozen teachers; `labels` only say which tokens are trained.

    Args beyond those of Trainer:
        teachers: causal language models with the student's vocabulary, in the order of the combination.
        combination, divergence: as in `whp_kernels.combination_loss`.
    """

    def __init__(self, *args, teachers, combination, divergence="forward_kl", **kwargs):
        super().__init__(*args, compute_loss_func=self.combination_loss, **kwargs)
        self.teachers = [teacher.eval().to(self.args.device) for teacher in teachers]
        self.choices = {"combination": combination, "divergence": divergence}

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.teacher_inputs = {name: value for name, value in inputs.items() if name != "labels"}
        return super().compute_loss(model, inputs, *args, **kwargs)  # calls combination_loss below

    def combination_loss(self, outputs, labels, num_items_in_batch=None):
        with torch.no_grad():
            teachers = [teacher(**self.teacher_inputs, use_cache=False).logits for teacher in self.teachers]
        return combination_loss(
            outputs.logits,
            labels,
            teachers=teachers,
            shift_labels=True,
            num_items_in_batch=num_items_in_batch,
            inplace=True,
            **self.choices,
        )


# --------------------------------------------------------------------------------- a run on invented text


def tiny_model(seed=0, vocabulary=64):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def tiny_text(rows=16, length=24, vocabulary=64, seed=0):
    """Rows of token ids in which each token follows from the one before, and a prompt that is not trained."""
    generator = torch.Generator().manual_seed(seed)
    follows = torch.randperm(vocabulary, generator=generator)
    tokens = [torch.randint(0, vocabulary, (rows,), generator=generator)]
    for _ in range(length - 1):
        tokens.append(follows[tokens[-1]])
    input_ids = torch.stack(tokens, dim=1)
    labels = input_ids.clone()
    labels[:, :4] = -100
    return [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": row}
        for ids, row in zip(input_ids, labels)
    ]


def arguments(folder, **changes):
    values = {
        "output_dir": folder,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 20,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**values | changes)


def run(what, trainer):
    """Train, and tell the mean loss of the first and of the last three steps."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
    print(f"{what:<58} loss {first:.3f} -> {last:.3f}")
    return first, last


def main():
    text = tiny_text()
    base = tiny_model()
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder)
        reinforced = copy.deepcopy(base)
        results = [
            run(
                "reinforced model: cross-entropy with the text",
                Trainer(reinforced, args, train_dataset=text, compute_loss_func=label_loss),
            )
        ]
        base.to(args.device), reinforced.to(args.device)
        generic = []
        for row in text:
            batch = {name: value.unsqueeze(0).to(args.device) for name, value in row.items()}
            generic.append({**row, "labels": generic_labels_of(base, reinforced, batch)[0].cpu()})
        hard = Trainer(copy.deepcopy(base), args, train_dataset=generic, compute_loss_func=label_loss)
        results.append(run("WHP, hard: cross-entropy with generic labels", hard))
        for divergence in ("forward_kl", "reverse_kl"):
            soft = WhpTrainer(
                copy.deepcopy(base),
                args,
                train_dataset=text,
                teachers=(base, reinforced),
                combination=Whp(5.0),
                divergence=divergence,
            )
            results.append(run(f"WHP, soft: {divergence} to base - 5 relu(reinforced - base)", soft))
    return results


if __name__ == "__main__":
    main()
