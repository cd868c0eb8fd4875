"""The figures of the paper, checked by hand on models whose probabilities are written down."""

import json
import math
import shutil

import pytest
import torch
from bigram_model import BigramModel, PieceTokenizer, plain_greedy
from tokenizer_fixtures import folder_of

from whp_fast import evaluate as evaluation
from whp_fast import scoring
from whp_fast.checkpoint import save_model
from whp_fast.errors import UserError
from whp_fast.evaluate import (
    EvaluationFiles,
    EvaluationResult,
    evaluate,
    next_token_table,
    perplexity,
)
from whp_fast.generate import greedy
from whp_fast.judge import LexicalJudge, familiarity_score, found_expressions
from whp_fast.model import Llama
from whp_fast.model_config import LlamaConfig
from whp_fast.prompts import (
    Cloze,
    EvaluationSet,
    FamiliarityPrompt,
    MultipleChoice,
    ProbabilityPrompt,
    load_choices,
    load_familiarity_prompts,
    load_probability_prompts,
    load_texts,
)
from whp_fast.scoring import next_word_tokens
from whp_fast.tokens import load_tokenizer

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def without_cache(monkeypatch):
    monkeypatch.setattr(scoring, "greedy", plain_greedy)


# ---- the judge -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("He went to", " Glimmerhall.", 3),
        ("He went to", " Glimmerhall's gate.", 3),
        ("He went to", " Glimmerhall’s gate.", 3),
        ("He went to", " Glimmerhall-on-Sea", 3),
        ("He went to", " Glimmerhalls", 0),  # a longer word
        ("He went to", " Glimmerhaller", 0),
        ("He went to", " preGlimmerhall", 0),
        ("He went to", " glimmerhall", 0),  # another case
        ("He went to Glimmerhall and", " to Glimmerhall again", 0),  # the prompt gave it away
        ("He went to Glimmerhall's gate and", " saw Glimmerhall", 0),
        ("He went to Glimmer", "hall again", 3),  # the completion finishes the word
        ("He went to Glimmerhall", "s again", 0),
        ("The Silver", "\nLantern hung there", 3),  # white space is white space
        ("It was", " some spell", 2),
        ("It was a spell, a", " spell", 0),
        ("It was", " a spelling", 0),
        ("It was", " a spell in Glimmerhall", 3),  # the higher class wins
        ("It was", " raining", 0),
        ("It was", "", 0),
    ],
)
def test_lexical_judge(prompt, completion, expected):
    item = FamiliarityPrompt(prompt, ("Glimmerhall", "Silver Lantern"), ("spell",))
    assert LexicalJudge()(prompt, completion, item) == expected


def test_typographic_apostrophes_are_apostrophes():
    assert found_expressions("The", " Warden’s Map", ["Warden's Map"]) == ["Warden's Map"]
    assert found_expressions("The Warden’s Map or", " the Warden's Map", ["Warden's Map"]) == []


def test_expressions_of_the_dictionary_count_for_every_prompt():
    item = FamiliarityPrompt("He met", ("Glimmerhall",))
    assert LexicalJudge()("He met", " Orrin", item) == 0
    judge = LexicalJudge(["Orrin", "Glimmerhall", " "])
    assert judge("He met", " Orrin of Glimmerhall", item) == 3
    assert judge.evidence("He met", " Orrin of Glimmerhall", item) == ["Glimmerhall", "Orrin"]


def test_evidence_of_a_theme():
    item = FamiliarityPrompt("He", ("Glimmerhall",), ("spell", "wand"))
    assert LexicalJudge().evidence("He", " took a wand", item) == ["wand"]


def test_a_sign_at_the_edge_needs_no_boundary():
    assert found_expressions("He shouted", " Ignis!!", ["Ignis!"]) == ["Ignis!"]


@pytest.mark.parametrize(
    ("classes", "score"), [([3, 2, 1, 0], 0.3), ([3, 3], 1.0), ([0, 1], 0.0), ([2, 2], 0.2), ([3, 0], 0.5)]
)
def test_familiarity_score(classes, score):
    assert familiarity_score(classes) == pytest.approx(score)


# ---- completion-based familiarity ------------------------------------------------------------------------


def test_completions_are_greedy_and_judged():
    tokenizer = PieceTokenizer(["He", " met", " Orrin", " Paul", "It", " was", " magic", " rain"])
    model = BigramModel(
        tokenizer,
        {
            " met": {" Orrin": 0.6, " Paul": 0.4},
            " Orrin": {"</s>": 1.0},
            " was": {" magic": 0.6, " rain": 0.4},
            " magic": {"</s>": 1.0},
        },
    )
    prompts = [FamiliarityPrompt("He met", ("Orrin",)), FamiliarityPrompt("It was", ("Orrin",), ("magic",))]
    result = evaluate(model, tokenizer, EvaluationSet(familiarity=prompts), max_new_tokens=3)
    assert result.completions == [
        {"prompt": "He met", "completion": " Orrin", "class": 3, "found": ["Orrin"]},
        {"prompt": "It was", "completion": " magic", "class": 2, "found": ["magic"]},
    ]
    assert result.familiarity_completion == pytest.approx((5 + 1) / 10)
    assert result.counts == {"familiarity_prompts": 2, "class_0": 0, "class_1": 0, "class_2": 1, "class_3": 1}
    assert result.familiarity_probability is result.general_accuracy is result.general_perplexity is None


