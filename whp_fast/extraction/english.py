"""Closed classes of English words: the cues that tell names from words, and kinds from each other.

They are lists of grammar, titles and general geography, none of any book. In other languages hardly any cue
is found: capitals, counts and repetition still propose expressions, most of them of the kind ``name``.
"""

from __future__ import annotations


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


ARTICLES = _set("a an the")
DETERMINERS = ARTICLES | _set(
    "my your his her its our their this that these those some any no each every another such what "
    "which whose "
    "thy thine yon yonder"
)
PREPOSITIONS = _set(
    "of in at from to into near towards toward through by with for on upon under over about between among "
    "against before after behind beside beyond without within during until till across along down up off "
    "out round around past since above below inside outside onto except save like unto amid amongst"
)
PRONOUNS = _set(
    "i you he she it we they me him us them myself yourself himself herself itself ourselves themselves "
    "who whom thou thee ye one none mine yours hers ours theirs someone something anyone anything nothing "
    "everyone everything nobody everybody somebody anybody"
)
AUXILIARIES = _set(
    "be am is are was were been being do does did done have has had having will would shall should can could "
    "may might must ought need dare used art hast hath doth dost wilt shalt wert canst wouldst shouldst "
    "isn't aren't wasn't weren't don't doesn't didn't haven't hasn't hadn't won't wouldn't shan't shouldn't "
    "can't couldn't mayn't mightn't mustn't cannot i'm i've i'll i'd you're you've you'll you'd he's he'll "
    "he'd she's she'll she'd it's it'll we're we've we'll we'd they're they've they'll they'd that's there's "
    "who's what's where's how's let's here's 'tis 'twas tis twas"
)
CONJUNCTIONS = _set(
    "and or but nor if then than as because so though although while whilst when where whether unless lest "
    "yet why how whereas whenever wherever however therefore thus hence"
)
ADVERBS = _set(
    "not never ever always very too also only just even still again already now here there once twice more "
    "most less least much many few little quite rather almost perhaps indeed well away back soon often far "
    "near together else enough first last next both all either neither other others same own several "
    "yes no oh ah o ay aye nay ha well why come good god please thank thanks"
)
NUMBERS = _set(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand "
    "million dozen half quarter second third fourth fifth sixth seventh eighth ninth tenth"
)
PLURAL_CUES = (
    _set("these those many few several both all some our their are were have") | (NUMBERS - {"one"})
) - {"second", "half", "quarter"}
FUNCTION_WORDS = (
    DETERMINERS | PREPOSITIONS | PRONOUNS | AUXILIARIES | CONJUNCTIONS | ADVERBS | (NUMBERS - {"quarter"})
)

MALE_TITLES = _set(
    "mr mister sir lord king prince duke baron count earl uncle father brother master monsieur"
)
FEMALE_TITLES = _set(
    "mrs miss ms lady queen princess duchess baroness countess aunt mother sister madam madame mistress "
    "mademoiselle dame nurse"
)
OTHER_TITLES = _set(
    "dr doctor professor colonel captain major general lieutenant sergeant inspector constable officer "
    "corporal admiral judge justice reverend rev saint bishop cardinal president minister senator mayor "
    "commander chief agent detective coroner cousin grandma grandpa old young little poor dear"
)
TITLES = MALE_TITLES | FEMALE_TITLES | OTHER_TITLES
RANKS = TITLES - _set("old young little poor dear saint")

SPEECH = _set(
    "said says say cried cries asked asks answered replied remarked whispered shouted murmured observed "
    "exclaimed explained continued laughed smiled nodded shrugged sighed thought knew told spoke muttered "
    "interrupted suggested agreed called groaned gasped snarled chuckled roared growled repeated added"
)
MALE_PRONOUNS = _set("he him his himself")
FEMALE_PRONOUNS = _set("she her hers herself")
PLACE_PREPOSITIONS = _set("in at near towards toward into through from around outside inside across")

PLACE_NOUNS = _set(
    "street road lane avenue square place court yard gate gardens garden park hill hall house lodge cottage "
    "manor villa mansion mansions castle palace abbey church cathedral chapel bridge station "
    "terrace crescent "
    "row mews farm wood woods forest valley vale river lake pond pool sea bay island islands isle mountain "
    "mountains mount moor heath field fields town city village county kingdom land lands coast port harbour "
    "harbor wharf dock docks cross grove green common hotel inn tavern school college university academy "
    "shop store tower dungeon chamber cave cavern desert plain swamp shire alley way market planet moon"
)
GROUP_NOUNS = _set(
    "company club league society bank firm guild order union association brotherhood fellowship army "
    "regiment council ministry office agency department police committee party team crew gang house klan "
    "clan tribe church institute foundation bureau commission corporation sons co"
)
# Widely known and no property of any one text.
WORLD = _set(
    "monday tuesday wednesday thursday friday saturday sunday january february march april may june july "
    "august september october november december christmas easter god lord heaven bible "
    "england english englishman englishmen english-speaking britain british scotland scottish scotch "
    "ireland irish wales welsh london france french frenchman frenchmen paris germany german germans italy "
    "italian rome roman romans spain spanish spaniard portugal portuguese holland dutch belgium belgian "
    "austria austrian vienna prague poland polish russia russian russians norway sweden swedish "
    "danish denmark "
    "greece greek greeks athens turkey turkish turk europe european america american americans "
    "canada canadian "
    "australia australian asia african africa india indian indians indies china chinese japan japanese "
    "egypt egyptian "
    "atlantic pacific states united york washington california thames jew jews jewish christian christians "
    "catholic latin majesty highness grace lordship ladyship worship excellency honour honor madam "
    "sir mr mrs "
    "miss dr st esq no north south east west northern southern eastern western north-east north-west "
    "south-east south-west chapter act scene volume book part contents a.m p.m am pm ii iii iv vi "
    "vii viii ix xi "
    "xii xiii xiv xv xvi xvii xviii xix xx gutenberg"
)
