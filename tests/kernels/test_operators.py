"""The operators as torch sees them: opcheck, torch.compile without graph breaks, fake outputs, versions of
tensors."""

import pytest
import torch
from torch.library import opcheck
from whp_kernels import SELF, RowEdits, Whp, combination_loss, generic_labels, linear_combination_loss
from whp_kernels.losses import linear_ops, ops
from whp_kernels.losses.rule import Rule

N, V, H = 6, 50, 8
INDEX = torch.tensor([0, 1, 2, -1, 4, 5])


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, grad=False):
        return torch.randn(*shape, generator=generator).requires_grad_(grad)

    labels = torch.randint(V, (N,), generator=generator)
    labels[2] = -100
    return {
        "student": normal(N, V, grad=True),
        "base": normal(N, V),
        "reinforced": normal(N, V),
        "hidden": normal(N, H, grad=True),
        "weight": normal(V, H, grad=True),
        "bias": normal(V, grad=True),
        "h_base": normal(N, H),
        "h_reinforced": normal(N, H + 1),
        "w_reinforced": normal(V, H + 1),
        "labels": labels,
        "scale": torch.rand(N, generator=generator),
        "edits": RowEdits(torch.arange(N + 1), torch.randint(V, (N,), generator=generator), "add", 1.0),
    }


def target(t, divergence):
    rule = Rule.of(Whp(2.0), t["edits"], divergence).encode()
    return t["labels"], t["edits"].offsets, t["edits"].tokens, rule, -100


def linear_arguments(t, divergence, *, free):
    weight = t["weight"].detach()
    return (
        *(t["hidden"], t["weight"], t["bias"]),
        *([t["h_base"], t["h_reinforced"]], [weight, t["w_reinforced"]], [t["bias"].detach(), None]),
        *([INDEX, None], *target(t, divergence)),
        *(True, torch.tensor([1, 2]), None, 1, free, "auto"),
    )


@pytest.mark.parametrize("divergence", ["forward_kl", "hard"])
def test_opcheck_from_logits(tensors, divergence):
    t = tensors
    rows = ([t["base"], t["reinforced"]], [INDEX, None], *target(t, divergence))
    opcheck(ops.row_losses, (t["student"], *rows, True, "auto"))
    opcheck(ops.row_sum, (t["student"], *rows, t["scale"], True, True, "auto"))
    opcheck(ops.row_sum_, (t["student"].detach().clone(), *rows, t["scale"], True, True, "auto"))


@pytest.mark.parametrize("free", [False, True])
def test_opcheck_from_hidden_states(tensors, free):
    arguments = linear_arguments(tensors, "forward_kl", free=free)
    opcheck(linear_ops.linear_losses, arguments)
    opcheck(linear_ops.linear_sum, (*arguments, tensors["scale"], True, True, True))


def test_opcheck_of_labels_and_scale(tensors):
    t = tensors
    rule = Rule.of(Whp(0.0), None, "hard").encode()
    opcheck(
        ops.row_labels,
        ([t["base"], t["reinforced"]], [INDEX, None], None, None, None, rule, -100, [1.0, 5.0], "auto"),
    )
    heads = [t["weight"].detach(), t["w_reinforced"]]
    opcheck(
        linear_ops.linear_labels,
        (
            *([t["h_base"], t["h_reinforced"]], heads, [None, None], [INDEX, None], None, None, None),
            *(rule, -100, [1.0, 5.0], None, 1, False, "auto"),
        ),
    )
    opcheck(ops.scale_, (t["base"].clone(), torch.tensor(2.0)))


def from_logits(**choices):
    def loss(t):
        student = t["student"] * 1.0  # what an in-place gradient may overwrite
        return combination_loss(
            student, t["labels"], teachers=(t["base"], t["reinforced"]), combination=Whp(5.0), **choices
        )

    return loss


def from_hidden(**choices):
    def loss(t):
        return linear_combination_loss(
            t["hidden"],
            t["weight"],
            t["labels"],
            bias=t["bias"],
            teachers=((t["h_base"], t["weight"]), (t["h_reinforced"], t["w_reinforced"])),
            combination=Whp(5.0),
            **choices,
        )

    return loss


def self_taught(t):
    edits = RowEdits.at_labels(t["labels"].clamp(min=0), "ban")
    return combination_loss(
        t["student"], t["labels"], teachers=SELF, row_edits=edits, divergence="cross_entropy"
    )


