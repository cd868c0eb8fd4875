"""`whp_fast.soft_targets`, and what `whp_fast.label` keeps for it, against the formulas in float64.

The labeller runs over a small corpus with expressions. What it keeps is compared with each model's own pass
over the block and over the translation of `brute_force`; the losses are restated position by position: the
edited row of the base, the combination, its softmax, the divergence, and the gradient by autograd.
"""

import contextlib
import dataclasses
import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import brute_force
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_fixtures import folder_of, plain_tokenizer
from whp_kernels.losses import IGNORE_INDEX

from whp_fast.anchors import load_dictionary
from whp_fast.corpus import Blocks
from whp_fast.errors import UserError
from whp_fast.label import Labeller, join_npy, label_blocks, label_range, make_aligner, split_blocks
from whp_fast.model import Llama
from whp_fast.model_config import LlamaConfig
from whp_fast.reasons import NOT_FINITE
from whp_fast.soft_targets import RetainTargets, SoftTargets
from whp_fast.teacher_cache import (
    CacheWriter,
    HiddenCache,
    TargetCache,
    TargetWriter,
    cache_hidden_states,
    join_targets,
)
from whp_fast.tokens import load_tokenizer

WIDTH, CONTEXT, ALPHA = 16, 24, 5.0
ANCHORS = {
    "Orrin": "Paul",
    "Orrin Vale": "Jon Smith",
    "Glimmerhall": "the school",
    "Quill": "Jon",
    "wand": "a cup",
}
TEXT = (
    "Orrin Vale walked to Glimmerhall and said that the wand of ash was lost. Orrin was in the hall with "
    "Mr. Quill and Orrin said no. The wand was old, and Quill came down to Glimmerhall. It is said that a "
    "tree is a tree, and that a stick of ash is a stick. Orrin Vale said, Quill, the wand is in the hall, "
    "and Orrin is not.\n"
)


def tiny_model(seed, vocab_size):
    config = LlamaConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": WIDTH,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "initializer_range": 0.5,
            "tie_word_embeddings": False,
        }
    )
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.requires_grad_(False)


@functools.cache
def world():
    tokenizer = load_tokenizer(folder_of("sentencepiece"))
    aligner = make_aligner(load_dictionary(ANCHORS), tokenizer)
    tokens = np.array([1, *tokenizer.encode(TEXT * 2)], dtype=np.uint16)
    blocks = Blocks.of(tokens, CONTEXT)
    assert len(blocks[len(blocks) - 1]) < CONTEXT and len(blocks) > 8
    return SimpleNamespace(
        tokenizer=tokenizer,
        aligner=aligner,
        blocks=blocks,
        alignment=aligner.align(list(blocks)),
        base=tiny_model(1, tokenizer.vocab_size),
        reinforced=tiny_model(2, tokenizer.vocab_size),
    )


def label(folder, *, base=None, reinforced=None, dtype="bfloat16", batch_size=4, alphas=(ALPHA,), **options):
    """Labels of the whole world, and what was kept, in a folder."""
    w = world()
    keep = options.pop("keep", {})
    labeller = Labeller(
        base or w.base, reinforced or w.reinforced, w.aligner, alphas, batch_size=batch_size, **options
    )
    folder.mkdir(exist_ok=True)
    with TargetWriter(folder, WIDTH, dtype, **keep) as writer:
        return labeller.label(list(w.blocks), w.alignment, keep=writer)


@functools.cache
def kept(dtype="bfloat16"):
    """(labels [tokens], folder of the cache), made once."""
    _TEMPORARY_FOLDERS.append(tempfile.TemporaryDirectory(prefix="whp_fast_targets_"))
    folder = Path(_TEMPORARY_FOLDERS[-1].name)
    return label(folder, dtype=dtype)[0][0], folder


_TEMPORARY_FOLDERS = []  # they are removed when the interpreter ends


def restated_blocks():
    """For each block its translation by the plain rules of `brute_force`."""
    entries = brute_force.clean(ANCHORS)
    choice = {(key,): values[0] for key, values in entries.items()}
    tokenizer = plain_tokenizer("sentencepiece")
    return [
        brute_force.translate_by_text(list(map(int, b)), entries, choice, tokenizer) for b in world().blocks
    ]


def states(model, tokens):
    with torch.no_grad():
        return model.hidden_states(torch.tensor([list(map(int, tokens))]))[0]


