"""benchmarks/small_updates.py in small: what is lost by rounding, and what the remainder keeps."""

import json

from benchmarks import small_updates


def test_the_remainder_keeps_what_rounding_loses(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(small_updates, "RUNS", ((1e-6, 25),))
    monkeypatch.setattr(small_updates, "SHAPE", (16, 512))
    file, picture = tmp_path / "new" / "rows.json", tmp_path / "new" / "rows.png"
    assert small_updates.main(["--json", str(file), "--picture", str(picture)]) == 0
    found = json.loads(file.read_text())
    rows = {row["way"]: row for row in found["rows"]}
    assert rows["bfloat16, to nearest"]["share_trained"] < 0.1
    assert rows["bfloat16, stochastic rounding"]["error_trained"] > 0.5
    assert rows["bfloat16, Kahan"]["error_trained"] < 0.1
    for moments, error in (("float32", 1e-3), ("bfloat16", 0.02), ("int8", 0.1)):
        row = rows[f"whp_kernels, {moments} moments"]
        assert abs(row["share_trained"] - 1) < error and row["error_trained"] < error
        assert row["error_seen"] > 0.2  # what the matrix products see is rounded
    assert "whp_kernels, int8 moments" in capsys.readouterr().out
    assert found["header"]["command"].startswith("python -m benchmarks.small_updates --json")
    assert picture.read_bytes().startswith(b"\x89PNG")
