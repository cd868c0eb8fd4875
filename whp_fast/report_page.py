"""The report of a run as one HTML page that needs nothing else: the answer first, then all it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from whp_fast.curve_figures import curve_svgs
from whp_fast.evaluate import FIGURES
from whp_fast.evaluation.curve import relearning_svgs
from whp_fast.judge import spans
from whp_fast.page import document, escaped, legend, shown_token, table, token_boxes
from whp_fast.report_attacks import AttackFigure, attack_figures, relearning_rows, told_lines
from whp_fast.report_attacks import in_plain_words as under_attack
from whp_fast.report_content import (
    ATTACKS,
    ATTACKS_ORACLE,
    BETTER,
    INTERVALS,
    MAX_PANELS,
    NAMES,
    ReportData,
    accuracy_change,
    bars,
    basis,
    completion_pairs,
    curve_with_intervals,
    figure_intervals,
    in_plain_words,
    interval,
    number,
    setting_rows,
    signed,
    verdict,
    verdict_rule,
    was_gone,
)
from whp_fast.report_cost import cost_table

MAX_PROMPTS = 24  # of next tokens, those behind the first panels folded away
MAX_FOLDED = 300  # completions that are folded away
_LABEL_ROWS = 20


def report_page(data: ReportData) -> str:
    """The whole page as text."""
    sections = [
        ("Figures", _figures(data)),
        ("Forgetting, step by step", _curve(data)),
        ("What it says", _completions(data)),
        ("What it expects next", _next_tokens(data)),
        ("What was taught", _labels(data)),
        ("Attacks", _attacks(data)),
        ("What these figures do not show", f"<p>{escaped(data.limits)}</p>"),
        ("Cost", _cost(data)),
        ("Settings", _settings(data)),
    ]
    sections = [(title, content) for title, content in sections if content]
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title, _ in sections)
    body = "".join(
        f'<section id="{_anchor(title)}"><h2>{title}</h2>{content}</section>' for title, content in sections
    )
    page = f'{_answer(data)}<nav aria-label="Sections">{links}</nav><main>{body}</main>'
    return document(data.title, page, style=_STYLE)


def _answer(data: ReportData) -> str:
    """The first screen: is it gone, and at what price."""
    known = figure_intervals(data)
    measured = [name for name in FIGURES if data.after.figures[name] is not None]
    wanted = ["general_accuracy", "general_perplexity"]
    wanted.insert(0, FIGURES[0] if FIGURES[0] in measured else FIGURES[1])
    cards = "".join(_card(data, name, known) for name in wanted if name in measured)
    attacked = under_attack(attack_figures(data.attacks), was_gone(data))
    attacked = f"<p><b>And under attack?</b> {escaped(attacked)}</p>" if attacked else ""
    key = "○ before, ● after with its 95 % interval" + (", ▏the oracle" if data.oracle else "")
    return (
        f'<header><p class="small">{escaped(data.title)} · model {escaped(data.model_name)}</p>'
        "<h1>Is it gone, and at what price?</h1>"
        f'<p class="verdict">{escaped(verdict(data))}.</p><p>{escaped(in_plain_words(data))}</p>'
        f"{attacked}"
        f'<div class="cards">{cards}</div>'
        + (f'<p class="small" aria-hidden="true">{key}</p>' if "gauge" in cards else "")
        + "</header>"
    )


def _card(data: ReportData, name: str, known: dict) -> str:
    before, after = data.before.figures[name], data.after.figures[name]
    lines = []
    pairs = [interval(known[model].get(name), name) for model in ("before", "after")]
    if any(pairs):
        lines.append(f"95 %: {pairs[0] or '–'} → {pairs[1] or '–'}")
    change = accuracy_change(data) if name == "general_accuracy" else None
    if change is not None:
        points, low, high = (signed(100 * value) for value in change)
        lines.append(f"change on the same questions {points} points ({low} to {high})")
    if name == "general_perplexity" and before:
        lines.append(f"change {signed(100 * (after / before - 1))} %")
    if data.oracle is not None and data.oracle.figures[name] is not None:
        lines.append(f"oracle {number(name, data.oracle.figures[name])}")
    lines.append(f"{BETTER[name]} is better")
    told = "".join(f"<span>{line}</span>" for line in lines)
    was = f'<span class="was">{number(name, before)}</span>'
    return (
        f'<div class="card"><h3>{NAMES[name]}</h3>'
        f'<p class="big">{was} <span aria-label="to">→</span> <b>{number(name, after)}</b></p>'
        f'{_gauge(data, name, known)}<p class="small lines">{told}</p></div>'
    )


def _gauge(data: ReportData, name: str, known: dict) -> str:
    """Before, after and oracle as marks on a line from 0 to 1, with the interval of after; the figures stand
    above it, so it is hidden from readers of the text."""
    if name == "general_perplexity":
        return ""
    marks = []
    pair = known["after"].get(name)
    if pair is not None:
        left, right = 100 * pair[0], 100 * pair[1]
        marks.append(f'<i class="range" style="left:{left:.1f}%;width:{max(right - left, 0.5):.1f}%"></i>')
    for model, result in data.results.items():
        value = result.figures[name]
        if value is not None:
            marks.append(f'<i class="{model}" style="left:{100 * value:.1f}%"></i>')
    return f'<div class="gauge" aria-hidden="true">{"".join(marks)}</div>'


def _figures(data: ReportData) -> str:
    known = figure_intervals(data)
    rows = []
    for name in FIGURES:
        row = [f"{NAMES[name]}<br><small>{BETTER[name]} is better</small>"]
        for model, result in data.results.items():
            pair = interval(known[model].get(name), name)
            row.append(number(name, result.figures[name]) + (f"<br><small>{pair}</small>" if pair else ""))
        rows.append(row)
    models = list(data.results)
    parts = [table(["", *models], rows, numbers=range(1, 1 + len(models)))]
    if basis(data):
        parts.append(f"<p>Measured on {escaped(basis(data))}.</p>")
    if any(pair for pairs in known.values() for pair in pairs.values()):
        parts.append(f'<p class="small">{INTERVALS.replace("In brackets", "Below the figures")}</p>')
    if data.oracle:
        parts.append(
            '<p class="small">The oracle is a model that never saw the target: what forgetting would reach '
            "at best.</p>"
        )
    parts.append(f'<p class="small">{escaped(verdict_rule(data))}</p>')
    if data.warnings:
        told = "".join(f"<li>{escaped(warning)}</li>" for warning in data.warnings)
        parts.append(f"<h3>Warnings</h3><ul>{told}</ul>")
    return "".join(parts)


def _curve(data: ReportData) -> str:
    if len(data.curve) < 2:
        return ""
    points = curve_with_intervals(data)
    panels = curve_svgs(points, data.oracle.figures if data.oracle else {})
    note = "Bands are 95 % intervals."
    if data.curve_prompts:
        note += f" Each point rests on at most {data.curve_prompts} prompts of each kind, always the same."
    if data.oracle:
        note += " Dashed: the oracle, on all prompts."
    rows = [
        [str(point["step"])]
        + [
            number(name, point.get(name))
            + (f" <small>{interval(pair, name)}</small>" if (pair := point["intervals"].get(name)) else "")
            for name in FIGURES
        ]
        for point in points
    ]
    heads = ["step", *NAMES.values()]
    return (
        f'<div class="panels">{"".join(f"<figure>{svg}</figure>" for _, svg in panels)}</div>'
        f'<p class="small">{note}</p><details><summary>The same in figures</summary>'
        f"{table(heads, rows, numbers=range(len(heads)))}</details>"
    )


def _completions(data: ReportData) -> str:
    pairs, shown, leaks, leaking = completion_pairs(data)
    if not pairs:
        return ""
    told = f"Greedy completions. First {shown} of {len(pairs)} prompts, those with the greatest change first"
    told += f", then {leaks} of the {leaking} that still give something away" if leaking else ""
    folded = pairs[shown : shown + MAX_FOLDED]
    parts = [
        f"<p>{told}. Marked: what the judge took as a sign of knowledge; the class goes from 0 (none) to 3 "
        "(explicit).</p>",
        _pairs(pairs[:shown]),
    ]
    if folded:
        all_told = "The other" if len(folded) == len(pairs) - shown else "Another"
        parts.append(
            f"<details><summary>{all_told} {len(folded)} prompts</summary>{_pairs(folded)}</details>"
        )
    return "".join(parts)


def _pairs(pairs: list[tuple[dict, dict]]) -> str:
    rows = "".join(
        f'<div class="pair"><p class="prompt">{escaped(old["prompt"])} …</p>'
        f"{_completion(old, 'before')}{_completion(new, 'after')}</div>"
        for old, new in pairs
    )
    return f'<div class="pairs">{rows}</div>'


def _completion(row: dict[str, Any], when: str) -> str:
    """A completion with the expressions that gave it its class marked."""
    text, shown, end = row["completion"], "", 0
    for match in spans(text, row.get("found", ())):
        shown += escaped(text[end : match[0]]) + f"<mark>{escaped(text[slice(*match)])}</mark>"
        end = match[1]
    shown = (shown + escaped(text[end:])).strip() or "<em>nothing</em>"
    judged = "not judged" if row["class"] is None else f"class {row['class']}"
    return f'<p class="said"><small>{when}, {judged}</small>{shown}</p>'


def _next_tokens(data: ReportData) -> str:
    entries = [(entry, bars(entry)) for entry in data.next_tokens[:MAX_PROMPTS]]
    panels = [_panel(entry, rows) for entry, rows in entries if rows]
    if not panels:
        return ""
    first, rest = panels[:MAX_PANELS], panels[MAX_PANELS:]
    more = f'<summary>{len(rest)} more prompts</summary><div class="prompts">{"".join(rest)}</div>'
    more = f"<details>{more}</details>" if rest else ""
    return (
        "<p>Probabilities of the next token in percent; ␣ is a space before it.</p>"
        f'<div class="prompts">{"".join(first)}</div>{more}'
    )


def _panel(entry: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    models = [model for model in ("before", "after", "oracle") if model in rows[0]]

    def cell(row: dict[str, Any], model: str) -> str:
        percent = 100 * row[model]
        shown = f"{percent:.1f}" if percent >= 0.05 else "0"
        return f'<span class="bar {model}" style="--p:{percent:.1f}%">{shown}</span>'

    cells = [
        [f"<code>{escaped(shown_token(r['token']))}</code>", *(cell(r, m) for m in models)] for r in rows
    ]
    content = table(["", *models], cells, kind="bars")
    return f'<div class="panel"><h3>{escaped(entry["prompt"])} …</h3>{content}</div>'


def _labels(data: ReportData) -> str:
    stats, parts = data.label_stats or {}, []
    if stats.get("positions"):
        trained, positions = stats["trained"], stats["positions"]

        def share(name: str) -> str:
            return f"{stats[name]:,} ({100 * stats[name] / max(trained, 1):.1f} %)"

        parts.append(
            f"<p>{trained:,} of {positions:,} positions ({100 * trained / positions:.1f} %) are trained. Of "
            f"these, {share('changed_from_text')} differ from the text’s own next token, and "
            f"{share('changed_from_base')} from what the base model says on the translated text: these the "
            "reinforced model changed.</p>"
        )
        tables = []
        if stats.get("masked"):
            masked = sorted(stats["masked"].items(), key=lambda item: -item[1])
            rows = [[escaped(name), f"{n:,}", f"{100 * n / positions:.1f} %"] for name, n in masked]
            tables.append(table(["not trained", "positions", "share"], rows, numbers=(1, 2)))
        if stats.get("replacements"):
            rows = [
                [f"<code>{escaped(shown_token(row[key]))}</code>" for key in ("text", "label")]
                + [f"{row['count']:,}"]
                for row in stats["replacements"][:_LABEL_ROWS]
            ]
            heads = ["the commonest replacements: text", "label", "times"]
            tables.append(table(heads, rows, numbers=(2,)))
        parts.append(f'<div class="side">{"".join(tables)}</div>')
    if data.label_page:
        parts.append(
            "<h3>A piece of the text</h3><p>Under each token what is taught in its place.</p>"
            f"{legend(data.label_page)}{token_boxes(data.label_page)}"
            '<p class="small">Any block of the run, with what both models expect at each token: '
            "<code>python -m whp_fast.inspect RUN --html labels.html</code></p>"
        )
    return "".join(parts)


def _attacks(data: ReportData) -> str:
    lines = attack_figures(data.attacks)
    if not lines:
        return ""
    oracle = any(line.oracle.value is not None for line in lines)
    heads = ["attack", "figure", "before", "after"] + (["oracle after"] if oracle else [])
    at_once, folded = told_lines(lines)

    def shown(some: Sequence[AttackFigure]) -> str:
        rows, last = [], ""
        for line in some:
            cells = [escaped(line.name) if line.name != last else "", escaped(line.metric_name)]
            for value in (line.before, line.after, line.oracle)[: len(heads) - 2]:
                pair = f"<br><small>{interval(value.interval, line.metric)}</small>" if value.interval else ""
                cells.append(number(line.metric, value.value) + pair)
            rows.append(cells)
            last = line.name
        return table(heads, rows, numbers=range(2, len(heads)))

    panels = relearning_svgs(relearning_rows(data.attacks))
    parts = [f"<p>{ATTACKS.format(oracle=ATTACKS_ORACLE if oracle else '')}</p>", shown(at_once)]
    if panels:
        figures = "".join(f"<figure>{svg}</figure>" for _, svg in panels)
        parts.append(f'<h3>Relearning, step by step</h3><div class="panels">{figures}</div>')
        parts.append('<p class="small">Bands are 95 % intervals. Lower is better.</p>')
    if folded:
        parts.append(f"<details><summary>The earlier steps in figures</summary>{shown(folded)}</details>")
    return "".join(parts)


def _cost(data: ReportData) -> str:
    heads, rows, notes = cost_table(data)
    if not rows:
        return ""
    cells = [
        [f"<b>{escaped(cell)}</b>" if row[0] == "total" else escaped(cell) for cell in row] for row in rows
    ]
    return table(heads, cells, numbers=range(1, len(heads))) + f"<p>{escaped(' '.join(notes))}</p>"


def _settings(data: ReportData) -> str:
    rows = setting_rows(data.settings)
    if not rows:
        return ""
    cells = [
        [f"<code>{escaped(name)}</code>", f"<code>{escaped(v)}</code>" if v else "–"] for name, v in rows
    ]
    return (
        f"<details><summary>All {len(rows)} settings</summary>{table(['setting', 'value'], cells)}</details>"
    )


def _anchor(title: str) -> str:
    return title.lower().replace(",", "").replace(" ", "-")


_STYLE = """
header,nav,main{max-width:76rem;margin:0 auto;padding:0 clamp(.8rem,3vw,2.5rem)}
header{padding-top:1.1rem}
header>.small{margin:0}
h1{font-weight:600;color:var(--grey);font-size:1.15rem;margin:.5em 0 .1em}
.verdict{font-size:clamp(1.5rem,4.5vw,2.3rem);font-weight:700;line-height:1.2;margin:.1em 0 .3em}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,15rem),1fr));gap:1rem;
  margin:1rem 0 .6rem}