def forbidden_at(translation, j):
    return sorted({t for introduced, tokens in translation.forbidden if introduced < j for t in tokens})


# --------------------------------------------------------------------------------- what the label stage keeps


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_kept_rows_are_what_the_heads_read(tmp_path, batch_size):
    w = world()
    labels, _, _ = label(tmp_path / "kept", batch_size=batch_size)
    cache = TargetCache(tmp_path / "kept")
    offsets, tokens = cache.edits.gather(range(cache.count))
    edits = [sorted(set(tokens[a:b].tolist())) for a, b in zip(offsets.tolist(), offsets[1:].tolist())]
    row = longest = 0
    for k, translation in enumerate(restated_blocks()):
        base, reinforced = states(w.base, translation.tokens), states(w.reinforced, w.blocks[k])
        for i, j in enumerate(translation.index_map):
            trained = labels[0, k * CONTEXT + i] != IGNORE_INDEX
            assert trained == (j >= 0)
            if not trained:
                continue
            for cached, own in ((cache.base, base[j]), (cache.reinforced, reinforced[i])):
                torch.testing.assert_close(cached.rows(row, row + 1)[0].float(), own, rtol=2**-7, atol=1e-5)
            assert edits[row] == forbidden_at(translation, j)
            longest = max(longest, len(edits[row]))
            row += 1
    assert row == cache.count and longest >= 4
    assert row < len(labels[0])  # some positions are inside expressions


def test_keeping_changes_no_label(tmp_path):
    w = world()
    labels, own, reason = label(tmp_path / "kept")
    labeller = Labeller(w.base, w.reinforced, w.aligner, [ALPHA], batch_size=4)
    for kept_one, plain in zip((labels, own, reason), labeller.label(list(w.blocks), w.alignment)):
        np.testing.assert_array_equal(kept_one, plain)
    as_blocks = label_blocks(list(w.blocks), ANCHORS, w.base, w.reinforced, w.tokenizer, ALPHA, batch_size=4)
    np.testing.assert_array_equal(np.concatenate(as_blocks), labels[0])


def broken_base():
    """A base that is NaN from the first token "hall" of a block on."""
    w = world()
    (token,) = {int(t) for t in w.blocks.tokens if w.tokenizer.token_bytes(int(t)) == b" hall"}
    model = tiny_model(1, w.tokenizer.vocab_size)
    model.model.embed_tokens.weight[token] = float("nan")
    return model


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_positions_without_a_finite_logit_have_no_row(tmp_path, dtype):
    whole, folder = kept(dtype)
    labels, _, reason = label(tmp_path / "kept", base=broken_base(), dtype=dtype)
    assert 0 < (reason == NOT_FINITE).sum() < (whole != IGNORE_INDEX).sum()
    mine, others = TargetCache(tmp_path / "kept"), TargetCache(folder)
    still = np.flatnonzero(labels[0][whole != IGNORE_INDEX] != IGNORE_INDEX)
    assert mine.count == len(still)
    for name in ("base", "reinforced"):
        same = getattr(others, name).gather(still)
        assert torch.equal(getattr(mine, name).rows(0, len(still)), same)
    for found, same in zip(mine.edits.gather(range(len(still))), others.edits.gather(still)):
        assert torch.equal(found, same)


def test_the_label_set_says_what_is_kept(tmp_path):
    # an infinite logit of the reinforced model rules its token out, but at alpha 0 (0 times infinity) the row
    w = world()
    reinforced = tiny_model(2, w.tokenizer.vocab_size)
    reinforced.lm_head.weight[7, 0] = float("inf")
    kwargs = {"reinforced": reinforced, "alphas": (ALPHA, 0.0)}
    labels, _, _ = label(tmp_path / "kept", keep={"label_set": 1}, **kwargs)
    counts = (labels != IGNORE_INDEX).sum(axis=1)
    assert 0 < counts[1] < counts[0]
    assert TargetCache(tmp_path / "kept").count == counts[1]


def test_only_hidden_states_can_be_kept(tmp_path):
    w = world()
    labeller = Labeller(lambda ids: w.base(ids), w.reinforced, w.aligner, [ALPHA])
    with pytest.raises(ValueError, match="must be Llama models"):
        labeller.label(list(w.blocks), w.alignment, keep=TargetWriter(tmp_path, WIDTH))


