"""The shape of a Llama-family model, as Hugging Face's ``config.json`` tells it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from whp_fast.errors import UserError

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
