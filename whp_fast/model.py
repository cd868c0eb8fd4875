"""The Llama family in plain torch: Llama 2 and 3, Mistral, Qwen2, Qwen3.

Parameter names, shapes and the half-rotation RoPE layout are those of Hugging Face, so a checkpoint is read
and written without permuting or renaming anything (a silently permuted q/k layout is a classic: torchtitan
#1441).

What differs between the families:

| model_type | q/k/v bias         | o bias           | q_norm, k_norm | sliding window                    |
|------------|--------------------|------------------|----------------|-----------------------------------|
| llama      | ``attention_bias`` | the same         | no             | no                                |
| mistral    | no                 | no               | no             | every layer, ``sliding_window``   |
| qwen2      | yes                | no               | no             | layers from ``max_window_layers`` |
| qwen3      | ``attention_bias`` | the same         | yes            | layers from ``max_window_layers`` |

The model is written to run well under ``torch.autocast`` with float32 parameters: the residual stream stays
float32, every activation is cast once, and not once per projection that reads it.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .attention import attention
from .errors import UserError

if TYPE_CHECKING:
    from .generate import KVCache

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# What transformers assumes when config.json leaves a field out, where the families differ.
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "head_dim": 128,
    },
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model; field names as in the ``config.json`` of Hugging Face.

    ``attention_dropout`` is not applied (it is 0 in every published model of these families).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    """Heads of keys and values; None: as many as query heads."""
    head_dim: int | None = None
    """Width of one head; None: hidden_size / num_attention_heads."""
    model_type: str = "llama"
    """llama, mistral, qwen2 or qwen3."""
    max_position_embeddings: int = 4096
    """The context the model was trained for, in tokens; written to config.json, not enforced."""
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    """None, ``{"rope_type": "linear", "factor"}`` or ``{"rope_type": "llama3", "factor", "low_freq_factor",
    "high_freq_factor", "original_max_position_embeddings"}``."""
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Biases in q/k/v/o (llama, qwen3). Qwen2 always has them in q/k/v and never in o, whatever is said
    here."""
    initializer_range: float = 0.02
    """Standard deviation of ``Llama.init_weights``."""
    sliding_window: int | None = None
    """Tokens a position sees, itself included, in the layers of ``window_of_layer``."""
    use_sliding_window: bool = False
    """Qwen only: False switches ``sliding_window`` off."""
    max_window_layers: int = 28
    """Qwen only: the layers before this one see everything."""
    layer_types: tuple[str, ...] | None = None
    """Qwen only: "full_attention" or "sliding_attention" for each layer; None: from ``max_window_layers``."""
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    """The config.json this was read from: ``to_hf`` keeps the keys that it does not know."""

    def __post_init__(self) -> None:
        if self.num_attention_heads <= 0:
            raise UserError(f"num_attention_heads is {self.num_attention_heads}, and it must be positive.")
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise UserError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}: give head_dim, or mend one of the two."
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        _refuse_unsupported(self)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], where: str = "config.json") -> LlamaConfig:
        """The configuration in a parsed ``config.json``, of transformers 4 (``rope_theta``, ``rope_scaling``)
        or 5 (``rope_parameters``). Fields left out get the defaults of transformers.

        Raises:
            UserError: a field is missing, of a wrong type or asks for something this model does not have; the
                message begins with ``where``.
        """
        read = _Reader(raw, where)
        model_type = read("model_type", str)
        if model_type not in _ARCHITECTURES:
            raise UserError(
                f'{where}: model_type is "{model_type}", and only {", ".join(_ARCHITECTURES)} are supported; '
                "choose a base model of one of these families."
            )
        for key in ("quantization_config", "compression_config"):
            if raw.get(key) is not None:
                raise UserError(
                    f"{where}: {key} is set, and quantized weights cannot be trained here; use the "
                    "unquantized checkpoint of the model."
                )
        activation = read("hidden_act", str, "silu")
        if activation not in ("silu", "swish"):
            raise UserError(f'{where}: hidden_act is "{activation}", and only "silu" is supported.')
        if read("mlp_bias", bool, False):
            raise UserError(f"{where}: mlp_bias is true, and biases in the MLP are not supported.")

        defaults = _FAMILY_DEFAULTS[model_type]
        rope_theta, rope_scaling = _read_rope(read)
        layer_types = read("layer_types", list, None)
        eos = read("eos_token_id", (int, list), None)
        # An explicit null means "as many as query heads"; only a field left out means the family's default.
        kv_default = None if "num_key_value_heads" in raw else defaults.get("num_key_value_heads")
        values = dict(
            model_type=model_type,
            vocab_size=read("vocab_size", int),
            hidden_size=read("hidden_size", int),
            intermediate_size=read("intermediate_size", int),
            num_hidden_layers=read("num_hidden_layers", int),
            num_attention_heads=read("num_attention_heads", int),
            num_key_value_heads=read("num_key_value_heads", int, kv_default),
            head_dim=read("head_dim", int, defaults.get("head_dim")),
            max_position_embeddings=read("max_position_embeddings", int, defaults["max_position_embeddings"]),
            rms_norm_eps=read("rms_norm_eps", float, 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=read("tie_word_embeddings", bool, False),
            attention_bias=model_type in ("llama", "qwen3") and read("attention_bias", bool, False),
            initializer_range=read("initializer_range", float, 0.02),
            bos_token_id=read("bos_token_id", int, None),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            pad_token_id=read("pad_token_id", int, None),
            source=copy.deepcopy(dict(raw)),
        )
        if model_type != "llama":
            # Again a null, for "no window", differs from a field left out.
            window = None if "sliding_window" in raw else defaults["sliding_window"]
            values["sliding_window"] = read("sliding_window", int, window)
        if model_type in ("qwen2", "qwen3"):
            values["use_sliding_window"] = read("use_sliding_window", bool, False)
            values["max_window_layers"] = read("max_window_layers", int, 28)
            values["layer_types"] = tuple(layer_types) if layer_types is not None else None
        elif layer_types is not None:
            only = "sliding_attention" if values.get("sliding_window") else "full_attention"
            if set(layer_types) != {only}:
                raise UserError(
                    f"{where}: layer_types is {layer_types}, and every layer of this {model_type} model must "
                    f"be {only}; choose another base model, or remove the field."
                )
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """The contents of ``config.json``: what was read, with the fields of this object written over it.

        Unknown keys are kept. RoPE is written both ways, for transformers 4 and 5.
        """
        out = copy.deepcopy(dict(self.source))
        out["architectures"] = [_ARCHITECTURES[self.model_type]]
        out["hidden_act"] = "silu"
        hidden = {"rope_scaling", "rope_theta", "source", "layer_types", "eos_token_id"}
        if self.model_type in ("mistral", "qwen2"):
            hidden.add("attention_bias")  # no such field there
        if self.model_type in ("llama", "mistral"):
            hidden |= {"use_sliding_window", "max_window_layers"}
        if self.model_type == "llama":
            hidden.add("sliding_window")
        for field in dataclasses.fields(self):
            if field.name not in hidden:
                out[field.name] = getattr(self, field.name)
        out["eos_token_id"] = (
            list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        )
        if self.layer_types is not None:
            out["layer_types"] = list(self.layer_types)
        elif self.model_type in ("qwen2", "qwen3"):
            out.pop("layer_types", None)

        scaling = dict(self.rope_scaling) if self.rope_scaling is not None else None
        out["rope_theta"] = self.rope_theta
        out["rope_parameters"] = {"rope_type": "default", **(scaling or {}), "rope_theta": self.rope_theta}
        if scaling is not None and scaling["rope_type"] == "linear":
            # transformers before 4.43 accepts exactly the two fields type and factor.
            scaling["type"] = scaling.pop("rope_type")
        out["rope_scaling"] = scaling
        return out

    def window_of_layer(self, layer: int) -> int | None:
        """How many tokens, itself included, a position of this layer sees; None: all before it."""
        if self.model_type == "mistral":
            return self.sliding_window
        if self.model_type in ("qwen2", "qwen3") and self.use_sliding_window:
            sliding = layer >= self.max_window_layers
            if self.layer_types is not None:
                sliding = self.layer_types[layer] == "sliding_attention"
            return self.sliding_window if sliding else None
        return None

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def o_bias(self) -> bool:
        return self.attention_bias and self.model_type != "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.model_type == "qwen3"


class Llama(nn.Module):
    """A causal language model with the parameter names of Hugging Face.

    The parameters of a new model are not ready for use: call ``init_weights``, or load them
    (``whp_fast.checkpoint.load_model``). A tied model has no ``lm_head`` of its own.

    Set ``activation_checkpointing`` to recompute each block in the backward pass instead of storing its
    activations.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.model = _Body(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._rope = _Rope(config)

    @property
    def lm_head_weight(self) -> nn.Parameter:
        """[V, H], the embedding itself when the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [B, T] int64 -> logits [B, T, V] in the parameter dtype (under autocast: in its)."""
        return F.linear(self.hidden_states(input_ids), self.lm_head_weight)

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        cache: KVCache | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The states that the language model head reads.

        Causal: the tokens to the right change nothing, so right padding needs no mask.

        Args:
            input_ids: [B, T] int64.
            cache: a ``whp_fast.generate.KVCache``, filled by the first call with prompts of any length; every
                later call brings one token a row.
            position_ids: [T] or [B, T] int64, the places of the tokens; default: 0 .. T-1, or with a filled
                cache the next place. Rows of a filled cache may stand at different places (right-padded
                prompts): a row sees the places up to its own.

        Returns:
            [B, T, H] after the final norm, in the parameter dtype (under autocast too).
        """
        length = input_ids.shape[1]
        step = cache is not None and cache.length > 0
        if step and length != 1:
            raise ValueError(
                f"a filled cache takes one token a row at a time, got input_ids of length {length}"
            )
        x = self.model.embed_tokens(input_ids)
        if step and position_ids is None:
            position_ids = torch.full_like(input_ids, cache.length)
        if cache is not None:
            cache.advance(length, position_ids if step else None)
        if position_ids is None:
            cos, sin = self._rope(length, x.device, x.dtype)
        else:
            # A place beyond the table would be read silently wrong on a GPU, so the table covers what can be
            # known without asking the device: the cache, or the largest place.
            places = cache.capacity if cache is not None else int(position_ids.max()) + 1
            cos, sin = self._rope(places, x.device, x.dtype)
            cos, sin = cos[position_ids], sin[position_ids]

        recompute = self.activation_checkpointing and torch.is_grad_enabled() and cache is None
        for block in self.model.layers:
            if recompute:
                x = checkpoint(block, x, cos, sin, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cos, sin, cache)
        return self.model.norm(x)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights: normal with ``config.initializer_range`` for matrices, 0 for biases, 1 for norms.

        The numbers are drawn on the generator's device in float32, in the order of the parameters: the same
        generator state gives the same weights whatever the device and dtype of the model.
        """
        device = generator.device if generator is not None else torch.device("cpu")
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                values = torch.empty(parameter.shape, dtype=torch.float32, device=device)
                parameter.copy_(values.normal_(0.0, self.config.initializer_range, generator=generator))


class _Body(nn.Module):
    """Everything but the head; a module of its own because Hugging Face names it ``model.``"""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class _Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = _Attention(config, layer)
        self.mlp = _MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: KVCache | None = None
    ) -> torch.Tensor:
        dtype = _compute_dtype(x)
        x = x + self.self_attn(self.input_layernorm(x, dtype), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x, dtype))


class _Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.window = config.window_of_layer(layer)
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: KVCache | None
    ) -> torch.Tensor:
        heads = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = self.q_proj(x).view(heads), self.k_proj(x).view(heads), self.v_proj(x).view(heads)
        dtype = v.dtype
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = apply_rope(q, cos, sin, dtype).transpose(1, 2)
        k = apply_rope(k, cos, sin, dtype).transpose(1, 2)
        v = v.transpose(1, 2)
        if cache is None:
            out = attention(q, k, v, window=self.window)
        else:
            out = cache.attend(self.layer, q, k, v)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (arXiv 1910.07467), computed in float32 or better."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """x [..., width] -> the same shape in ``dtype`` (default: that of the weight)."""
        dtype = dtype or self.weight.dtype
        if x.is_cuda and x.dtype == self.weight.dtype:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps).to(dtype)  # one fused kernel
        return _RMSNormFunction.apply(x, self.weight, self.eps, dtype)


class _RMSNormFunction(torch.autograd.Function):
    """Forward and backward in as few passes as eager torch allows, storing x and one number a row.

    float32 [8, 256, 192] with a bf16 result, forward and backward on one CPU core: 0.9 ms; the chain of
    Hugging Face left to autograd 1.4 ms; ``F.rms_norm``, which has no fused CPU kernel, 5.3 ms.

    With n = x * r, r = rsqrt(mean(x^2) + eps) and the incoming gradient g:
    dw = sum over rows of g * n,   dx = r * (g * w - n * mean(g * w * n)).
    """

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        wide = torch.promote_types(x.dtype, torch.float32)
        n = x.to(wide)
        r = torch.linalg.vector_norm(n, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (n * r).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx, g):
        x, weight, r = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):  # backward may be called inside an autocast region
            n = x.to(r.dtype) * r
            w = weight.to(r.dtype)
            g = g.to(r.dtype)
            gn = g * n
            mean = (gn @ w).unsqueeze(-1) / x.shape[-1]
            dw = gn.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
            dx = torch.addcmul(g * w, n, mean, value=-1).mul_(r)
        return dx.to(x.dtype), None if dw is None else dw.to(weight.dtype), None, None


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rotary embedding (arXiv 2104.09864) in the half-rotation layout of Hugging Face.

    Args:
        x: [B, T, heads, D].
        cos, sin: [T, 1, D] or [B, T, 1, D], float32 or wider; the first half of ``sin`` carries the minus
            sign of ``rotate_half``, so that x * cos + roll(x, D/2) * sin is the whole rotation.
        dtype: of the result; the arithmetic is done in the dtype of ``cos``.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(dtype)


class _Rope:
    """The cos and sin of every place seen so far, one growing table for each device and dtype.

    A plain object and no buffer: a buffer would be left empty by ``to_empty`` after a meta init, and would be
    cast to bf16 together with the model (at place 4,000 a bf16 angle is off by up to 16 radians).
    """

    def __init__(self, config: LlamaConfig) -> None:
        self._config = config
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(
        self, length: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin of the places 0 .. length-1: [length, 1, D], float32 or wider."""
        key = (device, torch.promote_types(dtype, torch.float32))
        if key not in self._tables or len(self._tables[key][0]) < length:
            self._tables[key] = self._build(1 << max(length - 1, 127).bit_length(), *key)
        cos, sin = self._tables[key]
        return cos[:length], sin[:length]

    def __deepcopy__(self, memo: dict) -> _Rope:
        return _Rope(self._config)  # the tables are cheap to make again

    # A table made during generation serves training, and an inference tensor cannot be saved for backward.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _build(
        self, length: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        places = torch.arange(length, device=device, dtype=torch.float32)
        angles = places[:, None] * inverse_frequencies(self._config).to(device)
        cos, sin = angles.cos(), angles.sin()
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return cos.unsqueeze(1).to(dtype), sin.unsqueeze(1).to(dtype)


def inverse_frequencies(config: LlamaConfig) -> torch.Tensor:
    """[head_dim / 2] float32 on the CPU, radians a token, with the context scaling of the configuration.

    llama3 (transformers ``_compute_llama3_parameters``): waves longer than the original context /
    low_freq_factor are slowed by ``factor``, waves shorter than the original context / high_freq_factor are
    kept, and those between are blended.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    inv_freq = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    if scaling["rope_type"] == "linear":
        return inv_freq / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    kept = ((context / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * inv_freq / scaling["factor"] + kept * inv_freq


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What the linear layers compute in: cast to it once instead of once for each of q, k, v, gate and up."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _Reader:
    """Typed access to config.json; the errors name the file and the field."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where = raw, where

    _REQUIRED = object()

    def __call__(self, key: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        value = self.raw.get(key)
        if value is None:
            if default is _Reader._REQUIRED:
                raise UserError(
                    f"{self.where}: the field {key} is missing; take config.json from the base model."
                )
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        fits = isinstance(value, (int, float) if float in kinds else kinds)
        if not fits or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(k.__name__ for k in kinds)
            raise UserError(f"{self.where}: the field {key} is {value!r}, and it must be of type {names}.")
        return float(value) if kinds == (float,) else value


def _read_rope(read: _Reader) -> tuple[float, dict[str, Any] | None]:
    """(rope_theta, rope_scaling). With both forms there, rope_scaling wins, as it does in transformers 5."""
    key = "rope_scaling" if read("rope_scaling", dict, None) else "rope_parameters"
    rope = read(key, dict, None) or {}
    inner = _Reader(rope, f"{read.where}: {key}")
    theta = inner("rope_theta", float, None)
    if theta is None:
        theta = read("rope_theta", float, 10000.0)
    for source in (read, inner):
        if source("partial_rotary_factor", float, 1.0) != 1.0:
            raise UserError(
                f"{source.where}: partial_rotary_factor is not 1, and partial RoPE is not supported."
            )
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{read.where}: {key} differs from layer to layer, which is not supported.")
    rope_type = inner("rope_type", str, None) or inner("type", str, "default")
    if rope_type == "default":
        return theta, None
    if rope_type == "linear":
        return theta, {"rope_type": "linear", "factor": inner("factor", float)}
    if rope_type == "llama3":
        original = inner("original_max_position_embeddings", int, None)
        if original is None:
            original = read("max_position_embeddings", int)
        return theta, {
            "rope_type": "llama3",
            "factor": inner("factor", float),
            "low_freq_factor": inner("low_freq_factor", float),
            "high_freq_factor": inner("high_freq_factor", float),
            "original_max_position_embeddings": original,
        }
    raise UserError(
        f'{read.where}: {key} asks for RoPE of type "{rope_type}", and only default, linear and llama3 are '
        "supported; choose another base model."
    )


def _refuse_unsupported(config: LlamaConfig) -> None:
    if config.model_type not in _ARCHITECTURES:
        raise UserError(
            f'model_type is "{config.model_type}", and it must be one of {", ".join(_ARCHITECTURES)}.'
        )
    positive = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim max_position_embeddings rms_norm_eps rope_theta"
    )
    for name in positive.split():
        if getattr(config, name) <= 0:
            raise UserError(f"{name} is {getattr(config, name)}, and it must be positive.")
    if config.sliding_window is not None and config.sliding_window <= 0:
        raise UserError(
            f"sliding_window is {config.sliding_window}, and it must be positive, or null for none."
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of num_key_value_heads "
            f"{config.num_key_value_heads}: mend one of the two."
        )
    if config.head_dim % 2:
        raise UserError(f"head_dim is {config.head_dim}, and RoPE needs an even one.")
    if config.rope_scaling is not None and config.rope_scaling.get("rope_type") not in ("linear", "llama3"):
        raise UserError(
            f"rope_scaling is {dict(config.rope_scaling)}, and its rope_type must be linear or llama3."
        )
    if config.layer_types is not None:
        if len(config.layer_types) != config.num_hidden_layers:
            raise UserError(
                f"layer_types names {len(config.layer_types)} layers, and num_hidden_layers is "
                f"{config.num_hidden_layers}: mend one of the two."
            )
        for kind in config.layer_types:
            if kind not in ("full_attention", "sliding_attention"):
                raise UserError(
                    f'layer_types holds "{kind}", and only full_attention and sliding_attention are known.'
                )
            if kind == "sliding_attention" and not (config.use_sliding_window and config.sliding_window):
                raise UserError(
                    "layer_types asks for sliding_attention, but use_sliding_window is false or "
                    "sliding_window is null: set both, or make every layer full_attention."
                )
