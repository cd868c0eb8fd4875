"""Trainers of the shape of OpenUnlearning, from hidden states: `python examples/trainers/open_unlearning.py`.

OpenUnlearning (github.com/locuslab/open-unlearning) trains on batches `{"forget": {...}, "retain": {...}}`;
a method is a Trainer with its own `compute_loss`. Here a method is `forget_loss`, and no logits of a batch
are stored:

    loss = gamma * forget + alpha * retain     retain: CE ("NLL") or KL(p_ref, p) ("KL") of the retain set

    GradDiff   -CE                                                 arXiv 2401.06121
    NPO        -(2 / beta) mean log sigmoid(beta (NLL - NLL_ref))  arXiv 2404.05868, NLL of a sequence
    UNDIAL     CE(softmax(v_ref - beta onehot(label)), p)          arXiv 2402.10052
    WHP        CE(argmax t, p), KL(p_t, p) or KL(p, p_t)           arXiv 2310.02238, 2406.01983
               with t = v_ref - whp_alpha * relu(v_reinforced - v_ref)

Means are over the trained tokens of a micro-batch: prompt and padding (-100) neither count nor teach, in
UNDIAL and the KL too. The LM head must be whole: one GPU or DDP. Of a sharded one (ZeRO-3, FSDP) the losses
raise, and `combination_loss` from logits is the way, as in hf_trainer.py. Of a model that changes its logits
after the head, the losses must be told how (`softcap=30.0` for Gemma 2).
"""

import copy
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # this example needs nothing from the Hub

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from whp_kernels import RowEdits, Whp, linear_combination_loss, npo_loss


