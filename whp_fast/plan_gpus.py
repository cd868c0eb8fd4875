"""What the planned times stand on: a table of GPUs, and the share of their peak that a training is taken to
reach.

Memory and bandwidth are the makers' figures (1 GB = 1e9 bytes). An 80 GB card holds a little more than that;
the difference is left for the CUDA context and for holes between tensors. Peaks are dense, without the
doubling for sparse matrices, with float32 accumulation.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from dataclasses import dataclass

import torch

from whp_fast.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One kind of device.

    Attributes:
        name: as it is given to ``--gpu``.
        memory: bytes.
        bfloat16: dense peak of bfloat16 products, FLOP/s; 0: not known, no times are told.
        float32: peak of float32 products, FLOP/s (no TF32).
        bandwidth: of its memory, bytes/s.
        link: to the other GPUs of the machine, bytes/s one way.
        share: of the bfloat16 peak that a training of a 7B model is assumed to reach.
    """

    name: str
    memory: float
    bfloat16: float
    float32: float
    bandwidth: float
    link: float
    share: float


FLOAT32_SHARE = 0.6
"""Of the float32 peak; assumed."""
HOST_LINK = 20e9
"""Bytes/s between host and GPU memory (PCIe 4 with 16 lanes); assumed."""

_NVLINK, _PCIE = 250e9, 20e9

# Shares: published trainings of 7B models reach 40-46 % on H100 (60 % with kernels written for it) and 55-68
# % on A100 (llm-foundry, fms-fsdp), 60-70 % on RTX 4090 (llmq). Those of the other cards are guesses between
# these.
GPUS = (
    Gpu("RTX4090", 24e9, 165e12, 82.6e12, 1.008e12, _PCIE, 0.55),
    Gpu("L4", 24e9, 121e12, 30.3e12, 0.3e12, _PCIE, 0.45),
    Gpu("RTX5090", 32e9, 209e12, 105e12, 1.79e12, _PCIE, 0.5),
    Gpu("A100-40", 40e9, 312e12, 19.5e12, 1.555e12, _NVLINK, 0.5),
    Gpu("A6000", 48e9, 155e12, 38.7e12, 0.768e12, _PCIE, 0.5),
    Gpu("L40S", 48e9, 362e12, 91.6e12, 0.864e12, _PCIE, 0.4),
    Gpu("A100-80", 80e9, 312e12, 19.5e12, 2.039e12, _NVLINK, 0.5),
    Gpu("H100", 80e9, 989e12, 67e12, 3.35e12, _NVLINK, 0.4),
    Gpu("H100-PCIe", 80e9, 756e12, 51e12, 2.0e12, _PCIE, 0.4),
    Gpu("H200", 141e9, 989e12, 67e12, 4.8e12, _NVLINK, 0.4),
    Gpu("B200", 180e9, 2250e12, 75e12, 8.0e12, 2 * _NVLINK, 0.35),
)


def find_gpu(name: str) -> Gpu:
    """The GPU of that name: one of the table's, in which capitals, spaces and dashes do not count, or the
    name that the driver tells ("NVIDIA A100-SXM4-80GB").

    Raises:
        UserError: not in the table (with the nearest name).
    """
    known = {_key(gpu.name): gpu for gpu in GPUS}
    key = _key(name)
    if key in known:
        return known[key]
    if name.lower().startswith("nvidia"):  # a driver's name says more ("H100 80GB HBM3")
        for part in sorted(known, key=len, reverse=True):
            if re.match(rf"{part}(?!\d|s|ti)", key):  # an L4 is no L40
                return known[part]
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
    names = ", ".join(gpu.name for gpu in GPUS)
    raise UserError(
        f"--gpu: {name!r} is not in the table; did you mean {known[nearest].name}? The table has {names}."
    )


def device_at_hand() -> Gpu:
    """The first GPU of this machine, with the speed of the table's entry; or the host's memory.

    A card that the table does not have gets no times.
    """
    if not torch.cuda.is_available():
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Gpu("this machine's memory (no GPU)", memory, 0, 0, 0, 0, 0)
    found = torch.cuda.get_device_properties(0)
    try:
        gpu = find_gpu(found.name)
    except UserError:
        return Gpu(found.name, found.total_memory, 0, 0, 0, 0, 0)
    # The table's figure where it is smaller: the context needs its room here too.
    return dataclasses.replace(gpu, name=found.name, memory=min(gpu.memory, found.total_memory))


def _key(name: str) -> str:
    """rtx4090 for "NVIDIA GeForce RTX 4090", a10080 for "NVIDIA A100-SXM4-80GB", h100 for "H100 80GB"."""
    key = name.lower().replace("a100-pcie", "a100").replace("rtx a", "a")
    key = re.sub(r"\b(\d+) ?gb", r"\1" if "a100" in key else "", key)  # the A100 comes in two sizes
    return re.sub(r"nvidia|geforce|sxm\d?|[\s_-]", "", key)
