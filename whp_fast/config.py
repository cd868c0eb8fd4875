"""Every setting of a job, with its meaning. The defaults are the paper's, for Llama 2 7B.

The command line is made from these classes: ``--unlearn.lr 2e-6`` sets ``UnlearnConfig.lr``, and ``--help``
shows the texts below.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from whp_fast.errors import UserError


@dataclass
class ModelConfig:
    """The model that shall forget."""

    path: str = ""
    """Hugging Face folder: config.json, safetensors weights, tokenizer files."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """dtype of matrix products in training; the weights themselves stay an exact float32 master."""
    fp8: Literal["off", "tensorwise", "rowwise"] = "off"
    """8-bit floats for the matrix products inside the blocks, in both trainings (Ada, Hopper and newer;
    emulated, slowly, on a CPU); one scale for a tensor, or for each row. Head and losses stay as they are."""
    layers: Literal["fused", "compile"] = "fused"
    """fused: norms, rotary embedding and SwiGLU as kernels of whp_kernels; compile: each block by
    torch.compile, which takes seconds at the first step."""
    attention: Literal["auto", "flash-attn", "flash-attn-4", "varlen", "sdpa", "compiled"] = "auto"
    """What computes attention; auto: the best that is installed. varlen and sdpa are torch's own."""


@dataclass
class MemoryConfig:
    """What is kept in which form while a model is trained. ``python -m whp_fast.plan`` tells what fits."""

    weights: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16: parameters in bfloat16 and a 16-bit remainder in the optimizer, together an exact float32
    master;
    float32: the master itself; auto: that of model.compute_dtype."""
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    """AdamW's two moments; int8: blocks of 1024 with a scale each."""
    gradients: Literal["float32", "bfloat16"] = "float32"
    """What gradients of several micro-batches are added up in; bfloat16 only beside bfloat16 weights."""
    offload_moments: bool = False
    """Moments and remainder live in host memory."""
    optimizer: Literal["whp", "bitsandbytes"] = "whp"
    """bitsandbytes: its 8-bit AdamW on float32 weights."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing: full keeps the inputs of blocks alone and computes a third more, selective
    keeps the results of matrix products and attention too."""
    lora_rank: int = 0
    """0: full training; above: both trainings are adapters of this rank over one frozen base."""
    lora_alpha: float = 16.0
    """Strength of an adapter: its product counts lora_alpha / lora_rank."""
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Projections with adapters."""
    frozen: Literal["auto", "float32", "bfloat16", "nf4", "int8"] = "auto"
    """How a frozen base is kept under adapters; auto: in model.compute_dtype. nf4 and int8 need
    bitsandbytes."""
    shard_teachers: bool = False
    """Several processes: the label stage's models are sharded in the place of a copy for each process."""
    replicas: int = 1
    """Groups of processes that hold a copy of the shards each (hybrid sharding over nodes)."""

    def __post_init__(self) -> None:
        _refuse_below(self, "memory", above_zero=("lora_alpha", "replicas"), from_zero=("lora_rank",))
        if self.gradients == "bfloat16" and self.weights == "float32":
            raise UserError(
                "memory.gradients: float32 weights have float32 gradients; set float32, or memory.weights "
                "bfloat16."
            )
        if self.optimizer == "bitsandbytes" and self.weights == "bfloat16" and not self.lora_rank:
            raise UserError(
                "memory.optimizer: bitsandbytes rounds its updates to the weights, and bfloat16 would lose "
                "most of them; set memory.weights float32, or the optimizer whp with memory.moments int8."
            )
        if self.frozen in ("nf4", "int8") and not self.lora_rank:
            raise UserError(
                f"memory.frozen: {self.frozen} weights are not trained themselves; set memory.lora_rank too."
            )
        known = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        for target in self.lora_targets:
            if target not in known:
                nearest = difflib.get_close_matches(target, known, n=1, cutoff=0.0)[0]
                raise UserError(
                    f"memory.lora_targets: there is no projection {target!r}; did you mean {nearest!r}?"
                )

    def weights_dtype(self, compute_dtype: str) -> str:
        """float32 or bfloat16: ``weights`` with auto resolved."""
        if self.weights != "auto":
            return self.weights
        return "float32" if self.optimizer == "bitsandbytes" else compute_dtype


