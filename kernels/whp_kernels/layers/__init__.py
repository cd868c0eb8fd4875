"""Layers of a Llama with forward and backward in one pass each: RMSNorm, RoPE, SwiGLU, causal attention.

``reference.py`` defines them in plain torch, for any device and up to float64; ``cpp.py`` are the same
functions compiled for the CPU (csrc/cpu), ``triton`` for GPUs; ``dispatch.py`` is the one place where a
backend is chosen. ``stacked_linear`` makes one matrix product of projections that read the same input.
"""

from whp_kernels.layers.attention import (
    causal_attention,
    has_causal_attention,
    packed_causal_attention,
)
from whp_kernels.layers.embedding import embedding
from whp_kernels.layers.rms_norm import residual_rms_norm, rms_norm
from whp_kernels.layers.rope import rope
from whp_kernels.layers.stacked_linear import are_adjacent, stacked_linear
from whp_kernels.layers.swiglu import swiglu

__all__ = [
    "are_adjacent",
    "causal_attention",
    "embedding",
    "has_causal_attention",
    "packed_causal_attention",
    "residual_rms_norm",
    "rms_norm",
    "rope",
    "stacked_linear",
    "swiglu",
]
