"""Metrics of unlearning: by hand, and beside rouge-score and SciPy."""

import math

import numpy as np
import pytest
import torch
from bigram_model import BigramModel, PieceTokenizer, plain_greedy
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer
from scipy import stats

from whp_fast import scoring
from whp_fast.errors import UserError
from whp_fast.evaluation import metrics
from whp_fast.evaluation.bootstrap import Figure, figure, mean_figure, ratio_figure
from whp_fast.evaluation.forget_quality import (
    forget_truth_ratio,
    harmonic_mean,
    ks_p_value,
    ks_statistic,
    ks_two_sample,
    truth_ratio,
)
from whp_fast.evaluation.memorisation import (
    cut_passages,
    exact_memorisation,
    extraction_strength,
    passage_scores,
)
from whp_fast.evaluation.metrics import Inputs, Measured, Settings, chosen_metrics, compare, measure
from whp_fast.evaluation.privacy import auc, min_k, priv_leak
from whp_fast.evaluation.questions import (
    AnswerScores,
    answer_recalls,
    answer_scores,
    answers_given_away,
    model_utility,
    questions_from,
)
from whp_fast.evaluation.rouge import longest_common_subsequence, rouge_l, words
from whp_fast.prompts import (
    Cloze,
    EvaluationSet,
    FamiliarityPrompt,
    MultipleChoice,
    ProbabilityPrompt,
)


@pytest.fixture(autouse=True)
def without_cache(monkeypatch):
    monkeypatch.setattr(scoring, "greedy", plain_greedy)


# ---- bootstrap -------------------------------------------------------------------------------------------


def test_interval_of_a_mean_beside_scipy():
    values = np.random.default_rng(0).exponential(size=60)
    found = mean_figure(values, resamples=4000)
    expected = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(expected.low, abs=0.02)
    assert found.high == pytest.approx(expected.high, abs=0.02)
    assert found.low < found.value < found.high and found.n == 60


def test_interval_is_reproducible_and_follows_the_seed():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert mean_figure(values) == mean_figure(values)
    assert figure(np.mean, np.arange(50.0), seed=1).low != figure(np.mean, np.arange(50.0), seed=2).low


def test_one_unit_has_no_interval_and_none_is_refused():
    only = mean_figure([0.25])
    assert only.value == 0.25 and math.isnan(only.low) and str(only) == "0.250"
    assert only.to_json() == {"value": 0.25, "low": None, "high": None, "n": 1}
    with pytest.raises(ValueError, match="nothing to draw from"):
        figure(np.mean, [1.0], [])


def test_samples_are_drawn_on_their_own_and_pairs_together():
    ones = np.arange(30.0)
    pairs = np.stack([ones, ones], 1)
    assert figure(lambda p: p[:, 0].mean() - p[:, 1].mean(), pairs).high == 0.0
    assert figure(lambda a, b: a.mean() - b.mean(), ones, ones).high > 1.0


def test_ratio_of_sums_and_draws_that_are_not_defined():
    found = ratio_figure([2.0, 6.0], [1, 3], math.exp)
    assert found.value == pytest.approx(math.exp(2.0)) and found.low == pytest.approx(math.exp(2.0))
    half = ratio_figure([1.0, 0.0], [1, 0])  # draws of the second alone are 0 / 0
    assert (half.value, half.low, half.high) == (1.0, 1.0, 1.0)


def test_shown_figures():
    assert str(Figure(0.5, 0.25, 0.75, 3)) == "0.500 [0.250, 0.750]"
    assert str(Figure(3e-7, 0.0, 123456.0, 3)) == "3.0e-07 [0.000, 1.2e+05]"
    assert str(Figure(math.nan, math.nan, math.nan, 0)) == "–"


# ---- ROUGE-L ---------------------------------------------------------------------------------------------


