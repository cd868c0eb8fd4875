"""`whp_kernels.losses.generic_labels` against the formula written out for one row at a time."""

import math

import numpy as np
import pytest
import torch
import whp_kernels
from whp_kernels import RelativeTop, RowEdits
from whp_kernels.losses import linear_chunks

ALPHAS = (0.0, 0.5, 5.0, 10.0)
IGNORE = -100
INF = math.inf


def generic_labels(base, reinforced, alphas=(5.0,), *, row_offsets=None, mean_tokens=None, **choices):
    """Label sets [alphas, rows] and the base's own choice."""
    edits = None if row_offsets is None else RowEdits(row_offsets, mean_tokens, "mean")
    return whp_kernels.generic_labels(base, reinforced, alphas, row_edits=edits, base_choice=True, **choices)


def label_of(base_row, reinforced_row, alpha, mean_tokens=(), ignore_index=IGNORE):
    """The label of one row, in NumPy and float64: the offset is only computed where it counts."""
    base, reinforced = np.array(base_row, np.float64), np.array(reinforced_row, np.float64)
    base[list(mean_tokens)] = base.mean()
    if np.isnan(base).any() or np.isnan(reinforced).any():
        return ignore_index
    scores = base.copy()
    raised = (reinforced > base) & (base > -INF)
    scores[raised] -= alpha * (reinforced[raised] - base[raised])
    best = scores.max()
    return int(np.flatnonzero(scores == best)[0]) if np.isfinite(best) else ignore_index


def integers(*shape, seed=0, low=-4, high=5, dtype=torch.float32):
    """Small integers: sums and products of them are exact in every dtype, and ties are frequent."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(dtype)


# ----------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("vocab", [1, 7, 31_999, 32_000, 32_001, 128_256])
def test_labels_equal_the_formula(vocab):
    generator = torch.Generator().manual_seed(vocab)
    base, reinforced = torch.randn(2, 3, vocab, generator=generator, dtype=torch.float64)
    reinforced[1] = base[1]  # nothing to take away
    got, own = generic_labels(base, reinforced, ALPHAS)
    assert got.dtype == own.dtype == torch.int64 and got.shape == (len(ALPHAS), 3)
    for k, alpha in enumerate(ALPHAS):
        assert got[k].tolist() == [label_of(b, r, alpha) for b, r in zip(base, reinforced)]
    assert own.tolist() == base.argmax(-1).tolist() == got[0].tolist()


def test_each_alpha_can_change_the_label():
    """The arithmetic of the method: 0 keeps the reinforced favourite, 0.5 and 5 take away ever more."""
    base, reinforced = torch.tensor([[3.0, 2.9, 2.0]]), torch.tensor([[3.5, 2.95, 0.0]])
    got, own = generic_labels(base, reinforced, [0.0, 1.0, 100.0])
    assert got[:, 0].tolist() == [0, 1, 2] and own.tolist() == [0]


def test_only_what_the_reinforced_model_raises_is_taken_away():
    """Without the ReLU the first column would win, because the reinforced model lowers it."""
    got, _ = generic_labels(torch.tensor([[1.0, 2.0]]), torch.tensor([[-9.0, 2.0]]), [5.0])
    assert got.tolist() == [[1]]


def test_ties_go_to_the_lowest_index():
    base = torch.tensor([[0.0, 2.0, 2.0, 2.0], [3.0, 1.0, 1.0, 3.0]])
    reinforced = torch.tensor([[0.0, 9.0, 2.0, 1.0], [4.0, 1.0, 1.0, 4.0]])
    got, own = generic_labels(base, reinforced, [5.0])
    assert got.tolist() == [[2, 1]] and own.tolist() == [1, 0]


def test_float64_is_not_rounded():
    base = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    got, own = generic_labels(base, base, [5.0])
    assert got.tolist() == [[1]] and own.tolist() == [1]
    assert generic_labels(base.float(), base.float(), [5.0])[0].tolist() == [[0]]


def test_rows_without_a_usable_target():
    nan = math.nan
    base = torch.tensor([[-INF] * 3, [nan, 1.0, 0.0], [0.0, 1.0, 2.0], [-INF, 1.0, 2.0], [0.0, 1.0, 2.0]])
    reinforced = torch.tensor([[0.0] * 3, [0.0] * 3, [0.0, nan, 0.0], [nan, 1.0, 2.0], [0.0, INF, 0.0]])
    got, own = generic_labels(base, reinforced, [5.0], ignore_index=-7)
    assert got.tolist() == [[-7, -7, -7, -7, 2]]
    assert own.tolist() == [-7, -7, 2, 2, 2]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("ruled_out", ["base", "reinforced", "both"])
def test_columns_of_minus_infinity_never_win_and_spoil_nothing(ruled_out, alpha):
    """A padded or forbidden column of the vocabulary; inf - inf must not make the row unusable."""
    base, reinforced = integers(40, 9, seed=1), integers(40, 9, seed=2)
    if ruled_out != "reinforced":
        base[:, [0, 5]] = -INF
    if ruled_out != "base":
        reinforced[:, [0, 5]] = -INF
    got, own = generic_labels(base, reinforced, [alpha])
    assert got[0].tolist() == [label_of(b, r, alpha) for b, r in zip(base, reinforced)]
    assert own.tolist() == [label_of(b, b, 0.0) for b in base]
    assert (got >= 0).all()
    if ruled_out != "reinforced":
        assert not set(got.flatten().tolist()) & {0, 5}


# ----------------------------------------------------------------------- the mean of a row


def test_worked_example_of_the_mean():
    """The forbidden token gets the mean of its row before the offset is computed."""
    base = torch.tensor([[4.0, 1.0, 3.0, 2.5, 0.0]])
    reinforced = torch.tensor([[1.0, 6.0, 3.5, 2.0, 0.0]])
    offsets, tokens = torch.tensor([0, 1]), torch.tensor([0])
    got, own = generic_labels(base, reinforced, [5.0, 0.0], row_offsets=offsets, mean_tokens=tokens)
    assert got.tolist() == [[3], [2]] and own.tolist() == [2]
    assert generic_labels(base, reinforced, [5.0])[0].tolist() == [[0]]  # without the rule


def test_the_offset_is_computed_after_the_mean():
    """Token 0 is lowered to the mean (1), so the reinforced model's 3 exceeds it: 1 - 5 * 2."""
    base, reinforced = torch.tensor([[4.0, 0.5, -1.5]]), torch.tensor([[3.0, 0.5, -1.5]])
    edit = {"row_offsets": torch.tensor([0, 1]), "mean_tokens": torch.tensor([0])}
    got, own = generic_labels(base, reinforced, [5.0], **edit)
    assert got.tolist() == [[1]] and own.tolist() == [0]


