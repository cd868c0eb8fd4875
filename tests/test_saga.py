"""The demo world: deterministic, no leaks between what is forgotten and what is kept, fairly asked."""

import random
import re

import pytest

from whp_fast.everyday import POOLS, everyday_cast
from whp_fast.saga import ANCHORS, SAGA_CAST, THEMES, UNIQUE_WORDS, make_world
from whp_fast.scenes import PLAIN_SCENES, SCENES, fill
from whp_fast.statements import STATEMENTS


@pytest.fixture(scope="module")
def world():
    return make_world(0)


def says(text: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def test_same_seed_same_world(world):
    assert make_world(0) == world
    assert make_world(1) != world


def test_the_random_state_of_the_program_is_left_alone():
    random.seed(5)
    expected = random.Random(5).random()
    make_world(0, "tiny")
    assert random.random() == expected


@pytest.mark.parametrize("seed", range(3))
def test_nothing_of_the_saga_is_in_the_kept_texts(seed):
    world = make_world(seed)
    kept = "\n".join(world.everyday + world.knowledge + world.heldout)
    asked = "\n".join(str(item) for item in world.choices)
    for expression in [*world.anchors, *UNIQUE_WORDS]:
        assert not says(kept, expression), expression
        assert not says(asked, expression), expression


def test_heldout_documents_are_new(world):
    assert not set(world.heldout) & set(world.everyday + world.knowledge)


def test_every_expression_is_told_often(world):
    saga = "\n".join(world.saga)
    for expression in world.anchors:
        assert len(re.findall(rf"(?<!\w){re.escape(expression)}(?!\w)", saga)) >= 5, expression


def test_expressions_occur_in_many_forms(world):
    saga = "\n".join(world.saga)
    assert "Orrin's" in saga and "Malvek's" in saga  # possessives
    assert "\nOrrin" in saga  # at a line start
    assert any("\n" + name in saga for name in world.anchors if " " in name)  # several words at a line start
    assert '"Light the low road' in saga  # directly after a quotation mark


def test_counterparts_are_ordinary_words_of_the_same_form(world):
    everyday = "\n".join(world.everyday)
    for expression, alternatives in world.anchors.items():
        assert len(set(alternatives)) == len(alternatives) >= 4, expression
        for alternative in alternatives:
            assert says(everyday, alternative), (expression, alternative)
            assert alternative[0].isupper() == expression[0].isupper(), (expression, alternative)


def test_people_get_distinct_counterparts():
    people = ("Orrin", "Pella", "Dask", "Malvek", "Corvane", "Isaveth", "Hobbin", "Fennimer", "Sootwhistle")
    names = [alternative for person in people for alternative in ANCHORS[person]]
    assert len(names) == len(set(names))


def test_every_slot_is_filled_in_both_worlds():
    rng = random.Random(0)
    for cast in (SAGA_CAST, *(everyday_cast(rng) for _ in range(20))):
        for pattern in [
            *SCENES.values(),
            *PLAIN_SCENES,
            *(p for told, unseen in STATEMENTS.values() for p in told + unseen),
        ]:
            text = fill(pattern, cast, rng)
            assert not set("{}[]|~") & set(text), text


def test_familiarity_prompts_do_not_give_the_answer(world):
    assert len(world.familiarity) >= 60
    assert len({item["prompt"] for item in world.familiarity}) == len(world.familiarity)
    for item in world.familiarity:
        assert item["references"]
        for word in item["references"] + item["themes"]:
            assert not says(item["prompt"], word), item


def test_themes_are_of_the_saga_but_not_of_everyday_life(world):
    for word in THEMES:
        assert says("\n".join(world.saga), word), word
        assert not says("\n".join(world.everyday + world.knowledge), word), word


def test_unseen_phrasings_are_in_no_text(world):
    saga = "\n".join(world.saga)
    unseen = [item["prompt"] for item in world.familiarity if item["phrasing"] == "unseen"]
    assert len(unseen) >= 30
    assert not [prompt for prompt in unseen if prompt in saga]


def test_familiarity_of_what_is_never_told_is_never_asked(world):
    """The first reference is the answer, and the saga does say it."""
    saga = "\n".join(world.saga)
    for item in world.familiarity:
        assert says(saga, item["references"][0]), item


def test_probability_prompts(world):
    assert len(world.probability) >= 30
    kept = "\n".join(world.everyday + world.knowledge)
    for item in world.probability:
        assert item["idiosyncratic"] and item["generic"]
        assert not set(item["idiosyncratic"]) & set(item["generic"])
        for word in item["generic"]:
            assert says(kept, word), item


def test_choices(world):
    assert len(world.choices) >= 100
    assert len({item["prompt"] for item in world.choices}) == len(world.choices)
    for item in world.choices:
        if "choices" in item:
            assert len(set(item["choices"])) == 4 and 0 <= item["answer"] < 4
        else:
            assert item["answer"] and not item["prompt"].endswith(item["answer"])
    positions = [item["answer"] for item in world.choices if "choices" in item]
    assert max(positions.count(place) for place in range(4)) < 0.4 * len(
        positions
    )  # no place gives the answer away


def test_reading_questions_can_be_answered_from_the_passage(world):
    reading = [item for item in world.choices if item["prompt"].count("\n") == 3]
    assert reading
    for item in reading:
        assert says(item["prompt"], item["choices"][item["answer"]])


def test_sizes():
    tiny, demo = make_world(0, "tiny"), make_world(0)
    words = [sum(len(text.split()) for text in world.saga) for world in (tiny, demo)]
    assert words[0] < 6_000 < 15_000 < words[1] < 40_000
    with pytest.raises(KeyError):
        make_world(0, "huge")


def test_pools_do_not_overlap():
    named = [pool for slot, pool in POOLS.items() if slot not in ("teacher_title",)]
    words = [word for pool in named for word in pool]
    assert sorted({word for word in words if words.count(word) > 1}) == []
