"""The examples of ``examples/trainers``: each runs, and gives what its trainer or the formula gives.

Trainer and SFTTrainer are the real ones. torchtitan is not among the test requirements: it brings more than
forty packages along and needs Python 3.11. Its signature is tested everywhere, by a loop that calls a loss
as its trainer does; its real components where it is installed, for which this is enough: `pip install
--no-deps torchtitan==0.3.0 spmd_types==0.2.3 tyro`.
"""

import contextlib
import copy
import importlib.util
import io
import os
from functools import cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
from torch.nn import functional

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "trainers"
NAMES = ("hf_trainer", "open_unlearning", "plain_loop", "torchtitan_loss", "trl_sft")
DIVERGENCES = ("hard", "forward_kl", "reverse_kl")
ALPHA = 5.0

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL's, about compute_loss_func
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Also where another test has imported the library before."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)


@cache
def example(name):
    spec = importlib.util.spec_from_file_location(f"examples_trainers_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def outcome(name):
    """What main() returns and prints; once for all tests."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        results = example(name).main()
    return results, printed.getvalue().splitlines()


# --------------------------------------------------------------------------------------------- plain formulas


def rows_of(logits, labels):
    """The trained rows [n, V] in float64 and their labels [n], for labels aligned with the input."""
    kept = labels[:, 1:] != -100
    return logits[:, :-1][kept].double(), labels[:, 1:][kept]


def whp_rows(divergence, student, base, reinforced):
    target = base - ALPHA * torch.relu(reinforced - base)
    if divergence == "hard":
        return functional.cross_entropy(student, target.argmax(-1), reduction="none")
    log_s, log_t = torch.log_softmax(student, -1), torch.log_softmax(target, -1)
    if divergence == "forward_kl":
        return (log_t.exp() * (log_t - log_s)).sum(-1)
    return (log_s.exp() * (log_s - log_t)).sum(-1)


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.reshape(-1).double() for p in model.parameters()])


def assert_close(value, truth, bound=1e-5):
    """Norm of the difference relative to the norm of the truth. The same bound must refuse a truth that is
    doubled, so the truth is not about zero."""
    value, truth = torch.as_tensor(value).detach().double(), torch.as_tensor(truth).detach().double()
    assert value.shape == truth.shape
    assert truth.norm() > 1e-3
    assert (value - truth).norm() <= bound * truth.norm(), f"{value} is not {truth}"


def perturbed(model, seed=1, scale=0.1):
    """A copy with other weights, so that no two models of a test agree."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def batch_of(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


# ----------------------------------------------------------------------------------------------- the examples


def test_every_example_is_tested():
    assert tuple(sorted(path.stem for path in FOLDER.glob("*.py"))) == NAMES


@pytest.mark.parametrize("name", ["hf_trainer", "torchtitan_loss", "trl_sft"])
def test_losses_go_down(name):
    results, lines = outcome(name)
    told = [line for line in lines if "->" in line]
    assert len(told) == len(results) >= 2
    for (first, last), line in zip(results, told):
        assert last < 0.6 * first and line.endswith(f"loss {first:.3f} -> {last:.3f}")


def test_the_plain_loop_unlearns_one_text_and_keeps_the_other():
    results, lines = outcome("plain_loop")
    of_book, of_other = results["base"]
    for name in ("unlearned, hard", "unlearned, forward_kl"):
        book, other = results[name]
        assert book < 0.3 * of_book and other > 0.9 * of_other
        assert any(name in line and f"{book:.3f}" in line for line in lines)


def test_every_method_of_open_unlearning_forgets_and_keeps():
    results, lines = outcome("open_unlearning")
    of_forget, of_retain = results.pop("before")
    assert len(results) == 5
    for name, (forget, retain) in results.items():
        assert forget > of_forget + 0.5 and retain < of_retain + 0.2, name
        assert any(name in line and f"{forget:.3f}" in line for line in lines)


# ------------------------------------------------------------------------------------------------ plain loop


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_plain_loss_is_the_formula(divergence):
    from whp_kernels import Whp, linear_combination_loss

    plain = example("plain_loop")
    torch.manual_seed(0)
    student, base, reinforced = (plain.TinyModel() for _ in range(3))
    input_ids = torch.randint(0, 80, (3, 7))
    labels = input_ids.clone()
    labels[1, :5], labels[2] = -100, -100
    loss = plain.whp_loss(student, base, reinforced, input_ids, labels, divergence, ALPHA)
    logits = [model.lm_head(model.hidden_states(input_ids)) for model in (student, base, reinforced)]
    rows = [rows_of(values, labels)[0] for values in logits]
    truth = whp_rows(divergence, rows[0], rows[1].detach(), rows[2].detach()).mean()
    assert_close(loss, truth)
    assert_close(gradients(loss, student), gradients(truth, student))
    # the base model's text in another order, and one token without a counterpart
    order = torch.tensor([2, 0, 1])
    where = torch.arange(21).view(3, 7)[order.argsort()]
    where[0, 0] = -1
    aligned = linear_combination_loss(
        student.hidden_states(input_ids),
        student.lm_head.weight,
        labels,
        shift_labels=True,
        teachers=[
            (m.hidden_states(t), m.lm_head.weight)
            for m, t in ((base, input_ids[order]), (reinforced, input_ids))
        ],
        teacher_rows=(where, None),
        combination=Whp(ALPHA),
        divergence=divergence,
    )
    assert_close(aligned, whp_rows(divergence, *(values[1:] for values in rows)).mean())


# --------------------------------------------------------------------------------------- Hugging Face Trainer

TRAINED = (3, 17, 1, 9)  # tokens of each row: micro-batches of one row weigh differently


def uneven_text(hf):
    text = hf.tiny_text(rows=len(TRAINED))
    for row, count in zip(text, TRAINED):
        row["labels"][: len(row["labels"]) - count] = -100
    return text


def one_step(hf, folder, trainer=None, *, accumulate=4, **choices):
    """Weights after one step of gradient descent with rate 1, minus those before."""
    from transformers import Trainer

    model = hf.tiny_model()
    before = torch.cat([p.detach().reshape(-1).double() for p in model.parameters()])
    args = hf.arguments(
        str(folder),
        per_device_train_batch_size=len(TRAINED) // accumulate,
        gradient_accumulation_steps=accumulate,
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
    )
    (trainer or Trainer)(model, args, train_dataset=uneven_text(hf), **choices).train()
    return torch.cat([p.detach().reshape(-1).double() for p in model.parameters()]) - before


@cache
def plain_step():
    """The same step by hand, with torch's cross-entropy over all rows."""
    hf = example("hf_trainer")
    model, batch = hf.tiny_model(), batch_of(uneven_text(hf))
    logits = model(input_ids=batch["input_ids"]).logits
    kept = batch["labels"][:, 1:] != -100
    assert int(kept.sum()) == sum(TRAINED)
    return -gradients(functional.cross_entropy(logits[:, :-1][kept], batch["labels"][:, 1:][kept]), model)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_accumulation_equals_one_batch_and_torch(tmp_path, accumulate):
    hf = example("hf_trainer")
    step = one_step(hf, tmp_path, accumulate=accumulate, compute_loss_func=hf.label_loss)
    assert_close(step, plain_step())
    assert (step - plain_step()).abs().max() < 1e-6


def test_a_mean_of_micro_batches_would_be_another_step(tmp_path):
    hf = example("hf_trainer")

    def forgetful(outputs, labels, num_items_in_batch=None):
        return hf.label_loss(outputs, labels) / len(TRAINED)

    step = one_step(hf, tmp_path, compute_loss_func=forgetful)
    assert (step - plain_step()).norm() > 0.1 * plain_step().norm()


def test_in_place_changes_the_logits_and_nothing_else(tmp_path):
    from whp_kernels import combination_loss

    hf = example("hf_trainer")

    def apart(outputs, labels, num_items_in_batch=None):
        return combination_loss(
            outputs.logits, labels, shift_labels=True, num_items_in_batch=num_items_in_batch
        )

    step = one_step(hf, tmp_path, compute_loss_func=hf.label_loss)
    assert torch.equal(one_step(hf, tmp_path, compute_loss_func=apart), step)
    batch = batch_of(uneven_text(hf))
    outputs = hf.tiny_model()(input_ids=batch["input_ids"])
    logits = outputs.logits.detach().clone().requires_grad_()
    rows, labels = rows_of(logits, batch["labels"])
    (functional.cross_entropy(rows, labels, reduction="sum") / 7).backward()
    hf.label_loss(outputs, batch["labels"], num_items_in_batch=7)
    assert_close(outputs.logits, logits.grad)


def test_evaluation_keeps_the_logits(tmp_path):
    from transformers import Trainer

    hf = example("hf_trainer")
    model, text = hf.tiny_model(), uneven_text(hf)
    args = hf.arguments(str(tmp_path), per_device_eval_batch_size=len(text), use_cpu=True)
    trainer = Trainer(model, args, compute_loss_func=hf.label_loss)
    predicted = trainer.predict(text)
    batch = batch_of(text)
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"]).logits
    assert_close(torch.from_numpy(predicted.predictions), logits)
    assert_close(predicted.metrics["test_loss"], functional.cross_entropy(*rows_of(logits, batch["labels"])))


def test_generic_labels_stand_where_trainer_looks_for_them():
    hf = example("hf_trainer")
    base, reinforced = (perturbed(hf.tiny_model(), seed).eval() for seed in (1, 2))
    batch = batch_of(uneven_text(hf))
    labels = hf.generic_labels_of(base, reinforced, batch, ALPHA)
    with torch.no_grad():
        v_base, v_reinforced = (model(input_ids=batch["input_ids"]).logits for model in (base, reinforced))
    taught = (v_base - ALPHA * torch.relu(v_reinforced - v_base)).argmax(-1)
    kept = batch["labels"] != -100
    kept[:, 0] = False
    assert torch.equal(labels[:, 1:][kept[:, 1:]], taught[:, :-1][kept[:, 1:]])
    assert (labels[~kept] == -100).all()
    assert not torch.equal(taught[:, :-1][kept[:, 1:]], v_base.argmax(-1)[:, :-1][kept[:, 1:]])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_whp_trainer_gives_the_formula_and_accumulates(tmp_path, divergence):
    from whp_kernels import Whp

    hf = example("hf_trainer")
    base, reinforced = (perturbed(hf.tiny_model(), seed).eval() for seed in (1, 2))
    step = one_step(
        hf,
        tmp_path,
        hf.WhpTrainer,
        teachers=(base, reinforced),
        combination=Whp(ALPHA),
        divergence=divergence,
    )
    model, batch = hf.tiny_model(), batch_of(uneven_text(hf))
    logits = [m(input_ids=batch["input_ids"]).logits for m in (model, base, reinforced)]
    rows = [rows_of(values, batch["labels"])[0] for values in logits]
    rows[1:] = [values.detach() for values in rows[1:]]
    assert_close(step, -gradients(whp_rows(divergence, *rows).mean(), model))


# -------------------------------------------------------------------------------------------------- TRL


def sft(folder, trainer=None, *, model=None, changes=None, **choices):
    trl = example("trl_sft")
    tokenizer = trl.tiny_tokenizer()
    args = trl.arguments(
        str(folder),
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",
        max_steps=3,
        use_cpu=True,
        **changes or {},
    )
    return (trainer or trl.CombinationSFTTrainer)(
        model=model or trl.tiny_model(tokenizer),
        args=args,
        train_dataset=trl.tiny_text(),
        eval_dataset=trl.tiny_text(),
        processing_class=tokenizer,
        **choices,
    )


def ways(folder, **changes):
    """TRL's own trainer, the example's, and TRL's with the loss function of hf_trainer.py."""
    from trl import SFTTrainer

    theirs, ours = sft(folder, SFTTrainer, changes=changes), sft(folder, changes=changes)
    label_loss = example("hf_trainer").label_loss
    changes = {**changes, "loss_type": "nll"}  # TRL 1.14 has another default, which makes no logits
    return theirs, ours, sft(folder, SFTTrainer, changes=changes, compute_loss_func=label_loss)


PACKED = {"packing": True, "packing_strategy": "wrapped", "max_length": 12}


@pytest.mark.parametrize("items, changes", [(None, {}), (17, {}), (17, PACKED)])
def test_the_loss_of_a_batch_is_that_of_trl(tmp_path, items, changes):
    theirs, *others = ways(tmp_path, **changes)
    batch = next(iter(theirs.get_train_dataloader()))
    assert (batch["labels"] == -100).any() and (batch["labels"] != -100).sum() > 4
    items = None if items is None else torch.tensor(items)
    loss = theirs.compute_loss(theirs.model, dict(batch), num_items_in_batch=items)
    truth = gradients(loss, theirs.model)
    for trainer in others:
        value = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
        assert_close(value, loss)
        assert_close(gradients(value, trainer.model), truth)


def test_training_is_that_of_trl(tmp_path):
    runs = []
    for trainer in ways(tmp_path):
        trainer.train()
        losses = torch.tensor([row["loss"] for row in trainer.state.log_history if "loss" in row])
        weights = torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])
        runs.append((losses, weights, trainer.evaluate()["eval_loss"]))
    assert len(runs[0][0]) == 3 and runs[0][0][2] < runs[0][0][0]
    for run in runs[1:]:
        for value, truth in zip(run, runs[0]):
            assert_close(value, truth)


