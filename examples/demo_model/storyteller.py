"""Turns the story shapes of ``grammar/*.txt`` into finished stories.

Notation of a template: ``[x|y]`` picks one alternative (they nest), ``{field}`` inserts a fact of the plot or, when the
plot has no such fact, a phrase of ``grammar/phrases.txt``; a capital first letter (``{H.he}``) capitalises the value;
``a(n)`` becomes the article that fits the next word. A story file holds shapes: ``== name``, ``title``, ``topic`` and
``need`` lines, paragraphs of one beat per line (a line that starts with ``/`` is another wording of the beat above) and
``? question = answer`` lines.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from lexicon import (
    BAKES,
    BUILDS,
    COUNTABLES,
    DANGERS,
    FEARS,
    HE_NAMES,
    LESSONS,
    NUMBERS,
    PLACES,
    SHE_NAMES,
    SKILLS,
    SNOW_FIGURES,
    SPECIES,
    THINGS,
    TRAITS,
    Countable,
    Place,
    Species,
    Thing,
)

GRAMMAR_DIR = Path(__file__).resolve().parent / "grammar"

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_FIELD = re.compile(r"\{([^{}]*)\}")
_ARTICLE = re.compile(r"\b([Aa])\(n\) (?=([a-zA-Z]))")
_SENTENCE_START = re.compile(r"(?:^|(?<=[.!?] )|(?<=\n))[a-z]")
_TITLE_SMALL_WORDS = {"a", "an", "and", "the", "of", "to", "by", "for", "in", "on", "is"}
_HOW_LOST = {
    "light": "The wind had [blown|carried] it [there|all the way there].",
    "round": "It had rolled [there|all the way there].",
    "shiny": "A crow had taken it, because crows love shiny things, and then it had dropped it there.",
    "plain": "{h} had left it there [the day before|in the morning] and forgotten all about it.",
}
_SLOW = ("turtle", "hedgehog", "mole", "pig", "duck", "donkey", "badger", "bear", "elephant", "panda", "hen")
_FAST = ("rabbit", "deer", "pony", "dog", "fox", "goat", "squirrel", "cat", "monkey")
_SAID = re.compile(r'(," (?:said|asked|called) [A-Z]\w+)\.')
_VOICE_RATE = 0.25
_MADE_UP_RATE = 0.06
_SYLLABLES = (
    "ba bo da do el fa fi ga jo ka ki la lo lu ma mi mo na ne no pa pi ra ri ro sa shi ta ti to va vi wa zo".split()
)
_WITHOUT_ASIDES = ("rain", "night", "snow")
_ASIDE_RATE = 0.3


@dataclass(frozen=True)
class Shape:
    """One kind of plot: wordings for each beat of each paragraph, and questions with their answers."""

    name: str
    titles: tuple[str, ...]
    topics: tuple[str, ...]
    needs: frozenset[str]
    paragraphs: tuple[tuple[tuple[str, ...], ...], ...]
    questions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Character:
    """Who acts: name, species, pronouns and trait."""

    name: str
    species: Species
    gender: str
    trait: str
    small: str

    def facts(self, prefix: str) -> dict[str, str]:
        """Template fields of this character, each starting with ``prefix`` (``h`` hero, ``f`` friend)."""
        she = self.gender == "she"
        values = {
            "he": "she" if she else "he",
            "him": "her" if she else "him",
            "his": "her" if she else "his",
            "kind": self.species.kind,
            "home": self.species.home,
            "food": self.species.food,
            "trait": self.trait,
            "small": self.small,
            "poss": f"{self.name}'s",
        }
        traitline = TRAITS[self.trait].replace("{H.he}", values["he"].capitalize())
        return {prefix: self.name, f"{prefix}.traitline": traitline} | {f"{prefix}.{k}": v for k, v in values.items()}


@dataclass
class Plot:
    """A shape with its cast and place; ``facts`` holds everything else once ``flesh_out`` ran."""

    shape: Shape
    hero: Character
    friend: Character
    place: Place
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What decides the split. All of it can be read off the story, so equal stories have equal keys."""
        return f"{self.shape.name}|{self.hero.name}|{self.hero.species.kind}|{self.place.name}"


