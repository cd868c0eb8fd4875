"""`whp_kernels.linear_combination_loss` with labels (no teachers) against float64 cross-entropy of whole
logits.

The error of a result is the norm of its difference from float64, relative to float64's norm. It may be twice
that of the same computation in plain torch at the same dtype. Every comparison of gradients is itself tried
on gradients that are wrong by a factor of 0, -1 or 2.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from whp_kernels import linear_combination_loss
from whp_kernels.losses import linear_chunks

IGNORE = -100
SLACK = {torch.float32: 2e-7, torch.bfloat16: 1e-3, torch.float64: 1e-14}  # about one rounding


def linear_cross_entropy(hidden, weight, labels, *, denominator=None, **choices):
    return linear_combination_loss(hidden, weight, labels, num_items_in_batch=denominator, **choices)


def relative_error(got, exact):
    got, exact = got.double(), exact.double()
    if not torch.isfinite(got).all():
        return float("inf")
    norm = exact.norm()
    return float((got - exact).norm() / norm) if norm > 0 else float((got - exact).norm())


def as_accurate(got, exact, plain):
    """Whether ``got`` is at most twice as far from the exact result as plain torch is."""
    return relative_error(got, exact) <= 2 * relative_error(plain, exact) + SLACK[plain.dtype]


def check_gradients(gradients, exact, plain):
    """Gradients are accurate, and the comparison would notice if one was 0, reversed or doubled."""
    for name in exact:
        assert gradients[name].dtype == plain[name].dtype and gradients[name].shape == exact[name].shape, name
        assert as_accurate(gradients[name], exact[name], plain[name]), name
        for factor in (0, -1, 2):
            assert not as_accurate(gradients[name] * factor, exact[name], plain[name]), (name, factor)


def problem(n=37, vocab=503, width=24, ignored=0.3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) / 3
    labels = torch.randint(0, vocab, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < ignored] = IGNORE
    return hidden.to(dtype), weight.to(dtype), labels


def plain_loss(hidden, weight, labels, denominator=None):
    logits = hidden @ weight.t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total / (denominator or max(1, int((labels != IGNORE).sum())))


def run(loss_function, hidden, weight, labels, dtype=None, scale=1.0):
    """The loss and its gradients {hidden, weight} at a dtype."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (hidden, weight)]
    loss = loss_function(*leaves, labels)
    (loss * scale).backward()
    return loss.detach(), {"hidden": leaves[0].grad, "weight": leaves[1].grad}


def compare(loss_function, hidden, weight, labels, denominator=None, scale=1.0):
    """Value and gradients of ``loss_function`` against float64, beside plain torch at the inputs' dtype."""
    plain_function = functools.partial(plain_loss, denominator=denominator)
    exact_loss, exact = run(plain_function, hidden, weight, labels, torch.float64, scale)
    plain, plain_gradients = run(plain_function, hidden, weight, labels, scale=scale)
    loss, gradients = run(loss_function, hidden, weight, labels, scale=scale)
    assert loss.shape == () and loss.dtype == plain.dtype
    assert as_accurate(loss, exact_loss, plain)
    check_gradients(gradients, exact, plain_gradients)


# ------------------------------------------------------------------- value and gradients


