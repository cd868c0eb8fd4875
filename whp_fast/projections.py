"""Several linear layers that read the same input, as one call: queries, keys and values; gate and up."""

from __future__ import annotations

from torch import Tensor, nn


def project(x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """What each of some linear layers makes of x.

    Args:
        x: [..., H].
        linears: layers [n, H], plain, with adapters, or quantised.

    Returns:
        [..., n] for each.
    """
    return tuple(linear(x) for linear in linears)
