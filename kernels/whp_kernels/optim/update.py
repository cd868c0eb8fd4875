"""What a backend is given for one step of one parameter: numbers, and tensors of one shard.

A backend is a function ``update(tensors, numbers)`` that does, in float32 and with these roundings,

    g = gradient * grad_scale
    w = w * decay                             decay      = 1 - lr weight_decay
    m = fma(weight, g - m, m)                 weight     = 1 - beta1   (from beta1 = 0.5 downwards:
                                              m = fma(weight - 1, g - m, g))
    v = fma(share2 * g, g, v * beta2)         share2     = 1 - beta2
    w = w + (rate * m) / (sqrt(v) / correction + eps)
                                              rate       = -lr / (1 - beta1^step)
                                              correction = sqrt(1 - beta2^step)

where fma is rounded once, every other operation to nearest, and the numbers on the right are computed in
float64 and rounded to float32. These are, bit for bit, the roundings of ``torch.optim.AdamW(fused=True)`` in
float32 on the CPU (torch 2.13, a processor with FMA), but for the last elements of a tensor that do not fill
a vector there. Its ``foreach`` and plain loops take square roots that are a unit in the last place off for a
fifth of all numbers where torch calls MKL, so they cannot be met.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from whp_kernels.optim.moments import key_of


class Numbers(NamedTuple):
    """The numbers of a step, each one a float32 number.

    Attributes:
        weight: of the fma, 1 less where ``from_gradient``.
        from_gradient: the fma starts from the gradient.
        key: of the random bits.
    """

    decay: float
    weight: float
    beta2: float
    share2: float
    correction: float
    eps: float
    rate: float
    from_gradient: bool
    key: int

    @classmethod
    def of(cls, group: dict[str, Any], step: int, number: int) -> Numbers:
        """For parameter ``number`` of the optimizer, in ``group``, at its ``step`` (from 1 on)."""
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        weight = _float32(1 - beta1)
        from_gradient = weight >= 0.5
        return cls(
            decay=_float32(1 - lr * group["weight_decay"]),
            weight=_float32(weight - 1) if from_gradient else weight,
            beta2=_float32(beta2),
            share2=_float32(1 - beta2),
            correction=_float32((1 - beta2**step) ** 0.5),
            eps=_float32(group["eps"]),
            rate=_float32(-(lr / (1 - beta1**step))),
            from_gradient=from_gradient,
            key=key_of(step, number),
        )


@dataclass(frozen=True)
class Tensors:
    """The local tensors of one parameter, all contiguous and [R, ...]; all but the gradient are written.

    Attributes:
        weights: float32, or bfloat16 beside a remainder [R, C].
        gradient: float32 or bfloat16 [R, C].
        exp_avg, exp_avg_sq: float32, bfloat16, or int8 and uint8 codes [R, C].
        exp_avg_scale, exp_avg_sq_scale: float32 [R, ceil(C / 1024)] beside codes, else None.
        remainder: int16 [R, C] beside bfloat16 weights, else None.
        grad_scale: float32 [1] on the device of the weights; None: 1.
        first: number of the first element within the whole parameter.
    """

    weights: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_scale: Tensor | None = None
    exp_avg_sq_scale: Tensor | None = None
    remainder: Tensor | None = None
    grad_scale: Tensor | None = None
    first: int = 0

    STATE = ("remainder", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors that the optimizer keeps, by their names in its state."""
        named = {name: getattr(self, name) for name in self.STATE}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def pieces(self, elements: int) -> Iterator[Tensors]:
        """Rows with at most ``elements`` elements at a time, but at least one row."""
        rows, columns = self.weights.shape
        step = max(elements // columns, 1)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            yield replace(
                self,
                weights=self.weights[part],
                gradient=self.gradient[part],
                first=self.first + start * columns,
                **{name: tensor[part] for name, tensor in self.state.items()},
            )


def _float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]
