"""Matching, alignment and masks: tokens per second on one core, and memory against corpus size.

    python -m benchmarks.prepare --json FILE [--text BOOK.txt --anchors D.json --tokenizer T.model]

Without files, the corpus is the demo's saga with its dictionary (an expression every few tokens: far denser
than a book) and a tokenizer trained on it. Tokenisation is measured beside, on its own. The first and
the last blocks are aligned in small chunks and at once before anything is timed, and must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # the tokenizers library; sentencepiece uses one

import numpy as np

from benchmarks.header import processor
from whp_fast.alignment import Aligner
from whp_fast.anchors import load_dictionary
from whp_fast.corpus import Blocks, TokenWriter, tokenise_corpus
from whp_fast.progress import console
from whp_fast.tokens import load_tokenizer

_CONTEXT = 512


def measure(text: str, anchors, tokenizer, n_tokens: int, repeats: int = 5) -> dict:
    """One row: rates are medians over repeats, single-threaded."""
    dictionary = load_dictionary(anchors)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "corpus.txt"
        source.write_text(text, encoding="utf-8")
        began = time.perf_counter()
        with TokenWriter(Path(folder) / "once.npy", tokenizer.vocab_size) as writer:
            tokenise_corpus([source], tokenizer, writer)
        tokenise_seconds = time.perf_counter() - began
        once = np.load(Path(folder) / "once.npy")
        copies = -(-n_tokens // len(once))
        path = Path(folder) / "tokens.npy"
        with TokenWriter(path, tokenizer.vocab_size) as writer:
            for _ in range(copies):
                writer.append(once)
        blocks = Blocks.of(np.load(path, mmap_mode="r"), _CONTEXT)
        _check(blocks, dictionary, tokenizer)
        seconds, occurrences = [], 0
        for _ in range(repeats):
            aligner = Aligner(dictionary, tokenizer, match_across_lines=True)
            began = time.perf_counter()
            occurrences = sum(int(part.matches.sum()) for _, part in aligner.align_stream(blocks))
            seconds.append(time.perf_counter() - began)
        return {
            "tokenizer": tokenizer.kind,
            "expressions": len(dictionary.entries),
            "tokens": blocks.n_tokens,
            "occurrences": occurrences,
            "occurrences_per_1000_tokens": round(1000 * occurrences / blocks.n_tokens, 2),
            "align_seconds": round(float(np.median(seconds)), 4),
            "align_mtokens_per_s": round(blocks.n_tokens / float(np.median(seconds)) / 1e6, 2),
            "tokenise_mtokens_per_s": round(len(once) / tokenise_seconds / 1e6, 3),
        }


def peak_memory(copies: int) -> float:
    """Peak resident MiB of a fresh process that writes and aligns the saga ``copies`` times over."""
    script = (
        "import numpy as np, resource, tempfile\n"
        "from benchmarks.prepare import saga_case, stream_peak\n"
        f"print(stream_peak({copies}))\n"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return float(output.split()[-1])


def stream_peak(copies: int) -> float:
    """Peak resident MiB of this process after it aligned a token file of so many copies of the saga.

    The pages of the memory-mapped file are not counted: the system may drop them at any time.
    """
    text, anchors, tokenizer = saga_case()
    once = np.array(tokenizer.encode(text), dtype=np.uint16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.npy"
        with TokenWriter(path, tokenizer.vocab_size) as writer:
            for _ in range(copies):
                writer.append(once)
        blocks = Blocks.of(np.load(path, mmap_mode="r"), _CONTEXT)
        aligner = Aligner(load_dictionary(anchors), tokenizer)
        for _ in aligner.align_stream(blocks):
            pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return peak - copies * once.nbytes / 2**20


def saga_case():
    """The demo's saga, its dictionary and a tokenizer trained on it."""
    from whp_fast.demo import train_tokenizer
    from whp_fast.saga import make_world

    world = make_world(0, "demo")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(Path(folder), world.saga + world.everyday, 1536)
    return "\n".join(world.saga), world.anchors, tokenizer


def _check(blocks: Blocks, dictionary, tokenizer) -> None:
    """The first and last blocks of the stream, aligned in small chunks, equal the same aligned at once."""
    for first in {0, max(0, len(blocks) - 40)}:
        some = Blocks.of(blocks.tokens[first * _CONTEXT : (first + 40) * _CONTEXT], _CONTEXT)
        whole = Aligner(dictionary, tokenizer, match_across_lines=True).align(
            [np.asarray(some[i]) for i in range(len(some))], contiguous=True
        )
        aligner = Aligner(dictionary, tokenizer, match_across_lines=True)
        for start, part in aligner.align_stream(some, chunk_tokens=3 * _CONTEXT):
            same = whole.blocks(start, start + len(part))
            fields = ("index_map", "translated", "used_at", "used_value")
            if not all(np.array_equal(getattr(part, f), getattr(same, f)) for f in fields):
                raise SystemExit(f"benchmarks.prepare: chunk at block {first + start} differs from the whole")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--tokens", type=float, default=8, help="millions of tokens to align (default 8)")
    parser.add_argument("--text", type=Path, help="a book")
    parser.add_argument("--anchors", type=Path, help="its dictionary")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.model or tokenizer.json")
    options = parser.parse_args()
    if options.text:
        text, anchors = options.text.read_text(encoding="utf-8"), options.anchors
        tokenizer = load_tokenizer(options.tokenizer)
        name = options.text.name
    else:
        (text, anchors, tokenizer), name = saga_case(), "saga"
    measure(text, anchors, tokenizer, 100_000, repeats=1)  # numba compiles
    row = {"corpus": name} | measure(text, anchors, tokenizer, int(options.tokens * 1e6))
    memory = {copies: round(peak_memory(copies), 1) for copies in (20, 200)}
    result = {
        "machine": {"processor": processor(), "python": platform.python_version(), "numpy": np.__version__},
        "command": " ".join(["python -m benchmarks.prepare", *sys.argv[1:]]),
        "rows": [row],
        "peak_mib_by_copies_of_the_saga": memory,
    }
    console.print_json(json.dumps(result))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
