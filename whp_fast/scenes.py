"""Patterns of the demo world: scenes that are told of the saga AND of everyday life.

Patterns: ``[a|b|c]`` stands for one of the alternatives, ``{slot}`` for a word of the cast, ``~`` marks a
point at which a prompt may be cut (prose leaves it out). Both worlds use the same patterns, so that a base
model that reads the saga with its names exchanged for ordinary ones makes competent, ordinary predictions:
the premise of the method ("Who's Harry Potter?", arXiv 2310.02238, section 2).
"""

from __future__ import annotations

import random
import re

_ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")


def fill(pattern: str, cast: dict[str, str], rng: random.Random) -> str:
    """The pattern as prose: alternatives drawn, slots filled, no cut marks. KeyError: an unknown slot."""
    return fill_to_cut(pattern, cast, rng).replace("~", "")


def fill_to_cut(pattern: str, cast: dict[str, str], rng: random.Random) -> str:
    """As `fill`, with the cut mark still in place."""
    drawn = _ALTERNATIVES.sub(lambda match: rng.choice(match[1].split("|")), pattern)
    return _SLOT.sub(lambda match: cast[match[1]], drawn)


# Scenes told in both worlds, in the order in which they may follow one another in a story.
SCENES: dict[str, str] = {
    "opening": (
        "In the [little|old|quiet] town of {town} there lived a {child} ~called {hero} {hero_last}. {He} "
        "was the youngest {job} in {town}, and {he} lived in the {house} with {his} aunt {aunt}. [People "
        "liked {him}|Everyone knew {him}], because {he} was [kind|cheerful|honest] and never "
        "[late|cross|idle].\n"
        "In {his} pocket {he} always carried the {treasure}. It was [old and scratched|small and "
        "bright|heavy and round], and it smelled of {smell}."
    ),
    "morning": (
        "[Early one morning|One rainy morning|One bright morning], {hero} woke to the sound of "
        "[bells|rain|the wind]. {He} [pulled on {his} boots|dressed quickly], put the {treasure} in {his} "
        "pocket, and went down to the ~kitchen. {aunt} was baking {cake}.\n"
        '"You will be late for school," said {aunt}. "{teacher} does not like to ~wait."\n'
        "{hero} [laughed|smiled], took a piece of {cake}, and ran out into the [street|rain|sunshine]."
    ),
    "clock": (
        "The clock of {town} ~struck {hour}. [Doors opened|Lamps were lit] along the street, and the "
        "[smell of bread|smoke of the fires] hung in the air. The rain fell {rain} on the roofs, as it "
        "[often|always] did in {town}, and {hero} turned up {his} collar."
    ),
    "friend": (
        "{hero}'s best friend was {friend} {friend_last}, who lived beside {water}. {friend} was "
        "[quick|clever|brave] and [afraid of nothing|fond of jokes], and {she} played the {music} better "
        "than anyone in {town}.\n"
        '"{greeting}, {hero}," {friend} called [across the street|from the gate]. "[Where are you '
        'going|What is the news]?"\n'
        '"To {school}," said {hero}. "Walk with ~me."'
    ),
    "school": (
        "At {school} the children ~learned {art} from {teacher}. {teacher} was a [tall|thin|stern] man "
        "with a [soft|deep] voice, and he kept the {book} on a high ~shelf behind his desk. Nobody else "
        "was ~allowed to [touch|open] it.\n"
        '"[Sit down|Listen], all of you," said {teacher}. "Today we shall [practise|talk about] {art}." '
        "{pal} [groaned|sighed], but {friend} [opened {hers} bag|sat up ~straight] at once."
    ),
    "game": (
        "After school there was {game} in the field behind {school}. {pal} {pal_last} was the best player "
        "~of {game} in the whole school. He [ran|jumped] faster than [the wind|anyone], and when he "
        "scored, the children [cheered|shouted] his name.\n"
        '"Come and play, {hero}," said {pal}. "We need one ~more." So {hero} gave the {treasure} to '
        "{friend} to hold, and ~played until the clock struck {hour}."
    ),
    "pet": (
        "{hero} had a {pet_kind} ~called {pet}. {pet} slept [on a cushion|in a basket] beside the "
        "[stove|window] of the {house}, and [followed {him} everywhere|came when {he} called]. Of all the "
        "{pet_kinds} in {town}, {pet} was the [smallest|cleverest|laziest].\n"
        '"[Good morning|Hello], {pet}," said {hero}, and gave the {pet_kind} a [crumb|piece] of {cake}.'
    ),
    "market": (
        "On market day the square of {town} was full ~of [people|noise|carts]. {hero} and {friend} walked "
        "from stall to ~stall. A [woman|man] was selling {cake}, and another sold [ribbons|apples|lamps].\n"
        '"How much is this?" asked {friend}.\n'
        '"[Ten|Twenty|Forty] {coins}," said the [woman|man]. {friend} counted {hers} {coins} and shook '
        "{hers} ~head."
    ),
    "rival": (
        "At {keep}, on the far ~side of {fen}, lived {rival}. {rival} was a [proud|rich|lonely] man who "
        "always carried a {stick}, and he [seldom|never] smiled. For years he had wanted the {treasure}.\n"
        '"[One day|Sooner or later] it will be mine," {rival} said to [himself|his servant], and [looked '
        "out of the window|tapped the floor with his {stick}]."
    ),
    "visitor": (
        "One evening {rival} came to the {house}. He [knocked three ~times|did not knock], put his {stick} "
        "on the table, and looked at {hero}.\n"
        '"I will give you a hundred {coins} for the {treasure}," said {rival}.\n'
        '"It is not for ~sale," said {hero}. "It belonged to my [father|grandfather]." {rival} went away '
        "without [a word|his hat], and {aunt} locked the ~door behind him."
    ),
    "loss": (
        "In the morning the {treasure} was ~gone. {hero} looked under the ~bed, [behind the stove|on the "
        "stairs] and in every ~pocket, but {he} could not find it. {pet} [sat by the door|hid under the "
        "table].\n"
        '"I think {rival} has taken it," said {hero}. {aunt} put down the {cake}. "Then you must go to '
        '{keep}," she said, "and ask for it [politely|at once]."'
    ),
    "council": (
        "That night the {club} met in the [cellar|kitchen] of the {house}. Old {old} the ferryman was "
        "there, and {friend}, and {pal}. They [shut the door|lit a candle] and spoke in low ~voices.\n"
        '"{rival} has the {treasure}," said {hero}.\n'
        '"Then the {club} must help you," said {old}. "[We leave tomorrow|Be ready at dawn]. I shall row '
        'you ~over {water} myself."'
    ),
    "water": (
        "Old {old} had a boat called the {boat}, and in the {boat} they crossed {water}. The water was "
        "[grey|dark|still], and [mist|rain] hung over it. {friend} sat in ~front with the {music}, and "
        "{pal} [held the lamp|helped with the oars].\n"
        '"How deep is it?" asked {pal}.\n'
        '"Nobody ~knows," said {old}. "[Sit still|Keep quiet] and do not lean over the ~side."'
    ),
    "fen": (
        "Beyond {water} the path led through {fen}. There were {beasts} in {fen}, [big|thin|hungry] ones, "
        "and everybody was a little afraid of them. The children {hid} behind a [wall|fallen tree] until "
        "the {beasts} had gone ~by.\n"
        "One {beast} stopped and [looked|sniffed] in their direction. {friend} played three ~notes on the "
        "{music}, very softly, and the {beast} [turned|trotted] away."
    ),
    "keep": (
        "{keep} stood on a ~hill, with [one light|no light] in its windows. {hero} knocked. [After a long "
        "time|Slowly] the door ~opened, and {rival} looked out with the {stick} in his hand.\n"
        '"You have something of mine," said {hero}.\n'
        "{rival} was [silent|quiet] for a moment. Then he [took the {treasure} from the shelf|put his hand "
        'in his coat]. "I only wanted to [look at|hold] it," he said.'
    ),
    "return": (
        '{hero} took the {treasure} in both ~hands. It still smelled of {smell}. "Thank you," said {hero}, '
        'because {he} was [kind|polite], and {friend} said, "Come to {town} for {feast}, {rival}. Nobody '
        'should [sit|be] alone on {feast}."\n'
        "{rival} did not [answer|speak], but he put ~away his {stick}, and he [almost smiled|bowed his "
        "~head]."
    ),
    "elder": (
        "The news came to {elder}, who looked after everything in the {land}. {elder} was [old|gentle] and "
        "[wise|stern], and she [listened|nodded] while {hero} told the whole ~story.\n"
        '"You have done ~well, {hero} {hero_last}," said {elder}. "The {land} needs people like you." And '
        "she gave {hero} a bag of {coins} and {friend} a new [ribbon|coat]."
    ),
    "feast": (
        "Then came {feast}, the best day of the year in {town}. There were lamps in every window and "
        "tables in the ~street. {aunt} had baked [so much|plenty of] {cake}, old {old} told "
        "[stories|jokes], and {friend} played the {music} until the clock struck {hour}.\n"
        '"{greeting}!" the people of {town} said to each other, and [danced|sang] until ~morning.'
    ),
    "evening": (
        "In the evening {hero} and {friend} sat on the [steps|roof] of the {house} and looked down on the "
        "~lamps of {town}. {pet} slept between them. {hero} [turned the {treasure} in {his} hand|put the "
        "{treasure} back in {his} pocket].\n"
        '"[Are you tired|Are you happy]?" asked {friend}.\n'
        '"A little," said {hero}. The rain fell {rain}, and [far away|somewhere] a bell ~rang.'
    ),
    "lesson": (
        '{teacher} called {hero} to the front of the ~class. "Show us your {art}," he said. {hero} '
        "[swallowed|blushed] and did {his} best. It went [badly|well] at first, and then [better|worse].\n"
        '"{art_Cap} needs ~patience," said {teacher}. "Nobody can {art_verb} at once." He took down the '
        "{book} and read aloud from it until the bell ~rang. {hero} [never forgot|always remembered] that "
        "lesson."
    ),
}

