"""What the HTML pages share: escaping, one document without outside parts, and text with its labels.

Pages are light or dark as the reader's system says, readable from 360 pixels of width on, and tell nothing by
colour alone. A content security policy lets no script run but the page's own, whatever the corpus holds.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

FIRST = "first of the block"
# Reason why a token is not trained: the mark in the place of its label, and the reason in a sentence.
MARKS = {
    "inside an expression": ("~", "The token goes on an expression; its translation has no such place."),
    "before a repeated expression": (
        "=",
        "The token begins an expression that has stood in this block before: only the first one is taught.",
    ),
    "no boundary of the translation there": (
        "^",
        "No token of the translation ends where this one begins, so there is no output to read.",
    ),
    "last of its block": ("$", "The reference code shifts its labels, so the last position has none."),
    "no finite logit": ("!", "A model gave no finite logit here."),
    FIRST: (
        "|",
        "Nothing of the block stands before its first token, so its label belongs to the block before.",
    ),
}
_UNKNOWN = ("?", "")


def printable(text: str) -> str:
    """The text without characters that change how others are shown (control characters, directions)."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def escaped(text: Any) -> str:
    """Text for HTML, content or attribute."""
    return html.escape(printable(str(text)), quote=True)


def shown_token(token: str, *, space: bool = True) -> str:
    """A token for a person: line breaks and tabs as arrows, a space as an open box where ``space``."""
    text = printable(token).replace("\n", "↵").replace("\t", "⇥")
    if text.startswith(" ") and text.strip():
        return ("␣" if space else "") + text[1:]
    return text if text.strip() else text.replace(" ", "␣")


def mark_of(reason: str) -> str:
    return MARKS.get(reason, _UNKNOWN)[0]


def why(reason: str) -> str:
    """The reason why a token is not trained, with its explanation."""
    sentence = MARKS.get(reason, _UNKNOWN)[1]
    return f"Not trained: {reason}." + (f" {sentence}" if sentence else "")


