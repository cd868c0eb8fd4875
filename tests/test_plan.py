"""Planned bytes against real tensors, planned work against the engine's steps, and what the command says."""

import dataclasses
import functools
import json
import math

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_world import make_world
from torch.profiler import ProfilerActivity, profile
from whp_kernels.losses import linear_combination_loss

from whp_fast import (
    adapters,
    plan,
    plan_activations,
    plan_gpus,
    plan_job,
    plan_memory,
    plan_setup,
    plan_table,
)
from whp_fast.config import MemoryConfig, ReinforceConfig
from whp_fast.engine import plan_steps
from whp_fast.errors import UserError
from whp_fast.model import Llama
from whp_fast.model_config import LlamaConfig
from whp_fast.plan_setup import Setup
from whp_fast.trainee import Trainee

WIDE = LlamaConfig(4000, 192, 512, 4, 6, 2)
DEEP = LlamaConfig(2000, 128, 384, 6, 4)
FAMILIES = {
    "llama": WIDE,
    "tied": LlamaConfig(1001, 64, 160, 2, 4, tie_word_embeddings=True),
    "biased": LlamaConfig(1001, 64, 160, 2, 4, attention_bias=True),
    "qwen2": LlamaConfig(1001, 64, 160, 3, 4, 2, model_type="qwen2"),
    "qwen3": LlamaConfig(1001, 64, 160, 8, 4, 2, head_dim=32, model_type="qwen3"),
}
LLAMA = plan.PRESETS["llama2_7b"]
TOKENS = 3_100_000
ON_PRESET = ["--preset", "llama2_7b", "--tokens", str(TOKENS)]


def job(*words):
    """The job of the paper for Llama 2 7B, with some settings (``--section.key=value``) changed."""
    changes = [word.removeprefix("--").split("=") for word in words]
    changes = {key: yaml.safe_load(value) for key, value in changes}
    return plan_job.apply_changes(_paper_job(), 1, [changes])[0]


@functools.cache
def _paper_job():
    return plan.job_and_shape([], "llama2_7b")[0]


def stage_plan(stage, *words, gpu="H100", gpus=1):
    return plan_job.plan_stage(stage, job(*words), LLAMA, TOKENS, plan_gpus.find_gpu(gpu), gpus)


def real_model(shape, dtype="float32"):
    torch.manual_seed(0)
    model = Llama(shape).to(getattr(torch, dtype))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def trainee(shape, memory, compute_dtype, adapter=None):
    dtype = memory.weights_dtype(compute_dtype) if adapter is None else compute_dtype
    model = real_model(shape, dtype)
    if adapter is not None:
        model.requires_grad_(False)
        targets = memory.lora_targets
        adapters.add_adapter(model, adapter, rank=memory.lora_rank, alpha=memory.lora_alpha, targets=targets)
        adapters.use_adapter(model, adapter)
    dtype = getattr(torch, compute_dtype)
    return Trainee(model, ReinforceConfig(), memory, compute_dtype=dtype, adapter=adapter)


def micro_batch(trainee, blocks, context, chunk_mib=1):
    """Forward and backward as the engine does them."""
    vocabulary = trainee.model.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, vocabulary, (blocks, context), generator=generator)
    labels = input_ids.roll(-1, dims=1)
    labels[:, -1] = -100
    with trainee.forward():
        hidden = trainee.model.hidden_states(input_ids)
    linear_combination_loss(
        hidden,
        trainee.model.lm_head_weight,
        labels,
        num_items_in_batch=labels.numel(),
        compute_dtype=trainee.compute_dtype,
        chunk_mib=chunk_mib,
    ).backward()


def optimizer_states(trainee):
    """(name, tensor) of all that the optimizer keeps after a step."""
    trainee.optimizer.step()
    states = [trainee.optimizer.state[p] for p in trainee.trained.values()]
    return [(name, t) for state in states for name, t in state.items() if isinstance(t, torch.Tensor)]


def bytes_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


# Exact parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_parameter_count(name):
    with torch.device("meta"):
        model = Llama(FAMILIES[name])
    assert plan_setup.parameter_count(FAMILIES[name]) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", plan.PRESETS)
