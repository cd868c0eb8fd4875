"""The benchmarks run, and a wrong result makes them fail."""

import json

import numpy as np
import pytest

from benchmarks import prepare
from whp_fast.alignment import Aligner


def test_prepare_measures_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "peak_memory", lambda copies: float(copies))
    monkeypatch.setattr(
        "sys.argv", ["prepare", "--tokens", "0.05", "--json", str(tmp_path / "out" / "row.json")]
    )
    prepare.main()
    result = json.loads((tmp_path / "out" / "row.json").read_text())
    (row,) = result["rows"]
    assert row["tokens"] >= 50_000 and row["occurrences"] > 1000
    assert row["align_mtokens_per_s"] == pytest.approx(row["tokens"] / row["align_seconds"] / 1e6, rel=0.1)
    assert set(result["peak_mib_by_copies_of_the_saga"]) == {"20", "200"}


def test_prepare_fails_on_a_wrong_alignment(monkeypatch):
    text, anchors, tokenizer = prepare.saga_case()
    align = Aligner.align

    def wrong(self, blocks, **options):
        result = align(self, blocks, **options)
        np.asarray(result.index_map)[3] += 1
        return result

    monkeypatch.setattr(Aligner, "align", wrong)
    with pytest.raises(SystemExit, match="differs"):
        prepare.measure(text[:20_000], anchors, tokenizer, 10_000, repeats=1)
