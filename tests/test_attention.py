"""Attention over packed sequences: every backend against its definition in float64; which one is taken."""

import itertools
import sys
import types

import pytest
import torch
from whp_kernels.layers import has_causal_attention

from whp_fast import attention as module
from whp_fast import attention_backends
from whp_fast.attention import attention, backend, choose, resolve
from whp_fast.attention_backends import Unavailable, make
from whp_fast.errors import UserError
from whp_fast.packing import Packing

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
LENGTHS = [(9,), (5, 5, 5), (1, 7, 0, 3, 3, 12), (70, 1, 130)]
WINDOWS = [None, 1, 4, 100]


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """No choice of a test outlives it."""
    monkeypatch.setattr(module, "_wanted", "auto")
    monkeypatch.setattr(module, "_resolved", {})


def definition(q, k, v, lengths, window):
    """One sequence, one head and one query at a time; differentiable."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for start, length in zip(itertools.accumulate(lengths, initial=0), lengths):
        for head, i in itertools.product(range(q.shape[1]), range(length)):
            first = 0 if window is None else max(0, i - window + 1)
            seen = slice(start + first, start + i + 1)
            scores = k[seen, head // group] @ q[start + i, head] / q.shape[-1] ** 0.5
            out[start + i, head] = torch.softmax(scores, 0) @ v[seen, head // group]
    return out


def by_mask(q, k, v, lengths, window):
    """The same with one mask over all: fast, and the definition's equal (see below)."""
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    place = torch.arange(len(q), device=q.device)
    seen = (number[:, None] == number) & (place[:, None] >= place)
    if window is not None:
        seen &= place[:, None] - place < window
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def make_inputs(lengths, heads=4, kv_heads=2, width=16, dtype=F64, device=CPU, seed=0):
    """q, k, v and a gradient of the result; q, k and v are slices of one tensor, as a stacked product's."""
    g = torch.Generator().manual_seed(seed)
    every = torch.randn(sum(lengths), 2 * heads + 2 * kv_heads, width, dtype=F64, generator=g)
    return every.to(device, dtype).split([heads, kv_heads, kv_heads, heads], dim=1)


def with_gradients(function, q, k, v, g):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*inputs)
    assert out.dtype == q.dtype and out.shape == q.shape
    return [out.detach(), *torch.autograd.grad(out, inputs, g)]


def close(found, exact, tolerance):
    """By norm, and a result that is wrong by a factor would be noticed."""
    for a, b in zip(found, exact, strict=True):
        if b.norm() == 0:
            assert a.abs().max() < 1e-5
            continue
        error = [((c * a.double().to(b.device) - b).norm() / b.norm()).item() for c in (1, 0, -1, 2, 0.9)]
        assert error[0] < tolerance < min(error[1:]), error


@pytest.mark.parametrize("window", WINDOWS)
def test_the_mask_is_the_definition(window):
    lengths = LENGTHS[2]
    q, k, v, g = make_inputs(lengths)
    found = with_gradients(lambda *t: by_mask(*t, lengths, window), q, k, v, g)
    exact = with_gradients(lambda *t: definition(*t, lengths, window), q, k, v, g)
    for a, b in zip(found, exact):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "name, dtype", [("compiled", F32), ("compiled", BF16), ("sdpa", F32), ("sdpa", BF16)]
)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("window", WINDOWS)
def test_on_a_cpu(name, dtype, lengths, window):
    if name == "compiled" and not has_causal_attention(dtype):
        pytest.skip("no compiled attention on this machine")
    choose(name, CPU, dtype)
    packing = Packing.of(lengths)
    for kv_heads in (4, 1):
        inputs = make_inputs(lengths, kv_heads=kv_heads, dtype=dtype)
        found = with_gradients(lambda *t: attention(*t, packing, window=window), *inputs)
        wide = [x.double() for x in inputs]
        exact = with_gradients(lambda *t: by_mask(*t, lengths, window), *wide)
        close(found, exact, 5e-6 if dtype == F32 else 0.015)