def test_rouge_by_hand():
    # LCS "the cat mat" of 3; reference 6 words, text 4
    found = rouge_l("The cat sat on the mat.", "the cat, a mat")
    assert (found.precision, found.recall) == (3 / 4, 3 / 6)
    assert found.f1 == pytest.approx(2 * 0.75 * 0.5 / 1.25)
    assert rouge_l("", "a").f1 == rouge_l("a", "!").f1 == rouge_l("a", "b").f1 == 0.0


@given(*[st.lists(st.sampled_from("a b c d it's x-y 12 A_b , .".split()), max_size=14)] * 2)
def test_rouge_as_the_package_has_it(reference, text):
    reference, text = " ".join(reference), " ".join(text)
    expected = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False).score(reference, text)["rougeL"]
    found = rouge_l(reference, text)
    assert (found.precision, found.recall, found.f1) == pytest.approx(
        (expected.precision, expected.recall, expected.fmeasure)
    )


def test_letters_of_all_scripts_count():
    assert words("Élise Žižek naïve") == ["élise", "žižek", "naïve"]
    assert words("魔法学校 ab") == ["魔", "法", "学", "校", "ab"]
    assert rouge_l("Гарри пошёл домой", "гарри пошёл").recall == pytest.approx(2 / 3)


def test_longest_common_subsequence():
    assert longest_common_subsequence("abcbdab", "bdcaba") == 4
    assert longest_common_subsequence("abc", "cba") == 1


# ---- memorisation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "exact", "strength"),
    [
        ([1, 1, 1, 1], 1.0, 1.0),
        ([0, 1, 1, 1], 0.75, 0.75),
        ([1, 1, 0, 1], 0.75, 0.25),
        ([1, 1, 1, 0], 0.75, 0.0),
        ([0, 0], 0.0, 0.0),
    ],
)
def test_exact_memorisation_and_extraction_strength(hits, exact, strength):
    assert exact_memorisation(hits) == exact
    assert extraction_strength(hits) == strength


def test_passages_do_not_overlap_and_are_whole():
    tokenizer = PieceTokenizer(list("abcdefghij"))
    passages = cut_passages(tokenizer, ["abcdefgh", "ij", "jihgf"], prefix=2, continuation=2, count=9)
    spelled = ["".join(tokenizer.pieces[t] for t in p.tokens[1:]) for p in passages]
    assert spelled == ["abcd", "efgh", "jihg"]
    assert all(p.prefix[0] == tokenizer.bos_id and len(p.continuation) == 2 for p in passages)
    assert len(cut_passages(tokenizer, ["abcdefgh"] * 4, prefix=2, continuation=2, count=3)) == 3
    with pytest.raises(UserError, match="no document has the 4 tokens of a passage"):
        cut_passages(tokenizer, ["abc"], prefix=2, continuation=2, count=9)


def story():
    """A model that continues abcdef but for c, after which it prefers x."""
    tokenizer = PieceTokenizer(list("abcdefx"))
    table = {
        "<s>": {"a": 0.5, "x": 0.5},
        "a": {"b": 1.0},
        "b": {"c": 0.9, "x": 0.1},
        "c": {"d": 0.2, "x": 0.8},
    }
    table |= {"d": {"e": 0.6, "x": 0.4}, "e": {"f": 1.0}, "x": {"x": 1.0}}
    return tokenizer, BigramModel(tokenizer, table)


def test_memorisation_of_a_model_by_hand():
    tokenizer, model = story()
    passages = cut_passages(tokenizer, ["abcdef"], prefix=2, continuation=4, count=1)
    (scores,) = passage_scores(model, passages)
    assert scores.hits.tolist() == [True, False, True, True]  # c d e f
    assert np.exp(scores.log_probs) == pytest.approx([0.5, 1.0, 0.9, 0.2, 0.6, 1.0])
    found = measure(
        model,
        tokenizer,
        Inputs(target=["abcdef"], holdout=["aaaaaa", "cdcdcd"]),
        ["verbatim", "exact_memorisation", "extraction_strength", "min_k", "min_k_auc"],
        Settings(prefix_tokens=2, continuation_tokens=4, share=0.34),
    )
    values = {name: figure.value for name, figure in found.figures.items()}
    assert values["exact_memorisation"] == 0.75 and values["extraction_strength"] == 0.5
    assert values["min_k"] == pytest.approx((math.log(0.2) + math.log(0.5)) / 2)
    assert values["min_k_auc"] == 0.0  # both others are less likely than the target
    assert found.details["passages"] == [
        {"prefix": "ab", "continuation": "cdef", "given": "cxxx", "rouge_l": 0.0}  # one word each
    ]


