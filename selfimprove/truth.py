"""The truth beside the reward: what a strategy that rewards itself would see if it could. It never feeds training.

A wrapper around `evaluate`, after the update, so that what it reads and computes is journaled, charged and repeated by a resume like
everything else. Its findings stand in the round as an evaluation of the parent that has no score, only metrics.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfimprove.graders import Answer, Equating
from selfimprove.hooks import hookimpl
from selfimprove.payloads import Rollout
from selfimprove.policy_gradient import as_score
from selfimprove.records import Evaluation, Lineage, Round, Trial
from selfimprove.run import Run

NOTE = "no score: the truth about the round's rewards"
"""The error of the evaluation that carries the metrics."""
PREFIX = "truth/"
METRICS = ("reward", "accuracy", "gap", "pseudo_label", "within", "across", "entropy", "no_answer", "kl")
LABELLED = frozenset({"accuracy", "gap", "pseudo_label"})
"""Those that the hidden labels are read for."""


@dataclass
class TruthMonitor:
    """Metrics of each round's rollouts, by parent:

    * ``truth/reward`` and ``truth/accuracy``: the mean reward, and the mean grade of the same rollouts by the hidden labels; ``truth/gap``
      is the former minus the latter.
    * ``truth/pseudo_label``: how often what the reward prefers in a group is right: the mean grade of its best rewarded rollouts.
    * ``truth/within`` and ``truth/across``: the largest class of equal answers, as a share of its question's rollouts (the mean over
      questions) and of all rollouts; where ``across`` nears 1, every question gets the same answer.
    * ``truth/entropy``: of the answers to a question, in nats; the mean over questions. ``truth/no_answer``: the share of rollouts
      without one. These read a text as the grader does; for a vote, one that the length limit cut has no answer, whatever number it ends with.
    * ``truth/kl``: the KL divergence of the policy that sampled from the root, per token, in nats: the mean of log π − log π_root.

    Args:
        labels: read the hidden labels; they are charged, and an arm whose guard goes by them is not label-free.
        kl: score every rollout under the root too.
    """

    labels: bool = True
    kl: bool = True

    @property
    def uses_labels(self) -> bool:
        return self.labels

    @hookimpl(wrapper=True)
    def evaluate(self, trials: Sequence[Trial], rewards: Sequence[Evaluation], lineage: Lineage, run: Run) -> Generator[None, Any, Any]:
        scores = yield
        pairs = [(t, r) for t, r in zip(trials, rewards, strict=True) if isinstance(t.edit.payload, Rollout)]
        found = []
        for parent in dict.fromkeys(t.edit.parents[0] for t, _ in pairs):
            own = [(t, r) for t, r in pairs if t.edit.parents[0] == parent]
            metrics = {f"{PREFIX}{n}": v for n, v in self.measure(run, lineage, own).items()}
            found.append((parent, Evaluation(None, metrics, error=NOTE)))
        return [*scores, *found]

    def measure(self, run: Run, lineage: Lineage, pairs: Sequence[tuple[Trial, Evaluation]]) -> dict[str, float]:
        rollouts = [t.edit.payload for t, _ in pairs]
        groups: dict[str, list[int]] = {}
        for i, (trial, _) in enumerate(pairs):
            groups.setdefault(trial.edit.group, []).append(i)
        scored = [r.score for _, r in pairs if r.score is not None]
        found = {"reward": _mean(scored)} if scored else {}
        if isinstance(run.grader, Equating):
            found |= answers(run.grader.classes([r.text for r in rollouts]), list(groups.values()))
        if self.labels and not run.task.transductive:  # the answers stay sealed
            found |= self._truth(run, rollouts, [r.score for _, r in pairs], list(groups.values()))
        if self.kl and (told := [r for r in rollouts if r.logprobs]):
            root = run.models.score([as_score(lineage.root.parts["policy"], r) for r in told])
            gaps = [a - b for r, x in zip(told, root, strict=True) for a, b in zip(r.logprobs, x.logprobs, strict=True)]
            found["kl"] = _mean(gaps)
        return found

    def _truth(self, run: Run, rollouts: Sequence[Rollout], scores: Sequence[float | None], groups: Sequence[Sequence[int]]) -> dict[str, float]:
        questions = {q.id: q for i in run.task.train for q in i.questions}
        known = [i for i, r in enumerate(rollouts) if r.question in questions]
        if not known:
            return {}
        with run.task.reading_as(type(self).__name__, True):
            gold = run.task.labels(questions[q] for q in dict.fromkeys(rollouts[i].question for i in known))
        asked = [Answer(questions[rollouts[i].question].text, gold[rollouts[i].question], rollouts[i].text) for i in known]
        grades = dict(zip(known, run.grader.grade(asked, run.ledger), strict=True))
        found = {"accuracy": _mean(list(grades.values()))}
        rewarded = {i: s for i in known if (s := scores[i]) is not None}
        if rewarded:
            found["gap"] = _mean(list(rewarded.values())) - _mean([grades[i] for i in rewarded])
            best = [preferred(members, rewarded) for members in groups]
            if any(best):
                found["pseudo_label"] = _mean([_mean([grades[i] for i in b]) for b in best if b])
        return found


def preferred(members: Sequence[int], scores: Mapping[int, float]) -> list[int]:
    """The members with the highest score; none where all are equally good, or none has one."""
    measured = [i for i in members if i in scores]
    top = max((scores[i] for i in measured), default=0.0)
    best = [i for i in measured if scores[i] == top]
    return best if len(best) < len(measured) or top > 0 else []


def answers(classes: Sequence[int | None], groups: Sequence[Sequence[int]]) -> dict[str, float]:
    """How much answers agree, within questions and across them."""
    counts = [Counter(classes[i] for i in members if classes[i] is not None) for members in groups]
    whole = Counter(c for c in classes if c is not None)
    return {
        "within": _mean([max(c.values(), default=0) / len(members) for c, members in zip(counts, groups, strict=True)]),
        "across": max(whole.values(), default=0) / len(classes),
        "entropy": _mean([_entropy(c) for c in counts]),
        "no_answer": sum(c is None for c in classes) / len(classes),
    }


def truth_of(one: Round) -> dict[str, float]:
    """What the monitor found in a round, without the prefix; the mean where it had several parents."""
    rows = [{n.removeprefix(PREFIX): v for n, v in e.metrics.items() if n.startswith(PREFIX)} for _, e in one.scores]
    return {n: _mean([r[n] for r in rows if n in r]) for n in dict.fromkeys(n for r in rows for n in r)}


def _entropy(counts: Counter[Any]) -> float:
    total = counts.total()
    return -math.fsum(n / total * math.log(n / total) for n in counts.values()) if total else 0.0


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