@pytest.mark.parametrize("name", ["compiled", "sdpa"])
def test_no_token_at_all(name):
    if name == "compiled" and not has_causal_attention(F32):
        pytest.skip("no compiled attention on this machine")
    choose(name, CPU, F32)
    for lengths in ((), (0, 0)):
        q, k, v, _ = make_inputs(lengths, dtype=F32)
        assert attention(q, k, v, Packing.of(lengths)).shape == q.shape


# ------------------------------------------------------------------------------------- libraries for GPUs


class Recorder:
    """Stands in for a function of a library: computes by the definition what its arguments ask for."""

    def __init__(self):
        self.calls = []

    def compute(self, q, k, v, ends_q, ends_k, longest_q, longest_k, causal, left, right, **others):
        self.calls.append(dict(causal=causal, left=left, right=right, **others))
        assert ends_q is ends_k  # cuDNN takes the batch for causal only then
        assert ends_q.dtype == torch.int32 and isinstance(longest_q, int) and longest_q == longest_k
        lengths = ends_q.diff().tolist()
        assert longest_q == max(lengths) and q.dtype == k.dtype == v.dtype == BF16
        assert right == 0 or (causal and left in (None, -1))
        window = None if left in (None, -1) else left + 1
        return by_mask(*(x.double() for x in (q, k, v)), lengths, window).to(q.dtype)


def flash_attn_2(recorder):
    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        assert dropout_p == softcap == 0 and softmax_scale is alibi_slopes is block_table is None
        ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return recorder.compute(q, k, v, *ends, causal, *window_size, deterministic=deterministic)

    fake = types.ModuleType("flash_attn")
    fake.flash_attn_varlen_func = flash_attn_varlen_func
    return {"flash_attn": fake}


def flash_attn_4(recorder):
    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        seqused_q=None,
        seqused_k=None,
        page_table=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        return_lse=False,
    ):
        assert seqused_q is seqused_k is page_table is softmax_scale is learnable_sink is None
        assert -1 not in window_size
        ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return recorder.compute(q, k, v, *ends, causal, *window_size, deterministic=deterministic), None

    package, fake = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.cute")
    fake.flash_attn_varlen_func = flash_attn_varlen_func
    package.cute = fake
    return {"flash_attn": package, "flash_attn.cute": fake}


def varlen_today(recorder):
    def varlen_attn(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
        seqused_k=None,
        block_table=None,
        num_splits=None,
    ):
        assert enable_gqa == (query.shape[1] != key.shape[1]) and return_aux is scale is None
        ends = (cu_seq_q, cu_seq_k, max_q, max_k)
        return recorder.compute(query, key, value, *ends, window_size == (-1, 0), *window_size)

    return varlen(varlen_attn)


def varlen_without_groups(recorder):
    def varlen_attn(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
    ):
        assert query.shape[1] == key.shape[1] == value.shape[1]
        ends = (cu_seq_q, cu_seq_k, max_q, max_k)
        return recorder.compute(query, key, value, *ends, window_size == (-1, 0), *window_size)

    return varlen(varlen_attn)


def varlen_of_old(recorder):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        assert query.shape[1] == key.shape[1] == value.shape[1]
        ends = (cu_seq_q, cu_seq_k, max_q, max_k)
        return recorder.compute(query, key, value, *ends, is_causal, -1, 0)

    return varlen(varlen_attn)


def varlen(function):
    fake = types.ModuleType("torch.nn.attention.varlen")
    fake.varlen_attn = function
    return {"torch.nn.attention.varlen": fake}


NOTHING = {"flash_attn": None, "flash_attn.cute": None, "torch.nn.attention.varlen": None}


