"""The label algorithm restated in the plainest way: slow, one block at a time, in float64.

It is written from the numbered behaviours of the method ("Who's Harry Potter?", arXiv 2310.02238, and its
reference code), not from `whp_fast`, so that the tests can compare the two. The letters b to l are the names
of those behaviours:

    b  cleaning: "Orrin's" goes if "Orrin" is a key; "Orrin Vale" goes if "Orrin" and "Vale" are both keys
    c  matching
    d  which key wins
    e  choice of value
    g  different token counts: the inside of a match maps to nothing, its end to the end of the value
    i  second and later occurrence: the token before the match maps to nothing
    j  forbidden tokens: once a value was introduced, the first token of each form of it gets the row's mean
    k  offset = relu(reinforced(original) - base(translated)), with the logits after rule j
    l  label = argmax(base(translated) - alpha * offset), the lowest index on ties

Both rule sets are here: `translate_by_tokens` (the reference rules) and `translate_by_text` (the rules of
this project). `drop` names rules to leave out: with it the tests show that each rule changes some label.
"""

import itertools
import unicodedata
from dataclasses import dataclass, field

import numpy as np
import torch

IGNORE_INDEX = -100


class Unspecified(Exception):
    """The text around a match is no valid UTF-8, so its new tokens are not defined by the rules."""


@dataclass
class Translation:
    """A translated block."""

    tokens: list[int] = field(default_factory=list)
    index_map: list[int] = field(default_factory=list)  # original index -> translated index or -1
    # (translated index where a value is introduced, first tokens of its two forms)
    forbidden: list[tuple[int, list[int]]] = field(default_factory=list)


def possible_labels(block, anchors, base, reinforced, tokenizer, alpha=5.0, reference_rules=False, drop=()):
    """Every label array the rules allow, one for each choice of values: a list of (labels, close).

    `labels` is int64 [T]; `close` is bool [T], true where the two best logits differ by less than float32 can
    tell apart.
    """
    block = [int(token) for token in block]
    if not block:
        return [(np.zeros(0, np.int64), np.zeros(0, bool))]
    entries = clean(anchors)
    if reference_rules:
        slots, translate = reference_slots(entries, tokenizer), translate_by_tokens
    else:
        slots, translate = {(key,): values for key, values in entries.items()}, translate_by_text
    used = used_slots(block, slots, entries, tokenizer, translate, drop)
    results = []
    for values in itertools.product(*(slots[slot] for slot in used)):
        choice = {slot: slots[slot][0] for slot in slots} | dict(zip(used, values, strict=True))
        translation = translate(block, entries, choice, tokenizer, drop)
        results.append(labels_of(block, translation, base, reinforced, alpha, reference_rules, drop))
    return results


# ------------------------------------------------------------------------------------------------- dictionary


def clean(anchors):
    """Stripped key -> list of stripped values, in dictionary order, after rule b."""
    entries = {}
    for key, values in anchors.items():
        if key.endswith("'s") and key[:-2] in anchors:
            continue
        words = key.split()
        if len(words) > 1 and all(word in anchors for word in words):
            continue
        values = [values] if isinstance(values, str) else values
        entries[key.strip()] = [
            value.strip() for value in values
        ]  # a later equal key keeps the place of the first
    return entries


def variants(tokenizer, text):
    """The tokens of an expression (after a space or at the start of a text, directly after a newline)."""
    if tokenizer.kind == "sentencepiece":
        return tokenizer.encode(text), tokenizer.encode_inside(text)
    return tokenizer.encode(" " + text), tokenizer.encode_inside(text)


def first_tokens(tokenizer, value):
    return [tokens[0] for tokens in variants(tokenizer, value)]


def reference_slots(entries, tokenizer):
    """What draws a value of its own under the reference rules: each (key, variant)."""
    return {(key, variant): values for key, values in entries.items() for variant in (0, 1)}


