"""`whp_fast.teacher_cache` and `whp_fast.row_files`: rows that come back, bounds of rounding, and damage."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from whp_fast.corpus import Blocks
from whp_fast.errors import UserError
from whp_fast.model import Llama
from whp_fast.model_config import LlamaConfig
from whp_fast.row_files import join_parts
from whp_fast.teacher_cache import (
    CacheWriter,
    EditsCache,
    EditsWriter,
    HiddenCache,
    TargetCache,
    TargetWriter,
    cache_hidden_states,
    join_targets,
    row_bytes,
)

WIDTH = 6
DTYPES = ("bfloat16", "float8")


def some_rows(n, seed=0, width=WIDTH, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.logspace(-3, 3, max(n, 1))[:n, None]  # rows of very different sizes
    return (torch.randn(n, width, generator=generator) * magnitude).to(dtype)


def write(folder, rows, name="base", dtype="bfloat16", sizes=(3, 1, 7), chunk_bytes=4 * 2 * WIDTH):
    """Rows in several calls, four rows of bfloat16 a chunk."""
    with CacheWriter(folder, name, rows.shape[1], dtype, chunk_bytes) as writer:
        at, k = 0, 0
        while at < len(rows):
            size = sizes[k % len(sizes)]
            writer.append(rows[at : at + size])
            at, k = at + size, k + 1
        assert writer.count == len(rows)
    return HiddenCache(folder, name)


def flip(path, byte, bit=1):
    data = bytearray(path.read_bytes())
    data[byte] ^= bit
    path.write_bytes(bytes(data))


# -------------------------------------------------------------------------------------------- what comes back


def test_bfloat16_rows_come_back_bit_for_bit(tmp_path):
    rows = some_rows(23, dtype=torch.bfloat16)
    cache = write(tmp_path, rows)
    assert (cache.count, cache.width, cache.dtype) == (23, WIDTH, "bfloat16")
    assert torch.equal(cache.rows(0, 23), rows)
    assert torch.equal(cache.rows(5, 9), rows[5:9])
    index = [22, 0, 7, 7, 3]
    assert torch.equal(cache.gather(index), rows[index])
    assert torch.equal(cache.gather(torch.tensor(index)), rows[index])
    assert torch.equal(cache.gather(np.array(index), dtype=torch.float32), rows[index].float())
    assert cache.gather([]).shape == (0, WIDTH)
    assert cache.rows(4, 4).shape == (0, WIDTH)


def test_a_float32_row_is_rounded_to_bfloat16_once(tmp_path):
    rows = some_rows(9)
    assert torch.equal(write(tmp_path, rows).rows(0, 9), rows.to(torch.bfloat16))


@given(
    st.lists(
        st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=4, max_size=4), min_size=1, max_size=6
    )
)
def test_float8_stays_within_its_bound(tmp_path_factory, values):
    rows = torch.tensor(values, dtype=torch.float32)
    cache = write(tmp_path_factory.mktemp("cache"), rows, dtype="float8")
    exact = rows.double()
    largest = exact.abs().amax(dim=1, keepdim=True)
    # a row whose scale would not be a normal float32 number has the scale 2^-126
    scale = (largest / 448).clamp(min=torch.finfo(torch.float32).tiny)
    bound = torch.maximum(2.0**-4 * exact.abs(), 2.0**-10 * scale) * (1 + 1e-6)
    wide = cache.rows(0, len(rows), dtype=torch.float32).double()
    assert ((wide - exact).abs() <= bound).all()
    narrow = cache.rows(0, len(rows)).double()
    tiny = torch.finfo(torch.bfloat16).tiny * 2.0**-7
    assert ((narrow - wide).abs() <= 2.0**-8 * wide.abs() + tiny).all()


def test_the_bound_of_float8_is_not_loose(tmp_path):
    rows = torch.rand(200, 64, generator=torch.Generator().manual_seed(0)) + 1
    found = write(tmp_path, rows, dtype="float8").rows(0, 200, dtype=torch.float32)
    worst = ((found - rows).abs() / rows).max()
    assert 0.9 * 2**-4 < worst <= 2**-4
    assert row_bytes(64, "float8") == 68 and row_bytes(64, "bfloat16") == 128
    assert sum(f.stat().st_size for f in tmp_path.glob("base.[rs]*")) == 200 * row_bytes(64, "float8")


def test_the_largest_of_a_row_and_zeros_are_kept_by_float8(tmp_path):
    rows = torch.tensor([[448.0, -1.0, 0.0], [0.0, 0.0, 0.0], [-3e-5, 3e-5, 0.0], [3e38, 0.0, -3e38]])
    found = write(tmp_path, rows, dtype="float8").rows(0, 4, dtype=torch.float32)
    torch.testing.assert_close(found, rows, rtol=1e-6, atol=0)


def test_a_row_that_is_not_finite_spoils_no_other(tmp_path):
    rows = some_rows(6)
    clean = write(tmp_path, rows, "clean", dtype="float8").rows(0, 6)
    rows[2, 3], rows[4, 0] = float("nan"), float("-inf")
    found = write(tmp_path, rows, dtype="float8").rows(0, 6)
    assert found[2].isnan().all() and found[4].isnan().all()
    assert torch.equal(found[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_how_rows_are_handed_over_changes_no_byte(tmp_path, dtype):
    rows = some_rows(30)
    for name, sizes in (("a", (30,)), ("b", (1,)), ("c", (4, 9))):
        write(tmp_path, rows, name, dtype, sizes)
    for column in ("rows", "scales", "json"):
        found = {
            path.read_bytes().replace(b"a.", b"").replace(b"b.", b"").replace(b"c.", b"")
            for path in tmp_path.glob(f"?.{column}")
        }
        assert len(found) == (0 if (dtype, column) == ("bfloat16", "scales") else 1)


def test_a_cache_of_no_rows(tmp_path):
    cache = write(tmp_path, torch.zeros(0, WIDTH), dtype="float8")
    assert cache.count == 0 and cache.gather([]).shape == (0, WIDTH)
    cache.verify()


@pytest.mark.parametrize("index", [[-1], [5], [0, 9, 1]])
def test_a_row_that_is_not_there_is_refused(tmp_path, index):
    with pytest.raises(IndexError, match="base, which has 5"):
        write(tmp_path, some_rows(5)).gather(index)


def test_rows_of_another_width_or_dtype_are_refused(tmp_path):
    writer = CacheWriter(tmp_path, "base", WIDTH)
    with pytest.raises(ValueError, match=r"\(2, 5\), expected \[n, 6\]"):
        writer.append(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="bfloat16, float8"):
        CacheWriter(tmp_path, "base", WIDTH, "float16")


# ------------------------------------------------------------------------------------------------------ edits


def csr(lists):
    ends = np.cumsum([0, *map(len, lists)])
    return ends, np.array([token for row in lists for token in row], dtype=np.int64)


def rows_of(offsets, tokens):
    return [tokens[a:b].tolist() for a, b in zip(offsets.tolist(), offsets[1:].tolist())]


LISTS = [[5, 3], [], [70000], [], [], [1, 2, 3, 4], [], [9]]


def test_edits_come_back_in_any_order_from_any_part(tmp_path):
    for part, piece in (("p0", LISTS[:3]), ("p1", []), ("p2", LISTS[3:])):
        (tmp_path / part).mkdir()
        with EditsWriter(tmp_path / part, "edits", chunk_bytes=8) as writer:
            for size in (2, 1, 2):
                writer.append(*csr(piece[:size]))
                piece = piece[size:]
    join_parts(tmp_path, "edits", ["p0", "p1", "p2"])
    cache = EditsCache(tmp_path, "edits")
    for index in (range(8), [7, 0, 5, 5, 2], [3], [6, 4], []):
        assert rows_of(*cache.gather(list(index))) == [LISTS[i] for i in index]


# ------------------------------------------------------------------------------------------------------ parts


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_are_one_cache_in_their_order(tmp_path, dtype):
    rows = some_rows(20)
    whole = write(tmp_path, rows, "whole", dtype).rows(0, 20)
    cuts = (0, 7, 7, 20)
    for k, (a, b) in enumerate(zip(cuts, cuts[1:])):
        (tmp_path / f"part-{k}").mkdir()
        write(tmp_path / f"part-{k}", rows[a:b], dtype=dtype)
    join_parts(tmp_path, "base", ["part-0", "part-1", "part-2"])
    cache = HiddenCache(tmp_path, "base")
    assert cache.count == 20
    assert torch.equal(cache.rows(0, 20), whole)
    index = [19, 2, 7, 6, 0, 8]
    assert torch.equal(cache.gather(index), whole[index])
    cache.verify()
    flip(tmp_path / "part-2" / "base.rows", 0)
    with pytest.raises(UserError, match=r"part-2/base.rows: chunk 0"):
        HiddenCache(tmp_path, "base").verify()


def test_parts_of_other_settings_are_refused(tmp_path):
    for part, dtype in (("a", "bfloat16"), ("b", "float8")):
        (tmp_path / part).mkdir()
        write(tmp_path / part, some_rows(3), dtype=dtype)
    with pytest.raises(UserError, match=r"b/base\.json: written with other settings than .*a"):
        join_parts(tmp_path, "base", ["a", "b"])
    with pytest.raises(UserError, match=r"c/base\.json: cannot read"):
        join_parts(tmp_path, "base", ["a", "c"])


# ----------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("column", ["rows", "scales"])
@pytest.mark.parametrize("bit", [1, 128])
def test_every_damaged_byte_is_found_and_named(tmp_path, column, bit):
    write(tmp_path, some_rows(11), dtype="float8", chunk_bytes=24)
    path = tmp_path / f"base.{column}"
    whole = path.read_bytes()
    rows_a_chunk = 4 if column == "rows" else 6
    for byte in range(0, len(whole), 5):
        flip(path, byte, bit)
        chunk = byte // 24
        last = min((chunk + 1) * rows_a_chunk, 11) - 1
        message = rf"base\.{column}: chunk {chunk} \(rows {chunk * rows_a_chunk} to {last}\) is damaged"
        with pytest.raises(UserError, match=message) as error:
            HiddenCache(tmp_path, "base").verify()
        assert f"delete the folder {tmp_path}" in str(error.value) and "--overwrite" in str(error.value)
        path.write_bytes(whole)
    HiddenCache(tmp_path, "base").verify()


def test_a_chunk_is_checked_when_it_is_first_touched(tmp_path):
    rows = some_rows(12, dtype=torch.bfloat16)
    write(tmp_path, rows)
    flip(tmp_path / "base.rows", 5 * 2 * WIDTH)  # row 5, in the chunk of rows 4 to 7
    cache = HiddenCache(tmp_path, "base")
    assert torch.equal(cache.rows(0, 4), rows[:4]) and torch.equal(cache.rows(8, 12), rows[8:])
    for read in (lambda: cache.rows(7, 9), lambda: cache.gather([0, 4]), lambda: cache.rows(0, 5)):
        with pytest.raises(UserError, match=r"base\.rows: chunk 1 \(rows 4 to 7\)"):
            read()


@pytest.mark.parametrize("size, chunk", [(0, 0), (1, 0), (4 * 2 * WIDTH, 1), (11 * 2 * WIDTH - 1, 2)])
def test_a_torn_file_is_found_when_it_is_opened(tmp_path, size, chunk):
    write(tmp_path, some_rows(11))
    path = tmp_path / "base.rows"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        UserError, match=rf"base\.rows: {size} bytes .*11 rows.*torn at chunk {chunk}; delete"
    ):
        HiddenCache(tmp_path, "base")


def test_a_missing_file_is_named(tmp_path):
    write(tmp_path, some_rows(3))
    (tmp_path / "base.rows").unlink()
    with pytest.raises(UserError, match=r"base\.rows: cannot read .*; delete the folder"):
        HiddenCache(tmp_path, "base")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1, "parts": ', '{"format": 2, "parts": []}'])
def test_a_damaged_index_is_named(tmp_path, text):
    write(tmp_path, some_rows(3))
    (tmp_path / "base.json").write_text(text)
    with pytest.raises(UserError, match=r"base\.json: damaged, or of another version; delete the folder"):
        HiddenCache(tmp_path, "base")


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.pop("width"),
        lambda about: about.update(dtype="float16"),
        lambda about: about.update(kind="edits"),
        lambda about: about["parts"][0].pop("rows"),
        lambda about: about["parts"][0]["rows"].pop("crc32"),
        lambda about: about["parts"][0]["rows"].update(chunk_rows=0),
        lambda about: about["parts"][0]["rows"].update(rows=2),
        lambda about: about["parts"][0]["rows"]["crc32"].append(0),
        lambda about: about.update(width=2 * WIDTH),
    ],
)
def test_an_index_with_wrong_entries_is_refused(tmp_path, change):
    write(tmp_path, some_rows(3))
    about = json.loads((tmp_path / "base.json").read_text())
    change(about)
    (tmp_path / "base.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"base\..*; delete the folder"):
        HiddenCache(tmp_path, "base")


def test_a_writer_that_fails_leaves_no_cache(tmp_path):
    with pytest.raises(RuntimeError), CacheWriter(tmp_path, "base", WIDTH) as writer:
        writer.append(some_rows(3))
        raise RuntimeError
    with pytest.raises(UserError, match=r"base\.json: cannot read"):
        HiddenCache(tmp_path, "base")


# ---------------------------------------------------------------------------------------------------- targets


def write_targets(folder, n=8, seed=0):
    base, reinforced = some_rows(n, seed, dtype=torch.bfloat16), some_rows(n, seed + 1, dtype=torch.bfloat16)
    folder.mkdir(exist_ok=True)
    with TargetWriter(folder, WIDTH) as writer:
        writer.append(base[:3], reinforced[:3], *csr(LISTS[:3]))
        writer.append(base[3:], reinforced[3:], *csr(LISTS[3:n]))
    return base, reinforced


def test_targets_keep_their_three_parts_apart(tmp_path):
    pairs = [write_targets(tmp_path / f"part-{k}", seed=10 * k) for k in range(2)]
    join_targets(tmp_path, ["part-0", "part-1"])
    cache = TargetCache(tmp_path)
    cache.verify()
    assert cache.count == 16
    assert torch.equal(cache.base.rows(0, 16), torch.cat([pairs[0][0], pairs[1][0]]))
    assert torch.equal(cache.reinforced.rows(0, 16), torch.cat([pairs[0][1], pairs[1][1]]))
    assert rows_of(*cache.edits.gather(range(16))) == LISTS + LISTS


@pytest.mark.parametrize("name", ["base.rows", "reinforced.rows", "edits.ends", "edits.tokens"])
def test_damage_anywhere_in_targets_is_found(tmp_path, name):
    write_targets(tmp_path)
    flip(tmp_path / name, 0)
    with pytest.raises(UserError, match=rf"{name}: chunk 0"):
        TargetCache(tmp_path).verify()


def test_targets_of_unequal_length_are_refused(tmp_path):
    write_targets(tmp_path)
    write(tmp_path, some_rows(7), "reinforced")
    with pytest.raises(UserError, match=r"reinforced\.json: 7 rows beside 8 of the base; delete"):
        TargetCache(tmp_path)
    with pytest.raises(ValueError, match="must be the same positions"):
        TargetWriter(tmp_path, WIDTH).append(some_rows(2), some_rows(3), *csr(LISTS[:2]))


# --------------------------------------------------------------------------------------------- a model's rows


def tiny_model():
    config = LlamaConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 50,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "initializer_range": 0.2,
            "tie_word_embeddings": False,
        }
    )
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("cuts", [(0, 7), (0, 2, 4, 7), (0, 3, 3, 7)])
def test_hidden_states_of_a_corpus(tmp_path, cuts):
    model = tiny_model()
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, 6 * 8 + 5).astype(np.uint16)
    blocks = Blocks.of(tokens, 8)
    parts, seen = [], []
    for k, (first, last) in enumerate(zip(cuts, cuts[1:])):
        (tmp_path / f"{k}").mkdir()
        parts.append(f"{k}")
        with CacheWriter(tmp_path / f"{k}", "base", 16) as writer:
            cache_hidden_states(model, blocks, writer, first, last, batch_size=2, progress=seen.append)
    join_parts(tmp_path, "base", parts)
    found = HiddenCache(tmp_path, "base").rows(0, len(tokens))
    assert sum(seen) == len(tokens)
    with torch.no_grad():
        rows = [model.hidden_states(torch.from_numpy(b.astype(np.int64))[None])[0] for b in blocks]
    torch.testing.assert_close(found.float(), torch.cat(rows), rtol=2**-7, atol=1e-6)
