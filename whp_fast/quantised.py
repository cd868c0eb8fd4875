"""Frozen linear layers in 4 or 8 bits (data and arithmetic of bitsandbytes), and its 8-bit AdamW on shards.

| kind | what is stored of a weight                                                     | bits a weight |
|------|--------------------------------------------------------------------------------|---------------|
| nf4  | 4-bit NormalFloat in blocks of 64, their scales in 8 bits (QLoRA, 2305.14314)   | 4.13          |
| int8 | 8-bit integers in blocks of 64, a float32 scale a block                         | 8.5           |

int8 is blockwise and not bitsandbytes' ``Linear8bitLt``: that one rounds the activations to 8 bits as well,
and to float16 on the way (values above 65,504 are lost), and on a CPU it computes differently in training and
in evaluation. Here only the weights are rounded; forward and backward multiply by the same dequantised
matrix, in every mode and on every device. For the same reason the 4-bit data are held by a module of our own
and not by ``bnb.nn.Linear4bit``, which repacks its weights in evaluation on CPUs with AVX512-BF16.

The quantised data are buffers: they move, copy and save with the model, get no gradient, and sharding of
parameters leaves them whole in every process.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from whp_kernels.optim.sharding import local

from whp_fast.errors import UserError

KINDS = ("nf4", "int8")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_BLOCK = 64  # weights that share a scale
_SCALE_BLOCK = 256  # scales that share a scale (nf4)


class QuantisedLinear(nn.Module):
    """``nn.Linear`` whose weight is frozen in ``kind``; the bias, if any, stays as it is.

    The product is computed in the dtype of the input (under autocast: in its) by a dequantised copy that
    lives for one product. Input [..., in_features] -> [..., out_features]; the gradient reaches the input and
    the bias.

    A new layer is empty: fill it with ``quantise_from``.
    """

    def __init__(
        self, in_features: int, out_features: int, kind: str, bias: nn.Parameter | None, device: torch.device
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        self.register_parameter("bias", bias)
        numel = in_features * out_features
        scales = _blocks(numel, _BLOCK)

        def empty(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))

        if kind == "int8":
            empty("data", (out_features, in_features), torch.uint8)
            empty("scales", (scales,), torch.float32)
        else:
            empty("data", (scales * _BLOCK // 2, 1), torch.uint8)  # two weights a byte, whole blocks
            empty("scales", (scales,), torch.uint8)
            empty("scale_scales", (_blocks(scales, _SCALE_BLOCK),), torch.float32)
            empty("scale_mean", (), torch.float32)

    @torch.no_grad()
    def quantise_from(self, weight: torch.Tensor) -> None:
        """Takes over ``weight`` [out_features, in_features] of floating point and its device.

        Raises:
            UserError: bitsandbytes is missing.
            ValueError: a wrong shape.
        """
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"the weight has shape {list(weight.shape)}, expected {[self.out_features, self.in_features]}"
            )
        bnb = _bitsandbytes()
        weight = weight.detach().to(torch.float32).contiguous()
        if self.kind == "int8":
            code = _code("linear", weight.device)
            self.data, state = bnb.functional.quantize_blockwise(weight, code=code, blocksize=_BLOCK)
            self.scales = state.absmax
        else:
            # One block a row: bitsandbytes 0.50 dequantises other rows wrongly on CPUs with AVX512 (an error
            # of 22 % in place of 9 % for [48, 80]).
            flat = F.pad(weight.flatten(), (0, -weight.numel() % _BLOCK)).view(-1, _BLOCK)
            self.data, state = bnb.functional.quantize_4bit(
                flat, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
            )
            self.scales, self.scale_scales = state.absmax, state.state2.absmax
            self.scale_mean = state.offset

    @torch.no_grad()
    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[out_features, in_features] in ``dtype``: what the layer multiplies by."""
        bnb = _bitsandbytes()
        known = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
        state = bnb.functional.QuantState
        if self.kind == "int8":
            scheme = state(self.scales, code=_code("linear", self.data.device), blocksize=_BLOCK, dtype=known)
            weight = bnb.functional.dequantize_blockwise(self.data, scheme)
        else:
            nested = state(
                self.scale_scales,
                code=_code("dynamic", self.data.device),
                blocksize=_SCALE_BLOCK,
                dtype=torch.float32,
            )
            scheme = state(
                self.scales,
                shape=torch.Size((self.scales.numel(), _BLOCK)),
                blocksize=_BLOCK,
                quant_type="nf4",
                dtype=known,
                offset=self.scale_mean,
                state2=nested,
            )
            weight = bnb.functional.dequantize_4bit(self.data, scheme).flatten()
            weight = weight[: self.out_features * self.in_features].view(self.out_features, self.in_features)
        return weight.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        y = _FrozenProduct.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