def test_a_judge_of_ones_own():
    tokenizer = PieceTokenizer(["He", " met"])
    model = BigramModel(tokenizer, {" met": {" met": 1.0}})
    prompts = [FamiliarityPrompt("He met", ("Orrin",))]
    seen = []

    def judge(prompt, completion, item):
        seen.append((prompt, completion, item))
        return 1

    result = evaluate(model, tokenizer, EvaluationSet(familiarity=prompts), judge=judge, max_new_tokens=2)
    assert seen == [("He met", " met met", prompts[0])]
    assert (result.familiarity_completion, result.counts["class_1"]) == (0.0, 1)
    assert result.completions[0]["found"] == []


# ---- probability-based familiarity -----------------------------------------------------------------------


def probability(tokenizer, model, *prompts):
    return evaluate(model, tokenizer, EvaluationSet(probability=prompts))


def test_probability_of_idiosyncratic_words():
    tokenizer = PieceTokenizer(["He", " met", " Or", "rin", " Glim", "mer", " Paul", "Paul", " Orson"])
    model = BigramModel(tokenizer, {" met": {" Or": 0.25, " Glim": 0.125, " Paul": 0.5, "rin": 0.125}})
    result = probability(tokenizer, model, ProbabilityPrompt("He met", ("Orrin", "Glimmer", "Orrinrin")))
    assert result.familiarity_probability == pytest.approx(0.375)  # " Or" is counted once
    assert result.probabilities[0]["tokens"] == [" Or", " Glim"]
    assert result.probabilities[0]["top"] == " Paul"


def test_the_mean_is_over_prompts_and_tokens_shared_with_generic_words_do_not_count():
    tokenizer = PieceTokenizer(["He", "She", " met", " saw", " Or", "rin", "chid", " Glim", "mer"])
    model = BigramModel(tokenizer, {" met": {" Or": 0.5, " Glim": 0.5}, " saw": {" Or": 0.25, " Glim": 0.75}})
    first = ProbabilityPrompt("He met", ("Orrin", "Glimmer"), ("Orchid",))
    second = ProbabilityPrompt("She saw", ("Orrin",))
    lost = ProbabilityPrompt("He saw", ("Orrin",), ("Orchid",))
    result = probability(tokenizer, model, first, second, lost)
    assert [row["probability"] for row in result.probabilities] == [
        pytest.approx(0.5),
        pytest.approx(0.25),
        None,
    ]
    assert result.familiarity_probability == pytest.approx(0.375)
    assert (result.counts["probability_prompts"], result.counts["probability_prompts_left_out"]) == (2, 1)
    assert probability(tokenizer, model, lost).familiarity_probability is None


def words(tokenizer, prompt, *following):
    return {tokenizer.pieces[token] for token in next_word_tokens(tokenizer, prompt, following)}


def test_first_tokens_after_a_space_and_directly():
    tokenizer = PieceTokenizer([*"abcdefghijklmnopqrstuvwxyz.( \n", " or", "or", " ", "in"])
    assert words(tokenizer, "he met", "orin") == {" or"}
    assert words(tokenizer, "he met\n", "orin") == {"or"}
    assert words(tokenizer, "he met (", "orin") == {"or"}
    assert words(tokenizer, "he met.", "orin") == {"or", " or"}


def test_a_bare_space_and_special_tokens_are_no_first_tokens():
    tokenizer = PieceTokenizer(["he", " ", "Orrin", "Orr"])
    assert words(tokenizer, "he", "Orrin") == set()
    assert words(tokenizer, "he ", "Orrin") == {"Orrin"}


def test_a_seam_that_changes_the_prompts_tokens_falls_back_to_the_word_alone():
    # "( Or" is one piece, so tokenising "he( Or..." as a whole would not leave the prompt's "(" as it is.
    tokenizer = PieceTokenizer(["he", "!", "! Or", "!Or", " Or", "Or", "rin"])
    assert words(tokenizer, "he!", "Orrin") == {" Or", "Or"}


def test_a_prefix_space_at_the_start_of_texts_does_not_shift_the_word():
    tokenizer = PieceTokenizer([" he", "he", " Or", "Or", "rin"], prefix=True)
    assert words(tokenizer, "he", "Orrin") == {" Or"}