RESULT_OF_MEMORY = (
    "weights",
    "moments",
    "gradients",
    "optimizer",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    "frozen",
)
"""The memory settings that change a result by more than the order of its sums."""
ONLY_ATTACKS = (
    "attacks",
    "attack_prompts",
    "attack_limit",
    "relearn_text",
    "relearn_share",
    "relearn_steps",
    "relearn_every",
    "prefix_lengths",
    "samples",
    "temperature",
)
"""The settings of evaluate that decide the attacks and nothing else: they may change in a finished run."""


@dataclass
class DataConfig:
    """The text to forget."""

    corpus: list[str] | str = field(default_factory=list)
    """.txt and .jsonl files, or folders of them; one path, or a list: [a.txt, b.jsonl]."""
    text_field: str = "text"
    """Field of a .jsonl line that holds the text."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8."""
    context: int = 512
    """Tokens in a block."""
    tokenizer: str = ""
    """tokenizer.model or tokenizer.json, or their folder; empty: the model's folder."""

    def __post_init__(self) -> None:
        if isinstance(self.corpus, str):
            self.corpus = [self.corpus] if self.corpus else []


@dataclass
class AnchorsConfig:
    """The dictionary of idiosyncratic expressions and their generic counterparts."""

    path: str = ""
    """JSON file: {"expression": "generic"} or {"expression": ["generic", ...]}."""
    reference_rules: bool = False
    """Match and mask exactly as the reference code does, to reproduce its labels token for token."""
    match_across_lines: bool = False
    """A line break in the corpus matches a space in an expression (books with wrapped lines)."""


@dataclass
class TrainConfig:
    """One training; the batch of a step is batch_blocks x accumulate blocks."""

    name: ClassVar[str] = "train"  # in messages
    epochs: float = 1.0
    """Passes over the corpus; not used when steps is set."""
    steps: int = 0
    """Optimizer steps; 0: as many as the epochs take."""
    lr: float = 1e-6
    """Highest learning rate."""
    batch_blocks: int = 8
    """Blocks in a micro-batch."""
    accumulate: int = 16
    """Micro-batches in a step."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after the warm-up."""
    final_lr_share: float = 0.0
    """What a falling schedule ends at, as a share of the highest learning rate."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """AdamW's; the reference fine-tuning's values."""
    weight_decay: float = 0.0
    """AdamW's, decoupled; norms and biases are left out of it."""
    clip_grad_norm: float = 1.0
    """Longest gradient; 0: no clipping."""
    loss_chunk_mib: int = 256
    """Memory for the logits of one chunk of the loss."""

    def __post_init__(self) -> None:
        _refuse_below(self, self.name, above_zero=("lr", "batch_blocks", "accumulate", "loss_chunk_mib"))
        _refuse_below(self, self.name, from_zero=("steps", "warmup_steps", "weight_decay", "clip_grad_norm"))
        if not 0 <= self.final_lr_share <= 1:
            raise UserError(
                f"{self.name}.final_lr_share: {self.final_lr_share} is no share; set a value from 0 to 1."
            )
        if self.steps == 0 and not 0 < self.epochs < math.inf:
            raise UserError(
                f"{self.name}.epochs: {self.epochs} leaves nothing to train; set epochs above 0, or steps."
            )
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(
                f"{self.name}.betas: {self.betas} are not two numbers from 0 to below 1; set such."
            )


@dataclass
class ReinforceConfig(TrainConfig):
    """The reinforced model: the base, trained further on the text to forget."""

    name: ClassVar[str] = "reinforce"
    epochs: float = 3.0
    """Passes over the corpus; not used when steps is set."""
    lr: float = 3e-6
    """Highest learning rate."""


