"""Every command, file and name in the README exists and is spelled as the program spells it."""

import ast
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

from whp_fast.config import parse_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.replace("\\\n", " ").split("\n")
    if line.strip()
]
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
INLINE_COMMANDS = [text for text in INLINE if text.startswith(("make ", "python -m"))]
INLINE_PATHS = [text for text in INLINE if "/" in text and " " not in text and text[0].isalpha()]
SETTING = re.compile(r"(model|data|anchors|label|unlearn|run)\.\w+\b")


def test_there_are_commands_to_check():
    assert "make demo" in COMMANDS and "make test" in COMMANDS
    assert any(command.startswith("torchrun") for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS + INLINE_COMMANDS)
def test_command_is_understood(command, tmp_path):
    words = command.split()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    assert "-m" in words, command
    module = importlib.import_module(words[words.index("-m") + 1])
    options = words[words.index("-m") + 2 :]
    if module.__name__ == "whp_fast.train":
        options = [option.strip("'") for option in options if option != "--help"]
        if "job.yaml" in command:  # written by the command before it
            job = tmp_path / "job.yaml"
            job.write_text("model: {path: m}\ndata: {corpus: [c]}\nanchors: {path: a}\n")
            options[options.index("--config") + 1] = str(job)
        if options:
            assert parse_config(options).model.path
    else:
        elsewhere = {"whp_fast.anchors": "extraction", "whp_fast.evaluate": "evaluation"}
        if module.__name__ in elsewhere:
            module = importlib.import_module(f"whp_fast.{elsewhere[module.__name__]}.command")
        flags = set(re.findall(r'"(--[\w-]+)"', inspect.getsource(module)))
        assert {o for o in options if o.startswith("--")} <= flags, command


@pytest.mark.parametrize(
    "name", [text for text in INLINE if "/" in text and " " not in text and text[0].isalpha()]
)
def test_path_exists(name):
    if not name.startswith(("runs/", "model/", "adapter/")):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("name", [text for text in INLINE if re.fullmatch(r"whp_fast(\.\w+){2,3}", text)])
def test_function_exists(name):
    _, module, *attributes = name.split(".")
    thing = importlib.import_module(f"whp_fast.{module}")
    for attribute in attributes:
        thing = getattr(thing, attribute)
    assert thing.__doc__


def test_settings_named_in_the_text_exist():
    config = parse_config(["--model.path", "m", "--data.corpus", "[c]", "--anchors.path", "a"])
    named = [
        text.split(":")[0]
        for text in INLINE
        if re.match(r"(model|memory|data|anchors|reinforce|label|unlearn|export|run)\.\w+(?![\w.])", text)
    ]
    assert named
    for name in named:
        section, key = name.split(" ")[0].split(".")
        assert hasattr(getattr(config, section), key), name


def test_python_example_calls_the_function_as_it_is():
    code = next(block for language, block in BLOCKS if language == "python")
    call = next(node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
    function = importlib.import_module("whp_fast.label").label_blocks
    keywords = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    inspect.signature(function).bind(*(object() for _ in call.args), **keywords)


def test_configurations_parse_and_hold_no_unknown_setting():
    for path in sorted((ROOT / "whp_fast" / "configs").glob("*.yaml")):
        arguments = ["--config", str(path), "--model.path", "m", "--data.corpus", json.dumps(["c"])]
        assert parse_config([*arguments, "--anchors.path", "a"]).model.path == "m"


def test_the_table_of_modes_is_the_plan_s():
    from whp_fast.plan_table import mode_table

    rows = [line for line in mode_table().splitlines() if line.startswith("|")]
    assert len(rows) == 14 and "\n".join(rows) in README


def test_the_table_of_methods_is_the_benchmark_s():
    from benchmarks.methods_table import markdown

    rows = json.loads((ROOT / "benchmarks/results/methods.json").read_text())["rows"]
    assert len(rows) == 14 and markdown(rows).strip() in README


def test_figures_of_the_layers_are_those_of_the_results():
    rows = json.loads((ROOT / "benchmarks/results/layers_cpu.json").read_text())["rows"]
    ours = {(r["layer"], r["dtype"]): r for r in rows if r["impl"] == "whp_kernels"}
    for row in rows:
        if row["label"] in ("transformers", "torch.compile of transformers"):
            own = ours[row["layer"], row["dtype"]]
            ratio = f"{row['total_ms'] / own['total_ms']:.2f} ×"
            assert f"| {row['layer']} | {row['dtype']} | {row['label']} | {ratio} |" in README


def test_figures_of_the_training_are_those_of_the_results():
    results = ROOT / "benchmarks" / "results"
    for row in json.loads((results / "engine_cpu.json").read_text())["rows"]:
        figures = f"{row['tokens_per_s']:,.0f} | {100 * row['share']:.0f} % | {row['peak_mb']:.0f}"
        assert f"| {row['dtype']} | {row['label']} | {figures} |" in README
    for row in json.loads((results / "plan_cpu.json").read_text())["rows"]:
        line = f"| {row['mode']} | {row['planned_mb']:.1f} | {row['measured_mb']:.1f} |"
        assert row["model"] != "demo" or line in README
    for row in json.loads((results / "small_updates.json").read_text())["rows"]:
        assert f"{100 * row['share_trained']:.1f} %, {row['error_trained']:.4f}" in README
