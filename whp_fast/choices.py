"""What a job will run on and with, and why: the table that is shown before the first stage."""

from __future__ import annotations

import torch
from rich.markup import escape
from whp_kernels import backends
from whp_kernels.gemm import from_accumulator
from whp_kernels.layers.fp8 import has_fp8

from whp_fast import attention
from whp_fast.config import JobConfig
from whp_fast.processes import Processes
from whp_fast.progress import say


def choices(config: JobConfig, device: torch.device, processes: Processes) -> list[tuple[str, str, str]]:
    """(what, choice, why) of everything that was decided for this job."""
    memory, compute = config.memory, config.model.compute_dtype
    weights = memory.weights_dtype(compute)
    loss = _loss_backend(device)
    rows = [
        ("losses", loss, _why_loss(device, loss)),
        ("matrix products", compute, _why_products(device, compute)),
        *_products_in_8_bits(config, device),
        ("attention", *attention.backend(device, getattr(torch, compute))),
    ]
    if memory.lora_rank:
        frozen = compute if memory.frozen == "auto" else memory.frozen
        rows.append(("trained", f"adapters of rank {memory.lora_rank}", "memory.lora_rank"))
        rows.append(("frozen base", frozen, f"memory.frozen is {memory.frozen}"))
    else:
        exact = (
            "with 16-bit remainders: an exact float32 master"
            if weights == "bfloat16"
            else "the master itself"
        )
        rows.append(("weights", weights, f"{exact} (memory.weights is {memory.weights})"))
    if memory.optimizer == "bitsandbytes":
        rows.append(("optimizer", "AdamW, 8-bit moments", "memory.optimizer is bitsandbytes"))
    else:
        host = ", in host memory" if memory.offload_moments else ""
        rows.append(("optimizer", f"AdamW, {memory.moments} moments{host}", "memory.moments"))
    rows.append(("layers", *_layers(config)))
    rows.append(("checkpointing", memory.checkpointing, "memory.checkpointing"))
    rows.append(("processes", str(processes.world_size), _sharding(config, processes)))
    return rows


def tell_choices(config: JobConfig, device: torch.device, processes: Processes) -> None:
    """The same for people, a line each."""
    for what, choice, why in choices(config, device, processes):
        say(f"  {what:<15}  {choice:<28}  [dim]{escape(why)}[/dim]")


def _loss_backend(device: torch.device) -> str:
    available = {name for name, state in backends().items() if state == "available"}
    wanted = "triton" if device.type == "cuda" else "cpp"
    return wanted if wanted in available else "reference"


def _why_loss(device: torch.device, chosen: str) -> str:
    if chosen != "reference":
        return {"triton": "fused kernels for this GPU", "cpp": "fused kernels for this processor"}[chosen]
    missing = "triton" if device.type == "cuda" else "cpp"
    return f"eager torch, slow: {missing} {backends()[missing]}"


def _why_products(device: torch.device, compute: str) -> str:
    if compute == "float32":
        return "model.compute_dtype"
    if from_accumulator(torch.bfloat16, device):
        return "model.compute_dtype; logits keep their float32 sums"
    return "model.compute_dtype; logits from float32 copies, this device has no such product"


def _products_in_8_bits(config: JobConfig, device: torch.device) -> list[tuple[str, str, str]]:
    how = "head and losses as they are" if has_fp8(device) else "emulated and slow: no such products here"
    asked = (("fp8 in training", "model", config.model.fp8), ("fp8 in labels", "label", config.label.fp8))
    return [(what, scaling, f"{section}.fp8; {how}") for what, section, scaling in asked if scaling != "off"]


def _layers(config: JobConfig) -> tuple[str, str]:
    if config.model.layers == "compile":
        return "compiled blocks", "model.layers; the first step waits for the compiler"
    return "fused kernels", "model.layers"


def _sharding(config: JobConfig, processes: Processes) -> str:
    if not processes.several:
        return "nothing is sharded"
    if config.memory.lora_rank:
        return "each holds the frozen base; gradients of the adapters are added up"
    if config.memory.replicas > 1:
        return f"{config.memory.replicas} groups that hold the shards (HSDP)"
    return "weights, gradients and moments sharded (FSDP2)"