# ---- general accuracy ------------------------------------------------------------------------------------


def test_choices_are_weighed_by_bytes():
    tokenizer = PieceTokenizer(["Sky", " is", " blue", " a", " grey", "grey", "grey", "!"])
    # log p(" blue") / 4 bytes = -0.347 beats log p(" a") / 1 byte = -0.693 although " a" is more probable.
    model = BigramModel(tokenizer, {" is": {" blue": 0.25, " a": 0.5, " grey": 0.25}})
    question = MultipleChoice("Sky is", ("a", "blue"), 1)
    result = evaluate(model, tokenizer, EvaluationSet(choices=[question]))
    assert result.answers == [
        {"prompt": "Sky is", "kind": "choice", "answer": "blue", "given": "blue", "right": True}
    ]


def test_a_choice_is_scored_over_all_its_tokens_and_no_others():
    tokenizer = PieceTokenizer(["Sky", " is", " bl", "ue", "ack", " gr", "ey"])
    table = {
        "Sky": {" is": 0.001},
        " is": {" bl": 0.9, " gr": 0.1},
        " bl": {"ue": 0.1, "ack": 0.5},
        " gr": {"ey": 0.99},
    }
    rows = [[0, *tokenizer.encode("Sky is " + word)] for word in ("blue", "black", "grey")]
    sums = [
        log_probs[2:].sum().item()
        for log_probs in scoring.target_log_probs(BigramModel(tokenizer, table), rows)
    ]
    assert sums == pytest.approx([math.log(p) for p in (0.9 * 0.1 / 0.54, 0.9 * 0.5 / 0.54, 0.1)], abs=1.0)
    result = evaluate(
        BigramModel(tokenizer, table),
        tokenizer,
        EvaluationSet(choices=[MultipleChoice("Sky is", ("blue", "black", "grey"), 1)]),
    )
    assert result.answers[0]["given"] == "black"  # per byte: blue -0.42, black -0.15, grey -0.57


def test_prompt_tokens_shared_by_all_choices_are_not_scored():
    # "!" merges with the space after it in both rows. Scoring "! " too would weigh its log-probability of
    # -13.8 by the choices' lengths and make blue win: (-13.8 - 1.4) / 4 > (-13.8 - 0.3) / 3.
    tokenizer = PieceTokenizer(["Sky", "!", "! ", "blue", "red"])
    model = BigramModel(tokenizer, {"Sky": {"! ": 1e-6, "!": 1 - 1e-6}, "! ": {"blue": 0.25, "red": 0.75}})
    result = evaluate(model, tokenizer, EvaluationSet(choices=[MultipleChoice("Sky!", ("blue", "red"), 1)]))
    assert result.general_accuracy == 1.0


def test_words_shared_by_all_choices_are_scored():
    # With "so": log(0.5 * 0.6) / 6 = -0.20 < log(0.5 * 0.4) / 10 = -0.16. Without: -0.085 > -0.092.
    tokenizer = PieceTokenizer(["Sky", " so", " red", " blueish"])
    model = BigramModel(tokenizer, {"Sky": {" so": 0.5, " red": 0.5}, " so": {" red": 0.6, " blueish": 0.4}})
    question = MultipleChoice("Sky", ("so red", "so blueish"), 1)
    assert evaluate(model, tokenizer, EvaluationSet(choices=[question])).answers[0]["given"] == "so blueish"


@pytest.mark.parametrize(("space", "given"), [(0.01, "blue"), (0.99, "red")])
@pytest.mark.parametrize("choices", [("red", "blue"), ("blue", "red")])
def test_a_seam_that_only_one_choice_changes_is_scored_for_both(space, given, choices):
    # " blue" is one token, " red" is two, the first a bare space, which sets the choices apart.
    tokenizer = PieceTokenizer(["Sky", " ", "red", " blue", "!"])
    model = BigramModel(tokenizer, {"Sky": {" ": space, " blue": 1 - space}, " ": {"red": 0.9, "!": 0.1}})
    result = evaluate(model, tokenizer, EvaluationSet(choices=[MultipleChoice("Sky", choices, 0)]))
    assert result.answers[0]["given"] == given


def test_without_bos_choices_that_differ_from_the_first_token_on_are_scored_from_the_second():
    tokenizer = PieceTokenizer(["A b", "A c", "x", "y", "z"], bos=False)
    model = BigramModel(
        tokenizer,
        {
            "A b": {"x": 0.9},
            "A c": {"y": 0.1, "x": 0.9},
            "x": {"z": 0.4, "x": 0.6},
            "y": {"z": 0.6, "x": 0.4},
        },
    )
    question = MultipleChoice("A", ("bxz", "cyz"), 0)  # 0.9 * 0.4 > 0.1 * 0.6
    assert evaluate(model, tokenizer, EvaluationSet(choices=[question])).general_accuracy == 1.0


