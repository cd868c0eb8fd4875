"""What ``benchmarks.layers`` measures: the layers, and who computes them."""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is needed from the Hub

import torch
import torch.nn.functional as F
from torch import Tensor
from whp_kernels.layers import dispatch, residual_rms_norm, rope, swiglu

from whp_fast.model import Llama
from whp_fast.model_config import LlamaConfig
from whp_fast.packing import Packing
from whp_fast.projections import stack_in_memory

EPS = 1e-5
SEED = 0


class Sizes(NamedTuple):
    batch: int
    length: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int

    def __str__(self) -> str:
        return (
            f"{self.batch} x {self.length} tokens, width {self.hidden} and {self.intermediate}, "
            f"{self.heads} heads ({self.kv_heads} of keys)"
        )

    @property
    def depth(self) -> int:
        return self.hidden // self.heads


SIZES = {
    "cpu": Sizes(2, 512, 1024, 2816, 16, 4),
    "cuda": Sizes(4, 2048, 4096, 14336, 32, 8),
    "quick": Sizes(2, 9, 64, 96, 4, 2),
}


@dataclass
class Way:
    """One way to compute a layer.

    Attributes:
        run: the leaves -> results.
        ours: whether a wrong result is a failure.
        backend: what ``WHP_KERNELS_LAYERS`` is meanwhile; None: not asked for.
        compiled: its first call compiles.
        weights: of a module that it calls, whose gradients are made too.
    """

    name: str
    label: str
    run: Callable[..., tuple[Tensor, ...]]
    ours: bool = False
    backend: str | None = None
    compiled: bool = False
    weights: Sequence[Tensor] = ()

    @contextlib.contextmanager
    def chosen(self) -> Iterator[None]:
        """Around forward and backward."""
        if self.backend is None:
            yield
            return
        with mock.patch.object(dispatch, "_asked", lambda: self.backend):
            yield


@dataclass
class Case:
    """One layer with its numbers.

    Attributes:
        leaves: what gradients are asked for, by name.
        upstream: gradients of the results.
        ways: who computes it; the first is ours.
        truth: results and gradients in float64.
        shared: storages that are there in any case: tables and weights.
    """

    name: str
    leaves: dict[str, Tensor]
    upstream: tuple[Tensor, ...]
    ways: list[Way]
    truth: list[Tensor]
    shared: Sequence[Tensor] = field(default_factory=tuple)


def make_cases(
    names: Sequence[str], sizes: Sizes, dtype: torch.dtype, device: torch.device, compiler: str
) -> Iterator[Case]:
    """The cases, one after the other."""
    for name in names:
        yield CASES[name](_Maker(sizes, dtype, device, compiler))


class _Maker:
    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: torch.device, compiler: str):
        self.sizes, self.dtype, self.device, self.compiler = sizes, dtype, device, compiler
        self.generator = torch.Generator().manual_seed(SEED)

    def draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(*shape, generator=self.generator)
        return values.to(self.device, self.dtype)

    def case(self, name, leaves, exact, ways, theirs, shared=(), weights=(), exact_weights=()) -> Case:
        """``exact``: the definition, called with the leaves in float64; ``theirs``: what torch.compile gets;
        both with their weights."""
        leaves = {key: value.detach().requires_grad_() for key, value in leaves.items()}
        double = [value.detach().double().requires_grad_() for value in leaves.values()]
        results = exact(*double)
        upstream = tuple(self.draw(*result.shape) for result in results)
        gradients = torch.autograd.grad(results, [*double, *exact_weights], [g.double() for g in upstream])
        truth = [value.detach() for value in (*results, *gradients)]
        if self.compiler != "none":
            run = torch.compile(theirs, backend=self.compiler)
            ways = [
                *ways,
                Way("compile", "torch.compile of transformers", run, compiled=True, weights=weights),
            ]
        return Case(name, leaves, upstream, ways, truth, shared)


def _own(run) -> list[Way]:
    return [
        Way("whp_kernels", "whp_kernels", run, ours=True),
        Way("reference", "whp_kernels, reference", run, ours=True, backend="reference"),
    ]