LOSSES = {
    "soft": from_logits(divergence="forward_kl"),
    "hard": from_logits(divergence="hard"),
    "none": from_logits(divergence="reverse_kl", reduction="none"),
    "in place": from_logits(divergence="forward_kl", inplace=True),
    "in place, backward": from_logits(divergence="jsd", inplace=True, gradient="backward"),
    "linear soft": from_hidden(divergence="forward_kl"),
    "linear hard none": from_hidden(divergence="hard", reduction="none"),
    "linear store-free": from_hidden(divergence="forward_kl", store_free=True),
}
LEAVES = ("student", "hidden", "weight", "bias")


def run(loss, t):
    for name in LEAVES:
        t[name].grad = None
    value = loss(t)
    (value.sum() * 3.0).backward()
    return value.detach(), [None if t[name].grad is None else t[name].grad.clone() for name in LEAVES]


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_without_graph_breaks_equals_eager(tensors, name):
    torch._dynamo.reset()
    value, gradients = run(LOSSES[name], tensors)
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    compiled_value, compiled_gradients = run(compiled, tensors)
    torch.testing.assert_close(compiled_value, value, rtol=1e-6, atol=1e-7)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    for compiled_gradient, gradient in zip(compiled_gradients, gradients):
        torch.testing.assert_close(compiled_gradient, gradient, rtol=1e-6, atol=1e-7)


def test_compiled_with_statistics_and_labels(tensors):
    def both(t):
        labels = generic_labels(t["base"], t["reinforced"], 5.0)
        loss, statistics = combination_loss(t["student"], labels, statistics=True)
        return loss, statistics.agreement, labels

    torch._dynamo.reset()
    for compiled, eager in zip(
        torch.compile(both, fullgraph=True, backend="aot_eager")(tensors), both(tensors)
    ):
        torch.testing.assert_close(compiled, eager)


def test_compiled_for_one_number_of_rows_serves_another(tensors):
    def loss(student, base, reinforced):
        return combination_loss(
            student, teachers=(base, reinforced), combination=Whp(5.0), divergence="forward_kl"
        )

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (6, 4, 3):
        rows = [tensors[name][:n].detach() for name in ("student", "base", "reinforced")]
        torch.testing.assert_close(compiled(*rows), loss(*rows))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_in_place_gradient_takes_the_memory_and_allows_one_backward(tensors, gradient):
    t = tensors
    choices = {"divergence": "forward_kl", "gradient": gradient}
    _, expected = run(from_logits(**choices), t)
    t["student"].grad = None
    student = t["student"] * 1.0
    student.retain_grad()
    loss = combination_loss(
        student,
        t["labels"],
        teachers=(t["base"], t["reinforced"]),
        combination=Whp(5.0),
        inplace=True,
        **choices,
    )
    (loss * 3.0).backward(retain_graph=True)
    torch.testing.assert_close(t["student"].grad, expected[0])
    torch.testing.assert_close(student.detach(), expected[0])  # the logits' memory holds the gradient
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss * 3.0).backward()


def test_others_that_saved_the_logits_notice_an_in_place_gradient(tensors):
    student = tensors["student"].tanh()  # tanh keeps its output for its backward
    loss = combination_loss(student, tensors["labels"].clamp(min=0), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_backward_of_a_gradient_of_its_own(tensors):
    loss = from_logits(divergence="forward_kl")(tensors)
    loss.backward(retain_graph=True)
    first = tensors["student"].grad.clone()
    loss.backward()
    torch.testing.assert_close(tensors["student"].grad, 2 * first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fake_outputs_have_the_shapes_and_dtypes_of_real_ones(tensors, dtype):
    from torch._subclasses.fake_tensor import FakeTensorMode

    t = {
        k: v.detach().to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in tensors.items()
    }
    t["scale"] = tensors["scale"].double() if dtype == torch.float64 else tensors["scale"]
    calls = [
        (
            ops.row_losses,
            (t["student"], [t["base"], t["reinforced"]], [None, None], *target(t, "hard"), True, "auto"),
        ),
        (linear_ops.linear_losses, linear_arguments(t, "forward_kl", free=False)),
        (
            linear_ops.linear_sum,
            (*linear_arguments(t, "forward_kl", free=False), t["scale"], True, True, True),
        ),
    ]
    for operator, arguments in calls:
        real = operator(*arguments)
        with FakeTensorMode() as mode:
            fake = operator(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments))
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), operator
