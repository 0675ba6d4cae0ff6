"""Short questions and answers for the chat part of the demo corpus: sums, words, days, facts of the story world."""

from __future__ import annotations

import random
from collections.abc import Callable

from lexicon import (
    COLORS,
    COUNTABLES,
    DAYS,
    HE_NAMES,
    NUMBERS,
    OPPOSITES,
    SEASONS,
    SHE_NAMES,
    SOUNDS,
    SPECIES,
    THINGS,
)

Turn = tuple[str, str]  # what the user says, what the assistant answers


def _cap(text: str) -> str:
    return text[0].upper() + text[1:]


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def sum_turn(rng: random.Random) -> Turn:
    """A sum or difference up to twenty, in words or digits."""
    plus = rng.random() < 0.6
    a = rng.randint(0 if plus else 1, 10)
    b = rng.randint(0, 10) if plus else rng.randint(0, a)
    result = a + b if plus else a - b
    word = "plus" if plus else "minus"
    if rng.random() < 0.35:
        sign = "+" if plus else "-"
        question = rng.choice(("What is {a} {s} {b}?", "{a} {s} {b} = ?", "How much is {a} {s} {b}?"))
        return question.format(a=a, b=b, s=sign), f"{a} {sign} {b} = {result}."
    question = rng.choice(("What is {a} {w} {b}?", "How much is {a} {w} {b}?", "Can you tell me what {a} {w} {b} is?"))
    return question.format(
        a=NUMBERS[a], b=NUMBERS[b], w=word
    ), f"{_cap(NUMBERS[a])} {word} {NUMBERS[b]} is {NUMBERS[result]}."


def word_problem_turn(rng: random.Random) -> Turn:
    """A tiny word problem with the sum spelled out in the answer."""
    she = rng.random() < 0.5
    name, he = (rng.choice(SHE_NAMES), "she") if she else (rng.choice(HE_NAMES), "he")
    thing = rng.choice(COUNTABLES)
    plus = rng.random() < 0.5
    a = rng.randint(2, 10)
    b = rng.randint(1, 8) if plus else rng.randint(1, a - 1)
    result = a + b if plus else a - b

    def count(number: int) -> str:
        return f"{NUMBERS[number]} {thing.one if number == 1 else thing.many}"

    get = rng.choice(("finds {b} more", "gets {b} more")) if plus else rng.choice(("gives away {b}", "loses {b}"))
    story = f"{name} has {count(a)}. {_cap(he)} {get.format(b=NUMBERS[b])}."
    question = f"How many {thing.many} does {name} have now?"
    word = "plus" if plus else "minus"
    because = f"because {NUMBERS[a]} {word} {NUMBERS[b]} is {NUMBERS[result]}"
    return f"{story} {question}", f"{name} has {count(result)} now, {because}."


def counting_turn(rng: random.Random) -> Turn:
    """Counting up or down, the number after or before another, the larger of two."""
    style = rng.randrange(4)
    if style == 0:
        start, end = rng.randint(1, 5), rng.randint(6, 12)
        return (
            f"{rng.choice(('Count', 'Please count', 'Can you count'))} from {NUMBERS[start]} to {NUMBERS[end]}.",
            _cap(", ".join(NUMBERS[start : end + 1])) + ".",
        )
    if style == 1:
        start = rng.randint(3, 10)
        return f"Count down from {NUMBERS[start]}.", _cap(", ".join(reversed(NUMBERS[1 : start + 1]))) + "."
    if style == 2:
        number, after = rng.randint(1, 19), rng.random() < 0.5
        word, other = ("after", number + 1) if after else ("before", number - 1)
        return (
            f"Which number comes {word} {NUMBERS[number]}?",
            f"{_cap(NUMBERS[other])} comes {word} {NUMBERS[number]}.",
        )
    a, b = rng.sample(range(1, 21), 2)
    return (
        f"Which is more, {NUMBERS[a]} or {NUMBERS[b]}?",
        f"{_cap(NUMBERS[max(a, b)])} is more than {NUMBERS[min(a, b)]}.",
    )


