"""The label stage: generic labels of all blocks, and what soft targets and a retained text need of the
teachers.

Several processes label a range of blocks each, cut between batches, so that the labels do not depend on their
number. Each keeps a copy of both models; under adapters it is one base with the adapter on and off.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from whp_fast import adapters, sharding
from whp_fast.alignment import load_alignment
from whp_fast.artifacts import NpyWriter, write_json
from whp_fast.banned_tokens import banned_tokens
from whp_fast.checkpoint import load_config, load_model, read_tensors
from whp_fast.compile_blocks import compile_blocks
from whp_fast.config import JobConfig
from whp_fast.corpus import Blocks, TokenWriter, tokenise_corpus
from whp_fast.errors import UserError
from whp_fast.fp8 import use_fp8
from whp_fast.inputs import Inputs
from whp_fast.label import Labeller, join_npy, label_range, split_blocks
from whp_fast.label_statistics import LabelStatistics
from whp_fast.model import Llama
from whp_fast.processes import Processes
from whp_fast.progress import track
from whp_fast.projections import stack_in_memory
from whp_fast.row_files import join_parts
from whp_fast.teacher_cache import CacheWriter, TargetWriter, cache_hidden_states, join_targets
from whp_fast.trainee import load_frozen

TARGETS = "targets"
RETAIN = "retain"
BANNED = "banned_tokens.npy"
ADAPTER = "reinforce"


class LabelStage:
    """The two forward passes over the corpus, and what is written of them."""

    def __init__(self, config: JobConfig, inputs: Inputs, *, device: torch.device, processes: Processes):
        self.config, self.inputs = config, inputs
        self.device, self.processes = device, processes
        self.alphas = list(dict.fromkeys([config.label.alpha, *config.label.more_alphas]))

    def work(self, folder: Path, reinforced: Path, alignment: Path, blocks: Blocks) -> dict:
        """Label all blocks into ``folder``; called by every process.

        Args:
            reinforced: folder of the reinforce stage.
            alignment: folder of the align stage.
        """
        settings = self.config.label
        banned = self._banned(np.load(alignment / "matches.npy"), blocks.tokens)
        if self.processes.first and settings.ban_share:
            np.save(folder / BANNED, banned)
        labeller = self._labeller(reinforced, banned)
        ranges = split_blocks(len(blocks), self.processes.world_size, settings.batch_blocks)
        mine = ranges[self.processes.rank]
        counts = self._write(folder, labeller, load_alignment(alignment), blocks, mine)
        if labeller.every_batch:
            labeller.idle(_batches_lacking(ranges, mine, settings.batch_blocks))
        if self.config.unlearn.retain:
            self._keep_retained(folder, labeller)
        everyone = self.processes.all_of(counts)
        if not self.processes.first:
            return {}
        statistics = LabelStatistics.sum(everyone)
        if self.processes.several:
            self._join(folder)
        summary = statistics.summary(self.inputs.tokenizer)
        write_json(folder / "statistics.json", summary)
        return {
            key: summary[key] for key in ("positions", "trained", "changed_from_text", "changed_from_base")
        }

    def heads(self, reinforced: Path) -> tuple[Tensor, Tensor]:
        """The LM heads [V, H] of the base and of the reinforced model, in the label stage's dtype.

        Adapters change no head: both are the base's."""
        dtype = getattr(torch, self.config.label.dtype)
        if self.config.memory.lora_rank:
            dtype = getattr(torch, self.config.model.compute_dtype)
            head = _head(self.inputs.base, dtype, self.device)
            return head, head
        return tuple(_head(folder, dtype, self.device) for folder in (self.inputs.base, reinforced / "model"))

    def _banned(self, matches: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        inputs = self.inputs
        return banned_tokens(
            inputs.dictionary, inputs.tokenizer, matches, tokens, self.config.label.ban_share
        )

    def _labeller(self, reinforced: Path, banned: np.ndarray) -> Labeller:
        settings = self.config.label
        how = {"batch_size": settings.batch_blocks, "chunk_mib": settings.chunk_mib, "device": self.device}
        how["banned"] = banned
        if self.config.memory.lora_rank:
            compute = getattr(torch, self.config.model.compute_dtype)
            model = load_frozen(self.inputs.base, self.config.memory, compute, self.device)
            adapters.load_adapter(model, ADAPTER, reinforced / "adapter")
            model.residual_dtype = torch.float32
            how |= {"as_base": partial(adapters.use_adapter, model, None)}
            how |= {"as_reinforced": partial(adapters.use_adapter, model, ADAPTER)}
            return Labeller(model, model, self.inputs.aligner(), self.alphas, **how)
        models = [self._teacher(folder) for folder in (self.inputs.base, reinforced / "model")]
        for model in models:
            use_fp8(model, settings.fp8, only_in_training=False)
            if self.config.model.layers == "compile":
                compile_blocks(model)
        how["every_batch"] = self.processes.several and self.config.memory.shard_teachers
        return Labeller(*models, self.inputs.aligner(), self.alphas, **how)

    def _teacher(self, folder: Path) -> Llama:
        dtype = getattr(torch, self.config.label.dtype)
        if not (self.processes.several and self.config.memory.shard_teachers):
            return stack_in_memory(load_model(folder, dtype=dtype, device=self.device).requires_grad_(False))
        config = load_config(folder)
        with torch.device("meta"):
            model = Llama(config).to(dtype).requires_grad_(False)
        mesh = sharding.process_mesh(self.processes, self.device, self.config.memory.replicas)
        sharding.shard(model, mesh, dtype, trained=False)
        model.to_empty(device=self.device)
        parameters = dict(model.named_parameters())
        for name, rows in sharding.read_rows(folder, config, parameters, dtype):
            sharding.local(parameters[name]).copy_(rows)
        return model

    def _write(self, folder: Path, labeller: Labeller, alignment, blocks: Blocks, mine: range):
        """Labels, reasons and the base's own choices of some blocks; returns their statistics."""
        statistics = LabelStatistics()
        part = self._part(folder)
        writers = [NpyWriter(part / labels_file(alpha), np.int32) for alpha in self.alphas]
        reasons = NpyWriter(part / "reason.npy", np.uint8)
        choices = NpyWriter(part / "base_choice.npy", np.int32)
        keep = None
        if self.config.unlearn.target != "hard":
            width = self.inputs.model_config.hidden_size
            keep = TargetWriter(self._part(folder / TARGETS), width, self.config.unlearn.cache_dtype)
        offsets = blocks.offsets()
        total = int(offsets[mine.stop] - offsets[mine.start])
        with track("label", total) as advance:
            for piece in label_range(
                labeller, blocks, alignment, mine.start, mine.stop, progress=advance, keep=keep
            ):
                for writer, row in zip(writers, piece.labels):
                    writer.append(row)
                reasons.append(piece.reason)
                choices.append(piece.own)
                following = np.full(piece.stop - piece.start, -1, dtype=np.int64)
                after = blocks.tokens[piece.start + 1 : piece.stop + 1]
                following[: len(after)] = after
                statistics.add(following, piece.labels[0], piece.own, piece.reason)
        for writer in (*writers, reasons, choices, *([keep] if keep is not None else [])):
            writer.close()
        return statistics

    def _keep_retained(self, folder: Path, labeller: Labeller) -> None:
        """The base's hidden states at all positions of the text to stay unchanged on."""
        part = self._part(folder / RETAIN)
        if self.processes.first:
            data = self.config.data
            with TokenWriter(folder / RETAIN / "tokens.npy", self.inputs.tokenizer.vocab_size) as writer:
                tokenise_corpus(
                    self.inputs.retain,
                    self.inputs.tokenizer,
                    writer,
                    text_field=data.text_field,
                    errors=data.encoding_errors,
                )
            if writer.count < 2:
                raise UserError("unlearn.retain: the files hold no text; name others, or leave it out.")
        self.processes.wait()
        blocks = Blocks.of(np.load(folder / RETAIN / "tokens.npy", mmap_mode="r"), self.config.data.context)
        size = self.config.label.batch_blocks
        ranges = split_blocks(len(blocks), self.processes.world_size, size)
        mine = ranges[self.processes.rank]
        offsets = blocks.offsets()
        total = int(offsets[mine.stop] - offsets[mine.start])
        width = self.inputs.model_config.hidden_size
        cache = CacheWriter(part, "base", width, self.config.unlearn.cache_dtype)
        with torch.inference_mode(), cache, track("retain", total) as advance:
            cache_hidden_states(
                labeller.base,
                blocks,
                cache,
                mine.start,
                mine.stop,
                batch_size=size,
                switch=labeller.as_base,
                progress=advance,
            )
        if labeller.every_batch:
            labeller.idle(_batches_lacking(ranges, mine, size), base_alone=True)

    def _part(self, folder: Path) -> Path:
        """Where this process writes its part of what belongs into ``folder``."""
        part = folder / f"part-{self.processes.rank}" if self.processes.several else folder
        part.mkdir(parents=True, exist_ok=True)
        return part

    def _join(self, folder: Path) -> None:
        parts = [f"part-{rank}" for rank in range(self.processes.world_size)]
        for name in (*map(labels_file, self.alphas), "reason.npy", "base_choice.npy"):
            join_npy(folder, name, parts)
        for part in parts:
            (folder / part).rmdir()
        if self.config.unlearn.target != "hard":
            join_targets(folder / TARGETS, parts)
        if self.config.unlearn.retain:
            join_parts(folder / RETAIN, "base", parts)


def _batches_lacking(ranges: list[range], mine: range, size: int) -> int:
    """Batches that the busiest process has beyond this one's."""
    return max(-(-len(r) // size) for r in ranges) - -(-len(mine) // size)


def labels_file(alpha: float) -> str:
    """Name of the file with the labels of a strength."""
    return f"labels_alpha_{str(float(alpha)).removesuffix('.0')}.npy"


def _head(folder: Path, dtype: torch.dtype, device: torch.device) -> Tensor:
    config = load_config(folder)
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    shape = (config.vocab_size, config.hidden_size)
    for _, reader in read_tensors(folder, config, {name: shape}):
        return reader.rows(0, shape[0], dtype).to(device)
    raise UserError(f"{folder}: there is no tensor {name}; download the model again.")
