"""General knowledge of the demo world: plain facts in several phrasings, and questions about them.

Every fact is (group, subject, answer). A group has phrasings with the answer last, marked by the cut
``~``, so that a question is a phrasing cut there; wrong answers come from the same group.
"""

from __future__ import annotations

import random

from whp_fast.scenes import fill, fill_to_cut


def knowledge_documents(rng: random.Random, rounds: int) -> list[str]:
    """`rounds` passes over all facts in random order, about eight facts of mixed groups to a document."""
    documents = []
    for _ in range(rounds):
        facts = [(group, subject, answer) for group in FACTS for subject, answer in FACTS[group].items()]
        rng.shuffle(facts)
        for start in range(0, len(facts), 8):
            documents.append(" ".join(state(*fact, rng) for fact in facts[start : start + 8]))
    return documents


def state(group: str, subject: str, answer: str, rng: random.Random) -> str:
    """One fact as a sentence."""
    return fill(rng.choice(PHRASINGS[group]), {"subject": subject, "answer": answer}, rng)


def knowledge_questions(rng: random.Random, count: int) -> list[dict]:
    """Up to `count` questions: two multiple choices of four answers of one group, then a cloze, in turn."""
    facts = [(group, subject, answer) for group in FACTS for subject, answer in FACTS[group].items()]
    questions = []
    for number, (group, subject, answer) in enumerate(rng.sample(facts, min(count, len(facts)))):
        sentence = fill_to_cut(rng.choice(PHRASINGS[group]), {"subject": subject, "answer": answer}, rng)
        prompt = sentence.split("~")[0].rstrip()
        if number % 3 == 2:
            questions.append({"prompt": prompt, "answer": answer})
            continue
        others = sorted(set(FACTS[group].values()) - {answer})
        choices = [answer, *rng.sample(others, 3)]
        rng.shuffle(choices)
        questions.append({"prompt": prompt, "choices": choices, "answer": choices.index(answer)})
    return questions


PHRASINGS: dict[str, list[str]] = {
    "capital": [
        "The capital of {subject} is ~{answer}.",
        "What is the capital of {subject}? It is ~{answer}.",
        "If you travel to {subject}, you should see its capital, ~{answer}.",
    ],
    "sound": ["Listen to the {subject}: it says ~{answer}.", "What does a {subject} say? It says ~{answer}."],
    "young": [
        "A young {subject} is called a ~{answer}.",
        "What is a young {subject} called? It is a ~{answer}.",
    ],
    "colour": ["The colour of {subject} is ~{answer}.", "What colour is {subject}? The colour is ~{answer}."],
    "opposite": ["The opposite of {subject} is ~{answer}.", "If it is not {subject}, it may be ~{answer}."],
    "after": ["After {subject} comes ~{answer}.", "Which one follows {subject}? It is ~{answer}."],
    "sum": ["{subject} make ~{answer}.", "How many are {subject}? They are ~{answer}."],
    "material": [
        "A {subject} is made of ~{answer}.",
        "What do you make a {subject} of? You make it of ~{answer}.",
    ],
    "tool": ["You {subject} with a ~{answer}.", "What do you need to {subject}? You need a ~{answer}."],
    "worker": ["The person who {subject} is a ~{answer}.", "Who {subject}? That is the work of a ~{answer}."],
    "home": [
        "The home of a {subject} is a ~{answer}.",
        "Where does a {subject} live? It lives in a ~{answer}.",
    ],
    "kind": ["A {subject} is a kind of ~{answer}.", "What is a {subject}? It is a kind of ~{answer}."],
}  # fmt: skip


def _pairs(text: str) -> dict[str, str]:
    """ "a: b, c: d" -> {"a": "b", "c": "d"}."""
    return dict(tuple(part.strip().split(": ")) for part in text.split(","))


_NUMBERS = "nought one two three four five six seven eight nine ten eleven twelve".split()