.card{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:.8rem 1rem}
.card h3{margin:0;color:var(--grey);font-size:.95rem}
.card p{margin:.2em 0}
.big{font-size:1.75rem;line-height:1.2;font-variant-numeric:tabular-nums}
.was{color:var(--grey)}
.lines span{display:block}
.gauge{position:relative;height:14px;margin:.35em 0;border-bottom:2px solid var(--rule)}
.gauge i{position:absolute;bottom:0}
.gauge .range{height:6px;bottom:-4px;background:var(--blue);opacity:.4}
.gauge .before,.gauge .after{width:11px;height:11px;margin-left:-5.5px;bottom:-6.5px;border-radius:50%}
.gauge .before{border:2px solid var(--grey);background:var(--card)}
.gauge .after{background:var(--blue)}
.gauge .oracle{width:2px;height:14px;margin-left:-1px;background:var(--green);bottom:-1px}
nav{display:flex;flex-wrap:wrap;gap:.2em 1.2em;font-size:.9rem}
section{padding-top:.1px}
figure{margin:0}
svg{display:block;width:100%;height:auto}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:1.2rem 2rem}
.pair{border-top:1px solid var(--rule);display:grid;grid-template-columns:minmax(0,1fr) minmax(0,
  1.3fr) minmax(0,1.3fr);gap:0 1.4rem;padding:.5em 0}