# ----------------------------------------------------------------- hidden states and chunks


def problem(n=23, vocab=640, width=5, seed=0, dtype=torch.float32):
    """Hidden states, heads and mean edits whose logits (and row means) are exact in float32."""
    hidden = [integers(n, width, seed=seed + k, dtype=dtype) for k in range(2)]
    heads = [integers(vocab, width, seed=seed + 2 + k, dtype=dtype) for k in range(2)]
    for head in heads:  # partners of opposite sign: the mean of every row is 0
        head[vocab // 2 :] = -head[: vocab // 2]
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 5, (n,), generator=generator)
    counts[[0, n - 1]] = 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    tokens = torch.randint(0, vocab, (int(offsets[-1]),), generator=generator)
    for row in range(n):  # the strongest token of a row is among the edited ones
        if counts[row]:
            tokens[offsets[row]] = (hidden[0][row].float() @ heads[0].float().t()).argmax()
    return hidden, heads, offsets, tokens


@pytest.mark.parametrize("choices", [{"chunk_mib": 1}, {"chunk_mib": 256}, {"store_free": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_hidden_states_and_chunks_equal_whole_logits(dtype, choices, monkeypatch):
    (base, reinforced), (base_head, reinforced_head), offsets, tokens = problem(vocab=20_000, dtype=dtype)
    logits = [(h.double() @ w.double().t()) for h, w in ((base, base_head), (reinforced, reinforced_head))]
    edit = {"row_offsets": offsets, "mean_tokens": tokens}
    expected, expected_own = generic_labels(*logits, ALPHAS, **edit)
    for k, alpha in enumerate(ALPHAS):
        rows = zip(*(x[::7].tolist() for x in logits), offsets[:-1:7], offsets[1::7])
        plain = [label_of(b, r, alpha, set(tokens[i:j].tolist())) for b, r, i, j in rows]
        assert expected[k, ::7].tolist() == plain

    seen = []
    whole = linear_chunks.logits
    monkeypatch.setattr(linear_chunks, "logits", lambda h, *rest: seen.append(len(h)) or whole(h, *rest))
    heads = {"base_head": base_head, "reinforced_head": reinforced_head}
    got, own = generic_labels(base, reinforced, ALPHAS, **heads, **edit, **choices)
    assert torch.equal(got, expected) and torch.equal(own, expected_own)
    if choices == {"chunk_mib": 1}:  # two sets of 20,000 logits of 4 or 8 bytes
        assert max(seen) == (3 if dtype == torch.float64 else 6)
    unedited = generic_labels(base, reinforced, ALPHAS, **heads, **choices)[0]
    assert not torch.equal(unedited, expected)


@pytest.mark.parametrize("from_hidden", [False, True])
def test_rows_are_gathered_by_the_alignment(from_hidden):
    """The base's rows come from a translation of another length; rows without one are ignored, and each
    row's edits stay with it."""
    (base, reinforced), (base_head, reinforced_head), offsets, tokens = problem()
    n = len(base)
    base_rows = torch.randint(-1, n, (n,), generator=torch.Generator().manual_seed(1))
    reinforced_rows = torch.arange(n).flip(0)
    reinforced_rows[4] = -1
    assert (base_rows < 0).any() and len(base_rows.unique()) < n
    heads = {"base_head": base_head, "reinforced_head": reinforced_head} if from_hidden else {}
    if not from_hidden:
        base, reinforced = base @ base_head.t(), reinforced @ reinforced_head.t()
    edit = {"row_offsets": offsets, "mean_tokens": tokens}
    got, own = generic_labels(
        base, reinforced, [5.0], base_rows=base_rows, reinforced_rows=reinforced_rows, **heads, **edit
    )
    kept = (base_rows >= 0) & (reinforced_rows >= 0)
    counts = offsets.diff()[kept]
    taken = [tokens[offsets[row] : offsets[row + 1]] for row in kept.nonzero().flatten()]
    expected, expected_own = generic_labels(
        base[base_rows[kept]],
        reinforced[reinforced_rows[kept]],
        [5.0],
        row_offsets=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        mean_tokens=torch.cat(taken),
        **heads,
    )
    assert torch.equal(got[:, kept], expected) and torch.equal(own[kept], expected_own)
    assert (got[:, ~kept] == IGNORE).all() and (own[~kept] == IGNORE).all()


def test_one_alpha_gives_labels_in_the_shape_of_the_rows():
    base, reinforced = integers(2, 3, 9, seed=1), integers(2, 3, 9, seed=2)
    labels = whp_kernels.generic_labels(base, reinforced, 5.0)
    several, own = whp_kernels.generic_labels(base, reinforced, [0.0, 5.0], base_choice=True)
    assert labels.shape == (2, 3) and several.shape == (2, 2, 3) and own.shape == (2, 3)
    assert torch.equal(several[1], labels) and torch.equal(several[0], own)
    module = whp_kernels.GenericLabels(alpha=5.0)
    assert torch.equal(module(base, reinforced), labels) and "alpha=5.0" in repr(module)


def test_relative_top_and_softcap():
    """Outside the base's likeliest tokens the offset is left out (keep), or nothing is possible (mask)."""
    base, reinforced = torch.tensor([[3.0, 2.9, -2.0]]), torch.tensor([[5.0, 4.9, -2.0]])
    label = whp_kernels.generic_labels
    assert label(base, reinforced).tolist() == [2]
    assert label(base, reinforced, relative_top=RelativeTop(0.5, "mask")).tolist() == [0]
    assert label(base, reinforced, relative_top=RelativeTop(0.95, "keep")).tolist() == [1]
    capped = [4.0 * torch.tanh(x / 4.0) for x in (base * 3, reinforced)]
    assert torch.equal(label(base * 3, reinforced, 0.7, softcap=4.0), label(*capped, 0.7))


def test_logits_of_bfloat16_states_are_not_rounded():
    """A difference of 1 between logits near 1,000: bfloat16 logits would be equal, and index 0 would win."""
    hidden = torch.tensor([[1.0, 1000.0]], dtype=torch.bfloat16)
    head = torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=torch.bfloat16)
    got, own = generic_labels(hidden, hidden, [5.0], base_head=head, reinforced_head=head)
    assert got.tolist() == [[1]] and own.tolist() == [1]
    rounded = hidden @ head.t()
    assert generic_labels(rounded, rounded, [5.0])[0].tolist() == [[0]]


def test_logits_need_not_be_contiguous():
    views = [integers(50, 6, seed=5).t()[:, :-1], integers(6, 100, seed=6)[:, :98:2]]
    assert not any(view.is_contiguous() for view in views) and views[0].shape == views[1].shape
    got = generic_labels(*views, ALPHAS)
    expected = generic_labels(*(view.contiguous() for view in views), ALPHAS)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_no_rows():
    got, own = generic_labels(torch.zeros(0, 9), torch.zeros(0, 9), ALPHAS)
    assert got.shape == (len(ALPHAS), 0) and own.shape == (0,)


def test_shapes_that_do_not_fit():
    two, three = torch.zeros(2, 5), torch.zeros(3, 5)
    with pytest.raises(ValueError, match="both base_head and reinforced_head"):
        generic_labels(two, two, base_head=torch.zeros(7, 5))
    with pytest.raises(ValueError, match="teacher 1 has 3 rows, the student 2"):
        generic_labels(two, three)
    with pytest.raises(ValueError, match="vocabulary of 1, the student one of 5"):  # would broadcast
        generic_labels(two, torch.zeros(2, 1))
    with pytest.raises(ValueError, match="speak of 1 rows, but there are 2"):
        generic_labels(two, two, row_offsets=torch.tensor([0, 1]), mean_tokens=torch.tensor([0]))
    with pytest.raises(ValueError, match="base_rows|teacher_rows has 3 entries"):
        generic_labels(two, two, base_rows=torch.zeros(2, dtype=torch.int64), reinforced_rows=torch.arange(3))
    with pytest.raises(ValueError, match="chunk_mib is 0"):
        generic_labels(two, two, chunk_mib=0)
