"""`combination_loss` and `linear_combination_loss`: what surrounds the formulas. Shapes, labels, weights,
denominators.

The formulas themselves are checked in test_named_losses.py; here a float64 formula in plain torch stands
beside the public functions, whose two entry points and three ways to a gradient must agree on everything.
"""

import pytest
import torch
import torch.nn.functional as F
from whp_kernels import (
    SELF,
    CombinationLoss,
    Identity,
    LinearCombinationLoss,
    Offset,
    RelativeTop,
    RowEdits,
    StudentOffset,
    Whp,
    combination_loss,
    linear_combination_loss,
)

B, T, V, H = 2, 5, 23, 4
IGNORE = -100


def normal(*shape, seed=0, dtype=torch.float64):
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * 2
    )


def labels_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[0, 1] = labels[1, 3] = labels[1, 4] = IGNORE
    return labels


def soft_rows(student, base, reinforced, alpha=5.0):
    """KL(p_t || p_s) of each row, with the target of the paper."""
    target = base - alpha * torch.relu(reinforced - base)
    return F.kl_div(student.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True).sum(
        -1
    )


class Logits:
    """The loss from logits; ``leaf`` takes the gradient."""

    def __init__(self, **choices):
        self.choices = choices
        self.leaf = normal(B, T, V, seed=1).requires_grad_()
        self.teachers = normal(B, T, V, seed=2), normal(B, T, V, seed=3)
        self.logits = lambda: (self.leaf, *self.teachers)

    def __call__(self, labels=None, **choices):
        student = self.leaf * 1.0 if self.choices.get("inplace") else self.leaf
        return combination_loss(student, labels, teachers=self.teachers, **{**self.choices, **choices})


class Hidden:
    """The loss from hidden states."""

    def __init__(self, **choices):
        self.choices = choices
        self.leaf = normal(B, T, H, seed=1).requires_grad_()
        self.head = normal(V, H, seed=4)
        self.teachers = [
            (normal(B, T, H, seed=2), self.head),
            (normal(B, T, H, seed=3), normal(V, H, seed=5)),
        ]
        self.logits = lambda: (self.leaf @ self.head.t(), *(h @ w.t() for h, w in self.teachers))

    def __call__(self, labels=None, **choices):
        choices = {**self.choices, **choices}
        return linear_combination_loss(self.leaf, self.head, labels, teachers=self.teachers, **choices)


SOFT = {"combination": Whp(5.0), "divergence": "forward_kl"}
WAYS = {
    "logits": lambda: Logits(**SOFT),
    "logits in place": lambda: Logits(**SOFT, inplace=True),
    "logits, gradient in the backward": lambda: Logits(**SOFT, gradient="backward"),
    "logits in place, gradient in the backward": lambda: Logits(**SOFT, gradient="backward", inplace=True),
    "hidden states": lambda: Hidden(**SOFT),
    "hidden states, store-free": lambda: Hidden(**SOFT, store_free=True),
}


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]()


def same(loss, expected, leaf, factor=1.7):
    """Values agree, and so do the gradients of their sum times ``factor``; the gradient is not zero."""
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-13)
    (expected_gradient,) = torch.autograd.grad(expected.sum() * factor, leaf, retain_graph=True)
    (gradient,) = torch.autograd.grad(loss.sum() * factor, leaf)
    assert expected_gradient.norm() > 1e-3
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions_weights_and_ignored_rows(way, reduction, weighted):
    labels = labels_of()
    weights = torch.linspace(-0.5, 2.0, B * T).view(B, T) if weighted else None
    kept = labels != IGNORE
    rows = torch.where(kept, soft_rows(*way.logits()), 0.0) * (1.0 if weights is None else weights.double())
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / kept.sum()}[reduction]
    same(way(labels, reduction=reduction, weights=weights), expected, way.leaf)


@pytest.mark.parametrize("items", [7, 3.5, torch.tensor(7)])
def test_explicit_denominator(way, items):
    rows = torch.where(labels_of() != IGNORE, soft_rows(*way.logits()), 0.0)
    same(way(labels_of(), num_items_in_batch=items), rows.sum() / float(items), way.leaf)


def test_without_labels_every_row_counts(way):
    same(way(), soft_rows(*way.logits()).mean(), way.leaf)


def test_shifted_labels(way):
    """Labels aligned with the input: position t is taught labels[t + 1], the last position nothing."""
    labels = labels_of()
    rows = soft_rows(*way.logits())[:, :-1][labels[:, 1:] != IGNORE]
    same(way(labels, shift_labels=True), rows.mean(), way.leaf)