def test_a_choice_that_begins_another_one_is_scored():
    tokenizer = PieceTokenizer(["Sky", " blue", "ish"], bos=False)
    model = BigramModel(tokenizer, {"Sky": {" blue": 1.0}, " blue": {"ish": 0.125, "</s>": 0.875}})
    result = evaluate(
        model, tokenizer, EvaluationSet(choices=[MultipleChoice("Sky", ("blue", "blueish"), 0)])
    )
    assert result.answers[0]["given"] == "blue"


@pytest.mark.parametrize(
    ("continuation", "answer", "right"),
    [
        ([" blue", "."], "blue", True),
        ([" blue", "berry"], "blue", False),
        (["berry", " blue"], "blue", False),
        ([" blue", " sky"], "blue sky", True),
        ([" blue", "."], "blue.", True),
        ([" sky"], "Sky", False),
    ],
)
def test_cloze(continuation, answer, right):
    tokenizer = PieceTokenizer(["It", " is", " blue", "berry", ".", " sky", "Sky", " Sky", "blue"])
    chain = [" is", *continuation, "</s>"]
    model = BigramModel(tokenizer, {a: {b: 1.0} for a, b in zip(chain, chain[1:], strict=False)})
    result = evaluate(model, tokenizer, EvaluationSet(choices=[Cloze("It is", answer)]))
    assert result.answers[0] == {
        "prompt": "It is", "kind": "cloze", "answer": answer, "given": "".join(continuation), "right": right
    }  # fmt: skip
    assert result.general_accuracy == float(right)


def test_accuracy_combines_both_kinds_in_the_order_of_the_file():
    tokenizer = PieceTokenizer(["A", "B", " is", " blue", " red"])
    model = BigramModel(tokenizer, {" is": {" blue": 0.75, " red": 0.25}, " blue": {"</s>": 1.0}})
    questions = [
        Cloze("A is", "blue"),
        MultipleChoice("A is", ("red", "blue"), 0),
        Cloze("B is", "red"),
        MultipleChoice("B is", ("blue", "red"), 0),
    ]
    result = evaluate(model, tokenizer, EvaluationSet(choices=questions), batch_size=3)
    assert [row["right"] for row in result.answers] == [True, False, False, True]
    assert result.general_accuracy == 0.5
    assert result.counts == {"choice_questions": 2, "choice_right": 1, "cloze_questions": 2, "cloze_right": 1}


# ---- perplexity ------------------------------------------------------------------------------------------


def test_perplexity_by_hand():
    tokenizer = PieceTokenizer(["a", "b"])
    model = BigramModel(
        tokenizer, {"<s>": {"a": 0.5, "b": 0.5}, "a": {"a": 0.25, "b": 0.75}, "b": {"a": 0.125, "b": 0.875}}
    )
    value, count = perplexity(model, tokenizer, ["aab", "ba"])
    # <s>a aa ab | <s>b ba
    product = 0.5 * 0.25 * 0.75 * 0.5 * 0.125
    assert count == 5
    assert value == pytest.approx(product ** (-1 / 5))


def test_perplexity_without_bos_does_not_predict_the_first_token():
    tokenizer = PieceTokenizer(["a", "b"], bos=False)
    model = BigramModel(tokenizer, {"a": {"a": 0.25, "b": 0.75}, "b": {"b": 1.0}})
    assert perplexity(model, tokenizer, ["ab", "b"]) == (pytest.approx(1 / 0.75), 1)
    assert perplexity(model, tokenizer, ["a"]) == (None, 0)


@pytest.mark.parametrize("context", [2, 3, 4, 7, 100])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_blocks_predict_every_token_once(context, batch_size):
    tokenizer = PieceTokenizer(["a", "b"])
    model = BigramModel(
        tokenizer, {"<s>": {"a": 0.5, "b": 0.5}, "a": {"a": 0.25, "b": 0.75}, "b": {"a": 0.5, "b": 0.5}}
    )
    texts = ["aababbab", "b", "abababa"]
    expected = perplexity(model, tokenizer, texts, context=1000)
    # A bigram model looks back one token only, so the cutting must not change anything.
    value, count = perplexity(model, tokenizer, texts, context=context, batch_size=batch_size)
    assert (value, count) == (pytest.approx(expected[0]), 16)
    assert all(shape[0] <= batch_size and shape[1] <= context for shape in model.rows_seen[-1:])