def used_slots(block, slots, entries, tokenizer, translate, drop):
    """The slots whose value plays a part in the block; which ones does not depend on the values chosen."""
    used = []

    class Choice(dict):
        def __getitem__(self, slot):
            if slot not in used:
                used.append(slot)
            return slots[slot][0]

    translate(block, entries, Choice(), tokenizer, drop)
    return used


# -------------------------------------------------------------------------------------------- reference rules


def translate_by_tokens(block, entries, choice, tokenizer, drop=()):
    """Translates a block under the reference rules; `choice` gives the value of each (key, variant)."""
    index = {}  # first token -> {tokens of a key: (key, variant)}
    for key in entries:
        for variant, tokens in enumerate(variants(tokenizer, key)):
            index.setdefault(tokens[0], {})[tuple(tokens)] = (key, variant)

    result = Translation()
    matched_before = set()
    position = 0
    while position < len(block):
        candidates = [
            (tokens, slot)
            for tokens, slot in index.get(block[position], {}).items()
            if tuple(block[position : position + len(tokens)]) == tokens
        ]
        if "first key" in drop:
            candidates.sort(key=lambda candidate: -len(candidate[0]))
        if not candidates:
            result.index_map.append(len(result.tokens))
            result.tokens.append(block[position])
            position += 1
            continue
        key_tokens, (key, variant) = candidates[0]
        value = choice[key, variant]
        value_tokens = variants(tokenizer, value)[variant]
        if key in matched_before and position > 0 and "i" not in drop:
            result.index_map[-1] = -1
        matched_before.add(key)
        start = len(result.tokens)
        end = start if "g" in drop else start + len(value_tokens) - 1
        result.index_map += [-1] * (len(key_tokens) - 1) + [end]
        result.forbidden.append((start, first_tokens(tokenizer, value)))
        result.tokens += value_tokens
        position += len(key_tokens)
    return result


# --------------------------------------------------------------------------------------- rules of the project


def translate_by_text(block, entries, choice, tokenizer, drop=()):
    """Translates a block under the rules of the project; `choice` gives the value of each (key,)."""
    pieces = [tokenizer.token_bytes(token) for token in block]
    ends = list(itertools.accumulate(len(piece) for piece in pieces))
    starts = [0, *ends[:-1]]
    text = b"".join(pieces)
    matches = find_matches(text, list(entries), drop)

    def touching(start, end):
        return [i for i in range(len(block)) if starts[i] < end and ends[i] > start]

    # A segment is a run of tokens that is tokenised anew: the tokens that touch a match, joined where matches
    # share a token.
    segments = []  # [first token, last token, matches]
    for match in matches:
        tokens = touching(match[0], match[1])
        if segments and segments[-1][1] >= tokens[0]:
            segments[-1][1] = max(segments[-1][1], tokens[-1])
            segments[-1][2].append(match)
        else:
            segments.append([tokens[0], tokens[-1], [match]])

    tokens, values = [], []  # values: (match, start of the value, end of the value) in the translated text
    position = new_length = 0
    for first, last, segment_matches in segments:
        tokens += block[position:first]
        new_length += starts[first] - starts[position]
        new_text = b""
        cursor = starts[first]
        for match in segment_matches:
            start, end, key = match
            value = choice[key,].encode()
            new_text += text[cursor:start]
            values.append((match, new_length + len(new_text), new_length + len(new_text) + len(value)))
            new_text += value
            cursor = end
        new_text += text[cursor : ends[last]]
        new_tokens = tokenise_inside(tokenizer, new_text)
        assert b"".join(map(tokenizer.token_bytes, new_tokens)) == new_text
        tokens += new_tokens
        new_length += len(new_text)
        position = last + 1
    tokens += block[position:]

    new_ends = list(itertools.accumulate(len(tokenizer.token_bytes(token)) for token in tokens))
    new_starts = [0, *new_ends[:-1]]
    result = Translation(tokens)
    for end in ends:
        boundary = corresponding_boundary(end, values, drop)
        result.index_map.append(new_ends.index(boundary) if boundary in new_ends else -1)
    matched_before = set()
    for (start, end, key), value_start, value_end in values:
        first = touching(start, end)[0]
        if key in matched_before and first > 0 and "i" not in drop:
            result.index_map[first - 1] = -1
        matched_before.add(key)
        introduced = next(
            i for i in range(len(tokens)) if new_starts[i] < value_end and new_ends[i] > value_start
        )
        result.forbidden.append((introduced, first_tokens(tokenizer, choice[key,])))
    return result


