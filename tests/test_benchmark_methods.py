"""benchmarks.methods: its losses are those of the papers, its rule takes the best, and wrong results fail."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_training import tiny_model

from benchmarks import methods, methods_measure, methods_search, methods_table, methods_world
from benchmarks.methods_list import METHODS
from benchmarks.methods_losses import (
    CombinedTargets,
    EditedTargets,
    OwnTargets,
    PreferenceTargets,
    TextTargets,
)
from benchmarks.methods_world import halves, hidden_rows
from whp_fast import demo
from whp_fast.corpus import Blocks
from whp_fast.demo import from_scratch
from whp_fast.errors import UserError
from whp_fast.prompts import EvaluationSet, FamiliarityPrompt

V, H, CONTEXT = 13, 6, 5
BLOCKS = Blocks.of(np.random.default_rng(0).integers(0, V, 3 * CONTEXT + 1).astype(np.uint16), CONTEXT)
NUMBERS = np.array([2, 3, 0])  # block 3 has one token, and nothing to predict


def drawn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


BASE, BASE_HEAD = drawn(len(BLOCKS.tokens), H, seed=1), drawn(V, H, seed=2)
REINFORCED, REINFORCED_HEAD = drawn(len(BLOCKS.tokens), H, seed=3), drawn(V, H, seed=4)


def texts():
    """Of each block that counts: its places in the batch and in the stream, and its next tokens."""
    at = 0
    for number in NUMBERS:
        block = torch.from_numpy(BLOCKS[number].astype(np.int64))
        if len(block) > 1:
            stream = slice(number * CONTEXT, number * CONTEXT + len(block) - 1)
            yield slice(at, at + len(block) - 1), stream, block[1:]
        at += len(block)


def nll(logits, following):
    return -logits.log_softmax(-1)[range(len(following)), following]


def npo(z, stream, y, number):
    """2 / beta log(1 + (p / p_base)^beta), p of the whole sequence."""
    ratio = (nll(z, y) - nll(BASE[stream] @ BASE_HEAD.T, y)).sum()
    return 2 / 0.3 * torch.log1p(torch.exp(-0.3 * ratio))


def simnpo(z, stream, y, number):
    return 2 / 2.5 * torch.log1p(torch.exp(-2.5 * (nll(z, y).mean() - 0.4)))


def undial(z, stream, y, number):
    target = BASE[stream] @ BASE_HEAD.T - 3.0 * torch.eye(V, dtype=torch.float64)[y]
    return -(target.softmax(-1) * z.log_softmax(-1)).sum()


def ce_u(z, stream, y, number):
    target = z.detach().masked_fill(torch.eye(V, dtype=torch.bool)[y], -math.inf).softmax(-1)
    return -(target * z.log_softmax(-1)).sum()


def rklu(z, stream, y, number):
    base, reinforced = BASE[stream] @ BASE_HEAD.T, REINFORCED[stream] @ REINFORCED_HEAD.T
    target = base - 2.0 * (reinforced - base).clamp(min=0)
    return (z.softmax(-1) * (z.log_softmax(-1) - target.log_softmax(-1))).sum()


def reference():
    """Of each block its negative log-likelihood under the base."""
    logits, tokens = BASE @ BASE_HEAD.T, torch.from_numpy(BLOCKS.tokens.astype(np.int64))
    sums = [nll(logits[i : i + 4], tokens[i + 1 : i + 5]).sum() for i in range(0, 15, 5)]
    return torch.stack([*sums, torch.zeros((), dtype=torch.float64)])


CASES = {
    "NPO": (npo, lambda: PreferenceTargets(BLOCKS, reference(), beta=0.3)),
    "SimNPO": (simnpo, lambda: PreferenceTargets(BLOCKS, None, beta=2.5, delta=0.4)),
    "UNDIAL": (undial, lambda: EditedTargets(BLOCKS, BASE, BASE_HEAD, strength=3.0)),
    "CE-U": (ce_u, lambda: OwnTargets(BLOCKS)),
    "RKLU": (
        rklu,
        lambda: CombinedTargets(BLOCKS, ((BASE, BASE_HEAD), (REINFORCED, REINFORCED_HEAD)), alpha=2.0),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_the_papers(name):
    formula, make = CASES[name]
    targets = make()
    inputs = [drawn(2 * CONTEXT + 1, H, seed=5).requires_grad_(), drawn(V, H, seed=6).requires_grad_()]
    hidden, head = inputs
    expected = sum(formula(hidden[places] @ head.T, stream, y, None) for places, stream, y in texts()) / 7
    found = targets.loss(
        hidden,
        head,
        targets.prepare(NUMBERS),
        num_items_in_batch=7,
        compute_dtype=None,
        chunk_mib=1,
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    for one, other in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_what_a_mean_is_over():
    assert TextTargets(BLOCKS).count(NUMBERS) == 8
    assert PreferenceTargets(BLOCKS, None, beta=1.0).count(NUMBERS) == 2


def test_nothing_to_predict_is_a_loss_of_zero():
    targets = PreferenceTargets(BLOCKS, None, beta=1.0)
    hidden = drawn(1, H).requires_grad_()
    how = dict(num_items_in_batch=1, compute_dtype=None, chunk_mib=1)
    assert targets.loss(hidden, BASE_HEAD, targets.prepare(np.array([3])), **how).item() == 0


def test_published_settings():
    """What a method's loss is at the base says which settings it was made with."""
    model = tiny_model().eval()
    tokens = np.random.default_rng(1).integers(0, 29, 24).astype(np.uint16)
    target = Blocks.of(tokens, 8)
    rows = hidden_rows(model, target)
    world = SimpleNamespace(target=target, retain=target, base_rows=rows, reinforced_rows=rows)
    z = rows[0] @ rows[1].T
    following = torch.from_numpy(tokens[1:].astype(np.int64))
    kept = [i for i in range(23) if i % 8 != 7]
    losses = nll(z[:-1], following)[kept]
    edited = (z[:-1] - 10 * torch.eye(29)[following])[kept].softmax(-1)
    expected = {
        "gradient ascent": [-losses.mean()],
        "GradDiff": [-losses.mean(), losses.mean()],
        "NPO": [20 * math.log(2), losses.mean()],
        "SimNPO": [
            0.125 * 2 / 4.5 * torch.log1p(torch.exp(-4.5 * losses.view(3, 7).mean(1))).mean(),
            losses.mean(),
        ],
        "UNDIAL": [-(edited * z[:-1][kept].log_softmax(-1)).sum(1).mean()],
        "RKLU": [0.0],
    }
    numbers = np.arange(3)
    for method in METHODS:
        if method.name not in expected:
            continue
        found = [
            o.weight
            * o.targets.loss(
                rows[0],
                rows[1],
                o.targets.prepare(numbers),
                num_items_in_batch=o.targets.count(numbers),
                compute_dtype=torch.float32,
                chunk_mib=1,
            )
            for o in method.objectives(world)
        ]
        wanted = [float(x) for x in expected[method.name]]
        assert [float(x) for x in found] == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        assert bool(method.retain) == (len(found) == 2)


