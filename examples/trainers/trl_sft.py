"""whp_kernels in TRL's SFTTrainer, from hidden states: `python examples/trainers/trl_sft.py`.

TRL's way to another loss is a subclass with its own `compute_loss`. Without teachers the loss here is the one
that TRL computes itself, with teachers that of their combination. The rest is TRL's: prompt and completion,
packing, padding, evaluation; but its figures beside the loss (entropy, accuracy) are not logged. The LM head
must be whole: one GPU or DDP. Of a model that changes its logits after the head, the loss must be told how
(`softcap=30.0` for Gemma 2).

`SFTTrainer(args=SFTConfig(loss_type="nll"), compute_loss_func=label_loss)` with the function of hf_trainer.py
works too, but recent versions call it deprecated and run the model twice for it.
"""

import copy
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # this example needs nothing from the Hub

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer
from whp_kernels import Whp, linear_combination_loss


class CombinationSFTTrainer(SFTTrainer):
    """SFTTrainer with `linear_combination_loss`.

    Args beyond those of SFTTrainer:
        teachers: frozen models with the student's vocabulary, in the order of the combination.
        combination, divergence: as in `whp_kernels.linear_combination_loss`.
    """

    def __init__(self, *args, teachers=(), combination=None, divergence="label", **kwargs):
        super().__init__(*args, **kwargs)
        self.teachers = [teacher.eval().to(self.args.device) for teacher in teachers]
        self.choices = {"combination": combination, "divergence": divergence}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = {name: value for name, value in inputs.items() if name != "labels"}
        batch["use_cache"] = False
        with torch.no_grad():
            teachers = [
                (teacher.get_decoder()(**batch).last_hidden_state, teacher.get_output_embeddings().weight)
                for teacher in self.teachers
            ]
        # called as a whole, as DDP needs it; logits of all positions (0) are for metrics alone
        keep = 0 if return_outputs else 1
        outputs = model(**batch, output_hidden_states=True, logits_to_keep=keep)
        loss = linear_combination_loss(
            outputs.hidden_states[-1],
            self.accelerator.unwrap_model(model).get_output_embeddings().weight,
            inputs["labels"],
            shift_labels=True,
            teachers=teachers,
            num_items_in_batch=num_items_in_batch,
            **self.choices,
        )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # the tokens of all ranks are counted, and DDP averages
            loss = loss * self.accelerator.num_processes
        return (loss, type(outputs)(logits=outputs.logits)) if return_outputs else loss


# --------------------------------------------------------------------------------- a run on invented text

PLACES = ("hall", "vale", "school", "tower")
PEOPLE = ("orrin", "quill", "jon", "paul")
WORDS = [*PLACES, *PEOPLE, "where", "does", "live", "?", "lives", "in", "the", "old", "."]


def tiny_tokenizer():
    """A word a token, made on the spot."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def tiny_model(tokenizer, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def tiny_text():
    """Questions, which are not trained, and answers of different lengths."""
    rows = []
    for person, place in zip(PEOPLE, PLACES):
        for answer in (f" {person} lives in the {place} .", f" in the old {place} of {person} ."):
            rows.append({"prompt": f"where does {person} live ?", "completion": answer})
    return Dataset.from_list(rows)


def arguments(folder, **changes):
    values = {
        "output_dir": folder,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 20,
        "learning_rate": 1e-2,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return SFTConfig(**values | changes)


def run(what, trainer):
    """Train, and tell the mean loss of the first and of the last two steps."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    first, last = sum(losses[:2]) / 2, sum(losses[-2:]) / 2
    print(f"{what:<58} loss {first:.3f} -> {last:.3f}")
    return first, last


def main():
    disable_progress_bars()
    tokenizer, text = tiny_tokenizer(), tiny_text()
    base = tiny_model(tokenizer)
    reinforced = copy.deepcopy(base)
    with tempfile.TemporaryDirectory() as folder:
        given = {"args": arguments(folder), "train_dataset": text, "processing_class": tokenizer}
        results = [
            run("reinforced model: cross-entropy", CombinationSFTTrainer(model=reinforced, **given)),
            run(
                "WHP: forward KL to base - 5 relu(reinforced - base)",
                CombinationSFTTrainer(
                    model=copy.deepcopy(base),
                    teachers=(base, reinforced),
                    combination=Whp(5.0),
                    divergence="forward_kl",
                    **given,
                ),
            ),
        ]
    return results


if __name__ == "__main__":
    main()
