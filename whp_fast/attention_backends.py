"""The functions that compute attention over packed sequences, each as its library wants to be called.

    name          library                                     takes
    flash-attn-4  flash_attn.cute, compiled when first called 16 bits, GPUs from Hopper on
    flash-attn    flash_attn 2                                16 bits, GPUs from Ampere on
    varlen        torch.nn.attention.varlen                   16 bits, GPUs from Ampere on
    sdpa          scaled_dot_product_attention                everything, a call for each run of equal lengths
    compiled      whp_kernels.layers (csrc/cpu)               CPUs with AVX-512

All are causal within each sequence. A window counts the query's own place, so the libraries, which count the
keys to its left, are given one less.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from whp_kernels import extension
from whp_kernels.layers import has_causal_attention, packed_causal_attention

from whp_fast.attention_dense import LONGEST_BLOCKED, dense_attention
from whp_fast.packing import Packing

Run = Callable[[Tensor, Tensor, Tensor, Packing, int | None], Tensor]
NAMES = ("flash-attn", "flash-attn-4", "varlen", "sdpa", "compiled")
_HALF = (torch.bfloat16, torch.float16)


class Unavailable(Exception):
    """A backend that is not there. Its text: why; ``mend``: what would bring it."""

    def __init__(self, why: str, mend: str = ""):
        super().__init__(why)
        self.mend = mend


@dataclass(frozen=True)
class Backend:
    """One way to compute attention over packed sequences.

    Attributes:
        name, why: for people.
        run: (q, k, v, packing, window) -> out, as :func:`whp_fast.attention.attention`.
        widest: it takes heads of a width up to this that is a multiple of 8; 0: of any width.
        windows: whether it takes a window.
    """

    name: str
    why: str
    run: Run
    widest: int = 0
    windows: bool = True

    def serves(self, width: int, window: int | None) -> bool:
        """Whether it takes heads of this width, and this window."""
        return (not self.widest or (width <= self.widest and width % 8 == 0)) and (
            self.windows or window is None
        )


def make(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of a name.

    Raises:
        Unavailable: it does not take this device or dtype, or its library is not installed.
    """
    makers = {
        "flash-attn": _flash_attn,
        "flash-attn-4": _flash_attn_4,
        "varlen": _varlen,
        "sdpa": _sdpa,
        "compiled": _compiled,
    }
    return makers[name](device, dtype)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (0, 0) for anything else."""
    if device.type != "cuda" or torch.version.cuda is None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


# -------------------------------------------------------------------------------------------------- on a GPU


def _flash_attn(device: torch.device, dtype: torch.dtype) -> Backend:
    _refuse_but_half(device, dtype, (8, 0))
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:  # of flash-attn-4 alone, too: it has no such name there
        raise Unavailable(_line(error), "pip install flash-attn --no-build-isolation") from error

    def run(q, k, v, packing, window):
        ends, longest = packing.cu_seqlens, packing.max_length
        return flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=ends,
            cu_seqlens_k=ends,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )

    return Backend("flash-attn", "flash-attn 2 is installed", run, widest=256)


def _flash_attn_4(device: torch.device, dtype: torch.dtype) -> Backend:
    _refuse_but_half(device, dtype, (9, 0))
    major = capability(device)[0]
    if major not in (9, 10, 11):
        raise Unavailable(f"it has no kernels for compute capability {major}.x")
    try:
        from flash_attn.cute import flash_attn_varlen_func
    except ImportError as error:
        raise Unavailable(_line(error), "pip install --pre flash-attn-4") from error
    on_blackwell = major >= 10

    def run(q, k, v, packing, window):
        ends, longest = packing.cu_seqlens, packing.max_length
        out = flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=ends,
            cu_seqlens_k=ends,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=True,
            window_size=(None, None) if window is None else (window - 1, 0),
            # its backward pass for Hopper refuses the flag
            deterministic=on_blackwell and torch.are_deterministic_algorithms_enabled(),
        )
        return out[0] if isinstance(out, tuple) else out  # some versions give the log-sum-exp too

    # its backward pass for Hopper knows no window
    return Backend("flash-attn-4", "flash-attn 4 is installed", run, widest=128, windows=on_blackwell)


def _varlen(device: torch.device, dtype: torch.dtype) -> Backend:
    _refuse_but_half(device, dtype, (8, 0))
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Unavailable(_line(error), "pip install torch>=2.11") from error
    takes = inspect.signature(varlen_attn).parameters
    by_window, grouped = "window_size" in takes, "enable_gqa" in takes

    def run(q, k, v, packing, window):
        ends, longest = packing.cu_seqlens, packing.max_length
        how = {}
        if by_window:
            how["window_size"] = (-1, 0) if window is None else (window - 1, 0)
        else:
            how["is_causal"] = True
        if q.shape[1] != k.shape[1]:
            if grouped:
                how["enable_gqa"] = True
            else:
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        # one tensor for both: cuDNN takes it for causal only then
        return varlen_attn(q, k, v, ends, ends, longest, longest, **how)

    return Backend("varlen", "varlen_attn of torch", run, widest=256, windows=by_window)


def _refuse_but_half(device: torch.device, dtype: torch.dtype, least: tuple[int, int]) -> None:
    if device.type != "cuda":
        raise Unavailable(f"it runs on CUDA GPUs, and the device is {device.type}")
    if capability(device) < least:
        raise Unavailable(f"it wants a GPU of compute capability {least[0]}.{least[1]} or more")
    if dtype not in _HALF:
        raise Unavailable(f"it takes bfloat16 and float16, and the products are in {_plain(dtype)}")


# -------------------------------------------------------------------------------------------------- anywhere


def _sdpa(device: torch.device, dtype: torch.dtype) -> Backend:
    why = f"scaled_dot_product_attention, for {_plain(dtype)} on this device"
    if device.type == "cpu" and dtype == torch.bfloat16:
        why = f"blocks of plain products up to {LONGEST_BLOCKED} tokens: faster than torch's kernel"
    return Backend("sdpa", why, _by_runs)


def _by_runs(q: Tensor, k: Tensor, v: Tensor, packing: Packing, window: int | None) -> Tensor:
    """A call for each run of neighbours of one length. One call with a mask would let a NaN of one sequence
    into the others, since a masked key still meets a weight of zero."""
    runs = packing.runs
    if not runs:
        return q.clone()
    sizes = [count * length for _, count, length in runs]
    outs = []
    for parts, (_, count, length) in zip(zip(*(x.split(sizes) for x in (q, k, v))), runs):
        batch = [x.unflatten(0, (count, length)).transpose(1, 2) for x in parts]
        out = dense_attention(*batch, window=window, compiled=False)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _compiled(device: torch.device, dtype: torch.dtype) -> Backend:
    if device.type != "cpu":
        raise Unavailable(f"it runs on the CPU, and the device is {device.type}")
    if not has_causal_attention(dtype):
        here = f"it needs AVX-512, for bfloat16 with BF16, and does not take {_plain(dtype)} here"
        raise Unavailable(extension.reason() or here)

    def run(q, k, v, packing, window):
        return packed_causal_attention(q, k, v, packing.cu_seqlens, window=window)

    return Backend("compiled", "fused, for this processor", run)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