def animal_turn(rng: random.Random) -> Turn:
    """Home, food, skill and sound of an animal, as in the stories."""
    animal = rng.choice([s for s in SPECIES if s.gender == "any"])
    kind = animal.kind
    style = rng.randrange(4)
    if style == 0:
        return f"Where does {_a(kind)} live in your stories?", f"In my stories, {_a(kind)} lives in {animal.home}."
    if style == 1:
        return f"What does {_a(kind)} like to eat?", f"{_cap(_a(kind))} likes to eat {animal.food}."
    sound_of = rng.choice(sorted(SOUNDS))
    if style == 2:
        question = rng.choice((f"What does {_a(sound_of)} say?", f"What sound does {_a(sound_of)} make?"))
        return question, f'{_cap(_a(sound_of))} says "{SOUNDS[sound_of]}".'
    return f'Who says "{SOUNDS[sound_of]}"?', f'{_cap(_a(sound_of))} says "{SOUNDS[sound_of]}".'


def word_turn(rng: random.Random) -> Turn:
    """Opposites and colors."""
    if rng.random() < 0.5:
        word = rng.choice(sorted(OPPOSITES))
        question = rng.choice((f"What is the opposite of {word}?", f"Tell me the opposite of {word}."))
        return question, f"The opposite of {word} is {OPPOSITES[word]}."
    thing = rng.choice(sorted(COLORS))
    return f"What color is {thing}?", f"{_cap(thing)} is {COLORS[thing]}."


def calendar_turn(rng: random.Random) -> Turn:
    """Days of the week and seasons."""
    if rng.random() < 0.6:
        i, after = rng.randrange(7), rng.random() < 0.6
        word, day = ("after", DAYS[(i + 1) % 7]) if after else ("before", DAYS[i - 1])
        return f"Which day comes {word} {DAYS[i]}?", f"{day} comes {word} {DAYS[i]}."
    if rng.random() < 0.3:
        return "How many days are in a week?", "There are seven days in a week."
    i = rng.randrange(4)
    return f"Which season comes after {SEASONS[i]}?", f"{_cap(SEASONS[(i + 1) % 4])} comes after {SEASONS[i]}."


def thing_turn(rng: random.Random) -> Turn:
    """What an object is good for."""
    thing = rng.choice(THINGS)
    question = rng.choice((f"What can I do with {_a(thing.name)}?", f"What is {_a(thing.name)} good for?"))
    return question, f"You can {thing.use}."


def list_turn(rng: random.Random) -> Turn:
    """Name a few members of a group."""
    number = rng.randint(2, 4)
    group, members = rng.choice(
        (
            ("animals", [s.kind for s in SPECIES if s.gender == "any"]),
            ("toys", ["ball", "kite", "drum", "hoop", "puppet", "marble", "wagon", "top", "boat"]),
            ("colors", sorted(set(COLORS.values()))),
            ("things to eat", [c.many for c in COUNTABLES if c.edible]),
        )
    )
    chosen = rng.sample(members, number)
    if group in ("animals", "toys"):
        chosen = [_a(member) for member in chosen]
    listing = ", ".join(chosen[:-1]) + f" and {chosen[-1]}"
    return f"{rng.choice(('Name', 'Tell me', 'Give me'))} {NUMBERS[number]} {group}.", f"{_cap(listing)}."


def small_talk_turn(rng: random.Random) -> Turn:
    """Greetings, thanks and who is speaking."""
    hello = rng.choice(("Hello!", "Hi!", "Hello there!", "Good morning!", "Good evening!", "Hi there!"))
    return rng.choice(
        (
            (hello, f"{hello} {rng.choice(('Would you like to hear a story?', 'What can I do for you today?'))}"),
            ("How are you?", "I am fine, thank you. How are you?"),
            ("Who are you?", "I am a small storyteller. I can tell stories and do small sums."),
            ("What can you do?", "I can tell you a story, count, and answer small questions."),
            ("What is your name?", "My name is Lamella. I like to tell stories."),
            (rng.choice(("Thank you!", "Thanks!", "Thank you very much!")), "You are welcome!"),
            (rng.choice(("Goodbye!", "Bye!", "Good night!")), rng.choice(("Goodbye! Come back soon.", "Sleep well!"))),
        )
    )


TURNS: tuple[tuple[Callable[[random.Random], Turn], int], ...] = (
    (sum_turn, 30),
    (word_problem_turn, 18),
    (counting_turn, 12),
    (animal_turn, 12),
    (word_turn, 10),
    (calendar_turn, 6),
    (thing_turn, 5),
    (list_turn, 6),
    (small_talk_turn, 8),
)


def short_turn(rng: random.Random) -> Turn:
    """One short exchange of a random kind."""
    makers, weights = zip(*TURNS)
    return rng.choices(makers, weights)[0](rng)
