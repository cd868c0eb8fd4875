"""Attention over packed sequences: one function, and the one place where its backend is chosen.

``auto`` takes the first of these that is there:

    device                          in this order
    GPU, compute capability 10, 11  flash-attn-4, flash-attn, varlen, sdpa
    GPU, compute capability 8, 9    flash-attn, varlen, sdpa
    CPU                             compiled, sdpa

flash-attn 4 has kernels of its own for Blackwell, where flash-attn 2 runs what was written for Ampere. On
Hopper it is a pre-release whose backward pass takes neither windows nor the deterministic mode, and
attention is 1 % of the work at a context of 512: there it is used only when it is asked for. ``varlen`` comes
with torch (cuDNN, or torch's own copy of flash-attn 2), so nothing has to be installed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whp_fast import attention_backends
from whp_fast.attention_backends import NAMES, Backend, Unavailable
from whp_fast.errors import UserError
from whp_fast.packing import Packing

SETTINGS = ("auto", *NAMES)

_wanted = "auto"
_resolved: dict[tuple[torch.device, torch.dtype], Backend] = {}


def attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, window: int | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, causal within each sequence; sequences never see each other.

    Args:
        q: [tokens, heads, D].
        k, v: [tokens, kv_heads, D] on the device and in the dtype of q; kv_heads divides heads.
        packing: of the tokens, on the same device.
        window: a query sees this many keys, its own place included; None: all before it.

    Returns:
        [tokens, heads, D] in the dtype of q.
    """
    if window is not None and window >= packing.max_length:
        window = None
    chosen = resolve(q.device, q.dtype)
    if not chosen.serves(q.shape[-1], window):
        chosen = attention_backends.make("sdpa", q.device, q.dtype)
    return chosen.run(q, k, v, packing, window)


def choose(setting: str, device: torch.device, dtype: torch.dtype) -> None:
    """What ``model.attention`` says, for this process.

    A dtype that the named backend never takes (float32 in the label stage, where training is in bfloat16) is
    left to ``auto``.

    Args:
        device, dtype: of the training.

    Raises:
        UserError: there is no such backend, or it is not there for this device and dtype.
    """
    global _wanted
    if setting not in SETTINGS:
        raise UserError(f"model.attention: {setting!r} is none of {', '.join(SETTINGS)}; set one of them.")
    if setting != "auto":
        try:
            attention_backends.make(setting, device, dtype)
        except Unavailable as why:
            mend = f"run `{why.mend}`, or " if why.mend else ""
            raise UserError(
                f"model.attention: {setting} cannot be used ({why}); {mend}set model.attention auto."
            ) from why
    _wanted = setting
    _resolved.clear()


def backend(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(name, why) of the backend of a device and dtype."""
    chosen = resolve(device, dtype)
    return chosen.name, "model.attention" if chosen.name == _wanted else chosen.why


def resolve(device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of a device and dtype: looked for once, then known."""
    found = _resolved.get((device, dtype))
    if found is None:
        found = _resolved[device, dtype] = _first_there(device, dtype)
    return found


def _first_there(device: torch.device, dtype: torch.dtype) -> Backend:
    for name in (*(() if _wanted == "auto" else (_wanted,)), *_order(device)):
        try:
            return attention_backends.make(name, device, dtype)
        except Unavailable:
            continue
    raise AssertionError("sdpa takes everything")


def _order(device: torch.device) -> tuple[str, ...]:
    if device.type != "cuda":
        return ("compiled", "sdpa")
    if attention_backends.capability(device)[0] in (10, 11):
        return ("flash-attn-4", "flash-attn", "varlen", "sdpa")
    return ("flash-attn", "varlen", "sdpa")