# ---- privacy ---------------------------------------------------------------------------------------------


def test_min_k_by_hand():
    assert min_k([-1.0, -4.0, -2.0, -3.0, -0.5], 0.4) == -3.5
    assert min_k([-1.0, -4.0], 0.2) == -4.0  # at least one


def test_auc_by_hand_and_as_scipy_counts():
    assert auc([1, 2], [3, 4]) == 1.0 and auc([3], [1]) == 0.0
    assert auc([1, 2], [2, 3]) == (1 + 1 + 0.5 + 1) / 4
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 9, 40), rng.integers(2, 9, 30)
    # U counts the pairs in which the first is larger
    expected = 1 - stats.mannwhitneyu(one, other).statistic / (40 * 30)
    assert auc(one, other) == pytest.approx(expected)


def test_priv_leak_of_muse():
    # arXiv 2407.06460: a model that knows the target has an AUC near 0 and a PrivLeak near -100
    assert priv_leak(0.0, 0.48) == -100.0
    assert priv_leak(0.48, 0.48) == 0.0
    assert priv_leak(1.0, 0.4) == pytest.approx(150.0)
    assert math.isnan(priv_leak(0.5, 0.0))


# ---- forget quality --------------------------------------------------------------------------------------


def test_ks_by_hand():
    # of the 6 orders of two and two values, 2 keep the samples apart (D = 1), 4 have D of 1/2
    assert ks_statistic([1, 2], [3, 4]) == 1.0
    assert ks_p_value(1.0, 2, 2) == pytest.approx(2 / 6)
    assert ks_p_value(0.5, 2, 2) == pytest.approx(1.0)
    assert ks_two_sample([1.0], [1.0]) == (0.0, 1.0)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 5), (3, 7), (7, 3), (40, 40), (30, 47), (120, 100)])
@pytest.mark.parametrize("shift", [0.0, 0.5, 3.0])
def test_ks_as_scipy_has_it(m, n, shift):
    rng = np.random.default_rng(m * 100 + n)
    one, other = rng.normal(size=m), rng.normal(shift, 1, size=n)
    expected = stats.ks_2samp(one, other, method="exact")
    distance, p = ks_two_sample(one, other)
    assert distance == pytest.approx(expected.statistic)
    assert p == pytest.approx(expected.pvalue, rel=1e-6)


def test_small_p_values_keep_their_digits_and_ties_are_allowed():
    p = ks_p_value(1.0, 100, 100)
    assert p == pytest.approx(2 / math.comb(200, 100), rel=1e-9) and p < 1e-58
    one, other = [1, 1, 2, 2, 3, 3, 3], [2, 2, 3, 3, 4, 4, 4]
    assert ks_two_sample(one, other)[1] == pytest.approx(stats.ks_2samp(one, other, method="exact").pvalue)


def test_large_samples_take_the_limit():
    m, n, distance = 20_000, 15_000, 0.012
    expected = stats.kstwobign.sf(distance * math.sqrt(m * n / (m + n)))
    assert ks_p_value(distance, m, n) == pytest.approx(expected, rel=1e-9)
    assert ks_p_value(1e-5, m, n) == 1.0


