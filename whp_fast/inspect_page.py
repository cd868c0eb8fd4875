"""The page of ``python -m whp_fast.inspect --html``: a block, its labels, and tables for a token in focus."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from whp_fast.page import data_block, document, escaped, legend, shown_token, token_boxes, why

if TYPE_CHECKING:
    from whp_fast.inspect import BlockView


def write_page(file: Path, view: BlockView) -> Path:
    """Write one self-contained HTML page; returns its path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(view), encoding="utf-8")
    return file


def page(view: BlockView) -> str:
    """The page as text."""
    taught = [e for e in view.entries if e["label"] is not None]
    changed = len(view.changed)
    sentence = (
        f"{len(taught)} of the block’s {view.positions} positions have a label; {changed} of these are "
        "another token than the text’s own. A label stands under the token whose place it takes."
    )
    if view.disagreeing:
        sentence += (
            f" {view.disagreeing} labels came out otherwise when they were made again for this page: the "
            "models of the run, or their rounding, have changed."
        )
    elif view.disagreeing == 0:
        sentence += " Made again for this page, every label came out as the run has it."
    hint = (
        "Point at a token, or reach the text with Tab and go on with the arrow keys; a click keeps a token "
        "in view, Esc lets it go."
    )
    if view.tables:
        hint += " Underlined labels show what both models and their combination expected."
    body = (
        f"<header><h1>Block {view.number} <small>of 0 to {view.n_blocks - 1}, strength "
        f"α = {view.alpha:g}, {escaped(view.run)}</small></h1><p>{sentence}</p></header>"
        f'<main><section aria-label="The block">{legend(view.entries)}'
        f'<p class="small">{hint}</p>'
        f"{token_boxes(view.entries, buttons=True)}{_translation(view)}</section>"
        '<aside id="detail" aria-live="polite" aria-label="The token in focus">'
        '<p class="small">No token chosen yet.</p></aside></main>'
        f"{data_block('data', _data(view))}"
    )
    return document(f"Block {view.number} of {view.run}", body, style=_STYLE, script=_SCRIPT)


def _data(view: BlockView) -> dict:
    """What the script shows: words of each token, and tables of ``[token, logit, probability, edited]``."""
    tokens = []
    for entry in view.entries:
        if entry["label"] is None:
            told = why(entry["reason"])
        elif entry["label_id"] == entry["id"]:
            told = "The text’s own token is taught."
        else:
            told = f"Taught in its place: “{shown_token(entry['label'])}”."
        if entry.get("next"):
            told += " It is the first token of the next block; this block’s last label takes its place."
        own = entry["own"]
        tokens.append([shown_token(entry["token"]), told, None if own is None else shown_token(own)])
    tables = {
        n: [
            [
                [shown_token(r["token"]), round(r["logit"], 3), round(r["probability"], 5), int(r["edited"])]
                for r in rows
            ]
            for rows in tables.values()
        ]
        for n, tables in view.tables.items()
    }
    return {"tokens": tokens, "tables": tables}


def _translation(view: BlockView) -> str:
    words = "".join(
        f"<mark>{escaped(token)}</mark>" if begins else escaped(token) for token, begins in view.translated
    )
    return (
        "<details><summary>What the base model read instead</summary>"
        '<p class="small">The translated block. Marked: the first token of each counterpart.</p>'
        f'<p class="translated">{words}</p></details>'
    )