@pytest.fixture
def on_gpu(monkeypatch):
    """``on_gpu(capability, *libraries)``: as if there was such a GPU, with these libraries alone."""

    def installed(capability, *libraries):
        monkeypatch.setattr(attention_backends, "capability", lambda device: capability)
        found = dict(NOTHING)
        for library in libraries:
            found |= library
        for name, fake in found.items():
            monkeypatch.setitem(sys.modules, name, fake)

    return installed


LIBRARIES = {
    "flash-attn": ("flash-attn", flash_attn_2, (8, 0), True),
    "flash-attn-4": ("flash-attn-4", flash_attn_4, (10, 0), True),
    "flash-attn-4 on Hopper": ("flash-attn-4", flash_attn_4, (9, 0), False),
    "varlen": ("varlen", varlen_today, (9, 0), True),
    "varlen without groups": ("varlen", varlen_without_groups, (9, 0), True),
    "varlen of old": ("varlen", varlen_of_old, (8, 0), False),
}


@pytest.mark.parametrize("kind", LIBRARIES)
@pytest.mark.parametrize("window", [None, 3])
def test_how_a_library_is_called(kind, window, on_gpu):
    """Tensors lie on the CPU here; what the library is asked for is the definition."""
    name, library, capability, windows = LIBRARIES[kind]
    recorder = Recorder()
    on_gpu(capability, library(recorder))
    chosen = make(name, GPU, BF16)
    assert (
        chosen.name == name
        and chosen.serves(64, None)
        and chosen.serves(64, window) == (windows or not window)
    )
    assert not chosen.serves(12, None) and not chosen.serves(320, None)
    if not chosen.serves(64, window):
        return
    lengths = (5, 1, 8)
    for kv_heads in (4, 2):
        q, k, v, _ = make_inputs(lengths, kv_heads=kv_heads, dtype=BF16)
        out = chosen.run(q, k, v, Packing.of(lengths), window)
        exact = by_mask(*(x.double() for x in (q, k, v)), lengths, window)
        assert out.dtype == BF16 and (out.double() - exact).norm() < 0.01 * exact.norm()
    assert len(recorder.calls) == 2 and all(call["causal"] or call["left"] == 2 for call in recorder.calls)


@pytest.mark.parametrize("kind", ["flash-attn", "flash-attn-4", "flash-attn-4 on Hopper"])
def test_the_deterministic_mode_is_passed_on(kind, on_gpu, monkeypatch):
    """But not to what refuses it."""
    name, library, capability, _ = LIBRARIES[kind]
    recorder = Recorder()
    on_gpu(capability, library(recorder))
    q, k, v, _ = make_inputs((4,), dtype=BF16)
    for asked in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda answer=asked: answer)
        make(name, GPU, BF16).run(q, k, v, Packing.of((4,)), None)
    assert [call["deterministic"] for call in recorder.calls] == [False, not kind.endswith("Hopper")]


def test_what_is_taken_on_which_gpu(on_gpu):
    everything = [flash_attn_4(Recorder()) | flash_attn_2(Recorder()), varlen_today(Recorder())]
    everything[0]["flash_attn"].cute = everything[0]["flash_attn.cute"]
    expected = {(10, 0): "flash-attn-4", (9, 0): "flash-attn", (8, 6): "flash-attn", (12, 0): "flash-attn"}
    for capability, name in {**expected, (7, 5): "sdpa"}.items():
        on_gpu(capability, *everything)
        module._resolved.clear()
        assert backend(GPU, BF16)[0] == name
        assert backend(GPU, F32)[0] == "sdpa"
    on_gpu((9, 0), flash_attn_4(Recorder()), varlen_today(Recorder()))
    module._resolved.clear()
    assert backend(GPU, BF16) == ("varlen", "varlen_attn of torch")
    on_gpu((9, 0))
    assert backend(GPU, BF16)[0] == "varlen"  # looked for once
    choose("auto", GPU, BF16)
    assert backend(GPU, BF16)[0] == "sdpa"


