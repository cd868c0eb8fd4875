"""Go through a dictionary in the terminal: keep, drop or edit entries, with counts and example sentences."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.markup import escape

from whp_fast.anchors import load_dictionary
from whp_fast.errors import UserError
from whp_fast.extraction.proposal import Proposal, read_list, write

HELP = (
    "[Enter] keep   d drop   e edit counterparts   b back   a keep all others of this kind   q save and stop"
)
EXAMPLES, _AROUND = 3, 90


def review(
    anchors: Path, documents: Sequence[str], ask: Callable[[str], str], say: Callable[[str], None]
) -> dict[str, int]:
    """Review the entries that were not reviewed yet; what is decided is saved after each.

    Args:
        anchors: the dictionary; its list is made if there is none.
        documents: the corpus, for counts and examples; may be empty.
        ask: gives the answer to a prompt, EOFError when there is none.
        say: prints a line of rich markup.

    Returns:
        Numbers of entries "kept", "dropped", "edited" and "left".
    """
    entries = load_dictionary(anchors).entries
    listed = read_list(anchors)
    texts = [" ".join(document.split()) for document in documents]
    proposals = [p for p in listed.values() if p.expression in entries or p.reviewed == "dropped"]
    known = {p.expression for p in proposals}
    proposals += [Proposal(e, _count(e, texts), "", v) for e, v in entries.items() if e not in known]
    for proposal in proposals:
        if proposal.reviewed != "dropped":
            proposal.counterparts = list(entries[proposal.expression])
    proposals.sort(key=lambda p: p.kind)  # stable: within a kind the order of the list
    say(HELP)
    i = 0
    while i < len(proposals):
        if proposals[i].reviewed:
            i += 1
            continue
        _show(proposals[i], i, len(proposals), texts, say)
        try:
            answer = ask("> ").strip().lower()
        except EOFError:
            break
        if answer == "q":
            break
        i = _decide(answer, proposals, i, ask, say)
        write(anchors, proposals)
    if all(p.reviewed == "dropped" for p in proposals):
        say("every entry is dropped; a dictionary needs at least one")
    counts = {name: sum(p.reviewed == name for p in proposals) for name in ("kept", "dropped", "edited")}
    return counts | {"left": sum(not p.reviewed for p in proposals)}


def examples(expression: str, texts: Sequence[str], n: int = EXAMPLES) -> list[tuple[str, str, str]]:
    """Up to ``n`` places of an expression, evenly spread: (before, expression, after)."""
    pattern = re.compile(rf"(?<!\w){re.escape(expression)}(?!\w)")
    found = [(text, m.start(), m.end()) for text in texts for m in pattern.finditer(text)]
    chosen = found if len(found) <= n else [found[k * len(found) // n] for k in range(n)]
    return [(t[max(0, a - _AROUND) : a], t[a:b], t[b : b + _AROUND]) for t, a, b in chosen]


def _count(expression: str, texts: Sequence[str]) -> int:
    return sum(len(re.findall(rf"(?<!\w){re.escape(expression)}(?!\w)", text)) for text in texts)


def _show(proposal: Proposal, i: int, total: int, texts: Sequence[str], say) -> None:
    rise = "" if proposal.rise is None else f", rise {proposal.rise:.2f} nats"
    say(
        f"\n{i + 1}/{total}  [bold]{escape(proposal.expression)}[/bold]  {proposal.count} times, "
        f"{proposal.kind or 'no kind'}{rise}  → {escape(', '.join(proposal.counterparts))}"
    )
    for before, found, after in examples(proposal.expression, texts):
        say(f"    …{escape(before)}[bold]{escape(found)}[/bold]{escape(after)}…")


def _decide(answer: str, proposals: list[Proposal], i: int, ask, say) -> int:
    """Apply an answer to entry ``i``; returns the entry to look at next."""
    proposal = proposals[i]
    if answer in ("", "k"):
        proposal.reviewed = "kept"
    elif answer == "d":
        proposal.reviewed = "dropped"
    elif answer == "e":
        values = [v.strip() for v in ask("counterparts, separated by ; > ").split(";") if v.strip()]
        try:
            load_dictionary({proposal.expression: values})
        except UserError as error:
            say(f"not taken: {escape(str(error))}")
            return i
        proposal.counterparts, proposal.reviewed = list(dict.fromkeys(values)), "edited"
    elif answer == "a":
        for other in proposals[i:]:
            if other.kind == proposal.kind and not other.reviewed:
                other.reviewed = "kept"
    elif answer == "b":
        back = max((k for k in range(i) if proposals[k].reviewed), default=i)
        proposals[back].reviewed = ""
        return back
    else:
        say(HELP)
    return i