class _FrozenProduct(torch.autograd.Function):
    """x @ W^T, and g @ W for its gradient. Nothing is saved: W is dequantised again."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.dequantise(x.dtype))

    @staticmethod
    def backward(ctx, g):
        with torch.autocast(g.device.type, enabled=False):  # backward may be called inside an autocast region
            return g @ ctx.layer.dequantise(g.dtype), None


def quantise_(model: nn.Module, kind: str) -> nn.Module:
    """Replaces the projections of the blocks by ``QuantisedLinear``, one after the other, and freezes the
    rest.

    Embeddings, norms, biases and the head keep their dtype. On the meta device the layers are made and left
    empty.

    Args:
        model: a ``whp_fast.model.Llama``; changed in place and returned.
        kind: "nf4" or "int8".

    Raises:
        UserError: bitsandbytes is missing.
        ValueError: another kind, or a projection that carries adapters (quantise first, then add them).
    """
    _bitsandbytes()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name not in PROJECTIONS or not isinstance(child, nn.Linear):
                continue
            if any(child.children()):
                raise ValueError(f"{name} carries adapters; quantise the model before adapters are added")
            weight = child.weight.detach()
            layer = QuantisedLinear(child.in_features, child.out_features, kind, child.bias, weight.device)
            if not weight.is_meta:
                layer.quantise_from(weight)
            layer.train(child.training)
            setattr(parent, name, layer)
    return model.requires_grad_(False)


def dequantised(module: nn.Linear | QuantisedLinear, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight [out, in] of a layer in ``dtype``: dequantised, or that of an ordinary linear layer,
    detached."""
    if isinstance(module, QuantisedLinear):
        return module.dequantise(dtype)
    return module.weight.detach().to(dtype)


def quantised_bytes(in_features: int, out_features: int, kind: str) -> int:
    """Bytes that a ``QuantisedLinear`` without bias holds between products."""
    with torch.device("meta"):
        layer = QuantisedLinear(in_features, out_features, kind, None, torch.device("meta"))
    return model_bytes(layer)


def model_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of a model on one process, each tensor counted once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(local(t).numel() * t.element_size() for t in tensors.values())


def bitsandbytes_adamw8bit(
    params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> ShardedAdamW8bit:
    """bitsandbytes' AdamW with 8-bit moments over the shards that this process holds; see
    ``ShardedAdamW8bit``."""
    return ShardedAdamW8bit(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


class ShardedAdamW8bit:
    """``bnb.optim.AdamW8bit`` for parameters that may be sharded (DTensor), which it does not know itself.

    It works on plain tensors that share the memory of the local shards. AdamW treats every element alone and
    quantises blocks of 256 elements, so only the borders of the blocks depend on the number of processes.
    Tensors below 4,096 elements keep float32 moments (bitsandbytes' rule).

    Build it after sharding and after the weights have their memory: a shard that is allocated anew is lost to
    it.

    Args:
        params: float32 parameters, or groups as torch.optim takes them (``{"params": [...], "lr": ...}``).
        lr, betas, eps, weight_decay: of groups that name none.

    Raises:
        UserError: bitsandbytes is missing, or a parameter is not float32 (a step of 1e-6 is lost in
        bfloat16). ValueError: the local shard of a parameter is not contiguous.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        groups = list(params)
        if not groups or not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        local_groups = []
        for group in groups:
            pairs = [(p, _shard(p)) for p in group["params"]]
            self._pairs += pairs
            local_groups.append({**group, "params": [shard for _, shard in pairs]})
        self._shards = dict(self._pairs)
        self._optimizer = _bitsandbytes().optim.AdamW8bit(
            local_groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups over the local shards; what is set here (``lr`` of a schedule) holds from the next step
        on."""
        return self._optimizer.param_groups

    def step(self) -> None:
        """One update from the ``.grad`` of every parameter that has one."""
        try:
            for parameter, shard in self._pairs:
                if parameter.grad is not None and shard.numel():
                    shard.grad = local(parameter.grad).to(shard.dtype).contiguous()
            self._optimizer.step()
        finally:
            for _, shard in self._pairs:
                shard.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter, _ in self._pairs:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """What bitsandbytes keeps for this parameter, its own tensors and numbers; empty before the first
        step."""
        return self._optimizer.state[self._shards[parameter]]

    def state_dict(self) -> dict[str, Any]:
        """Moments and groups of the local shards: for the same process of the same number of processes."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state)


def _shard(parameter: nn.Parameter) -> nn.Parameter:
    rows = local(parameter)
    if rows.dtype != torch.float32:
        raise UserError(
            f"memory.optimizer: bitsandbytes updates float32 weights, and these are {rows.dtype}, in which "
            "tiny updates are lost; set memory.weights to float32, or memory.optimizer to whp."
        )
    if not rows.is_contiguous():
        raise ValueError(f"the shard of a parameter of shape {list(parameter.shape)} is not contiguous")
    return nn.Parameter(rows)


def _blocks(numel: int, size: int) -> int:
    return -(-numel // size)


@functools.lru_cache
def _code(name: str, device: torch.device) -> torch.Tensor:
    """The 256 values of an 8-bit code: of the integers -127 .. 127 / 127, or of bitsandbytes' dynamic map, in
    which it writes the scales of scales."""
    functional = _bitsandbytes().functional
    with torch.inference_mode(False), torch.device("cpu"):
        code = functional.create_linear_map() if name == "linear" else functional.create_dynamic_map()
        return code.to(device)


def _bitsandbytes() -> types.ModuleType:
    # On some CPUs its import warns that it could not download a kernel for inference, which is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            f"bitsandbytes: 4-bit and 8-bit weights and its optimizer need this package ({error}); install "
            "it with: pip install bitsandbytes"
        ) from None
    return bitsandbytes
