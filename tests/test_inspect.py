"""Looking at a block: the same labels, reasons and numbers as the run's, in the terminal and on a page."""

import json
import re

import numpy as np
import pytest
import torch
from page_checks import elements, parsed, text_of
from tiny_world import ANCHORS, CONTEXT, arguments, make_world, write_json

from whp_fast import inspect, inspect_page
from whp_fast.checkpoint import load_model
from whp_fast.config import parse_config
from whp_fast.inspect import Run
from whp_fast.job import Job
from whp_fast.page import MARKS
from whp_fast.reasons import REASONS
from whp_fast.tokens import load_tokenizer

NASTY = '</script><script>alert("x")</script><img src=x onerror=alert(1)> & [bold] \x1b[31m Orrin said so.\n'


def labelled(folder, **settings):
    """A run up to its labels, of a world whose corpus begins with text that looks like code."""
    config = parse_config(arguments("run", evaluation=False, **settings))
    job = Job(config)
    try:
        for stage in ("prepare", "align", "reinforce", "label"):
            getattr(job, stage)()
    finally:
        job.close()
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspected")
    make_world(folder / "world")
    (folder / "world" / "corpus" / "a_first.txt").write_text(NASTY * 2, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        labelled(folder, label__more_alphas=[1.0])
    return folder / "run"


@pytest.fixture
def here(run, monkeypatch):
    """The folder in which the run was made, as the current one."""
    monkeypatch.chdir(run.parent)
    return run


def said(capsys, *words) -> str:
    capsys.readouterr()
    assert inspect.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def refused(capsys, *words) -> str:
    capsys.readouterr()
    assert inspect.main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_entries_are_the_labels_under_the_tokens_whose_place_they_take(here):
    run = Run(here)
    tokens = np.load(here / "prepare" / "tokens.npy")
    labels, reason = np.load(here / "label" / "labels_alpha_5.npy"), np.load(here / "label" / "reason.npy")
    own = np.load(here / "label" / "base_choice.npy")
    seen = 0
    for number in range(len(run.blocks)):
        view = run.view(number)
        start = number * CONTEXT
        first, *rest = view.entries
        assert first["label"] is None and first["reason"] == "first of the block"
        for entry in rest:
            at = start + entry["n"]
            assert entry["id"] == tokens[at] and entry["label_id"] == labels[at - 1]
            assert (entry["label"] is None) == (labels[at - 1] == -100)
            assert (entry["own"] is None) == (own[at - 1] == -100)
            assert entry["reason"] == REASONS[reason[at - 1]]
            seen += 1
        last = number == len(run.blocks) - 1
        assert len(view.entries) == min(CONTEXT + 1, len(tokens) - start)
        assert view.entries[-1].get("next", False) == (not last)
        assert view.positions == len(run.blocks[number])
        changed = [e["n"] for e in rest if e["label_id"] not in (-100, e["id"])]
        assert view.changed == changed
    assert seen == len(tokens) - 1
    for number in (4, 5, 6):
        spelled = b"".join(run.tokenizer.token_bytes(token) for token in run.blocks[number].tolist())
        if b"\xff" not in spelled:  # no special token
            assert "".join(e["token"] for e in run.view(number).entries[:-1]) == spelled.decode()


def test_the_translation_is_what_the_base_read(here):
    run = Run(here)
    view = run.view(run.telling_block())
    part = run.alignment.blocks(view.number, view.number + 1)
    assert len(view.translated) == len(part.translated)
    begins = [i for i, (_, begun) in enumerate(view.translated) if begun]
    assert begins == sorted(set(part.used_at.tolist())) != []
    text = "".join(token for token, _ in view.translated)
    assert "Glimmerhall" not in text and "wand" not in text


def test_the_most_telling_block_is_the_default(here, capsys):
    run = Run(here)
    uses = np.diff(np.load(here / "align" / "used_offsets.npy"))
    assert uses[run.telling_block()] == uses.max() > 0
    assert f"block {uses.argmax()} of 0 to {len(run.blocks) - 1}" in said(capsys, here, "--no-models")


def test_find(here, capsys):
    run = Run(here)
    whole = [b"".join(run.tokenizer.token_bytes(t) for t in block.tolist()) for block in run.blocks]
    stream, ends = b"".join(whole), np.cumsum([len(block) for block in whole])
    for text in ("Orrin said so", "Quill", "the old school with", "<img"):
        assert run.find(text) == np.searchsorted(ends, stream.index(text.encode()), side="right")
    edge = stream[ends[3] - 5 : ends[3] + 4].decode()  # begins in block 3 and ends in block 4
    first = int(np.searchsorted(ends, stream.index(edge.encode()), side="right"))
    assert run.find(edge) == first
    k = next(k for k in range(3, 20) if b"\xff" not in stream[ends[k] - 3 : ends[k + 1] + 2])
    assert run.find(stream[ends[k] - 3 : ends[k + 1] + 2].decode()) == k  # longer than a block
    assert "does not stand in the run's corpus" in refused(capsys, here, "--find", "Nowhere at all")
    assert "no text given" in refused(capsys, here, "--find", "")
    assert "block 0 of" in said(capsys, here, "--find", "alert", "--no-models")


def by_hand(here, number, alpha):
    """Base, reinforced and combined logits of a block's labelled positions, by the formula alone."""
    run = Run(here)
    part = run.alignment.blocks(number, number + 1)
    values = [
        v for entry in json.loads((here / "align" / "anchors.json").read_text()).values() for v in entry
    ]
    tokenizer = load_tokenizer("world/base")
    firsts = [{spelling[0] for spelling in tokenizer.variants(value)} for value in values]
    base, reinforced = load_model("world/base"), load_model(here / "reinforce" / "model")
    block = run.blocks[number]
    with torch.no_grad():
        one, other = (
            model.hidden_states(torch.from_numpy(np.asarray(ids, dtype=np.int64))[None])[0]
            @ model.lm_head_weight.T
            for model, ids in ((base, part.translated), (reinforced, block))
        )
    found = {}
    for position, at in enumerate(part.index_map.tolist()):
        if at < 0:
            continue
        used = {t for use, v in zip(part.used_at, part.used_value) if use < at for t in firsts[v]}
        edited = one[at].clone()
        edited[list(used)] = one[at].mean()
        combined = edited - alpha * torch.relu(other[position] - edited)
        found[position] = (one[at], other[position], combined, used)
    return found


@pytest.mark.parametrize("alpha", [5.0, 1.0])
def test_tables_are_those_of_the_formula(here, alpha):
    run = Run(here)
    number = run.telling_block()
    view = run.view(number, alpha)
    run.ask_models(view, range(len(view.entries)), 4, torch.device("cpu"))
    assert view.disagreeing == 0
    expected = by_hand(here, number, alpha)
    assert set(view.tables) == {position + 1 for position in expected}
    edited = 0
    for n, tables in view.tables.items():
        *logits, used = expected[n - 1]
        for name, wanted in zip(("base", "reinforced", "combined"), logits):
            rows = tables[name]
            values, _ = wanted.topk(4)
            assert [row["logit"] for row in rows] == pytest.approx(values.tolist(), abs=1e-4)
            assert [row["logit"] for row in rows] == pytest.approx(
                [wanted[row["id"]].item() for row in rows], abs=1e-4
            )
            assert rows[0]["probability"] == pytest.approx(wanted.softmax(-1).max().item(), abs=1e-5)
            assert [row["edited"] for row in rows] == [row["id"] in used for row in rows]
            edited += sum(row["edited"] for row in rows)
        if n < len(view.entries):
            assert tables["combined"][0]["id"] == view.entries[n]["label_id"]
    assert edited > 0


def test_labels_that_changed_are_told(here, monkeypatch):
    run = Run(here)
    view = run.view(2)
    alpha, labels = run.labels(None)
    wrong = np.array(labels)
    wrong[2 * CONTEXT + np.flatnonzero(labels[2 * CONTEXT : 3 * CONTEXT] >= 0)[:3]] = 7
    monkeypatch.setattr(Run, "labels", lambda self, asked: (alpha, wrong))
    run.ask_models(view, [], 1, torch.device("cpu"))
    assert 1 <= view.disagreeing <= 3
    assert f"{view.disagreeing} labels came out otherwise" in text_of(inspect_page.page(view))


def test_the_terminal(here, capsys):
    told = said(capsys, here, "--block", 2, "--positions", "3,5-6", "--top", 2)
    view = Run(here).view(2)
    assert f"{sum(e['label'] is not None for e in view.entries)} labels, {len(view.changed)} of them" in told
    assert "Made again here, every label came out as the run has it." in told
    for reason in {e["reason"] for e in view.entries if e["label"] is None}:
        assert re.search(rf"^  {re.escape(MARKS[reason][0])}  {reason}\. .* \(\d+\)$", told, re.MULTILINE), (
            reason
        )
    assert [int(n) for n in re.findall(r"^token (\d+) ", told, re.MULTILINE)] == [3, 5, 6]
    assert "\x1b" not in told
    lines = [line for line in told.split("\n") if re.match(r" {0,4}\d+ \S", line)]
    numbers = [int(line.split()[0]) for line in lines]
    assert numbers == sorted(numbers) and numbers[0] == 0 and len(numbers) > 1
    quick = said(capsys, here, "--block", 2, "--no-models")
    assert not re.search(r"^token \d", quick, re.MULTILINE) and "Made again" not in quick


def test_text_that_looks_like_code_reaches_the_terminal_as_text(here, capsys):
    told = said(capsys, here, "--find", "[31m", "--no-models")
    assert "\x1b" not in told  # the corpus holds an escape sequence
    assert "\\x1b" in told and "[" in told


def test_labels_stand_under_their_tokens():
    def entry(n, token, label, reason="trained"):
        return {"n": n, "id": hash(token), "token": token, "reason": reason, "label": label} | {
            "label_id": None if label is None else hash(label)
        }

    entries = [
        entry(0, "Or", None, "first of the block"),
        entry(1, "rin", None, "inside an expression"),
        entry(2, " went", " walked"),
        entry(3, " home", " home"),
        entry(4, ".\n", "!"),
        entry(5, "長い", "x"),
        entry(6, " a", "a"),
    ]
    lines = [line.plain.rstrip() for line in inspect._lines(entries, 80)]
    assert lines == [
        "    0 Orrin went   home.↵",
        "      | ~   walked ·   !",
        "",
        "    5 長い ␣a",
        "      x    a",
        "",
    ]
    breaks = inspect._lines([entry(0, "a\n", "b"), entry(1, "\n", "\n"), entry(2, "c", "c")], 80)
    assert [line.plain.split() for line in breaks[::3]] == [["0", "a↵", "↵"], ["2", "c"]]
    narrow = inspect._lines(entries, 20)
    assert all(len(line.plain) <= 20 for line in narrow) and len(narrow) > 6


def test_the_page(here, capsys, tmp_path):
    file = tmp_path / "new" / "page.html"
    told = said(capsys, here, "--block", 2, "--html", file, "--top", 3, "--positions", "1-3")
    assert str(file) in told
    page = file.read_text(encoding="utf-8")
    view = Run(here).view(2)
    buttons = [attributes for name, attributes in elements(page) if name == "button"]
    assert [int(button["data-n"]) for button in buttons] == list(range(len(view.entries)))
    for button, entry in zip(buttons, view.entries):
        kinds = button["class"].split()
        if entry["label"] is None:
            assert (
                "m" in kinds
                and entry["reason"] in button["title"]
                and entry["reason"] in button["aria-label"]
            )
        else:
            assert ("c" if entry["label_id"] != entry["id"] else "s") in kinds
            assert button["title"].startswith("Taught:")
    legend = text_of(page[page.index('<ul class="legend"') : page.index("</ul>")])
    for reason in {e["reason"] for e in view.entries if e["label"] is None}:
        assert f"Not trained: {reason}." in legend
    data = json.loads(
        re.search('<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    )
    assert len(data["tokens"]) == len(view.entries)
    with_label = {n for n in (1, 2, 3) if view.entries[n]["label"] is not None}
    assert {int(n) for n in data["tables"]} == {*view.changed, *with_label}
    assert all(len(rows) == 3 for tables in data["tables"].values() for rows in tables)
    without = inspect_page.page(view)  # no models asked
    assert '"tables":{}' in without and "Made again" not in without
    parsed(without)


def test_a_page_of_a_corpus_that_looks_like_code(here, capsys, tmp_path):
    file = tmp_path / "page.html"
    said(capsys, here, "--block", 0, "--html", file)
    page = file.read_text(encoding="utf-8")
    names = [name for name, _ in elements(page)]
    assert names.count("script") == 2 and not {"img", "iframe", "link"} & set(names)
    assert not any(key.startswith("on") or key in ("src", "href") for _, a in elements(page) for key in a)
    assert "\x1b" not in page
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert "script-src 'sha256-" in page and "default-src 'none'" in page
    assert "&lt;" in page and "\\u003c" in page


def test_adapters_and_reference_rules(tmp_path, monkeypatch):
    make_world(tmp_path / "world")
    write_json(tmp_path / "world" / "anchors.json", {k: v for k, v in ANCHORS.items() if k != "Orrin Vale"})
    monkeypatch.chdir(tmp_path)
    path = labelled(tmp_path, memory__lora_rank=2, anchors__reference_rules="true", reinforce__steps=2)
    run = Run(path)
    view = run.view(run.telling_block())
    run.ask_models(view, view.changed, 3, torch.device("cpu"))
    assert view.disagreeing == 0 and set(view.tables) == set(view.changed) != set()
    assert any(tables["base"] != tables["reinforced"] for tables in view.tables.values())
    assert len(view.entries) == CONTEXT + 1
    assert view.entries[-1]["reason"] == "last of its block"


def test_faults_are_told_in_a_sentence(here, capsys, tmp_path, monkeypatch):
    assert "name the folder of a run" in refused(capsys, tmp_path)
    assert "no block 9999; name one from 0 to" in refused(capsys, here, "--block", 9999, "--no-models")
    assert "no block -1" in refused(capsys, here, "--block", -1, "--no-models")
    assert "of strength 3, but of 1, 5" in refused(capsys, here, "--alpha", 3, "--no-models")
    assert "alpha 1." in said(capsys, here, "--alpha", 1, "--no-models")
    assert "'x' is no number or range" in refused(capsys, here, "--positions", "3,x")
    assert "leave --no-models out" in refused(capsys, here, "--positions", "3", "--no-models")
    assert "--top: 0 rows" in refused(capsys, here, "--top", 0)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "settings.json").write_text((here / "settings.json").read_text())
    assert "stage 'prepare' is not finished" in refused(capsys, tmp_path / "half")
    monkeypatch.chdir(tmp_path)
    assert "name the base with --model" in refused(capsys, here)
    assert "Made again here" in said(capsys, here, "--model", here.parent / "world" / "base")
