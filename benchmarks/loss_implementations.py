"""The implementations that ``benchmarks.loss`` measures: ours, eager torch, torch.compile, the peers'."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from whp_kernels import Whp, backends, combination_loss, generic_labels, linear_combination_loss

from benchmarks.loss_cases import ALPHA, FORMULAS, Inputs, Model, Op, whp_target


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
        name: ``impl`` of the row.
        label: what tables and pictures call it.
        forward: inputs -> the loss, or the labels of an operation without gradient.
        ours: whether a wrong result is a failure.
        baseline: eager torch that computes in float32, whose error ours is measured by.
        floor: no implementation but the matrix products alone.
        cross_entropy_loss: the loss is the cross-entropy with the soft target: the KL plus a constant.
        compiled: its first call compiles for the very shapes.
    """

    name: str
    label: str
    forward: Callable[[Inputs], Tensor]
    ours: bool = False
    baseline: bool = False
    floor: bool = False
    cross_entropy_loss: bool = False
    compiled: bool = False

    def backward(self, loss: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
        # not .backward(): logits are no leaves in a trainer, and a leaf's .grad may be a copy of the gradient
        return torch.autograd.grad(loss, inputs.leaves)


class LeftOut(NamedTuple):
    impl: str
    reason: str


class Choices(NamedTuple):
    """How the implementations are built, from the command line."""

    device: torch.device
    impl: str = "auto"
    compile_backend: str = "inductor"
    chunk_mib: int | None = None


def implementations(
    op: Op, dtype: torch.dtype, choices: Choices
) -> tuple[list[Implementation], list[LeftOut]]:
    """Everything that can compute ``op`` here, ours first, and what was left out."""
    found, left_out = (_linear_ours if op.linear else _logits_ours)(op, choices)
    found += _torch(op, dtype, choices, left_out)
    for name, build in (("torch_linear_ce", _torch_linear_ce), ("liger", _liger), ("cce", _cce)):
        built = build(op, choices)
        if isinstance(built, Implementation):
            found.append(built)
        elif built is not None:
            left_out.append(LeftOut(name, built))
    if op.linear:
        found.append(BareProducts("bare_gemms", "matrix products alone", _only_backward(op), floor=True))
    return found, left_out


def _logits_ours(op: Op, choices: Choices) -> tuple[list[Implementation], list[LeftOut]]:
    def loss(impl=choices.impl, **how):
        def forward(inputs: Inputs) -> Tensor:
            target = {}
            if op.teachers:
                target = {"teachers": (inputs.base, inputs.reinforced), "combination": Whp(ALPHA)}
            labels = None if op.teachers else inputs.labels
            return combination_loss(
                inputs.student, labels, divergence=op.divergence, impl=impl, **target, **how
            )

        return forward

    def labels(inputs: Inputs) -> Tensor:
        return generic_labels(inputs.base, inputs.reinforced, ALPHA, impl=choices.impl)

    if not op.gradient:
        return [Implementation("whp_kernels", "whp_kernels", labels, ours=True)], []
    found = [
        Implementation("whp_kernels_inplace", "whp_kernels, in place", loss(inplace=True), ours=True),
        Implementation("whp_kernels", "whp_kernels", loss(), ours=True),
        Implementation(
            "whp_kernels_recompute", "whp_kernels, gradient in backward", loss(gradient="backward"), ours=True
        ),
    ]
    left_out = []
    if choices.device.type == "cuda":
        reason = backends()["cuda"]
        if reason == "available":
            cluster = loss("cuda", inplace=True)
            found.append(Implementation("whp_kernels_cuda", "whp_kernels, clusters", cluster, ours=True))
        else:
            left_out.append(LeftOut("whp_kernels_cuda", reason))
    return found, left_out


def _linear_ours(op: Op, choices: Choices) -> tuple[list[Implementation], list[LeftOut]]:
    budget = {} if choices.chunk_mib is None else {"chunk_mib": choices.chunk_mib}

    def forward_of(store_free: bool, impl: str):
        def forward(inputs: Inputs) -> Tensor:
            how = {"store_free": store_free, "impl": impl, **budget}
            if not op.gradient:
                return generic_labels(
                    inputs.base.hidden,
                    inputs.reinforced.hidden,
                    ALPHA,
                    base_head=inputs.base.weight,
                    reinforced_head=inputs.reinforced.weight,
                    **how,
                )
            if op.teachers:
                how |= {"teachers": (inputs.base, inputs.reinforced), "combination": Whp(ALPHA)}
            labels = None if op.teachers else inputs.labels
            return linear_combination_loss(*inputs.student, labels, divergence=op.divergence, **how)

        return forward

    # the compiled rows have no mode without stored logits; "auto" is what runs there
    free_impl = choices.impl if choices.impl in ("reference", "triton") else "auto"
    return [
        Implementation("whp_kernels", "whp_kernels, chunks", forward_of(False, choices.impl), ours=True),
        Implementation(
            "whp_kernels_store_free", "whp_kernels, no logits", forward_of(True, free_impl), ours=True
        ),
    ], []


def _torch(op: Op, dtype: torch.dtype, choices: Choices, left_out: list[LeftOut]) -> list[Implementation]:
    """Eager torch in the tensors' dtype, in float32 (linear ones: from the logits on), and that compiled."""
    narrow = dtype not in (torch.float32, torch.float64)
    plain, upcast = eager(op), eager(op, torch.float32)
    found = [Implementation("eager", f"eager, {_short(dtype)}", plain, baseline=not narrow)]
    if narrow:
        how = "eager, float32 after the products" if op.linear else "eager, float32"
        found.append(Implementation("eager_f32", how, upcast, baseline=not op.linear))
    if choices.compile_backend == "none":
        left_out.append(LeftOut("compile", "--compile-backend none"))
        return found
    compiled = torch.compile(
        _flat(op, torch.float32 if narrow else None), fullgraph=True, backend=choices.compile_backend
    )

    def run_compiled(inputs: Inputs) -> Tensor:
        return compiled(*_tensors(inputs))

    found.append(Implementation("compile", "torch.compile", run_compiled, compiled=True))
    return found


def eager(op: Op, dtype: torch.dtype | None = None) -> Callable[[Inputs], Tensor]:
    """The formula of ``op``; logits (computed or given) in ``dtype`` if that is not None."""
    function = _flat(op, dtype)
    return lambda inputs: function(*_tensors(inputs))


def _flat(op: Op, dtype: torch.dtype | None) -> Callable[..., Tensor]:
    """``eager`` of plain tensors, as torch.compile likes it."""
    formula, linear, teachers, gradient = FORMULAS[op.formula], op.linear, op.teachers, op.gradient

    def of_logits(labels, *logits):
        if dtype is not None:
            logits = [values.to(dtype) for values in logits]
        return formula(*logits, labels)

    def of_hidden(labels, s_hidden, s_weight, b_hidden, b_weight, r_hidden, r_weight):
        student = F.linear(s_hidden, s_weight) if gradient else s_hidden
        base, reinforced = student, student
        if teachers:
            base, reinforced = F.linear(b_hidden, b_weight), F.linear(r_hidden, r_weight)
        return of_logits(labels, student, base, reinforced)

    return of_hidden if linear else of_logits


def _tensors(inputs: Inputs) -> list[Tensor]:
    models = inputs[:3]
    flat = [tensor for model in models for tensor in (model if isinstance(model, Model) else [model])]
    return [inputs.labels, *flat]


class BareProducts(Implementation):
    """The matrix products of a linear operation and nothing else: what no implementation can go below."""

    def backward(self, loss: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
        hidden, weight = inputs.student
        return loss @ weight.detach(), loss.t() @ hidden.detach()


def _only_backward(op: Op) -> Callable[[Inputs], Tensor]:
    def forward(inputs: Inputs) -> Tensor:
        logits = None
        with torch.no_grad():
            models = (*((inputs.student,) if op.gradient else ()), *(inputs[1:3] if op.teachers else ()))
            for hidden, weight in models:  # one after the other into the same memory
                if logits is None:
                    logits = hidden.new_empty((hidden.shape[0], weight.shape[0]))
                torch.mm(hidden, weight.t(), out=logits)
        return logits

    return forward


# ------------------------------------------------------------------------------------------------------ peers


def _torch_linear_ce(op: Op, choices: Choices) -> Implementation | str | None:
    """``torch.nn.functional.linear_cross_entropy``; hard labels of the teachers by eager products before."""
    if not op.linear or not op.gradient:
        return None
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy; 2.13 has"
    soft = op.formula == "whp_soft"
    if soft and tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 14):
        return f"linear_cross_entropy of torch {torch.__version__} takes no probabilities; that of 2.14 does"

    def forward(inputs: Inputs) -> Tensor:
        labels = inputs.labels
        if op.teachers:
            target = whp_target(F.linear(*inputs.base), F.linear(*inputs.reinforced))
            labels = target.softmax(dim=-1) if soft else target.argmax(dim=-1)
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(*inputs.student, labels, options=options)

    return Implementation("torch_linear_ce", "torch linear_cross_entropy", forward, cross_entropy_loss=soft)


def _liger(op: Op, choices: Choices) -> Implementation | str | None:
    """Liger-Kernel's losses; what it has no kernel for (the target) in eager torch."""
    names = {
        "whp_soft": "LigerKLDIVLoss",
        "whp_hard": "LigerCrossEntropyLoss",
        "label_ce": "LigerCrossEntropyLoss",
        "jsd": "LigerJSD",
        "linear_whp_hard": "LigerFusedLinearCrossEntropyLoss",
        "linear_ce": "LigerFusedLinearCrossEntropyLoss",
    }
    if op.name not in names:
        return None
    reason = _gpu_package("liger_kernel", "liger-kernel", choices.device)
    if reason is not None:
        return reason
    import liger_kernel.transformers as liger

    if op.name == "whp_soft":
        loss = liger.LigerKLDIVLoss(reduction="batchmean", log_target=True)
    else:
        loss = getattr(liger, names[op.name])()

    def forward(inputs: Inputs) -> Tensor:
        if op.linear:
            labels = inputs.labels
            if op.teachers:
                labels = whp_target(F.linear(*inputs.base), F.linear(*inputs.reinforced)).argmax(dim=-1)
            return loss(inputs.student.weight, inputs.student.hidden, labels)
        if not op.teachers:
            return loss(inputs.student, inputs.labels)
        target = whp_target(inputs.base, inputs.reinforced)
        if op.divergence == "hard":
            return loss(inputs.student, target.argmax(dim=-1))
        return loss(F.log_softmax(inputs.student, dim=-1), F.log_softmax(target, dim=-1))

    return Implementation("liger", "Liger-Kernel", forward)


def _cce(op: Op, choices: Choices) -> Implementation | str | None:
    """cut-cross-entropy; hard labels of the teachers by eager products before."""
    if op.name not in ("linear_ce", "linear_whp_hard"):
        return None
    reason = _gpu_package("cut_cross_entropy", "cut-cross-entropy", choices.device)
    if reason is not None:
        return reason
    from cut_cross_entropy import linear_cross_entropy

    def forward(inputs: Inputs) -> Tensor:
        labels = inputs.labels
        if op.teachers:
            labels = whp_target(F.linear(*inputs.base), F.linear(*inputs.reinforced)).argmax(dim=-1)
        return linear_cross_entropy(*inputs.student, labels)

    return Implementation("cce", "cut-cross-entropy", forward)


def _gpu_package(module: str, package: str, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"{package} needs a GPU"
    if importlib.util.find_spec(module) is None:
        return f"{package} is not installed"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