def test_several_ranks_are_scaled_as_by_trl(tmp_path, monkeypatch):
    theirs, ours, _ = ways(tmp_path)
    batch = next(iter(theirs.get_train_dataloader()))
    items = torch.tensor(40)
    one = ours.compute_loss(ours.model, dict(batch), num_items_in_batch=items)
    monkeypatch.setattr(type(ours.accelerator), "num_processes", 2)
    value = ours.compute_loss(ours.model, dict(batch), num_items_in_batch=items)
    assert_close(value, 2 * one)
    assert_close(value, theirs.compute_loss(theirs.model, dict(batch), num_items_in_batch=items))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_sft_with_teachers_gives_the_formula(tmp_path, divergence):
    from whp_kernels import Whp

    trl = example("trl_sft")
    base, reinforced = (perturbed(trl.tiny_model(trl.tiny_tokenizer()), seed) for seed in (1, 2))
    trainer = sft(tmp_path, teachers=(base, reinforced), combination=Whp(ALPHA), divergence=divergence)
    batch = dict(next(iter(trainer.get_train_dataloader())))
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    labels = batch.pop("labels")
    logits = [model(**batch).logits for model in (trainer.model, base, reinforced)]
    assert_close(outputs.logits, logits[0])
    student, *teachers = (rows_of(values, labels)[0] for values in logits)
    truth = whp_rows(divergence, student, *(values.detach() for values in teachers)).mean()
    assert_close(loss, truth)
    assert_close(gradients(loss, trainer.model), gradients(truth, trainer.model))


