"""A model folder or a run folder: which models there are, and which files a run asks them about."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from whp_fast.checkpoint import load_model
from whp_fast.corpus import corpus_files, read_documents
from whp_fast.errors import UserError
from whp_fast.prompts import EvaluationFiles
from whp_fast.quantised import quantise_


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    models: name -> folder; of a run ``before``, ``after`` and, where there is one, ``oracle``.
    main: the name of the one that is attacked and compared with the oracle.
    export_dtype: dtype to which the run's weights are rounded when exported; None: as they are.
    files, target, text_field, anchors, context, max_new_tokens, relearn_lr, chat_template: what the run's
        settings say, None where they say nothing.
    """

    models: dict[str, Path]
    main: str
    tokenizer: Path
    export_dtype: str | None = None
    files: EvaluationFiles = field(default_factory=EvaluationFiles)
    target: list[Path] | None = None
    text_field: str = "text"
    anchors: Path | None = None
    context: int | None = None
    max_new_tokens: int | None = None
    relearn_lr: float | None = None
    chat_template: bool = False


def find_subject(path: Path, oracle: Path | None = None) -> Subject:
    """A model folder (with config.json) or a run folder (with settings.json).

    Raises:
        UserError: neither, or a run whose unlearning is not finished.
    """
    if (path / "config.json").is_file():
        models = {"model": path} | ({"oracle": oracle} if oracle else {})
        return Subject(models, "model", path)
    if not (path / "settings.json").is_file():
        raise UserError(
            f"{path}: neither a model folder (config.json) nor a run folder (settings.json); check the path."
        )
    settings = _settings(path)
    stage = path / "unlearn"
    if not (stage / "model" / "config.json").is_file():
        raise UserError(
            f"{path}: the run has no finished unlearn stage; let `python -m whp_fast.train` finish it."
        )
    base = _existing(path, settings, "model", "path")
    if base is None:
        raise UserError(
            f"{path / 'settings.json'}: model.path is missing; evaluate {stage / 'model'} by itself."
        )
    own_oracle = oracle or _existing(path, settings, "evaluate", "oracle")
    models = {"before": base, "after": stage / "model"} | ({"oracle": own_oracle} if own_oracle else {})
    evaluate, data = settings.get("evaluate", {}), settings.get("data", {})
    names = {"familiarity": "familiarity", "probability": "probability", "choices": "choices"}
    names |= {"text": "general_text"}
    corpus = data.get("corpus") or None
    return Subject(
        models=models,
        main="after",
        tokenizer=_existing(path, settings, "data", "tokenizer") or base,
        export_dtype=settings.get("export", {}).get("dtype"),
        files=EvaluationFiles(**{k: _existing(path, settings, "evaluate", v) for k, v in names.items()}),
        target=None
        if corpus is None
        else [Path(p) for p in ([corpus] if isinstance(corpus, str) else corpus)],
        text_field=data.get("text_field", "text"),
        anchors=_existing(path, settings, "anchors", "path"),
        context=data.get("context"),
        max_new_tokens=evaluate.get("max_new_tokens"),
        relearn_lr=settings.get("reinforce", {}).get("lr"),
        chat_template=evaluate.get("chat_template", False),
    )


def load_rounded(
    folder: Path,
    *,
    exported: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantise: str | None = None,
):
    """A model of a folder, for evaluation or, in float32, for training.

    Args:
        exported: dtype to which its weights are rounded first, as in the run's export; None: as they are.
        quantise: kind of `whp_fast.quantised` in which the (rounded) weights of its linear layers are kept.
    """
    rounded = exported not in (None, "float32")
    model = load_model(folder, dtype=dtype, device=device, quantise=None if rounded else quantise)
    if rounded:
        model.to(getattr(torch, exported)).to(dtype)
        if quantise is not None:
            quantise_(model, quantise)
    return model


def merged_files(given: EvaluationFiles, of_run: EvaluationFiles) -> EvaluationFiles:
    """The files that were given on the command line, and for the others those of the run."""
    return EvaluationFiles(
        *(
            getattr(given, f.name) if getattr(given, f.name) is not None else getattr(of_run, f.name)
            for f in dataclasses.fields(EvaluationFiles)
        )
    )


def read_texts(paths: list[Path], text_field: str = "text", errors: str = "strict") -> list[str]:
    """The documents of text files and folders, as the corpus of a run is read.

    Raises:
        UserError: see ``whp_fast.corpus``; no text at all.
    """
    documents = (parts for file in corpus_files(paths) for parts in read_documents(file, text_field, errors))
    texts = ["".join(parts) for parts in documents]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"{paths[0]}: there is no text in it; give a file with text.")
    return texts


def _settings(path: Path) -> dict[str, Any]:
    file = path / "settings.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: cannot be read ({error}); restore it, or evaluate the model folder."
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: it holds no settings; restore it, or evaluate the model folder.")
    return content


def _existing(run: Path, settings: dict[str, Any], section: str, name: str) -> Path | None:
    """The path of a setting, which must be there: relative paths count from the folder of the command."""
    value = settings.get(section, {}).get(name)
    if not value:
        return None
    path = Path(value)
    if not path.exists():
        raise UserError(
            f"{run / 'settings.json'}: {section}.{name} is {value}, which is not there; start the command "
            "in the "
            "folder in which the run was started, or restore the file."
        )
    return path
