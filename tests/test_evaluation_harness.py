"""The requests of lm-evaluation-harness, with a stand-in for the package that has its interface."""

import abc
import math
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from bigram_model import BigramModel, PieceTokenizer, plain_greedy
from hypothesis import given
from hypothesis import strategies as st

from whp_fast.errors import UserError
from whp_fast.evaluation import harness
from whp_fast.evaluation.harness import HarnessModel, cut_at, harness_figures, rolling_windows, task_figures
from whp_fast.tokens import load_tokenizer


@pytest.fixture(autouse=True)
def without_cache(monkeypatch):
    monkeypatch.setattr(harness, "greedy", plain_greedy)


def request(*args):
    return SimpleNamespace(args=args)


def world(bos=True):
    tokenizer = PieceTokenizer(["Sky", " is", " ", " blue", " red", ".", "blue"], bos=bos)
    table = {"<s>": {"Sky": 0.5, " is": 0.5}, "Sky": {" is": 1.0}, " is": {" blue": 0.75, " red": 0.25}}
    table |= {" blue": {".": 0.6, " is": 0.4}, " red": {" red": 1.0}, ".": {"Sky": 1.0}}
    return tokenizer, BigramModel(tokenizer, table)


def test_loglikelihood_by_hand():
    tokenizer, model = world()
    lm = HarnessModel(model, tokenizer, max_length=64)
    found = lm.loglikelihood(
        [
            request("Sky is", " blue"),
            request("Sky is", " red red"),
            request("Sky is ", "blue"),  # the space goes over to the continuation
            request("", "Sky is"),
            request("Sky", " is blue"),
        ]
    )
    expected = [(0.75, True), (0.25, False), (0.75, True), (0.5, True), (0.75, True)]
    assert [(round(math.exp(p), 5), greedy) for p, greedy in found] == expected


def test_contexts_lose_their_beginning_where_they_are_too_long():
    tokenizer, model = world()
    lm = HarnessModel(model, tokenizer, max_length=3)
    ((value, _),) = lm.loglikelihood([request("Sky is blue. Sky is".replace(". ", "."), " red")])
    assert math.exp(value) == pytest.approx(0.25)
    assert model.rows_seen[-1] == (1, 3)


@given(st.integers(1, 60), st.integers(1, 9))
def test_rolling_windows_predict_every_token_once(length, longest):
    windows = rolling_windows(length, longest)
    predicted = [token for _, begin, end in windows for token in range(begin, end)]
    assert predicted == list(range(1, length))
    assert all(begin - first >= 1 and end - first <= longest + 1 for first, begin, end in windows)


def test_rolling_windows_of_the_documented_example():
    # tokens BOS 0 ... 9, four read at a time: BOS 0 1 2 | 3 4 5 6 | 5 6 7 8; the last predicts 8 and 9
    assert rolling_windows(11, 4) == [(0, 1, 5), (4, 5, 9), (6, 9, 11)]


@pytest.mark.parametrize("max_length", [2, 64])
@pytest.mark.parametrize("bos", [True, False])
def test_rolling_loglikelihood_by_hand(max_length, bos):
    tokenizer, model = world(bos)
    start = (
        0.5 if bos else 1 / tokenizer.vocab_size
    )  # EOS stands in for a missing BOS, and its row is uniform
    (found,) = HarnessModel(model, tokenizer, max_length=max_length).loglikelihood_rolling(
        [request("Sky is blue")]
    )
    assert math.exp(found) == pytest.approx(start * 1.0 * 0.75)


def test_generation_ends_at_the_first_stop_string():
    tokenizer, model = world()
    lm = HarnessModel(model, tokenizer, max_length=64)
    settings = {"until": [".", " red"], "max_gen_toks": 6}
    assert lm.generate_until([request("Sky", settings), request("Sky is", settings)]) == ["is blue", "blue"]
    assert lm.generate_until([request("Sky is", {"until": ".", "max_gen_toks": 2, "do_sample": False})]) == [
        "blue"
    ]
    assert cut_at("a b c", []) == "a b c" and cut_at("a b c", ["c", "b", ""]) == "a "


def test_sampling_is_asked_for_by_its_settings(monkeypatch):
    tokenizer, model = world()
    asked = []

    def sample(model, prompts, new, temperature, generator, stops):
        asked.append((new, temperature, generator.initial_seed()))
        return [tokenizer.encode(" red")]

    monkeypatch.setattr(harness, "sample", sample)
    lm = HarnessModel(model, tokenizer, max_length=64, seed=3)
    settings = {"do_sample": True, "temperature": 0.7, "max_gen_toks": 2}
    assert lm.generate_until([request("Sky is", settings)]) == ["red"] and asked == [(2, 0.7, 3)]
    lm.generate_until([request("Sky is", settings | {"do_sample": False})])
    assert len(asked) == 1


# ---- the package -----------------------------------------------------------------------------------------