# -------------------------------------------------------------------------------------------- OpenUnlearning


def kl_rows(target, student):
    log_t, log_s = torch.log_softmax(target, -1), torch.log_softmax(student, -1)
    return (log_t.exp() * (log_t - log_s)).sum(-1)


def npo(trainer, student, reference, labels, beta=0.3):
    def nll(values):  # [B]
        kept = labels[:, 1:] != -100
        each = functional.cross_entropy(
            values[:, :-1].double().transpose(1, 2), labels[:, 1:].where(kept, 0), reduction="none"
        )
        return (each * kept).sum(-1)

    return -(2 / beta) * functional.logsigmoid(beta * (nll(student) - nll(reference))).mean()


def undial(trainer, student, reference, labels, beta=3.0):
    rows, taught = rows_of(student, labels)
    target = rows_of(reference, labels)[0] - beta * functional.one_hot(taught, student.shape[-1])
    return -(torch.softmax(target, -1) * torch.log_softmax(rows, -1)).sum(-1).mean()


def grad_diff(trainer, student, reference, labels):
    return -functional.cross_entropy(*rows_of(student, labels))


METHODS = {
    "GradDiff": ("GradDiff", {}, grad_diff),
    "NPO": ("NPO", {"beta": 0.3}, npo),
    "UNDIAL": ("UNDIAL", {"beta": 3.0}, undial),
    **{f"WHP, {divergence}": ("WHP", {"divergence": divergence}, divergence) for divergence in DIVERGENCES},
}


