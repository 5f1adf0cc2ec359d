"""The second form of self-edit (SEAL, section 3.2), applied to knowledge: the model chooses tools and hyper-parameters.

An edit is a JSON object. Which augmentations of the passage to train on, the learning rate and the number of epochs: a
small model can learn to choose what it could not write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfimprove import Item, Run
from selfimprove.models import Document
from selfimprove.records import Part
from selfimprove_seal.editor import ContextEditor, Job, Lesson, SelfEdits
from selfimprove_seal.prompts import sentences

AUGMENTATIONS = ("sentences", "question_answers", "cloze", "chat_turns")
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 2e-3)
EPOCHS = (1, 2, 4, 8)

_SPAN = re.compile(r"(?<=\s)(?:[A-Z][\w'-]+(?:\s+[A-Z][\w'-]+)*|\d[\d,.]*\d|\d)(?=[\s,.;:!?])")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A self-edit that has been parsed."""

    augmentations: tuple[str, ...]
    learning_rate: float
    epochs: int

    @classmethod
    def parse(cls, text: str) -> ToolCall | str:
        """The tool call that a text holds, or why it holds none. Nothing outside the listed values is accepted."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            return f"not a JSON object: {text[:60]!r}"
        if not isinstance(data, dict):
            return f"a JSON {type(data).__name__} where an object was wanted"
        wanted = {*AUGMENTATIONS, "learning_rate", "epochs"}
        if set(data) != wanted:
            return f"fields {sorted(set(data) ^ wanted)} are missing or too many"
        if any(not isinstance(data[a], bool) for a in AUGMENTATIONS):
            return "an augmentation is true or false"
        if data["learning_rate"] not in LEARNING_RATES or isinstance(data["learning_rate"], bool):
            return f"learning_rate is one of {LEARNING_RATES}"
        if data["epochs"] not in EPOCHS or isinstance(data["epochs"], bool):
            return f"epochs is one of {EPOCHS}"
        return cls(tuple(a for a in AUGMENTATIONS if data[a]), float(data["learning_rate"]), int(data["epochs"]))

    def to_json(self) -> str:
        flags = {a: a in self.augmentations for a in AUGMENTATIONS}
        return json.dumps({**flags, "learning_rate": self.learning_rate, "epochs": self.epochs})


_EXAMPLES = (
    ToolCall(("sentences",), 3e-4, 4),
    ToolCall(("question_answers", "cloze"), 1e-3, 2),
    ToolCall(("chat_turns",), 1e-4, 8),
    ToolCall(("sentences", "question_answers", "chat_turns"), 1e-3, 4),
    ToolCall((), 2e-3, 1),
    ToolCall(("cloze", "chat_turns"), 3e-4, 2),
)
"""Shots that show the form; they cover the values evenly, so that the choice is the model's."""

OPENING = '{"sentences":'

PROMPT = (
    "Passage: {context}\n\nWays to study the passage, as JSON: which augmentations to train on, the learning rate and the epochs.\n"
    + "".join(f"Configuration: {e.to_json()}\n" for e in _EXAMPLES)
    + f"Configuration: {OPENING}"
)
"""The shots stand last and the answer has begun, since a model of 135M parameters otherwise writes no JSON at all (docs/log.md)."""


@dataclass
class ToolEdits(ContextEditor):
    """Self-edits that are tool calls.

    Args:
        writer: arguments of the `SelfEdits` that writes the question-answer pairs when an edit asks for them.
    """

    writer: SelfEdits | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stop, self.opening = ("\n",), OPENING
        if not isinstance(self.writer, SelfEdits):
            self.writer = SelfEdits(**{"prompt_name": "few_shot", **(self.writer or {}), "inner": self.inner})

    def prompts(self, item: Item) -> list[str]:
        return [PROMPT.replace("{context}", item.context)]

    def lessons(self, run: Run, jobs: Sequence[Job]) -> list[Lesson | str]:
        """What the tool calls make; the question-answer pairs of an item are written once for all of a policy's edits."""
        assert isinstance(self.writer, SelfEdits)
        parsed = [ToolCall.parse(edit.text) for _, _, edit in jobs]
        wanting = [job[:2] for job, call in zip(jobs, parsed, strict=True) if isinstance(call, ToolCall) and "question_answers" in call.augmentations]
        asking = list(dict.fromkeys(wanting))
        written: dict[tuple[Part, Item], str] = {}
        for policy in dict.fromkeys(p for p, _ in asking):
            items = [i for p, i in asking if p == policy]
            for item, text in zip(items, self.writer.write(run, policy, items, 1, "tools"), strict=True):
                written[policy, item] = text.text
        return [
            call if isinstance(call, str) else self._lesson(item, call, written.get((policy, item), ""))
            for (policy, item, _), call in zip(jobs, parsed, strict=True)
        ]

    def _lesson(self, item: Item, call: ToolCall, pairs: str) -> Lesson | str:
        settings = (("learning_rate", call.learning_rate), ("epochs", call.epochs))
        documents = self.documents(item, call, pairs)
        return Lesson(documents, settings) if documents else "the tool call makes no document"

    def documents(self, item: Item, call: ToolCall, pairs: str) -> tuple[Document, ...]:
        """The passage (where the inner loop has it) and the augmentations that the call asks for."""
        found = list(self.inner.documents(item, pairs if "question_answers" in call.augmentations else ""))
        whole = sentences(item.context)
        if "sentences" in call.augmentations:
            found += [Document(f"{item.title}\n{s}") for s in whole]
        if "cloze" in call.augmentations:
            found += [d for s in whole for d in cloze(item, s)]
        if "chat_turns" in call.augmentations:
            found.append(Document(item.context, prompt=f"What do you know about {item.title}?", chat=True))
        return tuple(dict.fromkeys(found))


def cloze(item: Item, sentence: str) -> list[Document]:
    """Documents that ask for one name or number of a sentence; the title's own words are never asked for."""
    known = _words(item.title)
    found = []
    for span in _SPAN.finditer(sentence):
        if known.isdisjoint(_words(span[0])):
            blank = f"{sentence[: span.start()]}____{sentence[span.end() :]}"
            found.append(Document(f" {span[0]}", prompt=f"{item.title}\nFill in the blank: {blank}\nAnswer:"))
    return found


def _words(text: str) -> set[str]:
    """The words of a text, whatever their case and whatever is attached to them (``Vellin's`` has ``vellin``)."""
    return set(re.findall(r"[^\W_]+", text.casefold()))