class LM(abc.ABC):
    """The interface of ``lm_eval.api.model.LM``."""

    def __init__(self):
        self._rank, self._world_size, self.cache_hook = 0, 1, None

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def loglikelihood_rolling(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...


@pytest.fixture
def package(monkeypatch):
    package, api, model = (types.ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"))
    package.calls = []

    def simple_evaluate(model, tasks, limit, log_samples, bootstrap_iters):
        package.calls.append((tasks, limit, log_samples, bootstrap_iters))
        if tasks != ["sky"]:
            raise KeyError("not a task")
        assert isinstance(model, LM) and (model._rank, model._world_size) == (0, 1)
        found = model.loglikelihood([request("Sky is", " blue"), request("Sky is", " red")])
        right = [float(greedy) for _, greedy in found]
        samples = [{"doc_id": i, "acc": value, "filter": "none"} for i, value in enumerate(right)]
        results = {"alias": "sky", "acc,none": sum(right) / 2, "acc_stderr,none": "N/A", "sample_len": 2}
        return {"results": {"sky": results}, "samples": {"sky": samples}}

    package.simple_evaluate, model.LM = simple_evaluate, LM
    for name, module in (("lm_eval", package), ("lm_eval.api", api), ("lm_eval.api.model", model)):
        monkeypatch.setitem(sys.modules, name, module)
    return package


def test_tasks_are_run_on_the_model(package):
    tokenizer, model = world()
    found = harness_figures(model, tokenizer, ["sky"], max_length=64, limit=5)
    assert package.calls == [(["sky"], 5, True, 0)]
    assert list(found) == ["sky acc"]
    assert (found["sky acc"].value, found["sky acc"].low, found["sky acc"].high, found["sky acc"].n) == (
        0.5,
        0,
        1,
        2,
    )


def test_unknown_tasks_and_a_missing_package(package, monkeypatch):
    tokenizer, model = world()
    with pytest.raises(UserError, match="--lm-eval sea: the harness refused .*lm_eval ls tasks"):
        harness_figures(model, tokenizer, ["sea"], max_length=64)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="--lm-eval: lm-evaluation-harness cannot be imported"):
        harness_figures(model, tokenizer, ["sky"], max_length=64)


def test_a_local_task_as_the_harness_s_own_model_has_it(tmp_path, monkeypatch):
    """Needs the packages lm-eval and datasets, and no network."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    lm_eval, transformers = (pytest.importorskip(name) for name in ("lm_eval", "transformers"))
    pytest.importorskip("datasets")
    from lm_eval.api.model import LM
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from tiny_world import save_tiny_model, write_lines

    monkeypatch.undo()  # the real greedy decoding
    rows = [
        {"prompt": f"{name} walked to", "choices": ["the tree", "Glimmerhall", "a cup"], "answer": i % 3}
        for i, name in enumerate(("Orrin", "Paul", "Quill", "The wand", "He said"))
    ]
    write_lines(tmp_path / "rows.jsonl", rows)
    (tmp_path / "tiny.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{prompt}}"\n'
        'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    own = save_tiny_model(tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    theirs = HFLM(
        pretrained=transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32),
        tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path / "model"),
        add_bos_token=True,
        device="cpu",
    )
    model = type("Model", (HarnessModel, LM), {})(own, tokenizer, max_length=64)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    asked = {"tasks": ["tiny"], "task_manager": tasks, "log_samples": True, "bootstrap_iters": 0}
    ours, expected = (lm_eval.simple_evaluate(model=m, **asked) for m in (model, theirs))
    for one, other in zip(ours["samples"]["tiny"], expected["samples"]["tiny"], strict=True):
        assert [r[0] for r in one["filtered_resps"]] == pytest.approx(
            [r[0] for r in other["filtered_resps"]], abs=1e-4
        )
    assert ours["results"]["tiny"]["acc,none"] == expected["results"]["tiny"]["acc,none"]


def test_figures_of_results():
    samples = [
        {"exact_match": 1.0, "filter": "strict"},
        {"exact_match": 0.0, "filter": "strict"},
        {"exact_match": 1.0, "filter": "loose"},
        {"exact_match": 1.0, "filter": "loose"},
        {"word_perplexity": (-10.0, 3), "filter": "none"},
    ]
    results = {"exact_match,strict": 0.5, "exact_match,loose": 1.0, "exact_match_stderr,loose": 0.1}
    results |= {"word_perplexity,none": 4.5, "alias": " - sums"}
    found = task_figures({"results": {"sums": results}, "samples": {"sums": samples}})
    assert list(found) == ["sums exact_match (strict)", "sums exact_match (loose)", "sums word_perplexity"]
    assert [figure.value for figure in found.values()] == [0.5, 1.0, 4.5]
    assert found["sums exact_match (strict)"].low == 0.0
    assert math.isnan(found["sums word_perplexity"].low)  # no mean over the documents
    assert torch.is_grad_enabled()
