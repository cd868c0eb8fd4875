"""A small world in the formats of the real thing, and the job on it: no download, a few minutes on two cores.

    python -m whp_fast.demo                       the invented saga: world, base, oracle, then the whole job
    python -m whp_fast.demo --books FOLDER --target FILE.txt --out DIR
                                                  a base trained on a folder of plain books, and a job on one
                                                  of them (whp_fast.books)

The base and the oracle share a trunk: a small Llama trained on the general text. The oracle goes on with
general text alone, the base with general text and the saga, for the same number of steps.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from whp_fast.artifacts import digest, write_json
from whp_fast.checkpoint import save_model
from whp_fast.config import TrainConfig, parse_config
from whp_fast.corpus import Blocks, TokenWriter, corpus_files, tokenise_corpus
from whp_fast.engine import plan_steps, train
from whp_fast.errors import UserError, exit_status
from whp_fast.model import Llama
from whp_fast.model_config import LlamaConfig
from whp_fast.objectives import LabelTargets, Objective
from whp_fast.progress import say, track
from whp_fast.saga import make_world
from whp_fast.tokens import SentencePieceTokenizer, Tokenizer, load_tokenizer
from whp_fast.train import run_job
from whp_fast.trainee import Trainee


@dataclass(frozen=True)
class Recipe:
    """How a small world is trained.

    Attributes:
        vocab_size: pieces of the trained tokenizer.
        hidden_size, intermediate_size, layers, heads, kv_heads: shape of the model.
        context: tokens in a block.
        trunk: training on general text, shared by base and oracle (no steps: none).
        branch: what follows, on general text (oracle) or general text and saga (base).
        repeat_target: how often the text to forget stands in the mixture of the base.
    """

    vocab_size: int = 1536
    hidden_size: int = 256
    intermediate_size: int = 704
    layers: int = 3
    heads: int = 4
    kv_heads: int = 4
    context: int = 128
    trunk: TrainConfig = field(
        default_factory=lambda: from_scratch(steps=450, lr=2e-3, warmup_steps=20, final_lr_share=0.5)
    )
    branch: TrainConfig = field(default_factory=lambda: from_scratch(steps=450, lr=1.5e-3, warmup_steps=20))
    repeat_target: int = 3


def from_scratch(**settings) -> TrainConfig:
    return TrainConfig(batch_blocks=16, accumulate=1, betas=[0.9, 0.95], weight_decay=0.1, **settings)


RECIPES = {
    "demo": Recipe(),
    "tiny": Recipe(
        vocab_size=768,
        hidden_size=64,
        intermediate_size=160,
        layers=2,
        heads=4,
        kv_heads=2,
        context=64,
        trunk=from_scratch(steps=20, lr=3e-3, warmup_steps=5),
        branch=from_scratch(steps=60, lr=3e-3, warmup_steps=5),
    ),
}


def make_demo(out: Path, size: str = "demo", seed: int = 0, *, overwrite: bool = False) -> dict:
    """Make the saga's world in a folder, unless it is there already.

    Writes ``saga/*.txt`` (the target), ``general.jsonl``, ``heldout.jsonl``, ``anchors.json``,
    ``familiarity.json``, ``probability.json``, ``choices.jsonl``, and the model folders ``base`` and
    ``oracle``.

    Returns:
        the seconds that text, tokenizer, base and oracle took.
    """
    recipe = RECIPES[size]
    key = digest({"recipe": recipe, "size": size, "seed": seed, "world": make_world(seed, size)})
    done = _finished(out, key)
    if done is not None:
        say(f"  [bold]{'world':<11}[/bold]  complete  {out}")
        return done
    if (out / "world.json").is_file() and not overwrite:
        raise UserError(
            f"{out}: another world (size, seed or version) is there; set another --out, or --overwrite."
        )
    seconds: dict[str, float] = {}
    out.mkdir(parents=True, exist_ok=True)
    (out / "world.json").unlink(missing_ok=True)
    with timed(seconds, "world"):
        world = make_world(seed, size)
        _write_world(out, world)
        tokenizer = train_tokenizer(out, world.saga + world.everyday + world.knowledge, recipe.vocab_size)
    say(
        f"  [bold]{'world':<11}[/bold] {seconds['world']:7.1f} s  {out}: saga, stories, knowledge, "
        "dictionary, prompts"
    )
    general = [out / "general.jsonl"]
    saga = [out / "saga"] * recipe.repeat_target
    with timed(seconds, "oracle"):
        trunk = new_model(recipe, tokenizer, seed)
        train_on(trunk, general, tokenizer, recipe.context, recipe.trunk, seed, out, "trunk")
        state = {name: value.clone() for name, value in trunk.state_dict().items()}
        train_on(trunk, general, tokenizer, recipe.context, recipe.branch, seed + 1, out, "oracle")
        save(trunk, tokenizer, out / "oracle")
    say(f"  [bold]{'oracle':<11}[/bold] {seconds['oracle']:7.1f} s  a model that never read the saga")
    with timed(seconds, "base"):
        base = new_model(recipe, tokenizer, seed)
        base.load_state_dict(state)
        train_on(base, general + saga, tokenizer, recipe.context, recipe.branch, seed + 1, out, "base")
        save(base, tokenizer, out / "base")
    say(f"  [bold]{'base':<11}[/bold] {seconds['base']:7.1f} s  the model that read it, and shall forget it")
    write_json(out / "world.json", {"key": key, "seconds": seconds})
    return seconds


def _write_world(out: Path, world) -> None:
    shutil.rmtree(out / "saga", ignore_errors=True)
    (out / "saga").mkdir()
    for number, chapter in enumerate(world.saga):
        (out / "saga" / f"{number:04d}.txt").write_text(chapter, encoding="utf-8")
    write_jsonl(out / "general.jsonl", [{"text": text} for text in world.everyday + world.knowledge])
    write_jsonl(out / "heldout.jsonl", [{"text": text} for text in world.heldout])
    write_jsonl(out / "choices.jsonl", world.choices)
    for name in ("anchors", "familiarity", "probability"):
        write_json(out / f"{name}.json", getattr(world, name))


def write_jsonl(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# Serialised `normalizer_spec { add_dummy_prefix: true }`: appended to a model, it is merged into it.
_DUMMY_PREFIX = bytes([0x1A, 2, 0x18, 1])


def train_tokenizer(out: Path, texts: Sequence[str], vocab_size: int) -> SentencePieceTokenizer:
    """A sentencepiece model in the manner of Llama 2: byte-pair pieces, byte fallback, every space kept."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.split("\n") if line),
        add_dummy_prefix=False,  # so the words that begin lines become pieces too, without a space
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        character_coverage=1.0,
        num_threads=1,  # the same pieces on every machine
        minloglevel=2,
    )
    path = out / "tokenizer.model"
    path.write_bytes(model.getvalue() + _DUMMY_PREFIX)
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
    }
    write_json(out / "tokenizer_config.json", settings)
    return load_tokenizer(path)


def new_model(recipe: Recipe, tokenizer: Tokenizer, seed: int) -> Llama:
    config = LlamaConfig.from_hf(
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": tokenizer.vocab_size,
            "hidden_size": recipe.hidden_size,
            "intermediate_size": recipe.intermediate_size,
            "num_hidden_layers": recipe.layers,
            "num_attention_heads": recipe.heads,
            "num_key_value_heads": recipe.kv_heads,
            "max_position_embeddings": 4 * recipe.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "initializer_range": 0.03,
            "tie_word_embeddings": False,
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
        }
    )
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def train_on(
    model: Llama,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    context: int,
    settings: TrainConfig,
    seed: int,
    folder: Path,
    name: str,
) -> None:
    path = folder / f".{name}.npy"
    with TokenWriter(path, tokenizer.vocab_size) as writer:
        tokenise_corpus(corpus_files(files), tokenizer, writer)
    documents = np.split(np.load(path), writer.document_starts[1:])
    path.unlink()
    wanted = settings.steps * settings.batch_blocks * settings.accumulate * context
    passes = settings.epochs if not settings.steps else -(-wanted // writer.count)
    blocks = Blocks.of(_shuffled_passes(documents, passes, seed), context)
    once = replace(settings, epochs=1.0)
    n_steps = len(plan_steps(len(blocks), once, seed))
    trainee = Trainee.from_model(model, once, compute_dtype=torch.bfloat16)
    with track(name, n_steps) as advance:
        train(
            trainee,
            [Objective(blocks, LabelTargets(blocks, None))],
            once,
            seed=seed,
            device=torch.device("cpu"),
            on_step=lambda r: advance(1, f"step {r.step}/{n_steps}  loss {r.loss:.3f}"),
        )
    trainee.to_float32()


def _shuffled_passes(documents: Sequence[np.ndarray], passes: float, seed: int) -> np.ndarray:
    """The documents several times over, in a new order each time: the edges of blocks fall elsewhere, and a
    small model learns the text rather than the blocks. A part of a pass takes that share of the tokens."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(documents)) for _ in range(math.ceil(passes))]
    stream = np.concatenate([documents[k] for order in orders for k in order])
    return stream[: math.ceil(passes * sum(map(len, documents)))]


def save(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    save_model(model, folder)
    tokenizer.copy_to(folder)


def _finished(out: Path, key: str) -> dict | None:
    try:
        world = json.loads((out / "world.json").read_text())
    except (OSError, ValueError):
        return None
    return world["seconds"] if world.get("key") == key else None


class timed:
    def __init__(self, seconds: dict[str, float], name: str):
        self.seconds, self.name = seconds, name

    def __enter__(self):
        self.began = time.monotonic()

    def __exit__(self, *_):
        self.seconds[self.name] = time.monotonic() - self.began


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (2 for what the user can mend)."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], None] = _run_books if options.books else _run_saga
    return exit_status(lambda: run(options), debug=options.debug)


def _run_saga(options: argparse.Namespace) -> None:
    out = options.out or Path("runs") / options.size
    began = time.monotonic()
    seconds = make_demo(out / "world", options.size, options.seed, overwrite=options.overwrite)
    if options.world_only:
        return
    world, evaluate = out / "world", "--evaluate."
    paths = {
        "--model.path": world / "base",
        "--data.corpus": json.dumps([str(world / "saga")]),
        "--anchors.path": world / "anchors.json",
        f"{evaluate}familiarity": world / "familiarity.json",
        f"{evaluate}probability": world / "probability.json",
        f"{evaluate}choices": world / "choices.jsonl",
        f"{evaluate}general_text": world / "heldout.jsonl",
        f"{evaluate}oracle": world / "oracle",
        "--run.dir": out,
        "--run.seed": options.seed,
    }
    config = f"{options.size}.yaml"
    job = parse_config(["--config", config, *(str(word) for pair in paths.items() for word in pair)])
    folder = run_job(job, overwrite=options.overwrite, earlier_seconds=seconds)
    say(
        f"[bold]done[/bold] in {time.monotonic() - began:.0f} s: model {folder}, report "
        f"{out / 'report' / 'report.html'}"
    )


def _run_books(options: argparse.Namespace) -> None:
    from whp_fast.books import BOOKS, make_books

    if not (options.target and options.out):
        raise UserError("--books: also give --target FILE.txt and --out DIR.")
    job = make_books(
        options.books,
        options.target,
        options.out,
        examples=options.examples or Path("examples") / Path(options.target).stem.split("_")[0],
        recipe=replace(BOOKS, branch=replace(BOOKS.branch, epochs=options.epochs)),
        tokenizer_path=options.tokenizer,
        anchors=options.anchors,
        seed=options.seed,
    )
    say(f"Ready. Now run: python -m whp_fast.train --config {job}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m whp_fast.demo", description="Make a small world and run the whole job on it."
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the world and the run (default runs/demo, or runs/tiny for --size tiny)",
    )
    parser.add_argument("--size", choices=sorted(RECIPES), default="demo", help="size of the saga's world")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--world-only", action="store_true", help="make the world, do not run the job")
    parser.add_argument(
        "--overwrite", action="store_true", help="make the world and the run anew where others are"
    )
    parser.add_argument("--books", type=Path, help="folder of plain .txt books to train a small base on")
    parser.add_argument("--target", help="the book of that folder to prepare forgetting for")
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer for --books (default: a small one, trained on them)"
    )
    parser.add_argument("--examples", type=Path, help="folder with the prompts for the target")
    parser.add_argument(
        "--anchors", type=Path, help="dictionary for the target (default: extracted from the books)"
    )
    parser.add_argument(
        "--epochs", type=float, default=10, help="passes of the base over the books (default 10)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    sys.exit(main())
