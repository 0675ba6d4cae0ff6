"""Writes the demo corpus: children's stories and short chats from our own seeded grammar.

    python corpus.py --stories 1000 --seed 7 --split train

Document ``i`` of a seed is always the same text. A document belongs to the held-out split when the hash of its key
falls into the first of ``SPLIT_BUCKETS`` buckets. The key of a story is its shape, hero, species and place, the key of
a short chat or a fragment its whole text; all follow from the text alone, so no document occurs in both splits,
whatever the seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from chat import short_turn
from storyteller import Plot, draw_plot, fill, flesh_out, shapes, tell, title_case

USER, ASSISTANT, SYSTEM = "<|user|>", "<|assistant|>", "<|system|>"
EOS = "</s>"
SPLIT_BUCKETS = 40
SPLITS = ("train", "heldout")

_KINDS = (
    "story",
    "titled",
    "questions",
    "chapters",
    "chat_story",
    "chat_reading",
    "chat_short",
    "plain_short",
    "fragment",
)
_KIND_WEIGHTS = (34, 8, 8, 6, 18, 8, 11, 3, 8)
_REQUESTS = (
    "Tell me a story about {t}.",
    "Please tell me a story about {t}.",
    "Can you tell me a story about {t}?",
    "Write a short story about {t}.",
    "I would like a story about {t}.",
)
_SYSTEM_PROMPTS = (
    "You tell short stories for children.",
    "You are a friendly storyteller.",
    "You are a helpful teacher for small children.",
)
_CHAPTERS_WITHOUT = ("newfriend", "race", "stuck", "birthday")


@dataclass(frozen=True)
class Document:
    """One text of the corpus (no bos, no final eos) and the key that decides its split."""

    kind: str
    key: str
    text: str


def render_chat(turns: Sequence[tuple[str, str]], system: str = "") -> str:
    """Write (user, assistant) turns the way the tokenizer's chat template does, less bos and the last eos."""
    head = f"{SYSTEM}{system}" if system else ""
    return head + EOS.join(f"{USER}{user}{ASSISTANT}{answer}" for user, answer in turns)


def split_of(key: str) -> str:
    """The split that a key belongs to."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % SPLIT_BUCKETS
    return "heldout" if bucket == 0 else "train"


def _title(plot: Plot, rng: random.Random) -> str:
    return title_case(fill(rng.choice(plot.shape.titles), plot.facts, rng))


def _qa(plot: Plot, rng: random.Random, number: int) -> list[tuple[str, str]]:
    chosen = rng.sample(plot.shape.questions, min(number, len(plot.shape.questions)))
    return [(fill(q, plot.facts, rng), fill(a, plot.facts, rng)) for q, a in chosen]


def _topic(plot: Plot, rng: random.Random) -> str:
    """What a user may ask for to get this story."""
    general = (
        "a(n) {h.trait} {h.kind}",
        "a(n) {h.kind} {p.at}",
        "a {h.small} {h.kind}",
        "a(n) {h.kind} named {h}",
        "{h} the {h.kind}",
    )
    topics = plot.shape.topics if rng.random() < 0.6 else general
    topic = fill(rng.choice(topics), plot.facts, rng)
    return topic if topic.startswith(plot.hero.name) else topic[0].lower() + topic[1:]


def _chapters(plot: Plot, rng: random.Random) -> str:
    """A longer text: the same hero and place, another plot and friend in each chapter."""
    later = rng.sample(
        [s for s in shapes() if s is not plot.shape and s.name not in _CHAPTERS_WITHOUT], rng.randint(1, 3)
    )
    parts = [f"Chapter One: {_title(plot, rng)}", *tell(plot, rng)]
    for number, shape in zip(("Two", "Three", "Four"), later):
        following = draw_plot(rng, shape, plot.hero)
        following.place = plot.place
        following = flesh_out(following, rng)
        following.facts["opening"] = "{nextday}"
        parts += [f"Chapter {number}: {_title(following, rng)}", *tell(following, rng)]
    return "\n".join(parts)


def _chat_story(plot: Plot, story: str, rng: random.Random) -> str:
    """A user asks for the story and perhaps asks about it afterwards."""
    request = rng.choice(_REQUESTS).format(t=_topic(plot, rng))
    turns = [(request, story), *_qa(plot, rng, rng.choice((0, 0, 1, 2)))]
    if rng.random() < 0.1:
        turns.append(("Thank you!", "You are welcome!"))
    return render_chat(turns, rng.choice(_SYSTEM_PROMPTS) if rng.random() < 0.2 else "")


def _story_text(kind: str, plot: Plot, rng: random.Random) -> str:
    """Write a plot as a document of the given kind."""
    plot = flesh_out(plot, rng)
    if kind == "chapters":
        return _chapters(plot, rng)
    story = "\n".join(tell(plot, rng))
    if kind == "titled":
        return f"{_title(plot, rng)}\n{story}"
    if kind == "questions":
        return "\n".join([story, *(f"Question: {q}\nAnswer: {a}" for q, a in _qa(plot, rng, rng.randint(1, 3)))])
    if kind == "chat_story":
        return _chat_story(plot, story, rng)
    if kind == "chat_reading":
        (question, answer), *more = _qa(plot, rng, rng.randint(1, 3))
        return render_chat([(f"{story}\n{question}", answer), *more])
    return story


def _short_text(kind: str, rng: random.Random) -> str:
    """One to three short exchanges, as a chat or as plain questions and answers."""
    turns = [short_turn(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    if kind == "plain_short":
        return "\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in turns)
    return render_chat(turns, rng.choice(_SYSTEM_PROMPTS) if rng.random() < 0.1 else "")


def _fragment_text(rng: random.Random) -> str:
    """A story that starts after its first paragraph, with the species put behind the first mention of the hero."""
    plot = flesh_out(draw_plot(rng), rng)
    hero = plot.hero
    return "\n".join(tell(plot, rng)[1:]).replace(f"{hero.name} ", f"{hero.name} the {hero.species.kind} ", 1)


def make_document(seed: int, index: int, split: str) -> Document:
    """Document number ``index`` of a seed and split.

    Raises:
        ValueError: ``split`` is neither ``train`` nor ``heldout``.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    rng = random.Random(f"{seed}/{split}/{index}")
    kind = rng.choices(_KINDS, _KIND_WEIGHTS)[0]
    while True:
        if kind == "fragment" or kind.endswith("_short"):
            text = _fragment_text(rng) if kind == "fragment" else _short_text(kind, rng)
            if split_of(text) == split:
                return Document(kind, text, text)
            continue
        plot = draw_plot(rng)
        if split_of(plot.key) == split:
            return Document(kind, plot.key, _story_text(kind, plot, rng))


def documents(seed: int, split: str, count: int, start: int = 0) -> Iterator[Document]:
    """Documents ``start`` to ``start + count`` of a seed and split."""
    return (make_document(seed, index, split) for index in range(start, start + count))


def read_documents(path: Path) -> list[str]:
    """Documents of a text file, which are separated by blank lines."""
    return [text for text in path.read_text(encoding="utf-8").strip().split("\n\n") if text]


def main() -> None:
    """Print documents, separated by blank lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=int, default=10, help="number of documents")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--split", choices=SPLITS, default="train")
    args = parser.parse_args()
    sys.stdout.write("\n\n".join(d.text for d in documents(args.seed, args.split, args.stories)) + "\n")


if __name__ == "__main__":
    main()