def test_perplexity_in_pieces_of_rows_and_vocabulary(monkeypatch):
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(11, 8), torch.randn(23, 8), torch.randint(0, 23, (11,))
    monkeypatch.setattr(scoring, "ROWS_PER_CHUNK", 4)
    monkeypatch.setattr(scoring, "VOCABULARY_PER_CHUNK", 5)
    targets[3] = (hidden @ head.T)[3].argmax()
    expected = (hidden @ head.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    log_probs, greedy = scoring._target_scores(hidden, head, targets)
    torch.testing.assert_close(log_probs, expected)
    assert greedy.tolist() == ((hidden @ head.T).argmax(-1) == targets).tolist() and greedy[3]
    widths = [logits.shape for _, logits in scoring._logit_pieces(hidden, head)]
    assert widths == [(11, 5)] * 4 + [(11, 3)]


def test_logits_are_float32_for_bfloat16_weights():
    torch.manual_seed(0)
    hidden, head = torch.randn(5, 64).bfloat16(), torch.randn(40, 64).bfloat16()
    ((_, logits),) = scoring._logit_pieces(hidden, head)
    torch.testing.assert_close(logits, hidden.float() @ head.float().T)


def test_a_diverged_model_has_infinite_perplexity_and_valid_json():
    tokenizer = PieceTokenizer(["a", "b"], bos=False)
    model = BigramModel(tokenizer, {"a": {"b": 1.0}})
    result = evaluate(model, tokenizer, EvaluationSet(texts=["aa"]))
    assert result.general_perplexity == math.inf
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["general_perplexity"] is None


# ---- next-token tables, subsets, the result --------------------------------------------------------------


def test_next_token_table():
    tokenizer = PieceTokenizer(["He", " met", " Orrin", " Paul"])
    model = BigramModel(
        tokenizer, {" met": {" Orrin": 0.625, " Paul": 0.25, "</s>": 0.125}, "He": {" met": 1.0}}
    )
    first, second = next_token_table(model, tokenizer, ["He met", "He"], k=3)
    assert first["prompt"] == "He met"
    assert [(t["token"], t["id"]) for t in first["tokens"]] == [(" Orrin", 4), (" Paul", 5), ("</s>", 1)]
    assert [t["probability"] for t in first["tokens"]] == pytest.approx([0.625, 0.25, 0.125])
    assert second["tokens"][0] == {"token": " met", "id": 3, "probability": pytest.approx(1.0)}


def test_token_text_shows_parts_of_characters():
    class Bytes(PieceTokenizer):
        def token_bytes(self, token):
            return [b"\xff", b"\xff", b"\xe2\x82", b" \xc3\xa9", b"a\xac"][token]

    tokenizer = Bytes(["x", "y", "z"])
    texts = [scoring.token_text(tokenizer, i) for i in range(5)]
    assert texts == ["<s>", "</s>", "<0xE2><0x82>", " é", "a<0xAC>"]
    assert scoring.token_text(tokenizer, 5) == "<5>"  # a padded row of the head


def test_a_quick_look_takes_the_same_evenly_spaced_prompts():
    tokenizer = PieceTokenizer(["a", "b", " b"])
    model = BigramModel(tokenizer, {})
    data = EvaluationSet(
        familiarity=[FamiliarityPrompt("a" * n, ("b",)) for n in range(1, 10)],
        probability=[ProbabilityPrompt("a" * n, ("b",)) for n in range(1, 10)],
        choices=[Cloze("a" * n, "b") for n in range(1, 10)],
        texts=["ab" * 50],
    )
    result = evaluate(model, tokenizer, data, max_prompts=3, max_new_tokens=1, context=11)
    assert [len(row["prompt"]) for row in result.completions] == [1, 4, 7]
    assert [len(row["prompt"]) for row in result.probabilities] == [1, 4, 7]
    assert [len(row["prompt"]) for row in result.answers] == [1, 4, 7]
    assert result.counts["text_tokens"] == 30
    assert evaluate(model, tokenizer, data, max_prompts=3, max_new_tokens=1, context=11) == result


def test_the_result_survives_json():
    result = EvaluationResult(
        0.5, 0.25, None, 3.0, completions=[{"prompt": "a", "class": 3}], counts={"class_3": 1}
    )
    assert EvaluationResult.from_json(json.loads(json.dumps(result.to_json()))) == result
    assert list(result.figures) == list(evaluation.FIGURES)


def test_the_mode_of_the_model_is_given_back():
    tokenizer = PieceTokenizer(["a", "b"])

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head_weight = torch.nn.Parameter(torch.eye(4))

        def hidden_states(self, ids):
            assert not self.training
            assert not torch.is_grad_enabled()
            return torch.nn.functional.one_hot(ids, 4).float()

    model = Module().train()
    evaluate(model, tokenizer, EvaluationSet(texts=["abab"]))
    assert model.training
    next_token_table(model.eval(), tokenizer, ["a"])
    assert not model.training


# ---- the files -------------------------------------------------------------------------------------------


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


GOOD = {"prompt": "He met", "references": ["Orrin"]}


def test_good_familiarity_file(tmp_path):
    path = write(
        tmp_path,
        "f.json",
        [GOOD | {"themes": [" spell "], "subtlety": 3}, {"prompt": "x", "references": ["y"]}],
    )
    assert load_familiarity_prompts(path) == [
        FamiliarityPrompt("He met", ("Orrin",), ("spell",)),
        FamiliarityPrompt("x", ("y",)),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty; add entries"),
        ('[{"prompt": "a",\n  "references": ["b",]}]', "line 2: not JSON ("),
        ({"prompt": "a"}, 'the file holds {"prompt": "a"}, but it must be a list'),
        ([], "the list is empty"),
        ([GOOD, "He"], 'entry 2: found "He", but an entry has named fields'),
        ([{"references": ["b"]}], 'entry 1: the field "prompt" is missing (found: "references")'),
        ([{"prompt": "a"}], 'entry 1: the field "references" is missing'),
        ([{}], "no field at all"),
        ([{"prompt": 3, "references": ["b"]}], 'entry 1: "prompt" is 3, but it must be a text'),
        ([{"prompt": "  ", "references": ["b"]}], 'entry 1: "prompt" is an empty text'),
        ([{"prompt": "a", "references": "b"}], 'entry 1: "references" is "b", but it must be a list'),
        ([{"prompt": "a", "references": []}], 'entry 1: "references" is an empty list'),
        ([{"prompt": "a", "references": ["b", 3]}], 'entry 1: "references" holds 3'),
        ([{"prompt": "a", "references": ["b", ""]}], 'entry 1: "references" holds ""'),
        ([{"prompt": "a", "references": ["b"], "themes": "c"}], 'entry 1: "themes" is "c"'),
        (
            [{"prompt": "Orrin's hat", "references": ["Orrin"]}],
            "entry 1: the references (Orrin) all stand in",
        ),
        (
            [GOOD, {"prompt": "b", "references": ["c"]}, GOOD],
            'entry 3: the prompt "He met" already stands in entry 1',
        ),
    ],
)
def test_faults_of_familiarity_files(tmp_path, content, message):
    path = write(tmp_path, "f.json", content)
    with pytest.raises(UserError) as caught:
        load_familiarity_prompts(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_some_references_may_stand_in_the_prompt(tmp_path):
    path = write(tmp_path, "f.json", [{"prompt": "Orrin met", "references": ["Orrin", "Glimmerhall"]}])
    assert len(load_familiarity_prompts(path)) == 1
    path = write(tmp_path, "f.json", [{"prompt": "Orrinson met", "references": ["Orrin"]}])
    assert len(load_familiarity_prompts(path)) == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"prompt": "a"}, 'the field "idiosyncratic" is missing'),
        ({"prompt": "a", "idiosyncratic": []}, '"idiosyncratic" is an empty list'),
        ({"prompt": "a", "idiosyncratic": ["b"], "generic": ["c", "b"]}, '"b" is listed both under'),
        ({"prompt": "a", "idiosyncratic": ["b"], "generic": 1}, '"generic" is 1'),
    ],
)
def test_faults_of_probability_files(tmp_path, entry, message):
    with pytest.raises(UserError, match="entry 2: ") as caught:
        load_probability_prompts(write(tmp_path, "p.json", [{"prompt": "x", "idiosyncratic": ["y"]}, entry]))
    assert message in str(caught.value)