def test_truth_ratio_by_hand():
    # wrong answers with 0.2 and 0.05 per token, their geometric mean 0.1; right with 0.4
    assert truth_ratio(math.log(0.4), [math.log(0.2), math.log(0.05)]) == pytest.approx(0.25)
    assert forget_truth_ratio([0.25, 4.0, 1.0]) == pytest.approx((0.25 + 0.25 + 1) / 3)
    assert forget_truth_ratio([0.0]) == 0.0
    assert math.isfinite(truth_ratio(-1e9, [0.0])) and truth_ratio(0.0, [-1e9]) == 0.0


def test_harmonic_mean_beside_scipy():
    values = [0.9, 0.5, 0.25]
    assert harmonic_mean(values) == pytest.approx(stats.hmean(values))
    assert harmonic_mean([0.9, 0.0]) == 0.0


# ---- questions -------------------------------------------------------------------------------------------


def asked():
    tokenizer = PieceTokenizer(["Sky", " is", " blue", " gr", "ey", " red", "!"])
    table = {
        " is": {" blue": 0.5, " gr": 0.4, " red": 0.1},
        " gr": {"ey": 0.1, "!": 0.9},
        " blue": {"!": 1.0},
    }
    return tokenizer, BigramModel(tokenizer, table)


def test_truth_ratio_and_probability_of_a_model_by_hand():
    tokenizer, model = asked()
    (scores,) = answer_scores(model, tokenizer, [MultipleChoice("Sky is", ("grey", "blue", "red"), 1)])
    grey, blue, red = math.sqrt(0.4 * 0.1), 0.5, 0.1  # per token
    assert scores.ratio == pytest.approx(math.sqrt(grey * red) / blue, rel=1e-5)
    assert scores.probability == pytest.approx(blue / (grey + blue + red), rel=1e-5)


def test_recall_of_greedy_answers():
    tokenizer, model = asked()
    questions = [MultipleChoice("Sky is", ("grey", "blue"), 1), Cloze("Sky is", "blue red")]
    assert answer_recalls(model, tokenizer, questions) == [1.0, 0.5]


def test_model_utility_by_hand():
    found = model_utility([AnswerScores(0.5, 0.6), AnswerScores(2.0, 0.4)], [1.0, 0.5])
    assert found.value == pytest.approx(stats.hmean([0.5, 0.25, 0.75])) and found.n == 2


def test_measured_against_the_oracle():
    tokenizer, model = asked()
    questions = [MultipleChoice("Sky is", ("blue", "red"), 0), MultipleChoice("Sky is", ("red", "grey"), 1)]
    inputs = Inputs(EvaluationSet(choices=questions), questions=questions)
    names = chosen_metrics([], inputs, oracle=True)
    assert names == [
        "knowledge_accuracy",
        "truth_ratio",
        "forget_quality",
        "general_accuracy",
        "model_utility",
    ]
    found = measure(model, tokenizer, inputs, names, Settings())
    ratios = [0.1 / 0.5, 0.1 / math.sqrt(0.04)]
    assert found.ratios == pytest.approx(ratios, rel=1e-5)
    assert found.figures["truth_ratio"].value == pytest.approx(forget_truth_ratio(ratios), rel=1e-5)
    other = Measured(ratios=np.array([5.0, 6.0]))
    compare(found, other, names)
    quality = found.figures["forget_quality"]
    assert quality.value == pytest.approx(stats.ks_2samp(ratios, [5.0, 6.0]).pvalue) == 1 / 3
    assert quality.low <= quality.value <= quality.high
    compare(found, found, names)
    assert found.figures["forget_quality"].value == 1.0


def test_the_interval_of_forget_quality_holds_p_values():
    rng = np.random.default_rng(0)
    found, oracle = Measured(ratios=rng.uniform(0.5, 1.5, 40)), Measured(ratios=rng.uniform(0.8, 1.8, 40))
    compare(found, oracle, ["forget_quality"])
    quality, distance = found.figures["forget_quality"], found.details["ks_statistic"]
    assert quality.low < quality.value < quality.high
    assert quality.low == ks_p_value(distance["high"], 40, 40)
    steps = distance["low"] * 40  # an end that occurred: D of 40 and 40 values is a multiple of 1 / 40
    assert steps == pytest.approx(round(steps))


