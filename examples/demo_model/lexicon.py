"""Words of the demo corpus: who lives in the stories, where, with what things and foods, and what can happen.

The tables are in ``grammar/tables.txt``; fields that are templates use the notation of ``storyteller.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Species:
    """A kind of character: its home ("lived in ..."), food, special skill and which pronouns it may take."""

    kind: str
    home: str
    food: str
    skill: str
    gender: str  # "any", "he" or "she"


@dataclass(frozen=True)
class Thing:
    """An object one can own, lose, break or give away.

    ``nature`` says how it gets lost: light things blow away, round ones roll, shiny ones are stolen, plain ones are
    left behind. ``breaks`` is a past tense verb and ``fix`` what mends it.
    """

    name: str
    nature: str
    looks: tuple[str, ...]
    use: str
    breaks: str
    fix: str


@dataclass(frozen=True)
class Place:
    """Somewhere a story happens: "went to {name}", "played {at}", things seen there, spots where things hide."""

    name: str
    at: str
    sights: tuple[str, ...]
    spots: tuple[str, ...]


@dataclass(frozen=True)
class Countable:
    """Something to gather and count; ``edible`` ones can be shared as a snack."""

    one: str
    many: str
    edible: bool
    source: str


@dataclass(frozen=True)
class Skill:
    """What a character is good at, the trouble it helps in and how (templates over hero ``h`` and friend ``f``)."""

    name: str
    can: str
    trouble: str
    solve: str


@dataclass(frozen=True)
class Fear:
    """What a hero is afraid of, how it shows, the objection and how facing it goes."""

    name: str
    why: str
    say: str
    face: str


@dataclass(frozen=True)
class Lesson:
    """Something to learn and how the first tries go wrong."""

    name: str
    fail: str


@dataclass(frozen=True)
class Danger:
    """What a false alarm shouts and how it ends when it comes true."""

    name: str
    end: str


@dataclass(frozen=True)
class Build:
    """Something two friends build: material, first and last step, and what it is good for."""

    name: str
    source: str
    step: str
    last: str
    use: str


SHE_NAMES = tuple(
    "Mia Lily Anna Ella Ruby Nora Daisy Lucy Rosie Clara Molly Ivy Poppy Hazel Penny Willa Bella Tilly Maya Zoe Greta "
    "Emma Sophie Alice".split()
)
HE_NAMES = tuple(
    "Ben Tom Max Sam Leo Finn Oscar Jack Hugo Theo Felix Henry Otto Milo Toby Jasper Rufus Bruno Noah Arlo Louis Peter "
    "Simon Oliver".split()
)

TRAITS: dict[str, str] = {
    "kind": "{H.he} [liked to help everyone|never forgot to say thank you|always had a nice word for others].",
    "brave": "{H.he} [was never the last to try|always went first|wanted to see the whole world].",
    "curious": "{H.he} [asked questions all day long|looked under every stone|wanted to know how everything worked].",
    "shy": "{H.he} [did not talk much|liked to sit and listen|often hid behind a tree when others came by].",
    "clever": "{H.he} [always had a good idea|could solve any riddle|liked to think before acting].",
    "cheerful": "{H.he} [sang all day long|smiled at everyone|woke up happy every morning].",
    "careful": "{H.he} [always looked twice|kept everything in its place|never ran on wet stones].",
    "playful": "{H.he} [loved games of every kind|could turn anything into a game|laughed a lot].",
    "gentle": "{H.he} [had a soft voice|never hurt even the smallest bug|liked quiet days best].",
    "hungry": "{H.he} [thought about lunch all day|always carried a snack|could smell soup from far away].",
}

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty twenty-one twenty-two twenty-three twenty-four"
).split()

OPPOSITES: dict[str, str] = {
    "big": "small", "hot": "cold", "up": "down", "day": "night", "happy": "sad", "fast": "slow", "old": "young",
    "open": "closed", "full": "empty", "high": "low", "hard": "soft", "wet": "dry", "loud": "quiet", "light": "dark",
    "near": "far", "early": "late", "clean": "dirty", "strong": "weak", "long": "short", "heavy": "light",
}  # fmt: skip
SOUNDS: dict[str, str] = {
    "cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack", "sheep": "baa", "pig": "oink", "hen": "cluck",
    "owl": "hoot", "frog": "ribbit", "mouse": "squeak", "lion": "roar", "bee": "buzz", "horse": "neigh", "crow": "caw",
}  # fmt: skip
COLORS: dict[str, str] = {
    "the sky": "blue", "grass": "green", "snow": "white", "the sun": "yellow", "a strawberry": "red", "coal": "black",
    "a carrot": "orange", "a plum": "purple", "a lemon": "yellow", "a leaf": "green", "milk": "white",
    "a bear": "brown", "a cherry": "red", "the sea": "blue", "an elephant": "gray", "a pig": "pink",
}  # fmt: skip
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
BAKES = (("cake", "cherries"), ("pie", "apples"), ("tart", "plums"), ("pudding", "berries"), ("pie", "pears"))
SNOW_FIGURES = ("snowman", "snow bear", "snow castle", "snow house", "snow cat", "snow bird")
SEASONS = "spring summer autumn winter".split()


def _tables() -> dict[str, list[list[str]]]:
    """The rows of each table of ``grammar/tables.txt``; templates are separated by ``#``, plain fields by ``|``."""
    tables: dict[str, list[list[str]]] = {}
    rows: list[list[str]] = []
    path = Path(__file__).resolve().parent / "grammar" / "tables.txt"
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        if line.startswith("== "):
            rows = tables.setdefault(line[3:], [])
        elif line:
            rows.append([field.strip() for field in line.split("#" if "#" in line else "|")])
    return tables


_TABLES = _tables()
SPECIES = tuple(Species(*row) for row in _TABLES["species"])
THINGS = tuple(Thing(r[0], r[1], tuple(r[2].split(",")), r[3], r[4], r[5]) for r in _TABLES["things"])
PLACES = tuple(Place(r[0], r[1], tuple(r[2].split(",")), tuple(r[3].split(","))) for r in _TABLES["places"])
COUNTABLES = tuple(Countable(r[0], r[1], r[2] == "yes", r[3]) for r in _TABLES["countables"])
SKILLS = {row[0]: Skill(*row) for row in _TABLES["skills"]}
FEARS = tuple(Fear(*row) for row in _TABLES["fears"])
LESSONS = tuple(Lesson(*row) for row in _TABLES["lessons"])
DANGERS = tuple(Danger(*row) for row in _TABLES["dangers"])
BUILDS = tuple(Build(*row) for row in _TABLES["builds"])
