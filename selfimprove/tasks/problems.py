"""Word problems with one final answer, from a file or from the Hugging Face hub: GSM8K's and MATH's forms."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfimprove import identity
from selfimprove.answers import boxed, cleaned
from selfimprove.errors import ConfigError
from selfimprove.task import SPLITS, Item, Question, Split
from selfimprove.tasks.sources import check_size, counts_of, existing, file_bytes, hub_rows, mapping_of, show, text_of

VERSION = 1
"""Raised whenever the same file and parameters give other splits."""
SHAPE = "a JSONL file of {question, answer} or {problem, solution}"


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with its final answer."""

    question: str
    answer: str
    level: int


class Problems:
    """Problems, one per item and without context; no question is in two splits, however often the source repeats it.

    A row is ``{question, answer}``, whose final answer stands after the last ``####`` (GSM8K) or is the whole answer, or
    ``{problem, solution}``, whose final answer stands in the last ``\\boxed{}`` (MATH) unless the row has an ``answer``. A MATH row's
    ``level`` ("Level 1" to "Level 5") becomes the item's, from 0.

    Args:
        path: a file of such rows as JSON lines, or as one JSON list; it goes before `dataset`.
        dataset: a dataset of the hub, or a local folder that `datasets` loads.
        config: the configuration of that dataset, where it has several.
        rows: the split of that dataset to read; our splits are cut from it.
        train, validation, test: how many problems each split has, as a count or as a fraction of all.
        seed: which problems go where.
        transductive: train on the sealed problems, without their answers; every result then says so.
    """

    name = "problems"

    def __init__(
        self,
        path: str | Path | None = None,
        dataset: str | None = None,
        config: str | None = None,
        rows: str = "train",
        train: float = 0.6,
        validation: float = 0.1,
        test: float = 0.3,
        seed: int = 0,
        transductive: bool = False,
    ) -> None:
        if path is None and dataset is None:
            raise ConfigError(f"there is nothing to read the problems from; give task.path=FILE ({SHAPE}), or task.dataset=HUB_ID")
        self.path = existing(path, SHAPE) if path is not None else None
        self.source = str(path or dataset)
        self.dataset, self.config, self.rows = dataset, config, rows
        self.sizes: dict[Split, float] = {"train": train, "validation": validation, "test": test}
        for split, size in self.sizes.items():
            check_size(split, size)
        self.seed, self.transductive = seed, transductive
        self._loaded: tuple[str, list[Problem]] | None = None

    def items(self, split: Split) -> Sequence[Item]:
        return tuple(
            Item(f"{split}-{i:04d}", "", "", (Question(f"{split}-{i:04d}/0", p.question),), p.level) for i, p in enumerate(self.problems(split))
        )

    def answers(self, split: Split) -> Mapping[str, tuple[str, ...]]:
        return {f"{split}-{i:04d}/0": (p.answer,) for i, p in enumerate(self.problems(split))}

    def fingerprint(self, split: Split) -> str:
        content, _ = self._load()
        return identity.digest(self.name, VERSION, content, split, self.sizes, self.seed)

    def problems(self, split: Split) -> list[Problem]:
        """The problems of a split. The sealed ones are cut off first: asking for more or fewer to train on never changes which they are."""
        _, everything = self._load()
        counts = counts_of(self.sizes, len(everything), self.source, "problems")
        start = sum(counts[s] for s in SPLITS[SPLITS.index(split) + 1 :])
        return everything[start : start + counts[split]]

    def _load(self) -> tuple[str, list[Problem]]:
        """The digest of the source, and its problems in the order that the seed gives them."""
        if self._loaded is None:
            content, rows = _read(self.path) if self.path is not None else hub_rows(self.dataset, self.config, self.rows, SHAPE)
            found = {p.question: p for i, row in enumerate(rows) if (p := _problem(row, f"{self.source}: [{i}]"))}
            if not found:
                raise ConfigError(f"{self.source} holds no problem; wanted {SHAPE}")
            ordered = sorted(found.values(), key=lambda p: identity.digest("problems", self.seed, p.question))
            self._loaded = content, ordered
        return self._loaded


def _problem(row: Any, where: str) -> Problem:
    """The problem of a row. Raises: ConfigError, where it has no question or no final answer."""
    entry = mapping_of(row, where)
    if "problem" in entry:
        question = text_of({"question": entry["problem"]}, "question", where, shown="problem")
        if entry.get("answer") is not None:
            return Problem(question, text_of(entry, "answer", where), _level(entry))
        solution = text_of({"answer": entry.get("solution")}, "answer", where, shown="solution")
        answer = boxed(solution)
        if answer is None or cleaned(answer) is None:
            raise ConfigError(f"{where}.solution: wanted a final answer in \\boxed{{}}, got {show(solution)}; leave the row out, or add an `answer`")
        return Problem(question, answer.strip(), _level(entry))
    answer = text_of(entry, "answer", where).rpartition("####")[2].strip()
    if not answer:
        raise ConfigError(f"{where}.answer: wanted a final answer after ####, got nothing; leave the row out")
    return Problem(text_of(entry, "question", where), answer, _level(entry))


def _level(entry: Mapping[str, Any]) -> int:
    """MATH writes "Level 3" or 3, and "Level ?" for a few."""
    digits = re.search(r"\d{1,3}", str(entry.get("level") or ""))
    return max(0, int(digits[0]) - 1) if digits else 0


def _read(path: Path) -> tuple[str, list[Any]]:
    """The digest of a file, and its rows."""
    data = file_bytes(path)
    at = str(path)
    try:
        text = data.decode("utf-8-sig")
        if text.lstrip().startswith("["):
            return hashlib.sha256(data).hexdigest(), list(json.loads(text))
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            at = f"{path}, line {number}"
            if line.strip():
                rows.append(json.loads(line))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{at}: not JSON in UTF-8 ({error}); give {SHAPE}") from error
    return hashlib.sha256(data).hexdigest(), rows