_STYLE = """
header{padding:1.2rem clamp(.8rem,3vw,2.5rem) 0}
h1 small{font-weight:400;display:inline-block}
main{display:grid;grid-template-columns:minmax(0,1fr) 25rem;gap:2rem;padding:0 clamp(.8rem,3vw,
  2.5rem) 2rem}
#detail{position:sticky;top:1rem;align-self:start;max-height:calc(100vh - 2rem);overflow-y:auto;
  background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:.8rem 1rem}
#detail h2{margin:0 0 .3em;font-size:1.1rem}
#detail h3{margin:.9em 0 .2em;font-size:.88rem;color:var(--grey)}
#detail table{width:100%;font-size:.86rem}
#detail td{padding:.15em .4em .15em 0}
#detail p{margin:.3em 0;font-size:.92rem}
#detail td:first-child{font-weight:600}
#detail tr{background:linear-gradient(var(--blue),var(--blue)) 0 100%/var(--p) 3px no-repeat}
.t{cursor:pointer}
.t[aria-current]{outline:3px solid var(--blue);outline-offset:1px}
mark{background:var(--tint);color:var(--vermilion);font-weight:700;text-decoration:underline}
.translated{white-space:pre-wrap;max-width:60em}
@media(max-width:820px){
main{display:block;padding-bottom:46vh}
#detail{position:fixed;left:0;right:0;bottom:0;top:auto;max-height:44vh;border-radius:10px 10px 0 0;
  border-width:1px 0 0;box-shadow:0 -3px 14px #0003;padding:.6rem .9rem}
#detail .three{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:.7rem}
#detail h3{font-size:.78rem;margin-top:.5em}
#detail .three table{font-size:.78rem}
#detail tbody,#detail .three table{display:block}
#detail .logit{display:none}
#detail tr{display:flex;flex-wrap:wrap;justify-content:space-between;padding-bottom:2px}
#detail td{padding:.1em 0;border:0}
.t{font-size:.95rem;scroll-margin-bottom:46vh}}
@media print{
#detail{display:none}
main{display:block}}
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const detail = document.getElementById("detail");
const tokens = [...document.querySelectorAll("main section .tokens .t")];
const names = ["Base, on the translation", "Reinforced, on the text", "Combined: what is taught"];
let current = -1, fixed = false;

function add(parent, tag, text, kind) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  parent.append(element);
  return element;
}

function show(n) {
  if (n === current) return;
  if (current >= 0) { tokens[current].removeAttribute("aria-current"); tokens[current].tabIndex = -1; }
  current = n;
  tokens[n].setAttribute("aria-current", "true");
  tokens[n].tabIndex = 0;
  const [token, told, own] = data.tokens[n];
  detail.textContent = "";
  add(detail, "h2", `Token ${n}: ${token}`);
  add(detail, "p", told);
  if (own !== null) add(detail, "p", `The base alone, before the offset: “${own}”.`, "small");
  const tables = data.tables[n];
  if (!tables) return;
  const three = add(detail, "div", undefined, "three");
  let edits = false;
  tables.forEach((rows, i) => {
    const box = add(three, "div");
    add(box, "h3", names[i]);
    const table = add(box, "table");
    for (const [text, logit, probability, edited] of rows) {
      const row = add(table, "tr");
      row.style.setProperty("--p", `${Math.max(0.5, 100 * probability)}%`);
      add(row, "td", text + (edited && i === 0 ? " ✕" : ""));
      add(row, "td", logit.toFixed(2), "n logit");
      add(row, "td", `${(100 * probability).toFixed(1)} %`, "n");
      edits = edits || (edited && i === 0);
    }
  });
  if (edits) add(detail, "p", "✕ set to the row’s mean before combining: its counterpart has been used " +
    "before in this block.", "small");
  else add(detail, "p", "Logit and probability of the likeliest tokens.", "small logit");
}

function below(n, direction) {
  const box = tokens[n].getBoundingClientRect(), middle = box.left + box.width / 2;
  let best = n, line = null, distance = Infinity;
  for (let i = n + direction; i >= 0 && i < tokens.length; i += direction) {
    const other = tokens[i].getBoundingClientRect();
    if (Math.abs(other.top - box.top) < box.height / 2) continue;
    if (line === null) line = other.top;
    if (Math.abs(other.top - line) > box.height / 2) break;
    const away = Math.abs(other.left + other.width / 2 - middle);
    if (away < distance) { distance = away; best = i; }
  }
  return best;
}

tokens.forEach((token, n) => {
  token.tabIndex = n === 0 ? 0 : -1;
  token.addEventListener("focus", () => show(n));
  token.addEventListener("click", () => { fixed = true; show(n); });
  token.addEventListener("pointerenter", event => { if (event.pointerType === "mouse" && !fixed) show(n); });
  token.addEventListener("keydown", event => {
    const to = {ArrowRight: n + 1, ArrowLeft: n - 1, Home: 0, End: tokens.length - 1,
      ArrowDown: () => below(n, 1), ArrowUp: () => below(n, -1)}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = typeof to === "function" ? to() : to;
    if (tokens[next]) tokens[next].focus();
  });
});
document.addEventListener("keydown", event => { if (event.key === "Escape") fixed = false; });
const first = Object.keys(data.tables)[0];
if (first !== undefined && matchMedia("(min-width:821px)").matches) show(Number(first));
"""
