"""AdamW whose weights are an exact float32 master, also where the parameters are bfloat16."""

from whp_kernels.optim.adamw import AdamW
from whp_kernels.optim.split import join, split

__all__ = ["AdamW", "join", "split"]
