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

Matrix products run in bfloat16 in two ways, with the same roundings: float32 parameters under
``torch.autocast``, or bfloat16 parameters with ``residual_dtype`` float32, which casts no weight. In both
the residual stream stays float32, and every activation is rounded once, and not once per projection.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from whp_kernels.layers import embedding, residual_rms_norm, rms_norm, rope, swiglu

from whp_fast.attention import attention
from whp_fast.model_config import LlamaConfig
from whp_fast.packing import Packing
from whp_fast.projections import project

if TYPE_CHECKING:
    from whp_fast.generate import KVCache


class Llama(nn.Module):
    """A causal language model with the parameter names of Hugging Face.

    The parameters of a new model are not ready for use: call ``init_weights``, or load them
    (``whp_fast.checkpoint.load_model``). A tied model has no ``lm_head`` of its own.

    Attributes:
        residual_dtype: of the residual stream; None: that of the embedding. float32 for training bfloat16
            parameters: what a layer adds is then not rounded to the stream's 8 bits.
        checkpointing: what the blocks keep for the backward pass. ``none``: all activations; ``selective``:
            the results of matrix products and attention, the rest is computed again (little work, most of
            the memory); ``full``: the input of each block, all of which is computed again.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.residual_dtype: torch.dtype | None = None
        self.checkpointing: Literal["none", "selective", "full"] = "none"
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
        packing: Packing | None = None,
    ) -> torch.Tensor:
        """The states that the language model head reads.

        Causal: the tokens to the right change nothing, so right padding needs no mask.

        Args:
            input_ids: [B, T] int64; with ``packing`` [tokens], sequences of any lengths after each other.
            cache: a ``whp_fast.generate.KVCache``, filled by the first call with prompts of any length; every
                later call brings one token a row.
            position_ids: [T] or [B, T] int64, the places of the tokens; default: 0 .. T-1, or with a filled
                cache the next place. Rows of a filled cache may stand at different places (right-padded
                prompts): a row sees the places up to its own.
            packing: where the sequences of a packed batch begin, on the device of the ids; it brings their
                places too.

        Returns:
            [B, T, H], or [tokens, H], after the final norm, in the parameter dtype (under autocast too).
        """
        if cache is not None:
            return self._cached_states(input_ids, cache, position_ids)
        if packing is not None:
            if position_ids is not None or input_ids.shape != (packing.tokens,):
                raise ValueError(
                    f"a packed batch has {packing.tokens} tokens, each with its place, but input_ids are "
                    f"{tuple(input_ids.shape)}{'' if position_ids is None else ' and position_ids are given'}"
                )
            return self._packed_states(input_ids, packing, packing.position_ids, packing.max_length)
        count, length = input_ids.shape
        packing, places = Packing.uniform(count, length, input_ids.device), length
        if position_ids is None:
            position_ids = packing.position_ids
        else:  # the table has to cover the largest place: beyond it a GPU would read silently wrong
            places = int(position_ids.max()) + 1
            position_ids = position_ids.expand(count, length).flatten()
        states = self._packed_states(input_ids.flatten(), packing, position_ids, places)
        return states.unflatten(0, (count, length))

    def _packed_states(
        self, input_ids: torch.Tensor, packing: Packing, position_ids: torch.Tensor, places: int
    ) -> torch.Tensor:
        """``places``: how many the table of angles has to hold, known on the host."""
        x = self.model.embed_tokens(input_ids, self.residual_dtype)
        cos, sin = self._rope(places, x.device, x.dtype)
        cos, sin = cos[position_ids], sin[position_ids]  # once, and not in every layer

        recompute = _recomputation(self.checkpointing)
        if recompute is None or not torch.is_grad_enabled():
            for block in self.model.layers:
                x = block(x, cos, sin, packing)
        else:
            for block in self.model.layers:
                x = recompute(block, x, cos, sin, packing)
        return self.model.norm(x)

    def _cached_states(
        self, input_ids: torch.Tensor, cache: KVCache, position_ids: torch.Tensor | None
    ) -> torch.Tensor:
        length = input_ids.shape[1]
        step = cache.length > 0
        if step and length != 1:
            raise ValueError(
                f"a filled cache takes one token a row at a time, got input_ids of length {length}"
            )
        x = self.model.embed_tokens(input_ids, self.residual_dtype)
        if step and position_ids is None:
            position_ids = torch.full_like(input_ids, cache.length)
        cache.advance(length, position_ids if step else None)
        if position_ids is None:
            cos, sin = self._rope(length, x.device, x.dtype)
        else:  # no place is beyond what the cache holds
            cos, sin = self._rope(cache.capacity, x.device, x.dtype)
            cos, sin = cos[position_ids], sin[position_ids]
        for block in self.model.layers:
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
        self.embed_tokens = _Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class _Embedding(nn.Embedding):
    def forward(self, input_ids: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """input_ids [B, T] int64 -> [B, T, H] in ``dtype`` (default: that of the weight)."""
        return embedding(input_ids, self.weight, dtype)


class _Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = _Attention(config, layer)
        self.mlp = _MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, seen: Packing | KVCache
    ) -> torch.Tensor:
        """x [tokens, H] of a packing, or [B, T, H] of a cache."""
        dtype = _autocast_dtype(x)
        x, normal = self.input_layernorm.residual(x, None, dtype)
        x, normal = self.post_attention_layernorm.residual(x, self.self_attn(normal, cos, sin, seen), dtype)
        return x + self.mlp(normal)


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
        self.attention = attention  # compiled blocks leave it out of their graphs

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, seen: Packing | KVCache
    ) -> torch.Tensor:
        heads = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (y.view(heads) for y in project(x, self.q_proj, self.k_proj, self.v_proj))
        dtype = v.dtype
        if self.q_norm is not None:
            q, k = self.q_norm(q, cos.dtype), self.k_norm(k, cos.dtype)
        if isinstance(seen, Packing):
            q, k, v = (y.squeeze(0) for y in rope(q[None], k[None], cos, sin, v[None]))
            out = self.attention(q.to(dtype), k.to(dtype), v, seen, window=self.window)
        else:
            q, k = rope(q, k, cos, sin)
            q, k, v = (y.transpose(1, 2) for y in (q.to(dtype), k.to(dtype), v))
            out = seen.attend(self.layer, q, k, v).transpose(1, 2)
        return project(out.flatten(-2), self.o_proj)[0]


class _MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return project(swiglu(*project(x, self.gate_proj, self.up_proj)), self.down_proj)[0]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (arXiv 1910.07467), computed in float32 or wider."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """x [..., width] -> the same shape in ``dtype`` (default: that of the weight)."""
        return rms_norm(x, self.weight, self.eps, dtype)

    def residual(
        self, x: torch.Tensor, branch: torch.Tensor | None, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream x + branch, which is to be read from here on, and its norm."""
        return residual_rms_norm(x, branch, self.weight, self.eps, dtype)


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


def _autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What the linear layers compute in under autocast: cast to it once instead of once for each of q, k, v,
    gate and up. None: no autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


# ------------------------------------------------------------------------------------------ checkpointing


def _recomputation(checkpointing: str):
    """The function that calls a block so that it keeps less, or None."""
    if checkpointing == "none":
        return None
    run = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if checkpointing == "full":
        return run
    if checkpointing == "selective":
        return functools.partial(
            run, context_fn=functools.partial(create_selective_checkpoint_contexts, _keep_products)
        )
    raise ValueError(f'checkpointing is "{checkpointing}", expected "none", "selective" or "full"')


_PRODUCTS = {
    f"{library}::{name}"
    for library, names in {
        "aten": [
            "mm",
            "addmm",
            "bmm",
            "baddbmm",
            "_scaled_mm",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
        ],
        "whp_kernels_C": ["causal_attention", "causal_attention_packed"],
        "flash_attn": ["_flash_attn_varlen_forward"],
        "torch_attn": ["_varlen_attn"],
    }.items()
    for name in names
}


def _keep_products(context, operator, *arguments, **options) -> CheckpointPolicy:
    kept = getattr(operator, "_schema", None) is not None and operator._schema.name in _PRODUCTS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