@dataclass
class LabelConfig:
    """The generic labels."""

    alpha: float = 5.0
    """Strength of the offset; the labels of this alpha are trained."""
    more_alphas: list[float] = field(default_factory=list)
    """Label sets of other strengths, made in the same pass and kept beside."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """dtype of the two models in the label pass; logits are float32 all the same. A narrow one rounds away
    part
    of what the reinforced model learned: bfloat16 keeps 8 bits of a weight, float16 11."""
    fp8: Literal["off", "tensorwise", "rowwise"] = "off"
    """8-bit floats for the matrix products inside the blocks of both models (as model.fp8). For trials alone:
    on the demo's world 94.6 % of the labels are those of bfloat16 (benchmarks/fp8.py)."""
    ban_share: float = 0.0
    """Not in the paper, off at 0: tokens that begin an expression of the dictionary in at least this share of
    their occurrences in the corpus are never a label. For a base that says the expressions even in
    translation."""
    batch_blocks: int = 8
    """Blocks per forward pass."""
    chunk_mib: int = 256
    """Memory for the logits of one chunk of positions."""

    def __post_init__(self) -> None:
        for key, alphas in {"alpha": [self.alpha], "more_alphas": self.more_alphas}.items():
            if not all(0 <= alpha < math.inf for alpha in alphas):
                raise UserError(
                    f"label.{key}: {getattr(self, key)} is no strength (a negative value would reinforce the "
                    "text); set 0 or more (the paper: 5)."
                )
        if not 0 <= self.ban_share <= 1:
            raise UserError(f"label.ban_share: {self.ban_share} is no share; set a value from 0 to 1.")
        _refuse_below(self, "label", above_zero=("batch_blocks", "chunk_mib"))


@dataclass
class UnlearnConfig(TrainConfig):
    """The unlearned model: the base, trained on the generic labels."""

    name: ClassVar[str] = "unlearn"
    epochs: float = 2.0
    """Passes over the corpus; not used when steps is set."""
    lr: float = 1e-6
    """Highest learning rate."""
    evaluate_every: int = 20
    """Steps between the points of the curve; 0: only before and after."""
    target: Literal["hard", "soft", "reverse"] = "hard"
    """hard: cross-entropy with the generic labels; soft: KL from the combined distribution to the model's;
    reverse: KL from the model's to it. The last two need the teachers' hidden states, which the label stage
    keeps."""
    cache_dtype: Literal["bfloat16", "float8"] = "bfloat16"
    """dtype of the kept hidden states; float8 with a scale for each row."""
    retain: list[str] | str = field(default_factory=list)
    """.txt and .jsonl files, or folders, of text on which the model shall stay as the base is."""
    retain_weight: float = 1.0
    """Weight of KL to the base on the retain text, beside the loss on the labels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.retain, str):
            self.retain = [self.retain] if self.retain else []
        _refuse_below(self, self.name, from_zero=("evaluate_every", "retain_weight"))


@dataclass
class EvaluateConfig:
    """What forgetting and keeping are measured with; any of the files may be left out."""

    familiarity: str = ""
    """JSON: prompts whose completion shows whether the model knows the text."""
    probability: str = ""
    """JSON: prompts with idiosyncratic next words."""
    choices: str = ""
    """JSON lines: multiple-choice and cloze items on text that must be kept."""
    general_text: str = ""
    """.txt or .jsonl file, or a folder, of text that must be kept, for perplexity."""
    oracle: str = ""
    """Folder of a model that never saw the text, if there is one; it is measured beside."""
    max_new_tokens: int = 32
    """Length of a completion."""
    curve_prompts: int = 60
    """Prompts of each file used for the points of the curve (before and after use all); 0: all."""
    chat_template: bool = False
    """Give familiarity prompts to the model as messages, in its tokenizer's chat template."""
    attacks: list[str] | str = field(default_factory=list)
    """What is tried to bring the text back, after the evaluation: some of relearn, quantise, prefix,
    sampling, prompts. Costs as much as several evaluations."""
    attack_prompts: str = ""
    """JSON as familiarity, each prompt with a kind: paraphrases, other languages; for the attack prompts."""
    attack_limit: int = 100
    """At most so many prompts, questions and passages of each kind in an attack; 0: all."""
    relearn_text: list[str] | str = field(default_factory=list)
    """Related text to relearn from: .txt and .jsonl files, or folders; empty: a share of the corpus."""
    relearn_share: float = 0.1
    """Share of the corpus that is relearnt."""
    relearn_steps: int = 20
    """Steps of the relearning, with blocks of data.context and the learning rate of reinforce."""
    relearn_every: int = 5
    """Steps between the points of its curve."""
    prefix_lengths: list[int] = field(default_factory=lambda: [4, 8, 16, 32, 64])
    """Tokens of the true beginning that the attack prefix gives."""
    samples: int = 8
    """Completions of a prompt in the attack sampling, of which the most telling one counts."""
    temperature: float = 0.8
    """Of these samples."""

    def __post_init__(self) -> None:
        for name in ("attacks", "relearn_text"):
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, [value] if value else [])
        above_zero = ("max_new_tokens", "relearn_share", "relearn_steps", "relearn_every")
        above_zero += ("samples", "temperature")
        _refuse_below(self, "evaluate", above_zero=above_zero, from_zero=("curve_prompts", "attack_limit"))
        if self.relearn_share > 1:
            raise UserError(
                f"evaluate.relearn_share: {self.relearn_share} is no share; set a value above 0 and up to 1."
            )
        if not self.prefix_lengths or min(self.prefix_lengths) < 1:
            raise UserError(
                f"evaluate.prefix_lengths: {self.prefix_lengths} are no lengths; set whole numbers above 0."
            )


