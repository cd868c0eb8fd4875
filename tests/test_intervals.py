"""Intervals: known values, what they must always hold, and what a paired change sees."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whp_fast import intervals
from whp_fast.evaluate import EvaluationResult


@pytest.mark.parametrize(("mean", "count"), [(0.0, 100), (1.0, 10), (0.5, 10), (0.3, 50), (0.034, 1000)])
def test_wilson_by_its_definition(mean, count):
    ends = intervals.wilson(mean, count)
    for end in ends:  # the means that are 1.96 of their own standard errors away from what was seen
        if not math.isclose(end, mean, abs_tol=1e-12):
            assert abs(mean - end) / math.sqrt(end * (1 - end) / count) == pytest.approx(1.959964)
    assert (ends[0] == mean) == (mean == 0.0) and (ends[1] == mean) == (mean == 1.0)


@given(st.floats(0, 1), st.integers(1, 10**6))
def test_an_interval_holds_its_mean_and_is_never_empty(mean, count):
    low, high = intervals.wilson(mean, count)
    assert 0 <= low <= mean <= high <= 1 and high > low


def test_nothing_measured_has_no_interval():
    assert intervals.wilson(None, 10) is None
    assert intervals.wilson(0.5, 0) is None
    assert intervals.wilson(float("nan"), 10) is None


def test_scores_between_0_and_1_are_covered():
    rng, held = random.Random(0), 0
    for _ in range(400):  # scores of 0, 0.2 and 1 with mean 0.34
        scores = rng.choices((0.0, 0.2, 1.0), (0.5, 0.2, 0.3), k=60)
        low, high = intervals.wilson(sum(scores) / 60, 60)
        held += low <= 0.34 <= high
    assert 0.93 <= held / 400 <= 1


def test_figures_rest_on_their_own_counts():
    counts = {
        "familiarity_prompts": 40,
        "probability_prompts": 30,
        "choice_questions": 8,
        "cloze_questions": 2,
    }
    result = EvaluationResult(0.5, 0.25, 0.5, 9.0, counts=counts)
    assert intervals.of_result(result) == {
        "familiarity_completion": intervals.wilson(0.5, 40),
        "familiarity_probability": intervals.wilson(0.25, 30),
        "general_accuracy": intervals.wilson(0.5, 10),
        "general_perplexity": None,
    }
    assert intervals.prompts(result, 20)["familiarity_completion"] == 20
    assert intervals.prompts(result, 20)["general_accuracy"] == 10
    assert intervals.of_result(EvaluationResult(0.5))["familiarity_completion"] is None


def test_an_interval_that_came_with_the_figure_goes_first_unless_it_has_no_width():
    counts = {"familiarity_prompts": 40, "choice_questions": 10}
    given = {
        "familiarity_completion": [0.0, 0.0],
        "general_accuracy": [0.2, 0.8],
        "general_perplexity": [8.5, 9.5],
    }
    found = intervals.of_result(EvaluationResult(0.0, None, 0.5, 9.0, counts=counts, intervals=given))
    assert found["general_accuracy"] == (0.2, 0.8) and found["general_perplexity"] == (8.5, 9.5)
    assert found["familiarity_completion"] == intervals.wilson(0.0, 40)
    assert found["familiarity_probability"] is None


def test_a_paired_change_counts_what_turned():
    before = [True] * 90 + [False] * 10
    change, low, high = intervals.paired_change(before, [True] * 85 + [False] * 15)
    assert change == pytest.approx(-0.05)
    assert low < -0.05 < high < 0.01  # five turned wrong, none right
    assert (low, high) == pytest.approx((-0.095116, -0.002923), abs=1e-6)
    mixed = [not answer for answer in before[:10]] + before[10:90] + [True] * 5 + [False] * 5
    wider = intervals.paired_change(before, mixed)
    assert wider[0] == pytest.approx(-0.05) and wider[2] - wider[1] > 1.5 * (high - low)
    _, low, high = intervals.paired_change(before, before)
    assert low < 0 < high
    assert intervals.paired_change([], []) is None and intervals.paired_change([True], []) is None
