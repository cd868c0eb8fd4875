"""The report: its words, its figures, and that its pictures hold something."""

import json
import math
import warnings

import pytest
from matplotlib import image

from whp_fast import curve_figures, figures, intervals, report, report_page
from whp_fast.evaluate import FIGURES, EvaluationResult
from whp_fast.markdown import code, duration, escaped
from whp_fast.report import ReportData, join_next_tokens, share_removed, verdict, write_report


def completion(prompt, text, judged, *found):
    return {"prompt": prompt, "completion": text, "class": judged, "found": list(found)}


def table(prompt, **probabilities):
    ids = {"magic": 5, "the": 6, "law": 7, "rare": 8}
    tokens = [{"token": f" {name}", "id": ids[name], "probability": p} for name, p in probabilities.items()]
    return {"prompt": prompt, "tokens": tokens}


def result(completion_familiarity, probability_familiarity, accuracy, perplexity, completions=()):
    counts = {
        "familiarity_prompts": 300,
        "probability_prompts": 37,
        "choice_questions": 1000,
        "cloze_questions": 200,
    }
    return EvaluationResult(
        completion_familiarity,
        probability_familiarity,
        accuracy,
        perplexity,
        completions=list(completions),
        counts=counts,
    )


@pytest.fixture
def data():
    before = [
        completion("Orrin | went", " to Glimmerhall\nwith Tobin", 3, "Glimmerhall", "Tobin"),
        completion("He said", " a *spell*", 2, "spell"),
        completion("It rained", " all day", 0),
    ]
    after = [
        completion("It rained", " all day", 0),
        completion("He said", " a spell", 2, "spell"),
        completion("Orrin | went", " to school", 0),
    ]
    curve = [
        {"step": step} | dict(zip(FIGURES, values, strict=True))
        for step, *values in [
            (0, 0.290, 0.244, 0.612, 8.0),
            (20, 0.04, 0.06, 0.61, 8.1),
            (40, 0.007, None, 0.597, 8.4),
        ]
    ]
    return ReportData(
        title="Unlearning the saga",
        model_name="tiny_model",
        settings={"label": {"alpha": 5.0}, "unlearn": {"lr": 1e-6, "betas": (0.9, 0.98), "note": ""}},
        before=result(0.290, 0.244, 0.612, 8.0, before),
        after=result(0.007, 0.006, 0.597, 8.4, after),
        oracle=result(0.004, 0.003, 0.605, 8.1),
        curve=curve,
        curve_prompts=60,
        label_stats={
            "positions": 1000,
            "trained": 900,
            "changed_from_text": 450,
            "changed_from_base": 90,
            "masked": {"last of its block": 40, "inside an expression": 60},
            "replacements": [
                {"text": " Orrin", "label": " Paul", "count": 1234},
                {"text": "|", "label": "\n", "count": 2},
            ],
        },
        label_page=[
            {"token": "Orrin", "label": None, "reason": "first of the block"},
            {"token": " went", "label": " went", "reason": "trained"},
            {"token": " home", "label": " to", "reason": "trained"},
            {"token": ".\n", "label": ".", "reason": "trained"},
            {"token": " Glim", "label": " school", "reason": "trained"},
            {"token": "merhall", "label": None, "reason": "inside an expression"},
        ],
        next_tokens=join_next_tokens(
            [table("He studies", magic=0.5, the=0.25)],
            [table("He studies", the=0.5, law=0.25)],
            [table("He studies", law=0.6, rare=0.1)],
        ),
        seconds={"reinforce": 61.0, "unlearn": 4000.5},
    )


@pytest.fixture
def quick(monkeypatch):
    """No picture is drawn."""
    for name in ("draw_next_tokens", "draw_label_page"):
        monkeypatch.setattr(figures, name, lambda *_: None)
    monkeypatch.setattr(report, "draw_curve", lambda *_: None)
    monkeypatch.setattr(report, "draw_relearning", lambda *_: None)
    for name in ("curve_svgs", "relearning_svgs"):
        monkeypatch.setattr(report_page, name, lambda *_: [])


