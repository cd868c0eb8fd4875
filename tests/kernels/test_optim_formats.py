"""How moments are kept in bfloat16 and 8 bits: bounds, means, random bits; and that they still move."""

import math

import pytest
import torch
from whp_kernels.optim import AdamW, moments
from whp_kernels.optim.moments import BLOCK, FIRST, SECOND


def magnitudes(rows=32, columns=2400, seed=0):
    """Positive numbers over eight orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).mul(3).exp() * 1e-5


def draw(shape, seed=1):
    return torch.randint(0, 1 << 32, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int64)


def spread(scale, columns):
    return scale.repeat_interleave(BLOCK, 1)[:, :columns].double()


def test_the_maps():
    """Values by their definition: floating-point numbers with 3 bits of exponent, gradual towards 0."""
    for kind, mantissa, top in ((FIRST, 4, 1984), (SECOND, 5, 4032)):
        codes = torch.arange(8 << mantissa, dtype=torch.int32)
        expected = [
            f if e == 0 else ((1 << mantissa) + f) << (e - 1) for e in range(8) for f in range(1 << mantissa)
        ]
        scale = torch.full((1, 1), float(top))
        assert kind.top == top and kind.largest == len(expected) - 1
        assert moments._decode(codes[None], scale, kind)[0].tolist() == expected


def test_what_a_code_stands_for_keeps_its_code():
    """Whatever the random bits."""
    for seed in range(20):
        random = draw((1, 256), seed)
        codes = torch.arange(-128, 128).clamp_min(-127)[None].to(torch.int8)
        scale = torch.full((1, 1), FIRST.top)
        again, found = moments.encode_first(moments.decode_first(codes, scale), random)
        assert torch.equal(again, codes) and torch.equal(found, scale)
        codes, scale = torch.arange(256)[None].to(torch.uint8), torch.full((1, 1), SECOND.top)
        root = moments.decode_second(codes, scale).sqrt()
        again, found = moments.encode_second(root, random)
        assert torch.equal(again, codes) and torch.equal(found, scale)


def test_errors_stay_within_their_bounds():
    x = magnitudes()
    signs = torch.where(draw(x.shape, 5) & 1 == 0, 1.0, -1.0)
    m = x * signs
    codes, scale = moments.encode_first(m, draw(x.shape))
    error = (moments.decode_first(codes, scale).double() - m.double()).abs()
    bound = torch.maximum(x.double() / 16, spread(scale, 2400) / 1984)
    assert (error <= bound * (1 + 1e-5)).all()
    assert (error > bound / 2).any()  # the bound is no looser than it must be
    assert torch.equal(scale, torch.stack([part.amax(1) for part in x.split(BLOCK, 1)], 1))

    codes, scale = moments.encode_second(x, draw(x.shape))
    error = (moments.decode_second(codes, scale).double().sqrt() - x.double()).abs()
    bound = torch.maximum(x.double() / 32, spread(scale, 2400) / 4032)
    assert (error <= bound * (1 + 1e-5)).all()
    assert (error > bound / 2).any()


def test_a_positive_second_moment_is_never_stored_as_zero():
    root = torch.full((1, BLOCK), 1e-20)
    root[0, 0], root[0, 1] = 1.0, 0.0
    codes, _ = moments.encode_second(root, torch.zeros(1, BLOCK, dtype=torch.int64))
    assert codes[0].tolist() == [255, 0] + [1] * (BLOCK - 2)


def test_blocks_of_zeros_and_of_tiny_numbers():
    for value in (0.0, 1e-40, 2.0**-101):
        codes, scale = moments.encode_first(torch.full((2, 1300), value), draw((2, 1300)))
        assert not codes.any() and not scale.any()
        codes, scale = moments.encode_second(torch.full((2, 1300), value), draw((2, 1300)))
        assert not codes.any() and not scale.any()
        assert not moments.decode_second(codes, scale).any()
    assert moments.encode_first(torch.full((1, 1), 2.0**-100), draw((1, 1)))[0].tolist() == [[127]]


def test_blocks_do_not_cross_rows_and_know_nothing_of_each_other():
    x, random = magnitudes(6, 2400), draw((6, 2400))
    codes, scale = moments.encode_first(x, random)
    for row in range(6):
        for block, columns in enumerate((slice(0, 1024), slice(1024, 2048), slice(2048, 2400))):
            part = moments.encode_first(x[row : row + 1, columns], random[row : row + 1, columns])
            assert torch.equal(part[0][0], codes[row, columns])
            assert part[1][0].tolist() == [scale[row, block].item()]


@pytest.mark.parametrize("kind", ["first", "second", "bfloat16"])
def test_rounding_keeps_the_mean(kind):
    """40,000 draws of each of eight numbers: the mean within five standard deviations."""
    numbers = torch.tensor([1.0, 0.7654321, 0.1, 0.0123, 0.00345, 0.00101, 0.0004321, 0.0])
    n = 40_000
    x = numbers[None].expand(n, 8).contiguous()
    random = draw((n, 8), 11)
    if kind == "bfloat16":
        kept = moments.to_bfloat16(x, random).double()
        step = numbers.double() * 2**-7
    elif kind == "first":
        kept = moments.decode_first(*moments.encode_first(x, random)).double()
        step = torch.maximum(numbers.double() / 16, torch.tensor(1 / 1984))
    else:
        kept = moments.decode_second(*moments.encode_second(x, random)).double().sqrt()
        step = torch.maximum(numbers.double() / 32, torch.tensor(1 / 4032))
    error = (kept.mean(0) - numbers.double()).abs()
    assert (error <= 5 * 0.5 * step / math.sqrt(n) + 1e-6 * numbers).all()
    assert (kept.std(0)[1:7] > 0).all()


def test_bfloat16_goes_to_a_neighbour():
    x = magnitudes() * torch.where(draw((32, 2400), 5) & 1 == 0, 1.0, -1.0)
    bits = x.view(torch.int32).to(torch.int64)
    found = moments.to_bfloat16(x, draw(x.shape)).view(torch.int16).to(torch.int64)
    above = found - (bits >> 16)
    assert set(above.unique().tolist()) == {0, 1}  # away from zero or towards it
    exact = moments.to_bfloat16(x.bfloat16().float(), draw(x.shape))
    assert torch.equal(exact, x.bfloat16())
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0])
    for bits in (0, 0xFFFF):
        found = moments.to_bfloat16(special, torch.full((5,), bits)).tolist()
        assert found[:2] == [math.inf, -math.inf] and math.isnan(found[2]) and found[3:] == [0, 0]


def test_random_bits():
    """Each of 32 bits is set half of the time and independent of its neighbours, steps and parameters."""
    n = 1 << 15
    streams = [
        moments.random_bits(moments.key_of(step, number), 0, n, torch.device("cpu"))
        for step, number in ((1, 0), (2, 0), (1, 1), (1000, 50))
    ]
    tolerance = 5 / math.sqrt(n)
    for stream in streams:
        assert 0 <= int(stream.min()) and int(stream.max()) < 1 << 32
        bits = torch.stack([(stream >> k) & 1 for k in range(32)]).double() * 2 - 1
        assert bits.mean(1).abs().max() < tolerance
        correlation = bits @ bits.T / n
        assert (correlation - torch.eye(32)).abs().max() < tolerance
        assert ((bits[:, 1:] * bits[:, :-1]).mean(1)).abs().max() < tolerance
    for first, second in zip(streams, streams[1:]):
        same = ((first ^ second) >> 31) & 1
        assert (same.double().mean() - 0.5).abs() < tolerance
    part = moments.random_bits(moments.key_of(1, 0), 1000, 50, torch.device("cpu"))
    assert torch.equal(part, streams[0][1000:1050])
    assert -(2**31) <= min(moments.key_of(s, 3) for s in range(50)) < 0


def test_random_bits_beyond_32_bits_of_an_index():
    key, cpu = moments.key_of(3, 2), torch.device("cpu")
    assert torch.equal(moments.random_bits(key, 2**32 + 5, 8, cpu), moments.random_bits(key, 5, 8, cpu))


@pytest.mark.parametrize("kept", ["bfloat16", "int8"])
def test_a_second_moment_falls(kept):
    """beta2 = 0.998 and no gradient: rounded to nearest, it would stand still for ever."""
    param = torch.nn.Parameter(torch.zeros(16, 256))
    optimizer = AdamW([param], betas=(0.9, 0.998), moments=kept)
    for step in range(200):
        param.grad = torch.ones(16, 256) if step == 0 else torch.zeros(16, 256)
        param.grad[:, 0] = 1  # holds the scale of the block up
        optimizer.step()
    state = optimizer.state[param]
    if kept == "int8":
        second = moments.decode_second(state["exp_avg_sq"], state["exp_avg_sq_scale"])
    else:
        second = state["exp_avg_sq"].float()
    expected = 0.002 * 0.998**199
    # in 8 bits the root keeps its mean, so the square gains the variance
    assert abs(second[:, 1:].mean().item() / expected - 1) < (0.04 if kept == "int8" else 0.02)


@pytest.mark.parametrize("kept, bound", [("bfloat16", 0.01), ("int8", 0.06)])
def test_the_weights_follow_those_of_float32_moments(kept, bound):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(8, 2048, generator=generator).exp() * 1e-4
    signs = torch.randn(8, 2048, generator=generator).sign()
    noise = [torch.randn(8, 2048, generator=generator) for _ in range(40)]
    moves = []
    for used in ("float32", kept):
        param = torch.nn.Parameter(torch.zeros(8, 2048))
        optimizer = AdamW([param], lr=1e-3, moments=used)
        for each in noise:
            param.grad = sizes * (signs + each)
            optimizer.step()
        moves.append(param.detach())
    error = (moves[1] - moves[0]).norm() / moves[0].norm()
    assert 0 < error < bound
