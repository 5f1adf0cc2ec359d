"""The reward of SRT and TTRL: a rollout is right where its answer is the one that most rollouts of its question give."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from selfimprove import Evaluation, Run, Trial, hookimpl
from selfimprove.errors import ConfigError
from selfimprove.graders import equating
from selfimprove.payloads import Rollout
from selfimprove.rollouts import classes_of


@dataclass(frozen=True, slots=True)
class Vote:
    """How a group of answers voted."""

    winner: int | None
    """The class of the majority; None where nobody answered, or two classes have equally many votes."""
    share: float
    """The winner's share of all rollouts; of the largest class where nobody won."""
    shares: tuple[float, ...]
    """For each rollout, the share of its class; 0 for one without an answer."""
    entropy: float
    """Of the shares among those who answered, in nats."""


def count_votes(classes: Sequence[int | None]) -> Vote:
    """The vote of the rollouts of one question, by the class of each answer. A missing answer neither votes nor wins."""
    counts = Counter(c for c in classes if c is not None)
    if not counts:
        return Vote(None, 0.0, (0.0,) * len(classes), 0.0)
    (first, most), *others = counts.most_common(2)
    voters = counts.total()
    return Vote(
        winner=None if others and others[0][1] == most else first,
        share=most / len(classes),
        shares=tuple(counts[c] / len(classes) if c is not None else 0.0 for c in classes),
        entropy=-math.fsum(n / voters * math.log(n / voters) for n in counts.values()),
    )


@dataclass
class MajorityVote:
    """r = 1[answer ≡ mode of the group's answers] (SRT, section 3; TTRL, Zuo et al. 2025, arXiv 2504.16084, section 2.2).

    The vote is over classes of equivalent answers, as the grader tells them, not over texts. A question abstains (its rollouts have no
    reward) where the vote is tied or the winner's share is below the threshold. Metrics: ``share`` and ``entropy`` of the group's vote.

    Args:
        threshold: the least share of all rollouts that a majority needs; SRT's online filter is 0.6.
        soft: reward a rollout with the share of its answer instead of 1 or 0; then ties are no reason to abstain.
        keep: the share of a round's questions that is rewarded, those with the largest majorities first: oversample and keep.
        trained: how many rollouts of a question are rewarded, the others only vote (TTRL: 32 of 64); 0 rewards all.
    """

    threshold: float = 0.0
    soft: bool = False
    keep: float = 1.0
    trained: int = 0

    consumes = (Rollout,)

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"rewarder.threshold is a share between 0 and 1; got {self.threshold}")
        if not 0 < self.keep <= 1 or self.trained < 0:
            raise ConfigError(f"rewarder wants 0 < keep <= 1 and trained >= 0; got {self.keep} and {self.trained}")

    @hookimpl
    def prepare(self, run: Run) -> None:
        equating(run.grader)  # refused before anything is generated

    @hookimpl
    def reward(self, trials: Sequence[Trial], run: Run) -> Sequence[Evaluation]:
        grader = equating(run.grader)
        groups: dict[str, list[int]] = {}
        for i, trial in enumerate(trials):
            groups.setdefault(trial.edit.group, []).append(i)
        classes = {g: classes_of(grader, [trials[i].edit.payload for i in members]) for g, members in groups.items()}
        votes = {g: count_votes(c) for g, c in classes.items()}
        surest = sorted(votes, key=lambda g: -votes[g].share)  # stable: of equally sure questions, the first
        kept = set(surest[: math.ceil(self.keep * len(surest))])
        found: dict[int, Evaluation] = {}
        for g, members in groups.items():
            for n, (i, answer, share) in enumerate(zip(members, classes[g], votes[g].shares, strict=True)):
                found[i] = self._evaluation(votes[g], answer, share) if g in kept else self._dropped(votes[g])
                if self.trained and n >= self.trained and found[i].score is not None:
                    found[i] = replace(found[i], score=None, error="the rollout only votes")
        return [found[i] for i in range(len(trials))]

    def _dropped(self, vote: Vote) -> Evaluation:
        return Evaluation(None, {"share": vote.share, "entropy": vote.entropy}, error="other questions of the round have larger majorities")

    def _evaluation(self, vote: Vote, answer: int | None, share: float) -> Evaluation:
        metrics = {"share": vote.share, "entropy": vote.entropy}
        if vote.share == 0:
            return Evaluation(None, metrics, error="no rollout of the question holds an answer")
        if vote.share < self.threshold:
            return Evaluation(None, metrics, error=f"the majority's share, {vote.share:.2f}, is below the threshold of {self.threshold:.2f}")
        if self.soft:
            return Evaluation(share, metrics)
        if vote.winner is None:
            return Evaluation(None, metrics, error="the vote is tied")
        return Evaluation(float(answer == vote.winner), metrics)
