"""Evaluators that need no measurement of their own."""

from __future__ import annotations

from collections.abc import Sequence

from selfimprove.hooks import Scores, hookimpl
from selfimprove.records import Candidate, Evaluation, Trial


class RewardIsScore:
    """Each child is worth what its trial was rewarded with, where the reward *is* the benchmark.

    A child that is no trial's candidate, because an updater made it of several, gets no score.
    """

    @hookimpl
    def evaluate(self, candidates: Sequence[Candidate], trials: Sequence[Trial], rewards: Sequence[Evaluation]) -> Scores:
        earned: dict[str, list[Evaluation]] = {}
        for trial, reward in zip(trials, rewards, strict=True):
            earned.setdefault(trial.candidate.id, []).append(reward)
        return [(c.id, reward) for c in candidates for reward in earned.get(c.id, ())]
