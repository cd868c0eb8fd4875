"""AdamW on DTensors: the numbers of every shard are those of the whole, however it is cut.

torch's fake process group gives every rank's view of a mesh in this process; no number is exchanged.
"""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from whp_kernels import extension
from whp_kernels.optim import AdamW

MOMENTS = ("float32", "bfloat16", "int8")
IMPLS = ("reference", "cpp") if extension.load() is not None else ("reference",)


@contextlib.contextmanager
def mesh_of(rank, *shape):
    world = torch.Size(shape).numel()
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield init_device_mesh("cpu", shape)
    finally:
        dist.destroy_process_group()


def distributed(local, whole, mesh, placements):
    tensor = DTensor.from_local(
        local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return tensor


def start(shape):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * 0.02).bfloat16()


def gradients(shape):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).mul(2).exp().bfloat16() for _ in range(3)]


def train(weights, all_gradients, **options):
    param = torch.nn.Parameter(weights)
    optimizer = AdamW([param], lr=1e-3, weight_decay=0.1, **options)
    for gradient in all_gradients:
        param.grad = gradient
        optimizer.step()
    state = {name: value for name, value in optimizer.state[param].items() if name != "step"}
    return {"master": optimizer.master(param), **state}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("shape, ranks", [((10, 2100), 4), ((5, 1300), 4), ((4, 3, 1100), 2), ((4099,), 3)])
def test_shards_are_rows_of_the_whole(impl, moments, shape, ranks):
    """Uneven, with an empty one (5 rows on 4 processes), and smaller than what keeps float32 moments."""
    whole = train(start(shape), gradients(shape), moments=moments, impl=impl)
    found = []
    for rank in range(ranks):
        with mesh_of(rank, ranks) as mesh:

            def mine(tensor, rank=rank, mesh=mesh):
                parts = tensor.chunk(ranks)
                part = parts[rank] if rank < len(parts) else tensor[:0]
                return distributed(part.clone(), tensor, mesh, [Shard(0)])

            found.append(train(mine(start(shape)), map(mine, gradients(shape)), moments=moments, impl=impl))
    assert set(found[0]) == set(whole)
    for name, expected in whole.items():
        assert torch.equal(torch.cat([shard[name] for shard in found]), expected), name


def test_groups_of_copies_of_shards():
    """HSDP: copies along one dimension of the mesh, shards along the other; and copies alone."""
    shape = (8, 2100)
    whole = train(start(shape), gradients(shape), moments="int8")
    with mesh_of(3, 2, 2) as mesh:
        for placements, rows in (([Replicate(), Shard(0)], slice(4, 8)), ([Replicate()] * 2, slice(0, 8))):

            def mine(tensor, rows=rows, placements=placements, mesh=mesh):
                return distributed(tensor[rows].clone(), tensor, mesh, placements)

            found = train(mine(start(shape)), map(mine, gradients(shape)), moments="int8")
            assert all(torch.equal(found[name], expected[rows]) for name, expected in whole.items())


def test_other_placements_are_refused():
    weights = start((8, 700))
    with mesh_of(0, 3, 2) as mesh:  # not the shape of another test's: DTensor keeps meshes in a cache
        for placements, local in (
            ([Replicate(), Shard(1)], weights[:, :350].contiguous()),
            ([Shard(0), Shard(0)], weights[:2]),
        ):
            param = torch.nn.Parameter(distributed(local, weights, mesh, placements))
            with pytest.raises(ValueError, match="placements"):
                AdamW([param])
        param = torch.nn.Parameter(distributed(weights[:3], weights, mesh, [Replicate(), Shard(0)]))
        with pytest.raises(ValueError, match="has 3 rows, expected 4"):
            AdamW([param])


def test_a_gradient_with_another_placement_is_refused():
    weights = start((8, 700))
    with mesh_of(0, 2) as mesh:
        param = torch.nn.Parameter(distributed(weights[:4], weights, mesh, [Shard(0)]))
        optimizer = AdamW([param])
        param.grad = distributed(weights.clone(), weights, mesh, [Replicate()])
        with pytest.raises(ValueError, match="a gradient has the placements"):
            optimizer.step()
        param.grad = distributed(weights[:4].clone(), weights, mesh, [Shard(0)])
        scale = distributed(torch.ones(1), torch.ones(1), mesh, [Replicate()])
        with pytest.raises(ValueError, match="plain tensor"):
            optimizer.step(scale)
        assert optimizer.state[param]["step"] == 0
