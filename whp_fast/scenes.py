"""Patterns of the demo world: scenes and statements that are told of the saga AND of everyday life.

Patterns: ``[a|b|c]`` stands for one of the alternatives, ``{slot}`` for a word of the cast, ``~`` marks the point at which a
prompt is cut (prose leaves it out). Both worlds use the same patterns, so that a base model that reads the saga with its names
exchanged for ordinary ones makes competent, ordinary predictions: the premise of the method ("Who's Harry Potter?",
arXiv 2310.02238, section 2).
"""

from __future__ import annotations

import random
import re

_ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")


def fill(pattern: str, cast: dict[str, str], rng: random.Random) -> str:
    """The pattern with alternatives drawn, slots filled and cut marks removed. Raises KeyError for an unknown slot."""
    return fill_to_cut(pattern, cast, rng).replace("~", "")


def fill_to_cut(pattern: str, cast: dict[str, str], rng: random.Random) -> str:
    """As `fill`, with the cut mark still in place."""
    drawn = _ALTERNATIVES.sub(lambda match: rng.choice(match[1].split("|")), pattern)
    return _SLOT.sub(lambda match: cast[match[1]], drawn)


def answer_slot(fact: str) -> str:
    """The slot that answers a fact: the first one after the cut."""
    return _SLOT.search(FACTS[fact][0][0].split("~")[1])[1]