def test_presets_are_the_published_sizes(name):
    published = {
        "llama2_7b": 6_738_415_616,
        "llama2_13b": 13_015_864_320,
        "llama3_8b": 8_030_261_248,
        "llama3_1b": 1_235_814_400,
        "tinyllama": 1_100_048_384,
        "mistral_7b": 7_241_732_096,
        "qwen2_7b": 7_615_616_512,
    }
    assert plan_setup.parameter_count(plan.PRESETS[name]) == published[name]


@pytest.mark.parametrize(
    "shape", [WIDE, FAMILIES["qwen3"], FAMILIES["biased"]], ids=["wide", "qwen3", "biased"]
)
@pytest.mark.parametrize(
    "memory, compute_dtype",
    [
        (MemoryConfig(), "float32"),
        (MemoryConfig(weights="float32", moments="bfloat16"), "bfloat16"),
        (MemoryConfig(moments="int8"), "bfloat16"),
        (MemoryConfig(moments="int8", gradients="bfloat16"), "bfloat16"),
    ],
    ids=["float32", "bfloat16 moments", "int8 moments", "int8 moments, bfloat16 gradients"],
)
def test_static_parts_are_the_real_tensors(shape, memory, compute_dtype):
    real = trainee(shape, memory, compute_dtype)
    micro_batch(real, 1, 16)
    parts = plan_memory.training_parts(Setup(shape, memory, compute_dtype, 1, 16))
    assert parts["weights"] == bytes_of(real.model.parameters())
    assert parts["gradients"] == bytes_of(p.grad for p in real.trained.values())
    states = optimizer_states(real)
    assert parts["remainder"] == bytes_of(t for name, t in states if name == "remainder")
    assert parts["moments"] == bytes_of(t for name, t in states if name.startswith("exp_avg"))


def test_adapters_are_the_real_tensors():
    memory = MemoryConfig(lora_rank=8, lora_targets=["q_proj", "down_proj"])
    real = trainee(WIDE, memory, "bfloat16", adapter="reinforce")
    micro_batch(real, 1, 16)
    micro_batch(real, 1, 16)
    parts = plan_memory.training_parts(Setup(WIDE, memory, "bfloat16", 1, 16))
    frozen = [p for name, p in real.model.named_parameters() if name not in real.trained]
    assert parts["weights"] == bytes_of(frozen)
    assert parts["adapters"] == bytes_of(real.trained.values())
    assert parts["gradients"] == bytes_of(p.grad for p in real.trained.values())
    assert parts["moments"] == bytes_of(t for _, t in optimizer_states(real))
    assert parts["remainder"] == parts["fsdp"] == 0


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_bytes_are_the_real_ones(kind):
    pytest.importorskip("bitsandbytes")
    from whp_fast.quantised import model_bytes, quantise_

    with torch.device("meta"):
        model = quantise_(Llama(WIDE).to(torch.bfloat16), kind)
    assert plan_memory.frozen_bytes(WIDE, kind, "bfloat16") == model_bytes(model)


@given(shards=st.integers(1, 9), name=st.sampled_from(sorted(FAMILIES)))
@settings(max_examples=20, deadline=None)
def test_the_first_process_holds_the_ceiling_of_the_rows(shards, name):
    with torch.device("meta"):
        model = Llama(FAMILIES[name])
    expected = sum(math.ceil(len(p) / shards) * p[0].numel() for p in model.parameters())
    weights = [*plan_setup.projections(FAMILIES[name]), *plan_setup.outer_weights(FAMILIES[name])]
    assert plan_setup.numel(weights, shards) == expected


# Activations ---------------------------------------------------------------------------------------


