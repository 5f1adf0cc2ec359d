"""Hopeless members of a population end early: a fitness that measures fewer of them, the more questions it asks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from selfimprove import Candidate, Evaluation, Lineage, Run, Trial, hookimpl
from selfimprove.compose import Composed, ask
from selfimprove.errors import AdmissionError, ConfigError
from selfimprove.rollouts import Asking
from selfimprove_evolution.fitness import Asked, pooled, population


@runtime_checkable
class Minibatch(Protocol):
    """A rewarder whose value of a candidate is a mean over questions, and that can be asked for some of them."""

    asking: Asking

    def questions(self, lineage: Lineage, run: Run) -> Asked:
        """The questions of this round."""

    def measure(self, trials: Sequence[Trial], asked: Asked, lineage: Lineage, run: Run) -> list[Evaluation]:
        """One evaluation per trial on these questions, with a value for each that was measured."""


class SuccessiveHalving(Composed):
    """A fitness that ends hopeless members early (Jamieson and Talwalkar 2016, arXiv 1502.07943).

    All are measured on the first few questions of the round; the better 1/eta of them on eta times as many more, and so on until the
    questions are used up. A member's score is the mean over the questions that it was measured on, but no more than the worst score of
    those that went on past it, so that no luck on few questions puts it above them. Metrics: ``questions``, and ``own``, the mean itself.

    Args:
        inner: a fitness that can be measured question by question, such as `Fitness` or `AnswerLikelihood`.
        first: questions of the first rung.
        eta: one in eta goes on.
    """

    def __init__(self, inner: Any, first: int = 4, eta: int = 2) -> None:
        super().__init__("reward", [inner])
        if not isinstance(inner, Minibatch):
            raise AdmissionError(
                f"SuccessiveHalving wants a rewarder with `questions` and `measure`, such as Fitness; {type(inner).__name__} has none"
            )
        if first < 1 or eta < 2:
            raise ConfigError(f"SuccessiveHalving wants first >= 1 and eta >= 2; got {first} and {eta}")
        self.inner, self.first, self.eta = inner, first, eta
        self.asking = inner.asking

    def key(self) -> Any:
        raise AdmissionError("what a member is measured on depends on the others, so it cannot be cached; use it without a cache")

    def expected(self, run: Run) -> dict[str, float]:
        """The most that measuring a population costs, roughly, for `selfimprove plan`: less only where members cannot be measured."""
        members, questions = population(run), len(self.inner.questions(Lineage(Candidate.root()), run))
        share = self.asked(members, questions) / max(1, members * questions)
        costs: Mapping[str, float] = ask(self.inner, "expected", run=run) if hasattr(self.inner, "expected") else {}
        return {unit: amount * share for unit, amount in costs.items()}

    def asked(self, members: int, questions: int) -> int:
        """Questions that all members together answer, where each of them can be measured."""
        total, at, size = 0, 0, self.first
        while at < questions:
            total += members * min(size, questions - at)
            at, size, members = at + size, size * self.eta, math.ceil(members / self.eta)
        return total

    @hookimpl
    def reward(self, trials: Sequence[Trial], lineage: Lineage, run: Run) -> Sequence[Evaluation]:
        asked = list(self.inner.questions(lineage, run))
        found: dict[int, list[Evaluation]] = {i: [] for i in range(len(trials))}
        rungs, going, at, size = [], list(range(len(trials))), 0, self.first
        while going and at < len(asked):
            part = asked[at : at + size]
            for i, e in zip(going, self.inner.measure([trials[i] for i in going], part, lineage, run), strict=True):
                found[i].append(e)
            at, size = at + size, size * self.eta
            rungs.append(going)
            able = [i for i in going if all(e.finite for e in found[i])]
            best = sorted(able, key=lambda i: -_together(found[i]).score)  # type: ignore[operator]  # stable: of equals the first
            going = sorted(best[: math.ceil(len(best) / self.eta)])
        return self._capped(found, rungs)

    def _capped(self, found: Mapping[int, Sequence[Evaluation]], rungs: Sequence[Sequence[int]]) -> list[Evaluation]:
        means = {i: _together(e) for i, e in found.items()}
        limit, above = math.inf, set[int]()
        for rung in reversed(rungs):
            ended = [i for i in rung if i not in above]
            for i in ended:
                if (own := means[i].score) is not None:
                    metrics = {**means[i].metrics, "own": own, "questions": float(len(means[i].per_item))}
                    means[i] = dataclasses.replace(means[i], score=min(own, limit), metrics=metrics)
            limit = min([limit, *(s for i in ended if (s := means[i].score) is not None)])
            above.update(rung)
        return [means[i] for i in range(len(means))]


def _together(parts: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of several on different questions; the first that failed, where one did. Metrics are weighted by questions."""
    if failed := next((e for e in parts if not e.finite), None):
        return failed
    if not parts:
        return Evaluation.failed("there was no question to measure on")
    sizes = [max(1, len(e.per_item)) for e in parts]
    metrics = {n: sum(e.metrics[n] * s for e, s in zip(parts, sizes, strict=True)) / sum(sizes) for n in parts[0].metrics}
    return pooled({q: v for e in parts for q, v in e.per_item.items()}, metrics)
