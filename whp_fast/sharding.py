"""A model divided among processes (FSDP2), and the rows of its tensors that a process holds.

Each block, the embedding, and the rest (norm and head) are gathered and freed together, as torchtitan does.
Gradients are reduced in float32 and added, not averaged: the loss is divided by the global number of trained
positions, so the number of processes never changes it. Frozen models are sharded the same way.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from whp_kernels.optim.sharding import first_row, is_sharded, local

from whp_fast.checkpoint import read_tensors
from whp_fast.errors import UserError
from whp_fast.model import Llama
from whp_fast.model_config import LlamaConfig
from whp_fast.processes import Processes


def process_mesh(processes: Processes, device: torch.device, replicas: int) -> DeviceMesh:
    """Processes in a row, or with ``replicas`` in as many rows of which each holds all shards (HSDP).

    Raises:
        UserError: the number of processes does not divide.
    """
    if processes.world_size % replicas:
        raise UserError(
            f"memory.replicas: {processes.world_size} processes do not divide into {replicas} groups; set a "
            "divisor of the number of processes."
        )
    if replicas == 1:
        return init_device_mesh(device.type, (processes.world_size,), mesh_dim_names=("shard",))
    shape = (replicas, processes.world_size // replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replica", "shard"))


def shard(model: Llama, mesh: DeviceMesh, compute_dtype: torch.dtype, *, trained: bool = True) -> None:
    """Divide the parameters of ``model`` (best on the meta device) along their dimension 0, in place.

    Args:
        compute_dtype: what gathered parameters are cast to.
        trained: gradients will be reduced; a frozen model is freed after each forward pass.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    modules: list[nn.Module] = list(model.model.layers)
    if not model.config.tie_word_embeddings:
        modules.append(model.model.embed_tokens)
    for module in modules:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # the head is read by the loss after the forward pass, so the root keeps its parameters until the backward
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden_states")
    # it warns of changing the hidden states in place, which nobody does
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    if trained:
        for module in (*modules, model):
            module.set_gradient_divide_factor(1.0)
            if mesh.device_type == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo cannot divide while it adds


def read_rows(
    folder: Path, config: LlamaConfig, parameters: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The rows of every parameter that this process holds, name by name, read from a model folder.

    Raises:
        UserError: see ``read_tensors``.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for name, reader in read_tensors(folder, config, wanted):
        first = first_row(parameters[name])
        yield name, reader.rows(first, first + len(local(parameters[name])), dtype)


def whole(like: Tensor, rows: Tensor) -> Tensor:
    """``rows`` of all processes put together, where they lie as those of ``like`` do. A collective."""
    if not is_sharded(like):
        return rows
    sharded = DTensor.from_local(
        rows,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return sharded.full_tensor()


def holds_first_copy(tensor: Tensor, processes: Processes) -> bool:
    """Whether these rows are this process's to save: with replicas, those of the first group are."""
    if not is_sharded(tensor):
        return processes.first
    return tensor.device_mesh.ndim == 1 or tensor.device_mesh.get_local_rank(0) == 0
