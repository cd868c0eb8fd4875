"""whp_kernels in a plain training loop, from hidden states: `python examples/trainers/plain_loop.py`.

What is copied is `whp_loss`: last hidden states (after the final norm) and LM head weights of student and
teachers go in, and no logits of the whole batch are stored. `divergence="hard"` is the paper's loss,
cross-entropy with the argmax of `base - alpha * relu(reinforced - base)`; `"forward_kl"` and `"reverse_kl"`
compare with its softmax.

Here all models read the same text. In the paper the base model reads it with its names replaced by generic
ones: then give `base` the replaced text and the loss `teacher_rows=(rows, None)`, where `rows` [B, T] tells
which of its flattened rows belongs to each token (-1: none, the token is not trained).
"""

import copy

import torch
from torch import nn
from whp_kernels import Whp, linear_combination_loss


def whp_loss(student, base, reinforced, input_ids, labels, divergence, alpha=5.0):
    """A scalar for `backward()`. `labels` [B, T], aligned with `input_ids`, only say which tokens are
    trained: those that are not -100."""
    with torch.no_grad():
        teachers = [(model.hidden_states(input_ids), model.lm_head.weight) for model in (base, reinforced)]
    return linear_combination_loss(
        student.hidden_states(input_ids),
        student.lm_head.weight,
        labels,
        shift_labels=True,
        teachers=teachers,
        combination=Whp(alpha),
        divergence=divergence,
    )


def unlearn(base, reinforced, input_ids, labels, divergence, steps=60, lr=3e-3):
    """A copy of the base model, trained not to know what the reinforced model knows better."""
    student = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr)
    for step in range(steps):
        rows = torch.arange(step * 8, step * 8 + 8) % len(input_ids)
        loss = whp_loss(student, base, reinforced, input_ids[rows], labels[rows], divergence)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"  step {step:3d}   loss {loss.item():.4f}")
    return student


# --------------------------------------------------------------------------------- a run on invented text


class TinyModel(nn.Module):
    """A recurrent language model, so that this file needs nothing but torch."""

    def __init__(self, vocabulary=80, width=48):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.body = nn.GRU(width, width, batch_first=True)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def hidden_states(self, input_ids):
        return self.body(self.embedding(input_ids))[0]


def text_of(follows, rows=64, length=20):
    """Token ids in which a token follows from the one before, as `follows` says, nine times out of ten."""
    tokens = [torch.randint(0, len(follows), (rows,))]
    for _ in range(length - 1):
        other = torch.randint(0, len(follows), (rows,))
        tokens.append(torch.where(torch.rand(rows) < 0.9, follows[tokens[-1]], other))
    return torch.stack(tokens, dim=1)


def learn(model, texts, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        for text in texts:
            loss = linear_combination_loss(
                model.hidden_states(text), model.lm_head.weight, text, shift_labels=True
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@torch.no_grad()
def knowledge(model, text):
    """Mean probability of the text's next token."""
    nll = linear_combination_loss(
        model.hidden_states(text), model.lm_head.weight, text, shift_labels=True, reduction="none"
    )
    return torch.exp(-nll[:, :-1]).mean().item()


def main():
    torch.manual_seed(0)
    book, other = text_of(torch.randperm(80)), text_of(torch.randperm(80))
    book[:, 0], other[:, 0] = 0, 1  # which text it is
    base = learn(TinyModel(), [book, other], steps=30)
    reinforced = learn(copy.deepcopy(base), [book], steps=30)
    models = {"base": base, "reinforced": reinforced}
    for divergence in ("hard", "forward_kl"):
        print(f"unlearning, divergence={divergence!r}")
        models[f"unlearned, {divergence}"] = unlearn(base, reinforced, book, book, divergence)
    print("mean probability of the next token     of the book   of other text")
    results = {name: (knowledge(model, book), knowledge(model, other)) for name, model in models.items()}
    for name, (of_book, of_other) in results.items():
        print(f"  {name:<36} {of_book:11.3f} {of_other:15.3f}")
    return results


if __name__ == "__main__":
    main()
