"""The page of the report: what stands in it, that nothing in it is foreign, and that texts stay texts."""

import copy
import re

import pytest
from page_checks import elements, parsed, text_of
from test_report import completion, data, table  # noqa: F401 (data is a fixture)

from whp_fast import intervals
from whp_fast.evaluate import EvaluationResult
from whp_fast.report import ReportData, join_next_tokens, write_report
from whp_fast.report_content import in_plain_words
from whp_fast.report_page import report_page

NASTY = '<script>alert("x")</script> & "q" \' <img src=x onerror=alert(1)> \x1b[31m\u202e</title>'


def first_screen(page: str) -> str:
    return text_of(page[page.index("<header") : page.index("</header>")])


def test_the_first_screen_answers(data):  # noqa: F811
    head = first_screen(report_page(data))
    assert "Is it gone, and at what price?" in head
    assert "Gone, as far as these prompts can tell." in head
    assert "0.290 → 0.007" in head and "0.612 → 0.597" in head and "8.00 → 8.40" in head
    low, high = intervals.wilson(0.290, 300)
    assert f"95 %: {low:.3f}–{high:.3f} → 0.00" in head
    assert "oracle 0.004" in head and "oracle 0.605" in head and "change +5.0 %" in head
    page = report_page(data)
    order = [page.index(part) for part in ("<header", 'class="cards"', 'id="figures"', 'id="settings"')]
    assert order == sorted(order)


def test_a_figure_that_was_not_measured_has_no_card(data):  # noqa: F811
    data.before.familiarity_completion = data.after.familiarity_completion = None
    data.before.general_perplexity = data.after.general_perplexity = None
    head = first_screen(report_page(data))
    assert "Familiarity (probability)" in head and "Familiarity (completion)" not in head
    assert "General accuracy" in head and "perplexity" not in head


def test_plain_words(data):  # noqa: F811
    data.before.counts |= {"class_3": 80, "class_2": 7, "choice_right": 700, "cloze_right": 34}
    data.after.counts |= {"class_3": 1, "class_2": 0, "choice_right": 690, "cloze_right": 26}
    assert in_plain_words(data) == (
        "1 of 300 completions still shows knowledge of the text, against 87 before; 716 of 1200 general "
        "questions are answered right, against 734 before; the perplexity of other text rose by 5.0 %."
    )
    data.after.general_perplexity, data.after.counts["class_2"] = 7.6, 4
    words = in_plain_words(data)
    assert "5 of 300 completions still show knowledge" in words and "fell by 5.0 %" in words
    data.after.general_perplexity = 8.0
    assert "is as it was" in in_plain_words(data)


def test_accuracy_on_the_same_questions(data):  # noqa: F811
    def answers(right):
        return [{"prompt": f"q{i}", "right": i < right} for i in range(100)]

    data.before.answers, data.after.answers = answers(90), answers(85)
    assert "change on the same questions −5.0 points (−9.5 to −0.3)" in first_screen(report_page(data))
    data.after.answers = answers(85)[:-1]
    assert "same questions" not in first_screen(report_page(data))


def test_every_part_is_there(data):  # noqa: F811
    data.attacks = [{"attack": "relearning", "figure": "familiarity", "before": 0.5, "after": 0.25}]
    data.gpus, data.energy = {"reinforce": 2, "unlearn": 2}, {"reinforce": {"gpus": 3600.0}}
    page = report_page(data)
    told = text_of(page)
    for part in (
        "900 of 1,000 positions (90.0 %) are trained.",
        "relearning familiarity 0.500 0.250",
        "reinforce 1 min 01 s 122 1.00 Wh",
        "unlearn 1 h 06 min 8,001 –",
        "python -m whp_fast.inspect RUN --html labels.html",
        "Shi et al.",
        "All 4 settings",
        "unlearn.betas [0.9, 0.98]",
        "unlearn.note –",
        "␣Orrin ␣Paul 1,234",
        "before, class 3 to Glimmerhall",
        "Not trained: inside an expression.",
    ):
        assert part in told, part
    svgs = [attributes for name, attributes in elements(page) if name == "svg"]
    assert len(svgs) == 3 and all(svg["role"] == "img" for svg in svgs)
    assert svgs[0]["aria-label"] == (
        "Familiarity with the target, lower is better: by completion 0.290 at step 0, 0.007 at step 40, "
        "oracle 0.004; by probability 0.244 at step 0, 0.060 at step 20, oracle 0.003."
    )
    ids = [attributes["id"] for _, attributes in elements(page) if "id" in attributes]
    assert len(ids) == len(set(ids)), "two elements of one name"
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    marked = re.findall("<mark>(.*?)</mark>", page)
    assert marked[:3] == ["Glimmerhall", "Tobin", "spell"]


