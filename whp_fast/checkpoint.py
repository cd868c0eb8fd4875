"""Model folders in the layout of Hugging Face, in and out.

Weights are safetensors only: they are read tensor by tensor straight into the model, and cannot run code as
pickles can. What ``save_model`` writes is loaded by ``AutoModelForCausalLM.from_pretrained`` of transformers
4 and 5.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from whp_fast.errors import UserError
from whp_fast.model import Llama
from whp_fast.model_config import LlamaConfig

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TIED_HEAD = "lm_head.weight"


def load_config(folder: str | os.PathLike) -> LlamaConfig:
    """The configuration in ``folder/config.json``.

    Raises:
        UserError: no folder, no config.json, not JSON, a field missing or wrong, or a model not supported.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the path of a downloaded Hugging Face model folder.")
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: there is no config.json; give a complete Hugging Face model folder.")
    raw = _read_json(path)
    return LlamaConfig.from_hf(raw, where=str(path))


def load_model(
    folder: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Llama:
    """The model of a folder, with its parameters cast to ``dtype`` on ``device``, in training mode, requiring
    grad.

    The tensors are read one at a time, so the peak is the finished model and one tensor. NaN and inf are not
    looked for.

    Args:
        folder: holds config.json and model.safetensors, or the shards named by model.safetensors.index.json.
        dtype: of every parameter, whatever the files hold.
        device: where the parameters are to live.

    Raises:
        UserError: see ``load_config``; no weights, only pickled ones, a shard missing or damaged, a tensor
            missing, unexpected, of a wrong shape or not of floating point.
    """
    folder = Path(folder)
    config = load_config(folder)
    with torch.device("meta"):
        model = Llama(config)
    wanted = dict(model.named_parameters())
    shards = _find_shards(folder)

    seen: set[str] = set()
    for path in shards:
        with _open_shard(path) as shard:
            for name in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
                if name not in wanted:
                    _refuse_unexpected(name, path, config)
                    continue
                if name in seen:
                    raise UserError(
                        f"{path}: the tensor {name} is also in another shard; download the model again."
                    )
                seen.add(name)
                found, expected = tuple(shard.get_slice(name).get_shape()), tuple(wanted[name].shape)
                if found != expected:
                    raise UserError(
                        f"{path}: the tensor {name} has shape {list(found)}, and config.json beside it asks "
                        f"for {list(expected)}; use a config.json and weights of the same model."
                    )
                tensor = shard.get_tensor(name)
                if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
                    raise UserError(
                        f"{path}: the tensor {name} is of {tensor.dtype}, and quantized weights cannot be "
                        "trained here; use the unquantized checkpoint of the model."
                    )
                _assign(model, name, tensor, dtype, device)
    missing = [name for name in wanted if name not in seen]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        hint = "download the model again"
        if missing == [_TIED_HEAD]:
            hint += ', or set "tie_word_embeddings": true in config.json if the model has no head of its own'
        raise UserError(f"{folder}: the tensor {missing[0]}{more} is in none of the weight files; {hint}.")
    return model


def save_model(
    model: Llama,
    folder: str | os.PathLike,
    max_shard_bytes: int = 5 * 2**30,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes weights, index, config.json and generation_config.json; the same model gives the same bytes.

    A tied head is written once, as the embedding. Each file is written beside its place and moved there when
    it is whole; config.json comes last, so a folder that has one is complete. Weight files of an earlier save
    in the same folder are removed.

    Args:
        model: on any device.
        folder: made if need be.
        max_shard_bytes: a shard holds at most so many bytes of tensors, or one larger tensor.
        dtype: of the written weights; None: as they are.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parameters = dict(model.named_parameters())
    written = dtype or next(iter(parameters.values())).dtype

    # A folder whose config.json is there is complete: take it away first, put it back last.
    (folder / "config.json").unlink(missing_ok=True)
    (folder / _INDEX).unlink(missing_ok=True)
    for pattern in (_SINGLE, "model-?????-of-?????.safetensors"):
        for old in folder.glob(pattern):
            old.unlink()

    shards = _plan_shards(parameters, max_shard_bytes, dtype)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: parameters[name].detach().to("cpu", dtype or None).contiguous() for name in names}
        with _whole_file(folder / file) as partial:
            save_file(tensors, partial, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(_bytes(p, dtype) for p in parameters.values())
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    _write_json(folder / "generation_config.json", _generation_config(model.config))
    config = model.config.to_hf()
    # transformers 4 reads torch_dtype, transformers 5 reads dtype.
    config["dtype"] = config["torch_dtype"] = str(written).removeprefix("torch.")
    _write_json(folder / "config.json", config)


def _find_shards(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(
                f"{index}: the field weight_map is missing or no table of names; download it again."
            )
        shards = [folder / file for file in sorted(set(weight_map.values()))]
        for path in shards:
            if not path.is_file():
                raise UserError(f"{path}: the shard is named by {_INDEX} but missing; download it again.")
        return shards
    if any(folder.glob("*.safetensors")):
        names = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:3])
        raise UserError(
            f"{folder}: there is neither {_SINGLE} nor {_INDEX} beside {names}; download the index file too."
        )
    pickles = sorted(path.name for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}"))
    if pickles:
        raise UserError(
            f"{folder}: the weights are only there as a pickle ({pickles[0]}), which can run code when it is "
            "opened; convert them to safetensors first, for example with save_pretrained of transformers."
        )
    raise UserError(f"{folder}: there are no weights ({_SINGLE} or {_INDEX}); download them too.")


@contextmanager
def _open_shard(path: Path) -> Iterator[Any]:
    """safe_open, with the damages a download can have told apart."""
    try:
        with safe_open(path, framework="pt", device="cpu") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: the file is damaged or cut short ({path.stat().st_size} bytes{_expected_size(path)}; "
            f"{error}); download it again."
        ) from None


def _expected_size(path: Path) -> str:
    """ ", N expected" from the header: 8 bytes of its length, then JSON with the offsets of every tensor."""
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(min(length, 100_000_000)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return f", {8 + length + max(ends)} expected"
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error):
        return ""


def _refuse_unexpected(name: str, path: Path, config: LlamaConfig) -> None:
    """Passes over what older exports carry beside the parameters, and refuses the rest."""
    if name.endswith("rotary_emb.inv_freq") or (name == _TIED_HEAD and config.tie_word_embeddings):
        return
    raise UserError(
        f"{path}: the tensor {name} is no part of the {config.model_type} model that config.json describes; "
        "use a config.json and weights of the same model."
    )


def _assign(
    model: Llama, name: str, tensor: torch.Tensor, dtype: torch.dtype, device: str | torch.device
) -> None:
    """Puts the tensor in the place of the meta parameter. The copy is forced: what safetensors returns may be
    a view of the mapped file, which would be read from disk again and again and change with the file."""
    owner, _, leaf = name.rpartition(".")
    tensor = tensor.to(device=device, dtype=dtype, copy=True)
    setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(tensor))


def _plan_shards(
    parameters: dict[str, torch.nn.Parameter], max_shard_bytes: int, dtype: torch.dtype | None
) -> list[list[str]]:
    """Names in the order of the model, a new shard when the next tensor would not fit."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, parameter in parameters.items():
        size = _bytes(parameter, dtype)
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _bytes(parameter: torch.nn.Parameter, dtype: torch.dtype | None) -> int:
    return parameter.numel() * (dtype or parameter.dtype).itemsize


def _generation_config(config: LlamaConfig) -> dict[str, Any]:
    """Only the special ids: sampling settings belong to whoever generates."""
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    return {"_from_model_config": True, **{key: value for key, value in ids.items() if value is not None}}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the file is not JSON ({error}); download it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: the file holds no JSON object; download it again.")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with _whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """A place to write to; moved to ``path`` when it is whole."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(partial, 0o666 & ~mask)  # safetensors writes files that nobody else may read
    os.replace(partial, path)