.pair p{margin:0}
.prompt{font-weight:600}
.said{white-space:pre-line}
.said small{display:block;line-height:1.2}
mark{background:var(--tint);color:var(--vermilion);font-weight:700;text-decoration:underline}
.prompts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));
  gap:.4rem 2.4rem}
.panel h3{margin:.8em 0 0}
.bars{width:100%;table-layout:fixed}
.bars td{padding:.12em .5em .12em 0}
.bars code{white-space:pre;font-size:.85rem}
.bars th:first-child{width:37%}
.bars td:first-child{overflow:hidden;text-overflow:ellipsis}
.bar{display:block;background:linear-gradient(var(--c),var(--c)) 0 100%/var(--p) 4px no-repeat;
  padding-bottom:4px;font-size:.85rem;font-variant-numeric:tabular-nums}
.bar.before{--c:var(--before)}
.bar.after{--c:var(--blue)}
.bar.oracle{--c:var(--green)}
.side{display:flex;flex-wrap:wrap;gap:0 3rem;align-items:flex-start}
.side .scroll{max-width:100%}
main{padding-bottom:3rem}
@media(max-width:700px){
.pair{grid-template-columns:minmax(0,1fr) minmax(0,1fr)}
.prompt{grid-column:1/-1}
.card{padding:.55rem .9rem}
.cards{gap:.6rem}
.big{font-size:1.5rem}
nav{display:none}
.lines span{display:inline}
.lines span+span::before{content:" · "}
td small{font-size:.72rem}}
@media print{
nav{display:none}}
"""