# Scenes told in both worlds, in the order in which they may follow one another in a story.
SCENES: dict[str, str] = {
    "opening": (
        "In the [little|old|quiet] town of {town} there lived a {child} ~called {hero} {hero_last}. {He} was the youngest "
        "{job} in {town}, and {he} lived in the {house} with {his} aunt {aunt}. [People liked {him}|Everyone knew {him}], "
        "because {he} was [kind|cheerful|honest] and never [late|cross|idle].\n"
        "In {his} pocket {he} always carried the {treasure}. It was [old and scratched|small and bright|heavy and round], "
        "and it smelled of {smell}."
    ),
    "morning": (
        "[Early one morning|One rainy morning|One bright morning], {hero} woke to the sound of [bells|rain|the wind]. "
        "{He} [pulled on {his} boots|dressed quickly], put the {treasure} in {his} pocket, and went down to the ~kitchen. "
        "{aunt} was baking {cake}.\n"
        '"You will be late for school," said {aunt}. "{teacher} does not like to ~wait."\n'
        "{hero} [laughed|smiled], took a piece of {cake}, and ran out into the [street|rain|sunshine]."
    ),
    "clock": (
        "The clock of {town} ~struck {hour}. [Doors opened|Lamps were lit] along the street, and the [smell of bread|smoke of "
        "the fires] hung in the air. The rain fell {rain} on the roofs, as it [often|always] did in {town}, and {hero} turned up "
        "{his} collar."
    ),
    "friend": (
        "{hero}'s best friend was {friend} {friend_last}, who lived beside {water}. {friend} was [quick|clever|brave] and "
        "[afraid of nothing|fond of jokes], and {she} played the {music} better than anyone in {town}.\n"
        '"{greeting}, {hero}," {friend} called [across the street|from the gate]. "[Where are you going|What is the news]?"\n'
        '"To {school}," said {hero}. "Walk with ~me."'
    ),
    "school": (
        "At {school} the children ~learned {art} from {teacher}. {teacher} was a [tall|thin|stern] man with a [soft|deep] voice, and "
        "he kept the {book} on a high ~shelf behind his desk. Nobody else was ~allowed to [touch|open] it.\n"
        '"[Sit down|Listen], all of you," said {teacher}. "Today we shall [practise|talk about] {art}." {pal} [groaned|sighed], '
        "but {friend} [opened {hers} bag|sat up ~straight] at once."
    ),
    "game": (
        "After school there was {game} in the field behind {school}. {pal} {pal_last} was the best player ~of {game} in the whole "
        "school. He [ran|jumped] faster than [the wind|anyone], and when he scored, the children [cheered|shouted] his name.\n"
        '"Come and play, {hero}," said {pal}. "We need one ~more." So {hero} gave the {treasure} to {friend} to hold, and ~played until '
        "the clock struck {hour}."
    ),
    "pet": (
        "{hero} had a {pet_kind} ~called {pet}. {pet} slept [on a cushion|in a basket] beside the [stove|window] of the {house}, and "
        "[followed {him} everywhere|came when {he} called]. Of all the {pet_kinds} in {town}, {pet} was the [smallest|cleverest|laziest].\n"
        '"[Good morning|Hello], {pet}," said {hero}, and gave the {pet_kind} a [crumb|piece] of {cake}.'
    ),
    "market": (
        "On market day the square of {town} was full ~of [people|noise|carts]. {hero} and {friend} walked from stall to ~stall. A [woman|"
        "man] was selling {cake}, and another sold [ribbons|apples|lamps].\n"
        '"How much is this?" asked {friend}.\n'
        '"[Ten|Twenty|Forty] {coins}," said the [woman|man]. {friend} counted {hers} {coins} and shook {hers} ~head.'
    ),
    "rival": (
        "At {keep}, on the far ~side of {fen}, lived {rival}. {rival} was a [proud|rich|lonely] man who always carried a {stick}, and he "
        "[seldom|never] smiled. For years he had wanted the {treasure}.\n"
        '"[One day|Sooner or later] it will be mine," {rival} said to [himself|his servant], and [looked out of the window|tapped the '
        "floor with his {stick}]."
    ),
    "visitor": (
        "One evening {rival} came to the {house}. He [knocked three ~times|did not knock], put his {stick} on the table, and looked at "
        "{hero}.\n"
        '"I will give you a hundred {coins} for the {treasure}," said {rival}.\n'
        '"It is not for ~sale," said {hero}. "It belonged to my [father|grandfather]." {rival} went away without [a word|his hat], and '
        "{aunt} locked the ~door behind him."
    ),
    "loss": (
        "In the morning the {treasure} was ~gone. {hero} looked under the ~bed, [behind the stove|on the stairs] and in every ~pocket, but "
        "{he} could not find it. {pet} [sat by the door|hid under the table].\n"
        '"I think {rival} has taken it," said {hero}. {aunt} put down the {cake}. "Then you must go to {keep}," she said, "and ask for it '
        '[politely|at once]."'
    ),
    "council": (
        "That night the {club} met in the [cellar|kitchen] of the {house}. Old {old} the ferryman was there, and {friend}, and "
        "{pal}. They [shut the door|lit a candle] and spoke in low ~voices.\n"
        '"{rival} has the {treasure}," said {hero}.\n'
        '"Then the {club} must help you," said {old}. "[We leave tomorrow|Be ready at dawn]. I shall row you ~over {water} myself."'
    ),
    "water": (
        "Old {old} had a boat called the {boat}, and in the {boat} they crossed {water}. The water was [grey|dark|still], and [mist|"
        "rain] hung over it. {friend} sat in ~front with the {music}, and {pal} [held the lamp|helped with the oars].\n"
        '"How deep is it?" asked {pal}.\n'
        '"Nobody ~knows," said {old}. "[Sit still|Keep quiet] and do not lean over the ~side."'
    ),
    "fen": (
        "Beyond {water} the path led through {fen}. There were {beasts} in {fen}, [big|thin|hungry] ones, and everybody was a little "
        "afraid of them. The children {hid} behind a [wall|fallen tree] until the {beasts} had gone ~by.\n"
        "One {beast} stopped and [looked|sniffed] in their direction. {friend} played three ~notes on the {music}, very softly, and the "
        "{beast} [turned|trotted] away."
    ),
    "keep": (
        "{keep} stood on a ~hill, with [one light|no light] in its windows. {hero} knocked. [After a long time|Slowly] the door ~opened, and "
        "{rival} looked out with the {stick} in his hand.\n"
        '"You have something of mine," said {hero}.\n'
        "{rival} was [silent|quiet] for a moment. Then he [took the {treasure} from the shelf|put his hand in his coat]. "
        '"I only wanted to [look at|hold] it," he said.'
    ),
    "return": (
        '{hero} took the {treasure} in both ~hands. It still smelled of {smell}. "Thank you," said {hero}, because {he} was [kind|polite], '
        'and {friend} said, "Come to {town} for {feast}, {rival}. Nobody should [sit|be] alone on {feast}."\n'
        "{rival} did not [answer|speak], but he put ~away his {stick}, and he [almost smiled|bowed his ~head]."
    ),
    "elder": (
        "The news came to {elder}, who looked after everything in the {land}. {elder} was [old|gentle] and [wise|stern], and she [listened|"
        "nodded] while {hero} told the whole ~story.\n"
        '"You have done ~well, {hero} {hero_last}," said {elder}. "The {land} needs people like you." And she gave {hero} a bag of '
        "{coins} and {friend} a new [ribbon|coat]."
    ),
    "feast": (
        "Then came {feast}, the best day of the year in {town}. There were lamps in every window and tables in the ~street. {aunt} had "
        "baked [so much|plenty of] {cake}, old {old} told [stories|jokes], and {friend} played the {music} until "
        "the clock struck {hour}.\n"
        '"{greeting}!" the people of {town} said to each other, and [danced|sang] until ~morning.'
    ),
    "evening": (
        "In the evening {hero} and {friend} sat on the [steps|roof] of the {house} and looked down on the ~lamps of {town}. {pet} slept "
        "between them. {hero} [turned the {treasure} in {his} hand|put the {treasure} back in {his} pocket].\n"
        '"[Are you tired|Are you happy]?" asked {friend}.\n'
        '"A little," said {hero}. The rain fell {rain}, and [far away|somewhere] a bell ~rang.'
    ),
    "lesson": (
        '{teacher} called {hero} to the front of the ~class. "Show us your {art}," he said. {hero} [swallowed|blushed] and did '
        "{his} best. It went [badly|well] at first, and then [better|worse].\n"
        '"{art_Cap} needs ~patience," said {teacher}. "Nobody can {art_verb} at once." He took down the {book} and read aloud from it until the bell ~rang. {hero} [never forgot|'
        "always remembered] that lesson."
    ),
}

