"""Everyday life of the demo world: casts drawn from pools of ordinary names and things, and their stories."""

from __future__ import annotations

import random
import re

from whp_fast.scenes import PLAIN_SCENES, SCENES, fill, fill_to_cut
from whp_fast.statements import STATEMENTS, answer_slot

_WORD = re.compile(r"\w+")
_CUT_WORD = re.compile(r"~(\w+)")


def everyday_story(rng: random.Random, scenes: int) -> str:
    """A story: `scenes` scenes of one cast in narrative order, some of them of everyday life only."""
    cast = everyday_cast(rng)
    order = list(SCENES)
    chosen = sorted(rng.sample(range(1, len(order)), scenes - 1))
    parts = [fill(SCENES["opening"], cast, rng)] + [fill(SCENES[order[index]], cast, rng) for index in chosen]
    for position in sorted(rng.sample(range(1, len(parts)), max(1, scenes // 3)), reverse=True):
        parts[position] = fill(rng.choice(PLAIN_SCENES), cast, rng)
    return "\n".join(parts)


def everyday_questions(rng: random.Random, count: int) -> list[dict]:
    """Reading questions: notes on a fresh cast, then one of them is asked again in other words.

    Multiple choice among four words of one kind, which can only be answered from what was just read.
    """
    askable = {name: slot for name in STATEMENTS if (slot := answer_slot(name)) in POOLS and slot != "beasts"}
    questions = []
    while len(questions) < count:
        cast, name = everyday_cast(rng), rng.choice(list(askable))
        told, asked = rng.sample(STATEMENTS[name][0], 2)
        passage = [
            rng.choice(STATEMENTS[other][0]) for other in rng.sample(sorted(set(STATEMENTS) - {name}), 2)
        ]
        passage.insert(rng.randrange(3), told)
        lines = [fill(line, cast, rng) for line in passage] + [
            fill_to_cut(asked, cast, rng).split("~")[0].rstrip()
        ]
        answer = cast[askable[name]]
        choices = [answer, *rng.sample(sorted(set(POOLS[askable[name]]) - {answer}), 3)]
        rng.shuffle(choices)
        if not lines[-1].endswith('"'):
            questions.append(
                {"prompt": "\n".join(lines), "choices": choices, "answer": choices.index(answer)}
            )
    return questions


def story_questions(rng: random.Random, count: int) -> list[dict]:
    """Scenes of fresh casts, cut where one word is expected: two multiple choices of four, then a cloze."""
    scenes = [*SCENES.values(), *PLAIN_SCENES]
    words = sorted({word for scene in scenes for word in _CUT_WORD.findall(scene)})
    questions = []
    for number in range(count):
        parts = fill_to_cut(rng.choice(scenes), everyday_cast(rng), rng).split("~")
        place = rng.randrange(1, len(parts))
        prompt, answer = "".join(parts[:place]).rstrip(), _WORD.match(parts[place])[0]
        if number % 3 == 2:
            questions.append({"prompt": prompt, "answer": answer})
            continue
        choices = [answer, *rng.sample([word for word in words if word != answer], 3)]
        rng.shuffle(choices)
        questions.append({"prompt": prompt, "choices": choices, "answer": choices.index(answer)})
    return questions


def everyday_cast(rng: random.Random) -> dict[str, str]:
    """An ordinary cast: every slot drawn from its pool; a boy and a girl as hero and friend."""
    hero_is_boy = rng.random() < 0.7
    boys, surnames = rng.sample(POOLS["boy"], 2), rng.sample(POOLS["surname"], 3)
    girl = rng.choice(POOLS["girl"])
    cast = {
        slot: rng.choice(pool)
        for slot, pool in POOLS.items()
        if slot not in ("boy", "girl", "surname", "beasts")
    }
    cast |= pronouns(hero_is_boy)
    cast |= {
        "hero": boys[0] if hero_is_boy else girl,
        "friend": girl if hero_is_boy else boys[0],
        "pal": boys[1],
        "hero_last": surnames[0],
        "friend_last": surnames[1],
        "pal_last": surnames[2],
        "rival": "Mr " + cast["rival_last"],
        "teacher": cast["teacher_title"] + " " + cast["teacher_last"],
        "elder": "Mrs " + cast["elder_last"],
    }
    cast["art_Cap"], cast["art_verb"] = cast["art"].capitalize(), VERBS[cast["art"]]
    cast["pet_kinds"] = PLURALS[cast["pet_kind"]]
    cast["beast"] = rng.choice(POOLS["beasts"])
    cast["beasts"] = PLURALS[cast["beast"]]
    return cast


def pronouns(hero_is_boy: bool) -> dict[str, str]:
    """The slots {he} {him} {his} {child} for the hero and {she} {her} {hers} {maiden} for the friend."""
    boy, girl = ("he", "him", "his", "boy"), ("she", "her", "her", "girl")
    hero, friend = (boy, girl) if hero_is_boy else (girl, boy)
    slots = dict(zip(("he", "him", "his", "child"), hero)) | dict(
        zip(("she", "her", "hers", "maiden"), friend)
    )
    return slots | {name.capitalize(): word.capitalize() for name, word in slots.items()}


# The ordinary words; the anchor dictionary takes its generic alternatives from here. No word is in two
# pools, so that translated names stay distinct.
POOLS: dict[str, list[str]] = {
    "boy": "Tom Peter Jack Henry Simon Martin Robert Daniel Oliver Edward Paul Philip".split(),
    "girl": "Anna Mary Lucy Helen Sarah Emma Alice Kate Nora Ellen Jane Susan".split(),
    "surname": "Baker Cooper Miller Turner Carter Fisher Parker Mason Walker Taylor Dawson Hobbs".split(),
    "rival_last": "Grant Stone Harris Marsh Norton Bishop".split(),
    "teacher_title": ["Mr"],
    "teacher_last": "Palmer Webster Collins Ford Hughes Lawson".split(),
    "elder_last": "Bell Porter Morris Allen Dixon Hart".split(),
    "aunt": "Rose Clara Martha Agnes Edith Ruth".split(),
    "old": "Walter Albert George Arthur Ernest Samuel".split(),
    "pet": "Biscuit Pepper Button Patch Ginger Pickle".split(),
    "town": "Ashford Millbrook Weston Norwood Kingsley Fairfield Redhill Langton".split(),
    "water": ["Silver Lake", "Swan Lake", "Mill Pond", "Long Lake", "Green Water"],
    "fen": ["Oak Wood", "Birch Wood", "Low Meadow", "Fox Hill", "Heron Marsh"],
    "house": ["White Cottage", "Corner House", "Old Mill", "Brick House", "Garden Cottage"],
    "keep": ["Manor Farm", "Hill Farm", "Stone Lodge", "Park Lodge", "Church Farm"],
    "school": ["Park School", "Hill School", "Bridge School", "Grove School"],
    "land": ["North Country", "West Country", "Lake Country", "Hill Country"],
    "treasure": "compass watch locket whistle magnifier penknife".split(),
    "music": "flute drum fiddle trumpet bugle".split(),
    "stick": "cane stick telescope satchel pipe".split(),
    "book": "Almanac Atlas Songbook Dictionary Calendar".split(),
    "boat": "Swallow Robin Seagull Daisy Nightingale".split(),
    "pet_kind": "kitten puppy rabbit parrot pony".split(),
    "beasts": "goat dog goose donkey ram".split(),
    "game": "football cricket tennis hockey rounders".split(),
    "cake": "gingerbread shortbread cheesecake cornbread".split(),
    "coins": "pennies shillings coins pounds".split(),
    "hid": "hid crouched ducked waited knelt".split(),
    "art": "drawing singing painting dancing reading".split(),
    "job": "baker gardener shepherd messenger carpenter".split(),
    "feast": "Midsummer Christmas Easter Michaelmas".split(),
    "club": ["Garden Club", "Reading Club", "Walking Club", "Fishing Club"],
    "greeting": ["Good luck to you", "Good day to you", "All the best", "Mind how you go"],
    "hour": "four five six seven eight nine".split(),
    "rain": "softly steadily gently quietly".split(),
    "smell": "leather lavender honey oil soap".split(),
}
# The verb of the invented art, "to draw" beside "drawing", and plurals.
VERBS = {"drawing": "draw", "singing": "sing", "painting": "paint", "dancing": "dance", "reading": "read"}
PLURALS = {
    "kitten": "kittens", "puppy": "puppies", "rabbit": "rabbits", "parrot": "parrots", "pony": "ponies",
    "goat": "goats", "dog": "dogs", "goose": "geese", "donkey": "donkeys", "ram": "rams",
}  # fmt: skip
