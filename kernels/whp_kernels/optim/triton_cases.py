"""The AdamW kernel with every format, for ``benchmarks/compile_report.py``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from whp_kernels.losses.triton.catalogue import Case
from whp_kernels.optim.moments import scale_shape
from whp_kernels.optim.triton import adamw_launch
from whp_kernels.optim.update import Numbers, Tensors

_SHAPE = (4096, 11008)
_NUMBERS = {"lr": 1e-6, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def cases() -> Iterator[Case]:
    """bfloat16 and float32 weights, with gradients of the same dtype and, of bfloat16 ones, of float32."""
    for moments in ("float32", "bfloat16", "int8"):
        for weights, gradient in (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")):
            launch = adamw_launch(_tensors(moments, weights, gradient), Numbers.of(_NUMBERS, 2, 1))
            name = f"{weights}, gradient {gradient}, moments {moments}"
            yield Case(name, "1 x 1024", launch, quick=weights == "bfloat16" == gradient)


def _tensors(moments: str, weights: str, gradient: str) -> Tensors:
    codes = moments == "int8"
    scales = _meta("float32", *scale_shape(_SHAPE)) if codes else None
    return Tensors(
        weights=_meta(weights, *_SHAPE),
        gradient=_meta(gradient, *_SHAPE),
        exp_avg=_meta(moments, *_SHAPE),
        exp_avg_sq=_meta("uint8" if codes else moments, *_SHAPE),
        exp_avg_scale=scales,
        exp_avg_sq_scale=scales,
        remainder=_meta("int16", *_SHAPE) if weights == "bfloat16" else None,
        grad_scale=_meta("float32", 1),
    )


def _meta(dtype: str, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