def find_matches(text, keys, drop=()):
    """The matches (start, end, key) in bytes: leftmost-longest among the valid ones, one after the other."""
    matches = []
    cursor = 0
    while cursor < len(text):
        here = [
            key for key in keys if text.startswith(key.encode(), cursor) and is_valid(text, cursor, key, drop)
        ]
        if not here:
            cursor += 1
            continue
        key = here[0] if "longest" in drop else max(here, key=lambda key: len(key.encode()))
        matches.append((cursor, cursor + len(key.encode()), key))
        cursor += len(key.encode())
    return matches


def is_valid(text, start, key, drop=()):
    """Whether a match stands at word boundaries."""
    if "word boundary" in drop:
        return True
    # Stray bytes, such as special tokens and parts of characters cut by the block, become characters that are
    # no word characters.
    before = text[:start].decode("utf-8", "surrogateescape")
    after = text[start + len(key.encode()) :].decode("utf-8", "surrogateescape")
    glued_before = is_word(key[0]) and before != "" and is_word(before[-1])
    glued_after = is_word(key[-1]) and after != "" and is_word(after[0])
    return not glued_before and not glued_after


def is_word(character):
    """Letters, digits, marks and the underscore, in scripts that put spaces between words."""
    if unicodedata.name(character, "").split(" ")[0] in ("CJK", "HANGUL", "HIRAGANA", "KATAKANA", "THAI"):
        return False
    return unicodedata.category(character)[0] in "LNM" or character == "_"


def tokenise_inside(tokenizer, new_text):
    try:
        text = new_text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unspecified from error
    if tokenizer.kind == "sentencepiece" and text.startswith(" "):
        return tokenizer.encode(text[1:])  # the prefix space plays the space
    return tokenizer.encode_inside(text)


def corresponding_boundary(boundary, values, drop=()):
    """The boundary of the translated text for one of the original text, or None inside a match."""
    shift = 0
    for (start, end, _), value_start, value_end in values:
        if boundary == end:
            return value_start if "g" in drop else value_end
        if boundary == start:
            return value_start
        if start < boundary < end:
            return None
        if end < boundary:
            shift = value_end - end
    return boundary + shift


# ----------------------------------------------------------------------------------------------------- labels


def labels_of(block, translation, base, reinforced, alpha, reference_rules, drop=()):
    """(labels, close) of a translated block: rules j, k and l."""
    base_rows = logits(base, translation.tokens)
    reinforced_rows = logits(reinforced, block)
    labels = np.full(len(block), IGNORE_INDEX, np.int64)
    close = np.zeros(len(block), bool)
    last = len(block) - 1 if reference_rules else len(block)
    for i in range(last):
        j = translation.index_map[i]
        if j == -1:
            continue
        row = base_rows[j].copy()
        mean = row.mean()
        for introduced, tokens in translation.forbidden:
            if (introduced < j or (introduced == j and "strictly after" in drop)) and "j" not in drop:
                row[tokens] = mean
        compared = base_rows[j] if "offset after j" in drop else row
        scores = row - alpha * np.maximum(reinforced_rows[i] - compared, 0.0)
        labels[i] = int(np.flatnonzero(scores == scores.max())[0])
        lower = scores[scores < scores.max()]
        close[i] = lower.size > 0 and scores.max() - lower.max() < 1e-4
    return labels, close


def logits(model, tokens):
    """Logits of one sequence, float64 [T, V]."""
    return model(torch.tensor([tokens], dtype=torch.int64))[0].double().numpy()