DTYPES = [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")]
SOME_ADAPTERS = {"lora_rank": 4, "lora_targets": ["v_proj", "o_proj", "up_proj"]}


@pytest.mark.parametrize("shape", [WIDE, FAMILIES["qwen3"]], ids=["wide", "qwen3"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("weights, compute_dtype", DTYPES)
@pytest.mark.parametrize("lora", [{}, SOME_ADAPTERS], ids=["all", "adapters"])
def test_activations_are_what_autograd_saves(shape, checkpointing, weights, compute_dtype, lora):
    memory = MemoryConfig(weights=weights, checkpointing=checkpointing, **lora)
    real = trainee(shape, memory, compute_dtype, "reinforce" if lora else None)
    saved = {}
    known = {p.untyped_storage().data_ptr() for p in real.model.parameters()}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    input_ids = torch.zeros(4, 128, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), real.forward():
        real.model.hidden_states(input_ids)
    known |= {t.untyped_storage().data_ptr() for t in real.model._rope(128, input_ids.device, torch.float32)}
    measured = sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in known)
    setup = Setup(shape, memory, compute_dtype, 4, 128, cpu=True)
    assert plan_activations.activation_bytes(setup)[0] == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("shape", [WIDE, DEEP], ids=["wide", "deep"])
@pytest.mark.parametrize("weights, compute_dtype", DTYPES)
@pytest.mark.parametrize("lora", [{}, SOME_ADAPTERS], ids=["all", "adapters"])
def test_selective_checkpointing_holds_what_is_planned(shape, weights, compute_dtype, lora):
    memory = MemoryConfig(weights=weights, checkpointing="selective", **lora)
    real = trainee(shape, memory, compute_dtype, "reinforce" if lora else None)
    input_ids = torch.zeros(4, 128, dtype=torch.int64)
    with torch.no_grad():
        real.model.hidden_states(input_ids[:, :2].repeat(1, 64))  # its tables of angles are made
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, real.forward():
        hidden = real.model.hidden_states(input_ids)
    measured = sum(event.nbytes() for event in _memory_events(profiled)) - hidden.nbytes
    setup = Setup(shape, memory, compute_dtype, 4, 128, cpu=True)
    assert plan_activations.activation_bytes(setup)[0] == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("shape", [WIDE, DEEP], ids=["wide", "deep"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "weights, compute_dtype, gradients",
    [
        ("float32", "float32", "float32"),
        ("float32", "bfloat16", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "bfloat16", "float32"),
    ],
)
def test_peak_of_a_micro_batch(shape, checkpointing, weights, compute_dtype, gradients):
    memory = MemoryConfig(weights=weights, gradients=gradients, checkpointing=checkpointing)
    real = trainee(shape, memory, compute_dtype)
    for blocks, context, chunk_mib in ((8, 128, 4), (2, 64, 1)):
        micro_batch(real, blocks, context, chunk_mib)  # gradients are there from now on
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            micro_batch(real, blocks, context, chunk_mib)
        parts = plan_memory.training_parts(
            Setup(shape, memory, compute_dtype, blocks, context, chunk_mib, cpu=True)
        )
        moving = parts["activations"] + parts["loss"] + parts["working"]
        assert moving == pytest.approx(_highest(profiled), rel=0.1)


def _highest(profiled):
    """Bytes above those at the start, at the highest point of a profile."""
    now = highest = 0
    for event in _memory_events(profiled):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def _memory_events(profiled):
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    return sorted(events, key=lambda event: event.start_ns())


def test_checkpointing_keeps_less_and_takes_longer():
    plans = [
        stage_plan("reinforce", f"--memory.checkpointing={kind}") for kind in ("none", "selective", "full")
    ]
    activations = [one.parts["activations"] for one in plans]
    assert activations[0] > 1.3 * activations[1] > 5 * activations[2]
    assert plans[0].flops == plans[1].flops < plans[2].flops < 1.34 * plans[0].flops


# Llama 2 7B ----------------------------------------------------------------------------------------


def test_full_training_of_llama_2_takes_8_bytes_a_weight():
    found = stage_plan("reinforce", "--memory.moments=int8", "--memory.gradients=bfloat16")
    scales = 2 * 4 / 1024
    assert found.static == pytest.approx((8 + scales) * 6_738_415_616, rel=1e-4)
    assert found.static < 54.0e9
    assert found.fits


def test_adapters_of_llama_2_take_20_gb_over_bfloat16_and_10_over_nf4():
    words = ["--memory.lora_rank=16", "--memory.checkpointing=full"]
    for frozen, most in (("bfloat16", 20e9), ("nf4", 10e9)):
        for stage in plan_job.STAGES:
            assert stage_plan(stage, *words, f"--memory.frozen={frozen}").total < most


def test_work_of_the_paper_s_job():
    """Three epochs at 4.0e10 FLOP a token and 40 % of 989 TFLOP/s: a quarter of an hour."""
    found = stage_plan("reinforce")
    assert (found.tokens, found.steps) == (3 * TOKENS, 142)
    assert found.flops == pytest.approx(3.72e17, rel=0.01)
    assert found.seconds == pytest.approx(15.7 * 60, rel=0.02)
    label = stage_plan("label", "--label.dtype=float16")
    assert label.flops == pytest.approx(8.3e16, rel=0.01)
    assert label.seconds == pytest.approx(3.5 * 60, rel=0.02)


def test_float32_teachers_take_ten_times_as_long():
    slow, fast = stage_plan("label"), stage_plan("label", "--label.dtype=bfloat16")
    assert slow.seconds == pytest.approx(fast.seconds * 989 * 0.4 / (67 * 0.6), rel=1e-3)
    assert slow.parts["teachers"] == 2 * fast.parts["teachers"] == 2 * 4 * 6_738_415_616


def test_eight_processes_share_weights_and_work():
    one, eight = stage_plan("reinforce"), stage_plan("reinforce", gpus=8)
    for part in ("weights", "remainder", "moments", "gradients"):
        assert eight.parts[part] == pytest.approx(one.parts[part] / 8, rel=1e-3)
    assert one.parts["fsdp"] == 0 < eight.parts["fsdp"]
    assert eight.parts["activations"] == one.parts["activations"]
    assert one.seconds / 9 < eight.seconds < one.seconds / 6


def test_replicas_hold_their_own_shards():
    words = ["--memory.replicas=4"]
    assert stage_plan("unlearn", *words, gpus=8).parts["moments"] == pytest.approx(
        stage_plan("unlearn", gpus=2).parts["moments"]
    )


def test_every_process_holds_the_base_under_adapters():
    words = ["--memory.lora_rank=16"]
    assert stage_plan("unlearn", *words, gpus=8).parts == stage_plan("unlearn", *words).parts


def test_offloaded_moments_leave_the_gpu():
    words = ["--memory.moments=int8"]
    here, away = stage_plan("unlearn", *words), stage_plan("unlearn", *words, "--memory.offload_moments=true")
    assert away.total == here.total - away.host
    assert away.host == here.parts["moments"] + here.parts["remainder"]
    assert away.seconds > here.seconds


def test_soft_targets_bring_the_teachers_heads():
    hard, soft = stage_plan("unlearn"), stage_plan("unlearn", "--unlearn.target=soft")
    assert hard.parts["teachers"] == 0
    assert soft.parts["teachers"] == 2 * 2 * 32000 * 4096
    assert soft.flops == pytest.approx(hard.flops + soft.tokens * 2 * 2 * 32000 * 4096)
    assert stage_plan("reinforce", "--unlearn.target=soft").parts["teachers"] == 0


def test_text_to_keep_doubles_the_blocks_of_a_step():
    alone, beside = stage_plan("unlearn"), stage_plan("unlearn", "--unlearn.retain=keep.txt")
    assert beside.tokens == 2 * alone.tokens and beside.steps == alone.steps


# Work ----------------------------------------------------------------------------------------------


@given(
    tokens=st.integers(2, 5000),
    epochs=st.floats(0.1, 4),
    steps=st.integers(0, 20),
    blocks=st.integers(1, 5),
    accumulate=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_steps_are_the_engine_s(tokens, epochs, steps, blocks, accumulate):
    config = ReinforceConfig(epochs=epochs, steps=steps, batch_blocks=blocks, accumulate=accumulate)
    context = 64
    n_blocks = math.ceil(tokens / context)
    real = plan_steps(n_blocks, config, seed=0)
    last = tokens - (n_blocks - 1) * context
    read = sum(last if block == n_blocks - 1 else context for step in real for block in step)
    found, planned = plan_job.steps_and_tokens(config, tokens, context)
    assert found == len(real)
    assert abs(planned - read) <= context  # the last, short block is read once more or less


# Changes -------------------------------------------------------------------------------------------


@given(
    gigabytes=st.floats(3, 150),
    stage=st.sampled_from(plan_job.STAGES),
    compute=st.sampled_from(["float32", "bfloat16"]),
    rank=st.sampled_from([0, 16]),
)
@settings(max_examples=60, deadline=None)
def test_changes_make_it_fit_and_none_is_idle(gigabytes, stage, compute, rank):
    gpu = dataclasses.replace(plan_gpus.find_gpu("H100"), memory=gigabytes * 1e9)
    config = job(f"--model.compute_dtype={compute}", f"--memory.lora_rank={rank}")
    changes = plan_job.find_changes(stage, config, LLAMA, TOKENS, gpu)

    def fits(some):
        changed, gpus = plan_job.apply_changes(config, 1, list(some))
        return plan_job.plan_stage(stage, changed, LLAMA, TOKENS, gpu, gpus).fits

    if not changes:
        assert gigabytes < 6
        return
    assert fits(changes)
    if not fits(()):
        for k in range(len(changes)):
            assert not fits(changes[:k] + changes[k + 1 :])


def test_the_first_change_is_the_harmless_one():
    plans = plan_job.plan_job(job(), LLAMA, TOKENS, plan_gpus.find_gpu("H100"))
    assert [one.fits for one in plans] == [False, True, False]
    assert plans[0].changes == ({"memory.moments": "int8"}, {"memory.gradients": "bfloat16"})
    assert plan.advice(plans[0]).startswith("First set --memory.moments int8; then")
    assert plans[1].changes == ()


def test_smaller_micro_batches_keep_the_step():
    gpu = dataclasses.replace(plan_gpus.find_gpu("H100"), memory=68e9)
    config = job("--memory.moments=int8", "--memory.gradients=bfloat16")
    (change,) = plan_job.find_changes("unlearn", config, LLAMA, TOKENS, gpu)
    assert change == {"unlearn.batch_blocks": 4, "unlearn.accumulate": 32}


# The command ---------------------------------------------------------------------------------------


def run(capsys, *words):
    status = plan.main([str(word) for word in words])
    told = capsys.readouterr()
    return status, told.out, told.err


def test_command_on_a_preset(capsys):
    words = ["--gpu", "h100", "--memory.moments=int8", "--memory.gradients=bfloat16"]
    status, out, err = run(capsys, *ON_PRESET, *words)
    assert (status, err) == (0, "")
    assert "6,738,415,616 parameters" in out and "1 x H100" in out
    assert "15.8 min" in out and "40% of 989 TFLOP/s" in out


def test_status_3_where_it_does_not_fit(capsys):
    status, out, _ = run(capsys, *ON_PRESET, "--gpu", "NVIDIA GeForce RTX 4090")
    assert status == plan.DOES_NOT_FIT
    assert "reinforce does not fit. First set --memory.moments int8" in out


def test_command_on_files(capsys, tmp_path):
    world = make_world(tmp_path)
    words = ["--model.path", world / "base", "--data.corpus", world / "corpus"]
    words += ["--anchors.path", world / "anchors.json", "--data.context", "32", "--json", tmp_path / "p.json"]
    status, out, err = run(capsys, *words)
    assert (status, err) == (0, "")
    assert "(counted)" in out and "No times" in out
    written = json.loads((tmp_path / "p.json").read_text())
    with torch.device("meta"):
        model = Llama(plan.load_config(world / "base"))
    assert written["parameters"] == sum(p.numel() for p in model.parameters())
    assert written["stages"]["reinforce"]["seconds"] is None
    assert written["stages"]["reinforce"]["total"] == sum(written["stages"]["reinforce"]["bytes"].values())


def test_tokens_are_those_of_the_prepare_stage(tmp_path):
    from whp_fast.corpus import TokenWriter, corpus_files, tokenise_corpus
    from whp_fast.tokens import load_tokenizer

    world = make_world(tmp_path)
    corpus = ["--data.corpus", str(world / "corpus"), "--anchors.path", "a"]
    config, _ = plan.job_and_shape(["--model.path", str(world / "base"), *corpus])
    tokenizer = load_tokenizer(world / "base")
    with TokenWriter(tmp_path / "tokens.npy", tokenizer.vocab_size) as writer:
        tokenise_corpus(corpus_files([world / "corpus"]), tokenizer, writer)
    assert plan.corpus_tokens(config) == (writer.count, "counted")
    size = sum(file.stat().st_size for file in corpus_files([world / "corpus"]))
    config.model.path = "not there"
    assert plan.corpus_tokens(config)[0] == round(size / 4)


def test_json_on_the_terminal(capsys):
    status, out, _ = run(capsys, *ON_PRESET, "--gpu", "B200", "--gpus", 8, "--json", "-")
    written = json.loads(out)
    assert status == 0 and written["fits"] is True and written["gpus"] == 8
    assert written["assumed"]["share_of_peak"] == 0.35


def test_table_has_a_row_for_every_card_and_number():
    lines = plan_table.mode_table().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:14]]
    assert [(row[0], int(row[2])) for row in rows] == [
        (card, gpus) for card in plan_table.CARDS for gpus in plan_table.COUNTS
    ]
    for row in rows:
        assert len(row) == 9 and row[8] == "not measured"
        assert 0 < float(row[6]) <= float(row[1])
    by_place = {(row[0], row[2]): row[3] for row in rows}
    assert by_place["H200", "1"].startswith("full, float32 moments")
    assert by_place["H100", "1"].startswith("full, 8-bit moments")
    assert by_place["RTX4090", "1"].startswith("LoRA 16, bfloat16")


@pytest.mark.parametrize(
    "words, told",
    [
        (["--gpu", "RTX4080"], "--gpu: 'RTX4080' is not in the table; did you mean RTX4090?"),
        (["--gpu", "H100", "--gpus", "6", "--memory.replicas", "4"], "memory.replicas: 6 processes do not"),
        (["--gpu", "H100", "--gpus", "7"], "reinforce.accumulate: the 128 blocks of a step do not divide"),
        (["--gpu", "H100", "--gpus", "0"], "--gpus: 0 is no number of GPUs"),
        (["--gpu", "H100", "--gpus", "two"], "command line: argument --gpus: invalid int value: 'two'"),
        (["--gpu", "H100", "--tokens", "-1"], "--tokens: -1 is no size"),
        (
            ["--gpu", "H100", "--preset", "llama_7b"],
            "--preset: there is no shape 'llama_7b'; did you mean 'llama2_7b'",
        ),
        (
            ["--gpu", "H100", "--memory.moment", "int8"],
            "no setting 'memory.moment'; did you mean 'memory.moments'",
        ),
        (["--gpu", "H100", "--memory.moments", "int4"], "memory.moments"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(capsys, words, told):
    status, _, err = run(capsys, *ON_PRESET, *words)
    assert status == 2
    assert told in err and err.count("\n") == 1


def test_no_model_and_no_corpus_are_told(capsys):
    named = ["--model.path", "missing", "--data.corpus", "missing.txt", "--anchors.path", "a"]
    assert "--preset (llama2_7b" in run(capsys, *named)[2]
    assert "--tokens: no corpus is named" in run(capsys, "--preset", "llama2_7b", "--gpu", "H100")[2]
    assert "missing.txt" in run(capsys, "--preset", "llama2_7b", *named[2:4], "--gpu", "H100")[2]


@pytest.mark.parametrize(
    "words", [["--memory.optimizer=bitsandbytes"], ["--memory.lora_rank=16", "--memory.frozen=nf4"]]
)
def test_missing_bitsandbytes_is_told(capsys, monkeypatch, words):
    real = plan.importlib.util.find_spec
    monkeypatch.setattr(
        plan.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name)
    )
    status, _, err = run(capsys, *ON_PRESET, "--gpu", "H100", *words)
    assert status == 2 and "bitsandbytes is not installed" in err


def test_names_of_devices():
    for told, name in (
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100-PCIE-40GB", "A100-40"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA L40S", "L40S"),
        ("a100 40gb", "A100-40"),
        ("RTX 4090", "RTX4090"),
        ("NVIDIA RTX A6000", "A6000"),
        ("h100-pcie", "H100-PCIe"),
    ):
        assert plan_gpus.find_gpu(told).name == name
    for told, near in (
        ("H20", "H200"),
        ("NVIDIA L40", "L40S"),
        ("NVIDIA GH200 480GB", "H200"),
        ("H1000", "H100"),
    ):
        with pytest.raises(UserError, match=f"did you mean {near}"):
            plan_gpus.find_gpu(told)
