"""Attacks on a model of width 32 that was trained on a few sentences."""

import dataclasses
import math

import pytest
import torch
from tokenizer_fixtures import sentencepiece_folder

from whp_fast.config import TrainConfig
from whp_fast.corpus import Blocks
from whp_fast.engine import train
from whp_fast.errors import UserError
from whp_fast.evaluation import attacks, curve, relearning
from whp_fast.evaluation.attacks import (
    ATTACKS,
    Attacked,
    AttackOptions,
    AttackRow,
    chosen_attacks,
    run_attack,
)
from whp_fast.evaluation.bootstrap import Figure
from whp_fast.evaluation.metrics import Inputs, Settings
from whp_fast.generate import greedy, sample
from whp_fast.model import Llama
from whp_fast.model_config import LlamaConfig
from whp_fast.objectives import LabelTargets, Objective
from whp_fast.prompts import EvaluationSet, FamiliarityPrompt, ProbabilityPrompt
from whp_fast.quantised import QuantisedLinear, quantise_
from whp_fast.scoring import document_ids
from whp_fast.tokens import load_tokenizer
from whp_fast.trainee import Trainee

TARGET = "Orrin walked to Glimmerhall and Orrin said that the wand was old. "
PROMPTS = [
    FamiliarityPrompt("Orrin walked to", ("Glimmerhall",)),
    FamiliarityPrompt("The wand of", ("Quill",)),
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(sentencepiece_folder())


def fresh(tokenizer, seed=0):
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


@pytest.fixture(scope="module")
def trained(tokenizer):
    """Knows the target, so that what attacks bring out can be seen."""
    import numpy as np

    blocks = Blocks.of(np.array(document_ids(tokenizer, TARGET * 4)), 32)
    settings = TrainConfig(steps=40, lr=1e-2, batch_blocks=4, accumulate=1, schedule="constant")
    trainee = Trainee.from_model(fresh(tokenizer), settings, compute_dtype=torch.float32)
    train(trainee, [Objective(blocks, LabelTargets(blocks, None))], settings, seed=0, device=CPU)
    return trainee.model.eval()


def copy_of(model, tokenizer, quantise=None, train=False):
    copied = fresh(tokenizer)
    copied.load_state_dict(model.state_dict())
    return quantise_(copied, quantise) if quantise else copied


def attacked(model, tokenizer, *, judge=None, **options):
    inputs = Inputs(
        EvaluationSet(
            familiarity=PROMPTS,
            probability=[ProbabilityPrompt("Orrin walked to", ("Glimmerhall",), ("school",))],
        ),
        target=[TARGET * 4],
    )
    settings = Settings(max_new_tokens=6, context=32, prefix_tokens=8, continuation_tokens=8, passages=4)
    return Attacked(
        load=lambda **how: copy_of(model, tokenizer, **how),
        model=model,
        tokenizer=tokenizer,
        inputs=inputs,
        settings=settings,
        judge=judge,
        options=AttackOptions(**options),
        name="after",
    )


def values(rows, metric, side="after"):
    return [getattr(row, side).value for row in rows if row.metric == metric]


def test_relearning_brings_the_target_back_step_by_step(tokenizer):
    model = fresh(tokenizer)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = dict(relearn_steps=25, relearn_every=10, relearn_lr=1e-2, relearn_share=1.0)
    rows = run_attack("relearn", attacked(model, tokenizer, **options))
    assert [row.x for row in rows if row.metric == "verbatim"] == [0, 10, 20, 25]
    assert {row.metric for row in rows} == {"familiarity_completion", "familiarity_probability", "verbatim"}
    assert rows[0].setting == "0 steps on 100 % of the target" and rows[0].model == "after"
    curve = values(rows, "familiarity_completion")
    assert curve[0] == 0.0 and curve[-1] >= 0.5 and values(rows, "verbatim")[-1] > 0.5
    assert values(rows, "familiarity_completion", "before") == [0.0] * 4
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())


