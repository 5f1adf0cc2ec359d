"""Reading comprehension in SQuAD's shape, from a JSON file or from the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfimprove import identity
from selfimprove.errors import ConfigError
from selfimprove.task import SPLITS, Item, Question, Split
from selfimprove.tasks.sources import check_size, counts_of, existing, file_bytes, hub_rows, mapping_of, show, text_of

VERSION = 1
"""Raised whenever the same file and parameters give other splits."""
SHAPE = "a SQuAD-shaped JSON file"


@dataclass(slots=True)
class Passage:
    """A context with all its questions and their accepted answers."""

    title: str
    context: str
    questions: dict[str, tuple[str, ...]]


class Squad:
    """Contexts with questions, split by context: no context is in two splits, however often the file repeats it.

    Args:
        path: a JSON file: SQuAD's own form, or a list of ``{title, context, questions: [{question, answer}]}``.
        dataset: instead of `path`, a dataset of the hub, or a local folder that `datasets` loads, with columns title, context,
            question and answers.
        config: the configuration of that dataset, where it has several.
        rows: the split of that dataset to read; our splits are cut from it.
        train, validation, test: how many contexts each split has, as a count or as a fraction of all.
        seed: which contexts go where.
    """

    name = "squad"

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
    ) -> None:
        if (path is None) == (dataset is None):
            raise ConfigError(
                f"task=squad reads one source; got task.path={path} and task.dataset={dataset}. Give task.path=FILE.json, or task.dataset=HUB_ID"
            )
        self.path = existing(path, SHAPE) if path is not None else None
        self.source = str(path or dataset)
        self.dataset, self.config, self.rows = dataset, config, rows
        self.sizes: dict[Split, float] = {"train": train, "validation": validation, "test": test}
        for split, size in self.sizes.items():
            check_size(split, size)
        self.seed = seed
        self._loaded: tuple[str, list[Passage]] | None = None
        self._splits: dict[Split, list[Passage]] | None = None

    def items(self, split: Split) -> Sequence[Item]:
        return tuple(
            Item(
                id=f"{split}-{i:04d}",
                title=passage.title,
                context=passage.context,
                questions=tuple(Question(f"{split}-{i:04d}/{j}", text) for j, text in enumerate(passage.questions)),
            )
            for i, passage in enumerate(self._split(split))
        )

    def answers(self, split: Split) -> Mapping[str, tuple[str, ...]]:
        return {f"{split}-{i:04d}/{j}": gold for i, p in enumerate(self._split(split)) for j, gold in enumerate(p.questions.values())}

    def fingerprint(self, split: Split) -> str:
        content, _ = self._load()
        return identity.digest(self.name, VERSION, content, split, self.sizes, self.seed)

    def _split(self, split: Split) -> list[Passage]:
        if self._splits is None:
            _, passages = self._load()
            counts = counts_of(self.sizes, len(passages), self.source, "contexts")
            # The sealed contexts are cut off first: asking for more or fewer to train on never changes which they are.
            start = 0
            self._splits = {}
            for name in reversed(SPLITS):
                self._splits[name] = passages[start : start + counts[name]]
                start += counts[name]
        return self._splits[split]

    def _load(self) -> tuple[str, list[Passage]]:
        """The digest of the source, and its passages in the order that the seed gives them."""
        if self._loaded is None:
            content, entries = _read_file(self.path) if self.path is not None else hub_rows(self.dataset, self.config, self.rows, SHAPE)
            passages = _gather(entries, self.source)
            passages.sort(key=lambda p: identity.digest("squad", self.seed, p.context))  # whatever their order in the file
            self._loaded = content, passages
        return self._loaded


# ---- reading what may be anything --------------------------------------------------------------------


def _read_file(path: Path) -> tuple[str, Any]:
    """The digest of a file, and the entries in it."""
    data = file_bytes(path)
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply for SQuAD's form; give {SHAPE}") from error
    except ValueError as error:  # not UTF-8, not JSON, or a number too long to read
        raise ConfigError(f"{path}: not a JSON file in UTF-8 ({error}); give {SHAPE}") from error
    return hashlib.sha256(data).hexdigest(), content


def _gather(content: Any, source: str) -> list[Passage]:
    """The passages of a file, each context once, each question of a context once with all its answers."""
    passages: dict[str, Passage] = {}
    seen: dict[str, str] = {}
    for where, title, context, entry in _questions(content, source):
        known = entry.get("id")
        if isinstance(known, (str, int)):
            if str(known) in seen:
                raise ConfigError(f"{where}.id: {show(known)} is already the id of {seen[str(known)]}; give every question an id of its own")
            seen[str(known)] = where.removeprefix(f"{source}: ")
        if entry.get("is_impossible") is True:  # SQuAD 2.0: nothing to answer
            continue
        question = text_of(entry, "question", where)
        passage = passages.setdefault(context, Passage(title, context, {}))
        passage.questions[question] = tuple(dict.fromkeys((*passage.questions.get(question, ()), *_answers(entry, where))))
    if not passages:
        raise ConfigError(f"{source}: no question with an answer; wanted contexts with questions and answers")
    return list(passages.values())


def _questions(content: Any, source: str) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    """Every question of any of the forms: its position, its title, its context, its entry."""
    if isinstance(content, Mapping):
        for i, article in enumerate(_list(content, "data", f"{source}: data")):
            place = f"{source}: data[{i}]"
            title = text_of(mapping_of(article, place), "title", place, default="")
            for j, paragraph in enumerate(_list(article, "paragraphs", f"{place}.paragraphs")):
                at = f"{place}.paragraphs[{j}]"
                context = text_of(mapping_of(paragraph, at), "context", at)
                for k, entry in enumerate(_list(paragraph, "qas", f"{at}.qas")):
                    yield f"{at}.qas[{k}]", title, context, mapping_of(entry, f"{at}.qas[{k}]")
        return
    if not isinstance(content, list):
        raise ConfigError(f"{source}: wanted a list of contexts or SQuAD's {{data: […]}}, got {show(content)}")
    for i, entry in enumerate(content):
        at = f"{source}: [{i}]"
        title, context = text_of(mapping_of(entry, at), "title", at, default=""), text_of(entry, "context", at)
        if "question" in entry:  # a row of the hub: one question each
            yield at, title, context, entry
            continue
        for k, question in enumerate(_list(entry, "questions", f"{at}.questions")):
            yield f"{at}.questions[{k}]", title, context, mapping_of(question, f"{at}.questions[{k}]")


def _answers(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The accepted answers of a question: one text, a list of texts or of {text}, or the hub's {text: [texts]}."""
    key = "answers" if "answers" in entry else "answer"
    found: Any = entry.get(key)
    if isinstance(found, Mapping):
        found = found.get("text")
    texts = found if isinstance(found, list) else [found]
    if not texts:
        raise ConfigError(f"{where}.{key}: wanted at least one answer, got none; mark unanswerable questions with is_impossible, or leave them out")
    answers = []
    for i, text in enumerate(texts):
        one: Mapping[str, Any] = {"answer": text.get("text") if isinstance(text, Mapping) else text}
        answers.append(text_of(one, "answer", where, shown=f"{key}[{i}]" if isinstance(found, list) else key))
    return tuple(answers)


def _list(entry: Mapping[str, Any], key: str, place: str) -> list[Any]:
    value = entry.get(key)
    if not isinstance(value, list):
        raise ConfigError(f"{place}: wanted a list, got {show(value)}")
    if not value:
        raise ConfigError(f"{place}: wanted at least one entry, got an empty list")
    return value
