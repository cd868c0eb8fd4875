"""A model divided among processes (FSDP2), and the rows of its tensors that a process holds.

Each block, the embedding, and the rest (norm and head) are gathered and freed together, as torchtitan does.
Gradients are reduced in float32 and added, not averaged: the loss is divided by the global number of trained
positions, so the number of processes never changes it. Frozen models are sharded the same way.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from whp_fast.errors import UserError
from whp_fast.model import Llama
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


def local(tensor: Tensor) -> Tensor:
    """The rows of ``tensor`` that this process holds; all of them when it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """The number, in the whole tensor, of the first row that this process holds."""
    if not isinstance(tensor, DTensor):
        return 0
    mesh = tensor.device_mesh
    shards, mine = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    return min(mine * math.ceil(tensor.shape[0] / shards), tensor.shape[0])


def whole(like: Tensor, rows: Tensor) -> Tensor:
    """``rows`` of all processes put together, where they lie as those of ``like`` do. A collective."""
    if not isinstance(like, DTensor):
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
    if not isinstance(tensor, DTensor):
        return processes.first
    return tensor.device_mesh.ndim == 1 or tensor.device_mesh.get_local_rank(0) == 0
