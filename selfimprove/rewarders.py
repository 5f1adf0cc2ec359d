"""Rewarders that others are compared with: the truth, and chance."""

from __future__ import annotations

from collections.abc import Sequence

from selfimprove.errors import ConfigError
from selfimprove.graders import Answer
from selfimprove.hooks import hookimpl
from selfimprove.payloads import Rollout
from selfimprove.records import Evaluation, Lineage, Trial
from selfimprove.run import Run


class Verifier:
    """A rollout's grade by the gold answer of its question: reinforcement learning with verifiable rewards."""

    consumes = (Rollout,)
    uses_labels = True

    def key(self) -> str:
        return "verifier"

    @hookimpl
    def reward(self, trials: Sequence[Trial], run: Run) -> Sequence[Evaluation]:
        questions = {q.id: q for i in run.task.train for q in i.questions}
        known = [t.edit.payload for t in trials if t.edit.payload.question in questions]
        gold = run.task.labels(questions[q] for q in dict.fromkeys(r.question for r in known))
        answers = [Answer(questions[r.question].text, gold[r.question], r.text) for r in known]
        grades = iter(run.grader.grade(answers, run.ledger))
        return [
            Evaluation(next(grades)) if t.edit.payload.question in questions else Evaluation.failed("the rollout answers no training question")
            for t in trials
        ]


class Chance:
    """1 with a fixed probability, whatever the rollout says: the null arm of every learnt reward.

    Args:
        probability: of a reward of 1.
    """

    def __init__(self, probability: float = 0.5) -> None:
        if not 0 <= probability <= 1:
            raise ConfigError(f"rewarder.probability is between 0 and 1; got {probability}")
        self.probability = probability

    @hookimpl
    def reward(self, trials: Sequence[Trial], lineage: Lineage, run: Run) -> Sequence[Evaluation]:
        drawn = run.rng("reward", len(lineage)).random(len(trials))
        return [Evaluation(float(x < self.probability)) for x in drawn]