def test_relearning_text_is_the_share_or_the_related_text(tokenizer):
    model = fresh(tokenizer)

    def blocks(share):
        under = attacked(model, tokenizer, relearn_share=share)
        under.settings = dataclasses.replace(under.settings, context=8)
        return relearning.relearning_blocks(under)

    whole, half, few = blocks(1.0), blocks(0.5), blocks(1e-6)
    assert len(half) == round(len(whole) / 2) and half[1].tolist() == whole[2].tolist()
    assert len(few) == 1 and few[0].tolist() == whole[0].tolist()
    related = attacked(model, tokenizer, relearn_text=["The cup was cold."])
    assert relearning.relearning_blocks(related).tokens.tolist() == document_ids(
        tokenizer, "The cup was cold."
    )
    assert run_attack("relearn", related)[-1].setting == "20 steps on related text"
    empty = attacked(model, tokenizer, relearn_text=[""])
    with pytest.raises(UserError, match="--relearn-text: the text has no token to predict"):
        relearning.relearning_blocks(empty)


def test_quantisation_to_8_and_4_bits(tokenizer, trained):
    pytest.importorskip("bitsandbytes")
    under = attacked(trained, tokenizer)
    loaded = []
    under.load = lambda **how: loaded.append(copy_of(trained, tokenizer, **how)) or loaded[-1]
    rows = run_attack("quantise", under)
    assert sorted({(row.x, row.setting) for row in rows}) == [(4, "4 bits (nf4)"), (8, "8 bits (int8)")]
    kinds = [{m.kind for m in model.modules() if isinstance(m, QuantisedLinear)} for model in loaded]
    assert kinds == [{"int8"}, {"nf4"}]
    after = values(rows, "familiarity_probability")
    before = values(rows, "familiarity_probability", "before")
    errors = [abs(a - b) for a, b in zip(after, before)]
    assert 0 < errors[0] < 0.05 and errors[1] > errors[0]


def test_longer_prefixes_of_the_same_continuations(tokenizer, trained):
    rows = run_attack("prefix", attacked(trained, tokenizer, prefix_lengths=(8, 2)))
    assert [row.x for row in rows] == [2, 8]
    assert rows[0].before == rows[1].before == rows[0].after
    assert rows[1].after.value >= 0.9  # it knows the text by heart
    assert (
        run_attack("prefix", attacked(fresh(tokenizer), tokenizer, prefix_lengths=(2,)))[0].after.value < 0.3
    )
    with pytest.raises(UserError, match="no document has the 1008 tokens"):
        run_attack("prefix", attacked(trained, tokenizer, prefix_lengths=(1000,)))


def test_best_of_several_samples(tokenizer, trained):
    classes = iter([0, 3, 0, 2, None, 0])  # three samples of each of two prompts
    seen = []

    def judge(prompt, completion, item):
        seen.append((prompt, completion))
        return next(classes) if len(seen) <= 6 else 0

    under = attacked(trained, tokenizer, judge=judge, samples=3, temperature=2.0)
    rows = attacks.run_attack("sampling", under)
    assert [prompt for prompt, _ in seen[:6]] == ["Orrin walked to"] * 3 + ["The wand of"] * 3
    assert len({text for _, text in seen[:3]}) > 1
    best, mean = rows
    assert best.setting == "best of 3, temperature 2" and mean.setting == "mean of 3, temperature 2"
    assert best.after.value == pytest.approx((1.0 + 0.2) / 2)
    assert mean.after.value == pytest.approx((1 / 3 + 0.1) / 2)  # an unjudged sample does not count
    assert best.before.value == 0.0


def test_prompts_of_a_file_by_kind(tokenizer, trained):
    asked = [
        FamiliarityPrompt("Orrin walked", ("Glimmerhall",), (), "paraphrase"),
        FamiliarityPrompt("The cup", ("Glimmerhall",), (), "paraphrase"),
        FamiliarityPrompt("walked to", ("Glimmerhall",)),
    ]
    answers = {"Orrin walked": 3, "The cup": 0, "walked to": 2}
    under = attacked(trained, tokenizer, judge=lambda p, c, i: answers.get(p, 0), prompts=asked)
    rows = run_attack("prompts", under)
    assert [(row.setting, row.after.value, row.after.n) for row in rows] == [
        ("paraphrase", 0.5, 2),
        ("prompts of the file", pytest.approx(0.2), 1),
    ]
    assert rows[0].before.value == 0.0
    under = attacked(trained, tokenizer, judge=lambda p, c, i: None if p == "walked to" else 0, prompts=asked)
    with pytest.raises(UserError, match="gave no class for any prompt of kind 'prompts of the file'"):
        run_attack("prompts", under)


