"""The stages of a job, each with what it reads, what it writes and what it depends on."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path

import numpy as np
import torch
from rich.markup import escape

from whp_fast import attention
from whp_fast.alignment import save_alignment
from whp_fast.anchors import nearest_words
from whp_fast.artifacts import RunFolder, Stage, files_digest, flatten, stage_fingerprint, write_json
from whp_fast.attack_stage import AttackStage, Begun
from whp_fast.checkpoint import load_model
from whp_fast.choices import tell_choices
from whp_fast.config import RESULT_OF_MEMORY, JobConfig, TrainConfig
from whp_fast.corpus import Blocks, TokenWriter, tokenise_corpus
from whp_fast.energy import EnergyMeter, uuids_at_work
from whp_fast.errors import UserError
from whp_fast.evaluate import EvaluationResult, evaluate, next_token_table
from whp_fast.evaluation.chat_template import ChatTemplate, load_chat_template
from whp_fast.evaluation.questions import answers_given_away
from whp_fast.export import export_model, model_card
from whp_fast.fp8 import refuse_fp8
from whp_fast.inputs import Inputs, model_files
from whp_fast.judge import LexicalJudge
from whp_fast.label_stage import RETAIN, TARGETS, LabelStage, labels_file
from whp_fast.objectives import LabelTargets, Objective
from whp_fast.processes import Processes
from whp_fast.progress import say, track
from whp_fast.report import write_report
from whp_fast.report_stage import report_data
from whp_fast.soft_targets import RetainTargets, SoftTargets
from whp_fast.teacher_cache import HiddenCache
from whp_fast.training_stage import TrainingStage


class Job:
    """The stages of one job; each method runs its stage or finds it complete.

    Everything that can be wrong with the inputs is looked at in the constructor, before any long work.
    """

    def __init__(self, config: JobConfig, *, overwrite: bool = False, processes: Processes | None = None):
        _refuse_what_memory_cannot_be(config)
        self.config = config
        self.processes = processes or Processes()
        self.device = _device(config.run.device, self.processes)
        refuse_fp8(config, self.device)
        _set_threads(config.run.threads, self.processes)
        if self.device.type == "cuda":
            # the same seed gives the same bits; cuBLAS reads the variable when it starts
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        attention.choose(config.model.attention, self.device, getattr(torch, config.model.compute_dtype))
        self.inputs = Inputs(config)
        self._chat = self._chat_template()
        asked = config.evaluate.attacks
        self._attack_stage = AttackStage(config, self.inputs, self._chat) if asked else None
        self.stages: dict[str, Stage] = {}
        self.path = Path(config.run.dir)
        # the folder is the first process's; the others write nothing but parts of what it makes whole
        first = self.processes.first
        self._run = RunFolder(self.path, config.settings(), overwrite=overwrite) if first else None
        self.processes.wait()
        self._announce()

    def close(self) -> None:
        """Leave the run folder to others."""
        if self._run is not None:
            self._run.close()

    # Stages --------------------------------------------------------------------------------------------

    def prepare(self) -> Stage:
        """Corpus to tokens: ``tokens.npy``, ``document_starts.npy``."""
        data, rules = self.config.data, self.config.anchors.reference_rules

        def work(folder: Path) -> dict:
            writer = TokenWriter(folder / "tokens.npy", self.inputs.tokenizer.vocab_size)
            with writer, track("prepare", sum(f.stat().st_size for f in self.inputs.corpus)) as advance:
                counts = tokenise_corpus(
                    self.inputs.corpus,
                    self.inputs.tokenizer,
                    writer,
                    text_field=data.text_field,
                    errors=data.encoding_errors,
                    reference_chunks=rules,
                    progress=advance,
                )
            np.save(folder / "document_starts.npy", np.array(writer.document_starts, dtype=np.int64))
            counts["blocks"] = len(Blocks.of(np.broadcast_to(0, writer.count), data.context, drop_tail=rules))
            if counts["blocks"] == 0:
                raise UserError(
                    f"data.corpus: {writer.count} tokens make no block of {data.context} under the reference "
                    "rules, which drop the last one; use a longer corpus or a shorter data.context."
                )
            return counts

        depends = {
            "corpus": files_digest(self.inputs.corpus),
            "tokenizer": files_digest(self.inputs.tokenizer.files),
        }
        depends |= {"settings": dataclasses.asdict(data), "reference_rules": rules}
        stage = self._stage("prepare", depends, work)
        s = stage.summary
        self._told(
            stage,
            f"{s['documents']} documents, {s['tokens']:,} tokens, {s['blocks']:,} blocks of {data.context}",
        )
        return stage

    def align(self) -> Stage:
        """Dictionary and blocks to translated blocks and their map: ``anchors.json``, ``*.npy``."""
        anchors = self.config.anchors

        def work(folder: Path) -> dict:
            write_json(folder / "anchors.json", self.inputs.dictionary.entries)
            write_json(folder / "dropped.json", self.inputs.dictionary.dropped)
            blocks = self._blocks()
            aligner = self.inputs.aligner()
            with track("align", blocks.n_tokens) as advance:
                parts = (part for _, part in aligner.align_stream(blocks))
                matches = save_alignment(folder, parts, progress=advance)
            found = dict(zip(self.inputs.dictionary.expressions, matches.tolist()))
            write_json(folder / "matches.json", dict(sorted(found.items(), key=lambda item: -item[1])))
            return {
                "expressions": len(found),
                "dropped": len(self.inputs.dictionary.dropped),
                "matched": sum(1 for n in found.values() if n),
                "occurrences": int(matches.sum()),
            }

        # as pairs: the draws, and under the reference rules the matches too, follow the order of the file
        depends = {"anchors": list(self.inputs.dictionary.entries.items())}
        depends["prepare"] = self.stages["prepare"].fingerprint
        depends |= {"rules": dataclasses.asdict(anchors), "seed": self.config.run.seed}
        stage = self._stage("align", depends, work)
        s = stage.summary
        self._told(
            stage,
            f"{s['matched']} of {s['expressions']} expressions occur, {s['occurrences']:,} times in all",
        )
        if s["occurrences"] == 0:
            self._warn_no_match()
        return stage

    def reinforce(self) -> Stage:
        """The base trained further on the corpus: ``model/``, ``log.jsonl``."""

        settings = self.config.reinforce
        depends = {"model": self.inputs.model_digest, "prepare": self.stages["prepare"].fingerprint}
        depends |= self._training_depends(settings)
        training = self._training(settings, depends)

        def work(folder: Path) -> dict:
            blocks = self._blocks()
            objectives = [Objective(blocks, LabelTargets(blocks, None))]
            summary, _ = training.work(folder, lambda trainee: objectives)
            return summary

        stage = self._stage("reinforce", depends, work, together=True)
        training.snapshots().remove()
        s = stage.summary
        self._told(stage, f"{s['steps']} steps, loss {s['first_loss']:.3f} to {s['last_loss']:.3f}")
        return stage

    def label(self) -> Stage:
        """Both models to generic labels: ``labels_alpha_*.npy`` (int32, one label a token), ``reason.npy``,
        ``base_choice.npy``, ``statistics.json``."""
        settings, unlearn = self.config.label, self.config.unlearn

        def work(folder: Path) -> dict:
            reinforced = self.stages["reinforce"].folder
            return self._label_stage().work(folder, reinforced, self.stages["align"].folder, self._blocks())

        depends = {"settings": dataclasses.asdict(settings), "align": self.stages["align"].fingerprint}
        depends["reinforce"] = self.stages["reinforce"].fingerprint
        if unlearn.target != "hard":
            depends["cache"] = unlearn.cache_dtype
        if unlearn.retain:
            depends["retain"] = [files_digest(self.inputs.retain), unlearn.cache_dtype]
        stage = self._stage("label", depends, work, together=True)
        s = stage.summary
        trained = 100 * s["trained"] / max(1, s["positions"])
        changed = 100 * s["changed_from_text"] / max(1, s["trained"])
        self._told(stage, f"{trained:.1f} % of positions trained, {changed:.1f} % of them unlike the text")
        return stage

    def unlearn(self) -> Stage:
        """The base trained on the labels: ``model/``, ``log.jsonl``, ``curve.json``."""
        settings = self.config.unlearn
        depends = {"model": self.inputs.model_digest, "label": self.stages["label"].fingerprint}
        depends |= self._training_depends(settings) | {"alpha": self.config.label.alpha}
        if settings.evaluate_every:
            depends["evaluate"] = self.inputs.evaluation_digest()
        training = self._training(settings, depends)

        def point(trainee, step: int, n_steps: int) -> dict | None:
            due = settings.evaluate_every and (step % settings.evaluate_every == 0 or step == n_steps)
            if not due or self.inputs.evaluation is None or not (self.processes.first or trainee.sharded):
                return None
            found = self._evaluate(trainee.model, self.config.evaluate.curve_prompts or None)
            return found.figures | {"intervals": found.intervals}

        def work(folder: Path) -> dict:
            summary, curve = training.work(folder, self._objectives, point)
            if self.processes.first:
                write_json(folder / "curve.json", curve)
            return summary

        stage = self._stage("unlearn", depends, work, together=True)
        training.snapshots().remove()
        s = stage.summary
        self._told(stage, f"{s['steps']} steps, loss {s['first_loss']:.3f} to {s['last_loss']:.3f}")
        return stage

    def evaluate(self) -> Stage:
        """Before, after and the oracle: ``before.json``, ``after.json``, ``oracle.json``,
        ``next_tokens_*.json``.
        """
        models = {"before": self.inputs.base, "after": self.stages["unlearn"].folder / "model"}
        if self.config.evaluate.oracle:
            models["oracle"] = Path(self.config.evaluate.oracle)

        def work(folder: Path) -> dict:
            figures = {}
            with track("evaluate", len(models)) as advance:
                for name, path in models.items():
                    if self.inputs.evaluation is None:
                        break
                    model = load_model(path, dtype=torch.float32, device=self.device)
                    if name == "after":  # what is measured is what is exported, rounding included
                        model.to(getattr(torch, self.config.export.dtype)).float()
                    result = self._evaluate(model, None)
                    write_json(folder / f"{name}.json", result.to_json())
                    if self.inputs.evaluation.probability:
                        prompts = [p.prompt for p in self.inputs.evaluation.probability]
                        tables = next_token_table(model, self.inputs.tokenizer, prompts)
                        write_json(folder / f"next_tokens_{name}.json", tables)
                    figures[name] = result.figures
                    del model  # before the next one is read
                    advance(1)
            return figures

        depends = {"evaluate": self.inputs.evaluation_digest(), "unlearn": self.stages["unlearn"].fingerprint}
        depends |= {"model": self.inputs.model_digest, "dtype": self.config.export.dtype}
        if "oracle" in models:
            depends["oracle"] = files_digest(model_files(models["oracle"]), sampled=True)
        stage = self._stage("evaluate", depends, work)
        before, after = stage.summary.get("before", {}), stage.summary.get("after", {})
        known = [key for key in before if before[key] is not None and after.get(key) is not None]
        self._told(
            stage,
            "; ".join(f"{key.replace('_', ' ')} {before[key]:.3f} to {after[key]:.3f}" for key in known),
        )
        return stage

    def export(self) -> Stage:
        """The Hugging Face folder."""
        settings = self.config.export

        def work(folder: Path) -> dict:
            model = load_model(self.stages["unlearn"].folder / "model", dtype=torch.float32)
            figures = self.stages["evaluate"].summary
            card = model_card(
                name=settings.name or f"{self.inputs.base.name}-unlearned",
                base=self.inputs.base.name,
                corpus=[Path(entry).name for entry in self.config.data.corpus],
                tokens=self.stages["prepare"].summary["tokens"],
                documents=self.stages["prepare"].summary["documents"],
                expressions=len(self.inputs.dictionary.entries),
                before=figures.get("before", {}),
                after=figures.get("after", {}),
                settings=self._card_settings(),
            )
            export_model(
                model,
                folder,
                self.inputs.tokenizer,
                card,
                dtype=getattr(torch, settings.dtype),
                shard_mib=settings.shard_mib,
                base=self.inputs.base,
            )
            return {}

        depends = {"unlearn": self.stages["unlearn"].fingerprint, "settings": dataclasses.asdict(settings)}
        depends["evaluate"] = self.stages["evaluate"].fingerprint
        stage = self._stage("export", depends, work)
        self._told(stage, f"Hugging Face folder {stage.folder}")
        return stage

    def attack(self) -> Stage | None:
        """What is tried to bring the text back: ``attacks.json``; None where nothing is asked for."""
        if self._attack_stage is None:
            return None
        models = {"after": self.stages["unlearn"].folder / "model"}
        if self.config.evaluate.oracle:
            models["oracle"] = Path(self.config.evaluate.oracle)
        depends = self._attack_stage.depends() | {"evaluate": self.stages["evaluate"].fingerprint}
        begun = Begun(self.path / ".attack.snapshots", stage_fingerprint("attack", depends))

        def work(folder: Path) -> dict:
            return self._attack_stage.work(folder, models, self.device, begun)

        stage = self._stage("attack", depends, work)
        if self.processes.first:
            begun.remove()
        self._told(stage, f"{', '.join(stage.summary['attacks'])} on {' and '.join(models)}")
        return stage

    def report(self, earlier_seconds: dict[str, float]) -> Stage:
        """``report.html``, ``report.md``, ``metrics.json`` and pictures."""
        seconds = {**earlier_seconds, **{name: stage.seconds for name, stage in self.stages.items()}}

        def work(folder: Path) -> dict:
            data = report_data(
                self.config, self.inputs, self.stages, self._blocks(), seconds, self._warnings()
            )
            write_report(folder, data)
            return {}

        depends = {name: stage.fingerprint for name, stage in self.stages.items()} | {
            "seconds": earlier_seconds
        }
        stage = self._stage("report", depends, work)
        self._told(stage, f"{stage.folder / 'report.html'}")
        return stage

    # Parts of stages -----------------------------------------------------------------------------------

    def _training(self, settings: TrainConfig, depends: dict) -> TrainingStage:
        return TrainingStage(
            self.config,
            settings,
            self.inputs.base,
            self.path,
            stage_fingerprint(settings.name, depends),
            self.device,
            self.processes,
        )

    def _training_depends(self, settings: TrainConfig) -> dict:
        memory = dataclasses.asdict(self.config.memory)
        return {
            "settings": dataclasses.asdict(settings),
            "dtype": [self.config.model.compute_dtype, self.config.model.fp8],
            "seed": self.config.run.seed,
            "memory": {key: memory[key] for key in RESULT_OF_MEMORY},
        }

    def _label_stage(self) -> LabelStage:
        return LabelStage(self.config, self.inputs, device=self.device, processes=self.processes)

    def _objectives(self, trainee) -> list[Objective]:
        """What the base is trained on: labels or the teachers' distributions, and text to keep."""
        settings, label = self.config.unlearn, self.stages["label"].folder
        blocks = self._blocks()
        labels = np.load(label / labels_file(self.config.label.alpha), mmap_mode="r")
        heads = None
        if settings.target != "hard" or settings.retain:
            heads = self._label_stage().heads(self.stages["reinforce"].folder)
        if settings.target == "hard":
            objectives = [Objective(blocks, LabelTargets(blocks, labels))]
        else:
            targets = SoftTargets(
                label / TARGETS,
                *heads,
                labels=labels,
                context=self.config.data.context,
                alpha=self.config.label.alpha,
                direction=settings.target,
            )
            objectives = [Objective(blocks, targets)]
        if settings.retain:
            kept = Blocks.of(np.load(label / RETAIN / "tokens.npy", mmap_mode="r"), self.config.data.context)
            cache = HiddenCache(label / RETAIN, "base")
            objectives.append(Objective(kept, RetainTargets(cache, heads[0], kept), settings.retain_weight))
        return objectives

    # Small things --------------------------------------------------------------------------------------

    def _stage(self, name: str, depends: dict, work, *, together: bool = False) -> Stage:
        """Run a stage, or find it complete. Its folder is the first process's, which alone does the work, or
        with ``together`` as one of all; the others wait for it."""
        tell = self.processes.from_first

        def begin(folder: Path) -> dict:
            if together:
                tell(folder)
            gpus = self.processes.world_size if self.device.type == "cuda" else 0
            with EnergyMeter(self._gpus_to_read()) as meter:
                summary = work(folder) or {}
                # what an earlier start took was not read
                joules = {} if summary.get("earlier_seconds") else meter.joules()
            return summary | {"cost": {"gpus": gpus, "joules": joules}}

        if self._run is not None:
            done = tell(self._run.finished(name, stage_fingerprint(name, depends)))
            if done is None:
                done = tell(self._run.stage(name, depends, begin))
        else:
            done = tell()
            if done is None:
                if together:
                    work(tell())
                done = tell()
        self.stages[name] = done
        return done

    def _gpus_to_read(self) -> list[str]:
        """GPUs whose energy this process can read: all of the job, or none."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return uuids_at_work(self.device, here) if here == self.processes.world_size else []

    def _chat_template(self) -> ChatTemplate | None:
        if not self.config.evaluate.chat_template:
            return None
        folder = Path(self.config.data.tokenizer or self.inputs.base)
        folder = folder if folder.is_dir() else folder.parent
        chat = load_chat_template(folder, self.inputs.tokenizer)
        if chat is None:
            raise UserError(f"evaluate.chat_template: {folder} has none; set it to false.")
        return chat

    def _warnings(self) -> list[str]:
        """What a person should know of the prompts."""
        found = answers_given_away(self.inputs.evaluation) if self.inputs.evaluation else []
        return found + (self._attack_stage.warnings if self._attack_stage else [])

    def _blocks(self) -> Blocks:
        tokens = np.load(self.stages["prepare"].folder / "tokens.npy", mmap_mode="r")
        return Blocks.of(tokens, self.config.data.context, drop_tail=self.config.anchors.reference_rules)

    def _evaluate(self, model, max_prompts: int | None) -> EvaluationResult:
        return evaluate(
            model,
            self.inputs.tokenizer,
            self.inputs.evaluation,
            judge=LexicalJudge(self.inputs.dictionary.expressions),
            max_prompts=max_prompts,
            max_new_tokens=self.config.evaluate.max_new_tokens,
            context=self.config.data.context,
            chat=self._chat,
        )

    def _announce(self) -> None:
        kind = (
            torch.cuda.get_device_name()
            if self.device.type == "cuda"
            else f"CPU, {torch.get_num_threads()} threads"
        )
        model, folder = escape(str(self.inputs.base)), escape(str(self.path))
        say(f"[bold]whp_fast[/bold]  {model}  on {kind}; run folder {folder}")
        tell_choices(self.config, self.device, self.processes)
        dropped = self.inputs.dictionary.dropped
        if dropped:
            say(f"  anchors     {len(dropped)} expressions left out by the cleaning rules")
        for warning in self._warnings():
            say(f"[yellow]warning:[/yellow] {escape(warning)}")

    def _told(self, stage: Stage, text: str) -> None:
        name = stage.folder.name
        when = "complete" if stage.skipped else f"{stage.seconds:.1f} s"
        say(f"  [bold]{name:<11}[/bold] {when:>9}  {escape(text)}")

    def _warn_no_match(self) -> None:
        sample = self.inputs.tokenizer.decode([int(t) for t in self._blocks().tokens[:200_000]])
        pairs = ", ".join(f"{a!r} ~ {b!r}" for a, b in nearest_words(self.inputs.dictionary, sample))
        say(
            f"[yellow]warning:[/yellow] {escape(self.config.anchors.path)}: no expression occurs in the "
            "corpus, so only the reinforced model tells what to forget; the nearest words are "
            f"{escape(pairs)}"
        )

    def _card_settings(self) -> dict[str, object]:
        flat = flatten(self.config.settings())
        wanted = ("anchors.reference_rules", "data.context", "model.compute_dtype")
        kept = {
            k: v
            for k, v in flat.items()
            if k in wanted or k.split(".")[0] in ("reinforce", "label", "unlearn", "run")
        }
        return {k: v for k, v in kept.items() if not k.endswith(("_mib", "evaluate_every"))}


def _device(name: str, processes: Processes) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and processes.several:
        name = f"cuda:{processes.local_rank}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"run.device: {name!r} cannot be used here ({str(error).splitlines()[0]}); set cpu or auto."
        ) from error
    return device


def _refuse_what_memory_cannot_be(config: JobConfig) -> None:
    """What no section of the settings sees alone, and what is not installed."""
    memory = config.memory
    if memory.gradients == "bfloat16" and (
        memory.lora_rank or memory.weights_dtype(config.model.compute_dtype) == "float32"
    ):
        what = "adapters" if memory.lora_rank else "these weights"
        raise UserError(
            f"memory.gradients: {what} are float32 and so are their gradients; set float32, or train "
            "bfloat16 weights without adapters."
        )
    if memory.lora_rank and not memory.lora_targets:
        raise UserError("memory.lora_targets: an empty list leaves nothing to train; name projections.")
    for key in ("optimizer", "frozen"):
        if getattr(memory, key) in ("bitsandbytes", "nf4", "int8"):
            if importlib.util.find_spec("bitsandbytes") is None:
                raise UserError(
                    f"memory.{key}: bitsandbytes is not installed; pip install bitsandbytes, or set another "
                    "value."
                )


def _set_threads(threads: int, processes: Processes) -> None:
    """As many as are set; else the machine's cores, divided among its processes (torchrun gives each one)."""
    if not threads and processes.several:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes.world_size))
        threads = max(1, len(os.sched_getaffinity(0)) // here)
    if threads:
        torch.set_num_threads(threads)
