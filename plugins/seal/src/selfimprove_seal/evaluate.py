"""What a candidate is worth: the closed-book accuracy that its own edits reach, next to the arms that it has to beat."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from selfimprove import Candidate, Evaluation, Item, Lineage, Run, hookimpl
from selfimprove.errors import ConfigError
from selfimprove.hooks import Scores
from selfimprove.models import Document
from selfimprove.records import Part
from selfimprove_seal.editor import Lesson
from selfimprove_seal.inner import mean
from selfimprove_seal.rewards import check_inner_loop, context_editor

ARMS = ("untouched", "passage", "passage_equal_tokens", "edits", "gold")


@dataclass
class ClosedBook:
    """Closed-book accuracy on contexts never trained on, after one self-edit per context and its inner loop.

    The first time it is asked, it also measures the arms on the root:

    * ``untouched``: the model as it is;
    * ``passage``: the inner loop on the passage alone;
    * ``passage_equal_tokens``: the passage, for as many trained tokens as the root's edits take, and with their settings;
    * ``edits``: the root's own, untrained edits (the root's score);
    * ``gold``: the gold question-answer pairs as the edit, an oracle.

    Args:
        arms: which of them.
        seeds: inner-loop seeds per context; accuracy is the mean over them.
    """

    arms: tuple[str, ...] = field(default=ARMS)
    seeds: int = 1

    uses_labels = True
    needs = ("policy",)

    def __post_init__(self) -> None:
        self.arms = tuple(self.arms)
        if unknown := set(self.arms) - set(ARMS):
            raise ConfigError(f"evaluator.arms knows {', '.join(ARMS)}; got {', '.join(sorted(unknown))}")
        if self.seeds < 1:
            raise ConfigError(f"evaluator.seeds is at least 1; got {self.seeds}")

    def check_roles(self, roles: Mapping[str, Any]) -> None:
        check_inner_loop(roles)

    @hookimpl
    def prepare(self, run: Run) -> None:
        _check_questions(run)

    @hookimpl
    def evaluate(self, candidates: Sequence[Candidate], lineage: Lineage, run: Run) -> Scores:
        scores: list[tuple[str, Evaluation]] = []
        if lineage.score(lineage.root.id) is None and lineage.root.id not in {c.id for c in candidates}:
            scores.append((lineage.root.id, self.root(run, lineage.root.parts["policy"])))
        for candidate in candidates:
            graded = self.measure(run, "edits", candidate.parts["policy"])
            scores.append((candidate.id, Evaluation(mean(graded), _arm("edits", graded, run.task.evaluation), graded)))
        return scores

    def expected(self, run: Run) -> dict[str, float]:
        """Rough tokens of evaluating one candidate, for `selfimprove plan`; the arms of the first round come on top."""
        return context_editor(run).cost(run.task.evaluation, 1, self.seeds)

    def root(self, run: Run, policy: Part) -> Evaluation:
        """The root's evaluation: its score is that of its untrained edits, its metrics hold every arm."""
        graded = {arm: self.measure(run, arm, policy) for arm in dict.fromkeys(("edits", *self.arms))}
        metrics = {k: v for arm in self.arms for k, v in _arm(arm, graded[arm], run.task.evaluation).items()}
        return Evaluation(mean(graded["edits"]), metrics, graded["edits"])

    def measure(self, run: Run, arm: str, policy: Part, writer: Part | None = None) -> dict[str, float]:
        """The grade of every question of the evaluation split under an arm, by question id; the mean over seeds.

        Args:
            writer: whose edits ``passage_equal_tokens`` matches; the policy's own where it is None.
        """
        _check_questions(run)
        items = run.task.evaluation
        seeds = range(1 if arm == "untouched" else self.seeds)
        rounds = [self._once(run, arm, policy, items, s, writer or policy) for s in seeds]
        return {q: sum(r[q] for r in rounds) / len(rounds) for q in rounds[0]}

    def _once(self, run: Run, arm: str, policy: Part, items: Sequence[Item], number: int, writer: Part) -> dict[str, float]:
        editor = context_editor(run)
        inner = editor.inner
        seeds = [run.seed_for("evaluate", number, i.id) for i in items]
        adapted: list[Part]
        if arm == "untouched":
            adapted = [policy] * len(items)
        elif arm == "edits":
            texts = editor.write(run, policy, items, 1, "evaluate", number)
            made = editor.adapt(run, [(policy, i, t) for i, t in zip(items, texts, strict=True)], seeds)
            adapted = [p if isinstance(p, Part) else policy for p in made]  # a void edit teaches nothing
        elif arm == "passage":
            adapted = inner.train(run, [(policy, inner.documents(i, "")) for i in items], seeds)
        elif arm == "passage_equal_tokens":
            adapted = self._equal_tokens(run, policy, writer, items, number, seeds)
        else:
            gold = run.task.labels(q for i in items for q in i.questions)
            pairs = [(policy, (*inner.documents(i, ""), *(inner.pair(i, q.text, gold[q.id][0]) for q in i.questions))) for i in items]
            adapted = inner.train(run, pairs, seeds)
        graded = inner.accuracy(run, list(zip(adapted, items, strict=True)))
        return {q: g for item in graded for q, g in item.items()}

    def _equal_tokens(self, run: Run, policy: Part, writer: Part, items: Sequence[Item], number: int, seeds: Sequence[int]) -> list[Part]:
        """The passage, for as many trained tokens as the writer's edit takes, to the nearest word, and with the edit's settings.

        A void edit teaches nothing; its passage is trained on once.
        """
        editor = context_editor(run)
        inner = editor.inner
        texts = editor.write(run, writer, items, 1, "evaluate", number)
        lessons = editor.lessons(run, [(writer, i, t) for i, t in zip(items, texts, strict=True)])
        equal = []
        for item, lesson in zip(items, lessons, strict=True):
            [passage] = inner.documents(item, "") or (Document(f"{item.title}\n{item.context}"),)
            if isinstance(lesson, Lesson):
                equal.append((policy, Lesson(repeated(run, passage, sum(run.models.tokens(lesson.documents))), lesson.settings)))
            else:
                equal.append((policy, Lesson((passage,))))
        return editor.teach(run, equal, seeds)


