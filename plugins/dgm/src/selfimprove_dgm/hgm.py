"""HGM (Wang et al. 2025): Thompson sampling over clades, and one more task for one agent wherever expanding can wait.

The paper chooses at every step between expanding and evaluating. A round here is one expansion and the evaluations until the next
one, in the same order, so the two halves are a selector and an evaluator, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from selfimprove.code import CodeStore
from selfimprove.errors import ConfigError
from selfimprove.hooks import Scores, hookimpl
from selfimprove.records import Candidate, Evaluation, Lineage, Trial
from selfimprove.run import Run
from selfimprove_dgm.archive import Archive
from selfimprove_dgm.genome import PART
from selfimprove_dgm.grade import VOID, measured


class CladeThompson:
    """The agent whose clade (it and all its descendants) has the highest draw of Beta(1 + solved, 1 + failed).

    An agent that tampered with a measurement is not expanded.
    """

    needs_scores = True

    def __init__(self) -> None:
        self._archive = Archive()

    @hookimpl
    def select(self, lineage: Lineage, run: Run) -> Sequence[Candidate]:
        archive = self._archive.follow(lineage)
        drawn = run.rng("select", len(lineage)).beta(1 + archive.column("clade_won"), 1 + archive.column("clade_lost"))  # (N,)
        return [lineage[archive.ids[int(np.argmax(np.where(archive.column("void") > 0, -1.0, drawn)))]]]


class ExpandOrEvaluate:
    """Single tasks of single agents, chosen by Thompson sampling over agents, until evaluations^exponent ≥ agents − 1.

    An agent that stops running counts as failing the task; one that tampers with its measurement has no score for it, and is measured no more.

    Args:
        exponent: 0.6 in the paper.
        tasks: of the training functions, those that an agent can be measured on.
    """

    needs = (PART,)
    uses_labels = True

    def __init__(self, exponent: float = 0.6, tasks: int = 60) -> None:
        if not 0 < exponent <= 1 or not 1 <= tasks <= 60:
            raise ConfigError(f"evaluator.exponent is in (0, 1] and tasks between 1 and 60; got {exponent} and {tasks}")
        self.exponent, self.tasks = exponent, tasks
        self._archive = Archive()

    @hookimpl
    def evaluate(self, candidates: Sequence[Candidate], trials: Sequence[Trial], lineage: Lineage, run: Run) -> Scores:
        store = CodeStore(run.folder)
        if candidates and not trials:  # a measurement outside the run
            return [(c.id, measured(store.get(c.parts[PART]), run.task.evaluation, run)) for c in candidates]
        items, standing = run.task.train[: self.tasks], Standing(self._archive.follow(lineage), candidates, lineage)
        scores: list[tuple[str, Evaluation]] = []
        while standing.evaluations**self.exponent < len(standing.won) - 1 or not standing.evaluations:
            at = standing.sampled(len(items), run.rng("evaluate", len(lineage), len(scores)))
            if at is None:
                break
            agent, done = standing.agent(at), standing.done(at)
            left = [i for i in items if i.id not in done]
            item = left[int(run.rng("evaluate", "task", agent.id, len(done)).integers(len(left)))]
            found = measured(store.get(agent.parts[PART]), [item], run)
            if found.score is None and VOID not in found.metrics:  # it ran when it was made
                found = Evaluation(0.0, {"tasks": 1.0}, {item.id: 0.0})
            scores.append((agent.id, found))
            standing.add(at, item.id, found)
        return scores


class Standing:
    """What is known of every agent of a lineage and of the candidates after them, by place, as more tasks are measured.

    ``won``, ``lost`` and ``void`` are the columns of an archive, continued. (N,) each
    """

    def __init__(self, archive: Archive, candidates: Sequence[Candidate], lineage: Lineage) -> None:
        new = np.zeros(len(candidates))
        self.won, self.lost, self.void = (np.concatenate([archive.column(n), new]) for n in ("won", "lost", "void"))
        self._ids, self._candidates, self._lineage = archive.ids, candidates, lineage
        self._done: dict[int, set[str]] = {}

    @property
    def evaluations(self) -> float:
        """Of single tasks, of all agents."""
        return float(self.won.sum() + self.lost.sum())

    def sampled(self, tasks: int, chance: np.random.Generator) -> int | None:
        """The agent with the highest draw of Beta(1 + solved, 1 + failed) among those with tasks left to measure; None where there is none."""
        unfinished = (self.won + self.lost < tasks) & (self.void == 0)  # (N,)
        if not unfinished.any():
            return None
        drawn = chance.beta(1 + self.won, 1 + self.lost)  # (N,)
        return int(np.argmax(np.where(unfinished, drawn, -1.0)))

    def agent(self, place: int) -> Candidate:
        new = place - len(self._ids)
        return self._lineage[self._ids[place]] if new < 0 else self._candidates[new]

    def done(self, place: int) -> set[str]:
        """Ids of the tasks that an agent was measured on."""
        if place not in self._done:
            self._done[place] = {i for e in self._lineage.evaluations(self.agent(place).id) for i in e.per_item}
        return self._done[place]

    def add(self, place: int, item: str, found: Evaluation) -> None:
        """Count the measurement of one task."""
        self.done(place).add(item)
        if found.score is None:
            self.void[place] += 1
        else:
            self.won[place] += found.score
            self.lost[place] += 1 - found.score