def test_the_page_needs_nothing_else(tmp_path, data):  # noqa: F811
    write_report(tmp_path, data)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page == report_page(data)
    parsed(page)
    for name, attributes in elements(page):
        assert name not in ("script", "img", "link", "iframe", "object"), name
        for key in ("src", "href", "xlink:href"):
            assert attributes.get(key, "#").startswith("#"), attributes
    assert "http-equiv" in page and "default-src 'none'" in page
    assert not re.search(r"url\((?!#)|@import", page)


def test_texts_stay_texts(data):  # noqa: F811
    plain = [(name, sorted(attributes)) for name, attributes in elements(report_page(data))]
    nasty = copy.deepcopy(data)
    nasty.title = nasty.model_name = NASTY
    for result in (nasty.before, nasty.after):
        for row in result.completions:
            row["prompt"] += NASTY
            row["completion"] = NASTY + row["completion"] + NASTY
    for entry in nasty.label_page:
        same = entry["label"] == entry["token"]
        entry["token"] += NASTY
        entry["label"] = entry["token"] if same else entry["label"] and entry["label"] + NASTY
    nasty.label_stats["replacements"][0] |= {"text": NASTY, "label": NASTY}
    nasty.settings["label"]["alpha"] = NASTY
    nasty.next_tokens[0]["prompt"] = NASTY
    nasty.next_tokens[0]["before"][0]["token"] = NASTY
    nasty.seconds = {NASTY: 61.0, "unlearn": 4000.5}
    page = report_page(nasty)
    assert [(name, sorted(attributes)) for name, attributes in elements(page)] == plain
    assert "\x1b" not in page and "\u202e" not in page
    assert page.count("&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;") > 10


def test_a_completion_that_was_not_judged(tmp_path, data):  # noqa: F811
    data.before.completions[0]["class"] = data.after.completions[2]["class"] = None
    assert "before, not judged" in text_of(report_page(data))
    assert "(–)" in write_report(tmp_path, data).read_text(encoding="utf-8")


def test_many_completions_are_folded_away(data):  # noqa: F811
    data.before.completions = [completion(f"p{i:03d}", "x", 3, "x") for i in range(40)]
    data.after.completions = [completion(f"p{i:03d}", "y", 0) for i in range(40)]
    page = report_page(data)
    assert "First 12 of 40 prompts" in page and "The other 28 prompts" in page
    assert all(f">p{i:03d} …<" in page for i in range(40))


def test_more_prompts_are_folded_away(data):  # noqa: F811
    tables = [table(f"prompt {i}", magic=0.5) for i in range(30)]
    data.next_tokens = join_next_tokens(tables, tables)
    page = report_page(data)
    assert "18 more prompts" in page and "prompt 23 …" in page and "prompt 24 …" not in page


@pytest.mark.parametrize(
    "attacks",
    [None, {}, "x", [None, 3, {}], [{"attack": ""}], {"attacks": []}, [{"figure": "f", "after": 1.0}]],
)
def test_attacks_that_say_nothing_are_no_section(data, attacks):  # noqa: F811
    data.attacks = attacks
    assert 'id="attacks"' not in report_page(data)