def four(completion, probability, accuracy, perplexity):
    return dict(
        familiarity_completion=completion,
        familiarity_probability=probability,
        general_accuracy=accuracy,
        general_perplexity=perplexity,
    )


def test_score():
    base = four(0.9, 0.5, 0.8, 2.0)
    assert methods_search.score(base, base) == 0  # nothing forgotten
    assert methods_search.score(four(0, 0, 0.9, 1.5), base) == 1  # better than the base is as good
    assert methods_search.score(four(0, 0, 0.8, None), base) == 0  # a perplexity that is not finite
    assert methods_search.score(four(1.0, 0.9, 0.8, 2.0), base) == 0
    assert methods_search.score(four(0.45, 0.25, 0.4, 4.0), base) == pytest.approx(0.5)
    assert methods_search.score(four(0, 0, 0.4, 8.0), base) == pytest.approx(3 / (1 + 2 + 4))


def test_the_first_of_the_best_is_taken_and_none_that_diverged():
    rows = [{"status": "trained", "score": s} for s in (0.2, 0.7, 0.7)]
    assert methods_search.best(rows) == 1
    rows[1]["status"] = "diverged"
    assert methods_search.best(rows) == 2
    assert methods_search.best([{"status": "diverged", "score": 0.0}]) is None


def test_halves_share_nothing_and_do_not_depend_on_the_order():
    prompts = [FamiliarityPrompt(f"p{i}", ("x",)) for i in range(9)]
    data = EvaluationSet(prompts, prompts, prompts, [f"t{i}" for i in range(4)])
    search, report = halves(data)
    assert [len(search.familiarity), len(report.familiarity), len(search.texts)] == [5, 4, 2]
    assert {p.prompt for p in search.familiarity} ^ {p.prompt for p in report.familiarity} == {
        p.prompt for p in prompts
    }
    again, _ = halves(EvaluationSet(prompts[::-1], prompts, prompts, data.texts))
    assert set(again.familiarity) == set(search.familiarity)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The base, the oracle and two methods; then the same file continued with a third, which diverges."""
    folder = tmp_path_factory.mktemp("methods")
    words = ["--quick", "--folder", str(folder / "run"), "--json", str(folder / "out" / "methods.json")]
    real = methods_search.train

    def train(trainee, objectives, settings, **how):
        if isinstance(objectives[0].targets, OwnTargets) and settings.lr > 1e-4:
            raise UserError("unlearn: the loss (nan) of step 1 is not finite; lower it.")
        return real(trainee, objectives, settings, **how)

    with pytest.MonkeyPatch.context() as patch:
        few = {"trunk": from_scratch(steps=3, lr=3e-3), "branch": from_scratch(steps=8, lr=3e-3)}
        patch.setitem(demo.RECIPES, "tiny", dataclasses.replace(demo.RECIPES["tiny"], **few))
        patch.setattr(methods, "QUICK", methods.Plan("tiny", (1e-2, 1e-4), (2.0,), 3, 0.0))
        patch.setattr(methods_search, "train", train)
        patch.setattr(methods_measure, "RELEARN_STEPS", 2)
        patch.setattr(methods_measure, "_DISTANCE_BLOCKS", 8)
        assert methods.main([*words, "--methods", "task vector,WHP soft"]) == 0
        first = json.loads((folder / "out" / "methods.json").read_text())
        pictures = ["--pictures", str(folder / "pictures")]
        assert methods.main([*words, *pictures, "--continue", "--methods", "WHP soft,CE-U"]) == 0
    return first, json.loads((folder / "out" / "methods.json").read_text()), folder


def test_rows_of_models_and_of_every_setting(measured):
    first, found, _ = measured
    assert [row["method"] for row in found["rows"]] == ["base", "oracle", "task vector", "WHP soft", "CE-U"]
    assert found["rows"][:4] == first["rows"] and found["search"][:3] == first["search"]
    assert [(row["method"], row["setting"]) for row in found["search"]] == [
        ("task vector", 2.0),
        ("WHP soft", 1e-2),
        ("WHP soft", 1e-4),
        ("CE-U", 1e-2),
        ("CE-U", 1e-4),
    ]
    rows = {row["method"]: row for row in found["rows"]}
    assert abs(rows["oracle"]["kl_target"]) < 1e-6 and rows["base"]["kl_target"] > 0.01
    assert rows["WHP soft"]["kl_target"] != rows["base"]["kl_target"]
    low, high = rows["base"]["intervals"]["kl_target"]
    assert low < rows["base"]["kl_target"] < high
    assert found["header"]["seconds"] > first["header"]["seconds"] > 0
    assert found["header"]["training"]["steps"] == 3


def test_a_training_that_diverges_is_a_row(measured):
    _, found, _ = measured
    diverged, kept = found["search"][-2:]
    assert (diverged["status"], diverged["score"], diverged["general_accuracy"]) == ("diverged", 0, None)
    assert kept["status"] == "trained" and found["rows"][-1]["setting"] == kept["setting"]


def test_tables_show_the_rows(measured):
    _, found, _ = measured
    lines = methods_table.markdown(found["rows"]).splitlines()
    for line, row in zip(lines[2:], found["rows"], strict=True):
        shown = dict(zip(methods_table.COLUMNS, [cell.strip() for cell in line.strip("|").split("|")]))
        assert shown["method"] == row["method"]
        for key in ("familiarity_probability", "general_accuracy", "kl_general"):
            assert float(shown[key]) == pytest.approx(row[key], abs=5.1e-4)
        assert shown["setting"] == ("–" if row["setting"] is None else f"{row['setting']:g} ¹")
        assert (shown["train_seconds"] == "–") == (row["train_seconds"] is None)


def test_pictures(measured):
    _, _, folder = measured
    for name in ("methods_forget_keep.png", "methods_return.png"):
        assert (folder / "pictures" / name).read_bytes()[:4] == b"\x89PNG"


def test_a_world_that_was_not_learnt_fails(measured, monkeypatch):
    _, _, folder = measured
    monkeypatch.setattr(methods, "QUICK", methods.Plan("tiny", (1e-2,), (2.0,), 3, 0.5))
    monkeypatch.setattr(methods_world, "make_demo", lambda *_: {})
    with pytest.raises(SystemExit, match="wrong: the base completes 0.00"):
        methods.main(["--quick", "--folder", str(folder / "run"), "--methods", "CE-U"])


def test_what_the_user_can_mend(measured, capsys, tmp_path):
    _, _, folder = measured
    words = ["--quick", "--folder", str(tmp_path / "run")]
    assert methods.main([*words, "--methods", "NPOO"]) == 2
    assert "there is no 'NPOO'" in capsys.readouterr().err
    assert methods.main([*words, "--continue"]) == 2 and "give --json" in capsys.readouterr().err
    file = str(folder / "out" / "methods.json")
    assert methods.main([*words, "--continue", "--seed", "1", "--json", file]) == 2
    assert "other settings" in capsys.readouterr().err
    assert methods.main([*words, "--world", str(tmp_path)]) == 2
    assert "no finished world" in capsys.readouterr().err