def _check_questions(run: Run) -> None:
    if not any(i.questions for i in run.task.evaluation):
        raise ConfigError("there is no question to measure on; raise task.validation (for `selfimprove eval`, task.test), or choose evaluator=none")


def repeated(run: Run, passage: Document, tokens: int) -> tuple[Document, ...]:
    """A passage as often as it fits into a number of tokens, and then as many of its words as come nearest; never nothing."""
    [once] = run.models.tokens([passage])
    whole, rest = divmod(tokens, once)
    cuts = [Document(passage.text[: word.end()]) for word in re.finditer(r"\S+", passage.text)]

    def size(words: int) -> int:
        return run.models.tokens([cuts[words - 1]])[0] if words else 0

    enough = bisect_left(range(len(cuts)), rest, key=size)
    words = min(max(enough - 1, 0), enough, key=lambda n: abs(size(n) - rest))
    return (passage,) * whole + (cuts[words - 1],) if words else (passage,) * max(1, whole)


def _arm(name: str, graded: dict[str, float], items: Sequence[Item]) -> dict[str, float]:
    """Accuracy, its standard error over contexts and the number of questions. Questions of one context are one cluster."""
    clusters = [[graded[q.id] for q in i.questions] for i in items if i.questions]
    n = len(graded)
    accuracy = mean(graded)
    spread = sum((sum(c) - len(c) * accuracy) ** 2 for c in clusters)
    count = len(clusters)
    error = math.sqrt(spread * count / max(1, count - 1)) / n
    return {f"arm/{name}": accuracy, f"arm/{name}/se": error, f"arm/{name}/n": float(n)}
