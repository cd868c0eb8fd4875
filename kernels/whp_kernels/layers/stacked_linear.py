"""Several linear layers of one input as one matrix product, with weights that stay parameters of their own.

The weights lie behind each other in one storage (``stack_in_memory`` of ``whp_fast.projections`` puts them
there), so together they are one matrix and nothing is copied:

    y  = x W^T      one product, whose columns are the results
    dx = dy W       one product; apart, the others' would be added to the first one's, each sum rounded
    dW = dy^T x     one product, whose rows are the gradients of the weights
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whp_kernels.layers.columns import whole_of


def stacked_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None
) -> tuple[Tensor, ...]:
    """``F.linear(x, weight, bias)`` for each weight; by one product where :func:`are_adjacent` says so.

    Under autocast both x and the weights are cast, as ``F.linear`` does. While ``torch.compile`` traces, each
    weight has its product.

    Args:
        x: [..., H].
        weights: [n, H] each.
        biases: [n] each; None: no biases.

    Returns:
        [..., n] for each weight. Of one product they are columns of one tensor, not contiguous, and must not
        be changed in place.
    """
    weights = tuple(weights)
    biases = () if biases is None else tuple(biases)
    if (
        len(weights) == 1
        or torch.compiler.is_compiling()
        or not are_adjacent(weights)
        or (biases and not are_adjacent(biases))
        or weights[0].device != x.device
    ):
        given = biases or (None,) * len(weights)
        return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, given))
    tensors = (*weights, *biases)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors)):
        return _StackedLinear.apply(x, len(weights), *tensors)
    y = F.linear(x, _stack(weights), _stack(biases) if biases else None)
    return y.split([len(weight) for weight in weights], -1)


def are_adjacent(tensors: Sequence[Tensor]) -> bool:
    """Whether plain contiguous tensors [n, ...] lie behind each other in one storage, in their order, and all
    ask for a gradient or none does. False for a subclass: shards of DTensor, quantised weights."""
    first = tensors[0]
    place = first.storage_offset()
    for t in tensors:
        if type(t) not in (Tensor, nn.Parameter) or t.dim() == 0 or not t.is_contiguous():
            return False
        if (t.dtype, t.device, t.shape[1:]) != (first.dtype, first.device, first.shape[1:]):
            return False
        if t.requires_grad != first.requires_grad or t.storage_offset() != place:
            return False
        if t.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return False
        place += t.numel()
    return True


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Adjacent tensors as one, without autograd."""
    first = tensors[0].detach()
    rows = sum(len(t) for t in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


class _StackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, count, *tensors):
        weights, biases = tensors[:count], tensors[count:]
        ctx.rows = [len(weight) for weight in weights]
        ctx.dtypes = x.dtype, weights[0].dtype, biases[0].dtype if biases else None
        matrix, bias = _stack(weights), _stack(biases) if biases else None
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            x, matrix = x.to(dtype), matrix.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        kept = [x] if ctx.needs_input_grad[2] else []
        ctx.cast = matrix.dtype != weights[0].dtype
        # weights as they are: that one of them was changed before the backward pass is then seen
        if ctx.needs_input_grad[0]:
            kept += [matrix] if ctx.cast else weights
        ctx.save_for_backward(*kept)
        return tuple(F.linear(x, matrix, bias).split(ctx.rows, -1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        kept = list(ctx.saved_tensors)
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        x_too, _, weights_too = ctx.needs_input_grad[:3]
        biases_too = bias_dtype is not None and ctx.needs_input_grad[2 + len(ctx.rows)]
        g_x, g_weights = None, [None] * len(ctx.rows)
        g_biases = [] if bias_dtype is None else [None] * len(ctx.rows)
        x = kept.pop(0) if weights_too else None
        with torch.autocast(grads[0].device.type, enabled=False):
            g = whole_of(grads)
            g = g.reshape(-1, g.shape[-1])
            if x_too:
                g_x = (g @ (kept[0] if ctx.cast else _stack(kept))).to(x_dtype)
                g_x = g_x.view(*grads[0].shape[:-1], -1)
            if weights_too:
                g_weights = (g.t() @ x.reshape(-1, x.shape[-1])).to(weight_dtype).split(ctx.rows)
            if biases_too:
                g_biases = g.sum(0).to(bias_dtype).split(ctx.rows)
        return g_x, None, *g_weights, *g_biases
