"""Cross-entropy from hidden states, without logits for the whole batch.

Rows whose label is ignored are left out before any product. Logits exist for one chunk of rows at a time;
each chunk's gradients are formed in the forward pass, where its logits are at hand (the idea of
efficient_cross_entropy, github.com/mgmalek), and scaled in the backward pass.

    loss    = -(1 / denominator) * sum_n log softmax(h_n W^T)[y_n]
    d logit = (softmax - onehot(y)) / denominator
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    denominator: float | None = None,
    ignore_index: int = -100,
    compute_dtype: torch.dtype | None = None,
    chunk_mib: int = 256,
) -> Tensor:
    """Cross-entropy of ``hidden_states @ lm_head_weight.T`` against labels.

    Args:
        hidden_states: [N, H]; its gradient has the same dtype.
        lm_head_weight: [V, H]; may be frozen, then no gradient is computed for it. Its gradient is
            accumulated in float32.
        labels: int64 [N], already shifted: row ``n`` is taught ``labels[n]``.
        denominator: what the sum is divided by; by default the number of labels that are not ignored. Give
            the count over all accumulated micro-batches, and accumulation does not change the loss.
        compute_dtype: dtype of the matrix products; default: that of ``hidden_states``. Logits leave the
            product in float32 (or wider) on a GPU; on the CPU, where torch has no such product, those of a
            narrower dtype are rounded to it once.
        chunk_mib: memory for the logits of one chunk, in MiB.

    Returns:
        scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: shapes that do not fit.
    """
    if hidden_states.ndim != 2 or labels.shape != hidden_states.shape[:1]:
        raise ValueError(
            f"expected hidden_states [N, H] and labels [N], got {tuple(hidden_states.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if lm_head_weight.shape[1] != hidden_states.shape[1]:
        raise ValueError(
            f"hidden_states have width {hidden_states.shape[1]}, lm_head_weight has {lm_head_weight.shape[1]}"
        )
    trained = labels != ignore_index
    if denominator is None:
        denominator = max(1, int(trained.sum()))
    rows = trained.nonzero(as_tuple=True)[0]
    kept = hidden_states.index_select(0, rows)
    return _LinearCrossEntropy.apply(
        kept, lm_head_weight, labels[rows], float(denominator), compute_dtype or kept.dtype, chunk_mib
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, denominator, compute_dtype, chunk_mib):
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        head = weight.to(compute_dtype)
        rows = max(1, (chunk_mib << 20) // (head.shape[0] * 4 * 3))
        total = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs_weight else None
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            chunk = hidden[part].to(compute_dtype)
            target = labels[part].unsqueeze(1)
            logits = _product(chunk, head.t(), wide)
            # both halves are shifted by the row's maximum: log l - (z_y - m) keeps its digits at any offset
            logits -= logits.amax(dim=-1, keepdim=True)
            target_logit = logits.gather(1, target)
            probabilities = logits.exp_()
            sums = probabilities.sum(dim=-1, keepdim=True)
            total += (sums.log() - target_logit).sum()
            if not (needs_hidden or needs_weight):
                continue
            probabilities /= sums
            probabilities.scatter_add_(1, target, torch.full_like(target_logit, -1.0))
            d_logits = probabilities.mul_(1.0 / denominator).to(compute_dtype)
            if needs_hidden:
                d_hidden[part] = (d_logits @ head).to(hidden.dtype)
            if needs_weight:
                d_weight += _product(d_logits.t(), chunk, wide)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total / denominator

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        d_hidden, d_weight = ctx.saved_tensors
        scaled_hidden = None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype)
        scaled_weight = None if d_weight is None else (d_weight * grad).to(ctx.weight_dtype)
        return scaled_hidden, scaled_weight, None, None, None, None


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` with the result in ``dtype``, straight from the accumulator where the device can."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)
