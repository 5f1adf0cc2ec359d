"""Some questions with gold labels, the others with the rewarder's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from selfimprove import Evaluation, Lineage, Run, Trial, hookimpl
from selfimprove.compose import Composed, rewards_of
from selfimprove.errors import ConfigError
from selfimprove.rewarders import Verifier


class GoldMixed(Composed):
    """The grade by the gold answer for a fixed share of the questions, the inner rewarder's reward for the others.

    Which questions have gold labels is drawn once per run, by question; only their labels are read and charged.

    Args:
        inner: the rewarder of the questions without labels.
        share: of the training questions that have gold labels.
    """

    uses_labels = True

    def __init__(self, inner: Any, share: float = 0.5) -> None:
        if not 0 <= share <= 1:
            raise ConfigError(f"rewarder.share is a share between 0 and 1; got {share}")
        super().__init__("reward", [inner])
        self.share = share

    def key(self) -> Any:
        return [*super().key(), self.share]

    @hookimpl
    def reward(self, trials: Sequence[Trial], lineage: Lineage, run: Run) -> Sequence[Evaluation]:
        gold = [run.rng("gold", t.edit.payload.question).random() < self.share for t in trials]
        found: dict[int, Evaluation] = {}
        for chosen, rewarder in ((True, Verifier()), (False, self.inners[0])):
            members = [i for i, g in enumerate(gold) if g is chosen]
            if members:
                found |= dict(zip(members, rewards_of(rewarder, [trials[i] for i in members], lineage, run), strict=True))
        return [found[i] for i in range(len(trials))]