def test_a_head_that_a_library_does_not_take(on_gpu):
    """Rows of 12 numbers: the library is left out for them alone."""
    recorder = Recorder()
    on_gpu((9, 0), flash_attn_2(recorder))
    chosen = make("flash-attn", GPU, BF16)
    module._resolved[CPU, BF16] = chosen
    q, k, v, _ = make_inputs((4, 2), width=12, dtype=BF16)
    out = attention(q, k, v, Packing.of((4, 2)))
    exact = by_mask(*(x.double() for x in (q, k, v)), (4, 2), None)
    assert not recorder.calls and (out.double() - exact).norm() < 0.01 * exact.norm()
    attention(*make_inputs((4, 2), dtype=BF16)[:3], Packing.of((4, 2)))
    assert len(recorder.calls) == 1


# ------------------------------------------------------------------------------------------- the setting


def test_a_named_backend_is_taken(on_gpu):
    on_gpu((9, 0), flash_attn_2(Recorder()), varlen_today(Recorder()))
    choose("varlen", GPU, BF16)
    assert backend(GPU, BF16) == ("varlen", "model.attention")
    assert backend(GPU, F32)[0] == "sdpa"  # the label stage's dtype, which varlen never takes
    choose("sdpa", CPU, F32)
    assert resolve(CPU, F32).name == "sdpa"


@pytest.mark.parametrize(
    "setting, device, dtype, message",
    [
        ("flash", CPU, F32, "model.attention: 'flash' is none of auto, flash-attn, .*; set one of them"),
        (
            "flash-attn",
            CPU,
            BF16,
            r"cannot be used \(it runs on CUDA GPUs, and the device is cpu\); set model",
        ),
        (
            "flash-attn",
            GPU,
            BF16,
            r"cannot be used \(.*\); run `pip install flash-attn --no-build-isol.*`, or",
        ),
        ("flash-attn-4", GPU, BF16, "run `pip install --pre flash-attn-4`, or set model.attention auto"),
        ("varlen", GPU, F32, "takes bfloat16 and float16, and the products are in float32"),
        ("compiled", GPU, BF16, "it runs on the CPU, and the device is cuda"),
        ("compiled", CPU, F64, "does not take float64|missing|cannot be loaded"),
    ],
)
def test_what_cannot_be_used_is_told(setting, device, dtype, message, on_gpu):
    on_gpu((9, 0))
    with pytest.raises(UserError, match=message):
        choose(setting, device, dtype)
    assert module._wanted == "auto"


def test_gpus_that_a_library_does_not_know(on_gpu):
    on_gpu((8, 0), flash_attn_4(Recorder()))
    with pytest.raises(Unavailable, match="compute capability 9.0 or more"):
        make("flash-attn-4", GPU, BF16)
    on_gpu((12, 0), flash_attn_4(Recorder()))
    with pytest.raises(Unavailable, match=r"no kernels for compute capability 12\.x"):
        make("flash-attn-4", GPU, BF16)


# --------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(
    "name, dtype",
    [(n, BF16) for n in ("flash-attn", "flash-attn-4", "varlen")] + [("sdpa", F32), ("sdpa", BF16)],
)
@pytest.mark.parametrize("lengths", [*LENGTHS, (512, 512, 37)], ids=str)
@pytest.mark.parametrize("window", WINDOWS)
def test_on_a_gpu(name, dtype, lengths, window):
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        chosen = make(name, device, dtype)
    except Unavailable as why:
        pytest.skip(str(why))
    if not chosen.serves(64, window):
        pytest.skip("it takes no window here")
    choose(name, device, dtype)
    packing = Packing.of(lengths).pin().to(device)
    for kv_heads in (4, 1):
        inputs = make_inputs(lengths, kv_heads=kv_heads, width=64, dtype=dtype, device=device)
        found = with_gradients(lambda *t: attention(*t, packing, window=window), *inputs)
        wide = [x.double() for x in inputs]
        exact = with_gradients(lambda *t: by_mask(*t, lengths, window), *wide)
        close(found, exact, 1e-4 if dtype == F32 else 0.015)
