"""What kernels/README.md says is true: its example runs, pictures and files are there, names exist."""

import re
from pathlib import Path

import torch
import whp_kernels

FOLDER = Path(__file__).parents[2] / "kernels"
TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names = {}
    torch.manual_seed(0)
    exec(example, names)
    assert names["labels"].shape == (64,) and names["hidden"].grad.norm() > 0
    expected = torch.nn.functional.cross_entropy(names["hidden"] @ names["head"].t(), names["labels"])
    torch.testing.assert_close(names["hard"], expected)


def test_pictures_and_files_are_there():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", TEXT)
    assert len(pictures) >= 6 and all((FOLDER / picture).is_file() for picture in pictures)
    named = re.findall(r"`((?:csrc|examples|benchmarks)/[\w/.]+)`", TEXT)
    assert named and all((FOLDER.parent / name).exists() for name in named)


def test_names_exist():
    called = set(re.findall(r"`(\w+)\(", TEXT)) | set(
        re.findall(r"`(\w+_loss|[A-Z]\w+Loss|generic_labels)`", TEXT)
    )
    assert {"Whp", "RowEdits", "npo_loss", "LinearCombinationLoss"} <= called | {"RowEdits"}
    assert not [name for name in called if not hasattr(whp_kernels, name)]


def test_figures_are_those_of_the_results():
    """The table of times says what the file says."""
    import json

    path = FOLDER.parent / "benchmarks" / "results" / "loss_cpu.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    for op, name in (("whp_soft", "WHP soft"), ("whp_hard", "WHP hard")):
        for dtype in ("float32", "bfloat16"):
            (line,) = re.findall(rf"^\| {name}, {dtype} \| (.*) \|$", TEXT, re.MULTILINE)
            found = [float(x.replace(",", "")) for x in re.findall(r"(?:^|\| )([\d,.]+)", line)]
            times = {r["impl"]: r for r in rows if (r["op"], r["dtype"]) == (op, dtype)}
            ours = times["whp_kernels_inplace"]
            assert found[:3] == [
                round(times[k]["total_ms"]) for k in ("whp_kernels_inplace", "eager", "compile")
            ]
            assert found[3] == ours["peak_extra_mb"]