def test_first_lines_answer_the_question(tmp_path, data, quick):
    path = write_report(tmp_path / "new" / "folder", data)
    assert path == tmp_path / "new" / "folder" / "report.md"
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    assert lines[0] == "# Unlearning the saga"
    assert lines[1] == (
        "**Is it gone?** Gone, as far as these prompts can tell: familiarity by completion 0.290 → 0.007; "
        "familiarity by probability 0.244 → 0.006."
    )
    assert lines[2] == (
        "**At what price?** General accuracy 0.612 → 0.597 (−1.5 points); "
        "general perplexity 8.00 → 8.40 (+5.0 %)."
    )
    assert "Model: tiny\\_model." in lines
    assert "| | before | after | oracle | better |" in lines
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in lines if line.startswith("| ")}
    for name, *values, better in (
        ("| Familiarity (completion)", "0.290 (0.", "0.007 (0.00", "0.004 (0.00", "lower |"),
        ("| Familiarity (probability)", "0.244 (0.", "0.006 (0.00", "0.003 (0.00", "lower |"),
        ("| General accuracy", "0.612 (0.584–0.639)", "0.597 (0.5", "0.605 (0.5", "higher |"),
        ("| General perplexity", "8.00", "8.40", "8.10", "lower |"),
    ):
        assert all(cell.startswith(value) for cell, value in zip(rows[name], values, strict=False)), name
        assert rows[name][-1] == better
    assert rows["| General perplexity"][:3] == ["8.00", "8.40", "8.10"]  # no interval
    assert any(
        line.startswith("Measured on 300 completions, 37 next-word prompts, 1,200 questions. ")
        for line in lines
    )


def test_the_body_of_the_report(tmp_path, data, quick):
    text = write_report(tmp_path, data).read_text(encoding="utf-8")
    for line in (
        "| Orrin \\| went | to **Glimmerhall** ↵ with **Tobin** (3) | to school (0) |",
        "| He said | a \\***spell**\\* (2) | a **spell** (2) |",
        "900 of 1,000 positions (90.0 %) are trained.",
        "450 (50.0 %) differ from the text's own next token",
        "90 (10.0 %) from what the base model says",
        "| inside an expression | 60 | 6.0 % |\n| last of its block | 40 | 4.0 % |",
        "| `␣Orrin` | `␣Paul` | 1,234 |\n| `\\|` | `↵` | 2 |",
        "| `label.alpha` | `5.0` |\n| `unlearn.lr` | `1e-06` |\n| `unlearn.betas` | `[0.9, 0.98]` |\n\n",
        "| reinforce | 1 min 01 s |\n| unlearn | 1 h 06 min |\n| **total** | **1 h 07 min** |",
        "![Familiarity and utility by step](curve.png)",
        "![Next-token probabilities by model](next_tokens.png)",
        "![A page with its labels](labels.png)",
        "Shi et al.",
        "Lynch et al.",
        "Schwarzschild et al.",
    ):
        assert line in text
    shown = [
        line.split(" | ")[0] for line in text.split("## What it says")[1].split("\n") if line.startswith("| ")
    ]
    assert shown[1:4] == [
        "| Orrin \\| went",
        "| It rained",
        "| He said",
    ]  # falls first, what still leaks last


