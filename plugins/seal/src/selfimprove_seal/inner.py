"""The inner loop: what an edit trains the model on, and what the model then answers, with the passage out of sight.

SEAL, section 3.1: θ' = SFT(θ, SE), reward = performance of θ' on the questions of the context.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfimprove.errors import ConfigError
from selfimprove.graders import Answer
from selfimprove.models import Document, Generate, Lora, Score, Train
from selfimprove.records import Part
from selfimprove.run import Run
from selfimprove.task import Item
from selfimprove_seal.prompts import QUESTION

_PAIR = re.compile(r"^\s*(?:\d+[.)]\s*)?(?:Q|Question)(?:\s*\d+)?\s*[:.]\s*(?P<question>.+?)\s*(?:A|Answer)(?:\s*\d+)?\s*[:.]\s*(?P<answer>.+?)\s*$")


@dataclass(frozen=True)
class InnerLoop:
    """The settings of the inner loop, and its two halves: `documents` and `ask`.

    Args:
        lora: mapping with the fields of `selfimprove.models.Lora`.
        question: the closed-book prompt, with ``{question}`` and optionally ``{title}``.
        answer_tokens: the most tokens of an answer.
        passage: train on the passage itself too.
        pairs: ``text`` trains on a question-answer line as a text like any other (the paper's way); ``prompt``
            trains its answer after the closed-book prompt.
        replicates: inner-loop seeds per edit.
    """

    lora: Mapping[str, Any]
    question: str = QUESTION
    answer_tokens: int = 64
    passage: bool = True
    pairs: str = "text"
    replicates: int = 1

    def __post_init__(self) -> None:
        if "{question}" not in self.question:
            raise ConfigError(f"inner.question needs the field {{question}}; got {self.question!r}")
        if self.pairs not in ("text", "prompt"):
            raise ConfigError(f"inner.pairs is 'text' or 'prompt'; got {self.pairs!r}")
        if self.replicates < 1 or self.answer_tokens < 1:
            raise ConfigError(f"inner.replicates and inner.answer_tokens are at least 1; got {self.replicates} and {self.answer_tokens}")
        self.settings()

    def settings(self, **changes: Any) -> Lora:
        """The adapter's settings, with some of them changed. Raises: ConfigError for a field that does not exist."""
        return Lora.of(self.lora, "inner.lora", **changes)

    def prompt(self, item: Item, question: str) -> str:
        return self.question.replace("{title}", item.title).replace("{question}", question)

    def documents(self, item: Item, edit: str) -> tuple[Document, ...]:
        """The passage and every line of the edit, each prefixed by the title (SEAL, appendix B); repeated lines once."""
        found = [Document(f"{item.title}\n{item.context}")] if self.passage and item.context else []
        for line in edit.splitlines():
            if document := self.line(item, line):
                found.append(document)
        return tuple(dict.fromkeys(found))

    def line(self, item: Item, line: str) -> Document | None:
        """The document of one line of an edit; None for an empty one."""
        line = line.strip()
        if not line:
            return None
        pair = _PAIR.match(line) if self.pairs == "prompt" else None
        if pair:
            return self.pair(item, pair["question"], pair["answer"])
        return Document(f"{item.title}\n{line}")

    def pair(self, item: Item, question: str, answer: str) -> Document:
        """A question and its answer, as the model will be asked."""
        if self.pairs == "text":
            return Document(f"{item.title}\nQuestion: {question} Answer: {answer}")
        prompt = self.prompt(item, question)
        return Document(answer if prompt.endswith("\n") else f" {answer}", prompt=prompt)

    def train(self, run: Run, jobs: Sequence[tuple[Part, Sequence[Document]]], seeds: Sequence[int], **changes: Any) -> list[Part]:
        """One adapted policy per job (policy, documents); without documents the policy itself."""
        lora = self.settings(**changes)
        requests = [Train(p, tuple(d), lora, s) for (p, d), s in zip(jobs, seeds, strict=True) if d]
        adapted = iter(run.models.train(requests))
        return [next(adapted).policy if documents else policy for policy, documents in jobs]

    def accuracy(self, run: Run, asked: Sequence[tuple[Part, Item]]) -> list[dict[str, float]]:
        """For each (policy, item) the grade of every question by id, answered greedily, closed book."""
        requests, answers, places = [], [], []
        gold = run.task.labels(q for _, item in asked for q in item.questions)
        for i, (policy, item) in enumerate(asked):
            for q in item.questions:
                requests.append(Generate(policy, self.prompt(item, q.text), self.answer_tokens, temperature=0.0, stop=("\n",)))
                places.append((i, q))
        for (_, q), completion in zip(places, run.models.generate(requests), strict=True):
            answers.append(Answer(q.text, gold[q.id], completion.text.strip()))
        graded: list[dict[str, float]] = [{} for _ in asked]
        for (i, q), grade in zip(places, run.grader.grade(answers, run.ledger), strict=True):
            graded[i][q.id] = grade
        return graded

    def log_likelihood(self, run: Run, asked: Sequence[tuple[Part, Item]]) -> list[dict[str, float]]:
        """For each (policy, item) the gold answer's log-likelihood per token, by question id, in nats."""
        gold = run.task.labels(q for _, item in asked for q in item.questions)
        requests, places = [], []
        for i, (policy, item) in enumerate(asked):
            for q in item.questions:
                prompt = self.prompt(item, q.text)
                answer = gold[q.id][0]
                requests.append(Score(policy, prompt, answer if prompt.endswith("\n") else f" {answer}"))
                places.append((i, q))
        scored: list[dict[str, float]] = [{} for _ in asked]
        for (i, q), likelihood in zip(places, run.models.score(requests), strict=True):
            scored[i][q.id] = likelihood.per_token
        return scored


def answer_of(line: str) -> str:
    """The answer of a question-answer line, with or without its question's opening; the whole line where it is none."""
    pair = _PAIR.match(line) or _PAIR.match(f"Question: {line}")
    return pair["answer"] if pair else line


def mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
