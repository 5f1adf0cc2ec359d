"""What the base model votes before the run: labels that stay as they are, and how easy a question is for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from selfimprove import Candidate, Evaluation, Lineage, Run, Trial, hookimpl
from selfimprove.errors import ConfigError
from selfimprove.graders import Equating, equating
from selfimprove.models import Completion
from selfimprove.payloads import Rollout
from selfimprove.records import Part
from selfimprove.rollouts import Rollouts, asking_of, classes_of
from selfimprove.task import Item, Question
from selfimprove_srt.vote import count_votes

VOTES = "votes"
"""The part of the root that names what the base model voted."""


class Ballot(TypedDict):
    """The base model's vote on one question."""

    answer: str | None
    """A text of the majority's; None where nobody won."""
    share: float
    """The largest class's share of all samples."""


def with_votes(root: Candidate, run: Run, samples: int) -> Candidate:
    """The root with the base model's vote on every training question as its part `VOTES`, unless another role took it already."""
    if VOTES in root.parts:
        return root
    return root.derive("votes", **{VOTES: run.blobs.write("votes", take_votes(run, root.parts["policy"], samples))})


def take_votes(run: Run, policy: Part, samples: int) -> dict[str, Ballot]:
    """By question id, the vote of some samples of a policy, asked as the editor asks."""
    asking, grader = asking_of(run), equating(run.grader)
    asked = [(i, q) for i in run.task.train for q in i.questions]
    requests = [asking.request(policy, asking.prompt(i, q), run.seed_for("votes", q.id, k)) for i, q in asked for k in range(samples)]
    found = run.models.generate(requests)
    return {q.id: _ballot(found[n * samples : (n + 1) * samples], grader) for n, (_, q) in enumerate(asked)}


def votes_of(lineage: Lineage, run: Run) -> Mapping[str, Ballot]:
    """The base model's votes of a run whose root holds them."""
    found: Mapping[str, Ballot] = run.blobs.read(lineage.root.parts[VOTES])
    return found


def _ballot(found: Sequence[Completion], grader: Equating) -> Ballot:
    classes = classes_of(grader, found)
    vote = count_votes(classes)
    return Ballot(answer=None if vote.winner is None else found[classes.index(vote.winner)].text, share=vote.share)


@dataclass
class OfflineMajority:
    """r = 1[answer ≡ the base model's majority], a label made once, before the run (SRT, on what delays collapse).

    A policy that drifts cannot drag its labels along. A question on which the base model's vote was tied or silent abstains, and so does
    one with a majority below the threshold. Metric: ``share``, the base model's.

    Args:
        samples: of the base model, per question.
        threshold: the least share of them that a majority needs.
    """

    samples: int = 16
    threshold: float = 0.0

    consumes = (Rollout,)
    needs = ("policy",)

    def __post_init__(self) -> None:
        if self.samples < 1 or not 0 <= self.threshold <= 1:
            raise ConfigError(f"rewarder wants samples >= 1 and a threshold between 0 and 1; got {self.samples} and {self.threshold}")

    @hookimpl
    def prepare(self, root: Candidate, run: Run) -> Candidate:
        return with_votes(root, run, self.samples)

    @hookimpl
    def reward(self, trials: Sequence[Trial], lineage: Lineage, run: Run) -> Sequence[Evaluation]:
        votes, grader = votes_of(lineage, run), equating(run.grader)
        groups: dict[str, list[int]] = {}
        for i, trial in enumerate(trials):
            groups.setdefault(trial.edit.payload.question, []).append(i)
        found: dict[int, Evaluation] = {}
        for question, members in groups.items():
            ballot = votes.get(question, Ballot(answer=None, share=0.0))
            given = [Rollout(ballot["answer"] or ""), *(trials[i].edit.payload for i in members)]
            label, *own = classes_of(grader, given)
            found |= {i: self._evaluation(ballot, label, answer) for i, answer in zip(members, own, strict=True)}
        return [found[i] for i in range(len(trials))]

    def _evaluation(self, ballot: Ballot, label: int | None, answer: int | None) -> Evaluation:
        metrics = {"share": ballot["share"]}
        if label is None:
            return Evaluation(None, metrics, error="the base model's vote has no winner")
        if ballot["share"] < self.threshold:
            reason = f"the base model's majority, {ballot['share']:.2f}, is below the threshold of {self.threshold:.2f}"
            return Evaluation(None, metrics, error=reason)
        return Evaluation(float(answer == label), metrics)


@dataclass
class EasiestRollouts(Rollouts):
    """Rollouts for the questions on which the base model agrees with itself most (SRT, on what delays
    collapse: easy by majority frequency; no label is read).

    Args:
        easiest: the share of the training questions that is kept.
        votes: samples of the base model per question, which are taken before the run.
    """

    easiest: float = 1 / 3
    votes: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.easiest <= 1 or self.votes < 1:
            raise ConfigError(f"editor wants 0 < easiest <= 1 and votes >= 1; got {self.easiest} and {self.votes}")

    @hookimpl
    def prepare(self, root: Candidate, run: Run) -> Candidate:
        super().prepare(root, run)
        return with_votes(root, run, self.votes)

    def pool(self, run: Run, root: Candidate | None) -> list[tuple[Item, Question]]:
        everything = super().pool(run, root)
        if root is None or VOTES not in root.parts:
            return everything
        votes: Mapping[str, Ballot] = run.blobs.read(root.parts[VOTES])
        ranked = sorted(everything, key=lambda pair: (-votes[pair[1].id]["share"], pair[1].id))
        kept = {q.id for _, q in ranked[: math.ceil(self.easiest * len(ranked))]}
        return [(i, q) for i, q in everything if q.id in kept]
