"""Updaters that train nothing: they choose among the candidates that trials are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from selfimprove.hooks import hookimpl
from selfimprove.records import Candidate, Evaluation, Trial


@dataclass
class BestOfGroup:
    """The candidate of each group's best trial, where it was rewarded with more than `margin`; of equals the first.

    With a reward that is a gain over the parent this is hill climbing: what is not better than its parent is not kept.
    """

    margin: float = 0.0

    keeps_trials = True

    @hookimpl
    def update(self, trials: Sequence[Trial], rewards: Sequence[Evaluation]) -> Sequence[Candidate]:
        best: dict[str, tuple[float, Candidate]] = {}
        for trial, reward in zip(trials, rewards, strict=True):
            if reward.score is not None and reward.score > best.get(trial.edit.group, (self.margin, None))[0]:
                best[trial.edit.group] = (reward.score, trial.candidate)
        return [candidate for _, candidate in best.values()]