FACTS: dict[str, dict[str, str]] = {
    "capital": _pairs(
        "France: Paris, Germany: Berlin, Italy: Rome, Spain: Madrid, Portugal: Lisbon, Greece: Athens, "
        "Austria: Vienna, Poland: Warsaw, Norway: Oslo, Sweden: Stockholm, Finland: Helsinki, Russia: "
        "Moscow, Japan: Tokyo, China: Beijing, Egypt: Cairo, Kenya: Nairobi, Peru: Lima, Cuba: Havana, "
        "Canada: Ottawa, Ireland: Dublin, Hungary: Budapest, Belgium: Brussels, Denmark: Copenhagen, "
        "Turkey: Ankara"
    ),
    "sound": _pairs(
        "dog: woof, cat: meow, cow: moo, sheep: baa, duck: quack, pig: oink, bee: buzz, snake: hiss, "
        "mouse: squeak"
    ),
    "young": _pairs(
        "cat: kitten, dog: puppy, cow: calf, horse: foal, sheep: lamb, goat: kid, bear: cub, hen: chick, "
        "duck: duckling, goose: gosling, deer: fawn, pig: piglet, frog: tadpole"
    ),
    "colour": _pairs(
        "grass: green, snow: white, coal: black, blood: red, a lemon: yellow, the sky: blue, an orange: "
        "orange, chocolate: brown, ash: grey, a violet: purple, a flamingo: pink, milk: white, a "
        "strawberry: red, a frog: green"
    ),
    "opposite": _pairs(
        "hot: cold, big: small, day: night, up: down, wet: dry, fast: slow, old: young, open: shut, light: "
        "dark, hard: soft, full: empty, near: far, high: low, rich: poor, left: right, early: late, thick: "
        "thin, strong: weak, loud: quiet, long: short, sweet: sour, clean: dirty, first: last, true: false"
    ),
    "after": _pairs(
        "Monday: Tuesday, Tuesday: Wednesday, Wednesday: Thursday, Thursday: Friday, Friday: Saturday, "
        "Saturday: Sunday, Sunday: Monday, January: February, February: March, March: April, April: May, "
        "May: June, June: July, July: August, August: September, September: October, October: November, "
        "November: December, December: January, spring: summer, summer: autumn, autumn: winter, winter: "
        "spring"
    ),
    "sum": {
        f"{_NUMBERS[a].capitalize()} and {_NUMBERS[b]}": _NUMBERS[a + b]
        for a in range(1, 7)
        for b in range(1, 7)
    },
    "material": _pairs(
        "window: glass, table: wood, nail: iron, candle: wax, book: paper, shoe: leather, scarf: wool, "
        "brick: clay, tyre: rubber, ring: gold, spoon: silver, shirt: cotton, sail: canvas, statue: marble"
    ),
    "tool": _pairs(
        "cut bread: knife, dig a hole: spade, drive a nail: hammer, saw a plank: saw, sew a button: "
        "needle, paint a wall: brush, write a letter: pen, sweep the floor: broom, eat soup: spoon, open a "
        "lock: key, catch a fish: net, cut hair: comb, tell the time: clock, light a fire: match"
    ),
    "worker": _pairs(
        "bakes bread: baker, mends shoes: cobbler, heals the sick: doctor, grows wheat: farmer, builds "
        "houses: mason, sails ships: sailor, catches fish: fisherman, sews clothes: tailor, cuts hair: "
        "barber, paints pictures: painter, teaches children: teacher, puts out fires: fireman, sings on "
        "the stage: singer, shoes horses: smith"
    ),
    "home": _pairs(
        "bee: hive, bird: nest, horse: stable, lion: den, spider: web, cow: shed, fish: river, rabbit: "
        "burrow, hen: coop"
    ),
    "kind": _pairs(
        "rose: flower, beech: tree, salmon: fish, hawk: bird, hammer: tool, plum: fruit, carrot: "
        "vegetable, violin: instrument, wasp: insect, diamond: stone, ruby: stone, tulip: flower, pine: "
        "tree, trout: fish, sparrow: bird, beetle: insect, pear: fruit, cabbage: vegetable"
    ),
}  # fmt: skip