def test_random_upstream_gradient(way):
    upstream = normal(B, T, seed=9)
    upstream[0, 2] = 0.0
    loss = way(labels_of(), reduction="none")
    expected = torch.where(labels_of() != IGNORE, soft_rows(*way.logits()), 0.0)
    (gradient,) = torch.autograd.grad((loss * upstream).sum(), way.leaf)
    (expected_gradient,) = torch.autograd.grad((expected * upstream).sum(), way.leaf)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


def test_gathered_teacher_rows(way):
    """Row n reads row index[n] of the (flattened) base; a negative index leaves the row out."""
    index = torch.tensor([3, 0, 0, 9, -1, 2, 8, 8, -1, 5])
    student, base, reinforced = (x.reshape(B * T, V) for x in way.logits())
    kept = (index >= 0) & (labels_of().flatten() != IGNORE)
    expected = soft_rows(student, base[index.clamp(min=0)], reinforced)[kept].mean()
    same(way(labels_of(), teacher_rows=(index.view(B, T), None)), expected, way.leaf)


def test_edits_stay_with_their_rows_when_others_are_left_out(way):
    labels = labels_of()
    lists = [
        [int(x) for x in torch.randperm(V, generator=torch.Generator().manual_seed(r))[: r % 4]]
        for r in range(B * T)
    ]
    offsets = torch.tensor([0, *[len(x) for x in lists]]).cumsum(0)
    edits = RowEdits(offsets, torch.tensor(sum(lists, [])), "add", 3.0)
    student, base, reinforced = (x.reshape(B * T, V) for x in way.logits())
    edited = base.clone()
    for row, tokens in enumerate(lists):
        edited[row, tokens] += 3.0
    expected = soft_rows(student, edited, reinforced)[labels.flatten() != IGNORE].mean()
    same(way(labels, row_edits=edits), expected, way.leaf)


def test_all_rows_ignored(way):
    loss = way(torch.full((B, T), IGNORE))
    (gradient,) = torch.autograd.grad(loss, way.leaf)
    assert loss == 0 and not gradient.any()


def test_a_teacher_that_is_not_a_number_takes_its_row_out_and_is_counted(way):
    spoiled = way.teachers[1][0] if isinstance(way.teachers[1], tuple) else way.teachers[1]
    rows = soft_rows(*way.logits())
    spoiled[0, 2] = float("nan")
    labels = labels_of()
    kept = labels != IGNORE
    used = kept.clone()
    used[0, 2] = False
    loss, statistics = way(labels, statistics=True)
    assert statistics.rows == used.sum() and statistics.unusable == 1
    same(loss, rows[used].sum() / kept.sum(), way.leaf)


def test_a_student_that_is_not_a_number_is_not_hidden(way):
    with torch.no_grad():
        way.leaf[0, 2] = float("nan")
    assert torch.isnan(way(labels_of()))


def test_no_gradient_asked_for(way):
    with torch.no_grad():
        loss = way(labels_of(), inplace=False) if isinstance(way, Logits) else way(labels_of())
    assert not loss.requires_grad
    rows = soft_rows(*way.logits())
    torch.testing.assert_close(loss, rows[labels_of() != IGNORE].mean().detach())