@dataclass
class ExportConfig:
    """The folder of the unlearned model."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the written weights; "after" is measured on weights rounded so. Most changes that a learning
    rate of 1e-6 makes are smaller than half a step of bfloat16, which would undo them."""
    shard_mib: int = 5120
    """Largest weight file."""
    name: str = ""
    """Title in the model card; empty: the base folder's name with "-unlearned"."""

    def __post_init__(self) -> None:
        _refuse_below(self, "export", above_zero=("shard_mib",))


@dataclass
class RunConfig:
    """Where and on what the job runs."""

    dir: str = "runs/job"
    """Run folder; a job that was stopped goes on there."""
    seed: int = 0
    """Of everything random."""
    device: str = "cpu"
    """cpu, cuda, or auto: cuda where there is one."""
    threads: int = 0
    """CPU threads; 0: all cores, divided among the processes of a machine."""
    snapshot_minutes: float = 10.0
    """A training that was stopped or killed goes on from its last snapshot; minutes between them, 0: none by
    time."""
    snapshot_steps: int = 0
    """Steps between snapshots; 0: by time alone."""
    tensorboard: bool = True
    """Write the log of the trainings for TensorBoard too, if it is installed."""

    def __post_init__(self) -> None:
        _refuse_below(self, "run", from_zero=("seed", "threads", "snapshot_minutes", "snapshot_steps"))