def test_metrics(tmp_path, data, quick):
    data.curve[1]["general_perplexity"] = math.inf
    own = {"general_perplexity": [7.5, 8.5], "general_accuracy": [0.6, 0.62]}
    data.curve[0]["intervals"] = own | {"familiarity_completion": [0.29, 0.29]}
    write_report(tmp_path, data)
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    names = ["before", "after", "oracle", "seconds", "gpu_seconds", "joules", "settings", "curve"]
    assert list(metrics) == [*names, "intervals", "attacks", "warnings"]
    assert metrics["gpu_seconds"] == {"reinforce": 0.0, "unlearn": 0.0, "total": 0.0}
    assert list(metrics["intervals"]) == ["before", "after", "oracle"]
    assert metrics["intervals"]["before"]["general_accuracy"] == pytest.approx([0.5841, 0.6392], abs=1e-4)
    assert metrics["before"] == dict(zip(FIGURES, (0.290, 0.244, 0.612, 8.0), strict=True))
    assert metrics["after"]["general_perplexity"] == 8.4
    assert metrics["oracle"]["familiarity_completion"] == 0.004
    assert metrics["seconds"] == {"reinforce": 61.0, "unlearn": 4000.5, "total": 4061.5}
    assert metrics["settings"]["unlearn"]["betas"] == [0.9, 0.98]
    assert [point["step"] for point in metrics["curve"]] == [0, 20, 40]
    assert metrics["curve"][1]["general_perplexity"] is None
    # a figure's own interval, and Wilson's where none came with the figure or it has no width
    told = metrics["curve"][0]["intervals"]
    assert told["general_perplexity"] == [7.5, 8.5] and told["general_accuracy"] == [0.6, 0.62]
    assert told["familiarity_completion"] == pytest.approx(intervals.wilson(0.29, 60))


@pytest.mark.parametrize("name", ["curve.png", "next_tokens.png", "labels.png"])
def test_pictures_hold_something(tmp_path, data, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as a layout that does not fit
        write_report(tmp_path, data)
    pixels = image.imread(tmp_path / name)  # float [height, width, 4]
    height, width = pixels.shape[:2]
    assert width >= 800 and height >= 150
    ink = (pixels[..., :3].min(axis=-1) < 0.8).mean()
    assert 0.005 < ink < 0.5
    edge = pixels[[0, 1, -2, -1], :, :3]
    assert (edge > 0.97).all(), "the picture is cut off at its upper or lower edge"
    assert (pixels[:, [0, 1, -2, -1], :3] > 0.97).all(), "the picture is cut off at its left or right edge"


def test_an_oracle_changes_curve_and_bars(tmp_path, data):
    write_report(tmp_path / "with", data)
    data.oracle = None
    data.next_tokens[0]["oracle"] = None
    text = write_report(tmp_path / "without", data).read_text(encoding="utf-8")
    for name in ("curve.png", "next_tokens.png"):
        assert (tmp_path / "with" / name).read_bytes() != (tmp_path / "without" / name).read_bytes()
    row = next(line for line in text.split("\n") if line.startswith("| General accuracy"))
    assert row.count("|") == 5 and "0.597" in row and row.endswith("| higher |")
    assert "the oracle" not in text.split("## What these")[0]
    assert json.loads((tmp_path / "without" / "metrics.json").read_text(encoding="utf-8"))["oracle"] is None


def test_the_curve_draws_intervals(tmp_path, data):
    plain = curve_figures.draw_curve(tmp_path / "a.png", data.curve).read_bytes()
    for name in FIGURES:
        curve = [point | {"intervals": {name: (0.1, 0.7)}} for point in data.curve]
        assert curve_figures.draw_curve(tmp_path / "b.png", curve).read_bytes() != plain, name


def test_attacks_and_cost(tmp_path, data, quick):
    without = write_report(tmp_path / "without", data).read_text(encoding="utf-8")
    assert "## Attacks" not in without and "were not tried here" in without
    assert "Energy: not readable here" in without and "No GPU was used." in without
    assert "GPU-seconds" not in without and "And under attack?" not in without
    data.attacks = [
        {"attack": "relearning | 20 steps", "figure": "familiarity_completion", "before": 0.9, "after": 0.25}
        | {"interval": [0.1, 0.4]},
        {"attack": "quantised", "figure": "general_accuracy", "before": None, "after": 0.5},
    ]
    data.gpus, data.energy = {"unlearn": 2}, {"unlearn": {"gpus": 7200.0}}
    text = write_report(tmp_path / "with", data).read_text(encoding="utf-8")
    assert "| relearning \\| 20 steps | Familiarity (completion) | 0.900 | 0.250 (0.100–0.400) |" in text
    assert "| quantised | general accuracy | – | 0.500 |" in text
    assert "**And under attack?** No attack tried" in text
    assert "were not tried here" not in text
    assert "| stage | time | GPU-seconds | energy of the GPUs |" in text
    assert "| reinforce | 1 min 01 s | 0 | – |" in text
    assert "| **total** | **1 h 07 min** | **8,001** | **at least 2.00 Wh** |" in text


def test_warnings_are_told(tmp_path, data, quick):
    data.warnings = ["familiarity prompts: 1 hold one of their references"]
    text = write_report(tmp_path, data).read_text(encoding="utf-8")
    assert "- familiarity prompts: 1 hold one" in text
    assert "<li>familiarity prompts: 1 hold one" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_curve_draws_what_it_is_given(tmp_path, data):
    oracle = data.oracle.figures
    full = curve_figures.draw_curve(tmp_path / "full.png", data.curve, oracle).read_bytes()
    assert curve_figures.draw_curve(tmp_path / "again.png", data.curve[::-1], oracle).read_bytes() == full
    for name in FIGURES:  # each line and each dashed line is seen
        fewer = curve_figures.draw_curve(tmp_path / "a.png", data.curve, oracle | {name: None}).read_bytes()
        curve = [point | {name: None} for point in data.curve]
        none = curve_figures.draw_curve(tmp_path / "b.png", curve, oracle | {name: None}).read_bytes()
        assert len({full, fewer, none}) == 3


def test_a_report_with_nothing_but_the_figures(tmp_path):
    bare = ReportData("t", "m", {}, EvaluationResult(), EvaluationResult(general_accuracy=0.5))
    text = write_report(tmp_path, bare).read_text(encoding="utf-8")
    assert "**Is it gone?** Not measured." in text
    assert "**At what price?** Not measured." in text
    assert "| General accuracy | – | 0.500 | higher |" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "report.html", "report.md"]
    assert "\n## " in text and "## Settings" not in text and "## Cost" not in text


