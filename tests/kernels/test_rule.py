"""Rules, combinations and edits: what is asked for is what is kept, and what makes no sense is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from whp_kernels.losses.combination import (
    SELF,
    Identity,
    Offset,
    RelativeTop,
    RowEdits,
    StudentOffset,
    Whp,
)
from whp_kernels.losses.rule import DIVERGENCES, SOFT, Rule, decode

NAN = math.nan
IGNORE = -100


def edits_of(lists, kind, value=0.0):
    lengths = torch.tensor([0, *map(len, lists)])
    return RowEdits(lengths.cumsum(0), torch.tensor(sum(lists, []), dtype=torch.int64), kind, value)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((None, None, "kl"), {}, "'kl'.*forward_kl"),
        ((Identity(), None, "hard"), dict(temperature=2.0), "temperature has no meaning"),
        ((None, None, "label"), dict(temperature=0.5), "temperature has no meaning"),
        ((Identity(), None, "forward_kl"), dict(temperature=0.0), "temperature is 0"),
        ((Identity(), None, "forward_kl"), dict(temperature=-1.0), "temperature is -1"),
        ((Identity(), None, "forward_kl"), dict(temperature=NAN), "temperature is nan"),
        ((Identity(), None, "jsd"), dict(beta=-0.1), "beta is -0.1"),
        ((Identity(), None, "jsd"), dict(beta=1.1), "beta is 1.1"),
        ((Identity(), None, "jsd"), dict(beta=NAN), "beta is nan"),
        ((None, None, "label"), dict(softcap=0.0), "softcap is 0"),
        ((None, None, "label"), dict(softcap=-30.0), "softcap is -30"),
        ((None, None, "label"), dict(softcap=NAN), "softcap is nan"),
        ((None, edits_of([[0]], "ban"), "label"), {}, "no teachers"),
        ((Identity(), None, "label"), {}, "divergence='label'"),
        ((Whp(5.0), None, "label"), {}, "divergence='label'"),
        ((StudentOffset(), None, "hard"), {}, "StudentOffset"),
        ((StudentOffset(), None, "forward_kl"), {}, "StudentOffset"),
        ((StudentOffset(), edits_of([[0]], "ban"), "label"), {}, "row_edits and StudentOffset"),
    ],
)
def test_rules_that_make_no_sense_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        Rule.of(*arguments, **options)


def test_combinations_that_make_no_sense_are_refused():
    for fraction in (0.0, -0.1, 1.5, NAN):
        with pytest.raises(ValueError, match="fraction"):
            RelativeTop(fraction)
    with pytest.raises(ValueError, match="'keep' or 'mask'"):
        RelativeTop(0.1, "drop")
    with pytest.raises(ValueError, match="change nothing"):
        Identity(RelativeTop(0.1))
    assert Identity(RelativeTop(0.1, "mask")).relative_top.fraction == 0.1 and repr(SELF) == "SELF"


def test_a_rule_says_what_was_asked_for():
    edits = edits_of([[0]], "add", -10.0)
    rule = Rule.of(
        Offset(-0.8, RelativeTop(0.2, "mask")), edits, "jsd", beta=0.3, temperature=2.0, softcap=30.0
    )
    assert rule == Rule("offset", -0.8, 0.2, "mask", "add", -10.0, "jsd", 0.3, 2.0, 30.0)
    assert Rule.of(Whp(), None, "hard") == Rule("whp", 5.0, divergence="hard")
    assert Rule.of(StudentOffset(0.5), None, "label") == Rule("student_offset", 0.5)
    assert Rule.of(Identity(), None, "forward_kl") == Rule("identity", divergence="forward_kl")
    assert Rule.of(None, None, "label") == Rule()
    assert Rule.of(Identity(), None, "jsd", beta=0).divergence == "forward_kl"
    assert Rule.of(Identity(), None, "jsd", beta=1.0).divergence == "reverse_kl"
    assert [d for d in DIVERGENCES if Rule(divergence=d).soft] == list(SOFT)


@given(
    st.builds(
        Rule,
        combination=st.sampled_from(["none", "identity", "whp", "offset", "student_offset"]),
        weight=st.floats(allow_nan=False),
        relative_top=st.floats(0, 1),
        outside=st.sampled_from(["keep", "mask"]),
        edit=st.sampled_from(["none", "add", "ban", "mean"]),
        edit_value=st.floats(allow_nan=False),
        divergence=st.sampled_from(DIVERGENCES),
        beta=st.floats(0, 1),
        temperature=st.floats(1e-300, 1e300),
        softcap=st.floats(0, 1e300),
    )
)
def test_a_rule_survives_its_string(rule):
    assert decode(rule.encode()) == rule
    assert decode(rule.encode()).encode() == rule.encode()


@pytest.mark.parametrize(
    "offsets, tokens, kind, message",
    [
        ([0, 1], [0], "drop", "'drop'"),
        ([[0, 1]], [0], "ban", "expected offsets"),
        ([0, 1], [[0]], "ban", "expected offsets"),
        ([], [], "ban", "expected offsets"),
        ([1, 1], [0], "ban", "rise from 0"),
        ([0, 2], [0], "ban", "number of tokens .1."),
        ([0, 1], [0, 1], "ban", "number of tokens .2."),
        ([0, 2, 1, 3], [0, 1, 2], "ban", "rise"),
        ([0, 2], [4, -1], "ban", "-1 is negative"),
    ],
)
def test_edits_that_make_no_sense_are_refused(offsets, tokens, kind, message):
    with pytest.raises(ValueError, match=message):
        RowEdits(torch.tensor(offsets, dtype=torch.int64), torch.tensor(tokens, dtype=torch.int64), kind)


@given(st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=5))
def test_edited_tokens_are_sorted_within_their_rows(lists):
    edits = edits_of(lists, "add", 1)
    assert edits.tokens.tolist() == sum((sorted(tokens) for tokens in lists), [])
    assert len(edits) == len(lists) and edits.tokens.is_contiguous() and edits.value == 1.0
    assert edits.offsets.dtype == edits.tokens.dtype == torch.int64


def test_edits_at_labels_leave_ignored_rows_alone():
    labels = torch.tensor([[3, IGNORE, 0], [7, 7, IGNORE]])
    edits = RowEdits.at_labels(labels, "add", -10.0)
    assert edits.offsets.tolist() == [0, 1, 1, 2, 3, 4, 4] and edits.tokens.tolist() == [3, 0, 7, 7]
    assert (edits.kind, edits.value, len(edits)) == ("add", -10.0, 6)
    edits = RowEdits.at_labels(labels, "ban", shift_labels=True)  # row t holds labels[t + 1]
    assert edits.offsets.tolist() == [0, 0, 1, 1, 2, 2, 2] and edits.tokens.tolist() == [0, 7]
    edits = RowEdits.at_labels(labels.clamp(min=0), "ban", ignore_index=0)
    assert edits.offsets.tolist() == [0, 1, 1, 1, 2, 3, 3] and edits.tokens.tolist() == [3, 7, 7]
    with pytest.raises(ValueError, match="-100 is negative"):
        RowEdits.at_labels(labels, "ban", ignore_index=-1)
    assert len(RowEdits.at_labels(torch.full((4,), IGNORE), "ban").tokens) == 0
