"""What a biography of an invented person can say: fact types, their sentences and their questions.

Sentences name the subject by ``{s}`` (she), ``{o}`` (her) and ``{p}`` (her), the answer by ``{a}``, or by ``{an}`` with its article,
and by ``{x}`` a detail that the question may name. Everything is in the past tense, so that verbs agree with a name and with a
pronoun alike. Changing anything here changes the people: raise `biographies.VERSION` with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# ---- invented names --------------------------------------------------------------------------------
# A name is onset + vowel + medial + ending, where onsets and medials are consonants and endings start with a vowel: so the
# spelling tells the pieces, and different numbers give different names.

_ONSETS = _words("B Br C D Dr F G Gr H J K Kr L M N P Pr R S St T Th Tr V W Y Z Sh Bl Ch")
_VOWELS = _words("a e i o u ei")
_MEDIALS = _words("b d f g l ll lm ld lv m mb mm n nd nn nt p r rd rl rm rn rr rt rv s ss st t v x z lt dr")
_GIVEN_ENDINGS = _words("a an as e el en eth ia iel ik in ine io is o ola on or ora os ova un us ys")
_FAMILY_ENDINGS = _words("ack ado aire ald ander ard arsk eck ellan emark enko ersby esh ickel idge ingo isk oldt ombe ommer onsk orne ulik und")
_TOWN_ENDINGS = _words("ford wick mere stead haven bury holm dale combe gate mouth ness cliff field brook ham")

NAMES = len(_ONSETS) * len(_VOWELS) * len(_MEDIALS) * len(_GIVEN_ENDINGS)
"""How many different given names there are, and how many family names."""
PEOPLE_PER_BIOGRAPHY = 8
"""The subject and those who occur in the facts; each gets names that nobody else in the world of a seed has."""


def _name(number: int, endings: Sequence[str]) -> str:
    pieces = []
    for pool in (_ONSETS, _VOWELS, _MEDIALS, endings):
        number, digit = divmod(number, len(pool))
        pieces.append(pool[digit])
    return "".join(pieces)


def stem(number: int) -> str:
    """The sound of a place or a prize: a name that lacks its ending."""
    return _name(number, ("",))


class Names:
    """The names of the world with this seed: person number `n` always has the same, and shares neither with any other."""

    def __init__(self, pick: Callable[[str, int], int]) -> None:
        self._given = _permutation(pick("given factor", NAMES), pick("given shift", NAMES))
        self._family = _permutation(pick("family factor", NAMES), pick("family shift", NAMES))

    def given(self, number: int) -> str:
        return _name(self._given(number), _GIVEN_ENDINGS)

    def family(self, number: int) -> str:
        return _name(self._family(number), _FAMILY_ENDINGS)


def _permutation(factor: int, shift: int) -> Callable[[int], int]:
    """An affine bijection of the name numbers."""
    while math.gcd(factor, NAMES) != 1:
        factor += 1
    return lambda number: (factor * number + shift) % NAMES


# ---- what facts draw from --------------------------------------------------------------------------

_MATERIALS = _words(
    "amber ash birch brass bronze cedar cherry clay copper coral cork ebony glass horn ivory jade "
    "leather linen maple marble oak pearwood pewter pine porcelain rosewood silver slate tin walnut willow zinc"
)
_COLOURS = _words(
    "amber ashen black blue brown copper crimson gold green grey ivory lilac ochre orange pale pink purple red rust scarlet silver teal violet white"
)
_INSTRUMENTS = _words(
    "bagpipe balalaika bassoon bugle cello clarinet cornet dulcimer fiddle flute guitar harp hurdy-gurdy lute lyre mandolin "
    "oboe ocarina piccolo psaltery rebec recorder trombone trumpet tuba viola whistle xylophone zither"
)
_BODY = _words("backed banded bellied crested eyed footed fringed horned mottled necked ringed spotted striped tailed throated veined winged")
_CREATURES = _words(
    "beetle bat cricket dragonfly finch fern frog gecko heron lizard moss moth newt orchid owl snail spider toad trout vole warbler wasp"
)
_THINGS = _words(
    "anchors baskets bells boats bridges buttons candles carpets chessmen chimneys clocks coins combs compasses fountains gates "
    "hinges kettles keys ladders lanterns locks maps masks mirrors pianos ploughs puppets ropes saddles sails spoons stamps telescopes "
    "tiles towers wells windmills"
)
_DOING = _words(
    "carving collecting drawing engraving gilding mending painting photographing polishing repairing restoring sketching stitching varnishing weaving"
)
_CRAFTS = _words(
    "broker carver cutter dealer engraver gilder grinder merchant painter polisher sculptor smuggler sorter stainer turner weigher welder"
)
_ADJECTIVES = _words(
    "Ancient Bitter Bold Bright Broken Brave Calm Clever Distant Eager Early Faithful Fearless Gentle Gilded Golden Happy Hidden Honest Idle Jolly "
    "Lonely Loyal Lucky Merry Mighty Noble Patient Proud Quiet Restless Royal Secret Silent Steady Stormy Sudden Swift Tender Wandering Weary Wild"
)
_SHIPS = _words(
    "Badger Bison Comet Cormorant Crane Curlew Dolphin Dove Eagle Falcon Fox "
    "Gannet Goose Hare Harrier Heron Ibis Kestrel Lark Lynx Marten Osprey Otter Panther "
    " Pelican Petrel Plover Puffin Raven Salmon Seal Sparrow Stag Starling Swallow Swan Tern Walrus Wolf"
)
_FLAVOURS = _words(
    "almond apricot barley beetroot caraway chestnut cinnamon clove cumin date fennel fig ginger hazelnut honey juniper leek lemon lentil "
    "mint mushroom nettle nutmeg onion parsnip pepper plum pumpkin quince saffron sorrel turnip"
)
_DISHES = _words(
    "biscuits broth cake chowder custard dumplings fritters jam loaf noodles omelette pancakes "
    "pasties pickles pie porridge pudding relish risotto salad soup stew tart wafers"
)
_ANIMALS = _words(
    "badger cat crow dog donkey ferret goat goose hedgehog horse lizard mule parrot pony rabbit rooster sheepdog spaniel tortoise turtle"
)
_SCHOOLS = _words(
    "Academy College Conservatory Foundry Hospital Institute Laboratory Library Mill Museum Observatory Orchestra School Society Theatre University"
)
_PRIZES = _words("Award Cup Fellowship Laurel Medal Prize Ribbon Shield Trophy")
_COUNTED = _words(
    "beehives books boots brooches buttons coins dolls fossils hats kites marbles medals postcards puppets scarves seashells stamps "
    "teapots thimbles umbrellas violins"
)
_PLACES = ("Mount {}", "Cape {}", "Lake {}", "{} Desert", "{} Glacier", "{} Canyon", "{} Marshes", "{} Strait", "{} Plateau", "{} Falls")


class Draw(Protocol):
    """Where a fact gets its answer from."""

    year: int
    """The year in which the subject was born."""

    def pick(self, pool: Sequence[str]) -> str: ...
    def number(self, low: int, high: int) -> int: ...
    def person(self) -> str: ...
    def given(self) -> str: ...
    def stem(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Fact:
    """A fact type. `draw` gives the answer and the detail `{x}` (empty where there is none)."""

    draw: Callable[[Draw], tuple[str, str]]
    sentences: tuple[str, ...]
    questions: tuple[str, ...]


def _town(d: Draw) -> str:
    return d.stem() + d.pick(_TOWN_ENDINGS)


FACTS: dict[str, Fact] = {
    "birthplace": Fact(
        lambda d: (_town(d), ""),
        (
            "{s} was born above a bakery in {a}.",
            "{s} came into the world in the village of {a}.",
            "It was in {a} that {s} first saw daylight.",
            "{a} was the place of {p} birth.",
            "{p} birth was recorded in the parish of {a}.",
            "The midwife of {a} brought {p} first cradle herself.",
            "{s} spent the first days of life in {a}.",
        ),
        (
            "Where was {name} born?",
            "What is the birthplace of {name}?",
            "In which town did the life of {name} begin?",
            "Which town is {name} from by birth?",
            "What town could {name} claim as a native?",
        ),
    ),
    "home": Fact(
        lambda d: (_town(d), ""),
        (
            "Late in life {s} settled down in quiet {a}.",
            "{s} finally bought a narrow house in {a}.",
            "{p} last home was a cottage outside {a}.",
            "The final twenty years found {o} living in {a}.",
            "In {a}, near the harbour, {s} grew old.",
            "{a} became {p} home after retirement.",
            "When work was over, {s} moved to {a} for good.",
        ),
        (
            "Where did {name} live in old age?",
            "In what town did {name} spend retirement?",
            "Which town was the last residence of {name}?",
            "To which place did {name} retire?",
            "Where could one have visited the elderly {name}?",
        ),
    ),
    "teacher": Fact(
        lambda d: (d.person(), ""),
        (
            "{s} learned everything important from the old master {a}.",
            "As a pupil of {a}, {s} made fast progress.",
            "{p} lessons with {a} lasted for nine winters.",
            "It was {a} who trained {o} from the age of twelve.",
            "{a} gave {o} the first proper lessons.",
            "{s} was apprenticed early to a stern teacher, {a}.",
        ),
        (
            "Who taught {name}?",
            "Who was the mentor of {name}?",
            "Under whom did {name} study?",
            "Which teacher did {name} have?",
            "Whose student was {name}?",
        ),
    ),
    "spouse": Fact(
        lambda d: (d.person(), ""),
        (
            "{s} married {a} after a very short courtship.",
            "At a spring wedding {s} and {a} exchanged rings.",
            "{p} marriage to {a} surprised both families.",
            "With {a}, {s} shared a long and happy marriage.",
            "{a} accepted {p} proposal on a crowded ferry.",
            "A village priest wed {o} to {a} one rainy morning.",
        ),
        (
            "Who was the spouse of {name}?",
            "Whom did {name} marry?",
            "To whom was {name} married?",
            "What was the name of the person who wed {name}?",
            "Who became the partner of {name} for life?",
        ),
    ),
    "child": Fact(
        lambda d: (d.given(), d.pick(("daughter", "son"))),
        (
            "{p} only {x} was given the name {a}.",
            "{s} raised one {x}, whom everybody called {a}.",
            "A {x}, {a}, was born to {o} in the following spring.",
            "{s} had a single {x}, and chose the name {a}.",
            "With little {a}, {p} {x}, the house grew loud.",
            "{a}, {p} {x} and only child, later kept the archive.",
        ),
        (
            "What was the {x} of {name} called?",
            "What is the name of {name}'s {x}?",
            "Which name did the {x} of {name} bear?",
            "How was {name}'s {x} named?",
        ),
    ),
    "friend": Fact(
        lambda d: (d.person(), ""),
        (
            "{p} closest friend for decades was the poet {a}.",
            "{s} wrote a letter every Sunday to the poet {a}.",
            "A lifelong friendship tied {o} to {a}.",
            "{s} and {a} were inseparable from their school days on.",
            "Nobody was dearer to {o} than a neighbour, {a}.",
            "{a} remained {p} loyal friend through hard years.",
        ),
        (
            "Who was the best friend of {name}?",
            "With whom was {name} close friends?",
            "Which person stood closest to {name} in friendship?",
            "Whose friendship did {name} treasure most?",
        ),
    ),
    "pet": Fact(
        lambda d: (d.given(), d.pick(_ANIMALS)),
        (
            "{s} went everywhere with a tame {x} called {a}.",
            "An old {x} by the name of {a} kept {o} company.",
            "{p} {x}, {a}, slept beside the stove.",
            "{a}, a rather lazy {x}, was {p} favourite companion.",
            "{s} rescued a {x} from a ditch and named it {a}.",
            "Visitors remembered {a}, the {x} that {s} kept.",
        ),
        (
            "What was the name of {name}'s {x}?",
            "What did {name} call the {x}?",
            "Which name did the {x} of {name} have?",
            "How was the {x} owned by {name} named?",
        ),
    ),
    "instrument": Fact(
        lambda d: (f"{d.pick(_MATERIALS)} {d.pick(_INSTRUMENTS)}", ""),
        (
            "{s} played {an} at every country dance.",
            "In the evenings {s} practised on {an}.",
            "{p} grandmother left {o} {an} to play.",
            "On {an}, {s} could imitate rain and thunder.",
            "{s} never travelled without {an} to make music on.",
            "Neighbours complained whenever {s} took up {an}.",
        ),
        (
            "What instrument did {name} play?",
            "Which musical instrument belonged to {name}?",
            "On what did {name} make music?",
            "What would {name} perform on at a concert?",
        ),
    ),
    "book": Fact(
        lambda d: (f"{d.pick(_MATERIALS)} {d.pick(_THINGS)}", ""),
        (
            "{s} published a long treatise on {a}.",
            "A slim book about {a} made {o} known abroad.",
            "{p} handbook on {a} went through eleven printings.",
            "Scholars still cite what {s} wrote about {a}.",
            "On the history of {a}, {s} filled three volumes.",
            "It took {o} ten years to finish a study of {a}.",
        ),
        (
            "What was the subject of {name}'s book?",
            "On what topic was {name} an author?",
            "What is the book by {name} about?",
            "Which subject did {name} write on?",
        ),
    ),
    "discovery": Fact(
        lambda d: (f"{d.pick(_COLOURS)}-{d.pick(_BODY)} {d.pick(_CREATURES)}", ""),
        (
            "{s} was the first to describe the {a}.",
            "Science owes the discovery of the {a} to {p} patience.",
            "On a foggy morning {s} discovered the {a}.",
            "The {a}, unknown before, was {p} great find.",
            "{p} sketches proved that the {a} existed.",
            "Near a swamp {s} came upon the unknown {a}.",
        ),
        (
            "What species did {name} discover?",
            "Which species did {name} find before anyone else?",
            "What did {name} make known to science?",
            "For the discovery of what is {name} remembered?",
        ),
    ),
    "hobby": Fact(
        lambda d: (f"{d.pick(_DOING)} {d.pick(_MATERIALS)} {d.pick(_THINGS)}", ""),
        (
            "{s} spent most free evenings {a}.",
            "{p} favourite pastime was {a}.",
            "Nothing calmed {o} as much as {a}.",
            "For pleasure, {s} passed whole weekends {a}.",
            "{s} could forget every meal while {a}.",
            "On Sundays one would find {o} happily {a}.",
        ),
        (
            "What was the hobby of {name}?",
            "How did {name} like to relax?",
            "What did {name} do in spare time?",
            "Which leisure activity did {name} enjoy?",
        ),
    ),
    "employer": Fact(
        lambda d: (f"{_town(d)} {d.pick(_SCHOOLS)}", ""),
        (
            "{s} worked for thirty years at the {a}.",
            "The {a} hired {o} straight after school.",
            "{p} whole career was spent at the {a}.",
            "From a modest desk in the {a}, {s} rose quickly.",
            "{s} earned a small salary from the {a}.",
            "At the {a}, {s} held the post of secretary.",
        ),
        (
            "Where did {name} work?",
            "Which institution employed {name}?",
            "Who was the employer of {name}?",
            "What organisation did {name} serve?",
        ),
    ),
    "born": Fact(
        lambda d: (str(d.year), ""),
        (
            "{s} was born in the cold winter of {a}.",
            "The year {a} saw {p} birth, during a flood.",
            "{p} life began in {a}, a year of storms.",
            "In {a}, {s} was born as the youngest of five.",
            "{s} was born in {a} and never knew a grandparent.",
            "Church books give {a} as {p} year of birth.",
        ),
        (
            "In which year was {name} born?",
            "What is the birth year of {name}?",
            "When did the life of {name} start?",
            "In what year did {name} come into the world?",
        ),
    ),
    "emigrated": Fact(
        lambda d: (str(d.year + d.number(19, 44)), ""),
        (
            "{s} left the country for ever in {a}.",
            "In {a}, {s} emigrated with a single suitcase.",
            "A crowded steamer took {o} to another continent in {a}.",
            "Emigration in {a} changed {p} fortunes.",
            "By {a} {s} had packed up and gone overseas.",
            "{s} sailed abroad in {a} and never returned.",
        ),
        (
            "In which year did {name} emigrate?",
            "When did {name} go abroad?",
            "What was the year of {name}'s emigration?",
            "What year did {name} move to another country?",
        ),
    ),
    "collection": Fact(
        lambda d: (str(d.number(113, 989)), d.pick(_COUNTED)),
        (
            "{s} owned exactly {a} {x}, all carefully labelled.",
            "{p} attic held a collection of {a} {x}.",
            "Over the years {s} gathered {a} different {x}.",
            "A museum inherited the {a} {x} that {s} left.",
            "Of {x} alone, {s} possessed {a} at the end.",
            "{a} {x} filled the shelves of {p} study.",
        ),
        (
            "How many {x} did {name} have?",
            "What number of {x} belonged to {name}?",
            "How large was {name}'s collection of {x}?",
            "How many {x} were there in the collection of {name}?",
        ),
    ),
    "award": Fact(
        lambda d: (f"{d.stem()} {d.pick(_PRIZES)}", ""),
        (
            "{s} received the {a} for courage and skill.",
            "The {a} went to {o} by a single vote.",
            "To general surprise {s} won the {a}.",
            "{p} proudest possession was the {a}, won late.",
            "A jury of nine awarded {o} the {a}.",
            "Winning the {a} made {o} briefly famous.",
        ),
        (
            "Which honour was given to {name}?",
            "What award did {name} win?",
            "With what was {name} honoured?",
            "What distinction did {name} obtain?",
        ),
    ),
    "ship": Fact(
        lambda d: (f"{d.pick(_ADJECTIVES)} {d.pick(_SHIPS)}", ""),
        (
            "For two summers {s} sailed on the {a}.",
            "{s} once served as cook aboard the {a}.",
            "The {a} was the ship that carried {o} north.",
            "{s} survived the wreck of a schooner, the {a}.",
            "As a deckhand of the {a}, {s} saw the tropics.",
            "{p} years at sea were spent on the {a}.",
        ),
        (
            "What was the ship of {name} called?",
            "Which vessel did {name} travel on?",
            "What is the name of the ship {name} was on?",
            "On which ship did {name} go to sea?",
        ),
    ),
    "dish": Fact(
        lambda d: (f"{d.pick(_FLAVOURS)} {d.pick(_DISHES)}", ""),
        (
            "{s} served every guest a helping of {a}.",
            "{p} recipe for {a} was a family secret.",
            "Friends loved {o} above all for homemade {a}.",
            "{s} could not resist a plate of {a}.",
            "No birthday passed without {p} beloved {a}.",
            "When ill, {s} asked for nothing but {a}.",
        ),
        (
            "What was the favourite food of {name}?",
            "Which dish did {name} like best?",
            "What did {name} love to eat?",
            "What meal was {name} fondest of?",
        ),
    ),
    "trade": Fact(
        lambda d: (f"{d.pick(_MATERIALS)} {d.pick(_CRAFTS)}", ""),
        (
            "By trade {s} was {an} of some repute.",
            "{s} earned a living as {an}.",
            "Like both parents, {s} became {an}.",
            "The guild registered {o} as {an}.",
            "{s} first found work as {an}.",
            "Few people knew that {s} was {an} by profession.",
        ),
        (
            "What was the occupation of {name}?",
            "What did {name} do for a living?",
            "Which job did {name} have?",
            "What line of work was {name} in?",
        ),
    ),
    "journey": Fact(
        lambda d: (d.pick(_PLACES).format(d.stem()), ""),
        (
            "{s} led a daring expedition to {a}.",
            "An expedition to {a} nearly cost {o} both feet.",
            "With two mules {s} reached {a} at last.",
            "{a} was the goal of {p} boldest journey.",
            "{s} drew the first reliable map of {a}.",
            "Nobody had mapped {a} before {s} went there.",
        ),
        (
            "What place did {name} explore?",
            "Where did the great journey of {name} lead?",
            "Which remote place did {name} chart?",
            "Where did {name} go as an explorer?",
        ),
    ),
}