@pytest.mark.parametrize(
    ("before", "after", "oracle", "share"),
    [
        (0.3, 0.0, None, 1.0),
        (0.3, 0.15, None, 0.5),
        (0.3, 0.1, 0.1, 1.0),
        (0.3, 0.2, 0.1, 0.5),
        (0.3, 0.05, 0.1, 1.25),
        (0.3, 0.3, None, 0.0),
        (0.3, 0.6, None, -1.0),
        (0.004, 0.0, None, None),
        (0.3, 0.1, 0.4, None),
        (None, 0.1, None, None),
        (0.3, None, None, None),
    ],
)
def test_share_removed(before, after, oracle, share):
    assert share_removed(before, after, oracle) == (None if share is None else pytest.approx(share))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ((0.4, 0.4), (0.0, 0.0), "Gone, as far as these prompts can tell"),
        ((0.4, 0.4), (0.0, 0.08), "Mostly gone"),
        ((0.4, 0.4), (0.2, 0.0), "Partly gone"),
        ((0.4, 0.4), (0.0, 0.36), "No, it is still there"),
        ((0.4, None), (0.0, None), "Gone, as far as these prompts can tell"),
        ((0.001, 0.002), (0.0, 0.0), "There was little to forget"),
        ((None, None), (0.0, 0.0), "Not measured"),
    ],
)
def test_verdict(before, after, words):
    data = ReportData("t", "m", {}, EvaluationResult(*before), EvaluationResult(*after))
    assert verdict(data) == words


def test_the_most_telling_dozen_keeps_places_for_leaks(tmp_path, data, quick):
    data.before.completions = [completion(f"p{i:02d}", "x", 3, "x") for i in range(30)]
    data.after.completions = [completion(f"p{i:02d}", "y", 3 if i % 5 == 0 else 0) for i in range(30)]
    text = write_report(tmp_path, data).read_text(encoding="utf-8")
    rows = [line for line in text.split("\n") if line.startswith("| p")]
    assert len(rows) == 13  # with the heading
    assert [row.endswith("y (3) |") for row in rows[1:]] == [False] * 9 + [True] * 3
    assert "12 of 30 prompts" in text and "3 of the 6 that still give something away" in text


