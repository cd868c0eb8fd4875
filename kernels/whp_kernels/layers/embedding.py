"""Token embedding whose result, and whose gradient's sums, may be wider than its weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding(input_ids: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rows of the weight, in ``dtype``.

    A frequent token gets its gradient from thousands of places. torch's backward on the CPU adds them up in
    the dtype of the weight, where in bfloat16 the later ones are rounded away; here the sums are float32 or
    wider, and autograd rounds them to what the parameter asks for.

    Args:
        input_ids: int64, any shape.
        weight: [V, H].
        dtype: of the result; default: that of the weight.

    Returns:
        [*input_ids.shape, H].
    """
    dtype = dtype or weight.dtype
    if weight.device.type != "cpu" or weight.dtype in (torch.float32, torch.float64):
        return F.embedding(input_ids, weight).to(dtype)  # sums are wide there
    return _Embedding.apply(input_ids, weight, dtype)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_ids, weight, dtype):
        ctx.save_for_backward(input_ids)
        ctx.rows = len(weight)
        return F.embedding(input_ids, weight).to(dtype)

    @staticmethod
    def backward(ctx, g):
        (input_ids,) = ctx.saved_tensors
        g = g.flatten(0, -2).to(torch.promote_types(g.dtype, torch.float32))
        g_weight = torch.zeros(ctx.rows, g.shape[-1], dtype=g.dtype)
        return None, g_weight.index_add_(0, input_ids.flatten(), g), None