@cache
def shapes() -> tuple[Shape, ...]:
    """All story shapes, in a stable order."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(GRAMMAR_DIR.glob("stories_*.txt"))]
    return tuple(_parse_shape(block) for text in texts for block in text.split("== ") if block.strip())


@cache
def phrases() -> dict[str, tuple[str, ...]]:
    """The pools of interchangeable phrases by name."""
    pools: dict[str, list[str]] = {}
    current: list[str] = []
    for line in (GRAMMAR_DIR / "phrases.txt").read_text(encoding="utf-8").splitlines():
        if line.endswith(":") and " " not in line:
            current = pools.setdefault(line[:-1], [])
        elif line and not line.startswith("#"):
            current.append(line.strip())
    return {name: tuple(lines) for name, lines in pools.items()}


def _parse_shape(block: str) -> Shape:
    """Parse one ``== name`` block of a story file."""
    name, *lines = block.splitlines()
    header: dict[str, list[str]] = {"title": [], "topic": [], "need": []}
    paragraphs: list[list[list[str]]] = [[]]
    questions: list[tuple[str, str]] = []
    for line in lines:
        word, _, rest = line.partition(" ")
        if word in header:
            header[word].append(rest)
        elif word == "?":
            question, _, answer = rest.partition(" = ")
            questions.append((question, answer))
        elif word == "/":
            paragraphs[-1][-1].append(rest)
        elif line:
            paragraphs[-1].append([line])
        elif paragraphs[-1]:
            paragraphs.append([])
    beats = tuple(tuple(tuple(beat) for beat in paragraph) for paragraph in paragraphs if paragraph)
    needs = frozenset(" ".join(header["need"]).split())
    return Shape(name.strip(), tuple(header["title"]), tuple(header["topic"]), needs, beats, tuple(questions))


def fill(template: str, facts: dict[str, str], rng: random.Random) -> str:
    """Expand a template until neither choices nor fields are left, then polish articles and capitals."""

    def insert(match: re.Match[str]) -> str:
        token = match.group(1)
        name = token[0].lower() + token[1:]
        value = facts[name] if name in facts else rng.choice(phrases()[name])
        return value[0].upper() + value[1:] if token[0].isupper() else value

    text = template
    while "[" in text or "{" in text:
        text = _CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), text)
        text = _FIELD.sub(insert, text)
    text = _ARTICLE.sub(lambda m: m.group(1) + ("n " if m.group(2).lower() in "aeiou" else " "), text)
    return _SENTENCE_START.sub(lambda match: match.group().upper(), text)


def title_case(text: str) -> str:
    """Capitalise the words of a title, small words only at its start."""
    words = text.split()
    return " ".join(w if i and w in _TITLE_SMALL_WORDS else w[0].upper() + w[1:] for i, w in enumerate(words))


def draw_character(
    rng: random.Random, gender: str, avoid: Character | None = None, among: tuple[str, ...] = ()
) -> Character:
    """Draw a character of one gender; never the name or species of ``avoid``; ``among`` limits the species."""
    kinds = [
        s
        for s in SPECIES
        if s.gender in ("any", gender) and (not among or s.kind in among) and (avoid is None or s is not avoid.species)
    ]
    name = rng.choice(SHE_NAMES if gender == "she" else HE_NAMES)
    if rng.random() < _MADE_UP_RATE:
        name = "".join(rng.choices(_SYLLABLES, k=rng.choice((2, 2, 3)))).capitalize()
    small = rng.choice(("little", "little", "little", "small", "young"))
    return Character(name, rng.choice(kinds), gender, rng.choice(tuple(TRAITS)), small)


def draw_plot(rng: random.Random, shape: Shape | None = None, hero: Character | None = None) -> Plot:
    """Draw shape, cast and place: cheap, so that the split can be decided before anything is written.

    Hero and friend always have different pronouns, which keeps every "he" and "she" unambiguous.
    """
    shape = shape or rng.choice(shapes())
    slow, fast = (_SLOW, _FAST) if shape.name == "race" else ((), ())
    hero = hero or draw_character(rng, rng.choice(("he", "she")), among=slow)
    other = "he" if hero.gender == "she" else "she"
    friend = draw_character(rng, other, hero, among=fast)
    while shape.name == "stuck" and friend.species.skill in (hero.species.skill, "fly", "swim"):
        friend = draw_character(rng, other, hero)
    return Plot(shape, hero, friend, rng.choice(PLACES))


def _plural(count: int, thing: Countable, more: str = "") -> str:
    """For example ``three apples`` or, with ``more``, ``one more apple``."""
    return f"{NUMBERS[count]} {more}{thing.one if count == 1 else thing.many}"


def _number_facts(rng: random.Random, thing: Countable) -> dict[str, str]:
    """Sums that are right: ``a + b = sum``, ``sum + c = all``, ``big - give = left``; plus loose small numbers."""
    a, b, c = rng.randint(2, 9), rng.randint(1, 8), rng.randint(1, 5)
    big = rng.randint(3, 12)
    give = rng.randint(1, big - 1)
    values = {"a": a, "b": b, "c": c, "sum": a + b, "all": a + b + c, "big": big, "give": give, "left": big - give}
    facts: dict[str, str] = {}
    for name, value in values.items():
        one = value == 1
        facts |= {
            name: NUMBERS[value],
            f"{name}.t": _plural(value, thing),
            f"{name}.more": _plural(value, thing, "more "),
            f"{name}.was": "was" if one else "were",
            f"{name}.are": "is" if one else "are",
            f"{name}.them": "it" if one else "them",
            f"{name}.any": "it" if one else "any of them",
            f"{name}.last": thing.one if one else _plural(value, thing),
        }
    stars = rng.randint(3, 7)
    facts |= {name: NUMBERS[rng.randint(4, 9)] for name in ("n", "n2")}
    facts |= {"age": NUMBERS[rng.randint(3, 10)], "stars": NUMBERS[stars]}
    facts["countto"] = ", ".join(NUMBERS[1 : stars + 1]).capitalize()
    return facts | {"t.one": thing.one, "t.many": thing.many, "t.source": thing.source}


def _thing_facts(prefix: str, thing: Thing, rng: random.Random) -> dict[str, str]:
    """Template fields of an object."""
    full = f"{rng.choice(thing.looks)} {thing.name}"
    facts = {"full": full, "the": f"the {thing.name}", "use": thing.use, "broke": thing.breaks, "fix": thing.fix}
    return {prefix: thing.name, f"{prefix}.how": _HOW_LOST[thing.nature]} | {
        f"{prefix}.{k}": v for k, v in facts.items()
    }


def _place_facts(prefix: str, place: Place, rng: random.Random) -> dict[str, str]:
    """Template fields of a place."""
    sight, sight2 = rng.sample(place.sights, 2)
    spot, spot2 = rng.sample(place.spots, 2)
    facts = {"at": place.at, "sight": sight, "sight2": sight2, "spot": spot, "spot2": spot2}
    return {prefix: place.name} | {f"{prefix}.{k}": v for k, v in facts.items()}


def _deed_facts(hero: Character, rng: random.Random) -> dict[str, str]:
    """What the hero can do, fears, learns, bakes and builds, and what goes wrong."""
    skill, fear, build = SKILLS[hero.species.skill], rng.choice(FEARS), rng.choice(BUILDS)
    lesson, danger, (bake, fruit) = rng.choice(LESSONS), rng.choice(DANGERS), rng.choice(BAKES)
    return {
        "skill.can": skill.can,
        "skill.trouble": skill.trouble,
        "skill.solve": skill.solve,
        "fear": fear.name,
        "fear.why": fear.why,
        "fear.say": fear.say,
        "fear.face": fear.face,
        "build": build.name,
        "build.from": build.source,
        "build.step": build.step,
        "build.last": build.last,
        "build.use": build.use,
        "hoursdays": rng.choice(("hours", "days")),
        "learn": lesson.name,
        "learn.fail": lesson.fail,
        "danger": danger.name,
        "danger.end": danger.end,
        "bake": bake,
        "bake.fruit": fruit,
        "snow": rng.choice(SNOW_FIGURES),
        "giver": rng.choice(("grandmother", "grandfather", "mother", "father", "aunt", "uncle")),
    }


def flesh_out(plot: Plot, rng: random.Random) -> Plot:
    """Draw everything that the templates of a plot may ask for."""
    hero, friend = plot.hero, plot.friend
    foods = [c for c in COUNTABLES if c.edible or "snack" not in plot.shape.needs]
    thing, thing2 = rng.sample(THINGS, 2)
    place2 = rng.choice([p for p in PLACES if p is not plot.place])
    extras = [s.kind for s in SPECIES if s.gender == "any" and s.kind not in (hero.species.kind, friend.species.kind)]
    facts = hero.facts("h") | friend.facts("f") | _number_facts(rng, rng.choice(foods)) | _deed_facts(hero, rng)
    facts |= _thing_facts("o", thing, rng) | _thing_facts("o2", thing2, rng)
    facts |= _place_facts("p", plot.place, rng) | _place_facts("q", place2, rng)
    facts["x.kind"] = rng.choice(extras)
    # Facts with choices inside are settled once, so that every sentence tells the same.
    for name in ("fear.why", "skill.trouble", "skill.solve"):
        facts[name] = fill(facts[name], facts, rng)
    return replace(plot, facts=facts)


def _beat(wordings: tuple[str, ...], plot: Plot, rng: random.Random) -> str:
    """One beat in one of its wordings; who speaks sometimes does so in a certain voice."""

    def add_voice(match: re.Match[str]) -> str:
        return match.group(1) + (fill(" {voice}.", {}, rng) if rng.random() < _VOICE_RATE else ".")

    return _SAID.sub(add_voice, fill(rng.choice(wordings), plot.facts, rng))


def tell(plot: Plot, rng: random.Random) -> list[str]:
    """Write a fleshed-out plot as its paragraphs; all but the last may end in an aside about nothing in particular."""
    paragraphs = [" ".join(_beat(beat, plot, rng) for beat in paragraph) for paragraph in plot.shape.paragraphs]
    if plot.shape.name in _WITHOUT_ASIDES:
        return paragraphs
    asides = [rng.random() < _ASIDE_RATE and i + 1 < len(paragraphs) for i in range(len(paragraphs))]
    return [f"{text} {fill('{aside}', plot.facts, rng)}" if aside else text for text, aside in zip(paragraphs, asides)]