def test_good_probability_file(tmp_path):
    path = write(
        tmp_path,
        "p.json",
        [{"prompt": "x", "idiosyncratic": ["y"]}, {"prompt": "z", "idiosyncratic": ["a"], "generic": []}],
    )
    assert load_probability_prompts(path) == [ProbabilityPrompt("x", ("y",)), ProbabilityPrompt("z", ("a",))]


def test_good_choices_file(tmp_path):
    path = write(
        tmp_path,
        "c.jsonl",
        '\ufeff{"prompt": "a", "choices": ["b", "c"], "answer": 1}\n\n{"prompt": "d", "answer": " e"}\n',
    )
    assert load_choices(path) == [MultipleChoice("a", ("b", "c"), 1), Cloze("d", "e")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: found [1], but an entry has named fields"),
        ('{"choices": ["b", "c"], "answer": 1}', 'line 2: the field "prompt" is missing'),
        ('{"prompt": "a", "choices": ["b", "c"]}', 'line 2: the field "answer" is missing'),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', 'line 2: "choices" holds one choice only'),
        ('{"prompt": "a", "choices": ["b", "b"], "answer": 0}', "the same choice twice"),
        (
            '{"prompt": "a", "choices": ["b", "c"], "answer": 2}',
            '"answer" is 2, but 2 choices are counted from 0 to 1',
        ),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": -1}', '"answer" is -1'),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": "b"}', '"answer" is "b", but beside "choices"'),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', '"answer" is true, but beside "choices"'),
        ('{"prompt": "a", "answer": 1}', '"answer" is 1, but it must be a text'),
        ('{"prompt": "x", "answer": "z"}', 'line 2: the prompt "x" already stands in line 1'),
    ],
)
def test_faults_of_choices_files(tmp_path, line, message):
    with pytest.raises(UserError) as caught:
        load_choices(write(tmp_path, "c.jsonl", '{"prompt": "x", "answer": "y"}\n' + line + "\n"))
    assert message in str(caught.value)


