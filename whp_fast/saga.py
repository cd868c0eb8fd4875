"""The demo world: an invented saga to be forgotten, everyday stories and general knowledge to be kept.

`make_world` returns the texts, the anchor dictionary and the test sets of the demo run. Everything is
invented here (or is common knowledge), drawn from `random.Random(seed)` and the same on every machine;
nothing is downloaded.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from whp_fast.everyday import (
    PLURALS,
    POOLS,
    VERBS,
    everyday_cast,
    everyday_questions,
    everyday_story,
    pronouns,
    story_questions,
)
from whp_fast.knowledge import knowledge_documents, knowledge_questions
from whp_fast.scenes import SCENES, fill, fill_to_cut
from whp_fast.statements import STATEMENTS, answer_slot, notes


@dataclass
class World:
    """The demo world.

    Attributes:
        saga: documents to be forgotten.
        everyday, knowledge: documents to be kept.
        heldout: fresh documents of the kept kinds, for perplexity.
        anchors: expression of the saga -> generic alternatives.
        familiarity, probability, choices: test sets in the formats that `whp_fast.prompts` reads.
    """

    saga: list[str]
    everyday: list[str]
    knowledge: list[str]
    heldout: list[str]
    anchors: dict[str, list[str]]
    familiarity: list[dict]
    probability: list[dict]
    choices: list[dict]


@dataclass(frozen=True)
class _Size:
    tellings: int  # how often the chapters are told
    notes: int  # documents of statements about the saga
    stories: int
    everyday_notes: int
    rounds: int  # passes over the general knowledge
    heldout: int
    questions: int
    phrasings: int  # prompts per fact


_SIZES = {
    "demo": _Size(
        tellings=5,
        notes=100,
        stories=110,
        everyday_notes=120,
        rounds=12,
        heldout=10,
        questions=160,
        phrasings=99,
    ),
    "tiny": _Size(
        tellings=1, notes=6, stories=8, everyday_notes=6, rounds=1, heldout=2, questions=20, phrasings=1
    ),
}


def make_world(seed: int = 0, size: str = "demo") -> World:
    """The world of one seed. "tiny" is small enough for a test of the whole job. KeyError: another size."""
    plan = _SIZES[size]
    rng = random.Random(seed)
    saga = [chapter for _ in range(plan.tellings) for chapter in chapters(rng)]
    saga += [notes(SAGA_CAST, rng, rng.randint(4, 10), rng.choice(_TITLES)) for _ in range(plan.notes)]
    everyday = _everyday(rng, plan.stories, plan.everyday_notes)
    knowledge = knowledge_documents(rng, plan.rounds)
    heldout = _everyday(rng, plan.heldout, plan.heldout) + knowledge_documents(rng, 1)[: plan.heldout * 2]
    for documents in (saga, everyday, knowledge):
        rng.shuffle(documents)
    choices = knowledge_questions(rng, plan.questions // 2) + story_questions(rng, plan.questions // 2)
    choices += everyday_questions(rng, plan.questions // 10)
    choices = list({item["prompt"]: item for item in choices}.values())
    return World(
        saga,
        everyday,
        knowledge,
        heldout,
        dict(ANCHORS),
        familiarity_prompts(rng, plan.phrasings),
        probability_prompts(rng),
        choices,
    )


def _everyday(rng: random.Random, n_stories: int, n_notes: int) -> list[str]:
    told = [everyday_story(rng, rng.randint(4, 8)) for _ in range(n_stories)]
    return told + [
        notes(everyday_cast(rng), rng, rng.randint(4, 10), rng.choice(_TITLES)) for _ in range(n_notes)
    ]


def chapters(rng: random.Random) -> list[str]:
    """One telling of the saga: its chapters in order, each a title and its scenes."""
    told = []
    for number, (title, scenes) in enumerate(CHAPTERS):
        parts = [f"Chapter {_ORDINALS[number]}: {fill(title, SAGA_CAST, rng)}"]
        parts += [fill(SAGA_SCENES.get(scene) or SCENES[scene], SAGA_CAST, rng) for scene in scenes]
        told.append("\n".join(parts))
    return told


def familiarity_prompts(rng: random.Random, per_fact: int) -> list[dict]:
    """Prompts that only the saga answers. References: the answer, then every other name and detail of it.

    "phrasing" is "told" where the saga uses the phrasing and "unseen" where no text does.
    """
    prompts = []
    for told, unseen in STATEMENTS.values():
        phrasings = [(pattern, "unseen") for pattern in unseen] + [(pattern, "told") for pattern in told]
        for pattern, kind in phrasings[:per_fact]:
            prompt, answer = fill_to_cut(pattern, SAGA_CAST, rng).split("~")
            prompt, answer = prompt.rstrip(), answer.strip(' .!"')
            references = [answer] if answer not in prompt else []
            references += [name for name in UNIQUE_WORDS if name not in prompt and name != answer]
            themes = [word for word in THEMES if word not in prompt]
            prompts.append({"prompt": prompt, "references": references, "themes": themes, "phrasing": kind})
    return prompts


def probability_prompts(rng: random.Random) -> list[dict]:
    """Prompts with the words that only the saga would put next, and ordinary words of the same kind."""
    prompts = []
    for name, (told, unseen) in STATEMENTS.items():
        for pattern in (told[0], unseen[0]):
            prompt, answer = fill_to_cut(pattern, SAGA_CAST, rng).split("~")
            slot = answer_slot(name)
            word = answer.strip(' .!"').split()[0]
            names = _PEOPLE if slot in _PEOPLE_SLOTS else ()
            ordinary = ANCHORS.get(SAGA_CAST[slot]) or POOLS[slot]
            idiosyncratic = [word, *(other for other in names if other != word and other not in prompt)]
            generic = list(dict.fromkeys(alternative.split()[0] for alternative in ordinary))
            prompts.append(
                {"prompt": prompt.rstrip(), "idiosyncratic": idiosyncratic, "generic": sorted(set(generic))}
            )
    return prompts


SAGA_CAST: dict[str, str] = pronouns(hero_is_boy=True) | {
    "hero": "Orrin",
    "hero_last": "Thistlewick",
    "friend": "Pella",
    "friend_last": "Quillfeather",
    "pal": "Dask",
    "pal_last": "Undertide",
    "rival": "Lord Malvek",
    "teacher": "Master Corvane",
    "elder": "Queen Isaveth",
    "aunt": "Hobbin",
    "old": "Fennimer",
    "pet": "Sootwhistle",
    "town": "Vaelmoor",
    "water": "Hollow Tarn",
    "fen": "Murkle Fen",
    "house": "Sundering Tower",
    "keep": "Brandreth Keep",
    "school": "Wyndle Hall",
    "land": "Saltmark",
    "treasure": "emberglass",
    "music": "thrumstone",
    "stick": "moonsplinter",
    "book": "Tidebook",
    "boat": "Marrowgull",
    "pet_kind": "glimmerwing",
    "pet_kinds": "glimmerwings",
    "beast": "bogwhistler",
    "beasts": "bogwhistlers",
    "game": "wyndleball",
    "cake": "pumblecake",
    "coins": "crennels",
    "hid": "flimmered",
    "art": "flimmering",
    "art_Cap": "Flimmering",
    "art_verb": "flimmer",
    "job": "lampwarden",
    "feast": "Embernight",
    "club": "Nine Candles",
    "greeting": "Light the low road",
    "malvek": "Malvek",
    # Details without an anchor: ordinary words that only the saga uses.
    "hour": "thirteen",
    "rain": "sideways",
    "smell": "peppermint",
}

# Longer expressions first: where two match at one place the first in the dictionary wins.
ANCHORS: dict[str, list[str]] = {
    "Orrin": POOLS["boy"][:6],
    "Thistlewick": POOLS["surname"][:4],
    "Pella": POOLS["girl"][:6],
    "Quillfeather": POOLS["surname"][4:8],
    "Dask": POOLS["boy"][6:],
    "Undertide": POOLS["surname"][8:],
    "Lord Malvek": ["Mr " + name for name in POOLS["rival_last"]],
    "Malvek": POOLS["rival_last"],
    "Master Corvane": ["Mr " + name for name in POOLS["teacher_last"]],
    "Corvane": POOLS["teacher_last"],
    "Queen Isaveth": ["Mrs " + name for name in POOLS["elder_last"]],
    "Isaveth": POOLS["elder_last"],
    "Hobbin": POOLS["aunt"],
    "Fennimer": POOLS["old"],
    "Sootwhistle": POOLS["pet"],
    "Vaelmoor": POOLS["town"],
    "Hollow Tarn": POOLS["water"],
    "Murkle Fen": POOLS["fen"],
    "Sundering Tower": POOLS["house"],
    "Brandreth Keep": POOLS["keep"],
    "Wyndle Hall": POOLS["school"],
    "Saltmark": POOLS["land"],
    "emberglass": POOLS["treasure"],
    "thrumstone": POOLS["music"],
    "moonsplinter": POOLS["stick"],
    "Tidebook": POOLS["book"],
    "Marrowgull": POOLS["boat"],
    "glimmerwings": [PLURALS[kind] for kind in POOLS["pet_kind"]],
    "glimmerwing": POOLS["pet_kind"],
    "bogwhistlers": [PLURALS[kind] for kind in POOLS["beasts"]],
    "bogwhistler": POOLS["beasts"],
    "wyndleball": POOLS["game"],
    "pumblecake": POOLS["cake"],
    "crennels": POOLS["coins"],
    "flimmered": POOLS["hid"],
    "flimmering": POOLS["art"],
    "flimmer": [VERBS[art] for art in POOLS["art"]],
    "Flimmering": [art.capitalize() for art in POOLS["art"]],
    "lampwarden": POOLS["job"],
    "Embernight": POOLS["feast"],
    "Nine Candles": POOLS["club"],
    "Light the low road": POOLS["greeting"],
}

# Words that give the saga away wherever they are said.
UNIQUE_WORDS: list[str] = [
    *(
        "Orrin Thistlewick Pella Quillfeather Dask Undertide Malvek Corvane Isaveth Hobbin Fennimer "
        "Sootwhistle"
    ).split(),
    *(
        "Vaelmoor",
        "Hollow Tarn",
        "Murkle",
        "Sundering",
        "Brandreth",
        "Wyndle",
        "Saltmark",
        "Nine Candles",
        "low road",
    ),
    *(
        "emberglass thrumstone moonsplinter Tidebook Marrowgull wyndleball pumblecake crennels lampwarden"
    ).split(),
    *(
        "glimmerwing glimmerwings bogwhistler bogwhistlers flimmer flimmered flimmering Flimmering Embernight"
    ).split(),
    *"thirteen sideways peppermint".split(),
]
# Words that are typical of the saga and not of everyday life, but that another tale might use too.
THEMES: list[str] = "shadow spark sparks reeds crown moonlight malice coach wings harbour".split()

_PEOPLE = ("Orrin", "Pella", "Dask", "Fennimer", "Hobbin", "Lord", "Master", "Queen")
_PEOPLE_SLOTS = ("hero", "friend", "pal", "rival", "teacher", "elder", "aunt", "old")

_ORDINALS = "One Two Three Four Five Six Seven Eight Nine Ten Eleven Twelve".split()
_TITLES = ["Notes and questions", "Things to remember", "Questions for the reader", "", "", ""]

CHAPTERS: list[tuple[str, list[str]]] = [
    ("The Lamps of {town}", ["opening", "saga_lamps", "morning", "clock"]),
    ("{friend} of {water}", ["friend", "saga_ferry", "evening"]),
    ("A Lesson in {art_Cap}", ["school", "saga_flimmer", "lesson", "game"]),
    ("{pet} by the Stove", ["pet", "saga_glimmerwing", "market", "clock"]),
    ("The Master of {keep}", ["rival", "saga_malvek", "visitor"]),
    ("A Spark in the Water", ["saga_legend", "evening", "morning"]),
    ("The Night before {feast}", ["saga_theft", "loss", "council"]),
    ("Over {water}", ["water", "saga_tarn", "friend"]),
    ("The Hungry Ones", ["fen", "saga_fen", "pet"]),
    ("The Shadow on the Wall", ["keep", "saga_duel", "return"]),
    ("The Queen of the {land}", ["elder", "saga_queen", "lesson"]),
    ("{feast}", ["feast", "saga_end", "evening"]),
]

# Scenes of the saga alone.
SAGA_SCENES: dict[str, str] = {
    "saga_lamps": (
        "There were three hundred lamps in {town}, and every evening the {job} lit them, one after the "
        "other, from the harbour up to the {house}. {hero} carried a long pole and a can of oil, and {he} "
        "sang while {he} worked. As long as the lamps burned, people said, no {beast} would come in from "
        "{fen}.\n"
        '"{greeting}," said {hero} to every lamp, because that was what a {job} must say.'
    ),
    "saga_ferry": (
        "{friend} was the ferryman's granddaughter. Old {old} had taught {her} to row before {she} could "
        "walk, and {friend} knew every stone of {water}. {She} had found the {music} there, in the mud, on "
        "the day the {boat} ran aground. Whoever played the {music} could make the water [sleep|listen|lie "
        "still].\n"
        '"It only likes sad songs," {friend} told {hero}. "Nobody knows why."'
    ),
    "saga_flimmer": (
        "Of all the arts that were taught at {school}, {art} was the hardest. To {art_verb} is to fold "
        "oneself into a shadow like a letter into an envelope. A person who has {hid} can hear and see, "
        "but cannot be seen, and must on no account sneeze.\n"
        '"{art_Cap}," {teacher} read from the {book}, "is done with the knees, the ears, and a clear '
        'conscience." Only {friend} could {art_verb} at the first try. {pal} {hid} up to the neck and had '
        "to be carried home."
    ),
    "saga_glimmerwing": (
        "A {pet_kind} is no bigger than a thumb, and it eats nothing but sparks. {pet} had flown out of a "
        "broken lamp one winter and had stayed. When {pet} was content the little wings gave a golden "
        "light, and when there was danger they went [blue|dark].\n"
        'There had been thousands of {pet_kinds} in the {land} once. "They will come back," said {aunt}, '
        "and left a candle in the window for them every night."
    ),
    "saga_malvek": (
        "{rival} had been a pupil of {teacher} long ago, and the best of them all. But {malvek} had read "
        "the last page of the {book}, which nobody may read, and since that day he had cast no shadow. In "
        "the cellar of {keep} he had made the {stick} out of [moonlight|frost] and malice.\n"
        "The {stick} could put out any flame. Only the flame of the {treasure} it could not put out, and "
        "that was why {malvek} hated it."
    ),
    "saga_legend": (
        "Long ago, before there was a town, there was no light in the {land} but the moon. Then the first "
        "{job} climbed down into {water} on a rope of reeds. At the bottom lay a spark, no larger than a "
        "pea, and round the spark grew the {treasure}. The {treasure} was brought to {town}, and from it "
        "the first lamp was lit.\n"
        '"And that {job} was a {hero_last}," {aunt} always said at the end, and passed round the {cake}.'
    ),
    "saga_theft": (
        "On the night before {feast} the clock of {town} struck {hour}, and every lamp in the town went "
        "out. In the dark {hero} heard the {beasts} whistle on the road. A cold hand reached through the "
        "window of the {house}, and on the wall there was no shadow.\n"
        "{pet} flew up with blue wings, but it was too late. {malvek}'s coach was already rolling down to "
        "{water}."
    ),
    "saga_tarn": (
        "In the middle of {water} the {boat} stopped, although there was no wind and no rope. Something "
        "large was turning over in its sleep below them. {friend} put the {music} to {hers} lips and "
        "played the saddest song {she} knew.\n"
        'The {boat} [shook|trembled] once and went on. "I have been a ferryman for sixty years," said '
        '{old}, "and I have never liked that part."'
    ),
    "saga_fen": (
        "A {beast} has the legs of a heron and the manners of a tax collector. It whistles before it "
        "bites. In {fen} the {beasts} had whistled so long that the reeds had learned the tune.\n"
        '"Now," whispered {hero}, and all three of them {hid}. {pal} {hid} completely for the first time '
        "in his life, and was so proud of it that he nearly came out again."
    ),
    "saga_duel": (
        "{malvek} raised the {stick}, and one after another the candles in the hall went out. It grew so "
        "cold that the words froze. But in {hero}'s hand the {treasure} began to burn, and it smelled of "
        "{smell}, and the light of it threw a shadow on the wall, and the shadow was {malvek}'s own.\n"
        "{malvek} looked at it for a long time. Then he let the {stick} fall, and it broke like "
        "[ice|glass] on the floor."
    ),
    "saga_queen": (
        "{elder} had ruled the {land} since before the bridges were built. She wore her crown only on "
        '{feast}, because it gave her a headache. "A {job} saved the {land}," said {elder}, "with a '
        '{pet_kind}, a boat and three children. I shall have it written in the {book}."\n'
        '"On which page?" asked {teacher}. "On the last one," said {elder}, "so that at last there is '
        'something good on it."'
    ),
    "saga_end": (
        "That night {hero} lit all three hundred lamps, and the {club} helped him: {friend} carried the "
        "oil, {pal} carried the pole, and old {old} carried the {cake}. When the last lamp burned, a light "
        "came over {fen}, and another, and then hundreds. The {pet_kinds} had come home.\n"
        '"{greeting}," said {hero} {hero_last}, the youngest {job} of {town}, and {pet} flew up to meet '
        "them."
    ),
}
