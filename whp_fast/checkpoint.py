"""Model folders in the layout of Hugging Face, in and out.

Weights are safetensors only: they are read tensor by tensor straight into the model, and cannot run code as
pickles can. What ``save_model`` writes is loaded by ``AutoModelForCausalLM.from_pretrained`` of transformers
4 and 5.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from whp_fast.errors import UserError
from whp_fast.model import Llama
from whp_fast.model_config import LlamaConfig
from whp_fast.quantised import QuantisedLinear, quantise_

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TIED_HEAD = "lm_head.weight"
# The names of safetensors; those that are no weights to train only for the message.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


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
    raw = read_json(path)
    return LlamaConfig.from_hf(raw, where=str(path))


def load_model(
    folder: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    quantise: str | None = None,
    master: Callable[[str, torch.Tensor], None] | None = None,
) -> Llama:
    """The model of a folder, with its parameters cast to ``dtype`` on ``device``, in training mode, requiring
    grad.

    The tensors are read one at a time, so the peak is the finished model and one tensor. NaN and inf are not
    looked for.

    Args:
        folder: holds config.json and model.safetensors, or the shards named by model.safetensors.index.json.
        dtype: of every parameter, whatever the files hold.
        device: where the parameters are to live. "meta": the checks alone, nothing is read.
        quantise: "nf4" or "int8": the projections of the blocks are kept so (``whp_fast.quantised``), each
            quantised from float32 when it is read; the model is frozen.
        master: for ``dtype=bfloat16``: called with the name and the float32 value of every tensor, on
            ``device``, before it is rounded. The parameter is then the upper half of
            ``whp_kernels.optim.split`` (nearest, ties away from zero), to which an optimizer can keep the
            lower half. Keep no reference to the tensor: that would keep the whole model in float32.

    Raises:
        UserError: see ``load_config`` and ``read_tensors``; bitsandbytes is missing (``quantise``).
        ValueError: ``master`` beside another dtype or beside ``quantise``.
    """
    if master is not None and (dtype != torch.bfloat16 or quantise is not None):
        raise ValueError("master is for dtype=torch.bfloat16 without quantise")
    device = torch.device(device)
    config = load_config(folder)
    with torch.device("meta"):
        model = Llama(config)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if quantise is not None:
        quantise_(model, quantise)

    for name, reader in read_tensors(folder, config, wanted):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf == "weight" and isinstance(module, QuantisedLinear):
            if device.type != "meta":
                module.quantise_from(reader.whole(torch.float32, device))
            continue
        if master is not None and device.type != "meta":
            from whp_kernels.optim import split

            exact = reader.whole(torch.float32, device)
            tensor = split(exact)[0]
            master(name, exact)
        else:
            tensor = reader.whole(dtype, device)
        setattr(module, leaf, torch.nn.Parameter(tensor, requires_grad=quantise is None))
    return model


class SliceReader:
    """One tensor of a weight file, read when asked; usable until the iterator it came from moves on."""

    def __init__(self, shard: Any, path: Path, name: str) -> None:
        self._shard, self._path, self._name = shard, path, name
        view = shard.get_slice(name)
        self.shape: tuple[int, ...] = tuple(view.get_shape())
        self._kind: str = view.get_dtype()

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the file; None where safetensors has a dtype that is unknown here."""
        return _DTYPES.get(self._kind)

    def whole(self, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> torch.Tensor:
        """The tensor as ``dtype`` (None: as in the file) on ``device``, in memory of its own."""
        with damaged_file(self._path):
            tensor = self._shard.get_tensor(self._name)
        return _own(tensor, dtype, device)

    def rows(
        self, first: int, last: int, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> torch.Tensor:
        """The rows ``first`` .. ``last`` - 1 of the first axis, [last - first, ...]; nothing else is read.

        Both are cut to the number of rows, so that the empty shard of a process beyond the last row is [0,
        ...].
        """
        length = self.shape[0]
        first, last = min(first, length), min(last, length)
        if first >= last:
            return torch.empty((0, *self.shape[1:]), dtype=dtype or self.dtype, device=device)
        with damaged_file(self._path):
            tensor = self._shard.get_slice(self._name)[first:last]
        return _own(tensor, dtype, device)


def read_tensors(
    folder: str | os.PathLike, config: LlamaConfig, wanted: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, SliceReader]]:
    """The tensors of a model folder in the order of its files, each with a reader that has read nothing yet.

    So a process of several can take the rows of its shards and no others. Every process has to go through to
    the
    end: what is missing is told after the last tensor.

    Args:
        folder, config: see ``load_config``.
        wanted: the names and shapes that must be there, and no others.

    Raises:
        UserError: no weights, only pickled ones, a shard missing or damaged, a tensor missing, unexpected, of
            a wrong shape or not of floating point.
    """
    folder = Path(folder)
    seen: set[str] = set()
    for path in _find_shards(folder):
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
                reader = SliceReader(shard, path, name)
                _check_tensor(reader, path, name, tuple(wanted[name]))
                yield name, reader
    missing = [name for name in wanted if name not in seen]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        hint = "download the model again"
        if missing == [_TIED_HEAD]:
            hint += ', or set "tie_word_embeddings": true in config.json if the model has no head of its own'
        raise UserError(f"{folder}: the tensor {missing[0]}{more} is in none of the weight files; {hint}.")


Tensors = Mapping[str, "torch.Tensor | Callable[[], torch.Tensor]"]


def save_model(
    model: Llama | Tensors | Iterable[tuple[str, torch.Tensor]],
    folder: str | os.PathLike,
    max_shard_bytes: int = 5 * 2**30,
    dtype: torch.dtype | None = None,
    *,
    config: LlamaConfig | None = None,
) -> None:
    """Writes weights, index, config.json and generation_config.json; the same model gives the same bytes.

    A tied head is written once, as the embedding. Each file is written beside its place and moved there when
    it is whole; config.json comes last, so a folder that has one is complete. Weight files of an earlier save
    in the same folder are removed.

    Args:
        model: on any device. Or its tensors: a mapping of names to tensors, or to calls that make them; or an
            iterator of (name, tensor) in the order of ``Llama(config).named_parameters()``. Calls and
            iterators are asked for a tensor when it is its turn, so only the shard being written is in
            memory.
        folder: made if need be.
        max_shard_bytes: a shard holds at most so many bytes of tensors, or one larger tensor.
        dtype: of the written weights; None: as they are (only of a model).
        config: of the model whose tensors are given.

    Raises:
        ValueError: tensors without ``dtype`` or ``config``, or names, order or shapes that are not those of
            the config's model. A model with adapters or quantised weights has other names: save
            ``whp_fast.adapters.merged`` of it.
    """
    if isinstance(model, Llama):
        config, tensors = model.config, dict(model.named_parameters())
        written = dtype or next(iter(tensors.values())).dtype
        kept = {name: dtype or parameter.dtype for name, parameter in tensors.items()}
    else:
        if dtype is None or config is None:
            raise ValueError("tensors need dtype and config")
        written, tensors, kept = dtype, model, {}
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Llama(config).named_parameters()}
    if isinstance(tensors, Mapping) and tensors.keys() != shapes.keys():
        raise ValueError(
            f"the tensors are not those of a {config.model_type} model of this config: "
            f"{sorted(tensors.keys() ^ shapes.keys())[0]}"
        )
    sizes = {name: math.prod(shape) * kept.get(name, written).itemsize for name, shape in shapes.items()}

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # A folder whose config.json is there is complete: take it away first, put it back last.
    (folder / "config.json").unlink(missing_ok=True)
    (folder / _INDEX).unlink(missing_ok=True)
    for pattern in (_SINGLE, "model-?????-of-?????.safetensors"):
        for old in folder.glob(pattern):
            old.unlink()

    shards = _plan_shards(sizes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    source = _in_order(tensors, shapes)
    for number, names in enumerate(shards, start=1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {name: _to_write(next(source), kept.get(name, written)) for name in names}
        with whole_file(folder / file) as partial:
            save_file(shard, partial, metadata={"format": "pt"})
        del shard
        weight_map.update(dict.fromkeys(names, file))
    next(source, None)  # what an iterator has too many is told here
    if len(shards) > 1:
        total = sum(sizes.values())
        write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    write_json(folder / "generation_config.json", _generation_config(config))
    raw = config.to_hf()
    # transformers 4 reads torch_dtype, transformers 5 reads dtype.
    raw["dtype"] = raw["torch_dtype"] = str(written).removeprefix("torch.")
    write_json(folder / "config.json", raw)


def _find_shards(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
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
    with damaged_file(path):
        opened = safe_open(path, framework="pt", device="cpu")
        shard = opened.__enter__()
    try:
        yield shard
    finally:
        opened.__exit__(None, None, None)


@contextmanager
def damaged_file(path: Path) -> Iterator[None]:
    """Tells the damages that a download can have, in place of the errors of safetensors.

    Raises:
        UserError: the file that is opened or read within cannot be read.
    """
    try:
        yield
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


def _check_tensor(reader: SliceReader, path: Path, name: str, expected: tuple[int, ...]) -> None:
    if reader.shape != expected:
        raise UserError(
            f"{path}: the tensor {name} has shape {list(reader.shape)}, and config.json beside it asks "
            f"for {list(expected)}; use a config.json and weights of the same model."
        )
    dtype = reader.dtype
    if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:
        raise UserError(
            f"{path}: the tensor {name} is of {dtype or reader._kind}, and quantized weights cannot be "
            "trained here; use the unquantized checkpoint of the model."
        )


def _own(tensor: torch.Tensor, dtype: torch.dtype | None, device: str | torch.device) -> torch.Tensor:
    """The copy is forced: what safetensors returns may be a view of the mapped file, which would be read from
    disk again and again and change with the file."""
    return tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)


def _in_order(
    tensors: Tensors | Iterable[tuple[str, torch.Tensor]], shapes: dict[str, tuple[int, ...]]
) -> Iterator[torch.Tensor]:
    """The tensors in the order of ``shapes``, each made when it is asked for and checked."""
    if isinstance(tensors, Mapping):
        pairs = ((name, tensors[name]) for name in shapes)
    else:
        pairs = iter(tensors)
    for name, shape in shapes.items():
        found, tensor = next(pairs, ("the end", None))
        if found != name:
            raise ValueError(f"expected the tensor {name}, got {found}")
        tensor = tensor() if callable(tensor) and not isinstance(tensor, torch.Tensor) else tensor
        if tuple(tensor.shape) != shape:
            raise ValueError(f"the tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        yield tensor
        del tensor  # not held while the next one is made
    for name, _ in pairs:
        raise ValueError(f"expected the end of the tensors, got {name}")


def _to_write(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()


def _plan_shards(sizes: dict[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names in the order of the model, a new shard when the next tensor would not fit; sizes in bytes."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _generation_config(config: LlamaConfig) -> dict[str, Any]:
    """Only the special ids: sampling settings belong to whoever generates."""
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    return {"_from_model_config": True, **{key: value for key, value in ids.items() if value is not None}}


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the file is not JSON ({error}); download it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: the file holds no JSON object; download it again.")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place to write to; moved to ``path`` when it is whole."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(partial, 0o666 & ~mask)  # safetensors writes files that nobody else may read
    os.replace(partial, path)