@pytest.mark.parametrize(
    ("interval", "shown"),
    [
        ([0.1, 0.3], "0.200 0.100–0.300"),
        ({"after": [0.1, 0.3]}, "0.200 0.100–0.300"),
        ([0.1], "0.200 "),
        (None, "0.200 "),
    ]
    + [("x", "0.200 "), ([None, 0.3], "0.200 "), ([float("nan"), 1], "0.200 ")],
)
def test_intervals_of_attacks_in_any_form(data, interval, shown):  # noqa: F811
    data.attacks = {
        "attacks": [{"attack": "a", "figure": "f", "before": "?", "after": 0.2, "interval": interval}]
    }
    told = text_of(report_page(data)).split("95 % intervals. attack figure before after ")[1]
    assert told.split("What these")[0].strip().startswith(f"a f – {shown}".strip())


def test_rows_of_the_attacks_command(data):  # noqa: F811
    data.attacks = attacked()
    page = report_page(data)
    told = text_of(page)
    at_once, folded = told.split("The earlier steps in figures")
    assert (
        "Relearning, 20 steps Familiarity (completion) 0.010 0.000–0.030 0.500 0.300–0.700 0.100 0.050–0.150 "
        "General perplexity 8.40 8.10–8.70 9.00 8.50–9.50 – Quantisation, 4 bits" in at_once
    )
    assert "Relearning, 0 steps Familiarity (completion) 0.010 0.000–0.030" in folded
    svgs = [attributes["aria-label"] for name, attributes in elements(page) if name == "svg"]
    assert svgs[3] == (
        "Familiarity (completion), lower is better: unlearned 0.010 at step 0, 0.500 at step 20; "
        "oracle 0.000 at step 0, 0.100 at step 20."
    )
    assert (
        first_screen(page)
        .split("And under attack? ")[1]
        .startswith(
            "Under attack it comes back: relearning, 20 steps, takes familiarity by completion from 0.010 "
            "to 0.500 (0.300–0.700); a model that never read the text reaches 0.100 in the same way. Tried: "
            "relearning, quantisation."
        )
    )


def attacked():
    """Rows as the attack stage and ``python -m whp_fast.evaluate --attacks`` write them."""

    def row(attack, setting, x, before, after, model="after", metric="familiarity_completion"):
        sides = {"before": before, "after": after}
        sides = {k: dict(zip(("value", "low", "high"), v), n=40) for k, v in sides.items()}
        return {"attack": attack, "setting": setting, "model": model, "metric": metric, "x": x, **sides}

    little, none = (0.01, 0.0, 0.03), (0.0, 0.0, 0.0)
    return {
        "attacks": [
            row("relearn", "0 steps", 0, little, little),
            row("relearn", "20 steps", 20, little, (0.5, 0.3, 0.7)),
            row("relearn", "20 steps", 20, (8.4, 8.1, 8.7), (9.0, 8.5, 9.5), metric="general_perplexity"),
            row("relearn", "0 steps", 0, none, none, "oracle"),
            row("relearn", "20 steps", 20, none, (0.1, 0.05, 0.15), "oracle"),
            row("quantise", "4 bits", 4, little, (0.02, 0.0, 0.04)),
        ]
    }


def test_attacks_that_bring_nothing_back(data):  # noqa: F811
    data.attacks = {"attacks": attacked()["attacks"][-1:]}
    assert "No attack tried (quantisation) brought it back: familiarity by completion is at most 0.020" in (
        first_screen(report_page(data))
    )
    # what the oracle gives too did not come back
    rows = attacked()["attacks"][1:2]
    data.attacks = rows + [rows[0] | {"model": "oracle", "after": rows[0]["after"] | {"value": 0.48}}]
    assert "brought out more than a model that never read the text gives" in first_screen(report_page(data))
    # a verdict that it is still there speaks of no return
    data.attacks, data.after.familiarity_completion = attacked(), 0.2
    assert "Under attack more of it comes out: relearning" in first_screen(report_page(data))


def test_a_page_with_nothing_but_two_figures():
    page = report_page(
        ReportData(
            "t", "m", {}, EvaluationResult(general_accuracy=0.6), EvaluationResult(general_accuracy=0.5)
        )
    )
    parsed(page)
    told = text_of(page)
    assert "Not measured." in told and "0.600 → 0.500" in told and "95 %:" not in told
    for part in ("step by step", "What it says", "What was taught", "Attacks", "Cost", "Settings"):
        assert part not in told