def test_priv_leak_pairs_the_models():
    found = Measured(scores_target=np.array([1.0, 2.0]), scores_holdout=np.array([0.0, 3.0]))
    oracle = Measured(scores_target=np.array([1.0, 0.5]), scores_holdout=np.array([0.0, 3.0]))
    compare(found, oracle, ["priv_leak"])
    assert found.figures["priv_leak"].value == 0.0
    known = Measured(scores_target=np.array([5.0, 6.0]), scores_holdout=np.array([0.0, 3.0]))
    compare(known, oracle, ["priv_leak"])
    assert known.figures["priv_leak"].value == -100.0


def test_questions_made_from_probability_prompts():
    prompts = [
        ProbabilityPrompt("He met", ("Orrin", "Quill"), ("Tom", "Tom", "Ann")),
        ProbabilityPrompt("A", ("B",)),
    ]
    assert questions_from(prompts) == [MultipleChoice("He met", ("Orrin", "Tom", "Ann"), 0)]


def test_prompts_that_hold_the_answer_are_named():
    data = EvaluationSet(
        familiarity=[
            FamiliarityPrompt("Orrin met", ("Orrin", "Quill")),
            FamiliarityPrompt("He met", ("Orrin",)),
        ],
        probability=[ProbabilityPrompt("Orrin's friend is", ("Orrin",))],
    )
    told = answers_given_away(
        data, [Cloze("A wand is a wand. What is it? It is a", "wand"), Cloze("It is a", "cup")]
    )
    assert [warning.split(" prompts: ")[0] for warning in told] == [
        "familiarity",
        "probability",
        "target question",
    ]
    assert all(" prompts: 1 hold" in warning for warning in told) and "'Orrin met'" in told[0]
    assert answers_given_away(EvaluationSet(probability=[ProbabilityPrompt("He met", ("Orrin",))])) == []


# ---- the choice of metrics -------------------------------------------------------------------------------


def test_metrics_that_cannot_be_measured():
    cloze = Inputs(EvaluationSet(choices=[Cloze("A", "b")]), questions=[Cloze("A", "b")])
    assert chosen_metrics([], cloze, oracle=True) == ["knowledge_accuracy", "general_accuracy"]
    with pytest.raises(UserError, match="--metrics truth_ratio: --questions holds no question with choices"):
        chosen_metrics(["truth_ratio"], cloze, oracle=True)
    with pytest.raises(UserError, match="--metrics: 'roug' is none; choose from familiarity_completion"):
        chosen_metrics(["roug"], cloze, oracle=False)
    with pytest.raises(UserError, match="--metrics priv_leak: it needs --target and --holdout and --oracle"):
        chosen_metrics(["priv_leak"], cloze, oracle=False)
    assert chosen_metrics(["general_accuracy"], cloze, oracle=False) == ["general_accuracy"]


def test_every_metric_names_needs_that_inputs_know():
    full = Inputs(EvaluationSet([], [], [], []), [], [], [])
    assert {need for metric in metrics.METRICS.values() for need in metric.needs} == full.given() | {"oracle"}


def test_greedy_hits_and_log_probabilities_agree_with_logits():
    torch.manual_seed(0)
    tokenizer = PieceTokenizer(list("abc"))
    model = BigramModel(tokenizer, {"a": {"b": 0.6, "c": 0.4}, "b": {"a": 0.5, "c": 0.5}})
    (scores,) = scoring.token_scores(model, [[0, *tokenizer.encode("abac")]])
    assert scores.greedy.tolist() == [True, True, True, False]  # of equal ones each is a first choice
    assert scores.log_probs.exp().tolist() == pytest.approx([0.2, 0.6, 0.5, 0.4])