def data_block(name: str, value: Any) -> str:
    """JSON in the page for its script. No string in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    text = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return f'<script type="application/json" id="{name}">{text}</script>'


def document(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """A whole page. ``body`` is HTML, ``title`` is text; ``script`` is the only one that may run."""
    script = f"\n{script.strip()}\n" if script else ""
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    policy += f"; script-src 'sha256-{allowed}'" if script else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n{body}\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


def table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int] = (), kind: str = ""
) -> str:
    """A table of cells that are HTML already; the columns ``numbers`` are set to the right. Its rows can be
    scrolled sideways where the screen is narrower."""
    numbers = set(numbers)

    def cells(row: Sequence[str], tag: str) -> str:
        right = ' class="n"'
        return "".join(f"<{tag}{right if i in numbers else ''}>{cell}</{tag}>" for i, cell in enumerate(row))

    head = "".join(
        f'<th scope="col"{" class=" + chr(34) + "n" + chr(34) if i in numbers else ""}>{cell}</th>'
        for i, cell in enumerate(heads)
    )
    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def token_boxes(page: Sequence[Mapping[str, Any]], *, buttons: bool = False) -> str:
    """The text with what is taught in the place of each token under it.

    page: ``{"token", "label" (None where nothing is taught), "reason"}`` for each token, as
    `whp_fast.label_statistics.label_page` makes them. With ``buttons`` each can be chosen, and carries its
    number in the block (``"n"``).
    """
    parts = []
    for i, entry in enumerate(page):
        token, label, reason = entry["token"], entry["label"], entry["reason"]
        shown, taught = shown_token(token, space=False), shown_token(label or "", space=False)
        if label is not None and label != token and taught == shown:  # they differ in the space before them
            shown, taught = shown_token(token), shown_token(label)
        if label is None:
            kind, taught, told = f"m r{_number_of(reason)}", mark_of(reason), why(reason)
        elif label == token:
            kind, told = "s", "Taught: the text's own token."
        else:
            kind, told = "c", f"Taught: “{shown_token(label)}”."
        kind += " sp" if token.startswith(" ") else ""
        kind += " next" if entry.get("next") else ""
        inside = f"<b>{escaped(shown) or '∅'}</b><i>{escaped(taught) or '∅'}</i>"
        title = f' title="{escaped(told)}"'
        if buttons:
            name = escaped(f"Token {entry['n']}, {shown_token(token)}. {told}")
            parts.append(
                f'<button type="button" class="t {kind}" data-n="{entry["n"]}"{title} aria-label="{name}">'
                f"{inside}</button>"
            )
        else:
            parts.append(f'<span class="t {kind}"{title}>{inside}</span>')
        if "\n" in token and i + 1 < len(page) and page[i + 1]["token"].strip(" ") not in ("\n", ""):
            parts.append("<br>")
    return f'<div class="tokens">{"".join(parts)}</div>'


def legend(page: Sequence[Mapping[str, Any]]) -> str:
    """What the boxes mean, with how many there are of each kind."""
    same = sum(e["label"] is not None and e["label"] == e["token"] for e in page)
    changed = sum(e["label"] is not None and e["label"] != e["token"] for e in page)
    items = [
        ("s", "word", "the text's own token is taught", same),
        ("c", "other", "another token is taught in its place", changed),
    ]
    reasons: dict[str, int] = {}
    for entry in page:
        if entry["label"] is None:
            reasons[entry["reason"]] = reasons.get(entry["reason"], 0) + 1
    rows = []
    for kind, sample, words, count in items:
        sample = f'<span class="t {kind}"><b>word</b><i>{sample}</i></span>'
        rows.append(f"<li>{sample}<span>{words} <small>({count})</small></span></li>")
    for reason, count in reasons.items():
        sample = f'<span class="t m r{_number_of(reason)}"><b>word</b><i>{mark_of(reason)}</i></span>'
        rows.append(f"<li>{sample}<span>{escaped(_upper(why(reason)))} <small>({count})</small></span></li>")
    return f'<ul class="legend">{"".join(rows)}</ul>'


def _number_of(reason: str) -> int:
    """Which of the patterns stands for a reason; 0 for one that is not known."""
    return list(MARKS).index(reason) + 1 if reason in MARKS else 0


def _upper(text: str) -> str:
    return re.sub(r"^\w", lambda match: match[0].upper(), text)


_STYLE = """
:root{color-scheme:light dark;--ink:#1f1f1f;--grey:#595959;--faint:#767676;--rule:#d9d7d2;--paper:#fff;
  --card:#f6f5f2;--blue:#0065a0;--vermilion:#a33f00;--tint:#fce9df;--green:#00704f;--purple:#933a91;
  --sky:#2a7fb0;--orange:#8a5a00;--before:#a5a5a5}
@media(prefers-color-scheme:dark){
:root{--ink:#e9e6e1;--grey:#b3afa9;--faint:#94908a;--rule:#3b3936;--paper:#161514;--card:#211f1d;
  --blue:#62b4ea;--vermilion:#ff9d63;--tint:#3d2415;--green:#45c99c;--purple:#e391e0;--sky:#7cc4ee;
  --orange:#e8b04a;--before:#8a8a8a}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 -apple-system,"Segoe UI",Roboto,
  "Noto Sans","Liberation Sans","DejaVu Sans",Arial,sans-serif;overflow-wrap:anywhere;
  -webkit-text-size-adjust:100%}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 .4em}
h2{font-size:1.2rem;margin:2.2em 0 .5em}
h3{font-size:1rem;margin:1.4em 0 .4em}
p{margin:.5em 0;max-width:46em}
small,.small{font-size:.85rem;color:var(--grey)}
code{font:.92em ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace}
a{color:var(--blue)}
summary{cursor:pointer;color:var(--blue);margin:.6em 0}
:focus-visible{outline:3px solid var(--blue);outline-offset:1px}
.scroll{overflow-x:auto;margin:.6em 0}
table{border-collapse:collapse;font-size:.92rem;overflow-wrap:normal}
td code{overflow-wrap:anywhere}
th{text-align:left;font-weight:600;color:var(--grey);border-bottom:2px solid var(--rule)}
th,td{padding:.32em .7em .32em 0;vertical-align:top}
td{border-bottom:1px solid var(--rule)}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.tokens{line-height:1;margin:.6em 0}
.t{display:inline-block;vertical-align:top;margin:0 1px 7px 0;padding:0;border:1px solid var(--rule);
  border-radius:4px;background:var(--paper);color:var(--ink);font:inherit;font-size:.9rem;
  line-height:1.4;text-align:center;max-width:100%;white-space:pre-wrap}
.t.sp{margin-left:6px}
.t b,.t i{display:block;font-weight:400;font-style:normal;padding:0 4px;min-width:1.1em}
.t i{font-size:.8rem;color:var(--faint);border-top:1px solid transparent}
.t.c{border-color:var(--vermilion);background:var(--tint)}
.t.c i{color:var(--vermilion);font-weight:700;text-decoration:underline;text-underline-offset:2px}
.t.m b{color:var(--grey)}
.t.m{border-style:dashed;border-color:var(--faint)}
.t.m i{color:var(--ink);font-weight:700;--h:color-mix(in srgb,var(--faint) 45%,transparent)}
.t.r1 i{background:repeating-linear-gradient(45deg,var(--h) 0 1px,transparent 1px 5px)}
.t.r2 i{background:radial-gradient(var(--h) 1px,transparent 1.3px) 0 0/5px 5px}
.t.r3 i{background:repeating-linear-gradient(90deg,var(--h) 0 1px,transparent 1px 5px)}
.t.r4 i{background:repeating-linear-gradient(0deg,var(--h) 0 1px,transparent 1px 5px)}
.t.r5 i{background:repeating-linear-gradient(-45deg,var(--h) 0 1px,transparent 1px 5px)}
.t.next{opacity:.75}
.legend{list-style:none;padding:0;margin:.6em 0;display:grid;grid-template-columns:repeat(auto-fit,
  minmax(min(100%,21rem),1fr));gap:.1em 1.6em;font-size:.88rem;color:var(--grey)}
.legend li{display:flex;gap:.6em;align-items:flex-start}
.legend .t{flex:none;font-size:.8rem}
.legend small{white-space:nowrap}
"""