@pytest.mark.parametrize("choices", [{"chunk_mib": 1}, {"chunk_mib": 256}, {"store_free": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_value_and_gradients(dtype, choices):
    arguments = problem(dtype=dtype, vocab=30_000, n=23, width=8)
    compare(functools.partial(linear_cross_entropy, **choices), *arguments)


@pytest.mark.parametrize("vocab", [1, 2, 31_999, 32_000, 32_001, 128_256])
@pytest.mark.parametrize("n", [1, 3])
def test_shapes(vocab, n):
    hidden, weight, labels = problem(n=n, vocab=vocab, width=4, ignored=0.0)
    if vocab == 1:  # nothing to choose: the loss and all gradients are 0
        loss, gradients = run(linear_cross_entropy, hidden, weight, labels)
        assert loss == 0 and not any(g.any() for g in gradients.values())
    else:
        compare(linear_cross_entropy, hidden, weight, labels)


@pytest.mark.parametrize("store_free", [False, True])
def test_gradcheck(store_free):
    hidden, weight, labels = problem(n=6, vocab=11, width=4, dtype=torch.float64)
    assert (labels == IGNORE).any() and (labels != IGNORE).any()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, denominator=2.5, store_free=store_free), leaves
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [3.0, -0.3, 1e-3])
def test_upstream_gradient(dtype, scale):
    compare(linear_cross_entropy, *problem(dtype=dtype, width=64), scale=scale)


def test_gradient_flows_to_what_made_the_hidden_states():
    """As in training: the hidden states are no leaf, and a tied weight is used twice."""
    hidden, weight, labels = problem(vocab=40, dtype=torch.float64)

    def tied(loss_function):
        leaf = weight.clone().requires_grad_()
        loss_function(torch.tanh(hidden @ leaf.t()) @ leaf, leaf, labels).backward()
        return leaf.grad

    torch.testing.assert_close(tied(linear_cross_entropy), tied(plain_loss), rtol=1e-12, atol=1e-14)


def test_products_in_another_dtype():
    """Float32 parameters with bfloat16 products, as under autocast: gradients keep the parameters' dtype."""
    hidden, weight, labels = problem(width=64)
    loss, gradients = run(
        functools.partial(linear_cross_entropy, compute_dtype=torch.bfloat16), hidden, weight, labels
    )
    exact_loss, exact = run(plain_loss, hidden, weight, labels, torch.float64)
    plain, plain_gradients = run(plain_loss, hidden, weight, labels, torch.bfloat16)
    assert loss.dtype == torch.float32 and as_accurate(loss, exact_loss, plain)
    check_gradients(
        {k: g.to(torch.bfloat16) for k, g in gradients.items()}, exact, plain_gradients
    )  # rounded only for the comparison of dtypes
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    assert relative_error(loss, exact_loss) > 1e-6  # the products were in bfloat16 indeed


# ----------------------------------------------------------------------------- ignored rows


def test_ignored_rows_take_no_part():
    hidden, weight, labels = problem(dtype=torch.float64)
    ignored = labels == IGNORE
    loss, gradients = run(linear_cross_entropy, hidden, weight, labels)
    kept_loss, kept = run(linear_cross_entropy, hidden[~ignored], weight, labels[~ignored])
    assert loss == kept_loss
    assert torch.equal(gradients["weight"], kept["weight"])
    assert torch.equal(gradients["hidden"][~ignored], kept["hidden"])
    assert 0 < ignored.sum() < len(labels) and not gradients["hidden"][ignored].any()
    spoiled = hidden.masked_fill(ignored[:, None], float("nan"))  # padding may hold anything
    again, spoiled_gradients = run(linear_cross_entropy, spoiled, weight, labels)
    assert again == loss and torch.equal(spoiled_gradients["weight"], gradients["weight"])
    assert torch.equal(spoiled_gradients["hidden"], gradients["hidden"])


@pytest.mark.parametrize("n", [0, 1, 5])
def test_no_label_at_all(n):
    hidden, weight, labels = problem(n=n, ignored=2.0)
    assert (labels == IGNORE).all()
    loss, gradients = run(linear_cross_entropy, hidden, weight, labels)
    assert loss == 0 and loss.dtype == torch.float32
    assert gradients["hidden"].shape == hidden.shape and not gradients["hidden"].any()
    assert gradients["weight"].shape == weight.shape and not gradients["weight"].any()


def test_another_ignore_index():
    hidden, weight, labels = problem(dtype=torch.float64)
    expected, expected_gradients = run(linear_cross_entropy, hidden, weight, labels)
    labels[labels == IGNORE] = 7
    other = functools.partial(linear_cross_entropy, ignore_index=7)
    labels_without_7 = labels != 7
    assert int(labels_without_7.sum()) < len(labels)
    loss, gradients = run(other, hidden, weight, labels)
    assert loss == expected and torch.equal(gradients["weight"], expected_gradients["weight"])


# ------------------------------------------------------------------------------ denominator


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("choices", [{}, dict(store_free=True), dict(divergence="forward_kl")], ids=str)
def test_no_row_is_ignored(reduction, choices):
    """ignore_index=None: the same numbers, and no look for rows, which would wait for a GPU."""
    hidden, weight, labels = problem(ignored=0.0)
    hidden[5] = torch.nan  # a row that cannot be used is left out as ever
    teachers = ((hidden.roll(7, 0), weight),) if "divergence" in choices else ()

    def run(ignore_index):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.profiler.profile() as profile:
            loss, figures = linear_combination_loss(
                h,
                w,
                labels,
                reduction=reduction,
                ignore_index=ignore_index,
                statistics=True,
                teachers=teachers,
                **choices,
            )
        events = {event.key: event.count for event in profile.key_averages()}
        return [loss, *torch.autograd.grad(loss.sum(), (h, w)), figures.rows, figures.unusable], events

    found, events = run(None)
    expected, others = run(IGNORE)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True)
    assert found[1][0].abs().max() > 0
    assert int(found[3] + found[4]) == len(labels)
    assert "aten::nonzero" in others and "aten::nonzero" not in events