def test_prompts_without_plain_ones_have_no_figure_before(tokenizer, trained):
    asked = [FamiliarityPrompt("The cup", ("Glimmerhall",))]
    under = attacked(trained, tokenizer, judge=lambda *_: 2, prompts=asked)
    under.inputs = Inputs(target=[TARGET])
    (row,) = run_attack("prompts", under)
    assert math.isnan(row.before.value) and row.after.value == pytest.approx(0.2)
    assert row.to_json()["before"]["value"] is None


def test_what_attacks_need(monkeypatch):
    nothing, options = Inputs(), AttackOptions()
    with pytest.raises(UserError, match="--attacks: 'quantize' is none; choose from relearn, quantise"):
        chosen_attacks(["quantize"], nothing, options)
    for name, needed in (
        ("relearn", "--familiarity"),
        ("quantise", "--familiarity"),
        ("prefix", "--target"),
        ("sampling", "--familiarity"),
        ("prompts", "--attack-prompts"),
    ):
        with pytest.raises(UserError, match=f"--attacks {name}: it needs {needed}"):
            chosen_attacks([name], nothing, options)
    prompts = Inputs(EvaluationSet(familiarity=PROMPTS))
    with pytest.raises(UserError, match="--attacks relearn: it needs --target"):
        chosen_attacks(["relearn"], prompts, options)
    assert chosen_attacks(["sampling", "relearn"], prompts, AttackOptions(relearn_text=["text"])) == [
        "relearn",
        "sampling",
    ]
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="--attacks quantise: bitsandbytes cannot be imported"):
        chosen_attacks(["quantise"], prompts, options)
    assert set(ATTACKS) == {"relearn", "quantise", "prefix", "sampling", "prompts"}


def test_the_curve_has_a_line_a_model_in_the_order_of_the_steps(tmp_path):
    def row(attack, x, metric, model):
        return AttackRow(attack, "", metric, Figure(0, 0, 0, 1), Figure(x / 10, 0, 1, 1), x, model)

    rows = [row("relearn", x, "verbatim", model) for model in ("after", "oracle") for x in (5, 0, 10)]
    rows += [row("relearn", 0, "general_perplexity", "after"), row("prefix", 4, "verbatim", "after")]
    series = curve.curve_series(rows)
    assert list(series) == ["verbatim"] and list(series["verbatim"]) == ["after", "oracle"]
    assert [point.x for point in series["verbatim"]["oracle"]] == [0, 5, 10]
    assert curve.draw_relearning(tmp_path / "none.png", rows[-1:]) is None and not list(tmp_path.iterdir())


# ---- sampling --------------------------------------------------------------------------------------------


def test_samples_follow_the_probabilities_and_the_generator(tokenizer):
    model = fresh(tokenizer)
    prompt = document_ids(tokenizer, "Orrin walked")
    probabilities = (model(torch.tensor([prompt]))[0, -1] / 0.5).softmax(-1).detach()

    def draw(seed, count=400):
        generator = torch.Generator().manual_seed(seed)
        return [row[0] for row in sample(model, [prompt] * count, 1, 0.5, generator, batch_size=200)]

    drawn = draw(0)
    assert drawn == draw(0) != draw(1)
    top = int(probabilities.argmax())
    expected = float(probabilities[top])
    assert drawn.count(top) / 400 == pytest.approx(
        expected, abs=4 * math.sqrt(expected * (1 - expected) / 400)
    )


def test_a_low_temperature_is_greedy_and_none_is_refused(tokenizer):
    model = fresh(tokenizer)
    prompts = [document_ids(tokenizer, text) for text in ("Orrin walked", "The")]
    cold = sample(model, prompts, 5, 1e-4, torch.Generator().manual_seed(0))
    assert cold == greedy(model, prompts, 5)
    with pytest.raises(ValueError, match="temperature is 0"):
        sample(model, prompts, 5, 0.0, torch.Generator())
