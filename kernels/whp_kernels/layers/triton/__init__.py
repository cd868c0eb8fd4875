"""The layers in Triton, NVIDIA and AMD: the functions of ``reference.py`` for float32, bfloat16, float16.

Importing this package imports triton; nothing outside of it does. ``TRITON_INTERPRET=1`` must be set before.
"""

from whp_kernels.layers.triton.rms_norm import rms_norm, rms_norm_backward
from whp_kernels.layers.triton.rope import rope_heads
from whp_kernels.layers.triton.swiglu import swiglu, swiglu_backward

__all__ = ["rms_norm", "rms_norm_backward", "rope_heads", "swiglu", "swiglu_backward"]