def test_a_promise_that_no_row_is_ignored_is_held_to():
    hidden, weight, labels = problem(ignored=0.3)
    with pytest.raises(ValueError, match="labels hold -100, .* and ignore_index is None"):
        linear_combination_loss(hidden, weight, labels, ignore_index=None)
    with pytest.raises(ValueError, match="shift_labels ignores the last position"):
        linear_combination_loss(hidden[None], weight, labels[None], ignore_index=None, shift_labels=True)


def test_denominator():
    """With the count of all micro-batches as denominator, splitting a batch does not change the sum."""
    hidden, weight, labels = problem(dtype=torch.float64)
    whole, gradients = run(linear_cross_entropy, hidden, weight, labels)
    count = int((labels != IGNORE).sum())
    part = functools.partial(linear_cross_entropy, denominator=count)
    cuts = [0, 5, 6, 30, len(labels)]
    parts = [run(part, hidden[i:j], weight, labels[i:j]) for i, j in zip(cuts, cuts[1:])]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole, rtol=1e-13, atol=0)
    for name in gradients:
        pieces = [g[name] for _, g in parts]
        joined = torch.cat(pieces) if name == "hidden" else sum(pieces)
        torch.testing.assert_close(joined, gradients[name], rtol=1e-12, atol=1e-16)
    compare(functools.partial(linear_cross_entropy, denominator=3.5), *problem(), denominator=3.5)


# ---------------------------------------------------------------------------------- numbers


def test_large_logits_keep_their_digits():
    """All logits are whole numbers near 10,000, exact in float32; the loss is far below their rounding."""
    hidden = torch.tensor([[1.0, 1e4], [2.0, 1e4], [3.0, -1e4]])
    weight = torch.tensor([[8.0, 1.0], [0.0, 1.0], [-2.0, 1.0]])
    labels = torch.tensor([0, 0, 2])
    exact, exact_gradients = run(plain_loss, hidden, weight, labels, torch.float64)
    loss, gradients = run(linear_cross_entropy, hidden, weight, labels)
    assert relative_error(loss, exact) < 1e-6
    for name, gradient in gradients.items():
        assert relative_error(gradient, exact_gradients[name]) < 1e-6
    (small,) = (run(linear_cross_entropy, hidden[:1], weight, labels[:1])[0],)
    (exact_small,) = (run(plain_loss, hidden[:1], weight, labels[:1], torch.float64)[0],)
    assert 0 < exact_small < 1e-3 and relative_error(small, exact_small) < 1e-3


def test_overflowing_logits():
    """exp(200) overflows in float32 unless the maximum is taken off first."""
    hidden, weight, labels = problem()
    loss, gradients = run(linear_cross_entropy, hidden * 200, weight, labels)
    exact, exact_gradients = run(plain_loss, hidden * 200, weight, labels, torch.float64)
    assert relative_error(loss, exact) < 1e-6
    for name, gradient in gradients.items():
        assert relative_error(gradient, exact_gradients[name]) < 1e-4