class UnlearnTrainer(Trainer):
    """gamma * forget + alpha * retain.

    Args beyond those of Trainer:
        gamma, alpha: weights of the two losses.
        retain_loss_type: "NLL", or "KL" to the reference.
        reference: the frozen model; by default a copy of the model before training, where one is needed.
    """

    needs_reference = False

    def __init__(self, *args, gamma=1.0, alpha=1.0, retain_loss_type="NLL", reference=None, **kwargs):
        super().__init__(*args, **kwargs)
        if retain_loss_type not in ("NLL", "KL"):
            raise ValueError(f"retain_loss_type is {retain_loss_type!r}, give 'NLL' or 'KL'")
        self.gamma, self.alpha, self.retain_loss_type = gamma, alpha, retain_loss_type
        if reference is None and (self.needs_reference or retain_loss_type == "KL"):
            reference = copy.deepcopy(self.model)
        self.reference = None if reference is None else self.frozen(reference)

    def frozen(self, model):
        return model.eval().to(self.args.device)

    def hidden(self, model, batch):
        """Last hidden states [B, T, H] and LM head [V, H] of the model in training. It is called as a
        whole, as DDP needs it, but makes the logits of one position only."""
        outputs = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_hidden_states=True,
            logits_to_keep=1,
            use_cache=False,
        )
        return outputs.hidden_states[-1], self.accelerator.unwrap_model(model).get_output_embeddings().weight

    @torch.no_grad()
    def frozen_hidden(self, model, batch):
        """The same of a frozen model."""
        outputs = model.get_decoder()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        )
        return outputs.last_hidden_state, model.get_output_embeddings().weight

    def forget_loss(self, model, batch):
        raise NotImplementedError

    def retain_loss(self, model, batch):
        choices = {}
        if self.retain_loss_type == "KL":
            teachers = (self.frozen_hidden(self.reference, batch),)
            choices = {"teachers": teachers, "divergence": "forward_kl"}
        return linear_combination_loss(
            *self.hidden(model, batch), batch["labels"], shift_labels=True, **choices
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "forget" not in inputs:  # a plain batch: evaluation
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = self.gamma * self.forget_loss(model, inputs["forget"])
        loss = loss + self.alpha * self.retain_loss(model, inputs["retain"])
        return (loss, {}) if return_outputs else loss


class GradDiff(UnlearnTrainer):
    def forget_loss(self, model, batch):
        return -linear_combination_loss(*self.hidden(model, batch), batch["labels"], shift_labels=True)


class NPO(UnlearnTrainer):
    needs_reference = True

    def __init__(self, *args, beta=0.1, **kwargs):
        super().__init__(*args, **kwargs)
        self.beta = beta

    def forget_loss(self, model, batch):
        def nll(hidden, head):  # [B, T], 0 where nothing is trained
            return linear_combination_loss(hidden, head, batch["labels"], shift_labels=True, reduction="none")

        reference_nll = nll(*self.frozen_hidden(self.reference, batch))
        return npo_loss(nll(*self.hidden(model, batch)), reference_nll, beta=self.beta)


class UNDIAL(UnlearnTrainer):
    needs_reference = True

    def __init__(self, *args, beta=10.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.beta = beta

    def forget_loss(self, model, batch):
        labels = batch["labels"]
        return linear_combination_loss(
            *self.hidden(model, batch),
            labels,
            shift_labels=True,
            teachers=(self.frozen_hidden(self.reference, batch),),
            row_edits=RowEdits.at_labels(labels, "add", -self.beta, shift_labels=True),
            divergence="cross_entropy",
        )


class WHP(UnlearnTrainer):
    """`reinforced` is the reference, trained further on the text to be forgotten."""

    needs_reference = True

    def __init__(self, *args, reinforced, whp_alpha=5.0, divergence="hard", **kwargs):
        super().__init__(*args, **kwargs)
        self.reinforced = self.frozen(reinforced)
        self.combination, self.divergence = Whp(whp_alpha), divergence

    def forget_loss(self, model, batch):
        return linear_combination_loss(
            *self.hidden(model, batch),
            batch["labels"],
            shift_labels=True,
            teachers=[self.frozen_hidden(teacher, batch) for teacher in (self.reference, self.reinforced)],
            combination=self.combination,
            divergence=self.divergence,
        )


class ForgetRetain(torch.utils.data.Dataset):
    """Each row of the forget set beside one of the retain set."""

    def __init__(self, forget, retain):
        self.forget, self.retain = forget, retain

    def __len__(self):
        return len(self.forget)

    def __getitem__(self, index):
        return {"forget": self.forget[index], "retain": self.retain[index % len(self.retain)]}


def collate(rows):
    """Rows `{"forget": {name: [T]}, "retain": ...}` as a batch of padded tensors; padding is not trained."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        part: {
            name: torch.nn.utils.rnn.pad_sequence([row[part][name] for row in rows], True, fill[name])
            for name in fill
        }
        for part in ("forget", "retain")
    }


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


def tiny_text(first, seed, rows=16, vocabulary=64):
    """Questions and answers of different lengths after the token `first`; only the answers are trained."""
    generator = torch.Generator().manual_seed(seed)
    follows = torch.randperm(vocabulary, generator=generator)
    text = []
    for row in range(rows):
        tokens = [torch.tensor(first), torch.randint(0, vocabulary, (), generator=generator)]
        for _ in range(12 + row % 5):
            tokens.append(follows[tokens[-1]])
        ids = torch.stack(tokens)
        labels = ids.clone()
        labels[:4] = -100
        text.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return text


def arguments(folder, **changes):
    values = {
        "output_dir": folder,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 15,
        "learning_rate": 2e-3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,  # the model's arguments lie one level deeper than Trainer looks
    }
    return TrainingArguments(**values | changes)


def learn(model, text, steps, lr=1e-2):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    batch = collate([{"forget": row, "retain": row} for row in text])["forget"]
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def nll(model, text):
    """Mean over the answers' tokens."""
    batch = collate([{"forget": row, "retain": row} for row in text])["forget"]
    return model(**{name: value.to(model.device) for name, value in batch.items()}).loss.item()


def main():
    forget, retain = tiny_text(first=0, seed=1), tiny_text(first=1, seed=2)
    base = learn(tiny_model(), forget + retain, steps=60)
    reinforced = learn(copy.deepcopy(base), forget, steps=20)
    results = {"before": (nll(base, forget), nll(base, retain))}
    methods = {
        "GradDiff": (GradDiff, {}),
        "NPO": (NPO, {}),
        "UNDIAL": (UNDIAL, {"retain_loss_type": "KL"}),
        "WHP, hard": (WHP, {"reinforced": reinforced}),
        "WHP, reverse KL": (WHP, {"reinforced": reinforced, "divergence": "reverse_kl"}),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, (method, choices) in methods.items():
            model = copy.deepcopy(base)
            trainer = method(
                model,
                arguments(folder),
                train_dataset=ForgetRetain(forget, retain),
                data_collator=collate,
                **choices,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            results[name] = nll(model, forget), nll(model, retain)
    print("negative log-likelihood of      forget    retain")
    for name, (of_forget, of_retain) in results.items():
        print(f"  {name:<24} {of_forget:11.3f} {of_retain:9.3f}")
    return results


if __name__ == "__main__":
    main()
