"""Fused losses over large vocabularies for unlearning and distillation; usable without the trainer.

Importing this needs torch alone; Triton and the compiled extension are loaded when a loss first needs them.
"""

from whp_kernels.losses import *  # noqa: F403
from whp_kernels.losses import __all__  # noqa: F401
