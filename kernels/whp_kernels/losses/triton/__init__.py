"""The Triton backend, NVIDIA and AMD: ``row_labels``, ``row_losses`` and ``scale_``.

Importing this package imports triton; nothing outside of it does. ``TRITON_INTERPRET=1`` must be set before.
"""

from whp_kernels.losses.triton.rows import RowTile, row_labels, row_losses
from whp_kernels.losses.triton.scale import scale_

__all__ = ["RowTile", "row_labels", "row_losses", "scale_"]