class TwoInOne:
    """One model whose weights are those of the base; inside ``reinforced()`` those of the other."""

    def __init__(self):
        w = world()
        self.model = tiny_model(1, w.tokenizer.vocab_size)
        self.others = {**w.reinforced.state_dict(), "lm_head.weight": w.base.lm_head.weight}
        self.mine = {**w.base.state_dict()}
        self.entered = []

    @contextlib.contextmanager
    def reinforced(self):
        self.entered.append("reinforced")
        self.model.load_state_dict(self.others)
        try:
            yield
        finally:
            self.model.load_state_dict(self.mine)

    @contextlib.contextmanager
    def base(self):
        self.entered.append("base")
        yield


def test_one_model_with_two_adapters_labels_as_two_models_do(tmp_path):
    w = world()
    other = tiny_model(2, w.tokenizer.vocab_size)
    other.lm_head.weight.copy_(w.base.lm_head.weight)
    two = label(tmp_path / "two", reinforced=other)
    both = TwoInOne()
    one = label(
        tmp_path / "one",
        base=both.model,
        reinforced=both.model,
        as_base=both.base,
        as_reinforced=both.reinforced,
    )
    for mine, theirs in zip(one, two):
        np.testing.assert_array_equal(mine, theirs)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert both.entered == ["base", "reinforced"] * -(-len(w.blocks) // 4)


class ShardedHead(Llama):
    """A model whose LM head has to be gathered before it is a matrix."""

    gathered = 0

    @property
    def lm_head_weight(self):
        def full_tensor():
            self.gathered += 1
            return self.lm_head.weight

        return SimpleNamespace(full_tensor=full_tensor)


def test_a_sharded_head_is_gathered_once(tmp_path):
    w = world()
    models = [ShardedHead(w.base.config) for _ in range(2)]
    for model, same in zip(models, (w.base, w.reinforced)):
        model.load_state_dict(same.state_dict())
    found = label(tmp_path / "sharded", base=models[0], reinforced=models[1])
    for mine, theirs in zip(found, label(tmp_path / "whole")):
        np.testing.assert_array_equal(mine, theirs)
    assert contents(tmp_path / "sharded") == contents(tmp_path / "whole")
    assert [model.gathered for model in models] == [1, 1]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------- ranges of blocks


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 7))
def test_ranges_cover_all_blocks_and_cut_between_batches(n_blocks, n_parts, batch_size):
    parts = split_blocks(n_blocks, n_parts, batch_size)
    assert len(parts) == n_parts
    assert [block for part in parts for block in part] == list(range(n_blocks))
    assert all(part.start % batch_size == 0 for part in parts if len(part))
    batches = [-(-len(part) // batch_size) for part in parts]
    assert max(batches) - min(batches) <= 1


@pytest.mark.parametrize("n_parts", [1, 2, 3, 7])
def test_labels_do_not_depend_on_how_the_blocks_are_shared_out(tmp_path, monkeypatch, n_parts):
    w = world()
    monkeypatch.setattr("whp_fast.label._BLOCKS_AT_ONCE", 4)
    labels, own, reason = label(tmp_path / "whole", batch_size=3)
    labeller = Labeller(w.base, w.reinforced, w.aligner, [ALPHA], batch_size=3)
    parts, seen = [], []
    for k, mine in enumerate(split_blocks(len(w.blocks), n_parts, 3)):
        parts.append(f"part-{k}")
        folder = tmp_path / parts[-1]
        folder.mkdir()
        with TargetWriter(folder, WIDTH) as keep:
            found = list(
                label_range(
                    labeller, w.blocks, w.alignment, mine.start, mine.stop, progress=seen.append, keep=keep
                )
            )
        assert [block for part in found for block in range(part.first, part.last)] == list(mine)
        for part in found:
            assert part.start == part.first * CONTEXT and part.stop - part.start == part.labels.shape[1]
        nothing = np.zeros(0, dtype=np.int64)
        np.save(folder / "labels.npy", np.concatenate([nothing, *(part.labels[0] for part in found)]))
        np.save(folder / "own.npy", np.concatenate([nothing, *(part.own for part in found)]))
        reasons = np.concatenate([nothing, *(part.reason for part in found)]).astype(np.uint8)
        np.save(folder / "reason.npy", reasons)
    assert sum(seen) == w.blocks.n_tokens
    monkeypatch.setattr("whp_fast.label._COPIED_ITEMS", 50)
    for name, whole in (("labels.npy", labels[0]), ("own.npy", own), ("reason.npy", reason)):
        join_npy(tmp_path, name, parts)
        joined = np.load(tmp_path / name)
        np.testing.assert_array_equal(joined, whole)
        assert joined.dtype == whole.dtype
        assert not any((tmp_path / part / name).exists() for part in parts)
    join_targets(tmp_path, parts)
    mine, theirs = TargetCache(tmp_path), TargetCache(tmp_path / "whole")
    assert mine.count == theirs.count
    for name in ("base", "reinforced"):
        everything = (getattr(cache, name).rows(0, cache.count) for cache in (mine, theirs))
        assert torch.equal(*everything)
    for a, b in zip(*(cache.edits.gather(range(cache.count)) for cache in (mine, theirs))):
        assert torch.equal(a, b)


def test_a_range_that_begins_inside_a_batch_comes_back_to_the_batches_of_the_whole():
    w = world()
    labeller = Labeller(w.base, w.reinforced, w.aligner, [ALPHA], batch_size=3)
    parts = list(label_range(labeller, w.blocks, w.alignment, 2, 9))
    assert [(part.first, part.last) for part in parts] == [(2, 3), (3, 9)]
    whole = np.concatenate([part.labels[0] for part in label_range(labeller, w.blocks, w.alignment)])
    found = np.concatenate([part.labels[0] for part in parts])
    np.testing.assert_array_equal(found, whole[2 * CONTEXT : 9 * CONTEXT])


def test_processes_that_share_sharded_models_can_keep_step():
    w = world()
    passes = {"base": 0, "reinforced": 0}

    def counted(name):
        passes[name] += 1
        return contextlib.nullcontext()

    # the first block has no position to read
    index_map = w.alignment.index_map.copy()
    index_map[:CONTEXT] = -1
    alignment = dataclasses.replace(w.alignment, index_map=index_map).blocks(0, 3)
    for every_batch, expected in ((False, 2), (True, 3)):
        passes.update(base=0, reinforced=0)
        labeller = Labeller(
            w.base,
            w.reinforced,
            w.aligner,
            [ALPHA],
            batch_size=1,
            as_base=lambda: counted("base"),
            as_reinforced=lambda: counted("reinforced"),
            every_batch=every_batch,
        )
        labeller.label([w.blocks[i] for i in range(3)], alignment)
        assert passes == {"base": expected, "reinforced": expected}
        labeller.idle(2)
        assert passes == {"base": expected + 2, "reinforced": expected + 2}


# ----------------------------------------------------------------------------------------- the losses of both


def divergence(student, target, direction):
    log_s, log_t = torch.log_softmax(student, -1), torch.log_softmax(target, -1)
    if direction == "soft":
        return (log_t.exp() * (log_t - log_s)).sum()
    return (log_s.exp() * (log_s - log_t)).sum()


def restated(hidden, head, numbers, labels, folder, alpha, direction, items):
    """The loss and its gradients in float64, position by position, from what the cache holds."""
    w, cache = world(), TargetCache(folder)
    base_head, reinforced_head = w.base.lm_head_weight.double(), w.reinforced.lm_head_weight.double()
    hidden = hidden.detach().double().requires_grad_(True)
    head = head.detach().double().requires_grad_(True)
    total = torch.zeros((), dtype=torch.float64)
    for k, number in enumerate(numbers):
        row = int((labels[: number * CONTEXT] != IGNORE_INDEX).sum())
        for i in range(len(w.blocks[number])):
            if labels[number * CONTEXT + i] == IGNORE_INDEX:
                continue
            base = base_head @ cache.base.gather([row], dtype=torch.float32)[0].double()
            reinforced = reinforced_head @ cache.reinforced.gather([row], dtype=torch.float32)[0].double()
            _, tokens = cache.edits.gather([row])
            edited = base.clone()
            edited[tokens] = base.mean()
            target = edited - alpha * torch.relu(reinforced - edited)
            total = total + divergence(head @ hidden[k, i], target, direction)
            row += 1
    total = total / items
    return total.item(), *torch.autograd.grad(total, (hidden, head))


def student_states(numbers, seed=0, padding=3):
    """Hidden states [b, T, H], a row a block: T of the longest block or more, junk behind shorter ones."""
    longest = max(len(world().blocks[n]) for n in numbers) + padding
    return torch.randn(len(numbers), longest, WIDTH, generator=torch.Generator().manual_seed(seed))


def student_head():
    return tiny_model(3, world().tokenizer.vocab_size).lm_head_weight.detach().clone()


def soft_targets(labels, folder, alpha=ALPHA, direction="soft", base=None, reinforced=None):
    w = world()
    return SoftTargets(
        folder,
        (base or w.base).lm_head_weight,
        (reinforced or w.reinforced).lm_head_weight,
        labels=labels,
        context=CONTEXT,
        alpha=alpha,
        direction=direction,
    )


def of(targets, hidden, head, numbers, items, **options):
    """Loss and gradients of a targets object, which gets the rows packed."""
    hidden, head = hidden.clone().requires_grad_(True), head.clone().requires_grad_(True)
    packed = torch.cat([hidden[k, : len(world().blocks[n])] for k, n in enumerate(numbers)])
    prepared = targets.prepare(np.array(numbers))
    loss = targets.loss(packed, head, prepared, num_items_in_batch=items, **options)
    assert loss.shape == ()
    return loss.item(), *torch.autograd.grad(loss, (hidden, head))


def close(found, expected, rtol=2e-5, rows=slice(None)):
    """Loss and gradients agree (of the hidden states only some rows); the gradients are not all nothing."""
    assert found[0] == pytest.approx(expected[0], rel=rtol)
    for mine, theirs in ((found[1][rows], expected[1]), (found[2], expected[2])):
        assert theirs.abs().max() > 1e-4
        assert (mine.double() - theirs).abs().max() < rtol * theirs.abs().max()


def last_block():
    return len(world().blocks) - 1


@pytest.mark.parametrize("direction", ["soft", "reverse"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_the_loss_and_its_gradients_are_the_formula(direction, dtype):
    labels, folder = kept(dtype)
    numbers = [5, last_block(), 0, 3]
    targets = soft_targets(labels, folder, direction=direction)
    hidden, head = student_states(numbers), student_head()
    expected = restated(hidden, head, numbers, labels, folder, ALPHA, direction, 77)
    close(of(targets, hidden, head, numbers, 77), expected)
    close(of(targets, hidden, head, numbers, 77, chunk_mib=1, compute_dtype=torch.float32), expected)


def test_a_batch_of_the_short_block_alone():
    labels, folder = kept()
    numbers = [last_block()]
    hidden, head = student_states(numbers, padding=0), student_head()
    assert hidden.shape[1] < CONTEXT
    expected = restated(hidden, head, numbers, labels, folder, ALPHA, "soft", 3)
    close(of(soft_targets(labels, folder), hidden, head, numbers, 3), expected)


def test_the_models_own_logits_give_nearly_the_same_loss():
    # the whole way without the cache: what bfloat16 rows cost
    w = world()
    labels, folder = kept()
    numbers = [1, 4]
    hidden, head = student_states(numbers), student_head()
    total, count = 0.0, 0
    for k, number in enumerate(numbers):
        translation = restated_blocks()[number]
        base_rows = states(w.base, translation.tokens).double() @ w.base.lm_head_weight.double().T
        reinforced_rows = (
            states(w.reinforced, w.blocks[number]).double() @ w.reinforced.lm_head_weight.double().T
        )
        for i, j in enumerate(translation.index_map):
            if j < 0:
                continue
            edited = base_rows[j].clone()
            edited[forbidden_at(translation, j)] = base_rows[j].mean()
            target = edited - ALPHA * torch.relu(reinforced_rows[i] - edited)
            total += divergence(head.double() @ hidden[k, i].double(), target, "soft").item()
            count += 1
    targets = soft_targets(labels, folder)
    assert targets.count(numbers) == count
    assert of(targets, hidden, head, numbers, count)[0] == pytest.approx(total / count, rel=5e-3)


def test_bfloat16_products_are_near_the_formula():
    labels, folder = kept()
    numbers = [2, 0]
    hidden, head = student_states(numbers), student_head()
    found = of(soft_targets(labels, folder), hidden, head, numbers, 9, compute_dtype=torch.bfloat16)
    close(found, restated(hidden, head, numbers, labels, folder, ALPHA, "soft", 9), rtol=0.05)


def test_only_trained_positions_have_a_gradient():
    labels, folder = kept()
    numbers = [0, last_block(), 6]
    _, d_hidden, _ = of(soft_targets(labels, folder), student_states(numbers), student_head(), numbers, 5)
    for k, number in enumerate(numbers):
        mine = labels[number * CONTEXT : (number + 1) * CONTEXT] != IGNORE_INDEX
        assert not mine.all() or number == last_block()
        trained = np.zeros(d_hidden.shape[1], dtype=bool)
        trained[: len(mine)] = mine
        np.testing.assert_array_equal((d_hidden[k] != 0).any(dim=-1).numpy(), trained)


def test_counts_are_those_of_the_labels():
    labels, folder = kept()
    targets = soft_targets(labels, folder)
    for numbers in ([], [0], [last_block()], [3, 1, 7], list(range(len(world().blocks)))):
        expected = sum(int((labels[n * CONTEXT : (n + 1) * CONTEXT] != IGNORE_INDEX).sum()) for n in numbers)
        assert targets.count(numbers) == expected


def test_rows_are_counted_over_many_pieces_of_labels(monkeypatch):
    labels, folder = kept()
    whole = soft_targets(labels, folder)
    monkeypatch.setattr("whp_fast.soft_targets._SCANNED", 3 * CONTEXT + 1)
    pieces = soft_targets(labels.astype(np.int32), folder)
    for number in range(len(world().blocks)):
        assert pieces.count([number]) == whole.count([number])


def test_micro_batches_add_up():
    labels, folder = kept()
    targets, head = soft_targets(labels, folder), student_head()
    numbers = [4, 0, 7]
    hidden = student_states(numbers)
    items = targets.count(numbers)
    whole = of(targets, hidden, head, numbers, items)
    parts = [of(targets, hidden[k : k + 1], head, numbers[k : k + 1], items) for k in range(3)]
    assert sum(part[0] for part in parts) == pytest.approx(whole[0], rel=1e-5)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), whole[1])
    torch.testing.assert_close(sum(part[2] for part in parts), whole[2])


def test_blocks_without_a_trained_position_give_zero(tmp_path):
    labels, folder = kept()
    with TargetWriter(tmp_path, WIDTH) as writer:
        cache = TargetCache(folder)
        first = int((labels[:CONTEXT] != IGNORE_INDEX).sum())
        rest = range(first, cache.count)
        offsets, tokens = (part.numpy() for part in cache.edits.gather(rest))
        writer.append(cache.base.gather(rest), cache.reinforced.gather(rest), offsets, tokens)
    masked = labels.copy()
    masked[:CONTEXT] = IGNORE_INDEX
    targets = soft_targets(masked, tmp_path)
    assert targets.count([0]) == 0
    loss, d_hidden, d_head = of(targets, student_states([0]), student_head(), [0], 4)
    assert loss == 0 and not d_hidden.any() and not d_head.any()
    hidden, head = student_states([0, 5]), student_head()
    mixed = of(targets, hidden, head, [0, 5], 4)
    close(mixed, restated(hidden[1:], head, [5], labels, folder, ALPHA, "soft", 4), rows=slice(1, 2))
    assert not mixed[1][0].any()


def test_without_offset_the_target_is_the_edited_base(tmp_path):
    w = world()
    labels, _, _ = label(tmp_path / "kept", reinforced=w.base)
    targets = soft_targets(labels[0], tmp_path / "kept", alpha=0.0, reinforced=w.base)
    cache = TargetCache(tmp_path / "kept")
    # a student that is the base where nothing is edited
    plain = [row for row in range(cache.count) if len(cache.edits.gather([row])[1]) == 0]
    counts = [targets.count([n]) for n in range(len(w.blocks))]
    number = next(
        n for n in range(len(counts)) if set(range(sum(counts[:n]), sum(counts[: n + 1]))) <= set(plain)
    )
    hidden = torch.zeros(1, CONTEXT, WIDTH)
    trained = np.flatnonzero(labels[0, number * CONTEXT : (number + 1) * CONTEXT] != IGNORE_INDEX)
    rows = range(sum(counts[:number]), sum(counts[: number + 1]))
    hidden[0, trained] = cache.base.gather(rows, dtype=torch.float32)
    loss, d_hidden, d_head = of(targets, hidden, w.base.lm_head_weight.detach(), [number], len(rows))
    assert abs(loss) < 1e-6 and d_hidden.abs().max() < 1e-5 and d_head.abs().max() < 1e-5
    student = student_states([number])
    loss, d_hidden, _ = of(targets, student, student_head(), [number], len(rows))
    expected = 0.0
    for i, row in zip(trained, rows):
        log_p = torch.log_softmax(
            w.base.lm_head_weight.double() @ cache.base.rows(row, row + 1)[0].double(), -1
        )
        log_s = torch.log_softmax(student_head().double() @ student[0, i].double(), -1)
        expected += torch.nn.functional.kl_div(log_s, log_p, reduction="sum", log_target=True).item()
    assert loss == pytest.approx(expected / len(rows), rel=1e-5)


def test_a_damaged_row_is_found_before_it_is_learned(tmp_path):
    labels, _, _ = label(tmp_path / "kept")
    path = tmp_path / "kept" / "reinforced.rows"
    data = bytearray(path.read_bytes())
    data[100] ^= 4
    path.write_bytes(bytes(data))
    targets = soft_targets(labels[0], tmp_path / "kept")
    with pytest.raises(UserError, match=r"reinforced\.rows: chunk 0 .*delete the folder .*--overwrite"):
        of(targets, student_states([0]), student_head(), [0], 1)


def test_a_cache_of_other_labels_is_refused():
    labels, folder = kept()
    other = labels.copy()
    other[np.flatnonzero(labels != IGNORE_INDEX)[0]] = IGNORE_INDEX
    with pytest.raises(UserError, match=r"base\.json: (\d+) rows for (\d+) positions with a label; delete"):
        soft_targets(other, folder)
    with pytest.raises(ValueError, match="'hard', give one of soft, reverse"):
        soft_targets(labels, folder, direction="hard")


# ------------------------------------------------------------------------------------------- a corpus to keep


@pytest.fixture(scope="module", params=["bfloat16", "float8"])
def retain(request, tmp_path_factory):
    w, folder = world(), tmp_path_factory.mktemp("retain")
    with CacheWriter(folder, "retain", WIDTH, request.param) as writer:
        cache_hidden_states(w.base, w.blocks, writer, batch_size=4)
    cache = HiddenCache(folder, "retain")
    return cache, RetainTargets(cache, w.base.lm_head_weight, w.blocks)


def test_retain_is_the_kl_to_the_base_at_all_positions_but_the_last(retain):
    w = world()
    cache, targets = retain
    numbers = [last_block(), 0, 4]
    student, weight = student_states(numbers), student_head()
    hidden, head = student.double().requires_grad_(True), weight.double().requires_grad_(True)
    total, count = 0.0, 0
    for k, number in enumerate(numbers):
        for i in range(len(w.blocks[number]) - 1):
            row = cache.gather([number * CONTEXT + i], dtype=torch.float32)[0].double()
            target = w.base.lm_head_weight.double() @ row
            total = total + divergence(head @ hidden[k, i], target, "soft")
            count += 1
    assert targets.count(numbers) == count
    expected = ((total / 50).item(), *torch.autograd.grad(total / 50, (hidden, head)))
    found = of(targets, student, weight, numbers, 50)
    close(found, expected)
    for k, number in enumerate(numbers):
        untouched = found[1][k, len(w.blocks[number]) - 1 :]
        assert not untouched.any() and found[1][k, len(w.blocks[number]) - 2].any()


def test_the_base_itself_loses_nothing_on_what_it_keeps(retain):
    w = world()
    cache, targets = retain
    hidden = cache.rows(3 * CONTEXT, 4 * CONTEXT, dtype=torch.float32)[None]
    loss, d_hidden, _ = of(targets, hidden, w.base.lm_head_weight.detach(), [3], 1)
    assert abs(loss) < 1e-5 and d_hidden.abs().max() < 1e-5
    with torch.no_grad():
        own = w.base.hidden_states(torch.from_numpy(w.blocks[3].astype(np.int64))[None])
    at_most = {"bfloat16": 1e-3, "float8": 0.2}[cache.dtype]
    assert 0 <= of(targets, own, w.base.lm_head_weight.detach(), [3], targets.count([3]))[0] < at_most


def test_a_corpus_of_another_length_is_refused(retain):
    w = world()
    other = Blocks.of(w.blocks.tokens[:-1], CONTEXT)
    with pytest.raises(
        UserError, match=r"retain\.json: \d+ rows for \d+ positions of the corpus to keep; del"
    ):
        RetainTargets(retain[0], w.base.lm_head_weight, other)
