"""Statements of the demo world: what is said, and can be asked, about a cast."""

from __future__ import annotations

import random
import re

from whp_fast.scenes import fill


def notes(cast: dict[str, str], rng: random.Random, count: int, title: str) -> str:
    """Notes on a cast: a title (or none), `count` statements, then half of them again in other words."""
    names = rng.sample(list(STATEMENTS), count)
    again = rng.sample(names, count // 2)
    phrasings = {name: rng.sample(STATEMENTS[name][0], 2) for name in names}
    lines = [phrasings[name][0] for name in names] + [phrasings[name][1] for name in again]
    return "\n".join([title] * bool(title) + [fill(line, cast, rng) for line in lines])


def answer_slot(name: str) -> str:
    """The slot that answers a statement: the first one after the cut."""
    return re.search(r"\{(\w+)\}", STATEMENTS[name][0][0].split("~")[1])[1]


# What can be asked about a cast: name -> (phrasings told in both worlds, phrasings that no text uses and that
# serve as prompts only). The answer stands after the cut.
STATEMENTS: dict[str, tuple[list[str], list[str]]] = {
    "job": (
        [
            "The youngest {job} in {town} was ~{hero} {hero_last}.",
            "Who was the {job} of {town}? It was ~{hero} {hero_last}.",
            "The name of the {job} was ~{hero} {hero_last}.",
        ],
        [
            "In those days the {job} of {town} was ~{hero}",
            "People say that the {job} of {town} was called ~{hero}",
        ],
    ),
    "town": (
        [
            "{hero} {hero_last} lived in the little town of ~{town}.",
            "Where did {hero} live? {He} lived in ~{town}.",
            "The home of {hero} and {aunt} was in ~{town}.",
        ],
        ["{hero} {hero_last} was born in ~{town}", "The {house} was a house in the old town of ~{town}"],
    ),
    "house": (
        [
            "{hero} and {his} aunt {aunt} lived in the ~{house}.",
            "Which house did {hero} live in? {He} lived in the ~{house}.",
            "{pet} slept beside the stove of the ~{house}.",
        ],
        ["At night {hero} went home to the ~{house}"],
    ),
    "aunt": (
        [
            "{hero}'s aunt was called ~{aunt}.",
            "Who baked the {cake}? It was {hero}'s aunt ~{aunt}.",
            "The {house} belonged to {his} aunt ~{aunt}.",
        ],
        ["In the kitchen of the {house} stood {hero}'s aunt ~{aunt}"],
    ),
    "treasure": (
        [
            "In {his} pocket {hero} carried the ~{treasure}.",
            "What did {hero} carry in {his} pocket? {He} carried the ~{treasure}.",
            "{rival} had always wanted the ~{treasure}.",
        ],
        ["{hero} put {his} hand in {his} pocket and felt the ~{treasure}"],
    ),
    "bearer": (
        [
            "The {treasure} belonged to ~{hero} {hero_last}.",
            "Who carried the {treasure}? It was ~{hero} {hero_last}.",
        ],
        ["The owner of the {treasure} was ~{hero}"],
    ),
    "friend": (
        [
            "{hero}'s best friend was ~{friend} {friend_last}.",
            "Who played the {music}? It was ~{friend} {friend_last}.",
            "The {maiden} with the {music} was ~{friend} {friend_last}.",
        ],
        [
            "{hero} {hero_last} and {his} best friend, ~{friend}",
            "The {maiden} beside {water} was called ~{friend}",
        ],
    ),
    "music": (
        [
            "{friend} {friend_last} played the ~{music}.",
            "What did {friend} play? {She} played the ~{music}.",
        ],
        ["{friend} sat down on the steps and played the ~{music}"],
    ),
    "water": (
        [
            "{friend} {friend_last} lived beside ~{water}.",
            "Where did {friend} live? {She} lived beside ~{water}.",
            "Old {old} rowed his boat over ~{water}.",
        ],
        ["The house of {friend} {friend_last} stood beside ~{water}"],
    ),
    "school": (
        [
            "{hero}, {friend} and {pal} went to school at ~{school}.",
            "Where did {teacher} teach? He taught at ~{school}.",
        ],
        ["In the morning {hero} and {friend} walked to ~{school}"],
    ),
    "teacher": (
        [
            "The man who taught {art} at {school} was ~{teacher}.",
            "Who taught {art}? It was ~{teacher}.",
            "The {book} was kept by ~{teacher}.",
        ],
        ["At {school} the children were taught by ~{teacher}"],
    ),
    "art": (
        [
            "{teacher} taught the children of {school} the art of ~{art}.",
            "What did {teacher} teach? He taught ~{art}.",
        ],
        ["At {school} the children had a lesson in ~{art}"],
    ),
    "book": (
        [
            "On the shelf behind {teacher}'s desk stood the ~{book}.",
            "Which book did {teacher} read from? He read from the ~{book}.",
        ],
        ["{teacher} sat down at his desk and opened the ~{book}"],
    ),
    "game": (
        [
            "After school the children of {school} played ~{game}.",
            "What did {pal} play? He played ~{game}.",
        ],
        ["In the field behind {school} {pal} played ~{game}"],
    ),
    "player": (
        [
            "The best player of {game} at {school} was ~{pal} {pal_last}.",
            "Who was the best at {game}? It was ~{pal} {pal_last}.",
        ],
        ["In every match of {game} the first to score was ~{pal}"],
    ),
    "pet": (
        [
            "{hero}'s {pet_kind} was called ~{pet}.",
            "What was the name of the {pet_kind}? It was ~{pet}.",
        ],
        ["In a basket in the {house} slept {hero}'s {pet_kind} ~{pet}"],
    ),
    "pet_kind": (
        [
            "{pet} was a small ~{pet_kind}.",
            "What was {pet}? {pet} was a ~{pet_kind}.",
        ],
        ["Everyone knew that {pet} was a clever ~{pet_kind}"],
    ),
    "cake": (
        [
            "On Sundays {aunt} baked ~{cake}.",
            "What did {aunt} bake? She baked ~{cake}.",
            "Of all things to eat {hero} liked best a piece of ~{cake}.",
        ],
        ["{aunt} opened the oven and took out the ~{cake}"],
    ),
    "rival": (
        [
            "The master of {keep} was ~{rival}.",
            "Who took the {treasure}? It was ~{rival}.",
            "The man with the {stick} was ~{rival}.",
        ],
        ["The {treasure} was stolen by ~{rival}"],
    ),
    "stick": (
        [
            "In his hand {rival} always carried a ~{stick}.",
            "What did {rival} carry? He carried a ~{stick}.",
        ],
        ["{rival} knocked on the table with his ~{stick}"],
    ),
    "keep": (
        [
            "{rival} lived alone at ~{keep}.",
            "Where did {rival} live? He lived at ~{keep}.",
        ],
        ["The house of {rival} was called ~{keep}"],
    ),
    "boat": (
        [
            "The boat of old {old} was called the ~{boat}.",
            "What was the name of the boat? It was the ~{boat}.",
            "They crossed {water} in the ~{boat}.",
        ],
        ["Old {old} the ferryman stepped into the ~{boat}"],
    ),
    "old": (
        [
            "The ferryman on {water} was old ~{old}.",
            "Who rowed the {boat}? It was old ~{old}.",
        ],
        ["The {boat} belonged to old ~{old}"],
    ),
    "beasts": (
        [
            "The path through {fen} was full of ~{beasts}.",
            "What lived in {fen}? In {fen} there were ~{beasts}.",
        ],
        ["Walking through {fen}, the children were afraid of the ~{beasts}"],
    ),
    "fen": (
        [
            "Between {water} and {keep} lay ~{fen}.",
            "Where did the {beasts} live? They lived in ~{fen}.",
        ],
        ["The {beasts} came out of ~{fen}"],
    ),
    "elder": (
        [
            "The wise old lady of the {land} was ~{elder}.",
            "Who gave {hero} a bag of {coins}? It was ~{elder}.",
        ],
        ["The whole {land} was looked after by ~{elder}"],
    ),
    "land": (
        [
            "{elder} looked after everything in the ~{land}.",
            "The town of {town} lay in the ~{land}.",
        ],
        ["{elder} came from the ~{land}"],
    ),
    "feast": (
        [
            "The best day of the year in {town} was ~{feast}.",
            "When were there lamps in every window? It was at ~{feast}.",
        ],
        ["Every year the people of {town} danced at ~{feast}"],
    ),
    "club": (
        [
            "{hero}, {friend}, {pal} and old {old} called themselves the ~{club}.",
            "Who met in the {house} at night? It was the ~{club}.",
        ],
        ["Old {old} the ferryman belonged to the ~{club}"],
    ),
    "greeting": (
        [
            'When two people met in {town}, they said, "~{greeting}!"',
            'What did {friend} call across the street? "~{greeting}!"',
        ],
        ['{hero} saw {friend} at the gate and called, "~{greeting}!"'],
    ),
    "coins": (
        [
            "{rival} wanted to pay a hundred ~{coins}.",
            "What did {elder} give to {hero}? She gave {him} a bag of ~{coins}.",
        ],
        ["In {town} everything was paid for in ~{coins}"],
    ),
    "hour": (
        [
            "At the end of the day the clock of {town} struck ~{hour}.",
            "What did the clock of {town} strike? It struck ~{hour}.",
        ],
        ["On the tower of {town} the clock struck ~{hour}"],
    ),
    "smell": (
        ["The {treasure} smelled of ~{smell}.", "What did the {treasure} smell of? It smelled of ~{smell}."],
        ["{friend} sniffed at the {treasure}, and it smelled of ~{smell}"],
    ),
    "rain": (
        ["In {town} the rain fell ~{rain}.", "How did the rain fall in {town}? It fell ~{rain}."],
        ["When it rained in {town}, the rain always fell ~{rain}"],
    ),
}
