"""Tasks: items with questions, answers that have to be asked for, and a test split that stays sealed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from selfimprove.errors import LabelError, SealedError
from selfimprove.ledger import Ledger

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Question:
    """A question, without its answer."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to learn from: a titled context with its questions, or a bare question (empty context)."""

    id: str
    title: str
    context: str
    questions: tuple[Question, ...]
    level: int = 0
    """How difficult it is, where a task has several levels; 0 is the easiest. Curricula go by it."""


@runtime_checkable
class Task(Protocol):
    """What a task plugin implements. Loading must be lazy: a run never calls `items` or `answers` for the test split.

    A class whose questions no text can answer, because a program is tested instead, says ``in_words = False``; then `bench` leaves out the null
    arms that answer in words (the untouched model and supervised training) and the report says so.
    """

    name: str

    def items(self, split: Split) -> Sequence[Item]:
        """The items of a split, without answers, always in the same order."""

    def answers(self, split: Split) -> Mapping[str, tuple[str, ...]]:
        """The accepted answers by question id; the first is the canonical one."""

    def fingerprint(self, split: Split) -> str:
        """A digest that changes when the split does, computed without reading the split's items."""


class TaskView:
    """The task as a run shows it to plugins: unlabelled items, labels on request, no test split.

    `evaluation` is the validation split, except inside `selfimprove eval` and the benchmarks, which open the
    sealed split in a process of their own with ``TaskView(..., evaluation_split="test")``.
    """

    def __init__(self, task: Task, ledger: Ledger, evaluation_split: Split = "validation") -> None:
        self._task = task
        self._ledger = ledger
        self._evaluation_split = evaluation_split
        self._reader: tuple[str, bool] = ("a plugin outside every stage", True)
        self.transductive = bool(getattr(task, "transductive", False))
        """Whether `train` is the sealed questions themselves, without their answers, which stay sealed; then every result says so."""
        self._items: dict[Split, tuple[Item, ...]] = {}
        self._answers: dict[Split, Mapping[str, tuple[str, ...]]] = {}

    @property
    def name(self) -> str:
        return self._task.name

    @property
    def train(self) -> tuple[Item, ...]:
        """What a strategy trains on: the train split, or the sealed questions of a transductive task."""
        return self._open("test" if self.transductive else "train")

    @property
    def validation(self) -> tuple[Item, ...]:
        return self._open("validation")

    @property
    def evaluation(self) -> tuple[Item, ...]:
        """The items that evaluators measure on."""
        return self._open(self._evaluation_split)

    @property
    def test(self) -> tuple[Item, ...]:
        """Always refused. Raises: SealedError."""
        raise SealedError("the test split is sealed during a run; measure it afterwards with `selfimprove eval RUN`")

    def labels(self, questions: Iterable[Question]) -> dict[str, tuple[str, ...]]:
        """The accepted answers of these questions, by id; charged to the ledger as labels.

        Raises: LabelError, where the plugin at work does not declare ``uses_labels = True``; SealedError, for a question of the test split.
        """
        name, declared = self._reader
        if not declared:
            raise LabelError(f"{name} read labels, but does not declare `uses_labels = True`; declare it, or do without")
        found: dict[str, tuple[str, ...]] = {}
        sealed = self._sealed()
        splits: list[Split] = [s for s in self._items if not (sealed and s == "test")]
        for question in questions:
            if question.id in sealed:
                raise SealedError(f"question {question.id!r} is of the test split: the run may train on it, but its answer stays sealed")
            for split in splits:
                if split not in self._answers:
                    self._answers[split] = self._task.answers(split)
                if question.id in self._answers[split]:
                    found[question.id] = self._answers[split][question.id]
                    break
            else:
                raise KeyError(f"question {question.id!r} is in none of the opened splits ({', '.join(splits) or 'none'})")
        self._ledger.charge_labels(found)
        return found

    @contextlib.contextmanager
    def reading_as(self, plugin: str, uses_labels: bool) -> Iterator[None]:
        """While inside, labels are read in the name of this plugin."""
        before, self._reader = self._reader, (plugin, uses_labels)
        try:
            yield
        finally:
            self._reader = before

    def _sealed(self) -> frozenset[str]:
        """The ids of opened questions whose answers stay sealed."""
        if not self.transductive or self._evaluation_split == "test":
            return frozenset()
        return frozenset(q.id for item in self._items.get("test", ()) for q in item.questions)

    def _open(self, split: Split) -> tuple[Item, ...]:
        if split not in self._items:
            self._items[split] = tuple(self._task.items(split))
        return self._items[split]
