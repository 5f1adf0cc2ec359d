"""Fitness of candidates on a minibatch of questions, the same for all and with the same random numbers.

So members of a population differ by their weights alone. A fitness is a rewarder, and any rewarder of rollouts makes one (`Fitness`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from selfimprove import Candidate, Edit, Evaluation, Lineage, Run, Trial, hookimpl
from selfimprove.compose import Composed, rewards_of
from selfimprove.errors import AdmissionError, ConfigError
from selfimprove.models import Score
from selfimprove.payloads import Rollout
from selfimprove.rollouts import Asking, Rollouts
from selfimprove.task import Item, Question

Asked = Sequence[tuple[Item, Question]]


class Fitness(Composed):
    """The mean over a minibatch of questions of what a rewarder of rollouts gives to the candidate's answers.

    A question is left out where none of its rollouts could be measured, and a candidate has no fitness where that is so of all.
    Metrics: ``tokens`` (the mean length of an answer), ``finished`` (the share that no limit cut) and ``distinct`` (different texts, as a
    share of all).

    Args:
        inner: the rewarder; it sees the rollouts of a candidate and question as one group.
        asking: how questions are asked, as a mapping of `Asking`'s arguments.
        prompts: questions per round, taken in turn from the shuffled training split; 0 takes all of it every round.
        samples: rollouts per question.
        temperature: of the answers; 0 is greedy. The evaluator samples at ``asking.temperature``.
        levels: the highest level of the items asked about, round by round, as in `selfimprove.rollouts.Rollouts`.
    """

    consumes = None  # of any candidate with a policy: the inner rewarder consumes rollouts, which are made here

    def __init__(self, inner: Any, asking: Asking, prompts: int = 16, samples: int = 1, temperature: float = 0.0, levels: Sequence[int] = ()) -> None:
        super().__init__("reward", [inner])
        self.consumes = None
        if (taken := getattr(inner, "consumes", None)) is not None and not any(issubclass(Rollout, kind) for kind in taken):
            raise AdmissionError(f"Fitness wants a rewarder of rollouts; {type(inner).__name__} consumes {', '.join(k.__name__ for k in taken)}")
        if not temperature >= 0:
            raise ConfigError(f"rewarder.temperature is at least 0; got {temperature}")
        self.inner, self.temperature = inner, temperature
        self.rollouts = Rollouts(asking, prompts, samples, levels)
        self.asking = self.rollouts.asking

    @property
    def needs(self) -> tuple[str, ...]:
        return ("policy",)

    @hookimpl
    def prepare(self, root: Any, run: Run) -> Any:
        self.rollouts.prepare(root, run)
        return super().prepare(root, run)

    @hookimpl
    def reward(self, trials: Sequence[Trial], lineage: Lineage, run: Run) -> Sequence[Evaluation]:
        return self.measure(trials, self.questions(lineage, run), lineage, run)

    def questions(self, lineage: Lineage, run: Run) -> Asked:
        return self.rollouts.questions(run, len(lineage))

    def measure(self, trials: Sequence[Trial], asked: Asked, lineage: Lineage, run: Run) -> list[Evaluation]:
        wanted = [(t, i, q, k) for t in trials if t.error is None for i, q in asked for k in range(self.rollouts.samples)]
        seeds = {(q.id, k): run.seed_for("fitness", len(lineage), q.id, k) for _, q in asked for k in range(self.rollouts.samples)}
        requests = [
            self.asking.request(t.candidate.parts["policy"], self.asking.prompt(i, q), seeds[q.id, k], self.temperature, logprobs=True)
            for t, i, q, k in wanted
        ]
        answers: list[Trial] = []
        for (t, i, q, _), r, c in zip(wanted, requests, run.models.generate(requests), strict=True):
            rollout = Rollout(c.text, r.prompt, i.id, q.id, c.ids, c.logprobs, self.temperature or 1.0, c.finished, r.chat)
            answers.append(Trial(Edit(t.edit.parents, rollout, f"{t.candidate.id}/{q.id}"), t.candidate))
        rewards = rewards_of(self.inner, answers, lineage, run)
        size = len(asked) * self.rollouts.samples
        found, at = [], 0
        for t in trials:
            if t.error is not None:
                found.append(Evaluation.failed(t.error))
                continue
            found.append(_mean([a.edit.payload for a in answers[at : at + size]], rewards[at : at + size]))
            at += size
        return found

    def key(self) -> Any:
        raise AdmissionError("the fitness of a candidate depends on the round's questions, so it cannot be cached; use it without a cache")

    def expected(self, run: Run) -> dict[str, float]:
        """Rough tokens of measuring a population once, for `selfimprove plan`."""
        return _times(self.rollouts.expected(run), run)


class AnswerLikelihood:
    """The mean log-likelihood per token of the accepted answers to a minibatch of questions, in nats. Nothing is sampled.

    Args:
        asking: how questions are asked, as a mapping of `Asking`'s arguments.
        prompts, levels: questions per round, as for `Fitness`.
    """

    uses_labels = True
    needs = ("policy",)

    def __init__(self, asking: Asking, prompts: int = 16, levels: Sequence[int] = ()) -> None:
        self.rollouts = Rollouts(asking, prompts, 1, levels)
        self.asking = self.rollouts.asking

    @hookimpl
    def prepare(self, root: Candidate, run: Run) -> None:
        self.rollouts.prepare(root, run)

    @hookimpl
    def reward(self, trials: Sequence[Trial], lineage: Lineage, run: Run) -> Sequence[Evaluation]:
        return self.measure(trials, self.questions(lineage, run), lineage, run)

    def questions(self, lineage: Lineage, run: Run) -> Asked:
        return self.rollouts.questions(run, len(lineage))

    def measure(self, trials: Sequence[Trial], asked: Asked, lineage: Lineage, run: Run) -> list[Evaluation]:
        gold = run.task.labels(q for _, q in asked)
        space = "" if self.asking.chat else " "
        able = [t for t in trials if t.error is None]
        found = run.models.score(
            [
                Score(t.candidate.parts["policy"], self.asking.prompt(i, q), space + gold[q.id][0], chat=self.asking.chat)
                for t in able
                for i, q in asked
            ]
        )
        values = iter(found)
        return [Evaluation.failed(t.error) if t.error is not None else pooled({q.id: next(values).per_token for _, q in asked}) for t in trials]

    def expected(self, run: Run) -> dict[str, float]:
        """Rough tokens of measuring a population once, for `selfimprove plan`."""
        return _times({"scored_tokens": 40.0 * len(self.rollouts.questions(run, 0))}, run)


def _mean(rollouts: Sequence[Rollout], rewards: Sequence[Evaluation]) -> Evaluation:
    """The evaluation of one candidate, from its rollouts."""
    by_question: dict[str, list[float]] = {}
    for rollout, reward in zip(rollouts, rewards, strict=True):
        if reward.score is not None:
            by_question.setdefault(rollout.question, []).append(reward.score)
    count = max(1, len(rollouts))
    metrics = {
        "tokens": sum(len(r.ids) for r in rollouts) / count,
        "finished": sum(r.finished for r in rollouts) / count,
        "distinct": len({r.text for r in rollouts}) / count,
    }
    if not by_question:
        reason = next((r.error for r in rewards if r.error), "there is no question")
        return Evaluation(None, metrics, error=f"no answer could be measured: {reason}")
    return pooled({q: math.fsum(scores) / len(scores) for q, scores in by_question.items()}, metrics)


def pooled(per_item: Mapping[str, float], metrics: Mapping[str, float] | None = None) -> Evaluation:
    return Evaluation(math.fsum(per_item.values()) / len(per_item), metrics or {}, per_item)


def population(run: Run) -> int:
    """Trials of a round, as far as the editor tells."""
    return int(getattr(run.roles.get("editor"), "population", 1))


def _times(costs: Mapping[str, float], run: Run) -> dict[str, float]:
    return {unit: amount * population(run) for unit, amount in costs.items()}