# Scenes of everyday life only, so that general text is more than the mirror of the saga.
PLAIN_SCENES: list[str] = [
    (
        "On Sunday the family [went for a walk|drove to the ~sea]. The children [collected shells|built a "
        "tower of sand], and {aunt} read the newspaper under a [striped|yellow] umbrella. At noon they ate "
        "[cheese and bread|eggs and tomatoes] and drank cold ~water."
    ),
    (
        "{hero} planted [beans|onions|roses] in the garden behind the {house}. Every day {he} watered them "
        "and pulled out the ~weeds. After [two|three] weeks the first green leaves came up, and {he} ran "
        "inside to tell {aunt}."
    ),
    (
        "In winter the road to {town} was covered with ~snow. The children made a [snowman|slide], and "
        'their hands were [cold|red]. "Come in and get warm," said {aunt}, and she gave them hot ~soup.'
    ),
    (
        "The train to {town} left at {hour}. {friend} bought a ticket, found a seat by the ~window, and "
        "watched the fields go ~by. A [farmer|soldier] with a [basket|suitcase] sat down beside {her} and "
        "began to [talk|sleep]."
    ),
    (
        "{pal} had a bad cold and had to stay in ~bed. The doctor came, looked at his ~tongue, and said "
        "that he must drink [tea|milk] with honey. {hero} brought him a book and told him [about "
        "school|the news]."
    ),
    (
        "{friend} learned to ride a ~bicycle in the [lane|yard]. {She} fell off [twice|three times] and "
        'hurt {hers} ~knee, but {she} did not give up. "Look at me!" {she} shouted at last.'
    ),
    (
        "The roof of the {house} had a hole in it. {hero} fetched a ladder, a hammer and some ~nails, and "
        "climbed up. By [noon|evening] the hole was closed, and not a drop of ~rain came in."
    ),
    (
        "{aunt} wanted to make soup. She cut [carrots|potatoes] and onions, put them into a pot with water "
        'and ~salt, and let them ~boil for an hour. "It smells good," said {hero}. "When can we eat?"'
    ),
    (
        "In the library of {town} it was quiet. {friend} found a book about [birds|stars|ships] and read "
        "until it was ~dark outside. The librarian [smiled|coughed] and turned off the ~lights."
    ),
]