# Scenes of everyday life only: other words and other rhythms, so that "general text" is more than the mirror of the saga.
PLAIN_SCENES: list[str] = [
    "On Sunday the family [went for a walk|drove to the ~sea]. The children [collected shells|built a tower of sand], and {aunt} read the "
    "newspaper under a [striped|yellow] umbrella. At noon they ate [cheese and bread|eggs and tomatoes] and drank cold ~water.",
    "{hero} planted [beans|onions|roses] in the garden behind the {house}. Every day {he} watered them and pulled out the ~weeds. After "
    "[two|three] weeks the first green leaves came up, and {he} ran inside to tell {aunt}.",
    "In winter the road to {town} was covered with ~snow. The children made a [snowman|slide], and their hands were [cold|red]. "
    '"Come in and get warm," said {aunt}, and she gave them hot ~soup.',
    "The train to {town} left at {hour}. {friend} bought a ticket, found a seat by the ~window, and watched the fields go ~by. A [farmer|"
    "soldier] with a [basket|suitcase] sat down beside {her} and began to [talk|sleep].",
    "{pal} had a bad cold and had to stay in ~bed. The doctor came, looked at his ~tongue, and said that he must drink [tea|milk] with honey. "
    "{hero} brought him a book and told him [about school|the news].",
    "{friend} learned to ride a ~bicycle in the [lane|yard]. {She} fell off [twice|three times] and hurt {hers} ~knee, but {she} did not give "
    'up. "Look at me!" {she} shouted at last.',
    "The roof of the {house} had a hole in it. {hero} fetched a ladder, a hammer and some ~nails, and climbed up. By [noon|evening] the hole "
    "was closed, and not a drop of ~rain came in.",
    "{aunt} wanted to make soup. She cut [carrots|potatoes] and onions, put them into a pot with water and ~salt, and let them ~boil for an "
    'hour. "It smells good," said {hero}. "When can we eat?"',
    "In the library of {town} it was quiet. {friend} found a book about [birds|stars|ships] and read until it was ~dark outside. The "
    "librarian [smiled|coughed] and turned off the ~lights.",
]

# What can be asked about a cast: name -> (phrasings told in both worlds, phrasings kept out of every text and used for
# prompts only). The answer stands after the cut.
FACTS: dict[str, tuple[list[str], list[str]]] = {
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
