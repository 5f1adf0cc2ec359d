"""Rewarders of agents, and the evaluator that believes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from selfimprove.code import CodeStore
from selfimprove.compose import rewards_of
from selfimprove.errors import ConfigError
from selfimprove.hooks import Scores, hookimpl
from selfimprove.payloads import Patch
from selfimprove.records import Candidate, Edit, Evaluation, Lineage, Trial
from selfimprove.run import Run
from selfimprove_dgm.genome import PART
from selfimprove_dgm.grade import measured


class Repairs:
    """The share of the first `tasks` training functions that the trial's agent repairs. `compose.Staged` puts several in a row.

    What an earlier stage measured is not run again: programs are remembered by content.

    Args:
        tasks: how many functions; at most 60, so that one agent costs at most 30 processor seconds.
    """

    consumes = (Patch,)
    needs = (PART,)
    uses_labels = True

    def __init__(self, tasks: int) -> None:
        if not 1 <= tasks <= 60:
            raise ConfigError(f"rewarder.tasks is between 1 and 60; got {tasks}")
        self.tasks = tasks

    def key(self) -> Any:
        return ["repairs", self.tasks]

    @hookimpl
    def reward(self, trials: Sequence[Trial], run: Run) -> Sequence[Evaluation]:
        store, items = CodeStore(run.folder), run.task.train[: self.tasks]
        found = []
        for i, trial in enumerate(trials):
            found.append(Evaluation.failed(trial.error) if trial.error else measured(store.get(trial.candidate.parts[PART]), items, run))
            run.advance(i + 1, len(trials))
        return found


class Runs:
    """1 for an agent that repairs or leaves its first training function, however badly; no score for one that does not run."""

    consumes = (Patch,)
    needs = (PART,)
    uses_labels = True

    @hookimpl
    def reward(self, trials: Sequence[Trial], lineage: Lineage, run: Run) -> Sequence[Evaluation]:
        found = rewards_of(Repairs(1), trials, lineage, run)
        return [e if e.score is None else Evaluation(1.0) for e in found]


class Believed:
    """Each child is worth what its trial was rewarded with; the root is measured likewise in the first round.

    Outside a run (`selfimprove eval`) a candidate is measured on all functions of the sealed split.
    """

    needs = (PART,)
    uses_labels = True

    @hookimpl
    def evaluate(self, candidates: Sequence[Candidate], trials: Sequence[Trial], rewards: Sequence[Evaluation], lineage: Lineage, run: Run) -> Scores:
        earned = {t.candidate.id: r for t, r in zip(trials, rewards, strict=True)}
        scores: list[tuple[str, Evaluation]] = []
        if trials and len(lineage) == 0:
            first = Trial(Edit((lineage.root.id,), Patch("")), lineage.root)
            scores += [(lineage.root.id, e) for e in rewards_of(run.roles["rewarder"], [first], lineage, run)]
        for candidate in candidates:
            found = earned.get(candidate.id) or measured(CodeStore(run.folder).get(candidate.parts[PART]), run.task.evaluation, run)
            scores.append((candidate.id, found))
        return scores
