"""Short biographies of invented people, with closed-book questions: plentiful, varied, and in nobody's training data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from selfimprove import identity
from selfimprove.errors import ConfigError
from selfimprove.task import SPLITS, Item, Question, Split
from selfimprove.tasks.facts import FACTS, NAMES, PEOPLE_PER_BIOGRAPHY, Names, stem

VERSION = 2
"""Raised whenever the same parameters give other people."""
WORDS = range(50, 71)
_PRONOUNS = ({"s": "he", "o": "him", "p": "his"}, {"s": "she", "o": "her", "p": "her"})
_LARGEST = NAMES // (PEOPLE_PER_BIOGRAPHY * len(SPLITS))


@dataclass(frozen=True, slots=True)
class Entry:
    """One question of a biography, with where it comes from."""

    fact: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Biography:
    """One invented person."""

    name: str
    text: str
    entries: tuple[Entry, ...]


class Biographies:
    """Biographies of 50 to 70 words, one sentence per fact, each fact asked for in other words.

    Person `i` of a split is the same however many are asked for; no two people of a seed share a given or a family
    name. An answer stands in its biography exactly once, and in no question.
    """

    name = "biographies"

    def __init__(self, train: int = 24, validation: int = 12, test: int = 60, questions: int = 6, seed: int = 0) -> None:
        self.sizes: dict[Split, int] = {"train": train, "validation": validation, "test": test}
        for split, size in self.sizes.items():
            if not _whole(size) or not 0 <= size <= _LARGEST:
                raise ConfigError(f"task.{split}={size!r} is not possible; give a whole number of people from 0 to {_LARGEST}")
        if not _whole(questions) or not 5 <= questions <= 7:
            raise ConfigError(f"task.questions={questions!r} is not possible; a biography has 5, 6 or 7 facts, and one question about each")
        self.questions = questions
        self.seed = seed
        self._names = Names(lambda what, size: identity.seed_for(seed, "biographies", what) % size)
        self._made: dict[Split, tuple[Biography, ...]] = {}

    def items(self, split: Split) -> Sequence[Item]:
        return tuple(
            Item(
                id=f"{split}-{i:04d}",
                title=person.name,
                context=person.text,
                questions=tuple(Question(f"{split}-{i:04d}/{j}", e.question) for j, e in enumerate(person.entries)),
            )
            for i, person in enumerate(self.people(split))
        )

    def answers(self, split: Split) -> Mapping[str, tuple[str, ...]]:
        return {f"{split}-{i:04d}/{j}": (e.answer,) for i, p in enumerate(self.people(split)) for j, e in enumerate(p.entries)}

    def fingerprint(self, split: Split) -> str:
        return identity.digest(self.name, VERSION, split, self.sizes[split], self.questions, self.seed)

    def people(self, split: Split) -> tuple[Biography, ...]:
        """The people of a split, made when first asked for."""
        if split not in self._made:
            self._made[split] = tuple(self.person(split, i) for i in range(self.sizes[split]))
        return self._made[split]

    def person(self, split: Split, index: int) -> Biography:
        """Person `index` of a split."""
        number = (index * len(SPLITS) + SPLITS.index(split)) * PEOPLE_PER_BIOGRAPHY
        for attempt in range(1000):
            rng = identity.rng(self.seed, "biographies", split, index, attempt)
            made = _write(_Person(self._names, number, rng), self.questions)
            if _lawful(made):
                return made
        raise AssertionError(f"no lawful biography for {split} {index} of seed {self.seed}")  # even of five facts, one draw in ten is lawful


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class _Person:
    """Draws the facts of one person; implements `facts.Draw`."""

    def __init__(self, names: Names, number: int, rng: np.random.Generator) -> None:
        self._names = names
        self._next = number + 1
        self.rng = rng
        self.name = f"{names.given(number)} {names.family(number)}"
        self.pronouns = _PRONOUNS[self.number(0, 1)]
        self.year = self.number(1861, 1958)

    def pick(self, pool: Sequence[str]) -> str:
        return pool[int(self.rng.integers(len(pool)))]

    def number(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def person(self) -> str:
        self._next += 1
        return f"{self._names.given(self._next - 1)} {self._names.family(self._next - 1)}"

    def given(self) -> str:
        self._next += 1
        return self._names.given(self._next - 1)

    def stem(self) -> str:
        return stem(int(self.rng.integers(NAMES)))


def _write(person: _Person, facts: int) -> Biography:
    """A draft: random fact types in random order, one sentence and one question each."""
    references = ("", "", "", *person.name.split())
    sentences, entries = [], []
    for position, kind in enumerate(person.rng.permutation(list(FACTS))[:facts].tolist()):
        fact = FACTS[kind]
        answer, detail = fact.draw(person)
        reference = person.name if position == 0 else person.pick(references)
        sentences.append(_sentence(person.pick(fact.sentences), answer, detail, reference, person.pronouns))
        entries.append(Entry(kind, person.pick(fact.questions).format(name=person.name, x=detail), answer))
    order = person.rng.permutation(facts)  # questions do not follow the order of the text
    return Biography(person.name, " ".join(sentences), tuple(entries[i] for i in order))


def _sentence(form: str, answer: str, detail: str, reference: str, pronouns: Mapping[str, str]) -> str:
    """The sentence that a form makes; it mentions the subject by `reference` (pronouns where that is empty), then by pronouns."""
    filled = {"a": answer, "an": f"{'an' if answer[0] in 'aeiou' else 'a'} {answer}", "x": detail}

    def fill(mark: re.Match[str]) -> str:
        nonlocal reference
        key = mark[1]
        if key in filled:
            return filled[key]
        mention, reference = reference, ""
        if not mention:
            return pronouns[key]
        return f"{mention}'s" if key == "p" else mention

    text = re.sub(r"\{(\w+)\}", fill, form)
    return text[0].upper() + text[1:]


def _lawful(person: Biography) -> bool:
    """Whether the length is right and no answer gives away or hides another."""
    if len(person.text.split()) not in WORDS:
        return False
    text, name = person.text.lower(), person.name.lower()
    answers = [e.answer.lower() for e in person.entries]
    asked = " ".join(e.question.lower() for e in person.entries)
    return all(
        text.count(a) == 1 and a not in name and a not in asked and not any(a in other for other in answers if other is not a) for a in answers
    )
