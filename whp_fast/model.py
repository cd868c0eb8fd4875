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

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from whp_fast.attention import attention
from whp_fast.model_config import LlamaConfig

if TYPE_CHECKING:
    from whp_fast.generate import KVCache


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