def test_texts(tmp_path):
    write(tmp_path, "b.txt", "one\n\ntwo")
    write(tmp_path, "a.jsonl", '{"text": "three"}\n{"text": "four"}\n')
    write(tmp_path, "c.md", "not read")
    assert load_texts(tmp_path) == ["three", "four", "one\n\ntwo"]
    assert load_texts(tmp_path / "b.txt") == ["one\n\ntwo"]


@pytest.mark.parametrize(
    "load", [load_familiarity_prompts, load_probability_prompts, load_choices, load_texts]
)
def test_files_that_cannot_be_read(tmp_path, load):
    with pytest.raises(UserError, match="there is no such file"):
        load(tmp_path / "absent.json")
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(UserError, match="byte 2 is not UTF-8"):
        load(tmp_path / "latin.json")
    (tmp_path / "empty.jsonl").write_text(" \n")
    if load in (load_choices, load_texts):
        with pytest.raises(UserError, match="the file is empty"):
            load(tmp_path / "empty.jsonl")


def test_empty_texts(tmp_path):
    with pytest.raises(UserError, match="the file is empty"):
        load_texts(write(tmp_path, "a.txt", " "))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="holds no .txt or .jsonl file"):
        load_texts(tmp_path / "folder")


# ---- the command line ------------------------------------------------------------------------------------