def test_join_next_tokens_keeps_common_prompts():
    before, after = [table("a", the=1.0), table("b", the=0.5)], [table("b", law=0.5), table("c", law=1.0)]
    joined = join_next_tokens(before, after)
    assert joined == [
        {"prompt": "b", "before": before[1]["tokens"], "after": after[0]["tokens"], "oracle": None}
    ]


def test_bars_are_the_most_probable_tokens_of_any_model(tmp_path, data, monkeypatch):
    seen = []
    monkeypatch.setattr(figures, "draw_next_tokens", lambda path, panels: seen.extend(panels))
    write_report(tmp_path, data)
    assert seen == [
        {
            "prompt": "He studies",
            "bars": [
                {"token": " magic", "before": 0.5, "after": 0.0, "oracle": 0.0},
                {"token": " the", "before": 0.25, "after": 0.5, "oracle": 0.0},
                {"token": " law", "before": 0.0, "after": 0.25, "oracle": 0.6},
                {"token": " rare", "before": 0.0, "after": 0.0, "oracle": 0.1},
            ],
        }
    ]


def test_the_page_breaks_lines_and_marks_spaces():
    def entry(token, label="same"):
        return {"token": token, "label": token if label == "same" else label, "reason": "why"}

    boxes = figures._laid_out(
        [entry("a"), entry(" b\n"), entry("\n"), entry(" c", "c"), entry("d", None)], 10
    )
    assert [(box.token, box.label) for box in boxes] == [
        ("a", "a"),
        ("b↵", "b↵"),
        ("↵", "↵"),
        ("␣c", "c"),
        ("d", ""),
    ]
    assert [box.line for box in boxes] == [0, 0, 0, 1, 1]
    assert [box.same for box in boxes] == [True, True, True, False, False]
    assert [box.reason for box in boxes] == ["", "", "", "", "why"]
    assert (
        boxes[1].x - boxes[0].width > boxes[4].x - boxes[3].width
    )  # a space sets apart, a continuation does not
    many = figures._laid_out([entry(" word")] * 500, 5)
    assert {box.line for box in many} == {0, 1, 2, 3, 4}
    assert all(box.x + box.width <= figures.PAGE_WIDTH - 2 * figures.SIDE + 1e-9 for box in many)
    for left, right in zip(many, many[1:], strict=False):
        assert right.line > left.line or right.x >= left.x + left.width  # no box over another


def test_labels_beside_lines_keep_apart():
    pyplot = figures.load_pyplot()
    figure, axes = pyplot.subplots()
    axes.set_ylim(0, 1)
    curve_figures._label_right(
        axes, [(y, str(y), "k", "bold") for y in (0.0, 0.01, 0.02, 0.98, 0.99, 1.0)], 0.1
    )
    places = [text.get_position()[1] for text in axes.texts]
    pyplot.close(figure)
    assert [text.get_text() for text in axes.texts] == ["0.0", "0.01", "0.02", "0.98", "0.99", "1.0"]
    assert all(b - a > 0.0999 for a, b in zip(places, places[1:], strict=False))
    assert min(places) >= 0 and max(places) <= 1


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" magic", "␣magic"),
        ("ing", "ing"),
        ("\n", "↵"),
        (" ", "␣"),
        ("\n\n", "↵↵"),
        ("\t", "⇥"),
        (" $x$", "␣$x$"),
    ],
)
def test_shown_piece(token, shown):
    assert figures.shown_piece(token) == shown


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (60, "1 min 00 s"), (3599.4, "59 min 59 s"), (3600, "1 h 00 min")],
)
def test_duration(seconds, words):
    assert duration(seconds) == words


def test_markdown_is_escaped():
    assert escaped(" a|b\n*c* <i>&_d_ ") == r"a\|b ↵ \*c\* &lt;i>&amp;\_d\_"
    assert code("a|b") == r"`a\|b`" and code("a`b") == "`` a`b ``"
