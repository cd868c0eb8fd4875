"""Everything a job reads, loaded and checked before any long work."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from whp_fast.alignment import Aligner
from whp_fast.anchors import load_dictionary
from whp_fast.artifacts import files_digest
from whp_fast.checkpoint import load_config, load_model
from whp_fast.config import ONLY_ATTACKS, JobConfig
from whp_fast.corpus import corpus_files
from whp_fast.errors import UserError
from whp_fast.label import make_aligner
from whp_fast.prompts import EvaluationFiles, EvaluationSet
from whp_fast.reference_rules import ReferenceAligner
from whp_fast.tokens import load_tokenizer


class Inputs:
    """The inputs of a job.

    Attributes:
        base: folder of the model that shall forget.
        model_config: its shape.
        tokenizer: the tokenizer of the model.
        corpus: the files of the text to forget.
        retain: the files of the text to stay unchanged on.
        dictionary: the cleaned dictionary.
        evaluation: the evaluation files, or None when none is named.
        model_digest: fingerprint of the base's files.

    Raises:
        UserError: whatever is missing, broken, or does not fit together.
    """

    def __init__(self, config: JobConfig):
        self._evaluate, self._anchors, self._seed = config.evaluate, config.anchors, config.run.seed
        self.base = Path(config.model.path)
        self.model_config = load_config(self.base)
        self.tokenizer = load_tokenizer(Path(config.data.tokenizer or self.base))
        self._check_sizes(config.data.context)
        load_model(self.base, device="meta")  # reads the headers alone: wrong weights show now
        self.corpus = corpus_files(config.data.corpus)
        self.retain = corpus_files(config.unlearn.retain, "unlearn.retain") if config.unlearn.retain else []
        self.dictionary = load_dictionary(config.anchors.path)
        self.evaluation = self._evaluation_set()
        self.model_digest = files_digest(model_files(self.base), sampled=True)

    def aligner(self) -> Aligner | ReferenceAligner:
        """The aligner of the job's rules."""
        return make_aligner(
            self.dictionary,
            self.tokenizer,
            reference_rules=self._anchors.reference_rules,
            seed=self._seed,
            match_across_lines=self._anchors.match_across_lines,
        )

    def evaluation_digest(self) -> dict:
        """Fingerprint of the evaluation files, and the settings they are used with."""
        files = [
            f
            for path in self._evaluation_files().values()
            for f in ([path] if path.is_file() else corpus_files([path]))
        ]
        settings = dataclasses.asdict(self._evaluate)
        for name in ONLY_ATTACKS:
            del settings[name]
        return {"files": files_digest(files), "settings": settings}

    def _evaluation_files(self) -> dict[str, Path]:
        names = {
            "familiarity": "familiarity",
            "probability": "probability",
            "choices": "choices",
            "text": "general_text",
        }
        settings = dataclasses.asdict(self._evaluate)
        return {name: Path(settings[key]) for name, key in names.items() if settings[key]}

    def _evaluation_set(self) -> EvaluationSet | None:
        files = self._evaluation_files()
        if self._evaluate.oracle:
            self._check_oracle(Path(self._evaluate.oracle))
        return EvaluationFiles(**files).load() if files else None

    def _check_oracle(self, folder: Path) -> None:
        rows = load_model(folder, device="meta").config.vocab_size
        if self.tokenizer.vocab_size > rows:
            raise UserError(
                f"evaluate.oracle: the tokenizer has {self.tokenizer.vocab_size} tokens but the embedding of "
                f"{folder} has {rows} rows; name a model with the same tokenizer."
            )

    def _check_sizes(self, context: int) -> None:
        longest = self.model_config.max_position_embeddings
        if context > longest:
            raise UserError(
                f"data.context: {context} tokens are more than the {longest} of max_position_embeddings in "
                f"{self.base / 'config.json'}; set data.context to {longest} or less."
            )
        if self.tokenizer.vocab_size > self.model_config.vocab_size:
            raise UserError(
                f"{self.tokenizer.path}: the tokenizer has {self.tokenizer.vocab_size} tokens but the "
                f"embedding of {self.base} has {self.model_config.vocab_size} rows; use this model's."
            )


def model_files(folder: Path) -> list[Path]:
    """The files that make a model, in a fixed order."""
    return sorted(
        [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json"), folder / "config.json"]
    )