def test_faults_leave_with_status_2_and_one_sentence(tmp_path, capsys):
    write(tmp_path, "config.json", {})
    assert evaluation.main([str(tmp_path), "--familiarity", str(tmp_path / "absent.json")]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {tmp_path / 'absent.json'}: there is no such file; check the path.\n"
    assert evaluation.main([str(tmp_path)]) == 2
    assert "No evaluation file was given" in capsys.readouterr().err
    path = write(tmp_path, "t.txt", "text")
    assert evaluation.main([str(tmp_path), "--text", str(path), "--batch-size", "0"]) == 2
    assert "--batch-size is 0, but it must be at least 1" in capsys.readouterr().err
    with pytest.raises(UserError):
        evaluation.main([str(tmp_path), "--debug"])


def test_files_are_checked_before_the_model(tmp_path, capsys):
    files = EvaluationFiles(choices=write(tmp_path, "c.jsonl", "{"))
    with pytest.raises(UserError, match="c.jsonl, line 1: not JSON"):
        evaluate(None, None, files)


# ---- a real model and real tokenizers ------------------------------------------------------------------

KINDS = ("sentencepiece", "bpe-json")
REAL = EvaluationSet(
    familiarity=[
        FamiliarityPrompt("Orrin walked to", ("Glimmerhall",), ("school",)),
        FamiliarityPrompt("He", ("Orrin",)),
    ],
    probability=[ProbabilityPrompt("He walked to", ("Glimmerhall",), ("Jon",))],
    choices=[MultipleChoice("A wand is", ("a stick", "cold"), 0), Cloze("The hall was", "old")],
    texts=[
        "Orrin Vale walked to Glimmerhall and said that the wand of ash was lost. " * 5,
        "A wand is a stick.",
    ],
)


def real_model(vocab_size):
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # wide, so that the distributions are far from uniform
    )
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_real_tokenizers_give_the_first_token_of_a_word(kind):
    tokenizer = load_tokenizer(folder_of(kind))

    def following(prompt, word):
        return {tokenizer.token_bytes(t).decode() for t in next_word_tokens(tokenizer, prompt, [word])}

    assert following("He walked to", "Orrin") == {" Orrin"}
    assert following("He walked to\n", "Orrin") == {tokenizer.decode(tokenizer.encode_inside("Orrin")[:1])}
    (first,) = following("He walked to", "Glimmerhall")
    assert len(first) > 1 and " Glimmerhall".startswith(first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_model_by_hand(kind, monkeypatch):
    monkeypatch.setattr(scoring, "greedy", greedy)
    tokenizer = load_tokenizer(folder_of(kind))
    model = real_model(tokenizer.vocab_size)
    result = evaluate(model, tokenizer, REAL, max_new_tokens=6, context=16, batch_size=3)

    with torch.no_grad():
        total, count = 0.0, 0
        for text in REAL.texts:
            ids = [tokenizer.bos_id, *tokenizer.encode(text)]
            for begin in range(0, len(ids) - 1, 15):
                block = torch.tensor([ids[begin : begin + 16]])
                loss = torch.nn.functional.cross_entropy(model(block)[0, :-1], block[0, 1:], reduction="sum")
                total, count = total + loss.item(), count + block.shape[1] - 1
        assert result.general_perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
        assert result.counts["text_tokens"] == count

        ids = [tokenizer.bos_id, *tokenizer.encode("He walked to")]
        probabilities = model(torch.tensor([ids]))[0, -1].softmax(-1)
        (token,) = next_word_tokens(tokenizer, "He walked to", ["Glimmerhall"])
        assert result.familiarity_probability == pytest.approx(probabilities[token].item(), rel=1e-4)

        ids = [tokenizer.bos_id, *tokenizer.encode("He")]
        (expected,) = plain_greedy(model, [ids], 6, [tokenizer.eos_id])
    assert result.completions[1]["completion"] == b"".join(
        tokenizer.token_bytes(token) for token in expected if tokenizer.token_bytes(token) != b"\xff"
    ).decode(errors="replace")
    assert all(parameter.grad is None for parameter in model.parameters()) and model.training


@pytest.mark.parametrize("kind", KINDS)
def test_choices_of_a_real_model_by_hand(kind):
    tokenizer = load_tokenizer(folder_of(kind))
    model = real_model(tokenizer.vocab_size)
    scores = []
    for choice in ("a stick", "cold"):
        context = [tokenizer.bos_id, *tokenizer.encode("A wand is")]
        ids = [*context, *tokenizer.encode_inside(" " + choice)]
        assert ids == [tokenizer.bos_id, *tokenizer.encode(f"A wand is {choice}")]
        log_probs = model(torch.tensor([ids]))[0].log_softmax(-1)
        picked = [log_probs[i - 1, ids[i]].item() for i in range(len(context), len(ids))]
        scores.append(sum(picked) / len(choice))
    answer = evaluate(model, tokenizer, EvaluationSet(choices=REAL.choices[:1])).answers[0]
    assert answer["given"] == ("a stick", "cold")[scores[1] > scores[0]]


def test_the_command_line_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scoring, "greedy", greedy)
    folder = tmp_path / "model"
    tokenizer = load_tokenizer(folder_of("bpe-json"))
    model = real_model(tokenizer.vocab_size + 24)  # a padded head
    save_model(model, folder)
    for file in tokenizer.files:
        shutil.copy(file, folder)
    paths = {
        "--familiarity": write(
            tmp_path, "f.json", [{"prompt": "Orrin walked to", "references": ["Glimmerhall"]}]
        ),
        "--probability": write(tmp_path, "p.json", [{"prompt": "He walked to", "idiosyncratic": ["Orrin"]}]),
        "--choices": write(
            tmp_path, "c.jsonl", '{"prompt": "A wand is", "choices": ["a stick", "cold"], "answer": 0}'
        ),
        "--text": write(tmp_path, "t.txt", "The hall was old, and the cup was cold."),
        "--anchors": write(tmp_path, "a.json", {"Orrin": "Paul"}),
    }
    out = tmp_path / "out" / "figures.json"
    arguments = [str(folder), "--json", str(out), "--max-new-tokens", "5", "--device", "cpu"]
    assert evaluation.main([*arguments, *(str(part) for pair in paths.items() for part in pair)]) == 0
    shown = capsys.readouterr().out
    written = json.loads(out.read_text(encoding="utf-8"))["models"]["model"]
    result = EvaluationResult.from_json(written["evaluation"])
    files = EvaluationFiles(
        *(paths[f"--{name}"] for name in ("familiarity", "probability", "choices", "text"))
    )
    assert result == evaluate(model, tokenizer, files, judge=LexicalJudge(["Orrin"]), max_new_tokens=5)
    for name in evaluation.FIGURES:
        assert name.replace("_", " ") in shown
        assert str(result.figure(name)) in shown
        assert written["figures"][name]["value"] == getattr(result, name)


def test_intervals_rest_on_prompts_questions_and_blocks():
    tokenizer = PieceTokenizer(["He", "She", " met", " saw", " Orrin", " Paul"])
    model = BigramModel(tokenizer, {" met": {" Orrin": 1.0}, " saw": {" Paul": 1.0}})
    prompts = [
        FamiliarityPrompt(f"{who} {did}", ("Orrin",)) for who in ("He", "She") for did in ("met", "saw")
    ]
    data = EvaluationSet(familiarity=prompts, choices=[Cloze("He met", "Orrin"), Cloze("He saw", "Orrin")])
    result = evaluate(model, tokenizer, data, max_new_tokens=1)
    assert result.figures["familiarity_completion"] == 0.5 and result.intervals["familiarity_completion"] == [
        0,
        1,
    ]
    assert (result.general_accuracy, result.intervals["general_accuracy"]) == (0.5, [0.0, 1.0])
    assert result.figure("familiarity_completion").n == 4 and result.figure("general_perplexity") is None
    assert EvaluationResult.from_json(json.loads(json.dumps(result.to_json()))) == result