def unlearn_trainer(folder, method, choices):
    """A trainer whose model differs from its reference, and a batch with prompts and padding."""
    module = example("open_unlearning")
    reference = module.tiny_model()
    if method == "WHP":
        choices = {**choices, "reinforced": perturbed(reference, 2)}
    trainer = getattr(module, method)(
        perturbed(reference, 1),
        module.arguments(str(folder), use_cpu=True),
        train_dataset=module.ForgetRetain(module.tiny_text(0, 1), module.tiny_text(1, 2)),
        data_collator=module.collate,
        gamma=0.7,
        alpha=1.3,
        reference=reference,
        **choices,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    lengths = batch["forget"]["attention_mask"].sum(-1)
    assert len(set(lengths.tolist())) > 1 and (batch["forget"]["labels"] != -100).sum() > 8
    return trainer, batch


def logits_of(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("retain", ["NLL", "KL"])
@pytest.mark.parametrize("name", METHODS)
def test_unlearning_methods_give_the_formula(tmp_path, name, retain):
    method, choices, formula = METHODS[name]
    trainer, batch = unlearn_trainer(tmp_path, method, {**choices, "retain_loss_type": retain})
    loss = trainer.compute_loss(trainer.model, batch)
    forget, labels = batch["forget"], batch["forget"]["labels"]
    student, reference = logits_of(trainer.model, forget), logits_of(trainer.reference, forget).detach()
    if isinstance(formula, str):
        reinforced = logits_of(trainer.reinforced, forget).detach()
        truth = whp_rows(formula, *(rows_of(v, labels)[0] for v in (student, reference, reinforced))).mean()
    else:
        truth = formula(trainer, student, reference, labels)
    kept = batch["retain"]
    rows, taught = rows_of(logits_of(trainer.model, kept), kept["labels"])
    if retain == "NLL":
        retain_loss = functional.cross_entropy(rows, taught)
    else:
        target = rows_of(logits_of(trainer.reference, kept), kept["labels"])[0].detach()
        retain_loss = kl_rows(target, rows).mean()
    truth = 0.7 * truth + 1.3 * retain_loss
    assert_close(loss, truth)
    assert_close(gradients(loss, trainer.model), gradients(truth, trainer.model), 2e-5)


@pytest.mark.parametrize("name", METHODS)
def test_padding_adds_nothing(tmp_path, name):
    method, choices, _ = METHODS[name]
    trainer, batch = unlearn_trainer(tmp_path, method, {**choices, "retain_loss_type": "KL"})
    fill = {"input_ids": 5, "attention_mask": 0, "labels": -100}
    padded = {
        part: {key: functional.pad(value, (0, 6), value=fill[key]) for key, value in values.items()}
        for part, values in batch.items()
    }
    assert_close(
        trainer.compute_loss(trainer.model, padded), trainer.compute_loss(trainer.model, batch).detach(), 1e-6
    )


def test_no_logits_of_a_batch_are_made(tmp_path):
    trainer, batch = unlearn_trainer(tmp_path, "WHP", {})
    positions = []
    for model in (trainer.model, trainer.reference, trainer.reinforced):
        model.lm_head.register_forward_hook(lambda module, inputs, logits: positions.append(logits.shape[1]))
    trainer.compute_loss(trainer.model, batch)
    assert positions == [1, 1]  # forget and retain


def test_the_reference_is_made_only_where_it_is_needed(tmp_path):
    module = example("open_unlearning")
    args = module.arguments(str(tmp_path), use_cpu=True)
    assert module.GradDiff(module.tiny_model(), args).reference is None
    for method, choices in ((module.GradDiff, {"retain_loss_type": "KL"}), (module.NPO, {})):
        trainer = method(module.tiny_model(), args, **choices)
        model, reference = trainer.model.state_dict(), trainer.reference.state_dict()
        assert all(torch.equal(model[key], reference[key]) for key in model)
        assert trainer.reference is not trainer.model
    with pytest.raises(ValueError, match="retain_loss_type is 'JSD'"):
        module.GradDiff(module.tiny_model(), args, retain_loss_type="JSD")


# ------------------------------------------------------------------------------------------------ torchtitan


def shifted_rows(values, labels):
    return values[labels != -100].double()


def titan_case():
    """Two micro-batches of a step, models, and the number of trained tokens of both."""
    titan = example("torchtitan_loss")
    torch.manual_seed(0)
    model = titan.TinyModel()
    [micro_batches] = titan.tiny_batches(1)
    counts = [int((labels != -100).sum()) for _, labels in micro_batches]
    assert counts[0] != counts[1]
    return titan, model, perturbed(model, 1), perturbed(model, 2), micro_batches, torch.tensor(sum(counts))


def titan_cross_entropy(model, micro_batches, count):
    total = sum(
        functional.cross_entropy(shifted_rows(model(tokens), labels), labels[labels != -100], reduction="sum")
        for tokens, labels in micro_batches
    )
    return total / count


def step_of(model, loss_fn, micro_batches, count, teachers=None):
    """Loss and gradients of a step, as torchtitan's trainer forms them."""
    model.zero_grad()
    total = 0.0
    for tokens, labels in micro_batches:
        with torch.no_grad():
            loss_inputs = {name: teacher(tokens) for name, teacher in (teachers or {}).items()}
        loss, metrics = loss_fn(model(tokens), labels, count, **loss_inputs)
        assert metrics == {}
        loss.backward()
        total += loss.detach()
    return total, torch.cat([p.grad.reshape(-1).double() for p in model.parameters()])


def test_the_signature_of_torchtitan():
    titan, model, _, _, micro_batches, count = titan_case()
    total, step = step_of(model, titan.label_loss, micro_batches, count)
    truth = titan_cross_entropy(model, micro_batches, count)
    assert_close(total, truth)
    assert_close(step, gradients(truth, model))
    tokens, labels = micro_batches[0]
    summed, _ = titan.label_loss(model(tokens), labels, positions=None)
    assert_close(summed, titan_cross_entropy(model, micro_batches[:1], 1))


def check_whp_of_titan(loss_fn, divergence, model, base, reinforced, micro_batches, count):
    kept = [(m(tokens), labels) for tokens, labels in micro_batches for m in (model, base, reinforced)]
    rows = [shifted_rows(values, labels) for values, labels in kept]
    truth = sum(
        whp_rows(divergence, student, b.detach(), r.detach()).sum()
        for student, b, r in zip(rows[::3], rows[1::3], rows[2::3])
    )
    truth = truth / count
    truth_step = gradients(truth, model)
    for m in (model, base, reinforced):
        m._skip_lm_head = True
    total, step = step_of(
        model, loss_fn, micro_batches, count, {"base_hidden": base, "reinforced_hidden": reinforced}
    )
    assert_close(total, truth)
    assert_close(step, truth_step)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_whp_with_the_signature_of_torchtitan(divergence):
    titan, model, base, reinforced, micro_batches, count = titan_case()
    loss = titan.WhpLoss(base.lm_head.weight, reinforced.lm_head.weight, alpha=ALPHA, divergence=divergence)

    def loss_fn(*args, **loss_inputs):
        return loss(*args, lm_head=model.lm_head.weight, **loss_inputs)

    check_whp_of_titan(loss_fn, divergence, model, base, reinforced, micro_batches, count)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_component_equals_that_of_torchtitan(chunked, compiled):
    library = pytest.importorskip("torchtitan.components.loss")
    from torchtitan.config import CompileConfig

    titan, model, _, _, micro_batches, count = titan_case()
    model._skip_lm_head = chunked
    steps = []
    for component in (library.CrossEntropyLoss, titan.titan_losses().FusedCrossEntropy):
        config = component.Config(global_vocab_size=64)
        if chunked:
            config = library.ChunkedLossWrapper.Config(num_chunks=4, loss_fn=config)
        loss_fn = config.build(compile_config=CompileConfig(enable=compiled, backend="aot_eager"))
        if chunked:
            loss_fn.set_lm_head(model.lm_head)
        steps.append(step_of(model, loss_fn, micro_batches, count))
    for value, truth in zip(steps[1], steps[0]):
        assert_close(value, truth)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_component_with_teachers_gives_the_formula(divergence):
    pytest.importorskip("torchtitan.components.loss")
    titan, model, base, reinforced, micro_batches, count = titan_case()
    loss_fn = titan.titan_losses().WhpFromHidden.Config(alpha=ALPHA, divergence=divergence).build()
    loss_fn.set_lm_head(model.lm_head)
    loss_fn.set_teacher_heads(base.lm_head.weight, reinforced.lm_head.weight)
    check_whp_of_titan(loss_fn, divergence, model, base, reinforced, micro_batches, count)


def test_a_sharded_vocabulary_is_refused_by_the_component():
    pytest.importorskip("torchtitan.components.loss")
    titan, model, _, _, [(tokens, labels), _], count = titan_case()
    loss_fn = titan.titan_losses().FusedCrossEntropy.Config(global_vocab_size=64).build()
    with pytest.raises(ValueError, match="logits have 32 columns, the vocabulary 64"):
        loss_fn(model(tokens)[..., :32], labels, count)