def _norm(make: _Maker) -> Case:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    sizes = make.sizes
    shape = (sizes.batch, sizes.length, sizes.hidden)
    leaves = {"x": make.draw(*shape), "branch": make.draw(*shape), "weight": make.draw(sizes.hidden)}
    module = LlamaRMSNorm(sizes.hidden, EPS).to(make.device, make.dtype)

    def ours(x, branch, weight):
        return residual_rms_norm(x, branch, weight, EPS)

    def theirs(x, branch, weight):
        x = x + branch
        return x, torch.func.functional_call(module, {"weight": weight}, (x,))

    def torchs(x, branch, weight):
        x = x + branch
        return x, F.rms_norm(x, weight.shape, weight, EPS)

    ways = [
        *_own(ours),
        Way("transformers", "transformers", theirs),
        Way("torch", "torch F.rms_norm", torchs),
    ]
    liger = _liger("rms_norm", "LigerRMSNormFunction", make.device)
    if liger is not None:
        run = lambda x, b, w: (x + b, liger.apply(x + b, w, EPS, 0.0, "llama", False))  # noqa: E731
        ways.append(Way("liger", "Liger-Kernel", run))

    def exact(x, branch, weight):
        # the sum as it is kept, as the norm reads it: its rounding is the same for all
        total = x + branch
        kept = total + (total.detach().to(make.dtype).double() - total.detach())
        return kept, kept * (kept.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight

    return make.case("norm", leaves, exact, ways, theirs)


def _rope(make: _Maker) -> Case:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    sizes = make.sizes
    leaves = {
        "q": make.draw(sizes.batch, sizes.length, sizes.heads, sizes.depth),
        "k": make.draw(sizes.batch, sizes.length, sizes.kv_heads, sizes.depth),
    }
    cos, sin = _tables(sizes, make.device)
    signed = torch.cat((-sin[..., : sizes.depth // 2], sin[..., sizes.depth // 2 :]), -1)

    def ours(q, k):
        return rope(q, k, cos[:, None], signed[:, None])

    def theirs(q, k):
        # as a model calls it: heads before places, cos and sin in the dtype of the model
        table = (cos[None].to(q.dtype), sin[None].to(q.dtype))
        return tuple(
            y.transpose(1, 2) for y in apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *table)
        )

    ways = [*_own(ours), Way("transformers", "transformers", theirs)]
    liger = _liger("rope", "LigerRopeFunction", make.device)
    if liger is not None:

        def theirs_fused(q, k):
            table = (cos[None].to(q.dtype), sin[None].to(q.dtype))
            return tuple(y.transpose(1, 2) for y in liger.apply(q.transpose(1, 2), k.transpose(1, 2), *table))

        ways.append(Way("liger", "Liger-Kernel", theirs_fused))

    def exact(q, k):
        table = cos[:, None].double(), signed[:, None].double()
        return tuple(_rotated(x, *table) for x in (q, k))

    return make.case("rope", leaves, exact, ways, theirs, (cos, sin, signed))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def _tables(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, sizes.depth, 2) / sizes.depth
    angles = torch.arange(sizes.length)[:, None] / 10000.0**exponents
    angles = torch.cat((angles, angles), -1).to(device)
    return angles.cos(), angles.sin()


def _swiglu(make: _Maker) -> Case:
    from transformers.activations import ACT2FN

    sizes = make.sizes
    leaves = {key: make.draw(sizes.batch, sizes.length, sizes.intermediate) for key in ("gate", "up")}
    silu = ACT2FN["silu"]

    def ours(gate, up):
        return (swiglu(gate, up),)

    def theirs(gate, up):
        return (silu(gate) * up,)

    ways = [*_own(ours), Way("transformers", "transformers", theirs)]
    liger = _liger("swiglu", "LigerSiLUMulFunction", make.device)
    if liger is not None:
        ways.append(Way("liger", "Liger-Kernel", lambda gate, up: (liger.apply(gate, up),)))
    return make.case("swiglu", leaves, theirs, ways, theirs)


def _layer(make: _Maker) -> Case:
    from transformers import LlamaConfig as TheirConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    sizes = make.sizes
    shape = {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": 8,
        "rms_norm_eps": EPS,
    }
    config = TheirConfig(**shape)
    config._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(config, 0).to(make.device, make.dtype)
    model = Llama(LlamaConfig(**shape)).to(make.device, make.dtype)
    block = model.model.layers[0]
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            values = make.draw(*parameter.shape, scale=1.0 if parameter.dim() == 1 else sizes.hidden**-0.5)
            parameter.copy_(values)
            layer.get_parameter(name).copy_(values)
    stack_in_memory(model)
    cos, sin = _tables(sizes, make.device)
    signed = torch.cat((-sin[..., : sizes.depth // 2], sin[..., sizes.depth // 2 :]), -1)
    seen = Packing.uniform(sizes.batch, sizes.length, make.device)
    table = [t.repeat(sizes.batch, 1)[:, None] for t in (cos, signed)]
    exact_layer = copy.deepcopy(block).double()

    def ours(x):
        return (block(x.flatten(0, 1), *table, seen).view(x.shape),)

    def theirs(x):
        embeddings = (cos[None].to(x.dtype), sin[None].to(x.dtype))
        return (layer(x, position_embeddings=embeddings),)

    def exact(x):
        with mock.patch.object(dispatch, "_asked", lambda: "reference"):
            return (exact_layer(x.flatten(0, 1), *(t.double() for t in table), seen).view(x.shape),)

    names = [name for name, _ in block.named_parameters()]
    own, others, doubles = (
        [module.get_parameter(name) for name in names] for module in (block, layer, exact_layer)
    )
    ways = [*_own(ours), Way("transformers", "transformers", theirs)]
    for way in ways:
        way.weights = own if way.ours else others
    leaves = {"x": make.draw(sizes.batch, sizes.length, sizes.hidden)}
    shared = (cos, sin, *table, *own, *others)
    return make.case("layer", leaves, exact, ways, theirs, shared, others, doubles)


def _liger(module: str, name: str, device: torch.device):
    """A function of Liger-Kernel where it is installed and there is a GPU, else None."""
    if device.type != "cuda":
        return None
    try:
        return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)
    except (ImportError, AttributeError):
        return None


TITLES = {
    "norm": "residual addition and RMSNorm",
    "rope": "rotary embedding of q and k",
    "swiglu": "SwiGLU",
    "layer": "whole layer",
}
CASES = {"norm": _norm, "rope": _rope, "swiglu": _swiglu, "layer": _layer}
