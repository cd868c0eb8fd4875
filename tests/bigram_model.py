"""Models whose probabilities are written down: a tokenizer of listed pieces and a bigram table."""

import torch

from whp_fast.tokens import Tokenizer


class PieceTokenizer(Tokenizer):
    """Longest match over a list of pieces; id 0 is BOS, id 1 is EOS; `prefix` puts a space before a text."""

    kind = "test"

    def __init__(self, pieces, bos=True, prefix=False):
        super().__init__(None)
        self.pieces = ["<s>", "</s>", *pieces]
        self.vocab_size, self.bos_id, self.eos_id = len(self.pieces), 0 if bos else None, 1
        self.prefix = prefix

    def encode(self, text):
        return self.encode_inside((" " if self.prefix else "") + text)

    def encode_inside(self, text):
        ids = []
        while text:
            piece = max((p for p in self.pieces[2:] if text.startswith(p)), key=len)
            ids.append(self.pieces.index(piece))
            text = text[len(piece) :]
        return ids

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids if i > 1).lstrip(" ")

    def token_bytes(self, token):
        return b"\xff" if token < 2 else self.pieces[token].encode()


class BigramModel:
    """P(next | last token) from a table {piece: {piece: probability}}; other rows are uniform.

    The hidden state is the one-hot vector of the token and the head holds the log-probabilities, so every
    logit is known. Pieces are looked up in a `PieceTokenizer`.
    """

    def __init__(self, tokenizer, table):
        size = tokenizer.vocab_size
        probabilities = torch.full((size, size), 1 / size)
        for piece, row in table.items():
            probabilities[tokenizer.pieces.index(piece)] = 0
            for following, p in row.items():
                probabilities[tokenizer.pieces.index(piece), tokenizer.pieces.index(following)] = p
        self.lm_head_weight = probabilities.log().clamp(min=-1e4).T.contiguous()
        self.size = size
        self.rows_seen = []

    def hidden_states(self, input_ids, cache=None, position_ids=None):
        self.rows_seen.append(tuple(input_ids.shape))
        return torch.nn.functional.one_hot(input_ids, self.size).float()


def plain_greedy(model, prompts, max_new_tokens, stop_ids=(), batch_size=32):
    """`whp_fast.generate.greedy` for models without a cache."""
    generated = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + max_new_tokens and (
            len(ids) == len(prompt) or ids[-1] not in stop_ids
        ):
            ids.append(
                int((model.hidden_states(torch.tensor([ids]))[0, -1] @ model.lm_head_weight.T).argmax())
            )
        generated.append(ids[len(prompt) :])
    return generated