def test_no_rows():
    empty = torch.zeros(0, V, requires_grad=True)
    assert combination_loss(empty, torch.zeros(0, dtype=torch.int64)) == 0
    hidden = torch.zeros(0, H, requires_grad=True)
    loss = linear_combination_loss(hidden, torch.zeros(V, H), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and hidden.grad.shape == (0, H)


def test_infinite_loss_with_weight_zero_adds_nothing():
    logits = torch.zeros(2, 3)
    logits[0, 1] = -float("inf")
    labels = torch.tensor([1, 2])
    assert torch.isinf(combination_loss(logits, labels, reduction="sum"))
    loss = combination_loss(logits, labels, weights=torch.tensor([0.0, 1.0]), reduction="sum")
    torch.testing.assert_close(loss, torch.tensor(3.0).log())


def test_accumulation_over_micro_batches_equals_one_batch():
    labels = labels_of()
    items = int((labels != IGNORE).sum())
    whole, parts = normal(B, T, V, seed=1).requires_grad_(), normal(B, T, V, seed=1).requires_grad_()
    combination_loss(whole, labels).backward()
    for row in range(B):
        combination_loss(parts[row], labels[row], num_items_in_batch=items).backward()
    torch.testing.assert_close(parts.grad, whole.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_without_the_last_position(dtype):
    """logits[:, :-1] is no matrix of evenly spaced rows; the result is that of a copy, and of
    shift_labels."""
    logits, labels = normal(B, T, V, dtype=dtype), labels_of()
    gradients = []
    for run in (
        lambda x: combination_loss(x[:, :-1], labels[:, 1:]),
        lambda x: combination_loss(x[:, :-1].contiguous(), labels[:, 1:]),
        lambda x: combination_loss(x, labels, shift_labels=True),
    ):
        leaf = logits.clone().requires_grad_()
        run(leaf).backward()
        gradients.append(leaf.grad)
    assert gradients[0].any() and all(torch.equal(gradients[0], other) for other in gradients[1:])
    with pytest.raises(ValueError, match="evenly spaced.*shift_labels=True"):
        combination_loss(logits[:, :-1], labels[:, 1:], inplace=True)


def test_rows_with_a_stride_are_taken_as_they_are():
    wide = normal(B * T, V + 9, dtype=torch.float32)
    view, labels = wide[:, 3 : 3 + V], labels_of().flatten()
    torch.testing.assert_close(combination_loss(view, labels), combination_loss(view.contiguous(), labels))
    leaf = view.detach().requires_grad_()
    combination_loss(leaf * 1.0, labels).backward()
    expected, before = leaf.grad, wide.clone()
    in_place = wide.detach()[:, 3 : 3 + V].requires_grad_()
    combination_loss(in_place, labels, inplace=True).backward()
    torch.testing.assert_close(in_place.grad, expected)
    torch.testing.assert_close(wide[:, 3 : 3 + V], expected)
    assert torch.equal(wide[:, :3], before[:, :3]) and torch.equal(wide[:, 3 + V :], before[:, 3 + V :])


def test_float16_gradients_do_not_vanish():
    """1 / (V tokens) is below the smallest float16: products are scaled, hidden states' gradients are not
    lost."""
    hidden, head = normal(64, 8, dtype=torch.float16), normal(3000, 8, seed=1, dtype=torch.float16) / 8
    labels = torch.randint(3000, (64,), generator=torch.Generator().manual_seed(2))
    grads = []
    for dtype in (torch.float16, torch.float64):
        leaf = hidden.detach().to(dtype).requires_grad_()
        linear_combination_loss(leaf, head.to(dtype), labels, num_items_in_batch=1_000_000).mul(
            4096
        ).backward()
        grads.append(leaf.grad.double())
    assert (grads[0] - grads[1]).norm() < 2e-3 * grads[1].norm()


def test_ignored_rows_never_meet_the_head():
    hidden, labels = normal(B, T, H), labels_of()
    hidden[labels == IGNORE] = float("nan")
    leaf, head = hidden.requires_grad_(), normal(V, H, seed=1).requires_grad_()
    linear_combination_loss(leaf, head, labels).backward()
    assert torch.isfinite(leaf.grad).all() and torch.isfinite(head.grad).all() and head.grad.any()


@pytest.mark.parametrize("store_free", [False, True])
def test_no_tensor_of_rows_times_vocabulary(store_free):
    from torch.utils._python_dispatch import TorchDispatchMode

    n, vocabulary, largest = 512, 4096, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.extend(x.numel() for x in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(x))
            return result

    hidden, head = (
        normal(n, H, dtype=torch.float32).requires_grad_(),
        normal(vocabulary, H, dtype=torch.float32),
    )
    teachers = ((hidden.detach() + 1, head), (hidden.detach() - 1, head))
    with Watch():
        loss = linear_combination_loss(
            hidden, head, teachers=teachers, chunk_mib=1, store_free=store_free, impl="reference", **SOFT
        )
        loss.backward()
    assert max(largest) <= n * vocabulary // 4 and hidden.grad.any()


@pytest.mark.parametrize("alias", ["logits", "hidden"])
def test_own_logits_as_teacher(alias):
    """CE-U: the label's column is ruled out of the student's own distribution, without gradient."""
    labels = labels_of()
    edits = RowEdits.at_labels(labels, "ban")
    leaf, head = normal(B, T, H, seed=1).requires_grad_(), normal(V, H, seed=4)
    logits = leaf @ head.t()
    kept = labels != IGNORE
    banned = logits.detach().clone()
    banned[kept, labels[kept]] = -float("inf")
    expected = -(banned.softmax(-1) * logits.log_softmax(-1)).sum(-1)[kept].mean()
    choices = {"teachers": SELF, "row_edits": edits, "divergence": "cross_entropy"}
    if alias == "logits":
        same(combination_loss(leaf @ head.t(), labels, **choices), expected, leaf)
        same(combination_loss(leaf @ head.t(), labels, inplace=True, **choices), expected, leaf)
    else:
        same(linear_combination_loss(leaf, head, labels, **choices), expected, leaf)
        same(linear_combination_loss(leaf, head, labels, store_free=True, **choices), expected, leaf)


def test_modules_keep_their_choices():
    way = Logits(**SOFT)
    module = CombinationLoss(**SOFT, reduction="sum")
    assert torch.equal(module(way.leaf, teachers=way.teachers), way(reduction="sum"))
    assert "Whp(alpha=5.0" in repr(module)
    way = Hidden(**SOFT)
    module = LinearCombinationLoss(**SOFT, chunk_mib=1)
    assert torch.equal(module(way.leaf, way.head, teachers=way.teachers), way(chunk_mib=1))
    assert "chunk_mib=1" in repr(module)


LOGITS, TEACHER = torch.zeros(B, T, V), torch.zeros(B, T, V)
REFUSED = {
    "labels missing": ({}, "divergence='label' needs labels"),
    "shift without labels": (
        {"teachers": (TEACHER,), "divergence": "hard", "shift_labels": True},
        "shift_labels needs",
    ),
    "label shape": ({"labels": torch.zeros(B, dtype=torch.int64)}, r"labels have shape \(2,\).*\(2, 5\)"),
    "float labels": ({"labels": torch.zeros(B, T)}, "labels are torch.float32"),
    "label range": ({"labels": torch.full((B, T), V)}, "labels hold 23, but the vocabulary has 23"),
    "negative label": ({"labels": torch.full((B, T), -1)}, "labels hold -1"),
    "reduction": ({"labels": labels_of(), "reduction": "avg"}, "reduction is 'avg'"),
    "denominator": (
        {"labels": labels_of(), "reduction": "sum", "num_items_in_batch": 3},
        "denominator of reduction='mean'",
    ),
    "weights": ({"labels": labels_of(), "weights": torch.ones(3)}, r"weights have shape \(3,\)"),
    "no combination": (
        {"teachers": (TEACHER, TEACHER), "divergence": "hard"},
        "2 teachers are given, but no combination",
    ),
    "too few": (
        {"teachers": (TEACHER,), "combination": Whp(), "divergence": "hard"},
        "Whp takes 2 teachers, got 1",
    ),
    "too many": (
        {"teachers": (TEACHER,) * 4, "combination": Offset(1.0), "divergence": "hard"},
        "2 or 3 teachers, got 4",
    ),
    "no teachers": ({"divergence": "jsd"}, "divergence='jsd' compares with teachers"),
    "vocabulary": (
        {"teachers": (TEACHER[..., 1:],), "divergence": "hard"},
        "teacher 0 has a vocabulary of 22",
    ),
    "rows": ({"teachers": (TEACHER[:1],), "divergence": "hard"}, "teacher 0 has 5 rows, the student 10"),
    "gather": (
        {"teachers": (TEACHER,), "divergence": "hard", "teacher_rows": (torch.zeros(3, dtype=torch.int64),)},
        "teacher_rows has 3 entries, but the student has 10",
    ),
    "gathers": (
        {"teachers": (TEACHER,), "divergence": "hard", "teacher_rows": (None, None)},
        "teacher_rows has 2 entries for 1 teachers",
    ),
    "edits": (
        {
            "teachers": (TEACHER,),
            "divergence": "hard",
            "row_edits": RowEdits(torch.tensor([0, 0]), torch.zeros(0, dtype=torch.int64), "ban"),
        },
        "row_edits speak of 1 rows, but there are 10",
    ),
    "edits alone": (
        {"labels": labels_of(), "row_edits": RowEdits.at_labels(labels_of(), "ban")},
        "row_edits change a teacher",
    ),
    "self": (
        {"teachers": SELF, "combination": Whp(), "divergence": "hard"},
        r"teachers=SELF goes with Identity\(\)",
    ),
    "through": (
        {"teachers": (TEACHER, TEACHER), "combination": StudentOffset(), "divergence": "hard"},
        "StudentOffset goes with",
    ),
    "not one": ({"teachers": (TEACHER,), "combination": "whp", "divergence": "hard"}, "combination is 'whp'"),
    "temperature": ({"labels": labels_of(), "temperature": 2.0}, "temperature has no meaning"),
    "no items": ({"labels": labels_of(), "num_items_in_batch": 0}, "num_items_in_batch is 0"),
    "one tensor": ({"teachers": TEACHER, "divergence": "hard"}, "teachers is one tensor"),
    "alpha": (
        {"teachers": (TEACHER, TEACHER), "combination": Whp(float("nan")), "divergence": "hard"},
        "the number of Whp.* is not finite",
    ),
    "softcap": ({"labels": labels_of(), "softcap": -1.0}, "softcap is -1.0"),
    "gradient": ({"labels": labels_of(), "gradient": "later"}, "gradient is 'later'"),
    "impl": ({"labels": labels_of(), "impl": "fast"}, "impl is 'fast'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_what_was_found(case):
    choices, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        combination_loss(LOGITS, **choices)


def test_refusals_of_hidden_states():
    hidden, head = torch.zeros(B, T, H), torch.zeros(V, H)
    with pytest.raises(ValueError, match=r"teachers\[0\] must be \(hidden_states, lm_head_weight\)"):
        linear_combination_loss(hidden, head, teachers=(hidden,), divergence="hard")
    with pytest.raises(ValueError, match=r"teachers\[0\] hidden_states have width 4"):
        linear_combination_loss(hidden, head, teachers=((hidden, head[:, 1:]),), divergence="hard")
    with pytest.raises(ValueError, match="divergence='hard' compares with teachers"):
        linear_combination_loss(hidden, head, divergence="hard")
    with pytest.raises(ValueError, match="store_free has the implementations"):
        linear_combination_loss(hidden, head, labels_of(), store_free=True, impl="cpp")
    with pytest.raises(ValueError, match="at least two dimensions"):
        linear_combination_loss(hidden[0, 0], head, labels_of())
    with pytest.raises(ValueError, match="torch.int64, expected floating point"):
        combination_loss(LOGITS.long(), labels_of())


def test_refusals_of_combinations():
    with pytest.raises(ValueError, match="fraction is 0"):
        RelativeTop(0)
    with pytest.raises(ValueError, match="outside is 'drop'"):
        RelativeTop(0.1, "drop")
    with pytest.raises(ValueError, match="would change nothing"):
        Identity(RelativeTop(0.1, "keep"))


def test_sharded_tensors_are_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        head = distribute_tensor(torch.zeros(V, H), mesh, [Shard(0)])
        with pytest.raises(ValueError, match=r"lm_head_weight is a DTensor.*lm_head_weight.full_tensor\(\)"):
            linear_combination_loss(torch.zeros(3, H), head, torch.zeros(3, dtype=torch.int64))
        logits = distribute_tensor(torch.zeros(3, V), mesh, [Shard(1)])
        with pytest.raises(ValueError, match="student_logits is a DTensor"):
            combination_loss(logits, torch.zeros(3, dtype=torch.int64))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("way", ["logits", "hidden", "store-free"])
def test_padded_columns_of_a_loss_through_a_sum_stay_ruled_out(way, dtype):
    """-inf - -inf must not spoil the row: the first teacher rules the column out."""
    logits = normal(3, B * T, V, dtype=dtype)
    logits[:, :, V - 2 :] = -float("inf")
    labels = labels_of().flatten().clamp(0, V - 3)
    choices = {"combination": StudentOffset(0.7)}
    summed = (logits[1] + 0.7 * (logits[0] - logits[2]))[:, : V - 2]
    expected = F.cross_entropy(summed, labels)
    if way == "logits":
        leaf = logits[0].clone().requires_grad_()
        loss = combination_loss(leaf, labels, teachers=tuple(logits[1:]), **choices)
    else:
        eye, bias = torch.eye(V, dtype=dtype), torch.zeros(V, dtype=dtype)
        bias[V - 2 :] = -float("inf")
        hidden = logits.masked_fill(logits.isinf(), 0.0)
        leaf = hidden[0].clone().requires_grad_()
        loss = linear_combination_loss(
            leaf,
            eye,
            labels,
            bias=bias,
            teachers=[(h, eye, bias) for h in hidden[1:]],
            store_free=way == "store-free",
            **choices,
        )
    loss.backward()
    torch.testing.assert_close(loss, expected)
    gradient = 0.7 * (summed.softmax(-1) - F.one_hot(labels, V - 2)) / len(labels)
    torch.testing.assert_close(leaf.grad[:, : V - 2], gradient)
    assert not leaf.grad[:, V - 2 :].any()