# ---------------------------------------------------------------------------- what is asked


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_input(frozen, monkeypatch):
    """The other gradient is the same, and the product for the frozen one is not made."""
    hidden, weight, labels = problem()
    _, both = run(linear_cross_entropy, hidden, weight, labels)
    products = []
    product = linear_chunks.product
    monkeypatch.setattr(linear_chunks, "product", lambda *a, **k: products.append(1) or product(*a, **k))
    leaves = {"hidden": hidden.clone(), "weight": weight.clone()}
    free = leaves["weight" if frozen == "hidden" else "hidden"].requires_grad_()
    linear_cross_entropy(*leaves.values(), labels).backward()
    assert leaves[frozen].grad is None
    assert torch.equal(free.grad, both["weight" if frozen == "hidden" else "hidden"])
    assert len(products) == 2  # the logits, and the one gradient


def test_nothing_to_differentiate():
    hidden, weight, labels = problem()
    loss = linear_cross_entropy(hidden, weight, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain_loss(hidden, weight, labels))


def test_second_backward_is_refused():
    hidden, weight, labels = problem()
    loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_is_refused(reduction):
    hidden, weight, labels = problem()
    loss = (
        linear_combination_loss(hidden.requires_grad_(), weight, labels, reduction=reduction).square().sum()
    )
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_retained_graph_gives_the_same_gradient_again():
    hidden, weight, labels = problem()
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], first)


def test_inputs_are_left_alone():
    hidden, weight, labels = problem(ignored=0.0)
    copies = hidden.clone(), weight.clone(), labels.clone()
    run(linear_cross_entropy, hidden, weight, labels)
    assert all(torch.equal(a, b) for a, b in zip((hidden, weight, labels), copies))


def test_chunks_bound_the_rows_of_logits(monkeypatch):
    hidden, weight, labels = problem(n=50, vocab=40_000, width=2, ignored=0.0)
    rows = []
    logits = linear_chunks.logits
    monkeypatch.setattr(linear_chunks, "logits", lambda h, *rest: rows.append(len(h)) or logits(h, *rest))
    linear_cross_entropy(hidden.requires_grad_(), weight, labels, chunk_mib=1)
    assert max(rows) == 6 and sum(rows) == 50  # 40,000 float32 a row, the gradient in their place: 160 kB
    rows.clear()
    linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels, chunk_mib=1)
    assert max(rows) == 4 and sum(rows) == 50  # beside them the gradient in bfloat16: 240 kB


def test_chunks_are_even_and_round_where_that_fits():
    assert linear_chunks.chunk_rows(0, 4, 1) == 1
    assert linear_chunks.chunk_rows(100, 4, 1) == 100  # all at once
    assert linear_chunks.chunk_rows(1000, 1 << 11, 1) == 512  # at most 512: two chunks of 500, rounded to 64
    assert linear_chunks.chunk_rows(1000, 1200, 1) == 512  # at most 873
    assert linear_chunks.chunk_rows(10, 1 << 30, 1) == 1  # one row may exceed the budget


def test_shapes_that_do_not_fit():
    hidden, weight, labels = problem()
    with pytest.raises(ValueError, match="labels have shape"):
        linear_cross_entropy(hidden[None], weight, labels)
    with pytest.raises(ValueError, match=r"labels have shape \(36,\), but there are rows \(37,\)"):
        linear_cross_entropy(hidden, weight, labels[:-1])
    with pytest.raises(ValueError, match=r"width 24, but lm_head_weight has shape \(503, 23\)"):
        linear_cross_entropy(hidden, weight[:, 1:], labels)
    with pytest.raises(ValueError, match="labels hold 503, but the vocabulary has 503 entries"):
        linear_cross_entropy(hidden, weight, labels.clamp(min=503))
    with pytest.raises(ValueError, match=r"bias has shape \(1,\), expected \[503\]"):
        linear_cross_entropy(hidden, weight, labels, bias=torch.zeros(1))
    with pytest.raises(ValueError, match="chunk_mib is 0"):
        linear_cross_entropy(hidden, weight, labels, chunk_mib=0)