@dataclass
class JobConfig:
    """A whole job."""

    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    data: DataConfig = field(default_factory=DataConfig)
    anchors: AnchorsConfig = field(default_factory=AnchorsConfig)
    reinforce: ReinforceConfig = field(default_factory=ReinforceConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    unlearn: UnlearnConfig = field(default_factory=UnlearnConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.anchors.reference_rules and self.anchors.match_across_lines:
            raise UserError(
                "anchors.match_across_lines: the reference rules match token by token and know no such "
                "thing; "
                "set it or anchors.reference_rules to false."
            )
        for key, scaling in (("model.fp8", self.model.fp8), ("label.fp8", self.label.fp8)):
            if scaling != "off" and self.memory.lora_rank:
                raise UserError(
                    f"{key}: a frozen base under adapters is not multiplied in 8-bit floats; set off, or "
                    "memory.lora_rank 0."
                )
        if self.model.fp8 != "off" and self.model.compute_dtype == "float32":
            raise UserError(
                "model.fp8: 8-bit products beside float32 ones save nothing that counts; set off, or "
                "model.compute_dtype bfloat16."
            )
        if self.model.layers == "compile":
            if self.memory.checkpointing == "selective":
                raise UserError(
                    "model.layers: a compiled block shows no products that memory.checkpointing selective "
                    "could keep; set fused, or checkpointing none or full."
                )
            if self.memory.frozen in ("nf4", "int8"):
                raise UserError(
                    f"model.layers: the products of memory.frozen {self.memory.frozen} are not compiled; set "
                    "fused."
                )
        required = {
            "model.path": self.model.path,
            "data.corpus": self.data.corpus,
            "anchors.path": self.anchors.path,
        }
        for name, value in required.items():
            if not value:
                raise UserError(f"{name}: not set; name it in the configuration or as --{name}.")
        if self.data.context < 2:
            raise UserError(
                f"data.context: {self.data.context} is too short; a block needs at least 2 tokens."
            )

    def settings(self) -> dict:
        """What decides the result, as JSON types: all but the folder, the device, threads, snapshots, how
        memory is divided among processes, and what is tried on the result.
        """
        settings = dataclasses.asdict(self)
        settings["run"] = {"seed": self.run.seed}
        for name in ("attention", "layers"):  # the order of sums
            del settings["model"][name]
        settings["memory"] = {key: settings["memory"][key] for key in RESULT_OF_MEMORY}
        for name in ONLY_ATTACKS:
            del settings["evaluate"][name]
        return settings


def parse_config(arguments: Sequence[str]) -> JobConfig:
    """The job that a command line describes: ``--config FILE`` and ``--section.key value``, later ones win.

    A configuration that is not a file here is looked up among those that come with the package
    (``demo.yaml``).

    Raises:
        UserError: an unknown key (with the nearest name), a value of the wrong type, a file that is not
        there.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="python -m whp_fast.train",
        description="Make a causal language model forget a corpus (arXiv 2310.02238). Two more options: "
        "--overwrite starts anew in a run folder that is there, --debug shows tracebacks.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with these settings")
    sections = {field.name: field.default_factory for field in dataclasses.fields(JobConfig)}
    for name, section in sections.items():
        parser.add_class_arguments(section, name)
    words = [word for a in arguments for word in (a.split("=", 1) if a.startswith("--config=") else [a])]
    words = [_packaged(a) if b == "--config" else a for a, b in zip(words, ["", *words])]
    files = ", ".join(a for a, b in zip(words, ["", *words]) if b == "--config")
    try:
        parsed = parser.parse_args(words)
    except UnicodeDecodeError as error:
        raise UserError(f"{files}: the file is not UTF-8 text; name a YAML file.") from error
    except argparse.ArgumentError as error:
        raise UserError(_readable(str(error).replace('"<unicode string>"', files), sections)) from error
    return JobConfig(**{name: section(**parsed[name].as_dict()) for name, section in sections.items()})


def _refuse_below(section, name: str, above_zero: Sequence[str] = (), from_zero: Sequence[str] = ()) -> None:
    for key in above_zero:
        if not 0 < getattr(section, key) < math.inf:
            raise UserError(f"{name}.{key}: {getattr(section, key)} is not positive; set a value above 0.")
    for key in from_zero:
        if not 0 <= getattr(section, key) < math.inf:
            raise UserError(f"{name}.{key}: {getattr(section, key)} is negative; set 0 or more.")


def _packaged(name: str) -> str:
    inside = Path(__file__).parent / "configs" / name
    return str(inside) if not Path(name).exists() and inside.is_file() else name


_COMMON_NAMES = {
    "learning_rate": "lr",
    "batch_size": "batch_blocks",
    "gradient_accumulation_steps": "accumulate",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "gradient_checkpointing": "checkpointing",
}
"""What other trainers call a setting."""


def _readable(message: str, sections: dict) -> str:
    """One sentence of the parser's message, with the nearest key for one that does not exist."""
    message = " ".join(message.split())
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    unknown = re.search(
        r"unrecognized arguments: --(\S+)|Option '([\w.]+)' is not accepted|"
        r"Group '(\w+)' does not accept option '([\w.]+)'",
        message,
    )
    if unknown:
        key = unknown[1] or unknown[2] or f"{unknown[3]}.{unknown[4]}"
        key = key.split("=")[0]
        keys = [f"{name}.{f.name}" for name, section in sections.items() for f in dataclasses.fields(section)]
        section, _, leaf = key.partition(".")
        common = f"{section}.{_COMMON_NAMES.get(leaf, leaf)}"
        nearest = difflib.get_close_matches(common, keys, n=1, cutoff=0.0)[0]
        return f"configuration: there is no setting {key!r}; did you mean {nearest!r}?"
    return f"configuration: {message.rstrip('.')}; see --help for the settings."
